//! The node as it is: namespaces that are held, captures that were made, the link to the proxy. It does what
//! [`Pods`] decides, and keeps slow work off the main thread.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use linux::netns::NetNs;
use mesh::PodUid;
use tokio::sync::{mpsc, oneshot, watch};
use wire::discovery::NodePod;
use wire::pods::{CniResult, FromAgent, Listener, PodAdded, SocketKind};

use crate::admin::Shown;
use crate::capture::{Capture, Listeners, SocketKind as Made};
use crate::cni::Asked;
use crate::discovery::Heard;
use crate::failure::Failure;
use crate::pods::{Action, Pods, Request};
use crate::process::Event;
use crate::proxy::{Batches, Link, Said};
use crate::rules::{CapturePlan, Marks};
use crate::verify::{self, Depth, Follower, Found};

/// All of it.
pub(crate) struct Node {
    pods: Pods,
    /// By inode.
    namespaces: HashMap<u64, NetNs>,
    captures: HashMap<PodUid, Captured>,
    waiting: HashMap<Request, oneshot::Sender<CniResult>>,
    /// The proxy that said hello last.
    link: Option<(u64, Link)>,
    batches: Batches,
    captured: watch::Sender<BTreeSet<PodUid>>,
    events: mpsc::Sender<Event>,
    shown: Arc<Shown>,
    /// Owner of the listeners: a uid that no pod has (D5).
    listener_owner: Option<u32>,
    /// How often all captures were looked at.
    looks: u64,
}

/// What was made for a pod.
struct Captured {
    capture: Arc<Mutex<Capture>>,
    listeners: Arc<Listeners>,
    /// `None` where the kernel's notifications cannot be watched: it is looked at now and then.
    _follower: Option<Follower>,
}

impl Node {
    /// A node without pods.
    pub(crate) fn new(listener_owner: Option<u32>, events: mpsc::Sender<Event>, shown: Arc<Shown>) -> Self {
        Self {
            pods: Pods::default(),
            namespaces: HashMap::new(),
            captures: HashMap::new(),
            waiting: HashMap::new(),
            link: None,
            batches: Batches::new(),
            captured: watch::Sender::new(BTreeSet::new()),
            events,
            shown,
            listener_owner,
            looks: 0,
        }
    }

    /// The pods that are captured, as they become so.
    pub(crate) fn captured(&self) -> watch::Receiver<BTreeSet<PodUid>> {
        self.captured.subscribe()
    }

    /// The runtime asks.
    pub(crate) fn asked(&mut self, request: Request, asked: Asked, reply: oneshot::Sender<CniResult>) {
        self.waiting.insert(request, reply);
        let actions = match asked {
            Asked::Add(add, namespace) => {
                let inode = namespace.inode();
                let actions = self.pods.add(request, &add, inode);
                if self.pods.holds(inode) {
                    self.namespaces.entry(inode).or_insert(namespace);
                }
                actions
            }
            Asked::Delete(pod) => self.pods.delete(request, &pod),
        };
        self.act(actions);
    }

    /// A request has waited long enough.
    pub(crate) fn overdue(&mut self, request: Request) {
        let actions = self.pods.overdue(request);
        self.act(actions);
    }

    /// The control plane says something.
    pub(crate) fn heard(&mut self, heard: Heard) {
        let actions = match heard {
            Heard::Connected | Heard::Lost => {
                let connected = matches!(heard, Heard::Connected);
                self.shown.metrics.control_plane.set(connected.into());
                self.pods.control_plane(connected);
                return;
            }
            Heard::Complete => {
                self.shown.complete();
                return;
            }
            Heard::Confirmed(pods) => {
                self.shown.metrics.confirmed.set(count(pods.len()));
                return;
            }
            Heard::Pod(pod) => self.pods.know(pod),
            Heard::PodGone(pod) => self.pods.forget(&pod),
        };
        self.act(actions);
    }

