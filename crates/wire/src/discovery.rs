//! What the control plane tells nodes: resources, their translation, and both ends of the delta xDS protocol.
//!
//! A resource is refused alone: what is wrong with one never keeps another from arriving.

mod address;
mod client_state;
mod ours;
mod policy;
mod position;
mod published;
mod server_state;
mod snapshot;

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;

use identity::{SpiffeId, TrustBundle, UnixTime};
use mesh::{PodUid, PolicyName, ResourceKey, ServiceName, Uncaptured, WorkloadUid};

pub use client_state::{Batch, Known};
pub use position::Position;
pub use published::{MAX_RESOURCE, Published};
pub use server_state::Asked;
pub use snapshot::{BadSnapshot, MAX_SNAPSHOT, Snapshot};

pub(crate) use client_state::ClientState;
pub(crate) use published::decode;
pub(crate) use server_state::ServerState;

/// A type of resource, each with a subscription of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Workloads and Services.
    Address,
    /// Authorization policies.
    Policy,
    /// The roots of the trust domain.
    Bundle,
    /// The settings of the mesh.
    Settings,
    /// The pods of the subscriber's own node.
    NodePod,
    /// That the control plane is there, and what time it has. The last of the kinds, so that the first one comes after
    /// everything else that a new stream asks for.
    Heartbeat,
}

impl Kind {
    /// All kinds.
    pub const ALL: &'static [Self] =
        &[Self::Address, Self::Policy, Self::Bundle, Self::Settings, Self::NodePod, Self::Heartbeat];

    /// The type URL on the stream.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Policy => "type.googleapis.com/istio.security.Authorization",
            Self::Bundle => "type.googleapis.com/justmtls.v1.TrustBundle",
            Self::Settings => "type.googleapis.com/justmtls.v1.MeshSettings",
            Self::NodePod => "type.googleapis.com/justmtls.v1.NodePod",
            Self::Heartbeat => "type.googleapis.com/justmtls.v1.Heartbeat",
        }
    }

    /// The kind of a type URL; `None` where it is not ours.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.type_url() == url)
    }

    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Policy => "policy",
            Self::Bundle => "trust-bundle",
            Self::Settings => "mesh-settings",
            Self::NodePod => "node-pod",
            Self::Heartbeat => "heartbeat",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A pod of a node, as its agent must know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodePod {
    /// UID of the pod, which is also the resource's name.
    pub pod: PodUid,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// The identity of the pod's service account.
    pub identity: SpiffeId,
    /// status.podIPs.
    pub addresses: Vec<IpAddr>,
    /// Whether the pod is to be captured, and why not. [`Uncaptured::Pending`] is no reason and never stands here.
    pub capture: Result<(), Uncaptured>,
    /// A pod that is not to be captured any more is let go: peers know it, and dial it in clear (T4). Never where `capture` says
    /// that it is to be captured.
    pub release: bool,
    /// Ports that are never captured.
    pub excluded_ports: Vec<u16>,
    /// What the kubelet may ask of it where plaintext is refused.
    pub probes: mesh::Probes,
}

/// A word of the control plane that it is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// The control plane's clock when it said so. It is shown and compared, and no decision rests on it.
    pub time: UnixTime,
}

/// One resource, new or changed.
#[derive(Clone, PartialEq, Debug)]
pub enum Resource {
    /// What decisions depend on.
    Mesh(mesh::Resource),
    /// The roots of the trust domain.
    Bundle(TrustBundle),
    /// A pod of this node.
    NodePod(NodePod),
    /// A heartbeat.
    Heartbeat(Heartbeat),
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Mesh(mesh::Resource::Workload(_) | mesh::Resource::Service(_)) => Kind::Address,
            Self::Mesh(mesh::Resource::Policy(_)) => Kind::Policy,
            Self::Mesh(mesh::Resource::Settings(_)) => Kind::Settings,
            Self::Bundle(_) => Kind::Bundle,
            Self::NodePod(_) => Kind::NodePod,
            Self::Heartbeat(_) => Kind::Heartbeat,
        }
    }

    /// Its name on the stream, unique within its kind.
    pub fn name(&self) -> String {
        match self {
            Self::Mesh(mesh::Resource::Workload(workload)) => workload.uid.to_string(),
            Self::Mesh(mesh::Resource::Service(service)) => service.name.to_string(),
            Self::Mesh(mesh::Resource::Policy(policy)) => policy.name.to_string(),
            Self::Mesh(mesh::Resource::Settings(_)) => SETTINGS_NAME.to_owned(),
            Self::Bundle(_) => BUNDLE_NAME.to_owned(),
            Self::NodePod(pod) => pod.pod.to_string(),
            Self::Heartbeat(_) => HEARTBEAT_NAME.to_owned(),
        }
    }
}

