//! The objects that exist, and who depends on whom.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use identity::TrustDomain;
use mesh::{PodUid, Uncaptured};

use super::api_server::Callees;
use super::facts::{Name, Namespace, Node, Pod, Service, Slice};
use super::leaving::{Leaving, Place, Seen};
use super::modes::PeerAuthentications;
use super::policy::AuthorizationPolicy;
use super::settings::Settings;

/// What Kubernetes says, and what nodes report.
#[derive(Debug)]
pub(crate) struct Cluster {
    trust_domain: TrustDomain,
    pub(crate) settings: Settings,
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) namespaces: BTreeMap<String, Namespace>,
    pub(crate) pods: BTreeMap<Name, Pod>,
    pub(crate) services: BTreeMap<Name, Service>,
    slices: BTreeMap<Name, Slice>,
    /// What the API server calls.
    pub(crate) callees: Callees,
    /// Digests of what they say.
    pub(crate) network_policies: BTreeMap<Name, u64>,
    pub(crate) peer_authentications: PeerAuthentications,
    pub(crate) authorization_policies: BTreeMap<Name, AuthorizationPolicy>,
    /// By node, what its agent said last.
    pub(crate) reported: BTreeMap<String, BTreeSet<PodUid>>,
    /// By node, what is written down of it.
    pub(crate) recorded: BTreeMap<String, BTreeSet<PodUid>>,
    /// Whether what is written down decides, and not what this process was told.
    pub(crate) by_record: bool,
    /// Pods that peers speak TLS with: their capture was reported once, and they are not exempt (T47).
    captured: BTreeSet<Place>,
    /// How pods that are captured and exempt leave.
    pub(crate) leaving: Leaving,
    /// Pods by their UIDs.
    uids: BTreeMap<PodUid, BTreeSet<Name>>,
    /// Pods by their own addresses.
    owners: BTreeMap<IpAddr, BTreeSet<Name>>,
    /// Pods in their node's network, by the addresses that they share with it.
    on_host: BTreeMap<IpAddr, BTreeSet<Name>>,
    /// Services by the addresses that they claim.
    claims: BTreeMap<IpAddr, BTreeSet<Name>>,
    slices_by_service: BTreeMap<Name, BTreeSet<Name>>,
    slices_by_address: BTreeMap<IpAddr, BTreeSet<Name>>,
}

