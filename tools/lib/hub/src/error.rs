//! What can go wrong, worded for the person who has to do something about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::{ENDPOINT, HUB_TOKEN, Passed, token_of};

/// The token that opens `endpoint`, and, where one could take another for it, which does not.
fn of_whom(endpoint: &str) -> String {
    match token_of(endpoint) {
        HUB_TOKEN => HUB_TOKEN.into(),
        mirrors => format!("{mirrors} ({HUB_TOKEN} goes to {ENDPOINT} alone)"),
    }
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No folder of a model, and no name either.
    #[error(
        "no model in {0}: name a folder in Hugging Face layout, or a model on the hub such as \
         Qwen/Qwen3-8B"
    )]
    NoModel(String),
    /// An address or a token that cannot be used.
    #[error(transparent)]
    Config(#[from] httpclient::ConfigError),
    /// Neither here nor there.
    #[error(
        "there is neither a model in a folder {model} nor one of that name on {endpoint}: is it \
         spelled right? A private or gated one needs {} in the environment or .env",
        of_whom(endpoint)
    )]
    Nowhere {
        /// As it was asked for.
        model: String,
        /// Where it was looked for.
        endpoint: String,
        /// The hub's answer.
        source: Box<httpclient::Error>,
    },
    /// It is there for others.
    #[error(
        "the hub has {model} and does not give it out: its licence may have to be accepted on its \
         page ({ENDPOINT}/{model}), by the owner of {}",
        of_whom(endpoint)
    )]
    Gated {
        /// As it was asked for.
        model: String,
        /// Who was asked.
        endpoint: String,
        /// The hub's answer.
        source: Box<httpclient::Error>,
    },
    /// Whether the hub has it is not known.
    #[error(
        "there is no model in a folder {model}{}, and the hub could not be asked for one of that name",
        passed.as_ref().map_or(String::new(), |passed| format!(" ({passed})"))
    )]
    NotAsked {
        /// As it was asked for.
        model: String,
        /// What there is of it in the Hugging Face cache.
        passed: Option<Passed>,
        /// What went wrong.
        source: Box<httpclient::Error>,
    },
    /// An answer that is none of the hub's.
    #[error(transparent)]
    Answer(#[from] Box<httpclient::Error>),
    /// Weights in another form.
    #[error("{0} has no weights as safetensors, the only form that is read")]
    NoWeights(String),
    /// Two at once would spoil each other's files.
    #[error("{} is being downloaded by another process", .0.display())]
    Busy(PathBuf),
    /// A file did not come whole.
    #[error("{}", path.display())]
    Download {
        /// What there is of it.
        path: PathBuf,
        /// What went wrong.
        source: Box<httpclient::DownloadError>,
    },
    /// A file came whole and is another.
    #[error("{} {what}: it was deleted; run it again", path.display())]
    Wrong {
        /// Where it was.
        path: PathBuf,
        /// How it differs from what the hub says.
        what: String,
    },
    /// A file or folder here.
    #[error("{}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file here could not be written.
    #[error(transparent)]
    Write(#[from] jsonl::WriteError),
    /// The system gives no network events.
    #[error("starting the network")]
    Runtime(#[source] io::Error),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
