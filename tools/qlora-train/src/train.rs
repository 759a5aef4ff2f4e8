//! The training loop.
//!
//! An optimiser step is exactly `batch_size × gradient_accumulation_steps`
//! rows, in the order of a stream that runs through one shuffled epoch after
//! another. How the rows of a step are cut into passes decides only memory and
//! speed: each pass adds `∂ Σ nll / N` to the gradient, with N the labelled
//! tokens of the whole step.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cli::{App, Counts, Failure, Progress};
use engine::{Backend, Reading};
use jsonl::{Output, WriteError};
use qwen3::{
    Adapter, Batch, Config, Keep, Lora, Losses, Model, Optimiser, OptimiserKind, Pass, ROWS, Seen,
    StepNoise, Update,
};
use serde::Serialize;
use settings::{Optim, TrainSettings};

use crate::card::Card;
use crate::figures::{EvalLine, Lines, StepLine, TimeLine};
use crate::folder::{Folder, Identity, Saving, State, sync_names, write_sums};
use crate::memory::Fit;
use crate::origin::Origin;
use crate::plan::Plan;
use crate::rows::{Row, Rows};
use crate::schedule::learning_rate;
use crate::stream::{Stream, passes};
use crate::time::{About, Probe};
use crate::watch::{Spikes, Watch};

/// A step that is queued and whose figures are still to come.
struct Pending<B: Backend> {
    line: StepLine,
    losses: Vec<Losses<B>>,
    norm: B::Reading,
    started: Instant,
    queued: Instant,
}

/// A value of the adapter is no number.
#[derive(Debug, thiserror::Error)]
#[error("a value is no number")]
struct NoNumber;

/// These values, if they are numbers: the loss tells only of those before an update.
fn finite(values: Vec<f32>) -> Result<Vec<f32>> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(NoNumber.into()),
    }
}

/// What a run is made of, beside the model.
pub struct Job<'a> {
    /// Messages, progress and signals.
    pub app: &'a App,
    /// All settings.
    pub settings: &'a TrainSettings,
    /// What the run is.
    pub identity: &'a Identity,
    /// Steps and adapter.
    pub plan: &'a Plan,
    /// Passes, and what they keep.
    pub fit: &'a Fit,
    /// What is learnt, and what is held out.
    pub rows: &'a Rows,
    /// Where the model and the rows come from.
    pub origin: &'a Origin,
    /// The base model's folder.
    pub base: &'a Path,
}

/// Trains from `state`, or from the start, to the finished adapter.
pub fn run<B: Backend>(
    job: &Job<'_>,
    model: &Model<B>,
    folder: Folder,
    state: Option<State>,
) -> Result<()> {
    let fresh = state.is_none();
    let mut trainer = Trainer::new(job, model, folder, state)?;
    trainer.estimate()?;
    // The first call takes the signals over: from here on they wait for a step's end.
    job.app.interrupted()?;
    match fresh {
        true => job.app.keeps("there is no checkpoint yet"),
        false => trainer.keeps(trainer.step),
    }
    if fresh {
        trainer.evaluate()?;
    }
    let t = &job.settings.training;
    let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
    while trainer.step < job.plan.steps && !trainer.watch.gave_up() {
        trainer.stop_if_diverged()?;
        trainer.heed_requests()?;
        trainer.update()?;
        if trainer.saving.as_ref().is_some_and(Saving::is_done) {
            trainer.settle()?;
        }
        let (step, last) = (trainer.step, trainer.step == job.plan.steps);
        if due(step, t.eval_steps) || last {
            trainer.evaluate()?;
        }
        if due(step, t.save_steps) || last || trainer.watch.gave_up() {
            trainer.save()?;
        }
    }
    trainer.publish()
}

/// The optimiser that the settings ask for.
pub fn optimiser_of(settings: &TrainSettings) -> OptimiserKind {
    OptimiserKind {
        eight_bit: settings.training.optim == Optim::AdamW8bit,
        lr_ratio: settings.lora.lr_ratio,
    }
}

