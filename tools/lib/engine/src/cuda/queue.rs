//! The device's queue as the backend fills it.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::driver::{Address, Driver, Launch, Product, Recording, Work};
use crate::{Error, Result};

/// The most that is known of what is repeated: decoding steps of some sizes, with an
/// adapter and without.
const KNOWN: usize = 16;

/// A driver and its first failure. Operations queue work and return nothing, so
/// a failure is kept for the next call that can report it; what is queued after it
/// is dropped.
///
/// What is queued inside [`repeat`](Self::repeat) is gathered first. Where all of it,
/// to the last argument, has been queued like that before, the device is given the whole at
/// once: so what is repeated need not be told from what is not, and can never be
/// something else than what was asked for.
pub(super) struct Queue {
    /// The least recently used first; goes before the device does.
    known: Mutex<Vec<Known>>,
    driver: Box<dyn Driver>,
    failure: Mutex<Option<String>>,
    gathered: Mutex<Option<Vec<Work>>>,
    played: AtomicUsize,
}

/// What was repeated, or may be.
struct Known {
    work: Vec<Work>,
    seen: Seen,
}

enum Seen {
    Once,
    /// Again, and the device cannot record it.
    Again,
    Recorded(Box<dyn Recording>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub fn new(driver: Box<dyn Driver>) -> Self {
        Self {
            known: Mutex::new(Vec::new()),
            driver,
            failure: Mutex::new(None),
            gathered: Mutex::new(None),
            played: AtomicUsize::new(0),
        }
    }

    /// The device, everything so far in its queue.
    pub fn device(&self) -> &dyn Driver {
        let gathered = lock(&self.gathered).take();
        if let Some(work) = gathered {
            self.then(|driver| work.iter().try_for_each(|work| work.queue(driver)));
        }
        &*self.driver
    }

    pub fn describe(&self) -> String {
        self.driver.describe()
    }

    /// How often what was repeated was queued as a whole.
    pub fn played(&self) -> usize {
        self.played.load(Relaxed)
    }

    /// The failure so far, if any.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.failure) {
            None => Ok(()),
            Some(problem) => Err(Error::Device {
                problem: problem.clone(),
                remedy: "start again; finished steps are in the checkpoint",
            }),
        }
    }

    /// Queues something, unless the queue has failed.
    fn then(&self, work: impl FnOnce(&dyn Driver) -> Result<()>) {
        if self.check().is_ok()
            && let Err(error) = work(&*self.driver)
        {
            *lock(&self.failure) = Some(error.to_string());
        }
    }

    /// Queues this, or gathers it.
    fn add(&self, work: impl FnOnce() -> Work, queue: impl FnOnce(&dyn Driver) -> Result<()>) {
        if let Some(gathered) = &mut *lock(&self.gathered) {
            return gathered.push(work());
        }
        self.then(queue);
    }

    pub fn launch(&self, launch: &Launch<'_>) {
        self.add(|| launch.into(), |driver| driver.launch(launch));
    }

    pub fn multiply(&self, product: &Product) {
        self.add(
            || Work::Multiply(*product),
            |driver| driver.multiply(product),
        );
    }

    pub fn zero(&self, at: Address, bytes: usize) {
        self.add(|| Work::Zero(at, bytes), |driver| driver.zero(at, bytes));
    }

    pub fn write(&self, bytes: &[u8], to: Address) {
        self.device();
        self.then(|driver| driver.write(bytes, to));
    }

    /// Does something whose launches, products and zeros are likely to come again as they
    /// are. Anything else that it asks of the device ends the gathering.
    pub fn repeat<R>(&self, work: impl FnOnce() -> R) -> R {
        *lock(&self.gathered) = Some(Vec::new());
        let result = work();
        let gathered = lock(&self.gathered).take();
        if let Some(work) = gathered {
            self.then(|driver| self.play(driver, work));
        }
        result
    }

    fn play(&self, driver: &dyn Driver, work: Vec<Work>) -> Result<()> {
        let mut known = lock(&self.known);
        let this = match known.iter().position(|known| known.work == work) {
            Some(i) => {
                let Known { work, seen } = known.remove(i);
                let seen = match seen {
                    Seen::Once => driver.record(&work).map_or(Seen::Again, Seen::Recorded),
                    seen => seen,
                };
                Known { work, seen }
            }
            None => Known {
                work,
                seen: Seen::Once,
            },
        };
        let queued = match &this.seen {
            Seen::Recorded(recording) => {
                self.played.fetch_add(1, Relaxed);
                recording.play()
            }
            Seen::Once | Seen::Again => this.work.iter().try_for_each(|work| work.queue(driver)),
        };
        if known.len() == KNOWN {
            known.remove(0);
        }
        known.push(this);
        queued
    }
}
