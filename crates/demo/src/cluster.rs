//! The objects of the box's cluster, and what API server, scheduler and controllers would do to them:
//! defaults, nodes and addresses for pods, cluster IPs for Services, pods for Deployments, EndpointSlices.
//!
//! No file, socket or clock: what is to be done to the world comes out as [`Action`]s, and all objects
//! as they stand as [`Cluster::objects`].

use std::collections::BTreeMap;

use manifests::k8s_openapi::api::apps::v1::Deployment;
use manifests::k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Node, NodeAddress, NodeSpec, NodeStatus, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    Service, ServiceAccount,
};
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use manifests::k8s_openapi::jiff::Timestamp;
use manifests::{Kind, Object, ObjectKey};

use crate::addresses::Range;
use crate::endpoints;
use crate::network::{Addresses, NodePlan, service_networks};

/// What is to be done to the world.
#[derive(Debug)]
pub(crate) enum Action {
    /// Make this pod and run its programs.
    Start(Box<PodPlan>),
    /// End the pod with this uid.
    Stop {
        /// Its uid.
        uid: String,
    },
}

/// A pod to be made.
#[derive(Clone, Debug)]
pub(crate) struct PodPlan {
    pub(crate) uid: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: NodePlan,
    pub(crate) addresses: Addresses,
    pub(crate) spec: PodSpec,
}

/// What is known about a running pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodState {
    /// As in `status.phase`.
    pub(crate) phase: &'static str,
    pub(crate) ready: bool,
    /// Why it is not (yet) ready; empty when it is.
    pub(crate) message: String,
}

/// Why an object was not taken. One sentence, without its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub(crate) struct Refusal {
    key: String,
    why: String,
}

/// The objects, and who has which address.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<(NodePlan, Range)>,
    services: Range,
    /// For the scheduler's turn.
    scheduled: usize,
    objects: BTreeMap<ObjectKey, Object>,
    assigned: BTreeMap<ObjectKey, Addresses>,
    /// Pods that wait for their predecessor of the same name to end.
    successors: BTreeMap<ObjectKey, Pod>,
    new_uid: fn() -> String,
    now: fn() -> Timestamp,
}

impl Cluster {
    /// An empty cluster on these nodes.
    pub(crate) fn new(nodes: Vec<NodePlan>, new_uid: fn() -> String, now: fn() -> Timestamp) -> Cluster {
        let mut cluster = Cluster {
            nodes: nodes.into_iter().map(|plan| (plan.clone(), Range::of_pods(&plan))).collect(),
            services: Range::of_services(),
            scheduled: 0,
            objects: BTreeMap::new(),
            assigned: BTreeMap::new(),
            successors: BTreeMap::new(),
            new_uid,
            now,
        };
        let plans: Vec<_> = cluster.nodes.iter().map(|(plan, _)| node_object(plan)).collect();
        for node in plans {
            cluster.put(node.into());
        }
        cluster.provide_namespace(SYSTEM_NAMESPACE);
        cluster.put(settings().into());
        cluster
    }

