//! From a seed to a model folder in Hugging Face's layout.
//!
//! Nothing here is meant to be clever: f32, AdamW written out, a thread to each
//! half of a batch. Same seed, same bytes on one machine; another processor rounds
//! its products in another order, so the committed files are known by their hash
//! and not by being made again.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::autograd::{Batch, Config, Model};
use crate::corpus::Document;
use crate::random::Random;
use crate::vocabulary::{self, CHAT_TEMPLATE};

/// Rows of a step.
const ROWS: usize = 48;
/// A step's rows are computed in so many parts side by side.
const SHARDS: usize = 2;
const PEAK_RATE: f64 = 3e-3;
const WARM_UP: usize = 30;
const WEIGHT_DECAY: f64 = 0.05;
const CLIP: f64 = 1.0;

/// The tiny model: 1.26 M parameters, three query heads to a key head, and heads
/// that together are wider than the stream.
pub fn config() -> Config {
    Config {
        vocab_size: vocabulary::SIZE,
        hidden_size: 128,
        intermediate_size: 384,
        num_hidden_layers: 5,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 32,
        rms_norm_eps: 1e-6,
        rope_theta: 1_000_000.0,
        tie_word_embeddings: true,
    }
}

/// Trains tokenizer and model on the documents and returns every file of the
/// model folder by name, `SHA256SUMS` among them. `progress` gets the step and
/// its loss.
pub fn run(
    documents: &[Document],
    steps: usize,
    seed: u64,
    progress: impl FnMut(usize, f64),
) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let tokenizer = vocabulary::train(documents)?;
    let rows = encode(documents, &vocabulary::load(&tokenizer)?)?;
    let model = Model::random(config(), 0.05, DType::F32, seed)?;
    let model = fit(model, &rows, steps, seed, progress)?;

    let mut files = BTreeMap::from([
        ("config.json", pretty(&model_config())?),
        ("generation_config.json", pretty(&generation_config())?),
        ("tokenizer.json", pretty(&tokenizer)?),
        ("tokenizer_config.json", pretty(&vocabulary::config())?),
        ("chat_template.jinja", CHAT_TEMPLATE.into()),
        ("model.safetensors", weights(&model)?),
    ]);
    let mut sums = String::new();
    for (name, bytes) in &files {
        for byte in Sha256::digest(bytes) {
            write!(sums, "{byte:02x}")?;
        }
        writeln!(sums, "  {name}")?;
    }
    files.insert("SHA256SUMS", sums.into());
    Ok(files)
}

/// Writes a file and renames it into place, with its folder if need be.
pub fn save(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(&part, bytes))
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| path.display().to_string())
}

/// A document as tokens, and how many at its head carry no loss.
struct Row {
    ids: Vec<u32>,
    prompt: usize,
}

