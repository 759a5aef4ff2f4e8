//! Which of the rows that are read are replied to: those that are held out, by what they
//! say themselves and by what the adapters tell of their training.

use std::collections::BTreeMap;

use anyhow::Result;
use cli::App;
use jsonl::{Position, Rejects};
use qwen3::{ROWS, Seen};
use record::{Reason, Rejected, Split, count_by_reason};

use crate::items::Source;

/// What an adapter tells of the rows that it was trained on, if it does.
pub type SeenBy<'a> = (&'a str, Option<Seen>);

/// A row as it was read, and where.
pub type Row = (Position, Source);

/// The rows to reply to, and how many others are not held out though nothing in them says
/// so. Those go to `rejects`; a row of `split: train` has its reason in itself.
pub struct HeldOut {
    pub rows: Vec<Row>,
    pub left_out: u64,
}

impl HeldOut {
    /// Of the rows read, those of `split: eval`, or all where none says which side it is
    /// on; of these, those that no adapter was trained on. What one adapter has seen is
    /// left out for all, since they are compared row by row.
    ///
    /// # Errors
    /// If `rejects` cannot be written.
    pub fn of(
        app: &App,
        rows: Vec<Row>,
        seen: &[SeenBy],
        rejects: &mut Rejects,
    ) -> Result<HeldOut> {
        let mut left_out = LeftOut {
            app,
            rejects,
            rows: 0,
            reasons: BTreeMap::new(),
        };
        let rows = if rows.is_empty() {
            app.warn("no rows on standard input: nothing is generated, and there are no figures");
            rows
        } else if rows.iter().all(|(_, source)| source.split.is_none()) {
            untrained(app, rows, seen, &mut left_out)?
        } else {
            of_split_eval(app, rows, seen, &mut left_out)?
        };
        Ok(HeldOut {
            rows,
            left_out: left_out.told(),
        })
    }
}

/// Rows that are left out, each with its reasons.
struct LeftOut<'a> {
    app: &'a App,
    rejects: &'a mut Rejects,
    rows: u64,
    reasons: BTreeMap<String, u64>,
}

impl LeftOut<'_> {
    fn add(&mut self, (_, source): Row, reasons: Vec<Reason>) -> Result<()> {
        self.rows += 1;
        count_by_reason(&reasons, &mut self.reasons);
        let mut record = source.record;
        let rejected = Rejected {
            by: self.app.name().into(),
            reasons,
        };
        record.set("rejected", &rejected)?;
        Ok(self.rejects.record(&record)?)
    }

    /// Of the rows, those that no adapter was trained on; the others are added.
    fn add_trained(&mut self, rows: Vec<Row>, seen: &[SeenBy]) -> Result<Vec<Row>> {
        let mut kept = Vec::new();
        for row in rows {
            let by = seen.iter().filter(|(_, seen)| was_trained_on(&row.1, seen));
            let reasons: Vec<Reason> = by.map(|(name, _)| trained_on(name)).collect();
            match reasons.is_empty() {
                true => kept.push(row),
                false => self.add(row, reasons)?,
            }
        }
        Ok(kept)
    }

    /// Says where they are, unless that was asked for; how many there are.
    fn told(self) -> u64 {
        if self.rows > 0 && !self.rejects.are_kept() {
            let reasons = self.reasons.iter();
            let reasons: Vec<String> = reasons.map(|(name, n)| format!("{name} {n}")).collect();
            self.app.info(format_args!(
                "left out for (a row may have several): {}; --rejects FILE keeps the rows with their reasons",
                reasons.join(", ")
            ));
        }
        self.rows
    }
}

/// Whether one of the adapters was trained on it.
pub fn is_trained_on(source: &Source, seen: &[SeenBy]) -> bool {
    seen.iter().any(|(_, seen)| was_trained_on(source, seen))
}

fn was_trained_on(source: &Source, seen: &Option<Seen>) -> bool {
    let side = seen.as_ref().and_then(|seen| seen.side(source.name()));
    side == Some(Split::Train)
}

fn trained_on(adapter: &str) -> Reason {
    Reason {
        filter: "trained_on".into(),
        detail: format!("adapter {adapter} was, by its texts in {ROWS}"),
    }
}

