//! NF4: the 4-bit storage of frozen weights that QLoRA trains on top of.
//!
//! A matrix is flattened row-major and cut into blocks of 64; each block keeps
//! its largest magnitude (`absmax`) and, per value, the index of the nearest of
//! sixteen levels that are quantiles of a normal distribution (Dettmers et al.,
//! arXiv 2305.14314). Double quantisation stores the `absmax` values themselves
//! in 8 bits, which brings a weight from 4.5 to 4.127 bits.
//!
//! The arithmetic is bitsandbytes' down to the last bit, so that an adapter
//! trained here meets the same base weights there. Where its CPU and CUDA paths
//! differ (the lookup of the nested code, the last, shorter block) this is the
//! CUDA one, since that is what people train with; CUDA's flush of denormal
//! numbers to zero is not imitated.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::cpu::simd::vectorised;
use crate::dynamic::Dynamic;

/// Values that share one `absmax`.
pub const BLOCK: usize = 64;

/// `absmax` values that share one scale under double quantisation.
pub const NESTED_BLOCK: usize = 256;

/// The sixteen levels, ascending: what code `i` stands for before scaling.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Halfway between neighbouring levels; a value on the line takes the lower code.
const MIDPOINTS: [f32; 15] = {
    let mut mid = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        mid[i] = (LEVELS[i] + LEVELS[i + 1]) / 2.0;
        i += 1;
    }
    mid
};

/// bitsandbytes never divides by less, so that a block of zeros stays finite.
const MIN_ABSMAX: f32 = 1e-38;

/// Values per task when work is spread over threads; a multiple of [`BLOCK`],
/// and fixed, so that the cut never depends on the number of threads.
const CHUNK: usize = 1 << 16;

