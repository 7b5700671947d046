//! A small mesh in words. Each pod's name is its UID, too; its number is in its addresses.

use std::net::{IpAddr, SocketAddr};

use identity::SpiffeId;
use mesh::{
    Affinity, Canonical, Endpoint, EndpointPort, MeshSettings, Mode, Modes, PodUid, PolicyName, Reach, Resource,
    Service, ServiceName, ServicePort, Speaks, Uncaptured, View, Workload, WorkloadUid,
};

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn id(namespace: &str, account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()
}

pub(crate) fn service_name(name: &str) -> ServiceName {
    format!("shop/{name}.shop.svc.cluster.local").parse().unwrap()
}

pub(crate) fn policy_name(text: &str) -> PolicyName {
    let (namespace, name) = text.split_once('/').unwrap();
    PolicyName { namespace: namespace.into(), name: name.into() }
}

/// A captured pod `shop/name` on node-a, at 10.0.0.number and fd00::number.
pub(crate) fn pod(name: &str, number: u8) -> Workload {
    Workload {
        uid: WorkloadUid::from(format!("Kubernetes//Pod/shop/{name}").as_str()),
        pod_uid: PodUid::from(name),
        name: name.into(),
        canonical: Canonical::of(name),
        namespace: "shop".into(),
        identity: id("shop", name),
        addresses: vec![IpAddr::from([10, 0, 0, number]), ip(&format!("fd00::{number}"))],
        node: "node-a".into(),
        speaks: Speaks::JustMtls,
        uncaptured: None,
        modes: Modes::default(),
        endpoints: vec![],
        network_rules: 0,
        policies: vec![],
    }
}

pub(crate) fn uncaptured(mut pod: Workload, why: Uncaptured) -> Workload {
    pod.speaks = Speaks::Nothing;
    pod.uncaptured = Some(why);
    pod
}

/// Strict on all ports but one, or permissive on all ports but one.
pub(crate) fn with_modes(mut pod: Workload, default: Mode, port: u16) -> Workload {
    let other = if default == Mode::Strict { Mode::Permissive } else { Mode::Strict };
    pod.modes = Modes { default, ports: [(port, other)].into() };
    pod
}

pub(crate) fn serving(mut pod: Workload, service: &str, service_port: u16, target_port: u16) -> Workload {
    let ports = vec![EndpointPort { service_port, target_port }];
    pod.endpoints.push(Endpoint { service: service_name(service), ports });
    pod
}

pub(crate) fn on_node(mut pod: Workload, node: &str) -> Workload {
    pod.node = node.into();
    pod
}

/// A Service at 10.96.0.number and fd96::number.
pub(crate) fn service(name: &str, number: u8, port: u16) -> Service {
    Service {
        name: service_name(name),
        addresses: vec![IpAddr::from([10, 96, 0, number]), ip(&format!("fd96::{number}"))],
        ports: vec![ServicePort { port }],
        affinity: Affinity::None,
        reach: Reach::Cluster,
    }
}

pub(crate) fn settings() -> MeshSettings {
    MeshSettings {
        inside: ["10.0.0.0/16", "10.96.0.0/16", "fd00::/64", "fd96::/108"].map(|range| range.parse().unwrap()).into(),
        mixed: vec!["172.16.0.0/12".parse().unwrap()],
        // One in the pods' own range: it is a node all the same.
        nodes: vec![ip("192.0.2.10"), ip("10.0.255.1")],
        ..MeshSettings::default()
    }
}

pub(crate) fn view(workloads: impl IntoIterator<Item = Workload>, services: impl IntoIterator<Item = Service>) -> View {
    let mut view = View::default();
    view.apply(Resource::Settings(settings()));
    for workload in workloads {
        view.apply(Resource::Workload(Box::new(workload)));
    }
    for service in services {
        view.apply(Resource::Service(service));
    }
    view
}
