//! Settings in layers: flags over environment over YAML over defaults.
//!
//! The layers meet as a JSON tree. The YAML is first read into the settings
//! type and written back, so that aliases and older spellings have become the
//! canonical keys before anything is laid over them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeOwned, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use serde_saphyr::options::NonFiniteFloatPolicy;
use serde_saphyr::{Spanned, from_str_with_options};
use settings::{DataSettings, EvalSettings, TrainSettings};

use crate::{Failure, PrintConfig};

const ENV_PREFIX: &str = "PAIRS__";

/// Where a value comes from that nobody gave.
const DEFAULT: &str = "default";

/// Settings given on the command line, by dotted path.
#[derive(Default)]
pub struct Flags(Vec<(String, Value)>);

impl Flags {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The flag that sets `path`, where it was given.
    #[must_use]
    pub fn set<T: Serialize>(mut self, path: &str, value: &Option<T>) -> Self {
        if let Some(value) = value {
            // Plain data: numbers, strings, lists, which always serialise.
            let value = serde_json::to_value(value).unwrap_or(Value::Null);
            self.0.push((path.to_owned(), value));
        }
        self
    }
}

/// The settings, and where each came from.
#[derive(Clone, Debug)]
pub struct Resolved<T> {
    /// The settings.
    pub settings: T,
    sections: Vec<String>,
    leaves: Vec<(String, Value, String)>,
}

impl<T> Resolved<T> {
    /// `key = value` lines of this tool's sections.
    pub fn show(&self, form: PrintConfig) -> String {
        let mut text = String::new();
        for (path, value, source) in &self.leaves {
            let mine = |s: &String| {
                path == s
                    || path
                        .strip_prefix(s.as_str())
                        .is_some_and(|rest| rest.starts_with('.'))
            };
            if !self.sections.iter().any(mine) {
                continue;
            }
            match form {
                PrintConfig::Full => {
                    text.push_str(&format!("{:<44} # {source}\n", format!("{path} = {value}")))
                }
                PrintConfig::Key => text.push_str(&format!("{path} = {value}\n")),
            }
        }
        text
    }

    /// The error for a value that parses and cannot be, with where it was given: `cause`
    /// goes on from the key, as in `is 0; it must be above 0`. Of a map, its first entry
    /// tells where.
    pub fn wrong(&self, key: &str, cause: impl fmt::Display) -> Failure {
        let given = self.leaves.iter().find(|(path, ..)| {
            let rest = path.strip_prefix(key);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        });
        Failure::Usage(match given {
            Some((.., source)) if source != DEFAULT => format!("{source}: {key} {cause}"),
            _ => format!("{key} {cause}"),
        })
    }

    /// SHA-256 of this tool's settings, wherever they came from.
    pub fn sha256(&self) -> String {
        crate::sha256_hex(self.show(PrintConfig::Key).as_bytes())
    }
}

/// Variables that are no settings and look like some of these sections, each with what it
/// would have to be called.
pub(crate) fn lookalikes(sections: &[&str]) -> Vec<(String, String)> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let lookalike = |name: String| {
        let rest = name.strip_prefix("PAIRS_")?.to_lowercase();
        let meant = sections.iter().find_map(|section| {
            let key = rest.strip_prefix(section)?.strip_prefix('_')?;
            Some(format!("{section}__{key}").to_uppercase())
        })?;
        Some((name, format!("{ENV_PREFIX}{meant}")))
    };
    names.filter_map(lookalike).collect()
}

/// The variables that are settings. Others may be what they like, also no UTF-8.
pub(crate) fn environment() -> Result<Vec<(String, String)>, Failure> {
    let ours = std::env::vars_os()
        .filter(|(name, _)| name.as_encoded_bytes().starts_with(ENV_PREFIX.as_bytes()));
    ours.map(|(name, value)| {
        let shown = name.to_string_lossy().into_owned();
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => Ok((name, value)),
            _ => Err(Failure::Usage(format!(
                "environment variable {shown}: is not UTF-8"
            ))),
        }
    })
    .collect()
}

