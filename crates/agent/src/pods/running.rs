//! Pods that run already, by the container runtime's word: found, checked, and let go when their sandboxes are gone.

use std::collections::BTreeSet;

use mesh::{PodUid, Uncaptured};
use wire::discovery::NodePod;
use wire::pods::CniResult;

use super::{Action, Pod, Pods, Sandbox, Stage, failed, note};
use crate::failure::Failure;
use crate::pods::Request;

/// A pod whose sandbox the runtime has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    /// metadata.uid.
    pub(crate) pod: PodUid,
    /// `namespace/name`.
    pub(crate) name: String,
    /// The runtime's name for the sandbox.
    pub(crate) container: String,
}

impl Pods {
    /// The pods of whose sandbox nothing is known. Those among them that are not to be captured are to be looked at.
    pub(crate) fn wanted(&self) -> BTreeSet<PodUid> {
        self.pods.iter().filter(|(_, pod)| is_wanted(pod)).map(|(uid, _)| uid.clone()).collect()
    }

    /// Whether a pod is one of [`Pods::wanted`].
    pub(crate) fn wants(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(is_wanted)
    }

    /// Whether a pod is to be captured.
    pub(crate) fn is_to_be_captured(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(is_to_be_captured)
    }

    /// The runtime has a pod's sandbox, in this namespace, and nobody waits for it. The namespace is to be held open if
    /// [`Pods::holds`] says so afterwards.
    pub(crate) fn find(&mut self, running: &Running, namespace: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        let uid = &running.pod;
        let holder = self.holder(namespace).filter(|other| *other != uid).cloned();
        let Some(pod) = self.pods.get_mut(uid) else { return actions };
        if pod.known.is_none() || pod.sandbox.is_some() {
            return actions;
        }
        if let Some(other) = holder {
            let failure = Failure::Ambiguous { inode: namespace, other };
            note(pod, uid, failure, &mut actions);
            return actions;
        }
        let container = running.container.clone();
        pod.sandbox = Some(Sandbox { container, ..Sandbox::new(namespace, running.name.clone()) });
        self.advance(uid, &mut actions);
        actions
    }

    /// The runtime has a pod's sandbox, and its namespace cannot be found.
    pub(crate) fn unfound(&mut self, uid: &PodUid, sentence: String) -> Vec<Action> {
        let mut actions = Vec::new();
        // Of a pod that is not to be captured nobody would do anything about it.
        if let Some(pod) = self.pods.get_mut(uid).filter(|pod| pod.sandbox.is_none() && is_to_be_captured(pod)) {
            note(pod, uid, Failure::NoNamespace(sentence), &mut actions);
        }
        actions
    }

    /// Whether a runtime that asks gets an answer other than that somebody is missing.
    pub(crate) fn answers(&self) -> bool {
        self.complete && self.proxy
    }

    /// The pods that have a sandbox here for which nobody waits.
    pub(crate) fn present(&self) -> BTreeSet<PodUid> {
        let present = |pod: &Pod| pod.sandbox.as_ref().is_some_and(|sandbox| sandbox.waiting.is_empty());
        self.pods.iter().filter(|(_, pod)| present(pod)).map(|(uid, _)| uid.clone()).collect()
    }

    /// The runtime has no sandbox of this pod any more, and nobody has said so (T42).
    pub(crate) fn vanished(&mut self, uid: &PodUid) -> Vec<Action> {
        let mut actions = Vec::new();
        self.leave(uid, &mut actions);
        actions
    }

    /// The runtime asks whether a pod is as it is to be.
    pub(crate) fn check(&mut self, request: Request, uid: &PodUid) -> Vec<Action> {
        let answer = match self.pods.get(uid).map(|pod| (&pod.known, &pod.sandbox)) {
            Some((_, Some(Sandbox { stage: Stage::Captured, .. }))) => CniResult::Captured,
            Some((Some(NodePod { capture: Err(why), .. }), _)) => CniResult::NotCaptured(why.in_clear().to_string()),
            Some((known, Some(sandbox))) => {
                let failure = if known.is_some() { Failure::NotReady } else { Failure::Unknown };
                failed(&sandbox.name, &failure)
            }
            Some((_, None)) | None => failed(uid.as_str(), &Failure::SandboxGone),
        };
        vec![Action::Answer(request, answer)]
    }

    /// Whether the runtime means another sandbox of the pod than the one that is here: an old one, that goes when the pod
    /// has a new one already.
    pub(super) fn means_another(&self, uid: &PodUid, container: &str) -> bool {
        let here = self.pods.get(uid).and_then(|pod| pod.sandbox.as_ref()).map_or("", |sandbox| &sandbox.container);
        !here.is_empty() && !container.is_empty() && here != container
    }
}

fn is_wanted(pod: &Pod) -> bool {
    // Its node's network is not a pod's own.
    let may_be = |known: &NodePod| known.capture != Err(Uncaptured::HostNetwork);
    pod.sandbox.is_none() && pod.known.as_ref().is_some_and(may_be)
}

fn is_to_be_captured(pod: &Pod) -> bool {
    pod.known.as_ref().is_some_and(|known| known.capture.is_ok())
}
