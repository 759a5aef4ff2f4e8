//! Products with frozen weights and their low-rank updates.

use std::ops::Range;

use half::bf16;

use super::driver::{Address, Operand, Precision, Product};
use super::few::LowRank;
use super::memory::{Buffer, Room, piece};
use super::outputs::{self, Gradients};
use super::thin::{self, Thin};
use super::{Cuda, Matrix, Store, args, few};
use crate::{Adapter, Dora, Dropout, Group, LinearGrad};

const BF16: u64 = size_of::<bf16>() as u64;

/// Values of the quantised members, decoded side by side.
pub(super) fn decoded_len<'a>(weights: impl IntoIterator<Item = &'a Matrix>) -> usize {
    let quantised = weights
        .into_iter()
        .filter(|w| matches!(w.store, Store::Nf4 { .. }));
    quantised.map(|w| w.rows * w.cols).sum()
}

/// Bytes for a group of these weights; the order of [`Run::new`]'s pieces.
pub(super) fn scratch(weights: &[&Matrix], [tokens, ranks]: [usize; 2], dora: bool) -> usize {
    let inputs = weights.first().map_or(0, |w| w.cols);
    let outputs: usize = weights.iter().map(|w| w.rows).sum();
    // Also where they are kept: what is planned does not know yet.
    let mut bytes = piece::<bf16>(decoded_len(weights.iter().copied()));
    if ranks > 0 {
        // A member's own rank is not known here, only that it is at most all.
        bytes += piece::<bf16>(ranks * (inputs + outputs))
            + piece::<bf16>(tokens * thin::padded_most(ranks, weights.len()))
            + aside(weights.iter().copied(), [tokens, inputs, ranks]);
    }
    if dora {
        bytes += piece::<bf16>(tokens * outputs);
    }
    bytes
}

/// Bytes for what one product of a group needs at a time, beside its operands.
fn aside<'a>(
    weights: impl ExactSizeIterator<Item = &'a Matrix>,
    [tokens, inputs, ranks]: [usize; 3],
) -> usize {
    let thin = thin::scratch([tokens, inputs], ranks, weights.len());
    thin.max(outputs::scratch(weights.map(|w| w.rows), tokens))
}

/// Bytes for the norms of an updated weight; the order of
/// [`row_norms`](Cuda::row_norms)'s pieces.
pub(super) fn norms_scratch(weight: &Matrix, rank: usize) -> usize {
    piece::<bf16>(decoded_len([weight]))
        + piece::<bf16>(rank * weight.cols)
        + piece::<f32>(weight.rows * rank)
        + piece::<f32>(rank * rank)
}

impl Cuda {
    /// The lengths of the rows of `W + scale · B A`, to the parameters.
    pub(super) fn row_norms(
        &self,
        weight: &Matrix,
        adapter: &Adapter,
        params: &Buffer<f32>,
        scratch: &Buffer<u8>,
    ) {
        let Some(Dora { norm, .. }) = adapter.dora else {
            return;
        };
        let (rows, cols, rank) = (weight.rows, weight.cols, adapter.rank);
        let mut room = Room::new(scratch);
        let decoded = room.take::<bf16>(decoded_len([weight]));
        let a = room.take::<bf16>(rank * cols);
        let (u, gram) = (room.take::<f32>(rows * rank), room.take::<f32>(rank * rank));
        let w = self.decode(weight, 0..rows, decoded);
        let range = adapter.a..adapter.a + rank * cols;
        self.round(params.at(range), rank * cols, a);
        for (left, count, to) in [(w, rows, u), (a, rank, gram)] {
            self.queue.multiply(&Product {
                size: [count, rank, cols],
                a: Operand::new(left, cols),
                b: Operand::new(a, cols).t(),
                out: (to, rank),
                precision: Precision::F32,
                add: None,
                scale: 1.0,
            });
        }
        let args = args![
            w,
            params.at(adapter.b..adapter.b + rows * rank),
            u,
            gram,
            rows,
            cols,
            rank,
            adapter.scale,
            params.at(norm..norm + rows),
        ];
        self.launch_shaped("dora_norms", [rows.div_ceil(4), 1, 1], 128, 0, args);
    }
}

