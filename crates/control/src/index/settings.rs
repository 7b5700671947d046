//! Settings of the whole mesh, from the ConfigMap `justmtls-system/justmtls` and from Nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use identity::TrustDomain;
use ipnet::IpNet;
use manifests::k8s_openapi::api::core::v1::ConfigMap;
use manifests::{Kind, ObjectKey};
use mesh::MeshSettings;

use super::facts::Node;
use crate::problem::{Problem, quoted};
use crate::{ROOT_NAMESPACE, SETTINGS_NAME};

const TRUST_DOMAIN: &str = "trustDomain";
const INSIDE: &str = "insideCIDRs";
const MIXED: &str = "mixedCIDRs";
const SERVICES: &str = "serviceCIDRs";
const EXCLUDED_PORTS: &str = "excludedPorts";
const API_SERVERS: &str = "apiServerAddresses";
const VIEW_LIFETIME: &str = "viewLifetime";
const WHOLE_MESH: &str = "wholeMeshUpTo";
/// How long proxies drain: for whoever installs them.
const DRAIN: &str = "drain";
/// That every pod is to leave: the product is about to be uninstalled.
const LEAVING: &str = "leaving";
const ALL: [&str; 10] =
    [TRUST_DOMAIN, INSIDE, MIXED, SERVICES, EXCLUDED_PORTS, API_SERVERS, VIEW_LIFETIME, WHOLE_MESH, DRAIN, LEAVING];

/// Up to how many workloads everybody is told of all, where the ConfigMap does not say: some megabytes for each proxy.
const DEFAULT_WHOLE_MESH: usize = 5_000;

/// How short and how long a view may be allowed to live. Below, a busy machine is taken for an attacker; above, an attacker
/// has his time.
const VIEW_LIFETIMES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);

/// The trust domain where nobody names one.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// What the ConfigMap says, besides the trust domain.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Settings {
    inside: BTreeSet<IpNet>,
    mixed: BTreeSet<IpNet>,
    services: BTreeSet<IpNet>,
    excluded_ports: BTreeSet<u16>,
    /// From where API servers call, besides what the cluster tells.
    api_servers: BTreeSet<AddressOrRange>,
    view_lifetime: Option<Duration>,
    whole_mesh_up_to: Option<usize>,
    leaving: Leaving,
}

/// Whether the product is about to be uninstalled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Leaving {
    #[default]
    No,
    /// Nothing is enforced any more, so that those who leave first are not refused by those who do later.
    Announced,
    /// Every pod is to leave.
    Begun,
}

/// Whether an object is the one with the settings.
pub(crate) fn is_settings(key: &ObjectKey) -> bool {
    key.kind == Kind::ConfigMap && key.namespace.as_deref() == Some(ROOT_NAMESPACE) && key.name == SETTINGS_NAME
}

/// The trust domain that a control plane starts with.
///
/// # Errors
/// Where the ConfigMap names one that is none: an identity is not guessed.
pub(crate) fn trust_domain(settings: Option<&ConfigMap>) -> Result<TrustDomain, Problem> {
    let named = settings.and_then(|settings| settings.data.as_ref()).and_then(|data| data.get(TRUST_DOMAIN));
    named.map_or(DEFAULT_TRUST_DOMAIN, |name| name.trim()).parse().map_err(|error| {
        let named = quoted(named.map_or("", String::as_str));
        Problem::error(object(), format!("field data.{TRUST_DOMAIN}: {named} is not a trust domain: {error}"))
    })
}

fn object() -> String {
    let (namespace, name) = (Some(ROOT_NAMESPACE.to_owned()), SETTINGS_NAME.to_owned());
    ObjectKey { kind: Kind::ConfigMap, namespace, name }.to_string()
}

impl Settings {
    /// Reads the ConfigMap. A key that cannot be read keeps its last value: with a range left out, pods in it would
    /// count as outside of the cluster and be spoken to in clear.
    pub(crate) fn read(
        &self,
        settings: Option<&ConfigMap>,
        trust_domain: &TrustDomain,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let empty = BTreeMap::new();
        let data = settings.and_then(|settings| settings.data.as_ref()).unwrap_or(&empty);
        for key in data.keys().filter(|key| !ALL.contains(&key.as_str())) {
            let message = format!("field data.{} is not a setting and is left out; remove it", quoted(key));
            problems.push(Problem::warning(object(), message));
        }
        let named = data.get(TRUST_DOMAIN).map_or(DEFAULT_TRUST_DOMAIN, |name| name.trim());
        if named != trust_domain.as_str() {
            let message = format!(
                "field data.{TRUST_DOMAIN} is {}, and the control plane started with {trust_domain} and stays with it: \
                 every identity would change; set it back, or restart the control plane with a new certificate authority",
                quoted(named)
            );
            problems.push(Problem::error(object(), message));
        }
        Self {
            inside: list(data, INSIDE, &self.inside, problems),
            mixed: list(data, MIXED, &self.mixed, problems),
            services: list(data, SERVICES, &self.services, problems),
            excluded_ports: list(data, EXCLUDED_PORTS, &self.excluded_ports, problems),
            api_servers: list(data, API_SERVERS, &self.api_servers, problems),
            view_lifetime: view_lifetime(data, self.view_lifetime, problems),
            whole_mesh_up_to: whole_mesh(data, self.whole_mesh_up_to, problems),
            leaving: leaving(data, self.leaving, problems),
        }
    }

    /// Up to how many workloads everybody is told of the whole mesh.
    pub(crate) fn whole_mesh_up_to(&self) -> usize {
        self.whole_mesh_up_to.unwrap_or(DEFAULT_WHOLE_MESH)
    }

