//! What a run will do, before it does it.

use anyhow::Result;
use cli::Failure;
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout};
use settings::TrainSettings;

use crate::lora;
use crate::rows::{Row, Rows};

/// What a run will do, before it does it.
pub struct Plan {
    /// Optimiser steps of the whole run.
    pub steps: u64,
    /// Rows of each.
    pub rows_per_step: usize,
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
            adapter,
            layout,
            initial: given.transpose()?,
        })
    }

    /// The plan in a line.
    pub fn describe(&self, rows: &Rows) -> String {
        let tokens = |rows: &[Row]| rows.iter().map(|row| row.ids.len()).sum::<usize>();
        let labelled: usize = rows.train.iter().map(Row::targets).sum();
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
