//! Sockets of a pod's network namespace, kept ready.
//!
//! Only the agent can make them, so a connection must not wait for one: a few of each kind lie here, and more are asked
//! for before they run out. Where they do, a connection waits a while and is not refused at once (T5).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh::PodUid;
use socket2::Socket;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout_at};
use wire::pods::{MAX_SOCKETS, SocketKind, ToAgent};

use crate::reasons::EndedEarly;

/// With fewer than this many left, more are asked for.
const LOW_WATER: usize = 8;

/// How many are asked for at first; at most it is [`MAX_SOCKETS`]. The number follows the rate between the two.
const SMALLEST_BATCH: u32 = 8;

/// Two batches within this time: the next one is twice as large.
const BUSY: Duration = Duration::from_secs(2);

/// After this long, a batch that was asked for counts as lost.
const LOST: Duration = Duration::from_secs(1);

/// After an answer without sockets, as of an agent that is new and has not taken the pod over yet.
const RETRY: Duration = Duration::from_millis(50);

/// How long a connection waits for a socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// The sockets of one pod.
#[derive(Debug)]
pub(crate) struct Stash {
    pod: PodUid,
    /// At most one request per pod and kind is under way to an agent, which bounds the queue.
    agent: mpsc::UnboundedSender<ToAgent>,
    shelves: [Mutex<Shelf>; SocketKind::ALL.len()],
    arrived: Notify,
}

#[derive(Debug)]
struct Shelf {
    sockets: Vec<Socket>,
    /// No batch is asked for before this.
    next: Option<Instant>,
    last_arrival: Option<Instant>,
    batch: u32,
}

impl Stash {
    /// An empty stash that asks through `agent`.
    pub(crate) fn new(pod: PodUid, agent: mpsc::UnboundedSender<ToAgent>) -> Self {
        Self { pod, agent, shelves: SocketKind::ALL.map(|_| Mutex::new(Shelf::new())), arrived: Notify::new() }
    }

    /// Asks for the first of each kind that the pod can use.
    pub(crate) fn fill(&self, kinds: impl IntoIterator<Item = SocketKind>) {
        for kind in kinds {
            self.refill(kind, &mut self.shelf(kind));
        }
    }

