//! Model folders as transformers and bitsandbytes save them (tests/parity/files),
//! and what is said of those that are wrong.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use engine::nf4::Absmax;
use engine::{HostMatrix, MatrixData};
use qwen3::{Checkpoint, Config, Module, Storage};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

fn parity(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../tests/parity/files")
        .join(name)
}

/// A tensor as torch held it.
fn expected(name: &str) -> Vec<f32> {
    let bytes = fs::read(parity("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (values, _) = file.tensor(name).unwrap().data().as_chunks::<4>();
    values.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn values(matrix: &HostMatrix) -> Vec<f32> {
    match &matrix.data {
        MatrixData::F32(values) => values.clone(),
        MatrixData::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
        MatrixData::Nf4(tensor) => {
            let mut out = vec![f32::NAN; matrix.rows * matrix.cols];
            tensor.dequantize_into(&mut out);
            out
        }
    }
}

fn product(checkpoint: &Checkpoint, module: Module, storage: Storage) -> HostMatrix {
    let at = Module::ALL.iter().position(|&m| m == module).unwrap();
    checkpoint.layer(1, storage).unwrap().products[at].clone()
}

#[test]
fn a_sharded_checkpoint_loads_as_transformers_saved_it() {
    let checkpoint = Checkpoint::open(&parity("sharded")).unwrap();
    let config = Config {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        max_positions: 256,
        rms_eps: 1e-6,
        rope_theta: 1e6,
        tied: false,
    };
    assert_eq!(*checkpoint.config(), config);
    let layer = checkpoint.layer(1, Storage::AsStored).unwrap();
    assert_eq!(
        layer.q_norm,
        expected("sharded.model.layers.1.self_attn.q_norm.weight")
    );
    let k = product(&checkpoint, Module::K, Storage::AsStored);
    assert!(matches!(k.data, MatrixData::Bf16(_)));
    assert_eq!(
        values(&k),
        expected("sharded.model.layers.1.self_attn.k_proj.weight")
    );
    assert_eq!(
        checkpoint.final_norm().unwrap(),
        expected("sharded.model.norm.weight")
    );
    let head = checkpoint.lm_head().unwrap().unwrap();
    assert_eq!((head.rows, head.cols), (96, 64));
    assert_eq!(values(&head), expected("sharded.lm_head.weight"));
    for (module, matrix) in Module::ALL.into_iter().zip(&layer.products) {
        assert_eq!(
            [matrix.rows, matrix.cols],
            module.shape(&config),
            "{module}"
        );
    }
    assert_eq!(qwen3::stop_ids(&parity("sharded")).unwrap(), [1, 0]);
}

#[test]
fn a_checkpoint_in_four_bits_loads_as_it_is() {
    for (folder, double) in [("nf4", true), ("nf4-plain", false)] {
        let checkpoint = Checkpoint::open(&parity(folder)).unwrap();
        for (module, block) in [(Module::O, "self_attn"), (Module::Gate, "mlp")] {
            let name = format!("{folder}.model.layers.1.{block}.{module}.weight");
            for storage in [Storage::AsStored, Storage::Nf4] {
                let ours = product(&checkpoint, module, storage);
                let MatrixData::Nf4(tensor) = &ours.data else {
                    panic!("{name}")
                };
                let nested = matches!(tensor.absmax(), Absmax::Nested { .. });
                assert_eq!(nested, double, "{name}");
                assert_eq!(values(&ours), expected(&name), "{name}");
            }
        }
    }
}

/// bitsandbytes quantised these very weights. Its codes are ours; its nested
/// scales come from the CPU lookup, which may be a code off.
#[test]
fn quantising_here_gives_the_codes_of_bitsandbytes() {
    let theirs = Checkpoint::open(&parity("nf4")).unwrap();
    let ours = Checkpoint::open(&parity("sharded")).unwrap();
    for module in Module::ALL {
        let [theirs, ours] = [&theirs, &ours].map(|c| product(c, module, Storage::Nf4));
        let (MatrixData::Nf4(theirs), MatrixData::Nf4(ours)) = (&theirs.data, &ours.data) else {
            panic!("{module}")
        };
        assert_eq!(ours.packed(), theirs.packed(), "{module}");
    }
}

/// A copy of the 4-bit checkpoint with one tensor's bytes changed.
fn with_part(name: &str, change: impl FnOnce(&mut [u8])) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(parity("nf4/config.json"), folder.path().join("config.json")).unwrap();
    let mut bytes = fs::read(parity("nf4/model.safetensors")).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (from, to) = metadata.info(name).unwrap().data_offsets;
    change(&mut bytes[8 + header + from..8 + header + to]);
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

/// Without FMA torch computes a map whose last bits are others.
#[test]
fn scales_coded_with_another_machines_map_keep_their_values() {
    let name = "model.layers.1.self_attn.o_proj.weight";
    let folder = with_part(&format!("{name}.nested_quant_map"), |map| {
        for entry in map.as_chunks_mut::<4>().0 {
            let bits = u32::from_le_bytes(*entry);
            *entry = (bits ^ 64).to_le_bytes();
        }
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let ours = product(&checkpoint, Module::O, Storage::AsStored);
    let MatrixData::Nf4(tensor) = &ours.data else {
        panic!()
    };
    assert!(matches!(tensor.absmax(), Absmax::Plain(_)));
    let theirs = expected(&format!("nf4.{name}"));
    let mut differ = 0;
    for (ours, theirs) in values(&ours).iter().zip(theirs) {
        // 64 units in the map's last place: more than a scale's rounding hides.
        assert!((ours - theirs).abs() <= 64.0 * f32::EPSILON * theirs.abs());
        differ += usize::from(*ours != theirs);
    }
    assert!(differ > 0, "the file's own map was not used");
}

/// Replaces text by text of the same length.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.contains(from), "{text}");
    bytes.copy_from_slice(text.replace(from, to).as_bytes());
}

#[test]
fn four_bit_states_that_are_not_nf4_are_refused() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let refused = |part: &str, change: fn(&mut [u8]), word: &str| {
        let folder = with_part(&format!("{name}.{part}"), change);
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(word), "{error}");
    };
    let state = "quant_state.bitsandbytes__nf4";
    refused("quant_map", |map| map[0] ^= 1, "NF4 table");
    refused(state, |s| replace(s, "\"nf4\"", "\"fp4\""), "fp4");
    refused(
        state,
        |s| replace(s, "\"blocksize\": 64", "\"blocksize\": 32"),
        "blocks of 32",
    );
    refused(state, |s| replace(s, "[128, 64]", "[64, 128]"), "[64, 128]");
    refused(state, |s| replace(s, "256", "128"), "nested_blocksize");
    refused(state, |s| s[0] = b'x', "malformed quant_state");
}

/// A one-layer model written from scratch, for tests to spoil.
struct Draft {
    config: Map<String, Value>,
    generation: Option<Value>,
    tensors: Vec<(String, Vec<usize>)>,
    dtype: Dtype,
}

impl Draft {
    fn new() -> Self {
        let Value::Object(config) = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
            "vocab_size": 10, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000,
            "tie_word_embeddings": true, "eos_token_id": 3, "rope_scaling": null,
            "attention_bias": false, "use_sliding_window": false,
        }) else {
            unreachable!()
        };
        let layer = "model.layers.0.";
        let shapes: [(&str, &[usize]); 13] = [
            ("model.embed_tokens.weight", &[10, 6]),
            ("model.norm.weight", &[6]),
            ("input_layernorm.weight", &[6]),
            ("post_attention_layernorm.weight", &[6]),
            ("self_attn.q_norm.weight", &[2]),
            ("self_attn.k_norm.weight", &[2]),
            ("self_attn.q_proj.weight", &[8, 6]),
            ("self_attn.k_proj.weight", &[4, 6]),
            ("self_attn.v_proj.weight", &[4, 6]),
            ("self_attn.o_proj.weight", &[6, 8]),
            ("mlp.gate_proj.weight", &[5, 6]),
            ("mlp.up_proj.weight", &[5, 6]),
            ("mlp.down_proj.weight", &[6, 5]),
        ];
        let full = |name: &str| match name.starts_with("model.") {
            true => name.to_owned(),
            false => format!("{layer}{name}"),
        };
        let tensors = shapes
            .map(|(name, shape)| (full(name), shape.to_vec()))
            .into();
        Self {
            config,
            generation: None,
            tensors,
            dtype: Dtype::F32,
        }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config.insert(key.into(), value);
        self
    }

    fn add(mut self, name: &str, shape: &[usize]) -> Self {
        self.tensors.push((name.into(), shape.into()));
        self
    }

    fn change(
        mut self,
        name: &str,
        change: impl FnOnce(&mut Vec<(String, Vec<usize>)>, usize),
    ) -> Self {
        let at = self.tensors.iter().position(|(n, _)| n == name).unwrap();
        change(&mut self.tensors, at);
        self
    }

    fn write(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let save = |name: &str, value: &Value| {
            fs::write(folder.path().join(name), value.to_string()).unwrap()
        };
        save("config.json", &Value::Object(self.config.clone()));
        if let Some(generation) = &self.generation {
            save("generation_config.json", generation);
        }
        let bytes = vec![0u8; 4 * 128];
        let views = self.tensors.iter().map(|(name, shape)| {
            let length = shape.iter().product::<usize>() * self.dtype.bitsize() / 8;
            (
                name,
                TensorView::new(self.dtype, shape.clone(), &bytes[..length]).unwrap(),
            )
        });
        let file = safetensors::serialize(views, None).unwrap();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        folder
    }

    /// The error on opening, which must hold all `words`.
    #[track_caller]
    fn refused(self, words: &[&str]) {
        let folder = self.write();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        let missing: Vec<_> = words
            .iter()
            .filter(|word| !error.contains(**word))
            .collect();
        assert!(missing.is_empty(), "{missing:?} not in: {error}");
    }
}

