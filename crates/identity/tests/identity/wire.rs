//! Handshakes in memory: two ends, and what each of them concludes.

use std::sync::Arc;

use identity::tls::{JUSTMTLS_1, refusal, unnamed};
use identity::{Refusal, VerifiedPeer};
use rustls::{ClientConfig, ClientConnection, ConnectionCommon, ServerConfig, ServerConnection};

/// What the two sides of one connection conclude about each other.
pub(crate) struct Outcome {
    pub(crate) client: Result<VerifiedPeer, Refusal>,
    pub(crate) server: Result<VerifiedPeer, Refusal>,
}

/// Lets two configurations shake hands, and takes the proofs for the protocol between workloads.
pub(crate) fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    shake_for(JUSTMTLS_1, client, server)
}

/// Lets two configurations shake hands, and takes the proofs for a protocol.
pub(crate) fn shake_for(protocol: &[u8], client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    let mut client = ClientConnection::new(client, unnamed()).expect("a client");
    let mut server = ServerConnection::new(server).expect("a server");
    let (mut client_error, mut server_error) = (None, None);
    loop {
        let to_server = carry(&mut client, &mut server, &mut server_error);
        let to_client = carry(&mut server, &mut client, &mut client_error);
        if to_server + to_client == 0 {
            break;
        }
    }
    Outcome { client: conclude(&client, client_error, protocol), server: conclude(&server, server_error, protocol) }
}

/// Carries what `from` has to say to `to`. An end that failed still says why (its alert), and listens no more.
fn carry<A, B>(from: &mut ConnectionCommon<A>, to: &mut ConnectionCommon<B>, error: &mut Option<Refusal>) -> usize {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).expect("memory takes all");
    }
    receive(to, &bytes, error);
    bytes.len()
}

fn receive<T>(end: &mut ConnectionCommon<T>, mut bytes: &[u8], error: &mut Option<Refusal>) {
    while !bytes.is_empty() && error.is_none() {
        end.read_tls(&mut bytes).expect("memory gives all");
        if let Err(found) = end.process_new_packets() {
            *error = Some(refusal(&found));
        }
    }
}

fn conclude<T>(end: &ConnectionCommon<T>, error: Option<Refusal>, protocol: &[u8]) -> Result<VerifiedPeer, Refusal> {
    match error {
        Some(refusal) => Err(refusal),
        None => VerifiedPeer::from_handshake(end, protocol),
    }
}

/// What a server concludes from bytes of somebody who is not rustls.
pub(crate) fn serve_bytes(server: Arc<ServerConfig>, bytes: &[u8]) -> Result<VerifiedPeer, Refusal> {
    let mut server = ServerConnection::new(server).expect("a server");
    let mut error = None;
    receive(&mut server, bytes, &mut error);
    conclude(&server, error, JUSTMTLS_1)
}

/// What a client concludes where bytes of somebody who is not rustls answer its hello.
pub(crate) fn answer_bytes(client: Arc<ClientConfig>, bytes: &[u8]) -> Result<VerifiedPeer, Refusal> {
    let mut client = ClientConnection::new(client, unnamed()).expect("a client");
    client.write_tls(&mut Vec::new()).expect("memory takes all");
    let mut error = None;
    receive(&mut client, bytes, &mut error);
    conclude(&client, error, JUSTMTLS_1)
}
