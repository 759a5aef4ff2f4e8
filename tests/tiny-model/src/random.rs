//! A small seeded generator whose bytes are ours to keep.
//!
//! The demo's files are committed with their hashes, so the numbers behind them
//! must not change with a library's version.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

/// SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
/// generators", 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; every seed is good, 0 too.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`, by the high half of a product; `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// One element of a slice that is not empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Fisher–Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// A tensor uniform in ±`bound`.
    pub fn uniform(&mut self, shape: &[usize], bound: f64, dtype: DType) -> Result<Tensor> {
        self.fill(shape, dtype, |random| (2.0 * random.unit() - 1.0) * bound)
    }

    /// A normal tensor (Box–Muller).
    pub fn normal(&mut self, shape: &[usize], deviation: f64, dtype: DType) -> Result<Tensor> {
        self.fill(shape, dtype, |random| {
            // 1 - u is never 0, so the logarithm is finite.
            let radius = (-2.0 * (1.0 - random.unit()).ln()).sqrt();
            radius * (std::f64::consts::TAU * random.unit()).cos() * deviation
        })
    }

    fn fill(
        &mut self,
        shape: &[usize],
        dtype: DType,
        mut draw: impl FnMut(&mut Self) -> f64,
    ) -> Result<Tensor> {
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| draw(self)).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
    }
}
