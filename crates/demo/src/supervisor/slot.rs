//! One role of the product, the processes that play it, and what is remembered of those that did.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::Duration;

use linux::sandbox;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::processes::{self, Role};
use crate::server::Reply;

/// The first restart is at once. Kubernetes' first pause is 10 s and its longest 5 min; a demonstration has less patience.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A process that ran this long is not crash-looping.
const RECOVERED: Duration = Duration::from_secs(10);

/// A process that lives.
#[derive(Debug)]
pub(super) struct Process {
    /// Which of all that were ever started.
    pub(super) number: u64,
    /// Which of those of its role that live now.
    pub(super) place: u8,
    pub(super) pid: u32,
    pub(super) admin: PathBuf,
    pub(super) metrics: Option<SocketAddr>,
    pub(super) state: State,
    pub(super) started: Instant,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// To take over, once it is ready.
    Starting,
    Running,
    /// Its successor runs, and it was told to end.
    Draining,
}

impl State {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Draining => "draining",
        }
    }
}

/// One role, and the processes that play it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) role: Role,
    pub(super) binary: PathBuf,
    pub(super) processes: Vec<Process>,
    pub(super) restarts: u64,
    pub(super) last_exit: Option<String>,
    /// Nobody starts it again but by `resume`.
    pub(super) held: bool,
    pub(super) pause: Pause,
    /// The number of the restart that is waited for.
    pub(super) due: Option<(u64, Instant)>,
    /// Who wants to know that it was killed.
    pub(super) killers: Vec<Sender<Reply>>,
    pub(super) upgrade: Option<Upgrade>,
}

/// A new process that is to take over.
#[derive(Debug)]
pub(super) struct Upgrade {
    pub(super) number: u64,
    pub(super) binary: PathBuf,
    pub(super) reply: Sender<Reply>,
}

/// How long to wait before the next restart.
#[derive(Debug, Default)]
pub(super) struct Pause(Duration);

impl Pause {
    /// After a life of this length.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        let now = if lived >= RECOVERED { Duration::ZERO } else { self.0 };
        self.0 = (now * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        now
    }
}

impl Slot {
    pub(super) fn new(role: Role) -> Self {
        Self {
            role,
            binary: processes::own_binary(),
            processes: Vec::new(),
            restarts: 0,
            last_exit: None,
            held: false,
            pause: Pause::default(),
            due: None,
            killers: Vec::new(),
            upgrade: None,
        }
    }

    /// The one that plays the role, or soon will.
    pub(super) fn current(&self) -> Option<&Process> {
        let of = |state| self.processes.iter().find(|process| process.state == state);
        of(State::Running).or_else(|| of(State::Starting))
    }

    pub(super) fn upgrade_failed(&mut self, sentence: &str) {
        if let Some(upgrade) = self.upgrade.take() {
            // Who asked may have left.
            let _ = upgrade.reply.send((Err(sentence.to_owned()), Vec::new()));
        }
    }

    pub(super) fn shown(&self, handles: &mut Vec<OwnedFd>) -> Vec<Value> {
        let mut all: Vec<_> = self
            .processes
            .iter()
            .map(|process| {
                let mut value = self.entry(process.state.as_str());
                value["admin"] = json!(process.admin);
                value["metrics"] = json!(process.metrics);
                if process.state == State::Draining {
                    value["name"] = format!("{}/draining", self.role.name()).into();
                }
                give_handle(&mut value, process, handles);
                value
            })
            .collect();
        if self.current().is_none() {
            all.insert(0, self.entry(if self.held { "held" } else { "ended" }));
        }
        all
    }

    fn entry(&self, state: &str) -> Value {
        json!({
            "name": self.role.name(),
            "role": self.role.subcommand(),
            "state": state,
            "restarts": self.restarts,
            "lastExit": self.last_exit,
            "pid": null,
        })
    }
}

pub(super) fn give_handle(value: &mut Value, process: &Process, handles: &mut Vec<OwnedFd>) {
    if let Ok(handle) = sandbox::process_handle(process.pid) {
        value["handle"] = handles.len().into();
        handles.push(handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_at_once_and_the_pauses_grow_to_a_bound() {
        let mut pause = Pause::default();
        let brief = Duration::from_millis(1);
        let all: Vec<_> = (0..9).map(|_| pause.after(brief).as_millis()).collect();
        assert_eq!(all, [0, 250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
    }

    #[test]
    fn who_ran_for_long_is_started_again_at_once() {
        let mut pause = Pause::default();
        for _ in 0..5 {
            pause.after(Duration::ZERO);
        }
        assert_eq!(pause.after(RECOVERED), Duration::ZERO);
        assert_eq!(pause.after(Duration::ZERO), FIRST_PAUSE);
    }
}
