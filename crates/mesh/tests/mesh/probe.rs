//! Probes: who may make them, what passes as one, and a model of both.

use std::net::IpAddr;

use mesh::{
    AllowedProbe, Check, HttpProbe, MaybeProbe, MeshSettings, Mode, OwnNode, Passes, PlaintextReason as Why, PodUid,
    Probe, Probes, RefuseReason as No, Request, Resource, Said, Uncaptured, View, authorize_probe, may_be_probe,
    probe_refused_now,
};
use proptest::prelude::*;

use crate::world::{at, ip, pod, settings, uncaptured, view, with_modes};

fn http(path: &str) -> Check {
    Check::Http(HttpProbe::new(path, None, []).unwrap())
}

fn probes(all: impl IntoIterator<Item = (u16, Check)>) -> Probes {
    Probes::new(all.into_iter().map(|(port, check)| Probe { port, check })).unwrap()
}

fn get<'a>(target: &'a str, host: &'a str, headers: &[(&'a str, &'a str)]) -> Said<'a> {
    Said::Get(Request { target, host, headers: headers.to_vec() })
}

/// A hello that names a server, or none.
fn tls(server_name: Option<&str>) -> Said<'static> {
    Said::Tls { server_name: server_name.map(ToOwned::to_owned) }
}

/// The API server calls, by this name or without one.
fn api_server(server_name: Option<&str>) -> Check {
    Check::ApiServer(server_name.map(ToOwned::to_owned))
}

/// What the kubelet sends besides its target and host.
const KUBELET: [(&str, &str); 3] = [("User-Agent", "kube-probe/1.33"), ("Accept", "*/*"), ("Connection", "close")];

struct Node {
    addresses: Vec<IpAddr>,
    gateways: Vec<IpAddr>,
}

/// A node at 192.0.2.10, which its pods see as 10.0.0.254.
fn node() -> Node {
    Node { addresses: vec![ip("192.0.2.10")], gateways: vec![ip("10.0.0.254")] }
}

/// Asks about a connection to the server at 10.0.0.1.
fn ask(view: &View, node: &Node, probes: &Probes, from: &str, to: &str, said: &Said<'_>) -> Result<AllowedProbe, No> {
    let server = PodUid::from("server");
    let node = OwnNode { addresses: &node.addresses, gateways: &node.gateways };
    let maybe = MaybeProbe { pod: &server, destination: at(to), source: ip(from), node, probes };
    let allowed = authorize_probe(view, maybe, said);
    assert_eq!(may_be_probe(view, maybe), !matches!(allowed, Err(No::Strict)));
    allowed
}

fn strict() -> View {
    view([with_modes(pod("server", 1), Mode::Strict, 9999), pod("client", 2)], [])
}

/// The same where API servers call from there.
fn strict_with(api_servers: &[&str]) -> View {
    let mut view = strict();
    let api_servers = api_servers.iter().map(|range| range.parse().unwrap()).collect();
    view.apply(Resource::Settings(MeshSettings { api_servers, ..settings() }));
    view
}

#[test]
fn the_pods_own_node_alone_may_probe() {
    let probes = probes([(8080, http("/live"))]);
    let said = get("/live", "10.0.0.1:8080", &KUBELET);
    let from = |view: &View, node: &Node, source| ask(view, node, &probes, source, "10.0.0.1:8080", &said).map(drop);
    for source in ["192.0.2.10", "10.0.0.254"] {
        assert_eq!(from(&strict(), &node(), source), Ok(()), "{source}");
    }
    // A pod, another address of the pods' range, another node, the outside.
    for source in ["10.0.0.2", "10.0.0.77", "192.0.2.11", "203.0.113.9"] {
        assert_eq!(from(&strict(), &node(), source), Err(No::Strict), "{source}");
    }
    // A route of the pod, or an argument, cannot make a node of what the view knows as a pod.
    let liar = Node { addresses: vec![ip("10.0.0.2")], gateways: vec![ip("fd00::2"), ip("10.0.0.2")] };
    for source in ["10.0.0.2", "fd00::2"] {
        assert_eq!(from(&strict(), &liar, source), Err(No::Strict), "{source}");
    }
    let pending = view([pod("server", 1), uncaptured(pod("client", 2), Uncaptured::OptedOut)], []);
    assert_eq!(from(&pending, &liar, "10.0.0.2"), Err(No::Strict));
    // Endpoints that are no pods have their node's address, and are nobody else.
    let shared = view([pod("server", 1), uncaptured(pod("api", 2), Uncaptured::NotAPod)], []);
    assert_eq!(from(&shared, &liar, "10.0.0.2"), Ok(()));
}

