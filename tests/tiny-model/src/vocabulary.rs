//! A tokenizer of Qwen3's form with a small vocabulary of its own.
//!
//! Same pipeline as the published file (NFC, the splitting pattern, byte-level
//! BPE) and the same 26 added tokens in the same order, so that whatever reads
//! the real tokenizer reads this one.

use std::str::FromStr;

use anyhow::{Result, anyhow, ensure};
use serde_json::{Value, json};
use tokenizers::Tokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::corpus::Document;

/// Rows of the embedding table: bytes, merges and added tokens, none unused.
pub const SIZE: usize = 1536;

/// Qwen3's template as published (Apache-2.0, see the NOTICE beside it).
pub const CHAT_TEMPLATE: &str = include_str!("../../demo/model/chat_template.jinja");

const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The added tokens after the vocabulary; the first 14 count as special, which
/// decides what decoding leaves out.
const ADDED: [&str; 26] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
];
const SPECIAL: usize = 14;

/// The id of an added token.
///
/// # Panics
/// On a token that is not one of the 26.
pub fn id(token: &str) -> u32 {
    let at = ADDED.iter().position(|added| *added == token);
    let at = at.unwrap_or_else(|| panic!("{token} is not an added token"));
    (SIZE - ADDED.len() + at) as u32
}

/// Learns the merges from the documents and returns `tokenizer.json`.
pub fn train(documents: &[Document]) -> Result<Value> {
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(SIZE - ADDED.len())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build(),
    );
    let texts = documents.iter().flat_map(|document| match document {
        // The template's own words belong to the text too.
        Document::Chat { tweet, reply } => vec!["user\n", tweet, "assistant\n", "\n\n", reply],
        Document::Plain(text) => vec![text.as_str()],
    });
    let mut tokenizer = load(&shell(json!({}), json!([]), json!([])))?;
    tokenizer
        .train(&mut trainer, texts)
        .map_err(|error| anyhow!("training the tokenizer: {error}"))?;
    let learnt = tokenizer
        .to_string(false)
        .map_err(|error| anyhow!("writing the tokenizer: {error}"))?;
    let mut learnt: Value = serde_json::from_str(&learnt)?;
    let (vocab, merges) = (
        learnt["model"]["vocab"].take(),
        learnt["model"]["merges"].take(),
    );
    let learnt = vocab.as_object().map_or(0, serde_json::Map::len);
    ensure!(
        learnt + ADDED.len() == SIZE,
        "{learnt} tokens learnt: give the tokenizer more text"
    );
    let added = ADDED
        .iter()
        .enumerate()
        .map(|(at, content)| {
            let mut token = added_token(at, content);
            token["id"] = json!(id(content));
            token
        })
        .collect();
    Ok(shell(vocab, merges, Value::Array(added)))
}

/// `tokenizer_config.json` to go with [`train`]'s file.
pub fn config() -> Value {
    let added = ADDED.iter().enumerate();
    let added: serde_json::Map<_, _> = added
        .map(|(at, content)| (id(content).to_string(), added_token(at, content)))
        .collect();
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": added,
        "additional_special_tokens": ADDED[1..SPECIAL],
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null
    })
}

/// A tokenizer from [`train`]'s value.
pub fn load(tokenizer: &Value) -> Result<Tokenizer> {
    Tokenizer::from_str(&tokenizer.to_string()).map_err(|error| anyhow!("tokenizer.json: {error}"))
}

fn added_token(at: usize, content: &str) -> Value {
    json!({
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": at < SPECIAL
    })
}

/// The outer form of the published file.
fn shell(vocab: Value, merges: Value, added: Value) -> Value {
    let byte_level = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": false,
        "use_regex": false
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": false
                },
                byte_level
            ]
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges
        }
    })
}
