//! What is known before the weights are loaded: whether model, adapters and
//! prompts go together.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::{App, Failure, PrintConfig, Resolved, Signature};
use qwen3::{Adapter, Chat, Checkpoint, GenerationConfig, Storage};
use settings::{EvalSettings, Generation, Quantization, TrainSettings};

use crate::items::{Item, Wording};
use crate::systems::Named;

/// Settings that parse and cannot work.
pub fn check(settings: &Generation) -> Result<(), Failure> {
    let wrong = |key: &str, what: String| Err(Failure::Usage(format!("generation.{key} {what}")));
    if settings.max_new_tokens == 0 {
        return wrong("max_new_tokens", "is 0: a reply needs a token".into());
    }
    if settings.batch_size == 0 {
        return wrong("batch_size", "is 0; 1 is the least".into());
    }
    if !(settings.temperature.is_finite() && settings.temperature >= 0.0) {
        return wrong(
            "temperature",
            format!("is {}; it must be at least 0", settings.temperature),
        );
    }
    if !(settings.top_p > 0.0 && settings.top_p <= 1.0) {
        return wrong(
            "top_p",
            format!("is {}; it must be above 0 and at most 1", settings.top_p),
        );
    }
    Ok(())
}

/// Where qlora-train keeps the models that it downloaded, by their name.
const DOWNLOADED: &str = "data/cache/models";

/// The folder of a model: of that path, or downloaded under that name.
fn find(model: &str) -> Result<PathBuf, Failure> {
    [PathBuf::from(model), Path::new(DOWNLOADED).join(model)]
        .into_iter()
        .find(|folder| folder.join("config.json").exists())
        .ok_or_else(|| {
            let remedy = "name the folder of the base model with --model DIR";
            Failure::Usage(format!(
                "no model in {model}, nor in {DOWNLOADED}: {remedy}"
            ))
        })
}

/// Everything but the weights.
pub struct Setup {
    pub checkpoint: Checkpoint,
    /// SHA-256 over the base model's files.
    fingerprint: String,
    pub chat: Chat,
    pub stop_ids: Vec<u32>,
    pub adapters: Vec<(String, Adapter)>,
    pub wording: Wording,
    pub storage: Storage,
}

impl Setup {
    /// Opens everything, checks it and warns where an adapter was trained otherwise.
    /// An adapter that was trained on other files than the base's is refused, unless
    /// `any_base`.
    pub fn new(app: &App, settings: &Generation, named: &[Named], any_base: bool) -> Result<Self> {
        for (i, adapter) in named.iter().enumerate() {
            adapter.check()?;
            if named[..i].iter().any(|other| other.name == adapter.name) {
                let name = &adapter.name;
                return Err(Failure::Usage(format!(
                    "two adapters are called {name}; name them: --adapter NAME=DIR"
                ))
                .into());
            }
        }
        let trained: Vec<(&str, Option<TrainSettings>)> = named
            .iter()
            .map(|n| Ok((n.name.as_str(), n.trained_with()?)))
            .collect::<Result<_>>()?;
        let of_training = trained.iter().find_map(|(_, settings)| settings.as_ref());

        let folder = settings
            .model
            .clone()
            .or_else(|| of_training.map(|t| t.model.path.clone()));
        let folder = folder.ok_or_else(|| {
            Failure::Usage(
                "--model DIR is needed: no adapter says which base it was trained on".into(),
            )
        })?;
        let folder = find(&folder)?;
        let defaults = TrainSettings::default();
        let like = of_training.unwrap_or(&defaults);
        let wording = Wording {
            text: settings.text.unwrap_or(like.data.text),
            system_prompt: settings
                .system_prompt
                .clone()
                .unwrap_or_else(|| like.data.system_prompt.clone()),
        };
        let quantization = settings.quantization.unwrap_or(like.model.quantization);
        for (name, settings) in &trained {
            let Some(settings) = settings else {
                app.warn(format_args!(
                    "adapter {name} has no train.yaml beside it: whether it was trained with these prompts is not known"
                ));
                continue;
            };
            for (what, differs) in [
                ("text", settings.data.text != wording.text),
                (
                    "system prompt",
                    settings.data.system_prompt != wording.system_prompt,
                ),
                ("quantization", settings.model.quantization != quantization),
            ] {
                if differs {
                    app.warn(format_args!(
                        "adapter {name} was trained with another {what}"
                    ));
                }
            }
        }

        let checkpoint = Checkpoint::open(&folder)?;
        let fingerprint = checkpoint.fingerprint().context("hashing the base model")?;
        for adapter in named {
            let Some(was) = adapter.trained_on()? else {
                continue;
            };
            if was == fingerprint {
                continue;
            }
            let other = format!(
                "adapter {}: {} was trained on other files than those of the base {} \
                 (SHA-256 {was:.12}, here {fingerprint:.12})",
                adapter.name,
                adapter.folder.display(),
                folder.display()
            );
            if !any_base {
                return Err(Failure::Usage(format!(
                    "{other}: name its base with --model; a 4-bit or merged copy has another \
                     SHA-256 as well: --any-base goes on with it"
                ))
                .into());
            }
            app.warn(other);
        }
        let config = checkpoint.config();
        let generation = GenerationConfig::load(&folder)?;
        let chat = Chat::load(&folder)?;
        chat.check(config, &generation)?;
        let adapters = named
            .iter()
            .map(|n| Ok((n.name.clone(), n.load(&folder, config)?)))
            .collect::<Result<_>>()?;
        let storage = match quantization {
            Quantization::Nf4 => Storage::Nf4,
            Quantization::None => Storage::AsStored,
        };
        Ok(Self {
            stop_ids: generation.stop_ids,
            checkpoint,
            fingerprint,
            chat,
            adapters,
            wording,
            storage,
        })
    }

    /// What the figures depend on.
    pub fn signature(&self, resolved: &Resolved<EvalSettings>, items: &[Item]) -> String {
        // Where the model lies changes no figure; what it is has a hash of its own.
        let shown = resolved.show(PrintConfig::Key);
        let config: String = shown
            .lines()
            .filter(|line| !line.starts_with("generation.model "))
            .collect();
        let data: Vec<u8> = items
            .iter()
            .flat_map(|item| &item.ids)
            .flat_map(|id| id.to_le_bytes())
            .collect();
        let mut signature = Signature::new("gen-eval")
            .with("seed", resolved.settings.generation.seed)
            .with_hash("config", &cli::sha256_hex(config.as_bytes()))
            .with_hash("data", &cli::sha256_hex(&data))
            .with_hash("model", &self.fingerprint)
            .with(
                "quantization",
                if self.storage == Storage::Nf4 {
                    "nf4"
                } else {
                    "none"
                },
            )
            .with_hash("chat", self.chat.fingerprint());
        for (name, adapter) in &self.adapters {
            signature = signature.with_hash(name, &adapter.fingerprint());
        }
        signature.to_string()
    }
}
