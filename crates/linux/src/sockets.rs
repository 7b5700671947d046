//! The sockets of the data path: made with privilege in a pod's network namespace by the agent, used
//! without privilege by the proxy.
//!
//! A socket belongs for ever to the network namespace in which it was made, and keeps its mark and
//! its transparency wherever it is passed. So [`listener`], [`outer_client`] and [`inner_client`]
//! are called inside [`NetNs::enter`](crate::netns::NetNs::enter); the rest works anywhere.
//!
//! There are two marks, and no socket has both roles (T14): what carries OUT speaks to the wire, is exempt
//! from capture and is not transparent; what carries IN speaks to the application in a client's name, is
//! transparent and is never exempt.

#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use nix::sys::uio::{readv, writev};
use nix::unistd::Uid;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::netns::NetNs;
use crate::nft::IpFamily;

/// A socket could not be made as it must be.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct SocketError {
    /// As in "listen on 0.0.0.0:15006".
    what: String,
    /// What the kernel answered.
    source: io::Error,
}

impl SocketError {
    /// The kernel's error number.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The kernel, or this network namespace, does not have the address's family.
    pub fn is_family_missing(&self) -> bool {
        matches!(self.errno(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
    }
}

/// How a listener is made.
#[derive(Debug, Clone, Copy)]
pub struct Listen<'a> {
    /// Where. IPv6 means IPv6 only: an IPv4 client never appears as a mapped address.
    pub address: SocketAddr,
    /// Connections that may wait to be accepted; the kernel takes no more than `net.core.somaxconn`.
    pub backlog: u32,
    /// The mark of the socket and of what it accepts.
    pub mark: Option<u32>,
    /// The socket's owner, where a second uid exists. A process in the pod with the owner's uid could join the
    /// listener with SO_REUSEPORT and take connections (T23).
    pub owner: Option<u32>,
    /// The congestion control of what is accepted; the host's own where it is `None` or not there.
    pub congestion: Option<&'a str>,
}

/// A non-blocking listener, alone on its port: without SO_REUSEPORT no other process can share it (T24).
///
/// What it accepts has SO_LINGER {1, 0} from the first moment: when the proxy dies, its peers see a
/// reset and never a clean end of a stream that was cut (T8).
pub fn listener(listen: Listen<'_>) -> Result<TcpListener, SocketError> {
    let make = || {
        let socket = tcp(IpFamily::of(listen.address.ip()))?;
        if let Some(owner) = listen.owner {
            nix::unistd::fchown(&socket, Some(Uid::from_raw(owner)), None)?;
        }
        // A connection in TIME_WAIT must not keep the next agent from the port.
        socket.set_reuse_address(true)?;
        if let Some(mark) = listen.mark {
            socket.set_mark(mark)?;
        }
        prepare(&socket, listen.congestion)?;
        socket.bind(&listen.address.into())?;
        socket.listen(i32::try_from(listen.backlog).unwrap_or(i32::MAX))?;
        Ok(socket.into())
    };
    make().map_err(|source| failed(format!("listen on {}", listen.address), source))
}

/// Whether connections can come to it. Whoever has a listener can end that for all who have it, by shutdown(2).
pub fn is_listening(listener: &TcpListener) -> bool {
    SockRef::from(listener).is_listener().unwrap_or(false)
}

/// Makes a listener listen that was made by [`listener`] and was shut down since; one that listens goes on. It has kept its
/// port, its mark and its owner.
pub fn listen_again(listener: &TcpListener, address: SocketAddr, backlog: u32) -> Result<(), SocketError> {
    if is_listening(listener) {
        return Ok(());
    }
    let again = || {
        // Ended by `sock_diag` it would hand on its end to what it accepts.
        disconnect(listener)?;
        SockRef::from(listener).listen(i32::try_from(backlog).unwrap_or(i32::MAX))
    };
    again().map_err(|source| failed(format!("listen on {address} again"), source))
}

/// A client socket to the wire: marked, not transparent, not yet bound or connected, non-blocking.
pub fn outer_client(family: IpFamily, mark: u32, congestion: Option<&str>) -> Result<Socket, SocketError> {
    let make = || {
        let socket = tcp(family)?;
        socket.set_mark(mark)?;
        prepare(&socket, congestion)?;
        Ok(socket)
    };
    make().map_err(|source| failed("make a socket to the wire".into(), source))
}

/// A client socket to the application: marked, transparent (it may bind to any address, which will be the
/// client's), not yet bound or connected, non-blocking.
pub fn inner_client(family: IpFamily, mark: u32, congestion: Option<&str>) -> Result<Socket, SocketError> {
    let make = || {
        let socket = tcp(family)?;
        socket.set_mark(mark)?;
        match family {
            IpFamily::V4 => socket.set_ip_transparent_v4(true)?,
            IpFamily::V6 => socket.set_ip_transparent_v6(true)?,
        }
        prepare(&socket, congestion)?;
        Ok(socket)
    };
    make().map_err(|source| failed("make a socket to the application".into(), source))
}

/// The address and port that the client dialled, before a rule changed them, of a connection of this family. Fails with
/// `ENOENT` for a connection that was not captured.
pub fn original_destination(socket: &impl AsFd, family: IpFamily) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    let address = match family {
        IpFamily::V4 => socket.original_dst_v4()?,
        IpFamily::V6 => socket.original_dst_v6()?,
    };
    address.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// While `on`, the socket's end is a reset, also when the process dies. Switch it off for a clean
/// close, and only for that.
pub fn reset_on_close(socket: &impl AsFd, on: bool) -> io::Result<()> {
    SockRef::from(socket).set_linger(on.then_some(Duration::ZERO))
}

/// A bind to port 0 that follows takes no port yet: `connect` will choose one that is free for this destination.
/// Without it an address has 28,000 connections in all, instead of for each destination.
pub fn bind_address_no_port(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, IpBindAddressNoPort, &true)?)
}

