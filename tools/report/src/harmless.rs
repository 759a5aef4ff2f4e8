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
    for (_, c, hidden) in text::shown::chars(name) {
        match c {
            '\n' => shown.push_str("\\n"),
            '\t' => shown.push_str("\\t"),
            _ if hidden => shown.extend(c.escape_unicode()),
            _ => shown.push(c),
        }
    }
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
    for (_, c, hidden) in text::shown::chars(text) {
        match parts.last_mut() {
            _ if hidden && c != '\t' => parts.push(Part {
                text: String::new(),
                mark: Some(format!("U+{:04X}", u32::from(c))),
            }),
            Some(Part { text, mark: None }) => text.push(c),
            _ => parts.push(Part {
                text: c.into(),
                mark: None,
            }),
        }
    }
    parts
}