#[test]
fn every_float_type_loads_and_a_tied_head_is_none() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = Draft {
            dtype,
            ..Draft::new()
        }
        .write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert!(checkpoint.lm_head().unwrap().is_none());
        let layer = checkpoint.layer(0, Storage::Nf4).unwrap();
        assert_eq!(layer.input_norm, [0.0; 6]);
        assert!(
            layer
                .products
                .iter()
                .all(|m| matches!(m.data, MatrixData::Nf4(_)))
        );
        let embedding = checkpoint.embedding().unwrap();
        assert_eq!(
            matches!(embedding.data, MatrixData::Bf16(_)),
            dtype == Dtype::BF16
        );
    }
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    let config = |key: &'static str, value: Value, word: &'static str| {
        Draft::new()
            .set(key, value)
            .refused(&["config.json", &format!("`{key}`"), word]);
    };
    config("model_type", json!("qwen3_moe"), "qwen3_moe");
    config(
        "architectures",
        json!(["Qwen3ForSequenceClassification"]),
        "Qwen3ForCausalLM",
    );
    config("hidden_act", json!("gelu"), "silu");
    config("attention_bias", json!(true), "biases");
    config("use_sliding_window", json!(true), "sliding");
    config("attention_dropout", json!(0.1), "dropout");
    config(
        "layer_types",
        json!(["full_attention", "sliding_attention"]),
        "sliding_attention",
    );
    config(
        "rope_scaling",
        json!({"rope_type": "yarn", "factor": 4.0}),
        "yarn",
    );
    config(
        "rope_parameters",
        json!({"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}),
        "linear",
    );
    config("num_key_value_heads", json!(3), "does not divide");
    config("head_dim", json!(3), "even");
    config("vocab_size", json!("ten"), "ten");
    config("rms_norm_eps", Value::Null, "missing");
    config("rms_norm_eps", json!(-1e-6), "is -1e-6");
    config("rms_norm_eps", json!(1e300), "is 1e300");
    config("rms_norm_eps", json!(0), "is 0.0, not from 1e-30 to 1");
    config("rms_norm_eps", json!(1e-50), "is 1e-50");
    config("rope_theta", json!(0), "is 0");
    config("rope_theta", json!(-1e6), "is -1000000.0");
    config(
        "rope_theta",
        json!(1e-9),
        "is 1e-9, not a number from 1 to 1e12",
    );
    config("rope_theta", json!(1e300), "is 1e+300");
    for theta in [json!(0), json!(1e300), json!("1e6")] {
        Draft::new()
            .set("rope_parameters", json!({"rope_theta": theta}))
            .refused(&[
                "config.json",
                "`rope_parameters.rope_theta` is ",
                "from 1 to 1e12",
            ]);
    }
    config(
        "quantization_config",
        json!({"quant_method": "gptq"}),
        "4-bit",
    );
}

/// Sizes are multiplied and asked memory for before the first tensor is looked at.
#[test]
fn sizes_that_no_model_has_are_refused_by_key_and_value() {
    let keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ];
    let refused = |draft: Draft, key: &str, value: &Value| {
        let key = format!("`{key}`");
        draft.refused(&["config.json", &key, &format!("is {value}")]);
    };
    for key in keys {
        for value in [
            json!(0),
            json!(-1),
            json!(1.5),
            json!((1u64 << 20) + 1),
            json!(1u64 << 32),
            json!(10u64.pow(18)),
            json!(1u64 << 63),
            json!(u64::MAX),
            json!(1e30),
        ] {
            refused(Draft::new().set(key, value.clone()), key, &value);
        }
    }
    let most = json!(1 << 20);
    for (key, other, multiplied) in [
        ("num_hidden_layers", "head_dim", 2),
        ("num_attention_heads", "head_dim", 2),
        ("max_position_embeddings", "head_dim", 1 << 10),
    ] {
        let draft = Draft::new().set(other, json!(multiplied));
        refused(draft.set(key, most.clone()), key, &most);
    }
    // At the bounds, it is the tensors that do not fit.
    for (key, value, said) in [
        ("vocab_size", 1 << 20, "[10, 6], not [1048576, 6]"),
        ("hidden_size", 1 << 20, "[10, 6], not [10, 1048576]"),
        ("intermediate_size", 1 << 20, "[5, 6], not [1048576, 6]"),
        (
            "num_hidden_layers",
            1 << 12,
            "`model.layers.1.self_attn.q_proj.weight` is missing",
        ),
        ("num_attention_heads", 1 << 19, "[8, 6], not [1048576, 6]"),
        ("head_dim", 1 << 18, "[2], not [262144]"),
    ] {
        Draft::new().set(key, json!(value)).refused(&[said]);
    }
    // As many heads of keys as no heads of queries could be.
    Draft::new()
        .set("num_key_value_heads", json!(1 << 20))
        .refused(&[
            "`num_key_value_heads`",
            "does not divide the 4 attention heads",
        ]);
    let draft = Draft::new().set("max_position_embeddings", most.clone());
    Checkpoint::open(draft.write().path()).unwrap();
    let all = [
        ("vocab_size", 1 << 20),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("num_attention_heads", 1 << 10),
        ("num_key_value_heads", 1 << 10),
        ("head_dim", 1 << 10),
        ("max_position_embeddings", 1 << 18),
    ];
    let draft = all.into_iter().fold(Draft::new(), |draft, (key, size)| {
        draft.set(key, json!(size))
    });
    draft.refused(&["model.safetensors", "[10, 6], not [1048576, 1048576]"]);
}

