//! The cluster's API server: who takes its word.

use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use identity::tls::{HTTP_1_1, api_client_config};
use rcgen::SanType;
use rustls::{ClientConnection, ServerConnection};
use rustls_pki_types::ServerName;

use crate::authority::{Authority, authority, workload};
use crate::mesh::{NOW, clock};
use crate::strangers;

fn pem(authority: &Authority) -> String {
    let body = STANDARD.encode(authority.certificate());
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

/// A client that knows `roots` calls a server of `signer` that is at 10.96.0.1, and calls it by `name`.
fn believes(roots: &Authority, signer: &Authority, name: &str) -> bool {
    let mut parameters = workload(&[]);
    parameters.subject_alt_names = vec![SanType::IpAddress([10, 96, 0, 1].into())];
    let server = strangers::server(signer.sign(&parameters), &[HTTP_1_1]);
    let client = api_client_config(&pem(roots), clock(NOW)).unwrap();
    let name: IpAddr = name.parse().unwrap();
    let mut client = ClientConnection::new(client, ServerName::IpAddress(name.into())).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..4 {
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        while client.wants_write() {
            client.write_tls(&mut to_server).unwrap();
        }
        let mut rest = to_server.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            if server.process_new_packets().is_err() {
                // This one wants a certificate of its caller, and says so when that has believed it already.
                return !client.is_handshaking();
            }
        }
        while server.wants_write() {
            server.write_tls(&mut to_client).unwrap();
        }
        let mut rest = to_client.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            if client.process_new_packets().is_err() {
                return false;
            }
        }
    }
    assert!(!client.is_handshaking(), "it neither ended nor failed");
    true
}

#[test]
fn an_api_server_is_believed_under_its_own_roots_and_by_its_own_name_alone() {
    let (cluster, other) = (Authority::root(authority("cluster")), Authority::root(authority("other")));
    assert!(believes(&cluster, &cluster, "10.96.0.1"));
    assert!(!believes(&other, &cluster, "10.96.0.1"), "other roots");
    assert!(!believes(&cluster, &cluster, "10.96.0.2"), "another name");
}

#[test]
fn roots_that_are_none_are_said_to_be() {
    for text in ["", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        assert!(api_client_config(text, clock(NOW)).is_err(), "{text:?}");
    }
}
