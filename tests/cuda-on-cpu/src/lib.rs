//! A CUDA device made of a processor, so that CI, which has no GPU, executes every
//! kernel and all of the backend's host code. Two things run the kernels: their `.cu`
//! sources as coroutines (`runtime/`), quickly, with a C++ twin of each instruction
//! behind `device.cuh`'s wrappers; and the PTX that is shipped, interpreted ([`Ptx`]),
//! with the instructions as NVIDIA's manual has them.
//!
//! What a device would leave undefined is made loud: fresh memory is NaN, an
//! argument of the wrong size or an address outside every buffer is an error, and
//! races in shared memory are found, by the coroutines where they are checked. What
//! it cannot show is speed, what the driver's compiler makes of the PTX, and what a
//! chip does where the manual leaves it open.

mod ptx;

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use engine::cuda::{Address, Driver, Launch, Mark, Operand, Pending, Precision, Product};
use engine::{Error, Result};
use half::bf16;

pub use ptx::{PTX, Ptx};

unsafe extern "C" {
    fn cuda_on_cpu_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        args: *mut *mut c_void,
        sizes: *const usize,
        arg_count: i32,
        how: u32,
        checked: bool,
    ) -> *const c_char;
    fn cuda_on_cpu_buffer(base: usize, size: usize);
    fn cuda_on_cpu_free(base: usize);
}

/// Folders of stand-ins for libcuda and libcublasLt, which a program finds through
/// LD_LIBRARY_PATH: it then takes the processor for an NVIDIA GPU, and runs the
/// code that it would use a real one with.
pub const STAND_IN: [&str; 2] = [
    concat!(env!("STAND_IN"), "/driver"),
    concat!(env!("STAND_IN"), "/cublas"),
];

/// In which order the threads of a block run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Order {
    /// By their numbers.
    Forward,
    /// Backwards.
    Reverse,
    /// Another at each step.
    Random,
    /// The one that became ready last: a warp runs far ahead of the others.
    Newest,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Forward, Self::Reverse, Self::Random, Self::Newest];
}

/// What runs a device's kernels.
pub trait Kernels: Send + Sync {
    /// The device in words.
    fn describe(&self) -> String;

    /// Runs a kernel to its end; these buffers are alive: base → size.
    ///
    /// # Errors
    /// Where the launch does not fit the kernel, or the kernel is wrong.
    fn launch(&self, launch: &Launch<'_>, buffers: &BTreeMap<Address, usize>) -> Result<()>;

    /// A buffer has appeared.
    fn appears(&self, _base: Address, _bytes: usize) {}

    /// A buffer goes.
    fn goes(&self, _base: Address) {}
}

/// A device on the processor, whose kernels are run by `K`.
pub struct Processor<K: Kernels> {
    kernels: K,
    /// Live buffers: base → size.
    buffers: Mutex<BTreeMap<Address, usize>>,
    meter: Arc<Meter>,
    made: Instant,
}

/// Runs the kernels' sources as coroutines.
pub struct Coroutines {
    order: Order,
    checked: bool,
}

/// A device that runs the kernels' sources.
pub type Emulated = Processor<Coroutines>;

/// A device that runs the kernels' PTX.
pub type Interpreted = Processor<Ptx>;

/// How much of a device's memory is, and was at most, in use, and what ran.
#[derive(Default)]
pub struct Meter {
    used: AtomicUsize,
    peak: AtomicUsize,
    launches: Mutex<BTreeMap<&'static str, usize>>,
}

impl Meter {
    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> usize {
        self.peak.load(Relaxed)
    }

    /// How often a kernel was launched.
    pub fn launches(&self, kernel: &str) -> usize {
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        launches.get(kernel).copied().unwrap_or(0)
    }

    /// The kernels that were launched.
    pub fn kernels(&self) -> Vec<&'static str> {
        let launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        launches.keys().copied().collect()
    }
}

/// The runtime has one block under way at a time, in the whole process.
fn runtime() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Buffers are aligned as the device's.
fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 256).expect("a buffer's size is sane")
}

fn wrong(problem: String) -> Error {
    Error::Device {
        problem,
        remedy: "mend the kernel or its launch",
    }
}

impl Emulated {
    /// A device whose threads run in this order. A checked one looks at every
    /// access, and takes about ten times as long.
    pub fn new(order: Order, checked: bool) -> Self {
        Self::of(Coroutines { order, checked })
    }
}

