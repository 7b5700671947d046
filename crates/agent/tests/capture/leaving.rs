//! Pods that are let go while they run.

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, Shutdown, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use agent::capture::{Capture, Standing};
use agent::guard::Strength;
use agent::rules;
use linux::diag;
use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::nft;
use mesh::{PodUid, Uncaptured};
use wire::discovery::NodePod;
use wire::pods::{FromAgent, ToAgent};

use crate::armed::{Tap, ports};
use crate::lab::{A, App, B, Client, FAMILIES, Lab, eventually, plan, prepared, with_privilege};
use crate::proxy::Proxy;
use crate::world::{Room, World, pod};

fn table(namespace: &NetNs) -> Option<nft::Normal> {
    let mut netfilter = namespace.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
    let mut found = None;
    // A table that goes while it is read is none that could be read.
    eventually("the rules can be read", || nft::read(&mut netfilter, rules::TABLE).map(|it| found = it).is_ok());
    found
}

fn is_draining(namespace: &NetNs) -> bool {
    table(namespace).is_some_and(|table| rules::is_draining(&table))
}

#[test]
fn a_pod_that_leaves_step_by_step_says_nothing_captured_in_clear_and_can_come_back() {
    with_privilege(a_pod_that_leaves_step_by_step_says_nothing_captured_in_clear_and_can_come_back, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let app = App::anywhere(&lab.b, 0, 8080);
        let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
        captured.seen().unwrap();
        let own = ports(captured.local_port(), 8080);
        let leave = |capture: &mut Capture| capture.leave().unwrap();
        let tap = Tap::on(&lab, "a");
        for _ in 0..3 {
            assert!(!leave(&mut a.capture.lock().unwrap()), "a connection is left");
            captured.echo().unwrap();
        }
        let count = a.seen().len();
        let mut direct = Client::connect(&lab.a, B[0], 8080).unwrap();
        direct.seen().unwrap();
        assert_eq!(a.seen().len(), count, "new ones are direct");
        // Ports that are excluded meanwhile do not bring the capture back.
        a.capture.lock().unwrap().exclude([9100].into()).unwrap();
        assert!(a.capture.lock().unwrap().is_draining());
        captured.echo().unwrap();
        assert_eq!(tap.seen(&own), 0, "a segment of a captured connection left untranslated");
        direct.say("marker\n").unwrap();
        assert_eq!(direct.line().unwrap(), "marker");
        assert!(tap.seen(b"marker") > 0, "the tap sees what passes");

        // Back again, in one batch: both go on, new ones are captured.
        a.capture.lock().unwrap().begin().unwrap();
        assert_eq!(a.capture.lock().unwrap().guarded(), Some(Strength::Opening), "a connection is from before");
        for client in [&mut captured, &mut direct] {
            client.echo().unwrap();
        }
        Client::connect(&lab.a, B[0], 8080).unwrap().seen().unwrap();
        assert_eq!(a.seen().len(), count + 1);

        // And away, when the last one has ended and not before.
        assert!(!leave(&mut a.capture.lock().unwrap()));
        assert!(!leave(&mut a.capture.lock().unwrap()) && !leave(&mut a.capture.lock().unwrap()));
        captured.echo().unwrap();
        assert_eq!(tap.seen(&own), 0);
        captured.stream.get_ref().shutdown(Shutdown::Write).unwrap();
        assert_eq!(captured.end(), ErrorKind::UnexpectedEof);
        eventually("the proxy's connections end", || a.live() == 0);
        let mut looks = 0;
        eventually("everything is gone", || {
            looks += 1;
            leave(&mut a.capture.lock().unwrap())
        });
        assert!(looks >= 2, "one look is not enough");
        assert_eq!(table(&lab.a), None);
        direct.echo().unwrap();
        drop(app);
    });
}

#[test]
fn what_a_pod_that_leaves_has_open_at_the_end_of_its_time_is_reset_and_nothing_of_it_leaves_in_clear() {
    with_privilege(
        what_a_pod_that_leaves_has_open_at_the_end_of_its_time_is_reset_and_nothing_of_it_leaves_in_clear,
        || {
            let lab = Lab::new();
            let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
            let _app = App::anywhere(&lab.b, 0, 8080);
            let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
            captured.seen().unwrap();
            let own = ports(captured.local_port(), 8080);
            a.capture.lock().unwrap().drain().unwrap();
            let mut direct = Client::connect(&lab.a, B[0], 8080).unwrap();
            direct.seen().unwrap();
            let tap = Tap::on(&lab, "a");
            // Of its two, to the program and to the wire, the proxy may end the second when it sees the first end.
            assert!((1..=2).contains(&a.capture.lock().unwrap().cut_short().unwrap()));
            assert_eq!(captured.end(), ErrorKind::ConnectionReset);
            assert_eq!(table(&lab.a), None);
            direct.echo().unwrap();
            assert_eq!(tap.seen(&own), 0, "a segment of a captured connection left untranslated");
        },
    );
}

