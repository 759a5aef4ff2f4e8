//! The conventions that hold for every tool that reads and writes records.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use crate::{Run, Tool, behind};

/// What the shared checks need to know of a tool. See [`crate::conventions!`].
pub struct Conventions {
    /// Arguments of an ordinary run that reads standard input.
    pub arguments: Vec<String>,
    /// The flag whose file takes refused records and malformed lines.
    pub rejects: &'static str,
    /// Standard input of that run: records that lead to some output.
    pub input: String,
    /// Exit code for empty input: 0 for a filter, 3 for a tool that needs some.
    pub empty: i32,
    /// A key of this tool's settings, such as `training.seed`.
    pub key: &'static str,
    /// Whether the input records leave as output records, unknown fields and all.
    pub passes_records: bool,
}

impl Conventions {
    fn with(&self, more: &[&str]) -> Vec<String> {
        self.arguments
            .iter()
            .cloned()
            .chain(more.iter().map(|s| s.to_string()))
            .collect()
    }

    /// The reader of standard output goes away: exit 0 and not a word of it.
    pub fn reader_gone(&self, tool: &Tool) {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let run = tool.run_to(writer, &self.with(&["--quiet"]), &self.input);
        run.exits(0)
            .never_says("pipe")
            .never_says("panicked")
            // Nor a summary, where nobody takes what it counts.
            .never_says(": in ");
    }

    /// Standard output is full: exit 4, and the message says so.
    pub fn disk_full(&self, tool: &Tool) {
        let full = File::options().write(true).open("/dev/full");
        tool.run_to(full.expect("/dev/full"), &self.arguments, &self.input)
            .exits(4)
            .says("No space left");
    }

    /// A malformed line: exit 3, naming file and line. `--max-bad-lines 1` lets it
    /// pass into the rejects file, and is refused without one.
    pub fn bad_line(&self, tool: &Tool) {
        let bad = format!("{}{{\"v\":1,\n", self.input);
        let line = bad.lines().count();
        tool.run(&self.arguments, &bad)
            .exits(3)
            .says(&format!("-:{line}: "));
        tool.run(&self.with(&["--max-bad-lines", "1"]), &bad)
            .exits(2)
            .says(self.rejects);
        let allowed = ["--max-bad-lines", "1", self.rejects, "kept.jsonl"];
        tool.run(&self.with(&allowed), &bad).exits(0);
        let kept = tool.read("kept.jsonl");
        let kept = kept.lines().find(|l| l.contains("\"bad_line\""));
        let place = format!("\"line\":{line}");
        assert!(kept.is_some_and(|l| l.contains(&place)), "{kept:?}");
        let newer = format!(
            "{{\"v\":99,{}",
            self.input.trim_start().trim_start_matches('{')
        );
        if self.passes_records {
            let newer = newer.replacen("\"v\":1,", "", 1);
            tool.run(&self.arguments, &newer)
                .exits(3)
                .says("-:1: ")
                .says("99");
        }
    }

    /// A file to write that is the input's, the output's or a folder: exit 2, and
    /// nothing is lost. Nor is the input the output, which would have no end.
    pub fn files_apart(&self, tool: &Tool) {
        let input = tool.file("self.jsonl", &self.input);
        let with_rejects = self.with(&[self.rejects, &input]);
        let from_itself = || Stdio::from(File::open(&input).expect("the input"));
        let onto_itself = || {
            let file = File::options().append(true).open(&input);
            Stdio::from(file.expect("the input"))
        };
        // One that goes wrong here must not fill the disk.
        let limited = ["-c", "ulimit -f 1024; exec \"$@\"", "-"];
        for (arguments, stdin, stdout) in [
            (&with_rejects, from_itself(), Stdio::null()),
            (&with_rejects, Stdio::null(), onto_itself()),
            (&self.arguments, from_itself(), onto_itself()),
        ] {
            let status = behind("bash", &limited, &tool.command(arguments))
                .stdin(stdin)
                .stdout(stdout)
                .stderr(Stdio::null())
                .status();
            assert_eq!(status.expect("the tool runs").code(), Some(2));
            assert_eq!(tool.read("self.jsonl"), self.input, "the input changed");
        }
        let folder = tool.folder().display().to_string();
        tool.run(&self.with(&[self.rejects, &folder]), &self.input)
            .exits(2)
            .says("is a folder");
    }

