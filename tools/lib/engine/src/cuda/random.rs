//! Random weights, made by the device where they will lie: in its memory, or, tables, in
//! the host's.

use half::bf16;

use super::driver::Address;
use super::memory::{Buffer, Shared};
use super::{Arg, Count, Cuda, Matrix, Store, args, check_width};
use crate::nf4::{BLOCK, NESTED_BLOCK};
use crate::rng::{Purpose, Stream};
use crate::{HostMatrix, Result};

/// Values that are quantised at a time, so that they never exist whole in bf16; a
/// multiple of those behind one scale of scales.
const PIECE: usize = 1 << 22;

/// The mean of the largest magnitude among the 64 of a block, in standard deviations.
const LARGEST: f32 = 2.596;

impl Cuda {
    /// Queues values `start` to `start + count` of weight `number`.
    fn draw(&self, number: u32, start: usize, count: usize, to: Address) {
        let stream = Stream {
            seed: 0,
            purpose: Purpose::Weights,
            layer: 0,
            module: 0,
        };
        let args = args![
            Arg::U64(stream.seed),
            number,
            stream.tag(),
            Count(start),
            Count(count),
            HostMatrix::DEVIATION,
            to,
        ];
        self.launch_each("random_weight", count / 8, args);
    }

    /// A table of normally distributed values, in host memory: the device writes it as
    /// it would its own.
    pub(super) fn random_there(&self, [rows, cols]: [usize; 2], number: u32) -> Result<Matrix> {
        check_width([rows, cols])?;
        let table = Shared::new::<bf16>(&self.queue, rows * cols)?;
        self.draw(number, 0, rows * cols, table.address);
        Ok(Matrix::new([rows, cols], Store::Shared(table)))
    }

    /// A weight of normally distributed values.
    pub(super) fn random_here(
        &self,
        [rows, cols]: [usize; 2],
        quantised: bool,
        number: u32,
    ) -> Result<Matrix> {
        check_width([rows, cols])?;
        let (what, count) = ("weights", rows * cols);
        let matrix = |store| Ok(Matrix::new([rows, cols], store));
        if !quantised {
            let values: Buffer<bf16> = Buffer::new(&self.queue, what, count)?;
            self.draw(number, 0, count, values.first(count));
            return matrix(Store::Dense(values));
        }
        let blocks = count.div_ceil(BLOCK);
        let codes: Buffer<u8> = Buffer::new(&self.queue, what, count / 2)?;
        let nested: Buffer<u8> = Buffer::new(&self.queue, what, blocks)?;
        let absmax: Buffer<f32> = Buffer::new(&self.queue, what, blocks.div_ceil(NESTED_BLOCK))?;
        let what = "weights to be quantised";
        let values: Buffer<bf16> = Buffer::new(&self.queue, what, count.min(PIECE))?;
        let scales: Buffer<f32> = Buffer::new(&self.queue, what, blocks.min(PIECE / BLOCK))?;
        let offset = LARGEST * HostMatrix::DEVIATION;
        for start in (0..count).step_by(PIECE) {
            let range = start..count.min(start + PIECE);
            let blocks = start / BLOCK..range.end.div_ceil(BLOCK);
            let groups = blocks.start / NESTED_BLOCK..blocks.end.div_ceil(NESTED_BLOCK);
            let (x, plain) = (values.first(range.len()), scales.first(blocks.len()));
            self.draw(number, start, range.len(), x);
            let to = codes.at(start / 2..range.end / 2);
            let args = args![x, Count(range.len()), to, plain];
            self.launch("nf4_quantize_bf16", blocks.len().div_ceil(8), args);
            let to = (nested.at(blocks.clone()), absmax.at(groups));
            self.nest((plain, blocks.len()), offset, to);
        }
        matrix(Store::Nf4 {
            codes,
            absmax,
            nested: Some((nested, offset)),
        })
    }
}
