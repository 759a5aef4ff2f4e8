//! The tests. Each takes a sample whose figures differ somewhere, and either has a
//! result or says why there is none.

use crate::distribution::{Alternative, Interval, Student, coin_at_most, normal_cdf};
use crate::sample::{Sample, doubled_ranks, variance};

/// What a test found.
#[derive(Clone, Debug, Default)]
pub struct Finding {
    pub statistic: Option<f64>,
    pub p: Option<f64>,
    pub interval: Interval,
    /// The quantity that the interval is one of, where the test has one.
    pub interval_of: Option<&'static str>,
    /// Why there is no interval, of a test that has one.
    pub no_interval: Option<Reason>,
    /// Which of its forms the test took.
    pub method: &'static str,
}

/// Why a test says nothing.
pub type Reason = &'static str;

/// What is said of differences whose spread is nothing but rounding.
pub const DO_NOT_VARY: Reason = "the differences do not vary";

/// What is said where all rows are one cluster.
pub const ONE_CLUSTER: Reason = "fewer than 2 clusters";

/// What the rank tests say with `--cluster`.
const NEEDS_INDEPENDENCE: Reason = "assumes independent rows, which --cluster denies";

/// Student's t of the differences. With clusters the standard error is the
/// cluster-robust one: G/(G−1) · Σ over clusters of (Σ of their rows' deviations)²
/// / n², on G − 1 degrees of freedom; without, each row is its own cluster and
/// this is the textbook formula.
pub fn paired_t(sample: &Sample, alternative: Alternative, alpha: f64) -> Result<Finding, Reason> {
    let (mean, units) = (sample.mean_diff(), sample.units.len() as f64);
    let student = Student::new(units - 1.0).ok_or(ONE_CLUSTER)?;
    if !sample.vary() {
        return Err(DO_NOT_VARY);
    }
    let error = (units / (units - 1.0) * sample.squares()).sqrt() / sample.n();
    let t = mean / error;
    let (at_most, at_least) = student.tails(t);
    let (below, above) = alternative.tails(alpha);
    let reach = |tail: f64| (tail > 0.0).then(|| student.upper_quantile(tail) * error);
    Ok(Finding {
        statistic: Some(t),
        p: Some(alternative.p(at_most, at_least)),
        interval: Interval {
            low: reach(below).and_then(|r| sample.unscaled(mean - r)),
            high: reach(above).and_then(|r| sample.unscaled(mean + r)),
        },
        interval_of: Some("mean_diff"),
        no_interval: None,
        method: if sample.clustered {
            "cluster-robust"
        } else {
            "student"
        },
    })
}

/// Wilcoxon's signed-rank test; zeros are left out, the method is chosen as scipy's
/// `method="auto"` does. The statistic is the smaller rank sum, or for a one-sided
/// alternative that of the rows where a is greater.
pub fn wilcoxon(sample: &Sample, alternative: Alternative) -> Result<Finding, Reason> {
    if sample.clustered {
        return Err(NEEDS_INDEPENDENCE);
    }
    let unequal: Vec<f64> = sample.d.iter().copied().filter(|&d| d != 0.0).collect();
    let sizes: Vec<f64> = unequal.iter().map(|d| d.abs()).collect();
    let (ranks, ties) = doubled_ranks(&sizes);
    let positive: u64 = ranks
        .iter()
        .zip(&unequal)
        .filter(|(_, d)| **d > 0.0)
        .map(|(r, _)| r)
        .sum();
    let all: u64 = ranks.iter().sum();

    let rows = sample.d.len();
    let untied = ties == 0.0 && unequal.len() == rows;
    let (method, p) = if rows <= 13 || (rows <= 50 && untied) {
        let (at_most, at_least) = signed_rank_tails(&ranks, positive);
        ("exact", alternative.p(at_most, at_least))
    } else {
        let n = unequal.len() as f64;
        let mean = n * (n + 1.0) / 4.0;
        let sd = ((n * (n + 1.0) * (2.0 * n + 1.0) - ties / 2.0) / 24.0).sqrt();
        let z = (positive as f64 / 2.0 - mean) / sd;
        ("normal", alternative.p(normal_cdf(z), normal_cdf(-z)))
    };
    let statistic = match alternative {
        Alternative::TwoSided => positive.min(all - positive),
        Alternative::Greater | Alternative::Less => positive,
    };
    Ok(Finding {
        statistic: Some(statistic as f64 / 2.0),
        p: Some(p),
        method,
        ..Finding::default()
    })
}

/// P(S ≤ s) and P(S ≥ s), where S sums each rank with probability ½: the number of
/// subsets with every sum is counted, at most 2⁵⁰ of them.
fn signed_rank_tails(ranks: &[u64], s: u64) -> (f64, f64) {
    let all = ranks.iter().sum::<u64>() as usize;
    let mut subsets = vec![0_u64; all + 1];
    subsets[0] = 1;
    for &rank in ranks {
        for sum in (rank as usize..=all).rev() {
            subsets[sum] += subsets[sum - rank as usize];
        }
    }
    let of = |counts: &[u64]| counts.iter().sum::<u64>() as f64 / (1_u64 << ranks.len()) as f64;
    (of(&subsets[..=s as usize]), of(&subsets[s as usize..]))
}

/// The exact sign test: rows in which a is greater, among those that differ.
pub fn sign(sample: &Sample, alternative: Alternative, alpha: f64) -> Result<Finding, Reason> {
    if sample.clustered {
        return Err(NEEDS_INDEPENDENCE);
    }
    let (greater, less) = sample.signs();
    Ok(Finding {
        statistic: Some(greater as f64),
        ..coin(greater, less, alternative, alpha)
    })
}

