//! Items to judge, and what a judge says of them.
//!
//! A preference counts only where it survives swapping the two replies: a judge that
//! likes whatever comes first would otherwise decide the figures.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use record::Record;
use serde::{Deserialize, Deserializer, Serialize};

/// One line of gen-eval: a tweet and what several systems replied.
#[derive(Clone, Debug)]
pub struct Item {
    pub tweet: String,
    /// The reply that people liked.
    pub reference: String,
    /// Replies by system, in the item's order.
    pub replies: IndexMap<String, String>,
}

#[derive(Deserialize)]
struct System {
    prediction: String,
    #[serde(default, rename = "nll", deserialize_with = "a_number")]
    _nll: (),
}

/// The loss is not judged by; but a system that has none said nothing worth judging.
fn a_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    match Option::<f64>::deserialize(deserializer)? {
        Some(_) => Ok(()),
        None => Err(serde::de::Error::custom(
            "`nll` is null: the model that replied computed no numbers; run gen-eval again",
        )),
    }
}

impl Item {
    /// # Errors
    /// Fields that are missing or hold something else; a system named like an outcome.
    pub fn of(record: &Record) -> Result<Self, record::Error> {
        let systems: IndexMap<String, System> = record.require("systems")?;
        if let Some(name) = [TIE, NO_VERDICT, "none"]
            .into_iter()
            .find(|name| systems.contains_key(*name))
        {
            return Err(record::Error::Field {
                key: "systems".into(),
                cause: format!("a system may not be named `{name}`, which is an outcome"),
            });
        }
        Ok(Self {
            tweet: record.require("tweet")?,
            reference: record.require("reference")?,
            replies: systems
                .into_iter()
                .map(|(name, system)| (name, system.prediction))
                .collect(),
        })
    }

    /// The pairs to compare: those asked for, else the first two systems.
    ///
    /// # Errors
    /// A system that this item does not have.
    pub fn pairs(
        &self,
        asked: &[(String, String)],
    ) -> Result<Vec<(String, String)>, record::Error> {
        let names: Vec<&String> = self.replies.keys().collect();
        let lacking = |cause: String| record::Error::Field {
            key: "systems".into(),
            cause,
        };
        let has = names
            .iter()
            .map(|n| n.as_str())
            .collect::<Vec<_>>()
            .join(", ");
        if asked.is_empty() {
            return match names[..] {
                [a, b, ..] => Ok(vec![(a.clone(), b.clone())]),
                _ => Err(lacking(format!(
                    "two systems are needed to compare, here: {has}"
                ))),
            };
        }
        for name in asked.iter().flat_map(|(a, b)| [a, b]) {
            if !self.replies.contains_key(name) {
                return Err(lacking(format!("no system `{name}`, here: {has}")));
            }
        }
        Ok(asked.to_vec())
    }
}

/// What a judge prefers, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preference {
    A,
    B,
    Tie,
}

/// What came of asking once.
#[derive(Clone, Debug, Serialize)]
pub struct Opinion {
    /// `None` where there is no verdict; `why` then says why not.
    #[serde(skip)]
    pub preference: Option<Preference>,
    /// The judge's own reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What kept it from a verdict: a refusal, too few tokens, an unreadable answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_verdict: Option<String>,
    /// What the answer cost.
    #[serde(skip_serializing_if = "Usage::is_none")]
    pub usage: Usage,
    /// The answer does not say; `usage` is what it may have cost at most.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub usage_estimated: bool,
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub cache_creation_input_tokens: u64,
    pub cache_read_input_tokens: u64,
}

impl Usage {
    /// Tokens read, with or without a cache.
    pub fn read(&self) -> u64 {
        (self.input_tokens)
            .saturating_add(self.cache_creation_input_tokens)
            .saturating_add(self.cache_read_input_tokens)
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        // Counts are what the service wrote, however large.
        let add = |sum: &mut u64, more| *sum = sum.saturating_add(more);
        add(&mut self.input_tokens, other.input_tokens);
        add(&mut self.output_tokens, other.output_tokens);
        add(
            &mut self.cache_creation_input_tokens,
            other.cache_creation_input_tokens,
        );
        add(
            &mut self.cache_read_input_tokens,
            other.cache_read_input_tokens,
        );
    }
}

/// One order of a pair.
#[derive(Clone, Debug, Serialize)]
pub struct Order {
    /// The system shown as A.
    pub first: String,
    /// The system preferred, or `tie`; null without a verdict.
    pub preferred: Option<String>,
    #[serde(flatten)]
    pub opinion: Opinion,
}

/// Two systems compared on one item.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub a: String,
    pub b: String,
    /// The system that both orders prefer; `tie` where they do not agree on one; null
    /// where an order has no verdict.
    pub winner: Option<String>,
    /// The orders came out differently.
    pub flipped: bool,
    /// 1 for the winner, 0 for the loser, 0.5 each for a tie; null without a verdict.
    pub score: BTreeMap<String, Option<f64>>,
    /// Where nobody had to be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<&'static str>,
    pub orders: Vec<Order>,
}

/// What is added to an item as `verdicts`.
#[derive(Clone, Debug, Serialize)]
pub struct Verdicts {
    pub v: u64,
    /// `reference-chrf-rank`, or the model.
    pub judge: String,
    /// That of the first comparison.
    pub winner: Option<String>,
    /// That of the first comparison, for `sigtest --a verdicts.score.NAME`.
    pub score: BTreeMap<String, Option<f64>>,
    /// Those of all, by `A:B`, for `sigtest --a verdicts.scores.A:B.NAME`.
    pub scores: IndexMap<String, BTreeMap<String, Option<f64>>>,
    pub comparisons: Vec<Comparison>,
    #[serde(skip_serializing_if = "Usage::is_none")]
    pub usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    pub signature: String,
}

