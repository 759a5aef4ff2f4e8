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
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{Config, Keys, Module};
use crate::error::{Error, Result, read, read_text_if_there};
use crate::fingerprint::hex;
use crate::seen::ROWS;
use crate::targets::{self, Strength, Targets, Unfit, name_of};
use crate::weights::{bf16s, f16s, f32s};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
pub(crate) const SUMS: &str = "SHA256SUMS";

/// The settings that an adapter was trained with: by them it is asked in the same words.
pub const SETTINGS: &str = "train.yaml";
const PREFIX: &str = "base_model.model.";
/// PEFT takes the `.weight` off when it saves.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// What an adapter is, apart from its values.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The base model it was trained on: a name or a folder, for people to read.
    pub base_model: String,
    /// Branch, tag or commit of the base on the hub, where it is not the newest.
    pub revision: Option<String>,
    /// Inner dimension of every pair that no pattern gives another.
    pub rank: usize,
    /// Numerator of the scale, unless a pattern gives another.
    pub alpha: f64,
    /// Dropout on its inputs while it was trained.
    pub dropout: f64,
    /// Which products have a pair.
    pub targets: Targets,
    /// Rank-stabilised: the scale divides by √rank (Kalajdzievski, arXiv 2312.03732).
    pub rslora: bool,
    /// The rows of the updated weights are rescaled to learnt lengths (DoRA, Liu et
    /// al., arXiv 2402.09353).
    pub dora: bool,
    /// Ranks by names: ends of them, or regular expressions; the first holds.
    pub rank_pattern: Vec<(String, usize)>,
    /// The same for alpha.
    pub alpha_pattern: Vec<(String, f64)>,
}

impl AdapterConfig {
    /// Plain LoRA on all seven products of every layer.
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            base_model: String::new(),
            revision: None,
            rank,
            alpha,
            dropout: 0.0,
            targets: Targets::all_linear(),
            rslora: false,
            dora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }

    /// Which products of a model of so many layers get a pair, of which rank, and what `B A x` is
    /// multiplied by: `alpha / rank`, or `alpha / √rank`.
    ///
    /// # Errors
    /// If a target or a pattern matches nothing, or is no regular expression.
    pub fn resolve(&self, layers: usize) -> Result<BTreeMap<(usize, Module), Strength>, Unfit> {
        let targets = targets::resolve(&self.targets, layers)?;
        let ranks = targets::by_pattern("rank_pattern", &self.rank_pattern, &targets)?;
        let alphas = targets::by_pattern("alpha_pattern", &self.alpha_pattern, &targets)?;
        let strength = |target| {
            let rank = ranks.get(&target).copied().unwrap_or(self.rank);
            let alpha = alphas.get(&target).copied().unwrap_or(self.alpha);
            let divisor = match self.rslora {
                true => (rank as f64).sqrt(),
                false => rank as f64,
            };
            let scale = (alpha / divisor) as f32;
            (target, Strength { rank, scale })
        };
        Ok(targets.into_iter().map(strength).collect())
    }
}

/// The two factors of one product's change, `ΔW = scale · B A`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// `alpha / rank`, or `alpha / √rank`.
    pub scale: f32,
    /// A, `[rank, in]`.
    pub a: Vec<f32>,
    /// B, `[out, rank]`.
    pub b: Vec<f32>,
    /// With DoRA the lengths that the rows of `W + ΔW` are rescaled to, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// An adapter: a pair for each target.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Ranks, scales, targets.
    pub config: AdapterConfig,
    /// By layer and product.
    pub pairs: BTreeMap<(usize, Module), Pair>,
}

/// What keeps `folder` from being a finished adapter's, if something does: goes on from its name.
pub fn lacks(folder: &Path) -> Option<String> {
    let has = |name: &str| folder.join(name).exists();
    let tell = |cause: &str| Some(cause.to_owned());
    match (has(CONFIG), has(TENSORS)) {
        (true, true) => None,
        // qlora-train writes the weights last.
        (_, false) if has("checkpoints") => {
            tell("its training is not finished; qlora-train --resume goes on with it")
        }
        (false, false) if !folder.exists() => tell("there is no such folder"),
        (false, false) => Some(format!(
            "no {CONFIG} and {TENSORS} there; train one with qlora-train"
        )),
        (true, false) if has("adapter_model.bin") => Some(format!(
            "{TENSORS} is missing; adapter_model.bin is a pickle, which is not read: save it again with peft"
        )),
        (true, false) => Some(format!("{TENSORS} is missing there: put it back")),
        (false, true) => Some(format!(
            "{CONFIG} is missing there, which holds rank, scale and targets: put it back"
        )),
    }
}

