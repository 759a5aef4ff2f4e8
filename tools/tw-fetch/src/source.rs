//! Files of tweets, whatever holds them: a JSON array, JSON lines, or CSV.
//!
//! What a file is, is told from its first byte; whose it is, from its first record.
//! Every record keeps its place, because an error that does not name it cannot be
//! acted on: a line for JSON lines and CSV, an element for an array.

use std::io::{BufRead, Read};
use std::path::Path;
use std::rc::Rc;

use cli::Failure;
use jsonl::Lines;
use record::{BadLine, Record};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

use crate::quotes::Quotes;
use crate::tweet::{Dialect, Tweet};

/// One record of a file.
#[derive(Debug)]
pub struct Row {
    /// `file:line`, or `file: element N` in an array.
    pub place: String,
    /// What it holds.
    pub item: Item,
    /// The record itself, its fields as they came.
    pub record: Record,
}

/// What a record is.
#[derive(Debug)]
pub enum Item {
    /// A tweet, which may be a reply.
    Tweet(Box<Tweet>),
    /// A pair already.
    Pair,
    /// Neither.
    Nothing,
}

/// A record before it is understood.
struct Raw {
    file: String,
    number: u64,
    element: bool,
    /// The JSON object's text, or what is wrong with it and its bytes.
    text: Result<String, Wrong>,
    /// The object that a flattened CSV row stands for.
    folded: Option<Value>,
}

/// A cause, and the bytes it is about.
type Wrong = (String, Vec<u8>);

impl Raw {
    fn place(&self) -> String {
        match self.element {
            true => format!("{}: element {}", self.file, self.number),
            false => format!("{}:{}", self.file, self.number),
        }
    }
}

/// Reads all of `path` (`-` is standard input), calling `take` for every record in
/// order. Malformed records within `allowance` go to `bad` instead.
///
/// # Errors
/// What cannot be opened (exit 2), what is malformed (exit 3), and errors of `take`.
pub fn read(
    path: &Path,
    dialect: Option<Dialect>,
    allowance: &mut u64,
    mut bad: impl FnMut(&BadLine) -> anyhow::Result<()>,
    mut take: impl FnMut(Row, Dialect) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut dialect = dialect;
    // Scrapers may begin with a record that says nothing; keep it until one does.
    let mut unknown: Vec<Row> = Vec::new();
    for raw in open(path)? {
        let raw = raw?;
        let row = match understand(&raw, &mut dialect) {
            Ok(row) => row,
            Err((cause, bytes)) => {
                if *allowance == 0 {
                    return Err(Failure::Input(format!("{}: {cause}", raw.place())).into());
                }
                *allowance -= 1;
                bad(&BadLine::new(
                    "tw-fetch", raw.file, raw.number, cause, bytes,
                ))?;
                continue;
            }
        };
        match dialect {
            None => unknown.push(row),
            Some(dialect) => {
                for earlier in unknown.drain(..) {
                    take(earlier, dialect)?;
                }
                take(row, dialect)?;
            }
        }
    }
    let Some(first) = unknown.first() else {
        return Ok(());
    };
    let keys: Vec<_> = first.record.keys().take(8).collect();
    Err(Failure::Input(format!(
        "{}: no record here is an Apify tweet, a twscrape tweet or a pair (the first has the keys {}); \
         name the kind with --format if it is one",
        first.place,
        keys.join(", ")
    ))
    .into())
}

/// The record in `raw`, and its dialect where none was known.
fn understand(raw: &Raw, dialect: &mut Option<Dialect>) -> Result<Row, Wrong> {
    let text = raw.text.clone()?;
    let wrong = |e: record::Error| (e.to_string(), text.clone().into_bytes());
    let record = Record::parse(&text).map_err(wrong)?;
    let item = match &raw.folded {
        Some(folded) => folded.clone(),
        None => {
            serde_json::from_str(&text).map_err(|e| (e.to_string(), text.clone().into_bytes()))?
        }
    };
    *dialect = dialect.or_else(|| Dialect::sniff(&item));
    let item = match dialect {
        None => Item::Nothing,
        Some(Dialect::Pairs) => {
            record.pair().map_err(wrong)?;
            Item::Pair
        }
        Some(dialect) => match dialect.tweet(&item).map_err(wrong)? {
            Some(tweet) => Item::Tweet(Box::new(tweet)),
            None => Item::Nothing,
        },
    };
    Ok(Row {
        place: raw.place(),
        item,
        record,
    })
}