/// Begins to connect a non-blocking socket; it is writable when that is over. From here on it has its
/// local address and port.
pub fn start_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// Lets the socket bind to a port of an address where another connection has it, as long as the
/// destinations differ.
pub fn reuse_address(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_reuse_address(true)
}

/// Asks an idle peer for a sign of life: first after `idle`, then every `interval`; the connection
/// ends after `probes` without an answer.
pub fn keepalive(socket: &impl AsFd, idle: Duration, interval: Duration, probes: u32) -> io::Result<()> {
    let settings = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
    SockRef::from(socket).set_tcp_keepalive(&settings)
}

/// Ends the connection when sent bytes stay unacknowledged for so long (RFC 5482).
pub fn user_timeout(socket: &impl AsFd, timeout: Duration) -> io::Result<()> {
    SockRef::from(socket).set_tcp_user_timeout(Some(timeout))
}

/// The socket is writable only while fewer than `bytes` wait to be sent: what is written later is
/// still ours to choose, and less kernel memory is held.
pub fn not_sent_low_water(socket: &impl AsFd, bytes: u32) -> io::Result<()> {
    SockRef::from(socket).set_tcp_notsent_lowat(bytes)
}

/// The network namespace that the socket was made in: the kernel's word, whoever hands the socket over. Takes
/// CAP_NET_ADMIN there.
pub fn namespace_of(socket: &impl AsFd) -> Result<NetNs, SocketError> {
    let open = || {
        let fd = crate::netns::of_socket(socket.as_fd())?;
        NetNs::from_fd(fd).map_err(io::Error::other)
    };
    open().map_err(|source| failed("open the network namespace of a socket".into(), source))
}

/// The socket's mark.
pub fn mark(socket: &impl AsFd) -> io::Result<u32> {
    SockRef::from(socket).mark()
}

/// As connect(2) has it: to the address family "none".
fn disconnect(socket: &impl AsFd) -> io::Result<()> {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&none) as libc::socklen_t;
    // SAFETY: an address of its own length, which outlives the call; the descriptor is open.
    Errno::result(unsafe { libc::connect(socket.as_fd().as_raw_fd(), &raw const none, length) })?;
    Ok(())
}

fn tcp(family: IpFamily) -> io::Result<Socket> {
    let domain = match family {
        IpFamily::V4 => Domain::IPV4,
        IpFamily::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if family == IpFamily::V6 {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Reads into several places at once, in their order, and returns how many bytes; 0 is the end of the stream.
///
/// # Errors
/// What readv(2) says; `WouldBlock` where nothing is there.
pub fn read_vectored(socket: &impl AsFd, places: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    Ok(readv(socket, places)?)
}

/// Writes from several places at once, in their order, and returns how many bytes the kernel took.
///
/// # Errors
/// What writev(2) says; `WouldBlock` where there is no room.
pub fn write_vectored(socket: &impl AsFd, places: &[IoSlice<'_>]) -> io::Result<usize> {
    Ok(writev(socket, places)?)
}

/// What all sockets of the data path have, and what an accepted one inherits from its listener.
fn prepare(socket: &Socket, congestion: Option<&str>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    // Otherwise an urgent byte is taken out of the stream, also of one whose reader wants it there.
    socket.set_out_of_band_inline(true)?;
    let Some(name) = congestion else { return Ok(()) };
    match socket.set_tcp_congestion(name.as_bytes()) {
        // This kernel has no such algorithm: its own default is the next best.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn failed(what: String, source: io::Error) -> SocketError {
    SocketError { what, source }
}
