//! How much memory this process can still have.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// Bytes that can be had without swapping: what the kernel says is available, or
/// less where a control group (a container, a batch system's job) sets a limit.
/// None where the system does not tell.
pub(super) fn bytes() -> Option<usize> {
    let system = read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    });
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limited = folders(&groups).filter_map(|folder| left_in(&folder));
    system.into_iter().chain(limited).min()
}

/// The folders of the memory's control groups, from a process's own group up to
/// the root; inside a container its own group appears as the root.
fn folders(groups: &str) -> impl Iterator<Item = PathBuf> {
    let own = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let root = match parts.next()? {
            "" => "/sys/fs/cgroup",
            controllers if controllers.split(',').any(|c| c == "memory") => "/sys/fs/cgroup/memory",
            _ => return None,
        };
        Some((Path::new(root), parts.next()?.trim_start_matches('/')))
    });
    own.flat_map(|(root, group)| {
        let up = Path::new(group).ancestors().map(|group| root.join(group));
        up.collect::<Vec<_>>()
    })
}

/// What a group's limit leaves, not counting file pages that would be given up.
fn left_in(folder: &Path) -> Option<usize> {
    let read = |name: &str| read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
    // "max", for no limit, is no number; the first version of groups has a huge one.
    let (limit, used, given_up) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?, "inactive_file "),
        None => (
            number("memory.limit_in_bytes")?,
            number("memory.usage_in_bytes")?,
            "total_inactive_file ",
        ),
    };
    let files: usize = read("memory.stat")?
        .lines()
        .find_map(|line| line.strip_prefix(given_up)?.trim().parse().ok())?;
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn groups_are_looked_for_up_to_the_root() {
        let found: Vec<_> = folders("5:cpu:/x\n4:memory,hugetlb:/a/b\n0::/\n").collect();
        let paths = [
            "/sys/fs/cgroup/memory/a/b",
            "/sys/fs/cgroup/memory/a",
            "/sys/fs/cgroup/memory/",
            "/sys/fs/cgroup/",
        ];
        assert_eq!(found, paths.map(PathBuf::from));
    }

    #[test]
    fn a_limit_leaves_what_is_not_used_or_could_be_given_up() {
        let folder = std::env::temp_dir().join(format!("cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        file("memory.current", "700\n");
        file("memory.stat", "anon 500\ninactive_file 150\n");
        file("memory.max", "max\n");
        assert_eq!(left_in(&folder), None);
        file("memory.max", "1000\n");
        assert_eq!(left_in(&folder), Some(450));
        file("memory.max", "500\n");
        assert_eq!(left_in(&folder), Some(0));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn linux_tells() {
        let free = bytes().unwrap();
        assert!(free > 1 << 20, "{free}");
    }
}
