//! Products with frozen weights and their low-rank updates.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::product::{Into, Term, View, ViewMut, product, products};
use super::simd::{dot, vectorised};
use super::{Cpu, PER_TASK};
use crate::rng::{self, Purpose, Stream};
use crate::{Adapter, Dora, Dropout, Group, HostMatrix, LinearGrad, MatrixData};

/// Rows of a stored-narrow weight that are widened at a time: a few megabytes,
/// so that the product finds them in the cache.
const WIDEN_ROWS: usize = 512;

/// Scratch floats for widening a weight.
pub(super) fn widen_scratch(m: &HostMatrix) -> usize {
    match m.data {
        MatrixData::F32(_) => 0,
        MatrixData::Bf16(_) | MatrixData::Nf4(_) => WIDEN_ROWS.min(m.rows) * m.cols,
    }
}

/// Hands out a weight as floats `[rows, cols]`, in stretches of its rows.
pub(super) fn stretches(
    m: &HostMatrix,
    scratch: &mut [f32],
    mut f: impl FnMut(Range<usize>, View<'_>),
) {
    if let MatrixData::F32(_) = m.data {
        return f(0..m.rows, rows_of(m, 0..m.rows, scratch));
    }
    for start in (0..m.rows).step_by(WIDEN_ROWS) {
        let rows = start..m.rows.min(start + WIDEN_ROWS);
        f(rows.clone(), rows_of(m, rows, scratch));
    }
}

/// Rows of a weight as floats, widened into `scratch` unless they are floats.
fn rows_of<'a>(m: &'a HostMatrix, rows: Range<usize>, scratch: &'a mut [f32]) -> View<'a> {
    let shape = [rows.len(), m.cols];
    if let MatrixData::F32(values) = &m.data {
        return View::dense(&values[rows.start * m.cols..], shape);
    }
    let wide = &mut scratch[..rows.len() * m.cols];
    widen(m, rows, wide);
    View::dense(wide, shape)
}

/// Writes rows of a weight as floats.
pub(super) fn widen(m: &HostMatrix, rows: Range<usize>, out: &mut [f32]) {
    let range = rows.start * m.cols..rows.end * m.cols;
    match &m.data {
        MatrixData::F32(values) => out.copy_from_slice(&values[range]),
        MatrixData::Bf16(values) => out
            .par_chunks_mut(PER_TASK)
            .zip(values[range].par_chunks(PER_TASK))
            .for_each(|(out, values)| widen_bf16(values, out)),
        MatrixData::Nf4(tensor) => {
            let at_once = PER_TASK.div_ceil(m.cols);
            out.par_chunks_mut(at_once * m.cols)
                .zip(rows.into_par_iter().step_by(at_once))
                .for_each(|(out, first)| {
                    tensor.dequantize_rows(first..first + out.len() / m.cols, out);
                });
        }
    }
}

/// Where one member's outputs and ranks lie among the group's.
struct Place<'a> {
    weight: &'a HostMatrix,
    adapter: Option<Adapter>,
    /// First column of its outputs.
    out: usize,
    /// First column of its `x Aᵀ`.
    rank: usize,
}

impl Place<'_> {
    /// Its adapter, where that rescales rows.
    fn dora(&self) -> Option<(Adapter, Dora)> {
        let adapter = self.adapter?;
        Some((adapter, adapter.dora?))
    }
}

/// The members with their places, and the widths `(inputs, Σ outputs, Σ rank)`.
fn places<'a>(group: &Group<'a, Cpu>) -> (impl Iterator<Item = Place<'a>> + Clone, [usize; 3]) {
    let members = group.members;
    let inputs = members[0].weight.cols;
    let outputs = members.iter().map(|m| m.weight.rows).sum();
    let (mut out, mut rank) = (0, 0);
    let places = members.iter().map(move |m| {
        assert_eq!(
            m.weight.cols, inputs,
            "the members of a group share their input"
        );
        let place = Place {
            weight: m.weight,
            adapter: m.adapter,
            out,
            rank,
        };
        out += m.weight.rows;
        rank += m.adapter.map_or(0, |a| a.rank);
        place
    });
    (places, [inputs, outputs, group.rank()])
}

