//! tw-fetch through its binary: imports of every format, and the Apify API as played
//! by a local server.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;

use harness::server::{Reply, Request, Server};
use harness::{Conventions, Run, Tool, behind, check_examples};
use serde_json::{Value, json};

const TOKEN: &str = "apify_api_0123456789abcdef";

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_tw-fetch"))
}

fn pair_lines(n: usize) -> String {
    (0..n)
        .map(|i| {
            let pair = json!({"tweet_id": format!("{}", 100 + i), "tweet": "What is your favourite soup?", "reply_id": format!("{}", 900 + i), "reply": "Tomato, with far too much bread."});
            format!("{pair}\n")
        })
        .collect()
}

harness::conventions!(|| {
    let conventions = Conventions {
        arguments: vec!["--method".into(), "file".into()],
        rejects: "--unpaired",
        // Past any pipe's buffer, so that a reader who left is noticed.
        input: pair_lines(2000),
        empty: 0,
        key: "collection.target_pairs",
        passes_records: true,
    };
    (tool(), conventions)
});

#[test]
fn examples_of_the_help_run() {
    let tool = tool();
    tool.file("export.json", &Value::from(apify_items()).to_string());
    tool.file("tweets.jsonl", &lines(&apify_items()[..1]));
    tool.file("replies.jsonl", &lines(&apify_items()[1..]));
    tool.file("pairs.jsonl", &pair_lines(2));
    check_examples(&tool);
}

// ---- files ----

fn lines(items: &[Value]) -> String {
    items.iter().map(|item| format!("{item}\n")).collect()
}

/// A tweet, a reply, a reply to that, and one to a tweet that is not here: the fields
/// and forms of Tweet Scraper V2.
fn apify_items() -> Vec<Value> {
    let item = |id: &str, parent: Option<&str>, author: &str, text: &str, likes: u64| {
        let mut item = json!({
            "type": "tweet", "id": id, "url": format!("https://x.com/i/status/{id}"), "text": "cut short…", "fullText": text,
            "retweetCount": 1, "replyCount": 2, "likeCount": likes, "createdAt": "Thu Sep 18 04:57:01 +0000 2025", "lang": "en",
            "isReply": parent.is_some(), "conversationId": "1790000000000000001", "isRetweet": false, "isQuote": false,
            "media": [], "entities": {"hashtags": [], "urls": [], "user_mentions": []},
            "author": {"id": format!("id-{author}"), "userName": author, "followers": 1500}
        });
        if let Some(parent) = parent {
            item["inReplyToId"] = parent.into();
        }
        item
    };
    let mut items = vec![
        item(
            "1790000000000000001",
            None,
            "made_up_anna",
            "Soup &amp; bread &lt;3 &amp;amp; you?",
            300,
        ),
        item(
            "1790000000000000002",
            Some("1790000000000000001"),
            "made_up_ben",
            "Bread first, always.",
            40,
        ),
        item(
            "1790000000000000003",
            Some("1790000000000000002"),
            "made_up_cleo",
            "Second that.",
            7,
        ),
        item(
            "1790000000000000009",
            Some("1790000000000000008"),
            "made_up_dora",
            "To nobody here.",
            3,
        ),
    ];
    items[2]["media"] = json!(["https://pbs.example/1.jpg", "https://pbs.example/2.jpg"]);
    items
}

fn expected_pairs(source: &str) -> Vec<Value> {
    vec![
        json!({
            "v": 1, "id": "1790000000000000001-1790000000000000002", "conversation_id": "1790000000000000001",
            "tweet_id": "1790000000000000001", "tweet": "Soup & bread <3 &amp; you?", "tweet_likes": 300, "tweet_replies": 2,
            "tweet_created_at": "2025-09-18T04:57:01Z", "tweet_lang": "en", "tweet_media": 0, "tweet_urls": 0,
            "reply_id": "1790000000000000002", "reply": "Bread first, always.", "reply_likes": 40,
            "reply_author_followers": 1500, "reply_created_at": "2025-09-18T04:57:01Z", "reply_lang": "en",
            "reply_media": 0, "reply_urls": 0, "source": source,
        }),
        json!({
            "v": 1, "id": "1790000000000000002-1790000000000000003", "conversation_id": "1790000000000000001",
            "tweet_id": "1790000000000000002", "tweet": "Bread first, always.", "tweet_likes": 40, "tweet_replies": 2,
            "tweet_created_at": "2025-09-18T04:57:01Z", "tweet_lang": "en", "tweet_media": 0, "tweet_urls": 0,
            "reply_id": "1790000000000000003", "reply": "Second that.", "reply_likes": 7,
            "reply_author_followers": 1500, "reply_created_at": "2025-09-18T04:57:01Z", "reply_lang": "en",
            "reply_media": 2, "reply_urls": 0, "source": source,
        }),
    ]
}

#[test]
fn an_apify_export_joins_from_an_array_from_lines_and_in_any_order() {
    let tool = tool();
    let items = apify_items();
    let array = tool.file("array.json", &serde_json::to_string_pretty(&items).unwrap());
    let jsonl = tool.file("lines.jsonl", &lines(&items));
    for file in [&array, &jsonl] {
        let run = tool
            .run(&["--method", "file", "--input", file], "")
            .exits(0);
        assert_eq!(run.records(), expected_pairs("apify-export"));
        let run = run.never_says("made_up_");
        run.says("in no pair: parent_not_collected 1 (--unpaired FILE keeps them)")
            .says("in 4, out 2, rejected 1");
    }
    let backwards: Vec<Value> = items.into_iter().rev().collect();
    let mut pairs = tool
        .run(&["--input", "-"], &lines(&backwards))
        .exits(0)
        .records();
    pairs.reverse();
    assert_eq!(
        pairs,
        expected_pairs("apify-export"),
        "a reply may come before its tweet"
    );
}

#[test]
fn a_flattened_csv_gives_the_same_pairs() {
    for separator in ["/", "."] {
        let tool = tool();
        let header = [
            "id",
            "fullText",
            "text",
            "likeCount",
            "replyCount",
            "createdAt",
            "lang",
            "isReply",
            "inReplyToId",
            "conversationId",
            "author/id",
            "author/userName",
            "author/followers",
            "media/0",
            "media/1",
        ]
        .join(",")
        .replace('/', separator);
        let mut csv = format!("\u{feff}{header}\r\n");
        for item in apify_items() {
            let quote = |v: &Value| match v {
                Value::Null => String::new(),
                Value::String(s) => format!("\"{}\"", s.replace('"', "\"\"")),
                other => other.to_string(),
            };
            let cells = [
                "/id",
                "/fullText",
                "/text",
                "/likeCount",
                "/replyCount",
                "/createdAt",
                "/lang",
                "/isReply",
                "/inReplyToId",
                "/conversationId",
                "/author/id",
                "/author/userName",
                "/author/followers",
                "/media/0",
                "/media/1",
            ];
            let row: Vec<String> = cells
                .iter()
                .map(|p| item.pointer(p).map(quote).unwrap_or_default())
                .collect();
            csv += &format!("{}\r\n", row.join(","));
        }
        let file = tool.file("export.csv", &csv);
        assert_eq!(
            tool.run(&["--input", &file], "").exits(0).records(),
            expected_pairs("apify-export")
        );
        let bad = tool.file("bad.csv", &format!("{csv}1,2,3\r\n"));
        tool.run(&["--input", &bad], "")
            .exits(3)
            .says("bad.csv:6: 3 cells under 15 headers");
    }
}

