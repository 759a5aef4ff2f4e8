//! The files of a run, and the figures that the table needs of each.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use jsonl::{Lines, Records};
use record::{Dropped, Record, Rejected, Split};
use serde::Deserialize;

/// A JSONL file that may not be there yet, each line as `read` understands it.
fn lines<T>(
    path: &Path,
    read: impl FnMut(Record) -> Result<T, record::Error>,
) -> Result<Option<Vec<T>>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut reader = Records::new(Lines::open(path)?, "report", 0);
    let (mut all, mut read) = (Vec::new(), read);
    while let Some((_, value)) = reader.next_with(&mut io::sink(), &mut read)? {
        all.push(value);
    }
    Ok(Some(all))
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
    /// Held-out loss before training and the last one.
    pub eval_loss: Option<(f64, f64)>,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Whether the adapter is there.
    pub finished: bool,
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
    /// Number of rows.
    pub n: u64,
    /// Mean of the one side.
    pub mean_a: Option<f64>,
    /// Mean of the other.
    pub mean_b: Option<f64>,
}

/// Outcomes by winner.
pub struct Verdicts {
    /// The judge's name.
    pub judge: String,
    /// Outcomes by name of the winner, `tie`, or `none`.
    pub outcomes: BTreeMap<String, u64>,
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
        Ok(Self {
            collected,
            data: read_data(&pairs_folder)?,
            training: read_training(&model_folder)?,
            tests: read_tests(&eval_folder.join("tests.jsonl"))?,
            verdicts: read_verdicts(&eval_folder.join("judged.jsonl"))?,
            pairs_folder,
            model_folder,
            eval_folder,
            run: run.to_owned(),
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
        if let Some(rejected) = record.get::<Rejected>("rejected")? {
            record::count_by_reason(&rejected.reasons, &mut data.by_reason);
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
    let mut evals: Vec<f64> = Vec::new();
    lines(&folder.join("metrics.jsonl"), |line| {
        if let Some(loss) = line.get("loss")? {
            steps.push((line.require("step")?, loss));
        }
        evals.extend(line.get::<f64>("eval_loss")?);
        Ok(())
    })?;
    let (Some(&(_, first)), Some(&(last_step, last))) = (steps.first(), steps.last()) else {
        return Ok(None);
    };
    let seconds = lines(&folder.join("timing.jsonl"), |line| {
        Ok(line.get::<f64>("seconds")?.unwrap_or(0.0))
    })?;
    Ok(Some(Training {
        steps: last_step,
        loss: (first, last),
        eval_loss: evals.first().copied().zip(evals.last().copied()),
        seconds: seconds.into_iter().flatten().sum(),
        finished: folder.join("adapter_model.safetensors").exists(),
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
            n: record.require("n")?,
            mean_a: record.get("mean_a")?,
            mean_b: record.get("mean_b")?,
        })
    })?;
    Ok(tests.unwrap_or_default())
}

fn read_verdicts(path: &Path) -> Result<Option<Verdicts>> {
    let mut verdicts = Verdicts {
        judge: String::new(),
        outcomes: BTreeMap::new(),
    };
    lines(path, |item| {
        if let Some(given) = item.get::<Given>("verdicts")? {
            verdicts.judge = given.judge;
            let winner = given.winner.unwrap_or_else(|| "none".into());
            *verdicts.outcomes.entry(winner).or_default() += 1;
        }
        Ok(())
    })?;
    Ok((!verdicts.outcomes.is_empty()).then_some(verdicts))
}

/// What a judged item says of its replies, as far as the table shows it.
#[derive(Deserialize)]
struct Given {
    judge: String,
    winner: Option<String>,
}
