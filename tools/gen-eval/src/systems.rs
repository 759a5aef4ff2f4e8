//! The systems that are compared: the base model, and the base with each adapter.
//! One base is loaded; an adapter is an argument of each pass over it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::Failure;
use engine::{Backend, Sampling};
use qwen3::plan::Extent;
use qwen3::{
    Adapter, Batch, Completion, Config, Keep, Lora, Model, OwnedLora, Pass, Prompt, Row, Slots,
};
use serde::Deserialize;
use settings::TrainSettings;

use crate::items::{Item, Question};

/// The name of the system without an adapter.
pub const BASE: &str = "base";

/// The name of the base with another prompt.
pub const PROMPTED: &str = "prompted";

/// What judge says where no system wins.
const OUTCOMES: [&str; 3] = ["tie", "no_verdict", "none"];

/// Tokens of one scoring pass, unless a single row is longer.
const PASS_TOKENS: usize = 2048;

/// An adapter as it was asked for: `NAME=DIR`, or `DIR` for one called `lora`.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub folder: PathBuf,
}

impl Named {
    /// Reads it; a folder's name need be no text.
    pub fn parse(given: OsString) -> Result<Self, String> {
        let bytes = given.as_bytes();
        let at = bytes.iter().position(|&byte| byte == b'=');
        let parts = at.and_then(|at| {
            let name = str::from_utf8(&bytes[..at]).ok()?;
            Some((name, OsStr::from_bytes(&bytes[at + 1..])))
        });
        let (name, folder) = match parts {
            Some((name, folder)) if !name.contains('/') => (name, folder),
            _ => ("lora", given.as_os_str()),
        };
        if name.is_empty() || folder.is_empty() {
            return Err("expected NAME=DIR or DIR".into());
        }
        if [BASE, PROMPTED].contains(&name) {
            return Err(format!(
                "`{name}` is the name of the model without an adapter; give another: NAME=DIR"
            ));
        }
        if OUTCOMES.contains(&name) {
            return Err(format!(
                "`{name}` is an outcome to judge, not a system; give another name: NAME=DIR"
            ));
        }
        Ok(Self {
            name: name.into(),
            folder: folder.into(),
        })
    }

    /// The settings that the adapter was trained with, where qlora-train left them.
    pub fn trained_with(&self) -> Result<Option<TrainSettings>> {
        let path = self.folder.join(qwen3::SETTINGS);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = qwen3::read(&path)?;
        let settings =
            serde_saphyr::from_slice(&bytes).with_context(|| path.display().to_string())?;
        Ok(Some(settings))
    }

    /// The fingerprint of the base that the adapter was trained on, where qlora-train
    /// left it.
    pub fn trained_on(&self) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Run {
            model: String,
        }
        let path = self.folder.join("run.json");
        if !path.exists() {
            return Ok(None);
        }
        let run = serde_json::from_slice::<Run>(&qwen3::read(&path)?);
        let run = run.with_context(|| path.display().to_string())?;
        Ok(Some(run.model))
    }

    /// The base that the adapter names, as PEFT writes it: `NAME`, or `NAME@REVISION`.
    pub fn names_base(&self) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct AdapterConfig {
            base_model_name_or_path: Option<String>,
            revision: Option<String>,
        }
        let path = self.folder.join("adapter_config.json");
        let config = serde_json::from_slice::<AdapterConfig>(&qwen3::read(&path)?);
        let config = config.with_context(|| path.display().to_string())?;
        let base = config.base_model_name_or_path;
        let base = base.filter(|name| !name.is_empty());
        Ok(base.map(|base| hub::named(&base, config.revision.as_deref())))
    }

    /// Fails before anything is read where there is no adapter, or a half-trained one.
    pub fn check(&self) -> Result<(), Failure> {
        let Some(cause) = qwen3::lacks(&self.folder) else {
            return Ok(());
        };
        Err(Failure::Usage(format!(
            "--adapter {}={}: {cause}",
            self.name,
            self.folder.display()
        )))
    }

    /// Reads the adapter for a base of that shape.
    pub fn load(&self, base: &Path, config: &Config) -> Result<Adapter> {
        Adapter::load(&self.folder, config).map_err(|error| {
            let (name, folder) = (&self.name, self.folder.display());
            let what = match &error {
                qwen3::Error::File { .. } | qwen3::Error::Json { .. } => format!(
                    "--adapter {name}={folder} is damaged; train it again in another folder \
                     (make: RUN=new), or delete this one first"
                ),
                qwen3::Error::Tensor { .. } => format!(
                    "--adapter {name}={folder} is damaged, or does not go with the base {}",
                    base.display()
                ),
                _ => format!(
                    "--adapter {name}={folder} does not go with the base {}",
                    base.display()
                ),
            };
            anyhow::Error::new(error).context(what)
        })
    }
}

/// A system on the device.
pub struct System<B: Backend> {
    pub name: String,
    /// Where the base is.
    base: PathBuf,
    adapter: Option<OwnedLora<B>>,
    /// Which of an item's questions is put to it.
    question: fn(&Item) -> Option<&Question>,
}

/// What a system says of the reference, and says itself.
pub struct Answer {
    /// Summed over the reference's tokens, in nats.
    pub nll: f64,
    pub completion: Completion,
}

/// How replies are generated, apart from the prompts.
pub struct Decoding {
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    pub stop_ids: Vec<u32>,
    pub slots: usize,
}

impl Decoding {
    fn generation(&self) -> qwen3::Generation<'_> {
        qwen3::Generation {
            sampling: self.sampling,
            max_new_tokens: self.max_new_tokens,
            stop_ids: &self.stop_ids,
            slots: self.slots,
        }
    }
}

