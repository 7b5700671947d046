//! Pods that are let go while they run, as the node does it.

use mesh::PodUid;

use super::{Node, lock};
use crate::failure::Failure;
use crate::process::Event;

impl Node {
    /// The next step of letting a pod go; its result is an event.
    pub(super) fn leave(&self, pod: PodUid, attempt: u64) {
        let Some(capture) = self.captures.get(&pod).map(|captured| captured.capture.clone()) else { return };
        self.blocking(move || {
            let outcome = lock(&capture).leave().map_err(Failure::from);
            Event::Left(pod, attempt, outcome)
        });
    }

    /// A pod that leaves was looked at; `true`: its rules are gone, as nothing of it was left.
    pub(crate) fn left(&mut self, pod: &PodUid, attempt: u64, outcome: Result<bool, Failure>) {
        if outcome == Ok(true) {
            self.shown.journal.change("left", pod.as_str(), "its rules are gone");
        }
        let actions = self.pods.left(pod, attempt, outcome);
        self.act(actions);
    }
}