/// A run under way.
struct Trainer<'a, B: Backend> {
    job: &'a Job<'a>,
    model: &'a Model<B>,
    /// The last checkpoint, until it is known to be on the disk. It is waited for before the
    /// folder behind it is given up, which another run may take then: fields go in their order.
    saving: Option<Saving>,
    lines: Lines,
    progress: Progress<'a>,
    stream: Stream<'a>,
    pass: Pass<B>,
    params: B::F32,
    grads: B::F32,
    optimiser: Optimiser<B>,
    /// Updates done.
    step: u64,
    pending: Option<Pending<B>>,
    /// When the first step of this process began, and how long all of them were
    /// thought to take.
    begun: Instant,
    estimated: Duration,
    /// When the last step's figures were there.
    ready: Instant,
    watch: Watch,
    spikes: Spikes,
    /// Whether a `save-now` that does not go away has been told of.
    stuck: bool,
    /// Step and held-out loss of this process's last evaluation.
    last_eval: Option<(u64, f64)>,
}

impl<'a, B: Backend> Trainer<'a, B> {
    fn new(
        job: &'a Job<'a>,
        model: &'a Model<B>,
        folder: Folder,
        state: Option<State>,
    ) -> Result<Self> {
        let (backend, layout) = (model.backend(), &job.plan.layout);
        let kind = optimiser_of(job.settings);
        let (step, params, optimiser) = match state {
            None => {
                let fresh = || model.initial(layout, job.settings.training.seed);
                let values = job.plan.initial.clone().map_or_else(fresh, Ok)?;
                let params = model.adapter_params(layout, &values)?;
                (0, params, Optimiser::new(backend, layout, kind)?)
            }
            Some(State {
                step,
                params,
                moments,
            }) => {
                anyhow::ensure!(
                    params.len() == layout.len() && moments.fit(&kind, layout),
                    "the checkpoint is of another adapter"
                );
                let optimiser = Optimiser::restore(backend, layout, kind, &moments, step)?;
                (step, model.adapter_params(layout, &params)?, optimiser)
            }
        };
        let t = &job.settings.training;
        let progress = job.app.progress("training", Some(job.plan.steps));
        progress.set(step);
        let seen = folder.figures()?;
        // Reserved whole, so that what is planned is what is taken.
        let mut pass = Pass::new(job.fit.keep);
        pass.reserve(model, job.fit.survey.extent, Some(layout))?;
        Ok(Self {
            optimiser,
            grads: backend.alloc_f32(layout.len())?,
            pass,
            stream: Stream::new(&job.rows.train, t.seed, t.shuffle),
            watch: Watch::new(t, &seen),
            spikes: Spikes::new(t, &seen),
            lines: Lines::new(folder),
            pending: None,
            begun: Instant::now(),
            estimated: Duration::ZERO,
            ready: Instant::now(),
            last_eval: None,
            saving: None,
            stuck: false,
            job,
            model,
            progress,
            params,
            step,
        })
    }

    /// Says how long it will take.
    fn estimate(&mut self) -> Result<()> {
        let (plan, fit) = (self.job.plan, self.job.fit);
        let first = self.step * plan.rows_per_step as u64;
        let rows = first..first + plan.rows_per_step as u64;
        let rows: Vec<&Row> = rows.map(|at| self.stream.row(at)).collect();
        let mut probe = Probe {
            model: self.model,
            layout: &plan.layout,
            params: &mut self.params,
            grads: &mut self.grads,
            pass: &mut self.pass,
        };
        let first = passes(&rows, fit.pass_tokens).swap_remove(0);
        let pace = probe.pace(self.job.settings, &first, &fit.survey)?;
        let time = pace.run(self.job.settings, plan, &fit.survey, self.step);
        self.job
            .app
            .detail(format_args!("time: about {}: {pace}", About(time)));
        self.begun = Instant::now();
        self.ready = self.begun;
        self.estimated = time;
        Ok(())
    }

