//! What an adapter was made from, as far as others have left it: the licence in
//! the base model's folder, and what each step of the pipeline did to the pairs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cli::Failure;
use record::Summary;
use serde::Deserialize;

/// Where the model and the rows come from.
#[derive(Debug, Default)]
pub struct Origin {
    /// The base's licence, and the file that names it.
    pub licence: Option<(String, String)>,
    /// What was done to the pairs, in this order.
    pub steps: Vec<Summary>,
}

impl Origin {
    /// Reads both. Summaries are those of pair-validate and pair-dedup (`--summary`).
    pub fn read(base: &Path, summaries: &[PathBuf]) -> Result<Self> {
        let mut steps = Vec::new();
        for path in summaries {
            let refuse =
                |cause: String| Failure::Usage(format!("--provenance {}: {cause}", path.display()));
            let text = std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?;
            let step: Summary = serde_json::from_str(&text)
                .map_err(|e| refuse(format!("no summary of pair-validate or pair-dedup: {e}")))?;
            if step.v > record::VERSION {
                let cause = format!("version {}, newer than this build understands", step.v);
                return Err(refuse(cause).into());
            }
            steps.push(step);
        }
        Ok(Self {
            licence: licence(base),
            steps,
        })
    }

    /// Why these may be the summaries of other data than `data`, which has `rows`.
    pub fn doubt(&self, data: &Path, rows: usize) -> Option<String> {
        let last = (self.steps.last()).filter(|last| last.written != rows as u64)?;
        Some(format!(
            "{} wrote {} rows, but {} has {rows}: is --provenance that of this data?",
            last.tool,
            last.written,
            data.display(),
        ))
    }
}

/// The licence that a model's folder names: in the front matter of its card, else
/// in the first line of its LICENSE.
///
/// Both are somebody else's, and nothing is computed from them: what cannot be read
/// names none.
fn licence(folder: &Path) -> Option<(String, String)> {
    #[derive(Deserialize)]
    struct FrontMatter {
        license: Option<String>,
        license_name: Option<String>,
    }
    let text = |name: &str| -> Option<String> {
        let bytes = qwen3::read(&folder.join(name)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    if let Some(card) = text("README.md")
        && let Some((front, _)) = card
            .strip_prefix("---\n")
            .and_then(|rest| rest.split_once("\n---"))
        && let Ok(front) = serde_saphyr::from_str::<FrontMatter>(front)
    {
        let named = |license: &String| license != "other";
        let licence = (front.license.filter(named)).or(front.license_name);
        if let Some(licence) = licence {
            return Some((licence, "README.md".into()));
        }
    }
    for name in ["LICENSE", "LICENSE.txt", "LICENSE.md"] {
        if let Some(licence) = text(name)
            && let Some(line) = licence.lines().map(str::trim).find(|line| !line.is_empty())
        {
            return Some((line.to_owned(), name.into()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_licence_is_found_where_models_name_it() {
        let folder = std::env::temp_dir().join(format!("licence-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        let found = || licence(&folder);
        assert_eq!(found(), None);
        // ISO 8859-1, and a folder of that name.
        std::fs::write(folder.join("LICENSE.md"), b"Lizenz f\xfcr alle\n").unwrap();
        std::fs::create_dir_all(folder.join("LICENSE.txt")).unwrap();
        assert_eq!(found().unwrap().1, "LICENSE.md");
        write("LICENSE", "\n      Apache License\n  Version 2.0\n");
        assert_eq!(found(), Some(("Apache License".into(), "LICENSE".into())));
        write("README.md", "no front matter");
        assert_eq!(found().unwrap().1, "LICENSE");
        write(
            "README.md",
            "---\nlicense: other\nlicense_name: house\ntags: [a]\n---\n# M\n",
        );
        assert_eq!(found(), Some(("house".into(), "README.md".into())));
        write(
            "README.md",
            "---\nlibrary_name: x\nlicense: apache-2.0\n---\n",
        );
        assert_eq!(found(), Some(("apache-2.0".into(), "README.md".into())));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
