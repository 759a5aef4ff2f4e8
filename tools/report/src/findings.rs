//! What can be said of a run, and what must be said with it: the one place that screen and
//! page take their words and figures from. Here is no layout.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::harmless::plain;
use crate::sources::{Compared, Row, Sources, Test, Training};

/// A larger share of rows without a figure makes those that have one another kind of rows: a
/// judge may refuse just those where one side is worse.
const MOST_GAPS: f64 = 0.05;

/// The name that judge gives to its judge without a model.
const OFFLINE: &str = "reference-chrf-rank";

/// Figures of which less is better, as sigtest has them.
const LOWER_IS_BETTER: [&str; 2] = ["nll", "perplexity"];

/// What can be said of a run.
pub struct Findings<'s> {
    /// Of the training.
    pub training: Option<Trained>,
    /// Each pair of systems that was compared, in the order of the tests.
    pub comparisons: Vec<Comparison<'s>>,
    /// How the figures are to be read.
    pub legend: Vec<String>,
    /// Said where a star was withheld.
    pub withheld: Option<String>,
    /// Said where no control was compared.
    pub uncontrolled: Option<&'static str>,
    /// What the judge said.
    pub judged: Option<Judged<'s>>,
    /// How long the replies are.
    pub replies: Option<Replies>,
}

/// What can be said of the training.
pub struct Trained {
    /// That it is not finished, where it is not.
    pub unfinished: Option<String>,
    /// How the loss fell.
    pub learnt: Vec<String>,
    /// What the held-out rows decided, where they did.
    pub chosen: Option<String>,
}

/// Two systems, figure by figure.
pub struct Comparison<'s> {
    /// Path of the one side.
    pub a: &'s str,
    /// Path of the other.
    pub b: &'s str,
    /// The rows that all figures, or the most, are of.
    pub rows: String,
    /// Intervals cover 1 − alpha; `None` where it is not told.
    pub alpha: Option<f64>,
    /// The permutation test's, in the order of the file.
    pub figures: Vec<Figure<'s>>,
    /// What must be known of some figures.
    pub notes: Vec<Note<'s>>,
    /// Said where nothing could have been found.
    pub never: Option<String>,
}

/// A figure of a comparison, with the paired permutation test's p-value.
pub struct Figure<'s> {
    /// Its name.
    pub metric: &'s str,
    /// Means of both sides.
    pub means: [Option<f64>; 2],
    /// What b brought: mean of b − a.
    pub difference: Option<f64>,
    /// That over the standard deviation of the differences.
    pub d_z: Option<f64>,
    /// Ends of the interval of b − a; of a one-sided test one is open.
    pub ends: [Option<f64>; 2],
    /// Adjusted over the figures of the comparison.
    pub p: Option<f64>,
    /// Significant, and with few enough gaps to be called so.
    pub star: bool,
    /// Rows with the figure on both sides.
    pub rows: u64,
}

/// What must be known of some figures.
pub struct Note<'s> {
    /// Whose; none where it is about each.
    pub figures: Vec<&'s str>,
    /// What.
    pub text: String,
}

/// What the judge said, and what else may have made it say so.
pub struct Judged<'s> {
    /// Its name.
    pub judge: &'s str,
    /// What is to be known of it.
    pub offline: Option<&'static str>,
    /// Each pair of systems that it was asked about.
    pub pairs: Vec<Outcomes<'s>>,
}

/// Who won how often.
#[derive(Default)]
pub struct Outcomes<'s> {
    /// The systems, where the verdicts tell.
    pub systems: Option<(&'s str, &'s str)>,
    /// By name of the winner, `tie`, or `none`.
    pub by_winner: BTreeMap<&'s str, u64>,
    /// Ties that tell what they are.
    pub ties: u64,
    /// Of those the two orders disagree about.
    pub flipped: u64,
    /// Of those both replies were the same, and nobody was asked.
    pub identical: u64,
    /// Wins of the longer reply.
    longer_won: u64,
    /// Wins where one was longer.
    longer_of: u64,
}

