//! A whole small model through the CUDA backend: the same code that runs on a GPU,
//! from the launch upwards, against the CPU backend.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::{Draw, distance, gpu, on_processor, recorded};
use cuda_on_cpu::{Emulated, Order};
use engine::nf4::Nf4Tensor;
use engine::{Backend, Cpu, Cuda, Heads, HostMatrix, Reading, Rounded, Sampling};
use half::bf16;
use qwen3::{
    AdapterConfig, Batch, Completion, Config, Ends, Finish, Generation, Keep, LayerWeights, Lora,
    LoraLayout, Model, Module, Optimiser, OptimiserKind, Pass, Prompt, Row, StepNoise, Targets,
    Update, generate,
};

/// Odd where it can be: grouped queries, `heads × head_dim ≠ hidden`.
fn config() -> Config {
    Config {
        vocab_size: 211,
        hidden_size: 72,
        intermediate_size: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        max_positions: 128,
        rms_eps: 1e-6,
        rope_theta: 1e6,
        tied: false,
    }
}

/// Random weights: quantised products, a bf16 embedding and head.
fn model<B: Backend>(backend: B) -> Model<B> {
    random(backend, config(), false)
}

/// The same with a head in NF4, as wide as a product of few tokens takes.
fn model_with_nf4_head<B: Backend>(backend: B) -> Model<B> {
    let wide = Config {
        hidden_size: 128,
        ..config()
    };
    random(backend, wide, true)
}

fn random<B: Backend>(backend: B, c: Config, nf4_head: bool) -> Model<B> {
    let mut draw = Draw(5);
    let mut scaled =
        |len: usize, by: f32| -> Vec<f32> { draw.vec(len).into_iter().map(|x| x * by).collect() };
    let (q, k) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let (h, i) = (c.hidden_size, c.intermediate_size);
    let mut layers = Vec::new();
    for _ in 0..c.layers {
        let mut norm = |len| {
            scaled(len, 0.2)
                .iter()
                .map(|x| 1.0 + x)
                .collect::<Vec<f32>>()
        };
        let [input_norm, post_attention_norm] = [norm(h), norm(h)];
        let [q_norm, k_norm] = [norm(c.head_dim), norm(c.head_dim)];
        let products = [(q, h), (k, h), (k, h), (h, q), (i, h), (i, h), (h, i)];
        layers.push(Ok::<_, engine::Error>(LayerWeights {
            input_norm,
            post_attention_norm,
            q_norm,
            k_norm,
            products: products.map(|(rows, cols)| {
                let values = scaled(rows * cols, 0.15);
                HostMatrix::nf4(Nf4Tensor::quantize([rows, cols], &values, true).unwrap())
            }),
        }));
    }
    let mut table = |by, quantised| {
        let values = scaled(c.vocab_size * h, by);
        match quantised {
            true => {
                let shape = [c.vocab_size, h];
                HostMatrix::nf4(Nf4Tensor::quantize(shape, &values, true).unwrap())
            }
            false => {
                let values = values.into_iter().map(bf16::from_f32).collect();
                HostMatrix::bf16(c.vocab_size, h, values)
            }
        }
    };
    let ends = Ends {
        embedding: table(1.0, false),
        lm_head: Some(table(0.5, nf4_head)),
        final_norm: vec![1.0; h],
    };
    Model::new(backend, c, ends, layers.into_iter()).unwrap()
}

/// With DoRA also ranks of their own, and modules without an adapter.
fn layout(config: &Config, dora: bool) -> LoraLayout {
    let plain = AdapterConfig::new(8, 16.0);
    let settings = match dora {
        false => plain,
        true => AdapterConfig {
            targets: Targets::from_text(r".*\.(0\.mlp\.(up|down)|\d\.self_attn\.[qvo])_proj"),
            dora: true,
            rank_pattern: vec![("v_proj".into(), 3), ("1.*".into(), 16)],
            alpha_pattern: vec![("o_proj".into(), 4.0)],
            ..plain
        },
    };
    LoraLayout::new(config, &settings).unwrap()
}

/// Rows of different lengths, of which the second half is predicted.
fn batch<B: Backend>(backend: &B) -> Batch<B> {
    let mut draw = Draw(5);
    let rows: Vec<(Vec<u32>, Vec<bool>)> = [5, 30, 1, 12]
        .map(|len| {
            (
                draw.ids(len, 211),
                (0..len).map(|i| 2 * i >= len && i > 0).collect(),
            )
        })
        .into();
    let rows: Vec<_> = (10..)
        .zip(&rows)
        .map(|(number, (ids, labelled))| Row {
            number,
            ids,
            labelled,
        })
        .collect();
    Batch::new(backend, &rows).unwrap()
}

