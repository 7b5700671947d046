//! The control plane's end: accepts TLS connections and gives each call to a [`Handler`].
//!
//! A caller is a stranger until the handler has looked up its token: until then it costs one bounded connection, and nothing is
//! read of its streams and one small message of a request for a certificate. Places of strangers and of nodes are counted apart
//! ([`Bounds`]).

mod accept;
mod captures;
mod discovery;
mod strangers;

use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::client::MAX_MESSAGE;
use crate::proto::envoy::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::proto::istio::ca;
use crate::proto::istio::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use crate::proto::v1::reports_server::{Reports, ReportsServer};
use crate::proto::v1::{CaptureConfirmed, CaptureReport};

pub use accept::TurnedAway;
pub use captures::CaptureStream;
pub use discovery::DiscoveryStream;
pub use strangers::Bounds;

/// Calls at a time on one connection: discovery, report, and some certificates, of which a caller keeps more back itself. What a
/// stranger can make us hold grows with each.
const MAX_CALLS: u32 = 8;
/// A node that went without a word is noticed within two of these.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long open calls may take to end after a shutdown began.
const GRACE: Duration = Duration::from_secs(2);
/// Flow control windows of HTTP/2, per connection and stream: what a stranger can make us hold that is not taken in. It is the
/// least that a connection can have, and what nodes send is small.
const WINDOW: u32 = 65_535;
/// The largest request header list, in bytes: the longest token fits, which has 8 KiB.
const MAX_HEADERS: u32 = 10 * 1024;
/// The largest message with a certificate request, in bytes: it is read before the token is looked up. The CSR in it may have
/// 16 KiB, as whoever issues checks; one that is somewhat longer comes so far as to be refused by name.
const MAX_CERTIFICATE_REQUEST: usize = 24 * 1024;
/// The largest report, in bytes: some thousands of pods of one node.
const MAX_REPORT: usize = 1024 * 1024;
/// Responses that may wait for a slow reader.
const WAITING: usize = 4;

/// What the control plane does for nodes. Each call has a task of its own, which ends with the call.
pub trait Handler: Send + Sync + 'static {
    /// Whom an accepted token stands for. Connections of nodes are counted by it.
    type Known: Clone + Eq + Hash + Send + Sync + 'static;

    /// Looks up a token, before anything else of its call is looked at. Whoever it accepts is no stranger any more.
    fn authenticate(&self, caller: Caller) -> impl Future<Output = Result<Self::Known, Refused>> + Send;

    /// Whether a token that stood for `known` stands for nobody any more, or for somebody else. It stands where nobody can say.
    fn is_disowned(&self, caller: Caller, known: &Self::Known) -> impl Future<Output = bool> + Send;

    /// Serves a discovery stream until it ends.
    fn discovery(
        &self,
        caller: Self::Known,
        stream: DiscoveryStream,
    ) -> impl Future<Output = Result<(), Refused>> + Send;

    /// Answers a request for a certificate with PEM texts: the leaf, the intermediates, and last the roots.
    fn certify(
        &self,
        caller: Self::Known,
        request: CertificateRequest,
    ) -> impl Future<Output = Result<Vec<String>, Refused>> + Send;

    /// Takes the reports of a node until they end.
    fn captures(&self, caller: Self::Known, stream: CaptureStream) -> impl Future<Output = Result<(), Refused>> + Send;

    /// Takes note of a connection that was ended or refused.
    fn turned_away(&self, address: SocketAddr, because: TurnedAway);
}

/// Who calls, as far as the call shows.
#[derive(Clone)]
pub struct Caller {
    /// The bearer token; empty where there is none. It stands for nobody until it was looked up.
    pub token: String,
    /// Where it calls from. For logs.
    pub address: SocketAddr,
}

impl fmt::Debug for Caller {
    /// Without the token, which is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Caller({})", self.address)
    }
}