/// How long the replies are.
#[derive(Default)]
pub struct Replies {
    /// Those that people liked.
    pub liked: Lengths,
    /// By system.
    pub systems: BTreeMap<String, Lengths>,
}

/// Words, by white space.
#[derive(Default)]
pub struct Lengths {
    /// Of each reply.
    pub words: Vec<u64>,
    /// Replies that say how they ended.
    pub ended: u64,
    /// Those that were cut at `max_new_tokens`.
    pub cut: u64,
}

impl Lengths {
    /// `9.8`
    pub fn mean(&self) -> String {
        let words: u64 = self.words.iter().sum();
        format!("{:.1}", words as f64 / self.words.len().max(1) as f64)
    }
}

fn words(text: &str) -> u64 {
    text.split_whitespace().count() as u64
}

/// The system that a path leads to. Its name may hold dots.
pub fn system(path: &str) -> &str {
    path.strip_prefix("systems.").unwrap_or_else(|| last(path))
}

/// The last part of a path.
pub fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Whether less of a figure is better.
pub fn lower_is_better(metric: &str) -> bool {
    LOWER_IS_BETTER.contains(&last(metric))
}

/// What is not there, and the command that makes it.
pub fn none_yet(phase: &str, named: &str) -> String {
    format!("none yet: make {phase} {named}")
}

/// A number with its noun.
pub fn counted(count: u64, noun: &str) -> String {
    cli::counted(usize::try_from(count).unwrap_or(usize::MAX), noun)
}

/// `95%`
pub fn level(alpha: f64) -> String {
    format!("{}%", (1e4 * (1.0 - alpha)).round() / 100.0)
}

/// A figure that fits its column, whatever its size.
pub fn figure(x: f64, sign: &str) -> String {
    match (x.abs() < 1e5, sign) {
        (true, "+") => format!("{x:+.3}"),
        (true, _) => format!("{x:.3}"),
        (false, "+") => format!("{x:+.2e}"),
        (false, _) => format!("{x:.2e}"),
    }
}

impl<'s> Findings<'s> {
    /// All that the files allow to say.
    pub fn of(s: &'s Sources) -> Self {
        let mut comparisons: Vec<Comparison> = Vec::new();
        let mut withheld = false;
        for test in &s.tests {
            let (a, b) = (&*test.a, &*test.b);
            if !comparisons.iter().any(|known| (known.a, known.b) == (a, b)) {
                let of_both: Vec<&Test> = (s.tests.iter())
                    .filter(|t| (&*t.a, &*t.b) == (a, b))
                    .collect();
                let (comparison, without_star) = compare(a, b, &of_both);
                withheld |= without_star;
                comparisons.push(comparison);
            }
        }
        let is_control = |path: &str| system(path) == "shuffled";
        let controlled = comparisons
            .iter()
            .any(|c| is_control(c.a) || is_control(c.b));
        Self {
            training: s.training.as_ref().map(|t| trained(t, &s.named)),
            comparisons,
            legend: legend(&s.tests),
            withheld: withheld.then(|| {
                format!(
                    "No * where over {:.0}% of the rows lack the figure on a side: those that \
                     have it may not be like the others.",
                    100.0 * MOST_GAPS
                )
            }),
            uncontrolled: (!controlled)
                .then_some("No control (CONTROL=shuffled): part of a gain may be style alone."),
            judged: judged(&s.rows),
            replies: replies(&s.rows),
        }
    }
}

/// The files to go on from, and what they hold.
pub fn files(s: &Sources) -> Vec<(PathBuf, &'static str)> {
    vec![
        (
            s.pairs_folder.join("pairs.jsonl"),
            "the pairs; rejects.jsonl, dropped.jsonl: the others",
        ),
        (
            s.model_folder.join("README.md"),
            "the model card; beside it the adapter, for PEFT",
        ),
        (
            s.model_folder.join("metrics.jsonl"),
            "loss, gradient norm, learning rate of each step",
        ),
        (
            s.eval_folder.join("judged.jsonl"),
            "all replies and scores; rejects.jsonl: rows that gen-eval left out",
        ),
        (
            s.eval_folder.join("tests.jsonl"),
            "every statistical test, with effect sizes",
        ),
    ]
}

