//! From JSON lines to tokens and labels.
//!
//! A line is a tweet→reply pair, a conversation under `messages`, or a
//! `prompt` with its `completion`. Whatever it is, it must teach something: a
//! row without a labelled token, or longer than the model is trained for, is
//! refused by name instead of being skipped or cut in silence.

use std::path::Path;

use anyhow::{Context, Result};
use cli::{App, Failure};
use engine::rng::{Purpose, Stream};
use jsonl::{Lines, Records, Rejects};
use qwen3::{Chat, Message};
use record::{Reason, Record, Rejected, Split};
use settings::{LongRows, LossOn, TextChoice, TrainSettings};

/// One conversation as the model sees it.
#[derive(Clone, Debug)]
pub struct Row {
    /// Number in its set, part of the name of its random streams.
    pub number: u32,
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether a token is a target; as long as `ids`.
    pub labelled: Vec<bool>,
}

impl Row {
    /// Its targets; the first token has nothing to be predicted from.
    pub fn targets(&self) -> usize {
        let labelled = self.labelled.iter().skip(1);
        labelled.filter(|&&labelled| labelled).count()
    }
}

/// The rows of a run.
#[derive(Debug)]
pub struct Rows {
    /// What is trained on, in the order of the input.
    pub train: Vec<Row>,
    /// What is held out.
    pub eval: Vec<Row>,
    /// SHA-256 over what the run depends on: every row's ids, labels and side.
    pub sha256: String,
}

/// A line before it is put into tokens.
struct Source {
    record: Record,
    position: String,
    group: String,
    split: Option<Split>,
    messages: Vec<Message>,
    /// Functions that the model may call, as JSON schemas.
    tools: Vec<serde_json::Value>,
}

/// Reads, splits and encodes the data. Malformed lines within the allowance
/// are kept in `rejects`.
pub fn load(
    app: &App,
    data: &Path,
    rejects: Option<&Path>,
    settings: &TrainSettings,
    chat: &Chat,
) -> Result<Rows> {
    let mut kept = app.rejects("--rejects", rejects)?;
    let mut sources = read(app, data, &mut kept, settings)?;
    if sources.is_empty() {
        return Err(Failure::Input(format!(
            "{}: empty: there is nothing to train on",
            data.display()
        ))
        .into());
    }
    split(&mut sources, settings);
    if settings.data.shuffled_replies {
        shuffle_replies(&mut sources, settings.training.seed)?;
    }

    warn_of_special_tokens(app, chat, &sources);

    let progress = app.progress("tokenising", Some(sources.len() as u64));
    let mut rows = Rows {
        train: Vec::new(),
        eval: Vec::new(),
        sha256: String::new(),
    };
    let mut fingerprint = Vec::new();
    let (mut cut, mut left_out) = (0, 0);
    for mut source in sources {
        progress.add(1);
        let side = source.split.unwrap_or(Split::Train);
        let set = match side {
            Split::Train => &mut rows.train,
            Split::Eval => &mut rows.eval,
        };
        let row = match encode(&source, set.len(), settings, chat)? {
            Fit::Whole(row) => row,
            Fit::Cut(row) => {
                cut += 1;
                row
            }
            Fit::TooLong(tokens) => {
                left_out += 1;
                let limit = settings.training.max_seq_length;
                let reason = Reason {
                    filter: "row_too_long".into(),
                    detail: format!("{tokens} tokens, at most {limit}"),
                };
                let rejected = Rejected {
                    by: app.name().into(),
                    reasons: vec![reason],
                };
                source.record.set("rejected", &rejected)?;
                kept.record(&source.record)?;
                continue;
            }
        };
        fingerprint.push(side as u8);
        for (id, labelled) in row.ids.iter().zip(&row.labelled) {
            fingerprint.extend_from_slice(&(id << 1 | u32::from(*labelled)).to_le_bytes());
        }
        fingerprint.extend_from_slice(&u32::MAX.to_le_bytes());
        set.push(row);
    }
    drop(progress);
    if cut > 0 {
        app.warn(format_args!(
            "{cut} rows are cut to training.max_seq_length"
        ));
    }
    if left_out > 0 {
        let hint = if kept.are_kept() {
            ""
        } else {
            "; --rejects FILE keeps them"
        };
        app.warn(format_args!(
            "{left_out} rows longer than training.max_seq_length are left out{hint}"
        ));
    }
    kept.commit()?;
    if rows.train.is_empty() {
        let cause = "every row is held out (`split: eval`): there is nothing to train on";
        return Err(Failure::Input(format!("{}: {cause}", data.display())).into());
    }
    rows.sha256 = cli::sha256_hex(&fingerprint);
    Ok(rows)
}

