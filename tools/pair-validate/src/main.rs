//! Keeps the pairs that are worth learning from, and says of every other why not.
//!
//! Records stream through in chunks: a chunk is checked by all threads and
//! written in the order it came, so memory is bounded and the output does not
//! depend on the number of threads. Validated and rejected together are the input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use cli::{App, Common, Counts, Flags, PrintConfig, Signature, Tool};
use filters::{Candidate, Checked, Filters};
use jsonl::{Lines, Output, Records, Rejects, write_atomically};
use rayon::prelude::*;
use record::{Record, Rejected, Summary, count_by_reason};
use settings::DataSettings;

const NAME: &str = "pair-validate";

/// Records checked at once: enough for all threads, few enough to hold.
const CHUNK: usize = 2048;

/// Validate tweet→reply pairs
///
/// Reads pairs on standard input and holds each against the filters of data.yaml:
/// length, language, toxicity, likes and followers, links, media, spam, tokens of the
/// chat template. What passes goes to standard output with a `validation` object
/// added; the rest goes to --rejects with every reason.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct PairValidate {
    /// Where refused pairs go, with their reasons, and malformed lines (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    /// Where the counts and the settings go, as one JSON object
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ pair-validate --rejects rejects.jsonl < pairs.jsonl > valid.jsonl
$ pair-validate --config data.yaml --summary counts.json < pairs.jsonl > valid.jsonl
$ PAIRS__COLLECTION__QUALITY__MAX_TOXICITY=0.1 pair-validate < pairs.jsonl | wc -l
";

fn main() -> ExitCode {
    cli::main::<PairValidate>()
}

impl Tool for PairValidate {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        let sections = [
            "collection.tweet_filters",
            "collection.reply_filters",
            "collection.quality",
        ];
        let Some(resolved) = app.settings::<DataSettings>(&sections, Flags::new())? else {
            return Ok(());
        };
        let filters = Filters::new(&resolved.settings.collection)
            .map_err(|error| resolved.wrong(&error.key, error.cause))?;

        let mut rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        if let Some(path) = &self.summary {
            app.claim("--summary", path, |first| {
                first
                    .get("tool")
                    .is_ok_and(|tool: Option<String>| tool.as_deref() == Some(NAME))
            })?;
        }
        let mut out = Output::stdout();
        let mut records = app.records(Lines::open(Path::new("-"))?);
        let (mut passed, mut refused) = (0, 0);
        let mut by_reason = BTreeMap::new();
        let progress = app.progress("validated", None);
        loop {
            let chunk = read_chunk(&mut records, &mut rejects)?;
            if chunk.is_empty() {
                break;
            }
            let checked: Vec<Checked> = chunk
                .par_iter()
                .map(|(_, pair)| filters.check(pair))
                .collect();
            for ((mut record, candidate), checked) in chunk.into_iter().zip(checked) {
                candidate.pair.identify(&mut record)?;
                // A record may have been here before, under other settings.
                if checked.passes() {
                    record.remove("rejected");
                    record.set("validation", &checked.validation)?;
                    out.record(&record)?;
                    passed += 1;
                } else {
                    count_by_reason(&checked.reasons, &mut by_reason);
                    record.remove("validation");
                    record.set(
                        "rejected",
                        &Rejected {
                            by: NAME.into(),
                            reasons: checked.reasons,
                        },
                    )?;
                    rejects.record(&record)?;
                    refused += 1;
                }
            }
            progress.set(passed + refused);
        }
        drop(progress);
        out.finish()?;
        rejects.commit()?;

        let bad = records.bad();
        let counts = Counts {
            read: passed + refused + bad,
            written: passed,
            rejected: refused + bad,
        };
        if let Some(path) = &self.summary {
            let summary = Summary {
                v: record::VERSION,
                tool: NAME.into(),
                read: counts.read,
                written: counts.written,
                rejected: refused,
                bad_lines: bad,
                reasons: by_reason.clone(),
                settings: resolved
                    .show(PrintConfig::Key)
                    .lines()
                    .map(String::from)
                    .collect(),
                signature: Signature::new(NAME)
                    .with_hash("config", &resolved.sha256())
                    .to_string(),
            };
            write_atomically(path, (serde_json::to_string(&summary)? + "\n").as_bytes())?;
        }
        self.tell(app, &by_reason);
        if passed == 0 && refused > 0 {
            app.warn(
                "no pair passed: loosen what refuses most, under `collection` in the settings",
            );
        }
        app.count(counts);
        Ok(())
    }
}

impl PairValidate {
    /// The reasons, most frequent first, and where the refused pairs are.
    fn tell(&self, app: &App, by_reason: &BTreeMap<String, u64>) {
        if by_reason.is_empty() {
            return;
        }
        let mut reasons: Vec<_> = by_reason.iter().collect();
        reasons.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
        let reasons: Vec<String> = reasons
            .into_iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        app.info(format_args!(
            "refused for (a pair may have several): {}",
            reasons.join(", ")
        ));
        if self.rejects.is_none() {
            app.info(
                "the refused pairs are kept nowhere; --rejects FILE keeps them with their reasons",
            );
        }
    }
}

/// Up to [`CHUNK`] records that are pairs; none at the end.
fn read_chunk(
    records: &mut Records,
    rejects: &mut Rejects,
) -> Result<Vec<(Record, Candidate)>, jsonl::ReadError> {
    let mut chunk = Vec::new();
    while chunk.len() < CHUNK {
        let next = records.next_with(rejects, |record| Ok((Candidate::of(&record)?, record)))?;
        let Some((_, (candidate, record))) = next else {
            break;
        };
        chunk.push((record, candidate));
    }
    Ok(chunk)
}
