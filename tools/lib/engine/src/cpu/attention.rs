//! Causal attention over packed rows and over a cache.
//!
//! A task is one row and one head (backward: one key/value head with the query
//! heads it serves, so that nobody else writes its gradient). Inside, blocks of
//! queries meet the keys up to their own end: at most one block's width of
//! scores is computed in vain.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::product::{Causal, Into, Shared, Term, View, product_here};
use super::simd::{dot, exp, max, sum, vectorised};
use crate::{Cache, Heads, Ragged};

/// Queries of a block.
const BLOCK: usize = 64;

/// Scratch floats of one thread at work: two blocks of scores.
fn lane(longest: usize) -> usize {
    2 * BLOCK * longest
}

/// Scratch floats for every thread of the pool.
pub(super) fn scratch(longest: usize) -> usize {
    rayon::current_num_threads() * lane(longest)
}

/// Runs tasks `0..count` on as many threads as the scratch has lanes for.
fn in_lanes(
    scratch: &mut [f32],
    lane: usize,
    count: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(scratch.len() >= lane, "scratch for one thread at least");
    let next = AtomicUsize::new(0);
    scratch.par_chunks_exact_mut(lane.max(1)).for_each(|lane| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                break;
            }
            task(i, lane);
        }
    });
}

/// The buffers of one attention, and where rows and heads lie in them.
struct Packed<'a> {
    heads: Heads,
    bounds: &'a [usize],
    qk: &'a [f32],
    qkv: &'a [f32],
}

impl<'a> Packed<'a> {
    /// Queries `from..to` of `head`.
    fn q(&self, head: usize, from: usize, to: usize) -> View<'a> {
        let width = self.heads.qk();
        let start = from * width + head * self.heads.dim;
        View::new(&self.qk[start..], [to - from, self.heads.dim], width)
    }

    /// Keys `from..to` of a key/value head.
    fn k(&self, kv: usize, from: usize, to: usize) -> View<'a> {
        let width = self.heads.qk();
        let start = from * width + self.heads.q() + kv * self.heads.dim;
        View::new(&self.qk[start..], [to - from, self.heads.dim], width)
    }

    /// Values `from..to` of a key/value head.
    fn v(&self, kv: usize, from: usize, to: usize) -> View<'a> {
        let width = self.heads.qkv();
        let start = from * width + self.heads.qk() + kv * self.heads.dim;
        View::new(&self.qkv[start..], [to - from, self.heads.dim], width)
    }

    /// The blocks of queries of row `start..end`.
    fn blocks(start: usize, end: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
        let count = (end - start).div_ceil(BLOCK);
        (0..count).map(move |b| {
            let from = start + b * BLOCK;
            (from, end.min(from + BLOCK))
        })
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }
}

vectorised! {
    /// Scores of consecutive queries, the first of which sees `seen` keys, to
    /// probabilities, with the logs of their denominators.
    fn softmax(scores: &mut [f32], seen: usize, lse: &mut [f32]) {
        let keys = scores.len() / lse.len();
        for (i, (row, lse)) in scores.chunks_exact_mut(keys).zip(lse).enumerate() {
            let (row, future) = row.split_at_mut(seen + i);
            let top = max(row);
            for s in row.iter_mut() {
                *s = exp(*s - top);
            }
            let total = sum(row);
            for s in row {
                *s /= total;
            }
            future.fill(0.0);
            *lse = top + total.ln();
        }
    }

    /// One query's scores `p` to probabilities and `ds`, the gradient by those, to
    /// the gradient by the scores: `ds = p (ds - dout · out)`.
    fn softmax_backward(lse: f32, dout: &[f32], out: &[f32], p: &mut [f32], ds: &mut [f32]) {
        let delta = dot(dout, out);
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }

    /// One query over keys and values `stride` apart, as many as `p` has room for.
    fn attend(
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        stride: usize,
        p: &mut [f32],
        out: &mut [f32],
    ) {
        let scale = 1.0 / (q.len() as f32).sqrt();
        for (j, p) in p.iter_mut().enumerate() {
            *p = dot(q, &keys[j * stride..][..q.len()]) * scale;
        }
        let top = max(p);
        for p in p.iter_mut() {
            *p = exp(*p - top);
        }
        let total = sum(p);
        out.fill(0.0);
        for (j, p) in p.iter().enumerate() {
            for (o, v) in out.iter_mut().zip(&values[j * stride..]) {
                *o += p / total * v;
            }
        }
    }
}

pub(super) fn forward(
    heads: Heads,
    rows: &Ragged<super::Cpu>,
    (qk, qkv): (&[f32], &[f32]),
    out: &mut [f32],
    lse: &mut [f32],
    scratch: &mut [f32],
) {
    let packed = Packed {
        heads,
        bounds: rows.bounds(),
        qk,
        qkv,
    };
    assert!(out.len() >= rows.tokens() * heads.q() && lse.len() >= rows.tokens() * heads.query);
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let tasks = (packed.bounds.len() - 1) * heads.query;
    in_lanes(scratch, lane(rows.longest()), tasks, |task, lane| {
        let (row, head) = (task / heads.query, task % heads.query);
        let kv = head * heads.kv / heads.query;
        let (start, end) = (packed.bounds[row], packed.bounds[row + 1]);
        for (from, to) in Packed::blocks(start, end) {
            let keys = to - start;
            let scores = &mut lane[..(to - from) * keys];
            let (q, k) = (packed.q(head, from, to), packed.k(kv, start, to));
            let seen = from - start + 1;
            let qk = Term::new(q, k.t(), packed.scale()).causal(Causal::Out(seen));
            // SAFETY: `scores` is this lane's own.
            unsafe { product_here(scores.as_mut_ptr(), keys, Into::Set, qk) };
            let mut denominators = [0.0; BLOCK];
            let denominators = &mut denominators[..to - from];
            softmax(scores, seen, denominators);
            for (token, value) in (from..).zip(denominators) {
                // SAFETY: inside `lse` (asserted), and this token and head are this task's.
                unsafe { *lse.at(token * heads.query + head) = *value };
            }
            let p = View::dense(scores, [to - from, keys]);
            let pv = Term::new(p, packed.v(kv, start, to), 1.0).causal(Causal::Lhs(seen));
            // SAFETY: inside `out` (asserted), and these tokens and this head are this task's.
            unsafe {
                let out = out.at(from * heads.q() + head * heads.dim);
                product_here(out, heads.q(), Into::Set, pv);
            }
        }
    });
}

