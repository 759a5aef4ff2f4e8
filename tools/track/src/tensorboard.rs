//! A TensorBoard event file. It is a function of what was read: whatever cut a write short,
//! the file is held against what it has to be, and the rest appended.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cli::Failure;

use crate::event;
use crate::spool::{Entry, Spool};

/// The file of a run.
pub struct TensorBoard {
    folder: PathBuf,
    /// Once it is known to hold so many entries, the last at that time.
    open: Option<(File, usize, u64)>,
}

impl TensorBoard {
    /// A file in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            open: None,
        }
    }

    /// Writes what is not there yet.
    ///
    /// # Errors
    /// If it cannot be written, or is another's.
    pub fn send(&mut self, spool: &Spool) -> Result<()> {
        let head = spool.head()?;
        // TensorBoard knows its files by `tfevents`, and reads those of a folder by their names.
        let name = format!(
            "events.out.tfevents.{:010}.track.{}",
            head.began / 1000,
            head.id
        );
        let path = self.folder.join(name);
        let shown = path.display();
        let failed = |error: io::Error| Failure::World(format!("{shown}: {error}"));
        let entries = spool.entries();
        let (mut file, bytes, last) = match self.open.take() {
            Some((file, done, last)) => {
                let (bytes, last) = render(&entries[done..], last);
                (file, bytes, last)
            }
            None => {
                let (rest, last) = render(entries, head.began);
                let whole = [event::first(head), rest].concat();
                std::fs::create_dir_all(&self.folder).map_err(failed)?;
                let mut options = File::options();
                options.create(true).read(true).append(true);
                let mut file = options.open(&path).map_err(failed)?;
                let mut there = Vec::new();
                file.read_to_end(&mut there).map_err(failed)?;
                let Some(rest) = whole.strip_prefix(there.as_slice()) else {
                    let cause = "is not as track wrote it; move it away, and it is written anew";
                    return Err(Failure::World(format!("{shown}: {cause}")).into());
                };
                (file, rest.to_vec(), last)
            }
        };
        file.write_all(&bytes).map_err(failed)?;
        self.open = Some((file, entries.len(), last));
        Ok(())
    }
}

/// The records of entries, and the time of the last.
fn render(entries: &[Entry], mut last: u64) -> (Vec<u8>, u64) {
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend(event::of(entry, last));
        if let Entry::Line(line) = entry {
            last = line.at;
        }
    }
    (bytes, last)
}
