//! One tweet as several exports write it.
//!
//! Every field but an id and a text is optional: exports change, and figures go
//! missing. CSV exports carry the same items flattened, every value a string; they
//! are folded back into objects before they come here, so one reader serves both.

use serde::Serialize;
use serde_json::{Number, Value};
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};

/// Who wrote a file, and so what its fields are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// A dataset of Apify's Tweet Scraper V2
    Apify,
    /// twscrape's JSON lines
    Twscrape,
    /// Pairs already: `tweet` and `reply` in one record
    Pairs,
}

/// What joining needs to know of a tweet, and what a pair says of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tweet {
    pub id: String,
    pub conversation_id: Option<String>,
    pub in_reply_to: Option<String>,
    pub is_reply: bool,
    pub is_retweet: bool,
    pub is_quote: bool,
    /// HTML entities undone.
    pub text: String,
    pub likes: Option<u64>,
    /// Replies that the source says there are.
    pub replies: Option<u64>,
    pub author_id: Option<String>,
    pub author_name: Option<String>,
    pub author_followers: Option<u64>,
    /// RFC 3339, UTC.
    pub created_at: Option<String>,
    pub lang: Option<String>,
    /// Pictures, videos and animations.
    pub media: u64,
    /// Links that are not media.
    pub urls: u64,
}

impl Dialect {
    /// The dialect of a record, where it can be told.
    pub fn sniff(item: &Value) -> Option<Self> {
        let text = |key: &str| item.get(key).is_some_and(Value::is_string);
        let any = |key: &str| item.get(key).is_some();
        if text("tweet") && text("reply") {
            Some(Self::Pairs)
        } else if any("rawContent") {
            Some(Self::Twscrape)
        } else if any("id") && (text("text") || text("fullText")) {
            Some(Self::Apify)
        } else {
            None
        }
    }

    /// The tweet in a record of this dialect; `None` for what carries no tweet, such as
    /// the placeholders that scrapers put where they found nothing.
    ///
    /// # Errors
    /// An id that is there but cannot be one.
    pub fn tweet(self, item: &Value) -> Result<Option<Tweet>, record::Error> {
        match self {
            Self::Apify => apify(item),
            Self::Twscrape => twscrape(item),
            Self::Pairs => Ok(None),
        }
    }
}

/// Tweet Scraper V2.
fn apify(item: &Value) -> Result<Option<Tweet>, record::Error> {
    let (Some(id), Some(text)) = (id_of(item, &["id"])?, text(item, &["fullText", "text"])) else {
        return Ok(None);
    };
    let in_reply_to = id_of(item, &["inReplyToId"])?;
    Ok(Some(Tweet {
        id,
        conversation_id: id_of(item, &["conversationId"])?,
        is_reply: flag(item, "isReply") || in_reply_to.is_some(),
        in_reply_to,
        is_retweet: flag(item, "isRetweet"),
        is_quote: flag(item, "isQuote"),
        text,
        likes: count(item, "/likeCount"),
        replies: count(item, "/replyCount"),
        author_id: id_of_at(item, "/author/id")?,
        author_name: string(item, "/author/userName"),
        author_followers: count(item, "/author/followers"),
        created_at: string(item, "/createdAt").and_then(|t| moment(&t)),
        lang: string(item, "/lang"),
        media: length(item, "/media")
            .max(length(item, "/extendedEntities/media"))
            .max(listed(item, "/extendedEntities")),
        urls: length(item, "/entities/urls"),
    }))
}

/// twscrape 0.20.
fn twscrape(item: &Value) -> Result<Option<Tweet>, record::Error> {
    let (Some(id), Some(text)) = (id_of(item, &["id_str", "id"])?, text(item, &["rawContent"]))
    else {
        return Ok(None);
    };
    let in_reply_to = id_of(item, &["inReplyToTweetIdStr", "inReplyToTweetId"])?;
    let kinds = ["/media/photos", "/media/videos", "/media/animated"];
    let author_id = match id_of_at(item, "/user/id_str")? {
        Some(id) => Some(id),
        None => id_of_at(item, "/user/id")?,
    };
    Ok(Some(Tweet {
        id,
        conversation_id: id_of(item, &["conversationIdStr", "conversationId"])?,
        is_reply: in_reply_to.is_some(),
        in_reply_to,
        is_retweet: item.get("retweetedTweet").is_some_and(|v| !v.is_null()),
        is_quote: flag(item, "isQuoteStatus")
            || item.get("quotedTweet").is_some_and(|v| !v.is_null()),
        text,
        likes: count(item, "/likeCount"),
        replies: count(item, "/replyCount"),
        author_id,
        author_name: string(item, "/user/username"),
        author_followers: count(item, "/user/followersCount"),
        created_at: string(item, "/date").and_then(|t| moment(&t)),
        lang: string(item, "/lang"),
        media: kinds.iter().map(|kind| length(item, kind)).sum::<u64>() + listed(item, "/media"),
        urls: length(item, "/links"),
    }))
}

