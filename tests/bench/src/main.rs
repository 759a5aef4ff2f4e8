//! What the CPU does in a second: training, generating and quantising, on models with
//! random weights that are made on the spot. `make bench` keeps the figures.
//!
//! Each measurement is a process of its own. All are run in turn, and then again: what
//! disturbs the machine meanwhile is spread over them, and medians are told. Tokens per
//! CPU-second count all threads, so they hold up on a machine that is busy.

mod machine;
mod model;
mod peer;
mod rows;
mod task;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use clap::{Parser, Subcommand, ValueEnum};
use jsonl::Output;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use machine::Machine;
use task::{Measured, Task, What};

/// Time training, generation and quantising on this machine
///
/// Figures go to standard output as JSON lines, a table to standard error.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Bench {
    #[command(subcommand)]
    one: Option<One>,
    /// Times that everything is measured; medians are told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only what has this in its name, such as `train-real f32`
    #[arg(long, default_value = "")]
    only: String,
    /// Training in f32 alone, in turn with transformers and PEFT, by a Python that has them
    /// (tests/parity/run makes one: data/cache/parity/venv/bin/python)
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
}

#[derive(Subcommand)]
enum One {
    /// Measure one thing, in this process
    Measure {
        #[command(flatten)]
        task: Task,
        /// Folder of the models
        #[arg(long)]
        models: PathBuf,
    },
}

/// Where figures come from.
#[derive(Serialize)]
struct Origin {
    machine: Machine,
    date: String,
    version: &'static str,
    commit: String,
    command: String,
}

impl Origin {
    /// This machine, now.
    fn new() -> Result<Self> {
        let now = OffsetDateTime::now_utc().replace_nanosecond(0)?;
        Ok(Self {
            machine: Machine::new(),
            date: now.format(&Rfc3339)?,
            version: env!("CARGO_PKG_VERSION"),
            commit: machine::commit(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
        })
    }
}

/// A line of figures.
#[derive(Serialize)]
struct Line<'a> {
    v: u64,
    #[serde(flatten)]
    task: Task,
    /// Of `amount`, in a second by the clock; median.
    per_s: f64,
    /// Of `amount`, in a second of one core; median.
    per_cpu_s: f64,
    /// The most memory, in MB; median.
    peak_mb: f64,
    runs: &'a [Measured],
    #[serde(flatten)]
    origin: &'a Origin,
}

fn main() -> Result<()> {
    let bench = Bench::parse();
    if let Some(One::Measure { task, models }) = bench.one {
        let mut out = Output::stdout();
        out.json(&task.measure(&models)?)?;
        return Ok(out.finish()?);
    }
    let tasks: Vec<Task> = Task::all(machine::cores())
        .into_iter()
        .filter(|task| name(task).contains(&bench.only))
        .collect();
    ensure!(!tasks.is_empty(), "nothing is called {}", bench.only);
    let origin = Origin::new()?;

    let models = tempfile::tempdir().context("a folder for the models")?;
    model::write(
        &models.path().join("middling"),
        model::middling(),
        DType::F32,
    )?;
    if let Some(python) = &bench.peer {
        return peer::compare(python, bench.runs, models.path(), &tasks, &origin);
    }
    if tasks.iter().any(|task| task.what == What::Quantise) {
        model::write(&models.path().join("wide"), model::wide(), DType::BF16)?;
    }
    let on_terminal = io::stderr().is_terminal();
    let mut runs: Vec<Vec<Measured>> = tasks.iter().map(|_| Vec::new()).collect();
    for run in 1..=bench.runs {
        for (task, runs) in tasks.iter().zip(&mut runs) {
            if on_terminal {
                eprint!("\r\x1b[Krun {run} of {}: {}", bench.runs, name(task));
            }
            runs.push(measure(task, models.path()).with_context(|| name(task))?);
        }
    }
    if on_terminal {
        eprint!("\r\x1b[K");
    }
    eprintln!(
        "{:20} {:>14} {:>18} {:>10}",
        "", "per second", "per CPU-second", "peak MB"
    );
    let mut out = Output::stdout();
    for (&task, runs) in tasks.iter().zip(&runs) {
        let middle = |of: fn(&Measured) -> f64| median(&runs.iter().map(of).collect::<Vec<_>>());
        let line = Line {
            v: 1,
            task,
            per_s: middle(|run| run.amount / run.wall_s),
            per_cpu_s: middle(|run| run.amount / run.cpu_s),
            peak_mb: middle(|run| run.peak_mb),
            runs,
            origin: &origin,
        };
        let (unit, scale) = match task.what {
            What::Quantise => ("MB", 1e6),
            _ => ("tokens", 1.0),
        };
        let [wall, cpu] =
            [line.per_s, line.per_cpu_s].map(|rate| format!("{:.0} {unit}", rate / scale));
        eprintln!(
            "{:20} {wall:>14} {cpu:>18} {:>10.0}",
            name(&task),
            line.peak_mb
        );
        out.json(&line)?;
    }
    Ok(out.finish()?)
}

/// The middle of these values, of which there is at least one.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

/// `train-real f32 2`, as the arguments are.
fn name(task: &Task) -> String {
    let value = |value: Option<clap::builder::PossibleValue>| {
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    };
    let (what, base) = (task.what.to_possible_value(), task.base.to_possible_value());
    format!("{} {} {}", value(what), value(base), task.threads)
}

/// Measures in a process of its own.
fn measure(task: &Task, models: &Path) -> Result<Measured> {
    // This very program, though its file may have been built anew meanwhile.
    let output = Command::new("/proc/self/exe")
        .arg("measure")
        .args(name(task).split(' '))
        .arg("--models")
        .arg(models)
        .env("RAYON_NUM_THREADS", task.threads.to_string())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "it ended with {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_task_is_found_by_its_name() {
        for task in Task::all(2) {
            let name = name(&task);
            let words = ["bench", "measure"].into_iter().chain(name.split(' '));
            let bench = Bench::parse_from(words.chain(["--models", "here"]));
            assert!(matches!(bench.one, Some(One::Measure { task: found, .. }) if found == task));
        }
    }
}
