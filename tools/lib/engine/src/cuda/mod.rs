//! An NVIDIA GPU as a backend: kernels of our own (`cuda/kernels.cu`, embedded as
//! PTX) and cuBLASLt's products, both found at run time, so that one binary, built
//! with no CUDA installed, runs with a GPU and without.
//!
//! Activations are bf16; sums, statistics, adapters and their gradients are f32.
//! NF4 weights are decoded into scratch before their product: at training batches
//! that costs a few percent of the product, and the members of a group, decoded
//! side by side, become one product. Where there is memory to spare, the decoded weights
//! stay, and small batches are spared what is most of their time. Few tokens, as in
//! decoding, meet the codes directly (`few`). Every width must be a multiple of eight,
//! so that rows move in 16-byte pieces.

mod driver;
mod few;
mod head;
mod linear;
mod memory;
mod nvidia;
mod outputs;
mod quantize;
mod queue;
mod random;
mod thin;

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

pub use driver::{
    Address, Algorithm, Arg, Driver, Launch, Mark, Operand, Pending, Precision, Product, Recording,
    Work,
};
pub use memory::{Buffer, DeviceReading, Element};
pub use nvidia::Nvidia;

use crate::dynamic::Dynamic;
use crate::nf4::{self, Absmax, Nf4Tensor};
use crate::rng::{self, Purpose};
use crate::{
    AdamW, Adapter, Backend, Cache, Dropout, Error, Group, Heads, HostMatrix, LinearGrad,
    MOMENT_BLOCK, MatrixData, Neftune, QkNorms, Ragged, Reading, Result, Sampling, Spent, Stretch,
};
use memory::Shared;
use queue::Queue;

/// The kernels, as `make kernels` compiled them.
pub(crate) const PTX: &str = include_str!("../../cuda/kernels.ptx");

/// Blocks of the first pass of the global norm: the shape of its sum.
const NORM_BLOCKS: usize = 256;

/// Most blocks that a grid has in its second dimension.
const GRID_Y: usize = 65_535;

/// Blocks of 256 threads that an H100 or H200 runs at once, two for each of 132
/// multiprocessors. Not asked of the device: in what order gradients are summed, and what
/// scratch is planned, then depend on sizes alone. A chip of other size computes the same,
/// with a round of blocks that is not full (docs/gpu.md).
const AT_ONCE: usize = 264;

/// Features of a head for which `attention.cu` makes kernels.
const WIDTHS: [usize; 3] = [32, 64, 128];

/// Values of a block of `nf4_decode` (2048 · PIECES there).
const DECODED: usize = 8192;

/// Query heads of a block of `cache_attention` (SHARING there), and its threads.
const SHARING: (usize, u32) = (8, 128);

/// Threads of a block of `sample` (CHOOSERS there).
const CHOOSERS: u32 = 1024;

/// Queries, and keys, of a tile of the attention.
const TILE: usize = 64;

/// An NVIDIA GPU, or what stands in for one.
pub struct Cuda {
    queue: Arc<Queue>,
    /// What the codes of nested scales stand for.
    map: Buffer<f32>,
    /// The values, then the thresholds, of moments in 8 bits.
    moments: Buffer<f32>,
    /// Partial sums of the global norm.
    partial: Buffer<f64>,
    /// Zeros: see `few_ranks`.
    tickets: Buffer<u32>,
}

/// A frozen weight on the device.
pub struct Matrix {
    rows: usize,
    cols: usize,
    store: Store,
    /// Its values decoded, if they are kept: from that place on in the buffer of its
    /// group, whose quantised members lie there one below the other.
    decoded: Option<(Arc<Buffer<bf16>>, usize)>,
}

impl Matrix {
    fn new([rows, cols]: [usize; 2], store: Store) -> Self {
        Self {
            rows,
            cols,
            store,
            decoded: None,
        }
    }
}

enum Store {
    Dense(Buffer<bf16>),
    /// A table of embeddings in host memory.
    Shared(Shared),
    Nf4 {
        codes: Buffer<u8>,
        absmax: Buffer<f32>,
        /// Codes and offset of double-quantised scales.
        nested: Option<(Buffer<u8>, f32)>,
    },
}

/// The arguments of a launch: pointers, integers and floats by their Rust types.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::cuda::IntoArg::arg($value)),*] };
}
use args;

