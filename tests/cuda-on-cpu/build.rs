//! Compiles the CUDA kernels with the C++ compiler, twice: plain, and with every
//! memory access reported to runtime/check.cc. With CUDA_ON_CPU_ASAN set (`make
//! asan`) the plain ones and the runtime go through AddressSanitizer instead, which
//! sees memory that was given back as well.

use std::path::{Path, PathBuf};

const KERNELS: &str = "../../tools/lib/engine/cuda";

const ASAN: &str = "CUDA_ON_CPU_ASAN";

/// The plain kernels and the runtime. Stacks are left alone: they are the
/// coroutines', which the sanitizer would have to be told of at each switch.
fn watched() -> cc::Build {
    let mut build = compiler();
    if std::env::var_os(ASAN).is_some() {
        build
            .flag("-fsanitize=address")
            .flag("--param=asan-stack=0");
    }
    build
}

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
    let [faults, fragments] =
        ["faults", "fragments"].map(|name| Path::new("runtime").join(name).with_extension("cu"));
    watched()
        .files(["runtime/runtime.cc", "runtime/check.cc"])
        .compile("cuda_runtime");
    watched()
        .flag("-xc++")
        .include(KERNELS)
        .files([&kernels, &faults, &fragments])
        .compile("cuda_kernels");
    compiler()
        .flag("-xc++")
        .define("CHECKED", None)
        .flag("-fsanitize=thread")
        .include(KERNELS)
        .files([&kernels, &faults, &fragments])
        .compile("cuda_kernels_checked");
    stand_in();
    if std::env::var_os(ASAN).is_some() {
        println!("cargo:rustc-link-lib=dylib=asan");
    }
    println!("cargo:rerun-if-env-changed={ASAN}");
    println!("cargo:rerun-if-changed={KERNELS}");
    println!("cargo:rerun-if-changed=runtime");
}

/// The same kernels behind the interface of NVIDIA's libraries, for programs that
/// are started with their folders on LD_LIBRARY_PATH.
fn stand_in() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for (folder, name) in [("driver", "libcuda.so.1"), ("cublas", "libcublasLt.so.12")] {
        let folder = out.join(folder);
        std::fs::create_dir_all(&folder).expect("OUT_DIR can be written");
        let library = folder.join(name);
        let mut link = watched().get_compiler().to_command();
        link.arg("-shared").arg("-o").arg(&library);
        if folder.ends_with("driver") {
            link.args(["-fPIC", "-fvisibility=hidden", "runtime/libcuda.cc"])
                .arg(format!("-Wl,-soname,{name}"))
                .arg("-Wl,--whole-archive")
                .args(["libcuda_runtime.a", "libcuda_kernels.a"].map(|a| out.join(a)))
                .arg("-Wl,--no-whole-archive");
        } else {
            // Its functions are the other library's: they share the device.
            link.arg("-Wl,--no-as-needed")
                .arg(out.join("driver/libcuda.so.1"))
                .arg(format!("-Wl,-soname,{name}"));
        }
        let status = link.status().expect("the C++ compiler starts");
        assert!(status.success(), "linking {name}");
        // Asked for first: a machine with a GPU may have the real one under it.
        let plain = folder.join(&name[..name.find(".so").expect("a library") + 3]);
        let _ = std::fs::remove_file(&plain);
        std::os::unix::fs::symlink(name, &plain).expect("OUT_DIR can be written");
    }
    println!("cargo:rustc-env=STAND_IN={}", out.display());
}
