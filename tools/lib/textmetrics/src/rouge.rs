//! ROUGE (Lin, 2004) as Google's rouge-score computes it without stemming.
//!
//! Its tokens are runs of ASCII letters and digits: a reply of emoji, or in a
//! script other than Latin, has none and scores 0 whatever it says.

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
pub struct Rouge {
    predicted: Vec<String>,
    referred: Vec<String>,
}

impl Rouge {
    /// Tokenises both sides.
    pub fn new(prediction: &str, reference: &str) -> Self {
        Self {
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
        Overlap {
            hits: longest_common(&self.referred, &self.predicted),
            predicted: self.predicted.len() as u64,
            reference: self.referred.len() as u64,
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

/// The length of the longest common subsequence. One row of the table is all that
/// the next needs, so long texts take time but no memory.
fn longest_common(a: &[String], b: &[String]) -> u64 {
    let mut row = vec![0; b.len() + 1]; // of a's prefix with each prefix of b
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    row[b.len()]
}
