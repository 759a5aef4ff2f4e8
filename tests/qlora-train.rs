//! qlora-train through the real binary, on the demo's model.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Run, Tool, behind, check_examples};
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

#[test]
fn noise_and_moments_in_8_bits_are_resumed_to_the_byte() {
    let tool = tool();
    train(&tool, "plain", &[]).exits(0);
    let with = |more: &str| CONFIG.replace("training: {", &format!("training: {{{more}, "));
    for (out, more) in [
        ("noise", "neftune_noise_alpha: 5"),
        ("bytes", "optim: adamw_8bit"),
        ("both", "neftune_noise_alpha: 5, optim: adamw_8bit"),
    ] {
        tool.file("train.yaml", &with(more));
        train(&tool, out, &[]).exits(0);
    }
    let mut killed = 0;
    for after in [1, 6, 9, 13] {
        let resume: &[&str] = match after {
            1 => &[],
            _ => &["--resume"],
        };
        killed += usize::from(signal_after(&tool, "killed", resume, after, "-KILL") == Some(-9));
    }
    assert!(killed >= 3, "only {killed} kills met a running tool");
    train(&tool, "killed", &["--resume"]).exits(0);
    same(&tool, "both", "killed");

    // Noise is on the first step's loss already, and on no evaluation by itself.
    let [plain, noise, bytes] = ["plain", "noise", "bytes"].map(|out| figures(&tool, out, "loss"));
    assert!(noise[0] != plain[0] && bytes[0] == plain[0] && bytes[11] != plain[11]);
    let evals = ["plain", "noise", "bytes"].map(|out| figures(&tool, out, "eval_loss"));
    assert!(evals[1][0] == evals[0][0] && evals[1][1] != evals[0][1]);
    // Measured on 2026-11-23, on the way from 12.1 to 8.2: 7.8e-4 and 5.1e-4.
    for (a, b) in [(&plain, &bytes), (&evals[0], &evals[2])] {
        let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        let apart = apart.fold(0.0, f64::max);
        println!("moments in 8 bits: losses {apart:.1e} apart");
        assert!(apart < 4e-3, "{apart}");
    }

    let size = |out: &str| {
        let path = format!("{out}/checkpoints/step-12/state.safetensors");
        fs::metadata(tool.folder().join(path)).unwrap().len() as f64
    };
    // A parameter and two moments of it: 4 + 2 · 65/64 bytes, for 4 + 8.
    let share = size("bytes") / size("plain");
    assert!((share - (4.0 + 65.0 / 32.0) / 12.0).abs() < 0.01, "{share}");
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
    for signal in ["-TERM", "-INT"] {
        let out = format!("out{signal}");
        let code = signal_after(&tool, &out, &[], 3, signal);
        assert_eq!(code, Some(130), "{signal}");
        let saved = fs::read_dir(tool.folder().join(&out).join("checkpoints"))
            .unwrap()
            .count();
        assert!(saved > 0, "{signal}: nothing saved");
        train(&tool, &out, &["--resume"]).exits(0);
        same(&tool, "whole", &out);
    }
}

/// The tests themselves may run under nohup: env(1) says what holds.
#[test]
fn a_hangup_saves_unless_hangups_are_ignored() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    for (out, how, expected) in [
        ("heeded", "--default-signal=HUP", 130),
        ("ignored", "--ignore-signal=HUP", 0),
    ] {
        let command = behind("env", &[how], &tool.command(&arguments(out, &[])));
        let code = signal_to(command, (&tool, out), 3, "-HUP");
        assert_eq!(code, Some(expected), "{how}");
        if code == Some(130) {
            let saved = fs::read_dir(tool.folder().join(out).join("checkpoints"));
            assert!(saved.unwrap().count() > 0, "nothing saved");
            train(&tool, out, &["--resume"]).exits(0);
        }
        same(&tool, "whole", out);
    }
}

