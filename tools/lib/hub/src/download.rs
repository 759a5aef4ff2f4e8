//! The files of a commit, each under its name only when it is whole and right.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use httpclient::{Chunk, Client};
use serde::Deserialize;
use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256};

use crate::name::Name;
use crate::{Error, Event, INDEX, Plan};

/// The hub's account of a commit.
#[derive(Deserialize)]
pub(crate) struct Commit {
    pub(crate) sha: String,
    siblings: Vec<Sibling>,
}

/// A file of it.
#[derive(Clone, Deserialize)]
pub(crate) struct Sibling {
    pub(crate) rfilename: String,
    pub(crate) size: u64,
    /// Git's name for what is in git: of a large file, a pointer to it. Not all mirrors
    /// give it.
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    /// Only for large files.
    lfs: Option<Lfs>,
}

#[derive(Clone, Deserialize)]
struct Lfs {
    sha256: String,
}

impl Commit {
    /// Weights and what describes them, at the top of the repository.
    pub(crate) fn files(&self) -> Vec<Sibling> {
        let wanted = |file: &&Sibling| is_wanted(&file.rfilename);
        self.siblings.iter().filter(wanted).cloned().collect()
    }
}

impl Sibling {
    /// The hash that the hub knows the file by, before its first byte.
    fn hash(&self) -> Box<dyn DynDigest> {
        hasher(self.lfs.is_some(), self.size)
    }

    /// What that hash is called and must come to, if the hub says so.
    fn expected(&self) -> Option<(&'static str, &str)> {
        match (&self.lfs, &self.blob_id) {
            (Some(lfs), _) => Some(("SHA-256", &lfs.sha256)),
            (None, Some(id)) => Some(("git blob id", id)),
            (None, None) => None,
        }
    }
}

/// The hash that the hub knows a file of that size by, before its first byte. A blob's
/// begins with its length (Pro Git, "Git Objects"); the hub has no repository of SHA-256's.
pub(crate) fn hasher(is_large: bool, size: u64) -> Box<dyn DynDigest> {
    match is_large {
        true => Box::new(Sha256::new()),
        false => Box::new(Sha1::new_with_prefix(format!("blob {size}\0"))),
    }
}

/// Whether a file of that name is read here. The licence stands in the last of them, often
/// in no other.
pub(crate) fn is_wanted(name: &str) -> bool {
    let weights = name.starts_with("model") && name.ends_with(".safetensors");
    let index = name.ends_with(".index.json");
    let other = [".json", ".jinja", ".txt"]
        .iter()
        .any(|end| name.ends_with(end))
        && !index;
    let legal = ["NOTICE", "LICENSE", "LICENSE.md", "README.md"].contains(&name);
    let plain = !name.starts_with('.') && !name.contains(['/', '\\']);
    plain && (weights || other || legal || name == INDEX)
}

/// Downloads all files to `folder`.
pub(crate) async fn all(
    client: &Client,
    name: &Name<'_>,
    commit: &str,
    files: &[Sibling],
    folder: &Path,
    tell: &impl Fn(Event),
) -> Result<(), Error> {
    tell(Event::Begins(Plan {
        model: name.to_string(),
        commit: commit.into(),
        folder: folder.into(),
        bytes: files.iter().map(|file| file.size).sum(),
        files: files.len(),
    }));
    let mut before = 0;
    for file in files {
        let url = format!("{}/resolve/{commit}/{}", name.repository, file.rfilename);
        one(client, &url, file, folder, |here| {
            tell(Event::Bytes(before + here));
        })
        .await?;
        before += file.size;
    }
    Ok(())
}

/// One file: `NAME.part` until it is whole and right.
async fn one(
    client: &Client,
    url: &str,
    file: &Sibling,
    folder: &Path,
    tell: impl Fn(u64),
) -> Result<(), Error> {
    let target = folder.join(&file.rfilename);
    if target.metadata().is_ok_and(|m| m.len() == file.size) {
        return Ok(());
    }
    let part = folder.join(format!("{}.part", file.rfilename));
    let mut out = File::options()
        .create(true)
        .read(true)
        .append(true)
        .open(&part)
        .map_err(Error::io(&part))?;
    let mut hash = file.hash();
    let mut length = read_into(&mut out, &mut *hash, |_| ()).map_err(Error::io(&part))?;
    if length > file.size {
        out.set_len(0).map_err(Error::io(&part))?;
        (hash, length) = (file.hash(), 0);
    }
    let from = length;
    if from < file.size {
        let sink = |chunk: Chunk<'_>| {
            match chunk {
                Chunk::Restart => {
                    out.set_len(0)?;
                    (hash, length) = (file.hash(), 0);
                }
                Chunk::Bytes(bytes) => {
                    out.write_all(bytes)?;
                    hash.update(bytes);
                    length += bytes.len() as u64;
                }
            }
            tell(length);
            Ok(())
        };
        let came = client.get(url)?.download(from, sink).await;
        came.map_err(|source| Error::Download {
            path: part.clone(),
            source: Box::new(source),
        })?;
    }
    let found = hex(&hash.finalize());
    let wrong = match file.expected() {
        _ if length != file.size => Some(format!("is {length} bytes, not {}", file.size)),
        Some((name, expected)) if expected != found => Some(format!(
            "has the {name} {found}, not {expected} as the hub says"
        )),
        _ => None,
    };
    if let Some(what) = wrong {
        fs::remove_file(&part).map_err(Error::io(&part))?;
        return Err(Error::Wrong { path: part, what });
    }
    out.sync_all().map_err(Error::io(&part))?;
    fs::rename(&part, &target).map_err(Error::io(&target))
}

/// Hashes what is there already, and tells how much of it is done; its length.
pub(crate) fn read_into(
    file: &mut File,
    hash: &mut dyn DynDigest,
    mut tell: impl FnMut(u64),
) -> io::Result<u64> {
    let (mut buffer, mut length) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(length),
            n => {
                hash.update(&buffer[..n]);
                length += n as u64;
                tell(length);
            }
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pro Git's examples of `git hash-object` (section "Git Objects"), and the empty blob.
    #[test]
    fn a_small_file_is_known_by_the_name_that_git_gives_it() {
        for (content, id) in [
            ("test content\n", "d670460b4b4aece5915caf5c68d12f560a9fe3e4"),
            (
                "what is up, doc?",
                "bd9dbf5aae1a3862dd1526723246b20206e5fc37",
            ),
            ("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        ] {
            let file = Sibling {
                rfilename: "config.json".into(),
                size: content.len() as u64,
                blob_id: None,
                lfs: None,
            };
            let mut hash = file.hash();
            hash.update(content.as_bytes());
            assert_eq!(hex(&hash.finalize()), id, "{content:?}");
        }
    }
}
