//! How long a run will take, from a few passes of it.
//!
//! A pass takes a fixed time, for what is read and decoded however few tokens there
//! are, and a time for each token. Passes of two sizes tell both. With the model at hand
//! they are the run's own first rows; before it is loaded, two of its layers stand for
//! all. Nothing of the run is touched: gradients are cleared again, and no value is
//! updated.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use engine::{Backend, Reading};
use qwen3::{
    AdapterConfig, Batch, Checkpoint, Config, Ends, Held, Keep, Lora, LoraLayout, Model, Pass, Row,
    StepNoise,
};
use settings::TrainSettings;

use crate::memory::Fit;
use crate::plan::Plan;
use crate::stream::{Stream, Survey, passes};

/// The most that a probe may take, unless a two-hundredth of the run is longer.
const PROBE: f64 = 2.0;

/// How long things take, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// A pass, however short.
    fixed: f64,
    /// Each of its tokens.
    per_token: f64,
    /// An evaluation's pass, as a part of one with gradients.
    forward: f64,
    /// A step, beside its passes.
    step: f64,
    /// Tokens of the longest pass that was timed.
    tokens: usize,
}

impl Pace {
    /// A run from `done` steps on.
    pub fn run(
        &self,
        settings: &TrainSettings,
        plan: &Plan,
        survey: &Survey,
        done: u64,
    ) -> Duration {
        let every = settings.training.eval_steps;
        let left = plan.steps.saturating_sub(done);
        let evaluations = match every {
            0 => u64::from(left > 0),
            every => plan.steps.div_ceil(every) - done / every,
        };
        let evaluations = evaluations.saturating_add(u64::from(done == 0));
        let passes =
            |passes: u64, tokens: u64| passes as f64 * self.fixed + tokens as f64 * self.per_token;
        let step = self.step + passes(survey.passes, survey.tokens) / survey.steps as f64;
        let evaluation = self.forward * passes(survey.held_out[0], survey.held_out[1]);
        let seconds = left as f64 * step + evaluations as f64 * evaluation;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Of a whole model, from that of models with one of its layers and with two.
    fn of_layers(one: Self, two: Self, layers: usize) -> Self {
        let more = layers as f64 - 1.0;
        let extend = |one: f64, two: f64| one + more * (two - one).max(0.0);
        Self {
            fixed: extend(one.fixed, two.fixed),
            per_token: extend(one.per_token, two.per_token),
            step: extend(one.step, two.step),
            ..two
        }
    }
}

impl fmt::Display for Pace {
    /// What it comes from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.fixed + self.tokens as f64 * self.per_token;
        write!(f, "a pass of {} tokens takes {seconds:.2} s", self.tokens)
    }
}

/// What a probe runs on.
pub struct Probe<'a, B: Backend> {
    /// The model.
    pub model: &'a Model<B>,
    /// The adapter.
    pub layout: &'a LoraLayout,
    /// Its values.
    pub params: &'a mut B::F32,
    /// Gradients, zero; they will be again.
    pub grads: &'a mut B::F32,
    /// Buffers.
    pub pass: &'a mut Pass<B>,
}

