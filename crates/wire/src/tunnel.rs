//! Frames of `justmtls/1`, inside TLS: type (1 byte), length (3 bytes, big endian), payload.
//!
//! | type | frame | payload | who sends it |
//! |---|---|---|---|
//! | 1 | `Open` | lease, protobuf `justmtls.v1.Open` | client |
//! | 2 | `Opened` | lease | server |
//! | 3 | `Refused` | lease, reason in kebab-case | server |
//! | 4 | `Data` | 1 to [`MAX_DATA`] bytes | both |
//! | 5 | `Fin` | lease | both |
//! | 6 | `Reset` | lease | both |
//! | 7 | `Closed` | lease | server |
//! | 8 | `Drain` | lease that would be next | server |
//!
//! A lease is one connection of an application; its number (8 bytes, big endian) stands first in every control frame,
//! so that what is late for one lease can never hit the next (T19). The first lease of a TLS connection is 1 and each
//! next one is one higher. [`Decoder`] takes the bytes apart as they come and holds none of an application's.

mod decoder;
mod sequence;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use prost::Message;

use crate::proto::v1;

pub use decoder::{Decoder, Piece};
pub use sequence::{FrameKind, Sender, Sequence};

/// The name of the protocol in TLS (RFC 7301).
pub const ALPN: &[u8] = identity::tls::JUSTMTLS_1;

/// Bytes of a frame's header.
pub const HEADER: usize = 4;

/// The most bytes in one `Data` frame: with its header it fills one TLS record (RFC 8446, section 5.1: 2^14 bytes).
/// A larger frame would make the receiver wait for a second record before it has the first one's bytes.
pub const MAX_DATA: usize = 16_384 - HEADER;

/// The most bytes in the payload of a control frame.
pub const MAX_CONTROL: usize = 1024;

/// Room for any control frame.
pub const MAX_CONTROL_FRAME: usize = HEADER + MAX_CONTROL;

/// The longest reason in a `Refused`, in bytes.
pub const MAX_REASON: usize = 64;

/// The longest name of a Service in an `Open`, in bytes.
pub const MAX_SERVICE: usize = 512;

/// The number of the first lease of a TLS connection.
pub const FIRST_LEASE: u64 = 1;

const LEASE: usize = 8;

/// A frame that is not `Data`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Control {
    /// Asks for a connection to the application.
    Open {
        /// The lease that begins.
        lease: u64,
        /// What the client says about the connection.
        claim: Claim,
    },
    /// The application accepted the connection.
    Opened {
        /// The lease that was asked for.
        lease: u64,
    },
    /// The connection is refused; nothing of it was delivered.
    Refused {
        /// The lease that was asked for.
        lease: u64,
        /// Why.
        reason: Reason,
    },
    /// The sender's direction ended cleanly (half-close).
    Fin {
        /// The lease.
        lease: u64,
    },
    /// Both directions ended, not cleanly.
    Reset {
        /// The lease.
        lease: u64,
    },
    /// The server has nothing left of a lease that ended cleanly both ways: the next one may begin.
    Closed {
        /// The lease.
        lease: u64,
    },
    /// The server will grant no further lease: the client is to hang up. A lease that is asked for meanwhile is refused, and
    /// nothing of it is delivered.
    Drain {
        /// The lease that would have been next.
        lease: u64,
    },
}

/// What an `Open` says. All of it is a claim: the receiver compares it with what its own socket shows (T1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The address that the TCP connection comes from.
    pub source: IpAddr,
    /// What the TCP connection was made to, as the client dialled it.
    pub destination: SocketAddr,
    /// `namespace/hostname` of the Service that was dialled. For logs alone. At most [`MAX_SERVICE`] printable ASCII
    /// characters; a longer one is left out when it is sent.
    pub service: Option<String>,
}

/// The reason of a refusal: 1 to [`MAX_REASON`] characters of `a-z`, `0-9` and `-`. It is a word for logs and metrics,
/// from a stranger: it decides nothing.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Reason(Box<str>);

