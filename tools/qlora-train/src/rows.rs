//! From JSON lines to tokens and labels.
//!
//! A line is a tweet→reply pair, or a conversation under `messages`. Whatever
//! it is, it must teach something: a row without a labelled token, or longer
//! than the model is trained for, is refused by name instead of being skipped
//! or cut in silence.

use std::path::Path;

use anyhow::{Context, Result};
use cli::{App, Failure};
use engine::rng::{Purpose, Stream};
use jsonl::{Lines, Records};
use qwen3::{Chat, LossOn, Message};
use record::{Record, Split};
use settings::{TextChoice, TrainSettings};

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
    position: String,
    group: String,
    split: Option<Split>,
    messages: Vec<Message>,
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
    let mut sources = read(app, data, rejects, settings)?;
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

    let progress = app.progress("tokenising", Some(sources.len() as u64));
    let mut rows = Rows {
        train: Vec::new(),
        eval: Vec::new(),
        sha256: String::new(),
    };
    let mut fingerprint = Vec::new();
    for source in sources {
        let side = source.split.unwrap_or(Split::Train);
        let set = if side == Split::Train {
            &mut rows.train
        } else {
            &mut rows.eval
        };
        let row = encode(&source, set.len(), settings.training.max_seq_length, chat)?;
        fingerprint.push(side as u8);
        for (id, labelled) in row.ids.iter().zip(&row.labelled) {
            fingerprint.extend_from_slice(&(id << 1 | u32::from(*labelled)).to_le_bytes());
        }
        fingerprint.extend_from_slice(&u32::MAX.to_le_bytes());
        set.push(row);
        progress.add(1);
    }
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
    rejects: Option<&Path>,
    settings: &TrainSettings,
) -> Result<Vec<Source>> {
    let mut kept = app.rejects("--rejects", rejects)?;
    let mut records = Records::new(Lines::open(data)?, app.common().max_bad_lines);
    let mut sources = Vec::new();
    while let Some((position, mut source)) =
        records.next_with(&mut kept, |record| source(&record, settings))?
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
    kept.commit()?;
    Ok(sources)
}

/// The conversation that a record holds.
fn source(record: &Record, settings: &TrainSettings) -> Result<Source, record::Error> {
    let split = record.get("split")?;
    if record.contains("messages") {
        let messages: Vec<Message> = record.require("messages")?;
        let group = record.get("conversation_id")?.unwrap_or_default();
        return Ok(Source {
            position: String::new(),
            group,
            split,
            messages,
        });
    }
    let [tweet, reply] = match settings.data.text {
        TextChoice::Normalized => ["tweet_normalized", "reply_normalized"],
        TextChoice::Raw => ["tweet", "reply"],
    };
    let text = |key: &str| -> Result<String, record::Error> {
        record.get(key)?.ok_or_else(|| {
            let remedy = match settings.data.text {
                TextChoice::Normalized => " (run pair-dedup, or set data.text: raw",
                TextChoice::Raw => " (or `messages`",
            };
            record::Error::Missing(
                format!("{key}`{remedy}; `messages` rows are taken too)").replace("`)", ")"),
            )
        })
    };
    let pair = record.pair()?;
    let mut messages = Vec::new();
    if !settings.data.system_prompt.is_empty() {
        messages.push(Message::system(&settings.data.system_prompt));
    }
    messages.push(Message::user(text(tweet)?));
    messages.push(Message::assistant(text(reply)?));
    Ok(Source {
        position: String::new(),
        group: pair.conversation_id,
        split,
        messages,
    })
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

fn encode(source: &Source, number: usize, max_tokens: usize, chat: &Chat) -> Result<Row> {
    let position = &source.position;
    let refuse =
        |cause: String| anyhow::Error::from(Failure::Input(format!("{position}: {cause}")));
    let encoded = chat
        .encode_training(&source.messages, LossOn::Reply)
        .map_err(|error| refuse(error.to_string()))?;
    if encoded.ids.len() > max_tokens {
        return Err(refuse(format!(
            "{} tokens, more than training.max_seq_length {max_tokens}: raise it or leave the row out",
            encoded.ids.len()
        )));
    }
    // The first token has nothing before it to be predicted from.
    if !encoded.labelled.iter().skip(1).any(|&labelled| labelled) {
        return Err(refuse(
            "no token to learn from: the row has no reply".into(),
        ));
    }
    let number = u32::try_from(number).context("more than 4 billion rows")?;
    Ok(Row {
        number,
        ids: encoded.ids,
        labelled: encoded.labelled,
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