impl<B: Backend> Probe<'_, B> {
    /// Times passes of the given rows: the first alone, then as many as there is time for.
    pub fn pace(
        &mut self,
        settings: &TrainSettings,
        rows: &[Row<'_>],
        run: &Survey,
    ) -> Result<Pace> {
        let small = &rows[..1];
        self.training(settings, small)?; // the first time takes longer
        let seconds = self.least(|probe| probe.training(settings, small))?;
        let tokens = rows[0].ids.len();
        let per_token = seconds / tokens as f64;
        let budget = PROBE.max(per_token * run.tokens as f64 / 200.0);
        let mut most = 0;
        let longer = rows.iter().take_while(|row| {
            most += row.ids.len();
            most as f64 * per_token <= budget
        });
        let large = &rows[..longer.count().max(1)];
        let mut pace = Pace {
            fixed: 0.0,
            per_token,
            forward: 0.5,
            step: 0.0,
            tokens,
        };
        if large.len() > 1 {
            let whole = self.least(|probe| probe.training(settings, large))?;
            let all: usize = large.iter().map(|row| row.ids.len()).sum();
            pace.per_token = ((whole - seconds) / (all - tokens) as f64).max(0.0);
            pace.fixed = (seconds - pace.per_token * tokens as f64).max(0.0);
            pace.forward = self.least(|probe| probe.evaluation(large))? / whole;
            pace.tokens = all;
        }
        pace.step = self.norms()?;
        self.model.backend().zero(self.grads, self.layout.len());
        Ok(pace)
    }

    /// The shortest of a few times: other programs only ever make it longer.
    fn least(&mut self, mut seconds: impl FnMut(&mut Self) -> Result<f64>) -> Result<f64> {
        let mut least = seconds(self)?;
        let mut all = least;
        while all < 0.02 {
            let again = seconds(self)?;
            least = least.min(again);
            all += again;
        }
        Ok(least)
    }

    fn training(&mut self, settings: &TrainSettings, rows: &[Row<'_>]) -> Result<f64> {
        let started = Instant::now();
        let noise = StepNoise {
            dropout: settings.lora.dropout as f32,
            neftune_alpha: settings.training.neftune_noise_alpha.unwrap_or(0.0) as f32,
            seed: 0,
            step: 0,
        };
        let batch = Batch::new(self.model.backend(), rows)?;
        let lora = Lora {
            layout: self.layout,
            params: self.params,
        };
        let grads = (&mut *self.grads, 1.0);
        let losses =
            (self.model).losses_and_gradients(self.pass, &batch, lora, Some(noise), grads)?;
        losses.wait()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn evaluation(&mut self, rows: &[Row<'_>]) -> Result<f64> {
        let started = Instant::now();
        let batch = Batch::new(self.model.backend(), rows)?;
        let lora = Lora {
            layout: self.layout,
            params: self.params,
        };
        self.model.losses(self.pass, &batch, Some(lora))?.wait()?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// What follows each update: nothing, unless there is DoRA.
    fn norms(&mut self) -> Result<f64> {
        let started = Instant::now();
        self.model
            .renew_norms(self.pass, self.layout, self.params)?;
        self.model.backend().read_f32(self.params, 0..1).wait()?;
        Ok(started.elapsed().as_secs_f64())
    }
}

/// The pace of a model that is not loaded, by two of its layers. On those, adapters
/// are on every product if the settings name none.
pub fn preview<B: Backend>(
    backend: B,
    (checkpoint, held): (&Checkpoint, Held),
    (settings, plan, fit): (&TrainSettings, &Plan, &Fit),
    rows: &[crate::rows::Row],
) -> Result<Pace> {
    let layers = checkpoint.config().layers;
    let few = |layers| Config {
        layers,
        ..checkpoint.config().clone()
    };
    let two = layers.min(2);
    let ends = Ends {
        embedding: checkpoint.embedding()?,
        final_norm: checkpoint.final_norm()?,
        lm_head: checkpoint.lm_head_by(held.head, |matrix| backend.quantize(matrix))?,
    };
    let first = (0..two).map(|layer| checkpoint.layer(layer, held.products));
    let mut model: Model<B> = Model::new(backend, few(two), ends, first)?;
    // As the greater part of the layers does.
    if 2 * fit.decoded >= layers {
        model.keep_decoded(two)?;
    }
    let keep = match fit.keep {
        Keep::Layers(kept) if 2 * kept < layers => Keep::Layers(0),
        _ => Keep::All,
    };
    let t = &settings.training;
    let mut stream = Stream::new(rows, t.seed, t.shuffle);
    let step: Vec<_> = (0..plan.rows_per_step as u64)
        .map(|at| stream.row(at))
        .collect();
    let first = passes(&step, fit.pass_tokens).swap_remove(0);
    let mut measured = |layers: usize| -> Result<Pace> {
        model.truncate(layers);
        let layout = LoraLayout::new(&few(layers), &plan.adapter).or_else(|_| {
            let everywhere = AdapterConfig {
                dora: plan.adapter.dora,
                ..AdapterConfig::new(plan.adapter.rank, plan.adapter.alpha)
            };
            LoraLayout::new(&few(layers), &everywhere)
        })?;
        let mut params = model.adapter_params(&layout, &model.initial(&layout, 0)?)?;
        let mut probe = Probe {
            grads: &mut model.backend().alloc_f32(layout.len())?,
            params: &mut params,
            pass: &mut Pass::new(keep),
            layout: &layout,
            model: &model,
        };
        probe.pace(settings, &first, &fit.survey)
    };
    let two = measured(two)?;
    match layers {
        0..=2 => Ok(two),
        _ => Ok(Pace::of_layers(measured(1)?, two, layers)),
    }
}

/// A time for people.
pub struct About(pub Duration);

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64().round() as u64;
        match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
            (0, 0, 0) => f.write_str("a second"),
            (0, 0, s) => write!(f, "{s} s"),
            (0, m @ ..10, s) => write!(f, "{m} min {s} s"),
            (0, m, _) => write!(f, "{m} min"),
            (h @ ..48, m, _) => write!(f, "{h} h {m} min"),
            (h, ..) => write!(f, "{} days {} h", h / 24, h % 24),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_people_do() {
        for (seconds, said) in [
            (0, "a second"),
            (59, "59 s"),
            (200, "3 min 20 s"),
            (7799, "2 h 9 min"),
            (5400, "1 h 30 min"),
            (270_000, "3 days 3 h"),
        ] {
            assert_eq!(About(Duration::from_secs(seconds)).to_string(), said);
        }
    }

    #[test]
    fn two_layers_tell_of_all() {
        let pace = |fixed, per_token| Pace {
            fixed,
            per_token,
            forward: 0.4,
            step: 0.0,
            tokens: 9,
        };
        // A head of 5 + 0.5 per token, layers of 2 + 0.25.
        let whole = Pace::of_layers(pace(7.0, 0.75), pace(9.0, 1.0), 36);
        assert_eq!((whole.fixed, whole.per_token), (77.0, 9.5));
    }
}
