//! A pod's state, for people.

use mesh::PodUid;
use serde::Serialize;

use super::{Pod, Sandbox, Stage};

/// A pod, for people.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Its UID.
    pub(crate) uid: String,
    /// `namespace/name`.
    pub(crate) name: String,
    identity: Option<String>,
    addresses: Vec<String>,
    excluded_ports: Vec<u16>,
    /// How far its capture is.
    pub(crate) state: &'static str,
    /// Why it is not to be captured.
    not_captured: Option<&'static str>,
    /// An agent before this one has captured it, or may have, and its rules are not known to be gone.
    stands: bool,
    /// Inode of its network namespace.
    namespace: Option<u64>,
    /// Requests of the runtime that wait for it.
    waiting: usize,
    /// What last went wrong.
    failure: Option<String>,
}

impl Shown {
    pub(super) fn new(uid: &PodUid, pod: &Pod) -> Self {
        let (known, sandbox) = (pod.known.as_ref(), pod.sandbox.as_ref());
        let not_captured = known.and_then(|known| known.capture.err());
        let state = match (sandbox, known) {
            (None, _) => "no-sandbox",
            (Some(_), None) => "unknown",
            (Some(sandbox), Some(_)) => match sandbox.stage {
                Stage::Bare if sandbox.stuck => "failed",
                Stage::Bare if not_captured.is_some() && sandbox.found == Some(false) => "not-captured",
                Stage::Bare => "waiting",
                Stage::Looking(_) => "looking",
                Stage::Found => "found",
                Stage::Preparing(_) => "preparing",
                Stage::Offered { .. } => "offered",
                Stage::Beginning(_) => "beginning",
                Stage::Captured if sandbox.damage.is_some() => "damaged",
                Stage::Captured => "captured",
                Stage::Leaving(_) => "leaving",
            },
        };
        let name = known.map(|known| format!("{}/{}", known.namespace, known.name));
        Self {
            uid: uid.to_string(),
            name: name.or_else(|| Some(sandbox?.name.clone())).unwrap_or_default(),
            identity: known.map(|known| known.identity.to_string()),
            addresses: known.into_iter().flat_map(|known| &known.addresses).map(ToString::to_string).collect(),
            excluded_ports: known.map(|known| known.excluded_ports.clone()).unwrap_or_default(),
            state,
            not_captured: not_captured.map(|why| why.in_clear().as_str()),
            stands: sandbox.is_some_and(Sandbox::was_captured),
            namespace: sandbox.map(|sandbox| sandbox.namespace),
            waiting: sandbox.map_or(0, |sandbox| sandbox.waiting.len()),
            failure: sandbox.and_then(|it| it.damage.as_ref()).or(pod.failure.as_ref()).map(ToString::to_string),
        }
    }
}
