//! The pairs to reply to, as the model reads them.

use anyhow::Result;
use cli::{App, Failure};
use jsonl::Position;
use qwen3::{Chat, Config, LossOn, Message, PromptTemplate};
use record::{Record, Split};
use settings::TextChoice;

/// How a pair is put to the model: the same for every system of a comparison.
#[derive(Debug)]
pub struct Wording {
    /// Which text of a pair.
    pub text: TextChoice,
    /// Put before every conversation; empty for none.
    pub system_prompt: String,
    /// The user's turn.
    pub prompt: PromptTemplate,
}

/// A pair as it was read.
pub struct Source {
    pub id: String,
    pub conversation_id: String,
    pub tweet: String,
    /// The user's turn: the tweet in the words of the prompt template.
    pub prompt: String,
    pub reference: String,
    pub split: Option<Split>,
}

impl Source {
    /// The pair in a record.
    pub fn new(record: &Record, wording: &Wording) -> Result<Self, record::Error> {
        let pair = record.pair()?;
        let normalized = |key: &str| -> Result<String, record::Error> {
            record.get(key)?.ok_or_else(|| record::Error::Field {
                key: key.into(),
                cause: "missing: run pair-dedup, or take the raw texts with --text raw".into(),
            })
        };
        let (tweet, reference) = match wording.text {
            TextChoice::Raw => (pair.tweet, pair.reply),
            TextChoice::Normalized => (
                normalized("tweet_normalized")?,
                normalized("reply_normalized")?,
            ),
        };
        let mut fields = record.values()?;
        fields.insert("tweet".into(), tweet.as_str().into());
        let prompt = wording
            .prompt
            .render(&fields)
            .map_err(|error| record::Error::Field {
                key: error.key().into(),
                cause: error.to_string(),
            })?;
        let split = record.get("split")?;
        Ok(Self {
            id: pair.id,
            conversation_id: pair.conversation_id,
            tweet,
            prompt,
            reference,
            split,
        })
    }
}

/// A pair in tokens.
pub struct Item {
    pub source: Source,
    /// What the model is to answer.
    pub prompt: Vec<u32>,
    /// Prompt and reference, and which tokens are the reference's.
    pub ids: Vec<u32>,
    pub labelled: Vec<bool>,
}

impl Item {
    /// Encodes a pair, exactly as training did.
    pub fn new(
        source: Source,
        position: &Position,
        wording: &Wording,
        chat: &Chat,
        config: &Config,
    ) -> Result<Self> {
        let refuse = |cause: String| Failure::Input(format!("{position}: {cause}"));
        let mut messages = Vec::new();
        if !wording.system_prompt.is_empty() {
            messages.push(Message::system(&wording.system_prompt));
        }
        messages.push(Message::user(&source.prompt));
        let prompt = chat
            .encode_prompt(&messages)
            .map_err(|e| refuse(e.to_string()))?;
        messages.push(Message::assistant(&source.reference));
        let whole = chat
            .encode_training(&messages, &[], LossOn::Reply)
            .map_err(|e| refuse(e.to_string()))?;
        if whole.ids.len().max(prompt.len() + 1) > config.max_positions {
            let (have, most) = (whole.ids.len(), config.max_positions);
            return Err(refuse(format!(
                "{have} tokens, more than the model's {most}: leave the pair out"
            ))
            .into());
        }
        if !whole.labelled.iter().skip(1).any(|&labelled| labelled) {
            return Err(refuse("the reply has no token to be scored".into()).into());
        }
        Ok(Self {
            source,
            prompt,
            ids: whole.ids,
            labelled: whole.labelled,
        })
    }

    /// Tokens of the reference, its end included.
    pub fn reference_tokens(&self) -> usize {
        self.labelled
            .iter()
            .skip(1)
            .filter(|&&labelled| labelled)
            .count()
    }
}

/// Of the pairs read, those held out; all of them where none says which side it is on.
pub fn held_out(app: &App, sources: Vec<(Position, Source)>) -> Vec<(Position, Source)> {
    let read = sources.len();
    if sources.iter().all(|(_, source)| source.split.is_none()) {
        if read > 0 {
            app.info(format_args!("no row has `split`: all {read} are taken"));
        }
        return sources;
    }
    let unsplit = sources
        .iter()
        .filter(|(_, source)| source.split.is_none())
        .count();
    if unsplit > 0 {
        app.warn(format_args!(
            "{unsplit} rows have no `split` while others do; they are left out"
        ));
    }
    let kept: Vec<_> = sources
        .into_iter()
        .filter(|(_, source)| source.split == Some(Split::Eval))
        .collect();
    let trained_on = read - unsplit - kept.len();
    app.info(format_args!(
        "{} rows of `split: eval` kept, {trained_on} of `split: train` left out",
        kept.len()
    ));
    kept
}

/// A tweet that spells out `<|im_end|>` ends its own turn, in training as here.
pub fn warn_of_special_tokens(app: &App, chat: &Chat, items: &[Item]) {
    for item in items {
        let texts = [&item.source.prompt, &item.source.reference];
        if let Some(token) = texts.into_iter().find_map(|text| chat.special_in(text)) {
            app.warn(format_args!(
                "pair {}: a text spells out {token}, which the model reads as such",
                item.source.id
            ));
        }
    }
}