impl<K: Kernels> Processor<K> {
    /// A device that has its kernels run by this.
    pub fn of(kernels: K) -> Self {
        Self {
            kernels,
            buffers: Mutex::default(),
            meter: Arc::default(),
            made: Instant::now(),
        }
    }

    /// What counts this device's memory, also once a backend has taken it over.
    pub fn meter(&self) -> Arc<Meter> {
        self.meter.clone()
    }

    /// The memory of `bytes` at `address`, if it is inside a live buffer.
    fn memory(&self, address: Address, bytes: usize) -> Result<*mut u8> {
        let buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = buffers
            .range(..=address)
            .next_back()
            .is_some_and(|(&base, &size)| address + bytes as u64 <= base + size as u64);
        match inside {
            true => Ok(address as usize as *mut u8),
            false => Err(wrong(format!(
                "{bytes} bytes at {address:#x} are in no buffer"
            ))),
        }
    }

    /// `[rows, cols]` elements from `address` on, rows `stride` apart, each widened.
    fn gather<T: Copy>(
        &self,
        address: Address,
        [rows, cols]: [usize; 2],
        stride: usize,
        widen: impl Fn(T) -> f32,
    ) -> Result<Vec<f32>> {
        let size = size_of::<T>();
        let memory = self.memory(address, ((rows - 1) * stride + cols) * size)?;
        let at = |i: usize| {
            // SAFETY: inside the buffer that was just found, which the backend keeps
            // for the time of the call; any bits are a number.
            unsafe { memory.cast::<T>().add(i).read_unaligned() }
        };
        Ok((0..rows * cols)
            .map(|i| widen(at(i / cols * stride + i % cols)))
            .collect())
    }

    /// An operand in the shape of the product.
    fn operand(&self, operand: &Operand, [rows, cols]: [usize; 2]) -> Result<Vec<f32>> {
        if !operand.transposed {
            return self.gather(operand.address, [rows, cols], operand.stride, bf16::to_f32);
        }
        let stored = self.gather(operand.address, [cols, rows], operand.stride, bf16::to_f32)?;
        Ok((0..rows * cols)
            .map(|i| stored[i % cols * rows + i / cols])
            .collect())
    }

    /// Memory with undefined contents, which nothing counts.
    fn reserve(&self, what: &'static str, bytes: usize) -> Result<Address> {
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc(layout(bytes)) };
        if memory.is_null() {
            return Err(Error::OutOfMemory { what, bytes });
        }
        // SAFETY: fresh memory of this size. The bytes are NaN as floats, and as bf16.
        unsafe { memory.write_bytes(0xff, bytes) };
        self.kernels.appears(memory as usize as Address, bytes);
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.insert(memory as usize as Address, bytes);
        Ok(memory as usize as Address)
    }

    /// The size of what was there.
    fn give_back(&self, address: Address) -> usize {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bytes) = buffers.remove(&address) else {
            return 0;
        };
        self.kernels.goes(address);
        // SAFETY: came from `reserve` with this size, and was in the list once.
        unsafe { dealloc(address as usize as *mut u8, layout(bytes)) };
        bytes
    }
}

impl<K: Kernels> Drop for Processor<K> {
    fn drop(&mut self) {
        let buffers = self.buffers.get_mut();
        let live = buffers.unwrap_or_else(PoisonError::into_inner).keys();
        let live: Vec<_> = live.copied().collect();
        for base in live {
            self.release(base);
        }
    }
}

struct Ready(Vec<u8>);

impl Pending for Ready {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.0)
    }
}

impl Kernels for Coroutines {
    fn describe(&self) -> String {
        let order = self.order;
        format!("a CUDA device on the CPU, threads in order {order:?}")
    }

    fn launch(&self, launch: &Launch<'_>, _: &BTreeMap<Address, usize>) -> Result<()> {
        let name = CString::new(launch.kernel).expect("a kernel's name is text");
        let mut args: Vec<_> = launch.args.iter().map(|a| a.as_ptr().cast_mut()).collect();
        let sizes: Vec<_> = launch.args.iter().map(|a| a.size()).collect();
        let _running = runtime();
        // SAFETY: the pointers live through the call; the runtime compares the sizes
        // with the kernel's, and a checked kernel stays inside the buffers.
        let problem = unsafe {
            cuda_on_cpu_launch(
                name.as_ptr(),
                launch.grid.as_ptr(),
                [launch.block, 1, 1].as_ptr(),
                launch.shared as usize,
                args.as_mut_ptr(),
                sizes.as_ptr(),
                args.len() as i32,
                self.order as u32,
                self.checked,
            )
        };
        if problem.is_null() {
            return Ok(());
        }
        // SAFETY: a string that stays until the next launch, which the lock holds off.
        let problem = unsafe { CStr::from_ptr(problem) };
        Err(wrong(problem.to_string_lossy().into_owned()))
    }

