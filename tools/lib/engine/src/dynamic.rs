//! The dynamic 8-bit numbers of bitsandbytes: what the codes of double
//! quantisation ([`nf4`](crate::nf4)) and of 8-bit moments stand for.
//!
//! A byte is an index into 256 ascending values whose exponent has a varying
//! width (Dettmers, arXiv 1511.04561), so that a block scaled to its largest
//! magnitude keeps seven decades: fine near one, coarse near zero. Coding is a
//! search among the 255 thresholds between neighbours; which neighbour a value
//! on the line takes, and which values zero is for, are where thresholds lie.

use std::sync::LazyLock;

/// 256 ascending values, and what is coded as which.
#[derive(Debug, Clone, PartialEq)]
pub struct Dynamic {
    values: [f32; 256],
    /// The code of `x` is the number of thresholds below it.
    thresholds: [f32; 255],
}

impl Dynamic {
    /// Both signs, in `[-1, 1]`: seven decades, 10⁻⁶ … 1, of which decade `e`
    /// holds 2ᵉ values of either sign; then 0 and 1.
    pub fn signed() -> &'static Self {
        static SIGNED: LazyLock<Dynamic> = LazyLock::new(|| Dynamic::new(0));
        &SIGNED
    }

    /// `[0, 1]`, with twice as many values a decade: for what is never negative.
    pub fn unsigned() -> &'static Self {
        static UNSIGNED: LazyLock<Dynamic> = LazyLock::new(|| Dynamic::new(1));
        &UNSIGNED
    }

    /// [`signed`](Self::signed), but nothing negative is coded as zero: what
    /// bitsandbytes' optimisers keep first moments in.
    pub fn moment() -> &'static Self {
        static MOMENT: LazyLock<Dynamic> = LazyLock::new(|| {
            let mut dynamic = Dynamic::signed().clone();
            let below_zero = dynamic.values.partition_point(|&v| v < 0.0) - 1;
            dynamic.thresholds[below_zero] = 0.0_f32.next_down();
            dynamic
        });
        &MOMENT
    }

    /// Decade `e` in 2^(e + `more`) parts; of either sign where `more` is 0.
    fn new(more: usize) -> Self {
        let mut values = Vec::with_capacity(256);
        for e in 0..7 {
            let parts = 1usize << (e + more);
            let decade = 10f64.powi(e as i32 - 6) as f32;
            // As torch.linspace has it on any x86 with FMA (without, its last bits
            // are others): from the nearer end, in f32, multiply and add rounded once.
            let step = (1.0 - 0.1f32) / parts as f32;
            let boundary = |i: usize| {
                if i < parts.div_ceil(2) {
                    step.mul_add(i as f32, 0.1)
                } else {
                    step.mul_add(-((parts - i) as f32), 1.0)
                }
            };
            for i in 0..parts {
                let middle = decade * ((boundary(i) + boundary(i + 1)) / 2.0);
                values.push(middle);
                values.extend((more == 0).then_some(-middle));
            }
        }
        values.extend([0.0, 1.0]);
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = values.try_into().expect("254 middles, 0 and 1");
        // Half-way the even code wins, which is where the binary search of
        // bitsandbytes' CUDA kernels comes to rest.
        let threshold = |i: usize| {
            let midpoint = (values[i] + values[i + 1]) * 0.5;
            match i % 2 {
                0 => midpoint,
                _ => midpoint.next_down(),
            }
        };
        Self {
            thresholds: std::array::from_fn(threshold),
            values,
        }
    }

    /// What the codes stand for, ascending.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The code of `x` is the number of these below it.
    pub fn thresholds(&self) -> &[f32; 255] {
        &self.thresholds
    }

    /// The code of the nearest value; of NaN, 0.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        let mut below = 0;
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            below += step * usize::from(x > self.thresholds[below + step - 1]);
        }
        below as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_that_of_the_nearest_value() {
        for dynamic in [Dynamic::signed(), Dynamic::unsigned(), Dynamic::moment()] {
            let values = dynamic.values();
            assert!(values.is_sorted_by(|a, b| a < b));
            let distance = |x: f32, v: f32| (f64::from(x) - f64::from(v)).abs();
            for i in 0..=40_000 {
                // From ±1 down to ±1e-8, evenly in the logarithm.
                let x = 10f32.powf(-8.0 * (i % 20_001) as f32 / 20_000.0);
                let x = if i > 20_000 { -x } else { x };
                let got = values[usize::from(dynamic.code(x))];
                let least = values
                    .iter()
                    .map(|&v| distance(x, v))
                    .fold(f64::INFINITY, f64::min);
                let negative = x < 0.0 && dynamic == Dynamic::moment();
                let nearest = distance(x, got) <= least * (1.0 + 1e-6);
                assert!(
                    nearest || negative && got == values[126],
                    "{x:e} became {got:e}"
                );
                assert!(!(negative && got == 0.0), "{x:e} lost its sign");
            }
            assert_eq!(values[usize::from(dynamic.code(0.0))], 0.0);
            assert_eq!(values[usize::from(dynamic.code(2.0))], 1.0);
            assert_eq!(dynamic.code(f32::NAN), 0);
        }
    }

    #[test]
    fn half_way_the_even_code_wins() {
        for dynamic in [Dynamic::signed(), Dynamic::unsigned()] {
            for (i, pair) in dynamic.values().windows(2).enumerate() {
                let midpoint = (pair[0] + pair[1]) * 0.5;
                let even = i + i % 2;
                assert_eq!(usize::from(dynamic.code(midpoint)), even, "{i}");
                assert_eq!(usize::from(dynamic.code(midpoint.next_down())), i, "{i}");
                assert_eq!(usize::from(dynamic.code(midpoint.next_up())), i + 1, "{i}");
            }
        }
    }
}
