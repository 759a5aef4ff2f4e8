//! What a step is, however it is laid out, and what a run of them learns.

use std::fs;
use std::path::{Path, PathBuf};

use harness::Tool;
use serde_json::Value;

use crate::{CONFIG, MODEL, copy_model, figures, pairs, result, same, signal_after, tool, train};

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
            .says("`qlora-train inspect 'damaged'`")
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
    // Those who chose it are no judges of it, and the card says so.
    let chose = "The held-out rows chose which step's adapter this is: what is measured on them";
    assert!(tool.read("early/README.md").contains(chose));
    assert!(!tool.read("short/README.md").contains("held-out rows chose"));

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

/// As above: others may have taken what the plan counted on.
#[test]
fn a_gpu_without_the_room_that_was_planned_tells_what_helps() {
    let tool = (tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":")))
        .env("CUDA_STAND_IN", "filling");
    train(&tool, "out", &["--steps", "1", "--device", "cuda:0"])
        .exits(4)
        .says("out of memory: no room for")
        .says("or plan with less by --max-memory");
}

/// Steps follow each other, so their times add up to no more than the whole.
#[test]
fn steps_are_timed_one_behind_the_other() {
    let tool = tool();
    let started = std::time::Instant::now();
    train(&tool, "out", &["--steps", "12", "--batch-size", "1"]).exits(0);
    let whole = started.elapsed().as_secs_f64();
    let text = fs::read_to_string(tool.folder().join("out/timing.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let seconds: Vec<f64> = lines
        .iter()
        .map(|line| line["seconds"].as_f64().unwrap())
        .collect();
    assert_eq!(seconds.len(), 12);
    assert!(
        seconds.iter().sum::<f64>() < whole,
        "{seconds:?} of {whole}"
    );
    for line in &lines {
        let tokens =
            line["tokens_per_second"].as_f64().unwrap() * line["seconds"].as_f64().unwrap();
        // Whole tokens, and not a step of no time.
        assert!(
            (1.0..1e4).contains(&tokens) && (tokens - tokens.round()).abs() < 1e-6,
            "{line}"
        );
        assert!(line["seconds"].as_f64().unwrap() > 1e-5, "{line}");
    }
}

/// As above: a step is queued without waiting for the one before, but for its loss, which is
/// read a step late.
#[test]
fn the_cuda_backend_waits_for_no_step() {
    let tool = tool()
        .env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"))
        .env("CUDA_STAND_IN", "tallied");
    let waits = |out, steps| {
        let few = ["--batch-size", "1", "--device", "cuda:0", "--steps", steps];
        let run = train(&tool, out, &few).exits(0);
        let told = run.stderr.lines().find(|line| line.contains("waited for"));
        let told = told.unwrap_or_else(|| panic!("{}", run.stderr));
        told.split(' ')
            .rev()
            .nth(1)
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    let few = waits("few", "2");
    assert!(few > 0);
    assert_eq!(waits("more", "5"), few);
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
    let again = train(&tool, "out", &[&few[..], &["--resume"]].concat());
    again.exits(0).says("step 1").never_says("last bits");
    assert!(result(&tool, "out") == whole, "other bytes");
    // On another chip, which need not sum alike, it goes on as well, and says so.
    fs::remove_dir_all(out.join("checkpoints/step-2")).unwrap();
    fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
    let tool = tool.env("CUDA_STAND_IN", "another");
    train(&tool, "out", &[&few[..], &["--resume"]].concat())
        .exits(0)
        .says("the run began on stand-in, driver of CUDA 12.4, cuBLAS 120400 and goes on with another stand-in,");
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
        .says(" steps, and is not falling")
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
    train(&tool, "whole", &again)
        .exits(4)
        .says("is not falling");
    tool.file(
        "train.yaml",
        &config.replace("save_steps: 3", "save_steps: 3, spike_factor: 0"),
    );
    train(&tool, "whole", &again).exits(0);
    assert_eq!(figures(&tool, "whole", "loss").len(), 40);
}

/// Easy rows are learnt by heart, and then harder ones come, in the order that was asked for.
#[test]
fn harder_rows_behind_easy_ones_end_no_run() {
    let tool = tool();
    let one = pairs(1);
    let easy = (0..160).map(|i| one.replace("\"p0\"", &format!("\"e{i}\"")));
    let hard = pairs(200).replace("\"split\":\"eval\"", "\"split\":\"train\"");
    let hard = hard.lines().skip(40).map(|line| format!("{line}\n"));
    tool.file("pairs.jsonl", &easy.chain(hard).collect::<String>());
    let config = CONFIG
        .replace("max_steps: 12", "max_steps: 80, shuffle: false")
        .replace("learning_rate: 2.0e-3", "learning_rate: 1.0e-2")
        .replace(
            "batch_size: 3, gradient_accumulation_steps: 2",
            "batch_size: 4, gradient_accumulation_steps: 1",
        )
        .replace("save_steps: 3", "save_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "out", &[])
        .exits(0)
        .says("warning: step 41: loss ");
    let losses = figures(&tool, "out", "loss");
    let (before, after) = (losses[39], &losses[40..60]);
    println!("{before}, then {after:?}");
    assert!(after.iter().all(|&loss| loss > 10.0 * before), "{losses:?}");
}

/// What there was before is no result of a run, however much better it was.
#[test]
fn the_best_is_one_that_was_trained() {
    let tool = tool();
    train(&tool, "learnt", &["--steps", "40"]).exits(0);
    let config = overshooting(", load_best_model_at_end: true, spike_factor: 0");
    tool.file(
        "train.yaml",
        &config.replace("learning_rate: 3.0e-2", "learning_rate: 5.0"),
    );
    let from = ["--init-adapter", "learnt", "--steps", "6"];
    let run = train(&tool, "out", &from).exits(0);
    let losses = figures(&tool, "out", "eval_loss");
    let best = (1..losses.len())
        .min_by(|&a, &b| losses[a].total_cmp(&losses[b]))
        .unwrap();
    assert!(losses[best] > losses[0], "{losses:?}");
    let run = run
        .says(&format!("the adapter is that of step {},", 2 * best))
        .says(&format!(
            "warning: the adapter is worse than what it began from: held-out loss {:.4} after step {}, {:.4} \
             before the first; lower training.learning_rate (5)",
            losses[best],
            2 * best,
            losses[0]
        ));
    let [before, after] = ["learnt", "out"]
        .map(|out| fs::read(tool.folder().join(out).join("adapter_model.safetensors")).unwrap());
    assert!(before != after, "{run}");
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