#[test]
fn a_port_without_a_probe_and_an_address_of_another_pod_are_refused_as_ever() {
    let probes = probes([(8080, http("/live"))]);
    let said = get("/live", "10.0.0.1:8080", &KUBELET);
    for to in ["10.0.0.1:8081", "10.0.0.2:8080"] {
        assert_eq!(ask(&strict(), &node(), &probes, "192.0.2.10", to, &said), Err(No::Strict), "{to}");
    }
    let nobody = view([pod("client", 2)], []);
    assert_eq!(ask(&nobody, &node(), &probes, "192.0.2.10", "10.0.0.1:8080", &said), Err(No::Strict));
}

#[test]
fn each_kind_passes_as_what_it_is_and_as_nothing_else() {
    let all = [http("/live"), Check::Https, Check::Tcp, Check::Grpc];
    let said =
        [get("/live", "10.0.0.1:80", &KUBELET), tls(Some("any.example")), Said::Nothing, Said::Http2, Said::Other];
    for (declared, check) in all.iter().enumerate() {
        let probes = probes([(80, check.clone())]);
        for (spoken, said) in said.iter().enumerate() {
            let allowed = ask(&strict(), &node(), &probes, "192.0.2.10", "10.0.0.1:80", said);
            assert_eq!(allowed.is_ok(), declared == spoken, "{check:?} {said:?}");
            assert!(allowed.is_ok() || allowed == Err(No::NotTheProbe));
            let Ok(allowed) = allowed else { continue };
            assert!(!allowed.exposes().is_empty() && allowed.because() == Why::Probe);
            assert_eq!((allowed.destination(), allowed.source()), (at("10.0.0.1:80"), ip("192.0.2.10")));
            match allowed.passes() {
                Passes::Request(request) => assert!(declared == 0 && request.starts_with(b"GET /live HTTP/1.1\r\n")),
                Passes::Opaque => assert!(declared == 1 || declared == 3),
                Passes::Nothing => assert_eq!(declared, 2),
                Passes::Stream => panic!("{check:?} is not bounded"),
            }
        }
    }
}

#[test]
fn a_request_passes_in_the_words_of_the_pod_and_not_of_the_client() {
    let headers = [("X-Probe", "yes"), ("Content-Length", "5"), ("upgrade", "websocket")];
    let check = Check::Http(HttpProbe::new("live?full=1#top", None, headers).unwrap());
    let probes = probes([(8080, check)]);
    let with = |more: &[(&'static str, &'static str)]| {
        let all = [&KUBELET[..], &[("x-probe", "yes")], more].concat();
        let said = get("/live?full=1", "10.0.0.1:8080", &all);
        ask(&strict(), &node(), &probes, "192.0.2.10", "10.0.0.1:8080", &said).map(AllowedProbe::passes)
    };
    let expected = "GET /live?full=1 HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nUser-Agent: kube-probe/1.33\r\nAccept: */*\r\n\
                    X-Probe: yes\r\nConnection: close\r\n\r\n";
    assert_eq!(with(&[]), Ok(Passes::Request(expected.into())));
    // What the kubelet adds to a hook is not said to the pod.
    assert_eq!(
        with(&[("Accept-Encoding", "gzip"), ("Connection", "keep-alive")]),
        Ok(Passes::Request(expected.into()))
    );
    for refused in [
        ("Content-Length", "5"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "websocket"),
        ("Connection", "upgrade"),
        ("Authorization", "Bearer x"),
        ("X-Probe", "no"),
        ("User-Agent", "a second one"),
    ] {
        assert_eq!(with(&[refused]), Err(No::NotTheProbe), "{refused:?}");
    }
    let other = |target, host, headers: &[(&'static str, &'static str)]| {
        let said = get(target, host, headers);
        ask(&strict(), &node(), &probes, "192.0.2.10", "10.0.0.1:8080", &said).err()
    };
    let all = [&KUBELET[..], &[("X-Probe", "yes")]].concat();
    assert_eq!(other("/live?full=1", "10.0.0.1:8080", &all), None);
    for (target, host, headers) in [
        ("/live?full=1", "10.0.0.1:8080", &KUBELET[..]),
        ("/live", "10.0.0.1:8080", &all[..]),
        ("/live?full=1&more", "10.0.0.1:8080", &all[..]),
        ("/live/../admin?full=1", "10.0.0.1:8080", &all[..]),
        ("//live?full=1", "10.0.0.1:8080", &all[..]),
        ("/live?full=1", "10.0.0.2:8080", &all[..]),
        ("/live?full=1", "10.0.0.1", &all[..]),
        ("/live?full=1", "shop.example", &all[..]),
        ("http://10.0.0.1:8080/live?full=1", "10.0.0.1:8080", &all[..]),
    ] {
        assert_eq!(other(target, host, headers), Some(No::NotTheProbe), "{target} {host} {headers:?}");
    }
}

