//! TCP traffic by who talks to whom, under the names and labels that Istio's dashboards know.
//!
//! As in Istio, `received` is what the server received and `sent` is what it sent, whichever side reports.
//!
//! A connection finds its series once, when it was decided. Bytes are counted on the connection itself, by atomics that no
//! other one touches, and are added to the series when somebody reads them and when the connection ends.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use identity::SpiffeId;
use mesh::{Canonical, ServiceName, View, Workload};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use tokio::time::Instant;

use crate::connections::{Connection, Direction, Security};

/// The most combinations of labels that are kept. Those that come when it is full are counted together.
const MOST_SERIES: usize = 1000;

/// A series on which nothing was open for this long is forgotten: its pods are gone, or as good as.
const FORGET: Duration = Duration::from_secs(3600);

/// What Istio writes where it does not know.
const UNKNOWN: &str = "unknown";

/// The names of the four, and what each says.
const NAMES: [(&str, &str); 4] = [
    ("istio_tcp_connections_opened", "Connections that were decided and opened"),
    ("istio_tcp_connections_closed", "Opened connections that have ended"),
    ("istio_tcp_sent_bytes", "Payload that servers sent"),
    ("istio_tcp_received_bytes", "Payload that servers received"),
];

/// One end of a connection.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
struct End {
    names: Option<(Arc<str>, Canonical)>,
    /// Only what a certificate has proven: no principal comes from an address.
    principal: Option<SpiffeId>,
}

/// Who talks to whom, and how.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Labels {
    reporter: &'static str,
    source: End,
    destination: End,
    service: Option<ServiceName>,
    security: &'static str,
    /// Stands for all that had no room.
    overflow: bool,
}

/// Counts of one combination of labels.
#[derive(Default, Debug)]
pub(super) struct Series {
    pub(super) opened: AtomicU64,
    pub(super) closed: AtomicU64,
    /// From server to client.
    pub(super) sent: AtomicU64,
    /// From client to server.
    pub(super) received: AtomicU64,
    /// When it was last used, in seconds since the table was made.
    used: AtomicU64,
}

/// All series of one set of labels.
#[derive(Debug)]
struct Table<L> {
    began: Instant,
    series: Mutex<HashMap<L, Arc<Series>>>,
}

/// Counts by protection and reason, for which there is a closed set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Kind {
    direction: &'static str,
    security: &'static str,
    reason: &'static str,
}

/// What a connection counts on.
#[derive(Debug)]
pub(crate) struct Counted([Arc<Series>; 2]);

/// All traffic of the process.
#[derive(Clone, Debug)]
pub(super) struct Traffic(Arc<Tables>);

#[derive(Debug)]
struct Tables {
    pairs: Table<Labels>,
    kinds: Table<Kind>,
}

impl Traffic {
    pub(super) fn new(now: Instant) -> Self {
        Self(Arc::new(Tables { pairs: Table::new(now), kinds: Table::new(now) }))
    }

    /// The names that it shows.
    pub(super) fn names() -> impl Iterator<Item = String> {
        let ours = OUR_NAMES.iter().map(|(name, _)| format!("{name}_total"));
        NAMES.iter().map(|(name, _)| format!("{name}_total")).chain(ours)
    }

    /// Finds the series of a connection that was decided, and counts it there.
    pub(super) fn open(&self, connection: &Connection, view: &View, now: Instant) -> Counted {
        let labels = Labels::of(connection, view);
        let pair = self.0.pairs.find(labels, Labels::overflow, now);
        let counted = Counted([pair, self.0.kinds.find(Kind::of(connection), |kind| kind, now)]);
        counted.each(|series| &series.opened, 1);
        counted
    }

    /// Counts the end of a connection.
    pub(super) fn close(&self, counted: &Counted, now: Instant) {
        counted.each(|series| &series.closed, 1);
        let used = self.0.pairs.seconds(now);
        counted.0.iter().for_each(|series| series.used.store(used, Ordering::Relaxed));
    }

    /// Forgets what has not been used for long.
    pub(super) fn forget(&self, now: Instant) {
        self.0.pairs.forget(&mut self.0.pairs.lock(), now);
    }
}

