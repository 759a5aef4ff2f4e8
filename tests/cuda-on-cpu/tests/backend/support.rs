//! Running one check on several machines.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex};
use std::time::UNIX_EPOCH;

use cuda_on_cpu::{Emulated, Kernels, Order, Processor, Ptx};
use engine::cuda::{Address, Driver, Launch, Nvidia};
use engine::{Backend, Cuda, Rounded};
use half::bf16;

/// Random values: SplitMix64, uniform in ±1.
pub struct Draw(pub u64);

impl Draw {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn vec(&mut self, len: usize) -> Vec<f32> {
        let one = |_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..len).map(one).collect()
    }

    pub fn ids(&mut self, len: usize, below: u64) -> Vec<u32> {
        (0..len).map(|_| (self.bits() % below) as u32).collect()
    }
}

/// Input number `n` of this run, another in each; `CUDA_TESTS_SEED` has one again.
pub fn fresh(n: u64) -> Draw {
    static SEED: LazyLock<u64> = LazyLock::new(|| match std::env::var("CUDA_TESTS_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
    });
    println!("CUDA_TESTS_SEED={}", *SEED); // shown where a test fails
    let mut seed = Draw(*SEED ^ n);
    Draw(seed.bits())
}

/// A backend that takes activations from the host, rounded to bf16.
pub trait Machine: Backend {
    fn act(&self, values: &[f32]) -> Self::Act;

    /// Memory that shows if it is read, or not written.
    fn poisoned(&self, len: usize) -> Self::Act {
        self.act(&vec![f32::NAN; len])
    }

    fn poisoned_f32(&self, len: usize) -> Self::F32 {
        self.upload_f32(&vec![f32::NAN; len]).unwrap()
    }
}

impl Machine for Rounded {
    fn act(&self, values: &[f32]) -> Vec<f32> {
        values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
    }
}

impl Machine for Cuda {
    fn act(&self, values: &[f32]) -> Self::Act {
        self.upload_act(values).unwrap()
    }
}

/// Set where a test runs for the sake of the GPU, or its stand-in, alone.
pub const ONLY_GPU: &str = "CUDA_TESTS_ONLY_GPU";

/// Whether the devices on the processor are to be left out.
pub fn only_gpu() -> bool {
    std::env::var_os(ONLY_GPU).is_some()
}

/// Set where a test runs for the sake of the interpreted PTX alone.
pub const ONLY_PTX: &str = "CUDA_TESTS_ONLY_PTX";

/// Says which kernels of the PTX it runs.
struct Telling(Ptx);

impl Kernels for Telling {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn launch(
        &self,
        launch: &Launch<'_>,
        buffers: &BTreeMap<Address, usize>,
    ) -> engine::Result<()> {
        static TOLD: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
        self.0.launch(launch, buffers)?;
        if TOLD.lock().unwrap().insert(launch.kernel) {
            println!("interpreted: {}", launch.kernel);
        }
        Ok(())
    }
}

/// Set where a result beyond its limit is only told, for the first look at a new chip: all
/// of a test is seen then, and OVER marks what would have ended it.
const ONLY_TELL: &str = "CUDA_TESTS_ONLY_TELL";

/// The device that interprets the PTX.
pub fn interpreted() -> Cuda {
    Cuda::new(Box::new(Processor::of(Telling(Ptx::shipped())))).unwrap()
}

/// A device of the tests, whose every access is looked at.
pub fn emulated(order: Order) -> Cuda {
    Cuda::new(Box::new(Emulated::new(order, true))).unwrap()
}

/// The devices to check beside a GPU: one per order of threads, or that which interprets
/// the PTX, where the run is for its sake.
pub fn on_processor(orders: &[Order], checked: bool) -> Vec<Cuda> {
    if only_gpu() {
        return Vec::new();
    }
    if std::env::var_os(ONLY_PTX).is_some() {
        return vec![interpreted()];
    }
    let emulated = |&order| Cuda::new(Box::new(Emulated::new(order, checked))).unwrap();
    orders.iter().map(emulated).collect()
}

