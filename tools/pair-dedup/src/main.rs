//! Normalises the texts, drops pairs that say what a better one says, sorts by
//! quality and cuts off the held-out part.
//!
//! All of it is a function of the set of rows, not of their order, and doing it
//! again changes nothing: rows are taken best first and dropped when near a row
//! that was *kept*, so no two kept rows are near, and the cut looks at kept rows
//! alone.
//!
//! The cut goes between groups of rows from which one could learn another's answer, and
//! each row tells its group: rows of one group are no independent evidence either, which
//! who tests the figures must know. Two things are left to cross the cut. The same people
//! may write on both sides, for records do not say who wrote them; and replies that are
//! near but not equal, since through what everybody says (`Thank you so much!`) most rows
//! would end up in one group.

mod near;
mod split;
mod union;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::Context;
use clap::Parser;
use cli::{App, Common, Counts, Failure, Flags, PrintConfig, Resolved, Signature, Tool};
use embed::{DEFAULT_DIR, DIM, Embedder};
use jsonl::{Lines, Output, Rejects, write_atomically};
use record::{Dropped, Duplicate, Pair, Record, Split, Summary, Validation, quality};
use settings::DataSettings;
use text::{fold, normalize};

use crate::near::{Near, Vectors, drop_near, join_near};
use crate::split::{Group, split};
use crate::union::Union;

/// Deduplicate tweet→reply pairs, and cut off the held-out part
///
/// Reads pairs on standard input; adds `tweet_normalized`, `reply_normalized`, `split`
/// and `split_group`; of pairs whose texts are the same once normalised, or whose tweets
/// and whose replies are both near by sentence vectors, keeps the one of best quality.
/// Pairs of one thread, of near tweets, of equal replies, or where one's reply is the
/// other's tweet are one `split_group` and on one side of the cut. Writes what is left,
/// best first. Needs the sentence model (`make models`).
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES))]
struct PairDedup {
    /// Where dropped pairs go, each with its keeper and cosines, and malformed lines
    #[arg(long, value_name = "FILE")]
    dropped: Option<PathBuf>,
    /// Where the counts and the settings go, as one JSON object
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Folder of the sentence model [default: data/cache/models/all-MiniLM-L6-v2]
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Cosine above which texts are near [default: 0.9]
    #[arg(long, value_name = "COSINE")]
    threshold: Option<f64>,
    /// Part of the pairs that is held out [default: 0.1]
    #[arg(long, value_name = "FRACTION")]
    eval_fraction: Option<f64>,
    /// Decides which pairs are held out [default: 42]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "
$ pair-dedup --dropped dropped.jsonl < valid.jsonl > pairs.jsonl
$ pair-dedup --threshold 0.85 --quiet < valid.jsonl > unique.jsonl
$ pair-dedup --seed 7 --eval-fraction 0.2 < valid.jsonl | wc -l
";

const NAME: &str = "pair-dedup";

/// A pair on its way through.
struct Row {
    record: Record,
    pair: Pair,
    tweet: String,
    reply: String,
    quality: f64,
}

impl Row {
    fn of(record: Record) -> Result<Self, record::Error> {
        let pair = record.pair()?;
        let quality = match record.get::<Validation>("validation")? {
            Some(validation) => validation.quality,
            None => quality(pair.reply_likes, pair.reply_author_followers, 0.0),
        };
        Ok(Self {
            tweet: normalize(&pair.tweet),
            reply: normalize(&pair.reply),
            record,
            pair,
            quality,
        })
    }

    /// Best first; the rest of the key makes the order one of the set of rows.
    fn compare(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.quality
            .total_cmp(&a.quality)
            .then_with(|| a.pair.id.cmp(&b.pair.id))
            .then_with(|| (&a.tweet, &a.reply).cmp(&(&b.tweet, &b.reply)))
            .then_with(|| a.record.to_string().cmp(&b.record.to_string()))
    }
}

fn main() -> ExitCode {
    cli::main::<PairDedup>()
}

impl Tool for PairDedup {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> anyhow::Result<()> {
        let flags = Flags::new()
            .set("deduplication.model", &self.model)
            .set("deduplication.similarity_threshold", &self.threshold)
            .set("deduplication.eval_fraction", &self.eval_fraction)
            .set("deduplication.seed", &self.seed);
        let Some(resolved) = app.settings::<DataSettings>(&["deduplication"], flags)? else {
            return Ok(());
        };
        let settings = &resolved.settings.deduplication;
        check(&resolved)?;

