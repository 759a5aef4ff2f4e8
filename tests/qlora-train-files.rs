//! The file side of qlora-train through the real binary: bases in 4 bits, merging,
//! GGUF, inspecting.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use half::bf16;
use harness::{Run, Tool};
use qwen3::{Adapter, AdapterConfig, Config, Module, Pair, Weight};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

fn tests(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests")
        .join(path)
}

fn model() -> String {
    tests("demo/model").display().to_string()
}

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_qlora-train"))
}

/// An adapter for the demo's model with values that follow from their places;
/// `scale` 0 makes one that does nothing.
fn adapter(tool: &Tool, name: &str, scale: f32) -> Adapter {
    let config = Config::load(&tests("demo/model")).unwrap();
    let targets = [Module::Q, Module::V, Module::Down];
    let values = |n: usize, scale: f32| (0..n).map(|i| scale * (i as f32 * 0.37).sin()).collect();
    let mut pairs = BTreeMap::new();
    for layer in 0..config.layers {
        for module in targets {
            let [outputs, inputs] = module.shape(&config);
            let pair = Pair {
                scale: 2.0,
                a: values(4 * inputs, 0.1),
                b: values(4 * outputs, scale),
                magnitude: None,
            };
            pairs.insert((layer, module), pair);
        }
    }
    let settings = AdapterConfig {
        base_model: model(),
        targets: targets.into_iter().collect(),
        ..AdapterConfig::new(4, 8.0)
    };
    let made = Adapter {
        config: settings,
        pairs,
    };
    let folder = tool.folder().join(name);
    fs::create_dir_all(&folder).unwrap();
    made.save(&folder, &config).unwrap();
    made
}

/// Names, types, shapes and bytes of a safetensors file.
fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let one = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.iter()
        .map(|(name, view)| (name.to_owned(), one(view)))
        .collect()
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn widened(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| bf16::from_le_bytes(b).to_f32())
        .collect()
}

/// bitsandbytes quantised and transformers saved the very same model.
#[test]
fn a_base_is_saved_in_4_bits_as_bitsandbytes_saves_it() {
    let tool = tool();
    let source = tests("parity/files/sharded").display().to_string();
    let arguments = ["--model", &source, "--save-quantized", "four"];
    let run = tool.run(&arguments, "").exits(0);
    assert!(run.stdout.is_empty(), "{run}");
    let ours = tensors(&tool.folder().join("four/model.safetensors"));
    let theirs = tensors(&tests("parity/files/nf4/model.safetensors"));
    assert!(ours.keys().eq(theirs.keys()));
    let mut off_by_one = 0;
    for ((name, ours), theirs) in ours.iter().zip(theirs.values()) {
        if name.ends_with(".quant_state.bitsandbytes__nf4") {
            let [mut a, mut b] =
                [ours, theirs].map(|t| serde_json::from_slice::<Value>(&t.2).unwrap());
            let [a_mean, b_mean] =
                [&mut a, &mut b].map(|s| s["nested_offset"].take().as_f64().unwrap());
            // The mean of the same scales, summed in another order.
            assert!(
                (a_mean - b_mean).abs() <= 2.0 * f64::from(f32::EPSILON) * b_mean,
                "{name}"
            );
            assert_eq!(a, b, "{name}");
        } else if name.ends_with(".absmax") {
            // bitsandbytes' CPU path looks codes up in a table that is one off here and there.
            assert_eq!(ours.1, theirs.1, "{name}");
            for (a, b) in ours.2.iter().zip(&theirs.2) {
                assert!(a.abs_diff(*b) <= 1, "{name}: code {a} for {b}");
                off_by_one += usize::from(a != b);
            }
        } else if name.ends_with(".nested_absmax") {
            for (a, b) in ours.2.as_chunks().0.iter().zip(theirs.2.as_chunks().0) {
                let (a, b) = (f32::from_le_bytes(*a), f32::from_le_bytes(*b));
                // A few units in the last place of the offset, taken from a smaller number.
                assert!((a - b).abs() <= 1e-6 * b, "{name}: {a} for {b}");
            }
        } else {
            assert!(ours == theirs, "{name}");
        }
    }
    assert!(off_by_one < 20, "{off_by_one} of some 1,400 codes");
    let [ours, theirs] = [tool.folder().join("four"), tests("parity/files/nf4")]
        .map(|f| json_file(&f.join("config.json"))["quantization_config"].clone());
    assert_eq!(ours, theirs);
    tool.run(&arguments, "").exits(2).says("exists");
}

const TRAIN: &str = "
lora: {rank: 2, alpha: 4}
training: {max_steps: 2, batch_size: 2, gradient_accumulation_steps: 1, eval_steps: 0}
";

fn train(tool: &Tool, out: &str, more: &[&str]) -> Run {
    let row = |i: usize| {
        json!({"messages": [{"role": "user", "content": format!("Number {i}?")},
                            {"role": "assistant", "content": format!("It is {i}.")}]})
    };
    tool.file(
        "rows.jsonl",
        &(0..4).map(|i| format!("{}\n", row(i))).collect::<String>(),
    );
    tool.run(&arguments(&model(), out, more), "").exits(0)
}

fn arguments<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["--model", model, "--data", "rows.jsonl", "--out", out];
    all.extend(["--config", "train.yaml"]);
    all.extend(more);
    all
}

/// peft, merge and inspect find the base from any folder, not only from that of the training.
#[test]
fn the_base_is_named_by_its_whole_path() {
    let tool = tool();
    let base = copy_of(&tool, &tests("demo/model"), "base");
    let row = json!({"prompt": "Tea?", "completion": "Always."});
    tool.file("rows.jsonl", &format!("{row}\n"));
    let train = ["--model", "base", "--data", "rows.jsonl", "--out", "lora"];
    tool.run(&[&train[..], &["--steps", "1"]].concat(), "")
        .exits(0);
    let config = json_file(&tool.folder().join("lora/adapter_config.json"));
    let named = Path::new(config["base_model_name_or_path"].as_str().unwrap());
    assert!(named.is_absolute(), "{named:?}");
    assert_eq!(named.canonicalize().unwrap(), base.canonicalize().unwrap());
    fs::create_dir(tool.folder().join("elsewhere")).unwrap();
    let mut command = tool.command(&["inspect", "../lora"]);
    command.current_dir(tool.folder().join("elsewhere"));
    let run = Run::of(&mut command, b"").exits(0);
    assert!(run.stdout.contains("loads here     yes"), "{run}");
}

