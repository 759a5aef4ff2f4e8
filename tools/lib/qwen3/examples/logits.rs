//! The logits of a model with an adapter, for comparing them with other software.
//!
//!     logits MODEL ADAPTER < rows.jsonl
//!
//! Each line of standard input is a list of token ids; each line of standard
//! output is the logits after each of its tokens, one flat list.

use std::error::Error;
use std::path::PathBuf;

use engine::Cpu;
use qwen3::{Adapter, Checkpoint, Model, Storage};

fn main() -> Result<(), Box<dyn Error>> {
    let folders: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let [model, adapter] = folders.as_slice() else {
        return Err("usage: logits MODEL ADAPTER < rows.jsonl".into());
    };
    let checkpoint = Checkpoint::open(model)?;
    let adapter = Adapter::load(adapter, checkpoint.config())?;
    let model = Model::load(Cpu, &checkpoint, Storage::AsStored)?;
    let adapter = model.load_adapter(&adapter)?;
    for line in std::io::stdin().lines() {
        let ids: Vec<u32> = serde_json::from_str(&line?)?;
        let logits = model.logits(&[&ids], Some(adapter.lora()))?;
        println!("{}", serde_json::to_string(&logits)?);
    }
    Ok(())
}
