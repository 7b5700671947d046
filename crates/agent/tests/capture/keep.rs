//! Capture that is disturbed, repaired, and ended.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpListener};

use agent::capture::{Capture, CaptureError, LARGEST_BATCH, SocketKind, Standing};
use agent::rules;
use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::nft::{self, IpFamily};

use crate::lab::{A, App, B, Client, FAMILIES, Lab, eventually, plan, prepared, with_privilege};
use crate::proxy::Proxy;

/// One captured connection of each kind.
fn connections(lab: &Lab) -> Vec<Client> {
    let mut clients = Vec::new();
    for family in FAMILIES {
        for from in [&lab.a, &lab.node] {
            let mut client = Client::connect(from, B[family], 8080).unwrap();
            client.seen().unwrap();
            client.echo().unwrap();
            clients.push(client);
        }
    }
    clients
}

#[test]
fn a_table_that_is_replaced_leaves_captured_connections_alone() {
    with_privilege(a_table_that_is_replaced_leaves_captured_connections_alone, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut clients = connections(&lab);
        for _ in 0..20 {
            for proxy in [&a, &b] {
                proxy.capture.lock().unwrap().repair().unwrap();
            }
            for client in &mut clients {
                client.echo().unwrap();
            }
        }
        connections(&lab);
        assert_eq!((a.seen().len(), b.seen().len()), (4, 8));
    });
}

#[test]
fn whatever_is_taken_away_is_noticed_and_repaired() {
    with_privilege(whatever_is_taken_away_is_noticed_and_repaired, || {
        let lab = Lab::new();
        let plan = plan(B);
        let b = Proxy::start(prepared(&lab.b, plan.clone())).begin();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let open = |protocol| lab.b.enter(|| Netlink::open(protocol)).unwrap().unwrap();
        let (mut netfilter, mut route) = (open(Protocol::Netfilter), open(Protocol::Route));
        let delivery = rules::delivery(plan.marks);
        type Fault<'a> = (&'a str, &'a mut dyn FnMut());
        let mut flush_in = rules::ruleset(&plan);
        flush_in.chains.iter_mut().find(|it| it.name == "capture_in").unwrap().rules.clear();
        let mut other_marks = plan.clone();
        other_marks.marks.inner ^= 1;
        let other_marks = rules::ruleset(&other_marks);
        let mut second = open(Protocol::Netfilter);
        let mut third = open(Protocol::Netfilter);
        let mut second_route = open(Protocol::Route);
        let faults: [Fault<'_>; 5] = [
            ("the table justmtls is gone", &mut || {
                assert!(nft::delete(&mut netfilter, rules::TABLE).unwrap());
            }),
            ("the chain capture_in has 0 rules, not 2", &mut || {
                nft::replace(&mut second, &flush_in).unwrap();
            }),
            ("rule 1 of the chain apart differs", &mut || {
                nft::replace(&mut third, &other_marks).unwrap();
            }),
            ("the rule ip -4 rule pref 1000", &mut || {
                delivery.remove(&mut route, IpFamily::V4).unwrap();
            }),
            ("the rule ip -6 rule pref 1000", &mut || {
                delivery.remove(&mut second_route, IpFamily::V6).unwrap();
            }),
        ];
        for (expected, fault) in faults {
            assert_eq!(b.capture.lock().unwrap().verify().unwrap(), Standing::Intact);
            fault();
            let Standing::Broken(found) = b.capture.lock().unwrap().verify().unwrap() else {
                panic!("not noticed: {expected}");
            };
            assert!(found.starts_with(expected), "{found}");
            b.capture.lock().unwrap().repair().unwrap();
            assert_eq!(b.capture.lock().unwrap().verify().unwrap(), Standing::Intact);
            let before = b.seen().len();
            for family in FAMILIES {
                Client::connect(&lab.node, B[family], 8080).unwrap().seen().unwrap();
            }
            assert_eq!(b.seen().len(), before + 2, "after {expected}");
        }
    });
}

