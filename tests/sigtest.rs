//! sigtest through the real binary, against scipy and statsmodels.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::process::Command;

use harness::{Conventions, Run, Tool};
use serde_json::{Value, json};

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_sigtest"))
}

/// Records with two systems of three metrics, and the corpus line.
fn records() -> String {
    let mut text = String::new();
    for i in 0..40 {
        let wave = f64::from(i * 37 % 40) / 40.0;
        let base = json!({ "prediction": "x", "nll": 3.0 + wave, "rouge1": wave, "tokens": 7 });
        let lora =
            json!({ "prediction": "y", "nll": 2.8 + wave * wave, "rouge1": 0.5, "tokens": 7 });
        let item = json!({ "v": 1, "id": i, "conversation_id": i / 3, "split_group": i / 3, "systems": { "base": base, "lora": lora } });
        writeln!(text, "{item}").unwrap();
    }
    text + "{\"v\":1,\"corpus\":{\"systems\":{}}}\n"
}

const PATHS: [&str; 4] = ["--a", "systems.base", "--b", "systems.lora"];

harness::conventions!(|| {
    let conventions = Conventions {
        arguments: PATHS.map(String::from).into(),
        rejects: "--rejects",
        input: records(),
        empty: 3,
        key: "statistics.resamples",
        passes_records: false,
    };
    (tool(), conventions)
});

#[test]
fn the_settings_are_shown_without_a_question() {
    let shown = tool()
        .run(&["--print-config", "--alpha", "0.01"], "")
        .exits(0);
    assert!(shown.stdout.contains("statistics.alpha = 0.01"), "{shown}");
    for given in [&["--a", "x"][..], &["--b", "x"], &[]] {
        tool().run(given, "").exits(2).says("required");
    }
}

/// The layers are in every tool; here they are seen through one.
#[test]
fn wrong_settings_are_told_in_a_line_and_in_words() {
    for (yaml, said) in [
        (
            "statistics: {seed: 1}\nstatistics: {seed: 2}\n",
            "s.yaml:2: statistics: this key is there twice",
        ),
        (
            "statistics: {seed: 1}\n---\nstatistics: {seed: 2}\n",
            "s.yaml:3: a second document begins here",
        ),
        (
            "statistics:\n  alpha: .nan\n",
            "s.yaml:2: statistics.alpha: is \".nan\"; it must be a number",
        ),
        (
            "statistics:\n  seed: many\n",
            "s.yaml:2: statistics.seed: is \"many\"; it must be a whole number",
        ),
    ] {
        let tool = tool();
        tool.file("s.yaml", yaml);
        let told = tool.run(&["--config", "s.yaml", "--print-config"], "");
        let told = told.exits(2).says(said);
        assert_eq!(told.stderr.lines().count(), 1, "{told}");
    }
    let tool = tool();
    tool.run(&["--alpha", "nan", "--print-config"], "")
        .exits(2)
        .says("flag for alpha: NaN and infinity are not a number");
    tool.file("s.yaml", "statistics:\n  # seed: 1\n");
    let shown = tool.run(&["--config", "s.yaml", "--print-config=key"], "");
    let defaults = tool.run(&["--print-config=key"], "");
    assert_eq!(shown.exits(0).stdout, defaults.exits(0).stdout);
    tool.env("PAIRS__STATISTICS__SEED", "")
        .run(&["--print-config"], "")
        .exits(2)
        .says("environment variable PAIRS__STATISTICS__SEED: statistics.seed: is empty");
}

/// util-linux' script gives the tool a terminal; what it types there comes out again.
#[test]
fn a_bar_is_drawn_only_where_no_records_cross_it() {
    let tool = tool();
    tool.file("out.jsonl", &records());
    let on_a_terminal = |stdout: &str| {
        let sigtest = env!("CARGO_BIN_EXE_sigtest");
        let asked = PATHS.join(" ");
        let line = format!("stty cols 80; {sigtest} {asked} < out.jsonl {stdout}");
        let mut script = Command::new("script");
        script
            .args(["-qec", &line, "/dev/null"])
            .current_dir(tool.folder());
        Run::of(&mut script, b"").exits(0)
    };
    let bar = on_a_terminal("> /dev/null").stdout;
    let (drawn, after) = bar.rsplit_once("\x1b[2K").unwrap();
    assert!(drawn.contains("testing [="), "{bar:?}");
    assert!(after.starts_with("sigtest: in 41, out "), "{bar:?}");

    let records = on_a_terminal("").stdout;
    assert!(!records.contains('\x1b'), "{records:?}");
    assert!(records.contains("\"metric\":\"nll\""), "{records:?}");
}