impl Reason {
    /// The reason of that name; `None` where the text is not one.
    pub fn new(text: &str) -> Option<Self> {
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        ((1..=MAX_REASON).contains(&text.len()) && text.bytes().all(allowed)).then(|| Self(text.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<mesh::RefuseReason> for Reason {
    fn from(reason: mesh::RefuseReason) -> Self {
        Self(reason.as_str().into())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a peer broke the protocol. The connection ends; none of these can be repaired.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Violation {
    /// A frame of a type that `justmtls/1` does not have.
    #[error("a frame of unknown type")]
    UnknownFrame,
    /// A frame longer than its kind may be.
    #[error("a frame longer than its kind may be")]
    FrameTooLong,
    /// A control frame shorter than its kind must be.
    #[error("a control frame that is too short")]
    FrameTooShort,
    /// A `Data` frame without data: it would cost work and carry nothing.
    #[error("a data frame without data")]
    EmptyData,
    /// An `Open` whose claim does not parse.
    #[error("an Open that does not parse")]
    BadOpen,
    /// A `Refused` whose reason is not a word.
    #[error("a Refused whose reason is not one word of a-z, 0-9 and -")]
    BadReason,
    /// A control frame for another lease than the one it can be about.
    #[error("a frame for another lease")]
    WrongLease,
    /// A frame that cannot follow the one before it.
    #[error("a frame out of order")]
    OutOfOrder,
}

impl Violation {
    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownFrame => "unknown-frame",
            Self::FrameTooLong => "frame-too-long",
            Self::FrameTooShort => "frame-too-short",
            Self::EmptyData => "empty-data",
            Self::BadOpen => "bad-open",
            Self::BadReason => "bad-reason",
            Self::WrongLease => "wrong-lease",
            Self::OutOfOrder => "out-of-order",
        }
    }
}

/// The header of a `Data` frame. The data is written right behind it.
///
/// # Panics
/// Where `length` is not in 1..=[`MAX_DATA`]: a bug of the caller, which must not reach the wire.
pub fn header_for_data(length: usize) -> [u8; HEADER] {
    assert!((1..=MAX_DATA).contains(&length), "a data frame of {length} bytes");
    header(FrameKind::Data, length)
}

fn header(kind: FrameKind, length: usize) -> [u8; HEADER] {
    // The callers keep to MAX_DATA and MAX_CONTROL, so that the length fits its three bytes.
    let [.., high, middle, low] = (length as u32).to_be_bytes();
    [kind.code(), high, middle, low]
}

impl Control {
    /// The lease that the frame is about.
    pub fn lease(&self) -> u64 {
        match self {
            Self::Open { lease, .. }
            | Self::Opened { lease }
            | Self::Refused { lease, .. }
            | Self::Fin { lease }
            | Self::Reset { lease }
            | Self::Closed { lease }
            | Self::Drain { lease } => *lease,
        }
    }

    /// The kind of the frame.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Open { .. } => FrameKind::Open,
            Self::Opened { .. } => FrameKind::Opened,
            Self::Refused { .. } => FrameKind::Refused,
            Self::Fin { .. } => FrameKind::Fin,
            Self::Reset { .. } => FrameKind::Reset,
            Self::Closed { .. } => FrameKind::Closed,
            Self::Drain { .. } => FrameKind::Drain,
        }
    }

    /// Writes the frame into `buffer` and returns the part that it fills.
    pub fn encode<'b>(&self, buffer: &'b mut [u8; MAX_CONTROL_FRAME]) -> &'b [u8] {
        let body = &mut buffer[HEADER..];
        body[..LEASE].copy_from_slice(&self.lease().to_be_bytes());
        let rest = match self {
            Self::Open { claim, .. } => claim.encode(&mut body[LEASE..]),
            Self::Refused { reason, .. } => {
                body[LEASE..LEASE + reason.0.len()].copy_from_slice(reason.0.as_bytes());
                reason.0.len()
            }
            Self::Opened { .. } | Self::Fin { .. } | Self::Reset { .. } | Self::Closed { .. } | Self::Drain { .. } => 0,
        };
        let length = LEASE + rest;
        buffer[..HEADER].copy_from_slice(&header(self.kind(), length));
        &buffer[..HEADER + length]
    }

    /// The frame of a kind from its payload, both ends of whose length the decoder has checked already.
    fn decode(kind: FrameKind, payload: &[u8]) -> Result<Self, Violation> {
        let (lease, rest) = payload.split_first_chunk::<LEASE>().ok_or(Violation::FrameTooShort)?;
        let lease = u64::from_be_bytes(*lease);
        Ok(match kind {
            FrameKind::Open => Self::Open { lease, claim: Claim::decode(rest)? },
            FrameKind::Opened => Self::Opened { lease },
            FrameKind::Refused => {
                let reason = std::str::from_utf8(rest).ok().and_then(Reason::new).ok_or(Violation::BadReason)?;
                Self::Refused { lease, reason }
            }
            FrameKind::Fin => Self::Fin { lease },
            FrameKind::Reset => Self::Reset { lease },
            FrameKind::Closed => Self::Closed { lease },
            FrameKind::Drain => Self::Drain { lease },
            FrameKind::Data => return Err(Violation::UnknownFrame),
        })
    }
}

impl Claim {
    /// Writes the claim and returns its length. Two addresses, a port and [`MAX_SERVICE`] always fit.
    fn encode(&self, mut room: &mut [u8]) -> usize {
        let service = self.service.as_deref().filter(|service| is_service(service)).unwrap_or_default();
        let message = v1::Open {
            source: crate::octets(self.source),
            destination: crate::octets(self.destination.ip()),
            destination_port: self.destination.port().into(),
            service: service.to_owned(),
        };
        let length = message.encoded_len();
        // `encode` fails only where the room is too small, and MAX_SERVICE is chosen so that it never is.
        message.encode(&mut room).map_or(0, |()| length)
    }

    fn decode(bytes: &[u8]) -> Result<Self, Violation> {
        let message = v1::Open::decode(bytes).map_err(|_| Violation::BadOpen)?;
        let source = crate::address(&message.source).ok_or(Violation::BadOpen)?;
        let destination = crate::address(&message.destination).ok_or(Violation::BadOpen)?;
        let port = u16::try_from(message.destination_port).ok().filter(|port| *port != 0).ok_or(Violation::BadOpen)?;
        let service = Some(message.service).filter(|service| !service.is_empty());
        if service.as_deref().is_some_and(|service| !is_service(service)) {
            return Err(Violation::BadOpen);
        }
        Ok(Self { source, destination: SocketAddr::new(destination, port), service })
    }
}

/// A name goes into logs as it is: no control characters, nothing that a terminal would act on.
fn is_service(text: &str) -> bool {
    text.len() <= MAX_SERVICE && text.bytes().all(|byte| byte.is_ascii_graphic())
}
