//! The handshake over a socket, by rustls' unbuffered interface: it sees exactly the records of the handshake, so that what
//! follows is left for [`wire::records`].
//!
//! What is read and written is the core's. What is worked out in between, from one wait for the other side to the next, is a
//! step of [`Shake`], which is done elsewhere ([`crate::offload`]).

use std::io;
use std::sync::Arc;

use identity::tls::{JUSTMTLS_1, refusal, unnamed};
use identity::{Refusal, VerifiedPeer};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error as TlsError, ServerConfig};
use tokio::net::TcpStream;
use wire::records::{self, BEFORE, Opener, Sealer, Secrets};

use crate::offload::Offload;
use crate::reasons::EndedEarly;
use crate::shares::Payer;
use crate::splice;

/// The most bytes of the other side's handshake. A chain of certificates as long as is allowed takes half of it.
const MOST: usize = 64 * 1024;

/// A finished handshake.
#[derive(Debug)]
pub(super) struct Finished {
    /// Who the other side is.
    pub(super) peer: VerifiedPeer,
    /// Seals what we send from now on.
    pub(super) sealer: Sealer,
    /// Opens what comes from now on.
    pub(super) opener: Opener,
    /// What came already and is not of the handshake.
    pub(super) rest: Vec<u8>,
}

/// Handshakes as the side that connected.
pub(super) async fn client(
    tcp: &TcpStream,
    config: Arc<ClientConfig>,
    pays: (&Offload, Payer),
) -> Result<Finished, EndedEarly> {
    let (config, secrets) = Secrets::of_client(&config);
    finish(|| UnbufferedClientConnection::new(config, unnamed()), &secrets, tcp, Vec::new(), pays).await
}

/// Handshakes as the side that was connected to; `first` is what came already.
pub(super) async fn server(
    tcp: &TcpStream,
    config: Arc<ServerConfig>,
    first: Vec<u8>,
    pays: (&Offload, Payer),
) -> Result<Finished, EndedEarly> {
    let (config, secrets) = Secrets::of_server(&config);
    finish(|| UnbufferedServerConnection::new(config), &secrets, tcp, first, pays).await
}

/// What the two kinds of rustls' connection have in common.
trait Connection: Send + Sized + 'static {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn records(self, secrets: &Secrets) -> Result<(Sealer, Opener), records::RecordError>;
}

impl Connection for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn records(self, secrets: &Secrets) -> Result<(Sealer, Opener), records::RecordError> {
        records::of_client(self, secrets)
    }
}

impl Connection for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn records(self, secrets: &Secrets) -> Result<(Sealer, Opener), records::RecordError> {
        records::of_server(self, secrets)
    }
}

/// A handshake under way, without its socket.
struct Shake<C> {
    connection: C,
    /// What came and rustls has no use for yet, or is not of the handshake.
    came: Vec<u8>,
    /// Up to here rustls may look: one record further each time that it has no use for what it has.
    shown: usize,
    /// What is to be sent.
    outgoing: Vec<u8>,
}

/// What a step has led to.
enum Step {
    /// What is to be sent must go; then more must come.
    Waits,
    /// Both sides are proven, once the rest is sent.
    Done,
}

impl<C: Connection> Shake<C> {
    /// Works out what can be with what came.
    fn step(mut self) -> (Self, Result<Step, EndedEarly>) {
        let step = self.work();
        (self, step)
    }

