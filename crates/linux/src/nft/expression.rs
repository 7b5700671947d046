//! What a rule may say.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::IpFamily;

/// A rule: conditions and actions, carried out from left to right until a condition fails or a
/// verdict is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The conditions and actions.
    pub expressions: Vec<Expression>,
    /// Why the rule is there, at most [`LONGEST_COMMENT`](super::LONGEST_COMMENT) bytes of ASCII
    /// without quotation marks. It goes into the kernel with the rule, so that `nft list` shows it.
    pub why: String,
}

impl Rule {
    /// A rule and its reason.
    pub fn new(why: impl Into<String>, expressions: impl IntoIterator<Item = Expression>) -> Rule {
        Rule { expressions: expressions.into_iter().collect(), why: why.into() }
    }
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// Equal.
    Is,
    /// Not equal.
    IsNot,
}

/// What the routing table says of an address (`fib … type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressType {
    /// Of this network namespace.
    Local,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L4Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The direction of a packet in its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// As the flow's first packet.
    Original,
    /// Against it.
    Reply,
}

/// A condition or an action. What a condition needs to be true first (that the packet is TCP before
/// its flags are read, that it is IPv4 before its addresses are) is added when a rule is encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    /// The packet's mark.
    Mark(Compare, u32),
    /// The packet came in by the loopback interface, or did not.
    FromLoopback(Compare),
    /// The packet came in by any interface, and is about to leave by another (hook postrouting only).
    Forwarded,
    /// The packet is IPv4, or IPv6.
    Family(IpFamily),
    /// The transport protocol.
    Protocol(L4Protocol),
    /// The source address is in the network.
    Source(Compare, IpNet),
    /// The destination address is in the network.
    Destination(Compare, IpNet),
    /// What the routing table says of the source address.
    SourceType(Compare, AddressType),
    /// What the routing table says of the destination address.
    DestinationType(Compare, AddressType),
    /// A TCP segment that may open a connection: of FIN, SYN, RST and ACK it has SYN alone. With fewer flags in
    /// the mask a rule would also catch segments that belong to open connections (T3).
    TcpSyn,
    /// A TCP segment that ends a connection at once.
    TcpReset,
    /// The source port, of TCP unless [`Expression::Protocol`] came first.
    SourcePort(Compare, u16),
    /// The destination port, of TCP unless [`Expression::Protocol`] came first.
    DestinationPort(Compare, u16),
    /// The destination port is in the named set.
    DestinationPortIn(String),
    /// A socket of this namespace would take the packet: an open connection, one in TIME_WAIT, or a
    /// listener on the port and address (`socket transparent <= 1`).
    ///
    /// Not `socket wildcard <= 1`, which does not see TIME_WAIT: a client that uses its port again, as a busy one
    /// does within seconds, would be taken for one that dials a closed port.
    HasSocket,
    /// The mark of the open connection of this namespace that would take the packet. False where there is none: a listener
    /// has its own, and one in TIME_WAIT tells none (`socket mark`).
    SocketMark(Compare, u32),
    /// The connection-tracking zone of the original direction of the flow.
    OriginalZone(Compare, u16),
    /// The direction of the packet in its flow.
    FlowDirection(Direction),
    /// The packet fits no flow: out of a window, or an answer to nothing.
    FlowInvalid,
    /// The flow's destination was translated, or was not.
    FlowDestinationTranslated(Compare),
    /// True for `below` of `of` packets, by chance.
    Chance {
        /// How many of them.
        below: u32,
        /// Of how many.
        of: u32,
    },

    /// Counts packets and bytes.
    Counter,
    /// Marks the packet.
    SetMark(u32),
    /// Puts the original direction of the flow into a connection-tracking zone, so that it cannot
    /// collide with a flow of the same addresses and ports. Only before connection tracking (-200).
    SetOriginalZone(u16),
    /// Keeps the packet from connection tracking, and so from translation. Only before that (-200).
    Untracked,
    /// Gives the flow the named [`Timeout`](super::Timeout).
    SetTimeout(String),
    /// Destination: a port of the address of the interface, 127.0.0.1 or ::1 for what is made here.
    Redirect(u16),
    /// Destination: the same address, another port.
    DnatPort(u16),
    /// Destination: another address and port.
    Dnat(SocketAddr),
    /// Destination: another address, the same port.
    DnatAddress(IpAddr),
    /// Source: the address of the interface by which the packet leaves.
    Masquerade,
    /// Answers with a TCP reset.
    RejectWithReset,
    /// Passes this hook.
    Accept,
    /// Is gone.
    Drop,
    /// Goes on after the jump that led here.
    Return,
    /// Goes on in the named chain.
    Jump(String),
}
