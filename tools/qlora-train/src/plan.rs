//! What a run will do, before it does it.

use std::collections::BTreeSet;

use anyhow::Result;
use cli::Failure;
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout, Module};
use settings::{TargetModules, TrainSettings};

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
    /// The values to start from.
    pub initial: Vec<f32>,
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
