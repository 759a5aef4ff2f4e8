//! qlora-train through the real binary, on the demo's model.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use harness::{Run, Tool, check_examples};
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
            r#"{{"v":1,"id":"p{i}","tweet_normalized":"Day {i}: thinking about {thing} again.","reply_normalized":"I like {thing} too, and {other} {}.","tweet":"t","reply":"r","split":"{split}"}}"#,
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
    use std::os::unix::process::ExitStatusExt;
    let mut child = tool
        .command(&arguments(out, more))
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
    let _ = std::process::Command::new("kill")
        .args([signal, &pid])
        .stderr(Stdio::null())
        .status();
    let status = child.wait().unwrap();
    status.code().or(status.signal().map(|s| -s))
}

#[test]
fn killed_anywhere_and_resumed_leaves_the_same_bytes() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    // Twelve updates and evaluations before, after 4, 8 and 12: sixteen lines.
    assert_eq!(lines(&tool.folder().join("whole/metrics.jsonl")), 16);
    let mut killed = 0;
    for (out, points) in [
        ("a", vec![1, 6]),
        ("b", vec![3, 5, 9]),
        ("c", vec![13]),
        ("d", vec![15, 16]),
    ] {
        for after in points {
            let resume: &[&str] = if tool.folder().join(out).exists() {
                &["--resume"]
            } else {
                &[]
            };
            killed += usize::from(signal_after(&tool, out, resume, after, "-KILL") == Some(-9));
        }
        if tool.folder().join(out).exists() {
            train(&tool, out, &["--resume"]).exits(0);
        }
        same(&tool, "whole", out);
    }
    assert!(killed >= 5, "only {killed} kills met a running tool");
}

/// Between the last checkpoint and the adapter's appearance lies little time; what
/// that leaves is made here by hand.
#[test]
fn killed_before_the_adapter_is_published_it_is_published_on_resuming() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    train(&tool, "out", &[]).exits(0);
    for name in [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ] {
        fs::remove_file(tool.folder().join("out").join(name)).unwrap();
    }
    train(&tool, "out", &["--resume"]).exits(0);
    same(&tool, "whole", "out");
    assert!(
        tool.read("out/README.md")
            .contains("Held-out loss after training")
    );
}

#[test]
fn a_signal_saves_and_leaves_with_130() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    let code = signal_after(&tool, "out", &[], 3, "-TERM");
    assert_eq!(code, Some(130));
    let saved = fs::read_dir(tool.folder().join("out/checkpoints"))
        .unwrap()
        .count();
    assert!(saved > 0, "nothing saved");
    train(&tool, "out", &["--resume"]).exits(0);
    same(&tool, "whole", "out");
}

#[test]
fn the_number_of_threads_and_a_second_run_change_no_byte() {
    let tool = tool();
    train(&tool, "one", &["--threads", "1"]).exits(0);
    train(&tool, "eight", &["--threads", "8"]).exits(0);
    train(&tool, "again", &[]).exits(0);
    same(&tool, "one", "eight");
    same(&tool, "one", "again");
    train(&tool, "other", &["--seed", "7"]).exits(0);
    assert_ne!(result(&tool, "one"), result(&tool, "other"));
}

/// f32 sums in another order: over twelve updates and four evaluations the largest
/// relative difference is 1.2e-7 (the test prints it); ten times that, and room for
/// other products.
const LAYOUT: f64 = 2e-6;

#[test]
fn packing_changes_the_layout_and_nothing_else() {
    let tool = tool();
    train(&tool, "packed", &[]).exits(0);
    train(&tool, "single", &["--no-packing"]).exits(0);
    let mut worst = 0.0_f64;
    for key in ["loss", "grad_norm", "eval_loss"] {
        let (a, b) = (figures(&tool, "packed", key), figures(&tool, "single", key));
        assert!(!a.is_empty() && a.len() == b.len());
        for (a, b) in a.iter().zip(&b) {
            worst = worst.max((a - b).abs() / a.abs());
        }
    }
    println!("worst relative difference: {worst:e}");
    assert!(worst <= LAYOUT, "{worst:e}");
    assert_eq!(
        figures(&tool, "packed", "supervised_tokens"),
        figures(&tool, "single", "supervised_tokens")
    );
}

