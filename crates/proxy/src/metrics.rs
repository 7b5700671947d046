//! Numbers for Prometheus. Labels have a closed set of values, or are names that the control plane gave, and those are
//! bounded: nothing that a stranger says becomes one.
//!
//! SPECIFICATION.md lists all of them, and a test holds it to that.

mod traffic;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use identity::Svid;
use mesh::View;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use tokio::time::Instant;
use wire::pods::SocketKind;

use self::traffic::Traffic;
use crate::budgets::Budget;
use crate::connections::{Connection, Direction};
use crate::reasons::EndedEarly;

pub(crate) use self::traffic::Counted;

/// What all names of ours begin with.
const PREFIX: &str = "justmtls_proxy";

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Early {
    direction: &'static str,
    reason: &'static str,
    fault: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Outcome {
    direction: &'static str,
    /// `ok`, or why not.
    outcome: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct OfBudget {
    budget: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct OfDirection {
    direction: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct OfKind {
    kind: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct OfIdentity {
    identity: String,
}

/// The metrics of the data path.
pub(crate) struct Metrics {
    registry: Mutex<Names>,
    traffic: Traffic,
    early: Family<Early, Counter>,
    handshakes: Family<Outcome, Counter>,
    handshake_seconds: Family<OfDirection, Histogram, fn() -> Histogram>,
    refused: Family<OfBudget, Counter>,
    expiry: Family<OfIdentity, Gauge>,
    stash: Family<OfKind, Gauge>,
    /// Connections that are open.
    pub(crate) open: Gauge,
    /// Captured pods.
    pub(crate) pods: Gauge,
    /// Changes of the view so far.
    pub(crate) view: Gauge,
    /// Seconds that the control plane's clock is ahead of this node's.
    pub(crate) clock_skew: Gauge,
    /// Milliseconds since the view was last known to be right; -1 before the first time.
    pub(crate) view_age: Gauge,
    /// 1 while the view is stale.
    pub(crate) view_stale: Gauge,
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
    /// Lines of the access log that its reader was too slow for.
    pub(crate) log_dropped: Counter,
}

/// What is registered, and the names of it.
struct Names {
    registry: Registry,
    names: Vec<String>,
}

/// What is known only when somebody asks.
pub(crate) struct Now<'a> {
    /// The time.
    pub(crate) time: Instant,
    /// What is open.
    pub(crate) connections: &'a [std::sync::Arc<Connection>],
    /// Changes of the view so far.
    pub(crate) view: u64,
    /// The certificates that are held.
    pub(crate) svids: &'a [Svid],
    /// Sockets in all stashes, in the order of [`SocketKind::ALL`].
    pub(crate) stash: [usize; SocketKind::ALL.len()],
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Nothing counted yet.
    pub(crate) fn new(now: Instant) -> Self {
        // From a third of a millisecond, which one costs on an idle machine, to ten seconds.
        let handshake = || Histogram::new(exponential_buckets(0.000_5, 3.0, 10));
        let names = Names { registry: Registry::default(), names: Traffic::names().collect() };
        let metrics = Self {
            registry: Mutex::new(names),
            traffic: Traffic::new(now),
            early: Family::default(),
            handshakes: Family::default(),
            handshake_seconds: Family::new_with_constructor(handshake),
            refused: Family::default(),
            expiry: Family::default(),
            stash: Family::default(),
            open: Gauge::default(),
            pods: Gauge::default(),
            view: Gauge::default(),
            clock_skew: Gauge::default(),
            view_age: Gauge::default(),
            view_stale: Gauge::default(),
            connected: Gauge::default(),
            agent: Gauge::default(),
            certificates: Counter::default(),
            certificate_failures: Counter::default(),
            accept_failures: Counter::default(),
            log_dropped: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        self.lock().registry.register_collector(Box::new(self.traffic.clone()));
        self.counter("connections_ended_early", "Connections without an orderly end, by reason", self.early.clone());
        self.counter("handshakes", "TLS handshakes, by outcome: ok, or why not", self.handshakes.clone());
        self.gauge("handshake_seconds", "How long good TLS handshakes took", self.handshake_seconds.clone());
        self.counter("budget_refused", "Connections refused for want of a budget, by budget", self.refused.clone());
        let help = "When the certificate of an identity ends, in seconds since 1970";
        self.gauge("certificate_not_after_seconds", help, self.expiry.clone());
        self.gauge("stash_sockets", "Sockets of pods that are kept ready, by kind", self.stash.clone());
        self.gauge("connections", "Connections that are open", self.open.clone());
        self.gauge("pods", "Pods that are captured", self.pods.clone());
        self.gauge("view_changes", "Changes of the view so far", self.view.clone());
        let help = "Seconds that the control plane's clock is ahead of this node's";
        self.gauge("clock_skew_seconds", help, self.clock_skew.clone());
        let help = "Time since the view was last known to be right; -1: never yet";
        self.gauge("view_age_milliseconds", help, self.view_age.clone());
        self.gauge("view_stale", "1 while the view is too old for plaintext", self.view_stale.clone());
        self.gauge("control_plane_connected", "1 while the stream is up", self.connected.clone());
        self.gauge("agent_connected", "1 while the link to the agent is up", self.agent.clone());
        self.counter("certificates_issued", "Certificates that were issued", self.certificates.clone());
        self.counter("certificate_failures", "Failed requests for one", self.certificate_failures.clone());
        self.counter("accept_failures", "Accepts that failed for want of resources", self.accept_failures.clone());
        let help = "Lines of the access log that were dropped because its reader was too slow";
        self.lock().add("justmtls_access_log_dropped", "_total", help, self.log_dropped.clone());
    }

    /// Registers a counter as `justmtls_proxy_NAME_total`. Whoever owns a part of the data path adds its own when it is made.
    pub(crate) fn counter(&self, name: &str, help: &str, counter: impl Metric) {
        self.lock().add(&format!("{PREFIX}_{name}"), "_total", help, counter);
    }

    /// Registers anything else as `justmtls_proxy_NAME`.
    pub(crate) fn gauge(&self, name: &str, help: &str, gauge: impl Metric) {
        self.lock().add(&format!("{PREFIX}_{name}"), "", help, gauge);
    }

    /// Counts a connection that was decided and is about to carry bytes.
    pub(crate) fn opened(&self, connection: &Connection, view: &View, now: Instant) {
        connection.count_on(|| self.traffic.open(connection, view, now));
    }

    /// Counts the end of a connection.
    pub(crate) fn closed(&self, connection: &Connection, end: Result<(), &EndedEarly>, now: Instant) {
        connection.count_bytes();
        if let Some(counted) = connection.counted() {
            self.traffic.close(counted, now);
        }
        let Err(early) = end else { return };
        let facts = early.facts();
        let direction = connection.direction.as_str();
        self.early.get_or_create(&Early { direction, reason: facts.name, fault: facts.fault.as_str() }).inc();
        if let EndedEarly::OverBudget(budget) = early {
            self.refused(*budget);
        }
    }

    /// Counts what a budget refused.
    pub(crate) fn refused(&self, budget: Budget) {
        self.refused.get_or_create(&OfBudget { budget: budget.as_str() }).inc();
    }

    /// Counts and times a TLS handshake while it is made.
    pub(crate) async fn handshake<T>(
        &self,
        direction: Direction,
        making: impl Future<Output = Result<T, EndedEarly>>,
    ) -> Result<T, EndedEarly> {
        let began = Instant::now();
        let made = making.await;
        self.shook(direction, made.as_ref().map(|_| began.elapsed()));
        made
    }

    fn shook(&self, direction: Direction, end: Result<Duration, &EndedEarly>) {
        let direction = direction.as_str();
        let outcome = match end {
            Ok(took) => {
                self.handshake_seconds.get_or_create(&OfDirection { direction }).observe(took.as_secs_f64());
                "ok"
            }
            Err(early) => early.facts().name,
        };
        self.handshakes.get_or_create(&Outcome { direction, outcome }).inc();
    }

    /// All of it in the text format of Prometheus (OpenMetrics 1.0).
    pub(crate) fn text(&self, now: &Now<'_>) -> String {
        let names = self.lock();
        now.connections.iter().for_each(|connection| connection.count_bytes());
        self.traffic.forget(now.time);
        self.view.set(now.view.cast_signed());
        // Identities come and go with their pods.
        self.expiry.clear();
        for svid in now.svids {
            let identity = OfIdentity { identity: svid.id().as_str().to_owned() };
            self.expiry.get_or_create(&identity).set(svid.not_after().as_secs().cast_signed());
        }
        for (kind, count) in SocketKind::ALL.iter().zip(now.stash) {
            self.stash.get_or_create(&OfKind { kind: kind.as_str() }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &names.registry);
        text
    }

    /// The names of all of them, as Prometheus shows them.
    #[cfg(test)]
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().names.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Names> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Names {
    fn add(&mut self, name: &str, suffix: &str, help: &str, metric: impl Metric) {
        self.names.push(format!("{name}{suffix}"));
        self.registry.register(name, help, metric);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_lists_every_metric_and_no_other() {
        // With what the parts of the data path add.
        let node = crate::node::Node::new(crate::clock::Clock::default(), 1 << 10);
        let mut names = node.metrics.names();
        names.sort();
        let rows = include_str!("../../../SPECIFICATION.md").lines();
        let listed = rows.filter_map(|row| row.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name.to_owned());
        let of_proxy = ["istio_", PREFIX, "justmtls_access_log"];
        let mut listed: Vec<_> = listed.filter(|name| of_proxy.iter().any(|start| name.starts_with(start))).collect();
        listed.sort();
        assert_eq!(listed, names);
    }
}
