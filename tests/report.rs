//! report through the real binary, on a run laid out by hand.
#![allow(clippy::unwrap_used)]

use harness::Tool;

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_report"))
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
    let test = |test: &str, rest: &str| {
        format!(
            "{{\"v\":1,\"a\":\"systems.base\",\"b\":\"systems.a_rather_long_name\",\"metric\":\"nll\",\"test\":\"{test}\",\"n\":2,\"mean_a\":4.25,\"mean_b\":2.5,{rest}}}\n"
        )
    };
    tool.file(
        "output/eval/r/tests.jsonl",
        &(test("permutation", "\"p_holm\":0.0123")
            + &test(
                "bootstrap",
                "\"p_holm\":null,\"ci_low\":1.5,\"ci_high\":2.0",
            )),
    );
    tool.file(
        "output/eval/r/judged.jsonl",
        "{\"v\":1,\"id\":\"x\",\"verdicts\":{\"judge\":\"reference-chrf\",\"winner\":\"lora\"}}\n{\"v\":1,\"corpus\":{}}\n",
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
        "reference-chrf: lora 1",
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
    assert!(run.stdout.contains("unfinished"), "{run}");
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
