//! A base in bitsandbytes' 4-bit form, written: what transformers, peft and
//! vLLM load in place of quantising it again, and what this crate loads at a
//! quarter of the reading.

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use engine::nf4::{self, Absmax, BLOCK, NESTED_BLOCK, Nf4Tensor};
use engine::{HostMatrix, MatrixData};
use safetensors::Dtype;
use serde_json::json;

use crate::config::Module;
use crate::error::Result;
use crate::weight::{Stored, Weight};
use crate::weights::{Checkpoint, Storage};
use crate::writer::{SHARD, Spec, Writer, copy_companions, whole_folder};

/// Bytes of a quantisation state, filled up with spaces: a shard's header needs
/// its length before the mean of the scales, which it holds, is known.
const STATE: usize = 256;

impl Checkpoint {
    /// Whether every product is stored in 4 bits.
    pub fn is_quantized(&self) -> bool {
        let mut products = (0..self.config().layers)
            .flat_map(|layer| Module::ALL.map(|module| Weight::Product(layer, module)));
        products.all(|weight| self.storage(weight).is_ok_and(|kind| kind == "NF4"))
    }

    /// Bytes of what [`save_quantized`](Self::save_quantized) writes, to within a percent.
    ///
    /// # Errors
    /// None once the checkpoint is open.
    pub fn quantized_bytes(&self) -> Result<u64> {
        let matrix = |weight: &&Weight| weight.shape(self.config()).len() == 2;
        let all = Weight::all(self.config());
        let bytes = |weight: &Weight| Ok(self.hollow(*weight, Storage::Nf4.into())?.bytes() as u64);
        all.iter().filter(matrix).map(bytes).sum()
    }

    /// Writes the model to `folder` with its products in NF4, double
    /// quantisation, in the form of bitsandbytes; all else as it is stored.
    /// The folder appears whole or not at all. Goes layer by layer: in memory
    /// there are never more than one as it is stored and three in 4 bits.
    /// `quantize` does the arithmetic, `progress` hears how many are done.
    ///
    /// # Errors
    /// If a weight is not finite, or the device or the disk fails.
    pub fn save_quantized(
        &self,
        folder: &Path,
        quantize: impl Fn(&HostMatrix) -> engine::Result<Nf4Tensor> + Sync,
        progress: impl FnMut(usize),
    ) -> Result<()> {
        whole_folder(folder, |part| {
            self.fill_quantized(part, SHARD, quantize, progress)
        })
    }

