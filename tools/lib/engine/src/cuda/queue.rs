//! The device's queue as the backend fills it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::driver::{Address, Algorithm, Driver, Launch, Mark, Product, Recording, Work};
use crate::{Error, Result, Spent};

/// The most works that are kept: decoding steps of several sizes (ten up to 256 rows), of
/// several adapters.
const KEPT: usize = 48;

/// A driver and its first failure. Operations queue work and return nothing, so
/// a failure is kept for the next call that can report it; what is queued after it
/// is dropped.
///
/// What is queued inside [`repeat`](Self::repeat) is gathered first. Where all of it,
/// to the last argument, has been queued like that before, the device is given the whole at
/// once: so what is repeated need not be told from what is not, and can never be
/// something else than what was asked for. Only one thread may queue meanwhile.
pub(super) struct Queue {
    /// The least recently used first; goes before the device does.
    kept: Mutex<Vec<Kept>>,
    driver: Box<dyn Driver>,
    failure: Mutex<Option<String>>,
    gathered: Mutex<Option<Vec<Work>>>,
    played: AtomicUsize,
    /// Why something could not be recorded, the first time.
    unrecorded: Mutex<Option<String>>,
    profile: Mutex<Option<Profile>>,
}

/// What is timed in a profile as one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Task {
    Kernel(&'static str),
    /// Its size, and what it is computed by.
    Product([usize; 3], Option<Algorithm>),
    Zeros,
    Copy,
}

impl Task {
    fn product(driver: &dyn Driver, product: &Product) -> Self {
        Self::Product(product.size, driver.algorithm(product))
    }
}

/// The most pieces of work whose time a profile has not yet asked for.
const UNASKED: usize = 4096;

#[derive(Default)]
struct Profile {
    /// In their order, between which marks.
    unasked: Vec<(Task, [Mark; 2])>,
    /// How often, and seconds.
    spent: HashMap<Task, (usize, f64)>,
}

impl Profile {
    /// Waits for all that is queued, and adds it up.
    fn ask(&mut self, driver: &dyn Driver) -> Result<()> {
        for (task, [from, to]) in self.unasked.drain(..) {
            let seconds = driver.between(from, to)?;
            let (times, all) = self.spent.entry(task).or_default();
            *times += 1;
            *all += seconds;
        }
        Ok(())
    }

    fn spent(self) -> Vec<Spent> {
        let line = |(task, (times, seconds))| {
            let (work, operations, algorithm) = match task {
                Task::Kernel(name) => (name.to_owned(), None, None),
                Task::Product(size, algorithm) => {
                    let [m, n, k] = size;
                    let each = 2.0 * size.map(|side| side as f64).iter().product::<f64>();
                    let all = Some(each * times as f64);
                    (format!("{m} x {n} x {k}"), all, algorithm)
                }
                Task::Zeros => ("zeros".to_owned(), None, None),
                Task::Copy => ("copies to the device".to_owned(), None, None),
            };
            let numbers = |a: Algorithm| {
                format!(
                    "{}, tile {}, stages {}, cluster {}, split {}",
                    a.id, a.tile, a.stages, a.cluster, a.split
                )
            };
            Spent {
                work,
                times,
                seconds,
                operations,
                algorithm: algorithm.map(numbers),
            }
        };
        let mut spent: Vec<_> = self.spent.into_iter().map(line).collect();
        spent.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then(a.work.cmp(&b.work)));
        spent
    }
}

/// Work that was repeated, or may be.
struct Kept {
    work: Vec<Work>,
    state: State,
}

