//! What was read and how much of it was sent, in a journal: what a service did not take is
//! kept, and no point is sent twice.
//!
//! A point is a figure at a step. A run that goes on repeats the steps after its last
//! checkpoint; the points that are here already stay as they were sent.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result};
use cli::Failure;
use jsonl::{Journal, journal_lines};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::figures::{Line, now};

/// What to do about a state of another run.
pub const ANOTHER: &str = "another run needs another --state, or tensorboard=DIR";

/// The journal's format.
const FORMAT: u64 = 1;

/// Entries of one sending at most.
const MOST: usize = 1000;

/// Whose journal it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Format of the journal.
    pub v: u64,
    /// The run's name for the service, and for who looks for it there.
    pub id: String,
    /// Where the figures go, without secrets.
    pub to: String,
    /// The name that people see.
    pub name: Option<String>,
    /// When the first line was read, in milliseconds since 1970.
    pub began: u64,
}

/// What is sent, in its order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// Settings of the run that were not known before.
    Settings(Map<String, Value>),
    /// Figures that were not known before.
    Line(Line),
}

/// How the run stands at the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is being sent.
    Running,
    /// Its lines came to their end.
    Finished,
    /// A signal ended it.
    Interrupted,
}

/// A line of the journal.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Note {
    Track(Head),
    Entries(Vec<Entry>),
    /// What the service calls the run; null while it is being asked for.
    Run(Value),
    /// Entries up to here are being sent as one: they are sent so again if no `Sent` follows.
    Sending(usize),
    /// They were taken; so many rows of the service's table are used, and so many points of
    /// all that were taken are not shown.
    Sent(usize, u64, #[serde(default)] usize),
    Standing(Standing),
}

/// What came of a sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Rows of the service's table that are used.
    pub rows: u64,
    /// Points that it does not show.
    pub hidden: usize,
}

/// The journal and what it says.
#[derive(Debug)]
pub struct Spool {
    journal: Journal,
    head: Option<Head>,
    entries: Vec<Entry>,
    settings: Map<String, Value>,
    /// The last of each figure, in a line that has the last line's step and time.
    latest: Option<Line>,
    /// By name and step.
    points: HashMap<String, HashMap<u64, f64>>,
    run: Option<Value>,
    sending: usize,
    sent: usize,
    taken: Taken,
    /// The highest step that was sent.
    last_step: Option<u64>,
    standing: Option<Standing>,
    /// Points that were here already with another value.
    pub differing: usize,
}

impl Spool {
    /// Opens the journal in `folder`, which is made.
    ///
    /// # Errors
    /// If it is another destination's or run's, or cannot be read.
    pub fn open(folder: &Path, to: &str, name: Option<&str>) -> Result<Self> {
        let path = folder.join("track.jsonl");
        let (journal, bytes) = Journal::open(&path, "track")?;
        let mut spool = Self {
            journal,
            head: None,
            entries: Vec::new(),
            settings: Map::new(),
            latest: None,
            points: HashMap::new(),
            run: None,
            sending: 0,
            sent: 0,
            taken: Taken::default(),
            last_step: None,
            standing: None,
            differing: 0,
        };
        let shown = path.display();
        check_format(&bytes).map_err(|format| {
            let cause = format!("{shown}:1: is of a newer track (format {format}): use that one");
            Failure::Input(cause)
        })?;
        for (number, line) in journal_lines(&bytes) {
            let note = serde_json::from_slice(line).map_err(|error| {
                let cause = format!("{shown}:{number}: {error}: this is no state of track");
                Failure::Usage(cause)
            })?;
            spool.read(note);
        }
        let known = spool.entries.len();
        if spool.sent > known || spool.sending > known {
            let cause = format!("{shown}: more is sent than was read: this is no state of track");
            return Err(Failure::Usage(cause).into());
        }
        let Some(head) = &spool.head else {
            return Ok(spool);
        };
        if head.to != to {
            let cause = format!(
                "{shown}: is of figures that go to {}, and not to {to}: name another folder with --state",
                head.to
            );
            return Err(Failure::Usage(cause).into());
        }
        if name.is_some() && head.name.as_deref() != name {
            let was = head.name.as_deref().unwrap_or("none");
            let cause = format!("{shown}: the run's name is {was}: {ANOTHER}");
            return Err(Failure::Usage(cause).into());
        }
        Ok(spool)
    }

