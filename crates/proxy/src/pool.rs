//! Warm tunnels: idle ones, kept for the next connection of the same two pods, which then needs no handshake.
//!
//! A tunnel is lent to one connection at a time and comes back only when both directions of it ended in order. What it may be
//! used for again is exactly what it was made for ([`Key`]), and only while neither pod has changed in the view: whoever
//! changed a label or a policy meant it for connections from now on (T20). The other side decides anew about each.
//!
//! Each thread that serves connections has a shelf of its own; one that finds its own empty looks at the others' (T45).

use std::cell::Cell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use identity::{SpiffeId, UnixTime};
use mesh::{PodUid, Workload};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::tunnel::Tunnel;
use crate::view::LiveView;

/// How long a tunnel may lie idle. Only the client's side ends one for that, so that no lease is asked for in one that the
/// server is about to end.
const IDLE: Duration = Duration::from_secs(30);

/// How old a tunnel may become: then a new handshake proves both sides again.
const AGE: Duration = Duration::from_secs(600);

/// How many connections a tunnel may carry.
const LEASES: u64 = 1000;

/// Idle tunnels of one key on one shelf: as many as were in use at once within the last [`IDLE`], up to this.
const OF_ONE_KEY: usize = 128;

/// Idle tunnels on one shelf. Each costs about 10 KiB, in the kernel for the most part.
const ON_A_SHELF: usize = 1024;

/// Shelves. Cores beyond share them.
const SHELVES: usize = 16;

/// What a tunnel can be used for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    /// The pod whose certificate it shows.
    pub(crate) source_pod: PodUid,
    /// The address that it comes from.
    pub(crate) source: IpAddr,
    /// The pod that it leads to.
    pub(crate) destination_pod: PodUid,
    /// Where it leads, on the wire too: a NetworkPolicy by port goes on meaning what it says.
    pub(crate) destination: SocketAddr,
    /// Who must be there.
    pub(crate) identity: SpiffeId,
}

/// The two pods as the view has them, by which a change of either is noticed.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    /// The pod that dials; `None` while the view does not know it.
    pub(crate) source: Option<Arc<Workload>>,
    /// The pod that is dialled.
    pub(crate) destination: Arc<Workload>,
}

impl Ends {
    /// The two pods of a key as the view has them now; `None` where it no longer knows the one that is dialled.
    pub(crate) fn now(view: &LiveView, key: &Key) -> Option<Ends> {
        view.read(|view| {
            let destination = view.workload_of(&key.destination_pod)?.clone();
            Some(Ends { source: view.workload_of(&key.source_pod).cloned(), destination })
        })
    }

    fn are(&self, other: &Ends) -> bool {
        let same_source = match (&self.source, &other.source) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        same_source && Arc::ptr_eq(&self.destination, &other.destination)
    }
}

/// A tunnel at rest.
#[derive(Debug)]
struct Idle {
    tunnel: Box<Tunnel>,
    since: Instant,
    ends: Ends,
}

/// A tunnel that was taken from a shelf.
#[derive(Debug)]
pub(crate) struct Warm {
    /// The tunnel.
    pub(crate) tunnel: Box<Tunnel>,
    /// How long it lay there.
    pub(crate) idle: Duration,
}

#[derive(Default, Debug)]
struct Shelf {
    by_key: HashMap<Key, Vec<Idle>>,
    /// How many of all keys.
    count: usize,
}

/// Where the tunnel of an outbound connection came from.
#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Origin {
    from: &'static str,
}

/// All shelves of the process.
#[derive(Default, Debug)]
pub(crate) struct Pool {
    shelves: [Mutex<Shelf>; SHELVES],
    tunnels: Family<Origin, Counter>,
    resting: Gauge,
    /// How many descriptors it may have on all shelves.
    most: usize,
}

thread_local!(static SHELF: Cell<usize> = const { Cell::new(0) });

/// Says which shelf is this thread's.
pub(crate) fn this_is_shelf(number: usize) {
    SHELF.set(number % SHELVES);
}