impl Counted {
    /// Adds bytes from client to server, and back.
    pub(crate) fn carried(&self, from_client: u64, to_client: u64) {
        self.each(|series| &series.received, from_client);
        self.each(|series| &series.sent, to_client);
    }

    fn each(&self, count: impl Fn(&Series) -> &AtomicU64, by: u64) {
        self.0.iter().for_each(|series| {
            count(series).fetch_add(by, Ordering::Relaxed);
        });
    }
}

impl<L: Eq + Hash> Table<L> {
    fn new(began: Instant) -> Self {
        Self { began, series: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<L, Arc<Series>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs()
    }

    /// The series of these labels, or what they overflow into where there is no room.
    fn find(&self, labels: L, overflow: impl FnOnce(L) -> L, now: Instant) -> Arc<Series> {
        let mut all = self.lock();
        let used = self.seconds(now);
        if let Some(series) = all.get(&labels) {
            series.used.store(used, Ordering::Relaxed);
            return series.clone();
        }
        if all.len() >= MOST_SERIES {
            self.forget(&mut all, now);
        }
        let labels = if all.len() >= MOST_SERIES { overflow(labels) } else { labels };
        let series = all.entry(labels).or_default();
        series.used.store(used, Ordering::Relaxed);
        series.clone()
    }

    fn forget(&self, all: &mut HashMap<L, Arc<Series>>, now: Instant) {
        let now = self.seconds(now);
        // Whoever is open holds its series.
        all.retain(|_, series| {
            Arc::strong_count(series) > 1 || now < series.used.load(Ordering::Relaxed) + FORGET.as_secs()
        });
    }
}

impl Labels {
    /// The one series of its side and protection for all that have no room.
    fn overflow(self) -> Self {
        Self { source: End::default(), destination: End::default(), service: None, overflow: true, ..self }
    }

