//! Replies of a base model and of its adapters to held-out tweets, with figures:
//! how likely each finds the reply that people liked, and how near its own comes.
//!
//! The likelihood of the reference is the figure to trust: it uses every token of
//! every reference. ROUGE, BLEU and chrF compare one of many good replies with one
//! other and mostly measure luck; they are here because readers expect them.

mod items;
mod scores;
mod systems;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cli::{App, Common, Counts, Failure, Flags, PrintConfig, Resolved, Signature, Tool};
use engine::{Cpu, Sampling};
use jsonl::{AtomicFile, Lines, Output, Position, Records};
use qwen3::{Adapter, Chat, Checkpoint, Finish, GenerationConfig, Model, Storage};
use record::Record;
use serde::Serialize;
use settings::{EvalSettings, Generation, Quantization, TrainSettings};

use crate::items::{Item, Source, Wording};
use crate::scores::{Corpus, CorpusScores, Scores};
use crate::systems::{Decoding, Named, System};

/// Generate replies to held-out tweets and score them
///
/// Reads pairs on standard input, keeps those of `split: eval`, and for the base model
/// and the base with each adapter writes a reply, its ROUGE, BLEU and chrF against
/// the reply that people liked, and that reply's negative log-likelihood (`nll`, per
/// token). A last line has the figures of each system over all pairs. With
/// --score-only nothing is generated: lines {"prediction","reference"} get the scores.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct GenEval {
    /// Folder of the base model, Hugging Face layout [default: the adapter's own]
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// An adapter, PEFT format; DIR alone is called `lora`; may be given again
    #[arg(long = "adapter", value_name = "[NAME=]DIR")]
    adapters: Vec<Named>,
    /// Score lines {"prediction","reference"}; no model is needed
    #[arg(long, conflicts_with_all = ["model", "adapters"])]
    score_only: bool,
    /// Longest reply, in tokens
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample among the likeliest tokens that make up this much probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Sample among so many of the likeliest tokens; 0: all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Replies generated side by side
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Decides what is sampled
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which text of a pair [default: what the adapter was trained on]
    #[arg(long, value_name = "KIND")]
    text: Option<TextFlag>,
    /// How the base's weights are held [default: as the adapter was trained]
    #[arg(long, value_name = "KIND")]
    quantization: Option<QuantizationFlag>,
    /// Where malformed lines go (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum TextFlag {
    /// As pair-dedup normalised them
    Normalized,
    /// As they were collected
    Raw,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum QuantizationFlag {
    /// 4-bit NormalFloat, scales quantised again
    Nf4,
    /// As in the checkpoint
    None,
}

const EXAMPLES: &str = "
$ gen-eval --model model --adapter run1 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --model model --adapter a=run1 --adapter b=run2 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --model model --temperature 0.8 --seed 7 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --score-only < predictions.jsonl
";

/// One pair with every system's answer.
#[derive(Serialize)]
struct ItemLine<'a> {
    v: u64,
    id: &'a str,
    conversation_id: &'a str,
    tweet: &'a str,
    reference: &'a str,
    /// Tokens that `nll` is the mean of, the reply's end included.
    reference_tokens: usize,
    systems: Ordered<'a, SystemLine>,
}

#[derive(Serialize)]
struct SystemLine {
    prediction: String,
    #[serde(flatten)]
    scores: Scores,
    /// Of the reference, mean per token, in nats.
    nll: f64,
    /// How the reply ended: `stop`, or `length` where it was cut.
    finish: &'static str,
}

#[derive(Serialize)]
struct CorpusLine<'a> {
    v: u64,
    corpus: Systems<'a>,
}

#[derive(Serialize)]
struct Systems<'a> {
    systems: Ordered<'a, SystemScores>,
    signature: String,
}

#[derive(Serialize)]
struct SystemScores {
    #[serde(flatten)]
    scores: CorpusScores,
    /// Of the references, mean per token over all of them.
    nll: f64,
    nll_tokens: u64,
    /// exp(nll)
    perplexity: f64,
    /// Replies cut at their longest length.
    cut: u64,
}

/// A JSON object with its fields in the order of the systems.
struct Ordered<'a, T>(Vec<(&'a str, T)>);

impl<T: Serialize> Serialize for Ordered<'_, T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

fn main() -> ExitCode {
    cli::main::<GenEval>()
}

