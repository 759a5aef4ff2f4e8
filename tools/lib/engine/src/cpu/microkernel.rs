//! Sums of products on one thread.
//!
//! The right side is packed in panels a few vectors wide, unless few rows meet it; every
//! block of rows of the left side, read where it lies, runs through a panel with its sums in
//! registers. An output's
//! terms are added in order, [`DEPTH`] of them at a time: its bits depend neither on
//! where it lies nor on how many outputs there are.
#![allow(clippy::needless_range_loop, reason = "see simd.rs")]

use std::mem::MaybeUninit;
use std::slice;

use super::product::{Into, Term, View};

/// Terms of an output that are summed in registers before it is touched.
const DEPTH: usize = 256;

/// The most terms of a second product that join the last [`DEPTH`] of the first, so that
/// a low-rank update costs no second visit of the output.
const SIDE: usize = 64;

/// Floats across the widest panel.
const PANEL: usize = 48;

/// Rows of the tallest block.
const BLOCK: usize = 8;

/// So aligned that no vector crosses a cache line.
#[repr(C, align(64))]
struct Aligned<const N: usize>([f32; N]);

/// A panel, and a block of rows where fewer are left.
type Panel = Aligned<{ (DEPTH + SIDE) * PANEL }>;
type Edge = Aligned<{ (DEPTH + SIDE) * BLOCK }>;

/// Where a product goes: rows and columns may lie any distance apart.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub data: *mut f32,
    pub shape: [usize; 2],
    pub strides: [usize; 2],
}

/// Rows of a left side, some of their columns, and as many rows of the right side, their
/// scale apart.
#[derive(Clone, Copy)]
struct Segment {
    left: *const f32,
    strides: [usize; 2],
    depth: usize,
    right: *const f32,
    /// From one row of the right side to the next.
    across: usize,
}

/// `target = first + second`, or `target += …`; a term is `scale · lhs rhs`.
///
/// # Safety
/// The terms' shapes must fit the target; it must be valid for reads and writes, and
/// nothing else may use its elements meanwhile.
pub(super) unsafe fn multiply(
    target: Target,
    into: Into,
    first: Term<'_>,
    second: Option<Term<'_>>,
) {
    if let Some(apart) = second.filter(|term| term.depth() > SIDE) {
        // SAFETY: as of this function.
        return unsafe {
            multiply(target, into, first, None);
            multiply(target, Into::Add, apart, None);
        };
    }
    #[cfg(target_arch = "x86_64")]
    {
        /// # Safety
        /// As of `multiply`, on a processor that has these features.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(target: Target, into: Into, first: Term<'_>, second: Option<Term<'_>>) {
            // SAFETY: as of `multiply`.
            unsafe { panels::<true, 16, 3, 8>(target, into, first, second) }
        }
        /// # Safety
        /// As of `multiply`, on a processor that has these features.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(target: Target, into: Into, first: Term<'_>, second: Option<Term<'_>>) {
            // SAFETY: as of `multiply`.
            unsafe { panels::<true, 8, 2, 6>(target, into, first, second) }
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
        {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { avx512(target, into, first, second) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { avx2(target, into, first, second) };
        }
    }
    // SAFETY: as of `multiply`.
    unsafe { panels::<{ cfg!(target_arch = "aarch64") }, 4, 2, 4>(target, into, first, second) }
}

