//! The output projection: loss, logits, and the choice of a token.

use rayon::prelude::*;

use super::linear::{stretches, widen_scratch};
use super::product::{Into, View, ViewMut, product};
use super::simd::{exp, max, sum, vectorised};
use crate::rng::{Purpose, Stream, unit_f64};
use crate::{HostMatrix, Sampling};

/// Rows whose logits exist at the same time: about 16 MB of them.
fn chunk_rows(vocabulary: usize) -> usize {
    ((4 << 20) / vocabulary).clamp(16, 512)
}

/// Scratch floats for `rows` rows: a chunk of logits and a widened piece of the
/// head; or two words a logit, for sampling.
pub(super) fn scratch(head: &HostMatrix, rows: usize) -> usize {
    let chunk = rows.min(chunk_rows(head.rows)) * head.rows;
    chunk.max(2 * rows * head.rows) + widen_scratch(head)
}

/// `out [rows, vocabulary] = hidden headᵀ`.
pub(super) fn logits(
    head: &HostMatrix,
    hidden: &[f32],
    rows: usize,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let (vocabulary, width) = (head.rows, head.cols);
    let hidden = View::dense(hidden, [rows, width]);
    stretches(head, scratch, |range, w| {
        let out = ViewMut::new(&mut out[range.start..], [rows, range.len()], vocabulary);
        product(out, Into::Set, hidden, w.t(), 1.0);
    });
}

vectorised! {
    /// One row's loss; with a scale, its logits become their gradients.
    fn cross_entropy(scores: &mut [f32], target: u32, scale: Option<f32>, nll: &mut f32) {
        let top = max(scores);
        let hit = scores[target as usize] - top;
        for s in scores.iter_mut() {
            *s = exp(*s - top);
        }
        let total = sum(scores);
        *nll = total.ln() - hit;
        if let Some(scale) = scale {
            // d(scale · nll) / d logits = scale (softmax - onehot)
            for s in scores.iter_mut() {
                *s *= scale / total;
            }
            scores[target as usize] -= scale;
        }
    }
}

pub(super) fn head_loss(
    head: &HostMatrix,
    (hidden, targets): (&[f32], &[u32]),
    nll: &mut [f32],
    mut dhidden: Option<(&mut [f32], f32)>,
    scratch: &mut [f32],
) {
    let (vocabulary, width) = (head.rows, head.cols);
    let step = chunk_rows(vocabulary);
    let scale = dhidden.as_ref().map(|(_, scale)| *scale);
    let (chunk, scratch) = scratch.split_at_mut(targets.len().min(step) * vocabulary);
    for (c, (targets, nll)) in targets.chunks(step).zip(nll.chunks_mut(step)).enumerate() {
        let rows = targets.len();
        let at = c * step * width..(c * step + rows) * width;
        let scores = &mut chunk[..rows * vocabulary];
        logits(head, &hidden[at.clone()], rows, scores, scratch);
        scores
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .zip(nll)
            .for_each(|((scores, &target), nll)| cross_entropy(scores, target, scale, nll));
        if let Some((dhidden, _)) = &mut dhidden {
            let dhidden = &mut dhidden[at];
            let mut into = Into::Set;
            stretches(head, scratch, |range, w| {
                let d = View::new(&scores[range.start..], [rows, range.len()], vocabulary);
                product(ViewMut::dense(dhidden, [rows, width]), into, d, w, 1.0);
                into = Into::Add;
            });
        }
    }
}

/// Chooses one token of `logits`; `order` and `weights` are scratch of the same length.
pub(super) fn choose(
    how: &Sampling,
    logits: &[f32],
    (item, position): (u32, u32),
    order: &mut [u32],
    weights: &mut [f32],
) -> u32 {
    // Most likely first; of equals, the lower id.
    let likelier = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    for (i, o) in order.iter_mut().enumerate() {
        *o = i as u32;
    }
    if how.temperature == 0.0 {
        return order.iter().copied().min_by(likelier).unwrap_or(0);
    }
    let keep = match how.top_k {
        0 => order.len(),
        k => k.min(order.len()),
    };
    if keep < order.len() {
        order.select_nth_unstable_by(keep, likelier);
    }
    let order = &mut order[..keep];
    order.sort_unstable_by(likelier);
    let top = logits[order[0] as usize];
    let mut total = 0.0;
    for (w, &id) in weights.iter_mut().zip(order.iter()) {
        *w = ((logits[id as usize] - top) / how.temperature).exp();
        total += f64::from(*w);
    }
    // The nucleus: as few as hold top_p of the probability, at least one.
    let (mut inside, mut count) = (0.0, 0);
    for &w in &weights[..keep] {
        inside += f64::from(w);
        count += 1;
        if inside >= f64::from(how.top_p) * total {
            break;
        }
    }
    let stream = Stream {
        seed: how.seed,
        purpose: Purpose::Sample,
        layer: 0,
        module: 0,
    };
    let bits = stream.bits(item, position, 0, 0);
    let mut left = unit_f64(bits[0], bits[1]) * inside;
    for (&id, &w) in order.iter().zip(&weights[..count]) {
        left -= f64::from(w);
        if left < 0.0 {
            return id;
        }
    }
    order[count - 1]
}
