//! What a text holds beside what it says: handles in front, links, characters that
//! show nothing, and the tokens that a chat template gives a meaning to; and the text
//! without how it was typed, or how it may be shown.

mod normalize;
pub mod shown;

use unicode_normalization::UnicodeNormalization;

pub use normalize::{fold, normalize};

/// The text after NFC, without the @names that a reply begins with and without
/// white space around it. Lengths are counted on this.
pub fn bare(text: &str) -> String {
    let composed: String = text.nfc().collect();
    let mut rest = composed.trim();
    while let Some(after) = handle(rest) {
        rest = after.trim_start();
    }
    rest.to_owned()
}

/// What follows a handle (`@`, then letters, digits or `_`) at the start. A
/// full stop in front (`.@name`) makes a reply public and belongs to it.
fn handle(text: &str) -> Option<&str> {
    let name = text.strip_prefix('@').or_else(|| text.strip_prefix(".@"))?;
    let end = name
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(name.len());
    (end > 0).then(|| &name[end..])
}

/// The words in lower case: runs of letters, digits and apostrophes.
pub fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '’')
        .filter(|word| !word.is_empty())
        .map(|word| word.replace('’', "'").to_lowercase())
}

/// Domains that stand in a text without `http` often enough to look for.
const DOMAINS: [&str; 16] = [
    "com", "org", "net", "io", "co", "ly", "me", "tv", "gg", "app", "dev", "info", "biz", "xyz",
    "gov", "edu",
];

/// The first link: a scheme, `www.`, or a host with a common ending
/// (`example.com`, `t.co/abc`).
pub fn link(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|token| {
        let start = token.find("://").map(|at| {
            token[..at]
                .rfind(|c: char| !c.is_ascii_alphanumeric())
                .map_or(0, |before| before + 1)
        });
        if let Some(start) = start {
            return Some(&token[start..]).filter(|url| url.len() > "://".len());
        }
        let trimmed = token.trim_matches(|c: char| !c.is_alphanumeric() && c != '/' && c != '@');
        let host = trimmed.split(['/', '?', ':']).next()?;
        if host.contains('@') {
            return None; // A mail address names a person's box, not a page; a path may hold one.
        }
        let (name, ending) = host.rsplit_once('.')?;
        let ending = ending.to_ascii_lowercase();
        let is_host = !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.');
        let www = host
            .get(..4)
            .is_some_and(|start| start.eq_ignore_ascii_case("www."));
        (is_host && (www || DOMAINS.contains(&ending.as_str()))).then_some(trimmed)
    })
}

/// A link under which Twitter shows a picture or a video.
pub fn media_link(text: &str) -> Option<&str> {
    let lower = text.to_ascii_lowercase();
    ["pic.twitter.com/", "pic.x.com/", "/photo/1", "/video/1"]
        .iter()
        .find_map(|&part| lower.find(part).map(|at| &text[at..at + part.len()]))
}

/// Tags that Qwen3's chat template and tokenizer give a meaning to, beside `<|…|>`.
const TAGS: [&str; 6] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
];

/// Bytes of the longest name in `<|…|>`: Qwen3's longest is `object_ref_start`, with 16, other
/// models' `reserved_special_token_250`, with 26.
const TOKEN_NAME: usize = 32;

/// A token that would end the turn, or open another, if the text were trained
/// on: `<|…|>` or one of the tags, also where it is hidden by what [`normalize`]
/// takes out later: white space, invisible characters, styled letters,
/// letters drawn out, the mark of a hashtag.
pub fn special_token(text: &str) -> Option<String> {
    let hides = |c: &char| c.is_whitespace() || c.is_control() || is_invisible(*c) || *c == '#';
    let visible: String = text.nfkc().filter(|c| !hides(c)).collect();
    let visible = visible.to_lowercase();
    let squeezed = squeeze(&visible);
    if let Some(tag) = TAGS.iter().find(|tag| squeezed.contains(&squeeze(tag))) {
        return Some((*tag).to_owned());
    }
    visible.match_indices("<|").find_map(|(at, _)| {
        let name = &visible[at + 2..];
        // No further than a name can reach: to look to the end of the text from every `<|` takes
        // hours where a text of megabytes holds nothing else.
        let near = &name.as_bytes()[..name.len().min(TOKEN_NAME + "|>".len())];
        let end = near.windows(2).position(|two| two == b"|>")?;
        (end > 0).then(|| format!("<|{}|>", &name[..end]))
    })
}

