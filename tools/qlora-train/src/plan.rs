//! What a run will do, before it does it.

use anyhow::Result;
use cli::Failure;
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout};
use settings::TrainSettings;

use crate::lora;
use crate::rows::{Row, Rows};
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
        let (adapter, layout) = lora::layout(settings, config)?;
        let given = initial.map(|given| lora::values_of(given, &layout, config));
        Ok(Self {
            steps: t.max_steps.unwrap_or(epochs).max(1),
            rows_per_step,
            batch_size: t.batch_size,
            adapter,
            layout,
            initial: given.transpose()?,
        })
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
                "{} rows to train on ({tokens} tokens, {labelled} to learn), {} held out",
                rows.train.len(),
                rows.eval.len(),
            ),
            format!(
                "{} steps of {} rows; {} trained parameters",
                self.steps,
                self.rows_per_step,
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
