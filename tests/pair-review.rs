//! pair-review through the real binary: as a filter, and on a terminal of our own making,
//! whose screen an emulator (vt100) keeps.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Conventions, Tool, behind};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};

/// How long something may take to show on the screen.
const LIMIT: Duration = Duration::from_secs(30);

const TREES: &str = "We planted three more cherry trees along the river this weekend.";
const KEEPS: &str = "The late cherry keeps best, so leave room for one more of those.";

fn tool() -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_pair-review"))
}

fn pair(i: usize, tweet: &str, reply: &str) -> Value {
    json!({
        "v": 1, "id": format!("p{i}"), "conversation_id": format!("c{i}"), "tweet": tweet,
        "tweet_likes": 1204, "tweet_lang": "en", "tweet_created_at": "2026-03-17T08:06:00Z",
        "reply": reply, "reply_likes": 90 - i, "reply_author_followers": 339,
        "validation": {"v": 1, "language": "en", "reply_toxicity": 0.02, "quality": 0.621237},
    })
}

/// So many pairs, each of which says its number in both texts.
fn pairs(count: usize) -> String {
    let line = |i| {
        let [tweet, reply] = [TREES, KEEPS].map(|text| format!("{text} T{i}."));
        format!("{}\n", pair(i, &tweet, &reply))
    };
    (0..count).map(line).collect()
}

fn lines(text: &str) -> Vec<Value> {
    (text.lines())
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Decisions without a hash: they hold whatever the texts are.
fn by_hand(decisions: &[(&str, &str)]) -> String {
    let line = |(id, said): &(&str, &str)| match said.split_once(' ') {
        None => format!("{}\n", json!({"v": 1, "id": id, "decision": said})),
        Some((said, why)) => {
            format!(
                "{}\n",
                json!({"v": 1, "id": id, "decision": said, "reason": why})
            )
        }
    };
    decisions.iter().map(line).collect()
}

harness::conventions!(|| {
    let tool = tool();
    let decisions = by_hand(&[("p1", "reject off topic"), ("p2", "keep"), ("p9", "reject")]);
    let decisions = tool.file("review.jsonl", &decisions);
    let conventions = Conventions {
        arguments: vec!["--apply".into(), decisions],
        rejects: "--rejects",
        input: pairs(12),
        empty: 0,
        key: "review.order",
        passes_records: true,
    };
    (tool, conventions)
});

// ---- the filter

#[test]
fn rejected_pairs_go_and_all_others_pass_as_they_came() {
    let tool = tool();
    let decisions = by_hand(&[
        ("p1", "reject off topic"),
        ("p2", "keep"),
        ("p4", "reject"),
        ("p5", "reject spam"),
        ("p5", "undecided"),
        ("gone", "keep"),
    ]);
    tool.file("review.jsonl", &decisions);
    let input = pairs(8);
    let run = tool
        .run(&["--apply", "review.jsonl", "--rejects", "r.jsonl"], &input)
        .exits(0)
        .says("rejected for: no reason given 1, off topic 1")
        .says("1 kept, 5 not looked at\n")
        .says("1 decision on pairs that are not in the input (the first: gone)")
        .never_says("changed");
    let kept: String = (input.split_inclusive('\n').enumerate())
        .filter(|(i, _)| ![1, 4].contains(i))
        .map(|(_, line)| line)
        .collect();
    assert_eq!(run.stdout, kept);
    assert!(
        run.stderr.trim_end().ends_with("in 8, out 6, rejected 2"),
        "{run}"
    );
    let rejected = lines(&tool.read("r.jsonl"));
    assert_eq!(
        rejected[0]["rejected"],
        json!({"by": "pair-review", "reasons": [{"filter": "review", "detail": "off topic"}]})
    );
    assert_eq!(rejected[1]["id"], "p4");
    // What was rejected comes back without a trace of it once that was taken back.
    tool.file("review.jsonl", "");
    let back = tool
        .run(&["--apply", "review.jsonl"], &tool.read("r.jsonl"))
        .exits(0);
    assert!(
        back.records()
            .iter()
            .all(|row| row.get("rejected").is_none()),
        "{back}"
    );
    // Ids come from those of tweet and reply, as for pair-validate.
    tool.file("review.jsonl", &by_hand(&[("7-8", "reject")]));
    let other = "{\"tweet_id\":7,\"tweet\":\"a\",\"reply_id\":\"8\",\"reply\":\"b\"}\n";
    let run = tool.run(&["--apply", "review.jsonl"], other).exits(0);
    assert!(run.stdout.is_empty(), "{run}");
}

#[test]
fn what_a_person_typed_reaches_no_terminal_as_it_is() {
    let tool = tool();
    let reason = "reject \u{1b}[2J\u{202e}";
    tool.file("review.jsonl", &by_hand(&[("p1", reason)]));
    tool.run(&["--apply", "review.jsonl"], &pairs(2))
        .exits(0)
        .says("rejected for: \\u{1b}[2J\\u{202e} 1")
        .says("--rejects FILE");
}

#[test]
fn what_make_goes_by_changes_with_what_goes_alone() {
    let tool = tool();
    let key = |decisions: &[(&str, &str)]| {
        tool.file("review.jsonl", &by_hand(decisions));
        let arguments = ["--apply", "review.jsonl", "--print-config=key"];
        tool.run(&arguments, "").exits(0).stdout
    };
    assert_eq!(key(&[]), "");
    assert_eq!(key(&[("p1", "keep"), ("p2", "undecided")]), "");
    let one = key(&[("p1", "reject off topic")]);
    assert!(
        one.starts_with("rejected = ") && one.lines().count() == 1,
        "{one}"
    );
    assert_eq!(key(&[("p2", "keep"), ("p1", "reject spam")]), one);
    assert_ne!(key(&[("p2", "reject")]), one);
    assert_eq!(key(&[("p1", "reject"), ("p1", "undecided")]), "");
}

#[test]
fn wrong_use_names_the_remedy() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(2));
    tool.run::<&str>(&[], "").exits(2).says("--decisions");
    tool.run(&["pairs.jsonl"], "").exits(2).says("--decisions");
    tool.run(&["pairs.jsonl", "--apply", "r.jsonl"], "")
        .exits(2);
    tool.run(&["--apply", "r.jsonl", "--seed", "1"], "")
        .exits(2);
    tool.run(&["--apply", "none.jsonl"], &pairs(1))
        .exits(2)
        .says("--apply none.jsonl: No such file")
        .says("pair-review PAIRS --decisions none.jsonl makes it");
    tool.file(
        "r.jsonl",
        "{\"id\":\"p1\",\"decision\":\"keep\"}\n{\"id\":\"p1\"}\n",
    );
    tool.run(&["--apply", "r.jsonl"], &pairs(1))
        .exits(3)
        .says("r.jsonl:2: no decision: missing field `decision`");
    let newer = "{\"v\":2,\"id\":\"p1\",\"decision\":\"postpone\"}\n";
    tool.file("r.jsonl", newer);
    tool.run(&["--apply", "r.jsonl"], &pairs(1))
        .exits(3)
        .says("version 2 is newer");
    // Half a line is what a crash leaves, or somebody who is writing at this moment.
    tool.file(
        "r.jsonl",
        "{\"id\":\"p1\",\"decision\":\"reject\"}\n{\"id\":\"p0\",",
    );
    let run = tool.run(&["--apply", "r.jsonl"], &pairs(2)).exits(0);
    let run = run.says("r.jsonl: the last line was cut short");
    assert_eq!(run.records().len(), 1, "{run}");
}