impl Tool for GenEval {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> Result<()> {
        let flags = Flags::new()
            .set("generation.model", &self.model)
            .set("generation.max_new_tokens", &self.max_new_tokens)
            .set("generation.temperature", &self.temperature)
            .set("generation.top_p", &self.top_p)
            .set("generation.top_k", &self.top_k)
            .set("generation.batch_size", &self.batch_size)
            .set("generation.seed", &self.seed)
            .set("generation.text", &self.text)
            .set("generation.quantization", &self.quantization);
        let Some(resolved) = app.settings::<EvalSettings>(&["generation"], flags)? else {
            return Ok(());
        };
        if self.common.max_bad_lines > 0 && self.rejects.is_none() {
            return Err(Failure::Usage(
                "--max-bad-lines needs --rejects FILE to keep the lines in".into(),
            )
            .into());
        }
        if self.score_only {
            self.score(app)
        } else {
            self.generate(app, &resolved)
        }
    }
}

impl GenEval {
    /// `--score-only`
    fn score(&self, app: &App) -> Result<()> {
        let mut out = Output::stdout();
        let mut corpus = Corpus::new();
        let counts = self.each_record(
            |mut record| {
                let prediction: String = record.require("prediction")?;
                let reference: String = record.require("reference")?;
                let scores = corpus.add(&prediction, &reference);
                record.set("rouge1", &scores.rouge1)?;
                record.set("rouge2", &scores.rouge2)?;
                record.set("rougeL", &scores.rouge_l)?;
                record.set("bleu", &scores.bleu)?;
                record.set("chrf", &scores.chrf)?;
                Ok(record)
            },
            |_, record| Ok(out.record(&record)?),
        )?;
        if counts.written > 0 {
            out.json(&CorpusOnly {
                corpus: corpus.scores(),
            })?;
        }
        out.finish()?;
        app.count(counts);
        Ok(())
    }

    /// Hands every record that `check` accepts to `take`; malformed lines go to the
    /// rejects file.
    fn each_record<T>(
        &self,
        mut check: impl FnMut(Record) -> Result<T, record::Error>,
        mut take: impl FnMut(Position, T) -> Result<()>,
    ) -> Result<Counts> {
        let mut rejects = self
            .rejects
            .as_deref()
            .map(AtomicFile::create)
            .transpose()?;
        let mut nowhere = std::io::sink();
        let kept: &mut dyn Write = match &mut rejects {
            Some(file) => file,
            None => &mut nowhere,
        };
        let mut records = Records::new(Lines::open(Path::new("-"))?, self.common.max_bad_lines);
        let mut written = 0;
        while let Some((position, value)) = records.next_with(kept, &mut check)? {
            take(position, value)?;
            written += 1;
        }
        let rejected = records.bad();
        if let Some(rejects) = rejects {
            rejects.commit()?;
        }
        Ok(Counts {
            read: written + rejected,
            written,
            rejected,
        })
    }

    fn generate(&self, app: &App, resolved: &Resolved<EvalSettings>) -> Result<()> {
        let settings = &resolved.settings.generation;
        check(settings)?;
        let setup = Setup::new(app, settings, &self.adapters)?;

        let mut sources = Vec::new();
        let mut counts = self.each_record(
            |record| Source::new(&record, setup.wording.text),
            |position, source| {
                sources.push((position, source));
                Ok(())
            },
        )?;
        let mut items = Vec::new();
        for (position, source) in items::held_out(app, sources) {
            items.push(Item::new(
                source,
                &position,
                &setup.wording,
                &setup.chat,
                setup.checkpoint.config(),
            )?);
        }
        counts.written = items.len() as u64;
        warn_of_special_tokens(app, &setup.chat, &items);
        let mut out = Output::stdout();
        if !items.is_empty() {
            let corpus = write_items(app, settings, &setup, &items, &mut out)?;
            let signature = setup.signature(resolved, &items)?;
            let systems = Systems {
                systems: Ordered(corpus),
                signature,
            };
            out.json(&CorpusLine {
                v: record::VERSION,
                corpus: systems,
            })?;
        }
        out.finish()?;
        app.count(counts);
        Ok(())
    }
}

#[derive(Serialize)]
struct CorpusOnly {
    corpus: CorpusScores,
}

