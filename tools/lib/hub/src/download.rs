//! The files of a commit, each under its name only when it is whole and right.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use httpclient::{Chunk, Client};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::name::Name;
use crate::{Error, Event, Plan};

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
    size: u64,
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

fn is_wanted(name: &str) -> bool {
    let weights = name.starts_with("model") && name.ends_with(".safetensors");
    let index = name.ends_with(".index.json");
    let other = [".json", ".jinja", ".txt"]
        .iter()
        .any(|end| name.ends_with(end))
        && !index;
    let legal = ["LICENSE", "NOTICE"].contains(&name);
    let plain = !name.starts_with('.') && !name.contains(['/', '\\']);
    plain && (weights || other || legal || name == "model.safetensors.index.json")
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
    let mut hash = Sha256::new();
    let mut length = read_into(&mut out, &mut hash).map_err(Error::io(&part))?;
    if length > file.size {
        out.set_len(0).map_err(Error::io(&part))?;
        (hash, length) = (Sha256::new(), 0);
    }
    let from = length;
    if from < file.size {
        let sink = |chunk: Chunk<'_>| {
            match chunk {
                Chunk::Restart => {
                    out.set_len(0)?;
                    (hash, length) = (Sha256::new(), 0);
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
    let found = hash.finalize();
    let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
    let wrong = match &file.lfs {
        _ if length != file.size => Some(format!("is {length} bytes, not {}", file.size)),
        Some(lfs) if lfs.sha256 != found => Some(format!(
            "has the SHA-256 {found}, not {} as the hub says",
            lfs.sha256
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

/// Hashes what is there already; its length.
fn read_into(file: &mut File, hash: &mut Sha256) -> io::Result<u64> {
    let (mut buffer, mut length) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(length),
            n => {
                hash.update(&buffer[..n]);
                length += n as u64;
            }
        }
    }
}
