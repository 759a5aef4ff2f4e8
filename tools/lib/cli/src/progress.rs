//! How far something long has come.

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::App;

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A bar on a terminal, else a line every few seconds; nothing with `--quiet`. Where the
/// records go to the terminal too there is no bar: each record would leave a torn one behind.
pub struct Progress<'a> {
    app: &'a App,
    what: String,
    total: Option<u64>,
    done: Cell<u64>,
    bar: Option<ProgressBar>,
    last_line: Cell<Instant>,
    started: Instant,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(app: &'a App, what: &str, total: Option<u64>) -> Self {
        let bars = app.bars().filter(|_| !io::stdout().is_terminal());
        let bar = bars.map(|bars| {
            let (bar, style) = match total {
                Some(total) => (
                    ProgressBar::new(total),
                    "{prefix} [{bar:24}] {pos}/{len} {eta} {wide_msg}",
                ),
                None => (
                    ProgressBar::new_spinner(),
                    "{prefix} {pos} {elapsed} {wide_msg}",
                ),
            };
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = bars.add(
                bar.with_style(style.progress_chars("=> "))
                    .with_prefix(what.to_owned()),
            );
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let now = Instant::now();
        Self {
            app,
            what: what.to_owned(),
            total,
            done: Cell::new(0),
            bar,
            last_line: Cell::new(now),
            started: now,
        }
    }

    /// So many more are done.
    pub fn add(&self, n: u64) {
        self.set(self.done.get() + n);
    }

    /// So many are done in all.
    pub fn set(&self, done: u64) {
        self.set_with(done, "");
    }

    /// So many are done in all, with a word on how it goes.
    pub fn set_with(&self, done: u64, message: &str) {
        self.done.set(done);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if !self.app.quiet() && self.last_line.get().elapsed() >= LINE_EVERY {
            self.last_line.set(Instant::now());
            let of = self
                .total
                .map(|total| format!("/{total}"))
                .unwrap_or_default();
            let seconds = self.started.elapsed().as_secs();
            self.app.info(format_args!(
                "{} {done}{of}, {seconds} s {message}",
                self.what
            ));
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
