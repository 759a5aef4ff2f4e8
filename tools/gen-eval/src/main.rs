//! Replies of a base model and of its adapters to held-out tweets, with figures:
//! how likely each finds the reply that people liked, and how near its own comes.
//!
//! The likelihood of the reference is the figure to trust: it uses every token of
//! every reference. ROUGE, BLEU and chrF compare one of many good replies with one
//! other and mostly measure luck; they are here because readers expect them.

mod answers;
mod held_out;
mod items;
mod journal;
mod lines;
mod prompted;
mod scores;
mod setup;
mod systems;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clap::builder::{OsStringValueParser, TypedValueParser};
use cli::{App, Common, Counts, Failure, Flags, Resolved, Tool};
use engine::{Choice, Device};
use jsonl::{Lines, Output, Position, Rejects};
use qwen3::{Model, Storage};
use record::Record;
use settings::{EvalSettings, Generation, LmHead, Quantization, TextChoice};

use crate::held_out::HeldOut;
use crate::items::{Item, Source};
use crate::journal::Journal;
use crate::lines::{CorpusLine, CorpusOnly, Ordered, SystemScores, Systems};
use crate::prompted::Prompted;
use crate::scores::Corpus;
use crate::setup::Setup;
use crate::systems::Named;

/// Generate replies to held-out tweets and score them
///
/// Reads pairs, or rows with `messages` or `prompt` and `completion`, on standard input,
/// keeps those of `split: eval` (where no row has `split`: all) that no adapter was trained
/// on, by the rows.jsonl beside it, and for the base model and the base with each adapter
/// writes a reply (to what is before the last assistant turn), its ROUGE, BLEU and chrF against
/// the reply that people liked, and that reply's negative log-likelihood (`nll`, per
/// token). Where the liked reply is the one that pair-dedup normalised, the scores are of the
/// reply normalised likewise, and `prediction` is as it was generated. Where rows were trained
/// on, up to eight of them stand in the prompt of one more system, `prompted`, the base that is shown
/// what is wanted (--prompted-examples 0: none). `split_group` says
/// which lines are no independent evidence (sigtest --cluster split_group). A last line has
/// the figures of each system over all pairs. With --score-only nothing is generated: lines
/// {"prediction","reference"} get the scores, of the texts as they are.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct GenEval {
    /// Base model: a folder in Hugging Face layout, or a name on the hub, such as
    /// Qwen/Qwen3-8B, that lies in the Hugging Face cache or is downloaded to
    /// data/cache/models [default: the adapter's own]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// An adapter, PEFT format; DIR alone is called `lora`; may be given again
    #[arg(long = "adapter", value_name = "[NAME=]DIR",
          value_parser = OsStringValueParser::new().try_map(Named::parse))]
    adapters: Vec<Named>,
    /// Go on where an adapter was trained on a base with other files than --model's
    #[arg(long)]
    any_base: bool,
    /// Score lines {"prediction","reference"}; no model is needed
    #[arg(long, conflicts_with_all = ["model", "adapters", "any_base", "state"])]
    score_only: bool,
    /// Longest reply, in tokens
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Sample among the likeliest tokens that make up this much probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Sample among so many of the likeliest tokens; 0: all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Replies generated side by side
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Decides what is sampled
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Rows that were trained on, shown to the system `prompted` before each question; as many
    /// as fit into 1,024 tokens
    #[arg(long, value_name = "N")]
    prompted_examples: Option<usize>,
    /// The system prompt of `prompted`, but of rows of `messages`, which have their own
    /// [default: that of the others]
    #[arg(long, value_name = "TEXT")]
    prompted_system: Option<String>,
    /// Which text of a pair [default: what the adapter was trained on]
    #[arg(long, value_name = "KIND")]
    text: Option<TextChoice>,
    /// Where to compute: auto (the first GPU, else the processor), cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Choice,
    /// How the base's weights are held [default: as the adapter was trained]
    #[arg(long, value_name = "KIND")]
    quantization: Option<Quantization>,
    /// How the base's output projection is held [default: as the adapter was trained]
    #[arg(long, value_name = "KIND")]
    lm_head: Option<LmHead>,
    /// Keep finished replies in this folder: after an interruption the same command goes on
    /// from them
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where rows go that are left out for more than their `split: train`, with the reasons,
    /// and malformed lines (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ gen-eval --model model --adapter run1 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --model model --adapter a=run1 --adapter b=run2 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --model model --temperature 0.8 --seed 7 --max-new-tokens 8 < pairs.jsonl
