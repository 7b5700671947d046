//! From a listener to TLS connections.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Connections at a time: two processes on each of 5,000 nodes, and as many again while they reconnect.
const MAX_CONNECTIONS: usize = 20_000;
/// Handshakes at a time. Each may keep its place for [`HANDSHAKE`].
const MAX_HANDSHAKES: usize = 256;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The pause after the system refused a connection, which it does when descriptors run out.
const PAUSE: Duration = Duration::from_millis(100);

/// The other end of a connection.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Why a connection did not come to TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoTls {
    /// What it says is no TLS.
    NotTls,
    /// It ended before.
    Ended,
    /// It took longer than a handshake may.
    TimedOut,
    /// The two do not agree; mostly it does not believe the certificate that it was shown.
    Handshake,
}

impl NoTls {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotTls => "not-tls",
            Self::Ended => "ended",
            Self::TimedOut => "timed-out",
            Self::Handshake => "handshake",
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

/// A TLS connection, and its place among [`MAX_CONNECTIONS`].
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

/// Accepts until `closing`. A connection that fails affects only itself.
///
/// `stranger` is told of each that did not come to TLS.
pub(super) fn incoming(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    stranger: impl Fn(SocketAddr, NoTls) + Send + Sync + 'static,
    mut closing: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Connection>> {
    let (connections, incoming) = mpsc::channel(1);
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, config, Arc::new(stranger), connections) => {}
            _ = closing.wait_for(|closed| *closed) => {}
        }
    });
    ReceiverStream::new(incoming)
}

async fn accept(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig>,
    stranger: Arc<impl Fn(SocketAddr, NoTls) + Send + Sync + 'static>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let (Ok(place), Ok(handshake)) =
            (places.clone().acquire_owned().await, handshakes.clone().acquire_owned().await)
        else {
            return;
        };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(PAUSE).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(config());
        let (connections, stranger) = (connections.clone(), stranger.clone());
        tokio::spawn(async move {
            let _handshake = handshake;
            match timeout(HANDSHAKE, shake_hands(acceptor, tcp)).await {
                Ok(Ok(stream)) => {
                    let _ = connections.send(Ok(Connection { stream, peer, _place: place })).await;
                }
                Ok(Err(error)) => stranger(peer, NoTls::of(&error)),
                Err(_) => stranger(peer, NoTls::TimedOut),
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
        Peer(self.peer)
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
