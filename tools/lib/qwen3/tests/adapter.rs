//! Adapters as PEFT writes them (tests/parity/files), and what is said of those
//! that PEFT itself would read and get wrong.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use qwen3::{Adapter, Config, Module, Targets};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

fn parity(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../tests/parity/files")
        .join(name)
}

fn model() -> Config {
    Config::load(&parity("sharded")).unwrap()
}

fn expected(name: &str) -> Vec<f32> {
    let bytes = fs::read(parity("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (values, _) = file.tensor(name).unwrap().data().as_chunks::<4>();
    values.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn an_adapter_loads_as_peft_saved_it() {
    let adapter = Adapter::load(&parity("adapter"), &model()).unwrap();
    let config = &adapter.config;
    assert_eq!((config.rank, config.alpha, config.dropout), (3, 12.0, 0.1));
    let mut targets: Vec<String> = match &config.targets {
        Targets::Names(names) => names.clone(),
        Targets::Pattern(_) => panic!("a list"),
    };
    targets.sort();
    assert_eq!(targets, ["down_proj", "q_proj"]);
    assert_eq!(config.base_model, "tiny");
    // Rank-stabilised: 12 / √3, by PEFT's own account.
    let scale = expected("adapter.scaling")[0];
    assert!(adapter.pairs.values().all(|pair| pair.scale == scale));
    assert_eq!(adapter.pairs.len(), 4);
    for (module, block) in [(Module::Q, "self_attn"), (Module::Down, "mlp")] {
        let pair = &adapter.pairs[&(1, module)];
        let name = format!("adapter.model.layers.1.{block}.{module}");
        assert_eq!(pair.a, expected(&format!("{name}.lora_A.weight")));
        assert_eq!(pair.b, expected(&format!("{name}.lora_B.weight")));
    }
}

#[test]
fn what_we_save_is_what_peft_saves() {
    let model = model();
    let adapter = Adapter::load(&parity("adapter"), &model).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path(), &model).unwrap();

    let [ours, theirs] = [folder.path(), &parity("adapter")]
        .map(|f| fs::read(f.join("adapter_model.safetensors")).unwrap());
    assert!(ours == theirs, "the tensors' file differs from PEFT's");

    let [ours, theirs] = [folder.path(), &parity("adapter")].map(|f| {
        let bytes = fs::read(f.join("adapter_config.json")).unwrap();
        serde_json::from_slice::<Map<String, Value>>(&bytes).unwrap()
    });
    for (key, value) in &ours {
        let sorted = |value: &Value| {
            let mut names: Vec<String> = serde_json::from_value(value.clone()).unwrap();
            names.sort();
            names
        };
        match key.as_str() {
            "target_modules" => assert_eq!(sorted(value), sorted(&theirs[key])),
            key => assert_eq!(Some(value), theirs.get(key), "{key}"),
        }
    }
    assert_eq!(Adapter::load(folder.path(), &model).unwrap(), adapter);
}

/// A copy of the adapter with changes to its settings and tensors.
fn changed(
    config: impl FnOnce(&mut Map<String, Value>),
    tensors: impl Fn(&str) -> Option<String>,
    dtype: Dtype,
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(parity("adapter/adapter_config.json")).unwrap();
    let mut map = serde_json::from_slice(&bytes).unwrap();
    config(&mut map);
    fs::write(
        folder.path().join("adapter_config.json"),
        serde_json::to_vec(&map).unwrap(),
    )
    .unwrap();

    let bytes = fs::read(parity("adapter/adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = file
        .iter()
        .filter_map(|(name, view)| Some((tensors(name)?, view)))
        .collect();
    let halves: Vec<Vec<u8>> = kept
        .iter()
        .map(|(_, view)| bf16_bytes(view.data()))
        .collect();
    let views = kept.iter().zip(&halves).map(|((name, view), half)| {
        let data = if dtype == Dtype::BF16 {
            half
        } else {
            view.data()
        };
        (
            name,
            TensorView::new(dtype, view.shape().to_vec(), data).unwrap(),
        )
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), file).unwrap();
    folder
}

/// The upper halves of f32s: bf16 rounded towards zero.
fn bf16_bytes(bytes: &[u8]) -> Vec<u8> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .flat_map(|b| [b[2], b[3]])
        .collect()
}

#[track_caller]
fn refused(folder: &Path, model: &Config, words: &[&str]) {
    let error = Adapter::load(folder, model)
        .expect_err("refused")
        .to_string();
    let missing: Vec<_> = words
        .iter()
        .filter(|word| !error.contains(**word))
        .collect();
    assert!(missing.is_empty(), "{missing:?} not in: {error}");
}

#[test]
fn settings_that_are_missing_or_not_supported_are_named() {
    let model = model();
    for key in ["r", "lora_alpha", "target_modules", "peft_type"] {
        let folder = changed(
            |map| drop(map.remove(key)),
            |name| Some(name.into()),
            Dtype::F32,
        );
        refused(
            folder.path(),
            &model,
            &["adapter_config.json", &format!("`{key}`"), "missing"],
        );
    }
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("task_type", json!("SEQ_CLS")),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("rank_pattern", json!({"k_proj": 8})),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"q_proj": "8"})),
        ("rank_pattern", json!({"[qk]_proj": 3, "q_proj": 3})),
        ("rank_pattern", json!({"(": 3})),
        ("alpha_pattern", json!({"layers.7.*": 8})),
        ("alpha_pattern", json!({"q_proj": 0})),
        ("layers_to_transform", json!([0])),
        ("layer_replication", json!([[0, 2]])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["mlp.experts"])),
        ("use_qalora", json!(true)),
        ("a_key_of_a_later_version", json!({"on": true})),
        ("init_lora_weights", json!("pissa")),
        ("lora_alpha", json!(0)),
        ("lora_alpha", json!(1e-320)),
        ("lora_alpha", json!(1e300)),
        ("alpha_pattern", json!({"q_proj": 1e-320})),
        ("r", json!(0)),
        ("target_modules", json!([])),
        ("target_modules", json!(".*attn.*")),
        ("target_modules", json!("q_proj")),
        ("target_modules", json!("*_proj")),
        ("target_modules", json!(["q_proj", "lm_head"])),
    ] {
        let folder = changed(
            |map| drop(map.insert(key.into(), value)),
            |name| Some(name.into()),
            Dtype::F32,
        );
        refused(
            folder.path(),
            &model,
            &["adapter_config.json", &format!("`{key}`")],
        );
    }
}