type Raws = Box<dyn Iterator<Item = anyhow::Result<Raw>>>;

fn open(path: &Path) -> anyhow::Result<Raws> {
    let file = path.display().to_string();
    let unreadable = |e: std::io::Error| Failure::Usage(format!("--input {file}: {e}"));
    let mut reader = jsonl::open(path).map_err(|e| Failure::Usage(format!("--input {e}")))?;
    let start = reader.fill_buf().map_err(unreadable)?;
    let bom = "\u{feff}".as_bytes();
    let mark = if start.starts_with(bom) { bom.len() } else { 0 };
    let start = &start[mark..];
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => Ok(Box::new(std::iter::empty())),
        Some(b'{') => Ok(Box::new(lines(file, reader))),
        Some(b'[') => array(file, reader),
        Some(_) => {
            // csv counts a row's line before the `\n` of the one above, where lines end in `\r\n`.
            let line_end = start.iter().position(|&byte| byte == b'\n');
            let late = line_end.is_some_and(|at| at > 0 && start[at - 1] == b'\r');
            reader.consume(mark);
            csv(file, reader, late.into())
        }
    }
}

fn lines(
    file: String,
    reader: Box<dyn BufRead + Send>,
) -> impl Iterator<Item = anyhow::Result<Raw>> {
    Lines::new(file, reader).map(|line| {
        let line = line?;
        let text = line.text.map_err(not_utf8);
        Ok(Raw {
            file: line.position.file,
            number: line.position.line,
            element: false,
            text,
            folded: None,
        })
    })
}

