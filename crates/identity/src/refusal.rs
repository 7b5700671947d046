//! Why a handshake did not succeed, by name, whichever side noticed.
//!
//! rustls reports errors in its own terms and picks the alert that the other side sees from them. `into_rustls` goes
//! in, so that the alert is the fitting one; [`refusal`] comes back out, so that the name is not lost on our side.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, OtherError, PeerIncompatible, PeerMisbehaved};
use rustls::{Error as TlsError, InvalidMessage};
use thiserror::Error;

use crate::verify::VerifyError;

/// Why there is no verified peer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The peer's certificates do not prove the identity that they should.
    #[error(transparent)]
    Certificate(#[from] VerifyError),
    /// The client has no certificate, and a workload must have one.
    #[error("the client showed no certificate")]
    NoClientCertificate,
    /// The other side does not speak TLS 1.3.
    #[error("the peer does not speak TLS 1.3")]
    TlsVersion,
    /// The two sides do not speak the same protocol inside TLS (RFC 7301).
    #[error("the peer does not speak the expected protocol inside TLS (ALPN)")]
    Alpn,
    /// The two sides have no key exchange, cipher suite or signature scheme in common.
    #[error("the peer has no cryptographic parameters in common with us: {0}")]
    Parameters(String),
    /// The other side refused us, and this alert is all that it says (RFC 8446, section 6.2).
    #[error("the peer refused the handshake: {alert:?}")]
    PeerRefused {
        /// The alert that it sent.
        alert: AlertDescription,
    },
    /// What the other side sends is not TLS as it should be.
    #[error("the peer broke the TLS protocol: {0}")]
    Protocol(String),
    /// The handshake is not over: there is nothing to judge yet. A mistake of the caller.
    #[error("the handshake is not finished")]
    Unfinished,
    /// Our own side failed: no randomness, no time, a wrong configuration.
    #[error("TLS failed on our side: {0}")]
    Internal(String),
}

impl Refusal {
    /// The name of the reason, for logs, metrics and documentation.
    pub fn as_str(&self) -> &'static str {
        match self {
            Refusal::Certificate(error) => error.as_str(),
            Refusal::NoClientCertificate => "no-client-certificate",
            Refusal::TlsVersion => "tls-version",
            Refusal::Alpn => "alpn",
            Refusal::Parameters(_) => "tls-parameters",
            Refusal::PeerRefused { .. } => "peer-refused",
            Refusal::Protocol(_) => "tls-protocol",
            Refusal::Unfinished => "handshake-unfinished",
            Refusal::Internal(_) => "tls-internal",
        }
    }
}

/// The named reason behind an error of rustls.
///
/// Version and protocol have one name, whether our side noticed or the other said so by alert. Every other alert stays
/// the peer's word.
pub fn refusal(error: &TlsError) -> Refusal {
    match error {
        TlsError::InvalidCertificate(error) => Refusal::Certificate(from_rustls(error)),
        // A certificate message beyond rustls' own limit (64 KiB) is a chain that is too long, only more so.
        TlsError::InvalidMessage(InvalidMessage::CertificatePayloadTooLarge) => VerifyError::ChainTooLong.into(),
        TlsError::NoCertificatesPresented => Refusal::NoClientCertificate,
        TlsError::NoApplicationProtocol
        | TlsError::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol)
        | TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) => Refusal::Alpn,
        TlsError::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::ServerDoesNotSupportTls12Or13,
        )
        | TlsError::PeerMisbehaved(
            PeerMisbehaved::SelectedTls12UsingTls13VersionExtension
            | PeerMisbehaved::AttemptedDowngradeToTls12WhenTls13IsSupported,
        )
        | TlsError::AlertReceived(AlertDescription::ProtocolVersion) => Refusal::TlsVersion,
        TlsError::AlertReceived(alert) => Refusal::PeerRefused { alert: *alert },
        TlsError::PeerIncompatible(why) => Refusal::Parameters(format!("{why:?}")),
        TlsError::PeerMisbehaved(_)
        | TlsError::InvalidMessage(_)
        | TlsError::InappropriateMessage { .. }
        | TlsError::InappropriateHandshakeMessage { .. }
        | TlsError::InvalidEncryptedClientHello(_)
        | TlsError::PeerSentOversizedRecord
        | TlsError::DecryptError => Refusal::Protocol(error.to_string()),
        _ => Refusal::Internal(error.to_string()),
    }
}

