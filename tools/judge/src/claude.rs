//! Claude as a judge: so many questions at once, within a limit of money, each answer in
//! the ledger before it is used.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use cli::{App, Failure};
use httpclient::{Client, Retrying};
use settings::Judge;
use tokio::sync::{Notify, Semaphore};

use crate::anthropic::{self, Question};
use crate::ledger::Ledger;
use crate::reader;
use crate::verdict::{Comparison, Item, Opinion, Usage, Verdicts};

/// After so many answers without one verdict no further one is paid for.
const PATIENCE: u64 = 20;

/// Claude behind one key, a limit of money, and so many questions at once.
pub struct Claude {
    client: Client,
    retries: mpsc::Receiver<Retrying>,
    pub settings: Judge,
    pairs: Vec<(String, String)>,
    pub ledger: RefCell<Ledger>,
    open: Semaphore,
    /// Questions that somebody is at, by their keys. Items may have the same one: a tweet
    /// that has two replies in the data, and systems that say the same to it each time.
    at_work: RefCell<HashSet<String>>,
    /// Told whenever an attempt has ended and its real cost is known, and whenever a
    /// question is no longer worked at.
    settled: Notify,
    /// The first thing that went wrong. From then on no question is asked; those under way
    /// are answered.
    pub failure: RefCell<Option<anyhow::Error>>,
    /// Whether that was answers without a verdict.
    pub silent: Cell<bool>,
    signature: String,
}

impl Claude {
    /// Compares `pairs` of each item, see [`Item::pairs`].
    pub fn new(
        client: Client,
        settings: Judge,
        pairs: Vec<(String, String)>,
        ledger: Ledger,
        signature: String,
    ) -> Self {
        let open = Semaphore::new(settings.concurrency.max(1));
        let (told, retries) = mpsc::channel();
        let (ledger, failure) = (RefCell::new(ledger), RefCell::default());
        Self {
            client: client.with_retries_told(told),
            retries,
            settings,
            pairs,
            ledger,
            open,
            at_work: RefCell::default(),
            settled: Notify::new(),
            failure,
            silent: Cell::new(false),
            signature,
        }
    }

    /// Asks nothing more, failed attempts are not repeated either; the first failure is the
    /// one that is told.
    pub fn fail(&self, error: anyhow::Error) {
        self.client.give_up();
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// Fails where of at least so many answers none holds a verdict.
    pub fn fail_if_silent(&self, least: u64) {
        let ledger = self.ledger.borrow();
        if ledger.is_silent(least) {
            (self.silent).set(self.silent.get() || self.failure.borrow().is_none());
            let (answers, why) = (ledger.used(), ledger.why_silent());
            self.fail(
                Failure::World(format!("none of {answers} answers holds a verdict, {why}")).into(),
            );
        }
    }

    /// Fails where nobody reads any more.
    fn fail_if_unread(&self) {
        if let Err(gone) = reader::check() {
            self.fail(gone.into());
        }
    }

    /// Counts what is known already about an item, its cost and its verdicts, before anything
    /// new is asked about another.
    pub fn recall(&self, item: &Item) {
        let pairs = item.pairs(&self.pairs).unwrap_or_default();
        let orders = pairs.iter().flat_map(|(a, b)| [(a, b), (b, a)]);
        for (first, second) in orders {
            let question = self.question(item, first, second);
            self.ledger
                .borrow_mut()
                .find(&question, self.settings.max_tokens);
        }
    }

    fn question(&self, item: &Item, first: &str, second: &str) -> Question {
        let (first, second) = (&item.replies[first], &item.replies[second]);
        Question::new(&self.settings.model, &item.tweet, first, second)
    }

    /// The verdicts on an item, unless something failed here or elsewhere meanwhile.
    pub async fn judge(&self, item: &Item) -> Option<Verdicts> {
        // Checked when it was read, so there is no error here.
        let pairs = item.pairs(&self.pairs).ok()?;
        let mut comparisons = Vec::new();
        // Pairs of one item may share answers, where two of its systems say the same.
        let mut used = HashMap::new();
        for (a, b) in pairs {
            comparisons.push(if item.replies[&a] == item.replies[&b] {
                Comparison::identical(&a, &b)
            } else {
                let (one, other) = (self.question(item, &a, &b), self.question(item, &b, &a));
                let (a_first, b_first) = tokio::join!(self.ask(&one), self.ask(&other));
                let (a_first, b_first) = (a_first?, b_first?);
                used.insert(one.key(), a_first.usage);
                used.insert(other.key(), b_first.usage);
                Comparison::of(&a, &b, a_first, b_first)
            });
        }
        let mut verdicts = Verdicts::new(&self.settings.model, comparisons, &self.signature);
        verdicts.usage = Usage::default();
        for usage in used.into_values() {
            verdicts.usage += usage;
        }
        // To a millionth of a dollar: below that it is noise of the arithmetic.
        let usd = self.ledger.borrow().cost(verdicts.usage);
        verdicts.cost_usd = Some((usd * 1e6).round() / 1e6);
        Some(verdicts)
    }

    async fn ask(&self, question: &Question) -> Option<Opinion> {
        // Before the turn: who waits for another's answer is under way with nothing.
        let _alone = self.alone(question.key()).await;
        let known = (self.ledger.borrow_mut()).find(question, self.settings.max_tokens);
        if known.is_some() {
            return known;
        }
        let _turn = self.open.acquire().await.ok()?;
        self.pay_for(question).await.unwrap_or_else(|error| {
            self.fail(error);
            None
        })
    }

    /// Waits until nobody else is at the question of this key, and is at it until the guard
    /// goes, with an answer in the ledger or without.
    async fn alone(&self, key: String) -> AtWork<'_> {
        loop {
            let settled = self.settled.notified();
            if self.at_work.borrow_mut().insert(key.clone()) {
                return AtWork { claude: self, key };
            }
            settled.await;
        }
    }

