//! A line: all connections of one payer on one core, and which of them have something to do.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

use super::{Life, lock};
use crate::shares::Payer;

/// All of one payer on this core.
pub(super) struct Line {
    /// Who pays for them.
    pub(super) payer: Payer,
    /// By number. One that is being polled is not in its place.
    lives: Mutex<Slab<Option<Life>>>,
    /// Who is called.
    pub(super) calls: Arc<Mutex<Calls>>,
    /// When it had its last turn, in milliseconds (of [`super::Everybody`]).
    pub(super) last: AtomicU64,
    /// The part of a processor that it took while it was last watched, in thousandths.
    pub(super) took: AtomicU64,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("payer", &self.payer).field("calls", &self.calls).finish_non_exhaustive()
    }
}

/// Who of a line has something to do. Whoever calls them may be on another thread.
#[derive(Default, Debug)]
pub(super) struct Calls {
    numbers: VecDeque<Arc<Number>>,
    /// The line's task, while it waits for a call.
    asleep: Option<Waker>,
}

/// A place in a line.
#[derive(Debug)]
pub(super) struct Number {
    number: usize,
    /// It stands among the calls.
    is_called: AtomicBool,
    /// It may stand among these itself, and is kept by whoever may call it.
    calls: Weak<Mutex<Calls>>,
}

impl Wake for Number {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_called.swap(true, Ordering::AcqRel)
            && let Some(calls) = self.calls.upgrade()
        {
            let mut calls = lock(&calls);
            calls.numbers.push_back(self.clone());
            let asleep = calls.asleep.take();
            drop(calls);
            if let Some(line) = asleep {
                line.wake();
            }
        }
    }
}

impl Line {
    /// Nobody yet.
    pub(super) fn new(payer: Payer) -> Self {
        Self { payer, lives: Mutex::default(), calls: Arc::default(), last: AtomicU64::new(0), took: AtomicU64::new(0) }
    }

    /// Puts a life at its end.
    pub(super) fn join(&self, life: Life) {
        let number = lock(&self.lives).insert(Some(life));
        Arc::new(Number { number, is_called: AtomicBool::new(false), calls: Arc::downgrade(&self.calls) }).wake();
    }

    /// Whether nobody is in it.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.lives).is_empty()
    }

    /// Waits for who has something to do.
    pub(super) async fn next(&self) -> Arc<Number> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// The same, without a wait.
    pub(super) fn next_now(&self) -> Option<Arc<Number>> {
        lock(&self.calls).numbers.pop_front()
    }

    fn poll_next(&self, context: &mut Context<'_>) -> Poll<Arc<Number>> {
        let mut calls = lock(&self.calls);
        match calls.numbers.pop_front() {
            Some(number) => Poll::Ready(number),
            None => {
                calls.asleep = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Lets one live until it waits. Who has ended may be called still, and whoever has its number since looks in vain.
    pub(super) fn step(&self, number: &Arc<Number>) {
        let life = lock(&self.lives).get_mut(number.number).and_then(mem::take);
        let Some(mut life) = life else { return };
        // Before: a call that comes meanwhile is not to be lost.
        number.is_called.store(false, Ordering::Release);
        let waker = Waker::from(number.clone());
        let step = || life.as_mut().poll(&mut Context::from_waker(&waker));
        // One that panics must not take the others of its line with it. What it was doing is dropped, and looked at by nobody.
        match catch_unwind(AssertUnwindSafe(step)) {
            Ok(Poll::Pending) => {
                if let Some(place) = lock(&self.lives).get_mut(number.number) {
                    *place = Some(life);
                }
            }
            Ok(Poll::Ready(())) | Err(_) => {
                lock(&self.lives).try_remove(number.number);
            }
        }
    }
}