    fn appears(&self, base: Address, bytes: usize) {
        let _running = runtime();
        // SAFETY: only notes the range.
        unsafe { cuda_on_cpu_buffer(base as usize, bytes) };
    }

    fn goes(&self, base: Address) {
        let _running = runtime();
        // SAFETY: only forgets the range.
        unsafe { cuda_on_cpu_free(base as usize) };
    }
}

impl<K: Kernels> Driver for Processor<K> {
    fn describe(&self) -> String {
        self.kernels.describe()
    }

    fn free(&self) -> Result<usize> {
        Ok(usize::MAX - self.meter.used.load(Relaxed))
    }

    fn peak(&self) -> Result<usize> {
        Ok(self.meter.peak())
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Address> {
        let address = self.reserve(what, bytes)?;
        let used = self.meter.used.fetch_add(bytes, Relaxed) + bytes;
        self.meter.peak.fetch_max(used, Relaxed);
        Ok(address)
    }

    fn release(&self, address: Address) {
        let bytes = self.give_back(address);
        self.meter.used.fetch_sub(bytes, Relaxed);
    }

    fn share(&self, bytes: usize) -> Result<Address> {
        self.reserve("shared memory", bytes)
    }

    fn unshare(&self, address: Address) {
        self.give_back(address);
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        let memory = self.memory(at, bytes)?;
        // SAFETY: inside a live buffer.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(())
    }

    fn write(&self, bytes: &[u8], to: Address) -> Result<()> {
        let memory = self.memory(to, bytes.len())?;
        // SAFETY: inside a live buffer, which no slice of the host's overlaps.
        unsafe { memory.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, from: Address, bytes: usize) -> Result<Box<dyn Pending>> {
        let memory = self.memory(from, bytes)?;
        // SAFETY: inside a live buffer, whose bytes were all written when it was made.
        let values = unsafe { std::slice::from_raw_parts(memory, bytes) };
        Ok(Box::new(Ready(values.to_vec())))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let launches = self.meter.launches.lock();
        let mut launches = launches.unwrap_or_else(PoisonError::into_inner);
        *launches.entry(launch.kernel).or_default() += 1;
        drop(launches);
        let buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        self.kernels.launch(launch, &buffers)
    }

    /// Everything is done at once: nanoseconds since the device was made.
    fn mark(&self) -> Result<Mark> {
        Ok(self.made.elapsed().as_nanos() as Mark)
    }

    fn between(&self, earlier: Mark, later: Mark) -> Result<f64> {
        Ok((later - earlier) as f64 / 1e9)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        let [m, n, k] = product.size;
        if m * n == 0 {
            return Ok(());
        }
        let a = self.operand(&product.a, [m, k])?;
        let b = self.operand(&product.b, [k, n])?;
        let mut out = match (product.add, product.precision) {
            (None, _) => vec![0.0; m * n],
            (Some((at, stride)), Precision::F32) => self.gather(at, [m, n], stride, |x: f32| x)?,
            (Some((at, stride)), Precision::Bf16) => {
                self.gather(at, [m, n], stride, bf16::to_f32)?
            }
        };
        // SAFETY: dense row-major matrices of the sizes that were just made.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                product.add.is_some(),
                a.as_ptr(),
                1,
                k as isize,
                b.as_ptr(),
                1,
                n as isize,
                1.0,
                product.scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        let (at, stride) = product.out;
        let size = match product.precision {
            Precision::F32 => size_of::<f32>(),
            Precision::Bf16 => size_of::<bf16>(),
        };
        let memory = self.memory(at, ((m - 1) * stride + n) * size)?;
        for (i, &value) in out.iter().enumerate() {
            let at = i / n * stride + i % n;
            // SAFETY: inside the live buffer that was just found.
            unsafe {
                match product.precision {
                    Precision::F32 => memory.cast::<f32>().add(at).write_unaligned(value),
                    Precision::Bf16 => {
                        let value = bf16::from_f32(value);
                        memory.cast::<bf16>().add(at).write_unaligned(value);
                    }
                }
            }
        }
        Ok(())
    }
}