$ gen-eval --model model --adapter run1 --state replies --max-new-tokens 8 < pairs.jsonl
$ gen-eval --score-only < predictions.jsonl
";

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
            .set("generation.prompted.examples", &self.prompted_examples)
            .set("generation.prompted.system_prompt", &self.prompted_system)
            .set("generation.text", &self.text)
            .set("generation.quantization", &self.quantization)
            .set("generation.lm_head", &self.lm_head);
        let Some(resolved) = app.settings::<EvalSettings>(&["generation"], flags)? else {
            return Ok(());
        };
        // The first call takes SIGUSR1 over: what can be kept is kept without being asked.
        app.asked_to_save()?;
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
        let mut rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        let counts = self.each_record(
            app,
            &mut rejects,
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
        rejects.commit()?;
        if counts.written > 0 {
            out.json(&CorpusOnly {
                corpus: corpus.scores(),
            })?;
        }
        out.finish()?;
        app.count(counts);
        Ok(())
    }

    /// Hands every record that `check` accepts to `take`; malformed lines go to `rejects`.
    fn each_record<T>(
        &self,
        app: &App,
        rejects: &mut Rejects,
        mut check: impl FnMut(Record) -> Result<T, record::Error>,
        mut take: impl FnMut(Position, T) -> Result<()>,
    ) -> Result<Counts> {
        let mut records = app.records(Lines::open(Path::new("-"))?);
        let mut written = 0;
        while let Some((position, value)) = records.next_with(rejects, &mut check)? {
            take(position, value)?;
            written += 1;
        }
        let rejected = records.bad();
        Ok(Counts {
            read: written + rejected,
            written,
            rejected,
        })
    }

    fn generate(&self, app: &App, resolved: &Resolved<EvalSettings>) -> Result<()> {
        let settings = &resolved.settings.generation;
        setup::check(resolved)?;
        let setup = Setup::new(app, settings, &self.adapters, self.any_base)?;
        let (device, which) = Device::open(self.device)?;
        app.detail(format_args!("computing on {which}"));

        let mut sources = Vec::new();
        let mut rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        let mut counts = self.each_record(
            app,
            &mut rejects,
            |record| Source::new(record, &setup.wording),
            |position, source| {
                sources.push((position, source));
                Ok(())
            },
        )?;
        let seen = setup.seen(&self.adapters)?;
        let chat = (&setup.chat, setup.checkpoint.config());
        let prompted = Prompted::draw(settings, &sources, &seen, &setup.chat);
        let held_out = HeldOut::of(app, sources, &seen, &mut rejects)?;
        rejects.commit()?;
        counts.rejected += held_out.left_out;
        let (mut items, mut unworded) = (Vec::new(), 0);
        for (position, source) in &held_out.rows {
            unworded += usize::from(!source.is_pair());
            items.push(Item::new(source, position, chat)?);
        }
        let prompted = prompted.ask(app, settings, &held_out.rows, &mut items, chat)?;
        if unworded > 0 && setup.has_own_template {
            app.warn(format_args!(
                "the prompt template words tweets only: {} with `messages` or `prompt` left as they stand",
                cli::counted(unworded, "row")
            ));
        }
        counts.written = items.len() as u64;
        items::warn_of_special_tokens(app, &items);
        items::warn_of_empty_references(app, &items);
        let mut out = Output::stdout();
        if !items.is_empty() {
            let kind = match device {
                Device::Cpu(_) => "cpu",
                Device::Cuda(_) => "cuda",
            };
            let mut journal = None;
            if let Some(folder) = &self.state {
                let identity = setup.identity(resolved, &items, kind);
                let opened = journal.insert(Journal::open(folder, &identity)?);
                if opened.replies() > 0 {
                    app.info(format_args!(
                        "going on: {} replies are in {} already",
                        opened.replies(),
                        opened.path().display()
                    ));
                }
            }
            let kept = journal.as_mut();
            let corpus = on_device(app, settings, &setup, device, &items, kept, &mut out)
                .map_err(|error| with_remedy(error, settings, &setup, &items))?;
            let signature = setup.signature(resolved, &items);
            let systems = Systems {
                systems: Ordered(corpus),
                prompted,
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

/// Loads the base onto the device and answers there; the figures of each system.
fn on_device<'a>(
    app: &App,
    settings: &Generation,
    setup: &'a Setup,
    device: Device,
    items: &[Item],
    kept: Option<&mut Journal>,
    out: &mut Output,
) -> Result<Vec<(&'a str, SystemScores)>> {
    let loading = "loading the base model";
    match device {
        Device::Cpu(cpu) => {
            let model = Model::load(cpu, &setup.checkpoint, setup.held).context(loading)?;
            cpu.inside(|| answers::write_items(app, settings, setup, model, items, kept, out))
        }
        Device::Cuda(cuda) => {
            let model = Model::load(cuda, &setup.checkpoint, setup.held).context(loading)?;
            answers::write_items(app, settings, setup, model, items, kept, out)
        }
    }
}

/// Names what of the settings could need less memory, where there was too little.
fn with_remedy(
    error: anyhow::Error,
    settings: &Generation,
    setup: &Setup,
    items: &[Item],
) -> anyhow::Error {
    if !qwen3::is_out_of_memory(error.as_ref()) {
        return error;
    }
    let mut remedies = Vec::new();
    if settings.batch_size > 1 {
        let now = settings.batch_size;
        remedies.push(format!("a lower --batch-size (now {now})"));
    }
    if items.iter().any(|item| item.prompted.is_some()) {
        let now = settings.prompted.examples;
        remedies.push(format!("fewer --prompted-examples (now {now})"));
    }
    if setup.held.products == Storage::AsStored {
        remedies.push("--quantization nf4".into());
    }
    remedies.push("ending what else uses that memory".into());
    let remedies = remedies.join(", ");
    Failure::World(format!("{error:#}; what would help: {remedies}")).into()
}
