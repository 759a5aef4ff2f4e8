//! Fine-tunes Qwen3 with LoRA over a frozen base in 4 bits (QLoRA, Dettmers et
//! al., arXiv 2305.14314).
//!
//! The same command finishes what it began: every result is a function of
//! settings, data and model, so an interrupted run that goes on leaves the same
//! bytes as one that was never interrupted.

mod bench;
mod card;
mod commands;
mod disk;
mod figures;
mod folder;
mod gguf;
mod inputs;
mod inspect;
mod lora;
mod memory;
mod merge;
mod origin;
mod plan;
mod quantized;
mod rows;
mod schedule;
mod stream;
mod time;
mod train;
mod verify;
mod watch;

use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use cli::{App, Common, Failure, Flags, Resolved, Tool, shown};
use engine::{Choice, Device};
use qwen3::{Adapter, Checkpoint, Config, Model, Seen};
use settings::{LmHead, Quantization, TrainSettings};

use crate::folder::{Folder, Found, State};
use crate::inputs::Inputs;
use crate::rows::Rejected;

/// Fine-tune Qwen3 on tweet→reply pairs
///
/// Trains LoRA adapters over a frozen base model and writes them in PEFT format
/// to --out, with a model card, figures and checkpoints. Rows are pairs as
/// pair-dedup writes them, or conversations under `messages`; rows with
/// `split: eval` are held out. A line of figures per step goes to standard
/// output and to OUT/metrics.jsonl.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct QloraTrain {
    #[command(subcommand)]
    command: Option<commands::Command>,
    /// Base model: a folder in Hugging Face layout, or a name on the hub, such as
    /// Qwen/Qwen3-8B, that lies in the Hugging Face cache or is downloaded to
    /// data/cache/models
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Training rows, JSONL; `-` for standard input
    #[arg(long, value_name = "FILE", required_unless_present_any = ["print_config", "save_quantized"])]
    data: Option<PathBuf>,
    /// Folder for the adapter, its figures and checkpoints
    #[arg(long, value_name = "DIR", required_unless_present_any = ["print_config", "save_quantized"])]
    out: Option<PathBuf>,
    /// Go on with the run in --out; a finished one is left as it is
    #[arg(long)]
    resume: bool,
    /// Memory of the device that the run may take, such as 8GB or 6.5GiB [default:
    /// what is free]
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<String>,
    /// Optimiser steps, instead of epochs
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Rows of a micro-batch
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Highest learning rate
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Where to compute: auto (the first GPU, else the processor), cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Choice,
    /// How the layers' weights are held
    #[arg(long, value_name = "KIND")]
    quantization: Option<Quantization>,
    /// How the output projection is held
    #[arg(long, value_name = "KIND")]
    lm_head: Option<LmHead>,
    /// Write the base in 4 bits to this folder too, as bitsandbytes does; alone, do
    /// only that
    #[arg(long, value_name = "DIR")]
    save_quantized: Option<PathBuf>,
    /// Start from this adapter, PEFT format
    #[arg(long, value_name = "DIR")]
    init_adapter: Option<PathBuf>,
    /// Take the rows in their order
    #[arg(long)]
    no_shuffle: bool,
    /// Make each row a pass of its own
    #[arg(long)]
    no_packing: bool,
    /// A control: give each training tweet the reply of another
    #[arg(long)]
    shuffled_replies: bool,
    /// Decides the initial adapter, the order of rows and dropout
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Show settings, counts and plan, and stop: nothing is written, no rejects either,
    /// and no model downloaded
    #[arg(long)]
    dry_run: bool,
    /// For the model card: a summary of pair-validate or pair-dedup (their --summary);
    /// may be given again
    #[arg(long, value_name = "FILE")]
    provenance: Vec<PathBuf>,
    /// Where malformed lines and skipped rows go
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ qlora-train --model model --data pairs.jsonl --out run1 --steps 3
$ qlora-train --model model --data pairs.jsonl --out run1 --steps 3 --resume
$ head pairs.jsonl | qlora-train --model model --data - --out run2 --steps 2
";

fn main() -> ExitCode {
    cli::main::<QloraTrain>()
}

