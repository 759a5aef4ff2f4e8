//! A run that is ended anywhere goes on to the same bytes, and knows what is its own.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{
    CONFIG, MODEL, SIGTERM, arguments, figures, heeds, lines, pairs, result, same, signal_after,
    tool, train,
};

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
    // Nor a disk that can be written to.
    let lock = tool.folder().join("out/.lock");
    fs::remove_file(&lock).unwrap();
    train(&tool, "out", &again).exits(0).says("finished");
    assert!(!lock.exists());
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

/// Nor is memory the reason where the run is another one: what would help is not less of it.
#[test]
fn another_run_is_refused_as_such_whatever_its_memory() {
    let tool = tool();
    train(&tool, "out", &["--steps", "3"]).exits(0);
    fs::remove_file(tool.folder().join("out/adapter_model.safetensors")).unwrap();
    let again = ["--steps", "3", "--resume", "--max-memory", "1MB"];
    train(&tool, "out", &again).exits(2).says("MB");
    for more in [&["--seed", "7"][..], &["--seed", "7", "--dry-run"]] {
        train(&tool, "out", &[&again, more].concat())
            .exits(2)
            .says("training.seed = 7, was 42")
            .never_says("max_memory");
    }
}

/// A save that was killed is not the one of a later step, and would lie there for ever.
#[test]
fn what_a_killed_save_left_is_removed() {
    let tool = tool();
    train(&tool, "whole", &["--steps", "3"]).exits(0);
    train(&tool, "out", &["--steps", "3"]).exits(0);
    fs::remove_file(tool.folder().join("out/adapter_model.safetensors")).unwrap();
    for name in ["step-2.tmp", "step-x.tmp"] {
        tool.file(&format!("out/checkpoints/{name}/state.safetensors"), "half");
    }
    // Of another run nothing is touched.
    let other = ["--steps", "3", "--resume", "--seed", "7"];
    train(&tool, "out", &other).exits(2);
    let there = |name: &str| tool.folder().join("out/checkpoints").join(name).exists();
    assert!(there("step-2.tmp"));
    train(&tool, "out", &["--steps", "3", "--resume"]).exits(0);
    assert!(!there("step-2.tmp") && there("step-x.tmp") && there("step-3"));
    same(&tool, "whole", "out");
}

#[test]
fn what_is_finished_needs_neither_memory_nor_room() {
    let tool = tool();
    train(&tool, "out", &["--steps", "1"]).exits(0);
    let again = ["--steps", "1", "--resume", "--max-memory", "1MB"];
    train(&tool, "out", &again).exits(0).says("finished");
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
    // Nor where they cannot be read: the system's reason is told.
    fs::remove_file(tool.folder().join("out/SHA256SUMS")).unwrap();
    fs::create_dir(tool.folder().join("out/SHA256SUMS")).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/SHA256SUMS: is a directory")
        .says("if you trust the adapter, note its sums: `(cd ");
    fs::remove_dir(tool.folder().join("out/SHA256SUMS")).unwrap();
    tool.file("out/SHA256SUMS", &sums);
    let config = tool.folder().join("out/adapter_config.json");
    fs::remove_file(config).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("out/adapter_config.json: cannot be read: No such file")
        .says("; move adapter_model.safetensors away, and --resume writes it again");
    // Words that gen-eval would ask by.
    fs::remove_file(tool.folder().join("out/train.yaml")).unwrap();
    train(&tool, "out", &["--steps", "3", "--resume"])
        .exits(4)
        .says("; move adapter_model.safetensors away, and --resume writes it again");
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
    // In the base that an adapter is merged into: refused, unless it is meant.
    let merge = |out, more: &[&str]| {
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
        tool.run(&[&arguments, more].concat(), "")
    };
    merge("merged", &[]).exits(0).never_says("other files");
    let run = tool.read("whole/run.json");
    let at = run.find("\"model\": \"").unwrap() + 10;
    let other = format!("{}{}{}", &run[..at], "0".repeat(64), &run[at + 64..]);
    tool.file("whole/run.json", &other);
    merge("again", &[])
        .exits(2)
        .says("whole was trained on other files than those of the base")
        .says("000000000000")
        .says("--any-base");
    assert!(!tool.folder().join("again").exists());
    merge("again", &["--any-base"])
        .exits(0)
        .says("warning: whole was trained on other files");
    // In the only checkpoint: what going on without it would mean is said.
    fs::remove_file(tool.folder().join("out/adapter_model.safetensors")).unwrap();
    let steps = |name: &str| name.strip_prefix("step-")?.parse::<u64>().ok();
    let checkpoints = fs::read_dir(tool.folder().join("out/checkpoints")).unwrap();
    let mut checkpoints: Vec<_> = checkpoints
        .map(|entry| entry.unwrap())
        .filter_map(|entry| Some((steps(entry.file_name().to_str()?)?, entry.path())))
        .collect();
    checkpoints.sort();
    let (_, last) = checkpoints.pop().unwrap();
    for (_, path) in checkpoints {
        fs::remove_dir_all(path).unwrap();
    }
    flip(last.join("state.safetensors"));
    train(&tool, "out", &["--resume"])
        .exits(4)
        .says("there is none before it: without it the run begins anew");
}

