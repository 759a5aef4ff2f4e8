//! What a run will do, before it does it.

use anyhow::Result;
use cli::{Failure, Resolved};
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout};
use settings::TrainSettings;

use crate::lora;
use crate::rows::{Row, Rows};
use crate::schedule;
use crate::stream::Survey;

/// What a run will do, before it does it.
pub struct Plan {
    /// Optimiser steps of the whole run.
    pub steps: u64,
    /// Rows of each.
    pub rows_per_step: usize,
    /// Rows of a batch, of which a step has one or several.
    pub batch_size: usize,
    /// What is trained.
    pub adapter: AdapterConfig,
    /// Where its values lie.
    pub layout: LoraLayout,
    /// The values to start from, if not fresh ones.
    pub initial: Option<Vec<f32>>,
}

/// Most rows of a step, which are listed at once: some thousands are the most that helped
/// anyone.
const MOST_ROWS: usize = 1 << 20;

/// Rows of an optimiser step.
///
/// # Errors
/// If there are more than any run could be meant to have.
pub fn rows_per_step(resolved: &Resolved<TrainSettings>) -> Result<usize, Failure> {
    let t = &resolved.settings.training;
    let (batch, accumulated) = (t.batch_size, t.gradient_accumulation_steps);
    let rows = batch.checked_mul(accumulated);
    rows.filter(|&rows| rows <= MOST_ROWS).ok_or_else(|| {
        // The larger of the two is above its default: it was given.
        let mut factors = [
            (batch, "training.batch_size"),
            (accumulated, "training.gradient_accumulation_steps"),
        ];
        factors.sort_by_key(|&(factor, _)| std::cmp::Reverse(factor));
        let [(large, key), (small, other)] = factors;
        let cause = format!("× {other} is {large} × {small}: more than {MOST_ROWS} rows a step");
        resolved.wrong(key, cause)
    })
}

impl Plan {
    /// Works out steps and adapter; refuses what cannot be.
    pub fn new(
        resolved: &Resolved<TrainSettings>,
        config: &Config,
        rows: &Rows,
        initial: Option<&Adapter>,
    ) -> Result<Self> {
        let settings = &resolved.settings;
        let t = &settings.training;
        let rows_per_step = rows_per_step(resolved)?;
        let epochs = (t.num_epochs * rows.train.len() as f64 / rows_per_step as f64).ceil() as u64;
        let (adapter, layout) = lora::layout(resolved, config)?;
        let given = initial.map(|given| lora::values_of(given, &adapter, &layout, config));
        Ok(Self {
            steps: t.max_steps.unwrap_or(epochs).max(1),
            rows_per_step,
            batch_size: t.batch_size,
            adapter,
            layout,
            initial: given.transpose()?,
        })
    }

    /// What is probably not meant.
    pub fn doubts(&self, settings: &TrainSettings, rows: &Rows) -> Vec<String> {
        let (t, steps) = (&settings.training, self.steps);
        let mut doubts = Vec::new();
        let warmup = schedule::warmup(t, steps);
        if warmup >= steps {
            let highest = schedule::learning_rate(t, steps, steps);
            let learns = match highest > 0.0 {
                true => format!(
                    "it ends at {highest:.1e} and never reaches {}",
                    t.learning_rate
                ),
                false => "it is 0 throughout, and nothing is learnt".into(),
            };
            let key = match t.warmup_ratio {
                Some(_) => "warmup_ratio",
                None => "warmup_steps",
            };
            doubts.push(format!(
                "the learning rate climbs from 0 for {}, and the run has {}: {learns}; lower training.{key}, to 0 \
                 for none",
                cli::counted(warmup as usize, "step"),
                cli::counted(steps as usize, "step"),
            ));
        }
        let (train, per_step) = (rows.train.len(), self.rows_per_step);
        if t.max_steps.is_none() && per_step as f64 > t.num_epochs * train as f64 {
            doubts.push(format!(
                "a step is {} (training.batch_size {} × gradient_accumulation_steps {}), and there are {train} to \
                 train on: each is seen {} times, not {} (training.num_epochs); lower one of the two",
                cli::counted(per_step, "row"),
                t.batch_size,
                t.gradient_accumulation_steps,
                (100.0 * per_step as f64 / train as f64).round() / 100.0,
                t.num_epochs,
            ));
        }
        doubts
    }

    /// The plan in lines.
    pub fn describe(&self, rows: &Rows, survey: &Survey) -> Vec<String> {
        let tokens: usize = rows.train.iter().map(|row| row.ids.len()).sum();
        let labelled: usize = rows.train.iter().map(Row::targets).sum();
        let padding = 100.0 * (1.0 - survey.tokens as f64 / survey.padded as f64);
        let passes = survey.passes as f64 / survey.steps as f64;
        let decimals = usize::from(!survey.passes.is_multiple_of(survey.steps));
        vec![
            format!(
                "{} to train on ({}, {labelled} to learn), {} held out",
                cli::counted(rows.train.len(), "row"),
                cli::counted(tokens, "token"),
                rows.eval.len(),
            ),
            format!(
                "{} of {}; {} trained parameters",
                cli::counted(self.steps as usize, "step"),
                cli::counted(self.rows_per_step, "row"),
                self.layout.len(),
            ),
            format!(
                "{passes:.decimals$} {} a step, of {:.0} tokens on average and {} at most",
                if passes == 1.0 { "pass" } else { "passes" },
                survey.tokens as f64 / survey.passes as f64,
                survey.extent.tokens,
            ),
            match self.batch_size {
                1 => "packing: nothing is padding".into(),
                rows => format!(
                    "packing: nothing is padding; of padded batches of {rows} rows {padding:.0}% would be"
                ),
            },
        ]
    }
}
