//! From Kubernetes objects to what nodes are told.
//!
//! [`Index::apply`] takes changes and says what is different now. It is synchronous and knows no client, no clock and
//! no stream; the order in which objects come does not matter, but for what [`Index::captured`] once heard (T47) and for
//! settings that could not be read.
//!
//! `facts` keep the fields of an object that count; `cluster` holds them and knows who depends on whom; `settings`, `modes`,
//! `enrolment`, `endpoints`, `api_server` and `policy` are the rules, each a function of the cluster; here they are put together, and run
//! again for what a change can have touched.

mod api_server;
mod cluster;
mod dirty;
mod endpoints;
mod enrolment;
mod facts;
mod leaving;
mod modes;
mod network_rules;
mod policy;
mod root;
mod settings;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use identity::{SpiffeId, TrustDomain};
use manifests::k8s_openapi::api::core::v1::ConfigMap;
use manifests::{Change, Kind, Object, ObjectKey};
use mesh::{MeshSettings, PodUid, Policy, PolicyName, Service, ServiceName, Workload, WorkloadUid};
use wire::discovery::NodePod;

use self::cluster::Cluster;
use self::dirty::Dirty;
use self::facts::{Foreign, Name, Pod};
use crate::kubernetes::status;
use crate::problem::Problem;

pub use self::policy::unenforceable;

/// The domain of Services' DNS names.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// The trust domain that a control plane starts with, from the settings' ConfigMap if there is one.
pub(crate) fn trust_domain<'a>(objects: impl Iterator<Item = &'a Object>) -> Result<TrustDomain, Problem> {
    let settings = objects.filter(|object| settings::is_settings(&object.key())).find_map(|object| match object {
        Object::ConfigMap(settings) => Some(&**settings),
        _ => None,
    });
    settings::trust_domain(settings)
}

/// The name of something that nodes are told.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Told {
    Settings,
    Workload(WorkloadUid),
    Service(ServiceName),
    Policy(PolicyName),
    /// For the agent of this node alone.
    NodePod(String, PodUid),
}

/// What is new, different or gone.
pub(crate) type Touched = BTreeSet<Told>;

/// Everything that nodes are told.
#[derive(Default, PartialEq, Debug)]
pub(crate) struct Views {
    pub(crate) settings: MeshSettings,
    pub(crate) workloads: BTreeMap<WorkloadUid, Workload>,
    pub(crate) services: BTreeMap<ServiceName, Service>,
    pub(crate) policies: BTreeMap<PolicyName, Policy>,
    pub(crate) node_pods: BTreeMap<String, BTreeMap<PodUid, NodePod>>,
    /// Not told: up to how many workloads everybody is told of the whole mesh.
    pub(crate) whole_mesh_up_to: usize,
    /// Not told, but what workloads are made of.
    endpoints: BTreeMap<Name, endpoints::Usable>,
}

impl Views {
    /// The names of everything.
    pub(crate) fn all(&self) -> Touched {
        let mut all = Touched::from([Told::Settings]);
        all.extend(self.workloads.keys().cloned().map(Told::Workload));
        all.extend(self.services.keys().cloned().map(Told::Service));
        all.extend(self.policies.keys().cloned().map(Told::Policy));
        let pods =
            self.node_pods.iter().flat_map(|(node, pods)| pods.keys().map(move |uid| (node.clone(), uid.clone())));
        all.extend(pods.map(|(node, uid)| Told::NodePod(node, uid)));
        all
    }
}

/// Where a problem comes from: what computes it anew replaces it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Origin {
    Object(ObjectKey),
    Settings,
    /// A PeerAuthentication, for the sake of others of its namespace.
    Shadowed(Name),
    Pod(Name),
    Address(IpAddr),
    Service(Name),
}

/// The objects, and what follows from them.
#[derive(Debug)]
pub(crate) struct Index {
    cluster: Cluster,
    views: Views,
    problems: BTreeMap<Origin, Vec<Problem>>,
    /// Pods that are to be captured and left to another data path. Those that have opted out are left out: theirs is no failure.
    foreign: BTreeSet<Name>,
}