/// What helps where there is no sum of an adapter's files in `folder`.
pub fn note_sums(folder: &Path) -> String {
    let there = [CONFIG, TENSORS, ROWS, SETTINGS].into_iter();
    let there = there.filter(|name| [CONFIG, TENSORS].contains(name) || folder.join(name).exists());
    let there = there.collect::<Vec<_>>().join(" ");
    format!(
        "if you trust the adapter, note its sums: `(cd '{}' && sha256sum {there} > {SUMS})`",
        folder.display()
    )
}

/// Holds an adapter's files against the sums in `SHA256SUMS` beside them, where it
/// is: peft takes a flipped bit, or a scale changed by hand, as it comes.
///
/// # Errors
/// If one is not as it was written, or cannot be read; or, with the path of
/// `SHA256SUMS`, if that has no sum of one.
pub fn check_sums(folder: &Path) -> Result<()> {
    let Some(sums) = Sums::read(folder)? else {
        return Ok(());
    };
    for name in [CONFIG, TENSORS] {
        if !sums.check(folder, name, &read(&folder.join(name))?)? {
            let reason = format!("has no sum of {name}; {}", note_sums(folder));
            return Err(Error::file(&folder.join(SUMS), reason));
        }
    }
    // Whoever asks by them says that they are missing; changed, they ask in other words.
    if let Some(text) = read_text_if_there(&folder.join(SETTINGS))? {
        sums.check(folder, SETTINGS, text.as_bytes())?;
    }
    Ok(())
}

/// What `SHA256SUMS` says, by file.
pub(crate) struct Sums(BTreeMap<String, String>);

impl Sums {
    /// Reads the file, if there is one, as sha256sum writes it: sum, space, space or `*`, name.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let Some(text) = read_text_if_there(&folder.join(SUMS))? else {
            return Ok(None);
        };
        let parts = text
            .lines()
            .filter_map(|line| line.split_once("  ").or(line.split_once(" *")));
        let by_name = parts.map(|(sum, name)| (name.into(), sum.into()));
        Ok(Some(Self(by_name.collect())))
    }

    /// Whether there is a sum of the file `name`.
    pub(crate) fn names(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether there is a sum of the file `name`, whose bytes are at hand.
    ///
    /// # Errors
    /// If they are not the file's by that sum.
    pub(crate) fn check(&self, folder: &Path, name: &str, bytes: &[u8]) -> Result<bool> {
        let Some(sum) = self.0.get(name) else {
            return Ok(false);
        };
        if hex(&Sha256::digest(bytes)) != *sum {
            let reason = format!("is not as it was written ({SUMS}): damaged, or changed by hand");
            return Err(Error::file(&folder.join(name), reason));
        }
        Ok(true)
    }
}

