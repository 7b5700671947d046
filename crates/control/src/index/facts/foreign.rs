//! Pods whose packets another data path handles (T15, T43): nothing of ours can stand in it, or beside it.

use manifests::k8s_openapi::api::core::v1::{Container, PodSpec};
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::problem::quoted;

/// Sidecars of other meshes, by their container's name: they have rules at the hooks where ours would be.
const SIDECARS: [(&str, &str); 4] =
    [("istio-proxy", "Istio"), ("linkerd-proxy", "Linkerd"), ("kuma-sidecar", "Kuma"), ("consul-dataplane", "Consul")];
/// What Istio's ambient mode writes to a pod that it redirects.
const AMBIENT: (&str, &str) = ("ambient.istio.io/redirection", "enabled");
/// Parts of a RuntimeClass's name by which runtimes are known that bring a network stack or a kernel of their own: the pod's
/// packets only pass the namespace that our rules are in.
const RUNTIMES: [&str; 4] = ["gvisor", "runsc", "kata", "firecracker"];
/// What KubeVirt labels the pod of a virtual machine with.
const VIRTUAL_MACHINE: (&str, &str) = ("kubevirt.io", "virt-launcher");

/// Whose a pod's packets are, where they are not its own programs'.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Foreign {
    /// Of a mesh, by its name.
    Mesh(&'static str),
    /// Of what a RuntimeClass or label names: a guess by that name, which the pod's own label overrides.
    Runtime(String),
}

impl Foreign {
    /// Why the pod is not captured, and what to do, for its owner.
    pub(crate) fn sentence(&self) -> String {
        match self {
            Self::Mesh(mesh) => format!(
                "its packets are {mesh}'s, and nothing of ours can stand beside that; take it out of {mesh} to have it captured, or \
                 opt it out by the label justmtls.dev/mode: off"
            ),
            Self::Runtime(what) => format!(
                "{} means a network stack that its node does not see into; take it off that, or label the pod \
                 justmtls.dev/mode: on if that is not so, or off to opt it out",
                quoted(what)
            ),
        }
    }

    pub(super) fn of(metadata: &ObjectMeta, spec: &PodSpec) -> Option<Self> {
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let sidecar = |container: &Container| SIDECARS.iter().find(|(name, _)| *name == container.name);
        if let Some((_, mesh)) = containers.filter_map(sidecar).next() {
            return Some(Self::Mesh(mesh));
        }
        let annotation = metadata.annotations.as_ref().and_then(|annotations| annotations.get(AMBIENT.0));
        if annotation.is_some_and(|value| value == AMBIENT.1) {
            return Some(Self::Mesh("Istio"));
        }
        let class = spec.runtime_class_name.as_deref().unwrap_or_default();
        if RUNTIMES.iter().any(|part| class.to_lowercase().contains(part)) {
            return Some(Self::Runtime(format!("runtimeClassName {class}")));
        }
        let label = metadata.labels.as_ref().and_then(|labels| labels.get(VIRTUAL_MACHINE.0));
        label.is_some_and(|value| value == VIRTUAL_MACHINE.1).then(|| Self::Runtime("a virtual machine".to_owned()))
    }
}
