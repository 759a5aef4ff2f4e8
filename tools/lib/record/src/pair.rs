//! A tweet, a reply to it, and what the stages say of the two.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize};

use crate::{Error, Record};

/// The fields of a pair that every stage reads. Figures are optional, since no
/// source gives all of them; the texts are not.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Stable name of the pair: `id`, else `TWEET_ID-REPLY_ID`.
    pub id: String,
    /// The thread it belongs to: `conversation_id`, else `tweet_id`, else `id`.
    pub conversation_id: String,
    /// The tweet's id.
    pub tweet_id: Option<String>,
    /// The tweet's text.
    pub tweet: String,
    /// How many people liked the tweet.
    pub tweet_likes: Option<u64>,
    /// The reply's id.
    pub reply_id: Option<String>,
    /// The reply's text.
    pub reply: String,
    /// How many people liked the reply.
    pub reply_likes: Option<u64>,
    /// How many people follow the reply's author.
    pub reply_author_followers: Option<u64>,
}

impl Pair {
    pub(crate) fn of(record: &Record) -> Result<Self, Error> {
        let tweet_id = record.id("tweet_id")?;
        let reply_id = record.id("reply_id")?;
        let id = match (record.id("id")?, &tweet_id, &reply_id) {
            (Some(id), ..) => id,
            (None, Some(tweet), Some(reply)) => format!("{tweet}-{reply}"),
            (None, ..) => return Err(Error::NoId),
        };
        Ok(Self {
            conversation_id: record
                .id("conversation_id")?
                .or_else(|| tweet_id.clone())
                .unwrap_or_else(|| id.clone()),
            id,
            tweet_id,
            tweet: record.require("tweet")?,
            tweet_likes: record.count("tweet_likes")?,
            reply_id,
            reply: record.require("reply")?,
            reply_likes: record.count("reply_likes")?,
            reply_author_followers: record.count("reply_author_followers")?,
        })
    }

    /// Adds `v`, `id` and `conversation_id` to a record that lacks them.
    pub fn identify(&self, record: &mut Record) -> Result<(), Error> {
        record.set_default("v", &crate::VERSION)?;
        record.set_default("id", &self.id)?;
        record.set_default("conversation_id", &self.conversation_id)
    }
}

/// Which side of the train/eval cut a pair is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Seen in training.
    Train,
    /// Held out.
    Eval,
}

/// Why a filter refused a record: a stable machine name and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stable name, such as `reply_too_short`.
    pub filter: String,
    /// What was found and what was allowed.
    pub detail: String,
}

/// What is added, as `rejected`, to a record that a filter refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rejected {
    /// The tool that refused it.
    pub by: String,
    /// Every filter that refused it, in the order they ran.
    pub reasons: Vec<Reason>,
}

/// A malformed line as it stands in a rejects file (`--max-bad-lines`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BadLine {
    /// The tool that refused it.
    pub by: String,
    /// The file it came from; `-` is standard input.
    pub file: String,
    /// The line's number, counted from 1.
    pub line: u64,
    /// What was wrong with it.
    pub error: String,
    /// The line itself without its end; bytes that are not UTF-8 stand as U+FFFD.
    pub raw: String,
    /// The same bytes in base64 (RFC 4648, padded), of a line that is not UTF-8: from `raw`
    /// they do not come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_base64: Option<String>,
}

impl BadLine {
    /// Line `line` of `file`, which `by` refused for `error`; `raw` are its bytes without
    /// its end.
    pub fn new(by: &str, file: String, line: u64, error: String, raw: Vec<u8>) -> Self {
        let (raw, raw_base64) = match String::from_utf8(raw) {
            Ok(text) => (text, None),
            Err(no_text) => (
                String::from_utf8_lossy(no_text.as_bytes()).into_owned(),
                Some(STANDARD.encode(no_text.as_bytes())),
            ),
        };
        Self {
            by: by.to_owned(),
            file,
            line,
            error,
            raw,
            raw_base64,
        }
    }
}