/// Where one member's outputs and ranks lie among the group's.
#[derive(Clone, Copy)]
struct Place<'a> {
    weight: &'a Matrix,
    adapter: Option<Adapter>,
    /// First column of its outputs.
    out: usize,
    /// First column of its `x Aᵀ`, and first row of its `A` in the stack.
    rank: usize,
    /// First column of the gradient by its `x Aᵀ`.
    gradient: usize,
    /// Where its `B` starts behind the stack of every `A`.
    b: usize,
}

impl Place<'_> {
    fn quantised(&self) -> bool {
        matches!(self.weight.store, Store::Nf4 { .. })
    }
}

/// Each member's factors as they are stored, if everything lies as the kernels that read them
/// so want it; that inputs are multiples of 8 is known.
fn low_ranks(places: &[Place<'_>], params: &Buffer<f32>) -> Option<Vec<Option<LowRank>>> {
    let fits = |p: &Place<'_>| {
        p.weight.rows.is_multiple_of(8) && p.adapter.is_none_or(|a| a.a.is_multiple_of(4))
    };
    if places.len() > few::MEMBERS || !places.iter().all(fits) {
        return None;
    }
    let low_rank = |p: &Place<'_>| {
        let (update, [outputs, inputs]) = (p.adapter?, [p.weight.rows, p.weight.cols]);
        Some(LowRank {
            a: params.at(update.a..update.a + update.rank * inputs),
            b: params.at(update.b..update.b + update.rank * outputs),
            rank: update.rank,
            rank_at: p.rank,
            outputs,
            column: p.out,
            scale: update.scale,
        })
    };
    Some(places.iter().map(low_rank).collect())
}

/// Scratch, in pieces.
struct Scratch {
    /// The quantised weights, one below the other.
    weights: Address,
    /// The factors, rounded: every `A` `[Σ rank, inputs]`, then every `B`.
    factors: Address,
    /// `[tokens, Σ rank]`: the gradient by `x Aᵀ`; under dropout each member's columns
    /// are filled up with zeros to whole tiles.
    dxa: Address,
    /// Under dropout a copy of the input, or sums of the gradients of `A`; and sums on the
    /// outputs' side.
    aside: Address,
    /// `[tokens, Σ outputs]` with DoRA: outputs before they are rescaled, then the
    /// gradient by them.
    unscaled: Address,
}

/// One group in one direction.
pub(super) struct Run<'a> {
    cuda: &'a Cuda,
    places: Vec<Place<'a>>,
    layer: u32,
    params: Option<&'a Buffer<f32>>,
    dropout: Option<Dropout<'a, Cuda>>,
    tokens: usize,
    inputs: usize,
    /// Outputs, and ranks, of all members.
    width: usize,
    ranks: usize,
    /// Columns of the gradient by `x Aᵀ`.
    gradients: usize,
    /// Whether any member's rows are rescaled.
    dora: bool,
    x: Address,
    xa: Address,
    scratch: Scratch,
    /// See [`low_ranks`].
    low_ranks: Option<Vec<Option<LowRank>>>,
}

impl<'a> Run<'a> {
    pub fn new(
        cuda: &'a Cuda,
        group: &Group<'a, Cuda>,
        params: Option<&'a Buffer<f32>>,
        dropout: Option<Dropout<'a, Cuda>>,
        (x, tokens): (&Buffer<bf16>, usize),
        xa: &Buffer<bf16>,
        scratch: &Buffer<u8>,
    ) -> Self {
        let inputs = group.members[0].weight.cols;
        let (mut width, mut ranks, mut gradients, mut b) = (0, 0, 0, 0);
        let mut places = Vec::with_capacity(group.members.len());
        for member in group.members {
            let weight = member.weight;
            assert_eq!(
                weight.cols, inputs,
                "the members of a group share their input"
            );
            places.push(Place {
                weight,
                adapter: member.adapter,
                out: width,
                rank: ranks,
                gradient: gradients,
                b,
            });
            let rank = member.adapter.map_or(0, |a| a.rank);
            width += weight.rows;
            ranks += rank;
            gradients += match dropout {
                Some(_) => thin::padded(rank),
                None => rank,
            };
            b += weight.rows * rank;
        }
        assert!(
            ranks == 0 || params.is_some(),
            "a group with adapters comes with their parameters"
        );
        let mut room = Room::new(scratch);
        let weights = room.take::<bf16>(decoded_len(places.iter().map(|p| p.weight)));
        let dora = group.dora();
        let (mut factors, mut dxa, mut aside, mut unscaled) = (0, 0, 0, 0);
        if ranks > 0 {
            factors = room.take::<bf16>(ranks * inputs + b);
            dxa = room.take::<bf16>(tokens * gradients);
            let weights = places.iter().map(|p| p.weight);
            aside = room.take::<u8>(self::aside(weights, [tokens, inputs, ranks]));
        }
        if dora {
            unscaled = room.take::<bf16>(tokens * width);
        }
        let low_ranks = params.and_then(|params| low_ranks(&places, params));
        Self {
            scratch: Scratch {
                weights,
                factors,
                dxa,
                aside,
                unscaled,
            },
            dora,
            x: x.first(tokens * inputs),
            xa: xa.first(tokens * ranks),
            layer: group.layer,
            cuda,
            places,
            params,
            dropout,
            tokens,
            inputs,
            width,
            ranks,
            gradients,
            low_ranks,
        }
    }

