//! The explicit forward and backward pass against candle's autograd, in f64, on
//! the same weights.
#![allow(clippy::unwrap_used)]

mod support;

use qwen3::{Keep, Pass};
use support::*;

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
        println!("tied {tied}: nll off by {:e}", distance(&got, &want));
        assert!(distance(&got, &want) < 2e-6);

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
                    assert!(off < 2e-5, "{layer} {target} {factor}: {off}");
                    worst = worst.max(off);
                }
            }
        }
        println!("tied {tied}: gradients off by {worst:e}");
    }
}
