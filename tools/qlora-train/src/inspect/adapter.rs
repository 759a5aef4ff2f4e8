//! An adapter folder, read as loosely as peft reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cli::App;
use qwen3::{AdapterConfig, Config, Module, Strength, Targets, Unfit};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Problem, with_sources};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// What comes of a file that cannot be read.
const NOT_LOADED: &str = "peft does not load it";

/// What an adapter is.
#[derive(Serialize)]
pub struct Adapter {
    base: Option<String>,
    rank: Option<u64>,
    alpha: Option<f64>,
    rslora: bool,
    /// `alpha / rank`, or `alpha / √rank`.
    scale: Option<f64>,
    /// Other ranks and alphas by names, in the file's order.
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
    dora: bool,
    /// As the settings have them: names, or a pattern.
    targets: Vec<String>,
    layers: usize,
    tensors: usize,
    dtypes: BTreeSet<String>,
    parameters: usize,
    /// Whether this tool loads it; else why not. Unknown without the base.
    loads_here: Option<String>,
}

impl Adapter {
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let or = |value: Option<String>| value.unwrap_or_else(|| "not given".into());
        let others = |pattern: &Map<String, Value>| {
            let one = |(name, value): (&String, &Value)| format!("; {value} for {name}");
            pattern.iter().map(one).collect::<String>()
        };
        let scale = match (self.alpha, self.scale) {
            (Some(alpha), Some(scale)) => {
                let rule = if self.rslora { ", rank-stabilised" } else { "" };
                let others = others(&self.alpha_pattern);
                Some(format!("{scale} (alpha {alpha}{others}{rule})"))
            }
            _ => None,
        };
        let rank = self.rank.map(|rank| rank.to_string());
        let kind = if self.dora { "DoRA" } else { "LoRA" };
        vec![
            ("kind", kind.into()),
            ("base", or(self.base.clone())),
            ("rank", or(rank) + &others(&self.rank_pattern)),
            ("scale", or(scale)),
            ("targets", self.targets.join(", ")),
            ("layers", self.layers.to_string()),
            (
                "tensors",
                format!("{} ({})", self.tensors, join(&self.dtypes)),
            ),
            ("parameters", self.parameters.to_string()),
            ("loads here", or(self.loads_here.clone())),
        ]
    }
}