#[test]
fn hosts_are_those_that_the_kubelet_would_name() {
    let case = |host: Option<&str>, headers: &[(&str, &str)], to: &str, named: &str| {
        let check = Check::Http(HttpProbe::new("/", host, headers.iter().copied()).unwrap());
        let probes = probes([(at(to).port(), check)]);
        ask(&strict(), &node(), &probes, "192.0.2.10", to, &get("/", named, &KUBELET)).is_ok()
    };
    assert!(case(None, &[], "10.0.0.1:80", "10.0.0.1:80") && case(None, &[], "10.0.0.1:80", "10.0.0.1"));
    assert!(case(None, &[], "[fd00::1]:8080", "[fd00::1]:8080"));
    assert!(case(Some("shop.example"), &[], "10.0.0.1:80", "shop.example:80"));
    assert!(case(None, &[("Host", "Shop.example")], "10.0.0.1:80", "shop.example"));
    assert!(!case(None, &[("Host", "shop.example")], "10.0.0.1:80", "10.0.0.1:80"));
    assert!(!case(Some("shop.example"), &[], "10.0.0.1:80", "other.example:80"));
}

#[test]
fn a_path_is_the_same_however_it_is_escaped() {
    let probes = probes([(80, http("/a b/ü%2f%zz"))]);
    let asked = |target| {
        ask(&strict(), &node(), &probes, "192.0.2.10", "10.0.0.1:80", &get(target, "10.0.0.1:80", &KUBELET))
            .map(AllowedProbe::passes)
    };
    let expected = Ok(Passes::Request(
        "GET /a%20b/%C3%BC%252f%25zz HTTP/1.1\r\nHost: 10.0.0.1:80\r\nUser-Agent: kube-probe/1.33\r\nAccept: */*\r\nConnection: close\r\n\r\n".into(),
    ));
    assert_eq!(asked("/a%20b/%C3%BC%252f%25zz"), expected);
    assert_eq!(asked("/%61%20b/%c3%bc%252f%25zz"), expected);
    assert_eq!(asked("/a%20b/%C3%BC%252f%25zy"), Err(No::NotTheProbe));
}

#[test]
fn what_no_request_can_carry_is_no_probe_and_their_number_is_bounded() {
    assert_eq!(HttpProbe::new("/", Some("a\r\nb"), []), None);
    assert_eq!(HttpProbe::new("/", None, [("A:", "b")]), None);
    assert_eq!(HttpProbe::new("http:live", None, []), None);
    for none in ["", "live", "/a b", "/a#b", "/a\n"] {
        assert_eq!(HttpProbe::requesting(none, None, []), None, "{none}");
    }
    // What was read once is not read again by whoever hears of it.
    let declared = HttpProbe::new("//a//b//c_d", None, []).unwrap();
    assert_eq!(declared.target(), "//b//c_d");
    assert_eq!(HttpProbe::requesting(declared.target(), None, []), Some(declared));
    assert_eq!(HttpProbe::new("/", None, [("A", "b\n")]), None);
    let plain = HttpProbe::new("/", None, [("A", "b")]);
    assert!(plain.is_some());
    assert_eq!(HttpProbe::new("/", None, [("A", " b\t"), ("Accept", "")]), plain, "as the kubelet sends it");
    let tcp = |port| Probe { port, check: Check::Tcp };
    assert_eq!(Probes::new((1..=64).map(tcp)).map(|all| all.iter().count()), Some(64));
    assert_eq!(Probes::new((1..=65).map(tcp)), None);
    assert_eq!(Probes::new((1..=65).map(|_| tcp(1))).map(|all| all.iter().count()), Some(1), "the same twice is one");
    let long = |length: usize| [Probe { port: 1, check: http(&"/".repeat(length)) }];
    assert!(Probes::new(long(16 * 1024)).is_some() && Probes::new(long(16 * 1024 + 1)).is_none());
}

