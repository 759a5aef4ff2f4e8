//! Dense products, cut into tiles by their shape alone.
//!
//! A tile is one single-threaded `gemm`, and rayon spreads the tiles: so the
//! result does not depend on how many threads there are, and thread pools do
//! not nest.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::{dot4, vectorised};

/// A matrix inside a buffer that starts at its first element.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `[rows, cols]`, rows `stride` apart.
    pub fn new(data: &'a [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        check(data.len(), [rows, cols], stride);
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// `[rows, cols]`, row after row.
    pub fn dense(data: &'a [f32], [rows, cols]: [usize; 2]) -> Self {
        Self::new(data, [rows, cols], cols)
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to be written.
pub(super) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> ViewMut<'a> {
    /// `[rows, cols]`, rows `stride` apart.
    pub fn new(data: &'a mut [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        check(data.len(), [rows, cols], stride);
        Self {
            data,
            rows,
            cols,
            stride,
        }
    }

    /// `[rows, cols]`, row after row.
    pub fn dense(data: &'a mut [f32], [rows, cols]: [usize; 2]) -> Self {
        Self::new(data, [rows, cols], cols)
    }
}

/// A row-major matrix must lie inside its buffer.
fn check(len: usize, [rows, cols]: [usize; 2], stride: usize) {
    let inside = rows == 0 || cols == 0 || (rows - 1) * stride + cols <= len;
    assert!(
        inside && cols <= stride.max(1),
        "a [{rows}, {cols}] matrix with stride {stride} in {len} floats"
    );
}

/// A pointer that tiles and heads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: a bare address; each use states why its writes are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// It must lie inside the buffer.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

/// What happens to the old value of an output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    /// Overwritten.
    Set,
    /// Added to.
    Add,
}

/// Output tile of one `gemm` call, in its rows and columns. Each call packs its share
/// of both sides anew, and a transposed weight is slow to pack: in tall tiles that is
/// done once for many tokens. Against `[256, 512]`, [1024, 256] × [256, 768]ᵀ gained 14%.
const TILE: [usize; 2] = [1024, 128];

/// Rows of a tile in an output of fewer columns than a tile's: the adapters' ranks, whose
/// packing costs little.
const NARROW: usize = 256;

/// `dst = scale · lhs rhs` or `dst += …`, in parallel.
pub(super) fn product(dst: ViewMut<'_>, into: Into, lhs: View<'_>, rhs: View<'_>, scale: f32) {
    let [m, n] = [dst.rows, dst.cols];
    assert!(
        lhs.rows == m && rhs.cols == n && lhs.cols == rhs.rows,
        "[{}, {}] × [{}, {}] into [{m}, {n}]",
        lhs.rows,
        lhs.cols,
        rhs.rows,
        rhs.cols
    );
    if m <= FEW && lhs.col_stride == 1 && rhs.row_stride == 1 {
        return few_rows(dst, into, lhs, rhs, scale);
    }
    let [height, width] = [if n < TILE[1] { NARROW } else { TILE[0] }, TILE[1]];
    let (across, down) = (n.div_ceil(width), m.div_ceil(height));
    let (stride, out) = (dst.stride, Shared::new(dst.data));
    let tile = |t: usize| {
        let (i, j) = (t / across * height, t % across * width);
        let (h, w) = (height.min(m - i), width.min(n - j));
        let lhs = View {
            data: &lhs.data[i * lhs.row_stride..],
            rows: h,
            ..lhs
        };
        let rhs = View {
            data: &rhs.data[j * rhs.col_stride..],
            cols: w,
            ..rhs
        };
        // SAFETY: the tiles of one output do not overlap and lie inside `dst`.
        unsafe { product_here(out.at(i * stride + j), stride, into, lhs, rhs, scale) }
    };
    if across * down == 1 {
        tile(0);
    } else {
        (0..across * down).into_par_iter().for_each(tile);
    }
}

/// Rows up to which packing the other side costs more than it saves: a decoding
/// step reads each weight once and multiplies it by a handful of tokens.
const FEW: usize = 8;

/// Columns of such an output that one task computes.
const COLUMNS: usize = 64;

/// A product of few rows as dot products with the columns of `rhs`, which lie
/// contiguous. What a row gives does not depend on how many there are.
fn few_rows(dst: ViewMut<'_>, into: Into, lhs: View<'_>, rhs: View<'_>, scale: f32) {
    let (stride, out) = (dst.stride, Shared::new(dst.data));
    let starts = (0..rhs.cols).into_par_iter().step_by(COLUMNS);
    starts.for_each(|start| {
        let columns = start..rhs.cols.min(start + COLUMNS);
        let mut values = [0.0; FEW * COLUMNS];
        dots(lhs, rhs, columns.clone(), &mut values);
        for (i, values) in values.chunks_exact(COLUMNS).take(lhs.rows).enumerate() {
            for (j, value) in columns.clone().zip(values) {
                // SAFETY: inside `dst` (checked when it was made); each task has
                // columns of its own.
                let out = unsafe { &mut *out.at(i * stride + j) };
                *out = match into {
                    Into::Set => scale * value,
                    Into::Add => *out + scale * value,
                };
            }
        }
    });
}

vectorised! {
    /// Some columns of `lhs rhs`, at most [`COLUMNS`] of at most [`FEW`] rows.
    fn dots(lhs: View<'_>, rhs: View<'_>, columns: Range<usize>, values: &mut [f32]) {
        // A missing row repeats the last, and nobody reads it.
        let row = |i: usize| &lhs.data[i.min(lhs.rows - 1) * lhs.row_stride..][..lhs.cols];
        for (c, j) in columns.enumerate() {
            let column = &rhs.data[j * rhs.col_stride..][..lhs.cols];
            for first in (0..lhs.rows).step_by(4) {
                let rows = [row(first), row(first + 1), row(first + 2), row(first + 3)];
                for (i, value) in (first..).zip(dot4(rows, column)) {
                    values[i * COLUMNS + c] = value;
                }
            }
        }
    }
}

/// One product on this thread, into rows `stride` apart.
///
/// # Safety
/// `dst` must be valid for `[lhs.rows, rhs.cols]` with that stride, and nothing
/// else may use those elements meanwhile.
pub(super) unsafe fn product_here(
    dst: *mut f32,
    stride: usize,
    into: Into,
    lhs: View<'_>,
    rhs: View<'_>,
    scale: f32,
) {
    debug_assert_eq!(lhs.cols, rhs.rows);
    // SAFETY: the views were checked against their buffers when made, and the
    // caller vouches for `dst`.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst,
            1,
            stride as isize,
            into == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
