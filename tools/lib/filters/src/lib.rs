//! The filters that decide whether a tweet→reply pair is kept, one typed reason
//! for each that says no.
//!
//! Fetching counts by them and validating applies them, so they live here once.
//! A pair is held against all filters, never only up to the first that refuses:
//! whoever tunes a threshold wants to know what else stands in the way.
//!
//! Lengths are Unicode scalars after NFC, without the @names in front; both texts
//! have limits of their own, 30 to 280 by default. A figure that the source does
//! not tell is refused where a least number is asked for, unless
//! `unknown_figures: accept`.

mod candidate;
mod filter;
mod language;
mod spam;
mod toxicity;

use std::fmt;

use record::{Reason, Validation, quality};
use settings::{Collection, UnknownFigures};

pub use candidate::{Candidate, says_yes};
pub use filter::{Filter, Side};
use language::{Detector, Verdict};
use text::bare;
use toxicity::toxicity;

/// Settings that no filter can work with.
#[derive(Debug, thiserror::Error)]
#[error("{key} {cause}")]
pub struct Error {
    /// The setting, dotted.
    pub key: String,
    /// What is wrong with it; goes on from the key.
    pub cause: String,
}

/// What the filters found.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Why the pair is refused; empty where it passes.
    pub reasons: Vec<Reason>,
    /// What is said of it where it passes.
    pub validation: Validation,
}

impl Checked {
    /// Whether every filter lets it pass.
    pub fn passes(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// The filters with their settings. Holds the language models, about 64 MB once
/// they have been asked; share one among threads.
pub struct Filters {
    settings: Collection,
    tweet_language: Detector,
    /// `None` where it is the tweet's.
    reply_language: Option<Detector>,
}

/// What the filters ask of one of the two texts.
struct Limits<'a> {
    side: Side,
    length: (usize, usize),
    min_likes: u64,
    exclude_urls: bool,
    exclude_media: bool,
    language: &'a Detector,
}

/// One of the two texts, and what the record says beside it.
struct Post<'a> {
    text: &'a str,
    likes: Option<u64>,
    media: bool,
}

/// What was measured on one text.
struct Measured {
    length: usize,
    toxicity: f64,
    language: String,
}

impl Filters {
    /// Refuses settings that make no sense, naming the key.
    pub fn new(settings: &Collection) -> Result<Self, Error> {
        let (tweet, reply) = (&settings.tweet_filters, &settings.reply_filters);
        let error = |key: &str, cause: String| Error {
            key: format!("collection.{key}"),
            cause,
        };
        let defaults = Collection::default();
        let (tweet_min, reply_min) = (
            defaults.tweet_filters.min_length,
            defaults.reply_filters.min_length,
        );
        for (side, min, max, default) in [
            (
                "tweet_filters",
                tweet.min_length,
                tweet.max_length,
                tweet_min,
            ),
            (
                "reply_filters",
                reply.min_length,
                reply.max_length,
                reply_min,
            ),
        ] {
            if min > max {
                // The one that was set is to blame.
                let (key, cause) = match min == default {
                    true => ("max_length", format!("is {max}, below min_length, {min}")),
                    false => ("min_length", format!("is {min}, above max_length, {max}")),
                };
                return Err(error(&format!("{side}.{key}"), cause));
            }
        }
        if !(0.0..=1.0).contains(&settings.quality.max_toxicity) {
            return Err(error(
                "quality.max_toxicity",
                format!("is {}; it must be in 0 to 1", settings.quality.max_toxicity),
            ));
        }
        let detector = |side: &str, code: &str| {
            Detector::new(code).ok_or_else(|| {
                error(
                    &format!("{side}.language"),
                    format!("is `{code}`, none of {}", Detector::known()),
                )
            })
        };
        Ok(Self {
            tweet_language: detector("tweet_filters", &tweet.language)?,
            reply_language: if reply.language == tweet.language {
                None
            } else {
                Some(detector("reply_filters", &reply.language)?)
            },
            settings: settings.clone(),
        })
    }