/// What a few steps leave behind.
struct Run {
    losses: Vec<f32>,
    /// Of the first step.
    gradient: Vec<f32>,
    params: Vec<f32>,
    replies: Vec<Completion>,
}

/// What training can have beside dropout.
#[derive(Clone, Copy)]
struct Extras {
    eight_bit: bool,
    neftune_alpha: f32,
    dora: bool,
}

const NONE: Extras = Extras {
    eight_bit: false,
    neftune_alpha: 0.0,
    dora: false,
};

const ALL: Extras = Extras {
    eight_bit: true,
    neftune_alpha: 5.0,
    dora: false,
};

/// Trains with dropout, then continues two rows from where their prediction began,
/// as far as they were learnt.
fn train<B: Backend>(model: &Model<B>, keep: Keep, steps: u32, extras: Extras) -> Run {
    let (b, layout) = (model.backend(), layout(model.config(), extras.dora));
    let batch = batch(b);
    let scale = 1.0 / batch.labelled() as f32;
    // Far from zero: B would hide what A does.
    let mut start: Vec<f32> = Draw(4).vec(layout.len()).iter().map(|x| x * 0.1).collect();
    let initial = model.initial(&layout, 0).unwrap();
    let modules = (0..config().layers).flat_map(|l| Module::ALL.map(|m| (l, m)));
    for range in modules.filter_map(|(layer, module)| layout.magnitude(layer, module)) {
        // A little away from where nothing is rescaled.
        let rows = range.clone().zip(&initial[range]);
        rows.for_each(|(i, norm)| start[i] = norm * (1.0 + start[i]));
    }
    let mut params = model.adapter_params(&layout, &start).unwrap();
    let mut grads = b.alloc_f32(layout.len()).unwrap();
    let kind = OptimiserKind {
        eight_bit: extras.eight_bit,
        ..OptimiserKind::default()
    };
    let mut optimiser = Optimiser::new(b, &layout, kind).unwrap();
    let mut pass = Pass::new(keep);
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let lora = Lora {
            layout: &layout,
            params: &params,
        };
        let noise = Some(StepNoise {
            dropout: 0.05,
            neftune_alpha: extras.neftune_alpha,
            seed: 3,
            step,
        });
        let nll = model
            .losses_and_gradients(&mut pass, &batch, lora, noise, (&mut grads, scale))
            .unwrap();
        losses.push(nll.wait().unwrap().iter().sum::<f32>() * scale);
        if step == 0 {
            gradient = b.read_f32(&grads, 0..layout.len()).wait().unwrap();
        }
        let update = Update {
            lr: 0.01,
            weight_decay: 0.01,
            max_norm: Some(1.0),
        };
        optimiser.update(b, update, &mut grads, &mut params);
        model.renew_norms(&mut pass, &layout, &mut params).unwrap();
    }
    let lora = Lora {
        layout: &layout,
        params: &params,
    };
    let mut draw = Draw(5);
    let ids = [5, 30, 1, 12].map(|len| draw.ids(len, 211));
    let prompts = [
        Prompt {
            number: 0,
            ids: &ids[1][..16],
        },
        Prompt {
            number: 1,
            ids: &ids[3][..7],
        },
        // Alone in the end, beside a slot that is free.
        Prompt {
            number: 2,
            ids: &ids[1][..9],
        },
    ];
    let sampling = Sampling::GREEDY;
    let how = Generation {
        sampling,
        max_new_tokens: 5,
        stop_ids: &[],
        slots: 2,
    };
    Run {
        losses,
        gradient,
        replies: generate(model, Some(lora), &prompts, &how, |_| {}).unwrap(),
        params: b.read_f32(&params, 0..layout.len()).wait().unwrap(),
    }
}

fn device(order: Order, checked: bool) -> Cuda {
    Cuda::new(Box::new(Emulated::new(order, checked))).unwrap()
}

/// A device on the processor, and the GPU if there is one.
fn devices() -> impl Iterator<Item = Cuda> {
    let on_processor = on_processor(&[Order::Forward], false);
    on_processor.into_iter().chain(gpu())
}

