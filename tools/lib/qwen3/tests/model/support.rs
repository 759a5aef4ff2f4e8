//! A small random model, once as ours and once as the candle-autograd oracle's.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use engine::{Backend, Cpu, HostMatrix};
use qwen3::{
    AdapterConfig, Batch, Config, Ends, LayerWeights, Lora, LoraLayout, Model, Module, Row,
};
use tiny_model::autograd::{self, TARGETS};

/// A conversation of the tests: tokens and which of them are predicted.
pub type Tokens = (Vec<u32>, Vec<bool>);

/// Both models with the same weights and adapters.
pub struct Twins {
    pub oracle: autograd::Model,
    pub oracle_lora: autograd::Lora,
    pub model: Model<Cpu>,
    pub layout: LoraLayout,
    pub params: Vec<f32>,
}

/// Odd sizes: grouped queries, `heads × head_dim ≠ hidden`, nothing a multiple of 16.
pub fn shape(tied: bool) -> autograd::Config {
    autograd::Config {
        vocab_size: 61,
        hidden_size: 36,
        intermediate_size: 52,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 10,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: tied,
    }
}

/// Values of a tensor as f32.
pub fn floats(t: &Tensor) -> Vec<f32> {
    let t = t.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    t.to_vec1().unwrap()
}

/// The modules in the order of both sides' lists.
pub fn modules() -> impl Iterator<Item = (Module, &'static str)> {
    Module::ALL.into_iter().zip(TARGETS)
}

impl Twins {
    /// Weights are drawn in f32, so that both sides hold the same numbers; the
    /// oracle computes with them in f64.
    pub fn new(tied: bool, rank: usize) -> Self {
        let shape = shape(tied);
        let drawn = autograd::Model::random(shape.clone(), 0.15, DType::F32, 11).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let weights = drawn
            .weights
            .iter()
            .map(|(name, t)| (name.clone(), wide(t)));
        let oracle = autograd::Model::new(shape.clone(), weights.collect()).unwrap();
        let scale = 1.7;
        let mut lora =
            autograd::Lora::random(&shape, &TARGETS, rank, scale, 0.2, DType::F32, 5).unwrap();
        let settings = AdapterConfig::new(rank, scale * rank as f64);
        let layout = LoraLayout::new(&config(&shape), &settings).unwrap();
        let mut params = vec![0.0; layout.len()];
        for layer in 0..shape.num_hidden_layers {
            for (module, target) in modules() {
                let (a, b) = layout.ranges(layer, module).unwrap();
                let of = |factor| floats(&lora.tensors[&peft(layer, target, factor)]);
                params[a].copy_from_slice(&of("A"));
                params[b].copy_from_slice(&of("B"));
            }
        }
        lora.tensors = lora
            .tensors
            .iter()
            .map(|(name, t)| (name.clone(), wide(t)))
            .collect();
        Self {
            model: ours(&shape, &drawn.weights),
            oracle,
            oracle_lora: lora,
            layout,
            params,
        }
    }

    pub fn lora(&self) -> Lora<'_, Cpu> {
        Lora {
            layout: &self.layout,
            params: &self.params,
        }
    }
}

/// The peft name of a factor.
pub fn peft(layer: usize, target: &str, factor: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{target}.lora_{factor}.weight")
}

pub fn config(shape: &autograd::Config) -> Config {
    Config {
        vocab_size: shape.vocab_size,
        hidden_size: shape.hidden_size,
        intermediate_size: shape.intermediate_size,
        layers: shape.num_hidden_layers,
        heads: shape.num_attention_heads,
        kv_heads: shape.num_key_value_heads,
        head_dim: shape.head_dim,
        max_positions: 256,
        rms_eps: shape.rms_norm_eps as f32,
        rope_theta: shape.rope_theta,
        tied: shape.tie_word_embeddings,
    }
}

/// Our model with these weights.
pub fn ours(shape: &autograd::Config, weights: &BTreeMap<String, Tensor>) -> Model<Cpu> {
    let get = |name: &str| floats(&weights[name]);
    let matrix = |name: &str| {
        let [rows, cols] = weights[name].dims() else {
            panic!("{name}")
        };
        HostMatrix::f32(*rows, *cols, get(name))
    };
    let layer = |i: usize| -> engine::Result<_> {
        let name = |rest: &str| format!("model.layers.{i}.{rest}.weight");
        Ok(LayerWeights {
            input_norm: get(&name("input_layernorm")),
            post_attention_norm: get(&name("post_attention_layernorm")),
            q_norm: get(&name("self_attn.q_norm")),
            k_norm: get(&name("self_attn.k_norm")),
            products: TARGETS.map(|target| matrix(&name(target))),
        })
    };
    let ends = Ends {
        embedding: matrix("model.embed_tokens.weight"),
        final_norm: get("model.norm.weight"),
        lm_head: (!shape.tie_word_embeddings).then(|| matrix("lm_head.weight")),
    };
    Model::new(
        Cpu,
        config(shape),
        ends,
        (0..shape.num_hidden_layers).map(layer),
    )
    .unwrap()
}

/// Rows of different lengths, some longer than a block of the attention.
pub fn rows() -> Vec<Tokens> {
    let row = |seed: u32, len: u32, from: u32| {
        let ids = (0..len).map(|i| (seed + i * i * 7 + i * 3) % 61).collect();
        (ids, (0..len).map(|i| i >= from && i % 5 != 4).collect())
    };
    vec![
        row(1, 7, 3),
        row(9, 90, 20),
        row(4, 1, 0),
        row(30, 23, 1),
        row(17, 66, 60),
    ]
}

pub fn batch(rows: &[Tokens]) -> Batch<Cpu> {
    numbered(rows, 0)
}

/// A batch whose first row is number `first` of the data.
pub fn numbered(rows: &[Tokens], first: u32) -> Batch<Cpu> {
    let rows: Vec<_> = (first..)
        .zip(rows)
        .map(|(number, (ids, labelled))| Row {
            number,
            ids,
            labelled,
        })
        .collect();
    Batch::new(&Cpu, &rows).unwrap()
}

pub fn oracle_batch(rows: &[Tokens]) -> autograd::Batch {
    let mut batch = autograd::Batch::default();
    for (ids, labelled) in rows {
        batch.push(ids, labelled);
    }
    batch
}

/// `max |a - b| / max |b|`.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // `max` would pass over what is not a number.
    assert!(a.iter().chain(b).all(|x| x.is_finite()));
    let top = b.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let off = a
        .iter()
        .zip(b)
        .fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    off / top
}

/// Fresh gradients.
pub fn zeros(len: usize) -> Vec<f32> {
    Cpu.alloc_f32(len).unwrap()
}
