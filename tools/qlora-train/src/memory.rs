//! How much of a device's memory a run takes, and what is left out so that it fits.
//!
//! In this order: quantised weights are decoded for each product, not once and for all,
//! in as many layers as must; layers compute again what their backward pass needs,
//! and do not keep it; passes become shorter. The first two change no bit of the result.
//! The last changes the last bits, so it goes by halves, which small differences in
//! free memory do not tip, and a resumed run keeps the length it began with.
//!
//! In that order, for a byte of what a layer computed saves several times as much
//! time as one of a decoded weight.

use std::fmt::Write;

use anyhow::Result;
use cli::Failure;
use engine::Backend;
use qwen3::plan::{self, Memory, Outline, Part};
use qwen3::{Checkpoint, Held, Keep, LoraLayout, OptimiserKind};
use settings::{LmHead, Optim, Quantization, TrainSettings};

use crate::plan::Plan;
use crate::rows::Rows;
use crate::stream::Survey;
use crate::train::optimiser_of;

/// Most tokens of a pass on the processor, where longer ones gain no speed.
const CPU_PASS: usize = 4096;

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// That of the processor, which the program itself is in too.
    Processor,
    /// A GPU's own.
    Gpu,
}

/// What may be taken, and who says so.
#[derive(Debug, Clone, Copy)]
struct Budget {
    /// Bytes; none: nobody knows how many there are.
    bytes: Option<usize>,
    asked: bool,
    /// What can be had, whatever is asked for.
    there: Option<usize>,
}

/// How a run fits.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Most tokens of a pass.
    pub pass_tokens: usize,
    /// What a pass keeps.
    pub keep: Keep,
    /// Layers whose weights are decoded once and for all.
    pub decoded: usize,
    /// The passes.
    pub survey: Survey,
    layers: usize,
    memory: Memory,
    /// On the processor: the program with its rows, and a checkpoint being written.
    host: Host,
    budget: Budget,
    place: Place,
    /// What the device had free before, and the most that was allocated by then.
    free: Option<usize>,
    peak: Option<usize>,
    /// On the processor: the most that was taken before the plan, which is of what comes.
    before: Option<Peak>,
}

/// The most that the program had in the processor's memory so far, in bytes.
#[derive(Debug, Clone, Copy)]
struct Peak {
    resident: usize,
    /// Without pages of files, which are given up when room is short.
    own: usize,
}

/// What was taken of a device's memory.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// The most so far.
    pub bytes: usize,
    /// It was while the rows were read, and the training took no more.
    reading: bool,
}

/// What is in the processor's memory beside the training itself.
#[derive(Debug, Clone, Copy, Default)]
struct Host {
    program: usize,
    saving: usize,
}

impl Host {
    fn total(&self) -> usize {
        self.program + self.saving
    }
}

/// What decides about memory, apart from how it is laid out.
struct Need<'a, B: Backend> {
    backend: &'a B,
    outline: Outline<B>,
    layout: &'a LoraLayout,
    /// Weights, adapter, gradients, moments.
    lasting: Memory,
    host: Host,
    budget: Budget,
    place: Place,
    free: Option<usize>,
    peak: Option<usize>,
    before: Option<Peak>,
}

impl Fit {
    /// Fits a run into what there is, with passes of at most `began_with` tokens if it
    /// is one that goes on.
    ///
    /// # Errors
    /// If not even its longest row fits.
    pub fn new<B: Backend>(
        backend: &B,
        place: Place,
        (checkpoint, held): (&Checkpoint, Held),
        (settings, plan, rows): (&TrainSettings, &Plan, &Rows),
        began_with: Option<usize>,
    ) -> Result<Self> {
        let t = &settings.training;
        let outline = Outline::new(backend, checkpoint, held)?;
        let kind = optimiser_of(settings);
        let (host, before) = match place {
            Place::Processor => (Host::now(&plan.layout, &kind), Peak::now()),
            Place::Gpu => (Host::default(), None),
        };
        let free = backend.free_memory()?;
        let need = Need {
            lasting: outline.weights(backend) + plan::adapter(&plan.layout, &kind),
            budget: Budget::new(t.max_memory.as_deref(), free, place, host.program)?,
            place,
            free,
            peak: backend.peak_memory()?,
            layout: &plan.layout,
            outline,
            backend,
            host,
            before,
        };
        let survey = |most| Survey::new(rows, t, (plan.steps, plan.rows_per_step), most);
        let mut most = match began_with {
            Some(most) => most,
            None if !t.packing => 1,
            None if place == Place::Processor => CPU_PASS,
            // Every step one pass.
            None => survey(usize::MAX).extent.tokens.next_power_of_two(),
        };
        loop {
            let survey = survey(most);
            if let Some(fit) = need.fit(most, survey)? {
                return Ok(fit);
            }
            let longest = survey.extent.longest.max(survey.held_out_extent.longest);
            if began_with.is_some() || most <= longest {
                return Err(need.refusal(settings, began_with, survey)?.into());
            }
            most /= 2;
        }
    }

