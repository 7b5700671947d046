//! What nodes are told, encoded once for all of them, and who is told of what.
//!
//! A stream owns no copy: news are posted to those whom a change concerns, and each looks up what it is now. A small mesh is
//! told to everybody. In a large one a proxy is told of its own node's pods and of what it asks about: what it was once told
//! of it hears of until that is gone, so that nothing which is in use is ever taken away for want of interest (T31).

mod places;
mod readers;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use identity::TrustBundle;
use wire::discovery::{BUNDLE_NAME, Kind, Position, Published, Resource, SETTINGS_NAME};

use self::places::{Name, Place, Places};
use self::readers::Readers;
use crate::ca::token::{Caller, Role};
use crate::index::{Told, Touched, Views};
use crate::watch::Positions;

pub(crate) use readers::{Mailbox, News};

/// The pauses between two heartbeats of a stream: 5,000 nodes cost 1,000 small messages a second at the longest.
const SHORTEST_BEAT: Duration = Duration::from_millis(200);
const LONGEST_BEAT: Duration = Duration::from_secs(5);

/// All resources, and who reads them.
#[derive(Debug)]
pub(crate) struct Publication {
    state: RwLock<State>,
}

#[derive(Default, Debug)]
struct State {
    number: u64,
    /// What every proxy may have.
    shared: BTreeMap<Kind, BTreeMap<Name, Published>>,
    /// By node, what its agent alone may have.
    node_pods: HashMap<Name, BTreeMap<Name, Published>>,
    places: Places,
    readers: Readers,
    /// The mesh is small enough to be told to everybody.
    whole: bool,
    /// How old a view may be.
    view_lifetime: Duration,
    /// Why nothing is told yet.
    withheld: Option<String>,
    /// How far all of it goes.
    positions: Positions,
}

/// One change, encoded.
struct Change {
    kind: Kind,
    /// The one node that it is for; `None`: for all.
    node: Option<Name>,
    name: Name,
    resource: Option<Published>,
    place: Option<Place>,
}

/// A reader of the publication, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    publication: &'a Publication,
    id: u64,
    mailbox: Arc<Mailbox>,
}

impl Publication {
    /// Everything that there is at the start, so that whoever sees a publication sees a whole one.
    pub(crate) fn new(bundle: &TrustBundle, views: &Views) -> Self {
        let mut state = State { view_lifetime: views.settings.view_lifetime, ..State::default() };
        state.places.set_settings(&views.settings);
        let resource = Some(Published::new(&Resource::Bundle(bundle.clone())));
        state.put(Change { kind: Kind::Bundle, node: None, name: BUNDLE_NAME.into(), resource, place: None });
        views.all().into_iter().for_each(|told| state.put(change(views, told)));
        state.whole = views.workloads.len() <= views.whole_mesh_up_to;
        Self { state: RwLock::new(state) }
    }

    /// Publishes what changed in the views; whom it concerns sees all of it at once.
    pub(crate) fn publish(&self, views: &Views, touched: Touched) {
        if touched.is_empty() {
            return;
        }
        // Encoded before the lock is taken: streams read under it.
        let changes: Vec<_> = touched.into_iter().map(|told| change(views, told)).collect();
        let mut state = self.write();
        state.number += 1;
        state.view_lifetime = views.settings.view_lifetime;
        let mut everything = state.places.set_settings(&views.settings);
        everything |= state.resize(views.workloads.len(), views.whole_mesh_up_to);
        let changed: Vec<_> = changes
            .into_iter()
            .map(|change| {
                let key = (change.kind, change.node.clone(), change.name.clone());
                state.put(change);
                key
            })
            .collect();
        if everything {
            state.readers.all(Role::Proxy).for_each(|id| state.readers.post(id, News::Everything));
        }
        let mut news: BTreeMap<u64, BTreeMap<Kind, BTreeSet<Name>>> = BTreeMap::new();
        for (kind, node, name) in changed {
            for (id, name) in state.concerned(kind, node, name) {
                news.entry(id).or_default().entry(kind).or_default().insert(name);
            }
        }
        news.into_iter().for_each(|(id, news)| state.readers.post(id, News::Of(news)));
    }

    /// Says why nothing may be told, or that everything may.
    pub(crate) fn withhold(&self, because: Option<String>) {
        self.write().withheld = because;
    }

    /// Why nothing may be told: what nodes know may be more than what is known here (T10).
    pub(crate) fn withheld(&self) -> Option<String> {
        self.read().withheld.clone()
    }

    /// What is published goes so far, from here on.
    pub(crate) fn reach(&self, positions: Positions) {
        self.write().positions = positions;
    }