#[test]
fn tensors_that_do_not_match_the_settings_are_named() {
    let model = model();
    let asis = |_: &mut Map<String, Value>| ();
    let missing = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

    let folder = changed(
        asis,
        |name| (name != missing).then(|| name.into()),
        Dtype::F32,
    );
    refused(
        folder.path(),
        &model,
        &["adapter_model.safetensors", missing, "is missing"],
    );

    let folder = changed(
        asis,
        |name| Some(name.replace("base_model.model.", "")),
        Dtype::F32,
    );
    refused(
        folder.path(),
        &model,
        &["is missing", "prefix", "`model.layers.0."],
    );

    let folder = changed(
        |map| drop(map.insert("target_modules".into(), json!(["q_proj"]))),
        |name| Some(name.into()),
        Dtype::F32,
    );
    refused(folder.path(), &model, &["mlp.down_proj", "unexpected"]);

    let folder = changed(
        |map| drop(map.insert("target_modules".into(), json!("all-linear"))),
        |name| Some(name.into()),
        Dtype::F32,
    );
    refused(
        folder.path(),
        &model,
        &["layers.0.self_attn.k_proj.lora_A.weight", "is missing"],
    );

    let folder = changed(
        |map| drop(map.insert("r".into(), json!(4))),
        |name| Some(name.into()),
        Dtype::F32,
    );
    refused(
        folder.path(),
        &model,
        &["[3, 64]", "[4, 64]", "another base or rank"],
    );

    let wider = Config {
        hidden_size: 80,
        ..model.clone()
    };
    refused(&parity("adapter"), &wider, &["another base"]);
    let deeper = Config {
        layers: 3,
        ..model.clone()
    };
    refused(&parity("adapter"), &deeper, &["layers.2.", "is missing"]);
    let shallower = Config { layers: 1, ..model };
    refused(&parity("adapter"), &shallower, &["layers.1.", "unexpected"]);
}

