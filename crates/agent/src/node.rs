//! The node as it is: namespaces that are held, captures that were made, the link to the proxy. It does what
//! [`Pods`] decides, and keeps slow work off the main thread.

mod ending;
mod leaving;
mod seen;
mod sockets;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use linux::netns::NetNs;
use mesh::PodUid;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Duration, Instant};
use wire::discovery::NodePod;
use wire::pods::{CniResult, Ends, FromAgent, ToAgent, VERSION};
use wire::report::{CaptureFailure, Report};

use crate::admin::Shown;
use crate::capture::Capture;
use crate::cni::Asked;
use crate::discovery::Heard;
use crate::estate::{self, Inherited};
use crate::failure::Failure;
use crate::listeners::Listeners;
use crate::pods::{Action, Pods, Prepared, Request};
use crate::process::{Event, Handed};
use crate::proxies::{Change, Proxies};
use crate::proxy::{Batches, Link, Said};
use crate::rules::{CapturePlan, Marks};
use crate::running::Missing;
use crate::verify::{self, Depth, Follower, Found};

/// After so long without a proxy there is none that could know what an agent before this one had.
const NO_PREDECESSOR: Duration = Duration::from_secs(10);

/// All of it.
pub(crate) struct Node {
    pods: Pods,
    /// By inode.
    namespaces: HashMap<u64, NetNs>,
    captures: HashMap<PodUid, Captured>,
    /// What an agent before this one had, until it is taken over.
    inherited: HashMap<PodUid, Inherited>,
    waiting: HashMap<Request, oneshot::Sender<CniResult>>,
    proxies: Proxies,
    batches: Batches,
    reported: watch::Sender<Report>,
    /// Whether a report may be made.
    settled: watch::Sender<bool>,
    handed_over: bool,
    started: Instant,
    events: mpsc::Sender<Event>,
    shown: Arc<Shown>,
    /// Owner of the listeners: a uid that no pod has (D5).
    listener_owner: Option<u32>,
    /// Pods whose sandboxes the container runtime is asked for.
    wanted: watch::Sender<BTreeSet<PodUid>>,
    /// Whether pods that start are captured.
    answers: watch::Sender<bool>,
    missing: Missing,
    /// Captured too late: what is open then is ended.
    late: HashSet<PodUid>,
    /// How often all captures were looked at.
    looks: u64,
}

