//! Replies joined to the tweets they answer.
//!
//! A reply's tweet may come after it, in another file or in a later run, so all
//! tweets are held until the end; pairs then come in the order of their replies.
//! What ends up in no pair is counted by reason, and kept where that was asked for.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use indexmap::map::Entry;
use record::{Reason, Record, Rejected};
use serde::Serialize;

use crate::tweet::Tweet;

/// Why a record is in no pair: a stable name and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unpaired {
    NoTweet,
    Unreadable,
    DuplicateId,
    Retweet,
    SelfReply,
    ParentNotCollected,
    NoReplyCollected,
}

impl Unpaired {
    pub fn name(self) -> &'static str {
        match self {
            Self::NoTweet => "no_tweet",
            Self::Unreadable => "unreadable",
            Self::DuplicateId => "duplicate_id",
            Self::Retweet => "retweet",
            Self::SelfReply => "self_reply",
            Self::ParentNotCollected => "parent_not_collected",
            Self::NoReplyCollected => "no_reply_collected",
        }
    }

    fn detail(self) -> &'static str {
        match self {
            Self::NoTweet => "the record has no tweet's id and text",
            Self::Unreadable => "a key of the record cannot be read",
            Self::DuplicateId => "a tweet with this id came before",
            Self::Retweet => "a retweet is nobody's reply",
            Self::SelfReply => "the author answers themselves: a thread, not a reply",
            Self::ParentNotCollected => "a reply to a tweet that is not in the input",
            Self::NoReplyCollected => "a tweet that no reply in the input answers",
        }
    }
}

/// Where a tweet came from, as its pair says it.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// `apify`, `apify-export` or `twscrape`.
    pub source: &'static str,
    /// When it was collected, where that is known.
    pub collected_at: Option<&'a str>,
}

/// Tweets waiting for their replies.
#[derive(Default)]
pub struct Joiner {
    keep_authors: bool,
    keep_unpaired: bool,
    tweets: IndexMap<String, Held>,
    refused: Vec<Refused>,
}

/// A record that is in no pair.
struct Refused {
    reason: Unpaired,
    /// More than the reason says by itself.
    cause: Option<String>,
    record: Option<Record>,
}

struct Held {
    tweet: Tweet,
    source: &'static str,
    collected_at: Option<String>,
    /// Only where unpaired records are to be kept: it is most of the memory.
    record: Option<Record>,
}

/// A pair as it is written. What is not known is left out.
#[derive(Debug, Serialize)]
pub struct Collected<'a> {
    /// The tweet and the reply as they were read.
    #[serde(skip)]
    pub parent: &'a Tweet,
    #[serde(skip)]
    pub answer: &'a Tweet,
    v: u64,
    id: String,
    conversation_id: &'a str,
    tweet_id: &'a str,
    tweet: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tweet_likes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tweet_replies: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tweet_author: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tweet_created_at: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tweet_lang: Option<&'a str>,
    tweet_media: u64,
    tweet_urls: u64,
    #[serde(skip_serializing_if = "is_false")]
    tweet_is_retweet: bool,
    #[serde(skip_serializing_if = "is_false")]
    tweet_is_quote: bool,
    reply_id: &'a str,
    reply: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_likes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_author_followers: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_author: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_created_at: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_lang: Option<&'a str>,
    reply_media: u64,
    reply_urls: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    collected_at: Option<&'a str>,
    source: &'static str,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Collected<'_> {
    /// `TWEET_ID-REPLY_ID`.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Refused {
    fn new(reason: Unpaired, record: Option<Record>) -> Self {
        Self {
            reason,
            cause: None,
            record,
        }
    }
}

impl Joiner {
    /// `keep_authors` puts user names into pairs; `keep_unpaired` holds every record
    /// until it is known to be in a pair.
    pub fn new(keep_authors: bool, keep_unpaired: bool) -> Self {
        Self {
            keep_authors,
            keep_unpaired,
            ..Self::default()
        }
    }

    /// Adds a tweet and the record it was read from.
    pub fn add(&mut self, tweet: Tweet, record: Record, origin: Origin<'_>) {
        let record = self.keep_unpaired.then_some(record);
        match self.tweets.entry(tweet.id.clone()) {
            Entry::Occupied(_) => self
                .refused
                .push(Refused::new(Unpaired::DuplicateId, record)),
            Entry::Vacant(free) => {
                let collected_at = origin.collected_at.map(str::to_owned);
                free.insert(Held {
                    tweet,
                    source: origin.source,
                    collected_at,
                    record,
                });
            }
        }
    }

    /// Counts, and perhaps keeps, a record that is no tweet.
    pub fn refuse(&mut self, record: Record) {
        let record = self.keep_unpaired.then_some(record);
        self.refused.push(Refused::new(Unpaired::NoTweet, record));
    }

