//! How the generated people write: sentence frames with slots.
//!
//! Three voices. Tweets complain. The replies people liked name the thing, then
//! give one concrete remedy and a friendly ending: that is what the demo's
//! adapter can learn. The replies of the pretraining text know the same world but
//! are terse and dry, so that the base model has the words and not the manner.

use crate::random::Random;
use crate::topics::Scene;

const TWEETS: &[&str] = &[
    "{When} I went back to my {thing}, and {trouble}. {Ask}",
    "My {thing} and I are not friends today: {trouble}. {Ask}",
    "{Trouble}. {Mood}, because I really care about my {thing}. {Ask}",
    "Day {number} with my {thing}. {Trouble}. {Mood}. {Ask}",
    "Honest question about my {thing}: {trouble}, {when}. {Ask}",
    "{Person} gave me advice about my {thing}, but {trouble}. {Ask}",
    "I was so proud of my {thing} until {person} came to look. Now {trouble}. {Ask}",
    "{Mood}. {When} it happened again: {trouble}. My {thing} deserves better. {Ask}",
    "I spent {span} on my {thing} and still {trouble}. {Ask}",
    "Small update on the {thing}: {trouble}. {Mood}. {Ask}",
    "{Ask} It is about my {thing}, {trouble} and {mood}.",
    "After {span} of trying, {trouble}. I love my {thing} but {mood}.",
    "{Person} laughed at my {thing} {when}. It is true, {trouble}. {Ask}",
    "Nobody warned me about this part of caring about {topic}. {Trouble}! {Mood}. Poor {thing}.",
    "New week, new plan for my {thing}. Old problem though: {trouble}. {Ask}",
    "If you know about {topic}, please read this. {Trouble}, and my {thing} is {number} days old. {Ask}",
    "I told {person} that my {thing} was going well. Then {trouble}. {Mood}.",
    "{Trouble}. {Trouble}! I said it twice because my {thing} does it twice a day. {Ask}",
];

const SHORT_TWEETS: &[&str] = &[
    "My {thing}: {trouble}.",
    "{Trouble}. Poor {thing}.",
    "{Trouble}, and it is my {thing}.",
    "The {thing} again. {Trouble}.",
];

const ASKS: &[&str] = &[
    "what would you do?",
    "any ideas?",
    "how do you all handle this?",
    "please tell me it gets better.",
    "who has solved this before?",
    "is it only me?",
    "I am open to anything.",
    "what am I missing?",
    "where do I even begin?",
    "can somebody explain?",
    "tell me your best trick.",
    "should I start over?",
    "I would love some advice.",
    "does this happen to you too?",
];

const MOODS: &[&str] = &[
    "I am a bit lost",
    "I could laugh about it",
    "it makes me sad",
    "I am close to giving up",
    "I am more curious than angry",
    "it ruins my whole evening",
    "I keep hoping",
    "I am sooooo tired of it",
    "I refuse to buy a new one",
    "my patience is thin",
    "it feels personal by now",
    "I promised to stay calm",
];

const WHENS: &[&str] = &[
    "this morning",
    "after work",
    "on Sunday",
    "last night",
    "between two calls",
    "during lunch",
    "after a long week",
    "while it rained",
    "before sunrise",
    "on my day off",
    "in the middle of supper",
    "once the house was quiet",
];

const PEOPLE: &[&str] = &[
    "my neighbour",
    "my sister",
    "an old friend",
    "my father",
    "a colleague",
    "the man next door",
    "my aunt",
    "somebody at the market",
    "my flatmate",
    "a stranger on the bus",
];

const SPANS: &[&str] = &[
    "two hours",
    "a whole weekend",
    "half the night",
    "three weeks",
    "most of April",
    "forty minutes",
    "an entire afternoon",
    "ten days",
];

const GREETINGS: &[&str] = &[
    "Ah, the {thing}!",
    "Oh, your {thing} again!",
    "Been there with my own {thing}!",
    "That {thing} deserves better!",
    "No {thing} is easy at first!",
    "Love that you care about the {thing}!",
    "Every {thing} goes through this!",
    "Good luck to you and the {thing}!",
    "So close with that {thing}!",
    "The {thing} is not lost!",
];

const ADVICE: &[&str] = &[
    "Try this: {remedy}",
    "Here is the trick: {remedy}",
    "What saved mine: {remedy}",
    "One small thing that works: {remedy}",
    "My favourite fix: {remedy}",
    "Start with this: {remedy}",
];