#[test]
fn a_change_of_somebody_elses_table_is_not_a_fault() {
    with_privilege(a_change_of_somebody_elses_table_is_not_a_fault, || {
        let lab = Lab::new();
        let mut capture = prepared(&lab.b, plan(B));
        capture.begin().unwrap();
        let mut netfilter = lab.b.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        let other = nft::Table { name: "others".into(), timeouts: vec![], sets: vec![], chains: vec![] };
        nft::replace(&mut netfilter, &other).unwrap();
        assert_eq!(capture.verify().unwrap(), Standing::Intact);
    });
}

#[test]
fn without_rules_nothing_is_captured_and_that_is_said() {
    with_privilege(without_rules_nothing_is_captured_and_that_is_said, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B)));
        let _app = App::anywhere(&lab.b, 0, 8080);
        Client::connect(&lab.node, B[0], 8080).unwrap().seen().unwrap();
        assert!(b.seen().is_empty());
        let standing = b.capture.lock().unwrap().verify().unwrap();
        assert_eq!(standing, Standing::Broken("no rules were loaded".into()));
    });
}

#[test]
fn a_pod_is_released_without_harm_to_captured_connections() {
    with_privilege(a_pod_is_released_without_harm_to_captured_connections, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut captured = connections(&lab);
        let counts = (a.seen().len(), b.seen().len());
        for proxy in [&a, &b] {
            proxy.capture.lock().unwrap().drain().unwrap();
            assert_eq!(proxy.capture.lock().unwrap().verify().unwrap(), Standing::Intact);
        }
        for client in &mut captured {
            client.echo().unwrap();
        }
        // New ones are direct, and still alive when everything is gone.
        let mut direct = connections(&lab);
        assert_eq!((a.seen().len(), b.seen().len()), counts);
        for client in &mut captured {
            client.echo().unwrap();
            client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.end(), ErrorKind::UnexpectedEof);
        }
        for (proxy, pod) in [(a, &lab.a), (b, &lab.b)] {
            eventually("the proxy's connections end", || proxy.live() == 0);
            proxy.capture.lock().unwrap().remove().unwrap();
            let plan = proxy.capture.lock().unwrap().plan().clone();
            let mut netfilter = pod.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
            assert_eq!(nft::read(&mut netfilter, rules::TABLE).unwrap(), None);
            let mut route = pod.enter(|| Netlink::open(Protocol::Route)).unwrap().unwrap();
            let missing = rules::delivery(plan.marks).missing(&mut route, IpFamily::V4).unwrap();
            assert!(missing.is_some());
        }
        for client in &mut direct {
            client.echo().unwrap();
        }
    });
}

#[test]
fn a_namespace_without_the_pods_address_is_refused() {
    with_privilege(a_namespace_without_the_pods_address_is_refused, || {
        let lab = Lab::new();
        let refused = Capture::prepare(lab.b.try_clone().unwrap(), plan(A), None);
        let error = refused.unwrap_err();
        assert_eq!(error.to_string(), format!("the network namespace does not have the pod's address {}", A[0]));
        let mut none = plan(A);
        none.addresses.clear();
        let refused = Capture::prepare(lab.a.try_clone().unwrap(), none, None);
        assert!(matches!(refused.unwrap_err(), CaptureError::NoAddress));
    });
}

#[test]
fn a_pod_that_uses_our_port_is_not_captured_and_that_is_said() {
    with_privilege(a_pod_that_uses_our_port_is_not_captured_and_that_is_said, || {
        let lab = Lab::new();
        let _app = App::anywhere(&lab.b, 0, rules::INBOUND_PORT);
        let refused = Capture::prepare(lab.b.try_clone().unwrap(), plan(B), None);
        let error = refused.unwrap_err().to_string();
        assert!(error.starts_with("cannot listen on 0.0.0.0:15006: "), "{error}");
    });
}

