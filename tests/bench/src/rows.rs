//! The rows that are trained on. Time depends on their lengths, not on their tokens.

use qwen3::Row;

/// Tokens of the prompt and of the reply; only the reply is labelled.
pub type Length = (usize, usize);

/// Rows of a step.
pub const STEP: usize = 8;

/// Sixteen steps of rows of 128 tokens, as long texts that are cut give.
pub const EQUAL: [Length; 128] = [(27, 101); 128];

/// Lengths in Qwen3's tokens, the template's included, of real pairs of tweet and
/// reply, as `qlora-train bench` has them: 128 at even ranks among 3,318 sorted by
/// length, in a random order. Mean 40.0, median 37 and 95th percentile 68 are those of
/// all; eight neighbours padded to the longest of them are 1.59 times as many tokens, as
/// all in random order are.
pub fn real() -> Vec<Length> {
    let text = include_str!("../../../tools/qlora-train/src/lengths.json");
    serde_json::from_str(text).expect("the list is in the tree")
}

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

    /// The figures in the comment on [`real`], of all 3,318 pairs.
    #[test]
    fn the_real_lengths_are_spread_as_all_are() {
        let lengths = real().into_iter();
        let mut totals: Vec<_> = lengths.map(|(prompt, reply)| prompt + reply).collect();
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
