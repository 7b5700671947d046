//! Whose turn it is, when several want the same core (T18).
//!
//! An event queue is first come, first served, and each connection is one that comes: a pod with a thousand of them would have a
//! thousand turns for each one of its neighbour's. So the connections of a core stand in lines, one for each payer, and a
//! line has the core for [`TURN`] at a time, however long it is.
//!
//! That is half of it. A thread that is always busy is made to wait by the kernel where processors are short, for milliseconds, and
//! everybody whom it serves waits with it. So a line that keeps a core busy beside others is advanced by another thread
//! ([`Aside`]) for as long as it does: the core sleeps most of the time again, and is woken at once. One that takes far less than the
//! busiest beside it, and no quarter of a core, is not who keeps it busy, and would only wait there with that one.

mod line;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{coop, spawn_local, yield_now};
use tokio::time::timeout;

use self::line::Line;
use crate::shares::Payer;

/// How long a line has its thread before the others have it. What a connection does in one step is not interrupted.
const TURN: Duration = Duration::from_micros(100);

/// One turn in so many is measured by the thread's own clock, and counts for all of them: to look at it is a system call.
const MEASURED: u32 = 8;

/// How long a line is watched before it is said whether it keeps its thread busy: one of a core, and one that is aside.
const WATCHED: Duration = Duration::from_millis(50);
const WATCHED_ASIDE: Duration = Duration::from_secs(1);

/// The part of that time from which on it may, beside others, and below which it does not any more, in thousandths.
const BUSY: u64 = 125;
const QUIET: u64 = 20;

/// Up to this part of the time, a line that takes less than half of what the busiest one takes is not who keeps the core busy.
const MODERATE: u64 = 250;

/// A line counts as another one beside a busy one when it has had a turn within this time.
const BESIDE: Duration = Duration::from_secs(1);

/// A connection's life, or whatever else somebody pays for.
pub(crate) type Life = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The lines of all cores.
#[derive(Clone, Debug)]
pub(crate) struct Everybody {
    began: Instant,
    cores: Arc<Mutex<Vec<Weak<Lines>>>>,
}

/// The lines of one core.
#[derive(Clone, Debug)]
pub(crate) struct Turns(Arc<Lines>);

struct Lines {
    everybody: Everybody,
    by_payer: Mutex<HashMap<Payer, Arc<Line>>>,
    /// Lines that are the core's again.
    back: mpsc::UnboundedSender<Arc<Line>>,
    /// The thread for those that keep the core busy, from the first of them on; none where the system gives none.
    aside: OnceLock<Option<mpsc::UnboundedSender<Arc<Line>>>>,
    start_aside: Box<dyn Fn(Aside) -> bool + Send + Sync>,
}

/// Where a line is advanced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Core,
    Aside,
}

/// What the core's thread has to run: the lines that come back to it.
#[derive(Debug)]
pub(crate) struct Returning {
    turns: Turns,
    back: mpsc::UnboundedReceiver<Arc<Line>>,
}

/// What the other thread has to run.
#[derive(Debug)]
pub(crate) struct Aside {
    turns: Turns,
    come: mpsc::UnboundedReceiver<Arc<Line>>,
}

impl Turns {
    /// A core without lines, among all. `start_aside` starts the other thread, and says whether it could.
    pub(crate) fn new(
        everybody: &Everybody,
        start_aside: impl Fn(Aside) -> bool + Send + Sync + 'static,
    ) -> (Self, Returning) {
        let (sender, back) = mpsc::unbounded_channel();
        let turns = Self(Arc::new(Lines {
            everybody: everybody.clone(),
            by_payer: Mutex::default(),
            back: sender,
            aside: OnceLock::new(),
            start_aside: Box::new(start_aside),
        }));
        lock(&everybody.cores).push(Arc::downgrade(&turns.0));
        (turns.clone(), Returning { turns, back })
    }

