//! Quotes of a CSV file that do not close, or close too early.
//!
//! The csv crate reads on to the end of the file in the first case and takes what
//! follows for text in the second, and says nothing: one forgotten quote would swallow
//! rows. So the bytes are watched on their way to it, by the same rules (a quote opens
//! a field only as its first character; doubled, it stands for itself).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;

/// What has been found so far.
#[derive(Debug, Default)]
pub struct Found {
    /// The line of a quote that was still open at the end.
    pub unclosed: Option<u64>,
    /// Closing quotes with text behind them, in order.
    stray: VecDeque<Stray>,
    /// What passed and was not taken out, for rows that are kept as they came.
    bytes: VecDeque<u8>,
    /// How many bytes were taken out.
    taken: u64,
}

impl Found {
    /// Takes out what stands before byte `end`: the bytes without the ends of lines around
    /// them, and the first closing quote with text behind it.
    pub fn before(&mut self, end: u64) -> (Vec<u8>, Option<Stray>) {
        let count = self.bytes.len().min((end - self.taken) as usize);
        self.taken = end;
        let passed: Vec<u8> = self.bytes.drain(..count).collect();
        let mut bytes = passed.as_slice();
        while let [b'\n' | b'\r', inner @ ..] | [inner @ .., b'\n' | b'\r'] = bytes {
            bytes = inner;
        }
        let mut first = None;
        while self.stray.front().is_some_and(|stray| stray.byte < end) {
            first = first.or(self.stray.pop_front());
        }
        (bytes.to_vec(), first)
    }
}

/// A closing quote with text behind it.
#[derive(Debug)]
pub struct Stray {
    /// Where the text behind it is, in bytes from the start.
    byte: u64,
    /// The line of the quote that it closed.
    opened: u64,
    /// Its own line.
    line: u64,
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { opened, line, .. } = self;
        write!(
            f,
            "text follows a closing quote in line {line} (it opened in line {opened}): a quote is missing, or one \
             within a cell is not doubled"
        )
    }
}

#[derive(Clone, Copy)]
enum State {
    FieldStart,
    Plain,
    Quoted,
    /// After a quote within quotes: an end, or half of a doubled one.
    Quote,
}

/// A reader that looks at the quotes of what passes.
pub struct Quotes<R> {
    inner: R,
    state: State,
    byte: u64,
    line: u64,
    opened: u64,
    found: Rc<RefCell<Found>>,
}

impl<R: Read> Quotes<R> {
    /// Watches `inner`, which is to begin without a byte order mark.
    pub fn new(inner: R) -> (Self, Rc<RefCell<Found>>) {
        let found = Rc::<RefCell<Found>>::default();
        let quotes = Self {
            inner,
            state: State::FieldStart,
            byte: 0,
            line: 1,
            opened: 0,
            found: Rc::clone(&found),
        };
        (quotes, found)
    }

    fn see(&mut self, byte: u8) {
        self.state = match (self.state, byte) {
            (State::Quoted, b'"') => State::Quote,
            (State::Quoted, _) => State::Quoted,
            (State::FieldStart, b'"') => {
                self.opened = self.line;
                State::Quoted
            }
            (State::Quote, b'"') => State::Quoted,
            (_, b',' | b'\n' | b'\r') => State::FieldStart,
            (State::Quote, _) => {
                self.found.borrow_mut().stray.push_back(Stray {
                    byte: self.byte,
                    opened: self.opened,
                    line: self.line,
                });
                State::Plain
            }
            _ => State::Plain,
        };
        self.byte += 1;
        self.line += u64::from(byte == b'\n');
    }
}

impl<R: Read> Read for Quotes<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        if n == 0 && !buffer.is_empty() && matches!(self.state, State::Quoted) {
            self.found.borrow_mut().unclosed = Some(self.opened);
        }
        self.found.borrow_mut().bytes.extend(&buffer[..n]);
        for &byte in &buffer[..n] {
            self.see(byte);
        }
        Ok(n)
    }
}
