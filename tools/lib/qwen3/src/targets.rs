//! Which products of a model an adapter changes, of which rank and how strongly.
//!
//! The rules are PEFT's (0.21), so that its settings mean here what they mean
//! there; but what matches nothing is an error here, not a silence.

use std::collections::BTreeMap;

use fancy_regex::Regex;

use crate::config::Module;

/// What PEFT calls every projection of every layer.
const ALL_LINEAR: &str = "all-linear";

/// Which products get a pair of factors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Names of modules, whole or their last parts: `q_proj`, `mlp.up_proj`.
    Names(Vec<String>),
    /// A regular expression that a module's whole name matches, such as
    /// `model.layers.0.mlp.up_proj`.
    Pattern(String),
}

impl Targets {
    /// All seven products of every layer.
    pub fn all_linear() -> Self {
        Module::ALL.into_iter().collect()
    }

    /// What PEFT takes a text for: `all-linear`, or else a regular expression.
    pub fn from_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            Self::all_linear()
        } else {
            Self::Pattern(text.into())
        }
    }
}

impl FromIterator<Module> for Targets {
    fn from_iter<I: IntoIterator<Item = Module>>(modules: I) -> Self {
        let names = modules.into_iter().map(|module| module.name().to_owned());
        Self::Names(names.collect())
    }
}

/// Settings of an adapter that do not go with a model, or with nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {reason}")]
pub struct Unfit {
    /// `target_modules`, `rank_pattern` or `alpha_pattern`.
    pub key: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// What an adapter does to one product: `ΔW = scale · B A`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// Inner dimension of its pair.
    pub rank: usize,
    /// `alpha / rank`, or `alpha / √rank`.
    pub scale: f32,
}

/// The products of so many layers.
fn products(layers: usize) -> impl Iterator<Item = (usize, Module)> {
    (0..layers).flat_map(|layer| Module::ALL.map(|module| (layer, module)))
}

/// A product's name in transformers: `model.layers.0.self_attn.q_proj`.
pub(crate) fn name_of((layer, module): (usize, Module)) -> String {
    let (block, name) = module.path();
    format!("model.layers.{layer}.{block}.{name}")
}

/// The modules of a model in which PEFT looks for targets, apart from the products.
fn other_modules(layers: usize) -> impl Iterator<Item = String> {
    let ends = ["model", "model.embed_tokens", "model.layers", "model.norm"];
    let ends = ends.into_iter().chain(["model.rotary_emb", "lm_head"]);
    let layer = |layer: usize| {
        let parts = [
            "",
            ".self_attn",
            ".self_attn.q_norm",
            ".self_attn.k_norm",
            ".mlp",
            ".mlp.act_fn",
            ".input_layernorm",
            ".post_attention_layernorm",
        ];
        parts.map(|part| format!("model.layers.{layer}{part}"))
    };
    ends.map(str::to_owned).chain((0..layers).flat_map(layer))
}

/// A regular expression of the settings, in a frame of ours; parsed by itself first,
/// so that the error's position is the pattern's.
fn regex(key: &'static str, pattern: &str, framed: &str) -> Result<Regex, Unfit> {
    if let Some(what) = foreign(pattern) {
        let reason =
            format!("holds `{pattern}`: {what} is not what Python's `re`, and so peft, reads");
        return Err(Unfit { key, reason });
    }
    let parsed = Regex::new(pattern).and_then(|_| Regex::new(framed));
    parsed.map_err(|error| {
        let reason = format!("holds `{pattern}`, no regular expression: {error}");
        Unfit { key, reason }
    })
}

/// What of a pattern Python's `re` refuses or takes for something else: an adapter
/// trained on one choice of products would be loaded on another. (Look-behinds of
/// variable width, which it refuses too, are let through.)
fn foreign(pattern: &str) -> Option<String> {
    const ESCAPES: &str = "AbBdDsSwWZafnrtvxuUN";
    let mut in_class = false;
    for (at, c) in pattern.char_indices() {
        let rest = &pattern[at..];
        let escaped = pattern[..at]
            .bytes()
            .rev()
            .take_while(|&b| b == b'\\')
            .count()
            % 2
            == 1;
        if escaped {
            if c.is_ascii_alphabetic() && !ESCAPES.contains(c) || rest.starts_with("x{") {
                return Some(format!("`\\{c}`"));
            }
            continue;
        }
        let here = |start: &str| rest.starts_with(start);
        match c {
            '[' if in_class => return Some("`[` in a class".into()),
            '&' | '-' | '~' if in_class && rest.chars().nth(1) == Some(c) => {
                return Some(format!("`{c}{c}` in a class"));
            }
            '[' => in_class = true,
            ']' => in_class = false,
            '(' if here("(?<") && !here("(?<=") && !here("(?<!") => {
                return Some("`(?<`".into());
            }
            _ => {}
        }
    }
    None
}

/// Whether it matches; a search that takes too many steps is an error.
fn is_match(key: &'static str, regex: &Regex, name: &str) -> Result<bool, Unfit> {
    regex.is_match(name).map_err(|error| Unfit {
        key,
        reason: format!("cannot be matched against {name}: {error}"),
    })
}