    /// Files beside the output that hold something else stay as they are, and no folder is
    /// made for a misspelt one: exit 2. What a run has written the next one writes again.
    pub fn others_files(&self, tool: &Tool) {
        let help = tool.run(&["--help"], "").exits(0).stdout;
        let beside = [self.rejects, "--log", "--summary"];
        let beside = beside.iter().filter(|flag| help.contains(**flag));
        for flag in beside {
            for text in [
                "precious\n",
                "{\"precious\":1}\n",
                "\u{0}",
                "[{",
                // Of other tools, or of other flags.
                r#"{"v":1,"id":"1","rejected":{"by":"another-tool","reasons":[]}}"#,
                r#"{"v":1,"id":"1","dropped":{"by":"another-tool"}}"#,
                r#"{"bad_line":{"by":"another-tool","file":"-","line":1,"error":"","raw":""}}"#,
                r#"{"v":1,"tool":"another-tool","in":2,"out":1,"rejected":1,"bad_lines":0}"#,
            ] {
                let file = tool.file("mine", text);
                tool.run(&self.with(&[flag, &file]), &self.input)
                    .exits(2)
                    .says(&format!("{flag} {file}: is there and holds something else"));
                assert_eq!(tool.read("mine"), text, "{flag}");
            }
            tool.run(&self.with(&[flag, "none/such"]), &self.input)
                .exits(2)
                .says(&format!("{flag} none/such: there is no folder none"));
            assert!(!tool.folder().join("none").exists(), "{flag}");
            let bad_line = format!("{}no JSON\n", self.input);
            let mut arguments = self.with(&["--max-bad-lines", "1", flag, "own"]);
            if *flag != self.rejects {
                arguments.extend([self.rejects, "rejects"].map(String::from));
            }
            tool.run(&arguments, &bad_line).exits(0);
            assert!(!tool.read("own").is_empty(), "{flag}");
            tool.run(&arguments, &bad_line).exits(0);
            std::fs::remove_file(tool.folder().join("own")).expect("a file");
        }
    }

    /// A key that does not exist: exit 2, naming the nearest; nothing written.
    pub fn bad_key(&self, tool: &Tool) {
        let (section, key) = self.key.rsplit_once('.').expect("a dotted key");
        let typo = format!("{key}x");
        let mut yaml = String::new();
        for (depth, part) in section.split('.').enumerate() {
            yaml.push_str(&format!("{}{part}:\n", "  ".repeat(depth)));
        }
        yaml.push_str(&format!(
            "{}{typo}: 1\n",
            "  ".repeat(section.split('.').count())
        ));
        let file = tool.file("typo.yaml", &yaml);
        let run = tool
            .run(&self.with(&["--config", &file]), &self.input)
            .exits(2);
        let run = run.says("typo.yaml").says(&typo).says(&format!("`{key}`"));
        assert!(run.stdout.is_empty(), "{run}");
        let shown = tool.run(&self.with(&["--print-config"]), "").exits(0);
        assert!(
            shown
                .stdout
                .lines()
                .any(|l| l.starts_with(self.key) && l.contains("# ")),
            "{shown}"
        );
    }

    /// Fields that the tool has never heard of leave as they came.
    pub fn unknown_field(&self, tool: &Tool) {
        if !self.passes_records {
            return;
        }
        let odd = r#""x_unknown":{"n":12345678901234567890123,"s":"\u00e9"}"#;
        let first = self.input.lines().next().expect("a record");
        let with = format!("{{{odd},{}\n", first.trim_start().trim_start_matches('{'));
        let rest: String = self
            .input
            .lines()
            .skip(1)
            .map(|l| format!("{l}\n"))
            .collect();
        let run = tool.run(&self.arguments, &(with + &rest)).exits(0);
        assert!(
            run.stdout.contains(odd),
            "the unknown field is gone or changed\n{run}"
        );
    }

