//! How much one pod or one source may have under way (T18): one proxy serves all pods of a node, and a hostile one must
//! not take what its neighbours need. How many connections each may have is in [`crate::shares`].

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh::PodUid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use crate::reasons::EndedEarly;
use crate::shares::{Payer, Share, Shares};

/// Connections of one source address that have not proven anything yet: no hello read, or handshake not finished.
const HALF_READ_PER_SOURCE: usize = 512;

/// The same of all sources together.
const HALF_READ: usize = 8192;

/// How many of these strangers may have: the rest is for addresses that the view knows.
const HALF_READ_OF_STRANGERS: usize = HALF_READ / 2;

/// Handshakes under way between one source and one destination. They cost a third of a millisecond of one core each, so
/// that more of them at once only makes each of them late. It is no bound for all together: a destination that does not
/// answer must not hold up the others.
const HANDSHAKES: usize = 32;

/// Handshakes of one source in a second, which is a third of a core; who has made none for a second may make as many at once.
const HANDSHAKES_PER_SECOND: u32 = 1000;

/// How long a connection stands in line for its handshake: longer than a flood of ten thousand takes on one core.
const HANDSHAKE_LINE: Duration = Duration::from_secs(20);

/// Connections of one pod that wait for the view to know their destination. Each may take seconds.
const LOOK_UPS: usize = 256;

/// Descriptors that a connection takes: one for each leg.
const PER_CONNECTION: u64 = 2;

/// So many connections there is room for by any limit. Where descriptors run out, accepting waits.
const LEAST_ROOM: u64 = 64;

/// Descriptors of a captured pod itself: its listeners twice, and a stash of each kind with a batch on its way.
const PER_POD: u64 = 80;

/// Of how many descriptors one may be a tunnel's at rest.
const PER_RESTING: u64 = 16;

/// Descriptors for everything else: runtimes, streams, logs, whoever asks for metrics.
const RESERVED: u64 = 256;

/// The most sources whose rate is remembered one by one. Strangers choose their addresses; those beyond share one rate.
const MOST_RATES: usize = 8192;

/// What may run out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Budget {
    /// Connections that one source has opened, from pods of this node and to them.
    Source,
    /// Connections that others have opened towards one pod.
    Towards,
    /// Connections of addresses that the view does not know.
    Strangers,
    /// Connections that have not proven anything yet.
    HalfRead,
    /// Handshakes under way.
    Handshakes,
    /// Questions to the view.
    LookUps,
}

impl Budget {
    /// The name in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Towards => "towards",
            Self::Strangers => "strangers",
            Self::HalfRead => "half-read",
            Self::Handshakes => "handshakes",
            Self::LookUps => "look-ups",
        }
    }
}

/// The budgets of the process.
#[derive(Debug)]
pub(crate) struct Budgets {
    descriptors: u64,
    shares: Shares,
    half_read: Counts,
    half_read_of_all: Arc<AtomicUsize>,
    look_ups: Counts,
    dials: Lines,
    accepts: Lines,
    rates: Rates,
}

impl Budgets {
    /// Budgets for a process that may have so many descriptors.
    pub(crate) fn new(descriptors: u64) -> Self {
        Self {
            descriptors,
            shares: Shares::new(room(descriptors, 0)),
            half_read: Counts::default(),
            half_read_of_all: Arc::default(),
            look_ups: Counts::default(),
            dials: Lines::default(),
            accepts: Lines::default(),
            rates: Rates::default(),
        }
    }

    /// So many pods are captured here, each of which takes descriptors by itself.
    pub(crate) fn set_pods(&self, pods: usize) {
        self.shares.set_room(room(self.descriptors, pods));
    }

    /// How many tunnels may rest.
    pub(crate) fn resting(&self) -> usize {
        usize::try_from(self.descriptors / PER_RESTING).unwrap_or(usize::MAX)
    }

    /// Room for a connection that `payer` opens: towards a pod of this node, or out of one.
    ///
    /// # Errors
    /// [`Budget::Source`], [`Budget::Towards`] or [`Budget::Strangers`].
    pub(crate) fn connection(&self, payer: Payer, towards: Option<PodUid>) -> Result<Share, EndedEarly> {
        self.shares.take(payer, towards).map_err(EndedEarly::OverBudget)
    }

