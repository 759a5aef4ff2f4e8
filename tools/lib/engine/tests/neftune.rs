//! Noise on the embeddings: its distribution, and what it depends on.

use engine::{Backend, Cpu, Neftune, Ragged};

const NOISE: Neftune = Neftune {
    alpha: 5.0,
    seed: 7,
    step: 3,
};

/// The noise alone, over rows given as `(number, length)`.
fn noise(noise: &Neftune, rows: &[(u32, usize)], width: usize) -> Vec<f32> {
    let rows = Ragged::new(&Cpu, rows).expect("memory");
    let mut x = vec![0.0; rows.tokens() * width];
    Cpu.add_noise(noise, &rows, width, &mut x);
    x
}

/// Five standard deviations of each estimate.
#[test]
fn it_is_uniform_within_its_bound() {
    let width = 96;
    let rows = [(4, 100), (9, 25), (2, 1)];
    let all = noise(&NOISE, &rows, width);
    let mut from = 0;
    for (_, length) in rows {
        let x = &all[from..from + length * width];
        from += x.len();
        // As the paper has it: α / √(L d).
        let bound = 5.0 / ((length * width) as f64).sqrt();
        let (n, x): (f64, Vec<f64>) = (
            x.len() as f64,
            x.iter().map(|&x| f64::from(x) / bound).collect(),
        );
        assert!(x.iter().all(|x| x.abs() < 1.0));
        assert!(x.iter().fold(0.0_f64, |m, x| m.max(x.abs())) > 1.0 - 10.0 / n);
        // Uniform in ±1: mean 0 and variance 1/3; x² has variance 4/45.
        let mean = x.iter().sum::<f64>() / n;
        let square = x.iter().map(|x| x * x).sum::<f64>() / n;
        assert!(
            mean.abs() < 5.0 * (1.0 / 3.0 / n).sqrt(),
            "{length}: {mean}"
        );
        assert!(
            (square - 1.0 / 3.0).abs() < 5.0 * (4.0 / 45.0 / n).sqrt(),
            "{length}: {square}"
        );
        // Neighbours in the row of features, and in the row of tokens, are independent:
        // a product of two has variance 1/9.
        for lag in [1, 2, 4, 8, width] {
            let products = x.iter().zip(x.iter().skip(lag)).map(|(a, b)| a * b);
            let mean = products.sum::<f64>() / n;
            assert!(
                mean.abs() < 5.0 * (1.0 / 9.0 / n).sqrt(),
                "{length}, {lag}: {mean}"
            );
        }
        // In each tenth of the range as many: binomial with p = 1/10.
        for tenth in 0..10 {
            let low = f64::from(tenth) / 5.0 - 1.0;
            let inside = x.iter().filter(|x| (low..low + 0.2).contains(x)).count() as f64;
            assert!(
                (inside - n / 10.0).abs() < 5.0 * (n * 0.09).sqrt(),
                "{length}, {tenth}"
            );
        }
    }
}

#[test]
fn it_depends_on_the_row_and_the_step_and_not_on_the_packing() {
    let width = 24;
    let all = noise(&NOISE, &[(4, 10), (9, 5), (2, 1)], width);
    assert_eq!(
        noise(&NOISE, &[(2, 1), (4, 10)], width)[width..],
        all[..10 * width]
    );
    assert_eq!(noise(&NOISE, &[(9, 5)], width), all[10 * width..15 * width]);
    for (other, row) in [
        (NOISE, 10),
        (Neftune { step: 4, ..NOISE }, 9),
        (Neftune { seed: 8, ..NOISE }, 9),
    ] {
        let other = noise(&other, &[(row, 5)], width);
        let equal = other
            .iter()
            .zip(&all[10 * width..])
            .filter(|(a, b)| a == b)
            .count();
        assert!(equal < 3, "{equal} of 120 values are equal by chance");
    }
}

#[test]
fn it_is_added() {
    let rows = Ragged::new(&Cpu, &[(1, 3)]).expect("memory");
    let mut x: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let before = x.clone();
    Cpu.add_noise(&NOISE, &rows, 8, &mut x);
    let alone = noise(&NOISE, &[(1, 3)], 8);
    let sums: Vec<f32> = before.iter().zip(alone).map(|(a, b)| a + b).collect();
    assert_eq!(x, sums);
    Cpu.add_noise(
        &Neftune {
            alpha: 0.0,
            ..NOISE
        },
        &rows,
        8,
        &mut x,
    );
    assert_eq!(x, sums);
}
