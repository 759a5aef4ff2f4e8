//! The findings on a screen of 80 columns.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use comparison::{Comparison, figure, system};

use crate::findings::{Findings, Judged, files, none_yet};
use crate::harmless::{plain, short};
use crate::sources::Sources;

/// Columns of the screen.
const WIDTH: usize = 80;

/// The whole screen; `page` is where the findings are a page, if they are.
pub fn render(sources: &Sources, findings: &Findings, page: Option<&Path>) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, sources, findings, page);
    out
}

fn write(out: &mut String, s: &Sources, f: &Findings, page: Option<&Path>) -> std::fmt::Result {
    let (run, named) = (&s.run, &s.named);
    let indent = " ".repeat(11);
    writeln!(out, "\nRun {run}\n")?;
    match &s.data {
        None => writeln!(out, "Data       {}", none_yet("data", named))?,
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
    match s.training.as_ref().zip(f.training.as_ref()) {
        None => writeln!(out, "\nTraining   {}", none_yet("train", named))?,
        Some((training, trained)) => {
            writeln!(
                out,
                "\nTraining   {:>6} steps in {:.0} s",
                training.steps, training.seconds
            )?;
            if let Some(text) = &trained.unfinished {
                writeln!(out, "{indent}{text}")?;
            }
            for text in trained.learnt.iter().chain(&trained.chosen) {
                wrap(out, &indent, &indent, text)?;
            }
        }
    }
    if f.comparisons.is_empty() {
        writeln!(out, "\nEvaluation {}", none_yet("eval", named))?;
        return match page {
            Some(page) => {
                writeln!(out, "\nFiles")?;
                show_page(out, page)
            }
            None => Ok(()),
        };
    }
    for comparison in &f.comparisons {
        compare(out, comparison)?;
    }
    writeln!(out)?;
    let legend: Vec<&str> = (f.legend.iter().chain(&f.withheld))
        .map(String::as_str)
        .collect();
    wrap(out, "  ", "  ", &legend.join(" "))?;
    for text in &f.lacking {
        wrap(out, "  ", "  ", text)?;
    }
    if let Some(judged) = &f.judged {
        verdicts(out, judged)?;
    }
    if let Some(replies) = &f.replies {
        writeln!(out)?;
        let mut first = "Replies    ";
        for text in replies.said(|name| short(name, 16)) {
            wrap(out, first, &indent, &text)?;
            first = &indent;
        }
    }
    writeln!(out, "\nFiles")?;
    if let Some(page) = page {
        show_page(out, page)?;
    }
    for (path, what) in files(s) {
        writeln!(out, "  {}\n      {what}", path.display())?;
    }
    let next = match (&**run, page) {
        ("demo", _) => {
            "make setup, then make data train eval MODEL=…/Qwen3-8B (see README.md)".into()
        }
        (_, Some(_)) => "read a few replies: they are on the page, drawn by chance".into(),
        (_, None) => format!("read a few replies: report {} --html FILE", s.asked),
    };
    writeln!(out, "\nNext       {next}")
}

fn show_page(out: &mut String, page: &Path) -> std::fmt::Result {
    writeln!(
        out,
        "  {}\n      this with charts, and replies side by side, for a browser",
        page.display()
    )
}

/// A table of one comparison.
fn compare(out: &mut String, c: &Comparison) -> std::fmt::Result {
    let (a, b) = (short(system(c.a), 9), short(system(c.b), 9));
    writeln!(out)?;
    wrap(out, "", "  ", &c.title(|name| short(name, 9)))?;
    writeln!(
        out,
        "  {:<14}{a:>10}{b:>10}  {:>22}   {:>8}",
        "figure",
        format!("{} of the difference", c.level()),
        "p"
    )?;
    for of in &c.figures {
        let mean = |m: Option<f64>| m.map_or("-".into(), |m| figure(m, ""));
        let [of_a, of_b] = of.means.map(mean);
        writeln!(
            out,
            "  {:<14}{of_a:>10}{of_b:>10}  {:>22}   {:>8}{}",
            short(of.metric, 14),
            of.interval(),
            of.p(),
            if of.star() { " *" } else { "" },
        )?;
    }
    for note in &c.notes {
        wrap(out, "  ", "    ", &note.said(|name| short(name, 14), plain))?;
    }
    match &c.never {
        Some(text) => wrap(out, "  ", "    ", text),
        None => Ok(()),
    }
}

/// What the judge said, and what else may have made it say so.
fn verdicts(out: &mut String, judged: &Judged) -> std::fmt::Result {
    let indent = " ".repeat(11);
    let mut first = "Judge      ";
    writeln!(out)?;
    for outcomes in &judged.pairs {
        let asked = match outcomes.systems {
            Some((a, b)) if judged.pairs.len() > 1 => {
                format!(", {} against {}", short(b, 9), short(a, 9))
            }
            _ => String::new(),
        };
        let text = format!(
            "{}{asked}: {}",
            short(judged.judge, 24),
            list(&outcomes.by_winner)
        );
        wrap(out, first, &" ".repeat(13), &text)?;
        if let Some(text) = judged.offline.filter(|_| first != indent) {
            wrap(out, &indent, &indent, text)?;
        }
        first = &indent;
        for text in outcomes.said() {
            wrap(out, &indent, &indent, &text)?;
        }
    }
    Ok(())
}

/// Lines of at most [`WIDTH`] columns.
fn wrap(out: &mut String, first: &str, others: &str, text: &str) -> std::fmt::Result {
    let mut line = String::from(first);
    let mut begun = false;
    let widest = WIDTH - first.len().max(others.len());
    for word in text.split(' ').map(|word| short(word, widest)) {
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

/// `name 12, other 3`, the largest first, as many as fit the line.
fn list<N: AsRef<str> + Ord>(counts: &BTreeMap<N, u64>) -> String {
    let mut sorted: Vec<_> = counts.iter().collect();
    sorted.sort_by(|x, y| y.1.cmp(x.1).then_with(|| x.0.cmp(y.0)));
    let mut text = String::new();
    for (at, (name, count)) in sorted.iter().enumerate() {
        let separator = if at == 0 { "" } else { ", " };
        let item = format!("{separator}{} {count}", short(name.as_ref(), 24));
        if text.chars().count() + item.chars().count() > 44 {
            text.push_str(", …");
            break;
        }
        text.push_str(&item);
    }
    text
}
