//! When what is sent: while lines come, so often and no faster; what fails again later, and
//! ever more seldom; and the rest at the end. Nobody waits for it but the end of the program.

use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use cli::App;

use crate::figures::lacks_adapter;
use crate::link;
use crate::reading::Reading;
use crate::spool::{Entry, Spool, Standing, Taken, lock};
use crate::tensorboard::TensorBoard;

/// After so long without a word a service that wants to hear that a run lives is told so.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// The wait after a first failure at least. Each later one is twice as long as that before.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// No wait after a failure is longer than this, unless --every or the service asks for more.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// A service that is asked.
pub trait Service {
    /// Whether the figures of a step have to go as one, so that the last step waits while
    /// lines come.
    fn takes_whole_steps(&self) -> bool {
        false
    }

    /// Makes the run where it is not made yet, though its first step may still wait.
    ///
    /// # Errors
    /// Of the service, or of the state.
    fn begin(&mut self, _spool: &Mutex<Spool>) -> Result<()> {
        Ok(())
    }

    /// Sends some entries.
    ///
    /// # Errors
    /// Of the service, or of the state.
    fn send(&mut self, spool: &Mutex<Spool>, entries: &[Entry]) -> Result<Taken>;

    /// Whether it wants to hear that a run lives of which there is nothing new.
    fn wants_heartbeats(&self) -> bool {
        false
    }

    /// Says that the run is alive.
    ///
    /// # Errors
    /// Of the service, or of the state.
    fn heartbeat(&mut self, _spool: &Mutex<Spool>) -> Result<()> {
        Ok(())
    }

    /// Says that the run is over, for now.
    ///
    /// # Errors
    /// Of the service, or of the state.
    fn end(&mut self, spool: &Mutex<Spool>, standing: Standing) -> Result<()>;
}

/// Where figures go.
pub enum Destination<'a> {
    File(TensorBoard),
    Service(Box<dyn Service + Send + 'a>),
}

/// Sends what the spool holds.
pub struct Sender<'a> {
    pub app: &'a App,
    pub spool: &'a Mutex<Spool>,
    pub destination: Destination<'a>,
    /// Where the figures go and where they are kept, for messages.
    pub to: &'a str,
    pub kept_in: &'a str,
    /// Least time between two rounds of sending.
    pub every: Duration,
    /// The run's settings, beside which its adapter is in the end.
    pub settings: Option<&'a Path>,
    pub reading: &'a Reading,
}

