//! Outgoing connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use mesh::{
    Affinity, Fallback, Mode, Outgoing, PlaintextReason as Plain, PodUid, Reach, RefuseReason as No, Resource, Route,
    Service, ServiceName, Uncaptured, View, Workload, route,
};
use proptest::prelude::*;

use crate::world::{
    at, ip, on_node, pod, policy_name, service, service_name, serving, settings, uncaptured, view, with_modes,
};

/// A decision in short.
#[derive(PartialEq, Debug)]
enum Is {
    Tunnel(&'static str, &'static str),
    Clear(&'static str, Plain),
    Refused(No),
    AskThenClear(&'static str, Plain),
    AskThenRefuse(No),
}

fn decide(view: &View, from: &str, to: &str, dice: u64) -> Route {
    let pod = PodUid::from(from);
    route(view, Outgoing { pod: &pod, source: ip("10.0.0.1"), destination: at(to), dice })
}

fn check(view: &View, to: &str, expected: Is) {
    let decision = decide(view, "client", to, 0);
    let holds = match (&decision, &expected) {
        (Route::Tunnel(target), Is::Tunnel(name, address)) => {
            &*target.workload.name == *name && target.address == at(address)
        }
        (Route::Plaintext { to, because }, Is::Clear(address, why)) => *to == at(address) && because == why,
        (Route::Refuse { because }, Is::Refused(why)) => because == why,
        (Route::Ask(Fallback::Plaintext { to, because }), Is::AskThenClear(address, why)) => {
            *to == at(address) && because == why
        }
        (Route::Ask(Fallback::Refuse { because }), Is::AskThenRefuse(why)) => because == why,
        _ => false,
    };
    assert!(holds, "{to}: {decision:?} is not {expected:?}");
}

fn world() -> View {
    let web = serving(on_node(pod("web", 2), "node-b"), "web", 80, 8080);
    let mut not_a_pod = uncaptured(serving(pod("external", 8), "legacy", 80, 80), Uncaptured::NotAPod);
    not_a_pod.pod_uid = PodUid::from("");
    let pending = uncaptured(with_modes(pod("pending", 7), Mode::Permissive, 443), Uncaptured::Pending);
    let mut headless = service("headless", 3, 80);
    headless.addresses.clear();
    view(
        [
            serving(pod("client", 1), "own", 80, 8080),
            web,
            uncaptured(pod("opted-out", 3), Uncaptured::OptedOut),
            uncaptured(pod("host", 4), Uncaptured::HostNetwork),
            uncaptured(pod("system", 5), Uncaptured::SystemNamespace),
            uncaptured(pod("strict-pending", 6), Uncaptured::Pending),
            pending,
            not_a_pod,
        ]
        .map(|workload| match &*workload.name {
            "strict-pending" => with_modes(workload, Mode::Strict, 9),
            _ => workload,
        }),
        [service("web", 1, 80), service("own", 2, 80), headless, service("empty", 4, 80), service("legacy", 5, 80)],
    )
}

#[test]
fn every_destination_has_its_route() {
    let view = world();
    let cases = [
        // Pods by address: the application's own port, whichever it is.
        ("10.0.0.2:5432", Is::Tunnel("web", "10.0.0.2:5432")),
        ("[fd00::2]:5432", Is::Tunnel("web", "[fd00::2]:5432")),
        ("10.0.0.3:80", Is::Clear("10.0.0.3:80", Plain::OptedOut)),
        ("10.0.0.4:80", Is::Clear("10.0.0.4:80", Plain::HostNetwork)),
        ("10.0.0.5:80", Is::Clear("10.0.0.5:80", Plain::SystemNamespace)),
        ("10.0.0.8:80", Is::Clear("10.0.0.8:80", Plain::NotAPod)),
        // A pod whose capture is on its way: worth asking, and then by its port's mode.
        ("10.0.0.7:80", Is::AskThenClear("10.0.0.7:80", Plain::CapturePending)),
        ("10.0.0.7:443", Is::AskThenRefuse(No::Strict)),
        ("10.0.0.6:80", Is::AskThenRefuse(No::Strict)),
        ("10.0.0.6:9", Is::AskThenClear("10.0.0.6:9", Plain::CapturePending)),
        // Itself, by its address and through its own Service.
        ("10.0.0.1:80", Is::Clear("10.0.0.1:80", Plain::SelfPod)),
        ("10.96.0.2:80", Is::Clear("10.0.0.1:8080", Plain::SelfPod)),
        // Services, each family by itself.
        ("10.96.0.1:80", Is::Tunnel("web", "10.0.0.2:8080")),
        ("[fd96::1]:80", Is::Tunnel("web", "[fd00::2]:8080")),
        ("10.96.0.1:81", Is::Refused(No::NoSuchPort)),
        ("10.96.0.4:80", Is::Refused(No::NoEndpoint)),
        ("10.96.0.5:80", Is::Clear("10.0.0.8:80", Plain::NotAPod)),
        // Addresses that nobody has: inside and mixed are asked about, never sent to on a guess (T2).
        ("10.0.0.99:80", Is::AskThenRefuse(No::UnknownDestination)),
        ("10.96.0.99:80", Is::AskThenRefuse(No::UnknownDestination)),
        ("172.16.5.5:80", Is::AskThenRefuse(No::UnknownDestination)),
        ("192.0.2.10:10250", Is::Clear("192.0.2.10:10250", Plain::Node)),
        ("10.0.255.1:10250", Is::Clear("10.0.255.1:10250", Plain::Node)),
        ("203.0.113.9:443", Is::Clear("203.0.113.9:443", Plain::Outside)),
        ("[2001:db8::9]:443", Is::Clear("[2001:db8::9]:443", Plain::Outside)),
    ];
    for (to, expected) in cases {
        check(&view, to, expected);
    }
}

#[test]
fn a_stale_view_sends_nothing_in_clear_inside_the_cluster_but_by_that_name() {
    let mut view = world();
    view.set_stale(true);
    let cases = [
        // Whoever proves an identity is who it is, whatever the age.
        ("10.0.0.2:5432", Is::Tunnel("web", "10.0.0.2:5432")),
        ("10.96.0.1:80", Is::Tunnel("web", "10.0.0.2:8080")),
        ("10.0.0.3:80", Is::Clear("10.0.0.3:80", Plain::StaleView)),
        ("10.0.0.5:80", Is::Clear("10.0.0.5:80", Plain::StaleView)),
        ("10.0.0.8:80", Is::Clear("10.0.0.8:80", Plain::StaleView)),
        ("10.96.0.5:80", Is::Clear("10.0.0.8:80", Plain::StaleView)),
        ("10.0.0.7:80", Is::AskThenClear("10.0.0.7:80", Plain::StaleView)),
        // A port that is strict there.
        ("10.0.0.7:443", Is::Refused(No::StrictStaleView)),
        ("10.0.0.6:80", Is::Refused(No::StrictStaleView)),
        ("10.0.0.6:9", Is::AskThenClear("10.0.0.6:9", Plain::StaleView)),
        ("10.0.0.99:80", Is::AskThenRefuse(No::UnknownDestination)),
        ("172.16.5.5:80", Is::AskThenRefuse(No::UnknownDestination)),
        // What is not a pod's does not rest on the view's age.
        ("10.0.0.1:80", Is::Clear("10.0.0.1:80", Plain::SelfPod)),
        ("192.0.2.10:10250", Is::Clear("192.0.2.10:10250", Plain::Node)),
        ("203.0.113.9:443", Is::Clear("203.0.113.9:443", Plain::Outside)),
    ];
    for (to, expected) in cases {
        check(&view, to, expected);
    }
    // A client whose own mode is strict is not let out in clear by an old view, to whomever inside.
    view.apply(Resource::Workload(Box::new(with_modes(pod("client", 1), Mode::Strict, 80))));
    for to in ["10.0.0.3:80", "10.0.0.5:80", "10.0.0.7:80", "10.0.0.8:80"] {
        check(&view, to, Is::Refused(No::StrictStaleView));
    }
    check(&view, "203.0.113.9:443", Is::Clear("203.0.113.9:443", Plain::Outside));
    view.set_stale(false);
    check(&view, "10.0.0.3:80", Is::Clear("10.0.0.3:80", Plain::OptedOut));
}

#[test]
fn the_service_that_was_dialled_stays_known_for_the_logs() {
    let view = world();
    let service_of = |to| match decide(&view, "client", to, 0) {
        Route::Tunnel(target) => target.service,
        other => panic!("{other:?}"),
    };
    assert_eq!(service_of("10.96.0.1:80"), Some(service_name("web")));
    assert_eq!(service_of("10.0.0.2:80"), None);
}

#[test]
fn a_headless_services_clients_dial_its_pods() {
    let mut db = serving(pod("db-0", 20), "headless", 5432, 5432);
    db.policies = vec![policy_name("shop/p")];
    let mut headless = service("headless", 3, 5432);
    headless.addresses.clear();
    let view = view([pod("client", 1), db], [headless]);
    check(&view, "10.0.0.20:5432", Is::Tunnel("db-0", "10.0.0.20:5432"));
    check(&view, "10.96.0.3:5432", Is::AskThenRefuse(No::UnknownDestination));
}

#[test]
fn before_settings_and_the_own_pod_are_known_nothing_goes_anywhere() {
    let mut view = View::default();
    check(&view, "203.0.113.9:443", Is::AskThenRefuse(No::NoView));
    view.apply(Resource::Workload(Box::new(pod("client", 1))));
    view.apply(Resource::Workload(Box::new(pod("web", 2))));
    check(&view, "10.0.0.2:80", Is::AskThenRefuse(No::NoView));
    view.apply(Resource::Settings(settings()));
    check(&view, "10.0.0.2:80", Is::Tunnel("web", "10.0.0.2:80"));
    assert!(matches!(
        decide(&view, "stranger", "10.0.0.2:80", 0),
        Route::Ask(Fallback::Refuse { because: No::NoView })
    ));
}

#[test]
fn a_node_local_service_reaches_endpoints_of_the_clients_node_alone() {
    let local = Service { reach: Reach::Node, ..service("web", 1, 80) };
    let far = serving(on_node(pod("far", 2), "node-b"), "web", 80, 8080);
    let near = serving(pod("near", 3), "web", 80, 8081);
    let both = view([pod("client", 1), far.clone(), near], [local.clone()]);
    for dice in 0..20 {
        assert!(
            matches!(decide(&both, "client", "10.96.0.1:80", dice), Route::Tunnel(t) if &*t.workload.name == "near")
        );
    }
    check(&view([pod("client", 1), far], [local]), "10.96.0.1:80", Is::Refused(No::NoEndpoint));
}

#[test]
fn an_endpoint_without_the_dialled_port_or_family_is_passed_over() {
    let other_port = serving(pod("other", 2), "web", 81, 81);
    let mut v4_only = serving(pod("v4", 3), "web", 80, 8080);
    v4_only.addresses.retain(IpAddr::is_ipv4);
    let view = view([pod("client", 1), other_port, v4_only], [service("web", 1, 80)]);
    check(&view, "10.96.0.1:80", Is::Tunnel("v4", "10.0.0.3:8080"));
    check(&view, "[fd96::1]:80", Is::Refused(No::NoEndpoint));
}

fn three_endpoints(affinity: Affinity) -> (Vec<Workload>, Service) {
    let pods = [2, 3, 4].map(|number| serving(pod(&format!("web-{number}"), number), "web", 80, 80));
    (pods.into_iter().chain([pod("client", 1)]).collect(), Service { affinity, ..service("web", 1, 80) })
}

fn spread(view: &View, clients: impl Iterator<Item = (IpAddr, u64)>) -> BTreeMap<IpAddr, Vec<SocketAddr>> {
    let mut chosen: BTreeMap<IpAddr, Vec<SocketAddr>> = BTreeMap::new();
    for (source, dice) in clients {
        let pod = PodUid::from("client");
        match route(view, Outgoing { pod: &pod, source, destination: at("10.96.0.1:80"), dice }) {
            Route::Tunnel(target) => chosen.entry(source).or_default().push(target.address),
            other => panic!("{other:?}"),
        }
    }
    chosen
}

fn clients(count: u32) -> impl Iterator<Item = IpAddr> {
    (0..count).map(|number| IpAddr::from((0x0a00_0000 + number).to_be_bytes()))
}

#[test]
fn connections_are_spread_evenly_over_endpoints() {
    let (pods, service) = three_endpoints(Affinity::None);
    let view = view(pods, [service]);
    let chosen = spread(&view, (0..3_000).map(|dice| (ip("10.0.0.1"), dice)));
    let chosen = &chosen[&ip("10.0.0.1")];
    for endpoint in ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"] {
        assert_eq!(chosen.iter().filter(|address| **address == at(endpoint)).count(), 1_000);
    }
}

#[test]
fn with_affinity_a_client_keeps_its_endpoint_and_clients_are_spread() {
    let (pods, service) = three_endpoints(Affinity::ClientIp);
    let whole = view(pods.clone(), [service.clone()]);
    let before = spread(&whole, clients(3_000).flat_map(|client| [(client, 1), (client, 2)]));
    let mut share: BTreeMap<SocketAddr, usize> = BTreeMap::new();
    for chosen in before.values() {
        assert_eq!(chosen[0], chosen[1], "whatever the dice say");
        *share.entry(chosen[0]).or_default() += 1;
    }
    assert!(share.len() == 3 && share.values().all(|clients| (800..1_200).contains(clients)), "{share:?}");
    // One endpoint less moves its own clients and nobody else's.
    let fewer = view(pods.into_iter().filter(|pod| &*pod.name != "web-3"), [service]);
    let after = spread(&fewer, clients(3_000).map(|client| (client, 0)));
    for (client, chosen) in before {
        if chosen[0] != at("10.0.0.3:80") {
            assert_eq!(after[&client][0], chosen[0], "{client} moved");
        }
    }
}

proptest! {
    #[test]
    fn a_captured_pod_is_never_sent_to_in_clear(number in 1u8..20, port in 1u16.., strict in any::<bool>(), dice: u64) {
        let mode = if strict { Mode::Strict } else { Mode::Permissive };
        let view = view([pod("client", 100), with_modes(pod("web", number), mode, 80)], []);
        for address in [IpAddr::from([10, 0, 0, number]), ip(&format!("fd00::{number}"))] {
            let pod = PodUid::from("client");
            let destination = SocketAddr::new(address, port);
            let decision = route(&view, Outgoing { pod: &pod, source: address, destination, dice });
            prop_assert!(matches!(decision, Route::Tunnel(target) if target.address == destination));
        }
    }

    #[test]
    fn an_address_inside_is_never_sent_to_in_clear_without_a_workload_that_says_why(
        octets in any::<[u8; 2]>(), port in 1u16.., known in prop::collection::vec(2u8..250, 0..8)
    ) {
        let view = view(known.iter().map(|number| pod(&format!("pod-{number}"), *number)).chain([pod("client", 1)]), []);
        let address = IpAddr::from([10, 0, octets[0], octets[1]]);
        let pod = PodUid::from("client");
        let destination = SocketAddr::new(address, port);
        match route(&view, Outgoing { pod: &pod, source: address, destination, dice: 0 }) {
            Route::Plaintext { because: Plain::SelfPod, .. } => prop_assert_eq!(address, ip("10.0.0.1")),
            Route::Plaintext { because: Plain::Node, .. } => prop_assert_eq!(address, ip("10.0.255.1")),
            Route::Plaintext { because, .. } => prop_assert!(false, "in clear: {because}"),
            Route::Tunnel(target) => prop_assert!(target.workload.addresses.contains(&address)),
            Route::Ask(fallback) => {
                prop_assert_eq!(fallback, Fallback::Refuse { because: No::UnknownDestination });
            }
            Route::Refuse { because } => prop_assert!(false, "refused at once: {because}"),
        }
    }
}

#[test]
fn what_nothing_has_is_outside_where_others_live_beside_pods_and_nowhere_else() {
    let destination = |address: &str| SocketAddr::new(ip(address), 443);
    let decide = |view: &View, address: &str| {
        let pod = PodUid::from("client");
        route(view, Outgoing { pod: &pod, source: ip("10.0.0.1"), destination: destination(address), dice: 0 })
    };
    let unknown = Route::Ask(Fallback::Refuse { because: No::UnknownDestination });
    let clear = |because| Route::Plaintext { to: destination("172.16.0.1"), because };
    for (mode, stale) in
        [(Mode::Permissive, clear(Plain::StaleView)), (Mode::Strict, Route::Refuse { because: No::StrictStaleView })]
    {
        let mut client = pod("client", 1);
        client.modes.default = mode;
        let mut view = view([client], []);
        let said = ["172.16.0.1", "10.0.0.9", "10.96.0.9"];
        assert!(said.iter().all(|address| view.is_unknown(ip(address)) && decide(&view, address) == unknown));
        said.iter().for_each(|address| view.set_nobodys(ip(address)));
        assert!(said.iter().all(|address| !view.is_unknown(ip(address))));
        assert_eq!(decide(&view, "172.16.0.1"), clear(Plain::Outside));
        assert!(said[1..].iter().all(|address| decide(&view, address) == unknown), "pods' and Services' ranges");
        view.set_stale(true);
        assert_eq!(decide(&view, "172.16.0.1"), stale);
        view.set_stale(false);
        let mut moved = pod("web", 2);
        moved.addresses = vec![ip("172.16.0.1")];
        view.apply(Resource::Workload(Box::new(moved)));
        assert!(matches!(decide(&view, "172.16.0.1"), Route::Tunnel(_)), "something has it now");
        // A word that came late takes nothing away.
        view.set_nobodys(ip("172.16.0.1"));
        assert!(!view.is_nobodys(ip("172.16.0.1")));
    }
}

#[test]
fn service_names_are_of_one_form() {
    for bad in ["", "web", "/web", "shop/", "a/b/c"] {
        assert!(bad.parse::<ServiceName>().is_err(), "{bad}");
    }
}
