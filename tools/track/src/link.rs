//! A service that is asked one thing at a time: retries are told meanwhile, and a signal ends
//! the waiting for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Result;
use cli::{App, Failure};
use httpclient::{Client, ConfigError, Error, Policy, Request, Retrying};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::runtime::Runtime;

/// The service, and the one who waits for it.
pub struct Link<'a> {
    app: &'a App,
    client: Client,
    retries: Receiver<Retrying>,
    runtime: Runtime,
    /// Whether nobody is to wait any more.
    hurry: &'a AtomicBool,
}

/// Few attempts: what fails is tried again later, while there are lines, or by the next run.
pub fn policy() -> Policy {
    Policy {
        attempts: 4,
        timeout: Duration::from_secs(30),
        // The end of a training waits for it.
        longest_wait: Duration::from_secs(60),
        ..Policy::default()
    }
}

impl<'a> Link<'a> {
    /// A link for the client, whose failed attempts are no longer repeated once `hurry` is set.
    ///
    /// # Errors
    /// If the system gives no means to wait.
    pub fn new(app: &'a App, client: Client, hurry: &'a AtomicBool) -> Result<Self> {
        let (told, retries) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self {
            app,
            client: client.with_retries_told(told),
            retries,
            runtime,
            hurry,
        })
    }

    /// The answer to a GET with these query parameters.
    ///
    /// # Errors
    /// [`Error`]; see [`is_final`].
    pub fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> Result<T> {
        let request = self.client.get(path).map_err(wrong)?;
        self.ask(request.query(query.iter().copied()))
    }

    /// The answer to a POST that may be repeated.
    ///
    /// # Errors
    /// [`Error`]; see [`is_final`].
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T> {
        let request = self.client.post(path).map_err(wrong)?;
        self.ask(request.json(body).map_err(wrong)?)
    }

    /// The answer to a POST that makes something, which is repeated only where nothing was made.
    ///
    /// # Errors
    /// [`Error`]; see [`is_final`].
    pub fn make<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T> {
        let request = self.client.post(path).map_err(wrong)?;
        self.ask(request.json(body).map_err(wrong)?.once())
    }

    fn ask<T: DeserializeOwned>(&self, request: Request<'_>) -> Result<T> {
        let answer = self.runtime.block_on(async {
            let answer = request.send();
            tokio::pin!(answer);
            loop {
                tokio::select! {
                    answer = &mut answer => return answer,
                    () = tokio::time::sleep(Duration::from_millis(50)) => {
                        self.tell_retries();
                        if self.hurry.load(Ordering::Relaxed) || self.app.interrupted().unwrap_or(false) {
                            self.client.give_up();
                        }
                    }
                }
            }
        });
        self.tell_retries();
        Ok(answer?.json()?)
    }

    /// What the service said in a success, fit to be shown.
    pub fn printable(&self, text: &str) -> String {
        self.client.printable(text)
    }

    fn tell_retries(&self) {
        for retry in self.retries.try_iter() {
            self.app.warn(retry);
        }
    }
}

fn wrong(error: ConfigError) -> Failure {
    Failure::Usage(error.to_string())
}

/// Whether the same request would be refused again: there is no use in asking more.
pub fn is_final(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Error>() {
        Some(error) => error
            .status()
            .is_some_and(|status| (300..500).contains(&status) && !matches!(status, 408 | 429)),
        None => true,
    }
}

/// Whether it says that there is no such thing.
pub fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().and_then(Error::status) == Some(404)
}

/// Whether what was asked for may have been done all the same.
pub fn may_be_done(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(Error::may_be_done)
}
