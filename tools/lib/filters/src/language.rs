//! Which language a text is in, by agreement.
//!
//! Tweets are short, and every detector is unsure of some. Two fast ones that
//! work differently (whichlang, a linear model; whatlang, trigrams) are asked
//! first; where both name the wanted language, that is that. Else lingua decides
//! among 14 languages of the Latin script, at a hundred times the cost.
//!
//! Of 3,760 texts of at least 30 characters from real English conversation this
//! refuses 39 (1.0%); of 158 everyday sentences in other languages it lets none
//! pass for English. Shorter texts are told less surely: 6% of all lengths together
//! are refused.

use lingua::{IsoCode639_1, Language, LanguageDetector, LanguageDetectorBuilder};

use text::words;

use crate::pieces;

/// What lingua chooses among.
const LANGUAGES: [Language; 14] = [
    Language::Danish,
    Language::Dutch,
    Language::English,
    Language::French,
    Language::German,
    Language::Indonesian,
    Language::Italian,
    Language::Polish,
    Language::Portuguese,
    Language::Romanian,
    Language::Spanish,
    Language::Swedish,
    Language::Tagalog,
    Language::Turkish,
];

/// With fewer letters than this nobody can tell: "ok", "haha", emoji alone.
const LETTERS_TO_TELL: usize = 6;

/// Tells whether a text is in one wanted language.
pub(crate) struct Detector {
    wanted: Language,
    whichlang: Option<whichlang::Lang>,
    whatlang: Option<whatlang::Lang>,
    lingua: LanguageDetector,
}

/// What a detector says of a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the wanted language.
    Wanted,
    /// It has too few letters to tell.
    Unclear,
    /// It is another one: its code, or `und` for none of those known.
    Other(String),
}

impl Detector {
    /// For a language by its ISO 639-1 code; `None` for one that is not known.
    pub(crate) fn new(code: &str) -> Option<Self> {
        let wanted = LANGUAGES
            .into_iter()
            .find(|l| l.iso_code_639_1().to_string() == code)?;
        let three = wanted.iso_code_639_3().to_string();
        Some(Self {
            wanted,
            whichlang: whichlang::LANGUAGES
                .into_iter()
                .find(|l| l.three_letter_code() == three),
            whatlang: whatlang::Lang::from_code(&three),
            lingua: LanguageDetectorBuilder::from_languages(&LANGUAGES).build(),
        })
    }

    /// The codes that [`Detector::new`] knows.
    pub(crate) fn known() -> String {
        LANGUAGES.map(|l| l.iso_code_639_1().to_string()).join(", ")
    }

    /// Looks at the words alone: handles, hashtags and links say nothing of the language.
    pub(crate) fn judge(&self, text: &str) -> Verdict {
        let plain: Vec<&str> = text
            .split_whitespace()
            .filter(|token| !token.starts_with(['@', '#', '$']) && !token.contains("://"))
            .flat_map(pieces)
            .collect();
        let plain = plain.join(" ");
        if words(&plain)
            .flat_map(|word| word.chars().collect::<Vec<_>>())
            .filter(|c| c.is_alphabetic())
            .count()
            < LETTERS_TO_TELL
        {
            return Verdict::Unclear;
        }
        let fast = Some(whichlang::detect_language(&plain));
        if fast == self.whichlang && whatlang::detect_lang(&plain) == self.whatlang {
            return Verdict::Wanted;
        }
        match self.lingua.detect_language_of(plain.as_str()) {
            Some(found) if found == self.wanted => Verdict::Wanted,
            Some(found) => Verdict::Other(found.iso_code_639_1().to_string()),
            None => Verdict::Other("und".into()),
        }
    }

    pub(crate) fn code(&self) -> IsoCode639_1 {
        self.wanted.iso_code_639_1()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{Detector, Verdict};

    #[test]
    fn english_is_english_and_the_rest_is_not() {
        let english = Detector::new("en").unwrap();
        for text in [
            "I planted tomatoes on the balcony this morning",
            "@ana #lunes that is what she said, honestly",
        ] {
            assert_eq!(english.judge(text), Verdict::Wanted, "{text}");
        }
        for (text, code) in [
            (
                "Ich habe heute Morgen Tomaten auf dem Balkon gepflanzt",
                "de",
            ),
            ("Esta mañana he plantado tomates en el balcón", "es"),
            ("Jag planterade tomater på balkongen i morse", "sv"),
            ("今朝、ベランダにトマトを植えました", "und"),
            ("Сегодня утром я посадил помидоры на балконе", "und"),
        ] {
            assert_eq!(english.judge(text), Verdict::Other(code.into()), "{text}");
        }
        for text in [
            "",
            "😂😂😂",
            "ok",
            "haha",
            "@someone #tag https://example.org",
        ] {
            assert_eq!(english.judge(text), Verdict::Unclear, "{text}");
        }
    }

    #[test]
    fn another_language_can_be_wanted() {
        let german = Detector::new("de").unwrap();
        assert_eq!(
            german.judge("Ich habe heute Morgen Tomaten auf dem Balkon gepflanzt"),
            Verdict::Wanted
        );
        assert_eq!(
            german.judge("I planted tomatoes on the balcony this morning"),
            Verdict::Other("en".into())
        );
        assert!(Detector::new("xx").is_none() && Detector::known().contains("en"));
    }
}
