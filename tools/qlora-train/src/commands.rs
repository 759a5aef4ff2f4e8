//! The subcommands beside training: what they share, and their list.

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Result;
use clap::{Args, Subcommand};
use cli::{App, Common};

use crate::bench::Bench;
use crate::card::AddToCard;
use crate::inspect::Inspect;
use crate::merge::Merge;

/// What is done instead of training.
#[derive(Subcommand)]
pub enum Command {
    Merge(Merge),
    Inspect(Inspect),
    Bench(Bench),
    Card(AddToCard),
}

impl Command {
    /// The options that hold for every tool.
    pub fn common(&self) -> &Common {
        match self {
            Self::Merge(merge) => merge.messages.common(),
            Self::Inspect(inspect) => inspect.messages.common(),
            Self::Bench(bench) => bench.messages.common(),
            Self::Card(card) => card.messages.common(),
        }
    }

    /// Does it.
    pub fn run(&self, app: &App) -> Result<()> {
        match self {
            Self::Merge(merge) => merge.run(app),
            Self::Inspect(inspect) => inspect.run(app),
            Self::Bench(bench) => bench.run(app),
            Self::Card(card) => card.run(app),
        }
    }
}

/// The common options, less those about settings and input lines, of which
/// these commands have none.
#[derive(Args)]
pub struct Messages {
    /// Write the messages to this file as well, with timestamps
    #[arg(long, value_name = "FILE", help_heading = "Common options")]
    log: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long, help_heading = "Common options")]
    quiet: bool,
    /// Threads to use [default: one per core]; the output does not depend on it
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Common options")]
    threads: Option<u16>,
    #[arg(skip)]
    common: OnceLock<Common>,
}

impl Messages {
    fn common(&self) -> &Common {
        self.common.get_or_init(|| Common {
            config: None,
            print_config: None,
            log: self.log.clone(),
            quiet: self.quiet,
            threads: self.threads,
            max_bad_lines: 0,
        })
    }
}

/// The end of a command's `--help`. Lines that begin with `$ ` are commands;
/// tests run each.
/// `gate` is what asks for the status 1, where there is such a thing.
pub fn after_help(examples: &str, gate: Option<&str>) -> String {
    let examples: String = (examples.trim().lines())
        .map(|line| format!("  {line}\n"))
        .collect();
    let gate = gate.map_or_else(String::new, |gate| format!("\n  1    {gate}"));
    format!(
        "Examples:
{examples}
Exit status:
  0    done; also when the reader of standard output went away{gate}
  2    wrong usage; nothing was read or written
  4    the world: a model's files, disk, memory; the message names the file
  130  interrupted"
    )
}
