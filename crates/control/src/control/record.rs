//! The record of captured pods, wherever it is kept: in a file, or, where there are several replicas, in ConfigMaps that all of
//! them watch (`kubernetes::records`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use kube::Client;
use manifests::{Change as ObjectChange, Kind, Object};
use mesh::PodUid;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use wire::report::CaptureFailure;

use super::Event;
use crate::ROOT_NAMESPACE;
use crate::captures::Captures;
use crate::index::{Index, Touched};
use crate::kubernetes::records::{self, Change, Record as Written};
use crate::kubernetes::{Failure, pause};
use crate::problem::Problem;

/// How long a pod must be missing before it is taken out: its name may be there before the pod is seen here.
const MISSING: Duration = Duration::from_secs(120);
/// How often that is looked at: it is a look at every pod of every record.
const TIDY: Duration = Duration::from_secs(30);

/// Where captured pods are written down.
pub(crate) enum Record {
    /// In a file of this process alone.
    File(Captures),
    /// In ConfigMaps, for all replicas.
    Shared(Shared),
}

/// The ConfigMaps, as this replica sees them.
pub(crate) struct Shared {
    client: Client,
    events: mpsc::Sender<Event>,
    /// By the name of the ConfigMap.
    shown: BTreeMap<String, Written>,
    /// What is to be written, by node.
    wanted: BTreeMap<String, Change>,
    /// Nodes whose record is being written.
    writing: BTreeSet<String>,
    /// Reports that are not confirmed yet, by node.
    waiting: BTreeMap<String, Vec<Report>>,
    missing: HashMap<(String, PodUid), Instant>,
    problems: BTreeMap<String, Problem>,
    /// When to look next for what is gone.
    tidies: Option<Instant>,
}

/// What an agent says.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) node: String,
    pub(crate) pods: BTreeSet<PodUid>,
    /// Pods that run and cannot be captured.
    pub(crate) failed: BTreeMap<PodUid, CaptureFailure>,
    /// Told once peers can know.
    pub(crate) published: oneshot::Sender<()>,
}

impl Record {
    pub(crate) fn problems(&self) -> Vec<Problem> {
        match self {
            Self::File(captures) => captures.problem().into_iter().collect(),
            Self::Shared(shared) => shared.problems.values().cloned().collect(),
        }
    }
}

impl Shared {
    pub(crate) fn new(client: &Client, events: mpsc::Sender<Event>) -> Self {
        Self {
            client: client.clone(),
            events,
            shown: BTreeMap::new(),
            wanted: BTreeMap::new(),
            writing: BTreeSet::new(),
            waiting: BTreeMap::new(),
            missing: HashMap::new(),
            problems: BTreeMap::new(),
            tidies: None,
        }
    }

    /// Takes in what the watch says, as far as it is about records. What that touches, and the nodes that it is about.
    pub(crate) fn take_in(&mut self, changes: &[ObjectChange], index: &mut Index) -> (Touched, BTreeSet<String>) {
        let (mut touched, mut nodes) = (Touched::new(), BTreeSet::new());
        for record in changes.iter().filter_map(|change| self.show(change)) {
            touched.extend(index.recorded(&record.node, record.pods));
            nodes.insert(record.node);
        }
        (touched, nodes)
    }

    /// Where a change is about a record, what that says now.
    fn show(&mut self, change: &ObjectChange) -> Option<Written> {
        match change {
            ObjectChange::Applied(Object::ConfigMap(config)) => {
                let name = config.metadata.name.clone()?;
                let Some(record) = records::read(config) else { return self.hide(&name) };
                self.shown.insert(name, record.clone());
                Some(record)
            }
            ObjectChange::Deleted(key) if key.kind == Kind::ConfigMap => {
                let is_ours = key.namespace.as_deref() == Some(ROOT_NAMESPACE);
                self.hide(&key.name).filter(|_| is_ours)
            }
            _ => None,
        }
    }

    fn hide(&mut self, name: &str) -> Option<Written> {
        self.shown.remove(name).map(|record| Written { pods: BTreeSet::new(), ..record })
    }

    fn names(&self, node: &str, pods: &BTreeSet<PodUid>) -> bool {
        let record = self.shown.get(&records::name(node)).filter(|record| record.node == node);
        pods.is_empty() || record.is_some_and(|record| record.pods.is_superset(pods))
    }

    /// Takes a report. It is written if it is news; the agent is told when the watch shows it. Pods that are to leave are
    /// reported as long as they have rules, and are not written.
    pub(crate) fn report(&mut self, report: Report, index: &Index) {
        let add = staying(&report, index);
        if !self.names(&report.node, &add) {
            self.want(&report.node, Change { add, ..Change::default() });
        }
        self.waiting.entry(report.node.clone()).or_default().push(report);
    }

