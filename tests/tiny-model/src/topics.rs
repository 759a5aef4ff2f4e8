//! The world of the generated tweets: what people have, and what goes wrong with it.

use anyhow::{Context, Result, ensure};

use crate::random::Random;

/// One subject of conversation.
#[derive(Clone, Debug)]
pub struct Topic {
    /// What a hashtag would say.
    pub name: String,
    /// Things one can call "my …".
    pub things: Vec<String>,
    /// What goes wrong with them.
    pub troubles: Vec<Trouble>,
}

/// A complaint and what helps.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// A clause, as "the crust came out pale".
    pub text: String,
    /// Imperatives, as "bake it ten minutes longer".
    pub remedies: Vec<String>,
}

/// What one tweet is about.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The subject.
    pub topic: &'a Topic,
    /// The thing in question.
    pub thing: &'a str,
    /// What is wrong with it.
    pub trouble: &'a Trouble,
    /// The remedy that a good reply names first.
    pub remedy: &'a str,
}

impl<'a> Scene<'a> {
    /// The same trouble with its other remedy.
    pub fn turned(&self) -> Self {
        let remedies = self.trouble.remedies.iter();
        let other = remedies.map(String::as_str).find(|r| *r != self.remedy);
        Self {
            remedy: other.unwrap_or(self.remedy),
            ..*self
        }
    }
}

/// The topics of `topics.txt`, whose head states the format.
pub fn read() -> Result<Vec<Topic>> {
    let mut topics: Vec<Topic> = Vec::new();
    for (at, line) in include_str!("topics.txt").lines().enumerate() {
        let here = || format!("topics.txt:{}: {line}", at + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some((text, remedies)) = line.split_once(" = ") {
            let remedies: Vec<_> = remedies.split(" | ").map(str::to_owned).collect();
            ensure!(remedies.len() == 2, "{}: not two remedies", here());
            let topic = topics.last_mut().with_context(here)?;
            topic.troubles.push(Trouble {
                text: text.to_owned(),
                remedies,
            });
        } else {
            let (name, things) = line.split_once(": ").with_context(here)?;
            let things: Vec<_> = things.split(", ").map(str::to_owned).collect();
            ensure!(things.len() == 4, "{}: not four things", here());
            topics.push(Topic {
                name: name.to_owned(),
                things,
                troubles: Vec::new(),
            });
        }
    }
    ensure!(
        topics.iter().all(|topic| topic.troubles.len() == 3),
        "topics.txt: a topic without three troubles"
    );
    Ok(topics)
}

/// `count` scenes that repeat a (trouble, remedy) only once each of them has
/// been used, in random order.
pub fn scenes<'a>(topics: &'a [Topic], count: usize, random: &mut Random) -> Vec<Scene<'a>> {
    let mut scenes = Vec::with_capacity(count);
    while scenes.len() < count {
        let mut round: Vec<_> = topics
            .iter()
            .flat_map(|topic| topic.troubles.iter().map(move |trouble| (topic, trouble)))
            .flat_map(|(topic, trouble)| {
                let remedies = trouble.remedies.iter();
                remedies.map(move |remedy| (topic, trouble, remedy))
            })
            .collect();
        random.shuffle(&mut round);
        round.truncate(count - scenes.len());
        scenes.extend(round.into_iter().map(|(topic, trouble, remedy)| Scene {
            topic,
            thing: random.pick(&topic.things).as_str(),
            trouble,
            remedy,
        }));
    }
    scenes
}
