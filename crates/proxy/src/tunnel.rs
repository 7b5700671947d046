//! `justmtls/1` over TLS: the one module that knows how TLS reads and writes.
//!
//! [`dial`] and [`accept`] give a [`Tunnel`] whose other end is a [`VerifiedPeer`]; nothing else makes one. Whoever has it
//! sees frames, payload and ends, never TLS. A tunnel carries one lease here and ends with it.

mod io;

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use identity::tls::{JUSTMTLS_1, refusal_within, unnamed};
use identity::{Refusal, VerifiedPeer};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use wire::tunnel::{
    self as frames, Claim, Control, Decoder, FIRST_LEASE, HEADER, MAX_CONTROL_FRAME, MAX_DATA, Reason, Sender,
    Violation, header_for_data,
};

use self::io::Replayed;
use crate::reasons::{EndedEarly, Side};
use crate::splice::{self, Leg, PIECE, Piece, Sink, Source};

/// How long a handshake may take.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a peer may take from the end of the handshake to its `Open`.
const OPEN: Duration = Duration::from_secs(5);

/// How long to wait for the other side's part of an orderly end. Nothing of the application hangs on it.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long to try to say `Reset` in order. A peer that does not read gets TCP's own.
const LAST_WORD: Duration = Duration::from_millis(200);

/// The most `Data` frames that are written at once.
const FRAMES: usize = PIECE.div_ceil(MAX_DATA);

/// A tunnel whose other side is proven.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Who the other side is.
    pub(crate) peer: VerifiedPeer,
    /// Its end as bytes are copied to and from it.
    pub(crate) leg: Leg<TunnelSource, TunnelSink>,
}

/// Makes a tunnel over a fresh connection, to whom `config` expects.
///
/// # Errors
/// By name, whatever keeps the handshake from proving that identity.
pub(crate) async fn dial(tcp: TcpStream, config: Arc<ClientConfig>) -> Result<Tunnel, EndedEarly> {
    let tcp = Arc::new(tcp);
    let handshake = TlsConnector::from(config).connect(unnamed(), Replayed::new(tcp.clone(), Vec::new()));
    let tls = finished(handshake.await_within(HANDSHAKE).await, &tcp)?;
    let peer = verified(tls.get_ref().1, &tcp)?;
    Ok(Tunnel::new(tcp, peer, TlsStream::Client(tls), Side::Server))
}

/// Makes a tunnel over a connection whose first bytes were a hello of ours.
///
/// # Errors
/// By name, whatever keeps the handshake from proving an identity.
pub(crate) async fn accept(tcp: TcpStream, first: Vec<u8>, config: Arc<ServerConfig>) -> Result<Tunnel, EndedEarly> {
    let tcp = Arc::new(tcp);
    let handshake = TlsAcceptor::from(config).accept(Replayed::new(tcp.clone(), first));
    let tls = finished(handshake.await_within(HANDSHAKE).await, &tcp)?;
    let peer = verified(tls.get_ref().1, &tcp)?;
    Ok(Tunnel::new(tcp, peer, TlsStream::Server(tls), Side::Client))
}

trait AwaitWithin: Future + Sized {
    async fn await_within(self, time: Duration) -> Option<Self::Output> {
        timeout(time, self).await.ok()
    }
}

impl<F: Future> AwaitWithin for F {}

fn finished<T>(result: Option<std::io::Result<T>>, tcp: &TcpStream) -> Result<T, EndedEarly> {
    let error = match result {
        None => return Err(EndedEarly::HandshakeTimeout),
        Some(Ok(tls)) => return Ok(tls),
        Some(Err(error)) => error,
    };
    match refusal_within(&error) {
        Some(refusal) => {
            // The alert is on its way, and a reset would overtake it. No byte of an application is in this connection.
            splice::orderly_close(tcp);
            Err(EndedEarly::Handshake(refusal))
        }
        None => Err(EndedEarly::HandshakeCut),
    }
}

fn verified(connection: &CommonState, tcp: &TcpStream) -> Result<VerifiedPeer, EndedEarly> {
    VerifiedPeer::from_handshake(connection, JUSTMTLS_1).map_err(|refusal: Refusal| {
        splice::orderly_close(tcp);
        EndedEarly::Handshake(refusal)
    })
}

impl Tunnel {
    fn new(tcp: Arc<TcpStream>, peer: VerifiedPeer, tls: TlsStream<Replayed>, far: Side) -> Self {
        let sender = match far {
            Side::Client => Sender::Client,
            Side::Server => Sender::Server,
        };
        let (read, write) = tokio::io::split(tls);
        let source = TunnelSource { tls: read, far, decoder: Decoder::new(sender), buffer: Vec::new(), unread: 0..0 };
        let sink = TunnelSink { tls: write, far, queued: Vec::new(), within_frame: false };
        Self { peer, leg: Leg { tcp, side: far, source, sink } }
    }

