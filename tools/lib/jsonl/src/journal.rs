//! A file of lines that only grows: what was paid for, or took long, is on the disk before it
//! counts, and is found there by the next run.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A pipe, say, which would be waited for without end.
    #[error("{}: is no regular file", .0.display())]
    NoFile(PathBuf),
    /// Two at once would write over each other, and pay twice.
    #[error("{}: another {by} is at work here; let it finish", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// The tool whose journal it is.
        by: String,
    },
    /// The system gave no access to it.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was tried, such as `opening`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The file, locked for this process until it goes.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines: whatever stands behind them is no line of ours.
    whole: u64,
    torn: u64,
}

impl Journal {
    /// Opens or makes the journal of the tool `by` at `path`, whose folder is made too, and
    /// reads its whole lines. It is not changed before the first [`append`](Self::append).
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(path: &Path, by: &str) -> Result<(Self, Vec<u8>), JournalError> {
        let failed = |doing: &'static str| {
            move |source| JournalError::Io {
                doing,
                path: path.to_owned(),
                source,
            }
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| JournalError::Io {
                doing: "making the folder",
                path: folder.to_owned(),
                source,
            })?;
        }
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            return Err(JournalError::NoFile(path.to_owned()));
        }
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(path).map_err(failed("opening"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::Busy {
                    path: path.to_owned(),
                    by: by.to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed("locking")(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed("reading"))?;
        // A line without its end is one that a crash cut off, maybe inside a character.
        let end = bytes.iter().rposition(|&byte| byte == b'\n');
        let whole = end.map_or(0, |at| at + 1);
        let torn = (bytes.len() - whole) as u64;
        bytes.truncate(whole);
        let journal = Self {
            path: path.to_owned(),
            file,
            whole: whole as u64,
            torn,
        };
        Ok((journal, bytes))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes without an end that stood behind the last line when it was opened.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Puts a line on the disk, or nothing: what is written after one that did not fit must
    /// not become its end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&mut self, line: &impl Serialize) -> Result<(), JournalError> {
        let written = self.try_append(line);
        if written.is_err() {
            // What cannot be cut off is written over, or else is a line without its end.
            let _ = self.file.set_len(self.whole);
        }
        written.map_err(|source| JournalError::Io {
            doing: "writing",
            path: self.path.clone(),
            source,
        })
    }

    fn try_append(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(line)?;
        line.push(b'\n');
        self.file.set_len(self.whole)?;
        self.file.seek(SeekFrom::Start(self.whole))?;
        self.file.write_all(&line)?;
        self.file.sync_data()?;
        self.whole += line.len() as u64;
        Ok(())
    }
}

/// The lines of what [`Journal::open`] read, each without its end and with its number.
pub fn journal_lines(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let lines = bytes.split_inclusive(|&byte| byte == b'\n');
    (1..).zip(lines.map(<[u8]>::trim_ascii_end))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn lines(path: &Path) -> (Journal, Vec<String>) {
        let (journal, bytes) = Journal::open(path, "tool").unwrap();
        let lines = journal_lines(&bytes).map(|(_, line)| String::from_utf8(line.into()).unwrap());
        (journal, lines.collect())
    }

    #[test]
    fn what_was_cut_off_is_no_line_and_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/journal.jsonl");
        let (mut journal, found) = lines(&path);
        assert!(found.is_empty() && journal.torn() == 0);
        journal.append(&1).unwrap();
        journal.append(&"two").unwrap();
        drop(journal);
        // The end of a line that a crash cut off inside a character.
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(b"\"three \xe2\x82");
        fs::write(&path, &bytes).unwrap();
        let (mut journal, found) = lines(&path);
        assert_eq!(found, ["1", "\"two\""]);
        assert_eq!(journal.torn(), 9);
        assert_eq!(
            fs::read(&path).unwrap(),
            bytes,
            "nothing is lost by looking"
        );
        journal.append(&4).unwrap();
        drop(journal);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n\"two\"\n4\n");
    }

    #[test]
    fn one_at_a_time_and_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (journal, _) = lines(&path);
        let busy = Journal::open(&path, "tool").unwrap_err().to_string();
        assert!(busy.ends_with("journal.jsonl: another tool is at work here; let it finish"));
        drop(journal);
        lines(&path);
        let no_file = Journal::open(folder.path(), "tool").unwrap_err();
        assert!(matches!(no_file, JournalError::NoFile(_)), "{no_file}");
    }
}
