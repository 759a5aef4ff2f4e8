//! The files of a run, and the figures that the table needs of each.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::Failure;
use jsonl::{Lines, Position, ReadError, Records};
use record::{Dropped, Record, Rejected, Split};
use serde::Deserialize;

/// A JSONL file that may not be there yet, each line as `read` understands it. A last line
/// that was cut short by the end of whoever wrote it is none.
fn lines<T>(
    path: &Path,
    read: impl FnMut(Record) -> Result<T, record::Error>,
) -> Result<Option<Vec<T>>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut reader = Records::new(Lines::open(path)?, "report", 0);
    let (mut all, mut read) = (Vec::new(), read);
    loop {
        match reader.next_with(&mut io::sink(), &mut read) {
            Ok(Some((_, value))) => all.push(value),
            Ok(None) => return Ok(Some(all)),
            Err(ReadError::Bad { position, .. }) if is_cut(path, &position)? => {
                return Ok(Some(all));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether this is a last line without its end.
fn is_cut(path: &Path, position: &Position) -> Result<bool> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let ends = bytes.iter().filter(|&&byte| byte == b'\n').count() as u64;
    Ok(ends + 1 == position.line)
}

/// Where the files are and what they say.
pub struct Sources {
    /// `data/processed/DATA`
    pub pairs_folder: PathBuf,
    /// `output/models/RUN`
    pub model_folder: PathBuf,
    /// `output/eval/RUN`
    pub eval_folder: PathBuf,
    /// The name of the run.
    pub run: String,
    /// The variables that name it, and its data if that has another name, to make.
    pub named: String,
    /// How many pairs were collected.
    pub collected: Option<u64>,
    /// What was done with them.
    pub data: Option<Data>,
    /// How training went.
    pub training: Option<Training>,
    /// How the replies compare.
    pub tests: Vec<Test>,
    /// What the judge said.
    pub verdicts: Option<Verdicts>,
    /// How long the replies are.
    pub replies: Option<Replies>,
}

/// Counts of the data phase.
pub struct Data {
    /// Pairs refused by pair-validate, and by which filter.
    pub rejected: u64,
    /// Refusals by filter; a pair can have several.
    pub by_reason: BTreeMap<String, u64>,
    /// Pairs dropped as duplicates, by kind.
    pub dropped: BTreeMap<String, u64>,
    /// Pairs to train on.
    pub train: u64,
    /// Pairs held out.
    pub eval: u64,
}

/// Figures of the training run.
pub struct Training {
    /// Updates done.
    pub steps: u64,
    /// Loss of the first and of the last update.
    pub loss: (f64, f64),
    /// Held-out losses.
    pub held_out: Option<HeldOut>,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Whether the adapter is there.
    pub finished: bool,
    /// What the held-out rows decided.
    pub choice: Choice,
}

/// Held-out loss before training, and one after it, in nats a token.
pub struct HeldOut {
    /// Of the first evaluation.
    pub before: f64,
    /// Of the evaluation at `step`.
    pub after: f64,
    /// Where the training was then.
    pub step: u64,
    /// Whether the adapter is known to be that of `step`.
    pub of_adapter: bool,
}

/// What the held-out rows decided about the adapter.
#[derive(Clone, Copy, Default)]
pub struct Choice {
    /// When to stop.
    pub end: bool,
    /// Of which step the adapter is.
    pub step: bool,
}

/// One line of tests.jsonl, as far as the table shows it.
#[derive(Clone, Debug)]
pub struct Test {
    /// Path of the one side.
    pub a: String,
    /// Path of the other.
    pub b: String,
    /// The figure.
    pub metric: String,
    /// The test.
    pub test: String,
    /// Its p-value, adjusted over the figures of the comparison.
    pub p_holm: Option<f64>,
    /// Ends of the interval.
    pub ci_low: Option<f64>,
    /// Ends of the interval.
    pub ci_high: Option<f64>,
    /// Why there is no interval.
    pub ci_reason: Option<String>,
    /// Why there is no result at all.
    pub reason: Option<String>,
    /// Which form the test took.
    pub method: Option<String>,
    /// Rows with the figure on both sides.
    pub n: u64,
    /// Rows with it on one side.
    pub unpaired: u64,
    /// Rows with it on neither.
    pub missing: u64,
    /// Groups of rows that were flipped and drawn as one.
    pub clusters: Option<u64>,
    /// Mean of the one side.
    pub mean_a: Option<f64>,
    /// Mean of the other.
    pub mean_b: Option<f64>,
    /// `key:value|…`: how it was made.
    pub signature: String,
}

impl Test {
    /// A part of the signature. Where a text within it holds the same key, the last one is
    /// sigtest's own.
    pub fn signed(&self, key: &str) -> Option<&str> {
        let mut parts = self.signature.rsplit('|');
        parts.find_map(|part| part.strip_prefix(key)?.strip_prefix(':'))
    }

    /// Intervals cover 1 − alpha, and a p-value below it is called significant.
    pub fn alpha(&self) -> Option<f64> {
        self.signed("alpha")?.parse().ok()
    }

    /// Rows that say nothing of the difference.
    pub fn gaps(&self) -> u64 {
        self.unpaired.saturating_add(self.missing)
    }

    /// All rows that were there.
    pub fn rows(&self) -> u64 {
        self.n.saturating_add(self.gaps())
    }
}

/// Outcomes by winner.
pub struct Verdicts {
    /// The judge's name.
    pub judge: String,
    /// Outcomes by name of the winner, `tie`, or `none`.
    pub outcomes: BTreeMap<String, u64>,
    /// What the ties are.
    pub ties: Ties,
    /// Wins of the longer reply, and wins where one was longer.
    pub longer: (u64, u64),
}

/// What the ties are, as far as the verdicts tell.
#[derive(Default)]
pub struct Ties {
    /// All that tell.
    pub known: u64,
    /// The two orders disagree.
    pub flipped: u64,
    /// Both replies were the same, and nobody was asked.
    pub identical: u64,
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
    /// Replies.
    pub count: u64,
    /// Words of all.
    pub words: u64,
    /// Replies that say how they ended.
    pub ended: u64,
    /// Those that were cut at `max_new_tokens`.
    pub cut: u64,
}

impl Lengths {
    fn add(&mut self, reply: &str) {
        self.count += 1;
        self.words += words(reply);
    }
}

fn words(text: &str) -> u64 {
    text.split_whitespace().count() as u64
}

impl Sources {
    /// Reads what is there.
    pub fn read(root: &Path, run: &str, data: &str) -> Result<Self> {
        let pairs_folder = root.join("data/processed").join(data);
        let model_folder = root.join("output/models").join(run);
        let eval_folder = root.join("output/eval").join(run);
        let collected = lines(
            &root.join("data/raw").join(data).join("pairs.jsonl"),
            |_| Ok(()),
        )?
        .map(|all| all.len() as u64);
        let (verdicts, replies) = read_judged(&eval_folder.join("judged.jsonl"))?;
        Ok(Self {
            collected,
            data: read_data(&pairs_folder)?,
            training: read_training(&model_folder)?,
            tests: read_tests(&eval_folder.join("tests.jsonl"))?,
            verdicts,
            replies,
            pairs_folder,
            model_folder,
            eval_folder,
            run: run.to_owned(),
            named: match run == data {
                true => format!("RUN={run}"),
                false => format!("RUN={run} DATA={data}"),
            },
        })
    }
}

fn read_data(folder: &Path) -> Result<Option<Data>> {
    let mut data = Data {
        rejected: 0,
        by_reason: BTreeMap::new(),
        dropped: BTreeMap::new(),
        train: 0,
        eval: 0,
    };
    let pairs = lines(&folder.join("pairs.jsonl"), |pair| {
        match pair.split()? {
            Some(Split::Eval) => data.eval += 1,
            _ => data.train += 1,
        }
        Ok(())
    })?;
    lines(&folder.join("rejects.jsonl"), |record| {
        data.rejected += 1;
        match record.get::<Rejected>("rejected")? {
            Some(rejected) => record::count_by_reason(&rejected.reasons, &mut data.by_reason),
            // A malformed line that was put up with.
            None => *data.by_reason.entry("malformed".into()).or_default() += 1,
        }
        Ok(())
    })?;
    lines(&folder.join("dropped.jsonl"), |record| {
        // Malformed lines that were put up with stand there too.
        if let Some(dropped) = record.get::<Dropped>("dropped")? {
            let reason = dropped.reason.name().to_owned();
            *data.dropped.entry(reason).or_default() += 1;
        }
        Ok(())
    })?;
    Ok(pairs.map(|_| data))
}

fn read_training(folder: &Path) -> Result<Option<Training>> {
    let mut steps: Vec<(u64, f64)> = Vec::new();
    let mut evals: Vec<(u64, f64)> = Vec::new();
    lines(&folder.join("metrics.jsonl"), |line| {
        if let Some(loss) = line.get("loss")? {
            steps.push((line.require("step")?, loss));
        }
        if let Some(loss) = line.get("eval_loss")? {
            evals.push((line.require("step")?, loss));
        }
        Ok(())
    })?;
    let (Some(&(_, first)), Some(&(last_step, last))) = (steps.first(), steps.last()) else {
        return Ok(None);
    };
    let seconds = lines(&folder.join("timing.jsonl"), |line| {
        Ok(line.get::<f64>("seconds")?.unwrap_or(0.0))
    })?;
    let finished = folder.join("adapter_model.safetensors").exists();
    let choice = read_choice(&folder.join("run.json"))?;
    Ok(Some(Training {
        steps: last_step,
        loss: (first, last),
        held_out: held_out(&evals, last_step, choice.filter(|_| finished)),
        seconds: seconds.into_iter().flatten().sum(),
        finished,
        choice: choice.unwrap_or_default(),
    }))
}

/// The losses to show of all evaluations: the adapter's own where the run is finished and its
/// `choice` known, else the last.
fn held_out(evals: &[(u64, f64)], last_step: u64, choice: Option<Choice>) -> Option<HeldOut> {
    let (&(_, before), &(mut step, mut after)) = (evals.first()?, evals.last()?);
    if choice.is_some_and(|choice| choice.step) {
        // As qlora-train: of equal ones the first, and none from before the training.
        for &(at, loss) in evals.iter().rev().filter(|(at, _)| *at > 0) {
            if loss <= after {
                (step, after) = (at, loss);
            }
        }
    }
    Some(HeldOut {
        before,
        after,
        step,
        of_adapter: choice.is_some_and(|choice| choice.step || step == last_step),
    })
}

/// What the held-out rows decide by the run's settings; `None` where the run does not tell.
fn read_choice(path: &Path) -> Result<Option<Choice>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let settings = Record::parse(&text).and_then(|run| run.require::<Vec<String>>("settings"));
    let settings =
        settings.map_err(|error| Failure::Input(format!("{}: {error}", path.display())))?;
    let value = |key: &str| {
        let mut settings = settings.iter().filter_map(|line| line.split_once(" = "));
        settings.find_map(|(name, value)| (name == key).then_some(value))
    };
    let patience = value("training.early_stopping_patience");
    let best = value("training.load_best_model_at_end");
    Ok(patience.zip(best).map(|(patience, best)| Choice {
        end: patience != "0",
        step: best == "true",
    }))
}

fn read_tests(path: &Path) -> Result<Vec<Test>> {
    let tests = lines(path, |record| {
        Ok(Test {
            a: record.require("a")?,
            b: record.require("b")?,
            metric: record.require("metric")?,
            test: record.require("test")?,
            p_holm: record.get("p_holm")?,
            ci_low: record.get("ci_low")?,
            ci_high: record.get("ci_high")?,
            ci_reason: record.get("ci_reason")?,
            reason: record.get("reason")?,
            method: record.get("method")?,
            n: record.require("n")?,
            unpaired: record.get("unpaired")?.unwrap_or_default(),
            missing: record.get("missing")?.unwrap_or_default(),
            clusters: record.get("clusters")?,
            mean_a: record.get("mean_a")?,
            mean_b: record.get("mean_b")?,
            signature: record.get("signature")?.unwrap_or_default(),
        })
    })?;
    Ok(tests.unwrap_or_default())
}

fn read_judged(path: &Path) -> Result<(Option<Verdicts>, Option<Replies>)> {
    let mut verdicts = Verdicts {
        judge: String::new(),
        outcomes: BTreeMap::new(),
        ties: Ties::default(),
        longer: (0, 0),
    };
    let mut replies = Replies::default();
    lines(path, |item| {
        let systems: BTreeMap<String, Reply> = item.get("systems")?.unwrap_or_default();
        for (name, reply) in &systems {
            let lengths = replies.systems.entry(name.clone()).or_default();
            lengths.add(&reply.prediction);
            lengths.ended += u64::from(reply.finish.is_some());
            lengths.cut += u64::from(reply.finish.as_deref() == Some("length"));
        }
        if let Some(liked) = item.get::<String>("reference")? {
            replies.liked.add(&liked);
        }
        if let Some(given) = item.get::<Given>("verdicts")? {
            verdicts.add(given, &systems);
        }
        Ok(())
    })?;
    Ok((
        (!verdicts.outcomes.is_empty()).then_some(verdicts),
        (!replies.systems.is_empty()).then_some(replies),
    ))
}

impl Verdicts {
    /// Counts what was said of one item.
    fn add(&mut self, given: Given, systems: &BTreeMap<String, Reply>) {
        let winner = given.winner.unwrap_or_else(|| "none".into());
        // The outcome is that of the first comparison.
        if let Some(Compared {
            a,
            b,
            flipped,
            because,
        }) = given.comparisons.first()
        {
            if winner == "tie" {
                self.ties.known += 1;
                self.ties.flipped += u64::from(*flipped);
                self.ties.identical += u64::from(because.is_some());
            }
            let length = |name: &String| systems.get(name).map(|reply| words(&reply.prediction));
            if let Some((of_a, of_b)) = length(a).zip(length(b))
                && of_a != of_b
                && [a, b].contains(&&winner)
            {
                let longer = if of_a > of_b { a } else { b };
                self.longer.0 += u64::from(winner == *longer);
                self.longer.1 += 1;
            }
        }
        self.judge = given.judge;
        *self.outcomes.entry(winner).or_default() += 1;
    }
}

/// What a system replied, as far as the table shows it.
#[derive(Deserialize)]
struct Reply {
    prediction: String,
    finish: Option<String>,
}

/// What a judged item says of its replies, as far as the table shows it.
#[derive(Deserialize)]
struct Given {
    judge: String,
    winner: Option<String>,
    #[serde(default)]
    comparisons: Vec<Compared>,
}

/// One comparison of two replies.
#[derive(Deserialize)]
struct Compared {
    a: String,
    b: String,
    flipped: bool,
    because: Option<String>,
}