#[test]
fn training_and_generation_follow_the_cpu() {
    const STEPS: u32 = 50;
    let exact = train(&model(Cpu), Keep::All, STEPS, NONE);
    let want = train(&model(Rounded), Keep::All, STEPS, NONE);
    let apart = |a: &[f32], b: &[f32]| {
        let pairs = a.iter().zip(b);
        pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()))
    };
    println!(
        "rounding alone: losses apart by up to {:.1e}, gradient off by {:.1e}",
        apart(&want.losses, &exact.losses),
        distance(&want.gradient, &exact.gradient),
    );
    assert!(want.losses[49] < 0.2 * want.losses[0]);
    for device in devices() {
        let name = device.describe();
        let model = model(device);
        let got = train(&model, Keep::All, STEPS, NONE);
        let (gradient, loss) = (
            distance(&got.gradient, &want.gradient),
            apart(&got.losses, &want.losses),
        );
        println!(
            "{name}: loss {} → {}, on the CPU {} → {}; apart by up to {loss:.1e}; gradient off by {gradient:.1e}",
            got.losses[0], got.losses[49], want.losses[0], want.losses[49],
        );
        // Measured on 2026-11-30, device on a processor: 1.3e-6 and 3.6e-4, where the
        // roundings by themselves make 1.2e-2 and 3.7e-3 (1.7e-10 and 1.8e-4 while products
        // under dropout summed as the CPU does, which now they do not). A statistic whose sum ends
        // otherwise, by one unit in the last place, can turn a rounding; this model is one
        // where none does. Of six others three were alike, three off by 2.3e-4 to 4.9e-3;
        // their losses, by 1.4e-3 to 5.9e-3. A GPU may have such a turn: hence 6e-3. A
        // rounding too many or too few in a single kernel is for kernels.rs to find.
        assert!(gradient < 6e-3, "{name}: {gradient:e}");
        // Fifty steps carry a rounding far. The shipped PTX, interpreted on 2026-11-24, where
        // the compiler has contracted products and sums: 4.7e-3; with an exact exponential
        // 7.0e-3, with matrix products summed as the CPU does 4.8e-3. Twice that for what sums
        // as it likes, as a GPU does.
        let in_the_cpus_order = ["threads in order", "stand-in"];
        let limit = match in_the_cpus_order.iter().any(|s| name.contains(s)) {
            true => 2e-3,
            false => 1.4e-2,
        };
        assert!(loss < limit, "{name}: {loss:e}");
        assert_eq!(got.replies, want.replies, "{name}");
        assert_eq!(got.replies, exact.replies, "{name}");
        // Four steps of two replies and four of one, all of two rows; the first was new.
        let recorded = recorded(model.backend());
        let why = model.backend().unrecorded();
        assert_eq!(
            model.backend().played(),
            if recorded { 7 } else { 0 },
            "{why:?}"
        );
    }
}

/// Many replies at once, of which some end early, so that there are steps of several sizes;
/// `nvidia` compares what is told with a device that records nothing.
#[test]
fn steps_of_several_sizes_are_recorded() {
    let Some(gpu) = gpu() else { return };
    let mut draw = Draw(8);
    let ids: Vec<_> = (0..44).map(|i| draw.ids(3 + i % 5, 211)).collect();
    let prompts: Vec<_> = (0..)
        .zip(&ids)
        .map(|(number, ids)| Prompt { number, ids })
        .collect();
    let how = Generation {
        sampling: Sampling {
            temperature: 1.0,
            ..Sampling::GREEDY
        },
        max_new_tokens: 8,
        stop_ids: &(0..40).collect::<Vec<_>>(),
        slots: 40,
    };
    let model = model(gpu);
    let replies = generate(&model, None, &prompts, &how, |_| {}).unwrap();
    println!("replies: {replies:?}");
    println!("unrecorded: {:?}", model.backend().unrecorded());
    println!("played: {}", model.backend().played());
    assert_eq!(model.backend().played() > 0, recorded(model.backend()));
}

