//! TLS configurations: the only place that gives rustls a verifier.
//!
//! TLS 1.3 alone (RFC 8446). Each connection does a whole handshake: without tickets, resumption and early data there is
//! no second way in, and no replay. No server name is sent: the identity is in the certificate, and a name on the wire
//! would tell a listener who talks to whom.

use std::sync::{Arc, LazyLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ClientConfig, ConfigBuilder, DigitallySignedStruct, DistinguishedName, Error, ServerConfig};
use rustls::{ConfigSide, PeerMisbehaved, RootCertStore, SignatureScheme, SupportedProtocolVersion, WantsVerifier};
use rustls_pki_types::{CertificateDer, IpAddr, Ipv4Addr, ServerName, UnixTime};

use crate::bundle::TrustBundle;
use crate::pem::decode_certificates;
use crate::refusal::into_rustls;
pub use crate::refusal::{refusal, refusal_within};
use crate::spiffe::SpiffeId;
use crate::svid::Svid;
use crate::verify::{Role, VerifyError, verify};

/// The protocol between two workloads' proxies (RFC 7301).
pub const JUSTMTLS_1: &[u8] = b"justmtls/1";

/// HTTP/2, the protocol with the control plane (RFC 9113, section 3.2).
pub const H2: &[u8] = b"h2";

/// HTTP/1.1, which the API server speaks, too (RFC 7301).
pub const HTTP_1_1: &[u8] = b"http/1.1";

const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13];

/// For a workload that connects to another: shows its own certificate, and accepts exactly the identity `expected`.
pub fn client_config(
    svid: &Svid,
    bundle: &TrustBundle,
    expected: &SpiffeId,
    time: Arc<dyn TimeProvider>,
) -> Arc<ClientConfig> {
    let config = start(ClientConfig::builder_with_details(provider(), time))
        .dangerous()
        .with_custom_certificate_verifier(WorkloadVerifier::exactly(bundle, expected))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified_key())));
    finish_client(config, JUSTMTLS_1, true)
}

/// For a workload that others connect to: shows its own certificate, and accepts any workload of its trust domain.
///
/// A client without a certificate is refused. Which workload may talk to it is decided after the handshake.
pub fn server_config(svid: &Svid, bundle: &TrustBundle, time: Arc<dyn TimeProvider>) -> Arc<ServerConfig> {
    let config = start(ServerConfig::builder_with_details(provider(), time))
        .with_client_cert_verifier(WorkloadVerifier::anyone(bundle))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified_key())));
    finish_server(config, JUSTMTLS_1, true)
}

/// For a node that connects to the control plane, which must be exactly `expected`. The node shows no certificate: it
/// has none yet, and proves itself by a token on each call.
pub fn control_client_config(
    bundle: &TrustBundle,
    expected: &SpiffeId,
    time: Arc<dyn TimeProvider>,
) -> Arc<ClientConfig> {
    let config = start(ClientConfig::builder_with_details(provider(), time))
        .dangerous()
        .with_custom_certificate_verifier(WorkloadVerifier::exactly(bundle, expected))
        .with_no_client_auth();
    finish_client(config, H2, false)
}

/// For a caller of the cluster's API server, which proves itself under the roots in `bundle_pem` by the name that it is
/// called by, as any web server does. The caller proves itself by a token.
///
/// # Errors
/// The roots are none; one sentence.
pub fn api_client_config(bundle_pem: &str, time: Arc<dyn TimeProvider>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    for root in decode_certificates(bundle_pem).ok_or("it is no list of certificates in PEM")? {
        roots.add(root).map_err(|error| format!("a certificate in it is refused: {error}"))?;
    }
    if roots.is_empty() {
        return Err("there is no certificate in it".into());
    }
    let config =
        start(ClientConfig::builder_with_details(provider(), time)).with_root_certificates(roots).with_no_client_auth();
    Ok(finish_client(config, HTTP_1_1, false))
}

/// For the control plane: shows its certificate and asks for none.
pub fn control_server_config(svid: &Svid, time: Arc<dyn TimeProvider>) -> Arc<ServerConfig> {
    let config = start(ServerConfig::builder_with_details(provider(), time))
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified_key())));
    finish_server(config, H2, false)
}

/// The server name that rustls' client connections ask for. It is never sent, and no verifier here looks at it.
pub fn unnamed() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])))
}

/// The cryptography, in order of preference: hybrid post-quantum key exchange first (X25519MLKEM768,
/// draft-ietf-tls-ecdhe-mlkem), AES-128-GCM first, as it is the fastest where the processor has AES.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
            ..default_provider()
        })
    });
    PROVIDER.clone()
}

fn start<S: ConfigSide>(builder: ConfigBuilder<S, rustls::WantsVersions>) -> ConfigBuilder<S, WantsVerifier> {
    builder.with_protocol_versions(VERSIONS).expect("the provider above has suites and groups for TLS 1.3")
}

/// `records`: who has the connection seals and opens its records, and so is given the keys of the session.
fn finish_client(mut config: ClientConfig, protocol: &[u8], records: bool) -> Arc<ClientConfig> {
    config.enable_secret_extraction = records;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Arc::new(config)
}

fn finish_server(mut config: ServerConfig, protocol: &[u8], records: bool) -> Arc<ServerConfig> {
    config.enable_secret_extraction = records;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// Judges the certificates of the other side, on either side.
#[derive(Debug)]
struct WorkloadVerifier {
    bundle: TrustBundle,
    /// The one identity to accept; `None` accepts each of the bundle's trust domain.
    expected: Option<SpiffeId>,
}

impl WorkloadVerifier {
    fn exactly(bundle: &TrustBundle, expected: &SpiffeId) -> Arc<Self> {
        Arc::new(WorkloadVerifier { bundle: bundle.clone(), expected: Some(expected.clone()) })
    }

    fn anyone(bundle: &TrustBundle) -> Arc<Self> {
        Arc::new(WorkloadVerifier { bundle: bundle.clone(), expected: None })
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<(), Error> {
        let found = verify(&self.bundle, leaf, intermediates, role, now).map_err(into_rustls)?;
        match &self.expected {
            Some(expected) if *expected != found => {
                Err(into_rustls(VerifyError::WrongIdentity { expected: expected.clone(), found }))
            }
            _ => Ok(()),
        }
    }

    /// That the peer holds the key of its certificate (RFC 8446, section 4.4.3).
    fn check_signature(
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, leaf, signed, algorithms)
    }
}

/// A TLS 1.2 signature cannot come up in a TLS 1.3 handshake; were it to, it is a downgrade.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerMisbehaved::AttemptedDowngradeToTls12WhenTls13IsSupported.into())
}

impl ServerCertVerifier for WorkloadVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, intermediates, Role::Server, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for WorkloadVerifier {
    /// None: a workload has one certificate, and the names of our authorities are not for strangers.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(leaf, intermediates, Role::Client, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