pub(crate) fn resolve<T>(
    file: Option<&Path>,
    sections: &[&str],
    flags: Flags,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Resolved<T>, Failure>
where
    T: Default + Serialize + DeserializeOwned,
{
    let tree_of_defaults = to_tree(&T::default());
    let (from_file, written, lines) = match file {
        None => (T::default(), Value::Null, KeyLines::default()),
        Some(path) => read_yaml(path)?,
    };
    let mut tree = to_tree(&from_file);
    let written: BTreeMap<_, _> = leaves(&written).into_iter().collect();
    let defaults: BTreeMap<_, _> = leaves(&tree_of_defaults).into_iter().collect();
    let mut sources: BTreeMap<String, String> = leaves(&tree)
        .into_iter()
        .filter(|(path, value)| written.contains_key(path) || defaults.get(path) != Some(value))
        .filter_map(|(path, _)| {
            let source = format!("{}{}", file?.display(), lines.of(&path));
            Some((path, source))
        })
        .collect();

    let mut overlay = |path: &str, value: Value, source: String| -> Result<(), Failure> {
        set(&mut tree, path, value)
            .map_err(|cause| Failure::Usage(format!("{source}: {cause}")))?;
        sources.insert(path.to_owned(), source);
        Ok(())
    };
    let mut variables: Vec<_> = environment
        .into_iter()
        .filter(|(name, _)| name.starts_with(ENV_PREFIX))
        .collect();
    variables.sort();
    for (name, text) in variables {
        let path = name[ENV_PREFIX.len()..].to_lowercase().replace("__", ".");
        let top = path.split('.').next().unwrap_or_default();
        if tree_of_defaults.get(top).is_none() {
            another_files_section(top)
                .map_err(|cause| Failure::Usage(format!("environment variable {name}: {cause}")))?;
            continue;
        }
        let value = serde_saphyr::from_str(&text).unwrap_or(Value::String(text));
        overlay(&path, value, format!("environment variable {name}"))?;
    }
    for (path, value) in flags.0 {
        let flag = path.rsplit('.').next().unwrap_or(&path).replace('_', "-");
        if value.is_null() {
            // JSON has neither: they came as null.
            let cause = format!("flag for {flag}: NaN and infinity are not a number to work with");
            return Err(Failure::Usage(cause));
        }
        overlay(&path, value, format!("flag for {flag}"))?;
    }
    let settings: T = from_tree(&tree).map_err(|(path, cause)| {
        let source = sources
            .get(&path)
            .cloned()
            .unwrap_or_else(|| "settings".into());
        Failure::Usage(format!("{source}: {path}: {cause}"))
    })?;
    let leaves = leaves(&to_tree(&settings))
        .into_iter()
        .map(|(path, value)| {
            let source = sources
                .get(&path)
                .cloned()
                .unwrap_or_else(|| DEFAULT.into());
            (path, value, source)
        })
        .collect();
    Ok(Resolved {
        settings,
        sections: sections.iter().map(|&s| s.to_owned()).collect(),
        leaves,
    })
}

/// The three files share one environment: a section of another one is none of ours, but
/// one that none of them has is a slip.
fn another_files_section(name: &str) -> Result<(), String> {
    let trees = [
        to_tree(&DataSettings::default()),
        to_tree(&TrainSettings::default()),
        to_tree(&EvalSettings::default()),
    ];
    let sections: Vec<&String> = trees
        .iter()
        .filter_map(Value::as_object)
        .flat_map(Map::keys)
        .collect();
    if sections.iter().any(|section| *section == name) {
        return Ok(());
    }
    let near = nearest(name, sections.into_iter().map(String::as_str));
    Err(format!("no section `{name}`{near}"))
}

/// `; the nearest known one is …`, where any is known.
fn nearest<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> String {
    known
        .map(|known| (strsim::jaro_winkler(unknown, known), known))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| format!("; the nearest known one is `{known}`"))
        .unwrap_or_default()
}

