//! The PTX that is shipped, interpreted: every kernel against the CPU, a small training
//! and its replies; and that a mistake in it is found.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use cuda_on_cpu::{Interpreted, PTX, Ptx};
use engine::cuda::{Arg, Driver, Launch};
use engine::{Cuda, Heads, Rounded};

use crate::kernels::{BF16, attend, thin};
use crate::support::{ONLY_PTX, distance, half_step};

#[test]
fn every_kernel_and_a_training_in_the_ptx_that_is_shipped() {
    if std::env::var_os(ONLY_PTX).is_some() {
        return; // the child itself
    }
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["kernels::", "model::a_head", "--nocapture"]);
    let output = tests.env(ONLY_PTX, "1").output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    let ptx = Ptx::shipped();
    let ran = |kernel: &&str| text.contains(&format!("interpreted: {kernel}\n"));
    let missing: Vec<_> = ptx.kernels().filter(|kernel| !ran(kernel)).collect();
    assert!(missing.is_empty(), "no check runs {missing:?}\n{text}");
    assert_eq!(ptx.kernels().count(), PTX.matches(".entry").count());
}

/// The lines of a kernel.
fn body(kernel: &str) -> std::ops::Range<usize> {
    let start = PTX.find(&format!(".entry {kernel}(")).unwrap();
    start..start + PTX[start..].find("\n}").unwrap()
}

/// The compiler of the driver may make one instruction, which rounds once, of a product
/// and a sum that do not say `.rn` ("mul", "add").
#[test]
fn where_bits_must_match_nothing_can_be_contracted() {
    let pairs = |kernel: &str| {
        let parts = |line: &'static str| -> Vec<&str> {
            line.split([' ', '\t', ',', ';'])
                .filter(|w| !w.is_empty())
                .collect()
        };
        let lines = || PTX[body(kernel)].lines().map(parts);
        let of = |line: &[&str], names: &[&str]| line.first().is_some_and(|w| names.contains(w));
        let products: HashSet<_> = lines()
            .filter(|line| of(line, &["mul.f32", "mul.f64"]))
            .map(|line| line[1])
            .collect();
        lines()
            .filter(|line| of(line, &["add.f32", "sub.f32", "add.f64", "sub.f64"]))
            .filter(|line| line[2..].iter().any(|word| products.contains(word)))
            .count()
    };
    let exact = [
        "nf4_decode",
        "nf4_quantize_bf16",
        "nf4_quantize_f32",
        "nf4_nest",
        "add_noise",
        "adamw_8bit",
        "sample",
    ];
    for kernel in exact {
        assert_eq!(pairs(kernel), 0, "{kernel}");
    }
    // Where they need not, some can.
    assert!(pairs("attention_backward_q_32") > 0);
}

/// The text with line `n` of a kernel that says this said otherwise; none where there
/// are not so many.
fn edited(kernel: &str, says: &str, n: usize, edit: impl Fn(&str) -> String) -> Option<String> {
    let body = body(kernel);
    let at = body.start + PTX[body].match_indices(says).nth(n)?.0;
    let begin = PTX[..at].rfind('\n').unwrap() + 1;
    let end = at + PTX[at..].find('\n').unwrap();
    Some([&PTX[..begin], &edit(&PTX[begin..end]), &PTX[end..]].concat())
}

/// Operands `a` and `b` of an instruction, counted over all its registers, exchanged.
fn swapped(line: &str, a: usize, b: usize) -> String {
    let is_name = |c: char| c == '%' || c.is_ascii_alphanumeric();
    let mut pieces: Vec<&str> = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let named = rest.starts_with('%');
        let end = rest[1..].find(|c| if named { !is_name(c) } else { c == '%' });
        let (piece, tail) = rest.split_at(end.map_or(rest.len(), |i| i + 1));
        pieces.push(piece);
        rest = tail;
    }
    let registers: Vec<_> = (0..pieces.len())
        .filter(|&i| pieces[i].starts_with('%'))
        .collect();
    pieces.swap(registers[a], registers[b]);
    pieces.concat()
}

/// What a device computes, to be compared.
type Check = fn(&Cuda) -> Vec<Vec<f32>>;

