//! Namespaces and pods.

use std::collections::BTreeMap;
use std::net::IpAddr;

use identity::SpiffeId;
use manifests::Kind;
use manifests::k8s_openapi::api::core::v1 as core;
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh::PodUid;

use super::{Name, addresses};
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
}

impl Namespace {
    pub(crate) fn read(namespace: &core::Namespace, problems: &mut Vec<Problem>) -> Self {
        let metadata = &namespace.metadata;
        let object = format!("{} {}", Kind::Namespace, metadata.name.as_deref().unwrap_or_default());
        let allows = metadata.labels.as_ref().and_then(|labels| labels.get(ALLOW_OPT_OUT_LABEL));
        Self {
            mode: ModeLabel::of(metadata, &object, problems),
            allows_opt_out: allows.is_some_and(|value| value == "true"),
        }
    }
}

/// A pod that runs or is about to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pod {
    pub(crate) name: Name,
    pub(crate) uid: PodUid,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) mode: Option<ModeLabel>,
    pub(crate) node: String,
    pub(crate) identity: SpiffeId,
    pub(crate) host_network: bool,
    /// `status.podIPs`. Those of a pod in the host's network are its node's.
    pub(crate) addresses: Vec<IpAddr>,
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
            addresses: addresses(first.chain(listed), &object, "status.podIPs", problems),
            name,
        })
    }
}
