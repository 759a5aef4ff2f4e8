//! The explicit forward and backward pass against candle's autograd, in f64, on
//! the same weights.

use crate::support::*;
use candle_core::{Device, Tensor};
use engine::rng::{Purpose, Stream, drop_threshold, dropout_factors};
use engine::{Backend, Cpu, Neftune, Ragged};
use qwen3::{AdapterConfig, Keep, LoraLayout, Module, Pass, StepNoise};

/// The oracle computes in f64, so that these bound our rounding. Measured on 2026-11-30:
/// 3.7e-7 and 3.4e-6 at most of 24 runs, 0, 1000, 2000, … added to the seeds of weights
/// and adapters, each with AVX-512, with AVX2 and without either (CPUID masked).
const NLL: f32 = 2e-6;
const GRADIENT: f32 = 1e-5;

#[test]
fn losses_and_every_gradient_match_autograd() {
    for (tied, rank) in [(true, 3), (false, 5)] {
        let twins = Twins::new(tied, rank);
        let rows = rows();
        let oracle_rows = oracle_batch(&rows);
        let want = floats(
            &twins
                .oracle
                .nll(&oracle_rows, Some(&twins.oracle_lora))
                .unwrap(),
        );
        let batch = batch(&rows);
        let mut pass = Pass::new(Keep::All);
        let mut grads = zeros(twins.layout.len());
        let scale = 1.0 / batch.labelled() as f32;
        let got = twins
            .model
            .losses_and_gradients(&mut pass, &batch, twins.lora(), None, (&mut grads, scale))
            .unwrap();
        let got = got.wait().unwrap();
        let off = distance(&got, &want);
        println!("tied {tied}: nll off by {off:.1e}");
        assert!(off < NLL, "{off:e}");

        let (_, gradients) = twins
            .oracle
            .lora_gradients(&oracle_rows, &twins.oracle_lora)
            .unwrap();
        let mut worst = 0.0_f32;
        for layer in 0..twins.model.config().layers {
            for (module, target) in modules() {
                let (a, b) = twins.layout.ranges(layer, module).unwrap();
                for (range, factor) in [(a, "A"), (b, "B")] {
                    let want = floats(&gradients[&peft(layer, target, factor)]);
                    let off = distance(&grads[range], &want);
                    assert!(off < GRADIENT, "{layer} {target} {factor}: {off:e}");
                    worst = worst.max(off);
                }
            }
        }
        println!("tied {tied}: gradients off by {worst:.1e}");
    }
}

/// Losses and gradients of some batches of rows, summed as a training step does.
fn step(
    twins: &Twins,
    keep: Keep,
    batches: &[(u32, &[Tokens])],
    [dropout, neftune_alpha]: [f32; 2],
) -> (Vec<f32>, Vec<f32>) {
    let mut pass = Pass::new(keep);
    let mut grads = zeros(twins.layout.len());
    let mut losses = Vec::new();
    for (first, rows) in batches {
        let batch = numbered(rows, *first);
        let noise = StepNoise {
            dropout,
            neftune_alpha,
            seed: 3,
            step: 8,
        };
        let got = twins
            .model
            .losses_and_gradients(
                &mut pass,
                &batch,
                twins.lora(),
                Some(noise),
                (&mut grads, 0.01),
            )
            .unwrap();
        losses.extend(got.wait().unwrap());
    }
    (losses, grads)
}

