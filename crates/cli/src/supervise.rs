//! The first process of a container: it runs another one, and at once another if that one dies.
//!
//! Kubelet starts a container anew at once when it dies for the first time in a while, and then after ten seconds, twenty, forty:
//! for as long pods that a killed proxy served would hang. What dies at its start, or again and again, is left to kubelet,
//! which counts it and says so.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What dies sooner has never served.
const LIVED: Duration = Duration::from_secs(1);

/// So many deaths within this time are one too many.
const MOST: usize = 4;
const WITHIN: Duration = Duration::from_secs(60);

/// What to run.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// A verb of this program, with its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "VERB")]
    command: Vec<OsString>,
}

/// Runs it until it ends by itself or is told to. The exit status is its own.
pub(crate) fn run(arguments: &Arguments) -> Result<i32> {
    let mut signals = SigSet::empty();
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| signals.add(signal));
    // Before there is a child: its end waits until it is asked for. The child has them blocked, too, until it lets them in
    // ([`let_signals_in`]).
    signals.thread_block().context("cannot block signals")?;
    let mut deaths = Deaths::default();
    loop {
        let began = Instant::now();
        let name = std::env::args_os().next().unwrap_or_default();
        let started = Command::new("/proc/self/exe").arg0(name).args(&arguments.command).spawn();
        let child = started.context("cannot start what is to be supervised")?.id();
        let child = Pid::from_raw(i32::try_from(child).context("a process has a strange number")?);
        let (end, is_told) = wait(child, &signals)?;
        let (now, command) = (Instant::now(), &arguments.command[0]);
        let lived = now - began;
        if is_told || end == End::Exited(0) {
            return Ok(end.status());
        }
        if !deaths.is_to_live_on(lived, now) {
            tracing::error!(?command, ?lived, "{}, too soon or too often: its container ends with it", end.text());
            return Ok(end.status());
        }
        tracing::warn!(?command, ?lived, "{}: it is started again", end.text());
    }
}

/// Lets the signals in that whoever started this process has blocked: its supervisor has.
///
/// # Errors
/// The kernel's.
pub(crate) fn let_signals_in() -> Result<()> {
    SigSet::empty().thread_set_mask().context("cannot let signals in")
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Exited(i32),
    Killed(Signal),
}

impl End {
    /// As a shell has it.
    fn status(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 + signal as i32,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Exited(status) => format!("it ended with status {status}"),
            Self::Killed(signal) => format!("it was killed by {signal}"),
        }
    }
}

/// Waits for the child's end, and passes on what tells it to. Whether it was told to. Orphans are reaped, too.
fn wait(child: Pid, signals: &SigSet) -> Result<(End, bool)> {
    let mut is_told = false;
    loop {
        if signals.wait().context("cannot wait for signals")? != Signal::SIGCHLD {
            is_told = true;
            // It may have ended a moment ago.
            let _ = kill(child, Signal::SIGTERM);
            continue;
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) if pid == child => return Ok((End::Exited(status), is_told)),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return Ok((End::Killed(signal), is_told)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for what is supervised"),
            }
        }
    }
}

/// When it died.
#[derive(Default, Debug)]
struct Deaths(VecDeque<Instant>);

impl Deaths {
    /// Whether it is to be started again here.
    fn is_to_live_on(&mut self, lived: Duration, now: Instant) -> bool {
        self.0.push_back(now);
        self.0.retain(|death| now - *death < WITHIN);
        lived >= LIVED && self.0.len() < MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_lived_lives_on_until_it_dies_too_often() {
        let (mut deaths, start) = (Deaths::default(), Instant::now());
        for number in 1..MOST {
            let now = start + LIVED * u32::try_from(number).unwrap();
            assert!(deaths.is_to_live_on(LIVED, now), "{number}");
        }
        assert!(!deaths.is_to_live_on(LIVED, start + WITHIN / 2));
        assert!(deaths.is_to_live_on(LIVED, start + WITHIN * 2), "what was long ago does not count");
    }

    #[test]
    fn what_dies_at_its_start_is_not_started_again() {
        assert!(!Deaths::default().is_to_live_on(LIVED / 2, Instant::now()));
        assert_eq!((End::Exited(3).status(), End::Killed(Signal::SIGKILL).status()), (3, 137));
    }
}
