//! What the runtime and people are told of a pod.

use mesh::PodUid;
use wire::pods::CniResult;

use super::{Action, Pod};
use crate::failure::Failure;

/// Answers everybody who waits for a pod. After any answer but a failure its programs start.
pub(super) fn answer_all(pod: &mut Pod, actions: &mut Vec<Action>, answer: impl Fn(&str) -> CniResult) {
    let Some(sandbox) = &mut pod.sandbox else { return };
    let answer = answer(&sandbox.name);
    sandbox.starting &= matches!(answer, CniResult::Failed(_));
    actions.extend(sandbox.waiting.drain(..).map(|it| Action::Answer(it.request, answer.clone())));
}

/// Remembers a failure, and reports it where it is another than the last one: what is tried again every second must not
/// be said every second.
pub(super) fn note(pod: &mut Pod, uid: &PodUid, failure: Failure, actions: &mut Vec<Action>) {
    if pod.failure.as_ref() != Some(&failure) {
        actions.push(Action::Report(uid.clone(), failure.clone()));
        pod.failure = Some(failure);
    }
}

/// The answer to the runtime: one sentence with the pod's name.
pub(crate) fn failed(name: &str, failure: &Failure) -> CniResult {
    CniResult::Failed(format!("pod {name} is not captured: {failure}"))
}
