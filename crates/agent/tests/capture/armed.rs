//! The guard on the pod's interface: what it keeps in when the rules are gone, and what it lets by.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use agent::capture::{Capture, Standing};
use agent::guard::Strength;
use agent::rules;
use linux::capture::{Direction, Interest, SNAP_LENGTH, Wiretap};
use linux::diag::{self, Stage};
use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::{flows, links, nft, tc};
use socket2::{Domain, Socket, Type};
use wire::pods::Ends;

use crate::lab::{A, App, B, Client, FAMILIES, Lab, eventually, plan, prepared, with_privilege};
use crate::proxy::Proxy;

pub(crate) fn netlink(pod: &NetNs, protocol: Protocol) -> Netlink {
    pod.enter(|| Netlink::open(protocol)).unwrap().unwrap()
}

/// The pod's interface that has these addresses.
pub(crate) fn interface(pod: &NetNs, addresses: [IpAddr; 2]) -> u32 {
    let all = links::addresses(&mut netlink(pod, Protocol::Route)).unwrap();
    all.into_iter().find(|(_, address)| addresses.contains(address)).unwrap().0
}

/// How many packets the guard on the pod's interface has dropped.
fn dropped(pod: &NetNs, addresses: [IpAddr; 2]) -> u64 {
    tc::dropped(&mut netlink(pod, Protocol::Route), interface(pod, addresses)).unwrap()
}

/// Takes the guard on a pod's interface away.
pub(crate) fn disarm(pod: &NetNs, addresses: [IpAddr; 2]) {
    tc::remove(&mut netlink(pod, Protocol::Route), interface(pod, addresses), 2).unwrap();
}

/// As `nft flush ruleset` does it.
fn flush(pod: &NetNs) {
    assert!(nft::delete(&mut netlink(pod, Protocol::Netfilter), rules::TABLE).unwrap());
}

/// What passes the node's end of a pod's link.
pub(crate) struct Tap(Wiretap);

impl Tap {
    pub(crate) fn on(lab: &Lab, link: &str) -> Tap {
        Tap(lab.node.enter(|| Wiretap::open(link, Interest::Everything)).unwrap().unwrap())
    }

    /// All packets that came out of the pod so far and have these bytes in them.
    pub(crate) fn seen(&self, bytes: &[u8]) -> usize {
        self.packets(Direction::In).iter().filter(|it| it.windows(bytes.len()).any(|window| window == bytes)).count()
    }

    /// All packets that went this way, as the node sees it, since this was last asked.
    pub(crate) fn packets(&self, direction: Direction) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; SNAP_LENGTH];
        let mut packets = Vec::new();
        while let Some(packet) = self.0.next(&mut buffer).unwrap() {
            if packet.direction == direction {
                packets.push(buffer[..packet.captured].to_vec());
            }
        }
        assert_eq!(self.0.dropped().unwrap(), 0, "the wiretap was too slow, so it proves nothing");
        packets
    }
}

/// The ports of a segment from one to the other, as its header has them.
pub(crate) fn ports(from: u16, to: u16) -> [u8; 4] {
    let [a, b] = from.to_be_bytes();
    let [c, d] = to.to_be_bytes();
    [a, b, c, d]
}