#[test]
fn a_base_in_4_bits_is_kept_and_changes_nothing() {
    let tool = tool();
    tool.file("train.yaml", &format!("{TRAIN}model: {{cache: \"\"}}\n"));
    train(&tool, "without", &[]);
    assert!(!tool.folder().join("data").exists());
    tool.file("train.yaml", TRAIN);
    train(&tool, "first", &[]).says("is kept in data/cache/quantized/");
    train(&tool, "second", &[]).says("comes from data/cache/quantized/");

    // Cut short, it is made anew.
    let kept = fs::read_dir(tool.folder().join("data/cache/quantized")).unwrap();
    let kept = kept
        .map(|e| e.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    let weights = kept.join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    train(&tool, "third", &[]).says("made anew");
    assert!(fs::read(&weights).unwrap() == whole);

    // Where it cannot be kept, training goes on without.
    tool.file("file", "");
    tool.file(
        "train.yaml",
        &format!("{TRAIN}model: {{cache: file/below}}\n"),
    );
    train(&tool, "fourth", &[]).says("cannot be kept");

    tool.file("train.yaml", TRAIN);
    train(&tool, "fifth", &["--save-quantized", "four"]);
    assert!(fs::read(tool.folder().join("four/model.safetensors")).unwrap() == whole);
    let adapter = |out: &str| fs::read(tool.folder().join(out).join("adapter_model.safetensors"));
    for out in ["first", "second", "third", "fourth", "fifth"] {
        assert!(
            adapter(out).unwrap() == adapter("without").unwrap(),
            "{out}"
        );
    }
}

/// Who waits for another run, which may take minutes, is told.
#[test]
fn waiting_for_another_run_at_the_base_is_told() {
    let tool = tool();
    tool.file("train.yaml", TRAIN);
    train(&tool, "first", &[]);
    let cache = fs::read_dir(tool.folder().join("data/cache/quantized")).unwrap();
    let lock = cache
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|kind| kind == "lock"))
        .unwrap();
    let lock = fs::File::open(lock).unwrap();
    lock.lock().unwrap();
    let said = tool.folder().join("said");
    let mut child = tool
        .command(&arguments(&model(), "second", &[]))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let told = || fs::read_to_string(&said).unwrap();
    while !told().contains("another run is at the base in 4 bits in data/cache/quantized/") {
        let running = child.try_wait().unwrap().is_none();
        let late = started.elapsed() > Duration::from_secs(60);
        if late || !running {
            let _ = child.kill();
            panic!("{}", told());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    lock.unlock().unwrap();
    assert!(child.wait().unwrap().success(), "{}", told());
    assert!(told().contains("comes from data/cache/quantized/"));
}

/// As a shell completes a folder's name: it is made beside it all the same, and then there.
#[test]
fn a_slash_behind_a_folder_changes_nothing() {
    let tool = tool();
    adapter(&tool, "adapter", 0.02);
    for [plain, slash] in [["merged", "merged-2/"], ["four", "four-2/"]] {
        for out in [plain, slash] {
            let model = model();
            let mut all = match plain {
                "four" => vec!["--save-quantized", out],
                _ => vec!["merge", "--adapter", "adapter", "--no-check", "--out", out],
            };
            all.extend(["--model", &model]);
            tool.run(&all, "").exits(0);
        }
        let names = |folder: &str| -> Vec<_> {
            let names = fs::read_dir(tool.folder().join(folder)).unwrap();
            let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(plain), names(slash));
        let [a, b] = [plain, slash]
            .map(|folder| fs::read(tool.folder().join(folder).join("model.safetensors")).unwrap());
        assert!(a == b, "{slash}");
    }
}

#[test]
fn merging_gives_what_peft_gives() {
    let tool = tool();
    let (base, lora) = (tests("parity/files/sharded"), tests("parity/files/adapter"));
    let [base_path, lora_path] = [&base, &lora].map(|p| p.display().to_string());
    let arguments = [
        "merge",
        "--model",
        &base_path,
        "--adapter",
        &lora_path,
        "--out",
        "merged",
    ];
    // Without a tokenizer there are no prompts to compare on.
    tool.run(&[&arguments[..], &["--no-check"]].concat(), "")
        .exits(0);
    let ours = tensors(&tool.folder().join("merged/model.safetensors"));
    let peft = tensors(&tests("parity/merge/expected.safetensors"));
    let mut source = BTreeMap::new();
    for shard in 1..=5 {
        source.extend(tensors(
            &base.join(format!("model-{shard:05}-of-00005.safetensors")),
        ));
    }
    assert!(ours.keys().eq(source.keys()));
    let (mut differ, mut compared) = (0, 0);
    for (name, ours) in &ours {
        let Some(theirs) = peft.get(name) else {
            assert!(ours == &source[name], "{name} is not the base's");
            continue;
        };
        assert_eq!((ours.0, &ours.1), (theirs.0, &theirs.1), "{name}");
        for (a, b) in widened(&ours.2).into_iter().zip(widened(&theirs.2)) {
            compared += 1;
            if a != b {
                // Sums of three products in another order, on either side of a rounding.
                assert!(
                    (a - b).abs() <= 2f32.powi(-7) * b.abs(),
                    "{name}: {a} for {b}"
                );
                differ += 1;
            }
        }
        assert!(ours != &source[name], "{name} is unchanged");
    }
    // Measured: 0 of 32,768.
    assert!(compared == 32_768 && differ <= 4, "{differ} of {compared}");
    tool.run(&arguments, "")
        .exits(2)
        .says("--out merged exists");
}

#[test]
fn the_comparison_says_how_far_the_merged_model_is() {
    let tool = tool();
    adapter(&tool, "nothing", 0.0);
    let merge = |name: &str, out: &str| {
        tool.run(&["merge", "--adapter", name, "--out", out], "")
            .exits(0)
            .records()
            .remove(0)
    };
    let report = merge("nothing", "same");
    assert_eq!(report["parameters"], 1_263_296);
    // The base is bfloat16 already: nothing is rounded.
    assert_eq!(report["checks"][0]["max_abs"], 0.0);
    assert_eq!(report["checks"][0]["same_top"], 1.0);
    let four_bits = report["checks"][1]["mean_abs"].as_f64().unwrap();
    assert!(four_bits > 0.1, "{report}");
    for name in [
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "NOTICE",
    ] {
        let [a, b] = [tool.folder().join("same"), tests("demo/model")].map(|f| f.join(name));
        assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{name}");
    }

    adapter(&tool, "something", 0.1);
    let check = merge("something", "other")["checks"][0].clone();
    let (mean, kl) = (
        check["mean_abs"].as_f64().unwrap(),
        check["kl"].as_f64().unwrap(),
    );
    assert!(
        mean > 0.0 && mean < 0.05 && kl > 0.0 && kl < 1e-3,
        "{check}"
    );
}

/// Writes `value` over the first value of a safetensors file's tensor.
fn damage(path: &Path, name: &str, value: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let start = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(name).unwrap().data();
        data.as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[start..start + value.len()].copy_from_slice(value);
    fs::write(path, bytes).unwrap();
}

/// A copy of a model's folder to be changed.
fn copy_of(tool: &Tool, model: &Path, name: &str) -> PathBuf {
    let folder = tool.folder().join(name);
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn what_is_no_number_is_not_merged() {
    let tool = tool();
    let merge = |adapter: &str, model: &str| {
        let arguments = [
            "merge",
            "--model",
            model,
            "--adapter",
            adapter,
            "--out",
            "m",
            "--gguf",
            "m.gguf",
        ];
        let run = tool.run(&arguments, "").exits(4);
        for written in ["m", "m.gguf", "m.tmp"] {
            assert!(!tool.folder().join(written).exists(), "{written}");
        }
        run
    };
    adapter(&tool, "nan", 0.1);
    let name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight";
    let file = tool.folder().join("nan/adapter_model.safetensors");
    damage(&file, name, &f32::NAN.to_le_bytes());
    merge("nan", &model()).says(name).says("no numbers");
    // Numbers, whose product is none.
    damage(&file, name, &f32::MAX.to_le_bytes());
    damage(&file, &name.replace("_B", "_A"), &1e9f32.to_le_bytes());
    merge("nan", &model())
        .says("model.layers.1.mlp.down_proj.weight")
        .says("with the adapter merged into it");

    adapter(&tool, "lora", 0.1);
    let base = copy_of(&tool, &tests("demo/model"), "base");
    let norm = "model.layers.2.self_attn.q_norm.weight";
    let infinity = bf16::INFINITY.to_le_bytes();
    damage(&base.join("model.safetensors"), norm, &infinity);
    merge("lora", "base").says(norm).says("as the base has it");

    // Numbers all, of which a pass makes none: the comparison sees it.
    let large = bf16::from_f32(3e38).to_le_bytes().repeat(128);
    let base = copy_of(&tool, &tests("demo/model"), "large");
    damage(&base.join("model.safetensors"), "model.norm.weight", &large);
    let arguments = [
        "merge",
        "--model",
        "large",
        "--adapter",
        "lora",
        "--out",
        "m",
    ];
    let run = tool.run(&arguments, "").exits(4);
    run.says("no numbers").says(", so m is not to be used");
    // Nor is the GGUF file, which is made of the same values.
    let both = ["--out", "m2", "--gguf", "m2.gguf"];
    let both = [&arguments[..5], &both[..]].concat();
    let run = tool.run(&both, "").exits(4);
    run.says(", so m2 and m2.gguf are not to be used");
    assert!(tool.folder().join("m2.gguf").exists());
}

/// A number all the same, and of no use here: no damage that would be mended by fetching.
#[test]
fn a_weight_that_bfloat16_cannot_hold_is_told_as_that() {
    let tool = tool();
    let weights = copy_of(&tool, &tests("demo/model"), "wide").join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let most = f32::MAX.to_le_bytes().repeat(128);
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let tensors = tensors.into_iter().map(|(name, tensor)| {
        let wide = TensorView::new(Dtype::F32, vec![128], &most).unwrap();
        let is_wide = name == "model.norm.weight";
        (name, if is_wide { wide } else { tensor })
    });
    safetensors::serialize_to_file(tensors, None, &weights).unwrap();
    let found = tool.run(&["inspect", "wide"], "").exits(0);
    let said = "model.norm.weight holds values that are no numbers, or too large for bfloat16";
    assert!(found.stdout.contains(said), "{found}");
    assert!(
        found
            .stdout
            .contains("fetch the model again, or take another"),
        "{found}"
    );
}

#[test]
fn a_gguf_file_alone_is_said_not_to_be_compared() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let merge = |more: &[&str]| {
        let arguments = [&["merge", "--adapter", "lora"], more].concat();
        let run = tool.run(&arguments, "").exits(0);
        assert_eq!(run.records()[0]["checks"], json!([]));
        run
    };
    merge(&["--gguf", "a.gguf"])
        .says("not compared")
        .says("with --out");
    merge(&["--gguf", "b.gguf", "--no-check"]).never_says("not compared");
}

#[test]
fn a_limit_on_the_size_of_files_is_told() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let command = tool.command(&["merge", "--adapter", "lora", "--out", "m"]);
    let limited = ["-c", "ulimit -f 100; exec \"$0\" \"$@\""];
    let run = Run::of(&mut harness::behind("bash", &limited, &command), b"");
    run.exits(4).says("File too large");
    assert!(!tool.folder().join("m").exists());
}

