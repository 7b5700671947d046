//! The pods of this node that are captured, from the agent's word to its answer: listeners served, certificate held,
//! ready.

use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::PodUid;
use socket2::Socket;
use tokio::sync::mpsc;
use wire::pods::{Ends, Listener, PodAdded, SocketKind, ToAgent};

use crate::certs::Authority;
use crate::cores::{Accepting, Cores};
use crate::judge;
use crate::node::Node;
use crate::pod::{Declared, Pod};
use crate::reasons::EndedEarly;
use crate::redirect;
use crate::stash::Stash;

/// The pods, and what serving them takes.
#[derive(Debug)]
pub(crate) struct Pods<A> {
    node: Arc<Node>,
    cores: Arc<Cores>,
    authority: Arc<A>,
    agent: mpsc::UnboundedSender<ToAgent>,
    served: Mutex<HashMap<PodUid, Served>>,
    /// Nothing is accepted any more.
    closed: AtomicBool,
}

#[derive(Debug)]
struct Served {
    pod: Arc<Pod>,
    /// As the agent said it: for the next agent.
    added: PodAdded,
    listeners: Vec<(Listener, TcpListener)>,
    /// While these live the listeners are accepted on; none before the pod is ready.
    accepting: Vec<Accepting>,
    ready: bool,
}

/// One pod, for people.
#[derive(Debug)]
pub(crate) struct Summary {
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// How many listeners are accepted on.
    pub(crate) listeners: usize,
    /// Whether the agent was told that its rules may be loaded.
    pub(crate) ready: bool,
}

impl<A: Authority> Pods<A> {
    /// None yet.
    pub(crate) fn new(
        node: Arc<Node>,
        cores: Arc<Cores>,
        authority: Arc<A>,
        agent: mpsc::UnboundedSender<ToAgent>,
    ) -> Self {
        Self { node, cores, authority, agent, served: Mutex::default(), closed: AtomicBool::new(false) }
    }

    /// Begins to serve a pod. One that is served already gets new listeners and keeps its connections: its agent is new.
    /// Without listeners only what is said of it is new.
    pub(crate) fn add(&self, added: PodAdded, listeners: Vec<(Listener, TcpListener)>) {
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        if listeners.is_empty() {
            if let Some(served) = self.lock().get_mut(&added.pod) {
                served.pod.declare(declared(&added));
                served.added = PodAdded { listeners: served.added.listeners.clone(), ..added };
            }
            // What the API server is not declared to call any more ends.
            self.judge();
            return;
        }
        let old = self.lock().remove(&added.pod);
        let pod = match &old {
            Some(old) if old.pod.identity == added.identity => old.pod.clone(),
            Some(_) | None => Arc::new(self.pod(&added)),
        };
        pod.declare(declared(&added));
        // An agent that is new tells of it.
        pod.set_opened_before(Vec::new());
        self.node.certificates.hold(&pod.identity, &self.authority, &self.node.metrics);
        let mut served = Served { pod: pod.clone(), added, listeners, accepting: Vec::new(), ready: false };
        // Before the old ones end: somebody accepts at any time.
        if old.as_ref().is_some_and(|old| !old.accepting.is_empty()) {
            self.accept(&mut served);
        }
        // After the new hold: an identity that stays must not lose its key in between.
        if let Some(old) = old {
            self.node.certificates.release(&old.pod.identity);
        }
        pod.stash.fill(SocketKind::ALL.into_iter().filter(|kind| can_use(&pod, *kind)));
        tracing::info!(pod = %pod.name, uid = %pod.uid, identity = %pod.identity, "serving");
        self.lock().insert(pod.uid.clone(), served);
        self.count();
        self.tell_ready();
    }

    fn pod(&self, added: &PodAdded) -> Pod {
        let name = format!("{}/{}", added.identity.namespace(), added.name).into();
        let stash = Stash::new(added.pod.clone(), self.agent.clone());
        Pod::new(added.pod.clone(), name, added.identity.clone(), added.addresses.clone(), stash)
    }

    /// On duplicates: the listeners themselves stay, for an agent that needs them.
    fn accept(&self, served: &mut Served) {
        let accept = |(kind, listener): &(Listener, TcpListener)| {
            let refused = |error: &std::io::Error| {
                tracing::error!(pod = %served.pod.name, %error, "cannot use a listener");
            };
            let accepting = listener
                .try_clone()
                .and_then(|listener| self.cores.accept(listener, served.pod.clone(), redirect::direction(*kind)));
            accepting.inspect_err(refused).ok()
        };
        served.accepting = served.listeners.iter().filter_map(accept).collect();
    }

    /// Stops serving a pod: no listener, no connection, no socket and no key of it stays.
    pub(crate) fn remove(&self, uid: &PodUid) {
        let Some(served) = self.lock().remove(uid) else { return };
        self.node.certificates.release(&served.pod.identity);
        served.pod.retire();
        self.node.pool.forget(uid);
        self.node.connections.cut_pod(uid, &EndedEarly::PodRemoved);
        self.count();
        tracing::info!(pod = %served.pod.name, %uid, "no longer serving");
    }

