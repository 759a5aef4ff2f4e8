//! The table, within 80 columns.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::sources::{Replies, Sources, Test, Training, Verdicts};

/// Columns of the screen.
const WIDTH: usize = 80;

/// A larger share of rows without a figure makes those that have one another kind of rows: a
/// judge may refuse just those where one side is worse.
const MOST_GAPS: f64 = 0.05;

/// The name that judge gives to its judge without a model.
const OFFLINE: &str = "reference-chrf-rank";

/// The whole screen.
pub fn render(sources: &Sources) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, sources);
    out
}

fn write(out: &mut String, s: &Sources) -> std::fmt::Result {
    let (run, named) = (&s.run, &s.named);
    writeln!(out, "\nRun {run}\n")?;
    match &s.data {
        None => writeln!(out, "Data       none yet: make data {named}")?,
        Some(data) => {
            let dropped: u64 = data.dropped.values().sum();
            let mut label = "Data";
            if let Some(collected) = s.collected {
                writeln!(out, "{label:<10} {collected:>6} pairs collected")?;
                label = "";
            }
            writeln!(
                out,
                "{label:<10} {:>6} refused     {}",
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
        None => writeln!(out, "\nTraining   none yet: make train {named}")?,
        Some(training) => trained(out, training, named)?,
    }
    if s.tests.is_empty() {
        return writeln!(out, "\nEvaluation none yet: make eval {named}");
    }
    let mut comparisons: Vec<(&str, &str)> = Vec::new();
    for test in &s.tests {
        if !comparisons.contains(&(&test.a, &test.b)) {
            comparisons.push((&test.a, &test.b));
        }
    }
    let mut withheld = false;
    for (a, b) in &comparisons {
        let of_both = s.tests.iter().filter(|t| t.a == *a && t.b == *b);
        withheld |= compare(out, a, b, &of_both.collect::<Vec<_>>())?;
    }
    legend(out, &s.tests, withheld)?;
    let controlled = comparisons.iter().any(|(a, b)| {
        let is_control = |path: &str| system(path) == "shuffled";
        is_control(a) || is_control(b)
    });
    if !controlled {
        let text = "No control (CONTROL=shuffled): part of a gain may be style alone.";
        wrap(out, "  ", "  ", text)?;
    }
    if let Some(verdicts) = &s.verdicts {
        judged(out, verdicts)?;
    }
    if let Some(replies) = &s.replies {
        lengths(out, replies)?;
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
            "all replies and scores; rejects.jsonl: rows that gen-eval left out",
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

/// What was learnt, and which step's adapter it is.
fn trained(out: &mut String, t: &Training, named: &str) -> std::fmt::Result {
    writeln!(
        out,
        "\nTraining   {:>6} steps in {:.0} s",
        t.steps, t.seconds
    )?;
    if !t.finished {
        writeln!(out, "           unfinished: make train {named} goes on")?;
    }
    writeln!(
        out,
        "           loss {:.3} at the first step, {:.3} at the last",
        t.loss.0, t.loss.1
    )?;
    let indent = " ".repeat(11);
    if let Some(held_out) = &t.held_out {
        let (after, step) = (held_out.after, held_out.step);
        let whose = match (held_out.of_adapter, t.choice.step) {
            (true, true) => format!("{after:.3} at step {step}, the best, whose adapter this is"),
            (true, false) => format!("{after:.3} after"),
            (false, _) => format!("{after:.3} at the last evaluation (step {step})"),
        };
        let text = format!("held-out loss {:.3} before, {whose}", held_out.before);
        wrap(out, &indent, &indent, &text)?;
    }
    let chosen = match (t.choice.end, t.choice.step) {
        (false, false) => return Ok(()),
        (true, false) => "when to stop",
        (_, true) => "which step's adapter this is",
    };
    let text =
        format!("The held-out rows chose {chosen}: what is measured on them is somewhat too good.");
    wrap(out, &indent, &indent, &text)
}

/// The system that a path leads to.
fn system(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// A table of one comparison: the paired permutation test's p-value, adjusted over the
/// figures, and the interval that goes with it. Whether a star was withheld.
fn compare(out: &mut String, a: &str, b: &str, tests: &[&Test]) -> Result<bool, std::fmt::Error> {
    let by_judge = if a.starts_with("verdicts.") {
        " by the judge's score"
    } else {
        ""
    };
    let (a, b) = (cut(system(a), 9), cut(system(b), 9));
    let shown: Vec<&Test> = (tests.iter().copied())
        .filter(|t| t.test == "permutation")
        .collect();
    // Where the figures do not all have the same gaps, each tells its own below the table.
    let rows = |t: &Test| (t.n, t.unpaired, t.missing, t.clusters);
    let alike = shown.windows(2).all(|pair| rows(pair[0]) == rows(pair[1]));
    let head = match shown.first() {
        Some(first) if alike => of_rows(first),
        _ => {
            let all = tests.iter().map(|t| t.rows()).max().unwrap_or(0);
            let groups = tests.iter().filter_map(|t| t.clusters).max();
            format!("{}{}", counted(all, "held-out row"), in_groups(groups))
        }
    };
    writeln!(out)?;
    wrap(out, "", "  ", &format!("{b} against {a}{by_judge}, {head}"))?;
    let alpha = shown.first().and_then(|t| t.alpha());
    let level = alpha.map_or("interval".into(), level);
    writeln!(
        out,
        "  {:<14}{a:>10}{b:>10}  {:>22}   {:>8}",
        "figure",
        format!("{level} of the difference"),
        "p"
    )?;
    let (mut notes, mut withheld) = (Vec::new(), false);
    for test in &shown {
        let name = cut(&test.metric, 14);
        let (ends, note) = interval(test, tests);
        if let Some(note) = note {
            notes.push((name.clone(), note));
        }
        if !alike && test.gaps() > 0 {
            notes.push((name.clone(), of_rows(test)));
        }
        let p = test.p_holm.map_or("-".into(), |p| {
            if p < 0.0001 {
                "<0.0001".into()
            } else {
                format!("{p:.4}")
            }
        });
        let significant = test.p_holm.zip(alpha).is_some_and(|(p, alpha)| p < alpha);
        let gaps = test.gaps() as f64 > MOST_GAPS * test.rows() as f64;
        withheld |= significant && gaps;
        let mark = if significant && !gaps { " *" } else { "" };
        let mean = |m: Option<f64>| m.map_or("-".into(), |m| figure(m, ""));
        writeln!(
            out,
            "  {name:<14}{:>10}{:>10}  {:>22}   {p:>8}{mark}",
            mean(test.mean_a),
            mean(test.mean_b),
            ends.unwrap_or_else(|| "-".into()),
        )?;
    }
    let mut told: Vec<&str> = Vec::new();
    for (_, note) in &notes {
        if told.contains(&&**note) {
            continue;
        }
        told.push(note);
        let of: Vec<&str> = (notes.iter())
            .filter(|(_, other)| other == note)
            .map(|(name, _)| name.as_str())
            .collect();
        let of = match of.len() == shown.len() && of.len() > 1 {
            true => "each figure".into(),
            false => of.join(", "),
        };
        wrap(out, "  ", "    ", &format!("{of}: {note}"))?;
    }
    if let Some(text) = never(&shown, alpha) {
        wrap(out, "  ", "    ", &text)?;
    }
    Ok(withheld)
}

/// `55 of 100 held-out rows in 20 groups (42 without a figure on either side, 3 on one)`
fn of_rows(test: &Test) -> String {
    let groups = in_groups(test.clusters);
    if test.gaps() == 0 {
        return format!("{}{groups}", counted(test.n, "held-out row"));
    }
    format!(
        "{} of {}{groups} ({} without a figure on either side, {} on one)",
        test.n,
        counted(test.rows(), "held-out row"),
        test.missing,
        test.unpaired
    )
}

fn in_groups(groups: Option<u64>) -> String {
    groups.map_or(String::new(), |n| format!(" in {}", counted(n, "group")))
}

fn counted(count: u64, noun: &str) -> String {
    cli::counted(usize::try_from(count).unwrap_or(usize::MAX), noun)
}

/// `95%`
fn level(alpha: f64) -> String {
    format!("{}%", (1e4 * (1.0 - alpha)).round() / 100.0)
}

/// The interval of a permutation test, or why there is none. Files from before it had one
/// have the bootstrap's.
fn interval(test: &Test, tests: &[&Test]) -> (Option<String>, Option<String>) {
    let own = test.ci_low.is_some() || test.ci_high.is_some();
    let of = match own || test.ci_reason.is_some() || test.reason.is_some() {
        true => Some(test),
        false => (tests.iter().copied()).find(|t| t.test == "bootstrap" && t.metric == test.metric),
    };
    let Some(of) = of else {
        return (None, None);
    };
    // Differences are written a − b; a reader asks what b brought. Of a one-sided test one
    // end is open. Zero has no sign.
    let [low, high] = [of.ci_high, of.ci_low].map(|end| end.map(|end| figure(0.0 - end, "+")));
    let ends = match (low, high) {
        (Some(low), Some(high)) => Some(format!("{low} to {high}")),
        (Some(low), None) => Some(format!("from {low}")),
        (None, Some(high)) => Some(format!("to {high}")),
        (None, None) => None,
    };
    if ends.is_some() {
        return (ends, None);
    }
    let lacks = match test.p_holm {
        Some(_) => "no interval",
        None => "no interval, no p",
    };
    let reason = of.ci_reason.as_ref().or(of.reason.as_ref());
    (
        None,
        reason.map(|reason| format!("{lacks}: {}", plain(reason))),
    )
}

/// Says where no p-value of a table can be below alpha, whatever the figures are: the test
/// has so few sign patterns, of which the one seen is always as extreme as itself, and in a
/// two-sided test its opposite too.
fn never(shown: &[&Test], alpha: Option<f64>) -> Option<String> {
    let alpha = alpha?;
    let tested: Vec<&&Test> = shown.iter().filter(|t| t.p_holm.is_some()).collect();
    // sigtest's own reason, given with each interval that there is none of, is enough.
    if tested.iter().all(|t| t.ci_reason.is_some()) {
        return None;
    }
    if tested.iter().any(|t| t.method.as_deref() != Some("exact")) {
        return None;
    }
    let (units, noun) = match tested.iter().filter_map(|t| t.clusters).max() {
        Some(groups) => (groups, "group"),
        None => (tested.iter().map(|t| t.n).max()?, "row"),
    };
    let one_sided = (tested.iter()).any(|t| t.signed("alternative") != Some("two-sided"));
    let sides = if one_sided { 1.0 } else { 2.0 };
    let least = sides * 0.5_f64.powf(units as f64) * tested.len() as f64;
    (least >= alpha).then(|| {
        format!(
            "No p can be below {alpha} here: of {} the least, adjusted over {}, is {:.2}.",
            counted(units, noun),
            counted(tested.len() as u64, "figure"),
            least.min(1.0)
        )
    })
}

/// How the tables are to be read.
fn legend(out: &mut String, tests: &[Test], withheld: bool) -> std::fmt::Result {
    let shown = || tests.iter().filter(|t| t.test == "permutation");
    // One run's comparisons are made with the same settings; if not, all are named.
    let distinct = |of: &dyn Fn(&Test) -> Option<String>| {
        let mut all: Vec<String> = Vec::new();
        for value in shown().filter_map(of) {
            if !all.contains(&value) {
                all.push(value);
            }
        }
        (!all.is_empty()).then(|| all.join(" or "))
    };
    let mut text = String::from(
        "Lower is better for nll, higher for the others; differences are right − left.",
    );
    let of_rows = ["bleu", "chrf", "rouge", "nll"];
    if shown().any(|t| of_rows.iter().any(|name| t.metric.starts_with(name))) {
        text += " Figures are means over rows, bleu and chrf too: not those of the corpus.";
    }
    if let Some(level) = distinct(&|t| t.alpha().map(level)) {
        write!(text, " Intervals: each {level}, not adjusted.")?;
    }
    let kind = distinct(&|t| {
        t.signed("alternative").map(|kind| match kind {
            "greater" => "one-sided: left greater".into(),
            "less" => "one-sided: left less".into(),
            other => plain(other),
        })
    });
    text += " p: permutation test";
    if let Some(kind) = kind {
        write!(text, " ({kind})")?;
    }
    text += ", adjusted over the figures of a table (Holm), over these held-out rows, for this \
             one adapter (one seed, one decoding)";
    match distinct(&|t| t.alpha().map(|alpha| alpha.to_string())) {
        Some(alpha) => write!(text, "; * below {alpha}.")?,
        None => text += ".",
    }
    if withheld {
        write!(
            text,
            " No * where over {:.0}% of the rows lack the figure on a side: those that have it may \
             not be like the others.",
            100.0 * MOST_GAPS
        )?;
    }
    writeln!(out)?;
    wrap(out, "  ", "  ", &text)
}

/// What the judge said, and what else may have made it say so.
fn judged(out: &mut String, verdicts: &Verdicts) -> std::fmt::Result {
    let text = format!("{}: {}", cut(&verdicts.judge, 24), list(&verdicts.outcomes));
    writeln!(out)?;
    wrap(out, "Judge      ", &" ".repeat(13), &text)?;
    let indent = " ".repeat(11);
    if verdicts.judge == OFFLINE {
        let text =
            "Offline: to the point or not, whatever the manner, which is most of what is learnt.";
        wrap(out, &indent, &indent, text)?;
    }
    let ties = &verdicts.ties;
    if ties.known > 0 {
        let text = format!(
            "Of {}, {} flipped (the two orders disagree), {} of identical replies.",
            counted(ties.known, "tie"),
            ties.flipped,
            ties.identical
        );
        wrap(out, &indent, &indent, &text)?;
    }
    let (won, of) = verdicts.longer;
    if of > 0 {
        let text = format!("The longer reply (in words) won {won} of {of}.");
        wrap(out, &indent, &indent, &text)?;
    }
    Ok(())
}

/// How long the replies are, and how many were cut.
fn lengths(out: &mut String, replies: &Replies) -> std::fmt::Result {
    let mean = |words: u64, count: u64| format!("{:.1}", words as f64 / count.max(1) as f64);
    let mut means = Vec::new();
    let mut cuts = Vec::new();
    for (name, lengths) in &replies.systems {
        let name = cut(name, 16);
        means.push(format!("{name} {}", mean(lengths.words, lengths.count)));
        if lengths.ended > 0 {
            cuts.push(format!("{name} {} of {}", lengths.cut, lengths.ended));
        }
    }
    if replies.liked.count > 0 {
        let liked = mean(replies.liked.words, replies.liked.count);
        means.push(format!("liked replies {liked}"));
    }
    let indent = " ".repeat(11);
    let text = format!("words, on average: {}", means.join(", "));
    writeln!(out)?;
    wrap(out, "Replies    ", &indent, &text)?;
    if !cuts.is_empty() {
        let text = format!("cut at max_new_tokens: {}", cuts.join(", "));
        wrap(out, &indent, &indent, &text)?;
    }
    Ok(())
}

/// Lines of at most [`WIDTH`] columns.
fn wrap(out: &mut String, first: &str, others: &str, text: &str) -> std::fmt::Result {
    let mut line = String::from(first);
    let mut begun = false;
    let widest = WIDTH - first.len().max(others.len());
    for word in text.split(' ').map(|word| cut(word, widest)) {
        if begun && line.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(out, "{line}")?;
            line = String::from(others);
            begun = false;
        }
        if begun {
            line.push(' ');
        }
        line.push_str(&word);
        begun = true;
    }
    writeln!(out, "{line}")
}

/// A figure that fits its column, whatever its size.
fn figure(x: f64, sign: &str) -> String {
    match (x.abs() < 1e5, sign) {
        (true, "+") => format!("{x:+.3}"),
        (true, _) => format!("{x:.3}"),
        (false, "+") => format!("{x:+.2e}"),
        (false, _) => format!("{x:.2e}"),
    }
}

/// A text from a file as it may stand within a line.
fn plain(text: &str) -> String {
    cli::printable(text)
        .replace('\n', "\\n")
        .replace('\t', "\\t")
}

/// A name that fits its column.
fn cut(name: &str, width: usize) -> String {
    let name = plain(name);
    if name.chars().count() <= width {
        return name;
    }
    name.chars().take(width - 1).chain(['…']).collect()
}

/// `name 12, other 3`, the largest first, as many as fit the line.
fn list(counts: &BTreeMap<String, u64>) -> String {
    let mut sorted: Vec<_> = counts.iter().collect();
    sorted.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
    let mut text = String::new();
    for (at, (name, count)) in sorted.iter().enumerate() {
        let separator = if at == 0 { "" } else { ", " };
        let item = format!("{separator}{} {count}", cut(name, 24));
        if text.chars().count() + item.chars().count() > 44 {
            text.push_str(", …");
            break;
        }
        text.push_str(&item);
    }
    text
}
