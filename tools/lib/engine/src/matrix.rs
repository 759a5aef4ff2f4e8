//! A frozen weight on its way into a backend: the shape it has in the file, in
//! the storage it will keep.

use half::bf16;
use rayon::prelude::*;

use crate::nf4::{self, Absmax, BLOCK, NESTED_BLOCK, Nf4Tensor};

/// A weight `[rows, cols]`, row-major: `y = x Wᵀ` maps `cols` features to `rows`.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The values.
    pub data: MatrixData,
}

/// How the values of a [`HostMatrix`] are stored.
#[derive(Debug, Clone)]
pub enum MatrixData {
    /// 32-bit floats, used as they are.
    F32(Vec<f32>),
    /// bfloat16, widened where it is used.
    Bf16(Vec<bf16>),
    /// 4 bits a value with block scales, decoded where it is used.
    Nf4(Nf4Tensor),
}

/// How the values of a matrix are stored, without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixKind {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// NF4.
    Nf4 {
        /// Whether its scales are quantised again.
        nested: bool,
    },
}

/// The scale of a block whose values have [`HostMatrix::DEVIATION`], its codes being
/// equally likely: the levels' root mean square is 0.517.
const RANDOM_SCALE: f32 = HostMatrix::DEVIATION / 0.517;

/// Eight random bytes for each index (SplitMix64).
fn random_bits(number: u32, index: usize) -> u64 {
    let mut z = (u64::from(number) << 40 ^ index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn random_bytes(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes.par_chunks_mut(8).enumerate().for_each(|(i, eight)| {
        eight.copy_from_slice(&random_bits(number, i).to_le_bytes()[..eight.len()]);
    });
    bytes
}

impl HostMatrix {
    /// Standard deviation of [`random`](Self::random) values, as models are initialised.
    pub const DEVIATION: f32 = 0.02;

    /// Random values for measurements, in bf16 (uniform) or, `quantised`, NF4 (random
    /// codes, all scales the same): what a processor makes quickly.
    pub fn random([rows, cols]: [usize; 2], quantised: bool, number: u32) -> Self {
        let count = rows * cols;
        if !quantised {
            let width = Self::DEVIATION * 3f32.sqrt();
            let value = |i: usize| {
                let unit = (random_bits(number, i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
                bf16::from_f32(unit * width)
            };
            return Self::bf16(rows, cols, (0..count).into_par_iter().map(value).collect());
        }
        let blocks = count.div_ceil(BLOCK);
        let absmax = Absmax::Nested {
            codes: random_bytes(number, blocks),
            absmax: vec![0.0; blocks.div_ceil(NESTED_BLOCK)],
            offset: RANDOM_SCALE,
        };
        let packed = random_bytes(number, count.div_ceil(2));
        let tensor = Nf4Tensor::from_parts([rows, cols], packed, absmax);
        Self::nf4(tensor.expect("the parts were made for the shape"))
    }

    /// Shape and storage without the values. A backend takes it for nothing and
    /// tells what the filled one would need; nothing can be computed with it.
    pub fn hollow([rows, cols]: [usize; 2], kind: MatrixKind) -> Self {
        let data = match kind {
            MatrixKind::F32 => MatrixData::F32(Vec::new()),
            MatrixKind::Bf16 => MatrixData::Bf16(Vec::new()),
            MatrixKind::Nf4 { nested } => MatrixData::Nf4(Nf4Tensor::hollow([rows, cols], nested)),
        };
        Self { rows, cols, data }
    }

    /// A matrix of 32-bit floats.
    ///
    /// # Panics
    /// If `data` does not hold `rows × cols` values.
    pub fn f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a [{rows}, {cols}] matrix");
        Self {
            rows,
            cols,
            data: MatrixData::F32(data),
        }
    }

    /// A matrix of bfloat16 values.
    ///
    /// # Panics
    /// If `data` does not hold `rows × cols` values.
    pub fn bf16(rows: usize, cols: usize, data: Vec<bf16>) -> Self {
        assert_eq!(data.len(), rows * cols, "a [{rows}, {cols}] matrix");
        Self {
            rows,
            cols,
            data: MatrixData::Bf16(data),
        }
    }

    /// A quantised matrix; its shape is the tensor's own.
    pub fn nf4(tensor: Nf4Tensor) -> Self {
        let [rows, cols] = tensor.shape();
        Self {
            rows,
            cols,
            data: MatrixData::Nf4(tensor),
        }
    }

    /// Its values in NF4, the scales quantised as well; on all threads of the pool.
    ///
    /// # Errors
    /// If a value is not finite.
    pub fn quantize(&self) -> Result<Nf4Tensor, nf4::Error> {
        let shape = [self.rows, self.cols];
        match &self.data {
            MatrixData::F32(values) => Nf4Tensor::quantize(shape, values, true),
            MatrixData::Bf16(values) => Nf4Tensor::quantize(shape, values, true),
            MatrixData::Nf4(tensor) => Ok(tensor.clone()),
        }
    }

    /// Bytes the values take as stored; a hollow matrix counts as a filled one.
    pub fn bytes(&self) -> usize {
        match &self.data {
            MatrixData::F32(_) => self.rows * self.cols * size_of::<f32>(),
            MatrixData::Bf16(_) => self.rows * self.cols * size_of::<bf16>(),
            MatrixData::Nf4(t) => t.bytes(),
        }
    }
}
