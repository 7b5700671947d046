//! The two legs that the data path itself makes: to the wire, and to the application.
//!
//! Both start from sockets of the pod's namespace, so that what is seen there is the pod. [`to_application`] takes an
//! [`Allowed`]: forwarding without a decision does not compile.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use mesh::{Allowed, AllowedProbe};
use socket2::{SockRef, Socket};
use tokio::net::TcpStream;
use tokio::time::timeout;
use wire::pods::SocketKind;

use crate::pod::{OwnLeg, Pod};
use crate::reasons::EndedEarly;

/// How long a destination may take to answer. A client that sees a connection already does not wait as long as the
/// kernel would (two minutes).
const CONNECT: Duration = Duration::from_secs(20);

/// An idle in-pod leg is probed at least this often: conntrack in the pod forgets half-closed flows after 60 s (T22).
const KEEPALIVE: Duration = Duration::from_secs(25);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// Makes a listener's connections ready to be copied before there are any, since an accepted socket has what its listener has:
/// small writes at once, and a reset if we die.
///
/// # Errors
/// The kernel's.
pub(crate) fn prepare_listener(listener: &TcpListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    SockRef::from(listener).set_tcp_nodelay(true)?;
    linux::sockets::reset_on_close(listener, true)
}

/// Takes a captured connection, as a listener gave it, into the event queue of this thread. Probes when idle it does not have from
/// there: it may be older than our hold of the listener.
///
/// # Errors
/// [`EndedEarly::Reset`] where the client is gone already; the kernel refuses options of a dead socket.
pub(crate) fn captured(stream: std::net::TcpStream) -> Result<TcpStream, EndedEarly> {
    let prepare = || {
        stream.set_nonblocking(true)?;
        keepalive(&stream)
    };
    prepare().map_err(|_: io::Error| EndedEarly::Reset(crate::reasons::Side::Client))?;
    TcpStream::from_std(stream).map_err(|_| EndedEarly::System("epoll_ctl"))
}

/// Connects to the wire in the pod's name, from the source address that its program chose (T41).
///
/// Without TCP_USER_TIMEOUT: it also ends a connection whose reader has paused for so long, though that reader answers
/// every probe of its window. Plain TCP waits for it, and so do we.
///
/// # Errors
/// By name, why there is no connection.
pub(crate) async fn to_wire(pod: &Arc<Pod>, source: IpAddr, to: SocketAddr) -> Result<(TcpStream, OwnLeg), EndedEarly> {
    let kind = if to.is_ipv4() { SocketKind::OuterV4 } else { SocketKind::OuterV6 };
    let socket = pod.stash.take(kind).await?;
    keepalive(&socket).map_err(|_| EndedEarly::System("setsockopt"))?;
    linux::sockets::bind_address_no_port(&socket).map_err(|_| EndedEarly::System("setsockopt"))?;
    socket.bind(&SocketAddr::new(source, 0).into()).map_err(|error| failed(&error))?;
    linux::sockets::start_connect(&socket, to).map_err(|error| failed(&error))?;
    // Before anything else: if this connection is captured itself, its acceptor has to know it as ours by now.
    let local = socket.local_addr().ok().and_then(|address| address.as_socket());
    let own = pod.own_leg(local.ok_or(EndedEarly::System("getsockname"))?, to);
    Ok((connected(socket).await?, own))
}

/// Connects to the application of a pod, from the client's address and, where that is possible, its port.
///
/// # Errors
/// By name, why there is no connection.
pub(crate) async fn to_application(pod: &Pod, allowed: Allowed, client: SocketAddr) -> Result<TcpStream, EndedEarly> {
    to_pod(pod, allowed.destination(), SocketAddr::new(allowed.source(), client.port())).await
}

/// The same for a probe. What may pass of it is the business of [`crate::probe`] alone.
///
/// # Errors
/// By name, why there is no connection.
pub(crate) async fn to_application_for_probe(
    pod: &Pod,
    allowed: &AllowedProbe,
    client: SocketAddr,
) -> Result<TcpStream, EndedEarly> {
    to_pod(pod, allowed.destination(), SocketAddr::new(allowed.source(), client.port())).await
}

async fn to_pod(pod: &Pod, to: SocketAddr, client: SocketAddr) -> Result<TcpStream, EndedEarly> {
    let kind = if to.is_ipv4() { SocketKind::InnerV4 } else { SocketKind::InnerV6 };
    if is_link_local(client.ip()) {
        // Nobody can bear another machine's link-local address: the application sees the pod's own (T46).
        let socket = pod.stash.take(kind).await?;
        keepalive(&socket).map_err(|_| EndedEarly::System("setsockopt"))?;
        return connect(socket, to).await.map_err(|error| failed(&error));
    }
    let mut last = None;
    for port in [client.port(), 0] {
        let socket = pod.stash.take(kind).await?;
        match connect_as(socket, SocketAddr::new(client.ip(), port), to).await {
            Ok(stream) => return Ok(stream),
            // The client's port may be privileged, or in use here: then any other will do (T7).
            Err(error) if port != 0 && is_about_the_port(&error) => last = Some(error),
            Err(error) => return Err(failed(&error)),
        }
    }
    Err(last.map_or(EndedEarly::Unreachable, |error| failed(&error)))
}

async fn connect_as(socket: Socket, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    keepalive(&socket)?;
    if from.port() == 0 {
        linux::sockets::bind_address_no_port(&socket)?;
    } else {
        linux::sockets::reuse_address(&socket)?;
    }
    socket.bind(&from.into())?;
    connect(socket, to).await
}

async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    linux::sockets::start_connect(&socket, to)?;
    match timeout(CONNECT, wait_until_connected(socket)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn connected(socket: Socket) -> Result<TcpStream, EndedEarly> {
    match timeout(CONNECT, wait_until_connected(socket)).await {
        Ok(result) => result.map_err(|error| failed(&error)),
        Err(_) => Err(EndedEarly::ConnectTimeout),
    }
}

async fn wait_until_connected(socket: Socket) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    // Within one machine the connection stands by now, and the event queue need not be asked.
    if stream.peer_addr().is_ok() {
        return Ok(stream);
    }
    stream.writable().await?;
    match stream.take_error()? {
        None => Ok(stream),
        Some(error) => Err(error),
    }
}

/// All else that a socket of the data path needs it has from its making ([`linux::sockets`]).
fn keepalive(socket: &impl AsFd) -> io::Result<()> {
    linux::sockets::keepalive(socket, KEEPALIVE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if Ipv6Addr::is_unicast_link_local(&address))
}

/// EACCES, EADDRINUSE, EADDRNOTAVAIL: from bind, or from connect where the four addresses and ports are taken.
fn is_about_the_port(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::PermissionDenied | K::AddrInUse | K::AddrNotAvailable)
}

fn failed(error: &io::Error) -> EndedEarly {
    use io::ErrorKind as K;
    match error.kind() {
        K::ConnectionRefused | K::ConnectionReset | K::ConnectionAborted => EndedEarly::ConnectionRefused,
        K::TimedOut => EndedEarly::ConnectTimeout,
        K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown => EndedEarly::Unreachable,
        K::AddrInUse | K::AddrNotAvailable | K::PermissionDenied => EndedEarly::Unreachable,
        _ => EndedEarly::System("connect"),
    }
}