#[test]
fn a_batch_has_a_bound_and_all_its_sockets_their_mark() {
    with_privilege(a_batch_has_a_bound_and_all_its_sockets_their_mark, || {
        let lab = Lab::new();
        let plan = plan(B);
        let capture = prepared(&lab.b, plan.clone());
        for (kind, mark) in [
            (SocketKind::OutV4, plan.marks.outer),
            (SocketKind::OutV6, plan.marks.outer),
            (SocketKind::InV4, plan.marks.inner),
            (SocketKind::InV6, plan.marks.inner),
        ] {
            let made = capture.sockets(kind, LARGEST_BATCH).unwrap();
            assert_eq!(made.len(), LARGEST_BATCH);
            assert!(made.iter().all(|socket| linux::sockets::mark(socket).unwrap() == mark));
            for wrong in [0, LARGEST_BATCH + 1] {
                let error = capture.sockets(kind, wrong).unwrap_err();
                assert!(matches!(error, CaptureError::BatchSize(count) if count == wrong));
            }
        }
    });
}

#[test]
fn a_half_closed_flow_is_kept_for_days_and_not_for_a_minute() {
    with_privilege(a_half_closed_flow_is_kept_for_days_and_not_for_a_minute, || {
        // The twin has no time-outs of ours: it shows the minute or two that they replace.
        for with_timeouts in [true, false] {
            let lab = Lab::new();
            let plan = plan(B);
            let b = Proxy::start(prepared(&lab.b, plan.clone())).begin();
            if !with_timeouts {
                let mut table = rules::ruleset(&plan);
                table.chains.retain(|chain| !chain.name.starts_with("timeouts"));
                let netfilter = lab.b.enter(|| Netlink::open(Protocol::Netfilter)).unwrap();
                nft::replace(&mut netfilter.unwrap(), &table).unwrap();
            }
            for family in FAMILIES {
                let to = SocketAddr::new(B[family], 8080);
                let silent = lab.b.enter(|| TcpListener::bind(to)).unwrap().unwrap();
                let client = Client::connect(&lab.node, B[family], 8080).unwrap();
                let (mut application, _) = silent.accept().unwrap();
                client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
                assert_eq!(application.read(&mut [0]).unwrap(), 0);
                // Its acknowledgement is the last packet: both flows are in CLOSE_WAIT for good.
                let mut seconds = Vec::new();
                eventually("both flows are half closed", || {
                    seconds = half_closed(&lab.b, family);
                    seconds.len() == 2
                });
                let expected = if with_timeouts { 431_000..=432_000 } else { 30..=120 };
                assert!(seconds.iter().all(|it| expected.contains(it)), "{seconds:?}");
            }
            drop(b);
        }
    });
}

/// For how many seconds more connection tracking keeps each half-closed flow of a family.
fn half_closed(pod: &NetNs, family: usize) -> Vec<u32> {
    let flows = pod.enter(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack"));
    let flows = flows.unwrap().expect("the kernel lists its flows (CONFIG_NF_CONNTRACK_PROCFS)");
    flows
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|flow| flow[0] == ["ipv4", "ipv6"][family] && flow[5] == "CLOSE_WAIT")
        .map(|flow| flow[4].parse().unwrap())
        .collect()
}

#[test]
fn a_pod_without_ipv6_is_captured_for_ipv4() {
    with_privilege(a_pod_without_ipv6_is_captured_for_ipv4, || {
        let lab = Lab::new();
        let links = linux::links::Links::of(&lab.b).unwrap();
        links.set("net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let prepare = |plan| Capture::prepare(lab.b.try_clone().unwrap(), plan, None);
        assert!(matches!(prepare(plan(B)).unwrap_err(), CaptureError::NotItsAddress(it) if it == B[1]));
        let mut only_v4 = plan(B);
        only_v4.addresses.remove(&B[1]);
        let mut capture = prepare(only_v4).unwrap();
        assert!(capture.listeners().out_v6.is_none() && capture.listeners().in_v6.is_none());
        assert!(matches!(capture.sockets(SocketKind::InV6, 1), Err(CaptureError::NoIpv6)));
        capture.begin().unwrap();
        assert_eq!(capture.verify().unwrap(), Standing::Intact);
        let b = Proxy::start(capture);
        let _app = App::anywhere(&lab.b, 0, 8080);
        Client::connect(&lab.node, B[0], 8080).unwrap().seen().unwrap();
        assert_eq!(b.seen().len(), 1);
    });
}
