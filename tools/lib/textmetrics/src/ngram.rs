//! Counting n-grams of anything, and how many two sequences share.

use std::collections::HashMap;
use std::hash::Hash;

/// The n-grams of a sequence with their counts.
pub fn counts<T: Hash + Eq>(items: &[T], n: usize) -> HashMap<&[T], u64> {
    let mut counts = HashMap::new();
    for gram in items.windows(n) {
        *counts.entry(gram).or_insert(0) += 1;
    }
    counts
}

/// How many n-grams of that order a sequence of `len` items has.
pub fn total(len: usize, n: usize) -> u64 {
    (len + 1).saturating_sub(n) as u64
}

/// The size of the multiset intersection of two sequences' n-grams.
pub fn shared<T: Hash + Eq>(a: &[T], b: &[T], n: usize) -> u64 {
    let b = counts(b, n);
    counts(a, n)
        .into_iter()
        .map(|(gram, count)| count.min(b.get(gram).copied().unwrap_or(0)))
        .sum()
}
