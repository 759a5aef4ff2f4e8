//! Models with random weights, made on the spot: speed and memory do not depend on
//! their values.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use serde_json::json;
use tiny_model::autograd::{Config, Model};

/// 8.4 million parameters, small enough to be measured in seconds, with every shape
/// that matters: head dimension, shared key heads, tied head.
pub fn middling() -> Config {
    Config {
        vocab_size: 2048,
        hidden_size: 256,
        intermediate_size: 768,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: true,
    }
}

/// 107 million parameters in layers as wide as Qwen3-0.6B's: enough to time the disk's
/// and the quantiser's part.
pub fn wide() -> Config {
    Config {
        vocab_size: 8192,
        hidden_size: 1024,
        intermediate_size: 3072,
        num_hidden_layers: 6,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 128,
        ..middling()
    }
}

/// Writes a model to `folder` in Hugging Face layout, without a tokenizer.
pub fn write(folder: &Path, config: Config, dtype: DType) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut keys = serde_json::to_value(&config)?;
    for (key, value) in [
        ("architectures", json!(["Qwen3ForCausalLM"])),
        ("model_type", json!("qwen3")),
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("max_position_embeddings", json!(1024)),
    ] {
        keys[key] = value;
    }
    std::fs::write(folder.join("config.json"), keys.to_string())?;
    let weights = Model::random(config, 0.02, dtype, 0)?.weights;
    let weights = weights.into_iter().collect();
    candle_core::safetensors::save(&weights, folder.join("model.safetensors"))?;
    Ok(())
}
