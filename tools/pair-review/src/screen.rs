//! How it looks: the pair in the middle, where one is above it, what was said of it and how
//! far one has come below. Whatever a colour says stands there in words too.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::crossterm::style::Colored;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use serde_json::{Map, Value};

use crate::decisions::{Decision, Standing, Verdict};
use crate::harmless::{self, Styles};
use crate::review::{Mode, Question, Review};
use crate::rows::{Row, shown};

/// Columns of a text at most: longer lines are hard to read.
const MEASURE: usize = 88;

/// Columns left of a text.
const INDENT: usize = 2;

/// Each fits a line of 40 columns, and all of them 20 lines.
const HELP: [(&str, &str); 16] = [
    ("k", "keep; also space and Enter"),
    ("r", "reject, for a reason"),
    ("R", "reject, for the last reason"),
    ("u", "undo, as often as you like"),
    ("→ ←", "next pair, pair before"),
    ("Home End", "first pair, last pair"),
    ("n", "next undecided pair"),
    ("↓ ↑", "scroll; PageDown, PageUp"),
    ("/", "only pairs that hold a text"),
    ("f", "undecided, kept, rejected"),
    ("Esc", "all pairs again"),
    ("o", "order of the pairs"),
    ("i", "all fields of the pair"),
    ("?", "this page"),
    ("q", "leave; decisions are kept"),
    ("Ctrl-Z", "leave for a while (fg)"),
];

/// Hints, those that may go for want of room last.
const HINTS: [&str; 10] = [
    "k keep",
    "r reject",
    "? help",
    "q leave",
    "u undo",
    "←→ move",
    "n undecided",
    "/ search",
    "f filter",
    "o order",
];

/// Styles by what they mean.
struct Look {
    label: Style,
    faint: Style,
    good: Style,
    bad: Style,
    bar: Style,
    texts: Styles,
}

impl Look {
    /// With `NO_COLOR` set, weight and reversal alone.
    fn new() -> Self {
        let colour = |colour: Color| match Colored::ansi_color_disabled_memoized() {
            true => Style::new(),
            false => Style::new().fg(colour),
        };
        let bold = Style::new().add_modifier(Modifier::BOLD);
        Self {
            label: bold.patch(colour(Color::Cyan)),
            faint: Style::new().add_modifier(Modifier::DIM),
            good: bold.patch(colour(Color::Green)),
            bad: bold.patch(colour(Color::Red)),
            bar: Style::new().add_modifier(Modifier::REVERSED),
            texts: Styles {
                plain: Style::new(),
                mark: colour(Color::Magenta).add_modifier(Modifier::REVERSED),
                found: bold.add_modifier(Modifier::UNDERLINED),
            },
        }
    }
}

/// Draws all of it.
pub fn draw(review: &mut Review, title: &str, frame: &mut Frame) {
    let area = frame.area();
    let look = Look::new();
    let (width, height) = (usize::from(area.width), area.height);
    if width < 8 || height < 4 {
        return;
    }
    let buffer = frame.buffer_mut();
    header(review, title, &look, area, buffer);
    let bottom = match review.mode {
        Mode::Help | Mode::Fields => 1,
        _ if height < 16 => 3,
        _ => 4,
    };
    let (body, question) = match &review.mode {
        Mode::Help => (help(&look), Vec::new()),
        Mode::Fields => (fields(review, &look, width), Vec::new()),
        Mode::Pair => (pair(review, &look, width), Vec::new()),
        Mode::Asking(asked, _) => (
            pair(review, &look, width),
            question(review, *asked, &look, width),
        ),
    };
    // Where there is too little room for both, the pair keeps a part of it.
    let room = height.saturating_sub(2 + bottom);
    let asks = (question.len() as u16).min(room.saturating_sub(room.min(4)));
    let room = room - asks;
    let needed = body.len();
    let lines = usize::from(room);
    // One line tells what is above and below, unless it would be half of all there are.
    let tells = needed > lines && lines > 2;
    let room_of_text = if tells { lines - 1 } else { lines };
    review.room = room_of_text;
    review.scroll = review.scroll.min(needed.saturating_sub(room_of_text));
    let end = (review.scroll + room_of_text).min(needed);
    for (y, line) in (2..).zip(&body[review.scroll..end]) {
        buffer.set_line(0, y, line, area.width);
    }
    if tells {
        let (above, below) = (review.scroll, needed - end);
        let text = match (above, below) {
            (0, _) => format!("↓ {}", more(below, "below")),
            (_, 0) => format!("↑ {}", more(above, "above")),
            _ => format!("↑ {above} above, ↓ {}", more(below, "below")),
        };
        set(buffer, INDENT, 2 + room - 1, &text, look.bar, width);
    }
    for (y, line) in (2 + room..).zip(question.iter().take(usize::from(asks))) {
        buffer.set_line(0, y, line, area.width);
    }
    if bottom == 4 {
        let rule = "─".repeat(width);
        buffer.set_string(0, height - 4, rule, look.faint);
    }
    if bottom >= 3 {
        let line = standing(review, &look, width);
        buffer.set_line(0, height - 3, &line, area.width);
        let text = progress(review, width - 1);
        set(buffer, 1, height - 2, &text, Style::new(), width);
    }
    let cursor = last_line(review, &look, height - 1, width, buffer);
    if let Some(x) = cursor {
        frame.set_cursor_position((x.min(area.width - 1), height - 1));
    }
}

