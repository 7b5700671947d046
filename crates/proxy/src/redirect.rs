//! From a pod's listeners to the life of each connection.
//!
//! There is one acceptor per listener, on one core ([`crate::cores`]), which serves a connection to its end, each payer's in turn
//! ([`crate::turns`]).

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use linux::nft::IpFamily;
use mesh::RefuseReason;
use wire::pods::Listener;

use crate::connections::{Connection, Direction};
use crate::cores::Busy;
use crate::inbound::Next;
use crate::node::Node;
use crate::pod::Pod;
use crate::reasons::EndedEarly;
use crate::shares::{Payer, Share};
use crate::tunnel::Tunnel;
use crate::watched::watched;
use crate::{inbound, legs, outbound};

/// How many connections an acceptor takes before the rest of its core has its turn.
const TURN: usize = 16;

/// How long an acceptor waits when the process has no room for another connection. They stay in the kernel's queue.
const NO_ROOM: Duration = Duration::from_millis(50);

/// A connection as it was captured.
#[derive(Debug)]
pub(crate) struct Captured {
    /// The client's socket.
    pub(crate) stream: TcpStream,
    /// The client's address, from accept: a client that has reset meanwhile has none any more.
    pub(crate) source: SocketAddr,
    /// The pod whose listener it came to.
    pub(crate) pod: Arc<Pod>,
    /// Which way it goes.
    pub(crate) direction: Direction,
}

impl Captured {
    /// Who pays for it.
    pub(crate) fn payer(&self, node: &Node) -> Payer {
        match self.direction {
            Direction::Outbound => Payer::Pod(self.pod.uid.clone()),
            Direction::Inbound => node.view.read(|view| Payer::at(view, self.source.ip())),
        }
    }

    /// Room for it, where there is any.
    pub(crate) fn share(&self, node: &Node, payer: Payer) -> Result<Share, EndedEarly> {
        let towards = (self.direction == Direction::Inbound).then(|| self.pod.uid.clone());
        node.budgets.connection(payer, towards)
    }
}

/// Which way the connections of a listener go.
pub(crate) fn direction(listener: Listener) -> Direction {
    match listener {
        Listener::OutboundV4 | Listener::OutboundV6 => Direction::Outbound,
        Listener::InboundV4 | Listener::InboundV6 => Direction::Inbound,
    }
}

/// Accepts for as long as it is polled, and hands each connection to `serve`. Dropping it takes the listener out of the
/// event queue, too: the agent holds a duplicate, and a closed descriptor alone would stay there.
///
/// # Errors
/// The kernel does not let the listener be watched.
pub(crate) async fn accept(
    node: &Node,
    listener: TcpListener,
    pod: &Arc<Pod>,
    direction: Direction,
    serve: impl Fn(Captured),
) -> io::Result<()> {
    let listener = watched(listener)?;
    let mut turn = TURN;
    loop {
        let mut ready = listener.readable().await?;
        match ready.try_io(|listener| listener.get_ref().accept()) {
            Ok(Ok((stream, source))) => serve(Captured { stream, source, pod: pod.clone(), direction }),
            Ok(Err(error)) if is_about_one_connection(&error) => {}
            Ok(Err(error)) => {
                node.metrics.accept_failures.inc();
                tracing::warn!(pod = %pod.name, direction = direction.as_str(), %error, "cannot accept");
                tokio::time::sleep(NO_ROOM).await;
            }
            Err(_would_block) => {}
        }
        turn -= 1;
        if turn == 0 {
            tokio::task::yield_now().await;
            turn = TURN;
        }
    }
}

/// Whether accept failed for the client's reasons, as accept(2) tells them, and the next one may be fine at once.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(
        error.kind(),
        K::ConnectionAborted
            | K::ConnectionReset
            | K::ConnectionRefused
            | K::Interrupted
            | K::HostUnreachable
            | K::NetworkUnreachable
            | K::NetworkDown
            | K::TimedOut
    )
}

/// Serves one captured connection, and those that follow it through the same tunnel. How each ended is in the log by then.
/// `_place` is given back when nothing is left.
pub(crate) async fn serve(node: Arc<Node>, captured: Captured, share: Result<Share, EndedEarly>, _place: Busy) {
    let (node, Captured { stream, source, pod, direction }) = (&*node, captured);
    let connection = node.connections.open(&node.clock, &pod, direction, source);
    // For the tunnel's whole life, also between two connections: its descriptors are held all that time.
    let _counted = pod.count_in();
    let first = async {
        share.as_ref().map_err(EndedEarly::clone)?;
        life(node, stream, &connection).await
    };
    let mut kept = to_its_end(node, &connection, Box::pin(first)).await;
    let destination = connection.destination();
    drop(connection);
    while let (Ok(Some(tunnel)), Some(destination)) = (kept, destination) {
        let Next::Lease(tunnel, claim) = Box::pin(inbound::next(&pod, tunnel)).await else { return };
        let connection = node.connections.open(&node.clock, &pod, direction, source);
        connection.set_destination(destination);
        let life = Box::pin(inbound::lease(node, &pod, &connection, tunnel, claim));
        kept = to_its_end(node, &connection, life).await.map(Some);
    }
}

/// Lives a connection's life, unless somebody cuts it, and tells how it ended.
pub(crate) async fn to_its_end<T>(
    node: &Node,
    connection: &Connection,
    life: impl Future<Output = Result<T, EndedEarly>>,
) -> Result<T, EndedEarly> {
    node.metrics.open.inc();
    let end = tokio::select! {
        biased;
        why = connection.until_cut() => Err(why),
        end = life => end,
    };
    node.closed(connection, end.as_ref().map(|_| ()));
    end
}

async fn life(node: &Node, stream: TcpStream, connection: &Connection) -> Result<Option<Box<Tunnel>>, EndedEarly> {
    let pod = &connection.pod;
    let client = legs::captured(stream)?;
    let destination = dialled(&client, connection.source.ip())?;
    connection.set_destination(destination);
    if pod.is_own_leg(connection.source, destination) {
        return Err(RefuseReason::Loop.into());
    }
    match connection.direction {
        // Each in memory of its own: the one that is not needed would take as much as the other.
        Direction::Outbound => Box::pin(outbound::serve(node, pod, connection, client)).await.map(|()| None),
        Direction::Inbound => Box::pin(inbound::serve(node, pod, connection, client)).await,
    }
}

/// What the client dialled, before the rules sent it here. Who dialled our listener itself was not sent.
fn dialled(client: &tokio::net::TcpStream, source: IpAddr) -> Result<SocketAddr, EndedEarly> {
    let here = client.local_addr().map_err(|_| EndedEarly::System("getsockname"))?;
    match linux::sockets::original_destination(client, IpFamily::of(source)) {
        Ok(dialled) if dialled.port() == here.port() && dialled.ip() == here.ip() => {
            Err(RefuseReason::OwnListener.into())
        }
        Ok(dialled) => Ok(dialled),
        // No rule has touched it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RefuseReason::OwnListener.into()),
        Err(_) => Err(EndedEarly::System("getsockopt")),
    }
}
