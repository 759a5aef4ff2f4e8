//! The processor, rounding where the CUDA backend stores bf16: what a GPU is
//! compared with, so that what is left of a difference is the order of its sums.
//!
//! Weights are decoded and rounded once, when they come; activations after the
//! operation that makes them, the adapters' factors before each product; inside
//! attention the probabilities, tile by tile as the kernels walk. An oracle may be
//! slow: it allocates as it goes, and attends with plain loops.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::product::{Into, View, ViewMut, product};
use super::{Cpu, Workspace, linear, zeroed};
use crate::rng::{self, Purpose, Stream};
use crate::{
    AdamW, Adapter, Backend, Cache, Dora, Dropout, Group, Heads, HostMatrix, LinearGrad,
    MatrixData, Neftune, QkNorms, Ragged, Result, Sampling, Stretch,
};

/// Queries, and keys, of a tile of the kernels' attention.
const TILE: usize = 64;

/// The processor with the roundings of [`Cuda`](crate::Cuda).
#[derive(Debug, Clone, Copy, Default)]
pub struct Rounded;

/// A weight as the products of a GPU see it.
#[derive(Debug)]
pub struct Matrix {
    /// bf16, decoded if need be.
    values: HostMatrix,
    /// Quantised neighbours share a product, and so its rounding.
    quantised: bool,
}

fn nearest(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn round(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = nearest(*v));
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().copied().map(nearest).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(out: &mut [f32], by: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += by * x);
}

/// A member with an adapter, and where it lies in the group.
struct Update {
    adapter: Adapter,
    /// First output column, first column of `x Aᵀ`, and outputs.
    out: usize,
    rank: usize,
    outputs: usize,
    /// The factors, rounded: `[rank, inputs]` and `[outputs, rank]`.
    a: Vec<f32>,
    b: Vec<f32>,
}

/// The products of one group.
struct Products<'a> {
    group: &'a Group<'a, Rounded>,
    params: Option<&'a Vec<f32>>,
    dropout: Option<Dropout<'a, Rounded>>,
    updates: Vec<Update>,
    tokens: usize,
    inputs: usize,
    /// Outputs, and ranks, of all members.
    width: usize,
    ranks: usize,
}

impl<'a> Products<'a> {
    fn new(
        group: &'a Group<'a, Rounded>,
        params: Option<&'a Vec<f32>>,
        dropout: Option<Dropout<'a, Rounded>>,
        tokens: usize,
    ) -> Self {
        let (mut out, mut rank) = (0, 0);
        let mut updates = Vec::new();
        for member in group.members {
            let HostMatrix { rows, cols, .. } = member.weight.values;
            if let Some(adapter) = member.adapter {
                let params = params.expect("a group with adapters comes with their parameters");
                updates.push(Update {
                    adapter,
                    out,
                    rank,
                    outputs: rows,
                    a: rounded(&params[adapter.a..][..adapter.rank * cols]),
                    b: rounded(&params[adapter.b..][..adapter.rank * rows]),
                });
                rank += adapter.rank;
            }
            out += rows;
        }
        Self {
            group,
            params,
            dropout,
            updates,
            tokens,
            inputs: group.members[0].weight.values.cols,
            width: out,
            ranks: rank,
        }
    }

    /// The members that share one product of the CUDA backend: first output column,
    /// and weights. Quantised members are decoded one below the other, unless a
    /// dense one comes between them.
    fn runs(&self) -> Vec<(usize, Vec<&HostMatrix>)> {
        let mut runs: Vec<(usize, Vec<&HostMatrix>)> = Vec::new();
        let (mut out, mut open) = (0, false);
        for member in self.group.members {
            let Matrix { values, quantised } = member.weight;
            match runs.last_mut() {
                Some((_, weights)) if open && *quantised => weights.push(values),
                _ => runs.push((out, vec![values])),
            }
            open = *quantised;
            out += values.rows;
        }
        runs
    }

    /// What a module's dropout keeps `[tokens, inputs]`, as factors of 0 or 1, if there is
    /// dropout. What is kept is scaled when sums are there: see [`scale`](Self::scale).
    fn mask(&self, module: u32) -> Option<Vec<f32>> {
        let dropout = self.dropout.as_ref()?;
        let stream = Stream {
            seed: dropout.seed,
            purpose: Purpose::Dropout,
            layer: self.group.layer,
            module,
        };
        let how = (rng::drop_threshold(dropout.p), 1.0);
        let mut factors = vec![0.0; self.tokens * self.inputs];
        for (t, factors) in factors.chunks_exact_mut(self.inputs).enumerate() {
            let (row, position) = (dropout.rows[t], dropout.positions[t]);
            rng::dropout_factors(&stream, [row, dropout.step, position], 0, how, factors);
        }
        Some(factors)
    }

