//! Every way in which a connection ends early, and the one table that says what each means.
//!
//! Sorted by whose fault it is, because that is the first question of whoever reads a log: a peer that misbehaves, a
//! policy that does what it should, an environment that lacks something, or a bug of ours.

use std::fmt;

use identity::Refusal;
use mesh::RefuseReason;
use tracing::Level;
use wire::tunnel::{Reason, Violation};

use crate::budgets::Budget;

/// An end of a connection, named by the part that it plays in the application's protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    /// The one that connected.
    Client,
    /// The one that accepted.
    Server,
}

/// Who would have to change something for it not to happen again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Fault {
    /// One of the two ends, or whoever pretends to be one.
    Peer,
    /// Nobody: it was meant to be refused.
    Policy,
    /// The node, the network, the control plane.
    Environment,
    /// We.
    Ours,
}

impl Fault {
    /// The name in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Policy => "policy",
            Self::Environment => "environment",
            Self::Ours => "ours",
        }
    }
}

/// Why a connection did not come to its orderly end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum EndedEarly {
    /// One end reset it: what TCP itself would show.
    Reset(Side),
    /// The TLS handshake proved nobody.
    Handshake(Refusal),
    /// The TLS handshake did not finish in time.
    HandshakeTimeout,
    /// The other side hung up in the middle of the handshake.
    HandshakeCut,
    /// `Open` claims another source or destination than the connection itself has (T1).
    OpenMismatch,
    /// The handshake was good and no `Open` followed in time.
    OpenTimeout,
    /// What came through the tunnel is not `justmtls/1`.
    Frames(Violation),
    /// TLS ended in the middle of a lease: somebody died, or somebody cut it (T8).
    Truncated,
    /// The other node refused, and said why.
    RefusedByPeer(Reason),
    /// A decision of the mesh.
    Refused(RefuseReason),
    /// Nobody listens at the destination.
    ConnectionRefused,
    /// The destination did not answer.
    ConnectTimeout,
    /// There is no way to the destination.
    Unreachable,
    /// There is no valid certificate for this pod's identity.
    NoCertificate,
    /// The agent gave no socket of the pod in time.
    NoSocket,
    /// A pod, or a source address, has more open than it may (T18).
    OverBudget(Budget),
    /// The pod is gone.
    PodRemoved,
    /// The proxy ends.
    ShuttingDown,
    /// The proxy's successor serves, and the time for what was open is over.
    Drained,
    /// An operating-system call failed that should not have.
    System(&'static str),
}

/// What the table says of one way to end early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    /// The name: in logs, as a metric's label, and as the reason that the other node is told.
    pub(crate) name: &'static str,
    /// Whose fault it is.
    pub(crate) fault: Fault,
    /// How loud to say it.
    pub(crate) level: Level,
}

impl EndedEarly {
    /// The table.
    pub(crate) fn facts(&self) -> Facts {
        use {Fault as F, Level as L};
        let (name, fault, level) = match self {
            Self::Reset(Side::Client) => ("reset-by-client", F::Peer, L::INFO),
            Self::Reset(Side::Server) => ("reset-by-server", F::Peer, L::INFO),
            Self::Handshake(Refusal::Internal(_)) => ("tls-internal", F::Ours, L::ERROR),
            Self::Handshake(Refusal::Unfinished) => ("handshake-unfinished", F::Ours, L::ERROR),
            Self::Handshake(refusal) => (refusal.as_str(), F::Peer, L::WARN),
            Self::HandshakeTimeout => ("handshake-timeout", F::Peer, L::WARN),
            Self::HandshakeCut => ("handshake-cut", F::Peer, L::INFO),
            Self::OpenMismatch => ("open-mismatch", F::Peer, L::WARN),
            Self::OpenTimeout => ("open-timeout", F::Peer, L::WARN),
            Self::Frames(violation) => (violation.as_str(), F::Peer, L::WARN),
            Self::Truncated => ("tunnel-truncated", F::Peer, L::WARN),
            Self::RefusedByPeer(_) => ("refused-by-peer", F::Policy, L::INFO),
            Self::Refused(reason) => (reason.as_str(), fault_of(*reason), L::INFO),
            Self::ConnectionRefused => ("connection-refused", F::Environment, L::INFO),
            Self::ConnectTimeout => ("connect-timeout", F::Environment, L::INFO),
            Self::Unreachable => ("unreachable", F::Environment, L::INFO),
            Self::NoCertificate => ("no-certificate", F::Environment, L::WARN),
            Self::NoSocket => ("no-socket", F::Environment, L::WARN),
            Self::OverBudget(_) => ("over-budget", F::Peer, L::WARN),
            Self::PodRemoved => ("pod-removed", F::Environment, L::INFO),
            Self::ShuttingDown => ("shutting-down", F::Environment, L::INFO),
            Self::Drained => ("drained", F::Environment, L::INFO),
            Self::System(_) => ("system-call-failed", F::Ours, L::ERROR),
        };
        Facts { name, fault, level }
    }

