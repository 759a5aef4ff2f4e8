//! Signals, requests to save, and readers that go away.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Tool, behind};

use crate::{
    CONFIG, SIGHUP, arguments, heeds, lines, pairs, same, signal_after, signal_to, tool, train,
};

#[test]
fn a_signal_saves_and_leaves_with_130() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    for signal in ["-TERM", "-INT"] {
        let out = format!("out{signal}");
        let code = signal_after(&tool, &out, &[], 3, signal);
        assert_eq!(code, Some(130), "{signal}");
        let saved = fs::read_dir(tool.folder().join(&out).join("checkpoints"))
            .unwrap()
            .count();
        assert!(saved > 0, "{signal}: nothing saved");
        train(&tool, &out, &["--resume"]).exits(0);
        same(&tool, "whole", &out);
    }
}

/// The tests themselves may run under nohup: env(1) says what holds.
#[test]
fn a_hangup_saves_unless_hangups_are_ignored() {
    let tool = tool();
    train(&tool, "whole", &[]).exits(0);
    for (out, how, expected) in [
        ("heeded", "--default-signal=HUP", 130),
        ("ignored", "--ignore-signal=HUP", 0),
    ] {
        let command = behind("env", &[how], &tool.command(&arguments(out, &[])));
        let code = signal_to(command, (&tool, out), 3, "-HUP");
        assert_eq!(code, Some(expected), "{how}");
        if code == Some(130) {
            let saved = fs::read_dir(tool.folder().join(out).join("checkpoints"));
            assert!(saved.unwrap().count() > 0, "nothing saved");
            train(&tool, out, &["--resume"]).exits(0);
        }
        same(&tool, "whole", out);
    }
}

