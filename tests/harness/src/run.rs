//! Running a tool as a person would: arguments, standard input, a folder.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// No tool's test may hang: past this the child is killed and the test fails.
const LIMIT: Duration = Duration::from_secs(120);

/// A binary under test, in a folder of its own.
pub struct Tool {
    binary: PathBuf,
    folder: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Tool {
    /// `binary` is `env!("CARGO_BIN_EXE_…")`.
    pub fn new(binary: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self {
            binary: binary.into(),
            folder,
            environment: Vec::new(),
        }
    }

    /// The folder that the tool runs in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The path of a file in that folder.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Writes a file into the folder; its path.
    pub fn file(&self, name: &str, content: &str) -> String {
        let path = self.folder.path().join(name);
        if let Some(above) = path.parent() {
            std::fs::create_dir_all(above).expect("folders above a test's file");
        }
        std::fs::write(&path, content).expect("a test's file");
        path.display().to_string()
    }

    /// Reads a file of the folder.
    #[track_caller]
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name))
            .unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Adds an environment variable to every later run.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The command with its arguments. The environment is cut to what a tool
    /// may rely on, so that a developer's keys and settings change no test.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_clear()
            // What a tool writes must not depend on the machine having a GPU.
            .env("CUDA_VISIBLE_DEVICES", "");
        for name in ["PATH", "HOME", "TMPDIR", "LANG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Runs with `input` on standard input.
    #[track_caller]
    pub fn run<A: AsRef<OsStr>>(&self, arguments: &[A], input: &str) -> Run {
        self.run_bytes(arguments, input.as_bytes())
    }

    /// Runs with any bytes on standard input.
    #[track_caller]
    pub fn run_bytes<A: AsRef<OsStr>>(&self, arguments: &[A], input: &[u8]) -> Run {
        let mut command = self.command(arguments);
        Run::of(&mut command, input)
    }

    /// Runs with `input` on standard input, and standard output going to `stdout`.
    #[track_caller]
    pub fn run_to<A: AsRef<OsStr>>(
        &self,
        stdout: impl Into<Stdio>,
        arguments: &[A],
        input: &str,
    ) -> Run {
        let mut command = self.command(arguments);
        command.stdout(stdout);
        Run::until_end(&mut command, input.as_bytes(), |_| ())
    }

    /// Runs with `input` on standard input and interrupts it (SIGINT) once it is `ready`.
    #[track_caller]
    pub fn interrupt<A: AsRef<OsStr>>(
        &self,
        arguments: &[A],
        input: &str,
        ready: impl Fn() -> bool,
    ) -> Run {
        self.signal("-INT", arguments, input, ready)
    }

    /// Runs with `input` on standard input and sends a signal, such as `-TERM`, once it is
    /// `ready`.
    #[track_caller]
    pub fn signal<A: AsRef<OsStr>>(
        &self,
        name: &str,
        arguments: &[A],
        input: &str,
        ready: impl Fn() -> bool,
    ) -> Run {
        // The tests themselves may run under nohup, where a child ignores hangups.
        let mut command = behind("env", &["--default-signal=HUP"], &self.command(arguments));
        command.stdout(Stdio::piped());
        Run::until_end(&mut command, input.as_bytes(), |pid| {
            let started = Instant::now();
            while !ready() {
                assert!(started.elapsed() < LIMIT, "never ready for {name}");
                std::thread::sleep(Duration::from_millis(1));
            }
            signal(pid, name);
        })
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }
}

/// A command as another program's arguments, in the same surroundings.
pub fn behind(program: &str, more: &[&str], command: &Command) -> Command {
    let mut all = Command::new(program);
    all.args(more)
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
    if let Some(folder) = command.get_current_dir() {
        all.current_dir(folder);
    }
    all
}

/// What a run left behind. Its assertions show all of it when they fail.
#[derive(Debug)]
pub struct Run {
    /// The command as it was run.
    pub command: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl Run {
    /// Runs any command with `input` on standard input.
    #[track_caller]
    pub fn of(command: &mut Command, input: &[u8]) -> Self {
        Self::until_end(command.stdout(Stdio::piped()), input, |_| ())
    }

    /// Runs a command whose standard output is settled; `meanwhile` is told its process id.
    #[track_caller]
    fn until_end(command: &mut Command, input: &[u8], meanwhile: impl FnOnce(u32)) -> Self {
        let shown = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{shown}: {e}"));
        let mut stdin = child.stdin.take().expect("stdin was piped");
        let input = input.to_vec();
        // A tool may end before it has read all: then writing fails, and that is its right.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let pid = child.id();
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            let late =
                waiting.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if late {
                signal(pid, "-KILL");
            }
            late
        });
        let started = Instant::now();
        meanwhile(pid);
        let output = child
            .wait_with_output()
            .unwrap_or_else(|e| panic!("{shown}: {e}"));
        drop(done);
        let _ = feeder.join();
        let run = Self {
            command: shown,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status,
        };
        assert!(
            !watchdog.join().unwrap_or(true),
            "still running after {:?}:\n{run}",
            started.elapsed()
        );
        run
    }

    /// The exit code; a signal counts as 128 and its number.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "exit code\n{self}");
        self
    }

    /// Asserts that standard error holds a text.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "stderr lacks {text:?}\n{self}");
        self
    }

    /// Asserts that neither stream holds a text.
    #[track_caller]
    pub fn never_says(self, text: &str) -> Self {
        assert!(
            !self.stderr.contains(text) && !self.stdout.contains(text),
            "{text:?} is shown\n{self}"
        );
        self
    }

    /// Standard output as JSON lines.
    #[track_caller]
    pub fn records(&self) -> Vec<serde_json::Value> {
        self.stdout
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}\n{self}"))
            })
            .collect()
    }
}

/// Sends a signal; a process that has gone meanwhile does not mind.
fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([name, &pid.to_string()]).status();
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cut = |text: &str| -> String {
            let end = text
                .char_indices()
                .nth(4000)
                .map_or(text.len(), |(at, _)| at);
            text[..end].to_owned()
        };
        write!(
            f,
            "==== {}\n==== {}\n==== stdout\n{}\n==== stderr\n{}\n====",
            self.command,
            self.status,
            cut(&self.stdout),
            cut(&self.stderr)
        )
    }
}