#[test]
fn twscrape_lines_join_and_keep_every_digit() {
    let tool = tool();
    let tweet = |id: u64, parent: Option<u64>, user: u64, text: &str| {
        json!({
            "id": id, "id_str": id.to_string(), "date": "2025-09-18 04:57:01+00:00", "lang": "en", "rawContent": text,
            "replyCount": 2, "likeCount": 11, "conversationId": 1_790_000_000_000_000_001_u64,
            "inReplyToTweetId": parent, "links": [], "media": {"photos": [], "videos": [{}], "animated": []},
            "user": {"id": user, "username": "made_up_anna", "followersCount": 70}
        })
    };
    let items = [
        tweet(1_790_000_000_000_000_001, None, 1, "A &gt; B"),
        // 1 apart, and beyond 2^53: floats would take them for the same tweet.
        tweet(
            1_790_000_000_000_000_002,
            Some(1_790_000_000_000_000_001),
            2,
            "No.",
        ),
        tweet(
            1_790_000_000_000_000_003,
            Some(1_790_000_000_000_000_001),
            1,
            "And another thing",
        ),
    ];
    let pairs = tool
        .run(&["--unpaired", "unpaired.jsonl"], &lines(&items))
        .exits(0)
        .records();
    assert_eq!(pairs.len(), 1);
    assert_eq!(pairs[0]["id"], "1790000000000000001-1790000000000000002");
    assert_eq!(pairs[0]["tweet"], "A > B");
    assert_eq!(pairs[0]["reply_author_followers"], 70);
    assert_eq!(pairs[0]["reply_media"], 1);
    assert_eq!(pairs[0]["source"], "twscrape");
    let left: Value = serde_json::from_str(&tool.read("unpaired.jsonl")).unwrap();
    assert_eq!(left["rejected"]["reasons"][0]["filter"], "self_reply");
    assert_eq!(left["id"], 1_790_000_000_000_000_003_u64);
}

#[test]
fn pairs_pass_byte_for_byte_and_get_what_they_lack() {
    let tool = tool();
    let bare = r#"{"tweet_id":"1","tweet":"a \u00e9","reply_id":2,"reply":"b","odd":1.0e2}"#;
    let whole =
        r#"{"v":1,"id":"x","conversation_id":"c","tweet":"a","reply":"b","odd":{ "n" : 1 }}"#;
    let run = tool
        .run::<&str>(&[], &format!("{bare}\n{whole}\n"))
        .exits(0);
    let added = r#","v":1,"id":"1-2","conversation_id":"1"}"#;
    assert_eq!(
        run.stdout,
        format!("{}{added}\n{whole}\n", &bare[..bare.len() - 1])
    );
}

#[test]
fn nothing_is_lost_between_pairs_and_unpaired() {
    let tool = tool();
    let mut items = apify_items();
    items.push(items[0].clone());
    items.push(json!({"noResults": true}));
    items.push(
        json!({"id": "5", "fullText": "RT @x: hm", "isRetweet": true, "conversationId": "5"}),
    );
    items.push(json!({"id": "6", "fullText": "Anybody?", "conversationId": "6"}));
    let run = tool
        .run(
            &["--unpaired", "left.jsonl", "--keep-authors"],
            &lines(&items),
        )
        .exits(0);
    let run = run.says("in 8, out 2, rejected 5");
    assert_eq!(run.records()[0]["reply_author"], "made_up_ben");
    let left = tool.read("left.jsonl");
    let reasons: Vec<String> = left
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["rejected"]["reasons"][0]["filter"]
                .to_string()
        })
        .collect();
    let expected = [
        "duplicate_id",
        "no_tweet",
        "parent_not_collected",
        "retweet",
        "no_reply_collected",
    ];
    assert_eq!(reasons, expected.map(|r| format!("\"{r}\"")));
    // What is left over may be read again beside what it lacked.
    let parent = json!({"id": "1790000000000000008", "text": "The missing one", "conversationId": "1790000000000000008"});
    let more = tool.file("more.jsonl", &lines(&[parent]));
    let again = tool
        .run(&["--input", &tool.path("left.jsonl"), "--input", &more], "")
        .exits(0);
    assert!(
        again
            .records()
            .iter()
            .any(|pair| pair["reply"] == "To nobody here."),
        "{again}"
    );
}

#[test]
fn what_is_malformed_is_named_by_its_place() {
    let tool = tool();
    let cases = [
        (
            "lines.jsonl",
            "{\"id\":\"1\",\"text\":\"a\"}\n{oops\n",
            "lines.jsonl:2: ",
        ),
        (
            "array.json",
            "[\n{\"id\":\"1\",\"text\":\"a\"},\n{\"id\":1.79e18,\"text\":\"b\"}]",
            "array.json: element 2: key `id`",
        ),
        (
            "cut.json",
            "[{\"id\":\"1\",\"text\":\"a\"},\n{\"id\":",
            "cut.json:2: not a JSON array",
        ),
        (
            "sheet.csv",
            "id,text\n1.79E+18,a\n",
            "sheet.csv:2: key `id`: `1.79E+18` has lost digits",
        ),
        (
            "words.txt",
            "hello\nworld\n",
            "words.txt:1: neither JSON nor CSV",
        ),
        (
            "other.jsonl",
            "{\"a\":1}\n",
            "other.jsonl:1: no record here is an Apify tweet",
        ),
        (
            "pairs.jsonl",
            "{\"tweet\":\"a\",\"reply\":\"b\",\"id\":\"1\"}\n{\"tweet\":\"a\"}\n",
            "pairs.jsonl:2: no key `id`",
        ),
    ];
    for (name, text, said) in cases {
        let file = tool.file(name, text);
        let run = tool.run(&["--input", &file], "").exits(3).says(said);
        assert!(!run.stderr.contains("panicked"), "{run}");
    }
    tool.run(&["--input", "nowhere.json"], "")
        .exits(2)
        .says("nowhere.json");
    let two = "{\"id\":\"1\",\"text\":\"a\"}\nnot json\n";
    tool.run(&["--max-bad-lines", "1", "--unpaired", "u.jsonl"], two)
        .exits(0)
        .says("in 2, out 0, rejected 2");
    let kept = tool.read("u.jsonl");
    assert!(
        kept.contains(r#""line":2"#) && kept.contains(r#""raw":"not json""#),
        "{kept}"
    );
}

#[test]
fn pairs_come_from_csv_too_and_a_named_format_is_believed() {
    let csv =
        "tweet_id,tweet,tweet_likes,reply_id,reply,note\n1,\"Soup, or\nbread?\",12,2,Bread.,1.50\n";
    let run = tool().run::<&str>(&[], csv).exits(0);
    // As table tools write a column with gaps.
    let floats = tool().run::<&str>(&[], &csv.replace(",12,", ",12.0,"));
    assert_eq!(floats.exits(0).records()[0]["tweet_likes"], 12.0);
    let expected = json!({
        "tweet_id": "1", "tweet": "Soup, or\nbread?", "tweet_likes": 12, "reply_id": "2", "reply": "Bread.", "note": "1.50",
        "v": 1, "id": "1-2", "conversation_id": "1",
    });
    assert_eq!(run.records(), [expected]);
    let run = tool()
        .run(&["--format", "twscrape"], &lines(&apify_items()))
        .exits(0);
    run.says("in no pair: no_tweet 4")
        .says("in 4, out 0, rejected 4");
}

/// Bytes changed, dropped, doubled and cut at random places: whatever comes of it, the
/// tool says 0, 2 or 3, and never ends otherwise.
#[test]
fn damaged_files_never_bring_it_down() {
    let tool = tool();
    let good = [
        lines(&apify_items()),
        Value::from(apify_items()).to_string(),
        "id,text,inReplyToId,author/id,likeCount\n1,\"a, b\",,7,3\n2,\"c\nd\",1,8,x\n".to_owned(),
        pair_lines(3),
    ];
    let mut state = 42_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..160 {
        let mut bytes = good[round % good.len()].clone().into_bytes();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] = b"\"{}[],:\\\0\xff1e-"[random(13)],
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, b"\"{}[]\n,"[random(7)]),
                3 => bytes.truncate(at + 1),
                _ => bytes.extend_from_within(at..),
            }
        }
        let run = tool.run_bytes(&["--input", "-"], &bytes);
        assert!(
            [0, 2, 3].contains(&run.code()),
            "{}\n{run}",
            String::from_utf8_lossy(&bytes)
        );
    }
}

