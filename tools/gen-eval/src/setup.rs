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

/// An adapter's name, and what it was trained with, where that is known.
type Trained<'a> = (&'a str, Option<TrainSettings>);

/// How rows are worded and the base is held: as eval.yaml says, else as an adapter was
/// trained.
struct How<'a> {
    text: TextChoice,
    system_prompt: &'a str,
    prompt_template: &'a str,
    quantization: Quantization,
    lm_head: LmHead,
}

impl<'a> How<'a> {
    fn new(asked: &'a Generation, trained: &'a TrainSettings) -> Self {
        let system_prompt = asked.system_prompt.as_ref();
        let prompt_template = asked.prompt_template.as_ref();
        Self {
            text: asked.text.unwrap_or(trained.data.text),
            system_prompt: system_prompt.unwrap_or(&trained.data.system_prompt),
            prompt_template: prompt_template.unwrap_or(&trained.data.prompt_template),
            quantization: asked.quantization.unwrap_or(trained.model.quantization),
            lm_head: asked.lm_head.unwrap_or(trained.model.lm_head),
        }
    }

    /// Says which adapters were trained otherwise.
    fn warn_of_others(&self, app: &App, trained: &[Trained]) {
        for (name, settings) in trained {
            let Some(TrainSettings { data, model, .. }) = settings else {
                app.warn(format_args!(
                    "adapter {name} has no train.yaml beside it: whether it was trained with these prompts is not known"
                ));
                continue;
            };
            for (what, differs) in [
                ("text", data.text != self.text),
                ("system prompt", data.system_prompt != self.system_prompt),
                (
                    "prompt template",
                    data.prompt_template != self.prompt_template,
                ),
                ("quantization", model.quantization != self.quantization),
                ("lm_head", model.lm_head != self.lm_head),
            ] {
                if differs {
                    app.warn(format_args!(
                        "adapter {name} was trained with another {what}"
                    ));
                }
            }
        }
    }

    fn wording(&self) -> Result<Wording, Failure> {
        let prompt = PromptTemplate::new(self.prompt_template)
            .map_err(|error| Failure::Usage(format!("generation.prompt_template: {error}")))?;
        Ok(Wording {
            normalized: self.text == TextChoice::Normalized,
            system_prompt: self.system_prompt.to_owned(),
            prompt,
        })
    }

    fn held(&self) -> Held {
        Held {
            products: match self.quantization {
                Quantization::Nf4 => Storage::Nf4,
                Quantization::None => Storage::AsStored,
            },
            head: match self.lm_head {
                LmHead::Nf4 => Storage::Nf4,
                LmHead::AsStored => Storage::AsStored,
            },
        }
    }
}

/// That each is there, and by a name of its own.
fn check_names(named: &[Named]) -> Result<(), Failure> {
    for (i, adapter) in named.iter().enumerate() {
        adapter.check()?;
        if named[..i].iter().any(|other| other.name == adapter.name) {
            let name = &adapter.name;
            return Err(Failure::Usage(format!(
                "two adapters are called {name}; name them: --adapter NAME=DIR"
            )));
        }
    }
    Ok(())
}

/// The base model: what was asked for, else what an adapter was trained on.
fn base(settings: &Generation, named: &[Named], trained: &[Trained]) -> Result<String> {
    if let Some(model) = &settings.model {
        return Ok(model.clone());
    }
    let first = trained.iter().position(|(_, settings)| settings.is_some());
    let names_base = || -> Result<Option<String>> {
        let of = named.get(first.unwrap_or(0));
        Ok(of.map(Named::names_base).transpose()?.flatten())
    };
    let path = first.and_then(|at| Some(&trained[at].1.as_ref()?.model.path));
    let base = match path {
        Some(path) if Path::new(path).exists() => Some(path.clone()),
        // A relative path is none from another folder; the adapter has it whole.
        Some(path) => {
            let is_whole =
                |base: &String| Path::new(base).is_absolute() && Path::new(base).exists();
            let whole = names_base()?.filter(is_whole);
            Some(whole.unwrap_or_else(|| path.clone()))
        }
        None => names_base()?,
    };
    base.ok_or_else(|| {
        let cause = "--model is needed: no adapter says which base it was trained on";
        Failure::Usage(cause.into()).into()
    })
}

/// That the adapters were trained on the files of this base, where they tell.
fn check_base(
    app: &App,
    named: &[Named],
    fingerprint: &str,
    folder: &Path,
    any_base: bool,
) -> Result<()> {
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
        check_names(named)?;
        let trained: Vec<Trained> = named
            .iter()
            .map(|n| Ok((n.name.as_str(), n.trained_with()?)))
            .collect::<Result<_>>()?;
        let folder = hub::fetch(app, &base(settings, named, &trained)?, "--model")?;
        let defaults = TrainSettings::default();
        let first = trained.iter().find_map(|(_, settings)| settings.as_ref());
        let how = How::new(settings, first.unwrap_or(&defaults));
        how.warn_of_others(app, &trained);

        let checkpoint = Checkpoint::open(&folder)?;
        let fingerprint = checkpoint.fingerprint().context("hashing the base model")?;
        check_base(app, named, &fingerprint, &folder, any_base)?;
        let config = checkpoint.config();
        let stop_ids = qwen3::stop_ids(&folder)?;
        let chat = Chat::load(&folder)?;
        chat.check(config, &stop_ids)?;
        let adapters = named
            .iter()
            .map(|n| Ok((n.name.clone(), n.load(&folder, config)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            stop_ids,
            checkpoint,
            fingerprint,
            chat,
            adapters,
            has_own_template: how.prompt_template != defaults.data.prompt_template,
            held: how.held(),
            wording: how.wording()?,
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
