//! Where an outgoing connection goes, and how.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::{
    AddressClass, Affinity, Mode, PlaintextReason, PodUid, Reach, RefuseReason, Service, ServiceName, Speaks,
    Uncaptured, View, Workload,
};

/// A connection that a captured pod makes.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The pod that makes it: known from the listener that it was captured on, never from its address.
    pub pod: &'a PodUid,
    /// The source address that its program chose.
    pub source: IpAddr,
    /// What its program dialled.
    pub destination: SocketAddr,
    /// A random number that spreads connections over endpoints.
    pub dice: u64,
}

/// The endpoint of a tunnel.
#[derive(Clone, PartialEq, Debug)]
pub struct Target {
    /// Its pod, whose identity the certificate must show.
    pub workload: Arc<Workload>,
    /// The address and port to connect to: an address of that pod, and the application's own port.
    pub address: SocketAddr,
    /// The Service through which it was dialled.
    pub service: Option<ServiceName>,
}

/// The decision.
#[derive(Clone, PartialEq, Debug)]
pub enum Route {
    /// Through a tunnel, to exactly this pod and identity.
    Tunnel(Target),
    /// In clear, for this reason.
    Plaintext {
        /// The address to connect to.
        to: SocketAddr,
        /// Why.
        because: PlaintextReason,
    },
    /// Not at all.
    Refuse {
        /// Why.
        because: RefuseReason,
    },
    /// The view does not say: wait for it to change, and when it does not, do this.
    Ask(Fallback),
}

/// What becomes of a connection about which the view went on saying nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallback {
    /// It goes in clear, for this reason.
    Plaintext {
        /// The address to connect to.
        to: SocketAddr,
        /// Why.
        because: PlaintextReason,
    },
    /// It is refused.
    Refuse {
        /// Why.
        because: RefuseReason,
    },
}

impl Route {
    fn refuse(because: RefuseReason) -> Self {
        Self::Refuse { because }
    }

    fn ask_or_refuse(because: RefuseReason) -> Self {
        Self::Ask(Fallback::Refuse { because })
    }
}

/// Decides about one outgoing connection.
pub fn route(view: &View, connection: Outgoing<'_>) -> Route {
    let destination = connection.destination;
    let Some(settings) = view.settings() else {
        return Route::ask_or_refuse(RefuseReason::NoView);
    };
    let Some(client) = view.workload_of(connection.pod) else {
        return Route::ask_or_refuse(RefuseReason::NoView);
    };
    if let Some(service) = view.service_at(destination.ip()) {
        return through_service(view, service, client, connection);
    }
    if let Some(workload) = view.workload_at(destination.ip()) {
        return to_workload(view, client, workload, destination, None);
    }
    match settings.classify(destination.ip()) {
        AddressClass::Node => Route::Plaintext { to: destination, because: PlaintextReason::Node },
        AddressClass::Outside => Route::Plaintext { to: destination, because: PlaintextReason::Outside },
        // Others live there beside pods, and who it is was asked (T2).
        AddressClass::Mixed if view.is_nobodys(destination.ip()) => match (view.is_stale(), client.modes.default) {
            (false, _) => Route::Plaintext { to: destination, because: PlaintextReason::Outside },
            (true, Mode::Permissive) => Route::Plaintext { to: destination, because: PlaintextReason::StaleView },
            (true, Mode::Strict) => Route::refuse(RefuseReason::StrictStaleView),
        },
        AddressClass::Inside | AddressClass::Mixed => Route::ask_or_refuse(RefuseReason::UnknownDestination),
    }
}

fn through_service(view: &View, service: &Service, client: &Workload, connection: Outgoing<'_>) -> Route {
    let destination = connection.destination;
    if !service.ports.iter().any(|port| port.port == destination.port()) {
        return Route::refuse(RefuseReason::NoSuchPort);
    }
    let candidates: Vec<_> = view
        .endpoints_of(&service.name)
        .filter(|workload| service.reach == Reach::Cluster || workload.node == client.node)
        .filter_map(|workload| Some((workload, endpoint_address(workload, &service.name, destination)?)))
        .collect();
    let chosen = match service.affinity {
        Affinity::None if candidates.is_empty() => None,
        Affinity::None => candidates.get((connection.dice % candidates.len() as u64) as usize),
        // Rendezvous hashing: an endpoint that comes or goes moves only the clients that it wins or loses.
        Affinity::ClientIp => candidates.iter().max_by_key(|(_, address)| weight(connection.source, *address)),
    };
    match chosen {
        Some((workload, address)) => to_workload(view, client, workload, *address, Some(&service.name)),
        None => Route::refuse(RefuseReason::NoEndpoint),
    }
}

/// The address at which a workload serves a Service's port, in the family that the client dialled.
fn endpoint_address(workload: &Workload, service: &ServiceName, dialled: SocketAddr) -> Option<SocketAddr> {
    let endpoint = workload.endpoints.iter().find(|endpoint| endpoint.service == *service)?;
    let port = endpoint.ports.iter().find(|port| port.service_port == dialled.port())?;
    let address = workload.addresses.iter().find(|address| address.is_ipv4() == dialled.is_ipv4())?;
    Some(SocketAddr::new(*address, port.target_port))
}

/// A hash that is the same on every node and in every process: FNV-1a, and the finalizer of MurmurHash3, without which
/// neighbouring addresses weigh so alike that one endpoint wins most clients.
fn weight(client: IpAddr, endpoint: SocketAddr) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let address = |hash, address| match address {
        IpAddr::V4(v4) => v4.octets().iter().fold(hash, step),
        IpAddr::V6(v6) => v6.octets().iter().fold(hash, step),
    };
    let hash = address(address(0xcbf2_9ce4_8422_2325, client), endpoint.ip());
    let hash = endpoint.port().to_be_bytes().iter().fold(hash, step);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

fn to_workload(
    view: &View,
    client: &Workload,
    workload: &Arc<Workload>,
    to: SocketAddr,
    service: Option<&ServiceName>,
) -> Route {
    if workload.uid == client.uid {
        return Route::Plaintext { to, because: PlaintextReason::SelfPod };
    }
    if workload.speaks == Speaks::JustMtls {
        return Route::Tunnel(Target { workload: workload.clone(), address: to, service: service.cloned() });
    }
    let because = workload.uncaptured.unwrap_or(Uncaptured::Pending).in_clear();
    // T2: that its pod is outside of the mesh is the view's word alone, and that word has its time. Whoever asked for
    // strict, on either end, is not spoken for by a view that somebody may be keeping old.
    let strict_there = workload.modes.at(to.port()) == Mode::Strict;
    let is_pod = !workload.pod_uid.as_str().is_empty() && because != PlaintextReason::HostNetwork;
    let stale = view.is_stale() && (is_pod || view.is_within(to.ip()));
    if stale && (strict_there || client.modes.default == Mode::Strict) {
        return Route::refuse(RefuseReason::StrictStaleView);
    }
    match because {
        // It will speak our dialect in a moment, and then never plaintext again: worth waiting for.
        PlaintextReason::CapturePending if strict_there => Route::ask_or_refuse(RefuseReason::Strict),
        PlaintextReason::CapturePending => {
            let because = if stale { PlaintextReason::StaleView } else { because };
            Route::Ask(Fallback::Plaintext { to, because })
        }
        _ if stale => Route::Plaintext { to, because: PlaintextReason::StaleView },
        _ => Route::Plaintext { to, because },
    }
}
