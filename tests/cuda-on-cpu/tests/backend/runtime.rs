//! The runtime finds what it is there to find: a kernel with one mistake is an
//! error that names it, in whichever order its threads run. And its matrix
//! instructions share a matrix among the lanes as a device's do.

use cuda_on_cpu::{Emulated, Order};
use engine::cuda::{Arg, Driver, Launch};

/// Runs a kernel of 64 threads on one buffer of 64 floats of 1.
fn run(kernel: &'static str, order: Order, checked: bool) -> Result<Vec<f32>, String> {
    let device = Emulated::new(order, checked);
    let buffer = device.allocate("test", 256).unwrap();
    device
        .write(&1f32.to_ne_bytes().repeat(64), buffer)
        .unwrap();
    let launch = Launch {
        kernel,
        grid: [1, 1, 1],
        block: 64,
        shared: 256,
        args: &[Arg::Pointer(buffer)],
    };
    device.launch(&launch).map_err(|e| e.to_string())?;
    let bytes = device.read(buffer, 256).unwrap().wait().unwrap();
    let float = |b: &[u8]| f32::from_ne_bytes(b.try_into().unwrap());
    Ok(bytes.chunks_exact(4).map(float).collect())
}

#[test]
fn a_right_kernel_runs() {
    for order in Order::ALL {
        for checked in [false, true] {
            let want: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
            assert_eq!(run("fault_none", order, checked).unwrap(), want);
        }
    }
}

#[test]
fn mistakes_are_errors() {
    for (kernel, says) in [
        ("fault_no_barrier", "race in shared memory"),
        ("fault_weak_barrier", "race in shared memory"),
        ("fault_overwritten", "race in shared memory"),
        ("fault_divergent", "deadlock"),
        ("fault_divergent_warp", "diverge"),
        ("fault_outside", "outside every buffer"),
        ("fault_outside_shared", "outside every buffer"),
        ("fault_misaligned", "not aligned"),
        ("fault_that_is_not_there", "no kernel is called"),
    ] {
        for order in Order::ALL {
            let error = run(kernel, order, true).unwrap_err();
            assert!(
                error.contains(says) && error.contains(kernel),
                "{kernel}, {order:?}: {error}"
            );
        }
    }
}

#[test]
fn what_is_undefined_shows() {
    let nan = |x: &f32| x.is_nan();
    for order in Order::ALL {
        assert!(
            run("fault_uninitialised", order, false)
                .unwrap()
                .iter()
                .all(nan),
            "{order:?}"
        );
        assert!(
            run("fault_no_wait", order, false).unwrap().iter().any(nan),
            "{order:?}"
        );
    }
}

