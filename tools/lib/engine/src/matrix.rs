//! A frozen weight on its way into a backend: the shape it has in the file, in
//! the storage it will keep.

use half::bf16;

use crate::nf4::Nf4Tensor;

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

impl HostMatrix {
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

    /// Bytes the values take as stored.
    pub fn bytes(&self) -> usize {
        match &self.data {
            MatrixData::F32(v) => v.len() * 4,
            MatrixData::Bf16(v) => v.len() * 2,
            MatrixData::Nf4(t) => t.bytes(),
        }
    }
}
