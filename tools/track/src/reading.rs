//! How far the reading of lines is, for the threads that send what was read; and standard
//! input as something that a signal can end, which a blocked read is not.

use std::io::{self, BufRead, ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use cli::App;

/// So long after a signal lines still pass: the training that the same Ctrl-C ends prints
/// the step that it has in hand.
pub const LAST_LINES: Duration = Duration::from_secs(2);

/// So long after a signal a service is waited for.
pub const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// How often it is looked whether a signal came.
const LOOK: Duration = Duration::from_millis(50);

/// How far it is.
#[derive(Debug, Default)]
pub struct Reading {
    begun: AtomicBool,
    cut: AtomicBool,
    signalled: OnceLock<Instant>,
}

impl Reading {
    /// A line came.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Whether a line came.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// The lines end before their end.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    /// Whether they did.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Whether nobody is to wait for another attempt.
    pub fn is_hurried(&self) -> bool {
        self.is_cut() || self.signalled.get().is_some()
    }

    /// Whether a signal came so long ago.
    pub fn signalled_before(&self, time: Duration) -> bool {
        (self.signalled.get()).is_some_and(|since| since.elapsed() >= time)
    }

    /// Looks out for a signal until it came, or `over` is dropped.
    pub fn watch(&self, app: &App, over: &Receiver<()>) {
        while over.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if app.interrupted().unwrap_or(false) {
                self.signalled.get_or_init(Instant::now);
                return;
            }
        }
    }
}

/// A stream that another thread reads. Some time after a signal it fails with
/// [`ErrorKind::TimedOut`], so that a line that is half there is none.
pub struct Input {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: io::Cursor<Vec<u8>>,
    reading: Arc<Reading>,
}

impl Input {
    /// Begins to read `source`. The thread is not waited for: it may be blocked for good.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(mut source: Box<dyn BufRead + Send>, reading: Arc<Reading>) -> io::Result<Self> {
        let (read, chunks) = sync_channel(4);
        thread::Builder::new().name("input".into()).spawn(move || {
            loop {
                let chunk = match source.fill_buf() {
                    Ok([]) => return,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    chunk => chunk.map(<[u8]>::to_vec),
                };
                let length = chunk.as_ref().map_or(0, Vec::len);
                source.consume(length);
                if read.send(chunk).is_err() || length == 0 {
                    return;
                }
            }
        })?;
        Ok(Self {
            chunks,
            chunk: io::Cursor::default(),
            reading,
        })
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.chunk.fill_buf()?.is_empty() {
            if self.reading.signalled_before(LAST_LINES) {
                return Err(ErrorKind::TimedOut.into());
            }
            match self.chunks.recv_timeout(LOOK) {
                Ok(chunk) => self.chunk = io::Cursor::new(chunk?),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.chunk.fill_buf()
    }

    fn consume(&mut self, length: usize) {
        self.chunk.consume(length);
    }
}

impl Read for Input {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(into)?;
        self.consume(length);
        Ok(length)
    }
}