    fn fill_quantized(
        &self,
        folder: &Path,
        shard: u64,
        quantize: impl Fn(&HostMatrix) -> engine::Result<Nf4Tensor> + Sync,
        mut progress: impl FnMut(usize),
    ) -> Result<()> {
        let config = self.config();
        let weights = Weight::all(config);
        let mut specs = Vec::new();
        // The type that the products had, which whoever loads them computes in.
        let mut dtype = Dtype::BF16;
        for &weight in &weights {
            match (weight, self.dtype(weight)?) {
                (Weight::Product(..), Dtype::U8) => specs.extend(parts(weight, config)),
                (Weight::Product(..), stored) => {
                    dtype = stored;
                    specs.extend(parts(weight, config));
                }
                (_, stored) => specs.push(Spec {
                    name: weight.name(),
                    dtype: stored,
                    shape: weight.shape(config),
                }),
            }
        }
        let dtype = match dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            _ => "bfloat16",
        };
        let mut writer = Writer::create(folder, &specs, shard)?;
        let beside = |weight: &&Weight| !matches!(weight, Weight::Product(..));
        for &weight in weights.iter().filter(beside) {
            let Stored::Floats(_, bytes) = self.values(weight)?.stored else {
                unreachable!("opening refuses 4 bits beside the products");
            };
            writer.write(&weight.name(), bytes)?;
        }
        // A layer is written while the next one is quantised.
        let write = |writer: &mut Writer, layer: usize, products: [HostMatrix; 7]| -> Result<()> {
            for (module, product) in Module::ALL.into_iter().zip(products) {
                let MatrixData::Nf4(tensor) = product.data else {
                    unreachable!("a product asked for in NF4");
                };
                write_parts(writer, Weight::Product(layer, module), tensor, dtype)?;
            }
            Ok(())
        };
        let (queue, quantized) = mpsc::sync_channel(1);
        let written = thread::scope(|scope| -> Result<Result<Writer>> {
            let writing = scope.spawn(move || -> Result<Writer> {
                for (layer, products) in quantized {
                    write(&mut writer, layer, products)?;
                }
                Ok(writer)
            });
            for layer in 0..config.layers {
                let products = self.layer_by(layer, Storage::Nf4, &quantize)?.products;
                if queue.send((layer, products)).is_err() {
                    break; // the writer failed, and says why
                }
                progress(layer + 1);
            }
            drop(queue);
            Ok(writing.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })?;
        written?.finish()?;
        copy_companions(self.folder(), folder, |config| {
            // As transformers writes it: every key that it reads back.
            config.insert(
                "quantization_config".into(),
                json!({
                    "_load_in_4bit": true,
                    "_load_in_8bit": false,
                    "bnb_4bit_compute_dtype": dtype,
                    "bnb_4bit_quant_storage": "uint8",
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": true,
                    "llm_int8_enable_fp32_cpu_offload": false,
                    "llm_int8_has_fp16_weight": false,
                    "llm_int8_skip_modules": null,
                    "llm_int8_threshold": 6.0,
                    "load_in_4bit": true,
                    "load_in_8bit": false,
                    "quant_method": "bitsandbytes",
                }),
            );
        })
    }
}

/// The tensors that one quantised product is stored as.
fn parts(weight: Weight, config: &crate::Config) -> [Spec; 6] {
    let values: usize = weight.shape(config).iter().product();
    let blocks = values.div_ceil(BLOCK);
    let name = weight.name();
    let spec = |part: &str, dtype, shape: Vec<usize>| Spec {
        name: format!("{name}{part}"),
        dtype,
        shape,
    };
    [
        spec("", Dtype::U8, vec![values.div_ceil(2), 1]),
        spec(".absmax", Dtype::U8, vec![blocks]),
        spec(".quant_map", Dtype::F32, vec![nf4::LEVELS.len()]),
        spec(
            ".nested_absmax",
            Dtype::F32,
            vec![blocks.div_ceil(NESTED_BLOCK)],
        ),
        spec(
            ".nested_quant_map",
            Dtype::F32,
            vec![nf4::dynamic_map().len()],
        ),
        spec(".quant_state.bitsandbytes__nf4", Dtype::U8, vec![STATE]),
    ]
}

