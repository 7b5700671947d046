//! What all connections of a node share: a value, so that a test can make one of its own.

use std::sync::Arc;

use tracing::Level;

use crate::budgets::Budgets;
use crate::certs::Certificates;
use crate::clock::Clock;
use crate::connections::{Connection, Direction, Registry, Security};
use crate::coverage::{Coverage, Edge};
use crate::metrics::Metrics;
use crate::reasons::EndedEarly;
use crate::view::LiveView;

/// The node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Time.
    pub(crate) clock: Clock,
    /// What it knows of the mesh.
    pub(crate) view: LiveView,
    /// What its pods prove themselves with.
    pub(crate) certificates: Arc<Certificates>,
    /// What is open.
    pub(crate) connections: Registry,
    /// What was.
    pub(crate) coverage: Coverage,
    /// What each may take.
    pub(crate) budgets: Budgets,
    /// Numbers.
    pub(crate) metrics: Arc<Metrics>,
}

impl Node {
    /// A node that knows nothing yet and may have so many descriptors.
    pub(crate) fn new(clock: Clock, descriptors: u64) -> Self {
        Self {
            view: LiveView::default(),
            certificates: Arc::new(Certificates::new(clock.clone())),
            connections: Registry::default(),
            coverage: Coverage::default(),
            budgets: Budgets::new(descriptors),
            metrics: Arc::default(),
            clock,
        }
    }

    /// Takes a connection out of what is open, counts it, and writes its line of the access log.
    pub(crate) fn closed(&self, connection: &Connection, end: Result<(), &EndedEarly>) {
        self.connections.close(connection);
        self.metrics.open.dec();
        self.metrics.closed(connection, end);
        let load = |count: &std::sync::atomic::AtomicU64| count.load(std::sync::atomic::Ordering::Relaxed);
        let (sent, received) = (load(&connection.bytes.sent), load(&connection.bytes.received));
        let other = self.other_end(connection);
        self.coverage.add(Edge::of(connection, end, other.clone()), sent, received, self.clock.wall());
        log(connection, end, other.as_deref(), sent, received);
    }

    /// Who is at the other end, as far as the view knows. A connection that was refused has no decision that says so, and it is
    /// there that a person asks who it was.
    fn other_end(&self, connection: &Connection) -> Option<Arc<str>> {
        if let Some(decision) = connection.decision() {
            return decision.other.clone();
        }
        let address = match connection.direction {
            Direction::Inbound => connection.source.ip(),
            Direction::Outbound => connection.destination()?.ip(),
        };
        self.view.read(|view| view.workload_at(address).map(|it| format!("{}/{}", it.namespace, it.name).into()))
    }
}

/// One line for each connection, when it ends; as loud as its end is.
fn log(connection: &Connection, end: Result<(), &EndedEarly>, other: Option<&str>, sent: u64, received: u64) {
    let decision = connection.decision();
    let decision = decision.as_deref();
    let security = decision.map(|decision| &decision.security);
    let peer = security.and_then(Security::peer);
    let handshake = match security {
        Some(Security::Mtls(peer)) => Some(peer.handshake()),
        Some(Security::Plaintext(_)) | None => None,
    };
    let early = end.err().map(ToString::to_string);
    // The level is a part of the call itself in `tracing`.
    macro_rules! line {
        ($level:expr) => {
            tracing::event!(
                $level,
                id = connection.id,
                direction = connection.direction.as_str(),
                pod = %connection.pod.name,
                source = %connection.source,
                dialled = connection.destination().map(display),
                to = decision.map(|decision| display(decision.to)),
                service = decision.and_then(|decision| decision.service.as_deref()),
                other,
                identity = %connection.pod.identity,
                peer = peer.map(display),
                security = security.map_or("none", Security::as_str),
                reason = security.map(Security::reason).filter(|reason| !reason.is_empty()),
                tls = handshake.map(|handshake| handshake.version()),
                group = handshake.map(|handshake| handshake.group()),
                sent,
                received,
                ms = connection.age().as_millis() as u64,
                end = early.as_deref().unwrap_or("orderly"),
                fault = end.err().map(|early| early.facts().fault.as_str()),
                "connection",
            )
        };
    }
    match end.err().map_or(Level::INFO, |early| early.facts().level) {
        Level::ERROR => line!(Level::ERROR),
        Level::WARN => line!(Level::WARN),
        _ => line!(Level::INFO),
    }
}