    /// Waits for the `Open` that a client's first frame must be.
    ///
    /// # Errors
    /// It does not come in time, or something else does.
    pub(crate) async fn receive_open(&mut self) -> Result<Claim, EndedEarly> {
        match timeout(OPEN, self.leg.source.frame()).await {
            Err(_) => Err(EndedEarly::OpenTimeout),
            Ok(Ok(Frame::Control(Control::Open { claim, .. }))) => Ok(claim),
            Ok(Ok(_)) => Err(Violation::OutOfOrder.into()),
            Ok(Err(early)) => Err(early),
        }
    }

    /// Refuses the lease and ends in order, so that the client learns why.
    pub(crate) async fn refuse(mut self, reason: Reason) {
        let refused = Control::Refused { lease: FIRST_LEASE, reason };
        self.say_farewell(&refused).await;
    }

    /// Ends a tunnel on which both directions ended cleanly. The server has the first word: what it holds of the lease is
    /// gone when it says `Closed`, and the wait for a reused port is on its side, where ports are not scarce.
    pub(crate) async fn finish(mut self) {
        let closed = Control::Closed { lease: FIRST_LEASE };
        match self.leg.side {
            Side::Client => self.say_farewell(&closed).await,
            Side::Server => {
                splice::orderly_close(&self.leg.tcp);
                let _ = timeout(FAREWELL, self.leg.source.rest()).await;
                let _ = timeout(FAREWELL, self.leg.sink.tls.shutdown()).await;
            }
        }
    }

    /// Passes a reset on, as a frame where one fits, so that it cannot get lost, and as TCP's own where the peer does not
    /// read.
    pub(crate) async fn reset(mut self) {
        if !self.leg.sink.within_frame {
            let reset = Control::Reset { lease: FIRST_LEASE };
            let last_word = async {
                self.leg.sink.queue(&reset);
                self.leg.sink.send_queued().await?;
                self.leg.sink.tls.shutdown().await.map_err(|error| cut(&error, self.leg.side))
            };
            if timeout(LAST_WORD, last_word).await.is_ok_and(|said| said.is_ok()) {
                splice::orderly_close(&self.leg.tcp);
            }
        }
    }

    /// What a peer does that wants a cut to look like an end.
    #[cfg(test)]
    pub(crate) async fn hang_up_without_fin(mut self) {
        splice::orderly_close(&self.leg.tcp);
        let _ = self.leg.sink.tls.shutdown().await;
    }

    /// Says the last thing that is to be said, hangs up, and waits for the other side to do the same.
    async fn say_farewell(&mut self, last: &Control) {
        splice::orderly_close(&self.leg.tcp);
        self.leg.sink.queue(last);
        let hang_up = async {
            self.leg.sink.send_queued().await?;
            self.leg.sink.tls.shutdown().await.map_err(|error| cut(&error, self.leg.side))
        };
        if timeout(FAREWELL, hang_up).await.is_ok_and(|done| done.is_ok()) {
            // To close with bytes unread would be a reset, and could overtake what was just said.
            let _ = timeout(FAREWELL, self.leg.source.rest()).await;
        }
    }
}

/// What comes through a tunnel.
pub(crate) struct TunnelSource {
    tls: ReadHalf<TlsStream<Replayed>>,
    /// The side that the tunnel leads to.
    far: Side,
    decoder: Decoder,
    buffer: Vec<u8>,
    /// What of the buffer was read and not decoded yet.
    unread: std::ops::Range<usize>,
}

impl fmt::Debug for TunnelSource {
    /// Without bytes: they are the application's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelSource").field("far", &self.far).finish_non_exhaustive()
    }
}

/// The next thing in a tunnel.
enum Frame {
    Control(Control),
    /// Where payload lies in the buffer.
    Data(std::ops::Range<usize>),
}

impl TunnelSource {
    async fn frame(&mut self) -> Result<Frame, EndedEarly> {
        loop {
            if let Some(frame) = self.decode()? {
                return Ok(frame);
            }
            if self.buffer.is_empty() {
                self.buffer = vec![0; PIECE];
            }
            match self.tls.read(&mut self.buffer).await {
                // The end of TLS inside a lease: whoever killed the other side must not have truncated a stream (T8).
                Ok(0) => return Err(EndedEarly::Truncated),
                Ok(length) => self.unread = 0..length,
                Err(error) => return Err(cut(&error, self.far)),
            }
        }
    }

    fn decode(&mut self) -> Result<Option<Frame>, Violation> {
        let mut input = &self.buffer[self.unread.clone()];
        let piece = self.decoder.next(&mut input)?;
        self.unread.start = self.unread.end - input.len();
        Ok(match piece {
            None => None,
            Some(frames::Piece::Control(control)) => Some(Frame::Control(control)),
            // Payload is the last thing that was taken off the input.
            Some(frames::Piece::Data(data)) => Some(Frame::Data(self.unread.start - data.len()..self.unread.start)),
        })
    }