    fn read(&mut self, note: Note) {
        match note {
            Note::Track(head) => self.head = Some(head),
            Note::Entries(entries) => entries.into_iter().for_each(|entry| self.take(entry)),
            Note::Run(run) => self.run = Some(run),
            Note::Sending(to) => self.sending = to,
            Note::Sent(to, rows, hidden) => {
                let sent = self.entries.get(self.sent..to).unwrap_or_default();
                let steps = sent.iter().filter_map(|entry| match entry {
                    Entry::Line(line) => Some(line.step),
                    Entry::Settings(_) => None,
                });
                self.last_step = steps.chain(self.last_step).max();
                self.taken = Taken { rows, hidden };
                self.sent = to;
            }
            Note::Standing(standing) => self.standing = Some(standing),
        }
    }

    fn take(&mut self, entry: Entry) {
        match &entry {
            Entry::Settings(settings) => self.settings.extend(settings.clone()),
            Entry::Line(line) => {
                for (name, value) in &line.figures {
                    let steps = self.points.entry(name.clone()).or_default();
                    steps.insert(line.step, value.as_f64().unwrap_or(f64::NAN));
                }
                match &mut self.latest {
                    None => self.latest = Some(line.clone()),
                    Some(latest) => {
                        (latest.step, latest.at) = (line.step, line.at);
                        latest.figures.extend(line.figures.clone());
                    }
                }
            }
        }
        self.entries.push(entry);
    }

    fn note(&mut self, note: Note) -> Result<()> {
        self.journal.append(&note)?;
        self.read(note);
        Ok(())
    }