/// [`multiply`] with vectors of `LANES`, `WIDTH` of them across a panel and `ROWS` rows in
/// a block, as many as the registers hold; `FMA` where the processor has that.
///
/// # Safety
/// As of [`multiply`].
///
/// # Panics
/// If a second term is deeper than [`SIDE`], does not go with a scale of 1, or is causal.
#[inline(always)]
unsafe fn panels<const FMA: bool, const LANES: usize, const WIDTH: usize, const ROWS: usize>(
    target: Target,
    mut into: Into,
    first: Term<'_>,
    second: Option<Term<'_>>,
) {
    const { assert!(LANES * WIDTH <= PANEL && WIDTH <= 3 && ROWS <= BLOCK) };
    if let Some(second) = &second {
        assert!(second.depth() <= SIDE && first.scale() == 1.0 && second.is_whole());
    }
    // 60 KiB of a thread's stack.
    let mut panel = MaybeUninit::<Panel>::uninit();
    let panel = panel.as_mut_ptr().cast::<f32>();
    let [rows, cols] = target.shape;
    for from in (0..first.depth().max(1)).step_by(DEPTH) {
        let depth = DEPTH.min(first.depth() - from);
        let last = from + depth == first.depth();
        for col in (0..cols).step_by(LANES * WIDTH) {
            let width = (cols - col).min(LANES * WIDTH);
            let vectors = width.div_ceil(LANES);
            let columns = [col, width];
            let stretch = first.stretch(from..from + depth);
            let few = rows <= 2 * ROWS && width == vectors * LANES;
            let right = match stretch.rhs().strides() {
                // Packing would cost as much as it saves.
                [stride, 1] if few => (stretch.rhs().as_ptr().wrapping_add(col), stride),
                // SAFETY: the columns are the right side's, and DEPTH of its rows fit.
                _ => unsafe { pack::<LANES>(stretch.rhs(), 1.0, columns, vectors, panel) },
            };
            let mut parts = [Some((stretch, right)), None];
            if let (Some(second), true) = (second, last) {
                let (rhs, scale) = (second.rhs(), second.scale());
                let panel = panel.wrapping_add(depth * vectors * LANES);
                // SAFETY: the same, and SIDE rows behind those.
                let right = unsafe { pack::<LANES>(rhs, scale, columns, vectors, panel) };
                parts[1] = Some((second, right));
            }
            for row in (0..rows).step_by(ROWS) {
                let height = (rows - row).min(ROWS);
                if first.unwanted(row + height, col) {
                    continue;
                }
                let tile = Target {
                    // SAFETY: inside the target.
                    data: unsafe {
                        target
                            .data
                            .add(row * target.strides[0] + col * target.strides[1])
                    },
                    shape: [height, width],
                    ..target
                };
                let segments = parts.map(|part| {
                    part.map_or(Segment::NONE, |(term, (right, across))| {
                        let there = term.nonzero(from, row..row + height);
                        let strides = term.lhs().strides();
                        let at = row * strides[0] + there.start * strides[1];
                        Segment {
                            left: term.lhs().as_ptr().wrapping_add(at),
                            strides,
                            depth: there.len(),
                            right: right.wrapping_add(there.start * across),
                            across,
                        }
                    })
                });
                // SAFETY: the tile is inside the target, its rows are the left sides' and
                // its columns the panel's.
                unsafe {
                    match vectors {
                        1 => block::<FMA, LANES, 1, ROWS>(tile, into, first.scale(), segments),
                        2 => block::<FMA, LANES, 2, ROWS>(tile, into, first.scale(), segments),
                        _ => block::<FMA, LANES, WIDTH, ROWS>(tile, into, first.scale(), segments),
                    }
                }
            }
        }
        into = Into::Add;
    }
}

/// Copies columns of a right side, scaled, to a panel `vectors` wide; returns that with the
/// distance of its rows. What is missing of the last vector is zero.
///
/// # Safety
/// The columns `col..col + width` must be the right side's, and the panel must have room.
#[inline(always)]
unsafe fn pack<const LANES: usize>(
    rhs: View<'_>,
    scale: f32,
    [col, width]: [usize; 2],
    vectors: usize,
    panel: *mut f32,
) -> (*const f32, usize) {
    let [row_stride, col_stride] = rhs.strides();
    let data = rhs.as_ptr().wrapping_add(col * col_stride);
    let (depth, across) = (rhs.rows(), vectors * LANES);
    let end = panel.wrapping_add(depth * across);
    let (mut from, mut row) = (data, panel);
    if col_stride == 1 {
        while row < end {
            // SAFETY: the caller's.
            unsafe {
                for vector in 0..width / LANES {
                    let mut lanes = *from.add(vector * LANES).cast::<[f32; LANES]>();
                    for lane in 0..LANES {
                        lanes[lane] *= scale;
                    }
                    *row.add(vector * LANES).cast() = lanes;
                }
                for j in width / LANES * LANES..across {
                    *row.add(j) = if j < width { scale * *from.add(j) } else { 0.0 };
                }
            }
            from = from.wrapping_add(row_stride);
            row = row.wrapping_add(across);
        }
        return (panel, across);
    }
    let mut k = 0;
    // SAFETY: the caller's.
    unsafe {
        if row_stride == 1 {
            while k + 4 <= depth {
                let (from, to) = (data.add(k), panel.add(k * across));
                for j in (0..width / 4 * 4).step_by(4) {
                    let from = from.add(j * col_stride);
                    transpose(from, col_stride, scale, to.add(j), across);
                }
                k += 4;
            }
        }
        for at in 0..depth {
            let from = if at < k { width / 4 * 4 } else { 0 };
            for j in from..across {
                let value = match j < width {
                    true => scale * *data.add(at * row_stride + j * col_stride),
                    false => 0.0,
                };
                *panel.add(at * across + j) = value;
            }
        }
    }
    (panel, across)
}

