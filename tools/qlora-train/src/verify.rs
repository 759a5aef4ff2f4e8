//! `qlora-train inspect --verify`: the user's own weights, here and in transformers.
//!
//! Parity tests run on tiny models; this is the same comparison on the model that
//! matters. The Python side is a script inside this binary.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use cli::{App, Failure};
use engine::{Cpu, Sampling};
use qwen3::{
    Adapter, Batch, Chat, Checkpoint, Generation, Keep, LossOn, Message, Model, OwnedLora, Pass,
    Prompt, Row, Storage, Weight, generate,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::inspect::Problem;

const SCRIPT: &str = include_str!("verify.py");

/// What is asked and what is replied: short, of several scripts.
const ROWS: [[&str; 2]; 4] = [
    [
        "Anyone else awake at 4 a.m. because of the rain?",
        "Only the frogs and me.",
    ],
    [
        "What is your favourite word?",
        "Petrichor. And it's raining again 🌧️",
    ],
    ["今日はとても寒いですね。", "あたたかいお茶をどうぞ。"],
    [
        "is 3 * 7 = 21 or am i losing it",
        "It is.\n\nYou may lose it tomorrow.",
    ],
];

/// Tokens of a greedy text.
const NEW_TOKENS: usize = 24;

/// Most that the mean likelihoods of a row may differ, in nats a token. In f32 that
/// is four times the largest difference seen (2.3e-6: four models, three random
/// adapters each). In bfloat16 transformers rounds every activation and we do not:
/// twice and a half the largest (0.020, over the four models).
fn tolerance(dtype: &str) -> f64 {
    if dtype == "float32" { 1e-5 } else { 5e-2 }
}

/// How the comparison went.
#[derive(Serialize)]
pub struct Verdict {
    agrees: bool,
    rows: usize,
    ids_equal: usize,
    /// Largest difference of a row's mean negative log-likelihood, in nats; NaN (in JSON
    /// null) if one is no number.
    nll_difference: f64,
    nll_tolerance: f64,
    greedy_equal: usize,
    /// What transformers computed in.
    dtype: String,
    versions: BTreeMap<String, String>,
}

impl Verdict {
    /// In a line.
    pub fn describe(&self) -> String {
        let versions: Vec<_> = self
            .versions
            .iter()
            .map(|(n, v)| format!("{n} {v}"))
            .collect();
        let nll = match self.nll_difference.is_nan() {
            true => "NLL no number".into(),
            false => format!("NLL within {:.1e} nats", self.nll_difference),
        };
        format!(
            "{} {} ({}): {} of {} rows with the same ids, {nll} (limit {:.0e}), {} greedy texts the same",
            if self.agrees {
                "agrees with"
            } else {
                "differs from"
            },
            versions.join(", "),
            self.dtype,
            self.ids_equal,
            self.rows,
            self.nll_tolerance,
            self.greedy_equal,
        )
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Missing {
        missing: String,
    },
    Made {
        dtype: String,
        versions: BTreeMap<String, String>,
        rows: Vec<Theirs>,
    },
}

/// What transformers made of a row.
#[derive(Deserialize)]
struct Theirs {
    prompt: Vec<u32>,
    row: Vec<u32>,
    /// Of each token after the first; none: no number.
    nll: Vec<Option<f64>>,
    greedy: Vec<u32>,
}

/// Runs both and compares; what differs is a problem of the folder.
pub fn run(
    app: &App,
    base: &Path,
    adapter: Option<&Path>,
    python: &Path,
    problems: &mut Vec<Problem>,
) -> Result<Verdict> {
    let checkpoint = Checkpoint::open(base)?;
    if checkpoint.is_quantized() {
        let cause = "--verify compares unquantised weights; name the model that this one was quantised from";
        return Err(Failure::Usage(cause.into()).into());
    }
    app.info(format_args!("asking transformers ({})", python.display()));
    let answer = ask(&checkpoint, adapter, python)?;
    let (dtype, versions, theirs) = match answer {
        Answer::Missing { missing } => {
            let cause = format!(
                "--verify: {} has no package `{missing}`, so nothing was compared; \
                 install it (pip install torch transformers peft) or name another with --python",
                python.display()
            );
            return Err(Failure::World(cause).into());
        }
        Answer::Made {
            dtype,
            versions,
            rows,
        } => (dtype, versions, rows),
    };
    app.info("computing the same here");
    let stop_ids = qwen3::stop_ids(base)?;
    let ours = compute(&checkpoint, adapter, &stop_ids)?;
    anyhow::ensure!(
        ours.len() == theirs.len(),
        "transformers answered for {} rows",
        theirs.len()
    );

    let nll_tolerance = tolerance(&dtype);
    let mut verdict = Verdict {
        agrees: true,
        rows: ours.len(),
        ids_equal: 0,
        nll_difference: 0.0,
        nll_tolerance,
        greedy_equal: 0,
        dtype,
        versions,
    };
    let file = adapter.map_or("model", |_| "adapter");
    let mut differ = |cause: String| {
        let effect = "what is trained or measured here is not what transformers runs".into();
        problems.push(Problem {
            file: file.into(),
            cause,
            effect,
        });
    };
    for (number, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        if ours.prompt != theirs.prompt || ours.row != theirs.row {
            differ(format!(
                "row {number}: the token ids differ from transformers'"
            ));
            verdict.agrees = false;
            continue;
        }
        verdict.ids_equal += 1;
        let labelled = ours.labelled.iter().skip(1).zip(&theirs.nll);
        let nll: Vec<f64> = labelled
            .filter(|(labelled, _)| **labelled)
            .map(|(_, nll)| nll.unwrap_or(f64::NAN))
            .collect();
        let [theirs_mean, ours_mean] = [mean(&nll), mean(&ours.nll)];
        let difference = (theirs_mean - ours_mean).abs();
        // Of NaN and a number, `max` would take the number.
        if difference.is_nan() || difference > verdict.nll_difference {
            verdict.nll_difference = difference;
        }
        if difference.is_nan() {
            let whose = match (theirs_mean.is_finite(), ours_mean.is_finite()) {
                (false, false) => "transformers and here",
                (false, true) => "transformers",
                _ => "here",
            };
            differ(format!(
                "row {number}: the likelihood is no number ({whose})"
            ));
            verdict.agrees = false;
        } else if difference > nll_tolerance {
            differ(format!(
                "row {number}: the likelihood differs by {difference:.2e} nats a token"
            ));
            verdict.agrees = false;
        }
        // transformers leaves the token that it stopped at in the text.
        let end = theirs.greedy.iter().position(|id| stop_ids.contains(id));
        if ours.greedy == theirs.greedy[..end.unwrap_or(theirs.greedy.len())] {
            verdict.greedy_equal += 1;
        } else if verdict.dtype == "float32" {
            differ(format!("row {number}: the greedy text differs"));
            verdict.agrees = false;
        }
    }
    Ok(verdict)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn ask(checkpoint: &Checkpoint, adapter: Option<&Path>, python: &Path) -> Result<Answer> {
    let config = checkpoint.config();
    let count = |weight: Weight| weight.shape(config).iter().product::<usize>();
    // The script hears of folders in JSON, which has texts only.
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Failure::Usage(format!(
            "--verify: {} is no UTF-8: name the folder otherwise",
            path.display()
        ))),
    };
    let request = json!({
        "model": text(checkpoint.folder())?,
        "adapter": adapter.map(text).transpose()?,
        "parameters": Weight::all(config).into_iter().map(count).sum::<usize>(),
        "rows": ROWS,
        "max_new_tokens": NEW_TOKENS,
    });
    let program = python.display();
    let mut child = Command::new(python)
        .args(["-W", "ignore", "-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            let cause =
                format!("--verify: {program} cannot be run ({error}); name a Python with --python");
            match error.kind() {
                ErrorKind::NotFound => Failure::Usage(cause),
                _ => Failure::World(cause),
            }
        })?;
    let mut stdin = child.stdin.take().context("the script's input")?;
    // A script that ended early says why on its standard error.
    let _ = stdin.write_all(request.to_string().as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    let last = output
        .stdout
        .trim_ascii()
        .rsplit(|&b| b == b'\n')
        .next()
        .unwrap_or_default();
    serde_json::from_slice(last).map_err(|_| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Failure::World(format!("--verify: {program} failed: {}", reason(&stderr))).into()
    })
}

/// Why a Python program ended: the line of its exception, else its last one that is no
/// progress bar's.
fn reason(stderr: &str) -> &str {
    let is_exception = |line: &&str| {
        let name = line.split(':').next().unwrap_or_default();
        (name.ends_with("Error") || name.ends_with("Exception")) && !name.contains(' ')
    };
    let lines = stderr.split(['\n', '\r']).map(str::trim);
    let lines: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !line.contains("%|"))
        .collect();
    let exception = lines.iter().rev().find(|line| is_exception(line));
    exception.or(lines.last()).unwrap_or(&"it said nothing")
}