fn join(names: &BTreeSet<String>) -> String {
    names
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

/// A tensor of a module's adapter.
struct Part {
    name: String,
    shape: Vec<usize>,
}

/// By layer, module, and what it is: `lora_A`, `lora_B`, `lora_magnitude_vector`.
type Parts = BTreeMap<(usize, String, &'static str), Part>;

const A: &str = "lora_A";
const B: &str = "lora_B";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// Looks at the adapter; its base's folder too, if there is one.
pub fn inspect(
    app: &App,
    folder: &Path,
    model: Option<&Path>,
    problems: &mut Vec<Problem>,
) -> Result<(Adapter, Option<PathBuf>)> {
    let mut say = |file: &str, cause: String, effect: &str| {
        problems.push(Problem {
            file: file.into(),
            cause,
            effect: effect.into(),
        });
    };
    if let Err(damage @ qwen3::Error::File { .. }) = qwen3::Seen::read(folder) {
        let effect = "gen-eval with it and training on from it stop";
        say(qwen3::ROWS, damage.to_string(), effect);
    }
    let given = read_settings(folder, &mut say);
    let mut is_whole = given.is_some();
    let settings = given.unwrap_or_default();
    let text = |key: &str| settings.get(key).and_then(Value::as_str).map(str::to_owned);
    let base_name = text("base_model_name_or_path").filter(|name| !name.is_empty());
    let base_name = base_name.map(|name| hub::named(&name, text("revision").as_deref()));
    let base = match model {
        Some(path) => Some(path.to_owned()),
        None => match &base_name {
            Some(name) => hub::find(app, name)?,
            None => None,
        },
    };
    let config = base.as_deref().map(Config::load).transpose()?;

    let rank = settings
        .get("r")
        .and_then(Value::as_u64)
        .filter(|&rank| rank > 0);
    let alpha = settings.get("lora_alpha").and_then(Value::as_f64);
    let targets: Vec<String> = match settings.get("target_modules") {
        Some(Value::String(pattern)) => vec![pattern.clone()],
        Some(Value::Array(names)) => names
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => Vec::new(),
    };
    let map = |key: &str| {
        let found = settings.get(key).and_then(Value::as_object);
        found.cloned().unwrap_or_default()
    };
    let yes = |key: &str| settings.get(key).and_then(Value::as_bool) == Some(true);
    let mut parts = Parts::new();
    let mut adapter = Adapter {
        base: base_name,
        rank,
        alpha,
        rslora: yes("use_rslora"),
        scale: None,
        rank_pattern: map("rank_pattern"),
        alpha_pattern: map("alpha_pattern"),
        dora: yes("use_dora"),
        targets,
        layers: 0,
        tensors: 0,
        dtypes: BTreeSet::new(),
        parameters: 0,
        loads_here: None,
    };
    adapter.scale = rank.zip(alpha).map(|(rank, alpha)| {
        let rank = rank as f64;
        alpha / if adapter.rslora { rank.sqrt() } else { rank }
    });
    if is_whole {
        check_settings(&adapter, &settings, &mut say);
    }
    let bytes = read_tensors(folder, &mut say);
    let file = bytes.as_deref().map(SafeTensors::deserialize);
    is_whole &= matches!(file, Some(Ok(_)));
    match file {
        None => {}
        Some(Err(error)) => say(
            TENSORS,
            format!("is not a whole safetensors file: {error}"),
            NOT_LOADED,
        ),
        Some(Ok(file)) => {
            sort_tensors(&file, &mut adapter, &mut parts, &mut say);
            let deepest = parts.keys().map(|(layer, ..)| layer + 1).max();
            let deepest = deepest.unwrap_or(0);
            adapter.layers = config.as_ref().map_or(deepest, |config| config.layers);
            if deepest > adapter.layers {
                say(
                    TENSORS,
                    format!(
                        "holds pairs of {deepest} layers, the base has {}",
                        adapter.layers
                    ),
                    "peft leaves the others out, with a warning only: an adapter of another base",
                );
            }
            match wanted(&adapter, settings.get("target_modules")) {
                None => {}
                Some(Ok(wanted)) => {
                    check_parts(&adapter, config.as_ref(), &parts, &wanted, &mut say);
                }
                Some(Err(Unfit { key, reason })) => say(
                    CONFIG,
                    format!("`{key}` {reason}"),
                    "peft fails, or passes it over without a word",
                ),
            }
        }
    }
    // What cannot be read is told already, and is not what was summed.
    if is_whole && let Err(damage) = qwen3::check_sums(folder) {
        let effect = "peft does not look at the sums and takes it as it is";
        say("SHA256SUMS", damage.to_string(), effect);
    }
    if let Some(config) = &config {
        let refused = qwen3::Adapter::load(folder, config).err();
        adapter.loads_here = Some(match &refused {
            None => "yes".into(),
            Some(error) => format!("no: {}", with_sources(error)),
        });
        // Odd tensors are told above, where peft takes them otherwise than they were meant.
        if let Some(error @ qwen3::Error::Key { .. }) = &refused
            && problems.is_empty()
        {
            problems.push(Problem {
                file: CONFIG.into(),
                cause: error.to_string(),
                effect: "this tool does not load it; what peft makes of it is not known".into(),
            });
        }
    }
    Ok((adapter, base))
}

/// What peft makes of the settings, where that is not what they were meant to be.
fn check_settings(
    adapter: &Adapter,
    settings: &Map<String, Value>,
    say: &mut impl FnMut(&str, String, &str),
) {
    if settings.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        let found = settings
            .get("peft_type")
            .map_or("missing".into(), |v| format!("{v}"));
        say(
            CONFIG,
            format!("`peft_type` is {found}, not \"LORA\""),
            "peft does not load it as LoRA",
        );
    }
    if adapter.base.is_none() {
        say(
            CONFIG,
            "`base_model_name_or_path` is missing".into(),
            "peft cannot find the base by itself (AutoPeftModel fails)",
        );
    }
    if adapter.rank.is_none() {
        say(
            CONFIG,
            "`r` is missing or no positive number".into(),
            "peft takes rank 8",
        );
    }
    match adapter.alpha {
        None => say(
            CONFIG,
            "`lora_alpha` is missing".into(),
            "peft takes 8 and says nothing: another scale than it was trained with",
        ),
        Some(0.0) => say(
            CONFIG,
            "`lora_alpha` is 0".into(),
            "the adapter does nothing",
        ),
        Some(_) => {}
    }
    for (key, reason) in qwen3::unsupported(settings) {
        say(
            CONFIG,
            format!("`{key}` {reason}"),
            "what peft runs is another adapter than is described here; this tool does not load it",
        );
    }
    if adapter.targets.is_empty() {
        say(
            CONFIG,
            "`target_modules` is missing or empty".into(),
            "peft takes q_proj and v_proj for a Qwen3 and leaves every other pair out",
        );
    }
}

/// The settings; none, which is said, where there are none to be read.
fn read_settings(
    folder: &Path,
    say: &mut impl FnMut(&str, String, &str),
) -> Option<Map<String, Value>> {
    let bytes = match qwen3::read(&folder.join(CONFIG)) {
        Ok(bytes) => bytes,
        Err(error) => {
            say(CONFIG, cause_of(&error), NOT_LOADED);
            return None;
        }
    };
    let settings = serde_json::from_slice(&bytes);
    let settings = settings.map_err(|error| {
        say(CONFIG, format!("is not a JSON object: {error}"), NOT_LOADED);
    });
    settings.ok()
}

/// The bytes of the tensors' file; none, which is said, where there are none to be read.
fn read_tensors(folder: &Path, say: &mut impl FnMut(&str, String, &str)) -> Option<Vec<u8>> {
    let pickle = "adapter_model.bin";
    let path = folder.join(TENSORS);
    match qwen3::read(&path) {
        Ok(bytes) => return Some(bytes),
        Err(_) if !path.exists() && folder.join(pickle).exists() => say(
            pickle,
            "is a pickle, not safetensors".into(),
            "peft runs whatever code is in it; this tool does not read it: save it again with peft",
        ),
        Err(_) if !path.exists() => say(
            TENSORS,
            "is missing".into(),
            "peft does not load it (or looks for it on the hub)",
        ),
        Err(error) => say(TENSORS, cause_of(&error), NOT_LOADED),
    }
    None
}

/// Why a file cannot be read, without its name.
fn cause_of(error: &qwen3::Error) -> String {
    match error {
        qwen3::Error::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
            "is missing".into()
        }
        qwen3::Error::File { reason, .. } => reason.clone(),
        qwen3::Error::Read { source, .. } => format!("cannot be read: {source}"),
        other => other.to_string(),
    }
}

