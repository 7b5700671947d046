//! The certificate authority: a root signs an intermediate, the intermediate signs workloads.
//!
//! Only the intermediate's key is ever written down. The root's lives as long as the call that needed it.
//!
//! Profile: RFC 5280 section 4, and X509-SVID sections 3 and 4.

use std::fmt;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::bundle::{BundleError, TrustBundle};
use crate::certificate;
use crate::chain::{Chain, ChainError, MAX_CHAIN};
use crate::csr::PublicKeyOfRequest;
use crate::key::{KeyError, PrivateKey, Signer};
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::validity::{Validity, earlier, later};
use crate::verify::{Role, VerifyError, verify};

/// How far before its issue a certificate is valid, at most, so that a peer whose clock is behind accepts it at once.
const BACKDATE: Duration = Duration::from_secs(60);

/// The part of a life that backdating may add. Bounded, because renewal begins at half of a certificate's whole life: a
/// short life behind a long past would be half over when it begins.
const BACKDATE_SHARE: u32 = 10;

/// The top of a trust domain. Made, used for an intermediate, and dropped.
pub struct Root {
    trust_domain: TrustDomain,
    key: PrivateKey,
    certificate: CertificateDer<'static>,
    validity: Validity,
}

impl Root {
    /// Makes a root for a trust domain, valid from `now` (backdated) for `lifetime`.
    ///
    /// # Errors
    /// Where the lifetime is below a second, or the cryptographic library fails.
    pub fn generate(trust_domain: &TrustDomain, now: UnixTime, lifetime: Duration) -> Result<Self, IssueError> {
        let key = PrivateKey::generate()?;
        let validity = span(now, lifetime, None)?;
        let parameters = authority("root", trust_domain, validity, 1)?;
        let certificate = parameters.self_signed(&Signer(&key)).map_err(|_| IssueError::Sign)?.der().clone();
        Ok(Root { trust_domain: trust_domain.clone(), key, certificate, validity })
    }

    /// The bundle of this root alone.
    ///
    /// # Errors
    /// None that a root made here can cause; the type says what a bundle checks.
    pub fn bundle(&self) -> Result<TrustBundle, BundleError> {
        TrustBundle::from_der(self.trust_domain.clone(), [self.certificate.clone()])
    }

    /// Makes an intermediate with a key of its own, valid from `now` (backdated) for `lifetime` and never beyond the root.
    ///
    /// # Errors
    /// Where the root is not valid now, the lifetime is below a second, or the cryptographic library fails.
    pub fn issue_intermediate(&self, now: UnixTime, lifetime: Duration) -> Result<Intermediate, IssueError> {
        let key = PrivateKey::generate()?;
        let validity = span(now, lifetime, Some(&self.validity))?;
        let parameters = authority("intermediate", &self.trust_domain, validity, 0)?;
        let certificate = sign(parameters, &Signer(&key), &self.certificate, &self.key)?;
        Ok(Intermediate { trust_domain: self.trust_domain.clone(), key, chain: vec![certificate], validity })
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({}, valid {:?}, key redacted)", self.trust_domain, self.validity)
    }
}

/// The authority that is online: certifies workloads of its trust domain.
pub struct Intermediate {
    trust_domain: TrustDomain,
    key: PrivateKey,
    /// Its own certificate first, then those between it and the root, if any.
    chain: Vec<CertificateDer<'static>>,
    validity: Validity,
}

/// An intermediate as text, to be kept. The key is wiped when dropped.
pub struct IntermediatePem {
    /// Its certificate chain, without the root.
    pub chain: String,
    /// Its private key in PKCS #8.
    pub key: Zeroizing<String>,
}

impl Intermediate {
    /// The intermediate as PEM.
    ///
    /// # Errors
    /// Where the cryptographic library fails.
    pub fn to_pem(&self) -> Result<IntermediatePem, KeyError> {
        let key = self.key.to_pem()?;
        Ok(IntermediatePem { chain: crate::pem::encode_certificates(&self.chain), key })
    }

