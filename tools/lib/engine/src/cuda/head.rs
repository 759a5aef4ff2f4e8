//! The output projection, in chunks of rows and slices of the vocabulary: neither
//! the logits nor a decoded head ever exist whole. The logits of a few rows, as in
//! decoding, are made of the codes themselves (`few`).

use half::bf16;

use super::driver::{Address, Operand, Precision, Product};
use super::memory::{Buffer, Room, piece};
use super::{Cuda, Matrix, Store, args, few};

/// What a chunk's logits and their gradient may take together, of few rows and of many:
/// 256 rows of a Qwen3's vocabulary, and 1,024. The head is read for every chunk, and the
/// gradient by the hidden states has tiles of only so many rows for all multiprocessors.
const CHUNK_BYTES: [usize; 2] = [256 << 20, 900 << 20];

/// Chunks that rows are cut into before chunks grow: so scratch grows with a pass, of which
/// it is a small part, and small passes take no more of it.
const CHUNKS: usize = 4;

/// Rows of a quantised head that are decoded at a time; a multiple of 64, so that
/// a slice starts with a block of NF4.
const SLICE: usize = 8192;

/// Rows whose logits exist at the same time: whole tiles of a product, if it is several.
/// Of the rows of a pass alone, so that a run that goes on sums as it began; more rows never
/// have smaller chunks.
fn chunk_rows(vocabulary: usize, rows: usize) -> usize {
    const TILE: usize = 128;
    let bytes_of_row = vocabulary * (size_of::<f32>() + size_of::<bf16>());
    let [few, many] = CHUNK_BYTES.map(|bytes| bytes / bytes_of_row);
    let fitting = (rows / CHUNKS).clamp(few, many);
    let fitting = match fitting {
        ..TILE => fitting.max(TILE / 2),
        _ => fitting - fitting % TILE,
    };
    rows.min(fitting)
}

/// Room for a decoded slice.
fn slice_scratch(head: &Matrix) -> usize {
    match head.store {
        Store::Dense(_) | Store::Shared(_) => 0,
        Store::Nf4 { .. } => head.rows.min(SLICE) * head.cols,
    }
}

/// Where a slice is decoded to.
pub(super) fn slice_room(head: &Matrix, scratch: &Buffer<u8>) -> Address {
    Room::new(scratch).take::<bf16>(slice_scratch(head))
}

/// Scratch bytes for the loss, and the logits, of `rows` rows.
pub(super) fn scratch(head: &Matrix, rows: usize) -> usize {
    let rows = chunk_rows(head.rows, rows);
    piece::<bf16>(slice_scratch(head))
        + piece::<f32>(rows * head.rows)
        + piece::<bf16>(rows * head.rows)
        + piece::<f32>(rows * head.cols)
}

impl Cuda {
    /// Calls `f` with each slice's first row, its number of rows, and where it lies.
    fn slices(&self, head: &Matrix, decoded: Address, mut f: impl FnMut(usize, usize, Address)) {
        let step = match head.store {
            Store::Dense(_) | Store::Shared(_) => head.rows,
            Store::Nf4 { .. } => SLICE,
        };
        for first in (0..head.rows).step_by(step) {
            let rows = step.min(head.rows - first);
            f(first, rows, self.decode(head, first..first + rows, decoded));
        }
    }

    /// `out [rows, vocabulary] = hidden headᵀ`; slices that are decoded go where
    /// `decoded` says.
    pub(super) fn logits_of(
        &self,
        head: &Matrix,
        hidden: Address,
        rows: usize,
        out: Address,
        decoded: impl FnOnce() -> Address,
    ) {
        if matches!(head.store, Store::Nf4 { .. }) && few::suits(rows, head.cols) {
            return self.few_logits(head, (hidden, [rows, head.cols]), out);
        }
        self.slices(head, decoded(), |first, count, w| {
            self.queue.multiply(&Product {
                size: [rows, count, head.cols],
                a: Operand::new(hidden, head.cols),
                b: Operand::new(w, head.cols).t(),
                out: (out + (first * size_of::<f32>()) as u64, head.rows),
                precision: Precision::F32,
                add: None,
                scale: 1.0,
            });
        });
    }

    pub(super) fn head_loss_by_chunks(
        &self,
        head: &Matrix,
        (hidden, targets, rows): (&Buffer<bf16>, &Buffer<u32>, usize),
        nll: &Buffer<f32>,
        dhidden: Option<(&mut Buffer<bf16>, f32)>,
        scratch: &Buffer<u8>,
    ) {
        let (vocabulary, width) = (head.rows, head.cols);
        let step = chunk_rows(vocabulary, rows).max(1);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let chunk = first * width..(first + count) * width;
            let mut room = Room::new(scratch);
            let decoded = room.take::<bf16>(slice_scratch(head));
            let logits = room.take::<f32>(count * vocabulary);
            let dlogits = room.take::<bf16>(count * vocabulary);
            let sum = room.take::<f32>(count * width);
            self.logits_of(head, hidden.at(chunk.clone()), count, logits, || decoded);
            let args = args![
                logits,
                targets.at(first..first + count),
                vocabulary,
                dhidden.as_ref().map_or(0.0, |(_, scale)| *scale),
                nll.at(first..first + count),
                dhidden.as_ref().map_or(0, |_| dlogits),
            ];
            self.launch_shaped("cross_entropy", [count, 1, 1], 512, 0, args);
            let Some((dhidden, _)) = &dhidden else {
                continue;
            };
            // Slices add up in f32; bf16 would round at each.
            let mut add = None;
            self.slices(head, decoded, |first, rows_of_slice, w| {
                let at = dlogits + (first * size_of::<bf16>()) as u64;
                self.queue.multiply(&Product {
                    size: [count, width, rows_of_slice],
                    a: Operand::new(at, vocabulary),
                    b: Operand::new(w, width),
                    out: (sum, width),
                    precision: Precision::F32,
                    add,
                    scale: 1.0,
                });
                add = Some((sum, width));
            });
            self.round(sum, count * width, dhidden.at(chunk));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::chunk_rows;

    #[test]
    fn chunks_are_whole_tiles_that_fit() {
        for (vocabulary, rows, want) in [
            (151_936, 1_535, 256),
            (151_936, 1_536, 384),
            (151_936, 10_000, 1_024),
            (50_000, 1_000, 768),
            (50_000, 10_000, 2_432),
            (400_000, 400, 111),
            (400_000, 10_000, 384),
            (1_000_000, 100, 64),
            (1_000_000, 10_000, 128),
        ] {
            let chunk = chunk_rows(vocabulary, rows);
            assert_eq!(chunk, want, "{rows} of {vocabulary}");
        }
        assert_eq!(chunk_rows(151_936, 255), 255);
        assert_eq!(chunk_rows(8, 10_000), 10_000);
    }

    #[test]
    fn more_rows_have_no_smaller_chunks() {
        for vocabulary in [8, 50_000, 151_936, 400_000, 1_000_000] {
            let chunks = (0..6_000).map(|rows| chunk_rows(vocabulary, rows));
            assert!(chunks.is_sorted(), "{vocabulary}");
        }
    }
}
