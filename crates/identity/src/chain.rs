//! A certificate chain: a leaf, then the intermediates that lead from it towards a root.

use std::fmt;

use rustls_pki_types::CertificateDer;
use thiserror::Error;

use crate::bundle::TrustBundle;
use crate::pem;

/// The most certificates in a chain. Leaf and intermediate are two; an external authority may add two more.
pub const MAX_CHAIN: usize = 4;

/// The largest chain as PEM, in bytes. A chain of hybrid or RSA certificates stays far below.
pub const MAX_PEM_SIZE: usize = 64 * 1024;

/// One to [`MAX_CHAIN`] certificates in DER, the leaf first, as TLS sends them (RFC 8446, section 4.4.2).
///
/// Only the order and the bounds are known of it: [`crate::verify`] says whether it chains.
#[derive(Clone, PartialEq, Eq)]
pub struct Chain(Vec<CertificateDer<'static>>);

impl Chain {
    /// Takes certificates in DER, the leaf first.
    ///
    /// # Errors
    /// Where there is none, or there are too many.
    pub fn from_der(certificates: Vec<CertificateDer<'static>>) -> Result<Self, ChainError> {
        match certificates.len() {
            0 => Err(ChainError::Empty),
            1..=MAX_CHAIN => Ok(Chain(certificates)),
            _ => Err(ChainError::TooLong),
        }
    }

    /// Takes certificates in PEM, the leaf first; text around them is ignored.
    ///
    /// # Errors
    /// As [`Chain::from_der`], and where the text is too large or broken.
    pub fn from_pem(text: &str) -> Result<Self, ChainError> {
        if text.len() > MAX_PEM_SIZE {
            return Err(ChainError::TooLong);
        }
        Self::from_der(pem::decode_certificates(text).ok_or(ChainError::BadPem)?)
    }

    /// The chain as one text of PEM, the leaf first.
    pub fn to_pem(&self) -> String {
        pem::encode_certificates(&self.0)
    }

    /// One text of PEM for each certificate, the leaf first, as Istio's certificate service answers.
    pub fn to_pem_texts(&self) -> Vec<String> {
        self.0.iter().map(|certificate| pem::encode_certificates([certificate])).collect()
    }

    /// The certificates in DER, the leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0
    }

    /// The workload's own certificate.
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.0[0]
    }

    /// The chain without the roots that an authority may have added at its end: a peer has them, and they would be
    /// sent in every handshake.
    pub(crate) fn without_roots(mut self, bundle: &TrustBundle) -> Self {
        let leaf = self.0.remove(0);
        self.0.retain(|certificate| bundle.roots().all(|root| root != certificate));
        self.0.insert(0, leaf);
        self
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({} certificates)", self.0.len())
    }
}

/// Why certificates are not a chain. Whoever reads them from somewhere adds where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainError {
    /// There is no certificate.
    #[error("the certificate chain is empty; it needs a certificate in PEM (BEGIN CERTIFICATE)")]
    Empty,
    /// There are more than [`MAX_CHAIN`], or the text is larger than [`MAX_PEM_SIZE`].
    #[error("the certificate chain has more than {MAX_CHAIN} certificates or {MAX_PEM_SIZE} bytes")]
    TooLong,
    /// The PEM is broken.
    #[error("the certificate chain is not PEM: a section does not decode")]
    BadPem,
}
