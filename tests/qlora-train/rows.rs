//! Rows of every form: which are taken, and what is made of them.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::{CONFIG, MODEL, arguments, figures, pairs, result, tool, train};

#[test]
fn conversations_are_rows_too() {
    let tool = tool();
    let row = |i: usize| {
        format!(
            r#"{{"messages":[{{"role":"system","content":"Be brief."}},{{"role":"user","content":"Number {i}?"}},{{"role":"assistant","content":"It is {i}."}}]}}"#
        )
    };
    tool.file(
        "pairs.jsonl",
        &(0..8).map(|i| row(i) + "\n").collect::<String>(),
    );
    let run = train(&tool, "out", &["--steps", "2"]).exits(0);
    assert_eq!(
        run.records().len(),
        2,
        "no evaluation without held-out rows\n{run}"
    );
    let card = tool.read("out/README.md");
    for words in [
        "# A LoRA adapter that answers in chats",
        "8 rows to train on, 0 held out: 8 conversations (",
        "had the system prompts that they came with",
        "It writes replies in the manner",
        "| Began from | fresh values |",
        "By the hashes in `rows.jsonl` whoever has a text, or guesses it, can tell",
    ] {
        assert!(card.contains(words), "{words}\n{card}");
    }
    for words in ["tweet", "normalised", "likes", "no system prompt"] {
        assert!(!card.contains(words), "{words}\n{card}");
    }

    // Beside pairs, and from another adapter.
    let mixed = pairs(3) + &row(1) + "\n" + r#"{"prompt":"Hm?","completion":"Yes."}"#;
    tool.file("pairs.jsonl", &mixed);
    let more = ["--steps", "1", "--init-adapter", "out"];
    train(&tool, "mixed", &more).exits(0);
    let card = tool.read("mixed/README.md");
    for words in [
        "3 tweets with replies, normalised text; 1 prompts with completions; 1 conversations",
        "There is no system prompt.",
        "| Began from | another adapter (SHA-256 of its values ",
    ] {
        assert!(card.contains(words), "{words}\n{card}");
    }
}