/// Counts records by each reason they were refused for.
pub fn count_by_reason<'a>(
    reasons: impl IntoIterator<Item = &'a Reason>,
    counts: &mut BTreeMap<String, u64>,
) {
    for reason in reasons {
        *counts.entry(reason.filter.clone()).or_default() += 1;
    }
}

/// Reads an id that some exports write as a number and some as a string.
/// Numbers are taken digit by digit: no id goes through a float.
pub fn text_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    TextId::deserialize(deserializer).map(|id| id.0)
}

/// Reads a figure: a whole number. `102.0` is one too, since table tools write the
/// figures of a column with gaps as floats.
pub fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Count::deserialize(deserializer).map(|count| count.0)
}

pub(crate) struct Count(pub(crate) u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyCount;
        impl Visitor<'_> for AnyCount {
            type Value = Count;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a whole number that is not negative")
            }
            fn visit_u64<E>(self, n: u64) -> Result<Count, E> {
                Ok(Count(n))
            }
            fn visit_f64<E: serde::de::Error>(self, n: f64) -> Result<Count, E> {
                if n >= 0.0 && n.fract() == 0.0 && n < 9e15 {
                    Ok(Count(n as u64))
                } else {
                    Err(E::invalid_value(serde::de::Unexpected::Float(n), &self))
                }
            }
        }
        deserializer.deserialize_any(AnyCount)
    }
}

pub(crate) struct TextId(pub(crate) String);

impl<'de> Deserialize<'de> for TextId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyId;
        impl Visitor<'_> for AnyId {
            type Value = TextId;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an id: a string or a whole number")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TextId, E> {
                if text.is_empty() {
                    Err(E::custom("an id is empty"))
                } else {
                    Ok(TextId(text.to_owned()))
                }
            }
            fn visit_u64<E>(self, id: u64) -> Result<TextId, E> {
                Ok(TextId(id.to_string()))
            }
            fn visit_i64<E: serde::de::Error>(self, id: i64) -> Result<TextId, E> {
                Err(E::custom(format_args!("id {id} is negative")))
            }
            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<TextId, E> {
                Err(E::custom(
                    "an id came as a float and has lost digits; export ids as strings",
                ))
            }
        }
        let id = deserializer.deserialize_any(AnyId)?;
        if id.0.chars().any(char::is_control) {
            return Err(D::Error::custom("an id holds a control character"));
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::Record;

    #[test]
    fn ids_come_as_text_or_as_numbers() {
        let pair = |line: &str| Record::parse(line).unwrap().pair();
        let a = pair(r#"{"tweet_id":1790000000000000001,"tweet":"t","reply_id":"9","reply":"r"}"#)
            .unwrap();
        assert_eq!(
            (a.id.as_str(), a.conversation_id.as_str()),
            ("1790000000000000001-9", "1790000000000000001")
        );
        assert!(
            pair(r#"{"tweet":"t","reply":"r"}"#)
                .unwrap_err()
                .to_string()
                .contains("`id`")
        );
        assert!(pair(r#"{"tweet_id":1e18,"tweet":"t","reply_id":"9","reply":"r"}"#).is_err());
        assert!(
            pair(r#"{"id":"a","reply":"r"}"#)
                .unwrap_err()
                .to_string()
                .contains("`tweet` is missing")
        );
    }

    #[test]
    fn figures_are_whole_numbers_however_they_are_written() {
        let likes = |likes: &str| {
            let line = format!(r#"{{"id":"a","tweet":"t","reply":"r","tweet_likes":{likes}}}"#);
            Record::parse(&line).unwrap().pair().map(|p| p.tweet_likes)
        };
        assert_eq!(likes("102").unwrap(), Some(102));
        assert_eq!(likes("102.0").unwrap(), Some(102));
        assert_eq!(likes("null").unwrap(), None);
        for odd in ["1.5", "-1", "-1.0", "1e300", "\"7\"", "true"] {
            let error = likes(odd).unwrap_err().to_string();
            assert!(error.starts_with("key `tweet_likes`: "), "{odd}: {error}");
        }
    }
}
