//! Names of models: `organisation/model`, or `organisation/model@revision`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::FOLDER;

/// A name, and nothing that could be another path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name<'a> {
    /// `organisation/model`
    pub(crate) repository: &'a str,
    /// A branch, tag or commit.
    pub(crate) revision: Option<&'a str>,
}

impl<'a> Name<'a> {
    /// The name that `model` is, if it is one.
    pub(crate) fn parse(model: &'a str) -> Option<Self> {
        let part = |part: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(fits)
        };
        let (repository, revision) = match model.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (model, None),
        };
        let (organisation, name) = repository.split_once('/')?;
        let right = part(organisation) && part(name) && revision.is_none_or(part);
        right.then_some(Self {
            repository,
            revision,
        })
    }

    /// Where a model of that name is downloaded to.
    pub(crate) fn folder(&self) -> PathBuf {
        Path::new(FOLDER).join(self.to_string())
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if self.revision.is_some() { "@" } else { "" };
        write!(f, "{}{at}{}", self.repository, self.revision.unwrap_or(""))
    }
}

/// A model as other programs name it: where `model` is a name on the hub, the
/// repository and the revision, if it has one; else `model` as it is.
pub fn parts(model: &str) -> (&str, Option<&str>) {
    match Name::parse(model) {
        Some(name) if !Path::new(model).exists() => (name.repository, name.revision),
        _ => (model, None),
    }
}

/// The inverse of [`parts`], as an adapter names its base: a repository and the revision
/// beside it. A folder has none, and a name that holds one keeps it.
pub fn named(base: &str, revision: Option<&str>) -> String {
    let bare = Name::parse(base).is_some_and(|name| name.revision.is_none());
    match revision.filter(|revision| !revision.is_empty()) {
        Some(revision) if bare && !Path::new(base).exists() => format!("{base}@{revision}"),
        _ => base.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path() {
        for name in [
            "Qwen/Qwen3-8B",
            "a/b.c_d",
            "Qwen/Qwen3-8B@main",
            "a/b@0123abc",
        ] {
            assert_eq!(
                Name::parse(name).map(|n| n.to_string()).as_deref(),
                Some(name)
            );
        }
        for path in [
            "model", "a/b/c", "../up", "./a/b", "/a/b", "a/..", "a/", "/b", "a/b@", "a/b@..",
            "a/b@c/d", "a/b@c@d", "a b/c", "", "@", "é/b",
        ] {
            assert_eq!(Name::parse(path), None, "{path}");
        }
        assert_eq!(parts("Qwen/Qwen3-8B@v1"), ("Qwen/Qwen3-8B", Some("v1")));
        assert_eq!(parts("Qwen/Qwen3-8B"), ("Qwen/Qwen3-8B", None));
        assert_eq!(parts("/models/a@b"), ("/models/a@b", None));
        for model in ["Qwen/Qwen3-8B@v1", "Qwen/Qwen3-8B", "/models/a@b"] {
            let (base, revision) = parts(model);
            assert_eq!(named(base, revision), model);
        }
        // A pull request's is no folder's name here, and must not become the main branch.
        assert_eq!(named("a/b", Some("refs/pr/1")), "a/b@refs/pr/1");
        assert_eq!(named("a/b@v1", Some("v2")), "a/b@v1");
        assert_eq!(named("/models/a", Some("v2")), "/models/a");
        assert_eq!(named("a/b", Some("")), "a/b");
    }
}