impl Adapter {
    /// Reads the adapter in `folder`, for a base of the shape `model`.
    /// bf16 and f16 values are widened.
    ///
    /// # Errors
    /// If a file is missing or malformed, a setting is missing or not
    /// supported, a target or pattern matches nothing, or a tensor is missing,
    /// unexpected, of another shape, or holds what is no number; or if a file is not
    /// what its sum says.
    pub fn load(folder: &Path, model: &Config) -> Result<Self> {
        check_sums(folder)?;
        let keys = Keys::read(folder.join(CONFIG))?;
        let config = read_config(&keys)?;
        let strengths = config.resolve(model.layers);
        let strengths = strengths.map_err(|Unfit { key, reason }| keys.wrong(key, reason))?;
        if let Some(Strength { rank, scale }) =
            (strengths.values()).find(|strength| !strength.scale.is_normal())
        {
            let key = match (config.alpha / *rank as f64) as f32 {
                scale if scale.is_normal() => "alpha_pattern",
                _ => "lora_alpha",
            };
            let reason = format!("makes a scale of {scale:e} with rank {rank}, which is no use");
            return Err(keys.wrong(key, reason));
        }
        let path = folder.join(TENSORS);
        let bytes = read(&path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| {
            Error::file(&path, format!("is not a whole safetensors file: {error}"))
        })?;

        let mut names: BTreeSet<&str> = file.names().into_iter().collect();
        let mut take = |name: String, shape: &[usize]| {
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
            let values: Vec<f32> = match tensor.dtype() {
                Dtype::F32 => f32s(tensor.data()),
                Dtype::BF16 => bf16s(tensor.data()).iter().map(|v| v.to_f32()).collect(),
                Dtype::F16 => f16s(tensor.data()).iter().map(|v| v.to_f32()).collect(),
                other => {
                    let reason = format!("is {other:?}, not F32, BF16 or F16");
                    return Err(Error::tensor(&path, &name, reason));
                }
            };
            match values.iter().all(|value| value.is_finite()) {
                true => Ok(values),
                false => {
                    let reason = "holds values that are no numbers: it is damaged, or its training went wrong";
                    Err(Error::tensor(&path, &name, reason))
                }
            }
        };
        let mut pairs = BTreeMap::new();
        for (target, Strength { rank, scale }) in strengths {
            let [outputs, inputs] = target.1.shape(model);
            let a = take(tensor_name(target, "lora_A.weight"), &[rank, inputs])?;
            let b = take(tensor_name(target, "lora_B.weight"), &[outputs, rank])?;
            let magnitude = config
                .dora
                .then(|| take(tensor_name(target, MAGNITUDE), &[outputs]))
                .transpose()?;
            let pair = Pair {
                scale,
                a,
                b,
                magnitude,
            };
            pairs.insert(target, pair);
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
    /// If a file cannot be written, or `config` does not go with `model`.
    ///
    /// # Panics
    /// If the pairs are not those that `config` and `model` call for.
    pub fn save(&self, folder: &Path, model: &Config) -> Result<()> {
        let path = folder.join(CONFIG);
        let strengths = self.config.resolve(model.layers);
        let strengths =
            strengths.map_err(|Unfit { key, reason }| Error::key(&path, key, reason))?;
        assert!(
            self.pairs.keys().eq(strengths.keys()),
            "pairs of an adapter"
        );
        let mut tensors = Vec::with_capacity(3 * self.pairs.len());
        for (&target, pair) in &self.pairs {
            let [outputs, inputs] = target.1.shape(model);
            let Strength { rank, scale } = strengths[&target];
            assert_eq!(pair.scale, scale, "scale of {}", name_of(target));
            assert_eq!(pair.magnitude.is_some(), self.config.dora, "DoRA");
            let parts = [
                ("lora_A.weight", Some(&pair.a), vec![rank, inputs]),
                ("lora_B.weight", Some(&pair.b), vec![outputs, rank]),
                (MAGNITUDE, pair.magnitude.as_ref(), vec![outputs]),
            ];
            for (part, values, shape) in parts {
                let Some(values) = values else { continue };
                let name = tensor_name(target, part);
                let count: usize = shape.iter().product();
                assert_eq!(values.len(), count, "values of {name}");
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                tensors.push((name, shape, bytes));
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
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
        write(&path, &text)
    }

    /// A name for exactly this adapter: SHA-256, in hex, over the bits of its scales
    /// and values with their layers and products. How the files are laid out does
    /// not matter, nor what the base is called.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for ((layer, module), pair) in &self.pairs {
            let magnitude = pair.magnitude.as_deref().unwrap_or_default();
            let lengths = [pair.a.len(), pair.b.len(), magnitude.len()];
            hash.update(format!("{layer} {module} {lengths:?}\n"));
            for value in [&[pair.scale], &*pair.a, &*pair.b, magnitude].concat() {
                hash.update(value.to_le_bytes());
            }
        }
        hex(&hash.finalize())
    }

    /// What PEFT writes, the optional parts at rest.
    fn config_json(&self) -> Value {
        let AdapterConfig {
            base_model,
            revision,
            rank,
            alpha,
            dropout,
            targets,
            rslora,
            dora,
            rank_pattern,
            alpha_pattern,
        } = &self.config;
        let targets = match targets {
            Targets::Names(names) => json!(names),
            Targets::Pattern(pattern) => json!(pattern),
        };
        let ranks: Map<_, _> = (rank_pattern.iter())
            .map(|(name, rank)| (name.clone(), json!(rank)))
            .collect();
        let alphas: Map<_, _> = (alpha_pattern.iter())
            .map(|(name, alpha)| (name.clone(), number(*alpha)))
            .collect();
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "revision": revision,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": number(*alpha),
            "lora_dropout": dropout,
            "target_modules": targets,
            "use_rslora": rslora,
            "use_dora": dora,
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
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        })
    }
}

