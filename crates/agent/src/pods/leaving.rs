//! A captured pod that is let go while it runs (T4, T47).
//!
//! The control plane takes it back from its peers first, and releases it when they know. From then on nothing new is captured.
//! What was captured goes on, and needs rules, listeners and proxy until its end; the pod is looked at once a second, and when
//! nothing is left everything goes. If it is to be captured again meanwhile the whole rules come back in one batch, once its proxy
//! can prove again who it is.

use mesh::PodUid;
use wire::pods::CniResult;

use super::{Action, Pod, Pods, Stage, Work, answer_all, note, withdraw};
use crate::failure::Failure;

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    /// It is being let go, or looked at.
    pub(super) look: Option<Work>,
    /// It is to be captured again, and this says whether its proxy is ready for that.
    pub(super) back: Option<bool>,
}

impl Pods {
    /// Begins to let a captured pod go, if it is released. From here on it is not reported.
    pub(super) fn may_leave(&mut self, uid: &PodUid, actions: &mut Vec<Action>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let Some(sandbox) = &mut pod.sandbox else { return };
        if pod.named && pod.known.as_ref().is_some_and(|known| known.release) {
            sandbox.stage = Stage::Leaving(Leaving::default());
            self.leaves(uid, actions);
        }
    }

    /// The next step of a pod that leaves. None before the control plane has spoken of it, where an agent before this one had
    /// begun: who holds its listeners does not know what it is to be.
    pub(super) fn leaves(&mut self, uid: &PodUid, actions: &mut Vec<Action>) {
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let (Some(known), Some(sandbox)) = (pod.known.as_ref().filter(|_| pod.named), &mut pod.sandbox) else { return };
        let Stage::Leaving(leaving) = &mut sandbox.stage else { return };
        // It is withdrawn, and goes on from the beginning when the look has ended.
        if leaving.look.as_ref().is_some_and(|look| look.cancelled) {
            return;
        }
        match (known.capture, &mut leaving.back) {
            (Err(why), back) => {
                *back = None;
                if leaving.look.is_none() {
                    self.attempts += 1;
                    leaving.look = Some(Work::new(self.attempts));
                    actions.push(Action::Leave { pod: uid.clone(), attempt: self.attempts });
                }
                answer_all(pod, actions, |_| CniResult::NotCaptured(why.in_clear().to_string()));
            }
            (Ok(()), back @ None) => {
                *back = Some(false);
                actions.push(Action::Offer(known.clone()));
            }
            (Ok(()), Some(true)) if leaving.look.is_none() => {
                self.attempts += 1;
                sandbox.stage = Stage::Beginning(Work { leaving: true, ..Work::new(self.attempts) });
                actions.push(Action::Begin { pod: uid.clone(), attempt: self.attempts });
            }
            (Ok(()), Some(_)) => {}
        }
    }

    /// Whether a pod leaves, and is not to be captured again.
    pub(crate) fn is_leaving(&self, uid: &PodUid) -> bool {
        let sandbox = self.pods.get(uid).and_then(|pod| pod.sandbox.as_ref());
        sandbox.is_some_and(|sandbox| matches!(sandbox.stage, Stage::Leaving(Leaving { back: None, .. })))
    }

    /// The pods whose rules stand, those among them that leave.
    pub(crate) fn standing(&self) -> impl Iterator<Item = &PodUid> {
        let stands = |pod: &Pod| {
            pod.sandbox
                .as_ref()
                .is_some_and(|it| matches!(it.stage, Stage::Found | Stage::Captured | Stage::Leaving(_)))
        };
        self.pods.iter().filter(move |(_, pod)| stands(pod)).map(|(uid, _)| uid)
    }

    /// A pod that leaves was looked at. `true`: nothing of it was left, and everything is taken away.
    pub(crate) fn left(&mut self, uid: &PodUid, attempt: u64, outcome: Result<bool, Failure>) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(pod) = self.pods.get_mut(uid) else { return actions };
        let Some(sandbox) = &mut pod.sandbox else { return actions };
        let Stage::Leaving(leaving) = &mut sandbox.stage else { return actions };
        let Some(look) = leaving.look.take_if(|look| look.attempt == attempt) else { return actions };
        match outcome {
            // It is withdrawn already.
            _ if look.cancelled => {
                sandbox.stage = Stage::Bare;
                self.advance(uid, &mut actions);
            }
            Ok(true) => {
                withdraw(sandbox, uid, &mut actions);
                // There is nothing that could be found.
                (sandbox.inherited, sandbox.found) = (false, Some(false));
                pod.failure = None;
                self.advance(uid, &mut actions);
            }
            // The next look comes by itself, unless it is to come back.
            Ok(false) if leaving.back.is_none() => {}
            Ok(false) => self.advance(uid, &mut actions),
            Err(failure) => note(pod, uid, failure, &mut actions),
        }
        actions
    }
}