// ---- Apify ----

/// Plays Apify: one search that finds `conversations` tweets, and for each conversation
/// asked for two replies that pass the filters and one that does not. `meddle` may answer
/// first.
fn apify(
    conversations: usize,
    meddle: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    // Datasets by run, so that each run keeps its own items.
    let datasets: Mutex<Vec<Vec<Value>>> = Mutex::default();
    Server::start(move |request, before| {
        if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return Reply::json(
                401,
                &json!({"error": {"type": "token-not-provided", "message": "Authentication token was not provided"}}),
            );
        }
        if let Some(reply) = meddle(request, before) {
            return reply;
        }
        let run = |n: usize, status: &str| {
            json!({"data": {
                "id": format!("run{n}"), "actId": "act", "status": status, "defaultDatasetId": format!("set{n}"),
                "startedAt": "2026-01-02T03:04:05.000Z", "usageTotalUsd": 0.01, "stats": {}, "unknown": [1]
            }})
        };
        let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
        let number = |name: &str| {
            name.trim_start_matches(|c: char| c.is_alphabetic())
                .parse::<usize>()
                .unwrap()
        };
        match (request.method.as_str(), parts.as_slice()) {
            ("POST", ["acts", "apidojo~tweet-scraper", "runs"]) => {
                let input = request.json();
                let mut sets = datasets.lock().unwrap();
                sets.push(match input["conversationIds"].as_array() {
                    None => (0..conversations).map(found_tweet).collect(),
                    Some(ids) => ids
                        .iter()
                        .flat_map(|id| found_replies(id.as_str().unwrap()))
                        .collect(),
                });
                Reply::json(201, &run(sets.len() - 1, "READY"))
            }
            ("GET", ["acts", "apidojo~tweet-scraper"]) => Reply::json(
                200,
                &json!({"data": {"id": "act", "name": "tweet-scraper"}}),
            ),
            ("GET", ["actor-runs", id]) => Reply::json(200, &run(number(id), "SUCCEEDED")),
            ("POST", ["actor-runs", id, "abort"]) => Reply::json(200, &run(number(id), "ABORTING")),
            ("POST", ["actor-runs", id, "resurrect"]) => {
                Reply::json(200, &run(number(id), "RUNNING"))
            }
            ("GET", ["datasets", id, "items"]) => {
                let sets = datasets.lock().unwrap();
                let items = &sets[number(id)];
                let query = |name: &str| request.query(name).unwrap().parse::<usize>().unwrap();
                let page: Vec<Value> = items
                    .iter()
                    .skip(query("offset"))
                    .take(query("limit"))
                    .cloned()
                    .collect();
                Reply::text(200, &lines(&page))
                    .header("x-apify-pagination-total", &items.len().to_string())
            }
            _ => Reply::json(
                404,
                &json!({"error": {"type": "record-not-found", "message": "no such thing"}}),
            ),
        }
    })
}

fn found_tweet(i: usize) -> Value {
    let id = format!("{}", 5000 + i);
    json!({
        "type": "tweet", "id": id, "conversationId": id, "isReply": false, "likeCount": 500, "replyCount": 10 + i, "lang": "en",
        "fullText": "What is the one dish that your family asks you to make every single winter?",
        "author": {"id": "asker", "userName": "made_up_asker", "followers": 9000}
    })
}

fn found_replies(conversation: &str) -> Vec<Value> {
    (0..3)
        .map(|i| {
            json!({
                "type": "tweet", "id": format!("{conversation}{i}"), "conversationId": conversation, "inReplyToId": conversation,
                "isReply": true, "likeCount": if i == 2 { 0 } else { 80 }, "replyCount": 0, "lang": "en",
                "fullText": "Onion soup, because it is cheap and it makes the whole house smell of dinner.",
                "author": {"id": format!("author{i}"), "userName": format!("made_up_{i}"), "followers": 4000}
            })
        })
        .collect()
}

fn nothing(_: &Request, _: usize) -> Option<Reply> {
    None
}

/// Two conversations a run, three items a page, and only one repeat of what fails.
const CONFIG: &str = "collection:
  apify: {conversations_per_run: 2, replies_per_conversation: 5, page_size: 3, attempts: 3, search_items: 50}
";

fn fetch(tool: &Tool, server: &Server, more: &[&str]) -> Run {
    let config = tool.file("data.yaml", CONFIG);
    let arguments = collecting(server, &config);
    let arguments = arguments
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied());
    tool.run(&arguments.collect::<Vec<_>>(), "")
        .never_says(TOKEN)
}

/// The arguments of a collection from `server`.
fn collecting(server: &Server, config: &str) -> Vec<String> {
    let (url, host) = (server.url(), server.host());
    [
        "--method",
        "apify",
        "--config",
        config,
        "--state",
        "state",
        "--query",
        "soup",
        "--apify-url",
        &url,
        "--send-key-to",
        &host,
    ]
    .map(String::from)
    .to_vec()
}

#[test]
fn where_the_rest_cannot_be_written_nothing_is_paid_for() {
    let (tool, server) = (with_token(), apify(1, nothing));
    fetch(&tool, &server, &["--unpaired", "/proc/rest.jsonl"])
        .exits(4)
        .says("/proc/rest.jsonl");
    fetch(&tool, &server, &["--max-bad-lines", "1"])
        .exits(2)
        .says("--unpaired");
    assert!(server.requests().is_empty());
}

fn with_token() -> Tool {
    tool().env("APIFY_API_TOKEN", TOKEN)
}

fn starts(server: &Server) -> Vec<Request> {
    server
        .requests()
        .into_iter()
        .filter(|r| r.method == "POST" && r.path.ends_with("/runs"))
        .collect()
}