    /// Lives a life in the line of whoever pays for it. Only for a task of the core.
    pub(crate) fn live(&self, payer: Payer, life: Life) {
        let payer = payer.in_turn();
        let mut lines = self.lock();
        if let Some(line) = lines.get(&payer) {
            return line.join(life);
        }
        let line = Arc::new(Line::new(payer.clone()));
        line.join(life);
        lines.insert(payer, line.clone());
        drop(lines);
        self.advance(line, Place::Core);
    }

    /// Advances a line on this thread until it is empty, or goes to the other.
    fn advance(&self, mut line: Arc<Line>, place: Place) {
        let turns = self.clone();
        // Its connections count what they do by themselves; the line must not run dry in the middle of one.
        spawn_local(coop::unconstrained(async move {
            loop {
                match turns.advance_until(&line, place).await {
                    Until::Empty if turns.forget(&line) => return,
                    Until::Empty => {}
                    Until::Elsewhere(other) => match other.send(line) {
                        Ok(()) => return,
                        // There is no other thread any more.
                        Err(back) => line = back.0,
                    },
                }
            }
        }));
    }

    async fn advance_until(&self, line: &Line, place: Place) -> Until {
        let mut watch = Watch::new(place);
        loop {
            let next = line.next();
            // A line that was left stays for a while: most who come and go come again, and what was seen of them counts.
            let next = if line.is_empty() { timeout(BESIDE, next).await } else { Ok(next.await) };
            let Ok(next) = next else { return Until::Empty };
            let mut next = Some(next);
            let began = watch.begin();
            let mut is_over = false;
            while let Some(number) = next {
                line.step(&number);
                is_over = began.elapsed() >= TURN;
                next = if is_over { None } else { line.next_now() };
            }
            let now = Instant::now();
            line.last.store(self.0.everybody.time(now), Ordering::Relaxed);
            let took = watch.took(now);
            if let Some(took) = took {
                line.took.store(took, Ordering::Relaxed);
            }
            let is_elsewhere = took.is_some_and(|took| match place {
                Place::Core => {
                    took >= BUSY
                        && self.0.everybody.has_others(line, now)
                        && keeps_busy(took, self.most_beside(line, now))
                }
                Place::Aside => is_quiet(took, || self.most_beside(line, now)),
            });
            if is_elsewhere && let Some(other) = self.other(place) {
                return Until::Elsewhere(other);
            }
            if is_over {
                // Behind whoever else is ready, and behind a look at what has come.
                yield_now().await;
            }
        }
    }

    /// The way to the other thread.
    fn other(&self, place: Place) -> Option<mpsc::UnboundedSender<Arc<Line>>> {
        match place {
            Place::Aside => Some(self.0.back.clone()),
            Place::Core => {
                let start = || {
                    let (sender, come) = mpsc::unbounded_channel();
                    (self.0.start_aside)(Aside { turns: self.clone(), come }).then_some(sender)
                };
                self.0.aside.get_or_init(start).clone()
            }
        }
    }

    /// The part of a processor that the busiest other one of this core's lines takes, wherever it is advanced.
    fn most_beside(&self, line: &Line, now: Instant) -> u64 {
        let lines = self.lock();
        let beside = lines.values().filter(|other| self.0.everybody.is_beside(other, line, now));
        beside.map(|other| other.took.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Forgets a line, unless somebody has joined it meanwhile.
    fn forget(&self, line: &Line) -> bool {
        let mut lines = self.lock();
        let is_empty = line.is_empty();
        if is_empty {
            lines.remove(&line.payer);
        }
        is_empty
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Payer, Arc<Line>>> {
        lock(&self.0.by_payer)
    }
}

impl Everybody {
    /// Nobody yet.
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), cores: Arc::default() }
    }

    /// A time in milliseconds.
    fn time(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_millis() as u64
    }

    /// Whether others than a line's payer are served, too: on whichever core, as what one accepts another one may serve.
    fn has_others(&self, line: &Line, now: Instant) -> bool {
        let cores: Vec<_> = lock(&self.cores).iter().filter_map(Weak::upgrade).collect();
        cores.iter().any(|core| lock(&core.by_payer).values().any(|other| self.is_beside(other, line, now)))
    }