/// Chats as the template renders them with an empty think block; of those only
/// the answer and its end are learnt, as in fine-tuning.
fn encode(documents: &[Document], tokenizer: &Tokenizer) -> Result<Vec<Row>> {
    let encode = |text: &str| -> Result<Vec<u32>> {
        let encoding = tokenizer
            .encode(text, false)
            .map_err(|error| anyhow!("tokenizing: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    };
    documents
        .iter()
        .map(|document| {
            let (prompt, text) = match document {
                Document::Chat { tweet, reply } => (
                    format!(
                        "<|im_start|>user\n{tweet}<|im_end|>\n<|im_start|>assistant\n\
                         <think>\n\n</think>\n\n"
                    ),
                    format!("{reply}<|im_end|>"),
                ),
                Document::Plain(text) => (String::new(), format!("{text}<|endoftext|>")),
            };
            let mut ids = encode(&prompt)?;
            let prompt = ids.len();
            ids.extend(encode(&text)?);
            Ok(Row { ids, prompt })
        })
        .collect()
}

/// Rows in batches of like length, so that little is padded and attention, whose
/// cost grows with the window's square, stays cheap.
struct Rows<'a> {
    rows: &'a [Row],
    batches: Vec<Vec<usize>>,
    random: Random,
}

impl Rows<'_> {
    /// The next batch, in shards that are always the same.
    fn batch(&mut self) -> Vec<Batch> {
        if self.batches.is_empty() {
            self.epoch();
        }
        let rows = self.batches.pop().unwrap_or_default();
        let shards = rows.chunks(ROWS / SHARDS);
        shards.map(|shard| self.shard(shard)).collect()
    }

    fn shard(&self, rows: &[usize]) -> Batch {
        let window = rows.iter().map(|&at| self.rows[at].ids.len()).max();
        let mut batch = Batch {
            window: window.unwrap_or_default(),
            ..Batch::default()
        };
        let padding = vocabulary::id("<|endoftext|>");
        for Row { ids, prompt } in rows.iter().map(|&at| &self.rows[at]) {
            let labelled: Vec<bool> = (0..ids.len()).map(|at| at >= *prompt).collect();
            batch.push(ids, &labelled);
            let rest = batch.window - ids.len();
            if rest > 0 {
                batch.push(&vec![padding; rest], &vec![false; rest]);
            }
        }
        batch
    }

    fn epoch(&mut self) {
        let mut order: Vec<_> = (0..self.rows.len()).collect();
        self.random.shuffle(&mut order);
        for pool in order.chunks_mut(ROWS * 16) {
            pool.sort_by_key(|&at| self.rows[at].ids.len());
            self.batches.extend(pool.chunks(ROWS).map(<[_]>::to_vec));
        }
        self.random.shuffle(&mut self.batches);
    }
}

/// The token mean of the loss over all shards, and its gradients. A thread to a
/// shard, the sum in their order: the same for any number of cores.
fn gradients(model: &Model, shards: &[Batch]) -> Result<(f64, BTreeMap<String, Vec<f32>>)> {
    let parts = thread::scope(|scope| {
        let work: Vec<_> = shards
            .iter()
            .map(|shard| scope.spawn(|| model.weight_gradients(shard, None)))
            .collect();
        work.into_iter()
            .map(|part| part.join().map_err(|_| anyhow!("a shard panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let labelled: usize = shards.iter().map(Batch::labelled).sum();
    let (mut mean, mut sum) = (0.0, BTreeMap::<String, Vec<f32>>::new());
    for (shard, (loss, gradients)) in shards.iter().zip(parts) {
        let share = shard.labelled() as f64 / labelled as f64;
        mean += share * loss;
        for (name, gradient) in gradients {
            let gradient: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
            let total = sum.entry(name).or_insert_with(|| vec![0.0; gradient.len()]);
            for (total, g) in total.iter_mut().zip(gradient) {
                *total += share as f32 * g;
            }
        }
    }
    Ok((mean, sum))
}

/// AdamW with a linear warm-up and a cosine to a tenth of the peak.
fn fit(
    mut model: Model,
    rows: &[Row],
    steps: usize,
    seed: u64,
    mut progress: impl FnMut(usize, f64),
) -> Result<Model> {
    const BETAS: (f64, f64) = (0.9, 0.98);
    const EPS: f64 = 1e-8;
    let mut rows = Rows {
        rows,
        batches: Vec::new(),
        random: Random::new(seed),
    };
    let mut moments: HashMap<String, (Vec<f32>, Vec<f32>)> = HashMap::new();
    for step in 1..=steps {
        let (loss, gradients) = gradients(&model, &rows.batch())?;
        progress(step, loss);
        let square: f64 = gradients
            .values()
            .flatten()
            .map(|&g| f64::from(g).powi(2))
            .sum();
        let clip = (CLIP / (square.sqrt() + 1e-6)).min(1.0) as f32;

        let warm = (step as f64 / WARM_UP as f64).min(1.0);
        let turn = std::f64::consts::PI * step as f64 / steps as f64;
        let rate = PEAK_RATE * warm * (0.55 + 0.45 * turn.cos());
        let correct = (
            1.0 - BETAS.0.powi(step as i32),
            1.0 - BETAS.1.powi(step as i32),
        );
        for (name, gradient) in gradients {
            let weight = &model.weights[&name];
            let shape = weight.dims().to_vec();
            let decay = if shape.len() == 1 { 0.0 } else { WEIGHT_DECAY };
            let mut values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
            let (first, second) = moments
                .entry(name.clone())
                .or_insert_with(|| (vec![0.0; values.len()], vec![0.0; values.len()]));
            for (((w, g), m), v) in values.iter_mut().zip(&gradient).zip(first).zip(second) {
                let g = g * clip;
                *m += (g - *m) * (1.0 - BETAS.0) as f32;
                *v += (g * g - *v) * (1.0 - BETAS.1) as f32;
                let (m, v) = (f64::from(*m) / correct.0, f64::from(*v) / correct.1);
                let update = m / (v.sqrt() + EPS) + decay * f64::from(*w);
                *w -= (rate * update) as f32;
            }
            model
                .weights
                .insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
    }
    Ok(model)
}

/// `config.json` with the key set of the published models.
fn model_config() -> Value {
    let config = config();
    json!({
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary::id("<|endoftext|>"),
        "eos_token_id": vocabulary::id("<|im_end|>"),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 1024,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": null,
        "rope_theta": config.rope_theta as u64,
        "sliding_window": null,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": config.vocab_size
    })
}

fn generation_config() -> Value {
    let (end, text_end) = (
        vocabulary::id("<|im_end|>"),
        vocabulary::id("<|endoftext|>"),
    );
    json!({
        "bos_token_id": text_end,
        "do_sample": true,
        "eos_token_id": [end, text_end],
        "pad_token_id": text_end,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0"
    })
}

/// `model.safetensors` in bf16.
fn weights(model: &Model) -> Result<Vec<u8>> {
    let tensors = model
        .weights
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::BF16)?)))
        .collect::<Result<Vec<_>>>()?;
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(tensors, Some(format))?)
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(text)
}
