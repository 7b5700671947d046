//! The trust bundle: the roots that vouch for a trust domain (SPIFFE Trust Domain and Bundle, section 4).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use thiserror::Error;

use crate::certificate;
use crate::pem;
use crate::spiffe::TrustDomain;
use crate::validity::Validity;

/// The most roots in a bundle. A rotation needs two; each more costs every handshake with a stranger a comparison.
pub const MAX_ROOTS: usize = 16;

/// The largest root certificate, in bytes of DER.
pub const MAX_ROOT_SIZE: usize = 16 * 1024;

/// The largest bundle as PEM, in bytes: every root at its largest, in base64, with room for comments.
pub const MAX_PEM_SIZE: usize = 2 * MAX_ROOTS * MAX_ROOT_SIZE;

/// The roots of one trust domain, at least one.
///
/// A value, never changed: a rotation makes another one and swaps it. A clone costs a reference count.
#[derive(Clone)]
pub struct TrustBundle(Arc<Roots>);

/// `certificates`, `anchors` and `validities` run in parallel.
struct Roots {
    trust_domain: TrustDomain,
    certificates: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    validities: Vec<Validity>,
    digest: Digest,
}

/// SHA-256 over the roots in order of their bytes: equal for the same set of roots, in whatever order they came.
///
/// Shown in hexadecimal. It is what nodes confirm, so that "has the new root" is a comparison.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    fn of(sorted: &[CertificateDer<'_>]) -> Self {
        // DER says its own length, so that no two different lists of roots are the same concatenation.
        let mut hash = digest::Context::new(&digest::SHA256);
        sorted.iter().for_each(|certificate| hash.update(certificate));
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hash.finish().as_ref());
        Digest(bytes)
    }

    /// The bytes of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl TrustBundle {
    /// Makes a bundle of root certificates in DER. The same root given twice counts once.
    ///
    /// # Errors
    /// Where there is none or too many, one is too large, does not parse, or is not a certificate authority.
    pub fn from_der(
        trust_domain: TrustDomain,
        certificates: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, BundleError> {
        let mut certificates: Vec<_> = certificates.into_iter().take(MAX_ROOTS + 1).collect();
        if certificates.is_empty() {
            return Err(BundleError::Empty);
        }
        if certificates.len() > MAX_ROOTS {
            return Err(BundleError::TooMany);
        }
        certificates.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        certificates.dedup();
        let mut anchors = Vec::with_capacity(certificates.len());
        let mut validities = Vec::with_capacity(certificates.len());
        for certificate in &certificates {
            let (anchor, validity) = check_root(certificate)?;
            anchors.push(anchor);
            validities.push(validity);
        }
        let digest = Digest::of(&certificates);
        Ok(TrustBundle(Arc::new(Roots { trust_domain, certificates, anchors, validities, digest })))
    }

    /// Makes a bundle of root certificates in PEM; text around them is ignored.
    ///
    /// # Errors
    /// As [`TrustBundle::from_der`], and where the text is too large or broken.
    pub fn from_pem(trust_domain: TrustDomain, text: &str) -> Result<Self, BundleError> {
        if text.len() > MAX_PEM_SIZE {
            return Err(BundleError::TooLarge);
        }
        let certificates = pem::decode_certificates(text).ok_or(BundleError::BadPem)?;
        Self::from_der(trust_domain, certificates)
    }

    /// The roots as PEM, in the order that [`Digest`] hashes.
    pub fn to_pem(&self) -> String {
        pem::encode_certificates(self.roots())
    }

    /// The trust domain that the roots vouch for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The root certificates as DER.
    pub fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.0.certificates.iter()
    }

    /// What tells this set of roots from every other.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// The roots as webpki takes them.
    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.0.anchors
    }

    /// Until when, after `now`, none of the roots expires.
    pub(crate) fn constant_until(&self, now: UnixTime) -> UnixTime {
        let ends = self.0.validities.iter().map(|validity| validity.not_after());
        ends.filter(|end| *end >= now).min().unwrap_or(now)
    }

    /// When the root behind `anchor` is valid; where several roots share its name and key, one answer for each.
    pub(crate) fn validities_of(&self, anchor: &TrustAnchor<'_>) -> impl Iterator<Item = &Validity> {
        let pairs = self.0.anchors.iter().zip(&self.0.validities);
        pairs.filter(move |(own, _)| *own == anchor).map(|(_, validity)| validity)
    }
}

fn check_root(certificate: &CertificateDer<'static>) -> Result<(TrustAnchor<'static>, Validity), BundleError> {
    if certificate.len() > MAX_ROOT_SIZE {
        return Err(BundleError::RootTooLarge);
    }
    let facts = certificate::read(certificate).ok_or(BundleError::BadEncoding)?;
    if !facts.is_authority || facts.key_usage.is_some_and(|usage| !usage.certificate_signing) {
        return Err(BundleError::NotAnAuthority);
    }
    let anchor = webpki::anchor_from_trusted_cert(certificate).map_err(|_| BundleError::BadEncoding)?;
    Ok((anchor.to_owned(), facts.validity))
}

/// Two bundles are equal where they hold the same roots for the same trust domain.
impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.trust_domain() == other.trust_domain() && self.digest() == other.digest()
    }
}

impl Eq for TrustBundle {}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({}, {} roots, {})", self.trust_domain(), self.0.certificates.len(), self.digest())
    }
}

/// Why roots are not a bundle. Whoever reads them from somewhere adds where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BundleError {
    /// There is no certificate.
    #[error("the trust bundle has no certificate; it needs at least one root in PEM (BEGIN CERTIFICATE)")]
    Empty,
    /// There are more than [`MAX_ROOTS`].
    #[error("the trust bundle has more than {MAX_ROOTS} roots; remove those that are no longer used")]
    TooMany,
    /// The text is longer than [`MAX_PEM_SIZE`].
    #[error("the trust bundle is larger than {MAX_PEM_SIZE} bytes; give root certificates only")]
    TooLarge,
    /// A root is larger than [`MAX_ROOT_SIZE`].
    #[error("a root certificate in the trust bundle is larger than {MAX_ROOT_SIZE} bytes")]
    RootTooLarge,
    /// The PEM is broken.
    #[error("the trust bundle is not PEM: a section does not decode")]
    BadPem,
    /// A certificate does not parse.
    #[error("a certificate in the trust bundle is not a well-formed X.509 v3 certificate")]
    BadEncoding,
    /// A certificate is not a certificate authority (RFC 5280, sections 4.2.1.3 and 4.2.1.9).
    #[error(
        "a certificate in the trust bundle is not a certificate authority; give the root, not a workload's certificate"
    )]
    NotAnAuthority,
}