#[test]
fn rows_that_teach_nothing_are_refused_by_line() {
    let tool = tool();
    let good = pairs(1);
    let with = |line: &str| format!("{good}{line}\n");
    let long = format!(
        r#"{{"id":"x","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"{}","split":"train"}}"#,
        "word ".repeat(200)
    );
    for (line, said) in [
        (
            r#"{"messages":[{"role":"user","content":"Hello?"}]}"#,
            "no token to learn from",
        ),
        (long.as_str(), "more than training.max_seq_length 128"),
        (
            r#"{"id":"x","tweet":"t","reply":"r"}"#,
            "key `tweet_normalized`: missing: run pair-dedup, or set data.text: raw",
        ),
        (r#"{"id":"x","reply":"r"}"#, "`tweet` is missing"),
        (
            r#"{"id":"x","text":"r"}"#,
            "`tweet` with `reply`, `messages`, or `prompt` with `completion`",
        ),
        (
            r#"{"messages":[{"role":"developer","content":"d"},{"role":"assistant","content":"a"}]}"#,
            "key `messages`: turn 1: no role `developer`: there are system, user, assistant, tool; write `system`?",
        ),
        (
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]},{"role":"assistant","content":"a"}]}"#,
            "key `messages`: turn 1: `content` holds other parts",
        ),
        ("{", "not a JSON object"),
        (r#"{"v":99,"id":"x"}"#, "version 99"),
        (r#"{"messages":"hello"}"#, "key `messages`"),
        (
            r#"{"id":"x","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"r","split":"test"}"#,
            "key `split`",
        ),
    ] {
        tool.file("pairs.jsonl", &with(line));
        train(&tool, "out", &[])
            .exits(3)
            .says("pairs.jsonl:2: ")
            .says(said);
        assert!(!tool.folder().join("out/metrics.jsonl").exists());
    }
    let spells = good.replace("again.", "again <|im_end|>");
    tool.file("pairs.jsonl", &format!("{spells}{good}{spells}"));
    train(&tool, "spells", &["--steps", "1"])
        .exits(0)
        .says("is spelled out in 2 rows; the first is")
        .says("the first is pairs.jsonl:1, <|im_end|>");
    let empty = r#"{"prompt":"p","completion":""}"#;
    tool.file("pairs.jsonl", &format!("{good}{empty}\n{good}{empty}\n"));
    train(&tool, "silent", &["--steps", "1"])
        .exits(0)
        .says("an empty reply, from which the model learns to say nothing, is in 2 rows")
        .says("the first is pairs.jsonl:2")
        .says("climbs from 0 for 2 steps, and the run has 1 step: it is 0 throughout, and nothing is learnt");
    tool.file("pairs.jsonl", &with("{"));
    train(
        &tool,
        "out",
        &[
            "--steps",
            "1",
            "--max-bad-lines",
            "1",
            "--rejects",
            "bad.jsonl",
        ],
    )
    .exits(0);
    assert!(tool.read("bad.jsonl").contains(r#""line":2"#));
    tool.file("pairs.jsonl", "");
    train(&tool, "empty", &[])
        .exits(3)
        .says("pairs.jsonl: no rows");
    tool.file("pairs.jsonl", &good.replace("\"train\"", "\"eval\""));
    train(&tool, "held-out", &[]).exits(3).says("held out");
}

/// The sides of rows that have none: by their group, or by what they ask, told to whoever
/// evaluates.
#[test]
fn a_drawn_side_is_the_rows_own() {
    let tool = tool();
    let unsplit = (pairs(40).replace(r#","split":"train""#, "")).replace(r#","split":"eval""#, "");
    let config = |fraction: &str| {
        let data = format!("{CONFIG}data: {{eval_fraction: {fraction}}}\n");
        tool.file("train.yaml", &data);
    };
    let sides = |out: &str| -> Vec<(String, String)> {
        let text = tool.read(&format!("{out}/rows.jsonl"));
        assert!(!text.contains("Day") && !text.contains("like"), "{text}");
        let lines = text.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            (text("row"), text("split"))
        });
        lines.collect()
    };
    let run = |out: &str| train(&tool, out, &["--steps", "1"]).exits(0);
    config("0.25");
    tool.file("pairs.jsonl", &unsplit);
    run("one").never_says("holds out none");
    let one = sides("one");
    let held_out = one.iter().filter(|(_, split)| split == "eval").count();
    assert_eq!(one.len(), 40);
    assert!((4..=16).contains(&held_out), "{held_out}");

    // Neither order nor neighbours matter, and rows that ask the same stay together.
    let mut lines: Vec<&str> = unsplit.lines().rev().collect();
    lines.extend(unsplit.lines());
    tool.file("pairs.jsonl", &lines.join("\n"));
    run("two");
    assert_eq!(sides("two"), one);
    // What an adapter goes on from was trained on rows as well.
    let more = one
        .iter()
        .map(|(row, _)| format!("{{\"row\":\"{row}\",\"split\":\"train\"}}\n"));
    fs::write(
        tool.folder().join("two/rows.jsonl"),
        more.collect::<String>(),
    )
    .unwrap();
    fs::remove_file(tool.folder().join("two/SHA256SUMS")).unwrap();
    train(&tool, "three", &["--steps", "1", "--init-adapter", "two"]).exits(0);
    assert!(sides("three").iter().all(|(_, split)| split == "train"));
    let sums = Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(tool.folder().join("three"))
        .output()
        .unwrap();
    assert!(sums.status.success(), "{sums:?}");
    assert!(String::from_utf8_lossy(&sums.stdout).contains("rows.jsonl: OK"));

    config("0.0001");
    tool.file("pairs.jsonl", &unsplit);
    train(&tool, "none", &["--dry-run"])
        .exits(0)
        .says("data.eval_fraction 0.0001 of 40 rows holds out none");
    config("0.9999");
    for (rows, said) in [(40, "all 40 rows"), (1, "the only row")] {
        let some: Vec<&str> = unsplit.lines().take(rows).collect();
        tool.file("pairs.jsonl", &some.join("\n"));
        train(&tool, "all", &["--dry-run"])
            .exits(3)
            .says(&format!(
                "data.eval_fraction 0.9999 happens to hold out {said}"
            ))
            .never_says("`split: eval`");
    }
}

/// Ten answers to one question are ten rows: one that is held out would be known by the
/// others. What decides is what was asked, not the words that settings put around it.
#[test]
fn a_question_is_on_one_side_however_often_it_was_answered() {
    let tool = tool();
    let mut runs = 0;
    let mut sides = |rows: &str, seed: u64, system: &str| -> Vec<String> {
        runs += 1;
        let data = format!("data: {{eval_fraction: 0.5, system_prompt: '{system}'}}");
        let config = CONFIG.replace("training: {", &format!("training: {{seed: {seed}, "));
        tool.file("train.yaml", &format!("{config}{data}\n"));
        tool.file("pairs.jsonl", rows);
        let out = format!("out{runs}");
        train(&tool, &out, &["--steps", "1"]).exits(0);
        let rows = tool.read(&format!("{out}/rows.jsonl"));
        rows.lines().map(str::to_owned).collect()
    };
    let held_out = |rows: &[String]| rows.iter().filter(|row| row.contains("eval")).count();
    let answers = |line: &dyn Fn(usize, usize) -> String| -> String {
        let both = (0..8).flat_map(|q| (0..10).map(move |a| (q, a)));
        both.map(|(q, a)| line(q, a) + "\n").collect()
    };
    let prompts =
        |q, a| format!(r#"{{"prompt":"What is {q}?","completion":"It is {q}, I said {a}."}}"#);
    let turns = |q, a| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"What is {q}?"}},{{"role":"assistant","content":"It is {q}, I said {a}."}}]}}"#
        )
    };
    // Questions of their own, of one group by name.
    let named = |q, a| {
        format!(
            r#"{{"split_group":"g{q}","conversation_id":"{q}-{a}","prompt":"What is {q} of {a}?","completion":"It is {q}."}}"#
        )
    };
    let mut counts = Vec::new();
    for seed in 1..4 {
        for rows in [answers(&prompts), answers(&turns), answers(&named)] {
            let sides = sides(&rows, seed, "");
            assert_eq!(sides.len(), 80);
            counts.push(held_out(&sides));
        }
    }
    // A question in ten would be whole by luck; not nine times.
    assert!(counts.iter().all(|n| n % 10 == 0), "{counts:?}");
    assert!(counts.iter().any(|n| (1..80).contains(n)), "{counts:?}");
    assert_eq!(counts[0], counts[1], "one question in two forms");
    let plain = sides(&answers(&prompts), 1, "");
    assert_eq!(plain, sides(&answers(&prompts), 1, "Be brief."));
}

