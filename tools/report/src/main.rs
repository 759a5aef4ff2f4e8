//! The results of a run on one screen, and as a page with charts: what went in,
//! what was learnt, whether the replies got better. It tests nothing: every figure
//! is read from the file that the tool behind it wrote, or counted there.

mod charts;
mod findings;
mod harmless;
mod page;
mod rows;
mod screen;
mod sources;

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use cli::{App, Common, Failure, Tool};

/// Print the results of a run as a table, or as a page with charts
///
/// Reads what the tools left in data/processed/DATA, output/models/RUN and
/// output/eval/RUN, and prints it within 80 columns. What is not there yet is
/// said, with the command that makes it. The page is one file that needs no
/// other and no network; replies stand on it side by side.
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
    /// Write the results as a page too, for a browser [`-`: to standard output, in place of the
    /// table]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Draws the rows whose replies the page shows
    #[arg(long, value_name = "N", default_value_t = 42, requires = "html")]
    seed: u64,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ report --run r --data d
$ report --run main
$ report --run r --data d --html output/figures/r.html
";

fn main() -> ExitCode {
    cli::main::<Report>()
}

impl Tool for Report {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
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
        let findings = findings::Findings::of(&sources);
        let to_stdout = self.html.as_deref() == Some(Path::new("-"));
        let file = self.html.filter(|_| !to_stdout);
        if let Some(file) = &file {
            if let Some(folder) = file
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty())
            {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("--html {}", file.display()))?;
            }
            match is_page(file) {
                true => app.reads("--html", file)?,
                false => app.claim("--html", file, |_| false)?,
            }
        }
        let text = if to_stdout {
            page::render(&sources, &findings, self.seed)?
        } else {
            if let Some(file) = &file {
                let page = page::render(&sources, &findings, self.seed)?;
                jsonl::write_atomically(file, page.as_bytes())?;
            }
            // Names of systems, judges and filters are whatever the files say.
            cli::printable(&screen::render(&sources, &findings, file.as_deref()))
        };
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

/// Whether a file begins as a page of this tool does, and so may be made anew.
fn is_page(path: &Path) -> bool {
    let own = br#"<meta name="generator" content="report">"#;
    let mut begin = [0; 256];
    // A pipe would wait for a writer.
    let mut read = || File::open(path).and_then(|mut file| file.read(&mut begin));
    path.is_file() && read().is_ok() && begin.windows(own.len()).any(|part| part == own)
}
