//! What pair-validate and pair-dedup say of a pair.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is added, as `validation`, to a pair that passed every filter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Version of this object.
    pub v: u64,
    /// Language of the reply, ISO 639-1; `und` where it has too few letters to tell.
    pub language: String,
    /// Unicode scalars of the tweet after NFC, leading @names left out.
    pub tweet_length: usize,
    /// The same of the reply.
    pub reply_length: usize,
    /// Lexicon score of the tweet, 0 to 1.
    pub tweet_toxicity: f64,
    /// Lexicon score of the reply, 0 to 1.
    pub reply_toxicity: f64,
    /// See [`quality`].
    pub quality: f64,
}

/// What a stage did to the pairs, as it is written beside them and into a model card.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Version of this object.
    pub v: u64,
    /// The tool.
    pub tool: String,
    /// Lines read.
    #[serde(rename = "in")]
    pub read: u64,
    /// Pairs written.
    #[serde(rename = "out")]
    pub written: u64,
    /// Pairs refused or dropped.
    pub rejected: u64,
    /// Malformed lines passed over.
    pub bad_lines: u64,
    /// Refusals by reason; a pair can have several.
    pub reasons: BTreeMap<String, u64>,
    /// `key = value` lines of the settings it worked by.
    #[serde(default)]
    pub settings: Vec<String>,
    /// What its figures depend on.
    pub signature: String,
}

/// How good an example a reply is, 0 to 1: what decides which of two near pairs
/// stays, and the order of the data set.
///
/// `(0.7·liked + 0.3·standing) · (1 − toxicity)`, where `liked` is
/// `ln(1+likes) / (ln(1+likes) + ln 51)`, so one half at 50 likes, and `standing`
/// is `likes / (likes + √followers)`, so one half where a reply has as many likes
/// as the square root of its author's audience. An unknown figure adds nothing.
/// Rounded to 6 digits, past which logarithms differ between machines.
pub fn quality(reply_likes: Option<u64>, followers: Option<u64>, toxicity: f64) -> f64 {
    let likes = reply_likes.unwrap_or(0) as f64;
    let liked = likes.ln_1p() / (likes.ln_1p() + 51f64.ln());
    let standing = match followers {
        Some(followers) if likes > 0.0 => likes / (likes + (followers as f64).sqrt()),
        _ => 0.0,
    };
    let quality = (0.7 * liked + 0.3 * standing) * (1.0 - toxicity);
    (quality * 1e6).round() / 1e6
}

/// What is added, as `dropped`, to a pair that said what a better one says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// The tool that dropped it.
    pub by: String,
    /// In what way the two are the same.
    pub reason: Duplicate,
    /// `id` of the pair that stayed in its stead.
    pub keeper: String,
    /// Cosine of the two tweets, for a semantic duplicate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tweet_cosine: Option<f64>,
    /// Cosine of the two replies, for a semantic duplicate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_cosine: Option<f64>,
}

/// In what way a pair is a duplicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Duplicate {
    /// Both texts are the same once normalised and case-folded.
    Exact,
    /// Both texts are near by cosine.
    Semantic,
    /// Another reading of the pair with the same id.
    Id,
}

impl Duplicate {
    /// As records and summaries spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Semantic => "semantic",
            Self::Id => "id",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::quality;

    #[test]
    fn quality_has_the_halves_that_its_formula_names() {
        assert_eq!(quality(None, None, 0.0), 0.0);
        assert_eq!(quality(Some(0), Some(0), 0.0), 0.0);
        assert_eq!(quality(Some(50), None, 0.0), 0.35);
        assert_eq!(quality(Some(50), Some(2500), 0.0), 0.5);
        assert_eq!(quality(Some(50), Some(2500), 0.2), 0.4);
        let few_followers = quality(Some(20), Some(100), 0.0);
        assert!(
            few_followers > quality(Some(20), Some(100_000), 0.0),
            "the same likes weigh more in a small room"
        );
        assert!((0.9..1.0).contains(&quality(Some(u64::MAX), Some(1), 0.0)));
    }
}
