//! The child processes of init: its own, and every orphan of the box.
//!
//! One place reaps them all. A library that waits for single children must not be used beside it: one
//! of the two would take the other's status away.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// All children whose end somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Children {
    waiting: Mutex<HashMap<i32, oneshot::Sender<ExitStatus>>>,
}

/// A program that was started.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its process id inside the box.
    pub(crate) pid: u32,
    /// Its end.
    pub(crate) ended: oneshot::Receiver<ExitStatus>,
}

impl Children {
    /// Starts a program.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        // Held over the start: a program that ends at once must find its entry, and one that cannot be
        // executed is reaped by the library, which must find it.
        let mut waiting = self.lock();
        let child = command.spawn()?;
        let (sender, ended) = oneshot::channel();
        waiting.insert(child.id() as i32, sender);
        Ok(Child { pid: child.id(), ended })
    }

    /// Reaps for ever.
    pub(crate) async fn reap(&self) -> io::Result<()> {
        let mut changes = signal(SignalKind::child())?;
        loop {
            self.reap_those_that_ended();
            if changes.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap_those_that_ended(&self) {
        let mut waiting = self.lock();
        while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            let (pid, status) = match status {
                WaitStatus::Exited(pid, status) => (pid, ExitStatus::from_raw(status << 8)),
                WaitStatus::Signaled(pid, signal, _) => (pid, ExitStatus::from_raw(signal as i32)),
                WaitStatus::StillAlive => return,
                _ => continue,
            };
            if let Some(sender) = waiting.remove(&pid.as_raw()) {
                // Nobody waits any more: then nobody wants to know.
                let _ = sender.send(status);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<ExitStatus>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a signal to a process of the box; one that has ended already is fine.
pub(crate) fn send(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid as i32), signal);
}

/// A program's end in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("killed by {signal}"),
            Err(_) => format!("killed by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}
