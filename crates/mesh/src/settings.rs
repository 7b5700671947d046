//! Settings of the whole mesh that decisions depend on.

use std::net::IpAddr;

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

/// Published by the control plane.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MeshSettings {
    /// Ranges that belong to pods and Services alone.
    pub inside: Vec<IpNet>,
    /// Ranges in which pods and other machines live side by side.
    pub mixed: Vec<IpNet>,
    /// Addresses of the nodes themselves.
    pub nodes: Vec<IpAddr>,
}

impl MeshSettings {
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
