//! What a certificate says: the fields that the decisions of this crate read.
//!
//! Chains are verified by webpki, which is strict about DER and answers "does it chain?". It does not tell validity,
//! key usage or broken names; those are read here. Nothing here is a statement of trust: a fact counts only once
//! [`crate::verify`] has seen the chain.

use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::validity::Validity;

/// The context tag of a URI among a certificate's names (RFC 5280, section 4.2.1.6).
const URI_TAG: u32 = 6;

/// Facts of one certificate.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) validity: Validity,
    /// The SubjectPublicKeyInfo as DER.
    pub(crate) public_key_info: Vec<u8>,
    /// Basic constraints say that it is an authority.
    pub(crate) is_authority: bool,
    /// Key usage, if the extension is there.
    pub(crate) key_usage: Option<KeyUsage>,
    /// Extended key usage names server authentication.
    pub(crate) for_servers: bool,
    /// Extended key usage names client authentication.
    pub(crate) for_clients: bool,
    /// Every URI among the subject alternative names, in order.
    pub(crate) uris: Vec<String>,
}

/// The bits of key usage that decide something (RFC 5280, section 4.2.1.3).
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyUsage {
    pub(crate) digital_signature: bool,
    pub(crate) certificate_signing: bool,
    pub(crate) revocation_list_signing: bool,
}

/// Reads the facts; `None` where the bytes are not one well-formed certificate, or an extension is there twice.
pub(crate) fn read(der: &CertificateDer<'_>) -> Option<Facts> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let key_usage = certificate.key_usage().ok()?.map(|extension| KeyUsage {
        digital_signature: extension.value.digital_signature(),
        certificate_signing: extension.value.key_cert_sign(),
        revocation_list_signing: extension.value.crl_sign(),
    });
    let extended = certificate.extended_key_usage().ok()?;
    Some(Facts {
        validity: read_validity(&certificate)?,
        public_key_info: certificate.public_key().raw.to_vec(),
        is_authority: certificate.basic_constraints().ok()?.is_some_and(|extension| extension.value.ca),
        key_usage,
        for_servers: extended.as_ref().is_some_and(|extension| extension.value.server_auth),
        for_clients: extended.as_ref().is_some_and(|extension| extension.value.client_auth),
        uris: read_uris(&certificate)?,
    })
}

/// When all of these certificates are valid: a leaf is worth nothing once what signed it has expired. `None` where one
/// is not well-formed, or there is none.
pub(crate) fn validity_of(chain: &[CertificateDer<'_>]) -> Option<Validity> {
    let mut validities = chain.iter().map(|certificate| Some(read(certificate)?.validity));
    let first = validities.next()??;
    validities.try_fold(first, |all, next| Some(all.intersection(&next?)))
}

fn read_validity(certificate: &X509Certificate<'_>) -> Option<Validity> {
    let time = |timestamp: i64| Some(UnixTime::since_unix_epoch(Duration::from_secs(timestamp.try_into().ok()?)));
    let validity = certificate.validity();
    Some(Validity::new(time(validity.not_before.timestamp())?, time(validity.not_after.timestamp())?))
}

fn read_uris(certificate: &X509Certificate<'_>) -> Option<Vec<String>> {
    let Some(names) = certificate.subject_alternative_name().ok()? else {
        return Some(Vec::new());
    };
    let mut uris = Vec::new();
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            // A URI that does not decode must not be skipped: "exactly one URI" would then mean "one that I could read".
            GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => return None,
            _ => {}
        }
    }
    Some(uris)
}
