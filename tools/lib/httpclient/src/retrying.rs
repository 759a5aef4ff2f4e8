//! Between two attempts: who hears of it, and what ends it early.

use std::fmt;
use std::time::Duration;

use crate::{Client, Failure};

/// An attempt that failed and is going to be repeated, for the person who waits.
#[derive(Debug, Clone)]
pub struct Retrying {
    /// The request and what became of it, fit for a terminal.
    pub cause: String,
    /// The attempt that failed, from 1.
    pub attempt: u32,
    /// Attempts at most.
    pub attempts: u32,
    /// Until the next one.
    pub wait: Duration,
}

impl fmt::Display for Retrying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cause,
            attempt,
            attempts,
            wait,
        } = self;
        let seconds = wait.as_secs_f64();
        write!(
            f,
            "{cause}; attempt {attempt} of {attempts}, the next in {seconds:.1} s"
        )
    }
}

impl Client {
    /// Waits after attempt number `attempt` for the next one; false where there is to be none.
    pub async fn waits(&self, failure: &Failure, attempt: u32) -> bool {
        let mut given_up = self.given_up.subscribe();
        let Some(wait) = failure.wait(&self.policy, attempt) else {
            return false;
        };
        if *given_up.borrow() {
            return false;
        }
        if let Some(told) = &self.told {
            // Whoever no longer listens need not be told.
            let _ = told.send(Retrying {
                cause: failure.error.brief(),
                attempt,
                attempts: self.policy.attempts,
                wait,
            });
        }
        // Times out where nobody gave up.
        tokio::time::timeout(wait, given_up.wait_for(|&up| up))
            .await
            .is_err()
    }
}
