//! The pods of this node that are captured, from the agent's word to its answer: listeners served, certificate held,
//! ready.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::PodUid;
use socket2::Socket;
use tokio::sync::mpsc;
use wire::pods::{Listener, PodAdded, SocketKind, ToAgent};

use crate::certs::Authority;
use crate::cores::{Accepting, Cores};
use crate::node::Node;
use crate::pod::Pod;
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
}

#[derive(Debug)]
struct Served {
    pod: Arc<Pod>,
    acceptors: Vec<Accepting>,
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
        Self { node, cores, authority, agent, served: Mutex::default() }
    }

    /// Begins to serve a pod. One that is served already gets new listeners and keeps its connections: its agent is new.
    pub(crate) fn add(&self, added: PodAdded, listeners: Vec<(Listener, TcpListener)>) {
        let old = self.lock().remove(&added.pod);
        let pod = match &old {
            Some(old) if old.pod.identity == added.identity => old.pod.clone(),
            Some(_) | None => Arc::new(self.pod(&added)),
        };
        self.node.certificates.hold(&pod.identity, &self.authority, &self.node.metrics);
        // After the new hold: an identity that stays must not lose its key in between.
        if let Some(old) = old {
            self.stop(&old);
        }
        let acceptors =
            listeners.into_iter().filter_map(|(kind, listener)| self.accept(&pod, kind, listener)).collect();
        let kinds = SocketKind::ALL.into_iter().filter(|kind| can_use(&pod, *kind));
        pod.stash.fill(kinds);
        tracing::info!(pod = %pod.name, uid = %pod.uid, identity = %pod.identity, "serving");
        self.lock().insert(pod.uid.clone(), Served { pod, acceptors, ready: false });
        self.node.metrics.pods.set(self.lock().len() as i64);
        self.tell_ready();
    }

    fn pod(&self, added: &PodAdded) -> Pod {
        let name = format!("{}/{}", added.identity.namespace(), added.name).into();
        let stash = Stash::new(added.pod.clone(), self.agent.clone());
        Pod::new(added.pod.clone(), name, added.identity.clone(), added.addresses.clone(), stash)
    }

    fn accept(&self, pod: &Arc<Pod>, kind: Listener, listener: TcpListener) -> Option<Accepting> {
        let accepting = self.cores.accept(listener, pod.clone(), redirect::direction(kind));
        accepting.inspect_err(|error| tracing::error!(pod = %pod.name, %error, "cannot use a listener")).ok()
    }

    /// Stops serving a pod: no listener, no connection, no socket and no key of it stays.
    pub(crate) fn remove(&self, uid: &PodUid) {
        let Some(served) = self.lock().remove(uid) else { return };
        self.stop(&served);
        served.pod.retire();
        self.node.pool.forget(uid);
        self.node.connections.cut_pod(uid, &EndedEarly::PodRemoved);
        self.node.metrics.pods.set(self.lock().len() as i64);
        tracing::info!(pod = %served.pod.name, %uid, "no longer serving");
    }

    fn stop(&self, served: &Served) {
        served.acceptors.iter().for_each(Accepting::stop);
        self.node.certificates.release(&served.pod.identity);
    }

    /// Stops accepting for all pods.
    pub(crate) fn stop_accepting(&self) {
        self.lock().values().flat_map(|served| &served.acceptors).for_each(Accepting::stop);
    }

    /// Puts sockets into a pod's stash. For a pod that is gone they are closed, or they would keep its namespace.
    pub(crate) fn put(&self, uid: &PodUid, kind: SocketKind, sockets: Vec<Socket>) {
        if let Some(served) = self.lock().get(uid) {
            served.pod.stash.put(kind, sockets);
        }
    }

    /// Tells the agent which pods have become ready: accepted on, and with a certificate. Their rules may be loaded.
    pub(crate) fn tell_ready(&self) {
        for served in self.lock().values_mut().filter(|served| !served.ready) {
            if self.node.certificates.has(&served.pod.identity) && !served.acceptors.is_empty() {
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
            listeners: served.acceptors.len(),
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

fn can_use(pod: &Pod, kind: SocketKind) -> bool {
    let v4 = matches!(kind, SocketKind::OuterV4 | SocketKind::InnerV4);
    pod.addresses.iter().any(|address| address.is_ipv4() == v4)
}