/// No terminal at all, as in a pipeline of a machine: setsid(1) takes it away.
#[test]
fn without_a_terminal_it_says_what_to_do() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(2));
    let command = tool.command(&["pairs.jsonl", "--decisions", "r.jsonl"]);
    let alone = harness::Run::of(&mut behind("setsid", &["--wait"], &command), b"");
    alone
        .exits(2)
        .says("there is no terminal")
        .says("--apply FILE");
    assert!(!tool.folder().join("r.jsonl").exists());
}

// ---- the terminal

/// A process on a terminal, and the terminal.
struct Seat {
    child: Child,
    terminal: Arc<OwnedFd>,
    slave: OwnedFd,
    is_closing: Arc<AtomicBool>,
    screen: Arc<Mutex<(vt100::Parser, Vec<u8>)>>,
}

impl Seat {
    fn new(tool: &Tool, arguments: &[&str], (rows, columns): (u16, u16)) -> Self {
        Self::of(&tool.command(arguments), (rows, columns))
    }

    /// `command` with the terminal as its own, and as its standard streams.
    fn of(command: &Command, (rows, columns): (u16, u16)) -> Self {
        let terminal =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let open = || {
            let path = Path::new(name.to_str().unwrap());
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
        };
        let slave = open();
        tcsetwinsize(&terminal, size(rows, columns)).unwrap();
        // The tests themselves may run under nohup, where a child ignores hangups.
        let command = behind("env", &["--default-signal=HUP"], command);
        let child = behind("setsid", &["--ctty"], &command)
            .stdin(Stdio::from(open()))
            .stdout(Stdio::from(open()))
            .stderr(Stdio::from(open()))
            .spawn()
            .unwrap();
        let terminal = Arc::new(terminal);
        let parser = vt100::Parser::new(cells(rows), cells(columns), 0);
        let screen = Arc::new(Mutex::new((parser, Vec::new())));
        let (reader, seen) = (Arc::downgrade(&terminal), screen.clone());
        let is_closing = Arc::new(AtomicBool::new(false));
        let closing = is_closing.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Some(terminal) = reader.upgrade().filter(|_| !closing.load(Relaxed)) {
                use rustix::event::{PollFd, PollFlags, poll};
                let wait = rustix::time::Timespec {
                    tv_sec: 0,
                    tv_nsec: 50_000_000,
                };
                let ready = poll(&mut [PollFd::new(&*terminal, PollFlags::IN)], Some(&wait));
                if !matches!(ready, Ok(1..)) {
                    continue;
                }
                match rustix::io::read(&*terminal, &mut bytes) {
                    Ok(read) if read > 0 => {
                        let mut seen = seen.lock().unwrap();
                        seen.0.process(&bytes[..read]);
                        seen.1.extend(&bytes[..read]);
                    }
                    _ => break,
                }
            }
        });
        Self {
            child,
            terminal,
            slave,
            is_closing,
            screen,
        }
    }

    fn keys(&self, keys: &str) -> &Self {
        let mut bytes = keys.as_bytes();
        while !bytes.is_empty() {
            let written = rustix::io::write(&*self.terminal, bytes).unwrap();
            bytes = &bytes[written..];
        }
        self
    }

    fn screen(&self) -> String {
        self.screen.lock().unwrap().0.screen().contents()
    }

    /// All that was sent to the terminal.
    fn sent(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap().1).into_owned()
    }

    /// Waits until the screen shows a text.
    #[track_caller]
    fn shows(&self, text: &str) -> &Self {
        self.until(&format!("{text:?} is shown"), |screen| {
            screen.contains(text)
        })
    }

    #[track_caller]
    fn until(&self, what: &str, is: impl Fn(&str) -> bool) -> &Self {
        let begun = Instant::now();
        while !is(&self.screen()) {
            assert!(begun.elapsed() < LIMIT, "never: {what}\n{}", self.dump());
            thread::sleep(Duration::from_millis(5));
        }
        self
    }

    fn dump(&self) -> String {
        let screen = self.screen.lock().unwrap();
        let width = usize::from(screen.0.screen().size().1.get());
        let edge = "-".repeat(width);
        let rows = screen.0.screen().rows(0, width as u16);
        let rows: Vec<String> = rows.map(|row| format!("|{row}")).collect();
        format!("+{edge}\n{}\n+{edge}", rows.join("\n"))
    }

    fn resize(&self, rows: u16, columns: u16) -> &Self {
        self.screen
            .lock()
            .unwrap()
            .0
            .screen_mut()
            .set_size(cells(rows), cells(columns));
        tcsetwinsize(&*self.terminal, size(rows, columns)).unwrap();
        self
    }

    fn signal(&self, name: &str) -> &Self {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
        self
    }

    /// Waits for the process to end.
    #[track_caller]
    fn ends(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it said last may still be on its way.
                thread::sleep(Duration::from_millis(100));
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "never ends\n{}", self.dump());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether the terminal is as a shell wants it: lines, echo, its own screen, a cursor.
    fn is_restored(&self) -> bool {
        use rustix::termios::LocalModes;
        let modes = tcgetattr(self.slave.as_fd()).unwrap().local_modes;
        let screen = self.screen.lock().unwrap();
        let screen = screen.0.screen();
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
            && !screen.alternate_screen()
            && !screen.hide_cursor()
            && !screen.bracketed_paste()
    }

    #[track_caller]
    fn leaves(&mut self) -> &Self {
        self.keys("q");
        assert_eq!(self.ends().code(), Some(0), "{}", self.dump());
        assert!(self.is_restored(), "{}", self.sent());
        self
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).unwrap()
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

