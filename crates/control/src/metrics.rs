//! Numbers for Prometheus.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};
use wire::discovery::Kind;

/// What all names begin with.
const PREFIX: &str = "justmtls_control";

/// Everything that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Names,
    certificates: Family<Outcome, Counter>,
    refused_calls: Family<Outcome, Counter>,
    refused_connections: Family<Outcome, Counter>,
    token_reviews: Family<Outcome, Counter>,
    /// Whole lists of a kind that the API server gave.
    pub(crate) lists: Counter,
    pub(crate) changes: Counter,
    pub(crate) published: Counter,
    /// Resources and removals that nodes were sent: what subscribers cost.
    pub(crate) told: Counter,
    /// Messages that nodes took in.
    pub(crate) accepted: Counter,
    refused: Family<OfKind, Counter>,
    pub(crate) nodes: Gauge,
    pub(crate) nodes_current: Gauge,
    pub(crate) streams: Gauge,
    pub(crate) problems: Gauge,
    pub(crate) workloads: Gauge,
    pub(crate) captured: Gauge,
    /// Seconds since the kind was heard of that was heard of least.
    pub(crate) watch_silence: Gauge,
    pub(crate) leader: Gauge,
}

/// What is registered, and under which names.
#[derive(Debug)]
struct Names {
    registry: Registry,
    names: Vec<String>,
}

impl Names {
    fn counter(&mut self, name: &str, help: &str, counter: impl Metric) {
        self.names.push(format!("{PREFIX}_{name}_total"));
        self.registry.register(name, help, counter);
    }

    fn gauge(&mut self, name: &str, help: &str, gauge: impl Metric) {
        self.names.push(format!("{PREFIX}_{name}"));
        self.registry.register(name, help, gauge);
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    outcome: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Names { registry: Registry::with_prefix(PREFIX), names: Vec::new() };
        let certificates = Family::<Outcome, Counter>::default();
        registry.counter("certificates", "Certificates asked for, by outcome", certificates.clone());
        let refused_calls = Family::<Outcome, Counter>::default();
        registry.counter("refused_calls", "Calls and streams that were refused, by reason", refused_calls.clone());
        let refused_connections = Family::<Outcome, Counter>::default();
        let help = "Connections that ended before a token was accepted, by reason";
        registry.counter("refused_connections", help, refused_connections.clone());
        let token_reviews = Family::<Outcome, Counter>::default();
        registry.counter(
            "token_reviews",
            "Tokens that the API server was asked about, by outcome",
            token_reviews.clone(),
        );
        let lists = Counter::default();
        registry.counter("lists", "Whole lists of a kind of object that the API server gave", lists.clone());
        let changes = Counter::default();
        registry.counter("object_changes", "Changes of objects taken in", changes.clone());
        let published = Counter::default();
        registry.counter("resource_changes", "Changes of what nodes are told", published.clone());
        let told = Counter::default();
        registry.counter("resources_sent", "Resources and removals sent to nodes", told.clone());
        let accepted = Counter::default();
        registry.counter("messages_accepted", "Messages that nodes took in", accepted.clone());
        let refused = Family::<OfKind, Counter>::default();
        registry.counter("messages_refused", "Messages that nodes refused, by kind", refused.clone());
        let nodes = Gauge::default();
        registry.gauge("nodes", "Nodes of the cluster", nodes.clone());
        let nodes_current = Gauge::default();
        let help = "Nodes whose proxy has taken in everything that it was told";
        registry.gauge("nodes_current", help, nodes_current.clone());
        let streams = Gauge::default();
        registry.gauge("streams", "Open discovery streams", streams.clone());
        let problems = Gauge::default();
        registry.gauge("problems", "Problems that /problems lists", problems.clone());
        let workloads = Gauge::default();
        registry.gauge("workloads", "Workloads published", workloads.clone());
        let captured = Gauge::default();
        registry.gauge("workloads_captured", "Workloads published as speaking justmtls/1", captured.clone());
        let watch_silence = Gauge::default();
        let help = "Seconds since the API server was last heard about the kind that it was heard about least";
        registry.gauge("watch_silence_seconds", help, watch_silence.clone());
        let leader = Gauge::default();
        registry.gauge("leader", "1 where this replica holds the Lease", leader.clone());
        Self {
            registry,
            certificates,
            refused_calls,
            refused_connections,
            token_reviews,
            lists,
            changes,
            published,
            told,
            accepted,
            refused,
            nodes,
            nodes_current,
            streams,
            problems,
            workloads,
            captured,
            watch_silence,
            leader,
        }
    }

    /// Counts a request for a certificate: `issued`, or why not.
    pub(crate) fn certificate(&self, outcome: &str) {
        self.certificates.get_or_create(&Outcome { outcome: outcome.to_owned() }).inc();
    }

    /// Counts a call that was refused.
    pub(crate) fn refused_call(&self, reason: &str) {
        self.refused_calls.get_or_create(&Outcome { outcome: reason.to_owned() }).inc();
    }

    /// Counts a connection that ended before a token was accepted.
    pub(crate) fn refused_connection(&self, reason: &str) {
        self.refused_connections.get_or_create(&Outcome { outcome: reason.to_owned() }).inc();
    }

    /// Counts a review of a token: `vouched-for`, or why not.
    pub(crate) fn review(&self, outcome: &str) {
        self.token_reviews.get_or_create(&Outcome { outcome: outcome.to_owned() }).inc();
    }

    /// Counts a message that a node refused.
    pub(crate) fn refused(&self, kind: Kind) {
        self.refused.get_or_create(&OfKind { kind: kind.as_str() }).inc();
    }

    /// All of it, in OpenMetrics' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_lists_every_metric_and_no_other() {
        let mut names = Metrics::new().registry.names;
        names.sort();
        let rows = include_str!("../../../SPECIFICATION.md").lines();
        let listed = rows.filter_map(|row| row.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name.to_owned());
        let mut listed: Vec<_> = listed.filter(|name| name.starts_with(PREFIX)).collect();
        listed.sort();
        assert_eq!(listed, names);
    }
}
