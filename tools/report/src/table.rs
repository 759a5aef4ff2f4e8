//! The table, within 80 columns.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::sources::{Sources, Test};

/// The whole screen.
pub fn render(sources: &Sources) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, sources);
    out
}

fn write(out: &mut String, s: &Sources) -> std::fmt::Result {
    let run = &s.run;
    writeln!(out, "\nRun {run}\n")?;
    match &s.data {
        None => writeln!(out, "Data       none yet: make data RUN={run}")?,
        Some(data) => {
            let dropped: u64 = data.dropped.values().sum();
            if let Some(collected) = s.collected {
                writeln!(out, "Data       {collected:>6} pairs collected")?;
            }
            writeln!(
                out,
                "           {:>6} refused     {}",
                data.rejected,
                list(&data.by_reason)
            )?;
            writeln!(
                out,
                "           {dropped:>6} duplicates  {}",
                list(&data.dropped)
            )?;
            writeln!(
                out,
                "           {:>6} to train on, {} held out",
                data.train, data.eval
            )?;
        }
    }
    match &s.training {
        None => writeln!(out, "\nTraining   none yet: make train RUN={run}")?,
        Some(t) => {
            let state = if t.finished {
                ""
            } else {
                "; unfinished: make train goes on"
            };
            writeln!(
                out,
                "\nTraining   {:>6} steps in {:.0} s{state}",
                t.steps, t.seconds
            )?;
            writeln!(
                out,
                "           loss {:.3} at the first step, {:.3} at the last",
                t.loss.0, t.loss.1
            )?;
            if let Some((first, last)) = t.eval_loss {
                writeln!(
                    out,
                    "           held-out loss {first:.3} before, {last:.3} after"
                )?;
            }
        }
    }
    if s.tests.is_empty() {
        return writeln!(out, "\nEvaluation none yet: make eval RUN={run}");
    }
    let mut comparisons: Vec<(&str, &str)> = Vec::new();
    for test in &s.tests {
        if !comparisons.contains(&(&test.a, &test.b)) {
            comparisons.push((&test.a, &test.b));
        }
    }
    for (a, b) in comparisons {
        compare(out, a, b, s.tests.iter().filter(|t| t.a == a && t.b == b))?;
    }
    writeln!(
        out,
        "\n  Lower is better for nll, higher for the others; p: permutation test,"
    )?;
    writeln!(
        out,
        "  adjusted over the figures of a table (Holm); * below 0.05."
    )?;
    if let Some(verdicts) = &s.verdicts {
        writeln!(
            out,
            "\nJudge      {}: {}",
            verdicts.judge,
            list(&verdicts.outcomes)
        )?;
    }
    writeln!(out, "\nFiles")?;
    for (folder, name, what) in [
        (
            &s.pairs_folder,
            "pairs.jsonl",
            "the pairs; rejects.jsonl, dropped.jsonl: the others",
        ),
        (
            &s.model_folder,
            "README.md",
            "the model card; beside it the adapter, for PEFT",
        ),
        (
            &s.model_folder,
            "metrics.jsonl",
            "loss, gradient norm, learning rate of each step",
        ),
        (
            &s.eval_folder,
            "judged.jsonl",
            "each held-out tweet with all replies and scores",
        ),
        (
            &s.eval_folder,
            "tests.jsonl",
            "every statistical test, with effect sizes",
        ),
    ] {
        writeln!(out, "  {}\n      {what}", folder.join(name).display())?;
    }
    let next = if run == "demo" {
        "make setup, then make data train eval MODEL=…/Qwen3-8B (see README.md)"
    } else {
        "read a few replies: less output/eval/…/judged.jsonl"
    };
    writeln!(out, "\nNext       {next}")
}

/// A table of one comparison: the paired permutation test's p-value, adjusted
/// over the figures, and the bootstrap interval of the difference.
fn compare<'a>(
    out: &mut String,
    a: &str,
    b: &str,
    tests: impl Iterator<Item = &'a Test> + Clone,
) -> std::fmt::Result {
    let system = |path: &str| cut(path.rsplit('.').next().unwrap_or(path), 9);
    let by_judge = if a.starts_with("verdicts.") {
        " by the judge's score"
    } else {
        ""
    };
    let (a, b) = (system(a), system(b));
    let n = tests.clone().map(|t| t.n).max().unwrap_or(0);
    writeln!(out, "\n{b} against {a}{by_judge}, {n} held-out rows")?;
    writeln!(
        out,
        "  {:<14}{a:>10}{b:>10}  {:>22}   {:>8}",
        "figure", "95% of the difference", "p"
    )?;
    for test in tests.clone().filter(|t| t.test == "permutation") {
        let interval = tests
            .clone()
            .find(|t| t.test == "bootstrap" && t.metric == test.metric);
        // Differences are written a − b; a reader asks what b brought.
        let ends = interval
            .and_then(|t| t.ci_low.zip(t.ci_high))
            .map(|(low, high)| format!("{:+.3} to {:+.3}", -high, -low));
        let p = test.p_holm.map_or("-".into(), |p| {
            if p < 0.0001 {
                "<0.0001".into()
            } else {
                format!("{p:.4}")
            }
        });
        let mark = if test.p_holm.is_some_and(|p| p < 0.05) {
            "*"
        } else {
            ""
        };
        let mean = |m: Option<f64>| m.map_or("-".into(), |m| format!("{m:.3}"));
        writeln!(
            out,
            "  {:<14}{:>10}{:>10}  {:>22}   {p:>8} {mark}",
            cut(&test.metric, 14),
            mean(test.mean_a),
            mean(test.mean_b),
            ends.unwrap_or_else(|| "-".into()),
        )?;
    }
    Ok(())
}

/// A name that fits its column.
fn cut(name: &str, width: usize) -> String {
    if name.chars().count() <= width {
        return name.to_owned();
    }
    name.chars().take(width - 1).chain(['…']).collect()
}

/// `name 12, other 3`, the largest first, cut to what fits the line.
fn list(counts: &BTreeMap<String, u64>) -> String {
    let mut sorted: Vec<_> = counts.iter().collect();
    sorted.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
    let mut text = String::new();
    for (at, (name, count)) in sorted.iter().enumerate() {
        let item = format!("{}{name} {count}", if at == 0 { "" } else { ", " });
        if text.len() + item.len() > 44 {
            text.push_str(", …");
            break;
        }
        text.push_str(&item);
    }
    text
}