const LOOK: [&str; 3] = ["pairs.jsonl", "--decisions", "review.jsonl"];

fn seat(tool: &Tool, rows: u16, columns: u16) -> Seat {
    Seat::new(tool, &LOOK, (rows, columns))
}

fn decisions(tool: &Tool) -> Vec<(String, String, Value)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (lines(&tool.read("review.jsonl")).iter())
        .map(|line| {
            (
                text(&line["id"]),
                text(&line["decision"]),
                line["reason"].clone(),
            )
        })
        .collect()
}

fn said(of: &[(&str, &str, Option<&str>)]) -> Vec<(String, String, Value)> {
    (of.iter())
        .map(|(id, said, why)| (id.to_string(), said.to_string(), json!(why)))
        .collect()
}

#[test]
fn a_pair_is_shown_whole_with_all_that_is_known_of_it() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let mut seat = seat(&tool, 24, 80);
    seat.shows("decided 0 of 3, rejected 0");
    for text in [
        "pairs.jsonl",
        "1 of 3 · as read",
        "TWEET  1,204 likes · en · 2026-03-17 08:06",
        "We planted three more cherry trees along the river this weekend. T0.",
        "REPLY  90 likes · 339 followers · en · toxicity 0.02",
        "The late cherry keeps best, so leave room for one more of those. T0.",
        "quality 0.621 · id p0",
        "undecided",
        "k keep  r reject  ? help  q leave",
    ] {
        seat.shows(text);
    }
    seat.leaves();
    seat.shows("decided on 0 of 3 pairs: 0 kept, 0 rejected, in review.jsonl");
    assert_eq!(tool.read("review.jsonl"), "");
}

#[test]
fn keys_do_what_the_help_says() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(6));
    let mut seat = seat(&tool, 24, 80);
    seat.shows("1 of 6")
        .keys("?")
        .shows("keep; also space and Enter")
        .keys("x");
    // Three ways to keep, and two to reject.
    seat.shows("T0.")
        .keys("k")
        .shows("T1.")
        .keys(" ")
        .shows("T2.")
        .keys("\r")
        .shows("T3.");
    seat.keys("r").shows("Why?").shows("7 nonsense or broken");
    seat.keys("2\r")
        .shows("T4.")
        .shows("decided 4 of 6, rejected 1");
    // One that begins with a digit is no choice, and what follows no keys.
    seat.keys("r")
        .shows("Why?")
        .keys("18+ my own 🌞 wörds\u{7f}\u{7f}ds\r");
    seat.shows("T5.").shows("decided 5 of 6, rejected 2");
    let mut expected = vec![
        ("p0", "keep", None),
        ("p1", "keep", None),
        ("p2", "keep", None),
        ("p3", "reject", Some("hostile or hurtful")),
        ("p4", "reject", Some("18+ my own 🌞 wörds")),
    ];
    assert_eq!(decisions(&tool), said(&expected));
    // The last once more; then back, where what was said stands below.
    seat.keys("R")
        .shows("all pairs are decided on")
        .shows("decided 6 of 6, rejected 3");
    expected.push(("p5", "reject", Some("18+ my own 🌞 wörds")));
    seat.keys("\u{1b}[D")
        .shows("T4.")
        .shows("REJECTED  18+ my own 🌞 wörds");
    seat.keys("\u{1b}[D")
        .shows("T3.")
        .shows("REJECTED  hostile or hurtful");
    seat.keys("\u{1b}[D").shows("T2.").shows("KEPT");
    // Another decision takes the place of that one; undoing brings it back.
    seat.keys("r\r")
        .shows("T3.")
        .keys("\u{1b}[D")
        .shows("T2.")
        .shows("REJECTED");
    expected.push(("p2", "reject", None));
    seat.keys("\u{1b}[C").shows("T3.");
    seat.keys("u").shows("Undone").shows("T2.").shows("KEPT");
    expected.push(("p2", "keep", None));
    seat.keys("u")
        .shows("T5.")
        .shows("undecided")
        .shows("decided 5 of 6");
    expected.push(("p5", "undecided", None));
    assert_eq!(decisions(&tool), said(&expected));
    seat.keys("\u{1b}[H")
        .shows("T0.")
        .keys("n")
        .shows("T5.")
        .keys("n")
        .shows("only one left");
    seat.keys("\u{1b}[H")
        .shows("T0.")
        .keys("\u{1b}[F")
        .shows("T5.");
    // Giving up half-way decides nothing.
    seat.keys("r")
        .shows("Why?")
        .keys("abc\u{1b}")
        .until("no question", |s| !s.contains("Why?"));
    seat.keys("r")
        .shows("Why?")
        .keys("8\r")
        .shows("There is no 8")
        .keys("\u{1b}");
    seat.until("no question", |s| !s.contains("Why?"))
        .keys("z")
        .shows("No key of this tool");
    seat.keys("i")
        .shows("\"reply_author_followers\": 339")
        .keys("x")
        .shows("decided 5 of 6");
    seat.leaves();
    assert_eq!(decisions(&tool), said(&expected));
    let last = lines(&tool.read("review.jsonl")).pop().unwrap();
    assert_eq!(last["v"], 1);
    assert_eq!(last["text"].as_str().unwrap().len(), 16);
    assert!(last["at"].as_str().unwrap().ends_with('Z'), "{last}");
    seat.shows("decided on 5 of 6 pairs: 3 kept, 2 rejected, in review.jsonl");
    // And the filter takes its word.
    let run = tool
        .run(&["--apply", "review.jsonl"], &pairs(6))
        .exits(0)
        .never_says("changed");
    let left: Vec<_> = run.records().iter().map(|row| row["id"].clone()).collect();
    assert_eq!(left, ["p0", "p1", "p2", "p5"]);
}

