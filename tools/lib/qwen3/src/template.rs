//! A model's own chat template, rendered as transformers renders it.
//!
//! The template is the model's data, a Jinja program that turns messages into
//! the one text the model was trained on; writing that text by hand would be
//! right until the first model whose template differs. One thing transformers
//! offers is left out: `strftime_now`, since a prompt that holds today's date
//! makes two runs of the same command differ.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value as Json};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; `null`, as where a turn is nothing but tool calls, is an empty one.
    #[serde(deserialize_with = "null_is_empty")]
    pub content: String,
    /// What else the template looks at: `reasoning_content`, `tool_calls`.
    #[serde(flatten)]
    pub rest: Map<String, Json>,
}

fn null_is_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Option::<String>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Message {
    /// Instructions that hold for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What is put to the model.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model answers.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Whether it neither says nor calls anything.
    pub fn is_empty(&self) -> bool {
        let calls = self.rest.get("tool_calls").and_then(Json::as_array);
        self.content.trim().is_empty() && calls.is_none_or(Vec::is_empty)
    }

    fn new(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            rest: Map::new(),
        }
    }
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// Functions the model may call, as JSON schemas.
    pub tools: Vec<Json>,
    /// End with the opening of an assistant turn, for the model to go on from.
    pub add_generation_prompt: bool,
    /// Qwen3: `Some(false)` answers its own reasoning with an empty block.
    pub enable_thinking: Option<bool>,
}

/// A compiled template.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    /// `bos_token` and the like, which a template may name.
    tokens: Vec<(String, String)>,
}

const NAME: &str = "chat template";

/// What a template may use up: steps, or for each 64 bytes that it makes. The longest row that
/// a model has positions for takes less than a quarter of it.
const FUEL: u64 = 1 << 22;

/// Ends templates, which are strangers' programs, that would run or grow without end.
pub(crate) fn limit(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(FUEL));
}

/// Says what the limit was, where one was reached: the library speaks of fuel.
pub(crate) fn exhausted(error: minijinja::Error) -> minijinja::Error {
    match error.kind() {
        ErrorKind::OutOfFuel => {
            let line = error
                .line()
                .map_or(String::new(), |n| format!(" at line {n}"));
            let cause = format!(
                "it was ended{line} after {FUEL} steps, or as many pieces of text: does it repeat or double \
                 something without end?"
            );
            minijinja::Error::new(ErrorKind::InvalidOperation, cause)
        }
        _ => error,
    }
}

impl Template {
    /// The template as it was given.
    pub(crate) fn source(&self) -> String {
        let template = self.environment.get_template(NAME);
        let template = template.expect("new adds a template of this name");
        template.source().to_owned()
    }

    pub(crate) fn new(
        source: String,
        tokens: Vec<(String, String)>,
    ) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?;
        environment.set_syntax(syntax);
        limit(&mut environment);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source)?;
        Ok(Self {
            environment,
            tokens,
        })
    }

    pub(crate) fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, minijinja::Error> {
        let messages = messages.iter().map(|message| {
            let own = [
                ("role", Value::from(&message.role)),
                ("content", Value::from(&message.content)),
            ];
            let rest = message
                .rest
                .iter()
                .map(|(key, value)| (key.as_str(), to_jinja(value)));
            Value::from_pairs(own.into_iter().chain(rest))
        });
        let tools = match &options.tools[..] {
            [] => Value::from(()),
            tools => tools.iter().map(to_jinja).collect(),
        };
        let mut context = vec![
            ("messages", messages.collect()),
            ("tools", tools),
            ("documents", Value::from(())),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
        ];
        context.extend(
            options
                .enable_thinking
                .map(|on| ("enable_thinking", Value::from(on))),
        );
        context.extend(
            self.tokens
                .iter()
                .map(|(name, token)| (name.as_str(), Value::from(token))),
        );
        self.environment
            .get_template(NAME)?
            .render(Value::from_pairs(context))
            .map_err(exhausted)
    }
}

pub(crate) fn to_jinja(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(truth) => Value::from(*truth),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (_, Some(number)) => Value::from(number),
            _ => Value::from(number.as_f64()),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.iter().map(to_jinja).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key, to_jinja(value))))
        }
    }
}

/// `tojson` as transformers has it: Python's `json.dumps` with
/// `ensure_ascii=False`, which escapes nothing for HTML and puts a space after
/// each comma and colon. Its layout arguments are refused rather than ignored.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    if options
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false)
    {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "tojson(ensure_ascii=true) is not supported",
        ));
    }
    options.assert_all_used()?;
    let mut out = String::new();
    write_json(state, value, DEPTH, &mut out)?;
    Ok(out)
}

/// Most levels of a value, those that a row's JSON may have. What a template makes may hold itself.
const DEPTH: usize = 128;

fn write_json(
    state: &State,
    value: &Value,
    depth: usize,
    out: &mut String,
) -> Result<(), minijinja::Error> {
    // A list may hold another a thousand times, and be small.
    state.consume_fuel(1)?;
    let Some(depth) = depth.checked_sub(1) else {
        let cause = format!("tojson of a value of more than {DEPTH} levels");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, cause));
    };
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_json(state, &item, depth, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_text(&key.to_string(), out);
                out.push_str(": ");
                write_json(state, &value.get_item(&key)?, depth, out)?;
            }
            out.push('}');
        }
        _ => {
            let text = value.to_string();
            state.consume_fuel(text.len() as u64 / 64)?;
            write_text(&text, out);
        }
    }
    Ok(())
}

/// A string as Python writes it: all but quotes, backslashes and control
/// characters as they are. U+007F is no control character to it.
fn write_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr` of a float: the fewest digits that read back the same, with
/// an exponent below 1e-4 and from 1e16 on, of two digits at least.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if x != 0.0 && !(-4..16).contains(&e) => {
            let sign = if e < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", e.abs())
        }
        _ if x.is_finite() => format!("{x:?}"),
        // What json.dumps writes, valid JSON or not.
        _ if x.is_nan() => "NaN".into(),
        _ => if x > 0.0 { "Infinity" } else { "-Infinity" }.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_as_python_does() {
        // repr() of Python 3.11.
        for (x, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5e-3, "-0.0025"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789.125, "123456789.125"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (1e100, "1e+100"),
            (5e-324, "5e-324"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }
}