fn more(lines: usize, side: &str) -> String {
    format!("{} {side}", cli::counted(lines, "more line"))
}

/// Sets a harmless text, cut to the screen.
fn set(buffer: &mut Buffer, x: usize, y: u16, text: &str, style: Style, width: usize) {
    let text = harmless::in_a_line(text, width.saturating_sub(x));
    buffer.set_string(x as u16, y, text, style);
}

/// Which pair of which file this is.
fn header(review: &Review, title: &str, look: &Look, area: Rect, buffer: &mut Buffer) {
    let width = usize::from(area.width);
    buffer.set_style(Rect { height: 1, ..area }, look.bar);
    let (at, of) = review.place();
    let mut right = match of {
        0 => "no pair".to_owned(),
        _ => format!("{at} of {of}"),
    };
    if !review.filter.name().is_empty() {
        right.push_str(&format!(" {}", review.filter.name()));
    }
    if let Some(needle) = &review.needle {
        right.push_str(&format!(", “{}”", harmless::in_a_line(needle, 16)));
    }
    let order = format!("{right} · {}", review.ordered);
    // The order is told where the file's name has room beside it.
    if order.chars().count() + 16 <= width {
        right = order;
    }
    let right = harmless::in_a_line(&right, width.saturating_sub(2));
    let used = Line::raw(&*right).width();
    buffer.set_string((width - 1 - used) as u16, 0, &right, look.bar);
    if let Some(room) = width.checked_sub(used + 4).filter(|room| *room >= 8) {
        let name = std::path::Path::new(title).file_name();
        let name = name.map_or(title.into(), |name| name.to_string_lossy());
        let name = harmless::in_a_line(&name, room);
        buffer.set_string(1, 0, name, look.bar.add_modifier(Modifier::BOLD));
    }
}

/// The two texts and what is known of them.
fn pair(review: &Review, look: &Look, width: usize) -> Vec<Line<'static>> {
    let Some(row) = review.current() else {
        let text = match (&review.needle, review.filter.name()) {
            (Some(_), "") => "No pair holds that text. Esc shows all again.".to_owned(),
            (Some(_), name) => format!("No {name} pair holds that text. Esc shows all again."),
            (None, name) => format!("No pair is {name}. Esc shows all again."),
        };
        return indented(harmless::lines(&text, width - 2 * INDENT, look.texts, None));
    };
    let values = row.values();
    let texts = Texts {
        look,
        width: (width - INDENT - 1).min(MEASURE),
        needle: review.needle.as_deref(),
    };
    let mut lines = Vec::new();
    texts.add("TWEET", &facts(&values, "tweet"), &row.tweet, &mut lines);
    lines.push(Line::default());
    texts.add("REPLY", &facts(&values, "reply"), &row.reply, &mut lines);
    lines.push(Line::default());
    let rest = flow(&rest(row, &values), width - 2, look);
    lines.extend(rest.into_iter().map(|line| shift(line, 1)));
    lines
}

struct Texts<'a> {
    look: &'a Look,
    width: usize,
    needle: Option<&'a str>,
}

impl Texts<'_> {
    fn add(
        &self,
        label: &'static str,
        facts: &[String],
        text: &str,
        lines: &mut Vec<Line<'static>>,
    ) {
        let beside = 1 + label.len() + 2;
        let room = (self.width + INDENT).saturating_sub(beside).max(1);
        for (at, facts) in flow(facts, room, self.look).into_iter().enumerate() {
            let mut line = shift(facts, if at == 0 { 2 } else { beside });
            if at == 0 {
                line.spans.insert(0, Span::styled(label, self.look.label));
                line.spans.insert(0, Span::raw(" "));
            }
            lines.push(line);
        }
        let text = harmless::lines(text, self.width, self.look.texts, self.needle);
        lines.extend(indented(text));
    }
}

