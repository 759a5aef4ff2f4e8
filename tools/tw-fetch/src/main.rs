//! tw-fetch collects tweet→reply pairs: from files that other programs exported, or
//! through the Apify API. The first tool of the pipeline; it joins and counts, and
//! leaves judging to pair-validate.

mod apify;
mod collect;
mod join;
mod quotes;
mod source;
mod state;
mod tweet;
mod wanted;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use cli::{App, Common, Counts, Failure, Flags, Resolved};
use httpclient::{Client, Scheme, Secret};
use jsonl::{Output, Rejects};
use settings::{Collection, DataSettings};

use join::{Joiner, Origin};
use source::Item;
use tweet::Dialect;

const EXAMPLES: &str = "\
$ tw-fetch --input export.json > pairs.jsonl
$ tw-fetch --input tweets.jsonl --input replies.jsonl > pairs.jsonl
$ tw-fetch --unpaired left-over.jsonl < export.json > pairs.jsonl
With APIFY_API_TOKEN set; the same command goes on where it was interrupted:
  tw-fetch --method apify --query soup --target 500 --state state > p.jsonl";

/// Collect tweet→reply pairs from exported files or through Apify
///
/// With --method file it reads datasets of Apify's Tweet Scraper V2 (JSON, JSON lines,
/// CSV), twscrape's JSON lines, and pairs; joins replies to their tweets, wherever in the
/// input they are; and writes one pair a line. Pairs in the input pass as they are. What
/// is in no pair is counted by reason.
///
/// With --method apify it searches, then fetches the replies of what it found in small
/// batches, until --target pairs pass the cheap filters, or the limits of the
/// configuration are reached. --state keeps every run and item, so nothing is paid twice.
///
/// User names are left out unless --keep-authors is given. The files of --state and
/// --unpaired hold the records as they came, names included.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES), max_term_width = 80)]
struct Fetch {
    /// Where tweets come from
    #[arg(long, value_enum, default_value_t = Method::File)]
    method: Method,
    /// A file to read, `-` for standard input; may be repeated [default: -]
    #[arg(long, value_name = "PATH")]
    input: Vec<PathBuf>,
    /// Who wrote the input [default: told from its first record]
    #[arg(long, value_enum, value_name = "KIND")]
    format: Option<Dialect>,
    /// Write what is in no pair here, with the reason
    #[arg(long, value_name = "FILE")]
    unpaired: Option<PathBuf>,
    /// Keep the authors' user names
    #[arg(long)]
    keep_authors: bool,
    /// Pairs to collect, counted by the cheap filters (apify)
    #[arg(long, value_name = "N")]
    target: Option<u64>,
    /// A search term; may be repeated (apify)
    #[arg(long, value_name = "TERM")]
    query: Vec<String>,
    /// Folder for what was paid for; resumed from where it exists (apify)
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The run that was begun last, or `none`: where its id was lost, or is wrong (apify)
    #[arg(long, value_name = "ID")]
    adopt_run: Option<String>,
    /// Another address of the Apify API
    #[arg(long, value_name = "URL", default_value = apify::HOME, hide_default_value = true)]
    apify_url: String,
    /// Allow sending the token to that address: its HOST or HOST:PORT
    #[arg(long, value_name = "HOST")]
    send_key_to: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Exported files
    File,
    /// The Apify API (needs APIFY_API_TOKEN)
    Apify,
}

/// The settings that decide what is fetched. The filters are left out: loosening one
/// must not fetch again.
const SECTIONS: [&str; 4] = [
    "collection.target_pairs",
    "collection.search_queries",
    "collection.keep_authors",
    "collection.apify",
];

fn main() -> ExitCode {
    cli::main::<Fetch>()
}

impl cli::Tool for Fetch {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        let flags = Flags::new()
            .set("collection.target_pairs", &self.target)
            .set(
                "collection.search_queries",
                &Some(&self.query).filter(|q| !q.is_empty()),
            )
            .set(
                "collection.keep_authors",
                &self.keep_authors.then_some(true),
            );
        let Some(resolved) = app.settings::<DataSettings>(&SECTIONS, flags)? else {
            return Ok(());
        };
        match self.method {
            Method::File => self.import(app, &resolved.settings.collection),
            Method::Apify => self.collect(app, &resolved),
        }
    }
}