/// An array is read whole: its end may be as far away as its first error.
fn array(file: String, mut reader: Box<dyn BufRead + Send>) -> anyhow::Result<Raws> {
    let mut bytes = Vec::new();
    reader
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::World(format!("{file}: reading failed: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()]
            .iter()
            .filter(|&&b| b == b'\n')
            .count()
            + 1;
        Failure::Input(format!("{file}:{line}: not valid UTF-8"))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let elements: Vec<Box<RawValue>> = serde_json::from_str(text)
        .map_err(|e| Failure::Input(format!("{file}:{}: not a JSON array: {e}", e.line())))?;
    Ok(Box::new(elements.into_iter().enumerate().map(
        move |(i, element)| {
            let text = Ok(element.get().to_owned());
            Ok(Raw {
                file: file.clone(),
                number: i as u64 + 1,
                element: true,
                text,
                folded: None,
            })
        },
    )))
}

fn csv(file: String, reader: Box<dyn BufRead + Send>, late: u64) -> anyhow::Result<Raws> {
    let (reader, found) = Quotes::new(reader);
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(reader);
    let unclosed = {
        let (file, found) = (file.clone(), Rc::clone(&found));
        move || match found.borrow().unclosed {
            None => Ok(()),
            Some(line) => Err(Failure::Input(format!(
                "{file}:{line}: a quote opens here and never closes, so the rest of the file is one cell: close it, \
                 or export the file again"
            ))),
        }
    };
    let neither = |cause: &str| {
        Failure::Input(format!(
            "{file}:1: neither JSON nor CSV with a header ({cause}); a header has a column `id` and one of \
             `text`, `fullText`, `rawContent`, or `tweet` and `reply`"
        ))
    };
    let headers: Vec<String> = match reader.headers() {
        Ok(headers) => headers.iter().map(str::to_owned).collect(),
        Err(error) => return Err(neither(&error.to_string()).into()),
    };
    unclosed()?;
    let (_, stray) = found.borrow_mut().before(reader.position().byte());
    if let Some(stray) = stray {
        return Err(neither(&stray.to_string()).into());
    }
    let has = |name: &str| headers.iter().any(|h| h == name);
    let texts = ["text", "fullText", "rawContent"].into_iter().any(has);
    if !(texts && (has("id") || has("id_str")) || has("tweet") && has("reply")) {
        return Err(neither("its first line names no such columns").into());
    }
    // A record has one value of a name. What has none is no loss where its cells are empty.
    let again = |(i, name): &(usize, &String)| !name.is_empty() && headers[..*i].contains(name);
    if let Some((_, name)) = headers.iter().enumerate().find(again) {
        let cause = format!("{file}:1: column `{name}` stands twice: rename or remove one");
        return Err(Failure::Input(cause).into());
    }
    let failed = file.clone();
    let to_raw = move |row: csv::ByteRecord, end: u64| {
        unclosed()?;
        let number = row.position().map_or(0, csv::Position::line) + late;
        let raw = |text, folded| {
            Ok(Raw {
                file: file.clone(),
                number,
                element: false,
                text,
                folded,
            })
        };
        let (bytes, stray) = found.borrow_mut().before(end);
        let Ok(row) = csv::StringRecord::from_byte_record(row) else {
            return raw(Err(not_utf8(bytes)), None);
        };
        let wrong = stray.map(|stray| stray.to_string()).or_else(|| {
            (row.len() != headers.len()).then(|| {
                format!(
                    "{} cells under {} headers: a quote or a comma is wrong",
                    row.len(),
                    headers.len()
                )
            })
        });
        if let Some(cause) = wrong {
            return raw(Err((cause, bytes)), None);
        }
        let cells = || {
            headers
                .iter()
                .map(String::as_str)
                .zip(&row)
                .filter(|(_, cell)| !cell.is_empty())
        };
        let flat: Map<String, Value> = cells().map(|(k, v)| (k.to_owned(), cell(k, v))).collect();
        if flat.len() < cells().count() {
            let cause = "more than one cell under columns without a name".to_owned();
            return raw(Err((cause, bytes)), None);
        }
        raw(Ok(Value::Object(flat).to_string()), Some(fold(cells())))
    };
    Ok(Box::new(std::iter::from_fn(move || {
        let mut row = csv::ByteRecord::new();
        match reader.read_byte_record(&mut row) {
            Ok(false) => None,
            Ok(true) => Some(to_raw(row, reader.position().byte())),
            Err(e) => Some(Err(Failure::World(format!(
                "{failed}: reading failed: {e}"
            ))
            .into())),
        }
    })))
}

/// A cell as the record keeps it: figures of a pair are numbers, everything else is
/// text (an id must not become a number).
fn cell(header: &str, text: &str) -> Value {
    let figure = matches!(
        header,
        "v" | "tweet_likes" | "tweet_replies" | "reply_likes" | "reply_author_followers"
    );
    match text.trim().parse::<Number>() {
        Ok(number) if figure => number.into(),
        _ => text.into(),
    }
}

/// The object that flattened columns stand for: `author/followers` or
/// `author.followers` is a key in `author`.
fn fold<'a>(cells: impl Iterator<Item = (&'a str, &'a str)>) -> Value {
    fn insert(map: &mut Map<String, Value>, path: &str, text: &str) {
        match path.split_once(['/', '.']) {
            None => {
                map.entry(path).or_insert_with(|| text.into());
            }
            Some((first, rest)) => {
                let inner = map
                    .entry(first)
                    .or_insert_with(|| Value::Object(Map::new()));
                // Where both `author` and `author/name` are columns, the first one stands.
                if let Value::Object(inner) = inner {
                    insert(inner, rest, text);
                }
            }
        }
    }
    let mut root = Map::new();
    for (header, text) in cells {
        insert(&mut root, header, text);
    }
    Value::Object(root)
}

fn not_utf8(bytes: Vec<u8>) -> Wrong {
    ("not valid UTF-8".into(), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn flattened_columns_fold_back() {
        let cells = [
            ("id", "1"),
            ("author/id", "7"),
            ("author.followers", "9"),
            ("media/0", "u"),
            ("media/1", "w"),
        ];
        let folded = json!({"id": "1", "author": {"id": "7", "followers": "9"}, "media": {"0": "u", "1": "w"}});
        assert_eq!(fold(cells.into_iter()), folded);
    }
}
