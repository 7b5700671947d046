//! TLS 1.3 records (RFC 8446, section 5) of a connection whose handshake rustls has done: sealed and opened where they
//! lie, so that a byte is copied by the kernel and by nobody else.
//!
//! rustls proves who the other side is and negotiates the keys; their successors are derived from its secrets by its own HKDF
//! ([`Secrets`]). What is here is the one loop that every payload byte runs through. It keeps what rustls would: no key seals more than its limit, a nonce is never used
//! twice, whatever is not application data, a key update or a `close_notify` ends the connection, and records that carry
//! nothing are counted.

mod aead;
mod ciphers;
mod secrets;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use identity::Refusal;
use identity::tls::refusal;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::{AlertDescription, Error as TlsError, ExtractedSecrets, SupportedCipherSuite};

use self::aead::{Key, Material};
pub use self::secrets::Secrets;
use self::secrets::Successor;

/// Bytes in front of a record's content: type, version, length (RFC 8446, section 5.1).
pub const BEFORE: usize = 5;

/// Bytes behind a record's content: its true type, and the tag (sections 5.2 and 5.3).
pub const AFTER: usize = 1 + TAG;

/// The most content of one record (section 5.1).
pub const MAX_CONTENT: usize = 1 << 14;

/// The most bytes of one record, as another implementation may pad it (section 5.2).
pub const MAX_RECORD: usize = BEFORE + MAX_CONTENT + 256;

/// Bytes of a tag: the same for all suites of TLS 1.3 that we speak.
const TAG: usize = 16;

/// A key seals at most so many records before its successor takes over: half of the limit for AES-GCM (section 5.5).
const RENEW_AFTER: u64 = 1 << 23;

/// Records without payload in a row. Each costs work and carries nothing; rustls stops at as many.
const MOST_EMPTY: u8 = 32;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// A handshake message of type `key_update` with one byte (section 4.6.3).
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// Why a record ends its connection.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not application data on the outside, as every record after the handshake is.
    #[error("a record that is not encrypted")]
    NotEncrypted,
    /// It is longer than a record may be, or shorter than one can be.
    #[error("a record of {0} bytes")]
    Length(usize),
    /// It was not sealed by the other side, or not in this place.
    #[error("a record whose seal is broken")]
    Seal,
    /// The other side says why it ends the connection.
    #[error("the peer sent an alert: {0:?}")]
    Alert(AlertDescription),
    /// What is inside may not come after the handshake.
    #[error("a message that may not come after the handshake")]
    Unexpected,
    /// Records without payload, one after the other.
    #[error("too many records that carry nothing")]
    TooManyEmpty,
    /// The handshake has not left keys.
    #[error("no keys: {0}")]
    Keys(TlsError),
}

impl RecordError {
    /// The name under which it ends a connection.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Alert(alert) => refusal(&TlsError::AlertReceived(*alert)),
            Self::Keys(error) => Refusal::Internal(error.to_string()),
            _ => Refusal::Protocol(self.to_string()),
        }
    }
}

/// Both directions of a connection whose handshake is over, and has left its secrets in `secrets`.
///
/// # Errors
/// The handshake is not over, or bytes are left in it that should have been sent.
pub fn of_client(connection: UnbufferedClientConnection, secrets: &Secrets) -> Result<(Sealer, Opener), RecordError> {
    let (client, server) = successors(connection.negotiated_cipher_suite(), secrets)?;
    let (keys, _) = connection.dangerous_into_kernel_connection().map_err(RecordError::Keys)?;
    Ok(both(keys, client, server))
}

/// The same for the side that was connected to.
///
/// # Errors
/// The handshake is not over, or bytes are left in it that should have been sent.
pub fn of_server(connection: UnbufferedServerConnection, secrets: &Secrets) -> Result<(Sealer, Opener), RecordError> {
    let (client, server) = successors(connection.negotiated_cipher_suite(), secrets)?;
    let (keys, _) = connection.dangerous_into_kernel_connection().map_err(RecordError::Keys)?;
    Ok(both(keys, server, client))
}

/// What the keys that come after the first are derived from: the client's, and the server's.
fn successors(suite: Option<SupportedCipherSuite>, secrets: &Secrets) -> Result<(Successor, Successor), RecordError> {
    suite.and_then(|suite| secrets.successors(suite)).ok_or(RecordError::Keys(TlsError::HandshakeNotComplete))
}

fn both(keys: ExtractedSecrets, ours: Successor, theirs: Successor) -> (Sealer, Opener) {
    let key = |(sequence, secrets)| Key::new(sequence, Material::from(&secrets));
    let is_update_requested = Arc::<AtomicBool>::default();
    (
        Sealer { key: key(keys.tx), next: ours, is_update_requested: is_update_requested.clone() },
        Opener { key: key(keys.rx), next: theirs, is_update_requested, empty: 0 },
    )
}

