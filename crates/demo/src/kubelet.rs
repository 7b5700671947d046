//! What the kubelet does for one pod: its network, its mounts, its programs, and whether it is ready.
//!
//! A pod's life is one task, [`run`], from the plan to the last process. It decides nothing about other
//! pods, and tells the cluster how the pod is through [`Event::Pod`].

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use linux::netns::NetNs;
use linux::privileges::User;
use linux::sandbox::Authority;
use manifests::k8s_openapi::api::core::v1::{Container, PodSpec};
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::boot::Event;
use crate::children::{self, Children};
use crate::cluster::{PodPlan, PodState};
use crate::network::{Network, PodNetwork};
use crate::probes;
use crate::programs::{self, Program, Progress};
use crate::runtime;

/// How often readiness is looked at; the kernel has no event for "a port listens now".
const LOOK: Duration = Duration::from_millis(20);
/// The same once a pod is ready: only its end is news then.
const LOOK_WHEN_READY: Duration = Duration::from_millis(250);
/// A new agent has this long to hear from others what is captured: its proxy calls five times a second.
const INTRODUCTION: Duration = Duration::from_secs(2);
/// How long to wait between two attempts to have a pod captured, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long programs have to end by themselves when their pod is removed.
const GRACE: Duration = Duration::from_millis(1500);

/// What every pod's task needs.
#[derive(Debug)]
pub(crate) struct Kubelet {
    pub(crate) authority: Authority,
    pub(crate) network: Arc<Network>,
    pub(crate) children: Arc<Children>,
    pub(crate) events: mpsc::UnboundedSender<Event>,
    /// Where the output of programs goes.
    pub(crate) logs: PathBuf,
}

/// A pod's namespaces, and as whom its programs run.
#[derive(Debug)]
pub(crate) struct Rooms {
    pub(crate) network: PodNetwork,
    pub(crate) mounts: OwnedFd,
    /// As whom a program runs if nobody says otherwise.
    pub(crate) user: Option<User>,
}

/// News about a pod.
#[derive(Debug)]
pub(crate) enum PodNews {
    /// Programs can be run in it from now on.
    Rooms(Arc<Rooms>),
    /// How it is.
    State(PodState),
    /// It has ended for good.
    Gone,
}

