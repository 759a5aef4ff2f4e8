//! Which rows an adapter has seen: `rows.jsonl` beside it.
//!
//! Whether a row was trained on cannot be told from the adapter, and a figure over such
//! a row says nothing. So training leaves the names of its rows, which are hashes and no
//! text, and whoever evaluates keeps to the others.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use record::Split;
use serde::{Deserialize, Serialize};

use crate::adapter::Sums;
use crate::error::{Error, Result, read_text_if_there};

/// The file's name.
pub const ROWS: &str = "rows.jsonl";

/// The rows that an adapter has seen, by [`Conversation::row`](crate::Conversation::row).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen(BTreeMap<String, Split>);

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    row: Cow<'a, str>,
    split: Split,
}

impl Seen {
    /// Notes a row. One that was trained on once is not held out, whatever else is said
    /// of it.
    pub fn add(&mut self, row: &str, side: Split) {
        let known = self.0.entry(row.to_owned()).or_insert(side);
        if side == Split::Train {
            *known = side;
        }
    }

    /// Notes the rows that were trained on before.
    pub fn add_trained(&mut self, before: &Self) {
        for row in before.of(Split::Train) {
            self.add(row, Split::Train);
        }
    }

    /// The side that a row was on, if it was there.
    pub fn side(&self, row: &str) -> Option<Split> {
        self.0.get(row).copied()
    }

    /// The rows of one side.
    pub fn of(&self, side: Split) -> BTreeSet<&str> {
        let rows = self.0.iter().filter(|&(_, of)| *of == side);
        rows.map(|(row, _)| row.as_str()).collect()
    }

    /// The text of the file.
    pub fn to_lines(&self) -> String {
        let line = |(row, &split): (&String, &Split)| {
            let row = row.as_str().into();
            serde_json::to_string(&Line { row, split }).expect("two texts are serialisable") + "\n"
        };
        self.0.iter().map(line).collect()
    }

    /// Reads the file beside an adapter, if there is one.
    ///
    /// # Errors
    /// If it cannot be read, or is not as it was written by its sum in `SHA256SUMS`.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(ROWS);
        let Some(text) = read_text_if_there(&path)? else {
            return Ok(None);
        };
        if let Some(sums) = Sums::read(folder)? {
            sums.check(folder, ROWS, text.as_bytes())?;
        }
        let mut seen = Self::default();
        for (line, at) in text.lines().zip(1..) {
            let line: Line = serde_json::from_str(line)
                .map_err(|error| Error::file(&path, format!("line {at}: {error}")))?;
            seen.add(&line.row, line.split);
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

        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Seen::read(folder.path()).unwrap(), None);
        std::fs::write(folder.path().join(ROWS), seen.to_lines()).unwrap();
        assert_eq!(Seen::read(folder.path()).unwrap(), Some(seen));
        for between in ["  ", " *"] {
            let sums = format!("{:064}{between}{ROWS}\n", 0);
            std::fs::write(folder.path().join("SHA256SUMS"), sums).unwrap();
            let error = Seen::read(folder.path()).unwrap_err().to_string();
            assert!(
                error.contains("rows.jsonl: is not as it was written"),
                "{error}"
            );
        }
    }
}