/// The first of `keys` that holds an id.
fn id_of(item: &Value, keys: &[&str]) -> Result<Option<String>, record::Error> {
    for key in keys {
        if let Some(id) = id_at(item.get(key), key)? {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

fn id_of_at(item: &Value, pointer: &str) -> Result<Option<String>, record::Error> {
    id_at(item.pointer(pointer), &pointer[1..])
}

/// Ids are compared as text, and a number keeps all its digits or is refused.
fn id_at(value: Option<&Value>, key: &str) -> Result<Option<String>, record::Error> {
    match value {
        None | Some(Value::Null) => Ok(None),
        // Spreadsheets and some exports write nothing as "".
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) if spreadsheet_number(text) => Err(record::Error::Field {
            key: key.to_owned(),
            cause: format!(
                "`{text}` has lost digits, as spreadsheets do to ids; export it again as text"
            ),
        }),
        Some(value) => record::text_id(value)
            .map(Some)
            .map_err(|e| record::Error::Field {
                key: key.to_owned(),
                cause: e.to_string(),
            }),
    }
}

/// `1.79E+18`: what is left of an id once a spreadsheet has taken it for a number.
fn spreadsheet_number(text: &str) -> bool {
    text.contains(['e', 'E']) && text.contains('.') && text.trim().parse::<f64>().is_ok()
}

/// The first of `keys` that holds text, its entities undone.
fn text(item: &Value, keys: &[&str]) -> Option<String> {
    let mut texts = keys.iter().filter_map(|key| item.get(key)?.as_str());
    texts.find(|text| !text.trim().is_empty()).map(unescape)
}

fn string(item: &Value, pointer: &str) -> Option<String> {
    item.pointer(pointer)?
        .as_str()
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
}

/// A figure; what is no whole number is unknown.
fn count(item: &Value, pointer: &str) -> Option<u64> {
    match item.pointer(pointer)? {
        Value::String(text) => record::count(&text.trim().parse::<Number>().ok()?).ok(),
        value => record::count(value).ok(),
    }
}

fn flag(item: &Value, key: &str) -> bool {
    match item.get(key) {
        Some(Value::Bool(set)) => *set,
        Some(Value::String(text)) => text.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

/// Entries of a list; of an object too, which is what a flattened list folds back into. A
/// list that a table holds as a text (`['https://…']`) counts as one entry, for how many are
/// in it is not told apart.
fn length(item: &Value, pointer: &str) -> u64 {
    match item.pointer(pointer) {
        Some(Value::Array(list)) => list.len() as u64,
        Some(Value::Object(map)) => map.len() as u64,
        Some(Value::String(text)) => u64::from(filters::says_yes(text)),
        _ => 0,
    }
}

/// 1 where a table's cell holds an object of lists (`{'photos': [], 'videos': ['https://…']}`)
/// of which one is not empty.
fn listed(item: &Value, pointer: &str) -> u64 {
    let Some(Value::String(text)) = item.pointer(pointer) else {
        return 0;
    };
    let lists = text.split('[').skip(1);
    let mut starts = lists.map(|list| list.trim_start().chars().next());
    u64::from(starts.any(|first| first.is_some_and(|c| c != ']')))
}

/// A date in either service's form, as RFC 3339 in UTC.
fn moment(text: &str) -> Option<String> {
    let classic = format_description!(
        "[weekday repr:short] [month repr:short] [day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute] [year]"
    );
    let spaced = format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second][offset_hour sign:mandatory]:[offset_minute]"
    );
    let parsed = OffsetDateTime::parse(text, classic)
        .or_else(|_| OffsetDateTime::parse(text, spaced))
        .or_else(|_| OffsetDateTime::parse(text, &Rfc3339))
        .ok()?;
    parsed.to_offset(UtcOffset::UTC).format(&Rfc3339).ok()
}

/// Undoes the entities that X's API puts into texts. One pass: `&amp;lt;` is somebody
/// writing `&lt;`, and stays that.
fn unescape(text: &str) -> String {
    const ENTITIES: [(&str, char); 5] = [
        ("&amp;", '&'),
        ("&lt;", '<'),
        ("&gt;", '>'),
        ("&quot;", '"'),
        ("&#39;", '\''),
    ];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match ENTITIES.iter().find(|(entity, _)| rest.starts_with(entity)) {
            Some((entity, plain)) => {
                out.push(*plain);
                rest = &rest[entity.len()..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn entities_are_undone_once() {
        assert_eq!(
            unescape("a &amp;&amp; b &lt;3 &amp;lt; &copy; &"),
            "a && b <3 &lt; &copy; &"
        );
    }

    #[test]
    fn figures_are_read_from_tables_too() {
        for (likes, expected) in [
            (json!(102), Some(102)),
            (json!(102.0), Some(102)),
            (json!(" 102 "), Some(102)),
            (json!("102.0"), Some(102)),
            (json!("1.5"), None),
            (json!("many"), None),
            (json!(-1), None),
        ] {
            let tweet = Dialect::Apify.tweet(&json!({"id": "1", "text": "t", "likeCount": likes}));
            assert_eq!(tweet.unwrap().unwrap().likes, expected, "{likes}");
        }
    }

    #[test]
    fn both_services_write_dates_of_their_own() {
        assert_eq!(
            moment("Thu Sep 18 04:57:01 +0000 2025").unwrap(),
            "2025-09-18T04:57:01Z"
        );
        assert_eq!(
            moment("2023-05-20 03:20:40+00:00").unwrap(),
            "2023-05-20T03:20:40Z"
        );
        assert_eq!(
            moment("2023-05-20T05:20:40.000+02:00").unwrap(),
            "2023-05-20T03:20:40Z"
        );
        assert_eq!(moment("yesterday"), None);
    }

    #[test]
    fn ids_keep_their_digits_or_are_refused() {
        let read = |id: Value| Dialect::Apify.tweet(&json!({"id": id, "text": "t"}));
        assert_eq!(
            read(json!(1_790_000_000_000_000_001_u64))
                .unwrap()
                .unwrap()
                .id,
            "1790000000000000001"
        );
        assert_eq!(read(json!("0012")).unwrap().unwrap().id, "0012");
        assert_eq!(read(json!(null)).unwrap(), None);
        for lost in [json!(1.79e18), json!("1.79E+18"), json!(true), json!([1])] {
            assert!(read(lost.clone()).is_err(), "{lost}");
        }
    }
}
