//! What an instruction computes in each lane, by NVIDIA's "PTX ISA" 8.4, whose
//! description is named where the instruction is odd.
//!
//! Not by the twins in `runtime/`, so that a misreading on either side shows. Where the
//! manual leaves something open, this is as far from a CPU's habit as it allows.

use std::array::from_fn;
use std::cmp::Ordering;

/// Lanes of a warp.
pub const LANES: usize = 32;
/// A register of 16 or 32 bits, in every lane.
pub type Narrow = [u32; LANES];
/// A register of 64 bits, in every lane.
pub type Wide = [u64; LANES];

/// An instruction without memory: the files of its operands, and what it computes.
#[derive(Clone, Copy)]
pub enum Meaning {
    /// Narrow from one, two, three, four narrow ones.
    Narrow1(fn(&Narrow) -> Narrow),
    Narrow2(fn(&Narrow, &Narrow) -> Narrow),
    Narrow3(fn(&Narrow, &Narrow, &Narrow) -> Narrow),
    Narrow4(fn(&Narrow, &Narrow, &Narrow, &Narrow) -> Narrow),
    /// Wide from wide ones.
    Wide1(fn(&Wide) -> Wide),
    Wide2(fn(&Wide, &Wide) -> Wide),
    Wide3(fn(&Wide, &Wide, &Wide) -> Wide),
    /// A wide one shifted by a narrow one.
    Shift(fn(&Wide, &Narrow) -> Wide),
    /// Two wide ones, position and length.
    Insert(fn(&Wide, &Wide, &Narrow, &Narrow) -> Wide),
    /// Wide from narrow, narrow from wide.
    Widen1(fn(&Narrow) -> Wide),
    Widen2(fn(&Narrow, &Narrow) -> Wide),
    Shrink(fn(&Wide) -> Narrow),
    /// A predicate from two, by how they compare.
    TestNarrow(fn(&Narrow, &Narrow) -> [Relation; LANES], u8),
    TestWide(fn(&Wide, &Wide) -> [Relation; LANES], u8),
    /// A bit a lane.
    Predicate1(fn(u32) -> u32),
    Predicate2(fn(u32, u32) -> u32),
    /// The first where the predicate holds, else the second.
    SelectNarrow,
    SelectWide,
    /// As it is.
    CopyNarrow,
    CopyWide,
    CopyPredicate,
}

/// Less, equal, greater, unordered: a bit's number in the comparisons that hold.
type Relation = u8;

fn relation(order: Option<Ordering>) -> Relation {
    match order {
        Some(Ordering::Less) => 0,
        Some(Ordering::Equal) => 1,
        Some(Ordering::Greater) => 2,
        None => 3,
    }
}

/// For which relations a comparison holds; `…u`: for unordered ones as well (setp).
fn holds(comparison: &str) -> Option<u8> {
    Some(match comparison {
        "lt" => 0b0001,
        "eq" => 0b0010,
        "le" => 0b0011,
        "gt" => 0b0100,
        "ne" => 0b0101,
        "ge" => 0b0110,
        "ltu" => 0b1001,
        "equ" => 0b1010,
        "leu" => 0b1011,
        "gtu" => 0b1100,
        "neu" => 0b1101,
        "geu" => 0b1110,
        _ => return None,
    })
}

/// Lane by lane.
macro_rules! each {
    (|$a:ident| $e:expr) => {
        |$a| {
            from_fn(|l| {
                let $a = $a[l];
                $e
            })
        }
    };
    (|$a:ident, $b:ident| $e:expr) => {
        |$a, $b| {
            from_fn(|l| {
                let ($a, $b) = ($a[l], $b[l]);
                $e
            })
        }
    };
    (|$a:ident, $b:ident, $c:ident| $e:expr) => {
        |$a, $b, $c| {
            from_fn(|l| {
                let ($a, $b, $c) = ($a[l], $b[l], $c[l]);
                $e
            })
        }
    };
    (|$a:ident, $b:ident, $c:ident, $d:ident| $e:expr) => {
        |$a, $b, $c, $d| {
            from_fn(|l| {
                let ($a, $b, $c, $d) = ($a[l], $b[l], $c[l], $d[l]);
                $e
            })
        }
    };
}

fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// Default mode of `prmt`: "the msb defines if the byte value should be copied, or if the
/// sign (msb of the byte) should be replicated over all 8 bits".
fn permuted(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
    let chosen = |i: u32| {
        let digit = selector >> (4 * i) & 0xf;
        let byte = bytes[digit as usize & 7];
        match digit & 8 {
            0 => byte,
            _ => (byte.cast_signed() >> 7).cast_unsigned(),
        }
    };
    u32::from_le_bytes([0, 1, 2, 3].map(chosen))
}

