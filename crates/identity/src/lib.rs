//! Who is it: SPIFFE identities, their certificates, and the handshakes that prove them.
//!
//! An identity is `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. A root signs an intermediate, the
//! intermediate signs a workload's certificate, and two workloads prove themselves to each other in a TLS 1.3
//! handshake. This crate holds every decision on that way, as functions over values.
//!
//! Invariants, as absences:
//!
//! - There is no clock here: each function that asks "is it valid?" takes the time as an argument, and the TLS
//!   configurations take a time provider.
//! - There is no socket, file, task, protobuf or Kubernetes here.
//! - There is no TLS but 1.3, no session ticket, no resumption, no early data, and no server name on the wire.
//! - There is no [`VerifiedPeer`] without a finished handshake, and no [`Svid`] whose key, chain, identity and time do
//!   not fit together.
//! - There is no way to read a private key out, but for the intermediate's, which its owner has to keep, and for what a
//!   process leaves to its successor ([`estate`]).
//! - There is no refusal without a name: [`VerifyError::as_str`] and [`Refusal::as_str`] are the words of logs and
//!   metrics.
//! - Nothing that a certificate request says is believed, but for the key that signed it.
//!
//! Modules in reading order.

#![forbid(unsafe_code)]

pub mod spiffe;

mod pem;

pub mod validity;

mod certificate;

pub mod bundle;

pub mod chain;

pub mod verify;

pub mod refusal;

pub mod peer;

pub mod tls;

pub mod key;

pub mod csr;

pub mod issuer;

pub mod svid;

pub mod estate;

pub mod lifecycle;

pub use bundle::TrustBundle;
pub use chain::Chain;
pub use key::PrivateKey;
pub use peer::{Handshake, VerifiedPeer};
pub use refusal::Refusal;
pub use rustls_pki_types::UnixTime;
pub use spiffe::{SpiffeId, TrustDomain};
pub use svid::Svid;
pub use validity::Validity;
pub use verify::VerifyError;
