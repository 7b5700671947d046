//! How far the capture of a pod is.

use super::leaving::Leaving;

/// What was there when listeners and routing were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// No rules yet.
    Bare,
    /// Those of the agent before, which were read and are right.
    Captured,
    /// Those that capture nothing new: the agent before was letting the pod go.
    Leaving,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing is made.
    Bare,
    /// Whether rules stand in it is being looked at, by this attempt.
    Looking(u64),
    /// Rules of an agent that is gone lead to listeners that were made anew, in a pod that is not to be captured. Until it is
    /// released it is reported, as its peers are to know first.
    Found,
    /// Listeners are being made.
    Preparing(Work),
    /// The proxy may have the listeners. `ready`: it has, and can prove who the pod is.
    Offered { ready: bool },
    /// Rules are being loaded.
    Beginning(Work),
    /// The rules were read back.
    Captured,
    /// Nothing new is captured; what was goes on.
    Leaving(Leaving),
}

/// Something that another thread does meanwhile.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) attempt: u64,
    /// Its result is not wanted any more. Nothing new begins in the same namespace before it has ended.
    pub(super) cancelled: bool,
    /// What stands, should it fail, are the rules of a pod that leaves.
    pub(super) leaving: bool,
}

impl Work {
    pub(super) fn new(attempt: u64) -> Self {
        Self { attempt, cancelled: false, leaving: false }
    }
}

/// Whether there are rules that lead to the proxy, or may be.
pub(super) fn stands(stage: &Stage) -> bool {
    matches!(stage, Stage::Found | Stage::Beginning(_) | Stage::Captured | Stage::Leaving(_))
}

/// There is no proxy, or a new one: it has to say that it is ready.
pub(super) fn unready(stage: &mut Stage) {
    if let Stage::Offered { ready } | Stage::Leaving(Leaving { back: Some(ready), .. }) = stage {
        *ready = false;
    }
}
