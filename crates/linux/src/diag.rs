//! Which TCP connections a network namespace has, as the kernel lists its sockets (`sock_diag`).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netlink::{Error, Raw, Socket, attributes};
use crate::nft::IpFamily;

/// A connection's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// Its own address. IPv4 is IPv4, also where an IPv6 socket speaks it.
    pub local: SocketAddr,
    /// Its peer's.
    pub remote: SocketAddr,
    /// The socket's mark.
    pub mark: u32,
    /// How far it is.
    pub stage: Stage,
}

/// How far a connection is, as its socket knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It asks for the connection, and has no answer.
    Asking,
    /// It was asked, and has not heard that its answer arrived.
    Answering,
    /// The handshake is over.
    Standing,
}

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;
/// `INET_DIAG_MARK`: told to who may administer the namespace's network.
const MARK: u16 = 15;
/// `struct inet_diag_req_v2` and `struct inet_diag_msg`.
const REQUEST: usize = 56;
/// What stands before `struct inet_diag_sockid` in a request.
const HEAD: usize = 8;
const ANSWER: usize = 72;
/// Where `struct inet_diag_sockid` begins in the answer: two ports, two addresses of 16 bytes.
const ID: usize = 4;
/// All states in which a socket may still send, or be sent to: not LISTEN (10), TIME_WAIT (6) and CLOSE (7).
const OPEN: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11 | 1 << 12;
const SYN_SENT: u8 = 2;
const SYN_RECV: u8 = 3;
const NEW_SYN_RECV: u8 = 12;
const TIME_WAIT: u32 = 1 << 6;
const LISTEN: u32 = 1 << 10;

/// All TCP connections of the namespace of the socket, one of [`Protocol::SocketDiagnosis`](crate::netlink::Protocol), that
/// are being opened, open or being closed.
pub fn connections(socket: &mut Socket) -> Result<Vec<Connection>, Error> {
    Ok(listed(socket, OPEN)?.into_iter().map(|(connection, ..)| connection).collect())
}

/// Ends those connections of the socket's namespace that `these` says, as if their program had aborted them: both ends see
/// a reset. Returns how many.
///
/// # Errors
/// The kernel lists none, or was built without the means to end them (`CONFIG_INET_DIAG_DESTROY`).
pub fn destroy(socket: &mut Socket, these: impl Fn(&Connection) -> bool) -> Result<usize, Error> {
    let mut ended = 0;
    for (_, family, body) in listed(socket, OPEN)?.into_iter().filter(|(connection, ..)| these(connection)) {
        ended += usize::from(end(socket, family, &body)?);
    }
    Ok(ended)
}

/// The ports at which somebody listens in the socket's namespace, at whichever address.
///
/// # Errors
/// The kernel lists none.
pub fn listening(socket: &mut Socket) -> Result<HashSet<u16>, Error> {
    Ok(listed(socket, LISTEN)?.into_iter().map(|(listener, ..)| listener.local.port()).collect())
}

/// Forgets those connections of the socket's namespace that have ended, whose ports the kernel keeps for a minute (TIME_WAIT) and
/// that `these` says. Returns how many; none where the kernel cannot forget them.
///
/// # Errors
/// The kernel lists none, or was built without the means to end them (`CONFIG_INET_DIAG_DESTROY`).
pub fn forget_ended(socket: &mut Socket, these: impl Fn(&Connection) -> bool) -> Result<usize, Error> {
    let mut forgotten = 0;
    for (_, family, body) in listed(socket, TIME_WAIT)?.into_iter().filter(|(connection, ..)| these(connection)) {
        match end(socket, family, &body) {
            Ok(gone) => forgotten += usize::from(gone),
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => return Ok(forgotten),
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// Ends the connection of which the kernel told by this answer. Whether it was still there.
fn end(socket: &mut Socket, family: IpFamily, answer: &[u8]) -> Result<bool, Error> {
    let mut order = question(family, 0);
    order.kind = DESTROY;
    // The whole identity as the kernel told it, with its cookie: whoever has the ports next is not meant.
    order.body[HEAD..].copy_from_slice(&answer[ID..ID + REQUEST - HEAD]);
    match socket.request("end a TCP connection", order, 0) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Each connection in one of these states, with the list in which it stands and the answer that tells of it.
fn listed(socket: &mut Socket, states: u32) -> Result<Vec<(Connection, IpFamily, Vec<u8>)>, Error> {
    let what = "list TCP connections";
    let mut all = Vec::new();
    for family in [IpFamily::V4, IpFamily::V6] {
        let answers = match socket.dump(what, question(family, states)) {
            // This kernel has no IPv6, or no list of its connections.
            Err(error) if family == IpFamily::V6 && error.errno() == Some(libc::ENOENT) => continue,
            other => other?,
        };
        for Raw { body, .. } in answers {
            let connection = connection(&body);
            let connection =
                connection.ok_or_else(|| Error::Malformed { what: what.into(), detail: "too short".into() })?;
            all.push((connection, family, body));
        }
    }
    Ok(all)
}

fn question(family: IpFamily, states: u32) -> Raw {
    let mut body = vec![0; REQUEST];
    body[0] = match family {
        IpFamily::V4 => libc::AF_INET as u8,
        IpFamily::V6 => libc::AF_INET6 as u8,
    };
    body[1] = libc::IPPROTO_TCP as u8;
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    Raw { kind: BY_FAMILY, body }
}

fn connection(body: &[u8]) -> Option<Connection> {
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| {
        let bytes: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
        let [a, b, c, d, ..] = bytes;
        Some(match i32::from(body[0]) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            _ => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
        })
    };
    let marks = attributes(body.get(ANSWER..)?).ok()?;
    let mark = marks.iter().find(|(kind, _)| *kind == MARK).and_then(|(_, bytes)| bytes.as_slice().try_into().ok());
    Some(Connection {
        local: SocketAddr::new(address(ID + 4)?, port(ID)?),
        remote: SocketAddr::new(address(ID + 20)?, port(ID + 2)?),
        mark: mark.map_or(0, u32::from_ne_bytes),
        stage: match *body.get(1)? {
            SYN_SENT => Stage::Asking,
            SYN_RECV | NEW_SYN_RECV => Stage::Answering,
            _ => Stage::Standing,
        },
    })
}