    /// Whether every pod is to leave the mesh.
    pub(crate) fn leaving(&self) -> bool {
        self.leaving == Leaving::Begun
    }

    /// Whether modes and policies are enforced.
    pub(crate) fn enforces(&self) -> bool {
        self.leaving == Leaving::No
    }

    /// Ports that are never captured, ascending.
    pub(crate) fn excluded_ports(&self) -> Vec<u16> {
        self.excluded_ports.iter().copied().collect()
    }

    /// What nodes are told, with what the cluster tells of where API servers call from.
    pub(crate) fn publish(
        &self,
        nodes: &BTreeMap<String, Node>,
        api_servers: &BTreeSet<IpAddr>,
        problems: &mut Vec<Problem>,
    ) -> MeshSettings {
        let pods: BTreeSet<_> = nodes.values().flat_map(|node| node.pod_ranges.iter().copied()).collect();
        if self.inside.is_empty() && self.mixed.is_empty() {
            for (name, _) in nodes.iter().filter(|(_, node)| node.pod_ranges.is_empty()) {
                let message = format!(
                    "has no spec.podCIDRs, so that addresses of pods that are not known yet would count as outside; \
                     list the pods' ranges in {} as {INSIDE} or {MIXED}",
                    object()
                );
                problems.push(Problem::warning(format!("{} {name}", Kind::Node), message));
            }
        }
        let inside: Vec<_> = pods.union(&self.inside).chain(&self.services).copied().collect();
        let api_servers: BTreeSet<_> = api_servers.iter().map(|address| IpNet::from(*address)).collect();
        let api_servers: BTreeSet<_> = api_servers.into_iter().chain(self.api_servers.iter().map(|it| it.0)).collect();
        let nodes: BTreeSet<_> = nodes.values().flat_map(|node| node.addresses.iter().copied()).collect();
        MeshSettings {
            // Every node has a range of its own, and mostly they are neighbours: told and looked at as one.
            inside: IpNet::aggregate(&inside),
            mixed: self.mixed.iter().copied().collect(),
            nodes: nodes.into_iter().collect(),
            api_servers: api_servers.into_iter().collect(),
            view_lifetime: self.view_lifetime.unwrap_or(mesh::VIEW_LIFETIME),
        }
    }
}

fn view_lifetime(
    data: &BTreeMap<String, String>,
    last: Option<Duration>,
    problems: &mut Vec<Problem>,
) -> Option<Duration> {
    let text = data.get(VIEW_LIFETIME)?;
    let read = crate::lifetime(text.trim()).ok().filter(|time| VIEW_LIFETIMES.contains(time));
    if read.is_none() {
        let message = format!(
            "field data.{VIEW_LIFETIME}: {} is not a time from 1s to 300s; the last good value of the field stays",
            quoted(text)
        );
        problems.push(Problem::error(object(), message));
    }
    read.or(last)
}

fn whole_mesh(data: &BTreeMap<String, String>, last: Option<usize>, problems: &mut Vec<Problem>) -> Option<usize> {
    let text = data.get(WHOLE_MESH)?;
    let read = text.trim().parse().ok();
    if read.is_none() {
        let message = format!(
            "field data.{WHOLE_MESH}: {} is not a number of workloads; the last good value of the field stays",
            quoted(text)
        );
        problems.push(Problem::error(object(), message));
    }
    read.or(last)
}

fn leaving(data: &BTreeMap<String, String>, last: Leaving, problems: &mut Vec<Problem>) -> Leaving {
    match data.get(LEAVING).map(|text| text.trim()) {
        None | Some("no") => Leaving::No,
        Some("announced") => Leaving::Announced,
        Some("begun") => Leaving::Begun,
        Some(other) => {
            let message = format!(
                "field data.{LEAVING}: {} is none of no, announced and begun; the last good value of the field stays",
                quoted(other)
            );
            problems.push(Problem::error(object(), message));
            last
        }
    }
}

/// A list with commas or white space between its entries.
fn list<T: Entry>(
    data: &BTreeMap<String, String>,
    key: &str,
    last: &BTreeSet<T>,
    problems: &mut Vec<Problem>,
) -> BTreeSet<T> {
    let text = data.get(key).map_or("", String::as_str);
    let entries = text.split([',', ' ', '\t', '\n', '\r']).filter(|entry| !entry.is_empty());
    let mut read = BTreeSet::new();
    for entry in entries {
        match T::read(entry) {
            Some(value) => read.insert(value),
            None => {
                let message = format!(
                    "field data.{key}: {} is not {}; the last good value of the field stays",
                    quoted(entry),
                    T::WHAT
                );
                problems.push(Problem::error(object(), message));
                return last.clone();
            }
        };
    }
    read
}

/// Something that settings list.
trait Entry: Ord + Clone {
    const WHAT: &str;
    fn read(text: &str) -> Option<Self>;
}

impl Entry for IpNet {
    const WHAT: &str = "a range such as 10.0.0.0/8";

    fn read(text: &str) -> Option<Self> {
        // The same range in two spellings is one range.
        text.parse::<IpNet>().ok().map(|range| range.trunc())
    }
}

/// One address, as the range that it is, or a range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct AddressOrRange(IpNet);

impl Entry for AddressOrRange {
    const WHAT: &str = "an address such as 10.0.0.1, or a range such as 10.0.0.0/24";

    fn read(text: &str) -> Option<Self> {
        IpNet::read(text).or_else(|| text.parse().ok().map(|address: IpAddr| address.into())).map(Self)
    }
}

impl Entry for u16 {
    const WHAT: &str = "a port from 1 to 65535";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok().filter(|port| *port != 0)
    }
}
