//! The terminal that the person sits at, whatever standard input and output are, and its
//! state, which is put back however this ends: by a key, an error, a panic, a signal.

use std::fs::File;
use std::io::{self, Write};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ratatui::Frame;
use ratatui::Terminal as Cells;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{
    self, DisableBracketedPaste, EnableBracketedPaste, Event, KeyEvent, KeyEventKind,
};
use ratatui::crossterm::terminal::{
    BeginSynchronizedUpdate, DisableLineWrap, EnableLineWrap, EndSynchronizedUpdate,
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::crossterm::{cursor, execute};
use ratatui::layout::{Position, Rect};
use rustix::process::{Signal, kill_current_process_group};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::{exit, signal_name};

const PATH: &str = "/dev/tty";

/// How long the tool has to end by itself after a signal.
const GRACE: Duration = Duration::from_secs(1);

/// What happened.
pub enum Happened {
    /// A key.
    Key(KeyEvent),
    /// A text came at once.
    Pasted(String),
    /// The screen is to be drawn anew.
    Redraw,
    /// A signal came that ends this; its name.
    Ended(&'static str),
}

/// The terminal.
pub struct Terminal {
    cells: Cells<CrosstermBackend<File>>,
    signal: Arc<AtomicUsize>,
    continued: Arc<AtomicBool>,
}

impl Terminal {
    /// The terminal of this process.
    ///
    /// # Errors
    /// If it has none.
    pub fn find() -> io::Result<File> {
        File::options().read(true).write(true).open(PATH)
    }

    /// Takes the terminal over.
    ///
    /// # Errors
    /// If it does not do what it is told.
    pub fn open(tty: File) -> io::Result<Self> {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            leave();
            before(info);
        }));
        let signal = Arc::new(AtomicUsize::new(0));
        heed(&signal)?;
        let continued = Arc::new(AtomicBool::new(false));
        flag::register(SIGCONT, continued.clone())?;
        let cells = enter(&tty).and_then(|()| Cells::new(CrosstermBackend::new(tty)));
        Ok(Self {
            cells: cells.inspect_err(|_| leave())?,
            signal,
            continued,
        })
    }

    /// Draws the whole screen. Terminals do not agree on how wide some emoji are: by drawing
    /// all of it, nothing is left of one that took more room than was reckoned with.
    ///
    /// # Errors
    /// If the terminal does not take it.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame)) -> io::Result<()> {
        execute!(self.cells.backend_mut(), BeginSynchronizedUpdate)?;
        // Unlike `clear`, this does not ask the terminal where its cursor is.
        let size = self.cells.size()?;
        self.cells.resize(Rect::from((Position::ORIGIN, size)))?;
        self.cells.draw(draw)?;
        execute!(self.cells.backend_mut(), EndSynchronizedUpdate)
    }

    /// Waits for something to happen.
    ///
    /// # Errors
    /// If the terminal cannot be read.
    pub fn next(&mut self) -> io::Result<Happened> {
        loop {
            if let Some(name) = self.ended() {
                return Ok(Happened::Ended(name));
            }
            if self.continued.swap(false, Ordering::Relaxed) {
                self.enter_again()?;
                return Ok(Happened::Redraw);
            }
            match self.read() {
                Ok(None) => {}
                Ok(Some(happened)) => return Ok(happened),
                Err(error) => {
                    // A terminal that went away is told by a signal too, which says it better.
                    thread::sleep(Duration::from_millis(200));
                    return self.ended().map(Happened::Ended).ok_or(error);
                }
            }
        }
    }

    fn read(&mut self) -> io::Result<Option<Happened>> {
        if !event::poll(Duration::from_millis(100))? {
            return Ok(None);
        }
        Ok(match event::read()? {
            Event::Key(key) if key.kind != KeyEventKind::Release => Some(Happened::Key(key)),
            Event::Paste(text) => Some(Happened::Pasted(text)),
            Event::Resize(..) => Some(Happened::Redraw),
            _ => None,
        })
    }

    fn ended(&self) -> Option<&'static str> {
        let signal = self.signal.load(Ordering::Relaxed) as i32;
        (signal != 0).then(|| signal_name(signal).unwrap_or("a signal"))
    }

    /// Stops until the shell goes on with it, and with it the make that it may run under.
    ///
    /// # Errors
    /// If the terminal cannot be taken over again.
    pub fn suspend(&mut self) -> io::Result<()> {
        leave();
        kill_current_process_group(Signal::TSTP)?;
        self.continued.store(false, Ordering::Relaxed);
        enter(self.cells.backend_mut())
    }

    /// The shell has set the terminal its own way meanwhile.
    fn enter_again(&mut self) -> io::Result<()> {
        disable_raw_mode()?;
        enter(self.cells.backend_mut())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        leave();
    }
}

fn enter(mut tty: impl Write) -> io::Result<()> {
    enable_raw_mode()?;
    // Without wrapping, what is wider than was reckoned with spoils no other line.
    execute!(
        tty,
        EnterAlternateScreen,
        DisableLineWrap,
        EnableBracketedPaste,
        cursor::Hide
    )
}

/// Puts the terminal back, as far as it is still there.
fn leave() {
    if let Ok(mut tty) = Terminal::find() {
        let _ = execute!(
            tty,
            EndSynchronizedUpdate,
            DisableBracketedPaste,
            EnableLineWrap,
            cursor::Show,
            LeaveAlternateScreen
        );
    }
    let _ = disable_raw_mode();
}

/// From here on a signal that would end the process sets the flag. Where that does not end
/// it, as where reading from a terminal that is gone never returns, it ends all the same: all
/// that was decided is on the disk.
fn heed(flag: &Arc<AtomicUsize>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let flag = flag.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                flag.store(signal as usize, Ordering::Relaxed);
                thread::sleep(GRACE);
                leave();
                exit(130);
            }
        })?;
    Ok(())
}
