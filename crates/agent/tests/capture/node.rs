//! The agent's process: what the runtime asks, what the proxy gets, what the control plane hears.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::nft;
use linux::privileges::{Capabilities, NET_ADMIN, SYS_ADMIN, describe_process};
use mesh::{PodUid, Uncaptured};
use nix::sys::resource::{Resource, getrlimit};
use socket2::{Domain, SockRef, Socket, Type};
use wire::discovery::NodePod;
use wire::pods::{CniRequest, CniResult, FromAgent, Kept, Listener, SocketKind, ToAgent, VERSION};

use crate::lab::{A, B, Client, GATEWAY, eventually, with_privilege};
use crate::world::{FakeProxy, Room, World, pod};

fn has_rules(namespace: &NetNs) -> bool {
    let mut netfilter = namespace.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
    nft::read(&mut netfilter, agent::rules::TABLE).unwrap().is_some()
}

/// Whether nobody listens on the ports of a pod's listeners.
fn is_free(namespace: &NetNs) -> bool {
    [agent::rules::OUTBOUND_PORT, agent::rules::INBOUND_PORT].iter().all(|port| {
        let socket = namespace.enter(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], *port)).into()).and_then(|()| socket.listen(1)).is_ok()
    })
}

#[track_caller]
fn is_failed(answer: CniResult, because: &str) {
    match answer {
        CniResult::Failed(sentence) => assert!(sentence.contains(because), "{sentence}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_is_captured_and_reported_after_the_proxy_has_it_and_not_before() {
    with_privilege(a_pod_is_captured_and_reported_after_the_proxy_has_it_and_not_before, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let room = Room::of(&world.lab.a);
        let answer = world.add("a", &room);
        let proxy = world.proxy();
        let (added, listeners) = proxy.added();
        assert_eq!((added.name.as_str(), added.addresses.as_slice()), ("a", A.as_slice()));
        assert_eq!(added.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(
            added.listeners,
            [Listener::OutboundV4, Listener::OutboundV6, Listener::InboundV4, Listener::InboundV6]
        );
        let local = |index: usize| SockRef::from(&listeners[index]).local_addr().unwrap().as_socket().unwrap();
        let expected = ["127.0.0.1:15001", "[::1]:15001", "0.0.0.0:15006", "[::]:15006"];
        assert_eq!([0, 1, 2, 3].map(|index| local(index).to_string()), expected);

        assert!(!has_rules(&world.lab.a), "nobody has said that it accepts");
        assert!(world.control.captured().is_empty() && !answer.is_finished());
        let waiting = world.page("/readyz");
        assert!(waiting.starts_with("HTTP/1.1 503") && waiting.contains(r#""pending":["shop/a"]"#), "{waiting}");
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        assert_eq!(answer.join().unwrap(), CniResult::Captured);
        assert!(has_rules(&world.lab.a) && !has_rules(&world.lab.b));
        eventually("the control plane hears of it", || world.control.captured() == [PodUid::from("a")].into());
        let pods = world.page("/pods");
        assert!(pods.contains(r#""state":"captured""#), "{pods}");
        assert!(world.page("/readyz").starts_with("HTTP/1.1 200"));
        assert!(world.page("/events").contains(r#""event":"captured""#));
    });
}

#[test]
fn the_proxy_gets_marked_sockets_of_the_pods_namespace() {
    with_privilege(the_proxy_gets_marked_sockets_of_the_pods_namespace, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        for kind in SocketKind::ALL {
            let want = |pod: &str| ToAgent::WantSockets { pod: PodUid::from(pod), kind, count: 5 };
            proxy.say(&want("a"));
            let Some((FromAgent::Sockets { error, .. }, sockets)) = proxy.hear() else { panic!("sockets") };
            assert_eq!((error.as_str(), sockets.len()), ("", 5));
            for socket in &sockets {
                assert_ne!(linux::sockets::mark(socket).unwrap(), 0);
                // Only in the pod's own namespace is that address there to be bound.
                let own = A[usize::from(matches!(kind, SocketKind::OuterV6 | SocketKind::InnerV6))];
                SockRef::from(socket).bind(&SocketAddr::new(own, 0).into()).unwrap();
            }
            proxy.say(&want("nobody"));
            let Some((FromAgent::Sockets { error, .. }, none)) = proxy.hear() else { panic!("an answer") };
            assert_eq!((error.as_str(), none.len()), ("this node captures no such pod", 0));
        }
    });
}

#[test]
fn a_namespace_of_another_pod_is_refused() {
    with_privilege(a_namespace_of_another_pod_is_refused, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A), pod("b", B)]);
        let proxy = world.proxy();
        let (room_a, room_b) = (Room::of(&world.lab.a), Room::of(&world.lab.b));
        is_failed(world.add("a", &room_b).join().unwrap(), "does not have the pod's address 10.8.1.5");
        // The twins: each in its own, and then b in that of a, which is taken.
        world.capture(&proxy, "a", &room_a);
        is_failed(world.add("b", &room_a).join().unwrap(), "held for pod a already");
        world.capture(&proxy, "b", &room_b);
        let mut not_a_namespace = room_b;
        not_a_namespace.path = "/proc/self/status".into();
        is_failed(world.add("a", &not_a_namespace).join().unwrap(), "is not a network namespace");
    });
}

#[test]
fn a_pod_that_nobody_knows_fails_when_the_time_is_up() {
    with_privilege(a_pod_that_nobody_knows_fails_when_the_time_is_up, || {
        let world = World::new(|args| args.cni_wait = 1);
        eventually("all pods are named", || world.page("/readyz").contains(r#""pods_named":true"#));
        let since = Instant::now();
        let answer = world.add("a", &Room::of(&world.lab.a)).join().unwrap();
        is_failed(answer, "pod shop/a is not captured: the control plane does not name this pod on this node");
        assert!(since.elapsed() >= Duration::from_secs(1));
        world.control.publish([pod("a", A)]);
        is_failed(world.add("a", &Room::of(&world.lab.a)).join().unwrap(), "no proxy of this node is connected");
        let metrics = world.page("/metrics");
        assert!(metrics.contains(r#"justmtls_agent_failures_total{reason="unknown-pod"} 1"#), "{metrics}");
    });
}

#[test]
fn a_pod_that_is_not_to_be_captured_starts_at_once_and_can_be_captured_later() {
    with_privilege(a_pod_that_is_not_to_be_captured_starts_at_once_and_can_be_captured_later, || {
        let world = World::new(|_| ());
        world.control.publish([NodePod { capture: Err(Uncaptured::OptedOut), ..pod("a", A) }]);
        let answer = world.add("a", &Room::of(&world.lab.a)).join().unwrap();
        assert_eq!(answer, CniResult::NotCaptured("opted-out".into()));
        let proxy = world.proxy();
        world.control.publish([pod("a", A)]);
        let (added, _listeners) = proxy.added();
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        eventually("it is captured", || world.control.captured() == [PodUid::from("a")].into());
        assert!(has_rules(&world.lab.a));
    });
}

#[test]
fn several_pods_start_at_once() {
    with_privilege(several_pods_start_at_once, || {
        let world = World::new(|_| ());
        let rooms = [Room::of(&world.lab.a), Room::of(&world.lab.b)];
        let answers = ["a", "b"].into_iter().zip(&rooms).map(|(name, room)| world.add(name, room));
        let answers: Vec<_> = answers.collect();
        let proxy = world.proxy();
        world.control.publish([pod("a", A), pod("b", B)]);
        let added = [proxy.added(), proxy.added()];
        for (pod, _) in &added {
            proxy.say(&ToAgent::PodReady { pod: pod.pod.clone() });
        }
        for answer in answers {
            assert_eq!(answer.join().unwrap(), CniResult::Captured);
        }
    });
}

#[test]
fn a_proxy_that_comes_anew_gets_the_pods_and_what_the_last_one_left() {
    with_privilege(a_proxy_that_comes_anew_gets_the_pods_and_what_the_last_one_left, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let first = world.proxy();
        world.capture(&first, "a", &Room::of(&world.lab.a));
        let files = [linux::sealed::seal("test", b"a view").unwrap(), linux::sealed::seal("test", b"keys").unwrap()];
        for (what, file) in [Kept::View, Kept::Credentials].into_iter().zip(&files) {
            first.hand(&ToAgent::Keep(what), std::slice::from_ref(file));
        }
        eventually("it is reported", || world.control.captured() == [PodUid::from("a")].into());
        drop((first, files));
        eventually("the agent misses it", || world.page("/readyz").starts_with("HTTP/1.1 503"));
        eventually("the pod stays captured", || world.control.captured() == [PodUid::from("a")].into());
        assert!(has_rules(&world.lab.a));
        assert!(!is_free(&world.lab.a), "connections wait in its listeners");

        let second = FakeProxy::connect(&world.path("proxy"));
        second.say(&ToAgent::Hello { version: VERSION, started: std::time::Duration::ZERO, leaving: false });
        let Some((FromAgent::Hello { version: VERSION, kept }, files)) = second.hear() else { panic!("a hello") };
        let contents = kept.into_iter().zip(files).map(|(what, file)| (what, linux::sealed::read(&file, 9).unwrap()));
        let mut contents: Vec<_> = contents.collect();
        contents.sort_by_key(|(what, _)| *what == Kept::Credentials);
        assert_eq!(contents, [(Kept::View, b"a view".to_vec()), (Kept::Credentials, b"keys".to_vec())]);
        let (added, listeners) = second.added();
        assert_eq!((added.pod, listeners.len()), (PodUid::from("a"), 4));
    });
}

#[test]
fn a_successor_takes_over_when_it_is_ready_and_the_other_one_is_told_to_drain() {
    with_privilege(a_successor_takes_over_when_it_is_ready_and_the_other_one_is_told_to_drain, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A), pod("b", B)]);
        let first = world.proxy();
        for (name, namespace) in [("a", &world.lab.a), ("b", &world.lab.b)] {
            world.capture(&first, name, &Room::of(namespace));
        }
        // One that goes before it is ready changes nothing.
        let failing = world.proxy();
        failing.added();
        drop(failing);
        let second = world.proxy();
        let pods = [second.added().0.pod, second.added().0.pod];
        second.say(&ToAgent::PodReady { pod: pods[0].clone() });
        // The first one still has the floor: what it asks for it gets, and nothing was said to it before.
        first.say(&ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::OuterV4, count: 1 });
        let Some((FromAgent::Sockets { .. }, sockets)) = first.hear() else { panic!("sockets") };
        assert_eq!(sockets.len(), 1);
        second.say(&ToAgent::PodReady { pod: pods[1].clone() });
        assert_eq!(first.hear().unwrap().0, FromAgent::Drain);
        // What it serves to its end may still need sockets.
        first.say(&ToAgent::Leaving);
        first.say(&ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::InnerV4, count: 1 });
        assert!(matches!(first.hear(), Some((FromAgent::Sockets { .. }, sockets)) if sockets.len() == 1));
        drop(first);
        assert!(world.page("/readyz").starts_with("HTTP/1.1 200"), "the second one serves");
        world.delete("a");
        assert_eq!(second.hear().unwrap().0, FromAgent::PodRemoved { pod: PodUid::from("a") });
    });
}

