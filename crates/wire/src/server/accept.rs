//! From a listener to TLS connections, and from strangers to nodes.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::Refused;
use super::strangers::{Admitted, Bounds, Id, Strangers};

/// Connections that may be there beside those that count, while they are being ended: without a bound, a flood could end its own
/// faster than their descriptors are closed.
pub(super) const ENDING: usize = 128;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The pause after the system refused a connection, which it does when descriptors run out.
const PAUSE: Duration = Duration::from_millis(100);
/// When it is looked again whether a review has ended that goes on beyond the time that a stranger has. Whoever it refuses
/// reads why in that time.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why a connection ended without ever having been a node's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TurnedAway {
    /// What it says is no TLS.
    NotTls,
    /// It ended before it came to TLS.
    Ended,
    /// It took longer than a handshake may.
    TimedOut,
    /// The two do not agree; mostly it does not believe the certificate that it was shown.
    Handshake,
    /// No call with an accepted token came in time.
    NoCall,
    /// Its source has its share of strangers.
    TooManyOfSource,
    /// There are as many strangers as there may be, and its source had most of them, or nobody had more than a few.
    TooMany,
    /// Its token was accepted, and there are as many connections of nodes as there may be.
    NoPlace,
}

impl TurnedAway {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotTls => "not-tls",
            Self::Ended => "ended",
            Self::TimedOut => "timed-out",
            Self::Handshake => "handshake",
            Self::NoCall => "no-call",
            Self::TooManyOfSource => "too-many-of-source",
            Self::TooMany => "too-many",
            Self::NoPlace => "no-place",
        }
    }

    /// Whether it went only because there were so many.
    pub fn is_crowding(self) -> bool {
        matches!(self, Self::TooManyOfSource | Self::TooMany | Self::NoPlace)
    }

    fn of(error: &io::Error) -> Self {
        match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls,
            Some(_) => Self::Handshake,
            None => Self::Ended,
        }
    }
}

/// The other end of a connection, as its calls know it.
#[derive(Clone)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    id: Id,
    door: Arc<Door>,
}

impl Peer {
    /// Looks up a token. If it is accepted the connection is a node's from then on.
    pub(super) async fn review<K>(&self, review: impl Future<Output = Result<K, Refused>>) -> Result<K, Refused> {
        let under_way = Review::begin(self);
        let known = review.await?;
        let proven = self.door.books().proven(self.id);
        drop(under_way);
        proven.map_err(|because| {
            (self.door.turned_away)(self.address, because);
            Refused::Unavailable("the control plane has as many connections of nodes as it can have".to_owned())
        })?;
        Ok(known)
    }
}

/// A token of a connection is being looked up, for as long as this lives.
struct Review<'a>(Option<&'a Peer>);

impl<'a> Review<'a> {
    fn begin(peer: &'a Peer) -> Self {
        Self(peer.door.books().review_begins(peer.id, Instant::now()).then_some(peer))
    }
}

impl Drop for Review<'_> {
    fn drop(&mut self) {
        if let Some(peer) = self.0 {
            peer.door.books().review_ends(peer.id);
        }
    }
}

/// Who is here, and who is told of those that have to go.
struct Door {
    books: Mutex<Strangers<End>>,
    turned_away: Box<dyn Fn(SocketAddr, TurnedAway) + Send + Sync>,
}

/// Ends a stranger's connection. Dropped, it says that there is none any more to be ended.
struct End {
    address: SocketAddr,
    end: oneshot::Sender<()>,
}

impl Door {
    fn books(&self) -> MutexGuard<'_, Strangers<End>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a newcomer, for which another stranger may have to go; or none.
    fn admit(self: &Arc<Self>, address: SocketAddr, descriptor: OwnedSemaphorePermit) -> Option<Place> {
        let (end, ended) = oneshot::channel();
        let now = Instant::now();
        let mut books = self.books();
        let admitted = books.admit(address.ip(), now, End { address, end });
        let due = now + books.bounds().patience;
        drop(books);
        match admitted {
            Ok(Admitted { id, ended: other }) => {
                if let Some((other, because)) = other {
                    let _ = other.end.send(());
                    (self.turned_away)(other.address, because);
                }
                let peer = Peer { address, id, door: self.clone() };
                let standing = Standing::Stranger { ended, due: Box::pin(sleep_until(due)) };
                Some(Place { peer, standing, _descriptor: descriptor })
            }
            Err(because) => {
                (self.turned_away)(address, because);
                None
            }
        }
    }
}

