//! Is system a better than system b, or was it luck? Paired tests on the figures
//! that gen-eval and judge left in each record.
//!
//! Every test is run on every metric, since each assumes something else and a
//! reader should see them agree; over the metrics of one comparison the p-values of
//! a test are Holm-adjusted, since a family of eight finds something by luck alone.

mod distribution;
mod figures;
mod lines;
mod paired;
mod resample;
mod rows;
mod sample;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use cli::{App, Common, Counts, Failure, Flags, Resolved, Tool};
use comparison::{MOST_GAPS, lower_is_better};
use jsonl::Output;
use settings::{EvalSettings, Statistics};

use crate::distribution::Alternative;
use crate::lines::{Line, Side, Test, adjust, compare};
use crate::rows::Question;

/// Compare two systems' figures, pair by pair
///
/// Reads records on standard input, takes the number at --a and the one at --b from
/// each, and tests whether they differ: paired t, Wilcoxon's signed ranks, a permutation
/// test with the interval that agrees with it, a bootstrap interval, the sign test and, for
/// figures of 0 and 1, McNemar's. Where a path leads to an object, every number that both sides have is a
/// metric of its own, and each test's p-values are Holm-adjusted over the metrics.
/// Differences are a − b. Records may do without `id`; one that comes again is refused
/// (exit 3), unless --cluster id says that several rows of one id are meant.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct Sigtest {
    #[command(flatten)]
    question: Question,
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
    /// Exit 1 unless this side is better: on some metric that at most 5% of the rows lack, by
    /// the adjusted permutation test, while on none the other is
    #[arg(long, value_name = "SIDE")]
    exit_status: Option<Side>,
    /// Where malformed lines go (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ sigtest --a systems.base --b systems.lora < out.jsonl
$ sigtest --a systems.base --b systems.lora --table < out.jsonl
$ sigtest --a systems.base --b systems.lora --cluster split_group < out.jsonl
$ sigtest --a systems.base.nll --b systems.lora.nll --exit-status b < out.jsonl
";

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
        check(&resolved)?;

        let question = &self.question;
        let (rows, metrics, counts) = question.read(app, self.rejects.as_deref())?;
        refuse_mixed(self.alternative, &metrics)?;
        let config = resolved.sha256();
        let mut lines = Vec::new();
        let progress = app.progress("testing", Some(metrics.len() as u64));
        for metric in &metrics {
            lines.extend(compare(
                question,
                self.alternative,
                metric,
                &rows,
                statistics,
                &config,
            ));
            progress.add(1);
        }
        drop(progress);
        adjust(&mut lines);

        let mut out = Output::stdout();
        if self.table {
            let table = table::render(&question.a, &question.b, statistics.alpha, &lines);
            out.line(|out| out.write_all(table.as_bytes()))?;
        } else {
            lines.iter().try_for_each(|line| out.json(line))?;
        }
        out.finish()?;
        app.count(Counts {
            written: lines.len() as u64,
            ..counts
        });
        if let Some(side) = self.exit_status {
            gate(&lines, side, statistics.alpha).map_err(Failure::Gate)?;
        }
        Ok(())
    }
}

/// Whether `side` is the better one, or why not.
fn gate(lines: &[Line], side: Side, alpha: f64) -> Result<(), String> {
    let tests = || lines.iter().filter(|line| line.test == Test::Permutation);
    let (name, other) = match side {
        Side::A => ("a", Side::B),
        Side::B => ("b", Side::A),
    };
    let against = |line: &&Line| line.better(alpha) == Some(other);
    if let Some(worse) = tests().find(against) {
        let metric = &worse.metric;
        return Err(format!("`{metric}` of {name} is significantly worse"));
    }
    let mut cause =
        format!("no metric's adjusted permutation test finds {name} better at alpha = {alpha}");
    for line in tests().filter(|line| line.better(alpha) == Some(side)) {
        match line.without() {
            (without, all) if without as f64 > MOST_GAPS * all as f64 => {
                let metric = &line.metric;
                cause = format!(
                    "{without} of {all} rows lack `{metric}`: those that have it may differ from them"
                );
            }
            _ => return Ok(()),
        }
    }
    Err(cause)
}

/// One-sided tests go by the number, and not by what is better.
fn refuse_mixed(alternative: Alternative, metrics: &[String]) -> Result<(), Failure> {
    let (lower, higher): (Vec<&String>, Vec<&String>) =
        metrics.iter().partition(|metric| lower_is_better(metric));
    match (alternative, lower.first(), higher.first()) {
        (Alternative::Greater | Alternative::Less, Some(lower), Some(higher)) => {
            Err(Failure::Usage(format!(
                "--alternative {} asks one thing of `{lower}`, of which less is better, and the opposite of \
                 `{higher}`: choose with --metrics",
                alternative.name()
            )))
        }
        _ => Ok(()),
    }
}

/// Settings that parse and cannot work.
fn check(resolved: &Resolved<EvalSettings>) -> Result<(), Failure> {
    let Statistics {
        alpha, resamples, ..
    } = resolved.settings.statistics;
    if !(alpha > 0.0 && alpha < 1.0) {
        let cause = format!("is {alpha}; it must lie between 0 and 1");
        return Err(resolved.wrong("statistics.alpha", cause));
    }
    if !(100..=10_000_000).contains(&resamples) {
        let cause = format!("is {resamples}; from 100 to 10000000 make sense");
        return Err(resolved.wrong("statistics.resamples", cause));
    }
    Ok(())
}
