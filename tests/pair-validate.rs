//! pair-validate through the real binary.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use harness::{Conventions, Run, Tool, behind};
use serde_json::{Value, json};

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_pair-validate"))
}

/// A pair that every filter lets pass, by its number.
fn good(i: usize) -> Value {
    const KINDS: [&str; 5] = ["apple", "pear", "cherry", "walnut", "quince"];
    let kind = KINDS[i % KINDS.len()];
    json!({
        "v": 1, "id": format!("p{i}"), "conversation_id": format!("c{i}"),
        "tweet_id": format!("{}", 1000 + i), "tweet": format!("We planted {i} more {kind} trees along the river this weekend."),
        "tweet_likes": 150 + i, "reply_id": format!("{}", 5000 + i),
        "reply": format!("The late {kind} keeps best, so leave room for {i} more of those."),
        "reply_likes": 5 + i % 40, "reply_author_followers": 100 + i,
    })
}

/// Good pairs with a bad one after every third.
fn mixed(count: usize) -> String {
    let mut text = String::new();
    for i in 0..count {
        let mut pair = good(i);
        if i % 3 == 2 {
            let (key, value) = match i / 3 % 6 {
                0 => ("reply", json!("Nice.")),
                1 => ("reply_likes", json!(0)),
                2 => (
                    "tweet",
                    json!("Wir haben am Wochenende noch mehr Bäume am Fluss gepflanzt."),
                ),
                3 => (
                    "reply",
                    json!("There is more about that at https://example.org/trees today"),
                ),
                4 => ("tweet_media", json!(2)),
                _ => ("reply_author_followers", Value::Null),
            };
            pair[key] = value;
        }
        text.push_str(&format!("{pair}\n"));
    }
    text
}

harness::conventions!(|| {
    let input = mixed(30);
    (
        tool(),
        Conventions {
            arguments: Vec::new(),
            rejects: "--rejects",
            input,
            empty: 0,
            key: "collection.quality.max_toxicity",
            passes_records: true,
        },
    )
});

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn without(mut record: Value, keys: &[&str]) -> Value {
    for key in keys {
        record.as_object_mut().unwrap().remove(*key);
    }
    record
}

/// More rows than one chunk, so that order and counts hold across chunks.
#[test]
fn validated_and_rejected_together_are_the_input() {
    let tool = tool();
    let input = mixed(5000);
    let run = tool
        .run(
            &["--rejects", "rejects.jsonl", "--summary", "summary.json"],
            &input,
        )
        .exits(0);
    let (valid, rejected) = (run.records(), lines(&tool.read("rejects.jsonl")));
    assert!(!valid.is_empty() && !rejected.is_empty());

    let number = |record: &Value| {
        record["id"].as_str().unwrap()[1..]
            .parse::<usize>()
            .unwrap()
    };
    let mut all = BTreeMap::new();
    for (records, added) in [(&valid, "validation"), (&rejected, "rejected")] {
        assert!(
            records.windows(2).all(|w| number(&w[0]) < number(&w[1])),
            "the order changed"
        );
        for record in records {
            assert!(record[added].is_object(), "{record}");
            assert!(
                all.insert(number(record), without(record.clone(), &[added]))
                    .is_none(),
                "twice: {record}"
            );
        }
    }
    assert_eq!(all.into_values().collect::<Vec<_>>(), lines(&input));

    let summary: Value = serde_json::from_str(&tool.read("summary.json")).unwrap();
    assert_eq!(summary["in"], 5000);
    assert_eq!(summary["out"], valid.len());
    assert_eq!(summary["rejected"], rejected.len());
    let settings = summary["settings"].to_string();
    assert!(
        settings.contains("collection.reply_filters.min_length = "),
        "{settings}"
    );
    let mut counts = BTreeMap::<String, u64>::new();
    for reason in rejected
        .iter()
        .flat_map(|r| r["rejected"]["reasons"].as_array().unwrap())
    {
        *counts
            .entry(reason["filter"].as_str().unwrap().into())
            .or_default() += 1;
    }
    assert_eq!(summary["reasons"], json!(counts));
    assert_eq!(
        counts.keys().map(String::as_str).collect::<Vec<_>>(),
        [
            "reply_author_followers_unknown",
            "reply_few_likes",
            "reply_too_short",
            "reply_url",
            "tweet_language",
            "tweet_media"
        ]
    );
    assert!(
        run.stderr.trim_end().ends_with(&format!(
            "in 5000, out {}, rejected {}",
            valid.len(),
            rejected.len()
        )),
        "{run}"
    );
}