#[test]
fn a_launch_that_does_not_fit_the_kernel_is_an_error() {
    let device = Emulated::new(Order::Forward, true);
    let buffer = device.allocate("test", 256).unwrap();
    let fits = Launch {
        kernel: "fault_none",
        grid: [1, 1, 1],
        block: 64,
        shared: 0,
        args: &[Arg::Pointer(buffer)],
    };
    device.launch(&fits).unwrap();
    for (wrong, says) in [
        (Launch { args: &[], ..fits }, "arguments"),
        (
            Launch {
                args: &[Arg::U32(1)],
                ..fits
            },
            "arguments",
        ),
        (
            Launch {
                block: 1025,
                ..fits
            },
            "refuses",
        ),
        (
            Launch {
                grid: [1, 70_000, 1],
                ..fits
            },
            "refuses",
        ),
        (
            Launch {
                shared: 100 << 10,
                ..fits
            },
            "refuses",
        ),
    ] {
        let error = device.launch(&wrong).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(device.zero(buffer + 8, 256).is_err());
}

/// Runs a kernel of one warp on buffers of words; gives the last one, of 128.
fn warp(kernel: &'static str, inputs: &[&[u32]]) -> Vec<u32> {
    let device = Emulated::new(Order::Forward, true);
    let mut args = Vec::new();
    for words in inputs {
        let buffer = device.allocate("test", 4 * words.len()).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        device.write(&bytes, buffer).unwrap();
        args.push(Arg::Pointer(buffer));
    }
    let out = device.allocate("test", 512).unwrap();
    args.push(Arg::Pointer(out));
    let launch = Launch {
        kernel,
        grid: [1, 1, 1],
        block: 32,
        shared: 0,
        args: &args,
    };
    device.launch(&launch).unwrap();
    let bytes = device.read(out, 512).unwrap().wait().unwrap();
    let word = |b: &[u8]| u32::from_ne_bytes(b.try_into().unwrap());
    bytes.chunks_exact(4).map(word).collect()
}

/// Where a lane's value lies, by a layout as CUTLASS writes them: what the lane modulo 4,
/// its quotient, and each bit of the value's number count for.
fn place([low, high]: [usize; 2], bits: &[usize], lane: usize, value: usize) -> usize {
    let bits = bits.iter().enumerate();
    let of_value: usize = bits.map(|(i, stride)| (value >> i & 1) * stride).sum();
    lane % 4 * low + lane / 4 * high + of_value
}

#[test]
fn lanes_share_a_product_as_cutlass_says() {
    // CUTLASS's MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>: places in a [16, 16] and
    // out [16, 8], columns one behind the other, and in b [16, 8], its rows so.
    let in_a = |lane, value| place([32, 1], &[16, 8, 128], lane, value);
    let in_b = |lane, value| place([16, 1], &[8, 64], lane, value);
    let in_out = |lane, value| place([32, 1], &[16, 8], lane, value);
    // Whole numbers, so that every order of the sums is exact.
    let a: Vec<f32> = (0..256).map(|i| (i * 37 % 41) as f32 - 20.0).collect();
    let b: Vec<f32> = (0..128).map(|i| (i * 29 % 31) as f32 - 15.0).collect();
    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
    let words = |from: &[f32], at: &dyn Fn(usize, usize) -> usize, count: usize| -> Vec<u32> {
        let of_lane = |lane| {
            let value = move |v| bits(from[at(lane, v)]);
            (0..count).map(move |w| value(2 * w) | value(2 * w + 1) << 16)
        };
        (0..32).flat_map(of_lane).collect()
    };
    let found = warp(
        "fragments_multiply",
        &[&words(&a, &in_a, 4), &words(&b, &in_b, 2)],
    );
    for lane in 0..32 {
        for value in 0..4 {
            let (row, column) = (in_out(lane, value) % 16, in_out(lane, value) / 16);
            let term = |k: usize| a[row + 16 * k] * b[column + 8 * k];
            let want: f32 = (0..16).map(term).sum();
            let got = f32::from_bits(found[4 * lane + value]);
            assert_eq!(got, want, "lane {lane}, value {value}");
        }
    }
}

#[test]
fn lanes_share_loaded_matrices_as_cutlass_says() {
    // CUTLASS's Copy_Traits<SM75_U32x4_LDSM_N> and <SM75_U16x8_LDSM_T>, in 16-bit values
    // of the rows that the lanes point to, one behind the other.
    let plain = |lane, value| place([2, 8], &[1, 64, 128], lane, value);
    let transposed = |lane, value| place([16, 1], &[8, 64, 128], lane, value);
    let rows: Vec<u32> = (0..128).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
    for (kernel, at) in [
        ("fragments_load", &plain as &dyn Fn(usize, usize) -> usize),
        ("fragments_load_transposed", &transposed),
    ] {
        let found = warp(kernel, &[&rows]);
        for lane in 0..32 {
            for value in 0..8 {
                let got = found[4 * lane + value / 2] >> (16 * (value % 2)) & 0xffff;
                let want = at(lane, value) as u32;
                assert_eq!(got, want, "{kernel}, lane {lane}, value {value}");
            }
        }
    }
}