/// As PEFT's own files hold it: a whole number where it is one.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// A tensor of the pair of a target.
fn tensor_name(target: (usize, Module), part: &str) -> String {
    format!("{PREFIX}{}.{part}", name_of(target))
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

const READ: [&str; 11] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
];

/// Every setting of an `adapter_config.json` that changes what the adapter computes, or
/// which products it is on, and that is not supported here; what is wrong with each.
pub fn unsupported(settings: &Map<String, Value>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // PEFT initialises these from the base's own weights, and changes the base.
    if let Some(Value::String(how)) = settings.get("init_lora_weights")
        && !["gaussian", "orthogonal", "eva"].contains(&how.as_str())
    {
        let reason = format!(
            "is \"{how}\", which goes with a changed base: convert the adapter to plain LoRA with PEFT"
        );
        found.push(("init_lora_weights".to_owned(), reason));
    }
    // Whatever else a key turns on, it is at rest when null, false or empty.
    let at_rest = |key: &str, value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => key == "bias" && text == "none",
        _ => false,
    };
    for (key, value) in settings {
        let known = WITHOUT_EFFECT.contains(&key.as_str()) || READ.contains(&key.as_str());
        if !known && !at_rest(key, value) {
            found.push((key.clone(), format!("is {value}, which is not supported")));
        }
    }
    found
}

fn read_config(keys: &Keys) -> Result<AdapterConfig> {
    keys.must_be("peft_type", "LORA")?;
    if let Some(task) = keys
        .optional::<String>("task_type")?
        .filter(|task| task != "CAUSAL_LM")
    {
        return Err(keys.wrong("task_type", format!("is \"{task}\", not \"CAUSAL_LM\"")));
    }
    if let Some((key, reason)) = unsupported(&keys.map).into_iter().next() {
        return Err(keys.wrong(&key, reason));
    }

    let alpha = keys.required::<f64>("lora_alpha")?;
    let rank_pattern = pattern::<usize>(keys, "rank_pattern")?;
    let alpha_pattern = pattern::<f64>(keys, "alpha_pattern")?;
    for (key, name, alpha) in [("lora_alpha", "", alpha)]
        .into_iter()
        .chain((alpha_pattern.iter()).map(|(name, alpha)| ("alpha_pattern", name.as_str(), *alpha)))
    {
        if !(alpha.is_finite() && alpha != 0.0) {
            let name = if name.is_empty() {
                String::new()
            } else {
                format!(" for `{name}`")
            };
            return Err(keys.wrong(
                key,
                format!("is {alpha}{name}: the adapter would do nothing"),
            ));
        }
    }
    if let Some((name, _)) = rank_pattern.iter().find(|(_, rank)| *rank == 0) {
        return Err(keys.wrong("rank_pattern", format!("is 0 for `{name}`")));
    }
    Ok(AdapterConfig {
        base_model: keys
            .optional("base_model_name_or_path")?
            .unwrap_or_default(),
        revision: keys.optional("revision")?,
        rank: keys.size("r")?,
        alpha,
        dropout: keys.optional("lora_dropout")?.unwrap_or(0.0),
        targets: read_targets(keys)?,
        rslora: keys.optional("use_rslora")?.unwrap_or(false),
        dora: keys.optional("use_dora")?.unwrap_or(false),
        rank_pattern,
        alpha_pattern,
    })
}

/// Values by names, in the file's order, which decides.
fn pattern<T: DeserializeOwned>(keys: &Keys, key: &str) -> Result<Vec<(String, T)>> {
    let map: Map<String, Value> = keys.optional(key)?.unwrap_or_default();
    let value = |(name, value): (String, Value)| match serde_json::from_value(value) {
        Ok(value) => Ok((name, value)),
        Err(error) => Err(keys.wrong(key, format!("for `{name}`: {error}"))),
    };
    map.into_iter().map(value).collect()
}

fn read_targets(keys: &Keys) -> Result<Targets> {
    const KEY: &str = "target_modules";
    match keys.required(KEY)? {
        Value::String(text) => Ok(Targets::from_text(&text)),
        Value::Array(names) => {
            let name = |name: Value| match name {
                Value::String(name) => Ok(name),
                other => Err(keys.wrong(KEY, format!("holds {other}, not a name"))),
            };
            let names: Result<_> = names.into_iter().map(name).collect();
            names.map(Targets::Names)
        }
        other => Err(keys.wrong(KEY, format!("is {other}, not a list of names"))),
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