/// A connection that the application ends first, with its proxy's: the port that the client has, and the one that is seen.
fn ended_by_the_application(from: &NetNs, to: IpAddr, proxy: &Proxy) -> (u16, u16) {
    let mut client = Client::connect(from, to, 8080).unwrap();
    let (_, seen) = client.seen().unwrap();
    let own = client.local_port();
    client.say("quit\n").unwrap();
    assert_eq!(client.line().unwrap(), "bye");
    assert_eq!(client.end(), ErrorKind::UnexpectedEof);
    drop(client);
    eventually("the proxy's connections end", || proxy.live() == 0);
    (own, seen)
}

/// A pod that leaves, and a client's port that is remembered of a flow to its application although both ends are gone.
fn leaving_with_a_port_that_is_remembered(lab: &Lab) -> (Proxy, u16) {
    let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
    // Who ends first has the port for a minute longer.
    let (port, _) = ended_by_the_application(&lab.a, B[0], &b);
    b.capture.lock().unwrap().drain().unwrap();
    (b, port)
}

/// A connection that is not captured, from this port, and the port that the application sees.
fn direct_from(lab: &Lab, port: u16) -> (Client, u16) {
    let own = SocketAddr::new(A[0], port);
    let mut direct = Client::connect_with(&lab.a, B[0], 8080, |socket| socket.bind(&own.into())).unwrap();
    let (_, seen) = direct.seen().unwrap();
    (direct, seen)
}

#[test]
fn the_rules_wait_for_what_is_not_captured_and_has_another_port_by_them() {
    with_privilege(the_rules_wait_for_what_is_not_captured_and_has_another_port_by_them, || {
        let lab = Lab::new();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let (b, port) = leaving_with_a_port_that_is_remembered(&lab);
        let leave = || b.capture.lock().unwrap().leave().unwrap();
        let (mut direct, seen) = direct_from(&lab, port);
        assert_ne!(seen, port);
        for _ in 0..3 {
            assert!(!leave());
            direct.echo().unwrap();
        }
        direct.stream.get_ref().shutdown(Shutdown::Write).unwrap();
        assert_eq!(direct.line().unwrap(), "bye");
        drop(direct);
        eventually("everything is gone", leave);
        assert_eq!(table(&lab.b), None);
    });
}

#[test]
fn what_has_another_port_by_the_rules_is_reset_when_they_go_and_does_not_hang() {
    with_privilege(what_has_another_port_by_the_rules_is_reset_when_they_go_and_does_not_hang, || {
        let lab = Lab::new();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let (b, port) = leaving_with_a_port_that_is_remembered(&lab);
        let (mut translated, seen) = direct_from(&lab, port);
        assert_ne!(seen, port);
        let mut direct = Client::connect(&lab.a, B[0], 8080).unwrap();
        direct.seen().unwrap();
        assert_eq!(b.capture.lock().unwrap().cut_short().unwrap(), 1);
        assert_eq!(translated.end(), ErrorKind::ConnectionReset);
        assert_eq!(table(&lab.b), None);
        direct.echo().unwrap();
    });
}

#[test]
fn a_flow_whose_socket_is_gone_takes_no_port_of_a_program_when_a_pod_leaves() {
    with_privilege(a_flow_whose_socket_is_gone_takes_no_port_of_a_program_when_a_pod_leaves, || {
        let lab = Lab::new();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let (b, port) = leaving_with_a_port_that_is_remembered(&lab);
        let mut other = Client::connect(&lab.a, B[0], 8080).unwrap();
        other.seen().unwrap();
        b.capture.lock().unwrap().leave().unwrap();
        let (mut direct, seen) = direct_from(&lab, port);
        assert_eq!(seen, port);
        assert!(b.capture.lock().unwrap().leave().unwrap());
        for client in [&mut direct, &mut other] {
            client.echo().unwrap();
        }
    });
}

