//! What can go wrong below the model.

use crate::nf4;

/// A failure of the machine, not of the caller: shapes that do not fit are bugs
/// and panic.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device could not give this much.
    #[error("out of memory: no room for {what} ({bytes} bytes)")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// A weight cannot be quantised.
    #[error(transparent)]
    Unfit(#[from] nf4::Error),
    /// It is missing, too old, or stopped working.
    #[error("{problem}; {remedy}")]
    Device {
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

/// The result of anything that touches a device.
pub type Result<T, E = Error> = std::result::Result<T, E>;