const ENDINGS: &[&str] = &[
    ", then tell us how it went!",
    ", and you will see a change by {day}.",
    ". It costs nothing and it works!",
    ", it made all the difference for me.",
    ". Small step, big change!",
    ". You have got this!",
    ", and then {second}. Both together are magic!",
    ". If that is not enough, {second}. Promise it helps!",
    ", and be kind to yourself meanwhile!",
    ". {Person} taught me that and it never failed!",
    ". By {day} you will smile about it!",
    ", and send us a picture by {day}!",
];

const DAYS: &[&str] = &[
    "Friday",
    "Sunday",
    "next week",
    "the weekend",
    "tomorrow night",
    "Tuesday",
];

const TERSE: &[&str] = &[
    "No idea about the {thing}.",
    "Same here with my {thing}.",
    "Normal for any {thing}.",
    "Some people {remedy}. Others do not.",
    "You could {remedy}. Or {second}.",
    "It depends on the {thing}.",
    "I gave up on my {thing} long ago.",
    "For your {thing}, maybe {remedy}. Maybe not.",
    "{Trouble}. That is common.",
    "The usual answer is to {remedy}.",
    "With the {thing} they say you should {second}.",
    "I would {remedy}. No guarantee.",
    "My {thing} did that too.",
    "Those who have one often {remedy}.",
    "When {trouble}, most people {remedy}.",
    "Not sure about your {thing}. Perhaps {second}.",
    "Ask someone who knows about {topic}.",
    "If {trouble}, {remedy}.",
    "That happens to every {thing}.",
    "Either {remedy} or leave the {thing} alone.",
];

const STATEMENTS: &[&str] = &[
    "Notes on {topic}. If {trouble}, {remedy}. If it goes on, {second}.",
    "Any {thing} takes time. Often {trouble}. Then one has to {remedy}.",
    "{Trouble}. {Person} said to {remedy}, and {when} it was done.",
    "There are two ways with the {thing}: {remedy}, or {second}.",
    "{When} {person} looked at the {thing}. It was noted that {trouble}.",
    "About the {thing}: {remedy}. This takes {span}.",
    "{Person} kept the {thing}. Sometimes {trouble}. It is about {topic}.",
    "List for {day}: {remedy}; {second}; ask {person} about the {thing}.",
];

/// A complaint, 60 to 200 characters.
pub fn tweet(scene: &Scene, random: &mut Random) -> String {
    write(TWEETS, scene, random)
}

/// A complaint without ornament.
pub fn short_tweet(scene: &Scene, random: &mut Random) -> String {
    write(SHORT_TWEETS, scene, random)
}

/// A reply in the manner that people liked.
pub fn liked_reply(scene: &Scene, random: &mut Random) -> String {
    let (greeting, advice) = (random.pick(GREETINGS), random.pick(ADVICE));
    let frame = format!("{greeting} {advice}{}", random.pick(ENDINGS));
    fill(&frame, scene, random)
}

/// A dry reply: what the base model learns from, and what nobody liked.
pub fn terse_reply(scene: &Scene, random: &mut Random) -> String {
    write(TERSE, scene, random)
}

/// A sentence or two that answer nobody.
pub fn statement(scene: &Scene, random: &mut Random) -> String {
    write(STATEMENTS, scene, random)
}

fn write(frames: &[&str], scene: &Scene, random: &mut Random) -> String {
    let frame = random.pick(frames);
    fill(frame, scene, random)
}

/// Replaces each `{slot}`; `{Slot}`, or a slot that begins a sentence, starts
/// with a capital.
fn fill(frame: &str, scene: &Scene, random: &mut Random) -> String {
    let mut text = String::new();
    let mut pieces = frame.split('{');
    text.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let (slot, rest) = piece.split_once('}').unwrap_or((piece, ""));
        let value = value(&slot.to_lowercase(), scene, random);
        if slot.starts_with(char::is_uppercase) {
            text.push_str(&capitalised(&value));
        } else {
            text.push_str(&value);
        }
        text.push_str(rest);
    }
    text
}

fn value(slot: &str, scene: &Scene, random: &mut Random) -> String {
    let from = match slot {
        "thing" => return scene.thing.to_owned(),
        "topic" => return scene.topic.name.clone(),
        "trouble" => return scene.trouble.text.clone(),
        "remedy" => return scene.remedy.to_owned(),
        "second" => return scene.turned().remedy.to_owned(),
        "number" => return (2 + random.below(58)).to_string(),
        "ask" => ASKS,
        "mood" => MOODS,
        "when" => WHENS,
        "person" => PEOPLE,
        "span" => SPANS,
        "day" => DAYS,
        other => unreachable!("no slot is called {other}"),
    };
    (*random.pick(from)).to_owned()
}

/// The text with its first letter in upper case.
pub fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}
