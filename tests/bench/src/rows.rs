//! The rows that are trained on. Time depends on their lengths, not on their tokens.

use qwen3::Row;

/// Tokens of the prompt and of the reply; only the reply is labelled.
pub type Length = (usize, usize);

/// Rows of a step.
pub const STEP: usize = 8;

/// Sixteen steps of rows of 128 tokens, as long texts that are cut give.
pub const EQUAL: [Length; 128] = [(27, 101); 128];

/// Lengths in Qwen3's tokens, the template's included, of real pairs of tweet and
/// reply: 128 at even ranks among 3,318 sorted by length, in a random order.
/// Mean 40.0, median 37 and 95th percentile 68 are those of all; eight neighbours padded
/// to the longest of them are 1.59 times as many tokens, as all in random order are.
#[rustfmt::skip]
pub const REAL: [Length; 128] = [
    (20, 7), (19, 10), (18, 10), (22, 10), (28, 29), (33, 13), (28, 4), (18, 4),
    (20, 11), (19, 5), (32, 10), (34, 14), (14, 4), (28, 27), (33, 21), (23, 11),
    (22, 7), (21, 13), (37, 4), (21, 40), (13, 10), (16, 7), (36, 15), (19, 17),
    (17, 10), (15, 10), (14, 31), (26, 11), (24, 8), (24, 16), (18, 32), (19, 28),
    (26, 7), (14, 16), (21, 4), (40, 29), (17, 8), (17, 7), (46, 11), (30, 9),
    (13, 20), (23, 4), (17, 17), (32, 38), (20, 28), (26, 26), (16, 16), (18, 5),
    (37, 37), (18, 13), (37, 23), (25, 34), (35, 10), (24, 12), (34, 15), (32, 12),
    (13, 7), (23, 10), (25, 5), (26, 19), (32, 15), (48, 7), (46, 15), (28, 13),
    (25, 6), (26, 3), (19, 20), (27, 7), (16, 13), (21, 14), (16, 6), (15, 2),
    (30, 7), (22, 8), (26, 2), (32, 6), (17, 9), (38, 26), (29, 6), (23, 8),
    (40, 28), (15, 4), (24, 27), (21, 7), (38, 25), (13, 6), (17, 4), (15, 6),
    (26, 12), (15, 3), (36, 7), (19, 6), (34, 16), (37, 39), (16, 33), (22, 22),
    (40, 16), (19, 14), (16, 25), (15, 5), (16, 27), (18, 28), (20, 18), (14, 8),
    (15, 9), (19, 11), (41, 26), (19, 4), (46, 37), (43, 10), (20, 22), (25, 18),
    (28, 8), (40, 26), (50, 4), (21, 5), (19, 7), (23, 18), (41, 31), (20, 17),
    (25, 10), (17, 18), (41, 11), (39, 26), (33, 25), (29, 11), (43, 16), (33, 29),
];

/// Rows of a vocabulary, so long each.
pub struct Rows {
    ids: Vec<Vec<u32>>,
    labelled: Vec<Vec<bool>>,
}

impl Rows {
    /// Fills rows of these lengths with tokens.
    pub fn new(lengths: &[Length], vocabulary: usize) -> Self {
        let token = |row: usize, i: usize| ((i * i + 31 * row) % vocabulary) as u32;
        let rows = || lengths.iter().enumerate();
        Self {
            ids: rows()
                .map(|(row, (prompt, reply))| (0..prompt + reply).map(|i| token(row, i)).collect())
                .collect(),
            labelled: rows()
                .map(|(_, &(prompt, reply))| (0..prompt + reply).map(|i| i >= prompt).collect())
                .collect(),
        }
    }

    /// The rows step by step.
    pub fn steps(&self) -> Vec<Vec<Row<'_>>> {
        let rows: Vec<Row> = (0..)
            .zip(self.ids.iter().zip(&self.labelled))
            .map(|(number, (ids, labelled))| Row {
                number,
                ids,
                labelled,
            })
            .collect();
        rows.chunks(STEP).map(<[Row]>::to_vec).collect()
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures in the comment on [`REAL`], of all 3,318 pairs.
    #[test]
    fn the_real_lengths_are_spread_as_all_are() {
        let mut totals = REAL.map(|(prompt, reply)| prompt + reply);
        let padded: usize = totals
            .chunks(STEP)
            .map(|step| step.iter().max().map_or(0, |most| most * step.len()))
            .sum();
        let all: usize = totals.iter().sum();
        assert!((all as f64 / 128.0 - 40.0).abs() < 0.1, "mean of {all}");
        assert!((padded as f64 / all as f64 - 1.59).abs() < 0.01, "{padded}");
        totals.sort_unstable();
        assert_eq!((totals[64], totals[121]), (37, 68));
    }
}
