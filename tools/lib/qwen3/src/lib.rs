//! Qwen3 with low-rank adapters: its files, its text and its mathematics.
//!
//! The files come in Hugging Face's and PEFT's layouts, so that what is made
//! here is used elsewhere and the other way round, and reading them refuses
//! whatever this crate would compute differently.
//!
//! The mathematics is one explicit forward and backward pass over the operations
//! of a backend (crate `engine`): [`Model`], its adapters' places ([`LoraLayout`]),
//! packed rows ([`Batch`]), the memory of a pass ([`Pass`]), the [`Optimiser`], and
//! [`generate`].

mod adapter;
mod batch;
mod chat;
mod config;
mod conversation;
mod error;
mod fingerprint;
mod generate;
mod logits;
mod lora;
mod merged;
mod model;
mod optimiser;
mod pass;
pub mod plan;
mod prompt;
mod quantized;
mod random;
mod seen;
mod targets;
mod template;
mod weight;
mod weights;
mod writer;

pub use adapter::{
    Adapter, AdapterConfig, Pair, SETTINGS, check_sums, lacks, note_sums, unsupported,
};
pub use batch::{Batch, Row};
pub use chat::{Chat, Encoded, LossOn};
pub use config::{Config, Module, UnknownModule, stop_ids};
pub use conversation::{Conversation, Form, Wording};
pub use error::{Error, Result, is_out_of_memory, read};
pub use generate::{Completion, Finish, Generation, Prompt, Slots, generate};
pub use lora::{Lora, LoraLayout, OwnedLora};
pub use merged::Merged;
pub use model::{Ends, Losses, Model, StepNoise};
pub use optimiser::{CodedMoment, Moments, Optimiser, OptimiserKind, Update};
pub use pass::{Keep, Pass};
pub use prompt::{PromptError, PromptTemplate};
pub use seen::{ROWS, Seen};
pub use targets::{Strength, Targets, Unfit};
pub use template::{Message, RenderOptions};
pub use weight::{Values, Weight};
pub use weights::{Checkpoint, Held, LayerWeights, Storage};