#[test]
fn pairs_are_narrowed_down_and_sorted() {
    let tool = tool();
    let odd = pair(6, "Whose ÖTZI is that?", "Nobody's.").to_string();
    tool.file("pairs.jsonl", &format!("{}{odd}\n", pairs(6)));
    tool.file(
        "review.jsonl",
        &by_hand(&[("p1", "reject spam"), ("p2", "keep"), ("p3", "reject")]),
    );
    let mut seat = seat(&tool, 24, 80);
    seat.shows("1 of 7").shows("T0.");
    seat.keys("f")
        .shows("1 of 4 undecided")
        .keys("f")
        .shows("1 of 1 kept")
        .shows("T2.");
    seat.keys("f")
        .shows("2 rejected")
        .shows("T3.")
        .keys("\u{1b}[D")
        .shows("T1.")
        .shows("spam");
    seat.keys("\u{1b}").shows("2 of 7 · as read");
    // The last of those shown is decided on, and others before it are left.
    seat.keys("f")
        .shows("undecided")
        .keys("\u{1b}[F")
        .shows("4 of 4 undecided");
    seat.keys("k")
        .shows("3 of 3 undecided")
        .shows("That was the last one here; 3 undecided");
    seat.keys("u")
        .shows("4 of 4 undecided")
        .keys("\u{1b}")
        .shows("7 of 7 · as read");
    seat.keys("/")
        .keys("ötzi\r")
        .shows("1 of 1, “ötzi”")
        .shows("Whose ÖTZI is that?");
    seat.keys("/")
        .keys("nowhere\r")
        .shows("No pair holds that text");
    // Nothing is there to decide on.
    seat.keys("k").keys("r").keys("\u{1b}").shows("7 of 7");
    // By likes, which fall as the number rises; then the other way round, by choosing again.
    seat.keys("o").shows("Order by?").shows("3 reply_likes");
    seat.keys("3\r")
        .shows("1 of 7 · lowest reply_likes first")
        .shows("Whose ÖTZI");
    seat.keys("o")
        .shows("Order by?")
        .keys("3\r")
        .shows("highest reply_likes first")
        .shows("T0.");
    seat.keys("o")
        .shows("Order by?")
        .keys("no.such\r")
        .shows("no pair has a field `no.such`");
    seat.keys("o")
        .shows("Order by?")
        .keys("2\r")
        .shows("random");
    seat.leaves();
    assert_eq!(lines(&tool.read("review.jsonl")).len(), 5);
}

#[test]
fn an_order_comes_from_flag_and_settings() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(40));
    let first = |arguments: &[&str]| {
        let arguments = [&LOOK, arguments].concat();
        let mut seat = Seat::new(&tool, &arguments, (24, 80));
        // What is drawn last.
        seat.shows("? help");
        let screen = seat.screen();
        seat.leaves();
        screen
    };
    assert!(first(&["--order", "reply_likes"]).contains("T39."));
    assert!(first(&["--order", "-reply_likes"]).contains("T0."));
    let [one, again, other] =
        ["7", "7", "8"].map(|seed| first(&["--order", "random", "--seed", seed]));
    assert_eq!(one, again);
    assert_ne!(one, other);
    let yaml = "review: {order: reply_likes, reasons: [a, b]}\n";
    let yaml = tool.file("data.yaml", yaml);
    assert!(first(&["--config", &yaml]).contains("T39."));
    let mut seat = Seat::new(&tool, &[&LOOK[..], &["--order=likes"]].concat(), (24, 80));
    assert_eq!(seat.ends().code(), Some(2));
    seat.shows("(--order): no pair has a field `likes`");
    assert!(!seat.sent().contains("\u{1b}["), "{:?}", seat.sent());
    let yaml = tool.file("many.yaml", "review: {reasons: [a,b,c,d,e,f,g,h,i,j]}\n");
    let mut seat = Seat::new(&tool, &[&LOOK[..], &["--config", &yaml]].concat(), (24, 80));
    assert_eq!(seat.ends().code(), Some(2));
    seat.shows("many.yaml:1: review.reasons has 10 entries");
}