    /// Empty input.
    pub fn empty_input(&self, tool: &Tool) {
        let run = tool.run(&self.arguments, "").exits(self.empty);
        if self.empty == 0 {
            let output = run.records();
            assert!(
                output.iter().all(|r| r.get("corpus").is_some()),
                "records from nothing\n{run}"
            );
        } else {
            run.says("empty");
        }
    }

    /// Same seed, same bytes: twice, and with 1 and 8 threads.
    pub fn same_bytes(&self, tool: &Tool) {
        let one = tool
            .run(&self.with(&["--threads", "1"]), &self.input)
            .exits(0);
        let again = tool
            .run(&self.with(&["--threads", "1"]), &self.input)
            .exits(0);
        let eight = tool
            .run(&self.with(&["--threads", "8"]), &self.input)
            .exits(0);
        assert!(
            !one.stdout.is_empty(),
            "the ordinary run writes something\n{one}"
        );
        assert_eq!(one.stdout, again.stdout, "two runs differ");
        assert_eq!(one.stdout, eight.stdout, "1 and 8 threads differ");
    }

    /// `-h` fits a page of 80 columns, `--help` has examples and exit codes,
    /// completions and the manual come from the binary.
    pub fn help(&self, tool: &Tool) {
        let short = tool.run(&["-h"], "").exits(0);
        assert!(
            short.stdout.lines().count() <= 60,
            "-h is longer than a page\n{short}"
        );
        let long = tool.run(&["--help"], "").exits(0);
        assert!(
            long.stdout.contains("Examples:") && long.stdout.contains("Exit status:"),
            "{long}"
        );
        assert!(
            tool.run(&["--completions", "bash"], "")
                .exits(0)
                .stdout
                .contains("complete")
        );
        assert!(tool.run(&["--man"], "").exits(0).stdout.contains(".TH"));
        tool.run(&["--no-such-flag"], "").exits(2);
        tool.run(&[OsStr::from_bytes(b"--no-such-\xff")], "")
            .exits(2);
        // What nobody could read was not given.
        for flag in ["-h", "--help", "--version", "--man"] {
            let full = File::options().write(true).open("/dev/full");
            tool.run_to(full.expect("/dev/full"), &[flag], "")
                .exits(4)
                .says("No space left");
            let (reader, writer) = std::io::pipe().expect("a pipe");
            drop(reader);
            tool.run_to(writer, &[flag], "").exits(0).never_says("pipe");
        }
    }
}

/// Runs every example of a tool's `--help` (lines that begin with `$ `) with a
/// shell, in the tool's folder, with all our binaries on the PATH; each must
/// exit 0. The test lays out the files that the examples name beforehand.
pub fn check_examples(tool: &Tool) {
    let help = tool.run(&["--help"], "").exits(0);
    let examples: Vec<&str> = help
        .stdout
        .lines()
        .filter_map(|l| l.trim_start().strip_prefix("$ "))
        .collect();
    assert!(!examples.is_empty(), "no examples\n{help}");
    let bin = tool
        .binary()
        .parent()
        .expect("the folder of the binaries")
        .display()
        .to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
    for example in examples {
        let mut shell = Command::new("bash");
        shell
            .args(["-eu", "-o", "pipefail", "-c", example])
            .current_dir(tool.folder())
            .env("CUDA_VISIBLE_DEVICES", "")
            .env("PATH", &path);
        Run::of(&mut shell, b"").exits(0);
    }
}

/// The shared checks as tests of the file that calls this, one each.
///
/// ```ignore
/// harness::conventions!(|| (Tool::new(env!("CARGO_BIN_EXE_pair-validate")), Conventions { … }));
/// ```
#[macro_export]
macro_rules! conventions {
    ($setup:expr) => {
        mod conventions {
            use super::*;
            $crate::conventions!(@each $setup; reader_gone disk_full bad_line files_apart others_files bad_key unknown_field empty_input same_bytes help);
        }
    };
    (@each $setup:expr; $($check:ident)*) => {
        $(#[test]
        fn $check() {
            let (tool, conventions): ($crate::Tool, $crate::Conventions) = ($setup)();
            conventions.$check(&tool);
        })*
    };
}
