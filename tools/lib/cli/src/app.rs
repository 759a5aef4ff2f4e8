//! A running tool: its name, its messages, its log, its counts.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Context;
use indicatif::MultiProgress;
use record::Record;
use serde_json::Value;
use signal_hook::flag;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::{self, Flags, Resolved};
use crate::messages::{Log, Messages};
use crate::progress::Progress;
use crate::signals::{self, Kept};
use crate::{Common, Failure};

/// How many records came in, went out and were refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records read.
    pub read: u64,
    /// Records written.
    pub written: u64,
    /// Records refused, bad lines included.
    pub rejected: u64,
}

/// A running tool.
pub struct App {
    messages: Arc<Messages>,
    common: Common,
    counts: Mutex<Option<Counts>>,
    interrupted: OnceLock<Arc<AtomicBool>>,
    /// What there is if a second signal ends the process.
    kept: Kept,
    save: OnceLock<Arc<AtomicBool>>,
    /// Flags and the files that they read or write.
    claimed: Mutex<Vec<(String, PathBuf)>>,
}

impl App {
    pub(crate) fn new(name: String, common: Common) -> anyhow::Result<Self> {
        let log = match &common.log {
            None => None,
            Some(path) => Some(Log {
                file: open_log(path).map_err(|cause| {
                    Failure::Usage(format!("--log {}: {cause}", path.display()))
                })?,
                path: path.clone(),
                has_gaps: false,
            }),
        };
        if let Some(threads) = common.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads.into())
                .build_global()
                .context("starting the threads")?;
        }
        Ok(Self {
            messages: Arc::new(Messages::new(name, log)),
            common,
            counts: Mutex::new(None),
            interrupted: OnceLock::new(),
            kept: Kept::default(),
            save: OnceLock::new(),
            claimed: Mutex::default(),
        })
    }

    /// The tool's name.
    pub fn name(&self) -> &str {
        self.messages.name()
    }

    /// The arguments that all tools share.
    pub fn common(&self) -> &Common {
        &self.common
    }

    /// The settings `T` from flags, environment, YAML and defaults. `sections`
    /// are the dotted prefixes that this tool uses; `--print-config` shows
    /// those. `None` means that they were printed and the tool is done.
    pub fn settings<T>(
        &self,
        sections: &[&str],
        flags: Flags,
    ) -> anyhow::Result<Option<Resolved<T>>>
    where
        T: Default + serde::Serialize + serde::de::DeserializeOwned,
    {
        for (name, meant) in config::lookalikes(sections) {
            self.warn(format_args!(
                "environment variable {name} is no setting: {meant} would be"
            ));
        }
        let resolved = config::resolve::<T>(
            self.common.config.as_deref(),
            sections,
            flags,
            config::environment()?,
        )?;
        let Some(form) = self.common.print_config else {
            return Ok(Some(resolved));
        };
        let mut out = jsonl::Output::stdout();
        out.line(|out| out.write_all(resolved.show(form).as_bytes()))?;
        out.finish()?;
        Ok(None)
    }

    /// The file for refused records and malformed lines, which `flag` names.
    /// Malformed lines may only be passed over where they are kept.
    pub fn rejects(&self, flag: &str, path: Option<&Path>) -> anyhow::Result<jsonl::Rejects> {
        if self.common.max_bad_lines > 0 && path.is_none() {
            let cause = format!("--max-bad-lines needs {flag} FILE to keep the lines in");
            return Err(Failure::Usage(cause).into());
        }
        if let Some(path) = path {
            let by_us = |first: &Record, key: &str| {
                let why = first.get::<Value>(key).ok().flatten();
                why.is_some_and(|why| why["by"] == self.name())
            };
            self.claim(flag, path, |first| {
                let keys = ["bad_line", "rejected", "dropped"];
                keys.iter().any(|key| by_us(first, key))
            })?;
        }
        Ok(jsonl::Rejects::create(path)?)
    }

    /// The records of `lines`, of which as many may be malformed as the user allows.
    pub fn records(&self, lines: jsonl::Lines) -> jsonl::Records {
        jsonl::Records::new(lines, self.name(), self.common.max_bad_lines)
    }

    /// Notes a file that is read, so that no flag after this writes it, and refuses
    /// one that is the log or standard output's. To be called before the first message.
    pub fn reads(&self, flag: &str, path: &Path) -> anyhow::Result<()> {
        jsonl::apart_from_output(path)
            .map_err(|cause| Failure::Usage(format!("{flag} {}: {cause}", path.display())))?;
        if path == Path::new("-") {
            return Ok(());
        }
        if let Some(log) = self.common.log.as_deref().filter(|log| is_same(log, path)) {
            // Not even this message may go there.
            self.messages.leave_log();
            let cause = format!("--log {}: is the file of {flag} too", log.display());
            return Err(Failure::Usage(cause).into());
        }
        let mut claimed = self.claimed.lock().unwrap_or_else(|e| e.into_inner());
        claimed.push((flag.to_owned(), path.to_owned()));
        Ok(())
    }

    /// Refuses a path to write to that is a folder or in none, standard input's or output's
    /// own file, or another flag's: it would be overwritten while it is used. Also a file
    /// that holds something else than this flag of this tool writes: `is_own` says whether
    /// the record that a file begins with is that.
    pub fn claim(
        &self,
        flag: &str,
        path: &Path,
        is_own: impl FnOnce(&Record) -> bool,
    ) -> anyhow::Result<()> {
        let refuse = |cause: String| {
            let cause = format!("{flag} {}: {cause}", path.display());
            Err(Failure::Usage(cause).into())
        };
        if let Err(cause) = folder_is_there(path) {
            return refuse(cause);
        }
        if let Ok(found) = path.metadata() {
            if found.is_dir() {
                return refuse("is a folder".into());
            }
            for (stream, name) in [("/dev/stdin", "input"), ("/dev/stdout", "output")] {
                let same = |open: Metadata| (open.dev(), open.ino()) == (found.dev(), found.ino());
                if found.is_file() && std::fs::metadata(stream).is_ok_and(same) {
                    return refuse(format!("is the file that is standard {name}"));
                }
            }
        }
        if self
            .common
            .log
            .as_deref()
            .is_some_and(|log| is_same(log, path))
        {
            return refuse("is the file of --log too".into());
        }
        let mut claimed = self.claimed.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((other, _)) = claimed.iter().find(|(_, other)| is_same(other, path)) {
            return refuse(format!("is the file of {other} too"));
        }
        match holds_something_else(path, is_own) {
            Ok(false) => {}
            Ok(true) => return refuse(SOMETHING_ELSE.into()),
            Err(error) => return refuse(error.to_string()),
        }
        claimed.push((flag.to_owned(), path.to_owned()));
        Ok(())
    }

    /// A message for the user.
    pub fn info(&self, message: impl fmt::Display) {
        self.messages.say(format_args!("{message}"));
    }

    /// A message that can be looked up: to the log at any rate, to the user unless
    /// there is to be quiet.
    pub fn detail(&self, message: impl fmt::Display) {
        match self.common.quiet {
            false => self.info(message),
            true => self.messages.note(format_args!("{message}")),
        }
    }

    /// Something that may be wrong, and goes on.
    pub fn warn(&self, message: impl fmt::Display) {
        self.info(format_args!("warning: {message}"));
    }

    /// Sets the counts that the last line shows.
    pub fn count(&self, counts: Counts) {
        *self.counts.lock().unwrap_or_else(|e| e.into_inner()) = Some(counts);
    }

    pub(crate) fn print_summary(&self) {
        if let Some(c) = *self.counts.lock().unwrap_or_else(|e| e.into_inner()) {
            self.info(format_args!(
                "in {}, out {}, rejected {}",
                c.read, c.written, c.rejected
            ));
        }
    }

    /// Shows how far something long has come: a bar on a terminal, else a line
    /// every few seconds.
    pub fn progress(&self, what: &str, total: Option<u64>) -> Progress<'_> {
        Progress::new(self, what, total)
    }

    pub(crate) fn bars(&self) -> Option<&MultiProgress> {
        (!self.common.quiet && std::io::stderr().is_terminal()).then(|| self.messages.bars())
    }

    pub(crate) fn quiet(&self) -> bool {
        self.common.quiet
    }

    /// Whether SIGINT, SIGTERM or SIGHUP came. From the first call on they no longer end
    /// the process, unless one comes again, see [`signals::heed`].
    pub fn interrupted(&self) -> anyhow::Result<bool> {
        if let Some(flag) = self.interrupted.get() {
            return Ok(flag.load(Ordering::Relaxed));
        }
        let flag =
            signals::heed(&self.messages, &self.kept).context("installing the signal handler")?;
        let flag = self.interrupted.get_or_init(|| flag);
        Ok(flag.load(Ordering::Relaxed))
    }

    /// What is kept if a second signal ends the process now, in words for its last message.
    pub fn keeps(&self, what: impl fmt::Display) {
        *self.kept.lock().unwrap_or_else(|e| e.into_inner()) = format!("; {what}");
    }

    /// Whether SIGUSR1 came since the last call. From the first call on, that
    /// signal no longer ends the process.
    pub fn asked_to_save(&self) -> anyhow::Result<bool> {
        if let Some(flag) = self.save.get() {
            return Ok(flag.swap(false, Ordering::Relaxed));
        }
        let flag = Arc::new(AtomicBool::new(false));
        flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&flag))
            .context("installing the signal handler")?;
        let flag = self.save.get_or_init(|| flag);
        Ok(flag.swap(false, Ordering::Relaxed))
    }
}

