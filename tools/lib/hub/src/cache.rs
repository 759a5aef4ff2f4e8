//! The cache of the hub's own programs, `hf download` and transformers: what they fetched
//! is not fetched again. It is theirs: read, never written.
//!
//! Its form is documented ("Understand caching", huggingface_hub): in
//! `models--OWNER--NAME`, `refs/REVISION` holds a commit, and the files of
//! `snapshots/COMMIT` are links to `blobs/HASH`. Snapshots with only some of a
//! repository's files are usual there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::download::{hasher, hex, is_wanted, read_into};
use crate::name::Name;
use crate::{FOLDER, INDEX, SINGLE};

/// Blobs whose hash was found right once. 16 GB take a minute where the processor has no
/// instructions for SHA-256, which is too long for each start.
const CHECKED: &str = ".checked.json";

/// Where that cache is, by the variables that huggingface_hub reads, in its order;
/// `HUGGINGFACE_HUB_CACHE` is the first one's old name.
///
/// # Errors
/// Those of `read`.
pub(crate) fn folder<E>(
    read: impl Fn(&'static str) -> Result<Option<String>, E>,
) -> Result<Option<PathBuf>, E> {
    let home = read("HOME")?.map(PathBuf::from);
    let path = |value: String| match (value.strip_prefix("~/"), &home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => value.into(),
    };
    for (name, below) in [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ] {
        if let Some(value) = read(name)? {
            return Ok(Some(path(value).join(below)));
        }
    }
    Ok(home.map(|home| home.join(".cache/huggingface/hub")))
}

/// A commit's files, as far as they are here.
pub(crate) struct Snapshot {
    repository: PathBuf,
    commit: String,
    pub(crate) folder: PathBuf,
}

/// A file that a link leads to, and what is in it by the link.
struct Blob {
    path: PathBuf,
    sha256: String,
    /// Bytes, and when it was changed: seconds, nanoseconds.
    state: (u64, i64, i64),
}

impl Snapshot {
    /// The snapshot that a name means, if anything of it is here.
    pub(crate) fn find(cache: &Path, name: &Name<'_>) -> Option<Self> {
        let repository = cache.join(format!("models--{}", name.repository.replace('/', "--")));
        let revision = name.revision.unwrap_or("main");
        let commit = match fs::read_to_string(repository.join("refs").join(revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        if !is_hex(&commit, 40) {
            return None;
        }
        let folder = repository.join("snapshots").join(&commit);
        folder.is_dir().then_some(Self {
            repository,
            commit,
            folder,
        })
    }

    /// What is missing for a model that can be trained and asked.
    pub(crate) fn lacks(&self) -> Option<String> {
        let needed = ["config.json", "tokenizer.json", "tokenizer_config.json"];
        if let Some(name) = needed.iter().find(|name| !self.has(name)) {
            return Some((*name).into());
        }
        // Without it the model would end its replies elsewhere, and nobody would know.
        let optional = "generation_config.json";
        if !self.has(optional) && !self.repository_lacks(optional) {
            return Some(optional.into());
        }
        let template = "chat_template.jinja";
        let elsewhere = || {
            let settings = fs::read(self.folder.join("tokenizer_config.json"));
            let settings = settings.ok().and_then(|json| {
                serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(&json).ok()
            });
            settings.is_some_and(|settings| settings.contains_key("chat_template"))
        };
        if !self.has(template) && !self.has("chat_template.json") && !elsewhere() {
            return Some(template.into());
        }
        self.lacks_weights()
    }

    fn lacks_weights(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        if !self.has(INDEX) {
            return (!self.has(SINGLE)).then(|| SINGLE.into());
        }
        let index = fs::read(self.folder.join(INDEX)).ok();
        match index.and_then(|json| serde_json::from_slice::<Index>(&json).ok()) {
            Some(index) => index
                .weight_map
                .into_values()
                .find(|shard| !self.has(shard)),
            None => Some(format!("a readable {INDEX}")),
        }
    }

    /// Whether the file is there; a link whose blob has gone is none.
    fn has(&self, name: &str) -> bool {
        self.folder.join(name).is_file()
    }

    /// Whether the commit has no such file: transformers asked for it in vain, which
    /// is noted in `.no_exist`; or everything was fetched, `.gitattributes` too, that
    /// is in every repository and that nobody asks for.
    fn repository_lacks(&self, name: &str) -> bool {
        let asked = self.repository.join(".no_exist").join(&self.commit);
        asked.join(name).exists() || self.has(".gitattributes")
    }

    /// Holds the large files against the SHA-256 that their blobs are named by, as a
    /// download's are; those that were held against it before and are as they were
    /// then, no more. Small ones are named by git's hash on the hub, and otherwise by
    /// mirrors. Copies, where the system knows no links, have no such name.
    ///
    /// `told` hears how many bytes there are to read, and how many were.
    ///
    /// # Errors
    /// What is wrong, if something is.
    pub(crate) fn check(&self, mut told: impl FnMut(Checking)) -> Result<(), String> {
        let memory = Path::new(FOLDER).join(CHECKED);
        let mut checked: BTreeMap<PathBuf, (u64, i64, i64)> = fs::read(&memory)
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default();
        let unread = |error: io::Error| format!("cannot be read ({error})");
        let mut blobs = self.blobs().map_err(unread)?;
        blobs.retain(|blob| checked.get(&blob.path) != Some(&blob.state));
        if blobs.is_empty() {
            return Ok(());
        }
        told(Checking::Of(blobs.iter().map(|blob| blob.state.0).sum()));
        let mut before = 0;
        for blob in blobs {
            let mut hash = hasher(true, blob.state.0);
            let read = File::open(&blob.path).and_then(|mut file| {
                read_into(&mut file, &mut *hash, |here| {
                    told(Checking::Bytes(before + here));
                })
            });
            before += read.map_err(unread)?;
            let found = hex(&hash.finalize());
            if found != blob.sha256 {
                let path = blob.path.display();
                return Err(format!(
                    "is damaged: {path} has the SHA-256 {found}, not the one that it is named by"
                ));
            }
            checked.insert(blob.path, blob.state);
        }
        // Where it cannot be kept, the next start reads them again.
        if let Ok(json) = serde_json::to_vec(&checked)
            && fs::create_dir_all(FOLDER).is_ok()
        {
            let _ = jsonl::write_atomically(&memory, &json);
        }
        Ok(())
    }

    /// What the files that are read here link to, as far as that is named by a SHA-256.
    fn blobs(&self) -> io::Result<Vec<Blob>> {
        let mut blobs = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // One step only: a blob may itself be a link, to a store named otherwise.
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let sha256 = target.file_name().unwrap_or_default().to_string_lossy();
            if is_wanted(&entry.file_name().to_string_lossy()) && is_hex(&sha256, 64) {
                let found = entry.path().metadata()?;
                blobs.push(Blob {
                    path: self.repository.join("blobs").join(&*sha256),
                    sha256: sha256.into_owned(),
                    state: (found.len(), found.mtime(), found.mtime_nsec()),
                });
            }
        }
        blobs.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(blobs)
    }
}

/// How a check goes.
pub(crate) enum Checking {
    /// Bytes there are to read.
    Of(u64),
    /// Bytes that were.
    Bytes(u64),
}

fn is_hex(text: &str, digits: usize) -> bool {
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    text.len() == digits && text.chars().all(hex)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;

    use super::*;

    /// The table of "Environment variables" in huggingface_hub's documentation, and its
    /// `constants.py` (2.4.0) for what comes before what.
    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let all = [
            ("HF_HUB_CACHE", "/hub-cache", "/hub-cache"),
            ("HUGGINGFACE_HUB_CACHE", "/old", "/old"),
            ("HF_HOME", "~/hf", "/home/me/hf/hub"),
            ("XDG_CACHE_HOME", "/xdg", "/xdg/huggingface/hub"),
            ("HOME", "/home/me", "/home/me/.cache/huggingface/hub"),
        ];
        for (i, (_, _, expected)) in all.iter().enumerate() {
            let read = |name: &str| {
                let set = all[i..].iter().find(|(set, ..)| *set == name);
                Ok::<_, Infallible>(set.map(|(_, value, _)| (*value).to_owned()))
            };
            assert_eq!(folder(read).unwrap(), Some(expected.into()));
        }
        assert_eq!(folder(|_| Ok::<_, Infallible>(None)).unwrap(), None);
    }
}
