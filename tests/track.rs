//! track through its binary: TensorBoard's files against those of its own writer, MLflow as a
//! recorded server, W&B as its own client was recorded to talk to it, and servers that fail.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use harness::server::{Reply, Request, Server};
use harness::{Conventions, Run, Tool, behind, check_examples};
use serde_json::{Value, json};

const KEY: &str = "wandb-0123456789abcdef0123456789abcdef01";
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/track");

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_track"))
}

fn fixture(name: &str) -> String {
    let path = format!("{FIXTURES}/{name}");
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Lines as qlora-train prints them: an evaluation, then updates.
fn lines(steps: std::ops::RangeInclusive<u64>) -> String {
    let step = |step: u64| {
        let loss = 2.0 + 1.0 / (step + 1) as f64;
        json!({"step": step, "epoch": step as f64 / 8.0, "loss": loss, "learning_rate": 1e-4, "tokens": 800 + step})
    };
    let lines = steps.map(|at| format!("{}\n", step(at)));
    lines.collect()
}

mod conventions {
    use super::*;
    // All but `bad_key`: there are no settings.
    harness::conventions!(@each || {
        let conventions = Conventions {
            arguments: vec!["--to".into(), "tensorboard=runs".into()],
            rejects: "--rejects",
            input: lines(1..=900),
            empty: 0,
            key: "",
            passes_records: true,
        };
        (tool(), conventions)
    }; reader_gone disk_full bad_line files_apart others_files unknown_field empty_input same_bytes help);
}

#[test]
fn examples_of_the_help_run() {
    let tool = tool();
    tool.file("metrics.jsonl", &lines(1..=3));
    tool.file("train.yaml", "lora: {rank: 8}\n");
    check_examples(&tool);
}

#[test]
fn lines_pass_as_they_are() {
    let odd = "{\"step\":1,\"loss\":1.50,\"note\":\"\\u00e9\",\"x\":{ \"a\" : [1 ,2]},\"big\":12345678901234567890123}\n";
    let run = tool().run(&["--to", "tensorboard=runs"], odd).exits(0);
    assert_eq!(run.stdout, odd);
    run.says("in 1, out 1, rejected 0");
}

#[test]
fn wrong_use_is_told_before_anything_is_read() {
    let tool = tool();
    for (arguments, said) in [
        (&["--to", "tensorboard"][..], "name its folder"),
        (&["--to", "tensorboard="], "name its folder"),
        (&["--to", "comet=x"], "there are tensorboard=DIR"),
        (&["--to", "mlflow"], "MLFLOW_TRACKING_URI"),
        (&["--to", "mlflow=mlruns"], "is no http"),
        (
            &["--to", "mlflow=http://127.0.0.1:1"],
            "--state DIR is needed",
        ),
        (
            &["--to", "mlflow=http://me:pw@127.0.0.1:1", "--state", "s"],
            "MLFLOW_TRACKING_PASSWORD",
        ),
        (
            &["--to", "mlflow=ftp://me:pw@127.0.0.1:1", "--state", "s"],
            "is no http",
        ),
        (
            &["--to", "mlflow=http://127.0.0.1:1?token=x", "--state", "s"],
            "has a `?`",
        ),
        (
            &["--to", "mlflow=http:///me:pw@127.0.0.1:1", "--state", "s"],
            "MLFLOW_TRACKING_PASSWORD",
        ),
        (&["--to", "wandb"], "WANDB_PROJECT"),
        (&["--to", "wandb=me/a/b"], "no name of an entity or project"),
        (&["--to", "wandb=me/tweets"], "WANDB_API_KEY is not set"),
        (
            &["--to", "tensorboard=r", "--experiment", "x"],
            "--experiment is for --to mlflow",
        ),
        (
            &["--to", "tensorboard=r", "--name", "x"],
            "--name is for --to mlflow or wandb",
        ),
        (
            &["--to", "tensorboard=r", "--every", "1"],
            "--every is for --to mlflow or wandb",
        ),
        (
            &["--to", "tensorboard=r", "--send-key-to", "x"],
            "--send-key-to is for --to mlflow or wandb",
        ),
        (&["--to", "tensorboard=r", "--every", "9999"], "0 to 3600"),
        (
            &["--to", "tensorboard=r", "--config", "x.yaml"],
            "--settings names the run's",
        ),
        (
            &["--to", "tensorboard=r", "--settings", "none.json"],
            "none.json",
        ),
        (
            &["--to", "tensorboard=r", "--settings", "list.json"],
            "holds no keys",
        ),
        (
            &["--to", "tensorboard=fresh", "--settings", "bad.yaml"],
            "no YAML",
        ),
    ] {
        tool.file("list.json", "[1]");
        tool.file("bad.yaml", "a: [");
        let run = tool.run(arguments, &lines(1..=1)).exits(2).says(said);
        assert!(
            run.stdout.is_empty() && !run.stderr.contains(":pw@"),
            "{run}"
        );
    }
    assert!(!tool.folder().join("fresh").exists(), "nothing was written");
}

// ---- TensorBoard ----

/// The folder as a first run would have left it, its event file missing, for the times in it
/// are those of the reference.
fn with_reference() -> (Tool, String) {
    let tool = tool();
    tool.file("runs/track.jsonl", &fixture("tensorboard/track.jsonl"));
    let name = "events.out.tfevents.1796000000.track.abcdefghij";
    (tool, name.to_owned())
}

#[test]
fn event_files_are_byte_for_byte_those_of_tensorboards_own_writer() {
    let (tool, name) = with_reference();
    let wanted = std::fs::read(format!("{FIXTURES}/tensorboard/{name}")).unwrap();
    let metrics = fixture("tensorboard/metrics.jsonl");
    let send = || {
        let run = tool.run(&["--to", "tensorboard=runs"], &metrics).exits(0);
        assert_eq!(run.stdout, metrics);
        assert_eq!(
            std::fs::read(tool.path(&format!("runs/{name}"))).unwrap(),
            wanted
        );
    };
    send();
    send();
    // However a write was cut short, the rest follows.
    for length in [0, 1, 40, wanted.len() - 1] {
        std::fs::write(tool.path(&format!("runs/{name}")), &wanted[..length]).unwrap();
        send();
    }
    // What is not ours is not written into.
    std::fs::write(tool.path(&format!("runs/{name}")), "something else").unwrap();
    tool.run(&["--to", "tensorboard=runs"], &metrics)
        .exits(4)
        .says("not as track wrote it");
    assert_eq!(tool.read(&format!("runs/{name}")), "something else");
}

/// Each point of a state, and how often it is there.
fn points(tool: &Tool, state: &str) -> BTreeMap<(String, u64), usize> {
    let mut points = BTreeMap::new();
    for note in tool.read(state).lines() {
        let note: Value = serde_json::from_str(note).unwrap();
        for line in note["entries"].as_array().into_iter().flatten() {
            let line = &line["line"];
            for name in line["figures"]
                .as_object()
                .into_iter()
                .flat_map(|f| f.keys())
            {
                *points
                    .entry((name.clone(), line["step"].as_u64().unwrap()))
                    .or_default() += 1;
            }
        }
    }
    points
}

#[test]
fn a_run_that_goes_on_sends_no_point_twice() {
    let tool = tool();
    let send = |input: &str| tool.run(&["--to", "tensorboard=runs"], input).exits(0);
    send(&lines(1..=8)).says("has 32 points, 32 of them new");
    // From the checkpoint of step 5 on.
    send(&lines(6..=12)).says("has 48 points, 16 of them new");
    // Times of the same steps are other points.
    send("{\"step\":6,\"seconds\":1.5}\n").says("1 of them new");
    send(&(lines(1..=12) + &lines(1..=12)))
        .says("0 of them new")
        .never_says("warning");
    assert!(points(&tool, "runs/track.jsonl").values().all(|&n| n == 1));
    send(&lines(6..=6).replace("\"loss\":2", "\"loss\":9"))
        .says("1 points were sent before with other values");
}

#[test]
fn settings_are_sent_once_and_other_ones_are_another_run() {
    let tool = tool();
    let run = json!({"v": 3, "settings": ["lora.rank = 8", "lora.alpha = 32.0", "data.text = \"raw\""], "device": "cpu"});
    let run = tool.file("run.json", &run.to_string());
    let send = |settings: &str| {
        tool.run(
            &["--to", "tensorboard=runs", "--settings", settings],
            &lines(1..=2),
        )
    };
    send(&run).exits(0);
    // The train.yaml of the same run has more keys; those that both have are the same.
    let yaml = tool.file(
        "train.yaml",
        "lora:\n  rank: 8\n  alpha: 32\n  dropout: 0.05\n",
    );
    send(&yaml).exits(0);
    send(&yaml).exits(0);
    let state = tool.read("runs/track.jsonl");
    let sent: Vec<&str> = state.lines().filter(|l| l.contains("settings")).collect();
    assert_eq!(
        sent,
        [
            r#"{"entries":[{"settings":{"lora.rank":8,"lora.alpha":32.0,"data.text":"raw","run.device":"cpu"}}]}"#,
            r#"{"entries":[{"settings":{"lora.dropout":0.05}}]}"#
        ]
    );
    let other = tool.file("other.yaml", "lora: {rank: 16}\n");
    let run = send(&other)
        .exits(2)
        .says("lora.rank is 16, and 8 in")
        .says("another --state");
    assert!(run.stdout.is_empty(), "{run}");
}

#[test]
fn a_state_is_of_one_destination_and_one_process() {
    let tool = tool();
    tool.run(&["--to", "tensorboard=runs"], &lines(1..=1))
        .exits(0);
    let other = ["--to", "mlflow=http://127.0.0.1:1", "--state", "runs"];
    tool.run(&other, "")
        .exits(2)
        .says("go to tensorboard, and not to mlflow=http://127.0.0.1:1");
    let named = |name| {
        let to = "mlflow=http://127.0.0.1:1";
        ["--to", to, "--state", "s", "--every", "0", "--name", name].map(String::from)
    };
    tool.run(&named("x"), &lines(1..=1)).exits(4);
    tool.run(&named("y"), "").exits(2).says("another --state");
    let mut first = begin(&tool, &["--to", "tensorboard=runs"]);
    first.line(&lines(2..=2));
    tool.run(&["--to", "tensorboard=runs"], "")
        .exits(4)
        .says("another track is at work here");
    first.end();
    for (text, said) in [
        ("{\"precious\":1}\n", "track.jsonl:1: "),
        ("{\"sent\":[3,0]}\n", "more is sent than was read"),
    ] {
        tool.file("runs/track.jsonl", text);
        tool.run(&["--to", "tensorboard=runs"], "")
            .exits(2)
            .says(said);
        assert_eq!(tool.read("runs/track.jsonl"), text);
    }
    // A newer track may write what this one cannot read at all.
    let newer = "{\"track\":{\"v\":2,\"uid\":\"a\"}}\n{\"rows\":[]}\n";
    tool.file("runs/track.jsonl", newer);
    tool.run(&["--to", "tensorboard=runs"], "")
        .exits(3)
        .says("track.jsonl:1: is of a newer track (format 2)");
    assert_eq!(tool.read("runs/track.jsonl"), newer);
}

#[test]
fn a_disk_that_is_full_stops_no_line_and_loses_no_point() {
    let tool = tool();
    let all = lines(1..=900);
    // Files of at most 20 KB.
    let limited = ["-c", "ulimit -f 20; exec \"$@\"", "-"];
    let mut command = behind(
        "bash",
        &limited,
        &tool.command(&["--to", "tensorboard=runs"]),
    );
    let run = Run::of(&mut command, all.as_bytes());
    assert_eq!(run.stdout, all);
    let run = run.exits(4).says("too large").says("lines go on");
    for said in run.stderr.lines() {
        assert!(
            said.matches("too large").count() < 2,
            "a cause twice: {said}"
        );
    }
    tool.run(&["--to", "tensorboard=runs"], &all)
        .exits(0)
        .says("has 3600 points");
    let points = points(&tool, "runs/track.jsonl");
    assert!(points.len() == 3600 && points.values().all(|&n| n == 1));
}

// ---- a run under way ----

/// A track that is fed line by line.
struct Live {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

fn begin(tool: &Tool, arguments: &[&str]) -> Live {
    let mut command = tool.command(arguments);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    Live { child, out }
}

impl Live {
    /// Feeds a line and waits until it has passed; how long that took.
    fn line(&mut self, line: &str) -> Duration {
        let began = Instant::now();
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(line.as_bytes()).unwrap();
        let mut passed = String::new();
        self.out.read_line(&mut passed).unwrap();
        assert_eq!(passed, line);
        began.elapsed()
    }

    /// Ends its input; exit code and stderr.
    fn end(mut self) -> (i32, String) {
        drop(self.child.stdin.take());
        let ended = self.child.wait_with_output().unwrap();
        (
            ended.status.code().unwrap_or(-1),
            String::from_utf8(ended.stderr).unwrap(),
        )
    }
}

/// Sends a process a signal.
fn send_signal(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args([signal, &pid])
        .status();
    assert!(sent.unwrap().success());
}

/// Names of MLflow's statuses that a run was given.
fn statuses(server: &Server) -> Vec<Value> {
    let updates = bodies(server, "runs/update");
    updates.iter().map(|body| body["status"].clone()).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

// ---- MLflow ----

/// MLflow's answers, as a server of its own gave them.
fn recorded() -> Vec<Value> {
    let text = fixture("mlflow.jsonl");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn mlflow_answer(request: &Request) -> Reply {
    let of_path =
        |asked: &Value| asked["path"].as_str().unwrap().split('?').next() == Some(&request.path);
    match recorded().iter().find(|asked| of_path(asked)) {
        Some(asked) => Reply::json(asked["status"].as_u64().unwrap() as u16, &asked["answer"]),
        None if request.path.ends_with("/runs/search") => Reply::json(200, &json!({})),
        None => panic!("{} was never asked of the real server", request.path),
    }
}

/// MLflow that fails in some way first: `fault` may answer in its place.
fn mlflow(fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> Server {
    Server::start(move |request, n| fault(request, n).unwrap_or_else(|| mlflow_answer(request)))
}

fn to_mlflow(server: &Server) -> Vec<String> {
    let to = format!("mlflow={}", server.url());
    [
        "--to",
        &to,
        "--experiment",
        "tweets",
        "--state",
        "state",
        "--every",
        "0.05",
    ]
    .map(String::from)
    .to_vec()
}

fn to_mlflow_with_key(server: &Server) -> Vec<String> {
    let mut arguments = to_mlflow(server);
    arguments.extend(["--send-key-to".to_owned(), server.host()]);
    arguments
}

fn bodies(server: &Server, end: &str) -> Vec<Value> {
    let requests = server.requests();
    let asked = requests
        .iter()
        .filter(|request| request.path.ends_with(end));
    asked.map(Request::json).collect()
}

/// All metrics that a server was sent, each time it was.
fn metrics(server: &Server) -> Vec<Value> {
    let batches = bodies(server, "log-batch");
    let of = |batch: &Value| batch["metrics"].as_array().cloned().unwrap_or_default();
    batches.iter().flat_map(of).collect()
}

/// Requests without what differs between runs; the metrics and parameters of all together.
fn plain(requests: Vec<(String, Value)>) -> Vec<Value> {
    let (mut plain, mut logged) = (Vec::new(), BTreeMap::new());
    for (path, mut body) in requests {
        if path.ends_with("log-batch") {
            for kind in ["metrics", "params"] {
                for item in body[kind].as_array_mut().into_iter().flatten() {
                    if let Some(time) = item.get_mut("timestamp") {
                        assert!(time.as_u64().unwrap() > 1_700_000_000_000);
                        *time = "time".into();
                    }
                    logged
                        .entry(kind)
                        .or_insert_with(Vec::new)
                        .push(item.clone());
                }
            }
            continue;
        }
        for key in ["start_time", "end_time"] {
            if let Some(time) = body.get_mut(key) {
                *time = "time".into();
            }
        }
        if let Some(id) = body.pointer_mut("/tags/0/value") {
            *id = "id".into();
        }
        plain.push(json!([path, body]));
    }
    plain.push(json!(logged));
    plain
}

#[test]
fn mlflow_is_sent_what_a_real_server_took() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    let reference: Value = serde_json::from_str(&fixture("wandb.json")).unwrap();
    let settings: BTreeMap<&str, &Value> = (reference["run"]["config"].as_object().unwrap().iter())
        .map(|(key, value)| (key.as_str(), &value["value"]))
        .collect();
    // The order of the reference's settings.
    let keys = [
        "training.seed",
        "lora.rank",
        "lora.target_modules",
        "data.system_prompt",
        "model.path",
    ];
    let settings: Vec<String> = keys
        .iter()
        .map(|key| format!("\"{key}\": {}", settings[key]))
        .collect();
    tool.file("settings.yaml", &format!("{{{}}}", settings.join(", ")));
    let mut arguments = to_mlflow(&server);
    arguments.extend(["--name", "main", "--settings", "settings.yaml"].map(String::from));
    let run = tool
        .run(&arguments, &fixture("tensorboard/metrics.jsonl"))
        .exits(0);
    let ours = server
        .requests()
        .into_iter()
        .map(|request| (request.path.clone(), request.json()));
    let theirs = recorded().into_iter().map(|asked| {
        let path = asked["path"].as_str().unwrap().split('?').next().unwrap();
        (path.to_owned(), asked["body"].clone())
    });
    assert_eq!(plain(ours.collect()), plain(theirs.collect()));
    assert_eq!(
        server.requests()[0].query("experiment_name"),
        Some("tweets")
    );
    run.says("/#/experiments/1/runs/");
    // All is there: nobody is asked again.
    let asked = server.requests().len();
    tool.run(&arguments, &fixture("tensorboard/metrics.jsonl"))
        .exits(0)
        .says("0 of them new");
    assert_eq!(server.requests().len(), asked);
    // What is new goes to the same run.
    tool.run(&arguments, &lines(9..=9)).exits(0);
    assert_eq!(bodies(&server, "runs/create").len(), 1);
    let statuses: Vec<Value> = bodies(&server, "runs/update")
        .iter()
        .map(|body| body["status"].clone())
        .collect();
    assert_eq!(statuses, ["FINISHED", "RUNNING", "FINISHED"]);
}

#[test]
fn a_batch_holds_no_more_than_mlflow_takes() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    let mut figures = json!({"step": 1});
    for at in 0..2500 {
        figures[format!("figure {at}")] = at.into();
    }
    // 250 parameters of 6,000 characters, which are 3 bytes each.
    let settings: Vec<String> = (0..250)
        .map(|at| format!("key{at}: {}", "€".repeat(7000)))
        .collect();
    tool.file("settings.yaml", &settings.join("\n"));
    let mut arguments = to_mlflow(&server);
    arguments.extend(["--settings", "settings.yaml"].map(String::from));
    tool.run(&arguments, &format!("{figures}\n{}", lines(2..=900)))
        .exits(0);
    let batches = bodies(&server, "log-batch");
    let count = |kind: &str| {
        let counts = batches
            .iter()
            .filter_map(|batch| Some(batch[kind].as_array()?.len()));
        counts.collect::<Vec<_>>()
    };
    let (metrics, params) = (count("metrics"), count("params"));
    assert_eq!(metrics.iter().sum::<usize>(), 2500 + 899 * 4);
    assert!(metrics.iter().all(|&n| n <= 1000), "{metrics:?}");
    assert_eq!(params.iter().sum::<usize>(), 250);
    assert!(params.iter().all(|&n| n <= 100), "{params:?}");
    for request in server.requests() {
        assert!(
            request.body.len() < 1_000_000,
            "{} bytes",
            request.body.len()
        );
    }
    let value = batches[0]["params"][0]["value"].as_str().unwrap();
    assert_eq!(value.chars().count(), 6000);
}

#[test]
fn faults_that_pass_are_outlived() {
    type Fault = fn() -> Reply;
    let faults: [(&str, Fault); 6] = [
        ("429", || Reply::text(429, "slow down")),
        ("429 that says when", || {
            Reply::text(429, "").header("retry-after", "1")
        }),
        ("500", || Reply::text(500, "oops")),
        ("503", || Reply::text(503, "<h1>gone</h1>")),
        ("an answer cut short", || {
            Reply::text(200, "{\"experiment_id\":\"1\"}").cut_after(5)
        }),
        ("no answer", Reply::hang_up),
    ];
    for (what, fault) in faults {
        // Each kind of request fails once; making a run is one that may have been made.
        let server =
            mlflow(move |request, n| (n == 0 && !request.path.ends_with("/create")).then(fault));
        let tool = tool();
        let run = tool
            .run(&to_mlflow(&server), &lines(1..=3))
            .exits(0)
            .says("warning")
            .says("12 of them new");
        assert_eq!(run.stdout, lines(1..=3), "{what}");
        let sent = metrics(&server);
        assert!(bodies(&server, "runs/create").len() == 1, "{what}");
        let last = |m: &Value| m["step"] == 3 && m["key"] == "loss";
        assert!(sent.iter().any(last), "{what}");
    }
}

#[test]
fn a_repeated_batch_is_the_same_to_the_millisecond() {
    // MLflow takes a point with the same time for the same point.
    let server = mlflow(|request, n| {
        let cut = n < 2 && request.path.ends_with("log-batch");
        cut.then(|| Reply::text(200, "{}").cut_after(1))
    });
    tool().run(&to_mlflow(&server), &lines(1..=2)).exits(0);
    let batches = bodies(&server, "log-batch");
    assert!(
        batches.len() >= 3 && batches[0] == batches[1] && batches[1] == batches[2],
        "{batches:?}"
    );
}

#[test]
fn a_run_whose_making_was_not_answered_is_found_again() {
    let run = json!({"info": {"run_id": "found", "experiment_id": "1"}});
    let is_found = Arc::new(AtomicBool::new(false));
    let found = Arc::clone(&is_found);
    let server = mlflow(
        move |request, n| match (request.path.rsplit('/').next()?, n) {
            ("create", 0) if request.path.contains("/runs/") => {
                Some(Reply::json(200, &json!({"run": {}})).cut_after(3))
            }
            // Nor can it be found at once.
            ("search", _) if !found.load(Ordering::SeqCst) => Some(Reply::text(403, "not now")),
            ("search", _) => Some(Reply::json(200, &json!({"runs": [run]}))),
            _ => None,
        },
    );
    let tool = tool();
    tool.run(&to_mlflow(&server), &lines(1..=2))
        .exits(4)
        .says("8 points are not sent, and kept in state");
    is_found.store(true, Ordering::SeqCst);
    let run = tool.run(&to_mlflow(&server), "").exits(0);
    assert!(run.stdout.is_empty());
    assert_eq!(bodies(&server, "runs/create").len(), 1, "one run, not two");
    let tag = &bodies(&server, "runs/create")[0]["tags"][0];
    let filter = format!("tags.track = '{}'", tag["value"].as_str().unwrap());
    assert_eq!(
        bodies(&server, "runs/search").last().unwrap()["filter"],
        filter
    );
    assert_eq!(metrics(&server).len(), 8);
    assert!(
        bodies(&server, "log-batch")
            .iter()
            .all(|batch| batch["run_id"] == "found")
    );
}

#[test]
fn an_experiment_that_is_there_is_taken() {
    let server = mlflow(|request, _| {
        let there = json!({"experiment": {"experiment_id": "7", "name": "tweets"}});
        request
            .path
            .ends_with("get-by-name")
            .then(|| Reply::json(200, &there))
    });
    tool().run(&to_mlflow(&server), &lines(1..=1)).exits(0);
    assert!(bodies(&server, "experiments/create").is_empty());
    assert_eq!(bodies(&server, "runs/create")[0]["experiment_id"], "7");
}

#[test]
fn what_a_service_that_is_away_did_not_take_is_sent_by_the_same_command() {
    let is_down = Arc::new(AtomicBool::new(true));
    let down = Arc::clone(&is_down);
    let server = mlflow(move |_, _| down.load(Ordering::SeqCst).then(Reply::hang_up));
    let tool = tool();
    let run = tool.run(&to_mlflow(&server), &lines(1..=5)).exits(4);
    assert_eq!(run.stdout, lines(1..=5), "the lines pass all the same");
    run.says("20 points are not sent, and kept in state; the same command sends it");
    is_down.store(false, Ordering::SeqCst);
    tool.run(&to_mlflow(&server), &lines(1..=5)).exits(0);
    assert_eq!(metrics(&server).len(), 20);
}

#[test]
fn a_service_that_is_slow_or_away_holds_no_line_up_and_comes_back() {
    let is_down = Arc::new(AtomicBool::new(true));
    let down = Arc::clone(&is_down);
    let server = mlflow(move |_, _| {
        let slow = down.load(Ordering::SeqCst);
        slow.then(|| Reply::text(503, "").after(Duration::from_secs(3)))
    });
    let tool = tool();
    let arguments = to_mlflow(&server);
    let mut run = begin(
        &tool,
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    for step in 1..=20 {
        let took = run.line(&lines(step..=step));
        assert!(took < Duration::from_secs(2), "line {step} took {took:?}");
    }
    wait_until("a request", || !server.requests().is_empty());
    is_down.store(false, Ordering::SeqCst);
    wait_until("all figures", || metrics(&server).len() == 80);
    // And while it is open, what is new goes out.
    run.line(&lines(21..=21));
    wait_until("a later figure", || metrics(&server).len() == 84);
    let (code, said) = run.end();
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_wrong_token_is_told_at_once_and_never_shown() {
    const TOKEN: &str = "mlflow-token-0123456789";
    let server = mlflow(|request, _| {
        let said = format!("no {:?}", request.header("authorization"));
        Some(Reply::json(
            401,
            &json!({"error_code": "UNAUTHENTICATED", "message": said}),
        ))
    });
    let tool = tool().env("MLFLOW_TRACKING_TOKEN", TOKEN);
    let arguments = to_mlflow_with_key(&server);
    let mut run = begin(
        &tool,
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    run.line(&lines(1..=1));
    wait_until("a request", || !server.requests().is_empty());
    for step in 2..=9 {
        run.line(&lines(step..=step));
        std::thread::sleep(Duration::from_millis(60));
    }
    let (code, said) = run.end();
    assert_eq!(code, 4, "{said}");
    assert!(
        said.contains("check MLFLOW_TRACKING_TOKEN") && said.contains("36 points are not sent"),
        "{said}"
    );
    assert!(
        !said.contains(TOKEN) && !tool.read("state/track.jsonl").contains(TOKEN),
        "{said}"
    );
    assert_eq!(
        server.requests().len(),
        1,
        "what is refused is not asked again and again"
    );
    assert_eq!(
        server.requests()[0].header("authorization"),
        Some(&*format!("Bearer {TOKEN}"))
    );
}

#[test]
fn a_user_goes_before_a_token_and_both_are_needed_whole() {
    let server = mlflow(|_, _| None);
    let named = || {
        tool()
            .env("MLFLOW_TRACKING_USERNAME", "Aladdin")
            .env("MLFLOW_TRACKING_TOKEN", "t")
    };
    named()
        .env("MLFLOW_TRACKING_PASSWORD", "open sesame")
        .run(&to_mlflow_with_key(&server), &lines(1..=1))
        .exits(0);
    // The example of RFC 7617, section 2.
    let basic = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";
    assert!(
        server
            .requests()
            .iter()
            .all(|request| request.header("authorization") == Some(basic))
    );
    let half = tool().env("MLFLOW_TRACKING_USERNAME", "Aladdin");
    half.run(&to_mlflow(&server), "")
        .exits(2)
        .says("go together");
    let open = ["--to", "mlflow=http://example.com", "--state", "s"];
    named().run(&open, "").exits(2).says("clear text");
}

#[test]
fn mlflows_secret_goes_to_its_own_host_unless_another_is_named() {
    const TOKEN: &str = "mlflow-token-0123456789";
    let server = mlflow(|_, _| None);
    let with = |uri: &str| {
        tool()
            .env("MLFLOW_TRACKING_TOKEN", TOKEN)
            .env("MLFLOW_TRACKING_URI", uri)
    };
    for home in ["", "https://mlflow.example.com", "sqlite:///mlruns.db"] {
        with(home)
            .run(&to_mlflow(&server), &lines(1..=1))
            .exits(2)
            .says(&format!("--send-key-to {}", server.host()))
            .never_says(TOKEN);
    }
    assert!(server.requests().is_empty());
    with("")
        .run(&to_mlflow_with_key(&server), &lines(1..=1))
        .exits(0);
    // The server that the token is for, named as in the environment or otherwise.
    let home = format!("{}/", server.url());
    with(&home).run(&to_mlflow(&server), &lines(1..=1)).exits(0);
    with(&home)
        .run(&["--to", "mlflow", "--state", "s"], &lines(1..=1))
        .exits(0);
    // Without a secret nothing need be said.
    tool().run(&to_mlflow(&server), &lines(1..=1)).exits(0);
}

#[test]
fn an_answer_that_is_no_json_is_none() {
    let server = mlflow(|_, _| Some(Reply::text(200, "<h1>Please log in</h1>")));
    let tool = tool();
    tool.run(&to_mlflow(&server), &lines(1..=2))
        .exits(4)
        .says("not the documented JSON")
        .says("8 points");
    let server = mlflow(|request, _| {
        request
            .path
            .ends_with("log-batch")
            .then(|| Reply::text(200, "[]"))
    });
    let tool = self::tool();
    tool.run(&to_mlflow(&server), &lines(1..=2))
        .exits(4)
        .says("not the documented JSON")
        .says("8 points");
}

#[test]
fn a_signal_ends_the_waiting_and_keeps_what_is_not_sent() {
    let server = mlflow(|_, _| Some(Reply::text(503, "").header("retry-after", "50")));
    let tool = tool();
    let run = tool.interrupt(&to_mlflow(&server), &lines(1..=4), || {
        !server.requests().is_empty()
    });
    run.exits(130)
        .says("16 points are not sent, and kept in state");
    let server = mlflow(|_, _| None);
    let address = server.url();
    let state = tool.read("state/track.jsonl");
    let was = state
        .split("mlflow=")
        .nth(1)
        .unwrap()
        .split(',')
        .next()
        .unwrap();
    tool.file("state/track.jsonl", &state.replace(was, &address));
    tool.run(&to_mlflow(&server), "").exits(0);
    assert_eq!(metrics(&server).len(), 16);
}

#[test]
fn a_killed_run_sends_the_same_again() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let server = mlflow(move |request, _| {
        let first =
            request.path.ends_with("log-batch") && count.fetch_add(1, Ordering::SeqCst) == 0;
        first.then(|| Reply::text(200, "{}").after(Duration::from_secs(20)))
    });
    let tool = tool();
    let arguments = to_mlflow(&server);
    let mut run = begin(
        &tool,
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    run.line(&lines(1..=1));
    wait_until("a batch", || !bodies(&server, "log-batch").is_empty());
    run.line(&lines(2..=2));
    wait_until("its keeping", || {
        tool.read("state/track.jsonl").contains("\"step\":2")
    });
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    tool.run(&arguments, "").exits(0);
    let batches = bodies(&server, "log-batch");
    assert_eq!(
        batches[0], batches[1],
        "what may have arrived goes as it went"
    );
    assert_eq!(batches.len(), 3);
    assert_eq!(bodies(&server, "runs/create").len(), 1);
}

#[test]
fn a_bad_line_keeps_and_sends_what_came_before_it() {
    let server = mlflow(|_, _| None);
    let run = tool().run(
        &to_mlflow(&server),
        &format!("{}{{\"loss\":1}}\n", lines(1..=2)),
    );
    run.exits(3).says("-:3: key `step` is missing");
    assert_eq!(metrics(&server).len(), 8);
    assert_eq!(
        bodies(&server, "runs/update").last().unwrap()["status"],
        "KILLED"
    );
}

#[test]
fn a_fault_that_passes_does_not_end_the_sending() {
    type Fault = fn() -> Reply;
    let faults: [Fault; 3] = [
        || Reply::text(404, "<h1>No such page</h1>"),
        || Reply::text(200, "<h1>Please log in</h1>"),
        || Reply::text(302, "").header("location", "https://example.com/login"),
    ];
    for fault in faults {
        let server =
            mlflow(move |request, n| (n == 0 && request.path.ends_with("log-batch")).then(fault));
        let tool = tool();
        let arguments = to_mlflow(&server);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut run = begin(&tool, &arguments);
        run.line(&lines(1..=1));
        wait_until("a second try", || metrics(&server).len() == 8);
        run.line(&lines(2..=2));
        wait_until("what is new", || metrics(&server).len() == 12);
        let (code, said) = run.end();
        assert_eq!(code, 0, "{said}");
        assert!(
            said.contains("tried again in 1 s") && said.contains("takes figures again"),
            "{said}"
        );
    }
}

#[test]
fn a_service_that_fails_is_not_asked_without_end() {
    let server = mlflow(|_, _| Some(Reply::text(200, "<h1>Please log in</h1>")));
    let tool = tool();
    let mut arguments = to_mlflow(&server);
    arguments.extend(["--every", "0"].map(String::from));
    arguments.drain(6..8);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    std::thread::sleep(Duration::from_millis(2500));
    let asked = server.requests().len();
    assert!((1..=3).contains(&asked), "{asked} requests in 2.5 s");
    assert_eq!(run.end().0, 4);
}

#[test]
fn a_service_that_asks_for_rest_has_it() {
    let server = mlflow(|_, _| Some(Reply::text(429, "").header("retry-after", "61")));
    let tool = tool();
    let arguments = to_mlflow(&server);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    wait_until("a request", || !server.requests().is_empty());
    std::thread::sleep(Duration::from_millis(1500));
    let (code, said) = run.end();
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("tried again in 61 s"), "{said}");
    assert_eq!(server.requests().len(), 1, "nor at the end");
}

#[test]
fn a_signal_ends_it_soon_and_what_was_read_is_sent() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    let mut arguments = to_mlflow(&server);
    arguments.drain(6..8);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    send_signal(&run.child, "-TERM");
    let began = Instant::now();
    // The step in hand.
    run.line(&lines(2..=2));
    // Half a line, and an input that stays open.
    let mut stdin = run.child.stdin.take().unwrap();
    stdin.write_all(b"{\"step\":3,\"lo").unwrap();
    let (code, said) = run.end();
    let took = began.elapsed().as_secs_f64();
    assert_eq!(code, 130, "{said}");
    assert!(took < 5.0, "{took} s: {said}");
    assert!(said.contains("what was read is sent"), "{said}");
    assert_eq!(metrics(&server).len(), 8);
    assert_eq!(statuses(&server), ["KILLED"]);
}

#[test]
fn a_signal_does_not_wait_for_a_service_that_never_answers() {
    let server = mlflow(|_, _| Some(Reply::text(200, "{}").after(Duration::from_secs(25))));
    let tool = tool();
    let arguments = to_mlflow(&server);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    wait_until("a request", || !server.requests().is_empty());
    send_signal(&run.child, "-INT");
    let began = Instant::now();
    let (code, said) = run.end();
    let took = began.elapsed().as_secs_f64();
    assert_eq!(code, 130, "{said}");
    assert!(took < 8.0, "{took} s: {said}");
    assert!(
        said.contains("has not answered within 5 s of the signal: 4 points are not sent, and kept"),
        "{said}"
    );
}

#[test]
fn a_run_that_was_broken_off_is_finished_by_its_whole_file() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    tool.run(&to_mlflow(&server), &format!("{}x\n", lines(1..=2)))
        .exits(3);
    assert_eq!(statuses(&server), ["KILLED"]);
    // Nothing is said of a run of which nothing comes.
    tool.run(&to_mlflow(&server), "").exits(0);
    assert_eq!(statuses(&server), ["KILLED"]);
    for _ in 0..2 {
        tool.run(&to_mlflow(&server), &lines(1..=2))
            .exits(0)
            .says("0 of them new");
        assert_eq!(statuses(&server), ["KILLED", "RUNNING", "FINISHED"]);
    }
}

#[test]
fn a_training_without_an_adapter_is_not_finished() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    let run = json!({"v": 3, "settings": ["lora.rank = 8"]});
    tool.file("out/run.json", &run.to_string());
    let mut arguments = to_mlflow(&server);
    arguments.extend(["--settings", "out/run.json"].map(String::from));
    tool.run(&arguments, &lines(1..=2))
        .exits(0)
        .says("no adapter beside out/run.json");
    assert_eq!(statuses(&server), ["KILLED"]);
    tool.file("out/adapter_model.safetensors", "");
    tool.run(&arguments, &lines(1..=2))
        .exits(0)
        .never_says("no adapter");
    assert_eq!(statuses(&server), ["KILLED", "RUNNING", "FINISHED"]);
}

#[test]
fn names_that_would_become_one_are_told_apart_and_stay() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    let mut arguments = to_mlflow(&server);
    arguments.extend(["--settings", "s.yaml"].map(String::from));
    for (settings, line) in [
        ("\"k(\": 1\n", "{\"step\":1,\"a(\":1,\"a)\":2}\n"),
        (
            "\"k)\": 2\n\"k(\": 1\n",
            "{\"step\":2,\"a)\":4,\"a_\":5,\"a(\":3}\n",
        ),
    ] {
        tool.file("s.yaml", settings);
        tool.run(&arguments, line).exits(0);
    }
    let params: Vec<Value> = (bodies(&server, "log-batch").iter())
        .flat_map(|body| body["params"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(
        params,
        [
            json!({"key": "k_", "value": "1"}),
            json!({"key": "k__2", "value": "2"})
        ]
    );
    let sent: Vec<_> = (metrics(&server).iter())
        .map(|m| json!([m["key"], m["step"], m["value"]]))
        .collect();
    assert_eq!(
        json!(sent),
        json!([
            ["a_", 1, 1],
            ["a__2", 1, 2],
            ["a__2", 2, 4],
            ["a__3", 2, 5],
            ["a_", 2, 3]
        ])
    );
}

#[test]
fn a_run_that_was_deleted_is_told_with_what_helps() {
    // As MLflow answers, as far as is known, for a run that was deleted, and for one that was purged too.
    let deleted = json!({"run": {"info": {"lifecycle_stage": "deleted"}}});
    let inactive = json!({"error_code": "INVALID_PARAMETER_VALUE", "message": "The run x must be in the 'active' state. Current state is deleted."});
    let none =
        json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Run with id=x not found"});
    for (refused, got, restores) in [
        ((400, inactive), (200, deleted), true),
        ((404, none.clone()), (404, none), false),
    ] {
        let is_gone = Arc::new(AtomicBool::new(false));
        let gone = Arc::clone(&is_gone);
        let server = mlflow(move |request, _| {
            if !gone.load(Ordering::SeqCst) {
                return None;
            }
            match request.path.rsplit('/').next()? {
                "update" | "log-batch" => Some(Reply::json(refused.0, &refused.1)),
                "get" => Some(Reply::json(got.0, &got.1)),
                _ => None,
            }
        });
        let tool = tool();
        tool.run(&to_mlflow(&server), &lines(1..=1)).exits(0);
        is_gone.store(true, Ordering::SeqCst);
        let run = tool
            .run(&to_mlflow(&server), &lines(2..=2))
            .exits(4)
            .says("was deleted at the server: another --state")
            .says("4 points are not sent, and kept in state")
            .never_says("the same command");
        assert_eq!(
            run.stderr.contains("mlflow runs restore --run-id"),
            restores,
            "{run}"
        );
    }
}

#[test]
fn where_reading_fails_it_is_told_why_sending_did() {
    let server = mlflow(|_, _| Some(Reply::text(403, "not you")));
    tool()
        .run(&to_mlflow(&server), &format!("{}x\n", lines(1..=2)))
        .exits(3)
        .says("-:3: ")
        .says(
            "not you; the service wants a key and was sent none: 8 points are not sent, and kept",
        );
}

#[test]
fn an_address_is_one_with_and_without_a_slash() {
    let server = mlflow(|_, _| None);
    let tool = tool();
    tool.run(&to_mlflow(&server), &lines(1..=1)).exits(0);
    let mut arguments = to_mlflow(&server);
    arguments[1].push('/');
    tool.run(&arguments, &lines(1..=2)).exits(0);
    assert_eq!(bodies(&server, "runs/create").len(), 1);
}

// ---- Weights & Biases ----

fn wandb_answer(request: &Request) -> Reply {
    let given = &request.json()["variables"];
    let project = json!({"name": given["project"], "entity": {"name": "me"}});
    let bucket = json!({"project": project});
    match request.path.as_str() {
        "/graphql" => Reply::json(200, &json!({"data": {"upsertBucket": {"bucket": bucket}}})),
        _ => Reply::json(200, &json!({})),
    }
}

fn wandb(fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> Server {
    Server::start(move |request, n| fault(request, n).unwrap_or_else(|| wandb_answer(request)))
}

fn to_wandb(server: &Server, place: &str) -> (Tool, Vec<String>) {
    let tool = tool()
        .env("WANDB_API_KEY", KEY)
        .env("WANDB_BASE_URL", &server.url());
    let to = format!("wandb={place}");
    let arguments = [
        "--to",
        &to,
        "--state",
        "state",
        "--send-key-to",
        &server.host(),
        "--every",
        "0.05",
    ];
    let arguments = arguments.map(String::from).to_vec();
    (tool, arguments)
}

/// The history as the service has it: rows by their offsets, later ones over earlier ones.
fn history(server: &Server) -> BTreeMap<u64, Value> {
    let mut rows = BTreeMap::new();
    for body in bodies(server, "file_stream") {
        let file = &body["files"]["wandb-history.jsonl"];
        let offset = file["offset"].as_u64().unwrap_or(0);
        for (at, row) in (offset..).zip(file["content"].as_array().into_iter().flatten()) {
            rows.insert(at, serde_json::from_str(row.as_str().unwrap()).unwrap());
        }
    }
    rows
}

/// A row without its times, which must be some.
fn timeless(mut row: Value) -> Value {
    for (key, least, kind) in [
        ("_runtime", 0.0, "seconds"),
        ("_timestamp", 1e9, "seconds since 1970"),
    ] {
        assert!(row[key].as_f64().unwrap() >= least, "{row}");
        row[key] = kind.into();
    }
    // As the reference writes whole numbers.
    for (_, value) in row.as_object_mut().unwrap() {
        if let Some(whole) = value.as_f64().filter(|v| v.fract() == 0.0) {
            *value = (whole as i64).into();
        }
    }
    row
}

#[test]
fn wandb_is_sent_what_its_own_client_sends() {
    let reference: Value = serde_json::from_str(&fixture("wandb.json")).unwrap();
    let server = wandb(|_, _| None);
    let (tool, mut arguments) = to_wandb(&server, "me/tweets");
    let mut settings = reference["run"]["config"].clone();
    for (_, value) in settings.as_object_mut().unwrap() {
        *value = value["value"].clone();
    }
    tool.file("settings.yaml", &settings.to_string());
    arguments.extend(["--name", "main", "--settings", "settings.yaml"].map(String::from));
    tool.run(&arguments, &fixture("tensorboard/metrics.jsonl"))
        .exits(0);

    let asked = bodies(&server, "graphql");
    let given = &asked[0]["variables"];
    let config: Value = serde_json::from_str(given["config"].as_str().unwrap()).unwrap();
    assert_eq!(config, reference["run"]["config"]);
    for key in ["project", "entity", "displayName"] {
        assert_eq!(given[key], reference["run"][key], "{key}");
    }
    let name = given["name"].as_str().unwrap();
    let stream = server
        .requests()
        .iter()
        .map(|r| r.path.replace(name, "RUN"))
        .rfind(|p| p != "/graphql");
    assert_eq!(stream.as_deref(), reference["paths"][0].as_str());
    let rows: serde_json::Map<String, Value> = (history(&server).into_iter())
        .map(|(at, row)| (at.to_string(), timeless(row)))
        .collect();
    assert_eq!(Value::from(rows), reference["rows"]);
    let streamed = bodies(&server, "file_stream");
    let summary = streamed
        .iter()
        .rev()
        .find_map(|body| body["files"]["wandb-summary.json"]["content"][0].as_str());
    assert_eq!(
        timeless(serde_json::from_str(summary.unwrap()).unwrap()),
        reference["summary"]
    );
    assert_eq!(*streamed.last().unwrap(), reference["end"]);
    // Basic, the user `api`.
    let key = server.requests()[0]
        .header("authorization")
        .unwrap()
        .to_owned();
    assert!(key.starts_with("Basic YXBpOndhbmRiLTAxMj"), "{key}");
    assert!(
        reference["authorization"][0]
            .as_str()
            .unwrap()
            .starts_with("Basic YXBpO")
    );
}

#[test]
fn wandb_rows_follow_each_other_over_runs_and_faults() {
    let server = wandb(|request, n| match n {
        1 if request.path != "/graphql" => Some(Reply::text(429, "slow down")),
        2 if request.path != "/graphql" => Some(Reply::text(200, "{}").cut_after(1)),
        _ => None,
    });
    // No entity: the answer says whose the project is.
    let (tool, arguments) = to_wandb(&server, "tweets");
    tool.run(&arguments, &lines(1..=5))
        .exits(0)
        .says("/me/tweets/runs/");
    tool.run(&arguments, &lines(4..=9)).exits(0);
    tool.run(&arguments, &lines(1..=9)).exits(0);
    let steps: Vec<(u64, Value)> = history(&server)
        .into_iter()
        .map(|(at, row)| (at, row["_step"].clone()))
        .collect();
    assert_eq!(
        steps,
        (0..9).map(|at| (at, json!(at + 1))).collect::<Vec<_>>()
    );
    let runs: Vec<Value> = bodies(&server, "graphql")
        .iter()
        .map(|body| body["variables"]["name"].clone())
        .collect();
    assert!(runs.len() == 2 && runs[0] == runs[1], "{runs:?}");
}

#[test]
fn an_evaluation_waits_for_nothing_and_shares_its_steps_row() {
    let server = wandb(|_, _| None);
    let (tool, arguments) = to_wandb(&server, "me/tweets");
    let mut run = begin(
        &tool,
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    run.line(&lines(1..=1));
    run.line(&lines(2..=2));
    wait_until("the first row", || history(&server).len() == 1);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        history(&server).len(),
        1,
        "the second step may get more figures"
    );
    run.line("{\"step\":2,\"eval_loss\":1.5}\n");
    let (code, said) = run.end();
    assert_eq!(code, 0, "{said}");
    let rows = history(&server);
    assert_eq!(rows.len(), 2);
    assert!(
        rows[&1]["eval_loss"] == 1.5 && rows[&1]["tokens"] == 802,
        "{rows:?}"
    );
}

#[test]
fn wandbs_key_goes_to_its_own_host_unless_another_is_named() {
    let server = wandb(|_, _| None);
    let (tool, arguments) = to_wandb(&server, "me/tweets");
    tool.run(&arguments[..4], &lines(1..=1))
        .exits(2)
        .says("--send-key-to")
        .never_says(KEY);
    assert!(server.requests().is_empty());
    // The key may stand in .env.
    let tool = self::tool().env("WANDB_BASE_URL", &server.url());
    tool.file(".env", &format!("WANDB_API_KEY={KEY}\n"));
    tool.run(&arguments, &lines(1..=1)).exits(0).never_says(KEY);
    assert!(!tool.read("state/track.jsonl").contains(KEY));
}

#[test]
fn what_wandb_refuses_is_told_in_its_words_without_the_key() {
    let refuse = |status: u16| {
        wandb(move |request, _| {
            let said = format!("no project for {:?}", request.header("authorization"));
            let answer = json!({"data": null, "errors": [{"message": said}]});
            Some(Reply::json(status, &answer))
        })
    };
    for (status, said) in [
        (200, "makes no run: no project for"),
        (401, "check WANDB_API_KEY"),
    ] {
        let server = refuse(status);
        let (tool, arguments) = to_wandb(&server, "me/tweets");
        let run = tool.run(&arguments, &lines(1..=2)).exits(4);
        run.says(said)
            .says("[WANDB_API_KEY]")
            .says("8 points are not sent")
            .never_says(KEY)
            // Base64 of its beginning, behind `api:`.
            .never_says("YXBpOndhbmRi");
        // What is said in a success may pass by the end, when it is asked once more.
        let most = if status == 200 { 2 } else { 1 };
        assert!((1..=most).contains(&server.requests().len()));
    }
    // An entity that would be another path.
    let server = wandb(|_, _| {
        let project = json!({"name": "p", "entity": {"name": "../../x"}});
        Some(Reply::json(
            200,
            &json!({"data": {"upsertBucket": {"bucket": {"project": project}}}}),
        ))
    });
    let (tool, arguments) = to_wandb(&server, "tweets");
    tool.run(&arguments, &lines(1..=1))
        .exits(4)
        .says("is no name of an entity");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn wandbs_stop_button_is_told_once() {
    let server = wandb(|request, _| {
        (request.path != "/graphql").then(|| Reply::json(200, &json!({"stopped": true})))
    });
    let (tool, arguments) = to_wandb(&server, "me/tweets");
    let run: Run = tool.run(&arguments, &lines(1..=3)).exits(0);
    assert_eq!(run.stderr.matches("Stop button").count(), 1, "{run}");
}

#[test]
fn figures_of_a_step_that_was_sent_are_not_called_shown() {
    let server = wandb(|_, _| None);
    let (tool, arguments) = to_wandb(&server, "me/tweets");
    tool.run(&arguments, &lines(1..=3))
        .exits(0)
        .says("has 12 points, 12 of them new");
    let late = "{\"step\":3,\"eval_loss\":1.5}\n{\"step\":2,\"eval_loss\":1.6}\n";
    let run = tool
        .run(&arguments, &format!("{late}{}", lines(4..=4)))
        .exits(0)
        .says(
            "2 points came for steps that are at Weights & Biases already, and are not shown there",
        );
    run.says("has 16 points, 4 of them new");
    let steps: Vec<Value> = (history(&server).into_values())
        .map(|row| row["_step"].clone())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    // Told once, and counted ever after.
    tool.run(&arguments, &format!("{late}{}", lines(1..=4)))
        .exits(0)
        .never_says("Weights & Biases already")
        .says("has 16 points, 0 of them new");
}

#[test]
fn a_run_is_there_from_its_first_line_and_waits_for_the_second_in_peace() {
    let server = wandb(|_, _| None);
    let (tool, mut arguments) = to_wandb(&server, "me/tweets");
    arguments.drain(6..8);
    arguments.extend(["--every", "0"].map(String::from));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    wait_until("the run", || !bodies(&server, "graphql").is_empty());
    std::thread::sleep(Duration::from_millis(1500));
    assert!(history(&server).is_empty());
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", run.child.id())).unwrap();
    let times: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // User and system, in hundredths of a second.
    let used: u64 = [11, 12]
        .map(|at: usize| times[at].parse::<u64>().unwrap())
        .iter()
        .sum();
    assert!(used < 50, "{used} hundredths of a second");
    let (code, said) = run.end();
    assert_eq!(code, 0, "{said}");
    assert_eq!(bodies(&server, "graphql").len(), 1);
    assert_eq!(history(&server).len(), 1);
}

#[test]
fn an_error_of_wandbs_that_passes_does_not_end_the_sending() {
    let server = wandb(|request, n| {
        let said = json!({"data": null, "errors": [{"message": "context deadline exceeded"}]});
        (n == 0 && request.path == "/graphql").then(|| Reply::json(200, &said))
    });
    let (tool, arguments) = to_wandb(&server, "me/tweets");
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut run = begin(&tool, &arguments);
    run.line(&lines(1..=1));
    run.line(&lines(2..=2));
    wait_until("a row", || history(&server).len() == 1);
    let (code, said) = run.end();
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("context deadline exceeded; lines go on"),
        "{said}"
    );
}

#[test]
fn wandbs_address_holds_no_password_and_no_odd_slash() {
    let server = wandb(|_, _| None);
    let (_, arguments) = to_wandb(&server, "me/tweets");
    let at = |url: &str| tool().env("WANDB_API_KEY", KEY).env("WANDB_BASE_URL", url);
    let open = server.url().replace("http://", "http://me:pw123@");
    let tool = at(&open);
    tool.run(&arguments, &lines(1..=1))
        .exits(2)
        .says("WANDB_BASE_URL: holds a user or password")
        .says("WANDB_API_KEY")
        .never_says("pw123");
    assert!(!tool.folder().join("state").exists());
    assert!(server.requests().is_empty());
    let tool = at(&format!("{}/", server.url()));
    tool.run(&arguments, &lines(1..=1)).exits(0);
    let state = tool.read("state/track.jsonl");
    assert!(state.contains(&format!("at {}\"", server.url())), "{state}");
}