#[test]
fn merging_without_a_base_or_with_another_one_is_refused() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let other = tests("parity/files/sharded").display().to_string();
    tool.run(
        &[
            "merge",
            "--adapter",
            "lora",
            "--out",
            "m",
            "--model",
            &other,
        ],
        "",
    )
    .exits(4)
    .says("adapter of another base");
    let path = tool.folder().join("lora/adapter_config.json");
    let text = fs::read_to_string(&path)
        .unwrap()
        .replace(&model(), "Some/Where");
    fs::write(&path, text).unwrap();
    tool.run(&["merge", "--adapter", "lora", "--out", "m"], "")
        .exits(2)
        .says("`Some/Where`")
        .says("--model");
    tool.run(&["merge", "--adapter", "lora"], "")
        .exits(2)
        .says("--out");
    tool.run(
        &[
            "merge",
            "--adapter",
            "lora",
            "--out",
            "m",
            "--gguf-type",
            "f16",
        ],
        "",
    )
    .exits(2);
    assert!(!tool.folder().join("m").exists() && !tool.folder().join("m.tmp").exists());
}

/// Type, shape in memory order, bytes.
type Stored = (u32, Vec<usize>, Vec<u8>);

/// Reads a GGUF file by its specification (ggml's docs/gguf.md, version 3).
struct Gguf {
    bytes: Vec<u8>,
    at: usize,
}

impl Gguf {
    fn take(&mut self, n: usize) -> &[u8] {
        self.at += n;
        &self.bytes[self.at - n..self.at]
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }
    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.take(8).try_into().unwrap()) as usize
    }
    fn string(&mut self) -> String {
        let length = self.u64();
        String::from_utf8(self.take(length).to_vec()).unwrap()
    }
    fn value(&mut self, kind: u32) -> Value {
        match kind {
            4 => json!(self.u32()),
            5 => json!(self.u32() as i32),
            6 => json!(f32::from_bits(self.u32())),
            7 => json!(self.take(1)[0] != 0),
            8 => json!(self.string()),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                (0..count).map(|_| self.value(kind)).collect()
            }
            other => panic!("value type {other}"),
        }
    }
    /// Metadata, and the tensors by name.
    fn read(path: &Path) -> (Map<String, Value>, BTreeMap<String, Stored>) {
        let mut file = Self {
            bytes: fs::read(path).unwrap(),
            at: 0,
        };
        assert_eq!(file.take(4), b"GGUF");
        assert_eq!(file.u32(), 3);
        let (count, keys) = (file.u64(), file.u64());
        let mut meta = Map::new();
        for _ in 0..keys {
            let (key, kind) = (file.string(), file.u32());
            let value = file.value(kind);
            meta.insert(key, value);
        }
        let mut infos = Vec::new();
        for _ in 0..count {
            let (name, dimensions) = (file.string(), file.u32());
            let shape: Vec<usize> = (0..dimensions).map(|_| file.u64()).collect();
            infos.push((name, shape, file.u32(), file.u64()));
        }
        let start = file.at.next_multiple_of(32);
        let mut tensors = BTreeMap::new();
        let mut end = 0;
        for (name, shape, kind, at) in infos {
            assert_eq!(at, usize::next_multiple_of(end, 32), "{name}");
            let length = shape.iter().product::<usize>() * if kind == 0 { 4 } else { 2 };
            end = at + length;
            let bytes = file.bytes[start + at..start + end].to_vec();
            tensors.insert(name, (kind, shape, bytes));
        }
        assert_eq!(file.bytes.len(), start + end.next_multiple_of(32));
        (meta, tensors)
    }
}

