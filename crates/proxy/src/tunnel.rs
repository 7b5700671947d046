//! `justmtls/1` over TLS. [`dial`] and [`accept`] give a [`Tunnel`] whose other end is a [`VerifiedPeer`]; nothing else makes
//! one. Whoever has it sees frames, payload and ends, never TLS.
//!
//! A tunnel carries one connection of an application at a time, its lease; when both directions of one ended in order, the
//! next may begin. The client's side asks for a lease ([`Tunnel::ask`]), the server's grants or refuses it.

mod ends;
mod handshake;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use identity::{UnixTime, VerifiedPeer};
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use wire::tunnel::{Claim, Control, Decoder, Reason, Sender, Violation};

use self::ends::{TunnelSink, TunnelSource};
use crate::offload::Offload;
use crate::pod::OwnLeg;
use crate::reasons::{EndedEarly, Side};
use crate::shares::Payer;
use crate::splice::{self, Leg, Sink};

/// How long a handshake may take.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a peer may take from the end of the handshake to its `Open`.
const OPEN: Duration = Duration::from_secs(5);

/// How long the other side's part of an orderly end may take. Nothing of the application hangs on it.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long to try to say `Reset` in order. A peer that does not read gets TCP's own.
const LAST_WORD: Duration = Duration::from_millis(200);

/// The reason of a refusal that says: nothing of it was delivered, ask elsewhere.
pub(crate) const DRAINING: &str = "draining";

/// A tunnel whose other side is proven.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Who the other side is.
    pub(crate) peer: VerifiedPeer,
    /// Its end as bytes are copied to and from it.
    pub(crate) leg: Leg<TunnelSource, TunnelSink>,
    /// When the handshake was.
    pub(crate) made: Instant,
    /// The last second in which the certificates of both sides are valid, as far as this side knows them.
    pub(crate) until: UnixTime,
    /// What shows other parts of the data path that this connection is its own.
    own: Option<OwnLeg>,
}

/// Makes a tunnel over a fresh connection, to whom `config` expects. `pays`: where the handshake is worked out, and whose turn
/// it takes there.
///
/// # Errors
/// By name, whatever keeps the handshake from proving that identity.
pub(crate) async fn dial(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    pays: (&Offload, Payer),
) -> Result<Box<Tunnel>, EndedEarly> {
    let finished = timeout(HANDSHAKE, Box::pin(handshake::client(&tcp, config, pays))).await;
    Ok(Tunnel::new(tcp, finished.map_err(|_| EndedEarly::HandshakeTimeout)??, Side::Server))
}

/// Makes a tunnel over a connection whose first bytes were a hello of ours. `pays` as in [`dial`].
///
/// # Errors
/// By name, whatever keeps the handshake from proving an identity.
pub(crate) async fn accept(
    tcp: TcpStream,
    first: Vec<u8>,
    config: Arc<ServerConfig>,
    pays: (&Offload, Payer),
) -> Result<Box<Tunnel>, EndedEarly> {
    let finished = timeout(HANDSHAKE, Box::pin(handshake::server(&tcp, config, first, pays))).await;
    Ok(Tunnel::new(tcp, finished.map_err(|_| EndedEarly::HandshakeTimeout)??, Side::Client))
}

impl Tunnel {
    /// In a box: it is handed on often, and each hand would have room for it.
    fn new(tcp: TcpStream, finished: handshake::Finished, far: Side) -> Box<Self> {
        let tcp = Arc::new(tcp);
        let sender = match far {
            Side::Client => Sender::Client,
            Side::Server => Sender::Server,
        };
        let source = TunnelSource::new(tcp.clone(), far, finished.opener, Decoder::new(sender), finished.rest);
        let sink = TunnelSink::new(tcp.clone(), far, finished.sealer);
        let until = finished.peer.not_after();
        let leg = Leg { tcp, side: far, source, sink };
        Box::new(Self { peer: finished.peer, leg, made: Instant::now(), until, own: None })
    }

    /// This side made the connection, and its own certificate is valid until then.
    pub(crate) fn own(&mut self, own: OwnLeg, until: UnixTime) {
        self.own = Some(own);
        if until.as_secs() < self.until.as_secs() {
            self.until = until;
        }
    }

