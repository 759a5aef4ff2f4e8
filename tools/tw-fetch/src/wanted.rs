//! Whether a pair would pass the cheap filters: what the target counts, and which
//! tweets are worth paying for replies to.

use std::cell::RefCell;
use std::collections::HashMap;

use cli::Failure;
use filters::{Checked, Filters};
use record::Record;
use serde_json::json;
use settings::Collection;

use crate::join::Collected;
use crate::tweet::Tweet;

/// The filters, and what they said before: after each run the same pairs are asked about again.
pub struct Wanted {
    filters: Filters,
    pairs: RefCell<HashMap<String, bool>>,
}

impl Wanted {
    /// # Errors
    /// Settings that make no sense to a filter (exit 2).
    pub fn new(settings: &Collection) -> Result<Self, Failure> {
        let filters = Filters::new(settings).map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(Self {
            filters,
            pairs: RefCell::default(),
        })
    }

    /// Whether the pair would pass.
    pub fn pair(&self, pair: &Collected<'_>) -> bool {
        if let Some(&known) = self.pairs.borrow().get(pair.id()) {
            return known;
        }
        let passes = self
            .check(&json!(pair))
            .is_some_and(|checked| checked.passes());
        self.pairs.borrow_mut().insert(pair.id().to_owned(), passes);
        passes
    }

    /// Whether no filter has anything against the tweet itself.
    pub fn tweet(&self, tweet: &Tweet) -> bool {
        // A pair needs a reply; what the filters say of this one is not looked at.
        let pair = json!({
            "id": tweet.id,
            "tweet": tweet.text,
            "tweet_likes": tweet.likes,
            "tweet_replies": tweet.replies,
            "tweet_media": tweet.media,
            "reply": "",
        });
        self.check(&pair).is_some_and(|c| {
            !c.reasons
                .iter()
                .any(|reason| reason.filter.starts_with("tweet_"))
        })
    }

    fn check(&self, pair: &serde_json::Value) -> Option<Checked> {
        self.filters
            .check(&Record::parse(&pair.to_string()).ok()?)
            .ok()
    }
}