#[test]
fn it_searches_then_asks_for_replies_until_there_are_enough() {
    let (tool, server) = (with_token(), apify(5, nothing));
    let run = fetch(&tool, &server, &["--target", "6", "--log", "log.txt"]).exits(0);
    // Two conversations a run, two good pairs in each: two runs of replies make eight.
    let pairs = run.records();
    assert_eq!(pairs.len(), 12, "{run}");
    assert_eq!(pairs[0]["source"], "apify");
    assert_eq!(pairs[0]["collected_at"], "2026-01-02T03:04:05.000Z");
    let run = run.says("12 pairs collected, 8 of them pass the cheap filters (target 6)");
    run.says("4 conversations asked for: 12 replies fetched, where the tweets count 50");

    let started = starts(&server);
    assert_eq!(started.len(), 3);
    let search = started[0].json();
    assert_eq!(search["searchTerms"], json!(["soup"]));
    assert_eq!(search["minimumFavorites"], 100);
    assert_eq!(started[0].query("maxItems"), Some("50"));
    assert_eq!(started[0].query("maxTotalChargeUsd"), Some("5.0000"));
    assert_eq!(
        started[1].json()["conversationIds"],
        json!(["5004", "5003"]),
        "the liveliest first"
    );
    assert_eq!(
        started[2].json()["conversationIds"],
        json!(["5002", "5001"])
    );

    // 5 tweets and 6 replies, three to a page: by offset, none twice.
    let pages: Vec<String> = server
        .requests()
        .iter()
        .filter(|r| r.path == "/datasets/set0/items")
        .map(|r| r.query("offset").unwrap().to_owned())
        .collect();
    assert_eq!(pages, ["0", "3"]);
    assert!(!tool.read("log.txt").contains(TOKEN));
    for file in std::fs::read_dir(tool.folder().join("state")).unwrap() {
        assert!(
            !std::fs::read_to_string(file.unwrap().path())
                .unwrap()
                .contains(TOKEN)
        );
    }

    // Finished: served from disk, the same bytes, nobody asked, no token needed.
    let before = server.requests().len();
    let keyless = Tool::new(env!("CARGO_BIN_EXE_tw-fetch"));
    let state = tool.path("state");
    let arguments = [
        "--method", "apify", "--state", &state, "--query", "soup", "--target", "6",
    ];
    let config = keyless.file("data.yaml", CONFIG);
    let again = keyless
        .run(&[&arguments[..], &["--config", &config]].concat(), "")
        .exits(0);
    assert_eq!(again.records(), pairs);
    assert_eq!(server.requests().len(), before);

    // A higher target goes on from there; other searches are another collection.
    let more = fetch(&tool, &server, &["--target", "100"]).exits(0);
    assert_eq!(more.records().len(), 15);
    assert_eq!(
        starts(&server).len(),
        4,
        "one run more, for the one conversation left"
    );
    more.says("the target was not reached and no conversation is left");
    fetch(&tool, &server, &["--query", "bread"])
        .exits(2)
        .says("search_queries was [\"soup\"] and is [\"soup\",\"bread\"]");
}

#[test]
fn every_passing_fault_is_weathered() {
    let calm = fetch(&with_token(), &apify(3, nothing), &["--target", "4"]).exits(0);
    // Every request fails once, each in its own way.
    let faults = Mutex::new((HashSet::new(), 0_usize));
    let server = apify(3, move |request, _| {
        let mut faults = faults.lock().unwrap();
        let key = format!(
            "{} {} {:?}",
            request.method,
            request.path,
            request.query("offset")
        );
        let start = request.method == "POST" && request.path.ends_with("/runs");
        if !faults.0.insert(key) {
            return None;
        }
        faults.1 += 1;
        let limited = json!({"error": {"type": "rate-limit-exceeded", "message": "You have exceeded the rate limit"}});
        Some(match faults.1 % 4 {
            _ if start => Reply::json(429, &limited).header("retry-after", "0"),
            0 => Reply::json(429, &limited),
            1 => Reply::text(502, "<html>Bad Gateway</html>"),
            2 => Reply::text(
                200,
                "{\"id\":\"1\",\"fullText\":\"half a line\"}\n{\"id\":\"2",
            )
            .cut_after(20),
            _ => Reply::hang_up(),
        })
    });
    let run = fetch(&with_token(), &server, &["--target", "4"]).exits(0);
    assert_eq!(run.stdout, calm.stdout);
}

#[test]
fn a_short_page_is_not_the_last_one() {
    // Empty items are left out of pages: of five, the first page shows one, the second none.
    let gaps = |with_total: bool| {
        apify(5, move |request, _| {
            if request.path != "/datasets/set0/items" {
                return None;
            }
            let shown = match request.query("offset") {
                Some("0") => lines(&[found_tweet(0)]),
                Some("3") if !with_total => lines(&[found_tweet(1)]),
                _ => String::new(),
            };
            let page = Reply::text(200, &shown);
            Some(if with_total {
                page.header("x-apify-pagination-total", "8")
            } else {
                page
            })
        })
    };
    for with_total in [true, false] {
        let server = gaps(with_total);
        fetch(&with_token(), &server, &["--target", "1"]).exits(0);
        let mut offsets: Vec<_> = server
            .requests()
            .iter()
            .filter(|r| r.path == "/datasets/set0/items")
            .map(|r| r.query("offset").unwrap().to_owned())
            .collect();
        offsets.dedup();
        assert_eq!(offsets, ["0", "3", "6"], "with a total: {with_total}");
    }
}

#[test]
fn a_page_that_is_no_json_is_not_kept() {
    let server = apify(5, |request, before| {
        let first = request.path == "/datasets/set0/items" && before == 0;
        first.then(|| Reply::text(200, "<html>Please sign in to this network</html>"))
    });
    let tool = with_token();
    fetch(&tool, &server, &["--target", "1"])
        .exits(4)
        .says("of the dataset set0 are no JSON lines");
    assert_eq!(
        fetch(&tool, &server, &["--target", "1"])
            .exits(0)
            .records()
            .len(),
        6
    );
}

/// Whatever moment a collection is killed at, it ends with the same pairs, and no run
/// that is on record is started again.
#[test]
fn a_collection_killed_at_any_moment_goes_on() {
    killed_at_any_moment(&apify(3, nothing), "6");
    killed_at_any_moment(&failing(3, ""), "100");
}

fn killed_at_any_moment(server: &Server, target: &str) {
    let tool = with_token();
    let whole = fetch(&tool, server, &["--target", target]).exits(0);
    let runs = starts(server).len();
    let journal = tool.read("state/journal.jsonl");
    let events: Vec<&str> = journal.split_inclusive('\n').collect();
    assert!(events.len() >= 12, "{journal}");
    for kept in 0..events.len() {
        for torn in [false, true] {
            let mut text = events[..kept].concat();
            if torn {
                text.push_str(&events[kept][..events[kept].len() / 2]);
            }
            tool.file("state/journal.jsonl", &text);
            let before = starts(server).len();
            let begun = events[..kept]
                .iter()
                .filter(|e| e.contains("\"started\""))
                .count();
            let run = fetch(&tool, server, &["--target", target]);
            if kept > 0 && events[kept - 1].contains("\"starting\"") {
                run.exits(4).says("--adopt-run");
                continue;
            }
            assert_eq!(run.exits(0).stdout, whole.stdout, "killed after {text}");
            assert_eq!(
                starts(server).len() - before,
                runs - begun,
                "killed after {text}"
            );
        }
    }
}

#[test]
fn a_page_that_fails_for_good_is_gone_on_from() {
    let broken = std::sync::Arc::new(Mutex::new(true));
    let still = broken.clone();
    let server = apify(5, move |request, _| {
        let page_two =
            request.path == "/datasets/set0/items" && request.query("offset") == Some("3");
        (page_two && *still.lock().unwrap()).then(|| Reply::text(500, "out of order"))
    });
    let tool = with_token();
    fetch(&tool, &server, &["--target", "1"])
        .exits(4)
        .says("500: out of order (tried 3 times)")
        .says("datasets/set0/items");
    *broken.lock().unwrap() = false;
    let before = server.requests().len();
    let run = fetch(&tool, &server, &["--target", "1"]).exits(0);
    assert_eq!(run.records().len(), 6);
    assert_eq!(starts(&server).len(), 2, "the search is not paid for again");
    let first_page = server.requests()[before..]
        .iter()
        .any(|r| r.path == "/datasets/set0/items" && r.query("offset") == Some("0"));
    assert!(!first_page, "what is on disk is not fetched again");
}