#[test]
fn accumulation_is_the_same_step() {
    let tool = tool();
    train(&tool, "accumulated", &[]).exits(0);
    let config = CONFIG.replace(
        "batch_size: 3, gradient_accumulation_steps: 2",
        "batch_size: 6, gradient_accumulation_steps: 1",
    );
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    assert_eq!(
        figures(&tool, "accumulated", "loss"),
        figures(&tool, "whole", "loss")
    );
}

#[test]
fn it_learns_and_the_base_stays_as_it_was() {
    let tool = tool();
    let weights = PathBuf::from(MODEL).join("model.safetensors");
    let before = fs::read(&weights).unwrap();
    train(&tool, "out", &["--steps", "40"]).exits(0);
    let (loss, held_out) = (
        figures(&tool, "out", "loss"),
        figures(&tool, "out", "eval_loss"),
    );
    assert!(loss[39] < 0.7 * loss[0], "{loss:?}");
    assert!(held_out.last() < held_out.first(), "{held_out:?}");
    assert_eq!(before, fs::read(weights).unwrap());
}

#[test]
fn conversations_are_rows_too() {
    let tool = tool();
    let row = |i: usize| {
        format!(
            r#"{{"messages":[{{"role":"system","content":"Be brief."}},{{"role":"user","content":"Number {i}?"}},{{"role":"assistant","content":"It is {i}."}}]}}"#
        )
    };
    tool.file(
        "pairs.jsonl",
        &(0..8).map(|i| row(i) + "\n").collect::<String>(),
    );
    let run = train(&tool, "out", &["--steps", "2"]).exits(0);
    assert_eq!(
        run.records().len(),
        2,
        "no evaluation without held-out rows\n{run}"
    );
}

#[test]
fn another_run_in_the_folder_is_refused_by_name() {
    let tool = tool();
    train(&tool, "out", &["--steps", "3"]).exits(0);
    train(&tool, "out", &["--steps", "3"])
        .exits(2)
        .says("--resume");
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(0)
        .says("finished");
    let before = result(&tool, "out");
    train(
        &tool,
        "out",
        &["--steps", "3", "--resume", "--learning-rate", "1e-4"],
    )
    .exits(2)
    .says("training.learning_rate = 0.0001, was 0.002")
    .says("RUN=new");
    tool.file("pairs.jsonl", &pairs(30));
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(2)
        .says("the data changed");
    assert_eq!(before, result(&tool, "out"));
}

