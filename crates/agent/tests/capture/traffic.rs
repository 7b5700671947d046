//! What programs in captured pods see.

use std::io::{BufReader, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use agent::capture::SocketKind;
use agent::rules::TABLE;
use linux::capture::Direction;
use linux::netlink::Protocol as Netlink;
use linux::sockets::reset_on_close;
use linux::{diag, flows, nft};
use socket2::{Domain, Protocol, Socket, Type};

use crate::armed::{Tap, netlink, ports};
use crate::lab::{A, App, B, Client, FAMILIES, GATEWAY, Lab, eventually, is_refused, plan, prepared, with_privilege};
use crate::proxy::{Proxy, Way};

#[test]
fn both_ends_are_captured_and_keep_addresses_and_port() {
    with_privilege(both_ends_are_captured_and_keep_addresses_and_port, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let _app = App::anywhere(&lab.b, family, 8080);
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            let (address, port) = client.seen().unwrap();
            client.echo().unwrap();

            let (out, inward) = (a.last(), b.last());
            let destination = SocketAddr::new(B[family], 8080);
            assert_eq!((out.way, out.destination), (Way::Out, destination));
            assert_eq!(out.client, SocketAddr::new(A[family], client.local_port()));
            assert_eq!((inward.way, inward.destination), (Way::In, destination));
            // On the wire: the pod's own address, to the application's own port.
            assert_eq!(inward.client, out.other.unwrap());
            assert_eq!(inward.client.ip(), A[family]);
            // The application sees the client's address, and here even the port of the wire.
            assert_eq!((address, port), (A[family], inward.client.port()));
            assert!(!inward.fell_back);
        }
        assert_eq!((a.seen().len(), b.seen().len()), (2, 2));
    });
}

#[test]
fn a_half_closed_connection_still_gets_its_answer() {
    with_privilege(a_half_closed_connection_still_gets_its_answer, || {
        let lab = Lab::new();
        let _a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let _b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let _app = App::anywhere(&lab.b, family, 8080);
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            client.seen().unwrap();
            client.say("last\n").unwrap();
            client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.line().unwrap(), "last");
            assert_eq!(client.line().unwrap(), "bye");
            assert_eq!(client.end(), ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn a_closed_port_looks_closed() {
    with_privilege(a_closed_port_looks_closed, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            let _app = App::start(&lab.b, loopback[family], 8082);
            for port in [9, 8082] {
                is_refused(&lab.node, B[family], port);
                assert!(b.seen().is_empty());
                // From a captured pod: connected, as the kernel accepts first, and then reset.
                let end = match Client::connect(&lab.a, B[family], port) {
                    Ok(mut client) => client.end(),
                    // The reset overtook the answer to `connect`.
                    Err(error) => error.kind(),
                };
                assert_eq!(end, ErrorKind::ConnectionReset);
                assert_eq!(a.last().other, Err(ErrorKind::ConnectionRefused));
                assert!(b.seen().is_empty());
            }
        }
    });
}

#[test]
fn a_listener_that_opens_later_is_captured() {
    with_privilege(a_listener_that_opens_later_is_captured, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let error = Client::connect(&lab.node, B[family], 8080).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            let _app = App::start(&lab.b, B[family], 8080);
            let mut client = Client::connect(&lab.node, B[family], 8080).unwrap();
            assert_eq!(client.seen().unwrap().0, GATEWAY[family]);
            assert_eq!(b.last().destination, SocketAddr::new(B[family], 8080));
        }
    });
}

#[test]
fn connections_from_before_capture_go_on() {
    with_privilege(connections_from_before_capture_go_on, || {
        let lab = Lab::new();
        let apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut open = Vec::new();
        for family in FAMILIES {
            for from in [&lab.a, &lab.node] {
                for greeted in [true, false] {
                    let mut client = Client::connect(from, B[family], 8080).unwrap();
                    if greeted {
                        client.seen().unwrap();
                        client.echo().unwrap();
                    }
                    open.push((client, greeted));
                }
            }
        }
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for (client, greeted) in &mut open {
            if !*greeted {
                client.seen().unwrap();
            }
            client.echo().unwrap();
            client.echo().unwrap();
        }
        assert!(a.seen().is_empty() && b.seen().is_empty());
        // The twin: a connection from after the load is captured.
        Client::connect(&lab.a, B[0], 8080).unwrap().seen().unwrap();
        assert_eq!((a.seen().len(), b.seen().len()), (1, 1));
        drop(apps);
    });
}