    /// Holds a pair against every filter.
    pub fn check(&self, candidate: &Candidate) -> Checked {
        let pair = &candidate.pair;
        let (for_tweet, for_reply) = (&self.settings.tweet_filters, &self.settings.reply_filters);
        let mut reasons = Vec::new();

        let (text, likes) = (pair.tweet.as_str(), pair.tweet_likes);
        let tweet = self.post(
            Post {
                text,
                likes,
                media: candidate.tweet_media,
            },
            Limits {
                side: Side::Tweet,
                length: (for_tweet.min_length, for_tweet.max_length),
                min_likes: for_tweet.min_likes,
                exclude_urls: for_tweet.exclude_urls,
                exclude_media: for_tweet.exclude_media,
                language: &self.tweet_language,
            },
            &mut reasons,
        );
        if for_tweet.exclude_retweets {
            if candidate.tweet_is_retweet || text.starts_with("RT @") {
                reasons.push(reason(Filter::Retweet, Side::Tweet, "passes on a tweet"));
            }
            if candidate.tweet_is_quote {
                reasons.push(reason(Filter::Quote, Side::Tweet, "quotes another tweet"));
            }
        }
        // Sources that do not count replies are common, and the pair is proof of one.
        if let Some(replies) = candidate.tweet_replies
            && replies < for_tweet.min_replies
        {
            reasons.push(at_least(
                Filter::FewReplies,
                Side::Tweet,
                replies,
                for_tweet.min_replies,
                "replies",
            ));
        }

        let (text, likes) = (pair.reply.as_str(), pair.reply_likes);
        let reply = self.post(
            Post {
                text,
                likes,
                media: candidate.reply_media,
            },
            Limits {
                side: Side::Reply,
                length: (for_reply.min_length, for_reply.max_length),
                min_likes: for_reply.min_likes,
                exclude_urls: for_reply.exclude_urls,
                exclude_media: for_reply.exclude_media,
                language: self.reply_language.as_ref().unwrap_or(&self.tweet_language),
            },
            &mut reasons,
        );
        self.figure(
            pair.reply_author_followers,
            for_reply.min_author_followers,
            Side::Reply,
            (Filter::FewFollowers, Filter::FollowersUnknown, "followers"),
            &mut reasons,
        );
        if bare(&pair.reply).to_lowercase() == bare(&pair.tweet).to_lowercase() {
            reasons.push(reason(Filter::Echo, Side::Reply, "says the tweet again"));
        }

        let toxic = tweet.toxicity.max(reply.toxicity);
        let validation = Validation {
            v: record::VERSION,
            language: reply.language,
            tweet_length: tweet.length,
            reply_length: reply.length,
            tweet_toxicity: tweet.toxicity,
            reply_toxicity: reply.toxicity,
            quality: quality(pair.reply_likes, pair.reply_author_followers, toxic),
        };
        Checked {
            reasons,
            validation,
        }
    }

    /// The filters that both texts go through.
    fn post(&self, post: Post<'_>, limits: Limits<'_>, reasons: &mut Vec<Reason>) -> Measured {
        let side = limits.side;
        let bare = bare(post.text);
        let length = bare.chars().count();
        let (least, most) = limits.length;
        if length < least {
            reasons.push(reason(
                Filter::TooShort,
                side,
                format_args!("{length} characters, at least {least}"),
            ));
        }
        if length > most {
            reasons.push(reason(
                Filter::TooLong,
                side,
                format_args!("{length} characters, at most {most}"),
            ));
        }
        self.figure(
            post.likes,
            limits.min_likes,
            side,
            (Filter::FewLikes, Filter::LikesUnknown, "likes"),
            reasons,
        );
        if limits.exclude_urls
            && let Some(link) = text::link(&bare)
        {
            reasons.push(reason(Filter::Url, side, format_args!("{link:?}")));
        }
        if limits.exclude_media {
            if post.media {
                reasons.push(reason(
                    Filter::Media,
                    side,
                    "comes with a picture or a video",
                ));
            } else if let Some(link) = text::media_link(&bare) {
                reasons.push(reason(Filter::Media, side, format_args!("{link:?}")));
            }
        }
        if self.settings.quality.exclude_spam
            && let Some(why) = spam::spam(&bare)
        {
            reasons.push(reason(Filter::Spam, side, why));
        }
        let language = match limits.language.judge(&bare) {
            Verdict::Wanted => limits.language.code().to_string(),
            Verdict::Unclear => "und".to_owned(),
            Verdict::Other(found) => {
                let wanted = limits.language.code();
                reasons.push(reason(
                    Filter::Language,
                    side,
                    format_args!("looks like {found}, wanted {wanted}"),
                ));
                found
            }
        };
        let toxicity = toxicity(&bare);
        let threshold = self.settings.quality.max_toxicity;
        if toxicity >= threshold {
            reasons.push(reason(
                Filter::Toxic,
                side,
                format_args!("scores {toxicity}, below {threshold} passes"),
            ));
        }
        if let Some(token) = text::special_token(post.text) {
            reasons.push(reason(
                Filter::SpecialToken,
                side,
                format_args!("{token:?}"),
            ));
        }
        Measured {
            length,
            toxicity,
            language,
        }
    }