/// The settings of a YAML file, the tree as it was written, and where its keys stand.
fn read_yaml<T: Default + Serialize + DeserializeOwned>(
    path: &Path,
) -> Result<(T, Value, KeyLines), Failure> {
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::Usage(format!("--config {name}: {e}")))?;
    // A `.nan` comes as a text: its key can tell what it should be.
    let options =
        serde_saphyr::options! { non_finite_float_policy: NonFiniteFloatPolicy::AsString };
    let mut tree: Value = from_str_with_options(&text, options.clone()).map_err(|error| {
        let line = (error.location()).map_or_else(String::new, |at| format!(":{}", at.line()));
        Failure::Usage(format!("{name}{line}: {}", yaml_error(&error)))
    })?;
    if tree.is_null() {
        return Ok((T::default(), tree, KeyLines::default()));
    }
    if !tree.is_object() {
        let what = match tree.is_array() {
            true => "a list".into(),
            false => tree.to_string(),
        };
        let cause = format!("{name}: the whole is {what}; it must be sections of keys");
        return Err(Failure::Usage(cause));
    }
    // It was read once already; where that fails, no line is told.
    let lines: KeyLines = from_str_with_options(&text, options).unwrap_or_default();
    drop_empty_sections(&mut tree, &to_tree(&T::default()));
    match from_tree(&tree) {
        Ok(settings) => Ok((settings, tree, lines)),
        Err((key, cause)) => {
            let line = lines.of(&key);
            Err(Failure::Usage(format!("{name}{line}: {key}: {cause}")))
        }
    }
}

/// The lines of a YAML's keys, counted from 1, by their dotted paths as they were written:
/// an alias is another key than the one it stands for.
#[derive(Default)]
struct KeyLines(BTreeMap<String, u64>);

impl KeyLines {
    /// `:LINE`, where the key stands in the file; of a list's item, that of the list.
    fn of(&self, path: &str) -> String {
        let list = path.split_once('[').map_or(path, |(list, _)| list);
        let line = self.0.get(path).or_else(|| self.0.get(list));
        line.map_or_else(String::new, |line| format!(":{line}"))
    }
}

impl<'de> Deserialize<'de> for KeyLines {
    fn deserialize<D: Deserializer<'de>>(yaml: D) -> Result<Self, D::Error> {
        yaml.deserialize_any(KeysOf)
    }
}

/// Takes any value, and keeps the keys of sections.
struct KeysOf;

impl<'de> Visitor<'de> for KeysOf {
    type Value = KeyLines;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut section: A) -> Result<KeyLines, A::Error> {
        let mut lines = BTreeMap::new();
        while let Some(key) = section.next_key::<Spanned<String>>()? {
            let (name, line) = (key.value, key.referenced.line());
            let KeyLines(inside) = section.next_value()?;
            lines.extend((inside.into_iter()).map(|(path, line)| (format!("{name}.{path}"), line)));
            lines.insert(name, line);
        }
        Ok(KeyLines(lines))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<KeyLines, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(KeyLines::default())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }

    fn visit_unit<E: Error>(self) -> Result<KeyLines, E> {
        Ok(KeyLines::default())
    }
}

/// What is wrong with a YAML, for someone who writes YAML and not programs: the library
/// answers some errors with advice on how to call it.
fn yaml_error(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};
    match error.without_snippet() {
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("{key}: this key is there twice")
        }
        Error::MultipleDocuments { .. } => {
            "a second document begins here; settings are one: remove the `---`".into()
        }
        other => format!(
            "not valid YAML: {}",
            UserMessageFormatter.format_message(other)
        ),
    }
}

/// A section whose keys are all commented out is null, and means its defaults.
fn drop_empty_sections(tree: &mut Value, defaults: &Value) {
    if let Some(sections) = tree.as_object_mut() {
        sections.retain(|name, section| {
            let known = defaults.get(name).filter(|known| known.is_object());
            known.is_none_or(|known| {
                drop_empty_sections(section, known);
                !section.is_null()
            })
        });
    }
}

/// How serde begins where a key has no value.
const NULL: &str = "invalid type: null";

