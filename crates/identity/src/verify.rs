//! The exact verifier: from the certificates that a peer showed to the identity that they prove.
//!
//! Sources: path validation, RFC 5280 section 6, by webpki; what a workload's certificate must look like, X509-SVID
//! sections 2 to 5 (<https://spiffe.io/docs/latest/spiffe-specs/x509-svid/>). Stricter than both: extended key usage
//! must be there, and an expired root vouches for nobody.

use rustls_pki_types::{CertificateDer, UnixTime};
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};

use crate::bundle::TrustBundle;
use crate::certificate::{self, Facts};
use crate::chain::MAX_CHAIN;
use crate::spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
use crate::tls;

/// The side of a handshake that the owner of a certificate is on. Its certificate must be meant for that side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It opened the connection.
    Client,
    /// It accepted the connection.
    Server,
}

/// Verifies a chain under a bundle at a time, and gives the identity that it proves.
///
/// `leaf` is the workload's certificate, `intermediates` what came behind it, in any order. The identity's trust domain
/// is the bundle's; which identity it is, and whether it may, is the caller's question.
///
/// # Errors
/// The first check that fails, by name.
pub fn verify(
    bundle: &TrustBundle,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    role: Role,
    now: UnixTime,
) -> Result<SpiffeId, VerifyError> {
    // Before any parsing or signature: the length decides how much work a stranger can ask for.
    if intermediates.len() >= MAX_CHAIN {
        return Err(VerifyError::ChainTooLong);
    }
    verify_path(bundle, leaf, intermediates, role, now)?;
    let facts = certificate::read(leaf).ok_or(VerifyError::BadEncoding)?;
    check_usage(&facts, role)?;
    let id = identity_of(&facts)?;
    if id.trust_domain() != bundle.trust_domain() {
        return Err(VerifyError::WrongTrustDomain { expected: bundle.trust_domain().clone(), found: id });
    }
    Ok(id)
}

/// Signatures, dates, constraints and purposes from the leaf to a root of the bundle.
fn verify_path(
    bundle: &TrustBundle,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    role: Role,
    now: UnixTime,
) -> Result<(), VerifyError> {
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    // A trust anchor is a name and a key, and path validation does not look at its dates (RFC 5280, section 6.1.1).
    // Asked for each path, so that one valid root among several with the same key is enough.
    let root_is_valid = |path: &VerifiedPath<'_>| {
        if bundle.validities_of(path.anchor()).any(|validity| validity.contains(now)) {
            return Ok(());
        }
        let not_after = bundle.validities_of(path.anchor()).map(|validity| validity.not_after()).max().unwrap_or(now);
        Err(webpki::Error::CertExpired { time: now, not_after })
    };
    EndEntityCert::try_from(leaf)?.verify_for_usage(
        tls::provider().signature_verification_algorithms.all,
        bundle.anchors(),
        intermediates,
        now,
        usage,
        None,
        Some(&root_is_valid),
    )?;
    Ok(())
}

/// What X509-SVID section 4 asks of a leaf, which path validation does not: a key for signatures that signs no
/// certificates, meant for this side of a handshake.
fn check_usage(facts: &Facts, role: Role) -> Result<(), VerifyError> {
    let Some(key_usage) = facts.key_usage else {
        return Err(VerifyError::WrongKeyUsage);
    };
    let for_role = match role {
        Role::Client => facts.for_clients,
        Role::Server => facts.for_servers,
    };
    let signs_others = facts.is_authority || key_usage.certificate_signing || key_usage.revocation_list_signing;
    if !key_usage.digital_signature || signs_others || !for_role {
        return Err(VerifyError::WrongKeyUsage);
    }
    Ok(())
}

/// The one URI among a certificate's names (X509-SVID, section 2). Other kinds of names prove nothing here.
pub(crate) fn identity_of(facts: &Facts) -> Result<SpiffeId, VerifyError> {
    match &facts.uris[..] {
        [] => Err(VerifyError::NoSpiffeId),
        [uri] => uri.parse().map_err(VerifyError::BadSpiffeId),
        _ => Err(VerifyError::SeveralUriNames),
    }
}

