//! Which rows stay together: on one side of a cut, and as one draw of a test.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Record};

impl Record {
    /// The name of its group: `split_group`, as pair-dedup leaves it, else its thread
    /// (`conversation_id`, else `tweet_id`), else a hash of what stands before the reply,
    /// so that a question stays on one side however often it was answered.
    ///
    /// `turns` are its own turns, `{"role", "content"}`, with none that settings put
    /// there; the reply is the last of the assistant. Where nothing but instructions
    /// stands before it, nothing is asked, and the hash is of all turns: they would be
    /// one group otherwise, whatever they say. `tools` are the functions that it offers.
    ///
    /// # Errors
    /// If one of the three fields is no id.
    pub fn group(&self, turns: &impl Serialize, tools: &impl Serialize) -> Result<String, Error> {
        for key in ["split_group", "conversation_id", "tweet_id"] {
            if let Some(name) = self.id(key)? {
                return Ok(name);
            }
        }
        let [mut turns, tools] = [value(turns)?, value(tools)?];
        if let Value::Array(turns) = &mut turns {
            let reply = turns.iter().rposition(|turn| turn["role"] == "assistant");
            let reply = reply.unwrap_or(turns.len());
            if turns[..reply].iter().any(|turn| turn["role"] != "system") {
                turns.truncate(reply);
            }
        }
        Ok(name_of(Value::Array(vec![turns, tools])))
    }
}

/// A name for texts, the same however the file that they stand in is written: 128 bits of
/// their SHA-256, in hex.
pub fn name_of(texts: Value) -> String {
    let hash = Sha256::digest(in_order(texts).to_string());
    let digits = hash[..16].iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

fn value(texts: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(texts).map_err(|e| Error::Json(e.to_string()))
}

/// A value with the keys of its objects in order and without those that are null: a file
/// that is written again may have others of both.
fn in_order(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let there = fields.into_iter().filter(|(_, value)| !value.is_null());
            let sorted: BTreeMap<_, _> = there.map(|(key, v)| (key, in_order(v))).collect();
            sorted.into_iter().collect()
        }
        Value::Array(items) => items.into_iter().map(in_order).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use crate::Record;

    fn group(record: &str, turns: Value, tools: Value) -> String {
        let record = Record::parse(record).unwrap();
        record.group(&turns, &tools).unwrap()
    }

    fn turn(role: &str, content: &str) -> Value {
        json!({ "role": role, "content": content })
    }

    #[test]
    fn a_group_goes_by_the_first_name_that_is_there() {
        for (record, name) in [
            (
                r#"{"tweet_id":3,"conversation_id":"2","split_group":"1"}"#,
                "1",
            ),
            (
                r#"{"tweet_id":3,"conversation_id":"2","split_group":null}"#,
                "2",
            ),
            (r#"{"tweet_id":3}"#, "3"),
        ] {
            assert_eq!(group(record, json!([]), json!([])), name);
        }
        let record = Record::parse(r#"{"split_group":[1]}"#).unwrap();
        let error = record.group(&json!([]), &json!([])).unwrap_err();
        assert!(error.to_string().contains("`split_group`"), "{error}");
    }

    #[test]
    fn without_a_name_it_is_what_was_asked() {
        let asked = |turns: &[Value]| group("{}", json!(turns), json!([]));
        let (user, system) = (turn("user", "Tea?"), turn("system", "Be brief."));
        let [yes, no] = ["Yes.", "No."].map(|said| turn("assistant", said));
        let one = asked(&[user.clone(), yes.clone()]);
        assert_eq!(one, asked(&[user.clone(), no.clone()]));
        assert_eq!(one.len(), 32);
        for other in [
            vec![turn("user", "Coffee?"), yes.clone()],
            vec![system.clone(), user.clone(), yes.clone()],
            vec![user.clone(), yes.clone(), user.clone(), yes.clone()],
        ] {
            assert_ne!(one, asked(&other), "{other:?}");
        }
        let offered = json!([{"name": "f", "parameters": {}}]);
        assert_ne!(one, group("{}", json!([user, yes]), offered));
        // Written again by another program.
        let again = json!([{"content": "Tea?", "tool_calls": null, "role": "user"}, yes]);
        assert_eq!(one, group("{}", again, json!([])));
        // Nothing is asked: no two of these are one.
        assert_ne!(
            asked(std::slice::from_ref(&yes)),
            asked(std::slice::from_ref(&no))
        );
        assert_ne!(asked(&[system.clone(), yes]), asked(&[system, no]));
    }
}
