//! Certificate requests from honest askers and from others.

use identity::csr::{CertificateRequest, MAX_REQUEST_SIZE, PublicKeyOfRequest, RequestError};
use identity::{Chain, PrivateKey, TrustBundle};
use proptest::prelude::*;
use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256,
    SignatureAlgorithm,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::FromDer;

fn request_with(algorithm: &'static SignatureAlgorithm) -> String {
    let key = KeyPair::generate_for(algorithm).unwrap();
    CertificateParams::new(["example.com".to_owned()]).unwrap().serialize_request(&key).unwrap().pem().unwrap()
}

#[test]
fn a_request_says_nothing_but_its_key() {
    let request = CertificateRequest::new(&PrivateKey::generate().unwrap()).unwrap();
    let (_, pem) = parse_x509_pem(request.as_pem().as_bytes()).unwrap();
    let (_, parsed) = X509CertificationRequest::from_der(&pem.contents).unwrap();
    let info = parsed.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    assert_eq!(info.attributes().len(), 0);
    assert!(PublicKeyOfRequest::from_pem(request.as_pem()).is_ok());
}

#[test]
fn p256_and_ed25519_are_accepted_whatever_else_the_request_asks_for() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519] {
        assert!(PublicKeyOfRequest::from_pem(&request_with(algorithm)).is_ok());
    }
}

#[test]
fn other_kinds_of_keys_are_refused() {
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_RSA_SHA256] {
        assert_eq!(PublicKeyOfRequest::from_pem(&request_with(algorithm)).unwrap_err(), RequestError::KeyKind);
    }
}

/// Changes one byte of a request and puts it in PEM again.
fn changed(request: &str, position: impl FnOnce(&[u8]) -> usize) -> String {
    let (_, mut pem) = parse_x509_pem(request.as_bytes()).unwrap();
    let position = position(&pem.contents);
    pem.contents[position] ^= 1;
    encode(&pem.contents)
}

fn encode(der: &[u8]) -> String {
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
}

#[test]
fn a_request_that_its_own_key_did_not_sign_is_refused() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519] {
        let request = request_with(algorithm);
        assert!(PublicKeyOfRequest::from_pem(&request).is_ok());
        let signature = changed(&request, |der| der.len() - 1);
        assert_eq!(PublicKeyOfRequest::from_pem(&signature).unwrap_err(), RequestError::BadSignature);
        let name = changed(&request, |der| der.windows(11).position(|part| part == b"example.com").unwrap());
        assert_eq!(PublicKeyOfRequest::from_pem(&name).unwrap_err(), RequestError::BadSignature);
    }
}

#[test]
fn what_is_not_a_request_is_refused() {
    let (_, mut pem) = parse_x509_pem(request_with(&PKCS_ED25519).as_bytes()).unwrap();
    pem.contents.push(0);
    for text in ["", "nonsense", &encode(b"not DER"), &encode(&pem.contents)] {
        assert_eq!(PublicKeyOfRequest::from_pem(text).unwrap_err(), RequestError::Malformed);
    }
}

proptest! {
    #[test]
    fn no_text_makes_a_reader_panic(der in proptest::collection::vec(any::<u8>(), 0..200), label in "[A-Z ]{0,20}") {
        prop_assert!(PublicKeyOfRequest::from_pem(&encode(&der)).is_err());
        let text = format!("-----BEGIN {label}-----\n{}-----END {label}-----\n", String::from_utf8_lossy(&der));
        prop_assert!(PublicKeyOfRequest::from_pem(&text).is_err());
        prop_assert!(Chain::from_pem(&text).is_err());
        prop_assert!(TrustBundle::from_pem("cluster.local".parse().unwrap(), &text).is_err());
        prop_assert!(TrustBundle::from_der("cluster.local".parse().unwrap(), [der.into()]).is_err());
    }
}

#[test]
fn a_request_beyond_the_bound_is_not_read() {
    let mut text = request_with(&PKCS_ED25519);
    text.push_str(&" ".repeat(MAX_REQUEST_SIZE));
    assert_eq!(PublicKeyOfRequest::from_pem(&text).unwrap_err(), RequestError::TooLarge);
}

#[test]
fn no_request_with_a_changed_byte_gives_a_key() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519] {
        let request = request_with(algorithm);
        let length = parse_x509_pem(request.as_bytes()).unwrap().1.contents.len();
        for position in 0..length {
            assert!(PublicKeyOfRequest::from_pem(&changed(&request, |_| position)).is_err(), "byte {position}");
        }
    }
}