impl Verdicts {
    /// Sums up; what the answers cost is the asker's to add.
    pub fn new(judge: &str, comparisons: Vec<Comparison>, signature: &str) -> Self {
        let mut usage = Usage::default();
        for order in comparisons.iter().flat_map(|comparison| &comparison.orders) {
            usage += order.opinion.usage;
        }
        let first = comparisons.first();
        Self {
            v: record::VERSION,
            judge: judge.to_owned(),
            winner: first.and_then(|c| c.winner.clone()),
            score: first.map(|c| c.score.clone()).unwrap_or_default(),
            scores: comparisons
                .iter()
                .map(|c| (c.pair(), c.score.clone()))
                .collect(),
            comparisons,
            usage,
            cost_usd: None,
            signature: signature.to_owned(),
        }
    }
}

/// The name of a tie.
pub const TIE: &str = "tie";
/// What is counted where there is no verdict.
const NO_VERDICT: &str = "no_verdict";

impl Comparison {
    /// Both replies are the same: a tie that needs no judge.
    pub fn identical(a: &str, b: &str) -> Self {
        let mut tie = Self::combine(a, b, Vec::new());
        tie.because = Some("identical replies");
        tie
    }

    /// `A:B`
    fn pair(&self) -> String {
        format!("{}:{}", self.a, self.b)
    }

    /// Combines `a` shown first and `b` shown first.
    pub fn of(a: &str, b: &str, a_first: Opinion, b_first: Opinion) -> Self {
        let order = |first: &str, second: &str, opinion: Opinion| {
            let preferred = opinion.preference.map(|preference| match preference {
                Preference::A => first.to_owned(),
                Preference::B => second.to_owned(),
                Preference::Tie => TIE.to_owned(),
            });
            Order {
                first: first.to_owned(),
                preferred,
                opinion,
            }
        };
        Self::combine(a, b, vec![order(a, b, a_first), order(b, a, b_first)])
    }

    fn combine(a: &str, b: &str, orders: Vec<Order>) -> Self {
        let preferred: Option<Vec<&str>> = orders.iter().map(|o| o.preferred.as_deref()).collect();
        let (winner, flipped) = match preferred.as_deref() {
            None => (None, false),
            Some([one, other]) if one != other => (Some(TIE.to_owned()), true),
            Some([both, ..]) => (Some((*both).to_owned()), false),
            Some([]) => (Some(TIE.to_owned()), false),
        };
        let points = |name: &str| {
            winner.as_deref().map(|winner| match winner {
                TIE => 0.5,
                winner if winner == name => 1.0,
                _ => 0.0,
            })
        };
        let score = [a, b].map(|name| (name.to_owned(), points(name))).into();
        Self {
            a: a.to_owned(),
            b: b.to_owned(),
            winner,
            flipped,
            score,
            because: None,
            orders,
        }
    }
}

/// Outcomes counted over all items, by comparison.
#[derive(Debug, Default, Serialize)]
pub struct Tally {
    /// `A:B` → outcome → how often; outcomes are the systems' names, `tie`, and `no_verdict`.
    pub outcomes: IndexMap<String, IndexMap<String, u64>>,
    /// `A:B` → orders that disagreed.
    pub flipped: IndexMap<String, u64>,
}

impl Tally {
    pub fn add(&mut self, comparison: &Comparison) {
        let Comparison { a, b, winner, .. } = comparison;
        let pair = comparison.pair();
        *self.flipped.entry(pair.clone()).or_default() += u64::from(comparison.flipped);
        let counts = self.outcomes.entry(pair).or_insert_with(|| {
            [a, b, TIE, NO_VERDICT]
                .map(|outcome| (outcome.to_owned(), 0))
                .into_iter()
                .collect()
        });
        *counts
            .entry(winner.clone().unwrap_or_else(|| NO_VERDICT.into()))
            .or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opinion(preference: Option<Preference>) -> Opinion {
        Opinion {
            preference,
            why: None,
            no_verdict: None,
            usage: Usage::default(),
            usage_estimated: false,
        }
    }

    #[test]
    fn a_win_needs_both_orders() {
        use Preference::{A, B, Tie};
        let cases = [
            // What was preferred with x first, with y first → winner, flipped, x's score.
            (Some(A), Some(B), Some("x"), false, Some(1.0)),
            (Some(B), Some(A), Some("y"), false, Some(0.0)),
            (Some(A), Some(A), Some("tie"), true, Some(0.5)),
            (Some(B), Some(B), Some("tie"), true, Some(0.5)),
            (Some(A), Some(Tie), Some("tie"), true, Some(0.5)),
            (Some(Tie), Some(Tie), Some("tie"), false, Some(0.5)),
            (Some(A), None, None, false, None),
            (None, None, None, false, None),
        ];
        for (x_first, y_first, winner, flipped, score) in cases {
            let c = Comparison::of("x", "y", opinion(x_first), opinion(y_first));
            assert_eq!(
                (c.winner.as_deref(), c.flipped, c.score["x"]),
                (winner, flipped, score),
                "{x_first:?} {y_first:?}"
            );
            assert_eq!(c.score["y"], score.map(|s| 1.0 - s));
        }
    }
}
