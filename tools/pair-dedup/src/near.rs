//! Which texts are near: exact search by blocked products.
//!
//! A product in f32 finds candidates a little below the threshold; whether one
//! counts is decided by [`cosine`], which sums in one order and in f64. So the
//! answer is a function of the two vectors alone, whatever block they fell into,
//! and what was once kept apart is kept apart when the output is read again.

use embed::DIM;
use gemm::Parallelism;
use rayon::prelude::*;

use crate::union::Union;

/// Rows of one block of a product. Blocks are fixed, so that no result depends
/// on the number of threads.
const BLOCK: usize = 256;

/// Columns of one tile: with a block of rows it fits the second-level cache.
const TILE: usize = 512;

/// How far below the threshold the f32 product may put a pair that counts: far
/// more than it can be wrong by on unit vectors of 384 (about 384·2⁻²⁴).
const SLACK: f64 = 1e-4;

/// Unit vectors of distinct texts, `[texts, DIM]`.
pub struct Vectors(pub Vec<f32>);

impl Vectors {
    fn row(&self, i: usize) -> &[f32] {
        &self.0[i * DIM..][..DIM]
    }

    /// Cosine of two of the texts; a text is at 1 with itself.
    pub fn cosine(&self, a: usize, b: usize) -> f64 {
        if a == b {
            1.0
        } else {
            cosine(self.row(a), self.row(b))
        }
    }
}

/// Dot product of unit vectors.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum::<f64>()
        .min(1.0)
}

/// Why a row goes: the row that says the same, and how near its texts are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Near {
    /// The row that stays.
    pub keeper: usize,
    /// Cosine of the two tweets.
    pub tweet: f64,
    /// Cosine of the two replies.
    pub reply: f64,
}

/// Goes through the rows, best first, and drops each that is near one that was
/// kept: near in tweet *and* reply. So no two kept rows are near. `rows` holds
/// the numbers of each row's tweet and reply in `texts`.
pub fn drop_near(
    texts: &Vectors,
    rows: &[(usize, usize)],
    threshold: f64,
    progress: impl Fn(usize),
) -> Vec<Option<Near>> {
    let near = |a: usize, b: usize| {
        let reply = texts.cosine(rows[a].1, rows[b].1);
        if reply <= threshold {
            return None;
        }
        let tweet = texts.cosine(rows[a].0, rows[b].0);
        (tweet > threshold).then_some(Near {
            keeper: b,
            tweet,
            reply,
        })
    };
    let mut found: Vec<Option<Near>> = Vec::with_capacity(rows.len());
    let mut kept: Vec<usize> = Vec::new();
    let mut kept_vectors: Vec<f32> = Vec::new();
    for start in (0..rows.len()).step_by(BLOCK) {
        let end = rows.len().min(start + BLOCK);
        let block: Vec<f32> = rows[start..end]
            .iter()
            .flat_map(|row| texts.row(row.1))
            .copied()
            .collect();
        // Candidates are better rows: kept ones of earlier blocks, then earlier ones of this block.
        let mut candidates: Vec<Vec<usize>> = vec![Vec::new(); end - start];
        for (i, j) in above(&block, &kept_vectors, threshold - SLACK) {
            candidates[i].push(kept[j]);
        }
        for (i, j) in above(&block, &block, threshold - SLACK)
            .into_iter()
            .filter(|(i, j)| j < i)
        {
            candidates[i].push(start + j);
        }
        for (i, candidates) in candidates.into_iter().enumerate() {
            let row = start + i;
            let stands = |&other: &usize| other < start || found[other].is_none();
            let drop = candidates
                .into_iter()
                .filter(stands)
                .find_map(|other| near(row, other));
            if drop.is_none() {
                kept.push(row);
                kept_vectors.extend_from_slice(texts.row(rows[row].1));
            }
            found.push(drop);
        }
        progress(end);
    }
    found
}