/// Each character once where it is repeated.
fn squeeze(text: &str) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    chars.dedup();
    chars.into_iter().collect()
}

/// Characters that show nothing: zero-width spaces and marks of direction. The
/// zero-width joiner is not among them, for emoji are built with it.
pub fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}' | '\u{200c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_in_front_do_not_count() {
        for (text, expected) in [
            ("@ann @bob_2 hello @cat", "hello @cat"),
            (".@ann hello", "hello"),
            ("@ann", ""),
            ("  @ann, hello", ", hello"),
            ("@ hello", "@ hello"),
            ("ann@example", "ann@example"),
            ("e\u{301}te\u{301}", "été"),
        ] {
            assert_eq!(bare(text), expected, "{text}");
        }
        assert_eq!(bare("e\u{301}te\u{301}").chars().count(), 3);
    }

    #[test]
    fn links_are_found_and_sentences_are_not() {
        for text in [
            "see https://example.org/a",
            "(http://x.yz)",
            "t.co/abc123",
            "www.example.xx",
            "read example.com!",
            "Example.COM/page?x=1",
            "look:https://a.b",
            "watch it on youtube.com/@channel",
            "(www.example.xx/@a)",
        ] {
            assert!(link(text).is_some(), "{text}");
        }
        for text in [
            "the end.No space after it",
            "I like node.js",
            "at 10.30 we go",
            "e.g. this",
            "a/b testing",
            "mail me at ann@example.com",
            "mail (ann@example.com/home)",
            "ask @ann.me, or www.ann@me",
            "3.5 stars",
            "wait... what",
            "://",
            "fine.me too? no: fine. me too",
        ] {
            // "fine.me" is a host by any rule that knows no context.
            assert_eq!(link(text).is_some(), text.starts_with("fine.me"), "{text}");
        }
        assert!(media_link("so good pic.twitter.com/AbC").is_some());
        assert!(media_link("a picture on twitter").is_none());
    }

    /// It took time by the square of the length: minutes for this text, which is a small part of
    /// what a line may hold.
    #[test]
    fn the_time_for_tokens_grows_with_the_text() {
        let begun = std::time::Instant::now();
        assert_eq!(special_token(&"<|".repeat(500_000)), None);
        assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
    }

    #[test]
    fn special_tokens_are_found_however_they_hide() {
        for text in [
            "bye<|im_end|>",
            "<|IM_START|>system",
            "a < | im_end | > b",
            "<|im_\u{200b}end|>",
            "<think>hm",
            "< /tool_call>",
            "<#think>",
            "<𝐭𝐡𝐢𝐧𝐤>",
            "<|𝐞𝐧𝐝𝐨𝐟𝐭𝐞𝐱𝐭|>",
            "<toooool_call>",
            "<|<|<|im_end|>",
            "<|an_invented_name_of_32_character|>",
        ] {
            assert!(special_token(text).is_some(), "{text}");
        }
        for text in [
            "a <b> |> c",
            "x <| y",
            "<||>",
            "<|an_invented_name_of_33_characters|>",
            "<|ünvented_names_of_characters_of_2|>",
            "I think so",
            "1 < 2 | 3 > 2 and that is that, is it not, or is it",
        ] {
            assert_eq!(special_token(text), None, "{text}");
        }
    }
}
