//! The rows to reply to, as the model reads them.

use std::borrow::Cow;

use anyhow::Result;
use cli::{App, Failure};
use jsonl::Position;
use qwen3::{Chat, Config, Conversation, Form, LossOn, Message, Wording};
use record::{Record, Split};
use serde_json::Value;

/// A row as it was read: what is asked, and how it was answered.
pub struct Source {
    conversation: Conversation,
    /// The turns before the reply.
    asked: usize,
    /// What it is not independent of, see [`Record::group`].
    group: String,
    /// Whether the reply is pair-dedup's normalised one.
    normalized: bool,
    pub split: Option<Split>,
    /// As it came, for where it goes if it is left out.
    pub record: Record,
}

impl Source {
    /// The row in a record; the reply is the last assistant turn.
    pub fn new(record: Record, wording: &Wording) -> Result<Self, record::Error> {
        let mut conversation = wording.read(&record)?;
        let group = record.group(&conversation.own_turns(), &conversation.tools)?;
        let messages = &mut conversation.messages;
        let asked = messages.iter().rposition(|m| m.role == "assistant");
        let split = record.split()?;
        // What was trained on is left out anyway, and may have been of use there.
        let is_left_out = split == Some(Split::Train);
        let cause = match asked {
            Some(0) if !is_left_out => "the assistant speaks first: nothing is put to the model",
            None if !is_left_out => "no turn of the assistant: nothing to compare with",
            _ => {
                let asked = asked.unwrap_or(0);
                messages.truncate(asked + 1);
                return Ok(Self {
                    normalized: wording.normalized && conversation.form == Form::Pair,
                    conversation,
                    asked,
                    group,
                    split,
                    record,
                });
            }
        };
        let lists = ["messages", "conversations", "completion"];
        let key = lists.into_iter().find(|key| record.contains(key));
        Err(record::Error::Field {
            key: key.unwrap_or("messages").into(),
            cause: cause.into(),
        })
    }

    /// Which row it is, by its texts.
    pub fn name(&self) -> &str {
        &self.conversation.row
    }

    /// Whether the words of the prompt template are around it.
    pub fn is_pair(&self) -> bool {
        self.conversation.form == Form::Pair
    }

    /// Its own name, else `line N`.
    pub fn id(&self, position: &Position) -> String {
        let own = self.conversation.id.clone();
        own.unwrap_or_else(|| format!("line {}", position.line))
    }

    /// The reply that is compared with.
    fn said(&self) -> &Message {
        &self.conversation.messages[self.asked]
    }

    /// Its turns, the reply last: those of the system in front, and the others.
    pub fn turns(&self) -> (&[Message], &[Message]) {
        let turns = &self.conversation.messages;
        let system = turns.iter().take_while(|turn| turn.role == "system");
        turns.split_at(system.count())
    }

    /// Functions that may be called.
    pub fn tools(&self) -> &[Value] {
        &self.conversation.tools
    }

    /// Whether a system turn is its own, and not of the settings.
    pub fn has_own_system(&self) -> bool {
        self.conversation.form == Form::Messages
    }

    /// What is replied to, for those who judge the replies: a tweet or a question alone;
    /// of a longer conversation each turn with its role.
    fn tweet(&self) -> String {
        if let Some(tweet) = &self.conversation.tweet {
            return tweet.clone();
        }
        let asked = &self.conversation.messages[..self.asked];
        let mut turns = asked.iter().filter(|m| m.role != "system");
        if let (Some(only), None) = (turns.next(), turns.next()) {
            return only.content.clone();
        }
        let turns = asked.iter().map(|m| format!("{}: {}", m.role, m.content));
        turns.collect::<Vec<_>>().join("\n\n")
    }
}

/// What is put to a system, in tokens, and the reply that it is scored by.
pub struct Question {
    /// What the model is to answer.
    pub prompt: Vec<u32>,
    /// Prompt and reference, and which tokens are the reference's.
    pub ids: Vec<u32>,
    pub labelled: Vec<bool>,
}

