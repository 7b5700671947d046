//! Pods that run, are to be captured, and are not: what people are told where they look for a pod.

use std::collections::BTreeMap;

use mesh::PodUid;
use wire::report::CaptureFailure;

use super::{Pod, Pods, Stage};
use crate::failure::Failure;

impl Pods {
    /// Those pods, each with the reason as it is now, also of what is only late. A pod that is being started is none of them: its
    /// runtime is told, and says so itself.
    pub(crate) fn failing(&self) -> BTreeMap<PodUid, CaptureFailure> {
        let failing = self.pods.iter().filter(|(_, pod)| pod.known.as_ref().is_some_and(|known| known.capture.is_ok()));
        failing.filter_map(|(uid, pod)| Some((uid.clone(), self.why(pod)?))).collect()
    }

    fn why(&self, pod: &Pod) -> Option<CaptureFailure> {
        let failure = pod.failure.as_ref().map(Failure::name);
        let Some(sandbox) = &pod.sandbox else {
            // By the runtime's word it runs, and its namespace cannot be had. After anything else it has no sandbox there either.
            let runs = [CaptureFailure::NoNamespace, CaptureFailure::AmbiguousNamespace];
            return failure.filter(|failure| runs.contains(failure));
        };
        if !sandbox.waiting.is_empty() {
            return None;
        }
        match &sandbox.stage {
            Stage::Captured | Stage::Leaving(_) => None,
            Stage::Offered { ready: false } if !self.proxy => Some(CaptureFailure::NoProxy),
            Stage::Offered { ready: false } => Some(CaptureFailure::ProxyNotReady),
            // While it is tried again what went wrong before is how things are.
            Stage::Bare | Stage::Preparing(_) | Stage::Offered { ready: true } | Stage::Beginning(_) => failure,
        }
    }
}
