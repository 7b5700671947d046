//! Processes that outlive the command that started them: each is known by its id and the moment of its start, so that
//! another process that has the id by now is never taken for it.

use crate::process::stat;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the kernel may take to end what was killed: a process in the middle of a write ends after it.
const END: Duration = Duration::from_secs(30);

/// Where in [`stat`] the moment of a start is: field 22 of `proc_pid_stat(5)`.
const STARTED: usize = 22 - 3;

/// A process that a file tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) pid: u32,
    /// In clock ticks since the machine started.
    started: u64,
}

impl Life {
    /// The process with this id now.
    pub(super) fn of(pid: u32) -> Result<Self> {
        let started = started(pid).with_context(|| format!("process {pid} ended at once"))?;
        Ok(Self { pid, started })
    }

    /// The process that a file tells of, if it still runs.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(file).ok()?;
        let (pid, moment) = text.trim().split_once(' ')?;
        let life = Self { pid: pid.parse().ok()?, started: moment.parse().ok()? };
        life.runs().then_some(life)
    }

    pub(super) fn write(self, file: &Path) -> Result<()> {
        std::fs::write(file, format!("{} {}\n", self.pid, self.started))
            .with_context(|| format!("cannot write {}", file.display()))
    }

    pub(super) fn runs(self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Kills it and waits until it is gone: for the first process of a pid namespace this is when all others in it are.
    pub(super) fn kill(self) -> Result<()> {
        if !self.runs() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid.try_into().context("a process id has 31 bits")?);
        kill(pid, Signal::SIGKILL).with_context(|| format!("cannot kill process {pid}"))?;
        wait_until(END, || Ok(!self.runs()))?
            .then_some(())
            .with_context(|| format!("process {pid} was killed and is still there after {} s", END.as_secs()))
    }
}

/// Asks again and again until the answer is yes; `false` if it is still no after this time.
pub(super) fn wait_until(limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<bool> {
    let began = Instant::now();
    loop {
        if holds()? {
            return Ok(true);
        }
        if began.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// When a process started; `None` if there is none, or only what its parent has not asked for yet.
fn started(pid: u32) -> Option<u64> {
    let stat = stat(pid)?;
    match stat.first()?.as_str() {
        "Z" | "X" => None,
        _ => stat.get(STARTED)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_known_by_its_start_and_not_by_its_id() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let life = Life::of(child.id()).unwrap();
        let other = Life { started: life.started + 1, ..life };
        assert!(life.runs() && !other.runs());
        // It is somebody else's, and stays.
        other.kill().unwrap();
        assert!(life.runs());
        life.kill().unwrap();
        assert!(!life.runs());
        child.wait().unwrap();
    }

    #[test]
    fn what_was_written_is_read_while_it_runs() {
        let file = std::env::temp_dir().join(format!("justmtls-xtask-life-{}", std::process::id()));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let life = Life::of(child.id()).unwrap();
        life.write(&file).unwrap();
        assert_eq!(Life::read(&file), Some(life));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(Life::read(&file), None);
        std::fs::remove_file(&file).unwrap();
    }
}
