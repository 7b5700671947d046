//! Every resource through the wire and back, what is refused, and the two ends of the protocol against each other.

mod protocol;
mod translation;

use identity::SpiffeId;
use mesh::{
    Action, Affinity, Canonical, Clause, Endpoint, EndpointPort, Match, MeshSettings, Mode, Modes, PodUid, Policy,
    PolicyName, Probes, Reach, Rule, Scope, Service, ServiceAccountMatch, ServicePort, Speaks, StringMatch, Uncaptured,
    Workload, WorkloadUid,
};
use proptest::prelude::*;

use super::{NodePod, Resource};

const NAME: &str = "[a-z][a-z0-9-]{0,8}";

fn id() -> impl Strategy<Value = SpiffeId> {
    (NAME, NAME, NAME).prop_map(|(domain, namespace, account)| {
        format!("spiffe://{domain}/ns/{namespace}/sa/{account}").parse().unwrap()
    })
}

fn uncaptured() -> impl Strategy<Value = Uncaptured> {
    prop_oneof![
        Just(Uncaptured::Pending),
        Just(Uncaptured::OptedOut),
        Just(Uncaptured::HostNetwork),
        Just(Uncaptured::SystemNamespace),
        Just(Uncaptured::NotAPod),
    ]
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Permissive), Just(Mode::Strict)]
}

fn port() -> impl Strategy<Value = u16> {
    1..=u16::MAX
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let ports = prop::collection::vec((port(), port()), 0..3);
    (NAME, NAME, ports).prop_map(|(namespace, hostname, ports)| Endpoint {
        service: format!("{namespace}/{hostname}.svc").parse().unwrap(),
        ports: ports
            .into_iter()
            .map(|(service_port, target_port)| EndpointPort { service_port, target_port })
            .collect(),
    })
}

fn policy_name() -> impl Strategy<Value = PolicyName> {
    (NAME, NAME).prop_map(|(namespace, name)| PolicyName { namespace: namespace.into(), name: name.into() })
}

fn workload() -> impl Strategy<Value = Workload> {
    let modes = (mode(), prop::collection::btree_map(port(), mode(), 0..4));
    let lists = (
        prop::collection::vec(any::<std::net::IpAddr>(), 0..3),
        // On the wire they are a map by Service.
        prop::collection::btree_map(NAME, endpoint(), 0..3),
        prop::collection::vec(policy_name(), 0..3),
    );
    let capture = prop::option::of(uncaptured());
    let numbers = (lists, any::<u64>());
    (NAME, NAME, id(), capture, modes, numbers).prop_map(|(name, node, identity, uncaptured, modes, numbers)| {
        let ((addresses, endpoints, policies), network_rules) = numbers;
        let mut endpoints: Vec<Endpoint> = endpoints.into_values().collect();
        endpoints.sort_by_key(|endpoint| endpoint.service.to_string());
        endpoints.dedup_by(|a, b| a.service == b.service);
        Workload {
            uid: WorkloadUid::from(format!("Kubernetes//Pod/{}/{name}", identity.namespace()).as_str()),
            pod_uid: PodUid::from(format!("uid-{name}").as_str()),
            canonical: Canonical { revision: "v2".into(), service: "shop".into(), ..Canonical::of(&name) },
            name: name.into(),
            namespace: identity.namespace().into(),
            identity,
            addresses,
            node: node.into(),
            speaks: if uncaptured.is_none() { Speaks::JustMtls } else { Speaks::Nothing },
            uncaptured,
            modes: Modes { default: modes.0, ports: modes.1 },
            endpoints,
            network_rules,
            policies,
        }
    })
}

