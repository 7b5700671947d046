//! Numbers for Prometheus. Every label has a closed set of values: nothing that a stranger says becomes one.

use std::fmt;
use std::sync::Mutex;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::connections::Connection;
use crate::reasons::EndedEarly;

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Kind {
    direction: &'static str,
    security: &'static str,
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Early {
    direction: &'static str,
    reason: &'static str,
    fault: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Failure {
    direction: &'static str,
    reason: &'static str,
}

/// The metrics of the data path.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    opened: Family<Kind, Counter>,
    closed: Family<Kind, Counter>,
    sent: Family<Kind, Counter>,
    received: Family<Kind, Counter>,
    early: Family<Early, Counter>,
    handshakes: Family<Failure, Counter>,
    /// Connections that are open.
    pub(crate) open: Gauge,
    /// Captured pods.
    pub(crate) pods: Gauge,
    /// Changes of the view so far.
    pub(crate) view: Gauge,
    /// 1 while the control plane's stream is up.
    pub(crate) connected: Gauge,
    /// 1 while the agent's link is up.
    pub(crate) agent: Gauge,
    /// Certificates that were issued to this node.
    pub(crate) certificates: Counter,
    /// Attempts to get one that failed.
    pub(crate) certificate_failures: Counter,
    /// Times that an acceptor had no descriptor for a connection.
    pub(crate) accept_failures: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("justmtls_proxy")),
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            early: Family::default(),
            handshakes: Family::default(),
            open: Gauge::default(),
            pods: Gauge::default(),
            view: Gauge::default(),
            connected: Gauge::default(),
            agent: Gauge::default(),
            certificates: Counter::default(),
            certificate_failures: Counter::default(),
            accept_failures: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        registry.register("connections_opened", "Connections that were decided", self.opened.clone());
        registry.register("connections_closed", "Decided connections that ended", self.closed.clone());
        registry.register("sent_bytes", "Payload from clients to servers", self.sent.clone());
        registry.register("received_bytes", "Payload from servers to clients", self.received.clone());
        registry.register("ended_early", "Connections without an orderly end, by reason", self.early.clone());
        registry.register("handshake_failures", "Handshakes that proved nobody, by reason", self.handshakes.clone());
        registry.register("connections", "Connections that are open", self.open.clone());
        registry.register("pods", "Pods that are captured", self.pods.clone());
        registry.register("view_changes", "Changes of the view so far", self.view.clone());
        registry.register("control_plane_connected", "1 while the stream is up", self.connected.clone());
        registry.register("agent_connected", "1 while the link to the agent is up", self.agent.clone());
        registry.register("certificates_issued", "Certificates that were issued", self.certificates.clone());
        registry.register("certificate_failures", "Failed requests for one", self.certificate_failures.clone());
        registry.register("accept_failures", "Accepts that failed for want of resources", self.accept_failures.clone());
    }

    /// Counts a connection that was decided.
    pub(crate) fn opened(&self, connection: &Connection) {
        self.opened.get_or_create(&kind(connection)).inc();
    }

    /// Counts what a connection carried since the last time.
    pub(crate) fn carried(&self, connection: &Connection) {
        let (sent, received) = connection.uncounted();
        if sent + received > 0 {
            let kind = kind(connection);
            self.sent.get_or_create(&kind).inc_by(sent);
            self.received.get_or_create(&kind).inc_by(received);
        }
    }

    /// Counts the end of a connection.
    pub(crate) fn closed(&self, connection: &Connection, end: Result<(), &EndedEarly>) {
        self.carried(connection);
        if connection.decision().is_some() {
            self.closed.get_or_create(&kind(connection)).inc();
        }
        let Err(early) = end else { return };
        let (direction, facts) = (connection.direction.as_str(), early.facts());
        let early_end = Early { direction, reason: facts.name, fault: facts.fault.as_str() };
        self.early.get_or_create(&early_end).inc();
        if matches!(early, EndedEarly::Handshake(_) | EndedEarly::HandshakeTimeout | EndedEarly::HandshakeCut) {
            self.handshakes.get_or_create(&Failure { direction, reason: facts.name }).inc();
        }
    }

    /// All of it in the text format of Prometheus (OpenMetrics 1.0).
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing to a String does not fail.
        let _ = encode(&mut text, &registry);
        text
    }
}

fn kind(connection: &Connection) -> Kind {
    let decision = connection.decision();
    let (security, reason) =
        decision.map_or(("none", ""), |decision| (decision.security.as_str(), decision.security.reason()));
    Kind { direction: connection.direction.as_str(), security, reason }
}
