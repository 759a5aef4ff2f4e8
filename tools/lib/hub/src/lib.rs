//! Models by their name on the Hugging Face hub: `Qwen/Qwen3-8B` is downloaded
//! once, to `data/cache/models/Qwen/Qwen3-8B`; `Qwen/Qwen3-8B@REVISION`, a branch,
//! tag or commit of it, to a folder of its own beside that. What `hf download` or
//! transformers have fetched is taken from their cache.
//!
//! A small client of our own, of two requests. The hub's crate, hf-hub 0.5.0, compares
//! no hash with what came; it asks for the rest of a file and does not look whether the
//! answer is the rest (206) or all of it (200), so that a file that is too long passes for
//! a success; and it does not read `HF_TOKEN`. (1.0 brings 284 crates along, its storage
//! backend and a second TLS library among them.) Here a file appears under its name only
//! after its hash was found right (SHA-256, of a small one git's blob id), an interrupted
//! download goes on where it was, at the same commit, and `HF_TOKEN` goes to the hub and
//! nowhere else: a mirror has a token of its own.

mod cache;
mod download;
mod error;
mod name;
mod tool;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::mpsc;
use std::time::Duration;

use httpclient::{Client, Policy, Retrying, Scheme, Secret};
use serde::{Deserialize, Serialize};

pub use error::Error;
pub use name::{named, parts};
pub use tool::{fetch, find};

use cache::{Checking, Snapshot};
use name::Name;

/// The hub, unless `HF_ENDPOINT` names a mirror.
pub const ENDPOINT: &str = "https://huggingface.co";

/// The variables that hold the hub's token and a mirror's.
const HUB_TOKEN: &str = "HF_TOKEN";
const MIRROR_TOKEN: &str = "HF_ENDPOINT_TOKEN";

/// The variable that holds the token for `endpoint`. The hub's is not for a mirror
/// to have, though other clients hand it over.
fn token_of(endpoint: &str) -> &'static str {
    match endpoint.trim_end_matches('/') {
        ENDPOINT => HUB_TOKEN,
        _ => MIRROR_TOKEN,
    }
}

/// Where downloaded models lie, by their names.
pub const FOLDER: &str = "data/cache/models";

/// The weights, and where there are several files of them, the list.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a download is of; with it, the folder is whole or can be made so.
const STATE: &str = ".hub.json";

/// Requests at most for a name of which nothing is here yet. It may be a mistyped
/// path, on a machine without a network: half a minute of patience would be silence.
const ATTEMPTS_OF_A_GUESS: u32 = 3;

/// Where models come from, and what opens the door.
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: Option<PathBuf>,
}

/// How it goes.
#[derive(Debug, Clone)]
pub enum Event {
    /// A model of that name is on this machine.
    Found(Found),
    /// The Hugging Face cache's is not taken.
    Passed(Passed),
    /// Once, before so many bytes of the Hugging Face cache are read.
    Checks(u64),
    /// Once, before the first byte of a download.
    Begins(Plan),
    /// Bytes that are here or were read, of [`Plan::bytes`] or of what is checked.
    Bytes(u64),
    /// A request failed and is going to be repeated.
    Retrying(Retrying),
}

/// Which of the models of a name is taken.
#[derive(Debug, Clone)]
pub struct Found {
    /// The name as it was asked for.
    pub model: String,
    /// Where it lies.
    pub folder: PathBuf,
    /// Whether that is the Hugging Face cache.
    pub in_cache: bool,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self.in_cache {
            true => "the Hugging Face cache: ",
            false => "",
        };
        write!(
            f,
            "{} is taken from {of}{}",
            self.model,
            self.folder.display()
        )
    }
}

/// Why what the Hugging Face cache has is not taken.
#[derive(Debug, Clone)]
pub struct Passed {
    /// The name as it was asked for.
    pub model: String,
    /// Where it lies.
    pub folder: PathBuf,
    /// What is the matter with it.
    pub cause: String,
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is not taken from the Hugging Face cache: {} {}",
            self.model,
            self.folder.display(),
            self.cause
        )
    }
}

/// What is going to be downloaded.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The name as it was asked for.
    pub model: String,
    /// The commit, in hex.
    pub commit: String,
    /// Where to.
    pub folder: PathBuf,
    /// Of all files together, those that are here already included.
    pub bytes: u64,
    /// How many files.
    pub files: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (commit, folder) = (&self.commit, self.folder.display());
        write!(
            f,
            "downloading {} at {} to {folder}: {} MB in {} files",
            self.model,
            commit.get(..12).unwrap_or(commit),
            self.bytes / 1_000_000,
            self.files
        )
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    model: String,
    commit: String,
    complete: bool,
    /// Bytes of each file.
    #[serde(default)]
    files: BTreeMap<String, u64>,
}

