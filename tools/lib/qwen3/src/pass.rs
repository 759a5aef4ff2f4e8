//! The buffers of one pass through the model.
//!
//! Everything that backward needs from forward has a name here. Buffers grow to
//! the largest batch seen and are then reused, so a training step allocates
//! nothing after the first few.
//!
//! Buffers are made through an [`Account`], which can also go through the motions
//! with empty ones: so what a plan says and what a pass takes are the same code.

use engine::{Backend, Result};

use crate::lora::Ranks;
use crate::model::Model;
use crate::plan::{Account, Extent, Part};
use crate::{Config, Lora, LoraLayout};

/// What a pass is for, which decides what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: evaluation and generation.
    Nothing,
    /// The inputs of every layer and the insides of so many; those of the others
    /// are computed again in the backward pass. Recomputing all of them is about a
    /// third more arithmetic, a fraction of the memory, and the same bits.
    Layers(usize),
    /// Everything.
    All,
}

impl Keep {
    /// Buffers for the insides of so many layers that are trained or above one that
    /// is. Those for which there is none of their own share the last one, in which
    /// backward still finds the last layer.
    fn insides(self, trained: usize) -> usize {
        let kept = match self {
            Self::Nothing => 0,
            Self::Layers(kept) => kept,
            Self::All => usize::MAX,
        };
        trained.min(kept.saturating_add(1)).max(1)
    }
}

/// What a layer computes on the way, beside its input and output.
pub(crate) struct LayerActs<B: Backend> {
    pub rstd1: B::F32,
    /// `[tokens, hidden]` normed input of the attention.
    pub norm1: B::Act,
    /// `[tokens, Σ rank]` of each group.
    pub xa: [B::Act; 4],
    /// `[tokens, q + 2k]` projected queries, keys, values.
    pub qkv: B::Act,
    pub rstd_qk: B::F32,
    /// `[tokens, q + k]` normed, rotated queries and keys.
    pub qk: B::Act,
    /// `[tokens, q]`
    pub attended: B::Act,
    pub lse: B::F32,
    /// `[tokens, hidden]` between attention and MLP.
    pub middle: B::Act,
    pub rstd2: B::F32,
    pub norm2: B::Act,
    /// `[tokens, 2 inner]`
    pub gate_up: B::Act,
    /// `[tokens, inner]`
    pub inner: B::Act,
}

impl<B: Backend> LayerActs<B> {
    fn new(
        account: &mut Account<'_, B>,
        part: Part,
        c: &Config,
        tokens: usize,
        ranks: Ranks,
    ) -> Result<Self> {
        let heads = c.attention();
        let [r0, r1, r2, r3] = ranks.groups;
        let mut of = account.rows(part, tokens);
        Ok(Self {
            rstd1: of.f32(1)?,
            norm1: of.act(c.hidden_size)?,
            xa: [of.act(r0)?, of.act(r1)?, of.act(r2)?, of.act(r3)?],
            qkv: of.act(heads.qkv())?,
            rstd_qk: of.f32(heads.query + heads.kv)?,
            qk: of.act(heads.qk())?,
            attended: of.act(heads.q())?,
            lse: of.f32(heads.query)?,
            middle: of.act(c.hidden_size)?,
            rstd2: of.f32(1)?,
            norm2: of.act(c.hidden_size)?,
            gate_up: of.act(2 * c.intermediate_size)?,
            inner: of.act(c.intermediate_size)?,
        })
    }
}

/// The tokens that predict, from the last layer's attention, behind which it goes on
/// with them alone, to the loss.
pub(crate) struct HeadActs<B: Backend> {
    /// `[labelled, q]` what they attended to.
    pub attended: B::Act,
    /// `[labelled, hidden]` the last layer's input.
    pub x: B::Act,
    pub rstd: B::F32,
    /// `[labelled, hidden]` the final norm of its output.
    pub normed: B::Act,
    /// `[labelled]`
    pub nll: B::F32,
    pub grads: Option<HeadGrads<B>>,
}

/// Gradients of the tokens that predict.
pub(crate) struct HeadGrads<B: Backend> {
    /// `[labelled, hidden]` by the normed output.
    pub normed: B::Act,
    /// `[labelled, hidden]` by the residual stream.
    pub stream: B::Act,
    /// `[labelled, q]`
    pub attended: B::Act,
}

/// Gradients on their way down.
pub(crate) struct GradActs<B: Backend> {
    /// `[tokens, hidden]` by the residual stream.
    pub stream: B::Act,
    /// `[tokens, hidden]` by a normed input.
    pub normed: B::Act,
    /// `[tokens, q + 2k]`
    pub qkv: B::Act,
    /// `[tokens, q]`
    pub attended: B::Act,
    /// `[tokens, 2 inner]`
    pub gate_up: B::Act,
    /// `[tokens, inner]`
    pub inner: B::Act,
}

/// How large the buffers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub tokens: usize,
    pub labelled: usize,
    pub longest: usize,
    /// Layers from the lowest with an adapter upwards.
    pub trained: usize,
    pub ranks: Ranks,
}

