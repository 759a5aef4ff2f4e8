//! The lines that are written.

use serde::{Serialize, Serializer};

use crate::prompted::Prompted;
use crate::scores::{CorpusScores, Scores};

/// One pair with every system's answer.
#[derive(Serialize)]
pub struct ItemLine<'a> {
    pub v: u64,
    pub id: &'a str,
    pub conversation_id: &'a str,
    /// Rows with the same one are no independent evidence: `sigtest --cluster split_group`.
    pub split_group: &'a str,
    pub tweet: &'a str,
    pub reference: &'a str,
    /// Tokens that `nll` is the mean of, the reply's end included.
    pub reference_tokens: usize,
    pub systems: Ordered<'a, SystemLine>,
}

/// What one system makes of a pair.
#[derive(Serialize)]
pub struct SystemLine {
    /// As it was generated, whatever the scores are of.
    pub prediction: String,
    #[serde(flatten)]
    pub scores: Scores,
    /// Of the reference, mean per token, in nats.
    pub nll: f64,
    /// How the reply ended: `stop`, or `length` where it was cut.
    pub finish: &'static str,
}

/// The last line.
#[derive(Serialize)]
pub struct CorpusLine<'a> {
    pub v: u64,
    pub corpus: Systems<'a>,
}

/// All systems over all pairs.
#[derive(Serialize)]
pub struct Systems<'a> {
    pub systems: Ordered<'a, SystemScores>,
    /// What the system `prompted` was shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompted: Option<Prompted>,
    pub signature: String,
}

/// One system over all pairs.
#[derive(Serialize)]
pub struct SystemScores {
    #[serde(flatten)]
    pub scores: CorpusScores,
    /// Of the references, mean per token over all of them.
    pub nll: f64,
    pub nll_tokens: u64,
    /// exp(nll)
    pub perplexity: f64,
    /// Replies cut at their longest length.
    pub cut: u64,
}

/// A JSON object with its fields in the order of the systems.
pub struct Ordered<'a, T>(pub Vec<(&'a str, T)>);

impl<T: Serialize> Serialize for Ordered<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// The last line of `--score-only`.
#[derive(Serialize)]
pub struct CorpusOnly {
    pub corpus: CorpusScores,
}
