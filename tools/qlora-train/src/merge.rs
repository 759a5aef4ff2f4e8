//! `qlora-train merge`: the adapter into the base, as a model of its own.
//!
//! Merging rounds: what the adapter adds to a weight may be smaller than half a
//! step of bfloat16 there. So the merged model is read back and its logits are
//! compared with those of base and adapter apart, and with those of the 4-bit
//! base that the adapter was most likely trained on.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use cli::{App, Failure, Signature};
use engine::Cpu;
use jsonl::Output;
use qwen3::{Adapter, Chat, Checkpoint, Merged, Message, Model, OwnedLora, Storage, Weight};
use serde::Serialize;

use crate::commands::Messages;
use crate::gguf::{self, GgufType};

/// Merge an adapter into its base
///
/// Writes a model that needs no adapter: bfloat16 safetensors with the base's
/// tokenizer and settings (--out), one GGUF file for llama.cpp and Ollama
/// (--gguf), or both. Works a few rows at a time. Then compares the logits of
/// base + adapter with the merged model's in --out on a few prompts, which needs
/// memory for the whole base, and writes the result to standard output as JSON. A
/// GGUF file is not read back: --gguf alone is not compared.
#[derive(Args)]
#[command(after_long_help = crate::commands::after_help(EXAMPLES, None))]
pub struct Merge {
    /// Base model, a folder or a name on the hub [default: the one named in the adapter]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Folder of the adapter, PEFT format
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Go on where the adapter was trained on a base with other files than --model's
    #[arg(long)]
    any_base: bool,
    /// Folder for the merged model
    #[arg(long, value_name = "DIR", required_unless_present = "gguf")]
    out: Option<PathBuf>,
    /// File for the merged model as GGUF
    #[arg(long, value_name = "FILE")]
    gguf: Option<PathBuf>,
    /// How the GGUF file stores the products
    #[arg(long, value_name = "TYPE", default_value = "bf16", requires = "gguf")]
    gguf_type: GgufType,
    /// Leave out the comparison
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    pub messages: Messages,
}

const EXAMPLES: &str = "
$ qlora-train merge --model model --adapter adapter --out merged
$ qlora-train merge --model model --adapter adapter --gguf replies.gguf
";

/// What the merged model is compared on: ordinary requests, of different length
/// and script, so that no weight is left out by all of them.
const PROMPTS: [&str; 4] = [
    "Anyone else awake at 4 a.m. because of the rain?",
    "Name three birds that can swim, and say which of them dives deepest.",
    "今日はとても寒いですね。",
    "👀 ok but why is the train on time today",
];

/// Two models' logits on the same tokens.
#[derive(Serialize)]
struct Check {
    /// What the merged model is compared with.
    against: &'static str,
    tokens: usize,
    /// The largest difference of two logits.
    max_abs: f64,
    /// The mean difference of two logits.
    mean_abs: f64,
    /// Mean Kullback-Leibler divergence of the next-token distributions, in nats.
    kl: f64,
    /// Share of tokens after which both find the same next token likeliest.
    same_top: f64,
}

impl Check {
    /// Whether all that was compared was numbers.
    fn is_of_numbers(&self) -> bool {
        [self.max_abs, self.mean_abs, self.kl]
            .iter()
            .all(|v| v.is_finite())
    }
}

#[derive(Serialize)]
struct Report<'a> {
    v: u64,
    out: Option<Cow<'a, str>>,
    gguf: Option<Cow<'a, str>>,
    parameters: u64,
    /// Empty where nothing was compared.
    checks: Vec<Check>,
    signature: String,
}

impl Merge {
    pub fn run(&self, app: &App) -> Result<()> {
        for (flag, path) in [("--out", &self.out), ("--gguf", &self.gguf)] {
            if let Some(path) = path.as_ref().filter(|path| path.exists()) {
                let cause = format!("{flag} {} exists; name another", path.display());
                return Err(Failure::Usage(cause).into());
            }
        }
        if let Some(cause) = qwen3::lacks(&self.adapter) {
            let cause = format!("--adapter {}: {cause}", self.adapter.display());
            return Err(Failure::Usage(cause).into());
        }
        let model_path = match &self.model {
            Some(model) => hub::fetch(app, model, "--model")?,
            None => base_of(app, &self.adapter)?,
        };
        let base = Checkpoint::open(&model_path)?;
        let fingerprint = base.fingerprint()?;
        if let Some(was) = crate::folder::trained_on(&self.adapter)?
            && was != fingerprint
        {
            let other = format!(
                "{} was trained on other files than those of the base {} \
                 (SHA-256 {was:.12}, here {fingerprint:.12})",
                self.adapter.display(),
                model_path.display()
            );
            if !self.any_base {
                return Err(Failure::Usage(format!(
                    "{other}: name its base with --model; a 4-bit or merged copy has another \
                     SHA-256 as well: --any-base goes on with it"
                ))
                .into());
            }
            app.warn(other);
        }
        let adapter = Adapter::load(&self.adapter, base.config())?;
        let merged = Merged::new(&base, &adapter);
        let values = |weight: &Weight| weight.shape(base.config()).iter().product::<usize>();
        let parameters: usize = Weight::all(base.config()).iter().map(values).sum();

        if let Some(folder) = &self.out {
            let progress = app.progress("merging values", Some(parameters as u64));
            merged.save(folder, |done| progress.set(done))?;
            drop(progress);
            app.info(format_args!("the merged model is in {}", folder.display()));
        }
        if let Some(file) = &self.gguf {
            let progress = app.progress("writing values to GGUF", Some(parameters as u64));
            let name = self.adapter.file_name().unwrap_or(self.adapter.as_os_str());
            let name = name.to_string_lossy();
            gguf::write(file, merged, &model_path, &name, self.gguf_type, |done| {
                progress.set(done);
            })?;
            drop(progress);
            app.info(format_args!("the GGUF file is {}", file.display()));
        }
        let checks = match &self.out {
            _ if self.no_check => Vec::new(),
            Some(folder) => check(app, &base, &adapter, (folder, self.gguf.as_deref()))?,
            None => {
                app.info(
                    "not compared with base and adapter: nothing here reads a GGUF file; \
                     with --out the merged model that it is made of is compared",
                );
                Vec::new()
            }
        };
        let report = Report {
            v: 1,
            out: self.out.as_deref().map(Path::to_string_lossy),
            gguf: self.gguf.as_deref().map(Path::to_string_lossy),
            parameters: parameters as u64,
            checks,
            signature: Signature::new("qlora-train")
                .with_hash("model", &fingerprint)
                .with_hash("adapter", &adapter.fingerprint())
                .to_string(),
        };
        let mut out = Output::stdout();
        out.json(&report)?;
        Ok(out.finish()?)
    }
}