/// From here on a write past the limit on a file's size (`ulimit -f`) fails like one to a
/// full disk, and is told. By default SIGXFSZ ends the process without a word.
pub(crate) fn outlive_full_files() {
    // Where a handler cannot be installed, the default is left.
    let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

/// What a file to write to must not be.
const SOMETHING_ELSE: &str = "is there and holds something else; name another file";

/// Whether a file is there that does not begin with an object of one's own. One that is
/// empty holds nothing, and what is no file is written to as it is.
fn holds_something_else(path: &Path, is_own: impl FnOnce(&Record) -> bool) -> io::Result<bool> {
    if !path.metadata().is_ok_and(|m| m.is_file() && m.len() > 0) {
        return Ok(false);
    }
    let file = BufReader::new(File::open(path)?);
    let mut values = serde_json::Deserializer::from_reader(file).into_iter();
    let first = values.next().and_then(Result::ok);
    Ok(!first.is_some_and(|first| is_own(&first)))
}

/// Opens a log to go on with. A file that does not begin as one does is somebody's.
fn open_log(path: &Path) -> Result<File, String> {
    folder_is_there(path)?;
    let error = |e: io::Error| e.to_string();
    if path.metadata().is_ok_and(|m| m.is_file() && m.len() > 0) {
        let mut begin = String::new();
        let file = File::open(path).map_err(error)?;
        // A line that is no text is none of a log either.
        let _ = BufReader::new(file).take(64).read_line(&mut begin);
        let stamp = begin.split(' ').next().unwrap_or_default();
        if OffsetDateTime::parse(stamp, &Rfc3339).is_err() {
            return Err(SOMETHING_ELSE.into());
        }
    }
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(error)
}

/// Refuses a path to a file in a folder that is not there: it is misspelt more often than
/// it is to be made.
fn folder_is_there(path: &Path) -> Result<(), String> {
    match path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        Some(folder) if !folder.is_dir() => Err(format!("there is no folder {}", folder.display())),
        _ => Ok(()),
    }
}

