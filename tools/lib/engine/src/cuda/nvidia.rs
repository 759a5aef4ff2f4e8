//! The driver of a real GPU: CUDA's driver library and cuBLASLt, opened when a
//! device is asked for. Everything that can be missing or too old is found out
//! here, before any memory is touched, and said with its remedy.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result as blas, sys as blas_sys};
use cudarc::driver::{result as cuda, sys};

use super::driver::{
    Address, Algorithm, Driver, Launch, Mark, Pending, Precision, Product, Recording, Work,
};
use super::{Operand, PTX};
use crate::{Error, Result};

/// What the driver library must support, as it counts: CUDA 12.4, whose PTX the
/// kernels are. Drivers of this and later versions are numbered 550 and up.
const CUDA_VERSION: i32 = 12_040;

/// The oldest compute capability: Ampere, the first with bf16 products.
const CAPABILITY: (i32, i32) = (8, 0);

/// cuBLASLt's workspace; what NVIDIA recommends for Hopper.
const BLAS_WORKSPACE: usize = 32 << 20;

/// How to get the one library that does not come with the driver.
const INSTALL_CUBLAS: &str = "pip install nvidia-cublas-cu12, or put the folder of libcublasLt.so.12 on LD_LIBRARY_PATH; or use --device cpu";

/// The same where the driver is too old for version 13, which is taken first.
const OLDER_CUBLAS: &str = "this driver takes cuBLAS 12 (pip install nvidia-cublas-cu12): put its folder on LD_LIBRARY_PATH, with no libcublasLt.so.13 there; or update the driver to version 580; or use --device cpu";

/// What cuBLAS 13 needs of the driver, as that counts.
const CUDA_13: i32 = 13_000;

const DRIVER_REMEDY: &str =
    "see what nvidia-smi says; free the GPU or restart it, or use --device cpu";

/// What a driver that is there supports.
fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the library is there, and the out-pointer is valid.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|e| failed("the NVIDIA driver", e))?;
    Ok(version)
}

fn unusable(problem: impl Into<String>, remedy: &'static str) -> Error {
    Error::Device {
        problem: problem.into(),
        remedy,
    }
}

/// A failed call of the driver library, in its own words.
fn failed(what: &str, error: cuda::DriverError) -> Error {
    let word = |text: Result<&CStr, cuda::DriverError>| {
        text.map_or_else(|_| "?".to_owned(), |t| t.to_string_lossy().into_owned())
    };
    unusable(
        format!(
            "{what}: {} ({})",
            word(error.error_string()),
            word(error.error_name())
        ),
        DRIVER_REMEDY,
    )
}

/// A product that cuBLASLt does not do.
fn refused(product: &Product, error: blas::CublasError) -> Error {
    unusable(
        format!("{product:?}: {error}"),
        "try another version of cuBLAS; or use --device cpu",
    )
}

/// Milliseconds between two events that have passed. Not cudarc's, which asks for a
/// function that drivers have only since CUDA 12.8.
///
/// # Safety
/// Both are live, of the current context, and recorded with their time.
unsafe fn elapsed(from: sys::CUevent, to: sys::CUevent) -> Result<f32, cuda::DriverError> {
    type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
    let mut milliseconds = 0.0;
    // SAFETY: the driver's function of this name has this type; the caller's promise.
    unsafe {
        let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0");
        let missing = |_| cuda::DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND);
        elapsed.map_err(missing)?(&mut milliseconds, from, to).result()?;
    }
    Ok(milliseconds)
}

/// Memory of the device in whose context this is, for use on that stream.
fn allocate(stream: sys::CUstream, what: &'static str, bytes: usize) -> Result<Address> {
    // SAFETY: the memory is only used on this stream.
    match unsafe { cuda::malloc_async(stream, bytes) } {
        Ok(address) => Ok(address),
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Err(Error::OutOfMemory { what, bytes })
        }
        Err(e) => Err(failed(what, e)),
    }
}

/// Host memory that stays in place, with undefined contents.
fn page_lock(bytes: usize, flags: u32, what: &str) -> Result<*mut c_void> {
    // SAFETY: asks for memory; who uses it writes it before it is read.
    unsafe { cuda::malloc_host(bytes, flags) }.map_err(|e| {
        let megabytes = bytes.div_ceil(1_000_000);
        unusable(
            format!("{megabytes} MB of page-locked host memory, for {what}: {e}"),
            "free host memory, or raise the limit on what may be locked (ulimit -l)",
        )
    })
}

