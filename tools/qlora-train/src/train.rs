//! The training loop.
//!
//! An optimiser step is exactly `batch_size × gradient_accumulation_steps`
//! rows, in the order of a stream that runs through one shuffled epoch after
//! another. How the rows of a step are cut into passes decides only memory and
//! speed: each pass adds `∂ Σ nll / N` to the gradient, with N the labelled
//! tokens of the whole step.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result};
use cli::{App, Counts, Failure};
use engine::{Backend, Reading};
use jsonl::{Output, WriteError};
use qwen3::{
    Adapter, AdapterConfig, Batch, Config, Keep, Lora, LoraLayout, Losses, Model, Module,
    Optimiser, Pass, StepDropout, Update,
};
use serde::Serialize;
use settings::{TargetModules, TrainSettings, Training};

use crate::folder::{Folder, Identity, State};
use crate::rows::{Row, Rows, permutation};
use crate::schedule::learning_rate;

/// Most tokens of one pass on the CPU, where longer ones gain no speed. A row
/// that is longer is a pass of its own.
const PASS_TOKENS: usize = 4096;

/// What a run will do, before it does it.
pub struct Plan {
    steps: u64,
    rows_per_step: usize,
    adapter: AdapterConfig,
    layout: LoraLayout,
    initial: Vec<f32>,
}

impl Plan {
    /// Works out steps and adapter; refuses what cannot be.
    pub fn new(
        settings: &TrainSettings,
        config: &Config,
        rows: &Rows,
        initial: Option<&Adapter>,
    ) -> Result<Self> {
        let t = &settings.training;
        let rows_per_step = (t.batch_size.checked_mul(t.gradient_accumulation_steps))
            .filter(|&rows| u32::try_from(rows).is_ok())
            .ok_or_else(|| {
                Failure::Usage(format!(
                    "training.batch_size × training.gradient_accumulation_steps is {} × {}: more than 4 billion rows a step",
                    t.batch_size, t.gradient_accumulation_steps
                ))
            })?;
        let epochs = (t.num_epochs * rows.train.len() as f64 / rows_per_step as f64).ceil() as u64;
        let lora = &settings.lora;
        let adapter = AdapterConfig {
            base_model: settings.model.path.clone(),
            rank: lora.rank,
            alpha: lora.alpha,
            dropout: lora.dropout,
            targets: targets(&lora.target_modules)?,
            rslora: lora.use_rslora,
        };
        let layout = LoraLayout::new(config, &adapter.targets, adapter.rank, adapter.scale());
        let initial = match initial {
            None => layout.init(t.seed),
            Some(given) => {
                let same = given.config.rank == adapter.rank
                    && given.config.targets == adapter.targets
                    && given.config.scale() == adapter.scale();
                if !same {
                    let cause = "--init-adapter: its rank, alpha or target modules are not those of `lora` in the settings";
                    return Err(Failure::Usage(cause.into()).into());
                }
                layout.flatten(&given.pairs)
            }
        };
        Ok(Self {
            steps: t.max_steps.unwrap_or(epochs).max(1),
            rows_per_step,
            adapter,
            layout,
            initial,
        })
    }

    /// Optimiser steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The plan in a line.
    pub fn describe(&self, rows: &Rows) -> String {
        let tokens = |rows: &[Row]| rows.iter().map(|row| row.ids.len()).sum::<usize>();
        let labelled: usize = rows.train.iter().map(labels).sum();
        format!(
            "{} rows to train on ({} tokens, {labelled} to learn), {} held out; {} steps of {} rows; {} trained parameters",
            rows.train.len(),
            tokens(&rows.train),
            rows.eval.len(),
            self.steps,
            self.rows_per_step,
            self.layout.len(),
        )
    }
}

