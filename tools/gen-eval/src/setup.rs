//! What is known before the weights are loaded: whether model, adapters and
//! prompts go together.

use std::path::Path;

use anyhow::{Context, Result};
use cli::{App, Failure, PrintConfig, Resolved, Signature};
use qwen3::{Adapter, Chat, Checkpoint, Held, PromptTemplate, Seen, Storage, Wording};
use settings::{EvalSettings, Generation, LmHead, Quantization, TextChoice, TrainSettings};

use crate::held_out::SeenBy;
use crate::items::Item;
use crate::journal::Identity;
use crate::systems::Named;

/// Settings that parse and cannot work.
pub fn check(resolved: &Resolved<EvalSettings>) -> Result<(), Failure> {
    let settings = &resolved.settings.generation;
    let wrong = |key: &str, what: String| Err(resolved.wrong(&format!("generation.{key}"), what));
    if settings.max_new_tokens == 0 {
        return wrong("max_new_tokens", "is 0: a reply needs a token".into());
    }
    if settings.batch_size == 0 {
        return wrong("batch_size", "is 0; 1 is the least".into());
    }
    if !(settings.temperature.is_finite() && settings.temperature >= 0.0) {
        return wrong(
            "temperature",
            format!(
                "is {}; it must be at least 0",
                cli::shown(settings.temperature)
            ),
        );
    }
    if !(settings.top_p > 0.0 && settings.top_p <= 1.0) {
        return wrong(
            "top_p",
            format!(
                "is {}; it must be above 0 and at most 1",
                cli::shown(settings.top_p)
            ),
        );
    }
    Ok(())
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
    /// Whether tweets are worded otherwise than as they are.
    pub has_own_template: bool,
    pub held: Held,
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
        let first = trained.iter().position(|(_, settings)| settings.is_some());
        let of_training = first.and_then(|at| trained[at].1.as_ref());

        let named_base = || -> Result<Option<String>> {
            let of = named.get(first.unwrap_or(0));
            Ok((of.map(Named::names_base).transpose()?).flatten())
        };
        let base = match (&settings.model, of_training) {
            (Some(model), _) => Some(model.clone()),
            // A relative path is none from another folder; the adapter has it whole.
            (None, Some(training)) if !Path::new(&training.model.path).exists() => {
                let is_whole =
                    |base: &String| Path::new(base).is_absolute() && Path::new(base).exists();
                let whole = named_base()?.filter(is_whole);
                Some(whole.unwrap_or_else(|| training.model.path.clone()))
            }
            (None, Some(training)) => Some(training.model.path.clone()),
            (None, None) => named_base()?,
        };
        let base = base.ok_or_else(|| {
            let cause = "--model is needed: no adapter says which base it was trained on";
            Failure::Usage(cause.into())
        })?;
        let folder = hub::fetch(app, &base, "--model")?;
        let defaults = TrainSettings::default();
        let like = of_training.unwrap_or(&defaults);
        let template = (settings.prompt_template.as_ref()).unwrap_or(&like.data.prompt_template);
        let text = settings.text.unwrap_or(like.data.text);
        let wording = Wording {
            normalized: text == TextChoice::Normalized,
            system_prompt: settings
                .system_prompt
                .clone()
                .unwrap_or_else(|| like.data.system_prompt.clone()),
            prompt: PromptTemplate::new(template)
                .map_err(|error| Failure::Usage(format!("generation.prompt_template: {error}")))?,
        };
        let quantization = settings.quantization.unwrap_or(like.model.quantization);
        let lm_head = settings.lm_head.unwrap_or(like.model.lm_head);
        for (name, settings) in &trained {
            let Some(settings) = settings else {
                app.warn(format_args!(
                    "adapter {name} has no train.yaml beside it: whether it was trained with these prompts is not known"
                ));
                continue;
            };
            for (what, differs) in [
                ("text", settings.data.text != text),
                (
                    "system prompt",
                    settings.data.system_prompt != wording.system_prompt,
                ),
                (
                    "prompt template",
                    settings.data.prompt_template != *template,
                ),
                ("quantization", settings.model.quantization != quantization),
                ("lm_head", settings.model.lm_head != lm_head),
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
        let stop_ids = qwen3::stop_ids(&folder)?;
        let chat = Chat::load(&folder)?;
        chat.check(config, &stop_ids)?;
        let adapters = named
            .iter()
            .map(|n| Ok((n.name.clone(), n.load(&folder, config)?)))
            .collect::<Result<_>>()?;
        let held = Held {
            products: match quantization {
                Quantization::Nf4 => Storage::Nf4,
                Quantization::None => Storage::AsStored,
            },
            head: match lm_head {
                LmHead::Nf4 => Storage::Nf4,
                LmHead::AsStored => Storage::AsStored,
            },
        };
        Ok(Self {
            stop_ids,
            checkpoint,
            fingerprint,
            chat,
            adapters,
            has_own_template: *template != defaults.data.prompt_template,
            wording,
            held,
        })
    }

    /// What each adapter tells of the rows that it has seen.
    ///
    /// # Errors
    /// If a list of them is damaged, or missing where there was one.
    pub fn seen<'a>(&self, named: &'a [Named]) -> Result<Vec<SeenBy<'a>>> {
        let seen = |n: &'a Named| {
            let what = || format!("--adapter {}={}", n.name, n.folder.display());
            Ok((n.name.as_str(), Seen::read(&n.folder).with_context(what)?))
        };
        named.iter().map(seen).collect()
    }

    /// What the answers depend on; `device` is the kind of it.
    pub fn identity(
        &self,
        resolved: &Resolved<EvalSettings>,
        items: &[Item],
        device: &str,
    ) -> Identity {
        let mut parts = vec![("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
        let shown = resolved.show(PrintConfig::Key);
        let settings = shown.lines().filter_map(|line| line.split_once(" = "));
        // Where the model lies changes no answer.
        let settings = settings.filter(|(key, _)| *key != "generation.model");
        parts.extend(settings.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let other = [
            ("device", device),
            ("model", &self.fingerprint),
            ("quantization", self.quantization()),
            ("lm_head", self.lm_head()),
            ("chat", self.chat.fingerprint()),
            ("items", &hash(items)),
        ];
        parts.extend(other.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let adapters = self.adapters.iter();
        parts.extend(adapters.map(|(name, a)| (format!("adapter {name}"), a.fingerprint())));
        Identity(parts)
    }

    fn quantization(&self) -> &'static str {
        match self.held.products {
            Storage::Nf4 => "nf4",
            Storage::AsStored => "none",
        }
    }

    fn lm_head(&self) -> &'static str {
        match self.held.head {
            Storage::Nf4 => "nf4",
            Storage::AsStored => "as_stored",
        }
    }

    /// What the figures depend on.
    pub fn signature(&self, resolved: &Resolved<EvalSettings>, items: &[Item]) -> String {
        // Where the model lies changes no figure; what it is has a hash of its own.
        let shown = resolved.show(PrintConfig::Key);
        let config: String = shown
            .lines()
            .filter(|line| !line.starts_with("generation.model "))
            .collect();
        let mut signature = Signature::new("gen-eval")
            .with("seed", resolved.settings.generation.seed)
            .with_hash("config", &cli::sha256_hex(config.as_bytes()))
            .with_hash("data", &hash(items))
            .with("scored", scored(items))
            .with_hash("model", &self.fingerprint)
            .with("quantization", self.quantization())
            .with("lm_head", self.lm_head())
            .with_hash("chat", self.chat.fingerprint());
        for (name, adapter) in &self.adapters {
            signature = signature.with_hash(name, &adapter.fingerprint());
        }
        signature.to_string()
    }
}

/// In what form replies are held against their references.
fn scored(items: &[Item]) -> &'static str {
    match items.iter().filter(|item| item.normalized).count() {
        0 => "raw",
        n if n == items.len() => "normalized",
        _ => "normalized+raw",
    }
}

/// SHA-256 over the tokens of the items, as they are put to every system.
fn hash(items: &[Item]) -> String {
    let ids = items.iter().flat_map(Item::questions).flat_map(|q| &q.ids);
    let bytes: Vec<u8> = ids.flat_map(|id| id.to_le_bytes()).collect();
    cli::sha256_hex(&bytes)
}
