//! Against rustls itself as the other side: what we seal it opens, and what it seals we open.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Root, WorkloadToCertify};
use identity::tls::{client_config, server_config, unnamed};
use identity::{PrivateKey, SpiffeId, Svid, UnixTime};
use proptest::prelude::*;
use rustls::time_provider::TimeProvider;
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, KeyLog, ServerConfig, ServerConnection};

use super::aead::Algorithm;
use super::*;

#[derive(Debug)]
struct Now;

impl TimeProvider for Now {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000)))
    }
}

fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let (now, day) = (Now.current_time().unwrap(), Duration::from_secs(86_400));
    let root = Root::generate(&"a".parse().unwrap(), now, 30 * day).unwrap();
    let (bundle, intermediate) = (root.bundle().unwrap(), root.issue_intermediate(now, 10 * day).unwrap());
    let svid = |id: &SpiffeId| {
        let key = PrivateKey::generate().unwrap();
        let request = CertificateRequest::new(&key).unwrap();
        let public = PublicKeyOfRequest::from_pem(request.as_pem()).unwrap();
        let chain = intermediate.sign(&WorkloadToCertify::assertion(id.clone()), &public, now, day).unwrap();
        Svid::assemble(key, chain, &bundle, id, now).unwrap()
    };
    let (client, server) = ("spiffe://a/ns/b/sa/c".parse().unwrap(), "spiffe://a/ns/b/sa/s".parse().unwrap());
    let time = Arc::new(Now);
    (client_config(&svid(&client), &bundle, &server, time.clone()), server_config(&svid(&server), &bundle, time))
}

/// Our client's records, and rustls as the server.
struct Pair {
    sealer: Sealer,
    opener: Opener,
    peer: ServerConnection,
}

fn pair() -> Pair {
    let (client, server) = configs();
    let mut peer = ServerConnection::new(server).unwrap();
    let (client, secrets) = Secrets::of_client(&client);
    let mut connection = UnbufferedClientConnection::new(client, unnamed()).unwrap();
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    while connection.is_handshaking() || peer.is_handshaking() {
        let UnbufferedStatus { discard, state } = connection.process_tls_records(&mut incoming);
        match state.unwrap() {
            ConnectionState::EncodeTlsData(mut data) => {
                let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = data.encode(&mut [])
                else {
                    panic!("nothing to encode")
                };
                let start = outgoing.len();
                outgoing.resize(start + required_size, 0);
                data.encode(&mut outgoing[start..]).unwrap();
            }
            ConnectionState::TransmitTlsData(data) => {
                give(&mut peer, &outgoing);
                outgoing.clear();
                data.done();
            }
            ConnectionState::BlockedHandshake => {
                peer.write_tls(&mut incoming).unwrap();
                continue;
            }
            ConnectionState::WriteTraffic(_) => {}
            other => panic!("{other:?}"),
        }
        incoming.drain(..discard);
    }
    let (sealer, opener) = of_client(connection, &secrets).unwrap();
    Pair { sealer, opener, peer }
}

fn give(peer: &mut ServerConnection, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        peer.read_tls(&mut bytes).unwrap();
        peer.process_new_packets().unwrap();
    }
}

fn sealed(sealer: &mut Sealer, content: &[u8]) -> Vec<u8> {
    let mut record = vec![0; BEFORE + content.len() + AFTER];
    record[BEFORE..BEFORE + content.len()].copy_from_slice(content);
    sealer.seal(&mut record);
    record
}

impl Pair {
    /// What rustls has to send.
    fn sent_by_peer(&mut self) -> VecDeque<Vec<u8>> {
        let mut bytes = Vec::new();
        while self.peer.wants_write() {
            self.peer.write_tls(&mut bytes).unwrap();
        }
        let mut records = VecDeque::new();
        while let Some(length) = length(&bytes).unwrap() {
            records.push_back(bytes.drain(..length).collect());
        }
        assert!(bytes.is_empty());
        records
    }

    fn read_at_peer(&mut self, length: usize) -> Vec<u8> {
        let mut content = vec![0; length];
        self.peer.reader().read_exact(&mut content).unwrap();
        content
    }

