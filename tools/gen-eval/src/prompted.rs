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
    pub fn draw(settings: &Generation, rows: &[Row], seen: &[SeenBy], chat: &Chat) -> Self {
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
            // What the template refuses is no example; training has said so.
            let encoded = chat.encode_training(&exchange, &[], LossOn::Reply);
            let tokens = encoded.map_or(usize::MAX, |encoded| encoded.ids.len());
            if tokens <= room {
                room -= tokens;
                prompted.examples.push(source.id(position));
                prompted.turns.push(exchange);
            }
        }
        prompted
    }

    /// Puts the rows' questions behind the examples, and these to the items of the rows.
    /// Examples are left out, the last first, until every row goes with them. `None` where
    /// nothing is left that the base is not told.
    ///
    /// # Errors
    /// If a row does not go even without examples.
    pub fn ask(
        mut self,
        app: &App,
        settings: &Generation,
        rows: &[Row],
        items: &mut [Item],
        (chat, config): (&Chat, &Config),
    ) -> Result<Option<Self>> {
        let (wanted, drawn) = (settings.prompted.examples, self.turns.len());
        let mut why = format!(
            "no more of the rows that were trained on, of one question and one answer, fit into {MOST_TOKENS} tokens"
        );
        let questions = loop {
            if self.turns.is_empty() && self.system_prompt.is_none() {
                break Vec::new();
            }
            let each = rows.iter().zip(&*items).map(|((position, source), item)| {
                self.question(source, item, settings, (chat, config))
                    .map_err(|cause| format!("{position}: {cause}"))
            });
            match each.collect::<Result<Vec<_>, _>>() {
                Ok(questions) => break questions,
                Err(cause) if self.turns.pop().is_none() => {
                    let remedy =
                        "shorten or change generation.prompted.system_prompt, or leave the row out";
                    return Err(Failure::Input(format!(
                        "{cause} for the system `{PROMPTED}`; {remedy}"
                    ))
                    .into());
                }
                Err(cause) => why = format!("with one more, {cause}"),
            }
            self.examples.pop();
        };
        let shown = self.turns.len();
        let is_base = |(question, item): (&Question, &Item)| question.prompt == item.plain.prompt;
        if questions.iter().zip(&*items).all(is_base) {
            if wanted > 0 && !items.is_empty() {
                app.info(format_args!("no system `{PROMPTED}`: {why}"));
            }
            return Ok(None);
        }
        if shown < wanted {
            let told =
                format!("the system `{PROMPTED}` is shown {shown} of {wanted} examples: {why}");
            // Fewer than there are is a weaker prompt than the rows allow.
            match shown < drawn {
                true => app.warn(told),
                false => app.info(told),
            }
        }
        for (item, question) in items.iter_mut().zip(questions) {
            item.prompted = Some(question);
        }
        Ok(Some(self))
    }

    /// A row behind the examples.
    fn question(
        &self,
        source: &Source,
        item: &Item,
        settings: &Generation,
        (chat, config): (&Chat, &Config),
    ) -> Result<Question, String> {
        let question = Question::new(&self.before(source), source.tools(), chat)?;
        // No more than the other systems have where their replies are cut as well.
        let left = config.max_positions - item.plain.prompt.len();
        let needs = question.positions(left.min(settings.max_new_tokens));
        match needs <= config.max_positions {
            true => Ok(question),
            false => Err(format!(
                "{needs} tokens with its reply, more than the model's {}",
                config.max_positions
            )),
        }
    }

    /// The conversation of a row, its reply last, with what stands before it. A row's own
    /// system turn stays: it may hold what the question is about.
    fn before(&self, source: &Source) -> Vec<Message> {
        let (system, rest) = source.turns();
        let system = match &self.system_prompt {
            Some(text) if !source.has_own_system() => {
                let text = Some(text).filter(|text| !text.is_empty());
                text.map(Message::system).into_iter().collect()
            }
            _ => system.to_vec(),
        };
        let shown = self.turns.iter().flatten().cloned();
        let rest = rest.iter().cloned();
        system.into_iter().chain(shown).chain(rest).collect()
    }
}

/// A row as one turn of the user and one of the assistant, if it is that and no more, and
/// spells out no token that would end a turn within it.
fn exchange(source: &Source, chat: &Chat) -> Option<[Message; 2]> {
    let (_, [user, assistant]) = source.turns() else {
        return None;
    };
    let is_text = |turn: &&Message| {
        let text = &turn.content;
        turn.rest.is_empty() && !text.trim().is_empty() && chat.special_in(text).is_none()
    };
    let are_texts = [user, assistant].iter().all(is_text);
    let is_one = user.role == "user" && assistant.role == "assistant" && source.tools().is_empty();
    (is_one && are_texts).then(|| [user.clone(), assistant.clone()])
}
