//! Texts of strangers, so that a terminal shows what they hold and obeys none of it: what
//! controls, reorders or hides becomes a visible mark, such as `<U+202E>`. Every text goes
//! this way onto the screen.

use ratatui::style::Style;
use ratatui::text::{Line, Span};
use unicode_segmentation::UnicodeSegmentation;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Marks on one letter that are let through; more would be drawn over the lines around it.
const MARKS: usize = 6;

/// What is set as one: a character with its marks, or the sign for what is not let through.
struct Piece {
    text: String,
    width: usize,
    style: Style,
    is_space: bool,
    /// One of those that a line may be broken beside, as Chinese and Japanese ones.
    is_wide: bool,
}

impl Piece {
    fn new(text: impl Into<String>, style: Style) -> Self {
        let text = text.into();
        Self {
            width: text.width(),
            is_space: text == " ",
            is_wide: text.chars().next().and_then(UnicodeWidthChar::width) == Some(2),
            text,
            style,
        }
    }
}

/// How texts are set.
#[derive(Clone, Copy)]
pub struct Styles {
    /// Of the text.
    pub plain: Style,
    /// Of the signs for what is not let through.
    pub mark: Style,
    /// Of what was searched for.
    pub found: Style,
}

/// A text in lines of at most `width` columns, broken between words where that can be.
pub fn lines(text: &str, width: usize, styles: Styles, needle: Option<&str>) -> Vec<Line<'static>> {
    let found = needle.map_or_else(Vec::new, |needle| find(text, needle));
    let mut lines = Vec::new();
    let mut line: Vec<Piece> = Vec::new();
    // Columns of the line, and of it without the spaces at its end.
    let (mut all, mut used) = (0, 0);
    for piece in pieces(text, styles, &found) {
        let Some(piece) = piece else {
            lines.push(std::mem::take(&mut line));
            (all, used) = (0, 0);
            continue;
        };
        all += piece.width;
        used = if piece.is_space { used } else { all };
        line.push(piece);
        // A sign that is wider than all of the line is cut by the screen.
        while line.len() > 1 && used > width {
            let rest = line.split_off(break_before(&line, width));
            lines.push(std::mem::replace(&mut line, rest));
            all = line.iter().map(|piece| piece.width).sum();
            used = width_of(&line);
        }
    }
    lines.push(line);
    lines.into_iter().map(joined).collect()
}

/// A text as it may stand within a line, ends of lines as marks, cut to `width` columns.
pub fn in_a_line(text: &str, width: usize) -> String {
    let pieces: Vec<Piece> = (pieces(text, Styles::none(), &[]).into_iter())
        .map(|piece| piece.unwrap_or_else(|| Piece::new("<U+000A>", Style::new())))
        .collect();
    if width_of(&pieces) <= width {
        return pieces.iter().map(|piece| &*piece.text).collect();
    }
    let mut shown = String::new();
    let mut left = width.saturating_sub(1);
    for piece in pieces {
        if piece.width > left {
            break;
        }
        left -= piece.width;
        shown.push_str(&piece.text);
    }
    shown.push('…');
    shown
}

impl Styles {
    fn none() -> Self {
        Self {
            plain: Style::new(),
            mark: Style::new(),
            found: Style::new(),
        }
    }
}

/// Where a text holds another, whatever the case: byte ranges that do not overlap.
pub fn find(text: &str, needle: &str) -> Vec<std::ops::Range<usize>> {
    let folded = |c: char| c.to_lowercase().next().unwrap_or(c);
    let needle: Vec<char> = needle.chars().map(folded).collect();
    let text: Vec<(usize, char)> = text.char_indices().map(|(at, c)| (at, folded(c))).collect();
    let end = |at: usize| text.get(at).map_or(usize::MAX, |(byte, _)| *byte);
    let mut found = Vec::new();
    let mut at = 0;
    while !needle.is_empty() && at + needle.len() <= text.len() {
        let here = text[at..at + needle.len()].iter().map(|(_, c)| c);
        if here.eq(&needle) {
            found.push(text[at].0..end(at + needle.len()));
            at += needle.len();
        } else {
            at += 1;
        }
    }
    found
}

fn width_of(line: &[Piece]) -> usize {
    // A space at the end needs no room.
    let end = line
        .iter()
        .rposition(|p| !p.is_space)
        .map_or(0, |at| at + 1);
    line[..end].iter().map(|piece| piece.width).sum()
}

/// Where a line that is too wide is broken: behind the last space or wide character that
/// leaves it narrow enough, else within the word.
fn break_before(line: &[Piece], width: usize) -> usize {
    let mut most = 0;
    let mut used = 0;
    for piece in line {
        used += piece.width;
        if used > width {
            break;
        }
        most += 1;
    }
    let most = most.max(1);
    let ends = |at: &usize| {
        let (before, after) = (&line[at - 1], &line[*at]);
        !after.is_space && (before.is_space || before.is_wide || after.is_wide)
    };
    // Spaces that hang over the edge end the line too.
    let hang = line[most..].iter().take_while(|piece| piece.is_space);
    let most = (most + hang.count()).min(line.len() - 1).max(1);
    (1..=most).rev().find(ends).unwrap_or(most)
}

fn joined(pieces: Vec<Piece>) -> Line<'static> {
    let mut spans: Vec<Span<'static>> = Vec::new();
    for piece in pieces {
        match spans.last_mut() {
            Some(span) if span.style == piece.style => span.content.to_mut().push_str(&piece.text),
            _ => spans.push(Span::styled(piece.text, piece.style)),
        }
    }
    Line::from(spans)
}