/// Four times four floats, scaled, rows to columns; `stride` and `across` are from one
/// row to the next.
///
/// # Safety
/// They must be there, and there must be room.
#[inline(always)]
unsafe fn transpose(from: *const f32, stride: usize, scale: f32, to: *mut f32, across: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // SAFETY: the caller's.
        unsafe {
            let scale = _mm_set1_ps(scale);
            let row = |i: usize| _mm_mul_ps(scale, _mm_loadu_ps(from.add(i * stride)));
            let (mut a, mut b, mut c, mut d) = (row(0), row(1), row(2), row(3));
            _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
            for (i, row) in [a, b, c, d].into_iter().enumerate() {
                _mm_storeu_ps(to.add(i * across), row);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..4 {
        for j in 0..4 {
            // SAFETY: the caller's.
            unsafe { *to.add(j * across + i) = scale * *from.add(i * stride + j) };
        }
    }
}

/// One tile: a block of rows against a panel.
///
/// # Safety
/// The tile must be valid for reads and writes; the segments must have its rows and, in
/// `WIDTH` vectors, its columns.
#[inline(always)]
unsafe fn block<const FMA: bool, const LANES: usize, const WIDTH: usize, const ROWS: usize>(
    tile: Target,
    into: Into,
    scale: f32,
    segments: [Segment; 2],
) {
    let [height, width] = tile.shape;
    let [row_stride, col_stride] = tile.strides;
    if height == ROWS && width == WIDTH * LANES && col_stride == 1 {
        // SAFETY: the caller's; each vector is inside the tile.
        unsafe {
            let sums = sums::<FMA, LANES, WIDTH, ROWS>(segments);
            for row in 0..ROWS {
                let out = tile.data.add(row * row_stride);
                let out = out.cast::<[[f32; LANES]; WIDTH]>();
                let old = match into {
                    Into::Set => [[0.0; LANES]; WIDTH],
                    Into::Add => *out,
                };
                let mut new = sums[row];
                for vector in 0..WIDTH {
                    for lane in 0..LANES {
                        let sum = &mut new[vector][lane];
                        *sum = plus::<FMA>(old[vector][lane], scale, *sum);
                    }
                }
                *out = new;
            }
        }
        return;
    }
    let mut edge = MaybeUninit::<Edge>::uninit();
    let segments = match height == ROWS {
        true => segments,
        // SAFETY: the caller's; there is room for BLOCK rows of DEPTH and SIDE columns.
        false => unsafe { fill_edge::<ROWS>(segments, height, edge.as_mut_ptr().cast()) },
    };
    // SAFETY: the caller's; the segments have ROWS rows now.
    let sums = unsafe { sums::<FMA, LANES, WIDTH, ROWS>(segments) };
    if col_stride == 1 {
        for (row, sums) in sums.iter().enumerate().take(height) {
            // SAFETY: a row of the tile.
            let out = unsafe { slice::from_raw_parts_mut(tile.data.add(row * row_stride), width) };
            for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
                let old = if into == Into::Add { *out } else { 0.0 };
                *out = plus::<FMA>(old, scale, *sum);
            }
        }
        return;
    }
    for col in 0..width {
        for (row, sums) in sums.iter().enumerate().take(height) {
            // SAFETY: inside the tile.
            let out = unsafe { &mut *tile.data.add(row * row_stride + col * col_stride) };
            let old = if into == Into::Add { *out } else { 0.0 };
            *out = plus::<FMA>(old, scale, sums.as_flattened()[col]);
        }
    }
}

/// Copies the last rows of the left sides, with zeros for those that `ROWS` lacks.
///
/// # Safety
/// The left sides must have `height` rows, and `edge` room for `ROWS` of both.
unsafe fn fill_edge<const ROWS: usize>(
    segments: [Segment; 2],
    height: usize,
    edge: *mut f32,
) -> [Segment; 2] {
    let mut end = edge;
    segments.map(|segment| {
        let start = end;
        for k in 0..segment.depth {
            for row in 0..ROWS {
                let [row_stride, col_stride] = segment.strides;
                // SAFETY: the caller's.
                unsafe {
                    *end = match row < height {
                        true => *segment.left.add(row * row_stride + k * col_stride),
                        false => 0.0,
                    };
                    end = end.add(1);
                }
            }
        }
        Segment {
            left: start,
            strides: [1, ROWS],
            ..segment
        }
    })
}

/// The products of `ROWS` rows and as many columns as `WIDTH` vectors have.
///
/// # Safety
/// The segments must have them.
#[inline(always)]
unsafe fn sums<const FMA: bool, const LANES: usize, const WIDTH: usize, const ROWS: usize>(
    segments: [Segment; 2],
) -> [[[f32; LANES]; WIDTH]; ROWS] {
    let mut sums = [[[0.0; LANES]; WIDTH]; ROWS];
    for segment in segments {
        let (mut left, mut right) = (segment.left, segment.right);
        let [row_stride, col_stride] = segment.strides;
        for _ in 0..segment.depth {
            // SAFETY: the caller's.
            unsafe {
                let vectors = *right.cast::<[[f32; LANES]; WIDTH]>();
                for row in 0..ROWS {
                    let x = *left.wrapping_add(row.wrapping_mul(row_stride));
                    for vector in 0..WIDTH {
                        for lane in 0..LANES {
                            let sum = &mut sums[row][vector][lane];
                            *sum = plus::<FMA>(*sum, x, vectors[vector][lane]);
                        }
                    }
                }
            }
            left = left.wrapping_add(col_stride);
            right = right.wrapping_add(segment.across);
        }
    }
    sums
}

/// `sum + x y`.
#[inline(always)]
fn plus<const FMA: bool>(sum: f32, x: f32, y: f32) -> f32 {
    if FMA { x.mul_add(y, sum) } else { sum + x * y }
}

impl Segment {
    const NONE: Self = Self {
        left: std::ptr::null(),
        strides: [0; 2],
        depth: 0,
        right: std::ptr::null(),
        across: 0,
    };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cpu::product::Causal;

    type Multiply = unsafe fn(Target, Into, Term<'_>, Option<Term<'_>>);

    /// What this processor can run, and what any can; last the one that fuses nothing.
    fn kernels() -> Vec<Multiply> {
        let mut kernels: Vec<Multiply> = vec![multiply];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2(target: Target, into: Into, a: Term<'_>, b: Option<Term<'_>>) {
                // SAFETY: the caller's.
                unsafe { panels::<true, 8, 2, 6>(target, into, a, b) }
            }
            kernels.push(avx2);
        }
        kernels.extend([
            panels::<true, 4, 2, 4> as Multiply,
            panels::<false, 4, 2, 4>,
        ]);
        kernels
    }

    /// Whether [`multiply`] fuses products and sums here.
    fn is_fused() -> bool {
        #[cfg(target_arch = "x86_64")]
        return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        #[cfg(not(target_arch = "x86_64"))]
        cfg!(target_arch = "aarch64")
    }

    /// Numbers in [-1, 1), different for each seed.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    /// A matrix of `shape` in the middle of a wider one, perhaps stored in columns.
    fn view(data: &[f32], [rows, cols]: [usize; 2], in_columns: bool) -> View<'_> {
        // The data end with the last element: reading on would be seen by a sanitizer.
        let stored = if in_columns {
            [cols, rows]
        } else {
            [rows, cols]
        };
        let stride = stored[1] + 3;
        let len = (stride * stored[0]).saturating_sub(3);
        let view = View::new(&data[data.len() - len..], stored, stride);
        if in_columns { view.t() } else { view }
    }

    fn at(view: View<'_>, row: usize, col: usize) -> f32 {
        let [row_stride, col_stride] = view.strides();
        // SAFETY: the tests ask for what is there.
        unsafe { *view.as_ptr().add(row * row_stride + col * col_stride) }
    }

    /// `Σ scale |lhs| |rhs|` and without the bars, in double precision.
    fn exact(term: &Term<'_>, row: usize, col: usize) -> [f64; 2] {
        let products = (0..term.depth()).map(|k| {
            f64::from(at(term.lhs(), row, k))
                * f64::from(at(term.rhs(), k, col))
                * f64::from(term.scale())
        });
        products.fold([0.0, 0.0], |[size, sum], x| [size + x.abs(), sum + x])
    }

    #[test]
    fn sums_are_those_of_double_precision() {
        let shapes = [
            [1, 1, 1],
            [8, 48, 256],
            [9, 49, 257],
            [5, 7, 0],
            [17, 16, 64],
            [64, 37, 20],
            [16, 200, 700],
            [33, 96, 513],
            [3, 130, 65],
        ];
        for (case, [m, n, k]) in shapes.into_iter().enumerate() {
            for side in [0, 16, SIDE, SIDE + 1] {
                for layout in 0..4 {
                    let of = |i: u64, count| numbers(case as u64 * 64 + layout * 8 + i, count);
                    let [a, b] = [of(1, (m + 3) * (k + 3)), of(2, (k + 3) * (n + 3))];
                    let [c, d] = [of(3, (m + 3) * (side + 3)), of(4, (side + 3) * (n + 3))];
                    let (turn_lhs, turn_rhs) = (layout & 1 == 1, layout & 2 == 2);
                    let sides = |l, r, k| (view(l, [m, k], turn_lhs), view(r, [k, n], turn_rhs));
                    let ((lhs, rhs), (low, rank)) = (sides(&a, &b, k), sides(&c, &d, side));
                    let second = (side > 0).then(|| Term::new(low, rank, -1.5));
                    let first = Term::new(lhs, rhs, if side > 0 { 1.0 } else { 0.75 });
                    for kernel in kernels() {
                        // Deeper second terms are for `multiply` to split.
                        if side > SIDE && kernel as usize != multiply as Multiply as usize {
                            continue;
                        }
                        for (into, strides) in [
                            (Into::Set, [n + 1, 1]),
                            (Into::Set, [1, m + 1]),
                            (Into::Add, [n + 1, 1]),
                            (Into::Add, [1, m + 1]),
                        ] {
                            let before = match into {
                                Into::Set => vec![f32::NAN; (m + 1) * (n + 1)],
                                Into::Add => of(5, (m + 1) * (n + 1)),
                            };
                            let mut out = before.clone();
                            let target = Target {
                                data: out.as_mut_ptr(),
                                shape: [m, n],
                                strides,
                            };
                            // SAFETY: it has room.
                            unsafe { kernel(target, into, first, second) };
                            let mut touched = vec![false; out.len()];
                            for row in 0..m {
                                for col in 0..n {
                                    let at = row * strides[0] + col * strides[1];
                                    touched[at] = true;
                                    let old = if into == Into::Add {
                                        f64::from(before[at])
                                    } else {
                                        0.0
                                    };
                                    let [mut size, mut sum] = exact(&first, row, col);
                                    if let Some(second) = &second {
                                        let [more, addend] = exact(second, row, col);
                                        (size, sum) = (size + more, sum + addend);
                                    }
                                    // Every addition rounds once (Higham, section 3.1).
                                    let terms = (k + side + 4) as f64;
                                    let bound =
                                        terms * f64::from(f32::EPSILON) / 2.0 * (size + old.abs());
                                    let error = (f64::from(out[at]) - (sum + old)).abs();
                                    assert!(
                                        error <= bound,
                                        "{m} {n} {k} {side} {layout}: {error} {bound}"
                                    );
                                }
                            }
                            for ((new, old), touched) in out.iter().zip(&before).zip(touched) {
                                let same = new.to_bits() == old.to_bits();
                                assert!(touched || same, "{m} {n} {k}: written outside");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_neighbours_nor_on_vectors() {
        let (m, n, k) = (50, 100, 300);
        let (a, b) = (numbers(1, m * k), numbers(2, k * n));
        let (c, d) = (numbers(3, m * 20), numbers(4, 20 * n));
        let product = |kernel: Multiply, [row, rows]: [usize; 2], [col, cols]: [usize; 2]| {
            let first = Term::new(
                View::new(&a[row * k..], [rows, k], k),
                View::new(&b[col..], [k, cols], n),
                1.0,
            );
            let second = Term::new(
                View::new(&c[row * 20..], [rows, 20], 20),
                View::new(&d[col..], [20, cols], n),
                0.3,
            );
            let mut out = vec![0.0; rows * cols];
            let target = Target {
                data: out.as_mut_ptr(),
                shape: [rows, cols],
                strides: [cols, 1],
            };
            // SAFETY: it has room.
            unsafe { kernel(target, Into::Set, first, Some(second)) };
            out
        };
        let all = product(multiply, [0, m], [0, n]);
        for (rows, cols) in [
            ([3, 1], [5, 1]),
            ([0, 9], [90, 10]),
            ([41, 9], [17, 33]),
            ([7, 20], [0, 100]),
            // Few rows of whole vectors: the right side is read where it lies.
            ([30, 12], [3, 48]),
            ([0, 5], [16, 32]),
        ] {
            let part = product(multiply, rows, cols);
            for (i, row) in part.chunks(cols[1]).enumerate() {
                let start = (rows[0] + i) * n + cols[0];
                assert_eq!(row, &all[start..start + cols[1]], "{rows:?} {cols:?}");
            }
        }
        // Nor on the width of the vectors, where products and sums are one instruction.
        let mut fused = kernels();
        fused.pop();
        if is_fused() {
            for kernel in fused {
                assert_eq!(product(kernel, [0, m], [0, n]), all);
            }
        }
    }

    #[test]
    fn what_is_not_seen_is_not_computed_and_changes_nothing() {
        for (queries, seen) in [
            (64, 1),
            (64, 65),
            (30, 1),
            (7, 200),
            (64, 200),
            (64, 300),
            (300, 1),
        ] {
            let (keys, dim) = (seen + queries - 1, 20);
            let is_seen = |query: usize, key: usize| key < seen + query;
            let (q, k) = (numbers(1, queries * dim), numbers(2, keys * dim));
            let mut scores = numbers(3, queries * keys);
            for (i, score) in scores.iter_mut().enumerate() {
                if !is_seen(i / keys, i % keys) {
                    *score = 0.0;
                }
            }
            let (q, k) = (
                View::dense(&q, [queries, dim]),
                View::dense(&k, [keys, dim]),
            );
            // What no block of up to eight rows may read.
            let mut poisoned = scores.clone();
            for (i, score) in poisoned.iter_mut().enumerate() {
                if i % keys >= seen + i / keys + 7 {
                    *score = f32::NAN;
                }
            }
            let s = View::dense(&scores, [queries, keys]);
            let p = View::dense(&poisoned, [queries, keys]);
            let term = |lhs, rhs| Term::new(lhs, rhs, 0.5);
            let cases = [
                (term(q, k.t()), term(q, k.t()), Causal::Out(seen)),
                (term(s, k), term(p, k), Causal::Lhs(seen)),
                (term(s.t(), q), term(p.t(), q), Causal::LhsTurned(seen)),
            ];
            for kernel in kernels() {
                for (term, poisoned, causal) in cases {
                    let [rows, cols] = [term.lhs().rows(), term.rhs().t().rows()];
                    let product = |term| {
                        let mut out = vec![f32::NAN; rows * cols];
                        let target = Target {
                            data: out.as_mut_ptr(),
                            shape: [rows, cols],
                            strides: [cols, 1],
                        };
                        // SAFETY: it has room.
                        unsafe { kernel(target, Into::Set, term, None) };
                        out
                    };
                    let (want, got) = (product(term), product(poisoned.causal(causal)));
                    for (i, (want, got)) in want.iter().zip(&got).enumerate() {
                        let wanted = causal != Causal::Out(seen) || is_seen(i / cols, i % cols);
                        assert!(!wanted || want == got, "{queries} {seen} {causal:?} {i}");
                    }
                    if queries == 64 && seen == 1 && causal == Causal::Out(seen) {
                        assert!(got[50].is_nan(), "the future was computed");
                    }
                }
            }
        }
    }
}
