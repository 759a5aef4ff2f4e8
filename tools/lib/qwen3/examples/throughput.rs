//! Tokens per second of training and of greedy generation, on synthetic rows.
//!
//!     cargo run --release -p qwen3 --example throughput -- MODEL_DIR [f32|nf4] [BATCH] [SEQ]
//!
//! Half of each row is labelled. The rate per CPU-second counts all threads, so
//! it holds up on a machine that is busy with other things.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use engine::{Backend, Cpu, Reading, Sampling};
use qwen3::{
    AdapterConfig, Batch, Checkpoint, Generation, Keep, Lora, LoraLayout, Model, Optimiser,
    OptimiserKind, Pass, Prompt, Row, Storage, Update, generate,
};

/// Processor seconds of all threads so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |s| s.parse().unwrap());
    let storage = match args.get(2).map(String::as_str) {
        Some("nf4") => Storage::Nf4,
        _ => Storage::AsStored,
    };
    let (rows, len) = (number(3, 8), number(4, 128));
    let checkpoint = Checkpoint::open(Path::new(&args[1])).unwrap();
    let model = Model::load(Cpu, &checkpoint, storage).unwrap();
    let vocabulary = model.config().vocab_size as u32;
    println!("{}, {rows} rows of {len}", Cpu.describe());

    let layout = LoraLayout::new(model.config(), &AdapterConfig::new(16, 16.0)).unwrap();
    let mut params = layout.init(0);
    let mut grads = Cpu.alloc_f32(layout.len()).unwrap();
    let mut optimiser = Optimiser::new(&Cpu, &layout, OptimiserKind::default()).unwrap();
    let ids: Vec<Vec<u32>> = (0..rows as u32)
        .map(|r| {
            (0..len as u32)
                .map(|i| (i * i + 31 * r) % vocabulary)
                .collect()
        })
        .collect();
    let labelled: Vec<bool> = (0..len).map(|i| i >= len / 2).collect();
    let mut pass = Pass::new(Keep::All);
    let (mut walls, mut cpus) = (Vec::new(), Vec::new());
    for step in 0..12 {
        let (wall, cpu) = (Instant::now(), cpu_seconds());
        let batch: Vec<_> = ids
            .iter()
            .map(|ids| Row {
                number: 0,
                ids,
                labelled: &labelled,
            })
            .collect();
        let batch = Batch::new(&Cpu, &batch).unwrap();
        let lora = Lora {
            layout: &layout,
            params: &params,
        };
        let scale = 1.0 / batch.labelled() as f32;
        let losses = model
            .losses_and_gradients(&mut pass, &batch, lora, None, (&mut grads, scale))
            .unwrap();
        let update = Update {
            lr: 2e-4,
            weight_decay: 0.0,
            max_norm: Some(1.0),
        };
        let norm = optimiser.update(&Cpu, update, &mut grads, &mut params);
        let losses = losses.wait().unwrap();
        let loss = losses.iter().sum::<f32>() / losses.len() as f32;
        let norm = norm.wait().unwrap()[0];
        if step >= 2 {
            walls.push(wall.elapsed().as_secs_f64());
            cpus.push(cpu_seconds() - cpu);
        } else {
            println!("loss {loss:.4} norm {norm:.4}");
        }
    }
    walls.sort_by(f64::total_cmp);
    let tokens = (rows * len) as f64;
    println!(
        "train: {:.0} tokens/s (median), {:.0} best, {:.0} per CPU-second",
        tokens / walls[walls.len() / 2],
        tokens / walls[0],
        tokens * cpus.len() as f64 / cpus.iter().sum::<f64>(),
    );

    let prompts: Vec<_> = (0..)
        .zip(&ids)
        .map(|(number, ids)| Prompt {
            number,
            ids: &ids[..len / 4],
        })
        .collect();
    let how = Generation {
        sampling: Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        },
        max_new_tokens: 64,
        stop_ids: &[],
        slots: rows,
    };
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    let lora = Lora {
        layout: &layout,
        params: &params,
    };
    let replies = generate(&model, Some(lora), &prompts, &how, |_| {}).unwrap();
    let new: usize = replies.iter().map(|r| r.ids.len()).sum();
    println!(
        "generate: {:.0} tokens/s, {:.0} per CPU-second",
        new as f64 / wall.elapsed().as_secs_f64(),
        new as f64 / (cpu_seconds() - cpu),
    );
}
