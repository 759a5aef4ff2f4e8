//! Claude as a judge: so many questions at once, within a limit of money, each answer in
//! the ledger before it is used.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Context;
use cli::{App, Failure};
use httpclient::Client;
use settings::Judge;
use tokio::sync::Semaphore;

use crate::anthropic::{self, Question};
use crate::ledger::Ledger;
use crate::verdict::{Comparison, Item, Opinion, Verdicts};

/// Claude behind one key, a limit of money, and so many questions at once.
pub struct Claude {
    client: Client,
    pub settings: Judge,
    pairs: Vec<(String, String)>,
    pub ledger: RefCell<Ledger>,
    open: Semaphore,
    /// The first thing that went wrong. From then on no question is asked; those under way
    /// are answered.
    pub failure: RefCell<Option<anyhow::Error>>,
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
        let (ledger, failure) = (RefCell::new(ledger), RefCell::default());
        Self {
            client,
            settings,
            pairs,
            ledger,
            open,
            failure,
            signature,
        }
    }

    /// Asks nothing more; the first failure is the one that is told.
    pub fn fail(&self, error: anyhow::Error) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// The verdicts on an item, unless something failed here or elsewhere meanwhile.
    pub async fn judge(&self, item: &Item) -> Option<Verdicts> {
        // Checked when it was read, so there is no error here.
        let pairs = item.pairs(&self.pairs).ok()?;
        let mut comparisons = Vec::new();
        for (a, b) in pairs {
            let (reply_a, reply_b) = (&item.replies[&a], &item.replies[&b]);
            comparisons.push(if reply_a == reply_b {
                Comparison::identical(&a, &b)
            } else {
                let ask = |first, second| {
                    self.ask(Question::new(
                        &self.settings.model,
                        &item.tweet,
                        first,
                        second,
                    ))
                };
                let (a_first, b_first) = tokio::join!(ask(reply_a, reply_b), ask(reply_b, reply_a));
                Comparison::of(&a, &b, a_first?, b_first?)
            });
        }
        let mut verdicts = Verdicts::new(&self.settings.model, comparisons, &self.signature);
        // To a millionth of a dollar: below that it is noise of the arithmetic.
        let usd = self.ledger.borrow().cost(verdicts.usage);
        verdicts.cost_usd = Some((usd * 1e6).round() / 1e6);
        Some(verdicts)
    }

    async fn ask(&self, question: Question) -> Option<Opinion> {
        let _turn = self.open.acquire().await.ok()?;
        let (key, max_tokens) = (question.key(), self.settings.max_tokens);
        if let Some(answer) = self.ledger.borrow_mut().find(&key, max_tokens) {
            return Some(anthropic::opinion(&answer));
        }
        if self.failure.borrow().is_some() {
            return None;
        }
        let Some(reserved) = self
            .ledger
            .borrow_mut()
            .reserve(question.size(), max_tokens)
        else {
            self.fail(
                Failure::World(format!(
                    "the next answer could cost more than judge.max_cost_usd = {} allows: raise it (--max-cost USD)",
                    self.settings.max_cost_usd
                ))
                .into(),
            );
            return None;
        };
        let answer = question.ask(&self.client, max_tokens).await;
        let mut ledger = self.ledger.borrow_mut();
        ledger.release(reserved);
        match answer.and_then(|answer| ledger.keep(&key, max_tokens, &answer).map(|()| answer)) {
            Ok(answer) => Some(anthropic::opinion(&answer)),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// What the task gives; an interruption meanwhile is a failure like any other.
    pub async fn until_interrupted<T>(
        &self,
        app: &App,
        mut task: tokio::task::JoinHandle<Option<T>>,
    ) -> anyhow::Result<Option<T>> {
        loop {
            tokio::select! {
                done = &mut task => return done.context("judging an item failed"),
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    if app.interrupted()? {
                        self.fail(Failure::Interrupted("interrupted".into()).into());
                    }
                }
            }
        }
    }
}