    /// Takes a socket, or waits for one.
    ///
    /// # Errors
    /// [`EndedEarly::NoSocket`] when none came in time.
    pub(crate) async fn take(&self, kind: SocketKind) -> Result<Socket, EndedEarly> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before looking: what arrives between the look and the wait is not missed.
            let arrived = self.arrived.notified();
            if let Some(socket) = self.take_now(kind) {
                return Ok(socket);
            }
            // Looks again when the next request may go out, in order to repeat one that was lost or not met.
            let again = self.shelf(kind).next.unwrap_or_else(|| Instant::now() + RETRY);
            if timeout_at(deadline.min(again), arrived).await.is_err() && Instant::now() >= deadline {
                return Err(EndedEarly::NoSocket);
            }
        }
    }

    fn take_now(&self, kind: SocketKind) -> Option<Socket> {
        let mut shelf = self.shelf(kind);
        let socket = shelf.sockets.pop();
        if shelf.sockets.len() < LOW_WATER {
            self.refill(kind, &mut shelf);
        }
        socket
    }

    fn refill(&self, kind: SocketKind, shelf: &mut Shelf) {
        let now = Instant::now();
        if shelf.next.is_some_and(|next| now < next) {
            return;
        }
        shelf.next = Some(now + LOST);
        // Nobody listens any more when the process ends; then nothing is needed, either.
        let want = ToAgent::WantSockets { pod: self.pod.clone(), kind, count: shelf.batch };
        let _ = self.agent.send(want);
    }

    /// Asks a new agent for what the last one was asked for in vain.
    pub(crate) fn ask_again(&self) {
        for kind in SocketKind::ALL {
            let mut shelf = self.shelf(kind);
            if shelf.next.take().is_some() {
                self.refill(kind, &mut shelf);
            }
        }
    }

    /// Puts a batch that the agent made on its shelf. A short one is no error here: the next one is asked for when needed.
    pub(crate) fn put(&self, kind: SocketKind, sockets: Vec<Socket>) {
        {
            let mut shelf = self.shelf(kind);
            let now = Instant::now();
            if sockets.is_empty() {
                shelf.next = Some(now + RETRY);
                drop(shelf);
                // Who waits is to know of the new time.
                return self.arrived.notify_waiters();
            }
            let busy = shelf.last_arrival.is_some_and(|last| now.duration_since(last) < BUSY);
            shelf.batch = if busy { shelf.batch * 2 } else { shelf.batch / 2 }.clamp(SMALLEST_BATCH, MAX_SOCKETS);
            shelf.last_arrival = Some(now);
            shelf.next = None;
            shelf.sockets.extend(sockets);
        }
        self.arrived.notify_waiters();
    }

    /// How many are there, in the order of [`SocketKind::ALL`].
    pub(crate) fn counts(&self) -> [usize; SocketKind::ALL.len()] {
        SocketKind::ALL.map(|kind| self.shelf(kind).sockets.len())
    }

    fn shelf(&self, kind: SocketKind) -> MutexGuard<'_, Shelf> {
        let index = match kind {
            SocketKind::OuterV4 => 0,
            SocketKind::OuterV6 => 1,
            SocketKind::InnerV4 => 2,
            SocketKind::InnerV6 => 3,
        };
        self.shelves[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn new() -> Self {
        Self { sockets: Vec::new(), next: None, last_arrival: None, batch: SMALLEST_BATCH }
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Type};

    use super::*;

    fn sockets(count: usize) -> Vec<Socket> {
        (0..count).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).collect()
    }

    fn stash() -> (Stash, mpsc::UnboundedReceiver<ToAgent>) {
        let (agent, asked) = mpsc::unbounded_channel();
        (Stash::new(PodUid::from("uid"), agent), asked)
    }

    fn count(want: Option<ToAgent>) -> Option<u32> {
        match want {
            Some(ToAgent::WantSockets { count, .. }) => Some(count),
            _ => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_it_empty_waits_and_is_served_when_sockets_come() {
        let (stash, mut asked) = stash();
        let serve = async {
            assert_eq!(count(asked.recv().await), Some(SMALLEST_BATCH));
            stash.put(SocketKind::OuterV4, sockets(1));
        };
        let (taken, ()) = tokio::join!(stash.take(SocketKind::OuterV4), serve);
        taken.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_gets_none_in_time_is_refused_by_name_and_asked_again_before() {
        let (stash, mut asked) = stash();
        let started = Instant::now();
        assert_eq!(stash.take(SocketKind::InnerV6).await.unwrap_err(), EndedEarly::NoSocket);
        assert_eq!(started.elapsed(), PATIENCE);
        let mut asks = 0;
        while asked.try_recv().is_ok() {
            asks += 1;
        }
        assert!(asks >= 2, "a lost request is repeated: {asks}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_agent_is_asked_at_once_for_what_the_last_one_was_asked_for() {
        let (stash, mut asked) = stash();
        let serve = async {
            assert_eq!(count(asked.recv().await), Some(SMALLEST_BATCH));
            stash.ask_again();
            assert_eq!(count(asked.recv().await), Some(SMALLEST_BATCH));
            // It has not taken the pod over yet.
            stash.put(SocketKind::OuterV4, Vec::new());
            assert_eq!(count(asked.recv().await), Some(SMALLEST_BATCH));
            stash.put(SocketKind::OuterV4, sockets(1));
        };
        let started = Instant::now();
        let (taken, ()) = tokio::join!(stash.take(SocketKind::OuterV4), serve);
        taken.unwrap();
        assert!(started.elapsed() <= 2 * RETRY, "{:?}", started.elapsed());
        assert!(asked.try_recv().is_ok(), "the last one was taken");
        stash.ask_again();
        assert!(asked.try_recv().is_ok());
        assert!(asked.try_recv().is_err(), "of what was not asked for nothing is asked for again");
    }

    #[tokio::test(start_paused = true)]
    async fn more_are_asked_for_before_it_is_empty_and_once() {
        let (stash, mut asked) = stash();
        stash.put(SocketKind::OuterV4, sockets(LOW_WATER + 1));
        stash.take(SocketKind::OuterV4).await.unwrap();
        assert!(asked.try_recv().is_err(), "enough are left");
        for _ in 0..3 {
            stash.take(SocketKind::OuterV4).await.unwrap();
        }
        assert!(asked.try_recv().is_ok());
        assert!(asked.try_recv().is_err(), "one request is under way");
    }

    #[tokio::test(start_paused = true)]
    async fn the_batch_follows_the_rate() {
        let (stash, mut asked) = stash();
        for _ in 0..5 {
            stash.put(SocketKind::OuterV4, sockets(1));
            stash.take(SocketKind::OuterV4).await.unwrap();
        }
        let mut last = None;
        while let Ok(want) = asked.try_recv() {
            last = count(Some(want));
        }
        assert_eq!(last, Some(MAX_SOCKETS));
        tokio::time::advance(BUSY * 2).await;
        stash.put(SocketKind::OuterV4, sockets(1));
        stash.take(SocketKind::OuterV4).await.unwrap();
        assert_eq!(count(asked.try_recv().ok()), Some(MAX_SOCKETS / 2));
    }
}