fn read(
    app: &App,
    data: &Path,
    kept: &mut Rejects,
    settings: &TrainSettings,
) -> Result<Vec<Source>> {
    let mut records = Records::new(Lines::open(data)?, app.common().max_bad_lines);
    let mut sources = Vec::new();
    while let Some((position, mut source)) =
        records.next_with(kept, |record| source(record, settings))?
    {
        source.position = position.to_string();
        if source.group.is_empty() {
            source.group = position.line.to_string();
        }
        sources.push(source);
    }
    if records.bad() > 0 {
        app.warn(format_args!(
            "{} malformed lines passed over",
            records.bad()
        ));
    }
    Ok(sources)
}

/// The conversation that a record holds.
fn source(record: Record, settings: &TrainSettings) -> Result<Source, record::Error> {
    let split = record.get("split")?;
    let group: Option<String> = record.get("conversation_id")?;
    let (group, messages) = if record.contains("messages") {
        (group, record.require("messages")?)
    } else if record.contains("prompt") {
        (
            group,
            turns(
                settings,
                record.require("prompt")?,
                record.require("completion")?,
            ),
        )
    } else {
        let [tweet, reply] = match settings.data.text {
            TextChoice::Normalized => ["tweet_normalized", "reply_normalized"],
            TextChoice::Raw => ["tweet", "reply"],
        };
        let text = |key: &str| -> Result<String, record::Error> {
            record.get(key)?.ok_or_else(|| record::Error::Field {
                key: key.into(),
                cause: "missing: run pair-dedup, or set data.text: raw; rows with `messages`, or `prompt` and \
                        `completion`, are taken too"
                    .into(),
            })
        };
        let pair = record.pair()?;
        (
            Some(pair.conversation_id),
            turns(settings, text(tweet)?, text(reply)?),
        )
    };
    Ok(Source {
        tools: record.get("tools")?.unwrap_or_default(),
        split,
        position: String::new(),
        group: group.unwrap_or_default(),
        messages,
        record,
    })
}

/// One question and its answer, under the system prompt if there is one.
fn turns(settings: &TrainSettings, user: String, assistant: String) -> Vec<Message> {
    let system = &settings.data.system_prompt;
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(Message::system(system));
    }
    messages.extend([Message::user(user), Message::assistant(assistant)]);
    messages
}

/// Rows that say nothing of their side: all are trained on, unless
/// `eval_fraction` asks for a part. Rows of one conversation stay together.
fn split(sources: &mut [Source], settings: &TrainSettings) {
    if sources.iter().any(|source| source.split.is_some()) {
        return;
    }
    for source in sources {
        let hash =
            cli::sha256_hex(format!("{}:{}", settings.training.seed, source.group).as_bytes());
        let draw = u64::from_str_radix(&hash[..13], 16).unwrap_or(0) as f64 / (1u64 << 52) as f64;
        source.split = Some(if draw < settings.data.eval_fraction {
            Split::Eval
        } else {
            Split::Train
        });
    }
}

/// Gives each training tweet the reply of another: round a seeded circle, so
/// that none keeps its own.
fn shuffle_replies(sources: &mut [Source], seed: u64) -> Result<()> {
    let train: Vec<usize> = (0..sources.len())
        .filter(|&i| sources[i].split.unwrap_or(Split::Train) == Split::Train)
        .collect();
    let circle: Vec<usize> = permutation(train.len(), seed, CIRCLE)
        .into_iter()
        .map(|i| train[i])
        .collect();
    let replies: Vec<Option<Message>> = circle
        .iter()
        .map(|&i| sources[i].messages.last().cloned())
        .collect();
    for (at, &i) in circle.iter().enumerate() {
        let (last, reply) = (
            sources[i].messages.last_mut(),
            &replies[(at + 1) % circle.len()],
        );
        let (Some(last), Some(reply)) = (last, reply) else {
            return Err(
                Failure::Input(format!("{}: `messages` is empty", sources[i].position)).into(),
            );
        };
        last.clone_from(reply);
    }
    Ok(())
}