#[test]
fn every_reason_is_told_and_the_record_stays_as_it_came() {
    let tool = tool();
    let line = r#"{"tweet_id":7,"tweet":"Gut.","tweet_likes":1e0,"reply_id":"8","reply":"ok \u00e9","x":1.50}"#;
    let line = line.replace("1e0", "1");
    tool.run(&["--rejects", "r.jsonl"], &format!("{line}\n"))
        .exits(0);
    let text = tool.read("r.jsonl");
    assert!(text.starts_with(&line[..line.len() - 1]), "{text}");
    let [record] = &lines(&text)[..] else {
        panic!("{text}")
    };
    assert_eq!(
        (&record["id"], &record["conversation_id"]),
        (&json!("7-8"), &json!("7"))
    );
    assert_eq!(record["rejected"]["by"], "pair-validate");
    let reasons: Vec<&str> = record["rejected"]["reasons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["filter"].as_str().unwrap())
        .collect();
    assert_eq!(
        reasons,
        [
            "tweet_too_short",
            "tweet_few_likes",
            "reply_too_short",
            "reply_likes_unknown",
            "reply_author_followers_unknown"
        ]
    );
    assert!(
        record["rejected"]["reasons"][0]["detail"]
            .as_str()
            .unwrap()
            .contains("at least 30")
    );
}

#[test]
fn what_passes_is_described() {
    let run = tool().run::<&str>(&[], &format!("{}\n", good(0))).exits(0);
    let [record] = &run.records()[..] else {
        panic!("{run}")
    };
    let validation = &record["validation"];
    assert_eq!(validation["language"], "en");
    assert_eq!(
        validation["reply_length"],
        good(0)["reply"].as_str().unwrap().chars().count()
    );
    assert_eq!(validation["reply_toxicity"], 0.0);
    // 5 likes and 100 followers by the formula in record::quality.
    let expected = 0.7 * 6f64.ln() / (6f64.ln() + 51f64.ln()) + 0.3 * 5.0 / 15.0;
    assert!(
        (validation["quality"].as_f64().unwrap() - expected).abs() < 1e-6,
        "{validation}"
    );
}

#[test]
fn settings_decide_and_a_second_run_follows_the_new_ones() {
    let tool = tool();
    let strict = tool.file(
        "strict.yaml",
        "collection:\n  reply_filters:\n    min_likes: 1000\n",
    );
    let input = format!("{}\n", good(3));
    let run = tool
        .run(&["--config", &strict, "--rejects", "r.jsonl"], &input)
        .exits(0);
    assert!(
        run.stdout.is_empty() && run.stderr.contains("reply_few_likes 1"),
        "{run}"
    );
    // What was refused comes back without a trace of it, and the other way round.
    let back = tool.run::<&str>(&[], &tool.read("r.jsonl")).exits(0);
    assert!(back.records()[0].get("rejected").is_none(), "{back}");
    tool.run(&["--config", &strict, "--rejects", "r.jsonl"], &back.stdout)
        .exits(0);
    assert!(lines(&tool.read("r.jsonl"))[0].get("validation").is_none());
    // Doing it twice is doing it once.
    assert_eq!(
        tool.run::<&str>(&[], &back.stdout).exits(0).stdout,
        back.stdout
    );
}

#[test]
fn wrong_use_names_the_remedy() {
    let tool = tool();
    tool.run(&["--max-bad-lines", "3"], "")
        .exits(2)
        .says("--rejects");
    let yaml = tool.file("c.yaml", "collection: {tweet_filters: {min_length: 500}}\n");
    tool.run(&["--config", &yaml], "")
        .exits(2)
        .says("c.yaml:1: collection.tweet_filters.min_length is 500, above max_length");
    self::tool()
        .env("PAIRS__COLLECTION__QUALITY__MAX_TOXICITY", "2")
        .run::<&str>(&[], "")
        .exits(2)
        .says("environment variable PAIRS__COLLECTION__QUALITY__MAX_TOXICITY: collection.quality.max_toxicity is 2; it");
    tool.run::<&str>(&[], "{\"tweet\":\"a\"}\n")
        .exits(3)
        .says("-:1: ")
        .says("`id");
    tool.run::<&str>(&[], &format!("{}\n", good(0)).replace("150", "\"many\""))
        .exits(3)
        .says("-:1: key `tweet_likes`");
    // What a stranger wrote reaches the terminal as escapes.
    let odd = r#""\u001b[31m\u202e":1"#;
    tool.run::<&str>(&[], &format!("{{{odd},{odd}}}\n"))
        .exits(3)
        .says("stands twice")
        .never_says("\u{1b}")
        .never_says("\u{202e}");
    tool.run::<&str>(&[], &mixed(9))
        .exits(0)
        .says("--rejects FILE")
        .never_says("no pair passed");
    let short = format!("{}\n", good(0)).replace("The late apple keeps best", "A");
    tool.run::<&str>(
        &[],
        &short.replace(", so leave room for 0 more of those", ""),
    )
    .exits(0)
    .says("no pair passed");
    // Standard output came first: a disk that is full for the rejects is still exit 4.
    tool.run(&["--rejects", "/dev/full"], &mixed(9))
        .exits(4)
        .says("/dev/full");
}

#[test]
fn a_line_that_is_not_utf8_is_kept_to_the_byte() {
    let tool = tool();
    let rejects = ["--max-bad-lines", "1", "--rejects", "r"];
    tool.run_bytes(&rejects, b"{\"id\":\"\xe9A\"}\n").exits(0);
    let kept = &lines(&tool.read("r"))[0]["bad_line"];
    assert_eq!(kept["raw"], "{\"id\":\"\u{fffd}A\"}");
    // printf '{"id":"\xe9A"}' | base64
    assert_eq!(kept["raw_base64"], "eyJpZCI6IulBIn0=");
    tool.run(&rejects, "no JSON\n").exits(0);
    assert!(!tool.read("r").contains("raw_base64"));
}

#[test]
fn a_log_that_cannot_be_written_is_told_once() {
    for quiet in [&[][..], &["--quiet"]] {
        let arguments = [&["--log", "/dev/full"][..], quiet].concat();
        let run = tool().run(&arguments, &mixed(9)).exits(0);
        let told = "pair-validate: warning: --log /dev/full: No space left on device";
        assert_eq!(run.stderr.matches(told).count(), 1, "{run}");
        assert!(run.stderr.lines().count() > 2, "{run}");
    }
    let tool = tool();
    tool.run(&["--log", "l"], &mixed(9))
        .exits(0)
        .never_says("warning: --log");
    assert!(tool.read("l").contains("pair-validate: in "));
}

/// Appending to its own input it would read what it wrote, without end.
#[test]
fn what_is_no_regular_file_may_be_input_and_output() {
    let tool = tool();
    let zero = "exec \"$@\" < /dev/null > /dev/null";
    Run::of(
        &mut behind("bash", &["-c", zero, "-"], &tool.command::<&str>(&[])),
        b"",
    )
    .exits(0);
}

#[test]
fn the_examples_of_the_help_run() {
    let tool = tool();
    tool.file("pairs.jsonl", &mixed(9));
    tool.file(
        "data.yaml",
        "collection: {quality: {unknown_figures: accept}}\n",
    );
    harness::check_examples(&tool);
}
