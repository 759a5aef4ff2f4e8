//! The system `prompted`: the base with rows that were trained on in its prompt, as turns
//! before the question. What a fine-tuned model is better than, a better prompt might have
//! been too, for nothing: without it "better than the base" says little.

use anyhow::Result;
use cli::{App, Failure};
use qwen3::{Chat, Config, LossOn, Message};
use record::Split;
use serde::Serialize;
use settings::Generation;

use crate::held_out::{Row, SeenBy, is_trained_on};
use crate::items::{Item, Question, Source};
use crate::systems::PROMPTED;

/// Tokens of the examples together at most. Every reply under way keeps the keys and values
/// of its whole prompt; eight tweets with their replies are a third of this.
const MOST_TOKENS: usize = 1024;

/// What is put before each question.
#[derive(Serialize)]
pub struct Prompted {
    /// The rows that are shown, in their order.
    examples: Vec<String>,
    system_prompt: Option<String>,
    /// The turns of each.
    #[serde(skip)]
    turns: Vec<[Message; 2]>,
}

impl Prompted {
    /// Draws the examples among the rows that were trained on: the first ones by a hash of
    /// seed and row, so that neither the order of the rows nor what stands beside them
    /// decides. It may be fewer than were asked for.
    ///
    /// # Errors
    /// If a row cannot be encoded.
    pub fn draw(settings: &Generation, rows: &[Row], seen: &[SeenBy], chat: &Chat) -> Result<Self> {
        let place = |source: &Source| {
            let key = format!("{} {}", settings.seed, source.name());
            cli::sha256_hex(key.as_bytes())
        };
        let trained = rows.iter().filter(|(_, source)| match source.split {
            Some(split) => split == Split::Train,
            None => is_trained_on(source, seen),
        });
        let mut drawn: Vec<_> = trained.map(|row| (place(&row.1), row)).collect();
        drawn.sort_by(|(a, _), (b, _)| a.cmp(b));
        // Rows of the same texts are one.
        drawn.dedup_by(|(a, _), (b, _)| a == b);
        let mut prompted = Self {
            examples: Vec::new(),
            system_prompt: settings.prompted.system_prompt.clone(),
            turns: Vec::new(),
        };
        let mut room = MOST_TOKENS;
        for (_, (position, source)) in drawn {
            if prompted.turns.len() == settings.prompted.examples {
                break;
            }
            let Some(exchange) = exchange(source, chat) else {
                continue;
            };
            let encoded = chat.encode_training(&exchange, &[], LossOn::Reply)?;
            if encoded.ids.len() <= room {
                room -= encoded.ids.len();
                prompted.examples.push(source.id(position));
                prompted.turns.push(exchange);
            }
        }
        Ok(prompted)
    }

    /// Puts the rows' questions behind the examples, and these to the items of the rows.
    /// Examples are left out, the last first, until each reply has room. `None` where
    /// nothing is left that the base is not told.
    ///
    /// # Errors
    /// If a row has no room even without examples.
    pub fn ask(
        mut self,
        app: &App,
        settings: &Generation,
        rows: &[Row],
        items: &mut [Item],
        (chat, config): (&Chat, &Config),
    ) -> Result<Option<Self>> {
        let (wanted, drawn) = (settings.prompted.examples, self.turns.len());
        let questions = loop {
            if self.turns.is_empty() && self.system_prompt.is_none() {
                break Vec::new();
            }
            let mut questions = Vec::new();
            for ((position, source), item) in rows.iter().zip(&*items) {
                let (_, tools) = source.turns();
                let question = Question::new(&self.before(source), tools, chat);
                let question = question.map_err(|cause| {
                    Failure::Input(format!("{position}: system {PROMPTED}: {cause}"))
                })?;
                // No more than the other systems have where their replies are cut as well.
                let left = config.max_positions - item.plain.prompt.len();
                if question.positions(left.min(settings.max_new_tokens)) > config.max_positions {
                    break;
                }
                questions.push(question);
            }
            if questions.len() == items.len() {
                break questions;
            }
            if self.turns.pop().is_none() {
                let most = config.max_positions;
                let cause = format!(
                    "generation.prompted.system_prompt: too long: a row has no room in the model's {most} tokens"
                );
                return Err(Failure::Usage(cause).into());
            }
            self.examples.pop();
        };
        let shown = self.turns.len();
        if shown < wanted && !items.is_empty() {
            let room = match shown < drawn {
                true => format!(
                    "beside the longest row, into the model's {}",
                    config.max_positions
                ),
                false => format!("into {MOST_TOKENS}"),
            };
            let lacks = format!(
                "no more of the rows that were trained on, of one question and one answer, fit {room} tokens"
            );
            match questions.is_empty() {
                true => app.info(format_args!("no system `{PROMPTED}`: {lacks}")),
                false => app.info(format_args!(
                    "the system `{PROMPTED}` is shown {shown} of {wanted} examples: {lacks}"
                )),
            }
        }
        if questions.is_empty() {
            return Ok(None);
        }
        for (item, question) in items.iter_mut().zip(questions) {
            item.prompted = Some(question);
        }
        Ok(Some(self))
    }

    /// The conversation of a row, its reply last, with what stands before it.
    fn before(&self, source: &Source) -> Vec<Message> {
        let (turns, _) = source.turns();
        let own = turns
            .iter()
            .take_while(|turn| turn.role == "system")
            .count();
        let (system, rest) = turns.split_at(own);
        let system = match &self.system_prompt {
            Some(text) => [text]
                .into_iter()
                .filter(|t| !t.is_empty())
                .map(Message::system)
                .collect(),
            None => system.to_vec(),
        };
        let shown = self.turns.iter().flatten().cloned();
        system
            .into_iter()
            .chain(shown)
            .chain(rest.iter().cloned())
            .collect()
    }
}

/// A row as one turn of the user and one of the assistant, if it is that and no more, and
/// spells out no token that would end a turn within it.
fn exchange(source: &Source, chat: &Chat) -> Option<[Message; 2]> {
    let (turns, tools) = source.turns();
    let own = turns
        .iter()
        .take_while(|turn| turn.role == "system")
        .count();
    let [user, assistant] = &turns[own..] else {
        return None;
    };
    let are_texts = [user, assistant].iter().all(|turn| {
        turn.rest.is_empty()
            && !turn.content.trim().is_empty()
            && chat.special_in(&turn.content).is_none()
    });
    let is_one = user.role == "user" && assistant.role == "assistant" && tools.is_empty();
    (is_one && are_texts).then(|| [user.clone(), assistant.clone()])
}
