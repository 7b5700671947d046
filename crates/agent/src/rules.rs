//! The rules in a pod's network namespace, as a pure function of the pod.
//!
//! What the table does, in the order in which a packet meets it:
//!
//! | hook | chain | |
//! |---|---|---|
//! | output | `apart` | keeps the proxy's connections apart from the captured ones: to the application, whose tuple they repeat, and to the wire, whose port they may have next |
//! | prerouting | `apart_in` | the same for what comes from the wire |
//! | output, prerouting | `timeouts_out`, `timeouts_in` | a flow of which one side has ended lives as long as an open one |
//! | output | `back` | brings the application's answers to the proxy's socket, with the `ip rule` of [`delivery`] |
//! | output | `capture_out` | a new connection to elsewhere goes to the proxy's outbound listener |
//! | output | `guard_out` | what should have been captured and was not is dropped |
//! | prerouting | `capture_in` | a new connection to a port that listens goes to the proxy's inbound listener |
//! | postrouting | `let_by` | what the kernel says by itself, and what the pod forwards, is let by the guard on the interface |
//! | input | `guard_in` | what comes from outside and was not captured is answered with a reset |
//!
//! Only segments that open a connection are judged: what was open before capture goes on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;

use ipnet::IpNet;
use linux::nft::{
    AddressType, Chain, ChainKind, Compare, Direction, Expression as E, Hook, HookPoint, IpFamily, L4Protocol, Normal,
    Policy, PortSet, Rule, Table, Timeout,
};
use linux::routes::LocalDelivery;

use Compare::{Is, IsNot};

/// The one table that is ours in a pod's namespace.
pub const TABLE: &str = "justmtls";
/// The port of the outbound listener, on 127.0.0.1 and ::1.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port of the inbound listener, on all addresses: `dnat` keeps the address that was dialled.
pub const INBOUND_PORT: u16 = 15006;

/// Our routing table, and our connection-tracking zone; above 255, and used by nobody known.
const NUMBER: u16 = 27245;
/// After the kernel's local addresses (0), before rules that CNI plugins add.
const PREFERENCE: u32 = 1000;
/// As the kernel keeps an established flow (5 days), in seconds: a half-closed one is as good as open.
const HALF_CLOSED: u32 = 432_000;

const EXCLUDED_IN: &str = "excluded_in";
const EXCLUDED_OUT: &str = "excluded_out";
const LISTENERS: &str = "listeners";
const TIMEOUT_V4: &str = "half_closed_v4";
const TIMEOUT_V6: &str = "half_closed_v6";

/// The two marks of a pod's sockets. Random for each pod and boot: a process in the pod that may set
/// marks (CAP_NET_RAW is enough) has to find them first (T14).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Of the proxy's sockets to the wire: exempt from capture.
    pub outer: u32,
    /// Of the proxy's sockets to the application: never exempt.
    pub inner: u32,
}

impl Marks {
    /// The mark that the table gives to what it lets by although no socket of the proxy sent it. The guard on the pod's
    /// interface passes nothing else (D2). Neither of the other two, and not 0, as those differ.
    pub fn let_by(self) -> u32 {
        self.outer ^ self.inner
    }

    /// Two marks that nobody can guess, different and not 0.
    pub fn random() -> io::Result<Marks> {
        let mut source = File::open("/dev/urandom")?;
        loop {
            let mut bytes = [0; 8];
            source.read_exact(&mut bytes)?;
            let [a, b, c, d, e, f, g, h] = bytes;
            let marks = Marks { outer: u32::from_ne_bytes([a, b, c, d]), inner: u32::from_ne_bytes([e, f, g, h]) };
            if marks.outer != 0 && marks.inner != 0 && marks.outer != marks.inner {
                return Ok(marks);
            }
        }
    }
}

/// The marks of a table that is loaded: those that its rules take for the proxy's. `None` where it is not of this form.
pub fn marks_of(table: &Normal) -> Option<Marks> {
    let first = |chain| table.marks(chain).first().copied().filter(|mark| *mark != 0);
    let marks = Marks { outer: first("guard_out")?, inner: first("apart")? };
    (marks.outer != marks.inner).then_some(marks)
}

/// Whether a table that is loaded is that of a pod which is let go ([`draining`]): a rule there never matches, and says so by a
/// mark, in a chain that knows no marks otherwise.
pub fn is_draining(table: &Normal) -> bool {
    !table.marks("capture_in").is_empty()
}