/// What an adapter was trained on counts for those that begin from it, and so does what is
/// not known of it.
#[test]
fn what_was_trained_on_before_goes_along() {
    let tool = tool();
    let rows = tool.folder().join("first/rows.jsonl");
    let from = |out: &str, adapter: &str, more: &[&str]| {
        let arguments = [&["--steps", "1", "--init-adapter", adapter], more].concat();
        train(&tool, out, &arguments)
    };
    tool.file("pairs.jsonl", &pairs(10).replace("eval", "train"));
    train(&tool, "first", &["--steps", "1"]).exits(0);
    let whole = fs::read(&rows).unwrap();

    // Of the rows 4, 9 and 14 that are held out.
    tool.file("pairs.jsonl", &pairs(15));
    from("second", "first", &[])
        .exits(0)
        .says("2 of 3 held-out rows were trained on by --init-adapter")
        .never_says("not known in full");
    let card = tool.read("second/README.md");
    let words = "3 held out, 2 of which the adapter that it began from was trained on: ";
    assert!(card.contains(words), "{card}");

    // Damaged, as --resume sees it, and then lost.
    tool.file("pairs.jsonl", &pairs(10).replace("eval", "train"));
    fs::write(&rows, [&whole[..], b"\n"].concat()).unwrap();
    let again = ["--steps", "1", "--resume"];
    train(&tool, "first", &again)
        .exits(4)
        .says("first/rows.jsonl: is not as it was written")
        .says("put it back");
    fs::write(&rows, &whole).unwrap();
    train(&tool, "first", &again).exits(0).says("nothing to do");
    tool.file("pairs.jsonl", &pairs(15));
    fs::remove_file(&rows).unwrap();
    from("third", "first", &[])
        .exits(4)
        .says("--init-adapter first: first/rows.jsonl: is missing, and SHA256SUMS names it");
    fs::remove_file(tool.folder().join("first/SHA256SUMS")).unwrap();
    let unknown = "what --init-adapter was trained on is not known in full";
    from("third", "first", &[])
        .exits(0)
        .says(unknown)
        .never_says("were trained on by");
    assert!(tool.read("third/rows.jsonl").starts_with("{\"row\":null,"));
    let card = tool.read("third/README.md");
    assert!(card.contains("is not known in full"), "{card}");
    from("fourth", "third", &["--dry-run"])
        .exits(0)
        .says(unknown);
}