/// The modules named in the settings.
fn targets(wanted: &TargetModules) -> Result<BTreeSet<Module>> {
    let usage = |cause: String| Failure::Usage(format!("lora.target_modules: {cause}"));
    let names = match wanted {
        TargetModules::Named(name) if name == "all-linear" => return Ok(Module::ALL.into()),
        TargetModules::Named(name) => std::slice::from_ref(name),
        TargetModules::List(names) if names.is_empty() => {
            return Err(usage("the list is empty".into()).into());
        }
        TargetModules::List(names) => names.as_slice(),
    };
    let known = Module::ALL.map(Module::name).join(", ");
    let module = |name: &String| {
        name.parse::<Module>().map_err(|_| {
            usage(format!(
                "`{name}` matches nothing; there are {known}, and all-linear"
            ))
        })
    };
    Ok(names.iter().map(module).collect::<Result<_, _>>()?)
}

/// Targets of a row; its first token has nothing to be predicted from.
fn labels(row: &Row) -> usize {
    row.labelled
        .iter()
        .skip(1)
        .filter(|&&labelled| labelled)
        .count()
}

/// The endless stream of rows: epoch after epoch, each in its own order.
struct Stream<'a> {
    rows: &'a [Row],
    seed: u64,
    shuffle: bool,
    /// The epoch whose order is at hand.
    epoch: Option<u32>,
    order: Vec<usize>,
}

impl<'a> Stream<'a> {
    fn new(rows: &'a [Row], seed: u64, shuffle: bool) -> Self {
        Self {
            rows,
            seed,
            shuffle,
            epoch: None,
            order: (0..rows.len()).collect(),
        }
    }

    /// Row number `at` of the stream.
    fn row(&mut self, at: u64) -> &'a Row {
        let n = self.rows.len() as u64;
        let epoch = (at / n) as u32;
        if self.shuffle && self.epoch != Some(epoch) {
            self.order = permutation(self.rows.len(), self.seed, epoch);
            self.epoch = Some(epoch);
        }
        &self.rows[self.order[(at % n) as usize]]
    }
}

/// Cuts rows into passes.
fn passes<'a>(rows: &[&'a Row], packing: bool) -> Vec<Vec<qwen3::Row<'a>>> {
    let mut passes: Vec<Vec<qwen3::Row>> = Vec::new();
    let mut tokens = 0;
    for row in rows {
        if passes.is_empty() || !packing || tokens + row.ids.len() > PASS_TOKENS {
            passes.push(Vec::new());
            tokens = 0;
        }
        tokens += row.ids.len();
        if let Some(last) = passes.last_mut() {
            last.push(qwen3::Row {
                number: row.number,
                ids: &row.ids,
                labelled: &row.labelled,
            });
        }
    }
    passes
}

/// A line of metrics.jsonl for an update.
#[derive(Serialize)]
struct StepLine {
    step: u64,
    epoch: f64,
    /// Token mean of the negative log-likelihood over the step, in nats.
    loss: f64,
    /// Global norm of the gradient before clipping.
    grad_norm: f64,
    learning_rate: f64,
    tokens: usize,
    supervised_tokens: usize,
}

/// A line of metrics.jsonl for an evaluation.
#[derive(Serialize)]
struct EvalLine {
    step: u64,
    eval_loss: f64,
    eval_perplexity: f64,
    eval_tokens: usize,
}

/// A line of timing.jsonl.
#[derive(Serialize)]
struct TimeLine {
    step: u64,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_mb: Option<u64>,
}

/// A step that is queued and whose figures are still to come.
struct Pending<B: Backend> {
    line: StepLine,
    losses: Vec<Losses<B>>,
    norm: B::Reading,
}

/// Where lines go: the folder, and standard output as long as someone reads it.
struct Lines {
    folder: Folder,
    stdout: Option<Output>,
}

impl Lines {
    fn metric(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line)?;
        self.folder.metric(&text)?;
        if let Some(out) = &mut self.stdout {
            let written = out
                .line(|out| writeln!(out, "{text}"))
                .and_then(|()| out.flush());
            match written {
                // Training is worth more than its audience.
                Err(WriteError::ReaderGone) => self.stdout = None,
                other => other?,
            }
        }
        Ok(())
    }
}

