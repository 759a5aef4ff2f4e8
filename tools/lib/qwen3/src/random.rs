//! A model of a given shape with weights drawn at random: what speed and memory
//! are measured on, neither of which depends on their values.

use std::iter::repeat_n;

use engine::nf4::{Absmax, BLOCK, NESTED_BLOCK, Nf4Tensor};
use engine::{Backend, HostMatrix, Result};
use half::bf16;
use rayon::prelude::*;

use crate::model::{Ends, Model};
use crate::{Config, Held, LayerWeights, Module, Storage};

/// Standard deviation of the weights, as models are initialised.
const DEVIATION: f32 = 0.02;

/// What a block's scale must be for that, its codes being equally likely: the
/// levels' root mean square is 0.517.
const SCALE: f32 = DEVIATION / 0.517;

/// Eight random bytes for each index (SplitMix64).
fn bits(index: usize) -> u64 {
    let mut z = (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes.par_chunks_mut(8).enumerate().for_each(|(i, eight)| {
        eight.copy_from_slice(&bits(i).to_le_bytes()[..eight.len()]);
    });
    bytes
}

/// bf16 values, uniform.
fn dense([rows, cols]: [usize; 2]) -> HostMatrix {
    let width = DEVIATION * 3f32.sqrt();
    let value = |i: usize| {
        let unit = (bits(i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        bf16::from_f32(unit * width)
    };
    HostMatrix::bf16(
        rows,
        cols,
        (0..rows * cols).into_par_iter().map(value).collect(),
    )
}

/// Random codes, with scales that are all the same.
fn quantised([rows, cols]: [usize; 2]) -> HostMatrix {
    let blocks = (rows * cols).div_ceil(BLOCK);
    let absmax = Absmax::Nested {
        codes: bytes(blocks),
        absmax: vec![0.0; blocks.div_ceil(NESTED_BLOCK)],
        offset: SCALE,
    };
    let packed = bytes((rows * cols).div_ceil(2));
    let tensor = Nf4Tensor::from_parts([rows, cols], packed, absmax);
    HostMatrix::nf4(tensor.expect("the parts were made for the shape"))
}

impl<B: Backend> Model<B> {
    /// A model with random weights, the same in every layer, in bf16 or NF4; embeddings
    /// are in bf16.
    ///
    /// # Errors
    /// If the device has no room, or no kernels for heads of this width.
    pub fn random(backend: B, config: Config, held: impl Into<Held>) -> Result<Self> {
        let held = held.into();
        let matrix = |shape, storage| match storage {
            Storage::AsStored => dense(shape),
            Storage::Nf4 => quantised(shape),
        };
        let product = |module: Module| matrix(module.shape(&config), held.products);
        let layer = LayerWeights {
            input_norm: vec![1.0; config.hidden_size],
            post_attention_norm: vec![1.0; config.hidden_size],
            q_norm: vec![1.0; config.head_dim],
            k_norm: vec![1.0; config.head_dim],
            products: Module::ALL.map(product),
        };
        let shape = [config.vocab_size, config.hidden_size];
        let one_table = config.tied && held.head == Storage::AsStored;
        let ends = Ends {
            embedding: dense(shape),
            lm_head: (!one_table).then(|| matrix(shape, held.head)),
            final_norm: vec![1.0; config.hidden_size],
        };
        let layers = repeat_n(layer, config.layers).map(Ok);
        Self::new(backend, config, ends, layers)
    }
}