trait IntoArg {
    fn arg(self) -> Arg;
}

impl IntoArg for Address {
    fn arg(self) -> Arg {
        Arg::Pointer(self)
    }
}

impl IntoArg for u32 {
    fn arg(self) -> Arg {
        Arg::U32(self)
    }
}

/// Sizes are `u32` in kernels, unless they count elements of a whole buffer.
impl IntoArg for usize {
    fn arg(self) -> Arg {
        Arg::U32(u32::try_from(self).expect("a dimension fits 32 bits"))
    }
}

impl IntoArg for f32 {
    fn arg(self) -> Arg {
        Arg::F32(self)
    }
}

/// A count of elements.
struct Count(usize);

impl IntoArg for Count {
    fn arg(self) -> Arg {
        Arg::U64(self.0 as u64)
    }
}

impl Cuda {
    /// Takes over a device.
    ///
    /// # Errors
    /// If it has no room even for a table.
    pub fn new(driver: Box<dyn Driver>) -> Result<Self> {
        let queue = Arc::new(Queue::new(driver));
        Ok(Self {
            map: Buffer::of(&queue, "tables", nf4::dynamic_map())?,
            moments: Buffer::of(&queue, "tables", &moment_tables())?,
            partial: Buffer::new(&queue, "sums", NORM_BLOCKS)?,
            tickets: Buffer::zeroed(&queue, "tables", few::TICKETS)?,
            queue,
        })
    }

    /// What the last bits of a result hang on: the chip and its libraries.
    pub fn hardware(&self) -> String {
        self.queue.hardware()
    }

    /// How often [repeated](Backend::repeat) work was queued as a whole; for tests.
    pub fn played(&self) -> usize {
        self.queue.played()
    }

    /// A buffer holding these activations, rounded to bf16.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn upload_act(&self, values: &[f32]) -> Result<Buffer<bf16>> {
        let values: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        Buffer::of(&self.queue, "activations", &values)
    }

    /// Queues `blocks` blocks of 256 threads.
    fn launch(&self, kernel: &'static str, blocks: usize, args: &[Arg]) {
        self.launch_shaped(kernel, [blocks, 1, 1], 256, 0, args);
    }

    /// Queues a thread for each of `count` elements.
    fn launch_each(&self, kernel: &'static str, count: usize, args: &[Arg]) {
        self.launch(kernel, count.div_ceil(256), args);
    }

    fn launch_shaped(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: u32,
        shared: usize,
        args: &[Arg],
    ) {
        if grid.contains(&0) {
            return; // no tokens, no work
        }
        let size = |n: usize| u32::try_from(n).expect("a grid fits 32 bits");
        self.queue.launch(&Launch {
            kernel,
            grid: grid.map(size),
            block,
            shared: size(shared),
            args,
        });
    }

    /// The kernel of a head width, and its scratch of `tiles` tiles.
    fn attention_kernel(
        heads: Heads,
        names: [&'static str; 3],
        tiles: usize,
    ) -> (&'static str, usize) {
        let width = WIDTHS.iter().position(|&width| width == heads.dim);
        let name = names[width.expect("the model was accepted")];
        (name, tiles * TILE * (heads.dim + 8) * size_of::<bf16>())
    }

    /// Rows `rows` of a weight as bf16, decoded to `scratch` unless they lie somewhere.
    fn decode(&self, matrix: &Matrix, rows: Range<usize>, scratch: Address) -> Address {
        let range = rows.start * matrix.cols..rows.end * matrix.cols;
        if let Some((values, first)) = &matrix.decoded {
            return values.at(first + range.start..first + range.end);
        }
        match &matrix.store {
            Store::Dense(values) => values.at(range),
            Store::Shared(_) => panic!("a table is looked up in, not multiplied by"),
            Store::Nf4 {
                codes,
                absmax,
                nested,
            } => {
                let (nested, offset) = match nested {
                    Some((nested, offset)) => (nested.first(nested.len()), *offset),
                    None => (0, 0.0),
                };
                let args = args![
                    codes.first(codes.len()),
                    nested,
                    absmax.first(absmax.len()),
                    self.map.first(256),
                    offset,
                    Count(range.start),
                    Count(range.len()),
                    scratch,
                ];
                self.launch("nf4_decode", range.len().div_ceil(DECODED), args);
                scratch
            }
        }
    }

    fn round(&self, from: Address, len: usize, to: Address) {
        self.launch_each("to_bf16", len, args![from, Count(len), to]);
    }
}

