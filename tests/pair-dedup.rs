//! pair-dedup through the real binary, with the real sentence model.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use harness::{Conventions, Run, Tool};
use serde_json::{Value, json};

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_pair-dedup"))
}

fn model() -> String {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/cache/models/all-MiniLM-L6-v2");
    assert!(
        path.join("model.safetensors").exists(),
        "the sentence model is not there; `make models` fetches it"
    );
    path.display().to_string()
}

/// Tweets and replies about one thing each.
const TOPICS: [(&str, &str); 16] = [
    (
        "The ferry was an hour late again this morning.",
        "Take the early one, it has never failed me.",
    ),
    (
        "I finally fixed the leaking tap in the kitchen.",
        "Well done, mine still drips into a bucket.",
    ),
    (
        "Our choir sings in the old mill on Friday night.",
        "I will bring my mother, she loves that place.",
    ),
    (
        "Nobody told me that rye bread takes two days.",
        "Worth the wait, and the second loaf is quicker.",
    ),
    (
        "The lighthouse is open to visitors for one week.",
        "Count the steps for me, I always lose track.",
    ),
    (
        "My bicycle has a new chain and rides like silk.",
        "Oil it after the first rain and it stays that way.",
    ),
    (
        "We counted eleven herons on the pond at dawn.",
        "That is twice as many as we saw last year.",
    ),
    (
        "The chess club meets in the library from now on.",
        "Good, the café was far too loud to think.",
    ),
    (
        "Snow in April, and the magnolia was just in bloom.",
        "Cover it tonight and it may come through.",
    ),
    (
        "This novel has no chapter breaks at all.",
        "I read it in one sitting for that very reason.",
    ),
    (
        "Learning to weld is mostly learning to clean metal.",
        "And buying gloves that are one size too big.",
    ),
    (
        "The market has the first strawberries of the season.",
        "Save me a basket, I am stuck at work until six.",
    ),
    (
        "Our goat got onto the roof of the shed today.",
        "Ours does that weekly, we gave up on the ladder.",
    ),
    (
        "The telescope arrived and of course it is cloudy.",
        "It is a rule of nature, mine waited two weeks.",
    ),
    (
        "I am building a canoe out of cedar strips.",
        "Sand more than you think, then sand once more.",
    ),
    (
        "The new tram line opens between the two stations.",
        "At last, that walk in winter was no joke.",
    ),
];

fn pair(id: &str, conversation: &str, tweet: &str, reply: &str, likes: u64) -> Value {
    json!({
        "v": 1, "id": id, "conversation_id": conversation, "tweet": tweet, "tweet_likes": 100,
        "reply": reply, "reply_likes": likes, "reply_author_followers": 400, "x_note": {"n": 1.50}
    })
}

/// Every topic as a pair, some with a second reply in the same thread, and copies
/// of both kinds. Ids: `aN` the pair, `bN` another reply, `eN` exact, `sN` semantic.
fn pairs() -> Vec<Value> {
    let mut pairs = Vec::new();
    for (i, (tweet, reply)) in TOPICS.into_iter().enumerate() {
        let thread = format!("t{i:02}");
        pairs.push(pair(&format!("a{i:02}"), &thread, tweet, reply, 50));
        if i % 4 == 0 {
            let other = TOPICS[(i + 5) % 16].1;
            pairs.push(pair(
                &format!("b{i:02}"),
                &thread,
                tweet,
                other,
                20 + i as u64,
            ));
        }
        if i % 4 == 1 {
            let tweet = format!("@someone  {}", tweet.to_uppercase());
            let reply = reply
                .replace("the", "\u{200b}the")
                .replace(' ', "  ")
                .replace(',', " ,")
                .replace(" ,", ",");
            pairs.push(pair(
                &format!("e{i:02}"),
                &format!("u{i:02}"),
                &tweet,
                &reply,
                10,
            ));
        }
        if i % 4 == 2 {
            // A few other signs: not the same text, and near by any measure.
            let (tweet, reply) = (
                tweet.replace('.', "!"),
                format!("{}!!", reply.trim_end_matches('.')),
            );
            pairs.push(pair(
                &format!("s{i:02}"),
                &format!("w{i:02}"),
                &tweet,
                &reply,
                80,
            ));
        }
    }
    pairs
}