    /// Reads an intermediate that was kept, and proves that what it would sign is accepted under the bundle now.
    ///
    /// # Errors
    /// One sentence for the first thing that does not fit. Whoever read the texts adds from where.
    pub fn from_pem(chain: &str, key: &str, bundle: &TrustBundle, now: UnixTime) -> Result<Self, IntermediateError> {
        let chain = Chain::from_pem(chain)?.without_roots(bundle);
        let key = PrivateKey::from_pem(key)?;
        if chain.certificates().len() >= MAX_CHAIN {
            return Err(ChainError::TooLong.into());
        }
        let own = certificate::read(chain.leaf()).ok_or(VerifyError::BadEncoding)?;
        if !own.is_authority || own.key_usage.is_some_and(|usage| !usage.certificate_signing) {
            return Err(IntermediateError::NotAnAuthority);
        }
        if own.public_key_info != key.public_key_info() {
            return Err(IntermediateError::KeyMismatch);
        }
        let validity = certificate::validity_of(chain.certificates()).ok_or(VerifyError::BadEncoding)?;
        let intermediate = Intermediate {
            trust_domain: bundle.trust_domain().clone(),
            key,
            chain: chain.certificates().to_vec(),
            validity,
        };
        intermediate.prove(bundle, now)?;
        Ok(intermediate)
    }

    /// Certifies a key that nobody keeps, and verifies the result as a peer would.
    fn prove(&self, bundle: &TrustBundle, now: UnixTime) -> Result<(), IntermediateError> {
        if now > self.validity.not_after() {
            return Err(VerifyError::Expired { not_after: self.validity.not_after(), now }.into());
        }
        if now < self.validity.not_before() {
            return Err(VerifyError::NotYetValid { not_before: self.validity.not_before(), now }.into());
        }
        let nobody = SpiffeId::new(&self.trust_domain, "proof", "proof").map_err(VerifyError::BadSpiffeId)?;
        let chain = self.certify(&nobody, &Signer(&PrivateKey::generate()?), now, Duration::from_secs(60))?;
        verify(bundle, chain.leaf(), &chain.certificates()[1..], Role::Server, now)?;
        Ok(())
    }

    /// Certifies that the workload holds the key, from `now` (backdated) for `lifetime` and never beyond the
    /// intermediate's own time.
    ///
    /// # Errors
    /// Where the workload is of another trust domain, the intermediate is not valid now, the lifetime is below a second,
    /// or the cryptographic library fails.
    pub fn sign(
        &self,
        workload: &WorkloadToCertify,
        key: &PublicKeyOfRequest,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<Chain, IssueError> {
        self.certify(&workload.0, key.public_key_info(), now, lifetime)
    }

    fn certify(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<Chain, IssueError> {
        if *id.trust_domain() != self.trust_domain {
            return Err(IssueError::ForeignWorkload { id: id.clone(), trust_domain: self.trust_domain.clone() });
        }
        let mut parameters = parameters(span(now, lifetime, Some(&self.validity))?)?;
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.subject_alt_names = vec![uri(id.as_str())?];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = sign(parameters, key, &self.chain[0], &self.key)?;
        let mut certificates = vec![leaf];
        certificates.extend_from_slice(&self.chain);
        Ok(Chain::from_der(certificates)?)
    }

    /// The trust domain whose workloads it certifies.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// When it is valid. It has to be replaced well before the end: no certificate outlives it.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }
}

impl fmt::Debug for Intermediate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Intermediate({}, valid {:?}, key redacted)", self.trust_domain, self.validity)
    }
}

/// A workload that may have a certificate: the control plane's word that the caller's token belongs to a node, and that
/// a live pod of this service account is on that node.
///
/// The authority signs for nothing else, so that the way from "somebody asks" to "somebody is certified" leads through
/// the one place that makes this value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadToCertify(SpiffeId);

impl WorkloadToCertify {
    /// Asserts that all checks on who asks have been made, and passed. Only the control plane's certificate service may
    /// say so, and once its own start, for its own identity.
    pub fn assertion(id: SpiffeId) -> Self {
        WorkloadToCertify(id)
    }

    /// Whom the certificate will name.
    pub fn id(&self) -> &SpiffeId {
        &self.0
    }
}

/// The time of a new certificate, within that of its issuer.
fn span(now: UnixTime, lifetime: Duration, issuer: Option<&Validity>) -> Result<Validity, IssueError> {
    if lifetime < Duration::from_secs(1) {
        return Err(IssueError::NoLifetime);
    }
    let wanted = Validity::new(earlier(now, BACKDATE.min(lifetime / BACKDATE_SHARE)), later(now, lifetime));
    let Some(issuer) = issuer else {
        return Ok(wanted);
    };
    if !issuer.contains(now) {
        return Err(IssueError::IssuerNotValid { validity: *issuer, now });
    }
    Ok(wanted.intersection(issuer))
}