#[test]
fn a_gguf_file_holds_the_merged_model_and_its_tokenizer() {
    let tool = tool();
    adapter(&tool, "replies", 0.1);
    let arguments = [
        "merge",
        "--adapter",
        "replies",
        "--out",
        "m",
        "--gguf",
        "m.gguf",
        "--no-check",
    ];
    tool.run(&arguments, "").exits(0);
    let (meta, gguf) = Gguf::read(&tool.folder().join("m.gguf"));
    for (key, value) in [
        ("general.architecture", json!("qwen3")),
        ("general.name", json!("replies")),
        ("general.file_type", json!(32)),
        ("qwen3.block_count", json!(5)),
        ("qwen3.embedding_length", json!(128)),
        ("qwen3.feed_forward_length", json!(384)),
        ("qwen3.attention.head_count", json!(6)),
        ("qwen3.attention.head_count_kv", json!(2)),
        ("qwen3.attention.key_length", json!(32)),
        ("qwen3.attention.value_length", json!(32)),
        ("qwen3.context_length", json!(1024)),
        ("qwen3.rope.freq_base", json!(1e6f32)),
        ("qwen3.attention.layer_norm_rms_epsilon", json!(1e-6f32)),
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("qwen2")),
        ("tokenizer.ggml.eos_token_id", json!(1512)),
        ("tokenizer.ggml.padding_token_id", json!(1510)),
        ("tokenizer.ggml.add_bos_token", json!(false)),
    ] {
        assert_eq!(meta[key], value, "{key}");
    }
    let template = fs::read_to_string(tests("demo/model/chat_template.jinja")).unwrap();
    assert_eq!(meta["tokenizer.chat_template"], json!(template));
    let tokenizer = json_file(&tests("demo/model/tokenizer.json"));
    let tokens = meta["tokenizer.ggml.tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 1536);
    for (text, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        assert_eq!(tokens[id.as_u64().unwrap() as usize], json!(text));
    }
    let types = &meta["tokenizer.ggml.token_type"];
    // A letter, <|im_end|>, <|fim_prefix|> (control by its looks), <think>.
    assert_eq!(
        [0, 1512, 1526, 1534].map(|id| types[id].clone()),
        [1, 3, 3, 4].map(Value::from)
    );
    assert_eq!(tokens[1534], "<think>");
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    assert_eq!(
        meta["tokenizer.ggml.merges"].as_array().unwrap().len(),
        merges.len()
    );
    assert_eq!(meta["tokenizer.ggml.merges"][0], "Ġ t");

    let merged = tensors(&tool.folder().join("m/model.safetensors"));
    assert_eq!(gguf.len(), merged.len());
    for (ours, theirs) in [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.3.attn_norm", "model.layers.3.input_layernorm"),
        ("blk.3.ffn_norm", "model.layers.3.post_attention_layernorm"),
        ("blk.3.attn_q_norm", "model.layers.3.self_attn.q_norm"),
        ("blk.3.attn_k_norm", "model.layers.3.self_attn.k_norm"),
        ("blk.3.attn_q", "model.layers.3.self_attn.q_proj"),
        ("blk.3.attn_k", "model.layers.3.self_attn.k_proj"),
        ("blk.3.attn_v", "model.layers.3.self_attn.v_proj"),
        ("blk.3.attn_output", "model.layers.3.self_attn.o_proj"),
        ("blk.3.ffn_gate", "model.layers.3.mlp.gate_proj"),
        ("blk.3.ffn_up", "model.layers.3.mlp.up_proj"),
        ("blk.3.ffn_down", "model.layers.3.mlp.down_proj"),
    ] {
        let (kind, shape, bytes) = &gguf[&format!("{ours}.weight")];
        let (_, stored, expected) = &merged[&format!("{theirs}.weight")];
        assert!(shape.iter().rev().eq(stored), "{ours}: {shape:?}");
        if stored.len() == 1 {
            let floats: Vec<f32> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect();
            assert_eq!((*kind, floats), (0, widened(expected)), "{ours}");
        } else {
            assert!(*kind == 30 && bytes == expected, "{ours}");
        }
    }

    let half = [
        "merge",
        "--adapter",
        "replies",
        "--gguf",
        "h.gguf",
        "--gguf-type",
        "f16",
    ];
    tool.run(&half, "").exits(0);
    let (meta, gguf) = Gguf::read(&tool.folder().join("h.gguf"));
    assert_eq!(
        (&meta["general.file_type"], gguf["token_embd.weight"].0),
        (&json!(1), 1)
    );
    tool.run(&half, "").exits(2).says("--gguf h.gguf exists");
}

/// Changes the demo adapter's settings and tensors, and inspects it.
#[track_caller]
fn inspect_changed(
    settings: impl FnOnce(&mut Map<String, Value>),
    names: impl Fn(&str) -> Option<String>,
    values: impl Fn(&str, &mut [u8]),
) -> Vec<String> {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let config = tool.folder().join("lora/adapter_config.json");
    let Value::Object(mut map) = json_file(&config) else {
        panic!()
    };
    settings(&mut map);
    fs::write(&config, Value::Object(map).to_string()).unwrap();
    let path = tool.folder().join("lora/adapter_model.safetensors");
    let mut kept = tensors(&path);
    for (name, tensor) in &mut kept {
        values(name, &mut tensor.2);
    }
    let views = kept.iter().filter_map(|(name, (dtype, shape, bytes))| {
        Some((
            names(name)?,
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        ))
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();

    let run = tool
        .run(&["inspect", "lora", "--model", &model(), "--json"], "")
        .exits(0);
    let report = run.records().remove(0);
    let problems = report["problems"].as_array().unwrap();
    let strict = if problems.is_empty() { 0 } else { 1 };
    let text = tool
        .run(&["inspect", "lora", "--model", &model(), "--strict"], "")
        .exits(strict);
    assert_eq!(
        text.stdout.matches("problem: ").count(),
        problems.len(),
        "{text}"
    );
    let line = |p: &Value| {
        let part = |key: &str| p[key].as_str().unwrap().to_owned();
        format!("{}: {}: {}", part("file"), part("cause"), part("effect"))
    };
    problems.iter().map(line).collect()
}

#[test]
fn an_adapter_is_described() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let run = tool
        .run(&["inspect", "lora", "--json", "--strict"], "")
        .exits(0);
    let report = run.records().remove(0);
    let expected = json!({"kind": "adapter", "rank": 4, "alpha": 8.0, "scale": 2.0, "layers": 5,
        "tensors": 30, "dtypes": ["F32"], "loads_here": "yes", "problems": [], "rslora": false});
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
    // Of each of 5 layers: q 4 × (128 + 192), v 4 × (128 + 64), down 4 × (384 + 128).
    assert_eq!(
        report["parameters"],
        5 * 4 * (128 + 192 + 128 + 64 + 384 + 128)
    );
    let text = tool.run(&["inspect", "lora"], "").exits(0).stdout;
    assert!(
        text.contains("lora is an adapter") && text.contains("no problems"),
        "{text}"
    );
}

/// What peft does with each was seen in peft 0.21; tests/parity/merge/live.py sees it again.
#[test]
fn what_peft_would_get_wrong_is_named() {
    let keep = |name: &str| Some(name.to_owned());
    let asis = |_: &str, _: &mut [u8]| ();
    let only = |found: Vec<String>, words: &[&str]| {
        let [problem] = &found[..] else {
            panic!("{found:#?}")
        };
        for word in words {
            assert!(problem.contains(word), "{word} not in {problem}");
        }
    };
    // Settings that peft 0.21 heeds, each with another value than its default.
    for (key, value) in [
        ("layers_to_transform", json!([0])),
        ("layers_pattern", json!("layers")),
        ("layer_replication", json!([[0, 2]])),
        ("exclude_modules", json!(["v_proj"])),
        ("modules_to_save", json!(["lm_head"])),
        ("target_parameters", json!(["mlp.up_proj.weight"])),
        ("trainable_token_indices", json!([1])),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("alora_invocation_tokens", json!([7])),
        ("arrow_config", json!({"top_k": 2})),
        ("kasa_config", json!({"beta": 1e-4})),
        ("velora_config", json!({"scale": 1.0})),
        ("monteclora_config", json!({"num_samples": 2})),
        ("ensure_weight_tying", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("task_type", json!("SEQ_CLS")),
        ("a_key_of_a_later_version", json!(1)),
    ] {
        let found = inspect_changed(|map| drop(map.insert(key.into(), value)), keep, asis);
        only(found, &["adapter_config.json", &format!("`{key}`")]);
    }
    let drop_key =
        |key: &'static str| inspect_changed(move |map| drop(map.shift_remove(key)), keep, asis);
    only(
        drop_key("lora_alpha"),
        &["adapter_config.json", "`lora_alpha` is missing", "takes 8"],
    );
    only(
        drop_key("base_model_name_or_path"),
        &["`base_model_name_or_path`"],
    );
    only(drop_key("peft_type"), &["`peft_type` is missing"]);
    only(
        drop_key("target_modules"),
        &["`target_modules`", "q_proj and v_proj"],
    );
    only(drop_key("r"), &["`r` is missing", "rank 8"]);

    let set = |key: &'static str, value: Value| {
        inspect_changed(move |map| drop(map.insert(key.into(), value)), keep, asis)
    };
    only(
        set("target_modules", json!(["q_proj", "v_proj"])),
        &["pairs of down_proj", "leaves them out"],
    );
    let more = json!(["q_proj", "v_proj", "down_proj", "up_proj"]);
    only(
        set("target_modules", more),
        &["10 tensors are missing", "layers.0 up_proj lora_A"],
    );
    only(
        set("r", json!(5)),
        &["30 tensors", "shape", "size mismatch"],
    );
    only(set("lora_alpha", json!(0)), &["does nothing"]);

    let rename = |names: fn(&str) -> Option<String>| inspect_changed(|_| (), names, asis);
    only(
        rename(|name| Some(name.replace("base_model.model.", ""))),
        &["30 tensors lack the prefix"],
    );
    only(
        rename(|name| Some(name.replace(".weight", ".replies.weight"))),
        &["30 tensors hold an adapter's name", "random start"],
    );
    only(
        rename(|name| (!name.contains("layers.2.mlp.down_proj.lora_B")).then(|| name.into())),
        &["1 tensors are missing", "layers.2 down_proj lora_B"],
    );
    only(
        rename(|name| Some(name.replace("layers.4.", "layers.7."))).split_off(1),
        &["6 tensors are missing"],
    );
    only(
        inspect_changed(
            |_| (),
            keep,
            |name, bytes| {
                if name.contains("lora_B") {
                    bytes.fill(0);
                }
            },
        ),
        &["every lora_B is zero", "not trained"],
    );
    only(
        inspect_changed(
            |_| (),
            keep,
            |name, bytes| {
                if name.contains("layers.1.mlp.down_proj.lora_A") {
                    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                }
            },
        ),
        &["1 tensors hold values that are not finite"],
    );
}

#[test]
fn adapters_of_every_kind_are_described_and_their_faults_named() {
    let tool = tool();
    let base = tests("parity/train/model").display().to_string();
    for name in ["dora", "dora-nf4", "patterns", "regex", "everything"] {
        let folder = tests("parity/adapters").join(name).display().to_string();
        let run = tool.run(
            &["inspect", &folder, "--model", &base, "--json", "--strict"],
            "",
        );
        let report = run.exits(0).records().remove(0);
        assert_eq!(report["loads_here"], "yes", "{name}");
        assert_eq!(
            report["dora"],
            name.starts_with("dora") || name == "everything"
        );
    }
    let faulty = |edit: &dyn Fn(&mut Map<String, Value>), names: &dyn Fn(&str) -> bool| {
        let folder = tool.folder().join("faulty");
        fs::create_dir_all(&folder).unwrap();
        let of = |file: &str| tests("parity/adapters/everything").join(file);
        let Value::Object(mut map) = json_file(&of("adapter_config.json")) else {
            panic!()
        };
        edit(&mut map);
        fs::write(
            folder.join("adapter_config.json"),
            Value::Object(map).to_string(),
        )
        .unwrap();
        let kept = tensors(&of("adapter_model.safetensors"));
        let views = kept.iter().filter(|(name, _)| names(name));
        let views = views.map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
        let text = tool.run(&["inspect", "faulty", "--model", &base, "--strict"], "");
        let text = text.exits(1).stdout;
        // What peft passes over is not loaded here.
        assert!(text.contains("loads here     no: "), "{text}");
        text
    };
    let says = |text: String, words: &[&str]| {
        for word in words {
            assert!(text.contains(word), "{word} not in {text}");
        }
    };
    let magnitude = "base_model.model.model.layers.1.self_attn.o_proj.lora_magnitude_vector";
    says(
        faulty(&|_| (), &|name| name != magnitude),
        &[
            "layers.1 o_proj lora_magnitude_vector",
            &format!("`{magnitude}` is missing"),
        ],
    );
    let set = |key: &'static str, value: Value| {
        let edit = move |map: &mut Map<String, Value>| drop(map.insert(key.into(), value.clone()));
        faulty(&edit, &|_| true)
    };
    says(
        set("use_dora", json!(false)),
        &["holds magnitudes of DoRA", "runs plain LoRA"],
    );
    says(
        set("rank_pattern", json!({})),
        &["4 tensors have another shape"],
    );
    says(
        set("alpha_pattern", json!({"k_proj": 9})),
        &[
            "`alpha_pattern` holds `k_proj`, which matches no target",
            "passes it over",
        ],
    );
    says(
        set(
            "target_modules",
            json!(r".*(0\.mlp\.up|1\.self_attn\.[vo])_proj"),
        ),
        &["holds pairs of down_proj, no targets"],
    );
    says(
        set("target_modules", json!(".*(")),
        &["`.*(`, no regular expression"],
    );
}

