//! The filter: pairs that were rejected go, all others pass, in their order.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use cli::{App, Counts, Failure};
use jsonl::{Lines, Output};
use record::{Reason, Record, Rejected};

use crate::NAME;
use crate::decisions::{Decisions, Standing, Verdict, hash};

/// The decisions of a file that somebody may be adding to at this time.
pub fn read(app: &App, path: &Path) -> anyhow::Result<Decisions> {
    app.reads("--apply", path)?;
    let mut bytes = std::fs::read(path).map_err(|cause| {
        let path = path.display();
        Failure::Usage(format!(
            "--apply {path}: {cause}; pair-review PAIRS --decisions {path} makes it"
        ))
    })?;
    let whole = (bytes.iter().rposition(|&byte| byte == b'\n')).map_or(0, |at| at + 1);
    if is_whole(&bytes[whole..]) {
        bytes.push(b'\n');
    } else if whole < bytes.len() {
        app.warn(format_args!(
            "{}: the last line was cut short, and is no decision",
            path.display()
        ));
        bytes.truncate(whole);
    }
    Ok(Decisions::read(path, &bytes)?)
}

/// Whether a last line without its end holds all of an object: no crash has cut it off.
pub fn is_whole(line: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(line).is_ok()
}

/// Filters standard input.
pub fn apply(app: &App, decisions: &Decisions, rejects: Option<&Path>) -> anyhow::Result<()> {
    let mut rejects = app.rejects("--rejects", rejects)?;
    let mut records = app.records(Lines::open(Path::new("-"))?);
    let mut out = Output::stdout();
    let (mut kept, mut undecided) = (0, 0);
    let mut by_reason: BTreeMap<String, usize> = BTreeMap::new();
    let mut changed: Vec<(String, Verdict)> = Vec::new();
    let mut found = HashSet::new();
    let progress = app.progress("applied", None);
    let mut read = 0;
    let of = |record: Record| Ok((record.pair()?, record));
    while let Some((_, (pair, mut record))) = records.next_with(&mut rejects, of)? {
        read += 1;
        progress.set(read);
        pair.identify(&mut record)?;
        let standing = decisions.of(&pair.id, &hash(&pair.tweet, &pair.reply));
        found.insert(pair.id.clone());
        match standing {
            Standing::Decided(said) if said.decision == Verdict::Reject => {
                let why = said.reason.as_deref().unwrap_or("no reason given");
                *by_reason.entry(why.to_owned()).or_default() += 1;
                let reason = Reason {
                    filter: "review".into(),
                    detail: why.to_owned(),
                };
                let rejected = Rejected {
                    by: NAME.into(),
                    reasons: vec![reason],
                };
                record.set("rejected", &rejected)?;
                rejects.record(&record)?;
                continue;
            }
            Standing::Decided(_) => kept += 1,
            Standing::Changed(said) => changed.push((pair.id, said.decision)),
            Standing::Undecided => undecided += 1,
        }
        // A record may have been here before, under other decisions.
        record.remove("rejected");
        out.record(&record)?;
    }
    drop(progress);
    out.finish()?;
    let are_kept = rejects.are_kept();
    rejects.commit()?;

    let gone: usize = by_reason.values().sum();
    let mut reasons: Vec<_> = by_reason.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let reasons: Vec<_> = (reasons.iter())
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    if gone > 0 {
        app.info(format_args!("rejected for: {}", reasons.join(", ")));
        if !are_kept {
            app.info("the rejected pairs are kept nowhere; --rejects FILE keeps them");
        }
    }
    let mut told = format!("{kept} kept, {undecided} not looked at");
    if !changed.is_empty() {
        told.push_str(&format!(", {} changed since", changed.len()));
    }
    app.info(told);
    if let Some((id, _)) = changed.first() {
        let rejections = (changed.iter()).filter(|(_, said)| *said == Verdict::Reject);
        app.warn(format_args!(
            "{} ({} to reject) not applied: the texts have changed since; \
             the pairs passed, look at them again (the first: {id})",
            cli::counted(changed.len(), "decision"),
            rejections.count(),
        ));
    }
    let missing: Vec<_> = (decisions.ids().into_iter())
        .filter(|id| !found.contains(*id))
        .collect();
    if let Some(id) = missing.first() {
        app.warn(format_args!(
            "{} on pairs that are not in the input (the first: {id})",
            cli::counted(missing.len(), "decision"),
        ));
    }
    let bad = records.bad();
    app.count(Counts {
        read: read + bad,
        written: read - gone as u64,
        rejected: gone as u64 + bad,
    });
    Ok(())
}
