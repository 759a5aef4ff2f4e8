//! What is sent: the figures of a line, and the settings of a run.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use cli::Failure;
use record::Record;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

/// Services count steps in signed 64 bits.
const MOST_STEPS: u64 = i64::MAX as u64;

/// The figures of one line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Updates done.
    pub step: u64,
    /// When it was read, in milliseconds since 1970: the lines themselves have no time.
    pub at: u64,
    /// By name, in the line's order.
    pub figures: Map<String, Value>,
}

impl Line {
    /// The line's step and every other number in it.
    ///
    /// # Errors
    /// If it has no step.
    pub fn of(record: &Record) -> Result<Self, record::Error> {
        let step = record.require::<Number>("step")?;
        let step = (step.as_u64()).filter(|&step| step <= MOST_STEPS);
        let step = step.ok_or_else(|| record::Error::Field {
            key: "step".into(),
            cause: "is no whole number, 0 or more".into(),
        })?;
        let mut figures = record.values()?;
        figures.retain(|key, value| key != "step" && key != "v" && value.is_number());
        Ok(Self {
            step,
            at: now(),
            figures,
        })
    }
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Reads a run's settings: the train.yaml or run.json beside an adapter, or any YAML or JSON
/// of sections and keys. Keys are dotted paths; lists are values.
///
/// # Errors
/// If it cannot be read or holds no keys.
pub fn settings(path: &Path) -> Result<Map<String, Value>> {
    let wrong = |cause: String| Failure::Usage(format!("--settings {}: {cause}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let tree: Value = serde_saphyr::from_str(&text).map_err(|e| wrong(format!("no YAML: {e}")))?;
    let Value::Object(mut tree) = tree else {
        return Err(wrong("holds no keys".into()).into());
    };
    let mut flat = Map::new();
    // run.json has the settings as `key = value` lines, and what else the run is beside them.
    if let Some(Value::Array(lines)) = tree.shift_remove("settings") {
        for line in lines.iter().filter_map(Value::as_str) {
            if let Some((key, value)) = line.split_once(" = ") {
                let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
                flat.insert(key.to_owned(), value);
            }
        }
        tree.shift_remove("v");
        tree = Map::from_iter([("run".to_owned(), Value::Object(tree))]);
    }
    flatten("", tree, &mut flat);
    Ok(flat)
}

/// Whether these are the settings of a qlora-train run whose adapter is not there: it comes
/// last, so that the run is not finished. Of other settings nobody knows.
pub fn lacks_adapter(settings: &Path) -> bool {
    let is_run = || {
        let text = std::fs::read_to_string(settings).ok()?;
        let run: Value = serde_json::from_str(&text).ok()?;
        Some(run.get("settings")?.is_array())
    };
    settings.file_name().is_some_and(|name| name == "run.json")
        && is_run() == Some(true)
        && !settings
            .with_file_name("adapter_model.safetensors")
            .exists()
}

fn flatten(prefix: &str, tree: Map<String, Value>, flat: &mut Map<String, Value>) {
    for (key, value) in tree {
        let key = match prefix {
            "" => key,
            prefix => format!("{prefix}.{key}"),
        };
        match value {
            Value::Object(tree) if !tree.is_empty() => flatten(&key, tree, flat),
            value => {
                flat.insert(key, value);
            }
        }
    }
}

/// A setting's value as a text.
pub fn shown(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() => text.clone(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_number_but_the_step_is_a_figure() {
        let line =
            r#"{"v":1,"step":3,"loss":2.5,"tokens":812,"note":"x","deep":{"a":1},"none":null}"#;
        let line = Line::of(&Record::parse(line).unwrap()).unwrap();
        assert_eq!(line.step, 3);
        let figures = serde_json::to_string(&line.figures).unwrap();
        assert_eq!(figures, r#"{"loss":2.5,"tokens":812}"#);
        for (bad, said) in [
            (r#"{"loss":1}"#, "`step` is missing"),
            (r#"{"step":"3"}"#, "`step`"),
            (r#"{"step":1.5}"#, "no whole number"),
            (r#"{"step":-1}"#, "no whole number"),
            (r#"{"step":9223372036854775808}"#, "no whole number"),
            (r#"{"step":1,"loss":1e999}"#, "`loss`"),
        ] {
            let error = Line::of(&Record::parse(bad).unwrap()).unwrap_err();
            assert!(error.to_string().contains(said), "{bad}: {error}");
        }
    }
}