    /// The reports of a node that the watch shows by now. An agent that is gone needs no answer.
    pub(crate) fn confirmed(&mut self, node: &str, index: &Index) -> Vec<Report> {
        let waiting = self.waiting.remove(node).into_iter().flatten().filter(|report| !report.published.is_closed());
        let (confirmed, waiting): (_, Vec<_>) =
            waiting.partition(|report| self.names(&report.node, &staying(report, index)));
        if !waiting.is_empty() {
            self.waiting.insert(node.to_owned(), waiting);
        }
        confirmed
    }

    /// Takes out pods that peers are to speak TLS with no longer.
    pub(crate) fn take_out<'a>(&mut self, pods: impl Iterator<Item = &'a (String, PodUid)>) {
        for (node, take_out) in by_node(pods) {
            self.want(node, Change { take_out, ..Change::default() });
        }
    }

    /// Names pods again that are to be captured after all.
    pub(crate) fn put_back<'a>(&mut self, pods: impl Iterator<Item = &'a (String, PodUid)>) {
        for (node, add) in by_node(pods) {
            self.want(node, Change { add, ..Change::default() });
        }
    }

    /// Takes out pods that are to be released, and says which of them no replica reads any more.
    pub(crate) fn forget(&mut self, pods: BTreeSet<(String, PodUid)>) -> BTreeSet<(String, PodUid)> {
        let is_named = |(node, pod): &(String, PodUid)| self.names(node, &BTreeSet::from([pod.clone()]));
        let (named, gone) = pods.into_iter().partition::<BTreeSet<_>, _>(is_named);
        self.take_out(named.iter());
        gone
    }

    fn want(&mut self, node: &str, change: Change) {
        self.wanted.entry(node.to_owned()).or_default().merge(change);
        self.write(node);
    }

    /// One write at a time for each node; what comes meanwhile is for the next.
    fn write(&mut self, node: &str) {
        if self.writing.contains(node) {
            return;
        }
        let Some(change) = self.wanted.remove(node).filter(|change| !change.is_empty()) else { return };
        self.writing.insert(node.to_owned());
        let (client, events, node) = (self.client.clone(), self.events.clone(), node.to_owned());
        tokio::spawn(async move {
            let mut failures = 0;
            loop {
                let failure = change.write(&client, &node).await.err();
                let done = failure.is_none();
                // That another replica was quicker is none that anybody must hear of.
                if failure != Some(Failure::Conflict) {
                    let event = Event::Written { node: node.clone(), failure };
                    if events.send(event).await.is_err() || done {
                        return;
                    }
                }
                failures += 1;
                sleep(pause(failures)).await;
            }
        });
    }

    /// Takes note of what became of a write; one that failed is tried again.
    pub(crate) fn written(&mut self, node: &str, failure: Option<Failure>) {
        if let Some(failure) = failure {
            let message = format!(
                "captured pods of node {node} cannot be recorded, and those that are new do not count as captured until they \
                 are: {failure}"
            );
            self.problems
                .insert(node.to_owned(), Problem::error(format!("ConfigMap {}", records::name(node)), message));
            return;
        }
        self.problems.remove(node);
        self.writing.remove(node);
        self.write(node);
    }

    /// Takes out pods that are gone, and records of nodes that are: the leader's part.
    pub(crate) fn tidy(&mut self, index: &Index, now: Instant) {
        if self.tidies.is_some_and(|next| now < next) {
            return;
        }
        self.tidies = Some(now + TIDY);
        let nodes: BTreeSet<&str> = index.nodes().collect();
        let mut missing = HashMap::new();
        let mut wanted = Vec::new();
        for record in self.shown.values() {
            let mut take_out = BTreeSet::new();
            for uid in record.pods.iter().filter(|uid| !index.has_pod(&record.node, uid)) {
                let pair = (record.node.clone(), uid.clone());
                let since = self.missing.get(&pair).copied().unwrap_or(now);
                missing.insert(pair, since);
                if now.saturating_duration_since(since) >= MISSING {
                    take_out.insert(uid.clone());
                }
            }
            let node_is_gone = !nodes.contains(&*record.node);
            if !take_out.is_empty() || (node_is_gone && record.pods.is_empty()) {
                wanted.push((record.node.clone(), Change { take_out, node_is_gone, ..Change::default() }));
            }
        }
        self.missing = missing;
        for (node, change) in wanted {
            self.want(&node, change);
        }
    }

    /// Nothing that is missing now is known to be gone.
    pub(crate) fn forget_missing(&mut self) {
        self.missing.clear();
    }
}

/// Each node's in one write.
fn by_node<'a>(pods: impl Iterator<Item = &'a (String, PodUid)>) -> BTreeMap<&'a str, BTreeSet<PodUid>> {
    let mut nodes: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (node, pod) in pods {
        nodes.entry(&**node).or_default().insert(pod.clone());
    }
    nodes
}

/// What a report names, without the pods that are to leave.
fn staying(report: &Report, index: &Index) -> BTreeSet<PodUid> {
    report.pods.iter().filter(|pod| !index.is_exempt(&report.node, pod)).cloned().collect()
}
