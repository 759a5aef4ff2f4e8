//! Streams of JSON lines: where each record came from, what to do with a line
//! that is none, and files that appear whole or not at all.
//!
//! Reading gives the position of every line, for an error that does not name
//! it cannot be acted on. Writing goes through [`Output`], which alone may take
//! a closed pipe for the end of the work, and [`AtomicFile`], which shows a
//! file under its name only once it is complete. What must outlive a crash line by line
//! goes into a [`Journal`].

mod journal;
mod read;
mod write;

pub use journal::{Journal, JournalError, journal_lines};
pub use read::{Line, Lines, Position, ReadError, Records, apart_from_output, open};
pub use write::{AtomicFile, Output, Rejects, WriteError, write_atomically};
