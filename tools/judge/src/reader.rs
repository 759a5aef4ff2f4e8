//! Whether anybody reads our standard output. A write would tell only once the next
//! record is there, which by then is paid for.

use jsonl::WriteError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// # Errors
/// [`WriteError::ReaderGone`], where the other end of a pipe or socket is closed.
pub fn check() -> Result<(), WriteError> {
    let out = std::io::stdout();
    let mut out = [PollFd::new(&out, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // What cannot be polled tells when it is written to.
    let polled = poll(&mut out, Some(&now)).is_ok();
    match polled && out[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
        true => Err(WriteError::ReaderGone),
        false => Ok(()),
    }
}
