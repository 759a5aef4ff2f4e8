//! Dense products, cut into tiles by their shape alone.
//!
//! A tile is computed by one thread, and rayon spreads the tiles: so the result does
//! not depend on how many threads there are.

use std::ops::Range;

use rayon::prelude::*;

use super::microkernel::{Target, multiply};
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

    pub fn rows(self) -> usize {
        self.rows
    }

    fn some_rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        // What begins behind the last row, or in a matrix without columns, is empty.
        let start = self.data.len().min(range.start * self.row_stride);
        Self {
            data: &self.data[start..],
            rows: range.len(),
            ..self
        }
    }

    fn some_cols(self, range: Range<usize>) -> Self {
        self.t().some_rows(range).t()
    }

    pub fn as_ptr(self) -> *const f32 {
        self.data.as_ptr()
    }

    /// From one row to the next, and from one column to the next.
    pub fn strides(self) -> [usize; 2] {
        [self.row_stride, self.col_stride]
    }
}

/// `scale · lhs rhs`, one of the terms of a product.
#[derive(Clone, Copy)]
pub(super) struct Term<'a> {
    lhs: View<'a>,
    rhs: View<'a>,
    scale: f32,
    causal: Causal,
}

/// What a product of attention need not compute: query `i` of a block sees its keys before
/// number `seen + i` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Causal {
    No,
    /// Queries by keys come out, and what is not seen may be anything.
    Out(usize),
    /// The left side is queries by keys, zero where not seen.
    Lhs(usize),
    /// The left side is keys by queries, zero where not seen.
    LhsTurned(usize),
}

impl<'a> Term<'a> {
    pub fn new(lhs: View<'a>, rhs: View<'a>, scale: f32) -> Self {
        let ([m, k], [l, n]) = ([lhs.rows, lhs.cols], [rhs.rows, rhs.cols]);
        assert!(k == l, "[{m}, {k}] × [{l}, {n}]");
        let causal = Causal::No;
        Self {
            lhs,
            rhs,
            scale,
            causal,
        }
    }

    /// Rows and columns of the product.
    fn shape(&self) -> [usize; 2] {
        [self.lhs.rows, self.rhs.cols]
    }

