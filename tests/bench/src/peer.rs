//! Training here and by transformers and PEFT (`peer.py`), in turn: what disturbs the
//! machine disturbs both sides of a pair, so the ratio of a pair is what counts. A pair of
//! each workload, and then all again, so that a disturbance is spread over them.

use std::io::{self, IsTerminal};
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
    threads: usize,
    /// Real ones.
    tokens: u64,
    per_s: f64,
    per_cpu_s: f64,
    peak_mb: f64,
    load: f64,
    torch: String,
    transformers: String,
    peft: String,
}

/// Values with their median, the least and the most.
#[derive(Serialize)]
struct Spread {
    /// In the order of measuring.
    each: Vec<f64>,
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn new(each: Vec<f64>) -> Self {
        Self {
            median: median(&each),
            least: each.iter().copied().fold(f64::INFINITY, f64::min),
            most: each.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            each,
        }
    }
}

/// What both sides train on, and how fast they were.
struct Workload {
    task: Task,
    rows: &'static str,
    /// Theirs take rows of like length together.
    sorted: bool,
    pairs: Vec<(Measured, Theirs)>,
}

impl Workload {
    /// Those of a task, none where theirs does not do it.
    fn of(task: Task) -> Vec<Self> {
        let (rows, orders) = match (task.base, task.what) {
            (Base::F32, What::TrainEqual) => ("equal", &[false][..]),
            (Base::F32, What::TrainReal) => ("real", &[false, true][..]),
            _ => return Vec::new(),
        };
        let workload = |&sorted| Self {
            task,
            rows,
            sorted,
            pairs: Vec::new(),
        };
        orders.iter().map(workload).collect()
    }

    fn name(&self) -> String {
        let order = if self.sorted { " sorted" } else { "" };
        format!("{}{order} {}", self.rows, self.task.threads)
    }

    fn spread(&self, of: impl Fn(&Measured, &Theirs) -> f64) -> Spread {
        Spread::new(self.pairs.iter().map(|(a, b)| of(a, b)).collect())
    }
}

/// The figures of a workload.
#[derive(Serialize)]
struct Line<'a> {
    v: u64,
    rows: &'static str,
    sorted: bool,
    threads: usize,
    /// Ours by theirs, pair by pair: real tokens per CPU-second.
    per_cpu_s: Spread,
    /// Real tokens per second by the clock.
    per_s: Spread,
    /// Peak of resident memory.
    memory: Spread,
    ours: Vec<&'a Measured>,
    theirs: Vec<&'a Theirs>,
    #[serde(flatten)]
    origin: &'a Origin,
}

/// Measures `runs` pairs of each workload, and tells them as JSON lines and a table.
pub fn compare(
    python: &Path,
    runs: u32,
    models: &Path,
    tasks: &[Task],
    origin: &Origin,
) -> Result<()> {
    let mut workloads: Vec<Workload> = tasks.iter().copied().flat_map(Workload::of).collect();
    ensure!(
        !workloads.is_empty(),
        "the other side only trains, in f32: `--only \"train-equal f32\"` or `--only \"train-real f32\"`"
    );
    let on_terminal = io::stderr().is_terminal();
    for run in 1..=runs {
        for workload in &mut workloads {
            if on_terminal {
                eprint!("\r\x1b[Kpair {run} of {runs}: {}", workload.name());
            }
            let ours = measure(&workload.task, models).with_context(|| name(&workload.task))?;
            workload.pairs.push((ours, peer(python, workload)?));
        }
    }
    if on_terminal {
        eprint!("\r\x1b[K");
    }
    eprintln!("tokens per CPU-second, medians (least to most); pairs of ours by theirs");
    eprintln!(
        "{:16} {:21} {:21} {:19} memory  pairs",
        "rows, threads", "ours", "theirs", "ratio"
    );
    let mut out = Output::stdout();
    for workload in &workloads {
        let line = Line {
            v: 1,
            rows: workload.rows,
            sorted: workload.sorted,
            threads: workload.task.threads,
            per_cpu_s: workload.spread(|a, b| a.amount / a.cpu_s / b.per_cpu_s),
            per_s: workload.spread(|a, b| a.amount / a.wall_s / b.per_s),
            memory: workload.spread(|a, b| a.peak_mb / b.peak_mb),
            ours: workload.pairs.iter().map(|(ours, _)| ours).collect(),
            theirs: workload.pairs.iter().map(|(_, theirs)| theirs).collect(),
            origin,
        };
        let shown = |spread: &Spread, digits: usize| {
            let Spread {
                median,
                least,
                most,
                ..
            } = spread;
            format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
        };
        let pairs: Vec<_> = line
            .per_cpu_s
            .each
            .iter()
            .map(|r| format!("{r:.2}"))
            .collect();
        eprintln!(
            "{:16} {:21} {:21} {:19} {:>6.2}  {}",
            workload.name(),
            shown(&workload.spread(|a, _| a.amount / a.cpu_s), 0),
            shown(&workload.spread(|_, b| b.per_cpu_s), 0),
            shown(&line.per_cpu_s, 2),
            line.memory.median,
            pairs.join(" "),
        );
        out.json(&line)?;
    }
    Ok(out.finish()?)
}

fn peer(python: &Path, workload: &Workload) -> Result<Theirs> {
    let threads = workload.task.threads.to_string();
    let mut command = Command::new(python);
    command.args([SCRIPT, "--rows", workload.rows, "--threads", &threads]);
    if workload.sorted {
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
