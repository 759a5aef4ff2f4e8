//! Is system a better than system b, or was it luck? Paired tests on the figures
//! that gen-eval and judge left in each record.
//!
//! Every test is run on every metric, since each assumes something else and a
//! reader should see them agree; over the metrics of one comparison the p-values of
//! a test are Holm-adjusted, since a family of eight finds something by luck alone.

mod distribution;
mod figures;
mod paired;
mod resample;
mod sample;
mod table;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use cli::{App, Common, Counts, Failure, Flags, Signature, Tool};
use jsonl::{AtomicFile, Lines, Output, Records};
use record::Record;
use serde::Serialize;
use settings::{EvalSettings, Statistics};

use crate::distribution::Alternative;
use crate::paired::{Effects, Finding, Reason};
use crate::sample::Sample;

/// Compare two systems' figures, pair by pair
///
/// Reads records on standard input, takes the number at --a and the one at --b from
/// each, and tests whether they differ: paired t, Wilcoxon's signed ranks, a
/// permutation test, a bootstrap interval, the sign test and, for figures of 0 and 1,
/// McNemar's. Where a path leads to an object, every number that both sides have is a
/// metric of its own, and each test's p-values are Holm-adjusted over the metrics.
/// Differences are a − b.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct Sigtest {
    /// Dotted path to a number, or to an object of numbers
    #[arg(long, value_name = "FIELD")]
    a: String,
    /// The same for the other side
    #[arg(long, value_name = "FIELD")]
    b: String,
    /// Compare only these metrics of an object
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    metrics: Vec<String>,
    /// Rows with the same value here are not independent: one cluster, flipped and drawn as one
    #[arg(long, value_name = "FIELD")]
    cluster: Option<String>,
    /// What is held against "no difference"
    #[arg(long, value_name = "KIND", default_value = "two-sided")]
    alternative: Alternative,
    /// Intervals cover 1 − alpha; a p-value below it is called significant
    #[arg(long, value_name = "P")]
    alpha: Option<f64>,
    /// Resamples of permutation test and bootstrap
    #[arg(long, value_name = "N")]
    resamples: Option<usize>,
    /// Decides the resamples
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A table of at most 80 columns instead of JSON lines
    #[arg(long)]
    table: bool,
    /// Exit 1 unless some metric's adjusted permutation test is significant
    #[arg(long)]
    exit_status: bool,
    /// Where malformed lines go (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ sigtest --a systems.base --b systems.lora < out.jsonl
$ sigtest --a systems.base --b systems.lora --table < out.jsonl
$ sigtest --a systems.base --b systems.lora --cluster conversation_id < out.jsonl
$ sigtest --a systems.base.nll --b systems.lora.nll --exit-status < out.jsonl
";

/// One test of one metric, as it is written.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    v: u64,
    /// The paths that were compared.
    a: String,
    b: String,
    metric: String,
    test: &'static str,
    /// Which form the test took: exact or not, with clusters or not.
    method: Option<&'static str>,
    statistic: Option<f64>,
    p: Option<f64>,
    p_holm: Option<f64>,
    ci_low: Option<f64>,
    ci_high: Option<f64>,
    /// What the interval is one of.
    ci_of: Option<&'static str>,
    n: usize,
    /// Rows where one side alone has the number: left out of `n`.
    unpaired: usize,
    clusters: Option<usize>,
    mean_a: Option<f64>,
    mean_b: Option<f64>,
    mean_diff: Option<f64>,
    #[serde(flatten)]
    effects: Effects,
    /// Why there is no result.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<Reason>,
    signature: String,
}

/// What one record says.
struct Row {
    a: HashMap<String, f64>,
    b: HashMap<String, f64>,
    cluster: Option<String>,
}

fn main() -> ExitCode {
    cli::main::<Sigtest>()
}

impl Tool for Sigtest {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        let flags = Flags::new()
            .set("statistics.alpha", &self.alpha)
            .set("statistics.resamples", &self.resamples)
            .set("statistics.seed", &self.seed);
        let Some(resolved) = app.settings::<EvalSettings>(&["statistics"], flags)? else {
            return Ok(());
        };
        let statistics = &resolved.settings.statistics;
        self.check(statistics)?;

        let (rows, metrics, mut counts) = self.read(app)?;
        let mut lines = Vec::new();
        let progress = app.progress("testing", Some(metrics.len() as u64));
        for metric in &metrics {
            lines.extend(self.compare(metric, &rows, statistics, &resolved.sha256()));
            progress.add(1);
        }
        drop(progress);
        adjust(&mut lines);