    fn open_all(&mut self) -> Result<Vec<u8>, RecordError> {
        let mut all = Vec::new();
        for mut record in self.sent_by_peer() {
            if let Opened::Data(content) = self.opener.open(&mut record)? {
                all.extend_from_slice(&record[content]);
            }
        }
        Ok(all)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_one_side_seals_the_other_opens(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..2000), 1..8)) {
        let mut pair = pair();
        for part in &parts {
            let record = sealed(&mut pair.sealer, part);
            give(&mut pair.peer, &record);
            prop_assert_eq!(&pair.read_at_peer(part.len()), part);
            pair.peer.writer().write_all(part).unwrap();
            prop_assert_eq!(&pair.open_all().unwrap(), part);
        }
    }
}

#[test]
fn the_largest_record_passes_and_both_libraries_seal_alike() {
    let mut pair = pair();
    let content = vec![7; MAX_CONTENT];
    let record = sealed(&mut pair.sealer, &content);
    give(&mut pair.peer, &record);
    assert_eq!(pair.read_at_peer(MAX_CONTENT), content);

    let (key, iv) = ([1; 32].into(), [2; 12].into());
    let secrets = rustls::ConnectionTrafficSecrets::Aes256Gcm { key, iv };
    let seal = |ring| {
        let mut record = vec![3; BEFORE + 100 + AFTER];
        Key::with(5, (&secrets).into(), ring).seal(APPLICATION_DATA, &mut record);
        record
    };
    assert_eq!(seal(true), seal(false));
    assert!(Key::with(5, (&secrets).into(), true).open(&mut seal(false)).is_some());
    assert!(Key::with(5, (&secrets).into(), false).open(&mut seal(true)).is_some());
    assert!(Key::with(6, (&secrets).into(), false).open(&mut seal(true)).is_none(), "in another place");
}

#[test]
fn keys_are_updated_both_ways_when_the_peer_asks() {
    let mut pair = pair();
    for _ in 0..3 {
        // rustls asks for one of ours with it.
        pair.peer.refresh_traffic_keys().unwrap();
        pair.peer.writer().write_all(b"by the new key").unwrap();
        assert_eq!(pair.open_all().unwrap(), b"by the new key");
        let update = pair.sealer.key_update().expect("it was asked for");
        assert_eq!(pair.sealer.key_update(), None, "once");
        give(&mut pair.peer, &update);
        let record = sealed(&mut pair.sealer, b"and ours");
        give(&mut pair.peer, &record);
        assert_eq!(pair.read_at_peer(8), b"and ours");
    }
}

/// The second successors of secrets that count from 0, by another implementation of RFC 8446, section 7.2.
#[test]
fn keys_of_every_suite_follow_as_the_specification_says() {
    use rustls::crypto::aws_lc_rs::cipher_suite as suite;
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    };
    for (suite, algorithm, hash, key, iv) in [
        (
            suite::TLS13_AES_128_GCM_SHA256,
            Algorithm::Aes128Gcm,
            32,
            "f795fc0182a370f8af96a1d6dfba76ac",
            "2739edacb4dc79885391a769",
        ),
        (
            suite::TLS13_AES_256_GCM_SHA384,
            Algorithm::Aes256Gcm,
            48,
            "2d9c985947a6214bd2d1eef320171612b39ade8f7b8f0df6c09023ab183d172e",
            "fd5be82f2a1fe585114075cc",
        ),
        (
            suite::TLS13_CHACHA20_POLY1305_SHA256,
            Algorithm::Chacha20Poly1305,
            32,
            "a0bbbcfeba507420e29aff13ebeaeb194782449236bef1c04640793d86732721",
            "2739edacb4dc79885391a769",
        ),
    ] {
        let (key, iv): (_, [u8; 12]) = (bytes(key), bytes(iv).try_into().unwrap());
        let material = || {
            let mut material = Material::empty(algorithm);
            material.key_mut().copy_from_slice(&key);
            material.iv = iv;
            material
        };
        let secrets = Secrets::default();
        let secret: Vec<u8> = (0..hash).collect();
        secrets.log("CLIENT_TRAFFIC_SECRET_0", &[], &secret);
        assert!(secrets.successors(suite).is_none(), "the server's is not there");
        secrets.log("SERVER_TRAFFIC_SECRET_0", &[], &[7; 32]);
        let (mut client, _) = secrets.successors(suite).unwrap();
        let first = Key::with(0, Material::empty(algorithm), false);
        let second = client.of(&first);
        let mut third = client.of(&second);
        let mut record = vec![3; BEFORE + 100 + AFTER];
        Key::with(0, material(), false).seal(APPLICATION_DATA, &mut record);
        assert!(third.open(&mut record).is_some(), "{suite:?}");
    }
}

