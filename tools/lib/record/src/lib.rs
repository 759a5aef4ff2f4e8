//! The records that the tools exchange: a JSON object whose fields are kept
//! byte for byte, and typed views of the fields that a stage knows.
//!
//! A stage adds fields and never rewrites others, so that a record can pass
//! through a tool that has never heard of half of it. That is why a [`Record`]
//! holds each value as the text it came in: numbers beyond 2^53, escapes and
//! odd spacing leave as they arrived.

mod group;
mod pair;
mod stages;

use std::fmt;
use std::io::{self, Write};

use indexmap::IndexMap;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

pub use group::name_of;
pub use pair::{BadLine, Pair, Reason, Rejected, Split, count, count_by_reason, text_id};
pub use stages::{Dropped, Duplicate, Summary, Validation, quality};

/// The newest record version that this build understands.
pub const VERSION: u64 = 1;

/// What can be wrong with one line of input.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The line is not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A newer version of the format.
    #[error(
        "record version {0} is newer than this build understands ({VERSION}); update the tools"
    )]
    Version(u64),
    /// A field that is needed is not there.
    #[error("key `{0}` is missing")]
    Missing(String),
    /// Neither a pair nor a conversation.
    #[error(
        "no row that is understood: it needs `tweet` with `reply`, `messages`, or `prompt` with `completion`"
    )]
    NoForm,
    /// Nothing says which pair this is.
    #[error("no key `id`, and not both of `tweet_id` and `reply_id` to make one of")]
    NoId,
    /// A field holds something else than expected.
    #[error("key `{key}`: {cause}")]
    Field {
        /// The field's name.
        key: String,
        /// What serde said of it.
        cause: String,
    },
}

/// One JSON object; values are kept as raw text, in their order.
#[derive(Clone, Debug, Default)]
pub struct Record {
    fields: IndexMap<String, Box<RawValue>>,
}

impl Record {
    /// Parses one line. A duplicate key is an error, for one of the two values
    /// would be lost; so is a `v` above [`VERSION`].
    pub fn parse(line: &str) -> Result<Self, Error> {
        let record: Self = serde_json::from_str(line).map_err(|e| Error::Json(cause(&e, true)))?;
        match record.get::<u64>("v")? {
            Some(v) if v > VERSION => Err(Error::Version(v)),
            _ => Ok(record),
        }
    }

    /// Whether the field is there (`null` counts as there).
    pub fn contains(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// A field's value; `None` where it is missing or `null`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Error> {
        match self.fields.get(key) {
            None => Ok(None),
            Some(raw) if raw.get() == "null" => Ok(None),
            Some(raw) => serde_json::from_str(raw.get())
                .map(Some)
                .map_err(|e| Error::Field {
                    key: key.to_owned(),
                    cause: cause(&e, false),
                }),
        }
    }

    /// A field's value; missing or `null` is an error that names it.
    pub fn require<T: DeserializeOwned>(&self, key: &str) -> Result<T, Error> {
        self.get(key)?.ok_or_else(|| Error::Missing(key.to_owned()))
    }

    /// Every field's value, for those who look fields up by name.
    pub fn values(&self) -> Result<Map<String, Value>, Error> {
        let mut values = Map::new();
        for (key, raw) in &self.fields {
            let value = serde_json::from_str(raw.get()).map_err(|e| Error::Field {
                key: key.clone(),
                cause: cause(&e, false),
            })?;
            values.insert(key.clone(), value);
        }
        Ok(values)
    }

    /// A figure: a whole number, see [`count`].
    pub fn count(&self, key: &str) -> Result<Option<u64>, Error> {
        Ok(self.get::<pair::Count>(key)?.map(|count| count.0))
    }

    /// An id: a text, or a whole number.
    pub fn id(&self, key: &str) -> Result<Option<String>, Error> {
        Ok(self.get::<pair::TextId>(key)?.map(|id| id.0))
    }

    /// Sets a field: in its place where it exists, else at the end.
    pub fn set<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<(), Error> {
        let raw = serde_json::value::to_raw_value(value).map_err(|e| Error::Field {
            key: key.to_owned(),
            cause: cause(&e, false),
        })?;
        self.fields.insert(key.to_owned(), raw);
        Ok(())
    }

    /// Sets a field only where it is missing.
    pub(crate) fn set_default<T: Serialize + ?Sized>(
        &mut self,
        key: &str,
        value: &T,
    ) -> Result<(), Error> {
        if self.contains(key) {
            Ok(())
        } else {
            self.set(key, value)
        }
    }