/// What goes on when a connection is lost: several signals, and figures that cannot be
/// written any more.
#[test]
fn a_terminal_that_goes_away_leaves_a_saved_run() {
    let tool = tool();
    // There is always a step whose figures are still to be written.
    let config = CONFIG
        .replace("save_steps: 3", "save_steps: 0")
        .replace("eval_steps: 4", "eval_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    let command = tool.command(&arguments("out", &["--log", "log"]));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<String> = words.map(|w| format!("'{}'", w.display())).collect();
    let line = format!("exec env --default-signal=HUP {}", line.join(" "));
    let mut script = Command::new("script");
    script
        .args(["--quiet", "--command", &line, "/dev/null"])
        .current_dir(tool.folder())
        .env_clear()
        .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let there = Command::new("script").arg("--version").output().is_ok();
    assert!(there, "a terminal needs script(1), of util-linux");
    // When script(1) is gone nobody holds the terminal's other end.
    let code = signal_to(script, (&tool, "out"), 3, "-KILL");
    assert_eq!(code, Some(-9));
    let started = Instant::now();
    while !tool.read("log").contains("interrupted; step") {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{}",
            tool.read("log")
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    train(&tool, "out", &["--resume"])
        .exits(0)
        .says("going on after step");
    same(&tool, "whole", "out");
}

#[test]
fn the_reader_of_the_figures_may_go() {
    let tool = tool();
    let mut child = tool
        .command(&arguments("out", &[]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(lines(&tool.folder().join("out/metrics.jsonl")), 16);
    assert!(tool.folder().join("out/adapter_model.safetensors").exists());
}

#[test]
fn a_full_disk_on_standard_output_ends_no_training() {
    let tool = tool();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = tool
        .command(&arguments("out", &[]))
        .stdin(Stdio::null())
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.matches("No space left").count(), 2, "{said}");
    assert!(said.contains("the run goes on") && said.contains("the run is finished"));
    assert_eq!(lines(&tool.folder().join("out/metrics.jsonl")), 16);
    assert!(tool.folder().join("out/adapter_model.safetensors").exists());
}

/// What asks for a checkpoint and cannot be taken away ends no run, and what asks for one
/// in the last moments is not left behind.
#[test]
fn a_request_that_cannot_be_heeded_ends_nothing() {
    let tool = tool();
    train(&tool, "out", &[]).exits(0);
    let file = |name: &str| tool.folder().join("out").join(name);
    fs::remove_file(file("adapter_model.safetensors")).unwrap();
    fs::write(file("save-now"), "").unwrap();
    train(&tool, "out", &["--resume"]).exits(0);
    assert!(!file("save-now").exists());

    fs::remove_file(file("adapter_model.safetensors")).unwrap();
    fs::remove_dir_all(file("checkpoints/step-12")).unwrap();
    fs::create_dir_all(file("save-now/full")).unwrap();
    let run = train(&tool, "out", &["--resume"]).exits(0);
    assert_eq!(
        run.stderr.matches("it cannot be taken away").count(),
        1,
        "{run}"
    );
}

#[test]
fn a_checkpoint_can_be_asked_for() {
    let tool = tool();
    let config = CONFIG.replace("save_steps: 3", "save_steps: 0");
    tool.file("train.yaml", &config);
    train(&tool, "whole", &[]).exits(0);
    for (out, ask) in [("file", "touch"), ("signal", "-USR1")] {
        let mut child = tool
            .command(&arguments(out, &[]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = tool.folder().join(out).join("metrics.jsonl");
        while lines(&metrics) < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        if ask == "touch" {
            fs::write(tool.folder().join(out).join("save-now"), "").unwrap();
        } else {
            let _ = Command::new("kill")
                .args([ask, &child.id().to_string()])
                .status();
        }
        let mut said = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
        assert!(said.contains(" is saved"), "{said}");
        assert!(!tool.folder().join(out).join("save-now").exists());
        let saved = fs::read_dir(tool.folder().join(out).join("checkpoints"))
            .unwrap()
            .count();
        assert_eq!(saved, 2, "the one asked for and the last");
        same(&tool, "whole", out);
    }
}

/// A run in the evaluation before its first step, where its signals have handlers.
fn evaluating(tool: &Tool, out: &str) -> Child {
    let command = tool.command(&arguments(out, &["--threads", "1"]));
    let mut child = behind("env", &["--default-signal=HUP"], &command)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The last of them that gets a handler.
    while !heeds(child.id(), SIGHUP) && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    child
}

fn send(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status();
    assert!(sent.unwrap().success(), "ended before {signal}");
}

/// The end of a run that signals ended, and what it said.
fn ended(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    said
}

/// timeout(1) sends its signal twice, a closing terminal may send several: what comes
/// within a second is one wish.
#[test]
fn signals_at_once_are_one() {
    let tool = tool();
    let held_out = pairs(700).replace("\"train\"", "\"eval\"");
    tool.file("pairs.jsonl", &(pairs(6) + &held_out.replace("\"p", "\"e")));
    for signals in [
        ["-INT", "-INT"],
        ["-TERM", "-TERM"],
        ["-TERM", "-INT"],
        ["-HUP", "-TERM"],
        ["-HUP", "-HUP"],
    ] {
        let out = signals.concat().replace('-', "");
        let child = evaluating(&tool, &out);
        for signal in signals {
            send(&child, signal);
            std::thread::sleep(Duration::from_millis(20));
        }
        let said = ended(child);
        let name = signals[0].replace('-', "SIG");
        let begins = format!("{name}: ends in good order");
        assert!(said.contains(&begins), "{said}");
        let zero = tool.folder().join(&out).join("checkpoints/step-0");
        assert!(zero.exists(), "{out}: {said}");
    }
}

/// Who asks again after a second means it, and is told what there is; but not a terminal
/// that closes.
#[test]
fn a_second_signal_ends_it_at_once() {
    let tool = tool();
    let long = pairs(4000).replace("Day", &"All day ".repeat(12));
    let held_out = long.replace("\"train\"", "\"eval\"");
    tool.file("pairs.jsonl", &(pairs(6) + &held_out.replace("\"p", "\"e")));
    let started = Instant::now();
    let child = evaluating(&tool, "out");
    for (signal, pause) in [("-HUP", 1100), ("-HUP", 0), ("-TERM", 0)] {
        send(&child, signal);
        std::thread::sleep(Duration::from_millis(pause));
    }
    let said = ended(child);
    let told = "SIGTERM again: ended at once; there is no checkpoint yet";
    assert!(said.contains(told), "{said}");
    assert!(!tool.folder().join("out/checkpoints/step-0").exists());
    assert!(started.elapsed() < Duration::from_secs(60), "{said}");
}