        let mut dropped = app.rejects("--dropped", self.dropped.as_deref())?;
        if let Some(path) = &self.summary {
            app.claim("--summary", path, |first| {
                first
                    .get("tool")
                    .is_ok_and(|tool: Option<String>| tool.as_deref() == Some(NAME))
            })?;
        }
        let (mut rows, bad) = self.read(app, &mut dropped)?;
        let read = rows.len();
        rows.sort_by(Row::compare);

        let mut gone: Vec<(Row, Dropped)> = Vec::new();
        let rows = drop_exact(rows, &mut gone);
        let by_id = |(_, why): &&(Row, Dropped)| why.reason == Duplicate::Id;
        let repeated = gone.iter().filter(by_id).count();
        let exact = gone.len() - repeated;
        let threshold = settings.similarity_threshold;
        let (texts, mut numbers) = number_texts(&rows);
        // One row has nothing to be near to: no model is needed.
        let vectors = if rows.len() < 2 {
            Vectors(vec![0.0; texts.len() * DIM])
        } else {
            embed(&texts, &resolved, app)?
        };
        let rows = drop_semantic(rows, &mut numbers, &vectors, threshold, &mut gone, app);
        let groups = groups(&rows, &numbers, &vectors, threshold);
        let sides = split(&groups, rows.len(), settings.eval_fraction, settings.seed);

        let mut names = vec![""; rows.len()];
        for group in &groups {
            group.rows.iter().for_each(|&row| names[row] = &group.name);
        }

        let mut out = Output::stdout();
        for (mut row, (side, name)) in rows.into_iter().zip(sides.iter().zip(names)) {
            add_texts(&mut row)?;
            // A record may have been here before, under other settings.
            row.record.remove("dropped");
            row.record.set("split", side)?;
            row.record.set("split_group", name)?;
            out.record(&row.record)?;
        }
        out.finish()?;
        gone.sort_by(|(a, _), (b, _)| Row::compare(a, b));
        let mut reasons = BTreeMap::new();
        for (_, why) in &gone {
            *reasons.entry(why.reason.name().to_owned()).or_default() += 1;
        }
        if dropped.are_kept() {
            for (mut row, why) in gone.drain(..) {
                add_texts(&mut row)?;
                row.record.remove("split");
                row.record.remove("split_group");
                row.record.set("dropped", &why)?;
                dropped.record(&row.record)?;
            }
            dropped.commit()?;
        } else if read > sides.len() {
            app.info(
                "the dropped pairs are kept nowhere; --dropped FILE keeps them with their keepers",
            );
        }