#[test]
fn targets_and_patterns_that_match_nothing_are_refused() {
    let tool = tool();
    tool.file("pairs.jsonl", "never read");
    for (lora, words) in [
        (
            "target_modules: '.*x_proj'",
            "lora.target_modules `.*x_proj` matches nothing",
        ),
        (
            "target_modules: q_proj",
            "plain names go into a list: [q_proj]",
        ),
        (
            "target_modules: '.*'",
            "lora.target_modules `.*` matches model too",
        ),
        (
            "target_modules: '.*('",
            "lora.target_modules holds `.*(`, no regular expression",
        ),
        (
            "target_modules: [q_proj, x_proj]",
            "train.yaml:1: lora.target_modules holds `x_proj`, which matches nothing",
        ),
        (
            "target_modules: [all-linear]",
            "lora.target_modules holds `all-linear`, which stands alone, not in a list",
        ),
        ("target_modules: []", "lora.target_modules is empty"),
        (
            "rank_pattern: {x_proj: 4}",
            "lora.rank_pattern holds `x_proj`, which matches no target",
        ),
        (
            "rank_pattern: {q_proj: 0}",
            "train.yaml:1: lora.rank_pattern.q_proj is 0",
        ),
        (
            "rank_pattern: {q_proj: 129}",
            "at most as the model is wide (128)",
        ),
        (
            "alpha_pattern: {'layers.9.*': 4}",
            "train.yaml:1: lora.alpha_pattern holds `layers.9.*`",
        ),
        (
            "alpha_pattern: {q_proj: -1}",
            "train.yaml:1: lora.alpha_pattern.q_proj is -1",
        ),
    ] {
        tool.file("train.yaml", &format!("lora: {{{lora}}}\n"));
        let run = tool.run(
            &[
                "--model",
                &model(),
                "--data",
                "pairs.jsonl",
                "--out",
                "out",
                "--config",
                "train.yaml",
            ],
            "",
        );
        run.exits(2).says(words);
        assert!(!tool.folder().join("out").exists());
    }
}

#[test]
fn folders_that_lack_a_file_are_told() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let path = tool.folder().join("lora/adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
    tool.run(&["inspect", "lora", "--strict"], "")
        .exits(1)
        .says("lora: ");
    fs::rename(&path, tool.folder().join("lora/adapter_model.bin")).unwrap();
    let text = tool.run(&["inspect", "lora"], "").exits(0).stdout;
    assert!(text.contains("is a pickle"), "{text}");
    // Sums that are none are no word that the files are whole.
    fs::write(&path, &bytes).unwrap();
    for sums in ["", "what is this\n"] {
        tool.file("lora/SHA256SUMS", sums);
        let text = tool
            .run(&["inspect", "lora", "--strict"], "")
            .exits(1)
            .stdout;
        assert!(text.contains("has no sum of adapter_config.json"), "{text}");
    }
    // Of what it was trained on, which peft has no use for and gen-eval has.
    let rows_wrong = |said: &str| {
        let inspected = tool.run(&["inspect", "lora", "--strict"], "").exits(1);
        let text = inspected.stdout;
        assert!(
            text.contains(&format!("problem: rows.jsonl: lora/rows.jsonl: {said}")),
            "{text}"
        );
        assert!(text.contains("put it back"), "{text}");
    };
    tool.file("lora/SHA256SUMS", &format!("{:064}  rows.jsonl\n", 0));
    rows_wrong("is missing, and SHA256SUMS names it");
    tool.file("lora/rows.jsonl", "");
    rows_wrong("is not as it was written");
    fs::remove_file(tool.folder().join("lora/SHA256SUMS")).unwrap();
    let inspect = ["inspect", "lora", "--strict"];
    tool.run(&inspect, "").exits(0);
    tool.file("empty/readme.txt", "");
    tool.run(&["inspect", "empty"], "")
        .exits(2)
        .says("no adapter and no model");
    tool.run(&["inspect", "nowhere"], "")
        .exits(2)
        .says("nowhere");
}