#[test]
fn an_open_probe_goes_on_while_its_client_is_the_node() {
    let refused = |view: &View, source: &str| {
        let Node { addresses, gateways } = node();
        let node = OwnNode { addresses: &addresses, gateways: &gateways };
        let (server, probes) = (PodUid::from("server"), Probes::default());
        let maybe =
            MaybeProbe { pod: &server, destination: at("10.0.0.1:80"), source: ip(source), node, probes: &probes };
        probe_refused_now(view, Why::Probe, maybe)
    };
    assert_eq!(refused(&strict(), "10.0.0.254"), None);
    let taken = view([with_modes(pod("server", 1), Mode::Strict, 9999), pod("new", 254)], []);
    assert_eq!(refused(&taken, "10.0.0.254"), Some(No::Strict));
    let permissive = view([pod("server", 1), pod("new", 254)], []);
    assert_eq!(refused(&permissive, "10.0.0.254"), None);
}

#[test]
fn the_api_server_is_known_by_its_addresses_and_by_those_of_its_node_and_is_no_pod_of_the_mesh() {
    let has = |view: &View, source: &str| {
        let Node { addresses, gateways } = node();
        OwnNode { addresses: &addresses, gateways: &gateways }.has_api_server(view, ip(source))
    };
    // On another node, or outside of the cluster: that address alone, and not the pod's own node.
    let elsewhere = strict_with(&["192.0.2.11/32", "203.0.113.0/24"]);
    for (source, expected) in
        [("192.0.2.11", true), ("203.0.113.9", true), ("192.0.2.10", false), ("10.0.0.254", false), ("10.0.0.2", false)]
    {
        assert_eq!(has(&elsewhere, source), expected, "{source}");
    }
    // On the pod's own node: by whichever of its addresses it shows itself.
    let here = strict_with(&["192.0.2.10/32"]);
    for (source, expected) in [("192.0.2.10", true), ("10.0.0.254", true), ("192.0.2.11", false), ("10.0.0.2", false)] {
        assert_eq!(has(&here, source), expected, "{source}");
    }
    // Whoever is in the mesh, or is to be, would have proven itself, whatever an administrator lists; who is left out may be an
    // agent of the API server's.
    let mut listed = strict_with(&["10.0.0.0/24"]);
    assert!(!has(&listed, "10.0.0.2"));
    for (why, expected) in [
        (Uncaptured::Pending, false),
        (Uncaptured::SystemNamespace, true),
        (Uncaptured::HostNetwork, true),
        (Uncaptured::OptedOut, true),
    ] {
        listed.apply(Resource::Workload(Box::new(uncaptured(pod("agent", 3), why))));
        assert_eq!(has(&listed, "10.0.0.3"), expected, "{why:?}");
    }
    // Nobody has said anything.
    assert!(!has(&strict(), "192.0.2.10") && !has(&View::default(), "192.0.2.10"));
}

