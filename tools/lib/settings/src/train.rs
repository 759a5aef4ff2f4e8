//! `config/train.yaml`: the base model, the adapter and how it is trained.

use std::fmt;
use std::marker::PhantomData;

use clap::ValueEnum;
use indexmap::IndexMap;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::TextChoice;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSettings {
    /// The base model.
    pub model: Model,
    /// The adapter.
    pub lora: Lora,
    /// The run.
    pub training: Training,
    /// What of the data is used, and how it is put to the model.
    pub data: TrainData,
}

/// How the frozen weights of the layers are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 4-bit NormalFloat in blocks of 64, the scales quantised again.
    #[default]
    Nf4,
    /// As they are in the checkpoint.
    None,
}

/// How the frozen output projection, lm_head, is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LmHead {
    /// As it is in the checkpoint.
    #[default]
    AsStored,
    /// 4-bit NormalFloat in blocks of 64, the scales quantised again. Embeddings that it is
    /// tied to stay as they are.
    Nf4,
}

/// The base model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// Folder in Hugging Face layout, or a name on the hub.
    pub path: String,
    /// How the layers' weights are held.
    pub quantization: Quantization,
    /// How the output projection is held.
    pub lm_head: LmHead,
    /// Folder where the weights in 4 bits are kept for the next run; empty: nowhere.
    pub cache: String,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            path: "data/cache/models/Qwen3-8B".into(),
            quantization: Quantization::Nf4,
            lm_head: LmHead::AsStored,
            cache: "data/cache/quantized".into(),
        }
    }
}

/// A section, and no list of its values, which serde takes for one.
fn section<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Keys<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Keys<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(Keys(PhantomData))
}

impl<'de> Deserialize<'de> for Model {
    /// Besides our own keys this reads the ones of the Python stacks:
    /// `load_in_4bit` and `bnb_4bit_*`, beside `path` or in a map under
    /// `quantization`. What they ask for and we do not have is refused.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields, default)]
        struct BitsAndBytes {
            load_in_4bit: Option<bool>,
            bnb_4bit_quant_type: Option<String>,
            bnb_4bit_use_double_quant: Option<bool>,
            bnb_4bit_compute_dtype: Option<String>,
            bnb_4bit_quant_storage: Option<String>,
        }
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "it must be `nf4` or `none`, or a section of known keys such as `load_in_4bit: true`"
        )]
        enum AnyQuantization {
            Name(Quantization),
            Map(#[serde(deserialize_with = "section")] BitsAndBytes),
        }
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields, default)]
        struct Keys {
            path: Option<String>,
            cache: Option<String>,
            quantization: Option<AnyQuantization>,
            lm_head: Option<LmHead>,
            load_in_4bit: Option<bool>,
            bnb_4bit_quant_type: Option<String>,
            bnb_4bit_use_double_quant: Option<bool>,
            bnb_4bit_compute_dtype: Option<String>,
            bnb_4bit_quant_storage: Option<String>,
        }
        let refuse = |what: String| Err(serde::de::Error::custom(what));
        let keys = Keys::deserialize(deserializer)?;
        let mut load_in_4bit = keys.load_in_4bit;
        let mut maps = vec![BitsAndBytes {
            load_in_4bit: None,
            bnb_4bit_quant_type: keys.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant: keys.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype: keys.bnb_4bit_compute_dtype,
            bnb_4bit_quant_storage: keys.bnb_4bit_quant_storage,
        }];
        let mut named = None;
        match keys.quantization {
            Some(AnyQuantization::Name(name)) => named = Some(name),
            Some(AnyQuantization::Map(map)) => {
                load_in_4bit = load_in_4bit.or(map.load_in_4bit);
                maps.push(map);
            }
            None => {}
        }
        for map in maps {
            if let Some(kind) = map.bnb_4bit_quant_type.filter(|kind| kind != "nf4") {
                return refuse(format!(
                    "bnb_4bit_quant_type: {kind} is not supported; nf4 is"
                ));
            }
            if map.bnb_4bit_use_double_quant == Some(false) {
                return refuse("bnb_4bit_use_double_quant: false is not supported: nf4 here always quantises its scales again".into());
            }
            if let Some(dtype) = map.bnb_4bit_compute_dtype
                && !["bfloat16", "bf16", "float32", "torch.bfloat16"].contains(&dtype.as_str())
            {
                return refuse(format!(
                    "bnb_4bit_compute_dtype: {dtype} is not supported; bfloat16 is (the CPU computes in float32)"
                ));
            }
            if let Some(storage) = map.bnb_4bit_quant_storage.filter(|s| s != "uint8") {
                return refuse(format!(
                    "bnb_4bit_quant_storage: {storage} is not supported; uint8 is"
                ));
            }
        }
        let asked = load_in_4bit.map(|four| {
            if four {
                Quantization::Nf4
            } else {
                Quantization::None
            }
        });
        let quantization = match (named, asked) {
            (Some(name), Some(asked)) if name != asked => {
                return refuse("`quantization` and `load_in_4bit` contradict each other".into());
            }
            (named, asked) => named.or(asked).unwrap_or_default(),
        };
        Ok(Self {
            path: keys.path.unwrap_or_else(|| Self::default().path),
            cache: keys.cache.unwrap_or_else(|| Self::default().cache),
            quantization,
            lm_head: keys.lm_head.unwrap_or_default(),
        })
    }
}