    /// Room for a connection that has not shown what it is. Addresses that the view knows have a half for themselves.
    ///
    /// # Errors
    /// [`Budget::HalfRead`] at once: to wait would cost the same room.
    pub(crate) fn half_read(&self, source: IpAddr, known: bool) -> Result<HalfRead, EndedEarly> {
        let most = if known { HALF_READ } else { HALF_READ_OF_STRANGERS };
        let of_source = self.half_read.hold(source, HALF_READ_PER_SOURCE, Budget::HalfRead)?;
        let held = HalfRead { _of_source: of_source, of_all: self.half_read_of_all.clone() };
        // `held` gives both back when this refuses.
        if held.of_all.fetch_add(1, Ordering::Relaxed) >= most {
            return Err(EndedEarly::OverBudget(Budget::HalfRead));
        }
        Ok(held)
    }

    /// Room for a pod's connection to wait until the view knows where it goes.
    ///
    /// # Errors
    /// [`Budget::LookUps`].
    pub(crate) fn look_up(&self, source: IpAddr) -> Result<Held, EndedEarly> {
        self.look_ups.hold(source, LOOK_UPS, Budget::LookUps)
    }

    /// A place for a connection and its handshake from `source` to `destination`; stands in line for it.
    ///
    /// # Errors
    /// [`Budget::Handshakes`] when the line does not move.
    pub(crate) async fn dial(&self, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        self.place(&self.dials, source, destination).await
    }

    /// A place for a handshake with `source`, which dialled `destination`; stands in line for it.
    ///
    /// # Errors
    /// [`Budget::Handshakes`] when the line does not move.
    pub(crate) async fn accept(&self, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        self.place(&self.accepts, source, destination).await
    }

    async fn place(&self, lines: &Lines, source: IpAddr, destination: SocketAddr) -> Result<Place, EndedEarly> {
        let standing = async {
            let place = lines.place(source, destination).await?;
            // In turn, which the line keeps: whoever is next waits here, and holds its place.
            let now = Instant::now();
            let begin = self.rates.next(source, now);
            // A sleep until now would last to the next millisecond, which is longer than a handshake.
            if begin > now {
                sleep_until(begin).await;
            }
            Ok(place)
        };
        let over = EndedEarly::OverBudget(Budget::Handshakes);
        timeout(HANDSHAKE_LINE, standing).await.unwrap_or(Err(over))
    }
}

/// How many connections there is room for beside what pods and the process itself need.
fn room(descriptors: u64, pods: usize) -> usize {
    let others = RESERVED + descriptors / PER_RESTING + PER_POD.saturating_mul(pods as u64);
    let connections = descriptors.saturating_sub(others) / PER_CONNECTION;
    // What is too small for anybody would refuse everybody.
    usize::try_from(connections.max(LEAST_ROOM)).unwrap_or(usize::MAX)
}

