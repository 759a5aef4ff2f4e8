//! The rows that the page shows: some by chance, and those at both ends of a comparison.

use serde::Serialize;

use comparison::{Comparison, figure, lower_is_better};

use crate::harmless::{Part, parts, plain, short};
use crate::sources::{Reply, Row};

/// Rows that are drawn by chance.
const DRAWN: usize = 8;

/// Rows at either end of a comparison.
const MOST: usize = 3;

/// Characters that are shown of a text: chat data may hold books.
const LONGEST: usize = 2000;

/// The rows at both ends of a comparison.
#[derive(Serialize)]
pub struct Ends {
    figure: String,
    of_liked: bool,
    best: Vec<Card>,
    worst: Vec<Card>,
}

/// The rows where the systems differ most: by the held-out loss where there is one, for it has
/// neither the grain of word counts nor a judge's taste.
pub fn most(c: &Comparison, rows: &[Row]) -> Option<Ends> {
    if c.is_of_verdicts() {
        return None;
    }
    let metrics = || c.figures.iter().map(|figure| figure.metric);
    let metric = metrics()
        .find(|metric| *metric == "nll")
        .or(metrics().next())?;
    let mut by_gain: Vec<(f64, &Row)> = (rows.iter())
        .filter(|row| !row.replies.is_empty())
        .filter_map(|row| Some((row.difference(c.a, c.b, metric)?, row)))
        .collect();
    let gain = |x: f64| if lower_is_better(metric) { -x } else { x };
    by_gain.sort_by(|x, y| gain(y.0).total_cmp(&gain(x.0)));
    let show = |(difference, row): &(f64, &Row)| {
        let said = format!("{} {}", short(metric, 24), figure(*difference, "+"));
        card(row, Some(said))
    };
    let half = by_gain.len().div_ceil(2).min(MOST);
    let rest = &by_gain[half..];
    Some(Ends {
        figure: short(metric, 24),
        of_liked: metric == "nll",
        best: by_gain[..half].iter().map(show).collect(),
        worst: rest.iter().rev().take(MOST).map(show).collect(),
    })
}

/// A row with all that was replied to it.
#[derive(Serialize)]
pub struct Card {
    name: String,
    said: Option<String>,
    tweet: Option<Text>,
    liked: Option<Text>,
    replies: Vec<ReplyView>,
    verdicts: Vec<VerdictView>,
}

#[derive(Serialize)]
struct ReplyView {
    name: String,
    text: Text,
    cut: bool,
    figures: Vec<(String, String)>,
}

#[derive(Serialize)]
struct VerdictView {
    said: String,
    orders: Vec<(String, Text)>,
}

/// A stranger's text.
#[derive(Serialize)]
struct Text {
    parts: Vec<Part>,
    more: usize,
}

fn text(text: &str) -> Text {
    let shown: String = text.chars().take(LONGEST).collect();
    Text {
        more: text[shown.len()..].chars().count(),
        parts: parts(&shown),
    }
}

fn card(row: &Row, said: Option<String>) -> Card {
    let reply = |(name, reply): (&String, &Reply)| {
        let path = format!("systems.{name}.");
        // A system may have a name that begins with this one and a dot.
        let others: Vec<String> = (row.replies.keys())
            .filter_map(|other| other.strip_prefix(name.as_str())?.strip_prefix('.'))
            .map(|rest| format!("{rest}."))
            .collect();
        let own = row.numbers.range(path.clone()..);
        let own = own.map_while(|(key, value)| Some((key.strip_prefix(&path)?, *value)));
        ReplyView {
            name: short(name, 24),
            text: text(&reply.prediction),
            cut: reply.finish.as_deref() == Some("length"),
            figures: own
                .filter(|(key, _)| !others.iter().any(|rest| key.starts_with(rest)))
                .map(|(key, value)| (short(key, 24), figure(value, "")))
                .collect(),
        }
    };
    let mut verdicts = Vec::new();
    if let Some(given) = &row.given {
        for compared in &given.comparisons {
            let (a, b) = (short(&compared.a, 24), short(&compared.b, 24));
            let outcome = match (compared.winner.as_deref(), compared.flipped) {
                (None, _) => "no verdict".into(),
                (Some("tie"), true) => "a tie, for the two orders disagree".into(),
                (Some("tie"), false) => "a tie".into(),
                (Some(winner), _) => format!("{} won", short(winner, 24)),
            };
            let because = compared.because.as_deref();
            let because = because.map_or(String::new(), |because| format!(", {}", plain(because)));
            let orders = compared.orders.iter().map(|order| {
                let name = |of: &Option<String>| short(of.as_deref().unwrap_or("none"), 24);
                let (first, preferred) = (name(&order.first), name(&order.preferred));
                let why = order.why.as_deref().unwrap_or_default();
                (format!("{first} first: {preferred} preferred"), text(why))
            });
            verdicts.push(VerdictView {
                said: format!("{b} against {a}: {outcome}{because}"),
                orders: orders.collect(),
            });
        }
        if verdicts.is_empty() {
            let winner = short(given.winner.as_deref().unwrap_or("no verdict"), 24);
            verdicts.push(VerdictView {
                said: format!("verdict: {winner}"),
                orders: Vec::new(),
            });
        }
    }
    Card {
        name: short(&row.name, 80),
        said,
        tweet: row.tweet.as_deref().map(text),
        liked: row.liked.as_deref().map(text),
        replies: row.replies.iter().map(reply).collect(),
        verdicts,
    }
}

/// Rows by the draw of a seed, in the file's order: each row's lot is a hash, so that it is
/// the same whatever other rows there are.
pub fn drawn(rows: &[Row], seed: u64) -> Vec<Card> {
    let rows = rows
        .iter()
        .filter(|row| !row.replies.is_empty())
        .enumerate();
    let lot = |row: &Row| cli::sha256_hex(format!("{seed} {}", row.name).as_bytes());
    let mut lots: Vec<(String, usize, &Row)> = rows.map(|(at, row)| (lot(row), at, row)).collect();
    lots.sort_by(|x, y| (&x.0, x.1).cmp(&(&y.0, y.1)));
    lots.truncate(DRAWN);
    lots.sort_by_key(|(_, at, _)| *at);
    lots.iter().map(|(.., row)| card(row, None)).collect()
}
