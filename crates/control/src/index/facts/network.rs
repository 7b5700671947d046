//! Nodes, Services and EndpointSlices.

use std::net::IpAddr;

use ipnet::IpNet;
use manifests::Kind;
use manifests::k8s_openapi::api::core::v1 as core;
use manifests::k8s_openapi::api::discovery::v1 as discovery;
use mesh::{Affinity, Reach};

use super::{Age, Name, addresses};
use crate::problem::{Problem, quoted};

/// The label by which an EndpointSlice names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// A machine of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Node {
    /// The ranges that its pods' addresses come from.
    pub(crate) pod_ranges: Vec<IpNet>,
    pub(crate) addresses: Vec<IpAddr>,
    /// By which pods of other nodes see it where an overlay carries its packets.
    pub(crate) overlay: Vec<IpAddr>,
}

/// Where networks write down by which address a node shows itself in their overlay (Calico, `node/pkg/allocateip`; Cilium,
/// `pkg/annotation`).
const OVERLAY: [&str; 7] = [
    "projectcalico.org/IPv4IPIPTunnelAddr",
    "projectcalico.org/IPv4VXLANTunnelAddr",
    "projectcalico.org/IPv6VXLANTunnelAddr",
    "projectcalico.org/IPv4WireguardInterfaceAddr",
    "projectcalico.org/IPv6WireguardInterfaceAddr",
    "network.cilium.io/ipv4-cilium-host",
    "network.cilium.io/ipv6-cilium-host",
];
/// Flannel gives its device the first address of the node's range, where it has one.
const FLANNEL: (&str, &str) = ("flannel.alpha.coreos.com/backend-type", "host-gw");

impl Node {
    pub(crate) fn read(node: &core::Node, problems: &mut Vec<Problem>) -> Self {
        let object = format!("{} {}", Kind::Node, node.metadata.name.as_deref().unwrap_or_default());
        let spec = node.spec.as_ref();
        let ranges = spec.and_then(|spec| spec.pod_cidrs.as_ref()).into_iter().flatten();
        let first = spec.and_then(|spec| spec.pod_cidr.as_ref()).into_iter().filter(|range| !range.is_empty());
        let mut pod_ranges = Vec::new();
        for text in first.chain(ranges) {
            match text.parse::<IpNet>() {
                Ok(range) if !pod_ranges.contains(&range) => pod_ranges.push(range),
                Ok(_) => {}
                Err(_) => problems.push(Problem::error(
                    &object,
                    format!("field spec.podCIDRs: {} is not a range and is left out; correct it", quoted(text)),
                )),
            }
        }
        // Besides addresses there are names (Hostname, InternalDNS), which nobody dials from.
        let listed = node.status.as_ref().and_then(|status| status.addresses.as_ref()).into_iter().flatten();
        let listed = listed.filter(|address| address.type_.ends_with("IP")).map(|address| address.address.as_str());
        let annotation = |key: &str| node.metadata.annotations.as_ref()?.get(key).map(String::as_str);
        let annotated = OVERLAY.iter().filter_map(|key| annotation(key)).filter(|text| !text.is_empty());
        let mut overlay = addresses(annotated, &object, "metadata.annotations", problems);
        if annotation(FLANNEL.0).is_some_and(|backend| backend != FLANNEL.1) {
            overlay.extend(pod_ranges.iter().map(IpNet::network));
        }
        let addresses = addresses(listed, &object, "status.addresses", problems);
        Self { pod_ranges, addresses, overlay }
    }
}

/// A TCP port with the name by which Services and slices find each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TcpPort {
    pub(crate) name: String,
    pub(crate) port: u16,
}

impl TcpPort {
    /// `None` for a port of another protocol: what is not TCP is not captured.
    fn read(name: Option<&String>, port: i32, protocol: Option<&String>) -> Option<Self> {
        let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
        let is_tcp = protocol.is_none_or(|protocol| protocol == "TCP");
        is_tcp.then(|| Self { name: name.cloned().unwrap_or_default(), port })
    }
}

/// A Service that has addresses, or endpoints, or both.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Service {
    pub(crate) age: Age,
    /// Given by the cluster: nobody else can have them.
    pub(crate) cluster_addresses: Vec<IpAddr>,
    /// Claimed by the Service's author, or given by a load balancer.
    pub(crate) external_addresses: Vec<IpAddr>,
    pub(crate) ports: Vec<TcpPort>,
    pub(crate) affinity: Affinity,
    pub(crate) reach: Reach,
}

