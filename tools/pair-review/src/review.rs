//! What a person does with the pairs: moving among them, narrowing them down, deciding. It
//! knows keys, and nothing of a terminal.

use jsonl::Journal;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::decisions::{Decision, Decisions, Standing, Verdict};
use crate::harmless::find;
use crate::rows::{Order, Row};

/// Characters that a typed line may have.
const TYPED: usize = 200;

/// Fields that rows are often sorted by, offered where there are such.
const FIELDS: [&str; 7] = [
    "reply_likes",
    "tweet_likes",
    "reply_author_followers",
    "validation.quality",
    "validation.reply_toxicity",
    "validation.tweet_toxicity",
    "reply_created_at",
];

/// Which pairs are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    All,
    Undecided,
    Kept,
    Rejected,
}

impl Filter {
    fn next(self) -> Self {
        match self {
            Self::All => Self::Undecided,
            Self::Undecided => Self::Kept,
            Self::Kept => Self::Rejected,
            Self::Rejected => Self::All,
        }
    }

    /// What the pairs are that it shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "",
            Self::Undecided => "undecided",
            Self::Kept => "kept",
            Self::Rejected => "rejected",
        }
    }
}

/// What is asked for below the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    Reason,
    Order,
    Search,
}

/// What is on the screen.
#[derive(Debug, PartialEq)]
pub enum Mode {
    /// A pair.
    Pair,
    /// A pair, and an answer that is being typed.
    Asking(Question, String),
    /// All fields of a pair.
    Fields,
    /// The keys.
    Help,
}

/// What the caller is to do after a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Then {
    GoOn,
    Leave,
    Interrupt,
    Suspend,
}

/// A word on what a key did, until the next one.
pub struct Note {
    pub text: String,
    pub is_bad: bool,
}

/// The pairs, the decisions, and where the person is.
pub struct Review {
    pub rows: Vec<Row>,
    pub decisions: Decisions,
    journal: Journal,
    /// Of each row.
    verdicts: Vec<Verdict>,
    order: Vec<usize>,
    pub ordered: Order,
    seed: u64,
    /// Where in `order` the person is.
    at: usize,
    pub filter: Filter,
    pub needle: Option<String>,
    /// Of each row, whether it holds the needle.
    found: Vec<bool>,
    pub mode: Mode,
    pub note: Option<Note>,
    pub reasons: Vec<String>,
    /// What the last rejection gave, for the next one of its kind.
    last_reason: Option<Option<String>>,
    /// Rows decided on since the start, and what was said of them before.
    undo: Vec<(usize, Option<Decision>)>,
    /// First line shown of what does not fit, and of how many lines the screen has room.
    pub scroll: usize,
    pub room: usize,
}

impl Review {
    /// Begins at the first pair that nobody has decided on.
    ///
    /// # Errors
    /// If no row has the field that the order is by.
    pub fn new(
        rows: Vec<Row>,
        decisions: Decisions,
        journal: Journal,
        (ordered, seed): (Order, u64),
        reasons: Vec<String>,
    ) -> Result<Self, cli::Failure> {
        let mut review = Self {
            verdicts: rows.iter().map(|row| verdict(&decisions, row)).collect(),
            order: ordered.of(&rows, seed)?,
            found: vec![true; rows.len()],
            rows,
            decisions,
            journal,
            ordered,
            seed,
            at: 0,
            filter: Filter::All,
            needle: None,
            mode: Mode::Pair,
            note: None,
            reasons,
            last_reason: None,
            undo: Vec::new(),
            scroll: 0,
            room: 1,
        };
        review.jump_to_first();
        if review
            .verdicts
            .iter()
            .all(|said| *said != Verdict::Undecided)
        {
            review.say("All pairs are decided on. q leaves.");
        }
        Ok(review)
    }

    /// The pair that is looked at; `None` where no pair is shown.
    pub fn current(&self) -> Option<&Row> {
        let row = *self.order.get(self.at)?;
        self.is_shown(row).then(|| &self.rows[row])
    }