    /// The number of the lease that is open, or was last.
    pub(crate) fn lease(&self) -> u64 {
        self.leg.sink.lease
    }

    /// Asks for the lease that is next, with the next thing that is written; the answer is to be waited for
    /// ([`Self::answer`]).
    pub(crate) fn ask(&mut self, claim: Claim) {
        self.leg.sink.queue(&Control::Open { lease: self.lease(), claim });
    }

    /// Waits until everything is on its way.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn flush(&mut self) -> Result<(), EndedEarly> {
        self.leg.sink.flush().await
    }

    /// Sends payload behind `Open`, before the answer is there.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn send_ahead(&mut self, payload: &[u8]) -> Result<(), EndedEarly> {
        crate::batch::with(|batch| {
            batch.put_clear(payload);
            self.leg.sink.take(batch)
        })?;
        self.leg.sink.flush().await
    }

    /// Waits for the server's answer. Nothing is lost when the wait is given up.
    ///
    /// # Errors
    /// Its refusal; or there is none, since the connection is gone.
    pub(crate) async fn answer(&mut self) -> Result<(), EndedEarly> {
        loop {
            return match self.leg.source.control().await? {
                Control::Opened { .. } => Ok(()),
                Control::Refused { reason, .. } => Err(EndedEarly::RefusedByPeer(reason)),
                Control::Reset { .. } => Err(EndedEarly::Reset(self.leg.side)),
                // It crossed our `Open`, which is refused next.
                Control::Drain { .. } => continue,
                _ => Err(Violation::OutOfOrder.into()),
            };
        }
    }

    /// Waits for the `Open` of the lease that is next.
    ///
    /// # Errors
    /// It does not come in time, or something else does.
    pub(crate) async fn receive_open(&mut self) -> Result<Claim, EndedEarly> {
        timeout(OPEN, self.next_open()).await.map_err(|_| EndedEarly::OpenTimeout)?
    }

    /// The same, for as long as it takes.
    ///
    /// # Errors
    /// The client hangs up, or something else comes.
    pub(crate) async fn next_open(&mut self) -> Result<Claim, EndedEarly> {
        match self.leg.source.control().await? {
            Control::Open { claim, .. } => Ok(claim),
            _ => Err(Violation::OutOfOrder.into()),
        }
    }

    /// Grants the lease. Where data came with the `Open` the answer may wait a little, for the application's to go with.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn grant(&mut self) -> Result<(), EndedEarly> {
        let opened = Control::Opened { lease: self.lease() };
        self.leg.sink.queue(&opened);
        if self.leg.source.has_more() { Ok(()) } else { self.leg.sink.flush().await }
    }

    /// Refuses the lease and ends in order, so that the client learns why.
    pub(crate) async fn refuse(mut self, reason: Reason) {
        let refused = Control::Refused { lease: self.lease(), reason };
        let _ = self.say_farewell(&refused).await;
    }

    /// The server's side says that it has nothing left of a lease that ended in order both ways, and is ready for the next.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn close_lease(&mut self) -> Result<(), EndedEarly> {
        let closed = Control::Closed { lease: self.lease() };
        self.leg.sink.queue(&closed);
        self.leg.sink.lease += 1;
        // A client that does not read any more gets no second lease of our memory.
        timeout(FAREWELL, self.leg.sink.flush()).await.map_err(|_| EndedEarly::OpenTimeout)?
    }

    /// The client's side waits until the server has said so.
    ///
    /// # Errors
    /// It does not; then nothing may follow in this tunnel.
    pub(crate) async fn await_closed(&mut self) -> Result<(), EndedEarly> {
        match timeout(FAREWELL, self.leg.source.control()).await {
            Ok(Ok(Control::Closed { .. })) => {
                self.leg.sink.lease += 1;
                Ok(())
            }
            Ok(Ok(_)) => Err(Violation::OutOfOrder.into()),
            Ok(Err(early)) => Err(early),
            Err(_) => Err(EndedEarly::OpenTimeout),
        }
    }

    /// The server's side asks the client to take its next connection elsewhere, and waits until it has hung up. A lease that
    /// it asks for meanwhile is refused as `draining`: nothing of it was delivered.
    pub(crate) async fn drain(mut self) {
        let drain = Control::Drain { lease: self.lease() };
        self.leg.sink.queue(&drain);
        if self.leg.sink.flush().await.is_err() {
            return;
        }
        if let (Ok(Ok(_)), Some(draining)) = (timeout(FAREWELL, self.next_open()).await, Reason::new(DRAINING)) {
            self.refuse(draining).await;
        }
    }

    /// Whether an idle tunnel has heard nothing: neither a word nor an end.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.leg.source.is_quiet()
    }

    /// Takes the tunnel to the event queue of the core that this is called on.
    ///
    /// # Errors
    /// There is no descriptor for it, or the kernel does not let it be watched.
    pub(crate) fn move_here(&mut self) -> std::io::Result<()> {
        let duplicate = self.leg.tcp.as_fd().try_clone_to_owned()?;
        let tcp = Arc::new(TcpStream::from_std(duplicate.into())?);
        self.leg.source.set_tcp(tcp.clone());
        self.leg.sink.set_tcp(tcp.clone());
        // With the last of them the old descriptor goes, and its place in the other core's queue.
        self.leg.tcp = tcp;
        Ok(())
    }

    /// Passes a reset on, as a frame where one fits, so that it cannot get lost, and as TCP's own where the peer does not
    /// read.
    pub(crate) async fn reset(mut self) {
        let reset = Control::Reset { lease: self.lease() };
        let last_word = async {
            self.leg.sink.queue(&reset);
            self.leg.sink.queue_close();
            self.leg.sink.flush().await
        };
        if timeout(LAST_WORD, last_word).await.is_ok_and(|said| said.is_ok()) {
            splice::orderly_close(&self.leg.tcp);
        }
    }

    /// Says the last thing that is to be said, hangs up, and waits for the other side to do the same.
    async fn say_farewell(&mut self, last: &Control) -> Result<(), EndedEarly> {
        splice::orderly_close(&self.leg.tcp);
        let hang_up = async {
            self.leg.sink.queue(last);
            self.leg.sink.queue_close();
            self.leg.sink.flush().await?;
            splice::hang_up(&self.leg.tcp, self.leg.side)
        };
        timeout(FAREWELL, hang_up).await.map_err(|_| EndedEarly::OpenTimeout)??;
        // To close with bytes unread would be a reset, and could overtake what was just said.
        let _ = timeout(FAREWELL, self.leg.source.rest()).await;
        Ok(())
    }
}