        let mut out = Output::stdout();
        if self.table {
            let table = table::render(&self.a, &self.b, statistics.alpha, &lines);
            out.line(|out| out.write_all(table.as_bytes()))?;
        } else {
            lines.iter().try_for_each(|line| out.json(line))?;
        }
        out.finish()?;
        counts.written = lines.len() as u64;
        app.count(counts);
        let significant = |line: &Line| {
            line.test == "permutation" && line.p_holm.is_some_and(|p| p < statistics.alpha)
        };
        if self.exit_status && !lines.iter().any(significant) {
            return Err(Failure::Gate(format!(
                "no metric's adjusted permutation test is below alpha = {}",
                statistics.alpha
            ))
            .into());
        }
        Ok(())
    }
}

impl Sigtest {
    fn check(&self, statistics: &Statistics) -> Result<(), Failure> {
        let usage = |text: String| Err(Failure::Usage(text));
        if !(statistics.alpha > 0.0 && statistics.alpha < 1.0) {
            return usage(format!(
                "--alpha (statistics.alpha) is {}; it must lie between 0 and 1",
                statistics.alpha
            ));
        }
        if !(100..=10_000_000).contains(&statistics.resamples) {
            return usage(format!(
                "--resamples (statistics.resamples) is {}; from 100 to 10000000 make sense",
                statistics.resamples
            ));
        }
        if self.common.max_bad_lines > 0 && self.rejects.is_none() {
            return usage("--max-bad-lines needs --rejects FILE to keep the lines in".into());
        }
        Ok(())
    }

    /// The rows, and the metrics that both sides have somewhere, in the order in
    /// which a has them.
    fn read(&self, app: &App) -> anyhow::Result<(Vec<Row>, Vec<String>, Counts)> {
        let mut rejects = self
            .rejects
            .as_deref()
            .map(AtomicFile::create)
            .transpose()?;
        let mut nowhere = std::io::sink();
        let kept: &mut dyn std::io::Write = match &mut rejects {
            Some(file) => file,
            None => &mut nowhere,
        };
        let mut records = Records::new(Lines::open(Path::new("-"))?, self.common.max_bad_lines);
        let (mut rows, mut names, mut counts) = (Vec::new(), Vec::new(), Counts::default());
        let (mut seen_a, mut seen_b) = (false, false);
        while let Some((_, row)) =
            records.next_with(kept, |record| self.row(&record, &mut names))?
        {
            counts.read += 1;
            let Some(row) = row else { continue };
            seen_a |= !row.a.is_empty();
            seen_b |= !row.b.is_empty();
            rows.push(row);
        }
        counts.rejected = records.bad();
        counts.read += counts.rejected;
        if let Some(rejects) = rejects {
            rejects.commit()?;
        }
        if rows.is_empty() {
            return Err(Failure::Input(
                "-: the input is empty: there is nothing to compare".into(),
            )
            .into());
        }
        for (flag, path, seen) in [("--a", &self.a, seen_a), ("--b", &self.b, seen_b)] {
            if !seen {
                let cause = format!(
                    "-: none of {} records has a number at {flag} {path}",
                    rows.len()
                );
                return Err(Failure::Input(cause).into());
            }
        }
        let both = |name: &String| {
            rows.iter()
                .any(|r| r.a.contains_key(name) && r.b.contains_key(name))
        };
        let metrics: Vec<String> = names.iter().filter(|name| both(name)).cloned().collect();
        if let Some(absent) = self.metrics.iter().find(|name| !metrics.contains(name)) {
            let have = metrics.join(", ");
            return Err(Failure::Input(format!(
                "-: no record has --metrics {absent} on both sides; there are: {have}"
            ))
            .into());
        }
        if metrics.is_empty() {
            let cause = format!(
                "-: no record has the same number at both --a {} and --b {}",
                self.a, self.b
            );
            return Err(Failure::Input(cause).into());
        }
        let wanted = |name: &String| self.metrics.is_empty() || self.metrics.contains(name);
        let metrics: Vec<String> = metrics.into_iter().filter(wanted).collect();
        for name in &metrics {
            let one_sided = rows
                .iter()
                .filter(|r| r.a.contains_key(name) != r.b.contains_key(name))
                .count();
            if one_sided > 0 {
                app.warn(format_args!(
                    "{one_sided} of {} rows have `{name}` on one side only and are left out",
                    rows.len()
                ));
            }
        }
        Ok((rows, metrics, counts))
    }