    /// Every object as it stands, with what the cluster added.
    pub(crate) fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &Object)> + Clone {
        self.objects.iter()
    }

    /// The pod of this name.
    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<&Pod> {
        match self.objects.get(&pod_key(namespace, name)) {
            Some(Object::Pod(pod)) => Some(pod),
            _ => None,
        }
    }

    /// All pods.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.objects.values().filter_map(|object| match object {
            Object::Pod(pod) => Some(pod.as_ref()),
            _ => None,
        })
    }

    /// Takes an object as `kubectl apply` would.
    pub(crate) fn apply(&mut self, object: Object) -> Result<Vec<Action>, Refusal> {
        let key = object.key();
        if let Some(namespace) = &key.namespace {
            self.provide_namespace(namespace);
        }
        let actions = match object {
            Object::Pod(pod) => self.apply_pod(&key, *pod)?,
            Object::Deployment(deployment) => self.apply_deployment(&key, *deployment)?,
            Object::Service(service) => self.apply_service(&key, *service)?,
            Object::Node(_) => return Err(refuse(&key, "the box has its own nodes; remove the Node")),
            Object::Namespace(_) => {
                self.put(object);
                self.provide_namespace(&key.name);
                Vec::new()
            }
            other => {
                self.put(other);
                Vec::new()
            }
        };
        self.renew_slices();
        Ok(actions)
    }

    /// Removes an object as `kubectl delete` would: pods end first and go then. `None` when there is none.
    pub(crate) fn delete(&mut self, key: &ObjectKey) -> Option<Vec<Action>> {
        let object = self.objects.get(key)?.clone();
        let actions = match object {
            Object::Pod(_) => {
                self.successors.remove(key);
                self.end_pod(key)
            }
            Object::Namespace(_) => {
                let inside: Vec<_> = self.keys_in(&key.name);
                let ended = inside.iter().filter_map(|inside| self.delete(inside)).flatten().collect();
                self.objects.remove(key);
                ended
            }
            Object::Deployment(_) => {
                self.objects.remove(key);
                let pods = self.pods_of(key);
                pods.iter().filter_map(|pod| self.delete(pod)).flatten().collect()
            }
            Object::Service(_) => {
                self.objects.remove(key);
                if let Some(addresses) = self.assigned.remove(key) {
                    self.services.give_back(addresses);
                }
                Vec::new()
            }
            _ => {
                self.objects.remove(key);
                Vec::new()
            }
        };
        self.renew_slices();
        Some(actions)
    }

    /// Notes how a pod is.
    pub(crate) fn pod_is(&mut self, uid: &str, state: &PodState) {
        let Some(pod) = self.pod_by_uid(uid) else { return };
        let status = pod.status.get_or_insert_with(PodStatus::default);
        status.phase = Some(state.phase.to_owned());
        status.message = Some(state.message.clone()).filter(|message| !message.is_empty());
        status.conditions = Some(vec![ready_condition(state.ready)]);
        self.renew_slices();
    }

    /// Notes that a pod has ended for good: its name and addresses are free again.
    pub(crate) fn pod_is_gone(&mut self, uid: &str) -> Vec<Action> {
        let Some(pod) = self.pod_by_uid(uid) else { return Vec::new() };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let key = pod_key(
            &pod.metadata.namespace.clone().unwrap_or_default(),
            &pod.metadata.name.clone().unwrap_or_default(),
        );
        self.objects.remove(&key);
        if let Some(addresses) = self.assigned.remove(&key)
            && let Some((_, range)) = self.nodes.iter_mut().find(|(plan, _)| Some(&plan.name) == node.as_ref())
        {
            range.give_back(addresses);
        }
        let started = self.successors.remove(&key).map(|successor| self.apply_pod(&key, successor));
        self.renew_slices();
        started.and_then(Result::ok).unwrap_or_default()
    }

    // ---- pods -----------------------------------------------------------------------------------

    fn apply_pod(&mut self, key: &ObjectKey, mut pod: Pod) -> Result<Vec<Action>, Refusal> {
        let spec = pod.spec.get_or_insert_with(PodSpec::default);
        if spec.host_network == Some(true) {
            return Err(refuse(key, "field spec.hostNetwork: pods of the box have their own network; remove it"));
        }
        spec.service_account_name.get_or_insert_with(|| "default".to_owned());
        if let Some(Object::Pod(present)) = self.objects.get_mut(key) {
            if same_program(present.spec.as_ref(), spec) && present.metadata.deletion_timestamp.is_none() {
                present.metadata.labels = pod.metadata.labels;
                present.metadata.annotations = pod.metadata.annotations;
                return Ok(Vec::new());
            }
            // Kubernetes would refuse; here the new one takes the old one's place.
            self.node_for(key, spec)?;
            self.successors.insert(key.clone(), pod);
            return Ok(self.end_pod(key));
        }
        let number = self.node_for(key, spec)?;
        let (plan, range) = &mut self.nodes[number];
        let addresses = range.take().ok_or_else(|| refuse(key, "the node has no free address"))?;
        spec.node_name = Some(plan.name.clone());
        let plan = plan.clone();
        let spec = spec.clone();
        let uid = (self.new_uid)();
        pod.metadata.uid = Some(uid.clone());
        pod.metadata.creation_timestamp = Some(Time((self.now)()));
        pod.status = Some(new_status(&plan, addresses));
        self.assigned.insert(key.clone(), addresses);
        self.put(pod.into());
        Ok(vec![Action::Start(Box::new(PodPlan {
            uid,
            namespace: key.namespace.clone().unwrap_or_default(),
            name: key.name.clone(),
            node: plan,
            addresses,
            spec,
        }))])
    }

    /// The node that the pod names, or else the next in turn.
    fn node_for(&mut self, key: &ObjectKey, spec: &PodSpec) -> Result<usize, Refusal> {
        let Some(name) = spec.node_name.as_ref().filter(|name| !name.is_empty()) else {
            self.scheduled += 1;
            return Ok((self.scheduled - 1) % self.nodes.len());
        };
        self.nodes.iter().position(|(plan, _)| plan.name == *name).ok_or_else(|| {
            let names: Vec<_> = self.nodes.iter().map(|(plan, _)| plan.name.as_str()).collect();
            refuse(key, &format!("field spec.nodeName: there is no node {name}; use {}", names.join(" or ")))
        })
    }

    fn end_pod(&mut self, key: &ObjectKey) -> Vec<Action> {
        let now = (self.now)();
        let Some(Object::Pod(pod)) = self.objects.get_mut(key) else { return Vec::new() };
        let first = pod.metadata.deletion_timestamp.is_none();
        pod.metadata.deletion_timestamp.get_or_insert(Time(now));
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        if first { vec![Action::Stop { uid }] } else { Vec::new() }
    }

    fn pod_by_uid(&mut self, uid: &str) -> Option<&mut Pod> {
        self.objects.values_mut().find_map(|object| match object {
            Object::Pod(pod) if pod.metadata.uid.as_deref() == Some(uid) => Some(pod.as_mut()),
            _ => None,
        })
    }

    // ---- what is made of other objects ------------------------------------------------------------

    /// Pods `NAME-1` to `NAME-N` of the template; those beyond N, or of an older template, end.
    fn apply_deployment(&mut self, key: &ObjectKey, deployment: Deployment) -> Result<Vec<Action>, Refusal> {
        let spec = deployment.spec.clone().unwrap_or_default();
        let replicas = spec.replicas.unwrap_or(1).max(0);
        let mut actions = Vec::new();
        let mut wanted = Vec::new();
        for number in 1..=replicas {
            let mut metadata = spec.template.metadata.clone().unwrap_or_default();
            metadata.name = Some(format!("{}-{number}", key.name));
            metadata.namespace = key.namespace.clone();
            let annotations = metadata.annotations.get_or_insert_with(BTreeMap::new);
            annotations.insert(DEPLOYMENT.to_owned(), key.name.clone());
            let pod = Pod { metadata, spec: spec.template.spec.clone(), status: None };
            let pod_key = pod_key(key.namespace.as_deref().unwrap_or_default(), &format!("{}-{number}", key.name));
            actions.extend(self.apply_pod(&pod_key, pod)?);
            wanted.push(pod_key);
        }
        let superfluous: Vec<_> = self.pods_of(key).into_iter().filter(|pod| !wanted.contains(pod)).collect();
        actions.extend(superfluous.iter().filter_map(|pod| self.delete(pod)).flatten());
        self.put(deployment.into());
        Ok(actions)
    }

    fn pods_of(&self, deployment: &ObjectKey) -> Vec<ObjectKey> {
        let is_of = |pod: &Pod| {
            pod.metadata.namespace == deployment.namespace
                && pod.metadata.annotations.as_ref().and_then(|all| all.get(DEPLOYMENT)) == Some(&deployment.name)
        };
        let keys = self.objects.iter().filter(|(_, object)| matches!(object, Object::Pod(pod) if is_of(pod)));
        keys.map(|(key, _)| key.clone()).collect()
    }

    fn apply_service(&mut self, key: &ObjectKey, mut service: Service) -> Result<Vec<Action>, Refusal> {
        let spec = service.spec.get_or_insert_with(Default::default);
        if spec.type_.as_deref() == Some("ExternalName") {
            return Err(refuse(key, "field spec.type: ExternalName is not answered in the box; use ClusterIP"));
        }
        for port in spec.ports.iter_mut().flatten() {
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
        if spec.cluster_ip.as_deref() == Some("None") {
            spec.cluster_ips = Some(vec!["None".to_owned()]);
        } else {
            let addresses = self.service_addresses(key, spec.cluster_ip.as_deref())?;
            let both = addresses.both().map(|ip| ip.to_string());
            spec.cluster_ip = Some(both[0].clone());
            spec.cluster_ips = Some(both.to_vec());
        }
        spec.ip_families = Some(vec!["IPv4".to_owned(), "IPv6".to_owned()]);
        spec.ip_family_policy = Some("PreferDualStack".to_owned());
        self.put(service.into());
        Ok(Vec::new())
    }

    fn service_addresses(&mut self, key: &ObjectKey, wish: Option<&str>) -> Result<Addresses, Refusal> {
        let present = self.assigned.get(key).copied();
        let wish = wish.filter(|wish| !wish.is_empty());
        let addresses = match (present, wish) {
            (Some(present), None) => return Ok(present),
            (Some(present), Some(wish)) if present.v4.to_string() == wish => return Ok(present),
            (_, Some(wish)) => wish.parse().ok().and_then(|v4| self.services.take_this(v4)).ok_or_else(|| {
                refuse(key, &format!("field spec.clusterIP: {wish} is taken or not in 10.96.0.0/16; remove it"))
            })?,
            (None, None) => self.services.take().ok_or_else(|| refuse(key, "no Service address is free"))?,
        };
        if let Some(former) = self.assigned.insert(key.clone(), addresses) {
            self.services.give_back(former);
        }
        Ok(addresses)
    }

    /// A namespace exists as soon as something is in it, and has its default service account.
    fn provide_namespace(&mut self, name: &str) {
        let metadata = |name: &str| ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let key = ObjectKey { kind: Kind::Namespace, namespace: None, name: name.to_owned() };
        if !self.objects.contains_key(&key) {
            self.put(Namespace { metadata: metadata(name), ..Namespace::default() }.into());
        }
        let mut account = ServiceAccount { metadata: metadata("default"), ..ServiceAccount::default() };
        account.metadata.namespace = Some(name.to_owned());
        let account = Object::from(account);
        self.objects.entry(account.key()).or_insert(account);
    }

    fn renew_slices(&mut self) {
        let made: Vec<_> = self
            .objects
            .values()
            .filter_map(|object| match object {
                Object::Service(service) => Some(endpoints::slices(service, self.pods())),
                _ => None,
            })
            .flatten()
            .collect();
        self.objects.retain(|_, object| !matches!(object, Object::EndpointSlice(slice) if endpoints::is_ours(slice)));
        for slice in made {
            self.put(slice.into());
        }
    }

    fn keys_in(&self, namespace: &str) -> Vec<ObjectKey> {
        self.objects.keys().filter(|key| key.namespace.as_deref() == Some(namespace)).cloned().collect()
    }

    fn put(&mut self, object: Object) {
        self.objects.insert(object.key(), object);
    }
}

