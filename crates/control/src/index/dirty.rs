//! What a change can have touched, and computing it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use manifests::Kind;
use mesh::{
    Endpoint, EndpointPort, MOST_PROBES, Mode, Modes, PodUid, Probes, Speaks, Uncaptured, Workload, WorkloadUid,
};
use wire::discovery::NodePod;

use super::cluster::Cluster;
use super::endpoints::{self, service_name};
use super::facts::{Name, Namespace, Pod, Slice};
use super::policy::policy_name;
use super::{Index, Origin, Told, Touched, Views, api_server, enrolment, network_rules};
use crate::ROOT_NAMESPACE;
use crate::problem::Problem;

/// What has to be computed anew.
#[derive(Default, Debug)]
pub(super) struct Dirty {
    pub(super) settings: bool,
    /// Services whose usable endpoints may differ.
    pub(super) endpoints: BTreeSet<Name>,
    pub(super) pods: BTreeSet<Name>,
    /// Pods that are not there any more, by their nodes.
    pub(super) gone: BTreeSet<(String, PodUid)>,
    /// Addresses that may need a workload of their own.
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) services: BTreeSet<Name>,
    pub(super) policies: BTreeSet<Name>,
}

impl Dirty {
    pub(super) fn pods_of(&mut self, cluster: &Cluster, namespace: &str) {
        self.pods.extend(cluster.pods_of(namespace).map(|pod| pod.name.clone()));
    }

    /// The pods that a policy of this namespace may speak for.
    pub(super) fn pods_in_scope(&mut self, cluster: &Cluster, namespace: &str) {
        if namespace == ROOT_NAMESPACE {
            self.pods.extend(cluster.pods.keys().cloned());
        } else {
            self.pods_of(cluster, namespace);
        }
    }

    /// The pods behind a Service that the API server calls.
    pub(super) fn called(&mut self, cluster: &Cluster, service: &Name) {
        if cluster.callees.has(service) {
            self.of_endpoints(cluster, service);
        }
    }

    /// The pods behind a Service.
    pub(super) fn of_endpoints(&mut self, cluster: &Cluster, service: &Name) {
        for address in cluster.slices_of(service).flat_map(Slice::addresses) {
            self.owners_of(cluster, address);
        }
    }

    pub(super) fn owners_of(&mut self, cluster: &Cluster, address: IpAddr) {
        self.pods.extend(cluster.owners_of(address).into_iter().cloned());
    }
}

impl Index {
    /// Computes anew what is dirty, each after what it is made of, and says what came out differently.
    pub(super) fn refresh(&mut self, mut dirty: Dirty) -> Touched {
        let mut touched = Touched::new();
        if dirty.settings {
            self.refresh_settings(&mut dirty, &mut touched);
        }
        for service in std::mem::take(&mut dirty.endpoints) {
            self.refresh_endpoints(service, &mut dirty);
        }
        for policy in dirty.policies {
            let name = policy_name(&policy);
            let new = self.cluster.authorization_policies.get(&policy).map(|policy| policy.policy.clone());
            if store(&mut self.views.policies, &name, new) {
                touched.insert(Told::Policy(name));
            }
        }
        for service in dirty.services {
            let mut problems = Vec::new();
            let new = endpoints::service(&self.cluster, &service, &mut problems);
            let name = service_name(&service);
            if store(&mut self.views.services, &name, new) {
                touched.insert(Told::Service(name));
            }
            self.note(Origin::Service(service), problems);
        }
        for (node, uid) in dirty.gone {
            // Among changes that came together it may have come back, and is dirty.
            if self.has_pod(&node, &uid) {
                continue;
            }
            self.store_node_pod(node, uid, None, &mut touched);
        }
        for pod in dirty.pods {
            self.refresh_pod(&pod, &mut touched);
        }
        for address in dirty.addresses {
            let mut problems = Vec::new();
            let new = endpoints::bare_workload(&self.cluster, &self.views, address, &mut problems);
            self.store_workload(endpoints::bare_uid(address), new, &mut touched);
            self.note(Origin::Address(address), problems);
        }
        touched
    }

    fn refresh_settings(&mut self, dirty: &mut Dirty, touched: &mut Touched) {
        let mut problems = Vec::new();
        let api_servers = api_server::addresses(&self.cluster);
        let settings = self.cluster.settings.publish(&self.cluster.nodes, &api_servers, &mut problems);
        self.note(Origin::Settings, problems);
        let whole = self.cluster.settings.whole_mesh_up_to();
        if whole != self.views.whole_mesh_up_to {
            self.views.whole_mesh_up_to = whole;
            touched.insert(Told::Settings);
        }
        if settings != self.views.settings {
            self.views.settings = settings;
            touched.insert(Told::Settings);
            dirty.addresses.extend(self.cluster.bare_addresses());
        }
    }

