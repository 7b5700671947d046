//! A node's connection to the control plane: one TCP and TLS connection, and the calls on it.
//!
//! The control plane proves itself by its certificate, the node by a token on each call (D12). A connection that is lost
//! is not made again behind the caller's back: whoever needs one connects anew, with the bundle and the token as the
//! files have them then, and gives what it knows to the next stream.

mod address;
mod captures;
mod connect;
mod discovery;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use identity::{Refusal, SpiffeId};
use rustls::time_provider::TimeProvider;
use tokio::sync::Semaphore;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::proto::istio::ca;
use crate::proto::istio::ca::istio_certificate_service_client::IstioCertificateServiceClient;

pub use address::control_address;
pub use captures::Captures;
pub use discovery::Discovery;

/// The namespace of the control plane's identity.
pub const CONTROL_NAMESPACE: &str = "justmtls-system";
/// The service account of the control plane's identity.
pub const CONTROL_SERVICE_ACCOUNT: &str = "justmtls-control";

/// How long TCP and TLS may take until the connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the answer to a certificate request may take.
const CERTIFY: Duration = Duration::from_secs(10);
/// The largest message, in bytes: a full view of the largest mesh in a few of them.
pub(crate) const MAX_MESSAGE: usize = 64 * 1024 * 1024;
/// The largest answer to a certificate request, in bytes.
const MAX_CERTIFICATE: usize = 1024 * 1024;

/// Where the control plane is, and how to prove oneself to it.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    /// Its address and port.
    pub address: SocketAddr,
    /// PEM of the roots that vouch for it. Read on each connect.
    pub bundle_file: PathBuf,
    /// The token. Read on each connect; white space around it is ignored.
    pub token_file: PathBuf,
    /// The name of this node.
    pub node: String,
    /// Which process of the node this is.
    pub role: Role,
    /// The clock by which its certificate is judged.
    pub time: Arc<dyn TimeProvider>,
}

/// Which process of a node calls. Shown by the control plane; what it may do is decided by its token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The node's agent.
    Agent,
    /// The node's proxy.
    Proxy,
}

impl Role {
    /// The name in logs and dumps.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// A connection to the control plane. A clone is the same connection; it ends with the last clone and stream.
#[derive(Clone)]
pub struct Connected {
    channel: Channel,
    authorization: MetadataValue<Ascii>,
    address: SocketAddr,
    /// `node/role`, which the control plane shows.
    name: String,
    /// Places for requests of certificates: a control plane that was only just dialled refuses more calls at once than it takes, as
    /// it has not said yet how many those are.
    certifying: Arc<Semaphore>,
}

/// Requests of certificates at a time on one connection. With a stream each for what it follows and reports they are the most that
/// the control plane takes ([`crate::server`]).
const CERTIFY_AT_ONCE: usize = 6;

/// Why the control plane cannot be asked, or does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The bundle's file cannot be read.
    #[error("the trust bundle {} cannot be read: {source}", path.display())]
    BundleFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bundle's file holds no bundle.
    #[error("the trust bundle {} is refused: {source}", path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// Why.
        source: identity::bundle::BundleError,
    },
    /// The roots in the bundle's file do not say for which trust domain they are.
    #[error("the roots in {} do not name one trust domain (a URI spiffe://<trust domain> in each)", path.display())]
    NoTrustDomain {
        /// The file.
        path: PathBuf,
    },
    /// The token's file cannot be read, or holds no token.
    #[error("the token {} cannot be read: {source}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody answers, or not in time.
    #[error("the control plane at {address} does not answer: {because}")]
    Unreachable {
        /// Where it should be.
        address: SocketAddr,
        /// Why.
        because: String,
    },
    /// Whoever answers is not the control plane.
    #[error("the control plane at {address} is not believed, its certificate is refused: {refusal}")]
    Certificate {
        /// Where it is.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// The token stands for nobody, or for another process than may ask this.
    #[error("the control plane at {address} refuses the token: {because}")]
    TokenRefused {
        /// Where it is.
        address: SocketAddr,
        /// What it says.
        because: String,
    },
    /// It understood and refuses.
    #[error("the control plane at {address} refuses: {because}")]
    Refused {
        /// Where it is.
        address: SocketAddr,
        /// What it says.
        because: String,
    },
    /// The stream is over in the order of things, as its token is: the next one begins with the next token.
    #[error("the stream of the control plane at {address} is over: {because}")]
    Outdated {
        /// Where it was.
        address: SocketAddr,
        /// Why.
        because: String,
    },
    /// The connection or stream ended.
    #[error("the connection to the control plane at {address} ended: {because}")]
    Lost {
        /// Where it was.
        address: SocketAddr,
        /// Why.
        because: String,
    },
}

impl ClientError {
    /// The name in logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::BundleFile { .. } => "bundle-file",
            Self::Bundle { .. } => "bundle",
            Self::NoTrustDomain { .. } => "no-trust-domain",
            Self::TokenFile { .. } => "token-file",
            Self::Unreachable { .. } => "unreachable",
            Self::Certificate { .. } => "certificate",
            Self::TokenRefused { .. } => "token-refused",
            Self::Refused { .. } => "refused",
            Self::Outdated { .. } => "outdated",
            Self::Lost { .. } => "lost",
        }
    }

    /// Says it in the log: as something amiss, unless it is none.
    pub fn log(&self, failures: u32) {
        let reason = self.as_str();
        match self {
            Self::Outdated { .. } => tracing::info!(reason, "{self}"),
            _ => tracing::warn!(reason, failures, "{self}"),
        }
    }
}

impl Connected {
    /// Asks for a certificate for the key that signed `csr_pem`, as `id`, which is to be valid for so long; zero asks for the
    /// longest that the control plane gives. Returns PEM texts: the leaf, the intermediates, and last the roots.
    ///
    /// # Errors
    /// The control plane refuses, or is gone.
    pub async fn certify(&self, csr_pem: &str, id: &SpiffeId, validity: Duration) -> Result<Vec<String>, ClientError> {
        let identity = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(id.to_string())) };
        let message = ca::IstioCertificateRequest {
            csr: csr_pem.to_owned(),
            validity_duration: i64::try_from(validity.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(prost_types::Struct { fields: [(crate::IMPERSONATED.to_owned(), identity)].into() }),
        };
        // Nobody closes it.
        let _place = self.certifying.acquire().await;
        let mut client =
            IstioCertificateServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_CERTIFICATE);
        let mut request = self.request(message);
        request.set_timeout(CERTIFY);
        let answer = client.create_certificate(request).await.map_err(|status| self.failed(&status))?;
        Ok(answer.into_inner().cert_chain)
    }

    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    fn failed(&self, status: &Status) -> ClientError {
        let (address, because) = (self.address, status.message().to_owned());
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => ClientError::TokenRefused { address, because },
            Code::InvalidArgument | Code::FailedPrecondition | Code::ResourceExhausted | Code::NotFound => {
                ClientError::Refused { address, because }
            }
            Code::Aborted => ClientError::Outdated { address, because },
            _ if because.is_empty() => self.lost(status.code().description()),
            _ => ClientError::Lost { address, because },
        }
    }

    fn lost(&self, because: &str) -> ClientError {
        ClientError::Lost { address: self.address, because: because.to_owned() }
    }
}