/// Settings that parse and cannot work.
fn check(settings: &Generation) -> Result<(), Failure> {
    let wrong = |key: &str, what: String| Err(Failure::Usage(format!("generation.{key} {what}")));
    if settings.max_new_tokens == 0 {
        return wrong("max_new_tokens", "is 0: a reply needs a token".into());
    }
    if settings.batch_size == 0 {
        return wrong("batch_size", "is 0; 1 is the least".into());
    }
    if !(settings.temperature.is_finite() && settings.temperature >= 0.0) {
        return wrong(
            "temperature",
            format!("is {}; it must be at least 0", settings.temperature),
        );
    }
    if !(settings.top_p > 0.0 && settings.top_p <= 1.0) {
        return wrong(
            "top_p",
            format!("is {}; it must be above 0 and at most 1", settings.top_p),
        );
    }
    Ok(())
}

/// What is known before the weights are loaded.
struct Setup {
    checkpoint: Checkpoint,
    chat: Chat,
    stop_ids: Vec<u32>,
    adapters: Vec<(String, Adapter)>,
    wording: Wording,
    storage: Storage,
}

impl Setup {
    fn new(app: &App, settings: &Generation, named: &[Named]) -> Result<Self> {
        for (i, adapter) in named.iter().enumerate() {
            adapter.check()?;
            if named[..i].iter().any(|other| other.name == adapter.name) {
                let name = &adapter.name;
                return Err(Failure::Usage(format!(
                    "two adapters are called {name}; name them: --adapter NAME=DIR"
                ))
                .into());
            }
        }
        let trained: Vec<(&str, Option<TrainSettings>)> = named
            .iter()
            .map(|n| Ok((n.name.as_str(), n.trained_with()?)))
            .collect::<Result<_>>()?;
        let of_training = trained.iter().find_map(|(_, settings)| settings.as_ref());

        let folder = settings
            .model
            .clone()
            .or_else(|| of_training.map(|t| t.model.path.clone()));
        let folder = PathBuf::from(folder.ok_or_else(|| {
            Failure::Usage(
                "--model DIR is needed: no adapter says which base it was trained on".into(),
            )
        })?);
        if !folder.join("config.json").exists() {
            let remedy = "name the folder of the base model with --model DIR";
            return Err(
                Failure::Usage(format!("no model in {}: {remedy}", folder.display())).into(),
            );
        }
        let defaults = TrainSettings::default();
        let like = of_training.unwrap_or(&defaults);
        let wording = Wording {
            text: settings.text.unwrap_or(like.data.text),
            system_prompt: settings
                .system_prompt
                .clone()
                .unwrap_or_else(|| like.data.system_prompt.clone()),
        };
        let quantization = settings.quantization.unwrap_or(like.model.quantization);
        for (name, settings) in &trained {
            let Some(settings) = settings else {
                app.warn(format_args!(
                    "adapter {name} has no train.yaml beside it: whether it was trained with these prompts is not known"
                ));
                continue;
            };
            for (what, differs) in [
                ("text", settings.data.text != wording.text),
                (
                    "system prompt",
                    settings.data.system_prompt != wording.system_prompt,
                ),
                ("quantization", settings.model.quantization != quantization),
            ] {
                if differs {
                    app.warn(format_args!(
                        "adapter {name} was trained with another {what}"
                    ));
                }
            }
        }

        let checkpoint = Checkpoint::open(&folder)?;
        let config = checkpoint.config();
        let generation = GenerationConfig::load(&folder)?;
        let chat = Chat::load(&folder)?;
        chat.check(config, &generation)?;
        let adapters = named
            .iter()
            .map(|n| Ok((n.name.clone(), n.load(&folder, config)?)))
            .collect::<Result<_>>()?;
        let storage = match quantization {
            Quantization::Nf4 => Storage::Nf4,
            Quantization::None => Storage::AsStored,
        };
        Ok(Self {
            stop_ids: generation.stop_ids,
            checkpoint,
            chat,
            adapters,
            wording,
            storage,
        })
    }

    /// What the figures depend on.
    fn signature(&self, resolved: &Resolved<EvalSettings>, items: &[Item]) -> Result<String> {
        // Where the model lies changes no figure; what it is has a hash of its own.
        let shown = resolved.show(PrintConfig::Key);
        let config: String = shown
            .lines()
            .filter(|line| !line.starts_with("generation.model "))
            .collect();
        let data: Vec<u8> = items
            .iter()
            .flat_map(|item| &item.ids)
            .flat_map(|id| id.to_le_bytes())
            .collect();
        let mut signature = Signature::new("gen-eval")
            .with("seed", resolved.settings.generation.seed)
            .with_hash("config", &cli::sha256_hex(config.as_bytes()))
            .with_hash("data", &cli::sha256_hex(&data))
            .with_hash(
                "model",
                &self
                    .checkpoint
                    .fingerprint()
                    .context("hashing the base model")?,
            )
            .with(
                "quantization",
                if self.storage == Storage::Nf4 {
                    "nf4"
                } else {
                    "none"
                },
            )
            .with_hash("chat", self.chat.fingerprint());
        for (name, adapter) in &self.adapters {
            signature = signature.with_hash(name, &adapter.fingerprint());
        }
        Ok(signature.to_string())
    }
}

