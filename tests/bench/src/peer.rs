//! Training here and by transformers and PEFT (`peer.py`), in turn: what disturbs the
//! machine disturbs both sides of a pair, so the ratio of a pair is what counts.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use jsonl::Output;
use serde::{Deserialize, Serialize};

use crate::task::{Base, Measured, Task, What};
use crate::{Origin, measure, median, name};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peer.py");

/// A line of `peer.py`.
#[derive(Debug, Serialize, Deserialize)]
struct Theirs {
    rows: String,
    sorted: bool,
    per_s: f64,
    per_cpu_s: f64,
    peak_mb: f64,
    load: f64,
    torch: String,
    transformers: String,
    peft: String,
}

/// The median of the pairs' ratios, ours by theirs, with the least and the most.
#[derive(Serialize)]
struct Ratio {
    median: f64,
    least: f64,
    most: f64,
}

impl Ratio {
    fn new(ratios: &[f64]) -> Self {
        Self {
            median: median(ratios),
            least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            most: ratios.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// One workload, both sides.
#[derive(Serialize)]
struct Line<'a> {
    v: u64,
    rows: &'static str,
    /// Theirs took rows of like length together.
    sorted: bool,
    threads: usize,
    /// Real tokens per CPU-second.
    per_cpu_s: Ratio,
    /// Real tokens per second by the clock.
    per_s: Ratio,
    /// Peak of resident memory.
    memory: Ratio,
    ours: &'a [Measured],
    theirs: &'a [Theirs],
    #[serde(flatten)]
    origin: &'a Origin,
}

/// Measures pairs, `runs` of each workload, and tells them as JSON lines and a table.
pub fn compare(
    python: &Path,
    runs: u32,
    models: &Path,
    tasks: &[Task],
    origin: &Origin,
) -> Result<()> {
    let mut out = Output::stdout();
    let heads = ["ours", "theirs", "ratio", "least–most", "memory"];
    let [ours, theirs, ratio, between, memory] = heads;
    eprintln!(
        "{:24} {ours:>7} {theirs:>7} {ratio:>6} {between:>12} {memory:>7}",
        "tokens per CPU-second"
    );
    for &task in tasks.iter().filter(|task| task.base == Base::F32) {
        let rows = match task.what {
            What::TrainEqual => "equal",
            What::TrainReal => "real",
            What::Generate | What::Quantise => continue,
        };
        let orders = if rows == "real" {
            &[false, true][..]
        } else {
            &[false]
        };
        for &sorted in orders {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..runs {
                ours.push(measure(&task, models).with_context(|| name(&task))?);
                theirs.push(peer(python, rows, sorted, task.threads)?);
            }
            let ratio = |of: &dyn Fn(&Measured, &Theirs) -> f64| {
                let pairs = ours.iter().zip(&theirs);
                Ratio::new(&pairs.map(|(a, b)| of(a, b)).collect::<Vec<_>>())
            };
            let line = Line {
                v: 1,
                rows,
                sorted,
                threads: task.threads,
                per_cpu_s: ratio(&|a, b| a.amount / a.cpu_s / b.per_cpu_s),
                per_s: ratio(&|a, b| a.amount / a.wall_s / b.per_s),
                memory: ratio(&|a, b| a.peak_mb / b.peak_mb),
                ours: &ours,
                theirs: &theirs,
                origin,
            };
            let own: Vec<f64> = ours.iter().map(|run| run.amount / run.cpu_s).collect();
            let other: Vec<f64> = theirs.iter().map(|run| run.per_cpu_s).collect();
            let Ratio {
                median: middle,
                least,
                most,
            } = line.per_cpu_s;
            let what = format!(
                "{rows}{}, threads: {}",
                if sorted { ", sorted" } else { "" },
                task.threads
            );
            eprintln!(
                "{what:24} {:>7.0} {:>7.0} {middle:>6.2} {:>12} {:>7.2}",
                median(&own),
                median(&other),
                format!("{least:.2}–{most:.2}"),
                line.memory.median,
            );
            out.json(&line)?;
        }
    }
    Ok(out.finish()?)
}

fn peer(python: &Path, rows: &str, sorted: bool, threads: usize) -> Result<Theirs> {
    let mut command = Command::new(python);
    command.args([SCRIPT, "--rows", rows, "--threads", &threads.to_string()]);
    if sorted {
        command.arg("--sort");
    }
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| python.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{SCRIPT}: {}", said.trim());
    serde_json::from_slice(&output.stdout).with_context(|| SCRIPT.to_owned())
}