    /// One optimiser step over exactly its rows. Its figures are read while the
    /// next one is under way.
    fn update(&mut self) -> Result<()> {
        let started = Instant::now();
        let (t, plan) = (&self.job.settings.training, self.job.plan);
        let first = self.step * plan.rows_per_step as u64;
        self.step += 1;
        let rows: Vec<&Row> = (0..plan.rows_per_step as u64)
            .map(|i| self.stream.row(first + i))
            .collect();
        let supervised_tokens: usize = rows.iter().map(|row| row.targets()).sum();
        let noise = StepNoise {
            dropout: self.job.settings.lora.dropout as f32,
            neftune_alpha: t.neftune_noise_alpha.unwrap_or(0.0) as f32,
            seed: t.seed,
            step: self.step as u32,
        };
        let scale = (1.0 / supervised_tokens as f64) as f32;
        let mut losses = Vec::new();
        for rows in passes(&rows, self.job.fit.pass_tokens) {
            let batch = Batch::new(self.model.backend(), &rows)?;
            let lora = Lora {
                layout: &plan.layout,
                params: &self.params,
            };
            losses.push(self.model.losses_and_gradients(
                &mut self.pass,
                &batch,
                lora,
                Some(noise),
                (&mut self.grads, scale),
            )?);
        }
        let with = Update {
            lr: learning_rate(t, self.step, plan.steps),
            weight_decay: t.weight_decay,
            max_norm: Some(t.max_grad_norm as f32).filter(|&norm| norm > 0.0),
        };
        let backend = self.model.backend();
        let norm = self
            .optimiser
            .update(backend, with, &mut self.grads, &mut self.params);
        self.model
            .renew_norms(&mut self.pass, &plan.layout, &mut self.params)?;
        let line = StepLine {
            step: self.step,
            epoch: (self.step * plan.rows_per_step as u64) as f64
                / self.job.rows.train.len() as f64,
            loss: f64::NAN,
            grad_norm: f64::NAN,
            learning_rate: with.lr,
            tokens: rows.iter().map(|row| row.ids.len()).sum(),
            supervised_tokens,
        };
        let before = self.pending.replace(Pending {
            line,
            losses,
            norm,
            started,
            queued: Instant::now(),
        });
        before.map_or(Ok(()), |step| self.report(step))
    }

    /// Waits for the figures of what is queued.
    fn catch_up(&mut self) -> Result<()> {
        self.pending.take().map_or(Ok(()), |step| self.report(step))
    }

    /// Reads a step's figures and writes its lines.
    fn report(&mut self, step: Pending<B>) -> Result<()> {
        let waiting = Instant::now();
        let mut line = step.line;
        let mut sum = 0.0;
        for losses in step.losses {
            let nll = losses.wait()?;
            sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        }
        line.loss = sum / line.supervised_tokens as f64;
        line.grad_norm = f64::from(step.norm.wait()?[0]);
        if !(line.loss.is_finite() && line.grad_norm.is_finite()) {
            return Err(self.no_number(line.step, "the loss is", line.step - 1));
        }
        self.tell(&line)?;
        if let Some(spike) = self.spikes.see(line.step, line.loss, line.grad_norm) {
            self.job.app.warn(format_args!(
                "step {}: {} {:.4}, {:.4} in the steps before: a bad batch; where it does not come back, \
                 training.learning_rate {} is too high",
                line.step,
                spike.what,
                spike.value,
                spike.median,
                self.job.settings.training.learning_rate
            ));
        }

        // A step is done when its figures are there: if a device that runs ahead had to be
        // waited for, now; else when it was queued. It began when the one before was done.
        let waited = B::RUNS_AHEAD && waiting.elapsed() >= Duration::from_micros(200);
        let ready = match waited {
            true => Instant::now(),
            false => step.queued,
        };
        let seconds = ready
            .duration_since(step.started.max(self.ready))
            .as_secs_f64();
        self.ready = ready;
        let tokens_per_second = (seconds > 0.0).then(|| line.tokens as f64 / seconds);
        let taken = self.job.fit.taken_so_far(self.model.backend());
        let time = TimeLine {
            step: line.step,
            seconds,
            tokens_per_second,
            peak_memory_mb: taken.map(|taken| taken.bytes / 1_000_000),
        };
        self.lines.folder.timing(&serde_json::to_string(&time)?)?;
        let pace = tokens_per_second.map(|pace| format!(", {pace:.0} tokens/s"));
        let message = format!("loss {:.4}{}", line.loss, pace.unwrap_or_default());
        self.progress.set_with(line.step, &message);
        Ok(())
    }