/// Trains from `state`, or from the start, to the finished adapter.
#[expect(
    clippy::too_many_arguments,
    reason = "everything that a run is made of"
)]
pub fn run<B: Backend>(
    app: &App,
    settings: &TrainSettings,
    identity: &Identity,
    model: &Model<B>,
    plan: &Plan,
    rows: &Rows,
    folder: Folder,
    state: Option<State>,
) -> Result<()> {
    let backend = model.backend();
    let t = &settings.training;
    let layout = &plan.layout;
    let fresh = state.is_none();
    let (done, mut params, mut optimiser) = match &state {
        None => (
            0,
            backend.upload_f32(&plan.initial)?,
            Optimiser::new(backend, layout.len())?.with_lr_ratio(layout, settings.lora.lr_ratio),
        ),
        Some(state) => {
            anyhow::ensure!(
                state.params.len() == layout.len(),
                "the checkpoint is of another adapter"
            );
            let optimiser = Optimiser::restore(backend, &state.m, &state.v, state.step)?
                .with_lr_ratio(layout, settings.lora.lr_ratio);
            (state.step, backend.upload_f32(&state.params)?, optimiser)
        }
    };
    drop(state);
    let mut grads = backend.alloc_f32(layout.len())?;
    let mut pass = Pass::new(Keep::All);
    let mut stream = Stream::new(&rows.train, t.seed, t.shuffle);
    let mut lines = Lines {
        folder,
        stdout: Some(Output::stdout()),
    };
    let mut watch = Watch::new(t, lines.folder.eval_losses()?);
    let mut last_eval = None;
    let mut evaluate_at =
        |step: u64, params: &B::F32, lines: &mut Lines, watch: &mut Watch| -> Result<()> {
            last_eval = evaluate(app, model, layout, params, rows, step)?;
            let Some(line) = &last_eval else {
                return Ok(());
            };
            lines.metric(line)?;
            if watch.see(step, line.eval_loss) && t.load_best_model_at_end {
                let params = backend.read_f32(params, 0..layout.len()).wait()?;
                lines.folder.save_best(step, &params)?;
            }
            Ok(())
        };
    if fresh {
        evaluate_at(0, &params, &mut lines, &mut watch)?;
    }

    let progress = app.progress("training", Some(plan.steps));
    progress.set(done);
    let mut pending: Option<Pending<B>> = None;
    let mut clock = Instant::now();
    let mut finish = |pending: Option<Pending<B>>, lines: &mut Lines| -> Result<()> {
        let Some(Pending {
            mut line,
            losses,
            norm,
        }) = pending
        else {
            return Ok(());
        };
        let mut sum = 0.0;
        for losses in losses {
            sum += losses
                .wait()?
                .iter()
                .map(|&nll| f64::from(nll))
                .sum::<f64>();
        }
        line.loss = sum / line.supervised_tokens as f64;
        line.grad_norm = f64::from(norm.wait()?[0]);
        if !(line.loss.is_finite() && line.grad_norm.is_finite()) {
            // To resume would repeat every step to the same end.
            let cause = "lower training.learning_rate and train in another folder (make: RUN=new)";
            return Err(Failure::World(format!(
                "step {}: the loss is no longer a number: {cause}",
                line.step
            ))
            .into());
        }
        lines.metric(&line)?;
        let seconds = clock.elapsed().as_secs_f64();
        clock = Instant::now();
        let tokens_per_second = line.tokens as f64 / seconds;
        let time = TimeLine {
            step: line.step,
            seconds,
            tokens_per_second,
            peak_memory_mb: peak_memory_mb(),
        };
        lines.folder.timing(&serde_json::to_string(&time)?)?;
        progress.set_with(
            line.step,
            &format!("loss {:.4}, {tokens_per_second:.0} tokens/s", line.loss),
        );
        Ok(())
    };
    let save =
        |step: u64, params: &B::F32, optimiser: &Optimiser<B>, lines: &mut Lines| -> Result<()> {
            let (m, v) = optimiser.moments(backend)?;
            let params = backend.read_f32(params, 0..layout.len()).wait()?;
            lines
                .folder
                .save(&State { step, params, m, v }, t.save_total_limit)
        };
    let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);

    let mut last_step = done;
    for step in done + 1..=plan.steps {
        if watch.gave_up() {
            break;
        }
        if app.asked_to_save()? || lines.folder.asked_to_save()? {
            finish(pending.take(), &mut lines)?;
            save(step - 1, &params, &optimiser, &mut lines)?;
            app.info(format_args!("step {} is saved", step - 1));
        }
        if app.interrupted()? {
            finish(pending.take(), &mut lines)?;
            save(step - 1, &params, &optimiser, &mut lines)?;
            let cause = format!("interrupted; step {} is saved, --resume goes on", step - 1);
            return Err(Failure::Interrupted(cause).into());
        }
        let first = (step - 1) * plan.rows_per_step as u64;
        let step_rows: Vec<&Row> = (0..plan.rows_per_step as u64)
            .map(|i| stream.row(first + i))
            .collect();
        let supervised_tokens: usize = step_rows.iter().map(|row| labels(row)).sum();
        let rate = learning_rate(t, step, plan.steps);
        let dropout = StepDropout {
            p: settings.lora.dropout as f32,
            seed: t.seed,
            step: step as u32,
        };
        let mut losses = Vec::new();
        for rows in passes(&step_rows, t.packing) {
            let batch = Batch::new(backend, &rows)?;
            let lora = Lora {
                layout,
                params: &params,
            };
            let scale = (1.0 / supervised_tokens as f64) as f32;
            losses.push(model.losses_and_gradients(
                &mut pass,
                &batch,
                lora,
                Some(dropout),
                (&mut grads, scale),
            )?);
        }
        let with = Update {
            lr: rate,
            weight_decay: t.weight_decay,
            max_norm: Some(t.max_grad_norm as f32),
        };
        let norm = optimiser.update(backend, with, &mut grads, &mut params);
        let line = StepLine {
            step,
            epoch: (step * plan.rows_per_step as u64) as f64 / rows.train.len() as f64,
            loss: f64::NAN,
            grad_norm: f64::NAN,
            learning_rate: rate,
            tokens: step_rows.iter().map(|row| row.ids.len()).sum(),
            supervised_tokens,
        };
        // The figures of the step before are read while this one is under way.
        finish(pending.replace(Pending { line, losses, norm }), &mut lines)?;
        let last = step == plan.steps;
        let (save_now, evaluate_now) = (due(step, t.save_steps), due(step, t.eval_steps) || last);
        if save_now || evaluate_now {
            finish(pending.take(), &mut lines)?;
        }
        if evaluate_now {
            evaluate_at(step, &params, &mut lines, &mut watch)?;
        }
        if save_now || last || watch.gave_up() {
            save(step, &params, &optimiser, &mut lines)?;
        }
        last_step = step;
    }
    drop(progress);
    if watch.gave_up() {
        app.info(format_args!(
            "stopped after step {last_step}: no better held-out loss in {} evaluations",
            t.early_stopping_patience
        ));
    }
    // A run that was killed after its last checkpoint has its line already.
    if last_eval.is_none() {
        last_eval = evaluate(app, model, layout, &params, rows, last_step)?;
    }

    let mut values = backend.read_f32(&params, 0..layout.len()).wait()?;
    let mut eval_loss = last_eval.map(|line| line.eval_loss);
    if t.load_best_model_at_end
        && let Some((step, loss)) = watch.best
    {
        values = lines.folder.read_best(step)?;
        eval_loss = Some(loss);
        app.info(format_args!(
            "the adapter is that of step {step}, held-out loss {loss:.4}"
        ));
    }
    let adapter = Adapter {
        config: plan.adapter.clone(),
        pairs: layout.split(&values),
    };
    let card = crate::card::render(settings, identity, last_step, rows, eval_loss);
    publish(
        lines.folder.path(),
        settings,
        &adapter,
        model.config(),
        &card,
    )?;
    app.info(format_args!(
        "the adapter is in {}",
        lines.folder.path().display()
    ));
    app.count(Counts {
        read: (rows.train.len() + rows.eval.len()) as u64,
        written: last_step,
        rejected: 0,
    });
    match lines.stdout.take().map(Output::finish) {
        None | Some(Ok(()) | Err(WriteError::ReaderGone)) => Ok(()),
        Some(Err(error)) => Err(error.into()),
    }
}

