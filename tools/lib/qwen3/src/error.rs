//! What can be wrong with a model's files, said with the file, the key or
//! tensor, and what would be right.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model, a tokenizer or an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("{}: cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that should be JSON is not.
    #[error("{}: not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// A key is missing, malformed, or asks for what is not supported.
    #[error("{}: `{key}` {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing, unexpected, or of another type or shape.
    #[error("{}: tensor `{name}` {reason}", path.display())]
    Tensor {
        /// The file it is, or should be, in.
        path: PathBuf,
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is wrong as a whole.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A conversation does not go through the chat template.
    #[error("the chat template refuses this conversation")]
    Template(#[source] minijinja::Error),
    /// A text cannot be tokenised.
    #[error("the tokenizer fails: {0}")]
    Tokenizer(String),
    /// The rendered text holds another number of assistant turns than the
    /// conversation.
    #[error(
        "{expected} assistant turns render as {found}: a text holds the chat format's own markers, \
         or the template is not Qwen3's"
    )]
    Turns {
        /// Assistant messages given.
        expected: usize,
        /// Assistant turns found in the rendered text.
        found: usize,
    },
    /// An adapter's settings do not go with the model.
    #[error(transparent)]
    Unfit(#[from] crate::Unfit),
    /// The machine failed.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// The result of whatever reads or writes a model's files.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn key(path: &Path, key: impl Into<String>, reason: impl Into<String>) -> Self {
        let (key, reason) = (key.into(), reason.into());
        Self::Key {
            path: path.into(),
            key,
            reason,
        }
    }

    pub(crate) fn tensor(path: &Path, name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor {
            path: path.into(),
            name: name.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File {
            path: path.into(),
            reason: reason.into(),
        }
    }
}

/// The bytes of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })
}

/// The text of a file, if there is such a file.
pub(crate) fn read_text_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.into(),
            source,
        }),
    }
}
