//! PTX text to instructions whose operands are registers by number. Constants, special
//! registers, parameters and addresses of variables are registers too, filled before a
//! kernel starts.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use super::meaning::{Meaning, meaning};

/// What is wrong with a text, or with what it does.
pub type Problem = String;

/// A register: its file, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reg {
    /// A bit.
    Predicate(u16),
    /// 16 or 32 bits.
    Narrow(u16),
    /// 64 bits.
    Wide(u16),
}

/// What is in a register before a kernel starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Initial {
    Bits(u64),
    Parameter(usize),
    /// Thread in its block, by x.
    Thread,
    /// Block in the grid, by x, y or z.
    Block(usize),
    /// Threads of a block.
    Threads,
    /// Blocks of the grid.
    Blocks(usize),
}

/// Which memory an access is to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Read while it does not change, if so promised (`.nc`).
    Global {
        constant: bool,
    },
    Shared,
    Local,
    Const,
}

/// A place: a register and what is added to it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub base: Reg,
    pub offset: i64,
}

/// An access to memory: so many values, of so many bytes each.
#[derive(Debug)]
pub struct Access {
    pub space: Space,
    pub bytes: usize,
    pub values: Vec<Reg>,
    pub place: Place,
}

/// What an instruction does.
pub enum Act {
    /// Computes: the result first.
    Compute(Meaning, [u16; 5]),
    /// Two narrow registers as a wide one, the first its low half.
    Pack(u16, [u16; 2]),
    Unpack([u16; 2], u16),
    Load(Access),
    Store(Access),
    /// Adds a value of 32 bits to shared memory, and gives what was there if asked to.
    Add(Option<u16>, Place, u16),
    /// The same in global memory, always with what was there.
    AddGlobal(u16, Place, u16),
    /// Blocks run one after the other: nothing.
    Fence,
    Branch(usize),
    Exit,
    Barrier,
    /// shfl.sync.bfly: the value, who else gives it, `b`, `c`, the members.
    Butterfly(u16, Option<u16>, [u16; 4]),
    LoadMatrices {
        to: [u16; 4],
        place: Place,
        transposed: bool,
    },
    /// mma.m16n8k16
    Multiply(Box<Matrices>),
    CopyAsync {
        to: Place,
        from: Place,
        bytes: u16,
    },
    Commit,
    Wait(usize),
}

/// The registers of `d = a b + c`.
pub struct Matrices {
    pub d: [u16; 4],
    pub a: [u16; 4],
    pub b: [u16; 2],
    pub c: [u16; 4],
}

/// An instruction, its line in the text, and the predicate under which it is run.
pub struct Op {
    pub act: Act,
    pub line: usize,
    pub guard: Option<(u16, bool)>,
}

/// A kernel that can be run.
pub struct Code {
    pub ops: Vec<Op>,
    /// Registers of each file: predicates, narrow, wide.
    pub files: [usize; 3],
    pub initial: Vec<(Reg, Initial)>,
    /// Bytes of each parameter.
    pub parameters: Vec<usize>,
    /// The most threads of a block.
    pub threads: u32,
    /// Where static variables lie in shared memory: from, to.
    pub statics: Vec<[usize; 2]>,
    /// Where dynamic shared memory starts.
    pub dynamic: usize,
    /// Bytes of a thread's own memory.
    pub local: usize,
}

/// Memory of each space starts here, so that a lost base is an error.
pub const START: usize = 1024;

/// A text of PTX, its kernels parsed when they are first run.
pub struct Module {
    lines: Vec<String>,
    /// The constant variables, one behind the other.
    pub constants: Vec<u8>,
    symbols: HashMap<String, u64>,
    kernels: BTreeMap<String, (usize, OnceLock<Result<Code, Problem>>)>,
}

impl Module {
    /// Finds the kernels and constants of a text.
    pub fn new(text: &str) -> Self {
        let mut module = Self {
            lines: text.lines().map(str::to_owned).collect(),
            constants: Vec::new(),
            symbols: HashMap::new(),
            kernels: BTreeMap::new(),
        };
        for (i, line) in text.lines().enumerate() {
            if let Some(name) = line.strip_prefix(".visible .entry ") {
                let name = name.trim_end_matches('(').to_owned();
                module.kernels.insert(name, (i, OnceLock::new()));
            } else if let Some(variable) = line.strip_prefix(".const .align 4 .b8 ") {
                let (name, rest) = variable.split_once('[').unwrap_or((variable, ""));
                let values = rest.split_once('{').map_or("", |(_, values)| values);
                let values = values.trim_end_matches(['}', ';']).split(", ");
                let at = START + module.constants.len();
                module.symbols.insert(name.into(), at as u64);
                module.constants.extend(values.flat_map(str::parse::<u8>));
            }
        }
        module
    }