/// What stands beside a checkpoint's tensors decides where a run goes on.
#[test]
fn a_checkpoint_of_another_step_or_run_is_refused() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    let resumed = |out: &str, change: &dyn Fn(&std::path::Path)| {
        let folder = tool.folder().join(out);
        let other = tool.folder().join("whole");
        Command::new("cp")
            .arg("-r")
            .args([&other, &folder])
            .status()
            .unwrap();
        fs::remove_file(folder.join("adapter_model.safetensors")).unwrap();
        change(&folder);
        train(&tool, out, &["--resume"])
    };
    let newest = |folder: &std::path::Path| folder.join("checkpoints/step-12");
    let state = |folder: &std::path::Path| newest(folder).join("state.json");
    let replaced = |file: PathBuf, from: &str, to: &str| {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&file, text.replace(from, to)).unwrap();
    };
    resumed("step", &|folder| {
        replaced(state(folder), "\"step\":12", "\"step\":10")
    })
    .exits(4)
    .says("step-12: delete it to go on from the one before: state.json is not as it was written");
    resumed("renamed", &|folder| {
        fs::rename(newest(folder), folder.join("checkpoints/step-20")).unwrap()
    })
    .exits(4)
    .says("step-20: delete it to go on from the one before: is of step 12");
    // As a whole, with the figures that belong to it.
    train(&tool, "seed", &["--seed", "7"]).exits(0);
    resumed("foreign", &|folder| {
        let seed = tool.folder().join("seed");
        fs::remove_dir_all(newest(folder)).unwrap();
        Command::new("cp")
            .arg("-r")
            .args([newest(&seed), newest(folder)])
            .status()
            .unwrap();
        fs::copy(seed.join("metrics.jsonl"), folder.join("metrics.jsonl")).unwrap();
    })
    .exits(4)
    .says("is of another run than run.json");
    // Figures from before it, of the same length.
    resumed("figures", &|folder| {
        let figures = folder.join("metrics.jsonl");
        let text = fs::read_to_string(&figures).unwrap();
        fs::write(&figures, text.replacen('3', "4", 1)).unwrap();
    })
    .exits(4)
    .says("metrics.jsonl is not as it was at checkpoints/step-12");
    resumed("cut", &|folder| {
        let run = folder.join("run.json");
        let text = fs::read_to_string(&run).unwrap();
        fs::write(&run, &text[..text.len() / 2]).unwrap();
    })
    .exits(4)
    .says("cut/run.json: EOF while parsing")
    .says("put it back from a copy");
    // What is no file is not waited for.
    for name in [
        "run.json",
        "metrics.jsonl",
        "timing.jsonl",
        "checkpoints/step-12/state.json",
        "checkpoints/step-12/state.safetensors",
    ] {
        let out = format!("pipe-{}", name.rsplit('/').next().unwrap());
        resumed(&out, &|folder| {
            fs::remove_file(folder.join(name)).unwrap();
            let made = Command::new("mkfifo").arg(folder.join(name)).status();
            assert!(made.unwrap().success());
        })
        .exits(4)
        .says(&format!("{name}: is no regular file"));
    }
    // Nothing changed: the same bytes.
    resumed("same", &|_| ()).exits(0);
    same(&tool, "whole", "same");
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
        .says("--log pairs.jsonl: is there and holds something else");
    assert_eq!(tool.read("pairs.jsonl"), before);
}

