//! What nodes are told, encoded once for all of them.
//!
//! A stream owns no copy: it remembers up to which change it has looked, and asks what came after.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use identity::TrustBundle;
use tokio::sync::watch;
use wire::discovery::{BUNDLE_NAME, Kind, Published, Resource, SETTINGS_NAME};

use crate::index::{Told, Touched, Views};

/// Changes that are remembered. A stream that is further behind than that looks at everything.
const MAX_LOG: usize = 16 * 1024;

/// The pauses between two heartbeats of a stream: 5,000 nodes cost 1,000 small messages a second at the longest.
const SHORTEST_BEAT: Duration = Duration::from_millis(200);
const LONGEST_BEAT: Duration = Duration::from_secs(5);

/// All resources, and what changed when.
#[derive(Debug)]
pub(crate) struct Publication {
    state: RwLock<State>,
    /// The number of the last change.
    changed: watch::Sender<u64>,
}

#[derive(Default, Debug)]
struct State {
    number: u64,
    /// What every proxy may have.
    shared: BTreeMap<Kind, BTreeMap<String, Published>>,
    /// By node, what its agent alone may have.
    node_pods: HashMap<String, BTreeMap<String, Published>>,
    /// The last changes with their numbers, oldest first.
    log: VecDeque<(u64, Place)>,
    /// Up to this number the log has holes.
    forgotten: u64,
    /// How old a view may be.
    view_lifetime: Duration,
    /// Why nothing is told yet.
    withheld: Option<String>,
}

/// Where a resource stands.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Place {
    kind: Kind,
    /// The one node that it is for; `None`: for all.
    node: Option<String>,
    name: String,
}

/// What may be different since a stream last looked.
#[derive(Debug, PartialEq)]
pub(crate) enum News {
    /// These resources, by kind.
    Of(BTreeMap<Kind, BTreeSet<String>>),
    /// Anything.
    Everything,
}

impl Publication {
    /// Everything that there is at the start, so that whoever sees a publication sees a whole one.
    pub(crate) fn new(bundle: &TrustBundle, views: &Views) -> Self {
        let publication = Self { state: RwLock::default(), changed: watch::Sender::new(0) };
        {
            let mut state = publication.state.write().unwrap_or_else(PoisonError::into_inner);
            state.view_lifetime = views.settings.view_lifetime;
            let bundle = Published::new(&Resource::Bundle(bundle.clone()));
            state.put(Place { kind: Kind::Bundle, node: None, name: BUNDLE_NAME.to_owned() }, Some(bundle));
            for told in views.all() {
                let (place, resource) = look_up(views, told);
                state.put(place, resource.map(|resource| Published::new(&resource)));
            }
        }
        publication
    }

    /// Publishes what changed in the views; streams see all of it at once.
    pub(crate) fn publish(&self, views: &Views, touched: Touched) {
        if touched.is_empty() {
            return;
        }
        // Encoded before the lock is taken: streams read under it.
        let changes: Vec<_> = touched
            .into_iter()
            .map(|told| look_up(views, told))
            .map(|(place, resource)| (place, resource.map(|resource| Published::new(&resource))))
            .collect();
        let number = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            state.number += 1;
            state.view_lifetime = views.settings.view_lifetime;
            for (place, resource) in changes {
                state.put(place, resource);
            }
            state.number
        };
        self.changed.send_replace(number);
    }

    /// Says why nothing may be told, or that everything may.
    pub(crate) fn withhold(&self, because: Option<String>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).withheld = because;
    }

    /// Why nothing may be told: what nodes know may be more than what is known here (T10).
    pub(crate) fn withheld(&self) -> Option<String> {
        self.read().withheld.clone()
    }

    /// The pause between two heartbeats: several fit into the life of a view, so that one that is late harms nobody.
    pub(crate) fn heartbeat(&self) -> Duration {
        (self.read().view_lifetime / 6).clamp(SHORTEST_BEAT, LONGEST_BEAT)
    }

    /// Wakes whoever waits when something changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The number of the last change.
    pub(crate) fn number(&self) -> u64 {
        self.read().number
    }

    /// The number of the last change, and what came after `since` for a subscriber on a node.
    pub(crate) fn news(&self, since: u64, node: &str) -> (u64, News) {
        let state = self.read();
        if since < state.forgotten {
            return (state.number, News::Everything);
        }
        let mut news: BTreeMap<Kind, BTreeSet<String>> = BTreeMap::new();
        for (_, place) in state.log.iter().rev().take_while(|(number, _)| *number > since) {
            if place.node.as_deref().is_none_or(|only| only == node) {
                news.entry(place.kind).or_default().insert(place.name.clone());
            }
        }
        (state.number, News::Of(news))
    }

    /// A resource as a node may have it.
    pub(crate) fn get(&self, node: &str, kind: Kind, name: &str) -> Option<Published> {
        self.read().of(node, kind)?.get(name).cloned()
    }

    /// All resources of a kind that a node may have.
    pub(crate) fn all(&self, node: &str, kind: Kind) -> Vec<Published> {
        self.read().of(node, kind).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn of(&self, node: &str, kind: Kind) -> Option<&BTreeMap<String, Published>> {
        match kind {
            Kind::NodePod => self.node_pods.get(node),
            _ => self.shared.get(&kind),
        }
    }

    fn put(&mut self, place: Place, resource: Option<Published>) {
        let map = match &place.node {
            Some(node) => self.node_pods.entry(node.clone()).or_default(),
            None => self.shared.entry(place.kind).or_default(),
        };
        match resource {
            Some(resource) => map.insert(place.name.clone(), resource),
            None => map.remove(&place.name),
        };
        if let Some(node) = &place.node
            && map.is_empty()
        {
            self.node_pods.remove(node);
        }
        self.log.push_back((self.number, place));
        if self.log.len() > MAX_LOG
            && let Some((number, _)) = self.log.pop_front()
        {
            self.forgotten = number;
        }
    }
}

