//! How much one pod or one source may have under way (T18): one proxy serves all pods of a node, and a hostile one must
//! not take what its neighbours need.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::reasons::EndedEarly;

/// Connections of one source address that have not proven anything yet: no hello read, or handshake not finished.
const HALF_READ_PER_SOURCE: usize = 512;

/// The same of all sources together.
const HALF_READ: usize = 8192;

/// Handshakes under way between one source and one destination. They cost a third of a millisecond of one core each, so
/// that more of them at once only makes each of them late. It is no bound for all together: a destination that does not
/// answer must not hold up the others.
const HANDSHAKES: usize = 32;

/// How long a connection stands in line for its handshake: longer than a flood of ten thousand takes on one core.
const HANDSHAKE_LINE: Duration = Duration::from_secs(20);

/// Descriptors that a connection takes: one for each leg.
const PER_CONNECTION: u64 = 2;

/// Descriptors for everything else: listeners, stashes, runtimes.
const RESERVED: u64 = 512;

/// What may run out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Budget {
    /// Connections of a pod.
    Connections,
    /// Connections that have not proven anything yet.
    HalfRead,
    /// Handshakes under way.
    Handshakes,
}

impl Budget {
    /// The name in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::HalfRead => "half-read",
            Self::Handshakes => "handshakes",
        }
    }
}

/// The budgets of the process.
#[derive(Debug)]
pub(crate) struct Budgets {
    connections_per_pod: usize,
    half_read: Arc<Mutex<HashMap<IpAddr, usize>>>,
    half_read_total: Arc<AtomicUsize>,
    dials: Lines,
    accepts: Lines,
}

/// What is held while something is under way; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct HalfRead {
    source: IpAddr,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
    total: Arc<AtomicUsize>,
}

impl Budgets {
    /// Budgets for a process that may have so many descriptors. One pod gets at most half of them.
    pub(crate) fn new(descriptors: u64) -> Self {
        let connections = descriptors.saturating_sub(RESERVED) / PER_CONNECTION / 2;
        Self {
            connections_per_pod: usize::try_from(connections.max(64)).unwrap_or(usize::MAX),
            half_read: Arc::default(),
            half_read_total: Arc::default(),
            dials: Lines::default(),
            accepts: Lines::default(),
        }
    }

    /// How many connections one pod may have.
    pub(crate) fn connections_per_pod(&self) -> usize {
        self.connections_per_pod
    }

    /// Room for a connection that has not shown what it is.
    ///
    /// # Errors
    /// [`EndedEarly::OverBudget`] at once: to wait would cost the same room.
    pub(crate) fn half_read(&self, source: IpAddr) -> Result<HalfRead, EndedEarly> {
        let held = HalfRead { source, counts: self.half_read.clone(), total: self.half_read_total.clone() };
        let of_source = {
            let mut counts = held.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(source).or_default();
            *count += 1;
            *count
        };
        let total = held.total.fetch_add(1, Ordering::Relaxed) + 1;
        // `held` gives both back when this refuses.
        if of_source > HALF_READ_PER_SOURCE || total > HALF_READ {
            Err(EndedEarly::OverBudget(Budget::HalfRead))
        } else {
            Ok(held)
        }
    }

    /// A place for a connection and its handshake from `source` to `destination`; stands in line for it.
    ///
    /// # Errors
    /// [`EndedEarly::OverBudget`] when the line does not move.
    pub(crate) async fn dial(&self, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        self.dials.place(source, destination).await
    }

    /// A place for a handshake with `source`, which dialled `destination`; stands in line for it.
    ///
    /// # Errors
    /// [`EndedEarly::OverBudget`] when the line does not move.
    pub(crate) async fn accept(&self, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        self.accepts.place(source, destination).await
    }
}

/// One line for each pair of source and destination that has handshakes under way.
#[derive(Clone, Default, Debug)]
struct Lines(Arc<Mutex<HashMap<Pair, Arc<Semaphore>>>>);

type Pair = (IpAddr, SocketAddr);

/// A place in a handshake; dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct Place {
    /// Before the line is looked at: nobody is in it any more then.
    permit: Option<OwnedSemaphorePermit>,
    pair: Pair,
    lines: Lines,
}

impl Lines {
    async fn place(&self, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        let pair = (source, destination);
        let line = self.lock().entry(pair).or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES))).clone();
        let mut place = Place { permit: None, pair, lines: self.clone() };
        match timeout(HANDSHAKE_LINE, line.acquire_owned()).await {
            Ok(Ok(permit)) => place.permit = Some(permit),
            // `place` forgets the line where it was the last in it.
            Ok(Err(_)) | Err(_) => return Err(EndedEarly::OverBudget(Budget::Handshakes)),
        }
        Ok(place)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pair, Arc<Semaphore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut lines = self.lines.lock();
        // Everybody in the line holds it, and joins it under this lock.
        if lines.get(&self.pair).is_some_and(|line| Arc::strong_count(line) == 1) {
            lines.remove(&self.pair);
        }
    }
}

impl Drop for HalfRead {
    fn drop(&mut self) {
        self.total.fetch_sub(1, Ordering::Relaxed);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            // Strangers choose their addresses: an entry without a connection would be a leak that they control.
            if *count == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn a_source_over_its_budget_is_refused_and_its_neighbour_is_not() {
        let budgets = Budgets::new(4096);
        let held: Vec<_> = (0..HALF_READ_PER_SOURCE).map(|_| budgets.half_read(address(1)).unwrap()).collect();
        assert_eq!(budgets.half_read(address(1)).unwrap_err(), EndedEarly::OverBudget(Budget::HalfRead));
        assert!(budgets.half_read(address(2)).is_ok());
        drop(held);
        assert!(budgets.half_read(address(1)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_destination_that_does_not_answer_holds_up_only_those_who_dial_it() {
        let budgets = Budgets::new(4096);
        let (dead, alive) = (SocketAddr::new(address(8), 80), SocketAddr::new(address(9), 80));
        let mut hanging = Vec::new();
        for _ in 0..HANDSHAKES {
            hanging.push(budgets.dial(address(1), dead).await.unwrap());
        }
        assert_eq!(budgets.dial(address(1), dead).await.unwrap_err(), EndedEarly::OverBudget(Budget::Handshakes));
        assert!(budgets.dial(address(1), alive).await.is_ok());
        assert!(budgets.dial(address(2), dead).await.is_ok());
        let (next, ()) = tokio::join!(budgets.dial(address(1), dead), async { drop(hanging.pop()) });
        assert!(next.is_ok());
        drop((hanging, next));
        assert!(budgets.dials.lock().is_empty(), "a line without anybody in it is forgotten");
    }

    #[test]
    fn one_pod_gets_at_most_half_of_the_descriptors() {
        let budget = Budgets::new(100_000).connections_per_pod() as u64;
        assert!(budget * PER_CONNECTION * 2 <= 100_000);
        assert!(Budgets::new(0).connections_per_pod() > 0);
    }

    proptest! {
        #[test]
        fn what_was_taken_is_given_back(sources in prop::collection::vec(0_u8..4, 0..600)) {
            let budgets = Budgets::new(4096);
            let held: Vec<_> = sources.iter().filter_map(|source| budgets.half_read(address(*source)).ok()).collect();
            prop_assert_eq!(budgets.half_read_total.load(Ordering::Relaxed), held.len());
            drop(held);
            prop_assert_eq!(budgets.half_read_total.load(Ordering::Relaxed), 0);
            prop_assert!(budgets.half_read.lock().unwrap().is_empty());
        }
    }
}