    /// A proxy says something; `number` is its link's.
    pub(crate) fn said(&mut self, number: u64, said: Said) {
        let current = self.link.as_ref().is_some_and(|(current, _)| *current == number);
        let actions = match said {
            Said::Hello(link) => {
                self.shown.journal.change("proxy-connected", "", "");
                self.shown.metrics.proxy.set(1);
                self.link = Some((number, link));
                self.pods.proxy_connected()
            }
            // Of a proxy whose place another one took.
            Said::Gone | Said::Ready(_) | Said::Want(..) if !current => return,
            Said::Gone => {
                self.lose_proxy("it closed the connection");
                return;
            }
            Said::Ready(pod) => self.pods.ready(&pod),
            Said::Want(pod, kind, count) => {
                self.make_sockets(pod, kind, count);
                return;
            }
        };
        self.act(actions);
    }

    /// Listeners and routing of a pod are made, or not.
    pub(crate) fn prepared(&mut self, pod: &PodUid, attempt: u64, outcome: Result<Box<Capture>, Failure>) {
        let (made, outcome) = match outcome {
            Ok(capture) => (Some(capture), Ok(())),
            Err(failure) => (None, Err(failure)),
        };
        let (keep, actions) = self.pods.prepared(pod, attempt, outcome);
        if let Some(mut capture) = made.filter(|_| keep) {
            let (listeners, changes) = (capture.listeners(), capture.take_changes());
            let capture = Arc::new(Mutex::new(*capture));
            let followed =
                changes.map(|changes| verify::follow(pod.clone(), capture.clone(), changes, self.events.clone()));
            let _follower = followed.transpose().unwrap_or_else(|error| {
                self.shown.journal.problem("not-followed", pod.as_str(), &error.to_string());
                None
            });
            self.captures.insert(pod.clone(), Captured { capture, listeners, _follower });
        }
        self.act(actions);
    }

    /// Rules of a pod were loaded and read back, or not.
    pub(crate) fn begun(&mut self, pod: &PodUid, attempt: u64, outcome: Result<(), Failure>) {
        let actions = self.pods.begun(pod, attempt, outcome);
        self.act(actions);
    }

    /// Something was found when captures were looked at.
    pub(crate) fn found(&mut self, found: Vec<(PodUid, Found)>) {
        for (pod, found) in found {
            match found {
                Found::Repaired { broken } => {
                    self.shown.metrics.repairs.inc();
                    self.shown.journal.problem("repaired", pod.as_str(), &broken);
                }
                Found::Strengthened => {
                    let detail = "connections from before its capture have ended";
                    self.shown.journal.change("guard-complete", pod.as_str(), detail);
                }
                Found::Dropped(packets) => {
                    self.shown.metrics.guard_drops.inc_by(packets);
                }
                Found::Failed { sentence } => {
                    self.shown.metrics.repair_failures.inc();
                    self.shown.journal.problem("repair-failed", pod.as_str(), &sentence);
                }
            }
        }
    }

    /// Looks at all captures, and sends what was found.
    pub(crate) fn look(&mut self) {
        self.looks += 1;
        let depth = if self.looks.is_multiple_of(verify::WHOLE) { Depth::Whole } else { Depth::Listeners };
        let captured = self.captured.borrow().clone();
        let captures = captured.into_iter().filter_map(|pod| {
            let capture = self.captures.get(&pod)?.capture.clone();
            Some((pod, capture))
        });
        let captures: Vec<_> = captures.collect();
        self.blocking(move || Event::Looked(verify::sweep(captures, depth)));
    }

