//! Loops the compiler can vectorise, compiled for the machine they run on.
//!
//! The crates are built for the oldest x86-64; `vectorised` runs a closure in a
//! copy compiled with what this processor has (AVX2, AVX-512, Neon). Sums keep
//! sixteen lanes in a fixed order, so that the vector width does not show in the
//! result.

/// Runs `f` in a copy compiled for this processor. What `f` calls must be
/// `#[inline(always)]` to come along.
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

const LANES: usize = 16;

/// `Σ f(a[i], b[i])`, sixteen partial sums folded in a fixed order.
#[inline(always)]
fn lanes(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (ra, rb) = (a.remainder(), b.remainder());
    for (x, y) in a.zip(b) {
        for (s, (&x, &y)) in acc.iter_mut().zip(x.iter().zip(y)) {
            *s += f(x, y);
        }
    }
    for (s, (&x, &y)) in acc.iter_mut().zip(ra.iter().zip(rb)) {
        *s += f(x, y);
    }
    fold(acc)
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
fn fold(mut acc: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    acc[0]
}

/// `Σ a[i] b[i]`.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes(a, b, |x, y| x * y)
}

/// Four vectors' products with one, which is read once; each has the bits of [`dot`].
#[inline(always)]
pub(super) fn dot4(a: [&[f32]; 4], b: &[f32]) -> [f32; 4] {
    let mut acc = [[0.0; LANES]; 4];
    let whole = b.len() - b.len() % LANES;
    for at in (0..whole).step_by(LANES) {
        for (acc, a) in acc.iter_mut().zip(a) {
            let pairs = a[at..][..LANES].iter().zip(&b[at..][..LANES]);
            for (s, (x, y)) in acc.iter_mut().zip(pairs) {
                *s += x * y;
            }
        }
    }
    for (acc, a) in acc.iter_mut().zip(a) {
        for (s, (x, y)) in acc.iter_mut().zip(a[whole..].iter().zip(&b[whole..])) {
            *s += x * y;
        }
    }
    acc.map(fold)
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
