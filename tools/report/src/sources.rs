//! The files of a run, and what the report needs of each.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::Failure;
use comparison::Test;
use jsonl::{Lines, Position, ReadError, Records};
use record::{Dropped, Record, Rejected, Split};
use serde::Deserialize;
use serde_json::Value;

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
    /// The flags that do, to report.
    pub asked: String,
    /// How many pairs were collected.
    pub collected: Option<u64>,
    /// What was done with them.
    pub data: Option<Data>,
    /// How training went.
    pub training: Option<Training>,
    /// How the replies compare.
    pub tests: Vec<Test>,
    /// The replies and what was said of them.
    pub rows: Vec<Row>,
    /// Rows of the training data that the system `prompted` was shown.
    pub shown: Option<usize>,
    /// What the figures were made with, in the tools' own words, by file and figure.
    pub signatures: Vec<(String, String)>,
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
    /// All updates.
    pub updates: Vec<Update>,
    /// All held-out losses by step.
    pub evals: Vec<(f64, f64)>,
}

/// The figures of one update.
pub struct Update {
    /// Which one, from 1.
    pub step: u64,
    /// Mean loss of its rows, in nats a token.
    pub loss: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Tokens of its rows.
    pub tokens: Option<u64>,
    /// How long it took, as told when it was done.
    pub seconds: Option<f64>,
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

/// A held-out row: what was asked, what people liked, what the systems replied.
pub struct Row {
    /// Its id, or where it stands in the file.
    pub name: String,
    /// The tweet.
    pub tweet: Option<String>,
    /// The reply that people liked.
    pub liked: Option<String>,
    /// What was replied, by system.
    pub replies: BTreeMap<String, Reply>,
    /// What the judge said.
    pub given: Option<Given>,
    /// Every number of the record by its dotted path, as sigtest reads it.
    pub numbers: BTreeMap<String, f64>,
}

impl Row {
    /// A side's figure: the path leads to it, or to what holds it.
    pub fn figure(&self, path: &str, metric: &str) -> Option<f64> {
        let below = || self.numbers.get(&format!("{path}.{metric}"));
        self.numbers.get(path).or_else(below).copied()
    }