/// Whether both are names of one file, there or not.
fn is_same(a: &Path, b: &Path) -> bool {
    let inode = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
    match (inode(a), inode(b)) {
        (Some(a), Some(b)) => a == b,
        _ => std::path::absolute(a).ok() == std::path::absolute(b).ok(),
    }
}

/// `:N` for the first line of a file that is this text's first, or has it as its value.
fn line_of(path: &Path, text: &str) -> String {
    let first = text.lines().next().unwrap_or_default().trim();
    let whole = std::fs::read_to_string(path).unwrap_or_default();
    let is_value = |line: &str| line.split_once('=').is_some_and(|(_, v)| v.trim() == first);
    let found = whole
        .lines()
        .position(|line| line.trim() == first || is_value(line));
    found.map_or(String::new(), |at| format!(":{}", at + 1))
}

/// A secret's value: from the environment, else from `.env` in the current
/// folder. An empty value is none.
pub fn env_or_dotenv(name: &str) -> anyhow::Result<Option<String>> {
    if let Ok(value) = std::env::var(name) {
        return Ok(Some(value).filter(|v| !v.is_empty()));
    }
    let path = Path::new(".env");
    if !path.exists() {
        return Ok(None);
    }
    // The library's messages quote the line, which may hold the secret: its number must do.
    let bad = |error| {
        let at = match &error {
            dotenvy::Error::LineParse(text, _) => line_of(path, text),
            _ => String::new(),
        };
        let cause = format!(".env{at}: no KEY=VALUE; quote values that hold spaces");
        Failure::Usage(cause)
    };
    for item in dotenvy::from_path_iter(path).map_err(bad)? {
        let (key, value) = item.map_err(bad)?;
        if key == name {
            return Ok(Some(value).filter(|v| !v.is_empty()));
        }
    }
    Ok(None)
}