impl Service {
    /// The Service, or `None` where it is only an alias of a name.
    pub(crate) fn read(service: &core::Service, problems: &mut Vec<Problem>) -> Option<Self> {
        let object = Name::of_metadata(&service.metadata).as_kind(Kind::Service);
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            // Connections are judged by the address that the name resolves to.
            return None;
        }
        let real = |address: &&String| !address.is_empty() && *address != "None";
        let first = spec.cluster_ip.iter();
        let cluster = first.chain(spec.cluster_ips.iter().flatten()).filter(real).map(String::as_str);
        let cluster_addresses = addresses(cluster, &object, "spec.clusterIPs", problems);
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        let mut external_addresses = addresses(external, &object, "spec.externalIPs", problems);
        let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        // With `ipMode: Proxy` the balancer itself must see the connection, so its address is not one of the cluster.
        let ingress = balancer.into_iter().flat_map(|balancer| balancer.ingress.iter().flatten());
        let ingress = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
        let ingress = ingress.filter_map(|ingress| ingress.ip.as_deref()).filter(|ip| !ip.is_empty());
        external_addresses.extend(addresses(ingress, &object, "status.loadBalancer.ingress", problems));
        let ports = spec.ports.iter().flatten();
        Some(Self {
            age: Age::of(&service.metadata),
            cluster_addresses,
            external_addresses,
            ports: ports
                .filter_map(|port| TcpPort::read(port.name.as_ref(), port.port, port.protocol.as_ref()))
                .collect(),
            affinity: match spec.session_affinity.as_deref() {
                Some("ClientIP") => Affinity::ClientIp,
                _ => Affinity::None,
            },
            reach: match spec.internal_traffic_policy.as_deref() {
                Some("Local") => Reach::Node,
                _ => Reach::Cluster,
            },
        })
    }
}

/// Some of the endpoints of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Slice {
    pub(crate) service: Name,
    pub(crate) ports: Vec<TcpPort>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

/// One endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SliceEndpoint {
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ready: bool,
    /// Still answers while it shuts down: used where nothing is ready, as kube-proxy does.
    pub(crate) serving_to_the_end: bool,
    pub(crate) node: String,
    /// Whether it says to be a pod.
    pub(crate) is_pod: bool,
}

impl Slice {
    /// The slice, or `None` where it belongs to no Service or has no addresses.
    pub(crate) fn read(slice: &discovery::EndpointSlice, problems: &mut Vec<Problem>) -> Option<Self> {
        let name = Name::of_metadata(&slice.metadata);
        let object = name.as_kind(Kind::EndpointSlice);
        let service = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_LABEL))?;
        if slice.address_type == "FQDN" {
            let message = "has names instead of addresses (addressType FQDN), and is left out as kube-proxy does";
            problems.push(Problem::warning(&object, message));
            return None;
        }
        let ports = slice.ports.iter().flatten();
        let ports = ports.filter_map(|port| TcpPort::read(port.name.as_ref(), port.port?, port.protocol.as_ref()));
        let endpoint = |endpoint: &discovery::Endpoint| SliceEndpoint::read(endpoint, &object, problems);
        Some(Self {
            service: Name::new(&name.namespace, service),
            ports: ports.collect(),
            endpoints: slice.endpoints.iter().map(endpoint).collect(),
        })
    }
}

impl SliceEndpoint {
    fn read(endpoint: &discovery::Endpoint, object: &str, problems: &mut Vec<Problem>) -> Self {
        let conditions = endpoint.conditions.as_ref();
        // What is not said counts as ready, then as serving if ready, then as not terminating (the API's own defaults).
        let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
        let serving = conditions.and_then(|conditions| conditions.serving).unwrap_or(ready);
        let terminating = conditions.and_then(|conditions| conditions.terminating).unwrap_or(false);
        let target = endpoint.target_ref.as_ref().and_then(|target| target.kind.as_deref());
        let texts = endpoint.addresses.iter().map(String::as_str);
        Self {
            addresses: addresses(texts, object, "endpoints.addresses", problems),
            ready,
            serving_to_the_end: serving && terminating,
            node: endpoint.node_name.clone().unwrap_or_default(),
            is_pod: target == Some("Pod"),
        }
    }
}
