//! Texts of strangers, so that they show what they hold and do nothing to what stands
//! around them: no control character, no mark that reorders or hides, goes out as it is.

use serde::Serialize;

/// A piece of a text: `text` as it was, or the `mark` that stands for a character.
#[derive(Serialize)]
pub struct Part {
    text: String,
    mark: Option<String>,
}

/// A name as it may stand within a line.
pub fn plain(name: &str) -> String {
    let mut shown = String::with_capacity(name.len());
    each(name, |c, hidden| match c {
        '\n' => shown.push_str("\\n"),
        '\t' => shown.push_str("\\t"),
        _ if hidden => shown.extend(c.escape_unicode()),
        _ => shown.push(c),
    });
    shown
}

/// A name of at most so many characters.
pub fn short(name: &str, most: usize) -> String {
    let name = plain(name);
    if name.chars().count() <= most {
        return name;
    }
    name.chars().take(most - 1).chain(['…']).collect()
}

/// A text, whose hidden characters are marks, such as `U+202E`.
pub fn parts(text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    each(text, |c, hidden| match parts.last_mut() {
        _ if hidden => parts.push(Part {
            text: String::new(),
            mark: Some(format!("U+{:04X}", u32::from(c))),
        }),
        Some(Part { text, mark: None }) => text.push(c),
        _ => parts.push(Part {
            text: c.into(),
            mark: None,
        }),
    });
    parts
}

/// Each character, and whether it is one that is not to be let through. Joiners and variation
/// selectors build emoji and Persian words: one behind a letter or sign outside ASCII stays,
/// as many as hide a message do not.
fn each(text: &str, mut see: impl FnMut(char, bool)) {
    let mut joins = false;
    for c in text.chars() {
        let joiner = matches!(c, '\u{200c}' | '\u{200d}' | '\u{fe0e}' | '\u{fe0f}');
        let keycap = c == '\u{fe0f}';
        let hidden = match joiner {
            true => !joins,
            false => hides(c),
        };
        // `#️⃣` and `1️⃣` are a sign of ASCII and a selector; a joiner may follow a selector.
        joins = match joiner {
            true => keycap && !hidden,
            false => !hidden && (!c.is_ascii() || matches!(c, '#' | '*' | '0'..='9')),
        };
        see(c, hidden);
    }
}

/// Whether a character shows nothing, or changes how others are shown. Beside controls these
/// are Unicode's default ignorable ones (DerivedCoreProperties.txt), its format characters of
/// direction and annotation, and the separators of lines.
fn hides(c: char) -> bool {
    if c == '\n' || c == '\t' {
        return false;
    }
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}