    /// Reads to the end, whatever comes.
    async fn rest(&mut self) {
        while self.frame().await.is_ok() {}
    }
}

impl Source for TunnelSource {
    async fn next(&mut self) -> Result<Piece<'_>, EndedEarly> {
        loop {
            match self.frame().await? {
                Frame::Data(place) => return Ok(Piece::Data(&self.buffer[place])),
                Frame::Control(Control::Fin { .. }) => return Ok(Piece::Fin),
                Frame::Control(Control::Opened { .. }) => {}
                Frame::Control(Control::Refused { reason, .. }) => return Err(EndedEarly::RefusedByPeer(reason)),
                Frame::Control(Control::Reset { .. }) => return Err(EndedEarly::Reset(self.far)),
                Frame::Control(Control::Open { .. } | Control::Closed { .. }) => {
                    return Err(Violation::OutOfOrder.into());
                }
            }
        }
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        match self.frame().await {
            Ok(Frame::Control(Control::Reset { .. })) => EndedEarly::Reset(self.far),
            // The other side has seen both directions end, as we are about to.
            Ok(Frame::Control(Control::Closed { .. })) => std::future::pending().await,
            Ok(_) => Violation::OutOfOrder.into(),
            Err(early) => early,
        }
    }
}

/// What goes into a tunnel.
#[derive(Debug)]
pub(crate) struct TunnelSink {
    tls: WriteHalf<TlsStream<Replayed>>,
    far: Side,
    /// Control frames that go out with the next write.
    queued: Vec<u8>,
    /// A frame was begun and not finished: nothing else can be said on this tunnel any more.
    within_frame: bool,
}

impl TunnelSink {
    /// Puts a frame in front of the next write, so that `Open` and the first data travel together.
    pub(crate) fn queue(&mut self, control: &Control) {
        self.queued.extend_from_slice(control.encode(&mut [0; MAX_CONTROL_FRAME]));
    }

    /// Puts bytes that are no frame in front of the next write.
    #[cfg(test)]
    pub(crate) fn queue_raw(&mut self, bytes: &[u8]) {
        self.queued.extend_from_slice(bytes);
    }

    /// Writes what is queued.
    pub(crate) async fn send_queued(&mut self) -> Result<(), EndedEarly> {
        self.write_frames(&[]).await
    }

    /// Writes the queued frames, and payload in frames behind them.
    async fn write_frames(&mut self, payload: &[u8]) -> Result<(), EndedEarly> {
        self.within_frame = true;
        let chunks = || payload.chunks(MAX_DATA);
        let mut headers = [[0; HEADER]; FRAMES];
        for (header, chunk) in headers.iter_mut().zip(chunks()) {
            *header = header_for_data(chunk.len());
        }
        let mut slices = [IoSlice::new(&[]); 1 + 2 * FRAMES];
        slices[0] = IoSlice::new(&self.queued);
        for ((pair, header), chunk) in slices[1..].chunks_exact_mut(2).zip(&headers).zip(chunks()) {
            pair[0] = IoSlice::new(header);
            pair[1] = IoSlice::new(chunk);
        }
        let written = write_all(&mut self.tls, &mut slices[..1 + 2 * chunks().len()]).await;
        written.map_err(|error| cut(&error, self.far))?;
        self.queued.clear();
        self.within_frame = false;
        Ok(())
    }
}

impl Sink for TunnelSink {
    async fn write(&mut self, payload: &[u8]) -> Result<(), EndedEarly> {
        for part in payload.chunks(FRAMES * MAX_DATA) {
            self.write_frames(part).await?;
        }
        Ok(())
    }

    async fn fin(&mut self) -> Result<(), EndedEarly> {
        self.queue(&Control::Fin { lease: FIRST_LEASE });
        self.send_queued().await
    }
}

/// Writes everything, and waits until the kernel has taken it: what TLS holds back would be a queue without a bound.
async fn write_all(tls: &mut WriteHalf<TlsStream<Replayed>>, mut slices: &mut [IoSlice<'_>]) -> std::io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match tls.write_vectored(slices).await? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            length => IoSlice::advance_slices(&mut slices, length),
        }
    }
    tls.flush().await
}

/// What an error of the TLS stream means.
fn cut(error: &std::io::Error, far: Side) -> EndedEarly {
    match refusal_within(error) {
        // A server judges the client's certificate when the client has finished already: its alert comes here.
        Some(refusal) => EndedEarly::Handshake(refusal),
        None if error.kind() == std::io::ErrorKind::UnexpectedEof => EndedEarly::Truncated,
        None => EndedEarly::Reset(far),
    }
}
