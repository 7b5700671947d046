//! What keeps the product's processes running: on a cluster, kubelet and the controllers of Deployment and DaemonSet.
//!
//! A process that ends is started again: at once, then after a pause that grows. One that is held down waits for somebody
//! to let it go. An upgrade is what a DaemonSet with `maxSurge: 1` does: a new process beside the old one, and SIGTERM for
//! that when the new one is ready.

mod slot;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::admin;
use crate::boot::Event;
use crate::children;
use crate::processes::{self, Recipes, Role};
use crate::server::Reply;
use slot::{FIRST_PAUSE, Pause, Process, Slot, State, Upgrade, give_handle};

/// How long the control plane may take to list its objects.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a process that starts is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long a new process may take to be ready, before the old one is left where it is.
const READY: Duration = Duration::from_secs(20);
/// Processes of one role that live at the same time: one, its successor, and those that drain.
const MOST_BESIDE: u8 = 8;

/// All processes of the product.
#[derive(Debug)]
pub(crate) struct Supervisor {
    recipes: Recipes,
    events: mpsc::UnboundedSender<Event>,
    slots: Vec<Slot>,
    /// Numbers that were given out.
    numbers: u64,
}

impl Supervisor {
    /// Starts all of them. The control plane has listed every object before the others start.
    pub(crate) async fn start(recipes: Recipes, events: mpsc::UnboundedSender<Event>) -> anyhow::Result<Self> {
        let roles = recipes.roles();
        let mut supervisor = Self { recipes, events, slots: Vec::new(), numbers: 0 };
        for role in roles {
            supervisor.slots.push(Slot::new(role));
            let at = supervisor.slots.len() - 1;
            supervisor.spawn(at, State::Running, &processes::own_binary())?;
            if supervisor.slots[at].role == Role::Control {
                supervisor.wait_for_control(at).await?;
            }
        }
        Ok(supervisor)
    }