#[test]
fn dropout_gradients_match_autograd() {
    let mut twins = Twins::new(true, 4);
    let rows = rows();
    let p = 0.3;
    // The masks our side draws, by their definition, as the oracle's tensors.
    let positions = rows
        .iter()
        .zip(0..)
        .flat_map(|((ids, _), row)| (0..ids.len() as u32).map(move |position| [row, 8, position]));
    for layer in 0..twins.model.config().layers {
        for (module, target) in modules() {
            let inputs = module.shape(twins.model.config())[1];
            let stream = Stream {
                seed: 3,
                purpose: Purpose::Dropout,
                layer: layer as u32,
                module: module as u32,
            };
            let mut mask = Vec::new();
            for key in positions.clone() {
                let mut factors = vec![0.0; inputs];
                let how = (drop_threshold(p), 1.0 / (1.0 - p));
                dropout_factors(&stream, key, 0, how, &mut factors);
                mask.extend(factors.into_iter().map(f64::from));
            }
            let tokens = mask.len() / inputs;
            let mask = Tensor::from_vec(mask, (tokens, inputs), &Device::Cpu).unwrap();
            let name = format!("model.layers.{layer}.{target}");
            twins.oracle_lora.masks.insert(name, mask);
        }
    }
    let (losses, grads) = step(&twins, Keep::All, &[(0, &rows)], [p, 0.0]);
    let oracle_rows = oracle_batch(&rows);
    let nll = twins.oracle.nll(&oracle_rows, Some(&twins.oracle_lora));
    let want = floats(&nll.unwrap());
    let nll_off = distance(&losses, &want);
    assert!(nll_off < NLL, "{nll_off:e}");
    let (_, gradients) = twins
        .oracle
        .lora_gradients(&oracle_rows, &twins.oracle_lora)
        .unwrap();
    // The oracle's loss is a mean; ours is a sum scaled by 0.01.
    let scale = 0.01 * losses.len() as f32;
    let mut worst = 0.0_f32;
    for layer in 0..twins.model.config().layers {
        for (module, target) in modules() {
            let (a, b) = twins.layout.ranges(layer, module).unwrap();
            for (range, factor) in [(a, "A"), (b, "B")] {
                let mut want = floats(&gradients[&peft(layer, target, factor)]);
                want.iter_mut().for_each(|x| *x *= scale);
                let off = distance(&grads[range], &want);
                assert!(off < GRADIENT, "{layer} {target} {factor}: {off:e}");
                worst = worst.max(off);
            }
        }
    }
    println!("dropout: nll off by {nll_off:.1e}, gradients by {worst:.1e}");
}

#[test]
fn packing_changes_nothing() {
    let twins = Twins::new(true, 3);
    let rows = rows();
    let (packed, packed_grads) = step(&twins, Keep::All, &[(0, &rows)], [0.1, 5.0]);
    let alone: Vec<_> = (0..).zip(rows.chunks(1)).collect();
    let (single, single_grads) = step(&twins, Keep::All, &alone, [0.1, 5.0]);
    let off = [
        distance(&packed, &single),
        distance(&packed_grads, &single_grads),
    ];
    // The rounding of differently cut sums: measured 3.0e-7 and 9.2e-7 at most, as above.
    println!("losses {:.1e}, gradients {:.1e}", off[0], off[1]);
    assert!(off[0] < 2e-6 && off[1] < 5e-6, "{off:?}");
}

/// Here each position has a token of its own.
#[test]
fn noise_on_embeddings_is_as_other_embeddings() {
    let mut twins = Twins::new(false, 3);
    let row = ((0..20).collect(), (0..20).map(|i| i > 5).collect());
    let row: &[Tokens] = &[row];
    let clean = step(&twins, Keep::All, &[(5, row)], [0.0; 2]);
    let noisy = step(&twins, Keep::All, &[(5, row)], [0.0, 5.0]);
    let mut weights = twins.oracle.weights.clone();
    let table = weights.get_mut("model.embed_tokens.weight").unwrap();
    let mut values = floats(table);
    let place = Ragged::new(&Cpu, &[(5, 20)]).unwrap();
    let noise = Neftune {
        alpha: 5.0,
        seed: 3,
        step: 8,
    };
    Cpu.add_noise(&noise, &place, 36, &mut values);
    *table = Tensor::from_vec(values, table.shape(), &Device::Cpu).unwrap();
    twins.model = ours(&shape(false), &weights);
    assert!(noisy == step(&twins, Keep::All, &[(5, row)], [0.0; 2]));
    assert!(noisy.0 != clean.0 && noisy.1 != clean.1);
}

