//! What can be said of a run, and what must be said with it: the one place that screen and
//! page take their words and figures from. Here is no layout.

use std::collections::BTreeMap;
use std::path::PathBuf;

use comparison::{Comparison, counted};

use crate::sources::{Compared, Row, Sources, Training};

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
    /// Said of what was not compared.
    pub lacking: Vec<&'static str>,
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

/// What is not there, and the command that makes it.
pub fn none_yet(phase: &str, named: &str) -> String {
    format!("none yet: make {phase} {named}")
}

impl<'s> Findings<'s> {
    /// All that the files allow to say.
    pub fn of(s: &'s Sources) -> Self {
        let comparisons = comparison::comparisons(&s.tests);
        let mut legend = comparison::legend(&s.tests);
        legend.extend(
            s.shown
                .map(|n| format!("Rows that prompted was shown: {n}.")),
        );
        Self {
            training: s.training.as_ref().map(|t| trained(t, &s.named)),
            legend,
            withheld: comparison::withheld(&comparisons),
            lacking: match comparisons.is_empty() {
                true => Vec::new(),
                false => comparison::lacking(&comparisons),
            },
            comparisons,
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
        offline: comparison::of_judge(judge),
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
