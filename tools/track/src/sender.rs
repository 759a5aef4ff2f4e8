//! When what is sent: while lines come, so often and no faster; what fails again later; and
//! the rest at the end. Nobody waits for it but the end of the program.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use cli::App;

use crate::link;
use crate::mlflow::Mlflow;
use crate::spool::{Spool, Standing, lock};
use crate::tensorboard::TensorBoard;
use crate::wandb::Wandb;

/// After so long without a word Weights & Biases may take a run for dead.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Where figures go.
pub enum Destination<'a> {
    TensorBoard(TensorBoard),
    Mlflow(Mlflow<'a>),
    Wandb(Wandb<'a>),
}

/// Sends what the spool holds.
pub struct Sender<'a> {
    pub app: &'a App,
    pub spool: &'a Mutex<Spool>,
    pub destination: Destination<'a>,
    /// Where the figures go and where they are kept, for messages.
    pub to: &'a str,
    pub kept_in: &'a str,
    /// Time between two requests.
    pub every: Duration,
    /// Whether the lines ended before their end.
    pub hurry: &'a AtomicBool,
}

impl Sender<'_> {
    /// Sends until there is no more news, and then the rest.
    ///
    /// # Errors
    /// Why something is not sent.
    pub fn run(mut self, news: &Receiver<()>) -> Result<()> {
        let mut due = Instant::now();
        let mut last_contact = Instant::now();
        let mut failed: Option<Error> = None;
        loop {
            let stopped = failed.as_ref().is_some_and(link::is_final);
            let has_more = !stopped && lock(self.spool).has_more();
            let wait = match has_more {
                true => due.saturating_duration_since(Instant::now()),
                false => HEARTBEAT,
            };
            match news.recv_timeout(wait) {
                Ok(()) => continue,
                Err(RecvTimeoutError::Disconnected) if stopped => {
                    return failed.map_or(Ok(()), Err);
                }
                Err(RecvTimeoutError::Disconnected) => return self.finish(),
                Err(RecvTimeoutError::Timeout) if stopped => continue,
                Err(RecvTimeoutError::Timeout) => {}
            }
            match self.round(true) {
                Ok(has_sent) => {
                    if failed.take().is_some() && has_sent {
                        self.app
                            .info(format_args!("{} takes figures again", self.to));
                    }
                    if has_sent {
                        last_contact = Instant::now();
                    } else if last_contact.elapsed() >= HEARTBEAT {
                        self.heartbeat();
                        last_contact = Instant::now();
                    }
                    due = Instant::now() + self.every;
                }
                Err(error) => {
                    let then = match link::is_final(&error) {
                        true => "no more is sent".to_owned(),
                        false => format!("it is tried again every {:?}", self.every * 4),
                    };
                    if failed.is_none() {
                        self.app.warn(format_args!(
                            "{error:#}; lines go on and are kept in {}, {then}",
                            self.kept_in
                        ));
                    }
                    failed = Some(error);
                    due = Instant::now() + self.every * 4;
                }
            }
        }
    }

    /// Sends what there is; while lines come, the last step may wait for the rest of its figures.
    fn round(&mut self, open: bool) -> Result<bool> {
        if let Destination::TensorBoard(file) = &mut self.destination {
            let mut spool = lock(self.spool);
            let has_more = spool.has_more();
            if has_more {
                file.send(&spool)?;
                spool.all_sent();
            }
            return Ok(has_more);
        }
        let holds = open && matches!(self.destination, Destination::Wandb(_));
        let mut has_sent = false;
        // What comes meanwhile waits for the next time.
        let goal = lock(self.spool).entries().len();
        loop {
            let (range, entries) = {
                let mut spool = lock(self.spool);
                if open && spool.sent() >= goal {
                    return Ok(has_sent);
                }
                let Some(range) = spool.next(holds)? else {
                    return Ok(has_sent);
                };
                spool.set_standing(Standing::Running)?;
                (range.clone(), spool.entries()[range].to_vec())
            };
            let rows = match &mut self.destination {
                Destination::TensorBoard(_) => 0,
                Destination::Mlflow(run) => run.send(self.spool, &entries).map(|()| 0)?,
                Destination::Wandb(run) => run.send(self.spool, &entries)?,
            };
            lock(self.spool).set_sent(range.end, rows)?;
            has_sent = true;
        }
    }

    /// That one is not heard is no matter: the next is.
    fn heartbeat(&mut self) {
        if let Destination::Wandb(run) = &mut self.destination {
            let _ = run.heartbeat(self.spool);
        }
    }

    /// The rest, and that it is the end. A run whose end is known is not asked about again.
    fn finish(mut self) -> Result<()> {
        self.round(false)?;
        let was = lock(self.spool).standing();
        let is_cut = self.hurry.load(Ordering::Relaxed) || self.app.interrupted()?;
        let standing = match is_cut {
            true => Standing::Interrupted,
            false => Standing::Finished,
        };
        if was != Some(Standing::Running) {
            return Ok(());
        }
        match &mut self.destination {
            Destination::TensorBoard(_) => {}
            Destination::Mlflow(run) => run.end(self.spool, standing)?,
            Destination::Wandb(run) => run.end(self.spool, standing)?,
        }
        lock(self.spool).set_standing(standing)
    }
}
