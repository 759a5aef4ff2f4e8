//! Which rows an adapter has seen: `rows.jsonl` beside it.
//!
//! Whether a row was trained on cannot be told from the adapter, and a figure over such
//! a row says nothing. So training leaves the names of its rows, and whoever evaluates
//! keeps to the others. The names are hashes, without salt since they are to be compared:
//! whoever has a text, or guesses it, can tell whether it is there.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use record::Split;
use serde::{Deserialize, Serialize};

use crate::adapter::{SUMS, Sums};
use crate::error::{Error, Result, read_text_if_there};

/// The file's name.
pub const ROWS: &str = "rows.jsonl";

/// The rows that an adapter has seen, by [`Conversation::row`](crate::Conversation::row).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    rows: BTreeMap<String, Split>,
    /// Whether others were trained on, whose names are not known.
    has_gap: bool,
}

/// A line of the file; without a name it stands for all that are not known.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    row: Option<Cow<'a, str>>,
    split: Split,
}

/// Bytes of a line, its end included, at most.
const LINE: usize = 60;

impl Seen {
    /// What is known of an adapter without the file: that it was trained on some rows.
    pub fn unknown() -> Self {
        Self {
            has_gap: true,
            ..Self::default()
        }
    }

    /// Whether rows may have been trained on that are not here: the adapter, or one that
    /// it began from, came without the file.
    pub fn has_gap(&self) -> bool {
        self.has_gap
    }

    /// Notes a row. One that was trained on once is not held out, whatever else is said
    /// of it.
    pub fn add(&mut self, row: &str, side: Split) {
        let known = self.rows.entry(row.to_owned()).or_insert(side);
        if side == Split::Train {
            *known = side;
        }
    }

    /// Notes the rows that were trained on before.
    pub fn add_trained(&mut self, before: &Self) {
        self.has_gap |= before.has_gap;
        for row in before.of(Split::Train) {
            self.add(row, Split::Train);
        }
    }

    /// The side that a row was on, if it was there.
    pub fn side(&self, row: &str) -> Option<Split> {
        self.rows.get(row).copied()
    }

    /// The rows of one side.
    pub fn of(&self, side: Split) -> BTreeSet<&str> {
        let rows = self.rows.iter().filter(|&(_, of)| *of == side);
        rows.map(|(row, _)| row.as_str()).collect()
    }

    /// The text of the file.
    pub fn to_lines(&self) -> String {
        let line = |(row, split): (Option<&String>, Split)| {
            let row = row.map(|row| row.as_str().into());
            serde_json::to_string(&Line { row, split }).expect("two texts are serialisable") + "\n"
        };
        let gap = self.has_gap.then_some((None, Split::Train));
        let rows = self.rows.iter().map(|(row, &side)| (Some(row), side));
        gap.into_iter().chain(rows).map(line).collect()
    }

    /// Bytes of that text at most.
    pub fn most_bytes(&self) -> usize {
        (1 + self.rows.len()) * LINE
    }

    /// Reads the file beside an adapter, if there is one.
    ///
    /// # Errors
    /// If it cannot be read, or is missing or not as it was written by its sum in
    /// `SHA256SUMS`; with what helps.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(ROWS);
        let sums = Sums::read(folder)?;
        let is_summed = sums.as_ref().is_some_and(|sums| sums.names(ROWS));
        let helps = |reason: String| {
            let sum = match is_summed {
                true => format!(" && sed -i '/{ROWS}/d' {SUMS}"),
                false => String::new(),
            };
            Error::file(
                &path,
                format!(
                    "{reason}; put it back, or do without it, and what was trained on is not known: \
                     `(cd '{}' && rm -f {ROWS}{sum})`",
                    folder.display()
                ),
            )
        };
        let text = match read_text_if_there(&path) {
            Ok(Some(text)) => text,
            Ok(None) if is_summed => return Err(helps(format!("is missing, and {SUMS} names it"))),
            Ok(None) => return Ok(None),
            Err(Error::Read { source, .. }) => {
                return Err(helps(format!("cannot be read: {source}")));
            }
            Err(Error::File { reason, .. }) => return Err(helps(reason)),
            Err(other) => return Err(other),
        };
        if let Some(sums) = sums {
            let checked = sums.check(folder, ROWS, text.as_bytes());
            checked.map_err(|error| match error {
                Error::File { reason, .. } => helps(reason),
                other => other,
            })?;
        }
        let mut seen = Self::default();
        for (line, at) in text.lines().zip(1..) {
            let line: Line =
                serde_json::from_str(line).map_err(|error| helps(format!("line {at}: {error}")))?;
            match &line.row {
                Some(row) => seen.add(row, line.split),
                None => seen.has_gap = true,
            }
        }
        Ok(Some(seen))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_trained_on_once_is_not_held_out() {
        let mut seen = Seen::default();
        seen.add("a", Split::Eval);
        seen.add("b", Split::Train);
        seen.add("b", Split::Eval);
        let mut later = Seen::default();
        later.add("a", Split::Train);
        later.add("c", Split::Eval);
        seen.add_trained(&later);
        assert_eq!(seen.of(Split::Train), ["a", "b"].into());
        assert_eq!((seen.side("b"), seen.side("c")), (Some(Split::Train), None));

        assert!(!seen.has_gap());
        seen.add_trained(&Seen::unknown());
        assert!(seen.has_gap());
        assert_eq!(seen.of(Split::Train).len(), 2);

        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Seen::read(folder.path()).unwrap(), None);
        std::fs::write(folder.path().join(ROWS), seen.to_lines()).unwrap();
        assert_eq!(Seen::read(folder.path()).unwrap(), Some(seen));
    }

    #[test]
    fn no_file_is_longer_than_is_said() {
        let mut seen = Seen::unknown();
        for row in 0..100_u128 {
            seen.add(&format!("{row:032x}"), Split::Train);
        }
        let (bytes, most) = (seen.to_lines().len(), seen.most_bytes());
        assert!((most * 19 / 20..=most).contains(&bytes), "{bytes} {most}");
    }

    /// What helps is typed as it stands.
    #[test]
    fn a_damaged_list_can_be_done_without() {
        let folder = tempfile::tempdir().unwrap();
        let (path, sums) = (folder.path().join(ROWS), folder.path().join(SUMS));
        let fails = |said: &str| {
            let error = Seen::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("rows.jsonl: {said}")), "{error}");
            let command = error.rsplit('`').nth(1).unwrap().to_owned();
            let shell = std::process::Command::new("sh")
                .args(["-c", &command])
                .status();
            assert!(shell.unwrap().success(), "{command}");
            assert_eq!(Seen::read(folder.path()).unwrap(), None, "{command}");
        };
        let other = format!("{:064}  other\n", 1);
        for between in ["  ", " *"] {
            std::fs::write(&path, "").unwrap();
            let sum = format!("{:064}{between}{ROWS}\n", 0);
            std::fs::write(&sums, other.clone() + &sum).unwrap();
            fails("is not as it was written");
            assert_eq!(std::fs::read_to_string(&sums).unwrap(), other);
            std::fs::write(&sums, other.clone() + &sum).unwrap();
            fails("is missing, and SHA256SUMS names it");
        }
        std::fs::remove_file(&sums).unwrap();
        std::fs::write(&path, "{}\n{\n").unwrap();
        fails("line 1: missing field `split`");
        std::fs::write(&path, b"\xff").unwrap();
        fails("cannot be read: stream did not contain valid UTF-8");
    }
}