impl Cluster {
    pub(crate) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            settings: Settings::default(),
            nodes: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            callees: Callees::default(),
            network_policies: BTreeMap::new(),
            peer_authentications: PeerAuthentications::default(),
            authorization_policies: BTreeMap::new(),
            reported: BTreeMap::new(),
            recorded: BTreeMap::new(),
            by_record: false,
            captured: BTreeSet::new(),
            leaving: Leaving::default(),
            uids: BTreeMap::new(),
            owners: BTreeMap::new(),
            on_host: BTreeMap::new(),
            claims: BTreeMap::new(),
            slices_by_service: BTreeMap::new(),
            slices_by_address: BTreeMap::new(),
        }
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Takes a pod in, or away; returns the one before.
    pub(crate) fn set_pod(&mut self, name: &Name, pod: Option<Pod>) -> Option<Pod> {
        let old = replace(&mut self.pods, name, pod);
        for address in old.iter().flat_map(|old| &old.addresses) {
            unlink(&mut self.owners, address, name);
            unlink(&mut self.on_host, address, name);
        }
        if let Some(old) = &old {
            unlink(&mut self.uids, &old.uid, name);
        }
        if let Some(new) = self.pods.get(name) {
            self.uids.entry(new.uid.clone()).or_default().insert(name.clone());
            let links = if new.host_network { &mut self.on_host } else { &mut self.owners };
            for address in &new.addresses {
                links.entry(*address).or_default().insert(name.clone());
            }
        }
        // Capture is of one pod on one node.
        if let Some(old) = &old {
            let namesakes = self.pods_with(&old.uid).filter_map(|name| self.pods.get(name));
            if namesakes.filter(|pod| pod.node == old.node).count() == 0 {
                let place = (old.node.clone(), old.uid.clone());
                self.captured.remove(&place);
                self.leaving.forget(&place);
            }
        }
        old
    }

    /// Takes a Service in, or away; returns the one before.
    pub(crate) fn set_service(&mut self, name: &Name, service: Option<Service>) -> Option<Service> {
        let old = replace(&mut self.services, name, service);
        for address in old.iter().flat_map(Service::claimed) {
            unlink(&mut self.claims, &address, name);
        }
        for address in self.services.get(name).into_iter().flat_map(Service::claimed) {
            self.claims.entry(address).or_default().insert(name.clone());
        }
        old
    }

    /// Takes a slice in, or away; returns the one before.
    pub(crate) fn set_slice(&mut self, name: &Name, slice: Option<Slice>) -> Option<Slice> {
        let old = replace(&mut self.slices, name, slice);
        if let Some(old) = &old {
            unlink(&mut self.slices_by_service, &old.service, name);
            for address in old.addresses() {
                unlink(&mut self.slices_by_address, &address, name);
            }
        }
        if let Some(new) = self.slices.get(name) {
            self.slices_by_service.entry(new.service.clone()).or_default().insert(name.clone());
            for address in new.addresses() {
                self.slices_by_address.entry(address).or_default().insert(name.clone());
            }
        }
        old
    }

    pub(crate) fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Pod> + use<'_> {
        self.pods.range(Name::all_of(namespace)).map(|(_, pod)| pod)
    }

    /// Whether the pod's node says that it is captured.
    pub(crate) fn is_reported(&self, pod: &Pod) -> bool {
        !pod.host_network && self.reported.get(&pod.node).is_some_and(|pods| pods.contains(&pod.uid))
    }

    /// Whether it is written down that the pod is captured.
    fn is_recorded(&self, pod: &Pod) -> bool {
        !pod.host_network && self.recorded.get(&pod.node).is_some_and(|pods| pods.contains(&pod.uid))
    }

    /// Takes note of whether a pod is exempt. Once it is known to be captured, it is so until it is gone or exempt; what is exempt
    /// and captured leaves.
    pub(crate) fn enrol(&mut self, pod: &Pod, exempt: Option<Uncaptured>) {
        let place = (pod.node.clone(), pod.uid.clone());
        let reported = self.is_reported(pod);
        // Replicas must not know different things: what one was told counts when all can read it.
        let known = if self.by_record { self.is_recorded(pod) } else { reported };
        let was = exempt.is_some() && self.captured.remove(&place);
        if self.leaving.settle(&place, &Seen { exempt, was, reported, known }) {
            self.captured.insert(place);
        }
    }

    /// Takes note of what nodes have said before.
    pub(crate) fn remember(&mut self, captured: impl IntoIterator<Item = (String, PodUid)>) {
        self.captured.extend(captured);
    }

    /// Whether its node has ever said so.
    pub(crate) fn is_captured(&self, pod: &Pod) -> bool {
        self.captured.contains(&(pod.node.clone(), pod.uid.clone()))
    }

    /// Another cluster's captures, in place of these.
    #[cfg(test)]
    pub(crate) fn copy_captures(&mut self, other: &Self) {
        self.reported = other.reported.clone();
        self.recorded = other.recorded.clone();
        self.by_record = other.by_record;
        self.captured = other.captured.clone();
        self.leaving = other.leaving.clone();
    }

    /// The pods that say to have a UID: one, unless somebody copied an object.
    pub(crate) fn pods_with(&self, uid: &PodUid) -> impl Iterator<Item = &Name> {
        self.uids.get(uid).into_iter().flatten()
    }

    pub(crate) fn slices_of(&self, service: &Name) -> impl Iterator<Item = &Slice> {
        self.slices_by_service.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name))
    }

    pub(crate) fn slices_naming(&self, address: IpAddr) -> impl Iterator<Item = (&Name, &Slice)> {
        self.slices_by_address.get(&address).into_iter().flatten().filter_map(|name| self.slices.get_key_value(name))
    }

    /// The addresses that slices name and that are no pod's own.
    pub(crate) fn bare_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.slices_by_address.keys().copied().filter(|address| !self.owners.contains_key(address))
    }

    /// The pods that say that an address is theirs; more than one while an address goes from pod to pod.
    pub(crate) fn owners_of(&self, address: IpAddr) -> Vec<&Name> {
        self.owners.get(&address).into_iter().flatten().collect()
    }

    /// Whether a pod in its node's network has that address.
    pub(crate) fn is_on_host(&self, address: IpAddr) -> bool {
        self.on_host.contains_key(&address)
    }

    /// The Services that claim an address.
    pub(crate) fn claimants_of(&self, address: IpAddr) -> impl Iterator<Item = &Name> {
        self.claims.get(&address).into_iter().flatten()
    }

    /// The one Service that has an address: the oldest of those that the cluster gave it to, else, unless a pod has it,
    /// the oldest of those that claim it.
    pub(crate) fn service_holding(&self, address: IpAddr) -> Option<&Name> {
        let claimants = self.claimants_of(address).filter_map(|name| self.services.get_key_value(name));
        let rank = |service: &Service| (!service.cluster_addresses.contains(&address), service.age.clone());
        let (name, service) = claimants.min_by_key(|(_, service)| rank(service))?;
        (service.cluster_addresses.contains(&address) || self.owners_of(address).is_empty()).then_some(name)
    }
}

impl Service {
    pub(crate) fn claimed(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster_addresses.iter().chain(&self.external_addresses).copied()
    }
}

impl Slice {
    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.addresses.iter().copied()).collect()
    }

    /// Whether the slice says that a pod is at an address.
    pub(crate) fn names_pod_at(&self, address: IpAddr) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.is_pod && endpoint.addresses.contains(&address))
    }
}

fn replace<T>(map: &mut BTreeMap<Name, T>, name: &Name, value: Option<T>) -> Option<T> {
    match value {
        Some(value) => map.insert(name.clone(), value),
        None => map.remove(name),
    }
}

fn unlink<K: Ord>(links: &mut BTreeMap<K, BTreeSet<Name>>, from: &K, to: &Name) {
    if let Some(names) = links.get_mut(from) {
        names.remove(to);
        if names.is_empty() {
            links.remove(from);
        }
    }
}
