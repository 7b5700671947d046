//! From a listener to TLS connections, and from strangers to nodes.

use std::future::Future;
use std::hash::Hash;
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
use super::strangers::{Admitted, Bounds, Id, NoPlace, Overdue, Strangers};

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

/// Why a connection was ended, or refused.
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
    /// Ended for a newcomer of its own source, which had its share of strangers.
    TooManyOfSource,
    /// Ended for a newcomer, as there were as many strangers as there may be, and its source had most of them.
    TooMany,
    /// Ended for a newer one of the node that its own token stood for, which had as many as it may have.
    TooManyOfNode,
    /// A newcomer that was refused: there are as many strangers as there may be, and nobody has more than a few.
    Full,
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
            Self::TooManyOfNode => "too-many-of-node",
            Self::Full => "full",
            Self::NoPlace => "no-place",
        }
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
pub(super) struct Peer<K> {
    pub(super) address: SocketAddr,
    id: Id,
    door: Arc<Door<K>>,
}

impl<K: Clone + Eq + Hash> Peer<K> {
    /// Looks up a token. If it is accepted the connection is a node's from then on.
    pub(super) async fn review(&self, review: impl Future<Output = Result<K, Refused>>) -> Result<K, Refused> {
        let under_way = Review::begin(self);
        let known = review.await?;
        let proven = self.door.books().proven(self.id, &known);
        drop(under_way);
        match proven {
            Ok(None) => {}
            Ok(Some(oldest)) => self.door.end(oldest, TurnedAway::TooManyOfNode),
            Err(NoPlace { first }) => {
                if first {
                    (self.door.turned_away)(self.address, TurnedAway::NoPlace);
                }
                let sentence = "the control plane has as many connections of nodes as it can have";
                return Err(Refused::Unavailable(sentence.to_owned()));
            }
        }
        Ok(known)
    }
}

/// A token of a connection is being looked up, for as long as this lives.
struct Review<'a, K: Clone + Eq + Hash>(Option<&'a Peer<K>>);

impl<'a, K: Clone + Eq + Hash> Review<'a, K> {
    fn begin(peer: &'a Peer<K>) -> Self {
        Self(peer.door.books().review_begins(peer.id, Instant::now()).then_some(peer))
    }
}

impl<K: Clone + Eq + Hash> Drop for Review<'_, K> {
    fn drop(&mut self) {
        if let Some(peer) = self.0 {
            peer.door.books().review_ends(peer.id);
        }
    }
}

/// Who is here, and who is told of those that have to go.
struct Door<K> {
    books: Mutex<Strangers<End, K>>,
    turned_away: Box<dyn Fn(SocketAddr, TurnedAway) + Send + Sync>,
}

/// Ends a connection.
struct End {
    address: SocketAddr,
    end: oneshot::Sender<()>,
}

impl<K: Clone + Eq + Hash> Door<K> {
    fn books(&self) -> MutexGuard<'_, Strangers<End, K>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, other: End, because: TurnedAway) {
        let _ = other.end.send(());
        (self.turned_away)(other.address, because);
    }

    /// A place for a newcomer, for which another stranger may have to go; or none.
    fn admit(self: &Arc<Self>, address: SocketAddr, descriptor: OwnedSemaphorePermit) -> Option<Place<K>> {
        let (end, ended) = oneshot::channel();
        let now = Instant::now();
        let mut books = self.books();
        let admitted = books.admit(address.ip(), now, End { address, end });
        let due = now + books.bounds().patience;
        drop(books);
        match admitted {
            Ok(Admitted { id, ended: other }) => {
                if let Some((other, because)) = other {
                    self.end(other, because);
                }
                let peer = Peer { address, id, door: self.clone() };
                let due = Some(Box::pin(sleep_until(due)));
                Some(Place { peer, ended: Some(ended), due, _descriptor: descriptor })
            }
            Err(because) => {
                (self.turned_away)(address, because);
                None
            }
        }
    }
}

/// A connection's place. It is free when this is dropped.
struct Place<K: Clone + Eq + Hash> {
    peer: Peer<K>,
    /// `None`: it is being ended.
    ended: Option<oneshot::Receiver<()>>,
    /// When to look whether it took too long; `None`: never again.
    due: Option<Pin<Box<Sleep>>>,
    _descriptor: OwnedSemaphorePermit,
}

impl<K: Clone + Eq + Hash> Place<K> {
    /// Ready when the connection is to end.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(ended) = &mut self.ended else { return Poll::Ready(()) };
        if Pin::new(ended).poll(cx).is_ready() {
            self.ended = None;
            return Poll::Ready(());
        }
        while let Some(due) = &mut self.due
            && due.as_mut().poll(cx).is_ready()
        {
            let overdue = self.peer.door.books().overdue(self.peer.id, Instant::now());
            match overdue {
                Overdue::NotYet => due.as_mut().reset(Instant::now() + LOOK_AGAIN),
                Overdue::Never => self.due = None,
                Overdue::Ended | Overdue::EndedWithoutPlace => {
                    if overdue == Overdue::Ended {
                        (self.peer.door.turned_away)(self.peer.address, TurnedAway::NoCall);
                    }
                    self.ended = None;
                    return Poll::Ready(());
                }
            }
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

impl<K: Clone + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        self.peer.door.books().gone(self.peer.id);
    }
}

/// A TLS connection, and its place.
pub(super) struct Connection<K: Clone + Eq + Hash> {
    stream: TlsStream<TcpStream>,
    place: Place<K>,
}

/// Accepts until `closing`. A connection that fails affects only itself.
///
/// `turned_away` is told of each that had to go.
pub(super) fn incoming<K: Clone + Eq + Hash + Send + 'static>(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    bounds: Bounds,
    turned_away: impl Fn(SocketAddr, TurnedAway) + Send + Sync + 'static,
    mut closing: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Connection<K>>> {
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

async fn accept<K: Clone + Eq + Hash + Send + 'static>(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig>,
    bounds: Bounds,
    door: Arc<Door<K>>,
    connections: mpsc::Sender<io::Result<Connection<K>>>,
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
                Ok(Ok(stream)) => {
                    door.books().shaken(place.peer.id);
                    let _ = connections.send(Ok(Connection { stream, place })).await;
                }
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

impl<K: Clone + Eq + Hash + Send + 'static> Connected for Connection<K> {
    type ConnectInfo = Peer<K>;

    fn connect_info(&self) -> Peer<K> {
        self.place.peer.clone()
    }
}

impl<K: Clone + Eq + Hash> AsyncRead for Connection<K> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.place.poll_open(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

// HTTP/2 does not read while it cannot write: whoever takes nothing in has to go, too.
impl<K: Clone + Eq + Hash> AsyncWrite for Connection<K> {
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