/// Which linear layers get an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "it must be a list of names, such as [q_proj, v_proj], or one text: all-linear, or a regular expression"
)]
pub enum TargetModules {
    /// `all-linear`: every projection of every layer; else a regular expression
    /// that a module's whole name matches, such as `model.layers.0.mlp.up_proj`.
    Named(String),
    /// Names such as `q_proj`.
    List(Vec<String>),
}

/// The adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Inner dimension.
    #[serde(alias = "r")]
    pub rank: usize,
    /// The product of the adapter is scaled by `alpha / rank`.
    #[serde(alias = "lora_alpha")]
    pub alpha: f64,
    /// Scale by `alpha / √rank` instead (rsLoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Learning rate of the B factors over that of the A factors (LoRA+, arXiv
    /// 2402.12354); 1 trains both alike.
    #[serde(alias = "loraplus_lr_ratio")]
    pub lr_ratio: f64,
    /// Part of the adapter's inputs set to zero in training, 0 to below 1.
    #[serde(alias = "lora_dropout")]
    pub dropout: f64,
    /// Which linear layers get one.
    pub target_modules: TargetModules,
    /// Learn each weight's direction and its rows' lengths apart (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// Ranks of modules whose names end as a key does, or match it as a regular
    /// expression; the first that fits holds.
    pub rank_pattern: IndexMap<String, usize>,
    /// The same for alpha.
    pub alpha_pattern: IndexMap<String, f64>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            use_rslora: false,
            lr_ratio: 1.0,
            dropout: 0.05,
            target_modules: TargetModules::List(
                [
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                ]
                .map(String::from)
                .into(),
            ),
            use_dora: false,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
        }
    }
}

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// Half a cosine down to 0.
    #[default]
    Cosine,
    /// A straight line down to 0.
    Linear,
    /// Stays.
    Constant,
}

/// How AdamW keeps its moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optim {
    /// As 32-bit floats.
    #[default]
    #[serde(rename = "adamw", alias = "adamw_torch", alias = "adamw_torch_fused")]
    AdamW,
    /// In 8 bits, by blocks of 256 with a scale each (arXiv 2110.02861).
    #[serde(
        rename = "adamw_8bit",
        alias = "adamw_bnb_8bit",
        alias = "paged_adamw_8bit"
    )]
    AdamW8bit,
}

