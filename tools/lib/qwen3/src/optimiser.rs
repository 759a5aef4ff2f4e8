//! AdamW over the flat parameter buffer, with moments that can be saved.

use std::ops::Range;

use engine::{AdamW, Backend, MOMENT_BLOCK, Reading, Result, Stretch};

use crate::LoraLayout;

/// What one update is done with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients with a larger global norm are scaled down to it.
    pub max_norm: Option<f32>,
}

/// What an optimiser is, for as long as it lives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimiserKind {
    /// Moments in 8 bits, each block of 256 values with a scale of its own, in about
    /// a quarter of the memory.
    ///
    /// Blocks are those of bitsandbytes' AdamW8bit: they begin with each factor. It
    /// keeps tensors of fewer than 4,096 values in 32 bits; here all are in 8. The
    /// difference shows with ranks below 4 and with DoRA, whose magnitudes are a tensor
    /// of 1,024 to 3,072 values for most products of the smaller models.
    pub eight_bit: bool,
    /// How many times as fast as the A factors the B factors learn (LoRA+, Hayou et
    /// al., arXiv 2402.12354), and DoRA's magnitudes with them, as peft has it.
    pub lr_ratio: f64,
}

impl Default for OptimiserKind {
    /// Moments in f32, one learning rate.
    fn default() -> Self {
        Self {
            eight_bit: false,
            lr_ratio: 1.0,
        }
    }
}

impl OptimiserKind {
    /// The stretches of the parameters in order, each with its rate over the
    /// update's: as few as one rate, and blocks that begin with each factor, allow.
    fn stretches(&self, layout: &LoraLayout) -> Vec<(Range<usize>, f64)> {
        let mut stretches: Vec<(Range<usize>, f64)> = Vec::new();
        for (range, fast) in layout.tensors() {
            let rate = if fast { self.lr_ratio } else { 1.0 };
            match stretches.last_mut() {
                Some((last, same))
                    if *same == rate
                        && (!self.eight_bit || last.len().is_multiple_of(MOMENT_BLOCK)) =>
                {
                    last.end = range.end;
                }
                _ => stretches.push((range, rate)),
            }
        }
        stretches
    }

    /// Blocks of one moment in 8 bits.
    fn blocks(&self, layout: &LoraLayout) -> usize {
        let stretches = self.stretches(layout);
        let blocks = |(range, _): &(Range<usize>, f64)| range.len().div_ceil(MOMENT_BLOCK);
        stretches.iter().map(blocks).sum()
    }

    /// Bytes that the moments take on the device.
    pub fn moment_bytes(&self, layout: &LoraLayout) -> usize {
        2 * match self.eight_bit {
            false => layout.len() * size_of::<f32>(),
            true => self.blocks(layout) * (MOMENT_BLOCK + size_of::<f32>()),
        }
    }
}

/// A moment in 8 bits, as [`engine::Backend::adamw_8bit`] keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedMoment {
    /// A code for each value of the blocks, the last of a factor being filled up.
    pub codes: Vec<u8>,
    /// The scale of each block.
    pub absmax: Vec<f32>,
}

/// First and second moments, to be saved.
#[derive(Debug, Clone, PartialEq)]
pub enum Moments {
    /// A float for each parameter.
    F32 {
        /// First moments.
        m: Vec<f32>,
        /// Second moments.
        v: Vec<f32>,
    },
    /// A byte for each parameter.
    EightBit {
        /// First moments.
        m: CodedMoment,
        /// Second moments.
        v: CodedMoment,
    },
}

impl Moments {
    /// Whether an optimiser of this kind can go on from them.
    pub fn fit(&self, kind: &OptimiserKind, layout: &LoraLayout) -> bool {
        match self {
            Self::F32 { m, v } => {
                !kind.eight_bit && [m, v].iter().all(|moment| moment.len() == layout.len())
            }
            Self::EightBit { m, v } => {
                let blocks = kind.blocks(layout);
                let size = |moment: &CodedMoment| (moment.codes.len(), moment.absmax.len());
                let fits = |moment| size(moment) == (blocks * MOMENT_BLOCK, blocks);
                kind.eight_bit && fits(m) && fits(v)
            }
        }
    }
}

/// Codes and scales on the device.
struct OnDevice<B: Backend> {
    codes: B::Ids,
    absmax: B::F32,
}

impl<B: Backend> OnDevice<B> {
    fn zero(backend: &B, blocks: usize) -> Result<Self> {
        Ok(Self {
            codes: backend.alloc_ids(blocks * MOMENT_BLOCK / 4)?,
            absmax: backend.alloc_f32(blocks)?,
        })
    }

    fn upload(backend: &B, moment: &CodedMoment) -> Result<Self> {
        let words = moment.codes.as_chunks().0.iter();
        let words: Vec<u32> = words.map(|&bytes| u32::from_le_bytes(bytes)).collect();
        Ok(Self {
            codes: backend.upload_ids(&words)?,
            absmax: backend.upload_f32(&moment.absmax)?,
        })
    }