/// Its flow has no other socket than the one in the listener's queue, which has the mark of the wire.
#[test]
fn who_waits_to_be_accepted_when_a_pod_begins_to_leave_is_heard() {
    with_privilege(who_waits_to_be_accepted_when_a_pod_begins_to_leave_is_heard, || {
        let lab = Lab::new();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let mut capture = prepared(&lab.b, plan(B));
        capture.begin().unwrap();
        let mut client = Client::connect(&lab.a, B[0], 8080).unwrap();
        assert!(!capture.leave().unwrap());
        client.say("heard\n").unwrap();
        let listeners = capture.listeners();
        listeners.in_v4.set_nonblocking(false).unwrap();
        let accepted = listeners.in_v4.accept().unwrap().0;
        accepted.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut line = String::new();
        BufReader::new(accepted).read_line(&mut line).unwrap();
        assert_eq!(line, "heard\n");
    });
}

#[test]
fn a_port_that_a_server_keeps_is_free_for_who_dials_by_another_clock() {
    with_privilege(a_port_that_a_server_keeps_is_free_for_who_dials_by_another_clock, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        let _apps = [&lab.a, &lab.b].map(|pod| FAMILIES.map(|family| App::anywhere(pod, family, 8080)));
        let mut sockets = lab.b.enter(|| Netlink::open(Protocol::SocketDiagnosis)).unwrap().unwrap();
        let mut kept = |port| diag::forget_ended(&mut sockets, |it| it.remote.port() == port).unwrap();
        // Who ends first keeps the port, here a client in the same pod.
        let client_of = |family| {
            let mut client = Client::connect(&lab.b, A[family], 8080).unwrap();
            client.seen().unwrap();
            client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!((client.line().unwrap().as_str(), client.end()), ("bye", ErrorKind::UnexpectedEof));
        };
        for family in FAMILIES {
            let ended = || ended_by_the_application(&lab.a, B[family], &b);
            let (port, _) = ended();
            eventually("the server keeps the port", || kept(port) > 0);
            let (port, _) = ended();
            client_of(family);
            eventually("it is kept no longer", || b.capture.lock().unwrap().forget_ended().unwrap() > 0);
            assert_eq!(kept(port), 0);
            assert!(kept(8080) > 0, "a client's ports are kept");
        }
    });
}

#[test]
fn another_agent_that_finds_a_pod_leaving_lets_it_go_on_leaving() {
    with_privilege(another_agent_that_finds_a_pod_leaving_lets_it_go_on_leaving, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
        captured.seen().unwrap();
        a.capture.lock().unwrap().drain().unwrap();
        let listeners = a.capture.lock().unwrap().listeners();
        let marks = a.capture.lock().unwrap().plan().marks;
        let mut next = Capture::take_over(lab.a.try_clone().unwrap(), plan(A), listeners.clone()).unwrap();
        assert!(next.is_draining() && next.guarded().is_none());
        assert_eq!((next.plan().marks, next.verify().unwrap()), (marks, Standing::Intact));
        let count = a.seen().len();
        Client::connect(&lab.a, B[0], 8080).unwrap().seen().unwrap();
        assert_eq!(a.seen().len(), count, "it is not captured again");
        captured.echo().unwrap();
        // The twin: a pod that is captured stays so.
        next.begin().unwrap();
        let next = Capture::take_over(lab.a.try_clone().unwrap(), plan(A), listeners).unwrap();
        assert!(next.has_begun() && !next.is_draining());
        captured.echo().unwrap();
    });
}

fn exempt() -> NodePod {
    NodePod { capture: Err(Uncaptured::OptedOut), ..pod("a", A) }
}

fn released() -> NodePod {
    NodePod { release: true, ..exempt() }
}