/// serde's account of a wrong value, for someone who writes YAML and not programs.
fn in_words(message: &str) -> String {
    let Some((found, expected)) = message.split_once(", expected ") else {
        return message.to_owned();
    };
    if found == NULL {
        return "is empty: give it a value, or leave it out".into();
    }
    let expected = match expected {
        "f32" | "f64" => "a number",
        "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i64" => "a whole number",
        "a string" => "a text, in quotes",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a section of keys",
        name if name.starts_with("struct ") => "a section of keys",
        other => other,
    };
    let kinds = [
        ("integer ", ""),
        ("floating point ", ""),
        ("string ", ""),
        ("boolean ", ""),
        ("sequence", "a list"),
        ("map", "a section of keys"),
    ];
    let wrong =
        (found.strip_prefix("invalid type: ")).or_else(|| found.strip_prefix("invalid value: "));
    let is = match (wrong, found.strip_prefix("unknown variant ")) {
        (Some(wrong), _) => {
            let said = kinds.iter().find_map(|(theirs, ours)| {
                let rest = wrong.strip_prefix(theirs)?;
                Some(format!("is {ours}{}", rest.trim_matches('`')))
            });
            said.unwrap_or_else(|| format!("is {wrong}"))
        }
        (None, Some(value)) => format!("is {value}"),
        (None, None) => return format!("{found}, expected {expected}"),
    };
    // `010` and `4.0` are read as fractional numbers, and so shown.
    let whole = (is.strip_prefix("is "))
        .and_then(|text| text.strip_suffix(".0"))
        .filter(|whole| match expected {
            "a whole number" => true,
            "a whole number, 0 or more" => !whole.starts_with('-'),
            _ => false,
        });
    match whole {
        Some(whole) => {
            format!("{is}; it must be {expected}: write {whole}, no point and no 0 in front")
        }
        None => format!("{is}; it must be {expected}"),
    }
}

/// Reads settings from a tree; the error names the key and, for one that does
/// not exist, the nearest that does.
fn from_tree<T: Serialize + DeserializeOwned>(tree: &Value) -> Result<T, (String, String)> {
    let settings: T = serde_path_to_error::deserialize(tree).map_err(|error| {
        let mut path = error.path().to_string();
        let message = error.inner().to_string();
        let mut quoted = message.split('`').skip(1).step_by(2);
        if is_of_a_choice(&message) {
            return (path.clone(), choices::<T>(tree, &path));
        }
        if !message.starts_with("unknown field") {
            return (path, in_words(&message));
        }
        let unknown = quoted.next().unwrap_or_default();
        if !path.ends_with(unknown) {
            path = if path == "." {
                unknown.to_owned()
            } else {
                format!("{path}.{unknown}")
            };
        }
        (path, format!("unknown key{}", nearest(unknown, quoted)))
    })?;
    match listed_section(tree, &to_tree(&settings)) {
        None => Ok(settings),
        Some(path) => Err((path, "is a list; it must be a section of keys".into())),
    }
}

/// What serde says of a number or a list where one of several words belongs: not which.
const OF_A_CHOICE: [&str; 2] = ["expected string or map", "expected map with a single key"];

/// A key without a value is none of the words, but empty.
fn is_of_a_choice(message: &str) -> bool {
    OF_A_CHOICE.iter().any(|end| message.ends_with(end)) && !message.starts_with(NULL)
}

/// What such a value must be: serde names the words when it is given another one, so it
/// is given the value's own text.
fn choices<T: DeserializeOwned>(tree: &Value, path: &str) -> String {
    let mut tree = tree.clone();
    let pointer = format!("/{}", path.replace('.', "/"));
    if let Some(value) = tree.pointer_mut(&pointer) {
        *value = Value::String(value.to_string());
    }
    match T::deserialize(tree) {
        Err(error) if !is_of_a_choice(&error.to_string()) => in_words(&error.to_string()),
        _ => "it must be one of the words that this key knows".into(),
    }
}

