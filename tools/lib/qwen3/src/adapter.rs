//! LoRA adapters in the files of PEFT: `adapter_config.json` beside
//! `adapter_model.safetensors`.
//!
//! PEFT itself reads an odd adapter and goes on: without `lora_alpha` with
//! another scale, with a tensor missing or misnamed with zeros in its place.
//! Here each of these is an error, and so is any setting that changes what the
//! adapter computes and is not supported.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::config::{Config, Keys, Module};
use crate::error::{Error, Result, read};
use crate::weights::{bf16s, f16s, f32s};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.model.layers.";

/// What an adapter is, apart from its values.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The base model it was trained on: a name or a folder, for people to read.
    pub base_model: String,
    /// Inner dimension of every pair.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Dropout on its inputs while it was trained.
    pub dropout: f64,
    /// Which products of every layer have a pair.
    pub targets: BTreeSet<Module>,
    /// Rank-stabilised: the scale divides by √rank (Kalajdzievski, arXiv 2312.03732).
    pub rslora: bool,
}

impl AdapterConfig {
    /// What `B A x` is multiplied by: `alpha / rank`, or `alpha / √rank`.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// The two factors of one product's change, `ΔW = scale · B A`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// A, `[rank, in]`.
    pub a: Vec<f32>,
    /// B, `[out, rank]`.
    pub b: Vec<f32>,
}

/// An adapter: a pair for each target of each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Rank, scale, targets.
    pub config: AdapterConfig,
    /// By layer and product.
    pub pairs: BTreeMap<(usize, Module), Pair>,
}

impl Adapter {
    /// Reads the adapter in `folder`, for a base of the shape `model`.
    /// bf16 and f16 values are widened.
    ///
    /// # Errors
    /// If a file is missing or malformed, a setting is missing or not
    /// supported, or a tensor is missing, unexpected or of another shape.
    pub fn load(folder: &Path, model: &Config) -> Result<Self> {
        let config = read_config(&Keys::read(folder.join(CONFIG))?)?;
        let path = folder.join(TENSORS);
        let bytes = read(&path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| {
            Error::file(&path, format!("is not a whole safetensors file: {error}"))
        })?;

        let mut names: BTreeSet<&str> = file.names().into_iter().collect();
        let mut take = |name: String, shape: [usize; 2]| {
            let tensor = file
                .tensor(&name)
                .map_err(|_| missing(&path, &name, &names_with_other_prefix(&file)))?;
            names.remove(name.as_str());
            if tensor.shape() != shape {
                let found = tensor.shape();
                let reason = format!(
                    "has the shape {found:?}, not {shape:?}: an adapter of another base or rank"
                );
                return Err(Error::tensor(&path, &name, reason));
            }
            match tensor.dtype() {
                Dtype::F32 => Ok(f32s(tensor.data())),
                Dtype::BF16 => Ok(bf16s(tensor.data()).iter().map(|v| v.to_f32()).collect()),
                Dtype::F16 => Ok(f16s(tensor.data()).iter().map(|v| v.to_f32()).collect()),
                other => Err(Error::tensor(
                    &path,
                    &name,
                    format!("is {other:?}, not F32, BF16 or F16"),
                )),
            }
        };
        let mut pairs = BTreeMap::new();
        for layer in 0..model.layers {
            for &module in &config.targets {
                let [outputs, inputs] = module.shape(model);
                let a = take(tensor_name(layer, module, 'A'), [config.rank, inputs])?;
                let b = take(tensor_name(layer, module, 'B'), [outputs, config.rank])?;
                pairs.insert((layer, module), Pair { a, b });
            }
        }
        if let Some(name) = names.first() {
            let reason = "is unexpected: not a pair of a target in `target_modules`, or of a layer the base does not have";
            return Err(Error::tensor(&path, name, reason));
        }
        Ok(Self { config, pairs })
    }

    /// Writes both files to `folder`, which must exist, and waits until they
    /// are on the disk. PEFT, and what is built on it, reads them as they are.
    ///
    /// # Errors
    /// If a file cannot be written.
    ///
    /// # Panics
    /// If the pairs are not those that `config` and `model` call for.
    pub fn save(&self, folder: &Path, model: &Config) -> Result<()> {
        let AdapterConfig { rank, targets, .. } = &self.config;
        assert_eq!(
            self.pairs.len(),
            model.layers * targets.len(),
            "pairs of an adapter"
        );
        let mut tensors = Vec::with_capacity(2 * self.pairs.len());
        for (&(layer, module), pair) in &self.pairs {
            let [outputs, inputs] = module.shape(model);
            for (which, values, shape) in [
                ('A', &pair.a, [*rank, inputs]),
                ('B', &pair.b, [outputs, *rank]),
            ] {
                let name = tensor_name(layer, module, which);
                assert_eq!(values.len(), shape[0] * shape[1], "values of {name}");
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                tensors.push((name, shape, bytes));
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
            (
                name,
                view.expect("the length was just checked against the shape"),
            )
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let file =
            safetensors::serialize(views, Some(metadata)).expect("views made above are consistent");
        write(&folder.join(TENSORS), &file)?;

        let mut text =
            serde_json::to_vec_pretty(&self.config_json()).expect("a JSON value is serialisable");
        text.push(b'\n');
        write(&folder.join(CONFIG), &text)
    }

    /// A name for exactly this adapter: SHA-256, in hex, over its scale and the
    /// bits of its values with their layers and products. How the files are
    /// laid out does not matter, nor what the base is called.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.config.scale().to_le_bytes());
        for ((layer, module), pair) in &self.pairs {
            hash.update(format!("{layer} {module} {}\n", self.config.rank));
            for value in pair.a.iter().chain(&pair.b) {
                hash.update(value.to_le_bytes());
            }
        }
        crate::fingerprint::hex(&hash.finalize())
    }

    /// What PEFT writes, the optional parts at rest.
    fn config_json(&self) -> Value {
        let AdapterConfig {
            base_model,
            rank,
            alpha,
            dropout,
            targets,
            rslora,
        } = &self.config;
        let targets: Vec<&str> = targets.iter().map(|module| module.name()).collect();
        // PEFT's own files hold a whole number where alpha is one.
        let alpha = if alpha.fract() == 0.0 && alpha.abs() < 1e15 {
            json!(*alpha as i64)
        } else {
            json!(alpha)
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "revision": null,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": targets,
            "use_rslora": rslora,
            "use_dora": false,
            "bias": "none",
            "lora_bias": false,
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "modules_to_save": null,
            "exclude_modules": null,
            "target_parameters": null,
            "trainable_token_indices": null,
            "layers_to_transform": null,
            "layers_pattern": null,
            "layer_replication": null,
            "rank_pattern": {},
            "alpha_pattern": {},
        })
    }
}

