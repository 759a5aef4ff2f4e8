//! Exit codes, and which error leads to which.

use std::process::ExitCode;

/// The exit codes that all tools share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done; also when the reader of standard output went away.
    Done = 0,
    /// A gate that was asked for said no.
    Gate = 1,
    /// Wrong usage or settings.
    Usage = 2,
    /// Bad input.
    Input = 3,
    /// The world: network, disk, model file, memory.
    World = 4,
    /// Interrupted; what was done is saved.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// An error whose exit code the tool decides. Errors of `jsonl` and `record`
/// bring theirs along; anything else is the world's.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A gate that was asked for said no: exit 1.
    #[error("{0}")]
    Gate(String),
    /// Wrong usage or settings: exit 2.
    #[error("{0}")]
    Usage(String),
    /// Bad input: exit 3.
    #[error("{0}")]
    Input(String),
    /// Network, disk, model file, memory: exit 4.
    #[error("{0}")]
    World(String),
    /// Interrupted: exit 130.
    #[error("{0}")]
    Interrupted(String),
}

/// The exit code of the innermost error that has one.
pub(crate) fn exit_of(error: &anyhow::Error) -> Exit {
    let of = |cause: &(dyn std::error::Error + 'static)| {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return Some(match failure {
                Failure::Gate(_) => Exit::Gate,
                Failure::Usage(_) => Exit::Usage,
                Failure::Input(_) => Exit::Input,
                Failure::World(_) => Exit::World,
                Failure::Interrupted(_) => Exit::Interrupted,
            });
        }
        if let Some(error) = cause.downcast_ref::<jsonl::ReadError>() {
            return Some(match error {
                jsonl::ReadError::Open { .. } => Exit::Usage,
                jsonl::ReadError::Bad { .. } => Exit::Input,
                jsonl::ReadError::Io { .. } | jsonl::ReadError::Rejects(_) => Exit::World,
            });
        }
        if let Some(error) = cause.downcast_ref::<jsonl::WriteError>() {
            return Some(match error {
                jsonl::WriteError::ReaderGone => Exit::Done,
                jsonl::WriteError::Io { .. } => Exit::World,
            });
        }
        cause.downcast_ref::<record::Error>().map(|_| Exit::Input)
    };
    error.chain().filter_map(of).last().unwrap_or(Exit::World)
}

/// An error with its causes, outermost first. Some errors name their cause already, and it
/// is not said twice.
pub(crate) fn in_a_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.ends_with(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let causes = ["No such file", "data: No such file", "reading"];
        let error = causes.into_iter().skip(1);
        let error = error.fold(anyhow::anyhow!(causes[0]), |e, said| e.context(said));
        assert_eq!(in_a_line(&error), "reading: data: No such file");
        let error = anyhow::anyhow!("full").context("writing out");
        assert_eq!(in_a_line(&error), "writing out: full");
    }
}
