//! `config.json` and `generation_config.json` of a Qwen3 checkpoint.
//!
//! A checkpoint that differs from what this crate computes must not load and
//! then be quietly wrong: every key that changes the mathematics is either
//! honoured or refused by name.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result, read, read_text_if_there};

/// Most that a size may be. What is computed of sizes before memory is asked for then fits
/// its integers: bytes of all products are fewer than 2^(12 + 3 + 20 + 20 + 2).
const MOST: usize = 1 << 20;

/// Most layers.
const LAYERS: usize = 1 << 12;

/// Least that is added to a mean square: 0 would make no number of a row of zeros, and what
/// is less than this is 0 in 32 bits, or close to it.
const LEAST_EPS: f64 = 1e-30;

/// Highest base of the rotary frequencies, ten thousand times what the longest contexts have.
const MOST_THETA: f64 = 1e12;

/// Most values of the rotary table, which is held whole, a cosine and a sine for each angle:
/// a million positions of heads of 256.
const ROTARY: usize = 1 << 28;

/// The shape of a model. Sizes are numbers of features unless they say otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding table; more than the tokenizer has tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; `heads × head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The embedding table serves as lm_head too.
    pub tied: bool,
}

impl Config {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    /// If the file is missing or malformed, or describes anything but a dense
    /// Qwen3 with full attention and plain rotary positions, or one of a size that
    /// no model has.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::from_keys(&Keys::read(folder.join("config.json"))?)
    }

    pub(crate) fn from_keys(keys: &Keys) -> Result<Self> {
        keys.must_be("model_type", "qwen3")?;
        if let Some(names) = keys.optional::<Vec<String>>("architectures")?
            && names != ["Qwen3ForCausalLM"]
        {
            return Err(keys.wrong(
                "architectures",
                format!("is {names:?}, not [\"Qwen3ForCausalLM\"]"),
            ));
        }
        if keys
            .optional::<String>("hidden_act")?
            .is_some_and(|act| act != "silu")
        {
            return Err(keys.wrong(
                "hidden_act",
                "is not \"silu\", the only activation supported",
            ));
        }
        for (key, meaning) in [
            ("attention_bias", "biases in attention are"),
            ("use_sliding_window", "sliding-window attention is"),
        ] {
            if keys.optional(key)?.unwrap_or(false) {
                return Err(keys.wrong(key, format!("is true: {meaning} not supported")));
            }
        }
        if keys.optional::<f64>("attention_dropout")?.unwrap_or(0.0) != 0.0 {
            return Err(keys.wrong(
                "attention_dropout",
                "is not 0: dropout in attention is not supported",
            ));
        }
        if let Some(types) = keys.optional::<Vec<String>>("layer_types")?
            && let Some(other) = types.iter().find(|t| *t != "full_attention")
        {
            return Err(keys.wrong(
                "layer_types",
                format!("holds \"{other}\": only \"full_attention\" is supported"),
            ));
        }

        let heads = keys.size("num_attention_heads")?;
        let rms_eps: f64 = keys.required("rms_norm_eps")?;
        let config = Self {
            vocab_size: keys.size("vocab_size")?,
            hidden_size: keys.size("hidden_size")?,
            intermediate_size: keys.size("intermediate_size")?,
            layers: keys.size("num_hidden_layers")?,
            heads,
            kv_heads: keys.size("num_key_value_heads")?,
            // What transformers takes where the key is missing.
            head_dim: if keys.has("head_dim") {
                keys.size("head_dim")?
            } else {
                128
            },
            max_positions: keys.size("max_position_embeddings")?,
            rms_eps: rms_eps as f32,
            rope_theta: rope_theta(keys)?,
            tied: keys.optional("tie_word_embeddings")?.unwrap_or(false),
        };
        if !heads.is_multiple_of(config.kv_heads) {
            let reason = format!(
                "is {}, which does not divide the {heads} attention heads",
                config.kv_heads
            );
            return Err(keys.wrong("num_key_value_heads", reason));
        }
        if config.layers > LAYERS {
            return Err(keys.too_large("num_hidden_layers", config.layers, LAYERS));
        }
        if heads * config.head_dim > MOST {
            let reason = format!(
                "is {heads}: with {} features each, more than {MOST} in all",
                config.head_dim
            );
            return Err(keys.wrong("num_attention_heads", reason));
        }
        if config.max_positions * config.head_dim > ROTARY {
            let (key, most) = ("max_position_embeddings", ROTARY / config.head_dim);
            return Err(keys.too_large(key, config.max_positions, most));
        }
        if !(LEAST_EPS..=1.0).contains(&rms_eps) {
            let reason = format!("is {rms_eps:?}, not from {LEAST_EPS:?} to 1");
            return Err(keys.wrong("rms_norm_eps", reason));
        }
        if !config.head_dim.is_multiple_of(2) {
            let reason = format!(
                "is {}: rotary positions need an even number",
                config.head_dim
            );
            return Err(keys.wrong("head_dim", reason));
        }
        Ok(config)
    }
}

