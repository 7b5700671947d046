//! Work that takes long, on threads of its own: the public-key cryptography of handshakes.
//!
//! A step of a handshake takes up to a third of a millisecond, in which a core would carry nobody's bytes. So it is done by
//! other threads, which the kernel lets the cores interrupt ([`this_may_wait`]), and whoever asks for many of them has one in
//! turn with each of the others who ask (T18).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use crate::reasons::EndedEarly;
use crate::shares::Payer;

/// How far these threads stand behind the cores (setpriority(2)): they get a third of a core's weight.
const NICENESS: i32 = 5;

/// Lets the calling thread stand behind those that carry bytes.
pub(crate) fn this_may_wait() {
    if let Err(error) = linux::privileges::be_nice(NICENESS) {
        tracing::warn!(%error, "handshakes are not kept behind what is open");
    }
}

/// Who has a place at work, and who waits for one.
#[derive(Clone, Debug)]
pub(crate) struct Offload(Arc<Mutex<Places>>);

#[derive(Debug)]
struct Places {
    free: usize,
    waiting: HashMap<Payer, VecDeque<oneshot::Sender<Place>>>,
    /// Those who wait, in the order of their turns.
    turns: VecDeque<Payer>,
}

/// A place at work; dropping it gives it to who is next.
#[derive(Debug)]
struct Place(Offload);

impl Offload {
    /// So many pieces of work may be under way at once.
    pub(crate) fn new(places: usize) -> Self {
        let (waiting, turns) = (HashMap::new(), VecDeque::new());
        Self(Arc::new(Mutex::new(Places { free: places.max(1), waiting, turns })))
    }

