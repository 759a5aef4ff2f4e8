//! The findings for a reader: one line a metric, at most 80 columns.

use std::fmt::Write;

use crate::lines::{Line, Test};

/// Columns of the table.
const WIDTH: usize = 80;

/// The table of all lines, which come metric by metric.
pub fn render(a: &str, b: &str, alpha: f64, lines: &[Line]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "a = {a}\nb = {b}");
    if let Some(most) = lines.iter().filter_map(|line| line.clusters).max() {
        let _ = writeln!(text, "{most} clusters");
    }
    let level = format!("{}% interval", (1e4 * (1.0 - alpha)).round() / 100.0);
    let _ = writeln!(
        text,
        "{:<10} {:>5} {:>7} {:>7} {:>7} {:>17} {:>6} {:>6} {:>6}",
        "metric", "n", "a", "b", "a-b", level, "p_t", "p_W", "p_perm"
    );
    for metric in lines.chunk_by(|x, y| x.metric == y.metric) {
        let of = |test: Test| metric.iter().find(|line| line.test == test);
        let p = |test: Test| match of(test).and_then(|line| line.p_holm) {
            Some(p) if p < 0.0001 => "<1e-4".to_owned(),
            Some(p) => format!("{p:.4}"),
            None => "-".to_owned(),
        };
        let first = &metric[0];
        let interval = match of(Test::Permutation) {
            Some(line) if line.ci_low.is_some() || line.ci_high.is_some() => {
                let low = line.ci_low.map_or("-inf".to_owned(), figure);
                let high = line.ci_high.map_or("inf".to_owned(), figure);
                format!("{low} to {high}")
            }
            _ => "-".to_owned(),
        };
        let mean = |x: Option<f64>| x.map_or("-".to_owned(), figure);
        let _ = writeln!(
            text,
            "{:<10} {:>5} {:>7} {:>7} {:>7} {:>17} {:>6} {:>6} {:>6}",
            ending(&first.metric, 10),
            first.n,
            mean(first.mean_a),
            mean(first.mean_b),
            mean(first.mean_diff),
            interval,
            p(Test::PairedT),
            p(Test::Wilcoxon),
            p(Test::Permutation),
        );
        let no_interval = of(Test::Permutation).and_then(|line| line.ci_reason);
        if let Some(reason) = first.reason.or(no_interval) {
            let _ = writeln!(text, "{:>10} {reason}", "");
        }
        if let (without @ 1.., all) = first.without() {
            let _ = writeln!(text, "{:>10} {without} of {all} rows are without it", "");
        }
    }
    text.push_str(
        "p_t, p_W (Wilcoxon), p_perm: Holm-adjusted over the metrics; intervals are not\n",
    );
    text.lines()
        .map(|line| shortened(line, WIDTH) + "\n")
        .collect()
}

/// At most seven characters for anything of everyday size.
fn figure(x: f64) -> String {
    let size = x.abs();
    if size >= 1e6 || (size < 1e-4 && size > 0.0) {
        format!("{x:.0e}")
    } else {
        let digits = if size < 10.0 {
            4
        } else if size < 100.0 {
            3
        } else if size < 1000.0 {
            2
        } else {
            0
        };
        format!("{x:.digits$}")
    }
}

fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

/// The end of a dotted name, which tells more than its beginning. Names come with the
/// records: what a terminal would obey is not shown.
fn ending(text: &str, width: usize) -> String {
    let text = text.replace(char::is_control, "\u{fffd}");
    let length = text.chars().count();
    if length <= width {
        return text;
    }
    std::iter::once('…')
        .chain(text.chars().skip(length + 1 - width))
        .collect()
}
