//! Private keys: made here, kept in memory, wiped when dropped.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::sign::SigningKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

use crate::pem;

/// The largest private key as PEM, in bytes. One of P-256 has about 240.
const MAX_PEM_SIZE: usize = 4 * 1024;

/// A key pair on the curve P-256 for ECDSA (FIPS 186-5).
///
/// The secret lives in AWS-LC's memory alone, which is wiped when freed. It has no `Clone`, its `Debug` shows nothing,
/// and only the intermediate authority and [`crate::estate`] write it out.
pub struct PrivateKey(EcdsaKeyPair);

impl PrivateKey {
    /// Makes a key from the system's randomness.
    ///
    /// # Errors
    /// [`KeyError::Generate`] where there is no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map(PrivateKey).map_err(|_| KeyError::Generate)
    }

    /// Reads a key in PKCS #8 (RFC 5958) as PEM.
    pub(crate) fn from_pem(text: &str) -> Result<Self, KeyError> {
        if text.len() > MAX_PEM_SIZE {
            return Err(KeyError::Malformed);
        }
        let mut der = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).map_err(|_| KeyError::Malformed)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_pkcs8_der());
        der.zeroize();
        pair.map(PrivateKey).map_err(|_| KeyError::Malformed)
    }

    /// The key in PKCS #8 as PEM. The text is wiped when dropped.
    pub(crate) fn to_pem(&self) -> Result<Zeroizing<String>, KeyError> {
        let document = self.0.to_pkcs8v1().map_err(|_| KeyError::Encode)?;
        Ok(pem::encode(pem::PRIVATE_KEY, document.as_ref()))
    }

    /// The public half as SubjectPublicKeyInfo in DER (RFC 5480).
    pub(crate) fn public_key_info(&self) -> Vec<u8> {
        Signer(self).subject_public_key_info()
    }

    /// The key as rustls signs with it.
    pub(crate) fn to_rustls(&self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let document = self.0.to_pkcs8v1().map_err(|_| KeyError::Encode)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(document.as_ref()));
        any_ecdsa_type(&der).map_err(|_| KeyError::Encode)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// The key as rcgen signs certificates and requests with it.
///
/// Apart from [`PrivateKey`], so that having a key is not a public way of signing anything with it.
pub(crate) struct Signer<'a>(pub(crate) &'a PrivateKey);

impl PublicKeyData for Signer<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0.0.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for Signer<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.0.0.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// What can go wrong with a key. Never says anything about the key itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The system gave no randomness.
    #[error("cannot make a private key: the system gives no randomness")]
    Generate,
    /// The text is not a key that is accepted here.
    #[error("the private key is not a P-256 key in PKCS #8 PEM (BEGIN PRIVATE KEY)")]
    Malformed,
    /// The cryptographic library refused to encode its own key.
    #[error("the cryptographic library does not encode its own key")]
    Encode,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_the_way_through_pem() {
        let key = PrivateKey::generate().unwrap();
        let again = PrivateKey::from_pem(&key.to_pem().unwrap()).unwrap();
        assert_eq!(key.public_key_info(), again.public_key_info());
    }

    #[test]
    fn rustls_holds_the_same_key() {
        let key = PrivateKey::generate().unwrap();
        let public = key.to_rustls().unwrap().public_key().unwrap().to_vec();
        assert_eq!(public, key.public_key_info());
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", PrivateKey::generate().unwrap()), "PrivateKey(redacted)");
    }

    #[test]
    fn what_is_not_a_key_is_refused_without_repeating_it() {
        let wrong = pem::encode(pem::PRIVATE_KEY, b"secret bytes that are not a key");
        for text in ["", "nonsense", wrong.as_str(), &"x".repeat(MAX_PEM_SIZE + 1)] {
            let error = PrivateKey::from_pem(text).unwrap_err();
            assert_eq!(error, KeyError::Malformed);
        }
    }
}