#[test]
fn a_connection_from_before_capture_may_say_its_end_first() {
    with_privilege(a_connection_from_before_capture_may_say_its_end_first, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let before = FAMILIES.map(|family| {
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            client.seen().unwrap();
            client
        });
        let _a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let _b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for mut client in before {
            client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.line().unwrap(), "bye");
            assert_eq!(client.end(), ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn who_asks_while_the_capture_begins_is_captured_at_the_next_attempt() {
    with_privilege(who_asks_while_the_capture_begins_is_captured_at_the_next_attempt, || {
        for family in FAMILIES {
            let lab = Lab::new();
            // A server whose queue is full answers no SYN.
            let to = SocketAddr::new(B[family], 8080);
            let full = lab.b.enter(|| Socket::new(Domain::for_address(to), Type::STREAM, None)).unwrap().unwrap();
            full.bind(&to.into()).unwrap();
            full.listen(0).unwrap();
            let waiting = Client::connect(&lab.a, to.ip(), 8080).unwrap();
            thread::scope(|scope| {
                let opening = scope.spawn(|| Client::connect(&lab.a, to.ip(), 8080));
                eventually("it to ask", || {
                    let all = diag::connections(&mut netlink(&lab.a, Protocol::SocketDiagnosis)).unwrap();
                    all.iter().any(|it| it.remote == to && it.stage == Stage::Asking)
                });
                let _a = Proxy::start(prepared(&lab.a, plan(A))).begin();
                // By the proxy's listener: the server's queue is as full as before.
                opening.join().unwrap().unwrap();
            });
            drop(waiting);
        }
    });
}

#[test]
fn nobody_who_connects_while_the_capture_begins_waits_in_vain() {
    with_privilege(nobody_who_connects_while_the_capture_begins_waits_in_vain, || {
        for round in 0..10 {
            let lab = Lab::new();
            let family = FAMILIES[round % FAMILIES.len()];
            let _app = App::anywhere(&lab.b, family, 8080);
            let (done, count) = (AtomicBool::new(false), AtomicUsize::new(0));
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        while !done.load(Ordering::Relaxed) {
                            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
                            client.seen().unwrap();
                            client.echo().unwrap();
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                let more = |what: &str| {
                    let wanted = count.load(Ordering::Relaxed) + 100;
                    eventually(what, || count.load(Ordering::Relaxed) >= wanted);
                };
                // Also where what follows panics: the clients are waited for.
                let _end = Raise(&done);
                more("connections before the capture");
                let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
                more("connections after it began");
                assert!(a.seen().len() > 50, "they are captured");
            });
        }
    });
}

/// Is set when this goes.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_port_whose_flow_nobody_has_any_more_is_captured_again() {
    with_privilege(a_port_whose_flow_nobody_has_any_more_is_captured_again, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        for family in FAMILIES {
            let (own, to) = (SocketAddr::new(A[family], 40_000), SocketAddr::new(B[family], 8080));
            let mut live = Client::connect(&lab.a, B[family], 8080).unwrap();
            live.seen().unwrap();
            // As a last acknowledgement leaves it.
            flows::add(&mut netlink(&lab.a, Protocol::Netfilter), own, to).unwrap();
            let dropped = || {
                let all = nft::counters(&mut netlink(&lab.a, Protocol::Netfilter), rules::TABLE).unwrap();
                all.iter().filter(|it| it.why.starts_with("T46: no new")).map(|it| it.packets).sum::<u64>()
            };
            let before = dropped();
            let count = a.seen().len();
            thread::scope(|scope| {
                let opening = scope
                    .spawn(|| Client::connect_with(&lab.a, B[family], 8080, |socket| socket.bind(&own.into()))?.seen());
                eventually("the flow to keep it from being captured", || dropped() > before);
                // It waits, and has a socket that is not the flow's.
                assert_eq!(a.capture.lock().unwrap().forget_stale().unwrap(), 1);
                opening.join().unwrap().unwrap();
            });
            assert_eq!(a.seen().len(), count + 1);
            // The flows of those that live stay.
            assert_eq!(a.capture.lock().unwrap().forget_stale().unwrap(), 0);
            live.echo().unwrap();
        }
    });
}

#[test]
fn a_port_that_was_used_before_another_capture_is_answered() {
    with_privilege(a_port_that_was_used_before_another_capture_is_answered, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let connect = |family: usize| {
            let own = SocketAddr::new(A[family], 40_000);
            let mut client = Client::connect_with(&lab.a, B[family], 8080, |socket| socket.bind(&own.into())).unwrap();
            client.seen().unwrap();
            // The other end closes first, and remembers the connection for a minute.
            client.say("quit\n").unwrap();
            assert_eq!(client.line().unwrap(), "bye");
            assert_eq!(client.end(), ErrorKind::UnexpectedEof);
        };
        for _ in 0..2 {
            let mut capture = None;
            eventually("the listeners of before are closed", || {
                capture = Capture::prepare(lab.b.try_clone().unwrap(), plan(B), None).ok();
                capture.is_some()
            });
            let b = Proxy::start(capture.unwrap()).begin();
            for family in FAMILIES {
                connect(family);
            }
            assert_eq!(b.seen().len(), 2);
            eventually("the proxy's connections end", || b.live() == 0);
            b.capture.lock().unwrap().remove().unwrap();
            let listeners = b.capture.lock().unwrap().listeners();
            for listener in
                [&listeners.out_v4, &listeners.in_v4].into_iter().chain(&listeners.out_v6).chain(&listeners.in_v6)
            {
                socket2::SockRef::from(listener).shutdown(Shutdown::Both).unwrap();
            }
        }
    });
}

