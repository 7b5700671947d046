//! Somebody who signs what the crate's own issuer would not, and sends what its configurations would not.

use std::time::Duration;

use identity::Chain;
use identity::issuer::Intermediate;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;

use crate::mesh::{DAY, HOUR, NOW};

/// A signer, with the chain that a peer needs above what it signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
}

/// A certificate with the chain above it, and its key.
pub(crate) struct Forged {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: KeyPair,
}

impl Authority {
    /// Whoever got hold of a mesh's intermediate.
    pub(crate) fn thief_of(intermediate: &Intermediate) -> Self {
        let pem = intermediate.to_pem().unwrap();
        let chain = Chain::from_pem(&pem.chain).unwrap().certificates().to_vec();
        let key = KeyPair::from_pem(&pem.key).unwrap();
        Authority { issuer: Issuer::from_ca_cert_der(&chain[0], key).unwrap(), chain }
    }

    /// An authority of its own, as a root.
    pub(crate) fn root(parameters: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap().der().clone();
        Authority { issuer: Issuer::new(parameters, key), chain: vec![certificate] }
    }

    /// The certificate of this authority itself.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.chain[0].clone()
    }

    /// Signs for a new key.
    pub(crate) fn sign(&self, parameters: &CertificateParams) -> Forged {
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap().der().clone();
        let mut chain = vec![certificate];
        chain.extend_from_slice(&self.chain);
        Forged { chain, key }
    }

    /// Makes what it signs an authority in turn, whether or not that may be one.
    pub(crate) fn delegate(&self, parameters: CertificateParams) -> Authority {
        let forged = self.sign(&parameters);
        Authority { issuer: Issuer::new(parameters, forged.key), chain: forged.chain }
    }
}

/// The parameters of a workload's certificate as it should be, to be bent by the test.
pub(crate) fn workload(uris: &[&str]) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    valid(&mut parameters, NOW - HOUR, NOW + DAY);
    parameters
}

/// The parameters of an authority, to be bent by the test.
pub(crate) fn authority(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid(&mut parameters, NOW - HOUR, NOW + DAY);
    parameters
}

/// Sets the dates.
pub(crate) fn valid(parameters: &mut CertificateParams, not_before: u64, not_after: u64) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    parameters.not_before = epoch + Duration::from_secs(not_before);
    parameters.not_after = epoch + Duration::from_secs(not_after);
}
