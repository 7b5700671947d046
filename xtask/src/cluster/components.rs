//! The programs of a node: their command lines and their configuration.

use super::layout::{Cluster, DNS, Node, PODS, SERVICES};
use serde_json::{Value, json};

/// Where a node has the programs of Kubernetes.
pub(super) const PROGRAMS: &str = "/opt/kubernetes/bin";
pub(super) const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const PKI: &str = "/etc/kubernetes/pki";

/// One long-running program of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Component {
    pub(super) name: &'static str,
    pub(super) program: String,
    pub(super) arguments: Vec<String>,
}

impl Component {
    fn of_kubernetes(name: &'static str, arguments: Vec<String>) -> Self {
        Self { name, program: format!("{PROGRAMS}/{name}"), arguments }
    }
}

/// The container runtime of a node, which must answer before anything else of it can start.
pub(super) fn runtime() -> Component {
    let arguments = vec!["--config".to_owned(), "/etc/containerd/config.toml".to_owned()];
    Component { name: "containerd", program: "containerd".to_owned(), arguments }
}

/// The other programs of a node, in the order in which they lean on each other.
pub(super) fn components(cluster: &Cluster, node: Node) -> Vec<Component> {
    let mut all = Vec::new();
    if node == Node::A {
        all.extend([etcd(), api_server(cluster), controller_manager(), scheduler()]);
    }
    all.extend([kubelet(cluster, node), proxy()]);
    all
}

fn etcd() -> Component {
    let mut arguments = flags(&[
        ("data-dir", "/var/lib/etcd"),
        ("listen-client-urls", "https://127.0.0.1:2379"),
        ("advertise-client-urls", "https://127.0.0.1:2379"),
        // It is alone: nobody is its peer.
        ("listen-peer-urls", "http://127.0.0.1:2380"),
        ("client-cert-auth", "true"),
        ("log-level", "warn"),
    ]);
    arguments.extend(of_pki(&[
        ("trusted-ca-file", "etcd-ca.crt"),
        ("cert-file", "etcd.crt"),
        ("key-file", "etcd.key"),
    ]));
    // The power cuts of these nodes end processes; the machine that holds the files stays on.
    arguments.push("--unsafe-no-fsync".to_owned());
    Component::of_kubernetes("etcd", arguments)
}