    /// The names of its kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    /// A line as it is in the text, by its index.
    pub fn line(&self, index: usize) -> &str {
        self.lines[index].trim()
    }

    /// A kernel.
    pub fn kernel(&self, name: &str) -> Result<&Code, Problem> {
        let Some((start, code)) = self.kernels.get(name) else {
            return Err("no kernel is called so".into());
        };
        let code = code.get_or_init(|| Parser::new(&self.symbols).kernel(&self.lines, *start));
        code.as_ref().map_err(Clone::clone)
    }
}

/// A kernel that is being read.
struct Parser {
    code: Code,
    registers: HashMap<String, Reg>,
    initial: HashMap<(bool, Initial), Reg>,
    parameters: HashMap<String, usize>,
    /// Addresses of variables.
    symbols: HashMap<String, u64>,
    labels: HashMap<String, usize>,
    /// Branches whose target is not known yet.
    open: Vec<(usize, String)>,
}

impl Parser {
    fn new(symbols: &HashMap<String, u64>) -> Self {
        Self {
            code: Code {
                ops: Vec::new(),
                files: [0; 3],
                initial: Vec::new(),
                parameters: Vec::new(),
                threads: 1024,
                statics: Vec::new(),
                dynamic: START,
                local: 0,
            },
            registers: HashMap::new(),
            initial: HashMap::new(),
            parameters: HashMap::new(),
            symbols: symbols.clone(),
            labels: HashMap::new(),
            open: Vec::new(),
        }
    }

    /// The kernel whose head is at this line.
    fn kernel(mut self, lines: &[String], start: usize) -> Result<Code, Problem> {
        for (i, line) in lines.iter().enumerate().skip(start + 1) {
            let text = line.split("//").next().unwrap_or("").trim();
            if text == "}" {
                break;
            }
            self.line(text, i)
                .map_err(|problem| format!("line {}, `{text}`: {problem}", i + 1))?;
        }
        for (op, label) in std::mem::take(&mut self.open) {
            let target = self.labels.get(&label);
            let target = *target.ok_or_else(|| format!("no label {label}"))?;
            self.code.ops[op].act = Act::Branch(target);
        }
        Ok(self.code)
    }

    fn line(&mut self, text: &str, line: usize) -> Result<(), Problem> {
        let mut words = text.split_whitespace();
        match words.next() {
            // Of blocks at once it says how fast, not what.
            None | Some("{" | ")" | ".pragma" | ".minnctapersm") => Ok(()),
            // Files are told by the names of the registers: see `register`.
            Some(".reg") => Ok(()),
            Some(".param") => {
                let (kind, name) = (words.next(), words.next().unwrap_or(""));
                let bytes = size(kind.unwrap_or(""))?;
                let number = self.code.parameters.len();
                self.parameters
                    .insert(name.trim_end_matches(',').into(), number);
                self.code.parameters.push(bytes);
                Ok(())
            }
            Some(".maxntid") => {
                let threads = words.next().unwrap_or("").trim_end_matches(',');
                self.code.threads = threads.parse().map_err(|_| "no number of threads")?;
                Ok(())
            }
            Some(space @ (".shared" | ".local")) => self.variable(space, text),
            Some(word) if word.ends_with(':') => {
                let label = word.trim_end_matches(':').to_owned();
                self.labels.insert(label, self.code.ops.len());
                Ok(())
            }
            Some(_) => {
                let (guard, text) = match text.strip_prefix('@') {
                    None => (None, text),
                    Some(rest) => {
                        let (name, rest) = rest.split_once(char::is_whitespace).ok_or("alone")?;
                        let plain = name.trim_start_matches('!');
                        let guard = (self.predicate(plain)?, plain.len() == name.len());
                        (Some(guard), rest.trim())
                    }
                };
                let act = self.instruction(text.trim_end_matches(';'))?;
                self.code.ops.push(Op { act, line, guard });
                Ok(())
            }
        }
    }

