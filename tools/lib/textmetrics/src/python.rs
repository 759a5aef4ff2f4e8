//! What Python's `str` means by white space, which the reference tools inherit.

/// `str.isspace` for one character: Unicode white space and the four ASCII
/// information separators, which Rust does not count.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `str.split()`.
pub fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}