    /// The weights of these members in as few matrices as possible: quantised
    /// neighbours are decoded one below the other, or lie so, and become one. Calls `f` with the
    /// first output column, the number of columns, and where the weight lies.
    fn weights<'b>(
        &self,
        members: impl Iterator<Item = &'b Place<'b>>,
        mut f: impl FnMut(usize, usize, Address),
    ) {
        let mut to = self.scratch.weights;
        let mut run: Option<(usize, usize, Address)> = None;
        for p in members {
            let rows = p.weight.rows;
            let at = self.cuda.decode(p.weight, 0..rows, to);
            if p.quantised() {
                to += (rows * self.inputs) as u64 * BF16;
                if let Some((out, columns, _)) = &mut run
                    && *out + *columns == p.out
                {
                    *columns += rows;
                    continue;
                }
            }
            if let Some((out, columns, at)) = run.take() {
                f(out, columns, at);
            }
            match p.quantised() {
                true => run = Some((p.out, rows, at)),
                false => f(p.out, rows, at),
            }
        }
        if let Some((out, columns, at)) = run {
            f(out, columns, at);
        }
    }

    /// The members that have an adapter.
    fn adapters(&self) -> impl Iterator<Item = (Place<'a>, Adapter)> {
        self.places.iter().filter_map(|&p| Some((p, p.adapter?)))
    }

    /// Rounds every `A`, then, if that is wanted, every `B`, to bf16. What follows each other
    /// here does so in the parameters as well, as a rule: then it is one launch.
    fn round_factors(&self, params: &Buffer<f32>, both: bool) {
        let a = |(p, a): (Place<'a>, Adapter)| (a.a, a.rank * self.inputs, self.a_of(p));
        let b = |(p, a): (Place<'a>, Adapter)| (a.b, p.weight.rows * a.rank, self.b_of(p));
        let round = |(from, len, to): (usize, usize, Address)| {
            self.cuda.round(params.at(from..from + len), len, to);
        };
        let mut pending: Option<(usize, usize, Address)> = None;
        let b = self.adapters().filter(|_| both).map(b);
        for (from, len, to) in self.adapters().map(a).chain(b) {
            match &mut pending {
                Some((first, count, start))
                    if *first + *count == from && *start + *count as u64 * BF16 == to =>
                {
                    *count += len;
                }
                _ => pending.replace((from, len, to)).into_iter().for_each(round),
            }
        }
        pending.into_iter().for_each(round);
    }

    /// The members' factors, if products of so few tokens read them as they are stored.
    fn stored(&self) -> Option<&[Option<LowRank>]> {
        let few = few::suits_factors(self.tokens);
        self.low_ranks.as_deref().filter(|_| few)
    }

    /// The members whose gradients on the outputs' side come of one reading: all, or none.
    fn one_reading(&self, grads: Option<&Buffer<f32>>) -> Vec<(LowRank, Gradients)> {
        let low_ranks = self.low_ranks.iter().flatten().copied();
        let low_ranks: Vec<_> = low_ranks.flatten().collect();
        if !outputs::suits(&low_ranks) {
            return Vec::new();
        }
        let gradients = |(p, a): (Place<'a>, Adapter)| Gradients {
            column: p.gradient,
            b: grads.map_or(0, |g| g.at(a.b..a.b + p.weight.rows * a.rank)),
        };
        let gradients = self.adapters().map(gradients);
        low_ranks.into_iter().zip(gradients).collect()
    }

    /// Where every `A` lies in the parameters, if one below the other.
    fn stack(&self) -> Option<Range<usize>> {
        let mut all = self
            .adapters()
            .map(|(_, a)| a.a..a.a + a.rank * self.inputs);
        let first = all.next()?;
        all.try_fold(first, |above, a| {
            (above.end == a.start).then_some(above.start..a.end)
        })
    }

    /// One member's rows of the stack of every `A`.
    fn a_of(&self, p: Place<'_>) -> Address {
        self.scratch.factors + (p.rank * self.inputs) as u64 * BF16
    }

    /// One member's `B`.
    fn b_of(&self, p: Place<'_>) -> Address {
        self.scratch.factors + (self.ranks * self.inputs + p.b) as u64 * BF16
    }

    /// A member's columns of a buffer `[tokens, Σ rank]`.
    fn ranks_of(&self, p: Place<'_>, base: Address) -> Address {
        base + p.rank as u64 * BF16
    }

    /// The products with the inputs that are kept, if some are dropped.
    fn thin(&self) -> Option<Thin<'_>> {
        let dropout = self.dropout.as_ref().filter(|_| self.ranks > 0)?;
        let members = self.adapters().map(|(_, a)| (a.rank, a.module));
        Some(Thin {
            cuda: self.cuda,
            dropout,
            layer: self.layer,
            members: thin::Members::new(members),
            tokens: self.tokens,
            inputs: self.inputs,
            factors: self.scratch.factors,
        })
    }

    /// Whether members have copies of what is kept of their inputs.
    fn copies(&self) -> bool {
        thin::copies(self.ranks, self.places.len())
    }

    /// A copy of what a module keeps, and by what that is multiplied.
    fn copy(&self, thin: &Thin<'_>, module: u32) -> (Address, f32) {
        thin.copy(self.x, module, self.scratch.aside);
        (self.scratch.aside, thin.scale())
    }

    fn product(&self, product: Product) {
        self.cuda.queue.multiply(&product);
    }

    /// Where a member's magnitudes and norms lie; null where nothing is rescaled.
    fn lengths(&self, p: &Place<'_>) -> [Address; 2] {
        let found = p.adapter.and_then(|a| a.dora).zip(self.params);
        found.map_or([0; 2], |(dora, params)| {
            [dora.magnitude, dora.norm].map(|at| params.at(at..at + p.weight.rows))
        })
    }

    /// `out = x Wᵀ + scale · drop(x) Aᵀ Bᵀ (+ residual)`, saving `xa`; with DoRA
    /// rescaled before the residual comes.
    pub fn forward(&self, residual: Option<&Buffer<bf16>>, out: &Buffer<bf16>) {
        let (tokens, width) = (self.tokens, self.width);
        let out = out.first(tokens * width);
        let stored = self.stored().filter(|_| self.dropout.is_none());
        if let Some(params) = self.params.filter(|_| stored.is_none()) {
            self.round_factors(params, self.stored().is_none());
        }
        let xa = |(x, scale): (Address, f32), a: Address, ranks: usize, to: Address| {
            self.product(Product {
                size: [tokens, ranks, self.inputs],
                a: Operand::new(x, self.inputs),
                b: Operand::new(a, self.inputs).t(),
                out: (to, self.ranks),
                precision: Precision::Bf16,
                add: None,
                scale,
            });
        };
        match (&self.thin(), stored) {
            (Some(thin), _) if self.copies() => {
                for (p, a) in self.adapters() {
                    let x = self.copy(thin, a.module);
                    xa(x, self.a_of(p), a.rank, self.ranks_of(p, self.xa));
                }
            }
            (Some(thin), _) => thin.product(self.x, self.xa),
            (None, Some(stored)) => {
                let members: Vec<_> = stored.iter().copied().flatten().collect();
                let x = (self.x, [tokens, self.inputs]);
                // Where the factors would be rounded to.
                let values = |m: &LowRank| m.rank * (self.inputs + m.outputs);
                let values: usize = members.iter().map(values).sum();
                let spare = (self.scratch.factors, values * size_of::<bf16>());
                self.cuda.few_ranks(&members, x, spare, self.xa);
            }
            (None, None) if self.ranks > 0 => {
                xa((self.x, 1.0), self.scratch.factors, self.ranks, self.xa);
            }
            (None, None) => {}
        }
        let residual = residual.map(|r| r.first(tokens * width));
        if !self.dora {
            return self.products(residual, out);
        }
        self.products(None, out);
        for p in &self.places {
            let (rows, [magnitude, norm]) = (p.weight.rows, self.lengths(p));
            let shift = p.out as u64 * BF16;
            let residual = residual.map_or(0, |r| r + shift);
            let args = args![magnitude, norm, residual, rows, width, out + shift];
            if magnitude != 0 || residual != 0 {
                self.cuda.launch("dora_rescale", tokens, args);
            }
        }
    }

    /// `out = scale · xa Bᵀ (+ residual) + x Wᵀ`, in this order: the thin product only
    /// writes, and the thick one reads that while it computes. The other way round the
    /// thin one would read all outputs and write them again.
    ///
    /// Of few tokens, codes and the update are one product.
    fn products(&self, residual: Option<Address>, out: Address) {
        let (tokens, width) = (self.tokens, self.width);
        let few = few::suits(tokens, self.inputs);
        let directly = |p: &Place<'_>| few && p.quantised();
        match self.stored() {
            Some(stored) => {
                let all = self.places.iter().zip(stored);
                let apart = all.filter_map(|(p, &low)| low.filter(|_| !directly(p)));
                let apart: Vec<_> = apart.collect();
                let xa = (self.xa, [tokens, self.ranks]);
                self.cuda.few_update(&apart, xa, residual, (out, width));
            }
            None => self.updates(residual, out),
        }
        let apart =
            |p: &Place<'_>| p.adapter.is_some() && (self.stored().is_none() || !directly(p));
        for updated in [true, false] {
            let add = if updated { Some(out) } else { residual };
            let these = self.places.iter().enumerate();
            let (direct, decoded): (Vec<_>, Vec<_>) = these
                .filter(|(_, p)| apart(p) == updated)
                .partition(|(_, p)| directly(p));
            let update = |i: usize| self.stored().and_then(|stored| stored[i]);
            let direct = direct.into_iter();
            let direct = direct.map(|(i, p): (usize, &Place<'_>)| (p.weight, p.out, update(i)));
            let (x, xa) = ((self.x, [tokens, self.inputs]), (self.xa, self.ranks));
            self.cuda.few_tokens(direct, x, xa, add, (out, width));
            self.weights(decoded.into_iter().map(|(_, p)| p), |first, columns, w| {
                let at = |base: Address| (base + first as u64 * BF16, width);
                self.product(Product {
                    size: [tokens, columns, self.inputs],
                    a: Operand::new(self.x, self.inputs),
                    b: Operand::new(w, self.inputs).t(),
                    out: at(out),
                    precision: Precision::Bf16,
                    add: add.map(at),
                    scale: 1.0,
                });
            });
        }
    }

    /// `out = scale · xa Bᵀ (+ residual)` of every member with an adapter.
    fn updates(&self, residual: Option<Address>, out: Address) {
        for (p, a) in self.adapters() {
            let at = |base: Address| (base + p.out as u64 * BF16, self.width);
            self.product(Product {
                size: [self.tokens, p.weight.rows, a.rank],
                a: Operand::new(self.ranks_of(p, self.xa), self.ranks),
                b: Operand::new(self.b_of(p), a.rank).t(),
                out: at(out),
                precision: Precision::Bf16,
                add: residual.map(at),
                scale: a.scale,
            });
        }
    }

    /// The gradient by the outputs before DoRA rescales them, `[tokens, Σ outputs]`,
    /// and onto that of the magnitudes, for which the outputs are computed again.
    fn before_rescaling(&self, dout: Address, grads: Option<&Buffer<f32>>) -> Address {
        let unscaled = self.scratch.unscaled;
        if grads.is_some() {
            self.products(None, unscaled);
        }
        for p in &self.places {
            let (rows, [magnitude, norm]) = (p.weight.rows, self.lengths(p));
            let grads = p.adapter.and_then(|a| a.dora).zip(grads);
            let grads = grads.map_or(0, |(dora, grads)| {
                grads.at(dora.magnitude..dora.magnitude + rows)
            });
            let shift = p.out as u64 * BF16;
            let args = args![
                dout + shift,
                magnitude,
                norm,
                self.tokens,
                rows,
                self.width,
                unscaled + shift,
                grads,
            ];
            self.cuda.launch("dora_backward", rows.div_ceil(64), args);
        }
        unscaled
    }

    /// The gradients that are wanted: by the input, and onto those of the factors.
    pub fn backward(&self, dout: &Buffer<bf16>, want: LinearGrad<'_, Cuda>) {
        let (tokens, width) = (self.tokens, self.width);
        let dout = dout.first(tokens * width);
        let dx = want.dx.map(|dx| dx.first(tokens * self.inputs));
        let grads = want.grads;
        let together = self.one_reading(grads.as_deref());
        if let Some(params) = self.params {
            // With DoRA the outputs are computed again.
            let again = self.dora && self.stored().is_none();
            self.round_factors(params, together.is_empty() || again);
        }
        let dout = match self.dora {
            true => self.before_rescaling(dout, grads.as_deref()),
            false => dout,
        };
        // A gradient of a factor, added to what is there.
        let onto = |size, a, b, scale, at: Range<usize>, stride| {
            let Some(grads) = &grads else { return };
            let out = (grads.at(at), stride);
            self.product(Product {
                size,
                a,
                b,
                out,
                precision: Precision::F32,
                add: Some(out),
                scale,
            });
        };
        if !together.is_empty() {
            let (dxa, xa) = ((self.scratch.dxa, self.gradients), (self.xa, self.ranks));
            let dout = (dout, [tokens, width]);
            let room = self.scratch.aside;
            self.cuda.b_gradients(&together, dout, xa, dxa, room);
        } else if self.gradients > self.ranks {
            let bytes = tokens * self.gradients * size_of::<bf16>();
            self.cuda.queue.zero(self.scratch.dxa, bytes);
        }
        let (thin, wanted) = (self.thin(), grads.is_some());
        // Members that see the same input have one product for all their `A`.
        let stack = self.stack().filter(|_| thin.is_none());
        for (p, a) in self.adapters() {
            let rows = p.weight.rows;
            let d = Operand::new(dout + p.out as u64 * BF16, width);
            let xa = Operand::new(self.ranks_of(p, self.xa), self.ranks);
            let dxa = self.scratch.dxa + p.gradient as u64 * BF16;
            let dxa = Operand::new(dxa, self.gradients);
            if together.is_empty() {
                self.product(Product {
                    size: [tokens, a.rank, rows],
                    a: d,
                    b: Operand::new(self.b_of(p), a.rank),
                    out: (dxa.address, dxa.stride),
                    precision: Precision::Bf16,
                    add: None,
                    scale: a.scale,
                });
                let range = a.b..a.b + rows * a.rank;
                onto([rows, a.rank, tokens], d.t(), xa, a.scale, range, a.rank);
            }
            let (x, scale) = match &thin {
                Some(thin) if wanted && self.copies() => self.copy(thin, a.module),
                None if stack.is_none() => (self.x, 1.0),
                _ => continue, // those of all members follow
            };
            let range = a.a..a.a + a.rank * self.inputs;
            let size = [a.rank, self.inputs, tokens];
            let x = Operand::new(x, self.inputs);
            onto(size, dxa.t(), x, scale, range, self.inputs);
        }
        if let (Some(thin), Some(grads), false) = (&thin, &grads, self.copies()) {
            let factor = |(_, a): (_, Adapter)| grads.at(a.a..a.a + a.rank * self.inputs);
            let to = self.adapters().map(factor);
            thin.factors(self.x, self.scratch.dxa, to, self.scratch.aside);
        }
        if let Some(stack) = stack {
            let dxa = Operand::new(self.scratch.dxa, self.ranks);
            let x = Operand::new(self.x, self.inputs);
            let size = [self.ranks, self.inputs, tokens];
            onto(size, dxa.t(), x, 1.0, stack, self.inputs);
        }
        let Some(dx) = dx else { return };
        // As in `products`: what passes through the factors comes first.
        if let Some(thin) = thin {
            thin.inputs(self.scratch.dxa, dx);
        } else if self.ranks > 0 {
            self.product(Product {
                size: [tokens, self.inputs, self.ranks],
                a: Operand::new(self.scratch.dxa, self.ranks),
                b: Operand::new(self.scratch.factors, self.inputs),
                out: (dx, self.inputs),
                precision: Precision::Bf16,
                add: None,
                scale: 1.0,
            });
        }
        let to = (dx, self.inputs);
        let mut add = (self.ranks > 0).then_some(to);
        self.weights(self.places.iter(), |first, columns, w| {
            self.product(Product {
                size: [tokens, self.inputs, columns],
                a: Operand::new(dout + first as u64 * BF16, width),
                b: Operand::new(w, self.inputs),
                out: to,
                precision: Precision::Bf16,
                add,
                scale: 1.0,
            });
            add = Some(to);
        });
    }
}
