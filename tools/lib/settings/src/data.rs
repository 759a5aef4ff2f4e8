//! `config/data.yaml`: what to collect, what to keep, what counts as the same.

use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSettings {
    /// What tw-fetch collects and pair-validate keeps.
    pub collection: Collection,
    /// What pair-dedup takes for the same pair, and how it cuts off the held-out part.
    pub deduplication: Deduplication,
    /// How pair-review shows pairs to a person.
    pub review: Review,
}

/// What is collected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Collection {
    /// How many pairs to collect, counted by the cheap filters below.
    pub target_pairs: u64,
    /// Search terms, each in the search syntax of the source.
    pub search_queries: Vec<String>,
    /// What a tweet must be.
    pub tweet_filters: TweetFilters,
    /// What a reply must be.
    pub reply_filters: ReplyFilters,
    /// What both texts must be.
    pub quality: Quality,
    /// Keep the user names of tweets' and replies' authors; nothing here needs them.
    pub keep_authors: bool,
    /// The Apify source.
    pub apify: Apify,
}

impl Default for Collection {
    fn default() -> Self {
        Self {
            target_pairs: 5000,
            search_queries: Vec::new(),
            tweet_filters: TweetFilters::default(),
            reply_filters: ReplyFilters::default(),
            quality: Quality::default(),
            keep_authors: false,
            apify: Apify::default(),
        }
    }
}

/// What a tweet must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TweetFilters {
    /// Least number of likes.
    pub min_likes: u64,
    /// Least number of replies, where the source says so.
    pub min_replies: u64,
    /// Shortest text, in Unicode scalars after NFC, leading @names left out.
    pub min_length: usize,
    /// Longest text, counted the same way.
    pub max_length: usize,
    /// Language, ISO 639-1.
    #[serde(alias = "lang")]
    pub language: String,
    /// Refuse texts with a link.
    pub exclude_urls: bool,
    /// Refuse tweets with a picture or a video.
    pub exclude_media: bool,
    /// Refuse retweets and quotes.
    pub exclude_retweets: bool,
}

impl Default for TweetFilters {
    fn default() -> Self {
        Self {
            min_likes: 100,
            min_replies: 0,
            min_length: 30,
            max_length: 280,
            language: "en".into(),
            exclude_urls: true,
            exclude_media: true,
            exclude_retweets: true,
        }
    }
}

/// What a reply must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplyFilters {
    /// Least number of likes.
    pub min_likes: u64,
    /// Least number of people who follow its author.
    #[serde(alias = "min_followers")]
    pub min_author_followers: u64,
    /// Shortest text, in Unicode scalars after NFC, leading @names left out.
    pub min_length: usize,
    /// Longest text, counted the same way.
    pub max_length: usize,
    /// Language, ISO 639-1.
    #[serde(alias = "lang")]
    pub language: String,
    /// Refuse texts with a link.
    pub exclude_urls: bool,
    /// Refuse replies with a picture or a video.
    pub exclude_media: bool,
}

impl Default for ReplyFilters {
    fn default() -> Self {
        Self {
            min_likes: 5,
            min_author_followers: 100,
            min_length: 30,
            max_length: 280,
            language: "en".into(),
            exclude_urls: true,
            exclude_media: true,
        }
    }
}

/// What both texts must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quality {
    /// A text at or above this toxicity score is refused, 0 to 1.
    #[serde(alias = "toxicity_threshold")]
    pub max_toxicity: f64,
    /// Refuse what looks like spam.
    pub exclude_spam: bool,
    /// What to do with a pair whose likes or followers the source does not tell,
    /// where a least number is asked for.
    pub unknown_figures: UnknownFigures,
}

impl Default for Quality {
    fn default() -> Self {
        Self {
            max_toxicity: 0.3,
            exclude_spam: true,
            unknown_figures: UnknownFigures::Reject,
        }
    }
}

/// What to do with a pair that lacks a figure a filter asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownFigures {
    /// Refuse it: nobody knows whether people liked it.
    Reject,
    /// Let it pass that filter.
    Accept,
}

/// How tweets come from Apify.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Apify {
    /// The actor, `user~name`; its input and items must be those of Tweet Scraper V2.
    pub actor: String,
    /// Most that all runs of one collection may cost together, in US dollars.
    pub max_cost_usd: f64,
    /// The actor's price for a thousand items, in US dollars: for the limit above, where
    /// Apify's own figure is not there yet.
    pub price_per_1000_usd: f64,
    /// Tweets that the search asks for at most.
    pub search_items: u64,
    /// Which tweets and replies come first: `Top` or `Latest`.
    pub sort: String,
    /// Conversations whose replies one run asks for; large batches run out of memory.
    pub conversations_per_run: usize,
    /// Replies asked for, on average, in each conversation.
    pub replies_per_conversation: u64,
    /// Items fetched from a dataset in one request.
    pub page_size: u64,
    /// Requests made at most where one keeps failing.
    pub attempts: u32,
}

impl Default for Apify {
    fn default() -> Self {
        Self {
            actor: "apidojo~tweet-scraper".into(),
            max_cost_usd: 5.0,
            price_per_1000_usd: 0.4,
            search_items: 1000,
            sort: "Top".into(),
            conversations_per_run: 20,
            replies_per_conversation: 40,
            page_size: 1000,
            attempts: 8,
        }
    }
}

/// What counts as the same pair, and the held-out part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deduplication {
    /// Two pairs are near when both texts' cosines are above this.
    pub similarity_threshold: f64,
    /// Folder of the sentence-embedding model.
    pub model: String,
    /// Part of the pairs that is held out, 0 to 1.
    pub eval_fraction: f64,
    /// Decides which groups are held out.
    pub seed: u64,
}

impl Default for Deduplication {
    fn default() -> Self {
        Self {
            similarity_threshold: 0.9,
            model: "data/cache/models/all-MiniLM-L6-v2".into(),
            eval_fraction: 0.1,
            seed: 42,
        }
    }
}

/// How pairs are shown to a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Review {
    /// Which pairs come first: `read`, `random`, or a field by its dotted name, lowest first;
    /// `-` in front: highest first.
    pub order: String,
    /// Decides the random order.
    pub seed: u64,
    /// Reasons to reject that are a key away: nine at most.
    pub reasons: Vec<String>,
}

impl Default for Review {
    fn default() -> Self {
        let reasons = [
            "off topic",
            "hostile or hurtful",
            "private, or about a person",
            "spam or advertising",
            "needs a picture, link or thread",
            "wrong language",
            "nonsense or broken",
        ];
        Self {
            order: "read".into(),
            seed: 42,
            reasons: reasons.map(String::from).into(),
        }
    }
}
