//! The offline judge: nearness to the reply that people liked. It measures likeness, not
//! quality, and is there so that the pipeline can be seen at work without a key.
//!
//! chrF alone would measure length: of two replies that have nothing to do with the liked one
//! it prefers the longer, and with recall weighed otherwise another length. So a reply's chrF to
//! the liked reply is not held against the other reply's, but against its own chrF to what
//! people liked under other tweets, all of them without how they were typed, which pair-dedup
//! takes off a liked reply too. The share of those that it is less near to is uniform for
//! a reply that has nothing to do with the tweet, however long it is and in whatever manner it
//! is written: the liked reply is then one more of the same kind.
//! What all liked replies share, their manner, counts for nothing either: this judge hears
//! whether a reply is to the point of its tweet, and not how it sounds.

use std::cmp::Ordering;

use textmetrics::{ChrfKind, ChrfStats};

use crate::verdict::{Comparison, Item, Opinion, Preference, Usage};

/// As records and reports name it.
pub const NAME: &str = "reference-chrf-rank";

/// Liked replies of other tweets that a reply is held against, at most: the share is then known
/// to 1/64, and judging 1,000 items takes seconds.
const OTHERS: usize = 64;

/// What was asked and the reply that people liked, normalised, of every item.
pub struct Liked(Vec<(String, String)>);

impl Liked {
    /// In the order of the items.
    pub fn of<'a>(items: impl Iterator<Item = &'a Item>) -> Self {
        Self(
            items
                .map(|item| (item.tweet.clone(), text::normalize(&item.reference)))
                .collect(),
        )
    }

    /// The liked replies under other tweets than that of item `at`: evenly spread over the
    /// input, so that the same input has the same verdicts.
    pub fn others(&self, at: usize) -> Vec<&str> {
        let (tweet, _) = &self.0[at];
        let (before, after) = self.0.split_at(at);
        // Another reply to the same tweet is no matter of chance.
        let others: Vec<&str> = (after.iter().chain(before))
            .filter(|(other, _)| other != tweet)
            .map(|(_, reference)| reference.as_str())
            .collect();
        let count = others.len().min(OTHERS);
        (0..count)
            .map(|i| others[i * others.len() / count])
            .collect()
    }
}

/// Prefers the reply that is nearer to the liked one than to more of the `others`; where they
/// are equal in that, as where both are to the point, the nearer one. It has no sense of order,
/// so both orders agree by construction; without others it has no verdict.
pub fn compare(item: &Item, a: &str, b: &str, others: &[&str]) -> Comparison {
    let (reply_a, reply_b) = (&item.replies[a], &item.replies[b]);
    if reply_a == reply_b {
        return Comparison::identical(a, b);
    }
    let (of_a, of_b) = (
        Nearness::of(reply_a, &item.reference, others),
        Nearness::of(reply_b, &item.reference, others),
    );
    let opinion = |first: Nearness, second: Nearness| Opinion {
        preference: (!others.is_empty()).then(|| match first.over(second) {
            Ordering::Greater => Preference::A,
            Ordering::Less => Preference::B,
            Ordering::Equal => Preference::Tie,
        }),
        why: (!others.is_empty()).then(|| {
            format!(
                "chrF {:.2} and {:.2}; nearer than to {} and {} of {} replies liked elsewhere",
                first.chrf,
                second.chrf,
                first.rank,
                second.rank,
                others.len()
            )
        }),
        no_verdict: (others.is_empty()).then(|| "no other tweet to hold it against".into()),
        usage: Usage::default(),
        usage_estimated: false,
    };
    Comparison::of(a, b, opinion(of_a, of_b), opinion(of_b, of_a))
}

/// How near a reply is to the liked one.
#[derive(Clone, Copy)]
struct Nearness {
    /// How many of the others it is less near to; as near counts half.
    rank: f64,
    chrf: f64,
}

impl Nearness {
    fn of(reply: &str, liked: &str, others: &[&str]) -> Self {
        let reply = text::normalize(reply);
        let near = |to: &str| ChrfStats::new(&reply, to).score(ChrfKind::Chrf);
        let chrf = near(&text::normalize(liked));
        let points = |other: &&str| match near(other).total_cmp(&chrf) {
            Ordering::Less => 1.0,
            Ordering::Equal => 0.5,
            Ordering::Greater => 0.0,
        };
        let rank = others.iter().map(points).sum();
        Self { rank, chrf }
    }

    fn over(self, other: Self) -> Ordering {
        let by_rank = self.rank.total_cmp(&other.rank);
        by_rank.then(self.chrf.total_cmp(&other.chrf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn liked(tweets: impl Iterator<Item = &'static str>) -> Liked {
        Liked(
            tweets
                .zip(0..)
                .map(|(tweet, n)| (tweet.into(), format!("{tweet}{n}")))
                .collect(),
        )
    }

    #[test]
    fn others_are_of_other_tweets_however_rare_those_are() {
        let one = liked(std::iter::repeat_n("a", 256).chain(["b"]));
        for at in [0, 1, 100, 255] {
            assert_eq!(one.others(at), ["b256"], "{at}");
        }
        assert_eq!(one.others(256).len(), OTHERS);
        let two = liked(["a", "b"].into_iter().cycle().take(129));
        for at in 0..129 {
            let others = two.others(at);
            assert_eq!(others.len(), OTHERS, "{at}");
            let other = ["b", "a"][at % 2];
            assert!(others.iter().all(|text| text.starts_with(other)), "{at}");
            let mut distinct = others.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), OTHERS, "each once");
        }
        assert!(liked(["a", "a"].into_iter()).others(0).is_empty());
    }
}
