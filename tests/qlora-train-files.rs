//! The file side of qlora-train through the real binary: 4-bit bases, merging,
//! GGUF, inspecting.
#![allow(clippy::unwrap_used)]
