//! ROUGE (Lin, 2004) as Google's rouge-score computes it without stemming.
//!
//! Its tokens are runs of ASCII letters and digits: a reply of emoji, or in a
//! script other than Latin, has none and scores 0 whatever it says.

use std::collections::{BTreeSet, HashMap};

use crate::ngram;

/// What was found in common: the sufficient statistics of any ROUGE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Units (n-grams, or tokens of a common subsequence) that both have.
    pub hits: u64,
    /// Units of the prediction.
    pub predicted: u64,
    /// Units of the reference.
    pub reference: u64,
}

impl Overlap {
    /// Hits per predicted unit; 0 where there are none.
    pub fn precision(&self) -> f64 {
        self.hits as f64 / self.predicted.max(1) as f64
    }

    /// Hits per unit of the reference; 0 where there are none.
    pub fn recall(&self) -> f64 {
        self.hits as f64 / self.reference.max(1) as f64
    }

    /// The harmonic mean of precision and recall, 0 to 1.
    pub fn fmeasure(&self) -> f64 {
        let (precision, recall) = (self.precision(), self.recall());
        if precision + recall > 0.0 {
            2.0 * precision * recall / (precision + recall)
        } else {
            0.0
        }
    }
}

/// A prediction and its reference, tokenised once for every kind of ROUGE.
pub struct Rouge<'a> {
    prediction: &'a str,
    reference: &'a str,
    predicted: Vec<String>,
    referred: Vec<String>,
}

impl<'a> Rouge<'a> {
    /// Tokenises both sides.
    pub fn new(prediction: &'a str, reference: &'a str) -> Self {
        Self {
            prediction,
            reference,
            predicted: tokenize(prediction),
            referred: tokenize(reference),
        }
    }

    /// ROUGE-N: n-grams in common.
    pub fn n(&self, n: usize) -> Overlap {
        Overlap {
            hits: ngram::shared(&self.predicted, &self.referred, n),
            predicted: ngram::total(self.predicted.len(), n),
            reference: ngram::total(self.referred.len(), n),
        }
    }

    /// ROUGE-L: the longest common subsequence of the whole texts.
    pub fn l(&self) -> Overlap {
        let table = LcsTable::new(&self.referred, &self.predicted);
        Overlap {
            hits: table.at(self.referred.len(), self.predicted.len()).into(),
            predicted: self.predicted.len() as u64,
            reference: self.referred.len() as u64,
        }
    }

    /// ROUGE-Lsum: lines are sentences; each line of the reference is credited with
    /// the union of its common subsequences with the predicted lines.
    pub fn l_sum(&self) -> Overlap {
        let sentences =
            |text: &str| -> Vec<Vec<String>> { text.split('\n').map(tokenize).collect() };
        let (predicted, referred) = (sentences(self.prediction), sentences(self.reference));
        let mut left_predicted = multiset(&predicted);
        let mut left_referred = multiset(&referred);
        let mut hits = 0;
        for sentence in &referred {
            let union: BTreeSet<usize> = predicted
                .iter()
                .flat_map(|p| LcsTable::new(sentence, p).indices())
                .collect();
            for token in union.into_iter().map(|i| sentence[i].as_str()) {
                // A token is spent on both sides, so that none is counted twice.
                if let (Some(p @ 1..), Some(r @ 1..)) =
                    (left_predicted.get_mut(token), left_referred.get_mut(token))
                {
                    (*p, *r) = (*p - 1, *r - 1);
                    hits += 1;
                }
            }
        }
        let tokens = |sentences: &[Vec<String>]| sentences.iter().map(|s| s.len() as u64).sum();
        Overlap {
            hits,
            predicted: tokens(&predicted),
            reference: tokens(&referred),
        }
    }
}

fn tokenize(text: &str) -> Vec<String> {
    // Lower-case first: U+212A KELVIN SIGN becomes a `k` that counts.
    text.to_lowercase()
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|token| !token.is_empty())
        .map(str::to_owned)
        .collect()
}

fn multiset(sentences: &[Vec<String>]) -> HashMap<&str, u64> {
    let mut counts = HashMap::new();
    for token in sentences.iter().flatten() {
        *counts.entry(token.as_str()).or_insert(0) += 1;
    }
    counts
}

/// Lengths of the longest common subsequences of every pair of prefixes.
struct LcsTable<'a> {
    reference: &'a [String],
    prediction: &'a [String],
    lengths: Vec<u32>, // [reference + 1, prediction + 1]
}

impl<'a> LcsTable<'a> {
    fn new(reference: &'a [String], prediction: &'a [String]) -> Self {
        let columns = prediction.len() + 1;
        let mut lengths = vec![0; (reference.len() + 1) * columns];
        for (i, r) in reference.iter().enumerate() {
            for (j, p) in prediction.iter().enumerate() {
                let (above, here) = (i * columns + j, (i + 1) * columns + j);
                lengths[here + 1] = if r == p {
                    lengths[above] + 1
                } else {
                    lengths[above + 1].max(lengths[here])
                };
            }
        }
        Self {
            reference,
            prediction,
            lengths,
        }
    }

    fn at(&self, i: usize, j: usize) -> u32 {
        self.lengths[i * (self.prediction.len() + 1) + j]
    }

    /// The reference's indices in one longest common subsequence, last first. Where
    /// several exist the choice shows in ROUGE-Lsum, so it is rouge-score's: on a
    /// tie the reference is shortened.
    fn indices(&self) -> Vec<usize> {
        let (mut i, mut j) = (self.reference.len(), self.prediction.len());
        let mut indices = Vec::new();
        while i > 0 && j > 0 {
            if self.reference[i - 1] == self.prediction[j - 1] {
                indices.push(i - 1);
                (i, j) = (i - 1, j - 1);
            } else if self.at(i, j - 1) > self.at(i - 1, j) {
                j -= 1;
            } else {
                i -= 1;
            }
        }
        indices
    }
}