/// What is captured in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturePlan {
    /// The marks of its sockets.
    pub marks: Marks,
    /// The pod's own addresses (`status.podIPs`). Connections from another address, such as that of a
    /// second interface, are not captured (T41).
    pub addresses: BTreeSet<IpAddr>,
    /// Ports of the pod to which connections are not captured.
    pub excluded_in: BTreeSet<u16>,
    /// Ports elsewhere to which connections are not captured.
    pub excluded_out: BTreeSet<u16>,
}

/// The pod's table. Loaded last, when listeners and routes are there.
pub fn ruleset(plan: &CapturePlan) -> Table {
    table(
        plan,
        vec![
            chain("capture_out", ChainKind::Nat, HookPoint::Output, DESTINATION_NAT, capture_out(plan)),
            chain("capture_in", ChainKind::Nat, HookPoint::Prerouting, DESTINATION_NAT, capture_in()),
            chain("guard_out", ChainKind::Filter, HookPoint::Output, FILTER, guard_out(plan)),
            chain("guard_in", ChainKind::Filter, HookPoint::Input, FILTER, guard_in()),
        ],
    )
}

/// The table of a pod that is being released: it captures no new connection, and carries those that
/// were captured to their end.
///
/// The two chains that translate stay, each with a rule that matches nothing. Without a rule in
/// them the kernel lets go of them, and the next bytes of captured connections leave in clear, to the original
/// destination (T3). It has the chains of [`ruleset`], so that going from one to the other changes their rules only
/// ([`nft::replace`](linux::nft::replace)).
pub fn draining(plan: &CapturePlan) -> Table {
    let never = |then| {
        let outer = plan.marks.outer;
        rule(
            "T3: matches nothing, keeps translation alive",
            [E::Mark(Is, outer), E::Mark(IsNot, outer), E::Protocol(L4Protocol::Tcp), then],
        )
    };
    let out = vec![never(E::Redirect(OUTBOUND_PORT))];
    let inward = vec![never(E::DnatPort(INBOUND_PORT))];
    table(
        plan,
        vec![
            chain("capture_out", ChainKind::Nat, HookPoint::Output, DESTINATION_NAT, out),
            chain("capture_in", ChainKind::Nat, HookPoint::Prerouting, DESTINATION_NAT, inward),
            chain("guard_out", ChainKind::Filter, HookPoint::Output, FILTER, vec![own_sources(plan)]),
            chain("guard_in", ChainKind::Filter, HookPoint::Input, FILTER, listeners_only().into()),
        ],
    )
}

/// The policy routing that `back` relies on: without it all inbound connections hang.
pub fn delivery(marks: Marks) -> LocalDelivery {
    LocalDelivery { mark: marks.inner, table: NUMBER.into(), preference: PREFERENCE }
}

const RAW: i32 = -300;
const MANGLE: i32 = -150;
const DESTINATION_NAT: i32 = -100;
const FILTER: i32 = 0;
const LAST: i32 = 300;

/// A table with what captured connections need, whether new ones are captured or not.
fn table(plan: &CapturePlan, judging: Vec<Chain>) -> Table {
    let timeout =
        |name: &str, family| Timeout { name: name.into(), family, fin_wait: HALF_CLOSED, close_wait: HALF_CLOSED };
    let set = |name: &str, ports: &BTreeSet<u16>| PortSet { name: name.into(), ports: ports.clone() };
    let mut chains = vec![
        chain("apart", ChainKind::Filter, HookPoint::Output, RAW, apart(plan)),
        chain("apart_in", ChainKind::Filter, HookPoint::Prerouting, RAW, apart_in(plan)),
        chain("timeouts_out", ChainKind::Filter, HookPoint::Output, MANGLE, timeouts()),
        chain("timeouts_in", ChainKind::Filter, HookPoint::Prerouting, MANGLE, timeouts()),
        chain("back", ChainKind::Route, HookPoint::Output, MANGLE, back(plan)),
        chain("let_by", ChainKind::Filter, HookPoint::Postrouting, LAST, let_by(plan)),
    ];
    chains.extend(judging);
    Table {
        name: TABLE.into(),
        timeouts: vec![timeout(TIMEOUT_V4, IpFamily::V4), timeout(TIMEOUT_V6, IpFamily::V6)],
        sets: vec![
            set(LISTENERS, &[OUTBOUND_PORT, INBOUND_PORT].into()),
            set(EXCLUDED_IN, &plan.excluded_in),
            set(EXCLUDED_OUT, &plan.excluded_out),
        ],
        chains,
    }
}