    /// Its socket is there once it has listed every object.
    async fn wait_for_control(&self, at: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let Slot { role, processes, .. } = &self.slots[at];
        let Some(process) = processes.last() else { return Ok(()) };
        while !process.admin.exists() {
            if Instant::now() > deadline || !Path::new(&format!("/proc/{}", process.pid)).exists() {
                bail!("the control plane did not start: {}", self.recipes.last_words(role));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Starts a process of a slot, beside those that it has.
    fn spawn(&mut self, at: usize, state: State, binary: &Path) -> anyhow::Result<u64> {
        let slot = &mut self.slots[at];
        let free = |place: &u8| slot.processes.iter().all(|process| process.place != *place);
        let place = (1..=MOST_BESIDE).find(free);
        let place = place.with_context(|| format!("{MOST_BESIDE} processes of {} drain already", slot.role.name()))?;
        let started = self.recipes.start(&slot.role, place, binary)?;
        self.numbers += 1;
        let (number, pid, ended) = (self.numbers, started.child.pid, started.child.ended);
        let (events, role) = (self.events.clone(), slot.role.clone());
        tokio::spawn(async move {
            let how = ended.await.map_or_else(|_| "lost".to_owned(), children::describe);
            // Who does not listen any more has ended the box.
            let _ = events.send(Event::ProcessEnded { role, number, how });
        });
        let (admin, metrics, started) = (started.admin, started.metrics, Instant::now());
        slot.processes.push(Process { number, place, pid, admin, metrics, state, started });
        Ok(number)
    }

    // ---- what happens ---------------------------------------------------------------------------

    /// A process has ended.
    pub(crate) fn ended(&mut self, role: &Role, number: u64, how: &str) {
        let Some(at) = self.slots.iter().position(|slot| slot.role == *role) else { return };
        let slot = &mut self.slots[at];
        let Some(index) = slot.processes.iter().position(|process| process.number == number) else { return };
        let process = slot.processes.remove(index);
        let name = role.name();
        match process.state {
            State::Draining => {
                tracing::info!(process = name, how, "a process that was told to end has ended");
                return;
            }
            State::Starting => {
                let words = self.recipes.last_words(role);
                slot.upgrade_failed(&format!("the new {name} has ended ({how}) before it was ready: {words}"));
            }
            State::Running => slot.last_exit = Some(how.to_owned()),
        }
        tracing::error!(process = name, how, "a process has ended");
        // One that starts will take over.
        if slot.current().is_none() && !slot.held {
            let pause = slot.pause.after(process.started.elapsed());
            if pause.is_zero() {
                self.start_again(at);
            } else {
                self.plan(at, pause);
            }
        }
        self.answer_killers(at, how);
    }

    fn plan(&mut self, at: usize, pause: Duration) {
        self.numbers += 1;
        let (slot, number) = (&mut self.slots[at], self.numbers);
        slot.due = Some((number, Instant::now() + pause));
        let (events, role) = (self.events.clone(), slot.role.clone());
        tokio::spawn(async move {
            sleep(pause).await;
            let _ = events.send(Event::ProcessDue { role, number });
        });
    }

    /// The pause before a restart is over.
    pub(crate) fn due(&mut self, role: &Role, number: u64) {
        let waits = |slot: &Slot| slot.role == *role && slot.due.is_some_and(|(waited_for, _)| waited_for == number);
        if let Some(at) = self.slots.iter().position(waits) {
            self.start_again(at);
        }
    }

    fn start_again(&mut self, at: usize) {
        self.slots[at].due = None;
        let binary = self.slots[at].binary.clone();
        match self.spawn(at, State::Running, &binary) {
            Ok(_) => self.slots[at].restarts += 1,
            Err(error) => {
                let how = format!("{error:#}");
                tracing::error!(error = how, "a process cannot be started again");
                self.slots[at].last_exit = Some(how);
                let pause = self.slots[at].pause.after(Duration::ZERO);
                self.plan(at, pause.max(FIRST_PAUSE));
            }
        }
    }

    fn answer_killers(&mut self, at: usize, how: &str) {
        let slot = &mut self.slots[at];
        let name = slot.role.name();
        let (sentence, process) = match (slot.current(), slot.due) {
            _ if slot.held => {
                (format!("{name} is held down ({how}); `justmtls demo resume {name}` starts it again"), None)
            }
            (Some(process), _) => (format!("{name} has ended ({how}) and was started again"), Some(process)),
            (None, due) => {
                let left = due.map_or(0, |(_, when)| when.saturating_duration_since(Instant::now()).as_millis());
                (format!("{name} has ended ({how}) and will be started again in {left} ms"), None)
            }
        };
        let answers: Vec<_> = (0..slot.killers.len()).map(|_| answer(&sentence, process)).collect();
        for (killer, answer) in slot.killers.drain(..).zip(answers) {
            // Who asked may have left.
            let _ = killer.send(answer);
        }
    }

    /// A new process is ready to take over, or will not be.
    pub(crate) fn upgraded(&mut self, role: &Role, number: u64, ready: Result<(), String>) {
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.role == *role) else { return };
        if slot.upgrade.as_ref().is_none_or(|upgrade| upgrade.number != number) {
            return;
        }
        let name = role.name();
        let Some(new) = slot.processes.iter().position(|process| process.number == number) else { return };
        if let Err(why) = ready {
            children::send(slot.processes[new].pid, Signal::SIGKILL);
            slot.upgrade_failed(&format!(
                "the new {name} was not ready within {} s ({why}); the old one goes on",
                READY.as_secs()
            ));
            return;
        }
        let Some(Upgrade { binary, reply, .. }) = slot.upgrade.take() else { return };
        slot.binary = binary;
        slot.pause = Pause::default();
        for old in slot.processes.iter_mut().filter(|process| process.state == State::Running) {
            old.state = State::Draining;
            children::send(old.pid, Signal::SIGTERM);
        }
        slot.processes[new].state = State::Running;
        let sentence = format!("a new {name} runs, and the old one was told to end");
        let _ = reply.send(answer(&sentence, Some(&slot.processes[new])));
    }

    // ---- what somebody wants --------------------------------------------------------------------

    /// Kills a process. The answer comes when it has ended.
    pub(crate) fn kill(&mut self, name: &str, hold: bool, reply: Sender<Reply>) {
        let slot = match self.slot(name) {
            Ok(slot) => slot,
            Err(sentence) => return refuse(&reply, sentence),
        };
        let name = slot.role.name();
        if slot.held {
            return refuse(
                &reply,
                format!("{name} is held down already; `justmtls demo resume {name}` starts it again"),
            );
        }
        slot.held = hold;
        match slot.current() {
            Some(process) => {
                children::send(process.pid, Signal::SIGKILL);
                slot.killers.push(reply);
            }
            None if hold => {
                slot.due = None;
                let _ = reply.send(answer(&format!("{name} had ended, and is held down"), None));
            }
            None => refuse(&reply, format!("{name} has ended already, and will be started again")),
        }
    }

    /// Starts what is held down, or waits for its restart.
    pub(crate) fn resume(&mut self, name: &str) -> Reply {
        let slot = match self.slot(name) {
            Ok(slot) => slot,
            Err(sentence) => return (Err(sentence), Vec::new()),
        };
        let name = slot.role.name();
        if slot.current().is_some() {
            return (Err(format!("{name} runs; `justmtls demo kill {name} --hold` holds it down")), Vec::new());
        }
        slot.held = false;
        slot.pause = Pause::default();
        let role = slot.role.clone();
        if let Some(at) = self.slots.iter().position(|slot| slot.role == role) {
            self.start_again(at);
            if let Some(process) = self.slots[at].current() {
                return answer(&format!("{name} was started again"), Some(process));
            }
        }
        (Err(format!("{name} cannot be started; `justmtls demo status` says why")), Vec::new())
    }

    /// Starts a new process beside the one that runs. The answer comes when it has taken over, or will not.
    pub(crate) fn upgrade(&mut self, name: &str, binary: Option<&Path>, reply: Sender<Reply>) {
        if let Err(error) = self.try_upgrade(name, binary, reply.clone()) {
            refuse(&reply, format!("{error:#}"));
        }
    }

    fn try_upgrade(&mut self, name: &str, binary: Option<&Path>, reply: Sender<Reply>) -> anyhow::Result<()> {
        let slot = self.slot(name).map_err(anyhow::Error::msg)?;
        let (role, name) = (slot.role.clone(), slot.role.name());
        if role == Role::Control {
            bail!("the box has one control plane, at one address: `justmtls demo kill control` starts it anew");
        }
        if slot.current().is_none() {
            bail!("{name} does not run; `justmtls demo resume {name}` starts it");
        }
        if slot.upgrade.is_some() {
            bail!("{name} is being upgraded already");
        }
        let binary = match binary {
            None => slot.binary.clone(),
            Some(path) => {
                self.numbers += 1;
                let offered = processes::offer_binary(path, self.numbers);
                offered.with_context(|| format!("cannot use {} in the box", path.display()))?
            }
        };
        let at = self.slots.iter().position(|slot| slot.role == role).context("a slot does not go")?;
        let number = self.spawn(at, State::Starting, &binary)?;
        let slot = &mut self.slots[at];
        let Some(process) = slot.processes.last() else { return Ok(()) };
        let (admin, events) = (process.admin.clone(), self.events.clone());
        slot.upgrade = Some(Upgrade { number, binary, reply });
        tokio::spawn(async move {
            let ready = wait_until_ready(admin).await;
            let _ = events.send(Event::Upgraded { role, number, ready });
        });
        Ok(())
    }

    fn slot(&mut self, name: &str) -> Result<&mut Slot, String> {
        let names = self.names();
        let slot = self.slots.iter_mut().find(|slot| slot.role.is_called(name));
        slot.ok_or_else(|| format!("there is no process {name}; there are {names}"))
    }

    fn names(&self) -> String {
        self.slots.iter().map(|slot| slot.role.name()).collect::<Vec<_>>().join(", ")
    }

    // ---- what there is --------------------------------------------------------------------------

    /// A process' socket for dumps, and its log; or a sentence with the names that there are. The one that drains is
    /// called `NAME/draining`.
    pub(crate) fn find(&self, name: &str) -> Result<(Option<PathBuf>, PathBuf), String> {
        let (plain, wanted) = match name.strip_suffix("/draining") {
            Some(plain) => (plain, State::Draining),
            None => (name, State::Running),
        };
        let slot = self.slots.iter().find(|slot| slot.role.is_called(plain));
        let slot = slot.ok_or_else(|| format!("there is no process {name}; there are {}", self.names()))?;
        let process = slot.processes.iter().rfind(|process| process.state == wanted);
        Ok((process.map(|process| process.admin.clone()), self.recipes.log(&slot.role)))
    }

    /// The control plane's socket for dumps.
    pub(crate) fn control(&self) -> Option<PathBuf> {
        self.find(&Role::Control.name()).ok()?.0
    }

    /// The processes of a node, or those that are on none, for `status`; with handles on them.
    pub(crate) fn shown(&self, node: Option<&str>, handles: &mut Vec<OwnedFd>) -> Vec<Value> {
        self.slots.iter().filter(|slot| slot.role.node() == node).flat_map(|slot| slot.shown(handles)).collect()
    }

    /// What does not run and should: a sentence each.
    pub(crate) fn problems(&self) -> impl Iterator<Item = String> {
        self.slots.iter().filter(|slot| slot.current().is_none()).map(|slot| {
            let (name, how) = (slot.role.name(), slot.last_exit.as_deref().unwrap_or("it was never started"));
            if slot.held {
                format!("the process {name} is held down; `justmtls demo resume {name}` starts it again")
            } else {
                format!(
                    "the process {name} has ended ({how}) and will be started again; `justmtls demo admin {name} /log` \
                     shows its last words"
                )
            }
        })
    }
}

/// A sentence, and the process that it is about.
fn answer(sentence: &str, process: Option<&Process>) -> Reply {
    let (mut value, mut handles) = (json!({ "sentence": sentence, "pid": null }), Vec::new());
    if let Some(process) = process {
        give_handle(&mut value, process, &mut handles);
    }
    (Ok(value), handles)
}

fn refuse(reply: &Sender<Reply>, sentence: String) {
    // Who asked may have left.
    let _ = reply.send((Err(sentence), Vec::new()));
}

/// Until a process says that it is ready; what it says instead otherwise.
async fn wait_until_ready(admin: PathBuf) -> Result<(), String> {
    let deadline = Instant::now() + READY;
    loop {
        match admin::page(admin.clone(), "/readyz").await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(format!("{error:#}")),
            Err(_) => sleep(LOOK).await,
        }
    }
}
