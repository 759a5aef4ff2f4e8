//! The pairs that are looked at, and what order they come in.

use std::cmp::Ordering;
use std::fmt;

use cli::Failure;
use record::{Record, name_of};
use serde_json::{Map, Value, json};

use crate::decisions::hash;

/// A pair.
pub struct Row {
    /// Its name.
    pub id: String,
    /// The tweet's text.
    pub tweet: String,
    /// The reply's text.
    pub reply: String,
    /// [`hash`] of both.
    pub text: String,
    record: Record,
}

impl Row {
    /// The pair that a record is.
    pub fn of(record: Record) -> Result<Self, record::Error> {
        let pair = record.pair()?;
        Ok(Self {
            text: hash(&pair.tweet, &pair.reply),
            id: pair.id,
            tweet: pair.tweet,
            reply: pair.reply,
            record,
        })
    }

    /// All that the row has, but for a value that cannot be read: nobody needs it here.
    pub fn values(&self) -> Map<String, Value> {
        let value = |key: &str| Some(self.record.get(key).ok()?.unwrap_or(Value::Null));
        (self.record.keys())
            .filter_map(|key| Some((key.to_owned(), value(key)?)))
            .collect()
    }

    /// A value by its dotted name.
    pub fn value(&self, field: &str) -> Option<Value> {
        let mut parts = field.split('.');
        let first: Value = self.record.get(parts.next()?).ok()??;
        let found = parts.try_fold(&first, |value, part| value.get(part))?;
        (!found.is_null()).then(|| found.clone())
    }
}

/// What order rows come in.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// As they were read.
    Read,
    /// By chance, the same for the same seed, whatever other rows there are.
    Random,
    /// By a field's value, rows without it last.
    Field {
        /// Its dotted name.
        name: String,
        /// Highest first.
        falls: bool,
    },
}

impl Order {
    /// By its name, as in the settings.
    pub fn named(name: &str) -> Self {
        match name {
            "read" => Self::Read,
            "random" => Self::Random,
            _ => Self::Field {
                name: name.trim_start_matches('-').to_owned(),
                falls: name.starts_with('-'),
            },
        }
    }

    /// The same, or turned round where it is by a field and asked for again.
    pub fn or_turned(self, now: &Self) -> Self {
        match self {
            Self::Field { name, falls }
                if *now
                    == (Self::Field {
                        name: name.clone(),
                        falls,
                    }) =>
            {
                Self::Field {
                    name,
                    falls: !falls,
                }
            }
            other => other,
        }
    }

    /// The numbers of the rows in this order.
    ///
    /// # Errors
    /// If it is by a field that no row has.
    pub fn of(&self, rows: &[Row], seed: u64) -> Result<Vec<usize>, Failure> {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        match self {
            Self::Read => {}
            Self::Random => order.sort_by_cached_key(|&at| name_of(json!([seed, rows[at].id]))),
            Self::Field { name, falls } => {
                let values: Vec<_> = rows.iter().map(|row| row.value(name)).collect();
                if values.iter().all(Option::is_none) {
                    return Err(Failure::Usage(format!(
                        "no pair has a field `{name}`; `i` on a pair shows those that it has"
                    )));
                }
                order.sort_by(|&a, &b| match (&values[a], &values[b]) {
                    (Some(a), Some(b)) if *falls => compare(b, a),
                    (Some(a), Some(b)) => compare(a, b),
                    (a, b) => a.is_none().cmp(&b.is_none()),
                });
            }
        }
        Ok(order)
    }
}

/// Numbers before all else, which goes by its text.
fn compare(a: &Value, b: &Value) -> Ordering {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a_number, b_number) => {
            (a_number.is_none().cmp(&b_number.is_none())).then_with(|| shown(a).cmp(&shown(b)))
        }
    }
}

/// A value in words.
pub fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("as read"),
            Self::Random => f.write_str("random"),
            Self::Field { name, falls: true } => write!(f, "highest {name} first"),
            Self::Field { name, .. } => write!(f, "lowest {name} first"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn rows(values: &[&str]) -> Vec<Row> {
        let row = |(i, value)| {
            let line = format!(r#"{{"id":"{i}","tweet":"t","reply":"r","f":{{"g":{value}}}}}"#);
            Row::of(Record::parse(&line).unwrap()).unwrap()
        };
        values.iter().enumerate().map(row).collect()
    }

    #[test]
    fn rows_without_a_value_come_last_either_way() {
        let rows = rows(&["3", "null", "-1.5", "\"x\"", "3"]);
        let order = |name: &str| Order::named(name).of(&rows, 1).unwrap();
        assert_eq!(order("f.g"), [2, 0, 4, 3, 1]);
        assert_eq!(order("-f.g"), [3, 0, 4, 2, 1]);
        assert_eq!(order("read"), [0, 1, 2, 3, 4]);
        let error = Order::named("f.h").of(&rows, 1).unwrap_err().to_string();
        assert!(error.contains("`f.h`"), "{error}");
        let by = Order::named("f.g");
        assert_eq!(by.clone().or_turned(&Order::Read), by);
        assert_eq!(by.clone().or_turned(&by), Order::named("-f.g"));
    }

    /// More rows fall between the others and change nothing among them.
    #[test]
    fn a_random_order_goes_by_the_seed_and_the_ids() {
        let many = rows(&["1"; 50]);
        let few = rows(&["1"; 20]);
        let order = |rows: &[Row], seed| Order::Random.of(rows, seed).unwrap();
        let among: Vec<usize> = (order(&many, 7).into_iter())
            .filter(|&at| at < 20)
            .collect();
        assert_eq!(among, order(&few, 7));
        assert_ne!(among, order(&few, 0));
        assert_ne!(order(&few, 7), Order::Read.of(&few, 7).unwrap());
    }
}