/// The named reason behind an error that wraps one of rustls, as those of an I/O stream over TLS do; `None` where there
/// is no TLS in it.
pub fn refusal_within(error: &(dyn StdError + 'static)) -> Option<Refusal> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<TlsError>() {
            return Some(refusal(error));
        }
        // An I/O error's `source()` is that of the error within it, which would pass over exactly what is looked for.
        next = match error.downcast_ref::<io::Error>() {
            Some(error) => error.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

/// The error to give to rustls, chosen for the alert that it makes of it (RFC 8446, section 6.2).
///
/// Where rustls has a variant of the same meaning and content, that one. Else ours within `Other`, which becomes
/// `certificate_unknown`: a stranger learns that it was refused, not which identity was expected.
pub(crate) fn into_rustls(error: VerifyError) -> TlsError {
    TlsError::InvalidCertificate(match error {
        VerifyError::BadEncoding => CertificateError::BadEncoding,
        VerifyError::UnknownIssuer => CertificateError::UnknownIssuer,
        VerifyError::BadSignature => CertificateError::BadSignature,
        VerifyError::WrongKeyUsage => CertificateError::InvalidPurpose,
        VerifyError::Expired { not_after, now } => CertificateError::ExpiredContext { time: now, not_after },
        VerifyError::NotYetValid { not_before, now } => CertificateError::NotValidYetContext { time: now, not_before },
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

/// The way back from [`into_rustls`], and from what rustls itself finds (the signature over the handshake).
fn from_rustls(error: &CertificateError) -> VerifyError {
    match error {
        CertificateError::BadEncoding => VerifyError::BadEncoding,
        CertificateError::UnknownIssuer => VerifyError::UnknownIssuer,
        CertificateError::BadSignature => VerifyError::BadSignature,
        CertificateError::InvalidPurpose => VerifyError::WrongKeyUsage,
        CertificateError::ExpiredContext { time, not_after } => {
            VerifyError::Expired { not_after: *not_after, now: *time }
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            VerifyError::NotYetValid { not_before: *not_before, now: *time }
        }
        CertificateError::Other(OtherError(error)) => match error.downcast_ref::<VerifyError>() {
            Some(error) => error.clone(),
            None => VerifyError::PathValidation(error.to_string()),
        },
        other => VerifyError::PathValidation(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls_pki_types::UnixTime;

    use super::*;
    use crate::spiffe::SpiffeIdError;

    fn each_verify_error() -> Vec<(VerifyError, AlertDescription)> {
        let time = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let id: crate::SpiffeId = "spiffe://a/ns/b/sa/c".parse().unwrap();
        vec![
            (VerifyError::BadEncoding, AlertDescription::BadCertificate),
            (VerifyError::ChainTooLong, AlertDescription::CertificateUnknown),
            (VerifyError::UnknownIssuer, AlertDescription::UnknownCA),
            (VerifyError::BadSignature, AlertDescription::DecryptError),
            (VerifyError::NotAnAuthority, AlertDescription::CertificateUnknown),
            (VerifyError::Expired { not_after: time(1), now: time(2) }, AlertDescription::CertificateExpired),
            (VerifyError::NotYetValid { not_before: time(2), now: time(1) }, AlertDescription::CertificateExpired),
            (VerifyError::WrongKeyUsage, AlertDescription::UnsupportedCertificate),
            (VerifyError::NoSpiffeId, AlertDescription::CertificateUnknown),
            (VerifyError::SeveralUriNames, AlertDescription::CertificateUnknown),
            (VerifyError::BadSpiffeId(SpiffeIdError::Path), AlertDescription::CertificateUnknown),
            (
                VerifyError::WrongTrustDomain { expected: "x".parse().unwrap(), found: id.clone() },
                AlertDescription::CertificateUnknown,
            ),
            (VerifyError::WrongIdentity { expected: id.clone(), found: id }, AlertDescription::CertificateUnknown),
            (VerifyError::PathValidation("a rule".into()), AlertDescription::CertificateUnknown),
        ]
    }

    #[test]
    fn every_reason_comes_back_from_rustls_whole_and_tells_the_peer_an_alert() {
        for (error, alert) in each_verify_error() {
            let through = into_rustls(error.clone());
            assert_eq!(refusal(&through), Refusal::Certificate(error));
            let TlsError::InvalidCertificate(certificate) = through else { panic!("another kind of error") };
            assert_eq!(AlertDescription::from(certificate), alert);
        }
    }

    #[test]
    fn names_are_kebab_case_and_different() {
        let mut names: Vec<_> = each_verify_error().iter().map(|(error, _)| error.as_str()).collect();
        let own = [Refusal::NoClientCertificate, Refusal::TlsVersion, Refusal::Alpn, Refusal::Unfinished];
        names.extend(own.iter().map(Refusal::as_str));
        let carrying = [Refusal::Parameters, Refusal::Protocol, Refusal::Internal];
        names.extend(carrying.map(|refusal| refusal(String::new()).as_str()));
        names.push(Refusal::PeerRefused { alert: AlertDescription::UnknownCA }.as_str());
        assert!(names.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn version_and_protocol_have_one_name_whoever_noticed() {
        let seen = TlsError::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired);
        assert_eq!(refusal(&seen), refusal(&TlsError::AlertReceived(AlertDescription::ProtocolVersion)));
        let told = TlsError::AlertReceived(AlertDescription::NoApplicationProtocol);
        assert_eq!(refusal(&TlsError::NoApplicationProtocol), refusal(&told));
    }

    #[test]
    fn a_reason_is_found_within_the_errors_of_a_stream() {
        #[derive(Debug, Error)]
        #[error("connecting failed")]
        struct Connect(#[source] io::Error);

        let inner = io::Error::new(io::ErrorKind::InvalidData, into_rustls(VerifyError::NoSpiffeId));
        let twice = io::Error::other(inner);
        assert_eq!(refusal_within(&Connect(twice)), Some(VerifyError::NoSpiffeId.into()));
        assert_eq!(refusal_within(&io::Error::other("cable cut")), None);
        assert_eq!(refusal_within(&io::Error::from(io::ErrorKind::ConnectionReset)), None);
    }
}
