//! What the control plane is asked about: addresses in the cluster's ranges that the view does not know (T31).
//!
//! A large mesh is not told to every node. Whoever meets an unknown address asks, and waits for the view to change; the answer
//! comes with it, and so does the word that nothing has the address, until something has it.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh::View;
use tokio::sync::Notify;

/// Questions that may wait for an answer. Who asks more waits for the view all the same, and in vain.
const MAX_OPEN: usize = 1024;

/// Addresses that are remembered to be nobody's; the oldest is forgotten first, and asked about again.
const MAX_NOBODYS: usize = 1024;

/// What to tell the control plane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tell {
    /// What has this address?
    Ask(IpAddr),
    /// Nobody here wants to know any more when something gets it.
    Forget(IpAddr),
}

/// The questions of a node.
#[derive(Default, Debug)]
pub(crate) struct Questions {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Default, Debug)]
struct State {
    /// Asked, and not answered.
    open: BTreeSet<IpAddr>,
    /// Answered: nothing has them. Oldest first.
    nobodys: VecDeque<IpAddr>,
    /// To be told to the control plane, in order. No longer than `open` and `nobodys` together: see [`Questions::next`].
    unsaid: VecDeque<Tell>,
    connected: bool,
}

impl Questions {
    /// Asks about an address, unless somebody did. Whether an answer is under way: not where too much is asked, nor while
    /// there is no control plane to answer.
    pub(crate) fn ask(&self, address: IpAddr) -> bool {
        let mut state = self.lock();
        if !state.open.contains(&address) {
            if state.open.len() >= MAX_OPEN {
                return false;
            }
            state.open.insert(address);
            if state.connected {
                state.unsaid.push_back(Tell::Ask(address));
                self.news.notify_one();
            }
        }
        state.connected
    }

    /// Whether an answer about an address is under way.
    pub(crate) fn is_open(&self, address: IpAddr) -> bool {
        let state = self.lock();
        state.connected && state.open.contains(&address)
    }

    /// A stream begins: what is open is asked once more, and so is what was nobody's. The view is to take that for unknown
    /// until it is answered: who had nothing before may have something now.
    pub(crate) fn connected(&self) -> Vec<IpAddr> {
        let mut state = self.lock();
        let nobodys: Vec<IpAddr> = std::mem::take(&mut state.nobodys).into();
        state.open.extend(&nobodys);
        state.unsaid = state.open.iter().copied().map(Tell::Ask).collect();
        state.connected = true;
        self.news.notify_one();
        nobodys
    }

    /// The stream is gone, and nothing is answered.
    pub(crate) fn lost(&self) {
        let mut state = self.lock();
        state.connected = false;
        state.unsaid.clear();
    }

    /// What to tell the control plane next. Cancel safe.
    pub(crate) async fn next(&self) -> Tell {
        loop {
            if let Some(tell) = self.lock().unsaid.pop_front() {
                return tell;
            }
            self.news.notified().await;
        }
    }

    /// Takes in that something has these addresses. Call it with the view in hand that learns of it, so that whoever finds the
    /// question answered finds the answer.
    pub(crate) fn found(&self, addresses: &[IpAddr]) {
        let mut state = self.lock();
        for address in addresses {
            if !state.open.remove(address) && !state.nobodys.is_empty() {
                state.nobodys.retain(|nobodys| nobodys != address);
            }
        }
    }

    /// Takes in that nothing has an address, as [`Questions::found`].
    pub(crate) fn nobody(&self, view: &mut View, address: IpAddr) {
        let mut state = self.lock();
        // What was not asked is no answer: it could fill the memory.
        if !state.open.remove(&address) {
            return;
        }
        view.set_nobodys(address);
        state.nobodys.push_back(address);
        if state.nobodys.len() > MAX_NOBODYS
            && let Some(oldest) = state.nobodys.pop_front()
        {
            view.forget_nobodys(oldest);
            state.unsaid.push_back(Tell::Forget(oldest));
            self.news.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4((0x0a58_0000 + number).into())
    }

    #[tokio::test]
    async fn a_question_is_said_once_and_again_on_the_next_stream() {
        let questions = Questions::default();
        assert!(!questions.ask(address(1)) && !questions.is_open(address(1)), "there is nobody to answer");
        assert!(questions.connected().is_empty());
        assert!(questions.ask(address(1)) && questions.ask(address(2)));
        assert_eq!([questions.next().await, questions.next().await], [1, 2].map(|n| Tell::Ask(address(n))));
        let mut view = View::default();
        questions.nobody(&mut view, address(1));
        questions.nobody(&mut view, address(7));
        assert!(view.is_nobodys(address(1)) && !view.is_nobodys(address(7)), "nobody asked about the second one");
        assert!(!questions.is_open(address(1)) && questions.is_open(address(2)));
        questions.lost();
        assert!(!questions.is_open(address(2)));
        assert_eq!(questions.connected(), [address(1)]);
        assert_eq!([questions.next().await, questions.next().await], [1, 2].map(|n| Tell::Ask(address(n))));
        questions.found(&[address(1), address(2)]);
        assert!(!questions.is_open(address(1)) && !questions.is_open(address(2)));
    }

    #[tokio::test]
    async fn all_that_is_kept_is_bounded() {
        let questions = Questions::default();
        questions.connected();
        let most = u32::try_from(MAX_OPEN).unwrap();
        assert!((0..most).all(|number| questions.ask(address(number))));
        assert!(!questions.ask(address(most)) && questions.ask(address(0)));
        let mut view = View::default();
        for number in 0..=most {
            if number == most {
                assert!(questions.ask(address(number)));
            }
            questions.nobody(&mut view, address(number));
        }
        assert!(!view.is_nobodys(address(0)) && (1..=most).all(|number| view.is_nobodys(address(number))));
        let mut told = Vec::new();
        while told.last() != Some(&Tell::Forget(address(0))) {
            told.push(questions.next().await);
        }
        assert_eq!(told.len(), MAX_OPEN + 2, "each question, and the oldest answer forgotten");
    }
}