/// What a peer can do that has a valid certificate and keeps to no rule.
#[cfg(test)]
impl Tunnel {
    /// Sends a frame.
    pub(crate) async fn say(&mut self, control: &Control) -> Result<(), EndedEarly> {
        self.leg.sink.queue(control);
        self.flush().await
    }

    /// Sends a frame and payload behind it, in one write.
    pub(crate) async fn say_and_send(&mut self, control: &Control, payload: &[u8]) -> Result<(), EndedEarly> {
        self.leg.sink.queue(control);
        self.send_ahead(payload).await
    }

    /// Sends a record whose content is no frame.
    pub(crate) async fn say_raw(&mut self, content: &[u8]) -> Result<(), EndedEarly> {
        self.leg.sink.queue_content(content);
        self.flush().await
    }

    /// Waits for the next frame.
    pub(crate) async fn hear(&mut self) -> Result<Control, EndedEarly> {
        self.leg.source.control().await
    }

    /// Waits for payload.
    pub(crate) async fn hear_payload(&mut self) -> Result<Vec<u8>, EndedEarly> {
        use crate::splice::{Read, Source};
        loop {
            self.leg.source.ready().await?;
            let payload = crate::batch::with(|batch| {
                let read = self.leg.source.read(batch)?;
                let mut payload = Vec::new();
                batch.keep(&mut payload);
                Ok::<_, EndedEarly>((read == Read::Data).then_some(payload))
            })?;
            if let Some(payload) = payload {
                return Ok(payload);
            }
        }
    }

    /// Ends one direction.
    pub(crate) async fn fin(&mut self) -> Result<(), EndedEarly> {
        self.leg.sink.fin(false)?;
        self.flush().await
    }

    /// Makes a cut look like an end.
    pub(crate) async fn hang_up_without_fin(mut self) {
        splice::orderly_close(&self.leg.tcp);
        self.leg.sink.queue_close();
        let _ = self.flush().await;
    }
}