    /// How the pair that is looked at stands.
    pub fn standing(&self) -> Standing<'_> {
        (self.current()).map_or(Standing::Undecided, |row| {
            self.decisions.of(&row.id, &row.text)
        })
    }

    /// Which of the pairs shown this is, from 1, and how many there are.
    pub fn place(&self) -> (usize, usize) {
        let shown = |order: &[usize]| order.iter().filter(|&&row| self.is_shown(row)).count();
        let before = shown(&self.order[..self.at.min(self.order.len())]);
        (
            before + 1,
            before + shown(&self.order[self.at.min(self.order.len())..]),
        )
    }

    /// How many pairs have this verdict.
    pub fn count(&self, of: Verdict) -> usize {
        self.verdicts.iter().filter(|said| **said == of).count()
    }

    /// What may be answered by a number, from 1.
    pub fn choices(&self, question: Question) -> Vec<String> {
        match question {
            Question::Reason => self.reasons.iter().take(9).cloned().collect(),
            Question::Order => {
                let there = |field: &&str| self.rows.iter().any(|row| row.value(field).is_some());
                let fields = FIELDS.into_iter().filter(there);
                ["read", "random"]
                    .into_iter()
                    .chain(fields)
                    .map(String::from)
                    .collect()
            }
            Question::Search => Vec::new(),
        }
    }

    fn is_shown(&self, row: usize) -> bool {
        let filtered = match self.filter {
            Filter::All => true,
            Filter::Undecided => self.verdicts[row] == Verdict::Undecided,
            Filter::Kept => self.verdicts[row] == Verdict::Keep,
            Filter::Rejected => self.verdicts[row] == Verdict::Reject,
        };
        filtered && self.found[row]
    }

    fn say(&mut self, text: impl Into<String>) {
        self.note = Some(Note {
            text: text.into(),
            is_bad: false,
        });
    }

    fn complain(&mut self, text: impl Into<String>) {
        self.note = Some(Note {
            text: text.into(),
            is_bad: true,
        });
    }

    /// What a key does.
    pub fn key(&mut self, key: KeyEvent) -> Then {
        self.note = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            match key.code {
                KeyCode::Char('c') => return Then::Interrupt,
                KeyCode::Char('z') => return Then::Suspend,
                KeyCode::Char('u') => {
                    if let Mode::Asking(_, typed) = &mut self.mode {
                        typed.clear();
                    }
                }
                _ => {}
            }
            return Then::GoOn;
        }
        match &mut self.mode {
            Mode::Asking(question, typed) => {
                let question = *question;
                match key.code {
                    KeyCode::Esc => self.mode = Mode::Pair,
                    // Not before: a reason of one's own may begin with a digit.
                    KeyCode::Enter => {
                        let typed = std::mem::take(typed).trim().to_owned();
                        match typed.as_bytes() {
                            &[digit @ b'0'..=b'9'] if question != Question::Search => {
                                self.chosen(question, usize::from(digit - b'0'));
                            }
                            _ => {
                                self.mode = Mode::Pair;
                                self.answered(question, typed);
                            }
                        }
                    }
                    KeyCode::Up | KeyCode::Down | KeyCode::PageUp | KeyCode::PageDown => {
                        self.scroll_by(key.code);
                    }
                    KeyCode::Backspace => {
                        typed.pop();
                    }
                    KeyCode::Char(c) => self.typed(&c.to_string()),
                    _ => {}
                }
            }
            Mode::Help | Mode::Fields => match key.code {
                KeyCode::Up | KeyCode::Down | KeyCode::PageUp | KeyCode::PageDown => {
                    self.scroll_by(key.code);
                }
                _ => self.show(Mode::Pair),
            },
            Mode::Pair => return self.pair_key(key.code),
        }
        Then::GoOn
    }

    fn pair_key(&mut self, code: KeyCode) -> Then {
        match code {
            KeyCode::Char('k' | ' ') | KeyCode::Enter => self.decide(Verdict::Keep, None),
            KeyCode::Char('r') => self.ask(Question::Reason),
            KeyCode::Char('R') => match self.last_reason.clone() {
                Some(reason) => self.decide(Verdict::Reject, reason),
                None => self.ask(Question::Reason),
            },
            KeyCode::Char('u') => self.take_back(),
            KeyCode::Right => self.step(1),
            KeyCode::Left => self.step(-1),
            KeyCode::Home => self.jump(0),
            KeyCode::End => self.jump(self.order.len()),
            KeyCode::Up | KeyCode::Down | KeyCode::PageUp | KeyCode::PageDown => {
                self.scroll_by(code);
            }
            KeyCode::Char('n') => self.jump_to_undecided(),
            KeyCode::Char('/') => self.ask(Question::Search),
            KeyCode::Char('f') => {
                self.filter = self.filter.next();
                self.jump_to_shown();
            }
            KeyCode::Char('o') => self.ask(Question::Order),
            KeyCode::Char('i') => self.show(Mode::Fields),
            KeyCode::Char('?') => self.show(Mode::Help),
            KeyCode::Esc => self.show_all(),
            KeyCode::Char('q') => return Then::Leave,
            _ => self.say("No key of this tool; ? shows those that are."),
        }
        Then::GoOn
    }

    /// What is pasted is typed where something is being typed, and nothing else: it must not
    /// be taken for keys.
    pub fn paste(&mut self, text: &str) {
        match self.mode {
            Mode::Asking(..) => self.typed(text),
            _ => self.say("What is pasted does nothing here."),
        }
    }

    fn typed(&mut self, text: &str) {
        if let Mode::Asking(_, typed) = &mut self.mode {
            for c in text.chars() {
                let c = if c == '\n' || c == '\t' { ' ' } else { c };
                if !c.is_control() && typed.chars().count() < TYPED {
                    typed.push(c);
                }
            }
        }
    }

    fn show(&mut self, mode: Mode) {
        self.mode = mode;
        self.scroll = 0;
    }

    fn ask(&mut self, question: Question) {
        if question == Question::Reason && self.current().is_none() {
            return;
        }
        self.mode = Mode::Asking(question, String::new());
    }

    /// An answer by its number.
    fn chosen(&mut self, question: Question, number: usize) {
        let chosen = number.checked_sub(1);
        match chosen.and_then(|at| self.choices(question).into_iter().nth(at)) {
            Some(choice) => {
                self.mode = Mode::Pair;
                self.answered(question, choice);
            }
            None => self.complain(format!("There is no {number}.")),
        }
    }

    fn answered(&mut self, question: Question, answer: String) {
        match question {
            Question::Reason => {
                let reason = (!answer.is_empty()).then_some(answer);
                self.last_reason = Some(reason.clone());
                self.decide(Verdict::Reject, reason);
            }
            Question::Order if answer.is_empty() => {}
            Question::Order => {
                let ordered = Order::named(&answer).or_turned(&self.ordered);
                match ordered.of(&self.rows, self.seed) {
                    Err(error) => self.complain(error.to_string()),
                    Ok(order) => {
                        self.order = order;
                        self.ordered = ordered;
                        self.jump_to_first();
                        self.jump_to_shown();
                    }
                }
            }
            Question::Search => {
                let holds = |text: &str| !find(text, &answer).is_empty();
                self.found = (self.rows.iter())
                    .map(|row| answer.is_empty() || holds(&row.tweet) || holds(&row.reply))
                    .collect();
                self.needle = Some(answer).filter(|needle| !needle.is_empty());
                self.jump_to_shown();
            }
        }
    }

    /// Writes a decision on the pair that is looked at, and goes on.
    fn decide(&mut self, decision: Verdict, reason: Option<String>) {
        let Some(row) = self.current() else {
            return;
        };
        let before = match self.decisions.of(&row.id, &row.text) {
            Standing::Decided(said) => Some(said.clone()),
            _ => None,
        };
        let made = Decision::new(&row.id, &row.text, decision, reason);
        let row = self.order[self.at];
        if self.write(made) {
            self.undo.push((row, before));
            self.forward();
        }
    }

    /// Takes back the last decision since the start.
    fn take_back(&mut self) {
        let Some((row, before)) = self.undo.pop() else {
            self.say("Nothing to undo since the start; go to a pair and decide anew.");
            return;
        };
        let of = &self.rows[row];
        let (verdict, reason) = (before.clone()).map_or((Verdict::Undecided, None), |said| {
            (said.decision, said.reason)
        });
        let made = Decision::new(&of.id, &of.text, verdict, reason);
        if !self.write(made) {
            self.undo.push((row, before));
            return;
        }
        self.at = self.order.iter().position(|&at| at == row).unwrap_or(0);
        self.scroll = 0;
        if !self.is_shown(row) {
            self.show_all();
        }
        self.say("Undone.");
    }

    /// Puts a decision on the disk; nothing is decided that is not there.
    fn write(&mut self, made: Decision) -> bool {
        if let Err(error) = self.journal.append(&made) {
            self.complain(format!("NOT KEPT: {error}"));
            return false;
        }
        let id = made.id.clone();
        self.decisions.add(made);
        for (row, said) in self.rows.iter().zip(&mut self.verdicts) {
            if row.id == id {
                *said = verdict(&self.decisions, row);
            }
        }
        true
    }

    /// The next pair that is shown, from `self.at` on.
    fn forward(&mut self) {
        let next = (self.at + 1..self.order.len()).find(|&at| self.is_shown(self.order[at]));
        match next {
            Some(at) => self.go(at),
            None => {
                // Where decided pairs are not shown, there may be others before it.
                self.jump_to_shown();
                let left = self.count(Verdict::Undecided);
                self.say(match left {
                    0 => "That was the last: all pairs are decided on. q leaves.".to_owned(),
                    _ => format!("That was the last one here; {left} undecided: n"),
                });
                self.scroll = 0;
            }
        }
    }

    fn step(&mut self, by: isize) {
        let shown = |at: &usize| self.is_shown(self.order[*at]);
        let next = match by > 0 {
            true => (self.at + 1..self.order.len()).find(shown),
            false => (0..self.at).rev().find(shown),
        };
        match next {
            Some(at) => self.go(at),
            None if by > 0 => self.say("This is the last one."),
            None => self.say("This is the first one."),
        }
    }

    fn jump(&mut self, end: usize) {
        let shown = |at: &usize| self.is_shown(self.order[*at]);
        let next = match end {
            0 => (0..self.order.len()).find(shown),
            _ => (0..self.order.len()).rev().find(shown),
        };
        if let Some(at) = next {
            self.go(at);
        }
    }

    /// The next undecided pair of those shown, from the start again after the last.
    fn jump_to_undecided(&mut self) {
        let undecided = |at: &usize| {
            let row = self.order[*at];
            self.is_shown(row) && self.verdicts[row] == Verdict::Undecided
        };
        if let Some(at) = (self.at + 1..self.order.len()).find(undecided) {
            self.go(at);
        } else if let Some(at) = (0..=self.at.min(self.order.len() - 1)).find(undecided) {
            let wraps = at < self.at;
            self.go(at);
            self.say(match wraps {
                true => "From the start again.",
                false => "This is the only one left undecided.",
            });
        } else if self.count(Verdict::Undecided) > 0 {
            self.say("None of those shown is undecided; Esc shows all.");
        } else {
            self.say("All pairs are decided on. q leaves.");
        }
    }

    /// The first undecided pair, else the first.
    fn jump_to_first(&mut self) {
        let undecided = |&row: &usize| self.verdicts[row] == Verdict::Undecided;
        self.go(self.order.iter().position(undecided).unwrap_or(0));
    }

    /// A pair that is shown, the nearest from here on.
    fn jump_to_shown(&mut self) {
        let shown = |at: &usize| self.is_shown(self.order[*at]);
        let next = (self.at..self.order.len()).find(shown);
        if let Some(at) = next.or_else(|| (0..self.at).rev().find(shown)) {
            self.go(at);
        }
    }

    fn show_all(&mut self) {
        self.filter = Filter::All;
        self.needle = None;
        self.found.fill(true);
        self.scroll = 0;
    }

    fn go(&mut self, at: usize) {
        self.at = at;
        self.scroll = 0;
    }

    fn scroll_by(&mut self, code: KeyCode) {
        // What is too far is mended where the lines are known.
        let page = self.room.saturating_sub(1).max(1);
        self.scroll = match code {
            KeyCode::Up => self.scroll.saturating_sub(1),
            KeyCode::Down => self.scroll + 1,
            KeyCode::PageUp => self.scroll.saturating_sub(page),
            _ => self.scroll + page,
        };
    }
}

fn verdict(decisions: &Decisions, row: &Row) -> Verdict {
    match decisions.of(&row.id, &row.text) {
        Standing::Decided(said) => said.decision,
        _ => Verdict::Undecided,
    }
}
