//! From JSON lines to tokens and labels.
//!
//! A line is a tweet→reply pair, a conversation under `messages`, or a
//! `prompt` with its `completion`. Whatever it is, it must teach something: a
//! row without a labelled token, or longer than the model is trained for, is
//! refused by name instead of being skipped or cut in silence.

use std::path::Path;

use anyhow::{Context, Result};
use cli::{App, Failure, Resolved};
use engine::rng::{Purpose, Stream};
use jsonl::{Lines, Position, Rejects};
use qwen3::{Chat, Form, Message, PromptTemplate, Seen, Wording};
use record::{Reason, Record, Split};
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

/// Rows by what they were made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// Tweets with replies.
    pub pairs: usize,
    /// `prompt` with `completion`.
    pub prompts: usize,
    /// `messages`.
    pub conversations: usize,
}

impl Kinds {
    /// Whether there is nothing but tweets with replies.
    pub fn only_pairs(&self) -> bool {
        self.prompts + self.conversations == 0
    }

    fn of(&mut self, form: Form) -> &mut usize {
        match form {
            Form::Pair => &mut self.pairs,
            Form::Prompt => &mut self.prompts,
            Form::Messages => &mut self.conversations,
        }
    }
}

/// The rows of a run.
#[derive(Debug)]
pub struct Rows {
    /// What is trained on, in the order of the input.
    pub train: Vec<Row>,
    /// What is held out.
    pub eval: Vec<Row>,
    /// How many of these are of each kind.
    pub kinds: Kinds,
    /// Rows that were too long and are in neither.
    pub left_out: usize,
    /// Rows that were too long and have lost their end.
    pub cut: usize,
    /// SHA-256 over what the run depends on: every row's ids, labels and side.
    pub sha256: String,
    /// The names of all of them and their sides, for who evaluates the adapter; also of
    /// those that it was trained on before.
    pub seen: Seen,
    /// How many of those held out it was trained on before.
    pub trained_before: usize,
}

impl Rows {
    /// How many there were, those left out included.
    pub fn read(&self) -> usize {
        self.train.len() + self.eval.len() + self.left_out
    }
}

/// A line before it is put into tokens.
struct Source {
    position: String,
    /// Its name by its texts.
    name: String,
    form: Form,
    split: Option<Split>,
    /// Its side where no row says one.
    drawn: Split,
    messages: Vec<Message>,
    /// Functions that the model may call, as JSON schemas.
    tools: Vec<serde_json::Value>,
    /// Kept until it is known whether the row is short enough.
    record: Record,
}

/// What becomes of lines that are not taken.
pub enum Rejected<'a> {
    /// They go to that file, if there is one.
    Kept(Option<&'a Path>),
    /// Nothing is to be written.
    Dropped,
}

/// Reads, encodes and splits the data. Malformed lines within the allowance, and
/// rows that are too long where such are left out, are kept in `rejects`. `before` is
/// what the adapter to start from has seen.
pub fn load(
    app: &App,
    data: &Path,
    rejects: Rejected<'_>,
    resolved: &Resolved<TrainSettings>,
    chat: &Chat,
    before: Option<&Seen>,
) -> Result<Rows> {
    let settings = &resolved.settings;
    let mut kept = match rejects {
        Rejected::Kept(path) => app.rejects("--rejects", path)?,
        Rejected::Dropped => Rejects::create(None)?,
    };
    let mut records = app.records(Lines::open(data)?);
    let wording = wording(resolved)?;
    let progress = app.progress("rows", None);
    let mut next = |kept: &mut Rejects| -> Result<Option<Source>> {
        let read = records.next_with(kept, |record| source(record, &wording))?;
        progress.add(1);
        Ok(read.map(|(position, source)| source.at(&position, settings)))
    };
    let mut encoder = Encoder::new(settings, chat);
    if settings.data.shuffled_replies {
        let mut sources = Vec::new();
        while let Some(source) = next(&mut kept)? {
            sources.push(source);
        }
        exchange_replies(&mut sources, settings.training.seed)?;
        for source in sources {
            encoder.add(app, source, &mut kept)?;
        }
    } else {
        while let Some(source) = next(&mut kept)? {
            encoder.add(app, source, &mut kept)?;
        }
    }
    drop(progress);
    if records.bad() > 0 {
        app.warn(format_args!(
            "{} malformed lines passed over",
            records.bad()
        ));
    }
    let rows = encoder.finish(app, data, kept.are_kept(), before)?;
    kept.commit()?;
    Ok(rows)
}