    /// Whether it is the end of the connection itself, and nobody's word.
    pub(crate) fn is_a_cut(&self) -> bool {
        matches!(self, Self::Reset(_) | Self::Truncated)
    }

    /// The reason as the other node is told it.
    pub(crate) fn on_the_wire(&self) -> Reason {
        // Every name of the table is a reason (a test holds that), so that the second one is never needed.
        Reason::new(self.facts().name).unwrap_or_else(|| RefuseReason::NoView.into())
    }
}

fn fault_of(reason: RefuseReason) -> Fault {
    match reason {
        RefuseReason::NoView | RefuseReason::UnknownDestination | RefuseReason::NoEndpoint => Fault::Environment,
        RefuseReason::NoSuchPort | RefuseReason::NoSuchPod | RefuseReason::StrictStaleView => Fault::Environment,
        RefuseReason::OwnListener | RefuseReason::LateHello | RefuseReason::IdentityAddressMismatch => Fault::Peer,
        RefuseReason::NotTheProbe | RefuseReason::NotTheApiServer => Fault::Policy,
        RefuseReason::Loop => Fault::Ours,
        RefuseReason::Strict | RefuseReason::StrictBypass | RefuseReason::HelloTimeout => Fault::Policy,
        RefuseReason::PolicyDeny | RefuseReason::PolicyNoAllow => Fault::Policy,
    }
}

impl From<RefuseReason> for EndedEarly {
    fn from(reason: RefuseReason) -> Self {
        Self::Refused(reason)
    }
}

impl From<Violation> for EndedEarly {
    fn from(violation: Violation) -> Self {
        Self::Frames(violation)
    }
}

impl fmt::Display for EndedEarly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.facts().name)?;
        match self {
            Self::Handshake(refusal) => write!(f, " ({refusal})"),
            Self::RefusedByPeer(reason) => write!(f, " ({reason})"),
            Self::System(call) => write!(f, " ({call})"),
            Self::OverBudget(budget) => write!(f, " ({})", budget.as_str()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<EndedEarly> {
        let mut all = vec![
            EndedEarly::Reset(Side::Client),
            EndedEarly::Reset(Side::Server),
            EndedEarly::Handshake(Refusal::NoClientCertificate),
            EndedEarly::Handshake(Refusal::Internal(String::new())),
            EndedEarly::Handshake(Refusal::Unfinished),
            EndedEarly::HandshakeTimeout,
            EndedEarly::HandshakeCut,
            EndedEarly::OpenMismatch,
            EndedEarly::OpenTimeout,
            EndedEarly::Frames(Violation::OutOfOrder),
            EndedEarly::Truncated,
            EndedEarly::RefusedByPeer(RefuseReason::Strict.into()),
            EndedEarly::ConnectionRefused,
            EndedEarly::ConnectTimeout,
            EndedEarly::Unreachable,
            EndedEarly::NoCertificate,
            EndedEarly::NoSocket,
            EndedEarly::OverBudget(Budget::Source),
            EndedEarly::PodRemoved,
            EndedEarly::ShuttingDown,
            EndedEarly::Drained,
            EndedEarly::System("setsockopt"),
        ];
        all.extend(RefuseReason::ALL.iter().copied().map(EndedEarly::Refused));
        all
    }

    #[test]
    fn every_name_is_a_reason_that_the_wire_can_carry() {
        for early in all() {
            assert_eq!(Some(early.on_the_wire()), Reason::new(early.facts().name), "{early}");
        }
    }

    #[test]
    fn no_two_ways_to_end_have_the_same_name() {
        let mut names: Vec<_> = all().iter().map(|early| early.facts().name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn what_policy_does_is_never_loud() {
        for early in all().iter().filter(|early| early.facts().fault == Fault::Policy) {
            assert_eq!(early.facts().level, Level::INFO, "{early}");
        }
    }
}
