//! What a person said of the pairs: lines of a file that only grows, of which the last one
//! about a pair counts. Each holds a hash of the texts that were looked at, so that nothing
//! is thrown out, or kept, for what it said before it changed.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use cli::Failure;
use record::name_of;
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It may be trained on.
    Keep,
    /// It may not.
    Reject,
    /// What was said before was taken back.
    Undecided,
}

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    #[serde(default = "version")]
    v: u64,
    /// The pair's.
    #[serde(deserialize_with = "record::text_id")]
    pub id: String,
    /// What was said.
    pub decision: Verdict,
    /// Why it was rejected, if a reason was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// [`hash`] of the texts that were looked at; without it, whatever they are is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// When, by RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

fn version() -> u64 {
    record::VERSION
}

impl Decision {
    /// One that is made now.
    pub fn new(id: &str, text: &str, decision: Verdict, reason: Option<String>) -> Self {
        let now = OffsetDateTime::now_utc();
        let now = now.replace_nanosecond(0).unwrap_or(now);
        Self {
            v: record::VERSION,
            id: id.to_owned(),
            decision,
            reason,
            text: Some(text.to_owned()),
            at: now.format(&Rfc3339).ok(),
        }
    }
}

/// A short name of two texts: 64 bits of [`name_of`] them, in hex.
pub fn hash(tweet: &str, reply: &str) -> String {
    let mut name = name_of(json!([tweet, reply]));
    name.truncate(16);
    name
}

