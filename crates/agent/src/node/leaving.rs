//! Pods that are let go while they run, as the node does it.

use linux::netns::NetNs;
use mesh::PodUid;

use super::{Node, lock};
use crate::capture;
use crate::failure::Failure;
use crate::process::Event;

impl Node {
    /// Looks whether rules stand in a pod that is not to be captured; what is found is an event.
    pub(super) fn look_for_rules(&self, pod: PodUid, namespace: u64, attempt: u64) {
        let namespace = self.namespaces.get(&namespace).map(NetNs::try_clone);
        self.blocking(move || {
            let found = match namespace {
                Some(Ok(namespace)) => capture::stands_in(&namespace).map_err(Failure::from),
                Some(Err(error)) => Err(Failure::NoNamespace(error.to_string())),
                None => Err(Failure::Internal),
            };
            Event::LookedInto(pod, attempt, found)
        });
    }

    /// A pod that is not to be captured was looked into.
    pub(crate) fn looked_into(&mut self, pod: &PodUid, attempt: u64, found: Result<bool, Failure>) {
        if found == Ok(true) {
            let detail = "an agent that is gone has left its rules in a pod that is not to be captured: it is let go";
            self.shown.journal.change("rules-found", pod.as_str(), detail);
        }
        let actions = self.pods.looked(pod, attempt, found);
        self.act(actions);
    }

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