/// The shapes that are published: hidden, inner, layers, query heads, key and value
/// heads; all have heads of 128 and 151,936 rows. The bounds must leave room for them.
#[test]
fn every_published_config_is_taken() {
    for (sizes, tied, positions, theta) in [
        ([1024, 3072, 28, 16, 8], true, 40_960, 1e6),
        ([2048, 6144, 28, 16, 8], true, 40_960, 1e6),
        ([2560, 9728, 36, 32, 8], true, 40_960, 1e6),
        ([4096, 12_288, 36, 32, 8], false, 40_960, 1e6),
        ([5120, 17_408, 40, 40, 8], false, 40_960, 1e6),
        ([5120, 25_600, 64, 64, 8], false, 40_960, 1e6),
        // 4B-Instruct-2507, and the longest context that any Qwen3 is published with.
        ([2560, 9728, 36, 32, 8], true, 262_144, 5e6),
        ([2560, 9728, 36, 32, 8], true, 1_010_000, 5e6),
    ] {
        let [hidden_size, intermediate_size, layers, heads, kv_heads] = sizes;
        let config = json!({
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
            "attention_dropout": 0.0, "bos_token_id": 151_643, "eos_token_id": 151_645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": hidden_size,
            "initializer_range": 0.02, "intermediate_size": intermediate_size,
            "max_position_embeddings": positions, "max_window_layers": layers,
            "model_type": "qwen3", "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "rope_scaling": null,
            "rope_theta": theta, "sliding_window": null, "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
            "vocab_size": 151_936,
        });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let expected = Config {
            vocab_size: 151_936,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim: 128,
            max_positions: positions,
            rms_eps: 1e-6,
            rope_theta: theta,
            tied,
        };
        assert_eq!(Config::load(folder.path()).unwrap(), expected);
    }
}

