//! The operations a decoder with low-rank adapters is made of, behind one trait.
//!
//! The model (crate `qwen3`) writes its forward and backward pass once, over
//! the two dozen fused operations of [`Backend`]; a backend decides how each is
//! computed. [`Cpu`] is plain and right: it trains small models, and it is what
//! every kernel of the faster [`Cuda`] is checked against, operation by operation.
//! [`Device`] finds out at run time which of the two there is.
//!
//! Three decisions shape the trait. The caller owns every buffer, scratch
//! included, so that a device can plan its memory and queue its work without
//! waiting. Operations are as coarse as the model allows (a product with its
//! adapters and residual, a norm with its rotation), because that is where a
//! GPU saves its passes over memory. And nothing depends on where a token sits
//! in a buffer: tokens of many rows lie end to end ([`Ragged`]), and randomness
//! is a function of what it is for ([`rng`]), so packing, recomputation and the
//! number of threads change no result.

mod backend;
mod cpu;
pub mod cuda;
pub mod device;
pub mod dynamic;
mod error;
mod matrix;
pub mod nf4;
mod ragged;
pub mod rng;

pub use backend::{
    AdamW, Adapter, Backend, Cache, Dora, Dropout, Group, Heads, LinearGrad, MOMENT_BLOCK, Member,
    Neftune, QkNorms, Reading, Sampling, Spent, Stretch,
};
pub use cpu::{Cpu, Rounded, Workspace};
pub use cuda::Cuda;
pub use device::{Choice, Device};
pub use error::{Error, Result};
pub use matrix::{HostMatrix, MatrixData, MatrixKind};
pub use ragged::Ragged;
