//! `qlora-train bench`.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::tool;

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
fn the_machine_is_measured_on_random_weights() {
    let tool = tool();
    let sizes = [
        "--tokens",
        "50,200",
        "--steps",
        "2",
        "--prompts",
        "3",
        "--new-tokens",
        "4",
    ];
    let how = [
        "bench", "--shape", "tiny", "--slots", "1,2", "--device", "cpu",
    ];
    let run = tool.run(&[&how[..], &sizes].concat(), "").exits(0);
    let figures: Vec<Value> = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<_> = figures
        .iter()
        .map(|f| f["figure"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["train", "train", "generate", "generate"]);
    for figure in &figures {
        for rate in ["tokens_per_s", "product_tflops", "copy_gb_per_s"] {
            assert!(figure[rate].as_f64().unwrap() > 0.0, "{figure}");
        }
        // 2 layers of q 128², k and v 64 · 128, o 128², three of 384 · 128.
        assert_eq!(
            figure["parameters"],
            2 * (2 * 16_384 + 2 * 8_192 + 3 * 49_152)
        );
    }
    for figure in &figures[..2] {
        let [first, last] = [0, 1].map(|i| figure["losses"][i].as_f64().unwrap());
        // Of 1,024 tokens a random model prefers none.
        assert!(
            (first - 1024f64.ln()).abs() < 0.2 && last < first,
            "{figure}"
        );
    }
    for figure in &figures[2..] {
        assert!(figure["distinct_tokens"].as_u64().unwrap() > 2, "{figure}");
    }
    for (figure, most) in figures.iter().zip([50, 200]) {
        let [tokens, labelled] = ["tokens", "labelled"].map(|k| figure[k].as_u64().unwrap());
        assert!(
            // The shortest row no longer fits.
            tokens <= most && tokens + 17 > most && labelled < tokens,
            "{figure}"
        );
        // Forward and backward by the input, two operations a parameter each: of the last
        // layer's o, gate, up and down, as of the head, only at the tokens that predict.
        let predicting = 128 * 128 + 3 * 49_152;
        let operations =
            4 * ((393_216 - predicting) * tokens + (predicting + 1024 * 128) * labelled);
        let seconds = figure["seconds_per_step"].as_f64().unwrap();
        let share = operations as f64 / seconds / figure["product_tflops"].as_f64().unwrap() / 1e12;
        let told = figure["roofline"].as_f64().unwrap();
        assert!((told - share).abs() < 1e-9 * share, "{told} {share}");
    }
    tool.run(
        &["bench", "--shape", "tiny", "--device", "cpu", "--profile"],
        "",
    )
    .exits(2)
    .says("perf record");
    for flag in ["--slots", "--rank", "--layers", "--tokens"] {
        tool.run(&["bench", "--shape", "tiny", flag, "0"], "")
            .exits(2)
            .says(flag);
    }
    tool.run(&["bench", "--shape", "qwen3-9b"], "")
        .exits(2)
        .says("qwen3-8b");
    let lengths = |more: &[&str]| -> Vec<[u64; 2]> {
        let run = tool.run(&[&["bench", "--print-lengths"], more].concat(), "");
        serde_json::from_str(&run.exits(0).stdout).unwrap()
    };
    let ours = lengths(&[]);
    let all: u64 = ours.iter().flatten().sum();
    assert!(ours.len() == 128 && (5060..5180).contains(&all), "{all}"); // 40 a pair
    let few = tool.file("few.json", "[[3, 2],[4, 1]]");
    assert_eq!(lengths(&["--lengths", &few]), [[3, 2], [4, 1]]);
    let lengths = tool.file("lengths.json", "[[3, 2], [500, 20]]");
    tool.run(&["bench", "--shape", "tiny", "--lengths", &lengths], "")
        .exits(2)
        .says("of at most 512 together");
}

#[test]
fn the_stand_in_for_a_gpu_is_measured() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let bench = |more: &[&str]| {
        let sizes = ["--tokens", "100", "--steps", "2", "--side", "64"];
        let how = [
            "bench",
            "--shape",
            "tiny",
            "--device",
            "cuda:0",
            "--prompts",
            "0",
        ];
        let run = tool.run(&[&how, &sizes[..], more].concat(), "").exits(0);
        let figure: Value = serde_json::from_str(run.stdout.trim()).unwrap();
        assert!(figure["device"].as_str().unwrap().contains("stand-in"));
        assert_eq!(figure["growth_bytes"], 0, "steps leave no memory behind");
        figure["memory_bytes"].as_u64().unwrap()
    };
    let (kept, again) = (bench(&[]), bench(&["--recompute", "--adamw-8bit"]));
    assert!(again < kept, "{again} {kept}");
    // The table of 1024 × 128 in bf16 leaves the device; its copy in 4 bits stays there, with
    // room to decode it.
    let nf4_head = bench(&["--lm-head", "nf4"]);
    assert!(nf4_head < kept, "{nf4_head} {kept}");
}