/// Which tensors are parts of an adapter; what the others are.
fn sort_tensors(
    file: &SafeTensors<'_>,
    adapter: &mut Adapter,
    parts: &mut Parts,
    say: &mut impl FnMut(&str, String, &str),
) {
    let mut names = file.names();
    names.sort_unstable();
    let (mut other_prefix, mut with_name, mut strangers) = (Vec::new(), Vec::new(), Vec::new());
    let (mut not_finite, mut moved) = (Vec::new(), false);
    for name in names {
        let Ok(tensor) = file.tensor(name) else {
            continue;
        };
        adapter.tensors += 1;
        adapter.dtypes.insert(format!("{:?}", tensor.dtype()));
        adapter.parameters += tensor.shape().iter().product::<usize>();
        let inner = name.strip_prefix(PREFIX);
        let Some((layer, module, which, named)) = parse(inner.unwrap_or(name)) else {
            strangers.push(name);
            continue;
        };
        if inner.is_none() {
            other_prefix.push(name);
        }
        if named {
            with_name.push(name);
        }
        let values = floats(tensor.dtype(), tensor.data());
        if values.iter().any(|value| !value.is_finite()) {
            not_finite.push(name);
        }
        moved |= which == B && values.iter().any(|&value| value != 0.0);
        let part = Part {
            name: name.into(),
            shape: tensor.shape().into(),
        };
        parts.insert((layer, module, which), part);
    }
    let mut tell = |names: &[&str], cause: &str, effect: &str| {
        if let Some(first) = names.first() {
            let count = names.len();
            say(
                TENSORS,
                format!("{count} tensors {cause}, `{first}` the first"),
                effect,
            );
        }
    };
    tell(
        &other_prefix,
        &format!("lack the prefix `{PREFIX}`"),
        "peft finds none of them, warns, and runs with a random start in their place",
    );
    tell(
        &with_name,
        "hold an adapter's name before `.weight`",
        "peft knows only `default` there, warns, and runs with a random start in their place",
    );
    tell(
        &strangers,
        "are no LoRA pair of a Qwen3",
        "peft leaves them out, with a warning at most",
    );
    tell(
        &not_finite,
        "hold values that are not finite",
        "the model's answers are not numbers",
    );
    // With lengths of their own the rows move by these.
    let has_magnitudes = parts.keys().any(|(.., which)| *which == MAGNITUDE);
    if !moved && !has_magnitudes && !parts.is_empty() {
        say(
            TENSORS,
            "every lora_B is zero".into(),
            "the adapter does nothing: it is not trained",
        );
    }
}

/// Layer, module, which part, and whether an adapter's name stands in it that is
/// not peft's own: `model.layers.3.mlp.up_proj.lora_A[.default].weight`.
fn parse(name: &str) -> Option<(usize, String, &'static str, bool)> {
    let rest = name.split_once("layers.")?.1;
    let (layer, rest) = rest.split_once('.')?;
    let mut words = rest.split('.');
    let (_block, module, part) = (words.next()?, words.next()?, words.next()?);
    let which = [A, B, MAGNITUDE].into_iter().find(|which| *which == part)?;
    let named = match (words.next(), words.next()) {
        // Saved without `.weight`, as the factors are with it.
        (None, _) if which == MAGNITUDE => false,
        (Some("weight"), None) if which != MAGNITUDE => false,
        (Some(name), Some("weight")) => name != "default",
        _ => return None,
    };
    Some((layer.parse().ok()?, module.into(), which, named))
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
        Dtype::BF16 => (bytes.as_chunks().0.iter())
            .map(|&b| half::bf16::from_le_bytes(b).to_f32())
            .collect(),
        Dtype::F16 => (bytes.as_chunks().0.iter())
            .map(|&b| half::f16::from_le_bytes(b).to_f32())
            .collect(),
        _ => Vec::new(),
    }
}

