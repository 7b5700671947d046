//! The guard on a pod's interface, as a pure function of the pod: it does not depend on nftables (D2).
//!
//! It is a program at the `clsact` hook, behind everything that nftables does. From the pod's own addresses no TCP leaves that
//! does not carry the mark of the proxy's sockets, or that which the table gives to what it lets by. So when the table is
//! gone nothing leaves in clear, and captured connections wait: not even an acknowledgement or a reset of theirs gets out, to
//! which a stranger would answer with a reset.
//!
//! What it never looks at: other protocols than TCP, and other source addresses than the pod's (T41). Packets on `lo` do not
//! come here: there a guard of its own keeps what our outbound listeners say from programs while it cannot be translated.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use linux::bpf::{Assembler, Instruction, Label, Size, Test};
use linux::diag::Connection;
use linux::tc::{Answer, DROP, Filter, PASS};

use crate::rules::{CapturePlan, INBOUND_PORT, OUTBOUND_PORT};

/// How much of the pod's traffic the guard judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strength {
    /// Only what opens a connection: the pod has connections from before its capture, which go on in clear until they end.
    Opening,
    /// Every segment.
    Everything,
}

/// The pod's guard, one filter after the other. `None` where it has more excluded ports than fit a program.
pub fn filters(plan: &CapturePlan, strength: Strength) -> Option<Vec<Filter>> {
    let mut drop = Assembler::new();
    drop.answer(DROP);
    // Two, because a load of bytes that a packet does not have ends a program with 0. Of a program whose answer is the verdict
    // that would be "pass"; of this one it is "let the next one decide", and that one drops.
    Some(vec![
        Filter { answer: Answer::Pass, program: program(plan, strength)? },
        Filter { answer: Answer::Verdict, program: drop.finish()? },
    ])
}

/// The guard on `lo`. What the proxy says to a captured client comes there from the address that the client dialled, as the
/// table translates it. When the table is gone it comes from the listener's own address: the client's kernel knows no such
/// connection and would answer with a reset, which ends it. Dropped, it is sent again.
///
/// Resets pass: who dials the listeners themselves is refused by one (T23). As a verdict [`PASS`] is `TC_ACT_UNSPEC`: the next
/// filter decides.
pub fn inside() -> Option<Vec<Filter>> {
    let mut code = Assembler::new();
    let (v4, v6, tcp, pass) = (code.label(), code.label(), code.label(), code.label());
    code.load_protocol();
    code.jump_if(Test::Is(IPV4), v4);
    code.jump_if(Test::Is(IPV6), v6);
    code.jump(pass);

    code.here(v4);
    code.load(Size::Byte, 9);
    code.jump_unless(Test::Is(TCP), pass);
    code.load(Size::Word, 12);
    code.jump_unless(Test::Is(Ipv4Addr::LOCALHOST.into()), pass);
    code.load_x_with_header_length();
    code.jump(tcp);

    code.here(v6);
    code.load(Size::Byte, 6);
    code.jump_unless(Test::Is(TCP), pass);
    for (word, offset) in [0, 0, 0, 1].into_iter().zip((8..).step_by(4)) {
        code.load(Size::Word, offset);
        code.jump_unless(Test::Is(word), pass);
    }
    code.set(IPV6_HEADER);
    code.store(AT);
    code.load_x_cell(AT);

    code.here(tcp);
    code.load_at_x(Size::Half, 0);
    code.jump_unless(Test::Is(OUTBOUND_PORT.into()), pass);
    code.load_at_x(Size::Byte, 13);
    code.jump_if(Test::HasAny(RST), pass);
    code.answer(DROP);
    code.here(pass);
    code.answer(PASS);
    Some(vec![Filter { answer: Answer::Verdict, program: code.finish()? }])
}

/// Of all connections of the pod's namespace those that speak for it in clear, and have to be let go on: they were open before
/// its capture, or to a port that was excluded then.
///
/// A captured connection is known by the proxy's socket at its other end, in the same namespace.
pub fn from_before(plan: &CapturePlan, all: &[Connection]) -> Vec<Connection> {
    let ends: HashSet<(SocketAddr, SocketAddr)> = all.iter().map(|it| (it.local, it.remote)).collect();
    let captured: HashSet<SocketAddr> =
        all.iter().filter(|it| it.local.port() == OUTBOUND_PORT).map(|it| it.remote).collect();
    let is_own = |address: &SocketAddr| plan.addresses.contains(&address.ip());
    let is_from_before = |it: &&Connection| {
        is_own(&it.local)
            && !is_own(&it.remote)
            && !it.remote.ip().is_loopback()
            && it.mark != plan.marks.outer
            && !plan.excluded_in.contains(&it.local.port())
            && !plan.excluded_out.contains(&it.remote.port())
            && !ends.contains(&(it.remote, it.local))
            && !captured.contains(&it.local)
    };
    all.iter().filter(is_from_before).copied().collect()
}

const IPV4: u32 = 0x0800;
const IPV6: u32 = 0x86dd;
const TCP: u32 = 6;
/// Headers of IPv6 behind which there may be TCP: hop-by-hop options, routing, destination options; and fragments.
const EXTENSIONS: [u32; 3] = [0, 43, 60];
const FRAGMENT: u32 = 44;
/// Of an IPv4 header: more fragments, or an offset.
const IS_FRAGMENT: u32 = 0x3fff;
/// So many extension headers are walked through; what has more is taken for TCP. Nobody sends more than two.
const MOST_EXTENSIONS: usize = 4;
const IPV6_HEADER: u32 = 40;
const SYN: u32 = 0x02;
const RST: u32 = 0x04;
const ACK: u32 = 0x10;
/// The cells of the machine: the next header's kind, and where it begins.
const NEXT: u8 = 0;
const AT: u8 = 1;