    /// What the second side of a comparison brought in a figure.
    pub fn difference(&self, a: &str, b: &str, metric: &str) -> Option<f64> {
        Some(self.figure(b, metric)? - self.figure(a, metric)?)
    }
}

/// What a system replied.
#[derive(Deserialize)]
pub struct Reply {
    /// The text.
    pub prediction: String,
    /// How it ended: `stop`, `length`.
    pub finish: Option<String>,
}

/// What the judge said of a row.
#[derive(Deserialize)]
pub struct Given {
    /// Its name.
    pub judge: String,
    /// Who won the first comparison.
    pub winner: Option<String>,
    /// Each pair of systems that was asked about.
    #[serde(default)]
    pub comparisons: Vec<Compared>,
    signature: Option<String>,
}

/// One comparison of two replies.
#[derive(Deserialize)]
pub struct Compared {
    /// The one system.
    pub a: String,
    /// The other.
    pub b: String,
    /// Who won.
    pub winner: Option<String>,
    /// Whether the two orders disagree.
    pub flipped: bool,
    /// Why nobody was asked.
    pub because: Option<String>,
    /// What was said in each order.
    #[serde(default)]
    pub orders: Vec<Order>,
}

/// What was said in one order.
#[derive(Deserialize)]
pub struct Order {
    /// Whose reply stood first.
    pub first: Option<String>,
    /// Which was preferred.
    pub preferred: Option<String>,
    /// Why.
    pub why: Option<String>,
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
        let mut signatures = Vec::new();
        for name in ["validate-summary.json", "dedup-summary.json"] {
            if let Some(signature) = read_signature(&pairs_folder.join(name))? {
                note(&mut signatures, name, &signature);
            }
        }
        let (rows, shown) = read_rows(&eval_folder.join("judged.jsonl"), &mut signatures)?;
        let tests = lines(&eval_folder.join("tests.jsonl"), |line| Test::of(&line))?;
        let tests = tests.unwrap_or_default();
        for test in tests.iter().filter(|test| !test.signature.is_empty()) {
            let of = format!("tests.jsonl, {}", test.metric);
            note(&mut signatures, &of, &test.signature);
        }
        Ok(Self {
            collected,
            data: read_data(&pairs_folder)?,
            training: read_training(&model_folder)?,
            tests,
            rows,
            shown,
            signatures,
            pairs_folder,
            model_folder,
            eval_folder,
            run: run.to_owned(),
            named: match run == data {
                true => format!("RUN={run}"),
                false => format!("RUN={run} DATA={data}"),
            },
            asked: match run == data {
                true => format!("--run {run}"),
                false => format!("--run {run} --data {data}"),
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
    let mut updates: Vec<Update> = Vec::new();
    let mut evals: Vec<(u64, f64)> = Vec::new();
    lines(&folder.join("metrics.jsonl"), |line| {
        if let Some(loss) = line.get("loss")? {
            updates.push(Update {
                step: line.require("step")?,
                loss,
                grad_norm: line.get("grad_norm")?,
                learning_rate: line.get("learning_rate")?,
                tokens: line.get("tokens")?,
                seconds: None,
            });
        }
        if let Some(loss) = line.get("eval_loss")? {
            evals.push((line.require("step")?, loss));
        }
        Ok(())
    })?;
    let (Some(first), Some(last)) = (updates.first(), updates.last()) else {
        return Ok(None);
    };
    let (loss, last_step) = ((first.loss, last.loss), last.step);
    let mut seconds = 0.0;
    // Steps that a run which was killed repeats stand there twice: the last is the one kept.
    let mut by_step: BTreeMap<u64, f64> = BTreeMap::new();
    lines(&folder.join("timing.jsonl"), |line| {
        let took = line.get::<f64>("seconds")?;
        seconds += took.unwrap_or(0.0);
        by_step.extend(line.get("step")?.zip(took));
        Ok(())
    })?;
    for update in &mut updates {
        update.seconds = by_step.get(&update.step).copied();
    }
    let finished = folder.join("adapter_model.safetensors").exists();
    let choice = read_choice(&folder.join("run.json"))?;
    Ok(Some(Training {
        steps: last_step,
        loss,
        held_out: held_out(&evals, last_step, choice.filter(|_| finished)),
        seconds,
        finished,
        choice: choice.unwrap_or_default(),
        updates,
        evals: (evals.into_iter().map(|(at, loss)| (at as f64, loss))).collect(),
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

/// The rows of judged.jsonl. How their figures were made is noted beside them.
fn read_rows(
    path: &Path,
    signatures: &mut Vec<(String, String)>,
) -> Result<(Vec<Row>, Option<usize>)> {
    let (mut line, mut shown) = (0, None);
    let rows = lines(path, |record| {
        line += 1;
        if let Some(Value::Object(corpus)) = record.get("corpus")? {
            if let Some(Value::String(signature)) = corpus.get("signature") {
                note(signatures, "items.jsonl", signature);
            }
            let examples = corpus.get("prompted").and_then(|p| p.get("examples"));
            shown = examples.and_then(Value::as_array).map(Vec::len);
            let systems = corpus.get("systems").and_then(Value::as_object);
            let figures = systems.into_iter().flat_map(|systems| systems.values());
            for (key, value) in figures.filter_map(Value::as_object).flatten() {
                if let (Some(figure), Some(signature)) =
                    (key.strip_suffix("_signature"), value.as_str())
                {
                    note(signatures, &format!("items.jsonl, {figure}"), signature);
                }
            }
            return Ok(None);
        }
        let given: Option<Given> = record.get("verdicts")?;
        if let Some(signature) = given.as_ref().and_then(|given| given.signature.as_ref()) {
            note(signatures, "judged.jsonl", signature);
        }
        let mut numbers = BTreeMap::new();
        for (key, value) in record.values()? {
            flatten(key, &value, &mut numbers);
        }
        Ok(Some(Row {
            name: record.id("id")?.unwrap_or_else(|| format!("line {line}")),
            tweet: record.get("tweet")?,
            liked: record.get("reference")?,
            replies: record.get("systems")?.unwrap_or_default(),
            given,
            numbers,
        }))
    })?;
    Ok((rows.into_iter().flatten().flatten().collect(), shown))
}

/// Every number in a value by its dotted path; true and false count as 1 and 0.
fn flatten(path: String, value: &Value, numbers: &mut BTreeMap<String, f64>) {
    match value {
        Value::Bool(yes) => drop(numbers.insert(path, f64::from(*yes))),
        Value::Number(number) => numbers.extend(number.as_f64().map(|x| (path, x))),
        Value::Object(fields) => {
            for (key, value) in fields {
                flatten(format!("{path}.{key}"), value, numbers);
            }
        }
        Value::Null | Value::String(_) | Value::Array(_) => {}
    }
}

/// Keeps a signature once, with what it is of.
fn note(signatures: &mut Vec<(String, String)>, of: &str, signature: &str) {
    if !signatures.iter().any(|(_, known)| known == signature) {
        signatures.push((of.to_owned(), signature.to_owned()));
    }
}

/// The signature of a tool's summary.
fn read_signature(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let signature = Record::parse(&text).and_then(|summary| summary.get("signature"));
    signature.map_err(|error| Failure::Input(format!("{}: {error}", path.display())).into())
}