#[test]
fn the_reader_of_the_figures_may_go() {
    let tool = tool();
    let mut child = tool
        .command(&arguments("out", &[]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(lines(&tool.folder().join("out/metrics.jsonl")), 16);
    assert!(tool.folder().join("out/adapter_model.safetensors").exists());
}

#[test]
fn a_full_disk_on_standard_output_is_an_error() {
    let tool = tool();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = tool
        .command(&arguments("out", &[]))
        .stdin(Stdio::null())
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"));
}

#[test]
fn rows_that_teach_nothing_are_refused_by_line() {
    let tool = tool();
    let good = pairs(1);
    let with = |line: &str| format!("{good}{line}\n");
    let long = format!(
        r#"{{"id":"x","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"{}","split":"train"}}"#,
        "word ".repeat(200)
    );
    for (line, said) in [
        (
            r#"{"messages":[{"role":"user","content":"Hello?"}]}"#,
            "no token to learn from",
        ),
        (long.as_str(), "more than training.max_seq_length 128"),
        (
            r#"{"id":"x","tweet":"t","reply":"r"}"#,
            "key `tweet_normalized`: missing: run pair-dedup, or set data.text: raw",
        ),
        (r#"{"id":"x"}"#, "`tweet` is missing"),
        ("{", "not a JSON object"),
        (r#"{"v":99,"id":"x"}"#, "version 99"),
        (r#"{"messages":"hello"}"#, "key `messages`"),
        (
            r#"{"id":"x","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"r","split":"test"}"#,
            "key `split`",
        ),
    ] {
        tool.file("pairs.jsonl", &with(line));
        train(&tool, "out", &[])
            .exits(3)
            .says("pairs.jsonl:2: ")
            .says(said);
        assert!(!tool.folder().join("out/metrics.jsonl").exists());
    }
    let spells = good.replace("again.", "again <|im_end|>");
    tool.file("pairs.jsonl", &format!("{spells}{good}{spells}"));
    train(&tool, "spells", &["--steps", "1"])
        .exits(0)
        .says("2 rows spell out a special token")
        .says("the first is pairs.jsonl:1, <|im_end|>");
    tool.file("pairs.jsonl", &with("{"));
    train(
        &tool,
        "out",
        &[
            "--steps",
            "1",
            "--max-bad-lines",
            "1",
            "--rejects",
            "bad.jsonl",
        ],
    )
    .exits(0);
    assert!(tool.read("bad.jsonl").contains(r#""line":2"#));
    tool.file("pairs.jsonl", "");
    train(&tool, "empty", &[]).exits(3).says("empty");
    tool.file("pairs.jsonl", &good.replace("\"train\"", "\"eval\""));
    train(&tool, "held-out", &[]).exits(3).says("held out");
}

#[test]
fn settings_that_cannot_work_are_refused_by_key() {
    let tool = tool();
    for (config, said) in [
        (
            "training: {learning_rte: 1}",
            "the nearest known one is `learning_rate`",
        ),
        (
            "training: {learning_rate: 0}",
            "training.learning_rate is 0",
        ),
        ("lora: {rank: 0}", "lora.rank is 0"),
        (
            "training: {batch_size: 9000000000000000000, gradient_accumulation_steps: 9}",
            "more than 4 billion rows a step",
        ),
        ("lora: {dropout: 1.0}", "lora.dropout is 1"),
        ("lora: {target_modules: [q_prj]}", "`q_prj` matches nothing"),
        ("lora: {target_modules: []}", "the list is empty"),
    ] {
        tool.file("train.yaml", config);
        train(&tool, "out", &[]).exits(2).says(said);
        assert!(!tool.folder().join("out").exists());
    }
    tool.file("train.yaml", "");
    tool.run(
        &[
            "--model",
            "nowhere",
            "--data",
            "pairs.jsonl",
            "--out",
            "out",
        ],
        "",
    )
    .exits(2)
    .says("no model in nowhere");
    tool.run(&["--model", MODEL], "").exits(2).says("--data");
    train(&tool, "hot", &["--learning-rate", "2e4", "--steps", "1"]).says("usual is");
}

#[test]
fn replies_can_be_shuffled_as_a_control() {
    let tool = tool();
    train(&tool, "plain", &["--steps", "2"]).exits(0);
    train(&tool, "control", &["--steps", "2", "--shuffled-replies"]).exits(0);
    assert_ne!(
        figures(&tool, "plain", "loss"),
        figures(&tool, "control", "loss")
    );
    // Only what is trained on is shuffled: before the first update the held-out loss is the same.
    assert_eq!(
        figures(&tool, "plain", "eval_loss")[0],
        figures(&tool, "control", "eval_loss")[0]
    );
    assert!(tool.read("control/README.md").contains("not for use"));
}

#[test]
fn examples_of_the_help_run() {
    let tool = tool();
    std::os::unix::fs::symlink(MODEL, tool.folder().join("model")).unwrap();
    check_examples(&tool);
    let short = tool.run(&["-h"], "").exits(0);
    assert!(
        short.stdout.lines().count() <= 60,
        "-h is longer than a page\n{short}"
    );
    assert!(tool.run(&["--man"], "").exits(0).stdout.contains(".TH"));
}

#[test]
fn a_dry_run_shows_the_plan_and_writes_nothing() {
    let tool = tool();
    let run = train(&tool, "out", &["--dry-run"]).exits(0);
    let run = run
        .says("25 rows to train on")
        .says("12 steps of 6 rows")
        .says("lora.rank = 4");
    assert!(
        run.stdout.is_empty() && !tool.folder().join("out").exists(),
        "{run}"
    );
}

#[test]
fn long_rows_are_cut_or_left_out_as_asked_and_kept() {
    let tool = tool();
    let long = format!(
        r#"{{"id":"long","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"{}","split":"train"}}"#,
        "word ".repeat(200)
    );
    tool.file("pairs.jsonl", &format!("{}{long}\n", pairs(8)));
    let with = |how: &str| {
        CONFIG.replace(
            "max_seq_length: 128",
            &format!("max_seq_length: 128, long_rows: {how}"),
        )
    };
    tool.file("train.yaml", &with("truncate"));
    train(&tool, "cut", &["--steps", "1", "--batch-size", "8"])
        .exits(0)
        .says("1 rows are cut")
        .says("8 rows to train on");
    tool.file("train.yaml", &with("skip"));
    train(
        &tool,
        "skipped",
        &["--steps", "1", "--rejects", "rejects.jsonl"],
    )
    .exits(0)
    .says("7 rows to train on");
    let kept: Value = serde_json::from_str(tool.read("rejects.jsonl").trim()).unwrap();
    assert_eq!(
        (&kept["id"], &kept["rejected"]["reasons"][0]["filter"]),
        (&"long".into(), &"row_too_long".into())
    );
}

#[test]
fn prompts_with_completions_are_the_same_rows_as_messages() {
    let tool = tool();
    let rows = |row: fn(usize) -> String| (0..6).map(|i| row(i) + "\n").collect::<String>();
    tool.file(
        "pairs.jsonl",
        &rows(|i| format!(r#"{{"prompt":"Number {i}?","completion":"It is {i}."}}"#)),
    );
    train(&tool, "prompts", &["--steps", "2"]).exits(0);
    tool.file(
        "pairs.jsonl",
        &rows(|i| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"Number {i}?"}},{{"role":"assistant","content":"It is {i}."}}]}}"#
            )
        }),
    );
    train(&tool, "messages", &["--steps", "2"]).exits(0);
    same(&tool, "prompts", "messages");
}

#[test]
fn the_loss_can_be_on_everything() {
    let tool = tool();
    train(&tool, "reply", &["--steps", "1"]).exits(0);
    tool.file("train.yaml", &format!("{CONFIG}\ndata: {{loss_on: all}}\n"));
    train(&tool, "all", &["--steps", "1"]).exits(0);
    // All tokens of the six rows but the first of each.
    let tokens = figures(&tool, "all", "tokens")[0];
    assert_eq!(figures(&tool, "all", "supervised_tokens")[0], tokens - 6.0);
    assert!(figures(&tool, "reply", "supervised_tokens")[0] < tokens - 6.0);
}

/// A learning rate so high that the held-out loss rises after its first fall.
fn overshooting(more: &str) -> String {
    CONFIG
        .replace("max_steps: 12", "max_steps: 40")
        .replace("eval_steps: 4", "eval_steps: 2")
        .replace(
            "learning_rate: 2.0e-3",
            &format!("learning_rate: 3.0e-2, lr_scheduler: constant{more}"),
        )
}

#[test]
fn it_stops_early_and_finishes_with_the_best() {
    let tool = tool();
    tool.file("train.yaml", &overshooting(""));
    train(&tool, "all", &[]).exits(0);
    let losses = figures(&tool, "all", "eval_loss");
    tool.file(
        "train.yaml",
        &overshooting(", early_stopping_patience: 3, load_best_model_at_end: true"),
    );
    let run = train(&tool, "early", &[])
        .exits(0)
        .says("no better held-out loss in 3 evaluations");
    let early = figures(&tool, "early", "eval_loss");
    assert_eq!(
        losses[..early.len()],
        early,
        "the same run as far as it goes"
    );
    let best = early.iter().copied().fold(f64::INFINITY, f64::min);
    let since = early.iter().rev().take_while(|&&loss| loss > best).count();
    assert_eq!(since, 3, "{early:?}");
    let at = (early.len() - 1 - since) * 2;
    let run = run.says(&format!("the adapter is that of step {at},"));

    // The adapter is the one that a run of just so many steps ends with.
    tool.file("train.yaml", &overshooting(""));
    train(&tool, "short", &["--steps", &at.to_string()]).exits(0);
    let weights =
        |out: &str| fs::read(tool.folder().join(out).join("adapter_model.safetensors")).unwrap();
    assert!(
        weights("short") == weights("early"),
        "not the best adapter\n{run}"
    );

    // Killed on the way, it gives up at the same step with the same adapter.
    tool.file(
        "train.yaml",
        &overshooting(", early_stopping_patience: 3, load_best_model_at_end: true"),
    );
    for after in [4, 9] {
        let resume: &[&str] = if after == 4 { &[] } else { &["--resume"] };
        signal_after(&tool, "killed", resume, after, "-KILL");
    }
    train(&tool, "killed", &["--resume"]).exits(0);
    same(&tool, "early", "killed");
}

#[test]
fn a_checkpoint_can_be_asked_for() {
    let tool = tool();
    let config = CONFIG.replace("save_steps: 3", "save_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    for (out, ask) in [("file", "touch"), ("signal", "-USR1")] {
        let mut child = tool
            .command(&arguments(out, &[]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = tool.folder().join(out).join("metrics.jsonl");
        while lines(&metrics) < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        if ask == "touch" {
            fs::write(tool.folder().join(out).join("save-now"), "").unwrap();
        } else {
            let _ = std::process::Command::new("kill")
                .args([ask, &child.id().to_string()])
                .status();
        }
        let mut said = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
        assert!(said.contains(" is saved"), "{said}");
        assert!(!tool.folder().join(out).join("save-now").exists());
        let saved = fs::read_dir(tool.folder().join(out).join("checkpoints"))
            .unwrap()
            .count();
        assert_eq!(saved, 2, "the one asked for and the last");
        same(&tool, "whole", out);
    }
}

#[test]
fn what_needs_held_out_rows_says_so() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(4));
    tool.file(
        "train.yaml",
        &overshooting(", load_best_model_at_end: true"),
    );
    train(&tool, "out", &[]).exits(2).says("no row is held out");
}

/// The CUDA backend on a stand-in for the driver, which runs our kernels on the
/// processor: everything but NVIDIA's own libraries and the chip.
#[test]
fn the_cuda_backend_learns_what_the_processor_learns() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let few = ["--steps", "3", "--batch-size", "1"];
    train(&tool, "cpu", &[&few[..], &["--device", "cpu"]].concat())
        .exits(0)
        .says("computing on");
    train(&tool, "gpu", &[&few[..], &["--device", "cuda:0"]].concat())
        .exits(0)
        .says("computing on cuda:0");
    // bf16 against f32: over seeds 1 to 4 the largest differences were 4.5e-3, 9.1e-3
    // and 2.8e-3 (2026-11-23).
    for (key, limit) in [("loss", 1e-2), ("grad_norm", 3e-2), ("eval_loss", 1e-2)] {
        let (cpu, gpu) = (figures(&tool, "cpu", key), figures(&tool, "gpu", key));
        assert!(!cpu.is_empty() && cpu.len() == gpu.len());
        for (cpu, gpu) in cpu.iter().zip(&gpu) {
            let off = (cpu - gpu).abs() / cpu;
            println!("{key}: {off:.1e}");
            assert!(off < limit, "{key}: {cpu} {gpu}");
        }
    }
    // Their last bits differ, so one does not go on where the other stopped.
    train(
        &tool,
        "gpu",
        &[&few[..], &["--device", "cpu", "--resume"]].concat(),
    )
    .exits(2)
    .says("device cpu, was cuda");
    train(&tool, "none", &["--device", "cuda:7"])
        .exits(4)
        .says("there is no GPU 7");
    assert!(!tool.folder().join("none").exists());
}
