//! What nodes may call. A caller is nobody until its token was looked up.

mod crowd;

use std::net::SocketAddr;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use wire::server::{self, Bounds, CaptureStream, CertificateRequest, DiscoveryStream, Handler, Refused, TurnedAway};

use crate::ca::token::{Caller, Tokens, Unknown};
use crate::ca::{self, Certifier};
use crate::clock::Clock;
use crate::control::Event;
use crate::kubernetes::history::History;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::publication::Publication;
use crate::refusals::Refusals;
use crate::{discovery, report};

pub(crate) use crowd::Crowd;

/// What calls are answered from.
pub(crate) struct Served {
    pub(crate) publication: Arc<Publication>,
    pub(crate) certifier: Arc<Certifier>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) nodes: Nodes,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) refusals: Refusals,
    pub(crate) crowd: Arc<Crowd>,
    pub(crate) history: Option<History>,
    pub(crate) clock: Clock,
    pub(crate) events: mpsc::Sender<Event>,
}

/// How many connections this process can serve. Its limit of descriptors is raised to what its starter allows, as the usual one
/// (1,024) is that of programs that use select(2); where that fails, what is there has to do.
pub(crate) fn bounds() -> Bounds {
    let raise = |(soft, hard)| if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, raise);
    let bounds = Bounds::within(descriptors);
    let Bounds { nodes, strangers, strangers_of_source, .. } = bounds;
    info!(descriptors, nodes, strangers, strangers_of_source, "connections that there may be");
    bounds
}

impl Served {
    async fn certificate(&self, caller: &Caller, request: &CertificateRequest) -> Result<Vec<String>, Failed> {
        let CertificateRequest { csr, identity, validity_seconds } = request;
        let application = self.certifier.examine(caller, identity, csr, *validity_seconds)?;
        let (answer, answered) = oneshot::channel();
        let asked = self.events.send(Event::Certify { application, answer }).await;
        asked.map_err(|_| Failed::Ending)?;
        Ok(answered.await.map_err(|_| Failed::Ending)??)
    }

    fn count<T>(&self, result: Result<T, Refused>) -> Result<T, Refused> {
        if let Err(refused) = &result {
            self.metrics.refused_call(match refused {
                Refused::UnknownCaller(_) => "unknown-token",
                Refused::NotAllowed(_) => "not-allowed",
                Refused::BadRequest(_) => "bad-request",
                Refused::TooMany(_) => "too-many",
                Refused::Unavailable(_) | Refused::Outdated(_) => "unavailable",
            });
        }
        result
    }
}

/// Why a request for a certificate was not answered with one.
enum Failed {
    Refused(ca::Refused),
    Ending,
}

impl From<ca::Refused> for Failed {
    fn from(refused: ca::Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<ca::Refused> for Refused {
    fn from(refused: ca::Refused) -> Self {
        let sentence = format!("{}: {refused}", refused.as_str());
        match refused {
            ca::Refused::WrongRole { .. } | ca::Refused::NotOnThisNode { .. } => Self::NotAllowed(sentence),
            ca::Refused::NotAnIdentity(_) | ca::Refused::ForeignTrustDomain { .. } | ca::Refused::Request(_) => {
                Self::BadRequest(sentence)
            }
            ca::Refused::TooMany { .. } => Self::TooMany(sentence),
            ca::Refused::Issue(_) => Self::Unavailable(sentence),
        }
    }
}

impl Handler for Served {
    type Known = Caller;

    async fn authenticate(&self, caller: server::Caller) -> Result<Caller, Refused> {
        self.tokens.authenticate(&caller.token, caller.address.ip()).await.map_err(|unknown| {
            if let Some(unsaid) = self.refusals.one_more(unknown.as_str()) {
                warn!(address = %caller.address, reason = unknown.as_str(), unsaid, "a caller is refused: {unknown}");
            }
            self.metrics.refused_call(unknown.as_str());
            let sentence = unknown.to_string();
            match unknown {
                Unknown::TooMany => Refused::TooMany(sentence),
                Unknown::CannotAsk => Refused::Unavailable(sentence),
                _ => Refused::UnknownCaller(sentence),
            }
        })
    }

    async fn is_disowned(&self, caller: server::Caller, known: &Caller) -> bool {
        self.tokens.is_disowned(&caller.token, known).await
    }

    async fn discovery(&self, caller: Caller, stream: DiscoveryStream) -> Result<(), Refused> {
        self.count(discovery::serve(self, caller, stream).await)
    }

    async fn certify(&self, caller: Caller, request: CertificateRequest) -> Result<Vec<String>, Refused> {
        match self.certificate(&caller, &request).await {
            Ok(chain) => {
                // Only what was checked is logged: until then the identity is a stranger's text.
                info!(node = caller.node, identity = request.identity, "certificate issued");
                self.metrics.certificate("issued");
                Ok(chain)
            }
            Err(Failed::Refused(refused)) => {
                warn!(node = caller.node, reason = refused.as_str(), %refused, "certificate refused");
                self.metrics.certificate(refused.as_str());
                Err(refused.into())
            }
            Err(Failed::Ending) => Err(Refused::Unavailable("the control plane is ending".to_owned())),
        }
    }

    async fn captures(&self, caller: Caller, stream: CaptureStream) -> Result<(), Refused> {
        self.count(report::serve(&self.events, caller, stream).await)
    }

    fn turned_away(&self, address: SocketAddr, because: TurnedAway) {
        let (reason, now) = (because.as_str(), self.clock.monotonic());
        let unsaid = self.refusals.one_more(reason);
        match because {
            TurnedAway::TooManyOfSource | TurnedAway::TooMany => {
                self.crowd.ended(address.ip(), now);
                if let Some(unsaid) = unsaid {
                    warn!(%address, reason, unsaid, "there are too many strangers, and one of those with most is ended");
                }
            }
            // Whose fault that is these do not know, and it is not the one's that hears it.
            TurnedAway::Full => {
                self.crowd.newcomer_refused(now);
                if let Some(unsaid) = unsaid {
                    warn!(%address, reason, unsaid, "there are too many strangers, and a newcomer is refused");
                }
            }
            TurnedAway::NoPlace => {
                self.crowd.node_refused(now);
                if let Some(unsaid) = unsaid {
                    warn!(%address, reason, unsaid, "there are too many connections of nodes, and one is refused");
                }
            }
            TurnedAway::TooManyOfNode => {
                if let Some(unsaid) = unsaid {
                    warn!(%address, reason, unsaid, "a node has more connections than it needs, and its oldest is ended");
                }
            }
            _ => {
                if let Some(unsaid) = unsaid {
                    info!(%address, reason, unsaid, "a connection ended before a token was accepted");
                }
            }
        }
        self.metrics.refused_connection(reason);
    }
}