/// What a check says of a device with this PTX, if anything.
fn verdict(ptx: &str, check: Check, reference: &[Vec<f32>]) -> Option<String> {
    let run = || {
        let cuda = Cuda::new(Box::new(Interpreted::of(Ptx::new(ptx)))).unwrap();
        check(&cuda)
    };
    let results = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(results) => results,
        Err(panic) => return Some(panic.downcast_ref::<String>().unwrap().clone()),
    };
    let mut pairs = results.iter().zip(reference);
    // As `compare` has it, but with the limit of bf16 for all.
    let wrong = pairs.find(|(got, want)| distance(got, want) > BF16.hypot(half_step(want)));
    wrong.map(|(got, want)| format!("off by {:.1e}", distance(got, want)))
}

/// Three tiles: as many as it takes to load over one.
const LENGTHS: [usize; 2] = [134, 5];
const NARROW: Heads = Heads {
    query: 2,
    kv: 1,
    dim: 32,
};

#[test]
fn a_mistake_in_the_ptx_is_found() {
    type Edit = fn(&str) -> String;
    let none: Edit = |_| String::new();
    // How many of these lines, and what becomes of one; whether each is found.
    let edits: [(&str, usize, Edit); 10] = [
        ("cvt.rn.bf16x2.f32", 4, |line| swapped(line, 1, 2)),
        ("ldmatrix", 4, |line| match line.contains(".trans") {
            true => line.replace(".trans", ""),
            false => line.replace(".x4", ".x4.trans"),
        }),
        ("ldmatrix", 4, |line| swapped(line, 1, 2)),
        ("mma.sync", 4, |line| swapped(line, 5, 6)), // of a: other rows, other columns
        ("mma.sync", 4, |line| swapped(line, 8, 9)), // of b
        ("mma.sync", 4, |line| swapped(line, 0, 1)), // of the sum
        ("bar.sync", 2, none),
        ("cp.async.wait_group", 1, none),
        ("shfl.sync", 4, |line| swapped(line, 3, 4)),
        ("prmt.b32", 4, |line| swapped(line, 1, 2)),
    ];
    let attention = [
        "attention_32",
        "attention_backward_q_32",
        "attention_backward_kv_32",
    ];
    let products = ["thin_product", "thin_factors", "thin_inputs"];
    let narrow = |b: &Cuda| attend(b, NARROW, &LENGTHS);
    let references = [attend(&Rounded, NARROW, &LENGTHS), thin(&Rounded)];
    let checks: [Check; 2] = [narrow, thin];
    for ((kernels, check), reference) in [attention, products].iter().zip(checks).zip(&references) {
        assert_eq!(verdict(PTX, check, reference), None);
        for kernel in kernels {
            for (says, count, edit) in &edits {
                let texts = (0..*count).map_while(|n| edited(kernel, says, n, edit));
                for (n, text) in texts.enumerate() {
                    let found = verdict(&text, check, reference);
                    println!("{kernel}, {says} {n}: {found:?}");
                    assert!(found.is_some(), "{kernel}, {says} {n}");
                }
            }
        }
    }
}

/// Runs a kernel of one block of 32 threads on 32 words, its body as given.
fn words(body: &str) -> Result<Vec<u32>, String> {
    let text = format!(
        ".visible .entry test(\n.param .u64 test_param_0\n)\n.maxntid 64, 1, 1\n{{\n\
         .shared .align 16 .b8 words[256];\n\
         mov.u32 %r1, %tid.x;\n\
         mul.wide.u32 %rd1, %r1, 4;\n\
         mov.u64 %rd9, words;\n\
         add.s64 %rd2, %rd1, %rd9;\n\
         ld.param.u64 %rd3, [test_param_0];\n\
         add.s64 %rd4, %rd1, %rd3;\n\
         {body}\n\
         $L_end:\nret;\n}}\n"
    );
    let device = Interpreted::of(Ptx::new(&text));
    let buffer = device.allocate("test", 128).unwrap();
    let launch = Launch {
        kernel: "test",
        grid: [1, 1, 1],
        block: 32,
        shared: 0,
        args: &[Arg::Pointer(buffer)],
    };
    device.launch(&launch).map_err(|e| e.to_string())?;
    let bytes = device.read(buffer, 128).unwrap().wait().unwrap();
    let word = |b: &[u8]| u32::from_ne_bytes(b.try_into().unwrap());
    Ok(bytes.chunks_exact(4).map(word).collect())
}

