//! The end, whatever brings it: a box in the background must not outlive the run that made it.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How a shell says that Ctrl-C ended a program.
const INTERRUPTED: i32 = 130;

/// Ends the box that is current when a signal comes or the time is over, and this process with it.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    binary: PathBuf,
    current: Arc<Mutex<Option<PathBuf>>>,
}

impl Ending {
    /// Begins to watch. Before the first thread, which would take signals otherwise.
    pub(crate) fn watch(binary: PathBuf, limit: Duration) -> Result<Ending> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
        let descriptor = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
        let ending = Ending { binary, current: Arc::default() };
        let (own, time) = (ending.clone(), PollTimeout::try_from(limit).context("the time limit is too long")?);
        std::thread::Builder::new().name("ending".into()).spawn(move || {
            let came = poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], time);
            own.end_all();
            if came == Ok(0) {
                eprintln!("bench: it took more than {} s and is ended here", limit.as_secs());
                std::process::exit(1);
            }
            std::process::exit(INTERRUPTED);
        })?;
        Ok(ending)
    }

    /// Names the box that is to be ended; before it is made, so that none is missed.
    pub(crate) fn set(&self, state: Option<PathBuf>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn end_all(&self) {
        let state = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(state) = state else { return };
        let mut stop = Command::new(&self.binary);
        let stop = stop.args(["demo", "--state"]).arg(&state).arg("stop").stdin(Stdio::null()).stdout(Stdio::null());
        if let Err(error) = stop.status() {
            eprintln!("bench: cannot end the box at {}: {error}", state.display());
        }
        if let Some(folder) = state.parent() {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}
