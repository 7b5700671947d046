//! Bytes in both directions, until both have ended or one is cut.
//!
//! What one side shows, the other sees: the end of a direction is passed on as the end of that direction, and a reset as
//! a reset. Both legs carry SO_LINGER {1, 0} while bytes are copied, so that whatever drops them, a decision, a bug or a
//! kill, is a reset for the applications and never an orderly end of half the data (T8); only [`orderly_close`] clears it.
//!
//! Bytes are read, changed and written in one step, in the thread's one buffer ([`crate::batch`]). What a socket does not take at
//! once waits in memory of the connection's own, and nothing more is read until it is gone: a reader that stops stops its
//! writer.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// How long a slow reader has, for each part of what still lies in front of a reset, before the reset is passed on without the rest.
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
    /// Ends this direction in order, behind all that was taken. Whether that is to be flushed; `last`: the other one has ended
    /// already.
    fn fin(&mut self, last: bool) -> Result<bool, EndedEarly>;
    /// Whether something that was taken is not on its way.
    fn has_waiting(&self) -> bool;
}

/// One end of a connection: a socket, and how to read and write it.
#[derive(Debug)]
pub(crate) struct Leg<From, To> {
    /// The socket.
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
    let from_client = Origin { tcp: &client.tcp, side: client.side };
    let from_server = Origin { tcp: &server.tcp, side: server.side };
    let both = tokio::try_join!(
        pump(from_client, &mut client.source, &mut server.sink, &bytes.sent, (&client_ended, &server_ended)),
        pump(from_server, &mut server.source, &mut client.sink, &bytes.received, (&server_ended, &client_ended)),
    );
    both.map(|_| ())
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
    yes: AtomicBool,
    told: Notify,
}

impl Ended {
    fn set(&self) {
        self.yes.store(true, Ordering::Relaxed);
        self.told.notify_one();
    }

    fn is_set(&self) -> bool {
        self.yes.load(Ordering::Relaxed)
    }

    async fn wait(&self) {
        while !self.is_set() {
            self.told.notified().await;
        }
    }
}

/// The socket that a direction comes from.
#[derive(Clone, Copy)]
struct Origin<'a> {
    tcp: &'a TcpStream,
    side: Side,
}

/// Waits until all that was taken is on its way, unless the origin is reset meanwhile; then that may take so much longer. A reader
/// finds a reset by itself when it comes to it, which it does not while it waits for a slow writer.
///
/// In memory of its own: most connections never wait here.
async fn flush(origin: Origin<'_>, to: &mut impl Sink, grace: Duration) -> Result<(), EndedEarly> {
    let reset = async {
        in_error(origin.tcp).await;
        tokio::time::sleep(grace).await;
    };
    Box::pin(async {
        tokio::select! {
            biased;
            done = to.flush() => done,
            () = reset => Err(EndedEarly::Reset(origin.side)),
        }
    })
    .await
}

/// Waits until a socket is in error. The error itself is not taken: a reader would then see the end of the stream in its place.
pub(crate) async fn in_error(tcp: &TcpStream) {
    // There is no event queue any more where this fails, and nothing that could wait for one.
    let _ = tcp.ready(Interest::ERROR).await;
}

/// Waits until there is something to read. Nothing else of the task may wait for the same of this socket: one waits in the
/// socket's own place, which costs a connection neither memory nor a list that it is taken out of.
pub(crate) async fn readable(tcp: &TcpStream, side: Side) -> Result<(), EndedEarly> {
    poll_fn(|context| tcp.poll_read_ready(context)).await.map_err(|_| EndedEarly::Reset(side))
}

/// One direction. `ended`: whether it has, and whether the other one has.
async fn pump(
    origin: Origin<'_>,
    from: &mut impl Source,
    to: &mut impl Sink,
    count: &AtomicU64,
    (ended, other_ended): (&Ended, &Ended),
) -> Result<(), EndedEarly> {
    if to.has_waiting() && Box::pin(timeout(SOON, from.ready())).await.is_err() {
        flush(origin, to, RESET_GRACE).await?;
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
        if read == Read::Fin {
            break;
        }
        if to.has_waiting() {
            flush(origin, to, RESET_GRACE).await?;
        }
        count.fetch_add(length as u64, Ordering::Relaxed);
        turn = turn.saturating_sub(length);
        if turn == 0 {
            tokio::task::yield_now().await;
            turn = TURN;
        }
    }
    if to.fin(other_ended.is_set())? && to.has_waiting() {
        flush(origin, to, Duration::ZERO).await?;
    }
    ended.set();
    if other_ended.is_set() {
        return Ok(());
    }
    tokio::select! {
        biased;
        () = other_ended.wait() => Ok(()),
        early = Box::pin(from.cut_after_end()) => Err(early),
    }
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
        if self.first.is_empty() { readable(&self.tcp, self.side).await } else { Ok(()) }
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
        in_error(&self.tcp).await;
        EndedEarly::Reset(self.side)
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

    fn fin(&mut self, _: bool) -> Result<bool, EndedEarly> {
        hang_up(&self.tcp, self.side).map(|()| false)
    }

    fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
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
        loop {
            self.write(tcp)?;
            if self.is_empty() {
                return Ok(());
            }
            poll_fn(|context| tcp.poll_write_ready(context)).await?;
        }
    }

    /// Writes as much as goes out at once.
    pub(crate) fn write(&mut self, tcp: &TcpStream) -> io::Result<()> {
        let left = &self.bytes[self.written..];
        if !left.is_empty() {
            let places = [io::IoSlice::new(left)];
            self.written += batch::write_now(tcp, left.len(), || linux::sockets::write_vectored(tcp, &places))?;
        }
        if self.written == self.bytes.len() {
            *self = Self::default();
        }
        Ok(())
    }
}
