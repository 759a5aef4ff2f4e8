//! Loops the compiler can vectorise, compiled for the machine they run on.
//!
//! The crates are built for the oldest x86-64; [`vectorised`] compiles a function
//! several times and picks at run time what this processor has. Sums keep
//! sixteen lanes in a fixed order and nothing is contracted into fused
//! multiply-adds, so that the instruction set does not show in the result.
//!
//! The innermost loops count with indices: an iterator's adapters, compiled for
//! the oldest processor, are not always inlined into a function for a newer one.
#![allow(clippy::needless_range_loop)]

/// Defines functions with a copy for each instruction set. What they call must
/// be `#[inline(always)]` to be compiled along, and closures inside are not.
macro_rules! vectorised {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "what a closure would capture")]
        fn $name($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
                #[allow(clippy::too_many_arguments, reason = "as above")]
                fn avx512($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                #[allow(clippy::too_many_arguments, reason = "as above")]
                fn avx2($($arg: $ty),*) {
                    body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has what the function was compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    )*};
}
pub(crate) use vectorised;

const LANES: usize = 16;

/// `Σ f(a[i], b[i])`, sixteen partial sums folded in a fixed order.
#[inline(always)]
fn lanes(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let b = &b[..a.len()];
    let mut sums = [0.0; LANES];
    for c in 0..a.len() {
        for i in 0..LANES {
            sums[i] += f(a[c][i], b[c][i]);
        }
    }
    for i in 0..rest_a.len() {
        sums[i] += f(rest_a[i], rest_b[i]);
    }
    fold(sums)
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    for i in 0..8 {
        sums[i] += sums[i + 8];
    }
    for i in 0..4 {
        sums[i] += sums[i + 4];
    }
    (sums[0] + sums[2]) + (sums[1] + sums[3])
}

/// `Σ a[i] b[i]`.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes(a, b, |x, y| x * y)
}

/// Four vectors' products with one, which is read once; each has the bits of
/// [`dot`]. Four sums under way hide each other's latency.
#[inline(always)]
pub(super) fn dot4(a: [&[f32]; 4], b: &[f32]) -> [f32; 4] {
    let (b, rest) = b.as_chunks::<LANES>();
    let n = b.len();
    let (a0, r0) = a[0].as_chunks::<LANES>();
    let (a1, r1) = a[1].as_chunks::<LANES>();
    let (a2, r2) = a[2].as_chunks::<LANES>();
    let (a3, r3) = a[3].as_chunks::<LANES>();
    let (a0, a1, a2, a3) = (&a0[..n], &a1[..n], &a2[..n], &a3[..n]);
    let [mut s0, mut s1, mut s2, mut s3] = [[0.0; LANES]; 4];
    for c in 0..n {
        for i in 0..LANES {
            s0[i] += a0[c][i] * b[c][i];
            s1[i] += a1[c][i] * b[c][i];
            s2[i] += a2[c][i] * b[c][i];
            s3[i] += a3[c][i] * b[c][i];
        }
    }
    for i in 0..rest.len() {
        s0[i] += r0[i] * rest[i];
        s1[i] += r1[i] * rest[i];
        s2[i] += r2[i] * rest[i];
        s3[i] += r3[i] * rest[i];
    }
    [fold(s0), fold(s1), fold(s2), fold(s3)]
}

/// `Σ a[i]`.
#[inline(always)]
pub(super) fn sum(a: &[f32]) -> f32 {
    lanes(a, a, |x, _| x)
}

/// The largest value; -∞ for none.
#[inline(always)]
pub(super) fn max(a: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for (m, &x) in acc.iter_mut().zip(x) {
            *m = if x > *m { x } else { *m };
        }
    }
    let all = acc.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// `eˣ` to within 2 units in the last place, for `x` in `[-87, 88]` and clamped
/// outside; NaN stays NaN. The polynomial is Cephes' `expf` (S. Moshier).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it leaves the rounded integer in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23); // 2ⁿ
    (p * r * r + r + 1.0) * power
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in 0..1_750_000 {
            let x = -87.0 + i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * want;
            worst = worst.max((f64::from(exp(x)) - want).abs() / ulp);
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0, 1, 15, 16, 17, 33, 100] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let squares: f32 = a.iter().map(|x| x * x).sum();
            assert_eq!(dot(&a, &a), squares, "{n}");
            let (b, c): (Vec<f32>, Vec<f32>) = a.iter().map(|x| (x + 0.1, x * 0.3)).unzip();
            let each = [&a, &b, &c, &a].map(|v| dot(v, &c));
            assert_eq!(dot4([&a, &b, &c, &a], &c), each, "{n}");
            assert_eq!(sum(&a), a.iter().sum::<f32>(), "{n}");
            let largest = if n == 0 {
                f32::NEG_INFINITY
            } else {
                (n - 1) as f32
            };
            assert_eq!(max(&a), largest, "{n}");
        }
    }
}
