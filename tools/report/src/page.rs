//! The findings as one page for a browser. It holds texts of strangers: every text goes
//! through the template's escaping, hidden characters are shown as marks, and the page's own
//! policy lets nothing run and nothing be fetched.

use anyhow::Result;
use base64::Engine;
use comparison::{Comparison, figure, lower_is_better, system};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value};
use plotters::style::RGBColor;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::charts::{self, Chart, Strip};
use crate::findings::{Findings, Outcomes, Trained, files, none_yet};
use crate::harmless::{plain, short};
use crate::rows::{Card, Ends, drawn, most};
use crate::sources::{Data, Row, Sources, Training, Update};

const STYLE: &str = include_str!("page.css");
const TEMPLATE: &str = include_str!("page.html");

/// The whole page; `seed` draws the rows that are shown.
pub fn render(s: &Sources, f: &Findings, seed: u64) -> Result<String> {
    let mut page = Environment::new();
    page.set_undefined_behavior(UndefinedBehavior::Strict);
    let mut syntax = SyntaxConfig::builder();
    page.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build()?);
    // The name's ending turns the escaping on.
    page.add_template("page.html", TEMPLATE)?;
    let style = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(STYLE));
    let own = cli::Signature::new("report").with("seed", seed).to_string();
    let own = [("this page".to_owned(), own)];
    let page_of_run = Page {
        style: STYLE,
        style_hash: style,
        run: plain(&s.run),
        missing: Missing {
            data: plain(&none_yet("data", &s.named)),
            training: plain(&none_yet("train", &s.named)),
            evaluation: plain(&none_yet("eval", &s.named)),
        },
        cautions: cautions(f),
        collected: s.collected,
        data: s.data.as_ref().map(data).transpose()?,
        training: match s.training.as_ref().zip(f.training.as_ref()) {
            Some((training, trained)) => Some(curves(training, trained)?),
            None => None,
        },
        comparisons: (f.comparisons.iter())
            .map(|comparison| view(comparison, &s.rows))
            .collect::<Result<_>>()?,
        legend: &f.legend,
        judged: judged(f)?,
        replies: replies(f)?,
        drawn: drawn(&s.rows, seed),
        rows: s.rows.iter().filter(|row| !row.replies.is_empty()).count(),
        seed,
        files: (files(s).into_iter().filter(|(path, _)| path.exists()))
            .map(|(path, what)| (plain(&path.display().to_string()), what))
            .collect(),
        signatures: (s.signatures.iter().chain(&own))
            .map(|(of, signature)| (plain(of), plain(signature)))
            .collect(),
    };
    Ok(page
        .get_template("page.html")?
        .render(Value::from(Serde(&page_of_run)))?)
}

/// What the template is given.
#[derive(Serialize)]
struct Page<'f> {
    style: &'static str,
    style_hash: String,
    run: String,
    missing: Missing,
    cautions: Vec<String>,
    collected: Option<u64>,
    data: Option<DataView>,
    training: Option<TrainingView>,
    comparisons: Vec<View>,
    legend: &'f [String],
    judged: Option<JudgedView>,
    replies: Option<RepliesView>,
    drawn: Vec<Card>,
    rows: usize,
    seed: u64,
    files: Vec<(String, &'static str)>,
    signatures: Vec<(String, String)>,
}

/// What is said where there is nothing yet.
#[derive(Serialize)]
struct Missing {
    data: String,
    training: String,
    evaluation: String,
}

/// What takes away from all that follows.
fn cautions(f: &Findings) -> Vec<String> {
    let chosen = f.training.as_ref();
    let chosen = chosen.and_then(|trained| trained.chosen.clone());
    let offline = f.judged.as_ref().and_then(|judged| {
        Some(format!(
            "Judge: {}. {}",
            short(judged.judge, 60),
            judged.offline?
        ))
    });
    let never = f.comparisons.iter().filter_map(|c| {
        let (a, b) = (plain(system(c.a)), plain(system(c.b)));
        Some(format!("{b} against {a}: {}", c.never.as_ref()?))
    });
    chosen
        .into_iter()
        .chain(f.lacking.iter().copied().map(String::from))
        .chain(f.withheld.clone())
        .chain(offline)
        .chain(never)
        .collect()
}

/// A colour with what it stands for, below a chart.
#[derive(Serialize)]
struct Key {
    color: String,
    text: String,
}

