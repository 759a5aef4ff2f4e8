//! `qlora-train bench`: what this machine does, on random weights in a Qwen3's
//! shape, so that nothing has to be downloaded to find out.
//!
//! Beside each figure stand the device's own rates of products and of copies,
//! measured in the same minute: a share of them says how much is left, on any device.

use std::collections::HashSet;
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use cli::{App, Failure};
use engine::{Backend, Choice, Device, Group, HostMatrix, Member, Reading, Sampling, Spent};
use half::bf16;
use jsonl::Output;
use qwen3::plan::{Extent, Outline};
use qwen3::{
    AdapterConfig, Batch, Config, Generation, Held, Keep, Lora, LoraLayout, Losses, Model, Module,
    Optimiser, OptimiserKind, Pass, Prompt, Row, Slots, Storage, Update,
};
use serde::Serialize;
use settings::LmHead;

use crate::commands::Messages;
use crate::memory::Size;

/// Steps before the clock starts: buffers grow, products are planned.
const WARM_UP: usize = 2;

/// Steps of a profile: they are alike.
const PROFILED: u32 = 3;

/// More in a step say nothing more of a device.
const MOST_TOKENS: usize = 1 << 20;

/// The same of a product's side, and of prompts.
const MOST_SIDE: usize = 1 << 14;
const MOST_PROMPTS: usize = 1 << 16;

/// Tokens of prompts and replies, template included: 128 real pairs of tweet and reply
/// at even ranks among 3,318 sorted by length, in a random order; 40 a pair on average.
/// The one list: `tests/gpu/bench` asks for it, `tests/bench` reads the file.
const LENGTHS: &str = include_str!("lengths.json");

/// The published shapes: hidden, inner, layers, query heads, key/value heads, tied.
/// Heads are 128 wide, and there are 151,936 tokens.
const SHAPES: [(&str, [usize; 5], bool); 6] = [
    ("qwen3-0.6b", [1024, 3072, 28, 16, 8], true),
    ("qwen3-1.7b", [2048, 6144, 28, 16, 8], true),
    ("qwen3-4b", [2560, 9728, 36, 32, 8], true),
    ("qwen3-8b", [4096, 12288, 36, 32, 8], false),
    ("qwen3-14b", [5120, 17408, 40, 40, 8], false),
    ("qwen3-32b", [5120, 25600, 64, 64, 8], false),
];

/// Measure this machine: tokens a second, share of the device's own rates, memory
///
/// Trains and generates with random weights in a Qwen3's shape, NF4 with double
/// quantisation, LoRA of rank 16 on all seven projections, on packed rows with the
/// lengths of tweets and replies. One JSON object per figure on standard output.
#[derive(Args)]
#[command(after_long_help = crate::commands::after_help(EXAMPLES, None))]
pub struct Bench {
    /// Shape: qwen3-0.6b, -1.7b, -4b, -8b, -14b, -32b, or tiny
    #[arg(long, default_value = "qwen3-8b", value_name = "NAME", value_parser = shape)]
    shape: Shape,
    /// Fewer layers than the shape has
    #[arg(long, value_name = "N", value_parser = positive)]
    layers: Option<usize>,
    /// Packed tokens of a training step, smallest first
    #[arg(
        long,
        default_value = "160,640,2048,16384",
        value_delimiter = ',',
        value_name = "LIST",
        value_parser = tokens
    )]
    tokens: Vec<usize>,
    /// Compute every layer again in the backward pass, for less memory
    #[arg(long)]
    recompute: bool,
    /// Decode NF4 weights once and for all, for speed; as training does where there is
    /// memory to spare
    #[arg(long, conflicts_with = "dense")]
    keep_decoded: bool,
    /// Keep the optimiser's moments in 8 bits
    #[arg(long)]
    adamw_8bit: bool,
    /// Weights in bf16 in place of NF4
    #[arg(long)]
    dense: bool,
    /// How the output projection is held
    #[arg(long, value_name = "KIND", default_value = "as_stored")]
    lm_head: LmHead,
    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = positive)]
    rank: usize,
    /// Steps that are timed, after two that are not
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Prompts to continue; 0: no generation
    #[arg(long, default_value_t = 256, value_name = "N")]
    prompts: usize,
    /// Tokens of each continuation
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    new_tokens: u32,
    /// Continuations under way at the same time
    #[arg(
        long,
        default_value = "256",
        value_delimiter = ',',
        value_name = "LIST",
        value_parser = positive
    )]
    slots: Vec<usize>,
    /// Side of the square product whose rate is measured [default: 8192, CPU 1024]
    #[arg(long, value_name = "N", value_parser = side)]
    side: Option<usize>,
    /// Say what the device's time goes to, kernel by kernel: once more with a look at its
    /// clock around each piece of work
    #[arg(long)]
    profile: bool,
    /// Lengths to use, a JSON list of [prompt, reply] in tokens
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    /// Write the lengths that would be used, as --lengths takes them, and stop
    #[arg(long)]
    print_lengths: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: Choice,
    #[command(flatten)]
    pub messages: Messages,
}

