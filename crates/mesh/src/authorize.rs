//! Whether an incoming connection may reach the pod.

use std::net::{IpAddr, SocketAddr};

use identity::{SpiffeId, VerifiedPeer};

use crate::policy::Subject;
use crate::{Action, Mode, PlaintextReason, PodUid, PolicyName, RefuseReason, Uncaptured, View};

/// How a client shows itself.
#[derive(Clone, Copy, Debug)]
pub enum Security<'a> {
    /// By a certificate, in a finished handshake.
    Mtls(&'a VerifiedPeer),
    /// Not at all; this is why it is in clear.
    Plaintext(PlaintextReason),
}

/// A connection that wants to reach a pod.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The pod: known from the listener that it was captured on.
    pub pod: &'a PodUid,
    /// The address and port that the client dialled.
    pub destination: SocketAddr,
    /// The address that it comes from.
    pub source: IpAddr,
    /// Who it is.
    pub security: Security<'a>,
}

/// The proof that a connection may reach a pod. Only [`authorize()`] makes one, and it is good for that pod, address
/// and port alone.
#[derive(Debug)]
pub struct Allowed {
    pod: PodUid,
    destination: SocketAddr,
    source: IpAddr,
    client: Result<SpiffeId, PlaintextReason>,
}

impl Allowed {
    /// The pod that may be reached.
    pub fn pod(&self) -> &PodUid {
        &self.pod
    }

    /// The address and port that may be reached.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// The client's address.
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// The client's identity, or why it has none.
    pub fn client(&self) -> Result<&SpiffeId, PlaintextReason> {
        self.client.as_ref().map_err(|because| *because)
    }
}

/// A connection that may not reach a pod.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{because}{}", policy.as_ref().map(|p| format!(" ({p})")).unwrap_or_default())]
pub struct Denied {
    /// Why.
    pub because: RefuseReason,
    /// The policy that says so, where one does.
    pub policy: Option<PolicyName>,
}

impl From<RefuseReason> for Denied {
    fn from(because: RefuseReason) -> Self {
        Self { because, policy: None }
    }
}

/// Decides about one incoming connection.
pub fn authorize(view: &View, connection: Incoming<'_>) -> Result<Allowed, Denied> {
    let Incoming { pod, destination, source, security } = connection;
    let workload = view.workload_of(pod).ok_or(RefuseReason::NoSuchPod)?;
    if !workload.addresses.contains(&destination.ip()) {
        return Err(RefuseReason::NoSuchPod.into());
    }
    let neighbour = view.workload_at(source);
    match security {
        Security::Plaintext(because) if workload.modes.at(destination.port()) == Mode::Strict => {
            let bypass = because == PlaintextReason::Bypass;
            return Err(if bypass { RefuseReason::StrictBypass } else { RefuseReason::Strict }.into());
        }
        Security::Plaintext(_) => {}
        Security::Mtls(peer) => {
            // T16: the certificate says who it is; an address that is known to be somebody else's contradicts it.
            // Addresses of nodes and of bare endpoints belong to no single identity.
            let shared = [Some(Uncaptured::HostNetwork), Some(Uncaptured::NotAPod)];
            let owner = neighbour.filter(|neighbour| !shared.contains(&neighbour.uncaptured));
            if owner.is_some_and(|owner| owner.identity != *peer.id()) {
                return Err(RefuseReason::IdentityAddressMismatch.into());
            }
        }
    }
    let principal = match security {
        Security::Mtls(peer) => Some(peer.id()),
        Security::Plaintext(_) => None,
    };
    let subject = Subject { principal, source, destination: destination.ip(), port: destination.port() };
    let policies = view
        .policies_for(workload)
        .map_err(|missing| Denied { because: RefuseReason::PolicyDeny, policy: Some(missing) })?;
    if let Some(deny) = policies.iter().find(|policy| policy.action == Action::Deny && policy.matches(subject)) {
        return Err(Denied { because: RefuseReason::PolicyDeny, policy: Some(deny.name.clone()) });
    }
    let mut allows = policies.iter().filter(|policy| policy.action == Action::Allow).peekable();
    if allows.peek().is_some() && !allows.any(|policy| policy.matches(subject)) {
        return Err(RefuseReason::PolicyNoAllow.into());
    }
    let client = match security {
        Security::Mtls(peer) => Ok(peer.id().clone()),
        Security::Plaintext(because) => Err(because),
    };
    Ok(Allowed { pod: pod.clone(), destination, source, client })
}
