//! The figures of a run, line by line.

use anyhow::Result;
use jsonl::{Output, WriteError};
use serde::Serialize;

use crate::folder::Folder;

/// A line of metrics.jsonl for an update.
#[derive(Serialize)]
pub struct StepLine {
    pub step: u64,
    pub epoch: f64,
    /// Token mean of the negative log-likelihood over the step, in nats.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens: usize,
    pub supervised_tokens: usize,
}

/// A line of metrics.jsonl for an evaluation.
#[derive(Serialize)]
pub struct EvalLine {
    pub step: u64,
    pub eval_loss: f64,
    pub eval_perplexity: f64,
    pub eval_tokens: usize,
}

/// A line of timing.jsonl.
#[derive(Serialize)]
pub struct TimeLine {
    pub step: u64,
    pub seconds: f64,
    pub tokens_per_second: f64,
    pub peak_memory_mb: Option<usize>,
}

/// Where lines go: the folder, and standard output as long as someone reads it.
pub struct Lines {
    pub folder: Folder,
    pub stdout: Option<Output>,
}

impl Lines {
    /// Writes a line of figures to both.
    pub fn metric(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line)?;
        self.folder.metric(&text)?;
        if let Some(out) = &mut self.stdout {
            let written = out
                .line(|out| writeln!(out, "{text}"))
                .and_then(|()| out.flush());
            match written {
                // Training is worth more than its audience.
                Err(WriteError::ReaderGone) => self.stdout = None,
                other => other?,
            }
        }
        Ok(())
    }
}
