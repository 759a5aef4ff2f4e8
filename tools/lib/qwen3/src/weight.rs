//! The weights of a model by what they are, and their values a few rows at a
//! time: what copying, merging and converting go through.

use std::ops::Range;

use engine::nf4::Nf4Tensor;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::config::{Config, Module};

/// One weight of a Qwen3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// The embedding table, `[vocab, hidden]`.
    Embedding,
    /// The norm before a layer's attention, `[hidden]`.
    InputNorm(usize),
    /// The norm before a layer's MLP, `[hidden]`.
    PostAttentionNorm(usize),
    /// The norm on each query head of a layer, `[head_dim]`.
    QNorm(usize),
    /// The norm on each key head of a layer, `[head_dim]`.
    KNorm(usize),
    /// A product of a layer, `[out, in]`.
    Product(usize, Module),
    /// The norm before lm_head, `[hidden]`.
    FinalNorm,
    /// lm_head, `[vocab, hidden]`; only where it is not tied to the embedding table.
    Head,
}

impl Weight {
    /// All weights of a model, each once, from the embedding table to lm_head.
    pub fn all(config: &Config) -> Vec<Self> {
        let mut all = vec![Self::Embedding];
        for layer in 0..config.layers {
            all.extend([
                Self::InputNorm(layer),
                Self::QNorm(layer),
                Self::KNorm(layer),
            ]);
            all.push(Self::PostAttentionNorm(layer));
            all.extend(Module::ALL.map(|module| Self::Product(layer, module)));
        }
        all.push(Self::FinalNorm);
        all.extend((!config.tied).then_some(Self::Head));
        all
    }

    /// Its name in a checkpoint.
    pub fn name(self) -> String {
        let layer = |layer: usize, name: &str| format!("model.layers.{layer}.{name}.weight");
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::InputNorm(l) => layer(l, "input_layernorm"),
            Self::PostAttentionNorm(l) => layer(l, "post_attention_layernorm"),
            Self::QNorm(l) => layer(l, "self_attn.q_norm"),
            Self::KNorm(l) => layer(l, "self_attn.k_norm"),
            Self::Product(l, module) => {
                let (block, name) = module.path();
                layer(l, &format!("{block}.{name}"))
            }
            Self::FinalNorm => "model.norm.weight".into(),
            Self::Head => "lm_head.weight".into(),
        }
    }

    /// Its shape: one number for a norm, else `[out, in]`.
    pub fn shape(self, config: &Config) -> Vec<usize> {
        match self {
            Self::Embedding | Self::Head => vec![config.vocab_size, config.hidden_size],
            Self::InputNorm(_) | Self::PostAttentionNorm(_) | Self::FinalNorm => {
                vec![config.hidden_size]
            }
            Self::QNorm(_) | Self::KNorm(_) => vec![config.head_dim],
            Self::Product(_, module) => module.shape(config).into(),
        }
    }
}

/// The values of one weight as they lie in the file.
#[derive(Debug)]
pub struct Values<'a> {
    pub(crate) stored: Stored<'a>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

/// How the values of a weight are stored.
#[derive(Debug)]
pub(crate) enum Stored<'a> {
    Floats(Dtype, &'a [u8]),
    Nf4(Nf4Tensor),
}

impl Values<'_> {
    /// `[rows, cols]`; a norm is one row.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The values of some rows, widened or decoded, in place of what `out` held.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn read(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        let values = rows.start * self.cols..rows.end * self.cols;
        out.clear();
        match &self.stored {
            Stored::Floats(Dtype::BF16, bytes) => out.extend(
                (bytes[2 * values.start..2 * values.end].as_chunks().0)
                    .iter()
                    .map(|&b| bf16::from_le_bytes(b).to_f32()),
            ),
            Stored::Floats(Dtype::F16, bytes) => out.extend(
                (bytes[2 * values.start..2 * values.end].as_chunks().0)
                    .iter()
                    .map(|&b| f16::from_le_bytes(b).to_f32()),
            ),
            Stored::Floats(_, bytes) => out.extend(
                (bytes[4 * values.start..4 * values.end].as_chunks().0)
                    .iter()
                    .map(|&b| f32::from_le_bytes(b)),
            ),
            Stored::Nf4(tensor) => {
                out.resize(values.len(), 0.0);
                tensor.dequantize_rows(rows, out);
            }
        }
    }
}
