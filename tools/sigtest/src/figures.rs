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

/// The value at a dotted path of a record; `None` where it is missing. `null` is found
/// where nothing else is.
pub fn find(record: &Record, path: &str) -> Result<Option<Value>, Error> {
    let mut null = None;
    for key in record.keys() {
        let Some(rest) = rest(path, key) else {
            continue;
        };
        let value = record.get::<Value>(key)?.unwrap_or(Value::Null);
        match at(&value, rest) {
            Some(Value::Null) => null = Some(Value::Null),
            Some(found) => return Ok(Some(found.clone())),
            None => {}
        }
    }
    Ok(null)
}

/// Every number in a value with its dotted name below it: the value's own has the
/// name "". True and false count as 1 and 0; texts and lists as nothing. `None` is
/// `null`: what was to be a number and was not measured.
pub fn numbers(value: &Value) -> Vec<(String, Option<f64>)> {
    fn walk(name: String, value: &Value, out: &mut Vec<(String, Option<f64>)>) {
        match value {
            Value::Bool(yes) => out.push((name, Some(f64::from(*yes)))),
            Value::Number(number) => out.extend(number.as_f64().map(|x| (name, Some(x)))),
            Value::Null => out.push((name, None)),
            Value::Object(fields) => {
                for (key, value) in fields {
                    let dot = if name.is_empty() { "" } else { "." };
                    walk(format!("{name}{dot}{key}"), value, out);
                }
            }
            Value::String(_) | Value::Array(_) => {}
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
        let named = |name: &str, number| (name.to_owned(), number);
        assert_eq!(
            all,
            [
                named("x", Some(2.0)),
                named("n", None),
                named("y.z", Some(1.0))
            ]
        );
        assert_eq!(find(&record, "s.v1.2.n").unwrap(), Some(Value::Null));
        assert_eq!(common_name("systems.a.nll", "systems.b.nll"), "nll");
        assert_eq!(
            common_name("verdicts.score.a", "verdicts.score.b"),
            "verdicts.score"
        );
        assert_eq!(common_name("x", "y"), "x - y");
    }
}
