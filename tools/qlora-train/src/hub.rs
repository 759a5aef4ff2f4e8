//! Models by their name on the Hugging Face hub: `Qwen/Qwen3-8B` is downloaded
//! once, to `data/cache/models/Qwen/Qwen3-8B`.
//!
//! A small client of our own: the hub's crate (hf-hub 1.0) brings 284 others along,
//! its storage backend and a second TLS library among them, and of what it does we
//! need two requests. What matters here is the rest: a file appears under its name
//! only after its SHA-256 was found right, an interrupted download goes on where it
//! was, at the same commit, and the token goes to the hub and nowhere else.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::{App, Failure, Progress};
use httpclient::{Chunk, Client, Policy, Scheme, Secret};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const ENDPOINT: &str = "https://huggingface.co";
const FOLDER: &str = "data/cache/models";

/// What a download is of; with it, the folder is whole or can be made so.
const STATE: &str = ".hub.json";

#[derive(Serialize, Deserialize)]
struct State {
    model: String,
    commit: String,
    complete: bool,
}

/// The hub's account of a commit.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file of it.
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: u64,
    /// Only for large files.
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Where a model lies, if it is on this machine: in the folder of that name, or
/// downloaded under it.
pub fn find(model: &str) -> Option<PathBuf> {
    if Path::new(model).join("config.json").exists() {
        return Some(model.into());
    }
    let folder = is_name(model).then(|| Path::new(FOLDER).join(model))?;
    read_state(&folder)
        .filter(|state| state.complete)
        .map(|_| folder)
}

/// Where a model lies, after downloading it if need be.
pub fn fetch(app: &App, model: &str) -> Result<PathBuf> {
    if let Some(folder) = find(model) {
        return Ok(folder);
    }
    if !is_name(model) || Path::new(model).exists() {
        let cause = format!(
            "no model in {model}: name a folder in Hugging Face layout, or a model on the hub \
             such as Qwen/Qwen3-8B, with --model or `model.path`"
        );
        return Err(Failure::Usage(cause).into());
    }
    let folder = Path::new(FOLDER).join(model);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let lock_path = folder.join(".lock");
    let lock = File::create(&lock_path).with_context(|| lock_path.display().to_string())?;
    if lock.try_lock().is_err() {
        let cause = format!(
            "{} is being downloaded by another process",
            folder.display()
        );
        return Err(Failure::World(cause).into());
    }
    let endpoint = cli::env_or_dotenv("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.into());
    let usage = |error: httpclient::ConfigError| Failure::Usage(error.to_string());
    let mut client = Client::new(&endpoint, Policy::default()).map_err(usage)?;
    if let Some(token) = cli::env_or_dotenv("HF_TOKEN")? {
        let secret = Secret::bind("HF_TOKEN", &token, Scheme::Bearer, &endpoint).map_err(usage)?;
        client = client.with_secret(secret);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the network")?;
    let fetched = runtime.block_on(download(app, &client, model, &folder));
    if read_state(&folder).is_none() {
        // Nothing was begun: a mistyped name leaves no folders behind.
        let _ = fs::remove_file(&lock_path);
        for empty in folder.ancestors().take(2) {
            let _ = fs::remove_dir(empty);
        }
    }
    fetched.map(|()| folder)
}

/// `organisation/model`, and nothing that could be another path.
fn is_name(model: &str) -> bool {
    let part = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(fits)
    };
    model
        .split_once('/')
        .is_some_and(|(organisation, name)| part(organisation) && part(name))
}

fn read_state(folder: &Path) -> Option<State> {
    serde_json::from_slice(&fs::read(folder.join(STATE)).ok()?).ok()
}

fn write_state(folder: &Path, state: &State) -> Result<()> {
    Ok(jsonl::write_atomically(
        &folder.join(STATE),
        &serde_json::to_vec(state)?,
    )?)
}

async fn download(app: &App, client: &Client, model: &str, folder: &Path) -> Result<()> {
    // One that was begun is finished at its own commit, whatever came since.
    let begun = read_state(folder).map(|state| state.commit);
    let commit = begun.as_deref().unwrap_or("main");
    let request = client.get(&format!("api/models/{model}/revision/{commit}"))?;
    let answer = request.query([("blobs", "true")]).send().await;
    let revision: Revision = answer
        .map_err(|error| {
            let hint = match error.status() {
                Some(401 | 403 | 404) => {
                    ": is the name right? A private or gated model needs HF_TOKEN in the \
                     environment or .env, and its licence accepted on its page"
                }
                _ => "",
            };
            // It may have been meant as a path.
            anyhow::Error::from(error).context(format!(
                "there is no model in a folder {model}, so it was looked for on the hub{hint}"
            ))
        })?
        .json()?;
    let mut state = State {
        model: model.into(),
        commit: revision.sha,
        complete: false,
    };
    write_state(folder, &state)?;

    let files: Vec<Sibling> = revision
        .siblings
        .into_iter()
        .filter(|file| is_wanted(&file.rfilename))
        .collect();
    if !files
        .iter()
        .any(|file| file.rfilename.ends_with(".safetensors"))
    {
        let cause = format!("{model} has no weights as safetensors, the only form that is read");
        return Err(Failure::World(cause).into());
    }
    let total: u64 = files.iter().map(|file| file.size).sum();
    app.info(format_args!(
        "downloading {model} at {} to {}: {} MB in {} files",
        state.commit.get(..12).unwrap_or(&state.commit),
        folder.display(),
        total / 1_000_000,
        files.len()
    ));
    let progress = app.progress("downloading MB", Some(total / 1_000_000));
    let mut done = 0;
    for file in &files {
        let path = format!("{model}/resolve/{}/{}", state.commit, file.rfilename);
        fetch_file(client, &path, file, folder, (&progress, done)).await?;
        done += file.size;
    }
    state.complete = true;
    write_state(folder, &state)
}

/// Weights and what describes them, at the top of the repository.
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

/// One file: `NAME.part` until it is whole and right.
async fn fetch_file(
    client: &Client,
    url: &str,
    file: &Sibling,
    folder: &Path,
    (progress, before): (&Progress<'_>, u64),
) -> Result<()> {
    let target = folder.join(&file.rfilename);
    if target.metadata().is_ok_and(|m| m.len() == file.size) {
        return Ok(());
    }
    let part = folder.join(format!("{}.part", file.rfilename));
    let shown = || part.display().to_string();
    let mut out = File::options()
        .create(true)
        .read(true)
        .append(true)
        .open(&part)
        .with_context(shown)?;
    let mut hash = Sha256::new();
    let mut length = read_into(&mut out, &mut hash).with_context(shown)?;
    if length > file.size {
        out.set_len(0).with_context(shown)?;
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
            progress.set((before + length) / 1_000_000);
            Ok(())
        };
        client
            .get(url)?
            .download(from, sink)
            .await
            .with_context(shown)?;
    }
    let found: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let wrong = match &file.lfs {
        _ if length != file.size => Some(format!("is {length} bytes, not {}", file.size)),
        Some(lfs) if lfs.sha256 != found => Some(format!(
            "has the SHA-256 {found}, not {} as the hub says",
            lfs.sha256
        )),
        _ => None,
    };
    if let Some(wrong) = wrong {
        fs::remove_file(&part).with_context(shown)?;
        let cause = format!("{} {wrong}: it was deleted; run it again", part.display());
        return Err(Failure::World(cause).into());
    }
    out.sync_all().with_context(shown)?;
    fs::rename(&part, &target).with_context(|| target.display().to_string())
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