/// What all certificates have: dates, a serial number, an empty subject, the identifier of the issuer's key.
fn parameters(validity: Validity) -> Result<CertificateParams, IssueError> {
    let mut parameters = CertificateParams::default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    parameters.not_before = epoch + Duration::from_secs(validity.not_before().as_secs());
    parameters.not_after = epoch + Duration::from_secs(validity.not_after().as_secs());
    parameters.serial_number = Some(serial_number()?);
    parameters.distinguished_name = DistinguishedName::new();
    parameters.use_authority_key_identifier_extension = true;
    Ok(parameters)
}

/// An authority with at most `below` authorities under it, named by its trust domain (X509-SVID, section 3.2).
fn authority(
    kind: &str,
    trust_domain: &TrustDomain,
    validity: Validity,
    below: u8,
) -> Result<CertificateParams, IssueError> {
    let mut parameters = parameters(validity)?;
    // An authority's subject is not empty (RFC 5280, section 4.1.2.6), and a part of the serial number makes it differ
    // from its predecessor's: chains are built by name.
    let serial = parameters.serial_number.as_ref().map(SerialNumber::to_bytes).unwrap_or_default();
    let suffix: String = serial.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    parameters.distinguished_name.push(DnType::CommonName, format!("justmtls {kind} {suffix}"));
    parameters.subject_alt_names = vec![uri(&trust_domain.to_uri())?];
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(parameters)
}

fn sign(
    parameters: CertificateParams,
    subject: &impl PublicKeyData,
    issuer: &CertificateDer<'_>,
    issuer_key: &PrivateKey,
) -> Result<CertificateDer<'static>, IssueError> {
    let issuer = Issuer::from_ca_cert_der(issuer, Signer(issuer_key)).map_err(|_| IssueError::Sign)?;
    Ok(parameters.signed_by(subject, &issuer).map_err(|_| IssueError::Sign)?.der().clone())
}

/// 128 random bits, positive (RFC 5280, section 4.1.2.2).
fn serial_number() -> Result<SerialNumber, IssueError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IssueError::Sign)?;
    Ok(SerialNumber::from_slice(&bytes))
}

fn uri(text: &str) -> Result<SanType, IssueError> {
    Ok(SanType::URI(text.try_into().map_err(|_| IssueError::Sign)?))
}

/// Why nothing was signed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IssueError {
    /// The workload is of a trust domain that this authority does not speak for.
    #[error("cannot certify {id}: this authority certifies workloads of the trust domain {trust_domain} only")]
    ForeignWorkload {
        /// Whom the certificate would have named.
        id: SpiffeId,
        /// The authority's trust domain.
        trust_domain: TrustDomain,
    },
    /// The issuer has expired, or is not valid yet.
    #[error("the issuing certificate is valid from {} to {} (Unix time), and it is {} now",
        validity.not_before().as_secs(), validity.not_after().as_secs(), now.as_secs())]
    IssuerNotValid {
        /// When the issuer is valid.
        validity: Validity,
        /// The time of the attempt.
        now: UnixTime,
    },
    /// The certificate would not be valid for a single second.
    #[error("a certificate's lifetime is at least one second")]
    NoLifetime,
    /// The chain above the leaf is too long.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The key cannot be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The cryptographic library failed.
    #[error("cannot sign a certificate: the cryptographic library failed")]
    Sign,
}

/// Why texts are not an intermediate that can be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IntermediateError {
    /// The certificates are not a chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The key is not one.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The first certificate is not an authority's.
    #[error("the intermediate certificate is not a certificate authority")]
    NotAnAuthority,
    /// The first certificate is about another key.
    #[error("the intermediate's private key does not belong to its certificate")]
    KeyMismatch,
    /// Nobody who has the bundle would accept what it signs.
    #[error("what the intermediate signs would not be accepted under the trust bundle: {0}")]
    Verify(#[from] VerifyError),
    /// It cannot sign.
    #[error("the intermediate cannot sign: {0}")]
    Sign(#[from] IssueError),
}
