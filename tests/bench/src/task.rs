//! What is measured, each in a process of its own: the most memory that a process
//! had resident is known for the whole of it only.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use engine::{Backend, Cpu, Reading, Sampling};
use qwen3::plan::Extent;
use qwen3::{
    AdapterConfig, Batch, Checkpoint, Generation, Keep, Lora, LoraLayout, Model, Optimiser,
    OptimiserKind, Pass, Prompt, Row, Storage, Update, generate,
};
use serde::{Deserialize, Serialize};

use crate::machine::{cpu_seconds, memory_mb};
use crate::rows::{EQUAL, Length, Rows, real};

/// A measurement.
#[derive(Args, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Task {
    /// What is timed.
    #[arg(value_enum)]
    pub what: What,
    /// How the layers' weights are held.
    #[arg(value_enum)]
    pub base: Base,
    /// Of the process.
    pub threads: usize,
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Steps of 8 rows of 128 tokens.
    TrainEqual,
    /// Steps of 8 rows as long as real pairs.
    TrainReal,
    /// 8 greedy replies of 64 tokens side by side, to prompts of 32.
    Generate,
    /// A checkpoint in bfloat16, written again in 4 bits.
    Quantise,
}

/// How the layers' weights are held.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// As stored.
    F32,
    /// In 4 bits, scales quantised again.
    Nf4,
}

/// What a process measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Tokens trained on or generated; bytes of bfloat16 quantised.
    pub amount: f64,
    /// By the clock.
    pub wall_s: f64,
    /// Of all threads.
    pub cpu_s: f64,
    /// The most memory that was resident.
    pub peak_mb: f64,
}

impl Task {
    /// All, in the order of the table.
    pub fn all(cores: usize) -> Vec<Self> {
        let mut threads = vec![1, cores];
        threads.dedup();
        let kinds = [
            (What::TrainEqual, Base::F32),
            (What::TrainEqual, Base::Nf4),
            (What::TrainReal, Base::F32),
            (What::TrainReal, Base::Nf4),
            (What::Generate, Base::F32),
            (What::Generate, Base::Nf4),
            (What::Quantise, Base::Nf4),
        ];
        threads
            .into_iter()
            .flat_map(|threads| {
                kinds.map(|(what, base)| Self {
                    what,
                    base,
                    threads,
                })
            })
            .collect()
    }

    /// Measures it on the models in `folder`, see [`crate::model`].
    pub fn measure(&self, folder: &Path) -> Result<Measured> {
        let middling = folder.join("middling");
        match self.what {
            What::TrainEqual => Cpu.inside(|| self.train(&middling, &EQUAL)),
            What::TrainReal => Cpu.inside(|| self.train(&middling, &real())),
            What::Generate => Cpu.inside(|| self.generate(&middling)),
            What::Quantise => quantise(&folder.join("wide")),
        }
    }

    fn load(&self, folder: &Path) -> Result<Model<Cpu>> {
        let storage = match self.base {
            Base::F32 => Storage::AsStored,
            Base::Nf4 => Storage::Nf4,
        };
        Ok(Model::load(Cpu, &Checkpoint::open(folder)?, storage)?)
    }

    /// An epoch of the rows, after two steps that warm up.
    fn train(&self, folder: &Path, lengths: &[Length]) -> Result<Measured> {
        let model = self.load(folder)?;
        let rows = Rows::new(lengths, model.config().vocab_size);
        let steps = rows.steps();
        let layout = layout(&model)?;
        let mut params = layout.init(0);
        let mut grads = Cpu.alloc_f32(layout.len())?;
        let mut optimiser = Optimiser::new(&Cpu, &layout, OptimiserKind::default())?;
        let mut pass = Pass::new(Keep::All);
        let extents = steps.iter().map(|rows| Extent::of(rows));
        let extent = extents.reduce(Extent::max).unwrap_or_default();
        pass.reserve(&model, extent, Some(&layout))?; // as qlora-train does
        let mut step = |rows: &[Row<'_>]| -> Result<()> {
            let batch = Batch::new(&Cpu, rows)?;
            let lora = Lora {
                layout: &layout,
                params: &params,
            };
            let scale = 1.0 / batch.labelled() as f32;
            let losses =
                model.losses_and_gradients(&mut pass, &batch, lora, None, (&mut grads, scale))?;
            let update = Update {
                lr: 2e-4,
                weight_decay: 0.0,
                max_norm: Some(1.0),
            };
            let norm = optimiser.update(&Cpu, update, &mut grads, &mut params);
            losses.wait()?;
            norm.wait()?;
            Ok(())
        };
        for rows in &steps[..2] {
            step(rows)?;
        }
        timed(rows.tokens(), || {
            steps.iter().try_for_each(|rows| step(rows))
        })
    }

    fn generate(&self, folder: &Path) -> Result<Measured> {
        const PROMPTS: usize = 8;
        const NEW: usize = 64;
        let model = self.load(folder)?;
        let rows = Rows::new(&[(32, 0); PROMPTS], model.config().vocab_size);
        let steps = rows.steps();
        let prompts: Vec<Prompt> = steps
            .iter()
            .flatten()
            .map(|row| Prompt {
                number: row.number,
                ids: row.ids,
            })
            .collect();
        let layout = layout(&model)?;
        let params = layout.init(0);
        let lora = Lora {
            layout: &layout,
            params: &params,
        };
        let how = Generation {
            sampling: Sampling::GREEDY,
            max_new_tokens: NEW,
            stop_ids: &[],
            slots: PROMPTS,
        };
        let replies = || generate(&model, Some(lora), &prompts, &how, |_| ());
        replies()?;
        timed(PROMPTS * NEW, || Ok(replies().map(drop)?))
    }
}

/// Rank 16 on all seven projections, scale 1.
fn layout(model: &Model<Cpu>) -> Result<LoraLayout> {
    Ok(LoraLayout::new(
        model.config(),
        &AdapterConfig::new(16, 16.0),
    )?)
}

/// Memory here is what the heap takes, at most: pages of the files that are read and
/// written are resident as well, as long as nobody else needs the room.
fn quantise(folder: &Path) -> Result<Measured> {
    let checkpoint = Checkpoint::open(folder)?;
    let target = folder.with_extension("quantised");
    if target.exists() {
        std::fs::remove_dir_all(&target).context("removing the last run's result")?;
    }
    let source = folder.join("model.safetensors");
    let bytes = source.metadata().context("the source's size")?.len();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0.0_f64;
            while !done.load(Ordering::Relaxed) {
                most = most.max(memory_mb("RssAnon"));
                thread::sleep(Duration::from_millis(1));
            }
            most
        });
        let measured = timed(bytes as usize, || {
            Ok(checkpoint.save_quantized(&target, |matrix| Ok(matrix.quantize()?), |_| ())?)
        });
        done.store(true, Ordering::Relaxed);
        let peak_mb = watch.join().unwrap_or_default();
        Ok(Measured {
            peak_mb,
            ..measured?
        })
    })
}

fn timed(amount: usize, mut work: impl FnMut() -> Result<()>) -> Result<Measured> {
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    work()?;
    Ok(Measured {
        amount: amount as f64,
        wall_s: wall.elapsed().as_secs_f64(),
        cpu_s: cpu_seconds() - cpu,
        peak_mb: memory_mb("VmHWM"),
    })
}
