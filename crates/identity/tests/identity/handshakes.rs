//! Each way in, and each way of being kept out.
//!
//! A stranger's handshakes run both ways, so that each rule is seen to hold for servers and for clients, and the first
//! stranger of all is let in: what the others lack is then the one thing that their name says.

use std::sync::Arc;

use identity::tls::{
    H2, JUSTMTLS_1, client_config, control_client_config, control_server_config, refusal, server_config, unnamed,
};
use identity::verify::{Role, verify};
use identity::{Refusal, Svid, TrustBundle, VerifiedPeer, VerifyError};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls::{AlertDescription, ClientConfig, ClientConnection, Error, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::authority::{Authority, Forged, authority, valid, workload};
use crate::mesh::{DAY, HOUR, Mesh, NOW, at, clock, database, id, web};
use crate::strangers;
use crate::wire::{Outcome, answer_bytes, serve_bytes, shake, shake_for};

const DATABASE: &str = "spiffe://cluster.local/ns/shop/sa/database";

fn client(mesh: &Mesh) -> Arc<ClientConfig> {
    client_config(&mesh.svid(&web()), &mesh.bundle, &database(), clock(NOW))
}

fn server(mesh: &Mesh) -> Arc<ServerConfig> {
    server_config(&mesh.svid(&database()), &mesh.bundle, clock(NOW))
}

/// What our client says of a server that shows `forged`, and what our server says of a client that does.
fn judge(mesh: &Mesh, forge: impl Fn() -> Forged) -> [Result<VerifiedPeer, Refusal>; 2] {
    [
        shake(client(mesh), strangers::server(forge(), &[JUSTMTLS_1])).client,
        shake(strangers::client(Some(forge()), &[JUSTMTLS_1]), server(mesh)).server,
    ]
}

/// Both sides refuse a stranger with what the mesh's own intermediate signed for these parameters, by this name.
fn refused(parameters: CertificateParams, reason: &str) {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    for judgement in judge(&mesh, || thief.sign(&parameters)) {
        assert_eq!(judgement.unwrap_err().as_str(), reason);
    }
}

fn alert(refusal: &Result<VerifiedPeer, Refusal>) -> AlertDescription {
    match refusal {
        Err(Refusal::PeerRefused { alert }) => *alert,
        other => panic!("no alert came, but {other:?}"),
    }
}

#[test]
fn two_workloads_prove_themselves_to_each_other() {
    let mesh = Mesh::new();
    let Outcome { client, server } = shake(client(&mesh), server(&mesh));
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!((client.id(), server.id()), (&database(), &web()));
    assert_eq!((client.not_before(), client.not_after()), (at(NOW - 60), at(NOW + DAY)));
    for handshake in [client.handshake(), server.handshake()] {
        assert_eq!(handshake.version(), "TLSv1_3");
        assert_eq!(handshake.group(), "X25519MLKEM768");
        assert_eq!(handshake.cipher(), "TLS13_AES_128_GCM_SHA256");
    }
}

#[test]
fn another_service_account_is_refused_and_the_reason_names_both() {
    let mesh = Mesh::new();
    let other = id("spiffe://cluster.local/ns/shop/sa/cache");
    let expecting = client_config(&mesh.svid(&web()), &mesh.bundle, &other, clock(NOW));
    let outcome = shake(expecting, server(&mesh));
    let wrong = VerifyError::WrongIdentity { expected: other, found: database() };
    assert_eq!(wrong.as_str(), "wrong-identity");
    assert_eq!(outcome.client.unwrap_err(), Refusal::Certificate(wrong));
    assert_eq!(alert(&outcome.server), AlertDescription::CertificateUnknown);
}

#[test]
fn the_same_service_account_of_another_namespace_is_refused() {
    let mesh = Mesh::new();
    let other = id("spiffe://cluster.local/ns/staging/sa/database");
    let expecting = client_config(&mesh.svid(&web()), &mesh.bundle, &other, clock(NOW));
    let wrong = VerifyError::WrongIdentity { expected: other, found: database() };
    assert_eq!(shake(expecting, server(&mesh)).client.unwrap_err(), Refusal::Certificate(wrong));
}

#[test]
fn a_stranger_with_a_proper_certificate_is_let_in() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    for judgement in judge(&mesh, || thief.sign(&workload(&[DATABASE]))) {
        assert_eq!(judgement.unwrap().id(), &database());
    }
}

