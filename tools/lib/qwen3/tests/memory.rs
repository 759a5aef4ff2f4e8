//! The plan of memory against what the heap really gave.
//!
//! An allocator that counts serves the whole process, so this file has one test.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use engine::{Backend, Cpu, Reading};
use qwen3::plan::{self, Extent, Outline, Part};
use qwen3::{
    AdapterConfig, Batch, Checkpoint, Held, Keep, Lora, LoraLayout, Model, Optimiser,
    OptimiserKind, Pass, Row, Storage, Update,
};

/// The system's allocator, counting.
struct Meter;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's own allocator does the work.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            USED.fetch_add(layout.size(), Relaxed) + layout.size(),
            Relaxed,
        );
        // SAFETY: as asked for by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static METER: Meter = Meter;

/// Rows of these lengths, the second half of each to be predicted.
fn rows(lengths: &[usize]) -> Vec<(Vec<u32>, Vec<bool>)> {
    let row = |&len: &usize| {
        let ids = (0..len as u32).map(|i| i * i % 90).collect();
        (ids, (0..len).map(|i| 2 * i >= len).collect())
    };
    lengths.iter().map(row).collect()
}

/// Two steps over the rows; how much more was in use at most than before.
fn measured(
    checkpoint: &Checkpoint,
    held: Held,
    layout: &LoraLayout,
    batch: &[Row<'_>],
    (keep, kind): (Keep, OptimiserKind),
) -> [usize; 2] {
    let before = USED.load(Relaxed);
    let model = Model::load(Cpu, checkpoint, held).unwrap();
    let weights = USED.load(Relaxed) - before;
    let initial = model.initial(layout, 1).unwrap();
    let mut params = model.adapter_params(layout, &initial).unwrap();
    drop(initial);
    // What loading took beside the weights is given back by now.
    PEAK.store(USED.load(Relaxed), Relaxed);
    let mut grads = Cpu.alloc_f32(layout.len()).unwrap();
    let mut optimiser = Optimiser::new(&Cpu, layout, kind).unwrap();
    let mut pass = Pass::new(keep);
    for _ in 0..2 {
        let batch = Batch::new(&Cpu, batch).unwrap();
        let lora = Lora {
            layout,
            params: &params,
        };
        let losses = model
            .losses_and_gradients(&mut pass, &batch, lora, None, (&mut grads, 0.1))
            .unwrap();
        let with = Update {
            lr: 1e-3,
            weight_decay: 0.0,
            max_norm: None,
        };
        let norm = optimiser.update(&Cpu, with, &mut grads, &mut params);
        model.renew_norms(&mut pass, layout, &mut params).unwrap();
        assert!(norm.wait().unwrap()[0].is_finite());
        assert!(losses.wait().unwrap().iter().all(|loss| loss.is_finite()));
    }
    [weights, PEAK.load(Relaxed) - before]
}

/// What the plan leaves out, lists and records that are small: at most 40 KB here, three
/// runs alike (the test prints it). Products pack their operands on the stack.
const BESIDE: usize = 64 << 10;

#[test]
fn the_plan_is_what_the_heap_gives() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2);
    pool.build().unwrap().install(check);
}

fn check() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests");
    let mut first = true;
    let nf4_head = Held {
        head: Storage::Nf4,
        ..Storage::Nf4.into()
    };
    for (name, held) in [
        ("demo/model", Storage::Nf4.into()),
        ("demo/model", Storage::AsStored.into()),
        ("demo/model", nf4_head), // tied
        ("parity/files/sharded", Storage::AsStored.into()),
        ("parity/files/sharded", nf4_head), // apart
        ("parity/files/nf4", Storage::AsStored.into()),
        // Its scales are as they were, four times as many bytes, whatever is asked for.
        ("parity/files/nf4-plain", Storage::Nf4.into()),
    ] {
        let checkpoint = Checkpoint::open(&folder.join(name)).unwrap();
        let config = checkpoint.config();
        let outline = Outline::new(&Cpu, &checkpoint, held).unwrap();
        for (lengths, keep, dora, eight_bit) in [
            (&[40; 50][..], Keep::All, false, false),
            (&[40; 50], Keep::All, true, true),
            (&[40; 50], Keep::Layers(0), false, true),
            (&[7, 200, 31, 90], Keep::Layers(1), true, false),
        ] {
            let adapter = AdapterConfig {
                dora,
                ..AdapterConfig::new(8, 8.0)
            };
            let layout = LoraLayout::new(config, &adapter).unwrap();
            let rows = rows(lengths);
            let batch: Vec<_> = (0..)
                .zip(&rows)
                .map(|(number, (ids, labelled))| Row {
                    number,
                    ids,
                    labelled,
                })
                .collect();
            let weights = outline.weights(&Cpu);
            let kind = OptimiserKind {
                eight_bit,
                lr_ratio: 1.0,
            };
            let pass = (outline.pass(&Cpu, &layout, Extent::of(&batch), keep)).unwrap();
            let planned = (weights + plan::adapter(&layout, &kind) + pass).total();
            let run = || measured(&checkpoint, held, &layout, &batch, (keep, kind));
            // The first time of all, libraries take what they keep.
            if std::mem::take(&mut first) {
                run();
            }
            let [loaded, peak] = run();
            println!(
                "{name}, {held:?}, {} rows, {keep:?}: {planned} planned, {peak} used, {:+.2}%",
                lengths.len(),
                100.0 * (peak as f64 / planned as f64 - 1.0)
            );
            assert!((planned..planned + BESIDE).contains(&peak));
            // Beside the values: the matrices' own records, 2 KB a layer.
            let weights = weights.total();
            assert!((weights..weights + (4 << 10) * config.layers).contains(&loaded));
            let shares = keep != Keep::All && (keep, config.layers) != (Keep::Layers(1), 2);
            assert_eq!(pass.of(Part::Shared) > 0, shares);
        }
    }
}