#[test]
fn a_flush_lets_nothing_out_and_captured_connections_go_on_after_it() {
    with_privilege(a_flush_lets_nothing_out_and_captured_connections_go_on_after_it, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        for family in FAMILIES {
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            client.seen().unwrap();
            client.echo().unwrap();
            let tap = Tap::on(&lab, "a");
            let (own, before) = (ports(client.local_port(), 8080), dropped(&lab.a, A));
            flush(&lab.a);
            client.say("secret\n").unwrap();
            eventually("the guard drops what would leave in clear", || dropped(&lab.a, A) > before);
            // New ones, too, do not get out.
            let to = SocketAddr::new(B[family], 8080);
            Client::connect_with(&lab.a, B[family], 8080, |socket| {
                socket.set_nonblocking(true)?;
                let _ = socket.connect(&to.into());
                Err(ErrorKind::Other.into())
            })
            .unwrap_err();
            assert_eq!((tap.seen(&own), tap.seen(b"secret")), (0, 0));
            a.capture.lock().unwrap().repair().unwrap();
            assert_eq!(client.line().unwrap(), "secret");
            client.echo().unwrap();

            // The twin: without the guard the client's own segments leave, and the tap sees them.
            disarm(&lab.a, A);
            flush(&lab.a);
            // Its acknowledgement may have been answered with a reset by now.
            let _ = client.say("secret\n");
            let mut seen = 0;
            eventually("the tap sees it", || {
                seen += tap.seen(&own);
                seen > 0
            });
            a.capture.lock().unwrap().repair().unwrap();
        }
    });
}

/// Interface index of `lo`.
const LOOPBACK: u32 = 1;

#[test]
fn a_client_that_only_listens_keeps_its_connection_through_a_flush() {
    with_privilege(a_client_that_only_listens_keeps_its_connection_through_a_flush, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let dropped = || tc::dropped(&mut netlink(&lab.a, Protocol::Route), LOOPBACK).unwrap();
        for family in FAMILIES {
            let server = lab.b.enter(|| TcpListener::bind((B[family], 8080))).unwrap().unwrap();
            let connection = || {
                let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
                let (mut server, _) = server.accept().unwrap();
                server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                server.write_all(b"before\n").unwrap();
                assert_eq!(client.line().unwrap(), "before");
                (client, server)
            };
            let (mut client, mut server_side) = connection();
            let before = dropped();
            flush(&lab.a);
            server_side.write_all(b"news\n").unwrap();
            eventually("what cannot be translated is dropped on lo", || dropped() > before);
            a.capture.lock().unwrap().repair().unwrap();
            assert_eq!(client.line().unwrap(), "news");
            client.say("thanks\n").unwrap();
            let mut thanks = [0; 7];
            server_side.read_exact(&mut thanks).unwrap();
            assert_eq!(&thanks, b"thanks\n");
        }
    });
}

#[test]
fn a_server_answers_through_a_flush_without_a_word_in_clear() {
    with_privilege(a_server_answers_through_a_flush_without_a_word_in_clear, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let mut connections = Vec::new();
            // With the client's port kept inside, and with another one: what arrives meets the application's socket, or none.
            let _app = App::anywhere(&lab.b, family, 8080);
            for source in [0, 777] {
                let mut client = Client::connect_with(&lab.node, B[family], 8080, |socket| {
                    socket.bind(&SocketAddr::new(crate::lab::GATEWAY[family], source).into())
                })
                .unwrap();
                client.seen().unwrap();
                connections.push(client);
            }
            let before = dropped(&lab.b, B);
            flush(&lab.b);
            let tap = Tap::on(&lab, "b");
            for client in &mut connections {
                client.say("secret\n").unwrap();
            }
            eventually("the guard drops what answers", || dropped(&lab.b, B) >= before + 2);
            // Nobody new is answered by the application itself.
            let direct = Client::connect_with(&lab.node, B[family], 8080, |socket| {
                socket.set_nonblocking(true)?;
                let _ = socket.connect(&SocketAddr::new(B[family], 8080).into());
                Err(ErrorKind::Other.into())
            });
            direct.unwrap_err();
            eventually("its answer is dropped", || dropped(&lab.b, B) >= before + 3);
            assert_eq!(tap.seen(&8080u16.to_be_bytes()), 0);
            b.capture.lock().unwrap().repair().unwrap();
            for client in &mut connections {
                assert_eq!(client.line().unwrap(), "secret");
                client.echo().unwrap();
            }
        }
    });
}