    /// What there is to be said where training.max_memory asks for more than can be had,
    /// and the plan goes by it.
    pub fn doubt(&self) -> Option<String> {
        let (planned, there) = (self.planned(), self.budget.there?);
        (self.budget.asked && planned > there).then(|| {
            format!(
                "training.max_memory: {} are planned, and {} can be had: it may run out on the way",
                Size(planned),
                Size(there)
            )
        })
    }

    /// Bytes that the plan has in all.
    pub fn planned(&self) -> usize {
        self.memory.total() + self.host.total()
    }

    /// The most that was taken so far, if the system tells. On a GPU what was allocated at
    /// the same time: to ask it for its free memory would wait for the step that is queued.
    pub fn taken_so_far<B: Backend>(&self, backend: &B) -> Option<Taken> {
        match self.place {
            Place::Processor => {
                let now = Peak::now()?;
                let before = self.before.filter(|before| now.resident <= before.resident);
                Some(Taken {
                    bytes: before.unwrap_or(now).own,
                    reading: before.is_some(),
                })
            }
            Place::Gpu => {
                let now = backend.peak_memory().ok()??;
                Some(Taken {
                    bytes: now.saturating_sub(self.peak?),
                    reading: false,
                })
            }
        }
    }

    /// The same while all of it is still there: on a GPU what its free memory has dropped by,
    /// if that is more, for its memory is handed out in larger pieces, and its libraries take
    /// some.
    pub fn taken_at_the_end<B: Backend>(&self, backend: &B) -> Option<Taken> {
        let mut taken = self.taken_so_far(backend)?;
        if let (Place::Gpu, Some(before)) = (self.place, self.free) {
            let now = backend.free_memory().ok()??;
            taken.bytes = taken.bytes.max(before.saturating_sub(now));
        }
        Some(taken)
    }

    /// Says what helps where the device had less room than was planned with.
    pub fn with_remedy(&self, error: anyhow::Error) -> anyhow::Error {
        if !qwen3::is_out_of_memory(error.as_ref()) {
            return error;
        }
        Failure::World(format!(
            "{error:#}; {} were planned, and there is less, as where others use that memory: end them, or plan \
             with less by --max-memory; with --resume the same command goes on from the last checkpoint",
            Size(self.planned())
        ))
        .into()
    }

    /// What was taken beside what was planned; and whether that is so much more that
    /// whoever set training.max_memory is to be warned.
    pub fn outcome(&self, taken: Taken) -> (String, bool) {
        let planned = self.planned();
        let (line, is_more) = outcome(taken, planned);
        (line, is_more && self.budget.asked)
    }

    /// The plan in lines.
    pub fn describe(&self) -> Vec<String> {
        let mut head = format!("memory: {} in all", Size(self.planned()));
        if let Some(bytes) = self.budget.bytes {
            let whose = match self.budget.asked {
                true => "that training.max_memory allows",
                false => "that can be had",
            };
            let _ = write!(head, ", of {} {whose}", Size(bytes));
        }
        let kept = match self.keep {
            Keep::Layers(kept) => format!("the insides of {kept} of {} layers", self.layers),
            Keep::All | Keep::Nothing => "the insides of layers".into(),
        };
        let decoded = format!(
            "those of {} of {} layers decoded as well, for speed",
            self.decoded, self.layers
        );
        let parts = Part::ALL.map(|part| {
            let words = match part {
                Part::Layers => "the layers' weights",
                Part::Decoded => &decoded,
                Part::Embedding => "the embedding table",
                Part::Head => "the output projection",
                Part::Tables => "norms and rotary angles",
                Part::Adapter => "the adapter",
                Part::Gradients => "its gradients",
                Part::Moments => "the optimiser's moments",
                Part::Streams => "what goes into each layer",
                Part::Insides => &kept,
                Part::Shared => "the inside of a layer that is computed again",
                Part::Down => "gradients on their way down",
                Part::Predictions => "the rows that predict",
                Part::Scratch => "scratch",
                Part::Batch => "the batch",
            };
            (words.to_owned(), self.memory.of(part))
        });
        let beside = [
            ("this program and its rows".into(), self.host.program),
            (
                "a checkpoint on its way to the disk".into(),
                self.host.saving,
            ),
        ];
        let lines = parts.into_iter().chain(beside);
        let lines = lines
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(words, bytes)| format!("{:>11}  {words}", Size(bytes).to_string()));
        std::iter::once(head).chain(lines).collect()
    }
}

