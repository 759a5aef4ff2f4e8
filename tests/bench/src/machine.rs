//! Where a figure was measured, and the clocks and meters that measure.

use std::fs;
use std::process::Command;
use std::thread;

use serde::Serialize;

/// What a figure depends on beside the code.
#[derive(Clone, Serialize)]
pub struct Machine {
    /// As the processor calls itself.
    cpu: String,
    /// Threads that run at once.
    cores: usize,
    /// The widest vectors that products are made of here.
    vectors: &'static str,
    /// Processes that ran or waited, mean of the last minute, at the start.
    load: f64,
}

impl Machine {
    /// This one.
    pub fn new() -> Self {
        let named = |line: &str| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        };
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            cpu: info.lines().find_map(named).unwrap_or_default(),
            cores: cores(),
            vectors: vectors(),
            load: load
                .split(' ')
                .next()
                .and_then(|l| l.parse().ok())
                .unwrap_or_default(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> &'static str {
    if is_x86_feature_detected!("avx512f") {
        "AVX-512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "AVX2"
    } else {
        "SSE2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> &'static str {
    std::env::consts::ARCH
}

/// Threads that run at once.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The commit that is checked out, with `+` where files differ from it.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_some_and(|files| !files.is_empty()) {
        "+"
    } else {
        ""
    };
    commit + mark
}

/// Seconds of all threads on the processor so far, to a hundredth.
pub fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may hold anything: state is field 3, utime 14, stime 15.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok());
    // The kernel reports these in hundredths on every architecture (USER_HZ).
    ticks.sum::<f64>() / 100.0
}

/// A line of /proc/self/status in MB: `VmHWM`, the most memory that was resident, or
/// `RssAnon`, what is now without the pages of files.
pub fn memory_mb(key: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = status.lines().find_map(|line| {
        let rest = line.strip_prefix(key)?.strip_prefix(':')?;
        rest.trim().strip_suffix(" kB")?.parse::<f64>().ok()
    });
    value.unwrap_or_default() * 1024.0 / 1e6
}
