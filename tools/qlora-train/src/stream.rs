//! Which rows an optimiser step takes, and how they are cut into passes.

use qwen3::plan::Extent;
use settings::Training;

use crate::rows::{Row, Rows, permutation};

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

/// Cuts rows into passes of at most so many tokens. A longer row is a pass of its
/// own; at most 1 makes each row one.
pub fn passes<'a>(rows: &[&'a Row], most: usize) -> Vec<Vec<qwen3::Row<'a>>> {
    let mut passes: Vec<Vec<qwen3::Row>> = Vec::new();
    let mut tokens = 0;
    for row in rows {
        if passes.is_empty() || tokens + row.ids.len() > most {
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

/// Rows after which a run is no longer counted to its end, but taken to go on as it
/// began: some seconds of counting.
const COUNTED: u64 = 20_000_000;

/// Tokens of a pass from which on its length matters little.
const WORTHWHILE: usize = 1024;

/// The passes of a run, counted before there is one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Survey {
    /// Optimiser steps counted: all, unless there are very many rows.
    pub steps: u64,
    /// Passes of these steps.
    pub passes: u64,
    /// Tokens of these steps.
    pub tokens: u64,
    /// Tokens to be predicted.
    pub labelled: u64,
    /// Tokens with each batch padded to its longest row.
    pub padded: u64,
    /// What holds any of the passes.
    pub extent: Extent,
    /// Most tokens of a pass of an evaluation: those of the longest in training, so
    /// that it needs no more memory, but enough to be worth a pass.
    pub held_out_most: usize,
    /// Passes and tokens of one evaluation.
    pub held_out: [u64; 2],
    /// What holds any of these passes.
    pub held_out_extent: Extent,
}

impl Survey {
    /// Goes through a run of `steps` times `rows_per_step` rows in passes of at most
    /// `most` tokens.
    pub fn new(
        rows: &Rows,
        training: &Training,
        (steps, rows_per_step): (u64, usize),
        most: usize,
    ) -> Self {
        let mut stream = Stream::new(&rows.train, training.seed, training.shuffle);
        let mut survey = Self {
            steps: steps.min((COUNTED / rows_per_step as u64).max(1)),
            ..Self::default()
        };
        let mut at = 0;
        for _ in 0..survey.steps {
            let next = at + rows_per_step as u64;
            let step: Vec<&Row> = (at..next).map(|at| stream.row(at)).collect();
            at = next;
            for pass in passes(&step, most) {
                let extent = Extent::of(&pass);
                survey.passes += 1;
                survey.tokens += extent.tokens as u64;
                survey.labelled += extent.labelled as u64;
                survey.extent = survey.extent.max(extent);
            }
            for batch in step.chunks(training.batch_size) {
                let longest = batch.iter().map(|row| row.ids.len()).max().unwrap_or(0);
                survey.padded += (batch.len() * longest) as u64;
            }
        }
        survey.held_out_most = most.min(survey.extent.tokens.max(WORTHWHILE));
        let held_out: Vec<&Row> = rows.eval.iter().collect();
        for pass in passes(&held_out, survey.held_out_most) {
            let extent = Extent::of(&pass);
            survey.held_out[0] += 1;
            survey.held_out[1] += extent.tokens as u64;
            survey.held_out_extent = survey.held_out_extent.max(extent);
        }
        survey
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize]) -> Vec<Row> {
        let row = |(number, &len): (u32, &usize)| Row {
            number,
            ids: vec![7; len],
            labelled: (0..len).map(|i| i % 2 == 1).collect(),
        };
        (0..).zip(lengths).map(row).collect()
    }

    #[test]
    fn rows_are_packed_in_their_order() {
        let rows = rows(&[3, 4, 9, 2, 2, 4]);
        let rows: Vec<&Row> = rows.iter().collect();
        let lengths = |most| -> Vec<Vec<usize>> {
            let of = |pass: &Vec<qwen3::Row>| pass.iter().map(|row| row.ids.len()).collect();
            passes(&rows, most).iter().map(of).collect()
        };
        assert_eq!(lengths(8), [vec![3, 4], vec![9], vec![2, 2, 4]]);
        assert_eq!(lengths(1), [3, 4, 9, 2, 2, 4].map(|len| vec![len]));
        assert_eq!(lengths(100).len(), 1);
    }

    #[test]
    fn a_survey_counts_what_a_run_does() {
        let rows = Rows {
            train: rows(&[3, 5, 8]),
            eval: rows(&[6, 6, 2]),
            kinds: crate::rows::Kinds::default(),
            left_out: 0,
            cut: 0,
            sha256: String::new(),
            seen: qwen3::Seen::default(),
            trained_before: 0,
        };
        let training = Training {
            batch_size: 2,
            shuffle: false,
            ..Training::default()
        };
        // Steps of four rows: 3 5 8 3, 5 8 3 5, 8 3 5 8.
        let survey = Survey::new(&rows, &training, (3, 4), 11);
        assert_eq!(survey.passes, 2 + 3 + 3);
        assert_eq!((survey.tokens, survey.labelled), (19 + 21 + 24, 8 + 9 + 11));
        assert_eq!(survey.padded, (10 + 16) + (16 + 10) + (16 + 16));
        let whole = Extent {
            rows: 2,
            tokens: 11,
            labelled: 5,
            longest: 8,
        };
        assert_eq!(survey.extent, whole);
        assert_eq!(survey.held_out, [2, 14]);
        assert_eq!(survey.held_out_extent.tokens, 8);
    }
}
