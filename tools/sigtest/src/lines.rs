//! Every test of one metric, and the lines that are written.

use std::collections::BTreeSet;

use clap::ValueEnum;
use cli::Signature;
use comparison::lower_is_better;
use serde::Serialize;
use settings::Statistics;

use crate::distribution::Alternative;
use crate::paired::{self, Effects, Finding, Reason};
use crate::resample;
use crate::rows::{Question, Row};
use crate::sample::{Sample, mean};

/// The tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    PairedT,
    Wilcoxon,
    Permutation,
    Bootstrap,
    Sign,
    Mcnemar,
}

/// A side of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// That of --a
    A,
    /// That of --b
    B,
}

/// One test of one metric, as it is written.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub v: u64,
    /// The paths that were compared.
    pub a: String,
    pub b: String,
    pub metric: String,
    pub test: Test,
    /// Which form the test took: exact or not, with clusters or not.
    pub method: Option<&'static str>,
    pub statistic: Option<f64>,
    pub p: Option<f64>,
    pub p_holm: Option<f64>,
    pub ci_low: Option<f64>,
    pub ci_high: Option<f64>,
    /// What the interval is one of.
    pub ci_of: Option<&'static str>,
    /// Why there is no interval, where the test has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ci_reason: Option<Reason>,
    pub n: usize,
    /// Rows where one side alone has the number: left out of `n`.
    pub unpaired: usize,
    /// Rows where neither side has it: left out of both.
    pub missing: usize,
    pub clusters: Option<usize>,
    pub mean_a: Option<f64>,
    pub mean_b: Option<f64>,
    pub mean_diff: Option<f64>,
    #[serde(flatten)]
    pub effects: Effects,
    /// Why there is no result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    pub signature: String,
}

impl Line {
    /// Which side is the better one, where the test finds that the two differ.
    pub fn better(&self, alpha: f64) -> Option<Side> {
        self.p_holm.filter(|&p| p < alpha)?;
        match (self.mean_diff? < 0.0) == lower_is_better(&self.metric) {
            true => Some(Side::A),
            false => Some(Side::B),
        }
    }

    /// The rows that lack the figure on a side or on both, and all.
    pub fn without(&self) -> (usize, usize) {
        let without = self.missing + self.unpaired;
        (without, self.n + without)
    }
}

/// Every test of one metric.
pub fn compare(
    question: &Question,
    alternative: Alternative,
    metric: &str,
    rows: &[Row],
    statistics: &Statistics,
    config: &str,
) -> Vec<Line> {
    let (mut a, mut b, mut clusters) = (Vec::new(), Vec::new(), Vec::new());
    let (mut unpaired, mut missing) = (0, 0);
    let mut judges = BTreeSet::new();
    for row in rows {
        judges.extend(&row.judge);
        match (row.a.get(metric), row.b.get(metric)) {
            (Some(&of_a), Some(&of_b)) => {
                a.push(of_a);
                b.push(of_b);
                clusters.extend(row.cluster.as_deref());
            }
            (None, None) => missing += 1,
            _ => unpaired += 1,
        }
    }
    let figures = a.iter().chain(&b);
    let data: Vec<u8> = figures.flat_map(|x| x.to_le_bytes()).collect();
    let sample = Sample::new(a, b, question.cluster.is_some().then_some(&clusters));
    let signature = Signature::new("sigtest")
        .with("a", &question.a)
        .with("b", &question.b)
        .with("cluster", question.cluster.as_deref().unwrap_or("none"));
    let judges: Vec<&str> = judges.into_iter().map(String::as_str).collect();
    let signature = match judges.is_empty() {
        true => signature,
        false => signature.with("judge", judges.join("+").replace('|', "/")),
    };
    let signature = signature
        .with("alternative", alternative.name())
        .with("alpha", statistics.alpha)
        .with("resamples", statistics.resamples)
        .with("seed", statistics.seed)
        .with_hash("config", config)
        .with_hash("data", &cli::sha256_hex(&data));
    let blank = Line {
        v: record::VERSION,
        a: question.a.clone(),
        b: question.b.clone(),
        metric: metric.to_owned(),
        test: Test::PairedT,
        method: None,
        statistic: None,
        p: None,
        p_holm: None,
        ci_low: None,
        ci_high: None,
        ci_of: None,
        ci_reason: None,
        n: sample.d.len(),
        unpaired,
        missing,
        clusters: sample.clustered.then_some(sample.units.len()),
        mean_a: sample.unscaled(mean(&sample.a)),
        mean_b: sample.unscaled(mean(&sample.b)),
        mean_diff: sample.unscaled(sample.mean_diff()),
        effects: Effects::of(&sample),
        reason: None,
        signature: signature.to_string(),
    };
    let line = |test: Test| match test.run(&sample, alternative, statistics) {
        Err(reason) => Line {
            test,
            reason: Some(reason),
            ..blank.clone()
        },
        Ok(finding) => Line {
            test,
            method: Some(finding.method),
            statistic: finding.statistic,
            p: finding.p,
            ci_low: finding.interval.low,
            ci_high: finding.interval.high,
            ci_of: finding.interval_of,
            ci_reason: finding.no_interval,
            ..blank.clone()
        },
    };
    Test::suited(&sample).into_iter().map(line).collect()
}

impl Test {
    /// The tests that suit the figures.
    fn suited(sample: &Sample) -> Vec<Self> {
        let mut tests = vec![
            Self::PairedT,
            Self::Wilcoxon,
            Self::Permutation,
            Self::Bootstrap,
            Self::Sign,
        ];
        if sample.binary {
            tests.push(Self::Mcnemar);
        }
        tests
    }

    fn run(
        self,
        sample: &Sample,
        alternative: Alternative,
        statistics: &Statistics,
    ) -> Result<Finding, Reason> {
        if sample.d.len() < 2 {
            return Err("fewer than 2 rows");
        }
        if sample.all_equal() {
            return Err("every difference is zero");
        }
        let &Statistics {
            alpha,
            resamples,
            seed,
        } = statistics;
        match self {
            Self::PairedT => paired::paired_t(sample, alternative, alpha),
            Self::Wilcoxon => paired::wilcoxon(sample, alternative),
            Self::Permutation => Ok(resample::permutation(
                sample,
                alternative,
                alpha,
                resamples,
                seed,
            )),
            Self::Bootstrap => resample::bootstrap(sample, alternative, alpha, resamples, seed),
            Self::Sign => paired::sign(sample, alternative, alpha),
            Self::Mcnemar => paired::mcnemar(sample, alternative, alpha),
        }
    }
}

/// Fills in `p_holm`: each test is a family over the metrics. A metric without a
/// p-value cannot be found different by luck and does not count.
pub fn adjust(lines: &mut [Line]) {
    let mut tests: Vec<Test> = lines.iter().map(|line| line.test).collect();
    tests.sort_unstable();
    tests.dedup();
    for test in tests {
        let family: Vec<&mut Line> = lines.iter_mut().filter(|line| line.test == test).collect();
        let p: Vec<Option<f64>> = family.iter().map(|line| line.p).collect();
        for (line, adjusted) in family.into_iter().zip(paired::holm(&p)) {
            line.p_holm = adjusted;
        }
    }
}