/// A text that does not fit is seen whole by scrolling, word for word.
#[test]
fn long_texts_are_read_by_scrolling() {
    let tool = tool();
    let words = |name: &str| (0..120).map(|i| format!("{name}{i}")).collect::<Vec<_>>();
    let [tweet, reply] = ["tweet", "reply"].map(|name| words(name).join(" "));
    let long = pair(0, &tweet, &reply);
    tool.file(
        "pairs.jsonl",
        &format!("{long}\n{}", pairs(2).lines().last().unwrap()),
    );
    for (rows, columns) in [(24, 80), (20, 40), (12, 30), (50, 200)] {
        let mut seat = seat(&tool, rows, columns);
        seat.shows("decided 0 of 2");
        let mut left: Vec<String> = [words("tweet"), words("reply")].concat();
        left.push("p0".into());
        let begun = Instant::now();
        while !left.is_empty() {
            let screen = seat.screen();
            let on_it: Vec<&str> = screen.split_whitespace().collect();
            left.retain(|word| !on_it.contains(&&**word));
            seat.keys("\u{1b}[B");
            thread::sleep(Duration::from_millis(10));
            assert!(
                begun.elapsed() < LIMIT,
                "{columns}: never shown: {left:?}\n{}",
                seat.dump()
            );
        }
        if rows < 50 {
            seat.keys("\u{1b}[6~".repeat(60).as_str()).shows("above");
            seat.keys("\u{1b}[5~".repeat(60).as_str())
                .shows("below")
                .shows("TWEET");
        }
        // The next pair begins at its beginning.
        seat.keys("\u{1b}[C").shows("TWEET").shows("T1.");
        seat.leaves();
    }
}

#[test]
fn a_small_screen_has_all_that_is_needed() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let mut seat = seat(&tool, 20, 40);
    seat.shows("decided 0 of 3, rejected 0");
    for text in [
        "1 of 3",
        "cherry trees",
        "T0.",
        "room for one more of those",
        "id p0",
        "? help",
        "q leave",
    ] {
        seat.shows(text);
    }
    seat.keys("r")
        .shows("Why?")
        .shows("1 off topic")
        .shows("TWEET");
    seat.keys("1\r")
        .shows("T1.")
        .shows("rejected 1")
        .keys("?")
        .shows("q         leave");
    seat.keys("x").shows("T1.");
    // Larger, smaller, and so small that nothing fits.
    seat.resize(30, 120)
        .shows("n undecided  / search  f filter  o order");
    seat.until("the text is on one line", |screen| {
        screen
            .lines()
            .any(|line| line.trim_end().ends_with("this weekend. T1."))
    });
    for (rows, columns) in [(2, 3), (1, 1), (4, 8), (5, 12), (6, 20)] {
        seat.resize(rows, columns);
        for keys in [
            "?", "x", "r", "\u{1b}", "o", "\u{1b}", "/", "\u{1b}", "i", "x",
        ] {
            seat.keys(keys);
            thread::sleep(Duration::from_millis(20));
        }
    }
    seat.resize(24, 80).shows("T1.").shows("decided 1 of 3");
    seat.leaves();
}

/// Emulators do not agree on the widths of some emoji: this one, which reckons each part of
/// them by itself, still gets every word.
#[test]
fn texts_of_all_scripts_are_whole() {
    let tool = tool();
    let tweet = "👩‍👩‍👧‍👦 family ❤️ heart 👍🏽 thumb 1️⃣ key 🇩🇪 flag é\u{301}cole 春眠不覚暁処処聞啼鳥夜来風雨声花落知多少";
    let reply = "שלום עולם and مرحبا بالعالم, नमस्ते दुनिया, สวัสดี, می‌خواهم";
    tool.file("pairs.jsonl", &format!("{}\n", pair(0, tweet, reply)));
    for (rows, columns) in [(24, 80), (20, 40)] {
        let mut seat = seat(&tool, rows, columns);
        seat.shows("decided 0 of 1");
        for word in [
            "family",
            "heart",
            "thumb",
            "key",
            "flag",
            "cole",
            "שלום",
            "עולם",
            "مرحبا",
            "नमस्ते",
            "สวัสดี",
            "می‌خواهم",
        ] {
            seat.shows(word);
        }
        let shown = seat.screen().replace(['\n', ' '], "");
        assert!(
            shown.contains("春眠不覚暁処処聞啼鳥夜来風雨声花落知多少"),
            "{}",
            seat.dump()
        );
        seat.leaves();
    }
}

