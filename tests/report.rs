//! report through the real binary, on a run laid out by hand. What the page's charts show is
//! measured on the page: a point is where its axis' own labels say it is. How it looks no test
//! tells: a change of it is looked at in a browser, in light and dark, 1280 and 400 pixels wide,
//! and printed, with hostile texts too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;

use base64::Engine;
use harness::Tool;
use scraper::{ElementRef, Html, Selector};
use sha2::{Digest, Sha256};

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_report"))
}

/// What the held-out rows decided, in the words of the run's settings.
fn chosen(tool: &Tool, patience: &str, best: &str) {
    tool.file(
        "output/models/r/run.json",
        &format!(
            r#"{{"v":1,"settings":["training.early_stopping_patience = {patience}","training.load_best_model_at_end = {best}"]}}"#
        ),
    );
}

/// The signature of sigtest's lines.
const SIGNED: &str =
    r#""signature":"tool:sigtest|a:x|alternative:two-sided|alpha:0.05|resamples:10000""#;

/// Lines of sigtest, each a metric, a test and what it found.
fn tested(tool: &Tool, lines: &[(&str, &str, &str)]) {
    tested_between(tool, "systems", "a_rather_long_name", lines);
}

fn tested_between(tool: &Tool, side: &str, b: &str, lines: &[(&str, &str, &str)]) {
    let line = |(metric, test, found): &(&str, &str, &str)| {
        let rows = match found.contains("\"n\":") {
            true => "",
            false => "\"n\":2,",
        };
        let signature = match found.contains("\"signature\":") {
            true => String::new(),
            false => format!(",{SIGNED}"),
        };
        format!(
            r#"{{"v":1,"a":"{side}.base","b":"{side}.{b}","metric":"{metric}","test":"{test}",{rows}"mean_a":4.25,"mean_b":2.5,{found}{signature}}}"#
        ) + "\n"
    };
    let lines: String = lines.iter().map(line).collect();
    tool.file("output/eval/r/tests.jsonl", &lines);
}

/// The screen, which is 80 columns wide.
fn screen(tool: &Tool) -> String {
    let run = tool.run(&["--run", "r", "--data", "d"], "").exits(0);
    assert!(
        run.stdout.lines().all(|line| line.chars().count() <= 80),
        "wider than 80 columns\n{run}"
    );
    run.stdout
}

/// The same, each run of white space as one space.
fn flowing(tool: &Tool) -> String {
    let words: Vec<String> = (screen(tool).split_whitespace())
        .map(String::from)
        .collect();
    words.join(" ")
}

#[track_caller]
fn says(text: &str, all: &[&str]) {
    for words in all {
        assert!(text.contains(words), "lacks {words:?}\n{text}");
    }
}

