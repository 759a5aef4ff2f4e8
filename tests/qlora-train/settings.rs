//! Settings and bases that cannot work are refused by key.

use std::fs;

use harness::check_examples;
use serde_json::Value;

use crate::{CONFIG, MODEL, copy_model, tool, train};

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
fn absurd_numbers_of_steps_are_told_as_such() {
    let tool = tool();
    let most = "1000000000";
    let config = CONFIG.replace("eval_steps: 4", "eval_steps: 1");
    tool.file("train.yaml", &config);
    train(&tool, "out", &["--dry-run", "--steps", most])
        .exits(0)
        .says(" days ");
    let config = config.replace("save_steps: 3", "save_steps: 1, save_total_limit: 0");
    tool.file("train.yaml", &config);
    train(&tool, "out", &["--dry-run", "--steps", most])
        .exits(4)
        .says("training.save_total_limit");
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
            "train.yaml:1: lora.alpha is 1e308; it must be at least 1e-6 and at most 1000000",
        ),
        (
            "lora: {alpha_pattern: {q_proj: 1.0e+308}}",
            "is 1e308; it must be at least 1e-6 and at most 1000000",
        ),
        (
            "lora: {alpha: 1.0e-320}",
            "train.yaml:1: lora.alpha is 1e-320; it must be at least 1e-6 and at most 1000000",
        ),
        (
            "lora: {alpha_pattern: {q_proj: 1.0e-320}}",
            "lora.alpha_pattern.q_proj is 1e-320; it must be at least 1e-6",
        ),
        (
            "training: {max_steps: 18446744073709551615}",
            "train.yaml:1: training.max_steps is 1.8446744073709552e19; it must be above 0 and at most 1000000000",
        ),
        (
            "data: {eval_fraction: 1.0e+308}",
            "data.eval_fraction is 1e308; it must",
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
            "lora: {rank: 4}\ntraining: {batch_size: 262145}",
            "train.yaml:2: training.batch_size × training.gradient_accumulation_steps is 262145 × 4",
        ),
        (
            "training:\n  gradient_accumulation_steps: 2000000",
            "train.yaml:2: training.gradient_accumulation_steps × training.batch_size is 2000000 × ",
        ),
        (
            "training:\n  max_memory: 8 potatoes",
            "train.yaml:2: training.max_memory is \"8 potatoes\"; it must be a size",
        ),
        (
            "training:\n  early_stopping_patience: 2\n  eval_steps: 0",
            "train.yaml:3: training.eval_steps is 0; early_stopping_patience and ",
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

/// Of what is no UTF-8, only what is a setting matters.
#[test]
fn variables_of_any_bytes_are_no_panic() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let tool = tool();
    let odd = OsStr::from_bytes(b"\xff");
    let status = |name: &OsStr| {
        let mut command = tool.command(&["--print-config"]);
        let output = command.env(name, odd).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    assert_eq!(status(OsStr::new("FOO")).0, Some(0));
    assert_eq!(status(OsStr::from_bytes(b"F\xff")).0, Some(0));
    let (code, said) = status(OsStr::new("PAIRS__LORA__RANK"));
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("environment variable PAIRS__LORA__RANK: is not UTF-8"),
        "{said}"
    );
}

#[test]
fn a_variable_that_looks_like_a_setting_is_told() {
    let others = [
        ("PAIRS_LORANK", "9"),
        ("PAIRS_HOME", "x"),
        ("PAIRS_JUDGE_MODEL", "x"),
    ];
    let tool = others
        .iter()
        .fold(tool(), |tool, (name, value)| tool.env(name, value));
    let tool = tool
        .env("PAIRS_LORA_RANK", "9")
        .env("PAIRS__LORA__ALPHA", "7");
    let run = tool
        .run(&["--print-config"], "")
        .exits(0)
        .says("PAIRS_LORA_RANK is no setting: PAIRS__LORA__RANK would be");
    assert_eq!(run.stderr.matches("is no setting").count(), 1, "{run}");
}