/// A request for a certificate. All of it is the caller's word.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertificateRequest {
    /// PKCS #10, in PEM.
    pub csr: String,
    /// `ImpersonatedIdentity`: the SPIFFE ID asked for; empty where there is none.
    pub identity: String,
    /// The validity asked for, in seconds.
    pub validity_seconds: i64,
}

/// A call that is refused, with one sentence for the caller.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// The token stands for nobody.
    #[error("{0}")]
    UnknownCaller(String),
    /// The caller may not ask this.
    #[error("{0}")]
    NotAllowed(String),
    /// What is asked for makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// The caller asks too often.
    #[error("{0}")]
    TooMany(String),
    /// Not now: try again.
    #[error("{0}")]
    Unavailable(String),
    /// What was begun is over in the order of things: begin anew.
    #[error("{0}")]
    Outdated(String),
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let code = match &refused {
            Refused::UnknownCaller(_) => Code::Unauthenticated,
            Refused::NotAllowed(_) => Code::PermissionDenied,
            Refused::BadRequest(_) => Code::InvalidArgument,
            Refused::TooMany(_) => Code::ResourceExhausted,
            Refused::Unavailable(_) => Code::Unavailable,
            Refused::Outdated(_) => Code::Aborted,
        };
        Status::new(code, refused.to_string())
    }
}

/// Serves on `listener` until `shutdown` completes. `config` is asked at each handshake, so that a renewed certificate
/// is shown from the next connection on. Streams that are open then end within `spread`, one by one.
///
/// # Errors
/// HTTP/2 could not be set up; a connection that fails affects only itself.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig> + Send + Sync + 'static,
    handler: Arc<H>,
    shutdown: impl Future<Output = ()> + Send,
    spread: Duration,
    bounds: Bounds,
) -> Result<(), tonic::transport::Error> {
    let (close, closing) = watch::channel(false);
    let service = Service { handler: handler.clone(), closing: closing.clone(), spread, trust: bounds.trust };
    let turned_away = move |address, because| handler.turned_away(address, because);
    let incoming = accept::incoming::<H::Known>(listener, config, bounds, turned_away, closing.clone());
    let mut stopped = closing.clone();
    let router = tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .concurrency_limit_per_connection(MAX_CALLS as usize)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_service(AggregatedDiscoveryServiceServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(
            IstioCertificateServiceServer::new(service.clone()).max_decoding_message_size(MAX_CERTIFICATE_REQUEST),
        )
        .add_service(ReportsServer::new(service).max_decoding_message_size(MAX_REPORT));
    let serving = router.serve_with_incoming_shutdown(incoming, async move {
        let _ = stopped.wait_for(|closed| *closed).await;
    });
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        result = &mut serving => return result,
        () = shutdown => {}
    }
    let _ = close.send(true);
    // Connections whose peers do not let go end with the process.
    tokio::time::timeout(GRACE + spread, serving).await.unwrap_or(Ok(()))
}

/// The gRPC services, each call of which becomes one of the handler's.
struct Service<H> {
    handler: Arc<H>,
    closing: watch::Receiver<bool>,
    /// Over which time streams end after that.
    spread: Duration,
    /// As in [`Bounds`].
    trust: Duration,
}

impl<H> Clone for Service<H> {
    fn clone(&self) -> Self {
        let Self { handler, closing, spread, trust } = self;
        Self { handler: handler.clone(), closing: closing.clone(), spread: *spread, trust: *trust }
    }
}

impl<H: Handler> Service<H> {
    /// Runs the task of a stream. What it returns ends the stream, and a shutdown does.
    fn run<T: Send + 'static>(
        &self,
        answers: mpsc::Sender<Result<T, Status>>,
        call: impl Future<Output = Result<(), Refused>> + Send + 'static,
    ) {
        let mut closing = self.closing.clone();
        let spread = self.spread;
        let end = async move {
            let _ = closing.wait_for(|closed| *closed).await;
            // Any number will do, if it is another one for each stream.
            let part = crate::dice::fraction();
            tokio::time::sleep(spread.mul_f64(part)).await;
        };
        tokio::spawn(async move {
            let result = tokio::select! {
                result = call => result,
                () = end => {
                    Err(Refused::Unavailable("the control plane is shutting down".to_owned()))
                }
                // The caller is gone: what would be sent reaches nobody.
                () = answers.closed() => return,
            };
            if let Err(refused) = result {
                let _ = answers.send(Err(refused.into())).await;
            }
        });
    }
}

