//! The trait between the model and the machine.
//!
//! Conventions, for every operation:
//! - Buffers belong to the caller and may be longer than needed; sizes come from
//!   the arguments. Shapes that do not fit are bugs and panic.
//! - Outputs are overwritten unless the argument says that it is added to.
//!   Inputs and outputs do not alias, except where a parameter is `&mut` and read.
//! - Activations are `[tokens, features]`, row-major. Norm statistics, losses,
//!   adapter weights, their gradients and moments are 32-bit floats everywhere.
//! - Work is queued in call order. Only reading results back may wait.
//! - The same inputs give the same bits, whatever the number of threads.

use std::ops::Range;

use crate::nf4::Nf4Tensor;
use crate::{HostMatrix, Ragged, Result};

/// What a device spent on one kind of work: see [`Backend::profile`].
#[derive(Debug, Clone, PartialEq)]
pub struct Spent {
    /// A kernel's name, a product's size as `m x n x k`, `zeros`, or `copies to the device`.
    pub work: String,
    /// How often it was done.
    pub times: usize,
    /// All of them together.
    pub seconds: f64,
    /// Operations of a product, all of them together: two for each of `m n k`. None: what
    /// is not a product.
    pub operations: Option<f64>,
    /// Of a product, what it is computed by, in the numbers of `cublasLt.h`. None: what is
    /// not a product, or cannot be told.
    pub algorithm: Option<String>,
}

/// How many heads of attention, and how wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; a divisor of `query`: each serves `query / kv` query heads.
    pub kv: usize,
    /// Features of a head; even.
    pub dim: usize,
}

impl Heads {
    /// Width of the queries: `query × dim`.
    pub fn q(&self) -> usize {
        self.query * self.dim
    }

    /// Width of the keys, and of the values: `kv × dim`.
    pub fn k(&self) -> usize {
        self.kv * self.dim
    }

    /// Width of a row of projected queries, keys and values side by side.
    pub fn qkv(&self) -> usize {
        self.q() + 2 * self.k()
    }

    /// Width of a row of rotated queries and keys side by side.
    pub fn qk(&self) -> usize {
        self.q() + self.k()
    }
}

/// A low-rank update of one matrix: `scale · B A`, with both factors inside the
/// one flat parameter buffer (and their gradients at the same offsets).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapter {
    /// Rank `r`.
    pub rank: usize,
    /// `alpha / r`, or `alpha / √r`.
    pub scale: f32,
    /// Where `A [r, inputs]` starts.
    pub a: usize,
    /// Where `B [outputs, r]` starts.
    pub b: usize,
    /// Number of this module in its layer: part of its dropout stream's name.
    pub module: u32,
    /// Whether the updated weight's rows are rescaled.
    pub dora: Option<Dora>,
}

/// What DoRA (Liu et al., arXiv 2402.09353) adds to an [`Adapter`]: row `o` of
/// `W + scale · B A` is multiplied by `magnitude[o] / norm[o]`. Both vectors lie in
/// the parameter buffer, `[outputs]` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dora {
    /// Where the rows' learnt lengths start.
    pub magnitude: usize,
    /// Where the lengths that they have by themselves start:
    /// [`dora_norms`](Backend::dora_norms) puts them there. They are taken for
    /// constants in the backward pass (section 4.3 of the paper).
    pub norm: usize,
}

/// One matrix of a [`Group`].
pub struct Member<'a, B: Backend> {
    /// The frozen weight `[outputs, inputs]`.
    pub weight: &'a B::Matrix,
    /// Its update, if this run has one.
    pub adapter: Option<Adapter>,
}

/// Matrices that share an input, computed together: their outputs lie side by
/// side in one buffer `[tokens, Σ outputs]`, their `x Aᵀ` in another `[tokens, Σ rank]`.
pub struct Group<'a, B: Backend> {
    /// Layer number, for the dropout streams.
    pub layer: u32,
    /// The matrices, in the order of their outputs.
    pub members: &'a [Member<'a, B>],
}

