//! What a line of data puts to the model: a tweet→reply pair, a conversation under
//! `messages` (or ShareGPT's `conversations`), or a `prompt` with its `completion`.
//!
//! Training and generation read lines here, so that they ask in the same words. What
//! the chat template would drop or render as nonsense without a word is refused: roles
//! that it does not know, and calls and tools of another shape.

use record::{Error, Record};
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::prompt::PromptTemplate;
use crate::template::Message;

/// The roles that the chat template knows; turns of others would vanish.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// What other formats call them.
const ALIASES: [(&str, &str); 7] = [
    ("developer", "system"),
    ("human", "user"),
    ("bot", "assistant"),
    ("gpt", "assistant"),
    ("model", "assistant"),
    ("function", "tool"),
    ("observation", "tool"),
];

/// How lines are put to the model.
#[derive(Debug)]
pub struct Wording {
    /// Take a pair's normalised texts, not those that were collected.
    pub normalized: bool,
    /// Put before pairs and prompts; empty for none.
    pub system_prompt: String,
    /// The user's turn of a pair.
    pub prompt: PromptTemplate,
}

/// What a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A tweet with its reply.
    Pair,
    /// `prompt` with `completion`, both texts.
    Prompt,
    /// A list of turns: `messages`, `conversations`, or `prompt` with `completion`.
    Messages,
}

/// A line as the model reads it.
#[derive(Debug)]
pub struct Conversation {
    /// What it was made from.
    pub form: Form,
    /// Which row it is, by its texts as they were collected, with or without cleaned ones
    /// beside them, and however they are worded: 128 bits of their SHA-256, in hex.
    pub row: String,
    /// The line's name; only pairs must have one.
    pub id: Option<String>,
    /// The thread that it belongs to; pairs always have one.
    pub thread: Option<String>,
    /// The tweet of a pair, without the words of the template.
    pub tweet: Option<String>,
    /// Its turns.
    pub messages: Vec<Message>,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Vec<Value>,
}

impl Conversation {
    /// The turns that its row came with: a tweet as it was before the template worded it,
    /// and no system prompt of the settings, which must not decide what belongs together.
    pub fn own_turns(&self) -> Vec<Message> {
        let turns = self.messages.iter();
        match (&self.tweet, self.form) {
            (Some(tweet), _) => vec![Message::user(tweet)],
            (None, Form::Prompt) => turns.skip_while(|m| m.role == "system").cloned().collect(),
            (None, _) => turns.cloned().collect(),
        }
    }
}

impl Wording {
    /// The conversation that a record holds.
    ///
    /// # Errors
    /// If the record is of none of the forms, or something in it would not reach the
    /// model as it was meant.
    pub fn read(&self, record: &Record) -> Result<Conversation, Error> {
        let tools = tools(record)?;
        match form(record)? {
            "reply" => self.pair(record, tools),
            key @ ("messages" | "conversations") => of_turns(record, turns(record, key)?, tools),
            _ => match are_lists(record)? {
                true => of_turns(record, answered(record)?, tools),
                false => self.prompt(record, tools),
            },
        }
    }