impl Pool {
    /// Empty shelves for at most so many, whose numbers are shown with the others.
    pub(crate) fn new(metrics: &Metrics, most: usize) -> Self {
        let pool = Self { most, ..Self::default() };
        metrics.counter("tunnels", "Tunnels for outbound connections, by where they came from", pool.tunnels.clone());
        metrics.gauge("tunnels_at_rest", "Tunnels that are kept for another connection", pool.resting.clone());
        pool
    }

    /// Counts a tunnel that had to be made.
    pub(crate) fn dialled(&self) {
        self.count("dialled");
    }

    fn count(&self, from: &'static str) {
        self.tunnels.get_or_create(&Origin { from }).inc();
    }

    /// Takes the tunnel that was used last, if one may be used now: of this thread's shelf first, of others where it has none. `proven`
    /// says whether what its other side has proven still holds.
    pub(crate) fn take(&self, key: &Key, ends: &Ends, now: UnixTime, proven: impl Fn(&Tunnel) -> bool) -> Option<Warm> {
        let own = SHELF.get();
        for place in (0..SHELVES).map(|offset| (own + offset) % SHELVES) {
            while let Some(mut idle) = self.pop(place, key) {
                let unchanged = may_be_used(&idle, now) && idle.ends.are(ends);
                if !(unchanged && proven(&idle.tunnel) && idle.tunnel.is_quiet()) {
                    continue;
                }
                if place != own && idle.tunnel.move_here().is_err() {
                    continue;
                }
                self.count(if place == own { "warm" } else { "other-core" });
                return Some(Warm { tunnel: idle.tunnel, idle: idle.since.elapsed() });
            }
        }
        None
    }

    fn pop(&self, place: usize, key: &Key) -> Option<Idle> {
        let mut shelf = self.shelf(place);
        let of_key = shelf.by_key.get_mut(key)?;
        let idle = of_key.pop();
        if of_key.is_empty() {
            shelf.by_key.remove(key);
        }
        shelf.count -= usize::from(idle.is_some());
        self.resting.inc_by(-i64::from(idle.is_some()));
        idle
    }

    /// Puts a tunnel back whose last connection ended in order on both sides.
    pub(crate) fn put(&self, key: Key, tunnel: Box<Tunnel>, ends: Ends) {
        let mut shelf = self.shelf(SHELF.get());
        if tunnel.lease() > LEASES || shelf.count >= ON_A_SHELF || self.len() >= self.most {
            return;
        }
        let of_key = shelf.by_key.entry(key).or_default();
        if of_key.len() < OF_ONE_KEY {
            of_key.push(Idle { tunnel, since: Instant::now(), ends });
            shelf.count += 1;
            self.resting.inc();
        }
    }

    /// Drops what has lain too long, has heard something, or leads between pods that have changed.
    pub(crate) fn sweep(&self, now: UnixTime, view: &LiveView) {
        self.retain(SHELF.get(), |key, of_key| {
            let present = Ends::now(view, key);
            of_key.retain_mut(|idle| {
                let unchanged = present.as_ref().is_some_and(|present| idle.ends.are(present));
                unchanged && may_be_used(idle, now) && idle.tunnel.is_quiet()
            });
        });
    }

    /// Drops all tunnels of a pod: sockets would keep its network namespace (T42).
    pub(crate) fn forget(&self, pod: &PodUid) {
        for place in 0..SHELVES {
            self.retain(place, |key, of_key| {
                if key.source_pod == *pod {
                    of_key.clear();
                }
            });
        }
    }

    /// Has `drop` take what it will from each key of a shelf, and counts what is left.
    fn retain(&self, place: usize, mut drop: impl FnMut(&Key, &mut Vec<Idle>)) {
        let mut shelf = self.shelf(place);
        shelf.by_key.retain(|key, of_key| {
            drop(key, of_key);
            !of_key.is_empty()
        });
        let left = shelf.by_key.values().map(Vec::len).sum();
        self.resting.inc_by(left as i64 - shelf.count as i64);
        shelf.count = left;
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.resting.get()).unwrap_or(0)
    }

    fn shelf(&self, place: usize) -> MutexGuard<'_, Shelf> {
        self.shelves[place].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn may_be_used(idle: &Idle, now: UnixTime) -> bool {
    idle.since.elapsed() < IDLE && idle.tunnel.made.elapsed() < AGE && now.as_secs() < idle.tunnel.until.as_secs()
}
