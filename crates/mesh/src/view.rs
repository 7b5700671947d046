//! What one node knows of the mesh.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::claims::Claims;
use crate::{
    AddressClass, MeshSettings, PodUid, Policy, PolicyName, Scope, Service, ServiceName, Speaks, Uncaptured, Workload,
    WorkloadUid,
};

/// One thing that the control plane says.
#[derive(Clone, PartialEq, Debug)]
pub enum Resource {
    /// A workload, new or changed.
    Workload(Box<Workload>),
    /// A Service, new or changed.
    Service(Service),
    /// A policy, new or changed.
    Policy(Policy),
    /// The settings of the mesh.
    Settings(MeshSettings),
}

/// The name of a thing that the control plane took back.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ResourceKey {
    /// A workload.
    Workload(WorkloadUid),
    /// A Service.
    Service(ServiceName),
    /// A policy.
    Policy(PolicyName),
}

/// Workloads, Services, policies and settings, indexed for the decisions.
///
/// A change names whole things; there is no half-applied one. What was never said is unknown, and unknown is never
/// taken for "outside".
#[derive(Default, Debug)]
pub struct View {
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    by_address: Claims<IpAddr, WorkloadUid>,
    by_pod: Claims<PodUid, WorkloadUid>,
    services: HashMap<ServiceName, Arc<Service>>,
    service_by_address: Claims<IpAddr, ServiceName>,
    endpoints: HashMap<ServiceName, BTreeSet<WorkloadUid>>,
    policies: HashMap<PolicyName, Arc<Policy>>,
    settings: Option<MeshSettings>,
    /// Pods whose capability was published: they never fall back to "speaks nothing" while they live and do not leave (T47).
    published: HashSet<PodUid>,
    /// Addresses that the control plane said to be nobody's.
    nobodys: HashSet<IpAddr>,
    /// The control plane has not been heard of for longer than the settings allow (T2).
    stale: bool,
}

impl View {
    /// Takes in a new or changed thing.
    pub fn apply(&mut self, resource: Resource) {
        match resource {
            Resource::Workload(workload) => self.apply_workload(*workload),
            Resource::Service(service) => self.apply_service(service),
            Resource::Policy(policy) => {
                self.policies.insert(policy.name.clone(), Arc::new(policy));
            }
            Resource::Settings(settings) => self.settings = Some(settings),
        }
    }

    /// Forgets a thing that the control plane took back. What is not known is no error: deltas may repeat.
    pub fn remove(&mut self, key: &ResourceKey) {
        match key {
            ResourceKey::Workload(uid) => {
                if let Some(old) = self.take_workload(uid) {
                    self.published.remove(&old.pod_uid);
                }
            }
            ResourceKey::Service(name) => self.remove_service(name),
            ResourceKey::Policy(name) => {
                self.policies.remove(name);
            }
        }
    }

    /// Takes note of whether the view is too old for plaintext inside the cluster to rest on it. Time is the caller's.
    pub fn set_stale(&mut self, stale: bool) {
        self.stale = stale;
    }

    /// Whether the view is too old for plaintext inside the cluster to rest on it (T2): who was not in the mesh when it was
    /// last known to be right may be by now, and an attacker may be who keeps that from us. What a certificate proves does
    /// not rest on the view's age.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// Takes in that nothing in the mesh has an address. It holds until something does, or the word is forgotten.
    pub fn set_nobodys(&mut self, address: IpAddr) {
        if self.workload_at(address).is_none() && self.service_at(address).is_none() {
            self.nobodys.insert(address);
        }
    }

    /// Takes an address to be unknown again.
    pub fn forget_nobodys(&mut self, address: IpAddr) {
        self.nobodys.remove(&address);
    }

    /// Whether the control plane said that nothing has this address. An address of which it said nothing is unknown, which
    /// is something else.
    pub fn is_nobodys(&self, address: IpAddr) -> bool {
        self.nobodys.contains(&address)
    }

    /// Whether an address is in the cluster's ranges, and nothing was said about it.
    pub fn is_unknown(&self, address: IpAddr) -> bool {
        self.workload_at(address).is_none()
            && self.service_at(address).is_none()
            && !self.is_nobodys(address)
            && self.settings.is_some()
            && self.is_within(address)
    }