fn key(color: RGBColor, text: String) -> Key {
    let RGBColor(red, green, blue) = color;
    Key {
        color: format!("#{red:02X}{green:02X}{blue:02X}"),
        text,
    }
}

#[derive(Serialize)]
struct DataView {
    train: u64,
    eval: u64,
    rejected: u64,
    dropped: u64,
    chart: Chart,
}

/// What became of the pairs.
fn data(data: &Data) -> Result<DataView> {
    let mut bars = vec![
        ("kept, to train on".into(), data.train, charts::BLUE),
        ("kept, held out".into(), data.eval, charts::BLUE),
    ];
    let reasons = [
        ("", &data.by_reason, charts::ORANGE),
        ("duplicate: ", &data.dropped, charts::GREY),
    ];
    for (what, counts, color) in reasons {
        let mut counts: Vec<_> = counts.iter().collect();
        counts.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
        bars.extend(
            counts
                .into_iter()
                .map(|(name, count)| (short(&format!("{what}{name}"), 28), *count, color)),
        );
    }
    let told: Vec<String> = bars
        .iter()
        .map(|(name, n, _)| format!("{name} {n}"))
        .collect();
    Ok(DataView {
        train: data.train,
        eval: data.eval,
        rejected: data.rejected,
        dropped: data.dropped.values().sum(),
        chart: charts::bars(format!("Pairs: {}", told.join(", ")), "pairs", &bars)?,
    })
}

#[derive(Serialize)]
struct TrainingView {
    steps: u64,
    seconds: String,
    unfinished: Option<String>,
    learnt: Vec<String>,
    window: usize,
    chosen: Option<u64>,
    held_out: usize,
    losses: Option<Chart>,
    others: Vec<Chart>,
}

/// The curves.
fn curves(t: &Training, trained: &Trained) -> Result<TrainingView> {
    let of = |value: fn(&Update) -> Option<f64>| -> Vec<(f64, f64)> {
        let points = t.updates.iter();
        points
            .filter_map(|update| Some((update.step as f64, value(update)?)))
            .collect()
    };
    let train = of(|update| Some(update.loss));
    // The step whose adapter this is, where that was a choice.
    let chosen = (t.held_out.as_ref())
        .filter(|held_out| t.choice.step && held_out.of_adapter)
        .map(|held_out| held_out.step);
    let mut label = format!(
        "Training loss by step: {:.3} at the first, {:.3} at the last of {}.",
        t.loss.0, t.loss.1, t.steps
    );
    for (step, loss) in t.evals.iter().take(1).chain(t.evals.iter().skip(1).last()) {
        label += &format!(" Held-out loss at step {step}: {loss:.3}.");
    }
    if let Some(step) = chosen {
        label += &format!(" The adapter is that of step {step}.");
    }
    let mut others = Vec::new();
    let window = charts::window(train.len());
    let speeds = format!("tokens/s, over {window} steps");
    for (what, unit, points) in [
        (
            "Learning rate",
            "learning rate",
            of(|update| update.learning_rate),
        ),
        (
            "Gradient norm before clipping",
            "gradient norm",
            of(|update| update.grad_norm),
        ),
        ("Tokens a second", &speeds, speed(t, window)),
    ] {
        let (Some(first), Some(last)) = (points.first(), points.last()) else {
            continue;
        };
        let most = points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let [first, last, most] = [first.1, last.1, most].map(charts::tick);
        let label = format!("{what} by step: first {first}, last {last}, largest {most}.");
        others.extend(charts::steps(label, unit, &points)?);
    }
    Ok(TrainingView {
        steps: t.steps,
        seconds: format!("{:.0}", t.seconds),
        unfinished: trained.unfinished.as_deref().map(plain),
        learnt: trained.learnt.clone(),
        window,
        chosen,
        held_out: t.evals.len(),
        losses: charts::losses(label, &train, &t.evals, chosen.map(|step| step as f64))?,
        others,
    })
}