    /// Begins the journal, where it has not begun.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn begin(&mut self, to: &str, name: Option<&str>, began: u64) -> Result<()> {
        if self.head.is_some() {
            return Ok(());
        }
        self.note(Note::Track(Head {
            v: FORMAT,
            id: id(),
            to: to.to_owned(),
            name: name.map(str::to_owned),
            began,
        }))
    }

    /// Keeps what is new of some lines.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, lines: impl IntoIterator<Item = Line>) -> Result<()> {
        let mut new: Vec<Entry> = Vec::new();
        // Of two lines that come together the second may repeat the first.
        let mut coming: HashMap<(String, u64), f64> = HashMap::new();
        for mut line in lines {
            let step = line.step;
            line.figures.retain(|name, value| {
                let value = value.as_f64().unwrap_or(f64::NAN);
                let here = self.points.get(name).and_then(|steps| steps.get(&step));
                let here = here.or_else(|| coming.get(&(name.clone(), step)));
                if let Some(here) = here {
                    self.differing += usize::from(*here != value);
                    return false;
                }
                coming.insert((name.clone(), step), value);
                true
            });
            if !line.figures.is_empty() {
                new.push(Entry::Line(line));
            }
        }
        match new.is_empty() {
            true => Ok(()),
            false => self.note(Note::Entries(new)),
        }
    }

    /// Keeps what is new of the settings.
    ///
    /// # Errors
    /// If one has changed, which is another run, or they cannot be written.
    pub fn add_settings(&mut self, mut settings: Map<String, Value>) -> Result<()> {
        for (key, value) in &settings {
            if let Some(was) = self.settings.get(key).filter(|was| !is_same(was, value)) {
                let path = self.journal.path().display();
                let cause = format!("--settings: {key} is {value}, and {was} in {path}: {ANOTHER}");
                return Err(Failure::Usage(cause).into());
            }
        }
        settings.retain(|key, _| !self.settings.contains_key(key));
        match settings.is_empty() {
            true => Ok(()),
            false => self.note(Note::Entries(vec![Entry::Settings(settings)])),
        }
    }

    /// Whose journal it is, once it has begun.
    ///
    /// # Errors
    /// If it has not.
    pub fn head(&self) -> Result<&Head> {
        self.head.as_ref().context("the state has not begun")
    }

    /// All that was read.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// All settings that are known.
    pub fn settings(&self) -> &Map<String, Value> {
        &self.settings
    }

    /// The last of each figure.
    pub fn latest(&self) -> Option<&Line> {
        self.latest.as_ref()
    }

    /// What the service calls the run: `None` where it was never asked for, null where it
    /// was and no answer came.
    pub fn run(&self) -> Option<&Value> {
        self.run.as_ref()
    }

    /// Notes what the service calls the run.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_run(&mut self, run: Value) -> Result<()> {
        self.note(Note::Run(run))
    }

    /// How the run stands at the service, where that is known.
    pub fn standing(&self) -> Option<Standing> {
        self.standing
    }

    /// Notes how the run stands.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_standing(&mut self, standing: Standing) -> Result<()> {
        match self.standing == Some(standing) {
            true => Ok(()),
            false => self.note(Note::Standing(standing)),
        }
    }

    /// What came of all sendings.
    pub fn taken(&self) -> Taken {
        self.taken
    }

    /// The highest step that was sent.
    pub fn last_step(&self) -> Option<u64> {
        self.last_step
    }

    /// All points, those that the service does not show left out.
    pub fn shown(&self) -> usize {
        self.points().saturating_sub(self.taken.hidden)
    }

    /// All points.
    pub fn points(&self) -> usize {
        self.points.values().map(HashMap::len).sum()
    }

    /// Entries that are sent.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// Points that are not sent.
    pub fn unsent(&self) -> usize {
        let figures = |entry: &Entry| match entry {
            Entry::Line(line) => line.figures.len(),
            Entry::Settings(_) => 0,
        };
        self.entries[self.sent..].iter().map(figures).sum()
    }

    /// Whether anything is not sent.
    pub fn has_more(&self) -> bool {
        self.sent < self.entries.len()
    }

    /// The next entries to send as one. Where the last step may be `open`, so that more of its
    /// figures may come, its lines wait.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn next(&mut self, open: bool) -> Result<Option<Range<usize>>> {
        // What a run was killed at goes as it went: it may have arrived.
        if self.sending > self.sent {
            return Ok(Some(self.sent..self.sending));
        }
        let step = |at: usize| match self.entries.get(at) {
            Some(Entry::Line(line)) => Some(line.step),
            _ => None,
        };
        // Whether a cut before `at` would part the figures of a step.
        let parts = |at: usize| match step(at - 1) {
            Some(_) if at == self.entries.len() => open,
            Some(before) => step(at) == Some(before),
            None => false,
        };
        let most = self.entries.len().min(self.sent + MOST);
        let whole = (self.sent + 1..=most).rev().find(|&at| !parts(at));
        let Some(end) = whole.or((most == self.sent + MOST).then_some(most)) else {
            return Ok(None);
        };
        self.note(Note::Sending(end))?;
        Ok(Some(self.sent..end))
    }

    /// All entries are where they belong, which is seen from there and need not be noted.
    pub fn all_sent(&mut self) {
        self.sent = self.entries.len();
    }

    /// Notes that the entries up to `end` were taken, and what came of it.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn set_sent(&mut self, end: usize, taken: Taken) -> Result<()> {
        let hidden = self.taken.hidden + taken.hidden;
        self.note(Note::Sent(end, taken.rows, hidden))
    }
}

/// Looks at the format before anything that a newer one may have changed.
///
/// # Errors
/// The format, if it is newer than ours.
fn check_format(bytes: &[u8]) -> Result<(), u64> {
    let first = journal_lines(bytes).next();
    let first = first.and_then(|(_, line)| serde_json::from_slice::<Value>(line).ok());
    let format = first.and_then(|first| first.pointer("/track/v")?.as_u64());
    format.filter(|&v| v > FORMAT).map_or(Ok(()), Err)
}

/// Whether two values are one; 32 in a YAML is 32.0 in a run.json.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Whoever panicked left what is on the disk.
pub fn lock(spool: &Mutex<Spool>) -> MutexGuard<'_, Spool> {
    spool.lock().unwrap_or_else(|e| e.into_inner())
}

/// A name that no other run has, of the letters that W&B's own have. Two processes draw
/// different ones, which is all that is asked of it.
fn id() -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut bits = RandomState::new().hash_one(now());
    let mut letter = || {
        let at = bits % LETTERS.len() as u64;
        bits /= LETTERS.len() as u64;
        char::from(LETTERS[at as usize])
    };
    (0..10).map(|_| letter()).collect()
}