    /// All that is read from here on is at least so new.
    pub(crate) fn changed(&self) -> Arc<Position> {
        self.read().positions.changed.clone()
    }

    /// The first kind of which somebody was told a change that may be missing here, with its version and how far we are.
    pub(crate) fn lacks(&self, told: &Position) -> Option<(String, u64, u64)> {
        let state = self.read();
        told.ahead_of(&state.positions.reached).map(|(kind, theirs, ours)| (kind.to_owned(), theirs, ours))
    }

    /// The pause between two heartbeats: several fit into the life of a view, so that one that is late harms nobody.
    pub(crate) fn heartbeat(&self) -> Duration {
        (self.read().view_lifetime / 6).clamp(SHORTEST_BEAT, LONGEST_BEAT)
    }

    /// Begins to read.
    pub(crate) fn open(&self, caller: &Caller) -> Reading<'_> {
        let (id, mailbox) = self.write().readers.open(caller);
        Reading { publication: self, id, mailbox }
    }

    /// The number of the last change.
    pub(crate) fn number(&self) -> u64 {
        self.read().number
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading<'_> {
    /// Where news arrive.
    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// All resources of a kind that this reader is to have, in addition to those that it `has` and that are still there.
    pub(crate) fn all<'n>(&self, kind: Kind, has: impl Iterator<Item = &'n Name>) -> Vec<Published> {
        match kind {
            Kind::Address => self.publication.write().addresses(self.id, has),
            _ => {
                let state = self.publication.read();
                let node = state.readers.node(self.id).unwrap_or_default();
                state.of(&node, kind).into_iter().flat_map(BTreeMap::values).cloned().collect()
            }
        }
    }

    /// What these resources are now, and which of them are gone.
    pub(crate) fn look<'n>(&self, kind: Kind, names: &'n BTreeSet<Name>) -> (Vec<Published>, Vec<&'n str>) {
        let state = self.publication.read();
        let node = state.readers.node(self.id).unwrap_or_default();
        let all = state.of(&node, kind);
        let (mut set, mut gone) = (Vec::new(), Vec::new());
        for name in names {
            match all.and_then(|all| all.get(name)) {
                Some(resource) => set.push(resource.clone()),
                None => gone.push(&**name),
            }
        }
        (set, gone)
    }

    /// What has these addresses, with the endpoints of a Service that does; and which of them nothing has: the reader hears
    /// when something gets one.
    pub(crate) fn ask(&self, addresses: &[IpAddr]) -> (BTreeSet<Name>, Vec<IpAddr>) {
        let mut state = self.publication.write();
        let (mut found, mut nobody) = (BTreeSet::new(), Vec::new());
        for address in addresses {
            let owners: Vec<Name> = state.places.at(*address).cloned().collect();
            if owners.is_empty() && state.readers.wait(self.id, *address) {
                nobody.push(*address);
            }
            for owner in owners {
                state.tell(self.id, owner, &mut found);
            }
        }
        (found, nobody)
    }

    /// The reader no longer waits for these addresses.
    pub(crate) fn forget(&self, addresses: &[IpAddr]) {
        let mut state = self.publication.write();
        addresses.iter().for_each(|address| state.readers.forget(self.id, *address));
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.publication.write().readers.close(self.id);
    }
}

impl State {
    fn of(&self, node: &str, kind: Kind) -> Option<&BTreeMap<Name, Published>> {
        match kind {
            Kind::NodePod => self.node_pods.get(node),
            _ => self.shared.get(&kind),
        }
    }

    fn put(&mut self, change: Change) {
        let Change { kind, node, name, resource, place } = change;
        if kind == Kind::Address {
            self.places.put(&name, place);
        }
        let map = match &node {
            Some(node) => self.node_pods.entry(node.clone()).or_default(),
            None => self.shared.entry(kind).or_default(),
        };
        match resource {
            Some(resource) => map.insert(name, resource),
            None => map.remove(&name),
        };
        if let Some(node) = node
            && map.is_empty()
        {
            self.node_pods.remove(&node);
        }
    }

    /// Notes how large the mesh is. Whether everybody is to be told of everything now and was not before. A mesh that grew
    /// beyond the bound counts as small again at half of it, so that one at the bound is not told over and over.
    fn resize(&mut self, workloads: usize, bound: usize) -> bool {
        let was = self.whole;
        self.whole = workloads <= if was { bound } else { bound / 2 };
        self.whole && !was
    }