/// What was learnt, and which step's adapter it is.
fn trained(t: &Training, named: &str) -> Trained {
    let mut learnt = vec![format!(
        "loss {:.3} at the first step, {:.3} at the last",
        t.loss.0, t.loss.1
    )];
    if let Some(held_out) = &t.held_out {
        let (after, step) = (held_out.after, held_out.step);
        let whose = match (held_out.of_adapter, t.choice.step) {
            (true, true) => format!("{after:.3} at step {step}, the best, whose adapter this is"),
            (true, false) => format!("{after:.3} after"),
            (false, _) => format!("{after:.3} at the last evaluation (step {step})"),
        };
        learnt.push(format!(
            "held-out loss {:.3} before, {whose}",
            held_out.before
        ));
    }
    let chosen = match (t.choice.end, t.choice.step) {
        (false, false) => None,
        (true, false) => Some("when to stop"),
        (_, true) => Some("which step's adapter this is"),
    };
    Trained {
        unfinished: (!t.finished).then(|| format!("unfinished: make train {named} goes on")),
        learnt,
        chosen: chosen.map(|chosen| {
            format!(
                "The held-out rows chose {chosen}: what is measured on them is somewhat too good."
            )
        }),
    }
}

/// One comparison: the paired permutation test's p-value, adjusted over the figures, and the
/// interval that goes with it. Whether a star was withheld.
fn compare<'s>(a: &'s str, b: &'s str, tests: &[&'s Test]) -> (Comparison<'s>, bool) {
    let shown: Vec<&Test> = (tests.iter().copied())
        .filter(|t| t.test == "permutation")
        .collect();
    // Where the figures do not all have the same gaps, each tells its own in a note.
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
    let alpha = shown.first().and_then(|t| t.alpha());
    let (mut figures, mut notes, mut withheld) = (Vec::new(), Vec::<Note>::new(), false);
    for test in &shown {
        let mut note = |text: String| match notes.iter_mut().find(|note| note.text == text) {
            Some(known) => known.figures.push(&test.metric),
            None => notes.push(Note {
                figures: vec![&test.metric],
                text,
            }),
        };
        let (ends, without) = interval(test, tests);
        without.map(&mut note);
        if !alike && test.gaps() > 0 {
            note(of_rows(test));
        }
        let significant = test.p_holm.zip(alpha).is_some_and(|(p, alpha)| p < alpha);
        let gaps = test.gaps() as f64 > MOST_GAPS * test.rows() as f64;
        withheld |= significant && gaps;
        let of_means = || Some(test.mean_b? - test.mean_a?);
        figures.push(Figure {
            metric: &test.metric,
            means: [test.mean_a, test.mean_b],
            // Zero has no sign.
            difference: test.mean_diff.map(|d| 0.0 - d).or_else(of_means),
            d_z: test.d_z.map(|d| 0.0 - d),
            ends,
            p: test.p_holm,
            star: significant && !gaps,
            rows: test.n,
        });
    }
    for note in &mut notes {
        if note.figures.len() == shown.len() && shown.len() > 1 {
            note.figures.clear();
        }
    }
    let comparison = Comparison {
        a,
        b,
        rows: head,
        alpha,
        figures,
        notes,
        never: never(&shown, alpha),
    };
    (comparison, withheld)
}

