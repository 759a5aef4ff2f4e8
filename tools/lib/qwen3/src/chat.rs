//! Conversations to token ids and back: the model's tokenizer and its chat
//! template together.
//!
//! Ids are those of transformers' `apply_chat_template`. That includes a trap:
//! the rendered text is tokenised as one, so a message that spells out
//! `<|im_end|>` ends its turn. [`Chat::special_in`] finds such texts, for those
//! who prepare data to refuse them.

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::config::{Config, Keys};
use crate::error::{Error, Result, read, read_text_if_there};
use crate::template::{Message, RenderOptions, Template};

const TURN_END: &str = "<|im_end|>";
const ASSISTANT_TURN: &str = "<|im_start|>assistant\n";

/// What the template writes before a reply without reasoning. It stands in
/// every prompt, so the model never has to produce it.
const EMPTY_REASONING: &str = "<think>\n\n</think>\n\n";

/// Which tokens of a conversation are learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossOn {
    /// Those of each assistant turn's text, and the `<|im_end|>` after it. Not
    /// the line break after that, nor the template's empty reasoning block.
    Reply,
    /// All.
    All,
}

/// A conversation as a row of training data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token: is it one that the model learns to produce?
    pub labelled: Vec<bool>,
}

/// A tokenizer with the chat template that belongs to it.
#[derive(Debug)]
pub struct Chat {
    path: PathBuf,
    tokenizer: Tokenizer,
    template: Template,
    template_path: PathBuf,
    /// Every text that becomes one token wherever it stands.
    added: Vec<String>,
    turn_end: u32,
    fingerprint: String,
}