    fn work(&mut self) -> Result<Step, EndedEarly> {
        loop {
            let UnbufferedStatus { discard, state } = self.connection.process(&mut self.came[..self.shown]);
            let mut is_blocked = false;
            match state.map_err(|error| failed(&error))? {
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(&mut data, &mut self.outgoing).map_err(|_| EndedEarly::System("encode"))?;
                }
                // It goes before anything else is waited for.
                ConnectionState::TransmitTlsData(data) => data.done(),
                // A server may send before the client has proven itself; we do not.
                ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => is_blocked = true,
                ConnectionState::PeerClosed | ConnectionState::Closed => return Err(EndedEarly::HandshakeCut),
                _ => return Err(failed(&TlsError::HandshakeNotComplete)),
            }
            self.came.drain(..discard);
            self.shown -= discard;
            if is_blocked {
                if !self.connection.common().is_handshaking() {
                    return Ok(Step::Done);
                }
                if !self.show_next() {
                    return Ok(Step::Waits);
                }
            }
        }
    }

    /// Shows rustls the next record; `false` while it is not there as a whole.
    fn show_next(&mut self) -> bool {
        let Some(&[_, _, _, high, low]) = self.came[self.shown..].first_chunk::<BEFORE>() else { return false };
        let end = self.shown + BEFORE + usize::from(u16::from_be_bytes([high, low]));
        let is_whole = end <= self.came.len();
        if is_whole {
            self.shown = end;
        }
        is_whole
    }

    /// Reads until the next record is there.
    async fn read(&mut self, tcp: &TcpStream) -> Result<(), EndedEarly> {
        while !self.show_next() {
            if self.came.len() >= MOST {
                return Err(EndedEarly::Handshake(Refusal::Protocol("a handshake without an end".into())));
            }
            tcp.readable().await.map_err(|_| EndedEarly::HandshakeCut)?;
            let mut buffer = [0; 4096];
            match tcp.try_read(&mut buffer) {
                Ok(0) => return Err(EndedEarly::HandshakeCut),
                Ok(length) => self.came.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(EndedEarly::HandshakeCut),
            }
        }
        Ok(())
    }
}

/// Says and hears what is needed until both sides are proven, and says why where they are not.
async fn finish<C: Connection>(
    make: impl FnOnce() -> Result<C, TlsError> + Send + 'static,
    secrets: &Secrets,
    tcp: &TcpStream,
    came: Vec<u8>,
    (offload, payer): (&Offload, Payer),
) -> Result<Finished, EndedEarly> {
    let begin = move || {
        let connection = make().map_err(|error| failed(&error))?;
        Ok::<_, EndedEarly>(Shake { connection, came, shown: 0, outgoing: Vec::new() }.step())
    };
    let (mut shake, mut step) = offload.run(&payer, begin).await??;
    loop {
        let next = match step {
            Ok(step) => write_all(tcp, &std::mem::take(&mut shake.outgoing)).await.map(|()| step),
            Err(early) => Err(early),
        };
        let end = match next {
            Ok(Step::Done) => break,
            Ok(Step::Waits) => shake.read(tcp).await,
            Err(early) => Err(early),
        };
        if let Err(early) = end {
            if matches!(early, EndedEarly::Handshake(_)) {
                say_why(&mut shake, tcp);
            }
            return Err(early);
        }
        (shake, step) = offload.run(&payer, || shake.step()).await?;
    }
    let refused = |refusal: Refusal| {
        splice::orderly_close(tcp);
        EndedEarly::Handshake(refusal)
    };
    let peer = VerifiedPeer::from_handshake(shake.connection.common(), JUSTMTLS_1).map_err(refused)?;
    let (sealer, opener) = shake.connection.records(secrets).map_err(|error| refused(error.refusal()))?;
    Ok(Finished { peer, sealer, opener, rest: shake.came })
}

fn encode<D>(data: &mut rustls::unbuffered::EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = outgoing.len();
    let written = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            outgoing.resize(start + required_size, 0);
            data.encode(&mut outgoing[start..])?
        }
        result => result?,
    };
    outgoing.truncate(start + written);
    Ok(())
}

async fn write_all(tcp: &TcpStream, mut bytes: &[u8]) -> Result<(), EndedEarly> {
    while !bytes.is_empty() {
        match tcp.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tcp.writable().await.map_err(|_| EndedEarly::HandshakeCut)?;
            }
            Err(_) => return Err(EndedEarly::HandshakeCut),
        }
    }
    Ok(())
}

/// Sends the alert that says why, as far as the socket takes it, and lets it arrive: a reset would overtake it. No byte of
/// an application is in this connection.
fn say_why<C: Connection>(shake: &mut Shake<C>, tcp: &TcpStream) {
    // Only what waits to be sent: to have it look at the other side's messages once more would be a mistake.
    while shake.connection.common().wants_write() {
        match shake.connection.process(&mut shake.came).state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                if encode(&mut data, &mut shake.outgoing).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    // A peer whose window is full learns it from the end of the connection.
    let _ = tcp.try_write(&shake.outgoing);
    splice::orderly_close(tcp);
}

fn failed(error: &TlsError) -> EndedEarly {
    EndedEarly::Handshake(refusal(error))
}
