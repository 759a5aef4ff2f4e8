//! judge compares what systems replied, two at a time and in both orders, and adds
//! what it finds to each item. Claude judges, or, offline, nearness to the reply that
//! people liked.

mod anthropic;
mod claude;
mod ledger;
mod reader;
mod reference;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use clap::Parser;
use cli::{App, Common, Counts, Failure, Flags, Signature};
use httpclient::{Client, Scheme, Secret};
use jsonl::{Lines, Output, WriteError};
use record::Record;
use serde_json::json;
use settings::{EvalSettings, Judge as Settings, JudgeProvider};
use tokio::task::LocalSet;

use claude::Claude;
use ledger::Ledger;
use reference::Liked;
use verdict::{Item, Tally, Verdicts};

const EXAMPLES: &str = "\
$ judge --provider reference < items.jsonl > judged.jsonl
With ANTHROPIC_API_KEY set; the same command goes on where it stopped:
  judge --state state --max-cost 2 < items.jsonl > judged.jsonl
  sigtest --a verdicts.score.base --b verdicts.score.lora < judged.jsonl";

/// Compare what systems replied, in both orders
///
/// Reads the items of gen-eval and adds `verdicts` to each: who is preferred with
/// either reply shown first, and the outcome. A system wins an item only if it is
/// preferred in both orders; else the item is a tie. `verdicts.score.NAME` is 1, 0.5 or 0,
/// and null where the judge gave no verdict; `verdicts.winner` is NAME, `tie` or null. These
/// are of the first comparison, `verdicts.scores.A:B.NAME` of any.
///
/// With --provider anthropic Claude is asked which reply readers would rather like; it
/// sees the tweet and two replies, no names, and not the reply that people liked. Every
/// answer is kept in --state, so that none is paid for twice; where the first 20 hold no
/// verdict, or all of fewer, nothing more is asked (exit 4). With --provider reference nobody is asked:
/// the reply is preferred that is nearer (chrF) to what people liked here than to more of
/// what they liked under other tweets of the input, so that neither length nor manner wins.
/// That measures likeness, not quality, and every record says so: `reference-chrf-rank`.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES), max_term_width = 80)]
struct Judge {
    /// Who compares
    #[arg(long, value_enum)]
    provider: Option<JudgeProvider>,
    /// Systems to compare; may be repeated, the first gives `verdicts.score`
    /// [default: the first two of each item]
    #[arg(long, value_name = "A:B")]
    compare: Vec<String>,
    /// The model to ask
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Stop before the answers cost more than this
    #[arg(long, value_name = "USD")]
    max_cost: Option<f64>,
    /// Requests under way at once
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Folder for the answers that were paid for (anthropic)
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Write outcomes, tokens and cost here, as one JSON object
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Write malformed lines here (with --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    /// Only check that the judge can be asked: exit 0, or 2 where a key is missing
    #[arg(long)]
    check: bool,
    /// Another address of the Claude API
    #[arg(long, value_name = "URL", default_value = anthropic::HOME, hide_default_value = true)]
    anthropic_url: String,
    /// Allow sending the key to that address: its HOST or HOST:PORT
    #[arg(long, value_name = "HOST")]
    send_key_to: Option<String>,
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    cli::main::<Judge>()
}

impl cli::Tool for Judge {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        let flags = Flags::new()
            .set("judge.provider", &self.provider)
            .set(
                "judge.compare",
                &Some(&self.compare).filter(|c| !c.is_empty()),
            )
            .set("judge.model", &self.model)
            .set("judge.max_cost_usd", &self.max_cost)
            .set("judge.concurrency", &self.concurrency);
        let Some(resolved) = app.settings::<EvalSettings>(&["judge"], flags)? else {
            return Ok(());
        };
        let config = resolved.sha256();
        let settings = resolved.settings.judge.clone();
        let pairs = settings
            .compare
            .iter()
            .map(|pair| parse_pair(pair).map_err(|cause| resolved.wrong("judge.compare", cause)))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some((_, (a, b))) =
            (pairs.iter().enumerate()).find(|(at, pair)| pairs[..*at].contains(pair))
        {
            return Err(resolved
                .wrong("judge.compare", format!("has `{a}:{b}` twice"))
                .into());
        }
        match settings.provider {
            JudgeProvider::Reference => {
                if self.check {
                    return Ok(());
                }
                let signature = Signature::new("judge")
                    .with("judge", reference::NAME)
                    .with_hash("config", &config);
                self.judge_by_reference(app, &pairs, &signature.to_string())
            }
            JudgeProvider::Anthropic => {
                let client = self.client(&settings)?;
                let Some(price) = settings.prices.get(&settings.model).copied() else {
                    let cause = format!(
                        "is {}, and judge.prices has no price for it: add one (US dollars for a million tokens), \
                         so that judge.max_cost_usd can be kept",
                        settings.model
                    );
                    return Err(resolved.wrong("judge.model", cause).into());
                };
                if self.check {
                    return Ok(());
                }
                let Some(folder) = &self.state else {
                    return Err(Failure::Usage(
                        "--provider anthropic needs --state DIR, so that no answer is paid for twice".into(),
                    )
                    .into());
                };
                let (records, counts) = self.read(app, &pairs)?;
                let ledger = Ledger::open(folder, price, settings.max_cost_usd)?;
                if ledger.torn() > 0 {
                    app.warn(format_args!(
                        "{}: its last line has no end ({} bytes), a write was cut short there: passed over",
                        ledger.path().display(),
                        ledger.torn()
                    ));
                }
                let signature = Signature::new("judge")
                    .with("judge", &settings.model)
                    .with_hash("prompt", &anthropic::prompt_hash())
                    .with_hash("config", &config);
                let claude = Rc::new(Claude::new(
                    client,
                    settings,
                    pairs,
                    ledger,
                    signature.to_string(),
                ));
                self.judge_by_claude(app, &claude, records, counts)
            }
        }
    }
}