#[test]
fn every_example_of_the_help_runs() {
    let tool = tool();
    tool.file("out.jsonl", &records());
    harness::check_examples(&tool);
}

mod parity {
    use super::*;

    /// Closed forms, relative. The worst of 762 figures is off by 4.2e-11, a normal
    /// tail of Wilcoxon's test (the test prints it); the library's own error function
    /// is the limit there.
    const CLOSED: f64 = 1e-10;
    /// Standard errors within which a Monte-Carlo figure must lie: one check in
    /// 1.7 million fails by chance.
    const SIGMAS: f64 = 5.0;

    fn cases() -> Vec<Value> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/stats/");
        let text = std::fs::read_to_string(format!("{folder}cases.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The tests of a case, by name.
    fn run(case: &Value, alternative: &str) -> impl Fn(&str) -> Value + use<> {
        let mut input = String::new();
        for (i, a) in case["a"].as_array().unwrap().iter().enumerate() {
            let row = json!({ "a": a, "b": case["b"][i], "cluster": case["clusters"][i] });
            writeln!(input, "{row}").unwrap();
        }
        let mut arguments = vec!["--a=a", "--b=b", "--alternative", alternative];
        if case["clusters"].is_array() {
            arguments.push("--cluster=cluster");
        }
        let lines = tool().run(&arguments, &input).exits(0).records();
        let case = format!("{} ({alternative})", case["name"]);
        move |test| {
            let found = lines.iter().find(|line| line["test"] == test);
            found.unwrap_or_else(|| panic!("{case}: no {test}")).clone()
        }
    }

    fn relative(ours: &Value, theirs: &Value, what: &str) -> f64 {
        let (Some(ours), Some(theirs)) = (ours.as_f64(), theirs.as_f64()) else {
            assert_eq!(ours, theirs, "{what}");
            return 0.0;
        };
        let difference = (ours - theirs).abs() / theirs.abs().max(f64::MIN_POSITIVE);
        let difference = if ours == theirs { 0.0 } else { difference };
        assert!(difference <= CLOSED, "{what}: {ours} instead of {theirs}");
        difference
    }

    #[test]
    fn closed_forms_are_scipys_and_statsmodels() {
        let mut worst = (0.0, String::new());
        let mut compared = 0;
        for case in cases().iter().filter(|case| case["name"].is_string()) {
            for (alternative, expected) in case["expected"].as_object().unwrap() {
                let ours = run(case, alternative);
                let mut near = |ours: &Value, theirs: &Value, what: String| {
                    let what = format!("{} ({alternative}): {what}", case["name"]);
                    let difference = relative(ours, theirs, &what);
                    compared += 1;
                    if difference > worst.0 {
                        worst = (difference, what);
                    }
                };
                for test in ["paired_t", "wilcoxon", "sign", "mcnemar"] {
                    let Some(expected) = expected.get(test) else {
                        continue;
                    };
                    let line = ours(test);
                    near(
                        &line["statistic"],
                        &expected["statistic"],
                        format!("{test} statistic"),
                    );
                    near(&line["p"], &expected["p"], format!("{test} p"));
                    if let Some(interval) = expected.get("ci") {
                        near(&line["ci_low"], &interval[0], format!("{test} ci_low"));
                        near(&line["ci_high"], &interval[1], format!("{test} ci_high"));
                    }
                }
                if let Some(exact) = expected["permutation"].get("exact") {
                    near(
                        &ours("permutation")["p"],
                        exact,
                        "exact permutation p".into(),
                    );
                }
                for (effect, size) in case["effects"].as_object().unwrap() {
                    near(&ours("paired_t")[effect], size, effect.clone());
                }
            }
        }
        println!("worst of {compared}: {worst:?}");
        assert!(compared > 600, "only {compared} figures were compared");
    }

    /// Resampled figures differ from seed to seed; how far is in the dump, as the
    /// spread over 40 runs of scipy with as many resamples as ours.
    #[test]
    fn resampled_figures_lie_within_their_own_error() {
        for case in cases().iter().filter(|case| case["name"].is_string()) {
            for (alternative, expected) in case["expected"].as_object().unwrap() {
                let ours = run(case, alternative);
                let near = |ours: f64, theirs: &Value, end: usize, least_error: f64, what: &str| {
                    let (mean, sd) = (
                        theirs["mean"][end].as_f64().unwrap(),
                        theirs["sd"][end].as_f64().unwrap(),
                    );
                    let error = (sd * (1.0 + 1.0 / 40.0_f64).sqrt()).max(least_error);
                    assert!(
                        (ours - mean).abs() <= SIGMAS * error,
                        "{} ({alternative}): {what} {ours}, expected {mean} ± {error}",
                        case["name"]
                    );
                };
                if expected["permutation"].get("mean").is_some() {
                    let p = ours("permutation")["p"].as_f64().unwrap();
                    // Of a p near 0 or 1 forty runs may all be the same.
                    near(p, &expected["permutation"], 0, 1e-4, "permutation p");
                }
                let Some(bootstrap) = expected.get("bootstrap") else {
                    continue;
                };
                let line = ours("bootstrap");
                if line["n"].as_u64() < Some(10) {
                    assert!(line["ci_low"].is_null() && line["reason"].is_string());
                    continue;
                }
                let ends = [&line["ci_low"], &line["ci_high"]];
                let ends: Vec<f64> = ends.into_iter().filter_map(Value::as_f64).collect();
                assert_eq!(ends.len(), bootstrap["mean"].as_array().unwrap().len());
                for (i, end) in ends.into_iter().enumerate() {
                    near(end, bootstrap, i, 0.0, "bootstrap end");
                }
            }
        }
    }

    #[test]
    fn each_test_is_a_family_over_the_metrics() {
        let cases = cases();
        let case = cases.last().unwrap();
        let metrics = case["family"].as_object().unwrap();
        let mut input = String::new();
        for row in 0..25 {
            let side = |i: usize| -> Value {
                metrics
                    .iter()
                    .map(|(name, pair)| (name.clone(), pair[i][row].clone()))
                    .collect()
            };
            writeln!(input, "{}", json!({ "a": side(0), "b": side(1) })).unwrap();
        }
        let lines = tool().run(&["--a=a", "--b=b"], &input).exits(0).records();
        for (test, adjusted) in case["holm"].as_object().unwrap() {
            let ours: Vec<_> = lines.iter().filter(|line| line["test"] == *test).collect();
            assert_eq!(ours.len(), metrics.len());
            for (line, expected) in ours.iter().zip(adjusted.as_array().unwrap()) {
                relative(
                    &line["p_holm"],
                    expected,
                    &format!("{test} of {}", line["metric"]),
                );
            }
        }
    }
}

/// Under "no difference" a p-value below 0.05 comes up in about one sample of twenty.
#[test]
fn a_true_null_is_rejected_as_often_as_alpha_says() {
    // 200 metrics of 24 rows; a multiplicative generator is random enough for this.
    let (metrics, rows) = (200, 24);
    let mut state = 20_261_123_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1_u64 << 31) as f64
    };
    let mut input = String::new();
    for _ in 0..rows {
        let mut side = || -> Value {
            (0..metrics)
                .map(|m| (format!("m{m}"), json!(random())))
                .collect()
        };
        let (a, b) = (side(), side());
        writeln!(input, "{}", json!({ "a": a, "b": b })).unwrap();
    }
    let lines = tool()
        .run(&["--a=a", "--b=b", "--resamples=2000"], &input)
        .exits(0)
        .records();
    for test in ["paired_t", "wilcoxon", "permutation"] {
        let p: Vec<f64> = lines
            .iter()
            .filter(|l| l["test"] == test)
            .map(|l| l["p"].as_f64().unwrap())
            .collect();
        assert_eq!(p.len(), metrics);
        // Binomial(200, 0.05): 10 ± 3.1; outside of 1 to 22 once in ten thousand.
        let rejected = p.iter().filter(|&&p| p < 0.05).count();
        assert!(
            (1..=22).contains(&rejected),
            "{test} rejects {rejected} of {metrics}"
        );
    }
    // The permutation test's own interval misses zero just where it rejects.
    for line in lines.iter().filter(|l| l["test"] == "permutation") {
        let [low, high, p] = ["ci_low", "ci_high", "p"].map(|key| line[key].as_f64().unwrap());
        assert_eq!(low > 0.0 || high < 0.0, p < 0.05, "{line}");
    }
    // The bootstrap's misses the true difference, zero, as often.
    let missed = lines
        .iter()
        .filter(|l| l["test"] == "bootstrap")
        .filter(|l| l["ci_low"].as_f64().unwrap() > 0.0 || l["ci_high"].as_f64().unwrap() < 0.0);
    let missed = missed.count();
    assert!(
        (1..=28).contains(&missed),
        "the bootstrap interval misses {missed} of {metrics}"
    );
}