/// How rows are put to the model.
pub fn wording(resolved: &Resolved<TrainSettings>) -> Result<Wording, Failure> {
    let settings = &resolved.settings;
    Ok(Wording {
        normalized: settings.data.text == TextChoice::Normalized,
        system_prompt: settings.data.system_prompt.clone(),
        prompt: PromptTemplate::new(&settings.data.prompt_template).map_err(|error| {
            resolved.wrong("data.prompt_template", format!("is no template: {error}"))
        })?,
    })
}

/// The conversation that a record holds.
fn source(record: Record, wording: &Wording) -> Result<Unplaced, record::Error> {
    let conversation = wording.read(&record)?;
    Ok(Unplaced {
        group: record.group(&conversation.own_turns(), &conversation.tools)?,
        source: Source {
            position: String::new(),
            name: conversation.row,
            form: conversation.form,
            split: record.split()?,
            drawn: Split::Train,
            messages: conversation.messages,
            tools: conversation.tools,
            record,
        },
    })
}

/// A source that does not know yet on which line it stands.
struct Unplaced {
    /// The group that stays on one side, see [`Record::group`].
    group: String,
    source: Source,
}

impl Unplaced {
    /// Draws the side that it is on if no row says one: all are trained on, unless
    /// `eval_fraction` asks for a part. A group is on one side whole, so that no question
    /// is held out whose answers were trained on. Neither the order nor the other rows
    /// matter.
    fn at(self, position: &Position, settings: &TrainSettings) -> Source {
        let group = format!("{}:{}", settings.training.seed, self.group);
        let hash = cli::sha256_hex(group.as_bytes());
        let draw = u64::from_str_radix(&hash[..13], 16).unwrap_or(0) as f64 / (1u64 << 52) as f64;
        Source {
            position: position.to_string(),
            drawn: match draw < settings.data.eval_fraction {
                true => Split::Eval,
                false => Split::Train,
            },
            ..self.source
        }
    }
}

/// Gives each training tweet the reply of another: round a seeded circle, so
/// that none keeps its own.
fn exchange_replies(sources: &mut [Source], seed: u64) -> Result<()> {
    let any = sources.iter().any(|source| source.split.is_some());
    let train: Vec<usize> = (0..sources.len())
        .filter(|&i| side(sources[i].split, sources[i].drawn, any) == Split::Train)
        .collect();
    if let [only] = train[..] {
        let cause = "the only row to train on has no other's reply to take (data.shuffled_replies)";
        return Err(Failure::Input(format!("{}: {cause}", sources[only].position)).into());
    }
    let reply = |source: &Source| -> Result<usize, Failure> {
        let reply = source.messages.iter().rposition(|m| m.role == "assistant");
        reply.ok_or_else(|| {
            let cause = "no reply that another row could take (data.shuffled_replies)";
            Failure::Input(format!("{}: {cause}", source.position))
        })
    };
    let circle: Vec<(usize, usize)> = permutation(train.len(), seed, CIRCLE)
        .into_iter()
        .map(|i| Ok((train[i], reply(&sources[train[i]])?)))
        .collect::<Result<_, Failure>>()?;
    let replies = circle
        .iter()
        .map(|&(row, at)| sources[row].messages[at].clone());
    let mut replies: Vec<Message> = replies.collect();
    replies.rotate_left(1);
    for (&(row, at), reply) in circle.iter().zip(replies) {
        sources[row].messages[at] = reply;
    }
    Ok(())
}

/// The side of a row: its own, or the drawn one where no row has its own.
fn side(own: Option<Split>, drawn: Split, any: bool) -> Split {
    own.unwrap_or(if any { Split::Train } else { drawn })
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

/// What becomes of the lines, one by one.
struct Encoder<'a> {
    settings: &'a TrainSettings,
    chat: &'a Chat,
    /// Each with its name, its own side and the drawn one.
    rows: Vec<(Row, String, Option<Split>, Split)>,
    kinds: Kinds,
    cut: usize,
    left_out: usize,
    /// Whether any row says its side, one that is left out included.
    any_split: bool,
    /// Rows with an empty reply, and the first one's place.
    empty: (usize, Option<String>),
    /// Rows that spell out a special token, the first one's place, and the token.
    special: (usize, Option<(String, String)>),
}

