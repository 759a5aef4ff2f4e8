//! The runtime finds what it is there to find: a kernel with one mistake is an
//! error that names it, in whichever order its threads run.

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
