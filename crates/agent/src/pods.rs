//! What is known of each pod of this node, and what to do next: a state machine without a clock, a socket or a file.
//!
//! Three parties speak of a pod, in any order: the control plane says who it is and whether to capture it, the runtime
//! where its network namespace is, the proxy that it holds the listeners and a certificate. The rules are loaded last
//! (T4): what they lead to must be there, and must be able to prove who it is.

mod answers;
mod failing;
mod inherited;
mod leaving;
mod looking;
mod running;
mod shown;
mod stage;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::net::IpAddr;

use mesh::PodUid;
use wire::discovery::NodePod;
use wire::pods::{CniAdd, CniResult};

use crate::failure::Failure;

pub(crate) use answers::failed;
use answers::{answer_all, note};
use leaving::Leaving;
use looking::{Decision, decide};
pub(crate) use running::Running;
pub(crate) use shown::Shown;
pub(crate) use stage::Prepared;
use stage::{Stage, Work, stands, unready};

/// The number of a request of the runtime.
pub(crate) type Request = u64;

/// What is to be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make listeners and routing in the namespace, then say so by [`Pods::prepared`].
    Prepare {
        /// For whom.
        pod: NodePod,
        /// In which namespace.
        namespace: u64,
        /// What the answer must carry.
        attempt: u64,
    },
    /// Look whether rules stand in the namespace, then say so by [`Pods::looked`].
    Look {
        /// Of which pod.
        pod: PodUid,
        /// In which namespace.
        namespace: u64,
        /// What the answer must carry.
        attempt: u64,
    },
    /// Hand the listeners to the proxy.
    Offer(NodePod),
    /// Load the rules and read them back, then say so by [`Pods::begun`].
    Begin {
        /// Whose.
        pod: PodUid,
        /// What the answer must carry.
        attempt: u64,
    },
    /// Capture nothing new, or take everything away where nothing captured is left; then say by [`Pods::left`] which it was.
    Leave {
        /// Which pod.
        pod: PodUid,
        /// What the answer must carry.
        attempt: u64,
    },
    /// These ports are not to be captured.
    Exclude(PodUid, Vec<u16>),
    /// The proxy is to let go of the pod, and so are we: listeners and all.
    Withdraw(PodUid),
    /// Nobody holds this namespace any more (T42).
    Close(u64),
    /// The runtime has its answer.
    Answer(Request, CniResult),
    /// Something went wrong that did not before.
    Report(PodUid, Failure),
}

/// All pods of the node.
#[derive(Debug, Default)]
pub(crate) struct Pods {
    pods: BTreeMap<PodUid, Pod>,
    /// All that the control plane said before it was lost is taken in, and it is there again.
    control_plane: bool,
    /// The control plane has named all pods of the node, once.
    complete: bool,
    proxy: bool,
    attempts: u64,
}

#[derive(Debug, Default)]
struct Pod {
    /// What the control plane says of it.
    known: Option<NodePod>,
    /// That it was the control plane that said so, and not the agent before.
    named: bool,
    /// What the runtime made for it.
    sandbox: Option<Sandbox>,
    failure: Option<Failure>,
}

#[derive(Debug)]
struct Sandbox {
    /// Inode of the namespace. As long as it is held open nothing else has that number.
    namespace: u64,
    /// `namespace/name`, as the runtime says.
    name: String,
    /// The runtime's name for it; empty where that is not known.
    container: String,
    /// Its addresses, by the word of the plugins that gave it them; empty where the runtime did not say.
    addresses: Vec<IpAddr>,
    waiting: Vec<Waiting>,
    /// The runtime has had no answer yet that lets the pod's programs start.
    starting: bool,
    stage: Stage,
    /// An agent before this one has captured it, or begun to.
    inherited: bool,
    /// Whether rules stand in it of an agent that is gone, by a look; `None` before one.
    found: Option<bool>,
    /// What is wrong with its capture, which was made, and cannot be made anew.
    damage: Option<Failure>,
    /// It failed, and is left alone until something changes or [`Pods::retry`].
    stuck: bool,
}

impl Sandbox {
    /// One for which nothing is made.
    fn new(namespace: u64, name: String) -> Self {
        Self {
            namespace,
            name,
            container: String::new(),
            addresses: Vec::new(),
            waiting: Vec::new(),
            starting: false,
            stage: Stage::Bare,
            inherited: false,
            found: None,
            damage: None,
            stuck: false,
        }
    }

