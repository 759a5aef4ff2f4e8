//! A pair with what its record says beside the texts.

use record::{Pair, Record};
use serde_json::Value;

/// What the filters look at.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The pair itself.
    pub pair: Pair,
    /// Whether the tweet comes with a picture or a video.
    pub tweet_media: bool,
    /// The same of the reply.
    pub reply_media: bool,
    /// How many replies the tweet has, where the source says so.
    pub tweet_replies: Option<u64>,
    /// Whether the source says that the tweet passes on another's text.
    pub tweet_is_retweet: bool,
    /// Whether the source says that the tweet quotes another.
    pub tweet_is_quote: bool,
}

impl Candidate {
    /// Reads the fields of [`Pair`], `tweet_media` and `reply_media` (a count, a
    /// list or a yes), `tweet_replies`, `tweet_is_retweet` and `tweet_is_quote`. The
    /// error is a record that is no pair.
    pub fn of(record: &Record) -> Result<Self, record::Error> {
        Ok(Self {
            pair: record.pair()?,
            tweet_media: is_yes(record, "tweet_media")?,
            reply_media: is_yes(record, "reply_media")?,
            tweet_replies: record.count("tweet_replies")?,
            tweet_is_retweet: is_yes(record, "tweet_is_retweet")?,
            tweet_is_quote: is_yes(record, "tweet_is_quote")?,
        })
    }
}

/// Whether a field says yes: with `true`, a count, or what there is of something. CSV
/// exports write all of it as text, see [`says_yes`].
fn is_yes(record: &Record, key: &str) -> Result<bool, record::Error> {
    Ok(match record.get::<Value>(key)? {
        Some(Value::Bool(yes)) => yes,
        Some(Value::Number(count)) => count.as_f64() != Some(0.0),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(kinds)) => !kinds.is_empty(),
        Some(Value::String(text)) => says_yes(&text),
        Some(Value::Null) | None => false,
    })
}

/// Whether a cell of a table says yes: it is not empty, and no 0, false, none or empty list
/// by any of the names that Python and spreadsheets write for them.
pub fn says_yes(cell: &str) -> bool {
    let cell = cell.trim().to_lowercase();
    match cell.parse::<f64>() {
        // `nan` is a number here, and what pandas writes where there is nothing.
        Ok(number) => number != 0.0 && !number.is_nan(),
        Err(_) => !matches!(
            cell.as_str(),
            "" | "[]" | "{}" | "false" | "none" | "null" | "n/a" | "<na>"
        ),
    }
}
