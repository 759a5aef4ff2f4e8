//! The figures of a run, line by line.

use std::io::IsTerminal;

use anyhow::Result;
use jsonl::{Output, WriteError};
use rustix::io::Errno;
use serde::Serialize;

use crate::folder::Folder;

/// A line of metrics.jsonl for an update.
#[derive(Serialize)]
pub struct StepLine {
    /// Updates done, this one included.
    pub step: u64,
    /// Passes over the training rows, begun ones in part.
    pub epoch: f64,
    /// Token mean of the negative log-likelihood over the step, in nats.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Of this update, before `lora.lr_ratio`.
    pub learning_rate: f64,
    /// Of the step's rows, without padding.
    pub tokens: usize,
    /// Of these, those that were to be predicted.
    pub supervised_tokens: usize,
}

/// A line of metrics.jsonl for an evaluation.
#[derive(Serialize)]
pub struct EvalLine {
    /// Updates done before it.
    pub step: u64,
    /// Token mean of the negative log-likelihood over the held-out rows, in nats.
    pub eval_loss: f64,
    /// Its exponential.
    pub eval_perplexity: f64,
    /// Predicted tokens of the held-out rows.
    pub eval_tokens: usize,
}

/// A line of timing.jsonl.
#[derive(Serialize)]
pub struct TimeLine {
    /// Updates done, this one included.
    pub step: u64,
    /// Wall time of the update.
    pub seconds: f64,
    /// Of the step's tokens, padding not counted; null where a host that was held up cannot
    /// tell a device's steps apart.
    pub tokens_per_second: Option<f64>,
    /// Most memory taken so far, of the GPU or of the processor's, in 10⁶ bytes, where it tells.
    pub peak_memory_mb: Option<usize>,
}

/// Where lines go: the folder, and standard output as long as someone reads it.
pub struct Lines {
    pub folder: Folder,
    pub stdout: Option<Output>,
    /// Lines that went to it.
    pub written: u64,
    /// Why they no longer do, where someone still reads.
    pub lost: Option<WriteError>,
    /// Whether that is a terminal.
    terminal: bool,
}

impl Lines {
    /// To the folder, and to standard output from its beginning.
    pub fn new(folder: Folder) -> Self {
        Self {
            folder,
            stdout: Some(Output::stdout()),
            written: 0,
            lost: None,
            terminal: std::io::stdout().is_terminal(),
        }
    }

    /// Writes a line of figures to both. Training is worth more than its audience: where
    /// standard output takes no more, only the folder gets them from then on.
    pub fn metric(&mut self, line: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(line)?;
        self.folder.metric(&text)?;
        if let Some(out) = &mut self.stdout {
            let written = out
                .line(|out| writeln!(out, "{text}"))
                .and_then(|()| out.flush());
            match written {
                Ok(()) => self.written += 1,
                Err(error) => {
                    self.stdout = None;
                    self.lost = Some(error).filter(|error| !self.is_reader_gone(error));
                }
            }
        }
        Ok(())
    }

    /// Whether nobody is there to read; a terminal that was closed says so by EIO, and
    /// its SIGHUP is to find a run that can still save.
    fn is_reader_gone(&self, error: &WriteError) -> bool {
        match error {
            WriteError::ReaderGone => true,
            WriteError::Io { source, .. } => {
                self.terminal && source.raw_os_error() == Some(Errno::IO.raw_os_error())
            }
        }
    }
}
