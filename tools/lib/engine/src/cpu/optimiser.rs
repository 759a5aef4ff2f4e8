//! The norm of the gradients and the update of the adapters.

use rayon::prelude::*;

use super::PER_TASK;
use super::simd::vectorised;
use crate::{AdamW, Stretch};

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
    let range = stretch.range.clone();
    let correction = |beta: f64| 1.0 - beta.powf(settings.step as f64);
    let rates = Rates {
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
    };
    params[range.clone()]
        .par_chunks_mut(PER_TASK)
        .zip(grads[range.clone()].par_chunks(PER_TASK))
        .zip(m[range.clone()].par_chunks_mut(PER_TASK))
        .zip(v[range].par_chunks_mut(PER_TASK))
        .for_each(|(((p, g), m), v)| update(&rates, g, p, m, v));
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

vectorised! {
    /// Some parameters of [`adamw`].
    fn update(r: &Rates, grads: &[f32], params: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, g), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            let g = g * r.clip;
            *m += r.fresh1 * (g - *m);
            *v = r.beta2 * *v + r.fresh2 * g * g;
            *p = *p * r.keep - r.step * *m / (v.sqrt() / r.root + r.eps);
        }
    }
}
