//! Pods that run, are to be captured, and are not, or not as they must be: what people are told where they look for a pod.

use std::collections::{BTreeMap, BTreeSet};

use mesh::PodUid;
use wire::report::CaptureFailure;

use super::{Pod, Pods, Stage};
use crate::failure::Failure;

/// What is wrong with a pod that runs by the runtime's word, and whose namespace cannot be had.
const RUNS: [CaptureFailure; 2] = [CaptureFailure::NoNamespace, CaptureFailure::AmbiguousNamespace];

impl Pods {
    /// The runtime has sandboxes of these pods and of no others.
    pub(crate) fn listed(&mut self, all: &BTreeSet<PodUid>) {
        let gone = self.pods.iter_mut().filter(|(uid, pod)| pod.sandbox.is_none() && !all.contains(*uid));
        gone.for_each(|(_, pod)| pod.runs_no_more());
    }

    /// Those pods, each with the reason as it is now, also of what is only late. A pod that is being started is none of them: its
    /// runtime is told, and says so itself. Nor is one that could not be, until the runtime deletes it or tries again.
    pub(crate) fn failing(&self) -> BTreeMap<PodUid, CaptureFailure> {
        let failing = self.pods.iter().filter(|(_, pod)| pod.known.as_ref().is_some_and(|known| known.capture.is_ok()));
        failing.filter_map(|(uid, pod)| Some((uid.clone(), self.why(pod)?))).collect()
    }

    /// A look at a pod's capture found that it is not what was made, and could not make it anew; or that it stands again.
    /// Whether that is news.
    pub(crate) fn damaged(&mut self, uid: &PodUid, damage: Option<Failure>) -> bool {
        let Some(sandbox) = self.pods.get_mut(uid).and_then(|pod| pod.sandbox.as_mut()) else { return false };
        std::mem::replace(&mut sandbox.damage, damage) != sandbox.damage
    }

    fn why(&self, pod: &Pod) -> Option<CaptureFailure> {
        let failure = pod.failure.as_ref().map(Failure::name);
        let Some(sandbox) = &pod.sandbox else {
            // After anything else it has no sandbox there either.
            return failure.filter(|failure| RUNS.contains(failure));
        };
        if sandbox.starting {
            return None;
        }
        match &sandbox.stage {
            Stage::Captured => sandbox.damage.as_ref().map(Failure::name),
            Stage::Found | Stage::Leaving(_) => None,
            Stage::Offered { ready: false } if !self.proxy => Some(CaptureFailure::NoProxy),
            Stage::Offered { ready: false } => Some(CaptureFailure::ProxyNotReady),
            // While it is tried again what went wrong before is how things are.
            Stage::Bare
            | Stage::Looking(_)
            | Stage::Preparing(_)
            | Stage::Offered { ready: true }
            | Stage::Beginning(_) => failure,
        }
    }
}

impl Pod {
    /// The runtime has no sandbox of it any more, and what was wrong with that one's namespace is over.
    pub(super) fn runs_no_more(&mut self) {
        self.failure.take_if(|failure| RUNS.contains(&failure.name()));
    }
}
