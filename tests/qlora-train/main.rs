//! qlora-train through the real binary, on the demo's model.
#![allow(clippy::unwrap_used)]

mod bench;
mod plan;
mod resume;
mod rows;
mod settings;
mod signals;
mod steps;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Run, Tool};
use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/demo/model");

const CONFIG: &str = "
lora: {rank: 4, alpha: 8, dropout: 0.1}
training: {max_steps: 12, learning_rate: 2.0e-3, batch_size: 3, gradient_accumulation_steps: 2,
           warmup_steps: 2, save_steps: 3, eval_steps: 4, max_seq_length: 128}
";

fn tool() -> Tool {
    let tool = Tool::new(env!("CARGO_BIN_EXE_qlora-train"));
    tool.file("train.yaml", CONFIG);
    tool.file("pairs.jsonl", &pairs(31));
    tool
}

/// Rows in the shape of pair-dedup's, every fifth held out.
fn pairs(n: usize) -> String {
    let things = [
        "tea",
        "rain",
        "the garden",
        "an old map",
        "bread",
        "the river",
        "a long walk",
    ];
    let mut text = String::new();
    for i in 0..n {
        let (thing, other) = (things[i % 7], things[(i * 3 + 1) % 7]);
        let split = if i % 5 == 4 { "eval" } else { "train" };
        text.push_str(&format!(
            r#"{{"v":1,"id":"p{i}","tweet_normalized":"Day {i}: thinking about {thing} again.","reply_normalized":"I like {thing} too, and {other} {}.","tweet":"t{i}","reply":"r{i}","split":"{split}"}}"#,
            "even more ".repeat(i % 4)
        ));
        text.push('\n');
    }
    text
}

fn arguments<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec![
        "--model",
        MODEL,
        "--data",
        "pairs.jsonl",
        "--config",
        "train.yaml",
        "--out",
        out,
    ];
    all.extend(more);
    all
}

#[track_caller]
fn train(tool: &Tool, out: &str, more: &[&str]) -> Run {
    tool.run(&arguments(out, more), "")
}

/// The bytes that make a run: figures, adapter and model card.
fn result(tool: &Tool, out: &str) -> Vec<(String, Vec<u8>)> {
    [
        "README.md",
        "metrics.jsonl",
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    .map(|name| {
        (
            name.to_owned(),
            fs::read(tool.folder().join(out).join(name)).unwrap(),
        )
    })
    .into()
}

#[track_caller]
fn same(tool: &Tool, a: &str, b: &str) {
    for ((name, a), (_, b)) in result(tool, a).into_iter().zip(result(tool, b)) {
        assert!(a == b, "{name} differs");
    }
}

fn figures(tool: &Tool, out: &str, key: &str) -> Vec<f64> {
    let text = tool.read(&format!("{out}/metrics.jsonl"));
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line[key].as_f64()).collect()
}

fn lines(path: &Path) -> usize {
    fs::read(path).map_or(0, |bytes| bytes.iter().filter(|&&b| b == b'\n').count())
}

/// Starts a run and sends a signal once its figures have so many lines.
fn signal_after(tool: &Tool, out: &str, more: &[&str], after: usize, signal: &str) -> Option<i32> {
    let command = tool.command(&arguments(out, more));
    signal_to(command, (tool, out), after, signal)
}

/// The same for a command of its own.
fn signal_to(
    mut command: Command,
    (tool, out): (&Tool, &str),
    after: usize,
    signal: &str,
) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let metrics = tool.folder().join(out).join("metrics.jsonl");
    let started = Instant::now();
    while lines(&metrics) < after && child.try_wait().unwrap().is_none() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "no {after} lines"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    let _ = Command::new("kill")
        .args([signal, &pid])
        .stderr(Stdio::null())
        .status();
    let status = child.wait().unwrap();
    status.code().or(status.signal().map(|s| -s))
}

/// The demo's model in a folder of its own, to be spoilt.
fn copy_model(to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(MODEL).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

const SIGHUP: u32 = 1;
const SIGTERM: u32 = 15;

/// Whether a process has a handler for a signal, as Linux tells.
fn heeds(pid: u32, signal: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = caught.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
