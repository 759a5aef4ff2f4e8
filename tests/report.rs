//! report through the real binary, on a run laid out by hand.
#![allow(clippy::unwrap_used)]

use std::fs;

use harness::Tool;

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
    assert!(!flowing(&tool).contains(control));
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