impl Chat {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the template in
    /// `folder`: `chat_template.jinja`, else the key `chat_template` of
    /// `tokenizer_config.json`, else that of `chat_template.json`.
    ///
    /// # Errors
    /// If a file is missing or malformed, no template is found, or the
    /// tokenizer does not know `<|im_end|>`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = read(&path)?;
        // The library panics at a file that ends inside its `decoder`.
        serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| Error::file(&path, format!("is not a tokenizer: {error}")))?;
        // A file may ask for either; a training row is neither cut nor filled.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;

        let settings = Keys::read(folder.join("tokenizer_config.json"))?;
        let (template_path, source) = template_source(folder, &settings)?;
        let mut hash = Sha256::new();
        hash.update(Sha256::digest(&bytes));
        hash.update(&source);
        let template = Template::new(source, named_tokens(&settings)).map_err(|error| {
            Error::file(
                &template_path,
                format!("the chat template does not compile: {error}"),
            )
        })?;

        let turn_end = tokenizer.token_to_id(TURN_END).ok_or_else(|| {
            Error::file(
                &path,
                format!("has no token {TURN_END}: not the tokenizer of a chat model of Qwen's"),
            )
        })?;
        let mut added: Vec<String> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| token.content)
            .collect();
        added.sort_unstable();
        Ok(Self {
            path,
            tokenizer,
            template,
            template_path,
            added,
            turn_end,
            fingerprint: crate::fingerprint::hex(&hash.finalize()),
        })
    }

    /// Checks that tokenizer and model belong together, and that the template writes
    /// what is said.
    ///
    /// # Errors
    /// If a token has no row in the embedding table, or the model does not stop
    /// at `<|im_end|>`: a base model has never seen that token, and with its
    /// lm_head frozen an adapter cannot learn it. Or if a question and its reply do
    /// not go through the template, or not all of them comes out.
    pub fn check(&self, model: &Config, stop_ids: &[u32]) -> Result<()> {
        let (tokens, rows) = (self.tokens(), model.vocab_size);
        if tokens > rows {
            let largest = tokens - 1;
            let reason = format!(
                "has the id {largest}, but the model only {rows} embeddings: files of two models?"
            );
            return Err(Error::file(&self.path, reason));
        }
        if !stop_ids.contains(&self.turn_end) {
            let reason = format!(
                "has {TURN_END} as id {}, which is not among the model's `eos_token_id`s {:?}: a base model, which \
                 does not know where a turn ends and cannot learn it in an adapter; use the instruct model",
                self.turn_end, stop_ids
            );
            return Err(Error::file(&self.path, reason));
        }
        self.check_template()
    }

    /// Puts a question and its reply through the template.
    fn check_template(&self) -> Result<()> {
        const SAID: [&str; 2] = ["Tea?", "Always."];
        let refused =
            |cause: String| Error::file(&self.template_path, format!("the chat template {cause}"));
        let failed = |error: Error| match error {
            Error::Template(why) => refused(format!("refuses a question and its reply: {why}")),
            Error::Turns { expected, found } => refused(format!(
                "writes {found} assistant turns where there is {expected}"
            )),
            other => other,
        };
        let [user, assistant] = [Message::user(SAID[0]), Message::assistant(SAID[1])];
        self.encode_prompt(std::slice::from_ref(&user), &[])
            .map_err(failed)?;
        let messages = [user, assistant];
        self.encode_training(&messages, &[], LossOn::Reply)
            .map_err(failed)?;
        let text = self.render(&messages, &RenderOptions::default())?;
        match SAID.iter().find(|said| !text.contains(**said)) {
            Some(_) => Err(refused("leaves out what is said in a turn".into())),
            None => Ok(()),
        }
    }

    /// The conversation as the text that is tokenised.
    ///
    /// # Errors
    /// If the template refuses it.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        self.template
            .render(messages, options)
            .map_err(Error::Template)
    }

    /// The ids of a text that is already rendered.
    ///
    /// # Errors
    /// If the tokenizer fails, which a byte-level one does not.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false);
        encoding
            .map(|e| e.get_ids().to_vec())
            .map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// What is put to the model, which may call `tools`, for it to answer: the messages
    /// and the opening of its turn, with the reasoning block already empty.
    ///
    /// # Errors
    /// If the template refuses the messages.
    pub fn encode_prompt(&self, messages: &[Message], tools: &[Value]) -> Result<Vec<u32>> {
        let options = RenderOptions {
            tools: tools.to_vec(),
            add_generation_prompt: true,
            enable_thinking: Some(false),
        };
        self.encode(&self.render(messages, &options)?)
    }

    /// A whole conversation, in which the model may call `tools` (JSON schemas),
    /// with the tokens to learn.
    ///
    /// # Errors
    /// If the template refuses the messages, or the number of assistant turns
    /// in the text is not that of the messages.
    pub fn encode_training(
        &self,
        messages: &[Message],
        tools: &[Value],
        loss_on: LossOn,
    ) -> Result<Encoded> {
        let options = RenderOptions {
            tools: tools.to_vec(),
            ..RenderOptions::default()
        };
        let text = self.render(messages, &options)?;
        let encoding = self
            .tokenizer
            .encode(text.as_str(), false)
            .map_err(|e| Error::Tokenizer(e.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        if loss_on == LossOn::All {
            return Ok(Encoded {
                labelled: vec![true; ids.len()],
                ids,
            });
        }

        let replies = replies(&text);
        let expected = messages
            .iter()
            .filter(|message| message.role == "assistant")
            .count();
        if replies.len() != expected {
            return Err(Error::Turns {
                expected,
                found: replies.len(),
            });
        }
        // Offsets are of bytes, as are the replies'. Both ascend.
        let mut rest = &replies[..];
        let labelled = encoding.get_offsets().iter().map(|&(start, _)| {
            while rest.first().is_some_and(|reply| reply.end <= start) {
                rest = &rest[1..];
            }
            rest.first().is_some_and(|reply| reply.start <= start)
        });
        Ok(Encoded {
            labelled: labelled.collect(),
            ids,
        })
    }

    /// The text of ids, special tokens left out. Bytes that are no UTF-8, as
    /// where a reply was cut inside a character, become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails, which a byte-level one does not.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The first special token, in alphabetical order, that `text` spells out
    /// and that the model would read as such: `<|im_end|>`, `<think>`.
    pub fn special_in(&self, text: &str) -> Option<&str> {
        self.added
            .iter()
            .map(String::as_str)
            .find(|token| text.contains(token))
    }

    /// The chat template's source.
    pub fn template(&self) -> String {
        self.template.source()
    }

    /// Number of ids that are tokens: the highest and one.
    pub fn tokens(&self) -> usize {
        let ids = self.tokenizer.get_vocab(true).into_values();
        ids.max().map_or(0, |id| id as usize + 1)
    }

    /// The text of a token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The id of `<|im_end|>`, with which a reply ends.
    pub fn turn_end(&self) -> u32 {
        self.turn_end
    }

    /// A name for exactly this tokenizer and template: SHA-256 in hex.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Where in the rendered text the model speaks: from after the opening of each
/// assistant turn (and an empty reasoning block) to after its `<|im_end|>`.
fn replies(text: &str) -> Vec<std::ops::Range<usize>> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(opening) = text[from..].find(ASSISTANT_TURN) {
        let mut start = from + opening + ASSISTANT_TURN.len();
        let Some(length) = text[start..].find(TURN_END) else {
            break;
        };
        let end = start + length + TURN_END.len();
        if text[start..].starts_with(EMPTY_REASONING) {
            start += EMPTY_REASONING.len();
        }
        found.push(start..end);
        from = end;
    }
    found
}

/// The template, and the file that it is in.
fn template_source(folder: &Path, settings: &Keys) -> Result<(PathBuf, String)> {
    let path = folder.join("chat_template.jinja");
    if let Some(source) = read_text_if_there(&path)? {
        return Ok((path, source));
    }
    let from = |keys: &Keys| match keys.map.get("chat_template") {
        Some(Value::String(source)) => Some(source.clone()),
        // Several, by name: the one that is meant where none is asked for.
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    };
    if let Some(source) = from(settings) {
        return Ok((settings.path.clone(), source));
    }
    let path = folder.join("chat_template.json");
    if path.exists()
        && let Some(source) = from(&Keys::read(path.clone())?)
    {
        return Ok((path, source));
    }
    Err(settings.wrong(
        "chat_template",
        "is missing here, and there is no chat_template.jinja: not a chat model",
    ))
}

/// The tokens that `tokenizer_config.json` gives a name.
fn named_tokens(settings: &Keys) -> Vec<(String, String)> {
    let names = ["bos_token", "eos_token", "pad_token", "unk_token"];
    let text = |name: &str| {
        let token = settings.map.get(name)?;
        token
            .as_str()
            .or(token["content"].as_str())
            .map(str::to_owned)
    };
    names
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), text(name)?)))
        .collect()
}