    fn refresh_endpoints(&mut self, service: Name, dirty: &mut Dirty) {
        let new = endpoints::usable(&self.cluster, &service);
        let old = self.views.endpoints.remove(&service).unwrap_or_default();
        let addresses: BTreeSet<_> = old.keys().chain(new.keys()).copied().collect();
        for address in addresses.into_iter().filter(|address| old.get(address) != new.get(address)) {
            dirty.owners_of(&self.cluster, address);
            dirty.addresses.insert(address);
        }
        if !new.is_empty() {
            self.views.endpoints.insert(service, new);
        }
    }

    fn refresh_pod(&mut self, name: &Name, touched: &mut Touched) {
        let mut problems = Vec::new();
        let uid = pod_workload_uid(name);
        let Some(pod) = self.cluster.pods.get(name).cloned() else {
            self.note(Origin::Pod(name.clone()), problems);
            self.foreign.remove(name);
            self.store_workload(uid, None, touched);
            return;
        };
        let namespace = self.cluster.namespaces.get(&name.namespace).cloned().unwrap_or_default();
        let leaving = self.cluster.settings.leaving();
        // Who is uninstalled must not refuse those that have left already.
        let modes = match !self.cluster.settings.enforces() {
            true => Modes { default: Mode::Permissive, ports: BTreeMap::new() },
            false => self.cluster.peer_authentications.resolve(&name.namespace, &pod.labels),
        };
        let captured = self.cluster.is_captured(&pod);
        let exempt = enrolment::exemption(&pod, &namespace, &modes, captured, &mut problems);
        let exempt = exempt.or(leaving.then_some(Uncaptured::OptedOut));
        self.cluster.enrol(&pod, exempt);
        let twin = self.cluster.pods_with(&pod.uid).find(|other| *other != name);
        if let Some(twin) = twin {
            let message =
                format!("has the same metadata.uid as {twin}, and neither is published; delete one of the two");
            problems.push(Problem::error(name.as_kind(Kind::Pod), message));
        }
        // While everybody leaves nobody is to be captured, and without an address a pod does not run yet.
        let is_left = exempt == Some(Uncaptured::NotCapturable) && enrolment::is_enrolled(&pod, &namespace);
        if is_left && twin.is_none() && !leaving && !pod.addresses.is_empty() {
            self.foreign.insert(name.clone());
        } else {
            self.foreign.remove(name);
        }
        let published = twin.is_none().then(|| self.publish_pod(&pod, &namespace, modes, exempt, &mut problems));
        let (workload, node_pod) = published.unzip();
        // Its node's agent must know it before it has an address: the runtime waits for it meanwhile. Nobody else can speak to it.
        let workload = workload.filter(|_| !pod.addresses.is_empty());
        self.note(Origin::Pod(name.clone()), problems);
        self.store_workload(uid, workload, touched);
        self.store_node_pod(pod.node, pod.uid, node_pod, touched);
    }

    fn store_workload(&mut self, uid: WorkloadUid, workload: Option<Workload>, touched: &mut Touched) {
        if store(&mut self.views.workloads, &uid, workload) {
            touched.insert(Told::Workload(uid));
        }
    }

    fn store_node_pod(&mut self, node: String, uid: PodUid, pod: Option<NodePod>, touched: &mut Touched) {
        let pods = self.views.node_pods.entry(node.clone()).or_default();
        let changed = store(pods, &uid, pod);
        if pods.is_empty() {
            self.views.node_pods.remove(&node);
        }
        if changed {
            touched.insert(Told::NodePod(node, uid));
        }
    }