/// Where some rows say which side they are on: those of `split: eval` that no adapter was
/// trained on.
fn of_split_eval(
    app: &App,
    rows: Vec<Row>,
    seen: &[SeenBy],
    left_out: &mut LeftOut,
) -> Result<Vec<Row>> {
    let read = rows.len();
    let (mut of_eval, mut unsplit) = (Vec::new(), 0);
    for row in rows {
        match row.1.split {
            Some(Split::Eval) => of_eval.push(row),
            Some(Split::Train) => {}
            None => {
                unsplit += 1;
                let reason = Reason {
                    filter: "no_split".into(),
                    detail: "it has no `split`, and others have one".into(),
                };
                left_out.add(row, vec![reason])?;
            }
        }
    }
    if unsplit > 0 {
        app.warn(format_args!(
            "{} without `split` left out, since others have one",
            cli::counted(unsplit, "row")
        ));
    }
    let found = of_eval.len();
    let of_train = read - unsplit - found;
    if found == 0 {
        app.warn(format_args!(
            "no row is held out, so nothing is generated and there are no figures: of {read} read, \
             {of_train} have `split: train` and none `split: eval`. pair-dedup holds rows out \
             (deduplication.eval_fraction above 0); rows without `split` are all taken"
        ));
        return Ok(of_eval);
    }
    for (name, seen) in seen {
        let known = of_eval.iter().filter(|row| was_trained_on(&row.1, seen));
        let known = known.count();
        if known > 0 {
            app.warn(format_args!(
                "adapter {name} was trained on {known} of the {} of `split: eval`, by {ROWS} beside it: left out, \
                 for its figures would be too good",
                cli::counted(found, "row")
            ));
        }
    }
    let kept = left_out.add_trained(of_eval, seen)?;
    match kept.len() {
        0 => app.warn(format_args!(
            "each of the {} of `split: eval` was trained on, so nothing is generated and there are no figures: \
             evaluate on the data that was held out in training, or train on this",
            cli::counted(found, "row")
        )),
        kept => app.info(format_args!(
            "{} of `split: eval` kept, {of_train} of `split: train` left out",
            cli::counted(kept, "row")
        )),
    }
    Ok(kept)
}

/// Of rows that say no side, those that no adapter was trained on; with what is not known.
fn untrained(
    app: &App,
    rows: Vec<Row>,
    adapters: &[SeenBy],
    left_out: &mut LeftOut,
) -> Result<Vec<Row>> {
    let all = rows.len();
    let read = cli::counted(all, "row");
    let mut known = Vec::new();
    for (name, seen) in adapters {
        let Some(seen) = seen else {
            app.warn(format_args!(
                "no row has `split`, and adapter {name} has no {ROWS} beside it: whether it was trained on some of \
                 the {read} is not known"
            ));
            continue;
        };
        if seen.has_gap() {
            app.warn(format_args!(
                "no row has `split`, and {ROWS} beside adapter {name} has a gap, for it began from an adapter without \
                 one: whether it was trained on others of the {read} is not known"
            ));
        }
        if !rows
            .iter()
            .any(|(_, source)| seen.side(source.name()).is_some())
        {
            app.info(format_args!(
                "by its texts none of the {read} is in {ROWS} beside adapter {name}"
            ));
            continue;
        }
        known.push(seen);
    }
    let kept = left_out.add_trained(rows, adapters)?;
    if known.is_empty() {
        app.info(format_args!("no row has `split`: all {all} are taken"));
        return Ok(kept);
    }
    let trained = all - kept.len();
    let is_new = |(_, source): &&Row| known.iter().all(|seen| seen.side(source.name()).is_none());
    let new = match kept.iter().filter(is_new).count() {
        0 => String::new(),
        new => format!(" ({new} of them, by their texts, not in {ROWS})"),
    };
    match kept.len() {
        0 => app.warn(format_args!(
            "no row has `split`, and each of the {read} was trained on, so nothing is generated and there are no \
             figures: hold rows out in training (data.eval_fraction above 0, or `split: eval`)"
        )),
        kept => app.info(format_args!(
            "no row has `split`: of {read}, {trained} that were trained on are left out and {kept} taken{new}"
        )),
    }
    Ok(kept)
}