/// What we make of a row.
struct Ours {
    prompt: Vec<u32>,
    row: Vec<u32>,
    labelled: Vec<bool>,
    /// Of the labelled tokens.
    nll: Vec<f64>,
    greedy: Vec<u32>,
}

fn compute(checkpoint: &Checkpoint, adapter: Option<&Path>, stop_ids: &[u32]) -> Result<Vec<Ours>> {
    let chat = Chat::load(checkpoint.folder())?;
    let model = Model::load(Cpu, checkpoint, Storage::AsStored)?;
    let adapter = adapter
        .map(|folder| model.load_adapter(&Adapter::load(folder, checkpoint.config())?))
        .transpose()?;
    let lora = adapter.as_ref().map(OwnedLora::lora);

    let how = Generation {
        sampling: Sampling::GREEDY,
        max_new_tokens: NEW_TOKENS,
        stop_ids,
        slots: 1,
    };
    let mut pass = Pass::new(Keep::Nothing);
    let mut rows = Vec::new();
    for (number, [prompt, reply]) in (0..).zip(ROWS) {
        let user = Message::user(prompt);
        let prompt = chat.encode_prompt(std::slice::from_ref(&user), &[])?;
        let encoded =
            chat.encode_training(&[user, Message::assistant(reply)], &[], LossOn::Reply)?;
        let row = Row {
            number,
            ids: &encoded.ids,
            labelled: &encoded.labelled,
        };
        let batch = Batch::new(&Cpu, &[row])?;
        let nll = model.losses(&mut pass, &batch, lora)?.wait()?;
        let asked = Prompt {
            number,
            ids: &prompt,
        };
        let made = generate(&model, lora, &[asked], &how, |_| ())?;
        let greedy = made
            .into_iter()
            .next()
            .context("one prompt, one reply")?
            .ids;
        rows.push(Ours {
            prompt,
            row: encoded.ids,
            labelled: encoded.labelled,
            nll: nll.into_iter().map(f64::from).collect(),
            greedy,
        });
    }
    Ok(rows)
}
