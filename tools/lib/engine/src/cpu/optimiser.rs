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
    let AdamW {
        beta1, beta2, eps, ..
    } = *settings;
    let range = stretch.range.clone();
    let clip = settings
        .max_norm
        .map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
    let correction = |beta: f64| 1.0 - beta.powf(settings.step as f64);
    let keep = (1.0 - stretch.lr * stretch.decay) as f32;
    let rate = (stretch.lr / correction(beta1)) as f32;
    let root = correction(beta2).sqrt() as f32;
    let (fresh1, fresh2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
    let (beta2, eps) = (beta2 as f32, eps as f32);
    params[range.clone()]
        .par_chunks_mut(PER_TASK)
        .zip(grads[range.clone()].par_chunks(PER_TASK))
        .zip(m[range.clone()].par_chunks_mut(PER_TASK))
        .zip(v[range].par_chunks_mut(PER_TASK))
        .for_each(|(((p, g), m), v)| {
            vectorised(|| {
                for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                    let g = g * clip;
                    *m += fresh1 * (g - *m);
                    *v = beta2 * *v + fresh2 * g * g;
                    *p = *p * keep - rate * *m / (v.sqrt() / root + eps);
                }
            });
        });
}