/// A profile changes nothing of what is done, misses nothing, and ends.
#[test]
fn a_profile_tells_every_launch() {
    let emulated = Emulated::new(Order::Forward, false);
    let meter = emulated.meter();
    let model = model(Cuda::new(Box::new(emulated)).unwrap());
    let work = || train(&model, Keep::Layers(0), 2, ALL);
    let counts = || -> BTreeMap<_, _> {
        let kernels = meter.kernels().into_iter();
        kernels
            .map(|kernel| (kernel, meter.launches(kernel)))
            .collect()
    };
    let want = work();
    for _ in 0..2 {
        let mut launched = counts();
        let (got, spent) = model.backend().profile(work).unwrap();
        assert!(got.losses == want.losses && got.params == want.params);
        assert_eq!(got.replies, want.replies);
        for (kernel, count) in counts() {
            let told = spent.iter().find(|spent| spent.work == kernel);
            let before = launched.remove(kernel).unwrap_or(0);
            assert_eq!(
                told.map_or(0, |told| told.times),
                count - before,
                "{kernel}"
            );
        }
        assert!(spent.iter().all(|spent| spent.seconds > 0.0), "{spent:?}");
        assert!(spent.is_sorted_by(|a, b| a.seconds >= b.seconds));
        let of = |what: &str| spent.iter().find(|spent| spent.work == what).unwrap();
        assert!(of("zeros").times > 0 && of("copies to the device").times > 0);
    }
}

/// Steps are queued before it is known who has ended: a reply that stops is what it would be
/// without the stop, cut off there, and so are those that its slot goes to.
#[test]
fn replies_that_stop_are_cut_off_there() {
    let mut draw = Draw(9);
    let ids: Vec<_> = (0..11).map(|i| draw.ids(3 + i % 5, 211)).collect();
    let prompts: Vec<_> = (0..)
        .zip(&ids)
        .map(|(number, ids)| Prompt { number, ids })
        .collect();
    let stops: Vec<u32> = (0..40).collect();
    for device in devices() {
        let name = device.describe();
        let model = model(device);
        let replies = |stop_ids: &[u32], slots| {
            let how = Generation {
                sampling: Sampling {
                    temperature: 1.0,
                    ..Sampling::GREEDY
                },
                max_new_tokens: 8,
                stop_ids,
                slots,
            };
            let mut told = Vec::new();
            let replies = generate(&model, None, &prompts, &how, |done| told.push(done)).unwrap();
            assert!(
                told.is_sorted() && told.last() == Some(&prompts.len()),
                "{told:?}"
            );
            replies
        };
        let whole = replies(&[], 3);
        assert!(whole.iter().all(|reply| reply.ids.len() == 8));
        let cut = whole.iter().map(|reply| {
            let end = reply.ids.iter().position(|id| stops.contains(id));
            Completion {
                ids: reply.ids[..end.unwrap_or(8)].to_vec(),
                finish: end.map_or(Finish::Length, |_| Finish::Stop),
            }
        });
        let cut: Vec<_> = cut.collect();
        let lengths: BTreeSet<_> = cut.iter().map(|reply| reply.ids.len()).collect();
        assert!(lengths.len() > 3 && lengths.contains(&8), "{lengths:?}");
        for slots in [3, 1, 11] {
            assert_eq!(replies(&stops, slots), cut, "{name}, {slots} slots");
        }
    }
}

#[test]
fn noise_on_embeddings_and_moments_in_8_bits_follow_the_cpu() {
    const STEPS: u32 = 20;
    let want = train(&model(Rounded), Keep::All, STEPS, ALL);
    let plain = train(&model(Rounded), Keep::All, STEPS, NONE);
    let apart = |other: &Run| distance(&other.losses, &want.losses);
    println!("without them: losses off by {:.1e}", apart(&plain));
    for device in devices() {
        let name = device.describe();
        let got = train(&model(device), Keep::All, STEPS, ALL);
        println!("{name}: losses off by {:.1e}", apart(&got));
        // Measured on 2026-11-30, device on a processor: 2.6e-4; without them 4.5e-2.
        assert!(apart(&got) < 1e-3, "{name}: {:e}", apart(&got));
    }
}

#[test]
fn rescaled_rows_and_ranks_of_their_own_follow_the_cpu() {
    const STEPS: u32 = 20;
    const DORA: Extras = Extras { dora: true, ..NONE };
    let want = train(&model(Rounded), Keep::All, STEPS, DORA);
    assert!(want.losses[19] < 0.5 * want.losses[0]);
    for device in devices() {
        let name = device.describe();
        let got = train(&model(device), Keep::All, STEPS, DORA);
        let (gradient, loss) = (
            distance(&got.gradient, &want.gradient),
            distance(&got.losses, &want.losses),
        );
        println!(
            "{name}: loss {} → {}, off by {loss:.1e}; gradient off by {gradient:.1e}",
            got.losses[0], got.losses[19]
        );
        // Measured on 2026-11-30, device on a processor: 5.0e-8 and 3.2e-4.
        assert!(
            gradient < 6e-3 && loss < 1e-3,
            "{name}: {gradient:e} {loss:e}"
        );
        assert_eq!(got.replies, want.replies, "{name}");
    }
}