/// Tokens a second around each step. One step's own time says little: it is taken when its
/// figures arrive, and those of two steps may arrive at once.
fn speed(t: &Training, window: usize) -> Vec<(f64, f64)> {
    let timed: Vec<(f64, f64, f64)> = (t.updates.iter())
        .filter_map(|u| Some((u.step as f64, u.tokens? as f64, u.seconds?)))
        .collect();
    let half = window / 2;
    let around = |at: usize| {
        let near = &timed[at.saturating_sub(half)..timed.len().min(at + half + 1)];
        let (tokens, seconds) = (near.iter()).fold((0.0, 0.0), |(tokens, seconds), near| {
            (tokens + near.1, seconds + near.2)
        });
        (seconds > 0.0).then(|| (timed[at].0, tokens / seconds))
    };
    (0..timed.len()).filter_map(around).collect()
}

#[derive(Serialize)]
struct View {
    title: String,
    names: [String; 2],
    level: String,
    better: Vec<String>,
    worse: Vec<String>,
    open: Vec<String>,
    figures: Vec<FigureView>,
    notes: Vec<String>,
    forest: Option<Chart>,
    differences: Vec<DifferenceView>,
    most: Option<Ends>,
}

#[derive(Serialize)]
struct FigureView {
    name: String,
    unit: String,
    means: [String; 2],
    difference: String,
    interval: String,
    d_z: String,
    p: String,
    star: bool,
}

#[derive(Serialize)]
struct DifferenceView {
    name: String,
    better: usize,
    worse: usize,
    equal: usize,
    /// Where the tests are of another number of rows.
    tested: Option<u64>,
    chart: Option<Chart>,
}

/// In what a figure is counted.
fn unit(metric: &str) -> &'static str {
    match metric {
        "nll" => "nats/token",
        "rouge1" | "rouge2" | "rougeL" => "0 to 1",
        "bleu" | "chrf" => "0 to 100",
        _ if metric.starts_with("verdicts.score") => "0 to 1",
        _ => "",
    }
}

