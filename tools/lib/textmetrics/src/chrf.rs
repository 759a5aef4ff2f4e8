//! chrF (Popović, 2015) and chrF++ (Popović, 2017) as sacrebleu computes them:
//! β = 2, white space left out of the character n-grams, effective order.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use crate::{VERSION, ngram, python};

const CHAR_ORDERS: usize = 6;
const WORD_ORDERS: usize = 2;
/// β² of the F score: recall weighs four times as much as precision.
const FACTOR: f64 = 4.0;

/// Which n-grams are scored; the statistics hold both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChrfKind {
    /// chrF2: characters, orders 1 to 6.
    Chrf,
    /// chrF2++: also words, orders 1 and 2.
    ChrfPlusPlus,
}

/// How often one order's n-grams occur and agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Matches {
    predicted: u64,
    reference: u64,
    shared: u64,
}

/// The sufficient statistics of chrF: add those of the segments, score the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChrfStats {
    /// Six character orders, then two word orders.
    orders: [Matches; CHAR_ORDERS + WORD_ORDERS],
}

impl ChrfStats {
    /// The statistics of one segment.
    pub fn new(prediction: &str, reference: &str) -> Self {
        let characters =
            |text: &str| -> Vec<char> { text.chars().filter(|&c| !python::is_space(c)).collect() };
        let chars = (characters(prediction), characters(reference));
        let words = (words(prediction), words(reference));
        Self {
            orders: std::array::from_fn(|i| match i.checked_sub(CHAR_ORDERS) {
                None => matches(&chars.0, &chars.1, i + 1),
                Some(word_order) => matches(&words.0, &words.1, word_order + 1),
            }),
        }
    }

    /// The score, 0 to 100: F₂ of precision and recall averaged over the orders
    /// that both sides are long enough to have.
    pub fn score(&self, kind: ChrfKind) -> f64 {
        let used = match kind {
            ChrfKind::Chrf => &self.orders[..CHAR_ORDERS],
            ChrfKind::ChrfPlusPlus => &self.orders[..],
        };
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for m in used.iter().filter(|m| m.predicted > 0 && m.reference > 0) {
            precision += m.shared as f64 / m.predicted as f64;
            recall += m.shared as f64 / m.reference as f64;
            orders += 1.0;
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        precision /= orders;
        recall /= orders;
        100.0 * ((1.0 + FACTOR) * precision * recall / (FACTOR * precision + recall))
    }
}

fn matches<T: std::hash::Hash + Eq>(prediction: &[T], reference: &[T], n: usize) -> Matches {
    let in_reference = ngram::total(reference.len(), n);
    Matches {
        // A prediction's n-grams count only where the reference has any of that order.
        predicted: if in_reference > 0 {
            ngram::total(prediction.len(), n)
        } else {
            0
        },
        reference: in_reference,
        shared: ngram::shared(prediction, reference, n),
    }
}

/// White-space words, with one ASCII punctuation mark split off the end or, failing
/// that, the front: `(hi)` gives `(hi` and `)`, as chrF++ has always done it.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for word in python::split(text) {
        let mut chars = word.char_indices();
        let (Some((_, first)), Some((last_at, last))) = (chars.next(), chars.next_back()) else {
            words.push(word); // a single character
            continue;
        };
        if last.is_ascii_punctuation() {
            words.extend([&word[..last_at], &word[last_at..]]);
        } else if first.is_ascii_punctuation() {
            words.extend([&word[..1], &word[1..]]);
        } else {
            words.push(word);
        }
    }
    words
}

impl AddAssign for ChrfStats {
    fn add_assign(&mut self, other: Self) {
        for (sum, m) in self.orders.iter_mut().zip(other.orders) {
            sum.predicted += m.predicted;
            sum.reference += m.reference;
            sum.shared += m.shared;
        }
    }
}

impl Add for ChrfStats {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl Sum for ChrfStats {
    fn sum<I: Iterator<Item = Self>>(segments: I) -> Self {
        segments.fold(Self::default(), Add::add)
    }
}

/// The signature to print beside a chrF, in sacrebleu's form.
pub fn chrf_signature(kind: ChrfKind) -> String {
    let word_orders = match kind {
        ChrfKind::Chrf => 0,
        ChrfKind::ChrfPlusPlus => WORD_ORDERS,
    };
    format!("nrefs:1|case:mixed|eff:yes|nc:{CHAR_ORDERS}|nw:{word_orders}|space:no|{VERSION}")
}
