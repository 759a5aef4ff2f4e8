//! Which rows an optimiser step takes, and how they are cut into passes.

use crate::rows::{Row, permutation};

/// Most tokens of one pass on the CPU, where longer ones gain no speed. A row
/// that is longer is a pass of its own.
const PASS_TOKENS: usize = 4096;

/// The endless stream of rows: epoch after epoch, each in its own order.
pub struct Stream<'a> {
    rows: &'a [Row],
    seed: u64,
    shuffle: bool,
    /// The epoch whose order is at hand.
    epoch: Option<u32>,
    order: Vec<usize>,
}

impl<'a> Stream<'a> {
    /// From its first row, in the order given or shuffled by the seed.
    pub fn new(rows: &'a [Row], seed: u64, shuffle: bool) -> Self {
        Self {
            rows,
            seed,
            shuffle,
            epoch: None,
            order: (0..rows.len()).collect(),
        }
    }

    /// Row number `at` of the stream.
    pub fn row(&mut self, at: u64) -> &'a Row {
        let n = self.rows.len() as u64;
        let epoch = (at / n) as u32;
        if self.shuffle && self.epoch != Some(epoch) {
            self.order = permutation(self.rows.len(), self.seed, epoch);
            self.epoch = Some(epoch);
        }
        &self.rows[self.order[(at % n) as usize]]
    }
}

/// Cuts rows into passes.
pub fn passes<'a>(rows: &[&'a Row], packing: bool) -> Vec<Vec<qwen3::Row<'a>>> {
    let mut passes: Vec<Vec<qwen3::Row>> = Vec::new();
    let mut tokens = 0;
    for row in rows {
        if passes.is_empty() || !packing || tokens + row.ids.len() > PASS_TOKENS {
            passes.push(Vec::new());
            tokens = 0;
        }
        tokens += row.ids.len();
        if let Some(last) = passes.last_mut() {
            last.push(qwen3::Row {
                number: row.number,
                ids: &row.ids,
                labelled: &row.labelled,
            });
        }
    }
    passes
}
