//! Warps that run a kernel's instructions, 32 lanes at a time.
//!
//! Lanes that went apart run in turn, those at the lowest instruction first, and go on
//! together where they meet. What needs a whole warp (shuffles, matrices, barriers) is
//! an error where the warp is not whole.

use std::collections::VecDeque;
use std::mem::take;

use super::meaning::{LANES, Meaning, Narrow, Wide};
use super::memory::{Global, MANY, Shared, Touch, Use};
use super::parse::{Access, Act, Code, Initial, Matrices, Place, Problem, Reg, START, Space};

/// Sixteen bytes on their way to shared memory.
struct Copy {
    to: u64,
    from: u64,
    /// What is read; the rest are zeros.
    bytes: usize,
    thread: u32,
}

/// What the threads of a block see beside their registers.
pub struct World<'a> {
    pub code: &'a Code,
    pub constants: &'a [u8],
    pub global: Global,
    pub shared: Shared,
}

/// Why a warp stopped.
#[derive(PartialEq)]
pub enum Stop {
    Barrier,
    End,
}

/// Thirty-two threads. The last warp of a block may have fewer.
pub struct Warp {
    number: u32,
    /// The lanes that there are.
    lanes: u32,
    predicates: Vec<u32>,
    narrow: Vec<Narrow>,
    wide: Vec<Wide>,
    /// In which lanes a register was written: by file, then register.
    written: [Vec<u32>; 3],
    local: Vec<[u8; LANES]>,
    /// Lanes and their next instruction; no two at the same.
    groups: Vec<(usize, u32)>,
    /// Copies since the last commit, and those committed before.
    begun: Vec<Copy>,
    committed: VecDeque<Vec<Copy>>,
}

/// The numbers of the bits that are set.
fn each(mut lanes: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = lanes.trailing_zeros() as usize;
        lanes &= lanes.wrapping_sub(1);
        (lane < LANES).then_some(lane)
    })
}

fn undefined() -> Problem {
    "a register is read that was never written".into()
}