/// The GPU, if this machine has one, and it is to be tried. Where it is the only one to be
/// tried, it must be there.
pub fn gpu() -> Option<Cuda> {
    // One is kept open: else the last to close it would take its context down, and the next
    // make it anew.
    static KEPT: LazyLock<Option<Nvidia>> = LazyLock::new(|| {
        let wanted = std::env::var_os(ONLY_PTX).is_none();
        let found = wanted && Nvidia::count().expect("the driver works") > 0;
        assert!(found || !only_gpu(), "no GPU");
        let gpu = found.then(|| Nvidia::open(0).unwrap())?;
        println!("hardware: {}", gpu.hardware());
        Some(gpu)
    });
    KEPT.as_ref()
        .map(|_| Cuda::new(Box::new(Nvidia::open(0).unwrap())).unwrap())
}

/// Set where the stand-in for a GPU shall be unfit for something.
pub const UNFIT: &str = "CUDA_STAND_IN";

/// What the stand-in is where it records nothing.
pub const UNRECORDING: [&str; 3] = ["uncaptured", "uninstantiated", "not uploaded"];

/// Whether a device records what is repeated: the processor does not.
pub fn recorded(cuda: &Cuda) -> bool {
    let unable = std::env::var(UNFIT).is_ok_and(|how| UNRECORDING.contains(&&*how));
    cuda.describe().starts_with("cuda:") && !unable
}

/// `‖got - want‖ / ‖want‖`; infinite where anything is NaN.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let pairs = || {
        got.iter()
            .zip(want)
            .map(|(&g, &w)| (f64::from(g), f64::from(w)))
    };
    let off: f64 = pairs().map(|(g, w)| square(g - w)).sum();
    let size: f64 = pairs().map(|(_, w)| square(w)).sum();
    match off {
        0.0 => 0.0,
        _ if off.is_nan() => f64::INFINITY,
        _ => (off / size).sqrt(),
    }
}

/// Limits from here on are of values in bf16.
const BF16_LIMITS: f64 = 1e-5;

/// What the norm changes by, as a part of it, where the largest value is rounded to its
/// other neighbour in bf16.
pub fn half_step(values: &[f32]) -> f64 {
    let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let norm = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
    f64::from(largest) / 128.0 / norm.sqrt().max(f64::MIN_POSITIVE)
}

/// Runs a check on a device per order of threads, and on the GPU if there is one.
/// Result `i` must be within `limits[i % limits.len()]` of the reference's, and on
/// the CPU the same bits whatever the order.
pub fn compare(
    name: &str,
    limits: &[f64],
    reference: Vec<Vec<f32>>,
    run: impl Fn(&Cuda) -> Vec<Vec<f32>>,
) {
    compare_over(&Order::ALL, name, limits, reference, run);
}

/// [`compare`] over these orders of threads.
pub fn compare_over(
    orders: &[Order],
    name: &str,
    limits: &[f64],
    reference: Vec<Vec<f32>>,
    run: impl Fn(&Cuda) -> Vec<Vec<f32>>,
) {
    let check = |device: &Cuda| -> Vec<Vec<f32>> {
        let results = run(device);
        assert_eq!(results.len(), reference.len(), "{name}");
        for (i, (got, want)) in results.iter().zip(&reference).enumerate() {
            let off = distance(got, want);
            println!("{name}, result {i}, {}: {off:.1e}", device.describe());
            let limit = match limits[i % limits.len()] {
                exact if exact < BF16_LIMITS => exact,
                // One value may fall on the other side of a half, however few there are.
                limit => limit.hypot(half_step(want)),
            };
            if off > limit && std::env::var_os(ONLY_TELL).is_some() {
                println!("OVER: {name}, result {i}: {off:e} of {limit:e}");
                continue;
            }
            assert!(
                off <= limit,
                "{name}, result {i}, {}: {off:e}",
                device.describe()
            );
        }
        results
    };
    if let Some(gpu) = gpu() {
        check(&gpu);
    }
    let mut first = None;
    for device in on_processor(orders, true) {
        let results = check(&device);
        assert!(
            *first.get_or_insert_with(|| results.clone()) == results,
            "{name} depends on the order of threads: {}",
            device.describe()
        );
    }
}