/// How many things each address has under way.
#[derive(Clone, Default, Debug)]
struct Counts(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Held {
    address: IpAddr,
    counts: Counts,
}

impl Counts {
    fn hold(&self, address: IpAddr, most: usize, budget: Budget) -> Result<Held, EndedEarly> {
        let mut counts = self.lock();
        let count = counts.entry(address).or_default();
        if *count >= most {
            return Err(EndedEarly::OverBudget(budget));
        }
        *count += 1;
        Ok(Held { address, counts: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            // Strangers choose their addresses: an entry without a connection would be a leak that they control.
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// What is held while a connection has not shown what it is; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct HalfRead {
    _of_source: Held,
    of_all: Arc<AtomicUsize>,
}

impl Drop for HalfRead {
    fn drop(&mut self) {
        self.of_all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When each source may make its next handshake (the generic cell rate algorithm, ITU-T I.371).
#[derive(Default, Debug)]
struct Rates(Mutex<HashMap<IpAddr, Instant>>);

impl Rates {
    /// When the next handshake of a source may begin, counting it.
    fn next(&self, source: IpAddr, now: Instant) -> Instant {
        let burst = Duration::from_secs(1);
        let mut rates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rates.len() >= MOST_RATES && !rates.contains_key(&source) {
            // What lies in the past says nothing any more.
            rates.retain(|_, due| *due > now);
        }
        let source =
            if rates.len() >= MOST_RATES && !rates.contains_key(&source) { IpAddr::from([0, 0, 0, 0]) } else { source };
        let due = rates.entry(source).or_insert(now);
        *due = (*due).max(now) + burst / HANDSHAKES_PER_SECOND;
        // Never in the past; the burst is what may be ahead of its time.
        due.checked_sub(burst).map_or(now, |begin| begin.max(now))
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
        // Whoever gives up here forgets the line where it was the last in it: `place` does when it is dropped.
        let permit = line.acquire_owned().await.map_err(|_| EndedEarly::OverBudget(Budget::Handshakes))?;
        place.permit = Some(permit);
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
        let held: Vec<_> = (0..HALF_READ_PER_SOURCE).map(|_| budgets.half_read(address(1), true).unwrap()).collect();
        assert_eq!(budgets.half_read(address(1), true).unwrap_err(), EndedEarly::OverBudget(Budget::HalfRead));
        assert!(budgets.half_read(address(2), true).is_ok());
        drop(held);
        assert!(budgets.half_read(address(1), true).is_ok());

        let held: Vec<_> = (0..LOOK_UPS).map(|_| budgets.look_up(address(1)).unwrap()).collect();
        assert_eq!(budgets.look_up(address(1)).unwrap_err(), EndedEarly::OverBudget(Budget::LookUps));
        assert!(budgets.look_up(address(2)).is_ok());
        drop(held);
        assert!(budgets.look_ups.lock().is_empty(), "nothing is remembered of who has nothing");
    }

    #[test]
    fn strangers_however_many_leave_room_for_addresses_of_the_mesh() {
        let budgets = Budgets::new(4096);
        let stranger = |number: usize| IpAddr::from([203, 0, (number >> 8) as u8, number as u8]);
        let held: Vec<_> =
            (0..HALF_READ_OF_STRANGERS).map(|number| budgets.half_read(stranger(number), false).unwrap()).collect();
        let refused = budgets.half_read(stranger(HALF_READ_OF_STRANGERS), false).unwrap_err();
        assert_eq!(refused, EndedEarly::OverBudget(Budget::HalfRead));
        assert!(budgets.half_read(address(1), true).is_ok());
        drop(held);
        assert_eq!(budgets.half_read_of_all.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn handshakes_of_one_source_have_a_rate_and_those_of_another_their_own() {
        let (rates, now) = (Rates::default(), Instant::now());
        let second = Duration::from_secs(1);
        for _ in 0..HANDSHAKES_PER_SECOND {
            assert_eq!(rates.next(address(1), now), now, "a burst");
        }
        let mut last = now;
        for _ in 0..HANDSHAKES_PER_SECOND {
            let next = rates.next(address(1), now);
            assert!(next > last);
            last = next;
        }
        assert!(last <= now + second && last > now + second * 9 / 10, "{:?}", last - now);
        assert_eq!(rates.next(address(2), now), now);
        assert_eq!(rates.next(address(1), now + second * 3), now + second * 3, "who has waited may go on");
    }

    #[test]
    fn rates_of_strangers_are_bounded() {
        let (rates, now) = (Rates::default(), Instant::now());
        for number in 0..MOST_RATES as u32 + 100 {
            rates.next(IpAddr::from((0x0a00_0000 + number).to_be_bytes()), now);
        }
        assert!(rates.0.lock().unwrap().len() <= MOST_RATES + 1);
        rates.next(IpAddr::from([203, 0, 113, 1]), now + Duration::from_secs(1));
        assert!(rates.0.lock().unwrap().len() <= 2, "what is over is forgotten");
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
    fn descriptors_are_enough_for_all_connections_that_there_is_room_for() {
        for descriptors in [1024, 4096, 20_000, 1_048_576] {
            for pods in [0, 5, 250] {
                let taken = room(descriptors, pods) as u64 * PER_CONNECTION;
                let others = descriptors / PER_RESTING + pods as u64 * PER_POD;
                assert!(taken == LEAST_ROOM * PER_CONNECTION || taken + others <= descriptors, "{descriptors} {pods}");
            }
        }
        // A third of the usual limit of an ordinary user's machine, for one client beside a few pods.
        let budgets = Budgets::new(20_000);
        budgets.set_pods(6);
        let one = Payer::Known(address(1));
        let held: Vec<_> = std::iter::from_fn(|| budgets.connection(one.clone(), Some("pod".into())).ok()).collect();
        assert!(held.len() >= 20_000 / 3, "{}", held.len());
    }

    proptest! {
        #[test]
        fn what_was_taken_is_given_back(sources in prop::collection::vec(0_u8..4, 0..600)) {
            let budgets = Budgets::new(4096);
            let held: Vec<_> = sources.iter().filter_map(|source| budgets.half_read(address(*source), true).ok()).collect();
            prop_assert_eq!(budgets.half_read_of_all.load(Ordering::Relaxed), held.len());
            drop(held);
            prop_assert_eq!(budgets.half_read_of_all.load(Ordering::Relaxed), 0);
            prop_assert!(budgets.half_read.lock().is_empty());
        }
    }
}