/// McNemar's exact test of figures that are 0 or 1. The statistic is the smaller of
/// the two counts of rows that disagree.
pub fn mcnemar(sample: &Sample, alternative: Alternative, alpha: f64) -> Result<Finding, Reason> {
    if sample.clustered {
        return Err(NEEDS_INDEPENDENCE);
    }
    let (only_a, only_b) = sample.signs();
    let statistic = Some(only_a.min(only_b) as f64);
    Ok(Finding {
        statistic,
        ..coin(only_a, only_b, alternative, alpha)
    })
}

/// The exact binomial test of a fair coin, with Wilson's interval of the share.
fn coin(heads: u64, tails: u64, alternative: Alternative, alpha: f64) -> Finding {
    let n = heads + tails;
    let at_least = coin_at_most(tails, n); // as many heads or more: as few tails or fewer
    let at_most = coin_at_most(heads, n);
    Finding {
        p: Some(alternative.p(at_most, at_least)),
        interval: wilson(heads as f64, n as f64, alternative, alpha),
        interval_of: Some("share_a_greater_of_unequal"),
        method: "exact",
        ..Finding::default()
    }
}

/// Wilson's score interval (1927) of a share.
fn wilson(k: f64, n: f64, alternative: Alternative, alpha: f64) -> Interval {
    let end = |tail: f64, sign: f64| {
        if tail == 0.0 {
            return f64::from(sign > 0.0); // a share ends at 0 and 1 anyway
        }
        let z = crate::distribution::normal_quantile(1.0 - tail);
        let (share, z2) = (k / n, z * z);
        let half = z * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
        ((share + z2 / (2.0 * n) + sign * half) / (1.0 + z2 / n)).clamp(0.0, 1.0)
    };
    let (below, above) = alternative.tails(alpha);
    Interval {
        low: Some(end(below, -1.0)),
        high: Some(end(above, 1.0)),
    }
}

/// Effect sizes of one metric.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Effects {
    /// The mean difference in standard deviations of the differences (Cohen's d_z).
    pub d_z: Option<f64>,
    /// The mean difference in standard deviations of the figures, √((s²_a + s²_b)/2),
    /// times Hedges' exact correction on 2n − 2 degrees of freedom.
    pub hedges_g_av: Option<f64>,
    /// P(a > b) − P(a < b) over all n² pairs of a figure of a and one of b.
    pub cliffs_delta: Option<f64>,
    /// The rank sum of the rows where a is greater less that of the others, over both.
    pub rank_biserial: Option<f64>,
    /// The share of rows in which a is greater, equal ones counting half.
    pub share_a_greater: Option<f64>,
}

impl Effects {
    /// Of a sample of at least one row; what is undefined (a division by a spread
    /// of zero) is `None`.
    pub fn of(sample: &Sample) -> Self {
        let n = sample.n();
        let mean = sample.mean_diff();
        let finite = |x: f64| x.is_finite().then_some(x);
        let sd = variance(&sample.d).sqrt();
        let spread = ((variance(&sample.a) + variance(&sample.b)) / 2.0).sqrt();
        let (greater, less) = sample.signs();
        let (ranks, _) = doubled_ranks(&sample.d.iter().map(|d| d.abs()).collect::<Vec<_>>());
        // Zeros hold the lowest ranks; taking their number off leaves the others' own.
        let zeros = 2 * (sample.d.len() as u64 - greater - less);
        let side = |sign: f64| -> f64 {
            let rows = ranks
                .iter()
                .zip(&sample.d)
                .filter(|(_, d)| **d * sign > 0.0);
            rows.map(|(rank, _)| (rank - zeros) as f64).sum()
        };
        Self {
            d_z: if sd > 1e-14 * mean.abs() {
                finite(mean / sd)
            } else {
                None
            },
            hedges_g_av: if spread > 0.0 {
                finite(mean / spread * hedges(2.0 * n - 2.0))
            } else {
                None
            },
            cliffs_delta: finite(cliffs_delta(&sample.a, &sample.b)),
            rank_biserial: finite((side(1.0) - side(-1.0)) / (side(1.0) + side(-1.0))),
            share_a_greater: finite((greater as f64 + (n - (greater + less) as f64) / 2.0) / n),
        }
    }
}

/// Hedges' factor Γ(m/2) / (√(m/2) Γ((m−1)/2)) that takes the bias off a
/// standardised difference (Hedges, 1981).
fn hedges(m: f64) -> f64 {
    use statrs::function::gamma::ln_gamma;
    (ln_gamma(m / 2.0) - ln_gamma((m - 1.0) / 2.0)).exp() / (m / 2.0).sqrt()
}

fn cliffs_delta(a: &[f64], b: &[f64]) -> f64 {
    let mut sorted = b.to_vec();
    sorted.sort_by(f64::total_cmp);
    let over: i64 = a
        .iter()
        .map(|&a| {
            let below = sorted.partition_point(|&b| b < a);
            let above = sorted.len() - sorted.partition_point(|&b| b <= a);
            below as i64 - above as i64
        })
        .sum();
    over as f64 / (a.len() as f64 * b.len() as f64)
}

/// Holm's step-down adjustment (1979) of the p-values that are there.
pub fn holm(p: &[Option<f64>]) -> Vec<Option<f64>> {
    let mut order: Vec<(f64, usize)> = p
        .iter()
        .enumerate()
        .filter_map(|(i, p)| Some(((*p)?, i)))
        .collect();
    order.sort_by(|x, y| x.0.total_cmp(&y.0));
    let (family, mut highest) = (order.len(), 0.0_f64);
    let mut adjusted = vec![None; p.len()];
    for (place, (p, i)) in order.into_iter().enumerate() {
        highest = highest.max((p * (family - place) as f64).min(1.0));
        adjusted[i] = Some(highest);
    }
    adjusted
}