/// How a pair stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing<'a> {
    /// Nobody has said anything.
    Undecided,
    /// Kept or rejected.
    Decided(&'a Decision),
    /// It was kept or rejected with other texts.
    Changed(&'a Decision),
}

/// All decisions, by id.
#[derive(Default)]
pub struct Decisions {
    /// Of an id, one for each of the texts that it had, the newest last.
    by_id: HashMap<String, Vec<Decision>>,
}

impl Decisions {
    /// The decisions of a file's whole lines.
    ///
    /// # Errors
    /// A line that is none (exit 3).
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self, Failure> {
        let mut all = Self::default();
        for (number, line) in jsonl::journal_lines(bytes) {
            let bad = |cause: String| {
                let path = path.display();
                Failure::Input(format!(
                    "{path}:{number}: no decision: {cause}; mend or delete this one line, all others stay"
                ))
            };
            if line.is_empty() {
                continue;
            }
            // First: a newer version may hold what this one cannot read.
            let text = str::from_utf8(line).map_err(|_| bad("not valid UTF-8".into()))?;
            record::Record::parse(text).map_err(|e| bad(e.to_string()))?;
            let decision = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
            all.add(decision);
        }
        Ok(all)
    }

    /// Adds what was said last.
    pub fn add(&mut self, decision: Decision) {
        let of_id = self.by_id.entry(decision.id.clone()).or_default();
        match decision.text {
            Some(_) => of_id.retain(|had| had.text != decision.text),
            None => of_id.clear(),
        }
        of_id.push(decision);
    }

    /// How the pair `id` with the texts of this [`hash`] stands.
    pub fn of(&self, id: &str, text: &str) -> Standing<'_> {
        let said = self.by_id.get(id).map_or(&[][..], Vec::as_slice);
        let about = |hash: Option<&str>| said.iter().find(|said| said.text.as_deref() == hash);
        let is_one = |said: &&Decision| said.decision != Verdict::Undecided;
        match about(Some(text)).or_else(|| about(None)) {
            Some(said) if is_one(&said) => Standing::Decided(said),
            Some(_) => Standing::Undecided,
            None => (said.iter().rfind(is_one)).map_or(Standing::Undecided, Standing::Changed),
        }
    }

    /// Ids that were decided on, in their order.
    pub fn ids(&self) -> Vec<&str> {
        let decided = self.by_id.iter().filter(|(_, said)| {
            let mut said = said.iter();
            said.any(|said| said.decision != Verdict::Undecided)
        });
        let mut ids: Vec<&str> = decided.map(|(id, _)| &**id).collect();
        ids.sort_unstable();
        ids
    }

    /// A name for all that decides which rows go; `None` where none does. When it was said,
    /// and why, decides nothing, nor does what is kept.
    pub fn rejected(&self) -> Option<String> {
        let any = |said: &[Decision]| said.iter().any(|said| said.decision == Verdict::Reject);
        let with_any: BTreeMap<&str, Vec<_>> = (self.by_id.iter())
            .filter(|(_, said)| any(said))
            .map(|(id, said)| {
                let mut said: Vec<_> = (said.iter())
                    .map(|said| (&said.text, said.decision == Verdict::Reject))
                    .collect();
                said.sort_unstable();
                (&**id, said)
            })
            .collect();
        (!with_any.is_empty()).then(|| name_of(json!(with_any)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(lines: &str) -> Result<Decisions, String> {
        Decisions::read(Path::new("f"), lines.as_bytes()).map_err(|e| e.to_string())
    }

    fn verdict(all: &Decisions, id: &str, text: &str) -> Option<Verdict> {
        match all.of(id, text) {
            Standing::Decided(said) => Some(said.decision),
            _ => None,
        }
    }

    #[test]
    fn the_last_decision_on_a_text_counts() {
        let all = read(concat!(
            "{\"id\":1,\"decision\":\"keep\",\"text\":\"a\"}\n",
            "{\"v\":1,\"id\":\"1\",\"decision\":\"reject\",\"reason\":\"r\",\"text\":\"a\",\"x\":[]}\n",
            "{\"id\":\"2\",\"decision\":\"reject\",\"text\":\"a\"}\n",
            "{\"id\":\"2\",\"decision\":\"undecided\",\"text\":\"a\"}\n",
            "{\"id\":\"3\",\"decision\":\"keep\",\"text\":\"a\"}\n",
            "{\"id\":\"3\",\"decision\":\"reject\"}\n",
        ));
        let all = all.unwrap();
        assert_eq!(verdict(&all, "1", "a"), Some(Verdict::Reject));
        assert!(matches!(all.of("1", "b"), Standing::Changed(said) if said.id == "1"));
        assert_eq!(all.of("2", "a"), Standing::Undecided);
        assert_eq!(all.of("2", "b"), Standing::Undecided);
        // Without a hash it is about every text.
        assert_eq!(verdict(&all, "3", "a"), Some(Verdict::Reject));
        assert_eq!(verdict(&all, "3", "b"), Some(Verdict::Reject));
        assert_eq!(all.ids(), ["1", "3"]);
    }

    /// Pairs of the same id with different texts are decided on apart.
    #[test]
    fn texts_of_one_id_stand_apart() {
        let mut all = Decisions::default();
        all.add(Decision::new("1", "a", Verdict::Reject, None));
        all.add(Decision::new("1", "b", Verdict::Keep, None));
        assert_eq!(verdict(&all, "1", "a"), Some(Verdict::Reject));
        assert_eq!(verdict(&all, "1", "b"), Some(Verdict::Keep));
    }

    #[test]
    fn only_what_goes_has_a_name() {
        let reject = "{\"id\":\"1\",\"decision\":\"reject\",\"text\":\"a\"}\n";
        let name = |lines: &str| read(lines).unwrap().rejected();
        assert_eq!(
            name("{\"id\":\"1\",\"decision\":\"keep\",\"text\":\"a\"}\n"),
            None
        );
        let one = name(reject);
        assert!(one.is_some());
        let kept = "{\"id\":\"2\",\"decision\":\"keep\",\"text\":\"a\"}\n";
        assert_eq!(one, name(&format!("{kept}{reject}")));
        let why = reject.replace("}", ",\"reason\":\"r\",\"at\":\"2026-01-01T00:00:00Z\"}");
        assert_eq!(one, name(&why));
        assert_eq!(
            None,
            name(&format!(
                "{reject}{}",
                reject.replace("reject", "undecided")
            ))
        );
        assert_ne!(one, name(&reject.replace("\"a\"", "\"b\"")));
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        for (line, said) in [
            ("{\"id\":\"1\",\"decision\":\"maybe\"}", "maybe"),
            ("{\"decision\":\"keep\"}", "`id`"),
            (
                "{\"v\":2,\"id\":\"1\",\"decision\":\"keep\"}",
                "version 2 is newer",
            ),
            ("no JSON", "not a JSON object"),
        ] {
            let good = "{\"id\":\"1\",\"decision\":\"keep\"}\n\n";
            let error = read(&format!("{good}{line}\n")).err().unwrap();
            assert!(error.starts_with("f:3: no decision: "), "{error}");
            assert!(error.contains(said), "{error}");
        }
    }
}
