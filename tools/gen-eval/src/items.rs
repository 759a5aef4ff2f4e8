//! The rows to reply to, as the model reads them.

use anyhow::Result;
use cli::{App, Failure};
use jsonl::Position;
use qwen3::{Chat, Config, Conversation, Form, LossOn, Seen, Wording};
use record::{Record, Split};

/// A row as it was read: what is asked, and how it was answered.
pub struct Source {
    conversation: Conversation,
    /// The turns before the reply.
    asked: usize,
    pub split: Option<Split>,
}

impl Source {
    /// The row in a record; the reply is the last assistant turn.
    pub fn new(record: &Record, wording: &Wording) -> Result<Self, record::Error> {
        let mut conversation = wording.read(record)?;
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
                    conversation,
                    asked,
                    split,
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

    /// Whether the words of the prompt template are around it.
    pub fn is_pair(&self) -> bool {
        self.conversation.form == Form::Pair
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

/// A row in tokens.
pub struct Item {
    /// Its own name, else `line N`.
    pub id: String,
    pub conversation_id: String,
    /// What is replied to, as text.
    pub tweet: String,
    pub reference: String,
    /// What the model is to answer.
    pub prompt: Vec<u32>,
    /// Prompt and reference, and which tokens are the reference's.
    pub ids: Vec<u32>,
    pub labelled: Vec<bool>,
    /// A special token that one of its texts spells out.
    special: Option<String>,
}

impl Item {
    /// Encodes a row, exactly as training did.
    pub fn new(source: Source, position: &Position, chat: &Chat, config: &Config) -> Result<Self> {
        let refuse = |cause: String| Failure::Input(format!("{position}: {cause}"));
        let tweet = source.tweet();
        let (row, asked) = (source.conversation, source.asked);
        let said = &row.messages[asked];
        let prompt = chat
            .encode_prompt(&row.messages[..asked], &row.tools)
            .map_err(|e| refuse(e.to_string()))?;
        let mut whole = chat
            .encode_training(&row.messages, &row.tools, LossOn::Reply)
            .map_err(|e| refuse(e.to_string()))?;
        if whole.ids.len().max(prompt.len() + 1) > config.max_positions {
            let (have, most) = (whole.ids.len(), config.max_positions);
            return Err(refuse(format!(
                "{have} tokens, more than the model's {most}: leave the row out"
            ))
            .into());
        }
        // The last reply alone is scored.
        let end = whole.labelled.iter().rposition(|&labelled| labelled);
        let end = end.ok_or_else(|| refuse("the reply has no token to be scored".into()))?;
        let before = whole.labelled[..end]
            .iter()
            .rposition(|&labelled| !labelled);
        let start = before.map_or(0, |at| at + 1);
        whole.labelled[..start].fill(false);
        // Calls of tools stand in the rendered reply only.
        let reference = match said.rest.contains_key("tool_calls") {
            true => chat.decode(&whole.ids[start..=end])?.trim().to_owned(),
            false => said.content.clone(),
        };
        let mut texts = row.messages.iter().map(|message| &message.content);
        let special = texts.find_map(|text| chat.special_in(text));
        let id = row.id.unwrap_or_else(|| format!("line {}", position.line));
        Ok(Self {
            conversation_id: row.thread.unwrap_or_else(|| id.clone()),
            id,
            tweet,
            reference,
            prompt,
            ids: whole.ids,
            labelled: whole.labelled,
            special: special.map(str::to_owned),
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

/// What an adapter tells of the rows that it was trained on, if it does.
pub type SeenBy<'a> = (&'a str, Option<Seen>);

/// Of the rows read, those held out: of `split: eval`, or, where none says which side it
/// is on, those that no adapter was trained on.
pub fn held_out(
    app: &App,
    sources: Vec<(Position, Source)>,
    seen: &[SeenBy],
) -> Vec<(Position, Source)> {
    let read = sources.len();
    if read == 0 {
        app.warn("no rows on standard input: nothing is generated, and there are no figures");
        return sources;
    }
    if sources.iter().all(|(_, source)| source.split.is_none()) {
        return untrained(app, sources, seen);
    }
    let unsplit = sources
        .iter()
        .filter(|(_, source)| source.split.is_none())
        .count();
    if unsplit > 0 {
        app.warn(format_args!(
            "{} without `split` left out, since others have one",
            cli::counted(unsplit, "row")
        ));
    }
    let kept: Vec<_> = sources
        .into_iter()
        .filter(|(_, source)| source.split == Some(Split::Eval))
        .collect();
    let trained_on = read - unsplit - kept.len();
    match kept.len() {
        0 => app.warn(format_args!(
            "no row is held out, so nothing is generated and there are no figures: of {read} read, \
             {trained_on} have `split: train` and none `split: eval`. pair-dedup holds rows out \
             (deduplication.eval_fraction above 0); rows without `split` are all taken"
        )),
        kept => app.info(format_args!(
            "{} of `split: eval` kept, {trained_on} of `split: train` left out",
            cli::counted(kept, "row")
        )),
    }
    for (name, seen) in seen {
        let known = count_trained_on(&kept, seen.as_ref());
        if known > 0 {
            app.warn(format_args!(
                "adapter {name} was trained on {known} of the {} of `split: eval`: its figures are too good",
                cli::counted(kept.len(), "row")
            ));
        }
    }
    kept
}

/// How many of the rows an adapter was trained on, as far as it tells.
fn count_trained_on(sources: &[(Position, Source)], seen: Option<&Seen>) -> usize {
    let was = |(_, source): &&(Position, Source)| {
        seen.is_some_and(|seen| seen.side(&source.conversation.row) == Some(Split::Train))
    };
    sources.iter().filter(was).count()
}

/// Of rows that say no side, those that no adapter was trained on; with what is not known.
fn untrained(
    app: &App,
    sources: Vec<(Position, Source)>,
    adapters: &[SeenBy],
) -> Vec<(Position, Source)> {
    let read = cli::counted(sources.len(), "row");
    let mut known = Vec::new();
    for (name, seen) in adapters {
        let Some(seen) = seen else {
            app.warn(format_args!(
                "no row has `split`, and adapter {name} has no {} beside it: whether it was trained on some of \
                 the {read} is not known",
                qwen3::ROWS
            ));
            continue;
        };
        if seen.has_gap() {
            app.warn(format_args!(
                "no row has `split`, and {} beside adapter {name} has a gap, for it began from an adapter without \
                 one: whether it was trained on others of the {read} is not known",
                qwen3::ROWS
            ));
        }
        if !sources
            .iter()
            .any(|(_, source)| seen.side(&source.conversation.row).is_some())
        {
            app.info(format_args!(
                "by its texts none of the {read} is in {} beside adapter {name}",
                qwen3::ROWS
            ));
            continue;
        }
        known.push(seen);
    }
    let all = sources.len();
    let side = |source: &Source| {
        let mut sides = known
            .iter()
            .filter_map(|seen| seen.side(&source.conversation.row));
        sides.try_fold(None, |_, side| match side {
            Split::Train => Err(Split::Train),
            Split::Eval => Ok(Some(side)),
        })
    };
    let mut unknown = 0;
    let kept: Vec<_> = sources
        .into_iter()
        .filter(|(_, source)| match side(source) {
            Err(_) => false,
            Ok(None) => {
                unknown += 1;
                true
            }
            Ok(Some(_)) => true,
        })
        .collect();
    if known.is_empty() {
        app.info(format_args!("no row has `split`: all {all} are taken"));
        return kept;
    }
    let left_out = all - kept.len();
    let new = match unknown {
        0 => String::new(),
        new => format!(" ({new} of them, by their texts, not in {})", qwen3::ROWS),
    };
    match kept.len() {
        0 => app.warn(format_args!(
            "no row has `split`, and each of the {read} was trained on, so nothing is generated and there are no \
             figures: hold rows out in training (data.eval_fraction above 0, or `split: eval`)"
        )),
        kept => app.info(format_args!(
            "no row has `split`: of {read}, {left_out} that were trained on are left out and {kept} taken{new}"
        )),
    }
    kept
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
