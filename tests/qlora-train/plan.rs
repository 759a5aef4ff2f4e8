//! What is planned and estimated before the first step: memory, room, time.

use std::fs;
use std::process::{Command, Stdio};

use harness::Run;
use serde_json::Value;

use crate::{MODEL, pairs, same, signal_after, tool, train};

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
fn a_dry_run_saves_no_base() {
    let tool = tool();
    let save = ["--dry-run", "--save-quantized", "four"];
    let alone = [&["--model", MODEL][..], &save].concat();
    tool.run(&alone, "")
        .exits(0)
        .says("the base in 4 bits would take ")
        .says(" in four; --dry-run writes nothing");
    train(&tool, "out", &save).exits(0);
    let written: Vec<_> = fs::read_dir(tool.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| !["train.yaml", "pairs.jsonl"].contains(&name.to_str().unwrap()))
        .collect();
    assert!(written.is_empty(), "{written:?}");
}

/// The one would come into the other, and is not there whole or not at all then.
#[test]
fn a_base_is_not_saved_where_the_run_is() {
    let tool = tool();
    std::os::unix::fs::symlink(".", tool.folder().join("here")).unwrap();
    for (out, saved) in [
        ("both", "both"),
        ("both", "here/./both/"),
        ("above/out", "above"),
        ("above", "above/four"),
        ("new/../out", "out/four"),
    ] {
        for more in [&[][..], &["--resume"], &["--dry-run"]] {
            train(&tool, out, &[&["--save-quantized", saved], more].concat())
                .exits(2)
                .says(&format!(
                    "--save-quantized {saved} and --out {out} lie one in"
                ));
        }
        for folder in ["both", "above", "out"] {
            assert!(!tool.folder().join(folder).exists(), "{folder}");
        }
    }
    let beside = ["--save-quantized", "out-4", "--steps", "1"];
    train(&tool, "out", &beside).exits(0);
    assert!(tool.folder().join("out-4/model.safetensors").exists());
    train(&tool, "out", &[&beside[..], &["--resume"]].concat())
        .exits(0)
        .says("the base in 4 bits is in out-4 already");
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

/// What a huge line takes is given back, and is no fault of the plan or of threads.
#[test]
fn memory_that_only_reading_took_is_said_as_such() {
    let tool = tool();
    let noted = format!(r#""id":"p0","note":"{}""#, "x".repeat(15 << 20));
    let rows = pairs(31).replacen(r#""id":"p0""#, &noted, 1);
    tool.file("pairs.jsonl", &rows);
    train(&tool, "out", &["--steps", "1", "--max-memory", "1GB"])
        .exits(0)
        .says("warning: memory taken: ")
        .says(" MB, while the rows were read; planned: ")
        .says("reading takes room that the training, which alone is planned, has again")
        .never_says("threads (--threads)");
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
