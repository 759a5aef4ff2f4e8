//! A service that is asked one thing at a time: retries are told meanwhile, and a signal ends
//! the waiting for them.

use std::fmt;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Result;
use cli::{App, Failure};
use httpclient::{Client, ConfigError, Error, Policy, Request, Retrying};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::reading::{LAST_ANSWERS, Reading};

/// The service, and the one who waits for it.
pub struct Link<'a> {
    app: &'a App,
    client: Client,
    retries: Receiver<Retrying>,
    runtime: Runtime,
    reading: &'a Reading,
}

/// What a service says in a way of its own.
#[derive(Debug)]
pub enum Said {
    /// Something that may have passed by the next time.
    Passing(String),
    /// That the run is gone: the same command sends nothing any more.
    Gone(String),
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passing(cause) | Self::Gone(cause) => f.write_str(cause),
        }
    }
}

impl std::error::Error for Said {}

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
    /// A link for the client. Once the lines were cut no failed attempt is repeated, and some
    /// time after a signal no answer waited for.
    ///
    /// # Errors
    /// If the system gives no means to wait.
    pub fn new(app: &'a App, client: Client, reading: &'a Reading) -> Result<Self> {
        let (told, retries) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self {
            app,
            client: client.with_retries_told(told),
            retries,
            runtime,
            reading,
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
            while !self.reading.signalled_before(LAST_ANSWERS) {
                tokio::select! {
                    answer = &mut answer => return Some(answer),
                    () = tokio::time::sleep(Duration::from_millis(50)) => {
                        self.tell_retries();
                        if self.reading.is_hurried() {
                            self.client.give_up();
                        }
                    }
                }
            }
            None
        });
        self.tell_retries();
        let answer = answer.ok_or_else(|| {
            let seconds = LAST_ANSWERS.as_secs();
            Said::Passing(format!(
                "the service has not answered within {seconds} s of the signal"
            ))
        })?;
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

/// Whether the same would be refused again however long one waits: the key is wrong, or what
/// was sent is. Anything else a proxy may have said, or a service that is being restarted.
pub fn is_final(error: &anyhow::Error) -> bool {
    if let Some(Said::Passing(_)) = error.downcast_ref() {
        return false;
    }
    match error.downcast_ref::<Error>() {
        Some(error) => matches!(error.status(), Some(400 | 401 | 403 | 413 | 422)),
        None => true,
    }
}

/// How long the service wants not to be asked.
pub fn rest(error: &anyhow::Error) -> Option<Duration> {
    match error.downcast_ref() {
        Some(Error::Status { retry_after, .. }) => *retry_after,
        _ => None,
    }
}

/// Whether it says that there is no such thing.
pub fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().and_then(Error::status) == Some(404)
}

/// Whether the service refuses what was sent as no such thing, or not as it should be.
pub fn is_refused(error: &anyhow::Error) -> bool {
    let status = error.downcast_ref().and_then(Error::status);
    matches!(status, Some(400 | 404))
}

/// Whether it calls its refusal so.
pub fn is_called(error: &anyhow::Error, kind: &str) -> bool {
    matches!(error.downcast_ref(), Some(Error::Status { kind: Some(said), .. }) if said == kind)
}

/// Whether what was asked for may have been done all the same.
pub fn may_be_done(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(Error::may_be_done)
}