/// The first section that was given as a list: serde takes one for a section's values in
/// the order of its keys, of which nobody who writes YAML knows.
fn listed_section(given: &Value, read: &Value) -> Option<String> {
    let (Value::Object(given), Value::Object(read)) = (given, read) else {
        return (given.is_array() && read.is_object()).then(String::new);
    };
    given.iter().find_map(|(key, given)| {
        let inside = listed_section(given, read.get(key)?)?;
        Some(match inside.as_str() {
            "" => key.clone(),
            inside => format!("{key}.{inside}"),
        })
    })
}

fn to_tree<T: Serialize>(settings: &T) -> Value {
    // Plain structs with string keys, which always serialise.
    serde_json::to_value(settings).unwrap_or(Value::Null)
}

/// The values of a tree by dotted path, in order. Lists count as values.
fn leaves(tree: &Value) -> Vec<(String, Value)> {
    fn walk(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, value) in map {
                    let path = if prefix.is_empty() {
                        key.clone()
                    } else {
                        format!("{prefix}.{key}")
                    };
                    walk(&path, value, out);
                }
            }
            value if !prefix.is_empty() => out.push((prefix.to_owned(), value.clone())),
            _ => {}
        }
    }
    let mut out = Vec::new();
    walk("", tree, &mut out);
    out
}