impl Comparison<'_> {
    /// What is compared and on how many rows; `name` writes a system's.
    pub fn title(&self, name: impl Fn(&str) -> String) -> String {
        let by_judge = if self.a.starts_with("verdicts.") {
            " by the judge's score"
        } else {
            ""
        };
        let (a, b) = (name(system(self.a)), name(system(self.b)));
        format!("{b} against {a}{by_judge}, {}", self.rows)
    }

    /// `95% of the difference`
    pub fn level(&self) -> String {
        format!(
            "{} of the difference",
            self.alpha.map_or("interval".into(), level)
        )
    }
}

impl Figure<'_> {
    /// `<0.0001`
    pub fn p(&self) -> String {
        self.p.map_or("-".into(), |p| match p < 0.0001 {
            true => "<0.0001".into(),
            false => format!("{p:.4}"),
        })
    }

    /// `-2.000 to -1.500`
    pub fn interval(&self) -> String {
        match self.ends.map(|end| end.map(|end| figure(end, "+"))) {
            [Some(low), Some(high)] => format!("{low} to {high}"),
            [Some(low), None] => format!("from {low}"),
            [None, Some(high)] => format!("to {high}"),
            [None, None] => "-".into(),
        }
    }
}

impl Note<'_> {
    /// The note with its figures; `name` writes one.
    pub fn said(&self, name: impl Fn(&str) -> String) -> String {
        let of: Vec<String> = self.figures.iter().map(|of| name(of)).collect();
        match of.is_empty() {
            true => format!("each figure: {}", self.text),
            false => format!("{}: {}", of.join(", "), self.text),
        }
    }
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

/// The interval of a permutation test, or why there is none. Files from before it had one
/// have the bootstrap's.
fn interval(test: &Test, tests: &[&Test]) -> ([Option<f64>; 2], Option<String>) {
    let own = test.ci_low.is_some() || test.ci_high.is_some();
    let of = match own || test.ci_reason.is_some() || test.reason.is_some() {
        true => Some(test),
        false => (tests.iter().copied()).find(|t| t.test == "bootstrap" && t.metric == test.metric),
    };
    let Some(of) = of else {
        return ([None, None], None);
    };
    // Differences are written a − b; a reader asks what b brought. Of a one-sided test one
    // end is open. Zero has no sign.
    let ends = [of.ci_high, of.ci_low].map(|end| end.map(|end| 0.0 - end));
    if ends != [None, None] {
        return (ends, None);
    }
    let lacks = match test.p_holm {
        Some(_) => "no interval",
        None => "no interval, no p",
    };
    let reason = of.ci_reason.as_ref().or(of.reason.as_ref());
    let reason = reason.map(|reason| format!("{lacks}: {}", plain(reason)));
    (ends, reason)
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

/// How the figures are to be read.
fn legend(tests: &[Test]) -> Vec<String> {
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
    let mut said = vec![String::from(
        "Lower is better for nll, higher for the others; differences are right − left.",
    )];
    let of_rows = ["bleu", "chrf", "rouge", "nll"];
    if shown().any(|t| of_rows.iter().any(|name| t.metric.starts_with(name))) {
        let text = "Figures are means over rows, bleu and chrf too: not those of the corpus.";
        said.push(text.into());
    }
    if let Some(level) = distinct(&|t| t.alpha().map(level)) {
        said.push(format!("Intervals: each {level}, not adjusted."));
    }
    let kind = distinct(&|t| {
        t.signed("alternative").map(|kind| match kind {
            "greater" => "one-sided: left greater".into(),
            "less" => "one-sided: left less".into(),
            other => plain(other),
        })
    });
    let kind = kind.map_or(String::new(), |kind| format!(" ({kind})"));
    let star = distinct(&|t| t.alpha().map(|alpha| alpha.to_string()));
    let star = star.map_or(String::new(), |alpha| format!("; * below {alpha}"));
    said.push(format!(
        "p: permutation test{kind}, adjusted over the figures of a table (Holm), over these \
         held-out rows, for this one adapter (one seed, one decoding){star}."
    ));
    said
}

fn judged(rows: &[Row]) -> Option<Judged<'_>> {
    let mut judge = None;
    let mut pairs: Vec<Outcomes> = Vec::new();
    for row in rows {
        let Some(given) = &row.given else { continue };
        judge = Some(&*given.judge);
        for at in 0..given.comparisons.len().max(1) {
            let compared = given.comparisons.get(at);
            // The outcome of an item is that of its first comparison.
            let winner = match (at, compared) {
                (1.., Some(compared)) => compared.winner.as_deref(),
                _ => given.winner.as_deref(),
            };
            if pairs.len() == at {
                pairs.push(Outcomes::default());
            }
            pairs[at].add(winner.unwrap_or("none"), compared, row);
        }
    }
    let judge = judge?;
    Some(Judged {
        judge,
        offline: (judge == OFFLINE).then_some(
            "Offline: to the point or not, whatever the manner, which is most of what is learnt.",
        ),
        pairs,
    })
}

