//! A pod of this node, as the data path has it: who it is, and sockets.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use identity::SpiffeId;
use mesh::{PodUid, Probes};
use tokio::sync::watch;
use wire::pods::Ends;

use crate::stash::Stash;

/// A connection by its two ends, as the side that makes it sees them. One port of the pod may have connections to several
/// destinations.
type Leg = (SocketAddr, SocketAddr);

/// What the kubelet may ask of a pod where plaintext is refused, and how the pod's node may show itself to it.
#[derive(Default, Debug)]
pub(crate) struct Declared {
    /// What its author declared.
    pub(crate) probes: Probes,
    /// The gateways of its default routes.
    pub(crate) gateways: Vec<IpAddr>,
}

/// One captured pod.
#[derive(Debug)]
pub(crate) struct Pod {
    /// Its UID.
    pub(crate) uid: PodUid,
    /// `namespace/name`, for people.
    pub(crate) name: Arc<str>,
    /// The identity that its service account gives it.
    pub(crate) identity: SpiffeId,
    /// Its addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// Sockets of its network namespace.
    pub(crate) stash: Stash,
    declared: Mutex<Arc<Declared>>,
    from_before: Mutex<Vec<Ends>>,
    open: AtomicUsize,
    own_legs: Mutex<HashSet<Leg>>,
    retired: watch::Sender<bool>,
}

impl Pod {
    /// A pod without connections.
    pub(crate) fn new(uid: PodUid, name: Arc<str>, identity: SpiffeId, addresses: Vec<IpAddr>, stash: Stash) -> Self {
        let (open, own_legs, retired) = (AtomicUsize::new(0), Mutex::default(), watch::Sender::new(false));
        let (declared, from_before) = (Mutex::default(), Mutex::default());
        Self { uid, name, identity, addresses, stash, declared, from_before, open, own_legs, retired }
    }

    /// Takes in what is declared, in place of what was before.
    pub(crate) fn declare(&self, declared: Declared) {
        *self.declared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(declared);
    }

    /// What is declared.
    pub(crate) fn declared(&self) -> Arc<Declared> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes in what was opened to the pod before its capture, in place of what was known of it.
    pub(crate) fn set_opened_before(&self, open: Vec<Ends>) {
        *self.from_before.lock().unwrap_or_else(PoisonError::into_inner) = open;
    }

    /// What was opened to the pod before its capture and is open still: in clear, and by the data path.
    pub(crate) fn opened_before(&self) -> Vec<Ends> {
        self.from_before.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// No connection is to begin in a tunnel that rests: its clients are asked to go elsewhere.
    pub(crate) fn retire(&self) {
        self.retired.send_replace(true);
    }

    /// Waits until no connection is to begin any more.
    pub(crate) async fn until_retired(&self) {
        let mut retired = self.retired.subscribe();
        // The sender lives as long as the pod.
        let _ = retired.wait_for(|retired| *retired).await;
    }

    /// Counts a connection in.
    pub(crate) fn count_in(self: &Arc<Self>) -> Counted {
        self.open.fetch_add(1, Ordering::Relaxed);
        Counted(self.clone())
    }

    /// How many connections it has.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Remembers a connection that the data path itself makes to the wire, from here to there.
    pub(crate) fn own_leg(self: &Arc<Self>, from: SocketAddr, to: SocketAddr) -> OwnLeg {
        self.own_legs.lock().unwrap_or_else(PoisonError::into_inner).insert((from, to));
        OwnLeg { pod: self.clone(), leg: (from, to) }
    }

    /// Whether a connection comes from the data path itself: capture that captures itself would never stop, and take
    /// every descriptor on the way.
    pub(crate) fn is_own_leg(&self, from: SocketAddr, to: SocketAddr) -> bool {
        self.own_legs.lock().unwrap_or_else(PoisonError::into_inner).contains(&(from, to))
    }
}

/// A connection that counts for its pod while this lives.
#[derive(Debug)]
pub(crate) struct Counted(Arc<Pod>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection of the data path's own while this lives.
#[derive(Debug)]
pub(crate) struct OwnLeg {
    pod: Arc<Pod>,
    leg: Leg,
}

impl Drop for OwnLeg {
    fn drop(&mut self) {
        self.pod.own_legs.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.leg);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn pod() -> Arc<Pod> {
        let uid = PodUid::from("uid");
        let stash = Stash::new(uid.clone(), mpsc::unbounded_channel().0);
        let identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        Arc::new(Pod::new(uid, "a/b".into(), identity, Vec::new(), stash))
    }

    #[test]
    fn connections_count_while_they_live() {
        let pod = pod();
        let first = pod.count_in();
        let second = pod.count_in();
        assert_eq!(pod.open(), 2);
        drop((first, second));
        assert_eq!(pod.open(), 0);
    }

    #[test]
    fn an_own_leg_is_known_while_it_lives() {
        let pod = pod();
        let from = SocketAddr::from(([10, 0, 0, 1], 40_000));
        let to = SocketAddr::from(([10, 0, 0, 2], 80));
        let leg = pod.own_leg(from, to);
        assert!(pod.is_own_leg(from, to));
        let elsewhere = SocketAddr::from(([10, 0, 0, 2], 81));
        assert!(!pod.is_own_leg(from, elsewhere), "a program of the pod may have the same port");
        drop(leg);
        assert!(!pod.is_own_leg(from, to));
    }
}
