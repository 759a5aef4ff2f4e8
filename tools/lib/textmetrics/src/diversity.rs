//! distinct-n (Li et al., 2016): how much a system repeats itself from reply to reply.

use std::collections::HashSet;

use crate::python;

/// Gathers the n-grams of white-space words over all replies of a system.
#[derive(Clone, Debug)]
pub struct Distinct {
    n: usize,
    seen: HashSet<Vec<String>>,
    total: u64,
}

impl Distinct {
    /// For n-grams of `n` words, `n` ≥ 1.
    pub fn new(n: usize) -> Self {
        Self {
            n: n.max(1),
            seen: HashSet::new(),
            total: 0,
        }
    }

    /// Adds one reply.
    pub fn add(&mut self, text: &str) {
        let words: Vec<String> = python::split(text).map(str::to_owned).collect();
        for gram in words.windows(self.n) {
            self.total += 1;
            if !self.seen.contains(gram) {
                self.seen.insert(gram.to_vec());
            }
        }
    }

    /// Different n-grams per n-gram, 0 to 1; 0 where no reply was long enough.
    pub fn ratio(&self) -> f64 {
        self.seen.len() as f64 / self.total.max(1) as f64
    }
}