/// Whatever went in, a NaN that comes out of single precision is this one ("Floating Point Instructions").
const NAN: u32 = 0x7fff_ffff;

fn single(x: f32) -> u32 {
    if x.is_nan() { NAN } else { x.to_bits() }
}

fn signed(x: u32) -> i32 {
    x.cast_signed()
}

/// The smaller; of a number and NaN the number; -0 below +0 (min).
fn smaller(a: u32, b: u32) -> u32 {
    match f(a).partial_cmp(&f(b)) {
        Some(Ordering::Less) => a,
        Some(Ordering::Greater) => b,
        Some(Ordering::Equal) => a | b, // the same, or zeros
        None if !f(a).is_nan() => a,
        None if !f(b).is_nan() => b,
        None => NAN,
    }
}

fn larger(a: u32, b: u32) -> u32 {
    match f(a).partial_cmp(&f(b)) {
        Some(Ordering::Less) => b,
        Some(Ordering::Greater) => a,
        Some(Ordering::Equal) => a & b,
        None => smaller(a, b),
    }
}

/// `a b + c`, rounded towards negative infinity.
fn fma_down(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c)); // exact
    let sum = product + c;
    // What the sum lost, exactly (Knuth's two-sum).
    let back = sum - product;
    let lost = (product - (sum - back)) + (c - back);
    let nearest = sum as f32;
    match f64::from(nearest).partial_cmp(&sum) {
        Some(Ordering::Greater) => nearest.next_down(),
        Some(Ordering::Equal) if lost < 0.0 => nearest.next_down(),
        _ => nearest,
    }
}

/// 2^x, as far off as the manual lets it be (ex2): by 2^-22 of the value, up or
/// down by the last bit of `x`.
fn exp2_approx(x: u32) -> f32 {
    let exact = f64::from(f(x)).exp2();
    let off = if x & 1 == 0 { 1.0 } else { -1.0 } / f64::from(1u32 << 22);
    let exact_power = f(x).trunc() == f(x);
    (exact * if exact_power { 1.0 } else { 1.0 + off }) as f32
}

/// 1 / x, a unit in the last place off, which the manual allows (rcp): up or down by
/// the last bit of `x`; exact where the manual lists the result.
fn reciprocal_approx(x: u32) -> f32 {
    let exact = 1.0 / f(x);
    match exact {
        e if e == 0.0 || e.is_infinite() || e.is_nan() => e,
        e if x & 1 == 0 => e.next_up(),
        e => e.next_down(),
    }
}

/// `.ftz`: what is subnormal counts as a zero of its sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// A float's upper half, rounded to nearest even (cvt).
fn bf16(x: u32) -> u32 {
    if f(x).is_nan() {
        return 0x7fff;
    }
    let half = 0x7fff + (x >> 16 & 1);
    x.wrapping_add(half) >> 16
}

/// The low `length` bits of `a` at `position` of `b` (bfi): each is the low byte
/// of its operand, and what does not fit falls away.
fn insert(a: u64, b: u64, position: u32, length: u32, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    let bits = (0..length).filter(|i| position + i < width);
    bits.fold(b, |b, i| {
        b & !(1 << (position + i)) | (a >> i & 1) << (position + i)
    })
}

/// To u64, towards zero, clamped; NaN becomes the upper bit (cvt: zero only where
/// neither side has 64 bits).
fn to_u64(x: f64) -> u64 {
    if x.is_nan() { 1 << 63 } else { x as u64 }
}