impl State {
    fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(STATE)).ok()?).ok()
    }

    /// Whether everything came, and nothing of it was deleted or cut since.
    fn holds(&self, folder: &Path) -> bool {
        let there = |(name, bytes): (&String, &u64)| {
            let found = folder.join(name).metadata();
            found.is_ok_and(|found| found.len() == *bytes)
        };
        self.complete && self.files.iter().all(there)
    }

    fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(STATE);
        let json = serde_json::to_vec(self).map_err(|e| Error::io(&path)(e.into()))?;
        Ok(jsonl::write_atomically(&path, &json)?)
    }
}

/// Whether a model's configuration lies there.
fn has_config(folder: &Path) -> bool {
    folder.join("config.json").exists()
}

fn has_weights(folder: &Path) -> bool {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = files.map(|file| file.file_name());
    names.any(|name| name.to_string_lossy().ends_with(".safetensors"))
}

/// What brings right files into `folder`, where the model of that name was taken from and
/// is damaged: the end of a sentence that tells what to do. In the Hugging Face cache
/// several snapshots share a blob, so nothing is to be deleted there by hand.
pub fn remedy(model: &str, folder: &Path) -> String {
    let shown = folder.display();
    match Name::parse(model) {
        _ if folder == Path::new(model) => format!("put the model's files into {shown} again"),
        Some(name) if !folder.starts_with(FOLDER) => {
            let revision = name
                .revision
                .map(|revision| format!(" --revision {revision}"));
            format!(
                "have it fetched again by `hf download {} --force-download{}`",
                name.repository,
                revision.unwrap_or_default()
            )
        }
        _ => format!("delete the folder {shown}, to have it downloaded again"),
    }
}

impl Hub {
    /// The hub at `endpoint`, with its token for what is private or gated, and the folder
    /// that is the Hugging Face cache.
    pub fn new(endpoint: String, token: Option<String>, cache: Option<PathBuf>) -> Self {
        Self {
            endpoint,
            token,
            cache,
        }
    }

    /// Where a model lies, if it is on this machine: in the folder of that path; under
    /// that name in [`FOLDER`], put there by hand, or downloaded and whole still; in the
    /// Hugging Face cache, if it is whole there. `told` hears which.
    pub fn find(&self, model: &str, mut told: impl FnMut(Event)) -> Option<PathBuf> {
        if has_config(Path::new(model)) {
            return Some(model.into());
        }
        let name = Name::parse(model)?;
        let folder = name.folder();
        let whole = match State::read(&folder) {
            Some(state) => state.holds(&folder) && has_config(&folder) && has_weights(&folder),
            None => has_config(&folder),
        };
        let (folder, in_cache) = match whole {
            true => (folder, false),
            false => (self.find_in_cache(&name, &mut told)?, true),
        };
        told(Event::Found(Found {
            model: model.into(),
            folder: folder.clone(),
            in_cache,
        }));
        Some(folder)
    }

    fn find_in_cache(&self, name: &Name<'_>, told: &mut impl FnMut(Event)) -> Option<PathBuf> {
        let snapshot = Snapshot::find(self.cache.as_deref()?, name)?;
        let fit = match snapshot.lacks() {
            Some(what) => Err(format!("lacks {what}")),
            None => snapshot.check(|check| {
                told(match check {
                    Checking::Of(bytes) => Event::Checks(bytes),
                    Checking::Bytes(bytes) => Event::Bytes(bytes),
                });
            }),
        };
        match fit {
            Ok(()) => Some(snapshot.folder),
            Err(cause) => {
                told(Event::Passed(Passed {
                    model: name.to_string(),
                    folder: snapshot.folder,
                    cause,
                }));
                None
            }
        }
    }

