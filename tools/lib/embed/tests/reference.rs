//! The vectors against transformers' (tests/parity/embed) and against themselves.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use embed::{DIM, Embedder, Error};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn embedder() -> Embedder {
    Embedder::load(&root().join(embed::DEFAULT_DIR)).unwrap_or_else(|e| panic!("{e}"))
}

fn sentences() -> Vec<String> {
    serde_json::from_slice(&fs::read(root().join("tests/parity/embed/sentences.json")).unwrap())
        .unwrap()
}

/// Measured on 2026-11-23: no component is off by more than 2.8e-7. Cutting the
/// long sentence at 128 tokens, as the tokenizer file has it, is off by 0.057.
#[test]
fn vectors_are_those_of_transformers() {
    let bytes = fs::read(root().join("tests/parity/embed/vectors.f32")).unwrap();
    let expected: Vec<f32> = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let sentences = sentences();
    let found = embedder().embed(&sentences, |_| ()).unwrap();
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.chunks(DIM).zip(expected.chunks(DIM)).enumerate() {
        let worst = found
            .iter()
            .zip(expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        println!("{i}: {worst:e}");
        assert!(worst < 1e-6, "sentence {i} is off by {worst:e}");
    }
}

#[test]
fn a_vector_depends_on_its_text_alone() {
    let embedder = embedder();
    // Copies and near-lengths make batches of many sizes.
    let texts: Vec<String> = (0..3)
        .flat_map(|i| {
            sentences()
                .into_iter()
                .map(move |s| format!("{s}{}", " tram".repeat(i)))
        })
        .collect();
    let pool = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
    };
    let together = pool(1).install(|| embedder.embed(&texts, |_| ()).unwrap());
    assert_eq!(
        together,
        pool(8).install(|| embedder.embed(&texts, |_| ()).unwrap()),
        "1 and 8 threads differ"
    );
    for (i, text) in texts.iter().enumerate() {
        let alone = embedder.embed(&[text], |_| ()).unwrap();
        assert_eq!(
            alone,
            together[i * DIM..][..DIM],
            "text {i} has another vector in company"
        );
    }
}

#[test]
fn progress_counts_every_text_and_nothing_is_fine() {
    let embedder = embedder();
    let most = std::sync::atomic::AtomicUsize::new(0);
    embedder
        .embed(&sentences(), |n| {
            most.fetch_max(n, std::sync::atomic::Ordering::Relaxed);
        })
        .unwrap();
    assert_eq!(most.into_inner(), sentences().len());
    assert!(embedder.embed::<&str>(&[], |_| ()).unwrap().is_empty());
}

#[test]
fn a_wrong_or_missing_model_names_the_remedy() {
    let folder = std::env::temp_dir().join(format!("embed-test-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let missing = Embedder::load(&folder).err().unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let wrong = Embedder::load(&folder).err().unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert!(
        matches!(missing, Error::Missing { .. }) && missing.to_string().contains("make models"),
        "{missing}"
    );
    assert!(
        matches!(wrong, Error::Hash { .. }) && wrong.to_string().contains("make models"),
        "{wrong}"
    );
}
