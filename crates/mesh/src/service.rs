//! A Service: one name and address for several endpoints.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// The name of a Service on the stream: `namespace/hostname`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceName {
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Its DNS name, `name.namespace.svc.cluster.local`.
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl std::str::FromStr for ServiceName {
    type Err = NotAServiceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self { namespace: namespace.into(), hostname: hostname.into() })
            }
            _ => Err(NotAServiceName),
        }
    }
}

/// The text is not `namespace/hostname`.
#[derive(Debug, thiserror::Error)]
#[error("not of the form namespace/hostname")]
pub struct NotAServiceName;

/// One port of a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// The port that clients dial.
    pub port: u16,
}

/// `sessionAffinity` of the Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Affinity {
    /// Each connection is placed anew.
    #[default]
    None,
    /// One client address keeps one endpoint while the set of endpoints stays.
    ClientIp,
}

/// `internalTrafficPolicy` of the Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reach {
    /// Endpoints on all nodes.
    #[default]
    Cluster,
    /// Endpoints on the client's own node only.
    Node,
}

/// One Service. A headless one has no addresses: its clients dial endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its name on the stream.
    pub name: ServiceName,
    /// Cluster, external and load-balancer addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// How clients are kept to an endpoint.
    pub affinity: Affinity,
    /// Which endpoints a client may be given.
    pub reach: Reach,
}
