//! The autograd model against transformers, on the demo's own weights.
//! Reference and script: tests/parity/tiny-model.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::Value;
use tiny_model::autograd::{Batch, Model};

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn floats(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_u64().unwrap() as u32).collect()
}

fn furthest(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let apart = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, f64::max)
}

fn cases() -> Vec<Value> {
    let cases = std::fs::read(tests().join("parity/tiny-model/cases.json")).unwrap();
    serde_json::from_slice(&cases).unwrap()
}

/// Three times the furthest apart that was seen over the three rows: 1.22e-5 in
/// f32; 9.4e-6 in f64, which is what transformers' own f32 rounds off. The largest
/// logit is 11.3.
const TOLERANCES: [(DType, f64); 2] = [(DType::F32, 3.7e-5), (DType::F64, 2.8e-5)];

#[test]
fn logits_are_those_of_transformers() {
    // The rows packed into one batch must give what transformers gives each alone.
    let rows = cases();
    let mut batch = Batch::default();
    for row in &rows {
        let row = ids(&row["ids"]);
        batch.push(&row, &vec![true; row.len()]);
    }
    for (dtype, tolerance) in TOLERANCES {
        let model = Model::load(&tests().join("demo/model"), dtype).unwrap();
        let logits = model.logits(&batch, None).unwrap();
        let logits: Vec<Vec<f64>> = logits.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
        let nll = model.nll(&batch, None).unwrap();
        let nll: Vec<f64> = nll.to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        let (mut end, mut seen) = (0, 0);
        for row in &rows {
            let theirs = floats(&row["nll"]);
            let apart = furthest(&nll[seen..seen + theirs.len()], &theirs);
            assert!(apart < tolerance, "{dtype:?}: NLL {apart:e} apart");
            seen += theirs.len();
            end += ids(&row["ids"]).len();
            let apart = furthest(&logits[end - 1], &floats(&row["last_logits"]));
            assert!(apart < tolerance, "{dtype:?}: logits {apart:e} apart");
        }
    }
}

/// Greedy by the whole forward pass each time, until `<|im_end|>`.
#[test]
fn greedy_replies_are_those_of_transformers() {
    let model = Model::load(&tests().join("demo/model"), DType::F32).unwrap();
    for row in cases() {
        let prompt = row["prompt_tokens"].as_u64().unwrap() as usize;
        let mut sequence = ids(&row["ids"])[..prompt].to_vec();
        let theirs = ids(&row["greedy"]);
        for _ in &theirs {
            let mut batch = Batch::default();
            batch.push(&sequence, &vec![false; sequence.len()]);
            let logits: Vec<Vec<f32>> = model.logits(&batch, None).unwrap().to_vec2().unwrap();
            let last = logits.last().unwrap();
            let best = (0u32..)
                .zip(last)
                .max_by(|a, b| a.1.total_cmp(b.1))
                .unwrap();
            sequence.push(best.0);
        }
        assert_eq!(sequence[prompt..], theirs, "{}", row["greedy_text"]);
    }
}