    pub fn lhs(&self) -> View<'a> {
        self.lhs
    }

    pub fn rhs(&self) -> View<'a> {
        self.rhs
    }

    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Columns of the left side, which are rows of the right.
    pub fn depth(&self) -> usize {
        self.lhs.cols
    }

    /// The product of some of them.
    pub fn stretch(self, range: Range<usize>) -> Self {
        Self {
            lhs: self.lhs.some_cols(range.clone()),
            rhs: self.rhs.some_rows(range),
            ..self
        }
    }

    /// Whether the columns of the right side lie contiguously, as the rows of the left do.
    fn is_dots(&self) -> bool {
        self.lhs.col_stride == 1 && self.rhs.row_stride == 1
    }

    pub fn causal(self, causal: Causal) -> Self {
        Self { causal, ..self }
    }

    /// Whether all of it is to be computed.
    pub fn is_whole(&self) -> bool {
        self.causal == Causal::No
    }

    /// Whether rows before `end` may do without columns from `col` on.
    #[inline(always)]
    pub fn unwanted(&self, end: usize, col: usize) -> bool {
        matches!(self.causal, Causal::Out(seen) if col >= seen + end - 1)
    }

    /// Where rows of the left side, of which this is the stretch that begins at column
    /// `from`, are not zero.
    #[inline(always)]
    pub fn nonzero(&self, from: usize, rows: Range<usize>) -> Range<usize> {
        let depth = self.depth();
        match self.causal {
            Causal::Lhs(seen) => 0..(seen + rows.end - 1).saturating_sub(from).min(depth),
            Causal::LhsTurned(seen) => {
                (rows.start + 1).saturating_sub(seen + from).min(depth)..depth
            }
            Causal::No | Causal::Out(_) => 0..depth,
        }
    }

    /// Its part of a tile.
    fn tile(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        Self {
            lhs: self.lhs.some_rows(rows),
            rhs: self.rhs.some_cols(cols),
            ..self
        }
    }

    /// The transpose.
    fn t(self) -> Self {
        assert!(self.is_whole());
        Self {
            lhs: self.rhs.t(),
            rhs: self.lhs.t(),
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
        inside && cols <= stride,
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

/// Rows and columns of a tile. Each packs its share of the right side anew, and a
/// transposed weight is slow to pack: in tall tiles that is done once for many tokens.
/// The columns are whole panels of [`multiply`].
const TILE: [usize; 2] = [512, 96];

/// Rows of a tile in an output of fewer columns than a tile's: the adapters' ranks, whose
/// packing costs little.
const NARROW: usize = 256;

/// `dst = scale · lhs rhs` or `dst += …`, in parallel.
pub(super) fn product(dst: ViewMut<'_>, into: Into, lhs: View<'_>, rhs: View<'_>, scale: f32) {
    products(dst, into, Term::new(lhs, rhs, scale), None);
}

/// `dst = first + second` or `dst += …`, in parallel. A first term with a second beside it
/// has a scale of 1.
pub(super) fn products(dst: ViewMut<'_>, into: Into, first: Term<'_>, second: Option<Term<'_>>) {
    let [m, n] = [dst.rows, dst.cols];
    let all = |holds: fn(&Term<'_>) -> bool| holds(&first) && second.as_ref().is_none_or(holds);
    assert!(all(|term| term.is_whole()));
    assert!(second.is_none() || first.scale == 1.0);
    assert!(first.shape() == [m, n] && second.is_none_or(|term| term.shape() == [m, n]));
    if m <= FEW && all(|term| term.is_dots()) {
        return few_rows(dst, into, first, second);
    }
    let [height, width] = [if n < TILE[1] { NARROW } else { TILE[0] }, TILE[1]];
    let (across, down) = (n.div_ceil(width), m.div_ceil(height));
    let (stride, out) = (dst.stride, Shared::new(dst.data));
    let tile = |t: usize| {
        let (i, j) = (t / across * height, t % across * width);
        let (rows, cols) = (i..m.min(i + height), j..n.min(j + width));
        let second = second.map(|term| term.tile(rows.clone(), cols.clone()));
        let first = first.tile(rows, cols);
        // SAFETY: the tiles of one output do not overlap and lie inside `dst`.
        unsafe { products_here(out.at(i * stride + j), stride, into, first, second) }
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

/// [`products`] of few rows as dot products with the columns of the right sides, which
/// lie contiguous. What a row gives does not depend on how many there are.
fn few_rows(dst: ViewMut<'_>, into: Into, first: Term<'_>, second: Option<Term<'_>>) {
    let (stride, out) = (dst.stride, Shared::new(dst.data));
    let starts = (0..dst.cols).into_par_iter().step_by(COLUMNS);
    starts.for_each(|start| {
        let columns = start..dst.cols.min(start + COLUMNS);
        let terms = [(into, Some(first)), (Into::Add, second)];
        for (into, term) in terms {
            let Some(Term {
                lhs, rhs, scale, ..
            }) = term
            else {
                continue;
            };
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
/// `dst` must be valid for the term's shape with that stride, and nothing else may use
/// those elements meanwhile.
pub(super) unsafe fn product_here(dst: *mut f32, stride: usize, into: Into, term: Term<'_>) {
    // SAFETY: the caller's.
    unsafe { products_here(dst, stride, into, term, None) }
}

/// [`products`] on this thread, into rows `stride` apart.
///
/// # Safety
/// As of [`product_here`].
unsafe fn products_here(
    dst: *mut f32,
    stride: usize,
    into: Into,
    first: Term<'_>,
    second: Option<Term<'_>>,
) {
    let [m, n] = first.shape();
    let target = Target {
        data: dst,
        shape: [m, n],
        strides: [stride, 1],
    };
    // A left side that lies in columns is walked through in long steps: where it is the
    // larger one, it is rather packed, as the right side of the transposes.
    let in_columns = first.lhs.row_stride == 1 && first.rhs.col_stride == 1;
    // SAFETY: the caller's; views were checked against their buffers when made.
    unsafe {
        if in_columns && 4 * n <= m && first.is_whole() {
            let target = Target {
                shape: [n, m],
                strides: [1, stride],
                ..target
            };
            multiply(target, into, first.t(), second.map(Term::t));
        } else {
            multiply(target, into, first, second);
        }
    }
}