const EXAMPLES: &str = "
$ qlora-train bench --shape tiny --tokens 64 --steps 2 --prompts 4 --new-tokens 4
$ qlora-train bench --shape tiny --tokens 64,256 --steps 2 --recompute --prompts 0
";

#[derive(Clone)]
struct Shape {
    name: String,
    config: Config,
}

fn positive(text: &str) -> Result<usize, String> {
    let number: NonZeroUsize = text.parse().map_err(|e| format!("{e}"))?;
    Ok(number.get())
}

fn tokens(text: &str) -> Result<usize, String> {
    match positive(text)? {
        tokens @ ..=MOST_TOKENS => Ok(tokens),
        _ => Err(format!(
            "a step of at most {MOST_TOKENS} tokens is measured"
        )),
    }
}

fn side(text: &str) -> Result<usize, String> {
    match positive(text)? {
        side if side % 8 != 0 => Err("a multiple of 8 is needed".into()),
        side @ ..=MOST_SIDE => Ok(side),
        _ => Err(format!("a product of at most {MOST_SIDE}³ is measured")),
    }
}

fn shape(name: &str) -> Result<Shape, String> {
    let shape = |config| Shape {
        name: name.into(),
        config,
    };
    let qwen3 =
        |[hidden_size, intermediate_size, layers, heads, kv_heads]: [usize; 5], tied| Config {
            vocab_size: 151_936,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim: 128,
            max_positions: 40_960,
            rms_eps: 1e-6,
            rope_theta: 1e6,
            tied,
        };
    if name == "tiny" {
        return Ok(shape(Config {
            vocab_size: 1024,
            head_dim: 32,
            max_positions: 512,
            ..qwen3([128, 384, 2, 4, 2], true)
        }));
    }
    let found = SHAPES.iter().find(|(known, ..)| *known == name);
    let (_, sizes, tied) = found.ok_or_else(|| {
        let names = SHAPES.map(|(name, ..)| name).join(", ");
        format!("there is no shape {name:?}: {names}, tiny")
    })?;
    Ok(shape(qwen3(*sizes, *tied)))
}

/// The rates that the device has without us.
#[derive(Clone, Copy, Serialize)]
struct Rates {
    /// Of a large product, in 10¹² operations a second.
    product_tflops: f64,
    /// Of a copy, read and written, in 10⁹ bytes a second.
    copy_gb_per_s: f64,
}

/// One line of the output.
#[derive(Serialize)]
struct Figure<'a> {
    v: u32,
    version: &'a str,
    device: &'a str,
    shape: &'a str,
    layers: usize,
    /// Parameters of the products in the layers.
    parameters: usize,
    /// How the output projection is held.
    lm_head: LmHead,
    /// Whether quantised weights are decoded once and for all.
    keep_decoded: bool,
    #[serde(flatten)]
    rates: Rates,
    /// What free memory has dropped by since the device was opened.
    memory_bytes: Option<usize>,
    #[serde(flatten)]
    what: What,
}