#[test]
fn another_trust_domain_is_refused_even_under_our_own_root() {
    let foreign = "spiffe://elsewhere.example/ns/shop/sa/database";
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    for judgement in judge(&mesh, || thief.sign(&workload(&[foreign]))) {
        let expected = mesh.bundle.trust_domain().clone();
        let wrong = VerifyError::WrongTrustDomain { expected, found: id(foreign) };
        assert_eq!(wrong.as_str(), "wrong-trust-domain");
        assert_eq!(judgement.unwrap_err(), Refusal::Certificate(wrong));
    }
}

#[test]
fn an_expired_certificate_is_refused() {
    let mesh = Mesh::new();
    let later = NOW + DAY + 1;
    let expired = Refusal::Certificate(VerifyError::Expired { not_after: at(NOW + DAY), now: at(later) });
    assert_eq!(expired.as_str(), "expired");

    let late_client = client_config(&mesh.svid(&web()), &mesh.bundle, &database(), clock(later));
    let outcome = shake(late_client, server(&mesh));
    assert_eq!(outcome.client.unwrap_err(), expired);
    assert_eq!(alert(&outcome.server), AlertDescription::CertificateExpired);

    let late_server = server_config(&mesh.svid(&database()), &mesh.bundle, clock(later));
    let outcome = shake(client(&mesh), late_server);
    assert_eq!(outcome.server.unwrap_err(), expired);
    assert_eq!(alert(&outcome.client), AlertDescription::CertificateExpired);
}

#[test]
fn a_certificate_is_valid_in_its_last_second() {
    let mesh = Mesh::new();
    let last = client_config(&mesh.svid(&web()), &mesh.bundle, &database(), clock(NOW + DAY));
    assert!(shake(last, server(&mesh)).client.is_ok());
}

#[test]
fn a_certificate_that_is_not_valid_yet_is_refused() {
    let mesh = Mesh::new();
    let early = NOW - HOUR;
    let early_client = client_config(&mesh.svid(&web()), &mesh.bundle, &database(), clock(early));
    let not_yet = Refusal::Certificate(VerifyError::NotYetValid { not_before: at(NOW - 60), now: at(early) });
    assert_eq!(not_yet.as_str(), "not-yet-valid");
    assert_eq!(shake(early_client, server(&mesh)).client.unwrap_err(), not_yet);
    let early_server = server_config(&mesh.svid(&database()), &mesh.bundle, clock(early));
    assert_eq!(shake(client(&mesh), early_server).server.unwrap_err(), not_yet);
}

#[test]
fn an_authority_that_is_not_ours_is_refused_though_it_signs_our_names() {
    let (mesh, impostor) = (Mesh::new(), Mesh::new());
    let outcome = shake(client(&mesh), server(&impostor));
    assert_eq!(outcome.client.unwrap_err().as_str(), "unknown-issuer");
    assert_eq!(alert(&outcome.server), AlertDescription::UnknownCA);
    let trusting = client_config(&impostor.svid(&web()), &mesh.bundle, &database(), clock(NOW));
    let outcome = shake(trusting, server(&mesh));
    assert_eq!(outcome.server.unwrap_err().as_str(), "unknown-issuer");
    assert_eq!(alert(&outcome.client), AlertDescription::UnknownCA);
}

#[test]
fn a_client_of_tls_1_2_is_refused() {
    // ClientHello of RFC 5246, section 7.4.1.2: version 3.3, no supported_versions.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]); // random
    hello.extend([0]); // no session
    hello.extend([0, 2, 0xc0, 0x2b]); // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    hello.extend([1, 0]); // no compression
    let extensions = [0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 4, 0, 2, 4, 3]; // x25519, ecdsa_secp256r1_sha256
    hello.extend([0, extensions.len() as u8]);
    hello.extend(extensions);
    let bytes = handshake_record(1, &hello);
    assert_eq!(serve_bytes(server(&Mesh::new()), &bytes).unwrap_err(), Refusal::TlsVersion);
    assert_eq!(Refusal::TlsVersion.as_str(), "tls-version");
}

#[test]
fn a_server_of_tls_1_2_is_refused_whether_it_declines_or_answers() {
    let mesh = Mesh::new();
    // What one does that knows of TLS 1.3: the alert protocol_version.
    let alert = [21, 3, 3, 0, 2, 2, 70];
    assert_eq!(answer_bytes(client(&mesh), &alert).unwrap_err(), Refusal::TlsVersion);
    // What one does that answers all the same: ServerHello of RFC 5246, section 7.4.1.3.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]); // random
    hello.extend([0, 0xc0, 0x2b, 0]); // no session, the cipher suite above, no compression
    let bytes = handshake_record(2, &hello);
    assert_eq!(answer_bytes(client(&mesh), &bytes).unwrap_err(), Refusal::TlsVersion);
}

