//! The handshake over a socket, by rustls' unbuffered interface: it sees exactly the records of the handshake, so that what
//! follows is left for [`wire::records`].

use std::io;
use std::sync::Arc;

use identity::tls::{JUSTMTLS_1, refusal, unnamed};
use identity::{Refusal, VerifiedPeer};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error as TlsError, ServerConfig};
use tokio::net::TcpStream;
use wire::records::{self, BEFORE, Opener, Sealer};

use crate::reasons::EndedEarly;
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
pub(super) async fn client(tcp: &TcpStream, config: Arc<ClientConfig>) -> Result<Finished, EndedEarly> {
    let connection = UnbufferedClientConnection::new(config, unnamed()).map_err(|error| failed(&error))?;
    finish(connection, tcp, Vec::new()).await
}

/// Handshakes as the side that was connected to; `first` is what came already.
pub(super) async fn server(tcp: &TcpStream, config: Arc<ServerConfig>, first: Vec<u8>) -> Result<Finished, EndedEarly> {
    let connection = UnbufferedServerConnection::new(config).map_err(|error| failed(&error))?;
    finish(connection, tcp, first).await
}

/// What the two kinds of rustls' connection have in common.
trait Connection: Sized {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn records(self) -> Result<(Sealer, Opener), records::RecordError>;
}

impl Connection for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn records(self) -> Result<(Sealer, Opener), records::RecordError> {
        records::of_client(self)
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

    fn records(self) -> Result<(Sealer, Opener), records::RecordError> {
        records::of_server(self)
    }
}

async fn finish<C: Connection>(mut connection: C, tcp: &TcpStream, mut came: Vec<u8>) -> Result<Finished, EndedEarly> {
    if let Err(early) = shake_hands(&mut connection, tcp, &mut came).await {
        if matches!(early, EndedEarly::Handshake(_)) {
            say_why(&mut connection, tcp, &mut came);
        }
        return Err(early);
    }
    let refused = |refusal: Refusal| {
        splice::orderly_close(tcp);
        EndedEarly::Handshake(refusal)
    };
    let peer = VerifiedPeer::from_handshake(connection.common(), JUSTMTLS_1).map_err(refused)?;
    let (sealer, opener) = connection.records().map_err(|error| refused(error.refusal()))?;
    Ok(Finished { peer, sealer, opener, rest: came })
}

/// Says and hears what is needed until both sides are proven. What came and is not of the handshake is left in `came`.
async fn shake_hands<C: Connection>(connection: &mut C, tcp: &TcpStream, came: &mut Vec<u8>) -> Result<(), EndedEarly> {
    let mut outgoing = Vec::new();
    // Up to here rustls may look: one record further each time that it has no use for what it has.
    let mut shown = 0;
    loop {
        let UnbufferedStatus { discard, state } = connection.process(&mut came[..shown]);
        let mut is_blocked = false;
        match state.map_err(|error| failed(&error))? {
            ConnectionState::EncodeTlsData(mut data) => {
                encode(&mut data, &mut outgoing).map_err(|_| EndedEarly::System("encode"))?;
            }
            ConnectionState::TransmitTlsData(data) => {
                write_all(tcp, &outgoing).await?;
                outgoing.clear();
                data.done();
            }
            // A server may send before the client has proven itself; we do not.
            ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => is_blocked = true,
            ConnectionState::PeerClosed | ConnectionState::Closed => return Err(EndedEarly::HandshakeCut),
            _ => return Err(failed(&TlsError::HandshakeNotComplete)),
        }
        came.drain(..discard);
        shown -= discard;
        if is_blocked {
            if !connection.common().is_handshaking() {
                return Ok(());
            }
            shown = next_record(tcp, came, shown).await?;
        }
    }
}

/// Waits until a whole record lies behind the first `shown` bytes, and returns where it ends.
async fn next_record(tcp: &TcpStream, came: &mut Vec<u8>, shown: usize) -> Result<usize, EndedEarly> {
    loop {
        if let Some(&[_, _, _, high, low]) = came[shown..].first_chunk::<BEFORE>() {
            let end = shown + BEFORE + usize::from(u16::from_be_bytes([high, low]));
            if end <= came.len() {
                return Ok(end);
            }
        }
        if came.len() >= MOST {
            return Err(EndedEarly::Handshake(Refusal::Protocol("a handshake without an end".into())));
        }
        tcp.readable().await.map_err(|_| EndedEarly::HandshakeCut)?;
        let mut buffer = [0; 4096];
        match tcp.try_read(&mut buffer) {
            Ok(0) => return Err(EndedEarly::HandshakeCut),
            Ok(length) => came.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err(EndedEarly::HandshakeCut),
        }
    }
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
fn say_why<C: Connection>(connection: &mut C, tcp: &TcpStream, came: &mut [u8]) {
    let mut outgoing = Vec::new();
    // Only what waits to be sent: to have it look at the other side's messages once more would be a mistake.
    while connection.common().wants_write() {
        match connection.process(came).state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                if encode(&mut data, &mut outgoing).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    // A peer whose window is full learns it from the end of the connection.
    let _ = tcp.try_write(&outgoing);
    splice::orderly_close(tcp);
}

fn failed(error: &TlsError) -> EndedEarly {
    EndedEarly::Handshake(refusal(error))
}