    fn apply_workload(&mut self, mut workload: Workload) {
        let old = self.take_workload(&workload.uid);
        if let Some(old) = old.filter(|old| old.pod_uid != workload.pod_uid) {
            self.published.remove(&old.pod_uid);
        }
        if !workload.pod_uid.as_str().is_empty() {
            let left = matches!(
                workload.uncaptured,
                Some(Uncaptured::OptedOut | Uncaptured::SystemNamespace | Uncaptured::NotCapturable)
            );
            if workload.speaks == Speaks::JustMtls {
                self.published.insert(workload.pod_uid.clone());
            } else if left {
                // Its owner lets it leave, and its rules stand until this is known here (T4).
                self.published.remove(&workload.pod_uid);
            } else if self.published.contains(&workload.pod_uid) {
                workload.speaks = Speaks::JustMtls;
                workload.uncaptured = None;
            }
            self.by_pod.claim(workload.pod_uid.clone(), workload.uid.clone());
        }
        for address in &workload.addresses {
            self.nobodys.remove(address);
            self.by_address.claim(*address, workload.uid.clone());
        }
        for endpoint in &workload.endpoints {
            self.endpoints.entry(endpoint.service.clone()).or_default().insert(workload.uid.clone());
        }
        self.workloads.insert(workload.uid.clone(), Arc::new(workload));
    }

    fn take_workload(&mut self, uid: &WorkloadUid) -> Option<Arc<Workload>> {
        let old = self.workloads.remove(uid)?;
        for address in &old.addresses {
            self.by_address.release(address, uid);
        }
        self.by_pod.release(&old.pod_uid, uid);
        for endpoint in &old.endpoints {
            if let Some(members) = self.endpoints.get_mut(&endpoint.service) {
                members.remove(uid);
                if members.is_empty() {
                    self.endpoints.remove(&endpoint.service);
                }
            }
        }
        Some(old)
    }

    fn apply_service(&mut self, service: Service) {
        self.remove_service(&service.name);
        for address in &service.addresses {
            self.nobodys.remove(address);
            self.service_by_address.claim(*address, service.name.clone());
        }
        self.services.insert(service.name.clone(), Arc::new(service));
    }

    fn remove_service(&mut self, name: &ServiceName) {
        let Some(old) = self.services.remove(name) else { return };
        for address in &old.addresses {
            self.service_by_address.release(address, name);
        }
    }

    /// The workload that owns an address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_address.holder(&address)?)
    }

    /// All workloads that own an address, or say so.
    pub(crate) fn claimants_of(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_address.owners(&address).iter().filter_map(|uid| self.workloads.get(uid))
    }

    /// The workload of a pod.
    pub fn workload_of(&self, pod: &PodUid) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_pod.holder(pod)?)
    }

    /// The Service that owns an address.
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.service_by_address.holder(&address)?)
    }

    /// The usable endpoints of a Service, in a stable order.
    pub fn endpoints_of(&self, service: &ServiceName) -> impl Iterator<Item = &Arc<Workload>> {
        self.endpoints.get(service).into_iter().flatten().filter_map(|uid| self.workloads.get(uid))
    }

    /// The policies that apply to a workload. One that it names and nobody has sent is `Err`: it cannot be judged
    /// without it, so nothing may pass.
    pub(crate) fn policies_for(&self, workload: &Workload) -> Result<Vec<&Arc<Policy>>, PolicyName> {
        let mut applicable: Vec<_> = self
            .policies
            .values()
            .filter(|policy| match policy.scope {
                Scope::Mesh => true,
                Scope::Namespace => policy.name.namespace == workload.namespace,
                Scope::Selected => false,
            })
            .collect();
        for name in &workload.policies {
            applicable.push(self.policies.get(name).ok_or_else(|| name.clone())?);
        }
        Ok(applicable)
    }

    /// The settings, once the control plane has sent them.
    pub fn settings(&self) -> Option<&MeshSettings> {
        self.settings.as_ref()
    }

    /// Whether an address is in ranges in which pods live: inside, or mixed. Without settings, each may be.
    pub(crate) fn is_within(&self, address: IpAddr) -> bool {
        let class = self.settings.as_ref().map(|settings| settings.classify(address));
        !matches!(class, Some(AddressClass::Outside | AddressClass::Node))
    }

    /// All workloads, for dumps.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All Services, for dumps.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, for dumps.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }
}
