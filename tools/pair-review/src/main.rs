//! Shows pairs to a person, who says which of them must not be trained on; and takes those
//! out of a stream.
//!
//! Looking and filtering meet in a file of decisions alone, so that the pairs can be made
//! anew, under other settings or with more of them, and what was said of them still holds.

mod apply;
mod decisions;
mod harmless;
mod review;
mod rows;
mod screen;
mod terminal;

use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use cli::{App, Common, Failure, Flags, PrintConfig, Resolved, Tool};
use jsonl::{Journal, Lines, Output};
use settings::DataSettings;

use crate::decisions::{Decisions, Verdict};
use crate::review::{Review, Then};
use crate::rows::{Order, Row};
use crate::terminal::{Happened, Terminal};

const NAME: &str = "pair-review";

/// Look at tweet→reply pairs, and reject some
///
/// Shows the pairs of a file one at a time: k keeps one, r and a number rejects it for a
/// reason, ? shows all keys. Each decision is added to --decisions at once; the same command
/// goes on where it was. With --apply, reads pairs on standard input and writes those that
/// were not rejected, in their order. A decision holds a hash of the texts: a pair whose texts
/// have changed since passes, and is told.
#[derive(Parser)]
#[command(version, override_usage = USAGE, after_long_help = cli::after_help(EXAMPLES))]
struct PairReview {
    /// Pairs to look at; `-` is standard input
    #[arg(required_unless_present_any = ["apply", "print_config"], conflicts_with = "apply")]
    pairs: Option<PathBuf>,
    /// Where decisions go, and those made before are
    #[arg(long, value_name = "FILE", requires = "pairs", required_unless_present_any = ["apply", "print_config"])]
    decisions: Option<PathBuf>,
    /// What comes first: read, random, or a field, lowest first; -FIELD: highest [default: read]
    #[arg(
        long,
        value_name = "ORDER",
        requires = "pairs",
        allow_hyphen_values = true
    )]
    order: Option<String>,
    /// Decides the random order [default: 42]
    #[arg(long, value_name = "N", requires = "pairs")]
    seed: Option<u64>,
    /// Filter standard input by the decisions of this file
    #[arg(long, value_name = "FILE")]
    apply: Option<PathBuf>,
    /// Where rejected pairs go, with their reasons, and malformed lines (see --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

const USAGE: &str = "\
pair-review [OPTIONS] --decisions <FILE> <PAIRS>
       pair-review [OPTIONS] --apply <FILE> < PAIRS > KEPT";

const EXAMPLES: &str = "
$ pair-review valid.jsonl --decisions review.jsonl
$ pair-review valid.jsonl --decisions review.jsonl --order random --seed 7
$ pair-review valid.jsonl --decisions review.jsonl --order -validation.reply_toxicity
$ pair-review --apply review.jsonl --rejects reviewed.jsonl < valid.jsonl > kept.jsonl
";

fn main() -> ExitCode {
    cli::main::<PairReview>()
}

impl Tool for PairReview {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        // What is shown, and how, does not decide what passes.
        let key_of_filter =
            self.apply.is_some() && self.common.print_config == Some(PrintConfig::Key);
        let sections: &[&str] = if key_of_filter { &[] } else { &["review"] };
        let flags = Flags::new()
            .set("review.order", &self.order)
            .set("review.seed", &self.seed);
        let resolved = app.settings::<DataSettings>(sections, flags)?;
        if let Some(path) = &self.apply {
            if resolved.is_none() && !key_of_filter {
                return Ok(());
            }
            let decisions = apply::read(app, path)?;
            if key_of_filter {
                let mut out = Output::stdout();
                if let Some(name) = decisions.rejected() {
                    out.line(|out| writeln!(out, "rejected = {name}"))?;
                }
                return Ok(out.finish()?);
            }
            return apply::apply(app, &decisions, self.rejects.as_deref());
        }
        match (resolved, &self.pairs, &self.decisions) {
            (Some(resolved), Some(pairs), Some(decisions)) => {
                self.review(app, &resolved, pairs, decisions)
            }
            _ => Ok(()),
        }
    }
}

