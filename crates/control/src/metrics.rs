//! Numbers for Prometheus.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Everything that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    certificates: Family<Outcome, Counter>,
    refused_calls: Family<Outcome, Counter>,
    pub(crate) changes: Counter,
    pub(crate) published: Counter,
    pub(crate) streams: Gauge,
    pub(crate) problems: Gauge,
    pub(crate) workloads: Gauge,
    pub(crate) captured: Gauge,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    outcome: String,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("justmtls_control");
        let certificates = Family::<Outcome, Counter>::default();
        registry.register("certificates", "Certificates asked for, by outcome", certificates.clone());
        let refused_calls = Family::<Outcome, Counter>::default();
        registry.register("refused_calls", "Calls and streams that were refused, by reason", refused_calls.clone());
        let changes = Counter::default();
        registry.register("object_changes", "Changes of objects taken in", changes.clone());
        let published = Counter::default();
        registry.register("resource_changes", "Changes of what nodes are told", published.clone());
        let streams = Gauge::default();
        registry.register("streams", "Open discovery streams", streams.clone());
        let problems = Gauge::default();
        registry.register("problems", "Problems that /problems lists", problems.clone());
        let workloads = Gauge::default();
        registry.register("workloads", "Workloads published", workloads.clone());
        let captured = Gauge::default();
        registry.register("workloads_captured", "Workloads published as speaking justmtls/1", captured.clone());
        Self { registry, certificates, refused_calls, changes, published, streams, problems, workloads, captured }
    }

    /// Counts a request for a certificate: `issued`, or why not.
    pub(crate) fn certificate(&self, outcome: &str) {
        self.certificates.get_or_create(&Outcome { outcome: outcome.to_owned() }).inc();
    }

    /// Counts a call that was refused.
    pub(crate) fn refused_call(&self, reason: &str) {
        self.refused_calls.get_or_create(&Outcome { outcome: reason.to_owned() }).inc();
    }

    /// All of it, in OpenMetrics' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