#[test]
fn a_head_in_nf4_learns_and_generates_as_on_the_cpu() {
    const STEPS: u32 = 12;
    let want = train(&model_with_nf4_head(Rounded), Keep::All, STEPS, NONE);
    // What was learnt is far likelier than anything else, so that a rounding decides
    // no token.
    assert!(want.losses[11] < 0.2 * want.losses[0]);
    for device in devices() {
        let name = device.describe();
        let got = train(&model_with_nf4_head(device), Keep::All, STEPS, NONE);
        let loss = distance(&got.losses, &want.losses);
        println!(
            "{name}: loss {} → {}, off by {loss:.1e}; {:?}",
            got.losses[0], got.losses[11], got.replies
        );
        // Measured on 2026-11-30, device on a processor: 7.3e-4, and 2.3e-4 by its PTX
        // (1.2e-4 before products under dropout summed in an order of their own).
        assert!(loss < 3e-3, "{name}: {loss:e}");
        assert_eq!(got.replies, want.replies, "{name}");
    }
}

#[test]
fn recomputation_and_the_order_of_threads_change_no_bit() {
    const EVERYTHING: Extras = Extras { dora: true, ..ALL };
    let first = train(
        &model(device(Order::Forward, true)),
        Keep::All,
        2,
        EVERYTHING,
    );
    for (order, keep) in [(Order::Newest, Keep::Layers(0)), (Order::Random, Keep::All)] {
        let again = train(&model(device(order, true)), keep, 2, EVERYTHING);
        assert!(again.losses == first.losses, "{order:?} {keep:?}");
        assert!(again.gradient == first.gradient, "{order:?} {keep:?}");
        assert!(again.params == first.params, "{order:?} {keep:?}");
        assert_eq!(again.replies, first.replies, "{order:?} {keep:?}");
    }
}

#[test]
fn weights_decoded_once_and_for_all_change_no_bit() {
    // More tokens than are multiplied with codes; no layer, one of two, both.
    for extras in [ALL, Extras { dora: true, ..ALL }] {
        let [first, one, both] = [0, 1, config().layers].map(|layers| {
            let emulated = Emulated::new(Order::Forward, false);
            let meter = emulated.meter();
            let mut model = model(Cuda::new(Box::new(emulated)).unwrap());
            model.keep_decoded(layers).unwrap();
            let before = meter.launches("nf4_decode");
            let run = train(&model, Keep::Layers(0), 2, extras);
            (run, meter.launches("nf4_decode") - before)
        });
        assert!(first.1 > one.1 && one.1 > 0, "{} and {}", first.1, one.1);
        assert_eq!(both.1, 0);
        for (run, _) in [one, both] {
            assert!(run.losses == first.0.losses);
            assert!(run.gradient == first.0.gradient);
            assert!(run.params == first.0.params);
            assert_eq!(run.replies, first.0.replies);
        }
    }
}

#[test]
fn a_failure_is_told_by_the_next_reading() {
    let b = device(Order::Forward, true);
    let x = b.upload_act(&[1.0; 16]).unwrap();
    let index = b.upload_ids(&[0, 7]).unwrap();
    let mut out = b.alloc_act(16).unwrap();
    // Row 7 of two: queued without a word, as every operation is.
    b.gather(&x, &index, [2, 8], &mut out);
    b.gather(&x, &index, [1, 8], &mut out);
    let error = b.read_act(&out, 16).unwrap_err().to_string();
    assert!(
        error.contains("gather: a read of 16 bytes outside every buffer"),
        "{error}"
    );
    assert!(error.contains("start again"), "{error}");
    assert!(b.alloc_f32(1).is_err() && b.upload_ids(&[1]).is_err());
}

#[test]
fn a_shape_that_there_are_no_kernels_for_is_refused() {
    let b = device(Order::Forward, false);
    let heads = |dim| Heads {
        query: 4,
        kv: 2,
        dim,
    };
    assert!(b.accepts(heads(128)).is_ok());
    let error = b.accepts(heads(96)).unwrap_err().to_string();
    assert!(
        error.contains("96") && error.contains("--device cpu"),
        "{error}"
    );
    let Err(error) = b.upload_matrix(HostMatrix::f32(3, 12, vec![0.0; 36])) else {
        panic!("rows of 24 bytes");
    };
    assert!(error.to_string().contains("[3, 12]"), "{error}");
}
