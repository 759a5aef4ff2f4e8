//! The training loop.
//!
//! An optimiser step is exactly `batch_size × gradient_accumulation_steps`
//! rows, in the order of a stream that runs through one shuffled epoch after
//! another. How the rows of a step are cut into passes decides only memory and
//! speed: each pass adds `∂ Σ nll / N` to the gradient, with N the labelled
//! tokens of the whole step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cli::{App, Counts, Failure, Progress};
use engine::{Backend, Reading};
use jsonl::{Output, WriteError};
use qwen3::{
    Adapter, Batch, Config, Keep, Lora, Losses, Model, Optimiser, Pass, StepDropout, Update,
};
use settings::TrainSettings;

use crate::figures::{EvalLine, Lines, StepLine, TimeLine, peak_memory_mb};
use crate::folder::{Folder, Identity, State};
use crate::plan::Plan;
use crate::rows::{Row, Rows};
use crate::schedule::learning_rate;
use crate::stream::{Stream, passes};
use crate::watch::Watch;

/// A step that is queued and whose figures are still to come.
struct Pending<B: Backend> {
    line: StepLine,
    losses: Vec<Losses<B>>,
    norm: B::Reading,
    started: Instant,
    queued: Instant,
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
    /// What is learnt, and what is held out.
    pub rows: &'a Rows,
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
    if fresh {
        trainer.evaluate()?;
    }
    let t = &job.settings.training;
    let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
    while trainer.step < job.plan.steps && !trainer.watch.gave_up() {
        trainer.heed_requests()?;
        trainer.update()?;
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

/// A run under way.
struct Trainer<'a, B: Backend> {
    job: &'a Job<'a>,
    model: &'a Model<B>,
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
    /// When the last step's figures were there.
    ready: Instant,
    watch: Watch,
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
        let (step, params, optimiser) = match state {
            None => {
                let params = backend.upload_f32(&job.plan.initial)?;
                (0, params, Optimiser::new(backend, layout.len())?)
            }
            Some(State { step, params, m, v }) => {
                anyhow::ensure!(
                    params.len() == layout.len(),
                    "the checkpoint is of another adapter"
                );
                let optimiser = Optimiser::restore(backend, &m, &v, step)?;
                (step, backend.upload_f32(&params)?, optimiser)
            }
        };
        let t = &job.settings.training;
        let progress = job.app.progress("training", Some(job.plan.steps));
        progress.set(step);
        Ok(Self {
            optimiser: optimiser.with_lr_ratio(layout, job.settings.lora.lr_ratio),
            grads: backend.alloc_f32(layout.len())?,
            pass: Pass::new(Keep::All),
            stream: Stream::new(&job.rows.train, t.seed, t.shuffle),
            watch: Watch::new(t, folder.eval_losses()?),
            lines: Lines {
                folder,
                stdout: Some(Output::stdout()),
            },
            pending: None,
            ready: Instant::now(),
            last_eval: None,
            job,
            model,
            progress,
            params,
            step,
        })
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
        let dropout = StepDropout {
            p: self.job.settings.lora.dropout as f32,
            seed: t.seed,
            step: self.step as u32,
        };
        let scale = (1.0 / supervised_tokens as f64) as f32;
        let mut losses = Vec::new();
        for rows in passes(&rows, t.packing) {
            let batch = Batch::new(self.model.backend(), &rows)?;
            let lora = Lora {
                layout: &plan.layout,
                params: &self.params,
            };
            losses.push(self.model.losses_and_gradients(
                &mut self.pass,
                &batch,
                lora,
                Some(dropout),
                (&mut self.grads, scale),
            )?);
        }
        let with = Update {
            lr: learning_rate(t, self.step, plan.steps),
            weight_decay: t.weight_decay,
            max_norm: Some(t.max_grad_norm as f32),
        };
        let backend = self.model.backend();
        let norm = self
            .optimiser
            .update(backend, with, &mut self.grads, &mut self.params);
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
            // To resume would repeat every step to the same end.
            let cause = "lower training.learning_rate and train in another folder (make: RUN=new)";
            return Err(Failure::World(format!(
                "step {}: the loss is no longer a number: {cause}",
                line.step
            ))
            .into());
        }
        self.lines.metric(&line)?;