/// What an instruction that only computes means; none if there is no such one here.
pub fn meaning(spelling: &str) -> Option<Meaning> {
    use Meaning::*;
    if let Some(rest) = spelling.strip_prefix("setp.") {
        let (comparison, kind) = rest.split_once('.')?;
        let holds = holds(comparison)?;
        return Some(match kind {
            "u32" | "b32" => TestNarrow(each!(|a, b| relation(a.partial_cmp(&b))), holds),
            "s32" => TestNarrow(
                each!(|a, b| relation(signed(a).partial_cmp(&signed(b)))),
                holds,
            ),
            "s16" => TestNarrow(
                each!(|a, b| relation((a as i16).partial_cmp(&(b as i16)))),
                holds,
            ),
            "f32" => TestNarrow(each!(|a, b| relation(f(a).partial_cmp(&f(b)))), holds),
            "u64" | "b64" => TestWide(each!(|a, b| relation(a.partial_cmp(&b))), holds),
            "s64" => TestWide(
                each!(|a, b| relation(a.cast_signed().partial_cmp(&b.cast_signed()))),
                holds,
            ),
            "f64" => TestWide(each!(|a, b| relation(d(a).partial_cmp(&d(b)))), holds),
            _ => return None,
        });
    }
    Some(match spelling {
        "mov.b32" | "mov.u32" | "mov.f32" | "mov.u16" => CopyNarrow,
        // One address space: what is global is where it is.
        "mov.b64" | "mov.u64" | "mov.f64" | "cvta.to.global.u64" => CopyWide,
        "mov.pred" => CopyPredicate,
        "selp.b32" | "selp.u32" | "selp.f32" => SelectNarrow,
        "selp.b64" | "selp.u64" | "selp.f64" => SelectWide,
        "and.pred" => Predicate2(|a, b| a & b),
        "or.pred" => Predicate2(|a, b| a | b),
        "xor.pred" => Predicate2(|a, b| a ^ b),
        "not.pred" => Predicate1(|a| !a),

        "add.s32" | "add.u32" => Narrow2(each!(|a, b| a.wrapping_add(b))),
        "sub.s32" | "sub.u32" => Narrow2(each!(|a, b| a.wrapping_sub(b))),
        "mul.lo.s32" | "mul.lo.u32" => Narrow2(each!(|a, b| a.wrapping_mul(b))),
        "mul.hi.u32" => Narrow2(each!(|a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32)),
        "mad.lo.s32" => Narrow3(each!(|a, b, c| a.wrapping_mul(b).wrapping_add(c))),
        // By zero: unspecified (div, rem).
        "div.u32" => Narrow2(each!(|a, b| a.checked_div(b).unwrap_or(0xdead_dead))),
        "rem.u32" => Narrow2(each!(|a, b| a.checked_rem(b).unwrap_or(0xdead_dead))),
        "min.u32" => Narrow2(each!(|a, b| a.min(b))),
        "max.u32" => Narrow2(each!(|a, b| a.max(b))),
        "min.s32" => Narrow2(each!(|a, b| signed(a).min(signed(b)).cast_unsigned())),
        "max.s32" => Narrow2(each!(|a, b| signed(a).max(signed(b)).cast_unsigned())),
        "neg.s32" => Narrow1(each!(|a| a.wrapping_neg())),
        "and.b32" => Narrow2(each!(|a, b| a & b)),
        "or.b32" => Narrow2(each!(|a, b| a | b)),
        "xor.b32" => Narrow2(each!(|a, b| a ^ b)),
        "not.b32" => Narrow1(each!(|a| !a)),
        // By the width or more: clamped to the width (shl, shr).
        "shl.b32" => Narrow2(each!(|a, b| a.checked_shl(b).unwrap_or(0))),
        "shr.u32" => Narrow2(each!(|a, b| a.checked_shr(b).unwrap_or(0))),
        "shr.s32" => Narrow2(each!(|a, b| (signed(a) >> b.min(31)).cast_unsigned())),
        "prmt.b32" => Narrow3(each!(|a, b, c| permuted(a, b, c))),
        "bfi.b32" => Narrow4(each!(
            |a, b, c, d| insert(a.into(), b.into(), c, d, 32) as u32
        )),

        "add.s64" | "add.u64" => Wide2(each!(|a, b| a.wrapping_add(b))),
        "sub.s64" | "sub.u64" => Wide2(each!(|a, b| a.wrapping_sub(b))),
        "mul.lo.s64" | "mul.lo.u64" => Wide2(each!(|a, b| a.wrapping_mul(b))),
        "div.u64" => Wide2(each!(|a, b| a.checked_div(b).unwrap_or(0xdead << 32))),
        "min.u64" => Wide2(each!(|a, b| a.min(b))),
        "max.u64" => Wide2(each!(|a, b| a.max(b))),
        "neg.s64" => Wide1(each!(|a| a.wrapping_neg())),
        "and.b64" => Wide2(each!(|a, b| a & b)),
        "or.b64" => Wide2(each!(|a, b| a | b)),
        "shl.b64" => Shift(each!(|a, b| a.checked_shl(b).unwrap_or(0))),
        "shr.u64" => Shift(each!(|a, b| a.checked_shr(b).unwrap_or(0))),
        "bfi.b64" => Insert(each!(|a, b, c, d| insert(a, b, c, d, 64))),
        "mul.wide.u32" => Widen2(each!(|a, b| u64::from(a) * u64::from(b))),
        "mul.wide.s32" => Widen2(each!(
            |a, b| (i64::from(signed(a)) * i64::from(signed(b))).cast_unsigned()
        )),

        "add.f32" | "add.rn.f32" => Narrow2(each!(|a, b| single(f(a) + f(b)))),
        "sub.f32" => Narrow2(each!(|a, b| single(f(a) - f(b)))),
        "mul.f32" | "mul.rn.f32" => Narrow2(each!(|a, b| single(f(a) * f(b)))),
        "fma.rn.f32" => Narrow3(each!(|a, b, c| single(f(a).mul_add(f(b), f(c))))),
        "fma.rm.f32" => Narrow3(each!(|a, b, c| single(fma_down(f(a), f(b), f(c))))),
        "div.rn.f32" => Narrow2(each!(|a, b| single(f(a) / f(b)))),
        "rcp.rn.f32" => Narrow1(each!(|a| single(1.0 / f(a)))),
        "rcp.approx.ftz.f32" => Narrow1(each!(|a| single(flush(reciprocal_approx(
            flush(f(a)).to_bits()
        ))))),
        "sqrt.rn.f32" => Narrow1(each!(|a| single(f(a).sqrt()))),
        "ex2.approx.f32" => Narrow1(each!(|a| single(exp2_approx(a)))),
        "ex2.approx.ftz.f32" => {
            Narrow1(each!(|a| single(flush(exp2_approx(flush(f(a)).to_bits())))))
        }
        "neg.f32" => Narrow1(each!(|a| a ^ 1 << 31)),
        "abs.f32" => Narrow1(each!(|a| a & !(1 << 31))),
        "min.f32" => Narrow2(each!(|a, b| smaller(a, b))),
        "max.f32" => Narrow2(each!(|a, b| larger(a, b))),

        "add.f64" => Wide2(each!(|a, b| (d(a) + d(b)).to_bits())),
        "mul.f64" => Wide2(each!(|a, b| (d(a) * d(b)).to_bits())),
        "fma.rn.f64" => Wide3(each!(|a, b, c| d(a).mul_add(d(b), d(c)).to_bits())),
        "sqrt.rn.f64" => Wide1(each!(|a| d(a).sqrt().to_bits())),

        "cvt.u64.u32" => Widen1(each!(|a| a.into())),
        "cvt.s64.s32" => Widen1(each!(|a| i64::from(signed(a)).cast_unsigned())),
        "cvt.u32.u64" => Shrink(each!(|a| a as u32)),
        "cvt.u16.u32" | "cvt.u32.u16" => Narrow1(each!(|a| a & 0xffff)),
        "cvt.rn.f32.s32" => Narrow1(each!(|a| (signed(a) as f32).to_bits())),
        "cvt.rn.f32.u32" => Narrow1(each!(|a| (a as f32).to_bits())),
        "cvt.rn.f32.f64" => Shrink(each!(|a| single(d(a) as f32))),
        "cvt.f64.f32" => Widen1(each!(|a| f64::from(f(a)).to_bits())),
        "cvt.rn.f64.u64" => Wide1(each!(|a| (a as f64).to_bits())),
        // To within [0, 1]; NaN to +0.
        "cvt.sat.f32.f32" => Narrow1(each!(|a| smaller(larger(a, 0), 1f32.to_bits()))),
        "cvt.rzi.f32.f32" => Narrow1(each!(|a| single(f(a).trunc()))),
        "cvt.rni.f32.f32" => Narrow1(each!(|a| single(f(a).round_ties_even()))),
        "cvt.rpi.f64.f64" => Wide1(each!(|a| d(a).ceil().to_bits())),
        // Clamped, and NaN to 0, as Rust's `as`.
        "cvt.rzi.s32.f32" => Narrow1(each!(|a| (f(a) as i32).cast_unsigned())),
        "cvt.rzi.u64.f32" => Widen1(each!(|a| to_u64(f(a).into()))),
        "cvt.rzi.u64.f64" => Wide1(each!(|a| to_u64(d(a)))),
        // "Input a is converted and stored in the upper half of d, and the value
        // converted from input b in the lower half" (cvt).
        "cvt.rn.bf16x2.f32" => Narrow2(each!(|a, b| bf16(a) << 16 | bf16(b))),
        _ => return None,
    })
}