fn handshake_record(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = body.len() as u16;
    let mut record = vec![22, 3, 3];
    record.extend((length + 4).to_be_bytes());
    record.extend([kind, 0]);
    record.extend(length.to_be_bytes());
    record.extend(body);
    record
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let outcome = shake(strangers::client(None, &[JUSTMTLS_1]), server(&Mesh::new()));
    assert_eq!(outcome.server.unwrap_err(), Refusal::NoClientCertificate);
    assert_eq!(Refusal::NoClientCertificate.as_str(), "no-client-certificate");
    assert_eq!(alert(&outcome.client), AlertDescription::CertificateRequired);
}

#[test]
fn a_certificate_with_two_uris_is_refused_even_if_one_is_right() {
    refused(workload(&[DATABASE, "spiffe://cluster.local/ns/shop/sa/web"]), "several-uri-names");
    refused(workload(&[DATABASE, DATABASE]), "several-uri-names");
    refused(workload(&["https://example.com/", DATABASE]), "several-uri-names");
}

#[test]
fn a_certificate_without_a_uri_is_refused() {
    refused(workload(&[]), "no-spiffe-id");
    let mut named = workload(&[]);
    named.subject_alt_names = vec![SanType::DnsName("database.shop.svc".try_into().unwrap())];
    refused(named, "no-spiffe-id");
}

#[test]
fn a_uri_that_is_not_a_workloads_is_refused() {
    for uri in ["https://cluster.local/ns/shop/sa/database", "spiffe://cluster.local", "spiffe://cluster.local/web"] {
        refused(workload(&[uri]), "bad-spiffe-id");
    }
}

#[test]
fn other_kinds_of_names_beside_the_one_uri_do_no_harm() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    let mut parameters = workload(&[DATABASE]);
    parameters.subject_alt_names.push(SanType::DnsName("database.shop.svc".try_into().unwrap()));
    for judgement in judge(&mesh, || thief.sign(&parameters)) {
        assert_eq!(judgement.unwrap().id(), &database());
    }
}

#[test]
fn a_certificate_for_the_other_side_of_a_handshake_is_refused() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    let meant_for = |purpose: ExtendedKeyUsagePurpose| {
        let mut parameters = workload(&[DATABASE]);
        parameters.extended_key_usages = vec![purpose];
        judge(&mesh, || thief.sign(&parameters)).map(|judgement| judgement.map_err(|refusal| refusal.as_str()))
    };
    let [as_server, as_client] = meant_for(ExtendedKeyUsagePurpose::ServerAuth);
    assert!(as_server.is_ok() && as_client.unwrap_err() == "wrong-key-usage");
    let [as_server, as_client] = meant_for(ExtendedKeyUsagePurpose::ClientAuth);
    assert!(as_server.unwrap_err() == "wrong-key-usage" && as_client.is_ok());
}

#[test]
fn a_certificate_for_another_purpose_or_for_none_or_for_any_is_refused() {
    for purposes in [vec![ExtendedKeyUsagePurpose::CodeSigning], vec![], vec![ExtendedKeyUsagePurpose::Any]] {
        let mut parameters = workload(&[DATABASE]);
        parameters.extended_key_usages = purposes;
        refused(parameters, "wrong-key-usage");
    }
    for usages in [vec![], vec![KeyUsagePurpose::KeyAgreement]] {
        let mut parameters = workload(&[DATABASE]);
        parameters.key_usages = usages;
        refused(parameters, "wrong-key-usage");
    }
}

#[test]
fn an_authority_is_not_a_workload() {
    let mut authority = workload(&[DATABASE]);
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    refused(authority, "wrong-key-usage");
    let mut signer = workload(&[DATABASE]);
    signer.key_usages.push(KeyUsagePurpose::KeyCertSign);
    refused(signer, "wrong-key-usage");
}

#[test]
fn a_client_that_speaks_another_protocol_or_names_none_is_refused() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    let forge = || Some(thief.sign(&workload(&[DATABASE])));
    let outcome = shake(strangers::client(forge(), &[H2]), server(&mesh));
    assert_eq!(outcome.server.unwrap_err(), Refusal::Alpn);
    assert_eq!(outcome.client.unwrap_err(), Refusal::Alpn);
    // Without ALPN a handshake succeeds (RFC 7301, section 3.2): it is the proof that refuses.
    assert_eq!(shake(strangers::client(forge(), &[]), server(&mesh)).server.unwrap_err(), Refusal::Alpn);
    assert_eq!(Refusal::Alpn.as_str(), "alpn");
}