/// Why a tensor cannot be quantised or assembled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A weight is NaN or infinite: every value of its block would be lost.
    #[error("value {value} at row {row}, column {column} is not finite")]
    NotFinite {
        /// The offending value.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },
    /// A part has another length than the shape asks for.
    #[error("{part} holds {found} values where a {rows}×{cols} matrix needs {expected}")]
    Length {
        /// Which part: `values`, `packed`, `absmax` or `nested absmax`.
        part: &'static str,
        /// Its length.
        found: usize,
        /// The length that the shape implies.
        expected: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// An element type that weights are stored in.
pub trait Element: Copy + Send + Sync {
    /// The value, widened exactly.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// The scale of each block of [`BLOCK`] values.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 per block.
    Plain(Vec<f32>),
    /// Double quantisation: block `b` has the scale
    /// `dynamic_map()[codes[b]] * absmax[b / NESTED_BLOCK] + offset`.
    Nested {
        /// An index into [`dynamic_map`] per block.
        codes: Vec<u8>,
        /// The largest `|absmax - offset|` of each [`NESTED_BLOCK`] blocks.
        absmax: Vec<f32>,
        /// The mean of the plain scales.
        offset: f32,
    },
}

impl Absmax {
    /// Double quantisation of plain scales around `offset`.
    ///
    /// bitsandbytes takes the f32 mean as the offset; it is an argument because
    /// that mean's last bit depends on the order of summation.
    pub fn nest(scales: &[f32], offset: f32) -> Self {
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
        for block in scales.chunks(NESTED_BLOCK) {
            let largest = block
                .iter()
                .fold(0.0f32, |m, &scale| m.max((scale - offset).abs()));
            // Infinite for a block of equal scales: 0 × ∞ then takes code 0, as in
            // bitsandbytes, and any code times an absmax of 0 restores the offset.
            let reciprocal = 1.0 / largest;
            codes.extend(
                block
                    .iter()
                    .map(|&s| Dynamic::signed().code((s - offset) * reciprocal)),
            );
            absmax.push(largest);
        }
        Self::Nested {
            codes,
            absmax,
            offset,
        }
    }

    /// The scale of block `b`.
    ///
    /// # Panics
    /// If there is no such block.
    #[inline]
    pub fn scale(&self, b: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[b],
            Self::Nested {
                codes,
                absmax,
                offset,
            } => dynamic_map()[usize::from(codes[b])] * absmax[b / NESTED_BLOCK] + offset,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }
}

/// Bytes of so many values: codes and scales.
pub(crate) fn bytes(values: usize, nested: bool) -> usize {
    let blocks = values.div_ceil(BLOCK);
    values.div_ceil(2)
        + match nested {
            false => 4 * blocks,
            true => blocks + 4 * blocks.div_ceil(NESTED_BLOCK),
        }
}

/// A matrix `[rows, cols]` in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Tensor {
    rows: usize,
    cols: usize,
    packed: Vec<u8>,
    absmax: Absmax,
}

impl Nf4Tensor {
    /// Quantises a row-major matrix, over all threads of the current pool; the
    /// result does not depend on how many there are.
    ///
    /// # Errors
    /// If `values` does not fill the shape, or holds NaN or an infinity.
    pub fn quantize<T: Element>(
        [rows, cols]: [usize; 2],
        values: &[T],
        double_quant: bool,
    ) -> Result<Self, Error> {
        let n = rows * cols;
        let length = |part, found, expected| check_length(part, found, expected, rows, cols);
        length("values", values.len(), n)?;

        let mut packed = vec![0u8; n.div_ceil(2)];
        let mut scales = vec![0f32; n.div_ceil(BLOCK)];
        packed
            .par_chunks_mut(CHUNK / 2)
            .zip(scales.par_chunks_mut(CHUNK / BLOCK))
            .zip(values.par_chunks(CHUNK))
            .for_each(|((packed, scales), values)| {
                let values: Vec<f32> = values.iter().map(|v| v.widen()).collect();
                encode(&values, packed, scales);
            });
        check_finite([rows, cols], &scales, values)?;
        let absmax = if double_quant && !scales.is_empty() {
            Absmax::nest(&scales, mean(&scales))
        } else {
            Absmax::Plain(scales)
        };
        Ok(Self {
            rows,
            cols,
            packed,
            absmax,
        })
    }

    /// Puts together a tensor that was stored quantised.
    ///
    /// # Errors
    /// If a part's length does not fit the shape.
    pub fn from_parts(
        [rows, cols]: [usize; 2],
        packed: Vec<u8>,
        absmax: Absmax,
    ) -> Result<Self, Error> {
        let n = rows * cols;
        let length = |part, found, expected| check_length(part, found, expected, rows, cols);
        length("packed", packed.len(), n.div_ceil(2))?;
        length("absmax", absmax.blocks(), n.div_ceil(BLOCK))?;
        if let Absmax::Nested { codes, absmax, .. } = &absmax {
            length(
                "nested absmax",
                absmax.len(),
                codes.len().div_ceil(NESTED_BLOCK),
            )?;
        }
        Ok(Self {
            rows,
            cols,
            packed,
            absmax,
        })
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Two codes a byte, the earlier value in the high half.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales of the blocks.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes held: codes and scales; a hollow tensor counts as a filled one.
    pub fn bytes(&self) -> usize {
        let nested = matches!(self.absmax, Absmax::Nested { .. });
        bytes(self.rows * self.cols, nested)
    }

    /// Shape without values, its scales quantised again or not.
    pub(crate) fn hollow([rows, cols]: [usize; 2], nested: bool) -> Self {
        let absmax = match nested {
            false => Absmax::Plain(Vec::new()),
            true => Absmax::Nested {
                codes: Vec::new(),
                absmax: Vec::new(),
                offset: 0.0,
            },
        };
        Self {
            rows,
            cols,
            packed: Vec::new(),
            absmax,
        }
    }

    /// Writes rows `rows` to `out`, row-major, on the calling thread:
    /// `LEVELS[code] * scale`, in f32.
    ///
    /// # Panics
    /// If the rows do not exist, or `out` is not `rows.len() * cols` long.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        assert_eq!(
            out.len(),
            rows.len() * self.cols,
            "output of dequantize_rows"
        );
        self.dequantize_flat(rows.start * self.cols, out);
    }

    /// Writes the whole matrix to `out`, row-major, over all threads of the
    /// current pool.
    ///
    /// # Panics
    /// If `out` is not `rows * cols` long.
    pub fn dequantize_into(&self, out: &mut [f32]) {
        assert_eq!(
            out.len(),
            self.rows * self.cols,
            "output of dequantize_into"
        );
        out.par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(i, out)| self.dequantize_flat(i * CHUNK, out));
    }

    /// Values from flat index `start` on. Rows need not begin on a block, nor on
    /// a byte: the ragged ends go one value at a time, the blocks between whole.
    fn dequantize_flat(&self, start: usize, out: &mut [f32]) {
        let head = (start.next_multiple_of(BLOCK) - start).min(out.len());
        let (head, rest) = out.split_at_mut(head);
        let (whole, tail) = rest.split_at_mut(rest.len() / BLOCK * BLOCK);
        let first = start + head.len();
        self.dequantize_each(start, head);
        self.dequantize_each(first + whole.len(), tail);
        for (b, out) in (first / BLOCK..).zip(whole.chunks_exact_mut(BLOCK)) {
            let scale = self.absmax.scale(b);
            let codes = &self.packed[b * BLOCK / 2..(b + 1) * BLOCK / 2];
            for (pair, &byte) in out.chunks_exact_mut(2).zip(codes) {
                let [high, low] = PAIRS[usize::from(byte)];
                pair[0] = high * scale;
                pair[1] = low * scale;
            }
        }
    }

    fn dequantize_each(&self, start: usize, out: &mut [f32]) {
        for (i, out) in (start..).zip(out) {
            let [high, low] = PAIRS[usize::from(self.packed[i / 2])];
            let level = if i % 2 == 0 { high } else { low };
            *out = level * self.absmax.scale(i / BLOCK);
        }
    }
}

