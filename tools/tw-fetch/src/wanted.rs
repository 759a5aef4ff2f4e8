//! Whether a pair would pass the cheap filters: what the target counts, and which
//! tweets are worth paying for replies to.

use std::cell::RefCell;
use std::collections::HashMap;

use cli::{Failure, Resolved};
use filters::{Candidate, Filters};
use record::Pair;
use settings::DataSettings;

use crate::join::Collected;
use crate::tweet::Tweet;

/// The filters, and what they said before: after each run the same tweets and pairs are
/// asked about again.
pub struct Wanted {
    filters: Filters,
    pairs: RefCell<HashMap<String, bool>>,
    tweets: RefCell<HashMap<String, bool>>,
}

impl Wanted {
    /// # Errors
    /// Settings that make no sense to a filter (exit 2).
    pub fn new(resolved: &Resolved<DataSettings>) -> Result<Self, Failure> {
        let filters = Filters::new(&resolved.settings.collection)
            .map_err(|error| resolved.wrong(&error.key, error.cause))?;
        Ok(Self {
            filters,
            pairs: RefCell::default(),
            tweets: RefCell::default(),
        })
    }

    /// Whether the pair would pass.
    pub fn pair(&self, pair: &Collected<'_>) -> bool {
        if let Some(&known) = self.pairs.borrow().get(pair.id()) {
            return known;
        }
        let passes = self
            .filters
            .check(&candidate(pair.parent, Some(pair.answer)))
            .passes();
        self.pairs.borrow_mut().insert(pair.id().to_owned(), passes);
        passes
    }

    /// Whether no filter has anything against the tweet itself.
    pub fn tweet(&self, tweet: &Tweet) -> bool {
        if let Some(&known) = self.tweets.borrow().get(&tweet.id) {
            return known;
        }
        let checked = self.filters.check(&candidate(tweet, None));
        let mut reasons = checked.reasons.iter();
        let passes = !reasons.any(|reason| reason.filter.starts_with("tweet_"));
        self.tweets.borrow_mut().insert(tweet.id.clone(), passes);
        passes
    }
}

/// What the filters look at; without a reply, what they say of one is void.
fn candidate(tweet: &Tweet, reply: Option<&Tweet>) -> Candidate {
    Candidate {
        pair: Pair {
            id: tweet.id.clone(),
            conversation_id: tweet.id.clone(),
            tweet_id: Some(tweet.id.clone()),
            tweet: tweet.text.clone(),
            tweet_likes: tweet.likes,
            reply_id: reply.map(|r| r.id.clone()),
            reply: reply.map(|r| r.text.clone()).unwrap_or_default(),
            reply_likes: reply.and_then(|r| r.likes),
            reply_author_followers: reply.and_then(|r| r.author_followers),
        },
        tweet_media: tweet.media > 0,
        reply_media: reply.is_some_and(|r| r.media > 0),
        tweet_replies: tweet.replies,
        tweet_is_retweet: tweet.is_retweet,
        tweet_is_quote: tweet.is_quote,
    }
}
