//! A model of a given shape with weights drawn at random: what speed and memory
//! are measured on, neither of which depends on their values.

use engine::{Backend, Result};

use crate::model::{Ends, Model};
use crate::{Config, Held, LayerWeights, Module, Storage};

impl<B: Backend> Model<B> {
    /// A model with random weights, other ones in every layer, in bf16 or NF4;
    /// embeddings are in bf16. The device makes them.
    ///
    /// # Errors
    /// If the device has no room, or no kernels for heads of this width.
    pub fn random(backend: B, config: Config, held: impl Into<Held>) -> Result<Self> {
        let held = held.into();
        let shape = [config.vocab_size, config.hidden_size];
        let quantised = |storage| storage == Storage::Nf4;
        let (head, tables) = (quantised(held.head), config.layers * Module::ALL.len());
        let ends = match config.tied && !head {
            true => Ends {
                embedding: backend.random_matrix(shape, false, tables as u32)?,
                lm_head: None,
                final_norm: vec![1.0; config.hidden_size],
            },
            false => Ends {
                embedding: backend.random_table(shape, tables as u32 + 1)?,
                lm_head: Some(backend.random_matrix(shape, head, tables as u32)?),
                final_norm: vec![1.0; config.hidden_size],
            },
        };
        let shapes = Module::ALL.map(|module| module.shape(&config));
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let layer = |b: &B, layer: usize| -> Result<LayerWeights<B::Matrix>> {
            let first = layer * Module::ALL.len();
            let made = (first..).zip(&shapes).map(|(number, &shape)| {
                b.random_matrix(shape, quantised(held.products), number as u32)
            });
            let products = made.collect::<Result<Vec<_>>>()?;
            Ok(LayerWeights {
                input_norm: vec![1.0; hidden],
                post_attention_norm: vec![1.0; hidden],
                q_norm: vec![1.0; head_dim],
                k_norm: vec![1.0; head_dim],
                products: (products.try_into())
                    .unwrap_or_else(|_| unreachable!("as many products as modules")),
            })
        };
        Self::assemble(backend, config, ends, layer, |_, made, _| Ok(made))
    }
}