fn write_parts(writer: &mut Writer, weight: Weight, tensor: Nf4Tensor, dtype: &str) -> Result<()> {
    let name = weight.name();
    let nested;
    let (codes, absmax, offset) = match tensor.absmax() {
        Absmax::Nested {
            codes,
            absmax,
            offset,
        } => (codes, absmax, *offset),
        // Stored quantised once, or with another machine's map: quantised again here.
        Absmax::Plain(scales) => {
            let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
            nested = Absmax::nest(scales, (sum / scales.len() as f64) as f32);
            let Absmax::Nested {
                codes,
                absmax,
                offset,
            } = &nested
            else {
                unreachable!("nest makes nested scales");
            };
            (codes, absmax, *offset)
        }
    };
    let state = json!({
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": tensor.shape(),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        // The shortest digits of the wider type give this f32 back, and no other.
        "nested_offset": f64::from(offset),
    });
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
    };
    writer.write(&name, tensor.packed())?;
    writer.write(&format!("{name}.absmax"), codes)?;
    writer.write(&format!("{name}.quant_map"), &bytes(&nf4::LEVELS))?;
    writer.write(&format!("{name}.nested_absmax"), &bytes(absmax))?;
    writer.write(
        &format!("{name}.nested_quant_map"),
        &bytes(nf4::dynamic_map()),
    )?;
    let state = format!("{:STATE$}", state.to_string());
    writer.write(
        &format!("{name}.quant_state.bitsandbytes__nf4"),
        state.as_bytes(),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use safetensors::SafeTensors;
    use serde_json::Value;

    use super::*;

    /// What is loaded from the copy is what quantising gives, to the bit, and
    /// the copy of a copy is the same again.
    #[test]
    fn a_copy_in_4_bits_is_the_model_in_4_bits() {
        let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/parity/files");
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        let source = Checkpoint::open(&files.join("sharded")).unwrap();
        assert!(!source.is_quantized());
        std::fs::create_dir(&first).unwrap();
        let host = |matrix: &HostMatrix| Ok(matrix.quantize()?);
        source.fill_quantized(&first, 30_000, host, |_| ()).unwrap();
        assert!(first.join(crate::weights::INDEX).exists(), "several shards");
        let copy = Checkpoint::open(&first).unwrap();
        assert!(copy.is_quantized());
        copy.save_quantized(&second, host, |_| ()).unwrap();
        let again = Checkpoint::open(&second).unwrap();
        let products = |checkpoint: &Checkpoint, layer| {
            let products = checkpoint.layer(layer, Storage::Nf4).unwrap().products;
            products.map(|product| match product.data {
                MatrixData::Nf4(tensor) => tensor,
                _ => panic!("not in 4 bits"),
            })
        };
        for layer in 0..2 {
            let expected = products(&source, layer);
            assert!(products(&copy, layer) == expected && products(&again, layer) == expected);
            assert!(matches!(expected[0].absmax(), Absmax::Nested { .. }));
        }
        let mut values = [Vec::new(), Vec::new()];
        for (checkpoint, values) in [&source, &again].into_iter().zip(&mut values) {
            checkpoint.values(Weight::Head).unwrap().read(3..90, values);
        }
        assert_eq!(values[0], values[1]);
    }

    /// Of what bitsandbytes wrote (tests/parity/files), a copy has the same tensors, bit
    /// for bit; the state alone, JSON, is spaced otherwise.
    #[test]
    fn a_copy_of_what_bitsandbytes_wrote_is_that() {
        let theirs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/parity/files/nf4");
        let folder = tempfile::tempdir().unwrap();
        let copies = ["one", "two"].map(|name| folder.path().join(name));
        for (from, to) in [(&theirs, &copies[0]), (&copies[0], &copies[1])] {
            let stays = |_: &HostMatrix| panic!("nothing is to be quantised");
            let source = Checkpoint::open(from).unwrap();
            source.save_quantized(to, stays, |_| ()).unwrap();
        }
        let [theirs, one, two] = [&theirs, &copies[0], &copies[1]]
            .map(|folder| std::fs::read(folder.join(crate::weights::SINGLE)).unwrap());
        assert!(one == two);
        let [theirs, one] = [&theirs, &one].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        assert_eq!(one.len(), theirs.len());
        for (name, tensor) in theirs.iter() {
            let copy = one.tensor(name).unwrap();
            if name.ends_with(".quant_state.bitsandbytes__nf4") {
                let [state, expected] = [copy.data(), tensor.data()]
                    .map(|bytes| serde_json::from_slice::<Value>(bytes).unwrap());
                assert_eq!(state, expected, "{name}");
            } else {
                assert!(copy == tensor, "{name}");
            }
        }
    }

    #[test]
    fn a_weight_that_cannot_be_quantised_is_named_and_leaves_no_folder() {
        let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/parity/files");
        let source = Checkpoint::open(&files.join("sharded")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let spoilt = HostMatrix::f32(1, 64, vec![f32::NAN; 64]);
        let quantize = |_: &HostMatrix| Ok(spoilt.quantize()?);
        let error = source.save_quantized(&out, quantize, |_| ()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("model.layers.0.self_attn.q_proj.weight"),
            "{text}"
        );
        assert!(text.contains("NaN"), "{text}");
        assert!(!out.exists());
    }
}