/// More connections than a core has places for ciphers, in turn, and on two threads.
#[test]
fn whose_cipher_is_gone_gets_it_again_and_nobody_gets_anothers() {
    let mut pairs: Vec<Pair> = (0..150).map(|_| pair()).collect();
    let mut talk = |text: &[u8]| {
        for pair in &mut pairs {
            let record = sealed(&mut pair.sealer, text);
            give(&mut pair.peer, &record);
            assert_eq!(pair.read_at_peer(text.len()), text);
            pair.peer.writer().write_all(text).unwrap();
            assert_eq!(pair.open_all().unwrap(), text);
        }
    };
    talk(b"here");
    std::thread::scope(|scope| scope.spawn(|| talk(b"elsewhere")).join().unwrap());
    talk(b"here again");
}

#[test]
fn a_key_that_has_sealed_enough_is_replaced() {
    let mut pair = pair();
    pair.sealer.key.skip_to(RENEW_AFTER);
    assert!(pair.sealer.key_update().is_some());
    assert_eq!(pair.sealer.key.used(), 0);
    assert_eq!(pair.sealer.key_update(), None);
}

/// One step of a handshake: what of the incoming bytes is done with.
fn step<D>(UnbufferedStatus { discard, state }: UnbufferedStatus<'_, '_, D>, outgoing: &mut Vec<u8>) -> usize {
    match state.unwrap() {
        ConnectionState::EncodeTlsData(mut data) => {
            let start = outgoing.len();
            outgoing.resize(start + MAX_RECORD, 0);
            let written = data.encode(&mut outgoing[start..]).unwrap();
            outgoing.truncate(start + written);
        }
        ConnectionState::TransmitTlsData(data) => data.done(),
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => {}
        _ => panic!("an end"),
    }
    discard
}

#[test]
fn both_sides_of_ours_follow_each_others_keys() {
    let (client, server) = configs();
    let ((client, of_clients), (server, of_servers)) = (Secrets::of_client(&client), Secrets::of_server(&server));
    let mut client = UnbufferedClientConnection::new(client, unnamed()).unwrap();
    let mut server = UnbufferedServerConnection::new(server).unwrap();
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    while client.is_handshaking() || server.is_handshaking() || !to_server.is_empty() || !to_client.is_empty() {
        let discard = step(client.process_tls_records(&mut to_client), &mut to_server);
        to_client.drain(..discard);
        let discard = step(server.process_tls_records(&mut to_server), &mut to_client);
        to_server.drain(..discard);
    }
    let (mut client, mut server) = (of_client(client, &of_clients).unwrap(), of_server(server, &of_servers).unwrap());
    for (sealer, opener) in [(&mut client.0, &mut server.1), (&mut server.0, &mut client.1)] {
        for _ in 0..3 {
            sealer.key.skip_to(RENEW_AFTER);
            opener.key.skip_to(RENEW_AFTER);
            let mut update = sealer.key_update().expect("the key has sealed enough");
            assert_eq!(opener.open(&mut update), Ok(Opened::Nothing));
            let mut record = sealed(sealer, b"by the next key");
            assert_eq!(opener.open(&mut record), Ok(Opened::Data(BEFORE..BEFORE + 15)));
        }
    }
}