    fn read(
        &self,
        backend: &B,
        blocks: usize,
    ) -> impl FnOnce() -> Result<CodedMoment> + Send + use<B> {
        let words = backend.read_ids(&self.codes, blocks * MOMENT_BLOCK / 4);
        let absmax = backend.read_f32(&self.absmax, 0..blocks);
        || {
            let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect();
            Ok(CodedMoment {
                codes: bytes(words.wait()?),
                absmax: absmax.wait()?,
            })
        }
    }
}

enum State<B: Backend> {
    F32 { m: B::F32, v: B::F32 },
    EightBit { m: OnDevice<B>, v: OnDevice<B> },
}

/// AdamW (β 0.9 and 0.999, ε 1e-8): its moments, and the number of updates done.
pub struct Optimiser<B: Backend> {
    state: State<B>,
    norm: B::F32,
    /// Trained parameters.
    len: usize,
    /// Blocks of a moment in 8 bits.
    blocks: usize,
    stretches: Vec<(Range<usize>, f64)>,
    steps: u64,
}

impl<B: Backend> Optimiser<B> {
    /// Zero moments.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(backend: &B, layout: &LoraLayout, kind: OptimiserKind) -> Result<Self> {
        let blocks = kind.blocks(layout);
        let state = match kind.eight_bit {
            false => State::F32 {
                m: backend.alloc_f32(layout.len())?,
                v: backend.alloc_f32(layout.len())?,
            },
            true => State::EightBit {
                m: OnDevice::zero(backend, blocks)?,
                v: OnDevice::zero(backend, blocks)?,
            },
        };
        Self::with(backend, layout, kind, state, 0)
    }

    /// Continues from saved moments, after `steps` updates.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If the moments do not [fit](Moments::fit).
    pub fn restore(
        backend: &B,
        layout: &LoraLayout,
        kind: OptimiserKind,
        moments: &Moments,
        steps: u64,
    ) -> Result<Self> {
        assert!(moments.fit(&kind, layout), "moments of another optimiser");
        let state = match moments {
            Moments::F32 { m, v } => State::F32 {
                m: backend.upload_f32(m)?,
                v: backend.upload_f32(v)?,
            },
            Moments::EightBit { m, v } => State::EightBit {
                m: OnDevice::upload(backend, m)?,
                v: OnDevice::upload(backend, v)?,
            },
        };
        Self::with(backend, layout, kind, state, steps)
    }

    fn with(
        backend: &B,
        layout: &LoraLayout,
        kind: OptimiserKind,
        state: State<B>,
        steps: u64,
    ) -> Result<Self> {
        Ok(Self {
            state,
            norm: backend.alloc_f32(1)?,
            len: layout.len(),
            blocks: kind.blocks(layout),
            stretches: kind.stretches(layout),
            steps,
        })
    }

    /// Starts reading the first and second moments, as they are now, to be saved: what comes
    /// of it waits for them, on any thread, and fails if the device does.
    pub fn moments(&self, backend: &B) -> Box<dyn FnOnce() -> Result<Moments> + Send> {
        match &self.state {
            State::F32 { m, v } => {
                let [m, v] = [m, v].map(|moment| backend.read_f32(moment, 0..self.len));
                Box::new(|| {
                    Ok(Moments::F32 {
                        m: m.wait()?,
                        v: v.wait()?,
                    })
                })
            }
            State::EightBit { m, v } => {
                let [m, v] = [m, v].map(|moment| moment.read(backend, self.blocks));
                Box::new(|| Ok(Moments::EightBit { m: m()?, v: v()? }))
            }
        }
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One update; the gradients are zeroed for the next. Gives the global norm
    /// of the gradients before clipping, to be read when convenient.
    pub fn update(
        &mut self,
        backend: &B,
        with: Update,
        grads: &mut B::F32,
        params: &mut B::F32,
    ) -> B::Reading {
        self.steps += 1;
        let settings = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step: self.steps,
            max_norm: with.max_norm,
        };
        let stretch = |(range, rate): &(Range<usize>, f64)| Stretch {
            range: range.clone(),
            lr: with.lr * rate,
            decay: with.weight_decay,
        };
        let stretches: Vec<_> = self.stretches.iter().map(stretch).collect();
        backend.global_norm(grads, self.len, &mut self.norm);
        let gradient = (&*grads, &self.norm);
        match &mut self.state {
            State::F32 { m, v } => {
                backend.adamw(&settings, &stretches, gradient, params, (m, v));
            }
            State::EightBit { m, v } => {
                let moments = [m, v].map(|moment| (&mut moment.codes, &mut moment.absmax));
                backend.adamw_8bit(&settings, &stretches, gradient, params, moments);
            }
        }
        backend.zero(grads, self.len);
        backend.read_f32(&self.norm, 0..1)
    }
}