/// Seals what we send.
#[derive(Debug)]
pub struct Sealer {
    key: Key,
    next: Successor,
    /// The other side has asked for a key update and has not got it yet.
    is_update_requested: Arc<AtomicBool>,
}

impl Sealer {
    /// Makes a record of application data out of `record`, whose content lies behind the first [`BEFORE`] bytes and in front
    /// of the last [`AFTER`].
    ///
    /// # Panics
    /// Where the content is empty or longer than [`MAX_CONTENT`]: a mistake of the caller, which must not reach the wire.
    pub fn seal(&mut self, record: &mut [u8]) {
        self.key.seal(APPLICATION_DATA, record);
    }

    /// A key update to be sent before anything else, where one is due: the other side asked for it, or the key has sealed
    /// as much as it should. The next record is sealed by the next key.
    pub fn key_update(&mut self) -> Option<Vec<u8>> {
        // A plain look first: this runs for every write.
        let is_requested =
            self.is_update_requested.load(Ordering::Relaxed) && self.is_update_requested.swap(false, Ordering::Relaxed);
        if !is_requested && self.key.used() < RENEW_AFTER {
            return None;
        }
        let [kind, high, middle, low] = KEY_UPDATE;
        // `update_not_requested`: the other side counts its own records.
        let record = self.message(HANDSHAKE, &[kind, high, middle, low, 0]);
        self.key = self.next.of(&self.key);
        Some(record)
    }

    /// The record that says that nothing follows (section 6.1).
    pub fn close_notify(&mut self) -> Vec<u8> {
        const WARNING: u8 = 1;
        self.message(ALERT, &[WARNING, AlertDescription::CloseNotify.into()])
    }

    fn message(&mut self, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut record = vec![0; BEFORE + content.len() + AFTER];
        record[BEFORE..BEFORE + content.len()].copy_from_slice(content);
        self.key.seal(kind, &mut record);
        record
    }
}

/// What a record turned out to be.
#[derive(PartialEq, Eq, Debug)]
pub enum Opened {
    /// Payload, where it lies in the record. Never empty.
    Data(Range<usize>),
    /// Nothing for the owner of the connection.
    Nothing,
    /// The other side says that nothing follows.
    Closed,
}

/// Opens what the other side sends.
#[derive(Debug)]
pub struct Opener {
    key: Key,
    next: Successor,
    is_update_requested: Arc<AtomicBool>,
    empty: u8,
}

/// The length of the record that `bytes` begin with; `None` while its header is not whole.
///
/// # Errors
/// No record that may come begins so.
pub fn length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, _, _, high, low]) = bytes.first_chunk::<BEFORE>() else { return Ok(None) };
    if kind != APPLICATION_DATA {
        return Err(RecordError::NotEncrypted);
    }
    let length = BEFORE + usize::from(u16::from_be_bytes([high, low]));
    // The least is a record whose content is its type alone.
    if (BEFORE + AFTER..=MAX_RECORD).contains(&length) { Ok(Some(length)) } else { Err(RecordError::Length(length)) }
}

impl Opener {
    /// Opens one whole record, whose end [`length`] has found.
    ///
    /// # Errors
    /// The connection ends with it: no record that follows can be opened.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        let inner = self.key.open(record).ok_or(RecordError::Seal)?;
        // Padding is zeroes behind the type (section 5.4).
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Unexpected)?;
        let (content, kind) = (&inner[..end], inner[end]);
        if content.len() > MAX_CONTENT {
            return Err(RecordError::Length(content.len()));
        }
        match (kind, content) {
            (APPLICATION_DATA, [_, ..]) => {
                self.empty = 0;
                return Ok(Opened::Data(BEFORE..BEFORE + end));
            }
            (APPLICATION_DATA, []) => {}
            (ALERT, [_, description]) => {
                return match AlertDescription::from(*description) {
                    AlertDescription::CloseNotify => Ok(Opened::Closed),
                    alert => Err(RecordError::Alert(alert)),
                };
            }
            (HANDSHAKE, [message @ .., request @ (0 | 1)]) if *message == KEY_UPDATE => {
                if *request == 1 {
                    self.is_update_requested.store(true, Ordering::Relaxed);
                }
                self.key = self.next.of(&self.key);
            }
            _ => return Err(RecordError::Unexpected),
        }
        self.empty += 1;
        if self.empty > MOST_EMPTY { Err(RecordError::TooManyEmpty) } else { Ok(Opened::Nothing) }
    }
}

#[cfg(test)]
mod tests;