/// The pieces of a text; `None` is the end of a line.
fn pieces(text: &str, styles: Styles, found: &[std::ops::Range<usize>]) -> Vec<Option<Piece>> {
    let mut pieces = Vec::new();
    let mut run = String::new();
    let mut begun = 0;
    let mut next = found;
    let mut flush = |run: &mut String, begun: usize, pieces: &mut Vec<Option<Piece>>| {
        let mut at = begun;
        for cluster in run.graphemes(true) {
            // Those before are done with, for a text goes by in order.
            while next.first().is_some_and(|range| range.end <= at) {
                next = &next[1..];
            }
            let style = match next.first().is_some_and(|range| range.contains(&at)) {
                true => styles.found,
                false => styles.plain,
            };
            at += cluster.len();
            set(cluster, style, styles.mark, pieces);
        }
        run.clear();
    };
    let text_of = |c: char| format!("<U+{:04X}>", u32::from(c));
    let mut chars = text::shown::chars(text).peekable();
    while let Some((at, c, hidden)) = chars.next() {
        let is_end = c == '\r' && chars.peek().is_some_and(|(_, next, _)| *next == '\n');
        if c != '\n' && !hidden {
            if run.is_empty() {
                begun = at;
            }
            run.push(c);
            continue;
        }
        flush(&mut run, begun, &mut pieces);
        match c {
            _ if is_end => {}
            '\n' => pieces.push(None),
            _ => pieces.push(Some(Piece::new(text_of(c), styles.mark))),
        }
    }
    flush(&mut run, begun, &mut pieces);
    pieces
}

/// Sets a character with its marks.
fn set(cluster: &str, style: Style, mark: Style, pieces: &mut Vec<Option<Piece>>) {
    let count = cluster.chars().count();
    let marks = (cluster.chars().skip(1))
        .filter(|&c| c != '\u{200d}' && c.width() == Some(0))
        .count();
    if marks > MARKS {
        let shown: String = cluster.chars().take(1 + MARKS).collect();
        set(&shown, style, mark, pieces);
        let more = format!("<+{} marks>", count - 1 - MARKS);
        pieces.push(Some(Piece::new(more, mark)));
        return;
    }
    // A mark that stands on nothing would go onto what is left of it.
    match cluster.width() {
        0 => pieces.push(Some(Piece::new(format!("◌{cluster}"), style))),
        _ => pieces.push(Some(Piece::new(cluster, style))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, width: usize) -> Vec<String> {
        let lines = lines(text, width, Styles::none(), None);
        lines.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn words_stay_whole_where_that_can_be() {
        assert_eq!(shown("one two three", 8), ["one two ", "three"]);
        assert_eq!(shown("one two three", 7), ["one two ", "three"]);
        assert_eq!(shown("one two three", 6), ["one ", "two ", "three"]);
        assert_eq!(shown("unbreakable", 4), ["unbr", "eaka", "ble"]);
        assert_eq!(shown("a\r\n\nb\n", 9), ["a", "", "b", ""]);
        assert_eq!(shown("", 9), [""]);
        // Each is two columns wide and may begin a line.
        assert_eq!(shown("春眠不覚暁", 5), ["春眠", "不覚", "暁"]);
        assert_eq!(shown("a  b   c", 3), ["a  ", "b   ", "c"]);
        for width in 1..12 {
            let text = "sun 🌞 and 春眠不覚暁, ever so slowly   drawn-out é\u{301}";
            let whole: String = shown(text, width).concat();
            assert_eq!(whole, text, "{width}");
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(
            shown("a\u{1b}[31m\u{202e}b\tc\u{9b}2J\rd", 99),
            ["a<U+001B>[31m<U+202E>b<U+0009>c<U+009B>2J<U+000D>d"]
        );
        assert_eq!(shown("a\u{200d}b", 99), ["a<U+200D>b"]);
        assert_eq!(shown("\u{301}a", 99), ["◌\u{301}a"]);
        assert_eq!(in_a_line("a\nb", 99), "a<U+000A>b");
        assert_eq!(in_a_line("abcdef", 4), "abc…");
        assert_eq!(in_a_line("春眠不覚暁", 4), "春…");
        for text in ["👩‍👩‍👧 ❤️ 1️⃣ 👍🏽", "می‌خواهم", "नमस्ते", "שלום"]
        {
            assert_eq!(shown(text, 99), [text]);
        }
        let piled = format!("Z{}", "\u{335}".repeat(40));
        assert_eq!(
            shown(&piled, 99),
            [format!("Z{}<+34 marks>", "\u{335}".repeat(6))]
        );
    }

    #[test]
    fn what_is_searched_for_is_found_whatever_its_case() {
        let found = |text: &'static str, needle: &str| {
            let ranges = find(text, needle).into_iter();
            let ends = ranges.map(|range| &text[range.start..range.end.min(text.len())]);
            ends.collect::<Vec<_>>()
        };
        assert_eq!(found("Tea, TEA and teapot", "tea"), ["Tea", "TEA", "tea"]);
        assert_eq!(found("ÉTÉ été", "été"), ["ÉTÉ", "été"]);
        assert!(found("aaa", "").is_empty() && found("a", "aa").is_empty());
    }
}
