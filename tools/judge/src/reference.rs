//! The offline judge: nearness to the reply that people liked. It measures likeness, not
//! quality, and is there so that the pipeline can be seen at work without a key.

use std::cmp::Ordering;

use textmetrics::{ChrfKind, ChrfStats};

use crate::verdict::{Comparison, Item, Opinion, Preference, Usage};

/// As records and reports name it.
pub const NAME: &str = "reference-chrf";

/// Prefers the reply with the higher chrF. It has no sense of order, so both orders agree
/// by construction.
pub fn compare(item: &Item, a: &str, b: &str) -> Comparison {
    let (reply_a, reply_b) = (&item.replies[a], &item.replies[b]);
    if reply_a == reply_b {
        return Comparison::identical(a, b);
    }
    let near = |reply: &str| ChrfStats::new(reply, &item.reference).score(ChrfKind::Chrf);
    let opinion = |first: f64, second: f64| Opinion {
        preference: Some(match first.total_cmp(&second) {
            Ordering::Greater => Preference::A,
            Ordering::Less => Preference::B,
            Ordering::Equal => Preference::Tie,
        }),
        why: Some(format!("chrF {first:.2} and {second:.2}")),
        no_verdict: None,
        usage: Usage::default(),
        usage_estimated: false,
    };
    let (near_a, near_b) = (near(reply_a), near(reply_b));
    Comparison::of(a, b, opinion(near_a, near_b), opinion(near_b, near_a))
}
