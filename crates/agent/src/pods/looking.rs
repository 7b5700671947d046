//! A pod that is not to be captured, and of which nobody handed anything over: rules of an agent that has died may stand in it,
//! and lead to nobody. So its namespace is looked at, once, before it is left alone; what stands there is taken over, and the pod
//! let go in order.

use mesh::{PodUid, Uncaptured};
use wire::discovery::NodePod;

use super::{Action, Pods, Sandbox, Stage, note};
use crate::failure::Failure;

/// What is to become of a pod for which nothing is made.
pub(super) enum Decision {
    Wait,
    Look,
    Leave(Uncaptured),
    Refuse(Failure),
    Capture,
}

pub(super) fn decide(known: &NodePod, sandbox: &Sandbox) -> Decision {
    let name = format!("{}/{}", known.namespace, known.name);
    if name != sandbox.name {
        return Decision::Refuse(Failure::OtherName { runtime: sandbox.name.clone(), control: name });
    }
    match known.capture {
        // Once captured a pod stays so until it is released, also from agent to agent (T47).
        Err(_) if !sandbox.inherited && sandbox.found.is_none() => Decision::Look,
        Err(why) if !sandbox.was_captured() => Decision::Leave(why),
        _ if known.addresses.is_empty() => Decision::Wait,
        _ => Decision::Capture,
    }
}

impl Pods {
    /// A pod's namespace was looked at. `true`: there are rules of an agent before this one.
    pub(crate) fn looked(&mut self, uid: &PodUid, attempt: u64, outcome: Result<bool, Failure>) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(pod) = self.pods.get_mut(uid) else { return actions };
        let Some(sandbox) = &mut pod.sandbox else { return actions };
        if !matches!(&sandbox.stage, Stage::Looking(of) if *of == attempt) {
            return actions;
        }
        sandbox.stage = Stage::Bare;
        match outcome {
            Ok(stands) => {
                sandbox.found = Some(stands);
                pod.failure = None;
            }
            // Nobody can have captured what is being made.
            Err(_) if sandbox.starting => sandbox.found = Some(false),
            Err(failure) => {
                sandbox.stuck = true;
                note(pod, uid, failure, &mut actions);
            }
        }
        self.advance(uid, &mut actions);
        actions
    }
}