fn api_server(cluster: &Cluster) -> Component {
    let mut arguments = flags(&[
        ("advertise-address", &cluster.node(Node::A).to_string()),
        ("secure-port", "6443"),
        ("etcd-servers", "https://127.0.0.1:2379"),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction,PodSecurity"),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        ("service-cluster-ip-range", SERVICES),
        ("allow-privileged", "true"),
        ("kubelet-preferred-address-types", "InternalIP"),
        ("requestheader-allowed-names", "front-proxy-client"),
        ("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        ("requestheader-group-headers", "X-Remote-Group"),
        ("requestheader-username-headers", "X-Remote-User"),
    ]);
    arguments.extend(of_pki(&[
        ("client-ca-file", "ca.crt"),
        ("tls-cert-file", "apiserver.crt"),
        ("tls-private-key-file", "apiserver.key"),
        ("etcd-cafile", "etcd-ca.crt"),
        ("etcd-certfile", "etcd-client.crt"),
        ("etcd-keyfile", "etcd-client.key"),
        ("service-account-key-file", "service-accounts.pub"),
        ("service-account-signing-key-file", "service-accounts.key"),
        ("kubelet-client-certificate", "kubelet-client.crt"),
        ("kubelet-client-key", "kubelet-client.key"),
        ("requestheader-client-ca-file", "front-proxy-ca.crt"),
        ("proxy-client-cert-file", "front-proxy-client.crt"),
        ("proxy-client-key-file", "front-proxy-client.key"),
    ]));
    Component::of_kubernetes("kube-apiserver", arguments)
}

fn controller_manager() -> Component {
    let mut arguments = flags(&[
        ("kubeconfig", "/etc/kubernetes/controller-manager.conf"),
        ("leader-elect", "false"),
        ("use-service-account-credentials", "true"),
    ]);
    arguments.extend(of_pki(&[
        ("service-account-private-key-file", "service-accounts.key"),
        ("root-ca-file", "ca.crt"),
        ("cluster-signing-cert-file", "ca.crt"),
        ("cluster-signing-key-file", "ca.key"),
    ]));
    Component::of_kubernetes("kube-controller-manager", arguments)
}

fn scheduler() -> Component {
    let arguments = flags(&[("kubeconfig", "/etc/kubernetes/scheduler.conf"), ("leader-elect", "false")]);
    Component::of_kubernetes("kube-scheduler", arguments)
}

fn kubelet(cluster: &Cluster, node: Node) -> Component {
    let arguments = flags(&[
        ("config", "/etc/kubernetes/kubelet.json"),
        ("kubeconfig", "/etc/kubernetes/kubelet.conf"),
        ("hostname-override", node.name()),
        ("node-ip", &format!("{},{}", cluster.node(node), cluster.node_v6(node))),
    ]);
    Component::of_kubernetes("kubelet", arguments)
}

fn proxy() -> Component {
    Component::of_kubernetes("kube-proxy", flags(&[("config", "/etc/kubernetes/proxy.json")]))
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

/// Flags that name files of [`PKI`].
fn of_pki(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().map(|(name, file)| format!("--{name}={PKI}/{file}")).collect()
}

/// The configuration files of a node, by path from its root.
pub(super) fn files(cluster: &Cluster, node: Node) -> Vec<(&'static str, String)> {
    let hosts =
        Node::ALL.map(|node| format!("{0} {2}\n{1} {2}\n", cluster.node(node), cluster.node_v6(node), node.name()));
    vec![
        ("etc/hosts", format!("127.0.0.1 localhost\n::1 localhost\n{}", hosts.concat())),
        ("etc/hostname", format!("{}\n", node.name())),
        ("etc/resolv.conf", DNS.map(|server| format!("nameserver {server}\n")).concat()),
        ("etc/containerd/config.toml", CONTAINERD.replace("PAUSE", super::images::PAUSE)),
        ("etc/cni/net.d/10-cluster.conflist", network_plugins(node).to_string()),
        ("etc/kubernetes/kubelet.json", kubelet_configuration().to_string()),
        ("etc/kubernetes/proxy.json", proxy_configuration(node).to_string()),
    ]
}

const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE"
  disable_apparmor = true
  restrict_oom_score_adj = true
"#;

/// One node connects pods by a bridge, the other by a route for each pod: what works on both depends on neither.
fn network_plugins(node: Node) -> Value {
    let ranges = node.pods().map(|subnet| json!([{"subnet": subnet}]));
    let mut connect = match node {
        Node::A => json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true}),
        Node::B => json!({"type": "ptp"}),
    };
    connect["mtu"] = 1500.into();
    connect["ipam"] = json!({
        "type": "host-local",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    json!({
        "cniVersion": "0.4.0",
        "name": "cluster",
        "plugins": [connect, {"type": "portmap", "capabilities": {"portMappings": true}}],
    })
}

fn kubelet_configuration() -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{PKI}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{PKI}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{PKI}/kubelet.key"),
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "clusterDNS": DNS,
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        // Both nodes share one kernel, and maybe its old cgroups: no accounting per class of pods.
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        // The disk is this machine's: how full it is says nothing about the node.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "syncFrequency": "5s",
    })
}

fn proxy_configuration(node: Node) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": "/etc/kubernetes/proxy.conf"},
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": node.name(),
        // These would be set for the whole machine.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn cluster() -> Cluster {
        Cluster { name: "dev".to_owned(), number: 4, folder: PathBuf::from("/clusters/dev") }
    }

    #[test]
    fn the_control_plane_is_on_one_node() {
        let names = |node| components(&cluster(), node).iter().map(|component| component.name).collect::<Vec<_>>();
        assert_eq!(names(Node::B), ["kubelet", "kube-proxy"]);
        assert_eq!(
            names(Node::A),
            ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"]
        );
    }

    #[test]
    fn nodes_and_pods_have_both_families() {
        let kubelet = kubelet(&cluster(), Node::B);
        assert!(kubelet.arguments.contains(&"--node-ip=10.123.4.3,fd00:10:123:4::3".to_owned()), "{kubelet:?}");
        for (node, plugin) in [(Node::A, "bridge"), (Node::B, "ptp")] {
            let chain = network_plugins(node);
            assert_eq!(chain["plugins"][0]["type"], plugin);
            let ranges = &chain["plugins"][0]["ipam"]["ranges"];
            assert_eq!([&ranges[0][0]["subnet"], &ranges[1][0]["subnet"]], node.pods().each_ref());
        }
    }
}
