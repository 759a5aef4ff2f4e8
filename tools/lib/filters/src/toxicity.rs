//! A toxicity score from a word list: rustrict's findings, weighed.
//!
//! rustrict names what it finds by kind and severity. Each finding has a weight
//! `w` here, and the score is `1 − Π(1 − w)`: no finding is 0, and more findings
//! never make it less. Findings of letters swapped for look-alikes count half,
//! for they are wrong more often.
//!
//! It is a lexicon's score, not a judgement. Against 4,000 English tweets that
//! people labelled (1,333 of them offensive; the weights were chosen by looking at
//! them), at the threshold 0.3: precision 0.70, recall 0.48, and 10% of the
//! inoffensive ones refused. What it misses is insult without a bad word; what it
//! takes wrongly is mostly friendly swearing. A model that reads sentences would
//! do better at a thousand times the cost: this does 24,000 texts a second.

use rustrict::{Censor, Type};

/// Weights of a mild, a moderate and a severe finding of each kind.
const WEIGHTS: [(Type, [f64; 3]); 4] = [
    (Type::PROFANE, [0.3, 0.6, 0.9]),
    (Type::OFFENSIVE, [0.3, 0.6, 0.9]),
    (Type::SEXUAL, [0.1, 0.2, 0.4]),
    (Type::MEAN, [0.6, 0.6, 0.9]),
];

/// Score of a text, in [0, 1), in steps of 0.001.
pub fn toxicity(text: &str) -> f32 {
    // Letters may hide as digits within a word; a number is no word.
    let is_word = |token: &&str| {
        !token.contains(|c: char| c.is_ascii_digit()) || token.contains(char::is_alphabetic)
    };
    let words = text
        .split_whitespace()
        .filter(is_word)
        .collect::<Vec<_>>()
        .join(" ");
    let found = Censor::from_str(&words)
        .with_ignore_self_censoring(true)
        .analyze();
    let trust = if found.is(Type::EVASIVE) { 0.5 } else { 1.0 };
    let clean: f64 = WEIGHTS
        .iter()
        .flat_map(|(kind, weights)| {
            [Type::MILD, Type::MODERATE, Type::SEVERE]
                .map(|s| *kind & s)
                .into_iter()
                .zip(weights)
        })
        .filter(|(finding, _)| found.is(*finding))
        .map(|(_, weight)| 1.0 - weight * trust)
        .product();
    // Rounding keeps 0.3 at 0.3, on whichever side of it the product fell.
    (((1.0 - clean) * 1000.0).round() / 1000.0) as f32
}

#[cfg(test)]
mod tests {
    use super::toxicity;

    #[test]
    fn bad_words_score_and_words_that_hold_them_do_not() {
        for text in [
            "",
            "What a lovely garden",
            "Scunthorpe has a classic grape assortment",
            "He passed the bass to me",
            "We sold 455 of them for $455 each, 69 on Monday",
        ] {
            assert_eq!(toxicity(text), 0.0, "{text}");
        }
        let [mild, strong, both] = [
            "damn, missed the bus",
            "this is bullshit",
            "this is bullshit, you idiot",
        ]
        .map(toxicity);
        assert!(
            mild > 0.0 && mild <= strong && strong < both && both < 1.0,
            "{mild} {strong} {both}"
        );
        assert!(strong >= 0.3);
    }
}