    /// The figures of one record, or `None` for the corpus line. New names of
    /// figures are added to `names`.
    fn row(&self, record: &Record, names: &mut Vec<String>) -> Result<Option<Row>, record::Error> {
        let (a, b) = (
            figures::find(record, &self.a)?,
            figures::find(record, &self.b)?,
        );
        if record.contains("corpus") && a.is_none() && b.is_none() {
            return Ok(None);
        }
        let mut side = |value: Option<serde_json::Value>| -> HashMap<String, f64> {
            let mut figures = value
                .map(|value| figures::numbers(&value))
                .unwrap_or_default();
            for (name, _) in &mut figures {
                if name.is_empty() {
                    *name = figures::common_name(&self.a, &self.b);
                }
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            figures.into_iter().collect()
        };
        let (a, b) = (side(a), side(b));
        let cluster = match &self.cluster {
            None => None,
            Some(path) => match figures::find(record, path)? {
                Some(value) => Some(
                    value
                        .as_str()
                        .map_or_else(|| value.to_string(), str::to_owned),
                ),
                None => return Err(record::Error::Missing(path.clone())),
            },
        };
        Ok(Some(Row { a, b, cluster }))
    }

    /// Every test of one metric.
    fn compare(
        &self,
        metric: &str,
        rows: &[Row],
        statistics: &Statistics,
        config: &str,
    ) -> Vec<Line> {
        let (mut a, mut b, mut clusters) = (Vec::new(), Vec::new(), Vec::new());
        let mut unpaired = 0;
        for row in rows {
            match (row.a.get(metric), row.b.get(metric)) {
                (Some(&of_a), Some(&of_b)) => {
                    a.push(of_a);
                    b.push(of_b);
                    clusters.extend(row.cluster.as_deref());
                }
                (None, None) => {}
                _ => unpaired += 1,
            }
        }
        let sample = Sample::new(a, b, self.cluster.is_some().then_some(&clusters));
        let data: Vec<u8> = sample
            .a
            .iter()
            .chain(&sample.b)
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let signature = Signature::new("sigtest")
            .with("a", &self.a)
            .with("b", &self.b)
            .with("cluster", self.cluster.as_deref().unwrap_or("none"))
            .with("alternative", self.alternative.name())
            .with("alpha", statistics.alpha)
            .with("resamples", statistics.resamples)
            .with("seed", statistics.seed)
            .with_hash("config", config)
            .with_hash("data", &cli::sha256_hex(&data));
        let finite = |x: f64| x.is_finite().then_some(x);
        let blank = Line {
            v: record::VERSION,
            a: self.a.clone(),
            b: self.b.clone(),
            metric: metric.to_owned(),
            test: "",
            method: None,
            statistic: None,
            p: None,
            p_holm: None,
            ci_low: None,
            ci_high: None,
            ci_of: None,
            n: sample.d.len(),
            unpaired,
            clusters: sample.clustered.then_some(sample.units.len()),
            mean_a: finite(sample::mean(&sample.a)),
            mean_b: finite(sample::mean(&sample.b)),
            mean_diff: finite(sample.mean_diff()),
            effects: Effects::of(&sample),
            reason: None,
            signature: signature.to_string(),
        };
        let tests = run_tests(&sample, self.alternative, statistics);
        let line = |(test, ci_of, finding): (_, _, Result<Finding, Reason>)| match finding {
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
                ci_of: (finding.interval != Default::default()).then_some(ci_of),
                ..blank.clone()
            },
        };
        tests.into_iter().map(line).collect()
    }
}

/// The tests by name, with what their interval is one of.
fn run_tests(
    sample: &Sample,
    alternative: Alternative,
    statistics: &Statistics,
) -> Vec<(&'static str, &'static str, Result<Finding, Reason>)> {
    let &Statistics {
        alpha,
        resamples,
        seed,
    } = statistics;
    let unless = |finding: &dyn Fn() -> Result<Finding, Reason>| {
        if sample.d.len() < 2 {
            Err("fewer than 2 rows")
        } else if sample.all_equal() {
            Err("every difference is zero")
        } else {
            finding()
        }
    };
    let mut tests = vec![
        (
            "paired_t",
            "mean_diff",
            unless(&|| paired::paired_t(sample, alternative, alpha)),
        ),
        (
            "wilcoxon",
            "",
            unless(&|| paired::wilcoxon(sample, alternative)),
        ),
        (
            "permutation",
            "",
            unless(&|| Ok(resample::permutation(sample, alternative, resamples, seed))),
        ),
        (
            "bootstrap",
            "mean_diff",
            unless(&|| resample::bootstrap(sample, alternative, alpha, resamples, seed)),
        ),
        (
            "sign",
            "share_a_greater_of_unequal",
            unless(&|| paired::sign(sample, alternative, alpha)),
        ),
    ];
    if sample.binary() {
        let mcnemar = unless(&|| paired::mcnemar(sample, alternative, alpha));
        tests.push(("mcnemar", "share_a_greater_of_unequal", mcnemar));
    }
    tests
}

/// Fills in `p_holm`: each test is a family over the metrics. A metric without a
/// p-value cannot be found different by luck and does not count.
fn adjust(lines: &mut [Line]) {
    let mut tests: Vec<&str> = lines.iter().map(|line| line.test).collect();
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