#[test]
fn loopback_own_addresses_and_excluded_ports_are_not_captured() {
    with_privilege(loopback_own_addresses_and_excluded_ports_are_not_captured, || {
        let lab = Lab::new();
        let mut plan_a = plan(A);
        plan_a.excluded_out = [8443].into();
        let mut plan_b = plan(B);
        plan_b.excluded_in = [8443, 9100].into();
        let a = Proxy::start(prepared(&lab.a, plan_a)).begin();
        let b = Proxy::start(prepared(&lab.b, plan_b)).begin();
        for family in FAMILIES {
            let _apps = [8443, 8080].map(|port| App::anywhere(&lab.b, family, port));
            let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            for to in [loopback[family], B[family]] {
                let mut client = Client::connect(&lab.b, to, 8080).unwrap();
                assert_eq!(client.seen().unwrap(), (to, client.local_port()));
                client.echo().unwrap();
            }
            let mut client = Client::connect(&lab.a, B[family], 8443).unwrap();
            assert_eq!(client.seen().unwrap(), (A[family], client.local_port()));
            // Excluded and closed: the kernel answers.
            is_refused(&lab.node, B[family], 9100);
            assert!(a.seen().is_empty() && b.seen().is_empty());
        }
        let _app = App::anywhere(&lab.b, 0, 8081);
        Client::connect(&lab.a, B[0], 8081).unwrap().seen().unwrap();
        assert_eq!((a.seen().len(), b.seen().len()), (1, 1));
    });
}

#[test]
fn another_source_address_than_the_pods_own_is_not_captured() {
    with_privilege(another_source_address_than_the_pods_own_is_not_captured, || {
        let lab = Lab::new();
        let second = "10.8.1.77".parse().unwrap();
        let mut inside = linux::links::Links::of(&lab.a).unwrap();
        inside.add_address("eth0", ipnet::IpNet::from(second)).unwrap();
        let mut outside = linux::links::Links::of(&lab.node).unwrap();
        outside.add_route(ipnet::IpNet::from(second), None, "a").unwrap();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        let _app = App::anywhere(&lab.b, 0, 8080);
        for (source, captured) in [(second, 0), (A[0], 1)] {
            let mut client =
                Client::connect_with(&lab.a, B[0], 8080, |socket| socket.bind(&SocketAddr::new(source, 0).into()))
                    .unwrap();
            assert_eq!(client.seen().unwrap().0, source);
            assert_eq!(a.seen().len(), captured);
        }
    });
}

#[test]
fn thousands_of_connections_from_one_address_keep_their_port_or_get_another() {
    with_privilege(thousands_of_connections_from_one_address_keep_their_port_or_get_another, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        // Fewer ports than connections, on both sides: each port comes again while the last connection
        // that had it is in TIME_WAIT somewhere.
        for side in [&lab.node, &lab.b] {
            let links = linux::links::Links::of(side).unwrap();
            links.set("net/ipv4/ip_local_port_range", "41000 41999").unwrap();
        }
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        let mut live = Vec::new();
        for family in FAMILIES {
            for round in 0..2000 {
                let mut client = Client::connect(&lab.node, B[family], 8080)
                    .unwrap_or_else(|error| panic!("connection {round}: {error}"));
                assert_eq!(client.seen().unwrap().0, GATEWAY[family]);
                client.echo().unwrap();
                match round {
                    // Stays open to the end.
                    0..100 => live.push(client),
                    // The application ends first, and has the TIME_WAIT.
                    _ if round % 2 == 0 => {
                        client.say("quit\n").unwrap();
                        assert_eq!(client.end(), ErrorKind::UnexpectedEof);
                    }
                    // The client ends with a reset, and nobody has one.
                    _ => {
                        let socket = socket2::SockRef::from(client.stream.get_ref());
                        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
                    }
                }
            }
        }
        for client in &mut live {
            client.echo().unwrap();
        }
        let seen = b.seen();
        assert_eq!(seen.len(), 4000);
        let kept = seen.iter().filter(|seen| !seen.fell_back).count();
        assert!(kept >= 2000, "only {kept} of 4000 connections kept their port");
    });
}