/// Where the product and its settings live (D14).
const SYSTEM_NAMESPACE: &str = "justmtls-system";

/// The mesh's settings: which addresses are the Services'. Those of pods are in the Nodes.
fn settings() -> ConfigMap {
    let metadata = ObjectMeta {
        name: Some("justmtls".to_owned()),
        namespace: Some(SYSTEM_NAMESPACE.to_owned()),
        ..ObjectMeta::default()
    };
    let ranges = service_networks().map(|network| network.to_string()).join(",");
    let data =
        BTreeMap::from([("trustDomain".to_owned(), "cluster.local".to_owned()), ("serviceCIDRs".to_owned(), ranges)]);
    ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
}

/// By which Deployment a pod was made. Only the box reads it; nothing about traffic follows from it.
const DEPLOYMENT: &str = "justmtls.dev/demo-deployment";

fn refuse(key: &ObjectKey, why: &str) -> Refusal {
    Refusal { key: key.to_string(), why: why.to_owned() }
}

/// The key of a pod.
pub(crate) fn pod_key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { kind: Kind::Pod, namespace: Some(namespace.to_owned()), name: name.to_owned() }
}

/// Whether two specs are the same but for what the cluster itself fills in.
fn same_program(present: Option<&PodSpec>, new: &PodSpec) -> bool {
    let mut present = present.cloned().unwrap_or_default();
    let mut new = new.clone();
    if new.node_name.is_none() {
        present.node_name = None;
        new.node_name = None;
    }
    present == new
}

