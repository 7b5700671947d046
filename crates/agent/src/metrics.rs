//! Numbers for Prometheus. Every label has a closed set of values.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};
use wire::pods::{CniResult, SocketKind};

use crate::failure::Failure;

/// What all names begin with.
const PREFIX: &str = "justmtls_agent";

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Answer {
    answer: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, EncodeLabelSet, Debug)]
struct Kind {
    kind: &'static str,
}

/// The metrics of the agent.
pub(crate) struct Metrics {
    registry: Mutex<Names>,
    answers: Family<Answer, Counter>,
    failures: Family<Reason, Counter>,
    sockets: Family<Kind, Counter>,
    socket_failures: Family<Kind, Counter>,
    /// Captures that something had changed, and that were made anew.
    pub(crate) repairs: Counter,
    /// Packets that the guards on pods' interfaces dropped.
    pub(crate) guard_drops: Counter,
    /// Captures that could not be looked at, or not be made anew.
    pub(crate) repair_failures: Counter,
    /// Connections to the agent's sockets that were refused for their user.
    pub(crate) strangers: Counter,
    /// Pods that a runtime started without the plugin, while it was in place.
    pub(crate) missed: Counter,
    /// Connections of theirs that were ended.
    pub(crate) missed_connections: Counter,
    /// Connections from before a capture that were ended, since plaintext is refused.
    pub(crate) refused_connections: Counter,
    /// Times that somebody had removed or changed the plugin's conflist.
    pub(crate) plugin_restored: Counter,
    /// 1 while the plugin is in the node's CNI chain.
    pub(crate) plugin_in_place: Gauge,
    /// 1 while the container runtime answers.
    pub(crate) runtime: Gauge,
    /// Pods of this node, as the control plane or the runtime names them.
    pub(crate) pods: Gauge,
    /// Those that are captured.
    pub(crate) captured: Gauge,
    /// Those that are let go, and still have connections from before.
    pub(crate) leaving: Gauge,
    /// Those whose capture the control plane has confirmed.
    pub(crate) confirmed: Gauge,
    /// 1 while the discovery stream is up.
    pub(crate) control_plane: Gauge,
    /// 1 while a proxy is connected.
    pub(crate) proxy: Gauge,
}

/// What is registered, and under which names.
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

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Names { registry: Registry::with_prefix(PREFIX), names: Vec::new() }),
            answers: Family::default(),
            failures: Family::default(),
            sockets: Family::default(),
            socket_failures: Family::default(),
            repairs: Counter::default(),
            guard_drops: Counter::default(),
            repair_failures: Counter::default(),
            strangers: Counter::default(),
            missed: Counter::default(),
            missed_connections: Counter::default(),
            refused_connections: Counter::default(),
            plugin_restored: Counter::default(),
            plugin_in_place: Gauge::default(),
            runtime: Gauge::default(),
            pods: Gauge::default(),
            captured: Gauge::default(),
            leaving: Gauge::default(),
            confirmed: Gauge::default(),
            control_plane: Gauge::default(),
            proxy: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&self) {
        let mut all = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        all.counter("cni_answers", "Answers to the runtime", self.answers.clone());
        all.counter("failures", "Failures to capture a pod, by reason", self.failures.clone());
        all.counter("sockets", "Sockets made for the proxy, by kind", self.sockets.clone());
        all.counter("socket_failures", "Batches that could not be made, by kind", self.socket_failures.clone());
        all.counter("repairs", "Captures that were changed by others and made anew", self.repairs.clone());
        let help = "Packets that the guards on pods' interfaces kept from leaving in clear";
        all.counter("guard_drops", help, self.guard_drops.clone());
        let help = "Captures that could not be verified or made anew";
        all.counter("repair_failures", help, self.repair_failures.clone());
        let help = "Connections to the agent's sockets that were refused for their user";
        all.counter("strangers", help, self.strangers.clone());
        all.counter("missed_pods", "Pods that started without the plugin while it was in place", self.missed.clone());
        let help = "Connections that such pods had before they were captured, and that were ended";
        all.counter("missed_connections_ended", help, self.missed_connections.clone());
        let help = "Connections from before a pod's capture that were ended, since plaintext is refused";
        all.counter("refused_connections_ended", help, self.refused_connections.clone());
        let help = "Times that somebody had removed or changed the plugin's configuration";
        all.counter("plugin_restored", help, self.plugin_restored.clone());
        let help = "1 while the plugin is in the node's CNI chain";
        all.gauge("plugin_in_place", help, self.plugin_in_place.clone());
        all.gauge("runtime_connected", "1 while the container runtime answers", self.runtime.clone());
        all.gauge("pods", "Pods of this node", self.pods.clone());
        all.gauge("captured_pods", "Pods whose rules stand", self.captured.clone());
        let help = "Pods that are let go, and still have connections that were captured";
        all.gauge("leaving_pods", help, self.leaving.clone());
        let help = "Captured pods that the control plane has confirmed";
        all.gauge("confirmed_pods", help, self.confirmed.clone());
        all.gauge("control_plane_connected", "1 while the stream is up", self.control_plane.clone());
        all.gauge("proxy_connected", "1 while a proxy is connected", self.proxy.clone());
    }

    /// Counts an answer to the runtime.
    pub(crate) fn answered(&self, answer: &CniResult) {
        let answer = match answer {
            CniResult::Captured => "captured",
            CniResult::NotCaptured(_) => "not-captured",
            CniResult::Deleted => "deleted",
            CniResult::Failed(_) => "failed",
        };
        self.answers.get_or_create(&Answer { answer }).inc();
    }

    /// Counts a failure to capture a pod.
    pub(crate) fn failed(&self, failure: &Failure) {
        self.failures.get_or_create(&Reason { reason: failure.name().as_str() }).inc();
    }

    /// Counts sockets that were made.
    pub(crate) fn made(&self, kind: SocketKind, count: usize) {
        self.sockets.get_or_create(&Kind { kind: kind.as_str() }).inc_by(count as u64);
    }

    /// Counts a batch that could not be made.
    pub(crate) fn not_made(&self, kind: SocketKind) {
        self.socket_failures.get_or_create(&Kind { kind: kind.as_str() }).inc();
    }

    /// All of it in the text format of Prometheus (OpenMetrics 1.0).
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner).registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_lists_every_metric_and_no_other() {
        let mut names = Metrics::default().registry.into_inner().unwrap().names;
        names.sort();
        let rows = include_str!("../../../SPECIFICATION.md").lines();
        let listed = rows.filter_map(|row| row.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name.to_owned());
        let mut listed: Vec<_> = listed.filter(|name| name.starts_with(PREFIX)).collect();
        listed.sort();
        assert_eq!(listed, names);
    }
}
