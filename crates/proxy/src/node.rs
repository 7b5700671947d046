//! What all connections of a node share: a value, so that a test can make one of its own.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::Level;

use crate::access_log::AccessLog;
use crate::budgets::Budgets;
use crate::certs::Certificates;
use crate::clock::Clock;
use crate::connections::{Connection, Direction, Registry, full_name};
use crate::coverage::{Coverage, Edge};
use crate::metrics::Metrics;
use crate::offload::Offload;
use crate::pool::Pool;
use crate::questions::Questions;
use crate::reasons::EndedEarly;
use crate::view::LiveView;

/// The node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Time.
    pub(crate) clock: Clock,
    /// Its own addresses: who comes from one of them may be its kubelet.
    pub(crate) addresses: Vec<IpAddr>,
    /// What it knows of the mesh.
    pub(crate) view: LiveView,
    /// What the control plane is asked about.
    pub(crate) questions: Questions,
    /// What its pods prove themselves with.
    pub(crate) certificates: Arc<Certificates>,
    /// What is open.
    pub(crate) connections: Registry,
    /// Tunnels at rest.
    pub(crate) pool: Pool,
    /// What was.
    pub(crate) coverage: Coverage,
    /// What each may take.
    pub(crate) budgets: Budgets,
    /// Where handshakes are worked out.
    pub(crate) offload: Offload,
    /// Numbers.
    pub(crate) metrics: Arc<Metrics>,
    /// A line for each connection.
    pub(crate) access_log: AccessLog,
}

impl Node {
    /// A node that knows nothing yet and may have so many descriptors.
    pub(crate) fn new(clock: Clock, descriptors: u64) -> Self {
        let (metrics, budgets) = (Arc::new(Metrics::new(clock.monotonic())), Budgets::new(descriptors));
        Self {
            addresses: Vec::new(),
            view: LiveView::default(),
            questions: Questions::default(),
            certificates: Arc::new(Certificates::new(clock.clone())),
            connections: Registry::default(),
            pool: Pool::new(&metrics, budgets.resting()),
            coverage: Coverage::default(),
            budgets,
            offload: Offload::new(1),
            metrics,
            access_log: AccessLog::off(),
            clock,
        }
    }

    /// Asks the control plane about an address that the view does not know. Whether an answer is to come.
    pub(crate) fn ask(&self, address: IpAddr) -> bool {
        self.view.read(|view| view.is_unknown(address)) && self.questions.ask(address)
    }

    /// Waits for the control plane's word about an address that the view does not know, where there is one to come, and no
    /// longer than this.
    pub(crate) async fn learn(&self, address: IpAddr, patience: Duration) {
        if !self.ask(address) {
            return;
        }
        let mut changes = self.view.changes();
        let deadline = Instant::now() + patience;
        while self.questions.is_open(address) && matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {}
    }

    /// Counts a connection that was decided and is about to carry bytes.
    pub(crate) fn opened(&self, connection: &Connection) {
        self.view.read(|view| self.metrics.opened(connection, view, self.clock.monotonic()));
    }

    /// Takes a connection out of what is open, counts it, and writes its line of the access log.
    pub(crate) fn closed(&self, connection: &Connection, end: Result<(), &EndedEarly>) {
        self.metrics.open.dec();
        self.metrics.closed(connection, end, self.clock.monotonic());
        let (sent, received) = connection.bytes.now();
        let (other, now) = (self.other_end(connection), self.clock.wall());
        self.coverage.add(Edge::of(connection, end, other.clone()), sent, received, now);
        self.access_log.ended(connection, end, other, now);
        if let Err(early) = end {
            // Strangers make the others happen as often as they like; those have their place in the access log.
            if early.facts().level == Level::ERROR {
                tracing::error!(id = connection.id, pod = %connection.pod.name, "a connection ended for a fault of ours: {early}");
            }
        }
        // Last: who finds nothing open finds everything told.
        self.connections.close(connection);
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
        self.view.read(|view| view.workload_at(address).map(|it| full_name(it)))
    }
}