impl Index {
    /// An empty cluster. Identities are of this trust domain as long as the index lives.
    pub(crate) fn new(trust_domain: TrustDomain) -> Self {
        let cluster = Cluster::new(trust_domain);
        let views = Views { whole_mesh_up_to: cluster.settings.whole_mesh_up_to(), ..Views::default() };
        Self { cluster, views, problems: BTreeMap::new(), foreign: BTreeSet::new() }
    }

    /// The same where several replicas share a record: a pod counts as captured when [`Index::recorded`] names it.
    pub(crate) fn with_record(trust_domain: TrustDomain) -> Self {
        let mut index = Self::new(trust_domain);
        index.cluster.by_record = true;
        index
    }

    /// What nodes are told.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// All that is wrong, in a stable order.
    pub(crate) fn problems(&self) -> BTreeSet<&Problem> {
        self.problems.values().flatten().collect()
    }

    /// Takes in changes, in their order. What several of them touch is computed once.
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Touched {
        let mut dirty = Dirty::default();
        for change in changes {
            match change {
                Change::Applied(object) => self.applied(&object, &mut dirty),
                Change::Deleted(key) => self.deleted(&key, &mut dirty),
            }
        }
        self.refresh(dirty)
    }

    /// Takes in what the agent of a node says to be captured now: the whole truth of that node.
    ///
    /// A node speaks for its own pods alone. A pod that is left out after it was captured keeps its capability while it
    /// lives and is not exempt, so that peers fail instead of falling back to plaintext (T47).
    pub(crate) fn captured(&mut self, node: &str, pods: BTreeSet<PodUid>) -> Touched {
        let old = self.cluster.reported.insert(node.to_owned(), pods);
        let new = &self.cluster.reported[node];
        let changed: BTreeSet<_> = old.unwrap_or_default().symmetric_difference(new).cloned().collect();
        self.pods_of_node(node, &changed)
    }

    fn pods_of_node(&mut self, node: &str, changed: &BTreeSet<PodUid>) -> Touched {
        let mut dirty = Dirty::default();
        let pods =
            changed.iter().flat_map(|uid| self.cluster.pods_with(uid)).filter_map(|name| self.cluster.pods.get(name));
        dirty.pods.extend(pods.filter(|pod| pod.node == node).map(|pod| pod.name.clone()));
        self.refresh(dirty)
    }

    /// Takes in what is written down of a node: pods that its agent has once reported, whichever replica heard it. In the place
    /// of [`Index::captured`]'s part in T47 where there are several replicas.
    pub(crate) fn recorded(&mut self, node: &str, pods: BTreeSet<PodUid>) -> Touched {
        let old = self.cluster.recorded.insert(node.to_owned(), pods).unwrap_or_default();
        let changed: BTreeSet<_> = self.cluster.recorded[node].symmetric_difference(&old).cloned().collect();
        let new: BTreeSet<_> = self.cluster.recorded[node].difference(&old).cloned().collect();
        for pod in &new {
            self.cluster.leaving.recorded(&(node.to_owned(), pod.clone()));
        }
        // What is new in the record was reported just now, here or elsewhere.
        if let Some(reported) = self.cluster.reported.get_mut(node) {
            reported.extend(new.iter().cloned());
        }
        if self.cluster.recorded[node].is_empty() {
            self.cluster.recorded.remove(node);
        }
        self.pods_of_node(node, &changed)
    }

    /// Takes in what a control plane before this one knew to be captured, before the first object: a pod that was published
    /// as captured is not published as anything else (T47) before it is exempt, also when the agent that said so is not back yet.
    pub(crate) fn remember(&mut self, captured: impl IntoIterator<Item = (String, PodUid)>) {
        self.cluster.remember(captured);
    }

    /// Whether a node has a pod, published or not.
    pub(crate) fn has_pod(&self, node: &str, uid: &PodUid) -> bool {
        self.cluster.pods_with(uid).filter_map(|name| self.cluster.pods.get(name)).any(|pod| pod.node == node)
    }

    /// The node of a pod.
    pub(crate) fn node_of(&self, uid: &PodUid) -> Option<&str> {
        let mut nodes =
            self.cluster.pods_with(uid).filter_map(|name| self.cluster.pods.get(name)).map(|pod| &*pod.node);
        nodes.next().filter(|node| !node.is_empty())
    }