/// The one stretch of parameters in which all `A` of a group follow each other,
/// if they do: then their products are one.
fn stacked_a(group: &Group<'_, Cpu>, inputs: usize) -> Option<Range<usize>> {
    let mut adapters = group.members.iter().filter_map(|m| m.adapter);
    let first = adapters.next()?;
    let mut end = first.a + first.rank * inputs;
    for a in adapters {
        if a.a != end {
            return None;
        }
        end += a.rank * inputs;
    }
    Some(first.a..end)
}

/// Multiplies tokens `[tokens, width]` by a module's dropout factors, into `out`
/// or (with [`Into::Add`]) onto it.
fn apply_dropout(
    dropout: &Dropout<'_, Cpu>,
    (layer, module): (u32, u32),
    x: &[f32],
    [tokens, width]: [usize; 2],
    into: Into,
    out: &mut [f32],
) {
    let stream = Stream {
        seed: dropout.seed,
        purpose: Purpose::Dropout,
        layer,
        module,
    };
    let (threshold, scale) = (rng::drop_threshold(dropout.p), 1.0 / (1.0 - dropout.p));
    let (rows, positions) = (dropout.rows, dropout.positions);
    out[..tokens * width]
        .par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .enumerate()
        .for_each(|(t, (out, x))| {
            let key = [rows[t], dropout.step, positions[t]];
            drop_token(&stream, key, (threshold, scale), x, into, out);
        });
}

vectorised! {
    /// Appends sixteen zero bits to each value.
    fn widen_bf16(values: &[bf16], out: &mut [f32]) {
        for (o, v) in out.iter_mut().zip(values) {
            *o = f32::from_bits(u32::from(v.to_bits()) << 16);
        }
    }

    /// `x *= magnitude / norm`.
    fn rescale(x: &mut [f32], magnitude: &[f32], norm: &[f32]) {
        for ((x, m), n) in x.iter_mut().zip(magnitude).zip(norm) {
            *x *= m / n;
        }
    }

    /// `out += x`.
    fn add(x: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }

    /// `grad += Σ dout · y / norm` over the rows of `y [tokens, width]`, `dout`
    /// being the same columns of rows `stride` apart.
    fn magnitude_gradient(
        y: &[f32],
        dout: &[f32],
        stride: usize,
        norm: &[f32],
        grad: &mut [f32],
    ) {
        for (y, dout) in y.chunks_exact(grad.len()).zip(dout.chunks(stride)) {
            for (((g, y), d), n) in grad.iter_mut().zip(y).zip(dout).zip(norm) {
                *g += d * y / n;
            }
        }
    }

    /// The lengths of rows that follow each other.
    fn lengths(rows: &[f32], out: &mut [f32]) {
        let width = rows.len() / out.len();
        for (length, row) in out.iter_mut().zip(rows.chunks_exact(width)) {
            *length = dot(row, row).sqrt();
        }
    }

    /// One token of [`apply_dropout`].
    fn drop_token(
        stream: &Stream,
        key: [u32; 3],
        how: (u16, f32),
        x: &[f32],
        into: Into,
        out: &mut [f32],
    ) {
        const BLOCKS: u32 = 32;
        const CHUNK: usize = BLOCKS as usize * rng::KEEP_BLOCK;
        let mut factors = [0.0; CHUNK];
        let chunks = out.chunks_mut(CHUNK).zip(x.chunks(CHUNK));
        for (first, (out, x)) in (0..).step_by(BLOCKS as usize).zip(chunks) {
            let factors = &mut factors[..out.len()];
            rng::dropout_factors(stream, key, first, how, factors);
            for ((o, x), f) in out.iter_mut().zip(x).zip(factors) {
                *o = match into {
                    Into::Set => x * *f,
                    Into::Add => *o + x * *f,
                };
            }
        }
    }
}