/// A comparison, its tests and its rows.
fn view(c: &Comparison, rows: &[Row]) -> Result<View> {
    let [a, b] = [c.a, c.b].map(|path| short(system(path), 24));
    let (mut better, mut worse, mut open) = (Vec::new(), Vec::new(), Vec::new());
    let (mut figures, mut strips, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    let mut told = Vec::new();
    for of in &c.figures {
        let name = short(of.metric, 24);
        let (lower, unit) = (lower_is_better(of.metric), unit(of.metric));
        let side = match of.difference.filter(|d| of.star() && *d != 0.0) {
            Some(difference) if (difference < 0.0) == lower => &mut better,
            Some(_) => &mut worse,
            None => &mut open,
        };
        let signed = |x: Option<f64>| x.map_or("-".into(), |x| figure(x, "+"));
        side.push(format!("{name} ({})", signed(of.difference)));
        told.push(format!(
            "{name} {} ({})",
            signed(of.difference),
            of.interval()
        ));
        figures.push(FigureView {
            name: name.clone(),
            unit: unit.into(),
            means: of
                .means
                .map(|mean| mean.map_or("-".into(), |mean| figure(mean, ""))),
            difference: signed(of.difference),
            interval: of.interval(),
            d_z: signed(of.d_z),
            p: of.p(),
            star: of.star(),
        });
        let way = if lower {
            "lower is better"
        } else {
            "higher is better"
        };
        let comma = if unit.is_empty() { "" } else { ", " };
        strips.push(Strip {
            name: short(of.metric, 20),
            unit: format!("{unit}{comma}{way}"),
            lower,
            mean: of.difference,
            ends: of.ends,
        });
        let values: Vec<f64> = (rows.iter())
            .filter_map(|row| row.difference(c.a, c.b, of.metric))
            .collect();
        if values.is_empty() {
            continue;
        }
        let zero = values.iter().filter(|x| **x == 0.0).count();
        let gain = values
            .iter()
            .filter(|x| **x != 0.0 && (**x < 0.0) == lower)
            .count();
        let (of_rows, loss) = (values.len(), values.len() - zero - gain);
        let label = format!(
            "{name} of {b} less that of {a}, by row: better in {gain} of {of_rows}, worse in {loss}, equal in {zero}."
        );
        let axis = match unit.is_empty() {
            true => format!("difference in {name}"),
            false => format!("difference in {name} ({unit})"),
        };
        differences.push(DifferenceView {
            name,
            better: gain,
            worse: loss,
            equal: zero,
            tested: (of.rows != of_rows as u64).then_some(of.rows),
            chart: charts::histogram(label, &axis, lower, &values)?,
        });
    }
    let label = format!(
        "What {b} brought against {a}, with intervals: {}.",
        told.join("; ")
    );
    Ok(View {
        title: c.title(|name| short(name, 40)),
        level: format!("{} of the difference", c.level()),
        better,
        worse,
        open,
        figures,
        notes: c
            .notes
            .iter()
            .map(|note| note.said(|name| short(name, 24), plain))
            .collect(),
        forest: charts::forest(label, &strips)?,
        differences,
        most: most(c, rows),
        names: [a, b],
    })
}

#[derive(Serialize)]
struct JudgedView {
    judge: String,
    pairs: Vec<OutcomesView>,
    chart: Option<Chart>,
}

#[derive(Serialize)]
struct OutcomesView {
    title: String,
    keys: Vec<Key>,
    said: Vec<String>,
}

/// Who won.
fn judged(f: &Findings) -> Result<Option<JudgedView>> {
    let Some(judged) = &f.judged else {
        return Ok(None);
    };
    let (mut bars, mut pairs, mut told) = (Vec::new(), Vec::new(), Vec::new());
    for outcomes in &judged.pairs {
        let title = match outcomes.systems {
            Some((a, b)) => format!("{} against {}", short(b, 24), short(a, 24)),
            None => "outcomes".into(),
        };
        let parts = portions(outcomes);
        let words: Vec<String> = parts
            .iter()
            .map(|(n, _, what)| format!("{what} {n}"))
            .collect();
        told.push(format!("{title}: {}", words.join(", ")));
        bars.push((
            short(&title, 20),
            parts
                .iter()
                .map(|&(count, color, _)| (count, color))
                .collect(),
        ));
        pairs.push(OutcomesView {
            title,
            keys: (parts.into_iter())
                .map(|(count, color, what)| key(color, format!("{what} {count}")))
                .collect(),
            said: outcomes.said(),
        });
    }
    let label = format!(
        "Outcomes by {}. {}.",
        short(judged.judge, 40),
        told.join(". ")
    );
    Ok(Some(JudgedView {
        judge: short(judged.judge, 60),
        pairs,
        chart: match bars.is_empty() {
            true => None,
            false => Some(charts::stacked(label, "held-out rows", &bars)?),
        },
    }))
}

/// All outcomes of a pair, from the win of the second system to that of the first.
fn portions(o: &Outcomes) -> Vec<(u64, RGBColor, String)> {
    let (mut won, mut lost) = (Vec::new(), Vec::new());
    let mut colors = [charts::BLUE, charts::ORANGE].into_iter();
    for (winner, count) in &o.by_winner {
        let what = || format!("{} won", short(winner, 24));
        match (*winner, o.systems) {
            ("tie" | "none", _) => {}
            (_, Some((_, b))) if b == *winner => won.push((*count, charts::BLUE, what())),
            (_, Some(_)) => lost.push((*count, charts::ORANGE, what())),
            // Of a file that does not tell who was compared.
            _ => won.push((*count, colors.next().unwrap_or(charts::GREY), what())),
        }
    }
    let other = o.of("tie") - o.flipped - o.identical.min(o.of("tie") - o.flipped);
    let between = [
        (o.flipped, charts::DARK_GREY, "tie, the two orders disagree"),
        (o.identical, charts::LIGHT_GREY, "tie, identical replies"),
        (other, charts::GREY, "tie"),
        (o.of("none"), charts::SHADE, "no verdict"),
    ];
    let between = between.map(|(count, color, what)| (count, color, what.into()));
    (won.into_iter())
        .chain(between.into_iter().filter(|part| part.0 > 0))
        .chain(lost)
        .collect()
}

#[derive(Serialize)]
struct RepliesView {
    said: Vec<String>,
    chart: Chart,
}

/// How long the replies are.
fn replies(f: &Findings) -> Result<Option<RepliesView>> {
    let Some(replies) = &f.replies else {
        return Ok(None);
    };
    let mut of: Vec<(String, Vec<u64>)> = (replies.systems.iter())
        .map(|(name, lengths)| (short(name, 18), lengths.words.clone()))
        .collect();
    if !replies.liked.words.is_empty() {
        of.push(("liked replies".into(), replies.liked.words.clone()));
    }
    let said = replies.said(|name| short(name, 24));
    let label = format!("Lengths of the replies. {}.", said.join(". "));
    Ok(Some(RepliesView {
        said,
        chart: charts::boxes(label, "words", &of)?,
    }))
}