/// A finished run with figures that are easy to tell apart.
fn lay_out(tool: &Tool) {
    let pair = |split: &str| format!("{{\"v\":1,\"id\":\"x\",\"split\":\"{split}\"}}\n");
    let refused = |filter: &str| {
        format!(
            "{{\"id\":\"x\",\"rejected\":{{\"by\":\"pair-validate\",\"reasons\":[{{\"filter\":\"{filter}\",\"detail\":\"\"}}]}}}}\n"
        )
    };
    tool.file("data/raw/d/pairs.jsonl", &pair("train").repeat(11));
    tool.file(
        "data/processed/d/pairs.jsonl",
        &(pair("train").repeat(5) + &pair("eval").repeat(2)),
    );
    tool.file(
        "data/processed/d/rejects.jsonl",
        &(refused("reply_too_short").repeat(2) + &refused("tweet_url")),
    );
    tool.file(
        "data/processed/d/dropped.jsonl",
        "{\"id\":\"x\",\"dropped\":{\"by\":\"pair-dedup\",\"reason\":\"semantic\",\"keeper\":\"y\",\"tweet_cosine\":0.95,\"reply_cosine\":0.97}}\n",
    );
    tool.file(
        "output/models/r/metrics.jsonl",
        "{\"step\":0,\"eval_loss\":4.25}\n{\"step\":1,\"loss\":4.5}\n{\"step\":2,\"loss\":2.125}\n{\"step\":2,\"eval_loss\":2.5}\n",
    );
    tool.file(
        "output/models/r/timing.jsonl",
        "{\"step\":1,\"seconds\":3.5}\n{\"step\":2,\"seconds\":4.5}\n",
    );
    tool.file("output/models/r/adapter_model.safetensors", "");
    chosen(tool, "0", "false");
    let interval = r#""p_holm":null,"ci_low":1.5,"ci_high":2.0"#;
    tested(
        tool,
        &[
            ("nll", "permutation", r#""p_holm":0.0123"#),
            ("nll", "bootstrap", interval),
        ],
    );
    tool.file(
        "output/eval/r/judged.jsonl",
        "{\"v\":1,\"id\":\"x\",\"verdicts\":{\"judge\":\"reference-chrf-rank\",\"winner\":\"lora\"}}\n{\"v\":1,\"corpus\":{}}\n",
    );
}

#[test]
fn every_figure_is_where_it_belongs() {
    let tool = tool();
    lay_out(&tool);
    let run = tool.run(&["--run", "r", "--data", "d"], "").exits(0);
    for line in [
        "11 pairs collected",
        "3 refused     reply_too_short 2, tweet_url 1",
        "1 duplicates  semantic 1",
        "5 to train on, 2 held out",
        "2 steps in 8 s",
        "loss 4.500 at the first step, 2.125 at the last",
        "held-out loss 4.250 before, 2.500 after",
        // The interval is of base minus adapter: the adapter brought its negative.
        "4.250     2.500        -2.000 to -1.500     0.0123 *",
        "reference-chrf-rank: lora 1\n           Offline: to the point or not, whatever the manner",
        "output/models/r/README.md",
    ] {
        assert!(run.stdout.contains(line), "lacks {line:?}\n{run}");
    }
    assert!(
        run.stdout.lines().all(|line| line.chars().count() <= 80),
        "wider than 80 columns\n{run}"
    );
}

#[test]
fn what_is_not_there_is_named_with_the_command_that_makes_it() {
    let tool = tool();
    let run = tool.run(&["--run", "new"], "").exits(0);
    for line in [
        "make data RUN=new",
        "make train RUN=new",
        "make eval RUN=new",
    ] {
        assert!(run.stdout.contains(line), "lacks {line:?}\n{run}");
    }
    tool.file(
        "output/models/new/metrics.jsonl",
        "{\"step\":1,\"loss\":4.5}\n",
    );
    let run = tool.run(&["--run", "new"], "").exits(0);
    says(&run.stdout, &["unfinished: make train RUN=new goes on"]);
    // Data of another name is named too: without it make would collect under the run's.
    let run = tool.run(&["--run", "v2", "--data", "main"], "").exits(0);
    for phase in ["data", "train", "eval"] {
        let command = format!("make {phase} RUN=v2 DATA=main");
        says(&run.stdout, &[&command]);
    }
}

/// A run that was killed, or whose disk was full, is when one most wants to see what is there.
#[test]
fn a_last_line_that_was_cut_short_is_no_line() {
    let tool = tool();
    lay_out(&tool);
    let metrics = "{\"step\":1,\"loss\":4.5}\n{\"step\":2,\"lo";
    tool.file("output/models/r/metrics.jsonl", metrics);
    says(&screen(&tool), &["     1 steps in"]);
    tool.file("output/models/r/metrics.jsonl", &format!("{metrics}\n"));
    tool.run(&["--run", "r", "--data", "d"], "")
        .exits(3)
        .says("metrics.jsonl:2");
}

#[test]
fn malformed_lines_are_refused_as_such() {
    let tool = tool();
    lay_out(&tool);
    let bad = r#"{"by":"pair-validate","file":"-","line":3,"error":"no JSON","raw":"x"}"#;
    tool.file("data/processed/d/rejects.jsonl", &format!("{bad}\n"));
    fs::remove_file(tool.folder().join("data/raw/d/pairs.jsonl")).unwrap();
    says(
        &screen(&tool),
        &["\nData            1 refused     malformed 1\n"],
    );
}

#[test]
fn flags_that_would_do_nothing_are_refused() {
    let tool = tool();
    lay_out(&tool);
    for flag in ["--config=x", "--print-config", "--max-bad-lines=3"] {
        tool.run(&["--run", "r", "--data", "d", flag], "")
            .exits(2)
            .says("a report has no settings");
    }
}

#[test]
fn a_damaged_file_is_named_with_its_line() {
    let tool = tool();
    lay_out(&tool);
    tool.file("output/eval/r/tests.jsonl", "{\"v\":1}\n");
    tool.run(&["--run", "r", "--data", "d"], "")
        .exits(3)
        .says("tests.jsonl:1");
    tool.file("output/eval/r/tests.jsonl", "{\"v\":1\n");
    tool.run(&["--run", "r", "--data", "d"], "")
        .exits(3)
        .says("tests.jsonl:1");
}

#[test]
fn what_a_name_or_a_file_holds_reaches_no_terminal_as_it_is() {
    let tool = tool();
    lay_out(&tool);
    let run = tool.run(&["--run", "a\u{1b}[31mb"], "").exits(0);
    assert!(run.stdout.contains("a\\u{1b}[31mb") && !run.stdout.contains('\u{1b}'));
    let judged = r#"{"v":1,"id":"x","verdicts":{"judge":"\u001b[31m","winner":"\u202ea"}}"#;
    tool.file("output/eval/r/judged.jsonl", &format!("{judged}\n"));
    let run = tool.run(&["--run", "r", "--data", "d"], "").exits(0);
    assert!(
        run.stdout.contains(r"Judge      \u{1b}[31m: \u{202e}a 1"),
        "{run}"
    );
    assert!(!run.stdout.contains(['\u{1b}', '\u{202e}']), "{run}");
}

#[test]
fn names_and_roots_that_cannot_be_meant_are_refused() {
    let tool = tool();
    lay_out(&tool);
    for name in ["../r", "r/", "./r", "/r", ".", "..", "", "a/b"] {
        for (flag, other) in [("--run", "--data"), ("--data", "--run")] {
            let run = tool.run(&[flag, name, other, "d"], "").exits(2);
            let run = run.says(&format!("{flag} '{name}': is no name of a folder"));
            assert_eq!(run.stdout, "");
        }
    }
    for root in ["nope", "data/raw/d/pairs.jsonl"] {
        tool.run(&["--run", "r", "--root", root], "")
            .exits(2)
            .says(&format!("--root {root}: there is no such folder"));
    }
    let root = tool.path("");
    let run = tool.run(&["--run", "r", "--data", "d", "--root", &root], "");
    assert!(run.exits(0).stdout.contains("11 pairs collected"));
}

#[test]
fn help_and_examples() {
    let tool = tool();
    lay_out(&tool);
    harness::check_examples(&tool);
}

#[test]
fn alpha_is_the_one_that_was_tested_with() {
    let tool = tool();
    lay_out(&tool);
    says(
        &flowing(&tool),
        &["95% of the difference", "each 95%", "; * below 0.05."],
    );
    // The last one is sigtest's own: a name may hold anything.
    let strict = r#""p_holm":0.0123,"ci_low":1.5,"ci_high":2.0,"signature":"tool:sigtest|a:|alpha:0.5|alpha:0.01|seed:1""#;
    tested(&tool, &[("nll", "permutation", strict)]);
    let text = flowing(&tool);
    says(
        &text,
        &["99% of the difference", "each 99%", "; * below 0.01."],
    );
    assert!(!text.contains("0.0123 *"), "{text}");
    // Nobody can say what is significant where it is not known.
    let unsigned = r#""p_holm":0.0001,"ci_low":1.5,"ci_high":2.0,"signature":null"#;
    tested(&tool, &[("nll", "permutation", unsigned)]);
    let text = flowing(&tool);
    says(&text, &["interval of the difference", "0.0001"]);
    assert!(!text.contains('*') && !text.contains('%'), "{text}");
}

#[test]
fn the_interval_is_that_of_the_test_beside_it() {
    let tool = tool();
    lay_out(&tool);
    let bootstrap = r#""ci_low":5.0,"ci_high":6.0"#;
    let with = |found: &str| {
        tested(
            &tool,
            &[
                ("nll", "permutation", found),
                ("nll", "bootstrap", bootstrap),
            ],
        );
        flowing(&tool)
    };
    says(
        &with(r#""p_holm":0.04,"ci_low":0.0,"ci_high":2.0"#),
        &["2.500 -2.000 to +0.000 0.0400"],
    );
    says(
        &with(r#""p_holm":0.04,"ci_low":null,"ci_high":2.0"#),
        &["2.500 from -2.000 0.0400"],
    );
    // None is none: the bootstrap's is another test's.
    let reason = r#""p_holm":0.5,"ci_low":null,"ci_high":null,"ci_reason":"too few clusters""#;
    says(
        &with(reason),
        &["2.500 - 0.5000", "nll: no interval: too few clusters"],
    );
    let reason =
        r#""p_holm":null,"ci_low":null,"ci_high":null,"reason":"every difference is zero""#;
    says(
        &with(reason),
        &[
            "2.500 - -",
            "nll: no interval, no p: every difference is zero",
        ],
    );
    // In files from before it had one there is no other.
    says(
        &with(r#""p_holm":0.04,"ci_low":null,"ci_high":null"#),
        &["2.500 -6.000 to -5.000 0.0400"],
    );
}

#[test]
fn rows_that_say_nothing_are_counted_and_take_the_star() {
    let tool = tool();
    lay_out(&tool);
    let gaps = |rows: &str| {
        let found = format!(r#""p_holm":0.001,"ci_low":1.0,"ci_high":2.0,{rows}"#);
        tested_between(
            &tool,
            "verdicts.score",
            "lora",
            &[("score", "permutation", &found)],
        );
        flowing(&tool)
    };
    let text = gaps(r#""n":55,"missing":42,"unpaired":3,"clusters":20"#);
    says(
        &text,
        &[
            "lora against base by the judge's score, 55 of 100 held-out rows in 20 groups (42 without a figure on \
             either side, 3 on one)",
            "No * where over 5% of the rows lack the figure",
        ],
    );
    assert!(!text.contains("0.0010 *"), "{text}");
    let html = page(&tool);
    let found = self::text(all(html.root_element(), "#found")[0]);
    says(
        &found,
        &[
            "42 without a figure on either side",
            "Not shown to differ in score",
            "No * where over 5% of the rows lack the figure",
        ],
    );
    // 5 of 100 are no more than 5%.
    let text = gaps(r#""n":95,"missing":4,"unpaired":1"#);
    says(&text, &["95 of 100 held-out rows (4 without", "0.0010 *"]);
    assert!(!text.contains("No * where"), "{text}");
    let text = gaps(r#""n":94,"missing":5,"unpaired":1"#);
    assert!(!text.contains("0.0010 *"), "{text}");
    // Where the figures do not lack the same rows, each says so itself.
    let whole = r#""p_holm":0.001,"ci_low":1.0,"ci_high":2.0,"n":100,"missing":0,"unpaired":0"#;
    let part = r#""p_holm":0.001,"ci_low":1.0,"ci_high":2.0,"n":90,"missing":0,"unpaired":10"#;
    tested(
        &tool,
        &[("nll", "permutation", whole), ("chrf", "permutation", part)],
    );
    let text = flowing(&tool);
    says(
        &text,
        &[
            "against base, 100 held-out rows figure",
            "chrf: 90 of 100 held-out rows (0 without a figure on either side, 10 on one)",
        ],
    );
    assert_eq!(text.matches("0.0010 *").count(), 1, "{text}");
}

#[test]
fn where_so_few_groups_show_nothing_it_is_said() {
    let tool = tool();
    lay_out(&tool);
    let groups = |groups: u64, more: &str| {
        let found = format!(
            r#""n":450,"clusters":{groups},"method":"exact","p_holm":0.9,"ci_low":1.0,"ci_high":2.0{more}"#
        );
        tested(
            &tool,
            &[
                ("nll", "permutation", &found),
                ("chrf", "permutation", &found),
            ],
        );
        flowing(&tool)
    };
    // Of 2⁶ sign patterns two are as extreme as any: 2 · 2/64 over two figures.
    let text = groups(6, "");
    says(
        &text,
        &[
            "450 held-out rows in 6 groups",
            "No p can be below 0.05 here: of 6 groups the least, adjusted over 2 figures, is 0.06.",
        ],
    );
    assert!(
        !groups(7, "").contains("No p can"),
        "2 · 2/128 is below 0.05"
    );
    // One side is enough of a one-sided test.
    let one_sided = r#","signature":"tool:sigtest|alternative:greater|alpha:0.05""#;
    let text = groups(6, one_sided);
    assert!(!text.contains("No p can"), "{text}");
    says(&text, &["(one-sided: left greater)"]);
}

#[test]
fn the_legend_says_what_its_figures_speak_of() {
    let tool = tool();
    lay_out(&tool);
    let control = "No control (CONTROL=shuffled): part of a gain may be style alone.";
    says(
        &flowing(&tool),
        &[
            "Figures are means over rows, bleu and chrf too: not those of the corpus.",
            "Intervals: each 95%, not adjusted.",
            "p: permutation test (two-sided), adjusted over the figures of a table (Holm), over these held-out rows, \
             for this one adapter (one seed, one decoding)",
            control,
        ],
    );
    tested_between(
        &tool,
        "systems",
        "shuffled",
        &[("nll", "permutation", r#""p_holm":0.5"#)],
    );
    // Of base and control alone no adapter is held against anything.
    says(&flowing(&tool), &[control]);
    let path = "output/eval/r/tests.jsonl";
    tool.file(
        path,
        &tool.read(path).replace("systems.base", "systems.lora"),
    );
    assert!(!flowing(&tool).contains(control));
}

/// Training has to beat a prompt, and which prompt that was is told.
#[test]
fn what_the_prompted_base_was_shown_is_told() {
    let tool = tool();
    lay_out(&tool);
    let lacks = "No prompted base (generation.prompted): a better prompt may do as much.";
    says(&flowing(&tool), &[lacks]);
    let line = ("nll", "permutation", r#""p_holm":0.5"#);
    tested_between(&tool, "systems", "lora", &[line]);
    let path = "output/eval/r/tests.jsonl";
    tool.file(
        path,
        &tool.read(path).replace("systems.base", "systems.prompted"),
    );
    let corpus = r#"{"v":1,"corpus":{"systems":{},"prompted":{"examples":["p1","p2","p3"],"system_prompt":null}}}"#;
    let judged = tool.read("output/eval/r/judged.jsonl");
    tool.file("output/eval/r/judged.jsonl", &(judged + corpus + "\n"));
    let text = flowing(&tool);
    says(
        &text,
        &["lora against prompted", "Rows that prompted was shown: 3."],
    );
    assert!(!text.contains(lacks), "{text}");
}

#[test]
fn a_judge_that_goes_by_place_or_length_is_seen() {
    let tool = tool();
    lay_out(&tool);
    // Replies of base and lora, who won, whether the orders disagreed, and why nobody was asked.
    let item = |base: &str, lora: &str, winner: &str, flipped: bool, because: &str| {
        format!(
            r#"{{"v":1,"reference":"two words","systems":{{"base":{{"prediction":"{base}","finish":"stop"}},"lora":{{"prediction":"{lora}","finish":"length"}}}},"verdicts":{{"judge":"j","winner":{winner},"comparisons":[{{"a":"base","b":"lora","winner":{winner},"flipped":{flipped}{because},"orders":[]}}]}}}}"#
        ) + "\n"
    };
    let judged = item("a", "a b c", "\"tie\"", true, "").repeat(3)
        + &item(
            "a",
            "a",
            "\"tie\"",
            false,
            r#","because":"identical replies""#,
        )
        + &item("a b", "a b c d", "\"lora\"", false, "").repeat(4)
        + &item("a b c", "a", "\"lora\"", false, "")
        + &item("a b", "c d", "\"base\"", false, "")
        + &item("a b", "c d", "null", false, "");
    tool.file("output/eval/r/judged.jsonl", &judged);
    says(
        &flowing(&tool),
        &[
            "Judge j: lora 5, tie 4, base 1, none 1",
            "Of 4 ties, 3 flipped (the two orders disagree), 1 of identical replies.",
            // Of five wins of lora; that of base is between two of the same length.
            "The longer reply (in words) won 4 of 5.",
            // 3 + 1 + 8 + 3 + 2 + 2 and 9 + 1 + 16 + 1 + 2 + 2 words over 11 rows.
            "Replies words, on average: base 1.7, lora 2.8, liked replies 2.0",
            "cut at max_new_tokens: base 0 of 11, lora 11 of 11",
        ],
    );
    // What files from elsewhere do not tell is not said.
    let bare = r#"{"v":1,"verdicts":{"judge":"j","winner":"tie"}}"#;
    tool.file("output/eval/r/judged.jsonl", &format!("{bare}\n"));
    let text = flowing(&tool);
    for words in ["flipped", "longer reply", "Replies", "cut at"] {
        assert!(!text.contains(words), "{words}\n{text}");
    }
}

#[test]
fn the_held_out_loss_is_the_adapters() {
    let tool = tool();
    lay_out(&tool);
    tool.file(
        "output/models/r/metrics.jsonl",
        "{\"step\":0,\"eval_loss\":2.0}\n{\"step\":1,\"loss\":4.5}\n{\"step\":1,\"eval_loss\":2.25}\n\
         {\"step\":2,\"loss\":3.5}\n{\"step\":2,\"eval_loss\":2.25}\n{\"step\":3,\"loss\":2.5}\n\
         {\"step\":3,\"eval_loss\":3.0}\n",
    );
    let chose = "what is measured on them is somewhat too good";
    let with = |patience: &str, best: &str| {
        chosen(&tool, patience, best);
        flowing(&tool)
    };
    let text = with("0", "false");
    says(&text, &["held-out loss 2.000 before, 3.000 after"]);
    assert!(!text.contains(chose), "{text}");
    let text = with("3", "false");
    says(
        &text,
        &["2.000 before, 3.000 after", "chose when to stop", chose],
    );
    // That of step 0 is no candidate; of equal ones it is the first.
    let text = with("0", "true");
    let best = "2.000 before, 2.250 at step 1, the best, whose adapter this is";
    says(&text, &[best, "chose which step's adapter this is", chose]);
    // Not finished, or not known: the last is the last, and no more is said of it.
    let last = "2.000 before, 3.000 at the last evaluation (step 3)";
    let remove = |name: &str| std::fs::remove_file(tool.path(name)).unwrap();
    remove("output/models/r/adapter_model.safetensors");
    says(&flowing(&tool), &[last]);
    tool.file("output/models/r/adapter_model.safetensors", "");
    remove("output/models/r/run.json");
    says(&flowing(&tool), &[last]);
    tool.file("output/models/r/run.json", "{\"v\":1}");
    tool.run(&["--run", "r", "--data", "d"], "")
        .exits(3)
        .says("run.json: key `settings` is missing");
}

#[test]
fn names_break_no_line_and_no_column() {
    let tool = tool();
    lay_out(&tool);
    let long = "x".repeat(200);
    let reason = format!(r#""p_holm":1e-300,"ci_low":-1e300,"ci_high":1e300,"ci_reason":"{long}""#);
    let none = format!(r#""p_holm":null,"reason":"{long}\nForged 1.000""#);
    tested(
        &tool,
        &[
            (r"a\nForged\u001b", "permutation", &reason),
            (&long, "permutation", &none),
        ],
    );
    let judged = format!(
        r#"{{"v":1,"systems":{{"{long}":{{"prediction":"a"}},"\nForged":{{"prediction":"a"}}}},"verdicts":{{"judge":"{long}\n","winner":"\nForged {long}"}}}}"#
    );
    tool.file("output/eval/r/judged.jsonl", &format!("{judged}\n"));
    let text = screen(&tool);
    assert!(
        !text.lines().any(|line| line.starts_with("Forged")),
        "{text}"
    );
}

/// The page as a browser's parser sees it.
fn page(tool: &Tool) -> Html {
    let run = ["--run", "r", "--data", "d", "--html", "page.html"];
    tool.run(&run, "").exits(0);
    Html::parse_document(&fs::read_to_string(tool.path("page.html")).unwrap())
}

fn all<'p>(within: ElementRef<'p>, selector: &str) -> Vec<ElementRef<'p>> {
    within.select(&Selector::parse(selector).unwrap()).collect()
}

/// The text of an element, each run of white space as one space.
fn text(of: ElementRef) -> String {
    let text: String = of.text().collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The chart whose description begins so.
#[track_caller]
fn chart<'p>(page: &'p Html, begins: &str) -> ElementRef<'p> {
    let charts = all(page.root_element(), "svg[aria-label]");
    let label = |svg: &ElementRef| svg.attr("aria-label").unwrap().to_owned();
    let found = charts.iter().find(|svg| label(svg).starts_with(begins));
    *found.unwrap_or_else(|| {
        panic!(
            "{begins:?} in {:?}",
            charts.iter().map(label).collect::<Vec<_>>()
        )
    })
}

fn number(of: &ElementRef, name: &str) -> f64 {
    of.attr(name).unwrap().parse().unwrap()
}

/// What a coordinate means, by the numbers beside the axis: the largest group of numbers that
/// share the other coordinate, of those that `belongs` takes. And how much one unit of the
/// drawing is, which is what a coordinate may be off by.
#[track_caller]
fn axis(svg: ElementRef, along: &str, belongs: impl Fn(f64) -> bool) -> (impl Fn(f64) -> f64, f64) {
    let across = if along == "x" { "y" } else { "x" };
    let mut groups: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for label in all(svg, "text") {
        if let Ok(value) = text(label).parse::<f64>()
            && belongs(number(&label, across))
        {
            let group = groups
                .entry(label.attr(across).unwrap().into())
                .or_default();
            group.push((number(&label, along), value));
        }
    }
    let labels = groups.into_values().max_by_key(Vec::len).unwrap();
    let (from, to) = (labels[0], *labels.last().unwrap());
    let scale = (to.1 - from.1) / (to.0 - from.0);
    (move |at| from.1 + (at - from.0) * scale, scale.abs())
}

/// The points of the one line of this colour.
fn points(svg: ElementRef, color: &str) -> Vec<(f64, f64)> {
    let lines = all(svg, &format!("polyline[stroke='{color}']"));
    assert_eq!(lines.len(), 1, "{color}");
    let pairs = lines[0].attr("points").unwrap().split_whitespace();
    let point = |pair: &str| {
        let (x, y) = pair.split_once(',').unwrap();
        (x.parse().unwrap(), y.parse().unwrap())
    };
    pairs.map(point).collect()
}

#[track_caller]
fn near(found: f64, expected: f64, unit: f64) {
    // A point and the two labels that it is measured by are each half a unit off at most.
    assert!(
        (found - expected).abs() <= 2.0 * unit,
        "{found} is not {expected} ± {unit}"
    );
}

const BLUE: &str = "#0072B2";
const ORANGE: &str = "#D55E00";
const GREEN: &str = "#009E73";
const PALE: &str = "#9DC3DC";
const GREY: &str = "#8C8C8C";

/// Rows of judged.jsonl: nll of base and lora, and the replies' words.
fn judged(tool: &Tool, rows: &[(f64, f64)]) {
    let row = |(at, (base, lora)): (usize, &(f64, f64))| {
        format!(
            r#"{{"v":1,"id":"row {at}","tweet":"tweet {at}","reference":"liked {at}","systems":{{"base":{{"prediction":"of base {at}","nll":{base},"finish":"stop"}},"lora":{{"prediction":"of lora {at}","nll":{lora},"finish":"stop"}}}}}}"#
        ) + "\n"
    };
    let lines: String = rows.iter().enumerate().map(row).collect();
    tool.file("output/eval/r/judged.jsonl", &lines);
}

#[test]
fn the_page_says_what_the_screen_says() {
    let tool = tool();
    lay_out(&tool);
    chosen(&tool, "0", "true");
    let html = page(&tool);
    let body = text(all(html.root_element(), "body")[0]);
    let screen = flowing(&tool);
    for words in [
        "11 pairs collected",
        "loss 4.500 at the first step, 2.125 at the last",
        "held-out loss 4.250 before, 2.500 at step 2, the best, whose adapter this is",
        "The held-out rows chose which step's adapter this is: what is measured on them is somewhat too good.",
        "95% of the difference",
        "-2.000 to -1.500",
        "0.0123 *",
        "Lower is better for nll (nats a token), higher for the others; differences are right − left.",
        "Figures are means over rows, bleu and chrf too: not those of the corpus.",
        "for this one adapter (one seed, one decoding); * below 0.05.",
        "No control (CONTROL=shuffled): part of a gain may be style alone.",
        "Offline: to the point or not, whatever the manner, which is most of what is learnt.",
    ] {
        assert!(
            screen.contains(words),
            "the screen lacks {words:?}\n{screen}"
        );
        assert!(body.contains(words), "the page lacks {words:?}\n{body}");
    }
    says(
        &body,
        &[
            "3 refused, 1 duplicates, 5 to train on, 2 held out",
            "Better in nll (-1.750)",
            "tests.jsonl, nlltool:sigtest|a:x|alternative:two-sided|alpha:0.05|resamples:10000",
            "this pagetool:report|",
        ],
    );
}

#[test]
fn what_no_star_marks_is_not_said_to_differ() {
    let tool = tool();
    lay_out(&tool);
    let found = |p: &str, diff: &str| {
        format!(r#""p_holm":{p},"ci_low":-1.0,"ci_high":2.0,"mean_diff":{diff}"#)
    };
    tested(
        &tool,
        &[
            ("nll", "permutation", &found("0.01", "-0.5")),
            ("chrf", "permutation", &found("0.01", "-0.5")),
            ("bleu", "permutation", &found("0.06", "-0.5")),
            (
                "rouge1",
                "permutation",
                r#""p_holm":null,"reason":"every difference is zero""#,
            ),
        ],
    );
    let html = page(&tool);
    let items: Vec<String> = all(html.root_element(), ".found li")
        .into_iter()
        .map(text)
        .collect();
    // b − a is +0.5 in each: good for chrf, bad for the loss.
    let expected = [
        "Better in chrf (+0.500)",
        "Worse in nll (+0.500)",
        "Not shown to differ in bleu (+0.500), rouge1 (-1.750)",
    ];
    assert_eq!(items, expected);
}

#[test]
fn the_loss_curve_is_that_of_the_metrics() {
    let tool = tool();
    lay_out(&tool);
    let train = [5.0, 4.0, 6.0, 3.0, 2.0];
    let held_out = [(0.0, 5.5), (3.0, 3.5), (5.0, 4.0)];
    let mut metrics = String::new();
    for (at, loss) in train.iter().enumerate() {
        let (step, rate, norm) = (at + 1, 1e-4 * at as f64, 2.0 + at as f64);
        metrics += &format!(
            "{{\"step\":{step},\"loss\":{loss},\"learning_rate\":{rate},\"grad_norm\":{norm},\"tokens\":600}}\n"
        );
    }
    for (step, loss) in held_out {
        metrics += &format!("{{\"step\":{step},\"eval_loss\":{loss}}}\n");
    }
    tool.file("output/models/r/metrics.jsonl", &metrics);
    // The figures of two steps may arrive at once: the second then took no time.
    let timing = [1.0, 2.0, 3.0, 0.0, 3.0];
    let timing = timing
        .iter()
        .enumerate()
        .map(|(at, seconds)| format!("{{\"step\":{},\"seconds\":{seconds}}}\n", at + 1));
    tool.file("output/models/r/timing.jsonl", &timing.collect::<String>());
    chosen(&tool, "0", "true");
    let html = page(&tool);

    let check = |begins: &str, color: &str, expected: &[(f64, f64)]| {
        let svg = chart(&html, begins);
        let ((x, x_unit), (y, y_unit)) = (axis(svg, "x", |_| true), axis(svg, "y", |_| true));
        let found = points(svg, color);
        assert_eq!(found.len(), expected.len(), "{begins} {color}");
        for (found, expected) in found.iter().zip(expected) {
            near(x(found.0), expected.0, x_unit);
            near(y(found.1), expected.1, y_unit);
        }
    };
    let steps =
        |values: [f64; 5]| -> Vec<(f64, f64)> { (1..).map(f64::from).zip(values).collect() };
    check("Training loss", PALE, &steps(train));
    // Means of three, and of one at either end.
    check(
        "Training loss",
        BLUE,
        &steps([5.0, 5.0, 13.0 / 3.0, 11.0 / 3.0, 2.0]),
    );
    check("Training loss", ORANGE, &held_out);
    let svg = chart(&html, "Training loss");
    let (x, unit) = axis(svg, "x", |_| true);
    // Of the held-out losses after the first the least is at step 3.
    near(x(points(svg, GREEN)[0].0), 3.0, unit);
    says(
        &text(all(html.root_element(), "#training")[0]),
        &["step 3, whose adapter this is"],
    );
    check("Learning rate", BLUE, &steps([0.0, 1e-4, 2e-4, 3e-4, 4e-4]));
    check("Gradient norm", BLUE, &steps([2.0, 3.0, 4.0, 5.0, 6.0]));
    // 600 tokens a step over the seconds of up to three steps.
    check(
        "Tokens a second",
        BLUE,
        &steps([400.0, 300.0, 360.0, 300.0, 400.0]),
    );
}

#[test]
fn the_forest_plot_has_each_figure_on_an_axis_of_its_own() {
    let tool = tool();
    lay_out(&tool);
    let line = |ends: &str, diff: f64| format!(r#""p_holm":0.04,{ends},"mean_diff":{diff}"#);
    tested(
        &tool,
        &[
            (
                "nll",
                "permutation",
                &line(r#""ci_low":0.25,"ci_high":0.75"#, 0.5),
            ),
            (
                "chrf",
                "permutation",
                &line(r#""ci_low":-30.0,"ci_high":10.0"#, -12.0),
            ),
            (
                "bleu",
                "permutation",
                &line(r#""ci_low":null,"ci_high":3.0"#, 1.0),
            ),
        ],
    );
    let html = page(&tool);
    let svg = chart(&html, "What a_rather_long_name brought against base");
    let dots = all(svg, "circle");
    let lines = all(
        svg,
        &format!("polyline[stroke='{BLUE}'][stroke-width='12']"),
    );
    let names: Vec<String> = all(svg, "text")
        .into_iter()
        .map(text)
        .filter(|t| t.parse::<f64>().is_err())
        .collect();
    let expected = [
        "nll",
        "nats/token, lower is better",
        "chrf",
        "0 to 100, higher is better",
        "bleu",
        "0 to 100, higher is better",
    ];
    assert_eq!(names, expected);
    // b − a: the negatives of sigtest's a − b.
    let expected = [
        (-0.5, Some(-0.75), -0.25),
        (12.0, Some(-10.0), 30.0),
        (-1.0, Some(-3.0), f64::NAN),
    ];
    for ((dot, line), (mean, low, high)) in dots.iter().zip(&lines).zip(expected) {
        let middle = number(dot, "cy");
        let (x, unit) = axis(svg, "x", |y| y > middle && y < middle + 4.0 * 54.0);
        near(x(number(dot, "cx")), mean, unit);
        let ends: Vec<f64> = line
            .attr("points")
            .unwrap()
            .split_whitespace()
            .map(|pair| x(pair.split_once(',').unwrap().0.parse().unwrap()))
            .collect();
        near(ends[0], low.unwrap(), unit);
        if high.is_nan() {
            // An open end goes on to the end of the axis, beyond what was measured.
            assert!(ends[1] > 3.0, "{ends:?}");
        } else {
            near(ends[1], high, unit);
        }
    }
    assert_eq!((dots.len(), lines.len()), (3, 3));
}

#[test]
fn differences_are_counted_by_row_and_by_side() {
    let tool = tool();
    lay_out(&tool);
    tested_between(
        &tool,
        "systems",
        "lora",
        &[("nll", "permutation", r#""n":9,"p_holm":0.5"#)],
    );
    // Four rows a little better, two much, two worse, one equal.
    judged(
        &tool,
        &[
            (2.0, 1.95),
            (2.0, 1.95),
            (2.0, 1.95),
            (2.0, 1.95),
            (3.0, 1.1),
            (3.0, 1.1),
            (1.0, 1.55),
            (1.0, 1.55),
            (1.5, 1.5),
        ],
    );
    let html = page(&tool);
    let svg = chart(&html, "nll of lora less that of base");
    assert_eq!(
        svg.attr("aria-label").unwrap(),
        "nll of lora less that of base, by row: better in 6 of 9, worse in 2, equal in 1."
    );
    let ((x, x_unit), (y, y_unit)) = (axis(svg, "x", |_| true), axis(svg, "y", |_| true));
    let bars = |color: &str| -> Vec<(f64, f64, f64)> {
        let bar = |bar: &ElementRef| {
            let (left, top) = (number(bar, "x"), number(bar, "y"));
            assert!(
                y(top + number(bar, "height")).abs() <= 2.0 * y_unit,
                "stands on zero"
            );
            (x(left), x(left + number(bar, "width")), y(top))
        };
        all(svg, &format!("rect[fill='{color}']"))
            .iter()
            .map(bar)
            .collect()
    };
    // Each value lies in a bar of its side's colour, as high as there are rows.
    for (color, expected) in [
        (BLUE, vec![(-1.9, 2.0), (-0.05, 4.0)]),
        (ORANGE, vec![(0.55, 2.0)]),
        (GREY, vec![(0.0, 1.0)]),
    ] {
        let bars = bars(color);
        assert_eq!(bars.len(), expected.len(), "{color}");
        for ((left, right, height), (value, rows)) in bars.iter().zip(expected) {
            near(*height, rows, y_unit);
            assert!(
                left - 2.0 * x_unit <= value && value <= right + 2.0 * x_unit,
                "{value} not in {left}..{right}"
            );
            let side = |at: f64| at.abs() <= 2.0 * x_unit || (at < 0.0) == (value < 0.0);
            assert!(
                color == GREY || (side(*left) && side(*right)),
                "{left}..{right} holds zero"
            );
        }
    }
    // Tests of other rows than these are told apart.
    let other = "The tests are of 8 rows: they and judged.jsonl are not of the same time.";
    assert!(!text(html.root_element()).contains(other));
    tested_between(
        &tool,
        "systems",
        "lora",
        &[("nll", "permutation", r#""n":8,"p_holm":0.5"#)],
    );
    says(&text(page(&tool).root_element()), &[other]);
}

#[test]
fn bars_are_as_long_as_what_they_count() {
    let tool = tool();
    lay_out(&tool);
    let item = |reply: &str, winner: &str, flipped: bool, because: &str| {
        format!(
            r#"{{"v":1,"id":"x","reference":"a b c","systems":{{"base":{{"prediction":"a"}},"lora":{{"prediction":"{reply}"}}}},"verdicts":{{"judge":"j","winner":{winner},"comparisons":[{{"a":"base","b":"lora","winner":{winner},"flipped":{flipped}{because},"orders":[]}}]}}}}"#
        ) + "\n"
    };
    let outcomes = item("a b", "\"lora\"", false, "").repeat(5)
        + &item("a b c d", "\"base\"", false, "").repeat(3)
        + &item("a b c d", "\"tie\"", true, "").repeat(2)
        + &item("a", "\"tie\"", false, r#","because":"identical replies""#)
        + &item("a b c d e f", "null", false, "");
    tool.file("output/eval/r/judged.jsonl", &outcomes);
    let html = page(&tool);
    let bars = |svg: ElementRef| -> Vec<(String, f64)> {
        // The numbers of the axis are below the bars, those of the bars are not.
        let bottom = |bar: &ElementRef| number(bar, "y") + number(bar, "height");
        let floor = all(svg, "rect").iter().map(bottom).fold(0.0, f64::max);
        let (x, unit) = axis(svg, "x", |y| y > floor);
        let bar = |bar: &ElementRef| {
            let (left, width) = (number(bar, "x"), number(bar, "width"));
            let count = x(left + width) - x(left);
            near(count, count.round(), unit);
            (bar.attr("fill").unwrap().to_owned(), count.round())
        };
        all(svg, "rect").iter().map(bar).collect()
    };
    let with = |expected: &[(&str, f64)]| -> Vec<(String, f64)> {
        expected
            .iter()
            .map(|(color, count)| (color.to_string(), *count))
            .collect()
    };
    let kept = [
        (BLUE, 5.0),
        (BLUE, 2.0),
        (ORANGE, 2.0),
        (ORANGE, 1.0),
        (GREY, 1.0),
    ];
    assert_eq!(bars(chart(&html, "Pairs")), with(&kept));
    let svg = chart(&html, "Pairs");
    let names: Vec<String> = all(svg, "text")
        .into_iter()
        .map(text)
        .filter(|t| t.parse::<f64>().is_err())
        .collect();
    let expected = [
        "pairs",
        "kept, to train on",
        "kept, held out",
        "reply_too_short",
        "tweet_url",
        "duplicate: semantic",
    ];
    assert_eq!(names, expected);
    // Won by lora, ties that flipped, of identical replies, no verdict, won by base.
    let judged = [
        (BLUE, 5.0),
        ("#5F5F5F", 2.0),
        ("#C4C4C4", 1.0),
        ("#EAF2F8", 1.0),
        (ORANGE, 3.0),
    ];
    assert_eq!(bars(chart(&html, "Outcomes by j")), with(&judged));
    says(
        &text(all(html.root_element(), "#judge")[0]),
        &[
            "lora won 5",
            "tie, the two orders disagree 2",
            "tie, identical replies 1",
            "no verdict 1",
            "base won 3",
        ],
    );
    // No colour of the light page is left as it is on the dark one.
    let style = text(all(html.root_element(), "style")[0]);
    for part in all(html.root_element(), "svg *") {
        for name in ["fill", "stroke"] {
            let color = part.attr(name).filter(|color| color.starts_with('#'));
            let dark = color.is_none_or(|color| style.contains(&format!("[{name}=\"{color}\"]")));
            assert!(dark, "{name} {color:?}");
        }
    }
    // Of lora's lengths 1, 2 ×5, 4 ×5, 6 the quarters are 2, 3 and 4.
    let svg = chart(&html, "Lengths of the replies");
    let (x, unit) = axis(svg, "x", |_| true);
    let boxes = all(svg, &format!("rect[fill='{PALE}']"));
    let medians = all(svg, &format!("polyline[stroke='{BLUE}']"));
    let lora = boxes[1];
    near(x(number(&lora, "x")), 2.0, unit);
    near(x(number(&lora, "x") + number(&lora, "width")), 4.0, unit);
    let median = medians[1]
        .attr("points")
        .unwrap()
        .split_once(',')
        .unwrap()
        .0;
    near(x(median.parse().unwrap()), 3.0, unit);
}

#[test]
fn every_comparison_of_a_judge_is_told() {
    let tool = tool();
    lay_out(&tool);
    let row = r#"{"v":1,"id":"x","systems":{"base":{"prediction":"a"},"lora":{"prediction":"a b"},"prompted":{"prediction":"a"}},"verdicts":{"judge":"j","winner":"lora","comparisons":[{"a":"base","b":"lora","winner":"lora","flipped":false},{"a":"prompted","b":"lora","winner":"tie","flipped":true}]}}"#;
    tool.file("output/eval/r/judged.jsonl", &format!("{row}\n").repeat(3));
    says(
        &flowing(&tool),
        &[
            "Judge j, lora against base: lora 3 The longer reply (in words) won 3 of 3.",
            "j, lora against prompted: tie 3 Of 3 ties, 3 flipped",
        ],
    );
    let html = page(&tool);
    says(
        chart(&html, "Outcomes by j").attr("aria-label").unwrap(),
        &["lora against base: lora won 3. lora against prompted: tie, the two orders disagree 3."],
    );
}

/// Both ends of a comparison, and rows that nobody chose.
#[test]
fn rows_are_drawn_by_chance_and_the_ends_are_told_apart() {
    let tool = tool();
    lay_out(&tool);
    tested_between(
        &tool,
        "systems",
        "lora",
        &[("nll", "permutation", r#""n":40,"p_holm":0.5"#)],
    );
    // What lora brought to row i is i - 20 hundredths: row 0 is the best.
    let rows: Vec<(f64, f64)> = (0..40)
        .map(|at| (2.0, 2.0 + f64::from(at - 20) / 100.0))
        .collect();
    judged(&tool, &rows);
    let shown = |seed: &str| -> Vec<String> {
        let run = ["--run", "r", "--data", "d", "--html", "-", "--seed", seed];
        let html = Html::parse_document(&tool.run(&run, "").exits(0).stdout);
        let names = all(html.root_element(), "article h4 bdi");
        names.into_iter().map(text).collect()
    };
    let first = shown("1");
    assert_eq!(first.len(), 8 + 3 + 3);
    assert_eq!(
        first[8..],
        ["row 0", "row 1", "row 2", "row 39", "row 38", "row 37"]
    );
    assert_eq!(first, shown("1"));
    // That two seeds draw the same 8 of 40 rows happens once in 77 million.
    assert_ne!(first[..8], shown("2")[..8]);
    // Each row about as often as another: of 200 draws a fifth, give or take 5 deviations.
    let mut drawn: BTreeMap<String, u32> = BTreeMap::new();
    for seed in 0..200 {
        for name in &shown(&seed.to_string())[..8] {
            *drawn.entry(name.clone()).or_default() += 1;
        }
    }
    assert_eq!(drawn.len(), 40);
    let deviation = (200.0_f64 * 0.2 * 0.8).sqrt();
    for (name, times) in drawn {
        assert!(
            (f64::from(times) - 40.0).abs() < 5.0 * deviation,
            "{name}: {times}"
        );
    }
    let html = page(&tool);
    let card = all(html.root_element(), "article")[8];
    let parts: Vec<String> = all(card, "blockquote, .replies section")
        .into_iter()
        .map(text)
        .collect();
    assert_eq!(
        parts,
        [
            "tweet 0",
            "liked replyliked 0",
            "baseof base 0 nll2.000",
            "loraof lora 0 nll1.800"
        ]
    );
}

/// What strangers wrote, as tweets, replies, names, reasons: none of it is more than text.
const HOSTILE: [&str; 12] = [
    "<script>document.title='ran'</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "</title></style></svg><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "<iframe src='https://example.invalid'></iframe><base href='https://example.invalid'>",
    "&lt;b&gt; &#x3c; ]]> <!-- -->",
    "\u{202e}gnp.exe \u{2066}isolated\u{2069} \u{200f}",
    "zero\u{200b}width \u{feff} \u{ad} \u{2060} \u{3164}",
    "tags \u{e0041}\u{e0042} selectors \u{fe00}\u{e0101} \u{fe0f}\u{fe0f} joiners \u{200d}\u{200d}",
    "\u{1}\u{1b}[31m\u{7f}\u{85}\u{2028}",
    "javascript:alert(1) https://example.invalid/x.png",
];

/// A run all of whose texts and names are hostile.
fn lay_out_hostile(tool: &Tool) {
    lay_out(tool);
    let json = |text: &str| serde_json::to_string(text).unwrap();
    let systems = ["base", HOSTILE[1], HOSTILE[7]];
    let mut rows = String::new();
    for (at, tweet) in HOSTILE.iter().enumerate() {
        let text = |more: usize| json(HOSTILE[(at + more) % HOSTILE.len()]);
        let reply = |more: usize| {
            format!(
                r#"{{"prediction":{},"nll":{at}.5,"finish":"length",{}:1.5}}"#,
                text(more),
                json(HOSTILE[3])
            )
        };
        let [a, b, c] = systems.map(json);
        rows += &format!(
            r#"{{"v":1,"id":"row {at} <b>","tweet":{},"reference":{},"systems":{{{a}:{},{b}:{},{c}:{}}},"verdicts":{{"judge":{},"winner":{b},"signature":{},"comparisons":[{{"a":{a},"b":{b},"winner":{b},"flipped":false,"because":{},"orders":[{{"first":{a},"preferred":{b},"why":{}}}]}}]}}}}"#,
            json(tweet),
            text(1),
            reply(2),
            reply(3),
            reply(4),
            json(HOSTILE[0]),
            json(HOSTILE[5]),
            json(HOSTILE[2]),
            text(5),
        );
        rows += "\n";
    }
    tool.file("output/eval/r/judged.jsonl", &rows);
    let mut tests = String::new();
    for b in &systems[1..] {
        for metric in ["nll", HOSTILE[3], HOSTILE[8]] {
            tests += &format!(
                r#"{{"v":1,"a":"systems.base","b":{},"metric":{},"test":"permutation","p_holm":0.5,"ci_reason":{},"n":12,"mean_a":1.0,"mean_b":2.0,"signature":{}}}"#,
                json(&format!("systems.{b}")),
                json(metric),
                json(HOSTILE[6]),
                json(HOSTILE[10]),
            );
            tests += "\n";
        }
    }
    tool.file("output/eval/r/tests.jsonl", &tests);
    let reason = format!(
        r#"{{"id":"x","rejected":{{"by":"x","reasons":[{{"filter":{},"detail":""}}]}}}}"#,
        json(HOSTILE[3])
    );
    tool.file("data/processed/d/rejects.jsonl", &format!("{reason}\n"));
}

/// A browser runs and fetches nothing of a page that holds these elements, with these
/// attributes, alone.
#[test]
fn hostile_texts_are_texts() {
    let tool = tool();
    lay_out_hostile(&tool);
    let html = page(&tool);
    let elements = "html head meta title style body header h1 p nav a main section h2 h3 h4 h5 div ul li b figure \
                    figcaption svg rect line polyline circle text span table thead tbody tr th td sub article \
                    blockquote bdi dl dt dd code";
    let attributes = "lang charset name content http-equiv id class href viewBox role aria-label aria-hidden tabindex \
                      scope dir x y x1 y1 x2 y2 cx cy r dx dy width height points transform opacity fill stroke \
                      stroke-width text-anchor font-size";
    let (elements, attributes): (Vec<_>, Vec<_>) = (
        elements.split_whitespace().collect(),
        attributes.split_whitespace().collect(),
    );
    let page = all(html.root_element(), "*");
    for element in &page {
        let tag = element.value().name();
        assert!(elements.contains(&tag), "<{tag}>");
        for (name, value) in element.value().attrs() {
            assert!(attributes.contains(&name), "<{tag} {name}={value:?}>");
            assert!(
                name != "href" || value.starts_with('#'),
                "<{tag} {name}={value:?}>"
            );
        }
    }
    for once in ["title", "style", "meta[http-equiv]"] {
        assert_eq!(all(html.root_element(), once).len(), 1, "{once}");
    }
    let policy = all(
        html.root_element(),
        "meta[http-equiv='Content-Security-Policy']",
    )[0];
    let policy = policy.attr("content").unwrap();
    says(
        policy,
        &[
            "default-src 'none'; style-src 'sha256-",
            "base-uri 'none'; form-action 'none'",
        ],
    );
    assert!(!policy.contains("unsafe"), "{policy}");
    // Of the style that is there: with another's the page would be bare.
    let style = all(html.root_element(), "style")[0]
        .text()
        .collect::<String>();
    let hash = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(style));
    says(policy, &[&format!("'sha256-{hash}'")]);

    // No control, no mark of direction and nothing that hides is anywhere, in no attribute either.
    let raw = fs::read_to_string(tool.path("page.html")).unwrap();
    for c in raw.chars() {
        let hides = matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{e0000}'..='\u{e0fff}');
        assert!(c == '\n' || !(c.is_control() || hides), "{c:?} is there");
    }
    // The texts themselves are whole: each is what was written, with marks for what hides.
    let marks = |text: &str| -> String {
        let mark = |c: char| match (c as u32) < 0x20
            || (0x7f..0xa0).contains(&(c as u32))
            || c == '\u{ad}'
            || c as u32 > 0x2000
        {
            true => format!("U+{:04X}", c as u32),
            false => c.to_string(),
        };
        text.chars().map(mark).collect()
    };
    let texts = all(html.root_element(), "blockquote, .replies p, .why bdi");
    let texts: Vec<String> = (texts.into_iter())
        .map(|text| {
            text.text()
                .collect::<String>()
                .trim_matches('\n')
                .to_owned()
        })
        .collect();
    let written: Vec<String> = HOSTILE.iter().map(|text| marks(text)).collect();
    // Of each card the tweet, the liked reply, three replies and the judge's reason.
    assert_eq!(texts.len(), 6 * (8 + 2 * 6));
    for text in &texts {
        assert!(written.contains(text), "{text:?} was not written");
    }
    for text in &written {
        assert!(texts.contains(text), "{text:?} is not there");
    }
}

#[test]
fn words_of_many_scripts_and_emoji_stay_what_they_are() {
    let tool = tool();
    lay_out(&tool);
    let text = "می\u{200c}خواهم 👨\u{200d}👩\u{200d}👧 ❤\u{fe0f}\u{200d}🔥 1\u{fe0f}\u{20e3} e\u{301} 日本";
    tool.file(
        "output/eval/r/judged.jsonl",
        &format!(
            "{{\"v\":1,\"tweet\":\"{text}\",\"systems\":{{\"base\":{{\"prediction\":\"a\"}}}}}}\n"
        ),
    );
    let html = page(&tool);
    let quote: String = all(html.root_element(), "blockquote")[0].text().collect();
    assert_eq!(quote.trim_matches('\n'), text);
    // Books are cut, and how much is left out is said.
    let long = format!(
        "{{\"v\":1,\"tweet\":\"{}\",\"systems\":{{\"base\":{{\"prediction\":\"a\"}}}}}}\n",
        "é".repeat(2345)
    );
    tool.file("output/eval/r/judged.jsonl", &long);
    let html = page(&tool);
    let quote: String = all(html.root_element(), "blockquote")[0].text().collect();
    assert_eq!(quote.matches('é').count(), 2000);
    says(&quote, &["… and 345 more characters"]);
}

#[test]
fn a_page_of_what_is_there_names_what_is_not() {
    let tool = tool();
    let run = ["--run", "v2", "--data", "main", "--html", "-"];
    let html = tool.run(&run, "").exits(0).stdout;
    let body = text(Html::parse_document(&html).root_element());
    for phase in ["data", "train", "eval"] {
        says(
            &body,
            &[&format!("none yet: make {phase} RUN=v2 DATA=main")],
        );
    }
    assert!(
        !html.contains("aria-label") && !html.contains("NaN"),
        "no chart of nothing"
    );
    tool.file(
        "output/models/v2/metrics.jsonl",
        "{\"step\":1,\"loss\":4.5}\n{\"step\":2,\"lo",
    );
    let html = Html::parse_document(&tool.run(&run, "").exits(0).stdout);
    says(
        &text(html.root_element()),
        &["1 steps in 0 s; unfinished: make train RUN=v2 DATA=main goes on"],
    );
    chart(&html, "Training loss by step: 4.500 at the first");
    // Figures that no axis can show are in the table alone.
    lay_out(&tool);
    let huge = r#""p_holm":0.5,"ci_low":-1e300,"ci_high":1e300,"mean_diff":1e300"#;
    tested(&tool, &[("nll", "permutation", huge)]);
    judged(&tool, &[(1e300, -1e300), (0.0, 0.0)]);
    let html = page(&tool);
    let charts = all(html.root_element(), "#evaluation svg[aria-label]");
    assert_eq!(charts.len(), 0);
    says(&text(html.root_element()), &["-1.00e300 to +1.00e300"]);
}

#[test]
fn the_page_goes_where_it_may() {
    let tool = tool();
    lay_out(&tool);
    let run = |more: &[&str]| tool.run(&[&["--run", "r", "--data", "d"], more].concat(), "");
    // Beside the screen, which says where; folders are made, nothing half is left.
    let screen = run(&["--html", "output/figures/r.html"]).exits(0).stdout;
    says(
        &screen,
        &["\nFiles\n  output/figures/r.html\n      this with charts"],
    );
    let names: Vec<_> = fs::read_dir(tool.path("output/figures"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["r.html"]);
    let first = fs::read(tool.path("output/figures/r.html")).unwrap();
    // The same run is the same page, and one page takes the place of another.
    run(&["--html", "output/figures/r.html", "-j1"]).exits(0);
    assert_eq!(fs::read(tool.path("output/figures/r.html")).unwrap(), first);
    let shown = run(&["--html", "-"]).exits(0);
    assert_eq!(shown.stdout.as_bytes(), first);
    let bare = run(&[]).exits(0).stdout;
    says(
        &bare,
        &["read a few replies: report --run r --data d --html FILE"],
    );
    assert!(!bare.contains("r.html"));
    // What is no page is not overwritten.
    for (path, cause) in [
        ("output/eval/r/tests.jsonl", "holds something else"),
        ("output/figures", "is a folder"),
    ] {
        let before = fs::read(tool.path(path)).ok();
        run(&["--html", path]).exits(2).says(cause);
        assert_eq!(fs::read(tool.path(path)).ok(), before);
    }
    run(&[
        "--html",
        "output/figures/r.html",
        "--log",
        "output/figures/r.html",
    ])
    .exits(2);
    assert_eq!(fs::read(tool.path("output/figures/r.html")).unwrap(), first);
    run(&["--seed", "3"]).exits(2).says("--html");
    run(&["--html", "/dev/full"]).exits(4);
}

#[test]
fn the_page_of_a_large_run_is_small() {
    let tool = tool();
    lay_out(&tool);
    let metrics: String = (1..=10_000)
        .map(|step| format!("{{\"step\":{step},\"loss\":{},\"learning_rate\":{},\"grad_norm\":{},\"tokens\":{step}}}\n", 3.0 + f64::from(step * 7919 % 1000) / 1000.0, 1e-4 / f64::from(step), f64::from(step * 31 % 77)))
        .collect();
    tool.file("output/models/r/metrics.jsonl", &metrics);
    let timing: String = (1..=10_000)
        .map(|step| {
            format!(
                "{{\"step\":{step},\"seconds\":{}}}\n",
                f64::from(step * 13 % 17)
            )
        })
        .collect();
    tool.file("output/models/r/timing.jsonl", &timing);
    let reply = |at: u32| {
        format!(
            r#"{{"prediction":"{}","nll":{},"chrf":{}}}"#,
            "word <&> ".repeat(200),
            f64::from(at * 37 % 101),
            f64::from(at * 91 % 103)
        )
    };
    let rows: String = (0..5_000)
        .map(|at| format!("{{\"v\":1,\"id\":\"{at}\",\"tweet\":\"{}\",\"systems\":{{\"base\":{},\"lora\":{},\"prompted\":{}}}}}\n", "<> ".repeat(90), reply(at), reply(at + 1), reply(at + 2)))
        .collect();
    tool.file("output/eval/r/judged.jsonl", &rows);
    let found = r#""n":5000,"p_holm":0.5,"ci_low":-1.0,"ci_high":2.0"#;
    tested_between(
        &tool,
        "systems",
        "lora",
        &[
            ("nll", "permutation", found),
            ("chrf", "permutation", found),
        ],
    );
    let html = page(&tool);
    let bytes = fs::metadata(tool.path("page.html")).unwrap().len();
    assert!(bytes < 1_000_000, "{bytes} bytes");
    // Drawn with fewer points, the curve still reaches the largest and the least loss.
    let svg = chart(&html, "Training loss");
    let (y, unit) = axis(svg, "y", |_| true);
    let drawn = points(svg, PALE);
    assert!(drawn.len() < 2_000, "{} points", drawn.len());
    let values = || drawn.iter().map(|point| y(point.1));
    near(values().fold(f64::NEG_INFINITY, f64::max), 3.999, unit);
    near(values().fold(f64::INFINITY, f64::min), 3.0, unit);
}
