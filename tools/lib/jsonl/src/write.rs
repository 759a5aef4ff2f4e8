//! Standard output that knows a closed pipe, and files that appear whole.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Why writing failed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Whoever read our standard output has gone away: the work is over, and
    /// nothing is wrong.
    #[error("the reader of standard output went away")]
    ReaderGone,
    /// Anything else, such as a full disk.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was written to.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl WriteError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Standard output for records. Call [`Output::finish`] at the end: an error of
/// the last flush counts as much as any other.
pub struct Output {
    out: BufWriter<io::Stdout>,
}

impl Output {
    /// Locks nothing: one thread writes.
    pub fn stdout() -> Self {
        Self {
            out: BufWriter::with_capacity(1 << 16, io::stdout()),
        }
    }

    /// Writes one line through `write`, which must end it with a newline.
    pub fn line(
        &mut self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        write(&mut self.out).map_err(Self::error)
    }

    /// Writes one record as a line.
    pub fn record(&mut self, record: &record::Record) -> Result<(), WriteError> {
        record.write_line(&mut self.out).map_err(Self::error)
    }

    /// Writes any value as one JSON line.
    pub fn json(&mut self, value: &impl serde::Serialize) -> Result<(), WriteError> {
        self.line(|mut out| {
            serde_json::to_writer(&mut out, value)?;
            out.write_all(b"\n")
        })
    }

    /// Hands what is buffered to the reader.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        self.out.flush().map_err(Self::error)
    }

    /// The final flush.
    pub fn finish(mut self) -> Result<(), WriteError> {
        self.flush()
    }

    fn error(source: io::Error) -> WriteError {
        if source.kind() == io::ErrorKind::BrokenPipe {
            WriteError::ReaderGone
        } else {
            WriteError::io(Path::new("standard output"), source)
        }
    }
}

/// A file written as `NAME.part` and renamed to its name by [`AtomicFile::commit`];
/// dropped without that, it leaves nothing behind. A path that exists and is no
/// regular file (`/dev/null`, a pipe) is written to directly.
pub struct AtomicFile {
    path: PathBuf,
    part: Option<PathBuf>,
    out: BufWriter<File>,
}

impl AtomicFile {
    /// Starts the file; missing folders above it are made. A link stays one.
    pub fn create(path: &Path) -> Result<Self, WriteError> {
        let linked = path.is_symlink().then(|| path.canonicalize().ok());
        let path = linked.flatten().unwrap_or_else(|| path.to_owned());
        let path = path.as_path();
        let direct = path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir());
        let part = (!direct).then(|| {
            let mut name = path.as_os_str().to_owned();
            name.push(".part");
            PathBuf::from(name)
        });
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| WriteError::io(folder, e))?;
        }
        let target = part.as_deref().unwrap_or(path);
        let file = if direct {
            File::options().write(true).open(target)
        } else {
            File::create(target)
        }
        .map_err(|e| WriteError::io(target, e))?;
        Ok(Self {
            path: path.to_owned(),
            part,
            out: BufWriter::with_capacity(1 << 16, file),
        })
    }

    /// Writes one record as a line.
    pub fn record(&mut self, record: &record::Record) -> Result<(), WriteError> {
        record
            .write_line(&mut self.out)
            .map_err(|e| WriteError::io(&self.path, e))
    }

    /// Flushes, syncs to the disk and renames into place.
    pub fn commit(mut self) -> Result<(), WriteError> {
        let error = |e| WriteError::io(&self.path, e);
        self.out.flush().map_err(error)?;
        if let Some(part) = self.part.take() {
            self.out.get_ref().sync_all().map_err(error)?;
            std::fs::rename(&part, &self.path).map_err(error)?;
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            // The work failed already; a leftover is no second failure.
            let _ = std::fs::remove_file(part);
        }
    }
}

/// Where refused records and malformed lines go: a file, or nowhere.
pub struct Rejects(Option<AtomicFile>);

impl Rejects {
    /// A file if there is a path.
    pub fn create(path: Option<&Path>) -> Result<Self, WriteError> {
        path.map(AtomicFile::create).transpose().map(Self)
    }

    /// Whether what is written is kept.
    pub fn are_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Writes one record as a line.
    pub fn record(&mut self, record: &record::Record) -> Result<(), WriteError> {
        self.0.as_mut().map_or(Ok(()), |file| file.record(record))
    }

    /// Puts the file in its place.
    pub fn commit(self) -> Result<(), WriteError> {
        self.0.map_or(Ok(()), AtomicFile::commit)
    }
}

impl Write for Rejects {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .as_mut()
            .map_or(Ok(bytes.len()), |file| file.write(bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.as_mut().map_or(Ok(()), AtomicFile::flush)
    }
}

/// Writes a whole file at once, so that it is there complete or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(|e| WriteError::io(path, e))?;
    file.commit()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/file.jsonl");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            0
        );
        write_atomically(&path, b"whole").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_atomically(&link, b"by a link").unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"by a link");
        let full = write_atomically(Path::new("/dev/full"), b"x")
            .unwrap_err()
            .to_string();
        assert!(full.starts_with("/dev/full: "), "{full}");
    }
}