#[derive(Serialize)]
#[serde(tag = "figure", rename_all = "lowercase")]
enum What {
    Train {
        rows: usize,
        tokens: usize,
        labelled: usize,
        recompute: bool,
        adamw_8bit: bool,
        steps: usize,
        seconds_per_step: f64,
        tokens_per_s: f64,
        /// Share of the product rate: 4 operations for each parameter and token; of the
        /// head, and of what follows attention in the last layer, for each labelled one
        /// only, as they are computed. Adapters, attention and what is computed again count
        /// as nothing.
        roofline: f64,
        /// Of the first step and of the last, in nats a labelled token: one text, so that the
        /// loss falls.
        losses: [f32; 2],
        /// How much more memory the last step left taken than the first.
        growth_bytes: Option<i64>,
        /// Of one step, the most time first.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        profile: Vec<Spending>,
    },
    Generate {
        prompts: usize,
        slots: usize,
        new_tokens: usize,
        /// How many different tokens were chosen.
        distinct_tokens: usize,
        seconds: f64,
        tokens_per_s: f64,
        /// Of all of it, prompts and replies.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        profile: Vec<Spending>,
    },
}

/// What one kind of work takes.
#[derive(Serialize)]
struct Spending {
    work: String,
    times: f64,
    seconds: f64,
    /// Of a product, in 10¹² operations a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    tflops: Option<f64>,
    /// What cuBLASLt computes it by: algorithm, tile, and so on, in its header's numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    algorithm: Option<String>,
}

/// What was spent, over so many steps alike.
fn spending(spent: Vec<Spent>, steps: u32) -> Vec<Spending> {
    let steps = f64::from(steps);
    let one = |spent: Spent| Spending {
        work: spent.work,
        times: spent.times as f64 / steps,
        seconds: spent.seconds / steps,
        tflops: spent.operations.map(|o| o / spent.seconds / 1e12),
        algorithm: spent.algorithm,
    };
    spent.into_iter().map(one).collect()
}

impl Bench {
    /// Does it.
    ///
    /// # Errors
    /// If the device fails, or has no room for the weights.
    pub fn run(&self, app: &App) -> Result<()> {
        let lengths = self.lengths()?;
        if self.print_lengths {
            let mut out = Output::stdout();
            out.json(&lengths)?;
            return Ok(out.flush()?);
        }
        let mut config = self.shape.config.clone();
        config.layers = self.layers.unwrap_or(config.layers).min(config.layers);
        self.check(&config)?;
        let (device, which) = Device::open(self.device)?;
        app.info(&which);
        match device {
            Device::Cpu(_) if self.profile => {
                let cause = "--profile: the processor has no clock of its own; perf record shows where its time goes";
                Err(Failure::Usage(cause.into()).into())
            }
            Device::Cpu(cpu) => self.measure::<_, false>(app, cpu, config, &lengths),
            Device::Cuda(cuda) => self.measure::<_, true>(app, cuda, config, &lengths),
        }
    }

    /// Figures that a shape has no room for.
    fn check(&self, config: &Config) -> Result<(), Failure> {
        let new = self.new_tokens as usize;
        for (flag, value, most, what) in [
            ("--rank", self.rank, config.hidden_size, "the shape is wide"),
            (
                "--new-tokens",
                new,
                config.max_positions,
                "the shape has positions",
            ),
            ("--prompts", self.prompts, MOST_PROMPTS, "are measured"),
        ] {
            if value > most {
                let cause = format!("{flag} {value}: more than {what} ({most})");
                return Err(Failure::Usage(cause));
            }
        }
        Ok(())
    }

    fn lengths(&self) -> Result<Vec<[usize; 2]>> {
        let Some(path) = &self.lengths else {
            return Ok(serde_json::from_str(LENGTHS)?);
        };
        let name = || path.display().to_string();
        let file = File::open(path);
        let file = file.map_err(|e| Failure::Usage(format!("--lengths {}: {e}", name())))?;
        let lengths: Vec<[usize; 2]> = serde_json::from_reader(file).with_context(name)?;
        let most = self.shape.config.max_positions;
        let fits = |&[prompt, reply]: &[usize; 2]| {
            prompt > 0 && reply > 0 && prompt.saturating_add(reply) <= most
        };
        match !lengths.is_empty() && lengths.iter().all(fits) {
            true => Ok(lengths),
            false => {
                let cause = format!(
                    "--lengths {}: pairs of at least one token each, of at most {most} together, are needed",
                    path.display()
                );
                Err(Failure::Usage(cause).into())
            }
        }
    }