/// Facts one behind the other, on as few lines as hold each of them whole.
fn flow(facts: &[String], width: usize, look: &Look) -> Vec<Line<'static>> {
    let mut text = String::new();
    let mut used = 0;
    for fact in facts {
        let wide = Line::raw(harmless::in_a_line(fact, usize::MAX)).width();
        if used > 0 && used + 3 + wide > width {
            text.push('\n');
            used = 0;
        }
        if used > 0 {
            text.push_str(" · ");
            used += 3;
        }
        text.push_str(fact);
        used += wide;
    }
    let styles = Styles {
        plain: look.faint,
        ..look.texts
    };
    harmless::lines(&text, width, styles, None)
}

fn indented(lines: Vec<Line<'static>>) -> Vec<Line<'static>> {
    lines.into_iter().map(|line| shift(line, INDENT)).collect()
}

fn shift(mut line: Line<'static>, by: usize) -> Line<'static> {
    line.spans.insert(0, Span::raw(" ".repeat(by)));
    line
}

/// What a row has on one of its two texts.
fn facts(values: &Map<String, Value>, of: &str) -> Vec<String> {
    let validation = |name: &str| values.get("validation").and_then(|v| v.get(name));
    let own = |name: &str| values.get(&format!("{of}_{name}")).filter(|v| !v.is_null());
    let counted =
        |name: &str, noun: &str| own(name).map(|value| format!("{} {noun}", figure(value)));
    let there = |name: &str, noun: &str| {
        (own(name).filter(|value| value.as_u64() != Some(0)))
            .map(|value| format!("{} {noun}", figure(value)))
    };
    let language = match of {
        "reply" => validation("language").or(own("lang")),
        _ => own("lang"),
    };
    let facts = [
        counted("likes", "likes"),
        counted("author_followers", "followers"),
        counted("replies", "replies"),
        language.map(shown),
        own("created_at").map(|value| date(&shown(value))),
        there("media", "media"),
        there("urls", "links"),
        validation(&format!("{of}_toxicity")).map(|value| format!("toxicity {}", figure(value))),
    ];
    facts.into_iter().flatten().collect()
}

/// What it has on both.
fn rest(row: &Row, values: &Map<String, Value>) -> Vec<String> {
    let quality = values.get("validation").and_then(|v| v.get("quality"));
    let facts = [
        quality.map(|value| format!("quality {}", figure(value))),
        values
            .get("split")
            .map(|side| format!("split {}", shown(side))),
        values
            .get("source")
            .map(|source| format!("source {}", shown(source))),
        Some(format!("id {}", row.id)),
    ];
    facts.into_iter().flatten().collect()
}

/// `12,345`, `0.62`, or whatever it is.
fn figure(value: &Value) -> String {
    match (value.as_u64(), value.as_f64()) {
        (Some(whole), _) => {
            let digits = whole.to_string();
            let mut text = String::new();
            for (at, digit) in digits.chars().enumerate() {
                if at > 0 && (digits.len() - at).is_multiple_of(3) {
                    text.push(',');
                }
                text.push(digit);
            }
            text
        }
        (None, Some(number)) => {
            let text = format!("{number:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => shown(value),
    }
}

/// A time by RFC 3339 to the minute; another as it is.
fn date(text: &str) -> String {
    match (text.get(..10), text.get(10..11), text.get(11..16)) {
        (Some(day), Some("T"), Some(minute)) => format!("{day} {minute}"),
        _ => text.to_owned(),
    }
}

/// All fields of a row.
fn fields(review: &Review, look: &Look, width: usize) -> Vec<Line<'static>> {
    let Some(row) = review.current() else {
        return Vec::new();
    };
    let text = serde_json::to_string_pretty(&row.values()).unwrap_or_default();
    indented(harmless::lines(
        &text,
        width - INDENT - 1,
        look.texts,
        review.needle.as_deref(),
    ))
}

fn help(look: &Look) -> Vec<Line<'static>> {
    (HELP.iter())
        .map(|(keys, does)| {
            Line::from(vec![
                Span::styled(format!("  {keys:<9} "), look.label),
                Span::raw(*does),
            ])
        })
        .collect()
}

/// What is asked, with the answers that a number gives.
fn question(review: &Review, asked: Question, look: &Look, width: usize) -> Vec<Line<'static>> {
    let title = match asked {
        Question::Reason => "Why? A number or your own words, then Enter.",
        Question::Order => "Order by? A number or a field, then Enter.",
        Question::Search => return Vec::new(),
    };
    let mut lines = vec![Line::from(vec![
        Span::raw(" "),
        Span::styled(title, look.label),
    ])];
    for (number, choice) in (1..).zip(review.choices(asked)) {
        let choice = harmless::in_a_line(&choice, width.saturating_sub(6));
        lines.push(Line::from(vec![
            Span::styled(format!("  {number} "), look.label),
            Span::raw(choice),
        ]));
    }
    lines
}

/// What was said of the pair.
fn standing(review: &Review, look: &Look, width: usize) -> Line<'static> {
    let said = |decision: &Decision| {
        let reason = decision.reason.clone().unwrap_or_default();
        let at = decision.at.as_deref().map(date).unwrap_or_default();
        let both = [reason, at];
        both.into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(" · ")
    };
    let (word, style, more) = match review.standing() {
        _ if review.current().is_none() => return Line::default(),
        Standing::Undecided => ("undecided", look.faint, String::new()),
        Standing::Decided(decision) if decision.decision == Verdict::Reject => {
            ("REJECTED", look.bad, said(decision))
        }
        Standing::Decided(decision) => ("KEPT", look.good, said(decision)),
        Standing::Changed(decision) => {
            let was = match decision.decision {
                Verdict::Reject => "rejected",
                _ => "kept",
            };
            (
                "undecided",
                look.bad,
                format!("its texts have changed since it was {was}"),
            )
        }
    };
    let room = width.saturating_sub(word.len() + 4);
    Line::from(vec![
        Span::styled(format!(" {word}  "), style),
        Span::raw(harmless::in_a_line(&more, room)),
    ])
}