    /// Does something on another thread, when it is the turn of whoever pays for it. What has begun is done to its end, also
    /// when nobody waits for it any more.
    ///
    /// # Errors
    /// The work has panicked, or the process ends.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        payer: &Payer,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, EndedEarly> {
        let place = self.place(payer).await.ok_or(EndedEarly::System("offload"))?;
        let done = spawn_blocking(move || {
            let done = work();
            drop(place);
            done
        });
        done.await.map_err(|_| EndedEarly::System("offload"))
    }

    async fn place(&self, payer: &Payer) -> Option<Place> {
        let turn = {
            let mut places = self.lock();
            if places.free > 0 {
                places.free -= 1;
                return Some(Place(self.clone()));
            }
            places.wait(&payer.clone().in_turn())
        };
        turn.await.ok()
    }

    /// Gives a place that has become free to who is next.
    fn pass_on(&self) {
        // One that has given up meanwhile drops it, which comes here again.
        let next = self.lock().next();
        if let Some(next) = next {
            let _ = next.send(Place(self.clone()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    fn wait(&mut self, payer: &Payer) -> oneshot::Receiver<Place> {
        let (sender, turn) = oneshot::channel();
        match self.waiting.get_mut(payer) {
            Some(line) => {
                // Those who have given up are nobody to keep.
                if line.len() == line.capacity() {
                    line.retain(|other| !other.is_closed());
                }
                line.push_back(sender);
            }
            None => {
                self.waiting.insert(payer.clone(), VecDeque::from([sender]));
                self.turns.push_back(payer.clone());
            }
        }
        turn
    }

    /// Who is next; where nobody waits there is a place more.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        while let Some(payer) = self.turns.pop_front() {
            let Some(line) = self.waiting.get_mut(&payer) else { continue };
            let next = std::iter::from_fn(|| line.pop_front()).find(|next| !next.is_closed());
            if line.is_empty() {
                self.waiting.remove(&payer);
            } else {
                self.turns.push_back(payer);
            }
            if next.is_some() {
                return next;
            }
        }
        self.free += 1;
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    fn payer(number: u8) -> Payer {
        Payer::Known(IpAddr::from([10, 0, 0, number]))
    }

    /// Whoever waits, and whether it has its place.
    fn stand(offload: &Offload, number: u8) -> oneshot::Receiver<Place> {
        offload.lock().wait(&payer(number))
    }

    #[tokio::test]
    async fn work_is_done_elsewhere_and_a_panic_costs_nobody_else_a_place() {
        let offload = Offload::new(1);
        let here = std::thread::current().id();
        let elsewhere = offload.run(&payer(1), || std::thread::current().id()).await.unwrap();
        assert_ne!(here, elsewhere);
        let panicked: Result<(), _> = offload.run(&payer(1), || panic!("on purpose")).await;
        assert_eq!(panicked.unwrap_err(), EndedEarly::System("offload"));
        assert_eq!(offload.run(&payer(2), || 7).await.unwrap(), 7);
        assert_eq!(offload.lock().free, 1);
    }

    #[tokio::test]
    async fn who_asks_for_much_has_one_turn_for_each_of_the_others() {
        let offload = Offload::new(1);
        let held = offload.place(&payer(9)).await.unwrap();
        let mut many: Vec<_> = (0..100).map(|_| stand(&offload, 1)).collect();
        let mut few: Vec<_> = (2..4).map(|number| stand(&offload, number)).collect();
        drop(held);
        // The first place was asked for first. Each of the others has had one before the second.
        drop(many[0].try_recv().unwrap());
        for one in &mut few {
            drop(one.try_recv().unwrap());
        }
        let second = many[1].try_recv().unwrap();
        assert!(many[2].try_recv().is_err());
        drop(second);
    }

    #[tokio::test]
    async fn who_gives_up_is_passed_over_and_forgotten() {
        let offload = Offload::new(1);
        let held = offload.place(&payer(9)).await.unwrap();
        for _ in 0..10_000 {
            drop(stand(&offload, 1));
        }
        assert!(offload.lock().waiting[&payer(1)].len() < 100);
        let mut last = stand(&offload, 1);
        drop(held);
        drop(last.try_recv().unwrap());
        let places = offload.lock();
        assert!(places.free == 1 && places.waiting.is_empty() && places.turns.is_empty(), "{places:?}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask(u8),
        GiveUp(usize),
        Finish(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0_u8..4).prop_map(Step::Ask),
            1 => any::<usize>().prop_map(Step::GiveUp),
            2 => any::<usize>().prop_map(Step::Finish),
        ]
    }

    proptest! {
        /// However they come, give up and finish: never more at work than there are places, none idle while somebody waits, and
        /// whoever waits sees no other payer served twice more than itself.
        #[test]
        fn places_are_neither_lost_nor_made_and_turns_are_fair(
            count in 1_usize..4,
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let offload = Offload::new(count);
            let (mut working, mut waiting) = (Vec::new(), Vec::new());
            // For each payer that waits, whom it has seen served since it began to.
            let mut seen: HashMap<u8, Vec<u8>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Ask(number) => {
                        let mut places = offload.lock();
                        if places.free > 0 {
                            places.free -= 1;
                            drop(places);
                            working.push(Place(offload.clone()));
                        } else {
                            waiting.push((number, places.wait(&payer(number))));
                        }
                    }
                    Step::GiveUp(which) if !waiting.is_empty() => drop(waiting.swap_remove(which % waiting.len())),
                    Step::Finish(which) if !working.is_empty() => drop(working.swap_remove(which % working.len())),
                    Step::GiveUp(_) | Step::Finish(_) => {}
                }
                let mut still = Vec::new();
                let mut served = Vec::new();
                for (number, mut turn) in waiting.drain(..) {
                    match turn.try_recv() {
                        Ok(place) => {
                            served.push(number);
                            working.push(place);
                        }
                        Err(_) => still.push((number, turn)),
                    }
                }
                waiting = still;
                let wait: BTreeSet<u8> = waiting.iter().map(|(number, _)| *number).collect();
                seen.retain(|number, _| wait.contains(number) && !served.contains(number));
                for number in &wait {
                    let others = seen.entry(*number).or_default();
                    others.extend(&served);
                    for other in 0..4 {
                        let times = others.iter().filter(|it| **it == other).count();
                        prop_assert!(times <= 1, "{number} waits while {other} is served {times} times");
                    }
                }
                prop_assert!(working.len() <= count);
                prop_assert!(waiting.is_empty() || working.len() == count, "a place is idle while somebody waits");
            }
            waiting.clear();
            working.clear();
            let places = offload.lock();
            prop_assert_eq!((places.free, places.waiting.len(), places.turns.len()), (count, 0, 0));
        }
    }
}
