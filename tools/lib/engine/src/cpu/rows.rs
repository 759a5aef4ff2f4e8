//! Operations on one token at a time: norms, rotation, gates.

use rayon::prelude::*;

use super::PER_TASK;
use super::simd::{dot, sigmoid, vectorised};
use crate::rng::{self, Purpose, Stream};
use crate::{Heads, Neftune};

/// Tokens of `width` features that make a task worth handing to a thread.
fn tokens_per_task(width: usize) -> usize {
    PER_TASK.div_ceil(width)
}

/// `1 / √(mean(x²) + eps)`.
#[inline(always)]
fn rstd_of(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `Σ dy · w · x`.
#[inline(always)]
fn triple(dy: &[f32], w: &[f32], x: &[f32]) -> f32 {
    const CHUNK: usize = 64;
    let (mut g, mut total) = ([0.0; CHUNK], 0.0);
    for ((dy, w), x) in dy.chunks(CHUNK).zip(w.chunks(CHUNK)).zip(x.chunks(CHUNK)) {
        let g = &mut g[..dy.len()];
        for ((g, dy), w) in g.iter_mut().zip(dy).zip(w) {
            *g = dy * w;
        }
        total += dot(g, x);
    }
    total
}

vectorised! {
    /// Some tokens of [`rms_norm`].
    fn norm_tokens(x: &[f32], w: &[f32], eps: f32, out: &mut [f32], rstd: &mut [f32]) {
        let rows = out.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len()));
        for ((out, x), rstd) in rows.zip(rstd) {
            *rstd = rstd_of(x, eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                *o = x * *rstd * w;
            }
        }
    }

    /// Some tokens of [`rms_norm_backward`].
    fn norm_tokens_backward(dy: &[f32], x: &[f32], w: &[f32], rstd: &[f32], dx: &mut [f32]) {
        let width = w.len();
        let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width));
        for (((dx, dy), x), r) in rows.zip(x.chunks_exact(width)).zip(rstd) {
            let along = triple(dy, w, x) * r * r / width as f32;
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                *dx += r * (dy * w - x * along);
            }
        }
    }

    /// Some tokens of [`Rotation::forward`], from number `first` on.
    fn rotate_tokens(how: &Rotation<'_>, first: usize, qkv: &[f32], qk: &mut [f32], rstd: &mut [f32]) {
        let Heads { query, kv, dim } = how.heads;
        let rows = qk.chunks_exact_mut(how.heads.qk()).zip(qkv.chunks_exact(how.heads.qkv()));
        for (t, ((qk, qkv), rstd)) in rows.zip(rstd.chunks_exact_mut(query + kv)).enumerate() {
            let (cos, sin) = how.angles(first + t);
            let pairs = qk.chunks_exact_mut(dim).zip(qkv.chunks_exact(dim));
            for (h, ((y, x), r)) in pairs.zip(rstd).enumerate() {
                *r = rstd_of(x, how.eps);
                let (y0, y1) = y.split_at_mut(dim / 2);
                let (x0, x1) = x.split_at(dim / 2);
                let (w0, w1) = how.norm(h).split_at(dim / 2);
                let inputs = x0.iter().zip(x1).zip(w0.iter().zip(w1)).zip(cos.iter().zip(sin));
                for ((y0, y1), (((x0, x1), (w0, w1)), (c, s))) in y0.iter_mut().zip(y1).zip(inputs) {
                    let (a, b) = (x0 * *r * w0, x1 * *r * w1);
                    *y0 = a * c - b * s;
                    *y1 = b * c + a * s;
                }
            }
        }
    }

    /// Some tokens of [`Rotation::backward`], from number `first` on.
    fn rotate_tokens_back(how: &Rotation<'_>, first: usize, qkv: &[f32], rstd: &[f32], dqkv: &mut [f32]) {
        let Heads { query, kv, dim } = how.heads;
        let wide = how.heads.qkv();
        let rows = dqkv.chunks_exact_mut(wide).zip(qkv.chunks_exact(wide));
        for (t, ((dqkv, qkv), rstd)) in rows.zip(rstd.chunks_exact(query + kv)).enumerate() {
            let (cos, sin) = how.angles(first + t);
            let pairs = dqkv.chunks_exact_mut(dim).zip(qkv.chunks_exact(dim));
            for (h, ((d, x), r)) in pairs.zip(rstd).enumerate() {
                let (d0, d1) = d.split_at_mut(dim / 2);
                for ((d0, d1), (c, s)) in d0.iter_mut().zip(d1).zip(cos.iter().zip(sin)) {
                    let (a, b) = (*d0, *d1);
                    *d0 = a * c + b * s;
                    *d1 = b * c - a * s;
                }
                let w = how.norm(h);
                let along = triple(d, w, x) * r * r / dim as f32;
                for ((d, x), w) in d.iter_mut().zip(x).zip(w) {
                    *d = r * (*d * w - x * along);
                }
            }
        }
    }

    /// Some tokens of [`swiglu`].
    fn gate_tokens(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (out, row) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
            let (gate, up) = row.split_at(width);
            for ((o, &g), u) in out.iter_mut().zip(gate).zip(up) {
                *o = g * sigmoid(g) * u;
            }
        }
    }

    /// Some tokens of [`swiglu_backward`].
    fn gate_tokens_backward(gate_up: &[f32], dout: &[f32], width: usize, dgate_up: &mut [f32]) {
        let rows = dgate_up.chunks_exact_mut(2 * width).zip(gate_up.chunks_exact(2 * width));
        for ((drow, row), dout) in rows.zip(dout.chunks_exact(width)) {
            let (dgate, dup) = drow.split_at_mut(width);
            let (gate, up) = row.split_at(width);
            let inputs = gate.iter().zip(up).zip(dout);
            for ((dg, du), ((&g, u), d)) in dgate.iter_mut().zip(dup).zip(inputs) {
                let s = sigmoid(g);
                *du = d * g * s;
                *dg = d * u * s * (1.0 + g * (1.0 - s));
            }
        }
    }
}