    /// Tells whoever has to know how many there are.
    fn count(&self) {
        let pods = self.lock().len();
        self.node.metrics.pods.set(pods as i64);
        self.node.budgets.set_pods(pods);
    }

    /// Stops accepting for all pods, for good, and lets go of their listeners: what waits in them is the next proxy's. No
    /// connection begins in a tunnel that rests, either.
    pub(crate) fn stop_accepting(&self) {
        self.closed.store(true, Ordering::Relaxed);
        for served in self.lock().values_mut() {
            served.accepting.drain(..).for_each(|accepting| accepting.stop());
            served.listeners.clear();
            served.pod.retire();
            self.node.pool.forget(&served.pod.uid);
        }
    }

    /// The pods that are served, for an agent that may not know them: with duplicates of their listeners.
    pub(crate) fn held(&self) -> Vec<(PodAdded, Vec<OwnedFd>)> {
        let duplicate = |served: &Served| {
            let all = served.listeners.iter().map(|(kind, it)| Ok((*kind, it.as_fd().try_clone_to_owned()?)));
            let all: std::io::Result<Vec<_>> = all.collect();
            let all =
                all.inspect_err(|error| tracing::error!(pod = %served.pod.name, %error, "not handed over")).ok()?;
            let (listeners, descriptors) = all.into_iter().unzip();
            Some((PodAdded { listeners, ..served.added.clone() }, descriptors))
        };
        self.lock().values().filter_map(duplicate).collect()
    }

    /// Puts sockets into a pod's stash. For a pod that is gone they are closed, or they would keep its namespace.
    pub(crate) fn put(&self, uid: &PodUid, kind: SocketKind, sockets: Vec<Socket>) {
        if let Some(served) = self.lock().get(uid) {
            served.pod.stash.put(kind, sockets);
        }
    }

    /// There is a new agent: what the last one was asked for does not come.
    pub(crate) fn ask_again(&self) {
        self.lock().values().for_each(|served| served.pod.stash.ask_again());
    }

    /// Takes in what was opened to a pod before its capture.
    pub(crate) fn set_opened_before(&self, uid: &PodUid, open: Vec<Ends>) {
        let pod = self.lock().get(uid).map(|served| served.pod.clone());
        if let Some(pod) = pod {
            pod.set_opened_before(open);
            self.judge_from_before(&pod);
        }
    }

    /// Ends every open connection that the view no longer allows.
    pub(crate) fn judge(&self) {
        judge::judge(&self.node);
        let pods: Vec<_> = self.lock().values().map(|served| served.pod.clone()).collect();
        pods.iter().for_each(|pod| self.judge_from_before(pod));
    }

    fn judge_from_before(&self, pod: &Pod) {
        let connections = judge::refused_from_before(&self.node, pod);
        if !connections.is_empty() {
            // Nobody listens any more when the process ends.
            let _ = self.agent.send(ToAgent::End { pod: pod.uid.clone(), connections });
        }
    }

    /// Begins to accept for the pods that can prove who they are, once it is known what may happen, and tells the agent:
    /// their rules may be loaded. Until then connections wait in the kernel.
    pub(crate) fn tell_ready(&self) {
        if self.node.view.read(|view| view.settings().is_none()) {
            return;
        }
        for served in self.lock().values_mut().filter(|served| !served.ready) {
            if self.node.certificates.has(&served.pod.identity) && !served.listeners.is_empty() {
                if served.accepting.is_empty() {
                    self.accept(served);
                }
                served.ready = true;
                // Nobody listens any more when the process ends.
                let _ = self.agent.send(ToAgent::PodReady { pod: served.pod.uid.clone() });
            }
        }
    }

    /// All of them, for people.
    pub(crate) fn all(&self) -> Vec<Summary> {
        let summary = |served: &Served| Summary {
            pod: served.pod.clone(),
            listeners: served.accepting.len(),
            ready: served.ready,
        };
        self.lock().values().map(summary).collect()
    }

    /// Sockets in the stashes of all pods, in the order of [`SocketKind::ALL`].
    pub(crate) fn stashed(&self) -> [usize; SocketKind::ALL.len()] {
        let mut sum = [0; SocketKind::ALL.len()];
        for served in self.lock().values() {
            sum.iter_mut().zip(served.pod.stash.counts()).for_each(|(sum, count)| *sum += count);
        }
        sum
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PodUid, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn declared(added: &PodAdded) -> Declared {
    Declared { probes: added.probes.clone(), gateways: added.gateways.clone() }
}

fn can_use(pod: &Pod, kind: SocketKind) -> bool {
    let v4 = matches!(kind, SocketKind::OuterV4 | SocketKind::InnerV4);
    pod.addresses.iter().any(|address| address.is_ipv4() == v4)
}