    fn of(connection: &Connection, view: &View) -> Self {
        let decision = connection.decision();
        let security = decision.as_ref().map(|decision| &decision.security);
        let proven = match security {
            Some(Security::Mtls(peer)) => Some(peer.id()),
            Some(Security::Plaintext(_)) | None => None,
        };
        let pod = &connection.pod;
        let here = match view.workload_of(&pod.uid) {
            Some(workload) => End::of(workload, proven.map(|_| &pod.identity)),
            // Its news may come after it.
            None => {
                let (namespace, name) = pod.name.split_once('/').unwrap_or(("", &pod.name));
                End {
                    names: Some((namespace.into(), Canonical::of(name))),
                    principal: proven.map(|_| pod.identity.clone()),
                }
            }
        };
        let (address, port) = match connection.direction {
            Direction::Outbound => (decision.as_ref().map(|decision| decision.to.ip()), None),
            Direction::Inbound => (Some(connection.source.ip()), connection.destination().map(|to| to.port())),
        };
        let there = match address.and_then(|address| view.workload_at(address)) {
            Some(workload) => End::of(workload, proven),
            None => End { names: None, principal: proven.cloned() },
        };
        let said = decision.as_ref().and_then(|decision| decision.service.as_deref());
        let said = said.and_then(|service| service.parse::<ServiceName>().ok());
        let service = match port {
            None => said,
            Some(port) => view.workload_of(&pod.uid).and_then(|workload| served(workload, port, said.as_ref())),
        };
        let (reporter, source, destination) = match connection.direction {
            Direction::Outbound => ("source", here, there),
            Direction::Inbound => ("destination", there, here),
        };
        let security = if proven.is_some() { "mutual_tls" } else { UNKNOWN };
        Self { reporter, source, destination, service, security, overflow: false }
    }
}

/// The Service by which a client came to this port: the one that it says, if the pod serves it there, else the only one
/// that the pod serves there. A peer's word alone never becomes a label.
fn served(workload: &Workload, port: u16, said: Option<&ServiceName>) -> Option<ServiceName> {
    let serves = |endpoint: &&mesh::Endpoint| endpoint.ports.iter().any(|it| it.target_port == port);
    let mut here = workload.endpoints.iter().filter(serves).map(|endpoint| &endpoint.service);
    if let Some(said) = said {
        return here.find(|service| *service == said).cloned();
    }
    let only = here.next();
    if here.next().is_some() { None } else { only.cloned() }
}

impl End {
    fn of(workload: &Workload, principal: Option<&SpiffeId>) -> Self {
        Self { names: Some((workload.namespace.clone(), workload.canonical.clone())), principal: principal.cloned() }
    }
}

impl Kind {
    fn of(connection: &Connection) -> Self {
        let decision = connection.decision();
        let (security, reason) =
            decision.map_or(("none", ""), |decision| (decision.security.as_str(), decision.security.reason()));
        Self { direction: connection.direction.as_str(), security, reason }
    }
}

impl EncodeLabelSet for Kind {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        [("direction", self.direction), ("security", self.security), ("reason", self.reason)].encode(encoder)
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let unknown = if self.overflow { "overflow" } else { UNKNOWN };
        write(encoder, "reporter", self.reporter)?;
        for (side, end) in [(&SOURCE, &self.source), (&DESTINATION, &self.destination)] {
            let [namespace, workload, service, revision] = match &end.names {
                Some((namespace, names)) => {
                    [namespace, &names.workload, &names.service, &names.revision].map(|it| &**it)
                }
                None => [unknown; 4],
            };
            let principal = end.principal.as_ref().map_or(unknown, SpiffeId::as_str);
            let cluster = if end.names.is_some() { CLUSTER } else { unknown };
            // As in Istio, an application and its version are the canonical ones again.
            let values = [workload, service, revision, namespace, principal, service, revision, cluster];
            for (name, value) in side.iter().zip(values) {
                write(encoder, name, value)?;
            }
        }
        let hostname = self.service.as_ref().map_or(unknown, |service| &service.hostname);
        let namespace = self.service.as_ref().map_or(unknown, |service| &service.namespace);
        let name = hostname.split('.').next().unwrap_or(unknown);
        let rest = [
            ("destination_service", hostname),
            ("destination_service_name", name),
            ("destination_service_namespace", namespace),
            ("request_protocol", "tcp"),
            // The same for a connection's beginning and end, or the two could not be set against each other: how
            // connections fail is counted by reason elsewhere.
            ("response_flags", "-"),
            ("connection_security_policy", self.security),
        ];
        rest.iter().try_for_each(|(name, value)| write(encoder, name, value))
    }
}

/// The one cluster that there is, as Istio calls it.
const CLUSTER: &str = "Kubernetes";

const SOURCE: [&str; 8] = [
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
];

const DESTINATION: [&str; 8] = [
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
];

fn write(encoder: &mut LabelSetEncoder<'_>, name: &str, value: &str) -> fmt::Result {
    (name, if value.is_empty() { UNKNOWN } else { value }).encode(encoder.encode_label())
}

/// Ours beside Istio's: what was in clear, and why.
const OUR_NAMES: [(&str, &str); 4] = [
    ("justmtls_proxy_connections_opened", "Connections that were decided and opened, by protection and reason"),
    ("justmtls_proxy_connections_closed", "Opened connections that have ended, by protection and reason"),
    ("justmtls_proxy_sent_bytes", "Payload that servers sent, by protection and reason"),
    ("justmtls_proxy_received_bytes", "Payload that servers received, by protection and reason"),
];

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.pairs.encode(&NAMES, &mut encoder)?;
        self.0.kinds.encode(&OUR_NAMES, &mut encoder)
    }
}