/// Noise on the embeddings of whole rows, given their bounds and each token's number.
pub(super) fn add_noise(
    noise: &Neftune,
    (bounds, numbers): (&[usize], &[u32]),
    width: usize,
    x: &mut [f32],
) {
    let stream = Stream {
        seed: noise.seed,
        purpose: Purpose::Neftune,
        layer: 0,
        module: 0,
    };
    for row in bounds.windows(2) {
        let (range, length) = (row[0] * width..row[1] * width, row[1] - row[0]);
        let bound = noise.bound(length, width);
        x[range]
            .par_chunks_exact_mut(width)
            .zip(0..length as u32)
            .for_each(|(x, position)| {
                let key = [numbers[row[0]], noise.step, position];
                rng::add_noise(&stream, key, bound, x);
            });
    }
}

pub(super) fn rms_norm(x: &[f32], (w, eps): (&[f32], f32), out: &mut [f32], rstd: &mut [f32]) {
    let tokens = tokens_per_task(w.len());
    out.par_chunks_mut(tokens * w.len())
        .zip(x.par_chunks(tokens * w.len()))
        .zip(rstd.par_chunks_mut(tokens))
        .for_each(|((out, x), rstd)| norm_tokens(x, w, eps, out, rstd));
}

pub(super) fn rms_norm_backward(
    dy: &[f32],
    (x, w, rstd): (&[f32], &[f32], &[f32]),
    dx: &mut [f32],
) {
    let tokens = tokens_per_task(w.len());
    dx.par_chunks_mut(tokens * w.len())
        .zip(dy.par_chunks(tokens * w.len()))
        .zip(x.par_chunks(tokens * w.len()))
        .zip(rstd.par_chunks(tokens))
        .for_each(|(((dx, dy), x), rstd)| norm_tokens_backward(dy, x, w, rstd, dx));
}

/// What both directions of the rotation need beside the buffers.
pub(super) struct Rotation<'a> {
    pub heads: Heads,
    /// Norm weights of queries and keys.
    pub norms: [&'a [f32]; 2],
    /// `[positions, dim]`: cosines, then sines.
    pub rope: &'a [f32],
    pub positions: &'a [u32],
    pub eps: f32,
}

impl Rotation<'_> {
    /// Cosines and sines of a token's angles.
    #[inline(always)]
    fn angles(&self, token: usize) -> (&[f32], &[f32]) {
        let dim = self.heads.dim;
        let at = self.positions[token] as usize * dim;
        self.rope[at..at + dim].split_at(dim / 2)
    }

    /// The norm weight of head `h`, queries first.
    #[inline(always)]
    fn norm(&self, h: usize) -> &[f32] {
        self.norms[usize::from(h >= self.heads.query)]
    }

    pub fn forward(&self, qkv: &[f32], qk: &mut [f32], rstd: &mut [f32]) {
        let (wide, narrow) = (self.heads.qkv(), self.heads.qk());
        let (tokens, count) = (tokens_per_task(narrow), self.heads.query + self.heads.kv);
        qk.par_chunks_mut(tokens * narrow)
            .zip(qkv.par_chunks(tokens * wide))
            .zip(rstd.par_chunks_mut(tokens * count))
            .enumerate()
            .for_each(|(i, ((qk, qkv), rstd))| rotate_tokens(self, i * tokens, qkv, qk, rstd));
    }

    pub fn backward(&self, qkv: &[f32], rstd: &[f32], dqkv: &mut [f32]) {
        let wide = self.heads.qkv();
        let (tokens, count) = (tokens_per_task(wide), self.heads.query + self.heads.kv);
        dqkv.par_chunks_mut(tokens * wide)
            .zip(qkv.par_chunks(tokens * wide))
            .zip(rstd.par_chunks(tokens * count))
            .enumerate()
            .for_each(|(i, ((d, qkv), rstd))| rotate_tokens_back(self, i * tokens, qkv, rstd, d));
    }
}

pub(super) fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32]) {
    let tokens = tokens_per_task(width);
    out.par_chunks_mut(tokens * width)
        .zip(gate_up.par_chunks(tokens * 2 * width))
        .for_each(|(out, gate_up)| gate_tokens(gate_up, width, out));
}

pub(super) fn swiglu_backward(gate_up: &[f32], dout: &[f32], width: usize, dgate_up: &mut [f32]) {
    let tokens = tokens_per_task(width);
    dgate_up
        .par_chunks_mut(tokens * 2 * width)
        .zip(gate_up.par_chunks(tokens * 2 * width))
        .zip(dout.par_chunks(tokens * width))
        .for_each(|((d, gate_up), dout)| gate_tokens_backward(gate_up, dout, width, d));
}