#[test]
fn what_is_undefined_is_an_error() {
    let divergent = "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_end;\n";
    for (body, says) in [
        ("st.global.u32 [%rd4], %r7;", "never written"),
        ("ld.shared.u32 %r2, [%rd2];", "never written"),
        ("ld.shared.u32 %r2, [%rd2+256];", "of no shared variable"),
        (
            "st.shared.u32 [%rd2], %r1;\nld.shared.u32 %r2, [%rd9];",
            "race",
        ),
        ("st.shared.u32 [%rd9], %r1;", "race"),
        ("ld.global.u32 %r2, [%rd4+4];", "in no buffer"),
        ("ld.global.u32 %r2, [%rd4+2];", "not aligned"),
        (
            "ld.global.nc.u32 %r2, [%rd4];\nst.global.u32 [%rd4], %r1;",
            ".nc",
        ),
        ("frob.u32 %r2, %r1;", "unknown instruction"),
        ("add.s32 %r2, %r1, %rd1;", "not 32 bits"),
        (&format!("{divergent}bar.sync 0;"), "not all threads reach"),
        (
            &format!("{divergent}shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;"),
            "diverge",
        ),
    ] {
        let error = words(body).unwrap_err();
        assert!(error.contains(says), "{body}: {error}");
        assert!(error.contains("line ") && error.contains("test"), "{error}");
    }
}