    /// Who is to be told of a change, and of what by it.
    fn concerned(&mut self, kind: Kind, node: Option<Name>, name: Name) -> Vec<(u64, Name)> {
        match (kind, node) {
            (Kind::Address, _) => self.concerned_by_address(&name),
            (_, Some(node)) => self.readers.on_node(&node, Role::Agent).map(|id| (id, name.clone())).collect(),
            // What a process has not subscribed to, its stream leaves out.
            _ => [Role::Agent, Role::Proxy]
                .into_iter()
                .flat_map(|role| self.readers.all(role))
                .map(|id| (id, name.clone()))
                .collect(),
        }
    }

    fn concerned_by_address(&mut self, name: &Name) -> Vec<(u64, Name)> {
        let told: BTreeSet<u64> = self.readers.of(name).collect();
        let mut concerned: Vec<_> = told.iter().map(|id| (*id, name.clone())).collect();
        let Some(place) = self.places.get(name).cloned() else {
            told.into_iter().for_each(|id| self.readers.note(id, name, false));
            return concerned;
        };
        let mut others = BTreeSet::new();
        if self.whole || self.places.is_stray(name) {
            others.extend(self.readers.all(Role::Proxy));
        }
        others.extend(place.node.iter().flat_map(|node| self.readers.on_node(node, Role::Proxy)));
        others.extend(place.serves.iter().flat_map(|service| self.readers.of(service)));
        others.extend(place.addresses.iter().flat_map(|address| self.readers.served(*address)));
        for id in others.difference(&told) {
            let mut names = BTreeSet::new();
            self.tell(*id, name.clone(), &mut names);
            concerned.extend(names.into_iter().map(|name| (*id, name)));
        }
        concerned
    }

    /// Notes that a reader is told of a workload, or of a Service and its endpoints.
    fn tell(&mut self, id: u64, name: Name, names: &mut BTreeSet<Name>) {
        for endpoint in self.places.endpoints(&name) {
            self.readers.note(id, endpoint, true);
            names.insert(endpoint.clone());
        }
        self.readers.note(id, &name, true);
        names.insert(name);
    }

    /// All workloads and Services that a reader is to have.
    fn addresses<'n>(&mut self, id: u64, has: impl Iterator<Item = &'n Name>) -> Vec<Published> {
        let all = self.shared.get(&Kind::Address);
        let mut wanted: BTreeSet<Name> = has.filter(|name| self.places.get(name).is_some()).cloned().collect();
        if self.whole {
            wanted.extend(all.into_iter().flat_map(BTreeMap::keys).cloned());
        } else {
            wanted.extend(self.places.strays().cloned());
            if let Some(node) = self.readers.node(id) {
                wanted.extend(self.places.on_node(&node).cloned());
            }
        }
        let mut names = BTreeSet::new();
        wanted.into_iter().for_each(|name| self.tell(id, name, &mut names));
        let Some(all) = self.shared.get(&Kind::Address) else { return Vec::new() };
        names.iter().filter_map(|name| all.get(name)).cloned().collect()
    }
}

/// Something that nodes are told, as it is now.
fn change(views: &Views, told: Told) -> Change {
    let shared = |kind, name: Name, resource: Option<mesh::Resource>, place| {
        let resource = resource.map(|resource| Published::new(&Resource::Mesh(resource)));
        Change { kind, node: None, name, resource, place }
    };
    match told {
        Told::Settings => {
            shared(Kind::Settings, SETTINGS_NAME.into(), Some(mesh::Resource::Settings(views.settings.clone())), None)
        }
        Told::Workload(uid) => {
            let workload = views.workloads.get(&uid);
            let resource = workload.map(|workload| mesh::Resource::Workload(Box::new(workload.clone())));
            shared(Kind::Address, uid.to_string().into(), resource, workload.map(Place::of_workload))
        }
        Told::Service(name) => {
            let service = views.services.get(&name);
            let resource = service.cloned().map(mesh::Resource::Service);
            shared(Kind::Address, name.to_string().into(), resource, service.map(Place::of_service))
        }
        Told::Policy(name) => {
            let resource = views.policies.get(&name).cloned().map(mesh::Resource::Policy);
            shared(Kind::Policy, name.to_string().into(), resource, None)
        }
        Told::NodePod(node, uid) => {
            let pod = views.node_pods.get(&node).and_then(|pods| pods.get(&uid)).cloned();
            let resource = pod.map(|pod| Published::new(&Resource::NodePod(pod)));
            let (node, name) = (Some(node.into()), uid.to_string().into());
            Change { kind: Kind::NodePod, node, name, resource, place: None }
        }
    }
}