#[test]
fn a_start_without_an_answer_is_not_repeated_blindly() {
    let server = apify(2, |request, before| {
        (request.path.ends_with("/runs") && before == 0)
            .then(|| Reply::json(201, &json!({"data": {"id": "lost"}})).cut_after(3))
    });
    let tool = with_token();
    fetch(&tool, &server, &[])
        .exits(4)
        .says("its id never arrived")
        .says("--adopt-run");
    fetch(&tool, &server, &[]).exits(4).says("--adopt-run");
    assert_eq!(
        starts(&server).len(),
        1,
        "nothing is started that may be running"
    );
    fetch(&tool, &server, &["--adopt-run", "none", "--target", "1"]).exits(0);
    fetch(&tool, &server, &["--adopt-run", "x"])
        .exits(2)
        .says("knows of no run");
}

#[test]
fn a_failed_run_is_reported_and_its_items_taken() {
    let server = apify(2, |request, _| {
        let run = |items| json!({"data": {"id": "run1", "status": "FAILED", "statusMessage": "Out of memory", "defaultDatasetId": items}});
        (request.path == "/actor-runs/run1").then(|| Reply::json(200, &run("set1")))
    });
    let run = fetch(&with_token(), &server, &["--target", "1"]).exits(0);
    let run = run.says("the run run1 ended as FAILED (Out of memory); what it fetched is taken");
    assert_eq!(run.records().len(), 6);

    let server = apify(0, |request, _| {
        let run = json!({"data": {"id": "run0", "status": "TIMED-OUT", "statusMessage": "Too slow", "defaultDatasetId": "set0"}});
        (request.path == "/actor-runs/run0").then(|| Reply::json(200, &run))
    });
    fetch(&with_token(), &server, &[])
        .exits(4)
        .says("ended as TIMED-OUT (Too slow) and left nothing");
}

/// A service whose runs of several conversations fail after the first of them, and where
/// none gets past the conversation `never`.
fn failing(conversations: usize, never: &'static str) -> Server {
    let batches: Mutex<Vec<Vec<String>>> = Mutex::default();
    apify(conversations, move |request, _| {
        let mut batches = batches.lock().unwrap();
        if request.method == "POST" && request.path.ends_with("/runs") {
            batches.push(batch(request));
            return None;
        }
        let part = |i: usize| request.path.trim_matches('/').split('/').nth(i);
        let n = part(1)?.trim_start_matches(char::is_alphabetic).to_owned();
        let asked = batches.get(n.parse::<usize>().ok()?)?;
        if asked.len() < 2 && asked.first().is_none_or(|id| id != never) {
            return None;
        }
        let run = json!({"data": {"id": format!("run{n}"), "status": "FAILED", "defaultDatasetId": format!("set{n}"), "usageTotalUsd": 0.01}});
        let brought = asked.first().filter(|id| *id != never);
        let brought = brought.map(|id| found_replies(id)).unwrap_or_default();
        Some(match part(0)? {
            "actor-runs" => Reply::json(200, &run),
            _ => Reply::text(200, &lines(&brought))
                .header("x-apify-pagination-total", &brought.len().to_string()),
        })
    })
}

