//! What the backend asks of a CUDA device: memory, launches, products. Two
//! things provide it: a GPU ([`Nvidia`](super::Nvidia)), and, where there is none,
//! the tests' `cuda-on-cpu`, which runs the same kernels as coroutines. So all
//! host code above this line is exercised in CI.

use crate::Result;

/// A place in device memory, in bytes.
pub type Address = u64;

/// A place in a device's queue, whose time it notes when it gets there.
pub type Mark = u64;

/// An argument of a kernel, in its C type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// `u32`
    U32(u32),
    /// `u64`
    U64(u64),
    /// `float`
    F32(f32),
    /// A pointer.
    Pointer(Address),
}

impl Arg {
    /// Where the value lies, as `cuLaunchKernel` wants it.
    pub fn as_ptr(&self) -> *const std::ffi::c_void {
        match self {
            Self::U32(v) => std::ptr::from_ref(v).cast(),
            Self::U64(v) | Self::Pointer(v) => std::ptr::from_ref(v).cast(),
            Self::F32(v) => std::ptr::from_ref(v).cast(),
        }
    }

    /// Its size in bytes.
    pub fn size(&self) -> usize {
        match self {
            Self::U32(_) | Self::F32(_) => 4,
            Self::U64(_) | Self::Pointer(_) => 8,
        }
    }
}

/// A kernel of `kernels.cu` over a grid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Launch<'a> {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// Its arguments, in order.
    pub args: &'a [Arg],
}

/// A bf16 matrix as it lies in memory, or (`transposed`) its transpose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Operand {
    /// Its first element.
    pub address: Address,
    /// Elements from row to row, as stored.
    pub stride: usize,
    /// Whether the rows as stored are the columns of the operand.
    pub transposed: bool,
}

impl Operand {
    /// The matrix as stored.
    pub fn new(address: Address, stride: usize) -> Self {
        Self {
            address,
            stride,
            transposed: false,
        }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }
}

/// How the result of a product is stored; it is accumulated in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Rounded once, at the end.
    Bf16,
    /// As it is.
    F32,
}

/// `out [m, n] = scale · a [m, k] b [k, n] (+ add)`, row-major.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// `[m, n, k]`; `k` is at least 1.
    pub size: [usize; 3],
    /// `[m, k]`
    pub a: Operand,
    /// `[k, n]`
    pub b: Operand,
    /// The result's first element, and elements from row to row.
    pub out: (Address, usize),
    /// How the result and `add` are stored.
    pub precision: Precision,
    /// What is added, laid out as `out`, which it may be.
    pub add: Option<(Address, usize)>,
    /// Factor of the product.
    pub scale: f32,
}

impl Product {
    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        let [m, n, _] = self.size;
        m == 0 || n == 0
    }
}

/// What a product is computed by, in the numbers of `cublasLt.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Algorithm {
    /// Of the algorithm.
    pub id: u32,
    /// Of its tile.
    pub tile: u32,
    /// Of its stages.
    pub stages: u32,
    /// Of its cluster of blocks.
    pub cluster: u32,
    /// Into how many parts its sum is split.
    pub split: u32,
}

/// Something to be queued, as it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// [`Driver::launch`], its arguments apart.
    Launch(Launch<'static>, Vec<Arg>),
    /// [`Driver::multiply`]
    Multiply(Product),
    /// [`Driver::zero`]
    Zero(Address, usize),
}

impl From<&Launch<'_>> for Work {
    fn from(launch: &Launch<'_>) -> Self {
        let shape = Launch {
            kernel: launch.kernel,
            args: &[],
            ..*launch
        };
        Self::Launch(shape, launch.args.to_vec())
    }
}

impl Work {
    /// Queues it.
    ///
    /// # Errors
    /// If the device refuses it.
    pub fn queue(&self, driver: &(impl Driver + ?Sized)) -> Result<()> {
        match self {
            Self::Launch(shape, args) => driver.launch(&Launch { args, ..*shape }),
            Self::Multiply(product) => driver.multiply(product),
            Self::Zero(at, bytes) => driver.zero(*at, *bytes),
        }
    }
}

/// Work that a device knows, all of it at once.
pub trait Recording: Send {
    /// Queues it.
    ///
    /// # Errors
    /// If the device refuses it.
    fn play(&self) -> Result<()>;
}

/// Bytes on their way from the device.
pub trait Pending: Send {
    /// Waits for them.
    ///
    /// # Errors
    /// If the device failed in the meantime.
    fn wait(self: Box<Self>) -> Result<Vec<u8>>;
}

/// One device with one queue: everything happens in the order of the calls.
pub trait Driver: Send + Sync {
    /// The device in words.
    fn describe(&self) -> String;

    /// What the last bits of a result hang on: the chip and its libraries.
    fn hardware(&self) -> String {
        self.describe()
    }

    /// Bytes that are free on the device, for anyone; waits for what is queued.
    ///
    /// # Errors
    /// If the device failed.
    fn free(&self) -> Result<usize>;

    /// The most bytes that were allocated at the same time so far.
    ///
    /// # Errors
    /// If the device failed.
    fn peak(&self) -> Result<usize>;

    /// Memory with undefined contents, aligned to 256 bytes; `bytes` is not 0.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), naming `what`.
    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Address>;

    /// Host memory that kernels can read and write, slowly, with undefined contents,
    /// under one address for both; `bytes` is not 0.
    ///
    /// # Errors
    /// If the host has no room that stays in place.
    fn share(&self, bytes: usize) -> Result<Address>;

    /// Gives shared memory back once the work queued so far is done.
    fn unshare(&self, address: Address);

    /// Gives memory back once the work queued so far is done.
    fn release(&self, address: Address);

    /// Queues zeros.
    ///
    /// # Errors
    /// If the device failed.
    fn zero(&self, at: Address, bytes: usize) -> Result<()>;

    /// Queues a copy to the device; the source is free again on return.
    ///
    /// # Errors
    /// If the device failed.
    fn write(&self, bytes: &[u8], to: Address) -> Result<()>;

    /// Queues a copy from the device.
    ///
    /// # Errors
    /// If the device failed.
    fn read(&self, from: Address, bytes: usize) -> Result<Box<dyn Pending>>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// If the device refuses it.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Queues a product.
    ///
    /// # Errors
    /// If the device refuses it.
    fn multiply(&self, product: &Product) -> Result<()>;

    /// What a product is computed by, if that can be told.
    fn algorithm(&self, _product: &Product) -> Option<Algorithm> {
        None
    }

    /// Queues a look at the device's clock.
    ///
    /// # Errors
    /// If the device failed.
    fn mark(&self) -> Result<Mark>;

    /// Waits for the later one, and takes both back: the seconds between them.
    ///
    /// # Errors
    /// If the device failed.
    fn between(&self, earlier: Mark, later: Mark) -> Result<f64>;

    /// Makes one of what is to be queued again and again in this order; it has been
    /// queued before. Nothing is queued now. None: the device has no such thing.
    ///
    /// # Errors
    /// If it has, and refuses this.
    fn record(&self, _work: &[Work]) -> Result<Option<Box<dyn Recording>>> {
        Ok(None)
    }
}
