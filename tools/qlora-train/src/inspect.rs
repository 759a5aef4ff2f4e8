//! `qlora-train inspect`: what a folder is, and what would go wrong with it.
//!
//! An adapter is judged by what peft does with it, which reads an odd one and
//! goes on: a missing alpha becomes 8, a misnamed tensor a random start. A model
//! is judged by whether this tool would train on it.

mod adapter;
mod model;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use cli::{App, Failure};
use jsonl::Output;
use serde::Serialize;

use crate::commands::Messages;
use crate::verify;

/// Say what an adapter or model folder is, and what is wrong with it
///
/// For an adapter: rank, scale, targets, base, and whether peft would load it
/// rightly. For a model: shape, storage, parameters, stop tokens, template, and
/// whether it can be trained on. Every value is read: all must be numbers. With
/// --verify the weights are run here and in transformers, and token ids,
/// likelihoods and greedy texts are compared.
#[derive(Args)]
#[command(after_long_help = crate::commands::after_help(EXAMPLES, Some("--strict, and something is wrong with what was inspected")))]
pub struct Inspect {
    /// Folder of an adapter or a model
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Folder of an adapter's base model [default: the one named in the adapter]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// One JSON object instead of lines for people
    #[arg(long)]
    json: bool,
    /// Exit with 1 if there is a problem
    #[arg(long)]
    strict: bool,
    /// Run the weights and compare with transformers (and peft)
    #[arg(long)]
    verify: bool,
    /// Python that has transformers, for --verify
    #[arg(
        long,
        value_name = "PROGRAM",
        default_value = "python3",
        requires = "verify"
    )]
    python: PathBuf,
    #[command(flatten)]
    pub messages: Messages,
}

const EXAMPLES: &str = "
$ qlora-train inspect adapter --model model
$ qlora-train inspect model --json --strict
";

/// Something that is wrong with a folder.
#[derive(Debug, PartialEq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// What is wrong in it.
    pub cause: String,
    /// What comes of it.
    pub effect: String,
}

/// What was found out about a folder.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Findings {
    Adapter(adapter::Adapter),
    Model(model::Model),
}

#[derive(Serialize)]
struct Report {
    v: u64,
    folder: String,
    #[serde(flatten)]
    findings: Findings,
    problems: Vec<Problem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<verify::Verdict>,
}

impl Inspect {
    pub fn run(&self, app: &App) -> Result<()> {
        if let Some(model) = self
            .model
            .as_ref()
            .filter(|m| !m.join("config.json").exists())
        {
            let cause = "no config.json there: name the folder of a model";
            return Err(Failure::Usage(format!("--model {}: {cause}", model.display())).into());
        }
        let has = |name: &str| self.folder.join(name).exists();
        let adapter = [
            "adapter_config.json",
            "adapter_model.safetensors",
            "adapter_model.bin",
        ];
        let mut problems = Vec::new();
        let (findings, base, with) = if adapter.into_iter().any(has) {
            let (found, base) =
                adapter::inspect(app, &self.folder, self.model.as_deref(), &mut problems)?;
            (Findings::Adapter(found), base, Some(self.folder.as_path()))
        } else if has("config.json") {
            let found = model::inspect(app, &self.folder, &mut problems);
            (Findings::Model(found), Some(self.folder.clone()), None)
        } else {
            let cause = format!(
                "{} holds neither adapter_config.json nor config.json: no adapter and no model",
                self.folder.display()
            );
            return Err(Failure::Usage(cause).into());
        };
        let verified = if self.verify {
            let Some(base) = &base else {
                let cause = "--verify needs the adapter's base: name it with --model";
                return Err(Failure::Usage(cause.into()).into());
            };
            Some(verify::run(app, base, with, &self.python, &mut problems)?)
        } else {
            None
        };
        let report = Report {
            v: 1,
            folder: self.folder.display().to_string(),
            findings,
            problems,
            verified,
        };
        let mut out = Output::stdout();
        if self.json {
            out.json(&report)?;
        } else {
            let text = report.text();
            out.line(|out| out.write_all(text.as_bytes()))?;
        }
        out.finish()?;
        match report.problems.len() {
            0 => Ok(()),
            count if self.strict => {
                let noun = if count == 1 { "problem" } else { "problems" };
                let cause = format!("{}: {count} {noun}", self.folder.display());
                Err(Failure::Gate(cause).into())
            }
            _ => Ok(()),
        }
    }
}

impl Report {
    fn text(&self) -> String {
        let (kind, rows, fine) = match &self.findings {
            Findings::Adapter(adapter) => (
                "an adapter",
                adapter.rows(),
                "peft loads it as it was trained",
            ),
            Findings::Model(model) => ("a model", model.rows(), "it can be trained on"),
        };
        let mut text = format!("{} is {kind}\n", self.folder);
        for (name, value) in rows {
            text.push_str(&format!("  {name:<14} {value}\n"));
        }
        if let Some(verified) = &self.verified {
            text.push_str(&format!("  {:<14} {}\n", "verified", verified.describe()));
        }
        for Problem {
            file,
            cause,
            effect,
        } in &self.problems
        {
            text.push_str(&format!("problem: {file}: {cause}: {effect}\n"));
        }
        if self.problems.is_empty() {
            text.push_str(&format!("no problems: {fine}\n"));
        }
        text
    }
}

/// An error and what caused it, in a line.
fn with_sources(error: &qwen3::Error) -> String {
    let causes: Vec<String> = anyhow::Chain::new(error).map(ToString::to_string).collect();
    causes.join(": ")
}
