//! What training will take of a device's memory, before it takes any.
//!
//! An [`Outline`] is a model without its weights. Every buffer of a pass is made
//! through an [`Account`], which notes what it is for and how large it is, and, in a
//! rehearsal, hands out empty ones; so the plan cannot say one thing and the pass do
//! another.

use std::ops::Add;

use engine::{Backend, HostMatrix, MatrixKind, Result};

use crate::batch::Row;
use crate::model::scratch;
use crate::pass::{Buffers, Keep, Size};
use crate::weight::Weight;
use crate::{Checkpoint, Config, Held, LoraLayout, Module, OptimiserKind, Storage};

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The products of all layers.
    Layers,
    /// Those of some decoded as well, where they are quantised.
    Decoded,
    /// The embedding table, which is the head too where they are tied.
    Embedding,
    /// The output projection.
    Head,
    /// Norms and rotary angles.
    Tables,
    /// What is trained.
    Adapter,
    /// Its gradients.
    Gradients,
    /// The optimiser's moments.
    Moments,
    /// The residual stream before each layer and after the last.
    Streams,
    /// What layers compute on the way and keep for the backward pass.
    Insides,
    /// The same of one layer, which those that do not keep theirs share.
    Shared,
    /// Gradients of activations on their way down.
    Down,
    /// The tokens that predict, from the last layer's attention to the loss.
    Predictions,
    /// Scratch of the operations.
    Scratch,
    /// A batch's ids and places.
    Batch,
}

impl Part {
    /// All of them, weights first.
    pub const ALL: [Self; 15] = [
        Self::Layers,
        Self::Decoded,
        Self::Embedding,
        Self::Head,
        Self::Tables,
        Self::Adapter,
        Self::Gradients,
        Self::Moments,
        Self::Streams,
        Self::Insides,
        Self::Shared,
        Self::Down,
        Self::Predictions,
        Self::Scratch,
        Self::Batch,
    ];
}

/// Bytes by [`Part`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory([usize; Part::ALL.len()]);

impl Memory {
    /// Of one part.
    pub fn of(&self, part: Part) -> usize {
        self.0[part as usize]
    }

    /// Of all parts.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    fn note(&mut self, part: Part, bytes: usize) {
        self.0[part as usize] += bytes;
    }
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|part| self.0[part] + other.0[part]))
    }
}

/// Hands out a pass's buffers and keeps count.
pub(crate) struct Account<'a, B: Backend> {
    backend: &'a B,
    rehearsal: bool,
    memory: Memory,
}

impl<'a, B: Backend> Account<'a, B> {
    /// For real buffers.
    pub fn new(backend: &'a B) -> Self {
        Self {
            backend,
            rehearsal: false,
            memory: Memory::default(),
        }
    }

    /// For empty ones.
    fn rehearsal(backend: &'a B) -> Self {
        Self {
            rehearsal: true,
            ..Self::new(backend)
        }
    }

    /// Buffers of so many rows each, all for the same.
    pub fn rows(&mut self, part: Part, rows: usize) -> Rows<'_, 'a, B> {
        Rows {
            account: self,
            part,
            rows,
        }
    }

    /// Scratch memory of so many bytes.
    pub fn workspace(&mut self, bytes: usize) -> Result<B::Workspace> {
        let bytes = self.entered(Part::Scratch, 1, bytes);
        self.backend.alloc_workspace(bytes)
    }

    /// Notes `len` elements; how many of them are to be allocated.
    fn entered(&mut self, part: Part, element: usize, len: usize) -> usize {
        self.memory.note(part, len * element);
        if self.rehearsal { 0 } else { len }
    }
}

/// See [`Account::rows`].
pub(crate) struct Rows<'c, 'a, B: Backend> {
    account: &'c mut Account<'a, B>,
    part: Part,
    rows: usize,
}

impl<B: Backend> Rows<'_, '_, B> {
    /// Activations, so many a row.
    pub fn act(&mut self, width: usize) -> Result<B::Act> {
        let len = (self.account).entered(self.part, B::ACT_BYTES, self.rows * width);
        self.account.backend.alloc_act(len)
    }

    /// Floats, so many a row.
    pub fn f32(&mut self, width: usize) -> Result<B::F32> {
        let len = (self.account).entered(self.part, size_of::<f32>(), self.rows * width);
        self.account.backend.alloc_f32(len)
    }
}

/// How large a batch is: all that a pass's buffers depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extent {
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Tokens to be predicted.
    pub labelled: usize,
    /// Tokens of the longest row.
    pub longest: usize,
}

impl Extent {
    /// Of these rows together.
    pub fn of(rows: &[Row<'_>]) -> Self {
        let labelled = |row: &Row| row.labelled.iter().skip(1).filter(|&&l| l).count();
        Self {
            rows: rows.len(),
            tokens: rows.iter().map(|row| row.ids.len()).sum(),
            labelled: rows.iter().map(labelled).sum(),
            longest: rows.iter().map(|row| row.ids.len()).max().unwrap_or(0),
        }
    }

    /// The smallest that neither exceeds.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            tokens: self.tokens.max(other.tokens),
            labelled: self.labelled.max(other.labelled),
            longest: self.longest.max(other.longest),
        }
    }

    /// Bytes of the indices that such a [`Batch`](crate::Batch) brings to the device:
    /// id, position and row of each token, the rows' bounds, and for each prediction
    /// its place, its row, its position and its target.
    fn indices(&self) -> usize {
        (3 * self.tokens + self.rows + 1 + 4 * self.labelled) * size_of::<u32>()
    }
}