/// The factors of an update, as `optimiser.cu` names them.
fn rates(settings: &AdamW, stretch: &Stretch) -> [f32; 8] {
    let AdamW { beta1, beta2, .. } = *settings;
    let correction = |beta: f64| 1.0 - beta.powf(settings.step as f64);
    [
        settings.max_norm.unwrap_or(f32::INFINITY),
        (1.0 - beta1) as f32,
        beta2 as f32,
        (1.0 - beta2) as f32,
        (1.0 - stretch.lr * stretch.decay) as f32,
        (stretch.lr / correction(beta1)) as f32,
        correction(beta2).sqrt() as f32,
        settings.eps as f32,
    ]
}

/// What `adamw_8bit` looks codes up in, 256 floats each: the values of both moments,
/// then the thresholds, of which there are 255.
fn moment_tables() -> Vec<f32> {
    let maps = [Dynamic::moment(), Dynamic::unsigned()];
    let values = maps.iter().flat_map(|map| map.values());
    let thresholds = maps.iter().flat_map(|map| {
        let end = std::iter::once(&f32::INFINITY);
        map.thresholds().iter().chain(end)
    });
    values.chain(thresholds).copied().collect()
}

/// Rows move in pieces of sixteen bytes.
fn check_width([rows, cols]: [usize; 2]) -> Result<()> {
    match cols % 8 {
        0 => Ok(()),
        _ => Err(Error::Device {
            problem: format!("a weight [{rows}, {cols}]: its rows are no multiple of 8 wide"),
            remedy: "use --device cpu for this model",
        }),
    }
}

fn scale_of(heads: Heads) -> f32 {
    1.0 / (heads.dim as f32).sqrt()
}

impl Backend for Cuda {
    type Act = Buffer<bf16>;
    type F32 = Buffer<f32>;
    type Ids = Buffer<u32>;
    type Matrix = Matrix;
    type Workspace = Buffer<u8>;
    type Reading = DeviceReading<f32>;
    type IdsReading = DeviceReading<u32>;

    const ACT_BYTES: usize = size_of::<bf16>();
    const RUNS_AHEAD: bool = true;

    fn describe(&self) -> String {
        self.queue.describe()
    }

    fn unrecorded(&self) -> Option<String> {
        self.queue.unrecorded()
    }

    fn accepts(&self, heads: Heads) -> Result<()> {
        if WIDTHS.contains(&heads.dim) {
            return Ok(());
        }
        Err(Error::Device {
            problem: format!(
                "heads of {} features: there are kernels for {WIDTHS:?}",
                heads.dim
            ),
            remedy: "use --device cpu for this model",
        })
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.queue.device().free().map(Some)
    }

    fn peak_memory(&self) -> Result<Option<usize>> {
        self.queue.device().peak().map(Some)
    }

    fn alloc_act(&self, len: usize) -> Result<Buffer<bf16>> {
        Buffer::zeroed(&self.queue, "activations", len)
    }

    fn alloc_f32(&self, len: usize) -> Result<Buffer<f32>> {
        Buffer::zeroed(&self.queue, "parameters and statistics", len)
    }

    fn alloc_ids(&self, len: usize) -> Result<Buffer<u32>> {
        Buffer::zeroed(&self.queue, "indices", len)
    }

    fn alloc_workspace(&self, bytes: usize) -> Result<Buffer<u8>> {
        Buffer::new(&self.queue, "scratch", bytes)
    }