/// What strangers wrote is shown, and the terminal obeys none of it.
#[test]
fn no_escape_sequence_reaches_the_terminal() {
    let tool = tool();
    let evil = "a\u{1b}[2J\u{1b}]0;owned\u{7}\u{1b}[?1049l\u{9b}31m\r\u{8}\u{0}\u{7f}b\u{202e}c\u{2066}d\u{200b}e\u{e0041}f\u{feff}";
    let mut row = pair(0, &format!("tweet {evil}"), &format!("reply {evil}"));
    for key in [
        "tweet_lang",
        "tweet_created_at",
        "source",
        "split",
        "tweet_replies",
        evil,
    ] {
        row[key] = json!(evil);
    }
    row["validation"]["language"] = json!(evil);
    row["id"] = json!("id\u{202e}id");
    let name = "pairs\u{1b}[31m.jsonl";
    tool.file(name, &format!("{row}\n"));
    let reason = format!("reject {evil}");
    tool.file("review.jsonl", &by_hand(&[("id\u{202e}id", &reason)]));
    // What YAML takes of it.
    let yaml = json!({"review": {"reasons": ["a\u{1b}[2J\u{202e}b"]}}).to_string();
    let yaml = yaml.replace('\u{202e}', "\\u202e");
    let yaml = tool.file("data.yaml", &yaml);
    let arguments = [name, "--decisions", "review.jsonl", "--config", &yaml];
    let mut seat = Seat::new(&tool, &arguments, (40, 120));
    seat.shows("REJECTED");
    let shown = concat!(
        "a<U+001B>[2J<U+001B>]0;owned<U+0007><U+001B>[?1049l<U+009B>31m<U+000D><U+0008>",
        "<U+0000><U+007F>b<U+202E>c<U+2066>d<U+200B>e<U+E0041>f<U+FEFF>",
    );
    seat.until("both texts are shown", |screen| {
        let screen = screen.replace([' ', '\n'], "");
        ["tweet", "reply"]
            .iter()
            .all(|text| screen.contains(&format!("{text}{shown}")))
    });
    seat.keys("i")
        .shows("\"reply\"")
        .keys("x")
        .shows("REJECTED");
    seat.keys("r")
        .shows("Why?")
        .shows("1 a<U+001B>[2J")
        .keys("\u{1b}");
    seat.until("no question", |screen| !screen.contains("Why?"));
    seat.keys("/")
        .keys("\u{1b}[200~x\u{1b}[201~")
        .keys("\r")
        .shows("No pair holds");
    seat.keys("\u{1b}").shows("REJECTED").keys("R");
    seat.shows("Why?").keys("1\r").shows("That was the last");
    seat.leaves();
    let sent = seat.sent();
    // Beside what the tool says itself there are only these: positions, styles, modes.
    let mut rest = sent.as_str();
    while let Some(at) = rest.find('\u{1b}') {
        rest = &rest[at + 1..];
        let body = rest
            .strip_prefix('[')
            .unwrap_or_else(|| panic!("ESC {:?}", &rest[..9]));
        let end = body.find(|c: char| c.is_ascii_alphabetic()).unwrap();
        let (numbers, letter) = (&body[..end], &body[end..=end]);
        let ours = match letter {
            "H" | "m" => numbers.chars().all(|c| c.is_ascii_digit() || c == ';'),
            "J" => numbers == "2",
            "h" | "l" => ["?1049", "?7", "?2004", "?25", "?2026"].contains(&numbers),
            _ => false,
        };
        assert!(ours, "ESC [{numbers}{letter}");
        rest = &body[end + 1..];
    }
    let leaves = sent.matches("\u{1b}[?1049l").count();
    assert_eq!(leaves, 1, "only the tool itself leaves the screen");
    let odd = |c: &char| {
        (c.is_control() && !"\u{1b}\r\n".contains(*c))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200b}' | '\u{e0041}' | '\u{feff}')
    };
    assert_eq!(sent.chars().filter(odd).collect::<String>(), "");
    // The line ends are those of the last message, in our own words.
    let screen = &sent[..sent.find("\u{1b}[?1049l").unwrap()];
    assert!(!screen.contains(['\r', '\n']), "{screen:?}");
}

#[test]
fn what_is_pasted_is_no_key() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let mut seat = seat(&tool, 24, 80);
    seat.shows("1 of 3")
        .keys("\u{1b}[200~kkqr1\r\u{1b}[201~")
        .shows("What is pasted does nothing");
    seat.keys("r")
        .shows("Why?")
        .keys("\u{1b}[200~1\nqk\u{1b}[201~")
        .shows("reason: 1 qk");
    seat.keys("\r").shows("decided 1 of 3");
    seat.leaves();
    assert_eq!(decisions(&tool), said(&[("p0", "reject", Some("1 qk"))]));
}

#[test]
fn a_killed_review_goes_on_where_it_was() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(9));
    // Cut off in its first line of all.
    tool.file("review.jsonl", "{\"v\":1,\"id\":\"p8\",\"deci");
    for round in 0..3 {
        let mut seat = seat(&tool, 24, 80);
        seat.shows(&format!("decided {} of 9", 2 * round));
        // The end of a line that a crash cut off is told, and no decision.
        let (at, next) = (2 * round, 2 * round + 1);
        seat.shows(&format!("T{at}."))
            .keys("k")
            .shows(&format!("T{next}."))
            .keys("r");
        seat.shows("Why?")
            .keys("1\r")
            .shows(&format!("decided {} of 9", at + 2));
        seat.signal("-KILL");
        seat.ends();
        let mut file = File::options()
            .append(true)
            .open(tool.path("review.jsonl"))
            .unwrap();
        file.write_all(b"{\"v\":1,\"id\":\"p8\",\"deci").unwrap();
    }
    let mut seat = seat(&tool, 24, 80);
    seat.shows("decided 6 of 9, rejected 3")
        .shows("T6.")
        .keys("k")
        .shows("decided 7 of 9");
    // Two at once would write over each other.
    let mut second = self::seat(&tool, 24, 80);
    assert_eq!(second.ends().code(), Some(4));
    second.shows("review.jsonl: another pair-review is at work here");
    seat.leaves();
    assert_eq!(lines(&tool.read("review.jsonl")).len(), 7);
}

#[test]
fn a_text_that_changed_is_to_be_looked_at_again() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let mut seat = seat(&tool, 24, 80);
    seat.shows("T0.")
        .keys("r")
        .shows("Why?")
        .keys("1\r")
        .shows("T1.")
        .keys("k")
        .shows("T2.");
    seat.leaves();
    let changed = pairs(3).replace("T0.", "T0, edited.");
    let run = tool.run(&["--apply", "review.jsonl"], &changed).exits(0);
    let run = run.says("1 decision (1 to reject) not applied: the texts have changed since");
    assert_eq!(run.stdout, changed);
    // Other fields may change as they like.
    let liked = pairs(3).replace(":1204,", ":9,");
    let run = tool
        .run(&["--apply", "review.jsonl"], &liked)
        .exits(0)
        .never_says("changed");
    assert_eq!(run.records().len(), 2);
    tool.file("pairs.jsonl", &changed);
    let mut seat = self::seat(&tool, 24, 80);
    seat.shows("T0, edited.")
        .shows("undecided  its texts have changed since it was rejected");
    seat.keys("k").shows("decided 2 of 3");
    seat.leaves();
    let run = tool
        .run(&["--apply", "review.jsonl"], &changed)
        .exits(0)
        .never_says("changed");
    assert_eq!(run.stdout, changed);
    let old = tool.run(&["--apply", "review.jsonl"], &pairs(3)).exits(0);
    assert_eq!(
        old.records().len(),
        2,
        "what was said of the old text still holds for it"
    );
}