/// A pod's whole life. `stop` becoming true ends it.
pub(crate) async fn run(kubelet: Arc<Kubelet>, plan: PodPlan, mut stop: watch::Receiver<bool>) {
    let life = Life { kubelet, plan };
    // Not to be interrupted: what is half made would be nobody's.
    match life.make_rooms().await {
        Ok(rooms) => {
            let rooms = Arc::new(rooms);
            tokio::select! {
                () = life.live(&rooms) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            life.end(&rooms).await;
        }
        Err(error) => {
            life.say("Failed", false, format!("{error:#}"));
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }
    life.tell(PodNews::Gone);
}

struct Life {
    kubelet: Arc<Kubelet>,
    plan: PodPlan,
}

impl Life {
    async fn make_rooms(&self) -> anyhow::Result<Rooms> {
        let (kubelet, plan) = (self.kubelet.clone(), self.plan.clone());
        // Netlink and mounts block, if briefly.
        tokio::task::spawn_blocking(move || {
            let (user, _) = programs::security(&plan.spec, None, kubelet.authority)?;
            let mounts = programs::furnish(&plan)?;
            let network = kubelet.network.add_pod(&plan.uid, &plan.node.name, plan.addresses)?;
            // Before the agent makes a socket there: sockets take the settings of their first moment.
            let of_pod = plan.spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
            for sysctl in of_pod {
                if let Err(error) = network.set(&sysctl.name, &sysctl.value) {
                    kubelet.network.remove_pod(&network)?;
                    return Err(error.into());
                }
            }
            Ok(Rooms { network, mounts, user })
        })
        .await?
    }

    async fn live(&self, rooms: &Arc<Rooms>) {
        let agent = runtime::agent(&self.plan);
        self.capture(&rooms.network.path).await;
        self.tell(PodNews::Rooms(rooms.clone()));
        let progress = watch::Sender::new(Progress::default());
        tokio::join!(
            self.run_programs(rooms, &progress),
            self.watch_readiness(rooms, progress.subscribe()),
            self.tell_new_agents(agent, &rooms.network.path)
        );
    }

    /// Asks the node's agent until it says yes: no program of the pod starts before, as with a CNI plugin.
    async fn capture(&self, path: &Path) {
        let mut delay = RETRY.0;
        while let Err(error) = runtime::add(&self.plan, path).await {
            self.say("Pending", false, format!("waits to be captured: {error:#}"));
            sleep(delay).await;
            delay = (delay * 2).min(RETRY.1);
        }
    }

    /// An agent hears from the one before, or from its proxy, of what is captured, and of nothing else. On Kubernetes it asks the
    /// runtime for all that runs; here it is told, when it has heard from them.
    async fn tell_new_agents(&self, mut known: Option<runtime::Agent>, path: &Path) {
        loop {
            sleep(LOOK_WHEN_READY).await;
            let agent = runtime::agent(&self.plan);
            if agent.is_none() || agent == known {
                continue;
            }
            sleep(INTRODUCTION).await;
            if agent == runtime::agent(&self.plan) && runtime::add(&self.plan, path).await.is_ok() {
                known = agent;
            }
        }
    }

    async fn run_programs(&self, rooms: &Arc<Rooms>, progress: &watch::Sender<Progress>) {
        for container in self.plan.spec.init_containers.iter().flatten() {
            let program = self.program(rooms, container);
            program.keep_running("OnFailure", &watch::Sender::new(Progress::default())).await;
        }
        let mut all = JoinSet::new();
        for container in &self.plan.spec.containers {
            let (program, progress) = (self.program(rooms, container), progress.clone());
            let policy = self.plan.spec.restart_policy.clone().unwrap_or_else(|| "Always".to_owned());
            all.spawn(async move { program.keep_running(&policy, &progress).await });
        }
        let succeeded = all.join_all().await.into_iter().all(|success| success);
        progress.send_modify(|progress| progress.ended = Some(succeeded));
    }

    fn program(&self, rooms: &Arc<Rooms>, container: &Container) -> Program {
        Program {
            kubelet: self.kubelet.clone(),
            rooms: rooms.clone(),
            plan: self.plan.clone(),
            container: container.clone(),
        }
    }

    async fn watch_readiness(&self, rooms: &Rooms, progress: watch::Receiver<Progress>) {
        let port = first_tcp_port(&self.plan.spec);
        let programs = self.plan.spec.containers.len();
        let probed = probes::any(&self.plan.spec);
        let mut last = None;
        loop {
            let now = progress.borrow().clone();
            let state = match (now.ended, port) {
                (Some(true), _) => ("Succeeded", false, String::new()),
                (Some(false), _) => ("Failed", false, now.message),
                (None, _) if now.running < programs => ("Pending", false, now.message),
                (None, Some(port)) if !listens(&rooms.network.namespace, port) => {
                    ("Running", false, format!("nothing listens on port {port} yet"))
                }
                (None, _) if probed => match self.probe().await {
                    Ok(()) => ("Running", true, String::new()),
                    Err(why) => ("Running", false, why),
                },
                (None, _) => ("Running", true, String::new()),
            };
            if last.as_ref() != Some(&state) {
                self.say(state.0, state.1, state.2.clone());
                last = Some(state.clone());
            }
            // A probe reaches the pod's programs, and is not made all the time.
            sleep(if state.1 || probed { LOOK_WHEN_READY } else { LOOK }).await;
        }
    }

    /// Asks what the pod's containers declare.
    async fn probe(&self) -> Result<(), String> {
        let (network, plan) = (self.kubelet.network.clone(), self.plan.clone());
        let asked = tokio::task::spawn_blocking(move || {
            let node = network.node(&plan.node.name).ok_or("its node is gone")?;
            probes::ask(node, &plan.spec, plan.addresses.v4.into())
        });
        asked.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    async fn end(&self, rooms: &Rooms) {
        let inode = rooms.network.namespace.inode();
        signal_all(inode, Signal::SIGTERM);
        let deadline = Instant::now() + GRACE;
        while !processes_in(inode).is_empty() && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        // Again and again: a process may be in the middle of a fork.
        while !processes_in(inode).is_empty() {
            signal_all(inode, Signal::SIGKILL);
            sleep(LOOK).await;
        }
        runtime::remove(&self.plan).await;
        if let Err(error) = self.kubelet.network.remove_pod(&rooms.network) {
            tracing::warn!(pod = self.plan.name, %error, "cannot remove a pod's network");
        }
    }

    fn say(&self, phase: &'static str, ready: bool, message: String) {
        self.tell(PodNews::State(PodState { phase, ready, message }));
    }

    fn tell(&self, news: PodNews) {
        // Who does not listen any more has ended the box.
        let _ = self.kubelet.events.send(Event::Pod { uid: self.plan.uid.clone(), news });
    }
}

fn first_tcp_port(spec: &PodSpec) -> Option<u16> {
    let ports = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
    let mut tcp = ports.filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
    tcp.next().and_then(|port| u16::try_from(port.container_port).ok())
}

/// Whether a TCP socket listens on `port` in the namespace, on any address.
fn listens(namespace: &NetNs, port: u16) -> bool {
    // `thread-self`: `/proc/net` would be the namespace of the main thread.
    let read = |family: &str| fs::read_to_string(format!("/proc/thread-self/net/{family}")).unwrap_or_default();
    let Ok(tables) = namespace.enter(|| [read("tcp"), read("tcp6")]) else { return false };
    tables.iter().any(|table| table_has_listener(table, port))
}

/// `  0: 00000000:1F90 00000000:0000 0A …`: local address, remote address, state; 0A is LISTEN.
fn table_has_listener(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().is_some_and(|local| local.ends_with(&suffix));
        local && fields.nth(1) == Some("0A")
    })
}

/// Every process in the network namespace, whoever started it: those of `exec`, too.
fn processes_in(inode: u64) -> Vec<u32> {
    let marker = format!("net:[{inode}]");
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        // Init's own threads visit namespaces, but its main thread never does, and that is who counts.
        .filter(|pid| *pid != 1)
        .filter(|pid| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|link| link.as_os_str() == &*marker))
        .collect()
}

fn signal_all(inode: u64, signal: Signal) {
    for pid in processes_in(inode) {
        children::send(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_from_a_connection_and_from_other_ports() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
            0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1 1\n   \
            1: 0100007F:0050 0100007F:A000 01 00000000:00000000 00:00000000 00000000 0 0 1 1\n";
        assert!(table_has_listener(table, 8080));
        assert!(!table_has_listener(table, 80), "an open connection is not a listener");
        assert!(!table_has_listener(table, 9090));
    }
}
