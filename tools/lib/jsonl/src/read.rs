//! Lines and records with their positions.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use record::{BadLine, Record};

/// A line longer than this is refused: it is no record of ours, and reading it
/// whole could exhaust the memory.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Where a line stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The file's path; `-` is standard input.
    pub file: String,
    /// Counted from 1.
    pub line: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Why reading stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file that cannot be opened: the user named it.
    #[error("{}: {source}", path.display())]
    Open {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that stopped being readable.
    #[error("{position}: reading failed: {source}")]
    Io {
        /// The line that was being read.
        position: Position,
        /// What the system said.
        source: io::Error,
    },
    /// A line that is not a record.
    #[error("{position}: {cause}")]
    Bad {
        /// Where it stands.
        position: Position,
        /// What is wrong with it.
        cause: String,
    },
    /// The rejects file, where a bad line was to be kept, failed.
    #[error("writing a bad line to the rejects file failed: {0}")]
    Rejects(io::Error),
}

/// One line of text without its end.
#[derive(Clone, Debug)]
pub struct Line {
    /// Where it stands.
    pub position: Position,
    /// Its text, or the bytes that are not UTF-8.
    pub text: Result<String, Vec<u8>>,
}

/// Standard input for `-`, else the file.
///
/// # Errors
/// What cannot be opened, is a folder, or is not [`apart_from_output`].
pub fn open(path: &Path) -> Result<Box<dyn BufRead + Send>, ReadError> {
    let open = |source| ReadError::Open {
        path: path.to_owned(),
        source,
    };
    apart_from_output(path).map_err(open)?;
    if path == Path::new("-") {
        return Ok(Box::new(BufReader::with_capacity(1 << 16, io::stdin())));
    }
    let file = File::open(path).map_err(open)?;
    if file.metadata().map_err(open)?.is_dir() {
        return Err(open(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    Ok(Box::new(BufReader::with_capacity(1 << 16, file)))
}

/// Refuses a file (standard input's for `-`) that standard output goes to as well: reading
/// would find what was written, without end.
///
/// # Errors
/// That it is one.
pub fn apart_from_output(path: &Path) -> io::Result<()> {
    let path = match path == Path::new("-") {
        true => Path::new("/dev/stdin"),
        false => path,
    };
    match (path.metadata(), fs::metadata("/dev/stdout")) {
        (Ok(read), Ok(written))
            if read.is_file() && (read.dev(), read.ino()) == (written.dev(), written.ino()) =>
        {
            let cause = "is the file that is standard output too; write to another one";
            Err(io::Error::other(cause))
        }
        _ => Ok(()),
    }
}

/// The lines of a file or of standard input. Empty lines are passed over, a
/// byte-order mark and carriage returns at a line's end are dropped.
pub struct Lines {
    source: Box<dyn BufRead + Send>,
    position: Position,
    bytes: Vec<u8>,
}

impl Lines {
    /// Standard input for `-`, else the file, see [`open`].
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Ok(Self::new(path.display().to_string(), open(path)?))
    }

    /// Lines of any reader, named `file` in errors.
    pub fn new(file: impl Into<String>, source: impl BufRead + Send + 'static) -> Self {
        Self {
            source: Box::new(source),
            position: Position {
                file: file.into(),
                line: 0,
            },
            bytes: Vec::new(),
        }
    }

    fn read(&mut self) -> Result<Option<Line>, ReadError> {
        loop {
            self.bytes.clear();
            self.position.line += 1;
            let mut limited = io::Read::take(&mut self.source, MAX_LINE_BYTES as u64 + 1);
            let read = limited
                .read_until(b'\n', &mut self.bytes)
                .map_err(|source| ReadError::Io {
                    position: self.position.clone(),
                    source,
                })?;
            if read == 0 {
                return Ok(None);
            }
            let other = no_text(&self.bytes).filter(|_| self.position.line == 1);
            let too_long = || format!("the line is longer than {} MiB", MAX_LINE_BYTES >> 20);
            let refused =
                (other.map(str::to_owned)).or_else(|| (read > MAX_LINE_BYTES).then(too_long));
            if let Some(cause) = refused {
                let position = self.position.clone();
                return Err(ReadError::Bad { position, cause });
            }
            let mut line = self.bytes.as_slice();
            if self.position.line == 1 {
                line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
            }
            line = line.strip_suffix(b"\n").unwrap_or(line);
            line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let text = String::from_utf8(line.to_vec()).map_err(|e| e.into_bytes());
            return Ok(Some(Line {
                position: self.position.clone(),
                text,
            }));
        }
    }
}

/// What a stream that begins so is, if it is one of those that are taken for JSON lines
/// by mistake; each of its lines would be a bad one.
fn no_text(begins: &[u8]) -> Option<&'static str> {
    match begins {
        [0x1f, 0x8b, ..] => Some("this is gzip, not text: put it through `gzip -dc` first"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Some("this is zstd, not text: put it through `zstd -dc` first")
        }
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            Some("this is UTF-16, not UTF-8: put it through `iconv -f UTF-16 -t UTF-8` first")
        }
        [0, 0, ..] => Some("this is not text: it begins with zeros"),
        [0, ..] => {
            Some("this is UTF-16, not UTF-8: put it through `iconv -f UTF-16BE -t UTF-8` first")
        }
        [_, 0, ..] => {
            Some("this is UTF-16, not UTF-8: put it through `iconv -f UTF-16LE -t UTF-8` first")
        }
        _ => None,
    }
}