#[test]
fn the_end_and_alerts_are_told_apart() {
    let mut pair = pair();
    pair.peer.send_close_notify();
    let mut record = pair.sent_by_peer().pop_front().unwrap();
    assert_eq!(pair.opener.open(&mut record), Ok(Opened::Closed));
    let close = pair.sealer.close_notify();
    assert!(pair.peer.read_tls(&mut &close[..]).unwrap() > 0);
    assert!(pair.peer.process_new_packets().unwrap().peer_has_closed());

    let mut other = crate::records::tests::pair();
    let record = sealed(&mut other.sealer, b"changed on its way");
    let mut changed = record.clone();
    changed[BEFORE] ^= 1;
    other.peer.read_tls(&mut &changed[..]).unwrap();
    other.peer.process_new_packets().unwrap_err();
    let mut alert = other.sent_by_peer().pop_front().unwrap();
    let told = other.opener.open(&mut alert).unwrap_err();
    assert_eq!(told, RecordError::Alert(AlertDescription::BadRecordMac));
    assert_eq!(told.refusal().as_str(), "peer-refused");
}

#[test]
fn what_may_not_come_ends_the_connection_by_name() {
    assert_eq!(length(&[23, 3, 3, 0]), Ok(None));
    assert_eq!(length(&[22, 3, 3, 0, 50]), Err(RecordError::NotEncrypted));
    assert_eq!(length(&[23, 3, 3, 0, 16]), Err(RecordError::Length(21)));
    assert_eq!(length(&[23, 3, 3, 0, 17]), Ok(Some(22)));
    assert_eq!(length(&[23, 3, 3, 0x41, 0x00]), Ok(Some(MAX_RECORD)));
    assert_eq!(length(&[23, 3, 3, 0x41, 0x01]), Err(RecordError::Length(MAX_RECORD + 1)));

    // Both directions of one key: what the peer would seal.
    let secrets = || rustls::ConnectionTrafficSecrets::Aes256Gcm { key: [9; 32].into(), iv: [1; 12].into() };
    let open = |kind: u8, content: &[u8]| {
        let mut pair = pair();
        pair.opener.key = Key::with(0, (&secrets()).into(), false);
        let mut record = vec![0; BEFORE + content.len() + AFTER];
        record[BEFORE..BEFORE + content.len()].copy_from_slice(content);
        Key::with(0, (&secrets()).into(), false).seal(kind, &mut record);
        (pair.opener.open(&mut record.clone()), record)
    };
    let (broken, mut record) = open(APPLICATION_DATA, b"x");
    assert_eq!(broken, Ok(Opened::Data(BEFORE..BEFORE + 1)));
    record[BEFORE] ^= 1;
    assert_eq!(pair().opener.open(&mut record), Err(RecordError::Seal));
    // A ticket, a request for a certificate, a key update with a byte too many, of an unknown kind, an alert of one byte.
    let bad: [(u8, &[u8]); 6] = [
        (HANDSHAKE, &[4, 0, 0, 1, 0]),
        (HANDSHAKE, &[13, 0, 0, 1, 0]),
        (HANDSHAKE, &[24, 0, 0, 1, 0, 0]),
        (HANDSHAKE, &[24, 0, 0, 1, 2]),
        (ALERT, &[1]),
        (20, &[1]),
    ];
    for (kind, content) in bad {
        assert_eq!(open(kind, content).0, Err(RecordError::Unexpected), "{kind} {content:?}");
    }
    // Zeroes alone: no type.
    assert_eq!(open(0, &[0, 0]).0, Err(RecordError::Unexpected));
    // Padding is taken off; what is left of a record may be nothing.
    assert_eq!(open(0, &[b'p', APPLICATION_DATA, 0, 0]).0, Ok(Opened::Data(BEFORE..BEFORE + 1)));
    assert_eq!(open(0, &[APPLICATION_DATA, 0]).0, Ok(Opened::Nothing));
}

#[test]
fn records_that_carry_nothing_are_bounded() {
    let mut pair = pair();
    for _ in 0..MOST_EMPTY {
        pair.peer.refresh_traffic_keys().unwrap();
    }
    assert_eq!(pair.open_all(), Ok(Vec::new()));
    pair.peer.refresh_traffic_keys().unwrap();
    assert_eq!(pair.open_all(), Err(RecordError::TooManyEmpty));
}