impl Sender<'_> {
    /// Sends until there is no more news, and then the rest.
    ///
    /// # Errors
    /// Why something is not sent.
    pub fn run(mut self, news: &Receiver<()>) -> Result<()> {
        let beats = match &self.destination {
            Destination::File(_) => false,
            Destination::Service(service) => service.wants_heartbeats(),
        };
        let mut pace = Pace::new(self.every, beats, Instant::now());
        let mut failed: Option<Error> = None;
        let mut has_news = false;
        loop {
            let stopped = failed.as_ref().is_some_and(link::is_final);
            let next = match stopped {
                true => None,
                false => pace.next(has_news),
            };
            let told = match next {
                Some(at) => news.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => news.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match told {
                Ok(()) => {
                    has_news = true;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return match failed {
                        Some(error) if stopped || pace.rests(Instant::now()) => Err(error),
                        _ => self.finish(),
                    };
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !pace.is_due(has_news, Instant::now()) {
                self.heartbeat();
                pace.heard(Instant::now());
                continue;
            }
            match self.round(true) {
                Ok(has_sent) => {
                    has_news = false;
                    if failed.take().is_some() {
                        self.app
                            .info(format_args!("{} takes figures again", self.to));
                    }
                    pace.went(has_sent, Instant::now());
                }
                Err(error) => {
                    let wait = pace.failed(link::rest(&error), Instant::now());
                    let is_final = link::is_final(&error);
                    if failed.is_none() || is_final {
                        let then = match is_final {
                            true => "no more is sent".to_owned(),
                            false => {
                                let wait = wait.as_secs_f64();
                                format!(
                                    "it is tried again in {wait:.0} s, and then less and less often"
                                )
                            }
                        };
                        self.app.warn(format_args!(
                            "{error}; lines go on and are kept in {}, {then}",
                            self.kept_in
                        ));
                    }
                    failed = Some(error);
                }
            }
        }
    }

    /// Sends what there is; while lines come, the last step may wait for the rest of its figures.
    fn round(&mut self, open: bool) -> Result<bool> {
        let service = match &mut self.destination {
            Destination::File(file) => {
                let mut spool = lock(self.spool);
                let has_more = spool.has_more();
                if has_more {
                    file.send(&spool)?;
                    spool.all_sent();
                }
                return Ok(has_more);
            }
            Destination::Service(service) => service,
        };
        let holds = open && service.takes_whole_steps();
        let mut has_sent = false;
        // What comes meanwhile waits for the next time.
        let (goal, has_more) = {
            let spool = lock(self.spool);
            (spool.entries().len(), spool.has_more())
        };
        if has_more {
            lock(self.spool).set_standing(Standing::Running)?;
            service.begin(self.spool)?;
        }
        loop {
            let (range, entries) = {
                let mut spool = lock(self.spool);
                if open && spool.sent() >= goal {
                    return Ok(has_sent);
                }
                let Some(range) = spool.next(holds)? else {
                    return Ok(has_sent);
                };
                (range.clone(), spool.entries()[range].to_vec())
            };
            let taken = service.send(self.spool, &entries)?;
            lock(self.spool).set_sent(range.end, taken)?;
            has_sent = true;
        }
    }

    /// That one is not heard is no matter: the next is.
    fn heartbeat(&mut self) {
        if let Destination::Service(service) = &mut self.destination {
            let _ = service.heartbeat(self.spool);
        }
    }

    /// The rest, and that it is the end. A run whose end is known is not asked about again.
    fn finish(mut self) -> Result<()> {
        self.round(false)?;
        let Destination::Service(service) = &mut self.destination else {
            return Ok(());
        };
        let unfinished = self.settings.filter(|settings| lacks_adapter(settings));
        let standing = match self.reading.is_cut() || unfinished.is_some() {
            true => Standing::Interrupted,
            false => Standing::Finished,
        };
        let is_news = match lock(self.spool).standing() {
            None | Some(Standing::Finished) => false,
            Some(Standing::Running) => true,
            // What was interrupted and has come to its end since, with no more figures.
            Some(Standing::Interrupted) => {
                standing == Standing::Finished && self.reading.has_begun()
            }
        };
        if !is_news {
            return Ok(());
        }
        if let (Some(settings), false) = (unfinished, self.reading.is_cut()) {
            self.app.info(format_args!(
                "the run is shown as one that was broken off: there is no adapter beside {}",
                settings.display()
            ));
        }
        service.end(self.spool, standing)?;
        lock(self.spool).set_standing(standing)
    }
}

/// When the next thing is to be done.
struct Pace {
    every: Duration,
    beats: bool,
    due: Instant,
    /// When the service last heard something.
    contact: Instant,
    failures: u32,
    /// Until then the service does not want to be asked.
    rest: Option<Instant>,
}

impl Pace {
    fn new(every: Duration, beats: bool, now: Instant) -> Self {
        Self {
            every,
            beats,
            due: now,
            contact: now,
            failures: 0,
            rest: None,
        }
    }

    /// When there is something to do, if nothing comes first.
    fn next(&self, has_news: bool) -> Option<Instant> {
        let due = has_news.then_some(self.due);
        // A service that fails hears nothing.
        let beat = (self.beats && self.failures == 0).then(|| self.contact + HEARTBEAT);
        due.into_iter().chain(beat).min()
    }

    /// Whether it is time to send, and not only to be heard.
    fn is_due(&self, has_news: bool, now: Instant) -> bool {
        has_news && now >= self.due
    }

    /// Whether the service wants to be left alone.
    fn rests(&self, now: Instant) -> bool {
        self.rest.is_some_and(|until| now < until)
    }

    fn heard(&mut self, now: Instant) {
        self.contact = now;
    }

    fn went(&mut self, has_sent: bool, now: Instant) {
        (self.failures, self.rest) = (0, None);
        if has_sent {
            self.contact = now;
        }
        self.due = now + self.every;
    }

    /// Waits for longer each time, and at least so long as the service asks; how long.
    fn failed(&mut self, asked: Option<Duration>, now: Instant) -> Duration {
        let first = self.every.max(FIRST_WAIT);
        let longest = self.every.max(LONGEST_WAIT);
        let grown = first
            .saturating_mul(1 << self.failures.min(16))
            .min(longest);
        let wait = grown.max(asked.unwrap_or_default());
        self.failures += 1;
        self.rest = asked.map(|asked| now + asked);
        self.due = now + wait;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn without_news_there_is_nothing_to_do_but_to_be_heard() {
        let now = Instant::now();
        let mut pace = Pace::new(Duration::ZERO, false, now);
        assert_eq!(pace.next(true), Some(now));
        // A step that waits for the rest of its figures is no news.
        pace.went(false, now);
        assert_eq!(pace.next(false), None);
        let mut pace = Pace::new(Duration::ZERO, true, now);
        pace.went(true, now);
        assert_eq!(pace.next(false), Some(now + HEARTBEAT));
    }

    #[test]
    fn a_run_is_heard_of_however_seldom_figures_go() {
        let now = Instant::now();
        let mut pace = Pace::new(seconds(3600), true, now);
        pace.went(true, now);
        assert_eq!(pace.next(true), Some(now + HEARTBEAT));
        assert!(!pace.is_due(true, now + HEARTBEAT));
        pace.heard(now + HEARTBEAT);
        assert_eq!(pace.next(true), Some(now + 2 * HEARTBEAT));
        assert!(pace.is_due(true, now + seconds(3600)));
    }

    #[test]
    fn waits_after_failures_grow() {
        let now = Instant::now();
        let mut pace = Pace::new(Duration::ZERO, true, now);
        let waits: Vec<_> = (0..12).map(|_| pace.failed(None, now).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        assert_eq!(pace.next(true), Some(now + LONGEST_WAIT));
        pace.went(true, now);
        assert_eq!(pace.failed(None, now), seconds(1));
        assert_eq!(
            Pace::new(seconds(900), false, now).failed(None, now),
            seconds(900)
        );
    }

    #[test]
    fn a_service_is_left_alone_as_long_as_it_asks() {
        let now = Instant::now();
        let mut pace = Pace::new(seconds(15), false, now);
        assert_eq!(pace.failed(Some(seconds(7200)), now), seconds(7200));
        assert_eq!(pace.next(true), Some(now + seconds(7200)));
        assert!(pace.rests(now + seconds(7199)) && !pace.rests(now + seconds(7200)));
        assert_eq!(pace.failed(None, now), seconds(30));
        assert!(!pace.rests(now));
    }
}