#[test]
fn a_server_that_speaks_another_protocol_or_names_none_is_refused() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    let forge = || thief.sign(&workload(&[DATABASE]));
    for protocols in [&[H2][..], &[]] {
        assert_eq!(shake(client(&mesh), strangers::server(forge(), protocols)).client.unwrap_err(), Refusal::Alpn);
    }
}

#[test]
fn a_certificate_that_signs_itself_is_refused() {
    let forge = || {
        let key = rcgen::KeyPair::generate().unwrap();
        Forged { chain: vec![workload(&[DATABASE]).self_signed(&key).unwrap().der().clone()], key }
    };
    for judgement in judge(&Mesh::new(), forge) {
        assert_eq!(judgement.unwrap_err().as_str(), "unknown-issuer");
    }
}

#[test]
fn a_workload_cannot_sign_another() {
    let mesh = Mesh::new();
    let mut leaf = workload(&["spiffe://cluster.local/ns/shop/sa/web"]);
    // A subject, so that what it signs has a name to find it by.
    leaf.distinguished_name.push(rcgen::DnType::CommonName, "web");
    let web = Authority::thief_of(&mesh.intermediate).delegate(leaf);
    for judgement in judge(&mesh, || web.sign(&workload(&[DATABASE]))) {
        assert_eq!(judgement.unwrap_err().as_str(), "not-an-authority");
    }
}

#[test]
fn the_intermediate_cannot_make_another_authority() {
    let mesh = Mesh::new();
    let below = Authority::thief_of(&mesh.intermediate).delegate(authority("below"));
    for judgement in judge(&mesh, || below.sign(&workload(&[DATABASE]))) {
        assert_eq!(judgement.unwrap_err().as_str(), "not-an-authority");
    }
}

#[test]
fn a_chain_of_four_is_verified_and_one_of_five_is_not_looked_at() {
    let root = Authority::root(authority("root"));
    let bundle = TrustBundle::from_der("cluster.local".parse().unwrap(), [root.certificate()]).unwrap();
    let own = Mesh::new();
    let client = client_config(&own.svid(&web()), &bundle, &database(), clock(NOW));
    let three = root.delegate(authority("a")).delegate(authority("b"));
    let four = three.delegate(authority("c"));
    // Each chain ends with the root itself, which counts: it is sent, and read.
    let short = strangers::server(three.sign(&workload(&[DATABASE])), &[JUSTMTLS_1]);
    assert_eq!(shake(client.clone(), short).client.unwrap().id(), &database());
    let long = strangers::server(four.sign(&workload(&[DATABASE])), &[JUSTMTLS_1]);
    assert_eq!(shake(client, long).client.unwrap_err(), Refusal::Certificate(VerifyError::ChainTooLong));
}

#[test]
fn a_chain_of_a_hundred_is_not_looked_at_and_one_of_a_thousand_is_not_even_received() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    let chain_of = |length: usize| {
        let mut forged = thief.sign(&workload(&[DATABASE]));
        forged.chain.resize(length, mesh.bundle.roots().next().unwrap().clone());
        forged
    };
    for judgement in judge(&mesh, || chain_of(100)) {
        assert_eq!(judgement.unwrap_err(), Refusal::Certificate(VerifyError::ChainTooLong));
    }
    for judgement in judge(&mesh, || chain_of(1000)) {
        assert_eq!(judgement.unwrap_err().as_str(), "tls-protocol");
    }
}

#[test]
fn a_certificate_without_its_key_is_refused() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    for judgement in judge(&mesh, || {
        let chain = thief.sign(&workload(&[DATABASE])).chain;
        Forged { chain, key: rcgen::KeyPair::generate().unwrap() }
    }) {
        assert_eq!(judgement.unwrap_err().as_str(), "bad-signature");
    }
}

#[test]
fn a_forged_signature_of_the_authority_is_refused() {
    let mesh = Mesh::new();
    let thief = Authority::thief_of(&mesh.intermediate);
    for judgement in judge(&mesh, || {
        let mut forged = thief.sign(&workload(&[DATABASE]));
        let mut leaf = forged.chain[0].to_vec();
        *leaf.last_mut().unwrap() ^= 1;
        forged.chain[0] = leaf.into();
        forged
    }) {
        assert_eq!(judgement.unwrap_err().as_str(), "bad-signature");
    }
}

#[test]
fn no_certificate_with_a_changed_byte_is_accepted() {
    let mesh = Mesh::new();
    let (_, chain) = mesh.certify(&database(), NOW, DAY);
    let accepts = |leaf: CertificateDer<'_>| {
        verify(&mesh.bundle, &leaf, &chain.certificates()[1..], Role::Server, at(NOW)).is_ok()
    };
    assert!(accepts(chain.leaf().clone()));
    for position in 0..chain.leaf().len() {
        for change in [1, 0x80] {
            let mut leaf = chain.leaf().to_vec();
            leaf[position] ^= change;
            assert!(!accepts(leaf.into()), "byte {position}");
        }
    }
}

