//! How a tweet→reply pair is put to the model: a Jinja template over the fields
//! of its record, whose text becomes the user's turn.
//!
//! Training and generation must ask in the same words, so both have it from here.
//! A template that would spoil a run in silence is refused: one that shows the
//! model the reply, that asks every pair the same, or that names a field which a
//! record has not.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object};
use minijinja::{AutoEscape, Environment, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use crate::template::{exhausted, limit, to_jinja};

/// A compiled template for the user's turn.
#[derive(Debug)]
pub struct PromptTemplate {
    environment: Environment<'static>,
    /// The fields that it names.
    names: BTreeSet<String>,
}

/// What is wrong with a template, or with a record for it.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// It is no Jinja.
    #[error("{0}")]
    Syntax(minijinja::Error),
    /// It would tell the model what it is to say.
    #[error("it names `{0}`, which is what the model is to learn to say")]
    Reply(String),
    /// It is the same for every pair.
    #[error(
        "it names no field of the pair, such as {{{{ tweet }}}}: every prompt would be the same"
    )]
    Constant,
    /// A field that it shows is missing from a record, or `null`.
    #[error("missing, and the prompt template names it{}", nearest.as_ref().map(|n| format!("; the nearest there is `{n}`")).unwrap_or_default())]
    Missing {
        /// The field.
        name: String,
        /// The field of the record that is spelt most like it.
        nearest: Option<String>,
    },
    /// It makes an empty turn of a record.
    #[error("it renders as nothing for this row")]
    Empty,
    /// It fails on a record.
    #[error("{0}")]
    Render(minijinja::Error),
}

impl PromptError {
    /// The key to blame: the missing field, else that of the settings.
    pub fn key(&self) -> &str {
        match self {
            Self::Missing { name, .. } => name,
            _ => "prompt_template",
        }
    }
}

const NAME: &str = "prompt template";

/// The texts that are to be learnt.
const REPLY: [&str; 2] = ["reply", "reply_normalized"];

impl PromptTemplate {
    /// Compiles a template. Lines that hold nothing but a block leave no trace, as in
    /// chat templates, and one line break at the end is dropped.
    ///
    /// # Errors
    /// If it is no Jinja, uses a filter, test or function that there is not, names the
    /// reply's text, or names no field at all.
    pub fn new(source: &str) -> Result<Self, PromptError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(PromptError::Syntax)?;
        environment.set_syntax(syntax);
        limit(&mut environment);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        // `{% if lang %}` may ask for a field; `{{ lang }}` without one is an error.
        environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(PromptError::Syntax)?;
        let template = environment
            .get_template(NAME)
            .map_err(PromptError::Syntax)?;
        let globals: BTreeSet<&str> = environment.globals().map(|(name, _)| name).collect();
        let names: BTreeSet<String> = template
            .undeclared_variables(false)
            .into_iter()
            .filter(|name| !globals.contains(name.as_str()))
            .collect();
        if let Some(reply) = REPLY.into_iter().find(|&reply| names.contains(reply)) {
            return Err(PromptError::Reply(reply.into()));
        }
        if names.is_empty() {
            return Err(PromptError::Constant);
        }
        let template = Self { environment, names };
        // Filters are looked up only where they are used. Two trials, with every field
        // false and with every field true, come by most branches.
        for truth in [false, true] {
            let trial = template.filled(&Map::new(), |_| Some(Value::from_object(Blank(truth))));
            if let Err(error) = trial
                && is_unknown(&error)
            {
                return Err(PromptError::Syntax(error));
            }
        }
        Ok(template)
    }

    /// The user's turn for a record with these fields, `tweet` being the text that
    /// the model is to see. A field that is `null` counts as missing.
    ///
    /// # Errors
    /// If the template shows a field that is missing, renders as white space, or
    /// fails otherwise.
    pub fn render(&self, fields: &Map<String, Json>) -> Result<String, PromptError> {
        let blank = |_: &str| Some(Value::from_object(Blank(false)));
        let text = self.filled(fields, |_| None).map_err(|error| {
            let undefined = |outcome: Result<String, minijinja::Error>| {
                outcome.is_err_and(|error| error.kind() == ErrorKind::UndefinedError)
            };
            // Templates may ask whether a field is there: to blame is one without which
            // it fails when all others that are missing are blank.
            let at_fault = |name: &&String| {
                known(fields, name).is_none()
                    && undefined(self.filled(fields, |other| {
                        blank(other).filter(|_| other != name.as_str())
                    }))
            };
            if error.kind() != ErrorKind::UndefinedError || undefined(self.filled(fields, blank)) {
                return PromptError::Render(error);
            }
            match self.names.iter().find(at_fault) {
                Some(name) => PromptError::Missing {
                    nearest: nearest(name, fields),
                    name: name.clone(),
                },
                None => PromptError::Render(error),
            }
        })?;
        match text.trim().is_empty() {
            true => Err(PromptError::Empty),
            false => Ok(text),
        }
    }

    /// The template with these fields; what is missing is taken from `instead`.
    fn filled(
        &self,
        fields: &Map<String, Json>,
        instead: impl Fn(&str) -> Option<Value>,
    ) -> Result<String, minijinja::Error> {
        let value = |name: &str| known(fields, name).map(to_jinja).or_else(|| instead(name));
        let names = self.names.iter().map(String::as_str);
        let context = names.filter_map(|name| Some((name, value(name)?)));
        let template = self.environment.get_template(NAME)?;
        let rendered = template.render(Value::from_pairs(context));
        rendered.map_err(exhausted)
    }
}