/// The conversations that a run is asked for.
fn batch(start: &Request) -> Vec<String> {
    let input = start.json();
    let ids = input["conversationIds"].as_array().into_iter().flatten();
    ids.map(|id| id.as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_a_failed_run_left_out_is_asked_for_once_more_in_half_the_batch() {
    let collect = |never: &'static str, apify: &str| {
        let (tool, server) = (with_token(), failing(5, never));
        let config = CONFIG.replace("conversations_per_run: 2", apify);
        let config = tool.file("data.yaml", &config);
        let mut arguments = collecting(&server, &config);
        arguments.extend(["--target".into(), "100".into()]);
        let run = tool.run(&arguments, "").exits(0);
        let asked: Vec<_> = starts(&server).iter().map(batch).collect();
        let again = tool.run(&arguments, "").exits(0);
        assert_eq!(again.stdout, run.stdout);
        assert_eq!(starts(&server).len(), asked.len(), "nothing is paid again");
        (run.records().len(), asked)
    };
    // Three replies of each but 5002, which is left out twice and then for good.
    let (pairs, asked) = collect("", "conversations_per_run: 4");
    let expected: [&[&str]; 5] = [
        &[],
        &["5004", "5003", "5002", "5001"],
        &["5003", "5002"],
        &["5001"],
        &["5000"],
    ];
    assert_eq!(asked, expected);
    assert_eq!(pairs, 12);
    // A second run that brings nothing at all bars the way to nobody.
    let (pairs, asked) = collect("5003", "conversations_per_run: 4");
    assert_eq!(asked, expected);
    assert_eq!(pairs, 9);
    let (_, asked) = collect("", "conversations_per_run: 4, max_cost_usd: 0.02");
    assert_eq!(asked, expected[..2], "no money is left for more");
}

#[test]
fn a_run_is_adopted_once_apify_has_been_asked_about_it() {
    let service = || {
        apify(2, |request, before| {
            let run = |id: &str, of: &str| {
                Reply::json(
                    200,
                    &json!({"data": {"id": id, "actId": of, "status": "SUCCEEDED", "defaultDatasetId": "found", "usageTotalUsd": 0.25}}),
                )
            };
            let unknown = json!({"error": {"type": "record-not-found", "message": "Actor run was not found"}});
            match request.path.as_str() {
                path if path.ends_with("/runs") && before == 0 => {
                    Some(Reply::json(201, &json!({"data": {"id": "right"}})).cut_after(3))
                }
                "/actor-runs/right" => Some(run("right", "act")),
                "/actor-runs/elsewhere" => Some(run("elsewhere", "another")),
                "/actor-runs/mistyped" => Some(Reply::json(404, &unknown)),
                "/datasets/found/items" => Some(
                    Reply::text(200, &lines(&[found_tweet(0)]))
                        .header("x-apify-pagination-total", "1"),
                ),
                _ => None,
            }
        })
    };
    let adopt = |tool: &Tool, server: &Server, run: &str| {
        fetch(tool, server, &["--target", "1", "--adopt-run", run])
    };
    let (tool, server) = (with_token(), service());
    fetch(&tool, &server, &[]).exits(4).says("--adopt-run");
    let journal = tool.read("state/journal.jsonl");
    adopt(&tool, &server, "mistyped")
        .exits(2)
        .says("--adopt-run mistyped: Apify shows no such run")
        .says("Actor run was not found");
    adopt(&tool, &server, "elsewhere")
        .exits(2)
        .says("a run of another actor than apidojo~tweet-scraper");
    assert_eq!(tool.read("state/journal.jsonl"), journal);
    assert_eq!(adopt(&tool, &server, "right").exits(0).records().len(), 3);
    assert_eq!(starts(&server).len(), 2, "the lost one, and the replies");
    adopt(&tool, &server, "right")
        .exits(2)
        .says("knows of no run");
    // The same run cannot be two steps.
    let whole = tool.read("state/journal.jsonl");
    let end = whole.find("{\"event\":\"started\",\"step\":1").unwrap();
    tool.file("state/journal.jsonl", &whole[..end]);
    adopt(&tool, &server, "right")
        .exits(2)
        .says("--adopt-run right: this is run 1 of the collection already");

    // A wrong id that is on record already is put right, or taken back.
    let started = |run: &str| {
        format!(
            "{journal}{{\"event\":\"started\",\"step\":0,\"run\":\"{run}\",\"dataset\":null,\"at\":null}}\n"
        )
    };
    for (on_record, word, spent) in [
        ("mistyped", "right", "$0.26"),
        ("mistyped", "none", "$0.02"),
        ("elsewhere", "right", "$0.26"),
        ("elsewhere", "none", "$0.02"),
        // It is there, and costs money: that counts.
        ("right", "none", "$0.27"),
    ] {
        let (tool, server) = (with_token(), service());
        fetch(&tool, &server, &[]).exits(4);
        tool.file("state/journal.jsonl", &started(on_record));
        if on_record == "mistyped" {
            fetch(&tool, &server, &[]).exits(4).says("--adopt-run");
        }
        let run = adopt(&tool, &server, word).exits(0);
        let run = run.says(&format!("2 runs, about {spent}"));
        assert_eq!(run.stderr.contains("is given up"), on_record == "right");
        let lost_and_replies = if word == "none" { 3 } else { 2 };
        assert_eq!(
            starts(&server).len(),
            lost_and_replies,
            "{on_record} {word}"
        );
    }
}

/// The answer to the request got lost; asked again, the service refuses it.
#[test]
fn a_run_that_goes_on_unheard_is_waited_for() {
    #[derive(Clone, Copy, PartialEq)]
    enum Is {
        Unmeddled,
        Aborted,
        Running,
        Over,
    }
    let now = std::sync::Arc::new(Mutex::new(Is::Unmeddled));
    let seen = now.clone();
    let server = apify(5, move |request, _| {
        let mut now = seen.lock().unwrap();
        let run = |status: &str| {
            let run = json!({"data": {"id": "run0", "status": status, "defaultDatasetId": "set0"}});
            Some(Reply::json(200, &run))
        };
        match (request.method.as_str(), request.path.as_str(), *now) {
            (_, _, Is::Unmeddled) => None,
            ("POST", "/actor-runs/run0/resurrect", Is::Aborted) => {
                *now = Is::Running;
                Some(Reply::hang_up())
            }
            ("POST", "/actor-runs/run0/resurrect", _) => {
                let refused =
                    json!({"error": {"type": "run-not-finished", "message": "The run is running"}});
                Some(Reply::json(400, &refused))
            }
            ("GET", "/actor-runs/run0", Is::Aborted) => run("ABORTED"),
            ("GET", "/actor-runs/run0", Is::Running) => {
                if request.query("waitForFinish").is_some() {
                    *now = Is::Over;
                }
                run("RUNNING")
            }
            ("GET", "/actor-runs/run0", Is::Over) => run("SUCCEEDED"),
            // What it had found when it was stopped.
            ("GET", "/datasets/set0/items", Is::Aborted | Is::Running) => {
                let page = Reply::text(200, &lines(&[found_tweet(0)]));
                Some(page.header("x-apify-pagination-total", "1"))
            }
            _ => None,
        }
    });
    let tool = with_token();
    let whole = fetch(&tool, &server, &["--target", "100"]).exits(0);
    let journal = tool.read("state/journal.jsonl");
    let page = journal.find("{\"event\":\"page\"").unwrap();
    let stopped = "{\"event\":\"interrupted\",\"step\":0}\n";
    tool.file(
        "state/journal.jsonl",
        &format!("{}{stopped}", &journal[..page]),
    );
    *now.lock().unwrap() = Is::Aborted;
    let run = fetch(&tool, &server, &["--target", "100"]).exits(0);
    let run = run.never_says("cannot go on");
    assert_eq!(run.stdout, whole.stdout, "{run}");
}

#[test]
fn a_refused_start_holds_nobody_to_its_settings() {
    let (tool, server) = (with_token(), apify(2, nothing));
    let wrong = CONFIG.replace("apify: {", "apify: {actor: apidojo~tweet-scrapper, ");
    let wrong = tool.file("wrong.yaml", &wrong);
    tool.run(&collecting(&server, &wrong), "")
        .exits(4)
        .says("404");
    fetch(&tool, &server, &["--target", "1"]).exits(0);
    // Now there is something that another actor would spoil.
    tool.run(&collecting(&server, &wrong), "")
        .exits(2)
        .says("actor was \"apidojo~tweet-scraper\"")
        .says("RUN=new");
    assert_eq!(starts(&server).len(), 3);

    // A run that left nothing but its costs is part of a collection as well.
    let server = apify(0, |request, _| {
        let run = json!({"data": {"id": "run0", "status": "FAILED", "defaultDatasetId": "set0", "usageTotalUsd": 0.01}});
        (request.path == "/actor-runs/run0").then(|| Reply::json(200, &run))
    });
    let tool = with_token();
    fetch(&tool, &server, &[]).exits(4).says("left nothing");
    fetch(&tool, &server, &["--query", "bread"])
        .exits(2)
        .says("search_queries was");
}

/// Each run's items are read once: after each run all of them would be a matter of hours.
#[test]
fn what_was_read_is_not_read_again() {
    let tool = with_token();
    let search = tool.folder().join("state/items-0000.jsonl");
    let server = apify(5, move |request, before| {
        if request.path.ends_with("/runs") && before == 1 {
            std::fs::remove_file(&search).unwrap();
        }
        None
    });
    let run = fetch(&tool, &server, &["--target", "100"]).exits(0);
    assert_eq!(run.records().len(), 15);
}

#[test]
fn no_credit_and_a_wrong_token_say_what_to_do() {
    let server = apify(2, |request, _| {
        let body = json!({"error": {"type": "not-enough-usage", "message": "Your plan has no usage left"}});
        request
            .path
            .ends_with("/runs")
            .then(|| Reply::json(402, &body))
    });
    let tool = with_token();
    let run = fetch(&tool, &server, &[])
        .exits(4)
        .says("Your plan has no usage left");
    run.says("console.apify.com/billing").says("--method file");
    // A refusal costs nothing and leaves nothing unsettled.
    fetch(&tool, &server, &[]).exits(4).says("no usage left");

    let wrong = Tool::new(env!("CARGO_BIN_EXE_tw-fetch")).env("APIFY_API_TOKEN", "apify_api_wrong");
    fetch(&wrong, &server, &[])
        .exits(4)
        .says("401")
        .says("check APIFY_API_TOKEN")
        .never_says("apify_api_wrong");
    fetch(&Tool::new(env!("CARGO_BIN_EXE_tw-fetch")), &server, &[])
        .exits(2)
        .says("APIFY_API_TOKEN is not set");
}

#[test]
fn the_budget_is_kept() {
    let server = apify(5, nothing);
    let tool = with_token();
    let dear = tool.file(
        "dear.yaml",
        &format!("{CONFIG}  target_pairs: 100\n").replace(
            "apify: {",
            "apify: {max_cost_usd: 0.01, price_per_1000_usd: 1.0, ",
        ),
    );
    // Ten items can be paid for: five found, and the run itself is booked at a cent.
    let run = tool
        .run(&collecting(&server, &dear), "")
        .exits(0)
        .says("not reached within collection.apify.max_cost_usd");
    assert!(run.records().is_empty());
    assert_eq!(starts(&server).len(), 1);
    assert_eq!(starts(&server)[0].query("maxItems"), Some("10"));
    assert_eq!(
        starts(&server)[0].query("maxTotalChargeUsd"),
        Some("0.0100")
    );
}

#[test]
fn the_token_goes_nowhere_unsaid() {
    let (tool, server) = (with_token(), apify(2, nothing));
    let url = server.url();
    let arguments = [
        "--method",
        "apify",
        "--state",
        "s",
        "--query",
        "q",
        "--apify-url",
        &url,
    ];
    tool.run(&arguments, "")
        .exits(2)
        .says("APIFY_API_TOKEN belongs to api.apify.com")
        .says(&format!("--send-key-to {}", server.host()));
    let plain = [
        "--method",
        "apify",
        "--state",
        "s",
        "--query",
        "q",
        "--apify-url",
        "http://example.com",
        "--send-key-to",
        "example.com",
    ];
    tool.run(&plain, "").exits(2).says("in clear text");
    assert!(server.requests().is_empty());
    assert!(
        !tool.folder().join("s").exists(),
        "refused before anything was written"
    );
}

#[test]
fn usage_that_makes_no_sense_is_refused() {
    let tool = with_token();
    tool.run(&["--method", "apify", "--query", "q"], "")
        .exits(2)
        .says("--state DIR");
    tool.file(
        "d.yaml",
        "collection:\n  tweet_filters:\n    max_length: 5\n",
    );
    let apify = ["--method", "apify", "--state", "s"];
    tool.run(&[&apify[..], &["--config", "d.yaml"]].concat(), "")
        .exits(2)
        .says("d.yaml:3: collection.tweet_filters.max_length is 5, below min_length, 30");
    tool.run(&apify, "")
        .exits(2)
        .says("--query")
        .says("search_queries");
    tool.run(&["--method", "apify", "--state", "s", "--input", "x"], "")
        .exits(2)
        .says("--method file");
    let key = tool
        .run(&["--method", "apify", "--print-config=key"], "")
        .exits(0);
    assert!(
        !key.stdout.contains("reply_filters"),
        "loosening a filter must not fetch again\n{key}"
    );
}

/// Appending to its own input it would read what it wrote, without end; and what stands in
/// another input is not written before that is found out.
#[test]
fn an_input_is_no_place_for_the_output() {
    let (tool, input) = (tool(), pair_lines(2000));
    let file = tool.file("e.jsonl", &input);
    tool.file("other.jsonl", &pair_lines(2));
    for (arguments, named) in [
        (&["--input", "e.jsonl"][..], "--input e.jsonl: is the file"),
        (
            &["--input", "other.jsonl", "--input", "e.jsonl"],
            "--input e.jsonl: is the file",
        ),
        (&[], "--input -: is the file"),
    ] {
        let limited = [
            "-c",
            "ulimit -f 1024; exec \"$@\" < e.jsonl >> e.jsonl",
            "-",
        ];
        Run::of(&mut behind("bash", &limited, &tool.command(arguments)), b"")
            .exits(2)
            .says(named);
        assert_eq!(tool.read("e.jsonl"), input);
    }
    // By another of its names as well.
    std::fs::hard_link(&file, tool.folder().join("link")).unwrap();
    let onto_itself = std::fs::File::options().append(true).open(&file).unwrap();
    tool.run_to(onto_itself, &["--input", "link"], "")
        .exits(2)
        .says("--input link: is the file that is standard output too");
}

#[test]
fn an_interrupted_collection_stops_its_run_and_goes_on() {
    let stopped = std::sync::Arc::new(Mutex::new(false));
    let seen = stopped.clone();
    let server = apify(2, move |request, _| {
        let run = |status: &str| {
            Reply::json(
                200,
                &json!({"data": {"id": "run0", "status": status, "defaultDatasetId": "set0"}}),
            )
        };
        match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/actor-runs/run0/abort") => {
                *seen.lock().unwrap() = true;
                Some(run("ABORTING"))
            }
            ("GET", "/actor-runs/run0") if !*seen.lock().unwrap() => {
                Some(run("RUNNING").after(Duration::from_secs(5)))
            }
            ("GET", "/actor-runs/run0") if request.query("waitForFinish").is_none() => {
                Some(run("ABORTED"))
            }
            _ => None,
        }
    });
    let tool = with_token();
    let config = tool.file("data.yaml", CONFIG);
    let mut arguments = collecting(&server, &config);
    arguments.extend(["--target".into(), "1".into()]);
    let asked = |path: &str| server.requests().iter().any(|r| r.path == path);
    let run = tool
        .interrupt(&arguments, "", || asked("/actor-runs/run0"))
        .exits(130)
        .says("the run run0 was asked to stop");
    assert!(run.stdout.is_empty(), "{run}");
    assert!(asked("/actor-runs/run0/abort"));

    let run = tool.run(&arguments, "").exits(0).says("it goes on");
    assert_eq!(run.records().len(), 6);
    assert!(asked("/actor-runs/run0/resurrect"));
    assert_eq!(starts(&server).len(), 2, "the search is not paid for twice");
}

