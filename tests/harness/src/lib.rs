//! What the tests of the tools share: running a real binary with a failure
//! message that shows everything, the conventions that hold for every tool,
//! and a local server that misbehaves on request.

mod conventions;
mod run;
pub mod server;

pub use conventions::{Conventions, check_examples};
pub use run::{Run, Tool, behind};