#[test]
fn replies_can_be_shuffled_as_a_control() {
    let tool = tool();
    train(&tool, "plain", &["--steps", "2"]).exits(0);
    train(&tool, "control", &["--steps", "2", "--shuffled-replies"]).exits(0);
    assert_ne!(
        figures(&tool, "plain", "loss"),
        figures(&tool, "control", "loss")
    );
    // Only what is trained on is shuffled: before the first update the held-out loss is the same.
    assert_eq!(
        figures(&tool, "plain", "eval_loss")[0],
        figures(&tool, "control", "eval_loss")[0]
    );
    assert!(tool.read("control/README.md").contains("not for use"));
}

#[test]
fn long_rows_are_cut_or_left_out_as_asked_and_kept() {
    let tool = tool();
    let long = format!(
        r#"{{"id":"long","tweet":"t","reply":"r","tweet_normalized":"t","reply_normalized":"{}","split":"train"}}"#,
        "word ".repeat(200)
    );
    tool.file("pairs.jsonl", &format!("{}{long}\n", pairs(8)));
    let with = |how: &str| {
        CONFIG.replace(
            "max_seq_length: 128",
            &format!("max_seq_length: 128, long_rows: {how}"),
        )
    };
    tool.file("train.yaml", &with("truncate"));
    train(&tool, "cut", &["--steps", "1", "--batch-size", "8"])
        .exits(0)
        .says("1 row cut to training.max_seq_length")
        .says("8 rows to train on");
    tool.file("train.yaml", &with("skip"));
    train(
        &tool,
        "skipped",
        &["--steps", "1", "--rejects", "rejects.jsonl"],
    )
    .exits(0)
    .says("7 rows to train on");
    let kept: Value = serde_json::from_str(tool.read("rejects.jsonl").trim()).unwrap();
    assert_eq!(
        (&kept["id"], &kept["rejected"]["reasons"][0]["filter"]),
        (&"long".into(), &"row_too_long".into())
    );
}

/// Where some rows say which side they are on, one that says nothing is trained on.
#[test]
fn a_row_without_a_side_is_told() {
    let tool = tool();
    let row = r#"{"prompt":"a","completion":"b"}"#;
    tool.file("pairs.jsonl", &format!("{}{row}\n", pairs(8)));
    train(&tool, "out", &["--steps", "1"])
        .exits(0)
        .says("1 row without `split`, where others have it, trained on");
    tool.file("pairs.jsonl", &format!("{row}\n"));
    train(&tool, "none", &["--steps", "1"])
        .exits(0)
        .never_says("without `split`");
}

#[test]
fn prompts_with_completions_are_the_same_rows_as_messages() {
    let tool = tool();
    let rows = |row: fn(usize) -> String| (0..6).map(|i| row(i) + "\n").collect::<String>();
    tool.file(
        "pairs.jsonl",
        &rows(|i| format!(r#"{{"prompt":"Number {i}?","completion":"It is {i}."}}"#)),
    );
    train(&tool, "prompts", &["--steps", "2"]).exits(0);
    tool.file(
        "pairs.jsonl",
        &rows(|i| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"Number {i}?"}},{{"role":"assistant","content":"It is {i}."}}]}}"#
            )
        }),
    );
    train(&tool, "messages", &["--steps", "2"]).exits(0);
    for (name, prompts) in result(&tool, "prompts").into_iter().skip(1) {
        let messages = fs::read(tool.folder().join("messages").join(&name)).unwrap();
        assert!(prompts == messages, "{name} differs");
    }
}