/// The name of the one [`Kind::Settings`].
pub const SETTINGS_NAME: &str = "mesh";
/// The name of the one [`Kind::Bundle`].
pub const BUNDLE_NAME: &str = "bundle";
/// The name of the one [`Kind::Heartbeat`].
pub const HEARTBEAT_NAME: &str = "heartbeat";

/// The key of a resource that the control plane took back. Settings and the trust bundle change and are never taken
/// back: without them nothing can be decided.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Removed {
    /// What decisions depend on.
    Mesh(ResourceKey),
    /// A pod of this node.
    NodePod(PodUid),
}

/// One change.
#[derive(Clone, PartialEq, Debug)]
pub enum Change {
    /// A resource, new or changed.
    Set(Resource),
    /// A resource is gone.
    Removed(Removed),
    /// Nothing has this address, which was asked about. Whatever will have it comes as a resource.
    Nobody(IpAddr),
}

/// What is wrong with a resource, or with its removal.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{kind} {name}: {fault}")]
pub struct Malformed {
    /// Its kind.
    pub kind: Kind,
    /// Its name on the stream.
    pub name: String,
    /// What is wrong.
    pub fault: Fault,
}

/// How a resource fails to be one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// It has no content.
    #[error("the resource is empty")]
    Empty,
    /// Its content is of another type than was subscribed to.
    #[error("the content is of another type than its stream")]
    WrongType,
    /// Its content is no protobuf of its type.
    #[error("the content does not parse")]
    Encoding,
    /// It is longer than [`MAX_RESOURCE`].
    #[error("the content has more than {MAX_RESOURCE} bytes")]
    TooLong,
    /// Its content names another resource, so that its removal would not be understood.
    #[error("the content has another name")]
    WrongName,
    /// An address has neither 4 nor 16 bytes, or does not parse.
    #[error("`{field}` has an address that is none")]
    Address {
        /// The field.
        field: &'static str,
    },
    /// A port is 0 or above 65535.
    #[error("`{field}` has a port that is not in 1..=65535")]
    Port {
        /// The field.
        field: &'static str,
    },
    /// A value is not one of those known here.
    #[error("`{field}` has an unknown value")]
    UnknownValue {
        /// The field.
        field: &'static str,
    },
    /// A name is not of its form.
    #[error("`{field}` has a name of the wrong form")]
    Name {
        /// The field.
        field: &'static str,
    },
    /// Something that must be there is not.
    #[error("`{field}` is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A part of a SPIFFE ID is none.
    #[error("its identity: {0}")]
    Identity(#[from] identity::spiffe::SpiffeIdError),
    /// The roots are no trust bundle.
    #[error("{0}")]
    Bundle(#[from] identity::bundle::BundleError),
    /// It cannot be taken back.
    #[error("it cannot be removed")]
    NotRemovable,
}

/// The key that a name of a kind stands for.
///
/// On Istio's stream workloads and Services share a kind, and a removal has a name alone. A Service's name has exactly
/// one slash; a workload's has none or more, which [`Resource`]s are held to when they arrive.
fn removed(kind: Kind, name: &str) -> Result<Removed, Fault> {
    match kind {
        Kind::Address => Ok(Removed::Mesh(match name.parse::<ServiceName>() {
            Ok(service) => ResourceKey::Service(service),
            Err(_) => ResourceKey::Workload(WorkloadUid::from(name)),
        })),
        Kind::Policy => Ok(Removed::Mesh(ResourceKey::Policy(policy_name(name, "name")?))),
        Kind::NodePod => Ok(Removed::NodePod(PodUid::from(name))),
        Kind::Bundle | Kind::Settings | Kind::Heartbeat => Err(Fault::NotRemovable),
    }
}

/// The name under which a node asks about an address: `network/address` as in Istio's on-demand subscriptions, in the one
/// network that there is, which has no name. No resource has such a name.
fn question(address: IpAddr) -> String {
    format!("/{address}")
}

/// The address that is asked about by this name; `None` where the name is not of that form.
fn asked_address(name: &str) -> Option<Result<IpAddr, Fault>> {
    let address = name.strip_prefix('/')?;
    Some(address.parse().map_err(|_| Fault::Address { field: "name" }))
}

/// The policy of that name: `namespace/name`.
fn policy_name(text: &str, field: &'static str) -> Result<PolicyName, Fault> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(PolicyName { namespace: namespace.into(), name: name.into() })
        }
        _ => Err(Fault::Name { field }),
    }
}
