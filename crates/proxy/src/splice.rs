//! Bytes in both directions, until both have ended or one is cut.
//!
//! What one side shows, the other sees: the end of a direction is passed on as the end of that direction, and a reset as
//! a reset. Both legs carry SO_LINGER {1, 0} while bytes are copied, so that whatever drops them, a decision, a bug or a
//! kill, is a reset for the applications and never an orderly end of half the data (T8); only [`orderly_close`] clears it.
//!
//! Bytes are read, changed and written in one step, in the core's one buffer ([`crate::batch`]). What a socket does not take at
//! once waits in memory of the connection's own, and nothing more is read until it is gone: a reader that stops stops its
//! writer.

use std::cell::Cell;
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::batch::{self, Batch, MOST};
use crate::reasons::{EndedEarly, Side};

/// How many bytes one direction moves before the other connections of its core have their turn: a bulk flow that is
/// always ready would otherwise starve a ping.
const TURN: usize = 256 * 1024;

/// How long something that is held back waits for bytes to go with.
const SOON: Duration = Duration::from_millis(2);

/// How long a reader has for what still lies in front of a reset before the reset is passed on without it.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// What a look at a source gave.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Read {
    /// Nothing yet.
    Nothing,
    /// Payload, which lies in the batch.
    Data,
    /// The orderly end of this direction.
    Fin,
}

/// Where bytes come from.
pub(crate) trait Source {
    /// Waits until there is something to read. Nothing is lost when the wait is given up.
    async fn ready(&mut self) -> Result<(), EndedEarly>;
    /// Takes what there is, without waiting, into the batch.
    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly>;
    /// Waits for what can still come after the end of this direction, while the other one goes on: its cut. Where there is
    /// none it waits for ever.
    async fn cut_after_end(&mut self) -> EndedEarly;
}

/// Where bytes go.
pub(crate) trait Sink {
    /// Takes the payload that a source has left in the batch. As much of it as is possible goes out at once.
    fn take(&mut self, batch: &mut Batch) -> Result<(), EndedEarly>;
    /// Waits until all that was taken is on its way.
    async fn flush(&mut self) -> Result<(), EndedEarly>;
    /// Ends this direction in order; `last`: the other one has ended already.
    async fn fin(&mut self, last: bool) -> Result<(), EndedEarly>;
    /// Whether something waits to go out with the first bytes.
    fn holds_back(&self) -> bool;
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

/// [`splice`], and the sockets are closed in order when both directions have ended so.
pub(crate) async fn splice_and_close<CF: Source, CT: Sink, SF: Source, ST: Sink>(
    client: &mut Leg<CF, CT>,
    server: &mut Leg<SF, ST>,
    bytes: &Bytes,
) -> Result<(), EndedEarly> {
    splice(client, server, bytes).await?;
    orderly_close(&client.tcp);
    orderly_close(&server.tcp);
    Ok(())
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
    if to.holds_back() && Box::pin(timeout(SOON, from.ready())).await.is_err() {
        to.flush().await?;
    }
    let mut turn = TURN;
    loop {
        from.ready().await?;
        let (read, length) = batch::with(|batch| {
            let read = from.read(batch)?;
            let length = batch.len();
            if read == Read::Data {
                to.take(batch)?;
            }
            Ok::<_, EndedEarly>((read, length))
        })?;
        match read {
            Read::Nothing => continue,
            Read::Data => {}
            Read::Fin => break,
        }
        to.flush().await?;
        count.fetch_add(length as u64, Ordering::Relaxed);
        turn = turn.saturating_sub(length);
        if turn == 0 {
            tokio::task::yield_now().await;
            turn = TURN;
        }
    }
    to.fin(other_ended.yes.get()).await?;
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
        // In memory of its own: most connections never need it.
        Box::pin(tokio::time::sleep(RESET_GRACE)).await;
    }
    side
}