impl Tool for QloraTrain {
    fn common(&self) -> &Common {
        match &self.command {
            Some(command) => command.common(),
            None => &self.common,
        }
    }

    fn run(self, app: &App) -> Result<()> {
        if let Some(command) = &self.command {
            return command.run(app);
        }
        let sections = ["model", "lora", "training", "data"];
        let Some(resolved) = app.settings::<TrainSettings>(&sections, self.flags())? else {
            return Ok(());
        };
        let settings = &resolved.settings;
        for (flag, path) in (self.data.iter().map(|path| ("--data", path)))
            .chain(self.provenance.iter().map(|path| ("--provenance", path)))
        {
            app.reads(flag, path)?;
        }
        check(app, &resolved)?;
        // The first call takes SIGUSR1 over, which would end the process while it loads.
        app.asked_to_save()?;
        let to_train = self.to_train()?;
        // Of a run that goes on it may be there already.
        let to_save = self.save_quantized.as_deref();
        let (to_save, there) = match to_save {
            Some(folder) if folder.exists() => (None, Some(folder)),
            other => (other, None),
        };
        if let Some(folder) = there {
            app.info(format_args!(
                "the base in 4 bits is in {} already",
                folder.display()
            ));
        }

        let (device, which) = Device::open(self.device)?;
        let base = self.base(app, &settings.model.path)?;
        let checkpoint = Checkpoint::open(&base)?;
        let Some((data, out)) = to_train else {
            return to_save.map_or(Ok(()), |folder| match self.dry_run {
                true => quantized::preview(app, &checkpoint, folder),
                false => quantized::save(app, &checkpoint, folder, &device, 0),
            });
        };
        check_fits(&resolved, checkpoint.config())?;
        let initial = self.started_from(checkpoint.config())?;
        let rejects = match self.dry_run {
            true => Rejected::Dropped,
            false => Rejected::Kept(self.rejects.as_deref()),
        };
        let rows = (data, rejects, &*self.provenance);
        let mut inputs = Inputs::read((app, &resolved), (base, checkpoint), initial, rows)?;

        let finished = || {
            app.info(format_args!("{} is finished; nothing to do", out.display()));
            Ok(())
        };
        // Another run is refused as such, not for the memory that its passes would take here;
        // and what is finished needs neither memory nor room on the disk.
        let mut identity = None;
        if self.resume {
            let found = inputs.identity(&device)?;
            folder::check_same(out, &found)?;
            if !self.dry_run && folder::is_finished(out) {
                folder::check_finished(out, &found)?;
                Seen::read(out)?;
                return finished();
            }
            identity = Some(found);
        }
        let began_with = self.resume.then(|| folder::began_with(out)).flatten();
        if let (Some((_, Some(before))), Some(now)) = (&began_with, device.hardware())
            && *before != now
        {
            app.warn(format_args!(
                "the run began on {before} and goes on with {now}: its last bits will be others"
            ));
        }
        let fit = inputs.fit(&device, began_with.map(|(tokens, _)| tokens))?;
        inputs.describe(&which, &fit);
        let room = inputs.room();
        room.check(out)?;
        if self.dry_run {
            return inputs.preview(device, &fit);
        }

        let mut identity = identity.map_or_else(|| inputs.identity(&device), Ok)?;
        identity.pass_tokens = fit.pass_tokens;
        let (folder, state) = match Folder::open(out, self.resume, &identity)? {
            Found::Finished => return finished(),
            Found::Fresh(folder) => (folder, None),
            Found::Resumed(folder, state) => {
                let (step, steps) = (state.step, inputs.plan.steps);
                app.info(format_args!("going on after step {step} of {steps}"));
                (folder, Some(*state))
            }
        };
        inputs.quantize(to_save, &identity.model, &device, room.total())?;
        let job = train::Job {
            app,
            settings,
            identity: &identity,
            plan: &inputs.plan,
            fit: &fit,
            rows: &inputs.rows,
            origin: &inputs.origin,
            base: &inputs.base,
        };
        let done = on_device(&job, &inputs, device, folder, state);
        done.map_err(|error| fit.with_remedy(error))
    }
}

