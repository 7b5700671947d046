//! The wires: a fabric with a bridge, the control plane's place and the nodes on it, and pods routed
//! behind their nodes as the `ptp` CNI plugin does it.
//!
//! ```text
//!     outside 203.0.113.1          the box's own namespace: bridge "fabric", 10.88.0.1
//!        ├── control   10.88.0.2
//!        ├── node-a    10.88.0.10   pods 10.88.16.0/24, gateway 10.88.16.1
//!        └── node-b    10.88.0.11   pods 10.88.17.0/24, gateway 10.88.17.1
//! ```
//! and the same for IPv6.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use linux::links::{LinkError, Links};
use linux::netns::{NetNs, NetNsError};

const BRIDGE: &str = "fabric";

/// An address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Addresses {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Addresses {
    pub(crate) fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// As networks of that single address.
    fn hosts(self) -> [IpNet; 2] {
        self.both().map(IpNet::from)
    }
}

/// Where a node stands and which addresses its pods have. Nodes are numbered from 0.
#[derive(Clone, Debug)]
pub(crate) struct NodePlan {
    pub(crate) name: String,
    pub(crate) fabric: Addresses,
    pub(crate) pods_v4: Ipv4Net,
    pub(crate) pods_v6: Ipv6Net,
    /// The node as its pods see it: their gateway and name server.
    pub(crate) gateway: Addresses,
}

/// The plan of the node with this number.
pub(crate) fn node_plan(number: u8) -> NodePlan {
    let pods = 16 + number;
    let hextet = 0x10 * u16::from(pods / 10) + u16::from(pods % 10); // fd88:16:: belongs to 10.88.16.0
    NodePlan {
        name: format!("node-{}", char::from(b'a' + number)),
        fabric: fabric_address(10 + number),
        pods_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 88, pods, 0), 24),
        pods_v6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd88, hextet, 0, 0, 0, 0, 0, 0), 64),
        gateway: Addresses { v4: Ipv4Addr::new(10, 88, pods, 1), v6: Ipv6Addr::new(0xfd88, hextet, 0, 0, 0, 0, 0, 1) },
    }
}

/// The control plane's address on the fabric.
pub(crate) fn control_address() -> Addresses {
    fabric_address(2)
}

/// The Services' networks, both families.
pub(crate) fn service_networks() -> [IpNet; 2] {
    [
        Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0), 108).into(),
    ]
}

/// An address outside of the cluster that answers: programs run there with `exec --node outside`.
pub(crate) const OUTSIDE: Addresses =
    Addresses { v4: Ipv4Addr::new(203, 0, 113, 1), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1) };

fn fabric_address(host: u8) -> Addresses {
    let hextet = 0x10 * u16::from(host / 10) + u16::from(host % 10);
    Addresses { v4: Ipv4Addr::new(10, 88, 0, host), v6: Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, hextet) }
}

/// Why the network could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    #[error("cannot make {path}: {source}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("the setting {name} is not one of a network namespace: only those that begin with `net.` are a pod's own")]
    Sysctl { name: String },
}

/// The box's network namespaces, without those of pods.
#[derive(Debug)]
pub(crate) struct Network {
    directory: PathBuf,
    outside: NetNs,
    control: NetNs,
    nodes: Vec<(NodePlan, NetNs)>,
}

impl Network {
    /// Makes fabric, control and nodes. The calling thread's namespace becomes the fabric. Namespaces
    /// are bound below `directory`.
    pub(crate) fn build(directory: &Path, plans: Vec<NodePlan>) -> Result<Network, NetworkError> {
        fs::create_dir_all(directory)
            .map_err(|source| NetworkError::Directory { path: directory.to_owned(), source })?;
        let outside = NetNs::current()?;
        let mut fabric = Links::of(&outside)?;
        fabric.up("lo")?;
        for address in OUTSIDE.hosts() {
            fabric.add_address("lo", address)?;
        }
        forward(&fabric)?;
        fabric.add_bridge(BRIDGE)?;
        fabric.up(BRIDGE)?;
        for address in fabric_networks(fabric_address(1)) {
            fabric.add_address(BRIDGE, address)?;
        }

        let control = connect(&mut fabric, directory, "control", control_address())?;
        let mut nodes = Vec::new();
        for plan in plans {
            let namespace = connect(&mut fabric, directory, &plan.name, plan.fabric)?;
            nodes.push((plan, namespace));
        }
        let network = Network { directory: directory.to_owned(), outside, control, nodes };
        network.route_between_nodes()?;
        Ok(network)
    }

