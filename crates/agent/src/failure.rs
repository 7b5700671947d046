//! Why a pod is not captured although it is to be: a closed set, each with its name and a sentence for the runtime's event. The
//! name alone is told to the control plane, which has sentences of its own for the events of pods that run.

use mesh::PodUid;
use wire::report::CaptureFailure;

use crate::capture::CaptureError;

/// Why a pod is not captured, or its sandbox must be made anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// Nobody could have named it.
    #[error("the agent has no connection to the control plane; see its log for the reason")]
    NoControlPlane,
    /// The control plane does not know of it, or not on this node.
    #[error(
        "the control plane does not name this pod on this node; is its Pod object bound to another node, or deleted? A static \
         pod, a file of its node, cannot be captured, and starts in the host's network alone, or in a namespace of cni.exempt"
    )]
    Unknown,
    /// Without an address nothing shows that the namespace is its own.
    #[error("its Pod object has no status.podIPs yet")]
    NoAddress,
    /// The runtime and the control plane disagree on who has this UID (T26).
    #[error("the runtime calls the pod of this UID {runtime}, and the control plane {control}")]
    OtherName {
        /// `namespace/name`, as the runtime says.
        runtime: String,
        /// As the control plane says.
        control: String,
    },
    /// Two pods cannot have one namespace, and which of them lies is not to be guessed (T26).
    #[error("its network namespace {inode} is held for pod {other} already; delete that sandbox first")]
    Ambiguous {
        /// The namespace.
        inode: u64,
        /// Who holds it.
        other: PodUid,
    },
    /// The path leads to no network namespace.
    #[error("{0}")]
    NoNamespace(String),
    /// The kernel refused, or the namespace is not the pod's.
    #[error("{sentence}")]
    Capture {
        /// [`CaptureError::name`].
        name: CaptureFailure,
        /// What happened.
        sentence: String,
    },
    /// Nobody would accept what is captured.
    #[error("no proxy of this node is connected to the agent; is it running?")]
    NoProxy,
    /// The proxy has the listeners, and no certificate yet.
    #[error("the node's proxy has no certificate for its service account yet; see the proxy's log for the reason")]
    NotReady,
    /// A newer request of the runtime, or the control plane, took the sandbox away.
    #[error("its sandbox was deleted or replaced meanwhile")]
    SandboxGone,
    /// The agent failed at its own work.
    #[error("the agent failed while it worked on the pod; see its log, and report this")]
    Internal,
}

impl Failure {
    /// The name in logs, metrics, dumps and reports.
    pub(crate) fn name(&self) -> CaptureFailure {
        match self {
            Self::NoControlPlane => CaptureFailure::NoControlPlane,
            Self::Unknown => CaptureFailure::UnknownPod,
            Self::NoAddress => CaptureFailure::NoAddress,
            Self::OtherName { .. } => CaptureFailure::OtherName,
            Self::Ambiguous { .. } => CaptureFailure::AmbiguousNamespace,
            Self::NoNamespace(_) => CaptureFailure::NoNamespace,
            Self::Capture { name, .. } => *name,
            Self::NoProxy => CaptureFailure::NoProxy,
            Self::NotReady => CaptureFailure::ProxyNotReady,
            Self::SandboxGone => CaptureFailure::SandboxGone,
            Self::Internal => CaptureFailure::Internal,
        }
    }
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Self {
        Self::Capture { name: error.name(), sentence: error.to_string() }
    }
}