pub(super) fn backward(
    heads: Heads,
    rows: &Ragged<super::Cpu>,
    (qk, qkv): (&[f32], &[f32]),
    (out, lse, dout): (&[f32], &[f32], &[f32]),
    dqkv: &mut [f32],
    scratch: &mut [f32],
) {
    let packed = Packed {
        heads,
        bounds: rows.bounds(),
        qk,
        qkv,
    };
    let Heads { query, kv, dim } = heads;
    assert!(dqkv.len() >= rows.tokens() * heads.qkv());
    let dqkv = Shared::new(dqkv);
    let tasks = (packed.bounds.len() - 1) * kv;
    in_lanes(scratch, lane(rows.longest()), tasks, |task, lane| {
        let (row, kv_head) = (task / kv, task % kv);
        let (start, end) = (packed.bounds[row], packed.bounds[row + 1]);
        // The last block sees every key, so the first product to reach dK and dV
        // overwrites all of them and the others add.
        let mut into = Into::Set;
        let per_kv = query / kv;
        for head in kv_head * per_kv..(kv_head + 1) * per_kv {
            for (from, to) in Packed::blocks(start, end).rev() {
                let (count, keys) = (to - from, to - start);
                let (p, ds) = lane.split_at_mut(BLOCK * rows.longest());
                let (p, ds) = (&mut p[..count * keys], &mut ds[..count * keys]);
                let (q, k) = (packed.q(head, from, to), packed.k(kv_head, start, to));
                let v = packed.v(kv_head, start, to);
                let d = &dout[from * heads.q() + head * dim..];
                let d = View::new(d, [count, dim], heads.q());
                let seen = from - start + 1;
                let qk = Term::new(q, k.t(), packed.scale()).causal(Causal::Out(seen));
                let dv = Term::new(d, v.t(), 1.0).causal(Causal::Out(seen));
                // SAFETY: `p` and `ds` are this lane's own.
                unsafe {
                    product_here(p.as_mut_ptr(), keys, Into::Set, qk);
                    product_here(ds.as_mut_ptr(), keys, Into::Set, dv);
                }
                let pairs = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                for (token, (p, ds)) in (from..).zip(pairs) {
                    let seen = token - start + 1;
                    p[seen..].fill(0.0);
                    ds[seen..].fill(0.0);
                    let (p, ds) = (&mut p[..seen], &mut ds[..seen]);
                    let at = token * heads.q() + head * dim;
                    let (dout, out) = (&dout[at..at + dim], &out[at..at + dim]);
                    softmax_backward(lse[token * query + head], dout, out, p, ds);
                }
                let p = View::dense(p, [count, keys]);
                let ds = View::dense(ds, [count, keys]);
                let scale = packed.scale();
                let for_q = Term::new(ds, k, scale).causal(Causal::Lhs(seen));
                let for_k = Term::new(ds.t(), q, scale).causal(Causal::LhsTurned(seen));
                let for_v = Term::new(p.t(), d, 1.0).causal(Causal::LhsTurned(seen));
                let at = |token: usize, column: usize| token * heads.qkv() + column;
                // SAFETY: inside `dqkv` (asserted); the queries of this head, and the
                // keys and values of this key/value head, in this row are this task's.
                unsafe {
                    let dq = dqkv.at(at(from, head * dim));
                    let dk = dqkv.at(at(start, heads.q() + kv_head * dim));
                    let dv = dqkv.at(at(start, heads.qk() + kv_head * dim));
                    product_here(dq, heads.qkv(), Into::Set, for_q);
                    product_here(dk, heads.qkv(), into, for_k);
                    product_here(dv, heads.qkv(), into, for_v);
                }
                into = Into::Add;
            }
        }
    });
}

/// One query per slot over its cached keys and values.
pub(super) fn cached(
    heads: Heads,
    cache: Cache,
    (slots, positions): (&[u32], &[u32]),
    qk: &[f32],
    (keys, values): (&[f32], &[f32]),
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let Heads { query, kv, dim } = heads;
    assert!(out.len() >= slots.len() * heads.q());
    let out = Shared::new(out);
    in_lanes(
        scratch,
        lane(cache.capacity),
        slots.len() * query,
        |task, lane| {
            let (i, head) = (task / query, task % query);
            let kv_head = head * kv / query;
            let seen = positions[i] as usize + 1;
            let base = slots[i] as usize * cache.capacity * heads.k() + kv_head * dim;
            let q = &qk[i * heads.qk() + head * dim..][..dim];
            // SAFETY: inside `out` (asserted), and this token and head are this task's.
            let out =
                unsafe { std::slice::from_raw_parts_mut(out.at(i * heads.q() + head * dim), dim) };
            let (keys, values) = (&keys[base..], &values[base..]);
            attend(q, keys, values, heads.k(), &mut lane[..seen], out);
        },
    );
}
