//! Who is measured: ways from a client in one pod to a server in another.
//!
//! A contender is a value: two pods, what runs between them, and how to find its processes. Another proxy is one more
//! [`Kind`], with what it takes to start and to find it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, Pod, Running};
use crate::congestion;
use crate::load::Work;

/// The ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No proxy: what the wire between the pods can do.
    Direct,
    /// The plaintext double proxy.
    Double,
    /// The product.
    Justmtls,
}

impl Kind {
    /// All of them; those that others are compared with come first.
    pub(crate) const ALL: [Kind; 3] = [Kind::Direct, Kind::Double, Kind::Justmtls];

    /// Its name in tables and files, and of its pods.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Direct => "direct",
            Kind::Double => "double",
            Kind::Justmtls => "justmtls",
        }
    }

    fn client_pod(self) -> String {
        format!("{}-client", self.name())
    }

    fn server_pod(self) -> String {
        format!("{}-server", self.name())
    }

    /// Its two pods, as YAML. Only the product's are captured.
    fn manifest(self) -> String {
        let labels = if self == Kind::Justmtls { "" } else { "\n  labels: { justmtls.dev/mode: \"off\" }" };
        [(self.client_pod(), "node-a"), (self.server_pod(), "node-b")]
            .map(|(name, node)| POD.replace("NAME", &name).replace("NODE", node).replace("LABELS", labels))
            .concat()
    }
}

const NAMESPACE: &str = "\
apiVersion: v1
kind: Namespace
metadata:
  name: bench
  labels: { justmtls.dev/allow-opt-out: \"true\" }
---
";

/// A closed connection's port is used again at once, or a minute of short connections would need more ports than there
/// are.
const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  namespace: benchLABELS
spec:
  nodeName: NODE
  securityContext:
    sysctls:
      - { name: net.ipv4.tcp_tw_reuse, value: \"1\" }
  containers:
    - { name: idle, command: [sleep, infinity] }
---
";

/// The objects of a box with all contenders.
pub(crate) fn manifest(kinds: &[Kind]) -> String {
    let pods: String = kinds.iter().map(|kind| kind.manifest()).collect();
    format!("{NAMESPACE}{pods}")
}

/// So many captured pods that do nothing.
pub(crate) fn idle_pods(count: usize) -> String {
    let pod = |number: usize| {
        let node = if number.is_multiple_of(2) { "node-a" } else { "node-b" };
        POD.replace("NAME", &format!("idle-{number}")).replace("NODE", node).replace("LABELS", "")
    };
    (0..count).map(pod).collect()
}

/// A contender that runs.
#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    pub(crate) client: Running,
    pub(crate) server: Running,
    /// The server's address.
    pub(crate) to: IpAddr,
    /// What runs between the two, if this value started it.
    started: Vec<Running>,
    /// The same, if the box did.
    found: Vec<u32>,
}

impl Contender {
    /// Starts what it takes, and checks that the connection's way is the one that is to be measured.
    pub(crate) fn start(kind: Kind, cluster: &Cluster, ports: (u16, u16)) -> Result<Contender> {
        let pods = cluster.pods()?;
        let (from, to) = (find(&pods, &kind.client_pod())?, find(&pods, &kind.server_pod())?);
        for pod in [from, to] {
            let as_it_should = pod.captured == (kind == Kind::Justmtls);
            ensure!(as_it_should, "{} is{} captured", pod.name, if pod.captured { "" } else { " not" });
        }
        let [first, count] = [ports.0, ports.1].map(|number| number.to_string());
        let server = cluster.run(&to.name, true, &["serve", "--first", &first, "--ports", &count])?;
        let started = match kind {
            Kind::Double => vec![
                cluster.run(&from.name, true, &["double", "outbound"])?,
                cluster.run(&to.name, true, &["double", "inbound"])?,
            ],
            Kind::Direct | Kind::Justmtls => Vec::new(),
        };
        let found = match kind {
            Kind::Justmtls => cluster.product().into_iter().map(|process| process.pid).collect(),
            Kind::Direct | Kind::Double => Vec::new(),
        };
        let client = cluster.run(&from.name, false, &["drive"])?;
        let mut contender = Contender { kind, client, server, to: to.address, started, found };
        for pod in [from, to] {
            congestion::set(cluster, &pod.name)?;
        }
        contender.client.prepare(Work::Hold { connections: 1 }, to.address, ports.0, Duration::ZERO)?;
        for pod in [from, to] {
            congestion::check(cluster, &pod.name)?;
        }
        Ok(contender)
    }

    /// The processes between client and server.
    pub(crate) fn proxies(&self) -> Vec<u32> {
        self.started.iter().map(|running| running.pid).chain(self.found.iter().copied()).collect()
    }

    /// All of its processes, also those that only hold others.
    pub(crate) fn all(&self) -> Vec<u32> {
        let running = self.started.iter().chain([&self.client, &self.server]);
        running.flat_map(Running::pids).chain(self.found.iter().copied()).collect()
    }
}

fn find<'a>(pods: &'a [Pod], name: &str) -> Result<&'a Pod> {
    let found = pods.iter().find(|pod| pod.name == name);
    found.ok_or_else(|| anyhow::anyhow!("the box has no pod bench/{name}"))
}