/// Joins texts that are near each other: `texts` are numbers in `vectors`, and
/// the text at position `i` of it belongs to the element `elements[i]` of `union`.
pub fn join_near(
    vectors: &Vectors,
    texts: &[usize],
    elements: &[usize],
    threshold: f64,
    union: &mut Union,
) {
    let all: Vec<f32> = texts
        .iter()
        .flat_map(|&text| vectors.row(text))
        .copied()
        .collect();
    for start in (0..texts.len()).step_by(BLOCK) {
        let end = texts.len().min(start + BLOCK);
        let rest = &all[start * DIM..];
        for (i, j) in above(&all[start * DIM..end * DIM], rest, threshold - SLACK) {
            if i < j && vectors.cosine(texts[start + i], texts[start + j]) > threshold {
                union.join(elements[start + i], elements[start + j]);
            }
        }
    }
}

/// Pairs (row of `a`, row of `b`), in order of the row of `a` and then of `b`,
/// whose dot product is above `floor`. Tiles go to rayon's threads.
fn above(a: &[f32], b: &[f32], floor: f64) -> Vec<(usize, usize)> {
    let rows = a.len() / DIM;
    let mut found: Vec<(usize, usize)> = b
        .par_chunks(TILE * DIM)
        .enumerate()
        .flat_map_iter(|(tile, b)| {
            let columns = b.len() / DIM;
            let mut dots = vec![0f32; rows * columns];
            // SAFETY: `a` holds rows × DIM values, `b` columns × DIM and `dots`
            // rows × columns, all row by row, as the strides say.
            unsafe {
                gemm::gemm(
                    rows,
                    columns,
                    DIM,
                    dots.as_mut_ptr(),
                    1,
                    columns as isize,
                    false,
                    a.as_ptr(),
                    1,
                    DIM as isize,
                    b.as_ptr(),
                    DIM as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
            let hits = dots
                .iter()
                .enumerate()
                .filter(|(_, dot)| f64::from(**dot) > floor);
            hits.map(|(at, _)| (at / columns, tile * TILE + at % columns))
                .collect::<Vec<_>>()
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unit vectors in clumps, so that many are near and many are almost.
    fn clumps(count: usize, seed: u64) -> Vectors {
        let mut state = seed;
        let mut uniform = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let centres: Vec<f32> = (0..40 * DIM).map(|_| uniform()).collect();
        let mut all = Vec::new();
        for i in 0..count {
            let spread = 0.2 + 0.4 * (i % 7) as f32 / 7.0;
            let row: Vec<f32> = centres[(i * 11 % 40) * DIM..][..DIM]
                .iter()
                .map(|c| c + spread * uniform())
                .collect();
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            all.extend(row.iter().map(|x| x / norm));
        }
        Vectors(all)
    }

    #[test]
    fn blocks_find_what_comparing_each_with_each_finds() {
        let texts = clumps(1600, 1);
        let rows: Vec<(usize, usize)> = (0..1500)
            .map(|i| (i * 7 % 700, 700 + i * 13 % 900))
            .collect();
        let mut expected: Vec<Option<Near>> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let near = (0..i).filter(|&j| expected[j].is_none()).find_map(|j| {
                let (tweet, reply) = (
                    texts.cosine(row.0, rows[j].0),
                    texts.cosine(row.1, rows[j].1),
                );
                (tweet > 0.9 && reply > 0.9).then_some(Near {
                    keeper: j,
                    tweet,
                    reply,
                })
            });
            expected.push(near);
        }
        let dropped = expected.iter().flatten().count();
        assert!(
            (50..1400).contains(&dropped),
            "{dropped} dropped: the case says nothing"
        );
        for threads in [1, 8] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("threads");
            assert_eq!(
                pool.install(|| drop_near(&texts, &rows, 0.9, |_| ())),
                expected
            );
        }
    }

    #[test]
    fn joining_is_transitive_and_complete() {
        let vectors = clumps(600, 3);
        let texts: Vec<usize> = (0..600).rev().collect();
        let mut union = Union::new(600);
        join_near(&vectors, &texts, &texts, 0.9, &mut union);
        let mut expected = Union::new(600);
        for a in 0..600 {
            for b in 0..a {
                if vectors.cosine(a, b) > 0.9 {
                    expected.join(a, b);
                }
            }
        }
        let roots = |union: &mut Union| (0..600).map(|i| union.root(i)).collect::<Vec<_>>();
        let (found, expected) = (roots(&mut union), roots(&mut expected));
        assert_eq!(found, expected);
        assert!(
            expected
                .iter()
                .collect::<std::collections::HashSet<_>>()
                .len()
                > 30
        );
    }
}