impl<'a> Encoder<'a> {
    fn new(settings: &'a TrainSettings, chat: &'a Chat) -> Self {
        Self {
            settings,
            chat,
            rows: Vec::new(),
            kinds: Kinds::default(),
            cut: 0,
            left_out: 0,
            any_split: false,
            empty: (0, None),
            special: (0, None),
        }
    }

    /// Puts a line into tokens; one that is too long goes to the rejects.
    fn add(&mut self, app: &App, mut source: Source, kept: &mut Rejects) -> Result<()> {
        self.any_split |= source.split.is_some();
        let mut texts = source.messages.iter().map(|message| &message.content);
        if let Some(token) = texts.find_map(|text| self.chat.special_in(text)) {
            self.special.0 += 1;
            let first = || (source.position.clone(), token.to_owned());
            self.special.1.get_or_insert_with(first);
        }
        let mut replies = source.messages.iter().filter(|m| m.role == "assistant");
        if replies.any(Message::is_empty) {
            self.empty.0 += 1;
            self.empty.1.get_or_insert_with(|| source.position.clone());
        }
        let row = match encode(&source, self.settings, self.chat)? {
            Fit::Whole(row) => row,
            Fit::Cut(row) => {
                self.cut += 1;
                row
            }
            Fit::TooLong(tokens) => {
                self.left_out += 1;
                let limit = self.settings.training.max_seq_length;
                let reason = Reason {
                    filter: "row_too_long".into(),
                    detail: format!("{tokens} tokens, at most {limit}"),
                };
                let rejected = record::Rejected {
                    by: app.name().into(),
                    reasons: vec![reason],
                };
                source.record.set("rejected", &rejected)?;
                return Ok(kept.record(&source.record)?);
            }
        };
        *self.kinds.of(source.form) += 1;
        (self.rows).push((row, source.name, source.split, source.drawn));
        Ok(())
    }

    /// Tells what was done to them, and parts them.
    fn finish(self, app: &App, data: &Path, kept: bool, before: Option<&Seen>) -> Result<Rows> {
        for doubt in self.doubts(kept) {
            app.warn(doubt);
        }
        let (read, any_split) = (self.rows.len(), self.any_split);
        let fraction = self.settings.data.eval_fraction;
        let drawn = fraction > 0.0 && !any_split;
        let mut rows = self.parted(before)?;
        if rows.train.is_empty() {
            let all = match read {
                1 => "the only row".into(),
                _ => format!("all {read} rows"),
            };
            let cause = match (read, rows.left_out) {
                (0, 0) => "no rows".into(),
                (0, _) => "every row is longer than training.max_seq_length".into(),
                _ if drawn => format!(
                    "data.eval_fraction {fraction} happens to hold out {all} (rows of one `split_group` or \
                     `conversation_id`, or that ask the same, stay together; give rows a `split`, or take another \
                     training.seed)"
                ),
                _ => "every row is held out (`split: eval`)".into(),
            };
            let cause = format!("{}: {cause}: there is nothing to train on", data.display());
            return Err(Failure::Input(cause).into());
        }
        if drawn && rows.eval.is_empty() {
            app.warn(format_args!(
                "data.eval_fraction {fraction} of {} holds out none: there is no held-out loss, and gen-eval \
                 will have no row that was not trained on; raise it, or give rows `split: eval`",
                cli::counted(read, "row")
            ));
        }
        if let Some(before) = before {
            rows.seen.add_trained(before);
            if before.has_gap() {
                app.warn(format_args!(
                    "what --init-adapter was trained on is not known in full, by {} beside it: held-out rows may be \
                     among that, and gen-eval will say of this adapter too that it is not known",
                    qwen3::ROWS
                ));
            }
        }
        if rows.trained_before > 0 {
            app.warn(format_args!(
                "{} of {} were trained on by --init-adapter: the held-out loss is too good, and whatever goes by it",
                rows.trained_before,
                cli::counted(rows.eval.len(), "held-out row")
            ));
        }
        Ok(rows)
    }

