//! A merged model as one GGUF file, for llama.cpp and what is built on it
//! (Ollama, LM Studio): weights in 16 bits, tokenizer and chat template inside.
//!
//! The format is that of ggml's specification, version 3; keys and names are
//! those that llama.cpp reads for the architecture `qwen3`. One thing is lost there:
//! llama.cpp does not normalise text (NFC), so a letter typed as base and accent
//! becomes other tokens than in transformers.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use half::{bf16, f16};
use qwen3::{Chat, Merged, Module, Weight};
use serde::Deserialize;
use serde_json::Value;

/// How the products are stored; norms are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GgufType {
    /// The range of f32 with 8 bits of precision: what Qwen3 is published in
    Bf16,
    /// 11 bits of precision; for hardware without bfloat16
    F16,
}

impl GgufType {
    /// ggml's number for the type of a tensor.
    fn tensor(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Bf16 => 30,
        }
    }

    /// llama.cpp's number for a file of mostly that type.
    fn file(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Bf16 => 32,
        }
    }
}

/// ggml's number for f32.
const F32: u32 = 0;

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;

/// The split that llama.cpp knows as `qwen2`, as tokenizer.json spells it.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Writes the model. `source` is the base's folder, for its tokenizer.
/// `progress` hears how many values are written.
pub fn write(
    path: &Path,
    model: Merged<'_>,
    source: &Path,
    name: &str,
    kind: GgufType,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let config = model.config();
    let weights = Weight::all(config);
    let mut meta = Metadata::default();
    describe(&mut meta, model, source, name, kind)?;

    let mut head = Vec::new();
    head.extend(b"GGUF");
    head.extend(3u32.to_le_bytes());
    head.extend((weights.len() as u64).to_le_bytes());
    head.extend(meta.count.to_le_bytes());
    head.extend(meta.bytes);
    let mut at = 0usize;
    for &weight in &weights {
        let shape = weight.shape(config);
        let (number, width) = match shape.len() {
            1 => (F32, 4),
            _ => (kind.tensor(), 2),
        };
        put_string(&mut head, &tensor_name(weight));
        head.extend((shape.len() as u32).to_le_bytes());
        // The fastest dimension first: the reverse of the checkpoint's order.
        for &size in shape.iter().rev() {
            head.extend((size as u64).to_le_bytes());
        }
        head.extend(number.to_le_bytes());
        head.extend((at as u64).to_le_bytes());
        at += (shape.iter().product::<usize>() * width).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);

    let mut file = jsonl::AtomicFile::create(path)?;
    let shown = || path.display().to_string();
    file.write_all(&head).with_context(shown)?;
    let (mut bytes, mut done) = (Vec::new(), 0);
    for &weight in &weights {
        let norm = weight.shape(config).len() == 1;
        let mut length = 0;
        model.pieces(weight, |values| -> Result<()> {
            bytes.clear();
            if norm {
                bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            } else if kind == GgufType::Bf16 {
                bytes.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
            } else {
                for &value in values {
                    let half = f16::from_f32(value);
                    ensure!(
                        half.is_finite(),
                        "{} holds {value}, too large for f16: use --gguf-type bf16",
                        weight.name()
                    );
                    bytes.extend(half.to_le_bytes());
                }
            }
            length += bytes.len();
            done += values.len() as u64;
            progress(done);
            file.write_all(&bytes).with_context(shown)
        })?;
        let padding = length.next_multiple_of(ALIGNMENT) - length;
        file.write_all(&[0; ALIGNMENT][..padding])
            .with_context(shown)?;
    }
    Ok(file.commit()?)
}

/// What llama.cpp calls a weight.
fn tensor_name(weight: Weight) -> String {
    match weight {
        Weight::Embedding => "token_embd.weight".into(),
        Weight::FinalNorm => "output_norm.weight".into(),
        Weight::Head => "output.weight".into(),
        Weight::InputNorm(layer) => format!("blk.{layer}.attn_norm.weight"),
        Weight::PostAttentionNorm(layer) => format!("blk.{layer}.ffn_norm.weight"),
        Weight::QNorm(layer) => format!("blk.{layer}.attn_q_norm.weight"),
        Weight::KNorm(layer) => format!("blk.{layer}.attn_k_norm.weight"),
        Weight::Product(layer, module) => {
            let name = match module {
                Module::Q => "attn_q",
                Module::K => "attn_k",
                Module::V => "attn_v",
                Module::O => "attn_output",
                Module::Gate => "ffn_gate",
                Module::Up => "ffn_up",
                Module::Down => "ffn_down",
            };
            format!("blk.{layer}.{name}.weight")
        }
    }
}

/// Keys and values in their file form.
#[derive(Default)]
struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

/// The numbers of the value types that are used here.
mod value_type {
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
}

impl Metadata {
    fn put(&mut self, key: &str, kind: u32, value: &[u8]) {
        put_string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self.count += 1;
    }

    fn u32(&mut self, key: &str, value: usize) -> Result<()> {
        let value = u32::try_from(value).with_context(|| format!("{key} is {value}"))?;
        self.put(key, value_type::U32, &value.to_le_bytes());
        Ok(())
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.put(key, value_type::F32, &value.to_le_bytes());
    }

    fn string(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        put_string(&mut bytes, value);
        self.put(key, value_type::STRING, &bytes);
    }

