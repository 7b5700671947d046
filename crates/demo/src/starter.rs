//! The starter: the process outside the box that made it, waits for it and cleans up after it.
//!
//! Starter and init watch each other through a pair of sockets. In whatever way init ends, the starter removes the state
//! directory. In whatever way the starter ends, init removes it and ends the box. Neither needs the other to be in good
//! order.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use linux::sandbox::{self, Side};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::boot::{self, Lifeline};
use crate::state::{Found, StateDirectory};
use crate::{Options, server};

/// How long a box may take to end in order before it is killed.
const END_WITHIN: Duration = Duration::from_secs(10);

/// Makes a box and stays with it until it ends: by itself (`once`), by `stop`, or by a signal. Gives
/// the exit status. The caller must not have started threads.
pub fn run_foreground(options: Options) -> anyhow::Result<i32> {
    run(options, None)
}

/// Makes a box in the background and returns when it is ready, or with the sentence that says why not.
pub fn start(options: Options) -> anyhow::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    if sandbox::fork_to_background()? == Side::Background {
        drop(ours);
        let mut report = theirs.try_clone()?;
        if let Err(error) = run(options, Some(theirs)) {
            let _ = writeln!(report, "{error:#}");
        }
        std::process::exit(0);
    }
    drop(theirs);
    let mut answer = String::new();
    BufReader::new(ours).read_line(&mut answer)?;
    match answer.trim_end() {
        READY => Ok(()),
        "" => bail!("the box ended before it was ready; `justmtls demo` in the foreground shows more"),
        sentence => Err(anyhow!("{sentence}")),
    }
}

/// Ends the box at `path`, or cleans up what a killed one left there, and says what it did.
pub fn stop(path: &Path) -> anyhow::Result<&'static str> {
    match StateDirectory::look(path) {
        Found::Nothing => return Ok("no box is there"),
        Found::Stale => {
            StateDirectory::claim(path)?.remove();
            return Ok("removed what a killed box had left");
        }
        Found::Running => {}
    }
    let init = server::ask_to_stop(path).ok();
    let deadline = Instant::now() + END_WITHIN + Duration::from_secs(2);
    while matches!(StateDirectory::look(path), Found::Running) {
        if Instant::now() > deadline {
            let pid = init.ok_or_else(|| anyhow!("the box does not answer; kill its starter"))?;
            kill(Pid::from_raw(pid as i32), Signal::SIGKILL).context("cannot kill the box")?;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if matches!(StateDirectory::look(path), Found::Stale) {
        StateDirectory::claim(path)?.remove();
    }
    Ok("stopped")
}

/// The word for "ready" between the background process and the one that waits for it.
const READY: &str = "ready";

fn run(options: Options, waiting: Option<UnixStream>) -> anyhow::Result<i32> {
    let path = options.state.clone().unwrap_or_else(StateDirectory::default_path);
    let state = Arc::new(StateDirectory::claim(&path)?);
    // Blocked before the fork: a signal in between must neither kill the starter nor get lost.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    let (ours, theirs) = UnixStream::pair()?;
    let starters = Cell::new(Some((ours, waiting)));
    let made = sandbox::start(|authority| {
        // Init's copies of what is the starter's: kept, they would hide the starter's end from init.
        drop(starters.take());
        let _ = signals.thread_unblock();
        boot::run(options, authority, state.clone(), Lifeline::new(theirs))
    });
    let init = match made {
        Ok(init) => init,
        Err(error) => {
            state.remove();
            return Err(error.into());
        }
    };
    let Some((lifeline, waiting)) = starters.take() else { bail!("the starter lost its box") };
    let ended = Watch { init: &init, lifeline, signals, waiting, deadline: None }.until_the_end();
    state.remove();
    ended
}

struct Watch<'a> {
    init: &'a sandbox::Init,
    lifeline: UnixStream,
    signals: SigSet,
    /// Who waits for the box to become ready, in the background case.
    waiting: Option<UnixStream>,
    /// When patience ends, once the end was asked for.
    deadline: Option<Instant>,
}

impl Watch<'_> {
    fn until_the_end(mut self) -> anyhow::Result<i32> {
        let signals = SignalFd::with_flags(&self.signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let mut news = String::new();
        self.lifeline.set_nonblocking(true)?;
        let pid = Pid::from_raw(self.init.pid as i32);
        loop {
            self.wait_for_something(&signals)?;
            if let Ok(Some(_)) = signals.read_signal() {
                // The first signal asks; who sends a second one means it.
                match self.deadline {
                    None => self.ask_for_the_end(),
                    Some(_) => kill(pid, Signal::SIGKILL)?,
                }
            }
            if self.waiting.as_ref().is_some_and(has_gone) {
                self.waiting = None;
                self.ask_for_the_end();
            }
            self.read_news(&mut news)?;
            if self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
                let _ = kill(pid, Signal::SIGKILL);
            }
            match waitpid(pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => {}
                WaitStatus::Exited(_, status) => {
                    self.read_news(&mut news)?;
                    return self.verdict(status, news.trim());
                }
                _ if self.deadline.is_some() => return Ok(0),
                _ => bail!("the box was killed"),
            }
        }
    }

    fn wait_for_something(&self, signals: &SignalFd) -> anyhow::Result<()> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut sources = vec![readable(signals.as_fd()), readable(self.init.handle.as_fd())];
        sources.push(readable(self.lifeline.as_fd()));
        if let Some(waiting) = &self.waiting {
            sources.push(readable(waiting.as_fd()));
        }
        let patience = match self.deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32 + 1;
                PollTimeout::try_from(left)?
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut sources, patience) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn ask_for_the_end(&mut self) {
        self.deadline = Some(Instant::now() + END_WITHIN);
        // If init cannot be told it has ended, or will be killed at the deadline.
        let _ = self.lifeline.write_all(boot::STOP);
    }

    /// Takes in what init says: "ready", or a sentence that says why it gives up.
    fn read_news(&mut self, news: &mut String) -> anyhow::Result<()> {
        let mut bytes = [0; 4096];
        match self.lifeline.read(&mut bytes) {
            Ok(length) => news.push_str(&String::from_utf8_lossy(&bytes[..length])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(rest) = news.strip_prefix("ready\n") {
            *news = rest.to_owned();
            if let Some(mut waiting) = self.waiting.take() {
                // Who waited may have left in this moment; the box then stays, as it was ready.
                let _ = writeln!(waiting, "{READY}");
            }
        }
        Ok(())
    }

    fn verdict(self, status: i32, sentence: &str) -> anyhow::Result<i32> {
        if sentence.is_empty() { Ok(status) } else { Err(anyhow!("{sentence}")) }
    }
}

/// Whether the other side has closed.
fn has_gone(stream: &UnixStream) -> bool {
    let mut source = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut source, PollTimeout::ZERO), Ok(1..))
}