#[test]
fn tensors_are_checked_one_by_one() {
    let q = "model.layers.0.self_attn.q_proj.weight";
    let file = "model.safetensors";
    Draft::new()
        .change(q, |t, i| drop(t.remove(i)))
        .refused(&[q, "missing"]);
    Draft::new()
        .change(q, |t, i| t[i].1 = vec![6, 8])
        .refused(&[file, q, "[6, 8]", "[8, 6]"]);
    Draft::new()
        .add("model.layers.1.input_layernorm.weight", &[6])
        .refused(&[file, "layers.1", "unexpected"]);
    Draft::new()
        .add("model.layers.0.self_attn.q_proj.bias", &[8])
        .refused(&[file, "q_proj.bias", "unexpected"]);
    Draft {
        dtype: Dtype::I32,
        ..Draft::new()
    }
    .refused(&[file, "I32", "BF16"]);
    Draft::new()
        .set("tie_word_embeddings", json!(false))
        .refused(&["lm_head.weight", "missing"]);
    // Exports of old versions carry the rotary frequencies.
    let old = Draft::new()
        .add("model.layers.0.self_attn.rotary_emb.inv_freq", &[1])
        .write();
    Checkpoint::open(old.path()).unwrap();
}

/// Small Qwen3 models are published with lm_head beside the table it is tied to.
#[test]
fn a_stored_head_may_repeat_the_table_but_not_contradict_it() {
    let folder = Draft::new().add("lm_head.weight", &[10, 6]).write();
    assert!(
        Checkpoint::open(folder.path())
            .unwrap()
            .lm_head()
            .unwrap()
            .is_none()
    );
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let at = 8 + header + metadata.info("lm_head.weight").unwrap().data_offsets.0;
    bytes[at] = 1;
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("lm_head.weight") && error.contains("tie_word_embeddings"),
        "{error}"
    );
}

