//! What an agent reports of its node: which pods are captured, and which are to be and cannot.
//!
//! No text of an agent travels: why a pod cannot be captured is one name of a closed set, and who shows it to people makes the
//! sentence. A name that is not known, as of a newer agent, is passed over.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mesh::PodUid;

use crate::proto::v1;

/// Pods of one node that a report says to have failed, at most: more than kubelet starts on a node. More are passed over.
pub const MOST_FAILED: usize = 512;
/// The longest UID that is taken of a pod that failed.
const LONGEST_UID: usize = 64;

/// The state of a node, all of it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Report {
    /// The pods that are captured.
    pub captured: BTreeSet<PodUid>,
    /// The pods that run, are to be captured, and are not, each with the reason; and those that are, and whose capture is damaged
    /// and cannot be mended.
    pub failed: BTreeMap<PodUid, CaptureFailure>,
}

impl From<BTreeSet<PodUid>> for Report {
    /// A node where nothing fails.
    fn from(captured: BTreeSet<PodUid>) -> Self {
        Self { captured, failed: BTreeMap::new() }
    }
}

impl Report {
    pub(crate) fn to_proto(&self, number: u64) -> v1::CaptureReport {
        let failed = self.failed.iter().take(MOST_FAILED);
        let failed = failed.map(|(pod, why)| v1::FailedCapture { pod_uid: pod.to_string(), why: why.as_str().into() });
        v1::CaptureReport {
            number,
            captured_pod_uids: self.captured.iter().map(ToString::to_string).collect(),
            failed: failed.collect(),
        }
    }

    /// What cannot be used is passed over, as if it were not said.
    pub(crate) fn from_proto(message: &v1::CaptureReport) -> Self {
        let captured = message.captured_pod_uids.iter().filter(|uid| !uid.is_empty());
        let captured: BTreeSet<_> = captured.map(|uid| PodUid::from(uid.as_str())).collect();
        let failed = message.failed.iter().take(MOST_FAILED).filter_map(|failed| {
            let fits = (1..=LONGEST_UID).contains(&failed.pod_uid.len());
            let pod = fits.then(|| PodUid::from(failed.pod_uid.as_str()))?;
            Some((pod, CaptureFailure::from_name(&failed.why)?))
        });
        let failed = failed.collect();
        Self { captured, failed }
    }
}

macro_rules! failures {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a pod is not captured although it is to be.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum CaptureFailure { $($(#[$doc])* $variant,)* }

        impl CaptureFailure {
            /// The whole set.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in reports, logs, metrics and events.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

failures! {
    /// The agent has no connection to the control plane.
    NoControlPlane = "no-control-plane",
    /// The control plane does not know of the pod, or not on this node.
    UnknownPod = "unknown-pod",
    /// The pod has no address yet.
    NoAddress = "no-address",
    /// The runtime and the control plane disagree on who has the pod's UID (T26).
    OtherName = "other-name",
    /// Its network namespace is another pod's, too (T26).
    AmbiguousNamespace = "ambiguous-namespace",
    /// There is no network namespace where the runtime says that it is.
    NoNamespace = "no-namespace",
    /// No proxy of the node is connected to its agent.
    NoProxy = "no-proxy",
    /// The node's proxy has no certificate for the pod.
    ProxyNotReady = "proxy-not-ready",
    /// The sandbox was deleted or replaced meanwhile.
    SandboxGone = "sandbox-gone",
    /// The agent failed at its own work.
    Internal = "internal",
    /// The agent has no descriptors or no random numbers left.
    Resources = "resources",
    /// The network namespace does not have the pod's address (T26).
    NotItsAddress = "not-its-address",
    /// The pod has no IPv6 and needs it.
    NoIpv6 = "no-ipv6",
    /// Too many sockets were asked for at once.
    BatchSize = "batch-size",
    /// The network namespace is gone or closed to the agent.
    Namespace = "namespace",
    /// Its interfaces cannot be read.
    Links = "links",
    /// A listener or socket could not be made.
    Socket = "socket",
    /// A listener does not tell its mark.
    Mark = "mark",
    /// Rules or routes could not be made or read.
    Netlink = "netlink",
    /// The kernel does not tell of changes.
    Notifications = "notifications",
    /// Its addresses are only on `lo`.
    NoInterface = "no-interface",
    /// More ports are excluded than fit the guard.
    TooManyExcludedPorts = "too-many-excluded-ports",
    /// Connections of the data path were left after all were ended.
    StillOpen = "still-open",
    /// The rules were loaded, and are not what was loaded.
    DoesNotStand = "does-not-stand",
}

impl CaptureFailure {
    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|failure| failure.as_str() == name)
    }
}

impl fmt::Display for CaptureFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn failed(pod_uid: &str, why: &str) -> v1::FailedCapture {
        v1::FailedCapture { pod_uid: pod_uid.to_owned(), why: why.to_owned() }
    }

    #[test]
    fn a_report_comes_out_as_it_went_in_with_every_name() {
        let failed = CaptureFailure::ALL.iter().map(|why| (PodUid::from(why.as_str()), *why)).collect();
        let report = Report { captured: ["a", "b"].map(PodUid::from).into(), failed };
        let bytes = report.to_proto(7).encode_to_vec();
        let message = v1::CaptureReport::decode(&*bytes).unwrap();
        assert_eq!((message.number, Report::from_proto(&message)), (7, report));
    }

    #[test]
    fn what_a_stranger_says_of_failures_is_bounded_and_what_is_not_known_is_passed_over() {
        let long = "u".repeat(LONGEST_UID + 1);
        let mut message = v1::CaptureReport { number: 1, captured_pod_uids: vec!["a".to_owned()], failed: Vec::new() };
        message.failed = vec![
            failed("a", "netlink"),
            failed("b", "netlink"),
            failed("c", "a-name-of-later"),
            failed("d", "Netlink\n"),
            failed("", "netlink"),
            failed(&long, "netlink"),
        ];
        // Also of what is captured: that may be damaged.
        let expected = ["a", "b"].map(|pod| (PodUid::from(pod), CaptureFailure::Netlink));
        assert_eq!(Report::from_proto(&message).failed, BTreeMap::from(expected));

        let many: BTreeMap<_, _> = (0..MOST_FAILED + 8)
            .map(|number| (PodUid::from(format!("{number:04}").as_str()), CaptureFailure::Socket))
            .collect();
        let report = Report { failed: many.clone(), ..Report::default() };
        assert_eq!(report.to_proto(1).failed.len(), MOST_FAILED);
        message.failed = many.iter().map(|(pod, why)| failed(pod.as_str(), why.as_str())).collect();
        assert_eq!(Report::from_proto(&message).failed.len(), MOST_FAILED);
    }
}