/// Stands where an epoch's number stands in the streams of [`permutation`].
const CIRCLE: u32 = u32::MAX;

/// The order of `n` rows in an epoch: Fisher–Yates over a counter stream.
pub fn permutation(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let stream = Stream {
        seed,
        purpose: Purpose::Shuffle,
        layer: 0,
        module: 0,
    };
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let bits = stream.bits(i as u32, epoch, 0, 0);
        // 64 random bits times i + 1, the high word: uniform to 2^-64 · n.
        let draw = u128::from(u64::from(bits[0]) << 32 | u64::from(bits[1]));
        order.swap(i, ((draw * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

/// A text that spells out `<|im_end|>` ends its own turn; the rest of it is read
/// as markup, or taught as such.
fn warn_of_special_tokens(app: &App, chat: &Chat, sources: &[Source]) {
    let special = |source: &Source| {
        let mut texts = source.messages.iter().map(|message| &message.content);
        let token = texts.find_map(|text| chat.special_in(text))?.to_owned();
        Some((source.position.clone(), token))
    };
    let mut found = sources.iter().filter_map(special);
    if let Some((position, token)) = found.next() {
        app.warn(format_args!(
            "{} rows spell out a special token, which the model reads as such; the first is {position}, {token}",
            1 + found.count()
        ));
    }
}

/// How a row fits into `training.max_seq_length`.
enum Fit {
    Whole(Row),
    Cut(Row),
    /// With its number of tokens.
    TooLong(usize),
}

fn encode(source: &Source, number: usize, settings: &TrainSettings, chat: &Chat) -> Result<Fit> {
    let position = &source.position;
    let refuse =
        |cause: String| anyhow::Error::from(Failure::Input(format!("{position}: {cause}")));
    let loss_on = match settings.data.loss_on {
        LossOn::Reply => qwen3::LossOn::Reply,
        LossOn::All => qwen3::LossOn::All,
    };
    let mut encoded = chat
        .encode_training(&source.messages, &source.tools, loss_on)
        .map_err(|error| refuse(error.to_string()))?;
    let (tokens, limit) = (encoded.ids.len(), settings.training.max_seq_length);
    let too_long = tokens > limit;
    match settings.training.long_rows {
        LongRows::Refuse if too_long => {
            return Err(refuse(format!(
                "{tokens} tokens, more than training.max_seq_length {limit}: raise it, or set \
                 training.long_rows to truncate or skip"
            )));
        }
        LongRows::Skip if too_long => return Ok(Fit::TooLong(tokens)),
        _ => {
            encoded.ids.truncate(limit);
            encoded.labelled.truncate(limit);
        }
    }
    // The first token has nothing before it to be predicted from.
    if !encoded.labelled.iter().skip(1).any(|&labelled| labelled) {
        let cause = if too_long {
            "what is left of the row after cutting"
        } else {
            "the row"
        };
        return Err(refuse(format!(
            "no token to learn from: {cause} has no reply"
        )));
    }
    let row = Row {
        number: u32::try_from(number).context("more than 4 billion rows")?,
        ids: encoded.ids,
        labelled: encoded.labelled,
    };
    Ok(if too_long {
        Fit::Cut(row)
    } else {
        Fit::Whole(row)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_holds_every_row_once_and_differs_by_epoch_and_seed() {
        let sorted = |mut order: Vec<usize>| {
            order.sort_unstable();
            order
        };
        let first = permutation(97, 1, 0);
        assert_eq!(sorted(first.clone()), (0..97).collect::<Vec<_>>());
        assert_ne!(first, permutation(97, 1, 1));
        assert_ne!(first, permutation(97, 2, 0));
        assert_eq!(first, permutation(97, 1, 0));
    }

    #[test]
    fn orders_are_uniform() {
        // 24 orders of 4 rows, 24,000 draws: chi² with 23 degrees of freedom has
        // its 0.9999 quantile at 55.5.
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            *counts.entry(permutation(4, seed, 0)).or_insert(0.0) += 1.0;
        }
        let chi2: f64 = counts
            .values()
            .map(|c: &f64| (c - 1000.0).powi(2) / 1000.0)
            .sum();
        assert_eq!(counts.len(), 24);
        assert!(chi2 < 55.5, "{chi2}");
    }
}