    /// What of the input an adapter sees.
    fn kept(&self, x: &[f32], module: u32) -> Vec<f32> {
        let x = &x[..self.tokens * self.inputs];
        match self.mask(module) {
            None => x.to_vec(),
            Some(factors) => x.iter().zip(factors).map(|(x, f)| x * f).collect(),
        }
    }

    /// By what kept values are multiplied.
    fn scale(&self) -> f32 {
        let p = self.dropout.as_ref().map_or(0.0, |dropout| dropout.p);
        1.0 / (1.0 - p)
    }

    /// `xa = drop(x) Aᵀ`
    fn low_rank(&self, x: &[f32], xa: &mut [f32]) {
        for u in &self.updates {
            let (tokens, rank) = (self.tokens, u.adapter.rank);
            let x = self.kept(x, u.adapter.module);
            let x = View::dense(&x, [tokens, self.inputs]);
            let a = View::dense(&u.a, [rank, self.inputs]);
            let to = ViewMut::new(&mut xa[u.rank..], [tokens, rank], self.ranks);
            product(to, Into::Set, x, a.t(), self.scale());
        }
        round(&mut xa[..self.tokens * self.ranks]);
    }

    /// `out = scale · xa Bᵀ (+ residual)`, rounded, then `+ x Wᵀ`.
    fn forward(
        &self,
        x: &[f32],
        xa: &[f32],
        residual: Option<&Vec<f32>>,
        out: &mut [f32],
        scratch: &mut Workspace,
    ) {
        let (tokens, width) = (self.tokens, self.width);
        let out = &mut out[..tokens * width];
        match residual {
            None => out.fill(0.0),
            Some(residual) => out.copy_from_slice(&residual[..tokens * width]),
        }
        for u in &self.updates {
            let rank = u.adapter.rank;
            let xa = View::new(&xa[u.rank..], [tokens, rank], self.ranks);
            let b = View::dense(&u.b, [u.outputs, rank]);
            let to = ViewMut::new(&mut out[u.out..], [tokens, u.outputs], width);
            product(to, Into::Add, xa, b.t(), u.adapter.scale);
        }
        round(out);
        let input = View::dense(x, [tokens, self.inputs]);
        let mut first = 0;
        for member in self.group.members {
            let weight = &member.weight.values;
            linear::stretches(weight, &mut scratch.0, |rows, w| {
                let to = &mut out[first + rows.start..];
                let to = ViewMut::new(to, [tokens, rows.len()], width);
                product(to, Into::Add, input, w.t(), 1.0);
            });
            first += weight.rows;
        }
        round(out);
    }

    /// Multiplies the columns of members with DoRA by `magnitude / norm`.
    fn rescale(&self, out: &mut [f32]) {
        let params = self.params.expect("DoRA comes with parameters");
        for u in &self.updates {
            let Some(dora) = u.adapter.dora else { continue };
            for row in out.chunks_exact_mut(self.width).take(self.tokens) {
                for (o, y) in row[u.out..][..u.outputs].iter_mut().enumerate() {
                    *y *= params[dora.magnitude + o] / params[dora.norm + o];
                }
            }
        }
    }

    /// `grads[magnitude + o] += Σ dout · y / norm`, with `y` before rescaling.
    fn magnitudes(&self, y: &[f32], dout: &[f32], grads: &mut [f32]) {
        let params = self.params.expect("DoRA comes with parameters");
        for u in &self.updates {
            let Some(dora) = u.adapter.dora else { continue };
            for o in 0..u.outputs {
                let at = |t: usize| t * self.width + u.out + o;
                let sum: f32 = (0..self.tokens).map(|t| dout[at(t)] * y[at(t)]).sum();
                grads[dora.magnitude + o] += sum / params[dora.norm + o];
            }
        }
    }