/// What a device's time goes to is all that it did, counted as the shape's layers are.
#[test]
fn the_time_of_a_stand_in_is_told_by_kernel() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let how = [
        "bench",
        "--shape",
        "tiny",
        "--device",
        "cuda:0",
        "--side",
        "64",
        "--profile",
    ];
    let sizes = [
        "--tokens",
        "600",
        "--steps",
        "2",
        "--prompts",
        "2",
        "--new-tokens",
        "3",
    ];
    let run = tool.run(&[&how[..], &sizes].concat(), "").exits(0);
    let figures = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let [train, generate]: [Value; 2] = figures.collect::<Vec<_>>().try_into().unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let profile = |figure: &Value| figure["profile"].as_array().unwrap().clone();
    let times = |figure: &Value, work: &str| {
        let found = profile(figure).into_iter().find(|w| w["work"] == work);
        found.map_or(0.0, |work| number(&work["times"]))
    };
    // Seven products a layer and direction are decoded, but for the backward pass of the
    // first layer's queries, keys and values, whose inputs nobody learns from.
    for (work, expected) in [("nf4_decode", 2 * 2 * 7 - 3), ("swiglu", 2), ("adamw", 1)] {
        assert_eq!(times(&train, work), f64::from(expected), "{work}");
    }
    // A first token from the prompts, and two steps.
    for (work, expected) in [("sample", 3), ("cache_attention_32", 2 * 2)] {
        assert_eq!(times(&generate, work), f64::from(expected), "{work}");
    }
    for (figure, whole) in [(&train, "seconds_per_step"), (&generate, "seconds")] {
        let seconds: Vec<_> = profile(figure)
            .iter()
            .map(|w| number(&w["seconds"]))
            .collect();
        assert!(seconds.is_sorted_by(|a, b| a >= b));
        // The stand-in works while it is called: there is little else. The two are not of
        // the same minute, nor is the machine ours alone.
        let share = seconds.iter().sum::<f64>() / number(&figure[whole]);
        assert!((0.3..3.0).contains(&share), "{share}");
    }
    let [hidden, inner] = [128, 384];
    let down = format!("{} x {hidden} x {inner}", train["tokens"]);
    let work = profile(&train)
        .into_iter()
        .find(|w| w["work"] == down.as_str());
    let work = work.unwrap_or_else(|| panic!("no {down}: {train}"));
    // As the stand-in's cuBLASLt has it.
    let algorithm = "66, tile 0, stages 0, cluster 0, split 1";
    assert_eq!(work["algorithm"], algorithm, "{work}");
    let tokens = number(&train["tokens"]);
    let operations = 2.0 * tokens * f64::from(hidden * inner) * number(&work["times"]);
    let rate = operations / number(&work["seconds"]) / 1e12;
    assert!(
        (number(&work["tflops"]) - rate).abs() < 1e-9 * rate,
        "{work}"
    );
}

/// A device with an H200's memory that does nothing of what it is asked for: what the host
/// allocates for an 8B, and how much it queues.
#[test]
fn an_8b_takes_the_memory_and_the_kernels_that_it_shall() {
    let tool = tool()
        .env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"))
        .env("CUDA_STAND_IN", "hollow");
    let figure = |more: &[&str]| -> Value {
        let how = [
            "bench", "--shape", "qwen3-8b", "--device", "cuda:0", "--steps", "1",
        ];
        let run = tool.run(&[&how[..], more].concat(), "").exits(0);
        serde_json::from_str(run.stdout.lines().last().unwrap()).unwrap()
    };
    let recomputed = ["--tokens", "2048", "--recompute", "--prompts", "0"];
    let memory = |more: &[&str]| {
        let figure = figure(&[&recomputed[..], more].concat());
        figure["memory_bytes"].as_f64().unwrap() / 1e9
    };
    // As docs/gpu.md aims at them; the codes alone are 3.6.
    let whole = memory(&[]);
    assert!((6.5..7.2).contains(&whole), "{whole}");
    let small = memory(&["--adamw-8bit", "--lm-head", "nf4"]);
    assert!((5.0..6.0).contains(&small), "{small}");

    let queued = |new_tokens: &str| {
        let decoding = [
            "--tokens",
            "64",
            "--prompts",
            "8",
            "--slots",
            "8",
            "--profile",
        ];
        let figure = figure(&[&decoding[..], &["--new-tokens", new_tokens]].concat());
        let work = figure["profile"].as_array().unwrap();
        work.iter()
            .map(|work| work["times"].as_f64().unwrap())
            .sum::<f64>()
    };
    // 14 a layer; tokens, their embeddings, the last norm, logits, the choice, which is
    // noted; and four inputs.
    assert_eq!(queued("3") - queued("2"), f64::from(14 * 36 + 6 + 4));
}
