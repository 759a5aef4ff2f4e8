//! `tiny-model data|train`: makes the files under tests/demo from seeds.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};
use tiny_model::{DATA_SEED, DOCUMENTS, MODEL_SEED, STEPS, corpus, demo, pretrain};

/// Makes the demo's data and its tiny Qwen3 from seeds.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes the generated tweets as an Apify export.
    Data {
        /// Where to write it.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Another seed makes other tweets.
        #[arg(long, default_value_t = DATA_SEED)]
        seed: u64,
    },
    /// Trains tokenizer and model and writes the model folder.
    Train {
        /// Where to write it.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Seed of the pretraining text, the weights and the order of rows.
        #[arg(long, default_value_t = MODEL_SEED)]
        seed: u64,
        /// Seed of the tweets that the pretraining text must not repeat.
        #[arg(long, default_value_t = DATA_SEED)]
        data_seed: u64,
        /// Optimiser steps.
        #[arg(long, default_value_t = STEPS)]
        steps: usize,
    },
}

fn main() -> Result<()> {
    // Pretraining brings its own two threads, and small products shared out among
    // more make each other wait. The result is the same either way.
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    }
    match Arguments::parse().command {
        Command::Data { out, seed } => pretrain::save(&out, demo::write(seed)?.export.as_bytes()),
        Command::Train {
            out,
            seed,
            data_seed,
            steps,
        } => {
            let demo = demo::write(data_seed)?;
            let documents = corpus::write(DOCUMENTS, &demo.tweets, seed)?;
            let start = Instant::now();
            let files = pretrain::run(&documents, steps, seed, |step, loss| {
                if step % 10 == 0 || step == 1 {
                    let seconds = start.elapsed().as_secs();
                    eprintln!("tiny-model: step {step}/{steps} loss {loss:.3} ({seconds} s)");
                }
            })?;
            for (name, bytes) in files {
                pretrain::save(&out.join(name), &bytes)?;
            }
            Ok(())
        }
    }
}
