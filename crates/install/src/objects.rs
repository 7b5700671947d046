//! All objects of an installation, from one value of values, in the order in which they are made.
//!
//! Pure: no cluster, no clock. The same list is applied, printed, compared with what a cluster has, and made into the chart.

mod control;
mod definitions;
mod node;
mod rbac;

use serde_json::{Value, json};

use crate::source::{Expression, Source};
use crate::values::{Key, VERSION, Values};

pub(crate) use definitions::definitions;
pub(crate) use rbac::permissions;

/// The namespace of the product.
pub(crate) const NAMESPACE: &str = "justmtls-system";
/// Who owns what we apply.
pub(crate) const FIELD_MANAGER: &str = "justmtls";
/// The Deployment, Service, account, Lease and PodDisruptionBudget of the control plane.
pub(crate) const CONTROL: &str = "justmtls-control";
/// The DaemonSet and account of the nodes.
pub(crate) const NODE: &str = "justmtls-node";
/// The ConfigMap of the settings.
pub(crate) const SETTINGS: &str = "justmtls";
/// The ConfigMap of the roots, which the control plane writes.
pub(crate) const TRUST_BUNDLE: &str = "justmtls-trust-bundle";
/// The Secret of the authority, which the control plane writes.
pub(crate) const AUTHORITY: &str = "justmtls-ca";
/// The label that all objects of the product have.
pub(crate) const PART_OF: &str = "app.kubernetes.io/part-of";
/// The label by which the pods of a workload are selected.
pub(crate) const NAME: &str = "app.kubernetes.io/name";
/// The label of whoever made an object.
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// The annotation of the Namespace with all values, for the next `justmtls upgrade` and for `justmtls check`.
pub(crate) const VALUES: &str = "justmtls.dev/values";

/// The control plane's ports and socket.
pub(crate) const CONTROL_PORT: u16 = 15012;
pub(crate) const CONTROL_METRICS_PORT: u16 = 15014;
pub(crate) const CONTROL_ADMIN: &str = "/run/justmtls/admin.sock";
/// The node's ports and the proxy's socket. The agent's has its pod's name, see [`agent_admin`].
pub(crate) const PROXY_METRICS_PORT: u16 = 15020;
pub(crate) const AGENT_METRICS_PORT: u16 = 15021;
pub(crate) const PROXY_ADMIN: &str = "/run/justmtls/own/proxy.sock";
/// The proxy's user, and the owner that listeners in pods have.
pub(crate) const PROXY_USER: u32 = 2147;
pub(crate) const LISTENER_OWNER: u32 = 2148;
/// The control plane's user.
pub(crate) const CONTROL_USER: u32 = 65532;

/// The admin socket of the agent in a pod of the DaemonSet: two agents share the folder in an upgrade.
pub(crate) fn agent_admin(pod: &str) -> String {
    format!("/run/justmtls/agent/{pod}.sock")
}

/// One object.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Object {
    /// As JSON.
    pub(crate) value: Value,
    /// The key with whose value `true` it is there; always, where there is none.
    pub(crate) only_if: Option<Key>,
}

impl Object {
    fn new(value: Value) -> Self {
        Self { value, only_if: None }
    }

    /// Its kind.
    pub(crate) fn kind(&self) -> &str {
        self.value["kind"].as_str().unwrap_or_default()
    }

    /// Its group and version.
    pub(crate) fn api_version(&self) -> &str {
        self.value["apiVersion"].as_str().unwrap_or_default()
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        self.value["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Its namespace, where it is in one.
    pub(crate) fn namespace(&self) -> Option<&str> {
        self.value["metadata"]["namespace"].as_str()
    }

    /// As people call it.
    pub(crate) fn title(&self) -> String {
        format!("{} {}", self.kind(), self.name())
    }
}

/// All objects but the definitions of Istio's kinds, in the order in which they are made.
pub(crate) fn objects(values: &Values) -> Vec<Object> {
    let wanted = |object: &Object| object.only_if.is_none_or(|key| values.get(key) == "true");
    all(Source::Values(values)).into_iter().filter(wanted).collect()
}

/// As [`objects`], with those that are there on demand alone.
pub(crate) fn all(source: Source<'_>) -> Vec<Object> {
    let mut all = vec![Object::new(namespace(source)), settings(source), quota()];
    all.extend(rbac::objects(source).into_iter().map(Object::new));
    all.extend(control::objects(source).into_iter().map(Object::new));
    all.push(Object::new(node::daemon_set(source)));
    all
}

/// The ConfigMap of the settings, one of [`objects`].
pub(crate) fn settings_object(values: &Values) -> Object {
    settings(Source::Values(values))
}

/// The labels of every object.
fn labels() -> Value {
    json!({ PART_OF: "justmtls", "app.kubernetes.io/version": VERSION })
}

/// Metadata of an object in our namespace, or of none.
fn metadata(name: &str, namespaced: bool) -> Value {
    let mut metadata = json!({ "name": name, "labels": labels() });
    if namespaced {
        metadata["namespace"] = json!(NAMESPACE);
    }
    metadata
}

/// The labels of the pods of a workload.
fn pod_labels(name: &str) -> Value {
    let mut labels = labels();
    labels[NAME] = json!(name);
    labels
}

fn namespace(source: Source<'_>) -> Value {
    let mut metadata = metadata(NAMESPACE, false);
    metadata["annotations"] = json!({ VALUES: source.leaf(Expression::Record) });
    // The agent has capabilities and paths of the node, which only this level lets in.
    metadata["labels"]["pod-security.kubernetes.io/enforce"] = json!("privileged");
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata })
}

fn settings(source: Source<'_>) -> Object {
    Object::new(json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(SETTINGS, true),
        "data": {
            Key::TrustDomain.as_str(): source.plain(Key::TrustDomain),
            Key::InsideRanges.as_str(): source.plain(Key::InsideRanges),
            Key::MixedRanges.as_str(): source.plain(Key::MixedRanges),
            Key::ServiceRanges.as_str(): source.plain(Key::ServiceRanges),
            Key::ExcludedPorts.as_str(): source.plain(Key::ExcludedPorts),
            Key::ApiServerAddresses.as_str(): source.plain(Key::ApiServerAddresses),
            Key::ViewLifetime.as_str(): source.plain(Key::ViewLifetime),
            Key::WholeMeshUpTo.as_str(): source.after("", Key::WholeMeshUpTo),
            Key::Drain.as_str(): source.after("", Key::Drain),
        },
    }))
}

/// GKE lets critical pods only into namespaces that have such a quota.
fn quota() -> Object {
    let value = json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": metadata("justmtls-critical-pods", true),
        "spec": {
            "hard": { "pods": "10k" },
            "scopeSelector": { "matchExpressions": [{
                "scopeName": "PriorityClass",
                "operator": "In",
                "values": ["system-cluster-critical", "system-node-critical"],
            }] },
        },
    });
    Object { value, only_if: Some(Key::CriticalPodsQuota) }
}

#[cfg(test)]
mod tests;