/// Whether this is the zone of the proxy's flows to the application.
pub(crate) fn is_zone(zone: u16) -> bool {
    zone == NUMBER
}

/// A flow of the proxy's connections to the wire would be in the way twice. A peer's reset frees the port at once, and the flow
/// stays for 10 s (for days, where the peer vanished): a program that has the port next would not be captured. In a zone of its
/// own it would not; but while the kernel loads or drops the table, connection tracking is on and the zones are not there, and
/// what the proxy says then would be taken for another flow of the same answers, and get another source port (the peer, who
/// knows no such connection, resets it).
const WIRE: &str = "T7: the wire's leg is not translated, and a program may have its port next";

fn apart(plan: &CapturePlan) -> Vec<Rule> {
    // What a listener accepted has its mark, and answers by translation.
    let accepted = |port| E::SourcePort(IsNot, port);
    // The reply has no zone: it is sent by the application, whose socket has no mark.
    vec![
        rule(
            "T7: the application's leg repeats the tuple of the captured connection",
            [E::Mark(Is, plan.marks.inner), E::SetOriginalZone(NUMBER)],
        ),
        rule(WIRE, [E::Mark(Is, plan.marks.outer), accepted(OUTBOUND_PORT), accepted(INBOUND_PORT), E::Untracked]),
    ]
}

fn apart_in(plan: &CapturePlan) -> Vec<Rule> {
    let of_the_wire = E::SocketMark(Is, plan.marks.outer);
    vec![rule(WIRE, [E::FromLoopback(IsNot), E::Protocol(L4Protocol::Tcp), of_the_wire, E::Untracked])]
}

fn timeouts() -> Vec<Rule> {
    let why = "T22: a late answer on a half-closed connection arrives";
    // A rule for each family, as an object is for one. Only the first packet can take it.
    let of = |family, timeout: &str| rule(why, [E::Family(family), E::TcpSyn, E::SetTimeout(timeout.into())]);
    vec![of(IpFamily::V4, TIMEOUT_V4), of(IpFamily::V6, TIMEOUT_V6)]
}

fn back(plan: &CapturePlan) -> Vec<Rule> {
    // By the zone, which a flow has from its beginning, and not by a mark of the flow: where the zone is not set for a moment,
    // a segment of the proxy's counts for the captured connection, whose answers would come here for ever. Also the kernel's own
    // reset for a port that has closed, which no socket sends.
    vec![rule(
        "T7: the application's answers go to the proxy, not to the client's address",
        [E::FlowDirection(Direction::Reply), E::OriginalZone(Is, NUMBER), E::SetMark(plan.marks.inner)],
    )]
}

fn capture_out(plan: &CapturePlan) -> Vec<Rule> {
    let mut rules = vec![
        // Without it the proxy captures itself for ever. Only OUT: an accepted socket that an
        // application disconnects and connects anew may carry IN, and must be captured.
        rule("T14: the proxy's own connections to the wire", [E::Mark(Is, plan.marks.outer), E::Accept]),
        rule(
            "T21: loopback, own addresses, and the proxy's connections to the application",
            [E::DestinationType(Is, AddressType::Local), E::Accept],
        ),
        rule("P10: excluded by name", [E::TcpSyn, E::DestinationPortIn(EXCLUDED_OUT.into()), E::Accept]),
    ];
    rules.extend(plan.addresses.iter().map(|address| {
        // All four flags: with fewer, connections from before capture, which conntrack picks up in
        // mid-stream as new, would be redirected, and so broken.
        rule(
            "T3, T41: new connections from the pod's own address",
            [E::Source(Is, IpNet::from(*address)), E::TcpSyn, E::Redirect(OUTBOUND_PORT)],
        )
    }));
    rules
}

fn capture_in() -> Vec<Rule> {
    vec![
        rule(
            "P10: excluded by name",
            [E::FromLoopback(IsNot), E::TcpSyn, E::DestinationPortIn(EXCLUDED_IN.into()), E::Accept],
        ),
        // The port only: `redirect` would rewrite the address, too, to the first of the device, and
        // a pod may have several. What is forwarded (a virtual machine, nested containers) is not
        // local, and stays as it is (T15).
        rule(
            "T6, T15: new connections to a port that listens",
            [
                E::FromLoopback(IsNot),
                E::DestinationType(Is, AddressType::Local),
                E::TcpSyn,
                E::HasSocket,
                E::DnatPort(INBOUND_PORT),
            ],
        ),
    ]
}