#[test]
fn a_weight_that_is_not_finite_is_refused_when_quantised() {
    let folder = Draft::new().write();
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let at = 8
        + header
        + metadata
            .info("model.layers.0.mlp.up_proj.weight")
            .unwrap()
            .data_offsets
            .0;
    bytes[at + 4 * 7..at + 4 * 8].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.layer(0, Storage::Nf4).unwrap_err().to_string();
    assert!(
        error.contains("mlp.up_proj") && error.contains("row 1, column 1"),
        "{error}"
    );
}

/// A copy of the sharded checkpoint in which a test changes a file.
fn spoilt(change: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(parity("sharded")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    change(folder.path());
    let error = Checkpoint::open(folder.path()).expect_err("refused");
    error.to_string()
}

#[test]
fn broken_downloads_are_told_by_file() {
    let third = "model-00003-of-00005.safetensors";
    let gone = spoilt(|f| fs::remove_file(f.join(third)).unwrap());
    assert!(
        gone.contains(third) && gone.contains("cannot be read"),
        "{gone}"
    );
    let short = spoilt(|f| {
        let bytes = fs::read(f.join(third)).unwrap();
        fs::write(f.join(third), &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(
        short.contains(third) && short.contains("cut short"),
        "{short}"
    );
    let page = spoilt(|f| fs::write(f.join(third), "<!doctype html><title>404</title>").unwrap());
    assert!(
        page.contains(third) && page.contains("safetensors"),
        "{page}"
    );
    let swapped = spoilt(|f| {
        fs::copy(f.join("model-00002-of-00005.safetensors"), f.join(third)).unwrap();
    });
    assert!(
        swapped.contains(third) && swapped.contains("index.json"),
        "{swapped}"
    );
    let outside = spoilt(|f| {
        let path = f.join("model.safetensors.index.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(third, "../elsewhere.safetensors")).unwrap();
    });
    assert!(
        outside.contains("../elsewhere") && outside.contains("weight_map"),
        "{outside}"
    );
    let empty = tempfile::tempdir().unwrap();
    fs::copy(
        parity("sharded/config.json"),
        empty.path().join("config.json"),
    )
    .unwrap();
    let error = Checkpoint::open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("neither model.safetensors nor"), "{error}");
}

#[test]
fn the_fingerprint_is_of_the_contents() {
    let draft = Draft::new();
    let (one, two) = (draft.write(), draft.write());
    let fingerprint = |folder: &Path| Checkpoint::open(folder).unwrap().fingerprint().unwrap();
    assert_eq!(fingerprint(one.path()), fingerprint(two.path()));
    let path = two.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = 1;
    fs::write(&path, &bytes).unwrap();
    assert_ne!(fingerprint(one.path()), fingerprint(two.path()));
    let other = Draft::new().set("rope_theta", json!(20000)).write();
    assert_ne!(fingerprint(one.path()), fingerprint(other.path()));
}

#[test]
fn stop_ids_are_one_or_many_and_fall_back_to_the_model() {
    let stop_ids = |generation: Option<Value>| {
        let folder = Draft {
            generation,
            ..Draft::new()
        }
        .write();
        qwen3::stop_ids(folder.path())
    };
    assert_eq!(stop_ids(None).unwrap(), [3]);
    assert_eq!(stop_ids(Some(json!({"top_k": 20}))).unwrap(), [3]);
    assert_eq!(stop_ids(Some(json!({"eos_token_id": 7}))).unwrap(), [7]);
    assert_eq!(
        stop_ids(Some(json!({"eos_token_id": [7, 2]}))).unwrap(),
        [7, 2]
    );
    let wrong = stop_ids(Some(json!({"eos_token_id": "end"})))
        .unwrap_err()
        .to_string();
    assert!(
        wrong.contains("generation_config.json") && wrong.contains("eos_token_id"),
        "{wrong}"
    );
    let none = Draft::new().set("eos_token_id", Value::Null).write();
    assert!(qwen3::stop_ids(none.path()).is_err());
}

#[test]
fn module_names_are_exactly_seven() {
    for module in Module::ALL {
        assert_eq!(module.name().parse::<Module>().unwrap(), module);
    }
    assert!(
        "lm_head"
            .parse::<Module>()
            .unwrap_err()
            .to_string()
            .contains("q_proj")
    );
}