impl<B: Backend> System<B> {
    /// The base alone.
    pub fn base(base: &Path) -> Self {
        Self {
            name: BASE.into(),
            base: base.into(),
            adapter: None,
            question: |item| Some(&item.plain),
        }
    }

    /// The base that is shown examples.
    pub fn prompted(base: &Path) -> Self {
        Self {
            name: PROMPTED.into(),
            question: |item| item.prompted.as_ref(),
            ..Self::base(base)
        }
    }

    /// The base with an adapter.
    pub fn adapted(name: &str, adapter: &Adapter, model: &Model<B>, base: &Path) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            adapter: Some(model.load_adapter(adapter)?),
            ..Self::base(base)
        })
    }

    fn lora(&self) -> Option<Lora<'_, B>> {
        self.adapter.as_ref().map(OwnedLora::lora)
    }

    /// A model whose loss is none says nothing but one token again and again, and every
    /// figure of it would look like a measurement.
    fn no_number(&self, item: &Item) -> Failure {
        let (name, id, base) = (&self.name, &item.id, self.base.display());
        let cause = match self.adapter {
            None => format!(
                "values in the base model's folder are no numbers: `qlora-train inspect '{base}'` says which"
            ),
            Some(_) => "the base with this adapter computes beyond what 32 bits hold: its values or its scale \
                 (lora_alpha / r) are too large; train it again with a lower learning rate"
                .into(),
        };
        Failure::World(format!(
            "system {name}: the loss of {id} is no number: {cause}"
        ))
    }

    /// Scores the references of items and replies to them. `first` is the number of
    /// the first among all items: it keys the draws of sampling. `progress` hears how
    /// many of the items are done.
    pub fn answer(
        &self,
        model: &Model<B>,
        room: &mut Room<B>,
        items: &[Item],
        first: u32,
        decoding: &Decoding,
        progress: impl FnMut(usize),
    ) -> Result<Vec<Answer>> {
        let questions = self.questions(items);
        let losses = losses(model, self.lora(), &mut room.pass, &questions)?;
        if let Some(at) = losses.iter().position(|nll| !nll.is_finite()) {
            return Err(self.no_number(&items[at]).into());
        }
        let prompts: Vec<Prompt> = questions
            .iter()
            .zip(first..)
            .map(|(question, number)| Prompt {
                number,
                ids: &question.prompt,
            })
            .collect();
        let completions = room.slots.generate(
            (model, self.lora()),
            &mut room.pass,
            &prompts,
            &decoding.generation(),
            progress,
        )?;
        let answers = losses.into_iter().zip(completions);
        Ok(answers
            .map(|(nll, completion)| Answer { nll, completion })
            .collect())
    }

    /// What is put to it of items.
    fn questions<'a>(&self, items: &'a [Item]) -> Vec<&'a Question> {
        items.iter().filter_map(self.question).collect()
    }
}

/// The negative log-likelihood of each question's reference.
fn losses<B: Backend>(
    model: &Model<B>,
    lora: Option<Lora<'_, B>>,
    pass: &mut Pass<B>,
    questions: &[&Question],
) -> Result<Vec<f64>> {
    let mut sums = Vec::with_capacity(questions.len());
    for packed in passes(questions) {
        let batch = Batch::new(model.backend(), &rows(packed))?;
        let nll = model.losses(pass, &batch, lora)?.wait()?;
        let mut nll = nll.into_iter().map(f64::from);
        sums.extend(
            batch
                .labels()
                .iter()
                .map(|&labels| nll.by_ref().take(labels).sum::<f64>()),
        );
    }
    Ok(sums)
}

/// The questions of each scoring pass, in order.
fn passes<'a, 'q>(mut rest: &'a [&'q Question]) -> impl Iterator<Item = &'a [&'q Question]> {
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fitting = rest.iter().take_while(|question| {
            tokens += question.ids.len();
            tokens <= PASS_TOKENS
        });
        let packed;
        (packed, rest) = rest.split_at(fitting.count().max(1).min(rest.len()));
        (!packed.is_empty()).then_some(packed)
    })
}

fn rows<'a>(questions: &[&'a Question]) -> Vec<Row<'a>> {
    let numbered = questions.iter().zip(0..);
    numbered
        .map(|(question, number)| Row {
            number,
            ids: &question.ids,
            labelled: &question.labelled,
        })
        .collect()
}

/// The memory of scoring and generating, for all systems in turn.
pub struct Room<B: Backend> {
    pass: Pass<B>,
    slots: Slots<B>,
}

impl<B: Backend> Room<B> {
    /// All that the systems' answers to these blocks of items will need, so that what is
    /// left then is left for good.
    ///
    /// # Errors
    /// If the device has not got it.
    pub fn new<'a>(
        model: &Model<B>,
        systems: &[System<B>],
        blocks: impl Iterator<Item = &'a [Item]> + Clone,
        decoding: &Decoding,
    ) -> Result<Self> {
        let longest = |item: &Item| item.questions().map(|q| q.prompt.len()).max();
        let lengths: Vec<usize> = blocks.clone().flatten().filter_map(longest).collect();
        let slots = Slots::new(model, &lengths, &decoding.generation())?;
        let mut scored = Extent::default();
        for block in blocks {
            for system in systems {
                for packed in passes(&system.questions(block)) {
                    scored = scored.max(Extent::of(&rows(packed)));
                }
            }
        }
        // Nothing is kept for a backward pass.
        let mut pass = Pass::new(Keep::Nothing);
        for system in systems {
            let layout = system.adapter.as_ref().map(|adapter| adapter.lora().layout);
            pass.reserve(model, scored, layout)?;
            slots.reserve(model, &mut pass, layout)?;
        }
        Ok(Self { pass, slots })
    }
}
