//! What a run is made of before anything is computed: the base, the rows, the plan.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cli::{App, Failure, PrintConfig, Resolved};
use engine::Device;
use qwen3::{Adapter, Chat, Checkpoint, Held, Seen, Storage};
use settings::{LmHead, Quantization, TrainSettings};

use crate::disk::Need;
use crate::folder::Identity;
use crate::memory::{Fit, Place};
use crate::origin::Origin;
use crate::plan::Plan;
use crate::rows::{self, Rejected, Rows};
use crate::time::{self, About};
use crate::{lora, quantized, train};

/// See the module.
pub struct Inputs<'a> {
    app: &'a App,
    resolved: &'a Resolved<TrainSettings>,
    /// The base model's folder.
    pub base: PathBuf,
    /// The base model, opened.
    pub checkpoint: Checkpoint,
    /// How the base is to be held.
    pub held: Held,
    /// Where the model and the rows come from.
    pub origin: Origin,
    /// The adapter to start from.
    initial: Option<Adapter>,
    /// What is learnt, and what is held out.
    pub rows: Rows,
    /// Steps and adapter.
    pub plan: Plan,
}

impl<'a> Inputs<'a> {
    /// Reads the rows of `data` for the base that is open, tells of what may not be meant,
    /// and plans the run. `initial` is the adapter to start from, and what it has seen.
    ///
    /// # Errors
    /// If settings, base and rows do not go together.
    pub fn read(
        (app, resolved): (&'a App, &'a Resolved<TrainSettings>),
        (base, checkpoint): (PathBuf, Checkpoint),
        initial: Option<(Adapter, Seen)>,
        (data, rejects, provenance): (&Path, Rejected<'_>, &[PathBuf]),
    ) -> Result<Self> {
        let (settings, config) = (&resolved.settings, checkpoint.config());
        lora::layout(resolved, config)?;
        let chat = Chat::load(&base)?;
        chat.check(config, &qwen3::stop_ids(&base)?)?;
        let origin = Origin::read(&base, provenance)?;
        let (initial, before) = initial.unzip();
        let rows = rows::load(app, data, rejects, resolved, &chat, before.as_ref())?;
        let plan = Plan::new(resolved, config, &rows, initial.as_ref())?;
        let doubts = plan.doubts(settings, &rows).into_iter();
        for doubt in origin.doubt(data, rows.read()).into_iter().chain(doubts) {
            app.warn(doubt);
        }
        check_best(resolved, &rows)?;
        Ok(Self {
            app,
            resolved,
            base,
            checkpoint,
            held: held(settings),
            origin,
            initial,
            rows,
            plan,
        })
    }

    /// What the run is, on that device; how long its passes are is found out later.
    pub fn identity(&self, device: &Device) -> Result<Identity> {
        (self.app).detail(format_args!(
            "hashing the base model {}",
            self.base.display()
        ));
        Ok(Identity {
            v: 1,
            version: env!("CARGO_PKG_VERSION").into(),
            settings: that_decide(self.resolved),
            pass_tokens: 0,
            data: self.rows.sha256.clone(),
            model: self.checkpoint.fingerprint()?,
            device: match device {
                Device::Cpu(_) => "cpu".into(),
                Device::Cuda(_) => "cuda".into(),
            },
            hardware: device.hardware(),
            init_adapter: self.initial.as_ref().map(Adapter::fingerprint),
        })
    }

    /// How it fits into memory; a run that goes on keeps the passes that it began with.
    pub fn fit(&self, device: &Device, began_with: Option<usize>) -> Result<Fit> {
        let base = (&self.checkpoint, self.held);
        let run = (&self.resolved.settings, &self.plan, &self.rows);
        match device {
            Device::Cpu(cpu) => Fit::new(cpu, Place::Processor, base, run, began_with),
            Device::Cuda(cuda) => Fit::new(cuda, Place::Gpu, base, run, began_with),
        }
    }

    /// Tells settings, rows, steps and memory; `which` device it is.
    pub fn describe(&self, which: &str, fit: &Fit) {
        let settings = self.resolved.show(PrintConfig::Full);
        let lines = settings.lines().map(String::from);
        let lines = lines.chain([format!("computing on {which}")]);
        let lines = lines.chain(self.plan.describe(&self.rows, &fit.survey));
        for line in lines.chain(fit.describe()) {
            self.app.detail(line);
        }
        if let Some(doubt) = fit.doubt() {
            self.app.warn(doubt);
        }
    }

    /// What the run needs on the disk.
    pub fn room(&self) -> Need {
        let settings = &self.resolved.settings;
        let (plan, kind) = (&self.plan, train::optimiser_of(settings));
        let t = &settings.training;
        Need::new(t, &plan.layout, &kind, plan.steps, &self.rows.seen)
    }

    /// Tells how long it would take, by two of the layers.
    pub fn preview(&self, device: Device, fit: &Fit) -> Result<()> {
        let settings = &self.resolved.settings;
        let base = (&self.checkpoint, self.held);
        let run = (settings, &self.plan, fit);
        let pace = match device {
            Device::Cpu(cpu) => time::preview(cpu, base, run, &self.rows.train)?,
            Device::Cuda(cuda) => time::preview(cuda, base, run, &self.rows.train)?,
        };
        let about = About(pace.run(settings, &self.plan, &fit.survey, 0));
        (self.app).detail(format_args!(
            "time: about {about}, by two of the layers: {pace}"
        ));
        Ok(())
    }

    /// Takes the base in 4 bits, if it is to be so, in place of the one that is open: out of
    /// `to_save`, where it is saved first, or out of the cache. `room` is what the disk must
    /// have for the run beside it.
    pub fn quantize(
        &mut self,
        to_save: Option<&Path>,
        fingerprint: &str,
        device: &Device,
        room: u64,
    ) -> Result<()> {
        if let Some(folder) = to_save {
            quantized::save(self.app, &self.checkpoint, folder, device, room)?;
        }
        let quantized = match (self.held.products, to_save) {
            (Storage::AsStored, _) => None,
            (Storage::Nf4, Some(folder)) => Some(Checkpoint::open(folder)?),
            (Storage::Nf4, None) => {
                let place = (self.resolved.settings.model.cache.as_str(), fingerprint);
                quantized::cached(self.app, &self.checkpoint, place, device, room)
            }
        };
        if let Some(quantized) = quantized {
            self.checkpoint = quantized;
        }
        Ok(())
    }
}

/// How the base is held.
fn held(settings: &TrainSettings) -> Held {
    Held {
        products: match settings.model.quantization {
            Quantization::Nf4 => Storage::Nf4,
            Quantization::None => Storage::AsStored,
        },
        head: match settings.model.lm_head {
            LmHead::AsStored => Storage::AsStored,
            LmHead::Nf4 => Storage::Nf4,
        },
    }
}

/// The settings that a run's results depend on: where the model lies and is kept, how often
/// a checkpoint is saved and what is warned of change none.
fn that_decide(resolved: &Resolved<TrainSettings>) -> Vec<String> {
    const INDIFFERENT: [&str; 5] = [
        "model.path",
        "model.cache",
        "training.save_",
        "training.spike_factor",
        "training.max_memory",
    ];
    let all = resolved.show(PrintConfig::Key);
    all.lines()
        .filter(|line| !INDIFFERENT.iter().any(|key| line.starts_with(key)))
        .map(String::from)
        .collect()
}

/// Refuses to look for the best of a run that holds nothing out.
fn check_best(resolved: &Resolved<TrainSettings>, rows: &Rows) -> Result<(), Failure> {
    let t = &resolved.settings.training;
    let (key, value) = match (t.load_best_model_at_end, t.early_stopping_patience) {
        _ if !rows.eval.is_empty() => return Ok(()),
        (true, _) => ("training.load_best_model_at_end", "true".into()),
        (false, 0) => return Ok(()),
        (false, patience) => ("training.early_stopping_patience", patience.to_string()),
    };
    let cause = format!(
        "is {value}, but no row is held out, so there is no best: set data.eval_fraction, or give rows `split: eval`"
    );
    Err(resolved.wrong(key, cause))
}
