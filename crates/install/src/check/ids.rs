//! What is checked: a closed set, each with its group and what to do where it fails.

/// The headings that checks stand under, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Group {
    /// The API server.
    Cluster,
    /// What was applied.
    Objects,
    /// The Deployment, and what it publishes.
    ControlPlane,
    /// The DaemonSet, and what its processes say.
    Nodes,
    /// What is captured.
    Pods,
}

impl Group {
    /// As it is shown.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Objects => "objects",
            Self::ControlPlane => "control plane",
            Self::Nodes => "nodes",
            Self::Pods => "pods",
        }
    }
}

macro_rules! ids {
    ($type:ident { $($variant:ident = $name:literal, $group:ident, $hint:literal;)* }) => {
        /// One thing that is checked.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub(crate) enum $type { $(#[doc = $hint] $variant,)* }

        impl $type {
            /// All, in the order in which they are made and shown.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its stable name.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The heading that it stands under.
            pub(crate) fn group(self) -> Group {
                match self { $(Self::$variant => Group::$group,)* }
            }

            /// Where it is explained.
            pub(crate) fn documentation(self) -> &'static str {
                match self { $(Self::$variant => concat!("SPECIFICATION.md#check-", $name),)* }
            }

            /// What to do where it fails.
            pub(crate) fn hint(self) -> &'static str {
                match self { $(Self::$variant => $hint,)* }
            }
        }
    };
}

ids! {
    Id {
        ApiReachable = "api-reachable", Cluster, "check the kubeconfig and the way to the API server";
        ApiVersion = "api-version", Cluster, "upgrade Kubernetes";
        Installed = "installed", Objects, "run `justmtls install`";
        NotLeaving = "not-leaving", Objects, "run `justmtls uninstall` to its end, or `justmtls upgrade` to take it back";
        ObjectsAsRendered = "objects-as-rendered", Objects, "run `justmtls upgrade`, or set what was changed by --set";
        DefinitionsPresent = "definitions-present", Objects, "run `justmtls install`, which makes them where they are absent";
        ControlReplicas = "control-replicas", ControlPlane, "look at what holds its pods up";
        ControlLease = "control-lease", ControlPlane, "look at the logs of the control plane's pods";
        RootsPublished = "roots-published", ControlPlane, "look at the logs of the control plane's pods";
        RootDaysLeft = "root-days-left", ControlPlane, "plan for a new root before that day";
        ControlProblems = "control-problems", ControlPlane, "do what the sentence says";
        NodePods = "node-pods", Nodes, "look at what holds the DaemonSet's pods up";
        NodeVersions = "node-versions", Nodes, "wait until the roll-out is through, or run `justmtls upgrade`";
        NodeAgents = "node-agents", Nodes, "look at that agent's log";
        NodeProxies = "node-proxies", Nodes, "look at that proxy's log";
        NodePlugins = "node-plugins", Nodes, "look at that agent's log; if the CNI directories are others, run `justmtls uninstall`, and name them by --set cni.binDir=… and cni.confDir=…";
        NodeRoots = "node-roots", Nodes, "wait a minute; if it stays, look at the way from that node to the control plane";
        NodeCertificates = "node-certificates", Nodes, "look at the way from that node to the control plane, and at its clock";
        ApiServers = "api-servers", Nodes, "name them by --set apiServerAddresses=…";
        PodsCaptured = "pods-captured", Pods, "look at the reason; `justmtls status` shows all pods";
    }
}