/// What tells products apart for which cuBLASLt picks an algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    size: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    precision: Precision,
    /// Trailing zeros of the addresses, up to 16 bytes: algorithms ask for alignment.
    alignment: [u32; 3],
}

/// A product as cuBLASLt holds it, with the algorithm it chose: kept, so that the
/// same product is always computed in the same way.
struct Plan {
    desc: blas_sys::cublasLtMatmulDesc_t,
    a: blas_sys::cublasLtMatrixLayout_t,
    b: blas_sys::cublasLtMatrixLayout_t,
    c: blas_sys::cublasLtMatrixLayout_t,
    algorithm: blas_sys::cublasLtMatmulAlgo_t,
}

// SAFETY: what the handles stand for is not changed once it is made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    /// An attribute of its algorithm, which has two bytes or four.
    fn attribute(
        &self,
        attribute: blas_sys::cublasLtMatmulAlgoConfigAttributes_t,
        bytes: usize,
    ) -> Option<u32> {
        let (mut value, mut written) = (0u32, 0);
        let to = std::ptr::from_mut(&mut value).cast();
        // SAFETY: the algorithm is whole, and there is room for so many bytes.
        let status = unsafe {
            blas_sys::cublasLtMatmulAlgoConfigGetAttribute(
                &self.algorithm,
                attribute,
                to,
                bytes,
                &mut written,
            )
        };
        status.result().ok().map(|()| value)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: its last owner lets go of them; a product that is queued has what it needs.
        unsafe {
            let _ = blas::destroy_matmul_desc(self.desc);
            for layout in [self.a, self.b, self.c] {
                let _ = blas::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The most plans that are kept: a training run has some forty for every number of tokens.
const PLANS: usize = 1 << 14;

/// Page-locked host memory, which the device copies to and from while the host goes on.
struct Pinned {
    at: *mut c_void,
    bytes: usize,
}

/// Largest piece of an upload. Every upload goes by way of page-locked memory: a copy
/// from pageable memory may wait for all that is queued, which a batch's ids must not,
/// and moves at half the speed, which weights should not.
const PIECE: usize = 16 << 20;

/// Most page-locked memory of uploads under way: while one piece is on the bus the next
/// is filled.
const UNDER_WAY: usize = 2 * PIECE;

/// What page-locked memory for so many bytes takes: one of a few sizes, so that it is
/// used again, and a few numbers never take what a weight's piece will ask for.
fn pinned_size(bytes: usize) -> usize {
    const SMALL: usize = 1 << 20;
    match bytes {
        ..=SMALL => bytes.next_power_of_two().max(4096),
        _ => bytes.next_multiple_of(PIECE),
    }
}

/// A staged piece of an upload: page-locked memory, and the event behind its copy.
struct Staged {
    event: sys::CUevent,
    pinned: Pinned,
}

/// The parts of a device that readings outlive.
struct Context {
    ordinal: usize,
    name: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    pinned: Mutex<Vec<Pinned>>,
    /// Uploads under way, in their order.
    staged: Mutex<VecDeque<Staged>>,
}

// SAFETY: the handles may be used from any thread whose current context is this
// one, which `enter` sees to; the lists are locked.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes this the calling thread's device.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { cuda::ctx::set_current(self.context) }.map_err(|e| failed("the GPU", e))
    }

    /// Page-locked memory of this size or a little more, used again where there is some.
    fn pin(&self, bytes: usize) -> Result<Pinned> {
        let mut free = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = pinned_size(bytes);
        if let Some(i) = free.iter().position(|p| p.bytes == bytes) {
            return Ok(free.swap_remove(i));
        }
        let at = page_lock(bytes, 0, "copies")?;
        Ok(Pinned { at, bytes })
    }

    fn unpin(&self, pinned: Pinned) {
        let mut free = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(pinned);
    }

    /// An event behind what is queued so far.
    fn event(&self, flags: sys::CUevent_flags) -> Result<sys::CUevent, cuda::DriverError> {
        let event = cuda::event::create(flags)?;
        // SAFETY: the event was just created, and the stream lives as `self` does.
        unsafe { cuda::event::record(event, self.stream) }?;
        Ok(event)
    }

    /// Queues a copy of one piece by way of page-locked memory, and takes back that of
    /// copies that are done; where too much is under way, it waits for the first.
    fn stage(&self, bytes: &[u8], to: Address) -> Result<()> {
        let with = |e| failed("copying to the GPU", e);
        let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        let mut under_way: usize = staged.iter().map(|s| s.pinned.bytes).sum();
        while let Some(first) = staged.front() {
            if under_way + pinned_size(bytes.len()) > UNDER_WAY {
                // SAFETY: events in the list are live.
                unsafe { cuda::event::synchronize(first.event) }.map_err(with)?;
            } else {
                // SAFETY: as above.
                match unsafe { sys::cuEventQuery(first.event) } {
                    sys::CUresult::CUDA_ERROR_NOT_READY => break,
                    other => other.result().map_err(with)?,
                }
            }
            let Staged { event, pinned } = staged.pop_front().expect("there is a first");
            under_way -= pinned.bytes;
            // SAFETY: the event is nobody else's.
            unsafe { cuda::event::destroy(event) }.map_err(with)?;
            self.unpin(pinned);
        }
        let pinned = self.pin(bytes.len())?;
        // SAFETY: the memory is at least this large and, being in no list, nobody
        // else's until the event behind the copy has passed.
        unsafe {
            let at = pinned.at.cast::<u8>();
            at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            let source = std::slice::from_raw_parts(at, bytes.len());
            cuda::memcpy_htod_async(to, source, self.stream).map_err(with)?;
        }
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = self.event(untimed).map_err(with)?;
        staged.push_back(Staged { event, pinned });
        Ok(())
    }
}

/// An NVIDIA GPU.
pub struct Nvidia {
    context: Arc<Context>,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, Function>>,
    blas: blas_sys::cublasLtHandle_t,
    workspace: sys::CUdeviceptr,
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
}

/// A version of CUDA as people write it.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A kernel, and how much dynamic shared memory it may be started with.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction, u32);

// SAFETY: as for `Context`; the maps are locked.
unsafe impl Send for Nvidia {}
// SAFETY: as above.
unsafe impl Sync for Nvidia {}

impl Nvidia {
    /// How many GPUs there are: none without a driver.
    ///
    /// # Errors
    /// If there is a GPU whose driver does not work, or is too old.
    pub fn count() -> Result<usize> {
        // SAFETY: opening the library runs its initialisers, nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Ok(0);
        }
        match cuda::init() {
            Ok(()) => {}
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            Err(e) => return Err(failed("the NVIDIA driver does not start", e)),
        }
        let count = cuda::device::get_count().map_err(|e| failed("counting GPUs", e))?;
        if count == 0 {
            return Ok(0); // whatever its age
        }
        let version = driver_version()?;
        if version < CUDA_VERSION {
            return Err(unusable(
                format!(
                    "the NVIDIA driver supports CUDA {}, and 12.4 is needed",
                    dotted(version)
                ),
                "update the driver to version 550 or later; or use --device cpu",
            ));
        }
        Ok(count as usize)
    }

    /// Opens GPU `ordinal`, from 0 as CUDA counts those that are visible.
    ///
    /// # Errors
    /// If there is no such GPU, it is too old, or cuBLASLt is nowhere to be found.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(unusable(
                format!("there is no GPU {ordinal}: {count} found"),
                "see nvidia-smi -L and CUDA_VISIBLE_DEVICES; or use --device cpu",
            ));
        }
        let with = |e| failed("opening the GPU", e);
        let device = cuda::device::get(ordinal as i32).map_err(with)?;
        let name = cuda::device::get_name(device).map_err(with)?;
        // SAFETY: `device` comes from the driver.
        let attribute = |a| unsafe { cuda::device::get_attribute(device, a) }.map_err(with);
        use sys::CUdevice_attribute as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY {
            return Err(unusable(
                format!(
                    "the {name} has compute capability {}.{}, and bf16 needs 8.0",
                    capability.0, capability.1
                ),
                "use a GPU of the Ampere generation (RTX 30, A100) or later; or --device cpu",
            ));
        }
        if attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
            return Err(unusable(
                format!("the {name}, as it is shared out here, has no memory pools"),
                "use a whole GPU, or a virtual one with unified memory enabled; or --device cpu",
            ));
        }
        open_cublas()?;

        // SAFETY: `device` comes from the driver; the context is released on drop.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(with)?;
        // SAFETY: the context was just retained.
        unsafe { cuda::ctx::set_current(context) }.map_err(with)?;
        let stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(with)?;
        // Freed memory stays ours, to be handed out again without asking the system.
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and this attribute is a u64.
        let pool = unsafe {
            let pool = cuda::device::get_default_mem_pool(device).map_err(with)?;
            let value = std::ptr::from_mut(&mut keep).cast();
            cuda::mem_pool::set_attribute(pool, threshold, value).map_err(with)?;
            pool
        };
        let source = CString::new(PTX).expect("PTX is text");
        // SAFETY: the image is a string that ends with a zero.
        let module = unsafe { cuda::module::load_data(source.as_ptr().cast()) }
            .map_err(|e| failed("compiling the kernels for this GPU", e))?;
        let too_new = driver_version()? < CUDA_13;
        let blas = blas::create_handle().map_err(|e| {
            let remedy = match too_new {
                true => OLDER_CUBLAS,
                false => INSTALL_CUBLAS,
            };
            unusable(format!("cuBLASLt does not start: {e}"), remedy)
        })?;
        let workspace = allocate(stream, "the workspace of products", BLAS_WORKSPACE)?;
        Ok(Self {
            context: Arc::new(Context {
                ordinal,
                name,
                context,
                stream,
                pool,
                pinned: Mutex::default(),
                staged: Mutex::default(),
            }),
            module,
            functions: Mutex::default(),
            blas,
            workspace,
            plans: Mutex::default(),
        })
    }

    /// The function of a kernel, which is told how much shared memory it gets: more than 48
    /// KB, its own included, are refused otherwise.
    fn function(&self, launch: &Launch<'_>) -> Result<sys::CUfunction> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(&Function(f, shared)) = functions.get(launch.kernel)
            && launch.shared <= shared
        {
            return Ok(f);
        }
        let with = |e| failed(launch.kernel, e);
        let name = CString::new(launch.kernel).expect("a kernel's name is text");
        // SAFETY: the module is loaded as long as `self` lives.
        let f = unsafe { cuda::module::get_function(self.module, name) }.map_err(with)?;
        if launch.shared > 0 {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            unsafe { cuda::function::set_function_attribute(f, most, launch.shared as i32) }
                .map_err(with)?;
        }
        functions.insert(launch.kernel, Function(f, launch.shared));
        Ok(f)
    }

    /// The layouts and the algorithm of a product.
    fn plan(&self, product: &Product) -> Result<Arc<Plan>> {
        let alignment = |address: Address| address.trailing_zeros().min(4);
        let (to, _) = product.out;
        let added = product.add.map_or(to, |(added, _)| added);
        let key = Shape {
            size: product.size,
            strides: [product.a.stride, product.b.stride, product.out.1],
            transposed: [product.a.transposed, product.b.transposed],
            precision: product.precision,
            alignment: [product.a.address, product.b.address, to | added].map(alignment),
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let choice = self.choose(product, key.alignment);
        let plan = Arc::new(choice.map_err(|e| refused(product, e))?);
        if plans.len() == PLANS {
            // What a product is computed with depends on nothing but its shape.
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    /// Asks cuBLASLt. It thinks in columns: a row-major matrix is its transpose to
    /// it, so `out = a b` is asked for as `outᵀ = bᵀ aᵀ`.
    fn choose(&self, product: &Product, alignment: [u32; 3]) -> Result<Plan, blas::CublasError> {
        use blas_sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        use blas_sys::{
            cublasLtMatmulDescAttributes_t as Attribute,
            cublasLtMatmulPreferenceAttributes_t as Preference,
        };
        let [m, n, k] = product.size;
        let compute = blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = blas::create_matmul_desc(compute, CUDA_R_32F)?;
        let set = |attribute, operand: &Operand| {
            let operation = i32::from(operand.transposed);
            let at = std::ptr::from_ref(&operation).cast();
            // SAFETY: the descriptor is live, and the attribute is a 32-bit integer.
            unsafe { blas::set_matmul_desc_attribute(desc, attribute, at, 4) }
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &product.b)?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &product.a)?;
        let layout = |operand: &Operand, [rows, cols]: [usize; 2]| {
            let [rows, cols] = match operand.transposed {
                false => [rows, cols],
                true => [cols, rows],
            };
            blas::create_matrix_layout(CUDA_R_16BF, cols as u64, rows as u64, operand.stride as i64)
        };
        let a = layout(&product.b, [k, n])?;
        let b = layout(&product.a, [m, k])?;
        let stored = match product.precision {
            Precision::Bf16 => CUDA_R_16BF,
            Precision::F32 => CUDA_R_32F,
        };
        let c = blas::create_matrix_layout(stored, n as u64, m as u64, product.out.1 as i64)?;
        let preference = blas::create_matmul_pref()?;
        let prefer = |attribute, value: *const c_void, size| {
            // SAFETY: the preference is live, and the value as large as said.
            unsafe { blas::set_matmul_pref_attribute(preference, attribute, value, size) }
        };
        let workspace = BLAS_WORKSPACE;
        prefer(
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            std::ptr::from_ref(&workspace).cast(),
            size_of::<usize>(),
        )?;
        // A long sum may be split among blocks: its parts must be added up as they are
        // computed, in f32, not as the result is stored.
        let reduction =
            blas_sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        prefer(
            Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            std::ptr::from_ref(&reduction).cast(),
            4,
        )?;
        let [out_a, out_b, out_c] = [alignment[1], alignment[0], alignment[2]].map(|z| 1u32 << z);
        for (attribute, bytes) in [
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                out_a,
            ),
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                out_b,
            ),
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                out_c,
            ),
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                out_c,
            ),
        ] {
            prefer(attribute, std::ptr::from_ref(&bytes).cast(), 4)?;
        }
        // SAFETY: all descriptors are live; the preference is not used afterwards.
        let choice = unsafe {
            let choice = blas::get_matmul_algo_heuristic(self.blas, desc, a, b, c, c, preference);
            blas::destroy_matmul_pref(preference)?;
            choice?
        };
        Ok(Plan {
            desc,
            a,
            b,
            c,
            algorithm: choice.algo,
        })
    }

    fn launch_on(&self, stream: sys::CUstream, launch: &Launch<'_>) -> Result<()> {
        let function = self.function(launch)?;
        let mut args: Vec<*mut c_void> =
            launch.args.iter().map(|a| a.as_ptr().cast_mut()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the arguments are those of the kernel in number and type (checked
        // against the kernels' signatures by the tests), are copied before the call
        // returns, and point into buffers of the backend's.
        unsafe {
            cuda::launch_kernel(
                function,
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared,
                stream,
                &mut args,
            )
        }
        .map_err(|e| failed(launch.kernel, e))
    }

    fn multiply_on(&self, stream: sys::CUstream, product: &Product) -> Result<()> {
        if product.is_empty() {
            return Ok(());
        }
        let plan = self.plan(product)?;
        let (alpha, beta) = (
            product.scale,
            if product.add.is_some() { 1f32 } else { 0f32 },
        );
        let (c, _) = product.add.unwrap_or(product.out);
        // SAFETY: the layouts describe ranges inside buffers of the backend's; factors
        // are read before the call returns; `out` may be `add`, with the same layout.
        unsafe {
            blas::matmul(
                self.blas,
                plan.desc,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                product.b.address as *const c_void,
                plan.a,
                product.a.address as *const c_void,
                plan.b,
                c as *const c_void,
                plan.c,
                product.out.0 as *mut c_void,
                plan.c,
                &plan.algorithm,
                self.workspace as *mut c_void,
                BLAS_WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| refused(product, e))
    }

    fn queue_on(&self, stream: sys::CUstream, work: &Work) -> Result<()> {
        match work {
            Work::Launch(shape, args) => self.launch_on(stream, &Launch { args, ..*shape }),
            Work::Multiply(product) => self.multiply_on(stream, product),
            Work::Zero(at, bytes) => self.zero_on(stream, *at, *bytes),
        }
    }

    fn zero_on(&self, stream: sys::CUstream, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: the backend asks for ranges inside its own buffers.
        unsafe { cuda::memset_d8_async(at, 0, bytes, stream) }.map_err(|e| failed("zeroing", e))
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: nothing that uses the workspace, the module or the handle
            // outlives `self`; the stream still orders the work under way. The process
            // goes on whatever these calls say.
            unsafe {
                let _ = cuda::free_async(self.workspace, self.context.stream);
                let _ = cuda::stream::synchronize(self.context.stream);
                let plans = self.plans.get_mut();
                plans.unwrap_or_else(PoisonError::into_inner).clear();
                let _ = blas::destroy_handle(self.blas);
                let _ = cuda::module::unload(self.module);
            }
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            let pinned = self
                .pinned
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            let staged = self
                .staged
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the last owner of these handles lets go of them; the copies out of
            // staged memory are over when the stream has come to rest.
            unsafe {
                let _ = cuda::stream::synchronize(self.stream);
                for Staged { event, pinned } in staged.drain(..) {
                    let _ = cuda::event::destroy(event);
                    let _ = cuda::free_host(pinned.at);
                }
                for p in pinned {
                    let _ = cuda::free_host(p.at);
                }
                let _ = cuda::stream::destroy(self.stream);
                if let Ok(device) = cuda::device::get(self.ordinal as i32) {
                    let _ = cuda::primary_ctx::release(device);
                }
            }
        }
    }
}

/// A copy to the host under way, and the event behind it.
struct Copying {
    context: Arc<Context>,
    event: sys::CUevent,
    pinned: Option<Pinned>,
    bytes: usize,
}

// SAFETY: as for `Context`; the memory is this copy's own.
unsafe impl Send for Copying {}

impl Pending for Copying {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        self.context.enter()?;
        // SAFETY: the event was recorded and lives until `self` is dropped.
        unsafe { cuda::event::synchronize(self.event) }.map_err(|e| failed("the GPU failed", e))?;
        let pinned = self.pinned.take().expect("a copy is waited for once");
        // SAFETY: the copy has filled this much, and nobody writes it any more.
        let values = unsafe { std::slice::from_raw_parts(pinned.at.cast::<u8>(), self.bytes) };
        let values = values.to_vec();
        self.context.unpin(pinned);
        Ok(values)
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the event is this copy's own. Memory that was not waited for may
            // still be written, so that it can only be used again behind the event.
            unsafe {
                if let Some(pinned) = self.pinned.take()
                    && cuda::event::synchronize(self.event).is_ok()
                {
                    self.context.unpin(pinned);
                }
                let _ = cuda::event::destroy(self.event);
            }
        }
    }
}