#[test]
fn recomputation_gives_the_same_bits() {
    let twins = Twins::new(false, 3);
    let rows = rows();
    let all = step(&twins, Keep::All, &[(0, &rows)], [0.1, 5.0]);
    for kept in 0..=twins.model.config().layers {
        let some = step(&twins, Keep::Layers(kept), &[(0, &rows)], [0.1, 5.0]);
        assert!(all == some, "{kept} layers kept");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let twins = Twins::new(true, 3);
    let rows = rows();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        pool.install(|| {
            step(
                &twins,
                Keep::All,
                &[(0, &rows), (9, &rows[1..3])],
                [0.1, 5.0],
            )
        })
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(8));
}

#[test]
fn a_pass_is_reused_across_sizes_without_a_trace() {
    let twins = Twins::new(true, 3);
    let rows = rows();
    let small = &rows[..1];
    let (_, fresh) = step(&twins, Keep::All, &[(0, small)], [0.0; 2]);
    let (_, both) = step(&twins, Keep::All, &[(0, &rows), (0, small)], [0.0; 2]);
    let (_, large) = step(&twins, Keep::All, &[(0, &rows)], [0.0; 2]);
    let sum: Vec<f32> = large.iter().zip(&fresh).map(|(a, b)| a + b).collect();
    let off = distance(&both, &sum);
    println!("reused: off by {off:.1e}");
    // Sums in another order: measured 1.0e-7 at most, as above.
    assert!(off < 5e-7, "{off:e}");
}

/// Backward stops below the lowest adapter; what it still computes must be the
/// same as with all adapters present. The absent ones have B = 0 on the full side:
/// they add zeros, which changes no bit.
#[test]
fn a_subset_of_modules_has_the_gradients_of_the_full_set() {
    let rows = rows();
    for kept in [
        &[Module::Down][..],
        &[Module::Q],
        &[Module::O, Module::Up],
        &[Module::V, Module::Gate],
    ] {
        let mut twins = Twins::new(true, 3);
        let config = twins.model.config().clone();
        let part = LoraLayout::new(
            &config,
            &AdapterConfig {
                targets: kept.iter().copied().collect(),
                ..AdapterConfig::new(3, 3.0 * 1.7)
            },
        )
        .unwrap();
        let mut values = vec![0.0; part.len()];
        for layer in 0..config.layers {
            for module in Module::ALL {
                let (a, b) = twins.layout.ranges(layer, module).unwrap();
                match part.ranges(layer, module) {
                    None => twins.params[b].fill(0.0),
                    Some((pa, pb)) => {
                        values[pa].copy_from_slice(&twins.params[a]);
                        values[pb].copy_from_slice(&twins.params[b]);
                    }
                }
            }
        }
        let (_, full) = step(&twins, Keep::All, &[(0, &rows)], [0.0; 2]);
        let whole = std::mem::replace(&mut twins.layout, part);
        twins.params = values;
        let (_, got) = step(&twins, Keep::All, &[(0, &rows)], [0.0; 2]);
        for layer in 0..config.layers {
            for &module in kept {
                let (a, b) = whole.ranges(layer, module).unwrap();
                let (pa, pb) = twins.layout.ranges(layer, module).unwrap();
                assert!(got[pa] == full[a], "{layer} {module} A");
                assert!(got[pb] == full[b], "{layer} {module} B");
            }
        }
    }
}

#[test]
fn the_base_alone_matches_the_oracle() {
    let twins = Twins::new(false, 3);
    let rows = rows();
    let mut pass = Pass::new(Keep::Nothing);
    let got = twins.model.losses(&mut pass, &batch(&rows), None).unwrap();
    let want = floats(&twins.oracle.nll(&oracle_batch(&rows), None).unwrap());
    let off = distance(&got.wait().unwrap(), &want);
    println!("base alone: nll off by {off:.1e}");
    assert!(off < NLL, "{off:e}");
}

#[test]
fn a_batch_without_labels_has_no_losses_and_no_gradient() {
    let twins = Twins::new(true, 3);
    let row = (vec![1, 2, 3], vec![true, false, false]);
    let (losses, grads) = step(&twins, Keep::All, &[(0, &[row])], [0.1, 5.0]);
    assert!(losses.is_empty());
    assert!(grads.iter().all(|&g| g == 0.0));
}
