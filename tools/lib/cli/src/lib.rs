//! What every tool does the same way at its edges: arguments that all share,
//! configuration in layers, messages and progress on stderr and in the log,
//! exit codes, signals, signatures. The one library that may print or read the
//! environment.
//!
//! A tool's `main` is one line, [`main`], over a type that implements [`Tool`].

mod app;
mod config;
mod failure;
mod messages;
mod progress;
mod signals;
mod signature;

use std::ffi::OsStr;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, ValueEnum};

pub use app::{App, Counts, env_or_dotenv};
pub use config::{Flags, Resolved};
pub use failure::{Exit, Failure};
pub use messages::printable;
pub use progress::Progress;
pub use signature::{Signature, sha256_file, sha256_hex};

/// A command-line tool: its arguments, and what it does with them.
pub trait Tool: Parser {
    /// The arguments that all tools share.
    fn common(&self) -> &Common;
    /// The work. What it returns decides the exit code, see [`Failure`].
    fn run(self, app: &App) -> anyhow::Result<()>;
}

/// The arguments that all tools share.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Settings, YAML; flags and environment variables override them
    #[arg(long, value_name = "FILE", help_heading = "Common options")]
    pub config: Option<PathBuf>,
    /// Show each setting and where it came from, and stop [`=key`: the values alone]
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "full", help_heading = "Common options")]
    pub print_config: Option<PrintConfig>,
    /// Write the messages to this file as well, with timestamps
    #[arg(long, value_name = "FILE", help_heading = "Common options")]
    pub log: Option<PathBuf>,
    /// Show no progress, and of settings and plans nothing
    #[arg(short, long, help_heading = "Common options")]
    pub quiet: bool,
    /// Threads to use [default: one per core]; the output does not depend on it
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Common options")]
    pub threads: Option<u16>,
    /// Malformed lines to put up with; each is kept in the rejects file
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Common options"
    )]
    pub max_bad_lines: u64,
}

/// How `--print-config` shows the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrintConfig {
    /// `key = value  # where it came from`
    Full,
    /// `key = value`: the same text for the same settings, wherever they came from
    Key,
}

/// A number with its noun: `1 row`, `2 rows`.
pub fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// A number without a row of zeros: `1e308`.
pub fn shown(value: f64) -> String {
    match value == 0.0 || (1e-3..1e10).contains(&value.abs()) {
        true => value.to_string(),
        false => format!("{value:e}"),
    }
}

/// The end of a tool's `--help`: its examples, then what holds for all tools.
/// Lines of `examples` that begin with `$ ` are commands; tests run each.
pub fn after_help(examples: &str) -> String {
    let mut text = String::from("Examples:\n");
    for line in examples.trim().lines() {
        text.push_str("  ");
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(
        "
Settings: a flag overrides an environment variable (PAIRS__SECTION__KEY, such as
PAIRS__LORA__RANK=8), which overrides the YAML, which overrides the default.

Completions and manual: run with --completions SHELL (bash, zsh, fish, elvish,
powershell) or --man alone.

Exit status:
  0    done; also when the reader of standard output went away
  1    a gate that was asked for said no
  2    wrong usage or settings; nothing was read or written
  3    bad input: the message names the file and the line
  4    the world: network, disk, model file, memory; trying again may help
  130  interrupted",
    );
    text
}

/// Runs a tool: parses its arguments, sets up messages and threads, and turns
/// what it returns into an exit code.
pub fn main<T: Tool>() -> ExitCode {
    let mut command = T::command();
    let name = command.get_name().to_owned();
    app::outlive_full_files();
    if let Some(code) = print_about(&mut command, &name) {
        return code;
    }
    let tool = match T::try_parse() {
        Ok(tool) => tool,
        Err(error) => return tell(&error, &name),
    };
    let common = tool.common().clone();
    let app = match App::new(name.clone(), common) {
        Ok(app) => app,
        Err(error) => {
            eprintln!("{name}: {}", failure::in_a_line(&error));
            return failure::exit_of(&error).into();
        }
    };
    let result = tool.run(&app);
    let exit = match &result {
        Ok(()) => Exit::Done,
        Err(error) => failure::exit_of(error),
    };
    match (&result, exit) {
        (Err(error), exit) if exit != Exit::Done => app.info(failure::in_a_line(error)),
        (Ok(()), _) => app.print_summary(),
        _ => {}
    }
    exit.into()
}

/// Prints help, version, or what is wrong with the arguments. `clap` by itself takes help
/// that went nowhere for given.
fn tell(error: &clap::Error, name: &str) -> ExitCode {
    let printed = error.print().and_then(|()| std::io::stdout().flush());
    match printed {
        Err(why) if !error.use_stderr() && why.kind() != ErrorKind::BrokenPipe => {
            eprintln!("{name}: writing standard output: {why}");
            Exit::World.into()
        }
        _ if error.use_stderr() => Exit::Usage.into(),
        _ => Exit::Done.into(),
    }
}

/// `--completions SHELL` and `--man`, which need none of the other arguments.
fn print_about(command: &mut clap::Command, name: &str) -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let mut text = Vec::new();
    match arguments.next().as_deref().and_then(OsStr::to_str) {
        Some("--man") => {
            if let Err(error) = clap_mangen::Man::new(command.clone()).render(&mut text) {
                eprintln!("{name}: {error}");
                return Some(Exit::World.into());
            }
        }
        Some("--completions") => {
            let shell = arguments
                .next()
                .and_then(|shell| clap_complete::Shell::from_str(shell.to_str()?, true).ok());
            let Some(shell) = shell else {
                eprintln!("{name}: --completions takes one of bash, zsh, fish, elvish, powershell");
                return Some(Exit::Usage.into());
            };
            clap_complete::generate(shell, command, name, &mut text);
        }
        _ => return None,
    }
    let mut out = jsonl::Output::stdout();
    let written = out
        .line(|out| out.write_all(&text))
        .and_then(|()| out.finish());
    Some(match written {
        Ok(()) => Exit::Done.into(),
        Err(error) => {
            let error = anyhow::Error::from(error);
            let exit = failure::exit_of(&error);
            if exit != Exit::Done {
                eprintln!("{name}: {}", failure::in_a_line(&error));
            }
            exit.into()
        }
    })
}