impl PairReview {
    fn review(
        &self,
        app: &App,
        resolved: &Resolved<DataSettings>,
        pairs: &Path,
        decisions: &Path,
    ) -> anyhow::Result<()> {
        let settings = &resolved.settings.review;
        if settings.reasons.len() > 9 {
            let cause = format!(
                "has {} entries; there are nine keys",
                settings.reasons.len()
            );
            return Err(resolved.wrong("review.reasons", cause).into());
        }
        let usage = |cause: &str| anyhow::Error::from(Failure::Usage(cause.to_owned()));
        let tty = Terminal::find().map_err(|_| {
            usage(
                "there is no terminal to show pairs on: run this in one; \
                 --apply FILE filters by decisions without",
            )
        })?;
        if pairs == Path::new("-") && io::stdin().is_terminal() {
            return Err(usage(
                "PAIRS is -, but standard input is the terminal: name a file, or pipe pairs in",
            ));
        }
        app.reads("PAIRS", pairs)?;
        match is_half_a_line(decisions) && !is_same_file(pairs, decisions) {
            true => app.reads("--decisions", decisions)?,
            false => app.claim("--decisions", decisions, |first| first.contains("decision"))?,
        }
        let mut rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        let mut records = app.records(Lines::open(pairs)?);
        let mut rows = Vec::new();
        while let Some((_, row)) = records.next_with(&mut rejects, Row::of)? {
            rows.push(row);
        }
        rejects.commit()?;
        if rows.is_empty() {
            let cause = format!("{}: there is no pair in it", pairs.display());
            return Err(Failure::Input(cause).into());
        }

        end_last_line(decisions)
            .with_context(|| format!("ending the last line of {}", decisions.display()))?;
        let (journal, bytes) = Journal::open(decisions, NAME)?;
        if journal.torn() > 0 {
            app.warn(format_args!(
                "{}: the last line was cut short; that one decision is to be made again",
                decisions.display()
            ));
        }
        let made = Decisions::read(decisions, &bytes)?;
        let order = (Order::named(&settings.order), settings.seed);
        let reasons = settings.reasons.clone();
        let mut review = Review::new(rows, made, journal, order, reasons)
            .map_err(|error| resolved.wrong("review.order", format!("(--order): {error}")))?;

        let title = pairs.display().to_string();
        let ended =
            look(&mut review, tty, &title).context("the terminal; all that was decided is kept")?;
        let [kept, rejected] = [Verdict::Keep, Verdict::Reject].map(|said| review.count(said));
        app.info(format_args!(
            "decided on {} of {}: {kept} kept, {rejected} rejected, in {}",
            kept + rejected,
            cli::counted(review.rows.len(), "pair"),
            decisions.display()
        ));
        match ended {
            None => Ok(()),
            Some(by) => {
                let cause = format!("{by}: every decision is kept; the same command goes on");
                Err(Failure::Interrupted(cause).into())
            }
        }
    }
}

/// Whether a file is a first decision that a crash cut off, and so ours: it begins as one
/// does, as far as it goes, and is no whole object.
fn is_half_a_line(path: &Path) -> bool {
    let is_short = (path.metadata()).is_ok_and(|found| found.is_file() && found.len() < 1 << 16);
    is_short && std::fs::read(path).is_ok_and(|bytes| begins_a_decision(&bytes))
}

fn begins_a_decision(bytes: &[u8]) -> bool {
    let Some(id) = bytes.strip_prefix(br#"{"v":1,"id":""#) else {
        return false;
    };
    let mut escaped = false;
    let end = id.iter().position(|&byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    let next = br#","decision":""#;
    let goes_on = end.is_none_or(|end| {
        let rest = &id[end + 1..];
        next.starts_with(rest) || rest.starts_with(next)
    });
    goes_on && !bytes.contains(&b'\n') && !apply::is_whole(bytes)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let of = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino()));
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if one == other)
}

/// A last decision that somebody wrote by hand, without the line's end, stays one.
fn end_last_line(path: &Path) -> io::Result<()> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read?,
    };
    let last = bytes
        .rsplit(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default();
    match apply::is_whole(last) {
        true => std::fs::File::options()
            .append(true)
            .open(path)?
            .write_all(b"\n"),
        false => Ok(()),
    }
}

/// Shows pairs until the person leaves, or something else ends it, which is returned.
fn look(review: &mut Review, tty: std::fs::File, title: &str) -> io::Result<Option<&'static str>> {
    let mut terminal = Terminal::open(tty)?;
    loop {
        terminal.draw(|frame| screen::draw(review, title, frame))?;
        match terminal.next()? {
            Happened::Key(key) => match review.key(key) {
                Then::GoOn => {}
                Then::Leave => return Ok(None),
                Then::Interrupt => return Ok(Some("interrupted")),
                Then::Suspend => terminal.suspend()?,
            },
            Happened::Pasted(text) => review.paste(&text),
            Happened::Redraw => {}
            Happened::Ended(by) => return Ok(Some(by)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_decision_is_told_from_what_others_wrote() {
        let whole = r#"{"v":1,"id":"a\"b","decision":"reject","reason":"x"}"#;
        for cut in 13..whole.len() {
            assert!(begins_a_decision(&whole.as_bytes()[..cut]), "{cut}");
        }
        for other in [
            whole,
            r#"{"v":1,"id":"1","tweet":"only cop"#,
            r#"{"v":1,"id":"1","tweet":"a"}{"v":1,"id":"2"}"#,
            "{\"v\":1,\"id\":\"1\"\n",
            "",
        ] {
            assert!(!begins_a_decision(other.as_bytes()), "{other}");
        }
    }
}