    /// What is wrong with each of the policies that something is wrong with.
    pub(crate) fn problems_of_policies(&self) -> BTreeMap<ObjectKey, BTreeSet<&Problem>> {
        let mut all: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (origin, problems) in &self.problems {
            let key = match origin {
                Origin::Object(key) if status::concerns(key.kind) => key.clone(),
                Origin::Shadowed(name) => name.key(Kind::PeerAuthentication),
                _ => continue,
            };
            all.entry(key).or_default().extend(problems);
        }
        all
    }

    /// Takes in which objects are there in a form that cannot be read, and were never there in another, each with the labels of
    /// those that it selects where at least these can be read. A policy among them refuses all that it may be about (D13).
    pub(crate) fn unreadable(&mut self, objects: &BTreeMap<ObjectKey, BTreeMap<String, String>>) -> Touched {
        let mut dirty = Dirty::default();
        let policies = objects.iter().filter(|(key, _)| key.kind == Kind::AuthorizationPolicy);
        let policies: BTreeMap<_, _> = policies.map(|(key, selector)| (Name::of(key), selector)).collect();
        let stand_ins = self.cluster.authorization_policies.iter().filter(|(_, policy)| policy.stands_in);
        let settled: Vec<_> =
            stand_ins.map(|(name, _)| name).filter(|name| !policies.contains_key(name)).cloned().collect();
        for name in settled {
            self.set_authorization_policy(&name, None, &mut dirty);
            self.note(Origin::Object(name.key(Kind::AuthorizationPolicy)), Vec::new());
        }
        for (name, selector) in policies {
            if self.cluster.authorization_policies.get(&name).is_some_and(|policy| !policy.stands_in) {
                continue;
            }
            let mut problems = Vec::new();
            let policy = policy::AuthorizationPolicy::unreadable(&name, selector, &mut problems);
            self.set_authorization_policy(&name, Some(policy), &mut dirty);
            self.note(Origin::Object(name.key(Kind::AuthorizationPolicy)), problems);
        }
        self.refresh(dirty)
    }

