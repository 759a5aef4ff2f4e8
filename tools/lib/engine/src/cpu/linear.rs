//! Products with frozen weights and their low-rank updates.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::product::{Into, View, ViewMut, product};
use super::simd::vectorised;
use super::{Cpu, PER_TASK};
use crate::rng::{self, Purpose, Stream};
use crate::{Adapter, Dropout, Group, HostMatrix, LinearGrad, MatrixData};

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
    if let MatrixData::F32(values) = &m.data {
        return f(0..m.rows, View::dense(values, [m.rows, m.cols]));
    }
    for start in (0..m.rows).step_by(WIDEN_ROWS) {
        let rows = start..m.rows.min(start + WIDEN_ROWS);
        let shape = [rows.len(), m.cols];
        let wide = &mut scratch[..rows.len() * m.cols];
        widen(m, rows.clone(), wide);
        f(rows, View::dense(wide, shape));
    }
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
    let (rows, positions) = (&dropout.rows.rows, &dropout.rows.positions);
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
    /// Scratch floats of a group: a widened weight, the gradient of `x Aᵀ`, and
    /// dropped inputs.
    pub(super) fn group_scratch(weights: &[&HostMatrix], [tokens, rank]: [usize; 2]) -> usize {
        let wide = weights.iter().map(|w| widen_scratch(w)).max().unwrap_or(0);
        let inputs = weights.iter().map(|w| w.cols).max().unwrap_or(0);
        let dropped = if rank > 0 { tokens * inputs } else { 0 };
        wide.max(dropped) + tokens * rank
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
        let base = match residual {
            None => Into::Set,
            Some(residual) => {
                out[..tokens * width].copy_from_slice(&residual[..tokens * width]);
                Into::Add
            }
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
        for p in places {
            stretches(p.weight, scratch, |rows, w| {
                let out = &mut out[p.out + rows.start..];
                let out = ViewMut::new(out, [tokens, rows.len()], width);
                product(out, base, input, w.t(), 1.0);
            });
            if let (Some(a), Some(params)) = (p.adapter, params) {
                let b = View::dense(&params[a.b..], [p.weight.rows, a.rank]);
                let xa = View::new(&xa[p.rank..], [tokens, a.rank], ranks);
                let out = ViewMut::new(&mut out[p.out..], [tokens, p.weight.rows], width);
                product(out, Into::Add, xa, b.t(), a.scale);
            }
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

        if let Some(dx) = dx.as_deref_mut() {
            let mut into = Into::Set;
            for p in places.clone() {
                stretches(p.weight, scratch, |rows, w| {
                    let d = &dout[p.out + rows.start..];
                    let d = View::new(d, [tokens, rows.len()], width);
                    product(ViewMut::dense(dx, [tokens, inputs]), into, d, w, 1.0);
                    into = Into::Add;
                });
            }
        }
        let Some(params) = params.filter(|_| ranks > 0) else {
            return;
        };
        for p in places.clone() {
            let Some(a) = p.adapter else { continue };
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
        if let (None, Some(stack)) = (dropout, stacked_a(group, inputs)) {
            let dxa = View::dense(dxa, [tokens, ranks]);
            if let Some(grads) = grads {
                let da = ViewMut::dense(&mut grads[stack.clone()], [ranks, inputs]);
                product(da, Into::Add, dxa.t(), input, 1.0);
            }
            if let Some(dx) = dx {
                let a = View::dense(&params[stack], [ranks, inputs]);
                product(ViewMut::dense(dx, [tokens, inputs]), Into::Add, dxa, a, 1.0);
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
