//! The results of a run on one screen: what went in, what was learnt, whether
//! the replies got better. It tests nothing: every figure is read from the
//! file that the tool behind it wrote, or counted there.

mod sources;
mod table;

use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use cli::{App, Common, Failure, Tool};

/// Print the results of a run as a table
///
/// Reads what the tools left in data/processed/DATA, output/models/RUN and
/// output/eval/RUN, and prints it within 80 columns. What is not there yet is
/// said, with the command that makes it.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct Report {
    /// Name of the run
    #[arg(long, value_name = "NAME")]
    run: String,
    /// Name of its data [default: that of the run]
    #[arg(long, value_name = "NAME")]
    data: Option<String>,
    /// The folder that holds data/ and output/ [default: the current one]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ report --run r --data d
$ report --run main
";

fn main() -> ExitCode {
    cli::main::<Report>()
}

impl Tool for Report {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, _app: &App) -> anyhow::Result<()> {
        // Of all tools' flags, those that would do nothing here.
        let common = &self.common;
        for (flag, given) in [
            ("--config", common.config.is_some()),
            ("--print-config", common.print_config.is_some()),
            ("--max-bad-lines", common.max_bad_lines > 0),
        ] {
            if given {
                let cause = format!("{flag}: a report has no settings and refuses no lines");
                return Err(Failure::Usage(cause).into());
            }
        }
        let data = self.data.as_deref().unwrap_or(&self.run);
        for (flag, name) in [("--run", &*self.run), ("--data", data)] {
            if !is_folder_name(name) {
                let cause =
                    format!("{flag} '{name}': is no name of a folder; give a run's, as to make");
                return Err(Failure::Usage(cause).into());
            }
        }
        if let Some(root) = self.root.as_deref().filter(|root| !root.is_dir()) {
            let cause = format!("--root {}: there is no such folder", root.display());
            return Err(Failure::Usage(cause).into());
        }
        let root = self.root.unwrap_or_default();
        let sources = sources::Sources::read(&root, &self.run, data)?;
        // Names of systems, judges and filters are whatever the files say.
        let text = cli::printable(&table::render(&sources));
        let mut out = jsonl::Output::stdout();
        out.line(|out| out.write_all(text.as_bytes()))?;
        Ok(out.finish()?)
    }
}

/// Whether a name leads to a folder inside another, not to that one or out of it.
fn is_folder_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}