/// A line of the input: an item to judge, or one that passes as it is.
enum Entry {
    Item(Record, Box<Item>),
    Corpus(Record),
}

impl Judge {
    /// The service, or what to do where it cannot be asked.
    fn client(&self, settings: &Settings) -> anyhow::Result<Client> {
        let usage = |e: httpclient::ConfigError| Failure::Usage(e.to_string());
        let key = cli::env_or_dotenv(anthropic::KEY)?.ok_or_else(|| {
            Failure::Usage(format!(
                "{} is not set: put it into .env or the environment (https://console.anthropic.com → API keys), or \
                 judge offline with --provider reference (make: JUDGE=reference)",
                anthropic::KEY
            ))
        })?;
        let confirmed = self.send_key_to.as_deref();
        httpclient::confirm_host(
            anthropic::KEY,
            anthropic::HOME,
            &self.anthropic_url,
            confirmed,
        )
        .map_err(usage)?;
        let secret = Secret::bind(anthropic::KEY, &key, Scheme::ApiKey, &self.anthropic_url)
            .map_err(usage)?;
        let client = Client::new(&self.anthropic_url, anthropic::policy(settings.attempts))
            .map_err(usage)?;
        Ok(client
            .with_secret(secret)
            .with_header("anthropic-version", "2023-06-01"))
    }

    /// Reads all of standard input first: what is malformed is found before anything is paid for.
    fn read(&self, app: &App, pairs: &[(String, String)]) -> anyhow::Result<(Vec<Entry>, Counts)> {
        let mut rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        if let Some(path) = &self.summary {
            app.claim("--summary", path, |first| {
                first.contains("judge") && first.contains("outcomes")
            })?;
        }
        let mut records = app.records(Lines::open("-".as_ref())?);
        let mut entries = Vec::new();
        let understand = |record: Record| {
            if record.contains("corpus") {
                return Ok(Entry::Corpus(record));
            }
            let item = Item::of(&record)?;
            item.pairs(pairs)?;
            Ok(Entry::Item(record, Box::new(item)))
        };
        while let Some((_, entry)) = records.next_with(&mut rejects, understand)? {
            entries.push(entry);
        }
        rejects.commit()?;
        let bad = records.bad();
        if bad > 0 {
            app.warn(format_args!("{bad} malformed lines passed over"));
        }
        let counts = Counts {
            read: entries.len() as u64 + bad,
            written: 0,
            rejected: bad,
        };
        Ok((entries, counts))
    }

    fn judge_by_reference(
        &self,
        app: &App,
        pairs: &[(String, String)],
        signature: &str,
    ) -> anyhow::Result<()> {
        let (entries, mut counts) = self.read(app, pairs)?;
        let liked = Liked::of(entries.iter().filter_map(|entry| match entry {
            Entry::Corpus(_) => None,
            Entry::Item(_, item) => Some(&**item),
        }));
        let mut out = Output::stdout();
        let mut tally = Tally::default();
        let mut items = 0;
        for entry in entries {
            let record = match entry {
                Entry::Corpus(record) => record,
                Entry::Item(mut record, item) => {
                    let others = liked.others(items);
                    items += 1;
                    let comparisons = item
                        .pairs(pairs)?
                        .iter()
                        .map(|(a, b)| reference::compare(&item, a, b, &others))
                        .collect();
                    let verdicts = Verdicts::new(reference::NAME, comparisons, signature);
                    verdicts.comparisons.iter().for_each(|c| tally.add(c));
                    record.set("verdicts", &verdicts)?;
                    record
                }
            };
            out.record(&record)?;
            counts.written += 1;
        }
        out.finish()?;
        app.count(counts);
        self.summarise(app, reference::NAME, &tally, None)
    }