fn tensor_name(layer: usize, module: Module, which: char) -> String {
    let (block, name) = module.path();
    format!("{PREFIX}{layer}.{block}.{name}.lora_{which}.weight")
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|source| Error::Write {
        path: path.into(),
        source,
    })
}

/// Keys that say where an adapter comes from or how it was initialised, not
/// what it computes.
const WITHOUT_EFFECT: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size", // read only with use_qalora
    "revision",
];

const READ: [&str; 8] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
];

fn read_config(keys: &Keys) -> Result<AdapterConfig> {
    keys.must_be("peft_type", "LORA")?;
    if let Some(task) = keys
        .optional::<String>("task_type")?
        .filter(|task| task != "CAUSAL_LM")
    {
        return Err(keys.wrong("task_type", format!("is \"{task}\", not \"CAUSAL_LM\"")));
    }
    // PEFT initialises these from the base's own weights, and changes the base.
    if let Some(Value::String(how)) = keys.map.get("init_lora_weights")
        && !["gaussian", "orthogonal", "eva"].contains(&how.as_str())
    {
        let reason = format!(
            "is \"{how}\", which goes with a changed base: convert the adapter to plain LoRA with PEFT"
        );
        return Err(keys.wrong("init_lora_weights", reason));
    }
    // Whatever else a key turns on, it is at rest when null, false or empty.
    let at_rest = |key: &str, value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => key == "bias" && text == "none",
        _ => false,
    };
    let mut others = keys.map.iter().filter(|(key, _)| {
        ![&WITHOUT_EFFECT[..], &READ]
            .concat()
            .contains(&key.as_str())
    });
    if let Some((key, value)) = others.find(|(key, value)| !at_rest(key, value)) {
        return Err(keys.wrong(key, format!("is {value}, which is not supported")));
    }

    let rank = keys.size("r")?;
    let alpha = keys.required::<f64>("lora_alpha")?;
    if !(alpha.is_finite() && alpha != 0.0) {
        return Err(keys.wrong(
            "lora_alpha",
            format!("is {alpha}: the adapter would do nothing"),
        ));
    }
    Ok(AdapterConfig {
        base_model: keys
            .optional("base_model_name_or_path")?
            .unwrap_or_default(),
        rank,
        alpha,
        dropout: keys.optional("lora_dropout")?.unwrap_or(0.0),
        targets: read_targets(keys)?,
        rslora: keys.optional("use_rslora")?.unwrap_or(false),
    })
}

fn read_targets(keys: &Keys) -> Result<BTreeSet<Module>> {
    const KEY: &str = "target_modules";
    let wrong = |reason: String| keys.wrong(KEY, reason);
    match keys.required(KEY)? {
        Value::String(all) if all == "all-linear" => Ok(Module::ALL.into()),
        Value::String(pattern) => Err(wrong(format!(
            "is the pattern \"{pattern}\": a list of names or \"all-linear\" is supported"
        ))),
        Value::Array(names) if !names.is_empty() => names
            .iter()
            .map(|name| {
                let name = name
                    .as_str()
                    .ok_or_else(|| wrong(format!("holds {name}, not a name")))?;
                name.parse().map_err(|unknown| {
                    wrong(format!("holds a name that is not supported: {unknown}"))
                })
            })
            .collect(),
        other => Err(wrong(format!("is {other}, not a list of names"))),
    }
}

/// A name in the file with the right end under another prefix, if any: the
/// usual reason for a missing tensor.
fn names_with_other_prefix(file: &SafeTensors) -> Option<String> {
    let mut names = file.names();
    names.sort_unstable();
    names
        .into_iter()
        .find(|name| !name.starts_with(PREFIX))
        .map(str::to_owned)
}

fn missing(path: &Path, name: &str, stranger: &Option<String>) -> Error {
    let reason = match stranger {
        Some(stranger) => {
            format!("is missing, while there is `{stranger}`: saved without PEFT's prefix?")
        }
        None => "is missing".into(),
    };
    Error::tensor(path, name, reason)
}