#[test]
fn a_proxy_of_another_user_or_version_and_one_that_stammers_is_sent_away() {
    with_privilege(a_proxy_of_another_user_or_version_and_one_that_stammers_is_sent_away, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let stranger = FakeProxy::connect(&world.path("proxy"));
        stranger.say(&ToAgent::Hello { version: VERSION + 1, started: std::time::Duration::ZERO, leaving: false });
        let Some((FromAgent::Refused(why), _)) = stranger.hear() else { panic!("a refusal") };
        assert!(why.contains("version 2") && why.contains("this agent 1"), "{why}");
        assert!(stranger.hear().is_none());
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        proxy.say_bytes(b"\xff\xff");
        assert!(proxy.hear().is_none());
        let proxy = world.proxy();
        proxy.added();
        let file = linux::sealed::seal("test", b"x").unwrap();
        proxy.hand(&ToAgent::Keep(Kept::View), &[file.try_clone().unwrap(), file]);
        assert!(proxy.hear().is_none());
        let proxy = world.proxy();
        proxy.added();
        proxy.say(&ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::OuterV4, count: 100_000 });
        assert!(proxy.hear().is_none());

        let other = nix::unistd::Uid::from_raw(4242);
        if nix::unistd::chown(&world.path("token"), Some(other), None).is_ok() {
            let world = World::new(|args| args.proxy_uid = other.as_raw());
            let stranger = FakeProxy::connect(&world.path("proxy"));
            assert!(stranger.hear().is_none(), "not even root may say hello in its place");
        } else {
            // A user namespace with one user: there is no other that could be let in.
            let mut args = world.arguments();
            args.proxy_uid = other.as_raw();
            let refused = std::thread::spawn(|| agent::run(args)).join().unwrap().unwrap_err();
            assert!(format!("{refused:#}").contains("for uid 4242 (--proxy-uid)"), "{refused:#}");
        }
    });
}

