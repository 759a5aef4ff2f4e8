//! The buffers of one pass through the model.
//!
//! Everything that backward needs from forward has a name here. Buffers grow to
//! the largest batch seen and are then reused, so a training step allocates
//! nothing after the first few.

use engine::{Backend, Result};

use crate::model::Model;
use crate::{Config, Lora};

/// What a pass is for, which decides what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: evaluation and generation.
    Nothing,
    /// The inputs of every layer; its inside is computed again in the backward
    /// pass. A third more arithmetic, a fraction of the memory, the same bits.
    LayerInputs,
    /// Everything.
    All,
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
    fn new(backend: &B, c: &Config, tokens: usize, ranks: [usize; 4]) -> Result<Self> {
        let act = |width: usize| backend.alloc_act(tokens * width);
        let f32 = |width: usize| backend.alloc_f32(tokens * width);
        let heads = c.attention();
        let [r0, r1, r2, r3] = ranks;
        Ok(Self {
            rstd1: f32(1)?,
            norm1: act(c.hidden_size)?,
            xa: [act(r0)?, act(r1)?, act(r2)?, act(r3)?],
            qkv: act(heads.qkv())?,
            rstd_qk: f32(heads.query + heads.kv)?,
            qk: act(heads.qk())?,
            attended: act(heads.q())?,
            lse: f32(heads.query)?,
            middle: act(c.hidden_size)?,
            rstd2: f32(1)?,
            norm2: act(c.hidden_size)?,
            gate_up: act(2 * c.intermediate_size)?,
            inner: act(c.intermediate_size)?,
        })
    }
}

/// The rows that predict, from the last layer to the loss.
pub(crate) struct HeadActs<B: Backend> {
    /// `[labelled, hidden]` each: picked, normed, and their gradients.
    pub picked: B::Act,
    pub rstd: B::F32,
    pub normed: B::Act,
    pub dnormed: B::Act,
    pub dpicked: B::Act,
    /// `[labelled]`
    pub nll: B::F32,
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
struct Size {
    tokens: usize,
    labelled: usize,
    longest: usize,
    ranks: [usize; 4],
}

impl Size {
    fn max(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            labelled: self.labelled.max(other.labelled),
            longest: self.longest.max(other.longest),
            ranks: std::array::from_fn(|i| self.ranks[i].max(other.ranks[i])),
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

    /// Buffers for `[tokens, predictions, longest row]`, grown where they were
    /// too small.
    pub(crate) fn fit(
        &mut self,
        model: &Model<B>,
        [tokens, labelled, longest]: [usize; 3],
        lora: Option<Lora<'_, B>>,
    ) -> Result<&mut Buffers<B>> {
        let mut size = Size {
            tokens,
            labelled,
            longest,
            ranks: lora.map_or([0; 4], |l| l.layout.ranks()),
        };
        // The old buffers go before the new ones come.
        let old = self.buffers.take();
        let kept = match old {
            Some(buffers) if buffers.size.max(size) == buffers.size => buffers,
            old => {
                if let Some(old) = old {
                    size = size.max(old.size);
                }
                Buffers::new(model, size, self.keep)?
            }
        };
        Ok(self.buffers.insert(kept))
    }
}

impl<B: Backend> Buffers<B> {
    fn new(model: &Model<B>, size: Size, keep: Keep) -> Result<Self> {
        let (backend, c) = (model.backend(), model.config());
        let Size {
            tokens, labelled, ..
        } = size;
        let act = |width: usize| backend.alloc_act(tokens * width);
        let (streams, inside) = match keep {
            Keep::Nothing => (2, 1),
            Keep::LayerInputs => (c.layers + 1, 1),
            Keep::All => (c.layers + 1, c.layers),
        };
        let picked = || backend.alloc_act(labelled * c.hidden_size);
        let heads = c.attention();
        let grads = || -> Result<_> {
            Ok(GradActs {
                stream: act(c.hidden_size)?,
                normed: act(c.hidden_size)?,
                qkv: act(heads.qkv())?,
                attended: act(heads.q())?,
                gate_up: act(2 * c.intermediate_size)?,
                inner: act(c.intermediate_size)?,
            })
        };
        Ok(Self {
            size,
            stream: (0..streams)
                .map(|_| act(c.hidden_size))
                .collect::<Result<_>>()?,
            layers: (0..inside)
                .map(|_| LayerActs::new(backend, c, tokens, size.ranks))
                .collect::<Result<_>>()?,
            head: HeadActs {
                picked: picked()?,
                rstd: backend.alloc_f32(labelled)?,
                normed: picked()?,
                dnormed: picked()?,
                dpicked: picked()?,
                nll: backend.alloc_f32(labelled)?,
            },
            grads: (keep != Keep::Nothing).then(grads).transpose()?,
            scratch: backend
                .alloc_workspace(model.scratch([tokens, labelled, size.longest], size.ranks))?,
        })
    }
}