fn new_status(node: &NodePlan, addresses: Addresses) -> PodStatus {
    let ips = addresses.both().map(|ip| PodIP { ip: ip.to_string() });
    PodStatus {
        phase: Some("Pending".to_owned()),
        host_ip: Some(node.fabric.v4.to_string()),
        pod_ip: Some(ips[0].ip.clone()),
        pod_ips: Some(ips.to_vec()),
        conditions: Some(vec![ready_condition(false)]),
        ..PodStatus::default()
    }
}

fn ready_condition(ready: bool) -> PodCondition {
    PodCondition {
        type_: "Ready".to_owned(),
        status: if ready { "True" } else { "False" }.to_owned(),
        ..PodCondition::default()
    }
}

fn node_object(plan: &NodePlan) -> Node {
    // With the address that its pods see it by: probes come from there.
    let all = [plan.fabric, plan.gateway].into_iter().flat_map(Addresses::both);
    let internal = all.map(|ip| NodeAddress { address: ip.to_string(), type_: "InternalIP".to_owned() });
    Node {
        metadata: ObjectMeta { name: Some(plan.name.clone()), ..ObjectMeta::default() },
        spec: Some(NodeSpec {
            pod_cidr: Some(plan.pods_v4.to_string()),
            pod_cidrs: Some(vec![plan.pods_v4.to_string(), plan.pods_v6.to_string()]),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus { addresses: Some(internal.collect()), ..NodeStatus::default() }),
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