#[test]
fn signals_end_it_in_good_order() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    for name in ["-TERM", "-HUP", "-INT"] {
        let mut seat = seat(&tool, 24, 80);
        seat.shows("decided 0 of 3").signal(name);
        assert_eq!(seat.ends().code(), Some(130), "{name}");
        assert!(seat.is_restored(), "{name}: {}", seat.sent());
        seat.shows(&format!("SIG{}: every decision is kept", &name[1..]));
    }
    let mut seat = seat(&tool, 24, 80);
    seat.shows("decided 0 of 3").keys("\u{3}");
    assert_eq!(seat.ends().code(), Some(130));
    assert!(seat.is_restored());
    // Stopped from elsewhere, it takes the terminal over again when it goes on.
    let mut seat = self::seat(&tool, 24, 80);
    seat.shows("? help").signal("-STOP").signal("-CONT");
    let again = || seat.sent().matches("\u{1b}[?1049h").count() == 2;
    seat.until("the terminal is taken again", |_| again())
        .keys("?")
        .shows("this page");
    seat.keys("x").shows("? help");
    seat.leaves();
    // The window was closed: there is nothing to read any more, and no end of trying.
    let mut seat = self::seat(&tool, 24, 80);
    seat.shows("decided 0 of 3")
        .keys("k")
        .shows("decided 1 of 3");
    let (reader, _) = std::io::pipe().unwrap();
    let closed = std::mem::replace(&mut seat.terminal, Arc::new(reader.into()));
    seat.is_closing.store(true, Relaxed);
    while Arc::strong_count(&closed) > 1 {
        thread::sleep(Duration::from_millis(1));
    }
    drop(closed);
    assert_eq!(seat.ends().code(), Some(130));
    assert_eq!(decisions(&tool), said(&[("p0", "keep", None)]));
}

#[allow(dead_code)]
#[path = "../tools/pair-review/src/terminal.rs"]
mod terminal;

/// Started by the test below, in a process of its own.
#[test]
#[ignore = "panics"]
fn panics_with_the_terminal_taken() {
    let mut terminal = terminal::Terminal::open(terminal::Terminal::find().unwrap()).unwrap();
    terminal.draw(|_| ()).unwrap();
    panic!("a bug");
}

#[test]
fn a_panic_leaves_the_terminal_as_it_was() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "panics_with_the_terminal_taken",
        "--ignored",
        "--nocapture",
    ]);
    let mut seat = Seat::of(command.env("RUST_BACKTRACE", "0"), (24, 80));
    assert_eq!(seat.ends().code(), Some(101));
    assert!(
        seat.sent().contains("\u{1b}[?1049h") && seat.is_restored(),
        "{}",
        seat.sent()
    );
    // Behind the end of its screen, so that it can be read.
    seat.shows("a bug");
}

/// Under a shell with jobs, as Ctrl-Z is used.
#[test]
fn it_can_be_left_for_a_while() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let mut shell = Command::new("bash");
    shell
        .args(["--norc", "-i"])
        .current_dir(tool.folder())
        .env("PS1", "shell> ");
    shell.env("LOOK", tool.command(&LOOK).get_program());
    let mut seat = Seat::of(&shell, (24, 80));
    seat.shows("shell> ")
        .keys("\"$LOOK\" pairs.jsonl --decisions review.jsonl\r");
    seat.shows("T0.")
        .keys("k")
        .shows("T1.")
        .keys("\u{1a}")
        .shows("Stopped");
    assert!(!seat.screen.lock().unwrap().0.screen().alternate_screen());
    seat.keys("echo still $((20 + 3))\r").shows("still 23");
    seat.keys("fg\r")
        .shows("T1.")
        .shows("decided 1 of 3")
        .keys("k")
        .shows("T2.");
    seat.keys("q").shows("decided on 2 of 3").keys("exit\r");
    seat.ends();
}

#[test]
fn a_full_disk_is_told_and_nothing_counts_that_is_not_kept() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(4));
    let command = tool.command(&LOOK);
    // One block of 512 bytes (dash's unit): room for four decisions or so, and no fifth.
    let limited = behind("sh", &["-c", "ulimit -f 1; exec \"$@\"", "-"], &command);
    let mut seat = Seat::of(&limited, (24, 80));
    seat.shows("T0.");
    for at in 0..3 {
        seat.keys(&format!("r{}\r", "x".repeat(60)))
            .shows(&format!("T{}.", at + 1));
        if lines(&tool.read("review.jsonl")).len() > at + 1 {
            panic!("too many");
        }
        if tool.read("review.jsonl").len() > 330 {
            break;
        }
    }
    let had = tool.read("review.jsonl");
    let place = seat.screen().lines().next().unwrap().to_owned();
    seat.keys(&format!("r{}\r", "y".repeat(150)))
        .shows("NOT KEPT: writing review.jsonl");
    assert_eq!(
        seat.screen().lines().next().unwrap(),
        place,
        "it goes on as if kept"
    );
    assert_eq!(tool.read("review.jsonl"), had);
    seat.leaves();
}

/// Standard input and output are the caller's: pairs may come through a pipe.
#[test]
fn the_terminal_is_neither_input_nor_output() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(3));
    let command = tool.command(&["-", "--decisions", "review.jsonl"]);
    let piped = "cat pairs.jsonl | \"$@\" > out";
    let mut seat = Seat::of(&behind("bash", &["-c", piped, "-"], &command), (24, 80));
    seat.shows("1 of 3").keys("k").shows("T1.");
    seat.leaves();
    assert_eq!(tool.read("out"), "");
    assert_eq!(decisions(&tool), said(&[("p0", "keep", None)]));
    let mut seat = Seat::new(&tool, &["-", "--decisions", "review.jsonl"], (24, 80));
    assert_eq!(seat.ends().code(), Some(2));
    seat.shows("standard input is the terminal");
}

