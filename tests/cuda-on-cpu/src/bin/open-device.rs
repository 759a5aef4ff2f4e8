//! Opens a device as the tools do and says what came of it: for tests of what is
//! said where something is missing or too old.

use std::process::ExitCode;

use engine::{Choice, Device};

fn main() -> ExitCode {
    let asked = std::env::args().nth(1).unwrap_or_default();
    let opened = asked
        .parse::<Choice>()
        .and_then(|choice| Device::open(choice).map_err(|e| e.to_string()));
    match opened {
        Ok((_, words)) => {
            println!("{words}");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("{problem}");
            ExitCode::FAILURE
        }
    }
}