/// A tweet that spells out `<|im_end|>` ends its own turn, in training as here.
fn warn_of_special_tokens(app: &App, chat: &Chat, items: &[Item]) {
    for item in items {
        let texts = [&item.source.tweet, &item.source.reference];
        if let Some(token) = texts.into_iter().find_map(|text| chat.special_in(text)) {
            app.warn(format_args!(
                "pair {}: a text spells out {token}, which the model reads as such",
                item.source.id
            ));
        }
    }
}

/// What adds up over the items of one system.
struct Tally {
    corpus: Corpus,
    nll: f64,
    tokens: u64,
    cut: u64,
}

/// Answers block by block, each written as it is done; the figures of each system.
fn write_items<'a>(
    app: &App,
    settings: &Generation,
    setup: &'a Setup,
    items: &[Item],
    out: &mut Output,
) -> Result<Vec<(&'a str, SystemScores)>> {
    let model =
        Model::load(Cpu, &setup.checkpoint, setup.storage).context("loading the base model")?;
    let mut systems = vec![System::base()];
    for (name, adapter) in &setup.adapters {
        systems.push(System::adapted(name, adapter, &model)?);
    }
    let names: Vec<&str> = std::iter::once(systems::BASE)
        .chain(setup.adapters.iter().map(|(name, _)| name.as_str()))
        .collect();
    let decoding = Decoding {
        sampling: Sampling {
            temperature: settings.temperature,
            top_k: settings.top_k,
            top_p: settings.top_p,
            seed: settings.seed,
        },
        max_new_tokens: settings.max_new_tokens,
        stop_ids: setup.stop_ids.clone(),
        slots: settings.batch_size,
    };
    let mut pass = systems::scoring_pass();
    let tally = || Tally {
        corpus: Corpus::new(),
        nll: 0.0,
        tokens: 0,
        cut: 0,
    };
    let mut tallies: Vec<Tally> = systems.iter().map(|_| tally()).collect();
    let progress = app.progress("replies", Some((items.len() * systems.len()) as u64));
    let mut replies = 0;
    let mut first = 0_u32;
    // Slots run empty at a block's end; a few of their fillings make that small.
    for block in items.chunks(4 * settings.batch_size) {
        let mut answers = Vec::new();
        for system in &systems {
            let before = replies;
            answers.push(
                system
                    .answer(&model, &mut pass, block, first, &decoding, |done| {
                        progress.set_with(before + done as u64, &system.name);
                    })?
                    .into_iter(),
            );
            replies += block.len() as u64;
        }
        for item in block {
            let mut fields = Vec::new();
            for ((answers, tally), &name) in answers.iter_mut().zip(&mut tallies).zip(&names) {
                let answer = answers.next().context("a system answered too few items")?;
                let prediction = setup.chat.decode(&answer.completion.ids)?.trim().to_owned();
                let scores = tally.corpus.add(&prediction, &item.source.reference);
                let tokens = item.reference_tokens();
                tally.nll += answer.nll;
                tally.tokens += tokens as u64;
                let finish = match answer.completion.finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                };
                tally.cut += u64::from(finish == "length");
                fields.push((
                    name,
                    SystemLine {
                        prediction,
                        scores,
                        nll: answer.nll / tokens as f64,
                        finish,
                    },
                ));
            }
            let source = &item.source;
            out.json(&ItemLine {
                v: record::VERSION,
                id: &source.id,
                conversation_id: &source.conversation_id,
                tweet: &source.tweet,
                reference: &source.reference,
                reference_tokens: item.reference_tokens(),
                systems: Ordered(fields),
            })?;
        }
        out.flush()?;
        first += block.len() as u32;
    }
    let figures = |tally: &Tally| {
        let nll = tally.nll / tally.tokens as f64;
        SystemScores {
            scores: tally.corpus.scores(),
            nll,
            nll_tokens: tally.tokens,
            perplexity: nll.exp(),
            cut: tally.cut,
        }
    };
    Ok(names.into_iter().zip(tallies.iter().map(figures)).collect())
}
