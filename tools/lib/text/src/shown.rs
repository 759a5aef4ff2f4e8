//! Texts of strangers where they are shown.

/// Each character of a text with its place in bytes, and whether it is one that is not to be
/// shown as it is: it controls what stands around it, or hides. A line's end is none.
///
/// Joiners and variation selectors build emoji and Persian words: one behind a letter or sign
/// outside ASCII stays, as many as hide a message do not.
pub fn chars(text: &str) -> impl Iterator<Item = (usize, char, bool)> {
    let mut joins = false;
    text.char_indices().map(move |(at, c)| {
        let joiner = matches!(c, '\u{200c}' | '\u{200d}' | '\u{fe0e}' | '\u{fe0f}');
        let hidden = if joiner { !joins } else { hides(c) };
        // `#️⃣` and `1️⃣` are a sign of ASCII and a selector; a joiner may follow a selector.
        joins = match joiner {
            true => c == '\u{fe0f}' && !hidden,
            false => !hidden && (!c.is_ascii() || matches!(c, '#' | '*' | '0'..='9')),
        };
        (at, c, hidden)
    })
}

/// Whether a character shows nothing, or changes how others are shown. Beside controls these
/// are Unicode's default ignorable ones (DerivedCoreProperties.txt), its format characters of
/// direction and annotation, and the separators of lines.
fn hides(c: char) -> bool {
    c != '\n'
        && (c.is_control()
            || matches!(c,
                '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
                | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_controls_or_hides_is_told_from_what_builds_words() {
        let shown = |text: &str| -> String {
            let shown = chars(text).filter(|(.., hidden)| !hidden);
            shown.map(|(_, c, _)| c).collect()
        };
        for (text, rest) in [
            ("a\u{1b}[31m\u{202e}b\tc\nd", "a[31mbc\nd"),
            ("a\u{200d}b\u{200d}\u{200d}", "ab"),
            ("\u{e0041}x\u{2028}\u{feff}", "x"),
        ] {
            assert_eq!(shown(text), rest);
        }
        for text in ["👩‍👩‍👧 ❤️ 1️⃣ 👍🏽", "می‌خواهم", "नमस्ते", "שלום"]
        {
            assert_eq!(shown(text), text);
        }
    }
}
