//! The tests that assume least: flipping signs, and drawing rows again.
//!
//! Every block of resamples has its own stream of ChaCha8, keyed by the seed and
//! the block's number: the result is the same for any number of threads, and all
//! metrics of a run meet the same flips and draws.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::distribution::{Alternative, Interval, normal_cdf, normal_quantile};
use crate::paired::{Finding, Reason};
use crate::sample::{Sample, Unit};

/// Resamples that share a stream.
const BLOCK: usize = 128;

/// Streams of one kind are numbered from here.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Streams {
    Flips = 1 << 32,
    Draws = 2 << 32,
}

/// `resamples` values, computed in parallel and returned in order.
fn resampled(
    seed: u64,
    streams: Streams,
    resamples: usize,
    value: impl Fn(&mut ChaCha8Rng) -> f64 + Sync,
) -> Vec<f64> {
    (0..resamples.div_ceil(BLOCK))
        .into_par_iter()
        .flat_map_iter(|block| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(streams as u64 + block as u64);
            let left = resamples - block * BLOCK;
            (0..left.min(BLOCK))
                .map(|_| value(&mut random))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The paired permutation test of the mean difference: under "no difference" each
/// unit's sign may as well be the other. All 2^units sign patterns where they are
/// no more than `resamples`, else that many random ones, p = (c + 1) / (resamples + 1).
pub fn permutation(
    sample: &Sample,
    alternative: Alternative,
    resamples: usize,
    seed: u64,
) -> Finding {
    let sums: Vec<f64> = sample.units.iter().map(|u| u.sum).collect();
    let seen: f64 = sums.iter().sum();
    // Sums of the same numbers in another order differ by rounding; equal is equal.
    let slack = 1e-12 * sums.iter().map(|s| s.abs()).sum::<f64>();
    let extreme = |flipped: f64| match alternative {
        Alternative::TwoSided => flipped.abs() >= seen.abs() - slack,
        Alternative::Greater => flipped >= seen - slack,
        Alternative::Less => flipped <= seen + slack,
    };
    let flip = |bits: u64, chunk: &[f64]| -> f64 {
        chunk
            .iter()
            .enumerate()
            .map(|(i, s)| if bits >> i & 1 == 1 { -s } else { *s })
            .sum()
    };
    let patterns = u32::try_from(sums.len())
        .ok()
        .and_then(|n| 1_usize.checked_shl(n));
    let (method, p) = match patterns {
        Some(patterns) if patterns <= resamples => {
            let count = (0..patterns as u64)
                .filter(|&bits| extreme(flip(bits, &sums)))
                .count();
            ("exact", count as f64 / patterns as f64)
        }
        _ => {
            let flipped = resampled(seed, Streams::Flips, resamples, |random| {
                sums.chunks(64)
                    .map(|chunk| flip(random.next_u64(), chunk))
                    .sum()
            });
            let count = flipped.into_iter().filter(|&f| extreme(f)).count();
            ("monte-carlo", (count + 1) as f64 / (resamples + 1) as f64)
        }
    };
    Finding {
        statistic: sample.unscaled(sample.mean_diff()),
        p: Some(p),
        method,
        ..Finding::default()
    }
}

/// The bootstrap interval of the mean difference: bias-corrected and accelerated
/// (Efron, 1987), or by percentiles where that is undefined. It has no p-value.
pub fn bootstrap(
    sample: &Sample,
    alternative: Alternative,
    alpha: f64,
    resamples: usize,
    seed: u64,
) -> Result<Finding, Reason> {
    let units = &sample.units;
    if units.len() < 2 {
        return Err("fewer than 2 clusters");
    }
    let mean_of = |sum: f64, rows: f64| sum / rows;
    let mut means = resampled(seed, Streams::Draws, resamples, |random| {
        let (mut sum, mut rows) = (0.0, 0.0);
        for _ in 0..units.len() {
            // The high half of a 128-bit product: uniform to 2⁻⁶⁴ of its size.
            let at = (u128::from(random.next_u64()) * units.len() as u128) >> 64;
            let Unit { sum: s, rows: r } = units[at as usize];
            (sum, rows) = (sum + s, rows + r);
        }
        mean_of(sum, rows)
    });
    means.sort_by(f64::total_cmp);
    let mean = sample.mean_diff();
    let (below, above) = alternative.tails(alpha);
    let shift = accelerated(&means, mean, units);
    let method = if shift.is_some() { "bca" } else { "percentile" };
    let at = |p: f64| shift.as_ref().map_or(p, |shift| shift(p));
    let end = |tail: f64, p: f64| {
        let end = (tail > 0.0).then(|| quantile(&means, at(p)));
        end.and_then(|end| sample.unscaled(end))
    };
    Ok(Finding {
        statistic: sample.unscaled(mean),
        interval: Interval {
            low: end(below, below),
            high: end(above, 1.0 - above),
        },
        interval_of: Some("mean_diff"),
        method,
        ..Finding::default()
    })
}

/// Where among the sorted resamples BCa looks for a quantile; `None` where the seen
/// mean lies outside all of them, or leaving any one unit out changes nothing.
fn accelerated(means: &[f64], mean: f64, units: &[Unit]) -> Option<impl Fn(f64) -> f64 + use<>> {
    let below = means.partition_point(|&m| m < mean);
    let not_above = means.partition_point(|&m| m <= mean);
    let bias = normal_quantile_inside((below + not_above) as f64 / (2 * means.len()) as f64)?;
    let (sum, rows) = units
        .iter()
        .fold((0.0, 0.0), |(s, r), u| (s + u.sum, r + u.rows));
    let without: Vec<f64> = units
        .iter()
        .map(|u| (sum - u.sum) / (rows - u.rows))
        .collect();
    let centre = crate::sample::mean(&without);
    let moment = |power| {
        without
            .iter()
            .map(|m| (centre - m).powi(power))
            .sum::<f64>()
    };
    let acceleration = moment(3) / (6.0 * moment(2).powf(1.5));
    acceleration.is_finite().then_some(move |p: f64| {
        let z = bias + normal_quantile(p);
        normal_cdf(bias + z / (1.0 - acceleration * z))
    })
}

fn normal_quantile_inside(p: f64) -> Option<f64> {
    (p > 0.0 && p < 1.0).then(|| normal_quantile(p))
}

/// The quantile of sorted values by linear interpolation, numpy's default.
fn quantile(sorted: &[f64], p: f64) -> f64 {
    let at = p * (sorted.len() - 1) as f64;
    let low = at.floor();
    let (from, to) = (sorted[low as usize], sorted[at.ceil() as usize]);
    from + (to - from) * (at - low)
}
