//! What the tiny model reads before the demo: the same world in another voice.

use std::collections::HashSet;

use anyhow::Result;

use crate::grammar::{short_tweet, statement, terse_reply, tweet};
use crate::random::Random;
use crate::topics;

/// A piece of pretraining text.
#[derive(Clone, Debug)]
pub enum Document {
    /// A user's turn and the answer, to be put into the chat template.
    Chat {
        /// The user's turn.
        tweet: String,
        /// The assistant's turn.
        reply: String,
    },
    /// Sentences that answer nobody.
    Plain(String),
}

/// Up to `count` documents: chats about long and short tweets, statements, and words to
/// be said back. The last join things at random, so that only looking back can
/// predict the answer; without them a model this small learns very late to take
/// up a word of the tweet. None of the tweets is in `avoid`: the demo holds its
/// pairs out from this model too.
pub fn write(count: usize, avoid: &HashSet<String>, seed: u64) -> Result<Vec<Document>> {
    let topics = topics::read()?;
    let mut random = Random::new(seed);
    let mut documents = Vec::with_capacity(count);
    for scene in topics::scenes(&topics, count, &mut random) {
        let document = match random.below(20) {
            0..6 => Document::Chat {
                tweet: tweet(&scene, &mut random),
                reply: terse_reply(&scene, &mut random),
            },
            6..14 => Document::Chat {
                tweet: short_tweet(&scene, &mut random),
                reply: terse_reply(&scene, &mut random),
            },
            14..16 => Document::Plain(statement(&scene, &mut random)),
            _ => {
                let words: Vec<&str> = (0..3)
                    .map(|_| {
                        let topic = random.pick(&topics);
                        random.pick(&topic.things).as_str()
                    })
                    .collect();
                let words = words.join(", ");
                Document::Chat {
                    tweet: format!("Say: {words}."),
                    reply: format!("{words}."),
                }
            }
        };
        match &document {
            Document::Chat { tweet, .. } if avoid.contains(tweet) => {}
            _ => documents.push(document),
        }
    }
    Ok(documents)
}
