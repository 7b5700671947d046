//! Which nodes are connected, and what each has acknowledged: the control plane knows N of N.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use wire::discovery::Kind;

use crate::ca::token::{Caller, Role};

/// Discovery streams that one process of a node may have: its own, that of its successor in an upgrade, and a few that are
/// dead without our knowing yet.
const MAX_STREAMS: usize = 8;

/// The streams that are open.
#[derive(Default, Clone, Debug)]
pub(crate) struct Nodes(Arc<Mutex<Open>>);

#[derive(Default, Debug)]
struct Open {
    last_id: u64,
    streams: BTreeMap<u64, Stream>,
    /// The open ones of each process.
    by_process: HashMap<(String, &'static str), BTreeSet<u64>>,
    /// What the last stream of a process had come to when it ended. As many as there are tokens, at most.
    ended: BTreeMap<(String, &'static str), Stream>,
}

/// One stream, for `/nodes`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Stream {
    node: String,
    role: &'static str,
    /// Whether it stands; otherwise it is the last one that the process had.
    open: bool,
    #[serde(skip)]
    ended: Option<Instant>,
    kinds: BTreeMap<&'static str, Progress>,
}

impl Stream {
    /// Whether its node has taken in all workloads as they were after a change. A stream that the change did not concern says
    /// so with its next heartbeat.
    fn has_taken_in(&self, change: u64) -> bool {
        let progress = self.kinds.get(Kind::Address.as_str());
        progress.is_some_and(|progress| progress.acknowledged >= change && progress.refusal.is_none())
    }

    /// Whether its node was told of a change.
    fn was_told(&self, change: u64) -> bool {
        self.kinds.get(Kind::Address.as_str()).is_some_and(|progress| progress.sent >= change)
    }

    /// Whether its node has taken in everything that it was told.
    fn is_current(&self) -> bool {
        let everything =
            |(_, progress): (_, &Progress)| progress.acknowledged == progress.sent && progress.refusal.is_none();
        self.open && !self.kinds.is_empty() && self.kinds.iter().all(everything)
    }
}

/// How far a stream is with one kind.
#[derive(Clone, Default, Debug, Serialize, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Up to which change the node was told.
    pub(crate) sent: u64,
    /// Up to which change it has accepted everything.
    pub(crate) acknowledged: u64,
    /// Responses accepted.
    pub(crate) accepted: u64,
    /// Responses refused.
    pub(crate) refused: u64,
    /// What the node said when it last refused one, if it has accepted none since.
    pub(crate) refusal: Option<String>,
}

/// An open stream; it is closed when this is dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    nodes: Nodes,
    id: u64,
}

/// How long a node that was told may keep others from going on by saying nothing, or no.
const DEAF: Duration = Duration::from_secs(60);
/// How long any may, whatever it was told: one that reads nothing, asks for nothing, or comes and goes.
const IN_THE_END: Duration = Duration::from_secs(300);

impl Nodes {
    /// Notes a new stream; `None` where its process has too many.
    pub(crate) fn register(&self, caller: &Caller) -> Option<Registered> {
        let mut open = self.lock();
        let role = caller.role.as_str();
        let process = (caller.node.clone(), role);
        if open.by_process.get(&process).is_some_and(|streams| streams.len() >= MAX_STREAMS) {
            return None;
        }
        open.last_id += 1;
        let number = open.last_id;
        let stream = Stream { node: caller.node.clone(), role, open: true, ended: None, kinds: BTreeMap::new() };
        open.ended.remove(&process);
        open.streams.insert(number, stream);
        open.by_process.entry(process).or_default().insert(number);
        Some(Registered { nodes: self.clone(), id: number })
    }

    /// The streams that are open, and the last ones of processes that have none, by node.
    pub(crate) fn all(&self) -> BTreeMap<String, Vec<Stream>> {
        let mut nodes: BTreeMap<String, Vec<Stream>> = BTreeMap::new();
        let open = self.lock();
        for stream in open.streams.values().chain(open.ended.values()) {
            nodes.entry(stream.node.clone()).or_default().push(stream.clone());
        }
        nodes
    }

    /// How many nodes' proxies have taken in everything that they were told.
    pub(crate) fn current(&self) -> usize {
        let open = self.lock();
        let proxies = open.streams.values().filter(|stream| stream.role == Role::Proxy.as_str() && stream.is_current());
        proxies.map(|stream| stream.node.as_str()).collect::<BTreeSet<_>>().len()
    }

