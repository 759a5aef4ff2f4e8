//! The model against independent ones: candle's autograd in f64 on the same
//! weights, dumps of transformers and peft, and what training must do.
#![allow(clippy::unwrap_used)]

mod adapters;
mod generation;
mod gradients;
mod peft;
mod support;
mod training;