/// Both levels of a packed byte: one lookup for two values.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [LEVELS[byte >> 4], LEVELS[byte & 15]];
        byte += 1;
    }
    pairs
};

/// The offset of double quantisation: the mean of the scales, summed in order.
pub(crate) fn mean(scales: &[f32]) -> f32 {
    let sum: f64 = scales.iter().map(|&s| f64::from(s)).sum();
    (sum / scales.len() as f64) as f32
}

/// Names the first value that is not finite, if a scale tells that there is one.
pub(crate) fn check_finite<T: Element>(
    [_, cols]: [usize; 2],
    scales: &[f32],
    values: &[T],
) -> Result<(), Error> {
    let Some(block) = scales.iter().position(|s| !s.is_finite()) else {
        return Ok(());
    };
    let at = (block * BLOCK..values.len())
        .find(|&i| !values[i].widen().is_finite())
        .expect("a scale is finite unless a value of its block is not");
    Err(Error::NotFinite {
        value: values[at].widen(),
        row: at / cols,
        column: at % cols,
    })
}

fn check_length(
    part: &'static str,
    found: usize,
    expected: usize,
    rows: usize,
    cols: usize,
) -> Result<(), Error> {
    if found == expected {
        Ok(())
    } else {
        Err(Error::Length {
            part,
            found,
            expected,
            rows,
            cols,
        })
    }
}

vectorised! {
    /// Codes and scales, block by block; a scale is not finite where a value of its
    /// block is not.
    #[allow(clippy::needless_range_loop, reason = "as in simd.rs")]
    fn encode(values: &[f32], packed: &mut [u8], scales: &mut [f32]) {
        for b in 0..scales.len() {
            let values = &values[b * BLOCK..];
            let values = &values[..values.len().min(BLOCK)];
            let mut x = [0f32; BLOCK];
            x[..values.len()].copy_from_slice(values);
            // Magnitudes compare as their bits do, and NaN above all: unlike a
            // maximum of floats this needs no order, so it vectorises, and it loses
            // no NaN.
            let mut largest = 0;
            for i in 0..BLOCK {
                largest = largest.max((x[i].to_bits() & (u32::MAX >> 1)) as i32);
            }
            let absmax = f32::from_bits(largest as u32);
            let reciprocal = 1.0 / absmax.max(MIN_ABSMAX);
            for i in 0..BLOCK {
                x[i] *= reciprocal;
            }
            // A code is the number of midpoints below. Counting one midpoint at a time
            // for the whole block has no branches, and vectorises. Padding counts as 0.0.
            let mut codes = [0u32; BLOCK];
            for m in 0..MIDPOINTS.len() {
                for i in 0..BLOCK {
                    codes[i] = codes[i].wrapping_add(u32::from(MIDPOINTS[m] < x[i]));
                }
            }
            let packed = &mut packed[b * BLOCK / 2..];
            for i in 0..values.len().div_ceil(2) {
                packed[i] = (codes[2 * i] << 4 | codes[2 * i + 1]) as u8;
            }
            scales[b] = absmax;
        }
    }
}

/// What the codes of double quantisation stand for: [`Dynamic::signed`].
pub fn dynamic_map() -> &'static [f32; 256] {
    Dynamic::signed().values()
}
