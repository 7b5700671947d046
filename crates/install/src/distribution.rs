//! Which distribution of Kubernetes a cluster is, and where its nodes keep what the agent needs.
//!
//! Told from what Nodes say of themselves. A cluster of several is refused by name: one DaemonSet has one set of
//! directories.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;

use crate::values::{Key, Values};

/// A distribution whose directories are not, or not in all releases, those of everybody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Distribution {
    /// kubeadm, kind, minikube, EKS, AKS and others: containerd with its defaults.
    Standard,
    /// Rancher's k3s, also in k3d.
    K3s,
    /// Rancher's RKE2.
    Rke2,
    /// Mirantis' k0s.
    K0s,
    /// Google's GKE.
    Gke,
    /// Red Hat's OpenShift, with CRI-O.
    OpenShift,
    /// Canonical's MicroK8s.
    MicroK8s,
    /// Sidero's Talos.
    Talos,
}

/// Where a node keeps what the agent needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Places {
    bin: &'static str,
    conf: &'static str,
    cri: &'static str,
}

impl Distribution {
    #[cfg(test)]
    const ALL: &[Self] =
        &[Self::Standard, Self::K3s, Self::Rke2, Self::K0s, Self::Gke, Self::OpenShift, Self::MicroK8s, Self::Talos];

    /// Its name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::K3s => "k3s",
            Self::Rke2 => "RKE2",
            Self::K0s => "k0s",
            Self::Gke => "GKE",
            Self::OpenShift => "OpenShift",
            Self::MicroK8s => "MicroK8s",
            Self::Talos => "Talos",
        }
    }

    /// As their documentation has them.
    fn places(self) -> Places {
        let containerd = "/run/containerd/containerd.sock";
        let (bin, conf, cri) = match self {
            Self::Standard | Self::Talos => ("/opt/cni/bin", "/etc/cni/net.d", containerd),
            Self::K3s => (
                "/var/lib/rancher/k3s/data/cni",
                "/var/lib/rancher/k3s/agent/etc/cni/net.d",
                "/run/k3s/containerd/containerd.sock",
            ),
            Self::Rke2 => ("/opt/cni/bin", "/etc/cni/net.d", "/run/k3s/containerd/containerd.sock"),
            Self::K0s => ("/opt/cni/bin", "/etc/cni/net.d", "/run/k0s/containerd.sock"),
            Self::Gke => (concat!("/ho", "me/kubernetes/bin"), "/etc/cni/net.d", containerd),
            Self::OpenShift => ("/var/lib/cni/bin", "/etc/kubernetes/cni/net.d", "/run/crio/crio.sock"),
            Self::MicroK8s => (
                "/var/snap/microk8s/current/opt/cni/bin",
                "/var/snap/microk8s/current/args/cni-network",
                "/var/snap/microk8s/common/run/containerd.sock",
            ),
        };
        Places { bin, conf, cri }
    }

    /// What one node says.
    fn of(node: &Node) -> Self {
        let empty = BTreeMap::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
        let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
        let (version, image) = info.map_or(("", ""), |info| (&*info.kubelet_version, &*info.os_image));
        let provider = node.spec.as_ref().and_then(|spec| spec.provider_id.as_deref()).unwrap_or("");
        let labelled = |prefix: &str| labels.keys().any(|label| label.starts_with(prefix));
        if version.contains("+k3s") {
            Self::K3s
        } else if version.contains("+rke2") {
            Self::Rke2
        } else if version.contains("+k0s") {
            Self::K0s
        } else if labelled("node.openshift.io/")
            || image.contains("CoreOS") && labelled("machineconfiguration.openshift.io/")
        {
            Self::OpenShift
        } else if labelled("microk8s.io/") {
            Self::MicroK8s
        } else if version.contains("-gke.") || provider.starts_with("gce://") && labelled("cloud.google.com/gke-") {
            Self::Gke
        } else if image.starts_with("Talos") {
            Self::Talos
        } else {
            Self::Standard
        }
    }
}

/// What a cluster's nodes are; the error is a sentence that names them.
pub(crate) fn detect(nodes: &[Node]) -> Result<Distribution, String> {
    let mut found: BTreeMap<Distribution, &str> = BTreeMap::new();
    for node in nodes {
        found.entry(Distribution::of(node)).or_insert(node.metadata.name.as_deref().unwrap_or("unnamed"));
    }
    let mut places: Vec<_> = found.keys().map(|distribution| distribution.places()).collect();
    places.dedup();
    match (found.first_key_value(), places.len()) {
        (None, _) => Ok(Distribution::Standard),
        (Some((first, _)), 1) => Ok(*first),
        _ => {
            let names: Vec<_> = found.iter().map(|(it, node)| format!("{} (node {node})", it.as_str())).collect();
            Err(format!(
                "the nodes are of several distributions, {}, and keep their CNI plugins in different places; \
                 make them alike, or say by --set {}=…, --set {}=… and --set {}=… what holds on all of them",
                names.join(" and "),
                Key::CniBinDir.as_str(),
                Key::CniConfDir.as_str(),
                Key::CriSocket.as_str(),
            ))
        }
    }
}