/// A value of at most eight bytes.
fn value(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

impl Warp {
    /// Warp `number` of a block of so many threads.
    pub fn new(code: &Code, number: u32, threads: u32) -> Self {
        let [predicates, narrow, wide] = code.files;
        let lanes = (threads - 32 * number).min(32);
        Self {
            number,
            lanes: u32::MAX >> (32 - lanes),
            predicates: vec![0; predicates],
            narrow: vec![[0; LANES]; narrow],
            wide: vec![[0; LANES]; wide],
            written: code.files.map(|count| vec![0; count]),
            local: Vec::new(),
            groups: Vec::new(),
            begun: Vec::new(),
            committed: VecDeque::new(),
        }
    }

    /// Puts it at the start of a kernel; `fill` says what the registers hold there.
    pub fn start(&mut self, code: &Code, fill: impl Fn(Initial) -> u64) {
        self.written.iter_mut().for_each(|file| file.fill(0));
        for &(reg, initial) in &code.initial {
            let bits = fill(initial);
            let lane = |l: usize| match initial {
                Initial::Thread => u64::from(32 * self.number) + l as u64,
                _ => bits,
            };
            match reg {
                Reg::Predicate(r) => {
                    self.predicates[r as usize] = bits as u32;
                    self.written[0][r as usize] = u32::MAX;
                }
                Reg::Narrow(r) => {
                    self.narrow[r as usize] = std::array::from_fn(|l| lane(l) as u32);
                    self.written[1][r as usize] = u32::MAX;
                }
                Reg::Wide(r) => {
                    self.wide[r as usize] = std::array::from_fn(lane);
                    self.written[2][r as usize] = u32::MAX;
                }
            }
        }
        self.local.clear();
        self.local.resize(code.local, [0xff; LANES]);
        self.groups.clear();
        self.groups.push((0, self.lanes));
        self.begun.clear();
        self.committed.clear();
    }

    fn p(&self, r: u16, lanes: u32) -> Result<u32, Problem> {
        match lanes & !self.written[0][r as usize] {
            0 => Ok(self.predicates[r as usize]),
            _ => Err(undefined()),
        }
    }

    fn n(&self, r: u16, lanes: u32) -> Result<&Narrow, Problem> {
        match lanes & !self.written[1][r as usize] {
            0 => Ok(&self.narrow[r as usize]),
            _ => Err(undefined()),
        }
    }

    fn w(&self, r: u16, lanes: u32) -> Result<&Wide, Problem> {
        match lanes & !self.written[2][r as usize] {
            0 => Ok(&self.wide[r as usize]),
            _ => Err(undefined()),
        }
    }

    fn set_p(&mut self, r: u16, lanes: u32, bits: u32) {
        let old = self.predicates[r as usize];
        self.predicates[r as usize] = old & !lanes | bits & lanes;
        self.written[0][r as usize] |= lanes;
    }

    fn set_n(&mut self, r: u16, lanes: u32, values: &Narrow) {
        self.written[1][r as usize] |= lanes;
        let to = &mut self.narrow[r as usize];
        match lanes {
            u32::MAX => *to = *values,
            _ => each(lanes).for_each(|l| to[l] = values[l]),
        }
    }

    fn set_w(&mut self, r: u16, lanes: u32, values: &Wide) {
        self.written[2][r as usize] |= lanes;
        let to = &mut self.wide[r as usize];
        match lanes {
            u32::MAX => *to = *values,
            _ => each(lanes).for_each(|l| to[l] = values[l]),
        }
    }

    /// The address that each lane means.
    fn addresses(&self, place: Place, lanes: u32) -> Result<Wide, Problem> {
        let add = |base: u64| base.wrapping_add_signed(place.offset);
        Ok(match place.base {
            Reg::Wide(r) => self.w(r, lanes)?.map(add),
            Reg::Narrow(r) => self.n(r, lanes)?.map(|base| add(base.into())),
            Reg::Predicate(_) => return Err("a predicate is no address".into()),
        })
    }

    /// Runs to the next barrier or the end; an error comes with the instruction's line.
    pub fn run(&mut self, world: &mut World<'_>) -> Result<Stop, (usize, Problem)> {
        let code = world.code;
        loop {
            // The lanes that are furthest behind, as far as the next ones.
            let Some(behind) = (0..self.groups.len()).min_by_key(|&i| self.groups[i].0) else {
                return Ok(Stop::End);
            };
            let (mut at, mut lanes) = self.groups.swap_remove(behind);
            let next = self.groups.iter().map(|g| g.0).min().unwrap_or(usize::MAX);
            while at < next {
                let op = &code.ops[at];
                let fail = |problem| (op.line, problem);
                let active = match op.guard {
                    None => lanes,
                    Some((p, true)) => lanes & self.p(p, lanes).map_err(fail)?,
                    Some((p, false)) => lanes & !self.p(p, lanes).map_err(fail)?,
                };
                at += 1;
                match op.act {
                    Act::Branch(target) if active == lanes => at = target,
                    Act::Branch(_) if active == 0 => {}
                    Act::Branch(target) => {
                        self.join(target, active);
                        lanes &= !active;
                        break;
                    }
                    Act::Exit => lanes &= !active,
                    Act::Barrier => {
                        if active != self.lanes {
                            return Err(fail("a barrier that not all threads reach".into()));
                        }
                        self.groups.push((at, lanes));
                        return Ok(Stop::Barrier);
                    }
                    _ if active != 0 => self.act(&op.act, active, world).map_err(fail)?,
                    _ => {}
                }
                if lanes == 0 {
                    break;
                }
            }
            if lanes != 0 {
                self.join(at, lanes);
            }
        }
    }

    /// These lanes go on from here, with whoever is here already.
    fn join(&mut self, at: usize, lanes: u32) {
        match self.groups.iter_mut().find(|group| group.0 == at) {
            Some(group) => group.1 |= lanes,
            None => self.groups.push((at, lanes)),
        }
    }

    fn act(&mut self, act: &Act, lanes: u32, world: &mut World<'_>) -> Result<(), Problem> {
        let whole = || match lanes {
            u32::MAX => Ok(()),
            _ => Err("the lanes of the warp diverge"),
        };
        match act {
            Act::Compute(meaning, regs) => self.compute(meaning, regs, lanes)?,
            Act::Pack(to, from) => {
                let [low, high] = [self.n(from[0], lanes)?, self.n(from[1], lanes)?];
                let both = |l: usize| u64::from(low[l]) | u64::from(high[l]) << 32;
                self.set_w(*to, lanes, &std::array::from_fn(both));
            }
            Act::Unpack(to, from) => {
                let from = *self.w(*from, lanes)?;
                self.set_n(to[0], lanes, &from.map(|x| x as u32));
                self.set_n(to[1], lanes, &from.map(|x| (x >> 32) as u32));
            }
            Act::Load(access) => self.load(access, lanes, world)?,
            Act::Store(access) => self.store(access, lanes, world)?,
            Act::Add(to, place, from) => {
                let (places, from) = (self.addresses(*place, lanes)?, *self.n(*from, lanes)?);
                let mut old = [0; LANES];
                for l in each(lanes) {
                    let how = (self.thread(l), Touch::Add);
                    let at = world.shared.at(places[l], 4, how)?;
                    let bytes = &mut world.shared.bytes[at..at + 4];
                    old[l] = value(bytes) as u32;
                    bytes.copy_from_slice(&old[l].wrapping_add(from[l]).to_le_bytes());
                }
                if let Some(to) = to {
                    self.set_n(*to, lanes, &old);
                }
            }
            Act::AddGlobal(to, place, from) => {
                let (places, from) = (self.addresses(*place, lanes)?, *self.n(*from, lanes)?);
                let mut old = [0; LANES];
                for l in each(lanes) {
                    let memory = world.global.at(places[l], 4, Use::Write)?.cast::<u32>();
                    // SAFETY: inside a live buffer, and aligned, by `at`.
                    unsafe {
                        old[l] = *memory;
                        *memory = old[l].wrapping_add(from[l]);
                    }
                }
                self.set_n(*to, lanes, &old);
            }
            Act::Fence => {}
            Act::Butterfly(to, given, from) => {
                whole()?;
                let [a, b, c, members] = from.map(|r| self.n(r, lanes).copied());
                let (a, b, c) = (a?, b?, c?);
                if members? != [u32::MAX; LANES] {
                    return Err("a shuffle among fewer than 32 lanes".into());
                }
                // "shfl.sync": within segments, whose bounds are in `c`.
                let source = |l: usize| {
                    let (clamp, segments) = (c[l] & 0x1f, c[l] >> 8 & 0x1f);
                    let last = l as u32 & segments | clamp & !segments;
                    let source = l as u32 ^ b[l] & 0x1f;
                    (source <= last).then_some(source as usize)
                };
                let found: Narrow = std::array::from_fn(|l| a[source(l).unwrap_or(l)]);
                let inside = (0..LANES).filter(|&l| source(l).is_some());
                let inside = inside.fold(0, |bits, l| bits | 1 << l);
                self.set_n(*to, lanes, &found);
                if let Some(given) = *given {
                    self.set_p(given, lanes, inside);
                }
            }
            Act::LoadMatrices {
                to,
                place,
                transposed,
            } => {
                whole()?;
                let places = self.addresses(*place, lanes)?;
                let mut rows = [[0; 16]; LANES];
                for (row, &place) in rows.iter_mut().zip(&places) {
                    // Which lanes receive it is not whose address it is.
                    let at = world.shared.at(place, 16, (MANY, Touch::Read))?;
                    row.copy_from_slice(&world.shared.bytes[at..at + 16]);
                }
                for (i, &to) in to.iter().enumerate() {
                    self.set_n(to, lanes, &fragment(&rows[8 * i..8 * i + 8], *transposed));
                }
            }
            Act::Multiply(regs) => {
                whole()?;
                let Matrices { d, a, b, c } = &**regs;
                let a = a.map(|r| self.n(r, lanes).copied());
                let b = b.map(|r| self.n(r, lanes).copied());
                let c = c.map(|r| self.n(r, lanes).copied());
                let [a0, a1, a2, a3] = a;
                let [b0, b1] = b;
                let [c0, c1, c2, c3] = c;
                let product = multiply([a0?, a1?, a2?, a3?], [b0?, b1?], [c0?, c1?, c2?, c3?]);
                for (&to, values) in d.iter().zip(&product) {
                    self.set_n(to, lanes, values);
                }
            }
            Act::CopyAsync { to, from, bytes } => {
                let (to, from) = (self.addresses(*to, lanes)?, self.addresses(*from, lanes)?);
                let bytes = *self.n(*bytes, lanes)?;
                for l in each(lanes) {
                    let (thread, bytes) = (self.thread(l), bytes[l] as usize);
                    if !from[l].is_multiple_of(16) || bytes > 16 {
                        return Err(format!("a copy of {bytes} bytes from {:#x}", from[l]));
                    }
                    world.shared.take_off(to[l], thread)?;
                    if bytes > 0 {
                        world.global.at(from[l], bytes, Use::Read)?;
                    }
                    self.begun.push(Copy {
                        to: to[l],
                        from: from[l],
                        bytes,
                        thread,
                    });
                }
            }
            // Groups are a thread's own; here the warp's.
            Act::Commit => {
                whole()?;
                self.committed.push_back(take(&mut self.begun));
            }
            // Copies are made as late as the wait lets them be.
            Act::Wait(groups) => {
                whole()?;
                while self.committed.len() > *groups {
                    for copy in self.committed.pop_front().into_iter().flatten() {
                        let mut bytes = [0; 16];
                        if copy.bytes > 0 {
                            let from = world.global.at(copy.from, copy.bytes, Use::Read)?;
                            // SAFETY: inside a live buffer, by `at`.
                            let from = unsafe { std::slice::from_raw_parts(from, copy.bytes) };
                            bytes[..copy.bytes].copy_from_slice(from);
                        }
                        world.shared.land(copy.to, copy.thread, &bytes);
                    }
                }
            }
            Act::Branch(_) | Act::Exit | Act::Barrier => {}
        }
        Ok(())
    }

    fn thread(&self, lane: usize) -> u32 {
        32 * self.number + lane as u32
    }

    fn compute(&mut self, meaning: &Meaning, regs: &[u16; 5], lanes: u32) -> Result<(), Problem> {
        use Meaning::*;
        let &[to, a, b, c, d] = regs;
        match meaning {
            Narrow1(f) => {
                let values = f(self.n(a, lanes)?);
                self.set_n(to, lanes, &values);
            }
            Narrow2(f) => {
                let values = f(self.n(a, lanes)?, self.n(b, lanes)?);
                self.set_n(to, lanes, &values);
            }
            Narrow3(f) => {
                let values = f(self.n(a, lanes)?, self.n(b, lanes)?, self.n(c, lanes)?);
                self.set_n(to, lanes, &values);
            }
            Narrow4(f) => {
                let (a, b) = (self.n(a, lanes)?, self.n(b, lanes)?);
                let values = f(a, b, self.n(c, lanes)?, self.n(d, lanes)?);
                self.set_n(to, lanes, &values);
            }
            Wide1(f) => {
                let values = f(self.w(a, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Wide2(f) => {
                let values = f(self.w(a, lanes)?, self.w(b, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Wide3(f) => {
                let values = f(self.w(a, lanes)?, self.w(b, lanes)?, self.w(c, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Shift(f) => {
                let values = f(self.w(a, lanes)?, self.n(b, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Insert(f) => {
                let (a, b) = (self.w(a, lanes)?, self.w(b, lanes)?);
                let values = f(a, b, self.n(c, lanes)?, self.n(d, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Widen1(f) => {
                let values = f(self.n(a, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Widen2(f) => {
                let values = f(self.n(a, lanes)?, self.n(b, lanes)?);
                self.set_w(to, lanes, &values);
            }
            Shrink(f) => {
                let values = f(self.w(a, lanes)?);
                self.set_n(to, lanes, &values);
            }
            TestNarrow(f, holds) => {
                let found = f(self.n(a, lanes)?, self.n(b, lanes)?);
                self.set_p(to, lanes, bits(&found, *holds));
            }
            TestWide(f, holds) => {
                let found = f(self.w(a, lanes)?, self.w(b, lanes)?);
                self.set_p(to, lanes, bits(&found, *holds));
            }
            Predicate1(f) => {
                let bits = f(self.p(a, lanes)?);
                self.set_p(to, lanes, bits);
            }
            Predicate2(f) => {
                let bits = f(self.p(a, lanes)?, self.p(b, lanes)?);
                self.set_p(to, lanes, bits);
            }
            // What is not chosen need not be defined.
            SelectNarrow => {
                let chosen = self.p(c, lanes)?;
                let (a, b) = (self.n(a, lanes & chosen)?, self.n(b, lanes & !chosen)?);
                let values =
                    std::array::from_fn(|l| if chosen >> l & 1 == 1 { a[l] } else { b[l] });
                self.set_n(to, lanes, &values);
            }
            SelectWide => {
                let chosen = self.p(c, lanes)?;
                let (a, b) = (self.w(a, lanes & chosen)?, self.w(b, lanes & !chosen)?);
                let values =
                    std::array::from_fn(|l| if chosen >> l & 1 == 1 { a[l] } else { b[l] });
                self.set_w(to, lanes, &values);
            }
            CopyNarrow => {
                let values = *self.n(a, lanes)?;
                self.set_n(to, lanes, &values);
            }
            CopyWide => {
                let values = *self.w(a, lanes)?;
                self.set_w(to, lanes, &values);
            }
            CopyPredicate => {
                let bits = self.p(a, lanes)?;
                self.set_p(to, lanes, bits);
            }
        }
        Ok(())
    }

    fn load(&mut self, access: &Access, lanes: u32, world: &mut World<'_>) -> Result<(), Problem> {
        let places = self.addresses(access.place, lanes)?;
        let (bytes, all) = (access.bytes, access.bytes * access.values.len());
        let mut own = [0; 16];
        for l in each(lanes) {
            let place = places[l];
            let memory: &[u8] = match access.space {
                Space::Global { constant } => {
                    let how = if constant {
                        Use::ReadConstant
                    } else {
                        Use::Read
                    };
                    let memory = world.global.at(place, all, how)?;
                    // SAFETY: inside a live buffer, by `at`.
                    unsafe { std::slice::from_raw_parts(memory, all) }
                }
                Space::Shared => {
                    let how = (self.thread(l), Touch::Read);
                    let at = world.shared.at(place, all, how)?;
                    &world.shared.bytes[at..at + all]
                }
                Space::Const => inside(place, all, world.constants.len())
                    .map(|at| &world.constants[at..at + all])?,
                Space::Local => {
                    let at = inside(place, all, self.local.len())?;
                    for (i, byte) in own[..all].iter_mut().enumerate() {
                        *byte = self.local[at + i][l];
                    }
                    &own[..all]
                }
            };
            for (&to, memory) in access.values.iter().zip(memory.chunks_exact(bytes)) {
                match to {
                    Reg::Wide(r) => self.wide[r as usize][l] = value(memory),
                    Reg::Narrow(r) => self.narrow[r as usize][l] = value(memory) as u32,
                    Reg::Predicate(_) => {}
                }
            }
        }
        for &to in &access.values {
            match to {
                Reg::Wide(r) => self.written[2][r as usize] |= lanes,
                Reg::Narrow(r) => self.written[1][r as usize] |= lanes,
                Reg::Predicate(_) => {}
            }
        }
        Ok(())
    }

    fn store(&mut self, access: &Access, lanes: u32, world: &mut World<'_>) -> Result<(), Problem> {
        let places = self.addresses(access.place, lanes)?;
        let (bytes, all) = (access.bytes, access.bytes * access.values.len());
        for &from in &access.values {
            match from {
                Reg::Wide(r) => self.w(r, lanes).map(|_| ())?,
                Reg::Narrow(r) => self.n(r, lanes).map(|_| ())?,
                Reg::Predicate(_) => {}
            }
        }
        for l in each(lanes) {
            let mut values = [0; 16];
            for (to, &from) in values.chunks_exact_mut(bytes).zip(&access.values) {
                let value = match from {
                    Reg::Wide(r) => self.wide[r as usize][l],
                    Reg::Narrow(r) => self.narrow[r as usize][l].into(),
                    Reg::Predicate(_) => 0,
                };
                to.copy_from_slice(&value.to_le_bytes()[..bytes]);
            }
            let place = places[l];
            match access.space {
                Space::Global { .. } => {
                    let memory = world.global.at(place, all, Use::Write)?;
                    // SAFETY: inside a live buffer, by `at`, which nothing else uses while
                    // the kernel runs.
                    unsafe { memory.copy_from_nonoverlapping(values.as_ptr(), all) };
                }
                Space::Shared => {
                    let how = (self.thread(l), Touch::Write);
                    let at = world.shared.at(place, all, how)?;
                    world.shared.bytes[at..at + all].copy_from_slice(&values[..all]);
                }
                Space::Local => {
                    let at = inside(place, all, self.local.len())?;
                    for (i, &byte) in values[..all].iter().enumerate() {
                        self.local[at + i][l] = byte;
                    }
                }
                Space::Const => return Err("a constant is written".into()),
            }
        }
        Ok(())
    }
}

/// Where an access is in a memory of so many bytes.
fn inside(place: u64, bytes: usize, size: usize) -> Result<usize, Problem> {
    let at = place.wrapping_sub(START as u64) as usize;
    match place.is_multiple_of(bytes as u64) && at.saturating_add(bytes) <= size {
        true => Ok(at),
        false => Err(format!("{bytes} bytes at {place:#x} are not there")),
    }
}

/// A bit for each lane whose relation is among those that hold.
fn bits(found: &[u8; LANES], holds: u8) -> u32 {
    let lanes = found.iter().enumerate();
    lanes.fold(0, |bits, (l, &relation)| {
        bits | u32::from(holds >> relation & 1) << l
    })
}

/// Of eight rows of eight 16-bit values what each lane receives ("ldmatrix"): of row
/// `lane / 4` the values 2 (lane % 4) and the one behind it, the first in the low half;
/// `.trans`: the same of the matrix "loaded in column-major format".
fn fragment(rows: &[[u8; 16]], transposed: bool) -> Narrow {
    let at = |row: usize, column: usize| {
        let (row, column) = if transposed {
            (column, row)
        } else {
            (row, column)
        };
        u32::from(rows[row][2 * column]) | u32::from(rows[row][2 * column + 1]) << 8
    };
    std::array::from_fn(|l| {
        let (row, column) = (l / 4, 2 * (l % 4));
        at(row, column) | at(row, column + 1) << 16
    })
}

/// "Matrix Fragments for mma.m16n8k16 with floating point type", with `group` = lane / 4
/// and `member` = lane % 4:
/// a[i], i of 8: row `group` if i is 0, 1, 4 or 5, else 8 more; column 2 `member` + i % 2,
/// 8 more from i = 4 on; b[i], i of 4: row 2 `member` + i % 2, 8 more from i = 2 on;
/// column `group`; c[i], i of 4: row `group`, 8 more from i = 2 on; column 2 `member` + i % 2.
/// Two values of 16 bits to a register, the first in the low half. In which order the
/// products are summed, and how sums are rounded, is open.
fn multiply(a: [Narrow; 4], b: [Narrow; 2], c: [Narrow; 4]) -> [Narrow; 4] {
    let half = |registers: &[Narrow], i: usize, l: usize| {
        let pair = registers[i / 2][l];
        f32::from_bits(if i.is_multiple_of(2) {
            pair << 16
        } else {
            pair & 0xffff_0000
        })
    };
    let (mut left, mut right) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
    for l in 0..LANES {
        let (group, member) = (l / 4, l % 4);
        for i in 0..8 {
            let row = if matches!(i, 0 | 1 | 4 | 5) {
                group
            } else {
                group + 8
            };
            let column = 2 * member + i % 2 + if i >= 4 { 8 } else { 0 };
            left[row][column] = half(&a, i, l);
        }
        for i in 0..4 {
            let row = 2 * member + i % 2 + if i >= 2 { 8 } else { 0 };
            right[row][group] = half(&b, i, l);
        }
    }
    let mut sums = [[0f32; 8]; 16];
    for (sums, left) in sums.iter_mut().zip(&left) {
        for (&x, right) in left.iter().zip(&right) {
            for (sum, &y) in sums.iter_mut().zip(right) {
                *sum += x * y;
            }
        }
    }
    std::array::from_fn(|i| {
        std::array::from_fn(|l| {
            let row = l / 4 + if i >= 2 { 8 } else { 0 };
            let sum = f32::from_bits(c[i][l]) + sums[row][2 * (l % 4) + i % 2];
            if sum.is_nan() {
                0x7fff_ffff
            } else {
                sum.to_bits()
            }
        })
    })
}
