//! Numbers for Prometheus. Every label has a closed set of values.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use wire::pods::{CniResult, SocketKind};

use crate::failure::Failure;

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
    registry: Mutex<Registry>,
    answers: Family<Answer, Counter>,
    failures: Family<Reason, Counter>,
    sockets: Family<Kind, Counter>,
    socket_failures: Family<Kind, Counter>,
    /// Captures that something had changed, and that were made anew.
    pub(crate) repairs: Counter,
    /// Captures that could not be looked at, or not be made anew.
    pub(crate) repair_failures: Counter,
    /// Pods of this node, as the control plane or the runtime names them.
    pub(crate) pods: Gauge,
    /// Those that are captured.
    pub(crate) captured: Gauge,
    /// Those whose capture the control plane has confirmed.
    pub(crate) confirmed: Gauge,
    /// 1 while the discovery stream is up.
    pub(crate) control_plane: Gauge,
    /// 1 while a proxy is connected.
    pub(crate) proxy: Gauge,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("justmtls_agent")),
            answers: Family::default(),
            failures: Family::default(),
            sockets: Family::default(),
            socket_failures: Family::default(),
            repairs: Counter::default(),
            repair_failures: Counter::default(),
            pods: Gauge::default(),
            captured: Gauge::default(),
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
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register("cni_answers", "Answers to the runtime", self.answers.clone());
        registry.register("failures", "Failures to capture a pod, by reason", self.failures.clone());
        registry.register("sockets", "Sockets made for the proxy, by kind", self.sockets.clone());
        registry.register("socket_failures", "Batches that could not be made, by kind", self.socket_failures.clone());
        registry.register("repairs", "Captures that were changed by others and made anew", self.repairs.clone());
        let help = "Captures that could not be verified or made anew";
        registry.register("repair_failures", help, self.repair_failures.clone());
        registry.register("pods", "Pods of this node", self.pods.clone());
        registry.register("captured_pods", "Pods whose rules stand", self.captured.clone());
        let help = "Captured pods that the control plane has confirmed";
        registry.register("confirmed_pods", help, self.confirmed.clone());
        registry.register("control_plane_connected", "1 while the stream is up", self.control_plane.clone());
        registry.register("proxy_connected", "1 while a proxy is connected", self.proxy.clone());
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
        self.failures.get_or_create(&Reason { reason: failure.as_str() }).inc();
    }

    /// Counts sockets that were made.
    pub(crate) fn made(&self, kind: SocketKind, count: usize) {
        self.sockets.get_or_create(&Kind { kind: name(kind) }).inc_by(count as u64);
    }

    /// Counts a batch that could not be made.
    pub(crate) fn not_made(&self, kind: SocketKind) {
        self.socket_failures.get_or_create(&Kind { kind: name(kind) }).inc();
    }

    /// All of it in the text format of Prometheus (OpenMetrics 1.0).
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner));
        text
    }
}

fn name(kind: SocketKind) -> &'static str {
    match kind {
        SocketKind::OuterV4 => "outer-v4",
        SocketKind::OuterV6 => "outer-v6",
        SocketKind::InnerV4 => "inner-v4",
        SocketKind::InnerV6 => "inner-v6",
    }
}
