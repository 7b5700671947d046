//! What the simulated API server has: objects as text, and what changed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The kinds that there are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    Namespaces,
    Nodes,
    Pods,
    Services,
    EndpointSlices,
    NetworkPolicies,
    ConfigMaps,
    Secrets,
    Leases,
    PeerAuthentications,
    AuthorizationPolicies,
}

impl Kind {
    /// By group, version and plural, as paths name it.
    pub(super) fn of(group: &str, plural: &str) -> Option<Kind> {
        Some(match (group, plural) {
            ("v1", "namespaces") => Self::Namespaces,
            ("v1", "nodes") => Self::Nodes,
            ("v1", "pods") => Self::Pods,
            ("v1", "services") => Self::Services,
            ("v1", "configmaps") => Self::ConfigMaps,
            ("v1", "secrets") => Self::Secrets,
            ("discovery.k8s.io/v1", "endpointslices") => Self::EndpointSlices,
            ("networking.k8s.io/v1", "networkpolicies") => Self::NetworkPolicies,
            ("coordination.k8s.io/v1", "leases") => Self::Leases,
            ("security.istio.io/v1", "peerauthentications") => Self::PeerAuthentications,
            ("security.istio.io/v1", "authorizationpolicies") => Self::AuthorizationPolicies,
            _ => return None,
        })
    }
}

/// Changes of a kind that are kept: a watch that is further behind begins anew, as with a real API server.
const CHANGES: usize = 100_000;

/// An object, and its version.
#[derive(Clone)]
pub(super) struct Stored {
    pub(super) version: u64,
    pub(super) text: Arc<str>,
}

#[derive(Default)]
struct OfKind {
    objects: BTreeMap<String, Stored>,
    /// By version, a line of a watch.
    changes: VecDeque<(u64, Arc<str>)>,
    /// Versions up to this one are forgotten.
    forgotten: u64,
}

#[derive(Default)]
struct State {
    version: u64,
    kinds: BTreeMap<Kind, OfKind>,
    /// Bytes of changes so far.
    bytes: u64,
}

/// All objects.
#[derive(Default)]
pub(super) struct Store {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

/// What is not as it was thought.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Conflict;

impl Store {
    /// Puts an object in its place; `@VERSION@` in it is its version.
    pub(super) fn put(&self, kind: Kind, key: &str, text: &str) -> Stored {
        let mut state = self.lock();
        self.store(&mut state, kind, key, text)
    }

    /// The same if the one that is there has this version; `None`: if none is there.
    pub(super) fn put_if(&self, kind: Kind, key: &str, was: Option<u64>, text: &str) -> Result<Stored, Conflict> {
        let mut state = self.lock();
        let there = state.kinds.entry(kind).or_default().objects.get(key).map(|stored| stored.version);
        if there != was {
            return Err(Conflict);
        }
        Ok(self.store(&mut state, kind, key, text))
    }

    /// Takes an object away.
    pub(super) fn remove(&self, kind: Kind, key: &str) {
        let mut state = self.lock();
        if let Some(stored) = state.kinds.entry(kind).or_default().objects.remove(key) {
            state.version += 1;
            let text = with_version(&stored.text, stored.version, state.version);
            state.note(kind, "DELETED", &text);
            self.changed.send_replace(());
        }
    }

    /// One object.
    pub(super) fn get(&self, kind: Kind, key: &str) -> Option<Stored> {
        self.lock().kinds.get(&kind)?.objects.get(key).cloned()
    }

    /// All objects of a kind, and the version up to which they are said.
    pub(super) fn all(&self, kind: Kind) -> (Vec<Arc<str>>, u64) {
        let state = self.lock();
        let objects = state.kinds.get(&kind).into_iter().flat_map(|kind| kind.objects.values());
        (objects.map(|stored| stored.text.clone()).collect(), state.version)
    }

    /// Lines of what changed after a version, so many at most, and the version of the last one. `None`: it is forgotten.
    pub(super) fn since(&self, kind: Kind, version: u64, most: usize) -> Option<(Vec<Arc<str>>, u64)> {
        let state = self.lock();
        let Some(of_kind) = state.kinds.get(&kind) else { return Some((Vec::new(), version)) };
        if version < of_kind.forgotten {
            return None;
        }
        let first = of_kind.changes.partition_point(|(at, _)| *at <= version);
        let mut changes = of_kind.changes.range(first..).take(most);
        let lines: Vec<_> = changes.clone().map(|(_, line)| line.clone()).collect();
        Some((lines, changes.next_back().map_or(version, |(at, _)| *at)))
    }

    /// Wakes who waits for a change.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Bytes of all changes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn store(&self, state: &mut State, kind: Kind, key: &str, text: &str) -> Stored {
        state.version += 1;
        let text: Arc<str> = text.replacen("@VERSION@", &state.version.to_string(), 1).into();
        let stored = Stored { version: state.version, text };
        let old = state.kinds.entry(kind).or_default().objects.insert(key.to_owned(), stored.clone());
        state.note(kind, if old.is_some() { "MODIFIED" } else { "ADDED" }, &stored.text);
        self.changed.send_replace(());
        stored
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note(&mut self, kind: Kind, what: &str, object: &str) {
        let line = event(what, object);
        self.bytes += line.len() as u64;
        let of_kind = self.kinds.entry(kind).or_default();
        of_kind.changes.push_back((self.version, line.into()));
        if of_kind.changes.len() > CHANGES
            && let Some((version, _)) = of_kind.changes.pop_front()
        {
            of_kind.forgotten = version;
        }
    }
}

/// A line of a watch.
pub(super) fn event(what: &str, object: &str) -> String {
    format!("{{\"type\":\"{what}\",\"object\":{object}}}\n")
}

/// A watch goes on from the version of what it saw last, also where that is a removal.
fn with_version(text: &str, old: u64, new: u64) -> String {
    text.replacen(&format!("\"resourceVersion\":\"{old}\""), &format!("\"resourceVersion\":\"{new}\""), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_said_from_a_version_on_and_a_write_holds_to_what_was_read() {
        let store = Store::default();
        let object = r#"{"metadata":{"resourceVersion":"@VERSION@"}}"#;
        let first = store.put(Kind::Pods, "a/one", object);
        assert_eq!(&*first.text, r#"{"metadata":{"resourceVersion":"1"}}"#);
        let second = store.put_if(Kind::Pods, "a/one", Some(first.version), object).unwrap();
        assert_eq!(store.put_if(Kind::Pods, "a/one", Some(first.version), object).err(), Some(Conflict));
        assert_eq!(store.put_if(Kind::Pods, "a/one", None, object).err(), Some(Conflict));
        store.remove(Kind::Pods, "a/one");
        let (lines, last) = store.since(Kind::Pods, first.version, 10).unwrap();
        assert_eq!((lines.len(), last), (2, second.version + 1));
        assert!(lines[0].contains("MODIFIED") && lines[1].contains("DELETED") && lines[1].contains("\"3\""));
        assert_eq!(store.since(Kind::Pods, 0, 1).unwrap().1, 1);
        assert!(store.all(Kind::Pods).0.is_empty() && store.get(Kind::Pods, "a/one").is_none());
    }
}