    /// Whether all proxies have taken in a change that was published `ago`: those that are connected, those that were, and those
    /// of `nodes`. One that is not connected cannot say so; it counts when it has been away for as long as a view lives (T4),
    /// from the time `since` where it was never there. One that was told and refuses, or says nothing for [`DEAF`], holds
    /// nobody up, and none does [`IN_THE_END`]: whoever it is, he must not decide when a mesh can be left.
    pub(crate) fn know<'a>(
        &self,
        (change, ago): (u64, Duration),
        mut nodes: impl Iterator<Item = &'a str>,
        since: Instant,
        lifetime: Duration,
    ) -> bool {
        if ago >= IN_THE_END.max(lifetime) {
            return true;
        }
        let open = self.lock();
        let role = Role::Proxy.as_str();
        let proxies = || open.streams.values().filter(|stream| stream.role == role);
        let ended = || open.ended.values().filter(|stream| stream.role == role);
        let long_ago = |moment: Instant| moment.elapsed() >= lifetime;
        let is_deaf = |stream: &Stream| ago >= DEAF.max(lifetime) && stream.was_told(change);
        proxies().all(|stream| stream.has_taken_in(change) || is_deaf(stream))
            && ended().all(|stream| stream.ended.is_some_and(long_ago))
            && (long_ago(since) || {
                let there: HashSet<_> = proxies().chain(ended()).map(|stream| &*stream.node).collect();
                nodes.all(|node| there.contains(node))
            })
    }

    /// Whether a node's agent is told here, and by no other replica, what to capture.
    pub(crate) fn serves_agent_of(&self, node: &str) -> bool {
        self.lock().by_process.contains_key(&(node.to_owned(), Role::Agent.as_str()))
    }

    /// How many streams are open.
    pub(crate) fn open(&self) -> usize {
        self.lock().streams.len()
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    /// Notes progress with a kind.
    pub(crate) fn note(&self, kind: Kind, change: impl FnOnce(&mut Progress)) {
        let mut open = self.nodes.lock();
        if let Some(stream) = open.streams.get_mut(&self.id) {
            change(stream.kinds.entry(kind.as_str()).or_default());
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut open = self.nodes.lock();
        let Some(mut stream) = open.streams.remove(&self.id) else { return };
        stream.open = false;
        stream.ended = Some(Instant::now());
        let process = (stream.node.clone(), stream.role);
        let Some(others) = open.by_process.get_mut(&process) else { return };
        others.remove(&self.id);
        if others.is_empty() {
            open.by_process.remove(&process);
            open.ended.insert(process, stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_listed_while_it_is_open() {
        let nodes = Nodes::default();
        let proxy = Caller { role: Role::Proxy, node: "node-a".to_owned() };
        let stream = nodes.register(&proxy).unwrap();
        stream.note(Kind::Address, |progress| progress.sent = 3);
        assert_eq!(nodes.all()["node-a"][0].kinds["address"].sent, 3);
        assert!(nodes.all()["node-a"][0].open && nodes.current() == 0);
        stream.note(Kind::Address, |progress| progress.acknowledged = 3);
        assert_eq!(nodes.current(), 1);
        drop(stream);
        let last = &nodes.all()["node-a"][0];
        assert!(!last.open && last.kinds["address"].acknowledged == 3, "what it had come to stays visible");
        assert_eq!((nodes.open(), nodes.current()), (0, 0));
        let _next = nodes.register(&proxy).unwrap();
        assert_eq!(nodes.all()["node-a"].len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_knows_a_change_who_has_taken_it_in_or_is_away_longer_than_a_view_lives() {
        let nodes = Nodes::default();
        let (since, lifetime) = (Instant::now(), Duration::from_secs(30));
        let know_since =
            |change, ago, names: &[&str]| nodes.know((change, ago), names.iter().copied(), since, lifetime);
        let know = |change, names: &[&str]| know_since(change, Duration::ZERO, names);
        let proxy = nodes.register(&Caller { role: Role::Proxy, node: "node-a".to_owned() }).unwrap();
        let agent = nodes.register(&Caller { role: Role::Agent, node: "node-b".to_owned() }).unwrap();
        assert!(!know(3, &[]), "it has not been told anything");
        proxy.note(Kind::Address, |progress| (progress.sent, progress.acknowledged) = (4, 3));
        assert!(know(3, &["node-a"]) && !know(4, &["node-a"]));
        assert!(!know(3, &["node-a", "node-b"]), "it may be on its way, with a view from before");
        tokio::time::advance(lifetime).await;
        assert!(know(3, &["node-a", "node-b"]));
        drop(agent);
        let successor = nodes.register(&Caller { role: Role::Proxy, node: "node-a".to_owned() }).unwrap();
        assert!(!know(3, &["node-a"]), "both of a node have to know");
        drop(successor);
        assert!(know(3, &["node-a"]));
        proxy.note(Kind::Address, |progress| progress.refusal = Some("no".to_owned()));
        assert!(!know(3, &["node-a"]));
        assert!(!know_since(5, DEAF, &["node-a"]), "it was not told of it");
        assert!(know_since(5, IN_THE_END, &["node-a"]), "whatever it does");
        assert!(know_since(4, DEAF, &["node-a"]) && !know_since(4, DEAF - Duration::from_secs(1), &["node-a"]));
        drop(proxy);
        assert!(!know(3, &["node-a"]), "it may still use what it knew");
        tokio::time::advance(lifetime).await;
        assert!(know(3, &["node-a"]));
    }

    #[test]
    fn a_process_has_a_bounded_number_of_streams_and_others_are_not_affected() {
        let nodes = Nodes::default();
        let proxy = Caller { role: Role::Proxy, node: "node-a".to_owned() };
        let agent = Caller { role: Role::Agent, node: "node-a".to_owned() };
        let mut open: Vec<_> = (0..MAX_STREAMS).map(|_| nodes.register(&proxy).unwrap()).collect();
        assert!(nodes.register(&proxy).is_none());
        assert!(nodes.register(&agent).is_some());
        open.pop();
        assert!(nodes.register(&proxy).is_some());
    }
}