/// Of the rule that drops what a program opens and the rules have not captured.
pub(crate) const UNCAPTURED: &str = "T46: no new connection leaves uncaptured";

fn guard_out(plan: &CapturePlan) -> Vec<Rule> {
    let mut rules = vec![
        own_sources(plan),
        rule("T14: the proxy's own connections to the wire", [E::Mark(Is, plan.marks.outer), E::Accept]),
        // Not the interface: after a redirect the packet still has the old one here.
        rule("captured, or to the pod itself", [E::DestinationType(Is, AddressType::Local), E::Accept]),
        rule("P10: excluded by name", [E::DestinationPortIn(EXCLUDED_OUT.into()), E::Accept]),
    ];
    for address in &plan.addresses {
        rules.push(rule(UNCAPTURED, [E::Source(Is, IpNet::from(*address)), E::TcpSyn, E::Counter, E::Drop]));
        // The kernel's answer to what is nobody's.
        rules.push(rule("D2: a reset carries nothing", [E::Source(Is, IpNet::from(*address)), E::TcpReset, E::Accept]));
        // Translation skips what fits no flow: it would leave in clear, to the original destination.
        rules.push(rule(
            "T22: what fits no flow was not translated",
            [E::Source(Is, IpNet::from(*address)), E::Protocol(L4Protocol::Tcp), E::FlowInvalid, E::Counter, E::Drop],
        ));
    }
    rules
}

/// Only where the mark is another's: the proxy's own resets have theirs.
fn let_by(plan: &CapturePlan) -> Vec<Rule> {
    let mark = E::SetMark(plan.marks.let_by());
    let others = E::Mark(IsNot, plan.marks.outer);
    vec![
        rule("D2: resets of the kernel, which no socket sends", [others.clone(), E::TcpReset, mark.clone()]),
        rule("T15: what is forwarded is not captured", [others, E::Forwarded, E::Protocol(L4Protocol::Tcp), mark]),
    ]
}

/// IPV6_FREEBIND needs no privilege: a proxy that was taken over could speak from any address.
fn own_sources(plan: &CapturePlan) -> Rule {
    rule(
        "T14: the proxy speaks to the wire from the pod's addresses only",
        [E::Mark(Is, plan.marks.outer), E::SourceType(IsNot, AddressType::Local), E::Counter, E::Drop],
    )
}

fn guard_in() -> Vec<Rule> {
    let mut rules: Vec<Rule> = listeners_only().into();
    rules.extend([
        rule(
            "P10: excluded by name",
            [E::FromLoopback(IsNot), E::TcpSyn, E::DestinationPortIn(EXCLUDED_IN.into()), E::Accept],
        ),
        // An ACK that a listener drops makes a flow without translation, and the SYN that follows from
        // the same port is not captured: it must not reach the application. With a reset rather than
        // nothing, so that a closed port looks closed.
        rule(
            "D1, T46: nothing from outside passes uncaptured",
            [E::FromLoopback(IsNot), E::TcpSyn, E::Counter, E::RejectWithReset],
        ),
    ]);
    rules
}

/// From inside and outside, nobody can dial the listeners themselves.
fn listeners_only() -> [Rule; 2] {
    [
        rule(
            "T23: the listeners are for captured connections",
            [E::TcpSyn, E::DestinationPortIn(LISTENERS.into()), E::FlowDestinationTranslated(Is), E::Accept],
        ),
        rule(
            "T23: the listeners are for captured connections only",
            [E::TcpSyn, E::DestinationPortIn(LISTENERS.into()), E::Counter, E::RejectWithReset],
        ),
    ]
}

fn chain(name: &str, kind: ChainKind, point: HookPoint, priority: i32, rules: Vec<Rule>) -> Chain {
    let hook = Some(Hook { kind, point, priority, policy: Policy::Accept });
    Chain { name: name.into(), hook, rules }
}

fn rule(why: &str, expressions: impl IntoIterator<Item = E>) -> Rule {
    Rule::new(why, expressions)
}