    fn is_beside(&self, other: &Line, line: &Line, now: Instant) -> bool {
        let since = self.time(now).saturating_sub(BESIDE.as_millis() as u64);
        other.payer != line.payer && other.last.load(Ordering::Relaxed) >= since
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("by_payer", &self.by_payer).finish_non_exhaustive()
    }
}

impl Returning {
    /// Takes back what comes, for as long as it is polled.
    pub(crate) async fn run(mut self) {
        while let Some(line) = self.back.recv().await {
            self.turns.advance(line, Place::Core);
        }
    }
}

impl Aside {
    /// Advances what comes, for as long as it is polled.
    pub(crate) async fn run(mut self) {
        while let Some(line) = self.come.recv().await {
            self.turns.advance(line, Place::Aside);
        }
    }
}

/// Until when a line was advanced.
enum Until {
    /// Nobody is left in it, and nobody has come for a while.
    Empty,
    /// It is the other thread's from now on.
    Elsewhere(mpsc::UnboundedSender<Arc<Line>>),
}

/// What a line takes of its thread.
struct Watch {
    place: Place,
    since: Instant,
    /// Processor time of the turns that were measured.
    used: Duration,
    turns: u32,
    /// The thread's processor time at the beginning of the present turn, where it is measured.
    measured: Option<Duration>,
}

impl Watch {
    fn new(place: Place) -> Self {
        Self { place, since: Instant::now(), used: Duration::ZERO, turns: 0, measured: None }
    }

    /// A turn begins.
    fn begin(&mut self) -> Instant {
        self.turns = self.turns.wrapping_add(1);
        self.measured = self.turns.is_multiple_of(MEASURED).then(linux::clock::of_thread);
        Instant::now()
    }

    /// A turn has ended. Says, each time that the line was watched for long enough, which part of a processor it took, in
    /// thousandths.
    fn took(&mut self, now: Instant) -> Option<u64> {
        if let Some(before) = self.measured.take() {
            self.used += linux::clock::of_thread().saturating_sub(before) * MEASURED;
        }
        let enough = match self.place {
            Place::Core => WATCHED,
            Place::Aside => WATCHED_ASIDE,
        };
        let watched = now - self.since;
        if watched < enough {
            return None;
        }
        let took = self.used.as_micros() * 1000 / watched.as_micros().max(1);
        // A turn that was measured counts for those that were not, and may have been the longest.
        let took = took.min(1000);
        (self.since, self.used) = (now, Duration::ZERO);
        Some(took as u64)
    }
}

/// Whether a line that takes so much, from [`BUSY`] on, keeps its core busy beside others, of whom one takes as much as `most`.
fn keeps_busy(took: u64, most: u64) -> bool {
    took >= MODERATE || took * 2 >= most
}