#[test]
fn colours_are_no_news() {
    let colour = |sent: &str| {
        let mut styles = sent
            .split("\u{1b}[")
            .filter_map(|part| part.split_once('m'));
        styles.any(|(numbers, _)| {
            numbers.starts_with("38;5;") || matches!(numbers, "31" | "32" | "36")
        })
    };
    for (value, coloured) in [("", true), ("1", false)] {
        let tool = tool().env("NO_COLOR", value);
        tool.file("pairs.jsonl", &pairs(2));
        let mut seat = seat(&tool, 24, 80);
        seat.shows("T0.")
            .keys("r")
            .shows("Why?")
            .keys("1\r")
            .shows("T1.")
            .keys("\u{1b}[D");
        seat.shows("REJECTED  off topic");
        seat.leaves();
        assert_eq!(
            colour(&seat.sent()),
            coloured,
            "NO_COLOR={value:?}: {:?}",
            seat.sent()
        );
    }
}

#[test]
fn what_cannot_be_looked_at_is_told_before_the_screen_is_taken() {
    let tool = tool();
    tool.file("pairs.jsonl", &pairs(2));
    tool.file("mine.txt", "precious\n");
    tool.file("bad.jsonl", &format!("{}{{\n", pairs(1)));
    tool.file("empty.jsonl", "\n");
    for (arguments, code, text) in [
        (
            ["pairs.jsonl", "pairs.jsonl"],
            2,
            "is the file of PAIRS too",
        ),
        (
            ["pairs.jsonl", "mine.txt"],
            2,
            "is there and holds something else",
        ),
        (
            ["pairs.jsonl", "none/r.jsonl"],
            2,
            "there is no folder none",
        ),
        (["none.jsonl", "r.jsonl"], 2, "none.jsonl: No such file"),
        (["bad.jsonl", "r.jsonl"], 3, "bad.jsonl:2: "),
        (
            ["empty.jsonl", "r.jsonl"],
            3,
            "empty.jsonl: there is no pair in it",
        ),
    ] {
        let [pairs, decisions] = arguments;
        let mut seat = Seat::new(&tool, &[pairs, "--decisions", decisions], (24, 80));
        assert_eq!(
            seat.ends().code(),
            Some(code),
            "{arguments:?}\n{}",
            seat.dump()
        );
        seat.shows(text);
        assert!(!seat.sent().contains("\u{1b}["), "{:?}", seat.sent());
        assert!(!tool.folder().join("r.jsonl").exists(), "{arguments:?}");
    }
    let more = [
        "bad.jsonl",
        "--decisions",
        "r.jsonl",
        "--max-bad-lines",
        "1",
        "--rejects",
        "bad",
    ];
    let mut seat = Seat::new(&tool, &more, (24, 80));
    seat.shows("1 of 1");
    seat.leaves();
    assert!(tool.read("bad").contains("\"bad_line\""));
}

/// Each in a shell on a terminal, where a person leaves what there is to look at.
#[test]
fn the_examples_of_the_help_run() {
    let tool = tool();
    let help = tool.run(&["--help"], "").exits(0).stdout;
    let examples: Vec<&str> = (help.lines())
        .filter_map(|line| line.trim_start().strip_prefix("$ "))
        .collect();
    assert!(examples.len() > 3, "{help}");
    tool.file("valid.jsonl", &pairs(4));
    let command = tool.command::<&str>(&[]);
    let binary = Path::new(command.get_program()).parent().unwrap().display();
    for example in examples {
        let mut shell = Command::new("bash");
        shell
            .args(["-eu", "-o", "pipefail", "-c", example])
            .current_dir(tool.folder());
        shell.env(
            "PATH",
            format!("{binary}:{}", std::env::var("PATH").unwrap()),
        );
        let mut seat = Seat::of(&shell, (24, 80));
        if example.contains("--decisions") {
            seat.shows("of 4").keys("k").shows("decided ");
            seat.leaves();
        } else {
            assert_eq!(seat.ends().code(), Some(0), "{example}\n{}", seat.dump());
            assert_eq!(tool.read("kept.jsonl"), pairs(4));
        }
    }
    let mut nothing = String::new();
    File::open(tool.path("reviewed.jsonl"))
        .unwrap()
        .read_to_string(&mut nothing)
        .unwrap();
    assert_eq!(nothing, "");
}

/// A last line without its end is a decision, where somebody wrote it so; and a file that is
/// none of ours is left alone.
#[test]
fn a_last_decision_without_a_lines_end_counts() {
    let tool = tool();
    let pairs = json!({"id": "p0", "tweet": "a", "reply": "only copy", "v": 1}).to_string();
    let rejected = r#"{"id":"p0","decision":"reject"}"#;
    tool.file("r.jsonl", rejected);
    let run = tool
        .run(&["--apply", "r.jsonl"], &(pairs.clone() + "\n"))
        .exits(0);
    assert_eq!(run.never_says("cut short").stdout, "");
    tool.file("torn.jsonl", &rejected[..20]);
    let run = tool
        .run(&["--apply", "torn.jsonl"], &(pairs + "\n"))
        .exits(0);
    assert_eq!(run.says("cut short").records().len(), 1);

    let only = r#"{"v":1,"id":"1","tweet":"a","reply":"only copy"}"#;
    tool.file("valid.jsonl", only);
    let mut seat = Seat::new(
        &tool,
        &["valid.jsonl", "--decisions", "valid.jsonl"],
        (24, 80),
    );
    assert_eq!(seat.ends().code(), Some(2), "{}", seat.dump());
    assert_eq!(tool.read("valid.jsonl"), only);
}