/// The interval is that of the differences which the test does not reject: a hair inside its
/// ends p is not below alpha, a hair outside it is. Whole numbers would let sums be equal,
/// where a hair decides more than it should.
#[test]
fn the_interval_of_the_permutation_test_is_the_test_turned_round() {
    let wave = |i: u32, step: f64| (f64::from(i) * step).sin();
    let rows = |count: u32, theta: f64| -> String {
        (0..count)
            .map(|i| {
                let (a, b) = (wave(i, 1.7) + 0.3 + 0.1 * wave(i, 0.9).exp(), wave(i, 0.61));
                // Clusters of one row, two, three, …
                let cluster = (0..).find(|k| k * (k + 1) / 2 > i).unwrap();
                format!(
                    "{}\n",
                    json!({ "a": a - theta, "b": b, "cluster": cluster })
                )
            })
            .collect()
    };
    let permutation = |input: &str, more: &[&str]| {
        let arguments = [
            &["--a=a", "--b=b", "--resamples=2000", "--alpha=0.1"][..],
            more,
        ]
        .concat();
        let lines = tool().run(&arguments, input).exits(0).records();
        lines
            .into_iter()
            .find(|l| l["test"] == "permutation")
            .unwrap()
    };
    let p = |line: &Value| line["p"].as_f64().unwrap();
    // Exact and not; rows and clusters.
    for (count, method) in [(10, "exact"), (60, "monte-carlo")] {
        for more in [&[][..], &["--cluster=cluster"]] {
            for (alternative, ends) in [
                ("two-sided", &[("ci_low", -1.0), ("ci_high", 1.0)][..]),
                ("greater", &[("ci_low", -1.0)]),
                ("less", &[("ci_high", 1.0)]),
            ] {
                if count == 10 && !more.is_empty() {
                    continue; // four clusters
                }
                let more = [more, &["--alternative", alternative]].concat();
                let line = permutation(&rows(count, 0.0), &more);
                if more[0] != "--cluster=cluster" {
                    assert_eq!(line["method"], method);
                }
                assert_eq!(line["ci_of"], "mean_diff");
                for &(end, outwards) in ends {
                    let at = line[end].as_f64().unwrap();
                    let beside =
                        |hair: f64| p(&permutation(&rows(count, at + hair * outwards), &more));
                    assert!(beside(1e-7) < 0.1, "{count} {more:?} outside {end} {at}");
                    assert!(beside(-1e-7) >= 0.1, "{count} {more:?} inside {end} {at}");
                }
            }
        }
    }
    // Of 1 to 6 the mean of a part can be 6, in two of 64 patterns, and never more; with all
    // signs alike, in two others, no difference is too large. 5% of 64 are 3.2.
    let whole = |count: u32| -> String {
        (1..=count)
            .map(|i| format!("{}\n", json!({ "a": i, "b": 0 })))
            .collect()
    };
    let of = |count: u32| {
        let run = tool().run(&["--a=a", "--b=b"], &whole(count)).exits(0);
        run.records()
            .into_iter()
            .find(|l| l["test"] == "permutation")
            .unwrap()
    };
    let six = of(6);
    assert_eq!(
        (&six["ci_low"], &six["ci_high"]),
        (&json!(1.0), &json!(6.0))
    );
    // A p of alpha itself is not below it, and its interval does not leave zero out.
    let run = tool()
        .run(&["--a=a", "--b=b", "--alpha=0.03125"], &whole(6))
        .exits(0);
    let line = run
        .records()
        .into_iter()
        .find(|l| l["test"] == "permutation")
        .unwrap();
    assert_eq!(
        (&line["p"], &line["ci_low"]),
        (&json!(2.0 / 64.0), &json!(null))
    );
    // Of five the least p is 2/32.
    let five = of(5);
    assert_eq!(five["p"], json!(2.0 / 32.0));
    assert_eq!(
        (&five["ci_low"], &five["ci_high"]),
        (&json!(null), &json!(null))
    );
    assert!(
        five["ci_reason"]
            .as_str()
            .unwrap()
            .contains("no p-value can be below")
    );
}