fn service() -> impl Strategy<Value = Service> {
    let addresses = prop::collection::vec(any::<std::net::IpAddr>(), 0..3);
    let ports = prop::collection::vec(port(), 0..3);
    (NAME, NAME, addresses, ports, any::<bool>(), any::<bool>()).prop_map(
        |(namespace, name, addresses, ports, sticky, local)| Service {
            name: format!("{namespace}/{name}.{namespace}.svc.cluster.local").parse().unwrap(),
            addresses,
            ports: ports.into_iter().map(|port| ServicePort { port }).collect(),
            affinity: if sticky { Affinity::ClientIp } else { Affinity::None },
            reach: if local { Reach::Node } else { Reach::Cluster },
        },
    )
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        NAME.prop_map(StringMatch::Exact),
        NAME.prop_map(StringMatch::Prefix),
        NAME.prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

fn range() -> impl Strategy<Value = ipnet::IpNet> {
    any::<std::net::IpAddr>().prop_flat_map(|address| {
        let most = if address.is_ipv4() { 32 } else { 128 };
        (0u8..=most).prop_map(move |length| ipnet::IpNet::new(address, length).unwrap())
    })
}

fn conditions() -> impl Strategy<Value = Match> {
    let strings = || prop::collection::vec(string_match(), 0..2);
    let ranges = || prop::collection::vec(range(), 0..2);
    let ports = || prop::collection::vec(port(), 0..2);
    let accounts = || {
        let account =
            (NAME, NAME).prop_map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account });
        prop::collection::vec(account, 0..2)
    };
    let positive = (strings(), strings(), accounts(), ranges(), ranges(), ports());
    let negative = (strings(), strings(), accounts(), ranges(), ranges(), ports());
    (positive, negative).prop_map(|(is, not)| Match {
        namespaces: is.0,
        principals: is.1,
        service_accounts: is.2,
        source_ips: is.3,
        destination_ips: is.4,
        destination_ports: is.5,
        not_namespaces: not.0,
        not_principals: not.1,
        not_service_accounts: not.2,
        not_source_ips: not.3,
        not_destination_ips: not.4,
        not_destination_ports: not.5,
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let clause = prop::collection::vec(conditions(), 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let scope = prop_oneof![Just(Scope::Mesh), Just(Scope::Namespace), Just(Scope::Selected)];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    (policy_name(), scope, action, prop::collection::vec(rule, 0..3)).prop_map(|(name, scope, action, rules)| Policy {
        name,
        scope,
        action,
        rules,
    })
}

fn settings() -> impl Strategy<Value = MeshSettings> {
    let ranges = || prop::collection::vec(range(), 0..3);
    (ranges(), ranges(), prop::collection::vec(any::<std::net::IpAddr>(), 0..3), ranges(), 1..=u32::MAX).prop_map(
        |(inside, mixed, nodes, api_servers, milliseconds)| {
            let view_lifetime = std::time::Duration::from_millis(milliseconds.into());
            MeshSettings { inside, mixed, nodes, api_servers, view_lifetime }
        },
    )
}

fn node_pod() -> impl Strategy<Value = NodePod> {
    let why_not = uncaptured().prop_filter("pending is no reason", |why| *why != Uncaptured::Pending);
    let lists = (prop::collection::vec(any::<std::net::IpAddr>(), 0..3), prop::collection::vec(port(), 0..3));
    (NAME, id(), prop::option::of(why_not), any::<bool>(), lists).prop_map(
        |(name, identity, why_not, release, lists)| NodePod {
            pod: PodUid::from(format!("uid-{name}").as_str()),
            namespace: identity.namespace().to_owned(),
            name,
            identity,
            addresses: lists.0,
            release: release && why_not.is_some(),
            capture: why_not.map_or(Ok(()), Err),
            excluded_ports: lists.1,
            probes: crate::probe::tests::probes(),
        },
    )
}

fn resource() -> impl Strategy<Value = Resource> {
    prop_oneof![
        workload().prop_map(|workload| Resource::Mesh(mesh::Resource::Workload(Box::new(workload)))),
        service().prop_map(|service| Resource::Mesh(mesh::Resource::Service(service))),
        policy().prop_map(|policy| Resource::Mesh(mesh::Resource::Policy(policy))),
        settings().prop_map(|settings| Resource::Mesh(mesh::Resource::Settings(settings))),
        node_pod().prop_map(Resource::NodePod),
    ]
}

/// A pod without anything special.
fn pod(name: &str) -> Resource {
    Resource::NodePod(NodePod {
        pod: PodUid::from(name),
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
        addresses: vec![],
        capture: Ok(()),
        release: false,
        excluded_ports: vec![],
        probes: Probes::default(),
    })
}