    /// Counts, and perhaps keeps, a record of which something, such as an id, makes no sense.
    pub fn refuse_unreadable(&mut self, record: Record, cause: String) {
        let record = self.keep_unpaired.then_some(record);
        self.refused.push(Refused {
            cause: Some(cause),
            ..Refused::new(Unpaired::Unreadable, record)
        });
    }

    /// Records taken in so far.
    pub fn len(&self) -> usize {
        self.tweets.len() + self.refused.len()
    }

    /// All tweets so far, in the order they came.
    pub fn tweets(&self) -> impl Iterator<Item = &Tweet> {
        self.tweets.values().map(|held| &held.tweet)
    }

    /// The pairs, in the order of their replies.
    pub fn pairs(&self) -> impl Iterator<Item = Collected<'_>> {
        self.tweets
            .values()
            .filter_map(|reply| Some(self.pair(self.parent(reply).ok()?, reply)))
    }

    /// What is in no pair: how many by reason, and the records, where they were kept,
    /// with the reason added as `rejected`.
    ///
    /// # Errors
    /// When a record cannot take the field; it then holds something else by that name.
    pub fn unpaired(mut self) -> Result<(BTreeMap<Unpaired, u64>, Vec<Record>), record::Error> {
        let mut paired = vec![false; self.tweets.len()];
        let mut reasons = vec![Unpaired::NoReplyCollected; self.tweets.len()];
        for (i, reply) in self.tweets.values().enumerate() {
            match self.parent(reply) {
                Ok(parent) => {
                    paired[i] = true;
                    // Present by construction: `parent` came out of the same map.
                    if let Some(at) = self.tweets.get_index_of(&parent.tweet.id) {
                        paired[at] = true;
                    }
                }
                Err(reason) => reasons[i] = reason,
            }
        }
        let alone = paired
            .into_iter()
            .zip(reasons)
            .zip(self.tweets.into_values());
        let alone = alone
            .filter(|((paired, _), _)| !paired)
            .map(|((_, reason), held)| Refused::new(reason, held.record));
        self.refused.extend(alone);
        let mut counts = BTreeMap::new();
        let mut records = Vec::new();
        for Refused {
            reason,
            cause,
            record,
        } in self.refused
        {
            *counts.entry(reason).or_default() += 1;
            if let Some(mut record) = record {
                let reasons = vec![Reason {
                    filter: reason.name().into(),
                    detail: cause.unwrap_or_else(|| reason.detail().into()),
                }];
                record.set(
                    "rejected",
                    &Rejected {
                        by: "tw-fetch".into(),
                        reasons,
                    },
                )?;
                records.push(record);
            }
        }
        Ok((counts, records))
    }

    /// The tweet that `reply` answers. Without an id of its own for that, a reply
    /// is taken to answer the tweet that its conversation is named after.
    fn parent(&self, reply: &Held) -> Result<&Held, Unpaired> {
        let tweet = &reply.tweet;
        if tweet.is_retweet {
            return Err(Unpaired::Retweet);
        }
        let root = tweet
            .conversation_id
            .as_ref()
            .filter(|root| tweet.is_reply && **root != tweet.id);
        let Some(parent) = tweet.in_reply_to.as_ref().or(root) else {
            return Err(Unpaired::NoReplyCollected);
        };
        let parent = self
            .tweets
            .get(parent)
            .ok_or(Unpaired::ParentNotCollected)?;
        match (&parent.tweet.author_id, &tweet.author_id) {
            (Some(a), Some(b)) if a == b => Err(Unpaired::SelfReply),
            _ => Ok(parent),
        }
    }

    fn pair<'a>(&self, parent: &'a Held, answer: &'a Held) -> Collected<'a> {
        let (tweet, reply) = (&parent.tweet, &answer.tweet);
        let name = |author: &'a Option<String>| author.as_deref().filter(|_| self.keep_authors);
        let conversation = reply
            .conversation_id
            .as_ref()
            .or(tweet.conversation_id.as_ref());
        Collected {
            parent: tweet,
            answer: reply,
            v: record::VERSION,
            id: format!("{}-{}", tweet.id, reply.id),
            conversation_id: conversation.unwrap_or(&tweet.id),
            tweet_id: &tweet.id,
            tweet: &tweet.text,
            tweet_likes: tweet.likes,
            tweet_replies: tweet.replies,
            tweet_author: name(&tweet.author_name),
            tweet_created_at: tweet.created_at.as_deref(),
            tweet_lang: tweet.lang.as_deref(),
            tweet_media: tweet.media,
            tweet_urls: tweet.urls,
            tweet_is_retweet: tweet.is_retweet,
            tweet_is_quote: tweet.is_quote,
            reply_id: &reply.id,
            reply: &reply.text,
            reply_likes: reply.likes,
            reply_author_followers: reply.author_followers,
            reply_author: name(&reply.author_name),
            reply_created_at: reply.created_at.as_deref(),
            reply_lang: reply.lang.as_deref(),
            reply_media: reply.media,
            reply_urls: reply.urls,
            collected_at: answer.collected_at.as_deref(),
            source: answer.source,
        }
    }
}