impl<B: Backend> Group<'_, B> {
    /// Ranks of all members together: the width of the saved `x Aᵀ`.
    pub fn rank(&self) -> usize {
        self.members
            .iter()
            .filter_map(|m| m.adapter.map(|a| a.rank))
            .sum()
    }

    /// Whether any member's rows are rescaled.
    pub fn dora(&self) -> bool {
        let mut adapters = self.members.iter().filter_map(|m| m.adapter);
        adapters.any(|a| a.dora.is_some())
    }
}

/// Dropout on the adapters' inputs, each module with its own mask.
pub struct Dropout<'a, B: Backend> {
    /// Share of the inputs that is dropped; the others are scaled by `1 / (1 - p)`.
    pub p: f32,
    /// The run's seed.
    pub seed: u64,
    /// Number of the optimiser step.
    pub step: u32,
    /// `[tokens]` what keys the masks: each token's row's number in the data, as
    /// [`Ragged::rows`],
    pub rows: &'a B::Ids,
    /// and its position there, as [`Ragged::positions`].
    pub positions: &'a B::Ids,
}

impl<B: Backend> Clone for Dropout<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Dropout<'_, B> {}

/// What [`Backend::linear_backward`] shall produce.
pub struct LinearGrad<'a, B: Backend> {
    /// Where the gradient of the shared input goes, if anything below needs it.
    pub dx: Option<&'a mut B::Act>,
    /// The gradient buffer, laid out as the parameters, that is added to.
    pub grads: Option<&'a mut B::F32>,
}

/// The norms of queries and keys, and the rotary angles.
pub struct QkNorms<'a, B: Backend> {
    /// Weight of the queries' norm `[dim]`.
    pub q_norm: &'a B::F32,
    /// Weight of the keys' norm `[dim]`.
    pub k_norm: &'a B::F32,
    /// `[positions, dim]`: the cosines of a position's `dim / 2` angles, then the sines.
    pub rope: &'a B::F32,
    /// Added to the mean square before the root.
    pub eps: f32,
}

/// The shape of a key/value cache: `[slots, capacity, kv × dim]` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// Rows that can be generated at once.
    pub slots: usize,
    /// Positions of a slot.
    pub capacity: usize,
}

/// AdamW with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101) in torch's
/// order: `p ← p (1 - lr λ)`, then `p ← p - lr m̂ / (√v̂ + ε)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Updates done including this one; from 1.
    pub step: u64,
    /// Gradients are scaled by `min(1, max_norm / (norm + 1e-6))`; none: as they are.
    pub max_norm: Option<f32>,
}

/// A stretch of the parameter buffer with its own learning rate and decay.
#[derive(Debug, Clone, PartialEq)]
pub struct Stretch {
    /// Which parameters.
    pub range: Range<usize>,
    /// Learning rate of this update.
    pub lr: f64,
    /// Weight decay λ.
    pub decay: f64,
}

/// Values of a moment in 8 bits that share a scale.
pub const MOMENT_BLOCK: usize = 256;

impl Stretch {
    /// Blocks of its moments in 8 bits; the last may be short.
    pub fn blocks(&self) -> usize {
        self.range.len().div_ceil(MOMENT_BLOCK)
    }
}

/// Noise on the embeddings in training (NEFTune, Jain et al., arXiv 2310.05914).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neftune {
    /// Strength α.
    pub alpha: f32,
    /// The run's seed.
    pub seed: u64,
    /// Number of the optimiser step.
    pub step: u32,
}

impl Neftune {
    /// The largest noise in a row of `length` tokens, `width` wide: `α / √(length · width)`.
    pub fn bound(&self, length: usize, width: usize) -> f32 {
        self.alpha / ((length * width) as f32).sqrt()
    }
}

/// How the next token is chosen, in the order temperature, top-k, top-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the most likely token, the first of equals.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the smallest set of most likely tokens that holds this probability; 1: all.
    pub top_p: f32,
    /// Every value is a seed, 0 too.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, whatever the seed.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
    };
}

