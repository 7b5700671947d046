//! Certificate requests (PKCS #10, RFC 2986): a key, and the proof that the asker holds it.
//!
//! That is all a request says here. Subject, names and extensions that it asks for are neither written nor read: who the
//! asker is comes from the control plane's own checks.

use std::fmt;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use rcgen::{CertificateParams, DistinguishedName, SubjectPublicKeyInfo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{AlgorithmIdentifier, CertificateSigningRequestDer, alg_id};
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ED25519};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

use crate::key::{PrivateKey, Signer};
use crate::pem;

/// The largest request that is read, in bytes of PEM. One of P-256 has about 300.
pub const MAX_REQUEST_SIZE: usize = 16 * 1024;

/// A point on P-256 in uncompressed form: 4, x, y (RFC 5480, section 2.2).
const UNCOMPRESSED: u8 = 4;
const POINT_LENGTH: usize = 65;

/// A request to certify a key, to be sent to the control plane.
#[derive(Clone, Debug)]
pub struct CertificateRequest(String);

impl CertificateRequest {
    /// Signs a request with the key that it is about. Subject and attributes are empty.
    ///
    /// # Errors
    /// Where the cryptographic library fails.
    pub fn new(key: &PrivateKey) -> Result<Self, RequestError> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        let request = parameters.serialize_request(&Signer(key)).map_err(|_| RequestError::Sign)?;
        Ok(CertificateRequest(pem::encode(pem::CERTIFICATE_REQUEST, request.der()).to_string()))
    }

    /// The request as PEM.
    pub fn as_pem(&self) -> &str {
        &self.0
    }
}

/// The public key of a request whose signature was checked, on the authority's side. Nothing else is taken from it.
#[derive(Clone)]
pub struct PublicKeyOfRequest(SubjectPublicKeyInfo);

impl PublicKeyOfRequest {
    /// Reads a request from a stranger and checks that it is signed by the key that it names.
    ///
    /// # Errors
    /// Where it is too large or malformed, the key is neither P-256 nor Ed25519, or the signature is of another key.
    pub fn from_pem(text: &str) -> Result<Self, RequestError> {
        if text.len() > MAX_REQUEST_SIZE {
            return Err(RequestError::TooLarge);
        }
        let der = CertificateSigningRequestDer::from_pem_slice(text.as_bytes()).map_err(|_| RequestError::Malformed)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| RequestError::Malformed)?;
        if !rest.is_empty() {
            return Err(RequestError::Malformed);
        }
        let info = &request.certification_request_info;
        let signature: &[u8] = &request.signature_value.data;
        let algorithm = signature_algorithm(&info.subject_pki)?;
        // The parser above is lenient with tags and left-over bits, and what follows the signed part is signed by
        // nobody: it must be the one text that DER has for it, so that no two texts are one request.
        if !der.ends_with(&encode(info.raw, algorithm.identifier.as_ref(), signature)) {
            return Err(RequestError::Malformed);
        }
        UnparsedPublicKey::new(algorithm.verification, &info.subject_pki.subject_public_key.data)
            .verify(info.raw, signature)
            .map_err(|_| RequestError::BadSignature)?;
        SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map(PublicKeyOfRequest).map_err(|_| RequestError::KeyKind)
    }

    pub(crate) fn public_key_info(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }
}

impl fmt::Debug for PublicKeyOfRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PublicKeyOfRequest")
    }
}

/// How a kind of key signs: the check, and the contents of its identifier in DER.
struct Algorithm {
    verification: &'static dyn VerificationAlgorithm,
    identifier: AlgorithmIdentifier,
}

/// The one signature algorithm that fits a key (RFC 5758, section 3.2; RFC 8410, section 3).
fn signature_algorithm(key: &ParsedKey<'_>) -> Result<Algorithm, RequestError> {
    let kind = &key.algorithm.algorithm;
    if *kind == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        let point: &[u8] = &key.subject_public_key.data;
        if curve == Some(OID_EC_P256) && point.len() == POINT_LENGTH && point[0] == UNCOMPRESSED {
            return Ok(Algorithm { verification: &ECDSA_P256_SHA256_ASN1, identifier: alg_id::ECDSA_SHA256 });
        }
    }
    if *kind == OID_SIG_ED25519 && key.algorithm.parameters.is_none() {
        return Ok(Algorithm { verification: &ED25519, identifier: alg_id::ED25519 });
    }
    Err(RequestError::KeyKind)
}

/// What a request consists of, behind its own header: the signed part, the algorithm's identifier as a SEQUENCE, the
/// signature as a BIT STRING of whole bytes (RFC 2986, section 4.2).
fn encode(signed: &[u8], algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    const SEQUENCE: u8 = 0x30;
    const BIT_STRING: u8 = 0x03;
    // Both are far below 128 bytes, where DER writes a length as itself; of a longer signature this makes a text that
    // no request ends with.
    let mut der = signed.to_vec();
    der.extend([SEQUENCE, algorithm.len() as u8]);
    der.extend(algorithm);
    der.extend([BIT_STRING, (signature.len() + 1).min(0x7f) as u8, 0]);
    der.extend(signature);
    der
}

/// Why there is no certificate request. The asker's fault, but for [`RequestError::Sign`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// It is larger than [`MAX_REQUEST_SIZE`].
    #[error("the certificate request is larger than {MAX_REQUEST_SIZE} bytes")]
    TooLarge,
    /// It does not parse, or its signature is not of the algorithm that its kind of key signs with.
    #[error("the certificate request is not PKCS #10 in PEM (BEGIN CERTIFICATE REQUEST)")]
    Malformed,
    /// Its key is of a kind that is not accepted.
    #[error("the certificate request's key is neither P-256 nor Ed25519")]
    KeyKind,
    /// It is not signed by the key that it names: the asker may not hold that key.
    #[error("the certificate request is not signed by its own key")]
    BadSignature,
    /// The cryptographic library failed.
    #[error("cannot sign a certificate request: the cryptographic library failed")]
    Sign,
}
