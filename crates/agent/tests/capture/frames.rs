//! What the guard on the interface makes of single packets, while there is no table: one table of packets and verdicts.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

use agent::guard::{Strength, filters};
use agent::rules::CapturePlan;
use linux::capture::{Direction, Interest, SNAP_LENGTH, Wiretap};
use linux::netlink::Protocol;
use linux::tc;
use socket2::{Domain, Protocol as IpProtocol, SockAddr, Socket, Type};

use crate::armed::{interface, netlink};
use crate::lab::{A, B, Lab, eventually, plan, with_privilege};

const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMP6: u8 = 58;
const DESTINATION: u8 = 60;

const FIN_ACK: u8 = 0x11;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;

/// `IPPROTO_RAW`: the sender makes the header.
const HEADER_INCLUDED: i32 = 255;

/// Excluded from capture.
const EXCLUDED: u16 = 9100;
const OTHERS: u16 = 40_000;

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0; 8]);
    segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

fn udp() -> Vec<u8> {
    [OTHERS, 53, 8, 0].map(u16::to_be_bytes).concat()
}

/// An IPv4 packet; `fragment` are the flags and the offset.
fn v4(source: IpAddr, protocol: u8, fragment: u16, options: &[u8], rest: &[u8]) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(to)) = (source, B[0]) else { unreachable!() };
    let header = 20 + options.len();
    let mut packet = vec![0x40 | (header / 4) as u8, 0];
    packet.extend(((header + rest.len()) as u16).to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(options);
    packet.extend(rest);
    packet
}