    /// A line that is a `prompt` with its `completion`, both texts.
    fn prompt(&self, record: &Record, tools: Vec<Value>) -> Result<Conversation, Error> {
        let text = |key: &str| match record.get(key)? {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Array(_)) => Err(wrong(
                key,
                "is a list of turns, where `prompt` and `completion` are both lists or both texts",
            )),
            Some(_) => Err(wrong(key, "is not a text")),
            None => Ok(String::new()),
        };
        let (prompt, completion) = (text("prompt")?, text("completion")?);
        if prompt.trim().is_empty() {
            return Err(wrong(
                "prompt",
                "missing or empty: nothing is put to the model",
            ));
        }
        // `null` is an empty one, as in `messages`; none at all is a mistake.
        if !record.contains("completion") {
            return Err(Error::Missing("completion".into()));
        }
        Ok(Conversation {
            form: Form::Prompt,
            row: name(&(&prompt, &completion, &tools)),
            id: record.id("id")?,
            thread: record.id("conversation_id")?,
            tweet: None,
            messages: self.exchange(prompt, completion),
            tools,
        })
    }

    /// A line that is a tweet with its reply.
    fn pair(&self, record: &Record, tools: Vec<Value>) -> Result<Conversation, Error> {
        let pair = record.pair()?;
        // The same pair may come without the cleaned texts, or with nothing else.
        let text = |raw: &str, cleaned: &str| -> Result<Value, Error> {
            match raw.trim().is_empty() {
                true => Ok(record.get(cleaned)?.unwrap_or_default()),
                false => Ok(raw.into()),
            }
        };
        let row = name(&(
            text(&pair.tweet, "tweet_normalized")?,
            text(&pair.reply, "reply_normalized")?,
            &tools,
        ));
        let normalized = |key: &str| -> Result<String, Error> {
            let remedy = "missing: run pair-dedup, or set data.text: raw (gen-eval: --text raw)";
            record.get(key)?.ok_or_else(|| wrong(key, remedy))
        };
        let (tweet, reply) = match self.normalized {
            true => (
                normalized("tweet_normalized")?,
                normalized("reply_normalized")?,
            ),
            false => (pair.tweet, pair.reply),
        };
        let mut fields = record.values()?;
        fields.insert("tweet".into(), tweet.as_str().into());
        let asked = self
            .prompt
            .render(&fields)
            .map_err(|error| wrong(error.key(), error.to_string()))?;
        Ok(Conversation {
            form: Form::Pair,
            row,
            id: Some(pair.id),
            thread: Some(pair.conversation_id),
            tweet: Some(tweet),
            messages: self.exchange(asked, reply),
            tools,
        })
    }

    /// One question and its answer, under the system prompt if there is one.
    fn exchange(&self, user: String, assistant: String) -> Vec<Message> {
        let system = Some(&self.system_prompt).filter(|text| !text.is_empty());
        let system = system.map(Message::system).into_iter();
        let turns = [Message::user(user), Message::assistant(assistant)];
        system.chain(turns).collect()
    }
}

/// A line that is a list of turns.
fn of_turns(
    record: &Record,
    messages: Vec<Message>,
    tools: Vec<Value>,
) -> Result<Conversation, Error> {
    Ok(Conversation {
        form: Form::Messages,
        row: name(&(&messages, &tools)),
        id: record.id("id")?,
        thread: record.id("conversation_id")?,
        tweet: None,
        messages,
        tools,
    })
}

/// The key of a line that is to be answered, which tells its form: `messages`,
/// `conversations`, `completion` (also where there is a `prompt` alone) or `reply`.
fn form(record: &Record) -> Result<&'static str, Error> {
    // What is null, as in the rows of a table with columns for every form, is not there.
    let there = |key| Ok::<_, Error>(record.get::<IgnoredAny>(key)?.is_some());
    let mut answers = Vec::new();
    for key in ["messages", "conversations", "completion", "reply"] {
        if there(key)? {
            answers.push(key);
        }
    }
    if let [first, second, ..] = answers[..] {
        let cause =
            format!("`{second}` is there as well: leave out the one that is not to be learnt");
        return Err(wrong(first, cause));
    }
    for (asked, answer) in [("prompt", "completion"), ("tweet", "reply")] {
        if answers.is_empty() && there(asked)? {
            answers.push(answer);
        }
    }
    if let [answer, ..] = answers[..] {
        return Ok(answer);
    }
    // Nothing is there but what is null, if anything.
    let (answer, _) = [
        ("messages", "messages"),
        ("conversations", "conversations"),
        ("completion", "completion"),
        ("completion", "prompt"),
        ("reply", "tweet"),
        ("reply", "reply"),
    ]
    .into_iter()
    .find(|(_, key)| record.contains(key))
    .ok_or(Error::NoForm)?;
    Ok(answer)
}