    /// Asks until there is an answer, or a reason to ask no more. Money is set aside for
    /// each attempt: one that came to nothing may be billed like one that was answered.
    async fn pay_for(&self, question: &Question) -> anyhow::Result<Option<Opinion>> {
        let max_tokens = self.settings.max_tokens;
        let request = question.request(&self.client, max_tokens)?;
        let mut attempt = 1;
        loop {
            let Some(reserved) = self.set_aside(question.most(max_tokens)).await else {
                return Ok(None);
            };
            let answer = anthropic::attempt(&request, attempt).await;
            self.ledger.borrow_mut().release(reserved);
            self.settled.notify_waiters();
            let failure = match answer {
                Ok(answer) => {
                    let mut ledger = self.ledger.borrow_mut();
                    return ledger.keep(question, max_tokens, answer).map(Some);
                }
                Err(failure) => failure,
            };
            if failure.error.may_be_done() {
                let mut ledger = self.ledger.borrow_mut();
                ledger.keep_unanswered(question, max_tokens, failure.error.brief())?;
            }
            if !self.client.waits(&failure, attempt).await {
                return Err(failure.error.into());
            }
            attempt += 1;
        }
    }

    /// Sets money aside for an answer, unless there is a reason to ask no more. Where there is
    /// too little, answers under way may turn out cheaper than feared: only when none is, the
    /// limit is reached.
    async fn set_aside(&self, most: Usage) -> Option<f64> {
        loop {
            let settled = self.settled.notified();
            self.fail_if_unread();
            self.fail_if_silent(PATIENCE);
            if self.failure.borrow().is_some() {
                return None;
            }
            {
                let mut ledger = self.ledger.borrow_mut();
                if let Some(reserved) = ledger.reserve(most) {
                    return Some(reserved);
                }
                if !ledger.is_waiting() {
                    let limit = self.settings.max_cost_usd;
                    self.fail(
                        Failure::World(format!(
                            "the next answer could cost more than judge.max_cost_usd = {limit} allows: raise it \
                             (--max-cost USD)"
                        ))
                        .into(),
                    );
                    return None;
                }
            }
            settled.await;
        }
    }

    /// What the task gives; an interruption meanwhile is a failure like any other.
    pub async fn until_interrupted<T>(
        &self,
        app: &App,
        mut task: tokio::task::JoinHandle<Option<T>>,
    ) -> anyhow::Result<Option<T>> {
        loop {
            let done = tokio::select! {
                done = &mut task => Some(done),
                () = tokio::time::sleep(Duration::from_millis(100)) => None,
            };
            for retry in self.retries.try_iter() {
                app.warn(retry);
            }
            if let Some(done) = done {
                return done.context("judging an item failed");
            }
            self.fail_if_unread();
            if app.interrupted()? && self.failure.borrow().is_none() {
                app.info("answers under way are waited for, and kept");
                self.fail(Failure::Interrupted("interrupted".into()).into());
            }
        }
    }
}

/// A question that somebody is at.
struct AtWork<'a> {
    claude: &'a Claude,
    key: String,
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.claude.at_work.borrow_mut().remove(&self.key);
        self.claude.settled.notify_waiters();
    }
}
