//! The processor as a backend: every activation a 32-bit float, every operation
//! as its definition says, in a fixed order.

mod attention;
mod free;
mod linear;
mod loss;
mod microkernel;
mod optimiser;
mod product;
mod rounded;
mod rows;
pub(crate) mod simd;

use std::ops::Range;

use rayon::prelude::*;

pub use rounded::Rounded;

use crate::{
    AdamW, Adapter, Backend, Cache, Dropout, Error, Group, Heads, HostMatrix, LinearGrad, Neftune,
    QkNorms, Ragged, Reading, Result, Sampling, Stretch,
};

/// Values that make a task worth handing to a thread.
const PER_TASK: usize = 16_384;

/// The processor, on rayon's current thread pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Cpu {
    /// Does long work on a thread of the pool. Each operation that another thread starts
    /// is handed over and waited for, which is 3% of training a small model.
    ///
    /// What `work` waits for must not need the pool itself: it may have one thread only.
    pub fn inside<R: Send>(self, work: impl FnOnce() -> R + Send) -> R {
        rayon::scope(|_| work())
    }
}

/// Scratch floats.
#[derive(Debug)]
pub struct Workspace(Vec<f32>);

impl<T> Reading<T> for Vec<T> {
    fn wait(self) -> Result<Vec<T>> {
        Ok(self)
    }
}

/// A zeroed vector, or what was asked for in vain.
fn zeroed<T: Clone + Default>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
        what,
        bytes: len.saturating_mul(size_of::<T>()),
    })?;
    v.resize(len, T::default());
    Ok(v)
}

impl Backend for Cpu {
    type Act = Vec<f32>;
    type F32 = Vec<f32>;
    type Ids = Vec<u32>;
    type Matrix = HostMatrix;
    type Workspace = Workspace;
    type Reading = Vec<f32>;
    type IdsReading = Vec<u32>;

    const ACT_BYTES: usize = size_of::<f32>();
    const RUNS_AHEAD: bool = false;

    fn describe(&self) -> String {
        match rayon::current_num_threads() {
            1 => "CPU, 1 thread, f32".into(),
            threads => format!("CPU, {threads} threads, f32"),
        }
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(free::bytes())
    }

    fn alloc_act(&self, len: usize) -> Result<Vec<f32>> {
        zeroed("activations", len)
    }

    fn alloc_f32(&self, len: usize) -> Result<Vec<f32>> {
        zeroed("parameters and statistics", len)
    }

    fn alloc_ids(&self, len: usize) -> Result<Vec<u32>> {
        zeroed("indices", len)
    }

    fn alloc_workspace(&self, bytes: usize) -> Result<Workspace> {
        zeroed("scratch", bytes.div_ceil(size_of::<f32>())).map(Workspace)
    }

    fn upload_matrix(&self, matrix: HostMatrix) -> Result<HostMatrix> {
        Ok(matrix)
    }

