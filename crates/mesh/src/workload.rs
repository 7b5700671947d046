//! A workload: one pod (or one bare endpoint) as the mesh sees it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use identity::SpiffeId;

use crate::{PlaintextReason, PolicyName, ServiceName};

/// The name of a workload on the discovery stream: `cluster/group/kind/namespace/name`.
///
/// A pod that is deleted and made again under the same name has the same `WorkloadUid` and another [`PodUid`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WorkloadUid(Arc<str>);

/// The UID that the API server gave to a pod: never used twice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PodUid(Arc<str>);

macro_rules! name_type {
    ($type:ty) => {
        impl $type {
            /// The name as it stands on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl From<&str> for $type {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
name_type!(WorkloadUid);
name_type!(PodUid);

/// Which tunnel dialect a workload's node accepts on its behalf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speaks {
    /// None: the pod is not captured, or not yet.
    Nothing,
    /// `justmtls/1` on the application's own ports: capture was acknowledged by the pod's node.
    JustMtls,
}

/// Why a workload is not captured, when it is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uncaptured {
    /// `justmtls.dev/mode: off` on the namespace, or on the pod where the namespace allows it.
    OptedOut,
    /// The pod uses its node's network.
    HostNetwork,
    /// A namespace of the system or of justmtls itself.
    SystemNamespace,
    /// Its packets are another data path's: another mesh's, or those of a runtime with a network stack of its own.
    NotCapturable,
    /// It is to be captured and its node has not acknowledged it yet.
    Pending,
    /// Not a pod of this cluster: an endpoint that an EndpointSlice names by address alone.
    NotAPod,
}

impl Uncaptured {
    /// The reason for plaintext that follows from it.
    pub fn in_clear(self) -> PlaintextReason {
        match self {
            Self::OptedOut => PlaintextReason::OptedOut,
            Self::HostNetwork => PlaintextReason::HostNetwork,
            Self::SystemNamespace => PlaintextReason::SystemNamespace,
            Self::NotCapturable => PlaintextReason::NotCapturable,
            Self::Pending => PlaintextReason::CapturePending,
            Self::NotAPod => PlaintextReason::NotAPod,
        }
    }
}

/// Whether a port accepts plaintext.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// mTLS and plaintext, each plaintext with its reason.
    #[default]
    Permissive,
    /// mTLS only.
    Strict,
}

/// The mode of each port of a workload, computed by the control plane from PeerAuthentications.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Modes {
    /// For every port that `ports` does not name.
    pub default: Mode,
    /// By the port that the application listens on.
    pub ports: BTreeMap<u16, Mode>,
}

impl Modes {
    /// The mode of one port.
    pub fn at(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// One port under which a workload serves a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EndpointPort {
    /// The port of the Service.
    pub service_port: u16,
    /// The port of the workload.
    pub target_port: u16,
}

/// A Service that this workload is a usable endpoint of: the control plane has judged readiness already.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The Service.
    pub service: ServiceName,
    /// Its ports here.
    pub ports: Vec<EndpointPort>,
}

/// What dashboards call a workload, in Istio's words. Nothing is decided by it: whoever makes a pod chooses its labels.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Canonical {
    /// What made the pod, as a Deployment; the pod itself where nothing did.
    pub workload: Arc<str>,
    /// The application that it is an instance of.
    pub service: Arc<str>,
    /// Its version.
    pub revision: Arc<str>,
}

impl Canonical {
    /// The revision of what names none.
    pub const LATEST: &'static str = "latest";

    /// The names of something that has only one.
    pub fn of(name: &str) -> Self {
        Self { workload: name.into(), service: name.into(), revision: Self::LATEST.into() }
    }
}

/// One workload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    /// Its name on the stream.
    pub uid: WorkloadUid,
    /// The pod's UID; empty where it is not a pod.
    pub pod_uid: PodUid,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// What dashboards call it.
    pub canonical: Canonical,
    /// The identity that its certificate must show.
    pub identity: SpiffeId,
    /// Its addresses, each family.
    pub addresses: Vec<IpAddr>,
    /// The node it runs on.
    pub node: Arc<str>,
    /// What it speaks.
    pub speaks: Speaks,
    /// Why it is not captured; `None` where it is.
    pub uncaptured: Option<Uncaptured>,
    /// Which of its ports take plaintext.
    pub modes: Modes,
    /// The Services that it serves.
    pub endpoints: Vec<Endpoint>,
    /// A digest of what a NetworkPolicy can go by: the pod's labels, its namespace's labels and the NetworkPolicies there. Others
    /// enforce those, on new connections of the wire; so a tunnel at rest is not used again once this is different (T20).
    pub network_rules: u64,
    /// The policies that select it by label; those of its namespace and of the mesh apply besides.
    pub policies: Vec<PolicyName>,
}