impl<B: Backend> Need<'_, B> {
    /// Bytes of a run in these passes: those of the training or of the evaluation,
    /// whose buffers take turns.
    fn memory(&self, survey: &Survey, keep: Keep) -> engine::Result<Memory> {
        let pass = |extent, keep| -> engine::Result<_> {
            let pass = (self.outline).pass(self.backend, self.layout, extent, keep)?;
            Ok(self.lasting + pass)
        };
        let training = pass(survey.extent, keep)?;
        let evaluation = pass(survey.held_out_extent, Keep::Nothing)?;
        Ok(match evaluation.total() > training.total() {
            true => evaluation,
            false => training,
        })
    }

    fn affords(&self, memory: &Memory) -> bool {
        let total = memory.total() + self.host.total();
        self.budget.bytes.is_none_or(|bytes| total <= bytes)
    }

    /// With as much kept as there is room for, and decoded in what is left; none
    /// where there is no room at all.
    fn fit(&self, pass_tokens: usize, survey: Survey) -> Result<Option<Fit>> {
        let layers = self.outline.config().layers;
        let levels = (0..layers.saturating_sub(1)).rev().map(Keep::Layers);
        for keep in std::iter::once(Keep::All).chain(levels) {
            let memory = self.memory(&survey, keep)?;
            if self.affords(&memory) {
                let with = |decoded| memory + self.outline.decoded(self.backend, decoded);
                let fits = |decoded: &usize| self.affords(&with(*decoded));
                let decoded = (1..=layers).rev().find(fits).unwrap_or(0);
                return Ok(Some(Fit {
                    pass_tokens,
                    keep,
                    decoded,
                    survey,
                    layers,
                    memory: with(decoded),
                    host: self.host,
                    budget: self.budget,
                    place: self.place,
                    free: self.free,
                    peak: self.peak,
                    before: self.before,
                }));
            }
        }
        Ok(None)
    }

    /// Why nothing fits, and what would.
    fn refusal(
        &self,
        settings: &TrainSettings,
        began_with: Option<usize>,
        survey: Survey,
    ) -> Result<Failure> {
        let least = self.memory(&survey, Keep::Layers(0))?.total() + self.host.total();
        let least = Size(least);
        let longest = survey.extent.longest.max(survey.held_out_extent.longest);
        let allowed = Size(self.budget.bytes.unwrap_or(usize::MAX));
        let there = match self.budget.asked {
            true => format!("training.max_memory allows {allowed}"),
            false => format!("there are {allowed}"),
        };
        let cause = match began_with {
            Some(most) => format!(
                "the run's passes of up to {most} tokens need {least} at least, and {there}: go on with it where \
                 there is more, or train in another folder (make: RUN=new)"
            ),
            None => {
                let mut remedies = Vec::new();
                if settings.model.quantization == Quantization::None {
                    remedies.push("model.quantization: nf4".into());
                }
                if settings.training.optim == Optim::AdamW {
                    remedies.push("training.optim: adamw_8bit".into());
                }
                // A tied one would be a copy more, but where the table may leave the device.
                let less = !self.outline.config().tied || self.place == Place::Gpu;
                if less && settings.model.lm_head == LmHead::AsStored {
                    remedies.push("model.lm_head: nf4".into());
                }
                remedies.push("a lower lora.rank".into());
                let fits = self.longest_row(longest)?;
                if fits > 0 {
                    remedies.push(format!(
                        "rows of up to {fits} tokens (training.max_seq_length)"
                    ));
                }
                let fixed = Size(self.lasting.total() + self.host.total());
                format!(
                    "a row of {longest} tokens needs {least} at least, {fixed} of it for the base and its adapter, \
                     and {there}; what would help: {}",
                    remedies.join(", ")
                )
            }
        };
        Ok(match self.budget.asked {
            true => Failure::Usage(cause),
            false => Failure::World(cause),
        })
    }

    /// Tokens of the longest row that fits alone, below `below`; 0: not one token.
    fn longest_row(&self, below: usize) -> Result<usize> {
        let (mut fits, mut fails) = (0, below);
        while fits + 1 < fails {
            let tokens = (fits + fails) / 2;
            let extent = plan::Extent {
                rows: 1,
                tokens,
                labelled: tokens,
                longest: tokens,
            };
            let survey = Survey {
                extent,
                ..Survey::default()
            };
            match self.affords(&self.memory(&survey, Keep::Layers(0))?) {
                true => fits = tokens,
                false => fails = tokens,
            }
        }
        Ok(fits)
    }
}

impl Host {
    /// What the program has taken so far; and, while a checkpoint is written, its values
    /// as they are read, as bytes, and as a file.
    fn now(layout: &LoraLayout, kind: &OptimiserKind) -> Self {
        let state = layout.len() * size_of::<f32>() + kind.moment_bytes(layout);
        Self {
            program: status("RssAnon").unwrap_or(0),
            saving: 3 * state,
        }
    }
}