/// What was made for a pod.
struct Captured {
    capture: Arc<Mutex<Capture>>,
    listeners: Arc<Listeners>,
    /// How the node may show itself to the pod.
    gateways: Vec<IpAddr>,
    /// What was opened to the pod before its capture and is open still, as proxies were told.
    from_before: Vec<Ends>,
    /// Some of that is being ended.
    is_ending: bool,
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
            inherited: HashMap::new(),
            proxies: Proxies::default(),
            batches: Batches::new(),
            reported: watch::Sender::new(Report::default()),
            settled: watch::Sender::new(false),
            handed_over: false,
            started: Instant::now(),
            events,
            shown,
            listener_owner,
            wanted: watch::Sender::new(BTreeSet::new()),
            answers: watch::Sender::new(false),
            missing: Missing::default(),
            late: HashSet::new(),
            looks: 0,
        }
    }

    /// The pods that are captured and those that cannot be, as they become so.
    pub(crate) fn reported(&self) -> watch::Receiver<Report> {
        self.reported.subscribe()
    }

    /// Whether the captured pods are all that there are: until it is known what an agent before this one had, a report would
    /// take back what peers rely on. And none is made while something that an earlier connection said is not taken in: it
    /// may have released a pod.
    pub(crate) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
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
            Asked::Delete(pod, container) => return self.delete(request, &pod, &container),
            Asked::Check(pod) => self.pods.check(request, &pod),
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
                if !connected {
                    self.settled.send_replace(false);
                }
                self.publish();
                return;
            }
            Heard::Complete => {
                self.shown.complete();
                self.pods.complete()
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
        let actions = match said {
            Said::Hello(link, started) => self.welcome(number, link, started),
            Said::Drains(link) => {
                self.proxies.rejoin(number, link);
                return;
            }
            Said::Gone => {
                let change = self.proxies.gone(number);
                self.changed(change, "it closed the connection")
            }
            Said::Leaving => {
                let change = self.proxies.leaving(number);
                self.changed(change, "it drains")
            }
            Said::Ready(pod) if self.proxies.is_serving(number) => self.pods.ready(&pod),
            Said::Ready(pod) => {
                let change = self.proxies.ready(number, &pod);
                self.changed(change, "")
            }
            Said::Want(pod, kind, count) => {
                self.make_sockets(number, pod, kind, count);
                return;
            }
            Said::Held(added, descriptors) => self.inherit(added, descriptors),
            Said::HeldAll => {
                self.handed_over = true;
                if !self.inherited.is_empty() {
                    self.shown.inherited();
                }
                Vec::new()
            }
            Said::Keep(what, file) => {
                self.proxies.keep(number, what, file);
                return;
            }
            Said::End(pod, these) => {
                if self.proxies.is_serving(number) {
                    self.end_refused(pod, these);
                }
                return;
            }
        };
        self.act(actions);
    }

    /// Takes in what the agent had that this one takes the place of.
    pub(crate) fn succeed(&mut self, said: Vec<Said>) {
        for said in said {
            match said {
                Said::Held(added, descriptors) => {
                    let actions = self.inherit(added, descriptors);
                    self.act(actions);
                }
                Said::Keep(what, file) => self.proxies.inherit(what, file),
                _ => {}
            }
        }
        self.handed_over = true;
        self.shown.inherited();
    }

    /// All that the next agent needs, as messages with their descriptors.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn hand_over(&self) -> std::io::Result<Vec<Handed>> {
        let mut all = Vec::new();
        for pod in self.pods.served() {
            if let Some(captured) = self.captures.get(&pod.pod) {
                let (added, descriptors) = estate::added(&pod, &captured.listeners, &captured.gateways)?;
                all.push((ToAgent::Held(added).encode(), descriptors));
            }
        }
        for (what, file) in self.proxies.left()? {
            all.push((ToAgent::Keep(what).encode(), vec![file]));
        }
        all.push((ToAgent::HeldAll.encode(), Vec::new()));
        Ok(all)
    }

    fn inherit(&mut self, added: wire::pods::PodAdded, descriptors: Vec<OwnedFd>) -> Vec<Action> {
        let uid = added.pod.clone();
        if self.captures.contains_key(&uid) {
            return Vec::new();
        }
        let inherited = match Inherited::new(added, descriptors) {
            Ok(inherited) => inherited,
            Err(why) => {
                self.shown.journal.problem("not-inherited", uid.as_str(), &why);
                return Vec::new();
            }
        };
        let (pod, inode) = (inherited.pod.clone(), inherited.namespace.inode());
        match inherited.namespace.try_clone() {
            Ok(namespace) => self.namespaces.entry(inode).or_insert(namespace),
            Err(error) => {
                self.shown.journal.problem("not-inherited", uid.as_str(), &error.to_string());
                return Vec::new();
            }
        };
        self.inherited.insert(uid, inherited);
        let actions = self.pods.inherit(pod, inode);
        if !self.pods.holds(inode) {
            self.namespaces.remove(&inode);
        }
        actions
    }

    /// A proxy that comes while none serves does so at once; another one when it is ready for every pod.
    fn welcome(&mut self, number: u64, link: Link, started: Duration) -> Vec<Action> {
        let (kept, files) = match self.proxies.left() {
            Ok(left) => left.into_iter().unzip(),
            Err(error) => {
                self.shown.journal.problem("no-descriptors", "", &error.to_string());
                return Vec::new();
            }
        };
        if !link.send(&FromAgent::Hello { version: VERSION, kept }, files) {
            return Vec::new();
        }
        if self.proxies.is_free() {
            self.proxies.serve(number, link, started);
            self.serves("it serves");
            return self.pods.proxy_connected();
        }
        // Of an upgrade: when the agent goes first, both proxies come to the new one, in whatever order.
        if self.proxies.is_older(started) {
            self.shown.journal.change("proxy-connected", "", "a newer one serves, and it drains");
            self.proxies.drain(number, link);
            return Vec::new();
        }
        let served = self.pods.served();
        let awaited = served.iter().map(|pod| &pod.pod).filter(|pod| !self.pods.is_leaving(pod)).cloned().collect();
        if self.proxies.prepare(number, link, started, awaited).is_err() {
            self.shown.journal.problem("proxy-refused", "", "another one is about to take over");
            return Vec::new();
        }
        self.shown.journal.change("proxy-connected", "", "it takes over when it is ready for every pod");
        for pod in served {
            self.offer(&pod, Some(number));
        }
        let change = self.proxies.succeed();
        self.changed(change, "")
    }

    fn serves(&self, how: &str) {
        self.shown.journal.change("proxy-connected", "", how);
        self.shown.metrics.proxy.set(1);
    }

    /// The proxy that serves is another one, or none.
    fn changed(&mut self, change: Change, why: &str) -> Vec<Action> {
        match change {
            Change::Nothing => Vec::new(),
            Change::Lost => {
                self.shown.journal.problem("proxy-gone", "", why);
                self.shown.metrics.proxy.set(0);
                self.pods.proxy_gone();
                Vec::new()
            }
            Change::Succeeded(ready) => {
                self.serves("it takes the place of the one before");
                ready.iter().flat_map(|pod| self.pods.ready(pod)).collect()
            }
        }
    }

    /// Listeners and routing of a pod are made, or not.
    pub(crate) fn prepared(&mut self, pod: &PodUid, attempt: u64, outcome: Result<Box<Capture>, Failure>) {
        let (made, outcome) = match outcome {
            Ok(capture) => {
                let prepared = match (capture.has_begun(), capture.is_draining()) {
                    (false, _) => Prepared::Bare,
                    (true, false) => Prepared::Captured,
                    (true, true) => Prepared::Leaving,
                };
                (Some(capture), Ok(prepared))
            }
            Err(failure) => (None, Err(failure)),
        };
        let (keep, actions) = self.pods.prepared(pod, attempt, outcome);
        if let Some(mut capture) = made.filter(|_| keep) {
            self.inherited.remove(pod);
            let (listeners, changes) = (capture.listeners(), capture.take_changes());
            let gateways = capture.gateways().to_vec();
            let capture = Arc::new(Mutex::new(*capture));
            let followed =
                changes.map(|changes| verify::follow(pod.clone(), capture.clone(), changes, self.events.clone()));
            let _follower = followed.transpose().unwrap_or_else(|error| {
                self.shown.journal.problem("not-followed", pod.as_str(), &error.to_string());
                None
            });
            let (from_before, is_ending) = (Vec::new(), false);
            let captured = Captured { capture, listeners, gateways, from_before, is_ending, _follower };
            self.captures.insert(pod.clone(), captured);
        }
        self.act(actions);
    }

    /// Rules of a pod were loaded and read back, or not.
    pub(crate) fn begun(&mut self, pod: &PodUid, attempt: u64, outcome: Result<(), Failure>) {
        if outcome.is_ok() && self.late.remove(pod) {
            self.end_from_before(pod);
        }
        let actions = self.pods.begun(pod, attempt, outcome);
        self.act(actions);
    }

    /// Whether rules lead to listeners that are held here.
    pub(crate) fn has_standing(&self) -> bool {
        self.pods.standing().next().is_some()
    }

    /// Looks at all captures, and sends what was found.
    pub(crate) fn look(&mut self) {
        self.looks += 1;
        let depth = if self.looks.is_multiple_of(verify::WHOLE) { Depth::Whole } else { Depth::Listeners };
        let captures = self.pods.standing().filter_map(|pod| {
            let capture = self.captures.get(pod)?.capture.clone();
            Some((pod.clone(), capture))
        });
        let captures: Vec<_> = captures.collect();
        self.blocking(move || Event::Looked(verify::sweep(captures, depth)));
    }

    /// Tries again what failed.
    pub(crate) fn retry(&mut self) {
        if self.proxies.call_back() {
            self.shown.journal.change("proxy-called-back", "", "none serves: the one that drains is to start again");
        }
        self.report_failed();
        let actions = self.pods.retry();
        if !actions.is_empty() || !*self.settled.borrow() {
            self.act(actions);
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prepare { pod, namespace, attempt } => self.prepare(&pod, namespace, attempt),
                Action::Look { pod, namespace, attempt } => self.look_for_rules(pod, namespace, attempt),
                Action::Offer(pod) => self.offer(&pod, None),
                Action::Begin { pod, attempt } => self.begin(pod, attempt),
                Action::Leave { pod, attempt } => self.leave(pod, attempt),
                Action::Exclude(pod, ports) => self.exclude(&pod, ports),
                Action::Withdraw(pod) => self.withdraw(&pod),
                Action::Close(namespace) => drop(self.namespaces.remove(&namespace)),
                Action::Answer(request, answer) => self.answer(request, answer),
                Action::Report(pod, failure) => {
                    self.shown.metrics.failed(&failure);
                    self.shown.journal.problem(failure.name().as_str(), pod.as_str(), &failure.to_string());
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
        let listeners = self.inherited.get(&uid).map(|inherited| inherited.listeners.clone());
        self.blocking(move || {
            let outcome = match (namespace, Marks::random()) {
                (Some(Ok(namespace)), Ok(marks)) => {
                    let plan = CapturePlan { marks, addresses, excluded_in: ports.clone(), excluded_out: ports };
                    let capture = match listeners {
                        Some(listeners) => Capture::take_over(namespace, plan, listeners),
                        None => Capture::prepare(namespace, plan, owner),
                    };
                    capture.map(Box::new).map_err(Failure::from)
                }
                (Some(Err(error)), _) | (_, Err(error)) => {
                    let sentence = format!("the namespace or random marks cannot be had: {error}");
                    Err(Failure::Capture { name: CaptureFailure::Resources, sentence })
                }
                (None, _) => Err(Failure::Internal),
            };
            Event::Prepared(uid, attempt, outcome)
        });
    }

    /// Hands a pod's listeners to one proxy, or to all that are to serve it.
    fn offer(&mut self, pod: &NodePod, to: Option<u64>) {
        let Some(captured) = self.captures.get(&pod.pod) else { return };
        // A pod that leaves has no use for another proxy's readiness, nor for a certificate.
        if to.is_none() && !self.pods.is_leaving(&pod.pod) {
            self.proxies.expect(&pod.pod);
        }
        let mut unread = Vec::new();
        for (number, link) in self.proxies.all().filter(|(number, _)| to.is_none_or(|only| only == *number)) {
            let sent = match estate::added(pod, &captured.listeners, &captured.gateways) {
                Ok((added, descriptors)) => link.send(&FromAgent::PodAdded(added), descriptors),
                Err(error) => {
                    self.shown.journal.problem("no-descriptors", pod.pod.as_str(), &error.to_string());
                    false
                }
            };
            if !sent {
                unread.push(number);
            }
        }
        if !captured.from_before.is_empty() {
            self.tell_from_before(&pod.pod, to);
        }
        self.give_up(unread);
    }

    /// Closes links whose proxies do not read what they are sent: they call again, and are told everything anew.
    fn give_up(&mut self, links: Vec<u64>) {
        for number in links {
            let change = self.proxies.gone(number);
            let actions = self.changed(change, "it does not read what it is sent");
            self.act(actions);
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
        let Some(captured) = self.captures.get(pod) else { return };
        let capture = captured.capture.clone();
        // For the agent after this one.
        if let Some(known) = self.pods.served().iter().find(|known| known.pod == *pod) {
            for (_, link) in self.proxies.all() {
                link.send(&FromAgent::PodAdded(estate::told(known, Vec::new(), &captured.gateways)), Vec::new());
            }
        }
        let (pod, ports) = (pod.clone(), ports.into_iter().collect::<BTreeSet<_>>());
        self.blocking(move || {
            // Where it fails the next look finds rules that are not those wanted, and tries again.
            let found = lock(&capture).exclude(ports).err();
            let found = found.map(|error| (pod, Found::Failed { sentence: format!("excluded ports: {error}") }));
            Event::Found(found.into_iter().collect())
        });
    }

    /// The proxies first: as long as they have the listeners those are not closed.
    fn withdraw(&mut self, pod: &PodUid) {
        let removed = FromAgent::PodRemoved { pod: pod.clone() };
        let unread = self.proxies.holders().filter(|(_, link)| !link.send(&removed, Vec::new()));
        let unread = unread.map(|(number, _)| number).collect();
        self.give_up(unread);
        self.inherited.remove(pod);
        self.late.remove(pod);
        if self.captures.remove(pod).is_some() {
            self.shown.journal.change("released", pod.as_str(), "listeners and sockets are closed");
        }
        let change = self.proxies.forget(pod);
        let actions = self.changed(change, "");
        self.act(actions);
    }

    fn answer(&mut self, request: Request, answer: CniResult) {
        self.shown.metrics.answered(&answer);
        if let Some(reply) = self.waiting.remove(&request) {
            // A runtime that does not wait any more asks again.
            let _ = reply.send(answer);
        }
    }

    /// Runs what may block on a thread for that; its result is an event.
    fn blocking(&self, work: impl FnOnce() -> Event + Send + 'static) {
        let events = self.events.clone();
        tokio::task::spawn_blocking(move || {
            // Nobody would ever hear of it, and the pod would stay as it is for good. The next agent takes all pods over.
            let event = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| std::process::abort());
            // When nobody listens any more the process ends.
            let _ = events.blocking_send(event);
        });
    }

    /// Tells the reporter and people how things are.
    fn publish(&self) {
        let known = self.handed_over && !self.pods.inheriting();
        if self.pods.is_connected() && !*self.settled.borrow() && (known || self.started.elapsed() > NO_PREDECESSOR) {
            self.settled.send_replace(true);
        }
        let wanted = self.pods.wanted();
        self.wanted.send_if_modified(|before| {
            let changed = *before != wanted;
            *before = wanted;
            changed
        });
        if self.pods.answers() {
            self.answers.send_if_modified(|before| !std::mem::replace(before, true));
        }
        let (captured, failing) = (self.pods.captured(), self.pods.failing());
        self.shown.metrics.captured.set(count(captured.len()));
        self.shown.metrics.leaving.set(count(self.pods.standing().count()) - count(captured.len()));
        self.reported.send_if_modified(|before| {
            for pod in captured.difference(&before.captured) {
                self.shown.journal.change("captured", pod.as_str(), "the rules were read back");
            }
            for pod in before.captured.difference(&captured).filter(|pod| self.pods.is_leaving(pod)) {
                self.shown.journal.change("leaving", pod.as_str(), "new connections are not captured any more");
            }
            let failed = before.failed.len();
            before.failed.retain(|pod, _| failing.contains_key(pod));
            let changed = before.captured != captured || before.failed.len() != failed;
            before.captured = captured;
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