fn set(tree: &mut Value, path: &str, value: Value) -> Result<(), String> {
    let mut at = tree;
    let mut keys = path.split('.').peekable();
    while let Some(key) = keys.next() {
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
        let map = at
            .as_object_mut()
            .ok_or_else(|| format!("{path}: `{key}` is inside a value, not a section"))?;
        if keys.peek().is_none() {
            map.insert(key.to_owned(), value);
            return Ok(());
        }
        at = map.entry(key).or_insert(Value::Null);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn resolve_train(
        yaml: &str,
        flags: Flags,
        env: &[(&str, &str)],
    ) -> Result<Resolved<TrainSettings>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), yaml).unwrap();
        let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        resolve(Some(file.path()), &["lora", "training"], flags, env).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_beat_environment_beats_yaml_beats_defaults() {
        let yaml = "lora: {r: 4, alpha: 5}\ntraining: {num_epochs: 3}\n";
        let env = [
            ("PAIRS__LORA__ALPHA", "6"),
            ("PAIRS__TRAINING__BATCH_SIZE", "7"),
            ("PAIRS__JUDGE__MODEL", "x"),
        ];
        let flags = Flags::new()
            .set("training.batch_size", &Some(8))
            .set("training.seed", &None::<u64>);
        let resolved = resolve_train(yaml, flags, &env).unwrap();
        let s = &resolved.settings;
        assert_eq!(
            (
                s.lora.rank,
                s.lora.alpha,
                s.training.num_epochs,
                s.training.batch_size
            ),
            (4, 6.0, 3.0, 8)
        );
        let shown = resolved.show(PrintConfig::Full);
        let source = |key: &str| {
            shown
                .lines()
                .find(|l| l.starts_with(key))
                .unwrap()
                .split("# ")
                .nth(1)
                .unwrap()
                .to_owned()
        };
        assert!(
            source("lora.rank").starts_with("/"),
            "an alias in the file counts as the file's"
        );
        assert_eq!(
            source("lora.alpha"),
            "environment variable PAIRS__LORA__ALPHA"
        );
        assert_eq!(source("training.batch_size"), "flag for batch-size");
        assert_eq!(source("training.seed"), "default");
        assert!(!shown.contains("model.path"), "only this tool's sections");
    }

    #[test]
    fn a_wrong_value_names_where_it_was_given() {
        let yaml = "# rank: 1\nmodel: {path: rank:x}\nlora:\n  alpha: 3 # rank: 2\n  rank: 0\ntraining: {seed: 1, batch_size: 5}\n";
        let env = [("PAIRS__LORA__DROPOUT", "3")];
        let flags = Flags::new().set("training.learning_rate", &Some(7.0));
        let resolved = resolve_train(yaml, flags, &env).unwrap();
        for (key, said) in [
            ("lora.rank", ":5: lora.rank is wrong"),
            ("lora.alpha", ":4: lora.alpha is wrong"),
            ("training.batch_size", ":6: training.batch_size is wrong"),
            (
                "lora.dropout",
                "environment variable PAIRS__LORA__DROPOUT: lora.dropout is wrong",
            ),
            (
                "training.learning_rate",
                "flag for learning-rate: training.learning_rate is wrong",
            ),
            ("training.num_epochs", "training.num_epochs is wrong"),
        ] {
            let error = resolved.wrong(key, "is wrong").to_string();
            assert!(error.ends_with(said), "{error}");
            assert!(said.starts_with(':') != error.starts_with(said), "{error}");
        }
        // An alias has no line, but has its file, whatever else has the key's name.
        let aliased = "lora: {r: 0}\ndata:\n  prompt_template: |\n    rank: {tweet}\n";
        let resolved = resolve_train(aliased, Flags::new(), &[]).unwrap();
        let error = resolved.wrong("lora.rank", "is wrong").to_string();
        assert!(error.starts_with('/') && error.ends_with(": lora.rank is wrong"));
        let file = error.strip_suffix(": lora.rank is wrong").unwrap();
        assert!(!file.contains(':'), "{error}");
    }

    #[test]
    fn a_text_that_looks_like_a_key_is_none() {
        let yaml = "data:\n  system_prompt: |\n    lora:\n      rank: 3\n    eval_fraction: 2\n  eval_fraction: 0\n\
                    training:\n  \"seed\":\n    1\n\
                    lora:\n  rank_pattern:\n    layers.0.q_proj: 0\n  rank: 0\n";
        let resolved = resolve_train(yaml, Flags::new(), &[]).unwrap();
        for (key, line) in [
            ("data.eval_fraction", 6),
            ("training.seed", 8),
            ("lora.rank_pattern.layers.0.q_proj", 12),
            ("lora.rank", 13),
        ] {
            let error = resolved.wrong(key, "is wrong").to_string();
            let said = format!(":{line}: {key} is wrong");
            assert!(error.ends_with(&said), "{error}");
        }
    }

    #[test]
    fn the_same_settings_have_the_same_key_wherever_they_came_from() {
        let a = resolve_train("lora: {rank: 8}", Flags::new(), &[]).unwrap();
        let b = resolve_train(
            "# a comment\nmodel: {path: x}\n",
            Flags::new().set("lora.rank", &Some(8)),
            &[],
        )
        .unwrap();
        let c = resolve_train("lora: {rank: 9}", Flags::new(), &[]).unwrap();
        assert_eq!(a.sha256(), b.sha256());
        assert_ne!(a.sha256(), c.sha256());
    }

    #[test]
    fn typos_are_refused_with_the_nearest_key_and_the_line() {
        for (yaml, said) in [
            (
                "lora:\n  rnk: 8\n",
                ":2: lora.rnk: unknown key; the nearest known one is `rank`",
            ),
            (
                "trainin: {}\n",
                ":1: trainin: unknown key; the nearest known one is `training`",
            ),
            (
                "lora: {rank: many}\n",
                "lora.rank: is \"many\"; it must be a whole number, 0 or more",
            ),
            (
                "lora: {rank: -1}\n",
                "lora.rank: is -1; it must be a whole number, 0 or more",
            ),
            (
                "training: {max_steps: 010}\n",
                "training.max_steps: is 10.0; it must be a whole number, 0 or more: write 10, no point",
            ),
            ("lora: 3\n", ":1: lora: is 3; it must be a section of keys"),
            (
                "lora:\n  rank: 8\n  target_modules: 3\n",
                ":3: lora.target_modules: it must be a list of names, such as [q_proj, v_proj]",
            ),
            (
                "lora: {target_modules: [3]}\n",
                "lora.target_modules: it must be a list of names",
            ),
            (
                "lora: {rank_pattern: [q_proj]}\n",
                "lora.rank_pattern: is a list; it must be a section of keys",
            ),
            (
                "training:\n  max_memory: 8\n",
                ":2: training.max_memory: 8 has no unit; write 8GB, or 8GiB",
            ),
            (
                "training: {max_memory: 8000000000}\n",
                "training.max_memory: 8000000000 has no unit; write 8000000000B for bytes",
            ),
            (
                "training: {max_memory: [8GB]}\n",
                "training.max_memory: it must be a size such as 8GB or 8GiB",
            ),
            (
                "training: {packing: 7}\n",
                "training.packing: is 7; it must be true or false",
            ),
            (
                "training: {optim: sgd}\n",
                "training.optim: is `sgd`; it must be ",
            ),
            (
                "model: {quantization: 4}\n",
                "model.quantization: it must be `nf4` or `none`",
            ),
            ("model: {path: 3}\n", "model.path: is 3; it must be a text"),
            (
                "data: {system_prompt: true}\n",
                "data.system_prompt: is true; it must be a text, in quotes",
            ),
            ("lorra:\n", ":1: lorra: unknown key"),
            (
                "model:\n  bnb_4bit_quant: nf4\n",
                "model.bnb_4bit_quant: unknown key",
            ),
            (
                "lora:\n  rank: [1\n",
                ":2: not valid YAML: unclosed bracket",
            ),
            (
                "lora: {rank: 1}\nlora: {rank: 2}\n",
                ":2: lora: this key is there twice",
            ),
            (
                "lora: {rank: 1}\n---\nlora: {rank: 2}\n",
                "a second document begins here",
            ),
            (
                "training:\n  learning_rate: .nan\n",
                ":2: training.learning_rate: is \".nan\"; it must be a number",
            ),
            (
                "# 1\nlora: {alpha: 1, dropout: -.inf}\n",
                ":2: lora.dropout: is \"-.inf\"; it must be a number",
            ),
            (
                "lora: {alpha_pattern: {q_proj: .inf}}\n",
                ":1: lora.alpha_pattern.q_proj: is \".inf\"; it must be a number",
            ),
            (
                "training: {optim: 3}\n",
                "training.optim: is `3`; it must be one of `adamw`, ",
            ),
            (
                "training: {optim: [a]}\n",
                "training.optim: is `[\"a\"]`; it must be one of `adamw`, ",
            ),
            (
                "training: {lr_scheduler: {a: 1, b: 2}}\n",
                "training.lr_scheduler: is `{\"a\":1,\"b\":2}`; it must be one of `cosine`, ",
            ),
            (
                "model: {lm_head: 4}\n",
                "model.lm_head: is `4`; it must be `as_stored` or `nf4`",
            ),
            (
                "lora:\n  rank: null\n",
                ":2: lora.rank: is empty: give it a value, or leave it out",
            ),
            (
                "training: {optim: null}\n",
                "training.optim: is empty: give it a value, or leave it out",
            ),
            (
                "training:\n  lr_scheduler: \n",
                ":2: training.lr_scheduler: is empty: give it a value, or leave it out",
            ),
            (
                "# 5\nlora: [5, 7]\n",
                ":2: lora: is a list; it must be a section of keys",
            ),
            (
                "training: [1]\n",
                ":1: training: is a list; it must be a section of keys",
            ),
            ("training: []\n", "training: is a list; it must be"),
            ("[]\n", ": the whole is a list; it must be sections of keys"),
            (
                "- lora\n",
                ": the whole is a list; it must be sections of keys",
            ),
            ("x\n", ": the whole is \"x\"; it must be sections of keys"),
            (
                "model: {quantization: []}\n",
                "model.quantization: it must be `nf4` or `none`",
            ),
        ] {
            let error = resolve_train(yaml, Flags::new(), &[]).unwrap_err();
            assert!(error.contains(said), "{yaml}: {error}");
            assert_eq!(error.lines().count(), 1, "{yaml}: {error}");
        }
        let lists = [("PAIRS__LORA", "[5, 7]")];
        let error = resolve_train("", Flags::new(), &lists).unwrap_err();
        assert!(error.contains("PAIRS__LORA: lora: is a list"), "{error}");
        let error = resolve_train("", Flags::new(), &[("PAIRS__LORA__RNAK", "8")]).unwrap_err();
        assert!(
            error.contains("PAIRS__LORA__RNAK") && error.contains("`rank`"),
            "{error}"
        );
        let error = resolve_train("", Flags::new(), &[("PAIRS__LOAR__RANK", "8")]).unwrap_err();
        assert!(
            error.contains("PAIRS__LOAR__RANK") && error.contains("`lora`"),
            "{error}"
        );
    }

    #[test]
    fn no_number_is_told_to_be_written_that_would_be_wrong_too() {
        for (number, end) in [
            ("-4.0", "0 or more"),
            ("4.0", ": write 4, no point and no 0 in front"),
        ] {
            let yaml = format!("lora: {{rank: {number}}}\n");
            let error = resolve_train(&yaml, Flags::new(), &[]).unwrap_err();
            assert!(error.ends_with(end), "{error}");
        }
    }

    #[test]
    fn a_section_without_keys_means_its_defaults() {
        let none = resolve_train(
            "training:\n  # seed: 1\nlora: {rank: 8}\n",
            Flags::new(),
            &[],
        );
        let none = none.unwrap();
        assert_eq!(none.settings.training, TrainSettings::default().training);
        assert_eq!(none.settings.lora.rank, 8);
    }

    #[test]
    fn what_is_no_value_names_the_flag_or_the_variable() {
        for rate in [f64::NAN, f64::INFINITY] {
            let flags = Flags::new().set("training.learning_rate", &Some(rate));
            let error = resolve_train("", flags, &[]).unwrap_err();
            assert!(
                error.contains("flag for learning-rate: ") && error.contains("not a number"),
                "{error}"
            );
        }
        let memory = [("PAIRS__TRAINING__MAX_MEMORY", "8")];
        let error = resolve_train("", Flags::new(), &memory).unwrap_err();
        assert!(
            error.contains("PAIRS__TRAINING__MAX_MEMORY") && error.contains("8GiB"),
            "{error}"
        );
        for name in ["PAIRS__TRAINING__SEED", "PAIRS__TRAINING"] {
            let error = resolve_train("", Flags::new(), &[(name, "")]).unwrap_err();
            assert!(
                error.contains(name) && error.contains("is empty"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_list_is_no_section_however_deep_and_its_items_have_its_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "judge:\n  prices:\n    m: [1, 2]\n").unwrap();
        let none = std::iter::empty();
        let error = resolve::<EvalSettings>(Some(file.path()), &["judge"], Flags::new(), none);
        let error = error.unwrap_err().to_string();
        let said = ":3: judge.prices.m: is a list; it must be a section of keys";
        assert!(error.ends_with(said), "{error}");
        std::fs::write(file.path(), "judge:\n  compare: [a:b, 3]\n").unwrap();
        let none = std::iter::empty();
        let error = resolve::<EvalSettings>(Some(file.path()), &["judge"], Flags::new(), none);
        let error = error.unwrap_err().to_string();
        let said = ":2: judge.compare[1]: is 3; it must be a text, in quotes";
        assert!(error.ends_with(said), "{error}");
    }

    #[test]
    fn spellings_of_the_python_stacks_are_understood() {
        use settings::Quantization::{Nf4, None};
        for (yaml, expected) in [
            (
                "model: {path: ./, load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}",
                Nf4,
            ),
            ("model: {quantization: {load_in_4bit: false}}", None),
            (
                "model: {quantization: {load_in_4bit: true, bnb_4bit_use_double_quant: true}}",
                Nf4,
            ),
            ("model: {quantization: none}", None),
        ] {
            assert_eq!(
                resolve_train(yaml, Flags::new(), &[])
                    .unwrap()
                    .settings
                    .model
                    .quantization,
                expected,
                "{yaml}"
            );
        }
        for yaml in [
            "model: {bnb_4bit_quant_type: fp4}",
            "model: {quantization: none, load_in_4bit: true}",
        ] {
            assert!(resolve_train(yaml, Flags::new(), &[]).is_err(), "{yaml}");
        }
        let s = resolve_train(
            "training: {per_device_train_batch_size: 3}",
            Flags::new(),
            &[],
        )
        .unwrap()
        .settings;
        assert_eq!(s.training.batch_size, 3);
    }
}
