//! What must not get through.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use agent::capture::SocketKind;
use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::nft;
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use crate::armed::{Tap, disarm};
use crate::lab::{A, App, B, Client, FAMILIES, GATEWAY, Lab, eventually, is_refused, plan, prepared, with_privilege};
use crate::proxy::Proxy;

#[test]
fn the_listeners_cannot_be_dialled() {
    with_privilege(the_listeners_cannot_be_dialled, || {
        let lab = Lab::new();
        let b = Proxy::start(prepared(&lab.b, plan(B))).begin();
        for family in FAMILIES {
            let loopback: IpAddr = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()][family];
            for port in [15001, 15006] {
                for (from, to) in [(&lab.node, B[family]), (&lab.b, B[family]), (&lab.b, loopback)] {
                    is_refused(from, to, port);
                }
            }
        }
        assert!(b.seen().is_empty());
    });
}

#[test]
fn a_segment_that_fits_no_flow_does_not_leave_in_clear() {
    with_privilege(a_segment_that_fits_no_flow_does_not_leave_in_clear, || {
        let lab = Lab::new();
        let plan = plan(A);
        let _a = Proxy::start(prepared(&lab.a, plan.clone())).begin();
        let _apps = FAMILIES.map(|family| App::anywhere(&lab.b, family, 8080));
        // Without the guard on the interface, which would drop it, too.
        disarm(&lab.a, A);
        let mut netfilter = lab.a.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        let mut clients = FAMILIES.map(|family| Client::connect(&lab.a, B[family], 8080).unwrap());
        let mut send = |netfilter: &mut Netlink| {
            for (client, family) in clients.iter_mut().zip(FAMILIES) {
                that_fits_no_flow(&lab.a, A[family], B[family], client.local_port(), b"secret");
            }
            let counters = nft::counters(netfilter, "justmtls").unwrap();
            counters
                .iter()
                .filter(|it| it.why.starts_with("T22") && it.chain == "guard_out")
                .map(|it| it.packets)
                .sum::<u64>()
        };
        let tap = Tap::on(&lab, "a");
        let dropped: u64 = send(&mut netfilter);
        assert_eq!((dropped, tap.seen(b"secret")), (2, 0));

        // The twin: translation does skip them.
        let mut open = agent::rules::ruleset(&plan);
        let guard = open.chains.iter_mut().find(|chain| chain.name == "guard_out").unwrap();
        guard.rules.retain(|rule| !format!("{rule:?}").contains("FlowInvalid"));
        nft::replace(&mut netfilter, &open).unwrap();
        assert_eq!(send(&mut netfilter), 0);
        let mut seen = 0;
        eventually("the tap sees them", || {
            seen += tap.seen(b"secret");
            seen >= 2
        });
        // Captured connections never noticed.
        for client in &mut clients {
            client.seen().unwrap();
            client.echo().unwrap();
        }
    });
}