#[test]
fn connections_from_before_capture_hold_the_guard_back_until_they_end() {
    with_privilege(connections_from_before_capture_hold_the_guard_back_until_they_end, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut open: Vec<Client> = Vec::new();
        for family in FAMILIES {
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            client.seen().unwrap();
            open.push(client);
        }
        // One end in each pod; both have it from before their capture.
        let proxies = [(&lab.a, A), (&lab.b, B)].map(|(pod, addresses)| {
            let proxy = Proxy::start(prepared(pod, plan(addresses))).begin();
            assert_eq!(proxy.capture.lock().unwrap().guarded(), Some(Strength::Opening));
            proxy
        });
        let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
        captured.seen().unwrap();
        let strengthen = || proxies.each_ref().map(|it| it.capture.lock().unwrap().strengthen().unwrap());
        for client in &mut open {
            assert_eq!(strengthen(), [false, false]);
            client.echo().unwrap();
            client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.end(), ErrorKind::UnexpectedEof);
        }
        drop(open);
        // Captured ones do not count.
        eventually("they have ended", || {
            strengthen();
            proxies.iter().all(|it| it.capture.lock().unwrap().guarded() == Some(Strength::Everything))
        });
        assert_eq!(strengthen(), [false, false], "it is said once");
        captured.echo().unwrap();
        for proxy in &proxies {
            assert_eq!(proxy.capture.lock().unwrap().verify().unwrap(), Standing::Intact);
        }
    });
}

#[test]
fn what_was_opened_before_capture_is_listed_and_nothing_else_is_ended() {
    with_privilege(what_was_opened_before_capture_is_listed_and_nothing_else_is_ended, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut open = FAMILIES.map(|family| {
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            client.seen().unwrap();
            client
        });
        let [client_side, server_side] =
            [(&lab.a, A), (&lab.b, B)].map(|(pod, addresses)| Proxy::start(prepared(pod, plan(addresses))).begin());
        let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
        captured.seen().unwrap();
        let ends = |client: &Client| {
            let stream = client.stream.get_ref();
            Ends { own: stream.peer_addr().unwrap(), peer: stream.local_addr().unwrap() }
        };
        assert_eq!(client_side.capture.lock().unwrap().opened_before().unwrap(), [], "nobody listens there");
        let server = server_side.capture.lock().unwrap();
        let mut all = open.each_ref().map(ends);
        all.sort();
        assert_eq!(server.opened_before().unwrap(), all);
        // Also when it is asked for what is not from before.
        let these = [ends(&captured), ends(&open[0])];
        assert_eq!(server.end_from_before(|ends| these.contains(ends)).unwrap(), 1);
        assert_eq!(open[0].end(), ErrorKind::ConnectionReset);
        assert_eq!(server.opened_before().unwrap(), [ends(&open[1])]);
        open[1].echo().unwrap();
        captured.echo().unwrap();
    });
}

#[test]
fn what_begins_while_a_rule_is_gone_is_captured_when_it_is_back() {
    with_privilege(what_begins_while_a_rule_is_gone_is_captured_when_it_is_back, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        // What a pod opens, and what is opened to one.
        // The chains that would catch it are gone, and connection tracking is at work: as while a table comes back.
        for (gone, pod, addresses, client) in
            [(["capture_out", "guard_out"], &lab.a, A, &lab.a), (["capture_in", "guard_in"], &lab.b, B, &lab.node)]
        {
            let plan = plan(addresses);
            let proxy = Proxy::start(prepared(pod, plan.clone())).begin();
            let mut without = rules::ruleset(&plan);
            let chains = without.chains.iter_mut().filter(|it| gone.contains(&&*it.name));
            chains.for_each(|chain| chain.rules.clear());
            for family in FAMILIES {
                nft::replace(&mut netlink(pod, Protocol::Netfilter), &without).unwrap();
                let before = proxy.seen().len();
                thread::scope(|scope| {
                    let opening = scope.spawn(|| Client::connect(client, B[family], 8080)?.seen());
                    eventually("it to begin past the rules", || {
                        let flows = flows::list(&mut netlink(pod, Protocol::Netfilter)).unwrap();
                        flows.iter().any(|it| {
                            let is_it = (it.destination.ip(), it.destination.port()) == (B[family], 8080);
                            is_it && it.phase == flows::Phase::Opening && !it.is_translated()
                        })
                    });
                    assert_eq!(proxy.seen().len(), before, "{gone:?}: it is not captured");
                    let mut capture = proxy.capture.lock().unwrap();
                    capture.repair().unwrap();
                    // The last acknowledgement of the connection before may have made another that is stale.
                    assert!(capture.forget_stale_when_due().unwrap() >= 1);
                    drop(capture);
                    opening.join().unwrap().unwrap();
                });
                assert_eq!(proxy.seen().len(), before + 1, "{gone:?}: it is captured");
            }
        }
    });
}

