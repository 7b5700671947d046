//! A proxy that only copies: all that it has of a pod is listeners and sockets, as the real one.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use agent::capture::{Capture, LARGEST_BATCH, SocketKind};
use linux::nft::IpFamily;
use linux::sockets::{bind_address_no_port, original_destination, reset_on_close, reuse_address};
use socket2::Socket;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
}

/// What the proxy knows of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) way: Way,
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// The other leg's own name, or why there is none.
    pub(crate) other: Result<SocketAddr, io::ErrorKind>,
    /// The application's leg has another source port than the captured one.
    pub(crate) fell_back: bool,
}

pub(crate) struct Proxy {
    pub(crate) capture: Arc<Mutex<Capture>>,
    log: Arc<Mutex<Vec<Seen>>>,
    live: Arc<()>,
    listeners: usize,
}

/// What a connection needs.
#[derive(Clone)]
struct Shared {
    capture: Arc<Mutex<Capture>>,
    log: Arc<Mutex<Vec<Seen>>>,
    stash: Arc<Mutex<HashMap<SocketKind, Vec<Socket>>>>,
    /// Held once by each connection.
    live: Arc<()>,
}

impl Proxy {
    /// Serves the pod's listeners until they are closed.
    pub(crate) fn start(capture: Capture) -> Proxy {
        let listeners = capture.listeners();
        let accepted: Vec<_> = [
            (Way::Out, Some(&listeners.out_v4)),
            (Way::Out, listeners.out_v6.as_ref()),
            (Way::In, Some(&listeners.in_v4)),
            (Way::In, listeners.in_v6.as_ref()),
        ]
        .into_iter()
        .filter_map(|(way, listener)| Some((way, listener?.try_clone().unwrap())))
        .collect();
        let shared = Shared {
            capture: Arc::new(Mutex::new(capture)),
            log: Arc::default(),
            stash: Arc::default(),
            live: Arc::default(),
        };
        let listeners = accepted.len();
        for (way, listener) in accepted {
            listener.set_nonblocking(false).unwrap();
            let shared = shared.clone();
            std::thread::spawn(move || accept(way, &listener, shared));
        }
        Proxy { capture: shared.capture, log: shared.log, live: shared.live, listeners }
    }

    pub(crate) fn begin(self) -> Proxy {
        self.capture.lock().unwrap().begin().unwrap();
        self
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    /// Connections that are served now.
    pub(crate) fn live(&self) -> usize {
        Arc::strong_count(&self.live) - 1 - self.listeners
    }

    pub(crate) fn last(&self) -> Seen {
        self.log.lock().unwrap().last().expect("a connection was captured").clone()
    }
}

fn accept(way: Way, listener: &TcpListener, shared: Shared) {
    while let Ok((stream, client)) = listener.accept() {
        let shared = shared.clone();
        std::thread::spawn(move || serve(way, stream, client, &shared));
    }
}

fn serve(way: Way, captured: TcpStream, client: SocketAddr, shared: &Shared) {
    let Ok(destination) = original_destination(&captured, IpFamily::of(client.ip())) else { return };
    let (other, fell_back) = match way {
        Way::Out => (dial_out(client, destination, shared), false),
        Way::In => dial_in(client, destination, shared),
    };
    let name = |stream: &TcpStream| stream.local_addr().unwrap();
    shared.log.lock().unwrap().push(Seen {
        way,
        client,
        destination,
        other: other.as_ref().map(name).map_err(io::Error::kind),
        fell_back,
    });
    if let Ok(other) = other {
        copy(captured, other);
    }
}

fn dial_out(client: SocketAddr, to: SocketAddr, shared: &Shared) -> io::Result<TcpStream> {
    let kind = if to.is_ipv4() { SocketKind::OutV4 } else { SocketKind::OutV6 };
    let socket = shared.take(kind);
    bind_address_no_port(&socket)?;
    socket.bind(&SocketAddr::new(client.ip(), 0).into())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// From the client's address, and its port where that is possible.
fn dial_in(client: SocketAddr, to: SocketAddr, shared: &Shared) -> (io::Result<TcpStream>, bool) {
    let kind = if to.is_ipv4() { SocketKind::InV4 } else { SocketKind::InV6 };
    let with_port = |port| {
        let socket = shared.take(kind);
        match port {
            0 => bind_address_no_port(&socket)?,
            _ => reuse_address(&socket)?,
        }
        socket.bind(&SocketAddr::new(client.ip(), port).into())?;
        socket.connect(&to.into())?;
        Ok(socket.into())
    };
    match with_port(client.port()) {
        Err(error) if is_taken(&error) => (with_port(0), true),
        other => (other, false),
    }
}

fn is_taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    matches!(error.kind(), PermissionDenied | AddrInUse | AddrNotAvailable)
}

impl Shared {
    fn take(&self, kind: SocketKind) -> Socket {
        let mut stash = self.stash.lock().unwrap();
        let stash = stash.entry(kind).or_default();
        if stash.is_empty() {
            let made = self.capture.lock().unwrap().sockets(kind, LARGEST_BATCH).unwrap();
            stash.extend(made.into_iter().map(Socket::from));
        }
        let socket = stash.pop().unwrap();
        socket.set_nonblocking(false).unwrap();
        socket
    }
}

/// Both ways until both have ended; an error on one side is a reset on the other.
fn copy(a: TcpStream, b: TcpStream) {
    let (a2, b2) = (a.try_clone().unwrap(), b.try_clone().unwrap());
    let other = std::thread::spawn(move || one_way(a2, b2));
    let this = one_way(b.try_clone().unwrap(), a.try_clone().unwrap());
    if other.join().unwrap().is_ok() && this.is_ok() {
        for stream in [a.as_fd(), b.as_fd()] {
            let _ = reset_on_close(&stream, false);
        }
    }
}

fn one_way(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    let result = io::copy(&mut from, &mut to).map(|_| ());
    match &result {
        Ok(()) => to.shutdown(Shutdown::Write)?,
        // The other direction may be waiting for bytes that will never come.
        Err(_) => {
            let _ = from.shutdown(Shutdown::Read);
            let _ = to.shutdown(Shutdown::Read);
        }
    }
    result
}