/// The base that an adapter names, if it is here.
fn base_of(app: &App, adapter: &Path) -> Result<PathBuf> {
    let path = adapter.join("adapter_config.json");
    let config: serde_json::Value =
        serde_json::from_slice(&qwen3::read(&path)?).with_context(|| path.display().to_string())?;
    let named = config["base_model_name_or_path"]
        .as_str()
        .unwrap_or_default();
    let named = hub::named(named, config["revision"].as_str());
    hub::find(app, &named)?.ok_or_else(|| {
        let cause = format!("the adapter's base `{named}` is not here: name it with --model");
        Failure::Usage(cause).into()
    })
}

/// Compares the merged model in `folder` with base and adapter apart, one model
/// in memory at a time. What it finds is true of the GGUF file, made of the same values.
fn check(
    app: &App,
    base: &Checkpoint,
    adapter: &Adapter,
    (folder, gguf): (&Path, Option<&Path>),
) -> Result<Vec<Check>> {
    let chat = Chat::load(base.folder())?;
    let prompt = |text: &&str| chat.encode_prompt(&[Message::user(*text)], &[]);
    let rows: Vec<Vec<u32>> = PROMPTS.iter().map(prompt).collect::<Result<_, _>>()?;
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    app.info("comparing the merged model with base and adapter (--no-check leaves it out)");
    let merged = logits(&Checkpoint::open(folder)?, Storage::AsStored, None, &rows)?;
    let mut against = vec![("base + adapter", Storage::AsStored)];
    if !base.is_quantized() {
        against.push(("base in 4 bits + adapter", Storage::Nf4));
    }
    let mut checks = Vec::new();
    for (against, storage) in against {
        let apart = logits(base, storage, Some(adapter), &rows)?;
        let check = compare(against, &apart, &merged, base.config().vocab_size);
        app.info(format_args!(
            "merged against {against}: logits differ by {:.2e} at most, {:.2e} on average; \
             KL {:.2e} nats; same likeliest token after {:.1}% of {} tokens",
            check.max_abs,
            check.mean_abs,
            check.kl,
            100.0 * check.same_top,
            check.tokens
        ));
        if !check.is_of_numbers() {
            let written = match gguf {
                Some(gguf) => format!("{} and {} are", folder.display(), gguf.display()),
                None => format!("{} is", folder.display()),
            };
            let cause = format!(
                "logits of {against} or of the merged model are no numbers, so {written} not to be used: \
                 `qlora-train inspect` of {} says whether the base is damaged",
                base.folder().display()
            );
            return Err(Failure::World(cause).into());
        }
        checks.push(check);
    }
    Ok(checks)
}

fn logits(
    base: &Checkpoint,
    storage: Storage,
    adapter: Option<&Adapter>,
    rows: &[&[u32]],
) -> Result<Vec<f32>> {
    let model = Model::load(Cpu, base, storage)?;
    let adapter = adapter
        .map(|adapter| model.load_adapter(adapter))
        .transpose()?;
    Ok(model.logits(rows, adapter.as_ref().map(OwnedLora::lora))?)
}

fn compare(against: &'static str, a: &[f32], b: &[f32], vocab: usize) -> Check {
    let tokens = a.len() / vocab;
    let (mut max_abs, mut sum_abs, mut kl, mut same) = (0f64, 0f64, 0f64, 0usize);
    for (a, b) in a.chunks_exact(vocab).zip(b.chunks_exact(vocab)) {
        let (log_a, log_b) = (log_sum_exp(a), log_sum_exp(b));
        for (&a, &b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a), f64::from(b));
            let apart = (a - b).abs();
            // Of NaN and a number, `max` takes the number.
            if apart.is_nan() || apart > max_abs {
                max_abs = apart;
            }
            sum_abs += (a - b).abs();
            kl += (a - log_a).exp() * ((a - log_a) - (b - log_b));
        }
        same += usize::from(top(a) == top(b));
    }
    Check {
        against,
        tokens,
        max_abs,
        mean_abs: sum_abs / a.len() as f64,
        kl: kl / tokens as f64,
        same_top: same as f64 / tokens as f64,
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    f64::from(max) + sum.ln()
}

/// The first of the largest.
fn top(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_agreement() {
        let fine = [0.5, -1.0, 2.0, 0.0];
        let check = compare("", &fine, &fine, 2);
        assert!(check.is_of_numbers() && check.max_abs == 0.0 && check.same_top == 1.0);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let other = [0.5, wrong, 2.0, 0.0];
            for (a, b) in [(fine, other), (other, fine), (other, other)] {
                let check = compare("", &a, &b, 2);
                assert!(!check.is_of_numbers(), "{a:?} {b:?}");
            }
        }
    }
}