/// A connection's place. It is free when this is dropped.
struct Place {
    peer: Peer,
    standing: Standing,
    _descriptor: OwnedSemaphorePermit,
}

enum Standing {
    Stranger { ended: oneshot::Receiver<()>, due: Pin<Box<Sleep>> },
    Node,
    Ended,
}

impl Place {
    /// Ready when the connection is to end. Nothing ends a node's.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Standing::Stranger { ended, due } = &mut self.standing else {
            return if matches!(self.standing, Standing::Ended) { Poll::Ready(()) } else { Poll::Pending };
        };
        match Pin::new(ended).poll(cx) {
            Poll::Ready(Ok(())) => {
                self.standing = Standing::Ended;
                return Poll::Ready(());
            }
            Poll::Ready(Err(_)) => {
                self.standing = Standing::Node;
                return Poll::Pending;
            }
            Poll::Pending => {}
        }
        while due.as_mut().poll(cx).is_ready() {
            if self.peer.door.books().overdue(self.peer.id, Instant::now()) {
                (self.peer.door.turned_away)(self.peer.address, TurnedAway::NoCall);
                self.standing = Standing::Ended;
                return Poll::Ready(());
            }
            due.as_mut().reset(Instant::now() + LOOK_AGAIN);
        }
        Poll::Pending
    }

    async fn ended(&mut self) {
        std::future::poll_fn(|cx| self.poll_ended(cx)).await;
    }

    /// The same, as what reading and writing end with.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.poll_ended(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.peer.door.books().gone(self.peer.id);
    }
}

/// A TLS connection, and its place.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    place: Place,
}

/// Accepts until `closing`. A connection that fails affects only itself.
///
/// `turned_away` is told of each that had to go before it was a node's.
pub(super) fn incoming(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    bounds: Bounds,
    turned_away: impl Fn(SocketAddr, TurnedAway) + Send + Sync + 'static,
    mut closing: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Connection>> {
    let (connections, incoming) = mpsc::channel(1);
    let door = Arc::new(Door { books: Mutex::new(Strangers::new(bounds)), turned_away: Box::new(turned_away) });
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, config, bounds, door, connections) => {}
            _ = closing.wait_for(|closed| *closed) => {}
        }
    });
    ReceiverStream::new(incoming)
}

async fn accept(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig>,
    bounds: Bounds,
    door: Arc<Door>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let descriptors = Arc::new(Semaphore::new(bounds.all() + ENDING));
    loop {
        // Waits only for those that are being ended, which nobody can delay.
        let Ok(descriptor) = descriptors.clone().acquire_owned().await else { return };
        let (tcp, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(PAUSE).await;
                continue;
            }
        };
        // Always accepted, also to be refused: in the backlog it would stand in front of nodes.
        let Some(mut place) = door.admit(address, descriptor) else { continue };
        let acceptor = TlsAcceptor::from(config());
        let (connections, door) = (connections.clone(), door.clone());
        tokio::spawn(async move {
            let shaken = tokio::select! {
                biased;
                () = place.ended() => return,
                shaken = timeout(HANDSHAKE, shake_hands(acceptor, tcp)) => shaken,
            };
            match shaken {
                Ok(Ok(stream)) => drop(connections.send(Ok(Connection { stream, place })).await),
                Ok(Err(error)) => (door.turned_away)(address, TurnedAway::of(&error)),
                Err(_) => (door.turned_away)(address, TurnedAway::TimedOut),
            }
        });
    }
}

async fn shake_hands(acceptor: TlsAcceptor, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    // Changes are small messages, and each is waited for.
    tcp.set_nodelay(true)?;
    acceptor.accept(tcp).await
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.place.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.place.poll_open(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

// HTTP/2 does not read while it cannot write: whoever takes nothing in has to go, too.
impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.place.poll_open(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.place.poll_open(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.place.poll_open(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