/// A reset by the peer, as of a proxy that was killed, frees the port at once, and the kernel's flow stays for a while.
#[test]
fn program_and_proxy_have_each_others_port_next_after_a_reset() {
    with_privilege(program_and_proxy_have_each_others_port_next_after_a_reset, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        for (family, kind) in FAMILIES.into_iter().zip([SocketKind::OutV4, SocketKind::OutV6]) {
            let to = SocketAddr::new(B[family], 8080);
            let listener = lab.b.enter(|| TcpListener::bind(to)).unwrap().unwrap();
            let before = a.seen().len();
            let mut client = Client::connect(&lab.a, B[family], 8080).unwrap();
            let (accepted, of_proxy) = listener.accept().unwrap();
            eventually("the proxy copies", || a.seen().len() > before);
            reset_on_close(&accepted, true).unwrap();
            drop((accepted, listener));
            assert_eq!(client.end(), ErrorKind::ConnectionReset);
            eventually("the proxy lets go", || a.live() == 0);
            let of_program = SocketAddr::new(A[family], client.local_port());
            drop(client);

            let _app = App::anywhere(&lab.b, family, 8080);
            let program = Client::connect_with(&lab.a, B[family], 8080, |socket| socket.bind(&of_proxy.into()));
            program.expect("the program's connection is captured").seen().unwrap();
            assert_eq!(a.last().client, of_proxy);

            let made = a.capture.lock().unwrap().sockets(kind, 1).unwrap().remove(0);
            let socket = Socket::from(made);
            socket.bind(&of_program.into()).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket.set_nonblocking(false).unwrap();
            let mut proxy = Client { stream: BufReader::new(socket.into()) };
            assert_eq!(proxy.seen().unwrap(), (of_program.ip(), of_program.port()));
            assert_eq!(a.seen().len(), before + 2, "the proxy is not captured by itself");
        }
    });
}

