//! The plan of memory against what the backend allocates.

use std::path::Path;

use cuda_on_cpu::{Emulated, Order};
use engine::{Backend, Cuda, Reading, Sampling};
use qwen3::plan::{self, Extent, Outline, Part};
use qwen3::{
    AdapterConfig, Batch, Checkpoint, Generation, Held, Keep, Lora, LoraLayout, Model, Optimiser,
    OptimiserKind, Pass, Prompt, Row, Slots, Storage, Update,
};

#[test]
fn the_plan_is_what_is_allocated() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (tied, untied) = ("demo/model", "parity/files/sharded");
    let (nested, plain) = ("parity/files/nf4", "parity/files/nf4-plain");
    let as_stored = Held::from(Storage::AsStored);
    let nf4 = Held::from(Storage::Nf4);
    let nf4_head = Held {
        head: Storage::Nf4,
        ..nf4
    };
    for (name, held, keep, dora, eight_bit, decoded) in [
        (tied, nf4, Keep::All, false, false, 4),
        (tied, nf4, Keep::Layers(0), false, true, 0),
        (tied, nf4_head, Keep::Layers(0), false, true, 1),
        (tied, as_stored, Keep::Layers(2), true, false, 1),
        (untied, nf4, Keep::Layers(1), true, true, 1),
        (untied, nf4_head, Keep::Layers(0), true, true, 0),
        (untied, as_stored, Keep::All, false, false, 0),
        (nested, as_stored, Keep::Layers(1), false, true, 1),
        (plain, nf4, Keep::Layers(1), true, false, 0),
    ] {
        let checkpoint = Checkpoint::open(&tests.join(name)).unwrap();
        let emulated = Emulated::new(Order::Forward, false);
        let meter = emulated.meter();
        let cuda = Cuda::new(Box::new(emulated)).unwrap();
        let tables = meter.used();
        let adapter = AdapterConfig {
            dora,
            ..AdapterConfig::new(8, 8.0)
        };
        let kind = OptimiserKind {
            eight_bit,
            lr_ratio: 1.0,
        };
        let layout = LoraLayout::new(checkpoint.config(), &adapter).unwrap();
        let rows: Vec<(Vec<u32>, Vec<bool>)> = [11, 30, 5]
            .map(|len| ((0..len).collect(), (0..len).map(|i| i > 4).collect()))
            .into();
        let rows: Vec<_> = (0..)
            .zip(&rows)
            .map(|(number, (ids, labelled))| Row {
                number,
                ids,
                labelled,
            })
            .collect();

        let outline = Outline::new(&cuda, &checkpoint, held).unwrap();
        let pass = outline.pass(&cuda, &layout, Extent::of(&rows), keep);
        let weights = outline.weights(&cuda) + outline.decoded(&cuda, decoded);
        let quantised = name == nested || held != as_stored;
        assert_eq!(weights.of(Part::Decoded) > 0, quantised && decoded > 0);
        // A table that is no head stays in the host's memory.
        let looked_up = name != tied || held == nf4_head;
        assert_eq!(weights.of(Part::Embedding) == 0, looked_up);
        assert_eq!(weights.of(Part::Head) > 0, looked_up);
        let planned = weights + plan::adapter(&layout, &kind) + pass.unwrap();
        assert_eq!(meter.used(), tables, "a plan allocates nothing");

        let mut model = Model::load(cuda, &checkpoint, held).unwrap();
        model.keep_decoded(decoded).unwrap();
        assert_eq!(meter.used(), tables + weights.total(), "{name}, {held:?}");
        let initial = model.initial(&layout, 0).unwrap();
        let mut params = model.adapter_params(&layout, &initial).unwrap();
        let b = model.backend();
        let mut grads = b.alloc_f32(layout.len()).unwrap();
        let mut optimiser = Optimiser::new(b, &layout, kind).unwrap();
        let mut pass = Pass::new(keep);
        for _ in 0..2 {
            let batch = Batch::new(b, &rows).unwrap();
            let lora = Lora {
                layout: &layout,
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
            let norm = optimiser.update(b, with, &mut grads, &mut params);
            model.renew_norms(&mut pass, &layout, &mut params).unwrap();
            assert!(norm.wait().unwrap()[0].is_finite());
            losses.wait().unwrap();
        }
        let norm = size_of::<f32>(); // of the gradients
        let (planned, peak) = (planned.total() + tables + norm, meter.peak());
        println!("{name}, {held:?}, {keep:?}: {planned} planned, {peak} used");
        assert_eq!(planned, peak, "{name}, {held:?}, {keep:?}");
    }
}

#[test]
fn replies_take_their_room_at_once_and_leave_the_rest_to_decoded_weights() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../parity/files");
    let checkpoint = Checkpoint::open(&tests.join("nf4")).unwrap();
    let emulated = Emulated::new(Order::Forward, false);
    let meter = emulated.meter();
    let cuda = Cuda::new(Box::new(emulated)).unwrap();
    let outline = Outline::new(&cuda, &checkpoint, Storage::AsStored).unwrap();
    let [one, both] = [1, 2].map(|layers| outline.decoded(&cuda, layers).total());
    let mut model = Model::load(cuda, &checkpoint, Storage::AsStored).unwrap();

    let how = Generation {
        sampling: Sampling::GREEDY,
        max_new_tokens: 4,
        stop_ids: &[],
        slots: 2,
    };
    let ids: Vec<u32> = (0..40).collect();
    let prompts: Vec<_> = [11, 40, 5]
        .map(|len| Prompt {
            number: len as u32,
            ids: &ids[..len],
        })
        .into();
    let alone = qwen3::generate(&model, None, &prompts, &how, |_| {}).unwrap();
    let mut slots = Slots::new(&model, &[40, 11, 5], &how).unwrap();
    let mut pass = Pass::new(Keep::Nothing);
    slots.reserve(&model, &mut pass, None).unwrap();

    let before = meter.used();
    for (bytes, layers, taken) in [(one - 1, 0, 0), (both - 1, 1, one), (usize::MAX, 2, both)] {
        assert_eq!(model.keep_decoded_within(bytes).unwrap(), layers);
        assert_eq!(meter.used(), before + taken);
    }
    let most = before + both;
    assert!(meter.peak() <= most, "{} {most}", meter.peak());
    for prompts in [&prompts[1..], &prompts[..]] {
        let mut generate = |prompts: &[Prompt<'_>]| {
            let memory = (&model, None);
            slots.generate(memory, &mut pass, prompts, &how, |_| {})
        };
        let replies = generate(prompts).unwrap();
        assert_eq!(replies, alone[3 - prompts.len()..]);
    }
    // But for the ids, positions and slots of one pass.
    let ids = 6 * 56 * size_of::<u32>();
    assert!(meter.peak() <= most + ids, "{} {most}", meter.peak());
}
