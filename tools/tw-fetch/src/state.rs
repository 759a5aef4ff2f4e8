//! What a collection has done so far, on disk: a journal of events and, for each
//! run, the items as they came.
//!
//! The journal is only ever appended to, and says what is about to happen before it
//! happens. So whatever interrupts a collection, the next one knows which runs were
//! paid for, and how far their items have been fetched. Items are on the disk before
//! the journal says so.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use cli::Failure;
use jsonl::{Journal, journal_lines};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::apify::Limits;

/// The journal's name in the folder.
const JOURNAL: &str = "journal.jsonl";

/// One thing that happened. `step` counts runs from 0.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What is being collected; the first event. Another one may follow as long as there is no run.
    Plan { plan: Plan },
    /// A run is about to be asked for.
    Starting {
        step: usize,
        input: Value,
        limits: Limits,
    },
    /// It was refused: there is no run.
    Refused { step: usize },
    /// There is a run. A second one of the same step is the user's word against the first.
    Started {
        step: usize,
        run: String,
        dataset: Option<String>,
        at: Option<String>,
    },
    /// We were interrupted and asked the run to stop.
    Interrupted { step: usize },
    /// The items before `next_offset` are in the step's file, which has `bytes` bytes.
    Page {
        step: usize,
        next_offset: u64,
        bytes: u64,
    },
    /// The run is over and all its items are here.
    Finished {
        step: usize,
        status: String,
        items: u64,
        usd: f64,
    },
    /// The run is over and left nothing, or was given up: the step may be tried again.
    Failed {
        step: usize,
        status: String,
        usd: f64,
    },
}

/// What decides which tweets a collection is made of. Another plan is another collection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub actor: String,
    pub search_queries: Vec<String>,
    pub search_items: u64,
    pub sort: String,
}

/// One run: a search, or the replies of some conversations.
#[derive(Clone, Debug, Default)]
pub struct Step {
    pub input: Value,
    pub limits: Option<Limits>,
    pub run: Option<String>,
    pub dataset: Option<String>,
    pub started_at: Option<String>,
    pub interrupted: bool,
    pub next_offset: u64,
    pub bytes: u64,
    pub finished: bool,
    /// It ended well, so that it brought what there is.
    pub succeeded: bool,
    pub usd: f64,
}

impl Step {
    /// The conversations whose replies it asks for; none where it is the search.
    pub fn conversations(&self) -> impl Iterator<Item = &str> {
        let ids = self.input.get("conversationIds").and_then(Value::as_array);
        ids.into_iter().flatten().filter_map(Value::as_str)
    }
}

/// The folder and what its journal says.
pub struct State {
    folder: PathBuf,
    /// Kept locked: two collections in one folder would pay twice.
    journal: Option<Journal>,
    pub plan: Option<Plan>,
    pub steps: Vec<Step>,
    /// What failed runs cost.
    pub lost_usd: f64,
}

impl State {
    /// Reads what is there; makes nothing.
    ///
    /// # Errors
    /// A journal that is locked (exit 4) or not one of ours (exit 3).
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let mut state = Self {
            folder: folder.to_owned(),
            journal: None,
            plan: None,
            steps: Vec::new(),
            lost_usd: 0.0,
        };
        let path = folder.join(JOURNAL);
        if !path.exists() {
            return Ok(state);
        }
        let (journal, bytes) = Journal::open(&path, "tw-fetch")?;
        for (i, line) in journal_lines(&bytes) {
            let event = serde_json::from_slice(line).map_err(|e| {
                let shown = path.display();
                Failure::Input(format!("{shown}:{i}: no event of a collection: {e}"))
            })?;
            state.apply(event);
        }
        state.journal = Some(journal);
        Ok(state)
    }

    /// Puts `event` on the disk, then takes it as fact.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record(&mut self, event: Event) -> anyhow::Result<()> {
        let journal = match &mut self.journal {
            Some(journal) => journal,
            none => none.insert(Journal::open(&self.folder.join(JOURNAL), "tw-fetch")?.0),
        };
        journal.append(&event)?;
        self.apply(event);
        Ok(())
    }

    /// Appends `lines` to the items of `step`, after what the journal vouches for.
    /// The file's new length.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&self, step: usize, lines: &str) -> anyhow::Result<u64> {
        let path = self.items_path(step);
        let write = || -> std::io::Result<u64> {
            let mut file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)?;
            file.set_len(self.steps[step].bytes)?;
            file.seek(SeekFrom::End(0))?;
            file.write_all(lines.as_bytes())?;
            if !lines.is_empty() && !lines.ends_with('\n') {
                file.write_all(b"\n")?;
            }
            file.sync_data()?;
            file.stream_position()
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// The file with the items of `step`.
    pub fn items_path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("items-{step:04}.jsonl"))
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether no run was made, as far as is known, or cost anything.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.lost_usd == 0.0
    }

    /// The run that is not over, where nothing of it is on disk yet.
    pub fn begun(&self) -> Option<usize> {
        let at = self.steps.len().checked_sub(1)?;
        let step = &self.steps[at];
        (!step.finished && step.next_offset == 0).then_some(at)
    }

    /// What all runs have cost so far, in US dollars.
    pub fn spent_usd(&self) -> f64 {
        self.lost_usd + self.steps.iter().map(|step| step.usd).sum::<f64>()
    }

    fn apply(&mut self, event: Event) {
        let step = match event {
            Event::Plan { .. } => 0,
            Event::Starting { step, .. }
            | Event::Refused { step }
            | Event::Started { step, .. }
            | Event::Interrupted { step }
            | Event::Page { step, .. }
            | Event::Finished { step, .. }
            | Event::Failed { step, .. } => step,
        };
        match event {
            Event::Plan { plan } => {
                self.plan = Some(plan);
                return;
            }
            Event::Starting { input, limits, .. } => {
                self.steps.truncate(step);
                self.steps.push(Step {
                    input,
                    limits: Some(limits),
                    ..Step::default()
                });
                return;
            }
            Event::Refused { .. } => {
                self.steps.truncate(step);
                return;
            }
            Event::Failed { usd, .. } => {
                self.lost_usd += usd;
                self.steps.truncate(step);
                return;
            }
            _ => {}
        }
        let Some(at) = self.steps.get_mut(step) else {
            return;
        };
        match event {
            Event::Started {
                run,
                dataset,
                at: started_at,
                ..
            } => {
                at.run = Some(run);
                at.dataset = dataset;
                at.started_at = started_at;
                at.interrupted = false;
            }
            Event::Interrupted { .. } => at.interrupted = true,
            Event::Page {
                next_offset, bytes, ..
            } => {
                at.next_offset = next_offset;
                at.bytes = bytes;
            }
            Event::Finished { usd, status, .. } => {
                at.finished = true;
                at.succeeded = status == "SUCCEEDED";
                at.usd = usd;
            }
            _ => {}
        }
    }
}