impl<L: EncodeLabelSet> Table<L> {
    fn encode(&self, names: &[(&str, &str); 4], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let counts: [fn(&Series) -> &AtomicU64; 4] =
            [|it| &it.opened, |it| &it.closed, |it| &it.sent, |it| &it.received];
        for ((name, help), count) in names.iter().zip(counts) {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in &*all {
                let value = count(series).load(Ordering::Relaxed);
                metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(number: usize) -> Labels {
        let names = Some(("shop".into(), Canonical::of(&format!("web-{number}"))));
        let source = End { names, principal: None };
        Labels {
            reporter: "source",
            source,
            destination: End::default(),
            service: None,
            security: UNKNOWN,
            overflow: false,
        }
    }

    fn rest() -> Labels {
        labels(0).overflow()
    }

    fn text(table: Table<Labels>) -> String {
        #[derive(Debug)]
        struct Shown(Table<Labels>);
        impl Collector for Shown {
            fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
                self.0.encode(&NAMES, &mut encoder)
            }
        }
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(Shown(table)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn series_are_bounded_and_what_has_no_room_is_counted_together() {
        let now = Instant::now();
        let table = Table::new(now);
        for number in 0..MOST_SERIES + 50 {
            table.find(labels(number), Labels::overflow, now).opened.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(table.lock().len(), MOST_SERIES + 1);
        assert_eq!(table.lock()[&rest()].opened.load(Ordering::Relaxed), 50);
        let text = text(table);
        let line = text.lines().find(|line| line.contains("opened_total") && line.contains("overflow")).unwrap();
        assert!(line.contains(r#"reporter="source""#) && line.ends_with(" 50"), "{line}");
    }

    #[test]
    fn a_series_is_forgotten_an_hour_after_its_last_connection_and_never_before() {
        let now = Instant::now();
        let table = Table::new(now);
        let open = table.find(labels(1), Labels::overflow, now);
        drop(table.find(labels(2), Labels::overflow, now));
        table.forget(&mut table.lock(), now + FORGET - Duration::from_secs(1));
        assert_eq!(table.lock().len(), 2);
        table.forget(&mut table.lock(), now + FORGET);
        assert_eq!(table.lock().keys().collect::<Vec<_>>(), [&labels(1)], "the open one stays");
        open.used.store(table.seconds(now + FORGET), Ordering::Relaxed);
        drop(open);
        table.forget(&mut table.lock(), now + FORGET * 2 - Duration::from_secs(1));
        assert_eq!(table.lock().len(), 1);
        table.forget(&mut table.lock(), now + FORGET * 2);
        assert!(table.lock().is_empty());
    }

    #[test]
    fn each_label_of_istios_is_there_once() {
        let now = Instant::now();
        let table = Table::new(now);
        drop(table.find(labels(1), Labels::overflow, now));
        let text = text(table);
        let line = text.lines().find(|line| line.starts_with("istio_tcp_sent_bytes_total")).unwrap();
        for name in SOURCE.iter().chain(&DESTINATION) {
            assert_eq!(line.matches(&format!("{name}=")).count(), 1, "{name} in {line}");
        }
        assert!(line.contains(r#"source_workload="web-1""#) && line.contains(r#"source_cluster="Kubernetes""#));
        assert!(
            line.contains(r#"destination_workload="unknown""#) && line.contains(r#"destination_service="unknown""#)
        );
        assert!(line.contains(r#"request_protocol="tcp",response_flags="-",connection_security_policy="unknown""#));
    }

    #[test]
    fn a_service_is_named_only_where_the_pod_serves_it() {
        let name = |name: &str| format!("shop/{name}.shop.svc.cluster.local").parse::<ServiceName>().unwrap();
        let endpoint = |service: &str, target_port| mesh::Endpoint {
            service: name(service),
            ports: vec![mesh::EndpointPort { service_port: 80, target_port }],
        };
        let mut workload =
            crate::tests::world::workload("w", &crate::tests::world::id("shop/sa/w"), crate::tests::world::CLIENT);
        workload.endpoints = vec![endpoint("web", 8080), endpoint("metrics", 9090)];
        assert_eq!(served(&workload, 8080, Some(&name("web"))), Some(name("web")));
        assert_eq!(served(&workload, 8080, Some(&name("metrics"))), None, "a lie");
        assert_eq!(served(&workload, 8080, None), Some(name("web")));
        assert_eq!(served(&workload, 1, None), None);
        workload.endpoints.push(endpoint("other", 8080));
        assert_eq!(served(&workload, 8080, None), None, "either of two");
        assert_eq!(served(&workload, 8080, Some(&name("other"))), Some(name("other")));
    }
}