/// From now on, dropping the socket closes the connection in order: only for one that both sides have ended.
pub(crate) fn orderly_close(tcp: &TcpStream) {
    // A socket that refuses the option is dead already, and has no other end to tell.
    let _ = linux::sockets::reset_on_close(tcp, false);
}

/// Ends our direction of a connection.
pub(crate) fn hang_up(tcp: &TcpStream, side: Side) -> Result<(), EndedEarly> {
    // ENOTCONN: the other side has reset meanwhile.
    SockRef::from(tcp).shutdown(Shutdown::Write).map_err(|_| EndedEarly::Reset(side))
}

/// A leg in clear.
pub(crate) fn plain_leg(tcp: TcpStream, side: Side) -> Leg<PlainSource, PlainSink> {
    let tcp = Arc::new(tcp);
    Leg {
        source: PlainSource { tcp: tcp.clone(), side, first: Vec::new() },
        sink: PlainSink { tcp: tcp.clone(), side, waiting: Waiting::default() },
        tcp,
        side,
    }
}

/// What comes from a socket in clear.
#[derive(Debug)]
pub(crate) struct PlainSource {
    tcp: Arc<TcpStream>,
    side: Side,
    /// Bytes that were read already, in order to see what they are.
    first: Vec<u8>,
}

impl PlainSource {
    /// Makes these bytes come before all others: at most [`MOST`] of them.
    pub(crate) fn replay(&mut self, bytes: Vec<u8>) {
        debug_assert!(bytes.len() <= MOST);
        self.first = bytes;
    }
}

impl Source for PlainSource {
    async fn ready(&mut self) -> Result<(), EndedEarly> {
        if self.first.is_empty() {
            self.tcp.readable().await.map_err(|_| EndedEarly::Reset(self.side))?;
        }
        Ok(())
    }

    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly> {
        if !self.first.is_empty() {
            batch.put_clear(&std::mem::take(&mut self.first));
            return Ok(Read::Data);
        }
        match batch.read_clear(&self.tcp) {
            Ok(None) => Ok(Read::Nothing),
            Ok(Some(0)) => Ok(Read::Fin),
            Ok(Some(_)) => Ok(Read::Data),
            Err(_) => Err(EndedEarly::Reset(self.side)),
        }
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
    waiting: Waiting,
}

impl Sink for PlainSink {
    fn take(&mut self, batch: &mut Batch) -> Result<(), EndedEarly> {
        self.waiting.take(&self.tcp, batch).map_err(|_| EndedEarly::Reset(self.side))
    }

    async fn flush(&mut self) -> Result<(), EndedEarly> {
        self.waiting.flush(&self.tcp).await.map_err(|_| EndedEarly::Reset(self.side))
    }

    async fn fin(&mut self, _: bool) -> Result<(), EndedEarly> {
        hang_up(&self.tcp, self.side)
    }

    fn holds_back(&self) -> bool {
        false
    }
}

/// What a socket has not taken yet. Empty, it owns no memory.
#[derive(Default, Debug)]
pub(crate) struct Waiting {
    bytes: Vec<u8>,
    written: usize,
}

impl Waiting {
    /// Writes the batch, and keeps what does not go out at once.
    pub(crate) fn take(&mut self, tcp: &TcpStream, batch: &Batch) -> io::Result<()> {
        if self.bytes.is_empty() {
            batch.write(tcp, &mut self.bytes)
        } else {
            batch.keep(&mut self.bytes);
            Ok(())
        }
    }

    /// Whether everything is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Puts bytes behind what waits.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Waits until the kernel has taken everything.
    pub(crate) async fn flush(&mut self, tcp: &TcpStream) -> io::Result<()> {
        while self.written < self.bytes.len() {
            let left = &self.bytes[self.written..];
            let written =
                batch::write_now(tcp, left.len(), || linux::sockets::write_vectored(tcp, &[io::IoSlice::new(left)]))?;
            self.written += written;
            if self.written < self.bytes.len() {
                tcp.writable().await?;
            }
        }
        *self = Self::default();
        Ok(())
    }
}