    /// `.shared .align 4 .b8 name[64];`, where the dynamic ones have no size, or `.u32 name;`.
    fn variable(&mut self, space: &str, text: &str) -> Result<(), Problem> {
        let mut words = text.trim_end_matches(';').split_whitespace().skip(1);
        let (Some(".align"), Some(align), Some(kind), Some(name)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err("a variable of another kind".into());
        };
        let align: usize = align.parse().map_err(|_| "no alignment")?;
        let (name, size) = match name.trim_end_matches(']').split_once('[') {
            Some((name, bytes)) if kind == ".b8" => (name, bytes.parse().map_err(|_| "no size")?),
            Some(_) => return Err("an array of another kind".into()),
            None => (name, size(kind)?),
        };
        let at = if space == ".shared" {
            let at = self.code.dynamic.next_multiple_of(align);
            self.code.statics.push([at, at + size]);
            self.code.dynamic = at + size;
            at
        } else {
            let at = START + self.code.local;
            self.code.local += size;
            at
        };
        if at % align != 0 {
            return Err("a variable that is not aligned".into());
        }
        self.symbols.insert(name.into(), at as u64);
        Ok(())
    }

    /// A register that is filled before the start.
    fn filled(&mut self, wide: bool, initial: Initial) -> Reg {
        if let Some(&reg) = self.initial.get(&(wide, initial)) {
            return reg;
        }
        let reg = self.fresh(if wide { 2 } else { 1 });
        self.initial.insert((wide, initial), reg);
        self.code.initial.push((reg, initial));
        reg
    }

    fn fresh(&mut self, file: usize) -> Reg {
        let number = self.code.files[file] as u16;
        self.code.files[file] += 1;
        match file {
            0 => Reg::Predicate(number),
            1 => Reg::Narrow(number),
            _ => Reg::Wide(number),
        }
    }

