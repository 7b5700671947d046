//! What is open, what each connection is, and how it ends.
//!
//! One lock, touched when a connection opens, is decided and closes; bytes are counted without it. A connection that a
//! change of the view no longer allows is cut here (`judge`), and what has ended is remembered as edges (`coverage`).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use identity::{SpiffeId, UnixTime, VerifiedPeer};
use mesh::{AllowedProbe, PlaintextReason, PodUid, Workload};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::metrics::Counted;
use crate::pod::Pod;
use crate::reasons::EndedEarly;
use crate::splice::Bytes;

/// Which way a connection goes, seen from the pod that it was captured in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Direction {
    /// The pod made it.
    Outbound,
    /// The pod is to accept it.
    Inbound,
}

impl Direction {
    /// The name in logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// How a connection is protected.
#[derive(Clone, Debug)]
pub(crate) enum Security {
    /// Both ends are proven.
    Mtls(VerifiedPeer),
    /// In clear, for this reason.
    Plaintext(PlaintextReason),
}

impl Security {
    /// `mtls` or `plaintext`.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Mtls(_) => "mtls",
            Self::Plaintext(_) => "plaintext",
        }
    }

    /// Why it is in clear; empty where it is not.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Mtls(_) => "",
            Self::Plaintext(because) => because.as_str(),
        }
    }

    /// The proven other end.
    pub(crate) fn peer(&self) -> Option<&SpiffeId> {
        match self {
            Self::Mtls(peer) => Some(peer.id()),
            Self::Plaintext(_) => None,
        }
    }
}

/// `namespace/name`, for people.
pub(crate) fn full_name(workload: &Workload) -> Arc<str> {
    format!("{}/{}", workload.namespace, workload.name).into()
}

/// What was decided about a connection.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    /// Where it goes in the end: an endpoint, where a Service was dialled.
    pub(crate) to: SocketAddr,
    /// How it is protected.
    pub(crate) security: Security,
    /// The other end's `namespace/name`, where the view knows its address. For people: nothing is decided by it.
    pub(crate) other: Option<Arc<str>>,
    /// The Service that was dialled, as the client says. For people.
    pub(crate) service: Option<Arc<str>>,
}

/// One connection of one captured pod.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Unique in this process.
    pub(crate) id: u64,
    /// The pod that it was captured in.
    pub(crate) pod: Arc<Pod>,
    /// Which way it goes.
    pub(crate) direction: Direction,
    /// The client's address, as accepted.
    pub(crate) source: SocketAddr,
    /// Payload so far.
    pub(crate) bytes: Bytes,
    /// When it was accepted.
    pub(crate) since: UnixTime,
    started: Instant,
    destination: OnceLock<SocketAddr>,
    decision: Mutex<Option<Arc<Decision>>>,
    cut: OnceLock<EndedEarly>,
    cut_now: Notify,
    /// Bytes that metrics have seen already.
    seen: Bytes,
    counted: OnceLock<Counted>,
    exposed: OnceLock<Exposed>,
}

/// What strict lets through of plaintext, which the connection is: for people.
#[derive(Clone, Debug)]
pub(crate) struct Exposed {
    /// As which exemption.
    pub(crate) because: PlaintextReason,
    /// As `GET /healthz`.
    pub(crate) what: Arc<str>,
}

impl Connection {
    /// What the client dialled, once that is known.
    pub(crate) fn destination(&self) -> Option<SocketAddr> {
        self.destination.get().copied()
    }

    /// Says what the client dialled.
    pub(crate) fn set_destination(&self, destination: SocketAddr) {
        // Set once per connection; a second word would be the same.
        let _ = self.destination.set(destination);
    }

    /// What an exemption lets through, or would where plaintext is refused, if the connection is one; for people.
    pub(crate) fn exposed(&self) -> Option<&Exposed> {
        self.exposed.get()
    }

    /// Says what an exemption lets through, once.
    pub(crate) fn expose(&self, allowed: &AllowedProbe) {
        self.exposed.get_or_init(|| Exposed { because: allowed.because(), what: allowed.exposes().into() });
    }

    /// Why it is in clear, for people: by the name of the exemption that it is, or would be where plaintext is refused. Empty
    /// where it is not in clear, or not decided.
    pub(crate) fn reason(&self) -> &'static str {
        let because = self.decision().map(|decision| decision.security.reason()).unwrap_or_default();
        match self.exposed() {
            Some(exposed) if !because.is_empty() => exposed.because.as_str(),
            _ => because,
        }
    }

    /// What was decided, once it was.
    pub(crate) fn decision(&self) -> Option<Arc<Decision>> {
        self.decision.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says what was decided, in place of what was before: a client may turn out to speak TLS after it was taken for
    /// plaintext. Whoever decides from the view does this while looking at it, so that a change that comes later finds the
    /// decision and judges it anew.
    pub(crate) fn decide(&self, decision: Decision) {
        *self.decision.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(decision));
    }

    /// Ends the connection from outside.
    pub(crate) fn cut(&self, why: EndedEarly) {
        if self.cut.set(why).is_ok() {
            self.cut_now.notify_one();
        }
    }

    /// Waits until somebody cuts the connection.
    pub(crate) async fn until_cut(&self) -> EndedEarly {
        loop {
            if let Some(why) = self.cut.get() {
                return why.clone();
            }
            self.cut_now.notified().await;
        }
    }

    /// How long it has been open.
    pub(crate) fn age(&self) -> std::time::Duration {
        self.started.elapsed()
    }

    /// Says what this connection counts on, once.
    pub(crate) fn count_on(&self, find: impl FnOnce() -> Counted) {
        self.counted.get_or_init(find);
    }

    /// What it counts on, where it was decided.
    pub(crate) fn counted(&self) -> Option<&Counted> {
        self.counted.get()
    }

    /// Tells metrics of the bytes since the last time. Several may do so at once; each byte is told once.
    pub(crate) fn count_bytes(&self) {
        let Some(counted) = self.counted.get() else { return };
        let new = |now: &AtomicU64, seen: &AtomicU64| {
            let now = now.load(Ordering::Relaxed);
            now.saturating_sub(seen.fetch_max(now, Ordering::Relaxed))
        };
        counted.carried(new(&self.bytes.sent, &self.seen.sent), new(&self.bytes.received, &self.seen.received));
    }
}

/// All open connections of the process.
#[derive(Default, Debug)]
pub(crate) struct Registry {
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    last_id: AtomicU64,
}

impl Registry {
    /// Takes in a connection that was just accepted.
    pub(crate) fn open(
        &self,
        clock: &Clock,
        pod: &Arc<Pod>,
        direction: Direction,
        source: SocketAddr,
    ) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            pod: pod.clone(),
            direction,
            source,
            bytes: Bytes::default(),
            since: clock.wall(),
            started: clock.monotonic(),
            destination: OnceLock::new(),
            decision: Mutex::default(),
            cut: OnceLock::new(),
            cut_now: Notify::new(),
            seen: Bytes::default(),
            counted: OnceLock::new(),
            exposed: OnceLock::new(),
        });
        self.lock().insert(connection.id, connection.clone());
        connection
    }

    /// Forgets a connection that has ended.
    pub(crate) fn close(&self, connection: &Connection) {
        self.lock().remove(&connection.id);
    }

    /// All that are open now.
    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        self.lock().values().cloned().collect()
    }

    /// Ends all connections of a pod.
    pub(crate) fn cut_pod(&self, pod: &PodUid, why: &EndedEarly) {
        for connection in self.all().iter().filter(|connection| connection.pod.uid == *pod) {
            connection.cut(why.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
