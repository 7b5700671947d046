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

    /// Nobody serves what pods that leave have open when this process ends, and nobody looks after their rules: connections are
    /// ended, and rules go. Pods that do not leave keep theirs, and say nothing in clear.
    pub(crate) async fn end_leaving(&self) {
        let leaving = self.captures.iter().filter(|(pod, _)| self.pods.is_leaving(pod));
        let cuts: Vec<_> = leaving
            .map(|(pod, captured)| {
                let capture = captured.capture.clone();
                let cut = tokio::task::spawn_blocking(move || {
                    let mut capture = lock(&capture);
                    capture.is_draining().then(|| capture.cut_short())
                });
                (pod, cut)
            })
            .collect();
        for (pod, cut) in cuts {
            match cut.await {
                Ok(Some(Ok(ended))) => {
                    let how = format!("its rules are gone, and {ended} connections that were open");
                    self.shown.journal.change("left", pod.as_str(), &how);
                }
                Ok(Some(Err(error))) => self.shown.journal.problem("not-left", pod.as_str(), &error.to_string()),
                // It is not let go yet, and keeps its rules.
                Ok(None) | Err(_) => {}
            }
        }
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