    /// A register by its name, whose letters are those that NVIDIA's compiler gives:
    /// %p a predicate; %rs, %r, %f narrow; %rd, %fd, and %SP and %SPL wide.
    fn register(&mut self, name: &str) -> Result<Reg, Problem> {
        if let Some(&reg) = self.registers.get(name) {
            return Ok(reg);
        }
        let axis = |c: char| ['x', 'y', 'z'].iter().position(|&a| a == c);
        let special = match name {
            "%tid.x" => Some(Initial::Thread),
            "%ntid.x" => Some(Initial::Threads),
            _ => match name.rsplit_once('.') {
                Some(("%ctaid", a)) => a.chars().next().and_then(axis).map(Initial::Block),
                Some(("%nctaid", a)) => a.chars().next().and_then(axis).map(Initial::Blocks),
                _ => None,
            },
        };
        if let Some(special) = special {
            return Ok(self.filled(false, special));
        }
        let reg = match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            "%p" => self.fresh(0),
            "%rs" | "%r" | "%f" => self.fresh(1),
            "%rd" | "%fd" | "%SP" | "%SPL" => self.fresh(2),
            _ => return Err(format!("what is {name}?")),
        };
        self.registers.insert(name.to_owned(), reg);
        Ok(reg)
    }

    /// A predicate, or one that is always or never true.
    fn predicate(&mut self, word: &str) -> Result<u16, Problem> {
        let reg = match word.parse::<i64>() {
            Ok(value) => {
                let reg = self.fresh(0);
                let bits = if value == 0 { 0 } else { u64::MAX };
                self.code.initial.push((reg, Initial::Bits(bits)));
                reg
            }
            Err(_) => self.register(word)?,
        };
        match reg {
            Reg::Predicate(number) => Ok(number),
            _ => Err(format!("{word} is no predicate")),
        }
    }

    fn narrow(&mut self, word: &str) -> Result<u16, Problem> {
        let reg = match word.starts_with('%') {
            true => self.register(word)?,
            false => {
                let bits = match word.strip_prefix("0f") {
                    Some(hex) => u64::from_str_radix(hex, 16).ok(),
                    None => integer(word)
                        .filter(|i| (-(1 << 31)..1 << 32).contains(i))
                        .map(i64::cast_unsigned),
                }
                .ok_or_else(|| format!("{word} is no value of 32 bits"))?;
                self.filled(false, Initial::Bits(bits & 0xffff_ffff))
            }
        };
        match reg {
            Reg::Narrow(number) => Ok(number),
            _ => Err(format!("{word} has not 32 bits")),
        }
    }

    fn wide(&mut self, word: &str) -> Result<u16, Problem> {
        let reg = match word.starts_with('%') {
            true => self.register(word)?,
            false => {
                let bits = match (word.strip_prefix("0d"), self.symbols.get(word)) {
                    (Some(hex), _) => u64::from_str_radix(hex, 16).ok(),
                    (None, Some(&address)) => Some(address),
                    // All of it that a kernel's own variables leave.
                    (None, None) if word == "dynamic_shared" => {
                        self.code.dynamic = self.code.dynamic.next_multiple_of(16);
                        Some(self.code.dynamic as u64)
                    }
                    (None, None) => integer(word).map(i64::cast_unsigned),
                };
                let bits = bits.ok_or_else(|| format!("what is {word}?"))?;
                self.filled(true, Initial::Bits(bits))
            }
        };
        match reg {
            Reg::Wide(number) => Ok(number),
            _ => Err(format!("{word} has not 64 bits")),
        }
    }

    /// `[base]` or `[base+offset]`; the base has 64 bits, or 32 in shared memory.
    fn place(&mut self, word: &str) -> Result<Place, Problem> {
        let inner = word.strip_prefix('[').and_then(|w| w.strip_suffix(']'));
        let inner = inner.ok_or_else(|| format!("{word} is no place"))?;
        let (base, offset) = match inner.split_once('+') {
            Some((base, offset)) => (base, integer(offset).ok_or("no offset")?),
            None => (inner, 0),
        };
        let base = match base.starts_with('%') {
            true => self.register(base)?,
            false => Reg::Wide(self.wide(base)?),
        };
        Ok(Place { base, offset })
    }

    /// `{a, b, …}`.
    fn group<const N: usize>(&mut self, word: &str) -> Result<[u16; N], Problem> {
        let inner = word.trim_matches(['{', '}']).split(',');
        let regs: Result<Vec<_>, _> = inner.map(|w| self.narrow(w.trim())).collect();
        regs?
            .try_into()
            .map_err(|_| format!("{word} are not {N} registers"))
    }

    fn instruction(&mut self, text: &str) -> Result<Act, Problem> {
        let (spelling, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let words = operands(rest);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(match (spelling, &words[..]) {
            ("bra" | "bra.uni", [label]) => {
                self.open
                    .push((self.code.ops.len(), label.trim_end_matches(';').into()));
                Act::Branch(usize::MAX)
            }
            ("ret", []) => Act::Exit,
            ("bar.sync", ["0"]) => Act::Barrier,
            ("mov.b64", [to, from]) if from.starts_with('{') => {
                Act::Pack(self.wide(to)?, self.group(from)?)
            }
            ("mov.b64", [to, from]) if to.starts_with('{') => {
                Act::Unpack(self.group(to)?, self.wide(from)?)
            }
            ("shfl.sync.bfly.b32", [to, a, b, c, members]) => {
                let (to, given) = match to.split_once('|') {
                    Some((to, given)) => (to, Some(self.predicate(given)?)),
                    None => (*to, None),
                };
                let mut from = [0; 4];
                for (reg, word) in from.iter_mut().zip([a, b, c, members]) {
                    *reg = self.narrow(word)?;
                }
                Act::Butterfly(self.narrow(to)?, given, from)
            }
            ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", [d, a, b, c]) => {
                Act::Multiply(Box::new(Matrices {
                    d: self.group(d)?,
                    a: self.group(a)?,
                    b: self.group(b)?,
                    c: self.group(c)?,
                }))
            }
            (
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
                | "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
                [to, place],
            ) => Act::LoadMatrices {
                to: self.group(to)?,
                place: self.place(place)?,
                transposed: spelling.contains(".trans"),
            },
            (
                "cp.async.cg.shared.global" | "cp.async.ca.shared.global",
                [to, from, "16", bytes],
            ) => Act::CopyAsync {
                to: self.place(to)?,
                from: self.place(from)?,
                bytes: self.narrow(bytes)?,
            },
            ("cp.async.commit_group", []) => Act::Commit,
            ("cp.async.wait_group", [groups]) => {
                Act::Wait(groups.parse().map_err(|_| "no number of groups")?)
            }
            ("red.shared.add.u32", [place, value]) => {
                Act::Add(None, self.place(place)?, self.narrow(value)?)
            }
            ("membar.gl", []) => Act::Fence,
            ("atom.global.add.u32", [to, place, value]) => {
                let to = self.narrow(to)?;
                Act::AddGlobal(to, self.place(place)?, self.narrow(value)?)
            }
            ("atom.shared.add.u32", [to, place, value]) => {
                let to = self.narrow(to)?;
                Act::Add(Some(to), self.place(place)?, self.narrow(value)?)
            }
            _ if spelling.starts_with("ld.param.") => {
                let [to, from] = words[..] else {
                    return Err("not two operands".into());
                };
                let number = self.parameters.get(from.trim_matches(['[', ']']));
                let &number = number.ok_or_else(|| format!("no parameter {from}"))?;
                let bytes = size(&spelling["ld.param".len()..])?;
                if self.code.parameters[number] != bytes {
                    return Err("a parameter of another size".into());
                }
                let (wide, to) = match self.register(to)? {
                    Reg::Wide(to) if bytes == 8 => (true, to),
                    // What is narrower is filled up with zeros.
                    Reg::Wide(to) if spelling == "ld.param.u32" => (true, to),
                    Reg::Narrow(to) if bytes == 4 => (false, to),
                    _ => return Err(format!("{to} has not {bytes} bytes")),
                };
                match self.filled(wide, Initial::Parameter(number)) {
                    Reg::Wide(from) => Act::Compute(Meaning::CopyWide, [to, from, 0, 0, 0]),
                    Reg::Narrow(from) | Reg::Predicate(from) => {
                        Act::Compute(Meaning::CopyNarrow, [to, from, 0, 0, 0])
                    }
                }
            }
            (_, [values, place]) if spelling.starts_with("ld.") => {
                Act::Load(self.access(spelling, values, place)?)
            }
            (_, [place, values]) if spelling.starts_with("st.") => {
                Act::Store(self.access(spelling, values, place)?)
            }
            _ => self.compute(spelling, &words)?,
        })
    }

    /// `ld` or `st` `.space{.nc}{.v2|.v4}.type`.
    fn access(&mut self, spelling: &str, values: &str, place: &str) -> Result<Access, Problem> {
        let parts: Vec<_> = spelling.split('.').skip(1).collect();
        let constant = parts.contains(&"nc");
        let count = match parts.iter().find(|part| part.starts_with('v')) {
            Some(&"v4") => 4,
            Some(&"v2") => 2,
            Some(_) => return Err("an access of another kind".into()),
            None => 1,
        };
        let known = 2 + usize::from(constant) + usize::from(count > 1);
        let space = match parts[0] {
            "global" => Space::Global { constant },
            "shared" => Space::Shared,
            "local" => Space::Local,
            "const" => Space::Const,
            _ => return Err("an access of another kind".into()),
        };
        if parts.len() != known {
            return Err("an access of another kind".into());
        }
        let bytes = size(&format!(".{}", parts[known - 1]))?;
        let words = values.trim_matches(['{', '}']).split(',').map(str::trim);
        let values: Result<Vec<_>, _> = words
            .map(|word| match bytes {
                8 => self.wide(word).map(Reg::Wide),
                _ => self.narrow(word).map(Reg::Narrow),
            })
            .collect();
        let values = values?;
        if values.len() != count {
            return Err(format!("not {count} values"));
        }
        let place = self.place(place)?;
        Ok(Access {
            space,
            bytes,
            values,
            place,
        })
    }

    fn compute(&mut self, spelling: &str, words: &[&str]) -> Result<Act, Problem> {
        use Meaning::*;
        let meaning = meaning(spelling).ok_or("an unknown instruction")?;
        // p a predicate, n narrow, w wide: the result first.
        let files = match meaning {
            Narrow1(_) | CopyNarrow => "nn",
            Narrow2(_) => "nnn",
            Narrow3(_) => "nnnn",
            Narrow4(_) => "nnnnn",
            Wide1(_) | CopyWide => "ww",
            Wide2(_) => "www",
            Wide3(_) => "wwww",
            Shift(_) => "wwn",
            Insert(_) => "wwwnn",
            Widen1(_) => "wn",
            Widen2(_) => "wnn",
            Shrink(_) => "nw",
            TestNarrow(..) => "pnn",
            TestWide(..) => "pww",
            Predicate1(_) | CopyPredicate => "pp",
            Predicate2(_) => "ppp",
            SelectNarrow => "nnnp",
            SelectWide => "wwwp",
        };
        if words.len() != files.len() {
            return Err(format!("not {} operands", files.len()));
        }
        let mut regs = [0; 5];
        for ((reg, file), word) in regs.iter_mut().zip(files.bytes()).zip(words) {
            *reg = match file {
                b'p' => self.predicate(word)?,
                b'n' => self.narrow(word)?,
                _ => self.wide(word)?,
            };
        }
        Ok(Act::Compute(meaning, regs))
    }
}

/// Bytes of a value of a type.
fn size(kind: &str) -> Result<usize, Problem> {
    Ok(match kind {
        ".u8" => 1,
        ".u16" => 2,
        ".u32" | ".f32" => 4,
        ".u64" | ".f64" => 8,
        _ => return Err(format!("a type of another kind: {kind}")),
    })
}

/// Decimal or hexadecimal, perhaps negative.
fn integer(word: &str) -> Option<i64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok().map(u64::cast_signed),
        None => word.parse().ok(),
    }
}

/// Splits at the commas that are in no braces.
fn operands(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut depth = 0;
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        match (c, depth, words.last_mut()) {
            (',', 0, _) => words.push(String::new()),
            (_, _, Some(word)) => word.push(c),
            _ => {}
        }
    }
    words.retain(|word| !word.is_empty());
    words
}