/// Where something that nodes are told stands, and what it is now; `None` where it is gone.
fn look_up(views: &Views, told: Told) -> (Place, Option<Resource>) {
    let shared = |kind, name: String| Place { kind, node: None, name };
    match told {
        Told::Settings => {
            let settings = mesh::Resource::Settings(views.settings.clone());
            (shared(Kind::Settings, SETTINGS_NAME.to_owned()), Some(Resource::Mesh(settings)))
        }
        Told::Workload(uid) => {
            let workload = views.workloads.get(&uid).cloned();
            let resource = workload.map(|workload| Resource::Mesh(mesh::Resource::Workload(Box::new(workload))));
            (shared(Kind::Address, uid.to_string()), resource)
        }
        Told::Service(name) => {
            let resource =
                views.services.get(&name).cloned().map(|service| Resource::Mesh(mesh::Resource::Service(service)));
            (shared(Kind::Address, name.to_string()), resource)
        }
        Told::Policy(name) => {
            let resource =
                views.policies.get(&name).cloned().map(|policy| Resource::Mesh(mesh::Resource::Policy(policy)));
            (shared(Kind::Policy, name.to_string()), resource)
        }
        Told::NodePod(node, uid) => {
            let resource = views.node_pods.get(&node).and_then(|pods| pods.get(&uid)).cloned().map(Resource::NodePod);
            (Place { kind: Kind::NodePod, node: Some(node), name: uid.to_string() }, resource)
        }
    }
}

#[cfg(test)]
mod tests {
    use identity::UnixTime;
    use manifests::{Change, parse};

    use super::*;
    use crate::index::Index;

    fn bundle() -> TrustBundle {
        let root = identity::issuer::Root::generate(
            &"cluster.local".parse().unwrap(),
            UnixTime::now(),
            std::time::Duration::from_secs(60),
        );
        root.unwrap().bundle().unwrap()
    }

    fn pod(name: &str, node: &str, address: u8) -> Change {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: {name}, uid: uid-{name}}}\nspec: {{nodeName: {node}, \
             containers: [{{name: c, image: i}}]}}\nstatus: {{phase: Running, podIPs: [{{ip: 10.88.16.{address}}}]}}\n"
        );
        Change::Applied(parse("test", text).objects.remove(0).0)
    }

    fn apply(publication: &Publication, index: &mut Index, change: Change) {
        let touched = index.apply(change);
        publication.publish(index.views(), touched);
    }

    #[test]
    fn the_first_publication_is_whole() {
        let mut index = Index::new("cluster.local".parse().unwrap());
        index.apply(pod("web", "node-a", 5));
        let publication = Publication::new(&bundle(), index.views());
        assert_eq!(publication.all("node-a", Kind::Address).len(), 1);
        assert_eq!(publication.all("node-a", Kind::NodePod).len(), 1);
        assert_eq!(publication.all("node-a", Kind::Bundle).len(), 1);
        assert_eq!(publication.all("node-a", Kind::Settings).len(), 1);
        assert!(publication.all("node-b", Kind::NodePod).is_empty());
    }

    #[test]
    fn a_change_is_news_for_whom_it_concerns_and_wakes_them() {
        let mut index = Index::new("cluster.local".parse().unwrap());
        let publication = Publication::new(&bundle(), index.views());
        let mut changed = publication.subscribe();
        let (start, _) = publication.news(0, "node-a");
        apply(&publication, &mut index, pod("web", "node-a", 5));
        assert!(changed.has_changed().unwrap());
        changed.mark_unchanged();
        let (_, News::Of(here)) = publication.news(start, "node-a") else { panic!() };
        let (now, News::Of(there)) = publication.news(start, "node-b") else { panic!() };
        assert_eq!(here.keys().copied().collect::<Vec<_>>(), [Kind::Address, Kind::NodePod]);
        assert_eq!(there.keys().copied().collect::<Vec<_>>(), [Kind::Address]);
        assert_eq!(publication.news(now, "node-a"), (now, News::Of(BTreeMap::new())));
        apply(&publication, &mut index, pod("web", "node-a", 5));
        assert!(!changed.has_changed().unwrap());
    }

    #[test]
    fn a_resource_that_is_gone_is_news_and_not_there() {
        let mut index = Index::new("cluster.local".parse().unwrap());
        index.apply(pod("web", "node-a", 5));
        let publication = Publication::new(&bundle(), index.views());
        let (start, _) = publication.news(0, "node-a");
        let Change::Applied(pod) = pod("web", "node-a", 5) else { panic!() };
        let key = pod.key();
        apply(&publication, &mut index, Change::Deleted(key));
        let (_, News::Of(news)) = publication.news(start, "node-a") else { panic!() };
        assert!(news[&Kind::Address].contains("Kubernetes//Pod/shop/web"));
        assert!(publication.get("node-a", Kind::Address, "Kubernetes//Pod/shop/web").is_none());
        assert!(publication.get("node-a", Kind::NodePod, "uid-web").is_none());
    }

    #[test]
    fn whoever_is_too_far_behind_looks_at_everything() {
        let mut index = Index::new("cluster.local".parse().unwrap());
        let publication = Publication::new(&bundle(), index.views());
        for number in 0..MAX_LOG {
            apply(&publication, &mut index, pod("web", "node-a", if number % 2 == 0 { 5 } else { 6 }));
        }
        assert_eq!(publication.news(1, "node-a").1, News::Everything);
        let (now, _) = publication.news(0, "node-a");
        assert_eq!(publication.news(now, "node-a"), (now, News::Of(BTreeMap::new())));
    }
}
