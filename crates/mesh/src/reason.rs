//! The public vocabulary: every reason for plaintext and every reason for refusal that a decision can give.
//!
//! Logs, metrics, the CLI and SPECIFICATION.md use exactly these names.

use std::fmt;

macro_rules! reasons {
    ($(#[$meta:meta])* $type:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $type { $($(#[$doc])* $variant,)* }

        impl $type {
            /// The whole set, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in logs, metrics and the CLI.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The reason of that name, if there is one.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.as_str() == name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

reasons! {
    /// Why a connection is in clear.
    PlaintextReason {
        /// The other end is outside the cluster.
        Outside = "outside",
        /// The other end is a node of the cluster itself.
        Node = "node",
        /// The other end uses its node's network.
        HostNetwork = "host-network",
        /// The other end's owner opted out of the mesh, or that of a pod whose rules still stand.
        OptedOut = "opted-out",
        /// The other end is in a namespace of the system.
        SystemNamespace = "system-namespace",
        /// The other end's packets are another mesh's, or those of a runtime with a network stack of its own.
        NotCapturable = "not-capturable",
        /// The other end is an endpoint that no pod stands behind.
        NotAPod = "not-a-pod",
        /// The other end is to be captured and its node has not acknowledged that yet.
        CapturePending = "capture-pending",
        /// A pod talks to itself, by its own address or through its own Service.
        SelfPod = "self",
        /// The client's address is in the cluster's ranges and nobody knows it.
        UnknownSource = "unknown-source",
        /// The other end is inside the cluster, and what the view says of it is older than it may be.
        StaleView = "stale-view",
        /// The client's pod is captured and yet no TLS came: something in it goes round the capture.
        Bypass = "bypass",
        /// It was open before the pod that it leads to was captured, and does not pass the data path.
        PreCapture = "pre-capture",
        /// Plaintext is refused there, and this is a declared probe of the pod, from its own node.
        Probe = "probe",
        /// Plaintext to us is refused there, and this is the API server's own TLS to what it is declared to call: an admission
        /// webhook, or an aggregated API.
        ApiServer = "api-server",
    }
}

reasons! {
    /// Why a connection is refused.
    RefuseReason {
        /// The control plane has not told this node about the mesh yet.
        NoView = "no-view",
        /// The destination is in the cluster's ranges and nobody knows it.
        UnknownDestination = "unknown-destination",
        /// One of the two ends is strict, and the view that would let the other one be spoken to in clear is older than it
        /// may be.
        StrictStaleView = "strict-stale-view",
        /// The Service has no usable endpoint.
        NoEndpoint = "no-endpoint",
        /// The Service has no such port.
        NoSuchPort = "no-such-port",
        /// The destination is one of the data path's own listeners.
        OwnListener = "own-listener",
        /// The connection was made by the data path itself: it would capture itself for ever.
        Loop = "loop",
        /// The destination's workload takes no plaintext on this port.
        Strict = "strict",
        /// As `strict`, and the client's pod is captured: something in it goes round the capture.
        StrictBypass = "strict-bypass",
        /// The port is strict and no hello came in time.
        HelloTimeout = "hello-timeout",
        /// Plaintext is refused there, and what came from the pod's own node to a port with a probe is not that probe, or more.
        NotTheProbe = "not-the-probe",
        /// Plaintext is refused there, and what came from an API server's address to a port that it calls is not such a call.
        NotTheApiServer = "not-the-api-server",
        /// A TLS hello came after the server's bytes had been let out in clear.
        LateHello = "late-hello",
        /// The certificate names one identity and the view another for the address it comes from.
        IdentityAddressMismatch = "identity-address-mismatch",
        /// A DENY policy matches.
        PolicyDeny = "policy-deny",
        /// ALLOW policies apply and none matches.
        PolicyNoAllow = "policy-no-allow",
        /// The destination's pod is not, or no longer, served by this node.
        NoSuchPod = "no-such-pod",
    }
}