    /// What may not be meant so. `kept`: whether rows that are left out go to a file.
    fn doubts(&self, kept: bool) -> Vec<String> {
        let mut doubts = Vec::new();
        let rows = |count| cli::counted(count, "row");
        // A text that spells out `<|im_end|>` ends its own turn; the rest of it is
        // read as markup, or taught as such.
        if let (count, Some((position, token))) = &self.special {
            doubts.push(format!(
                "a special token, which the model reads as such, is spelled out in {}; the first is {position}, {token}",
                rows(*count)
            ));
        }
        if let (count, Some(position)) = &self.empty {
            doubts.push(format!(
                "an empty reply, from which the model learns to say nothing, is in {}; the first is {position}",
                rows(*count)
            ));
        }
        let unworded = self.kinds.prompts + self.kinds.conversations;
        let template = &self.settings.data.prompt_template;
        if unworded > 0 && *template != TrainSettings::default().data.prompt_template {
            doubts.push(format!(
                "data.prompt_template words tweets only: {} with `messages` or `prompt` left as they stand",
                rows(unworded)
            ));
        }
        let conversations = self.kinds.conversations;
        if conversations > 0 && !self.settings.data.system_prompt.is_empty() {
            doubts.push(format!(
                "data.system_prompt is put before tweets and prompts only, and not before {} with `messages`",
                rows(conversations)
            ));
        }
        let unsaid = self.rows.iter().filter(|(_, _, own, _)| own.is_none());
        let unsaid = unsaid.count();
        if self.any_split && unsaid > 0 {
            doubts.push(format!(
                "{} without `split`, where others have it, trained on",
                rows(unsaid)
            ));
        }
        if self.cut > 0 {
            doubts.push(format!("{} cut to training.max_seq_length", rows(self.cut)));
        }
        if self.left_out > 0 {
            let hint = match kept {
                true => "",
                false => "; --rejects FILE keeps them",
            };
            doubts.push(format!(
                "{} longer than training.max_seq_length left out{hint}",
                rows(self.left_out)
            ));
        }
        doubts
    }

    /// The rows, each on its side.
    fn parted(self, before: Option<&Seen>) -> Result<Rows> {
        let mut rows = Rows {
            train: Vec::new(),
            eval: Vec::new(),
            kinds: self.kinds,
            left_out: self.left_out,
            cut: self.cut,
            sha256: String::new(),
            seen: Seen::default(),
            trained_before: 0,
        };
        let was_trained_on =
            |name: &str| before.is_some_and(|before| before.side(name) == Some(Split::Train));
        let mut fingerprint = Vec::new();
        for (mut row, name, own, drawn) in self.rows {
            let side = side(own, drawn, self.any_split);
            rows.seen.add(&name, side);
            let set = match side {
                Split::Train => &mut rows.train,
                Split::Eval => {
                    rows.trained_before += usize::from(was_trained_on(&name));
                    &mut rows.eval
                }
            };
            row.number = u32::try_from(set.len()).context("more than 4 billion rows")?;
            fingerprint.push(side as u8);
            for (id, labelled) in row.ids.iter().zip(&row.labelled) {
                fingerprint.extend_from_slice(&(id << 1 | u32::from(*labelled)).to_le_bytes());
            }
            fingerprint.extend_from_slice(&u32::MAX.to_le_bytes());
            set.push(row);
        }
        rows.sha256 = cli::sha256_hex(&fingerprint);
        Ok(rows)
    }
}

/// How a row fits into `training.max_seq_length`.
enum Fit {
    Whole(Row),
    Cut(Row),
    /// With its number of tokens.
    TooLong(usize),
}

fn encode(source: &Source, settings: &TrainSettings, chat: &Chat) -> Result<Fit> {
    let position = &source.position;
    let refuse =
        |cause: String| anyhow::Error::from(Failure::Input(format!("{position}: {cause}")));
    let loss_on = match settings.data.loss_on {
        LossOn::Reply => qwen3::LossOn::Reply,
        LossOn::All => qwen3::LossOn::All,
    };
    let mut encoded = chat
        .encode_training(&source.messages, &source.tools, loss_on)
        .map_err(|error| refuse(format!("{:#}", anyhow::Error::from(error))))?;
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
    let row = Row {
        number: 0,
        ids: encoded.ids,
        labelled: encoded.labelled,
    };
    if row.targets() == 0 {
        let cause = if too_long {
            "what is left of the row after cutting"
        } else {
            "the row"
        };
        return Err(refuse(format!(
            "no token to learn from: {cause} has no reply"
        )));
    }
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