/// The base of the rotary frequencies: `rope_theta`, or since transformers 5
/// `rope_parameters.rope_theta`. Any scaling of positions is refused.
fn rope_theta(keys: &Keys) -> Result<f64> {
    let is_base = |theta: &f64| (1.0..=MOST_THETA).contains(theta);
    let no_base = |value: &Value| format!("is {value}, not a number from 1 to {MOST_THETA:e}");
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(map) = keys.optional::<Map<String, Value>>(key)? else {
            continue;
        };
        let kind = map
            .get("rope_type")
            .or(map.get("type"))
            .and_then(Value::as_str);
        if kind.is_some_and(|kind| kind != "default") || map.contains_key("factor") {
            let kind = kind.unwrap_or("unnamed");
            let reason = format!(
                "asks for \"{kind}\" scaling: only unscaled rotary positions are supported"
            );
            return Err(keys.wrong(key, reason));
        }
        if let Some(value) = map.get("rope_theta").filter(|value| !value.is_null()) {
            let theta = value.as_f64().filter(is_base);
            return theta.ok_or_else(|| keys.wrong(&format!("{key}.rope_theta"), no_base(value)));
        }
    }
    let theta = keys.required("rope_theta")?;
    match is_base(&theta) {
        true => Ok(theta),
        false => Err(keys.wrong("rope_theta", no_base(&keys.map["rope_theta"]))),
    }
}

/// The ids of which any ends a reply: `eos_token_id` of `generation_config.json` in `folder`,
/// or of `config.json` where the former is missing or names none.
///
/// # Errors
/// If neither names one, or the value has the wrong type.
pub fn stop_ids(folder: &Path) -> Result<Vec<u32>> {
    let model = Keys::read(folder.join("config.json"))?;
    let path = folder.join("generation_config.json");
    let keys = match read_text_if_there(&path)? {
        Some(_) => Keys::read(path)?,
        None => Keys {
            path,
            map: Map::new(),
        },
    };
    let mut stop_ids = keys.ids("eos_token_id")?;
    if stop_ids.is_empty() {
        stop_ids = model.ids("eos_token_id")?;
    }
    if stop_ids.is_empty() {
        return Err(keys.wrong(
            "eos_token_id",
            "is missing here and in config.json: no reply would ever end",
        ));
    }
    Ok(stop_ids)
}

/// A JSON object from a file, read key by key so that an error can name both.
pub(crate) struct Keys {
    pub(crate) path: PathBuf,
    pub(crate) map: Map<String, Value>,
}

impl Keys {
    pub(crate) fn read(path: PathBuf) -> Result<Self> {
        let bytes = read(&path)?;
        match serde_json::from_slice(&bytes) {
            Ok(map) => Ok(Self { path, map }),
            Err(source) => Err(Error::Json { path, source }),
        }
    }

    pub(crate) fn wrong(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::key(&self.path, key, reason)
    }

    /// Present and not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    pub(crate) fn optional<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match T::deserialize(value) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(self.wrong(key, format!("is {value}: {error}"))),
            },
        }
    }

    pub(crate) fn required<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.optional(key)?
            .ok_or_else(|| self.wrong(key, "is missing"))
    }

    /// A whole number from 1 to [`MOST`].
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        match self.required(key)? {
            0 => Err(self.wrong(key, "is 0")),
            size if size > MOST => Err(self.too_large(key, size, MOST)),
            size => Ok(size),
        }
    }

    fn too_large(&self, key: &str, size: usize, most: usize) -> Error {
        self.wrong(
            key,
            format!("is {size}, more than {most}, which no model has"),
        )
    }

    pub(crate) fn must_be(&self, key: &str, expected: &str) -> Result<()> {
        match self.required::<String>(key)? {
            found if found == expected => Ok(()),
            found => Err(self.wrong(key, format!("is \"{found}\", not \"{expected}\""))),
        }
    }

    /// One id or a list of them; none where the key is missing.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        if self.map.get(key).is_some_and(Value::is_array) {
            self.required(key)
        } else {
            Ok(self.optional(key)?.into_iter().collect())
        }
    }
}

/// The seven products of a layer, in the order in which they are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// Hidden to queries.
    Q,
    /// Hidden to keys.
    K,
    /// Hidden to values.
    V,
    /// Attended values back to hidden.
    O,
    /// Hidden to the MLP's gate.
    Gate,
    /// Hidden to the MLP's inner values.
    Up,
    /// The MLP's inner values back to hidden.
    Down,
}

impl Module {
    /// All seven.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Its last name in checkpoints: `q_proj`.
    pub fn name(self) -> &'static str {
        self.path().1
    }

    /// Its name within a layer: `("self_attn", "q_proj")`.
    pub(crate) fn path(self) -> (&'static str, &'static str) {
        match self {
            Self::Q => ("self_attn", "q_proj"),
            Self::K => ("self_attn", "k_proj"),
            Self::V => ("self_attn", "v_proj"),
            Self::O => ("self_attn", "o_proj"),
            Self::Gate => ("mlp", "gate_proj"),
            Self::Up => ("mlp", "up_proj"),
            Self::Down => ("mlp", "down_proj"),
        }
    }

    /// `[out, in]`: features it gives, features it takes.
    pub fn shape(self, config: &Config) -> [usize; 2] {
        let hidden = config.hidden_size;
        match self {
            Self::Q => [config.heads * config.head_dim, hidden],
            Self::K | Self::V => [config.kv_heads * config.head_dim, hidden],
            Self::O => [hidden, config.heads * config.head_dim],
            Self::Gate | Self::Up => [config.intermediate_size, hidden],
            Self::Down => [hidden, config.intermediate_size],
        }
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of the seven.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")]
pub struct UnknownModule(pub String);

impl FromStr for Module {
    type Err = UnknownModule;

    fn from_str(name: &str) -> Result<Self, UnknownModule> {
        let found = Self::ALL.into_iter().find(|module| module.name() == name);
        found.ok_or_else(|| UnknownModule(name.into()))
    }
}