impl Driver for Nvidia {
    fn describe(&self) -> String {
        format!("cuda:{} {}, bf16", self.context.ordinal, self.context.name)
    }

    fn hardware(&self) -> String {
        let driver = driver_version().map_or("?".into(), dotted);
        // SAFETY: it only returns a number.
        let blas = unsafe { blas_sys::cublasLtGetVersion() };
        format!(
            "{}, driver of CUDA {driver}, cuBLAS {blas}",
            self.context.name
        )
    }

    fn free(&self) -> Result<usize> {
        self.context.enter()?;
        let with = |e| failed("asking for free memory", e);
        // What was freed is kept to be handed out again, and counts as taken until it is
        // given back.
        // SAFETY: both live as long as the context.
        unsafe {
            cuda::stream::synchronize(self.context.stream).map_err(with)?;
            cuda::mem_pool::trim_to(self.context.pool, 0).map_err(with)?;
        }
        let (free, _total) = cuda::mem_get_info().map_err(with)?;
        Ok(free)
    }

    fn peak(&self) -> Result<usize> {
        self.context.enter()?;
        let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let mut bytes = 0u64;
        let at = std::ptr::from_mut(&mut bytes).cast();
        // SAFETY: the pool lives as long as the context, and this attribute is a u64.
        unsafe { cuda::mem_pool::get_attribute(self.context.pool, high, at) }
            .map_err(|e| failed("asking for the peak of memory", e))?;
        Ok(bytes as usize)
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Address> {
        self.context.enter()?;
        allocate(self.context.stream, what, bytes)
    }

    fn share(&self, bytes: usize) -> Result<Address> {
        self.context.enter()?;
        let at = page_lock(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP, "embeddings")?;
        // With unified addressing, which every 64-bit system has, the host's address is
        // the device's.
        Ok(at as Address)
    }

    fn unshare(&self, address: Address) {
        if self.context.enter().is_ok() {
            // SAFETY: the caller's address comes from `share`, once; nothing reads it any
            // more when the stream has come to rest.
            unsafe {
                let _ = cuda::stream::synchronize(self.context.stream);
                let _ = cuda::free_host(address as *mut c_void);
            }
        }
    }

    fn release(&self, address: Address) {
        if self.context.enter().is_ok() {
            // SAFETY: the caller's address comes from `allocate`, once. A device that
            // cannot free has failed, which the next reading reports.
            let _ = unsafe { cuda::free_async(address, self.context.stream) };
        }
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        self.context.enter()?;
        self.zero_on(self.context.stream, at, bytes)
    }

    fn write(&self, bytes: &[u8], to: Address) -> Result<()> {
        self.context.enter()?;
        for (piece, at) in bytes.chunks(PIECE).zip((to..).step_by(PIECE)) {
            self.context.stage(piece, at)?;
        }
        Ok(())
    }

    fn read(&self, from: Address, bytes: usize) -> Result<Box<dyn Pending>> {
        self.context.enter()?;
        let with = |e| failed("copying from the GPU", e);
        let pinned = self.context.pin(bytes)?;
        let to = pinned.at;
        let event =
            cuda::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(with)?;
        let mut copying = Copying {
            pinned: Some(pinned),
            context: self.context.clone(),
            event,
            bytes,
        };
        // SAFETY: `to` is page-locked memory of at least this size, which lives until
        // the event has passed; the source is inside a buffer of the backend's.
        let queued = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to, from, bytes, self.context.stream)
                .result()
                .and_then(|()| cuda::event::record(event, self.context.stream))
        };
        if let Err(error) = queued {
            // Perhaps under way with no event behind it: its memory is never used again.
            copying.pinned = None;
            return Err(with(error));
        }
        Ok(Box::new(copying))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.context.enter()?;
        self.launch_on(self.context.stream, launch)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.context.enter()?;
        self.multiply_on(self.context.stream, product)
    }

    fn algorithm(&self, product: &Product) -> Option<Algorithm> {
        use blas_sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
        if product.is_empty() {
            return None;
        }
        let plan = self.plan(product).ok()?;
        Some(Algorithm {
            id: plan.attribute(Attribute::CUBLASLT_ALGO_CONFIG_ID, 4)?,
            tile: plan.attribute(Attribute::CUBLASLT_ALGO_CONFIG_TILE_ID, 4)?,
            stages: plan.attribute(Attribute::CUBLASLT_ALGO_CONFIG_STAGES_ID, 4)?,
            cluster: plan.attribute(Attribute::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2)?,
            split: plan.attribute(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4)?,
        })
    }

    fn mark(&self) -> Result<Mark> {
        self.context.enter()?;
        let event = self.context.event(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(event.map_err(|e| failed("asking the GPU's clock", e))? as Mark)
    }

    fn between(&self, earlier: Mark, later: Mark) -> Result<f64> {
        self.context.enter()?;
        let [earlier, later] = [earlier, later].map(|mark| mark as sys::CUevent);
        // SAFETY: both come from `mark`, once; each is destroyed whatever comes before.
        let milliseconds = unsafe {
            let passed = cuda::event::synchronize(later);
            let between = passed.and_then(|()| elapsed(earlier, later));
            let gone = [earlier, later].map(|event| cuda::event::destroy(event));
            gone.into_iter()
                .collect::<Result<(), _>>()
                .and(between)
                .map_err(|e| failed("asking the GPU's clock", e))?
        };
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn record(&self, work: &[Work]) -> Result<Option<Box<dyn Recording>>> {
        self.context.enter()?;
        // Some versions of cuBLASLt choose no algorithm while anything is captured.
        for work in work {
            match work {
                Work::Launch(shape, args) => drop(self.function(&Launch { args, ..*shape })?),
                Work::Multiply(product) if !product.is_empty() => drop(self.plan(product)?),
                Work::Multiply(_) | Work::Zero(..) => {}
            }
        }
        let with = |e| failed("recording work that comes again", e);
        let aside = CaptureStream::new().map_err(with)?;
        // In this thread alone: others may go on with the device's own stream.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a fresh stream, on which nothing but what is captured is queued.
        unsafe { cuda::stream::begin_capture(aside.0, mode) }.map_err(with)?;
        let captured = work
            .iter()
            .try_for_each(|work| self.queue_on(aside.0, work));
        // SAFETY: as above.
        let graph = unsafe { cuda::stream::end_capture(aside.0) };
        let executable = captured.and_then(|()| {
            let graph = graph.map_err(with)?;
            let flags = sys::CUgraphInstantiate_flags(0);
            // SAFETY: the graph is whole.
            unsafe { cuda::graph::instantiate(graph, flags) }.map_err(with)
        });
        if let Ok(graph) = graph {
            // SAFETY: an executable one needs it no more.
            let _ = unsafe { cuda::graph::destroy(graph) };
        }
        let executable = executable?;
        let graph = Graph {
            context: self.context.clone(),
            executable,
        };
        // What memory it takes it takes now, where the work can still go one by one.
        // SAFETY: both are live.
        unsafe { cuda::graph::upload(executable, self.context.stream) }.map_err(with)?;
        Ok(Some(Box::new(graph)))
    }
}

/// A stream on which nothing is done, only captured.
struct CaptureStream(sys::CUstream);

impl CaptureStream {
    fn new() -> Result<Self, cuda::DriverError> {
        cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map(Self)
    }
}

impl Drop for CaptureStream {
    fn drop(&mut self) {
        // SAFETY: this stream's only owner lets go of it.
        let _ = unsafe { cuda::stream::destroy(self.0) };
    }
}

/// Recorded work.
struct Graph {
    context: Arc<Context>,
    executable: sys::CUgraphExec,
}

// SAFETY: as for `Context`.
unsafe impl Send for Graph {}

impl Recording for Graph {
    fn play(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both live as long as `self`; what the graph uses is the same as when it
        // was recorded, and asked for now by who owns it.
        unsafe { cuda::graph::launch(self.executable, self.context.stream) }
            .map_err(|e| failed("queueing recorded work", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: its only owner lets go of it. Where it is under way it goes once it is
            // done, by the manual.
            let _ = unsafe { cuda::graph::exec_destroy(self.executable) };
        }
    }
}

/// Opens cuBLASLt where the system's loader finds it, or else in the folders of a
/// toolkit or of a Python: an opened library is found by its name from then on.
fn open_cublas() -> Result<()> {
    // SAFETY: opening the library runs its initialisers, nothing else.
    let present = || unsafe { blas_sys::is_culib_present() };
    if present() {
        return Ok(());
    }
    for folder in library_folders() {
        for name in ["libcublasLt.so.13", "libcublasLt.so.12"] {
            // SAFETY: as above. It stays open as long as the process.
            if let Ok(library) = unsafe { libloading::Library::new(folder.join(name)) } {
                std::mem::forget(library);
                if present() {
                    return Ok(());
                }
            }
        }
    }
    Err(unusable(
        "libcublasLt (version 12 or 13) was not found",
        INSTALL_CUBLAS,
    ))
}

/// The usual toolkit folder, then those of the Python in use, of that which a shell finds,
/// and of the user's own.
fn library_folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("/usr/local/cuda/lib64")];
    let mut roots = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        roots.extend(std::env::var_os(variable).map(PathBuf::from));
    }
    // A virtual environment's is a link to another's: the folder it was found in counts.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut bin = std::env::split_paths(&path).filter(|bin| bin.join("python3").is_file());
    roots.extend(bin.find_map(|bin| Some(bin.parent()?.to_owned())));
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    roots.extend(home);
    roots.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for root in roots {
        let Ok(versions) = std::fs::read_dir(root.join("lib")) else {
            continue;
        };
        for version in versions.flatten() {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = version.path().join(packages).join("nvidia");
                folders.extend([nvidia.join("cu13/lib"), nvidia.join("cublas/lib")]);
            }
        }
    }
    folders
}