/// The held-out losses so far: which was the best, and for how long none was better.
struct Watch {
    patience: u64,
    /// Step and loss.
    best: Option<(u64, f64)>,
    worse: u64,
}

impl Watch {
    /// From the evaluations that a resumed run has behind it.
    fn new(training: &Training, seen: Vec<(u64, f64)>) -> Self {
        let mut watch = Self {
            patience: training.early_stopping_patience,
            best: None,
            worse: 0,
        };
        for (step, loss) in seen {
            watch.see(step, loss);
        }
        watch
    }

    /// Takes note of an evaluation; whether it is the best so far.
    fn see(&mut self, step: u64, loss: f64) -> bool {
        let better = self.best.is_none_or(|(_, best)| loss < best);
        if better {
            self.best = Some((step, loss));
            self.worse = 0;
        } else {
            self.worse += 1;
        }
        better
    }

    /// Whether patience has run out.
    fn gave_up(&self) -> bool {
        self.patience > 0 && self.worse >= self.patience
    }
}

/// The loss of the held-out rows after `step`, if there are any.
fn evaluate<B: Backend>(
    app: &App,
    model: &Model<B>,
    layout: &LoraLayout,
    params: &B::F32,
    rows: &Rows,
    step: u64,
) -> Result<Option<EvalLine>> {
    if rows.eval.is_empty() {
        return Ok(None);
    }
    let mut pass = Pass::new(Keep::Nothing);
    let held_out: Vec<&Row> = rows.eval.iter().collect();
    let (mut sum, mut tokens) = (0.0, 0);
    let progress = app.progress("evaluating", Some(held_out.len() as u64));
    for rows in passes(&held_out, true) {
        let batch = Batch::new(model.backend(), &rows)?;
        let nll = model
            .losses(&mut pass, &batch, Some(Lora { layout, params }))?
            .wait()?;
        sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        tokens += nll.len();
        progress.add(rows.len() as u64);
    }
    let eval_loss = sum / tokens as f64;
    Ok(Some(EvalLine {
        step,
        eval_loss,
        eval_perplexity: eval_loss.exp(),
        eval_tokens: tokens,
    }))
}

/// Puts the finished adapter into the folder; its weights come last, for their
/// name is the sign that the run is finished.
fn publish(
    folder: &std::path::Path,
    settings: &TrainSettings,
    adapter: &Adapter,
    config: &Config,
    card: &str,
) -> Result<()> {
    let part = folder.join("adapter.tmp");
    if part.exists() {
        std::fs::remove_dir_all(&part).with_context(|| part.display().to_string())?;
    }
    std::fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
    adapter.save(&part, config)?;
    jsonl::write_atomically(&folder.join("README.md"), card.as_bytes())?;
    let snapshot = serde_saphyr::to_string(settings).context("writing the settings")?;
    jsonl::write_atomically(&folder.join("train.yaml"), snapshot.as_bytes())?;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::rename(part.join(name), folder.join(name))
            .with_context(|| folder.join(name).display().to_string())?;
    }
    std::fs::remove_dir(&part).with_context(|| part.display().to_string())
}

/// The most memory that this process had at once, where the system says so.
fn peak_memory_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kb| kb / 1024)
}