/// Loads the base onto the device and trains there.
fn on_device(
    job: &train::Job<'_>,
    inputs: &Inputs,
    device: Device,
    folder: Folder,
    state: Option<State>,
) -> Result<()> {
    let loading = "loading the base model";
    match device {
        Device::Cpu(cpu) => {
            let model = Model::load(cpu, &inputs.checkpoint, inputs.held).context(loading)?;
            cpu.inside(|| train::run(job, &model, folder, state))
        }
        Device::Cuda(cuda) => {
            let mut model = Model::load(cuda, &inputs.checkpoint, inputs.held).context(loading)?;
            model.keep_decoded(job.fit.decoded).context(loading)?;
            train::run(job, &model, folder, state)
        }
    }
}

impl QloraTrain {
    /// The settings that flags give.
    fn flags(&self) -> Flags {
        let on = |given: bool, value: bool| given.then_some(value);
        Flags::new()
            .set("model.path", &self.model)
            .set("model.quantization", &self.quantization)
            .set("model.lm_head", &self.lm_head)
            .set("training.max_steps", &self.steps)
            .set("training.max_memory", &self.max_memory)
            .set("training.batch_size", &self.batch_size)
            .set("training.learning_rate", &self.learning_rate)
            .set("training.seed", &self.seed)
            .set("training.shuffle", &on(self.no_shuffle, false))
            .set("training.packing", &on(self.no_packing, false))
            .set("data.shuffled_replies", &on(self.shuffled_replies, true))
    }

    /// The folder of the base model, by its name or from the hub.
    fn base(&self, app: &App, model: &str) -> Result<PathBuf> {
        if !self.dry_run {
            return hub::fetch(app, model, "--model or `model.path`");
        }
        hub::find(app, model)?.ok_or_else(|| {
            let cause = format!("no model {model} on this machine, and --dry-run downloads none");
            Failure::Usage(cause).into()
        })
    }

    /// The data and the folder of a run; none where only a base is saved. Refuses folders
    /// that are there already, and two of which one would be in the other: --out is there
    /// before the base is, which appears whole.
    fn to_train(&self) -> Result<Option<(&Path, &Path)>, Failure> {
        let to_train = match (&self.data, &self.out) {
            (Some(data), Some(out)) => Some((data.as_path(), out.as_path())),
            (None, None) if self.save_quantized.is_some() => None,
            _ => return Err(Failure::Usage("--data and --out are needed".into())),
        };
        let (saved, out) = (self.save_quantized.as_deref(), to_train.map(|(_, out)| out));
        for (flag, folder, remedy) in [
            ("--save-quantized", saved, "name another folder"),
            (
                "--out",
                out,
                "--resume goes on with it, or name another folder",
            ),
        ] {
            let Some(folder) = folder.filter(|folder| folder.exists()) else {
                continue;
            };
            let (name, is_folder) = (folder.display(), folder.is_dir());
            let cause = match is_folder {
                true if self.resume => continue,
                true => format!("{flag} {name} exists; {remedy}"),
                false => format!("{flag} {name} is a file: name a folder"),
            };
            return Err(Failure::Usage(cause));
        }
        if let (Some(saved), Some(out)) = (saved, out) {
            let [at, of] = [saved, out].map(place);
            if at.starts_with(&of) || of.starts_with(&at) {
                let (saved, out) = (saved.display(), out.display());
                let cause = format!(
                    "--save-quantized {saved} and --out {out} lie one in the other: name a folder beside it"
                );
                return Err(Failure::Usage(cause));
            }
        }
        Ok(to_train)
    }

    /// The adapter to start from, and the rows that it has seen.
    fn started_from(&self, config: &Config) -> Result<Option<(Adapter, Seen)>> {
        let Some(folder) = &self.init_adapter else {
            return Ok(None);
        };
        if let Some(cause) = qwen3::lacks(folder) {
            let cause = format!("--init-adapter {}: {cause}", folder.display());
            return Err(Failure::Usage(cause).into());
        }
        let seen = Seen::read(folder);
        let seen = seen.with_context(|| format!("--init-adapter {}", folder.display()))?;
        let adapter = Adapter::load(folder, config)?;
        Ok(Some((adapter, seen.unwrap_or_else(Seen::unknown))))
    }
}