impl<'s> Outcomes<'s> {
    /// Counts what was said of one item.
    fn add(&mut self, winner: &'s str, compared: Option<&'s Compared>, row: &Row) {
        if let Some(Compared {
            a,
            b,
            flipped,
            because,
            ..
        }) = compared
        {
            self.systems = self.systems.or(Some((a, b)));
            if winner == "tie" {
                self.ties += 1;
                self.flipped += u64::from(*flipped);
                self.identical += u64::from(because.is_some());
            }
            let length =
                |name: &String| row.replies.get(name).map(|reply| words(&reply.prediction));
            if let Some((of_a, of_b)) = length(a).zip(length(b))
                && of_a != of_b
                && [a, b].contains(&&winner.to_owned())
            {
                let longer = if of_a > of_b { a } else { b };
                self.longer_won += u64::from(winner == longer);
                self.longer_of += 1;
            }
        }
        *self.by_winner.entry(winner).or_default() += 1;
    }

    /// How often this one won.
    pub fn of(&self, winner: &str) -> u64 {
        self.by_winner.get(winner).copied().unwrap_or(0)
    }

    /// What else may have made the judge say so.
    pub fn said(&self) -> Vec<String> {
        let mut said = Vec::new();
        if self.ties > 0 {
            said.push(format!(
                "Of {}, {} flipped (the two orders disagree), {} of identical replies.",
                counted(self.ties, "tie"),
                self.flipped,
                self.identical
            ));
        }
        if self.longer_of > 0 {
            let (won, of) = (self.longer_won, self.longer_of);
            said.push(format!("The longer reply (in words) won {won} of {of}."));
        }
        said
    }
}

fn replies(rows: &[Row]) -> Option<Replies> {
    let mut replies = Replies::default();
    for row in rows {
        for (name, reply) in &row.replies {
            let lengths = replies.systems.entry(name.clone()).or_default();
            lengths.words.push(words(&reply.prediction));
            lengths.ended += u64::from(reply.finish.is_some());
            lengths.cut += u64::from(reply.finish.as_deref() == Some("length"));
        }
        replies.liked.words.extend(row.liked.as_deref().map(words));
    }
    (!replies.systems.is_empty()).then_some(replies)
}

impl Replies {
    /// `base 9.8, lora 19.9, liked replies 22.9`; `name` writes a system's.
    pub fn said(&self, name: impl Fn(&str) -> String) -> Vec<String> {
        let mut means = Vec::new();
        let mut cuts = Vec::new();
        for (system, lengths) in &self.systems {
            let name = name(system);
            means.push(format!("{name} {}", lengths.mean()));
            if lengths.ended > 0 {
                cuts.push(format!("{name} {} of {}", lengths.cut, lengths.ended));
            }
        }
        if !self.liked.words.is_empty() {
            means.push(format!("liked replies {}", self.liked.mean()));
        }
        let mut said = vec![format!("words, on average: {}", means.join(", "))];
        if !cuts.is_empty() {
            said.push(format!("cut at max_new_tokens: {}", cuts.join(", ")));
        }
        said
    }
}
