//! A second, independent Qwen3, and what the demo is made of.
//!
//! [`autograd`] writes the model's forward pass in candle's differentiable
//! operations and lets candle find the gradients. It shares no line with the
//! explicit backward pass that the trainer uses, which is why the two agreeing
//! means something. The same model is small enough to be pretrained on a
//! laptop, so it also makes the demo's weights: [`demo`] writes tweets and
//! replies from a seed, [`corpus`] a text to learn to write from, [`vocabulary`]
//! a tokenizer of the real form, and [`pretrain`] the model folder.

pub mod autograd;
pub mod corpus;
pub mod demo;
pub mod grammar;
pub mod pretrain;
pub mod random;
pub mod topics;
pub mod vocabulary;

/// The seed behind tests/demo/tweets.jsonl.
pub const DATA_SEED: u64 = 1;
/// The seed behind tests/demo/model.
pub const MODEL_SEED: u64 = 2;
/// Documents of the pretraining text.
pub const DOCUMENTS: usize = 36_000;
/// Pretraining steps.
pub const STEPS: usize = 1500;
