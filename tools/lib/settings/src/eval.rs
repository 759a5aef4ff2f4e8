//! `config/eval.yaml`: how replies are generated, judged and compared.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{LmHead, Quantization, TextChoice};

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSettings {
    /// How replies are generated.
    pub generation: Generation,
    /// Who compares them.
    pub judge: Judge,
    /// How figures are compared.
    pub statistics: Statistics,
}

/// How replies are generated. What is not set is as the adapter was trained,
/// by the `train.yaml` beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generation {
    /// The base model: a folder in Hugging Face layout, or a name on the hub.
    pub model: Option<String>,
    /// How its layers' weights are held.
    pub quantization: Option<Quantization>,
    /// How its output projection is held.
    pub lm_head: Option<LmHead>,
    /// Which text of a pair.
    pub text: Option<TextChoice>,
    /// Put before every conversation; empty for none.
    pub system_prompt: Option<String>,
    /// The user's turn, a Jinja template over the record's fields.
    pub prompt_template: Option<String>,
    /// Longest reply, in tokens.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f64,
    /// Sampling keeps the likeliest tokens that make up this much probability.
    pub top_p: f64,
    /// Sampling keeps so many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Replies generated side by side.
    pub batch_size: usize,
    /// Decides what is sampled, and which rows are shown as examples.
    pub seed: u64,
    /// One more system.
    pub prompted: Prompted,
}

/// The system `prompted`: the base with a prompt that shows, and may say, what is wanted.
/// It is what training has to beat to be worth it. There is none without either.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prompted {
    /// Rows that were trained on, put before the question as turns of the conversation.
    pub examples: usize,
    /// In place of the other systems' system prompt; null: theirs.
    pub system_prompt: Option<String>,
}

impl Default for Prompted {
    fn default() -> Self {
        Self {
            examples: 8,
            system_prompt: None,
        }
    }
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            model: None,
            quantization: None,
            lm_head: None,
            text: None,
            system_prompt: None,
            prompt_template: None,
            max_new_tokens: 96,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            batch_size: 16,
            seed: 42,
            prompted: Prompted::default(),
        }
    }
}

/// Who compares the replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum JudgeProvider {
    /// Claude, asked in both orders (needs ANTHROPIC_API_KEY).
    #[default]
    Anthropic,
    /// Offline: prefers the reply nearer (chrF) to what people liked here than elsewhere.
    Reference,
}

/// The judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Judge {
    /// Who compares.
    pub provider: JudgeProvider,
    /// The systems to compare, as `A:B`; the first gives `verdicts.score`. Empty: the first
    /// two of each item.
    pub compare: Vec<String>,
    /// The model asked.
    pub model: String,
    /// Longest answer, in tokens.
    pub max_tokens: u32,
    /// Requests under way at once.
    pub concurrency: usize,
    /// Requests made at most where one keeps failing.
    pub attempts: u32,
    /// Stops before the estimated cost passes this, in US dollars.
    pub max_cost_usd: f64,
    /// What models cost.
    pub prices: BTreeMap<String, Price>,
    /// When these prices were read.
    pub prices_as_of: String,
}

/// What a model costs, in US dollars for a million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Tokens read. Written to a cache they cost 1.25 times this, read from it 0.1 times.
    pub input: f64,
    /// Tokens written.
    pub output: f64,
}

impl Default for Judge {
    fn default() -> Self {
        let price = |model: &str, input, output| (model.to_owned(), Price { input, output });
        Self {
            provider: JudgeProvider::Anthropic,
            compare: Vec::new(),
            model: "claude-sonnet-5".into(),
            max_tokens: 1024,
            concurrency: 4,
            attempts: 6,
            max_cost_usd: 5.0,
            prices: [
                price("claude-haiku-4-5", 1.0, 5.0),
                price("claude-opus-5", 5.0, 25.0),
                price("claude-opus-5-5", 4.0, 20.0),
                price("claude-sonnet-5", 2.0, 10.0),
                price("claude-sonnet-5-5", 2.0, 10.0),
            ]
            .into(),
            prices_as_of: "2026-11".into(),
        }
    }
}

/// How figures are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Statistics {
    /// Intervals cover `1 - alpha`; a test below it is called significant.
    pub alpha: f64,
    /// Resamples of permutation and bootstrap.
    pub resamples: usize,
    /// Decides the resamples.
    pub seed: u64,
}

impl Default for Statistics {
    fn default() -> Self {
        Self {
            alpha: 0.05,
            resamples: 10_000,
            seed: 42,
        }
    }
}