#[test]
fn a_prompt_template_is_the_users_turn() {
    let tool = tool();
    let rows = |i: usize| {
        format!(
            r#"{{"id":"p{i}","author":"Ada {i}","tweet":"t","reply":"r","tweet_normalized":"Day {i}.","reply_normalized":"Good day {i}.","split":"train"}}"#
        ) + "\n"
    };
    let with = |template: &str| {
        let line = serde_json::to_string(template).unwrap();
        tool.file(
            "train.yaml",
            &format!("{CONFIG}\ndata: {{prompt_template: {line}}}\n"),
        );
    };
    tool.file("pairs.jsonl", &(0..6).map(rows).collect::<String>());
    with("Reply to {{ author }}:\n{{ tweet }}");
    train(&tool, "template", &["--steps", "2"]).exits(0);
    let card = tool.read("template/README.md");
    assert!(
        card.contains("```jinja\nReply to {{ author }}:\n{{ tweet }}\n```"),
        "{card}"
    );

    // The same as the prompts written out.
    let prompts = (0..6).map(|i| {
        format!(r#"{{"prompt":"Reply to Ada {i}:\nDay {i}.","completion":"Good day {i}."}}"#) + "\n"
    });
    tool.file("prompts.jsonl", &prompts.collect::<String>());
    let prompts = ["--data", "prompts.jsonl", "--steps", "2"];
    tool.file("train.yaml", CONFIG);
    let mut arguments = arguments("prompts", &[]);
    arguments.retain(|&a| a != "--data" && a != "pairs.jsonl");
    tool.run(&[&arguments[..], &prompts].concat(), "").exits(0);
    assert_eq!(
        tool.read("template/metrics.jsonl"),
        tool.read("prompts/metrics.jsonl")
    );

    with("{{ autor }}: {{ tweet }}");
    train(&tool, "out", &[])
        .exits(3)
        .says("pairs.jsonl:1: key `autor`: missing, and the prompt template names it; the nearest there is `author`");
    for (template, said) in [
        (
            "{{ tweet",
            "train.yaml:6: data.prompt_template is no template: syntax error",
        ),
        (
            "{{ tweet }}{{ reply }}",
            "`reply`, which is what the model is to learn",
        ),
        ("{ tweet }", "names no field of the pair"),
        (
            "{% if tweet_lang %}{{ tweet_lang|nothing }}{% endif %}{{ tweet }}",
            "data.prompt_template is no template: unknown filter",
        ),
        (
            "{{ tweet }}{{ nothing() }}",
            "data.prompt_template is no template: unknown function",
        ),
    ] {
        with(template);
        train(&tool, "out", &[]).exits(2).says(said);
        assert!(!tool.folder().join("out").exists());
    }
    with("{% if tweet_likes %}{{ tweet }}{% endif %}");
    train(&tool, "out", &[])
        .exits(3)
        .says("pairs.jsonl:1: key `prompt_template`: it renders as nothing for this row");
    with("Say: {{ tweet }}");
    let elsewhere = arguments
        .iter()
        .map(|&a| if a == "prompts" { "dry" } else { a });
    let dry: Vec<&str> = elsewhere
        .chain(["--data", "prompts.jsonl", "--dry-run"])
        .collect();
    tool.run(&dry, "")
        .exits(0)
        .says("data.prompt_template words tweets only: 6 rows");
    // It is part of what a run is.
    with("{{ tweet }}!");
    train(&tool, "template", &["--steps", "2", "--resume"])
        .exits(2)
        .says(r#"data.prompt_template = "{{ tweet }}!", was "Reply to"#);
}

#[test]
fn the_card_says_where_the_rows_come_from_and_how_the_replies_were_found() {
    let tool = tool();
    let summary = |name: &str, read: u64, written: u64, reasons: &str| {
        let text = format!(
            r#"{{"v":1,"tool":"{name}","in":{read},"out":{written},"rejected":{},"bad_lines":1,"reasons":{reasons},"settings":["{name}.key = a|b"],"signature":"tool:{name}"}}"#,
            read - written - 1
        );
        tool.file(&format!("{name}.json"), &text);
    };
    summary("validate", 60, 40, r#"{"too_short":12,"too | odd":9}"#);
    summary("dedup", 40, 31, r#"{"exact":8}"#);
    let from = [
        "--provenance",
        "validate.json",
        "--provenance",
        "dedup.json",
    ];
    let few = ["--steps", "2"];
    let run = train(&tool, "out", &[&from[..], &few].concat()).exits(0);
    assert!(
        !run.stderr.contains("is --provenance that of this data"),
        "{run}"
    );
    let card = tool.read("out/README.md");
    for line in [
        "| `validate` | 60 | 40 | `too_short` 12, `too \\| odd` 9, malformed 1 |",
        "| `dedup` | 40 | 31 | `exact` 8, malformed 1 |",
        "| `qlora-train` | 31 | 31 | none |",
        "validate.key = a|b\ndedup.key = a|b",
        "The base model's is not recorded",
        "| 0 | ",
        "| 2 | ",
        "Not recorded: `make eval`",
    ] {
        assert!(card.contains(line), "{line}\n{card}");
    }
    let front = card.split("---\n").nth(1).unwrap();
    let front: serde_json::Map<String, Value> = serde_saphyr::from_str(front).unwrap();
    assert_eq!(front["base_model"], MODEL);

    // Another's summary is not believed in silence, and no summary at all is said.
    train(
        &tool,
        "other",
        &["--provenance", "validate.json", "--steps", "1"],
    )
    .exits(0)
    .says("validate wrote 40 rows, but pairs.jsonl has 31");
    train(&tool, "none", &["--steps", "1"]).exits(0);
    assert!(
        tool.read("none/README.md")
            .contains("before is not recorded (`--provenance`)")
    );
    tool.file("odd.json", "{}");
    train(&tool, "odd", &["--provenance", "odd.json"])
        .exits(2)
        .says("--provenance odd.json: no summary");
    train(&tool, "odd", &["--provenance", "no.json"])
        .exits(2)
        .says("No such file");

    // Evaluation comes later; it may come again.
    let test = |kind: &str, more: &str| {
        format!(
            r#"{{"v":1,"a":"systems.base","b":"systems.lora","metric":"nll","test":"{kind}","n":88,"mean_a":3.5,"mean_b":2.25,{more},"signature":"tool:sigtest|alpha:0.01|seed:42"}}"#
        ) + "\n"
    };
    let lines = test("permutation", r#""p_holm":0.0002"#)
        + &test("bootstrap", r#""p_holm":null,"ci_low":1.0,"ci_high":1.5"#);
    tool.file("tests.jsonl", &lines);
    for _ in 0..2 {
        tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
            .exits(0);
        let added = tool.read("out/README.md");
        assert!(
            added.contains("| `nll` | 3.500 | 2.250 | -1.500 to -1.000 | 0.0002 \\* |"),
            "{added}"
        );
        assert!(added.contains("`lora` against `base`, 88 held-out rows"));
        assert!(added.contains("| 99% of `lora` − `base` |"), "{added}");
        // Nothing but the section is another.
        let outside = |card: &str| {
            let (before, rest) = card.split_once("<!-- evaluation -->").unwrap();
            let (_, after) = rest.split_once("<!-- end of evaluation -->").unwrap();
            [before.to_owned(), after.to_owned()]
        };
        assert_eq!(outside(&card), outside(&added));
    }
    assert!(
        !card.contains("likes"),
        "no filter by likes is known\n{card}"
    );
    tool.file(
        "validate.json",
        &tool
            .read("validate.json")
            .replace(r#""tool":"validate""#, r#""tool":"pair-validate""#),
    );
    train(&tool, "filtered", &[&from[..], &few].concat()).exits(0);
    let filtered = tool.read("filtered/README.md");
    assert!(
        filtered.contains("which passed the filters above") && filtered.contains("goes by likes"),
        "{filtered}"
    );
    let own = "# Mine\n\nText.\n";
    tool.file("out/README.md", own);
    tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
        .exits(0);
    let added = tool.read("out/README.md");
    assert!(
        added.starts_with(own) && added.contains("## Evaluation") && added.contains("3.500"),
        "{added}"
    );
    // The run is as finished as before.
    train(&tool, "out", &[&from[..], &few, &["--resume"]].concat())
        .exits(0)
        .says("finished");
    tool.run(&["card", "--evaluation", "tests.jsonl", "nowhere"], "")
        .exits(2)
        .says("nowhere/README.md");
    tool.file("tests.jsonl", "{}\n");
    tool.run(&["card", "--evaluation", "tests.jsonl", "out"], "")
        .exits(3)
        .says("tests.jsonl:1: key `a` is missing");
}

#[test]
fn too_few_rows_are_refused_as_what_they_are() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(1));
    train(&tool, "out", &["--shuffled-replies"])
        .exits(3)
        .says("pairs.jsonl:1: the only row to train on has no other's reply to take");
    let skip = CONFIG.replace("max_seq_length: 128", "max_seq_length: 8, long_rows: skip");
    tool.file("train.yaml", &skip);
    train(&tool, "out", &[])
        .exits(3)
        .says("every row is longer than training.max_seq_length");
    assert!(!tool.folder().join("out").exists());
}
