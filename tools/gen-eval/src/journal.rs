//! Answers that are finished, on the disk, so that an interruption loses little.
//!
//! What is kept is a system's answers to a whole block of items, never one answer
//! alone: on some devices the last bits of a product depend on the replies generated
//! beside it, and a run that goes on must give the bytes of one that was never
//! interrupted.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use cli::Failure;
use qwen3::{Completion, Finish};
use serde::{Deserialize, Serialize};

use crate::systems::Answer;

/// All that answers depend on, by name: settings, model, adapters, items, device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity(pub Vec<(String, String)>);

impl Identity {
    fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// What is other than it was: `generation.seed (was 42, is 7)`.
    fn changes(&self, was: &Self) -> String {
        let keys = self.0.iter().chain(&was.0).map(|(key, _)| key);
        let mut seen = Vec::new();
        let mut told = Vec::new();
        for key in keys {
            if seen.contains(&key) {
                continue;
            }
            seen.push(key);
            let (was, is) = (was.get(key), self.get(key));
            if was != is {
                let [was, is] = [was, is].map(|value| value.unwrap_or("not there"));
                told.push(format!("{key} (was {was:.24}, is {is:.24})"));
            }
        }
        told.join(", ")
    }
}

/// The first line of the file.
#[derive(Serialize, Deserialize)]
struct Header {
    v: u64,
    of: Identity,
}

/// Each other line.
#[derive(Serialize, Deserialize)]
struct Block {
    /// The number of its first item.
    first: u32,
    system: String,
    answers: Vec<Kept>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    nll: f64,
    ids: Vec<u32>,
    /// Whether a stop token ended it.
    stopped: bool,
}

/// `answers.jsonl` in the folder of --state.
pub struct Journal {
    file: jsonl::Journal,
    blocks: HashMap<(u32, String), Vec<Answer>>,
}

impl Journal {
    /// Opens or begins the journal of a run.
    ///
    /// # Errors
    /// Where the answers that are there depend on something else (exit 2), a line is none
    /// of ours (3), or the folder cannot be used (4).
    pub fn open(folder: &Path, of: &Identity) -> Result<Self> {
        let path = folder.join("answers.jsonl");
        let (file, bytes) = jsonl::Journal::open(&path, "gen-eval")?;
        let shown = path.display();
        let mut lines = jsonl::journal_lines(&bytes);
        let bad = |line: u64, error: serde_json::Error| {
            Failure::Input(format!(
                "{shown}:{line}: no kept answers: {error}; delete {shown} to begin anew, or that line and those \
                 after it"
            ))
        };
        let mut blocks = HashMap::new();
        let header = match lines.next() {
            Some((line, header)) => {
                let header: Header = serde_json::from_slice(header).map_err(|e| bad(line, e))?;
                if header.of != *of {
                    let changes = of.changes(&header.of);
                    return Err(Failure::Usage(format!(
                        "the answers in {shown} are of another run: {changes}; delete {} to begin \
                         anew, or name another folder",
                        folder.display()
                    ))
                    .into());
                }
                for (line, text) in lines {
                    let block: Block = serde_json::from_slice(text).map_err(|e| bad(line, e))?;
                    let answers = block.answers.into_iter().map(Answer::from).collect();
                    blocks.insert((block.first, block.system), answers);
                }
                None
            }
            None => Some(Header {
                v: record::VERSION,
                of: of.clone(),
            }),
        };
        let mut journal = Self { file, blocks };
        if let Some(header) = header {
            journal.file.append(&header)?;
        }
        Ok(journal)
    }

    /// Replies that are here.
    pub fn replies(&self) -> usize {
        self.blocks.values().map(Vec::len).sum()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// A system's answers to the block that begins with item `first`.
    pub fn take(&mut self, first: u32, system: &str) -> Option<Vec<Answer>> {
        self.blocks.remove(&(first, system.to_owned()))
    }

    /// Keeps a system's answers to the block that begins with item `first`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn keep(&mut self, first: u32, system: &str, answers: &[Answer]) -> Result<()> {
        Ok(self.file.append(&Block {
            first,
            system: system.to_owned(),
            answers: answers.iter().map(Kept::from).collect(),
        })?)
    }
}

impl From<&Answer> for Kept {
    fn from(answer: &Answer) -> Self {
        Self {
            nll: answer.nll,
            ids: answer.completion.ids.clone(),
            stopped: answer.completion.finish == Finish::Stop,
        }
    }
}

impl From<Kept> for Answer {
    fn from(kept: Kept) -> Self {
        Self {
            nll: kept.nll,
            completion: Completion {
                ids: kept.ids,
                finish: if kept.stopped {
                    Finish::Stop
                } else {
                    Finish::Length
                },
            },
        }
    }
}