    /// Whether a pod of this identity that may have a certificate runs on a node.
    pub(crate) fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        let pods = self.views.node_pods.get(node).into_iter().flat_map(BTreeMap::values);
        let reported = self.cluster.reported.get(node);
        // One that leaves needs it as long as its connections are captured.
        let is_reported = |pod: &NodePod| reported.is_some_and(|pods| pods.contains(&pod.pod));
        // With replicas its agent may report to another one than its proxy asks.
        let has_left = |pod: &NodePod| {
            self.cluster.by_record && self.cluster.leaving.has_left(&(node.to_owned(), pod.pod.clone()))
        };
        let may = |pod: &&NodePod| pod.capture.is_ok() || is_reported(pod) || has_left(pod);
        pods.filter(may).any(|pod| pod.identity == *identity)
    }

    /// The pods that run, are enrolled, and are left to another data path by what their objects say.
    pub(crate) fn foreign(&self) -> impl Iterator<Item = (&Pod, &Foreign)> {
        let pods = self.foreign.iter().filter_map(|name| self.cluster.pods.get(name));
        pods.filter_map(|pod| Some((pod, pod.foreign.as_ref()?)))
    }

    /// Namespace and name of a pod of a node, if it is to be captured and has an address, without which nothing of it runs yet.
    pub(crate) fn runs_to_be_captured(&self, node: &str, uid: &PodUid) -> Option<(&str, &str)> {
        let pod = self.views.node_pods.get(node)?.get(uid)?;
        (pod.capture.is_ok() && !pod.addresses.is_empty()).then_some((&*pod.namespace, &*pod.name))
    }

    /// Whether there is such a node.
    pub(crate) fn has_node(&self, node: &str) -> bool {
        self.cluster.nodes.contains_key(node)
    }

    /// The nodes of the cluster.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &str> {
        self.cluster.nodes.keys().map(String::as_str)
    }

    fn applied(&mut self, object: &Object, dirty: &mut Dirty) {
        let key = object.key();
        let name = Name::of(&key);
        let mut problems = Vec::new();
        match object {
            Object::Namespace(namespace) => {
                let facts = facts::Namespace::read(namespace, &mut problems);
                let old = self.cluster.namespaces.insert(key.name.clone(), facts.clone());
                if old.unwrap_or_default() != facts {
                    dirty.pods_of(&self.cluster, &key.name);
                }
            }
            Object::Node(node) => {
                let facts = facts::Node::read(node, &mut problems);
                // A node says every few minutes that it is well, and mostly nothing else.
                let old = self.cluster.nodes.insert(key.name.clone(), facts.clone());
                dirty.settings |= old != Some(facts);
            }
            Object::Pod(pod) => {
                let facts = Pod::read(pod, self.cluster.trust_domain(), &mut problems);
                self.set_pod(&name, facts, dirty);
            }
            Object::Service(service) => {
                let facts = facts::Service::read(service, &mut problems);
                self.set_service(&name, facts, dirty);
            }
            Object::EndpointSlice(slice) => {
                let facts = facts::Slice::read(slice, &mut problems);
                self.set_slice(&name, facts, dirty);
            }
            Object::ConfigMap(config) if settings::is_settings(&key) => {
                self.set_settings(Some(config), &mut problems, dirty);
            }
            Object::NetworkPolicy(policy) => {
                self.set_network_policy(&name, Some(network_rules::digest_of_policy(policy)), dirty);
            }
            Object::PeerAuthentication(policy) => {
                let facts = modes::PeerAuthentication::read(policy, &mut problems);
                self.set_peer_authentication(&name, Some(facts), dirty);
            }
            Object::AuthorizationPolicy(policy) => {
                let facts = policy::AuthorizationPolicy::read(policy, &mut problems);
                self.set_authorization_policy(&name, facts, dirty);
            }
            Object::ValidatingWebhookConfiguration(_)
            | Object::MutatingWebhookConfiguration(_)
            | Object::APIService(_) => self.set_callees(&key, api_server::read(object), dirty),
            // A pod's identity is named by the pod, and controllers have made pods of the rest.
            Object::ConfigMap(_) | Object::ServiceAccount(_) | Object::Deployment(_) => {}
        }
        self.note(Origin::Object(key), problems);
    }

    fn deleted(&mut self, key: &ObjectKey, dirty: &mut Dirty) {
        let name = Name::of(key);
        let mut problems = Vec::new();
        match key.kind {
            Kind::Namespace => {
                if self.cluster.namespaces.remove(&key.name).is_some() {
                    dirty.pods_of(&self.cluster, &key.name);
                }
            }
            Kind::Node => {
                self.cluster.nodes.remove(&key.name);
                dirty.settings = true;
            }
            Kind::Pod => self.set_pod(&name, None, dirty),
            Kind::Service => self.set_service(&name, None, dirty),
            Kind::EndpointSlice => self.set_slice(&name, None, dirty),
            Kind::ConfigMap if settings::is_settings(key) => self.set_settings(None, &mut problems, dirty),
            Kind::PeerAuthentication => self.set_peer_authentication(&name, None, dirty),
            Kind::AuthorizationPolicy => self.set_authorization_policy(&name, None, dirty),
            Kind::NetworkPolicy => self.set_network_policy(&name, None, dirty),
            Kind::ValidatingWebhookConfiguration | Kind::MutatingWebhookConfiguration | Kind::APIService => {
                self.set_callees(key, BTreeSet::new(), dirty);
            }
            Kind::ConfigMap | Kind::ServiceAccount | Kind::Deployment => {}
        }
        self.note(Origin::Object(key.clone()), problems);
    }

    fn set_pod(&mut self, name: &Name, pod: Option<Pod>, dirty: &mut Dirty) {
        let old = self.cluster.set_pod(name, pod);
        let new = self.cluster.pods.get(name);
        if old.as_ref() == new {
            return;
        }
        dirty.pods.insert(name.clone());
        let place = |pod: &Pod| (pod.node.clone(), pod.uid.clone());
        dirty.gone.extend(old.as_ref().map(place).filter(|old| new.map(place).as_ref() != Some(old)));
        for uid in [old.as_ref(), new].into_iter().flatten().map(|pod| &pod.uid) {
            dirty.pods.extend(self.cluster.pods_with(uid).cloned());
        }
        for address in [old.as_ref(), new].into_iter().flatten().flat_map(|pod| &pod.addresses) {
            dirty.owners_of(&self.cluster, *address);
            dirty.addresses.insert(*address);
            dirty.services.extend(self.cluster.claimants_of(*address).cloned());
        }
    }

    fn set_service(&mut self, name: &Name, service: Option<facts::Service>, dirty: &mut Dirty) {
        let old = self.cluster.set_service(name, service);
        let new = self.cluster.services.get(name);
        if old.as_ref() == new {
            return;
        }
        dirty.services.insert(name.clone());
        dirty.endpoints.insert(name.clone());
        dirty.called(&self.cluster, name);
        for address in [old.as_ref(), new].into_iter().flatten().flat_map(facts::Service::claimed) {
            dirty.services.extend(self.cluster.claimants_of(address).cloned());
        }
    }

    fn set_slice(&mut self, name: &Name, slice: Option<facts::Slice>, dirty: &mut Dirty) {
        let service = slice.as_ref().map(|slice| slice.service.clone());
        let addresses = slice.as_ref().map(facts::Slice::addresses).unwrap_or_default();
        let old = self.cluster.set_slice(name, slice);
        let services: BTreeSet<_> = service.into_iter().chain(old.as_ref().map(|old| old.service.clone())).collect();
        dirty.settings |= services.contains(&api_server::own_service());
        let addresses: BTreeSet<_> =
            addresses.into_iter().chain(old.iter().flat_map(facts::Slice::addresses)).collect();
        if services.iter().any(|service| self.cluster.callees.has(service)) {
            addresses.iter().for_each(|address| dirty.owners_of(&self.cluster, *address));
        }
        dirty.endpoints.extend(services);
        // Whether an address may stand for itself depends on all slices that name it.
        dirty.addresses.extend(addresses);
    }

    fn set_callees(&mut self, key: &ObjectKey, callees: BTreeSet<api_server::Callee>, dirty: &mut Dirty) {
        for service in self.cluster.callees.set(key, callees) {
            dirty.of_endpoints(&self.cluster, &service);
        }
    }

    fn set_settings(&mut self, config: Option<&ConfigMap>, problems: &mut Vec<Problem>, dirty: &mut Dirty) {
        let settings = self.cluster.settings.read(config, self.cluster.trust_domain(), problems);
        let before = &self.cluster.settings;
        if settings.excluded_ports() != before.excluded_ports()
            || settings.leaving() != before.leaving()
            || settings.enforces() != before.enforces()
        {
            dirty.pods.extend(self.cluster.pods.keys().cloned());
        }
        self.cluster.settings = settings;
        dirty.settings = true;
    }

    fn set_network_policy(&mut self, name: &Name, policy: Option<u64>, dirty: &mut Dirty) {
        let old = match policy {
            Some(policy) => self.cluster.network_policies.insert(name.clone(), policy),
            None => self.cluster.network_policies.remove(name),
        };
        if old != policy {
            dirty.pods_of(&self.cluster, &name.namespace);
        }
    }

    fn set_peer_authentication(&mut self, name: &Name, policy: Option<modes::PeerAuthentication>, dirty: &mut Dirty) {
        if !self.cluster.peer_authentications.set(name, policy) {
            return;
        }
        dirty.pods_in_scope(&self.cluster, &name.namespace);
        self.problems.retain(|origin, _| !matches!(origin, Origin::Shadowed(it) if it.namespace == name.namespace));
        for (shadowed, problem) in self.cluster.peer_authentications.shadowed(&name.namespace) {
            self.note(Origin::Shadowed(shadowed), vec![problem]);
        }
    }

    fn set_authorization_policy(
        &mut self,
        name: &Name,
        policy: Option<policy::AuthorizationPolicy>,
        dirty: &mut Dirty,
    ) {
        let old = match policy.clone() {
            Some(policy) => self.cluster.authorization_policies.insert(name.clone(), policy),
            None => self.cluster.authorization_policies.remove(name),
        };
        if old != policy {
            dirty.policies.insert(name.clone());
            dirty.pods_in_scope(&self.cluster, &name.namespace);
        }
    }

    fn note(&mut self, origin: Origin, problems: Vec<Problem>) {
        if problems.is_empty() {
            self.problems.remove(&origin);
        } else {
            self.problems.insert(origin, problems);
        }
    }
}