impl Peak {
    fn now() -> Option<Self> {
        let resident = status("VmHWM")?;
        let own = resident.saturating_sub(status("RssFile")?);
        Some(Self { resident, own })
    }
}

/// What threads and libraries may take beside any plan: nothing to an 8B, and half of what
/// a model of a few megabytes takes.
const SLACK: usize = 32 << 20;

/// See [`Fit::outcome`]; one part in twenty more is a plan that did not hold.
fn outcome(taken: Taken, planned: usize) -> (String, bool) {
    let (when, why) = match taken.reading {
        true => (
            ", while the rows were read",
            "reading takes room that the training, which alone is planned, has again",
        ),
        false => ("", "threads (--threads) and libraries take some beside it"),
    };
    let (bytes, most) = (Size(taken.bytes), Size(planned));
    let mut line = format!("memory taken: {bytes}{when}; planned: {most}");
    let over = 100.0 * (taken.bytes as f64 / planned as f64 - 1.0);
    let is_more = over > 5.0 && taken.bytes - planned > SLACK;
    if is_more {
        let _ = write!(line, "; exceeded by {over:.0}%: {why}");
    }
    (line, is_more)
}

/// Bytes under a key of this process's status.
fn status(key: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: usize = line
        .strip_prefix(':')?
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()?;
    Some(kib * 1024)
}

impl Budget {
    /// What the settings allow, or what is free but for a margin.
    ///
    /// On the processor a tenth is left: what is available is the kernel's estimate,
    /// and other programs grow. On a GPU see [`plan::usable`].
    fn new(asked: Option<&str>, free: Option<usize>, place: Place, program: usize) -> Result<Self> {
        let there = free.map(|free| match place {
            Place::Processor => program + (free - free / 10),
            Place::Gpu => plan::usable(free),
        });
        let wrong = |cause| Failure::Usage(format!("training.max_memory {cause}"));
        let bytes = asked.map(parse).transpose().map_err(wrong)?;
        Ok(Self {
            bytes: bytes.or(there),
            asked: bytes.is_some(),
            there,
        })
    }
}

/// `8GB`, `6.5GiB`, `900 MB`, or bytes; else what is wrong with it.
pub fn parse(text: &str) -> Result<usize, String> {
    let units = [
        ("gib", 1u64 << 30),
        ("mib", 1 << 20),
        ("kib", 1 << 10),
        ("gb", 1_000_000_000),
        ("mb", 1_000_000),
        ("kb", 1000),
        ("b", 1),
        ("", 1),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let read = units.iter().find_map(|(unit, factor)| {
        let number: f64 = lower.strip_suffix(unit)?.trim_end().parse().ok()?;
        (number.is_finite() && number > 0.0).then_some(number * *factor as f64)
    });
    read.map(|bytes| bytes as usize)
        .ok_or_else(|| format!("is {text:?}; it must be a size such as 8GB, 6.5GiB or 900MB"))
}

/// Bytes for people.
pub struct Size(pub usize);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            1_000_000_000.. => write!(f, "{:.2} GB", bytes / 1e9),
            1_000_000.. => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.1} kB", bytes / 1e3),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("8GB", 8_000_000_000),
            ("6.5GiB", 6_979_321_856),
            ("900 MB", 900_000_000),
            (" 1kib ", 1024),
            ("12345", 12345),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for wrong in ["", "GB", "8 potatoes", "-1GB", "0", "nanGB", "infGB"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let budget = |asked| Budget::new(asked, Some(10 << 30), Place::Gpu, 0).unwrap();
        let there = budget(None).bytes;
        assert!(there.is_some_and(|bytes| bytes < 10 << 30));
        assert_eq!(
            (budget(Some("80GB")).bytes, budget(Some("80GB")).there),
            (Some(80_000_000_000), there)
        );
        assert_eq!(Size(1_234_567_890).to_string(), "1.23 GB");
        assert_eq!(Size(12_345_678).to_string(), "12.3 MB");
        assert_eq!(Size(12).to_string(), "0.0 kB");
    }

    #[test]
    fn more_than_was_planned_is_said() {
        let taken = |bytes, reading| outcome(Taken { bytes, reading }, 1_000_000_000);
        let (line, is_more) = taken(1_040_000_000, false);
        assert_eq!(line, "memory taken: 1.04 GB; planned: 1.00 GB");
        assert!(!is_more && !taken(50, false).1);
        let small = |bytes| {
            outcome(
                Taken {
                    bytes,
                    reading: false,
                },
                40_000_000,
            )
            .1
        };
        assert!(!small(70_000_000) && small(75_000_000));
        let (line, is_more) = taken(1_100_000_000, false);
        assert!(is_more && line.contains("planned: 1.00 GB; exceeded by 10%: threads"));
    }
}
