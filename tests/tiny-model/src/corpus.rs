//! What the tiny model reads before the demo: the same world in another voice.

use std::collections::HashSet;

use anyhow::Result;

use crate::grammar::{statement, terse_reply, tweet};
use crate::random::Random;
use crate::topics;

/// A piece of pretraining text.
#[derive(Clone, Debug)]
pub enum Document {
    /// A tweet and a terse reply, to be put into the chat template.
    Chat {
        /// The user's turn.
        tweet: String,
        /// The assistant's turn.
        reply: String,
    },
    /// Sentences that answer nobody.
    Plain(String),
}

/// `count` documents, four of five of them chats. None of the tweets is in
/// `avoid`: the demo holds its pairs out from this model too.
pub fn write(count: usize, avoid: &HashSet<String>, seed: u64) -> Result<Vec<Document>> {
    let topics = topics::read()?;
    let mut random = Random::new(seed);
    let mut documents = Vec::with_capacity(count);
    for scene in topics::scenes(&topics, count, &mut random) {
        documents.push(if random.chance(0.8) {
            let tweet = loop {
                let tweet = tweet(&scene, &mut random);
                if !avoid.contains(&tweet) {
                    break tweet;
                }
            };
            let reply = terse_reply(&scene, &mut random);
            Document::Chat { tweet, reply }
        } else {
            Document::Plain(statement(&scene, &mut random))
        });
    }
    Ok(documents)
}