#[test]
fn what_the_proxy_dials_while_the_rules_are_gone_goes_on_when_they_are_back() {
    with_privilege(what_the_proxy_dials_while_the_rules_are_gone_goes_on_when_they_are_back, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let plan = plan(A);
        let proxy = Proxy::start(prepared(&lab.a, plan.clone())).begin();
        let mut captured = Client::connect(&lab.a, B[0], 8080).unwrap();
        captured.seen().unwrap();
        flush(&lab.a);
        // As the proxy's sockets are: marked.
        let dial = |family: usize| {
            let mut client =
                Client::connect_with(&lab.a, B[family], 8080, |socket| socket.set_mark(plan.marks.outer)).unwrap();
            let seen = client.seen().unwrap();
            (client, seen)
        };
        let dialled = FAMILIES.map(dial);
        proxy.capture.lock().unwrap().repair().unwrap();
        for (mut client, (_, port)) in dialled {
            client.echo().unwrap();
            assert_eq!(client.stream.get_ref().local_addr().unwrap().port(), port, "the peer knows it by this port");
        }
        captured.echo().unwrap();
    });
}

/// While the kernel loads or drops a table its chains are there without their rules, and connection tracking is at work.
#[test]
fn open_connections_keep_their_ports_while_nothing_tells_the_proxys_from_the_captured_ones() {
    with_privilege(open_connections_keep_their_ports_while_nothing_tells_the_proxys_from_the_captured_ones, || {
        let lab = Lab::new();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        for (pod, addresses, client) in [(&lab.a, A, &lab.a), (&lab.b, B, &lab.node)] {
            let plan = plan(addresses);
            let proxy = Proxy::start(prepared(pod, plan.clone())).begin();
            let mut without = rules::ruleset(&plan);
            let chains = without.chains.iter_mut().filter(|it| ["apart", "apart_in"].contains(&&*it.name));
            assert_eq!(chains.map(|chain| chain.rules.clear()).count(), 2);
            for family in FAMILIES {
                let mut open = Client::connect(client, B[family], 8080).unwrap();
                open.seen().unwrap();
                nft::replace(&mut netlink(pod, Protocol::Netfilter), &without).unwrap();
                let tap = Tap(pod.enter(|| Wiretap::open("lo", Interest::Everything)).unwrap().unwrap());
                open.say("ping\n").unwrap();
                eventually("it to be on its way inside the pod", || tap.seen(b"ping\n") > 0);
                let mut capture = proxy.capture.lock().unwrap();
                capture.repair().unwrap();
                capture.forget_stale_when_due().unwrap();
                drop(capture);
                assert_eq!(open.line().unwrap(), "ping");
                open.echo().unwrap();
                // What began meanwhile would be in the way of who has the port next.
                let flows = flows::list(&mut netlink(pod, Protocol::Netfilter)).unwrap();
                let wire = proxy.last().other.unwrap();
                let left = flows.iter().find(|it| it.zone == 0 && !it.is_translated() && it.source == wire);
                assert_eq!(left, None);
            }
        }
    });
}

#[test]
fn another_agent_finds_the_guard_armed_and_leaves_it_so() {
    with_privilege(another_agent_finds_the_guard_armed_and_leaves_it_so, || {
        let lab = Lab::new();
        let plan = plan(A);
        let mut first = prepared(&lab.a, plan.clone());
        first.begin().unwrap();
        assert_eq!(first.guarded(), Some(Strength::Everything));
        drop(first);
        // A connection that would hold a new guard back: what is armed already stays armed.
        let _app = App::anywhere(&lab.b, 0, 8080);
        disarm(&lab.a, A);
        flush(&lab.a);
        let _open = Client::connect(&lab.a, B[0], 8080).unwrap();
        let mut second = prepared(&lab.a, plan.clone());
        second.begin().unwrap();
        assert_eq!(second.guarded(), Some(Strength::Opening), "the twin: nothing was armed");
        let whole = agent::guard::filters(&plan, Strength::Everything).unwrap();
        tc::set(&mut netlink(&lab.a, Protocol::Route), interface(&lab.a, A), &whole).unwrap();
        drop(second);
        let mut third: Capture = prepared(&lab.a, plan);
        third.begin().unwrap();
        assert_eq!(third.guarded(), Some(Strength::Everything));
    });
}