#[test]
fn values_that_are_no_numbers_are_refused_by_their_tensor() {
    let model = model();
    let folder = changed(|_| (), |name| Some(name.into()), Dtype::F32);
    let path = folder.path().join("adapter_model.safetensors");
    let whole = fs::read(&path).unwrap();
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&wrong.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let last = "layers.1.self_attn.q_proj.lora_B.weight";
        refused(
            folder.path(),
            &model,
            &["adapter_model.safetensors", last, "no numbers"],
        );
    }
}

#[test]
fn sums_that_say_nothing_are_no_sums() {
    let model = model();
    let folder = changed(|_| (), |name| Some(name.into()), Dtype::F32);
    let sums = folder.path().join("SHA256SUMS");
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    let line = |name: &str, between: &str| {
        let bytes = fs::read(folder.path().join(name)).unwrap();
        let sum = Sha256::digest(bytes);
        let sum: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{sum}{between}{name}\n")
    };
    // As `sha256sum` and `sha256sum --binary` write them, of other files too.
    for between in ["  ", " *"] {
        let lines: String = names.iter().map(|name| line(name, between)).collect();
        fs::write(&sums, format!("0{between}README.md\n{lines}")).unwrap();
        Adapter::load(folder.path(), &model).unwrap();
    }
    // Settings that are gone change nothing of what is computed; changed, they do of what is asked.
    let settings = folder.path().join("train.yaml");
    fs::write(&settings, "data: {system_prompt: Be brief.}\n").unwrap();
    let all = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "train.yaml",
    ];
    fs::write(&sums, all.map(|name| line(name, "  ")).concat()).unwrap();
    Adapter::load(folder.path(), &model).unwrap();
    for changed in ["", "data: {system_prompt: Be long.}\n"] {
        fs::write(&settings, changed).unwrap();
        refused(
            folder.path(),
            &model,
            &["train.yaml", "is not as it was written"],
        );
    }
    fs::remove_file(&settings).unwrap();
    Adapter::load(folder.path(), &model).unwrap();
    for text in ["", "what is this\n", &line(names[0], "  ")] {
        fs::write(&sums, text).unwrap();
        refused(folder.path(), &model, &["SHA256SUMS", "has no sum of"]);
    }
    // The rows' sum is not lost with the remedy.
    fs::write(folder.path().join("rows.jsonl"), "").unwrap();
    let remedy = "sha256sum adapter_config.json adapter_model.safetensors rows.jsonl > SHA256SUMS";
    refused(folder.path(), &model, &[remedy]);
}

#[test]
fn halves_are_widened() {
    let model = model();
    let folder = changed(|_| (), |name| Some(name.into()), Dtype::BF16);
    let [half, full] =
        [folder.path(), &parity("adapter")].map(|f| Adapter::load(f, &model).unwrap());
    for (key, pair) in &full.pairs {
        for (full, half) in pair.a.iter().zip(&half.pairs[key].a) {
            assert_eq!(f32::from_bits(full.to_bits() & 0xffff_0000), *half);
        }
    }
}

#[test]
fn the_fingerprint_is_of_what_it_computes() {
    let model = model();
    let adapter = Adapter::load(&parity("adapter"), &model).unwrap();
    let change = |change: fn(&mut Adapter)| {
        let mut copy = adapter.clone();
        change(&mut copy);
        copy.fingerprint() != adapter.fingerprint()
    };
    assert!(!change(|a| a.config.base_model = "elsewhere".into()));
    assert!(!change(|a| a.config.dropout = 0.0));
    assert!(change(|a| a
        .pairs
        .get_mut(&(0, Module::Q))
        .unwrap()
        .scale *= 1.5));
    assert!(change(
        |a| a.pairs.get_mut(&(0, Module::Q)).unwrap().b[5] += 1e-6
    ));
}