    /// Where a model lies, after downloading it if need be. `told` hears how that goes.
    ///
    /// # Errors
    /// Where there is no such model, or it does not come whole.
    pub fn fetch(&self, model: &str, mut told: impl FnMut(Event)) -> Result<PathBuf, Error> {
        let mut passed = None;
        let found = self.find(model, |event| {
            if let Event::Passed(found) = &event {
                passed = Some(found.clone());
            }
            told(event);
        });
        if let Some(folder) = found {
            return Ok(folder);
        }
        let name = Name::parse(model).filter(|_| !Path::new(model).exists());
        let name = name.ok_or_else(|| Error::NoModel(model.into()))?;
        let folder = name.folder();
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let lock_path = folder.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io(&lock_path))?;
        if lock.try_lock().is_err() {
            return Err(Error::Busy(folder));
        }
        let fetched = self.fetch_to(&folder, &name, told);
        if State::read(&folder).is_none() {
            // Nothing was begun: a mistyped name leaves no folders behind.
            let _ = fs::remove_file(&lock_path);
            for empty in folder.ancestors().take(2) {
                let _ = fs::remove_dir(empty);
            }
        }
        match fetched {
            Ok(()) => Ok(folder),
            Err(Error::NotAsked { model, source, .. }) => Err(Error::NotAsked {
                model,
                passed,
                source,
            }),
            Err(error) => Err(error),
        }
    }

    fn fetch_to(
        &self,
        folder: &Path,
        name: &Name<'_>,
        told: impl FnMut(Event),
    ) -> Result<(), Error> {
        let begun = State::read(folder);
        let mut policy = Policy::default();
        if begun.is_none() {
            policy.attempts = ATTEMPTS_OF_A_GUESS;
        }
        let (sender, retries) = mpsc::channel();
        let asking = self.client(policy, sender.clone())?;
        let loading = self.client(Policy::default(), sender)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::Runtime)?;
        let told = RefCell::new(told);
        let tell = |event| told.borrow_mut()(event);
        runtime.block_on(attended(&retries, &tell, async {
            let (mut state, files) = self.ask(&asking, name, begun).await?;
            state.write(folder)?;
            download::all(&loading, name, &state.commit, &files, folder, &tell).await?;
            state.complete = true;
            state.write(folder)
        }))
    }

    fn client(&self, policy: Policy, told: mpsc::Sender<Retrying>) -> Result<Client, Error> {
        let mut client = Client::new(&self.endpoint, policy)?.with_retries_told(told);
        if let Some(token) = &self.token {
            let name = token_of(&self.endpoint);
            let secret = Secret::bind(name, token, Scheme::Bearer, &self.endpoint)?;
            client = client.with_secret(secret);
        }
        Ok(client)
    }

    /// The commit that a name means, and the files of it that make a model.
    async fn ask(
        &self,
        client: &Client,
        name: &Name<'_>,
        begun: Option<State>,
    ) -> Result<(State, Vec<download::Sibling>), Error> {
        // What was begun is finished at its own commit, whatever came since.
        let begun = begun.map(|state| state.commit);
        let revision = begun.as_deref().unwrap_or(name.revision.unwrap_or("main"));
        let path = format!("api/models/{}/revision/{revision}", name.repository);
        let answer = client.get(&path)?.query([("blobs", "true")]).send().await;
        let answer = answer.map_err(|source| {
            let (model, endpoint) = (name.to_string(), self.endpoint.clone());
            let source = Box::new(source);
            match source.status() {
                Some(401 | 404) => Error::Nowhere {
                    model,
                    endpoint,
                    source,
                },
                Some(403) => Error::Gated {
                    model,
                    endpoint,
                    source,
                },
                _ => Error::NotAsked {
                    model,
                    passed: None,
                    source,
                },
            }
        })?;
        let commit: download::Commit = answer.json().map_err(Box::new)?;
        let files = commit.files();
        if !files.iter().any(|f| f.rfilename.ends_with(".safetensors")) {
            return Err(Error::NoWeights(name.to_string()));
        }
        let state = State {
            model: name.to_string(),
            commit: commit.sha,
            complete: false,
            files: files
                .iter()
                .map(|f| (f.rfilename.clone(), f.size))
                .collect(),
        };
        Ok((state, files))
    }
}

/// Finishes `work`, passing on meanwhile what it says of its retries.
async fn attended<T>(
    retries: &mpsc::Receiver<Retrying>,
    tell: &impl Fn(Event),
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    loop {
        let done = tokio::select! {
            done = &mut work => Some(done),
            () = tokio::time::sleep(Duration::from_millis(100)) => None,
        };
        retries.try_iter().map(Event::Retrying).for_each(tell);
        if let Some(done) = done {
            return done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hubs_token_is_the_hubs_alone() {
        for hub in ["https://huggingface.co", "https://huggingface.co/"] {
            assert_eq!(token_of(hub), "HF_TOKEN");
        }
        for other in [
            "http://huggingface.co",
            "https://huggingface.co.example",
            "https://huggingface.co:8443",
            "https://hub.example/huggingface.co",
        ] {
            assert_eq!(token_of(other), "HF_ENDPOINT_TOKEN", "{other}");
        }
    }
}