struct Ways {
    pass: Label,
    drop: Label,
    /// At a TCP header, whose offset is in X.
    tcp: Label,
    /// What may be TCP, of which the ports cannot be seen.
    hidden: Label,
}

fn program(plan: &CapturePlan, strength: Strength) -> Option<Vec<Instruction>> {
    let mut code = Assembler::new();
    let ways = Ways { pass: code.label(), drop: code.label(), tcp: code.label(), hidden: code.label() };
    let (v4, v6) = (code.label(), code.label());
    code.load_protocol();
    code.jump_if(Test::Is(IPV4), v4);
    code.jump_if(Test::Is(IPV6), v6);
    code.jump(ways.pass);

    code.here(v4);
    ipv4(&mut code, &ways, plan);
    code.here(v6);
    ipv6(&mut code, &ways, plan);
    code.here(ways.tcp);
    tcp(&mut code, &ways, plan, strength);
    code.here(ways.hidden);
    code.load_mark();
    for mark in [plan.marks.outer, plan.marks.let_by()] {
        code.jump_if(Test::Is(mark), ways.pass);
    }

    code.here(ways.drop);
    code.answer(0);
    code.here(ways.pass);
    code.answer(PASS);
    code.finish()
}

fn ipv4(code: &mut Assembler, ways: &Ways, plan: &CapturePlan) {
    code.load(Size::Byte, 9);
    code.jump_unless(Test::Is(TCP), ways.pass);
    let own = code.label();
    code.load(Size::Word, 12);
    for address in &plan.addresses {
        if let IpAddr::V4(address) = address {
            code.jump_if(Test::Is((*address).into()), own);
        }
    }
    code.jump(ways.pass);
    code.here(own);
    code.load(Size::Half, 6);
    code.jump_if(Test::HasAny(IS_FRAGMENT), ways.hidden);
    code.load_x_with_header_length();
    code.jump(ways.tcp);
}

fn ipv6(code: &mut Assembler, ways: &Ways, plan: &CapturePlan) {
    let own = code.label();
    for address in &plan.addresses {
        let IpAddr::V6(address) = address else { continue };
        let other = code.label();
        for (word, offset) in address.octets().chunks_exact(4).zip((8..).step_by(4)) {
            let word = word.iter().fold(0, |all, byte| all << 8 | u32::from(*byte));
            code.load(Size::Word, offset);
            code.jump_unless(Test::Is(word), other);
        }
        code.jump(own);
        code.here(other);
    }
    code.jump(ways.pass);
    code.here(own);

    code.set(IPV6_HEADER);
    code.store(AT);
    code.load(Size::Byte, 6);
    code.store(NEXT);
    let (at_tcp, fragment) = (code.label(), code.label());
    for _ in 0..MOST_EXTENSIONS {
        let extension = code.label();
        code.load_cell(NEXT);
        code.jump_if(Test::Is(TCP), at_tcp);
        code.jump_if(Test::Is(FRAGMENT), fragment);
        EXTENSIONS.iter().for_each(|kind| code.jump_if(Test::Is(*kind), extension));
        code.jump(ways.pass);
        code.here(extension);
        code.load_x_cell(AT);
        code.load_at_x(Size::Byte, 0);
        code.store(NEXT);
        // In units of eight bytes, without the first.
        code.load_at_x(Size::Byte, 1);
        code.add(1);
        code.shift_left(3);
        code.add_x();
        code.store(AT);
    }
    code.jump(ways.hidden);

    // Whoever puts it together again reads the first one's ports; they are not looked for here, as our own sockets send none.
    code.here(fragment);
    code.load_x_cell(AT);
    code.load_at_x(Size::Byte, 0);
    for kind in EXTENSIONS.into_iter().chain([TCP, FRAGMENT]) {
        code.jump_if(Test::Is(kind), ways.hidden);
    }
    code.jump(ways.pass);

    code.here(at_tcp);
    code.load_x_cell(AT);
}

/// Falls through to nowhere.
fn tcp(code: &mut Assembler, ways: &Ways, plan: &CapturePlan, strength: Strength) {
    let (judged, from_excluded) = (code.label(), code.label());
    code.load_mark();
    code.jump_if(Test::Is(plan.marks.let_by()), ways.pass);
    // Of our listeners, not translated back: the table is gone, and the peer would answer with a reset.
    code.load_at_x(Size::Half, 0);
    for port in [OUTBOUND_PORT, INBOUND_PORT] {
        code.jump_if(Test::Is(port.into()), ways.drop);
    }
    // Never the mark of the proxy's connections to the application: when the `ip rule` is gone their answers come here.
    code.load_mark();
    code.jump_if(Test::Is(plan.marks.outer), ways.pass);
    if !plan.excluded_in.is_empty() {
        code.load_at_x(Size::Half, 0);
        any_of(code, &plan.excluded_in, from_excluded);
    }
    if !plan.excluded_out.is_empty() {
        code.load_at_x(Size::Half, 2);
        any_of(code, &plan.excluded_out, ways.pass);
    }
    code.jump(judged);

    // Answers of the pod's server there. A client that uses the port as its own is captured like others.
    code.here(from_excluded);
    code.load_at_x(Size::Byte, 13);
    code.and(SYN | ACK);
    code.jump_unless(Test::Is(SYN), ways.pass);

    code.here(judged);
    if strength == Strength::Opening {
        code.load_at_x(Size::Byte, 13);
        code.jump_unless(Test::HasAny(SYN), ways.pass);
    }
    code.jump(ways.drop);
}

fn any_of(code: &mut Assembler, ports: &BTreeSet<u16>, to: Label) {
    ports.iter().for_each(|port| code.jump_if(Test::Is((*port).into()), to));
}
