//! What policies are told about themselves: a condition in their status, where they cannot be enforced as they stand, or are
//! taken otherwise than they say (D13, D14).
//!
//! The leader writes it, only where it is not there already, and takes it away again when it does not hold any more. What
//! others wrote into the status stays.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use manifests::{Kind, ObjectKey};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;

use super::{FIELD_MANAGER, Failure, ask, resource};
use crate::clock::Clock;
use crate::problem::{Problem, Severity};

/// The type of our condition.
const TYPE: &str = "justmtls.dev/Enforced";
/// How soon what could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(15);
/// Longer messages are cut: a condition has at most 32 KiB.
const MAX_MESSAGE: usize = 4096;

/// What a policy is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Condition {
    /// Whether it is enforced.
    pub(crate) enforced: bool,
    pub(crate) message: String,
}

/// Conditions by policy.
pub(crate) type Conditions = BTreeMap<ObjectKey, Condition>;

/// What is to be told, and what objects say already.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Statuses {
    pub(crate) wanted: Conditions,
    pub(crate) there: Conditions,
}

/// Whether objects of a kind have a status of ours.
pub(crate) fn concerns(kind: Kind) -> bool {
    matches!(kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication)
}

impl Condition {
    /// What these problems of one policy come to; `None` where there are none.
    pub(crate) fn of(problems: &BTreeSet<&Problem>) -> Option<Self> {
        let enforced = problems.iter().all(|problem| problem.severity == Severity::Warning);
        let sentences: Vec<_> = problems.iter().map(|problem| problem.message.as_str()).collect();
        let message: String = sentences.join(" / ").chars().take(MAX_MESSAGE).collect();
        (!problems.is_empty()).then_some(Self { enforced, message })
    }

    /// Ours, of an object's status.
    pub(crate) fn in_status(status: &Value) -> Option<Self> {
        let ours = status["conditions"].as_array()?.iter().find(|condition| condition["type"] == TYPE)?;
        let message = ours["message"].as_str().unwrap_or_default().to_owned();
        Some(Self { enforced: ours["status"] == "True", message })
    }

    fn to_json(&self, clock: &Clock) -> Value {
        let seconds = i64::try_from(clock.now().as_secs()).unwrap_or_default();
        let now = manifests::k8s_openapi::jiff::Timestamp::from_second(seconds).unwrap_or_default();
        json!({
            "type": TYPE,
            "status": if self.enforced { "True" } else { "False" },
            "reason": if self.enforced { "EnforcedOtherwise" } else { "CannotBeEnforced" },
            "message": self.message,
            "lastTransitionTime": now.to_string(),
        })
    }
}

/// Writes statuses while this replica leads, for as long as there is somebody who says what is wanted.
pub(crate) async fn keep(
    client: Client,
    clock: Clock,
    mut statuses: watch::Receiver<Statuses>,
    mut leads: watch::Receiver<bool>,
) {
    // What was written and the watch has not shown yet.
    let mut written: BTreeMap<ObjectKey, Option<Condition>> = BTreeMap::new();
    loop {
        let now = statuses.borrow_and_update().clone();
        let mut failed = false;
        if *leads.borrow_and_update() {
            let keys: BTreeSet<_> = now.wanted.keys().chain(now.there.keys()).collect();
            written.retain(|key, _| keys.contains(key));
            for key in keys {
                let wanted = now.wanted.get(key);
                if now.there.get(key) == wanted {
                    written.remove(key);
                } else if written.get(key).map(Option::as_ref) != Some(wanted) {
                    match write(&client, &clock, key, wanted).await {
                        Ok(()) | Err(Failure::Absent) => drop(written.insert(key.clone(), wanted.cloned())),
                        Err(failure) => {
                            failed = true;
                            warn!(policy = %key, %failure, "the status of a policy cannot be written");
                        }
                    }
                }
            }
        } else {
            written.clear();
        }
        tokio::select! {
            changed = statuses.changed() => if changed.is_err() { return },
            changed = leads.changed() => if changed.is_err() { return },
            () = sleep(AGAIN), if failed => {}
        }
    }
}

/// Puts our condition into a policy's status, or takes it out.
pub(crate) async fn write(
    client: &Client,
    clock: &Clock,
    key: &ObjectKey,
    wanted: Option<&Condition>,
) -> Result<(), Failure> {
    let resource = resource(key.kind, key.kind.api_versions()[0]);
    let namespace = key.namespace.as_deref().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    let object = ask(api.get(&key.name)).await?;
    let status = &object.data["status"];
    if Condition::in_status(status).as_ref() == wanted {
        return Ok(());
    }
    let others = status["conditions"].as_array().into_iter().flatten().filter(|condition| condition["type"] != TYPE);
    let ours = wanted.map(|condition| condition.to_json(clock));
    let conditions: Vec<Value> = others.cloned().chain(ours).collect();
    // With the version that was read, so that no condition of somebody else is lost.
    let patch = json!({
        "metadata": { "resourceVersion": object.metadata.resource_version },
        "status": { "conditions": conditions },
    });
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    ask(api.patch_status(&key.name, &parameters, &Patch::Merge(patch))).await.map(drop)
}