#[test]
fn rejects_and_log_are_never_written_over_something_else() {
    let tool = tool();
    train(&tool, "first", &["--steps", "1"]).exits(0);
    tool.file("other.jsonl", &pairs(3));
    for file in [
        "train.yaml",
        "other.jsonl",
        "first/adapter_model.safetensors",
        "first/adapter_config.json",
        "first/metrics.jsonl",
        "first/run.json",
    ] {
        let before = fs::read(tool.folder().join(file)).unwrap();
        for flag in ["--rejects", "--log"] {
            train(&tool, "out", &[flag, file])
                .exits(2)
                .says(&format!("{flag} {file}: is there and holds something else"));
            let after = fs::read(tool.folder().join(file)).unwrap();
            assert!(after == before, "{flag} {file}");
        }
    }
    train(&tool, "out", &["--rejects", "nosuch/rejects.jsonl"])
        .exits(2)
        .says("there is no folder nosuch");
    assert!(!tool.folder().join("nosuch").exists());
    assert!(!tool.folder().join("out").exists());
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
        .says("--init-adapter is of another kind: lora.rank_pattern or alpha_pattern is another");
    tool.file(
        "train.yaml",
        &config
            .replace("rank: 4", "rank: 3")
            .replace("use_dora: true, ", ""),
    );
    train(&tool, "other", &["--init-adapter", "whole"])
        .exits(2)
        .says("lora.rank is 4 there and 3 here, lora.use_dora is true there and false here;");
}

/// Checkpoints are written while the training goes on: one that was begun is whole, whatever
/// ends the run meanwhile.
#[test]
fn what_ends_a_run_leaves_the_checkpoint_that_was_begun() {
    let tool = tool();
    let config = CONFIG
        .replace("learning_rate: 2.0e-3", "learning_rate: 1.0e+30")
        .replace("warmup_steps: 2", "warmup_steps: 0, weight_decay: 0.0")
        .replace("save_steps: 3", "save_steps: 1")
        .replace("eval_steps: 4", "eval_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "out", &[]).exits(4).says("no longer a number");
    let found = fs::read_dir(tool.folder().join("out/checkpoints")).unwrap();
    let mut found: Vec<_> = found.map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    assert!(found.contains(&"step-1".into()), "{found:?}");
    for name in found {
        let name = name.into_string().unwrap();
        assert!(!name.ends_with(".tmp"), "{name}");
        let file = tool
            .folder()
            .join("out/checkpoints")
            .join(&name)
            .join("state.json");
        assert!(file.exists(), "{name}");
    }
}

/// One that cannot be written ends the run, soon after its step; those before it are kept.
#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    train(&tool, "out", &["--steps", "12"]).exits(0);
    let out = tool.folder().join("out");
    fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
    for step in ["step-9", "step-12"] {
        fs::remove_dir_all(out.join("checkpoints").join(step)).unwrap();
    }
    let in_its_way = out.join("checkpoints/step-9.tmp");
    fs::write(&in_its_way, "").unwrap();
    train(&tool, "out", &["--resume"])
        .exits(4)
        .says("saving ")
        .says("step-9");
    assert!(out.join("checkpoints/step-6").exists());
    fs::remove_file(in_its_way).unwrap();
    train(&tool, "out", &["--resume"])
        .exits(0)
        .says("going on after step 6");
    same(&tool, "whole", "out");
}
