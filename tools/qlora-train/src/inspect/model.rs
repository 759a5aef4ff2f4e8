//! A model folder: what this tool would make of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use cli::App;
use qwen3::{Chat, Checkpoint, Config, Weight};
use serde::Serialize;
use serde_json::Value;

use super::{Problem, with_sources};

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
pub fn inspect(app: &App, folder: &Path, problems: &mut Vec<Problem>) -> Model {
    let mut model = Model::default();
    let mut say = |error: &qwen3::Error, effect: &str| {
        let text = with_sources(error);
        let start = format!("{}/", folder.display());
        let text = text.strip_prefix(&start).unwrap_or(&text);
        let (file, cause) = text.split_once(": ").unwrap_or((".", text));
        let (file, cause) = (file.to_owned(), cause.to_owned());
        // Several look into config.json.
        if (problems.iter()).any(|told| (&told.file, &told.cause) == (&file, &cause)) {
            return;
        }
        problems.push(Problem {
            file,
            cause,
            effect: effect.into(),
        });
    };
    let not_used = "this tool does not load it";
    let mut damaged = Vec::new();
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
        match Checkpoint::open(folder).and_then(|found| Ok((stored(&found)?, found))) {
            Ok((storage, found)) => {
                model.parameters = Some(storage.values().sum());
                model.storage = storage;
                let (no_numbers, unread) = no_numbers(app, &found);
                damaged = no_numbers;
                if let Some(error) = unread {
                    say(&error, not_used);
                }
            }
            Err(error) => say(&error, not_used),
        }
    }
    let no_chat = "this tool neither trains nor generates with it";
    let stop_ids = qwen3::stop_ids(folder)
        .map_err(|error| say(&error, no_chat))
        .ok();
    let chat = Chat::load(folder)
        .map_err(|error| say(&error, no_chat))
        .ok();
    if let Some(stop_ids) = &stop_ids {
        model.stop_ids.clone_from(stop_ids);
    }
    if let Some(chat) = &chat {
        model.tokens = Some(chat.tokens());
        model.template = true;
        let token = |&id: &u32| chat.token(id).unwrap_or_else(|| "no token".into());
        model.stop_tokens = model.stop_ids.iter().map(token).collect();
    } else {
        model.stop_tokens = model.stop_ids.iter().map(|_| "unknown".into()).collect();
    }
    if let (Some(chat), Some(stop_ids), Some(config)) = (&chat, &stop_ids, &config)
        && let Err(error) = chat.check(config, stop_ids)
    {
        say(&error, no_chat);
    }
    if let Some(first) = damaged.first() {
        let others = match damaged.len() {
            1 => String::new(),
            count => format!(" and {} more weights hold", count - 1),
        };
        let verb = if others.is_empty() { " holds" } else { "" };
        problems.push(Problem {
            file: shard_of(folder, first),
            cause: format!(
                "{first}{verb}{others} values that are no numbers, or too large for bfloat16"
            ),
            effect:
                "every loss and every reply is none either: fetch the model again, or take another"
                    .into(),
        });
    }
    model
}

/// The names of the weights that hold NaN, an infinity, or what bfloat16 makes one of;
/// and what is wrong with the first that cannot be read.
fn no_numbers(app: &App, checkpoint: &Checkpoint) -> (Vec<String>, Option<qwen3::Error>) {
    const ROWS: usize = 256;
    let weights = Weight::all(checkpoint.config());
    let is_damaged = |weight: Weight, buffer: &mut Vec<f32>| {
        let values = checkpoint.values(weight)?;
        let [rows, _] = values.shape();
        Ok((0..rows).step_by(ROWS).any(|from| {
            values.read(from..rows.min(from + ROWS), buffer);
            let is_number = |&value: &f32| half::bf16::from_f32(value).is_finite();
            !buffer.iter().all(is_number)
        }))
    };
    let progress = app.progress("reading weights", Some(weights.len() as u64));
    let threads = match app.common().threads {
        Some(given) => given.into(),
        None => thread::available_parallelism().map_or(1, |threads| threads.get()),
    };
    let (next, (found, told)) = (AtomicUsize::new(0), mpsc::channel());
    let (mut damaged, mut unread) = (Vec::new(), None);
    thread::scope(|scope| {
        for _ in 0..threads {
            let (found, weights, next, is_damaged) = (found.clone(), &weights, &next, &is_damaged);
            scope.spawn(move || {
                let mut buffer = Vec::new();
                while let Some(&weight) = weights.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if found
                        .send((weight, is_damaged(weight, &mut buffer)))
                        .is_err()
                    {
                        break;
                    }
                }
            });
        }
        drop(found);
        for (weight, is_damaged) in told {
            match is_damaged {
                Ok(true) => damaged.push(weight.name()),
                Ok(false) => {}
                Err(error) => unread = unread.take().or(Some(error)),
            }
            progress.add(1);
        }
    });
    damaged.sort();
    (damaged, unread)
}

/// The file that a weight is in.
fn shard_of(folder: &Path, weight: &str) -> String {
    let index = std::fs::read(folder.join("model.safetensors.index.json"));
    let index = index
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok());
    let name = |index: Value| Some(index["weight_map"][weight].as_str()?.to_owned());
    index
        .and_then(name)
        .unwrap_or_else(|| "model.safetensors".into())
}

/// Parameters by how they are stored.
fn stored(checkpoint: &Checkpoint) -> Result<BTreeMap<String, u64>, qwen3::Error> {
    let mut storage = BTreeMap::new();
    for weight in Weight::all(checkpoint.config()) {
        let count = weight.shape(checkpoint.config()).iter().product::<usize>() as u64;
        *storage.entry(checkpoint.storage(weight)?).or_default() += count;
    }
    Ok(storage)
}