    /// Every node (and the fabric) learns where the pods of the other nodes are.
    fn route_between_nodes(&self) -> Result<(), NetworkError> {
        for (plan, namespace) in &self.nodes {
            let mut links = Links::of(namespace)?;
            forward(&links)?;
            for address in plan.gateway.hosts() {
                // On `lo`, so that it is there before the first pod is.
                links.add_address("lo", address)?;
            }
            self.route_to_pods(&mut links, "eth0", Some(&plan.name))?;
            links.wait_operational("eth0")?;
        }
        let mut fabric = Links::of(&self.outside)?;
        self.route_to_pods(&mut fabric, BRIDGE, None)?;
        fabric.wait_operational(BRIDGE)?;
        Ok(())
    }

    fn route_to_pods(&self, links: &mut Links<'_>, out: &str, but: Option<&str>) -> Result<(), LinkError> {
        for (plan, _) in self.nodes.iter().filter(|(plan, _)| Some(plan.name.as_str()) != but) {
            links.add_route(plan.pods_v4.into(), Some(plan.fabric.v4.into()), out)?;
            links.add_route(plan.pods_v6.into(), Some(plan.fabric.v6.into()), out)?;
        }
        Ok(())
    }

    /// Where the control plane is.
    pub(crate) fn control(&self) -> &NetNs {
        &self.control
    }

    /// Where a node is.
    pub(crate) fn node(&self, name: &str) -> Option<&NetNs> {
        self.nodes.iter().find(|(plan, _)| plan.name == name).map(|(_, namespace)| namespace)
    }

    /// Every node with its namespace.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&NodePlan, &NetNs)> {
        self.nodes.iter().map(|(plan, namespace)| (plan, namespace))
    }

    /// Every place by its name: the nodes, `control`, and `outside`.
    pub(crate) fn place(&self, name: &str) -> Option<&NetNs> {
        match name {
            "control" => Some(&self.control),
            "outside" => Some(&self.outside),
            _ => self.node(name),
        }
    }

    /// Makes a pod's namespace, wired to its node and ready for packets of both families.
    pub(crate) fn add_pod(&self, uid: &str, node: &str, pod: Addresses) -> Result<PodNetwork, NetworkError> {
        let (plan, node) = self
            .nodes
            .iter()
            .find(|(plan, _)| plan.name == node)
            .ok_or_else(|| LinkError::NoSuchLink(node.to_owned()))?;
        let path = self.directory.join(uid);
        let namespace = NetNs::create_at(&path)?;
        let made = PodNetwork { namespace, path, node: plan.name.clone(), outer: outer_name(pod) };
        match wire_pod(plan, node, pod, &made) {
            Ok(()) => Ok(made),
            Err(error) => {
                self.remove_pod(&made)?;
                Err(error.into())
            }
        }
    }

    /// Takes a pod's wire away and forgets its namespace, which goes with its last process.
    pub(crate) fn remove_pod(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        if let Some(node) = self.node(&pod.node) {
            Links::of(node)?.remove(&pod.outer)?;
        }
        NetNs::remove_at(&pod.path).map_err(|source| NetworkError::Directory { path: pod.path.clone(), source })
    }
}

/// A pod's network namespace and its wire.
#[derive(Debug)]
pub(crate) struct PodNetwork {
    pub(crate) namespace: NetNs,
    /// Where the namespace is bound.
    pub(crate) path: PathBuf,
    node: String,
    /// The name of the node's end of the wire.
    outer: String,
}

