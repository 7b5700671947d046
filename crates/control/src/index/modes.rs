//! Which ports of a pod take plaintext: Istio's PeerAuthentication, resolved.
//!
//! Port of the workload's policy, then the workload's policy, then the namespace's, then the mesh's; what is UNSET asks
//! the next one, and where nobody says anything the mode is permissive. In each scope the oldest policy is the only one.
//! <https://istio.io/latest/docs/reference/config/security/peer_authentication/>

use std::collections::BTreeMap;

use manifests::Kind;
use manifests::istio::{MtlsMode, PeerAuthentication as Object};
use mesh::{Mode, Modes};

use super::facts::{Age, Name};
use super::root;
use crate::ROOT_NAMESPACE;
use crate::problem::Problem;

/// What a PeerAuthentication says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct PeerAuthentication {
    age: Age,
    /// Labels that a pod must have; empty: the policy speaks for its namespace or for the mesh.
    selector: BTreeMap<String, String>,
    /// `None`: as the next wider scope says.
    mode: Option<Mode>,
    /// By the port of the workload.
    ports: BTreeMap<u16, Option<Mode>>,
}

impl PeerAuthentication {
    pub(crate) fn read(policy: &Object, problems: &mut Vec<Problem>) -> Self {
        let name = Name::of_metadata(&policy.metadata);
        let object = name.as_kind(Kind::PeerAuthentication);
        let selector = policy.spec.selector.as_ref().map(|selector| selector.match_labels.clone()).unwrap_or_default();
        let mut ports: BTreeMap<_, _> =
            policy.spec.port_level_mtls.iter().map(|(port, mtls)| (*port, mode_of(mtls.mode))).collect();
        if selector.is_empty() && !ports.is_empty() {
            let message = "field spec.portLevelMtls counts only beside a selector and is left out; add spec.selector";
            problems.push(Problem::error(&object, message));
            ports.clear();
        }
        if !selector.is_empty() && name.namespace == ROOT_NAMESPACE {
            let message = format!(
                "has a selector in {ROOT_NAMESPACE}, where policies speak for the whole mesh, and selects nothing, as \
                 in Istio; move it to the namespace of its pods"
            );
            problems.push(Problem::warning(&object, message));
        }
        if let Some(message) = root::elsewhere(&name.namespace).filter(|_| selector.is_empty()) {
            problems.push(Problem::warning(&object, message));
        }
        let mtls = policy.spec.mtls.iter().chain(policy.spec.port_level_mtls.values());
        if mtls.into_iter().any(|mtls| mtls.mode == MtlsMode::Disable) {
            let message = "mode DISABLE is taken as PERMISSIVE: mTLS between captured pods is never switched off; \
                           write PERMISSIVE";
            problems.push(Problem::warning(&object, message));
        }
        Self {
            age: Age::of(&policy.metadata),
            mode: policy.spec.mtls.and_then(|mtls| mode_of(mtls.mode)),
            selector,
            ports,
        }
    }

    fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

fn mode_of(mode: MtlsMode) -> Option<Mode> {
    match mode {
        MtlsMode::Unset => None,
        MtlsMode::Disable | MtlsMode::Permissive => Some(Mode::Permissive),
        MtlsMode::Strict => Some(Mode::Strict),
    }
}

/// All PeerAuthentications.
#[derive(Default, Debug)]
pub(crate) struct PeerAuthentications(BTreeMap<Name, PeerAuthentication>);

impl PeerAuthentications {
    /// Takes a policy in, or away. Whether anything is different now.
    pub(crate) fn set(&mut self, name: &Name, policy: Option<PeerAuthentication>) -> bool {
        if self.0.get(name) == policy.as_ref() {
            return false;
        }
        match policy {
            Some(policy) => self.0.insert(name.clone(), policy),
            None => self.0.remove(name),
        };
        true
    }

    /// The modes of a pod.
    pub(crate) fn resolve(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Modes {
        let mesh = self.oldest(ROOT_NAMESPACE, |policy| policy.selector.is_empty());
        let own = self.oldest(namespace, |policy| policy.selector.is_empty());
        let workload = match namespace {
            ROOT_NAMESPACE => None,
            _ => self.oldest(namespace, |policy| policy.selects(labels)),
        };
        let scopes = [workload, own, mesh].into_iter().flatten();
        let default = scopes.filter_map(|policy| policy.mode).next().unwrap_or_default();
        let ports = workload.into_iter().flat_map(|policy| &policy.ports);
        let ports = ports.filter_map(|(port, mode)| Some((*port, (*mode)?))).filter(|(_, mode)| *mode != default);
        Modes { default, ports: ports.collect() }
    }

    fn oldest(&self, namespace: &str, holds: impl Fn(&PeerAuthentication) -> bool) -> Option<&PeerAuthentication> {
        self.of(namespace).filter(|policy| holds(policy)).min_by_key(|policy| &policy.age)
    }

    fn of(&self, namespace: &str) -> impl Iterator<Item = &PeerAuthentication> + use<'_> {
        self.0.range(Name::all_of(namespace)).map(|(_, policy)| policy)
    }

    /// Policies of a namespace that have no effect because an older one speaks for the same pods, and what is to be said of each.
    pub(crate) fn shadowed(&self, namespace: &str) -> Vec<(Name, Problem)> {
        let mut oldest: BTreeMap<&BTreeMap<String, String>, &PeerAuthentication> = BTreeMap::new();
        for policy in self.of(namespace) {
            let first = oldest.entry(&policy.selector).or_insert(policy);
            if policy.age < first.age {
                *first = policy;
            }
        }
        let shadowed = self.of(namespace).filter(|policy| oldest[&policy.selector].age != policy.age);
        let problem = |policy: &PeerAuthentication| {
            let message = format!(
                "has no effect: {} comes before it for the same pods; merge the two",
                oldest[&policy.selector].age.name()
            );
            let name = policy.age.name();
            (name.clone(), Problem::warning(name.as_kind(Kind::PeerAuthentication), message))
        };
        shadowed.map(problem).collect()
    }
}
