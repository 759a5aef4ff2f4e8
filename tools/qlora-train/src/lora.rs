//! What the settings' `lora` section means for a model.

use std::fmt::Display;
use std::path::Path;

use anyhow::Result;
use cli::{Failure, Resolved, shown};
use qwen3::{Adapter, AdapterConfig, Config, LoraLayout, Targets, Unfit};
use settings::{TargetModules, TrainSettings};

/// The largest alpha: far beyond what is of use.
const MOST_ALPHA: f64 = 1e6;

/// The smallest: with it the scale is a number of 32 bits still, whatever the rank.
const LEAST_ALPHA: f64 = 1e-6;

/// Refuses an alpha of no use, which no model would show to be wrong.
pub fn check_alphas(resolved: &Resolved<TrainSettings>) -> Result<(), Failure> {
    let lora = &resolved.settings.lora;
    let others = lora.alpha_pattern.iter();
    let others = others.map(|(name, &alpha)| (format!("lora.alpha_pattern.{name}"), alpha));
    let mut all = std::iter::once(("lora.alpha".to_owned(), lora.alpha)).chain(others);
    let wrong = all.find(|(_, alpha)| !(LEAST_ALPHA..=MOST_ALPHA).contains(alpha));
    wrong.map_or(Ok(()), |(key, alpha)| {
        let (is, least) = (shown(alpha), shown(LEAST_ALPHA));
        let cause = format!("is {is}; it must be at least {least} and at most {MOST_ALPHA}");
        Err(resolved.wrong(&key, cause))
    })
}

/// What is trained and where its values lie; refuses what matches nothing.
pub fn layout(
    resolved: &Resolved<TrainSettings>,
    config: &Config,
) -> Result<(AdapterConfig, LoraLayout)> {
    let settings = &resolved.settings;
    let lora = &settings.lora;
    let width = config.hidden_size;
    for (name, &rank) in &lora.rank_pattern {
        if !(1..=width).contains(&rank) {
            let key = format!("lora.rank_pattern.{name}");
            let most = "a rank is at least 1 and at most as the model is wide";
            let cause = format!("is {rank}: {most} ({width})");
            return Err(resolved.wrong(&key, cause).into());
        }
    }
    // PEFT keeps a revision elsewhere than in the name.
    let (base, revision) = hub::parts(&settings.model.path);
    let adapter = AdapterConfig {
        base_model: anywhere(base),
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
        .map_err(|Unfit { key, reason }| resolved.wrong(&format!("lora.{key}"), reason))?;
    Ok((adapter, layout))
}

/// A base as it is named wherever the adapter is read from: peft looks for a relative path
/// from the folder that it runs in. A name on the hub stays one.
fn anywhere(base: &str) -> String {
    let path = Path::new(base);
    let absolute = path
        .exists()
        .then(|| std::path::absolute(path).ok())
        .flatten();
    let absolute = absolute.and_then(|path| path.to_str().map(str::to_owned));
    absolute.unwrap_or_else(|| base.to_owned())
}

/// The values of an adapter to start from, which must be of the settings' kind, `ours`.
pub fn values_of(
    given: &Adapter,
    ours: &AdapterConfig,
    layout: &LoraLayout,
    config: &Config,
) -> Result<Vec<f32>> {
    let theirs = &given.config;
    if LoraLayout::new(config, theirs)? == *layout {
        return Ok(layout.flatten(&given.pairs));
    }
    let mut others = Vec::new();
    let mut compare = |key: &str, theirs: &dyn Display, ours: &dyn Display| {
        let [theirs, ours] = [theirs, ours].map(ToString::to_string);
        if theirs != ours {
            others.push(format!("lora.{key} is {theirs} there and {ours} here"));
        }
    };
    compare("rank", &theirs.rank, &ours.rank);
    compare("alpha", &theirs.alpha, &ours.alpha);
    compare("use_rslora", &theirs.rslora, &ours.rslora);
    compare("use_dora", &theirs.dora, &ours.dora);
    if theirs.targets != ours.targets {
        others.push("lora.target_modules is another".into());
    }
    let patterns = |a: &AdapterConfig| (a.rank_pattern.clone(), a.alpha_pattern.clone());
    if patterns(theirs) != patterns(ours) {
        others.push("lora.rank_pattern or alpha_pattern is another".into());
    }
    let cause = format!(
        "--init-adapter is of another kind: {}; write here what its adapter_config.json has, or start afresh",
        others.join(", ")
    );
    Err(Failure::Usage(cause).into())
}