/// A segment: where its data begins in the stream, what it acknowledges, and its data. With a checksum, without
/// which connection tracking does not look at it.
fn segment(from: SocketAddr, to: SocketAddr, [begins, acknowledged]: [u32; 2], data: &[u8]) -> Vec<u8> {
    const NO_OPTIONS: u8 = 5 << 4;
    const ACK: u8 = 0x10;
    let mut segment = ports(from.port(), to.port()).to_vec();
    segment.extend([begins, acknowledged].map(u32::to_be_bytes).concat());
    segment.extend([NO_OPTIONS, ACK, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    let octets = |address: IpAddr| match address {
        IpAddr::V4(it) => it.octets().to_vec(),
        IpAddr::V6(it) => it.octets().to_vec(),
    };
    let pseudo = [octets(from.ip()), octets(to.ip()), vec![0, 6, 0, segment.len() as u8]].concat();
    let word = |it: &[u8]| u32::from(u16::from_be_bytes([it[0], it.get(1).copied().unwrap_or(0)]));
    let sum: u32 = pseudo.chunks(2).chain(segment.chunks(2)).map(word).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    segment[16..18].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    segment
}

/// Where the stream goes on after the end that one said to the other, and what that acknowledged.
fn after_the_end(tap: &Tap, from: SocketAddr, to: SocketAddr) -> [u32; 2] {
    const FIN: u8 = 0x01;
    let mut last = None;
    eventually("the end to be said", || {
        for packet in tap.packets(Direction::Out) {
            let pattern = ports(from.port(), to.port());
            let Some(at) = packet.windows(pattern.len()).position(|it| it == pattern) else { continue };
            let number = |offset| u32::from_be_bytes(packet[at + offset..at + offset + 4].try_into().unwrap());
            if packet[at + 13] & FIN != 0 {
                last = Some([number(4) + 1, number(8)]);
            }
        }
        last.is_some()
    });
    last.unwrap()
}

#[test]
fn what_comes_late_takes_no_port_from_a_program() {
    with_privilege(what_comes_late_takes_no_port_from_a_program, || {
        let lab = Lab::new();
        let a = Proxy::start(prepared(&lab.a, plan(A))).begin();
        for (family, kind) in FAMILIES.into_iter().zip([SocketKind::OutV4, SocketKind::OutV6]) {
            let (peer, app) = (SocketAddr::new(B[family], 8080), App::anywhere(&lab.b, family, 8080));
            let domain = if peer.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let raw = lab.b.enter(|| Socket::new(domain, Type::RAW, Some(Protocol::TCP))).unwrap().unwrap();
            raw.bind(&SocketAddr::new(peer.ip(), 0).into()).unwrap();
            let send = |segment: &[u8], to: SocketAddr| {
                raw.send_to(segment, &SocketAddr::new(to.ip(), 0).into()).unwrap();
            };

            // Nobody's any more: the kernel's reset ends the flow.
            let own = SocketAddr::new(A[family], 34567);
            let tap = Tap::on(&lab, "a");
            send(&segment(peer, own, [7, 7], b"x"), own);
            eventually("it to be answered", || tap.seen(&ports(own.port(), peer.port())) > 0);
            Client::connect_with(&lab.a, B[family], 8080, |socket| socket.bind(&own.into())).unwrap().seen().unwrap();
            assert_eq!(a.last().client, own, "the program's connection is captured");

            // Of the proxy's that ended first, and whose port is kept for a minute: the last acknowledgement once more.
            let wire = Socket::from(a.capture.lock().unwrap().sockets(kind, 1).unwrap().remove(0));
            wire.connect_timeout(&peer.into(), Duration::from_secs(5)).unwrap();
            wire.set_nonblocking(false).unwrap();
            let own = wire.local_addr().unwrap().as_socket().unwrap();
            let mut wire = Client { stream: BufReader::new(wire.into()) };
            wire.seen().unwrap();
            let tap = Tap::on(&lab, "a");
            wire.stream.get_ref().shutdown(Shutdown::Write).unwrap();
            assert_eq!((wire.line().unwrap().as_str(), wire.end()), ("bye", ErrorKind::UnexpectedEof));
            drop(wire);
            let numbers = after_the_end(&tap, peer, own);
            // The look that is due by time alone, so that it is not the one that finds it.
            a.capture.lock().unwrap().forget_stale_when_due().unwrap();
            send(&segment(peer, own, numbers, b""), own);
            let begun = |pod| {
                flows::list(&mut netlink(pod, Netlink::Netfilter)).unwrap().iter().any(|it| it.destination == own)
            };
            eventually("it to begin a flow", || begun(&lab.a));
            let mut sockets = netlink(&lab.a, Netlink::SocketDiagnosis);
            assert_eq!(diag::forget_ended(&mut sockets, |it| it.local == own).unwrap(), 1);
            thread::scope(|scope| {
                let program = scope
                    .spawn(|| Client::connect_with(&lab.a, B[family], 8080, |socket| socket.bind(&own.into()))?.seen());
                // There is a rule for each address.
                eventually("it to be dropped", || {
                    let all = nft::counters(&mut netlink(&lab.a, Netlink::Netfilter), TABLE).unwrap();
                    all.iter().filter(|it| it.why.starts_with("T46")).nth(family).is_some_and(|it| it.packets > 0)
                });
                assert_eq!(a.capture.lock().unwrap().forget_stale_when_due().unwrap(), 1);
                program.join().unwrap().expect("the program's connection is answered");
            });
            assert_eq!(a.last().client, own, "the program's connection is captured");
            drop(app);
        }
    });
}

#[test]
fn a_privileged_source_port_is_captured_with_another_port_inside() {
    with_privilege(a_privileged_source_port_is_captured_with_another_port_inside, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        let _app = App::anywhere(&lab.b, 0, 8080);
        let mut client =
            Client::connect_with(&lab.node, B[0], 8080, |socket| socket.bind(&SocketAddr::new(GATEWAY[0], 777).into()))
                .unwrap();
        assert_eq!(client.seen().unwrap().0, GATEWAY[0]);
        client.echo().unwrap();
        assert_eq!(b.last().client.port(), 777);
    });
}

#[test]
fn one_client_port_to_two_ports_is_two_connections() {
    with_privilege(one_client_port_to_two_ports_is_two_connections, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        let _apps = [8080, 8090].map(|port| App::anywhere(&lab.b, 0, port));
        let mut clients = [8080, 8090].map(|port| {
            Client::connect_with(&lab.node, B[0], port, |socket| {
                socket.set_reuse_address(true)?;
                socket.bind(&SocketAddr::new(GATEWAY[0], 40_000).into())
            })
            .unwrap()
        });
        for client in &mut clients {
            client.seen().unwrap();
            client.echo().unwrap();
        }
        let mut destinations: Vec<u16> = b.seen().iter().map(|seen| seen.destination.port()).collect();
        destinations.sort();
        assert_eq!(destinations, [8080, 8090]);
    });
}