    /// The gradients of `x Wᵀ + scale · drop(x) Aᵀ Bᵀ`.
    fn backward(
        &self,
        x: &[f32],
        xa: &[f32],
        dout: &[f32],
        want: LinearGrad<'_, Rounded>,
        scratch: &mut Workspace,
    ) {
        let LinearGrad { mut dx, mut grads } = want;
        let (tokens, inputs, width, ranks) = (self.tokens, self.inputs, self.width, self.ranks);
        let len = tokens * inputs;
        if let Some(dx) = dx.as_deref_mut() {
            dx[..len].fill(0.0);
        }
        // [tokens, Σ rank] by `x Aᵀ`, and every A below the other.
        let (mut dxa, mut stack) = (vec![0.0; tokens * ranks], Vec::new());
        for u in &self.updates {
            let (adapter, rank) = (u.adapter, u.adapter.rank);
            let d = View::new(&dout[u.out..], [tokens, u.outputs], width);
            let b = View::dense(&u.b, [u.outputs, rank]);
            let to = ViewMut::new(&mut dxa[u.rank..], [tokens, rank], ranks);
            product(to, Into::Set, d, b, adapter.scale);
            round(&mut dxa);
            let own = View::new(&dxa[u.rank..], [tokens, rank], ranks);
            if let Some(grads) = grads.as_deref_mut() {
                let xa = View::new(&xa[u.rank..], [tokens, rank], ranks);
                let db = ViewMut::dense(&mut grads[adapter.b..], [u.outputs, rank]);
                product(db, Into::Add, d.t(), xa, adapter.scale);
                let x = self.kept(x, adapter.module);
                let x = View::dense(&x, [tokens, inputs]);
                let da = ViewMut::dense(&mut grads[adapter.a..], [rank, inputs]);
                product(da, Into::Add, own.t(), x, self.scale());
            }
            if let (Some(dx), Some(factors)) = (dx.as_deref_mut(), self.mask(adapter.module)) {
                let mut raw = vec![0.0; len];
                let to = ViewMut::dense(&mut raw, [tokens, inputs]);
                product(to, Into::Set, own, View::dense(&u.a, [rank, inputs]), 1.0);
                for ((dx, raw), f) in dx.iter_mut().zip(raw).zip(factors) {
                    *dx += raw * f;
                }
            }
            stack.extend_from_slice(&u.a);
        }
        let Some(dx) = dx else { return };
        if self.dropout.is_some() {
            let scale = self.scale();
            dx[..len]
                .iter_mut()
                .for_each(|dx| *dx = nearest(*dx * scale));
        } else if ranks > 0 {
            let (a, dxa) = (
                View::dense(&stack, [ranks, inputs]),
                View::dense(&dxa, [tokens, ranks]),
            );
            product(ViewMut::dense(dx, [tokens, inputs]), Into::Set, dxa, a, 1.0);
            round(&mut dx[..len]);
        }
        for (mut out, weights) in self.runs() {
            for weight in weights {
                linear::stretches(weight, &mut scratch.0, |rows, w| {
                    let d = &dout[out + rows.start..];
                    let d = View::new(d, [tokens, rows.len()], width);
                    product(ViewMut::dense(dx, [tokens, inputs]), Into::Add, d, w, 1.0);
                });
                out += weight.rows;
            }
            round(&mut dx[..len]);
        }
    }
}

/// One head of attention over one row, and where its vectors lie.
struct Head<'a> {
    heads: Heads,
    /// The row's first token, and its length.
    start: usize,
    count: usize,
    /// The query head.
    head: usize,
    qk: &'a [f32],
    qkv: &'a [f32],
}

impl<'a> Head<'a> {
    fn kv(&self) -> usize {
        self.head * self.heads.kv / self.heads.query
    }

