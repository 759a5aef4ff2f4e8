//! Messages: to the user, and with a time to the log.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;

use indicatif::MultiProgress;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Where a tool's messages go. Several threads may say something.
pub struct Messages {
    name: String,
    bars: MultiProgress,
    log: Mutex<Option<Log>>,
}

/// The file of `--log`.
pub struct Log {
    pub path: PathBuf,
    pub file: File,
    /// Whether lines are missing, of which the user knows.
    pub has_gaps: bool,
}

impl Messages {
    pub fn new(name: String, log: Option<Log>) -> Self {
        Self {
            name,
            bars: MultiProgress::new(),
            log: Mutex::new(log),
        }
    }

    /// The tool's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bars that messages are to stand above.
    pub fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// From here on nothing is written to the log.
    pub fn leave_log(&self) {
        *self.log.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }

    /// `NAME: message` to stderr, past any progress bar, and to the log. That either
    /// cannot be written must not end the work.
    pub fn say(&self, message: fmt::Arguments<'_>) {
        let text = printable(&format!("{}: {message}", self.name));
        // First: stderr may be a pipe that is full.
        let lost = self.log_line(&text);
        self.print(lost.as_deref());
        self.print(Some(&text));
    }

    /// `NAME: message` to the log alone.
    pub fn note(&self, message: fmt::Arguments<'_>) {
        let lost = self.log_line(&printable(&format!("{}: {message}", self.name)));
        self.print(lost.as_deref());
    }

    fn print(&self, text: Option<&str>) {
        if let Some(text) = text {
            self.bars.suspend(|| {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            });
        }
    }

    /// A line with its time to the log. Of the first that cannot be written it returns
    /// what the user is to know, once nobody waits for the log.
    fn log_line(&self, text: &str) -> Option<String> {
        let mut log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        let log = log.as_mut()?;
        let now = OffsetDateTime::now_utc()
            .replace_nanosecond(0)
            .unwrap_or_else(|_| OffsetDateTime::now_utc());
        let stamp = now.format(&Rfc3339).unwrap_or_default();
        let error = writeln!(log.file, "{stamp} {text}").err()?;
        let (name, path) = (&self.name, log.path.display());
        let lost = format!("{name}: warning: --log {path}: {error}: messages are missing there");
        (!std::mem::replace(&mut log.has_gaps, true)).then(|| printable(&lost))
    }
}

/// Text as a terminal may have it. It may quote what strangers wrote: control characters,
/// and marks that reorder a line, which a terminal would obey, are shown as escapes; ends of
/// lines and tabs stay.
pub fn printable(text: &str) -> String {
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
