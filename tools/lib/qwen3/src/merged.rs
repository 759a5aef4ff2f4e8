//! A base and an adapter as one model: `W + scale · B A` in f32, rounded once; with
//! DoRA each row then rescaled to its learnt length.
//!
//! What peft's `merge_and_unload` computes, a few rows at a time, so that an 8B
//! model is merged in the memory of a small one.

use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use crate::adapter::{Adapter, Pair};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::weight::Weight;
use crate::weights::Checkpoint;
use crate::writer::{SHARD, Spec, Writer, copy_companions, whole_folder};

/// Values of a piece, at least a row.
const PIECE: usize = 1 << 22;

/// A base with an adapter merged into it.
#[derive(Debug, Clone, Copy)]
pub struct Merged<'a> {
    base: &'a Checkpoint,
    adapter: &'a Adapter,
}

impl<'a> Merged<'a> {
    /// The adapter must have been loaded for this base.
    pub fn new(base: &'a Checkpoint, adapter: &'a Adapter) -> Self {
        Self { base, adapter }
    }

    /// The model's shape.
    pub fn config(&self) -> &'a Config {
        self.base.config()
    }

    /// Gives the merged values of a weight to `each`, whole rows at a time.
    ///
    /// # Errors
    /// Those of `each`, or of a malformed 4-bit base; or if a value is no number, or one
    /// that bfloat16 cannot hold.
    pub fn pieces<E: From<crate::Error>>(
        &self,
        weight: Weight,
        mut each: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let values = self.base.values(weight)?;
        let [rows, cols] = values.shape();
        let pair = match weight {
            Weight::Product(layer, module) => self.adapter.pairs.get(&(layer, module)),
            _ => None,
        };
        let step = (PIECE / cols).max(1);
        let mut piece = Vec::new();
        for from in (0..rows).step_by(step) {
            values.read(from..rows.min(from + step), &mut piece);
            if let Some(pair) = pair {
                update(pair, from, cols, &mut piece);
            }
            if !piece.iter().all(|&value| bf16::from_f32(value).is_finite()) {
                let whose = match pair {
                    Some(_) => "with the adapter merged into it",
                    None => "as the base has it",
                };
                let reason =
                    format!("{whose}, holds values that are no numbers, or too large for bfloat16");
                return Err(Error::tensor(self.base.folder(), &weight.name(), reason).into());
            }
            each(&piece)?;
        }
        Ok(())
    }

    /// Writes the merged model to `folder` in bfloat16, with all that belongs to
    /// the base beside its weights. The folder appears whole or not at all.
    /// `progress` hears how many values are written.
    ///
    /// # Errors
    /// If the disk fails, or a 4-bit base is malformed.
    pub fn save(&self, folder: &Path, mut progress: impl FnMut(u64)) -> Result<()> {
        let config = self.config();
        let weights = Weight::all(config);
        let spec = |weight: &Weight| Spec {
            name: weight.name(),
            dtype: Dtype::BF16,
            shape: weight.shape(config),
        };
        let specs: Vec<Spec> = weights.iter().map(spec).collect();
        whole_folder(folder, |part| {
            let mut writer = Writer::create(part, &specs, SHARD)?;
            let (mut bytes, mut done) = (Vec::new(), 0);
            for &weight in &weights {
                let name = weight.name();
                self.pieces(weight, |values| {
                    bytes.clear();
                    bytes.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
                    done += values.len() as u64;
                    progress(done);
                    writer.write(&name, &bytes)
                })?;
            }
            writer.finish()?;
            copy_companions(self.base.folder(), part, |config| {
                config.remove("quantization_config");
                config.remove("torch_dtype");
                config.insert("dtype".into(), json!("bfloat16"));
            })
        })
    }
}

/// `rows += scale · B A` for whole rows of width `cols` from row `first` on, then
/// with DoRA `rows *= magnitude / ‖rows‖`.
fn update(pair: &Pair, first: usize, cols: usize, rows: &mut [f32]) {
    let rank = pair.a.len() / cols;
    rows.par_chunks_exact_mut(cols).enumerate().for_each_init(
        || vec![0f32; cols],
        |sum, (row, values)| {
            sum.fill(0.0);
            let b = &pair.b[(first + row) * rank..][..rank];
            for (&b, a) in b.iter().zip(pair.a.chunks_exact(cols)) {
                for (sum, &a) in sum.iter_mut().zip(a) {
                    *sum += b * a;
                }
            }
            for (value, &sum) in values.iter_mut().zip(&*sum) {
                *value += pair.scale * sum;
            }
            if let Some(magnitude) = &pair.magnitude {
                let squares: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                let gain = magnitude[first + row] / squares.sqrt() as f32;
                values.iter_mut().for_each(|value| *value *= gain);
            }
        },
    );
}
