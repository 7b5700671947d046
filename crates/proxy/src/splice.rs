//! Bytes in both directions, until both have ended or one is cut.
//!
//! What one side shows, the other sees: the end of a direction is passed on as the end of that direction, and a reset as
//! a reset. Both legs carry SO_LINGER {1, 0} while bytes are copied, so that whatever drops them, a decision, a bug or a
//! kill, is a reset for the applications and never an orderly end of half the data (T8); only [`orderly_close`] clears it.
//!
//! Nothing is queued but one piece per direction: a reader that stops stops its writer.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::reasons::{EndedEarly, Side};

/// The most that is read at once, in bytes: four whole frames of a tunnel. A connection gets one such buffer per direction
/// with its first byte and keeps it, so that one that never carried anything owns none.
pub(crate) const PIECE: usize = 4 * wire::tunnel::MAX_DATA;

/// How many bytes one direction moves before the other connections of its core have their turn: a bulk flow that is
/// always ready would otherwise starve a ping.
const TURN: usize = 256 * 1024;

/// How long a reader has for what still lies in front of a reset before the reset is passed on without it.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// The next thing that a direction shows.
#[derive(Debug)]
pub(crate) enum Piece<'a> {
    /// Payload, never empty.
    Data(&'a [u8]),
    /// The orderly end of this direction.
    Fin,
}

/// Where bytes come from.
pub(crate) trait Source {
    /// Waits for the next piece. Nothing is lost when the wait is given up.
    async fn next(&mut self) -> Result<Piece<'_>, EndedEarly>;
    /// Waits for what can still come after the end of this direction, while the other one goes on: its cut. Where there is
    /// none it waits for ever.
    async fn cut_after_end(&mut self) -> EndedEarly;
}

/// Where bytes go.
pub(crate) trait Sink {
    /// Writes all of the payload, and waits until it is on its way.
    async fn write(&mut self, payload: &[u8]) -> Result<(), EndedEarly>;
    /// Ends this direction in order.
    async fn fin(&mut self) -> Result<(), EndedEarly>;
}

/// One end of a connection: a socket, and how to read and write it.
#[derive(Debug)]
pub(crate) struct Leg<From, To> {
    /// The socket, watched for resets.
    pub(crate) tcp: Arc<TcpStream>,
    /// Which end of the connection it leads to.
    pub(crate) side: Side,
    /// What comes from it.
    pub(crate) source: From,
    /// What goes to it.
    pub(crate) sink: To,
}

/// Payload bytes of one connection, counted while it lives.
#[derive(Default, Debug)]
pub(crate) struct Bytes {
    /// From the client to the server.
    pub(crate) sent: AtomicU64,
    /// From the server to the client.
    pub(crate) received: AtomicU64,
}

