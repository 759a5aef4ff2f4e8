//! The tests that assume least: flipping signs, and drawing rows again.
//!
//! A flip of signs takes a subset of the units for the other side's. The interval that goes
//! with the permutation test holds every difference θ that the test, of d − θ, does not
//! reject, so that p and interval never contradict each other; and it needs no search: a
//! flipped sum of d − θ is as far out as the unflipped one just where θ lies between the mean
//! of all and the mean of the subset, or that of the units outside it. The ends are quantiles
//! of subset means (Hartigan, 1969, "Using subsample values as typical values"). Where
//! differences are symmetric about their mean it covers at least 1 − α, however few units
//! there are and however unequal; with too few of them it has no ends.
//!
//! Every block of resamples has its own stream of ChaCha8, keyed by the seed and
//! the block's number: the result is the same for any number of threads, and all
//! metrics of a run meet the same flips and draws.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::distribution::{Alternative, Interval, normal_cdf, normal_quantile};
use crate::paired::{DO_NOT_VARY, Finding, ONE_CLUSTER, Reason};
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
fn resampled<T: Send>(
    seed: u64,
    streams: Streams,
    resamples: usize,
    value: impl Fn(&mut ChaCha8Rng) -> T + Sync,
) -> Vec<T> {
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
    alpha: f64,
    resamples: usize,
    seed: u64,
) -> Finding {
    let units = &sample.units;
    let all = total(units, |_| true);
    // Sums of the same numbers in another order differ by rounding; equal is equal.
    let slack = 1e-12 * units.iter().map(|u| u.sum.abs()).sum::<f64>();
    let extreme = |flipped: &Unit| {
        let sum = all.sum - 2.0 * flipped.sum;
        match alternative {
            Alternative::TwoSided => sum.abs() >= all.sum.abs() - slack,
            Alternative::Greater => sum >= all.sum - slack,
            Alternative::Less => sum <= all.sum + slack,
        }
    };
    let patterns = u32::try_from(units.len())
        .ok()
        .and_then(|n| 1_usize.checked_shl(n));
    let (method, flipped) = match patterns {
        Some(patterns) if patterns <= resamples => {
            let of = |bits: usize| total(units, |i| bits >> i & 1 == 1);
            ("exact", (0..patterns).map(of).collect())
        }
        _ => {
            let mut flipped = resampled(seed, Streams::Flips, resamples, |random| {
                let mut sum = Unit::default();
                for chunk in units.chunks(64) {
                    let bits = random.next_u64();
                    sum += total(chunk, |i| bits >> i & 1 == 1);
                }
                sum
            });
            // What was seen is one of the patterns too.
            flipped.push(Unit::default());
            ("monte-carlo", flipped)
        }
    };
    let count = flipped.iter().filter(|f| extreme(f)).count();
    let mut finding = Finding {
        statistic: sample.unscaled(sample.mean_diff()),
        p: Some(count as f64 / flipped.len() as f64),
        method,
        ..Finding::default()
    };
    if sample.vary() {
        let [low, high] = not_rejected(&flipped, all, alternative, alpha);
        finding.interval = Interval {
            low: low.and_then(|end| sample.unscaled(end)),
            high: high.and_then(|end| sample.unscaled(end)),
        };
        finding.interval_of = Some("mean_diff");
        if low.is_none() && high.is_none() {
            finding.no_interval = Some("too few rows or clusters: no p-value can be below alpha");
        }
    } else {
        finding.no_interval = Some(match units.len() {
            1 => ONE_CLUSTER,
            _ => DO_NOT_VARY,
        });
    }
    finding
}

/// The sum of the chosen units.
fn total(units: &[Unit], is_chosen: impl Fn(usize) -> bool) -> Unit {
    let mut sum = Unit::default();
    for (i, unit) in units.iter().enumerate() {
        if is_chosen(i) {
            sum += *unit;
        }
    }
    sum
}

/// The least and the greatest mean difference that the test does not reject at `alpha`, of
/// the subsets that were flipped, out of all units; none where it rejects none on that side.
fn not_rejected(
    flipped: &[Unit],
    all: Unit,
    alternative: Alternative,
    alpha: f64,
) -> [Option<f64>; 2] {
    // With so many patterns as extreme, p is still below alpha.
    let rejecting = ((alpha * flipped.len() as f64).ceil() as usize).saturating_sub(1);
    // With `sign` −1 all is looked at from below.
    let end = |sign: f64| -> Option<f64> {
        let mut reached: Vec<f64> = flipped
            .iter()
            .map(|flipped| {
                let mean = |unit: Unit| match unit.rows > 0.0 {
                    true => sign * unit.sum / unit.rows,
                    // No sign, or each: as extreme as what was seen, whatever the difference.
                    false => f64::INFINITY,
                };
                let (chosen, others) = (mean(*flipped), mean(all - *flipped));
                match alternative {
                    Alternative::TwoSided => chosen.max(others),
                    Alternative::Greater | Alternative::Less => chosen,
                }
            })
            .collect();
        let at = rejecting.min(reached.len() - 1);
        let (_, end, _) = reached.select_nth_unstable_by(at, |x, y| y.total_cmp(x));
        end.is_finite().then_some(sign * *end)
    };
    let (below, above) = alternative.tails(alpha);
    [
        (below > 0.0).then(|| end(-1.0)).flatten(),
        (above > 0.0).then(|| end(1.0)).flatten(),
    ]
}

/// Fewer units than this the bootstrap leaves alone: of equal ones its 95% interval covers 90%
/// with ten and 83% with five, by simulation with normal differences.
const FEWEST_DRAWN: usize = 10;

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
    if units.len() < FEWEST_DRAWN {
        return Err("fewer than 10 rows or clusters: the interval would be too short");
    }
    if !sample.vary() {
        return Err(DO_NOT_VARY);
    }
    let mut means = resampled(seed, Streams::Draws, resamples, |random| {
        let mut drawn = Unit::default();
        for _ in 0..units.len() {
            // The high half of a 128-bit product: uniform to 2⁻⁶⁴ of its size.
            let at = (u128::from(random.next_u64()) * units.len() as u128) >> 64;
            drawn += units[at as usize];
        }
        drawn.sum / drawn.rows
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
    let all = total(units, |_| true);
    let without: Vec<f64> = units
        .iter()
        .map(|&unit| all - unit)
        .map(|others| others.sum / others.rows)
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