impl Fetch {
    fn import(&self, app: &App, settings: &Collection) -> anyhow::Result<()> {
        // --state may stand: a script that always gives it can import as well.
        let of_apify = [
            ("--query", !self.query.is_empty()),
            ("--target", self.target.is_some()),
            ("--adopt-run", self.adopt_run.is_some()),
        ];
        if let Some((flag, _)) = of_apify.iter().find(|(_, given)| *given) {
            return Err(Failure::Usage(format!(
                "{flag} goes with --method apify; --method file reads all there is in --input"
            ))
            .into());
        }
        let stdin = [PathBuf::from("-")];
        let inputs = if self.input.is_empty() {
            &stdin[..]
        } else {
            &self.input
        };
        if inputs.iter().any(|path| path == Path::new("-")) && std::io::stdin().is_terminal() {
            return Err(Failure::Usage(
                "nothing to read: give --input PATH, or pipe an export into it".into(),
            )
            .into());
        }
        for path in inputs {
            app.reads("--input", path)?;
        }
        let mut out = Output::stdout();
        let mut leftovers = Leftovers {
            file: app.rejects("--unpaired", self.unpaired.as_deref())?,
            bad: 0,
        };
        let mut joiner = Joiner::new(settings.keep_authors, self.unpaired.is_some());
        let mut counts = Counts::default();
        let mut allowance = self.common.max_bad_lines;
        let mut read = 0;
        let progress = app.progress("records", None);
        for input in inputs {
            let bad = |line: &record::BadLine| leftovers.bad(line);
            source::read(
                input,
                self.format,
                &mut allowance,
                bad,
                |mut row, dialect| {
                    read += 1;
                    progress.set(read);
                    match row.item {
                        Item::Pair => {
                            row.record.pair()?.identify(&mut row.record)?;
                            out.record(&row.record)?;
                            counts.written += 1;
                        }
                        Item::Tweet(tweet) => {
                            let source = if dialect == Dialect::Apify {
                                "apify-export"
                            } else {
                                "twscrape"
                            };
                            let collected_at =
                                row.record.get::<String>("collected_at").ok().flatten();
                            let origin = Origin {
                                source,
                                collected_at: collected_at.as_deref(),
                            };
                            joiner.add(*tweet, row.record, origin);
                        }
                        Item::Nothing => joiner.refuse(row.record),
                    }
                    Ok(())
                },
            )?;
        }
        drop(progress);
        counts.read = read + leftovers.bad;
        self.write(app, joiner, out, leftovers, counts)
    }

    fn collect(&self, app: &App, resolved: &Resolved<DataSettings>) -> anyhow::Result<()> {
        let settings = &resolved.settings.collection;
        if !self.input.is_empty() {
            return Err(Failure::Usage(
                "--input goes with --method file; --method apify collects its own".into(),
            )
            .into());
        }
        let Some(folder) = &self.state else {
            return Err(Failure::Usage(
                "--method apify needs --state DIR, so that nothing paid for is lost when it is interrupted".into(),
            )
            .into());
        };
        // Before anything is paid for: a file that cannot be written is found out here.
        let leftovers = Leftovers {
            file: app.rejects("--unpaired", self.unpaired.as_deref())?,
            bad: 0,
        };
        let keep_unpaired = self.unpaired.is_some();
        let joiner = collect::collect(
            app,
            resolved,
            folder,
            self.adopt_run.as_deref(),
            || self.api(settings),
            Joiner::new(settings.keep_authors, keep_unpaired),
        )?;
        let read = joiner.len() as u64;
        self.write(
            app,
            joiner,
            Output::stdout(),
            leftovers,
            Counts {
                read,
                ..Counts::default()
            },
        )
    }

    fn api(&self, settings: &Collection) -> anyhow::Result<apify::Api> {
        let usage = |e: httpclient::ConfigError| Failure::Usage(e.to_string());
        let token = cli::env_or_dotenv(apify::TOKEN)?.ok_or_else(|| {
            Failure::Usage(format!(
                "{} is not set: put it into .env or the environment (https://console.apify.com → Settings → API & \
                 Integrations), or import an export with --method file --input PATH",
                apify::TOKEN
            ))
        })?;
        httpclient::confirm_host(
            apify::TOKEN,
            apify::HOME,
            &self.apify_url,
            self.send_key_to.as_deref(),
        )
        .map_err(usage)?;
        let client =
            Client::new(&self.apify_url, apify::policy(settings.apify.attempts)).map_err(usage)?;
        let secret =
            Secret::bind(apify::TOKEN, &token, Scheme::Bearer, &self.apify_url).map_err(usage)?;
        Ok(apify::Api::new(client.with_secret(secret)))
    }

    /// Writes the joined pairs and what is left over.
    fn write(
        &self,
        app: &App,
        joiner: Joiner,
        mut out: Output,
        mut leftovers: Leftovers,
        mut counts: Counts,
    ) -> anyhow::Result<()> {
        for pair in joiner.pairs() {
            out.json(&pair)?;
            counts.written += 1;
        }
        let (reasons, records) = joiner.unpaired()?;
        counts.rejected = leftovers.bad + reasons.values().sum::<u64>();
        for record in &records {
            leftovers.file.record(record)?;
        }
        out.finish()?;
        let bad = leftovers.bad;
        leftovers.file.commit()?;
        let hint = if self.unpaired.is_some() {
            ""
        } else {
            " (--unpaired FILE keeps them)"
        };
        if bad > 0 {
            app.warn(format_args!("{bad} malformed records passed over{hint}"));
        }
        if !reasons.is_empty() {
            let list: Vec<String> = reasons
                .iter()
                .map(|(reason, n)| format!("{} {n}", reason.name()))
                .collect();
            app.info(format_args!("in no pair: {}{hint}", list.join(", ")));
        }
        app.count(counts);
        Ok(())
    }
}

/// The file of `--unpaired`, where there is one.
struct Leftovers {
    file: Rejects,
    bad: u64,
}

impl Leftovers {
    fn bad(&mut self, line: &record::BadLine) -> anyhow::Result<()> {
        self.bad += 1;
        serde_json::to_writer(&mut self.file, &serde_json::json!({ "bad_line": line }))?;
        Ok(self.file.write_all(b"\n")?)
    }
}
