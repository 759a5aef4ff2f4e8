//! An interpreter of PTX: what is shipped, `kernels.ptx`, on the processor.
//!
//! The coroutines run the kernels' C++ with a twin of each instruction; this runs the
//! compiler's output, with the instructions as NVIDIA's manual has them, and shares no
//! line with the twins. So a wrong operand in the inline assembly, a fragment read
//! otherwise than the hardware lays it out, or a miscompiled kernel is found.
//!
//! What is undefined is an error that names the line: a register or a word of shared
//! memory never written, an access outside every variable or not aligned, a race within
//! a block, a read of what is still being copied, a barrier or a shuffle that not all
//! threads reach, memory that is written and read through `.nc`. Approximations are as
//! far off as the manual allows.

mod machine;
mod meaning;
mod memory;
mod parse;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use engine::Result;
use engine::cuda::{Address, Arg, Launch};

use machine::{Stop, Warp, World};
use memory::{Global, Shared};
use parse::{Code, Initial, Module, Problem};

use crate::{Kernels, wrong};

/// The kernels as they are shipped.
pub const PTX: &str = include_str!("../../../tools/lib/engine/cuda/kernels.ptx");

/// Shared memory that a block may have on every chip from sm_80 on: sm_86, 89 and 120
/// have the least.
const SHARED: usize = 99 << 10;

/// A text of PTX, read when its kernels are run.
pub struct Ptx(Arc<Module>);

impl Ptx {
    /// The kernels as they are shipped, read once.
    pub fn shipped() -> Self {
        static SHIPPED: LazyLock<Arc<Module>> = LazyLock::new(|| Arc::new(Module::new(PTX)));
        Self(SHIPPED.clone())
    }

    /// Other kernels, in a text as NVIDIA's compiler writes it.
    pub fn new(text: &str) -> Self {
        Self(Arc::new(Module::new(text)))
    }

    /// The names of the kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.0.kernels()
    }
}

/// What a launch asks that its kernel does not take.
fn refused(code: &Code, launch: &Launch<'_>) -> Option<Problem> {
    let sizes: Vec<_> = launch.args.iter().map(Arg::size).collect();
    if sizes != code.parameters {
        return Some("other arguments than its parameters".into());
    }
    let [x, y, z] = launch.grid;
    if x == 0 || x > i32::MAX as u32 || !(1..1 << 16).contains(&y) || !(1..1 << 16).contains(&z) {
        return Some(format!("a device refuses a grid of {:?}", launch.grid));
    }
    if !(1..=code.threads).contains(&launch.block) {
        return Some(format!("a device refuses {} threads", launch.block));
    }
    let shared = code.dynamic - parse::START + launch.shared as usize;
    (shared > SHARED).then(|| format!("a device refuses {shared} bytes of shared memory"))
}

impl Kernels for Ptx {
    fn describe(&self) -> String {
        "a CUDA device on the CPU, PTX interpreted".into()
    }

    fn launch(&self, launch: &Launch<'_>, buffers: &BTreeMap<Address, usize>) -> Result<()> {
        let at = |problem| wrong(format!("{}: {problem}", launch.kernel));
        let code = self.0.kernel(launch.kernel).map_err(at)?;
        if let Some(problem) = refused(code, launch) {
            return Err(at(problem));
        }
        let arguments: Vec<u64> = launch.args.iter().map(bits).collect();
        let mut world = World {
            code,
            constants: &self.0.constants,
            global: Global::new(buffers),
            shared: Shared::new(&[], parse::START, 0),
        };
        let mut warps: Vec<_> = (0..launch.block.div_ceil(32))
            .map(|number| Warp::new(code, number, launch.block))
            .collect();
        let [blocks_x, blocks_y, blocks_z] = launch.grid;
        let all = (0..blocks_z)
            .flat_map(|z| (0..blocks_y).flat_map(move |y| (0..blocks_x).map(move |x| [x, y, z])));
        for block in all {
            world.shared = Shared::new(&code.statics, code.dynamic, launch.shared as usize);
            for warp in &mut warps {
                warp.start(code, |initial| match initial {
                    Initial::Bits(bits) => bits,
                    Initial::Parameter(number) => arguments[number],
                    Initial::Thread => 0, // each its own
                    Initial::Block(axis) => block[axis].into(),
                    Initial::Threads => launch.block.into(),
                    Initial::Blocks(axis) => launch.grid[axis].into(),
                });
            }
            run(&mut warps, &mut world).map_err(|(line, problem)| {
                let text = self.0.line(line);
                let line = line + 1;
                at(format!("{problem}: block {block:?}, line {line}, `{text}`"))
            })?;
        }
        Ok(())
    }
}

/// An argument's bits.
fn bits(arg: &Arg) -> u64 {
    match *arg {
        Arg::U32(v) => v.into(),
        Arg::U64(v) | Arg::Pointer(v) => v,
        Arg::F32(v) => v.to_bits().into(),
    }
}

/// A block from its start to its end.
fn run(warps: &mut [Warp], world: &mut World<'_>) -> Result<(), (usize, Problem)> {
    loop {
        let mut ended = 0;
        for warp in warps.iter_mut() {
            ended += usize::from(warp.run(world)? == Stop::End);
        }
        match ended {
            0 => world.shared.barrier(),
            all if all == warps.len() => return Ok(()),
            _ => {
                let waiting = world.code.ops.len() - 1;
                let problem = "a barrier that not all warps reach".into();
                return Err((world.code.ops[waiting].line, problem));
            }
        }
    }
}