    /// A device with memory `OF_ITS_OWN` is fast, and others seldom take from it.
    fn measure<B: Backend, const OF_ITS_OWN: bool>(
        &self,
        app: &App,
        backend: B,
        config: Config,
        lengths: &[[usize; 2]],
    ) -> Result<()> {
        let free = |backend: &B| match OF_ITS_OWN {
            true => backend.free_memory(),
            false => Ok(None),
        };
        let device = backend.describe();
        let side = self.side.unwrap_or(if OF_ITS_OWN { 8192 } else { 1024 });
        // A weight in bf16, what goes in and what comes out.
        let square = side * side * (2 + 2 * B::ACT_BYTES);
        if let Some(room) = backend.free_memory()?.filter(|room| square > *room) {
            let (needed, room) = (Size(square), Size(room));
            let cause = format!("--side {side}: needs {needed}, and {room} are free");
            return Err(Failure::Usage(cause).into());
        }
        app.info(format_args!(
            "measuring the device's own rates by a product of {side}³"
        ));
        let rates = rates(&backend, side)?;
        // What the first products make a library load is the context's.
        let before = free(&backend)?;
        let storage = |dense| match dense {
            true => Storage::AsStored,
            false => Storage::Nf4,
        };
        let held = Held {
            products: storage(self.dense),
            head: storage(self.lm_head == LmHead::AsStored),
        };
        // A processor's memory is handed out before it is there.
        let room = |backend: &B| match OF_ITS_OWN {
            true => Ok(None),
            false => backend.free_memory(),
        };
        let outline = Outline::random(&backend, config.clone(), held)?;
        let needed = outline.weights(&backend).total();
        if let Some(room) = room(&backend)?.filter(|room| needed > *room) {
            let (needed, room, shape) = (Size(needed), Size(room), &self.shape.name);
            let cause = format!(
                "--shape {shape}: its weights need {needed}, and {room} are free; with --layers it has fewer"
            );
            return Err(Failure::Usage(cause).into());
        }
        let started = Instant::now();
        let mut model = Model::random(backend, config, held).context("the random weights")?;
        if self.keep_decoded {
            let layers = model.config().layers;
            match model.keep_decoded(layers) {
                Ok(()) => {}
                Err(error @ engine::Error::OutOfMemory { .. }) => {
                    app.warn(format_args!("--keep-decoded: {error}"));
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        finish(model.backend())?;
        app.info(format_args!(
            "weights made in {:.1} s",
            started.elapsed().as_secs_f64()
        ));
        let parameters = parameters(model.config());
        let mut out = Output::stdout();
        let mut write = |(what, now): (What, Option<usize>)| -> Result<()> {
            let taken = before.zip(now).map(|(b, n)| b.saturating_sub(n));
            out.json(&Figure {
                v: 1,
                version: env!("CARGO_PKG_VERSION"),
                device: &device,
                shape: &self.shape.name,
                layers: model.config().layers,
                parameters,
                lm_head: self.lm_head,
                keep_decoded: self.keep_decoded,
                rates,
                memory_bytes: taken,
                what,
            })?;
            Ok(out.flush()?)
        };
        let adapter = AdapterConfig::new(self.rank, 2.0 * self.rank as f64);
        let layout = LoraLayout::new(model.config(), &adapter)?;
        let values = model.initial(&layout, 0)?;
        let mut trainer = Trainer {
            params: model.adapter_params(&layout, &values)?,
            grads: model.backend().alloc_f32(layout.len())?,
            optimiser: Optimiser::new(
                model.backend(),
                &layout,
                OptimiserKind {
                    eight_bit: self.adamw_8bit,
                    ..OptimiserKind::default()
                },
            )?,
            pass: Pass::new(self.keep()),
            layout: &layout,
            model: &model,
        };
        let room = room(model.backend())?;
        let fits = |what: String, needed: usize| {
            let lacking = room.filter(|room| needed > *room);
            if let Some(room) = lacking {
                let (needed, room) = (Size(needed), Size(room));
                app.warn(format_args!(
                    "{what}: left out, for they need {needed}, and {room} are free"
                ));
            }
            lacking.is_none()
        };
        for &tokens in &self.tokens {
            let texts = texts(lengths, tokens, model.config().vocab_size);
            let extent = Extent::of(&as_rows(&texts));
            let pass = outline.pass(model.backend(), &layout, extent, self.keep())?;
            if !fits(format!("--tokens {tokens}"), pass.total()) {
                continue;
            }
            match self.train(&mut trainer, &texts, rates, free) {
                Ok(what) => write(what)?,
                Err(error @ engine::Error::OutOfMemory { .. }) => {
                    app.warn(format_args!("{tokens} tokens: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        trainer.pass.release();
        for &slots in self.slots.iter().filter(|_| self.prompts > 0) {
            let (config, used) = (model.config(), slots.min(self.prompts));
            let keys = config.layers * config.kv_heads * config.head_dim * B::ACT_BYTES;
            // The keys and values of what is generated: of the prompts there are more.
            let least = used * self.new_tokens as usize * 2 * keys;
            if !fits(format!("--slots {slots}"), least) {
                continue;
            }
            write(self.generate(&trainer, lengths, slots, free)?)?;
            if let Some(why) = model.backend().unrecorded() {
                app.warn(format_args!("decoding was slower than it could be: {why}"));
            }
        }
        Ok(())
    }

    fn keep(&self) -> Keep {
        match self.recompute {
            true => Keep::Layers(0),
            false => Keep::All,
        }
    }

    fn train<B: Backend>(
        &self,
        trainer: &mut Trainer<'_, B>,
        texts: &[(Vec<u32>, Vec<bool>)],
        rates: Rates,
        free: impl Fn(&B) -> engine::Result<Option<usize>>,
    ) -> engine::Result<(What, Option<usize>)> {
        let (model, config) = (trainer.model, trainer.model.config());
        let mut pending: Option<Losses<B>> = None;
        let (mut started, mut left) = (Instant::now(), None);
        let (mut tokens, mut labelled) = (0, 0);
        let mut losses_summed: Vec<f32> = Vec::new();
        for step in 0..WARM_UP + self.steps as usize {
            if step + 1 == WARM_UP {
                // What this gives back is taken again before the clock starts.
                left = free(model.backend())?;
            }
            if step == WARM_UP {
                if let Some(losses) = pending.take() {
                    losses_summed.push(losses.wait()?.iter().sum());
                }
                started = Instant::now();
            }
            let batch = Batch::new(model.backend(), &as_rows(texts))?;
            (tokens, labelled) = (batch.tokens(), batch.labelled());
            // A loss is read when the next step is on its way.
            let losses = trainer.step(&batch)?;
            if let Some(earlier) = pending.replace(losses) {
                losses_summed.push(earlier.wait()?.iter().sum());
            }
        }
        if let Some(losses) = pending {
            losses_summed.push(losses.wait()?.iter().sum());
        }
        let seconds = started.elapsed().as_secs_f64() / f64::from(self.steps);
        let head = config.vocab_size * config.hidden_size;
        let wanted = head + behind_attention(config);
        let all = parameters(config) - behind_attention(config);
        let operations = 4.0 * (all * tokens + wanted * labelled) as f64;
        let after = free(model.backend())?;
        let mut profile = Vec::new();
        if self.profile {
            let steps = self.steps.min(PROFILED);
            let (done, spent) = model.backend().profile(|| {
                (0..steps).try_for_each(|_| {
                    let batch = Batch::new(model.backend(), &as_rows(texts))?;
                    trainer.step(&batch)?.wait().map(drop)
                })
            })?;
            done?;
            profile = spending(spent, steps);
        }
        let what = What::Train {
            rows: texts.len(),
            tokens,
            labelled,
            recompute: self.recompute,
            adamw_8bit: self.adamw_8bit,
            steps: self.steps as usize,
            seconds_per_step: seconds,
            losses: [0, losses_summed.len() - 1].map(|step| losses_summed[step] / labelled as f32),
            tokens_per_s: tokens as f64 / seconds,
            roofline: operations / seconds / (rates.product_tflops * 1e12),
            growth_bytes: left.zip(after).map(|(b, a)| b as i64 - a as i64),
            profile,
        };
        Ok((what, after))
    }

    fn generate<B: Backend>(
        &self,
        trainer: &Trainer<'_, B>,
        lengths: &[[usize; 2]],
        slots: usize,
        free: impl Fn(&B) -> engine::Result<Option<usize>>,
    ) -> engine::Result<(What, Option<usize>)> {
        let model = trainer.model;
        let vocabulary = model.config().vocab_size;
        let texts: Vec<_> = (0..self.prompts)
            .map(|i| ids(i, lengths[i % lengths.len()][0], vocabulary))
            .collect();
        let prompts: Vec<_> = (0..)
            .zip(&texts)
            .map(|(number, ids)| Prompt { number, ids })
            .collect();
        let how = Generation {
            sampling: Sampling {
                temperature: 0.7,
                top_k: 20,
                top_p: 0.8,
                seed: 0,
            },
            max_new_tokens: self.new_tokens as usize,
            stop_ids: &[],
            slots,
        };
        let prompt_lengths: Vec<_> = texts.iter().map(Vec::len).collect();
        let started = Instant::now();
        let mut memory = Slots::new(model, &prompt_lengths, &how)?;
        let mut pass = Pass::new(Keep::Nothing);
        let with = (model, Some(trainer.lora()));
        let mut all = || memory.generate(with, &mut pass, &prompts, &how, |_| {});
        let replies = all()?;
        let seconds = started.elapsed().as_secs_f64();
        let mut profile = Vec::new();
        if self.profile {
            let (done, spent) = model.backend().profile(all)?;
            done?;
            profile = spending(spent, 1);
        }
        let new: usize = replies.iter().map(|r| r.ids.len()).sum();
        let what = What::Generate {
            prompts: self.prompts,
            slots,
            new_tokens: self.new_tokens as usize,
            distinct_tokens: replies
                .iter()
                .flat_map(|r| &r.ids)
                .collect::<HashSet<_>>()
                .len(),
            seconds,
            tokens_per_s: new as f64 / seconds,
            profile,
        };
        // While it lies there.
        let left = free(model.backend())?;
        Ok((what, left))
    }
}

/// What a step changes, on its way from size to size.
struct Trainer<'a, B: Backend> {
    model: &'a Model<B>,
    layout: &'a LoraLayout,
    params: B::F32,
    grads: B::F32,
    optimiser: Optimiser<B>,
    pass: Pass<B>,
}

impl<B: Backend> Trainer<'_, B> {
    fn lora(&self) -> Lora<'_, B> {
        Lora {
            layout: self.layout,
            params: &self.params,
        }
    }

    fn step(&mut self, batch: &Batch<B>) -> engine::Result<Losses<B>> {
        let lora = Lora {
            layout: self.layout,
            params: &self.params,
        };
        let onto = (&mut self.grads, 1.0 / batch.labelled() as f32);
        let losses = self
            .model
            .losses_and_gradients(&mut self.pass, batch, lora, None, onto)?;
        let update = Update {
            lr: 1e-4,
            weight_decay: 0.0,
            max_norm: Some(1.0),
        };
        let backend = self.model.backend();
        self.optimiser
            .update(backend, update, &mut self.grads, &mut self.params);
        Ok(losses)
    }
}

/// Parameters of the layers' products.
fn parameters(config: &Config) -> usize {
    let one = |module: Module| module.shape(config).iter().product::<usize>();
    config.layers * Module::ALL.map(one).iter().sum::<usize>()
}

/// Those of one layer's products behind its attention.
fn behind_attention(config: &Config) -> usize {
    let behind = [Module::O, Module::Gate, Module::Up, Module::Down];
    let one = |module: Module| module.shape(config).iter().product::<usize>();
    behind.map(one).iter().sum()
}

/// Token ids that are spread over the vocabulary.
fn ids(number: usize, len: usize, vocabulary: usize) -> Vec<u32> {
    let id = |i: usize| (number * 7919 + i * 104_729 + 17) % vocabulary;
    (0..len).map(|i| id(i) as u32).collect()
}

/// Rows with the lengths in turn, those that still fit, and one at least: ids, and
/// which of them are learnt.
fn texts(lengths: &[[usize; 2]], tokens: usize, vocabulary: usize) -> Vec<(Vec<u32>, Vec<bool>)> {
    let (mut rows, mut left, mut passed_over) = (Vec::new(), tokens, 0);
    for &[prompt, reply] in lengths.iter().cycle() {
        let len = prompt + reply;
        if len <= left || rows.is_empty() {
            left = left.saturating_sub(len);
            passed_over = 0;
            let labelled = (0..len).map(|i| i >= prompt).collect();
            rows.push((ids(rows.len(), len, vocabulary), labelled));
        } else {
            passed_over += 1;
            if passed_over == lengths.len() {
                break;
            }
        }
    }
    rows
}

fn as_rows(texts: &[(Vec<u32>, Vec<bool>)]) -> Vec<Row<'_>> {
    (0..)
        .zip(texts)
        .map(|(number, (ids, labelled))| Row {
            number,
            ids,
            labelled,
        })
        .collect()
}

/// Waits for what is queued: one number is read behind it.
fn finish<B: Backend>(backend: &B) -> engine::Result<()> {
    let mark = backend.alloc_f32(1)?;
    backend.read_f32(&mark, 0..1).wait().map(drop)
}

/// The device's rates: of a bf16 product of `side`³, and of a copy of `side²` activations,
/// each when it has done it for a while, for its clock rises with the work.
fn rates<B: Backend>(backend: &B, side: usize) -> Result<Rates> {
    const WARM_UP: Duration = Duration::from_millis(300);
    const MEASURED: Duration = Duration::from_millis(500);
    let value = |i: usize| bf16::from_f32((i % 251) as f32 / 251.0 - 0.5);
    let values = (0..side * side).map(value).collect();
    let weight = backend.upload_matrix(HostMatrix::bf16(side, side, values))?;
    let rows: Vec<u32> = (0..side as u32).collect();
    let index = backend.upload_ids(&rows)?;
    let mut x = backend.alloc_act(side * side)?;
    backend.embed(&weight, &index, side, &mut x);
    let mut out = backend.alloc_act(side * side)?;
    let mut none = backend.alloc_act(0)?;
    let mut scratch =
        backend.alloc_workspace(backend.linear_scratch(&[&weight], [side, 0], false))?;
    let members = [Member {
        weight: &weight,
        adapter: None,
    }];
    let group = Group {
        layer: 0,
        members: &members,
    };
    let time = |work: &mut dyn FnMut()| -> engine::Result<f64> {
        let started = Instant::now();
        work();
        finish(backend)?;
        let mut each = started.elapsed();
        for long in [WARM_UP, MEASURED] {
            let (started, mut times) = (Instant::now(), 0);
            while started.elapsed() < long {
                // As many as are expected to take that long, so that few waits are in it.
                let left = long.saturating_sub(started.elapsed()).as_secs_f64();
                let more = (left / each.as_secs_f64()).clamp(1.0, 1e4) as u32;
                (0..more).for_each(|_| work());
                finish(backend)?;
                times += more;
            }
            each = started.elapsed() / times;
        }
        Ok(each.as_secs_f64())
    };
    let product = time(&mut || {
        let input = (&x, side);
        backend.linear(
            &group,
            None,
            None,
            input,
            None,
            &mut out,
            &mut none,
            &mut scratch,
        );
    })?;
    let copy = time(&mut || backend.gather(&x, &index, [side, side], &mut out))?;
    Ok(Rates {
        product_tflops: 2.0 * (side as f64).powi(3) / product / 1e12,
        copy_gb_per_s: (2 * B::ACT_BYTES * side * side) as f64 / copy / 1e9,
    })
}
