//! Signals that ask a tool to end.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{exit, signal_name};

use crate::messages::Messages;

/// What comes within this time of the first signal is the same wish: timeout(1) sends its
/// signal to the process and then to its group, and a terminal that closes several.
const ONE_WISH: Duration = Duration::from_secs(1);

/// What a tool has kept so far, in words, for who ends it at once.
pub type Kept = Arc<Mutex<String>>;

/// From here on SIGINT, SIGTERM and SIGHUP no longer end the process but set the flag that
/// this returns. Another SIGINT or SIGTERM a second later or after ends it at once, and says
/// so with what is `kept`; another SIGHUP does not. One that was to be ignored from the
/// start, as nohup has it, still is.
pub fn heed(messages: &Arc<Messages>, kept: &Kept) -> io::Result<Arc<AtomicBool>> {
    let mut heeded = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        heeded.push(SIGHUP);
    }
    let mut signals = Signals::new(heeded)?;
    let asked = Arc::new(AtomicBool::new(false));
    let (messages, kept, flag) = (messages.clone(), kept.clone(), asked.clone());
    // A thread and no handler, so that it can say something.
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                flag.store(true, Ordering::Relaxed);
                let name = signal_name(signal).unwrap_or("a signal");
                match first {
                    None => {
                        first = Some(Instant::now());
                        let what = "ends in good order; another one, a second from now or later, ends it at once";
                        say(&messages, format!("{name}: {what}"));
                    }
                    Some(first) if signal != SIGHUP && first.elapsed() >= ONE_WISH => {
                        let kept = kept.lock().unwrap_or_else(|e| e.into_inner());
                        say(&messages, format!("{name} again: ended at once{kept}"));
                        exit(130);
                    }
                    Some(_) => {}
                }
            }
        })?;
    Ok(asked)
}

/// Says something, and waits for it only a moment: stderr may be a pipe that is full.
fn say(messages: &Arc<Messages>, what: String) {
    let (said, is_said) = mpsc::channel();
    let messages = messages.clone();
    let saying = thread::Builder::new().spawn(move || {
        messages.say(format_args!("{what}"));
        let _ = said.send(());
    });
    if saying.is_ok() {
        let _ = is_said.recv_timeout(Duration::from_millis(200));
    }
}

/// Whether this process was started with a signal ignored; also where the system does
/// not tell, so that it keeps its way.
fn is_ignored(signal: i32) -> bool {
    let ignored = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let mask = (status.lines()).find_map(|line| line.strip_prefix("SigIgn:"))?;
        let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
        Some(mask >> (signal - 1) & 1 == 1)
    };
    ignored().unwrap_or(true)
}
