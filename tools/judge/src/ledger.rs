//! What was paid for: every answer, on disk before it is used.
//!
//! Answers are found again by the question's hash, so a run that was interrupted, or
//! repeated, pays only for what it has not asked yet. What they cost is summed over all
//! questions of a run, each once, old answers included: the limit is for the evaluation,
//! not for the attempt. So are attempts that may be billed though no whole answer came,
//! and answers that were asked again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use cli::Failure;
use jsonl::{Journal, journal_lines};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use settings::Price;

use crate::anthropic::{self, Question};
use crate::verdict::{Opinion, Usage};

/// A line: an answer, or why an attempt that may be billed came to none.
#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    max_tokens: u32,
    #[serde(default, deserialize_with = "present")]
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unanswered: Option<String>,
}

/// An answer of `null` is one too: a service that says so has been asked.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// What was paid for a question and is of no use.
enum Void {
    /// An answer that was asked again, and the room it had.
    Answer(u32, Value),
    /// An attempt without an answer, and the room it had.
    Unanswered(u32),
}

/// The answers of `--state`, and what this run has spent of its limit.
pub struct Ledger {
    journal: Journal,
    answers: HashMap<String, (u32, Value)>,
    /// By key, until it is counted.
    void: HashMap<String, Vec<Void>>,
    /// Keys whose cost is counted.
    counted: HashSet<String>,
    price: Price,
    limit_usd: f64,
    spent_usd: f64,
    usage: Usage,
    reserved_usd: f64,
    waiting: usize,
    /// Answers asked for in this run.
    pub asked: u64,
    /// Of the answers used: how many hold a verdict, what keeps the others from one, and
    /// how many do not say what they cost.
    verdicts: u64,
    silent: BTreeMap<String, u64>,
    pub estimated: u64,
    /// Attempts that may be billed and came to no answer, and what they cost at most.
    pub unanswered: u64,
    pub unanswered_usd: f64,
    /// Answers that could not be written, and so are asked for again by the next run.
    pub unkept: u64,
}

impl Ledger {
    /// Opens or makes `folder/answers.jsonl`, for this process alone.
    ///
    /// # Errors
    /// A folder that cannot be used, or that another judge uses (exit 4), or a line that is
    /// none of ours (exit 3).
    pub fn open(folder: &Path, price: Price, limit_usd: f64) -> anyhow::Result<Self> {
        let (journal, bytes) = Journal::open(&folder.join("answers.jsonl"), "judge")?;
        let mut answers = HashMap::new();
        let mut void: HashMap<String, Vec<Void>> = HashMap::new();
        for (i, line) in journal_lines(&bytes) {
            let bad = |cause: String| {
                Failure::Input(format!(
                    "{}:{i}: no kept answer: {cause}; delete this one line and run it again: what it held is \
                     asked for anew, all other answers stay",
                    journal.path().display()
                ))
            };
            let entry: Entry = serde_json::from_slice(line).map_err(|e| bad(e.to_string()))?;
            let Entry {
                key, max_tokens, ..
            } = entry;
            let paid = match (entry.answer, entry.unanswered) {
                (Some(answer), None) => (answers.insert(key.clone(), (max_tokens, answer)))
                    .map(|(had, answer)| Void::Answer(had, answer)),
                (None, Some(_)) => Some(Void::Unanswered(max_tokens)),
                _ => return Err(bad("it needs one of `answer` and `unanswered`".into()).into()),
            };
            void.entry(key).or_default().extend(paid);
        }
        Ok(Self {
            journal,
            answers,
            void,
            counted: HashSet::new(),
            price,
            limit_usd,
            spent_usd: 0.0,
            usage: Usage::default(),
            reserved_usd: 0.0,
            waiting: 0,
            asked: 0,
            verdicts: 0,
            silent: BTreeMap::new(),
            estimated: 0,
            unanswered: 0,
            unanswered_usd: 0.0,
            unkept: 0,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.journal.path()
    }

    /// Bytes of a line that was cut short.
    pub fn torn(&self) -> u64 {
        self.journal.torn()
    }

    /// The answer to a question asked before, unless it was cut off and may now be longer.
    /// What was paid for the question counts from now on, whatever came of it.
    pub fn find(&mut self, question: &Question, max_tokens: u32) -> Option<Opinion> {
        let key = question.key();
        let mut void = self.void.remove(&key).unwrap_or_default();
        if let Some((had, answer)) = self.answers.get(&key)
            && anthropic::was_cut(answer)
            && *had < max_tokens
        {
            let replaced = self.answers.remove(&key);
            void.extend(replaced.map(|(had, answer)| Void::Answer(had, answer)));
        }
        for void in void {
            match void {
                Void::Answer(had, answer) => {
                    self.spend(anthropic::opinion(&answer, question.most(had)).usage);
                }
                Void::Unanswered(had) => self.count_unanswered(question.most(had)),
            }
        }
        let (had, answer) = self.answers.get(&key)?;
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
        let key = question.key();
        let entry = Entry {
            key: key.clone(),
            max_tokens,
            answer: Some(answer),
            unanswered: None,
        };
        if let Err(error) = self.journal.append(&entry) {
            self.unkept += 1;
            self.spend(opinion.usage);
            return Err(error.into());
        }
        self.asked += 1;
        let answer = entry.answer.unwrap_or_default();
        self.answers.insert(key.clone(), (max_tokens, answer));
        self.count(key, &opinion);
        Ok(opinion)
    }

    /// Keeps that an attempt was made that may be billed and came to no answer, and why.
    ///
    /// # Errors
    /// When it cannot be written; it is counted all the same.
    pub fn keep_unanswered(
        &mut self,
        question: &Question,
        max_tokens: u32,
        cause: String,
    ) -> anyhow::Result<()> {
        self.count_unanswered(question.most(max_tokens));
        Ok(self.journal.append(&Entry {
            key: question.key(),
            max_tokens,
            answer: None,
            unanswered: Some(cause),
        })?)
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
        let path = self.path().display();
        format!("most often {reason} ({times}): see {path}; {remedy}")
    }

    /// What was paid for so far, in US dollars.
    pub fn spent_usd(&self) -> f64 {
        self.spent_usd
    }

    /// Tokens of the answers that were paid for so far, each answer once.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What these tokens cost, in US dollars. Writing to a cache costs a quarter more than
    /// reading anew, reading from it a tenth (five-minute cache).
    pub fn cost(&self, usage: Usage) -> f64 {
        let input = usage.input_tokens as f64
            + 1.25 * usage.cache_creation_input_tokens as f64
            + 0.1 * usage.cache_read_input_tokens as f64;
        (input * self.price.input + usage.output_tokens as f64 * self.price.output) / 1e6
    }

    /// Counts an answer that was paid for.
    fn spend(&mut self, usage: Usage) {
        self.spent_usd += self.cost(usage);
        self.usage += usage;
    }

    /// Counts an attempt without an answer at the most that it may have cost. Its tokens are
    /// nobody's count, and stay out of the sum of those that were told.
    fn count_unanswered(&mut self, most: Usage) {
        let usd = self.cost(most);
        self.spent_usd += usd;
        self.unanswered_usd += usd;
        self.unanswered += 1;
    }

    fn count(&mut self, key: String, opinion: &Opinion) {
        if !self.counted.insert(key) {
            return;
        }
        self.spend(opinion.usage);
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