    /// Writes a line of figures.
    fn tell(&mut self, line: &impl Serialize) -> Result<()> {
        let open = self.lines.stdout.is_some();
        self.lines.metric(line)?;
        if let (true, Some(error)) = (open, &self.lines.lost) {
            let folder = self.lines.folder.path().display();
            self.job.app.warn(format_args!(
                "{error}: the run goes on, and its lines only to {folder}/metrics.jsonl"
            ));
        }
        Ok(())
    }

    /// Ends a run whose loss has left for good, with its last step saved. While a spike
    /// lasts, figures are not read a step late: the run is to end at the same step
    /// whether it was interrupted or not.
    fn stop_if_diverged(&mut self) -> Result<()> {
        if self.spikes.under_way() {
            self.catch_up()?;
        }
        let Some((steps, median)) = self.spikes.diverged() else {
            return Ok(());
        };
        self.save()?;
        self.settle()?;
        let step = self.step;
        Err(Failure::World(format!(
            "step {step}: the loss has been far above the {median:.4} before for {steps} steps, and is not falling: \
             lower training.learning_rate ({}) and train in another folder (make: RUN=new); step {step} is saved, \
             and training.spike_factor 0 with --resume goes on all the same, where harder rows are behind it",
            self.job.settings.training.learning_rate
        ))
        .into())
    }

    /// A checkpoint that someone asked for, and the end where a signal did.
    fn heed_requests(&mut self) -> Result<()> {
        let (app, step) = (self.job.app, self.step);
        if app.asked_to_save()? || self.asked_by_file() {
            self.save()?;
            self.settle()?;
            app.info(format_args!("step {step} is saved"));
        }
        if app.interrupted()? {
            self.save()?;
            self.settle()?;
            let cause = format!("interrupted; step {step} is saved, --resume goes on");
            return Err(Failure::Interrupted(cause).into());
        }
        Ok(())
    }

    /// Whether someone asked by a file. One that cannot be taken away would ask for ever,
    /// and is told of once instead.
    fn asked_by_file(&mut self) -> bool {
        self.lines.folder.asked_to_save().unwrap_or_else(|error| {
            if !std::mem::replace(&mut self.stuck, true) {
                let cause = "no checkpoint for it: it cannot be taken away; put an empty file there, or send SIGUSR1";
                self.job.app.warn(format_args!("{error:#}: {cause}"));
            }
            false
        })
    }

    /// Begins to save a checkpoint, once the one before is on the disk.
    fn save(&mut self) -> Result<()> {
        self.catch_up()?;
        self.settle()?;
        let (backend, step) = (self.model.backend(), self.step);
        let moments = self.optimiser.moments(backend);
        let params = backend.read_f32(&self.params, 0..self.job.plan.layout.len());
        let state = move || {
            Ok(State {
                step,
                params: finite(params.wait()?)?,
                moments: moments()?,
            })
        };
        let keep = self.job.settings.training.save_total_limit;
        self.saving = Some(self.lines.folder.save(step, state, keep)?);
        Ok(())
    }

    /// Waits until the last checkpoint is on the disk.
    fn settle(&mut self) -> Result<()> {
        if let Some(saving) = self.saving.take() {
            let step = saving.step;
            saving.finish().map_err(|error| self.cause(step, error))?;
            self.keeps(step);
        }
        Ok(())
    }

    /// Notes what an end without a checkpoint leaves.
    fn keeps(&self, step: u64) {
        let kept = format_args!("the last checkpoint is that of step {step}, --resume goes on");
        self.job.app.keeps(kept);
    }

