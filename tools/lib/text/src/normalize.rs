//! The form of a text that training uses, duplicates are found by, and what a model
//! writes is compared in.
//!
//! It takes out how a text was typed and keeps what it says: case, emoji and
//! punctuation stay. Composed letters (NFC), styled letters back to plain ones,
//! straight quotes, no invisible characters, single spaces, no @names in front,
//! hashtags as words (`#GoodDay` → `Good Day`), letters at most twice in a row
//! (`sooooo` → `soo`) and marks at most three times (`!!!!!!` → `!!!`).
//!
//! Not NFKC: that would turn ² into 2 and ™ into TM, and a full-width `＜｜im_end｜＞`
//! into a token with which a stranger could end a turn of the chat.

use unicode_normalization::UnicodeNormalization;

use crate::is_invisible;

/// Normalises a text. A text that would be left empty stays as it is, trimmed.
pub fn normalize(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.nfc() {
        match c {
            '‘' | '’' | '‚' | '‛' | '′' | 'ʼ' => plain.push('\''),
            '“' | '”' | '„' | '‟' | '″' | '«' | '»' => plain.push('"'),
            '…' => plain.push_str("..."),
            c if is_invisible(c) => {}
            c if c.is_control() => plain.push(' '),
            c => plain.push(unstyled(c)),
        }
    }
    let words = plain
        .split_whitespace()
        .skip_while(|word| is_handle(word))
        .map(|word| shorten(&unhash(word)));
    let normal = words.collect::<Vec<_>>().join(" ");
    if normal.is_empty() {
        text.trim().to_owned()
    } else {
        normal
    }
}

/// What two texts have in common when they differ in case alone.
pub fn fold(normal: &str) -> String {
    // By way of upper case, ß is ss and ſ is s, as in Unicode's case folding; ẞ
    // has to be a small letter first.
    normal.to_lowercase().to_uppercase().to_lowercase()
}

/// `@name`, as a reply begins, with or without a mark after it.
fn is_handle(word: &str) -> bool {
    let name = word.strip_prefix('@').or_else(|| word.strip_prefix(".@"));
    name.map(|name| name.trim_end_matches([',', ':', '.', '!', '?']))
        .is_some_and(|name| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        })
}

/// The plain letter or digit behind a mathematical or full-width one.
fn unstyled(c: char) -> char {
    if !matches!(c, '\u{1d400}'..='\u{1d7ff}' | '\u{ff10}'..='\u{ff19}' | '\u{ff21}'..='\u{ff3a}' | '\u{ff41}'..='\u{ff5a}')
    {
        return c;
    }
    let mut plain = std::iter::once(c).nfkc();
    match (plain.next(), plain.next()) {
        (Some(plain), None) => plain,
        _ => c,
    }
}

/// A hashtag as the words it is made of; any other word as it is.
fn unhash(word: &str) -> String {
    let Some(start) = word.find('#') else {
        return word.to_owned();
    };
    let (before, tag) = (&word[..start], &word[start + 1..]);
    let end = tag
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(tag.len());
    let (tag, after) = tag.split_at(end);
    // `C#`, `#1` and `a#b` are no hashtags.
    if before.ends_with(char::is_alphanumeric) || !tag.contains(char::is_alphabetic) {
        return word.to_owned();
    }
    let mut words = String::from(before);
    let mut last: Option<char> = None;
    for c in tag.chars().map(|c| if c == '_' { ' ' } else { c }) {
        if c.is_uppercase() && last.is_some_and(|last| last.is_lowercase() || last.is_numeric()) {
            words.push(' ');
        }
        words.push(c);
        last = Some(c);
    }
    words.push_str(after);
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Letters at most twice in a row, marks three times; digits as they are. Short
/// words in capitals stay, for `III` and `AAA` are names.
fn shorten(words: &str) -> String {
    words
        .split(' ')
        .map(shorten_word)
        .collect::<Vec<_>>()
        .join(" ")
}

fn shorten_word(word: &str) -> String {
    let letters = || word.chars().filter(|c| c.is_alphabetic());
    let is_name = letters().count() <= 4 && letters().all(char::is_uppercase);
    let mut short = String::with_capacity(word.len());
    let (mut last, mut run) = (None, 0);
    for c in word.chars() {
        let folded = c.to_lowercase().next();
        run = if folded == last { run + 1 } else { 1 };
        last = folded;
        let most = match c {
            _ if c.is_numeric() => usize::MAX,
            _ if c.is_alphabetic() && is_name => usize::MAX,
            _ if c.is_alphabetic() => 2,
            _ => 3,
        };
        if run <= most {
            short.push(c);
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::{fold, normalize};

    #[test]
    fn typing_goes_and_meaning_stays() {
        for (text, expected) in [
            ("Sooooo goooood!!!!!!!", "Soo good!!!"),
            ("NOOOOO way", "NOO way"),
            ("@ann @bob_2, thanks @cat", "thanks @cat"),
            (".@ann thanks", "thanks"),
            (
                "what a #GoodDay, #tea #BLM #Covid19Test #two_words!",
                "what a Good Day, tea BLM Covid19 Test two words!",
            ),
            ("C# is #1 and a#b is not", "C# is #1 and a#b is not"),
            (
                "Rocky III cost 1000000 at AAA",
                "Rocky III cost 1000000 at AAA",
            ),
            ("a \u{a0} b\n\tc  ", "a b c"),
            ("“so” it’s…", "\"so\" it's..."),
            ("e\u{301}te\u{301} \u{200b}x\u{feff}y", "été xy"),
            ("𝐇𝐞𝐥𝐥𝐨 ｗｏｒｌｄ x² ™", "Hello world x² ™"),
            ("😂😂😂😂😂 👩‍👩‍👧 ok", "😂😂😂 👩‍👩‍👧 ok"),
            ("＜｜im_end｜＞", "＜｜im_end｜＞"),
            ("@ann", "@ann"),
            ("  ", ""),
        ] {
            assert_eq!(normalize(text), expected, "{text:?}");
        }
    }

    #[test]
    fn normalising_again_changes_nothing() {
        for text in [
            "@a #SoooGood_day!!!! 𝐇𝐞𝐲  “you”…",
            "NOOOO #AAAA ###",
            "a\u{200b}@b",
            "½ #½ #Ünïcode",
        ] {
            let once = normalize(text);
            assert_eq!(normalize(&once), once, "{text:?}");
        }
    }

    #[test]
    fn folding_ignores_case_alone() {
        assert_eq!(fold("GROẞE Straße"), fold("grosse STRASSE"));
        assert_eq!(fold("ΟΔΟΣ"), fold("οδος"));
        assert_ne!(fold("résumé"), fold("resume"));
    }
}
