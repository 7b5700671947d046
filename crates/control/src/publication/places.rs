//! Where workloads and Services are: by node, by address, and which workloads are endpoints of which Service. It is what
//! decides who is told of them (T31).

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use mesh::{AddressClass, MeshSettings, Service, Workload};

/// A resource's name on the stream.
pub(super) type Name = Arc<str>;

/// Where one workload or Service is.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Place {
    /// A workload's node.
    pub(super) node: Option<Name>,
    pub(super) addresses: Vec<IpAddr>,
    /// The Services that a workload is an endpoint of.
    pub(super) serves: Vec<Name>,
}

impl Place {
    pub(super) fn of_workload(workload: &Workload) -> Self {
        Self {
            node: Some(workload.node.clone()),
            addresses: workload.addresses.clone(),
            serves: workload.endpoints.iter().map(|endpoint| endpoint.service.to_string().into()).collect(),
        }
    }

    pub(super) fn of_service(service: &Service) -> Self {
        Self { addresses: service.addresses.clone(), ..Self::default() }
    }
}

/// All places.
#[derive(Default, Debug)]
pub(super) struct Places {
    places: HashMap<Name, Place>,
    by_node: HashMap<Name, BTreeSet<Name>>,
    by_address: HashMap<IpAddr, BTreeSet<Name>>,
    endpoints: HashMap<Name, BTreeSet<Name>>,
    /// Those with an address outside of the cluster's ranges: nobody would ask about it, so everybody is told (T2).
    strays: BTreeSet<Name>,
    settings: MeshSettings,
}

impl Places {
    /// Puts a resource where it is now, or takes it away.
    pub(super) fn put(&mut self, name: &Name, place: Option<Place>) {
        if let Some(old) = self.places.remove(name) {
            old.node.iter().for_each(|node| take(&mut self.by_node, node, name));
            old.addresses.iter().for_each(|address| take(&mut self.by_address, address, name));
            old.serves.iter().for_each(|service| take(&mut self.endpoints, service, name));
            self.strays.remove(name);
        }
        let Some(new) = place else { return };
        new.node.iter().for_each(|node| add(&mut self.by_node, node, name));
        new.addresses.iter().for_each(|address| add(&mut self.by_address, address, name));
        new.serves.iter().for_each(|service| add(&mut self.endpoints, service, name));
        if is_stray(&self.settings, &new) {
            self.strays.insert(name.clone());
        }
        self.places.insert(name.clone(), new);
    }

    /// Takes in the ranges of the cluster. Whether somebody is told unasked now that was not before.
    pub(super) fn set_settings(&mut self, settings: &MeshSettings) -> bool {
        if *settings == self.settings {
            return false;
        }
        self.settings = settings.clone();
        let places = self.places.iter().filter(|(_, place)| is_stray(settings, place));
        let strays: BTreeSet<Name> = places.map(|(name, _)| name.clone()).collect();
        let more = strays.difference(&self.strays).next().is_some();
        self.strays = strays;
        more
    }

    pub(super) fn get(&self, name: &str) -> Option<&Place> {
        self.places.get(name)
    }

    pub(super) fn is_stray(&self, name: &str) -> bool {
        self.strays.contains(name)
    }

    pub(super) fn strays(&self) -> impl Iterator<Item = &Name> {
        self.strays.iter()
    }

    /// What is on a node.
    pub(super) fn on_node(&self, node: &str) -> impl Iterator<Item = &Name> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// What has an address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &Name> {
        self.by_address.get(&address).into_iter().flatten()
    }

    /// The workloads that are endpoints of the Service of this name.
    pub(super) fn endpoints(&self, service: &str) -> impl Iterator<Item = &Name> {
        self.endpoints.get(service).into_iter().flatten()
    }
}

fn is_stray(settings: &MeshSettings, place: &Place) -> bool {
    let outside = |address: &IpAddr| matches!(settings.classify(*address), AddressClass::Outside | AddressClass::Node);
    place.addresses.iter().any(outside)
}

fn add<K: Hash + Eq + Clone>(map: &mut HashMap<K, BTreeSet<Name>>, key: &K, name: &Name) {
    map.entry(key.clone()).or_default().insert(name.clone());
}

fn take<K: Hash + Eq>(map: &mut HashMap<K, BTreeSet<Name>>, key: &K, name: &Name) {
    if let Some(names) = map.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            map.remove(key);
        }
    }
}