impl Iterator for Lines {
    type Item = Result<Line, ReadError>;
    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The records of a stream. A malformed line ends the reading, unless some are
/// allowed: then it goes to the rejects file as a [`BadLine`].
pub struct Records {
    lines: Lines,
    by: String,
    max_bad: u64,
    bad: u64,
}

impl Records {
    /// Records of `lines`, of which at most `max_bad` may be malformed; `by` is the tool
    /// that reads them.
    pub fn new(lines: Lines, by: &str, max_bad: u64) -> Self {
        Self {
            lines,
            by: by.to_owned(),
            max_bad,
            bad: 0,
        }
    }

    /// How many malformed lines were passed over so far.
    pub fn bad(&self) -> u64 {
        self.bad
    }

    /// The next record that `check` accepts; its errors count as malformed
    /// lines. Bad lines within the allowance are written to `rejects`.
    pub fn next_with<T>(
        &mut self,
        rejects: &mut dyn Write,
        mut check: impl FnMut(Record) -> Result<T, record::Error>,
    ) -> Result<Option<(Position, T)>, ReadError> {
        while let Some(line) = self.lines.next().transpose()? {
            let position = line.position;
            let cause = match &line.text {
                Ok(text) => match Record::parse(text).and_then(&mut check) {
                    Ok(value) => return Ok(Some((position, value))),
                    Err(error) => error.to_string(),
                },
                Err(_) => "not valid UTF-8".to_owned(),
            };
            self.bad += 1;
            if self.bad > self.max_bad {
                let cause = match self.max_bad {
                    0 => cause,
                    allowed => format!("{cause} (--max-bad-lines {allowed} is used up)"),
                };
                return Err(ReadError::Bad { position, cause });
            }
            let Position { file, line: at } = position;
            let raw = line.text.map_or_else(|bytes| bytes, String::into_bytes);
            let bad = BadLine::new(&self.by, file, at, cause, raw);
            serde_json::to_writer(&mut *rejects, &serde_json::json!({ "bad_line": bad }))
                .map_err(io::Error::from)
                .and_then(|()| rejects.write_all(b"\n"))
                .map_err(ReadError::Rejects)?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn records(text: &'static [u8], max_bad: u64) -> Records {
        Records::new(Lines::new("f", text), "t", max_bad)
    }

    #[test]
    fn marks_ends_and_empty_lines_are_no_records() {
        let mut records = records(b"\xef\xbb\xbf{\"a\":1}\r\n\n  \n{\"a\":2}", 0);
        let mut next = || records.next_with(&mut io::sink(), Ok).unwrap();
        assert_eq!(next().unwrap().0.line, 1);
        assert_eq!(next().unwrap().0.line, 4);
        assert!(next().is_none());
    }

    #[test]
    fn what_is_no_text_is_told_by_name() {
        let utf16: Vec<u8> = ("\u{feff}{}\n".encode_utf16())
            .flat_map(u16::to_le_bytes)
            .collect();
        let big_end: Vec<u8> = ("{}\n".encode_utf16()).flat_map(u16::to_be_bytes).collect();
        for (bytes, said) in [
            (b"\x1f\x8b\x08\x00\n".to_vec(), "gzip -dc"),
            (b"\x28\xb5\x2f\xfd\x04\n".to_vec(), "zstd -dc"),
            (utf16.clone(), "iconv -f UTF-16"),
            (utf16[2..].to_vec(), "iconv -f UTF-16"),
            (big_end, "iconv -f UTF-16"),
        ] {
            // However many bad lines there may be: all of them would be.
            let mut records = Records::new(Lines::new("f", io::Cursor::new(bytes)), "t", 9);
            let error = records.next_with(&mut io::sink(), Ok).unwrap_err();
            let error = error.to_string();
            assert!(
                error.starts_with("f:1: this is ") && error.contains(said),
                "{error}"
            );
        }
    }

    #[test]
    fn a_line_is_too_long_whatever_it_begins_with() {
        // Zeros are what a power loss leaves at a file's end; only a first line tells
        // what the whole stream is.
        for (before, begins, said) in [
            ("", b"x ", "f:1: the line is longer"),
            ("", b"\0\0", "f:1: this is not text"),
            ("{}\n", b"x ", "f:2: the line is longer"),
            ("{}\n", b"\0\0", "f:2: the line is longer"),
            ("{}\n", b"\x1f\x8b", "f:2: the line is longer"),
        ] {
            let long = begins.repeat(MAX_LINE_BYTES / 2 + 1);
            let stream = io::Cursor::new([before.as_bytes(), &long].concat());
            let mut records = Records::new(Lines::new("f", stream), "t", 9);
            let mut rejects = Vec::new();
            let error = loop {
                match records.next_with(&mut rejects, Ok) {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("{before:?} {begins:?}: all was read"),
                    Err(error) => break error.to_string(),
                }
            };
            assert!(error.starts_with(said), "{before:?} {begins:?}: {error}");
            assert!(rejects.is_empty(), "{before:?} {begins:?}");
        }
    }

    #[test]
    fn bad_lines_are_kept_up_to_the_allowance() {
        let mut rejects = Vec::new();
        let mut some = records(b"{\"a\":1}\nnot json\n\xff\n{\"a\":2}\n[]\n", 2);
        let mut lines = Vec::new();
        let error = loop {
            match some.next_with(&mut rejects, Ok) {
                Ok(Some((position, _))) => lines.push(position.line),
                Ok(None) => panic!("the third bad line was let through"),
                Err(error) => break error.to_string(),
            }
        };
        assert_eq!(lines, [1, 4]);
        assert!(error.starts_with("f:5: not a JSON object"), "{error}");
        assert!(error.ends_with("--max-bad-lines 2 is used up)"), "{error}");
        let kept = String::from_utf8(rejects).unwrap();
        assert_eq!(kept.lines().count(), 2);
        assert!(
            kept.contains(r#""line":2"#)
                && kept.contains(r#""raw":"not json""#)
                && kept.contains("UTF-8")
        );
    }
}