/// A model without its weights: what memory depends on.
pub struct Outline<B: Backend> {
    config: Config,
    embedding: B::Matrix,
    /// None: the embedding table again.
    head: Option<B::Matrix>,
    /// By layer and group.
    products: Vec<[Vec<B::Matrix>; 4]>,
}

impl<B: Backend> Outline<B> {
    /// Of a checkpoint's model with its weights so held.
    ///
    /// # Errors
    /// If the device cannot take weights of such shapes.
    pub fn new(backend: &B, checkpoint: &Checkpoint, held: impl Into<Held>) -> crate::Result<Self> {
        let held = held.into();
        let hollow = |weight| checkpoint.hollow(weight, held);
        Self::of(backend, checkpoint.config().clone(), held, hollow)
    }

    /// Of a [random](crate::Model::random) model.
    ///
    /// # Errors
    /// If the device cannot take weights of such shapes.
    pub fn random(backend: &B, config: Config, held: impl Into<Held>) -> crate::Result<Self> {
        let (held, shapes) = (held.into(), config.clone());
        Self::of(backend, config, held, |weight| {
            let shape = weight.shape(&shapes);
            let kind = match held.of(weight) {
                Storage::AsStored => MatrixKind::Bf16,
                Storage::Nf4 => MatrixKind::Nf4 { nested: true },
            };
            Ok(HostMatrix::hollow([shape[0], shape[1]], kind))
        })
    }

    fn of(
        backend: &B,
        config: Config,
        held: Held,
        weight: impl Fn(Weight) -> crate::Result<HostMatrix>,
    ) -> crate::Result<Self> {
        let one_table = config.tied && held.head == Storage::AsStored;
        backend.accepts(config.attention())?;
        let hollow = |of| -> crate::Result<_> { Ok(backend.upload_matrix(weight(of)?)?) };
        let group = |layer, members: &[Module]| -> crate::Result<Vec<_>> {
            let members = members.iter();
            members
                .map(|&module| hollow(Weight::Product(layer, module)))
                .collect()
        };
        let [qkv, o, gate_up, down] = crate::lora::GROUPS;
        let products = (0..config.layers).map(|layer| {
            Ok([
                group(layer, qkv)?,
                group(layer, o)?,
                group(layer, gate_up)?,
                group(layer, down)?,
            ])
        });
        Ok(Self {
            embedding: match one_table {
                true => hollow(Weight::Embedding)?,
                false => backend.upload_table(weight(Weight::Embedding)?)?,
            },
            head: (!one_table).then(|| hollow(Weight::Head)).transpose()?,
            products: products.collect::<crate::Result<_>>()?,
            config,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the frozen weights take.
    pub fn weights(&self, backend: &B) -> Memory {
        let c = &self.config;
        let mut memory = Memory::default();
        for matrix in self.products.iter().flatten().flatten() {
            memory.note(Part::Layers, backend.matrix_bytes(matrix));
        }
        memory.note(Part::Embedding, backend.matrix_bytes(&self.embedding));
        let head = self.head.as_ref();
        memory.note(
            Part::Head,
            head.map_or(0, |head| backend.matrix_bytes(head)),
        );
        let norms = c.layers * 2 * (c.hidden_size + c.head_dim) + c.hidden_size;
        let floats = norms + c.max_positions * c.head_dim;
        memory.note(Part::Tables, floats * size_of::<f32>());
        memory
    }

    /// What [`Model::keep_decoded`](crate::Model::keep_decoded) takes for so many layers.
    pub fn decoded(&self, backend: &B, layers: usize) -> Memory {
        let mut memory = Memory::default();
        for group in self.products.iter().rev().take(layers).flatten() {
            memory.note(Part::Decoded, backend.decoded_bytes(group));
        }
        memory
    }

    /// What passes over batches of this extent take.
    ///
    /// # Errors
    /// If the device failed.
    pub fn pass(
        &self,
        backend: &B,
        layout: &LoraLayout,
        extent: Extent,
        keep: Keep,
    ) -> Result<Memory> {
        let batch = [extent.tokens, extent.labelled, extent.longest];
        let size = Size::new(batch, Some(layout));
        let (heads, products) = (self.config.attention(), self.products.iter());
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let scratch = scratch(backend, heads, head, products, batch, size.ranks);
        let mut account = Account::rehearsal(backend);
        Buffers::new(&mut account, &self.config, size, keep, scratch)?;
        let mut memory = account.memory;
        memory.note(Part::Batch, extent.indices());
        Ok(memory)
    }
}

/// What may be planned with of so many bytes that a GPU has free: a quarter of a gigabyte
/// and one part in fifty stay. Kernels of cuBLAS come when they are first needed, and its
/// allocator hands out whole pages.
pub fn usable(free: usize) -> usize {
    free.saturating_sub(free / 50 + (256 << 20))
}

/// What an adapter takes in training.
pub fn adapter(layout: &LoraLayout, optimiser: &OptimiserKind) -> Memory {
    let mut memory = Memory::default();
    let float = size_of::<f32>();
    memory.note(Part::Adapter, layout.buffer_len() * float);
    memory.note(Part::Gradients, layout.len() * float);
    memory.note(Part::Moments, optimiser.moment_bytes(layout));
    memory
}
