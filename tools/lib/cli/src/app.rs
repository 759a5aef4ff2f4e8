//! A running tool: its name, its messages, its log, its counts.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Context;
use indicatif::MultiProgress;
use signal_hook::flag;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::{self, Flags, Resolved};
use crate::progress::Progress;
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
    name: String,
    common: Common,
    bars: MultiProgress,
    log: Mutex<Option<File>>,
    counts: Mutex<Option<Counts>>,
    interrupted: OnceLock<Arc<AtomicBool>>,
    save: OnceLock<Arc<AtomicBool>>,
    /// Flags and the files that they read or write.
    claimed: Mutex<Vec<(String, PathBuf)>>,
}

impl App {
    pub(crate) fn new(name: String, common: Common) -> anyhow::Result<Self> {
        let log = match &common.log {
            None => None,
            Some(path) => {
                let open = || -> std::io::Result<File> {
                    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
                        std::fs::create_dir_all(folder)?;
                    }
                    File::options().create(true).append(true).open(path)
                };
                let file =
                    open().map_err(|e| Failure::Usage(format!("--log {}: {e}", path.display())))?;
                Some(file)
            }
        };
        if let Some(threads) = common.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads.into())
                .build_global()
                .context("starting the threads")?;
        }
        Ok(Self {
            name,
            common,
            bars: MultiProgress::new(),
            log: Mutex::new(log),
            counts: Mutex::new(None),
            interrupted: OnceLock::new(),
            save: OnceLock::new(),
            claimed: Mutex::default(),
        })
    }

    /// The tool's name.
    pub fn name(&self) -> &str {
        &self.name
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
            self.claim(flag, path)?;
        }
        Ok(jsonl::Rejects::create(path)?)
    }

    /// Notes a file that is read, so that no flag after this writes it, and refuses
    /// one that is the log. To be called before the first message.
    pub fn reads(&self, flag: &str, path: &Path) -> anyhow::Result<()> {
        if path == Path::new("-") {
            return Ok(());
        }
        if let Some(log) = self.common.log.as_deref().filter(|log| is_same(log, path)) {
            // Not even this message may go there.
            *self.log.lock().unwrap_or_else(|e| e.into_inner()) = None;
            let cause = format!("--log {}: is the file of {flag} too", log.display());
            return Err(Failure::Usage(cause).into());
        }
        let mut claimed = self.claimed.lock().unwrap_or_else(|e| e.into_inner());
        claimed.push((flag.to_owned(), path.to_owned()));
        Ok(())
    }

    /// Refuses a path to write to that is a folder, standard input's or output's
    /// own file, or another flag's: it would be overwritten while it is used.
    pub fn claim(&self, flag: &str, path: &Path) -> anyhow::Result<()> {
        let refuse = |cause: String| {
            let cause = format!("{flag} {}: {cause}", path.display());
            Err(Failure::Usage(cause).into())
        };
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
        claimed.push((flag.to_owned(), path.to_owned()));
        Ok(())
    }

    /// A message for the user.
    pub fn info(&self, message: impl fmt::Display) {
        self.say(format_args!("{}: {message}", self.name));
    }

    /// A message that can be looked up: to the log at any rate, to the user unless
    /// there is to be quiet.
    pub fn detail(&self, message: impl fmt::Display) {
        match self.common.quiet {
            false => self.info(message),
            true => self.log_line(&printable(&format!("{}: {message}", self.name))),
        }
    }

    /// Something that may be wrong, and goes on.
    pub fn warn(&self, message: impl fmt::Display) {
        self.say(format_args!("{}: warning: {message}", self.name));
    }

    pub(crate) fn error(&self, message: impl fmt::Display) {
        self.say(format_args!("{}: {message}", self.name));
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
        (!self.common.quiet && std::io::stderr().is_terminal()).then_some(&self.bars)
    }

    pub(crate) fn quiet(&self) -> bool {
        self.common.quiet
    }

    /// From the first call on, SIGINT, SIGTERM and SIGHUP no longer end the process
    /// but set the flag that this returns; a second SIGINT or SIGTERM ends it at once.
    /// A second SIGHUP does not: one closed terminal may send several. One that was to
    /// be ignored from the start, as nohup has it, still is.
    pub fn interrupted(&self) -> anyhow::Result<bool> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        if let Some(flag) = self.interrupted.get() {
            return Ok(flag.load(Ordering::Relaxed));
        }
        let [interrupted, asked] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let install = || -> std::io::Result<()> {
            for signal in [SIGINT, SIGTERM] {
                // The order matters: a signal between two of these lines is heeded already,
                // and the first finds `asked` unset and passes.
                flag::register(signal, Arc::clone(&interrupted))?;
                flag::register_conditional_shutdown(signal, 130, Arc::clone(&asked))?;
                flag::register(signal, Arc::clone(&asked))?;
            }
            if !is_ignored(SIGHUP) {
                flag::register(SIGHUP, Arc::clone(&interrupted))?;
            }
            Ok(())
        };
        install().context("installing the signal handler")?;
        Ok(self
            .interrupted
            .get_or_init(|| interrupted)
            .load(Ordering::Relaxed))
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

    /// One line to stderr, past any progress bar, and to the log. That either
    /// cannot be written must not end the work.
    pub(crate) fn say(&self, line: fmt::Arguments<'_>) {
        let text = printable(&line.to_string());
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        });
        self.log_line(&text);
    }

    pub(crate) fn log_line(&self, text: &str) {
        if let Some(log) = &mut *self.log.lock().unwrap_or_else(|e| e.into_inner()) {
            let now = OffsetDateTime::now_utc()
                .replace_nanosecond(0)
                .unwrap_or_else(|_| OffsetDateTime::now_utc());
            let stamp = now.format(&Rfc3339).unwrap_or_default();
            let _ = writeln!(log, "{stamp} {text}");
        }
    }
}

/// From here on a write past the limit on a file's size (`ulimit -f`) fails like one to a
/// full disk, and is told. By default SIGXFSZ ends the process without a word.
pub(crate) fn outlive_full_files() {
    // Where a handler cannot be installed, the default is left.
    let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

/// Whether this process was started with a signal ignored; also where the system does
/// not tell, so that it keeps its way.
fn is_ignored(signal: i32) -> bool {
    let ignored = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let mask = (status.lines()).find_map(|line| line.strip_prefix("SigIgn:"))?;
        let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
        Some(mask >> (signal - 1) & 1 == 1)
    };
    ignored().unwrap_or(true)
}

/// Whether both are names of one file, there or not.
fn is_same(a: &Path, b: &Path) -> bool {
    let inode = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
    match (inode(a), inode(b)) {
        (Some(a), Some(b)) => a == b,
        _ => std::path::absolute(a).ok() == std::path::absolute(b).ok(),
    }
}

/// Messages may quote what strangers wrote: control characters, and marks that reorder
/// a line, which a terminal would obey, are shown as escapes.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if reorders || (c.is_control() && c != '\n' && c != '\t') {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
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
    // The library's messages quote the line, which may hold the secret.
    let bad = || {
        Failure::Usage(
            ".env: not readable as KEY=VALUE lines; quote values that hold spaces".into(),
        )
    };
    for item in dotenvy::from_path_iter(path).map_err(|_| bad())? {
        let (key, value) = item.map_err(|_| bad())?;
        if key == name {
            return Ok(Some(value).filter(|v| !v.is_empty()));
        }
    }
    Ok(None)
}