/// Whether a line that is aside may be the core's again, as little as it takes, or beside one that takes as much as `most`. What
/// it takes here it takes with less weight, and would take more of there.
fn is_quiet(took: u64, most: impl FnOnce() -> u64) -> bool {
    took < QUIET || took < BUSY && took * 3 < most()
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::IpAddr;
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::task::{Poll, Waker};

    use proptest::prelude::*;
    use tokio::sync::{Notify, oneshot};

    use super::*;
    use crate::tests::world::{LONG, run};

    fn payer(number: u8) -> Payer {
        Payer::Known(IpAddr::from([10, 0, 0, number]))
    }

    /// The turns of this thread, beside which another one is started where it is needed.
    fn turns() -> Turns {
        let start = |aside: Aside| {
            std::thread::spawn(|| run(aside.run()));
            true
        };
        let (turns, returning) = Turns::new(&Everybody::new(), start);
        spawn_local(returning.run());
        turns
    }

    /// Lives a life and tells when it has ended.
    fn live(turns: &Turns, number: u8, life: impl Future<Output = ()> + Send + 'static) -> oneshot::Receiver<()> {
        let (ended, told) = oneshot::channel();
        let life = async move {
            life.await;
            let _ = ended.send(());
        };
        turns.live(payer(number), Box::pin(life));
        told
    }

    fn spin(time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {}
    }

    #[test]
    fn a_thousand_of_one_payer_have_one_turn_for_each_of_another() {
        run(async {
            const STEP: Duration = Duration::from_micros(20);
            // No other thread.
            let (turns, _returning) = Turns::new(&Everybody::new(), |_| false);
            let (steps, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
            let mut all = Vec::new();
            for _ in 0..1000 {
                let (steps, is_over) = (steps.clone(), is_over.clone());
                all.push(live(&turns, 1, async move {
                    while !is_over.load(Ordering::Relaxed) {
                        spin(STEP);
                        steps.fetch_add(1, Ordering::Relaxed);
                        yield_now().await;
                    }
                }));
            }
            let seen = steps.clone();
            let other = live(&turns, 2, async move {
                for round in 0..1000 {
                    let before = seen.load(Ordering::Relaxed);
                    yield_now().await;
                    let between = seen.load(Ordering::Relaxed) - before;
                    // The event queue wakes those who have let others pass in turn from the first and from the last.
                    let most = 2 * (TURN.as_micros() / STEP.as_micros() + 1);
                    assert!(u128::from(between) <= most, "{between} of the other's steps before turn {round}");
                }
                is_over.store(true, Ordering::Relaxed);
            });
            other.await.expect("its turns come");
            for ended in all {
                ended.await.unwrap();
            }
            assert!(steps.load(Ordering::Relaxed) > 1000, "the thousand have theirs, too");
            let calls: Vec<_> = turns.lock().values().map(|line| Arc::downgrade(&line.calls)).collect();
            assert_eq!(calls.len(), 2);
            let mut looks = tokio::time::interval(Duration::from_millis(10));
            while !turns.lock().is_empty() || calls.iter().any(|calls| calls.strong_count() > 0) {
                looks.tick().await;
            }
        });
    }

    #[test]
    fn who_takes_far_less_than_the_busiest_is_not_who_keeps_the_core_busy() {
        assert!(keeps_busy(BUSY, 0) && keeps_busy(BUSY, 2 * BUSY) && !keeps_busy(BUSY, 2 * BUSY + 1));
        assert!(keeps_busy(MODERATE, 1000) && !keeps_busy(MODERATE - 1, 1000));
        assert!(is_quiet(QUIET - 1, || 0) && !is_quiet(QUIET, || 0) && is_quiet(QUIET, || 1000));
        assert!(is_quiet(BUSY - 1, || 1000) && !is_quiet(BUSY, || 1000) && !is_quiet(BUSY - 1, || 3 * (BUSY - 1)));
    }

    #[test]
    fn beside_one_that_is_aside_a_moderate_one_stays_on_the_core() {
        run(async {
            let turns = turns();
            let here = std::thread::current().id();
            let (sender, mut places) = mpsc::unbounded_channel();
            let _busy = live(&turns, 1, async move {
                while !sender.is_closed() {
                    spin(Duration::from_micros(50));
                    let _ = sender.send(std::thread::current().id());
                    yield_now().await;
                }
            });
            // More than an eighth of a core, and less than a quarter.
            let (told, mut moderate) = mpsc::unbounded_channel();
            let began = Instant::now();
            while places.recv().await == Some(here) {
                assert!(began.elapsed() < LONG, "it keeps the core busy");
                if began.elapsed() > WATCHED && turns.lock().len() == 1 {
                    let told = told.clone();
                    let _other = live(&turns, 2, async move {
                        let mut asks = tokio::time::interval(Duration::from_millis(1));
                        asks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                        while !told.is_closed() {
                            asks.tick().await;
                            spin(Duration::from_micros(140));
                            let _ = told.send(std::thread::current().id());
                        }
                    });
                }
            }
            let [busy, line] = [1, 2].map(|number| turns.lock()[&payer(number)].clone());
            let began = Instant::now();
            while began.elapsed() < WATCHED * 10 {
                // However much else this machine has to do.
                busy.took.store(1000, Ordering::Relaxed);
                let place = moderate.recv().await;
                if place != Some(here) {
                    // Few of its turns are measured: it may have been taken for more than it is.
                    let took = line.took.load(Ordering::Relaxed);
                    assert!(took >= MODERATE, "it took {took}");
                    return;
                }
            }
            assert!(line.took.load(Ordering::Relaxed) > 0, "it was watched");
        });
    }

    #[test]
    fn who_keeps_a_core_busy_beside_another_goes_aside_until_it_does_not_and_who_is_alone_stays() {
        run(async {
            let turns = turns();
            let here = std::thread::current().id();
            let (word, is_busy) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(true)));
            let (sender, mut places) = mpsc::unbounded_channel();
            let (called, busy) = (word.clone(), is_busy.clone());
            let ended = live(&turns, 1, async move {
                while !sender.is_closed() {
                    spin(Duration::from_micros(50));
                    let _ = sender.send(std::thread::current().id());
                    if busy.load(Ordering::Relaxed) {
                        yield_now().await;
                    } else {
                        called.notified().await;
                    }
                }
            });
            let began = Instant::now();
            while began.elapsed() < WATCHED * 4 {
                assert_eq!(places.recv().await, Some(here), "nobody is beside it");
            }
            // Somebody is now, who asks little.
            let mut asks = tokio::time::interval(Duration::from_millis(1));
            let quiet = async move {
                while began.elapsed() < LONG {
                    asks.tick().await;
                }
            };
            let _other = live(&turns, 2, quiet);
            while places.recv().await == Some(here) {}
            is_busy.store(false, Ordering::Relaxed);
            // It comes back where it asks little, too.
            let mut asks = tokio::time::interval(Duration::from_millis(20));
            loop {
                word.notify_one();
                asks.tick().await;
                let last = std::iter::from_fn(|| places.try_recv().ok()).last();
                if last == Some(here) {
                    break;
                }
            }
            drop(places);
            word.notify_one();
            ended.await.unwrap();
        });
    }

    #[test]
    fn one_that_panics_takes_nobody_with_it() {
        run(async {
            let turns = turns();
            let notify = Arc::new(Notify::new());
            let waits = live(&turns, 1, {
                let notify = notify.clone();
                async move { notify.notified().await }
            });
            let panics = live(&turns, 1, async { panic!("on purpose") });
            assert!(panics.await.is_err(), "it is dropped");
            notify.notify_one();
            waits.await.unwrap();
        });
    }

    #[test]
    fn another_thread_may_wake_one_also_after_its_end() {
        run(async {
            let turns = turns();
            let (sender, word) = oneshot::channel();
            let waker = Arc::new(Mutex::new(None));
            let kept = waker.clone();
            let waits = live(&turns, 1, async move {
                poll_fn(|context| {
                    *kept.lock().unwrap() = Some(context.waker().clone());
                    Poll::Ready(())
                })
                .await;
                word.await.unwrap();
            });
            yield_now().await;
            std::thread::spawn(move || sender.send(()).unwrap()).join().unwrap();
            waits.await.unwrap();
            // Its number is another's now.
            let (sender, word) = oneshot::channel::<()>();
            let next = live(&turns, 1, async move { drop(word.await) });
            waker.lock().unwrap().take().map(Waker::wake).unwrap();
            yield_now().await;
            drop(sender);
            next.await.unwrap();
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whoever pays, waits for itself or for another, and whenever: all come to their end.
        #[test]
        fn nobody_who_is_called_is_left(lives in prop::collection::vec((0_u8..4, 0_usize..5, any::<prop::sample::Index>()), 1..40)) {
            run(async move {
                let turns = turns();
                let calls: Arc<Vec<Notify>> = Arc::new(lives.iter().map(|_| Notify::new()).collect());
                let mut all = Vec::new();
                for (number, (payer, rounds, other)) in lives.iter().cloned().enumerate() {
                    let (calls, other) = (calls.clone(), other.index(lives.len()));
                    all.push(live(&turns, payer, async move {
                        for _ in 0..rounds {
                            yield_now().await;
                        }
                        // Each calls its neighbour, and so all are called; and somebody else besides.
                        calls[other].notify_waiters();
                        calls[(number + 1) % calls.len()].notify_one();
                        calls[number].notified().await;
                    }));
                }
                for ended in all {
                    ended.await.unwrap();
                }
            });
        }
    }
}
