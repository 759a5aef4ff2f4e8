//! Compiles the CUDA kernels with the C++ compiler, twice: plain, and with every
//! memory access reported to runtime/check.cc.

use std::path::Path;

const KERNELS: &str = "../../tools/lib/engine/cuda";

fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .debug(false)
        .include("runtime")
        .flag("-fno-strict-aliasing")
        // The device rounds products and sums one by one where bits must match.
        .flag("-ffp-contract=off")
        // Statics are made by whichever coroutine comes first; there is one thread.
        .flag("-fno-threadsafe-statics")
        .flag_if_supported("-Wno-unknown-pragmas")
        // The kernels register themselves: nothing refers to them by name.
        .link_lib_modifier("+whole-archive");
    build
}

fn main() {
    let kernels = Path::new(KERNELS).join("kernels.cu");
    let faults = Path::new("runtime/faults.cu").to_owned();
    compiler()
        .files(["runtime/runtime.cc", "runtime/check.cc"])
        .compile("cuda_runtime");
    compiler()
        .flag("-xc++")
        .include(KERNELS)
        .files([&kernels, &faults])
        .compile("cuda_kernels");
    compiler()
        .flag("-xc++")
        .define("CHECKED", None)
        .flag("-fsanitize=thread")
        .include(KERNELS)
        .files([&kernels, &faults])
        .compile("cuda_kernels_checked");
    println!("cargo:rerun-if-changed={KERNELS}");
    println!("cargo:rerun-if-changed=runtime");
}