/// What goes on when a connection is lost: several signals, and figures that cannot be
/// written any more.
#[test]
fn a_terminal_that_goes_away_leaves_a_saved_run() {
    let tool = tool();
    // There is always a step whose figures are still to be written.
    let config = CONFIG
        .replace("save_steps: 3", "save_steps: 0")
        .replace("eval_steps: 4", "eval_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    let command = tool.command(&arguments("out", &["--log", "log"]));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<String> = words.map(|w| format!("'{}'", w.display())).collect();
    let line = format!("exec env --default-signal=HUP {}", line.join(" "));
    let mut script = Command::new("script");
    script
        .args(["--quiet", "--command", &line, "/dev/null"])
        .current_dir(tool.folder())
        .env_clear()
        .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let there = Command::new("script").arg("--version").output().is_ok();
    assert!(there, "a terminal needs script(1), of util-linux");
    // When script(1) is gone nobody holds the terminal's other end.
    let code = signal_to(script, (&tool, "out"), 3, "-KILL");
    assert_eq!(code, Some(-9));
    let started = Instant::now();
    while !tool.read("log").contains("interrupted; step") {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{}",
            tool.read("log")
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    train(&tool, "out", &["--resume"])
        .exits(0)
        .says("going on after step");
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

/// `⌈epochs · rows / rows a step⌉`, one at least.
#[test]
fn epochs_are_so_many_steps() {
    let tool = tool();
    let with = |epochs: &str| {
        let config = CONFIG.replace("max_steps: 12", &format!("num_epochs: {epochs}"));
        tool.file("train.yaml", &config);
    };
    // 25 rows, six a step.
    for (epochs, steps) in [("0.24", 1), ("0.5", 3), ("1", 5), ("1.44", 6), ("2", 9)] {
        with(epochs);
        train(&tool, "dry", &["--dry-run"])
            .exits(0)
            .says("25 rows to train on")
            .says(&match steps {
                1 => "1 step of 6 rows".into(),
                _ => format!("{steps} steps of 6 rows"),
            })
            .never_says("is seen");
    }
    with("0.2");
    train(&tool, "dry", &["--dry-run"]).exits(0).says(
        "a step is 6 rows (training.batch_size 3 × gradient_accumulation_steps 2), and there are 25 to train on: \
         each is seen 0.24 times, not 0.2 (training.num_epochs)",
    );
    with("1");
    train(&tool, "out", &[]).exits(0);
    assert_eq!(figures(&tool, "out", "loss").len(), 5);
    let rows: f64 = figures(&tool, "out", "epoch")[4];
    assert_eq!(rows, 30.0 / 25.0, "the last step is whole");
}

#[test]
fn the_newest_checkpoints_are_kept_as_many_as_asked() {
    let tool = tool();
    for (limit, kept) in [(1, 6..=6), (3, 4..=6), (0, 1..=6)] {
        let saves = format!("save_steps: 1, save_total_limit: {limit}");
        tool.file("train.yaml", &CONFIG.replace("save_steps: 3", &saves));
        let out = format!("out{limit}");
        train(&tool, &out, &["--steps", "6"]).exits(0);
        let folder = fs::read_dir(tool.folder().join(out).join("checkpoints")).unwrap();
        let mut found: Vec<String> = folder
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        let expected: Vec<String> = kept.map(|step| format!("step-{step}")).collect();
        assert_eq!(found, expected, "save_total_limit: {limit}");
    }
}

/// Qwen's base models end a text, not a turn.
#[test]
fn a_base_model_is_refused_before_anything_is_written() {
    let tool = tool();
    let model = tool.folder().join("base");
    copy_model(&model);
    fs::remove_file(model.join("generation_config.json")).unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let ends = config.replace("\"eos_token_id\": 1512", "\"eos_token_id\": 1510");
    assert_ne!(ends, config);
    fs::remove_file(model.join("config.json")).unwrap();
    fs::write(model.join("config.json"), ends).unwrap();
    let run = ["--model", "base", "--data", "pairs.jsonl", "--out", "out"];
    tool.run(&run, "")
        .exits(4)
        .says("base/tokenizer.json: has <|im_end|> as id 1512")
        .says("not among the model's `eos_token_id`s [1510]: a base model")
        .says("use the instruct model");
    assert!(!tool.folder().join("out").exists());
    // Nor without a template, which some have not.
    fs::remove_file(model.join("chat_template.jinja")).unwrap();
    let settings = fs::read(model.join("tokenizer_config.json")).unwrap();
    let mut settings: Value = serde_json::from_slice(&settings).unwrap();
    settings.as_object_mut().unwrap().remove("chat_template");
    fs::remove_file(model.join("tokenizer_config.json")).unwrap();
    tool.file("base/tokenizer_config.json", &settings.to_string());
    tool.run(&run, "").exits(4).says("not a chat model");
    assert!(!tool.folder().join("out").exists());
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
    let card = tool.read("out/README.md");
    for words in [
        "# A LoRA adapter that answers in chats",
        "8 rows to train on, 0 held out: 8 conversations (",
        "had the system prompts that they came with",
        "It writes replies in the manner",
        "| Began from | fresh values |",
    ] {
        assert!(card.contains(words), "{words}\n{card}");
    }
    for words in ["tweet", "normalised", "likes", "no system prompt"] {
        assert!(!card.contains(words), "{words}\n{card}");
    }

    // Beside pairs, and from another adapter.
    let mixed = pairs(3) + &row(1) + "\n" + r#"{"prompt":"Hm?","completion":"Yes."}"#;
    tool.file("pairs.jsonl", &mixed);
    let more = ["--steps", "1", "--init-adapter", "out"];
    train(&tool, "mixed", &more).exits(0);
    let card = tool.read("mixed/README.md");
    for words in [
        "3 tweets with replies, normalised text; 1 prompts with completions; 1 conversations",
        "There is no system prompt.",
        "| Began from | another adapter (SHA-256 of its values ",
    ] {
        assert!(card.contains(words), "{words}\n{card}");
    }
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
    let other_head = ["--steps", "3", "--resume", "--lm-head", "nf4"];
    train(&tool, "out", &other_head)
        .exits(2)
        .says(r#"model.lm_head = "nf4", was "as_stored""#);
    tool.file("pairs.jsonl", &pairs(30));
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(2)
        .says("the data changed");
    assert_eq!(before, result(&tool, "out"));
}

/// The parts of a pattern are settings of which one can go, or all be there in another
/// order, in which another one fits first.
#[test]
fn another_pattern_is_another_run() {
    let tool = tool();
    let with = |pattern: &str| {
        let patterns = format!("dropout: 0.1, alpha_pattern: {{{pattern}}}");
        tool.file("train.yaml", &CONFIG.replace("dropout: 0.1", &patterns));
    };
    let again = ["--steps", "1", "--resume"];
    let (both, turned) = (
        r"'.*\.[qv]_proj': 4, '.*\.[qk]_proj': 16",
        r"'.*\.[qk]_proj': 16, '.*\.[qv]_proj': 4",
    );
    with(both);
    train(&tool, "out", &["--steps", "1"]).exits(0);
    train(&tool, "out", &again).exits(0).says("finished");
    let before = result(&tool, "out");
    for (pattern, said) in [
        (
            r"'.*\.[qv]_proj': 4",
            r"no lora.alpha_pattern..*\.[qk]_proj, was 16",
        ),
        (turned, "lora.alpha_pattern has another order"),
        (
            &format!("{both}, o_proj: 2"),
            "lora.alpha_pattern.o_proj = 2.0, which that run did not have",
        ),
    ] {
        with(pattern);
        train(&tool, "out", &again).exits(2).says(said);
    }
    assert_eq!(before, result(&tool, "out"));
    // A value that looks like a setting is told whole.
    let system = |prompt: &str| format!("{CONFIG}\ndata: {{system_prompt: {prompt}}}\n");
    tool.file("train.yaml", &system("a = b"));
    train(&tool, "system", &["--steps", "1"]).exits(0);
    tool.file("train.yaml", &system("a = c"));
    train(&tool, "system", &again)
        .exits(2)
        .says(r#"data.system_prompt = "a = c", was "a = b";"#);
}

/// The last update's values are on no step's loss.
#[test]
fn an_adapter_that_is_no_number_is_not_published() {
    let tool = tool();
    let hot = ["--steps", "1", "--learning-rate", "1e38"];
    // The largest rates that are taken; the B factors go beyond 32 bits.
    let config = CONFIG.replace("warmup_steps: 2", "warmup_steps: 0");
    let config = config.replace("dropout: 0.1", "dropout: 0.1, lr_ratio: 1000000");
    tool.file("train.yaml", &config);
    for (out, rows, said) in [
        ("held-out", 31, "step 1: the held-out loss is no longer"),
        ("none", 4, "step 1: a value of the adapter is no longer"),
    ] {
        tool.file("pairs.jsonl", &pairs(rows));
        train(&tool, out, &hot)
            .exits(4)
            .says(said)
            .says("lower training.learning_rate");
        let adapter = format!("{out}/adapter_model.safetensors");
        assert!(!tool.folder().join(adapter).exists());
    }
}

/// The demo's model in a folder of its own, to be spoilt.
fn copy_model(to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(MODEL).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Makes a tensor's first value NaN, in BF16 or F32, as long as the file was before.
fn put_nan(path: &Path, name: &str) {
    let mut bytes = fs::read(path).unwrap();
    let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..head]).unwrap();
    let nan = match header[name]["dtype"].as_str().unwrap() {
        "BF16" => 0x7fc0_u16.to_le_bytes().to_vec(),
        dtype => {
            assert_eq!(dtype, "F32");
            f32::NAN.to_le_bytes().to_vec()
        }
    };
    let at = head + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + nan.len()].copy_from_slice(&nan);
    fs::write(path, bytes).unwrap();
}

/// Where nothing was learnt yet, the weights are at fault and not the learning rate.
#[test]
fn weights_that_are_no_numbers_are_told_as_such() {
    let tool = tool();
    let model = tool.folder().join("damaged");
    copy_model(&model);
    put_nan(&model.join("model.safetensors"), "model.norm.weight");
    let with = |out| ["--model", "damaged", "--data", "pairs.jsonl", "--out", out];
    for (out, rows, said) in [
        ("held-out", 31, "step 0: the held-out loss is no longer"),
        ("none", 4, "step 1: the loss is no longer a number"),
    ] {
        tool.file("pairs.jsonl", &pairs(rows));
        tool.run(&with(out), "")
            .exits(4)
            .says(said)
            .says("`qlora-train inspect damaged`")
            .says("put the model's files into damaged again, and train in another folder")
            .never_says("--init-adapter")
            .never_says("lower training.learning_rate");
    }
    // What it says to do helps.
    let found = tool.run(&["inspect", "--strict", "damaged"], "").exits(1);
    let said = "problem: model.safetensors: model.norm.weight holds values that are no numbers";
    assert!(found.stdout.contains(said), "{found}");
    put_nan(
        &model.join("model.safetensors"),
        "model.layers.3.mlp.up_proj.weight",
    );
    let found = tool.run(&["inspect", "--strict", "damaged"], "").exits(1);
    let said = "model.layers.3.mlp.up_proj.weight and 1 more weights hold values";
    assert!(found.stdout.contains(said), "{found}");
    fs::copy(
        Path::new(MODEL).join("model.safetensors"),
        model.join("model.safetensors"),
    )
    .unwrap();
    tool.run(&["inspect", "--strict", "damaged"], "").exits(0);
    let few = [&with("again")[..], &["--steps", "1"]].concat();
    tool.run(&few, "").exits(0);

    // An adapter to begin from may be at fault as well.
    let adapter = tool.folder().join("again/adapter_model.safetensors");
    let name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight";
    put_nan(&adapter, name);
    fs::remove_file(tool.folder().join("again/SHA256SUMS")).unwrap();
    let from = [&with("from")[..], &["--init-adapter", "again"]].concat();
    tool.run(&from, "").exits(4).says(&format!(
        "again/adapter_model.safetensors: tensor `{name}` holds values that are no numbers"
    ));
    let found = tool.run(&["inspect", "again", "--model", "damaged"], "");
    let said = format!("values that are not finite, `{name}` the first");
    assert!(found.stdout.contains(&said), "{found}");
}

#[test]
fn bench_refuses_what_no_machine_has() {
    let tool = tool();
    for (flag, value, said) in [
        (
            "--rank",
            "129",
            "--rank 129: more than the shape is wide (128)",
        ),
        (
            "--rank",
            "9000000000000000000",
            "more than the shape is wide",
        ),
        ("--side", "9000000000000000000", "of at most 16384³"),
        ("--side", "16392", "of at most 16384³"),
        ("--side", "12", "a multiple of 8"),
        (
            "--tokens",
            "64,9000000000000000000",
            "at most 1048576 tokens",
        ),
        ("--prompts", "9000000000000000000", "--prompts "),
        (
            "--new-tokens",
            "4000000000",
            "--new-tokens 4000000000: more than the shape has positions",
        ),
    ] {
        let started = Instant::now();
        tool.run(
            &["bench", "--shape", "tiny", "--device", "cpu", flag, value],
            "",
        )
        .exits(2)
        .says(flag)
        .says(said);
        assert!(started.elapsed() < Duration::from_secs(5), "{flag} {value}");
    }
}

/// Bytes that a line of /proc/meminfo gives in kB.
fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kb = line.unwrap().trim_start_matches(':').trim();
    1024 * kb.trim_end_matches(" kB").parse::<u64>().unwrap()
}

/// What a processor's memory cannot hold is told before the system ends the process for it.
#[test]
fn bench_leaves_out_what_the_memory_cannot_hold() {
    let tool = tool();
    let bench = |more: &str| {
        let all = format!("bench --device cpu --side 8 --steps 1 --prompts 0 {more}");
        tool.run(&all.split(' ').collect::<Vec<_>>(), "")
    };
    // 64 layers of 975.2 MB in bf16, two tables of 1.56 GB, and 23 MB of norms and angles.
    if meminfo("MemTotal") < 60_000_000_000 {
        let started = Instant::now();
        bench("--shape qwen3-32b --dense")
            .exits(2)
            .says("--shape qwen3-32b: its weights need 65.55 GB, and ")
            .says("with --layers it has fewer");
        assert!(started.elapsed() < Duration::from_secs(5));
    } else {
        println!("this machine holds all weights that bench has");
    }
    if meminfo("MemTotal") < 31_000_000_000 {
        let run = bench("--shape tiny --tokens 32,1048576").exits(0);
        let run = run.says("--tokens 1048576: left out, for they need ");
        assert_eq!(run.records().len(), 1, "{run}");
    } else {
        println!("this machine holds all steps that bench has of a tiny shape");
    }
    tool.file("lengths.json", "[[18446744073709551615, 2]]");
    bench("--shape tiny --lengths lengths.json")
        .exits(2)
        .says("--lengths lengths.json: pairs of at least one token each, of at most 512 together");
}

#[test]
fn what_is_finished_needs_neither_memory_nor_room() {
    let tool = tool();
    train(&tool, "out", &["--steps", "1"]).exits(0);
    let again = ["--steps", "1", "--resume", "--max-memory", "1MB"];
    train(&tool, "out", &again).exits(0).says("finished");
}

#[test]
fn absurd_numbers_of_steps_are_told_as_such() {
    let tool = tool();
    let most = u64::MAX.to_string();
    let config = CONFIG.replace("eval_steps: 4", "eval_steps: 1");
    tool.file("train.yaml", &config);
    train(&tool, "out", &["--dry-run", "--steps", &most])
        .exits(0)
        .says(" days ");
    let config = config.replace("save_steps: 3", "save_steps: 1, save_total_limit: 0");
    tool.file("train.yaml", &config);
    train(&tool, "out", &["--dry-run", "--steps", &most])
        .exits(4)
        .says("training.save_total_limit");
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
        (r#"{"id":"x","reply":"r"}"#, "`tweet` is missing"),
        (
            r#"{"id":"x","text":"r"}"#,
            "`tweet` with `reply`, `messages`, or `prompt` with `completion`",
        ),
        (
            r#"{"messages":[{"role":"developer","content":"d"},{"role":"assistant","content":"a"}]}"#,
            "key `messages`: turn 1: no role `developer`: there are system, user, assistant, tool; write `system`?",
        ),
        (
            r#"{"messages":[{"role":"user","content":[]},{"role":"assistant","content":"a"}]}"#,
            "key `messages`: turn 1: `content` is a list of parts",
        ),
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
        .says("is spelled out in 2 rows; the first is")
        .says("the first is pairs.jsonl:1, <|im_end|>");
    let empty = r#"{"prompt":"p","completion":""}"#;
    tool.file("pairs.jsonl", &format!("{good}{empty}\n{good}{empty}\n"));
    train(&tool, "silent", &["--steps", "1"])
        .exits(0)
        .says("an empty reply, from which the model learns to say nothing, is in 2 rows")
        .says("the first is pairs.jsonl:2")
        .says("climbs from 0 for 2 steps, and the run has 1 step: it is 0 throughout, and nothing is learnt");
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
    train(&tool, "empty", &[])
        .exits(3)
        .says("pairs.jsonl: no rows");
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
        (
            "lora:\n  dropout: 0.1\n  rank: 0",
            "train.yaml:3: lora.rank is 0; it must be above 0",
        ),
        (
            "lora: {alpha: 1.0e+308}",
            "train.yaml:1: lora.alpha is 1e308; it must be above 0 and at most 1000000",
        ),
        (
            "lora: {alpha_pattern: {q_proj: 1.0e+308}}",
            "it must be above 0 and at most 1000000",
        ),
        ("lora: {lr_ratio: 1.0e+300}", "lora.lr_ratio is 1e300"),
        ("training: {learning_rate: 1.0e+39}", "is 1e39"),
        ("training: {num_epochs: 1.0e+300}", "is 1e300"),
        (
            "training: {weight_decay: 1.0e+300}",
            "training.weight_decay is 1e300; it must be at least 0 and at most 1000",
        ),
        (
            "training: {neftune_noise_alpha: 1.0e+300}",
            "training.neftune_noise_alpha is 1e300; it must be at least 0 and at most 1000000",
        ),
        (
            "training: {max_grad_norm: -1}",
            "training.max_grad_norm is -1",
        ),
        (
            "data: {eval_fraction: 1}",
            "data.eval_fraction is 1; it must be at least 0 and below 1",
        ),
        (
            "training: {batch_size: 9000000000000000000, gradient_accumulation_steps: 9}",
            "more than 1048576 rows a step",
        ),
        (
            "training: {batch_size: 262145}",
            "batch_size × training.gradient_accumulation_steps is 262145 × 4",
        ),
        ("lora: {dropout: 1.0}", "lora.dropout is 1"),
        (
            "training: {neftune_noise_alpha: -5}",
            "training.neftune_noise_alpha is -5",
        ),
        (
            "lora: {target_modules: [q_prj]}",
            "`q_prj`, which matches nothing",
        ),
        ("lora: {target_modules: []}", "is empty: nothing would be"),
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
    train(&tool, "hot", &["--learning-rate", "2e4", "--steps", "1"])
        .says("warning: training.learning_rate is 20000: usual is 1e-5 to 1e-3");
    train(&tool, "cold", &["--learning-rate", "1e-300", "--dry-run"])
        .exits(0)
        .says("warning: training.learning_rate is 1e-300: usual is");
    train(&tool, "out", &["--learning-rate", "0"])
        .exits(2)
        .says("flag for learning-rate: training.learning_rate is 0");
    let variable = tool.env("PAIRS__LORA__ALPHA", "1e308");
    train(&variable, "out", &[])
        .exits(2)
        .says("environment variable PAIRS__LORA__ALPHA: lora.alpha is 1e308");
}

/// 0 turns it off, as in transformers.
#[test]
fn gradients_can_be_left_as_they_are() {
    let tool = tool();
    for (out, norm) in [("off", "0"), ("far", "1000000"), ("on", "0.01")] {
        tool.file(
            "train.yaml",
            &CONFIG.replace("save_steps: 3", &format!("max_grad_norm: {norm}")),
        );
        train(&tool, out, &["--steps", "4"]).exits(0);
    }
    assert!(tool.read("off/README.md").contains("gradients unclipped"));
    let losses = ["off", "far", "on"].map(|out| figures(&tool, out, "loss"));
    assert_eq!(losses[0], losses[1]);
    assert_ne!(losses[0], losses[2]);
}

/// The sides of rows that have none: by their conversation or texts, told to whoever
/// evaluates.
#[test]
fn a_drawn_side_is_the_rows_own() {
    let tool = tool();
    let unsplit = (pairs(40).replace(r#","split":"train""#, "")).replace(r#","split":"eval""#, "");
    let config = |fraction: &str| {
        let data = format!("{CONFIG}data: {{eval_fraction: {fraction}}}\n");
        tool.file("train.yaml", &data);
    };
    let sides = |out: &str| -> Vec<(String, String)> {
        let text = tool.read(&format!("{out}/rows.jsonl"));
        assert!(!text.contains("Day") && !text.contains("like"), "{text}");
        let lines = text.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            (text("row"), text("split"))
        });
        lines.collect()
    };
    let run = |out: &str| train(&tool, out, &["--steps", "1"]).exits(0);
    config("0.25");
    tool.file("pairs.jsonl", &unsplit);
    run("one").never_says("holds out none");
    let one = sides("one");
    let held_out = one.iter().filter(|(_, split)| split == "eval").count();
    assert_eq!(one.len(), 40);
    assert!((4..=16).contains(&held_out), "{held_out}");

    // Neither order nor neighbours matter, and rows of the same texts stay together.
    let mut lines: Vec<&str> = unsplit.lines().rev().collect();
    lines.extend(unsplit.lines());
    tool.file("pairs.jsonl", &lines.join("\n"));
    run("two");
    assert_eq!(sides("two"), one);
    // What an adapter goes on from was trained on rows as well.
    let more = one
        .iter()
        .map(|(row, _)| format!("{{\"row\":\"{row}\",\"split\":\"train\"}}\n"));
    fs::write(
        tool.folder().join("two/rows.jsonl"),
        more.collect::<String>(),
    )
    .unwrap();
    fs::remove_file(tool.folder().join("two/SHA256SUMS")).unwrap();
    train(&tool, "three", &["--steps", "1", "--init-adapter", "two"]).exits(0);
    assert!(sides("three").iter().all(|(_, split)| split == "train"));
    let sums = Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(tool.folder().join("three"))
        .output()
        .unwrap();
    assert!(sums.status.success(), "{sums:?}");
    assert!(String::from_utf8_lossy(&sums.stdout).contains("rows.jsonl: OK"));

    config("0.0001");
    tool.file("pairs.jsonl", &unsplit);
    train(&tool, "none", &["--dry-run"])
        .exits(0)
        .says("data.eval_fraction 0.0001 of 40 rows holds out none");
    config("0.9999");
    for (rows, said) in [(40, "all 40 rows"), (1, "the only row")] {
        let some: Vec<&str> = unsplit.lines().take(rows).collect();
        tool.file("pairs.jsonl", &some.join("\n"));
        train(&tool, "all", &["--dry-run"])
            .exits(3)
            .says(&format!(
                "data.eval_fraction 0.9999 happens to hold out {said}"
            ))
            .never_says("`split: eval`");
    }
}

/// What asks for a checkpoint and cannot be taken away ends no run, and what asks for one
/// in the last moments is not left behind.
#[test]
fn a_request_that_cannot_be_heeded_ends_nothing() {
    let tool = tool();
    train(&tool, "out", &[]).exits(0);
    let file = |name: &str| tool.folder().join("out").join(name);
    fs::remove_file(file("adapter_model.safetensors")).unwrap();
    fs::write(file("save-now"), "").unwrap();
    train(&tool, "out", &["--resume"]).exits(0);
    assert!(!file("save-now").exists());

    fs::remove_file(file("adapter_model.safetensors")).unwrap();
    fs::remove_dir_all(file("checkpoints/step-12")).unwrap();
    fs::create_dir_all(file("save-now/full")).unwrap();
    let run = train(&tool, "out", &["--resume"]).exits(0);
    assert_eq!(
        run.stderr.matches("it cannot be taken away").count(),
        1,
        "{run}"
    );
}

/// As many as there are on standard output; and little of what is no warning with -q.
#[test]
fn the_last_line_counts_the_lines() {
    let tool = tool();
    let run = train(&tool, "out", &["--quiet"]).exits(0);
    let lines = run.stdout.lines().count();
    assert!(lines > 12, "with the evaluations: {lines}");
    run.says(&format!("in 31, out {lines}, rejected 0"))
        .never_says("hashing")
        .never_says("4 bits");
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
    let bad = format!("{}{{\n", pairs(8));
    tool.file("pairs.jsonl", &bad);
    let more = [
        "--dry-run",
        "--max-bad-lines",
        "1",
        "--rejects",
        "bad.jsonl",
    ];
    train(&tool, "out", &more).exits(0).says("1 malformed");
    assert!(!tool.folder().join("bad.jsonl").exists());
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
        .says("1 row cut to training.max_seq_length")
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
    for (name, prompts) in result(&tool, "prompts").into_iter().skip(1) {
        let messages = fs::read(tool.folder().join("messages").join(&name)).unwrap();
        assert!(prompts == messages, "{name} differs");
    }
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
    // The second time between its best evaluation and the last: a line a step, one
    // for every other step's evaluation, and one before the first.
    for after in [4, at + at / 2 + 4] {
        let resume: &[&str] = if after == 4 { &[] } else { &["--resume"] };
        let code = signal_after(&tool, "killed", resume, after, "-KILL");
        assert_eq!(code, Some(-9), "it was to be killed after {after} lines");
    }
    train(&tool, "killed", &["--resume"])
        .exits(0)
        .says("going on after step");
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
            let _ = Command::new("kill")
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

/// As above: what is random and what is kept comes back as it was.
#[test]
fn the_cuda_backend_resumes_noise_and_moments_in_8_bits_to_the_byte() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let config = CONFIG
        .replace(
            "training: {",
            "training: {neftune_noise_alpha: 5, optim: adamw_8bit, ",
        )
        .replace("save_steps: 3", "save_steps: 1");
    tool.file("train.yaml", &config);
    tool.file("pairs.jsonl", &pairs(6));
    let few = ["--steps", "2", "--batch-size", "1", "--device", "cuda:0"];
    train(&tool, "out", &few).exits(0);
    let whole = result(&tool, "out");
    let out = tool.folder().join("out");
    fs::remove_dir_all(out.join("checkpoints/step-2")).unwrap();
    fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
    train(&tool, "out", &[&few[..], &["--resume"]].concat())
        .exits(0)
        .says("step 1");
    assert!(result(&tool, "out") == whole, "other bytes");
}

#[test]
fn a_prompt_template_is_the_users_turn() {
    let tool = tool();
    let rows = |i: usize| {
        format!(
            r#"{{"id":"p{i}","author":"Ada {i}","tweet":"t","reply":"r","tweet_normalized":"Day {i}.","reply_normalized":"Good day {i}.","split":"train"}}"#
        ) + "\n"
    };
    let with = |template: &str| {
        let line = serde_json::to_string(template).unwrap();
        tool.file(
            "train.yaml",
            &format!("{CONFIG}\ndata: {{prompt_template: {line}}}\n"),
        );
    };
    tool.file("pairs.jsonl", &(0..6).map(rows).collect::<String>());
    with("Reply to {{ author }}:\n{{ tweet }}");
    train(&tool, "template", &["--steps", "2"]).exits(0);
    let card = tool.read("template/README.md");
    assert!(
        card.contains("```jinja\nReply to {{ author }}:\n{{ tweet }}\n```"),
        "{card}"
    );

    // The same as the prompts written out.
    let prompts = (0..6).map(|i| {
        format!(r#"{{"prompt":"Reply to Ada {i}:\nDay {i}.","completion":"Good day {i}."}}"#) + "\n"
    });
    tool.file("prompts.jsonl", &prompts.collect::<String>());
    let prompts = ["--data", "prompts.jsonl", "--steps", "2"];
    tool.file("train.yaml", CONFIG);
    let mut arguments = arguments("prompts", &[]);
    arguments.retain(|&a| a != "--data" && a != "pairs.jsonl");
    tool.run(&[&arguments[..], &prompts].concat(), "").exits(0);
    assert_eq!(
        tool.read("template/metrics.jsonl"),
        tool.read("prompts/metrics.jsonl")
    );

    with("{{ autor }}: {{ tweet }}");
    train(&tool, "out", &[])
        .exits(3)
        .says("pairs.jsonl:1: key `autor`: missing, and the prompt template names it; the nearest there is `author`");
    for (template, said) in [
        ("{{ tweet", "data.prompt_template: syntax error"),
        (
            "{{ tweet }}{{ reply }}",
            "`reply`, which is what the model is to learn",
        ),
        ("{ tweet }", "names no field of the pair"),
        (
            "{% if tweet_lang %}{{ tweet_lang|nothing }}{% endif %}{{ tweet }}",
            "data.prompt_template: unknown filter",
        ),
        (
            "{{ tweet }}{{ nothing() }}",
            "data.prompt_template: unknown function",
        ),
    ] {
        with(template);
        train(&tool, "out", &[]).exits(2).says(said);
        assert!(!tool.folder().join("out").exists());
    }
    with("{% if tweet_likes %}{{ tweet }}{% endif %}");
    train(&tool, "out", &[])
        .exits(3)
        .says("pairs.jsonl:1: key `prompt_template`: it renders as nothing for this row");
    with("Say: {{ tweet }}");
    let elsewhere = arguments
        .iter()
        .map(|&a| if a == "prompts" { "dry" } else { a });
    let dry: Vec<&str> = elsewhere
        .chain(["--data", "prompts.jsonl", "--dry-run"])
        .collect();
    tool.run(&dry, "")
        .exits(0)
        .says("data.prompt_template words tweets only: 6 rows");
    // It is part of what a run is.
    with("{{ tweet }}!");
    train(&tool, "template", &["--steps", "2", "--resume"])
        .exits(2)
        .says(r#"data.prompt_template = "{{ tweet }}!", was "Reply to"#);
}

#[test]
fn a_run_that_leaves_for_good_is_stopped_and_loses_nothing() {
    let tool = tool();
    // The demo's model knows nothing of these rows; a loss that can leave is learnt first.
    let config = CONFIG
        .replace("max_steps: 12", "max_steps: 60")
        .replace("learning_rate: 2.0e-3", "learning_rate: 3.0e-2");
    tool.file("train.yaml", &config);
    train(&tool, "learnt", &[]).exits(0);
    let config = CONFIG
        .replace("max_steps: 12", "max_steps: 40")
        .replace("warmup_steps: 2", "warmup_steps: 30")
        .replace(
            "learning_rate: 2.0e-3",
            "learning_rate: 50.0, lr_scheduler: constant",
        );
    tool.file("train.yaml", &config);
    let from = ["--init-adapter", "learnt"];
    let run = train(&tool, "whole", &from)
        .exits(4)
        .says("in the steps before")
        .says("far above")
        .says("for 20 steps")
        .says("lower training.learning_rate (50)");
    let warnings = run.stderr.matches("in the steps before").count();
    let losses = figures(&tool, "whole", "loss");
    let stopped = losses.len();
    assert!((20..40).contains(&stopped), "{stopped}");
    assert!((1..5).contains(&warnings), "one warning a spike\n{run}");
    let calm = losses[0];
    assert!(
        losses[stopped - 20..].iter().all(|&loss| loss > 1.5 * calm),
        "{losses:?}"
    );
    let saved = format!("whole/checkpoints/step-{stopped}");
    assert!(tool.folder().join(&saved).exists(), "{saved}");
    assert!(
        !tool
            .folder()
            .join("whole/adapter_model.safetensors")
            .exists()
    );

    // Killed on the way and resumed, it stops at the same step.
    let again = [&from[..], &["--resume"]].concat();
    for (i, after) in [9, 20].into_iter().enumerate() {
        let more = if i == 0 { &from[..] } else { &again };
        signal_after(&tool, "killed", more, after, "-KILL");
    }
    train(&tool, "killed", &again).exits(4);
    assert_eq!(
        tool.read("whole/metrics.jsonl"),
        tool.read("killed/metrics.jsonl")
    );
    // It is the user's to go on all the same.
    train(&tool, "whole", &again).exits(4).says("for 20 steps");
    tool.file(
        "train.yaml",
        &config.replace("save_steps: 3", "save_steps: 3, spike_factor: 0"),
    );
    train(&tool, "whole", &again).exits(0);
    assert_eq!(figures(&tool, "whole", "loss").len(), 40);
}

#[test]
fn the_card_says_where_the_rows_come_from_and_how_the_replies_were_found() {
    let tool = tool();
    let summary = |name: &str, read: u64, written: u64, reasons: &str| {
        let text = format!(
            r#"{{"v":1,"tool":"{name}","in":{read},"out":{written},"rejected":{},"bad_lines":1,"reasons":{reasons},"settings":["{name}.key = a|b"],"signature":"tool:{name}"}}"#,
            read - written - 1
        );
        tool.file(&format!("{name}.json"), &text);
    };
    summary("validate", 60, 40, r#"{"too_short":12,"too | odd":9}"#);
    summary("dedup", 40, 31, r#"{"exact":8}"#);
    let from = [
        "--provenance",
        "validate.json",
        "--provenance",
        "dedup.json",
    ];
    let few = ["--steps", "2"];
    let run = train(&tool, "out", &[&from[..], &few].concat()).exits(0);
    assert!(
        !run.stderr.contains("is --provenance that of this data"),
        "{run}"
    );
    let card = tool.read("out/README.md");
    for line in [
        "| `validate` | 60 | 40 | `too_short` 12, `too \\| odd` 9, malformed 1 |",
        "| `dedup` | 40 | 31 | `exact` 8, malformed 1 |",
        "| `qlora-train` | 31 | 31 | none |",
        "validate.key = a|b\ndedup.key = a|b",
        "The base model's is not recorded",
        "| 0 | ",
        "| 2 | ",
        "Not recorded: `make eval`",
    ] {
        assert!(card.contains(line), "{line}\n{card}");
    }
    let front = card.split("---\n").nth(1).unwrap();
    let front: serde_json::Map<String, Value> = serde_saphyr::from_str(front).unwrap();
    assert_eq!(front["base_model"], MODEL);

    // Another's summary is not believed in silence, and no summary at all is said.
    train(
        &tool,
        "other",
        &["--provenance", "validate.json", "--steps", "1"],
    )
    .exits(0)
    .says("validate wrote 40 rows, but pairs.jsonl has 31");
    train(&tool, "none", &["--steps", "1"]).exits(0);
    assert!(
        tool.read("none/README.md")
            .contains("before is not recorded (`--provenance`)")
    );
    tool.file("odd.json", "{}");
    train(&tool, "odd", &["--provenance", "odd.json"])
        .exits(2)
        .says("--provenance odd.json: no summary");
    train(&tool, "odd", &["--provenance", "no.json"])
        .exits(2)
        .says("No such file");

    // Evaluation comes later; it may come again.
    let test = |kind: &str, more: &str| {
        format!(
            r#"{{"v":1,"a":"systems.base","b":"systems.lora","metric":"nll","test":"{kind}","n":88,"mean_a":3.5,"mean_b":2.25,{more},"signature":"tool:sigtest|alpha:0.01|seed:42"}}"#
        ) + "\n"
    };
    let lines = test("permutation", r#""p_holm":0.0002"#)
        + &test("bootstrap", r#""p_holm":null,"ci_low":1.0,"ci_high":1.5"#);
    tool.file("tests.jsonl", &lines);
    for _ in 0..2 {
        tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
            .exits(0);
        let added = tool.read("out/README.md");
        assert!(
            added.contains("| `nll` | 3.500 | 2.250 | -1.500 to -1.000 | 0.0002 |"),
            "{added}"
        );
        assert!(added.contains("`lora` against `base`, 88 held-out tweets"));
        assert!(added.contains("| 99% of `lora` − `base` |"), "{added}");
        // Nothing but the section is another.
        let outside = |card: &str| {
            let (before, rest) = card.split_once("<!-- evaluation -->").unwrap();
            let (_, after) = rest.split_once("<!-- end of evaluation -->").unwrap();
            [before.to_owned(), after.to_owned()]
        };
        assert_eq!(outside(&card), outside(&added));
    }
    assert!(
        !card.contains("likes"),
        "no filter by likes is known\n{card}"
    );
    tool.file(
        "validate.json",
        &tool
            .read("validate.json")
            .replace(r#""tool":"validate""#, r#""tool":"pair-validate""#),
    );
    train(&tool, "filtered", &[&from[..], &few].concat()).exits(0);
    let filtered = tool.read("filtered/README.md");
    assert!(
        filtered.contains("which passed the filters above") && filtered.contains("goes by likes"),
        "{filtered}"
    );
    let own = "# Mine\n\nText.\n";
    tool.file("out/README.md", own);
    tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
        .exits(0);
    let added = tool.read("out/README.md");
    assert!(
        added.starts_with(own) && added.contains("## Evaluation") && added.contains("3.500"),
        "{added}"
    );
    // The run is as finished as before.
    train(&tool, "out", &[&from[..], &few, &["--resume"]].concat())
        .exits(0)
        .says("finished");
    tool.run(&["card", "--evaluation", "tests.jsonl", "nowhere"], "")
        .exits(2)
        .says("nowhere/README.md");
    tool.file("tests.jsonl", "{}\n");
    tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
        .exits(3)
        .says("tests.jsonl:1: key `a` is missing");
}

#[test]
fn a_damaged_adapter_is_not_taken_for_a_finished_one() {
    let tool = tool();
    train(&tool, "whole", &["--steps", "3"]).exits(0);
    train(&tool, "out", &["--steps", "3"]).exits(0);
    let weights = tool.folder().join("out/adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/adapter_model.safetensors: is not as it was written")
        .says("move adapter_model.safetensors away, and --resume writes it again from step 3")
        .never_says("sha256sum");
    // Without the sums nobody can tell.
    let sums = tool.read("out/SHA256SUMS");
    fs::remove_file(tool.folder().join("out/SHA256SUMS")).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/SHA256SUMS: No such file")
        .says("if you trust the adapter, note its sums: `(cd ")
        .says("; else move adapter_model.safetensors away");
    let config = sums.lines().find(|line| line.ends_with("_config.json"));
    tool.file("out/SHA256SUMS", config.unwrap());
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/SHA256SUMS: has no sum of adapter_model.safetensors");
    // The remedy that it names is one.
    let aside = tool.folder().join("aside.safetensors");
    fs::rename(&weights, aside).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"]).exits(0);
    same(&tool, "whole", "out");
    let sums = Command::new("sha256sum")
        .args(["--check", "--quiet", "SHA256SUMS"])
        .current_dir(tool.folder().join("out"))
        .status();
    assert!(sums.unwrap().success());
}

/// Without checkpoints nothing writes the adapter again: to begin anew would cost the run.
#[test]
fn an_adapter_without_checkpoints_is_never_given_up() {
    let tool = tool();
    train(&tool, "out", &["--steps", "3"]).exits(0);
    let kept = result(&tool, "out");
    fs::remove_dir_all(tool.folder().join("out/checkpoints")).unwrap();
    fs::remove_file(tool.folder().join("out/SHA256SUMS")).unwrap();
    let refused = train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/SHA256SUMS: No such file")
        .never_says("--resume writes it again")
        .never_says("delete");
    let (_, command) = refused.stderr.split_once(": `(").unwrap();
    let command = format!("({}", command.split_once('`').unwrap().0);
    let noted = Command::new("sh")
        .args(["-c", &command])
        .current_dir(tool.folder())
        .status();
    assert!(noted.unwrap().success(), "{command}");
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(0)
        .says("finished");
    assert_eq!(kept, result(&tool, "out"));

    let weights = tool.folder().join("out/adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("is not as it was written")
        .says("; no checkpoint is left to write it again from")
        .says("RUN=new")
        .never_says("sha256sum");
}

#[test]
fn a_flipped_bit_is_seen_wherever_it_is() {
    let flip = |path: PathBuf| {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).unwrap();
    };
    let tool = tool();
    let config = CONFIG.replace("save_steps: 3", "save_steps: 2");
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    // In the kept base: made anew.
    let cache = tool.folder().join("data/cache/quantized");
    let mut kept = fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let kept = kept.find(|path| path.is_dir()).unwrap();
    flip(kept.join("model.safetensors"));
    train(&tool, "out", &[])
        .exits(0)
        .says("is not as it was made: made anew");
    same(&tool, "whole", "out");
    // In a checkpoint: refused, and the one before serves.
    fs::remove_file(tool.folder().join("out/adapter_model.safetensors")).unwrap();
    flip(
        tool.folder()
            .join("out/checkpoints/step-12/state.safetensors"),
    );
    train(&tool, "out", &["--resume"])
        .exits(4)
        .says("out/checkpoints/step-12: delete it to go on from the one before")
        .says("state.safetensors is not as it was written");
    fs::remove_dir_all(tool.folder().join("out/checkpoints/step-12")).unwrap();
    // Times alone are no reason to stop.
    fs::write(tool.folder().join("out/timing.jsonl"), "").unwrap();
    train(&tool, "out", &["--resume"]).exits(0);
    same(&tool, "whole", "out");
    // In the adapter: inspect says so.
    flip(tool.folder().join("out/adapter_model.safetensors"));
    let run = tool.run(&["inspect", "--strict", "out"], "").exits(1);
    assert!(run.stdout.contains("is not as it was written"), "{run}");
    assert!(run.stderr.ends_with("out: 1 problem\n"), "{run}");
    // In the base that an adapter is merged into: said.
    let merge = |out| {
        let arguments = [
            "merge",
            "--no-check",
            "--model",
            MODEL,
            "--adapter",
            "whole",
            "--out",
            out,
        ];
        tool.run(&arguments, "").exits(0)
    };
    merge("merged").never_says("other bytes");
    let run = tool.read("whole/run.json");
    let at = run.find("\"model\": \"").unwrap() + 10;
    let other = format!("{}{}{}", &run[..at], "0".repeat(64), &run[at + 64..]);
    tool.file("whole/run.json", &other);
    merge("again").says("whole was trained on other bytes than");
}

#[test]
fn the_data_is_never_written() {
    let tool = tool();
    let before = tool.read("pairs.jsonl");
    let bad = ["--max-bad-lines", "1", "--rejects", "./pairs.jsonl"];
    train(&tool, "out", &bad)
        .exits(2)
        .says("--rejects ./pairs.jsonl: is the file of --data too");
    train(&tool, "out", &["--log", "pairs.jsonl"])
        .exits(2)
        .says("--log pairs.jsonl: is the file of --data too");
    assert_eq!(tool.read("pairs.jsonl"), before);
}

#[test]
fn a_folder_of_something_else_is_left_alone() {
    let tool = tool();
    fs::create_dir(tool.folder().join("mine")).unwrap();
    tool.file("mine/README.md", "precious");
    train(&tool, "mine", &["--resume"])
        .exits(2)
        .says("--out mine has README.md and no run.json");
    let text = fs::read_to_string(tool.folder().join("mine/README.md")).unwrap();
    assert_eq!(text, "precious");
}

#[test]
fn too_few_rows_are_refused_as_what_they_are() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(1));
    train(&tool, "out", &["--shuffled-replies"])
        .exits(3)
        .says("pairs.jsonl:1: the only row to train on has no other's reply to take");
    let skip = CONFIG.replace("max_seq_length: 128", "max_seq_length: 8, long_rows: skip");
    tool.file("train.yaml", &skip);
    train(&tool, "out", &[])
        .exits(3)
        .says("every row is longer than training.max_seq_length");
    assert!(!tool.folder().join("out").exists());
}

/// Each kill at a moment of its own: anywhere between start and end of what is left,
/// loading and saving included.
#[test]
fn killed_at_random_moments_a_run_leaves_the_same_bytes() {
    let tool = tool();
    // 25 rows, 4 a step: epochs end inside steps. Evaluation and saving out of step.
    let config = CONFIG
        .replace("max_steps: 12", "max_steps: 60")
        .replace("batch_size: 3", "batch_size: 2")
        .replace("save_steps: 3", "save_steps: 4")
        .replace("eval_steps: 4", "eval_steps: 7");
    tool.file("train.yaml", &config);
    let started = Instant::now();
    train(&tool, "whole", &[]).exits(0);
    let whole = started.elapsed();
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let mut state = seed | 1;
    let mut uniform = || {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let (mut kills, mut resumed) = (0, 0);
    let mut moments = Vec::new();
    for round in 0..200 {
        assert!(round < 199, "seed {seed}: no end after {moments:?}");
        let out = tool.folder().join("killed");
        let resume: &[&str] = if out.exists() { &["--resume"] } else { &[] };
        let mut child = tool
            .command(&arguments("killed", resume))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(tool.folder().join("said")).unwrap())
            .spawn()
            .unwrap();
        // Some five kills; the longer it goes on, the longer a start is let live.
        let wait = whole.mul_f64(uniform() * (0.4 + 0.03 * f64::from(round)));
        moments.push(wait);
        let spawned = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if spawned.elapsed() >= wait {
                break None;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        resumed += u32::from(tool.read("said").contains("going on after step"));
        match status {
            Some(status) => {
                assert_eq!(status.code(), Some(0), "seed {seed}: {moments:?}");
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    println!("{kills} kills, {resumed} from a checkpoint, a whole run takes {whole:?}");
    assert!(
        kills > 0 && resumed > 0,
        "seed {seed}: {kills} kills, {resumed} from a checkpoint: {moments:?}"
    );
    for name in [
        "README.md",
        "metrics.jsonl",
        "adapter_model.safetensors",
        "adapter_config.json",
        "train.yaml",
        "run.json",
        "SHA256SUMS",
    ] {
        let bytes = |out: &str| fs::read(tool.folder().join(out).join(name)).unwrap();
        assert!(
            bytes("whole") == bytes("killed"),
            "seed {seed}: {name} differs after kills at {moments:?}"
        );
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

/// While the evaluation before the first step is under way. Who asks twice means it; a
/// closed terminal sends what it sends.
#[test]
fn a_second_signal_ends_it_at_once_but_a_second_hangup_does_not() {
    let tool = tool();
    let held_out = pairs(700).replace("\"train\"", "\"eval\"");
    tool.file("pairs.jsonl", &(pairs(6) + &held_out.replace("\"p", "\"e")));
    for (signals, saved) in [
        (["-INT", "-INT"], false),
        (["-TERM", "-TERM"], false),
        (["-TERM", "-INT"], false),
        (["-HUP", "-HUP"], true),
        (["-HUP", "-TERM"], true),
        (["-TERM", "-HUP"], true),
    ] {
        let out = signals.concat().replace('-', "");
        let command = tool.command(&arguments(&out, &[]));
        let mut child = behind("env", &["--default-signal=HUP"], &command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The last of them that gets a handler.
        while !heeds(child.id(), SIGHUP) && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        for signal in signals {
            let pid = child.id().to_string();
            let sent = Command::new("kill").args([signal, &pid]).status();
            assert!(sent.unwrap().success(), "{out}: ended before {signal}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{out}");
        let zero = tool.folder().join(&out).join("checkpoints/step-0");
        assert_eq!(zero.exists(), saved, "{out}");
    }
}

#[test]
fn a_run_saved_before_its_first_step_goes_on_to_the_same_bytes() {
    let tool = tool();
    // Many held-out rows, so that the evaluation before the first step takes a while.
    let mut rows = pairs(31);
    let held_out = pairs(400)
        .replace("\"train\"", "\"eval\"")
        .replace("\"p", "\"e");
    rows.push_str(&held_out);
    tool.file("pairs.jsonl", &rows);
    tool.file(
        "train.yaml",
        &CONFIG.replace("eval_steps: 4", "eval_steps: 0"),
    );
    train(&tool, "whole", &[]).exits(0);
    for (out, signal) in [("asked", "-KILL"), ("ended", "-TERM")] {
        let mut child = tool
            .command(&arguments(out, &[]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut running = || child.try_wait().unwrap().is_none();
        let zero = tool.folder().join(out).join("checkpoints/step-0");
        if signal == "-KILL" {
            while !tool.folder().join(out).join("run.json").exists() && running() {
                std::thread::yield_now();
            }
            fs::write(tool.folder().join(out).join("save-now"), "").unwrap();
            while !zero.exists() && running() {
                std::thread::yield_now();
            }
        }
        while !heeds(child.id(), SIGTERM) && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let _ = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status();
        let code = child.wait().unwrap().code();
        assert!(
            zero.exists(),
            "{out}: no checkpoint of step 0, exit {code:?}"
        );
        if signal == "-TERM" {
            assert_eq!(code, Some(130));
            let only = fs::read_dir(zero.parent().unwrap()).unwrap().count();
            assert_eq!(only, 1, "it was to end before its first step");
        }
        train(&tool, out, &["--resume"])
            .exits(0)
            .says("going on after step");
        same(&tool, "whole", out);
    }
}

#[test]
fn rescaled_rows_and_ranks_of_their_own_are_resumed_to_the_byte() {
    let tool = tool();
    let lora = r"use_dora: true, lr_ratio: 4, rank_pattern: {down_proj: 2}, alpha_pattern: {'4\..*': 6},
        target_modules: '.*\.([234])\.(self_attn\.[qv]|mlp\.down)_proj'";
    let config = CONFIG.replace("dropout: 0.1", &format!("dropout: 0.1, {lora}"));
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    for (after, more) in [(5, &[][..]), (11, &["--resume"])] {
        assert_eq!(
            signal_after(&tool, "killed", more, after, "-KILL"),
            Some(-9)
        );
    }
    train(&tool, "killed", &["--resume"]).exits(0);
    same(&tool, "whole", "killed");
    let losses = figures(&tool, "whole", "loss");
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");

    let text = tool.run(&["inspect", "whole", "--model", MODEL, "--strict"], "");
    let text = text.exits(0).stdout;
    for words in [
        "DoRA",
        "4; 2 for down_proj",
        "alpha 8; 6 for 4",
        "loads here     yes",
    ] {
        assert!(text.contains(words), "{words} not in {text}");
    }
    // It goes on from where it ended, if the settings are the same.
    train(&tool, "more", &["--init-adapter", "whole"]).exits(0);
    let [before, after] = ["whole", "more"].map(|out| figures(&tool, out, "eval_loss"));
    assert_eq!(after[0], before[before.len() - 1]);
    tool.file(
        "train.yaml",
        &config.replace("down_proj: 2", "down_proj: 3"),
    );
    train(&tool, "other", &["--init-adapter", "whole"])
        .exits(2)
        .says("--init-adapter: its ranks, alphas, target modules or DoRA");
}

/// A size in a line of the plan, in bytes: `memory: 12.3 MB in all` under `memory:`.
#[track_caller]
fn size_after(run: &Run, words: &str) -> f64 {
    let at = run
        .stderr
        .find(words)
        .unwrap_or_else(|| panic!("no {words:?}\n{run}"));
    let mut parts = run.stderr[at + words.len()..].split_whitespace();
    let number: f64 = parts.next().unwrap().parse().unwrap();
    number
        * match parts.next().map(|unit| unit.trim_end_matches(';')) {
            Some("GB") => 1e9,
            Some("MB") => 1e6,
            unit => panic!("{unit:?}\n{run}"),
        }
}

/// `--max-memory` for a part of what the run takes by itself.
fn part_of(whole: &Run, part: f64) -> String {
    format!("{:.0}", part * size_after(whole, "memory: "))
}

#[test]
fn less_memory_keeps_fewer_layers_and_every_bit() {
    let tool = tool();
    let whole = train(&tool, "whole", &[]).exits(0);
    let less = part_of(&whole, 0.75);
    train(&tool, "less", &["--max-memory", &less])
        .exits(0)
        .says("of 5 layers")
        .says("1 pass a step");
    same(&tool, "whole", "less");
}

#[test]
fn passes_stay_as_long_as_the_run_began_with() {
    let tool = tool();
    let whole = train(&tool, "whole", &["--dry-run"]).exits(0);
    let little = part_of(&whole, 0.5);
    let little = ["--max-memory", little.as_str()];
    train(&tool, "little", &little)
        .exits(0)
        .says("passes a step");
    let run: Value = serde_json::from_str(&tool.read("little/run.json")).unwrap();
    assert!(run["pass_tokens"].as_u64().unwrap() < 512, "{run}");
    // Killed, and gone on with where there is room for longer ones, not where there is less.
    let code = signal_after(&tool, "moved", &little, 5, "-KILL");
    train(&tool, "moved", &["--resume", "--max-memory", "2MB"])
        .exits(2)
        .says("the run's passes of up to ");
    train(&tool, "moved", &["--resume"]).exits(0);
    same(&tool, "little", "moved");
    assert_eq!(tool.read("little/run.json"), tool.read("moved/run.json"));
    assert_eq!(code, Some(-9), "it was to be killed on its way");
}

#[test]
fn memory_that_does_not_suffice_is_refused_with_what_would() {
    let tool = tool();
    let whole = train(&tool, "whole", &["--dry-run"]).exits(0);
    let refused = train(&tool, "out", &["--max-memory", "1MB"]).exits(2);
    refused
        .says("tokens needs")
        .says("training.max_memory allows 1.0 MB; what would help: training.optim: adamw_8bit");
    // Found out before anything is read.
    let wrong = ["--max-memory", "a lot", "--model", "nowhere"];
    let wrong = [&wrong[..], &["--data", "none.jsonl", "--out", "out"]].concat();
    tool.run(&wrong, "")
        .exits(2)
        .says("it must be a size such as 8GB");
    // A longer row than any other: shorter ones would fit.
    let long = pairs(1).replace("again.", &"again and ".repeat(40));
    tool.file("pairs.jsonl", &format!("{}{long}", pairs(30)));
    let enough = part_of(&whole, 0.36);
    let refused = train(&tool, "out", &["--max-memory", &enough, "--dry-run"]).exits(2);
    let refused = refused.says("(training.max_seq_length)");
    let fits = refused.stderr.split("rows of up to ").nth(1).unwrap();
    let fits: usize = fits.split(' ').next().unwrap().parse().unwrap();
    assert!((20..130).contains(&fits), "{refused}");
    assert!(!tool.folder().join("out").exists());
}

#[test]
fn a_disk_without_room_is_refused_before_the_start() {
    let tool = tool();
    let disk = tool.folder().join("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&disk)
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("only root may mount a disk of 1 MB: left to the unit test");
        return;
    }
    let run = train(&tool, "disk/out", &[]);
    let written = disk.join("out").exists();
    let unmounted = Command::new("umount").arg(&disk).status();
    assert!(unmounted.unwrap().success());
    run.exits(4)
        .says("the disk has 1.0 MB free")
        .says("training.save_total_limit");
    assert!(!written);
}

#[test]
fn the_plan_is_shown_unless_there_is_to_be_quiet() {
    let tool = tool();
    let run = train(&tool, "out", &["--dry-run"]).exits(0);
    for words in [
        "12 steps of 6 rows",
        "1 pass a step, of ",
        "packing: nothing is padding; of padded batches of 3 rows ",
        "memory: ",
        " the insides of layers",
        "time: about ",
    ] {
        assert!(run.stderr.contains(words), "{words}\n{run}");
    }
    let run = train(&tool, "out", &["-q", "--log", "log"]).exits(0);
    assert!(run.stderr.lines().count() <= 5, "{run}");
    assert!(!run.stderr.contains("lora."), "{run}");
    assert!(tool.read("log").contains("lora.rank = 4"));
    // What was planned, and how it came out: on so small a model the program's own code,
    // which is not counted, weighs more than a few percent.
    let log = tool.read("log");
    assert!(
        log.contains("estimated: ") && log.contains("planned: "),
        "{log}"
    );
}

#[test]
fn the_plan_is_what_a_gpu_is_asked_for() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    tool.file("pairs.jsonl", &pairs(4));
    let few = ["--steps", "1", "--batch-size", "1", "--device", "cuda:0"];
    let all = train(&tool, "all", &few).exits(0);
    // The stand-in has 1 GiB, of which a part stays free.
    let all = all.says(" of 750.9 MB that can be had");
    let less = part_of(&all, 0.85);
    let less = [&few[..], &["--max-memory", &less]].concat();
    let less = train(&tool, "less", &less).exits(0).says("of 5 layers");
    same(&tool, "all", "less");
    for run in [all, less] {
        let (planned, taken) = (size_after(&run, "planned: "), size_after(&run, "taken: "));
        assert!((planned / taken - 1.0).abs() < 0.05, "{run}");
    }
}

/// README's rows and command, with the demo's model for Qwen3-8B.
#[test]
fn the_readmes_chat_example_learns() {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
    let readme = fs::read_to_string(readme).unwrap();
    let tool = Tool::new(env!("CARGO_BIN_EXE_qlora-train"));
    let (variables, command) = readme
        .lines()
        .find_map(|line| {
            line.split_once("qlora-train ")
                .filter(|(_, c)| c.contains("--data chat.jsonl"))
        })
        .unwrap();
    let tool = variables.split_whitespace().fold(tool, |tool, variable| {
        let (name, value) = variable.split_once('=').unwrap();
        tool.env(name, value)
    });
    let command = command.replace("Qwen/Qwen3-8B", MODEL);
    for (form, out) in [("{\"messages\"", "turns"), ("{\"prompt\"", "prompts")] {
        let rows = readme
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with(form));
        let rows: String = rows.map(|row| format!("{row}\n")).collect();
        tool.file("chat.jsonl", &rows);
        let command = command.replace("output/models/chat", out);
        let arguments: Vec<&str> = command.split_whitespace().collect();
        tool.run(&arguments, "")
            .exits(0)
            .never_says("nothing is learnt");
        let losses = figures(&tool, out, "eval_loss");
        assert!(losses.last() < losses.first(), "{losses:?}");
        let losses = figures(&tool, out, "loss");
        assert!(losses.last() < losses.first(), "{losses:?}");
    }
}
