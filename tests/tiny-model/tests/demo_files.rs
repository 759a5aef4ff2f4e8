//! The committed files of the demo are what the generators make.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tiny_model::autograd::{Batch, Config, Model};
use tiny_model::random::Random;
use tiny_model::topics::Scene;
use tiny_model::{
    DATA_SEED, DOCUMENTS, MODEL_SEED, corpus, demo, grammar, pretrain, topics, vocabulary,
};

fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../demo")
        .join(name)
}

#[test]
fn the_tweets_come_from_their_seed() {
    let made = demo::write(DATA_SEED).unwrap().export;
    let kept = fs::read_to_string(committed("tweets.jsonl")).unwrap();
    assert!(made == kept, "run `make demo-data` and commit the result");
    assert!(made != demo::write(DATA_SEED + 1).unwrap().export);
}

/// Ids, names and links that can be nobody's, and every reply's tweet found or
/// missing on purpose.
#[test]
fn the_export_is_of_the_actors_shape() {
    let export = fs::read_to_string(committed("tweets.jsonl")).unwrap();
    let items: Vec<Value> = export
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ids: HashSet<&str> = items
        .iter()
        .filter_map(|item| item["id"].as_str())
        .collect();
    let mut joined = 0;
    for item in items.iter().filter(|item| item["id"].is_string()) {
        assert!(item["id"].as_str().unwrap().parse::<u64>().unwrap() > 1 << 53);
        if let Some(name) = item["author"]["userName"].as_str() {
            assert!(name.len() > 15, "{name} could be somebody's");
        }
        if let Some(parent) = item["inReplyToId"].as_str() {
            assert_eq!(item["isReply"], true);
            joined += usize::from(ids.contains(parent));
        }
    }
    assert!(
        (700..800).contains(&joined),
        "{joined} replies have their tweet"
    );
    assert!(items.len() > ids.len(), "some items come twice");
    assert!(export.len() < 1_500_000);
}

#[test]
fn the_model_files_match_their_sums() {
    let sums = fs::read_to_string(committed("model/SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), 6);
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        let bytes = fs::read(committed("model").join(name)).unwrap();
        let found: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(found, sum, "{name}");
    }
}

/// The weights depend on the processor's rounding; the tokenizer does not.
#[test]
fn the_tokenizer_comes_from_its_seed() {
    let tweets = demo::write(DATA_SEED).unwrap().tweets;
    let documents = corpus::write(DOCUMENTS, &tweets, MODEL_SEED).unwrap();
    let made = vocabulary::train(&documents).unwrap();
    let kept = fs::read(committed("model/tokenizer.json")).unwrap();
    let kept: Value = serde_json::from_slice(&kept).unwrap();
    assert!(made == kept, "run `make tiny-model` and commit the result");
    assert_eq!(
        Config::read(&committed("model")).unwrap(),
        pretrain::config()
    );
}

#[test]
fn the_tokenizer_loses_nothing() {
    let tokenizer = tokenizers::Tokenizer::from_file(committed("model/tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), vocabulary::SIZE);
    assert_eq!(
        tokenizer.token_to_id("<|im_end|>"),
        Some(vocabulary::id("<|im_end|>"))
    );
    for text in [
        "naïve café 🙂\n\t 3.14  x",
        "<|im_start|>user\nhi<|im_end|>\n",
        "你好，世界",
    ] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
    }
}

/// The pretraining text holds none of the demo's tweets.
#[test]
fn the_demo_is_held_out_from_pretraining() {
    let tweets = demo::write(DATA_SEED).unwrap().tweets;
    let documents = corpus::write(DOCUMENTS, &tweets, MODEL_SEED).unwrap();
    let seen = documents.iter().any(|document| match document {
        corpus::Document::Chat { tweet, .. } => tweets.contains(tweet),
        corpus::Document::Plain(_) => false,
    });
    assert!(!seen);
}

#[test]
fn pretraining_is_repeatable() {
    let documents = corpus::write(2_000, &HashSet::new(), 7).unwrap();
    let run = || {
        let mut losses = Vec::new();
        let files = pretrain::run(&documents, 2, 7, |_, loss| losses.push(loss)).unwrap();
        (files, losses)
    };
    let ((first, losses), (second, _)) = (run(), run());
    assert!(first == second, "two runs differ");
    // A fresh model of this size is near uniform: ln 1536 = 7.34.
    assert!((losses[0] - 7.34).abs() < 0.2, "first loss {}", losses[0]);
    let names: Vec<_> = first.keys().copied().collect();
    assert!(names.contains(&"SHA256SUMS"));
}

/// Mean NLL of the reply tokens over 40 fresh scenes, each reply to the tweet of
/// the scene `apart` places on.
fn reply_nll(model: &Model, apart: usize, reply: fn(&Scene, &mut Random) -> String) -> f64 {
    let tokenizer = tokenizers::Tokenizer::from_file(committed("model/tokenizer.json")).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let topics = topics::read().unwrap();
    let mut random = Random::new(99);
    let scenes = topics::scenes(&topics, 40, &mut random);
    let mut batch = Batch::default();
    for (at, scene) in scenes.iter().enumerate() {
        let tweet = grammar::tweet(&scenes[(at + apart) % scenes.len()], &mut random);
        let prompt = format!(
            "<|im_start|>user\n{tweet}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        );
        let mut ids = encode(&prompt);
        let mut labelled = vec![false; ids.len()];
        ids.extend(encode(&format!("{}<|im_end|>", reply(scene, &mut random))));
        labelled.resize(ids.len(), true);
        batch.push(&ids, &labelled);
    }
    f64::from(
        model
            .loss(&batch, None)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
    )
}

/// The base model writes the dry voice well, looks at the tweet as it does, and
/// writes the liked voice badly: that is the room an adapter has.
#[test]
fn the_liked_manner_is_left_to_learn() {
    let model = Model::load(&committed("model"), DType::F32).unwrap();
    let terse = reply_nll(&model, 0, grammar::terse_reply);
    let astray = reply_nll(&model, 1, grammar::terse_reply);
    let liked = reply_nll(&model, 0, grammar::liked_reply);
    let all = format!("terse {terse:.3}, to another tweet {astray:.3}, liked {liked:.3}");
    assert!(
        terse < 0.5 && astray > terse + 1.0 && liked > terse + 3.0,
        "{all}"
    );
}
