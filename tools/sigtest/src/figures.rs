//! Finding the figures in the records: dotted paths, and every number below one.

use record::{Error, Record};
use serde_json::Value;

/// The value at a dotted path. Keys may hold dots themselves (an adapter named
/// `v1.2`): at each object every key that the path begins with is tried.
fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    if path.is_empty() {
        return Some(value);
    }
    value
        .as_object()?
        .iter()
        .find_map(|(key, below)| at(below, rest(path, key)?))
}

/// What is left of a path below `key`; `None` where it does not begin with it.
fn rest<'p>(path: &'p str, key: &str) -> Option<&'p str> {
    match path.strip_prefix(key)? {
        "" => Some(""),
        rest => rest.strip_prefix('.'),
    }
}

/// The value at a dotted path of a record; `None` where it is missing or `null`.
pub fn find(record: &Record, path: &str) -> Result<Option<Value>, Error> {
    for key in record.keys() {
        if let Some(rest) = rest(path, key)
            && let Some(value) = record.get::<Value>(key)?
            && let Some(found) = at(&value, rest).filter(|found| !found.is_null())
        {
            return Ok(Some(found.clone()));
        }
    }
    Ok(None)
}

/// Every number in a value with its dotted name below it: the value's own has the
/// name "". True and false count as 1 and 0; texts, lists and null as nothing.
pub fn numbers(value: &Value) -> Vec<(String, f64)> {
    fn walk(name: String, value: &Value, out: &mut Vec<(String, f64)>) {
        match value {
            Value::Bool(yes) => out.push((name, f64::from(*yes))),
            Value::Number(number) => out.extend(number.as_f64().map(|x| (name, x))),
            Value::Object(fields) => {
                for (key, value) in fields {
                    let dot = if name.is_empty() { "" } else { "." };
                    walk(format!("{name}{dot}{key}"), value, out);
                }
            }
            Value::Null | Value::String(_) | Value::Array(_) => {}
        }
    }
    let mut out = Vec::new();
    walk(String::new(), value, &mut out);
    out
}

/// What two single numbers are called: the parts that their paths end with alike,
/// else the parts they begin with alike (`verdicts.score.base`, `verdicts.score.lora`:
/// `verdicts.score`), else both.
pub fn common_name(a: &str, b: &str) -> String {
    let (a_parts, b_parts): (Vec<_>, Vec<_>) = (a.split('.').collect(), b.split('.').collect());
    let begin = a_parts
        .iter()
        .zip(&b_parts)
        .take_while(|(x, y)| x == y)
        .count();
    let end = a_parts
        .iter()
        .rev()
        .zip(b_parts.iter().rev())
        .take_while(|(x, y)| x == y)
        .count();
    match (begin, end) {
        (0, 0) => format!("{a} - {b}"),
        (begin, 0) => a_parts[..begin].join("."),
        (_, end) => a_parts[a_parts.len() - end..].join("."),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_reach_below_keys_that_hold_dots() {
        let record = Record::parse(
            r#"{"s":{"v1":{"x":1},"v1.2":{"x":2,"t":"no","n":null,"y":{"z":true}}}}"#,
        )
        .unwrap();
        let number = |path| find(&record, path).unwrap().and_then(|v| v.as_f64());
        assert_eq!(
            (number("s.v1.x"), number("s.v1.2.x")),
            (Some(1.0), Some(2.0))
        );
        assert_eq!(
            (number("s.v"), number("s.v1.2.n"), number("q")),
            (None, None, None)
        );
        let all = numbers(&find(&record, "s.v1.2").unwrap().unwrap());
        assert_eq!(all, [("x".to_owned(), 2.0), ("y.z".to_owned(), 1.0)]);
        assert_eq!(common_name("systems.a.nll", "systems.b.nll"), "nll");
        assert_eq!(
            common_name("verdicts.score.a", "verdicts.score.b"),
            "verdicts.score"
        );
        assert_eq!(common_name("x", "y"), "x - y");
    }
}
