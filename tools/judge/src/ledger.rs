//! What was paid for: every answer, on disk before it is used.
//!
//! Answers are found again by the question's hash, so a run that was interrupted, or
//! repeated, pays only for what it has not asked yet. What they cost is summed over all
//! answers a run uses, old ones included: the limit is for the evaluation, not for the
//! attempt.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use cli::Failure;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use settings::Price;

use crate::anthropic::{self, Question};
use crate::verdict::{Opinion, Usage};

#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    max_tokens: u32,
    answer: Value,
}

/// The answers of `--state`, and what this run has spent of its limit.
pub struct Ledger {
    path: PathBuf,
    file: File,
    answers: HashMap<String, (u32, Value)>,
    /// Keys whose cost is counted.
    counted: HashSet<String>,
    price: Price,
    limit_usd: f64,
    spent_usd: f64,
    reserved_usd: f64,
    waiting: usize,
    /// Answers asked for in this run.
    pub asked: u64,
    /// Of the answers used: how many hold a verdict, what keeps the others from one, and
    /// how many do not say what they cost.
    verdicts: u64,
    silent: BTreeMap<String, u64>,
    pub estimated: u64,
}

impl Ledger {
    /// Opens or makes `folder/answers.jsonl`.
    ///
    /// # Errors
    /// A folder that cannot be used (exit 4), or a line that is none of ours (exit 3).
    pub fn open(folder: &Path, price: Price, limit_usd: f64) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("--state {}", folder.display()))?;
        let path = folder.join("answers.jsonl");
        let open = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path);
        let mut file = open.with_context(|| format!("opening {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let what = path.display();
                return Err(Failure::World(format!(
                    "{what}: another judge is at work here; let it finish"
                ))
                .into());
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("locking {}", path.display()));
            }
        }
        let mut text = String::new();
        file.read_to_string(&mut text)
            .with_context(|| format!("reading {}", path.display()))?;
        // A line without its end is one that a crash cut off.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut answers = HashMap::new();
        for (i, line) in text[..whole].lines().enumerate() {
            let entry: Entry = serde_json::from_str(line).map_err(|e| {
                Failure::Input(format!("{}:{}: no kept answer: {e}", path.display(), i + 1))
            })?;
            answers.insert(entry.key, (entry.max_tokens, entry.answer));
        }
        file.set_len(whole as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))?;
        Ok(Self {
            path,
            file,
            answers,
            counted: HashSet::new(),
            price,
            limit_usd,
            spent_usd: 0.0,
            reserved_usd: 0.0,
            waiting: 0,
            asked: 0,
            verdicts: 0,
            silent: BTreeMap::new(),
            estimated: 0,
        })
    }

    /// The answer to a question asked before, unless it was cut off and may now be longer.
    pub fn find(&mut self, question: &Question, max_tokens: u32) -> Option<Opinion> {
        let key = question.key();
        let (had, answer) = self.answers.get(&key)?;
        if anthropic::was_cut(answer) && *had < max_tokens {
            return None;
        }
        let opinion = anthropic::opinion(answer, question.most(*had));
        self.count(key, &opinion);
        Some(opinion)
    }

    /// Whether answers are under way.
    pub fn is_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// Sets money aside for an answer of so many tokens at most; how much is returned, or
    /// nothing where the limit would be passed.
    pub fn reserve(&mut self, most: Usage) -> Option<f64> {
        let most = self.cost(most);
        if self.spent_usd + self.reserved_usd + most > self.limit_usd {
            return None;
        }
        self.reserved_usd += most;
        self.waiting += 1;
        Some(most)
    }

    /// Gives back what [`Ledger::reserve`] set aside.
    pub fn release(&mut self, reserved: f64) {
        self.reserved_usd -= reserved;
        self.waiting -= 1;
    }

    /// Keeps an answer, on the disk first, and says what is in it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(
        &mut self,
        question: &Question,
        max_tokens: u32,
        answer: Value,
    ) -> anyhow::Result<Opinion> {
        let opinion = anthropic::opinion(&answer, question.most(max_tokens));
        let entry = Entry {
            key: question.key(),
            max_tokens,
            answer,
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("writing {}", self.path.display()))?;
        self.asked += 1;
        self.answers
            .insert(entry.key.clone(), (max_tokens, entry.answer));
        self.count(entry.key, &opinion);
        Ok(opinion)
    }

    /// Whether of at least so many answers none holds a verdict.
    pub fn is_silent(&self, least: u64) -> bool {
        self.verdicts == 0 && self.without_verdict() >= least
    }

    /// Answers used so far.
    pub fn used(&self) -> u64 {
        self.verdicts + self.without_verdict()
    }

    /// Answers used so far that hold no verdict.
    pub fn without_verdict(&self) -> u64 {
        self.silent.values().sum()
    }

    /// What most often kept answers from a verdict, and what may help.
    pub fn why_silent(&self) -> String {
        let commonest = self.silent.iter().max_by_key(|(_, times)| **times);
        let (reason, times) = commonest.map_or(("", 0), |(reason, times)| (reason, *times));
        let remedy = match reason {
            "max_tokens" => "raise judge.max_tokens",
            _ => "ask another model (--model NAME), or the same again with another --state DIR",
        };
        let path = self.path.display();
        format!("most often {reason} ({times}): see {path}; {remedy}")
    }

    /// What the answers used so far cost, in US dollars.
    pub fn spent_usd(&self) -> f64 {
        self.spent_usd
    }

    /// What these tokens cost, in US dollars. Writing to a cache costs a quarter more than
    /// reading anew, reading from it a tenth (five-minute cache).
    pub fn cost(&self, usage: Usage) -> f64 {
        let input = usage.input_tokens as f64
            + 1.25 * usage.cache_creation_input_tokens as f64
            + 0.1 * usage.cache_read_input_tokens as f64;
        (input * self.price.input + usage.output_tokens as f64 * self.price.output) / 1e6
    }

    fn count(&mut self, key: String, opinion: &Opinion) {
        if !self.counted.insert(key) {
            return;
        }
        self.spent_usd += self.cost(opinion.usage);
        self.estimated += u64::from(opinion.usage_estimated);
        match &opinion.no_verdict {
            None => self.verdicts += 1,
            Some(reason) => {
                // Which column an answer is unreadable at makes no reason of its own.
                let kind = reason.split(':').next().unwrap_or_default();
                let kind = kind.chars().take(40).collect();
                *self.silent.entry(kind).or_default() += 1;
            }
        }
    }
}
