//! Settings of the whole mesh that decisions depend on.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

/// Where an address that names no known workload or Service lies (T2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressClass {
    /// In the pods' or Services' own ranges: whoever answers there belongs to the cluster.
    Inside,
    /// In a range that pods share with other machines, as in VPC networks.
    Mixed,
    /// An address of a node of the cluster.
    Node,
    /// Anywhere else.
    Outside,
}

/// How old a view may be before plaintext inside the cluster no longer rests on it, where the settings do not say (T2).
pub const VIEW_LIFETIME: Duration = Duration::from_secs(30);

/// Published by the control plane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MeshSettings {
    /// Ranges that belong to pods and Services alone.
    pub inside: Vec<IpNet>,
    /// Ranges in which pods and other machines live side by side.
    pub mixed: Vec<IpNet>,
    /// Addresses of the nodes themselves.
    pub nodes: Vec<IpAddr>,
    /// From where API servers call: their addresses, and what an administrator adds.
    pub api_servers: Vec<IpNet>,
    /// How old the last heartbeat of the control plane may be before the view counts as stale. Whole milliseconds.
    pub view_lifetime: Duration,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            inside: Vec::new(),
            mixed: Vec::new(),
            nodes: Vec::new(),
            api_servers: Vec::new(),
            view_lifetime: VIEW_LIFETIME,
        }
    }
}

impl MeshSettings {
    /// Whether API servers call from an address.
    pub fn is_api_server(&self, address: IpAddr) -> bool {
        self.api_servers.iter().any(|range| range.contains(&address))
    }

    /// The class of an address. A node's own address wins over the range that contains it.
    pub fn classify(&self, address: IpAddr) -> AddressClass {
        if self.nodes.contains(&address) {
            AddressClass::Node
        } else if self.inside.iter().any(|range| range.contains(&address)) {
            AddressClass::Inside
        } else if self.mixed.iter().any(|range| range.contains(&address)) {
            AddressClass::Mixed
        } else {
            AddressClass::Outside
        }
    }
}
