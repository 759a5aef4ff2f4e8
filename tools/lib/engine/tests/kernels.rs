//! The PTX in the tree is that of the kernels in the tree.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

#[test]
fn ptx_and_sources_belong_together() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let ptx = fs::read_to_string(folder.join("kernels.ptx")).unwrap();
    let mut sources: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh"))
        .collect();
    sources.sort();
    let mut digest = Sha256::new();
    for path in &sources {
        digest.update(fs::read(path).unwrap());
    }
    let digest: String = digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let head = ptx.lines().next().unwrap();
    assert!(
        head.starts_with(&format!("// sources {digest};")),
        "the kernels have changed and their PTX has not: run make kernels"
    );
    // What the oldest supported driver and GPU take.
    let lines: Vec<&str> = ptx.lines().collect();
    assert!(lines.contains(&".version 8.4") && lines.contains(&".target sm_80"));

    // Every kernel of the sources is in it.
    let text: String = sources
        .iter()
        .map(|p| fs::read_to_string(p).unwrap())
        .collect();
    let exported = text
        .lines()
        .filter_map(|line| line.strip_prefix("EXPORT(")?.strip_suffix(')'));
    let mut count = 0;
    for name in exported {
        assert!(ptx.contains(&format!(".entry {name}(")), "{name}");
        count += 1;
    }
    assert!(count > 15, "{count} kernels");
}
