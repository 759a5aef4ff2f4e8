//! Quantising on the device, as a checkpoint's shards stream in: a quarter of what
//! goes there comes back.

use super::driver::Address;
use super::memory::Buffer;
use super::{Count, Cuda, args};
use crate::nf4::{self, Absmax, BLOCK, NESTED_BLOCK, Nf4Tensor};
use crate::{HostMatrix, MatrixData, Reading, Result};

impl Cuda {
    /// The bits of [`Nf4Tensor::quantize`]. Only the mean of the scales is summed by
    /// the host, whose order of summation decides its last bit.
    pub(super) fn quantize_here(&self, matrix: &HostMatrix) -> Result<Nf4Tensor> {
        match &matrix.data {
            MatrixData::Bf16(v) => self.quantize_as(matrix, "nf4_quantize_bf16", v),
            MatrixData::F32(v) => self.quantize_as(matrix, "nf4_quantize_f32", v),
            MatrixData::Nf4(tensor) => Ok(tensor.clone()),
        }
    }

    /// Queues the double quantisation of some scales, to their codes and the largest
    /// distances from `offset`.
    pub(super) fn nest(
        &self,
        (scales, blocks): (Address, usize),
        offset: f32,
        (codes, absmax): (Address, Address),
    ) {
        let map = self.map.first(256);
        let args = args![scales, Count(blocks), offset, map, codes, absmax];
        self.launch("nf4_nest", blocks.div_ceil(NESTED_BLOCK), args);
    }

    fn quantize_as<T: super::Element + nf4::Element>(
        &self,
        matrix: &HostMatrix,
        kernel: &'static str,
        values: &[T],
    ) -> Result<Nf4Tensor> {
        let (shape, count) = ([matrix.rows, matrix.cols], values.len());
        if count == 0 || count % 2 == 1 {
            return Ok(matrix.quantize()?); // the kernel writes whole bytes
        }
        let what = "weights to be quantised";
        let blocks = count.div_ceil(BLOCK);
        let groups = blocks.div_ceil(NESTED_BLOCK);
        let from = Buffer::of(&self.queue, what, values)?;
        let codes: Buffer<u8> = Buffer::new(&self.queue, what, count / 2)?;
        let scales: Buffer<f32> = Buffer::new(&self.queue, what, blocks)?;
        let (codes_at, scales_at) = (codes.first(count / 2), scales.first(blocks));
        let args = args![from.first(count), Count(count), codes_at, scales_at];
        self.launch(kernel, blocks.div_ceil(8), args);
        let plain = scales.read(0..blocks).wait()?;
        nf4::check_finite(shape, &plain, values)?;

        let offset = nf4::mean(&plain);
        let nested: Buffer<u8> = Buffer::new(&self.queue, what, blocks)?;
        let absmax: Buffer<f32> = Buffer::new(&self.queue, what, groups)?;
        let to = (nested.first(blocks), absmax.first(groups));
        self.nest((scales_at, blocks), offset, to);
        // All three are under way before the first is waited for.
        let reading = (
            codes.read(0..count / 2),
            nested.read(0..blocks),
            absmax.read(0..groups),
        );
        let absmax = Absmax::Nested {
            codes: reading.1.wait()?,
            absmax: reading.2.wait()?,
            offset,
        };
        Ok(Nf4Tensor::from_parts(shape, reading.0.wait()?, absmax)?)
    }
}
