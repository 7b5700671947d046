//! Namespaces and pods.

use std::collections::BTreeMap;
use std::net::IpAddr;

use identity::SpiffeId;
use manifests::Kind;
use manifests::k8s_openapi::api::core::v1 as core;
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh::{Canonical, PodUid};

use super::{Foreign, Name, addresses};
use crate::problem::{Problem, quoted};

/// The label that opts a namespace or a pod out or in (D14).
const MODE_LABEL: &str = "justmtls.dev/mode";
/// The label by which a namespace's admin lets its pods opt out for themselves (T13).
const ALLOW_OPT_OUT_LABEL: &str = "justmtls.dev/allow-opt-out";

/// What the label `justmtls.dev/mode` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ModeLabel {
    On,
    Off,
}

impl ModeLabel {
    /// An unknown value counts as no label, which leaves enrolment as it is by default.
    fn of(metadata: &ObjectMeta, object: &str, problems: &mut Vec<Problem>) -> Option<Self> {
        match metadata.labels.as_ref()?.get(MODE_LABEL)?.as_str() {
            "on" => Some(Self::On),
            "off" => Some(Self::Off),
            other => {
                let message = format!("label {MODE_LABEL} is {} and counts as not there; use on or off", quoted(other));
                problems.push(Problem::warning(object, message));
                None
            }
        }
    }
}

/// What a namespace says about its pods.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Namespace {
    pub(crate) mode: Option<ModeLabel>,
    pub(crate) allows_opt_out: bool,
    pub(crate) labels: BTreeMap<String, String>,
}

impl Namespace {
    pub(crate) fn read(namespace: &core::Namespace, problems: &mut Vec<Problem>) -> Self {
        let metadata = &namespace.metadata;
        let object = format!("{} {}", Kind::Namespace, metadata.name.as_deref().unwrap_or_default());
        let allows = metadata.labels.as_ref().and_then(|labels| labels.get(ALLOW_OPT_OUT_LABEL));
        Self {
            mode: ModeLabel::of(metadata, &object, problems),
            allows_opt_out: allows.is_some_and(|value| value == "true"),
            labels: metadata.labels.clone().unwrap_or_default(),
        }
    }
}

/// A pod that runs or is about to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pod {
    pub(crate) name: Name,
    pub(crate) canonical: Canonical,
    pub(crate) uid: PodUid,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) mode: Option<ModeLabel>,
    pub(crate) node: String,
    pub(crate) identity: SpiffeId,
    pub(crate) host_network: bool,
    /// Whose its packets are, where they are not its own programs'.
    pub(crate) foreign: Option<Foreign>,
    /// `status.podIPs`. Those of a pod in the host's network are its node's.
    pub(crate) addresses: Vec<IpAddr>,
    /// What the kubelet asks of it.
    pub(crate) probes: mesh::Probes,
}

impl Pod {
    /// The pod, or `None` where it has no life in the network: it is over, or not placed, or cannot be named.
    pub(crate) fn read(
        pod: &core::Pod,
        trust_domain: &identity::TrustDomain,
        problems: &mut Vec<Problem>,
    ) -> Option<Self> {
        let name = Name::of_metadata(&pod.metadata);
        let object = name.as_kind(Kind::Pod);
        let status = pod.status.as_ref();
        // A pod that is over keeps its object, and its address may be another pod's by now.
        if matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")) {
            return None;
        }
        let spec = pod.spec.as_ref()?;
        let node = spec.node_name.clone().filter(|node| !node.is_empty())?;
        let Some(uid) = pod.metadata.uid.as_deref().filter(|uid| !uid.is_empty()) else {
            let message = "field metadata.uid is missing, and without it the pod cannot be told from a later one of \
                           the same name; it is not published until it has one";
            problems.push(Problem::error(&object, message));
            return None;
        };
        let account = [&spec.service_account_name, &spec.service_account].into_iter().flatten();
        let account = account.map(String::as_str).find(|account| !account.is_empty()).unwrap_or("default");
        let identity = match SpiffeId::new(trust_domain, &name.namespace, account) {
            Ok(identity) => identity,
            Err(error) => {
                let message = format!("its service account {} gives no identity: {error}; rename it", quoted(account));
                problems.push(Problem::error(&object, message));
                return None;
            }
        };
        let listed = status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
        let first = status.and_then(|status| status.pod_ip.as_deref()).into_iter().filter(|ip| !ip.is_empty());
        Some(Self {
            uid: uid.into(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            mode: ModeLabel::of(&pod.metadata, &object, problems),
            node,
            identity,
            host_network: spec.host_network.unwrap_or(false),
            foreign: Foreign::of(&pod.metadata, spec),
            addresses: addresses(first.chain(listed), &object, "status.podIPs", problems),
            canonical: canonical(&pod.metadata, &name),
            probes: super::probes::read(spec, &object, problems),
            name,
        })
    }
}