#[test]
fn odd_instructions_are_as_the_manual_says() {
    // By hand from the manual's descriptions; the lane's number is in %r1.
    for (body, want) in [
        // The first operand in the upper half; ties to even; NaN is one value.
        (
            "cvt.rn.bf16x2.f32 %r2, 0f3F800000, 0fC0000000;",
            0x3f80_c000,
        ),
        (
            "cvt.rn.bf16x2.f32 %r2, 0f3F808000, 0f3F818000;",
            0x3f80_3f82,
        ),
        (
            "cvt.rn.bf16x2.f32 %r2, 0fFFC00000, 0f7F7FFFFF;",
            0x7fff_7f80,
        ),
        // By bytes, the lowest digit first; with 8 the byte's sign.
        ("prmt.b32 %r2, 0x33221180, 0x77665544, 0x3610;", 0x3366_1180),
        ("prmt.b32 %r2, 0x33221180, 0x77665594, 0x0c98;", 0x80ff_00ff),
        ("bfi.b32 %r2, 255, 0, 4, 2;", 0x30),
        ("bfi.b32 %r2, -1, 0, 28, 8;", 0xf000_0000),
        ("shl.b32 %r2, 1, 32;", 0),
        ("shr.u32 %r2, -1, 40;", 0),
        ("shr.s32 %r2, -5, 99;", u32::MAX),
        ("mul.hi.u32 %r2, -1, -1;", u32::MAX - 1),
        ("min.s32 %r2, -3, 2;", (-3i32).cast_unsigned()),
        ("rem.u32 %r2, -1, 10;", u32::MAX % 10),
        (
            "cvt.u16.u32 %rs1, 0x18000;\nsetp.lt.s16 %p1, %rs1, 0;\nselp.b32 %r2, 1, 2, %p1;",
            1,
        ),
        ("min.u64 %rd6, -1, 7;\ncvt.u32.u64 %r2, %rd6;", 7),
        (
            "max.u64 %rd6, -9, 7;\ncvt.u32.u64 %r2, %rd6;",
            (-9i32).cast_unsigned(),
        ),
        // What was there, and what is there then: of each lane its own word.
        (
            "st.shared.u32 [%rd2], 7;\nbar.sync 0;\natom.shared.add.u32 %r2, [%rd2], 5;",
            7,
        ),
        (
            "st.shared.u32 [%rd2], 7;\nbar.sync 0;\nred.shared.add.u32 [%rd2], -5;\nbar.sync 0;\nld.shared.u32 %r2, [%rd2];",
            2,
        ),
        (
            "st.global.u32 [%rd4], 7;\natom.global.add.u32 %r2, [%rd4], 5;",
            7,
        ),
        (
            "min.f32 %f1, 0f7FC00000, 0f40000000;\nmov.b32 %r2, %f1;",
            0x4000_0000,
        ),
        ("max.f32 %f1, 0f80000000, 0f00000000;\nmov.b32 %r2, %f1;", 0),
        (
            "min.f32 %f1, 0f80000000, 0f00000000;\nmov.b32 %r2, %f1;",
            1 << 31,
        ),
        (
            "sub.f32 %f1, 0f7F800000, 0f7F800000;\nmov.b32 %r2, %f1;",
            0x7fff_ffff,
        ),
        ("cvt.sat.f32.f32 %f1, 0f7FC00000;\nmov.b32 %r2, %f1;", 0),
        ("cvt.sat.f32.f32 %f1, 0fBF800000;\nmov.b32 %r2, %f1;", 0),
        (
            "cvt.rni.f32.f32 %f1, 0f40200000;\nmov.b32 %r2, %f1;",
            0x4000_0000,
        ),
        ("cvt.rzi.s32.f32 %r2, 0fC0200000;", (-2i32).cast_unsigned()),
        ("cvt.rzi.s32.f32 %r2, 0f7FC00000;", 0),
        // 1 + 2^-24, and -1 - 2^-24: down.
        (
            "fma.rm.f32 %f1, 0f33800000, 0f3F800000, 0f3F800000;\nmov.b32 %r2, %f1;",
            0x3f80_0000,
        ),
        (
            "fma.rm.f32 %f1, 0fB3800000, 0f3F800000, 0fBF800000;\nmov.b32 %r2, %f1;",
            0xbf80_0001,
        ),
        (
            "ex2.approx.f32 %f1, 0fC3000000;\nmov.b32 %r2, %f1;",
            0x0020_0000,
        ),
        ("ex2.approx.ftz.f32 %f1, 0fC3000000;\nmov.b32 %r2, %f1;", 0),
        // 1 / 2 a unit too large, 1 / 3 one too small; a subnormal is zero, before and after.
        (
            "rcp.approx.ftz.f32 %f1, 0f40000000;\nmov.b32 %r2, %f1;",
            0x3f00_0001,
        ),
        (
            "rcp.approx.ftz.f32 %f1, 0f40400001;\nmov.b32 %r2, %f1;",
            0x3eaa_aaa9,
        ),
        (
            "rcp.approx.ftz.f32 %f1, 0f80000001;\nmov.b32 %r2, %f1;",
            0xff80_0000,
        ),
        ("rcp.approx.ftz.f32 %f1, 0f7F000001;\nmov.b32 %r2, %f1;", 0),
        (
            "setp.neu.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r2, 1, 0, %p1;",
            1,
        ),
        (
            "setp.lt.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r2, 1, 0, %p1;",
            0,
        ),
        ("setp.lt.s32 %p1, -1, 0;\nselp.b32 %r2, 1, 0, %p1;", 1),
        ("setp.lt.u32 %p1, -1, 0;\nselp.b32 %r2, 1, 0, %p1;", 0),
    ] {
        let got = words(&format!("{body}\nst.global.u32 [%rd4], %r2;")).unwrap();
        assert!(got.iter().all(|&x| x == want), "{body}: {:#x}", got[0]);
    }
    let halves = "mul.wide.s32 %rd5, %r1, -3;\nmov.b64 {%r2, %r3}, %rd5;";
    for (body, want) in [
        (
            "shfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1;",
            (|l| l ^ 5) as fn(u32) -> u32,
        ),
        // Beyond the last lane of the segment: its own.
        ("shfl.sync.bfly.b32 %r2|%p1, %r1, 16, 15, -1;", |l| {
            if l < 16 { l } else { l - 16 }
        }),
        (halves, |l| 0u32.wrapping_sub(3 * l)),
        (
            "add.s32 %r2, %r1, %r1;\nsetp.gt.u32 %p1, %r1, 9;\n@%p1 bra $L_1;\nadd.s32 %r2, %r2, 1;\n$L_1:",
            |l| 2 * l + u32::from(l < 10),
        ),
    ] {
        let got = words(&format!("{body}\nst.global.u32 [%rd4], %r2;")).unwrap();
        let want: Vec<_> = (0..32).map(want).collect();
        assert_eq!(got, want, "{body}");
    }
}
