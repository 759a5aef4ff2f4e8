//! The norm of the gradients and the update of the adapters.

use std::ops::Range;

use rayon::prelude::*;

use super::PER_TASK;
use super::simd::vectorised;
use crate::dynamic::Dynamic;
use crate::{AdamW, MOMENT_BLOCK, Stretch};

/// `Σ x²` over a tree whose shape only depends on the length.
pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    if x.len() <= PER_TASK {
        return x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    }
    let half = (x.len() / 2).next_multiple_of(PER_TASK);
    let (left, right) = x.split_at(half.min(x.len()));
    let (a, b) = rayon::join(|| sum_of_squares(left), || sum_of_squares(right));
    a + b
}

pub(super) fn adamw(
    settings: &AdamW,
    stretch: &Stretch,
    (grads, norm): (&[f32], f32),
    params: &mut [f32],
    (m, v): (&mut [f32], &mut [f32]),
) {
    let (rates, range) = (Rates::new(settings, stretch, norm), stretch.range.clone());
    params[range.clone()]
        .par_chunks_mut(PER_TASK)
        .zip(grads[range.clone()].par_chunks(PER_TASK))
        .zip(m[range.clone()].par_chunks_mut(PER_TASK))
        .zip(v[range].par_chunks_mut(PER_TASK))
        .for_each(|(((p, g), m), v)| update(&rates, g, p, m, v));
}

/// Some blocks of a moment in 8 bits.
pub(super) struct Bytes<'a> {
    codes: &'a mut [u32],
    absmax: &'a mut [f32],
}

/// Words that hold the codes of a block.
const WORDS: usize = MOMENT_BLOCK / 4;

impl<'a> Bytes<'a> {
    pub fn of(codes: &'a mut [u32], absmax: &'a mut [f32], blocks: Range<usize>) -> Self {
        Self {
            codes: &mut codes[blocks.start * WORDS..blocks.end * WORDS],
            absmax: &mut absmax[blocks],
        }
    }

    fn blocks(self) -> impl IndexedParallelIterator<Item = (&'a mut [u32], &'a mut f32)> {
        self.codes.par_chunks_exact_mut(WORDS).zip(self.absmax)
    }
}

/// The first values of a block.
fn decode(map: &Dynamic, codes: &[u32], absmax: f32, out: &mut [f32]) {
    let codes = codes.iter().flat_map(|word| word.to_le_bytes());
    for (out, code) in out.iter_mut().zip(codes) {
        *out = map.values()[usize::from(code)] * absmax;
    }
}

/// The reverse; gives the scale. Codes behind the values become 0.
fn encode(map: &Dynamic, values: &[f32], codes: &mut [u32]) -> f32 {
    let absmax = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    codes.fill(0);
    for (word, values) in codes.iter_mut().zip(values.chunks(4)) {
        for (i, x) in values.iter().enumerate() {
            // In a block of zeros NaN, and so code 0, which the scale makes zero.
            *word |= u32::from(map.code(x / absmax)) << (8 * i);
        }
    }
    absmax
}

pub(super) fn adamw_8bit(
    settings: &AdamW,
    stretch: &Stretch,
    (grads, norm): (&[f32], f32),
    params: &mut [f32],
    [m, v]: [Bytes<'_>; 2],
) {
    let (rates, range) = (Rates::new(settings, stretch, norm), stretch.range.clone());
    let maps = [Dynamic::moment(), Dynamic::unsigned()];
    params[range.clone()]
        .par_chunks_mut(MOMENT_BLOCK)
        .zip(grads[range].par_chunks(MOMENT_BLOCK))
        .zip(m.blocks().zip(v.blocks()))
        .with_min_len(PER_TASK / MOMENT_BLOCK)
        .for_each(|((p, g), (m, v))| {
            let [mut m32, mut v32] = [[0.0; MOMENT_BLOCK]; 2];
            let (m32, v32) = (&mut m32[..g.len()], &mut v32[..g.len()]);
            decode(maps[0], m.0, *m.1, m32);
            decode(maps[1], v.0, *v.1, v32);
            update(&rates, g, p, m32, v32);
            *m.1 = encode(maps[0], m32, m.0);
            *v.1 = encode(maps[1], v32, v.0);
        });
}

/// The update's factors, rounded once.
struct Rates {
    clip: f32,
    keep: f32,
    step: f32,
    root: f32,
    fresh1: f32,
    fresh2: f32,
    beta2: f32,
    eps: f32,
}

impl Rates {
    fn new(settings: &AdamW, stretch: &Stretch, norm: f32) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(settings.step as f64);
        Self {
            clip: settings
                .max_norm
                .map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0)),
            keep: (1.0 - stretch.lr * stretch.decay) as f32,
            step: (stretch.lr / correction(settings.beta1)) as f32,
            root: correction(settings.beta2).sqrt() as f32,
            fresh1: (1.0 - settings.beta1) as f32,
            fresh2: (1.0 - settings.beta2) as f32,
            beta2: settings.beta2 as f32,
            eps: settings.eps as f32,
        }
    }
}

vectorised! {
    /// Some parameters' update.
    fn update(r: &Rates, grads: &[f32], params: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, g), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            let g = g * r.clip;
            *m += r.fresh1 * (g - *m);
            *v = r.beta2 * *v + r.fresh2 * g * g;
            *p = *p * r.keep - r.step * *m / (v.sqrt() / r.root + r.eps);
        }
    }
}