#[test]
fn of_a_deleted_pod_nothing_stays_open() {
    with_privilege(of_a_deleted_pod_nothing_stays_open, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A), pod("b", B)]);
        let proxy = world.proxy();
        let holders = |namespace: &NetNs| {
            let name = format!("net:[{}]", namespace.inode());
            let links = std::fs::read_dir("/proc/thread-self/fd").map(|all| {
                all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
                    .filter(|link| link.as_os_str() == name.as_str())
                    .count()
            });
            // Not to be read in a user namespace, once the process is hidden.
            links.unwrap_or(usize::MAX)
        };
        let (room_a, room_b) = (Room::of(&world.lab.a), Room::of(&world.lab.b));
        let before = [holders(&world.lab.a), holders(&world.lab.b)];
        let mut listeners = world.capture(&proxy, "a", &room_a);
        listeners.extend(world.capture(&proxy, "b", &room_b));
        assert!(!is_free(&world.lab.a) && !is_free(&world.lab.b));
        assert!(before[0] == usize::MAX || holders(&world.lab.a) > before[0], "it is held");

        world.delete("a");
        let Some((removed, _)) = proxy.hear() else { panic!("a message") };
        assert_eq!(removed, FromAgent::PodRemoved { pod: PodUid::from("a") });
        world.control.publish([]);
        let Some((removed, _)) = proxy.hear() else { panic!("a message") };
        assert_eq!(removed, FromAgent::PodRemoved { pod: PodUid::from("b") });
        drop(listeners);
        for (namespace, before) in [&world.lab.a, &world.lab.b].into_iter().zip(before) {
            eventually("its ports are free", || is_free(namespace));
            eventually("its namespace is let go", || holders(namespace) == before);
        }
        eventually("the control plane hears of it", || world.control.captured().is_empty());
        world.delete("a");
    });
}