    /// Whether an agent before this one has captured it, or may have.
    fn was_captured(&self) -> bool {
        self.inherited || self.found == Some(true)
    }

    /// What the runtime said of its addresses goes before the control plane's word: that comes later, and after a reboot it is
    /// of the sandbox before. Whether the namespace has them is looked at in either case (T26).
    fn tell(&self, known: &mut NodePod) {
        if !self.addresses.is_empty() {
            known.addresses.clone_from(&self.addresses);
        }
    }
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    overdue: bool,
}

impl Pods {
    /// Whether there is a connection to the control plane.
    pub(crate) fn control_plane(&mut self, connected: bool) {
        self.control_plane = connected;
    }

    /// Whether all that the control plane said before it was lost is taken in, and it is there again.
    pub(crate) fn is_connected(&self) -> bool {
        self.control_plane
    }

    /// The control plane says who a pod is.
    pub(crate) fn know(&mut self, mut known: NodePod) -> Vec<Action> {
        let mut actions = Vec::new();
        let uid = known.pod.clone();
        let pod = self.pods.entry(uid.clone()).or_default();
        pod.named = true;
        if let Some(sandbox) = &pod.sandbox {
            sandbox.tell(&mut known);
        }
        let before = pod.known.replace(known.clone());
        if let (Some(before), Some(sandbox)) = (before, &mut pod.sandbox) {
            sandbox.stuck = false;
            let same = before.identity == known.identity && same_addresses(&before.addresses, &known.addresses);
            // What is captured, or is about to be, stays so until it is released: peers may go on tunnelling to it (T47).
            let given_up = known.capture.is_err() && !sandbox.was_captured() && !stands(&sandbox.stage);
            if !same || given_up {
                withdraw(sandbox, &uid, &mut actions);
            } else if before.excluded_ports != known.excluded_ports || before.probes != known.probes {
                match &mut sandbox.stage {
                    Stage::Bare | Stage::Looking(_) => {}
                    Stage::Preparing(work) => work.cancelled = true,
                    Stage::Beginning(work) if work.cancelled => {}
                    Stage::Found
                    | Stage::Offered { .. }
                    | Stage::Beginning(_)
                    | Stage::Captured
                    | Stage::Leaving(_) => {
                        actions.push(Action::Exclude(uid.clone(), known.excluded_ports));
                    }
                }
            }
        }
        self.advance(&uid, &mut actions);
        actions
    }