/// The names by which Istio's dashboards know a pod, found as Istio finds them: its controller, and its labels.
fn canonical(metadata: &ObjectMeta, name: &Name) -> Canonical {
    let label = |keys: &[&str]| {
        let labels = metadata.labels.as_ref()?;
        keys.iter()
            .filter_map(|key| labels.get(*key))
            .find(|value| !value.is_empty())
            .map(|value| value.as_str().into())
    };
    let mut owners = metadata.owner_references.iter().flatten();
    let controller = owners.find(|owner| owner.controller == Some(true));
    let workload = match controller {
        // A Deployment's ReplicaSets are named after it and the hash of their template, which each pod carries, too.
        Some(owner) if owner.kind == "ReplicaSet" => {
            let hash: Option<std::sync::Arc<str>> = label(&["pod-template-hash"]);
            let deployment = hash.and_then(|hash| owner.name.strip_suffix(&*hash)?.strip_suffix('-'));
            deployment.unwrap_or(&owner.name)
        }
        Some(owner) => &owner.name,
        None => &name.name,
    };
    Canonical {
        service: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| workload.into()),
        revision: label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| Canonical::LATEST.into()),
        workload: workload.into(),
    }
}

#[cfg(test)]
mod tests {
    use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    use super::*;

    fn names(owner: Option<(&str, &str)>, labels: &[(&str, &str)]) -> [String; 3] {
        let owner = owner.map(|(kind, name)| OwnerReference {
            kind: kind.to_owned(),
            name: name.to_owned(),
            controller: Some(true),
            ..OwnerReference::default()
        });
        let metadata = ObjectMeta {
            owner_references: owner.map(|owner| vec![owner]),
            labels: Some(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
            ..ObjectMeta::default()
        };
        let canonical = canonical(&metadata, &Name::new("shop", "web-5d4f-x2"));
        [canonical.workload, canonical.service, canonical.revision].map(|name| name.to_string())
    }

    #[test]
    fn a_pod_is_known_by_its_controller_and_its_labels_as_in_istio() {
        assert_eq!(names(None, &[]), ["web-5d4f-x2", "web-5d4f-x2", "latest"]);
        let hash = ("pod-template-hash", "5d4f");
        assert_eq!(names(Some(("ReplicaSet", "web-5d4f")), &[hash]), ["web", "web", "latest"]);
        assert_eq!(names(Some(("ReplicaSet", "bare-set")), &[hash]), ["bare-set", "bare-set", "latest"]);
        assert_eq!(names(Some(("StatefulSet", "db")), &[("app", "postgres")]), ["db", "postgres", "latest"]);
        let labels =
            [("app", "a"), ("app.kubernetes.io/name", "b"), ("version", "v1"), ("app.kubernetes.io/version", "2")];
        assert_eq!(names(None, &labels)[1..], ["b", "2"]);
        let istio = [("service.istio.io/canonical-name", "c"), ("service.istio.io/canonical-revision", "v3")];
        assert_eq!(names(None, &[&labels[..], &istio[..]].concat())[1..], ["c", "v3"]);
    }
}