    /// Tries again what failed.
    pub(crate) fn retry(&mut self) {
        let actions = self.pods.retry();
        if !actions.is_empty() {
            self.act(actions);
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prepare { pod, namespace, attempt } => self.prepare(&pod, namespace, attempt),
                Action::Offer(pod) => self.offer(&pod),
                Action::Begin { pod, attempt } => self.begin(pod, attempt),
                Action::Exclude(pod, ports) => self.exclude(&pod, ports),
                Action::Withdraw(pod) => self.withdraw(&pod),
                Action::Close(namespace) => drop(self.namespaces.remove(&namespace)),
                Action::Answer(request, answer) => self.answer(request, answer),
                Action::Report(pod, failure) => {
                    self.shown.metrics.failed(&failure);
                    self.shown.journal.problem(failure.as_str(), pod.as_str(), &failure.to_string());
                }
            }
        }
        self.publish();
    }

    fn prepare(&self, pod: &NodePod, namespace: u64, attempt: u64) {
        let uid = pod.pod.clone();
        let namespace = self.namespaces.get(&namespace).map(NetNs::try_clone);
        let (owner, addresses) = (self.listener_owner, pod.addresses.iter().copied().collect());
        let ports = pod.excluded_ports.iter().copied().collect::<BTreeSet<_>>();
        self.blocking(move || {
            let outcome = match (namespace, Marks::random()) {
                (Some(Ok(namespace)), Ok(marks)) => {
                    let plan = CapturePlan { marks, addresses, excluded_in: ports.clone(), excluded_out: ports };
                    Capture::prepare(namespace, plan, owner).map(Box::new).map_err(Failure::from)
                }
                (Some(Err(error)), _) | (_, Err(error)) => {
                    let sentence = format!("the namespace or random marks cannot be had: {error}");
                    Err(Failure::Capture { name: "resources", sentence })
                }
                (None, _) => Err(Failure::Internal),
            };
            Event::Prepared(uid, attempt, outcome)
        });
    }

    fn offer(&mut self, pod: &NodePod) {
        let (Some((_, link)), Some(captured)) = (&self.link, self.captures.get(&pod.pod)) else { return };
        let (listeners, descriptors) = match duplicates(&captured.listeners) {
            Ok(duplicates) => duplicates.into_iter().unzip(),
            Err(error) => {
                self.shown.journal.problem("no-descriptors", pod.pod.as_str(), &error.to_string());
                self.lose_proxy("its pods' listeners cannot be duplicated");
                return;
            }
        };
        let added = PodAdded {
            pod: pod.pod.clone(),
            name: pod.name.clone(),
            identity: pod.identity.clone(),
            addresses: pod.addresses.clone(),
            listeners,
        };
        if !link.send(&FromAgent::PodAdded(added), descriptors) {
            self.lose_proxy("it does not read what it is sent");
        }
    }

    fn begin(&self, pod: PodUid, attempt: u64) {
        let Some(capture) = self.captures.get(&pod).map(|captured| captured.capture.clone()) else { return };
        self.blocking(move || {
            let outcome = lock(&capture).begin().map_err(Failure::from);
            Event::Begun(pod, attempt, outcome)
        });
    }

    fn exclude(&self, pod: &PodUid, ports: Vec<u16>) {
        let Some(capture) = self.captures.get(pod).map(|captured| captured.capture.clone()) else { return };
        let (pod, ports) = (pod.clone(), ports.into_iter().collect::<BTreeSet<_>>());
        self.blocking(move || {
            // Where it fails the next look finds rules that are not those wanted, and tries again.
            let found = lock(&capture).exclude(ports).err();
            let found = found.map(|error| (pod, Found::Failed { sentence: format!("excluded ports: {error}") }));
            Event::Found(found.into_iter().collect())
        });
    }

    /// The proxy first: as long as it has the listeners they are not closed.
    fn withdraw(&mut self, pod: &PodUid) {
        if let Some((_, link)) = &self.link
            && !link.send(&FromAgent::PodRemoved { pod: pod.clone() }, Vec::new())
        {
            self.lose_proxy("it does not read what it is sent");
        }
        if self.captures.remove(pod).is_some() {
            self.shown.journal.change("released", pod.as_str(), "listeners and sockets are closed");
        }
    }

    fn answer(&mut self, request: Request, answer: CniResult) {
        self.shown.metrics.answered(&answer);
        if let Some(reply) = self.waiting.remove(&request) {
            // A runtime that does not wait any more asks again.
            let _ = reply.send(answer);
        }
    }

    fn lose_proxy(&mut self, why: &str) {
        self.shown.journal.problem("proxy-gone", "", why);
        self.shown.metrics.proxy.set(0);
        self.link = None;
        self.pods.proxy_gone();
    }

    fn make_sockets(&mut self, pod: PodUid, kind: SocketKind, count: usize) {
        let Some((_, link)) = &self.link else { return };
        let link = link.sender();
        let turn = self.batches.turn(&pod, kind);
        let capture = self.captures.get(&pod).map(|captured| captured.capture.clone());
        let (capture, mut turn) = match (capture, turn) {
            (Some(capture), Some(turn)) => (capture, turn),
            (capture, _) => {
                let error = match capture {
                    None => "this node captures no such pod",
                    Some(_) => "the last batch of that kind is still on its way",
                };
                if !link.send(&FromAgent::Sockets { pod, kind, error: error.into() }, Vec::new(), None) {
                    self.lose_proxy("it does not read what it is sent");
                }
                return;
            }
        };
        let shown = self.shown.clone();
        tokio::spawn(async move {
            turn.wait().await;
            let made = tokio::task::spawn_blocking(move || lock(&capture).sockets(of(kind), count)).await;
            let (sockets, error) = match made {
                Ok(Ok(sockets)) => (sockets, String::new()),
                Ok(Err(error)) => (Vec::new(), error.to_string()),
                Err(panic) => (Vec::new(), panic.to_string()),
            };
            match error.is_empty() {
                true => shown.metrics.made(kind, sockets.len()),
                false => shown.metrics.not_made(kind),
            }
            // Where it does not read, its next request finds that out.
            link.send(&FromAgent::Sockets { pod, kind, error }, sockets, Some(turn));
        });
    }

    /// Runs what may block on a thread for that; its result is an event.
    fn blocking(&self, work: impl FnOnce() -> Event + Send + 'static) {
        let events = self.events.clone();
        tokio::task::spawn_blocking(move || {
            let event = work();
            // When nobody listens any more the process ends.
            let _ = events.blocking_send(event);
        });
    }

    /// Tells the reporter and people how things are.
    fn publish(&self) {
        let captured = self.pods.captured();
        self.shown.metrics.captured.set(count(captured.len()));
        self.captured.send_if_modified(|before| {
            for pod in captured.difference(before) {
                self.shown.journal.change("captured", pod.as_str(), "the rules were read back");
            }
            let changed = *before != captured;
            *before = captured;
            changed
        });
        let pods = self.pods.shown();
        self.shown.metrics.pods.set(count(pods.len()));
        self.shown.show(pods);
    }
}

fn lock(capture: &Mutex<Capture>) -> MutexGuard<'_, Capture> {
    capture.lock().unwrap_or_else(PoisonError::into_inner)
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn duplicates(listeners: &Listeners) -> std::io::Result<Vec<(Listener, OwnedFd)>> {
    let all = [
        (Listener::OutboundV4, Some(&listeners.out_v4)),
        (Listener::OutboundV6, listeners.out_v6.as_ref()),
        (Listener::InboundV4, Some(&listeners.in_v4)),
        (Listener::InboundV6, listeners.in_v6.as_ref()),
    ];
    let there = all.into_iter().filter_map(|(kind, listener)| Some((kind, listener?)));
    there.map(|(kind, listener)| Ok((kind, listener.as_fd().try_clone_to_owned()?))).collect()
}

fn of(kind: SocketKind) -> Made {
    match kind {
        SocketKind::OuterV4 => Made::OutV4,
        SocketKind::OuterV6 => Made::OutV6,
        SocketKind::InnerV4 => Made::InV4,
        SocketKind::InnerV6 => Made::InV6,
    }
}