enum State {
    SeenOnce,
    /// Seen again, and the device cannot record it.
    Unrecordable,
    Recorded(Box<dyn Recording>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub fn new(driver: Box<dyn Driver>) -> Self {
        Self {
            kept: Mutex::new(Vec::new()),
            driver,
            failure: Mutex::new(None),
            gathered: Mutex::new(None),
            played: AtomicUsize::new(0),
            unrecorded: Mutex::new(None),
            profile: Mutex::new(None),
        }
    }

    /// The device, everything so far in its queue.
    pub fn device(&self) -> &dyn Driver {
        let gathered = lock(&self.gathered).take();
        if let Some(work) = gathered {
            self.then(|driver| work.iter().try_for_each(|work| self.queue(driver, work)));
        }
        &*self.driver
    }

    pub fn describe(&self) -> String {
        self.driver.describe()
    }

    pub fn hardware(&self) -> String {
        self.driver.hardware()
    }

    /// How often what was repeated was queued as a whole.
    pub fn played(&self) -> usize {
        self.played.load(Relaxed)
    }

    /// Why it was not, where the device could have.
    pub fn unrecorded(&self) -> Option<String> {
        lock(&self.unrecorded).clone()
    }

    /// The failure so far, if any.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.failure) {
            None => Ok(()),
            Some(problem) => Err(Error::Device {
                problem: problem.clone(),
                remedy: "start again",
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
    fn add(
        &self,
        work: impl FnOnce() -> Work,
        task: impl FnOnce(&dyn Driver) -> Task,
        queue: impl FnOnce(&dyn Driver) -> Result<()>,
    ) {
        if let Some(gathered) = &mut *lock(&self.gathered) {
            return gathered.push(work());
        }
        self.then(|driver| self.timed(driver, task, || queue(driver)));
    }

    /// Queues what was gathered.
    fn queue(&self, driver: &dyn Driver, work: &Work) -> Result<()> {
        let task = |driver: &dyn Driver| match work {
            Work::Launch(launch, _) => Task::Kernel(launch.kernel),
            Work::Multiply(product) => Task::product(driver, product),
            Work::Zero(..) => Task::Zeros,
        };
        self.timed(driver, task, || work.queue(driver))
    }

    /// Queues work, between two marks where there is a profile.
    fn timed(
        &self,
        driver: &dyn Driver,
        task: impl FnOnce(&dyn Driver) -> Task,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut profile = lock(&self.profile);
        let Some(profile) = &mut *profile else {
            return queue();
        };
        let from = driver.mark()?;
        queue()?;
        let marks = [from, driver.mark()?];
        profile.unasked.push((task(driver), marks));
        match profile.unasked.len() {
            UNASKED => profile.ask(driver),
            _ => Ok(()),
        }
    }

    pub fn launch(&self, launch: &Launch<'_>) {
        let task = |_: &dyn Driver| Task::Kernel(launch.kernel);
        self.add(|| launch.into(), task, |driver| driver.launch(launch));
    }

    pub fn multiply(&self, product: &Product) {
        self.add(
            || Work::Multiply(*product),
            |driver| Task::product(driver, product),
            |driver| driver.multiply(product),
        );
    }

    pub fn zero(&self, at: Address, bytes: usize) {
        let work = || Work::Zero(at, bytes);
        self.add(work, |_| Task::Zeros, |driver| driver.zero(at, bytes));
    }

    pub fn write(&self, bytes: &[u8], to: Address) {
        self.device();
        self.then(|driver| self.timed(driver, |_| Task::Copy, || driver.write(bytes, to)));
    }

    /// Does something, and says what the device spent its time on.
    pub fn profile<R>(&self, work: impl FnOnce() -> R) -> Result<(R, Vec<Spent>)> {
        let driver = self.device();
        *lock(&self.profile) = Some(Profile::default());
        let result = work();
        self.device();
        let mut profile = lock(&self.profile).take().unwrap_or_default();
        self.check()?;
        profile.ask(driver)?;
        Ok((result, profile.spent()))
    }

    /// Does something whose launches, products and zeros are likely to come again as they
    /// are. Anything else that it asks of the device ends the gathering.
    pub fn repeat<R>(&self, work: impl FnOnce() -> R) -> R {
        self.device();
        *lock(&self.gathered) = Some(Vec::new());
        let result = work();
        let gathered = lock(&self.gathered).take();
        if let Some(work) = gathered {
            self.then(|driver| self.play(driver, work));
        }
        result
    }

    fn record(&self, driver: &dyn Driver, work: &[Work]) -> State {
        match driver.record(work) {
            Ok(Some(recording)) => State::Recorded(recording),
            Ok(None) => State::Unrecordable,
            Err(error) => {
                lock(&self.unrecorded).get_or_insert_with(|| error.to_string());
                State::Unrecordable
            }
        }
    }

    fn play(&self, driver: &dyn Driver, work: Vec<Work>) -> Result<()> {
        if lock(&self.profile).is_some() {
            return work.iter().try_for_each(|work| self.queue(driver, work));
        }
        let mut kept = lock(&self.kept);
        let this = match kept.iter().position(|kept| kept.work == work) {
            Some(i) => {
                let Kept { work, state } = kept.remove(i);
                let state = match state {
                    State::SeenOnce => self.record(driver, &work),
                    state => state,
                };
                Kept { work, state }
            }
            None => Kept {
                work,
                state: State::SeenOnce,
            },
        };
        let queued = match &this.state {
            State::Recorded(recording) => {
                self.played.fetch_add(1, Relaxed);
                recording.play()
            }
            _ => this.work.iter().try_for_each(|work| work.queue(driver)),
        };
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(this);
        queued
    }
}