#[test]
fn the_runtime_hears_of_a_pods_end_when_its_connections_have_ended_and_waits_no_longer_than_a_second() {
    with_privilege(
        the_runtime_hears_of_a_pods_end_when_its_connections_have_ended_and_waits_no_longer_than_a_second,
        || {
            let world = World::new(|_| ());
            world.control.publish([pod("a", A), pod("b", B)]);
            let proxy = world.proxy();
            let captured = |name: &str, inside: &NetNs, to: IpAddr| {
                let mut listeners = world.capture(&proxy, name, &Room::of(inside)).into_iter().map(TcpListener::from);
                let client = Client::connect(inside, to, 8080).unwrap();
                let (connection, _) = listeners.next().unwrap().accept().unwrap();
                (client, connection)
            };
            let delete = |name: &str| {
                let answer = world.ask(CniRequest::Del { pod: PodUid::from(name), container: String::new() });
                let Some((FromAgent::PodRemoved { .. }, _)) = proxy.hear() else { panic!("it is removed") };
                answer
            };
            let (_client, connection) = captured("a", &world.lab.a, B[0]);
            let answer = delete("a");
            assert!(!answer.is_finished());
            drop(connection);
            assert_eq!(answer.join().unwrap(), CniResult::Deleted);
            assert!(!world.page("/events").contains("ending-late"));

            let (_client, connection) = captured("b", &world.lab.b, A[0]);
            let since = Instant::now();
            assert_eq!(delete("b").join().unwrap(), CniResult::Deleted);
            assert!(since.elapsed() >= Duration::from_secs(1));
            assert!(world.page("/events").contains("ending-late"));
            drop(connection);
        },
    );
}