/// Who is left out need not be like the others: a refusing judge can flatter a side.
#[test]
fn what_lacks_a_figure_is_counted_and_no_gate_goes_by_the_rest() {
    let input = |without: u32| -> String {
        (0..100)
            .map(|i| match i < without {
                true => format!("{}\n", json!({ "id": i, "verdicts": { "judge": "j|1" } })),
                false => {
                    let score = json!({ "a": f64::from(i % 3 == 0), "b": f64::from(i % 3 != 0) });
                    format!(
                        "{}\n",
                        json!({ "id": i, "verdicts": { "judge": "j|1", "score": score } })
                    )
                }
            })
            .collect()
    };
    let paths = ["--a=verdicts.score.a", "--b=verdicts.score.b"];
    let with = |without, more: &[&str]| tool().run(&[&paths[..], more].concat(), &input(without));
    for line in with(45, &[]).exits(0).records() {
        let counts = ["n", "unpaired", "missing"].map(|key| line[key].as_u64().unwrap());
        assert_eq!(counts, [55, 0, 45]);
        assert!(
            line["signature"].as_str().unwrap().contains("|judge:j/1|"),
            "{line}"
        );
    }
    let table = with(45, &["--table"]).exits(0).stdout;
    assert!(table.contains("45 of 100 rows are without it"), "{table}");
    with(5, &["--exit-status=b"]).exits(0);
    with(6, &["--exit-status=b"])
        .exits(1)
        .says("6 of 100 rows lack `verdicts.score`");
    with(0, &["--exit-status=a"])
        .exits(1)
        .says("`verdicts.score` of a is significantly worse");
}