/// The field of a record, if it has it.
fn known<'a>(fields: &'a Map<String, Json>, name: &str) -> Option<&'a Json> {
    fields.get(name).filter(|value| !value.is_null())
}

/// Whether the template asks for something that there is not.
fn is_unknown(error: &minijinja::Error) -> bool {
    use ErrorKind::{UnknownFilter, UnknownFunction, UnknownTest};
    [UnknownFilter, UnknownFunction, UnknownTest].contains(&error.kind())
}

/// Stands in for a missing field: a text of no letters, whatever is asked of it, and
/// as true as it says.
#[derive(Debug)]
struct Blank(bool);

impl Object for Blank {
    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::from_dyn_object(self.clone()))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match self.0 {
            true => Enumerator::Values(vec![Value::from_dyn_object(self.clone())]),
            false => Enumerator::Empty,
        }
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.0
    }

    fn call(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        _: &[Value],
    ) -> Result<Value, minijinja::Error> {
        let cause = "there is no function or method of this name";
        Err(minijinja::Error::new(ErrorKind::UnknownFunction, cause))
    }

    fn render(self: &Arc<Self>, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

/// The field that is spelt most like `name`, the reply's texts aside.
fn nearest(name: &str, fields: &Map<String, Json>) -> Option<String> {
    fields
        .iter()
        .filter(|(field, value)| !value.is_null() && !REPLY.contains(&field.as_str()))
        .map(|(field, _)| (strsim::jaro_winkler(name, field), field))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, field)| field.clone())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn render(template: &str, record: Json) -> Result<String, PromptError> {
        let Json::Object(fields) = record else {
            panic!("not an object")
        };
        PromptTemplate::new(template)?.render(&fields)
    }

    #[test]
    fn fields_stand_in_the_text_as_they_are() {
        let record = serde_json::json!({"tweet": "a <b> & {{ c }}\n", "likes": 9007199254740993_i64, "author": {"name": "Ada"}, "lang": null});
        for (template, text) in [
            ("{{ tweet }}", "a <b> & {{ c }}\n"),
            (
                "By {{ author.name }} ({{ likes }}):\n{{ tweet|trim }}\n",
                "By Ada (9007199254740993):\na <b> & {{ c }}",
            ),
            (
                "{% if lang %}In {{ lang }}: {% endif %}{{ tweet|trim }}",
                "a <b> & {{ c }}",
            ),
            ("{{ lang|default('any') }} {{ tweet|length }}", "any 16"),
            (
                "{% for i in range(2) %}\n  {% if i %}\n{{ likes + i }}\n  {% endif %}\n{% endfor %}",
                "9007199254740994\n",
            ),
        ] {
            assert_eq!(
                render(template, record.clone()).unwrap(),
                text,
                "{template}"
            );
        }
    }

    #[test]
    fn what_would_spoil_a_run_is_refused_by_name() {
        let record = serde_json::json!({"tweet": "t", "tweet_likes": 3, "reply": "r", "author": {"name": "Ada"}, "lang": null});
        for (template, said) in [
            ("{{ tweet", "syntax error"),
            (
                "{{ tweet }} {{ reply }}",
                "`reply`, which is what the model is to learn",
            ),
            (
                "{% set x = reply_normalized %}{{ x }}",
                "`reply_normalized`",
            ),
            ("{ tweet }", "names no field"),
            ("{{ range(3) }}", "names no field"),
            ("{{ tweet_like }}", "the nearest there is `tweet_likes`"),
            ("{{ repl }}", "missing"),
            ("{{ lang }} {{ tweet }}", "missing"),
            ("{{ author.nam }}", "undefined"),
            (
                "{% if lang %}{{ lang }}{% endif %}{{ author.nam }}",
                "undefined",
            ),
            (
                "{% if lang %}{{ lang }}{% endif %}{{ tweet_like }}",
                "the nearest there is `tweet_likes`",
            ),
            ("{{ autor.name }}", "the nearest there is `author`"),
            ("{{ tweet.missing.deeper }}", "undefined"),
            ("{{ tweet|nothing }}", "nothing"),
            (
                "{% if lang %}{{ lang|nothing }}{% endif %}{{ tweet }}",
                "unknown filter",
            ),
            (
                "{% if not tweet %}{{ nothing() }}{% endif %}{{ tweet }}",
                "unknown function",
            ),
            (
                "{% if tweet_likes > 5 %}{{ tweet }}{% endif %}",
                "renders as nothing",
            ),
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}{{ tweet }}{% endfor %}{% endfor %}",
                "double something",
            ),
        ] {
            let error = render(template, record.clone()).unwrap_err().to_string();
            assert!(error.contains(said), "{template}: {error}");
            assert!(!error.contains("`reply`; "), "{error}");
        }
    }
}