#[test]
fn rules_that_somebody_takes_away_come_back_and_are_counted() {
    with_privilege(rules_that_somebody_takes_away_come_back_and_are_counted, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        let mut netfilter = world.lab.a.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        assert!(nft::delete(&mut netfilter, agent::rules::TABLE).unwrap());
        eventually("the rules are back", || has_rules(&world.lab.a));
        eventually("it is counted", || world.page("/metrics").contains("justmtls_agent_repairs_total 1"));
        assert!(world.page("/events").contains("the table justmtls is gone"));
    });
}

#[test]
fn ports_are_excluded_while_the_pod_runs() {
    with_privilege(ports_are_excluded_while_the_pod_runs, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        let mut netfilter = world.lab.a.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        let mut rules = || nft::read(&mut netfilter, agent::rules::TABLE).unwrap().unwrap();
        let before = rules();
        world.control.publish([NodePod { excluded_ports: vec![9100], ..pod("a", A) }]);
        eventually("the rules change", || before.difference(&rules()).is_some());
        world.control.publish([pod("a", A)]);
        eventually("and change back", || before.difference(&rules()).is_none());
        assert!(world.page("/metrics").contains("justmtls_agent_repairs_total 0"), "not by a repair");
    });
}

#[test]
fn the_proxy_is_told_what_the_kubelet_may_ask_and_how_the_node_looks_from_within() {
    with_privilege(the_proxy_is_told_what_the_kubelet_may_ask_and_how_the_node_looks_from_within, || {
        let world = World::new(|_| ());
        let probes = |port| mesh::Probes::new([mesh::Probe { port, check: mesh::Check::Tcp }]).unwrap();
        world.control.publish([NodePod { probes: probes(80), ..pod("a", A) }]);
        let proxy = world.proxy();
        let room = Room::of(&world.lab.a);
        let answer = world.add("a", &room);
        let (added, _listeners) = proxy.added();
        assert_eq!((&added.probes, &added.gateways[..]), (&probes(80), &GATEWAY[..]));
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        assert_eq!(answer.join().unwrap(), CniResult::Captured);
        world.control.publish([NodePod { probes: probes(81), ..pod("a", A) }]);
        let (added, listeners) = proxy.added();
        assert_eq!((added.probes, &added.gateways[..], listeners.len()), (probes(81), &GATEWAY[..], 0));
    });
}

#[test]
fn the_agent_keeps_three_capabilities_and_leaves_no_core() {
    with_privilege(the_agent_keeps_three_capabilities_and_leaves_no_core, || {
        let owner = 4243;
        let file = tempfile::NamedTempFile::new().unwrap();
        // A user namespace with one user has no second one.
        let two_users = nix::unistd::chown(file.path(), Some(owner.into()), None).is_ok();
        let world = World::new(|args| args.listener_owner = two_users.then_some(owner));
        let held = describe_process(world.agent.cast_unsigned()).unwrap();
        let kept = Capabilities(1 << NET_ADMIN | 1 << SYS_ADMIN | 1);
        assert_eq!((held.effective, held.permitted, held.bounding), (kept, kept, kept));
        assert!(held.no_new_privileges && held.ambient == Capabilities::NONE);
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
        // It works all the same.
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        let listeners = world.capture(&proxy, "a", &Room::of(&world.lab.a));
        let expected = if two_users { owner } else { nix::unistd::geteuid().as_raw() };
        for listener in listeners {
            assert_eq!(nix::sys::stat::fstat(&listener).unwrap().st_uid, expected);
        }
    });
}