/// An IPv6 packet with these headers before the last one.
fn v6(headers: &[u8], last: u8, rest: &[u8]) -> Vec<u8> {
    let (IpAddr::V6(source), IpAddr::V6(to)) = (A[1], B[1]) else { unreachable!() };
    let kinds = [headers, &[last]].concat();
    let mut payload = Vec::new();
    for (kind, next) in kinds.iter().zip(&kinds[1..]) {
        payload.extend(match *kind {
            // Of a datagram of which more comes.
            FRAGMENT => [*next, 0, 0, 1, 0, 0, 0, 7],
            // No segment left; and padding.
            ROUTING => [*next, 0, 0, 0, 0, 0, 0, 0],
            _ => [*next, 0, 1, 4, 0, 0, 0, 0],
        });
    }
    payload.extend(rest);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([kinds[0], 64]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// Sends a packet from pod a as it is, and says whether it left.
fn leaves(lab: &Lab, tap: &Wiretap, packet: &[u8], mark: u32) -> bool {
    let is_v6 = packet[0] >> 4 == 6;
    let (domain, to) = if is_v6 { (Domain::IPV6, B[1]) } else { (Domain::IPV4, B[0]) };
    let raw = lab.a.enter(|| Socket::new(domain, Type::RAW, Some(IpProtocol::from(HEADER_INCLUDED)))).unwrap().unwrap();
    raw.set_mark(mark).unwrap();
    let to = SockAddr::from(SocketAddr::new(to, 0));
    // What is dropped may be said to be: "no buffer space".
    let _ = raw.send_to(packet, &to);
    // A datagram after it tells when it must have passed.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let word = format!("fence {}.", COUNT.fetch_add(1, Ordering::Relaxed));
    let fence = lab.a.enter(|| std::net::UdpSocket::bind((A[0], 0))).unwrap().unwrap();
    fence.send_to(word.as_bytes(), (B[0], 9)).unwrap();
    let (mut buffer, mut left) = (vec![0; SNAP_LENGTH], false);
    // Checksum and identification of IPv4 are the kernel's.
    let tail = if is_v6 { packet } else { &packet[12..] };
    let has = |bytes: &[u8], wanted: &[u8]| bytes.windows(wanted.len()).any(|window| window == wanted);
    eventually("the tap sees the datagram", || {
        while let Some(it) = tap.next(&mut buffer).unwrap() {
            let bytes = &buffer[..it.captured];
            // What comes back quotes it.
            if it.direction == Direction::Out {
                continue;
            }
            left |= has(bytes, tail);
            if has(bytes, word.as_bytes()) {
                return true;
            }
        }
        false
    });
    assert_eq!(tap.dropped().unwrap(), 0);
    left
}

fn tcp_v4(segment: Vec<u8>) -> Vec<u8> {
    v4(A[0], TCP, 0, &[], &segment)
}

fn with_data(mut segment: Vec<u8>) -> Vec<u8> {
    segment.extend(b"a secret");
    segment
}

/// What each packet is, the packet, and whether it leaves.
fn packets() -> Vec<(&'static str, Vec<u8>, bool)> {
    let plain = |flags| tcp(OTHERS, 80, flags);
    let stranger = "10.8.1.77".parse().unwrap();
    vec![
        ("v4 SYN", tcp_v4(plain(SYN)), false),
        ("v4 SYN and ACK", tcp_v4(plain(SYN_ACK)), false),
        ("v4 data", tcp_v4(with_data(plain(ACK))), false),
        ("v4 ACK", tcp_v4(plain(ACK)), false),
        ("v4 FIN", tcp_v4(plain(FIN_ACK)), false),
        ("v4 RST that the table did not mark", tcp_v4(plain(RST)), false),
        ("v4 data behind options", v4(A[0], TCP, 0, &[1, 1, 1, 0], &with_data(plain(ACK))), false),
        ("v4 half a header", v4(A[0], TCP, 0, &[], &plain(ACK)[..2]), false),
        ("v4 first fragment", v4(A[0], TCP, 0x2000, &[], &plain(ACK)), false),
        ("v4 second fragment", v4(A[0], TCP, 3, &[], b"a secret"), false),
        ("v4 fragment to an excluded port", v4(A[0], TCP, 0x2000, &[], &tcp(OTHERS, EXCLUDED, ACK)), false),
        ("v4 from another address", v4(stranger, TCP, 0, &[], &with_data(plain(ACK))), true),
        ("v4 UDP", v4(A[0], UDP, 0, &[], &udp()), true),
        ("v4 UDP fragment", v4(A[0], UDP, 0x2000, &[], &udp()), true),
        ("v4 ICMP", v4(A[0], 1, 0, &[], &[8, 0, 0, 0, 0, 0, 0, 1]), true),
        ("v4 SYN to an excluded port", tcp_v4(tcp(OTHERS, EXCLUDED, SYN)), true),
        ("v4 data to an excluded port", tcp_v4(with_data(tcp(OTHERS, EXCLUDED, ACK))), true),
        ("v4 excluded behind options", v4(A[0], TCP, 0, &[1, 1, 1, 0], &tcp(OTHERS, EXCLUDED, ACK)), true),
        ("v4 answer of an excluded port", tcp_v4(tcp(EXCLUDED, OTHERS, SYN_ACK)), true),
        ("v4 data of an excluded port", tcp_v4(with_data(tcp(EXCLUDED, OTHERS, ACK))), true),
        ("v4 SYN from an excluded port", tcp_v4(tcp(EXCLUDED, OTHERS, SYN)), false),
        ("v6 SYN", v6(&[], TCP, &plain(SYN)), false),
        ("v6 data", v6(&[], TCP, &with_data(plain(ACK))), false),
        ("v6 data to an excluded port", v6(&[], TCP, &with_data(tcp(OTHERS, EXCLUDED, ACK))), true),
        ("v6 data of an excluded port", v6(&[DESTINATION], TCP, &with_data(tcp(EXCLUDED, OTHERS, ACK))), true),
        ("v6 data behind hop-by-hop options", v6(&[HOP_BY_HOP], TCP, &with_data(plain(ACK))), false),
        ("v6 data behind three", v6(&[HOP_BY_HOP, DESTINATION, ROUTING], TCP, &with_data(plain(ACK))), false),
        ("v6 data behind six", v6(&[DESTINATION; 6], TCP, &with_data(plain(ACK))), false),
        ("v6 fragment", v6(&[FRAGMENT], TCP, &with_data(plain(ACK))), false),
        ("v6 fragment behind options", v6(&[DESTINATION, FRAGMENT], TCP, &plain(ACK)), false),
        ("v6 fragment with options", v6(&[FRAGMENT, DESTINATION], TCP, &plain(ACK)), false),
        ("v6 UDP", v6(&[], UDP, &udp()), true),
        ("v6 UDP behind options", v6(&[HOP_BY_HOP, DESTINATION], UDP, &udp()), true),
        ("v6 UDP fragment", v6(&[FRAGMENT], UDP, &udp()), true),
        ("v6 multicast listener report", v6(&[HOP_BY_HOP], ICMP6, &[143, 0, 0, 0, 0, 0, 0, 0]), true),
        ("v6 echo", v6(&[], ICMP6, &[128, 0, 0, 0, 0, 1, 0, 1]), true),
    ]
}

fn guarded(lab: &Lab, plan: &CapturePlan, strength: Strength) {
    let filters = filters(plan, strength).unwrap();
    let mut route = netlink(&lab.a, Protocol::Route);
    tc::set(&mut route, interface(&lab.a, A), &filters).unwrap();
    assert_eq!(tc::difference(&mut route, interface(&lab.a, A), &filters).unwrap(), None);
}

#[test]
fn of_the_pods_tcp_only_what_is_marked_or_excluded_leaves() {
    with_privilege(of_the_pods_tcp_only_what_is_marked_or_excluded_leaves, || {
        let lab = Lab::new();
        let mut plan = plan(A);
        plan.excluded_in = [EXCLUDED].into();
        plan.excluded_out = [22, EXCLUDED].into();
        let tap = lab.node.enter(|| Wiretap::open("a", Interest::Everything)).unwrap().unwrap();
        // The twin: without a guard all of them leave, so the tap sees them and it is the guard that stops them.
        for (name, packet, _) in packets() {
            assert!(leaves(&lab, &tap, &packet, 0), "{name}");
        }
        guarded(&lab, &plan, Strength::Everything);
        for (name, packet, passes) in packets() {
            assert_eq!(leaves(&lab, &tap, &packet, 0), passes, "{name}");
            // The proxy's own leave all, and none leaves with the mark of its connections to the application.
            assert!(leaves(&lab, &tap, &packet, plan.marks.outer), "{name} of the proxy");
            assert!(leaves(&lab, &tap, &packet, plan.marks.let_by()), "{name} let by");
            assert_eq!(leaves(&lab, &tap, &packet, plan.marks.inner), passes, "{name} to the application");
        }
        // Of a listener of ours, which the table would have given another port.
        for port in [15001, 15006] {
            assert!(!leaves(&lab, &tap, &tcp_v4(tcp(port, OTHERS, ACK)), plan.marks.outer));
        }
    });
}

#[test]
fn beside_connections_from_before_capture_only_what_opens_one_is_kept_in() {
    with_privilege(beside_connections_from_before_capture_only_what_opens_one_is_kept_in, || {
        let lab = Lab::new();
        let plan = plan(A);
        guarded(&lab, &plan, Strength::Opening);
        let tap = lab.node.enter(|| Wiretap::open("a", Interest::Everything)).unwrap().unwrap();
        for (flags, passes) in [(SYN, false), (SYN_ACK, false), (ACK, true), (FIN_ACK, true), (RST, true)] {
            let segment = with_data(tcp(OTHERS, 80, flags));
            assert_eq!(leaves(&lab, &tap, &tcp_v4(segment.clone()), 0), passes, "{flags:#x}");
            assert_eq!(leaves(&lab, &tap, &v6(&[DESTINATION], TCP, &segment), 0), passes, "v6 {flags:#x}");
            assert!(leaves(&lab, &tap, &tcp_v4(segment), plan.marks.outer));
        }
        // Fragments hide what they open.
        assert!(!leaves(&lab, &tap, &v4(A[0], TCP, 3, &[], b"a secret"), 0));
    });
}