/// Every line has each key, and null with a reason rather than a number that means nothing.
#[test]
fn what_cannot_be_tested_says_why() {
    let of = |rows: &[(Value, Value)], more: &[&str]| {
        let input: String = rows
            .iter()
            .map(|(a, b)| format!("{}\n", json!({ "a": a, "b": b, "c": 1 })))
            .collect();
        let mut arguments = vec!["--a=a", "--b=b"];
        arguments.extend(more);
        let lines = tool()
            .run(&arguments, &input)
            .exits(0)
            .never_says("NaN")
            .records();
        for line in &lines {
            for key in [
                "statistic",
                "p",
                "p_holm",
                "ci_low",
                "ci_high",
                "n",
                "mean_a",
                "d_z",
                "signature",
            ] {
                assert!(line.get(key).is_some(), "{key} is missing in {line}");
            }
        }
        lines
    };
    let reason = |lines: &[Value], test: &str| {
        let line = lines.iter().find(|line| line["test"] == test).unwrap();
        assert!(line["p"].is_null() && line["p_holm"].is_null(), "{line}");
        line["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        reason(&of(&[(json!(1), json!(2))], &[]), "paired_t"),
        "fewer than 2 rows"
    );
    let equal = vec![(json!(0.25), json!(0.25)); 5];
    for test in ["paired_t", "wilcoxon", "permutation", "bootstrap", "sign"] {
        assert_eq!(reason(&of(&equal, &[]), test), "every difference is zero");
    }
    // In binary the differences of 0.1 vary in their last place; that is no variance.
    let constant: Vec<_> = (0..6)
        .map(|i| (json!(f64::from(i) / 10.0 + 0.1), json!(f64::from(i) / 10.0)))
        .collect();
    let lines = of(&constant, &[]);
    assert_eq!(reason(&lines, "paired_t"), "the differences do not vary");
    let p = lines
        .iter()
        .find(|line| line["test"] == "permutation")
        .unwrap()["p"]
        .as_f64()
        .unwrap();
    assert_eq!(p, 2.0 / 64.0, "all signs alike: 2 of 2^6 patterns");
    let lines = of(
        &[(json!(1), json!(2)), (json!(3), json!(1))],
        &["--cluster=c"],
    );
    assert_eq!(reason(&lines, "paired_t"), "fewer than 2 clusters");
    let permutation = lines
        .iter()
        .find(|line| line["test"] == "permutation")
        .unwrap();
    assert_eq!(permutation["ci_reason"], "fewer than 2 clusters");
    assert!(reason(&lines, "wilcoxon").contains("--cluster"));
}

/// What is found does not depend on the unit that the figures are in: to the last bit where
/// that is a power of two. Squares of the largest here are infinite, of the smallest zero.
#[test]
fn the_size_of_the_figures_changes_no_finding() {
    let of = |unit: f64| {
        let row = |i: u32| {
            let wave = f64::from(i * 7 % 12) / 12.0;
            let (a, b) = (wave + 0.3, wave * wave + f64::from(i % 3) / 8.0);
            format!("{}\n", json!({ "a": a * unit, "b": b * unit }))
        };
        let input: String = (0..24).map(row).collect();
        let mut lines = tool().run(&["--a=a", "--b=b"], &input).exits(0).records();
        for line in &mut lines {
            let carrying: &[&str] = match line["test"].as_str() {
                Some("permutation" | "bootstrap") => &["statistic", "ci_low", "ci_high"],
                Some("paired_t") => &["ci_low", "ci_high"],
                _ => &[],
            };
            for key in [carrying, &["mean_a", "mean_b", "mean_diff"]].concat() {
                if let Some(figure) = line[key].as_f64() {
                    line[key] = json!(figure / unit);
                }
            }
            assert!(line["p"].is_number() || line["test"] == "bootstrap");
            line.as_object_mut().unwrap().remove("signature");
        }
        lines
    };
    let usual = of(1.0);
    for exponent in [-900, -500, 500, 515, 900, 1020] {
        assert_eq!(of(2.0_f64.powi(exponent)), usual, "2^{exponent}");
    }
    // 0 and 2 are no yes and no.
    let two = tool().run(
        &["--a=a", "--b=b"],
        &"{\"a\":2,\"b\":0}\n{\"a\":0,\"b\":0}\n".repeat(3),
    );
    two.exits(0).never_says("mcnemar");
}

#[test]
fn a_difference_that_is_no_number_is_refused_by_line() {
    let tool = tool();
    let far = "{\"a\":1e308,\"b\":-1e308}\n";
    tool.run(&["--a=a", "--b=b"], &far.repeat(2))
        .exits(3)
        .says("-:1: key `a`: 1e308, less -1e308 at --b b, is beyond what a number can hold");
    let rows: String = [(1.0, 2.0), (-1e308, 1e308)]
        .map(|(a, b)| {
            format!(
                "{}\n",
                json!({"s": {"x": {"n": a, "m": 1}, "y": {"n": b, "m": 2}}})
            )
        })
        .concat();
    let paths = ["--a=s.x", "--b=s.y"];
    tool.run(&paths, &rows)
        .exits(3)
        .says("-:2: key `s.x.n`: -1e308, less 1e308 at --b s.y,");
    tool.run(&[&paths[..], &["--metrics=m"]].concat(), &rows)
        .exits(0);
    tool.run(&["--a=a", "--b=b"], "{\"a\":1e400,\"b\":1}\n")
        .exits(3)
        .says("-:1: ");
}

#[test]
fn a_row_that_comes_again_is_refused() {
    let tool = tool();
    let once = records();
    let twice = once.repeat(2);
    tool.run(&PATHS, &twice)
        .exits(3)
        .says("-:42: key `id`: 0 is on line 1 too")
        .says("leave one out, or, where several rows of one id are meant, add --cluster id");
    tool.run(
        &[&PATHS[..], &["--cluster=conversation_id"]].concat(),
        &twice,
    )
    .exits(3)
    .says("-:42: key `id`");
    // Meant so, the second time adds nothing to what is known.
    let clustered = |input: &str| {
        let run = tool.run(&[&PATHS[..], &["--cluster=id"]].concat(), input);
        let lines = run.exits(0).records();
        let line = |l: &&Value| l["test"] == "paired_t" && l["metric"] == "nll";
        lines.iter().find(line).unwrap().clone()
    };
    let (one, two) = (clustered(&once), clustered(&twice));
    assert_eq!((&one["n"], &two["n"]), (&json!(40), &json!(80)));
    assert_eq!(
        (&one["clusters"], &two["clusters"]),
        (&json!(40), &json!(40))
    );
    let p = |line: &Value| line["p"].as_f64().unwrap();
    assert!((p(&one) / p(&two) - 1.0).abs() < 1e-12, "{one}\n{two}");
    // Rows need no id, and null is none.
    for id in ["", "\"id\":null,"] {
        let row = format!("{{{id}\"a\":1,\"b\":2}}\n{{{id}\"a\":3,\"b\":2}}\n");
        tool.run(&["--a=a", "--b=b"], &row).exits(0);
    }
}

#[test]
fn rows_with_one_side_only_are_counted() {
    let rows = [
        json!({ "a": { "x": 1, "y": 1, "w": null }, "b": { "x": 2, "y": 3, "z": null } }),
        json!({ "a": { "x": 2 }, "b": { "x": 2.5, "y": 4 } }),
        json!({ "a": { "x": 4, "y": true }, "b": { "x": 3, "y": 0, "z": 1 } }),
        json!({ "a": { "x": 4, "t": "text" }, "b": { "x": 3 } }),
    ];
    let input: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let run = tool()
        .run(&["--a=a", "--b=b"], &input)
        .exits(0)
        .says("`y` is on one side only in 1 of 4 rows")
        .says("`w` is null, so not measured, in 1 of 4 rows")
        .says("`z` is null");
    let counts: Vec<_> = run
        .records()
        .iter()
        .filter(|line| line["test"] == "sign")
        .map(|line| {
            (
                line["metric"].clone(),
                line["n"].clone(),
                line["unpaired"].clone(),
            )
        })
        .collect();
    assert_eq!(
        counts,
        [
            (json!("x"), json!(4), json!(0)),
            (json!("y"), json!(2), json!(1))
        ]
    );
}

#[test]
fn wrong_paths_and_flags_are_named() {
    let tool = tool();
    let input = records();
    tool.run(&["--a=systems.base", "--b=systems.other"], &input)
        .exits(3)
        .says("--b systems.other");
    tool.run(
        &[
            "--a=systems.base",
            "--b=systems.lora",
            "--metrics=nll,rouge9",
        ],
        &input,
    )
    .exits(3)
    .says("--metrics rouge9")
    .says("nll, rouge1, tokens");
    tool.run(
        &["--a=systems.base.nll", "--b=id", "--cluster=nowhere"],
        &input,
    )
    .exits(3)
    .says("-:1: ")
    .says("nowhere");
    for (flag, said) in [
        (
            "--alpha=1",
            "flag for alpha: statistics.alpha is 1; it must lie between 0 and 1",
        ),
        (
            "--resamples=5",
            "flag for resamples: statistics.resamples is 5; from 100",
        ),
        ("--max-bad-lines=1", "--rejects"),
    ] {
        tool.run(&[&PATHS[..], &[flag]].concat(), &input)
            .exits(2)
            .says(said);
    }
}

#[test]
fn a_figure_out_of_range_names_its_line() {
    let tool = tool();
    tool.file("s.yaml", "statistics:\n  seed: 1\n  alpha: 2\n");
    tool.run(&[&PATHS[..], &["--config=s.yaml"]].concat(), &records())
        .exits(2)
        .says("s.yaml:3: statistics.alpha is 2; it must lie between 0 and 1");
}

/// nll is lower, so better, at lora; rouge1 there is as often above as below.
#[test]
fn the_gate_is_opt_in_and_has_a_side() {
    let tool = tool();
    let paths = ["--a=systems.base.nll", "--b=systems.lora.nll"];
    let with = |more: &[&str]| tool.run(&[&paths[..], more].concat(), &records());
    with(&["--exit-status=b"]).exits(0);
    with(&["--exit-status=a"])
        .exits(1)
        .says("`nll` of a is significantly worse");
    with(&["--alternative=greater", "--exit-status=b"]).exits(0);
    with(&["--alternative=less", "--exit-status=b"])
        .exits(1)
        .says("no metric's adjusted permutation test finds b better");
    with(&["--alternative=less"]).exits(0);
    with(&["--exit-status"]).exits(2).says("SIDE");
    // What is better where it is higher, and the figure that lies below it by its name.
    let swapped = records().replace("\"nll\"", "\"chrf\"");
    let paths = ["--a=systems.base.chrf", "--b=systems.lora.chrf"];
    let gate = |side| tool.run(&[&paths[..], &[side]].concat(), &swapped);
    gate("--exit-status=a").exits(0);
    gate("--exit-status=b").exits(1);
    // One side is not asked of figures that are better in opposite directions.
    tool.run(
        &[&PATHS[..], &["--alternative=greater"]].concat(),
        &records(),
    )
    .exits(2)
    .says("`nll`, of which less is better")
    .says("--metrics");
    let one = ["--alternative=greater", "--metrics=nll"];
    tool.run(&[&PATHS[..], &one].concat(), &records()).exits(0);
}

#[test]
fn another_seed_draws_others_and_the_signature_says_so() {
    let of = |seed: &str| {
        let lines = tool()
            .run(
                &[&PATHS[..], &["--seed", seed, "--metrics=nll"]].concat(),
                &records(),
            )
            .exits(0)
            .records();
        let line = lines
            .into_iter()
            .find(|line| line["test"] == "bootstrap")
            .unwrap();
        (
            line["ci_low"].as_f64().unwrap(),
            line["signature"].as_str().unwrap().to_owned(),
        )
    };
    let ((low_0, signature_0), (low_1, signature_1)) = (of("0"), of("1"));
    assert_ne!(low_0, low_1);
    assert!(signature_0.contains("|seed:0|") && signature_1.contains("|seed:1|"));
}

#[test]
fn the_table_fits_a_terminal() {
    let run = tool()
        .run(&[&PATHS[..], &["--table"]].concat(), &records())
        .exits(0);
    assert!(
        run.stdout.lines().all(|line| line.chars().count() <= 80),
        "{run}"
    );
    for text in ["nll", "rouge1", "every difference is zero", "95% interval"] {
        assert!(run.stdout.contains(text), "{text}\n{run}");
    }
    let named = records().replace("rouge1", "\\u001b[2Jr\\n1");
    let run = tool()
        .run(&[&PATHS[..], &["--table"]].concat(), &named)
        .exits(0);
    assert!(run.stdout.contains("\u{fffd}[2Jr\u{fffd}1"), "{run}");
    assert!(!run.stdout.contains('\u{1b}'), "{run}");
}

/// gen-eval and judge write null where there is no figure; a metric must not be gone
/// without a word.
#[test]
fn what_was_not_measured_is_counted() {
    let row = |i: u32, base: Value| json!({"s": {"base": {"nll": base, "x": i}, "lora": {"nll": 2, "x": i * i}}});
    let input = |from: u32| -> String {
        (0..9)
            .map(|i| match i < from {
                true => format!("{}\n", row(i, json!(null))),
                false => format!("{}\n", row(i, json!(1))),
            })
            .collect()
    };
    let paths = ["--a=s.base", "--b=s.lora", "--table"];
    let some = tool().run(&paths, &input(4)).exits(0);
    let some = some.says("`nll` is null, so not measured, in 4 of 9 rows");
    assert!(some.stdout.contains("\nnll "), "{some}");
    some.never_says("on one side only");
    let none = tool().run(&paths, &input(9)).exits(0);
    let none = none.says("`nll` is null, so not measured, in 9 of 9 rows");
    assert!(!none.stdout.contains("\nnll "), "{none}");
    // A path to the figure itself.
    let paths = ["--a=s.base.nll", "--b=s.lora.nll"];
    tool()
        .run(&paths, &input(4))
        .exits(0)
        .says("`nll` is null, so not measured, in 4 of 9 rows");
    tool()
        .run(&paths, &input(9))
        .exits(3)
        .says("`nll` is null, so not measured, in 9 of 9 rows")
        .says("none of 9 records has a number at --a");
    tool()
        .run(&["--a=s.base", "--b=s.lora", "--metrics=x"], &input(4))
        .exits(0)
        .never_says("is null");
}