/// A segment between the ends of a connection to port 8080, with flags that none of it can have: an end without an
/// acknowledgement (RFC 9293, 3.10.7.4).
fn that_fits_no_flow(pod: &NetNs, from: IpAddr, to: IpAddr, port: u16, payload: &[u8]) {
    const FIN: u8 = 0x01;
    let domain = if from.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let raw = pod.enter(|| Socket::new(domain, Type::RAW, Some(IpProtocol::TCP))).unwrap().unwrap();
    raw.bind(&SocketAddr::new(from, 0).into()).unwrap();
    let mut segment = [port.to_be_bytes(), 8080u16.to_be_bytes()].concat();
    segment.extend([0; 8]);
    segment.extend([5 << 4, FIN, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    // Where it is dropped its sender is told (EPERM).
    let _ = raw.send_to(&segment, &SocketAddr::new(to, 0).into());
}

#[test]
fn a_flow_that_was_picked_up_without_translation_does_not_reach_the_application() {
    with_privilege(a_flow_that_was_picked_up_without_translation_does_not_reach_the_application, || {
        let lab = Lab::new();
        let plan = plan(B);
        let b = Proxy::start(prepared(&lab.b, plan.clone())).begin();
        let app = App::anywhere(&lab.b, 0, 8080);
        let mut netfilter = lab.b.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        let from = |port| {
            acknowledge_with_md5(&lab, port);
            Client::connect_with(&lab.node, B[0], 8080, |socket| socket.bind(&SocketAddr::new(GATEWAY[0], port).into()))
        };
        assert_eq!(from(45_001).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(app.peers.lock().unwrap().is_empty() && b.seen().is_empty());
        let counters = nft::counters(&mut netfilter, "justmtls").unwrap();
        let guard = counters.iter().find(|it| it.why.starts_with("D1, T46")).unwrap();
        assert_eq!((guard.chain.as_str(), guard.packets), ("guard_in", 1));

        // The twin: without the guards the attack works, so it was they that stopped it.
        disarm(&lab.b, B);
        let mut open = agent::rules::ruleset(&plan);
        open.chains.retain(|chain| chain.name != "guard_in");
        nft::replace(&mut netfilter, &open).unwrap();
        from(45_002).unwrap().seen().unwrap();
        assert_eq!(app.peers.lock().unwrap().len(), 1);
        assert!(b.seen().is_empty());
    });
}

/// Sends an ACK from the node's `port` to the application. Its MD5 option makes the listener drop it without a
/// reset, which would end the flow that connection tracking now has.
fn acknowledge_with_md5(lab: &Lab, port: u16) {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (GATEWAY[0], B[0]) else { unreachable!() };
    let mut segment = Vec::new();
    segment.extend(port.to_be_bytes());
    segment.extend(8080u16.to_be_bytes());
    segment.extend(1000u32.to_be_bytes());
    segment.extend(2000u32.to_be_bytes());
    segment.extend([10 << 4, 0x10, 3, 232, 0, 0, 0, 0]);
    segment.extend([19, 18]);
    segment.extend([0; 16]);
    segment.extend([1, 1]);
    let mut summed = Vec::new();
    summed.extend(source.octets());
    summed.extend(destination.octets());
    summed.extend([0, 6, 0, segment.len() as u8]);
    summed.extend(&segment);
    let sum: u32 = summed.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    let raw = lab.node.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(IpProtocol::TCP)));
    let raw = raw.unwrap().unwrap();
    raw.bind(&SocketAddr::new(GATEWAY[0], 0).into()).unwrap();
    raw.send_to(&segment, &SocketAddr::new(B[0], 0).into()).unwrap();
}

#[test]
fn nothing_leaves_uncaptured_and_the_proxy_speaks_from_the_pods_addresses_only() {
    with_privilege(nothing_leaves_uncaptured_and_the_proxy_speaks_from_the_pods_addresses_only, || {
        let lab = Lab::new();
        let plan = plan(A);
        let a = Proxy::start(prepared(&lab.a, plan.clone())).begin();
        let app = App::anywhere(&lab.b, 1, 8080);
        let mut netfilter = lab.a.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
        let dropped = |netfilter: &mut Netlink, why: &str| {
            let counters = nft::counters(netfilter, "justmtls").unwrap();
            let packets = counters.iter().filter(|it| it.why.starts_with(why)).map(|it| it.packets);
            packets.sum::<u64>()
        };
        // A socket of the proxy's, bound to a stranger's address (IPV6_FREEBIND needs no privilege).
        let made = a.capture.lock().unwrap().sockets(SocketKind::OutV6, 1).unwrap().remove(0);
        let socket = Socket::from(made);
        socket.set_freebind_v6(true).unwrap();
        let stranger: SocketAddr = "[2001:db8::7]:0".parse().unwrap();
        socket.bind(&stranger.into()).unwrap();
        let to = SocketAddr::new(B[1], 8080);
        assert!(socket.connect(&to.into()).is_err());
        assert_ne!(dropped(&mut netfilter, "T14"), 0);

        // A program of the pod, while the rule that would capture it is gone.
        let mut without = agent::rules::ruleset(&plan);
        without.chains.retain(|chain| chain.name != "capture_out");
        nft::replace(&mut netfilter, &without).unwrap();
        let result = Client::connect_with(&lab.a, B[1], 8080, |socket| {
            socket.set_nonblocking(true)?;
            let _ = socket.connect(&to.into());
            Err(ErrorKind::Other.into())
        });
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Other);
        assert_ne!(dropped(&mut netfilter, "T46"), 0);
        assert!(app.peers.lock().unwrap().is_empty());

        // The twin: with the rule it gets there.
        a.capture.lock().unwrap().repair().unwrap();
        Client::connect(&lab.a, B[1], 8080).unwrap().seen().unwrap();
    });
}
