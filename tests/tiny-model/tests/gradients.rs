//! The oracle itself is checked against mathematics: central differences in f64,
//! and the invariances that a packed batch must have.
#![allow(clippy::unwrap_used, missing_docs)]

use candle_core::{DType, Tensor};
use tiny_model::autograd::{Batch, Config, Lora, Model, TARGETS};
use tiny_model::random::Random;

fn config(tied: bool) -> Config {
    Config {
        vocab_size: 23,
        hidden_size: 12,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 4,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: tied,
    }
}

fn batch(rows: &[usize]) -> Batch {
    let mut random = Random::new(5);
    let mut batch = Batch::default();
    for &length in rows {
        let ids: Vec<u32> = (0..length).map(|_| random.below(23) as u32).collect();
        let labelled: Vec<bool> = (0..length).map(|i| i >= length / 2).collect();
        batch.push(&ids, &labelled);
    }
    batch
}

/// A model whose norm weights are not all 1, so that their order matters.
fn model(tied: bool) -> Model {
    let mut model = Model::random(config(tied), 0.4, DType::F64, 1).unwrap();
    let mut random = Random::new(2);
    for (name, tensor) in &mut model.weights {
        if name.contains("norm") {
            *tensor = (random.uniform(tensor.dims(), 0.3, DType::F64).unwrap() + 1.0).unwrap();
        }
    }
    model
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Central differences at three entries of a tensor against its gradient. With
/// h = 1e-5 the truncation error is about 1e-10 and the rounding error 1e-11.
fn check(name: &str, tensor: &Tensor, gradient: &Tensor, loss: impl Fn(Tensor) -> f64) {
    const STEP: f64 = 1e-5;
    let (at, gradient) = (values(tensor), values(gradient));
    let mut random = Random::new(at.len() as u64);
    assert!(gradient.iter().any(|g| *g != 0.0), "{name}: all zero");
    for _ in 0..3 {
        let entry = random.below(at.len());
        let moved = |by: f64| {
            let mut at = at.clone();
            at[entry] += by;
            loss(Tensor::from_vec(at, tensor.dims(), tensor.device()).unwrap())
        };
        let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        let error = (slope - gradient[entry]).abs();
        assert!(
            error < 1e-8,
            "{name}[{entry}]: autograd {} but difference {slope}",
            gradient[entry]
        );
    }
}

#[test]
fn weight_gradients_are_slopes() {
    for tied in [true, false] {
        let model = model(tied);
        let batch = batch(&[7, 4, 9]);
        let (_, gradients) = model.weight_gradients(&batch, None).unwrap();
        assert_eq!(gradients.len(), model.config.weights().len());
        for (name, gradient) in &gradients {
            check(name, &model.weights[name], gradient, |tensor| {
                let mut moved = model.clone();
                moved.weights.insert(name.clone(), tensor);
                moved.loss(&batch, None).unwrap().to_scalar().unwrap()
            });
        }
    }
}

#[test]
fn lora_gradients_are_slopes_with_dropout_too() {
    let model = model(true);
    let batch = batch(&[5, 8]);
    let mut lora = Lora::random(&model.config, &TARGETS, 3, 0.7, 0.2, DType::F64, 3).unwrap();
    let mut random = Random::new(4);
    let mask: Vec<f64> = (0..13 * 12)
        .map(|_| f64::from(u8::from(random.chance(0.75))) / 0.75)
        .collect();
    let mask = Tensor::from_vec(mask, (13, 12), &candle_core::Device::Cpu).unwrap();
    lora.masks
        .insert("model.layers.1.self_attn.q_proj".to_owned(), mask);
    let (_, gradients) = model.lora_gradients(&batch, &lora).unwrap();
    assert_eq!(gradients.len(), 2 * 7 * 2);
    for (name, gradient) in &gradients {
        check(name, &lora.tensors[name], gradient, |tensor| {
            let mut moved = lora.clone();
            moved.tensors.insert(name.clone(), tensor);
            model
                .loss(&batch, Some(&moved))
                .unwrap()
                .to_scalar()
                .unwrap()
        });
    }
}

#[test]
fn a_zero_b_changes_nothing() {
    let model = model(true);
    let batch = batch(&[6]);
    let lora = Lora::random(&model.config, &TARGETS, 2, 1.0, 0.0, DType::F64, 3).unwrap();
    let with = values(&model.logits(&batch, Some(&lora)).unwrap());
    assert_eq!(with, values(&model.logits(&batch, None).unwrap()));
}

/// A packed row reads nothing of its neighbours: each segment's figures are those
/// of the row alone. f64 rounding over sums of other lengths: below 1e-12.
#[test]
fn packing_changes_nothing() {
    let model = model(false);
    let rows = [7, 4, 9, 4];
    let packed = batch(&rows);
    let together = values(&model.nll(&packed, None).unwrap());
    let mut alone = Vec::new();
    let mut start = 0;
    for length in rows {
        let row = Batch {
            ids: packed.ids[start..start + length].to_vec(),
            targets: packed.targets[start..start + length].to_vec(),
            segments: vec![length],
            window: 0,
        };
        alone.extend(values(&model.nll(&row, None).unwrap()));
        start += length;
    }
    assert_eq!(together.len(), alone.len());
    for (a, b) in together.iter().zip(&alone) {
        assert!((a - b).abs() < 1e-12, "{a} in company, {b} alone");
    }
}

/// Windows are a matter of speed: 7+5 and 9+3 in windows of 12 as in one of 24.
#[test]
fn windows_change_nothing() {
    let model = model(true);
    let whole = batch(&[7, 5, 9, 3]);
    let windowed = Batch {
        window: 12,
        ..whole.clone()
    };
    let a = values(&model.logits(&whole, None).unwrap());
    let b = values(&model.logits(&windowed, None).unwrap());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-12));
}

/// The future is invisible: changing the last token leaves earlier logits alone.
#[test]
fn attention_is_causal() {
    let model = model(true);
    let batch = batch(&[8]);
    let mut other = batch.clone();
    other.ids[7] = (other.ids[7] + 1) % 23;
    let before = values(&model.logits(&batch, None).unwrap());
    let after = values(&model.logits(&other, None).unwrap());
    assert_eq!(before[..7 * 23], after[..7 * 23]);
    assert_ne!(before[7 * 23..], after[7 * 23..]);
}

#[test]
fn a_missing_or_misshapen_weight_is_named() {
    let model = model(true);
    let mut weights: std::collections::HashMap<_, _> = model.weights.clone().into_iter().collect();
    let norm = weights.remove("model.norm.weight").unwrap();
    let error = Model::new(config(true), weights.clone()).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight"));
    weights.insert("model.norm.weight".into(), norm.narrow(0, 0, 3).unwrap());
    let error = Model::new(config(true), weights).unwrap_err();
    assert!(error.to_string().contains("expected [12]"), "{error}");
}
