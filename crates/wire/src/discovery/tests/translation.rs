//! Resources on the wire.

use std::time::Duration;

use identity::UnixTime;
use identity::issuer::Root;
use mesh::{Mode, Reach, Speaks, Uncaptured};
use proptest::prelude::*;
use prost::Message;
use prost_types::Any;

use super::{pod, resource};
use crate::discovery::published::decode;
use crate::discovery::{Fault, Kind, Published, Resource};
use crate::proto::istio::{security, workload as istio};
use crate::proto::{envoy, v1};

fn on_the_wire(kind: Kind, name: &str, content: Vec<u8>) -> envoy::Resource {
    let resource = Any { type_url: kind.type_url().to_owned(), value: content };
    envoy::Resource { version: "1".to_owned(), resource: Some(resource), name: name.to_owned() }
}

fn fault(kind: Kind, name: &str, content: Vec<u8>) -> Option<Fault> {
    decode(kind, &on_the_wire(kind, name, content)).err().map(|malformed| malformed.fault)
}

const UID: &str = "Kubernetes//Pod/shop/web";

fn a_workload(change: impl FnOnce(&mut istio::Workload)) -> Vec<u8> {
    let mut workload = istio::Workload {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        service_account: "web".to_owned(),
        uid: UID.to_owned(),
        ..Default::default()
    };
    change(&mut workload);
    istio::Address { r#type: Some(istio::address::Type::Workload(workload)) }.encode_to_vec()
}

fn with_extension(extension: v1::WorkloadExtension) -> Vec<u8> {
    a_workload(|workload| {
        let type_url = "type.googleapis.com/justmtls.v1.WorkloadExtension".to_owned();
        let config = Some(Any { type_url, value: extension.encode_to_vec() });
        workload.extensions.push(istio::Extension { name: "justmtls.v1.WorkloadExtension".to_owned(), config });
    })
}

fn read_workload(content: Vec<u8>) -> mesh::Workload {
    match decode(Kind::Address, &on_the_wire(Kind::Address, UID, content)).unwrap() {
        Resource::Mesh(mesh::Resource::Workload(workload)) => *workload,
        other => panic!("{other:?}"),
    }
}

fn a_service(change: impl FnOnce(&mut istio::Service)) -> Vec<u8> {
    let mut service = istio::Service {
        namespace: "shop".to_owned(),
        hostname: "web.shop.svc.cluster.local".to_owned(),
        ..Default::default()
    };
    change(&mut service);
    istio::Address { r#type: Some(istio::address::Type::Service(service)) }.encode_to_vec()
}

proptest! {
    #[test]
    fn every_resource_survives_the_wire(resource in resource()) {
        let published = Published::new(&resource);
        prop_assert_eq!(published.kind(), resource.kind());
        prop_assert_eq!(decode(resource.kind(), &published.to_proto()), Ok(resource));
    }

    #[test]
    fn versions_are_equal_where_contents_are(one in resource(), other in resource()) {
        let [first, again, second] = [&one, &one.clone(), &other].map(Published::new);
        prop_assert_eq!(first.version(), again.version());
        if one.kind() == other.kind() {
            prop_assert_eq!(first.version() == second.version(), one == other);
        }
    }

    #[test]
    fn arbitrary_content_never_panics(content in prop::collection::vec(any::<u8>(), 0..300), cut in any::<u16>(),
                                      resource in resource()) {
        for kind in Kind::ALL {
            let _ = decode(*kind, &on_the_wire(*kind, "name", content.clone()));
        }
        // And what was a resource until it was cut and spoilt.
        let mut proto = Published::new(&resource).to_proto();
        if let Some(any) = &mut proto.resource && !any.value.is_empty() {
            let at = usize::from(cut) % any.value.len();
            any.value[at] = content.first().copied().unwrap_or_default();
            let _ = decode(resource.kind(), &proto);
        }
    }
}

#[test]
fn a_trust_bundle_survives_the_wire_and_a_root_that_is_none_is_refused() {
    let now = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
    let root = Root::generate(&"cluster.local".parse().unwrap(), now, Duration::from_secs(86_400)).unwrap();
    let resource = Resource::Bundle(root.bundle().unwrap());
    let proto = Published::new(&resource).to_proto();
    assert_eq!(decode(Kind::Bundle, &proto), Ok(resource));
    let bad = v1::TrustBundle { trust_domain: "cluster.local".to_owned(), roots: vec![vec![1, 2, 3]] };
    assert!(matches!(fault(Kind::Bundle, "bundle", bad.encode_to_vec()), Some(Fault::Bundle(_))));
    let none = v1::TrustBundle { trust_domain: "cluster.local".to_owned(), roots: vec![] };
    assert!(matches!(fault(Kind::Bundle, "bundle", none.encode_to_vec()), Some(Fault::Bundle(_))));
}

#[test]
fn a_workload_without_our_extension_is_strict_and_pending() {
    let workload = read_workload(a_workload(|_| {}));
    assert_eq!(workload.modes.at(80), Mode::Strict);
    assert_eq!((workload.speaks, workload.uncaptured), (Speaks::Nothing, Some(Uncaptured::Pending)));
}

#[test]
fn a_mode_that_is_not_understood_is_strict() {
    let extension = v1::WorkloadExtension { mode: 77, port_modes: [(80, 1), (81, 99)].into(), ..Default::default() };
    let workload = read_workload(with_extension(extension));
    assert_eq!([79, 80, 81].map(|port| workload.modes.at(port)), [Mode::Strict, Mode::Permissive, Mode::Strict]);
}

#[test]
fn what_is_wrong_with_a_workload_is_named() {
    let extended = |change: fn(&mut v1::WorkloadExtension)| {
        let mut extension = v1::WorkloadExtension::default();
        change(&mut extension);
        with_extension(extension)
    };
    let ports = |port| istio::PortList { ports: vec![istio::Port { service_port: port, target_port: 80 }] };
    let cases = [
        (a_workload(|workload| workload.addresses = vec![vec![1, 2, 3]]), Fault::Address { field: "addresses" }),
        (a_workload(|workload| workload.uid = String::new()), Fault::Name { field: "uid" }),
        (a_workload(|workload| workload.uid = "shop/like-a-service".to_owned()), Fault::Name { field: "uid" }),
        (a_workload(|workload| workload.uid = "Kubernetes//Pod/shop/other".to_owned()), Fault::WrongName),
        (
            a_workload(|workload| workload.services = [("shop".to_owned(), ports(80))].into()),
            Fault::Name { field: "services" },
        ),
        (
            a_workload(|workload| workload.services = [("shop/web".to_owned(), ports(70_000))].into()),
            Fault::Port { field: "services.service_port" },
        ),
        (
            a_workload(|workload| workload.authorization_policies = vec!["no-namespace".to_owned()]),
            Fault::Name { field: "authorization_policies" },
        ),
        (extended(|extension| extension.speaks = 9), Fault::UnknownValue { field: "speaks" }),
        (extended(|extension| extension.uncaptured = 9), Fault::UnknownValue { field: "uncaptured" }),
        (extended(|extension| extension.port_modes = [(0, 0)].into()), Fault::Port { field: "port_modes" }),
        (vec![255], Fault::Encoding),
        (vec![], Fault::Empty),
    ];
    for (content, expected) in cases {
        assert_eq!(fault(Kind::Address, UID, content), Some(expected));
    }
    for (domain, account) in [("", "web"), ("cluster.local", ""), ("Cluster", "web"), ("cluster.local", "a/b")] {
        let content = a_workload(|workload| {
            workload.trust_domain = domain.to_owned();
            workload.service_account = account.to_owned();
        });
        assert!(matches!(fault(Kind::Address, UID, content), Some(Fault::Identity(_))));
    }
}

#[test]
fn an_unknown_reason_does_not_matter_once_a_pod_is_captured() {
    let extension = v1::WorkloadExtension { speaks: 1, uncaptured: 42, ..Default::default() };
    assert_eq!(read_workload(with_extension(extension)).uncaptured, None);
}

#[test]
fn only_what_is_strict_about_a_services_endpoints_must_be_understood() {
    use istio::load_balancing::{Mode, Scope};
    let balancing = |mode: i32, scopes: &[Scope]| {
        a_service(|service| {
            let routing_preference = scopes.iter().map(|scope| (*scope).into()).collect();
            service.load_balancing = Some(istio::LoadBalancing { routing_preference, mode });
        })
    };
    let read = |content: Vec<u8>| {
        let resource = on_the_wire(Kind::Address, "shop/web.shop.svc.cluster.local", content);
        match decode(Kind::Address, &resource) {
            Ok(Resource::Mesh(mesh::Resource::Service(service))) => Ok(service.reach),
            Ok(other) => panic!("{other:?}"),
            Err(malformed) => Err(malformed.fault),
        }
    };
    let unknown = Err(Fault::UnknownValue { field: "load_balancing" });
    assert_eq!(read(a_service(|_| {})), Ok(Reach::Cluster));
    assert_eq!(read(balancing(Mode::Strict.into(), &[Scope::Node])), Ok(Reach::Node));
    assert_eq!(read(balancing(Mode::Failover.into(), &[Scope::Zone])), Ok(Reach::Cluster));
    assert_eq!(read(balancing(Mode::Strict.into(), &[Scope::Zone])), unknown);
    assert_eq!(read(balancing(99, &[])), unknown);
}

#[test]
fn a_policy_is_understood_wholly_or_refused() {
    let policy = |change: fn(&mut security::Authorization, &mut security::Match)| {
        let mut message =
            security::Authorization { name: "p".to_owned(), namespace: "shop".to_owned(), ..Default::default() };
        let mut conditions = security::Match::default();
        change(&mut message, &mut conditions);
        let clauses = vec![security::Clause { matches: vec![conditions] }];
        message.rules = vec![security::Rule { clauses }];
        message.encode_to_vec()
    };
    let range = |address: &[u8], length| vec![security::Address { address: address.to_vec(), length }];
    let cases = [
        (policy(|_, _| {}), None),
        (policy(|message, _| message.scope = 7), Some(Fault::UnknownValue { field: "scope" })),
        (policy(|message, _| message.action = 7), Some(Fault::UnknownValue { field: "action" })),
        (
            policy(|_, conditions| conditions.not_principals = vec![security::StringMatch { match_type: None }]),
            Some(Fault::UnknownValue { field: "match_type" }),
        ),
        (
            policy(|_, conditions| conditions.destination_ports = vec![70_000]),
            Some(Fault::Port { field: "destination_ports" }),
        ),
        (
            policy(|_, conditions| conditions.service_accounts = vec![security::ServiceAccountMatch::default()]),
            Some(Fault::Name { field: "service_accounts" }),
        ),
    ];
    for (content, expected) in cases {
        assert_eq!(fault(Kind::Policy, "shop/p", content), expected);
    }
    for bad in [range(&[10, 0, 0], 8), range(&[10, 0, 0, 0], 33), range(&[0; 16], 129), range(&[10, 0, 0, 0], 300)] {
        let conditions = security::Match { source_ips: bad, ..Default::default() };
        let clauses = vec![security::Clause { matches: vec![conditions] }];
        let message = security::Authorization {
            name: "p".to_owned(),
            namespace: "shop".to_owned(),
            rules: vec![security::Rule { clauses }],
            ..Default::default()
        };
        let expected = Some(Fault::Address { field: "source_ips" });
        assert_eq!(fault(Kind::Policy, "shop/p", message.encode_to_vec()), expected);
    }
}

#[test]
fn settings_with_one_bad_range_are_refused_wholly() {
    let settings = |inside: &str, node: &str| {
        v1::MeshSettings { inside: vec![inside.to_owned()], nodes: vec![node.to_owned()], ..Default::default() }
            .encode_to_vec()
    };
    assert_eq!(fault(Kind::Settings, "mesh", settings("10.0.0.0/8", "10.88.0.10")), None);
    assert_eq!(fault(Kind::Settings, "other", settings("10.0.0.0/8", "10.88.0.10")), Some(Fault::WrongName));
    let inside = Some(Fault::Address { field: "inside" });
    assert_eq!(fault(Kind::Settings, "mesh", settings("10.0.0.0", "10.88.0.10")), inside);
    let nodes = Some(Fault::Address { field: "nodes" });
    assert_eq!(fault(Kind::Settings, "mesh", settings("10.0.0.0/8", "node-a")), nodes);
}

#[test]
fn a_pod_that_is_not_to_be_captured_has_a_reason() {
    let pod = |capture, uncaptured| {
        v1::NodePod {
            pod_uid: "u".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            capture,
            uncaptured,
            ..Default::default()
        }
        .encode_to_vec()
    };
    let unknown = Some(Fault::UnknownValue { field: "uncaptured" });
    assert_eq!(fault(Kind::NodePod, "u", pod(true, 0)), None);
    assert_eq!(fault(Kind::NodePod, "u", pod(false, v1::Uncaptured::OptedOut.into())), None);
    assert_eq!(fault(Kind::NodePod, "u", pod(false, 0)), unknown);
    assert_eq!(fault(Kind::NodePod, "u", pod(false, 99)), unknown);
}

#[test]
fn a_pod_that_is_to_be_captured_is_never_released() {
    let pod = |capture| {
        let uncaptured = v1::Uncaptured::OptedOut.into();
        let (pod_uid, namespace, service_account) = ("u".to_owned(), "shop".to_owned(), "web".to_owned());
        let trust_domain = "cluster.local".to_owned();
        let pod = v1::NodePod {
            pod_uid,
            namespace,
            service_account,
            trust_domain,
            capture,
            uncaptured,
            release: true,
            ..Default::default()
        };
        match decode(Kind::NodePod, &on_the_wire(Kind::NodePod, "u", pod.encode_to_vec())) {
            Ok(Resource::NodePod(pod)) => pod.release,
            other => panic!("{other:?}"),
        }
    };
    assert!(pod(false) && !pod(true));
}

#[test]
fn content_of_another_type_than_its_stream_is_refused() {
    let resource = Published::new(&pod("u")).to_proto();
    let refused = decode(Kind::Settings, &resource).unwrap_err();
    assert_eq!(refused.fault, Fault::WrongType);
    assert_eq!(refused.to_string(), "mesh-settings u: the content is of another type than its stream");
}