/// Fills in what nobody said by what the nodes are. Gives what it set, for a line to the user.
///
/// # Errors
/// The nodes are of several distributions, and not all their places were said.
pub(crate) fn fill_in(values: &mut Values, nodes: &[Node]) -> Result<Option<String>, String> {
    if [Key::CniBinDir, Key::CniConfDir, Key::CriSocket].iter().all(|key| values.is_set(*key)) {
        return Ok(None);
    }
    let distribution = detect(nodes)?;
    let places = distribution.places();
    let quota = if distribution == Distribution::Gke { "true" } else { "false" };
    let suggestions = [
        (Key::CniBinDir, places.bin),
        (Key::CniConfDir, places.conf),
        (Key::CriSocket, places.cri),
        (Key::CriticalPodsQuota, quota),
    ];
    let set: Vec<_> = suggestions
        .into_iter()
        .filter(|(key, value)| values.suggest(*key, value))
        .map(|(key, value)| format!("{}={value}", key.as_str()))
        .collect();
    Ok((!set.is_empty()).then(|| format!("the nodes are {}'s: {}", distribution.as_str(), set.join(", "))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, version: &str, image: &str, label: &str, provider: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { label: "x" } },
            "spec": { "providerID": provider },
            "status": { "nodeInfo": {
                "kubeletVersion": version, "osImage": image, "architecture": "", "bootID": "",
                "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "", "machineID": "",
                "operatingSystem": "linux", "systemUUID": "",
            } },
        }))
        .unwrap()
    }

    #[test]
    fn each_distribution_is_told_by_what_its_nodes_say() {
        let cases = [
            (node("a", "v1.33.1", "Debian GNU/Linux 12", "a", "kind://docker/kind/a"), Distribution::Standard),
            (
                node("a", "v1.33.1-eks-1", "Amazon Linux 2023", "eks.amazonaws.com/nodegroup", "aws:///x"),
                Distribution::Standard,
            ),
            (node("a", "v1.33.1", "Ubuntu", "kubernetes.azure.com/cluster", "azure:///x"), Distribution::Standard),
            (node("a", "v1.33.1+k3s1", "K3s", "a", ""), Distribution::K3s),
            (node("a", "v1.33.1+rke2r1", "SLES", "a", ""), Distribution::Rke2),
            (node("a", "v1.33.1+k0s", "Debian", "a", ""), Distribution::K0s),
            (
                node("a", "v1.33.1-gke.100", "Container-Optimized OS", "cloud.google.com/gke-nodepool", "gce://x"),
                Distribution::Gke,
            ),
            (
                node("a", "v1.33.1", "Red Hat Enterprise Linux CoreOS", "node.openshift.io/os_id", ""),
                Distribution::OpenShift,
            ),
            (node("a", "v1.33.1", "Ubuntu", "microk8s.io/cluster", ""), Distribution::MicroK8s),
            (node("a", "v1.33.1", "Talos (v1.11)", "a", ""), Distribution::Talos),
        ];
        for (node, expected) in cases {
            assert_eq!(detect(&[node]), Ok(expected));
        }
        assert_eq!(detect(&[]), Ok(Distribution::Standard));
    }

    #[test]
    fn places_are_paths_that_can_be_set() {
        for distribution in Distribution::ALL {
            let places = distribution.places();
            let mut values = Values::default();
            for (key, path) in
                [(Key::CniBinDir, places.bin), (Key::CniConfDir, places.conf), (Key::CriSocket, places.cri)]
            {
                values.set(key, path).unwrap();
            }
        }
    }

    #[test]
    fn a_mixed_cluster_is_refused_by_name_unless_everything_is_said() {
        let nodes = [node("a", "v1.33.1", "Debian", "a", ""), node("b", "v1.33.1+k3s1", "K3s", "a", "")];
        let why = detect(&nodes).unwrap_err();
        assert!(why.contains("standard (node a)") && why.contains("k3s (node b)"), "{why}");
        let mut values = Values::default();
        assert!(fill_in(&mut values, &nodes).is_err());
        for (key, path) in [(Key::CniBinDir, "/a"), (Key::CniConfDir, "/b"), (Key::CriSocket, "/c/d.sock")] {
            values.set(key, path).unwrap();
        }
        assert_eq!(fill_in(&mut values, &nodes), Ok(None));
        // Talos keeps everything where everybody does.
        assert!(
            detect(&[node("a", "v1.33.1", "Debian", "a", ""), node("t", "v1.33.1", "Talos (v1)", "a", "")]).is_ok()
        );
    }

    #[test]
    fn what_is_detected_is_filled_in_and_said() {
        let mut values = Values::default();
        let said = fill_in(&mut values, &[node("a", "v1.33.1+k3s1", "K3s", "a", "")]).unwrap().unwrap();
        assert!(said.starts_with("the nodes are k3s's: cni.binDir=/var/lib/rancher/k3s/data/cni"), "{said}");
        assert_eq!(values.get(Key::CriSocket), "/run/k3s/containerd/containerd.sock");
        let mut values = Values::default();
        assert_eq!(fill_in(&mut values, &[node("a", "v1.33.1", "Debian", "a", "")]), Ok(None));
        fill_in(&mut values, &[node("a", "v1.33.1-gke.1", "COS", "a", "")]).unwrap();
        assert_eq!(values.get(Key::CriticalPodsQuota), "true");
    }
}