    fn upload_f32(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn upload_ids(&self, values: &[u32]) -> Result<Vec<u32>> {
        Ok(values.to_vec())
    }

    fn write_ids(&self, values: &[u32], out: &mut Vec<u32>) -> Result<()> {
        out[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn write_f32(&self, values: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn zero(&self, out: &mut Vec<f32>, len: usize) {
        out[..len].fill(0.0);
    }

    fn zero_act(&self, out: &mut Vec<f32>, len: usize) {
        out[..len].fill(0.0);
    }

    fn read_f32(&self, buffer: &Vec<f32>, range: Range<usize>) -> Vec<f32> {
        buffer[range].to_vec()
    }

    fn read_act(&self, buffer: &Vec<f32>, len: usize) -> Result<Vec<f32>> {
        Ok(buffer[..len].to_vec())
    }

    fn read_ids(&self, buffer: &Vec<u32>, len: usize) -> Vec<u32> {
        buffer[..len].to_vec()
    }

    fn matrix_bytes(&self, matrix: &HostMatrix) -> usize {
        matrix.bytes()
    }

    fn shape(&self, matrix: &HostMatrix) -> [usize; 2] {
        [matrix.rows, matrix.cols]
    }

    fn linear_scratch(&self, weights: &[&HostMatrix], size: [usize; 2], dora: bool) -> usize {
        Self::group_scratch(weights, size, dora) * size_of::<f32>()
    }

    fn dora_scratch(&self, weight: &HostMatrix, _: usize) -> usize {
        Self::row_lengths_scratch(weight) * size_of::<f32>()
    }

    fn attention_scratch(&self, _: Heads, longest: usize) -> usize {
        attention::scratch(longest) * size_of::<f32>()
    }

    fn head_scratch(&self, head: &HostMatrix, rows: usize) -> usize {
        loss::scratch(head, rows) * size_of::<f32>()
    }

    fn embed(&self, table: &HostMatrix, ids: &Vec<u32>, tokens: usize, out: &mut Vec<f32>) {
        out.par_chunks_exact_mut(table.cols)
            .zip(&ids[..tokens])
            .for_each(|(out, &id)| linear::widen(table, id as usize..id as usize + 1, out));
    }

    fn add_noise(&self, noise: &Neftune, rows: &Ragged<Self>, width: usize, x: &mut Vec<f32>) {
        rows::add_noise(noise, (rows.bounds(), &rows.rows), width, x);
    }

    fn gather(
        &self,
        x: &Vec<f32>,
        index: &Vec<u32>,
        [count, width]: [usize; 2],
        out: &mut Vec<f32>,
    ) {
        for (out, &i) in out.chunks_exact_mut(width).zip(&index[..count]) {
            out.copy_from_slice(&x[i as usize * width..][..width]);
        }
    }

    fn gather_ids(&self, x: &Vec<u32>, index: &Vec<u32>, count: usize, out: &mut Vec<u32>) {
        for (out, &i) in out.iter_mut().zip(&index[..count]) {
            *out = x[i as usize];
        }
    }

    fn scatter_ids(&self, x: &Vec<u32>, index: &Vec<u32>, count: usize, out: &mut Vec<u32>) {
        for (&x, &i) in x.iter().zip(&index[..count]) {
            out[i as usize] = x;
        }
    }

    fn scatter(
        &self,
        x: &Vec<f32>,
        index: &Vec<u32>,
        [count, tokens, width]: [usize; 3],
        out: &mut Vec<f32>,
    ) {
        out[..tokens * width].fill(0.0);
        for (x, &i) in x.chunks_exact(width).zip(&index[..count]) {
            out[i as usize * width..][..width].copy_from_slice(x);
        }
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        (weight, eps): (&Vec<f32>, f32),
        [tokens, width]: [usize; 2],
        out: &mut Vec<f32>,
        rstd: &mut Vec<f32>,
    ) {
        let len = tokens * width;
        let (out, rstd) = (&mut out[..len], &mut rstd[..tokens]);
        rows::rms_norm(&x[..len], (&weight[..width], eps), out, rstd);
    }

    fn rms_norm_backward(
        &self,
        dy: &Vec<f32>,
        (x, weight, rstd): (&Vec<f32>, &Vec<f32>, &Vec<f32>),
        [tokens, width]: [usize; 2],
        dx: &mut Vec<f32>,
    ) {
        let len = tokens * width;
        let saved = (&x[..len], &weight[..width], &rstd[..tokens]);
        rows::rms_norm_backward(&dy[..len], saved, &mut dx[..len]);
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
        let residual = residual.map(Vec::as_slice);
        self.group_forward(
            group,
            params,
            dropout,
            (x, tokens),
            residual,
            out,
            xa,
            &mut scratch.0,
        );
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
        self.group_backward(
            group,
            params,
            dropout,
            (x, tokens),
            xa,
            dout,
            want,
            &mut scratch.0,
        );
    }

    fn dora_norms(
        &self,
        weight: &HostMatrix,
        adapter: &Adapter,
        params: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        Self::row_lengths(weight, adapter, params, &mut scratch.0);
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
        rotation(heads, norms, positions).forward(
            &qkv[..tokens * heads.qkv()],
            &mut qk[..tokens * heads.qk()],
            &mut rstd[..tokens * (heads.query + heads.kv)],
        );
    }

    fn qk_norm_rope_backward(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Vec<u32>,
        tokens: usize,
        (qkv, rstd): (&Vec<f32>, &Vec<f32>),
        dqkv: &mut Vec<f32>,
    ) {
        rotation(heads, norms, positions).backward(
            &qkv[..tokens * heads.qkv()],
            &rstd[..tokens * (heads.query + heads.kv)],
            &mut dqkv[..tokens * heads.qkv()],
        );
    }

    fn attention(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        qk: &Vec<f32>,
        qkv: &Vec<f32>,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        attention::forward(heads, rows, (qk, qkv), out, lse, &mut scratch.0);
    }

    fn attention_backward(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        (qk, qkv): (&Vec<f32>, &Vec<f32>),
        (out, lse): (&Vec<f32>, &Vec<f32>),
        dout: &Vec<f32>,
        dqkv: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        attention::backward(
            heads,
            rows,
            (qk, qkv),
            (out, lse, dout),
            dqkv,
            &mut scratch.0,
        );
    }

    fn swiglu(&self, gate_up: &Vec<f32>, [tokens, width]: [usize; 2], out: &mut Vec<f32>) {
        let len = tokens * width;
        rows::swiglu(&gate_up[..2 * len], width, &mut out[..len]);
    }

    fn swiglu_backward(
        &self,
        gate_up: &Vec<f32>,
        dout: &Vec<f32>,
        [tokens, width]: [usize; 2],
        dgate_up: &mut Vec<f32>,
    ) {
        let len = tokens * width;
        let out = &mut dgate_up[..2 * len];
        rows::swiglu_backward(&gate_up[..2 * len], &dout[..len], width, out);
    }

    fn head_loss(
        &self,
        head: &HostMatrix,
        (hidden, targets, rows): (&Vec<f32>, &Vec<u32>, usize),
        nll: &mut Vec<f32>,
        dhidden: Option<(&mut Vec<f32>, f32)>,
        scratch: &mut Workspace,
    ) {
        let dhidden = dhidden.map(|(d, scale)| (d.as_mut_slice(), scale));
        let inputs = (hidden.as_slice(), &targets[..rows]);
        loss::head_loss(head, inputs, &mut nll[..rows], dhidden, &mut scratch.0);
    }

    fn global_norm(&self, grads: &Vec<f32>, len: usize, norm: &mut Vec<f32>) {
        norm[0] = optimiser::sum_of_squares(&grads[..len]).sqrt() as f32;
    }

    fn adamw(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        (grads, norm): (&Vec<f32>, &Vec<f32>),
        params: &mut Vec<f32>,
        (m, v): (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        for stretch in stretches {
            optimiser::adamw(settings, stretch, (grads, norm[0]), params, (m, v));
        }
    }

    fn adamw_8bit(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        (grads, norm): (&Vec<f32>, &Vec<f32>),
        params: &mut Vec<f32>,
        [(m, m_absmax), (v, v_absmax)]: [(&mut Vec<u32>, &mut Vec<f32>); 2],
    ) {
        let mut first = 0;
        for stretch in stretches {
            let blocks = first..first + stretch.blocks();
            first = blocks.end;
            let moments = [(&mut *m, &mut *m_absmax), (&mut *v, &mut *v_absmax)]
                .map(|(codes, absmax)| optimiser::Bytes::of(codes, absmax, blocks.clone()));
            optimiser::adamw_8bit(settings, stretch, (grads, norm[0]), params, moments);
        }
    }

    fn cache_append(
        &self,
        heads: Heads,
        cache: Cache,
        (slots, positions, tokens): (&Vec<u32>, &Vec<u32>, usize),
        qk: &Vec<f32>,
        qkv: &Vec<f32>,
        (keys, values): (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        let width = heads.k();
        for t in 0..tokens {
            let (slot, position) = (slots[t] as usize, positions[t] as usize);
            assert!(
                slot < cache.slots && position < cache.capacity,
                "outside the cache"
            );
            let at = (slot * cache.capacity + position) * width;
            let (k, v) = (t * heads.qk() + heads.q(), t * heads.qkv() + heads.qk());
            keys[at..at + width].copy_from_slice(&qk[k..k + width]);
            values[at..at + width].copy_from_slice(&qkv[v..v + width]);
        }
    }

    fn cache_attention(
        &self,
        heads: Heads,
        cache: Cache,
        (slots, positions, tokens): (&Vec<u32>, &Vec<u32>, usize),
        qk: &Vec<f32>,
        (keys, values): (&Vec<f32>, &Vec<f32>),
        out: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        let whose = (&slots[..tokens], &positions[..tokens]);
        attention::cached(heads, cache, whose, qk, (keys, values), out, &mut scratch.0);
    }

    fn logits(
        &self,
        head: &HostMatrix,
        (hidden, rows): (&Vec<f32>, usize),
        out: &mut Vec<f32>,
        scratch: &mut Workspace,
    ) {
        loss::logits(head, hidden, rows, out, &mut scratch.0);
    }

    fn sample(
        &self,
        how: &Sampling,
        (logits, [rows, width]): (&Vec<f32>, [usize; 2]),
        (items, positions): (&Vec<u32>, &Vec<u32>),
        out: &mut Vec<u32>,
        scratch: &mut Workspace,
    ) {
        let (order, weights) = scratch.0.split_at_mut(rows * width);
        // SAFETY: every bit pattern is a u32 and a float, and their sizes and
        // alignments agree.
        let (_, order, _) = unsafe { order.align_to_mut::<u32>() };
        out[..rows]
            .par_iter_mut()
            .zip(logits.par_chunks_exact(width))
            .zip(order.par_chunks_exact_mut(width))
            .zip(weights.par_chunks_exact_mut(width))
            .zip(items.par_iter().zip(positions))
            .for_each(|((((out, logits), order), weights), (&item, &position))| {
                *out = loss::choose(how, logits, (item, position), order, weights);
            });
    }
}

/// The borrowed view that both directions of the rotation work with.
fn rotation<'a>(
    heads: Heads,
    norms: &QkNorms<'a, Cpu>,
    positions: &'a [u32],
) -> rows::Rotation<'a> {
    rows::Rotation {
        heads,
        norms: [&norms.q_norm[..heads.dim], &norms.k_norm[..heads.dim]],
        rope: norms.rope,
        positions,
        eps: norms.eps,
    }
}