#[test]
fn an_agent_lets_a_pod_go_when_it_is_released_and_its_last_connection_has_ended() {
    with_privilege(an_agent_lets_a_pod_go_when_it_is_released_and_its_last_connection_has_ended, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        eventually("it is reported", || world.control.captured() == [PodUid::from("a")].into());
        let before = table(&world.lab.a);
        let _app = App::anywhere(&world.lab.b, 0, 8080);
        // It waits for a proxy that does not accept.
        let captured = Client::connect(&world.lab.a, B[0], 8080).unwrap();
        world.control.publish([exempt()]);
        eventually("the agent knows", || world.page("/pods").contains(r#""not_captured":"opted-out""#));
        assert!(world.page("/pods").contains(r#""state":"captured""#) && table(&world.lab.a) == before);
        assert_eq!(world.control.captured(), [PodUid::from("a")].into(), "peers may not know yet");

        world.control.publish([released()]);
        eventually("nothing new is captured", || is_draining(&world.lab.a));
        eventually("it is not reported", || world.control.captured().is_empty());
        let mut direct = Client::connect(&world.lab.a, B[0], 8080).unwrap();
        direct.seen().unwrap();
        let shown = world.page("/metrics");
        assert!(shown.contains("justmtls_agent_leaving_pods 1") && shown.contains("justmtls_agent_captured_pods 0"));
        // It comes back, and leaves again.
        world.control.publish([pod("a", A)]);
        let (added, listeners) = proxy.added();
        assert!(is_draining(&world.lab.a), "not before its proxy is ready");
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        eventually("its rules are those from before", || table(&world.lab.a) == before);
        eventually("it is reported again", || world.control.captured() == [PodUid::from("a")].into());
        world.control.publish([released()]);
        eventually("nothing new is captured", || is_draining(&world.lab.a));
        drop(captured);
        drop(accept(&listeners));
        eventually("its rules are gone", || table(&world.lab.a).is_none());
        assert_eq!(proxy.hear().unwrap().0, FromAgent::PodRemoved { pod: PodUid::from("a") });
        direct.echo().unwrap();
        eventually("it is said", || world.page("/events").contains(r#""event":"left""#));
        assert!(world.page("/pods").contains(r#""state":"not-captured""#));
        drop(listeners);
        world.control.publish([pod("a", A)]);
        let (added, _listeners) = proxy.added();
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        eventually("it is captured again", || world.control.captured() == [PodUid::from("a")].into());
    });
}

/// Accepts what waits on the outbound listener for IPv4.
fn accept(listeners: &[std::os::fd::OwnedFd]) -> std::net::TcpStream {
    let listener = std::net::TcpListener::from(listeners[0].try_clone().unwrap());
    listener.set_nonblocking(false).unwrap();
    listener.accept().unwrap().0
}

#[test]
fn a_pod_that_leaves_is_not_captured_again_by_the_next_agent() {
    with_privilege(a_pod_that_leaves_is_not_captured_again_by_the_next_agent, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        let _app = App::anywhere(&world.lab.b, 0, 8080);
        let captured = Client::connect(&world.lab.a, B[0], 8080).unwrap();
        world.control.publish([released()]);
        eventually("nothing new is captured", || is_draining(&world.lab.a));
        let before = table(&world.lab.a);

        let _second = world.another_agent();
        assert!(proxy.hear().is_none(), "the first agent has ended");
        let proxy = world.proxy();
        let (_, listeners) = proxy.added();
        eventually("it goes on leaving", || world.page("/pods").contains(r#""state":"leaving""#));
        assert_eq!(table(&world.lab.a), before, "the rules are those that were there");
        Client::connect(&world.lab.a, B[0], 8080).unwrap().seen().unwrap();
        drop((captured, accept(&listeners)));
        eventually("its rules are gone", || table(&world.lab.a).is_none());
        assert!(world.control.captured().is_empty());
    });
}

/// What a pod sends that is not TCP nobody sends again: a name that is asked for is asked for again after five seconds.
#[test]
fn who_is_let_go_and_captured_again_loses_no_packet() {
    with_privilege(who_is_let_go_and_captured_again_loses_no_packet, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let bound = |pod: &NetNs, address| pod.enter(|| UdpSocket::bind(SocketAddr::new(address, 0))).unwrap().unwrap();
        let (from, to) = (bound(&lab.a, A[0]), bound(&lab.b, B[0]));
        from.connect(to.local_addr().unwrap()).unwrap();
        to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        thread::scope(|scope| {
            let changes = scope.spawn(|| {
                let mut capture = a.capture.lock().unwrap();
                for _ in 0..10 {
                    capture.drain().unwrap();
                    capture.begin().unwrap();
                }
            });
            let (mut number, mut buffer) = (0_u32, [0; 4]);
            while !changes.is_finished() {
                from.send(&number.to_be_bytes()).unwrap();
                to.recv(&mut buffer).unwrap_or_else(|error| panic!("the datagram {number} is lost: {error}"));
                assert_eq!(buffer, number.to_be_bytes());
                number += 1;
            }
        });
        assert!(a.capture.lock().unwrap().guarded().is_some());
    });
}