    /// Removes a field; says whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        self.fields.shift_remove(key).is_some()
    }

    /// The names of the fields, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// Writes the record as one line, newline included.
    pub fn write_line(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        out.write_all(b"\n")
    }

    /// The side of the train/eval cut that it says it is on.
    pub fn split(&self) -> Result<Option<Split>, Error> {
        match self.get("split")? {
            None => Ok(None),
            Some(Value::String(side)) if side == "train" => Ok(Some(Split::Train)),
            Some(Value::String(side)) if side == "eval" => Ok(Some(Split::Eval)),
            Some(other) => Err(Error::Field {
                key: "split".into(),
                cause: format!("is {other}; there are \"train\" and \"eval\""),
            }),
        }
    }

    /// The typed view of a tweet→reply pair.
    pub fn pair(&self) -> Result<Pair, Error> {
        Pair::of(self)
    }
}

/// What serde says, without its "line 1": a record stands on a line of a file, which
/// errors name. The column is the line's where `whole` was parsed, else a value's own.
fn cause(error: &serde_json::Error, whole: bool) -> String {
    let text = error.to_string();
    let (line, column) = (error.line(), error.column());
    let (text, column) = match text.strip_suffix(&format!(" at line {line} column {column}")) {
        Some(text) if whole => (text, format!(" at column {column}")),
        Some(text) => (text, String::new()),
        None => (&*text, String::new()),
    };
    // What serde_json says of `\ud83d` without the half that belongs to it.
    let halved = [
        "unexpected end of hex escape",
        "lone leading surrogate in hex escape",
    ];
    match halved.contains(&text) {
        true => format!(
            "half of a surrogate pair, such as `\\ud83d` alone{column}: a text was cut inside a character"
        ),
        false => format!("{text}{column}"),
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(&self.fields)
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Record;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record, A::Error> {
                let mut fields = IndexMap::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if fields.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("key `{key}` stands twice")));
                    }
                    fields.insert(key, value);
                }
                Ok(Record { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_not_touched_leaves_as_it_came() {
        let line = r#"{"v":1,"big":123456789012345678901234567890,"f":1.10,"s":"\u00e9","n":null,"o":{ "a" : [1 ,2]}}"#;
        let mut record = Record::parse(line).unwrap();
        assert_eq!(record.to_string(), line);
        record.set("added", &true).unwrap();
        assert_eq!(
            record.to_string(),
            format!("{},\"added\":true}}", &line[..line.len() - 1])
        );
        record.set("f", &2).unwrap();
        assert!(
            record.to_string().contains(r#""f":2,"s""#),
            "a value is replaced in its place"
        );
    }

    #[test]
    fn errors_name_the_key() {
        for (line, said) in [
            ("[1]", "not a JSON object"),
            (r#"{"a":1,"a":2}"#, "`a` stands twice"),
            (r#"{"v":2}"#, "version 2 is newer"),
            (r#"{"v":"x"}"#, "`v`"),
            (r#"{"a":1} x"#, "trailing"),
        ] {
            let error = Record::parse(line).unwrap_err().to_string();
            assert!(error.contains(said), "{line}: {error}");
        }
        let side = |value: &str| {
            Record::parse(&format!(r#"{{"split":{value}}}"#))
                .unwrap()
                .split()
        };
        assert_eq!(side("null").unwrap(), None);
        assert_eq!(side(r#""eval""#).unwrap(), Some(Split::Eval));
        for value in ["1", r#""test""#, "[]"] {
            let error = side(value).unwrap_err().to_string();
            let said = format!("key `split`: is {value}; there are");
            assert!(error.starts_with(&said), "{error}");
        }
        for text in [
            r#"{"a":"\ud83d"}"#,
            r#"{"a":"\ud83d x"}"#,
            r#"{"a":"\udc00"}"#,
        ] {
            let error = Record::parse(text)
                .unwrap()
                .require::<String>("a")
                .unwrap_err();
            assert!(
                error.to_string().contains("half of a surrogate pair"),
                "{error}"
            );
        }
        let record = Record::parse(r#"{"n":null,"s":3}"#).unwrap();
        assert!(
            record
                .require::<String>("n")
                .unwrap_err()
                .to_string()
                .contains("`n` is missing")
        );
        assert!(
            record
                .get::<String>("s")
                .unwrap_err()
                .to_string()
                .contains("`s`")
        );
    }
}