    /// All adapter parameters as they are now.
    fn values(&self) -> Result<Vec<f32>> {
        let all = 0..self.job.plan.layout.len();
        let values = self.model.backend().read_f32(&self.params, all).wait()?;
        finite(values).map_err(|error| self.cause(self.step, error))
    }

    /// What is behind an error in reading the adapter of a step.
    fn cause(&self, step: u64, error: anyhow::Error) -> anyhow::Error {
        match error.is::<NoNumber>() {
            true => self.no_number(step, "a value of the adapter is", step),
            false => error,
        }
    }

    /// Evaluates on the held-out rows, if there are any, and takes note of it.
    fn evaluate(&mut self) -> Result<()> {
        self.catch_up()?;
        let Some(line) = self.held_out_loss()? else {
            return Ok(());
        };
        self.tell(&line)?;
        self.last_eval = Some((line.step, line.eval_loss));
        let better = self.watch.see(line.step, line.eval_loss);
        if better && self.job.settings.training.load_best_model_at_end {
            self.lines.folder.save_best(line.step, &self.values()?)?;
        }
        Ok(())
    }

    fn held_out_loss(&mut self) -> Result<Option<EvalLine>> {
        let rows: Vec<&Row> = self.job.rows.eval.iter().collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let lora = Lora {
            layout: &self.job.plan.layout,
            params: &self.params,
        };
        // An evaluation keeps nothing, and so can have longer passes in less memory; it
        // and the training take turns.
        self.pass.release();
        let mut pass = Pass::new(Keep::Nothing);
        let (mut sum, mut tokens) = (0.0, 0);
        let progress = self.job.app.progress("evaluating", Some(rows.len() as u64));
        for rows in passes(&rows, self.job.fit.survey.held_out_most) {
            let batch = Batch::new(self.model.backend(), &rows)?;
            let nll = self.model.losses(&mut pass, &batch, Some(lora))?.wait()?;
            sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
            tokens += nll.len();
            progress.add(rows.len() as u64);
        }
        drop(pass);
        let (fit, layout) = (self.job.fit, &self.job.plan.layout);
        self.pass
            .reserve(self.model, fit.survey.extent, Some(layout))?;
        let eval_loss = sum / tokens as f64;
        if !eval_loss.is_finite() {
            let (step, what) = (self.step, "the held-out loss is");
            return Err(self.no_number(step, what, step));
        }
        Ok(Some(EvalLine {
            step: self.step,
            eval_loss,
            eval_perplexity: eval_loss.exp(),
            eval_tokens: tokens,
        }))
    }

    /// The end of a run that cannot come back: to resume would repeat every step to it.
    /// After `updates` of them that made it so; where there was none, no learning rate did.
    fn no_number(&self, step: u64, what: &str, updates: u64) -> anyhow::Error {
        let (job, base) = (self.job, self.job.base.display());
        let remedy = match updates {
            0 => {
                let adapter = match job.identity.init_adapter {
                    Some(_) => " (or those of --init-adapter are too large)",
                    None => "",
                };
                let again = hub::remedy(&job.settings.model.path, job.base);
                format!(
                    "nothing was learnt yet, so values in the base model's folder are no numbers{adapter}: \
                     `qlora-train inspect '{base}'` says which; {again}, and train in another \
                     folder (make: RUN=new)"
                )
            }
            _ => "lower training.learning_rate and train in another folder (make: RUN=new)".into(),
        };
        Failure::World(format!("step {step}: {what} no longer a number: {remedy}")).into()
    }

    /// What was planned and estimated, and how it came out.
    fn compare_with_plan(&self) {
        let (app, fit) = (self.job.app, self.job.fit);
        let (took, estimated) = (About(self.begun.elapsed()), About(self.estimated));
        app.detail(format_args!("took {took}; estimated: {estimated}"));
        if let Some(taken) = fit.taken_at_the_end(self.model.backend()) {
            match fit.outcome(taken) {
                (line, true) => app.warn(line),
                (line, false) => app.detail(line),
            }
        }
    }

