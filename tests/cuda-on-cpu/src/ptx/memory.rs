//! Memory whose misuse is an error: global buffers, and a block's shared memory, of
//! which every word knows who wrote and who read it since the last barrier.

use std::collections::BTreeMap;

use engine::cuda::Address;

use super::parse::{Problem, START};

fn aligned(address: u64, bytes: usize) -> Result<(), Problem> {
    match address % bytes as u64 {
        0 => Ok(()),
        _ => Err(format!("{address:#x} is not aligned to {bytes} bytes")),
    }
}

/// A live buffer, and of every two bytes whether they were written, and whether they
/// were read as what does not change.
struct Buffer {
    base: Address,
    size: usize,
    marks: Vec<u8>,
}

/// How global memory is used.
#[derive(Clone, Copy, PartialEq)]
pub enum Use {
    Read = 0,
    Write = 1,
    /// `.nc`: nothing may write there while the kernel runs ("ld.global.nc").
    ReadConstant = 2,
}

/// The live buffers, for the time of a launch.
pub struct Global {
    buffers: Vec<Buffer>,
    /// Where the last access went.
    last: usize,
}

impl Global {
    pub fn new(buffers: &BTreeMap<Address, usize>) -> Self {
        let all = buffers.iter().map(|(&base, &size)| Buffer {
            base,
            size,
            marks: Vec::new(),
        });
        Self {
            buffers: all.collect(),
            last: 0,
        }
    }

    /// The memory of an access.
    pub fn at(&mut self, address: u64, bytes: usize, how: Use) -> Result<*mut u8, Problem> {
        aligned(address, bytes)?;
        let inside = |b: &Buffer| {
            address >= b.base && address - b.base <= (b.size as u64).saturating_sub(bytes as u64)
        };
        if !self.buffers.get(self.last).is_some_and(inside) {
            let after = self.buffers.partition_point(|b| b.base <= address);
            self.last = after.saturating_sub(1);
        }
        let buffer = self.buffers.get_mut(self.last).filter(|b| inside(b));
        let Some(buffer) = buffer.filter(|b| b.size >= bytes) else {
            return Err(format!("{bytes} bytes at {address:#x} are in no buffer"));
        };
        if how != Use::Read {
            if buffer.marks.is_empty() {
                buffer.marks = vec![0; buffer.size.div_ceil(2)];
            }
            let first = (address - buffer.base) as usize / 2;
            for mark in &mut buffer.marks[first..first + bytes.div_ceil(2)] {
                *mark |= how as u8;
                if *mark == Use::Write as u8 | Use::ReadConstant as u8 {
                    return Err(format!("{address:#x} is written, and read with .nc"));
                }
            }
        }
        Ok(address as usize as *mut u8)
    }
}

/// Who touched a word: the barriers so far and a thread, or one of these.
type Stamp = u32;

/// Bits of a thread's number in a stamp.
const THREAD: u32 = 11;
/// In place of a thread: several.
pub const MANY: u32 = 1024;
/// In place of a thread: whoever added.
const ADDED: u32 = 1025;
/// Never written.
const FRESH: Stamp = 0;
/// Between variables.
const OUTSIDE: Stamp = 1;
/// The target of a copy that nobody has waited for.
const FLYING: Stamp = 2;

/// What is done to a word.
#[derive(Clone, Copy, PartialEq)]
pub enum Touch {
    Read,
    Write,
    Add,
}

/// A block's shared memory.
pub struct Shared {
    pub bytes: Vec<u8>,
    writers: Vec<Stamp>,
    readers: Vec<Stamp>,
    barriers: u32,
}

impl Shared {
    /// With static variables there, and so many bytes of dynamic memory behind them.
    pub fn new(statics: &[[usize; 2]], dynamic: usize, bytes: usize) -> Self {
        let end = match bytes {
            0 => statics.last().map_or(START, |&[_, end]| end),
            _ => dynamic.next_multiple_of(16) + bytes,
        };
        let words = (end - START).div_ceil(4);
        let mut shared = Self {
            bytes: vec![0xff; words * 4],
            writers: vec![OUTSIDE; words],
            readers: vec![0; words],
            barriers: 1,
        };
        let dynamic = [end - bytes, end];
        for [from, to] in statics.iter().copied().chain([dynamic]) {
            shared.writers[(from - START) / 4..(to - START).div_ceil(4)].fill(FRESH);
        }
        shared
    }

    /// All threads have met.
    pub fn barrier(&mut self) {
        self.barriers += 1;
    }

    /// Where an access is in `bytes`; an error if it is not in order with others'.
    pub fn at(
        &mut self,
        address: u64,
        bytes: usize,
        (thread, touch): (u32, Touch),
    ) -> Result<usize, Problem> {
        aligned(address, bytes)?;
        let offset = address.wrapping_sub(START as u64) as usize;
        let outside = || format!("{bytes} bytes at {address:#x} of no shared variable");
        if offset.saturating_add(bytes) > self.bytes.len() {
            return Err(outside());
        }
        let now = self.barriers;
        let stamp = |by: u32| now << THREAD | by;
        let (thread, mine) = match touch {
            Touch::Add => (thread, stamp(ADDED)),
            _ => (thread, stamp(thread)),
        };
        let others = |s: Stamp, mine| s >> THREAD == now && s != mine;
        for word in offset / 4..(offset + bytes).div_ceil(4) {
            let (writer, reader) = (self.writers[word], self.readers[word]);
            match writer {
                OUTSIDE => return Err(outside()),
                FLYING => return Err(format!("{address:#x} is being copied to")),
                FRESH if touch != Touch::Write => {
                    return Err(format!("{address:#x} in shared memory was never written"));
                }
                _ => {}
            }
            let raced =
                others(writer, mine) || (touch != Touch::Read && others(reader, stamp(thread)));
            if raced {
                return Err(format!("a race in shared memory at {address:#x}"));
            }
            match touch {
                Touch::Read if others(reader, mine) => self.readers[word] = stamp(MANY),
                Touch::Read => self.readers[word] = mine,
                Touch::Write | Touch::Add => self.writers[word] = mine,
            }
        }
        Ok(offset)
    }

    /// A copy to these 16 bytes has begun.
    pub fn take_off(&mut self, address: u64, thread: u32) -> Result<(), Problem> {
        let offset = self.at(address, 16, (thread, Touch::Write))?;
        self.writers[offset / 4..offset / 4 + 4].fill(FLYING);
        Ok(())
    }

    /// It is done: the bytes are written as by that thread now.
    pub fn land(&mut self, address: u64, thread: u32, bytes: &[u8; 16]) {
        let offset = address as usize - START;
        self.bytes[offset..offset + 16].copy_from_slice(bytes);
        self.writers[offset / 4..offset / 4 + 4].fill(self.barriers << THREAD | thread);
    }
}