    fn upload_matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        check_width([rows, cols])?;
        let what = "weights";
        let store = match matrix.data {
            MatrixData::F32(values) => {
                let narrow: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                Store::Dense(Buffer::of(&self.queue, what, &narrow)?)
            }
            MatrixData::Bf16(values) => Store::Dense(Buffer::of(&self.queue, what, &values)?),
            MatrixData::Nf4(tensor) => {
                let (absmax, nested) = match tensor.absmax() {
                    Absmax::Plain(scales) => (scales, None),
                    Absmax::Nested {
                        codes,
                        absmax,
                        offset,
                    } => {
                        let codes = Buffer::of(&self.queue, what, codes)?;
                        (absmax, Some((codes, *offset)))
                    }
                };
                Store::Nf4 {
                    codes: Buffer::of(&self.queue, what, tensor.packed())?,
                    absmax: Buffer::of(&self.queue, what, absmax)?,
                    nested,
                }
            }
        };
        Ok(Matrix::new([rows, cols], store))
    }

    /// A table in bf16 stays in the host's memory, from where a pass reads eight
    /// kilobytes a token at most; any other goes to the device. Host memory that cannot
    /// be locked is an error: the device may have been planned full without the table.
    fn upload_table(&self, table: HostMatrix) -> Result<Matrix> {
        let HostMatrix { rows, cols, data } = table;
        match data {
            MatrixData::Bf16(values) if cols % 8 == 0 => Ok(Matrix::new(
                [rows, cols],
                Store::Shared(Shared::of(&self.queue, &values)?),
            )),
            data => self.upload_matrix(HostMatrix { rows, cols, data }),
        }
    }

    fn random_matrix(&self, shape: [usize; 2], quantised: bool, number: u32) -> Result<Matrix> {
        self.random_here(shape, quantised, number)
    }

    fn random_table(&self, shape: [usize; 2], number: u32) -> Result<Matrix> {
        self.random_there(shape, number)
    }

    fn quantize(&self, matrix: &HostMatrix) -> Result<Nf4Tensor> {
        self.quantize_here(matrix)
    }

    fn upload_f32(&self, values: &[f32]) -> Result<Buffer<f32>> {
        Buffer::of(&self.queue, "parameters and statistics", values)
    }

    fn upload_ids(&self, values: &[u32]) -> Result<Buffer<u32>> {
        Buffer::of(&self.queue, "indices", values)
    }

    fn write_ids(&self, values: &[u32], out: &mut Buffer<u32>) -> Result<()> {
        out.write(values)
    }

    fn write_f32(&self, values: &[f32], out: &mut Buffer<f32>) -> Result<()> {
        out.write(values)
    }

    fn zero(&self, out: &mut Buffer<f32>, len: usize) {
        out.zero(len);
    }

    fn zero_act(&self, out: &mut Buffer<bf16>, len: usize) {
        out.zero(len);
    }

    fn read_f32(&self, buffer: &Buffer<f32>, range: Range<usize>) -> DeviceReading<f32> {
        buffer.read(range)
    }

    fn read_act(&self, buffer: &Buffer<bf16>, len: usize) -> Result<Vec<f32>> {
        let values = buffer.read(0..len).wait()?;
        Ok(values.into_iter().map(f32::from).collect())
    }

    fn read_ids(&self, buffer: &Buffer<u32>, len: usize) -> DeviceReading<u32> {
        buffer.read(0..len)
    }

    fn repeat<R>(&self, work: impl FnOnce() -> R) -> R {
        self.queue.repeat(work)
    }

    fn profile<R>(&self, work: impl FnOnce() -> R) -> Result<(R, Vec<Spent>)> {
        self.queue.profile(work)
    }

    /// Of few sizes, so that most steps are like one before; in steps of what a tile of a
    /// product has anyway.
    fn decoding_rows(&self, replies: usize) -> usize {
        match replies {
            0..=8 => 8,
            9..=16 => 16,
            _ => replies.next_multiple_of(32),
        }
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        let values = matrix.rows * matrix.cols;
        match &matrix.store {
            Store::Dense(_) => values * size_of::<bf16>(),
            Store::Shared(_) => 0,
            Store::Nf4 { nested, .. } => nf4::bytes(values, nested.is_some()),
        }
    }

    fn decoded_bytes(&self, group: &[Matrix]) -> usize {
        linear::decoded_len(group) * size_of::<bf16>()
    }

    fn keep_decoded(&self, group: &mut [Matrix]) -> Result<()> {
        let len = linear::decoded_len(&*group);
        if len == 0 || group.iter().any(|matrix| matrix.decoded.is_some()) {
            return Ok(());
        }
        let values = Arc::new(Buffer::new(&self.queue, "decoded weights", len)?);
        let quantised = |matrix: &&mut Matrix| matches!(matrix.store, Store::Nf4 { .. });
        let mut first = 0;
        for matrix in group.iter_mut().filter(quantised) {
            let len = matrix.rows * matrix.cols;
            self.decode(matrix, 0..matrix.rows, values.at(first..first + len));
            matrix.decoded = Some((values.clone(), first));
            first += len;
        }
        Ok(())
    }

    fn shape(&self, matrix: &Matrix) -> [usize; 2] {
        [matrix.rows, matrix.cols]
    }

    fn linear_scratch(&self, weights: &[&Matrix], size: [usize; 2], dora: bool) -> usize {
        linear::scratch(weights, size, dora)
    }

    fn dora_scratch(&self, weight: &Matrix, rank: usize) -> usize {
        linear::norms_scratch(weight, rank)
    }

    fn attention_scratch(&self, _: Heads, _: usize) -> usize {
        0 // everything is in shared memory
    }

    fn head_scratch(&self, head: &Matrix, rows: usize) -> usize {
        head::scratch(head, rows)
    }

    fn embed(&self, table: &Matrix, ids: &Buffer<u32>, tokens: usize, out: &mut Buffer<bf16>) {
        let len = tokens * table.cols;
        let table = match &table.store {
            Store::Dense(values) => values.first(values.len()),
            Store::Shared(values) => values.address,
            Store::Nf4 { .. } => panic!("an embedding table is not quantised"),
        };
        let args = args![
            table,
            ids.first(tokens),
            len / tokens.max(1),
            out.first(len)
        ];
        self.launch("gather", tokens, args);
    }

    fn add_noise(&self, noise: &Neftune, rows: &Ragged<Self>, width: usize, x: &mut Buffer<bf16>) {
        let (tokens, count) = (rows.tokens(), rows.bounds().len() - 1);
        let stream = rng::Stream {
            seed: noise.seed,
            purpose: Purpose::Neftune,
            layer: 0,
            module: 0,
        };
        let args = args![
            rows.bounds_on_device.first(count + 1),
            rows.rows.first(tokens),
            width,
            Arg::U64(stream.seed),
            noise.step,
            stream.tag(),
            noise.alpha,
            x.first(tokens * width),
        ];
        let blocks = [count, rows.longest().min(GRID_Y), 1];
        let threads = (width / 8).next_multiple_of(32).min(256) as u32;
        self.launch_shaped("add_noise", blocks, threads, 0, args);
    }

    fn gather(
        &self,
        x: &Buffer<bf16>,
        index: &Buffer<u32>,
        [count, width]: [usize; 2],
        out: &mut Buffer<bf16>,
    ) {
        let (from, to) = (x.first(0), out.first(count * width));
        self.launch("gather", count, args![from, index.first(count), width, to]);
    }

    fn gather_ids(
        &self,
        x: &Buffer<u32>,
        index: &Buffer<u32>,
        count: usize,
        out: &mut Buffer<u32>,
    ) {
        let args = args![x.first(0), index.first(count), count, out.first(count)];
        self.launch_each("gather_ids", count, args);
    }

    fn scatter_ids(
        &self,
        x: &Buffer<u32>,
        index: &Buffer<u32>,
        count: usize,
        out: &mut Buffer<u32>,
    ) {
        let args = args![x.first(count), index.first(count), count, out.first(0)];
        self.launch_each("scatter_ids", count, args);
    }

    fn scatter(
        &self,
        x: &Buffer<bf16>,
        index: &Buffer<u32>,
        [count, tokens, width]: [usize; 3],
        out: &mut Buffer<bf16>,
    ) {
        out.zero(tokens * width);
        let (from, to) = (x.first(count * width), out.first(tokens * width));
        self.launch("scatter", count, args![from, index.first(count), width, to]);
    }

    fn rms_norm(
        &self,
        x: &Buffer<bf16>,
        (weight, eps): (&Buffer<f32>, f32),
        [tokens, width]: [usize; 2],
        out: &mut Buffer<bf16>,
        rstd: &mut Buffer<f32>,
    ) {
        let len = tokens * width;
        let args = args![
            x.first(len),
            weight.first(width),
            width,
            eps,
            out.first(len),
            rstd.first(tokens),
        ];
        self.launch("rms_norm", tokens, args);
    }

    fn rms_norm_backward(
        &self,
        dy: &Buffer<bf16>,
        (x, weight, rstd): (&Buffer<bf16>, &Buffer<f32>, &Buffer<f32>),
        [tokens, width]: [usize; 2],
        dx: &mut Buffer<bf16>,
    ) {
        let len = tokens * width;
        let args = args![
            dy.first(len),
            x.first(len),
            weight.first(width),
            rstd.first(tokens),
            width,
            dx.first(len),
        ];
        self.launch("rms_norm_backward", tokens, args);
    }

    fn linear(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Buffer<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&Buffer<bf16>, usize),
        residual: Option<&Buffer<bf16>>,
        out: &mut Buffer<bf16>,
        xa: &mut Buffer<bf16>,
        scratch: &mut Buffer<u8>,
    ) {
        let run = linear::Run::new(self, group, params, dropout, (x, tokens), xa, scratch);
        run.forward(residual, out);
    }

    fn linear_backward(
        &self,
        group: &Group<'_, Self>,
        params: Option<&Buffer<f32>>,
        dropout: Option<Dropout<'_, Self>>,
        (x, tokens): (&Buffer<bf16>, usize),
        xa: &Buffer<bf16>,
        dout: &Buffer<bf16>,
        want: LinearGrad<'_, Self>,
        scratch: &mut Buffer<u8>,
    ) {
        let run = linear::Run::new(self, group, params, dropout, (x, tokens), xa, scratch);
        run.backward(dout, want);
    }

    fn dora_norms(
        &self,
        weight: &Matrix,
        adapter: &Adapter,
        params: &mut Buffer<f32>,
        scratch: &mut Buffer<u8>,
    ) {
        self.row_norms(weight, adapter, params, scratch);
    }

    fn qk_norm_rope(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Buffer<u32>,
        tokens: usize,
        qkv: &Buffer<bf16>,
        qk: &mut Buffer<bf16>,
        rstd: &mut Buffer<f32>,
    ) {
        let tasks = tokens * (heads.query + heads.kv);
        let args = args![
            qkv.first(tokens * heads.qkv()),
            norms.q_norm.first(heads.dim),
            norms.k_norm.first(heads.dim),
            norms.rope.first(norms.rope.len()),
            positions.first(tokens),
            heads.query,
            heads.kv,
            heads.dim,
            norms.eps,
            qk.first(tokens * heads.qk()),
            rstd.first(tasks),
        ];
        let grid = [tokens, (heads.query + heads.kv).div_ceil(4), 1];
        self.launch_shaped("qk_norm_rope", grid, 128, 0, args);
    }

    fn qk_norm_rope_backward(
        &self,
        heads: Heads,
        norms: &QkNorms<'_, Self>,
        positions: &Buffer<u32>,
        tokens: usize,
        (qkv, rstd): (&Buffer<bf16>, &Buffer<f32>),
        dqkv: &mut Buffer<bf16>,
    ) {
        let tasks = tokens * (heads.query + heads.kv);
        let args = args![
            qkv.first(tokens * heads.qkv()),
            rstd.first(tasks),
            norms.q_norm.first(heads.dim),
            norms.k_norm.first(heads.dim),
            norms.rope.first(norms.rope.len()),
            positions.first(tokens),
            heads.query,
            heads.kv,
            heads.dim,
            dqkv.first(tokens * heads.qkv()),
        ];
        let grid = [tokens, (heads.query + heads.kv).div_ceil(4), 1];
        self.launch_shaped("qk_norm_rope_backward", grid, 128, 0, args);
    }

    fn attention(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        qk: &Buffer<bf16>,
        qkv: &Buffer<bf16>,
        out: &mut Buffer<bf16>,
        lse: &mut Buffer<f32>,
        _: &mut Buffer<u8>,
    ) {
        let (tokens, count) = (rows.tokens(), rows.bounds().len() - 1);
        let names = ["attention_32", "attention_64", "attention_128"];
        // Where no row has more than one tile of keys, there is no next one to load while it is
        // multiplied, and more blocks have room.
        let tiles = if rows.longest() <= TILE { 3 } else { 5 };
        let (kernel, shared) = Self::attention_kernel(heads, names, tiles);
        let args = args![
            qk.first(tokens * heads.qk()),
            qkv.first(tokens * heads.qkv()),
            rows.bounds_on_device.first(count + 1),
            heads.query,
            heads.kv,
            scale_of(heads),
            out.first(tokens * heads.q()),
            lse.first(tokens * heads.query),
        ];
        let grid = [count, heads.query, rows.longest().div_ceil(TILE)];
        self.launch_shaped(kernel, grid, 128, shared, args);
    }

    fn attention_backward(
        &self,
        heads: Heads,
        rows: &Ragged<Self>,
        (qk, qkv): (&Buffer<bf16>, &Buffer<bf16>),
        (out, lse): (&Buffer<bf16>, &Buffer<f32>),
        dout: &Buffer<bf16>,
        dqkv: &mut Buffer<bf16>,
        _: &mut Buffer<u8>,
    ) {
        let (tokens, count) = (rows.tokens(), rows.bounds().len() - 1);
        let args = args![
            qk.first(tokens * heads.qk()),
            qkv.first(tokens * heads.qkv()),
            out.first(tokens * heads.q()),
            lse.first(tokens * heads.query),
            dout.first(tokens * heads.q()),
            rows.bounds_on_device.first(count + 1),
            heads.query,
            heads.kv,
            scale_of(heads),
            dqkv.first(tokens * heads.qkv()),
        ];
        let q = [
            "attention_backward_q_32",
            "attention_backward_q_64",
            "attention_backward_q_128",
        ];
        let kv = [
            "attention_backward_kv_32",
            "attention_backward_kv_64",
            "attention_backward_kv_128",
        ];
        for (names, heads_of_grid) in [(q, heads.query), (kv, heads.kv)] {
            let (kernel, shared) = Self::attention_kernel(heads, names, 4);
            let grid = [count, heads_of_grid, rows.longest().div_ceil(TILE)];
            self.launch_shaped(kernel, grid, 128, shared, args);
        }
    }

    fn swiglu(&self, gate_up: &Buffer<bf16>, [tokens, width]: [usize; 2], out: &mut Buffer<bf16>) {
        let len = tokens * width;
        let args = args![gate_up.first(2 * len), width, out.first(len)];
        self.launch("swiglu", tokens, args);
    }

    fn swiglu_backward(
        &self,
        gate_up: &Buffer<bf16>,
        dout: &Buffer<bf16>,
        [tokens, width]: [usize; 2],
        dgate_up: &mut Buffer<bf16>,
    ) {
        let len = tokens * width;
        let args = args![
            gate_up.first(2 * len),
            dout.first(len),
            width,
            dgate_up.first(2 * len),
        ];
        self.launch("swiglu_backward", tokens, args);
    }

    fn head_loss(
        &self,
        head: &Matrix,
        inputs: (&Buffer<bf16>, &Buffer<u32>, usize),
        nll: &mut Buffer<f32>,
        dhidden: Option<(&mut Buffer<bf16>, f32)>,
        scratch: &mut Buffer<u8>,
    ) {
        self.head_loss_by_chunks(head, inputs, nll, dhidden, scratch);
    }

    fn global_norm(&self, grads: &Buffer<f32>, len: usize, norm: &mut Buffer<f32>) {
        let partial = self.partial.first(NORM_BLOCKS);
        let args = args![grads.first(len), Count(len), partial];
        self.launch("sum_squares", NORM_BLOCKS, args);
        self.launch("root_of_sum", 1, args![partial, norm.first(1)]);
    }

    fn adamw(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        (grads, norm): (&Buffer<f32>, &Buffer<f32>),
        params: &mut Buffer<f32>,
        (m, v): (&mut Buffer<f32>, &mut Buffer<f32>),
    ) {
        for stretch in stretches {
            let Stretch { range, .. } = stretch;
            let [max_norm, fresh1, beta2, fresh2, keep, rate, root, eps] = rates(settings, stretch);
            let args = args![
                grads.at(range.clone()),
                norm.first(1),
                Count(range.len()),
                max_norm,
                fresh1,
                beta2,
                fresh2,
                keep,
                rate,
                root,
                eps,
                params.at(range.clone()),
                m.at(range.clone()),
                v.at(range.clone()),
            ];
            self.launch_each("adamw", range.len(), args);
        }
    }

    fn adamw_8bit(
        &self,
        settings: &AdamW,
        stretches: &[Stretch],
        (grads, norm): (&Buffer<f32>, &Buffer<f32>),
        params: &mut Buffer<f32>,
        [m, v]: [(&mut Buffer<u32>, &mut Buffer<f32>); 2],
    ) {
        let mut first = 0;
        for stretch in stretches {
            let Stretch { range, .. } = stretch;
            let blocks = first..first + stretch.blocks();
            first = blocks.end;
            let words = blocks.start * MOMENT_BLOCK / 4..blocks.end * MOMENT_BLOCK / 4;
            let [max_norm, fresh1, beta2, fresh2, keep, rate, root, eps] = rates(settings, stretch);
            let args = args![
                grads.at(range.clone()),
                norm.first(1),
                Count(range.len()),
                max_norm,
                fresh1,
                beta2,
                fresh2,
                keep,
                rate,
                root,
                eps,
                self.moments.first(1024),
                params.at(range.clone()),
                m.0.at(words.clone()),
                m.1.at(blocks.clone()),
                v.0.at(words),
                v.1.at(blocks.clone()),
            ];
            // Eight blocks at once are a thread block's; enough of them fill any GPU.
            self.launch("adamw_8bit", blocks.len().div_ceil(8).min(1024), args);
        }
    }

    fn cache_append(
        &self,
        heads: Heads,
        cache: Cache,
        (slots, positions, tokens): (&Buffer<u32>, &Buffer<u32>, usize),
        qk: &Buffer<bf16>,
        qkv: &Buffer<bf16>,
        (keys, values): (&mut Buffer<bf16>, &mut Buffer<bf16>),
    ) {
        let store = cache.slots * cache.capacity * heads.k();
        let args = args![
            qk.first(tokens * heads.qk()),
            qkv.first(tokens * heads.qkv()),
            slots.first(tokens),
            positions.first(tokens),
            heads.q(),
            heads.k(),
            cache.capacity,
            keys.first(store),
            values.first(store),
        ];
        self.launch("cache_append", tokens, args);
    }

    fn cache_attention(
        &self,
        heads: Heads,
        cache: Cache,
        (slots, positions, tokens): (&Buffer<u32>, &Buffer<u32>, usize),
        qk: &Buffer<bf16>,
        (keys, values): (&Buffer<bf16>, &Buffer<bf16>),
        out: &mut Buffer<bf16>,
        _: &mut Buffer<u8>,
    ) {
        let store = cache.slots * cache.capacity * heads.k();
        let args = args![
            qk.first(tokens * heads.qk()),
            keys.first(store),
            values.first(store),
            slots.first(tokens),
            positions.first(tokens),
            heads.query,
            heads.kv,
            cache.capacity,
            scale_of(heads),
            out.first(tokens * heads.q()),
        ];
        let (sharing, threads) = SHARING;
        let blocks = heads.kv * (heads.query / heads.kv).div_ceil(sharing);
        let names = [
            "cache_attention_32",
            "cache_attention_64",
            "cache_attention_128",
        ];
        let (kernel, _) = Self::attention_kernel(heads, names, 0);
        self.launch_shaped(kernel, [tokens, blocks, 1], threads, 0, args);
    }

    fn logits(
        &self,
        head: &Matrix,
        (hidden, rows): (&Buffer<bf16>, usize),
        out: &mut Buffer<f32>,
        scratch: &mut Buffer<u8>,
    ) {
        let hidden = hidden.first(rows * head.cols);
        let out = out.first(rows * head.rows);
        let decoded = || head::slice_room(head, scratch);
        self.logits_of(head, hidden, rows, out, decoded);
    }

    fn sample(
        &self,
        how: &Sampling,
        (logits, [rows, width]): (&Buffer<f32>, [usize; 2]),
        (items, positions): (&Buffer<u32>, &Buffer<u32>),
        out: &mut Buffer<u32>,
        _: &mut Buffer<u8>,
    ) {
        let args = args![
            logits.first(rows * width),
            width,
            items.first(rows),
            positions.first(rows),
            how.temperature,
            how.top_k.min(width),
            how.top_p,
            Arg::U64(how.seed),
            out.first(rows),
        ];
        self.launch_shaped("sample", [rows, 1, 1], CHOOSERS, 0, args);
    }
}

impl IntoArg for Arg {
    fn arg(self) -> Arg {
        self
    }
}
