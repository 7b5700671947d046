//! From files and an address to a connection.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use identity::{SpiffeId, TrustBundle, TrustDomain, tls};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    CERTIFY_AT_ONCE, CONNECT, CONTROL_NAMESPACE, CONTROL_SERVICE_ACCOUNT, ClientError, Connected, ControlPlane,
};

/// A control plane that went without a word is noticed within two of these.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Flow control windows of HTTP/2: a full view does not wait for a round trip per 64 KiB.
const WINDOW: u32 = 4 * 1024 * 1024;
/// The longest token, in bytes; a service account's has about 1,000.
const MAX_TOKEN: usize = 8 * 1024;

impl ControlPlane {
    /// Connects: TCP, then TLS with the control plane's own SPIFFE ID, then HTTP/2.
    ///
    /// # Errors
    /// One sentence that names the file or the address, and what is wrong with it.
    pub async fn connect(&self) -> Result<Connected, ClientError> {
        let authorization = self.read_token()?;
        let bundle = self.read_bundle()?;
        let stream = timeout(CONNECT, self.handshake(&bundle))
            .await
            .unwrap_or_else(|_| Err(self.unreachable(&format!("no connection within {} s", CONNECT.as_secs()))))?;
        let channel = over(stream).await.map_err(|error| self.unreachable(&error.to_string()))?;
        let name = format!("{}/{}", self.node, self.role.as_str());
        let certifying = Arc::new(Semaphore::new(CERTIFY_AT_ONCE));
        Ok(Connected { channel, authorization, address: self.address, name, certifying })
    }

    fn read_token(&self) -> Result<MetadataValue<Ascii>, ClientError> {
        let failed = |source| ClientError::TokenFile { path: self.token_file.clone(), source };
        let text = std::fs::read_to_string(&self.token_file).map_err(failed)?;
        let token = text.trim();
        let invalid = || failed(io::Error::new(io::ErrorKind::InvalidData, "it holds no token"));
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(invalid());
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| invalid())?;
        // Kept out of Debug output and out of the header compression's table.
        value.set_sensitive(true);
        Ok(value)
    }

    fn read_bundle(&self) -> Result<TrustBundle, ClientError> {
        read_bundle(&self.bundle_file)
    }

    async fn handshake(&self, bundle: &TrustBundle) -> Result<TlsStream<TcpStream>, ClientError> {
        let expected = SpiffeId::new(bundle.trust_domain(), CONTROL_NAMESPACE, CONTROL_SERVICE_ACCOUNT)
            .map_err(|error| self.unreachable(&error.to_string()))?;
        let config = tls::control_client_config(bundle, &expected, self.time.clone());
        let tcp = TcpStream::connect(self.address).await.map_err(|error| self.unreachable(&error.to_string()))?;
        // Each acknowledgement is a small message of its own.
        tcp.set_nodelay(true).map_err(|error| self.unreachable(&error.to_string()))?;
        let tls = TlsConnector::from(config).connect(tls::unnamed(), tcp).await;
        tls.map_err(|error| match tls::refusal_within(&error) {
            Some(refusal) => ClientError::Certificate { address: self.address, refusal },
            None => self.unreachable(&error.to_string()),
        })
    }

    fn unreachable(&self, because: &str) -> ClientError {
        ClientError::Unreachable { address: self.address, because: because.to_owned() }
    }
}

/// HTTP/2 over a connection that stands. It is used once: when it ends, the channel has ended.
async fn over(stream: TlsStream<TcpStream>) -> Result<Channel, tonic::transport::Error> {
    let stream = Arc::new(Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = stream.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream)
    });
    // The URI names nothing: the connection is already there.
    Endpoint::from_static("http://control-plane")
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector(connector)
        .await
}

fn read_bundle(path: &Path) -> Result<TrustBundle, ClientError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ClientError::BundleFile { path: path.to_owned(), source })?;
    let refused = |source| ClientError::Bundle { path: path.to_owned(), source };
    // Which trust domain the roots are for is written in them (X509-SVID, section 3.2). The file is ours to trust:
    // whoever can write it can put in roots of his own.
    let unnamed: TrustDomain = "unnamed".parse().map_err(|_| ClientError::NoTrustDomain { path: path.to_owned() })?;
    let roots = TrustBundle::from_pem(unnamed, &text).map_err(refused)?;
    let mut domains = roots.roots().map(|root| trust_domain_of(root));
    let first = domains.next().flatten();
    match first {
        Some(domain) if domains.all(|other| other.as_ref() == Some(&domain)) => {
            TrustBundle::from_der(domain, roots.roots().cloned()).map_err(refused)
        }
        _ => Err(ClientError::NoTrustDomain { path: path.to_owned() }),
    }
}

/// The trust domain in a root's one URI.
fn trust_domain_of(root: &[u8]) -> Option<TrustDomain> {
    let (_, certificate) = X509Certificate::from_der(root).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.strip_prefix("spiffe://")?.parse().ok(),
        _ => None,
    }
}