fn text(pairs: &[Value]) -> String {
    pairs.iter().map(|pair| format!("{pair}\n")).collect()
}

fn run(tool: &Tool, more: &[&str], input: &str) -> Run {
    let model = model();
    let arguments: Vec<&str> = ["--model", &model, "--dropped", "dropped.jsonl"]
        .iter()
        .chain(more)
        .copied()
        .collect();
    tool.run(&arguments, input).exits(0)
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn id(record: &Value) -> &str {
    record["id"].as_str().unwrap()
}

harness::conventions!(|| {
    let arguments = ["--model", &model()].map(String::from).to_vec();
    let input = text(&pairs()[..8]);
    (
        tool(),
        Conventions {
            arguments,
            rejects: "--dropped",
            input,
            empty: 0,
            key: "deduplication.eval_fraction",
            passes_records: true,
        },
    )
});

#[test]
fn doing_it_again_changes_nothing_and_order_does_not_matter() {
    let tool = tool();
    let pairs = pairs();
    let once = run(&tool, &["--eval-fraction", "0.3"], &text(&pairs)).stdout;
    assert!(!tool.read("dropped.jsonl").is_empty());
    let again = run(&tool, &["--eval-fraction", "0.3"], &once).stdout;
    assert_eq!(once, again);
    assert_eq!(tool.read("dropped.jsonl"), "");
    let reversed: Vec<Value> = pairs.into_iter().rev().collect();
    assert_eq!(
        run(&tool, &["--eval-fraction", "0.3"], &text(&reversed)).stdout,
        once
    );
}

#[test]
fn kept_and_dropped_together_are_the_input_and_every_keeper_stays() {
    let tool = tool();
    let input = pairs();
    let kept = run(&tool, &["--summary", "summary.json"], &text(&input)).records();
    let dropped = lines(&tool.read("dropped.jsonl"));

    let summary: Value = serde_json::from_str(&tool.read("summary.json")).unwrap();
    let mut reasons = BTreeMap::<&str, u64>::new();
    for record in &dropped {
        *reasons
            .entry(record["dropped"]["reason"].as_str().unwrap())
            .or_default() += 1;
    }
    assert!(reasons.len() > 1, "{reasons:?}");
    assert_eq!(summary["reasons"], serde_json::json!(reasons));
    assert_eq!(
        [&summary["in"], &summary["out"], &summary["rejected"]],
        [input.len(), kept.len(), dropped.len()]
    );
    let settings = summary["settings"].to_string();
    assert!(
        settings.contains("deduplication.similarity_threshold = 0.9"),
        "{settings}"
    );
    assert!(
        !settings.contains("deduplication.model"),
        "where it lies is nobody's business"
    );

    let mut all: BTreeMap<&str, Value> = BTreeMap::new();
    for record in kept.iter().chain(&dropped) {
        let mut bare = record.clone();
        for key in ["tweet_normalized", "reply_normalized", "dropped"] {
            bare.as_object_mut().unwrap().remove(key);
        }
        for key in ["split", "split_group"] {
            let is_there = bare.as_object_mut().unwrap().remove(key).is_some();
            assert_eq!(is_there, record["dropped"].is_null(), "{key}: {record}");
        }
        assert!(all.insert(id(record), bare).is_none(), "twice: {record}");
    }
    let expected: BTreeMap<&str, Value> =
        input.iter().map(|pair| (id(pair), pair.clone())).collect();
    assert_eq!(all, expected);

    let ids: BTreeSet<&str> = kept.iter().map(id).collect();
    let mut found = Vec::new();
    for record in &dropped {
        let why = &record["dropped"];
        assert!(
            ids.contains(why["keeper"].as_str().unwrap()),
            "the keeper is gone: {record}"
        );
        found.push((
            id(record),
            why["reason"].as_str().unwrap(),
            why["keeper"].as_str().unwrap(),
        ));
        if why["reason"] == "semantic" {
            assert!(
                why["tweet_cosine"].as_f64().unwrap() > 0.9
                    && why["reply_cosine"].as_f64().unwrap() > 0.9
            );
        } else {
            assert!(why.get("tweet_cosine").is_none() && why.get("reply_cosine").is_none());
        }
    }
    found.sort_unstable();
    // Of the semantic copies the one with more likes stays: the copy.
    let mut expected = Vec::new();
    for i in 0..16 {
        let name = |kind: &str| format!("{kind}{i:02}");
        match i % 4 {
            1 => expected.push((name("e"), "exact", name("a"))),
            2 => expected.push((name("a"), "semantic", name("s"))),
            _ => {}
        }
    }
    expected.sort();
    let expected: Vec<(&str, &str, &str)> = expected
        .iter()
        .map(|(a, b, c)| (a.as_str(), *b, c.as_str()))
        .collect();
    assert_eq!(found, expected);
    assert!(
        kept.windows(2)
            .all(|w| w[0]["reply_likes"].as_u64() >= w[1]["reply_likes"].as_u64()),
        "best first"
    );
}

#[test]
fn a_second_run_follows_the_new_settings_without_a_trace_of_the_old() {
    let (tool, (tweet, reply)) = (tool(), TOPICS[2]);
    let input = [
        pair("1", "1", tweet, reply, 9),
        pair(
            "2",
            "2",
            &tweet.replace('.', "!"),
            &reply.replace('.', "!!"),
            8,
        ),
    ];
    let strict = ["--threshold", "1"];
    assert_eq!(run(&tool, &strict, &text(&input)).records().len(), 2);
    let kept = run(&tool, &[], &text(&input)).stdout;
    let dropped = tool.read("dropped.jsonl");
    assert!(lines(&dropped)[0]["dropped"].is_object());
    let both = run(&tool, &strict, &(kept + &dropped)).stdout;
    assert!(lines(&both).iter().all(|r| r.get("dropped").is_none()));
    assert_eq!(lines(&both).len(), 2);
    let both = both.replace(r#""split_group":""#, r#""split_group":"old "#);
    let kept = run(&tool, &[], &both).records();
    assert_eq!(kept[0]["split_group"], "1");
    let dropped = &lines(&tool.read("dropped.jsonl"))[0];
    assert!(dropped.get("split").is_none() && dropped.get("split_group").is_none());
}

#[test]
fn one_row_can_be_held_out() {
    let (tool, input) = (tool(), text(&pairs()[..1]));
    for (fraction, side) in [("1", "eval"), ("0.1", "train")] {
        let run = run(&tool, &["--eval-fraction", fraction], &input);
        assert_eq!(run.records()[0]["split"], side, "{run}");
    }
}

#[test]
fn both_texts_must_be_near() {
    let (tweet, reply) = TOPICS[0];
    let input = [
        pair("1", "1", tweet, reply, 9),
        pair("2", "2", tweet, TOPICS[1].1, 8),
        pair("3", "3", TOPICS[1].0, reply, 7),
    ];
    let kept = run(&tool(), &[], &text(&input)).records();
    assert_eq!(kept.iter().map(id).collect::<Vec<_>>(), ["1", "2", "3"]);
}

#[test]
fn a_keeper_that_goes_itself_is_followed() {
    let (tweet, reply) = TOPICS[2];
    let input = [
        pair(
            "best",
            "1",
            &tweet.replace('.', "!"),
            &reply.replace('.', "!!"),
            90,
        ),
        pair("middle", "2", tweet, reply, 50),
        pair("worst", "3", &tweet.to_lowercase(), reply, 10),
        pair(
            "middle",
            "2",
            "Quite another reading of the same pair, after an edit.",
            reply,
            5,
        ),
    ];
    let tool = tool();
    assert_eq!(run(&tool, &[], &text(&input)).records().len(), 1);
    let dropped = lines(&tool.read("dropped.jsonl"));
    let why: Vec<_> = dropped
        .iter()
        .map(|r| (id(r), &r["dropped"]["reason"], &r["dropped"]["keeper"]))
        .collect();
    assert_eq!(
        why,
        [
            ("middle", &json!("semantic"), &json!("best")),
            ("worst", &json!("exact"), &json!("best")),
            ("middle", &json!("id"), &json!("best"))
        ]
    );
}

/// Threads, the same tweet elsewhere, near tweets, a reply that is the next tweet, and the
/// same reply elsewhere all stay on one side, whatever the seed, and say that they are one
/// group.
#[test]
fn nothing_leaks_across_the_cut() {
    let tool = tool();
    // Tweets that join none of the threads that they stand in.
    let mut fillers = [
        "Well, who painted that door?",
        "My knee knows when rain comes.",
        "Tax forms in verse, please.",
        "Owls again.",
        "Is there a word for half a spoon?",
        "Seven keys and none of them fits.",
        "The radio plays only drums today.",
    ]
    .into_iter();
    let mut input = Vec::new();
    for (i, (tweet, reply)) in TOPICS.into_iter().enumerate() {
        // Nobody else's reply, and nobody's tweet.
        let other = format!("{} So they said on day {i}.", TOPICS[(i + 1) % 16].1);
        let mut add = |kind: &str, thread: &str, tweet: &str, reply: &str| {
            let (id, thread) = (format!("{i:02}{kind}"), format!("{i:02}{thread}"));
            input.push(pair(&id, &thread, tweet, reply, 9));
        };
        add("a", "x", tweet, reply);
        match i % 5 {
            0 => add("b", "x", fillers.next().unwrap(), &other),
            1 => add("b", "y", tweet, &other),
            2 => add("b", "y", &tweet.replace('.', "!!"), &other),
            3 => add("b", "y", reply, &other),
            // However it was typed.
            _ => add("b", "y", fillers.next().unwrap(), &format!("@a  {reply}")),
        }
    }
    let mut choices = BTreeSet::new();
    for seed in ["1", "2", "3", "4"] {
        let arguments = ["--seed", seed, "--eval-fraction", "0.25"];
        let kept = run(&tool, &arguments, &text(&input)).records();
        assert_eq!(kept.len(), 32);
        let field = |key: &str| -> BTreeMap<String, String> {
            let of = |row: &Value| (id(row).to_owned(), row[key].as_str().unwrap().to_owned());
            kept.iter().map(of).collect()
        };
        let (sides, groups) = (field("split"), field("split_group"));
        for i in 0..16 {
            let [a, b] = ["a", "b"].map(|kind| format!("{i:02}{kind}"));
            assert_eq!(sides[&a], sides[&b], "topic {i}, seed {seed}");
            // The least of its threads, so that no two groups have one name.
            assert_eq!([&groups[&a], &groups[&b]], [&format!("{i:02}x"); 2]);
        }
        assert_eq!(sides.values().filter(|&side| side == "eval").count(), 8);
        choices.insert(format!("{sides:?}"));
    }
    assert_eq!(choices.len(), 4, "the seed decides nothing");
}

#[test]
fn normalised_texts_stand_beside_the_raw_ones() {
    let input = pair(
        "1",
        "1",
        "@ann  Sooooo “nice” #GoodDay!!!!!",
        "ｙｅｓ\nindeed",
        1,
    );
    let [record] = &run(&tool(), &[], &text(std::slice::from_ref(&input))).records()[..] else {
        panic!()
    };
    assert_eq!(record["tweet_normalized"], "Soo \"nice\" Good Day!!!");
    assert_eq!(record["reply_normalized"], "yes indeed");
    assert_eq!(
        (&record["tweet"], &record["reply"]),
        (&input["tweet"], &input["reply"])
    );
}

#[test]
fn wrong_use_names_the_remedy() {
    let tool = tool();
    let input = text(&pairs()[..4]);
    // Before anything is read, which may have been paid for.
    tool.run(&["--model", "nowhere"], "no row")
        .exits(2)
        .says("make models")
        .says("nowhere");
    tool.run(&["--threshold", "1.5"], &input)
        .exits(2)
        .says("similarity-threshold: deduplication.similarity_threshold is 1.5; it must be");
    tool.file("d.yaml", "deduplication:\n  # all\n  eval_fraction: -0.1\n");
    tool.run(&["--config", "d.yaml"], &input)
        .exits(2)
        .says("d.yaml:3: deduplication.eval_fraction is -0.1; it must be in 0 to 1");
    tool.run(&["--model", &model(), "--max-bad-lines", "1"], &input)
        .exits(2)
        .says("--dropped");
    tool.run(&["--model", &model()], &text(&pairs()))
        .exits(0)
        .says("--dropped FILE");
}

/// Another model's folder is none to remove files from; a damaged one of our own is.
#[test]
fn a_folder_of_another_model_is_refused_as_such() {
    let tool = tool();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model");
    let demo = demo.display().to_string();
    // Before anything is read.
    let refused = |model: &str, input: &str, file: &str| {
        let run = tool.run(&["--model", model], input).exits(2);
        run.says(&format!("(--model) {model}: is not the sentence model"))
            .says("sentence-transformers/all-MiniLM-L6-v2")
            .says(&format!("{model}/{file} is another"))
            .says("leave --model away")
            .says("make models")
            .never_says("remove");
    };
    refused(&demo, "no row", "config.json");
    let input = text(&pairs()[..4]);
    let own = "data/cache/models/all-MiniLM-L6-v2";
    for (folder, changed) in [("tuned", "model.safetensors"), (own, "config.json")] {
        let path = tool.folder().join(folder);
        std::fs::create_dir_all(&path).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            match file == changed {
                true => std::fs::write(path.join(file), "{}").unwrap(),
                false => {
                    std::os::unix::fs::symlink(Path::new(&model()).join(file), path.join(file))
                        .unwrap()
                }
            }
        }
    }
    refused("tuned", &input, "model.safetensors");
    for model in [&[][..], &["--model", own], &["--model", &tool.path(own)]] {
        tool.run(model, &input)
            .exits(4)
            .says("config.json: sha256")
            .says("`make models` fetches it again");
    }
}

/// Two texts under one id are no two copies of one text.
#[test]
fn a_repeated_id_is_counted_apart() {
    let (tool, (tweet, reply)) = (tool(), TOPICS[2]);
    let input = [
        pair("1", "1", tweet, reply, 9),
        pair("1", "1", TOPICS[3].0, TOPICS[3].1, 5),
        pair("1", "1", TOPICS[4].0, TOPICS[4].1, 4),
        pair("1", "1", tweet, reply, 3),
        pair("2", "2", tweet, reply, 1),
    ];
    let ran = run(&tool, &["--summary", "summary.json"], &text(&input))
        .says("dropped 2 exact and 0 semantic duplicates, 2 of a repeated id with different text;")
        .says("warning: dropped 2 rows of an id that a better one has, with different text")
        .says("--dropped FILE has them with the reason `id`");
    assert_eq!(ran.records().len(), 1);
    let summary: Value = serde_json::from_str(&tool.read("summary.json")).unwrap();
    assert_eq!(summary["reasons"], json!({"exact": 2, "id": 2}));
    let dropped = lines(&tool.read("dropped.jsonl"));
    let by_id = dropped
        .iter()
        .filter(|row| row["dropped"]["reason"] == "id");
    let texts: Vec<&Value> = by_id.map(|row| &row["tweet"]).collect();
    assert_eq!(texts, [TOPICS[3].0, TOPICS[4].0]);
    run(&tool, &[], &text(&pairs())).never_says("warning");
}

#[test]
fn the_examples_of_the_help_run() {
    let tool = tool();
    tool.file("valid.jsonl", &text(&pairs()));
    let folder = tool.folder().join("data/cache/models");
    std::fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink(model(), folder.join("all-MiniLM-L6-v2")).unwrap();
    harness::check_examples(&tool);
}
