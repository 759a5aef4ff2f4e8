//! What the settings' `lora` section means for a model.

use anyhow::Result;
use cli::Failure;
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout, Targets, Unfit};
use settings::{TargetModules, TrainSettings};

/// The largest alpha: far beyond what is of use.
pub const MOST_ALPHA: f64 = 1e6;

fn usage(cause: String) -> anyhow::Error {
    Failure::Usage(cause).into()
}

/// What is trained and where its values lie; refuses what matches nothing.
pub fn layout(settings: &TrainSettings, config: &Config) -> Result<(AdapterConfig, LoraLayout)> {
    let lora = &settings.lora;
    let width = config.hidden_size;
    for (name, &rank) in &lora.rank_pattern {
        if !(1..=width).contains(&rank) {
            let cause = "a rank is at least 1 and at most as the model is wide";
            return Err(usage(format!(
                "lora.rank_pattern is {rank} for `{name}`: {cause} ({width})"
            )));
        }
    }
    for (name, &alpha) in &lora.alpha_pattern {
        if !(alpha > 0.0 && alpha <= MOST_ALPHA) {
            return Err(usage(format!(
                "lora.alpha_pattern is {alpha} for `{name}`; it must be above 0 and at most {MOST_ALPHA}"
            )));
        }
    }
    // PEFT keeps a revision elsewhere than in the name.
    let (base, revision) = hub::parts(&settings.model.path);
    let adapter = AdapterConfig {
        base_model: base.to_owned(),
        revision: revision.map(str::to_owned),
        rank: lora.rank,
        alpha: lora.alpha,
        dropout: lora.dropout,
        targets: match &lora.target_modules {
            TargetModules::Named(text) => Targets::from_text(text),
            TargetModules::List(names) => Targets::Names(names.clone()),
        },
        rslora: lora.use_rslora,
        dora: lora.use_dora,
        rank_pattern: lora.rank_pattern.clone().into_iter().collect(),
        alpha_pattern: lora.alpha_pattern.clone().into_iter().collect(),
    };
    let layout = LoraLayout::new(config, &adapter)
        .map_err(|Unfit { key, reason }| usage(format!("lora.{key} {reason}")))?;
    Ok((adapter, layout))
}

/// The values of an adapter to start from, which must be of the settings' kind.
pub fn values_of(given: &Adapter, layout: &LoraLayout, config: &Config) -> Result<Vec<f32>> {
    if LoraLayout::new(config, &given.config)? != *layout {
        let cause = "--init-adapter: its ranks, alphas, target modules or DoRA are not those of `lora` in the settings";
        return Err(usage(cause.into()));
    }
    Ok(layout.flatten(&given.pairs))
}