#[test]
fn a_named_path_that_is_not_there_is_wrong_use() {
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    tool.file("rows.jsonl", "never read");
    let model = model();
    let train = ["--model", &model, "--data", "rows.jsonl", "--out", "out"];
    let init = [&train[..], &["--init-adapter", "nowhere"]].concat();
    for arguments in [
        &init[..],
        &["merge", "--adapter", "nowhere", "--out", "out"],
        &[
            "merge",
            "--adapter",
            "lora",
            "--model",
            "nowhere",
            "--out",
            "out",
        ],
        &["inspect", "lora", "--model", "nowhere"],
        &["inspect", "lora", "--verify", "--python", "./nowhere"],
        &[
            "bench",
            "--shape",
            "tiny",
            "--device",
            "cpu",
            "--lengths",
            "nowhere",
        ],
    ] {
        tool.run(arguments, "").exits(2).says("nowhere");
        assert!(!tool.folder().join("out").exists());
    }
    // Nor is half of an adapter one.
    fs::rename(
        tool.folder().join("lora/adapter_config.json"),
        tool.folder().join("kept.json"),
    )
    .unwrap();
    for arguments in [
        &[&train[..], &["--init-adapter", "lora"]].concat()[..],
        &["merge", "--adapter", "lora", "--out", "out"],
    ] {
        tool.run(arguments, "")
            .exits(2)
            .says("adapter lora: adapter_config.json is missing there");
    }
}

/// Unix has folders whose names are no text; what takes time does not end at that.
#[test]
fn folders_need_be_no_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let tool = tool();
    adapter(&tool, "lora", 0.1);
    let [odd, out] = [b"lo\xffra", b"o\xfft  "].map(|name| OsStr::from_bytes(name));
    fs::rename(tool.folder().join("lora"), tool.folder().join(odd)).unwrap();
    let of = |text: &'static str| OsStr::new(text);
    let merge = [
        of("merge"),
        of("--no-check"),
        of("--adapter"),
        odd,
        of("--out"),
        out,
    ];
    let report = tool.run(&merge, "").exits(0).records().remove(0);
    assert_eq!(report["out"], "o\u{fffd}t  ");
    let inspect = [of("inspect"), odd, of("--json"), of("--strict")];
    tool.run(&inspect, "").exits(0);
    tool.run(&[of("inspect"), odd, of("--verify")], "")
        .exits(2)
        .says("is no UTF-8");
}

/// Of a file that cannot be read nothing is known but that.
#[test]
fn only_the_cause_is_told_of_what_cannot_be_read() {
    let tool = tool();
    let problems = |folder: &str| -> Vec<(String, String)> {
        let arguments = ["inspect", folder, "--json"];
        let report = tool.run(&arguments, "").exits(0).records().remove(0);
        let part = |p: &Value, key: &str| p[key].as_str().unwrap().to_owned();
        let problems = report["problems"].as_array().unwrap().iter();
        problems
            .map(|p| (part(p, "file"), part(p, "cause")))
            .collect()
    };
    let only = |folder: &str, file: &str, cause: &str| {
        let found = problems(folder);
        let [(in_file, why)] = &found[..] else {
            panic!("{found:#?}")
        };
        assert!(in_file == file && why.contains(cause), "{found:?}");
    };
    adapter(&tool, "lora", 0.1);
    let [settings, tensors] = ["adapter_config.json", "adapter_model.safetensors"];
    let sums = |name: &str| {
        let sum = cli::sha256_file(&tool.folder().join("lora").join(name)).unwrap();
        format!("{sum}  {name}\n")
    };
    tool.file("lora/SHA256SUMS", &(sums(settings) + &sums(tensors)));
    assert_eq!(problems("lora"), []);
    for (name, lengths) in [(tensors, [0, 8, 2000]), (settings, [0, 1, 100])] {
        let path = tool.folder().join("lora").join(name);
        let whole = fs::read(&path).unwrap();
        for length in lengths {
            fs::write(&path, &whole[..length]).unwrap();
            only("lora", name, "is not a");
        }
        fs::remove_file(&path).unwrap();
        only("lora", name, "is missing");
        fs::write(&path, &whole).unwrap();
    }
    let folder = copy_of(&tool, &tests("demo/model"), "base");
    for (name, length, cause) in [
        ("config.json", 10, "not valid JSON"),
        ("model.safetensors", 0, "a download cut short?"),
        ("model.safetensors", 1000, "a download cut short?"),
        ("model.safetensors", 100_000, "a download cut short?"),
        ("tokenizer.json", 1000, "not valid JSON"),
    ] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..length]).unwrap();
        only("base", name, cause);
        fs::write(&path, &whole).unwrap();
    }
}

