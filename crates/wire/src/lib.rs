//! HOW IT IS SAID: every message between processes, and its translation from and to the nouns of [`mesh`].
//!
//! Invariants, stated as absences:
//! - no other crate knows protobuf or a frame's layout;
//! - no private key is in any message;
//! - nothing is allocated on the sender's word: lengths are checked against bounds first;
//! - a message that does not parse affects only itself.

#![forbid(unsafe_code)]

/// The generated types, as they stand on the wire. Only this crate and its tests take them apart.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod proto {
    pub mod envoy {
        tonic::include_proto!("envoy.service.discovery.v3");
    }
    pub mod istio {
        pub mod workload {
            tonic::include_proto!("istio.workload");
        }
        pub mod security {
            tonic::include_proto!("istio.security");
        }
        pub mod ca {
            tonic::include_proto!("istio.v1.auth");
        }
    }
    pub mod runtime {
        pub mod v1 {
            tonic::include_proto!("runtime.v1");
        }
    }
    pub mod v1 {
        tonic::include_proto!("justmtls.v1");
    }
}

pub mod records;

pub mod tunnel;

pub mod hello;

pub mod probe;

pub mod discovery;

pub mod pods;

pub mod report;

pub mod cri;

pub mod bounded;

pub mod client;

pub mod server;

pub mod dice;

#[doc(hidden)]
pub mod hostile;

/// The metadata of a certificate request that names the identity asked for, as Istio's.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The address in a `bytes` field: 4 or 16 of them.
fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

/// The `bytes` field of an address.
fn octets(address: std::net::IpAddr) -> Vec<u8> {
    match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    }
}