#[test]
fn a_wrong_quote_swallows_no_rows_in_silence() {
    let tool = tool();
    for end in ["\n", "\r\n"] {
        let table = |rows: &[&str]| {
            let mark = "\u{feff}\"id\",text";
            format!("{}{end}", [&[mark], rows].concat().join(end))
        };
        let open = tool.file(
            "open.csv",
            &table(&["1,\"a\nb\"", "2,\"see \"\"here\"\"", "3,fine", "4,fine"]),
        );
        // The doubled quotes are text, the cell goes on; the row above has two lines.
        tool.run(
            &["--input", &open, "--max-bad-lines", "9", "--unpaired", "u"],
            "",
        )
        .exits(3)
        .says("open.csv:4: a quote opens here and never closes");
        let early = tool.file(
            "early.csv",
            &table(&["1,fine", "2,\"a", "3,\"b\"", "4,fine"]),
        );
        tool.run(&["--input", &early], "")
            .exits(3)
            .says("early.csv:3: text follows a closing quote in line 4 (it opened in line 3)");
        let arguments = ["--input", &early, "--max-bad-lines", "1", "--unpaired", "u"];
        tool.run(&arguments, "")
            .exits(0)
            .says("in 3, out 0, rejected 3");
        let kept = tool.read("u");
        assert!(
            kept.contains("\"line\":3") && kept.contains(r#"3,\"b\"""#),
            "{kept}"
        );
        let stray = tool.file("stray.csv", &format!("id,\"te\"xt{end}1,a{end}"));
        tool.run(&["--input", &stray], "")
            .exits(3)
            .says("stray.csv:1: ")
            .says("text follows a closing quote");
        let header = tool.file("header.csv", &format!("id,\"text{end}1,a{end}"));
        tool.run(&["--input", &header], "")
            .exits(3)
            .says("header.csv:1: ");
        let good = tool.file(
            "good.csv",
            table(&["1,\"a, \"\"b\"\"\"", "2,5\" of rain", "3,\"\""]).trim_end(),
        );
        tool.run(&["--input", &good], "")
            .exits(0)
            .says("in 3, out 0, rejected 3");
    }
}

#[test]
fn a_column_that_stands_twice_loses_nothing_in_silence() {
    let tool = tool();
    for (header, named) in [
        ("id,tweet,tweet,reply", "-:1: column `tweet` stands twice"),
        ("id,text,a,text,a", "-:1: column `text` stands twice"),
    ] {
        let table = format!("{header}\n1,first,second,c\n");
        let bad = ["--max-bad-lines", "9", "--unpaired", "u"];
        let run = tool.run(&bad, &table).exits(3).says(named);
        assert_eq!(run.stdout, "");
    }
    // Table tools end rows with empty cells.
    let table = "id,tweet,reply,,\n1,a,b,,\n2,c,d,,x\n";
    let run = tool.run::<&str>(&[], table).exits(0);
    assert_eq!(run.records().len(), 2);
    tool.run::<&str>(&[], &format!("{table}3,e,f,x,y\n"))
        .exits(3)
        .says("-:4: more than one cell under columns without a name");
}

/// Not all that is sent is UTF-8: what is passed over can be had again, byte by byte.
#[test]
fn what_is_not_utf8_is_kept_to_the_byte() {
    let tool = tool();
    let arguments = ["--max-bad-lines", "9", "--unpaired", "u"];
    let kept = |input: &[u8]| {
        tool.run_bytes(&arguments, input).exits(0);
        let lines = tool.read("u");
        let lines = lines.lines().map(|l| serde_json::from_str(l).unwrap());
        let bad = |line: Value| line.get("bad_line").cloned();
        lines.filter_map(bad).collect::<Vec<Value>>()
    };
    let bad = kept(b"{\"id\":\"1\",\"text\":\"a\"}\r\n{\"id\":\"\xe9A\"}\r\nno JSON\n");
    assert_eq!(bad.len(), 2);
    assert_eq!(
        (&bad[0]["line"], &bad[0]["raw"]),
        (&json!(2), &json!("{\"id\":\"\u{fffd}A\"}"))
    );
    // printf '{"id":"\xe9A"}' | base64
    assert_eq!(bad[0]["raw_base64"], "eyJpZCI6IulBIn0=");
    assert_eq!(bad[1]["raw"], "no JSON");
    assert!(bad[1].get("raw_base64").is_none());
    for end in ["\n", "\r\n"] {
        let rows: [&[u8]; 4] = [b"id,text", b"1,fine", b"2,\"a, \xe9 \"\"\nb\"", b"3,x,y"];
        let bad = kept(&rows.join(end.as_bytes()));
        assert_eq!(bad.len(), 2);
        // printf '2,"a, \xe9 ""\nb"' | base64
        assert_eq!(bad[0]["raw_base64"], "MiwiYSwg6SAiIgpiIg==");
        assert_eq!(
            (&bad[1]["line"], &bad[1]["raw"]),
            (&json!(5), &json!("3,x,y"))
        );
    }
}

/// A list that Python wrote into a cell is media as well, and its words for nothing are not.
#[test]
fn lists_in_cells_are_media() {
    let media = |table: &str| {
        let pairs = tool().run::<&str>(&[], table).exits(0).records();
        pairs[0]["reply_media"].as_u64().unwrap()
    };
    for (cell, expected) in [
        (
            "\"['https://pbs.example/1.jpg', 'https://pbs.example/2.jpg']\"",
            1,
        ),
        ("\"[{'type': 'photo'}]\"", 1),
        ("https://pbs.example/1.jpg", 1),
        ("True", 1),
        ("", 0),
        ("[]", 0),
        ("{}", 0),
        ("0", 0),
        ("0.0", 0),
        ("False", 0),
        ("None", 0),
        ("null", 0),
        ("nan", 0),
    ] {
        let apify = format!("id,text,inReplyToId,media\n1,a,,[]\n2,b,1,{cell}\n");
        assert_eq!(media(&apify), expected, "{cell}");
        let photos =
            format!("id,rawContent,inReplyToTweetId,media.photos\n1,a,,[]\n2,b,1,{cell}\n");
        assert_eq!(media(&photos), expected, "{cell}");
    }
    for (cell, expected) in [
        (
            "\"{'photos': [], 'videos': [{'url': 'u'}], 'animated': []}\"",
            1,
        ),
        ("\"{'photos': [], 'videos': [], 'animated': []}\"", 0),
        ("", 0),
    ] {
        let whole = format!("id,rawContent,inReplyToTweetId,media\n1,a,,\n2,b,1,{cell}\n");
        assert_eq!(media(&whole), expected, "{cell}");
        let whole = format!("id,text,inReplyToId,extendedEntities\n1,a,,\n2,b,1,{cell}\n");
        assert_eq!(media(&whole), expected, "{cell}");
    }
}

#[test]
fn what_belongs_to_apify_is_refused_with_files() {
    let tool = tool();
    for (flag, value) in [("--query", "soup"), ("--target", "5"), ("--adopt-run", "x")] {
        tool.run(&["--method", "file", flag, value], &pair_lines(1))
            .exits(2)
            .says(&format!("{flag} goes with --method apify"));
    }
    // Scripts that always name it import as well.
    tool.run(&["--method", "file", "--state", "s"], &pair_lines(1))
        .exits(0);
}

#[test]
fn an_item_that_makes_no_sense_does_not_make_the_rest_worthless() {
    let server = apify(5, |request, _| {
        let broken =
            json!({"id": 1.79e18, "fullText": "Which one was that?", "conversationId": "5000"});
        (request.path == "/datasets/set0/items").then(|| {
            Reply::text(200, &lines(&[found_tweet(0), broken, found_tweet(1)]))
                .header("x-apify-pagination-total", "3")
        })
    });
    let tool = with_token();
    let run = fetch(
        &tool,
        &server,
        &["--target", "1", "--unpaired", "left.jsonl"],
    )
    .exits(0);
    assert_eq!(run.records().len(), 6, "{run}");
    run.says("unreadable 1").says("in 9, out 6, rejected 1");
    let left: Value = serde_json::from_str(&tool.read("left.jsonl")).unwrap();
    assert_eq!(left["fullText"], "Which one was that?");
    assert_eq!(left["rejected"]["reasons"][0]["filter"], "unreadable");
    let detail = left["rejected"]["reasons"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("key `id`"), "{detail}");
}

#[test]
fn every_retry_is_told() {
    let server = apify(5, |request, _| {
        (request.path == "/actor-runs/run0").then(|| Reply::text(503, "out of order"))
    });
    let run = fetch(&with_token(), &server, &["--log", "log.txt"]).exits(4);
    let told: Vec<&str> = run
        .stderr
        .lines()
        .filter(|line| line.contains("warning: GET http://"))
        .collect();
    assert_eq!(told.len(), 2, "{run}");
    for (attempt, line) in (1..).zip(told) {
        let said = format!(
            "/actor-runs/run0: HTTP 503: out of order; attempt {attempt} of 3, the next in "
        );
        assert!(line.contains(&said), "{line}");
    }
}

/// While requests fail, and while the service is asked whether the run has ended.
#[test]
fn a_signal_ends_retries_at_once() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        // The service asks for a minute's rest, so that only the signal can end the wait.
        let busy = || Reply::text(429, "slow down").header("retry-after", "60");
        for path in ["/acts/apidojo~tweet-scraper/runs", "/actor-runs/run0"] {
            let server = apify(5, move |request, _| {
                request.path.starts_with(path).then(busy)
            });
            let tool = with_token();
            let config = tool.file("data.yaml", CONFIG);
            let command = tool.command(&collecting(&server, &config));
            let child = behind("env", &["--default-signal=HUP"], &command)
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            while !server.requests().iter().any(|r| r.path == path) {
                std::thread::sleep(Duration::from_millis(10));
            }
            std::thread::sleep(Duration::from_millis(200));
            let begun = std::time::Instant::now();
            let pid = child.id().to_string();
            std::process::Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap();
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(130), "{signal} {path}\n{said}");
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "{signal} {path}\n{said}"
            );
            assert!(
                said.contains("attempt 1 of 3, the next in 60.0 s"),
                "{said}"
            );
            assert!(!said.contains("waiting for the answer"), "{said}");
            // 429 made no run: nothing is left unsettled, and the same command starts one.
            let journal = tool.read("state/journal.jsonl");
            assert_eq!(
                journal.contains("\"refused\""),
                path.starts_with("/acts"),
                "{journal}"
            );
        }
    }
}

/// The answer to a request that starts a run is waited for: its id must not be lost.
#[test]
fn a_start_under_way_is_seen_through() {
    let server = apify(2, |request, _| {
        let run = json!({"data": {"id": "run0", "status": "READY", "defaultDatasetId": "set0"}});
        request
            .path
            .ends_with("/runs")
            .then(|| Reply::json(201, &run).after(Duration::from_millis(1500)))
    });
    let tool = with_token();
    let config = tool.file("data.yaml", CONFIG);
    let arguments = collecting(&server, &config);
    tool.interrupt(&arguments, "", || !starts(&server).is_empty())
        .exits(130)
        .says("waiting for the answer to a request that may cost money")
        .says("the run run0 was asked to stop");
    assert!(
        tool.read("state/journal.jsonl")
            .contains("\"run\":\"run0\"")
    );
}