/// What stands in a model file's place and is none: named, and not waited for.
#[test]
fn what_is_no_model_file_is_named() {
    let tool = tool();
    tool.file("rows.jsonl", "never read");
    let refused = |words: &[&str]| {
        let train = ["--model", "base", "--data", "rows.jsonl", "--out", "o"];
        let trained = tool.run(&train, "").exits(4).stderr;
        let inspected = tool.run(&["inspect", "base"], "").exits(0).stdout;
        for word in words {
            assert!(trained.contains(word), "{word}: {trained}");
            assert!(inspected.contains(word), "{word}: {inspected}");
        }
    };
    let folder = copy_of(&tool, &tests("demo/model"), "base");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
    ] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap_or_default();
        fs::write(&path, pointer).unwrap();
        if name != "README.md" {
            refused(&[name, "a pointer of Git LFS", "`git lfs pull`"]);
        }
        fs::remove_file(&path).unwrap();
        let made = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        match name {
            // Of the card only the licence is wanted: it goes on to the rows.
            "README.md" => {
                let train = ["--model", "base", "--data", "rows.jsonl", "--out", "o"];
                tool.run(&train, "").exits(3);
            }
            _ => refused(&[name, "is no regular file"]),
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    let path = folder.join("model.safetensors");
    fs::rename(&path, folder.join("pytorch_model.bin")).unwrap();
    refused(&["holds pytorch_model.bin", "only safetensors are read"]);

    adapter(&tool, "lora", 0.1);
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = tool.folder().join("lora").join(name);
        let whole = fs::read(&path).unwrap();
        for (what, said) in [(Some(pointer), "Git LFS"), (None, "is no regular file")] {
            fs::remove_file(&path).unwrap();
            match what {
                Some(text) => fs::write(&path, text).unwrap(),
                None => drop(Command::new("mkfifo").arg(&path).status().unwrap()),
            }
            let inspected = tool.run(&["inspect", "lora"], "").exits(0).stdout;
            assert_eq!(inspected.matches("problem: ").count(), 1, "{inspected}");
            assert!(inspected.contains(said), "{inspected}");
            let merge = ["merge", "--model", &model(), "--adapter", "lora"];
            let merge = merge.iter().chain(&["--out", "m"]).collect::<Vec<_>>();
            tool.run(&merge, "").exits(4).says(name).says(said);
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    // Nor is what a run left waited for.
    let run = tool.folder().join("lora/run.json");
    assert!(Command::new("mkfifo").arg(&run).status().unwrap().success());
    let merge = ["merge", "--no-check", "--model", &model(), "--adapter"];
    let merge = [&merge[..], &["lora", "--out", "m"]].concat();
    tool.run(&merge, "")
        .exits(4)
        .says("lora/run.json: is no regular file");
    fs::remove_file(&run).unwrap();
    fs::write(&run, "{\"v\":").unwrap();
    tool.run(&merge, "").exits(4).says("lora/run.json: EOF");
    fs::remove_file(&run).unwrap();
    tool.run(&merge, "").exits(0);
}

#[test]
fn a_model_is_described() {
    let tool = tool();
    let run = tool
        .run(&["inspect", &model(), "--json", "--strict"], "")
        .exits(0);
    let report = run.records().remove(0);
    let expected = json!({"kind": "model", "parameters": 1_263_296, "layers": 5, "hidden": 128,
        "heads": [6, 2, 32], "inner": 384, "vocabulary": 1536, "tied": true, "tokens": 1536,
        "storage": {"BF16": 1_263_296}, "stop_ids": [1512, 1510],
        "stop_tokens": ["<|im_end|>", "<|endoftext|>"], "template": true, "problems": []});
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
    let four = tests("parity/files/nf4").display().to_string();
    let report = tool
        .run(&["inspect", &four, "--json"], "")
        .exits(0)
        .records()
        .remove(0);
    // Two layers of products [128|64|64, 64], [64, 128], [128, 64] twice, [64, 128].
    assert_eq!(report["storage"]["NF4"], 2 * 8192 * 6);
    assert!(
        report["problems"][0]["cause"]
            .as_str()
            .unwrap()
            .contains("cannot be read")
    );
}

#[test]
fn a_model_that_cannot_be_trained_on_is_told() {
    let tool = tool();
    let folder = tool.folder().join("base");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(tests("demo/model")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    // A base model's generation settings: it never ends a turn.
    tool.file("base/generation_config.json", r#"{"eos_token_id": 1510}"#);
    let text = tool.run(&["inspect", "base"], "").exits(0).stdout;
    assert!(
        text.contains("tokenizer.json: has <|im_end|>") && text.contains("instruct"),
        "{text}"
    );
    fs::write(folder.join("model.safetensors"), "cut").unwrap();
    let report = tool
        .run(&["inspect", "base", "--json"], "")
        .exits(0)
        .records()
        .remove(0);
    let files: Vec<_> = report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["file"])
        .collect();
    assert_eq!(files, ["model.safetensors", "tokenizer.json"]);
    tool.run(&["inspect", "base", "--strict"], "")
        .exits(1)
        .says("2 problems");
}

/// What training refuses, inspecting finds.
#[test]
fn templates_and_tokenizers_that_are_of_no_use_are_told() {
    let tool = tool();
    let folder = copy_of(&tool, &tests("demo/model"), "base");
    let row = json!({"prompt": "Tea?", "completion": "Always."});
    tool.file("rows.jsonl", &format!("{row}\n"));
    let refused = |words: &[&str]| {
        let inspect = ["inspect", "base", "--strict"];
        let found = tool.run(&inspect, "").exits(1).stdout;
        let train = ["--model", "base", "--data", "rows.jsonl", "--out", "o"];
        let run = tool.run(&train, "").exits(4);
        for word in words {
            assert!(found.contains(word), "{word}: {found}");
            assert!(run.stderr.contains(word), "{word}: {run}");
        }
    };
    tool.file("base/chat_template.jinja", "hello");
    refused(&["chat_template.jinja", "writes 0 assistant turns"]);
    tool.file(
        "base/chat_template.jinja",
        "{{ raise_exception('no ' ~ 'way') }}",
    );
    refused(&["chat_template.jinja", "no way"]);

    let whole = fs::read(tests("demo/model/tokenizer.json")).unwrap();
    let text = String::from_utf8_lossy(&whole);
    let inside = text.find("\"decoder\"").unwrap() + 30;
    fs::write(folder.join("tokenizer.json"), &whole[..inside]).unwrap();
    refused(&["tokenizer.json", "not valid JSON"]);
}

#[test]
fn values_that_are_no_numbers_are_found_wherever_they_are() {
    let tool = tool();
    let found = |folder: &str, weight: &str| {
        let report = tool.run(&["inspect", folder, "--json"], "").exits(0);
        let report = report.records().remove(0);
        let problems = report["problems"].as_array().unwrap().iter();
        let causes: Vec<_> = problems.map(|p| p["cause"].as_str().unwrap()).collect();
        assert!(
            causes.iter().any(|c| c.starts_with(weight)),
            "{weight}: {causes:?}"
        );
    };
    let base = copy_of(&tool, &tests("demo/model"), "base");
    let norm = "model.layers.4.post_attention_layernorm.weight";
    damage(
        &base.join("model.safetensors"),
        norm,
        &bf16::NAN.to_le_bytes(),
    );
    found("base", norm);

    adapter(&tool, "lora", 0.1);
    let merge = [
        "merge",
        "--adapter",
        "lora",
        "--out",
        "merged",
        "--no-check",
    ];
    tool.run(&merge, "").exits(0);
    let head = "model.embed_tokens.weight";
    let merged = tool.folder().join("merged/model.safetensors");
    damage(&merged, head, &bf16::NEG_INFINITY.to_le_bytes());
    found("merged", head);

    // In 4 bits it is in the scales, or in the scales of those.
    let up = "model.layers.1.mlp.up_proj.weight";
    for part in ["absmax", "nested_absmax"] {
        let model = tests(match part {
            "absmax" => "parity/files/nf4-plain",
            _ => "parity/files/nf4",
        });
        let four = copy_of(&tool, &model, part);
        damage(
            &four.join("model.safetensors"),
            &format!("{up}.{part}"),
            &f32::NAN.to_le_bytes(),
        );
        found(part, up);
    }
}

/// The script's side is tested live (tests/parity/merge/live.py); here is what is made of
/// its answers.
#[test]
fn what_transformers_answers_is_compared() {
    let tool = tool();
    let verify = |answer: &str| {
        let script = format!("#!/bin/sh\ncat > request.json\n{answer}\n");
        let path = tool.file("python", &script);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        tool.run(
            &[
                "inspect",
                &model(),
                "--verify",
                "--strict",
                "--python",
                &path,
            ],
            "",
        )
    };
    verify(r#"echo '{"missing": "transformers"}'"#)
        .exits(4)
        .says("no package `transformers`")
        .says("nothing was compared");
    verify("echo 'OSError: no such model' >&2; exit 1")
        .exits(4)
        .says("OSError: no such model");
    // The exception, not a bar drawn over itself.
    let run = verify(
        r"printf 'Loading weights:   0%%|  | 0/3\rLoading weights: 33%%|# | 1/3' >&2
          printf '\nRuntimeError: out of luck\nsee below\n' >&2
          printf 'Loading weights:   0%%|  | 0/3' >&2; exit 1",
    );
    run.exits(4)
        .says("RuntimeError: out of luck")
        .never_says("Loading");
    let row = r#"{"prompt": [1], "row": [1, 2], "nll": [0.5], "greedy": [3]}"#;
    let answer = format!(
        r#"{{"dtype": "float32", "versions": {{"transformers": "9.9"}}, "rows": [{row},{row},{row},{row}]}}"#
    );
    // What is no number there is an answer too.
    let none = answer.replace("0.5", "null");
    verify(&format!("echo '{none}'")).exits(1);
    let run = verify(&format!("echo '{answer}'")).exits(1);
    assert!(
        run.stdout.contains("differs from transformers 9.9"),
        "{run}"
    );
    assert_eq!(
        run.stdout.matches("the token ids differ").count(),
        4,
        "{run}"
    );
    let request = json_file(&tool.folder().join("request.json"));
    assert_eq!(request["parameters"], 1_263_296);
    tool.run(
        &[
            "inspect",
            &model(),
            "--verify",
            "--python",
            "no-such-python",
        ],
        "",
    )
    .exits(2)
    .says("--python");
    let four = tests("parity/files/nf4").display().to_string();
    tool.run(&["inspect", &four, "--verify"], "")
        .exits(2)
        .says("unquantised");
}

#[test]
fn examples_of_the_help_run() {
    let tool = tool();
    symlink(tests("demo/model"), tool.folder().join("model")).unwrap();
    adapter(&tool, "adapter", 0.1);
    let bin = Path::new(env!("CARGO_BIN_EXE_qlora-train"))
        .parent()
        .unwrap()
        .display()
        .to_string();
    tool.file("adapter/README.md", "# An adapter\n");
    tool.file(
        "tests.jsonl",
        r#"{"a":"systems.base","b":"systems.lora","metric":"nll","test":"permutation","n":8,"signature":"tool:sigtest"}"#,
    );
    for command in ["merge", "inspect", "bench", "card"] {
        let short = tool.run(&[command, "-h"], "").exits(0).stdout;
        assert!(short.lines().count() <= 60, "{short}");
        let help = tool.run(&[command, "--help"], "").exits(0).stdout;
        assert!(help.contains("Exit status:"), "{help}");
        let examples: Vec<_> = help
            .lines()
            .filter_map(|l| l.trim().strip_prefix("$ "))
            .collect();
        assert!(!examples.is_empty());
        for example in examples {
            let mut shell = Command::new("bash");
            let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
            shell
                .args(["-euc", example])
                .current_dir(tool.folder())
                .env("PATH", path);
            Run::of(&mut shell, b"").exits(0);
        }
    }
    tool.run(&["merge", "--data", "x"], "").exits(2);
    tool.run(&["--steps", "3", "merge"], "").exits(2);
}

#[test]
fn settings_that_the_model_cannot_hold_are_refused() {
    // The demo's model is 128 wide and has 1024 positions.
    for (key, value, said) in [
        (
            "PAIRS__LORA__RANK",
            "129",
            "environment variable PAIRS__LORA__RANK: lora.rank is 129, more than the model is wide (128)",
        ),
        (
            "PAIRS__TRAINING__MAX_SEQ_LENGTH",
            "1025",
            "MAX_SEQ_LENGTH: training.max_seq_length is 1025, more than the model's 1024 positions",
        ),
    ] {
        let tool = tool().env(key, value);
        let arguments = [
            "--model",
            &model(),
            "--data",
            "absent.jsonl",
            "--out",
            "out",
        ];
        tool.run(&arguments, "").exits(2).says(said);
        assert!(!tool.folder().join("out").exists());
    }
}

#[test]
fn the_model_card_spells_choices_as_the_settings_do() {
    let tool = tool()
        .env("PAIRS__TRAINING__LR_SCHEDULER", "linear")
        .env("PAIRS__TRAINING__WARMUP_RATIO", "0.3");
    tool.file("train.yaml", TRAIN);
    train(&tool, "out", &["--quantization", "none"]);
    let card = fs::read_to_string(tool.folder().join("out/README.md")).unwrap();
    assert!(
        card.contains("| Base weights in training | none |"),
        "{card}"
    );
    // 0.3 of 2 steps, rounded up.
    assert!(card.contains(", linear, warm-up steps 1,"), "{card}");
    train(&tool, "head", &["--lm-head", "nf4"]);
    let card = fs::read_to_string(tool.folder().join("head/README.md")).unwrap();
    assert!(
        card.contains("| Base weights in training | nf4, lm_head in nf4 |")
            && card.contains("over NF4, `lm_head` included"),
        "{card}"
    );
}

#[test]
fn a_gpu_quantises_to_the_processors_bytes() {
    let tool = tool().env("LD_LIBRARY_PATH", &cuda_on_cpu::STAND_IN.join(":"));
    let weights = |device: &str| {
        let folder = tool.path(device);
        let model = model();
        let arguments = [
            "--model",
            &model,
            "--save-quantized",
            &folder,
            "--device",
            device,
        ];
        tool.run(&arguments, "").exits(0);
        fs::read(Path::new(&folder).join("model.safetensors")).unwrap()
    };
    assert!(weights("cuda:0") == weights("cpu"));
}

/// A model in bf16 of so many layers, 1.97 MB each, with the demo's words.
fn made_model(folder: &Path, layers: usize) {
    fs::create_dir(folder).unwrap();
    for entry in fs::read_dir(tests("demo/model")).unwrap() {
        let entry = entry.unwrap();
        if !["config.json", "model.safetensors"].contains(&entry.file_name().to_str().unwrap()) {
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    let text = fs::read_to_string(tests("demo/model/config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("hidden_size", 256),
        ("intermediate_size", 1024),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 64),
    ] {
        config.insert(key.into(), json!(value));
    }
    fs::write(
        folder.join("config.json"),
        Value::Object(config).to_string(),
    )
    .unwrap();
    let config = Config::load(folder).unwrap();
    let largest = config.vocab_size * config.hidden_size;
    let value = |i: usize| bf16::from_f32((i as f32 * 0.37).sin()).to_le_bytes();
    let bytes: Vec<u8> = (0..largest).flat_map(value).collect();
    let weights = Weight::all(&config);
    let views = weights.iter().map(|weight| {
        let shape = weight.shape(&config);
        let len = 2 * shape.iter().product::<usize>();
        let view = TensorView::new(Dtype::BF16, shape, &bytes[..len]).unwrap();
        (weight.name(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("model.safetensors"), file).unwrap();
}

/// The most anonymous memory that a command is seen with, and the most memory in all, in
/// bytes.
fn most_memory(command: &mut Command) -> [u64; 2] {
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let path = format!("/proc/{}/status", child.id());
    let mut most = [0; 2];
    let status = loop {
        let status = fs::read_to_string(&path).unwrap_or_default();
        for (most, key) in most.iter_mut().zip(["RssAnon:", "VmHWM:"]) {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            if let Some(kb) = line.and_then(|line| line.split_whitespace().next()) {
                *most = 1024 * kb.parse::<u64>().unwrap().max(*most / 1024);
            }
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "{status}");
    most
}

/// The most threads that a command had at once.
fn most_threads(command: &mut Command) -> usize {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let tasks = format!("/proc/{}/task", child.id());
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        most = most.max(fs::read_dir(&tasks).map_or(0, Iterator::count));
    }
    most
}

/// On a machine that others use as well, as many threads as were asked for.
#[test]
fn inspecting_takes_the_threads_that_it_is_given() {
    let tool = tool();
    made_model(&tool.folder().join("of-44"), 44);
    let most = |threads| {
        let inspect = ["inspect", "of-44", "--threads", threads];
        most_threads(&mut tool.command(&inspect))
    };
    // Each is there twice, in the pool and reading, beside the first.
    let one = most("1");
    assert!(one <= 3, "{one}");
    // Readers are gone within milliseconds: not all are seen each time, on a busy machine.
    let seen: Vec<_> = (0..10)
        .map(|_| most("16"))
        .take_while(|&many| many <= 1 + 16 + 2)
        .collect();
    assert!(seen.len() < 10, "{seen:?}");
}

/// A base is quantised layer by layer, and never in memory as a whole: neither as it is
/// stored, in pages of its file, nor in 4 bits.
#[test]
fn quantising_takes_no_more_memory_for_more_layers() {
    let tool = tool();
    let [few, many] = [4, 44].map(|layers| {
        let (from, to) = (format!("of-{layers}"), format!("four-{layers}"));
        made_model(&tool.folder().join(&from), layers);
        let all = ["--threads", "2", "--model", &from, "--save-quantized", &to];
        most_memory(&mut tool.command(&all))
    });
    // 983,040 parameters a layer: of 40 layers, 79 MB in bf16 and 20 MB in NF4. Seen on
    // 2026-11-23: 1.0 to 1.5 MB more of anonymous memory, 1.3 to 2.8 MB more in all.
    let more: Vec<u64> = (few.iter().zip(&many))
        .map(|(few, many)| many.saturating_sub(*few))
        .collect();
    println!("of {few:?} bytes, 40 layers take {more:?} more");
    assert!(more.iter().all(|&more| more < 10_000_000), "{more:?}");
}

/// On a terminal a bar says how many layers are done.
#[test]
fn quantising_says_how_far_it_is() {
    let tool = tool();
    made_model(&tool.folder().join("of-44"), 44);
    let command = tool.command(&["--model", "of-44", "--save-quantized", "four"]);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<String> = words.map(|w| format!("'{}'", w.display())).collect();
    let line = format!("{} >/dev/null", line.join(" "));
    let script = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .current_dir(tool.folder())
        .env_clear()
        .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .expect("script(1), of util-linux");
    let shown = String::from_utf8_lossy(&script.stdout);
    assert!(script.status.success(), "{shown}");
    assert!(shown.contains("quantising layers ["), "{shown}");
    assert!(shown.contains("/44 "), "{shown}");
}