fn wire_pod(plan: &NodePlan, node: &NetNs, pod: Addresses, made: &PodNetwork) -> Result<(), LinkError> {
    let outer = made.outer.as_str();
    let mut inside = Links::of(&made.namespace)?;
    let mut outside = Links::of(node)?;
    outside.add_veth(outer, "eth0", &made.namespace)?;
    for address in plan.gateway.hosts() {
        outside.add_address(outer, address)?;
    }
    outside.up(outer)?;
    inside.up("lo")?;
    inside.up("eth0")?;
    for address in pod.hosts() {
        outside.add_route(address, None, outer)?;
        inside.add_address("eth0", address)?;
    }
    for (gateway, all) in plan.gateway.hosts().into_iter().zip(everywhere()) {
        inside.add_route(gateway, None, "eth0")?;
        inside.add_route(all, Some(gateway.addr()), "eth0")?;
    }
    strict_reverse_path(&inside)?;
    // What container runtimes set: ports below 1024 without root.
    inside.set("net/ipv4/ip_unprivileged_port_start", "0")?;
    inside.wait_operational("eth0")?;
    outside.wait_operational(outer)
}

impl PodNetwork {
    /// Writes one of `securityContext.sysctls`, named as the `sysctl` program names it, with dots.
    pub(crate) fn set(&self, name: &str, value: &str) -> Result<(), NetworkError> {
        if !name.starts_with("net.") || name.contains('/') {
            return Err(NetworkError::Sysctl { name: name.to_owned() });
        }
        Ok(Links::of(&self.namespace)?.set(&name.replace('.', "/"), value)?)
    }
}

/// The node's end is named after the pod's address: unique, and telling in `tcpdump -i any`.
fn outer_name(pod: Addresses) -> String {
    let [_, _, c, d] = pod.v4.octets();
    format!("pod-{c}-{d}")
}

fn connect(fabric: &mut Links<'_>, directory: &Path, name: &str, address: Addresses) -> Result<NetNs, NetworkError> {
    let namespace = NetNs::create_at(&directory.join(name))?;
    fabric.add_veth(name, "eth0", &namespace)?;
    fabric.attach(name, BRIDGE)?;
    fabric.up(name)?;
    let mut links = Links::of(&namespace)?;
    links.up("lo")?;
    for network in fabric_networks(address) {
        links.add_address("eth0", network)?;
    }
    links.up("eth0")?;
    for (all, gateway) in everywhere().into_iter().zip(fabric_address(1).both()) {
        links.add_route(all, Some(gateway), "eth0")?;
    }
    links.wait_operational("eth0")?;
    Ok(namespace)
}

/// An address together with the fabric's prefix.
fn fabric_networks(address: Addresses) -> [IpNet; 2] {
    [Ipv4Net::new_assert(address.v4, 24).into(), Ipv6Net::new_assert(address.v6, 64).into()]
}

fn everywhere() -> [IpNet; 2] {
    [Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(), Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()]
}

fn forward(links: &Links<'_>) -> Result<(), LinkError> {
    links.set("net/ipv4/ip_forward", "1")?;
    links.set("net/ipv6/conf/all/forwarding", "1")
}

/// The strictest setting, as a machine may have it: nothing of ours may need it off. Said explicitly,
/// because a new namespace inherits whatever the machine has.
fn strict_reverse_path(links: &Links<'_>) -> Result<(), LinkError> {
    for interface in ["all", "default", "lo", "eth0"] {
        links.set(&format!("net/ipv4/conf/{interface}/rp_filter"), "1")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_pods_and_services_have_the_documented_addresses() {
        let (a, b) = (node_plan(0), node_plan(1));
        assert_eq!((a.name.as_str(), b.name.as_str()), ("node-a", "node-b"));
        assert_eq!(a.fabric.both().map(|ip| ip.to_string()), ["10.88.0.10", "fd88::10"]);
        assert_eq!(b.fabric.both().map(|ip| ip.to_string()), ["10.88.0.11", "fd88::11"]);
        assert_eq!(b.gateway.both().map(|ip| ip.to_string()), ["10.88.17.1", "fd88:17::1"]);
    }
}