    fn array(&mut self, key: &str, kind: u32, count: usize, elements: &[u8]) {
        let mut bytes = Vec::new();
        bytes.extend(kind.to_le_bytes());
        bytes.extend((count as u64).to_le_bytes());
        bytes.extend(elements);
        self.put(key, value_type::ARRAY, &bytes);
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        let mut bytes = Vec::new();
        for value in values {
            put_string(&mut bytes, value);
        }
        self.array(key, value_type::STRING, values.len(), &bytes);
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn describe(
    meta: &mut Metadata,
    model: Merged<'_>,
    source: &Path,
    name: &str,
    kind: GgufType,
) -> Result<()> {
    let config = model.config();
    meta.string("general.architecture", "qwen3");
    meta.string("general.type", "model");
    meta.string("general.name", name);
    meta.u32("general.file_type", kind.file() as usize)?;
    // Of ggml's quantisations; the key is expected though none is used.
    meta.u32("general.quantization_version", 2)?;
    meta.u32("qwen3.block_count", config.layers)?;
    meta.u32("qwen3.context_length", config.max_positions)?;
    meta.u32("qwen3.embedding_length", config.hidden_size)?;
    meta.u32("qwen3.feed_forward_length", config.intermediate_size)?;
    meta.u32("qwen3.attention.head_count", config.heads)?;
    meta.u32("qwen3.attention.head_count_kv", config.kv_heads)?;
    meta.u32("qwen3.attention.key_length", config.head_dim)?;
    meta.u32("qwen3.attention.value_length", config.head_dim)?;
    meta.f32("qwen3.attention.layer_norm_rms_epsilon", config.rms_eps);
    meta.f32("qwen3.rope.freq_base", config.rope_theta as f32);

    let tokenizer = Tokenizer::read(source)?;
    let (tokens, types) = tokenizer.tokens(config.vocab_size)?;
    meta.string("tokenizer.ggml.model", "gpt2");
    meta.string("tokenizer.ggml.pre", "qwen2");
    meta.strings("tokenizer.ggml.tokens", &tokens);
    let bytes: Vec<u8> = types.iter().flat_map(|t| t.to_le_bytes()).collect();
    meta.array(
        "tokenizer.ggml.token_type",
        value_type::I32,
        types.len(),
        &bytes,
    );
    meta.strings("tokenizer.ggml.merges", &tokenizer.merges());
    let chat = Chat::load(source)?;
    meta.u32("tokenizer.ggml.eos_token_id", chat.turn_end() as usize)?;
    // llama.cpp ends a reply at any of them; the second stop id is also what Qwen pads with.
    let stops = qwen3::stop_ids(source)?;
    if let Some(&pad) = stops.iter().find(|&&id| id != chat.turn_end()) {
        meta.u32("tokenizer.ggml.padding_token_id", pad as usize)?;
        meta.u32("tokenizer.ggml.bos_token_id", pad as usize)?;
    }
    meta.put("tokenizer.ggml.add_bos_token", value_type::BOOL, &[0]);
    meta.string("tokenizer.chat_template", &chat.template());
    Ok(())
}

/// What GGUF wants to know of tokenizer.json.
#[derive(Deserialize)]
struct Tokenizer {
    model: Bpe,
    pre_tokenizer: Value,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Bpe {
    r#type: String,
    vocab: serde_json::Map<String, Value>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair([String; 2]),
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    special: bool,
}

/// llama.cpp's kinds of tokens.
#[derive(Clone, Copy)]
enum TokenType {
    Normal = 1,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
}

impl Tokenizer {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let shown = || path.display().to_string();
        let bytes = qwen3::read(&path)?;
        let read: Self = serde_json::from_slice(&bytes).with_context(shown)?;
        ensure!(
            read.model.r#type == "BPE",
            "{}: the model is {}, not BPE: GGUF is written for Qwen's tokenizer",
            shown(),
            read.model.r#type
        );
        let splits = read.pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"].as_str();
        ensure!(
            splits == Some(QWEN2_SPLIT),
            "{}: splits text in another way than Qwen's, for which llama.cpp has no name here",
            shown()
        );
        Ok(read)
    }

    /// Texts and kinds by id, for each row of the embedding table: rows beyond
    /// the tokenizer get names of their own.
    fn tokens(&self, rows: usize) -> Result<(Vec<String>, Vec<i32>)> {
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![TokenType::Unused; rows];
        let mut put = |id: usize, text: &str, kind| {
            if id >= rows {
                bail!("token {id} `{text}` has no row in the embedding table of {rows}");
            }
            text.clone_into(&mut tokens[id]);
            types[id] = kind;
            Ok(())
        };
        for (text, id) in &self.model.vocab {
            let id = id
                .as_u64()
                .with_context(|| format!("token `{text}` has no id"))?;
            put(id as usize, text, TokenType::Normal)?;
        }
        for added in &self.added_tokens {
            // `<|fim_prefix|>` is for control too, though not marked as special.
            let looks = added.content.starts_with("<|") && added.content.ends_with("|>");
            let kind = match added.special || looks {
                true => TokenType::Control,
                false => TokenType::UserDefined,
            };
            put(added.id, &added.content, kind)?;
        }
        Ok((tokens, types.into_iter().map(|kind| kind as i32).collect()))
    }

    fn merges(&self) -> Vec<String> {
        let joined = |merge: &Merge| match merge {
            Merge::Joined(text) => text.clone(),
            Merge::Pair(pair) => pair.join(" "),
        };
        self.model.merges.iter().map(joined).collect()
    }
}