/// Whether `prompt` and `completion` are both lists of turns.
fn are_lists(record: &Record) -> Result<bool, Error> {
    for key in ["prompt", "completion"] {
        if !matches!(record.get(key)?, Some(Value::Array(_))) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn wrong(key: &str, cause: impl Into<String>) -> Error {
    Error::Field {
        key: key.into(),
        cause: cause.into(),
    }
}

/// See [`Conversation::row`].
fn name(texts: &impl Serialize) -> String {
    let texts = serde_json::to_value(texts).expect("texts and JSON values are serialisable");
    record::name_of(texts)
}

/// The turns of a list: `{"role", "content"}`, or ShareGPT's `{"from", "value"}` under
/// `conversations`, whose roles have other names.
fn turns(record: &Record, key: &str) -> Result<Vec<Message>, Error> {
    let turns: Vec<Value> = record.require(key)?;
    if turns.is_empty() {
        return Err(wrong(key, "has no turns: nothing to learn or to answer"));
    }
    let number = |mut turn: Value, i: usize| {
        if key == "conversations" {
            rename(&mut turn);
        }
        message(turn).map_err(|cause| wrong(key, format!("turn {i}: {cause}")))
    };
    turns
        .into_iter()
        .zip(1..)
        .map(|(t, i)| number(t, i))
        .collect()
}

/// A turn of ShareGPT's as one of ours; what is none stays as it is.
fn rename(turn: &mut Value) {
    let Value::Object(turn) = turn else { return };
    for (theirs, ours) in [("from", "role"), ("value", "content")] {
        if !turn.contains_key(ours)
            && let Some(value) = turn.remove(theirs)
        {
            turn.insert(ours.into(), value);
        }
    }
    if let Some(Value::String(role)) = turn.get_mut("role")
        && let Some(&(_, meant)) = ALIASES.iter().find(|(name, _)| name == role)
    {
        *role = meant.into();
    }
}

/// The turns of a `prompt` and its `completion`. Every assistant turn of a conversation is
/// learnt, so the prompt must have none.
fn answered(record: &Record) -> Result<Vec<Message>, Error> {
    let mut all = turns(record, "prompt")?;
    if all.iter().any(|turn| turn.role == "assistant") {
        return Err(wrong(
            "prompt",
            "has turns of the assistant, which would be learnt as well: if they shall be, put all turns under `messages`",
        ));
    }
    all.extend(turns(record, "completion")?);
    Ok(all)
}

fn message(turn: Value) -> Result<Message, String> {
    let Value::Object(mut turn) = turn else {
        return Err(r#"not an object such as {"role": "user", "content": "…"}"#.into());
    };
    let allowed = ROLES.join(", ");
    let role = match turn.get("role") {
        Some(Value::String(role)) => role.clone(),
        None => return Err(format!("no `role`; there are {allowed}")),
        Some(other) => return Err(format!("its role is {other}; there are {allowed}")),
    };
    if !ROLES.contains(&role.as_str()) {
        let near = nearest(&role).map_or(String::new(), |near| format!("; write `{near}`?"));
        return Err(format!("no role `{role}`: there are {allowed}{near}"));
    }
    let calls = match turn.get("tool_calls") {
        None | Some(Value::Null) => false,
        Some(Value::Array(calls)) => {
            if calls.iter().any(|call| !is_call(call)) {
                return Err(r#"`tool_calls` holds something else than {"name": "…", "arguments": {…}}, alone or under "function""#.into());
            }
            !calls.is_empty()
        }
        Some(_) => return Err("`tool_calls` is not a list".into()),
    };
    if calls && role != "assistant" {
        return Err(format!(
            "`tool_calls` in a turn of the role `{role}`: only the assistant calls"
        ));
    }
    match turn.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Null) if role == "assistant" => {}
        Some(Value::Null) => {
            return Err("`content` is null: give it a text, or leave the turn out".into());
        }
        // Some write a turn that is nothing but calls without it.
        None if calls => {
            turn.insert("content".into(), Value::Null);
        }
        None => return Err("no `content`".into()),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part["type"] == "text" {
                true => part["text"].as_str().map(str::to_owned),
                false => None,
            };
            let Some(text) = parts.iter().map(text).collect::<Option<String>>() else {
                return Err(r#"`content` holds other parts than {"type": "text", "text": "…"}: there is no model for images here"#.into());
            };
            turn.insert("content".into(), text.into());
        }
        Some(_) => return Err("`content` is not a text".into()),
    }
    if let Some(other) = turn.get("reasoning_content")
        && !(other.is_string() || other.is_null())
    {
        return Err("`reasoning_content` is not a text".into());
    }
    serde_json::from_value(Value::Object(turn)).map_err(|error| error.to_string())
}

/// The role that is probably meant.
fn nearest(role: &str) -> Option<&'static str> {
    let role = role.trim().to_lowercase();
    let alias = ALIASES.iter().find(|(name, _)| *name == role);
    alias.map(|&(_, meant)| meant).or_else(|| {
        let likeness = |name: &str| strsim::jaro_winkler(name, &role);
        let near = ROLES.into_iter().filter(|name| likeness(name) > 0.8);
        near.max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
    })
}

/// Whether the template renders it as a call: arguments as an object, or as JSON text.
fn is_call(call: &Value) -> bool {
    let call = call.get("function").unwrap_or(call);
    let arguments = &call["arguments"];
    named(call) && (arguments.is_object() || arguments.is_string())
}

fn named(function: &Value) -> bool {
    function["name"]
        .as_str()
        .is_some_and(|name| !name.is_empty())
}

/// The functions under `tools`.
fn tools(record: &Record) -> Result<Vec<Value>, Error> {
    let cause = match record.get("tools")? {
        None => return Ok(Vec::new()),
        Some(Value::Array(tools)) => {
            let unnamed = tools
                .iter()
                .position(|tool| !named(tool.get("function").unwrap_or(tool)));
            match unnamed {
                None => return Ok(tools),
                Some(at) => format!(
                    r#"tool {}: not a schema such as {{"type": "function", "function": {{"name": "…", "parameters": {{…}}}}}}"#,
                    at + 1
                ),
            }
        }
        Some(Value::String(_)) => "is JSON as a text: write the list itself, without quotes".into(),
        Some(_) => "is not a list of schemas".into(),
    };
    Err(wrong("tools", cause))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn wording() -> Wording {
        Wording {
            normalized: false,
            system_prompt: "Be brief.".into(),
            prompt: PromptTemplate::new("{{ tweet }}").unwrap(),
        }
    }

    fn read(line: &str) -> Result<Conversation, Error> {
        wording().read(&Record::parse(line).unwrap())
    }

    #[test]
    fn there_are_three_forms() {
        let roles = |line: &str| {
            let read = read(line).unwrap();
            let roles: Vec<String> = read.messages.into_iter().map(|m| m.role).collect();
            (read.form, roles.join(" "))
        };
        assert_eq!(
            roles(r#"{"id":"1","tweet":"t","reply":"r"}"#),
            (Form::Pair, "system user assistant".into())
        );
        assert_eq!(
            roles(r#"{"prompt":"p","completion":"c"}"#),
            (Form::Prompt, "system user assistant".into())
        );
        let line = r#"{"id":7,"messages":[{"role":"user","content":"u"},{"role":"assistant","tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]},
            {"role":"tool","content":"3"},{"role":"assistant","content":"three"}],"tools":[{"type":"function","function":{"name":"f"}},{"name":"g"}]}"#;
        assert_eq!(
            roles(line),
            (Form::Messages, "user assistant tool assistant".into())
        );
        // Columns of other forms, and an assistant that only calls.
        assert_eq!(
            roles(r#"{"messages":null,"reply":null,"prompt":"p","completion":"c"}"#).0,
            Form::Prompt
        );
        assert_eq!(
            roles(r#"{"id":"1","tweet":"t","reply":"r","prompt":"p","completion":null}"#).0,
            Form::Pair
        );
        let read = read(line).unwrap();
        assert_eq!((read.id.as_deref(), read.tools.len()), (Some("7"), 2));
        assert!(!read.messages[1].is_empty(), "a call says something");
        assert!(Message::assistant(" \n").is_empty());
    }

    #[test]
    fn other_spellings_of_turns_are_the_same_row() {
        let turns = |line: &str| {
            let read = read(line).unwrap();
            assert_eq!(read.form, Form::Messages, "{line}");
            (read.row, read.messages)
        };
        let ours = turns(
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u v"},{"role":"assistant","content":"a"}]}"#,
        );
        for line in [
            r#"{"conversations":[{"from":"system","value":"s"},{"from":"human","value":"u v"},{"from":"gpt","value":"a"}]}"#,
            r#"{"conversations":[{"role":"system","content":"s"},{"role":"user","content":"u v"},{"role":"assistant","content":"a"}],"messages":null}"#,
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"u "},{"type":"text","text":"v"}]},{"role":"assistant","content":"a"}]}"#,
            r#"{"prompt":[{"role":"system","content":"s"},{"role":"user","content":"u v"}],"completion":[{"role":"assistant","content":"a"}]}"#,
        ] {
            assert_eq!(turns(line), ours, "{line}");
        }
    }

    #[test]
    fn a_row_is_named_by_its_texts_alone() {
        let row = |line: &str| read(line).unwrap().row;
        let pair = row(r#"{"id":"1","tweet":"t","reply":"r"}"#);
        assert_eq!(
            pair,
            row(r#"{"reply":"r", "tweet":"t", "id":"2", "split":"eval"}"#)
        );
        assert_ne!(pair, row(r#"{"id":"1","tweet":"t","reply":"q"}"#));
        assert_ne!(pair, row(r#"{"id":"1","tweet":"tr","reply":""}"#));
        let prompt = row(r#"{"prompt":"p","completion":"c"}"#);
        assert_ne!(
            prompt,
            row(r#"{"prompt":"p","completion":"c","tools":[{"name":"f"}]}"#)
        );
        let turns = r#"[{"role":"user","content":"p"},{"role":"assistant","content":"c"}]"#;
        let other = r#"[{"content":"p","role":"user"}, {"role":"assistant","content":"c"}]"#;
        let [turns, other] = [turns, other].map(|turns| row(&format!(r#"{{"messages":{turns}}}"#)));
        assert_eq!(turns, other);
        assert_eq!(turns.len(), 32);
        // Schemas and calls whose keys were sorted, or filled up with nulls, on the way.
        let calls = [
            r#"{"messages":[{"role":"user","content":"p"},{"role":"assistant","content":"","tool_calls":[{"name":"f","arguments":{"b":1,"a":[2]}}]}],
                "tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"b":{},"a":{}}}}}]}"#,
            r#"{"messages":[{"content":"p","role":"user","tool_calls":null},{"content":null,"role":"assistant","tool_calls":[{"arguments":{"a":[2],"b":1},"name":"f"}]}],
                "tools":[{"function":{"name":"f","parameters":{"properties":{"a":{},"b":{}},"type":"object"}},"type":"function"}]}"#,
        ];
        assert_eq!(row(calls[0]), row(calls[1]));
        assert_ne!(row(calls[0]), row(&calls[0].replace("[2]", "[3]")));
    }

    /// pair-dedup adds cleaned texts; an export may hold nothing else.
    #[test]
    fn a_pair_is_the_same_with_and_without_cleaned_texts() {
        let row = |line: &str| read(line).unwrap().row;
        let pair = row(r#"{"id":"1","tweet":"@a t","reply":"r"}"#);
        let both = r#"{"id":"1","tweet":"@a t","reply":"r","tweet_normalized":"t","reply_normalized":"r"}"#;
        assert_eq!(pair, row(both));
        let normalized = Wording {
            normalized: true,
            ..wording()
        };
        let cleaned = |tweet: &str| {
            let line = format!(
                r#"{{"id":"1","tweet":"","reply":" ","tweet_normalized":"{tweet}","reply_normalized":"r"}}"#
            );
            normalized.read(&Record::parse(&line).unwrap()).unwrap().row
        };
        assert_eq!(cleaned("t"), row(r#"{"id":"1","tweet":"t","reply":"r"}"#));
        assert_ne!(cleaned("t"), cleaned("u"));
    }

    #[test]
    fn what_would_not_reach_the_model_is_refused_with_a_remedy() {
        let turn =
            |turn: &str| format!(r#"{{"messages":[{{"role":"user","content":"u"}},{turn}]}}"#);
        for (line, said) in [
            (
                turn(r#"{"role":"developer","content":"x"}"#),
                "key `messages`: turn 2: no role `developer`: there are system, user, assistant, tool; write `system`?",
            ),
            (turn(r#"{"role":"User","content":"x"}"#), "write `user`?"),
            (
                turn(r#"{"role":"asistant","content":"x"}"#),
                "write `assistant`?",
            ),
            (
                turn(r#"{"role":"zzz","content":"x"}"#),
                "user, assistant, tool",
            ),
            (turn(r#"{"content":"x"}"#), "turn 2: no `role`"),
            (turn(r#"{"role":3,"content":"x"}"#), "turn 2: its role is 3; there are system"),
            (turn(r#"{"role":"user"}"#), "turn 2: no `content`"),
            (
                turn(r#"{"role":"user","content":[{"type":"text","text":"x"},{"type":"image"}]}"#),
                "no model for images",
            ),
            (
                turn(r#"{"role":"user","content":[{"type":"text"}]}"#),
                "turn 2: `content` holds other parts",
            ),
            (
                turn(r#"{"role":"assistant","content":"","tool_calls":"x"}"#),
                "`tool_calls` is not a list",
            ),
            (
                turn(r#"{"role":"assistant","content":"","tool_calls":[{}]}"#),
                "`tool_calls` holds something else",
            ),
            (
                turn(r#"{"role":"assistant","content":"","tool_calls":[{"name":"f"}]}"#),
                "`tool_calls` holds something else",
            ),
            (
                turn(r#"{"role":"user","content":"","tool_calls":[{"name":"f","arguments":{}}]}"#),
                "only the assistant",
            ),
            (turn("3"), "turn 2: not an object"),
            (r#"{"messages":[]}"#.into(), "key `messages`: has no turns"),
            (
                r#"{"messages":[],"completion":"x","prompt":"p"}"#.into(),
                "key `messages`: `completion` is there as well",
            ),
            (
                r#"{"id":"1","tweet":"t","reply":"r","prompt":"p","completion":"c"}"#.into(),
                "key `completion`: `reply` is there as well",
            ),
            (
                turn(r#"{"role":"user","content":null}"#),
                "turn 2: `content` is null",
            ),
            (
                r#"{"messages":[],"tools":[{}]}"#.into(),
                "key `tools`: tool 1: not a schema",
            ),
            (
                r#"{"messages":[],"tools":[{"name":"a"},1]}"#.into(),
                "key `tools`: tool 2",
            ),
            (r#"{"messages":[],"tools":"[]"}"#.into(), "without quotes"),
            (
                r#"{"text":"x"}"#.into(),
                "`tweet` with `reply`, `messages`, or `prompt` with `completion`",
            ),
            (
                r#"{"conversations":[{"from":"human","value":"x"},{"from":"narrator","value":"y"}]}"#.into(),
                "key `conversations`: turn 2: no role `narrator`",
            ),
            (
                r#"{"conversations":[{"from":"human"}]}"#.into(),
                "key `conversations`: turn 1: no `content`",
            ),
            (
                r#"{"prompt":[{"role":"assistant","content":"x"}],"completion":[{"role":"assistant","content":"y"}]}"#.into(),
                "key `prompt`: has turns of the assistant, which would be learnt",
            ),
            (
                r#"{"prompt":"x","completion":[{"role":"assistant","content":"y"}]}"#.into(),
                "key `completion`: is a list of turns, where `prompt`",
            ),
            (r#"{"prompt":"x"}"#.into(), "`completion` is missing"),
            // Columns of every form, and no answer.
            (
                r#"{"id":"1","messages":null,"tweet":"a","reply":null,"completion":null}"#.into(),
                "`reply` is missing",
            ),
            (
                r#"{"messages":null,"tweet":null}"#.into(),
                "`messages` is missing",
            ),
            (
                r#"{"completion":"x"}"#.into(),
                "key `prompt`: missing or empty",
            ),
            (
                r#"{"prompt":[{"role":"user","content":"x"}],"completion":"x"}"#.into(),
                "key `prompt`: is a list of turns, where `prompt`",
            ),
            (
                r#"{"messages":"hello"}"#.into(),
                "key `messages`: invalid type: string \"hello\", expected a sequence",
            ),
        ] {
            let error = read(&line).unwrap_err().to_string();
            assert!(error.contains(said), "{line}: {error}");
            assert!(!error.contains("line 1"), "{error}");
        }
    }
}
