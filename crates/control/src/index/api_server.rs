//! What the API server calls in the cluster, and from where: admission webhooks and aggregated APIs (T33).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use manifests::k8s_openapi::api::admissionregistration::v1 as admission;
use manifests::k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use manifests::{Object, ObjectKey};
use mesh::{Check, Probe};

use super::cluster::Cluster;
use super::facts::{Name, Pod};

/// The port of a Service that is called where none is named.
const DEFAULT_PORT: i32 = 443;

/// The Service whose endpoints are the API servers themselves.
pub(super) fn own_service() -> Name {
    Name::new("default", "kubernetes")
}

/// A port of a Service that the API server calls.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Callee {
    service: Name,
    port: u16,
    /// Also by a hello that names nobody: whether an aggregated API is there is asked by its Service's address, and an address
    /// is never named in a hello (kube-aggregator, `remote_available_controller.go`; RFC 6066, section 3).
    nameless: bool,
}

impl Callee {
    fn new(namespace: &str, name: &str, port: Option<i32>, nameless: bool) -> Option<Self> {
        let port = u16::try_from(port.unwrap_or(DEFAULT_PORT)).ok().filter(|port| *port != 0)?;
        Some(Self { service: Name::new(namespace, name), port, nameless })
    }

    /// The name in the hello of the API server (apiserver, `webhook/client.go`; kube-aggregator, `handler_proxy.go`).
    fn server_name(&self) -> String {
        format!("{}.{}.svc", self.service.name, self.service.namespace)
    }
}

/// What an object has the API server call. A webhook that is named by a URL is none of the cluster's Services, and nor is an API
/// that the API server serves itself.
pub(super) fn read(object: &Object) -> BTreeSet<Callee> {
    let webhook = |client: &admission::WebhookClientConfig| {
        let service = client.service.as_ref()?;
        Callee::new(&service.namespace, &service.name, service.port, false)
    };
    match object {
        Object::ValidatingWebhookConfiguration(configuration) => {
            configuration.webhooks.iter().flatten().filter_map(|it| webhook(&it.client_config)).collect()
        }
        Object::MutatingWebhookConfiguration(configuration) => {
            configuration.webhooks.iter().flatten().filter_map(|it| webhook(&it.client_config)).collect()
        }
        Object::APIService(api) => aggregated(api).into_iter().collect(),
        _ => BTreeSet::new(),
    }
}

fn aggregated(api: &APIService) -> Option<Callee> {
    let service = api.spec.as_ref()?.service.as_ref()?;
    Callee::new(service.namespace.as_deref()?, service.name.as_deref()?, service.port, true)
}

/// What all objects have the API server call.
#[derive(Default, Debug)]
pub(crate) struct Callees {
    by_object: BTreeMap<ObjectKey, BTreeSet<Callee>>,
    /// How many objects name each.
    counts: BTreeMap<Callee, usize>,
}

impl Callees {
    /// Takes in what an object names now; gives the Services that are called otherwise than before.
    pub(super) fn set(&mut self, key: &ObjectKey, new: BTreeSet<Callee>) -> BTreeSet<Name> {
        let old =
            if new.is_empty() { self.by_object.remove(key) } else { self.by_object.insert(key.clone(), new.clone()) };
        let old = old.unwrap_or_default();
        let mut changed = BTreeSet::new();
        for callee in new.difference(&old) {
            let count = self.counts.entry(callee.clone()).or_default();
            *count += 1;
            if *count == 1 {
                changed.insert(callee.service.clone());
            }
        }
        for callee in old.difference(&new) {
            if let Some(count) = self.counts.get_mut(callee) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(callee);
                    changed.insert(callee.service.clone());
                }
            }
        }
        changed
    }

    /// The ports of a Service that are called.
    fn of<'a>(&'a self, service: &'a Name) -> impl Iterator<Item = &'a Callee> {
        let first = Callee { service: service.clone(), port: 0, nameless: false };
        self.counts.range(first..).map(|(callee, _)| callee).take_while(move |callee| callee.service == *service)
    }

    /// Whether a Service is called.
    pub(super) fn has(&self, service: &Name) -> bool {
        self.of(service).next().is_some()
    }
}

/// What the API server calls of a pod, whether it is ready or not: who is to become ready is called soon after.
pub(super) fn calls(cluster: &Cluster, pod: &Pod) -> Vec<Probe> {
    let mut calls = Vec::new();
    // What is in its node's network is never captured.
    if pod.host_network {
        return calls;
    }
    // Whoever may write a slice may put anybody's address into it: nobody is opened up by a Service of another namespace.
    let slices = pod.addresses.iter().flat_map(|address| cluster.slices_naming(*address));
    for (_, slice) in slices.filter(|(_, slice)| slice.service.namespace == pod.name.namespace) {
        let Some(service) = cluster.services.get(&slice.service) else { continue };
        for callee in cluster.callees.of(&slice.service) {
            let named = |name: &str| service.ports.iter().any(|port| port.port == callee.port && port.name == name);
            for port in slice.ports.iter().filter(|port| named(&port.name)).map(|port| port.port) {
                calls.push(Probe { port, check: Check::ApiServer(Some(callee.server_name())) });
                calls.extend(callee.nameless.then_some(Probe { port, check: Check::ApiServer(None) }));
            }
        }
    }
    calls
}

/// From where API servers call, as far as the cluster tells: their own addresses, and where one is a node's, the others of that
/// node, also those that it has in an overlay.
pub(super) fn addresses(cluster: &Cluster) -> BTreeSet<IpAddr> {
    let mut all = BTreeSet::new();
    for slice in cluster.slices_of(&own_service()) {
        all.extend(slice.addresses());
    }
    let nodes = cluster.nodes.values().filter(|node| node.addresses.iter().any(|address| all.contains(address)));
    let of_nodes: Vec<_> = nodes.flat_map(|node| node.addresses.iter().chain(&node.overlay).copied()).collect();
    all.extend(of_nodes);
    all
}