/// Why a chain does not prove the identity that it should.
///
/// What a certificate claims is shown only after its chain verified: an unverified name would be an attacker's text.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VerifyError {
    /// A certificate is not well-formed.
    #[error("a certificate of the peer is not well-formed X.509")]
    BadEncoding,
    /// More than [`MAX_CHAIN`] certificates.
    #[error("the peer's certificate chain is longer than {MAX_CHAIN} certificates")]
    ChainTooLong,
    /// No root of the trust bundle is above the certificate.
    #[error("the peer's certificate is not issued under a root of the trust bundle")]
    UnknownIssuer,
    /// A certificate, or the handshake itself, is signed by another key than it should be.
    #[error("a signature of the peer does not fit its certificate")]
    BadSignature,
    /// A certificate is signed by one that is not a certificate authority, or may not have that many below it.
    #[error("a certificate in the peer's chain signs another without being an authority for it")]
    NotAnAuthority,
    /// The time of a certificate in the chain, or of the root, is over.
    #[error("the peer's certificate expired at {} (Unix time), and it is {} now", not_after.as_secs(), now.as_secs())]
    Expired {
        /// The last second of validity.
        not_after: UnixTime,
        /// The time of the check.
        now: UnixTime,
    },
    /// The time of a certificate in the chain has not begun. Clocks may differ.
    #[error("the peer's certificate is valid from {} (Unix time) only, and it is {} now: compare the nodes' clocks",
        not_before.as_secs(), now.as_secs())]
    NotYetValid {
        /// The first second of validity.
        not_before: UnixTime,
        /// The time of the check.
        now: UnixTime,
    },
    /// Key usage, extended key usage or basic constraints do not fit a workload on this side of a handshake.
    #[error("the peer's certificate is not meant for this side of a handshake (key usage)")]
    WrongKeyUsage,
    /// There is no URI among the certificate's names.
    #[error("the peer's certificate has no SPIFFE ID")]
    NoSpiffeId,
    /// There is more than one URI among the certificate's names.
    #[error("the peer's certificate has more than one URI among its names")]
    SeveralUriNames,
    /// The one URI is not a workload's SPIFFE ID.
    #[error("the URI in the peer's certificate is not a workload's SPIFFE ID: {0}")]
    BadSpiffeId(SpiffeIdError),
    /// The identity is of another trust domain than the bundle that its chain verified under.
    #[error("the peer is {found}, which is not of the trust domain {expected}")]
    WrongTrustDomain {
        /// The bundle's trust domain.
        expected: TrustDomain,
        /// The identity that the certificate has.
        found: SpiffeId,
    },
    /// The identity is another than the one that had to be there.
    #[error("the peer is {found}, and {expected} was expected")]
    WrongIdentity {
        /// The identity that had to be there.
        expected: SpiffeId,
        /// The identity that was there.
        found: SpiffeId,
    },
    /// Any other rule of path validation: an unknown critical extension, a name constraint, an unsupported algorithm.
    #[error("the peer's certificate chain breaks a rule of X.509 path validation: {0}")]
    PathValidation(String),
}

impl VerifyError {
    /// The name of the reason, for logs, metrics and documentation.
    pub fn as_str(&self) -> &'static str {
        match self {
            VerifyError::BadEncoding => "bad-encoding",
            VerifyError::ChainTooLong => "chain-too-long",
            VerifyError::UnknownIssuer => "unknown-issuer",
            VerifyError::BadSignature => "bad-signature",
            VerifyError::NotAnAuthority => "not-an-authority",
            VerifyError::Expired { .. } => "expired",
            VerifyError::NotYetValid { .. } => "not-yet-valid",
            VerifyError::WrongKeyUsage => "wrong-key-usage",
            VerifyError::NoSpiffeId => "no-spiffe-id",
            VerifyError::SeveralUriNames => "several-uri-names",
            VerifyError::BadSpiffeId(_) => "bad-spiffe-id",
            VerifyError::WrongTrustDomain { .. } => "wrong-trust-domain",
            VerifyError::WrongIdentity { .. } => "wrong-identity",
            VerifyError::PathValidation(_) => "path-validation",
        }
    }
}

impl From<webpki::Error> for VerifyError {
    fn from(error: webpki::Error) -> Self {
        use webpki::Error as E;
        match error {
            E::BadDer | E::BadDerTime | E::TrailingData(_) | E::UnsupportedCertVersion => VerifyError::BadEncoding,
            E::UnknownIssuer => VerifyError::UnknownIssuer,
            E::InvalidSignatureForPublicKey | E::SignatureAlgorithmMismatch => VerifyError::BadSignature,
            E::CertExpired { time, not_after } => VerifyError::Expired { not_after, now: time },
            E::CertNotValidYet { time, not_before } => VerifyError::NotYetValid { not_before, now: time },
            E::EndEntityUsedAsCa | E::PathLenConstraintViolated => VerifyError::NotAnAuthority,
            E::CaUsedAsEndEntity | E::EmptyEkuExtension | E::RequiredEkuNotFoundContext(_) => {
                VerifyError::WrongKeyUsage
            }
            E::MaximumPathDepthExceeded | E::MaximumPathBuildCallsExceeded | E::MaximumSignatureChecksExceeded => {
                VerifyError::ChainTooLong
            }
            other => VerifyError::PathValidation(other.to_string()),
        }
    }
}