impl Cpu {
    /// Scratch floats of a group: the gradient of `x Aᵀ`, then either a widened
    /// weight or dropped inputs, and with DoRA a stretch of outputs and one of
    /// their gradient.
    pub(super) fn group_scratch(
        weights: &[&HostMatrix],
        [tokens, rank]: [usize; 2],
        dora: bool,
    ) -> usize {
        let most = |of: fn(&HostMatrix) -> usize| weights.iter().map(|w| of(w)).max().unwrap_or(0);
        let outputs = if dora {
            most(|w| w.rows.min(WIDEN_ROWS))
        } else {
            0
        };
        let dropped = if rank > 0 {
            tokens * most(|w| w.cols)
        } else {
            0
        };
        (most(widen_scratch) + 2 * tokens * outputs).max(dropped) + tokens * rank
    }

    /// Scratch floats of [`row_lengths`](Self::row_lengths): a stretch of the
    /// updated weight and its rows' lengths.
    pub(super) fn row_lengths_scratch(weight: &HostMatrix) -> usize {
        weight.rows.min(WIDEN_ROWS) * (weight.cols + 1)
    }

    /// By the definition: the weight is updated, a stretch of rows at a time.
    pub(super) fn row_lengths(
        weight: &HostMatrix,
        adapter: &Adapter,
        params: &mut [f32],
        scratch: &mut [f32],
    ) {
        let Some(Dora { norm, .. }) = adapter.dora else {
            return;
        };
        let (rank, cols) = (adapter.rank, weight.cols);
        let at_once = PER_TASK.div_ceil(cols);
        for start in (0..weight.rows).step_by(WIDEN_ROWS) {
            let rows = start..weight.rows.min(start + WIDEN_ROWS);
            let (wide, rest) = scratch.split_at_mut(rows.len() * cols);
            let found = &mut rest[..rows.len()];
            widen(weight, rows.clone(), wide);
            let a = View::dense(&params[adapter.a..], [rank, cols]);
            let b = View::dense(&params[adapter.b + start * rank..], [rows.len(), rank]);
            let updated = ViewMut::dense(wide, [rows.len(), cols]);
            product(updated, Into::Add, b, a, adapter.scale);
            found
                .par_chunks_mut(at_once)
                .zip(wide.par_chunks(at_once * cols))
                .for_each(|(found, rows)| lengths(rows, found));
            params[norm + start..][..rows.len()].copy_from_slice(found);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one fused operation")]
    pub(super) fn group_forward(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Vec<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&[f32], usize),
        residual: Option<&[f32]>,
        out: &mut [f32],
        xa: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (places, [inputs, width, ranks]) = places(group);
        let input = View::dense(x, [tokens, inputs]);
        let dora = group.dora();
        let base = match residual {
            // What is rescaled must not hold the residual yet.
            Some(residual) if !dora => {
                out[..tokens * width].copy_from_slice(&residual[..tokens * width]);
                Into::Add
            }
            _ => Into::Set,
        };
        if ranks > 0 {
            let params = params.expect("a group with adapters comes with their parameters");
            match (dropout, stacked_a(group, inputs)) {
                (None, Some(a)) => {
                    let a = View::dense(&params[a], [ranks, inputs]);
                    let xa = ViewMut::dense(xa, [tokens, ranks]);
                    product(xa, Into::Set, input, a.t(), 1.0);
                }
                _ => {
                    for p in places.clone() {
                        let Some(adapter) = p.adapter else { continue };
                        let a = View::dense(&params[adapter.a..], [adapter.rank, inputs]);
                        let key = (group.layer, adapter.module);
                        let input = match &dropout {
                            None => input,
                            Some(d) => {
                                apply_dropout(d, key, x, [tokens, inputs], Into::Set, scratch);
                                View::dense(scratch, [tokens, inputs])
                            }
                        };
                        let xa = ViewMut::new(&mut xa[p.rank..], [tokens, adapter.rank], ranks);
                        product(xa, Into::Set, input, a.t(), 1.0);
                    }
                }
            }
        }
        for p in places.clone() {
            stretches(p.weight, scratch, |rows, w| {
                let update = p.adapter.zip(params).map(|(a, params)| {
                    let b = &params[a.b + rows.start * a.rank..];
                    let b = View::dense(b, [rows.len(), a.rank]);
                    let xa = View::new(&xa[p.rank..], [tokens, a.rank], ranks);
                    Term::new(xa, b.t(), a.scale)
                });
                let out = &mut out[p.out + rows.start..];
                let out = ViewMut::new(out, [tokens, rows.len()], width);
                products(out, base, Term::new(input, w.t(), 1.0), update);
            });
        }
        let Some(params) = params.filter(|_| dora) else {
            return;
        };
        for p in places {
            let Some((_, dora)) = p.dora() else { continue };
            let (m, n) = (&params[dora.magnitude..], &params[dora.norm..]);
            out[..tokens * width].par_chunks_mut(width).for_each(|out| {
                rescale(&mut out[p.out..p.out + p.weight.rows], m, n);
            });
        }
        if let Some(residual) = residual {
            let rows = out[..tokens * width].par_chunks_mut(PER_TASK);
            rows.zip(residual.par_chunks(PER_TASK))
                .for_each(|(out, r)| add(r, out));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one fused operation")]
    pub(super) fn group_backward(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Vec<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&[f32], usize),
        xa: &[f32],
        dout: &[f32],
        want: LinearGrad<'_, Self>,
        scratch: &mut [f32],
    ) {
        let (places, [inputs, width, ranks]) = places(group);
        let LinearGrad { mut dx, mut grads } = want;
        let input = View::dense(x, [tokens, inputs]);
        let (dxa, scratch) = scratch.split_at_mut(tokens * ranks);

        let params = params.filter(|_| ranks > 0);
        let mut into = Into::Set;
        if let Some(params) = params {
            for p in places.clone() {
                let Some((a, dora)) = p.dora() else { continue };
                let r = a.rank;
                let xa = View::new(&xa[p.rank..], [tokens, r], ranks);
                let mut into_dxa = Into::Set;
                for start in (0..p.weight.rows).step_by(WIDEN_ROWS) {
                    let rows = start..p.weight.rows.min(start + WIDEN_ROWS);
                    let n = rows.len();
                    let (y, rest) = scratch.split_at_mut(tokens * n);
                    let (dy, wide) = rest.split_at_mut(tokens * n);
                    let w = rows_of(p.weight, rows, wide);
                    let b = View::dense(&params[a.b + start * r..], [n, r]);
                    let [m, norm] =
                        [dora.magnitude, dora.norm].map(|at| &params[at + start..][..n]);
                    let dout = &dout[p.out + start..];
                    dy.par_chunks_mut(n)
                        .zip(dout.par_chunks(width))
                        .for_each(|(dy, dout)| {
                            dy.copy_from_slice(&dout[..n]);
                            rescale(dy, m, norm);
                        });
                    let dy = View::dense(dy, [tokens, n]);
                    if let Some(grads) = grads.as_deref_mut() {
                        let base = Term::new(input, w.t(), 1.0);
                        let update = Term::new(xa, b.t(), a.scale);
                        products(
                            ViewMut::dense(y, [tokens, n]),
                            Into::Set,
                            base,
                            Some(update),
                        );
                        let dm = &mut grads[dora.magnitude + start..][..n];
                        magnitude_gradient(y, dout, width, norm, dm);
                        let db = ViewMut::dense(&mut grads[a.b + start * r..], [n, r]);
                        product(db, Into::Add, dy.t(), xa, a.scale);
                    }
                    let dxa = ViewMut::new(&mut dxa[p.rank..], [tokens, r], ranks);
                    product(dxa, into_dxa, dy, b, a.scale);
                    into_dxa = Into::Add;
                    if let Some(dx) = dx.as_deref_mut() {
                        product(ViewMut::dense(dx, [tokens, inputs]), into, dy, w, 1.0);
                        into = Into::Add;
                    }
                }
            }
            for p in places.clone() {
                let (Some(a), None) = (p.adapter, p.dora()) else {
                    continue;
                };
                let d = View::new(&dout[p.out..], [tokens, p.weight.rows], width);
                let b = View::dense(&params[a.b..], [p.weight.rows, a.rank]);
                let into = ViewMut::new(&mut dxa[p.rank..], [tokens, a.rank], ranks);
                product(into, Into::Set, d, b, a.scale);
                if let Some(grads) = grads.as_deref_mut() {
                    let xa = View::new(&xa[p.rank..], [tokens, a.rank], ranks);
                    let db = ViewMut::dense(&mut grads[a.b..], [p.weight.rows, a.rank]);
                    product(db, Into::Add, d.t(), xa, a.scale);
                }
            }
        }
        let stack = match dropout {
            None => params.zip(stacked_a(group, inputs)),
            Some(_) => None,
        };
        // Joins the first product that reaches `dx`.
        let mut update = stack.clone().map(|(params, stack)| {
            let a = View::dense(&params[stack], [ranks, inputs]);
            Term::new(View::dense(dxa, [tokens, ranks]), a, 1.0)
        });
        if let Some(dx) = dx.as_deref_mut() {
            for p in places.clone().filter(|p| p.dora().is_none()) {
                stretches(p.weight, scratch, |rows, w| {
                    let d = &dout[p.out + rows.start..];
                    let d = View::new(d, [tokens, rows.len()], width);
                    let dx = ViewMut::dense(dx, [tokens, inputs]);
                    products(dx, into, Term::new(d, w, 1.0), update.take());
                    into = Into::Add;
                });
            }
            if let Some(update) = update {
                products(ViewMut::dense(dx, [tokens, inputs]), into, update, None);
            }
        }
        let Some(params) = params else {
            return;
        };
        if let Some((_, stack)) = stack {
            if let Some(grads) = grads {
                let da = ViewMut::dense(&mut grads[stack], [ranks, inputs]);
                let dxa = View::dense(dxa, [tokens, ranks]);
                product(da, Into::Add, dxa.t(), input, 1.0);
            }
            return;
        }
        for p in places {
            let Some(a) = p.adapter else { continue };
            let key = (group.layer, a.module);
            let dxa = View::new(&dxa[p.rank..], [tokens, a.rank], ranks);
            if let Some(grads) = grads.as_deref_mut() {
                let input = match &dropout {
                    None => input,
                    Some(d) => {
                        apply_dropout(d, key, x, [tokens, inputs], Into::Set, scratch);
                        View::dense(scratch, [tokens, inputs])
                    }
                };
                let da = ViewMut::dense(&mut grads[a.a..], [a.rank, inputs]);
                product(da, Into::Add, dxa.t(), input, 1.0);
            }
            if let Some(dx) = dx.as_deref_mut() {
                let factor = View::dense(&params[a.a..], [a.rank, inputs]);
                match &dropout {
                    None => {
                        product(
                            ViewMut::dense(dx, [tokens, inputs]),
                            Into::Add,
                            dxa,
                            factor,
                            1.0,
                        );
                    }
                    Some(d) => {
                        let raw = ViewMut::dense(scratch, [tokens, inputs]);
                        product(raw, Into::Set, dxa, factor, 1.0);
                        apply_dropout(d, key, scratch, [tokens, inputs], Into::Add, dx);
                    }
                }
            }
        }
    }
}
