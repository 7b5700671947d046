//! A resource as it stands on the stream.

use std::sync::Arc;

use bytes::Bytes;
use prost_types::Any;
use sha2::{Digest, Sha256};

use super::{Fault, Kind, Malformed, Resource, address, ours, policy};
use crate::proto::envoy;

/// The longest resource, in bytes. A workload has a few hundred; a Service or policy with thousands of entries fits.
pub const MAX_RESOURCE: usize = 1024 * 1024;

/// A resource, encoded once for however many streams send it.
///
/// Its version is a hash of its content: the same resource has the same version in every replica and after every
/// restart, so that a node that comes back is sent only what changed. A clone costs three reference counts.
#[derive(Clone, Debug)]
pub struct Published {
    kind: Kind,
    name: Arc<str>,
    version: Arc<str>,
    content: Bytes,
}

impl Published {
    /// Encodes a resource.
    pub fn new(resource: &Resource) -> Self {
        let content = match resource {
            Resource::Mesh(mesh::Resource::Workload(workload)) => address::encode_workload(workload),
            Resource::Mesh(mesh::Resource::Service(service)) => address::encode_service(service),
            Resource::Mesh(mesh::Resource::Policy(policy)) => policy::encode(policy),
            Resource::Mesh(mesh::Resource::Settings(settings)) => ours::encode_settings(settings),
            Resource::Bundle(bundle) => ours::encode_bundle(bundle),
            Resource::NodePod(pod) => ours::encode_node_pod(pod),
            Resource::Heartbeat(heartbeat) => ours::encode_heartbeat(*heartbeat),
        };
        // Half of the hash: no adversary chooses contents, and a full view names 250,000 of these.
        let version: String = Sha256::digest(&content)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { kind: resource.kind(), name: resource.name().into(), version: version.into(), content: content.into() }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name, unique within its kind.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its version: differs where its content does.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Name and version, shared.
    pub(super) fn key(&self) -> (Arc<str>, Arc<str>) {
        (self.name.clone(), self.version.clone())
    }

    /// Bytes that it adds to a response, about.
    pub(super) fn size(&self) -> usize {
        self.content.len() + self.name.len() + self.version.len() + self.kind.type_url().len() + 32
    }

    pub(crate) fn to_proto(&self) -> envoy::Resource {
        envoy::Resource {
            version: self.version.to_string(),
            resource: Some(Any { type_url: self.kind.type_url().to_owned(), value: self.content.to_vec() }),
            name: self.name.to_string(),
        }
    }
}

/// The resource that came on the stream of a kind.
pub(crate) fn decode(kind: Kind, resource: &envoy::Resource) -> Result<Resource, Malformed> {
    let content = || -> Result<Resource, Fault> {
        let any = resource.resource.as_ref().ok_or(Fault::Empty)?;
        if any.type_url != kind.type_url() {
            return Err(Fault::WrongType);
        }
        if any.value.len() > MAX_RESOURCE {
            return Err(Fault::TooLong);
        }
        let decoded = match kind {
            Kind::Address => address::decode(&any.value)?,
            Kind::Policy => policy::decode(&any.value)?,
            Kind::Bundle => ours::decode_bundle(&any.value)?,
            Kind::Settings => ours::decode_settings(&any.value)?,
            Kind::NodePod => ours::decode_node_pod(&any.value)?,
            Kind::Heartbeat => ours::decode_heartbeat(&any.value)?,
        };
        if decoded.name() == resource.name { Ok(decoded) } else { Err(Fault::WrongName) }
    };
    content().map_err(|fault| Malformed { kind, name: resource.name.clone(), fault })
}