/// Values on their way back from the device.
pub trait Reading<T> {
    /// Waits for them.
    ///
    /// # Errors
    /// If the device failed in the meantime.
    fn wait(self) -> Result<Vec<T>>;
}

/// A machine that can run and train the model. See the crate's head for the
/// conventions that all operations share.
#[expect(clippy::too_many_arguments, reason = "operations are fused")]
pub trait Backend: Sized + Send + Sync + 'static {
    /// Activations and their gradients.
    type Act: Send + Sync;
    /// 32-bit floats: parameters, gradients, moments, statistics, losses.
    type F32: Send + Sync;
    /// Token ids and other indices.
    type Ids: Send + Sync;
    /// A frozen weight.
    type Matrix: Send + Sync;
    /// Scratch memory.
    type Workspace: Send;
    /// Floats on their way back.
    type Reading: Reading<f32> + Send + 'static;
    /// Indices on their way back.
    type IdsReading: Reading<u32> + Send + 'static;

    /// Bytes of one activation.
    const ACT_BYTES: usize;

    /// Whether what is queued is done while the host goes on.
    const RUNS_AHEAD: bool;

    /// The device in words, for logs.
    fn describe(&self) -> String;

    /// Whether it can attend with heads of this shape: asked before a model is loaded.
    ///
    /// # Errors
    /// If it cannot, with what to do about it.
    fn accepts(&self, _heads: Heads) -> Result<()> {
        Ok(())
    }

    /// Bytes that can still be allocated, where the device tells; it may wait for what is
    /// queued.
    ///
    /// # Errors
    /// If the device failed.
    fn free_memory(&self) -> Result<Option<usize>>;

    /// The most bytes that were allocated at the same time so far, where the device tells.
    ///
    /// # Errors
    /// If the device failed.
    fn peak_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// A zeroed buffer of activations.
    ///
    /// # Errors
    /// If the device has no room.
    fn alloc_act(&self, len: usize) -> Result<Self::Act>;

    /// A zeroed buffer of floats.
    ///
    /// # Errors
    /// If the device has no room.
    fn alloc_f32(&self, len: usize) -> Result<Self::F32>;

    /// A zeroed buffer of indices.
    ///
    /// # Errors
    /// If the device has no room.
    fn alloc_ids(&self, len: usize) -> Result<Self::Ids>;

    /// Scratch memory of as many bytes as the `*_scratch` queries asked for.
    ///
    /// # Errors
    /// If the device has no room.
    fn alloc_workspace(&self, bytes: usize) -> Result<Self::Workspace>;

    /// Takes over a frozen weight.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload_matrix(&self, matrix: HostMatrix) -> Result<Self::Matrix>;

    /// Takes over a table that is only looked up in ([`embed`](Self::embed)), a few
    /// rows at a time: a device may leave it in the host's memory.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload_table(&self, table: HostMatrix) -> Result<Self::Matrix> {
        self.upload_matrix(table)
    }

    /// A frozen weight of random values, for measurements, which do not depend on
    /// them: about zero, with [`HostMatrix::DEVIATION`], in bf16 or, `quantised`, NF4
    /// with quantised scales. Another `number` has other values.
    ///
    /// # Errors
    /// If the device has no room.
    fn random_matrix(
        &self,
        shape: [usize; 2],
        quantised: bool,
        number: u32,
    ) -> Result<Self::Matrix> {
        self.upload_matrix(HostMatrix::random(shape, quantised, number))
    }

    /// The same as a table in bf16 that is only looked up in
    /// ([`upload_table`](Self::upload_table)).
    ///
    /// # Errors
    /// If there is no room.
    fn random_table(&self, shape: [usize; 2], number: u32) -> Result<Self::Matrix> {
        self.upload_table(HostMatrix::random(shape, false, number))
    }

    /// A weight in NF4, its scales quantised as well: the bits of
    /// [`Nf4Tensor::quantize`], wherever they are computed.
    ///
    /// # Errors
    /// If a value is not finite, or the device has no room.
    fn quantize(&self, matrix: &HostMatrix) -> Result<Nf4Tensor> {
        Ok(matrix.quantize()?)
    }

    /// A buffer holding these floats.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload_f32(&self, values: &[f32]) -> Result<Self::F32>;

    /// A buffer holding these indices.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload_ids(&self, values: &[u32]) -> Result<Self::Ids>;

    /// Overwrites the start of a buffer.
    ///
    /// # Errors
    /// If the device failed.
    fn write_ids(&self, values: &[u32], out: &mut Self::Ids) -> Result<()>;

    /// Overwrites the start of a buffer.
    ///
    /// # Errors
    /// If the device failed.
    fn write_f32(&self, values: &[f32], out: &mut Self::F32) -> Result<()>;

    /// Sets the first `len` floats to zero.
    fn zero(&self, out: &mut Self::F32, len: usize);

    /// Sets the first `len` activations to zero.
    fn zero_act(&self, out: &mut Self::Act, len: usize);

    /// Starts reading floats back; the values are those of this point of the queue.
    fn read_f32(&self, buffer: &Self::F32, range: Range<usize>) -> Self::Reading;

    /// Reads the first `len` activations, as floats.
    ///
    /// # Errors
    /// If the device failed.
    fn read_act(&self, buffer: &Self::Act, len: usize) -> Result<Vec<f32>>;

    /// Starts reading the first `len` indices back, as they are at this point of the queue.
    fn read_ids(&self, buffer: &Self::Ids, len: usize) -> Self::IdsReading;

    /// Does something whose operations are likely to come again in this order, on these
    /// buffers with other contents, as a decoding step's do: a device may know them by then
    /// and take all of them at once. Meanwhile no other thread may use the backend; a call
    /// inside another's ends the outer one's gathering.
    fn repeat<R>(&self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Why something that came [again](Self::repeat) was not taken at once, the first time,
    /// on a device that could have. It is slower for it, and no less right.
    fn unrecorded(&self) -> Option<String> {
        None
    }

    /// Does something and says what the device spent its time on, the most first. Every
    /// piece of work stands between two looks at the clock then, and nothing is played as a
    /// whole ([`repeat`](Self::repeat)): all of it takes longer than it would. A backend
    /// with no queue of its own says nothing.
    ///
    /// # Errors
    /// If the device failed.
    fn profile<R>(&self, work: impl FnOnce() -> R) -> Result<(R, Vec<Spent>)> {
        Ok((work(), Vec::new()))
    }

    /// For how many rows to compute a decoding step of `replies`: at least as many. What
    /// comes of the others is thrown away, and who has not got so many slots has fewer.
    fn decoding_rows(&self, replies: usize) -> usize {
        replies
    }

    /// Bytes that a weight takes on the device. One without its values
    /// ([`HostMatrix::hollow`]) counts as with them.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;

    /// Bytes that the quantised of these weights would take decoded; 0 where decoding
    /// them once and for all gains nothing. Without their values as with them.
    fn decoded_bytes(&self, group: &[Self::Matrix]) -> usize {
        let _ = group;
        0
    }

    /// Decodes the quantised weights of a group once and for all, beside their codes,
    /// where [`decoded_bytes`](Self::decoded_bytes) says that there is something to gain.
    /// No bit of any result changes.
    ///
    /// # Errors
    /// If the device has no room.
    fn keep_decoded(&self, group: &mut [Self::Matrix]) -> Result<()> {
        let _ = group;
        Ok(())
    }

    /// `[outputs, inputs]` of a weight.
    fn shape(&self, matrix: &Self::Matrix) -> [usize; 2];

    /// Scratch bytes of [`linear`](Self::linear) and its backward over a group of
    /// these weights; `size` is `[tokens, Σ rank]`, `dora` as [`Group::dora`].
    fn linear_scratch(&self, weights: &[&Self::Matrix], size: [usize; 2], dora: bool) -> usize;

    /// Scratch bytes of [`dora_norms`](Self::dora_norms) for an update of this rank.
    fn dora_scratch(&self, weight: &Self::Matrix, rank: usize) -> usize;

    /// Scratch bytes of the attention operations, rows or cached positions being
    /// at most `longest` long.
    fn attention_scratch(&self, heads: Heads, longest: usize) -> usize;

    /// Scratch bytes of [`head_loss`](Self::head_loss), [`logits`](Self::logits)
    /// and [`sample`](Self::sample) over `rows`.
    fn head_scratch(&self, head: &Self::Matrix, rows: usize) -> usize;

    /// Looks up embeddings: `out [tokens, width] = table[ids]`.
    fn embed(&self, table: &Self::Matrix, ids: &Self::Ids, tokens: usize, out: &mut Self::Act);

    /// Adds noise to the embeddings `x [tokens, width]` of whole rows, uniform in
    /// ±α/√(L · width), where L is the length of the token's own row, as in the
    /// paper's code; transformers takes the padded length of the batch, which is no
    /// property of the row. Feature `i` is keyed by `(seed, step, row, position, i)`.
    fn add_noise(&self, noise: &Neftune, rows: &Ragged<Self>, width: usize, x: &mut Self::Act);

    /// Picks rows: `out[i] = x[index[i]]`; `size` is `[count, width]`.
    fn gather(&self, x: &Self::Act, index: &Self::Ids, size: [usize; 2], out: &mut Self::Act);

    /// The same of single numbers: `out[i] = x[index[i]]` for `count` of them.
    fn gather_ids(&self, x: &Self::Ids, index: &Self::Ids, count: usize, out: &mut Self::Ids);

    /// The reverse: `out[index[i]] = x[i]`; the indices are distinct, and the others of `out`
    /// stay as they are.
    fn scatter_ids(&self, x: &Self::Ids, index: &Self::Ids, count: usize, out: &mut Self::Ids);

    /// The reverse of [`gather`](Self::gather): `out [tokens, width]` is zero but for
    /// `out[index[i]] = x[i]`; the indices are distinct; `size` is `[count, tokens, width]`.
    fn scatter(&self, x: &Self::Act, index: &Self::Ids, size: [usize; 3], out: &mut Self::Act);

    /// `out = x · rstd · weight` by rows of `size = [tokens, width]`, saving
    /// `rstd [tokens] = 1 / √(mean(x²) + eps)`; `norm` is `(weight, eps)`.
    fn rms_norm(
        &self,
        x: &Self::Act,
        norm: (&Self::F32, f32),
        size: [usize; 2],
        out: &mut Self::Act,
        rstd: &mut Self::F32,
    );

    /// Gradient of [`rms_norm`](Self::rms_norm) by its input, *added* to `dx`:
    /// with `g = dy · weight` and `n = x · rstd`, `dx += rstd (g - n · mean(g n))`.
    /// `saved` is `(x, weight, rstd)`, `size` is `[tokens, width]`.
    fn rms_norm_backward(
        &self,
        dy: &Self::Act,
        saved: (&Self::Act, &Self::F32, &Self::F32),
        size: [usize; 2],
        dx: &mut Self::Act,
    );

    /// The products of a group: member by member
    /// `out = x Wᵀ + scale · drop(x) Aᵀ Bᵀ (+ residual)`, saving `xa = drop(x) Aᵀ`.
    ///
    /// `input` is `(x, tokens)`; `params` holds the adapters' factors and may be
    /// `None` when there are none.
    ///
    /// A member with DoRA gives
    /// `out = magnitude / norm · (x Wᵀ + scale · drop(x) Aᵀ Bᵀ) (+ residual)`.
    /// Dropout acts on the low-rank path alone, with DoRA as without; peft also
    /// drops inputs of `(magnitude / norm - 1) · x Wᵀ`, which is noise on the frozen
    /// product itself.
    fn linear(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Self::F32>,
        dropout: Option<Dropout<'_, Self>>,
        input: (&Self::Act, usize),
        residual: Option<&Self::Act>,
        out: &mut Self::Act,
        xa: &mut Self::Act,
        scratch: &mut Self::Workspace,
    );

    /// The gradients of [`linear`](Self::linear), as far as asked for: by its
    /// input (overwritten) and by the adapters' factors and magnitudes (added to).
    /// Frozen weights and norms get none. The residual's gradient is `dout` itself.
    fn linear_backward(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Self::F32>,
        dropout: Option<Dropout<'_, Self>>,
        input: (&Self::Act, usize),
        xa: &Self::Act,
        dout: &Self::Act,
        want: LinearGrad<'_, Self>,
        scratch: &mut Self::Workspace,
    );

    /// The lengths of the updated weight's rows,
    /// `params[norm + o] = ‖W[o] + scale · B[o] A‖`, for an adapter with DoRA: to be
    /// called whenever its factors have changed.
    fn dora_norms(
        &self,
        weight: &Self::Matrix,
        adapter: &Adapter,
        params: &mut Self::F32,
        scratch: &mut Self::Workspace,
    );

    /// Normalises each head of the queries and keys in `qkv [tokens, q + 2k]` and
    /// rotates them by their positions (Su et al., arXiv 2104.09864, halves
    /// rotated against each other as in Hugging Face's code) into
    /// `qk [tokens, q + k]`, saving `rstd [tokens, query + kv]`.
    fn qk_norm_rope(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Self::Ids,
        tokens: usize,
        qkv: &Self::Act,
        qk: &mut Self::Act,
        rstd: &mut Self::F32,
    );

    /// Turns the gradient by the rotated queries and keys, in the first `q + k`
    /// columns of `dqkv`, into that by the projected ones, in place; `saved` is
    /// `(qkv, rstd)`.
    fn qk_norm_rope_backward(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Self::Ids,
        tokens: usize,
        saved: (&Self::Act, &Self::F32),
        dqkv: &mut Self::Act,
    );

    /// Causal attention inside each row: `out [tokens, q]` from the queries and
    /// keys of `qk` and the values of `qkv`, scores scaled by `1 / √dim`, saving
    /// `lse [tokens, query]`, the log of each softmax's denominator.
    fn attention(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        qk: &Self::Act,
        qkv: &Self::Act,
        out: &mut Self::Act,
        lse: &mut Self::F32,
        scratch: &mut Self::Workspace,
    );

    /// Gradient of [`attention`](Self::attention): `dqkv [tokens, q + 2k]` by the
    /// rotated queries, the rotated keys and the values. `inputs` is `(qk, qkv)`,
    /// `saved` is `(out, lse)`.
    fn attention_backward(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        inputs: (&Self::Act, &Self::Act),
        saved: (&Self::Act, &Self::F32),
        dout: &Self::Act,
        dqkv: &mut Self::Act,
        scratch: &mut Self::Workspace,
    );

    /// `out [tokens, width] = silu(gate) · up` from `gate_up [tokens, 2 width]`;
    /// `size` is `[tokens, width]`.
    fn swiglu(&self, gate_up: &Self::Act, size: [usize; 2], out: &mut Self::Act);

    /// Gradient of [`swiglu`](Self::swiglu): `dgate_up [tokens, 2 width]`.
    fn swiglu_backward(
        &self,
        gate_up: &Self::Act,
        dout: &Self::Act,
        size: [usize; 2],
        dgate_up: &mut Self::Act,
    );

    /// Output projection and cross-entropy over `rows` hidden states, chunk by
    /// chunk, so that the logits never exist whole:
    /// `nll[i] = -log softmax(hidden[i] headᵀ)[targets[i]]`. With `dhidden`, also
    /// the gradient of `scale · Σ nll`: `dhidden` is `(dhidden, scale)`. `inputs` is
    /// `(hidden, targets, rows)`.
    fn head_loss(
        &self,
        head: &Self::Matrix,
        inputs: (&Self::Act, &Self::Ids, usize),
        nll: &mut Self::F32,
        dhidden: Option<(&mut Self::Act, f32)>,
        scratch: &mut Self::Workspace,
    );

    /// `norm[0] = √Σ grads²` over the first `len`.
    fn global_norm(&self, grads: &Self::F32, len: usize, norm: &mut Self::F32);

    /// One update of the stretches with `gradient = (grads, norm)`, where `norm[0]`
    /// is what clipping compares, and `moments = (m, v)`.
    fn adamw(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        gradient: (&Self::F32, &Self::F32),
        params: &mut Self::F32,
        moments: (&mut Self::F32, &mut Self::F32),
    );

    /// [`adamw`](Self::adamw) with `moments = [m, v]` in 8 bits, each `(codes, absmax)`:
    /// decoded before the update, coded after it, as bitsandbytes' AdamW8bit does
    /// (Dettmers et al., arXiv 2110.02861). Parameters are updated by the moments
    /// before they are coded again.
    ///
    /// Blocks of [`MOMENT_BLOCK`] values are counted from the start of each stretch,
    /// one stretch after the other: block `b` has the scale `absmax[b]` and the codes
    /// of words `64 b` to `64 b + 63`, four a word, the first in the low byte. Codes
    /// index [`Dynamic::moment`](crate::dynamic::Dynamic::moment) for `m`,
    /// [`Dynamic::unsigned`](crate::dynamic::Dynamic::unsigned) for `v`. Zeros
    /// everywhere are zero moments.
    ///
    /// bitsandbytes' CUDA kernel decays the parameters after the update, forms 1 - β in
    /// f32 and divides approximately, which makes parts in 10⁵; and it passes over
    /// gradients that are no numbers, where here they show.
    fn adamw_8bit(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        gradient: (&Self::F32, &Self::F32),
        params: &mut Self::F32,
        moments: [(&mut Self::Ids, &mut Self::F32); 2],
    );

    /// Stores the keys of `qk` and the values of `qkv` at `(slots[i], positions[i])`
    /// of the caches; `at` is `(slots, positions, tokens)`, `store` `(keys, values)`.
    fn cache_append(
        &self,
        heads: Heads,
        cache: Cache,
        at: (&Self::Ids, &Self::Ids, usize),
        qk: &Self::Act,
        qkv: &Self::Act,
        store: (&mut Self::Act, &mut Self::Act),
    );

    /// Attention of one new query per slot over its cached positions, the new
    /// one (`positions[i]`) included: `out [tokens, q]`. `at` is
    /// `(slots, positions, tokens)`, `store` `(keys, values)`.
    fn cache_attention(
        &self,
        heads: Heads,
        cache: Cache,
        at: (&Self::Ids, &Self::Ids, usize),
        qk: &Self::Act,
        store: (&Self::Act, &Self::Act),
        out: &mut Self::Act,
        scratch: &mut Self::Workspace,
    );

    /// `out [rows, vocabulary] = hidden headᵀ`, for few rows; `input` is `(hidden, rows)`.
    fn logits(
        &self,
        head: &Self::Matrix,
        input: (&Self::Act, usize),
        out: &mut Self::F32,
        scratch: &mut Self::Workspace,
    );

    /// Chooses a token per row of `logits [rows, width]`. Draws are keyed by
    /// `(seed, items[i], positions[i])`, so a reply does not depend on its neighbours.
    /// `input` is `(logits, [rows, width])`, `keys` `(items, positions)`.
    fn sample(
        &self,
        how: &Sampling,
        input: (&Self::F32, [usize; 2]),
        keys: (&Self::Ids, &Self::Ids),
        out: &mut Self::Ids,
        scratch: &mut Self::Workspace,
    );
}