#[test]
fn the_api_server_passes_by_the_name_of_what_it_calls_and_by_nothing_else() {
    let view = strict_with(&["192.0.2.11/32"]);
    let probes = probes([(8443, api_server(Some("hook.shop.svc"))), (8444, api_server(None)), (8443, http("/live"))]);
    let from = |source: &str, to: &str, said: &Said<'_>| ask(&view, &node(), &probes, source, to, said);
    let allowed = from("192.0.2.11", "10.0.0.1:8443", &tls(Some("Hook.shop.svc"))).unwrap();
    assert_eq!((allowed.because(), allowed.exposes()), (Why::ApiServer, "TLS to hook.shop.svc"));
    assert_eq!(allowed.passes(), Passes::Stream);
    let nameless = from("192.0.2.11", "10.0.0.1:8444", &tls(None)).unwrap();
    assert_eq!((nameless.because(), nameless.passes()), (Why::ApiServer, Passes::Stream));
    for (to, said) in [
        ("10.0.0.1:8443", tls(Some("hook.shop"))),
        ("10.0.0.1:8443", tls(Some("other.shop.svc"))),
        ("10.0.0.1:8443", tls(None)),
        ("10.0.0.1:8444", tls(Some("hook.shop.svc"))),
        ("10.0.0.1:8443", get("/live", "10.0.0.1:8443", &KUBELET)),
        ("10.0.0.1:8443", Said::Http2),
        ("10.0.0.1:8443", Said::Nothing),
        ("10.0.0.1:8443", Said::Other),
    ] {
        assert_eq!(from("192.0.2.11", to, &said).err(), Some(No::NotTheApiServer), "{to} {said:?}");
    }
    // What is asked elsewhere or by somebody else is refused as ever; the kubelet has its probe, and not the API server's call.
    for (source, to) in [("192.0.2.11", "10.0.0.1:80"), ("203.0.113.9", "10.0.0.1:8443"), ("10.0.0.2", "10.0.0.1:8443")]
    {
        assert_eq!(from(source, to, &tls(Some("hook.shop.svc"))).err(), Some(No::Strict), "{source} {to}");
    }
    assert!(from("192.0.2.10", "10.0.0.1:8443", &get("/live", "10.0.0.1:8443", &KUBELET)).is_ok());
    assert_eq!(from("192.0.2.10", "10.0.0.1:8443", &tls(Some("hook.shop.svc"))).err(), Some(No::NotTheProbe));
}

#[test]
fn an_open_call_of_the_api_server_goes_on_while_it_is_declared_and_its_client_is_known() {
    let refused = |view: &View, source: &str, port: u16| {
        let Node { addresses, gateways } = node();
        let node = OwnNode { addresses: &addresses, gateways: &gateways };
        let (server, probes) = (PodUid::from("server"), probes([(8443, api_server(None)), (80, http("/"))]));
        let destination = at(&format!("10.0.0.1:{port}"));
        let maybe = MaybeProbe { pod: &server, destination, source: ip(source), node, probes: &probes };
        probe_refused_now(view, Why::ApiServer, maybe)
    };
    let view = strict_with(&["192.0.2.11/32"]);
    assert_eq!(refused(&view, "192.0.2.11", 8443), None);
    assert_eq!(refused(&view, "192.0.2.11", 80), Some(No::Strict));
    assert_eq!(refused(&strict(), "192.0.2.11", 8443), Some(No::Strict));
    let permissive = self::view([pod("server", 1)], []);
    assert_eq!(refused(&permissive, "192.0.2.11", 8443), None);
}

const NAMES: [Option<&str>; 3] = [None, Some("hook.shop.svc"), Some("api.shop.svc")];

proptest! {
    #[test]
    fn what_passes_of_the_api_server_is_what_the_model_says(
        declared in prop::collection::vec((8443u16..8445, prop::option::of(0usize..3)), 0..4),
        to in 8443u16..8445,
        spoken in prop::option::of(0usize..3),
        source in 0usize..4,
        at_home in any::<bool>(),
    ) {
        // `None` is the kubelet's TLS of any name, said or declared: it is no call, and nobody else's hello is it.
        let check = |name: Option<usize>| name.map_or(Check::Https, |name| api_server(NAMES[name]));
        let probes = probes(declared.iter().map(|it| (it.0, check(it.1))));
        let said = spoken.map_or(Said::Http2, |name| tls(NAMES[name]));
        let source = ["192.0.2.10", "192.0.2.11", "10.0.0.2", "203.0.113.9"][source];
        let view = strict_with(&[if at_home { "192.0.2.10/32" } else { "192.0.2.11/32" }]);
        let kubelet = source == "192.0.2.10";
        let caller = source == if at_home { "192.0.2.10" } else { "192.0.2.11" };
        let asked: Vec<_> = declared.iter().filter(|it| it.0 == to && if it.1.is_some() { caller } else { kubelet }).collect();
        let call = spoken.is_some_and(|name| asked.iter().any(|it| it.1 == Some(name)));
        let https = spoken.is_some() && asked.iter().any(|it| it.1.is_none());
        let expected = if call {
            Ok(Why::ApiServer)
        } else if https {
            Ok(Why::Probe)
        } else if asked.is_empty() {
            Err(No::Strict)
        } else if asked.iter().all(|it| it.1.is_some()) {
            Err(No::NotTheApiServer)
        } else {
            Err(No::NotTheProbe)
        };
        let allowed = ask(&view, &node(), &probes, source, &format!("10.0.0.1:{to}"), &said);
        prop_assert_eq!(allowed.map(|allowed| allowed.because()), expected);
    }
}