/// Where a path leads, as far as it is there: links are followed, and `..` is gone.
fn place(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut place = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                place.pop();
            }
            _ => place.push(part),
        }
        place = place.canonicalize().unwrap_or(place);
    }
    place
}

/// Settings that parse and cannot work.
fn check(app: &App, resolved: &Resolved<TrainSettings>) -> Result<()> {
    let settings = &resolved.settings;
    rows::wording(resolved)?;
    let (l, t) = (&settings.lora, &settings.training);
    if let Some(Err(cause)) = t.max_memory.as_deref().map(memory::parse) {
        return Err(resolved.wrong("training.max_memory", cause).into());
    }
    lora::check_alphas(resolved)?;
    plan::rows_per_step(resolved)?;
    let watched = t.early_stopping_patience > 0 || t.load_best_model_at_end;
    if watched && t.eval_steps == 0 {
        let cause = "is 0; early_stopping_patience and load_best_model_at_end need it above 0";
        return Err(resolved.wrong("training.eval_steps", cause).into());
    }
    // Bounds are far beyond what is of use, and where 32-bit figures still hold.
    for (key, value, most) in [
        ("lora.rank", l.rank as f64, f64::INFINITY),
        ("lora.lr_ratio", l.lr_ratio, 1e6),
        ("training.learning_rate", t.learning_rate, 1e38),
        ("training.batch_size", t.batch_size as f64, f64::INFINITY),
        (
            "training.gradient_accumulation_steps",
            t.gradient_accumulation_steps as f64,
            f64::INFINITY,
        ),
        ("training.num_epochs", t.num_epochs, 1e6),
        (
            "training.max_seq_length",
            t.max_seq_length as f64,
            f64::INFINITY,
        ),
        (
            "training.max_steps",
            t.max_steps.map_or(1.0, |n| n as f64),
            1e9,
        ),
    ] {
        if !(value > 0.0 && value <= most) {
            let most = match most.is_finite() {
                true => format!(" and at most {}", shown(most)),
                false => String::new(),
            };
            let cause = format!("is {}; it must be above 0{most}", shown(value));
            return Err(resolved.wrong(key, cause).into());
        }
    }
    for (key, value, most) in [
        ("lora.dropout", l.dropout, 0.99),
        ("training.warmup_ratio", t.warmup_ratio.unwrap_or(0.0), 1.0),
        ("training.weight_decay", t.weight_decay, 1e3),
        ("training.max_grad_norm", t.max_grad_norm, 1e30),
        ("training.spike_factor", t.spike_factor, 1e30),
        (
            "training.neftune_noise_alpha",
            t.neftune_noise_alpha.unwrap_or(0.0),
            1e6,
        ),
    ] {
        if !(0.0..=most).contains(&value) {
            let (is, most) = (shown(value), shown(most));
            let cause = format!("is {is}; it must be at least 0 and at most {most}");
            return Err(resolved.wrong(key, cause).into());
        }
    }
    let fraction = settings.data.eval_fraction;
    if !(0.0..1.0).contains(&fraction) {
        let cause = format!("is {}; it must be at least 0 and below 1", shown(fraction));
        return Err(resolved.wrong("data.eval_fraction", cause).into());
    }
    if !(1e-8..=0.1).contains(&t.learning_rate) {
        app.warn(format_args!(
            "training.learning_rate is {}: usual is 1e-5 to 1e-3",
            shown(t.learning_rate)
        ));
    }
    Ok(())
}

/// Settings that no row and no memory would show to be wrong for this model.
fn check_fits(resolved: &Resolved<TrainSettings>, config: &Config) -> Result<(), Failure> {
    let settings = &resolved.settings;
    let (rank, length) = (settings.lora.rank, settings.training.max_seq_length);
    let (width, longest) = (config.hidden_size, config.max_positions);
    if rank > width {
        let cause = format!("is {rank}, more than the model is wide ({width}); usual is 8 to 64");
        return Err(resolved.wrong("lora.rank", cause));
    }
    if length > longest {
        let cause = format!("is {length}, more than the model's {longest} positions");
        return Err(resolved.wrong("training.max_seq_length", cause));
    }
    Ok(())
}