        // A step is done when its figures are there: if they had to be waited for,
        // now; if not, when it was queued. It began when the one before was done.
        let ready = match waiting.elapsed() < Duration::from_micros(200) {
            true => step.queued,
            false => Instant::now(),
        };
        let seconds = ready
            .duration_since(step.started.max(self.ready))
            .as_secs_f64();
        self.ready = ready;
        let tokens_per_second = line.tokens as f64 / seconds.max(1e-9);
        let time = TimeLine {
            step: line.step,
            seconds,
            tokens_per_second,
            peak_memory_mb: peak_memory_mb(),
        };
        self.lines.folder.timing(&serde_json::to_string(&time)?)?;
        let message = format!("loss {:.4}, {tokens_per_second:.0} tokens/s", line.loss);
        self.progress.set_with(line.step, &message);
        Ok(())
    }

    /// A checkpoint that someone asked for, and the end where a signal did.
    fn heed_requests(&mut self) -> Result<()> {
        let (app, step) = (self.job.app, self.step);
        if app.asked_to_save()? || self.lines.folder.asked_to_save()? {
            self.save()?;
            app.info(format_args!("step {step} is saved"));
        }
        if app.interrupted()? {
            self.save()?;
            let cause = format!("interrupted; step {step} is saved, --resume goes on");
            return Err(Failure::Interrupted(cause).into());
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.catch_up()?;
        let (m, v) = self.optimiser.moments(self.model.backend())?;
        let state = State {
            step: self.step,
            params: self.values()?,
            m,
            v,
        };
        let keep = self.job.settings.training.save_total_limit;
        self.lines.folder.save(&state, keep)
    }

    /// All adapter parameters as they are now.
    fn values(&self) -> Result<Vec<f32>> {
        let all = 0..self.job.plan.layout.len();
        Ok(self.model.backend().read_f32(&self.params, all).wait()?)
    }

    /// Evaluates on the held-out rows, if there are any, and takes note of it.
    fn evaluate(&mut self) -> Result<()> {
        self.catch_up()?;
        let Some(line) = self.held_out_loss()? else {
            return Ok(());
        };
        self.lines.metric(&line)?;
        self.last_eval = Some((line.step, line.eval_loss));
        let better = self.watch.see(line.step, line.eval_loss);
        if better && self.job.settings.training.load_best_model_at_end {
            self.lines.folder.save_best(line.step, &self.values()?)?;
        }
        Ok(())
    }

    fn held_out_loss(&self) -> Result<Option<EvalLine>> {
        let rows: Vec<&Row> = self.job.rows.eval.iter().collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let mut pass = Pass::new(Keep::Nothing);
        let lora = Lora {
            layout: &self.job.plan.layout,
            params: &self.params,
        };
        let (mut sum, mut tokens) = (0.0, 0);
        let progress = self.job.app.progress("evaluating", Some(rows.len() as u64));
        for rows in passes(&rows, true) {
            let batch = Batch::new(self.model.backend(), &rows)?;
            let nll = self.model.losses(&mut pass, &batch, Some(lora))?.wait()?;
            sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
            tokens += nll.len();
            progress.add(rows.len() as u64);
        }
        let eval_loss = sum / tokens as f64;
        Ok(Some(EvalLine {
            step: self.step,
            eval_loss,
            eval_perplexity: eval_loss.exp(),
            eval_tokens: tokens,
        }))
    }

    /// Puts the finished adapter, the last or the best, into the folder.
    fn publish(mut self) -> Result<()> {
        let (app, t, plan) = (self.job.app, &self.job.settings.training, self.job.plan);
        self.catch_up()?;
        if self.watch.gave_up() {
            app.info(format_args!(
                "stopped after step {}: no better held-out loss in {} evaluations",
                self.step, t.early_stopping_patience
            ));
        }
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
        let adapter = Adapter {
            config: plan.adapter.clone(),
            pairs: plan.layout.split(&values),
        };
        let (settings, rows) = (self.job.settings, self.job.rows);
        let card = crate::card::render(settings, self.job.identity, self.step, rows, eval_loss);
        let folder = self.lines.folder.path();
        put_into(folder, settings, &adapter, self.model.config(), &card)?;
        app.info(format_args!("the adapter is in {}", folder.display()));
        app.count(Counts {
            read: (rows.train.len() + rows.eval.len()) as u64,
            written: self.step,
            rejected: 0,
        });
        match self.lines.stdout.take().map(Output::finish) {
            None | Some(Ok(()) | Err(WriteError::ReaderGone)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }
}

/// Writes an adapter with its card and settings; its weights come last, for their
/// name is the sign that the run is finished.
fn put_into(
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
