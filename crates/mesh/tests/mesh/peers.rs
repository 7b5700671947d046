//! Peers that proved who they are, in a real handshake in memory: there is no other way to make one.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Intermediate, Root, WorkloadToCertify};
use identity::tls::{self, JUSTMTLS_1};
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle, UnixTime, VerifiedPeer};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConnection, Connection, ServerConnection};

const DAY: Duration = Duration::from_secs(86_400);

#[derive(Debug)]
struct Standing;

impl TimeProvider for Standing {
    fn current_time(&self) -> Option<UnixTime> {
        Some(now())
    }
}

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000))
}

struct Authority {
    bundle: TrustBundle,
    intermediate: Intermediate,
}

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let root = Root::generate(&"cluster.local".parse().unwrap(), now(), 30 * DAY).unwrap();
    Authority { bundle: root.bundle().unwrap(), intermediate: root.issue_intermediate(now(), 10 * DAY).unwrap() }
});

fn svid(id: &SpiffeId) -> Svid {
    let key = PrivateKey::generate().unwrap();
    let request = CertificateRequest::new(&key).unwrap();
    let public = PublicKeyOfRequest::from_pem(request.as_pem()).unwrap();
    let workload = WorkloadToCertify::assertion(id.clone());
    let chain = AUTHORITY.intermediate.sign(&workload, &public, now(), DAY).unwrap();
    Svid::assemble(key, chain, &AUTHORITY.bundle, id, now()).unwrap()
}

/// The client `id`, as a server sees it.
pub(crate) fn peer(id: &SpiffeId) -> VerifiedPeer {
    let server_id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/server".parse().unwrap();
    let time = Arc::new(Standing);
    let client = tls::client_config(&svid(id), &AUTHORITY.bundle, &server_id, time.clone());
    let server = tls::server_config(&svid(&server_id), &AUTHORITY.bundle, time);
    let mut client = Connection::from(ClientConnection::new(client, tls::unnamed()).unwrap());
    let mut server = Connection::from(ServerConnection::new(server).unwrap());
    while client.is_handshaking() || server.is_handshaking() {
        transfer(&mut client, &mut server);
        transfer(&mut server, &mut client);
    }
    VerifiedPeer::from_handshake(&server, JUSTMTLS_1).unwrap()
}

fn transfer(from: &mut Connection, to: &mut Connection) {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets().unwrap();
    }
}
