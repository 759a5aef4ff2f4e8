//! A model folder: what this tool would make of it.

use std::collections::BTreeMap;
use std::path::Path;

use qwen3::{Chat, Checkpoint, Config, GenerationConfig, Weight};
use serde::Serialize;

use super::Problem;

/// What a model is, as far as its files tell.
#[derive(Default, Serialize)]
pub struct Model {
    parameters: Option<u64>,
    layers: Option<usize>,
    hidden: Option<usize>,
    /// Query heads, key and value heads, width of a head.
    heads: Option<[usize; 3]>,
    inner: Option<usize>,
    /// Rows of the embedding table, and whether it serves as lm_head.
    vocabulary: Option<usize>,
    tied: Option<bool>,
    positions: Option<usize>,
    /// Parameters by how they are stored.
    storage: BTreeMap<String, u64>,
    tokens: Option<usize>,
    stop_ids: Vec<u32>,
    stop_tokens: Vec<String>,
    template: bool,
}

impl Model {
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        if let Some(parameters) = self.parameters {
            rows.push(("parameters", parameters.to_string()));
        }
        let storage = self
            .storage
            .iter()
            .map(|(kind, count)| format!("{kind} {count}"));
        rows.push(("stored as", storage.collect::<Vec<_>>().join(", ")));
        if let (Some(layers), Some(hidden), Some(inner)) = (self.layers, self.hidden, self.inner) {
            rows.push((
                "shape",
                format!("{layers} layers, hidden {hidden}, inner {inner}"),
            ));
        }
        if let Some([query, kv, width]) = self.heads {
            rows.push((
                "heads",
                format!("{query} query, {kv} key and value, of {width}"),
            ));
        }
        if let (Some(vocabulary), Some(tied)) = (self.vocabulary, self.tied) {
            let tokens = self
                .tokens
                .map(|n| format!(", {n} of them tokens"))
                .unwrap_or_default();
            let head = if tied {
                "tied to lm_head"
            } else {
                "lm_head apart"
            };
            rows.push(("embeddings", format!("{vocabulary} rows{tokens}, {head}")));
        }
        if let Some(positions) = self.positions {
            rows.push(("positions", positions.to_string()));
        }
        let stops = self.stop_ids.iter().zip(&self.stop_tokens);
        let stops = stops
            .map(|(id, token)| format!("{id} {token}"))
            .collect::<Vec<_>>();
        rows.push(("stops at", stops.join(", ")));
        rows.push((
            "chat template",
            if self.template { "there" } else { "none" }.into(),
        ));
        rows
    }
}

/// Looks at the model; every part that can be read is, whatever is wrong elsewhere.
pub fn inspect(folder: &Path, problems: &mut Vec<Problem>) -> Model {
    let mut model = Model::default();
    let mut say = |error: &qwen3::Error, effect: &str| {
        let text = with_sources(error);
        let start = format!("{}/", folder.display());
        let text = text.strip_prefix(&start).unwrap_or(&text);
        let (file, cause) = text.split_once(": ").unwrap_or((".", text));
        let (file, cause) = (file.to_owned(), cause.to_owned());
        problems.push(Problem {
            file,
            cause,
            effect: effect.into(),
        });
    };
    let not_used = "this tool does not load it";
    let config = Config::load(folder)
        .map_err(|error| say(&error, not_used))
        .ok();
    if let Some(config) = &config {
        model.layers = Some(config.layers);
        model.hidden = Some(config.hidden_size);
        model.heads = Some([config.heads, config.kv_heads, config.head_dim]);
        model.inner = Some(config.intermediate_size);
        model.vocabulary = Some(config.vocab_size);
        model.tied = Some(config.tied);
        model.positions = Some(config.max_positions);
        match stored(folder) {
            Ok(storage) => {
                model.parameters = Some(storage.values().sum());
                model.storage = storage;
            }
            Err(error) => say(&error, not_used),
        }
    }
    let no_chat = "this tool neither trains nor generates with it";
    let generation = GenerationConfig::load(folder)
        .map_err(|error| say(&error, no_chat))
        .ok();
    let chat = Chat::load(folder)
        .map_err(|error| say(&error, no_chat))
        .ok();
    if let Some(generation) = &generation {
        model.stop_ids.clone_from(&generation.stop_ids);
    }
    if let Some(chat) = &chat {
        model.tokens = Some(chat.tokens());
        model.template = true;
        let token = |&id: &u32| chat.token(id).unwrap_or_else(|| "no token".into());
        model.stop_tokens = model.stop_ids.iter().map(token).collect();
    } else {
        model.stop_tokens = model.stop_ids.iter().map(|_| "unknown".into()).collect();
    }
    if let (Some(chat), Some(generation), Some(config)) = (&chat, &generation, &config)
        && let Err(error) = chat.check(config, generation)
    {
        say(&error, no_chat);
    }
    model
}

/// Parameters by how they are stored, of a checkpoint that is whole.
fn stored(folder: &Path) -> Result<BTreeMap<String, u64>, qwen3::Error> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut storage = BTreeMap::new();
    for weight in Weight::all(checkpoint.config()) {
        let count = weight.shape(checkpoint.config()).iter().product::<usize>() as u64;
        *storage.entry(checkpoint.storage(weight)?).or_default() += count;
    }
    Ok(storage)
}

/// An error and what caused it, in a line.
fn with_sources(error: &qwen3::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
