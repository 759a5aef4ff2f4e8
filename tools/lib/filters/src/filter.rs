//! The filters' names, as records and counts know them.

/// Which of the two texts a filter looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The tweet.
    Tweet,
    /// The reply to it.
    Reply,
}

/// What a filter looks for. With the [`Side`] in front these are the stable
/// names in records and counts: `reply_too_short`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Fewer scalars than asked for.
    TooShort,
    /// More scalars than asked for.
    TooLong,
    /// Fewer likes than asked for.
    FewLikes,
    /// The source does not say how many likes.
    LikesUnknown,
    /// The author has fewer followers than asked for.
    FewFollowers,
    /// The source does not say how many followers.
    FollowersUnknown,
    /// The tweet has fewer replies than asked for.
    FewReplies,
    /// The text of someone else, passed on.
    Retweet,
    /// A tweet about another one, which the pair does not show.
    Quote,
    /// A link.
    Url,
    /// A picture or a video.
    Media,
    /// See the rules in `spam.rs`.
    Spam,
    /// A reply that only says the tweet again.
    Echo,
    /// Another language than asked for.
    Language,
    /// Toxicity at or above the threshold.
    Toxic,
    /// A token with a meaning in the chat template.
    SpecialToken,
}

impl Filter {
    /// The stable name.
    pub fn name(self, side: Side) -> String {
        let side = match side {
            Side::Tweet => "tweet",
            Side::Reply => "reply",
        };
        let what = match self {
            Self::TooShort => "too_short",
            Self::TooLong => "too_long",
            Self::FewLikes => "few_likes",
            Self::LikesUnknown => "likes_unknown",
            Self::FewFollowers => "author_few_followers",
            Self::FollowersUnknown => "author_followers_unknown",
            Self::FewReplies => "few_replies",
            Self::Retweet => "retweet",
            Self::Quote => "quote",
            Self::Url => "url",
            Self::Media => "media",
            Self::Spam => "spam",
            Self::Echo => "echo",
            Self::Language => "language",
            Self::Toxic => "toxic",
            Self::SpecialToken => "special_token",
        };
        format!("{side}_{what}")
    }
}