impl Bytes {
    /// Both, as they are now.
    pub(crate) fn now(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// Copies both ways until both directions ended in order, or one side cut the connection.
pub(crate) async fn splice<CF: Source, CT: Sink, SF: Source, ST: Sink>(
    client: &mut Leg<CF, CT>,
    server: &mut Leg<SF, ST>,
    bytes: &Bytes,
) -> Result<(), EndedEarly> {
    let (client_ended, server_ended) = (Ended::default(), Ended::default());
    let both = async {
        tokio::try_join!(
            pump(&mut client.source, &mut server.sink, &bytes.sent, &client_ended, &server_ended),
            pump(&mut server.source, &mut client.sink, &bytes.received, &server_ended, &client_ended),
        )
    };
    tokio::select! {
        biased;
        done = both => done.map(|_| ()),
        side = reset(&client.tcp, client.side, &client_ended) => Err(EndedEarly::Reset(side)),
        side = reset(&server.tcp, server.side, &server_ended) => Err(EndedEarly::Reset(side)),
    }
}

/// Whether a direction has ended in order.
#[derive(Default, Debug)]
struct Ended {
    yes: Cell<bool>,
    told: Notify,
}

impl Ended {
    fn set(&self) {
        self.yes.set(true);
        self.told.notify_one();
    }

    async fn wait(&self) {
        while !self.yes.get() {
            self.told.notified().await;
        }
    }
}

async fn pump(
    from: &mut impl Source,
    to: &mut impl Sink,
    count: &AtomicU64,
    ended: &Ended,
    other_ended: &Ended,
) -> Result<(), EndedEarly> {
    let mut turn = TURN;
    loop {
        let payload = match from.next().await? {
            Piece::Data(payload) => payload,
            Piece::Fin => break,
        };
        let length = payload.len();
        to.write(payload).await?;
        count.fetch_add(length as u64, Ordering::Relaxed);
        turn = turn.saturating_sub(length);
        if turn == 0 {
            tokio::task::yield_now().await;
            turn = TURN;
        }
    }
    to.fin().await?;
    ended.set();
    tokio::select! {
        biased;
        () = other_ended.wait() => Ok(()),
        early = from.cut_after_end() => Err(early),
    }
}

/// Waits until a socket is in error. A reader finds that by itself when it comes to it; but a direction that ended, or one
/// that waits for a slow writer, has no reader.
async fn reset(tcp: &TcpStream, side: Side, ended: &Ended) -> Side {
    // The error itself is not taken: the reader would then see the end of the stream in its place.
    if tcp.ready(Interest::ERROR).await.is_ok() && !ended.yes.get() {
        tokio::time::sleep(RESET_GRACE).await;
    }
    side
}

/// From now on, dropping the socket closes the connection in order: only for one that both sides have ended.
pub(crate) fn orderly_close(tcp: &TcpStream) {
    // A socket that refuses the option is dead already, and has no other end to tell.
    let _ = linux::sockets::reset_on_close(tcp, false);
}

/// A leg in clear.
pub(crate) fn plain_leg(tcp: TcpStream, side: Side) -> Leg<PlainSource, PlainSink> {
    let tcp = Arc::new(tcp);
    Leg {
        source: PlainSource { tcp: tcp.clone(), side, buffer: Vec::new(), first: Vec::new() },
        sink: PlainSink { tcp: tcp.clone(), side },
        tcp,
        side,
    }
}

/// What comes from a socket in clear.
#[derive(Debug)]
pub(crate) struct PlainSource {
    tcp: Arc<TcpStream>,
    side: Side,
    buffer: Vec<u8>,
    /// Bytes that were read already, in order to see what they are.
    first: Vec<u8>,
}

impl PlainSource {
    /// Makes these bytes come before all others.
    pub(crate) fn replay(&mut self, bytes: Vec<u8>) {
        self.first = bytes;
    }

    /// What is there by now, without waiting; `None` where nothing is.
    pub(crate) fn next_now(&mut self) -> Result<Option<Piece<'_>>, EndedEarly> {
        Ok(match self.read_now()? {
            None => None,
            Some(0) => Some(Piece::Fin),
            Some(length) => Some(Piece::Data(&self.buffer[..length])),
        })
    }

    /// Fills the buffer's beginning and returns how much of it; 0 is the end of the stream.
    fn read_now(&mut self) -> Result<Option<usize>, EndedEarly> {
        if !self.first.is_empty() {
            self.buffer = std::mem::take(&mut self.first);
            return Ok(Some(self.buffer.len()));
        }
        if self.buffer.len() != PIECE {
            self.buffer = vec![0; PIECE];
        }
        match self.tcp.try_read(&mut self.buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => Err(EndedEarly::Reset(self.side)),
        }
    }
}

impl Source for PlainSource {
    async fn next(&mut self) -> Result<Piece<'_>, EndedEarly> {
        let length = loop {
            if self.first.is_empty() {
                // Readiness first: a connection that waits for its first byte has no buffer yet.
                self.tcp.readable().await.map_err(|_| EndedEarly::Reset(self.side))?;
            }
            if let Some(length) = self.read_now()? {
                break length;
            }
        };
        Ok(if length == 0 { Piece::Fin } else { Piece::Data(&self.buffer[..length]) })
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        // A reset shows on the socket itself, which is watched.
        std::future::pending().await
    }
}

/// What goes to a socket in clear.
#[derive(Debug)]
pub(crate) struct PlainSink {
    tcp: Arc<TcpStream>,
    side: Side,
}

impl Sink for PlainSink {
    async fn write(&mut self, mut payload: &[u8]) -> Result<(), EndedEarly> {
        while !payload.is_empty() {
            match self.tcp.try_write(payload) {
                Ok(length) => payload = &payload[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tcp.writable().await.map_err(|_| EndedEarly::Reset(self.side))?;
                }
                Err(_) => return Err(EndedEarly::Reset(self.side)),
            }
        }
        Ok(())
    }

    async fn fin(&mut self) -> Result<(), EndedEarly> {
        // ENOTCONN: the other side has reset meanwhile.
        SockRef::from(&*self.tcp).shutdown(std::net::Shutdown::Write).map_err(|_| EndedEarly::Reset(self.side))
    }
}