    fn judge_by_claude(
        &self,
        app: &App,
        claude: &Rc<Claude>,
        entries: Vec<Entry>,
        mut counts: Counts,
    ) -> anyhow::Result<()> {
        app.interrupted()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut out = Output::stdout();
        let mut tally = Tally::default();
        let mut items = 0;
        for entry in &entries {
            if let Entry::Item(_, item) = entry {
                claude.recall(item);
                items += 1;
            }
        }
        let progress = app.progress("items judged", Some(items));
        let judged = LocalSet::new().block_on(&runtime, async {
            // All are begun at once and wait for each other at the semaphore: the order of
            // the output is that of the input, whoever is answered first.
            let tasks: Vec<_> = entries
                .into_iter()
                .map(|entry| match entry {
                    Entry::Corpus(record) => (record, None),
                    Entry::Item(record, item) => {
                        let claude = Rc::clone(claude);
                        (
                            record,
                            Some(tokio::task::spawn_local(async move {
                                claude.judge(&item).await
                            })),
                        )
                    }
                })
                .collect();
            let mut complete = true;
            for (mut record, task) in tasks {
                if let Some(task) = task {
                    // What is under way is paid for: it is waited for and kept, though the
                    // output ends with the first item that could not be judged.
                    let Some(verdicts) = claude.until_interrupted(app, task).await? else {
                        complete = false;
                        continue;
                    };
                    verdicts.comparisons.iter().for_each(|c| tally.add(c));
                    record.set("verdicts", &verdicts)?;
                    progress.add(1);
                }
                if complete {
                    // Each is worth money: whoever reads has it at once.
                    match out.record(&record).and_then(|()| out.flush()) {
                        Ok(()) => counts.written += 1,
                        Err(error) => {
                            complete = false;
                            claude.fail(error.into());
                        }
                    }
                }
            }
            claude.fail_if_silent(1);
            claude.failure.take().map_or(Ok(()), Err)
        });
        drop(progress);
        let ledger = claude.ledger.borrow();
        if let Err(error) = judged {
            if !matches!(error.downcast_ref(), Some(WriteError::ReaderGone)) {
                // It would find the same answers, and end in the same way.
                let goes_on = match claude.silent.get() {
                    true => "",
                    false => ", and the same command goes on from there",
                };
                warn_of_losses(app, &ledger);
                app.info(format_args!(
                    "{} items judged; {} new answers are kept{goes_on}",
                    counts.written, ledger.asked
                ));
            }
            return Err(error);
        }
        out.finish()?;
        app.count(counts);
        let usage = ledger.usage();
        let bill = json!({
            "usage": usage,
            "requests": ledger.asked,
            "cost_usd": ledger.spent_usd(),
            "unanswered": {"attempts": ledger.unanswered, "cost_usd": ledger.unanswered_usd},
            "prices_as_of": claude.settings.prices_as_of,
        });
        app.info(format_args!(
            "{} new answers; all together {} tokens in, {} out, about ${:.2} at prices of {}",
            ledger.asked,
            usage.read(),
            usage.output_tokens,
            ledger.spent_usd(),
            claude.settings.prices_as_of
        ));
        warn_of_losses(app, &ledger);
        if ledger.estimated > 0 {
            app.warn(format_args!(
                "{} of {} answers do not say what they cost: reckoned at the most that they may have",
                ledger.estimated,
                ledger.used()
            ));
        }
        if ledger.without_verdict() > 0 {
            app.warn(format_args!(
                "{} of {} answers hold no verdict, {}",
                ledger.without_verdict(),
                ledger.used(),
                ledger.why_silent()
            ));
        }
        self.summarise(app, &claude.settings.model, &tally, Some(bill))
    }

    fn summarise(
        &self,
        app: &App,
        judge: &str,
        tally: &Tally,
        bill: Option<serde_json::Value>,
    ) -> anyhow::Result<()> {
        for (pair, outcomes) in &tally.outcomes {
            let list: Vec<String> = outcomes
                .iter()
                .map(|(outcome, n)| format!("{outcome} {n}"))
                .collect();
            app.info(format_args!(
                "{pair} by {judge}: {}; orders that disagree {}",
                list.join(", "),
                tally.flipped[pair]
            ));
        }
        if let Some(path) = &self.summary {
            let mut summary =
                json!({"judge": judge, "outcomes": tally.outcomes, "flipped": tally.flipped});
            if let Some(bill) = bill {
                summary["bill"] = bill;
            }
            jsonl::write_atomically(path, format!("{summary}\n").as_bytes())?;
        }
        Ok(())
    }
}

/// Tells what was paid for, or may have been, and brought nothing.
fn warn_of_losses(app: &App, ledger: &Ledger) {
    if ledger.unanswered > 0 {
        app.warn(format_args!(
            "of the attempts {} came to no answer after they were sent: they may be billed, and count with the \
             most that they may have cost, about ${:.2} (`unanswered` in {})",
            ledger.unanswered,
            ledger.unanswered_usd,
            ledger.path().display()
        ));
    }
    if ledger.unkept > 0 {
        app.warn(format_args!(
            "of the answers {} were paid for and could not be kept: the next run asks for them again",
            ledger.unkept
        ));
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() && a != b => {
            Ok((a.to_owned(), b.to_owned()))
        }
        _ => Err(format!(
            "has `{text}`; it must be two different systems as A:B, such as base:lora"
        )),
    }
}