/// The targets of a model of so many layers, in its order.
///
/// # Errors
/// If a name matches no product, or the pattern matches none or also what can
/// have no adapter here.
pub(crate) fn resolve(targets: &Targets, layers: usize) -> Result<Vec<(usize, Module)>, Unfit> {
    const KEY: &str = "target_modules";
    let unfit = |reason: String| Err(Unfit { key: KEY, reason });
    let all = || products(layers).map(|product| (product, name_of(product)));
    match targets {
        Targets::Names(names) => {
            let meant = |target: &String, name: &str| {
                let before = name.strip_suffix(target.as_str());
                before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
            };
            let stray = |target: &&String| !all().any(|(_, name)| meant(target, &name));
            if names.is_empty() {
                return unfit("is empty: nothing would be trained".into());
            }
            if names
                .iter()
                .any(|name| name.eq_ignore_ascii_case(ALL_LINEAR))
            {
                return unfit(format!(
                    "holds `{ALL_LINEAR}`, which stands alone, not in a list"
                ));
            }
            if let Some(stray) = names.iter().find(stray) {
                let known = Module::ALL.map(Module::name).join(", ");
                return unfit(format!(
                    "holds `{stray}`, which matches nothing; there are {known}, \
                     and longer names such as layers.0.mlp.up_proj"
                ));
            }
            let chosen = all().filter(|(_, name)| names.iter().any(|target| meant(target, name)));
            Ok(chosen.map(|(product, _)| product).collect())
        }
        Targets::Pattern(pattern) => {
            let whole = regex(KEY, pattern, &format!(r"\A(?:{pattern})\z"))?;
            for name in other_modules(layers) {
                if is_match(KEY, &whole, &name)? {
                    return unfit(format!(
                        "`{pattern}` matches {name} too, which can have no adapter here"
                    ));
                }
            }
            let mut chosen = Vec::new();
            for (product, name) in all() {
                if is_match(KEY, &whole, &name)? {
                    chosen.push(product);
                }
            }
            if chosen.is_empty() {
                return unfit(format!(
                    "`{pattern}` matches nothing: a text is a regular expression over whole \
                     names such as {}; plain names go into a list: [q_proj]",
                    name_of((0, Module::Q))
                ));
            }
            Ok(chosen)
        }
    }
}

/// For each target the value of the first key that its name ends with, or matches
/// as a regular expression from the start or behind a dot.
///
/// # Errors
/// If a key is no regular expression, or gives no target its value.
pub(crate) fn by_pattern<T: Copy>(
    key: &'static str,
    patterns: &[(String, T)],
    targets: &[(usize, Module)],
) -> Result<BTreeMap<(usize, Module), T>, Unfit> {
    let mut found = BTreeMap::new();
    for (pattern, value) in patterns {
        let tail = regex(key, pattern, &format!(r"\A(.*\.)?({pattern})\z"))?;
        let before = found.len();
        for &target in targets {
            if !found.contains_key(&target) && is_match(key, &tail, &name_of(target))? {
                found.insert(target, *value);
            }
        }
        if found.len() == before {
            let reason =
                format!("holds `{pattern}`, which matches no target that an earlier key does not");
            return Err(Unfit { key, reason });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// peft (0.21) makes a set of the list.
    #[test]
    fn a_name_that_is_there_twice_is_there() {
        let names =
            |names: &[&str]| Targets::Names(names.iter().map(|n| (*n).to_owned()).collect());
        let once = resolve(&names(&["q_proj", "mlp.up_proj"]), 2);
        let twice = resolve(&names(&["q_proj", "mlp.up_proj", "q_proj", "up_proj"]), 2);
        assert_eq!(once, twice);
        assert_eq!(once.map(|chosen| chosen.len()), Ok(4));
    }

    /// Python 3.11: of these `re` refuses `\pL`, `\z`, `\h`, `\x{71}` and `(?<a>q)`; in the
    /// others it sees plain sets of characters.
    #[test]
    fn what_python_reads_otherwise_is_refused() {
        for pattern in [
            r".*[[:alpha:]]_proj",
            r".*\pL_proj",
            r".*q_proj\z",
            r".*\hq_proj",
            r".*\x{71}_proj",
            r".*(?<a>q)_proj",
            r".*[a-z&&[^k]]_proj",
            r".*[a-z--k]_proj",
        ] {
            assert!(foreign(pattern).is_some(), "{pattern}");
        }
        for pattern in [
            r".*\.(1[89]|2\d|3[0-5])\.self_attn\.(q|v)_proj",
            r"model\.layers\.\d+\.(?!mlp).*",
            r".*(?P<a>q)_proj\Z",
            r".*(?<=\.)[^kv]_proj",
            r".*\\[a-z-]_proj",
            r".*\[\&&_proj",
            r".*\x71_proj",
        ] {
            assert_eq!(foreign(pattern), None, "{pattern}");
        }
    }
}
