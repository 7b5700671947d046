//! The plaintext double proxy: what justmtls would cost without TLS, identities and decisions.
//!
//! One process beside the client and one beside the server, each on one thread, in the pods' own network namespaces.
//! Both catch connections as justmtls does, by a redirection in nftables, and copy bytes with one buffer for all
//! connections of the thread. So client and server are the same number of sockets, hops and wake-ups apart as with
//! justmtls, and the rest is the simplest there is.

use std::cell::RefCell;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;

use anyhow::{Context, Result};
use linux::netlink::{self, Protocol};
use linux::nft::{
    AddressType, Chain, ChainKind, Compare, Expression as E, Hook, HookPoint, IpFamily, L4Protocol, Policy, Rule, Table,
};
use linux::sockets::{original_destination, start_connect};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::LocalOptions;
use tokio::task::{spawn_local, yield_now};

use crate::congestion;
use crate::load::{at, end_with_the_caller};

/// The most that is read at once: measured, larger does not help and smaller costs.
const PIECE: usize = 256 * 1024;
/// Bytes of one direction before other connections have their turn.
const TURN: usize = 256 * 1024;
/// Exempts the proxy's own connections from being caught.
const MARK: u32 = 0x2d0b;
const PORT: u16 = 15001;
const DESTINATION_NAT: i32 = -100;
const BACKLOG: u32 = 1024;

/// On which side of a connection it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// Catches what the pod's programs open.
    Outbound,
    /// Catches what comes to the pod.
    Inbound,
}

/// What it is started with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// On which side.
    side: Side,
}

/// Where all connections of the thread read to.
type Scratch = Rc<RefCell<Vec<u8>>>;

/// Proxies until standard input ends. Says `ready` when the redirection stands.
pub(crate) fn run(args: &Args) -> Result<()> {
    linux::privileges::raise_descriptor_limit().context("cannot raise the limit of open descriptors")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let address = at(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT);
        let listener = TcpSocket::new_v4()?;
        listener.set_reuseaddr(true)?;
        listener.bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let listener = listener.listen(BACKLOG)?;
        let mut socket = netlink::Socket::open(Protocol::Netfilter)?;
        linux::nft::replace(&mut socket, &redirection(args.side)).context("cannot redirect connections")?;
        println!("ready");
        io::stdout().flush()?;
        end_with_the_caller();
        let scratch: Scratch = Rc::new(RefCell::new(vec![0; PIECE]));
        loop {
            let (client, _) = listener.accept().await?;
            let scratch = scratch.clone();
            spawn_local(async move { serve(&client, &scratch).await.ok() });
        }
    })
}

fn redirection(side: Side) -> Table {
    let (name, point) = match side {
        Side::Outbound => ("out", HookPoint::Output),
        Side::Inbound => ("in", HookPoint::Prerouting),
    };
    let mut rules = vec![Rule::new("the proxy's own connections", [E::Mark(Compare::Is, MARK), E::Accept])];
    if side == Side::Outbound {
        rules.push(Rule::new("to itself", [E::DestinationType(Compare::Is, AddressType::Local), E::Accept]));
    } else {
        rules.push(Rule::new("from itself", [E::FromLoopback(Compare::Is), E::Accept]));
    }
    rules.push(Rule::new("everything else", [E::Protocol(L4Protocol::Tcp), E::Redirect(PORT)]));
    let hook = Hook { kind: ChainKind::Nat, point, priority: DESTINATION_NAT, policy: Policy::Accept };
    let chains = vec![Chain { name: name.into(), hook: Some(hook), rules }];
    Table { name: "double".into(), timeouts: Vec::new(), sets: Vec::new(), chains }
}

async fn serve(client: &TcpStream, scratch: &Scratch) -> io::Result<()> {
    client.set_nodelay(true)?;
    SockRef::from(client).set_tcp_congestion(congestion::NAME.as_bytes())?;
    let server = connect(original_destination(client, IpFamily::V4)?).await?;
    tokio::try_join!(copy(client, &server, scratch), copy(&server, client, scratch)).map(|_| ())
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_mark(MARK)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_congestion(congestion::NAME.as_bytes())?;
    start_connect(&socket, to)?;
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        None => Ok(stream),
        Some(error) => Err(error),
    }
}

async fn copy(from: &TcpStream, to: &TcpStream, scratch: &Scratch) -> io::Result<()> {
    let mut turn = TURN;
    loop {
        from.readable().await?;
        let (length, rest) = {
            let buffer = &mut *scratch.borrow_mut();
            let length = match from.try_read(buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let written = match to.try_write(&buffer[..length]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                other => other?,
            };
            // Only what a full socket did not take is kept: an idle connection has no buffer.
            (length, buffer[written..length].to_vec())
        };
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            to.writable().await?;
            match to.try_write(rest) {
                Ok(length) => rest = &rest[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        turn = turn.saturating_sub(length);
        if turn == 0 {
            yield_now().await;
            turn = TURN;
        }
    }
    SockRef::from(to).shutdown(std::net::Shutdown::Write)
}