        let written = sides.len();
        let held_out = sides.iter().filter(|&&side| side == Split::Eval).count();
        if repeated > 0 {
            app.warn(format_args!(
                "dropped {} of an id that a better one has, with different text: ids may be wrong; \
                 --dropped FILE has them with the reason `id`",
                cli::counted(repeated, "row"),
            ));
        }
        app.info(format_args!(
            "dropped {exact} exact and {} semantic duplicates, {repeated} of a repeated id with different text; \
             {} to train on, {held_out} held out",
            read - exact - repeated - written,
            written - held_out,
        ));
        let [read, written] = [read, written].map(|n| n as u64);
        if let Some(path) = &self.summary {
            // Where the sentence model lies decides nothing.
            let shown = resolved.show(PrintConfig::Key);
            let lines = shown
                .lines()
                .filter(|l| !l.starts_with("deduplication.model "));
            let settings: Vec<String> = lines.map(String::from).collect();
            let hash = cli::sha256_hex(settings.join("\n").as_bytes());
            let summary = Summary {
                v: record::VERSION,
                tool: NAME.into(),
                read: read + bad,
                written,
                rejected: read - written,
                bad_lines: bad,
                reasons,
                settings,
                signature: Signature::new(NAME).with_hash("config", &hash).to_string(),
            };
            write_atomically(path, (serde_json::to_string(&summary)? + "\n").as_bytes())?;
        }
        app.count(Counts {
            read: read + bad,
            written,
            rejected: read - written + bad,
        });
        Ok(())
    }
}

/// Settings that parse and cannot work.
fn check(resolved: &Resolved<DataSettings>) -> Result<(), Failure> {
    let settings = &resolved.settings.deduplication;
    let wrong =
        |key: &str, cause: String| Err(resolved.wrong(&format!("deduplication.{key}"), cause));
    let (threshold, fraction) = (settings.similarity_threshold, settings.eval_fraction);
    if !(threshold > 0.0 && threshold <= 1.0) {
        let cause = format!(
            "is {}; it must be above 0, at most 1",
            cli::shown(threshold)
        );
        return wrong("similarity_threshold", cause);
    }
    if !(0.0..=1.0).contains(&fraction) {
        let cause = format!("is {}; it must be in 0 to 1", cli::shown(fraction));
        return wrong("eval_fraction", cause);
    }
    if !Path::new(&settings.model).exists() {
        let cause = "there is no such folder; `make models` fetches the sentence model";
        return wrong("model", format!("(--model) {}: {cause}", settings.model));
    }
    // Another model is known by its configuration, before anything is read.
    let (name, sha256) = embed::FILES[0];
    let config = Path::new(&settings.model).join(name);
    let is_file = config.metadata().is_ok_and(|found| found.is_file());
    if is_file && cli::sha256_file(&config).is_ok_and(|found| found != sha256) {
        not_the_model(resolved, &config)?;
    }
    Ok(())
}

/// Refuses a folder whose `file` is not the sentence model's. In our own folder it is damaged,
/// and loading says so; anywhere else it is somebody's, and no good advice would be to remove it.
fn not_the_model(resolved: &Resolved<DataSettings>, file: &Path) -> Result<(), Failure> {
    let model = &resolved.settings.deduplication.model;
    let whole = |path: &str| Path::new(path).canonicalize().ok();
    if whole(model) == whole(DEFAULT_DIR) {
        return Ok(());
    }
    let cause = format!(
        "(--model) {model}: is not the sentence model, sentence-transformers/all-MiniLM-L6-v2: {} is another; \
         leave --model away, and `make models` fetches it into {DEFAULT_DIR}",
        file.display()
    );
    Err(resolved.wrong("deduplication.model", cause))
}

impl PairDedup {
    /// All rows, and the number of malformed lines.
    fn read(&self, app: &App, dropped: &mut Rejects) -> anyhow::Result<(Vec<Row>, u64)> {
        let mut records = app.records(Lines::open(Path::new("-"))?);
        let mut rows = Vec::new();
        while let Some((_, row)) = records.next_with(dropped, Row::of)? {
            rows.push(row);
        }
        Ok((rows, records.bad()))
    }
}

/// Keeps the first of rows with the same texts, case aside, and of rows with the
/// same id, which are two readings of one pair.
fn drop_exact(rows: Vec<Row>, gone: &mut Vec<(Row, Dropped)>) -> Vec<Row> {
    let mut by_text: HashMap<(String, String), String> = HashMap::new();
    let mut ids = HashSet::new();
    let mut kept = Vec::with_capacity(rows.len());
    for row in rows {
        let key = (fold(&row.tweet), fold(&row.reply));
        let (reason, keeper) = if let Some(keeper) = by_text.get(&key) {
            (Duplicate::Exact, keeper.clone())
        } else if ids.contains(&row.pair.id) {
            (Duplicate::Id, row.pair.id.clone())
        } else {
            by_text.insert(key, row.pair.id.clone());
            ids.insert(row.pair.id.clone());
            kept.push(row);
            continue;
        };
        gone.push((
            row,
            Dropped {
                by: NAME.into(),
                reason,
                keeper,
                tweet_cosine: None,
                reply_cosine: None,
            },
        ));
    }
    kept
}

/// The distinct texts of some rows, and of each row the numbers of its tweet and
/// its reply among them.
fn number_texts(rows: &[Row]) -> (Vec<&str>, Vec<(usize, usize)>) {
    let mut texts = Vec::new();
    let mut numbers = HashMap::new();
    let mut number = |text| {
        *numbers.entry(text).or_insert_with(|| {
            texts.push(text);
            texts.len() - 1
        })
    };
    let of_rows = rows
        .iter()
        .map(|row| (number(row.tweet.as_str()), number(row.reply.as_str())))
        .collect();
    (texts, of_rows)
}

/// Sentence vectors of the texts.
fn embed(texts: &[&str], resolved: &Resolved<DataSettings>, app: &App) -> anyhow::Result<Vectors> {
    let loaded = Embedder::load(Path::new(&resolved.settings.deduplication.model));
    if let Err(embed::Error::Hash { path, .. }) = &loaded {
        not_the_model(resolved, path)?;
    }
    let embedder = loaded.context("deduplication.model (--model)")?;
    let progress = Mutex::new(app.progress("sentence vectors", Some(texts.len() as u64)));
    let vectors = embedder.embed(texts, |done| {
        // A poisoned lock is a progress bar that broke, no reason to stop.
        progress
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .set(done as u64);
    })?;
    Ok(Vectors(vectors))
}

/// Keeps the rows that are near none that is kept; `numbers` follows suit.
fn drop_semantic(
    rows: Vec<Row>,
    numbers: &mut Vec<(usize, usize)>,
    vectors: &Vectors,
    threshold: f64,
    gone: &mut Vec<(Row, Dropped)>,
    app: &App,
) -> Vec<Row> {
    let progress = app.progress("comparing", Some(rows.len() as u64));
    let found = drop_near(vectors, numbers, threshold, |done| {
        progress.set(done as u64)
    });
    let ids: Vec<String> = rows.iter().map(|row| row.pair.id.clone()).collect();
    let keepers: HashMap<&str, &str> = ids
        .iter()
        .zip(&found)
        .filter_map(|(id, near)| Some((id.as_str(), ids[near.as_ref()?.keeper].as_str())))
        .collect();
    // Who kept an exact duplicate may have gone itself.
    for (_, dropped) in gone.iter_mut() {
        if let Some(keeper) = keepers.get(dropped.keeper.as_str()) {
            dropped.keeper = (*keeper).to_owned();
        }
    }

    let mut kept = Vec::new();
    let mut kept_numbers = Vec::new();
    for ((row, near), &number) in rows.into_iter().zip(found).zip(&*numbers) {
        match near {
            None => {
                kept.push(row);
                kept_numbers.push(number);
            }
            Some(Near {
                keeper,
                tweet,
                reply,
            }) => gone.push((
                row,
                Dropped {
                    by: NAME.into(),
                    reason: Duplicate::Semantic,
                    keeper: ids[keeper].clone(),
                    tweet_cosine: Some(rounded(tweet)),
                    reply_cosine: Some(rounded(reply)),
                },
            )),
        }
    }
    *numbers = kept_numbers;
    kept
}

/// The rows in groups that must stay on one side of the cut: the same thread, the
/// same tweet, tweets that are near, the same reply, and a tweet that is another row's
/// reply.
fn groups(
    rows: &[Row],
    numbers: &[(usize, usize)],
    vectors: &Vectors,
    threshold: f64,
) -> Vec<Group> {
    let mut union = Union::new(rows.len());
    let mut first_with = HashMap::new();
    for (i, row) in rows.iter().enumerate() {
        let ids = [
            ("conversation", Some(&row.pair.conversation_id)),
            ("tweet", row.pair.tweet_id.as_ref()),
        ];
        for (kind, id) in ids {
            if let Some(id) = id {
                union.join(i, *first_with.entry((kind, id)).or_insert(i));
            }
        }
    }
    // A text that two rows have, whether as tweet or as reply.
    let mut first_saying = HashMap::new();
    for (i, &(tweet, reply)) in numbers.iter().enumerate() {
        for text in [tweet, reply] {
            union.join(i, *first_saying.entry(text).or_insert(i));
        }
    }
    let by_tweet: BTreeMap<usize, usize> = (numbers.iter().zip(0..))
        .map(|(&(tweet, _), i)| (tweet, i))
        .collect();
    let (tweets, elements): (Vec<usize>, Vec<usize>) = by_tweet.into_iter().unzip();
    join_near(vectors, &tweets, &elements, threshold, &mut union);

    let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
    for (i, row) in rows.iter().enumerate() {
        let name = &row.pair.conversation_id;
        let group = groups.entry(union.root(i)).or_insert_with(|| Group {
            name: name.clone(),
            rows: Vec::new(),
        });
        if *name < group.name {
            group.name.clone_from(name);
        }
        group.rows.push(i);
    }
    groups.into_values().collect()
}

fn add_texts(row: &mut Row) -> Result<(), record::Error> {
    row.pair.identify(&mut row.record)?;
    row.record.set("tweet_normalized", &row.tweet)?;
    row.record.set("reply_normalized", &row.reply)
}

/// Six digits: past them a cosine says nothing.
fn rounded(cosine: f64) -> f64 {
    (cosine * 1e6).round() / 1e6
}
