//! TCP flows as connection tracking knows them (`ctnetlink`): those of a network namespace, looked at, added and forgotten.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netlink::{Error, Raw, Socket, attributes};

/// A TCP flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who sent its first packet.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// From whom to whom its answers go: the other way round where nothing is translated.
    pub answers: (SocketAddr, SocketAddr),
    /// The zone of its first packet; 0 is the one that flows have by themselves.
    pub zone: u16,
    /// How far it is.
    pub phase: Phase,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its handshake is not over.
    Opening,
    /// Not both ends are known to have ended it for good: a SYN does not begin it anew, and goes where the flow goes.
    Open,
    /// It is remembered, and no more.
    Ended,
}

impl Flow {
    /// Whether the kernel changes addresses or ports of its packets.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.answers != (self.destination, self.source)
    }
}

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_NEW`, `…_GET` and `…_DELETE` (`linux/netfilter/nfnetlink_conntrack.h`).
const NEW: u16 = 1 << 8;
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// `struct nfgenmsg`: family, version, resource.
const HEAD: usize = 4;

/// `CTA_…`.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const TIMEOUT: u16 = 7;
const ZONE: u16 = 18;
/// `CTA_TUPLE_…`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const TUPLE_ZONE: u16 = 3;
/// `CTA_PROTO_…`.
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE: u16 = 2;
const PROTO_DESTINATION: u16 = 3;
/// `CTA_PROTOINFO_TCP` and `CTA_PROTOINFO_TCP_STATE`.
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;

/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED`.
const ESTABLISHED: u32 = 1 << 1 | 1 << 2 | 1 << 3;
/// `enum tcp_conntrack`: established; the states of ending up to the last acknowledgement; what is over.
const STATE_ESTABLISHED: u8 = 3;
const STATE_LAST_ACK: u8 = 6;
const STATE_TIME_WAIT: u8 = 7;
const STATE_CLOSE: u8 = 8;
/// As the kernel keeps an established flow, in seconds.
const FIVE_DAYS: u32 = 432_000;

/// All TCP flows of the namespace of the socket, one of [`Protocol::Netfilter`](crate::netlink::Protocol).
///
/// # Errors
/// The kernel lists none, or the list does not end.
pub fn list(socket: &mut Socket) -> Result<Vec<Flow>, Error> {
    let question = Raw { kind: GET, body: vec![libc::AF_UNSPEC as u8, 0, 0, 0] };
    let all = socket.dump("list the flows that are tracked", question)?;
    // What is not TCP, or not as it is described, is none of these.
    Ok(all.iter().filter_map(|Raw { body, .. }| read(body.get(HEAD..)?)).collect())
}

/// Tells connection tracking of a connection that was open before it looked. Otherwise the first packet of it that says an end
/// fits no flow. A flow that it knows stays as it is.
///
/// # Errors
/// The kernel refuses it.
pub fn add(socket: &mut Socket, source: SocketAddr, destination: SocketAddr) -> Result<(), Error> {
    let mut body = head(source);
    body.extend(tuple(TUPLE_ORIG, source, destination, 0));
    body.extend(tuple(TUPLE_REPLY, destination, source, 0));
    body.extend(attribute(STATUS, &ESTABLISHED.to_be_bytes()));
    body.extend(attribute(TIMEOUT, &FIVE_DAYS.to_be_bytes()));
    body.extend(nested(PROTOINFO, &[nested(TCP, &[attribute(TCP_STATE, &[STATE_ESTABLISHED])])]));
    let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_EXCL;
    match socket.request("add a tracked flow", Raw { kind: NEW, body }, flags) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Forgets a flow: its next packet is as one of a flow that was never seen. Whether there was one.
///
/// # Errors
/// The kernel refuses it.
pub fn forget(socket: &mut Socket, flow: &Flow) -> Result<bool, Error> {
    let mut body = head(flow.source);
    body.extend(tuple(TUPLE_ORIG, flow.source, flow.destination, flow.zone));
    match socket.request("forget a tracked flow", Raw { kind: DELETE, body }, 0) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn read(body: &[u8]) -> Option<Flow> {
    let all = attributes(body).ok()?;
    let [original, answers] = [TUPLE_ORIG, TUPLE_REPLY].map(|kind| attributes(find(&all, kind)?).ok());
    let original = original?;
    let (source, destination) = ends(&original)?;
    let zone = find(&all, ZONE).or_else(|| find(&original, TUPLE_ZONE));
    let state =
        find(&attributes(find(&attributes(find(&all, PROTOINFO)?).ok()?, TCP)?).ok()?, TCP_STATE)?.first().copied();
    Some(Flow {
        source,
        destination,
        answers: ends(&answers?)?,
        zone: zone.map_or(Some(0), |zone| Some(u16::from_be_bytes(zone.try_into().ok()?)))?,
        phase: match state? {
            STATE_ESTABLISHED..=STATE_LAST_ACK => Phase::Open,
            STATE_TIME_WAIT | STATE_CLOSE => Phase::Ended,
            _ => Phase::Opening,
        },
    })
}

fn find(of: &[(u16, Vec<u8>)], kind: u16) -> Option<&[u8]> {
    of.iter().find(|(it, _)| *it == kind).map(|(_, value)| value.as_slice())
}

/// From whom to whom a direction of a TCP flow goes.
fn ends(tuple: &[(u16, Vec<u8>)]) -> Option<(SocketAddr, SocketAddr)> {
    let [ip, ports] = [TUPLE_IP, TUPLE_PROTO].map(|kind| attributes(find(tuple, kind)?).ok());
    let (ip, ports) = (ip?, ports?);
    if find(&ports, PROTO_NUMBER)? != [libc::IPPROTO_TCP as u8] {
        return None;
    }
    let end = |v4, v6, port| {
        let address = match find(&ip, v4) {
            Some(bytes) => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
            None => IpAddr::from(<[u8; 16]>::try_from(find(&ip, v6)?).ok()?),
        };
        Some(SocketAddr::new(address, u16::from_be_bytes(find(&ports, port)?.try_into().ok()?)))
    };
    Some((end(1, 3, PROTO_SOURCE)?, end(2, 4, PROTO_DESTINATION)?))
}

fn head(source: SocketAddr) -> Vec<u8> {
    vec![if source.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }, 0, 0, 0]
}

fn tuple(kind: u16, source: SocketAddr, destination: SocketAddr, zone: u16) -> Vec<u8> {
    let address = |address: IpAddr, v4, v6| match address {
        IpAddr::V4(it) => attribute(v4, &Ipv4Addr::octets(&it)),
        IpAddr::V6(it) => attribute(v6, &Ipv6Addr::octets(&it)),
    };
    nested(
        kind,
        &[
            nested(TUPLE_IP, &[address(source.ip(), 1, 3), address(destination.ip(), 2, 4)]),
            nested(
                TUPLE_PROTO,
                &[
                    attribute(PROTO_NUMBER, &[libc::IPPROTO_TCP as u8]),
                    attribute(PROTO_SOURCE, &source.port().to_be_bytes()),
                    attribute(PROTO_DESTINATION, &destination.port().to_be_bytes()),
                ],
            ),
            if zone == 0 { Vec::new() } else { attribute(TUPLE_ZONE, &zone.to_be_bytes()) },
        ],
    )
}

fn nested(kind: u16, inside: &[Vec<u8>]) -> Vec<u8> {
    /// `NLA_F_NESTED`.
    const NESTED: u16 = 1 << 15;
    attribute(kind | NESTED, &inside.concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    const HEADER: usize = 4;
    let length = (HEADER + value.len()) as u16;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