impl Size {
    /// Of a batch of `[tokens, predictions, longest row]` with an adapter.
    pub fn new([tokens, labelled, longest]: [usize; 3], layout: Option<&LoraLayout>) -> Self {
        Self {
            tokens,
            labelled,
            longest,
            trained: layout.map_or(0, LoraLayout::trained_layers),
            ranks: layout.map_or_else(Ranks::default, LoraLayout::ranks),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            labelled: self.labelled.max(other.labelled),
            longest: self.longest.max(other.longest),
            trained: self.trained.max(other.trained),
            ranks: self.ranks.max(other.ranks),
        }
    }
}

/// The buffers themselves.
pub(crate) struct Buffers<B: Backend> {
    size: Size,
    /// The residual stream before each layer and after the last, or two buffers
    /// in turn where nothing is kept.
    pub stream: Vec<B::Act>,
    pub layers: Vec<LayerActs<B>>,
    /// Which of `layers` is each layer's.
    pub inside: Vec<usize>,
    pub head: HeadActs<B>,
    pub grads: Option<GradActs<B>>,
    pub scratch: B::Workspace,
}

/// The memory of forward and backward passes, reused from batch to batch.
pub struct Pass<B: Backend> {
    keep: Keep,
    buffers: Option<Buffers<B>>,
}

impl<B: Backend> Pass<B> {
    /// No memory yet; batches bring their own need.
    pub fn new(keep: Keep) -> Self {
        Self {
            keep,
            buffers: None,
        }
    }

    /// What it keeps.
    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// Gives its memory back; the next batch brings its need again.
    pub fn release(&mut self) {
        self.buffers = None;
    }

    /// Makes room for batches of this extent at once, so that nothing is allocated later
    /// but the batches themselves.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn reserve(
        &mut self,
        model: &Model<B>,
        extent: Extent,
        layout: Option<&LoraLayout>,
    ) -> Result<()> {
        let batch = [extent.tokens, extent.labelled, extent.longest];
        self.hold(model, Size::new(batch, layout)).map(drop)
    }

    /// Buffers for `[tokens, predictions, longest row]`, grown where they were
    /// too small.
    pub(crate) fn fit(
        &mut self,
        model: &Model<B>,
        batch: [usize; 3],
        lora: Option<Lora<'_, B>>,
    ) -> Result<&mut Buffers<B>> {
        self.hold(model, Size::new(batch, lora.map(|lora| lora.layout)))
    }

    fn hold(&mut self, model: &Model<B>, mut size: Size) -> Result<&mut Buffers<B>> {
        // The old buffers go before the new ones come.
        let old = self.buffers.take();
        let kept = match old {
            Some(buffers) if buffers.size.max(size) == buffers.size => buffers,
            old => {
                if let Some(old) = old {
                    size = size.max(old.size);
                }
                let scratch = model.scratch([size.tokens, size.labelled, size.longest], size.ranks);
                let mut account = Account::new(model.backend());
                Buffers::new(&mut account, model.config(), size, self.keep, scratch)?
            }
        };
        Ok(self.buffers.insert(kept))
    }
}

impl<B: Backend> Buffers<B> {
    /// `scratch` is in bytes.
    pub fn new(
        account: &mut Account<'_, B>,
        c: &Config,
        size: Size,
        keep: Keep,
        scratch: usize,
    ) -> Result<Self> {
        let Size {
            tokens,
            labelled,
            trained,
            ranks,
            ..
        } = size;
        let streams = match keep {
            Keep::Nothing => 2,
            Keep::Layers(_) | Keep::All => c.layers + 1,
        };
        let mut of = account.rows(Part::Streams, tokens);
        let stream = (0..streams)
            .map(|_| of.act(c.hidden_size))
            .collect::<Result<_>>()?;
        let insides = keep.insides(trained);
        let own = |l: usize| l.saturating_sub(c.layers - trained);
        let layers = (1..=insides)
            .map(|number| {
                let part = match number < insides || insides == trained {
                    true => Part::Insides,
                    false => Part::Shared,
                };
                LayerActs::new(account, part, c, tokens, ranks)
            })
            .collect::<Result<_>>()?;
        let heads = c.attention();
        let mut of = account.rows(Part::Predictions, labelled);
        let head = HeadActs {
            attended: of.act(heads.q())?,
            x: of.act(c.hidden_size)?,
            rstd: of.f32(1)?,
            normed: of.act(c.hidden_size)?,
            nll: of.f32(1)?,
            grads: match keep {
                Keep::Nothing => None,
                Keep::Layers(_) | Keep::All => Some(HeadGrads {
                    normed: of.act(c.hidden_size)?,
                    stream: of.act(c.hidden_size)?,
                    attended: of.act(heads.q())?,
                }),
            },
        };
        let grads = match keep {
            Keep::Nothing => None,
            Keep::Layers(_) | Keep::All => {
                let mut of = account.rows(Part::Down, tokens);
                Some(GradActs {
                    stream: of.act(c.hidden_size)?,
                    normed: of.act(c.hidden_size)?,
                    qkv: of.act(heads.qkv())?,
                    attended: of.act(heads.q())?,
                    gate_up: of.act(2 * c.intermediate_size)?,
                    inner: of.act(c.intermediate_size)?,
                })
            }
        };
        Ok(Self {
            size,
            stream,
            layers,
            inside: (0..c.layers).map(|l| own(l).min(insides - 1)).collect(),
            head,
            grads,
            scratch: account.workspace(scratch)?,
        })
    }
}