    fn q(&self, i: usize) -> &'a [f32] {
        let Heads { dim, .. } = self.heads;
        &self.qk[(self.start + i) * self.heads.qk() + self.head * dim..][..dim]
    }

    fn k(&self, j: usize) -> &'a [f32] {
        let Heads { dim, .. } = self.heads;
        &self.qk[(self.start + j) * self.heads.qk() + self.heads.q() + self.kv() * dim..][..dim]
    }

    fn v(&self, j: usize) -> &'a [f32] {
        let Heads { dim, .. } = self.heads;
        &self.qkv[(self.start + j) * self.heads.qkv() + self.heads.qk() + self.kv() * dim..][..dim]
    }

    /// Query `i`'s vector in a buffer `[tokens, q]`.
    fn of<'b>(&self, buffer: &'b [f32], i: usize) -> &'b [f32] {
        let Heads { dim, .. } = self.heads;
        &buffer[(self.start + i) * self.heads.q() + self.head * dim..][..dim]
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// One query's output and the log of its denominator: a running softmax over
    /// tiles of keys, whose weights are rounded before they meet the values.
    fn attend(&self, i: usize) -> (Vec<f32>, f32) {
        let (mut acc, mut top, mut total) = (vec![0.0; self.heads.dim], f32::NEG_INFINITY, 0.0);
        for first in (0..=i).step_by(TILE) {
            let keys = first..(i + 1).min(first + TILE);
            let scores: Vec<f32> = keys
                .clone()
                .map(|j| dot(self.q(i), self.k(j)) * self.scale())
                .collect();
            let most = scores.iter().copied().fold(top, f32::max);
            let fade = (top - most).exp();
            acc.iter_mut().for_each(|a| *a *= fade);
            total *= fade;
            for (j, s) in keys.zip(scores) {
                let p = (s - most).exp();
                total += p;
                add_scaled(&mut acc, nearest(p), self.v(j));
            }
            top = most;
        }
        let out = acc.iter().map(|a| nearest(a * (1.0 / total))).collect();
        (out, top + total.ln())
    }

    /// Adds this head's part of the gradients: of the queries (`[count, dim]`,
    /// its own), the keys and the values (of its key/value head).
    fn backward(&self, (out, lse, dout): (&[f32], &[f32], &[f32]), [dq, dk, dv]: [&mut [f32]; 3]) {
        let dim = self.heads.dim;
        for i in 0..self.count {
            let d = self.of(dout, i);
            let delta = dot(d, self.of(out, i));
            let denominator = lse[(self.start + i) * self.heads.query + self.head];
            for j in 0..=i {
                let p = (dot(self.q(i), self.k(j)) * self.scale() - denominator).exp();
                let ds = nearest(p * (dot(d, self.v(j)) - delta));
                add_scaled(&mut dv[j * dim..][..dim], nearest(p), d);
                add_scaled(&mut dk[j * dim..][..dim], ds, self.q(i));
                add_scaled(&mut dq[i * dim..][..dim], ds, self.k(j));
            }
        }
    }
}

/// The rows of a batch: first token and length.
fn spans(rows: &Ragged<Rounded>) -> impl Iterator<Item = (usize, usize)> {
    rows.bounds().windows(2).map(|w| (w[0], w[1] - w[0]))
}

/// The same norms, for the operation that rounds nothing.
fn plain<'a>(norms: &QkNorms<'a, Rounded>) -> QkNorms<'a, Cpu> {
    QkNorms {
        q_norm: norms.q_norm,
        k_norm: norms.k_norm,
        rope: norms.rope,
        eps: norms.eps,
    }
}

impl Backend for Rounded {
    type Act = Vec<f32>;
    type F32 = Vec<f32>;
    type Ids = Vec<u32>;
    type Matrix = Matrix;
    type Workspace = Workspace;
    type Reading = Vec<f32>;
    type IdsReading = Vec<u32>;

    const ACT_BYTES: usize = size_of::<f32>();
    const RUNS_AHEAD: bool = false;

    fn describe(&self) -> String {
        format!("{}, rounded to bf16 as on a GPU", Cpu.describe())
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Cpu.free_memory()
    }

    fn alloc_act(&self, len: usize) -> Result<Vec<f32>> {
        Cpu.alloc_act(len)
    }

    fn alloc_f32(&self, len: usize) -> Result<Vec<f32>> {
        Cpu.alloc_f32(len)
    }

    fn alloc_ids(&self, len: usize) -> Result<Vec<u32>> {
        Cpu.alloc_ids(len)
    }

    fn alloc_workspace(&self, bytes: usize) -> Result<Workspace> {
        Cpu.alloc_workspace(bytes)
    }