    fn publish_pod(
        &self,
        pod: &Pod,
        namespace: &Namespace,
        modes: Modes,
        exempt: Option<Uncaptured>,
        problems: &mut Vec<Problem>,
    ) -> (Workload, NodePod) {
        let cluster = &self.cluster;
        let captured = cluster.is_captured(pod);
        if captured && cluster.reported.get(&pod.node).is_some_and(|reported| !reported.contains(&pod.uid)) {
            let message = format!(
                "was captured, and the agent of {} does not report it any more; peers go on with mTLS to it and fail if \
                 its capture is gone: look at that agent's log, or restart the pod",
                pod.node
            );
            problems.push(Problem::error(pod.name.as_kind(Kind::Pod), message));
        }
        let addresses = published_addresses(cluster, pod, problems);
        let endpoints = addresses.iter().flat_map(|address| self.views.endpoints_at(cluster, *address)).collect();
        let selecting = cluster.authorization_policies.values();
        let enforced = cluster.settings.enforces();
        let selecting = selecting.filter(|policy| enforced && policy.selects(&pod.name.namespace, &pod.labels));
        let network_policies = cluster.network_policies.range(Name::all_of(&pod.name.namespace));
        let workload = Workload {
            uid: pod_workload_uid(&pod.name),
            pod_uid: pod.uid.clone(),
            name: pod.name.name.as_str().into(),
            canonical: pod.canonical.clone(),
            namespace: pod.name.namespace.as_str().into(),
            identity: pod.identity.clone(),
            addresses,
            node: pod.node.as_str().into(),
            speaks: if captured { Speaks::JustMtls } else { Speaks::Nothing },
            uncaptured: if captured { None } else { Some(exempt.unwrap_or(Uncaptured::Pending)) },
            modes,
            endpoints: merge(endpoints),
            network_rules: network_rules::digest(
                &pod.labels,
                &namespace.labels,
                network_policies.map(|(_, digest)| *digest),
            ),
            policies: selecting.map(|policy| policy.policy.name.clone()).collect(),
        };
        let released = cluster.leaving.released(&(pod.node.clone(), pod.uid.clone()));
        let node_pod = NodePod {
            pod: pod.uid.clone(),
            namespace: pod.name.namespace.clone(),
            name: pod.name.name.clone(),
            identity: pod.identity.clone(),
            addresses: pod.addresses.clone(),
            capture: exempt.or(released).map_or(Ok(()), Err),
            release: released.is_some(),
            excluded_ports: cluster.settings.excluded_ports(),
            probes: declared(cluster, pod, problems),
        };
        (workload, node_pod)
    }
}

impl Views {
    /// The Services that an address serves, and its ports there.
    pub(super) fn endpoints_at(&self, cluster: &Cluster, address: IpAddr) -> Vec<Endpoint> {
        let services: BTreeSet<_> = cluster.slices_naming(address).map(|(_, slice)| &slice.service).collect();
        let usable = services.into_iter().filter_map(|name| Some((name, self.endpoints.get(name)?.get(&address)?)));
        usable.map(|(name, ports)| Endpoint { service: service_name(name), ports: ports.clone() }).collect()
    }
}

/// What the kubelet and the API server may ask of a pod.
fn declared(cluster: &Cluster, pod: &Pod, problems: &mut Vec<Problem>) -> Probes {
    let calls = api_server::calls(cluster, pod);
    Probes::new(pod.probes.iter().cloned().chain(calls)).unwrap_or_else(|| {
        let message = format!(
            "has more than {MOST_PROBES} different probes and calls of the API server together; where plaintext is \
             refused its probes pass and the API server does not: let fewer webhooks and aggregated APIs lead to it"
        );
        problems.push(Problem::error(pod.name.as_kind(Kind::Pod), message));
        pod.probes.clone()
    })
}

/// Addresses of both families of a pod serve one Service together.
fn merge(mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    endpoints.sort_by(|a, b| a.service.cmp(&b.service));
    let mut merged: Vec<Endpoint> = Vec::new();
    for endpoint in endpoints {
        match merged.last_mut().filter(|last| last.service == endpoint.service) {
            Some(last) => {
                let missing =
                    |port: &&EndpointPort| !last.ports.iter().any(|has| has.service_port == port.service_port);
                let missing: Vec<_> = endpoint.ports.iter().filter(missing).copied().collect();
                last.ports.extend(missing);
                last.ports.sort_by_key(|port| port.service_port);
            }
            None => merged.push(endpoint),
        }
    }
    merged
}

/// The addresses under which a pod is known. One that two pods say to have is nobody's until one of them is gone: to
/// guess would be to call a pod by another's identity (T26).
fn published_addresses(cluster: &Cluster, pod: &Pod, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    if pod.host_network {
        return Vec::new();
    }
    let mut published = Vec::new();
    for address in &pod.addresses {
        match cluster.owners_of(*address).into_iter().find(|owner| **owner != pod.name) {
            None => published.push(*address),
            Some(other) => {
                let message =
                    format!("address {address} is {}'s, too, and is published for neither; delete one", other);
                problems.push(Problem::error(pod.name.as_kind(Kind::Pod), message));
            }
        }
    }
    published
}

/// The name of a pod's workload on the stream, as Istio spells it.
fn pod_workload_uid(name: &Name) -> WorkloadUid {
    format!("Kubernetes//Pod/{}/{}", name.namespace, name.name).as_str().into()
}

/// Puts a value in its place, or takes it away. Whether anything is different now.
fn store<K: Ord + Clone, V: PartialEq>(map: &mut BTreeMap<K, V>, key: &K, value: Option<V>) -> bool {
    if map.get(key) == value.as_ref() {
        return false;
    }
    match value {
        Some(value) => map.insert(key.clone(), value),
        None => map.remove(key),
    };
    true
}