const PATHS: [&str; 4] = ["/", "/live", "/live?x", "/li%76e"];
const HOSTS: [&str; 3] = ["10.0.0.1:80", "10.0.0.1:81", "shop.example"];
const EXTRA: [(&str, &str); 5] =
    [("X-A", "1"), ("X-A", "2"), ("Cookie", "c"), ("Connection", "close"), ("Accept", "text/html")];

/// A declared check in numbers: its kind, path, whether it names a host, and its header.
type Declared = (u16, usize, usize, bool, Option<usize>);

fn check_of((_, kind, path, host, header): Declared) -> Check {
    let headers = host.then_some(("Host", HOSTS[2])).into_iter().chain(header.map(|header| EXTRA[header]));
    match kind {
        0 => Check::Http(HttpProbe::new(PATHS[path], None, headers).unwrap()),
        1 => Check::Https,
        2 => Check::Tcp,
        _ => Check::Grpc,
    }
}

/// The same in other words: what a declared check lets a client say.
fn passes((port, kind, path, host, header): Declared, at: u16, said: &Said<'_>) -> bool {
    let Said::Get(request) = said else {
        let said = [matches!(said, Said::Tls { .. }), *said == Said::Nothing, *said == Said::Http2];
        return port == at && kind > 0 && said[kind - 1];
    };
    let spelled = |path: &str| path.replace("%76", "v");
    let named = if host { HOSTS[2].to_owned() } else { format!("10.0.0.1:{at}") };
    let short = !host && at == 80 && request.host == "10.0.0.1";
    let wanted = header.map(|header| EXTRA[header]).filter(|(name, _)| *name != "Connection");
    let harmless = |(name, value): &(&str, &str)| *name == "Accept" || (*name, *value) == EXTRA[3];
    kind == 0
        && port == at
        && spelled(request.target) == spelled(PATHS[path])
        && (request.host == named || short || host && request.host == format!("{named}:{at}"))
        && request.headers.iter().all(|header| harmless(header) || Some(*header) == wanted)
        && wanted.is_none_or(|wanted| request.headers.contains(&wanted))
}

proptest! {
    #[test]
    fn what_passes_is_what_the_model_says(
        declared in prop::collection::vec((80u16..82, 0usize..4, 0usize..4, any::<bool>(), prop::option::of(0usize..5)), 0..4),
        to in 80u16..82,
        spoken in (0usize..8, 0usize..4, 0usize..3, prop::collection::vec(0usize..5, 0..3)),
        source in 0usize..4,
    ) {
        let probes = probes(declared.iter().map(|it| (it.0, check_of(*it))));
        let (kind, path, host, headers) = spoken;
        let headers: Vec<_> = headers.into_iter().map(|header| EXTRA[header]).collect();
        let said = match kind {
            0 => tls(Some("any.example")),
            1 => Said::Nothing,
            2 => Said::Http2,
            3 => Said::Other,
            _ => get(PATHS[path], HOSTS[host], &headers),
        };
        let source = ["192.0.2.10", "10.0.0.254", "10.0.0.2", "203.0.113.9"][source];
        let is_node = ["192.0.2.10", "10.0.0.254"].contains(&source);
        let expected = if !is_node || !declared.iter().any(|it| it.0 == to) {
            Some(No::Strict)
        } else {
            (!declared.iter().any(|it| passes(*it, to, &said))).then_some(No::NotTheProbe)
        };
        let allowed = ask(&strict(), &node(), &probes, source, &format!("10.0.0.1:{to}"), &said);
        prop_assert_eq!(allowed.as_ref().err().copied(), expected);
        if let Ok(Passes::Request(request)) = allowed.map(AllowedProbe::passes) {
            let text = String::from_utf8(request).unwrap();
            let one = text.strip_suffix("\r\n\r\n").is_some_and(|head| !head.contains("\r\n\r\n"));
            prop_assert!(one && text.starts_with("GET /") && text.contains("\r\nConnection: close\r\n"), "{}", text);
        }
    }
}