    /// The control plane says that a pod is gone from this node.
    pub(crate) fn forget(&mut self, uid: &PodUid) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(pod) = self.pods.get_mut(uid) {
            pod.known = None;
        }
        self.leave(uid, &mut actions);
        actions
    }

    /// The runtime says where a pod's namespace is, and waits for an answer. The namespace is to be held open if
    /// [`Pods::holds`] says so afterwards.
    pub(crate) fn add(&mut self, request: Request, add: &CniAdd, namespace: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        let uid = &add.pod;
        let name = format!("{}/{}", add.namespace, add.name);
        if let Some(other) = self.holder(namespace).filter(|other| *other != uid) {
            let failure = Failure::Ambiguous { inode: namespace, other: other.clone() };
            actions.push(Action::Answer(request, failed(&name, &failure)));
            actions.push(Action::Report(uid.clone(), failure));
            return actions;
        }
        if self.namespace_of(uid).is_some_and(|old| old != namespace) {
            self.leave(uid, &mut actions);
        }
        let pod = self.pods.entry(uid.clone()).or_default();
        let sandbox = pod.sandbox.get_or_insert_with(|| Sandbox::new(namespace, name.clone()));
        if !add.addresses.is_empty() {
            let before = pod.known.as_ref().map_or(&[][..], |known| &known.addresses);
            if !same_addresses(before, &add.addresses) {
                withdraw(sandbox, uid, &mut actions);
            }
            sandbox.addresses.clone_from(&add.addresses);
        }
        if let Some(known) = &mut pod.known {
            sandbox.tell(known);
        }
        sandbox.name = name;
        // The runtime may name again a sandbox that is known here.
        if !add.container.is_empty() {
            sandbox.container.clone_from(&add.container);
        }
        sandbox.stuck = false;
        sandbox.starting = true;
        sandbox.waiting.push(Waiting { request, overdue: false });
        self.advance(uid, &mut actions);
        actions
    }

    /// The runtime deletes a pod's sandbox. That always succeeds: a pod that cannot be forgotten could not be deleted.
    pub(crate) fn delete(&mut self, request: Request, uid: &PodUid, container: &str) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.means_another(uid, container) {
            self.leave(uid, &mut actions);
        }
        actions.push(Action::Answer(request, CniResult::Deleted));
        actions
    }

    /// A request has waited long enough.
    pub(crate) fn overdue(&mut self, request: Request) -> Vec<Action> {
        let mut actions = Vec::new();
        let waits = |pod: &Pod| pod.sandbox.iter().flat_map(|it| &it.waiting).any(|it| it.request == request);
        let Some(uid) = self.pods.iter().find(|(_, pod)| waits(pod)).map(|(uid, _)| uid.clone()) else {
            return actions;
        };
        for sandbox in self.pods.get_mut(&uid).into_iter().filter_map(|pod| pod.sandbox.as_mut()) {
            sandbox.waiting.iter_mut().filter(|it| it.request == request).for_each(|it| it.overdue = true);
        }
        self.advance(&uid, &mut actions);
        actions
    }

    /// Listeners and routing are made, or not; [`Prepared::Captured`] where the rules of an agent before stand, too. What
    /// was made is to be kept where this returns `true`.
    pub(crate) fn prepared(
        &mut self,
        uid: &PodUid,
        attempt: u64,
        outcome: Result<Prepared, Failure>,
    ) -> (bool, Vec<Action>) {
        let mut actions = Vec::new();
        let Some(pod) = self.pods.get_mut(uid) else { return (false, actions) };
        let (Some(sandbox), Some(known)) = (&mut pod.sandbox, &pod.known) else { return (false, actions) };
        let cancelled = match &sandbox.stage {
            Stage::Preparing(work) if work.attempt == attempt => work.cancelled,
            // Of a sandbox that is gone.
            _ => return (false, actions),
        };
        sandbox.stage = Stage::Bare;
        let keep = !cancelled && outcome.is_ok();
        match outcome {
            _ if cancelled => {}
            Ok(prepared) => {
                sandbox.stage = match prepared {
                    // It had left, and only its proxy had not heard of it: what was made for it again goes the same way.
                    Prepared::Bare if known.release => Stage::Leaving(Leaving::default()),
                    Prepared::Bare if sandbox.found == Some(true) && known.capture.is_err() => Stage::Found,
                    Prepared::Bare => Stage::Offered { ready: false },
                    Prepared::Captured => Stage::Captured,
                    Prepared::Leaving => Stage::Leaving(Leaving::default()),
                };
                actions.push(Action::Offer(known.clone()));
            }
            Err(failure) => self.fail(uid, failure, &mut actions),
        }
        self.advance(uid, &mut actions);
        (keep, actions)
    }

    /// The rules were loaded and read back, or not.
    pub(crate) fn begun(&mut self, uid: &PodUid, attempt: u64, outcome: Result<(), Failure>) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(pod) = self.pods.get_mut(uid) else { return actions };
        let Some(sandbox) = &mut pod.sandbox else { return actions };
        let (cancelled, leaving) = match &sandbox.stage {
            Stage::Beginning(work) if work.attempt == attempt => (work.cancelled, work.leaving),
            _ => return actions,
        };
        match outcome {
            _ if cancelled => sandbox.stage = Stage::Bare,
            Ok(()) => {
                sandbox.stage = Stage::Captured;
                sandbox.damage = None;
                pod.failure = None;
            }
            Err(failure) => {
                // What is made stays: it is closed, and the next try begins here.
                sandbox.stage = match leaving {
                    true => Stage::Leaving(Leaving { look: None, back: Some(true) }),
                    false => Stage::Offered { ready: true },
                };
                sandbox.stuck = true;
                note(pod, uid, failure.clone(), &mut actions);
                answer_all(pod, &mut actions, |name| failed(name, &failure));
            }
        }
        self.advance(uid, &mut actions);
        actions
    }

    /// A proxy is connected. It knows of no pod yet.
    pub(crate) fn proxy_connected(&mut self) -> Vec<Action> {
        self.proxy = true;
        for sandbox in self.pods.values_mut().filter_map(|pod| pod.sandbox.as_mut()) {
            unready(&mut sandbox.stage);
        }
        self.served().into_iter().map(Action::Offer).collect()
    }

    /// The proxy is gone. What is captured stays captured: its connections wait in the listeners, which are held here.
    pub(crate) fn proxy_gone(&mut self) {
        self.proxy = false;
        for sandbox in self.pods.values_mut().filter_map(|pod| pod.sandbox.as_mut()) {
            unready(&mut sandbox.stage);
        }
    }

    /// The proxy accepts on a pod's listeners, and has its certificate.
    pub(crate) fn ready(&mut self, uid: &PodUid) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.pods.get_mut(uid).and_then(|pod| pod.sandbox.as_mut()).map(|sandbox| &mut sandbox.stage) {
            Some(Stage::Offered { ready } | Stage::Leaving(Leaving { back: Some(ready), .. })) => *ready = true,
            _ => return actions,
        }
        self.advance(uid, &mut actions);
        actions
    }

    /// Tries again what failed, and looks again at pods that leave.
    pub(crate) fn retry(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut again = Vec::new();
        for (uid, pod) in &mut self.pods {
            let Some(sandbox) = &mut pod.sandbox else { continue };
            let leaves = matches!(&sandbox.stage, Stage::Leaving(_));
            if mem::take(&mut sandbox.stuck) || leaves {
                again.push(uid.clone());
            }
        }
        for uid in again {
            self.advance(&uid, &mut actions);
        }
        actions
    }

    /// Whether a namespace is in use.
    pub(crate) fn holds(&self, namespace: u64) -> bool {
        self.holder(namespace).is_some()
    }

    /// The pods whose rules were read back: what peers may be told.
    pub(crate) fn captured(&self) -> BTreeSet<PodUid> {
        let captured = |pod: &Pod| matches!(&pod.sandbox, Some(Sandbox { stage: Stage::Captured | Stage::Found, .. }));
        self.pods.iter().filter(|(_, pod)| captured(pod)).map(|(uid, _)| uid.clone()).collect()
    }

    /// All of them, for people.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        self.pods.iter().map(|(uid, pod)| Shown::new(uid, pod)).collect()
    }

    fn holder(&self, namespace: u64) -> Option<&PodUid> {
        let holds = |pod: &Pod| pod.sandbox.as_ref().is_some_and(|sandbox| sandbox.namespace == namespace);
        self.pods.iter().find(|(_, pod)| holds(pod)).map(|(uid, _)| uid)
    }

    fn namespace_of(&self, uid: &PodUid) -> Option<u64> {
        Some(self.pods.get(uid)?.sandbox.as_ref()?.namespace)
    }

    /// Takes the next step that is possible.
    fn advance(&mut self, uid: &PodUid, actions: &mut Vec<Action>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let Some(sandbox) = &mut pod.sandbox else { return };
        if !sandbox.stuck {
            match (&pod.known, &sandbox.stage) {
                (Some(known), Stage::Bare) => match decide(known, sandbox) {
                    Decision::Wait => {}
                    Decision::Look => {
                        self.attempts += 1;
                        let (pod, namespace, attempt) = (uid.clone(), sandbox.namespace, self.attempts);
                        sandbox.stage = Stage::Looking(attempt);
                        actions.push(Action::Look { pod, namespace, attempt });
                    }
                    Decision::Leave(why) => {
                        pod.failure = None;
                        answer_all(pod, actions, |_| CniResult::NotCaptured(why.in_clear().to_string()));
                    }
                    Decision::Refuse(failure) => self.fail(uid, failure, actions),
                    Decision::Capture => {
                        self.attempts += 1;
                        let (attempt, namespace) = (self.attempts, sandbox.namespace);
                        sandbox.stage = Stage::Preparing(Work::new(attempt));
                        actions.push(Action::Prepare { pod: known.clone(), namespace, attempt });
                    }
                },
                (_, Stage::Offered { ready: true }) => {
                    self.attempts += 1;
                    sandbox.stage = Stage::Beginning(Work::new(self.attempts));
                    actions.push(Action::Begin { pod: uid.clone(), attempt: self.attempts });
                }
                (Some(known), Stage::Found) => match known.capture {
                    Ok(()) => {
                        sandbox.stage = Stage::Offered { ready: false };
                        actions.push(Action::Offer(known.clone()));
                    }
                    Err(why) => {
                        answer_all(pod, actions, |_| CniResult::NotCaptured(why.in_clear().to_string()));
                        self.may_leave(uid, actions);
                    }
                },
                (_, Stage::Captured) => {
                    answer_all(pod, actions, |_| CniResult::Captured);
                    self.may_leave(uid, actions);
                }
                (_, Stage::Leaving(_)) => self.leaves(uid, actions),
                (None, Stage::Bare | Stage::Found)
                | (_, Stage::Looking(_) | Stage::Preparing(_) | Stage::Offered { .. } | Stage::Beginning(_)) => {}
            }
        }
        self.answer_overdue(uid, actions);
    }

    /// Answers those that have waited long enough. What another thread does ends by itself, and its result is the answer.
    fn answer_overdue(&mut self, uid: &PodUid, actions: &mut Vec<Action>) {
        let (control_plane, proxy) = (self.control_plane, self.proxy);
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let Some(sandbox) = &mut pod.sandbox else { return };
        let failure = match (&pod.known, &sandbox.stage) {
            (_, Stage::Looking(_) | Stage::Found | Stage::Preparing(_) | Stage::Beginning(_) | Stage::Captured) => {
                return;
            }
            (_, Stage::Leaving(Leaving { look: Some(_), .. })) => return,
            (_, Stage::Offered { .. } | Stage::Leaving(Leaving { back: Some(_), .. })) if !proxy => Failure::NoProxy,
            (_, Stage::Offered { .. } | Stage::Leaving(Leaving { back: Some(_), .. })) => Failure::NotReady,
            (None, Stage::Bare) | (_, Stage::Leaving(_)) if !control_plane => Failure::NoControlPlane,
            (None, Stage::Bare) | (_, Stage::Leaving(_)) => Failure::Unknown,
            (Some(_), Stage::Bare) => Failure::NoAddress,
        };
        let overdue: Vec<Waiting> = sandbox.waiting.extract_if(.., |it| it.overdue).collect();
        if overdue.is_empty() {
            return;
        }
        let answer = failed(&sandbox.name, &failure);
        actions.extend(overdue.iter().map(|it| Action::Answer(it.request, answer.clone())));
        note(pod, uid, failure, actions);
        // A runtime that never deletes what failed must not make us hold namespaces of pods that nobody knows.
        let nobody_waits = pod.sandbox.as_ref().is_some_and(|sandbox| sandbox.waiting.is_empty());
        if pod.known.is_none() && nobody_waits {
            self.leave(uid, actions);
        }
    }

    /// Nothing could be made.
    fn fail(&mut self, uid: &PodUid, failure: Failure, actions: &mut Vec<Action>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        note(pod, uid, failure.clone(), actions);
        let Some(sandbox) = &mut pod.sandbox else { return };
        if sandbox.waiting.is_empty() {
            // A pod that runs, uncaptured until now: only we can try again.
            sandbox.stuck = true;
        } else {
            // The runtime tries again. A namespace that is not this pod's is not held for it meanwhile.
            answer_all(pod, actions, |name| failed(name, &failure));
            self.leave(uid, actions);
        }
    }

    /// Lets go of a pod's sandbox, if it has one.
    fn leave(&mut self, uid: &PodUid, actions: &mut Vec<Action>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        answer_all(pod, actions, |name| failed(name, &Failure::SandboxGone));
        pod.runs_no_more();
        if let Some(mut sandbox) = pod.sandbox.take() {
            withdraw(&mut sandbox, uid, actions);
            actions.push(Action::Close(sandbox.namespace));
        }
        if pod.known.is_none() {
            self.pods.remove(uid);
        }
    }
}

/// In whatever order.
fn same_addresses(one: &[IpAddr], other: &[IpAddr]) -> bool {
    one.iter().collect::<BTreeSet<_>>() == other.iter().collect::<BTreeSet<_>>()
}

/// Takes back what was made for a sandbox. What is being made is taken back when it is there.
fn withdraw(sandbox: &mut Sandbox, uid: &PodUid, actions: &mut Vec<Action>) {
    if stands(&sandbox.stage) {
        // What is closed by that are listeners: rules that lead to them stay.
        sandbox.found = None;
    }
    let told = match &mut sandbox.stage {
        // Whoever has its listeners from before is to let go of them, too.
        Stage::Bare | Stage::Looking(_) => sandbox.inherited,
        Stage::Preparing(work) => {
            work.cancelled = true;
            sandbox.inherited
        }
        Stage::Beginning(work) | Stage::Leaving(Leaving { look: Some(work), .. }) => {
            !mem::replace(&mut work.cancelled, true)
        }
        Stage::Found | Stage::Offered { .. } | Stage::Captured | Stage::Leaving(_) => {
            sandbox.stage = Stage::Bare;
            true
        }
    };
    if told {
        actions.push(Action::Withdraw(uid.clone()));
    }
}