#[test]
fn an_expired_root_vouches_for_nobody() {
    let mut old = authority("root");
    valid(&mut old, NOW - 2 * DAY, NOW - DAY);
    let root = Authority::root(old);
    let bundle = TrustBundle::from_der("cluster.local".parse().unwrap(), [root.certificate()]).unwrap();
    let own = Mesh::new();
    let client = client_config(&own.svid(&web()), &bundle, &database(), clock(NOW));
    let outcome = shake(client, strangers::server(root.sign(&workload(&[DATABASE])), &[JUSTMTLS_1]));
    let expired = VerifyError::Expired { not_after: at(NOW - DAY), now: at(NOW) };
    assert_eq!(outcome.client.unwrap_err(), Refusal::Certificate(expired));
}

#[test]
fn an_expired_intermediate_vouches_for_nobody() {
    let root = Authority::root(authority("root"));
    let bundle = TrustBundle::from_der("cluster.local".parse().unwrap(), [root.certificate()]).unwrap();
    let mut old = authority("intermediate");
    valid(&mut old, NOW - 2 * DAY, NOW - 1);
    let client = client_config(&Mesh::new().svid(&web()), &bundle, &database(), clock(NOW));
    let forged = root.delegate(old).sign(&workload(&[DATABASE]));
    let outcome = shake(client, strangers::server(forged, &[JUSTMTLS_1]));
    assert_eq!(outcome.client.unwrap_err().as_str(), "expired");
}

#[test]
fn a_proof_ends_with_the_first_certificate_of_its_chain() {
    let root = Authority::root(authority("root"));
    let bundle = TrustBundle::from_der("cluster.local".parse().unwrap(), [root.certificate()]).unwrap();
    let mut short = authority("intermediate");
    valid(&mut short, NOW - HOUR, NOW + HOUR);
    let client = client_config(&Mesh::new().svid(&web()), &bundle, &database(), clock(NOW));
    let forged = root.delegate(short).sign(&workload(&[DATABASE]));
    let outcome = shake(client, strangers::server(forged, &[JUSTMTLS_1]));
    assert_eq!(outcome.client.unwrap().not_after(), at(NOW + HOUR));
}

#[test]
fn there_is_no_proof_before_the_handshake_is_over() {
    let unfinished = ClientConnection::new(client(&Mesh::new()), unnamed()).unwrap();
    assert_eq!(VerifiedPeer::from_handshake(&unfinished, JUSTMTLS_1).unwrap_err(), Refusal::Unfinished);
}

#[test]
fn the_control_plane_proves_itself_and_its_callers_need_no_certificate() {
    let mesh = Mesh::new();
    let control = id("spiffe://cluster.local/ns/justmtls-system/sa/justmtls-control");
    let serve = |svid: &Svid| control_server_config(svid, clock(NOW));
    let call = control_client_config(&mesh.bundle, &control, clock(NOW));
    let outcome = shake_for(H2, call.clone(), serve(&mesh.svid(&control)));
    assert_eq!(outcome.client.unwrap().id(), &control);
    assert_eq!(outcome.server.unwrap_err(), Refusal::NoClientCertificate);
    let outcome = shake(call.clone(), serve(&mesh.svid(&web())));
    assert_eq!(outcome.client.unwrap_err().as_str(), "wrong-identity");
    assert_eq!(shake(call, serve(&Mesh::new().svid(&control))).client.unwrap_err().as_str(), "unknown-issuer");
}

#[test]
fn nothing_allows_a_shorter_second_handshake() {
    let mesh = Mesh::new();
    let (client, server) = (client(&mesh), server(&mesh));
    assert_eq!((server.send_tls13_tickets, server.max_early_data_size), (0, 0));
    assert!(!server.ticketer.enabled() && !server.session_storage.can_cache());
    assert!(!client.enable_early_data && !client.enable_sni);
    for _ in 0..2 {
        assert!(shake(client.clone(), server.clone()).server.is_ok());
    }
}

#[test]
fn what_is_not_tls_at_all_breaks_the_protocol() {
    let refusal = serve_bytes(server(&Mesh::new()), b"GET / HTTP/1.1\r\n\r\n").unwrap_err();
    assert_eq!(refusal.as_str(), "tls-protocol");
}

#[test]
fn our_own_failures_are_not_blamed_on_the_peer() {
    assert_eq!(refusal(&Error::FailedToGetRandomBytes).as_str(), "tls-internal");
}