/// The pairs that the settings ask for.
type Wanted = BTreeMap<(usize, Module), Strength>;

/// What the settings ask for, where they say so and it is known of how many layers; a rank
/// of 0 is not known.
fn wanted(adapter: &Adapter, targets: Option<&Value>) -> Option<Result<Wanted, Unfit>> {
    let targets = match targets? {
        _ if adapter.layers == 0 => return None,
        Value::String(text) => Targets::from_text(text),
        _ if adapter.targets.is_empty() => return None,
        _ => Targets::Names(adapter.targets.clone()),
    };
    let rank =
        |(name, value): (&String, &Value)| (name.clone(), value.as_u64().unwrap_or(0) as usize);
    let alpha = |(name, value): (&String, &Value)| (name.clone(), value.as_f64().unwrap_or(0.0));
    let settings = AdapterConfig {
        targets,
        rank_pattern: adapter.rank_pattern.iter().map(rank).collect(),
        alpha_pattern: adapter.alpha_pattern.iter().map(alpha).collect(),
        ..AdapterConfig::new(adapter.rank.unwrap_or(0) as usize, 0.0)
    };
    Some(settings.resolve(adapter.layers))
}

/// Each target has its parts, of the right shapes, and nothing else has any.
fn check_parts(
    adapter: &Adapter,
    config: Option<&Config>,
    parts: &Parts,
    wanted: &Wanted,
    say: &mut impl FnMut(&str, String, &str),
) {
    let modules: BTreeSet<&str> = wanted.keys().map(|(_, module)| module.name()).collect();
    let targeted = |layer: usize, module: &str| {
        let module = module.parse::<Module>();
        module.is_ok_and(|module| wanted.contains_key(&(layer, module)))
    };
    let inside = parts.keys().filter(|(layer, ..)| *layer < adapter.layers);
    let left_out: BTreeSet<String> = inside
        .filter(|(layer, module, _)| !targeted(*layer, module))
        .map(
            |(layer, module, _)| match modules.contains(module.as_str()) {
                true => format!("layers.{layer} {module}"),
                false => module.clone(),
            },
        )
        .collect();
    if !left_out.is_empty() {
        say(
            TENSORS,
            format!(
                "holds pairs of {}, no targets in `target_modules`",
                join(&left_out)
            ),
            "peft leaves them out, with a warning only",
        );
    }
    let mut magnitudes = parts.iter().filter(|((.., which), _)| *which == MAGNITUDE);
    if let (false, Some((_, first))) = (adapter.dora, magnitudes.next()) {
        say(
            TENSORS,
            format!(
                "holds magnitudes of DoRA, `{}` the first, and `use_dora` is not true",
                first.name
            ),
            "peft leaves them out, with a warning at most, and runs plain LoRA",
        );
    }
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for (&(layer, module), strength) in wanted {
        let rank = Some(strength.rank).filter(|&rank| rank > 0);
        let [outputs, inputs] = config.map_or([None; 2], |c| module.shape(c).map(Some));
        let expected = [
            (A, vec![rank, inputs]),
            (B, vec![outputs, rank]),
            (MAGNITUDE, vec![outputs]),
        ];
        for (which, expected) in expected {
            if which == MAGNITUDE && !adapter.dora {
                continue;
            }
            let Some(part) = parts.get(&(layer, module.name().to_owned(), which)) else {
                missing.push(format!("layers.{layer} {module} {which}"));
                continue;
            };
            let mut sizes = part.shape.iter().zip(&expected);
            let fits = part.shape.len() == expected.len()
                && sizes.all(|(found, expected)| expected.is_none_or(|e| e == *found));
            if !fits {
                misshapen.push(format!("`{}` is {:?}", part.name, part.shape));
            }
        }
    }
    if let Some(first) = missing.first() {
        say(
            TENSORS,
            format!("{} tensors are missing, {first} the first", missing.len()),
            "peft warns at most and runs without those pairs",
        );
    }
    if let Some(first) = misshapen.first() {
        say(
            TENSORS,
            format!(
                "{} tensors have another shape than rank and base ask for: {first}",
                misshapen.len()
            ),
            "peft fails with a size mismatch",
        );
    }
}
