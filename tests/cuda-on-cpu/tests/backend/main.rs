//! The CUDA backend without a GPU, and, on a machine that has one, with it:
//! each kernel against the CPU's operation, then a whole small model; and first of
//! all the runtime that stands in for the device.
#![allow(clippy::unwrap_used)]

mod interpreted;
mod kernels;
mod memory;
mod model;
mod nvidia;
mod runtime;
mod support;