    /// Puts the finished adapter, the last or the best, into the folder.
    fn publish(mut self) -> Result<()> {
        let (app, t, plan) = (self.job.app, &self.job.settings.training, self.job.plan);
        self.catch_up()?;
        self.settle()?;
        if self.watch.gave_up() {
            app.info(format_args!(
                "stopped after step {}: no better held-out loss in {} evaluations",
                self.step, t.early_stopping_patience
            ));
        }
        self.compare_with_plan();
        let best = self.watch.best.filter(|_| t.load_best_model_at_end);
        let (values, eval_loss) = match best {
            Some((step, loss)) => {
                app.info(format_args!(
                    "the adapter is that of step {step}, held-out loss {loss:.4}"
                ));
                (self.lines.folder.read_best(step)?, Some(loss))
            }
            // A run that was killed after its last checkpoint has its line already.
            None => {
                let known = self.last_eval.filter(|(step, _)| *step == self.step);
                let loss = match known {
                    Some((_, loss)) => Some(loss),
                    None => self.held_out_loss()?.map(|line| line.eval_loss),
                };
                (self.values()?, loss)
            }
        };
        if let (Some(before), Some(loss)) = (self.watch.before, eval_loss)
            && loss > before
        {
            let at = best.map_or(self.step, |(step, _)| step);
            app.warn(format_args!(
                "the adapter is worse than what it began from: held-out loss {loss:.4} after step {at}, {before:.4} \
                 before the first; lower training.learning_rate ({}), or take fewer steps",
                t.learning_rate
            ));
        }
        let adapter = Adapter {
            config: plan.adapter.clone(),
            pairs: plan.layout.split(&values),
        };
        let (settings, rows) = (self.job.settings, self.job.rows);
        let card = crate::card::render(&Card {
            settings,
            identity: self.job.identity,
            folder: self.lines.folder.path(),
            rows,
            origin: self.job.origin,
            figures: &self.lines.folder.figures()?,
            steps: self.step,
            best: best.map(|(step, _)| step),
            eval_loss,
            spikes: &self.spikes.seen,
        })?;
        let folder = self.lines.folder.path();
        put_into(
            folder,
            settings,
            &adapter,
            self.model.config(),
            (&card, &rows.seen),
        )?;
        // What was asked for in the last moments has come of itself.
        self.asked_by_file();
        let folder = self.lines.folder.path();
        app.info(format_args!("the adapter is in {}", folder.display()));
        app.count(Counts {
            read: (rows.train.len() + rows.eval.len()) as u64,
            written: self.lines.written,
            rejected: 0,
        });
        let finished = self.lines.stdout.take().map(Output::finish);
        match self.lines.lost.take().or(finished.and_then(Result::err)) {
            None | Some(WriteError::ReaderGone) => Ok(()),
            Some(error) => Err(Failure::World(format!(
                "{error}: lines are missing there; the run is finished, and {}/metrics.jsonl has them all",
                folder.display()
            ))
            .into()),
        }
    }
}

/// Writes an adapter with its card and settings; its weights come last, for their
/// name is the sign that the run is finished.
fn put_into(
    folder: &Path,
    settings: &TrainSettings,
    adapter: &Adapter,
    config: &Config,
    (card, seen): (&str, &Seen),
) -> Result<()> {
    let part = folder.join("adapter.tmp");
    if part.exists() {
        std::fs::remove_dir_all(&part).with_context(|| part.display().to_string())?;
    }
    std::fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
    adapter.save(&part, config)?;
    jsonl::write_atomically(&folder.join("README.md"), card.as_bytes())?;
    let snapshot = serde_saphyr::to_string(settings).context("writing the settings")?;
    jsonl::write_atomically(&folder.join(qwen3::SETTINGS), snapshot.as_bytes())?;
    jsonl::write_atomically(&folder.join(ROWS), seen.to_lines().as_bytes())?;
    write_sums(folder, &part)?;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::rename(part.join(name), folder.join(name))
            .with_context(|| folder.join(name).display().to_string())?;
        // What came before the weights is not to be lost where their name is not.
        sync_names(folder).with_context(|| folder.display().to_string())?;
    }
    std::fs::remove_dir(&part).with_context(|| part.display().to_string())
}