/// The run. An optimiser step is exactly `batch_size ×
/// gradient_accumulation_steps` rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// Passes over the training rows.
    #[serde(alias = "num_train_epochs")]
    pub num_epochs: f64,
    /// Optimiser steps; given, it overrides `num_epochs`.
    pub max_steps: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Rows of a micro-batch.
    #[serde(alias = "per_device_train_batch_size")]
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// How the optimiser keeps its moments.
    pub optim: Optim,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps in which the learning rate climbs from 0.
    pub warmup_steps: u64,
    /// The same as a part of all steps, rounded up; given, it overrides `warmup_steps`.
    pub warmup_ratio: Option<f64>,
    /// How it goes afterwards.
    #[serde(alias = "lr_scheduler_type")]
    pub lr_scheduler: Scheduler,
    /// Gradients are scaled down to this global norm; 0: never.
    pub max_grad_norm: f64,
    /// Uniform noise on the embeddings in training, scaled by this over the root of
    /// a row's length times the width (NEFTune, arXiv 2310.05914).
    pub neftune_noise_alpha: Option<f64>,
    /// A step whose loss or gradient norm is so many deviations above the median of
    /// the steps before is a spike, of which is warned. After 20 of the loss in a row the
    /// run stops, saved, unless the loss is falling or below what it began with. 0 watches
    /// for none.
    pub spike_factor: f64,
    /// Memory of the device that the run may take, such as `8GB`; none: what is free.
    #[serde(deserialize_with = "size")]
    pub max_memory: Option<String>,
    /// Longest row, in tokens.
    pub max_seq_length: usize,
    /// What to do with a longer one.
    pub long_rows: LongRows,
    /// A checkpoint every so many steps; 0 saves at the end only.
    pub save_steps: u64,
    /// Checkpoints kept, the newest; 0 keeps all.
    pub save_total_limit: usize,
    /// An evaluation every so many steps, beside those before the first and after the
    /// last; 0: these two alone.
    pub eval_steps: u64,
    /// Stop after so many evaluations in a row without a better held-out loss; 0 never does.
    pub early_stopping_patience: u64,
    /// Finish with the adapter of the best held-out loss instead of the last; that before
    /// the first step is no candidate.
    pub load_best_model_at_end: bool,
    /// Decides the initial adapter, the order of rows and dropout.
    pub seed: u64,
    /// Several rows in one pass; off, each row is a pass of its own.
    pub packing: bool,
    /// Another order of rows in each epoch.
    pub shuffle: bool,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            num_epochs: 2.0,
            max_steps: None,
            learning_rate: 2e-4,
            batch_size: 4,
            gradient_accumulation_steps: 4,
            optim: Optim::AdamW,
            weight_decay: 0.01,
            warmup_steps: 20,
            warmup_ratio: None,
            lr_scheduler: Scheduler::Cosine,
            max_grad_norm: 1.0,
            neftune_noise_alpha: None,
            spike_factor: 10.0,
            max_memory: None,
            max_seq_length: 512,
            long_rows: LongRows::Refuse,
            save_steps: 50,
            save_total_limit: 3,
            eval_steps: 50,
            early_stopping_patience: 0,
            load_best_model_at_end: false,
            seed: 42,
            packing: true,
            shuffle: true,
        }
    }
}

/// A size as text: of a number alone nobody can say what it counts.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "it must be a size such as 8GB or 8GiB")]
    enum Size {
        Text(String),
        Number(f64),
    }
    match Option::deserialize(deserializer)? {
        None => Ok(None),
        Some(Size::Text(text)) => Ok(Some(text)),
        Some(Size::Number(n)) => {
            // A large one can only be bytes.
            let remedy = match n < 1e6 {
                true => format!("{n}GB, or {n}GiB"),
                false => format!("{n}B for bytes"),
            };
            Err(serde::de::Error::custom(format!(
                "{n} has no unit; write {remedy}"
            )))
        }
    }
}

/// What to do with a row that is longer than `max_seq_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LongRows {
    /// Stop, naming the row.
    #[default]
    Refuse,
    /// Cut its end off; how many were cut is said.
    Truncate,
    /// Leave it out; how many were left out is said.
    Skip,
}

/// Which tokens are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// Those of the assistant's turns, and the end of each turn.
    #[default]
    Reply,
    /// All, the prompt's too.
    All,
}

/// What of the data is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainData {
    /// Which text of a pair.
    pub text: TextChoice,
    /// Put before every conversation of a pair; empty for none.
    pub system_prompt: String,
    /// The user's turn of a pair, a Jinja template over the record's fields.
    pub prompt_template: String,
    /// Which tokens are learnt.
    pub loss_on: LossOn,
    /// For rows without `split`: the part that is held out, 0 to 1.
    pub eval_fraction: f64,
    /// A control: each training tweet gets another one's reply. An adapter
    /// trained so can learn how replies sound, not what they answer.
    pub shuffled_replies: bool,
}

impl Default for TrainData {
    fn default() -> Self {
        Self {
            text: TextChoice::default(),
            system_prompt: String::new(),
            prompt_template: "{{ tweet }}".into(),
            loss_on: LossOn::default(),
            eval_fraction: 0.0,
            shuffled_replies: false,
        }
    }
}
