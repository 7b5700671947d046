//! Which addresses serve a Service, chosen as kube-proxy chooses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use manifests::Kind;
use mesh::{
    Canonical, EndpointPort, PodUid, Reach, Service, ServiceName, ServicePort, Speaks, Uncaptured, Workload,
    WorkloadUid,
};

use super::cluster::Cluster;
use super::facts::Name;
use super::{CLUSTER_DOMAIN, Views};
use crate::problem::Problem;

/// For each usable address, the ports under which it serves.
pub(crate) type Usable = BTreeMap<IpAddr, Vec<EndpointPort>>;

/// The name on the stream of a Service.
pub(crate) fn service_name(name: &Name) -> ServiceName {
    ServiceName {
        namespace: name.namespace.as_str().into(),
        hostname: format!("{}.{}.svc.{CLUSTER_DOMAIN}", name.name, name.namespace).into(),
    }
}

/// The usable endpoints of a Service. Per port: those that are ready, or, where none is, those that still serve while
/// they shut down; for a Service whose traffic stays on the node, per node.
pub(crate) fn usable(cluster: &Cluster, name: &Name) -> Usable {
    let mut usable = Usable::new();
    let Some(service) = cluster.services.get(name) else { return usable };
    for service_port in &service.ports {
        let candidates: Vec<_> = cluster
            .slices_of(name)
            .flat_map(|slice| slice.ports.iter().map(move |port| (slice, port)))
            .filter(|(_, port)| port.name == service_port.name)
            .flat_map(|(slice, port)| slice.endpoints.iter().map(move |endpoint| (endpoint, port.port)))
            .collect();
        let pool = |node: &str| if service.reach == Reach::Node { node.to_owned() } else { String::new() };
        let ready = candidates.iter().filter(|(endpoint, _)| endpoint.ready);
        let pools_with_ready: BTreeSet<_> = ready.map(|(endpoint, _)| pool(&endpoint.node)).collect();
        for (endpoint, target_port) in candidates {
            let stands_in = endpoint.serving_to_the_end && !pools_with_ready.contains(&pool(&endpoint.node));
            if !endpoint.ready && !stands_in {
                continue;
            }
            for address in &endpoint.addresses {
                let ports = usable.entry(*address).or_default();
                if !ports.iter().any(|port| port.service_port == service_port.port) {
                    ports.push(EndpointPort { service_port: service_port.port, target_port });
                }
            }
        }
    }
    // The order in which slices list things says nothing.
    usable.values_mut().for_each(|ports| ports.sort_by_key(|port| port.service_port));
    usable
}

/// The Service as nodes see it.
pub(crate) fn service(cluster: &Cluster, name: &Name, problems: &mut Vec<Problem>) -> Option<Service> {
    let facts = cluster.services.get(name)?;
    let mut addresses = Vec::new();
    for address in facts.cluster_addresses.iter().chain(&facts.external_addresses) {
        let holder = cluster.service_holding(*address);
        if !addresses.contains(address) && holder == Some(name) {
            addresses.push(*address);
            continue;
        }
        if holder != Some(name) {
            // Taking it would send another's traffic to this Service's endpoints (CVE-2020-8554).
            let owner = holder.map_or_else(|| "a pod".to_owned(), |holder| holder.as_kind(Kind::Service));
            let message = format!("address {address} belongs to {owner} and is left out; remove it");
            problems.push(Problem::error(name.as_kind(Kind::Service), message));
        }
    }
    Some(Service {
        name: service_name(name),
        addresses,
        ports: facts.ports.iter().map(|port| ServicePort { port: port.port }).collect(),
        affinity: facts.affinity,
        reach: facts.reach,
    })
}

/// The name on the stream of a workload that stands for an address.
pub(crate) fn bare_uid(address: IpAddr) -> WorkloadUid {
    format!("Kubernetes//Endpoint//{address}").as_str().into()
}

/// The workload that stands for an endpoint address that is no pod's of its own.
pub(crate) fn bare_workload(
    cluster: &Cluster,
    views: &Views,
    address: IpAddr,
    problems: &mut Vec<Problem>,
) -> Option<Workload> {
    if !cluster.owners_of(address).is_empty() {
        return None;
    }
    let endpoints = views.endpoints_at(cluster, address);
    let namespace = endpoints.first()?.service.namespace.clone();
    let on_host = cluster.is_on_host(address) || views.settings.nodes.contains(&address);
    // A pod whose object has not come yet, or an address in the pods' own ranges that nobody has: published, it would be
    // spoken to in clear. Left out, it is unknown, and unknown is asked about and refused.
    let is_inside = views.settings.inside.iter().any(|range| range.contains(&address));
    let awaited = cluster.slices_naming(address).any(|(_, slice)| slice.names_pod_at(address));
    if !on_host && (is_inside || awaited) {
        for (name, _) in cluster.slices_naming(address).filter(|_| !awaited) {
            let message = format!(
                "endpoint {address} is in the cluster's own ranges and no pod has that address; it is left out, \
                 correct it"
            );
            problems.push(Problem::error(name.as_kind(Kind::EndpointSlice), message));
        }
        return None;
    }
    let identity = identity::SpiffeId::new(cluster.trust_domain(), &namespace, "none").ok()?;
    Some(Workload {
        uid: bare_uid(address),
        pod_uid: PodUid::from(""),
        name: address.to_string().into(),
        canonical: Canonical::of(&address.to_string()),
        namespace,
        identity,
        addresses: vec![address],
        node: "".into(),
        speaks: Speaks::Nothing,
        uncaptured: Some(if on_host { Uncaptured::HostNetwork } else { Uncaptured::NotAPod }),
        modes: Default::default(),
        endpoints,
        network_rules: 0,
        policies: Vec::new(),
    })
}