    /// A least number, with the rule for figures that are not told.
    fn figure(
        &self,
        found: Option<u64>,
        least: u64,
        side: Side,
        (few, unknown, what): (Filter, Filter, &str),
        reasons: &mut Vec<Reason>,
    ) {
        match found {
            Some(found) if found < least => reasons.push(at_least(few, side, found, least, what)),
            None if least > 0
                && self.settings.quality.unknown_figures == UnknownFigures::Reject =>
            {
                reasons.push(reason(
                    unknown,
                    side,
                    format_args!("number of {what} not told, at least {least}"),
                ));
            }
            _ => {}
        }
    }
}

/// Characters of the longest piece of a word that rustrict and lingua are given: both take
/// time by the square of a word's length, and a line of 16 MiB may be one word. What stands
/// across a cut is not found; texts within the default limit of length are never cut.
const PIECE: usize = 500;

/// A word in pieces of at most [`PIECE`] characters; the word itself where it is no longer.
fn pieces(word: &str) -> impl Iterator<Item = &str> {
    let mut rest = word;
    std::iter::from_fn(move || {
        let end = rest
            .char_indices()
            .nth(PIECE)
            .map_or(rest.len(), |(at, _)| at);
        let (piece, after) = rest.split_at(end);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

fn reason(filter: Filter, side: Side, detail: impl fmt::Display) -> Reason {
    Reason {
        filter: filter.name(side),
        detail: detail.to_string(),
    }
}

fn at_least(filter: Filter, side: Side, found: u64, least: u64, what: &str) -> Reason {
    reason(
        filter,
        side,
        format_args!("{found} {what}, at least {least}"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use record::Record;
    use serde_json::{Value, json};
    use settings::Collection;

    use super::*;

    /// The names that refuse a good pair with some fields changed.
    fn reasons_with(settings: &Collection, changes: Value) -> Vec<String> {
        let mut fields = json!({
            "tweet_id": "1", "tweet": "We planted forty apple trees along the river this weekend", "tweet_likes": 150,
            "reply_id": "2", "reply": "@orchard Which kind did you choose, the early or the late ones?", "reply_likes": 9,
            "reply_author_followers": 300,
        });
        for (key, value) in changes.as_object().unwrap() {
            fields[key] = value.clone();
        }
        let record = Record::parse(&fields.to_string()).unwrap();
        let checked = Filters::new(settings)
            .unwrap()
            .check(&Candidate::of(&record).unwrap());
        checked.reasons.into_iter().map(|r| r.filter).collect()
    }

    #[test]
    fn each_filter_refuses_its_kind_and_nothing_else() {
        let settings = Collection::default();
        let long = "a garden is never quite done, ".repeat(10);
        for (changes, expected) in [
            (json!({}), &[][..]),
            (
                json!({"reply": "@a @b @c_with_a_long_name Good, yes"}),
                &["reply_too_short"],
            ),
            (json!({"tweet": "Good, yes"}), &["tweet_too_short"]),
            (json!({"reply": long}), &["reply_too_long"]),
            (json!({"tweet_likes": 99}), &["tweet_few_likes"]),
            (json!({"tweet_likes": null}), &["tweet_likes_unknown"]),
            (json!({"reply_likes": 4}), &["reply_few_likes"]),
            (
                json!({"reply_author_followers": 99}),
                &["reply_author_few_followers"],
            ),
            (
                json!({"reply_author_followers": null}),
                &["reply_author_followers_unknown"],
            ),
            (
                json!({"tweet": "RT @ann: we planted forty apple trees along the river"}),
                &["tweet_retweet"],
            ),
            (
                json!({"reply": "There is a list of the old kinds at https://example.org/apples"}),
                &["reply_url"],
            ),
            (json!({"reply_media": 1}), &["reply_media"]),
            (
                json!({"tweet_media": [{"type": "photo"}]}),
                &["tweet_media"],
            ),
            (json!({"tweet_media": 0, "reply_media": []}), &[]),
            (json!({"tweet_media": "0", "reply_media": "False"}), &[]),
            (
                json!({"tweet_media": "0.0", "reply_media": "nan", "tweet_is_quote": "None"}),
                &[],
            ),
            (json!({"tweet_media": " [] ", "reply_media": "NULL"}), &[]),
            (json!({"tweet_media": "2"}), &["tweet_media"]),
            (
                json!({"reply_media": "['https://pbs.example/1.jpg']"}),
                &["reply_media"],
            ),
            (json!({"tweet_is_retweet": true}), &["tweet_retweet"]),
            (json!({"tweet_is_quote": "True"}), &["tweet_quote"]),
            (json!({"tweet_is_quote": false, "tweet_replies": 3.0}), &[]),
            (
                json!({"reply": "WHICH KIND DID YOU CHOOSE, THE EARLY OR THE LATE?"}),
                &["reply_spam"],
            ),
            (
                json!({"reply": "we planted FORTY apple trees along the river this weekend"}),
                &["reply_echo"],
            ),
            (
                json!({"reply": "Welche Sorte habt ihr denn genommen, die frühe oder die späte?"}),
                &["reply_language"],
            ),
            (
                json!({"reply": "That is bullshit, and you know it as well as anyone here"}),
                &["reply_toxic"],
            ),
            (
                json!({"reply": "Which kind did you choose? <think> The early or the late?"}),
                &["reply_special_token"],
            ),
            (
                json!({"reply": "no", "reply_likes": 0, "tweet_likes": 0}),
                &["tweet_few_likes", "reply_too_short", "reply_few_likes"],
            ),
        ] {
            assert_eq!(
                reasons_with(&settings, changes.clone()),
                expected,
                "{changes}"
            );
        }
    }

    #[test]
    fn unknown_figures_pass_where_that_is_asked_for() {
        let mut settings = Collection::default();
        let unknown =
            || json!({"tweet_likes": null, "reply_likes": null, "reply_author_followers": null});
        settings.quality.unknown_figures = UnknownFigures::Accept;
        assert!(reasons_with(&settings, unknown()).is_empty());
        assert_eq!(
            reasons_with(&settings, json!({"reply_likes": 0})),
            ["reply_few_likes"],
            "a known one must do"
        );
        settings.quality.unknown_figures = UnknownFigures::Reject;
        settings.tweet_filters.min_likes = 0;
        settings.reply_filters.min_likes = 0;
        settings.reply_filters.min_author_followers = 0;
        assert!(
            reasons_with(&settings, unknown()).is_empty(),
            "nothing is asked for"
        );
    }

    #[test]
    fn lengths_are_scalars_after_nfc_at_both_ends() {
        let settings = Collection::default();
        let body = "Which kind did you choose now";
        assert_eq!(body.len(), 29);
        assert_eq!(
            reasons_with(&settings, json!({ "reply": body })),
            ["reply_too_short"]
        );
        assert_eq!(
            reasons_with(&settings, json!({ "reply": format!("{body}?") })),
            [""; 0]
        );
        // A decomposed letter is one scalar once composed.
        assert_eq!(
            reasons_with(
                &settings,
                json!({ "reply": format!("{}e\u{301}", &body[1..]) })
            ),
            ["reply_too_short"]
        );
        let long = format!(
            "{}.",
            "we grew apples, pears, plums and figs in our yard ".repeat(6)
        );
        let cut = |n| long.chars().take(n).collect::<String>();
        assert_eq!(
            reasons_with(&settings, json!({ "reply": cut(280) })),
            [""; 0]
        );
        assert_eq!(
            reasons_with(&settings, json!({ "reply": cut(281) + "s" })),
            ["reply_too_long"]
        );
    }

    #[test]
    fn words_without_end_are_looked_at_in_pieces() {
        for word in [
            "",
            "word",
            &"é".repeat(PIECE),
            &"é😀".repeat(PIECE),
            &"x".repeat(PIECE + 1),
        ] {
            let cut: Vec<&str> = pieces(word).collect();
            assert_eq!(cut.concat(), word);
            assert_eq!(cut.len(), word.chars().count().div_ceil(PIECE));
        }
        // The square of these lengths took minutes.
        for word in ["a".repeat(600_000), "<|".repeat(300_000)] {
            let begun = std::time::Instant::now();
            let reasons = reasons_with(&Collection::default(), json!({ "reply": word }));
            assert!(reasons.contains(&"reply_too_long".to_owned()));
            assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
        }
    }

    #[test]
    fn settings_that_make_no_sense_name_their_key() {
        let refused = |change: fn(&mut Collection)| {
            let mut settings = Collection::default();
            change(&mut settings);
            Filters::new(&settings).err().unwrap().to_string()
        };
        assert!(
            refused(|s| s.reply_filters.min_length = 300)
                .starts_with("collection.reply_filters.min_length is 300, above")
        );
        assert!(
            refused(|s| s.tweet_filters.max_length = 5)
                .starts_with("collection.tweet_filters.max_length is 5, below")
        );
        assert!(
            refused(|s| s.quality.max_toxicity = 3.0)
                .starts_with("collection.quality.max_toxicity is 3; ")
        );
        let language = refused(|s| s.tweet_filters.language = "klingon".into());
        assert!(
            language.contains("tweet_filters.language") && language.contains("en"),
            "{language}"
        );
    }
}