impl Question {
    /// Encodes a conversation that ends with the reply, exactly as training does.
    ///
    /// # Errors
    /// If the template refuses it or no token of the reply is to be scored; says why.
    pub fn new(messages: &[Message], tools: &[Value], chat: &Chat) -> Result<Self, String> {
        let asked = messages.len() - 1;
        let prompt = chat
            .encode_prompt(&messages[..asked], tools)
            .map_err(told)?;
        let mut whole = chat
            .encode_training(messages, tools, LossOn::Reply)
            .map_err(told)?;
        // The last reply alone is scored.
        let end = whole.labelled.iter().rposition(|&labelled| labelled);
        let end = end.ok_or("the reply has no token to be scored")?;
        let before = whole.labelled[..end]
            .iter()
            .rposition(|&labelled| !labelled);
        let start = before.map_or(0, |at| at + 1);
        whole.labelled[..start].fill(false);
        Ok(Self {
            prompt,
            ids: whole.ids,
            labelled: whole.labelled,
        })
    }

    /// Positions that it and a reply of so many tokens take.
    pub fn positions(&self, reply: usize) -> usize {
        self.ids.len().max(self.prompt.len() + reply)
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

/// With the template's own reason, where it refuses something.
fn told(error: qwen3::Error) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// A row in tokens.
pub struct Item {
    /// Its own name, else `line N`.
    pub id: String,
    pub conversation_id: String,
    /// Rows with the same one are no independent evidence.
    pub split_group: String,
    /// What is replied to, as text.
    pub tweet: String,
    pub reference: String,
    /// Whether the reference is pair-dedup's normalised text.
    pub normalized: bool,
    /// As training put it.
    pub plain: Question,
    /// As the system `prompted` hears it, if there is one.
    pub prompted: Option<Question>,
    /// A special token that one of its texts spells out.
    special: Option<String>,
}

impl Item {
    /// Encodes a row, exactly as training did.
    pub fn new(
        source: &Source,
        position: &Position,
        (chat, config): (&Chat, &Config),
    ) -> Result<Self> {
        let refuse = |cause: String| Failure::Input(format!("{position}: {cause}"));
        let (row, said) = (&source.conversation, source.said());
        let plain = Question::new(&row.messages, &row.tools, chat).map_err(refuse)?;
        if plain.positions(1) > config.max_positions {
            let (have, most) = (plain.ids.len(), config.max_positions);
            return Err(refuse(format!(
                "{have} tokens, more than the model's {most}: leave the row out"
            ))
            .into());
        }
        // Calls of tools stand in the rendered reply only.
        let reference = match said.rest.contains_key("tool_calls") {
            true => {
                let scored = plain.ids.iter().zip(&plain.labelled);
                let scored: Vec<u32> = scored.filter(|(_, l)| **l).map(|(&id, _)| id).collect();
                chat.decode(&scored)?.trim().to_owned()
            }
            false => said.content.clone(),
        };
        let mut texts = row.messages.iter().map(|message| &message.content);
        let special = texts.find_map(|text| chat.special_in(text));
        let id = source.id(position);
        Ok(Self {
            conversation_id: row.thread.clone().unwrap_or_else(|| id.clone()),
            id,
            split_group: source.group.clone(),
            tweet: source.tweet(),
            reference,
            normalized: source.normalized,
            plain,
            prompted: None,
            special: special.map(str::to_owned),
        })
    }

    /// How it is put to each kind of system.
    pub fn questions(&self) -> impl Iterator<Item = &Question> {
        std::iter::once(&self.plain).chain(&self.prompted)
    }

    /// What of a reply is held against the reference: where that was normalised, so is
    /// the reply. An adapter has learnt the normalised way of typing and the base has not;
    /// without this, straight quotes would count as a better answer.
    pub fn scored<'a>(&self, prediction: &'a str) -> Cow<'a, str> {
        match self.normalized {
            true => text::normalize(prediction).into(),
            false => prediction.into(),
        }
    }
}

/// ROUGE, BLEU and chrF of any reply against nothing are 0, whoever wrote it.
pub fn warn_of_empty_references(app: &App, items: &[Item]) {
    let mut empty = items.iter().filter(|item| item.reference.trim().is_empty());
    if let Some(first) = empty.next() {
        app.warn(format_args!(
            "an empty reply, to which nothing can be near, is in {} of {} (the first: {}): leave such rows out",
            1 + empty.count(),
            cli::counted(items.len(), "held-out row"),
            first.id
        ));
    }
}

/// A tweet that spells out `<|im_end|>` ends its own turn, in training as here.
pub fn warn_of_special_tokens(app: &App, items: &[Item]) {
    for item in items {
        if let Some(token) = &item.special {
            app.warn(format_args!(
                "pair {}: a text spells out {token}, which the model reads as such",
                item.id
            ));
        }
    }
}
