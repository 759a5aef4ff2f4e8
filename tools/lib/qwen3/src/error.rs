//! What can be wrong with a model's files, said with the file, the key or
//! tensor, and what would be right.

use std::fs::File;
use std::io::{self, Read};
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

/// Whether it comes of a device that had no room, for those who know what would need less.
pub fn is_out_of_memory(error: &(dyn std::error::Error + 'static)) -> bool {
    let of = |error: &engine::Error| matches!(error, engine::Error::OutOfMemory { .. });
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        let below = match error.downcast_ref::<Error>() {
            Some(Error::Engine(below)) => Some(below),
            _ => error.downcast_ref::<engine::Error>(),
        };
        below.is_some_and(of)
    })
}

/// Opens a file of a model or an adapter.
///
/// # Errors
/// If there is none, or it is none: a pipe or a device could be waited for without end.
pub(crate) fn open(path: &Path) -> Result<File> {
    let unreadable = |source| Error::Read {
        path: path.into(),
        source,
    };
    if !path.metadata().map_err(unreadable)?.is_file() {
        return Err(Error::file(path, "is no regular file"));
    }
    File::open(path).map_err(unreadable)
}

/// Refuses what git leaves in place of a large file that it was not asked for.
pub(crate) fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    const BEGINS: &[u8] = b"version https://git-lfs.github.com/spec/";
    match bytes.starts_with(BEGINS) {
        true => Err(Error::file(
            path,
            "is a pointer of Git LFS, not the file itself: `git lfs pull` in its folder fetches that",
        )),
        false => Ok(()),
    }
}

/// The bytes of a file of a model or an adapter.
///
/// # Errors
/// If it cannot be read, is no regular file, or only a pointer of Git LFS.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = open(path)?;
    file.read_to_end(&mut bytes).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// The text of a file of a model or an adapter, if there is such a file.
pub(crate) fn read_text_if_there(path: &Path) -> Result<Option<String>> {
    let bytes = match read(path) {
        Ok(bytes) => bytes,
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let text = String::from_utf8(bytes).map_err(|_| Error::Read {
        path: path.into(),
        source: io::Error::new(
            io::ErrorKind::InvalidData,
            "stream did not contain valid UTF-8",
        ),
    })?;
    Ok(Some(text))
}