    fn upload_matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        let HostMatrix { rows, cols, .. } = matrix;
        let quantised = matches!(matrix.data, MatrixData::Nf4(_));
        let values = match matrix.data {
            MatrixData::Bf16(_) => matrix,
            MatrixData::F32(_) | MatrixData::Nf4(_) => {
                let mut wide = zeroed("weights", rows * cols)?;
                linear::widen(&matrix, 0..rows, &mut wide);
                HostMatrix::bf16(rows, cols, wide.into_iter().map(bf16::from_f32).collect())
            }
        };
        Ok(Matrix { values, quantised })
    }

    fn upload_f32(&self, values: &[f32]) -> Result<Vec<f32>> {
        Cpu.upload_f32(values)
    }

    fn upload_ids(&self, values: &[u32]) -> Result<Vec<u32>> {
        Cpu.upload_ids(values)
    }

    fn write_ids(&self, values: &[u32], out: &mut Vec<u32>) -> Result<()> {
        Cpu.write_ids(values, out)
    }

    fn write_f32(&self, values: &[f32], out: &mut Vec<f32>) -> Result<()> {
        Cpu.write_f32(values, out)
    }

    fn zero(&self, out: &mut Vec<f32>, len: usize) {
        Cpu.zero(out, len);
    }

    fn zero_act(&self, out: &mut Vec<f32>, len: usize) {
        Cpu.zero_act(out, len);
    }

    fn read_f32(&self, buffer: &Vec<f32>, range: Range<usize>) -> Vec<f32> {
        Cpu.read_f32(buffer, range)
    }

    fn read_act(&self, buffer: &Vec<f32>, len: usize) -> Result<Vec<f32>> {
        Cpu.read_act(buffer, len)
    }

    fn read_ids(&self, buffer: &Vec<u32>, len: usize) -> Vec<u32> {
        Cpu.read_ids(buffer, len)
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.values.bytes()
    }

    fn shape(&self, matrix: &Matrix) -> [usize; 2] {
        Cpu.shape(&matrix.values)
    }

    fn linear_scratch(&self, weights: &[&Matrix], size: [usize; 2], dora: bool) -> usize {
        let weights: Vec<_> = weights.iter().map(|m| &m.values).collect();
        Cpu.linear_scratch(&weights, size, dora)
    }

    fn dora_scratch(&self, weight: &Matrix, rank: usize) -> usize {
        Cpu.dora_scratch(&weight.values, rank)
    }

    fn attention_scratch(&self, heads: Heads, longest: usize) -> usize {
        Cpu.attention_scratch(heads, longest) // over the cache
    }

    fn head_scratch(&self, head: &Matrix, rows: usize) -> usize {
        Cpu.head_scratch(&head.values, rows)
    }

    fn embed(&self, table: &Matrix, ids: &Vec<u32>, tokens: usize, out: &mut Vec<f32>) {
        Cpu.embed(&table.values, ids, tokens, out);
    }

    fn gather_ids(&self, x: &Vec<u32>, index: &Vec<u32>, count: usize, out: &mut Vec<u32>) {
        Cpu.gather_ids(x, index, count, out);
    }

    fn scatter_ids(&self, x: &Vec<u32>, index: &Vec<u32>, count: usize, out: &mut Vec<u32>) {
        Cpu.scatter_ids(x, index, count, out);
    }

    fn add_noise(&self, noise: &Neftune, rows: &Ragged<Self>, width: usize, x: &mut Vec<f32>) {
        super::rows::add_noise(noise, (rows.bounds(), &rows.rows), width, x);
        round(&mut x[..rows.tokens() * width]);
    }

    fn gather(&self, x: &Vec<f32>, index: &Vec<u32>, size: [usize; 2], out: &mut Vec<f32>) {
        Cpu.gather(x, index, size, out);
    }

    fn scatter(&self, x: &Vec<f32>, index: &Vec<u32>, size: [usize; 3], out: &mut Vec<f32>) {
        Cpu.scatter(x, index, size, out);
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        norm: (&Vec<f32>, f32),
        size: [usize; 2],
        out: &mut Vec<f32>,
        rstd: &mut Vec<f32>,
    ) {
        Cpu.rms_norm(x, norm, size, out, rstd);
        round(&mut out[..size[0] * size[1]]);
    }

    fn rms_norm_backward(
        &self,
        dy: &Vec<f32>,
        saved: (&Vec<f32>, &Vec<f32>, &Vec<f32>),
        size: [usize; 2],
        dx: &mut Vec<f32>,
    ) {
        Cpu.rms_norm_backward(dy, saved, size, dx);
        round(&mut dx[..size[0] * size[1]]);
    }

    fn linear(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Vec<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&Vec<f32>, usize),
        residual: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
        xa: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        let products = Products::new(group, params, dropout, tokens);
        let len = tokens * products.width;
        products.low_rank(x, xa);
        if group.dora() {
            products.forward(x, xa, None, out, scratch);
            products.rescale(out);
            if let Some(residual) = residual {
                add_scaled(&mut out[..len], 1.0, residual);
            }
            round(&mut out[..len]);
        } else {
            products.forward(x, xa, residual, out, scratch);
        }
    }

    fn linear_backward(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Vec<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&Vec<f32>, usize),
        xa: &Vec<f32>,
        dout: &Vec<f32>,
        want: LinearGrad<'_, Self>,
        scratch: &mut Workspace,
    ) {
        let products = Products::new(group, params, dropout, tokens);
        let len = tokens * products.width;
        let LinearGrad { dx, mut grads } = want;
        let mut d = dout[..len].to_vec();
        if group.dora() {
            if let Some(grads) = grads.as_deref_mut() {
                let mut y = vec![0.0; len];
                products.forward(x, xa, None, &mut y, scratch);
                products.magnitudes(&y, dout, grads);
            }
            products.rescale(&mut d);
            round(&mut d);
        }
        products.backward(x, xa, &d, LinearGrad { dx, grads }, scratch);
    }

    fn dora_norms(
        &self,
        weight: &Matrix,
        adapter: &Adapter,
        params: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        let Some(Dora { norm, .. }) = adapter.dora else {
            return;
        };
        let HostMatrix { rows, cols, .. } = weight.values;
        // Of the update that the products make, with rounded factors.
        let mut used = params.clone();
        round(&mut used[adapter.a..][..adapter.rank * cols]);
        round(&mut used[adapter.b..][..adapter.rank * rows]);
        Cpu.dora_norms(&weight.values, adapter, &mut used, scratch);
        params[norm..][..rows].copy_from_slice(&used[norm..][..rows]);
    }

    fn qk_norm_rope(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Vec<u32>,
        tokens: usize,
        qkv: &Vec<f32>,
        qk: &mut Vec<f32>,
        rstd: &mut Vec<f32>,
    ) {
        Cpu.qk_norm_rope(heads, &plain(norms), positions, tokens, qkv, qk, rstd);
        round(&mut qk[..tokens * heads.qk()]);
    }

    fn qk_norm_rope_backward(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Vec<u32>,
        tokens: usize,
        saved: (&Vec<f32>, &Vec<f32>),
        dqkv: &mut Vec<f32>,
    ) {
        Cpu.qk_norm_rope_backward(heads, &plain(norms), positions, tokens, saved, dqkv);
        round(&mut dqkv[..tokens * heads.qkv()]);
    }

    fn attention(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        qk: &Vec<f32>,
        qkv: &Vec<f32>,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
        _: &mut Workspace,
    ) {
        for (start, count) in spans(rows) {
            for head in 0..heads.query {
                let h = Head {
                    heads,
                    start,
                    count,
                    head,
                    qk,
                    qkv,
                };
                let attended: Vec<_> = (0..count).into_par_iter().map(|i| h.attend(i)).collect();
                for (token, (values, denominator)) in (start..).zip(attended) {
                    out[token * heads.q() + head * heads.dim..][..heads.dim]
                        .copy_from_slice(&values);
                    lse[token * heads.query + head] = denominator;
                }
            }
        }
    }

    fn attention_backward(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        (qk, qkv): (&Vec<f32>, &Vec<f32>),
        (out, lse): (&Vec<f32>, &Vec<f32>),
        dout: &Vec<f32>,
        dqkv: &mut Vec<f32>,
        _: &mut Workspace,
    ) {
        let per_kv = heads.query / heads.kv;
        for (start, count) in spans(rows) {
            // `scale · from [count, dim]`, rounded, to the columns from `column` on.
            let mut store = |column: usize, from: &[f32], scale: f32| {
                for (token, from) in (start..).zip(from.chunks_exact(heads.dim)) {
                    let to = &mut dqkv[token * heads.qkv() + column..][..heads.dim];
                    to.iter_mut()
                        .zip(from)
                        .for_each(|(to, f)| *to = nearest(f * scale));
                }
            };
            for kv in 0..heads.kv {
                let mut dk = vec![0.0; count * heads.dim];
                let mut dv = dk.clone();
                for head in kv * per_kv..(kv + 1) * per_kv {
                    let h = Head {
                        heads,
                        start,
                        count,
                        head,
                        qk,
                        qkv,
                    };
                    let mut dq = vec![0.0; count * heads.dim];
                    h.backward((out, lse, dout), [&mut dq, &mut dk, &mut dv]);
                    store(head * heads.dim, &dq, h.scale());
                }
                let scale = 1.0 / (heads.dim as f32).sqrt();
                store(heads.q() + kv * heads.dim, &dk, scale);
                store(heads.qk() + kv * heads.dim, &dv, 1.0);
            }
        }
    }

    fn swiglu(&self, gate_up: &Vec<f32>, size: [usize; 2], out: &mut Vec<f32>) {
        Cpu.swiglu(gate_up, size, out);
        round(&mut out[..size[0] * size[1]]);
    }

    fn swiglu_backward(
        &self,
        gate_up: &Vec<f32>,
        dout: &Vec<f32>,
        size: [usize; 2],
        dgate_up: &mut Vec<f32>,
    ) {
        Cpu.swiglu_backward(gate_up, dout, size, dgate_up);
        round(&mut dgate_up[..2 * size[0] * size[1]]);
    }

    /// The gradient by the logits is rounded as well, for the product that follows.
    fn head_loss(
        &self,
        head: &Matrix,
        (hidden, targets, rows): (&Vec<f32>, &Vec<u32>, usize),
        nll: &mut Vec<f32>,
        dhidden: Option<(&mut Vec<f32>, f32)>,
        scratch: &mut Workspace,
    ) {
        let HostMatrix {
            rows: vocabulary,
            cols: width,
            ..
        } = head.values;
        Cpu.head_loss(&head.values, (hidden, targets, rows), nll, None, scratch);
        let Some((dhidden, scale)) = dhidden else {
            return;
        };
        let mut d = vec![0.0; rows * vocabulary];
        Cpu.logits(&head.values, (hidden, rows), &mut d, scratch);
        d.par_chunks_exact_mut(vocabulary)
            .zip(targets)
            .for_each(|(row, &target)| {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter_mut().for_each(|x| *x = (*x - top).exp());
                let by = scale / row.iter().sum::<f32>();
                row.iter_mut().for_each(|x| *x *= by);
                row[target as usize] -= scale;
                round(row);
            });
        let mut into = Into::Set;
        linear::stretches(&head.values, &mut scratch.0, |range, w| {
            let d = View::new(&d[range.start..], [rows, range.len()], vocabulary);
            product(ViewMut::dense(dhidden, [rows, width]), into, d, w, 1.0);
            into = Into::Add;
        });
        round(&mut dhidden[..rows * width]);
    }

    fn global_norm(&self, grads: &Vec<f32>, len: usize, norm: &mut Vec<f32>) {
        Cpu.global_norm(grads, len, norm);
    }

    fn adamw(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        gradient: (&Vec<f32>, &Vec<f32>),
        params: &mut Vec<f32>,
        moments: (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        Cpu.adamw(settings, stretches, gradient, params, moments);
    }

    fn adamw_8bit(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        gradient: (&Vec<f32>, &Vec<f32>),
        params: &mut Vec<f32>,
        moments: [(&mut Vec<u32>, &mut Vec<f32>); 2],
    ) {
        Cpu.adamw_8bit(settings, stretches, gradient, params, moments);
    }

    fn cache_append(
        &self,
        heads: Heads,
        cache: Cache,
        at: (&Vec<u32>, &Vec<u32>, usize),
        qk: &Vec<f32>,
        qkv: &Vec<f32>,
        store: (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        Cpu.cache_append(heads, cache, at, qk, qkv, store);
    }

    fn cache_attention(
        &self,
        heads: Heads,
        cache: Cache,
        at: (&Vec<u32>, &Vec<u32>, usize),
        qk: &Vec<f32>,
        store: (&Vec<f32>, &Vec<f32>),
        out: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        Cpu.cache_attention(heads, cache, at, qk, store, out, scratch);
        round(&mut out[..at.2 * heads.q()]);
    }

    fn logits(
        &self,
        head: &Matrix,
        input: (&Vec<f32>, usize),
        out: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        Cpu.logits(&head.values, input, out, scratch);
    }

    fn sample(
        &self,
        how: &Sampling,
        input: (&Vec<f32>, [usize; 2]),
        keys: (&Vec<u32>, &Vec<u32>),
        out: &mut Vec<u32>,
        scratch: &mut Workspace,
    ) {
        Cpu.sample(how, input, keys, out, scratch);
    }
}
