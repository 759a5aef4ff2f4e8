//! `tiny-model data|train`: regenerates the files under tests/demo.
fn main() {}
