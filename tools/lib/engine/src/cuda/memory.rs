//! Device memory as the backend hands it out.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::driver::{Address, Pending};
use super::queue::Queue;
use crate::{Reading, Result};

/// What a device buffer can hold.
pub trait Element: Copy + Send + Sync + 'static {}

impl Element for u8 {}
impl Element for u32 {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for bf16 {}

/// The bytes of some values.
fn bytes_of<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements are plain numbers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The values some bytes are.
fn values_of<T: Element>(bytes: &[u8]) -> Vec<T> {
    let len = bytes.len() / size_of::<T>();
    let mut values: Vec<T> = Vec::with_capacity(len);
    // SAFETY: every bit pattern is an element, the capacity suffices, and the
    // source is read as bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            values.as_mut_ptr().cast::<u8>(),
            bytes.len(),
        );
        values.set_len(len);
    }
    values
}

/// A stretch of device memory, freed in the order of the queue when dropped.
pub struct Buffer<T: Element> {
    queue: Arc<Queue>,
    address: Address,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// Undefined contents.
    pub(super) fn new(queue: &Arc<Queue>, what: &'static str, len: usize) -> Result<Self> {
        queue.check()?;
        let address = match len {
            0 => 0,
            _ => queue.device().allocate(what, len * size_of::<T>())?,
        };
        Ok(Self {
            queue: queue.clone(),
            address,
            len,
            element: PhantomData,
        })
    }

    pub(super) fn zeroed(queue: &Arc<Queue>, what: &'static str, len: usize) -> Result<Self> {
        let buffer = Self::new(queue, what, len)?;
        buffer.zero(len);
        queue.check()?;
        Ok(buffer)
    }

    pub(super) fn of(queue: &Arc<Queue>, what: &'static str, values: &[T]) -> Result<Self> {
        let buffer = Self::new(queue, what, values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// Values it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where values `range` lie.
    pub(super) fn at(&self, range: Range<usize>) -> Address {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "values {range:?} of a device buffer of {}",
            self.len
        );
        self.address + (range.start * size_of::<T>()) as u64
    }

    /// Where it starts, if it holds `len` values.
    pub(super) fn first(&self, len: usize) -> Address {
        self.at(0..len)
    }

    pub(super) fn zero(&self, len: usize) {
        let at = self.first(len);
        if len > 0 {
            self.queue.zero(at, len * size_of::<T>());
        }
    }

    pub(super) fn write(&self, values: &[T]) -> Result<()> {
        let at = self.first(values.len());
        if !values.is_empty() {
            self.queue.write(bytes_of(values), at);
        }
        self.queue.check()
    }

    /// Starts reading; a failure shows when the reading is waited for.
    pub(super) fn read(&self, range: Range<usize>) -> DeviceReading<T> {
        let (at, bytes) = (self.at(range.clone()), range.len() * size_of::<T>());
        let pending = match bytes {
            0 => Ok(None),
            _ => self
                .queue
                .check()
                .and_then(|()| self.queue.device().read(at, bytes).map(Some)),
        };
        DeviceReading {
            _queue: self.queue.clone(),
            pending,
            element: PhantomData,
        }
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            self.queue.device().release(self.address);
        }
    }
}

/// Values in host memory that kernels can read.
pub(super) struct Shared {
    queue: Arc<Queue>,
    /// 0 if there are none.
    pub address: Address,
}

impl Shared {
    /// Undefined contents.
    pub fn new<T: Element>(queue: &Arc<Queue>, len: usize) -> Result<Self> {
        queue.check()?;
        let address = match len {
            0 => 0,
            _ => queue.device().share(len * size_of::<T>())?,
        };
        Ok(Self {
            queue: queue.clone(),
            address,
        })
    }

    pub fn of<T: Element>(queue: &Arc<Queue>, values: &[T]) -> Result<Self> {
        let shared = Self::new::<T>(queue, values.len())?;
        if !values.is_empty() {
            let to = shared.address as *mut T;
            // SAFETY: fresh host memory of this size, which no kernel has been told of.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
        }
        Ok(shared)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.address != 0 {
            self.queue.device().unshare(self.address);
        }
    }
}

/// Values on their way back.
pub struct DeviceReading<T> {
    /// The device stays until they have come.
    _queue: Arc<Queue>,
    pending: Result<Option<Box<dyn Pending>>>,
    element: PhantomData<T>,
}

impl<T: Element> Reading<T> for DeviceReading<T> {
    fn wait(self) -> Result<Vec<T>> {
        // What has failed since then has nothing to do with these: they were queued before.
        let bytes = match self.pending? {
            None => Vec::new(),
            Some(pending) => pending.wait()?,
        };
        Ok(values_of(&bytes))
    }
}

/// Scratch memory, handed out piece by piece.
pub(super) struct Room<'a> {
    buffer: &'a Buffer<u8>,
    used: usize,
}

/// What a piece of this many values takes: pieces start where any type may.
pub(super) fn piece<T: Element>(len: usize) -> usize {
    (len * size_of::<T>()).next_multiple_of(256)
}

impl<'a> Room<'a> {
    pub fn new(buffer: &'a Buffer<u8>) -> Self {
        Self { buffer, used: 0 }
    }

    /// The next piece.
    pub fn take<T: Element>(&mut self, len: usize) -> Address {
        let from = self.used;
        self.used += piece::<T>(len);
        self.buffer.at(from..self.used)
    }
}