/// How far one has come.
fn progress(review: &Review, width: usize) -> String {
    let all = review.rows.len();
    let rejected = review.count(Verdict::Reject);
    let decided = review.count(Verdict::Keep) + rejected;
    let text = format!("decided {decided} of {all}, rejected {rejected}");
    let Some(room) = width.checked_sub(text.len() + 4).filter(|room| *room >= 6) else {
        return text;
    };
    let room = room.min(24);
    let done = decided * room / all;
    let head = if done > 0 && done < room { ">" } else { "" };
    let bar = format!("{}{head}", "=".repeat(done - head.len()));
    format!("[{bar:<room$}] {text}")
}

/// What is typed, a word on the last key, or the keys; where the cursor is, if it is shown.
fn last_line(
    review: &Review,
    look: &Look,
    y: u16,
    width: usize,
    buffer: &mut Buffer,
) -> Option<u16> {
    if let Some(note) = &review.note {
        let style = if note.is_bad { look.bad } else { look.label };
        set(buffer, 1, y, &note.text, style, width);
        return None;
    }
    let prompt = match &review.mode {
        Mode::Asking(Question::Reason, _) => "reason: ",
        Mode::Asking(Question::Order, _) => "field: ",
        Mode::Asking(Question::Search, _) => "/",
        Mode::Help | Mode::Fields => {
            set(
                buffer,
                1,
                y,
                "↓ ↑ scroll · any other key goes back",
                look.faint,
                width,
            );
            return None;
        }
        Mode::Pair => {
            let mut line = String::new();
            for hint in HINTS {
                let gap = if line.is_empty() { "" } else { "  " };
                if 1 + (line.chars().count() + gap.len() + hint.chars().count()) < width {
                    line.push_str(gap);
                    line.push_str(hint);
                }
            }
            set(buffer, 1, y, &line, look.faint, width);
            return None;
        }
    };
    let Mode::Asking(_, typed) = &review.mode else {
        return None;
    };
    buffer.set_string(1, y, prompt, look.label);
    let x = 1 + prompt.len();
    let room = width.checked_sub(x + 2).filter(|room| *room > 0)?;
    // The end of what is typed is what one looks at.
    let mut tail = typed.as_str();
    let mut shown = harmless::in_a_line(tail, usize::MAX);
    while Line::raw(&*shown).width() > room {
        let mut chars = tail.chars();
        chars.next();
        tail = chars.as_str();
        shown = harmless::in_a_line(tail, usize::MAX);
    }
    buffer.set_string(x as u16, y, &shown, Style::new());
    match shown.is_empty() {
        true => {
            let hint = "Esc goes back";
            if matches!(review.mode, Mode::Asking(Question::Reason, _)) && width >= 60 {
                set(
                    buffer,
                    x + 2,
                    y,
                    &format!("Enter alone gives none; {hint}"),
                    look.faint,
                    width,
                );
            } else {
                set(buffer, x + 2, y, hint, look.faint, width);
            }
            Some(x as u16)
        }
        false => Some((x + Line::raw(&*shown).width()) as u16),
    }
}
