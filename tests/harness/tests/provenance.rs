//! The dumped references are those that their scripts wrote: every file under
//! tests/parity stands in its folder's provenance.json with its hash, or in NAME-provenance.json
//! where another script wrote it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .flat_map(|entry| match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path()),
            false => vec![entry.path()],
        })
        .collect()
}

/// What needs no hash: scripts, what Python leaves beside them, notices, and the record.
fn is_beside(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    let compiled = path
        .components()
        .any(|part| part.as_os_str() == "__pycache__");
    let is_script = name.ends_with(".py") || path.metadata().unwrap().permissions().mode() & 1 != 0;
    compiled || is_script || name == "NOTICE" || name.ends_with("provenance.json")
}

#[test]
fn every_reference_is_as_its_script_wrote_it() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../parity");
    let mut checked = 0;
    for folder in fs::read_dir(&parity).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let mut unknown: BTreeSet<PathBuf> = files(&folder).into_iter().collect();
        unknown.retain(|path| !is_beside(path));
        let entries = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let is_record = |path: &PathBuf| path.to_str().unwrap().ends_with("provenance.json");
        for record in entries.filter(is_record) {
            let text = fs::read_to_string(&record).unwrap();
            let record: Value = serde_json::from_str(&text).unwrap();
            assert!(
                record["date"].is_string(),
                "{} has no date",
                folder.display()
            );
            for (name, hash) in record["sha256"].as_object().unwrap() {
                let path = folder.join(name);
                let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let found: String = Sha256::digest(&bytes)
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                assert_eq!(*hash, found, "{}: run its script again", path.display());
                unknown.remove(&path);
                checked += 1;
            }
        }
        assert!(
            unknown.is_empty(),
            "without a hash in provenance.json: {unknown:?}"
        );
    }
    assert!(checked > 20, "only {checked} references found");
}