/// A call's token, and its connection.
struct Presented<K> {
    caller: Caller,
    peer: accept::Peer<K>,
}

impl<K: Clone + Eq + Hash + Send + Sync + 'static> Presented<K> {
    fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .unwrap_or_default();
        let peer = request.extensions().get::<accept::Peer<K>>();
        let peer = peer.ok_or_else(|| Status::internal("a call without a connection"))?.clone();
        Ok(Self { caller: Caller { token: token.to_owned(), address: peer.address }, peer })
    }

    async fn authenticate<H: Handler<Known = K>>(&self, handler: &H) -> Result<K, Refused> {
        self.peer.review(handler.authenticate(self.caller.clone())).await
    }

    /// Serves a stream for as long as its token stands for whom it did. One that cannot be looked up stands: an API server that is
    /// away ends nothing.
    async fn serve<H: Handler<Known = K>>(
        self,
        handler: &H,
        trust: Duration,
        known: K,
        stream: impl Future<Output = Result<(), Refused>>,
    ) -> Result<(), Refused> {
        let doubt = async {
            loop {
                // Not all that began together at once.
                tokio::time::sleep(trust.mul_f64(0.5 + crate::dice::fraction() / 2.0)).await;
                if handler.is_disowned(self.caller.clone(), &known).await {
                    return;
                }
            }
        };
        tokio::select! {
            result = stream => result,
            () = doubt => Err(Refused::Outdated("the token that the stream began with does not count any more".to_owned())),
        }
    }
}

#[tonic::async_trait]
impl<H: Handler> AggregatedDiscoveryService for Service<H> {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let presented = Presented::of(&request)?;
        let (answers, outgoing) = mpsc::channel(WAITING);
        let stream = DiscoveryStream::new(request.into_inner(), answers.clone());
        let (handler, trust) = (self.handler.clone(), self.trust);
        self.run(answers, async move {
            let caller = presented.authenticate(&*handler).await?;
            presented.serve(&*handler, trust, caller.clone(), handler.discovery(caller, stream)).await
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[tonic::async_trait]
impl<H: Handler> IstioCertificateService for Service<H> {
    async fn create_certificate(
        &self,
        request: Request<ca::IstioCertificateRequest>,
    ) -> Result<Response<ca::IstioCertificateResponse>, Status> {
        let presented = Presented::of(&request)?;
        let message = request.into_inner();
        let identity = message.metadata.and_then(|metadata| metadata.fields.get(crate::IMPERSONATED).cloned());
        let identity = match identity.and_then(|value| value.kind) {
            Some(prost_types::value::Kind::StringValue(identity)) => identity,
            _ => String::new(),
        };
        let request = CertificateRequest { csr: message.csr, identity, validity_seconds: message.validity_duration };
        let caller = presented.authenticate(&*self.handler).await?;
        let cert_chain = self.handler.certify(caller, request).await?;
        Ok(Response::new(ca::IstioCertificateResponse { cert_chain }))
    }
}

#[tonic::async_trait]
impl<H: Handler> Reports for Service<H> {
    type CaptureStream = ReceiverStream<Result<CaptureConfirmed, Status>>;

    async fn capture(
        &self,
        request: Request<Streaming<CaptureReport>>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let presented = Presented::of(&request)?;
        let (answers, outgoing) = mpsc::channel(WAITING);
        let stream = CaptureStream::new(request.into_inner(), answers.clone());
        let (handler, trust) = (self.handler.clone(), self.trust);
        self.run(answers, async move {
            let caller = presented.authenticate(&*handler).await?;
            presented.serve(&*handler, trust, caller.clone(), handler.captures(caller, stream)).await
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
