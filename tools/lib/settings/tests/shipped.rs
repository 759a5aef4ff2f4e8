//! The shipped YAML files show every key, at its default.
#![allow(clippy::unwrap_used)]

use settings::{DataSettings, EvalSettings, TrainSettings};

fn shows_every_default<T>(name: &str)
where
    T: Default + PartialEq + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let path = format!("{}/../../../config/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    let settings: T = serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(
        settings,
        T::default(),
        "{name}.yaml differs from the defaults"
    );

    let shown: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    fn missing(
        shown: &serde_json::Value,
        all: &serde_json::Value,
        path: &str,
        out: &mut Vec<String>,
    ) {
        for (key, value) in all.as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            match shown.get(key) {
                None => out.push(path),
                Some(shown) => missing(shown, value, &path, out),
            }
        }
    }
    let mut out = Vec::new();
    missing(
        &shown,
        &serde_json::to_value(T::default()).unwrap(),
        name,
        &mut out,
    );
    assert!(out.is_empty(), "keys that the file does not show: {out:?}");
}

#[test]
fn data_yaml() {
    shows_every_default::<DataSettings>("data");
}

#[test]
fn train_yaml() {
    shows_every_default::<TrainSettings>("train");
}

#[test]
fn eval_yaml() {
    shows_every_default::<EvalSettings>("eval");
}
