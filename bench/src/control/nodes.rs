//! Simulated nodes: for each an agent and a proxy, with connections, tokens and streams as the real ones have, that take in what
//! they are told and keep the least of it that shows whether it is right.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use mesh::{PodUid, ResourceKey, Speaks, WorkloadUid};
use rustls::time_provider::DefaultTimeProvider;
use tokio::sync::{Semaphore, mpsc, watch};
use wire::client::{ControlPlane, Role};
use wire::discovery::{Change, Kind, Known, Removed, Resource};
use wire::report::Report;

/// Connections that are made at a time, as nodes do not all start at once.
const CONNECTING: usize = 64;

/// What a proxy knows of a workload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) captured: bool,
    /// The Services that it serves, by their names on the stream.
    pub(super) services: Vec<String>,
}

/// What a node's processes know.
#[derive(Default)]
pub(super) struct Node {
    proxy: Mutex<BTreeMap<WorkloadUid, Seen>>,
    agent: Mutex<BTreeSet<PodUid>>,
}

/// When something was put into the API server, and how long it took until those heard who are to: the first time for each of them.
#[derive(Default)]
pub(super) struct Delays {
    /// By workload, when it got its address; by workload, when it went; by pod, when it was placed on a node.
    since: [Mutex<HashMap<String, Instant>>; 3],
    /// Of the same, in milliseconds.
    took: [Mutex<Vec<f64>>; 3],
}

/// What is waited for.
#[derive(Clone, Copy)]
pub(super) enum Awaited {
    Ready,
    Gone,
    Placed,
}

impl Delays {
    /// It is put there now.
    pub(super) fn begin(&self, what: Awaited, name: String) {
        lock(&self.since[what as usize]).insert(name, Instant::now());
    }

    fn end(&self, what: Awaited, name: &str) {
        if let Some(since) = lock(&self.since[what as usize]).get(name) {
            lock(&self.took[what as usize]).push(since.elapsed().as_secs_f64() * 1e3);
        }
    }

    /// All of them.
    pub(super) fn of(&self, what: Awaited) -> Vec<f64> {
        lock(&self.took[what as usize]).clone()
    }
}

/// How nodes find the control plane.
pub(super) struct Place<'a> {
    pub(super) folder: &'a Path,
    pub(super) bundle: &'a Path,
    pub(super) port: u16,
}

/// Starts the processes of all nodes. What ends one of them is said on `failed`.
pub(super) fn start(
    place: &Place<'_>,
    nodes: Vec<NodeStart>,
    delays: &Arc<Delays>,
    failed: &mpsc::UnboundedSender<String>,
) -> Result<Vec<Arc<Node>>> {
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut started = Vec::new();
    for NodeStart { name, address, tokens, asks } in nodes {
        let node = Arc::new(Node::default());
        for (role, token) in [(Role::Agent, &tokens[0]), (Role::Proxy, &tokens[1])] {
            let token_file = place.folder.join(format!("{name}-{}", role.as_str()));
            std::fs::write(&token_file, token).context("cannot write a token")?;
            let plane = ControlPlane {
                // The node's own address, which leads back here: so the connection comes from that address, too.
                address: SocketAddr::new(address, place.port),
                bundle_file: place.bundle.to_owned(),
                token_file,
                node: name.clone(),
                role,
                time: Arc::new(DefaultTimeProvider),
            };
            let (node, delays, failed) = (node.clone(), delays.clone(), failed.clone());
            let (connecting, asks, name) = (connecting.clone(), asks.clone(), name.clone());
            tokio::spawn(async move {
                let result = match role {
                    Role::Agent => agent(&plane, &node, &delays, &connecting).await,
                    Role::Proxy => proxy(&plane, &node, &asks, &delays, &connecting).await,
                };
                if let Err(error) = result {
                    let _ = failed.send(format!("the {} of {name}: {error:#}", role.as_str()));
                }
            });
        }
        started.push(node);
    }
    Ok(started)
}

/// What a node is started with.
pub(super) struct NodeStart {
    pub(super) name: String,
    pub(super) address: IpAddr,
    /// The agent's and the proxy's.
    pub(super) tokens: [String; 2],
    /// What its pods dial.
    pub(super) asks: Vec<IpAddr>,
}

impl Node {
    /// What its proxy knows.
    pub(super) fn known(&self) -> MutexGuard<'_, BTreeMap<WorkloadUid, Seen>> {
        lock(&self.proxy)
    }

    /// The pods that its agent knows.
    pub(super) fn pods(&self) -> MutexGuard<'_, BTreeSet<PodUid>> {
        lock(&self.agent)
    }
}

async fn proxy(
    plane: &ControlPlane,
    node: &Node,
    asks: &[IpAddr],
    delays: &Delays,
    connecting: &Semaphore,
) -> Result<()> {
    const KINDS: &[Kind] = &[Kind::Address, Kind::Policy, Kind::Bundle, Kind::Settings, Kind::Heartbeat];
    let turn = connecting.acquire().await?;
    let connected = plane.connect().await?;
    let mut stream = connected.discover(KINDS, Known::default()).await?;
    drop(turn);
    let mut asks = Some(asks);
    loop {
        let batch = stream.next().await?;
        anyhow::ensure!(batch.refused.is_empty(), "it was told what cannot be read: {:?}", batch.refused);
        for change in batch.changes {
            match change {
                Change::Set(Resource::Mesh(mesh::Resource::Workload(workload))) => {
                    let workload = *workload;
                    let seen = Seen {
                        captured: workload.speaks == Speaks::JustMtls,
                        services: workload.endpoints.iter().map(|endpoint| endpoint.service.to_string()).collect(),
                        addresses: workload.addresses,
                    };
                    if lock(&node.proxy).insert(workload.uid.clone(), seen).is_none() {
                        delays.end(Awaited::Ready, workload.uid.as_str());
                    }
                }
                Change::Removed(Removed::Mesh(ResourceKey::Workload(uid))) => {
                    let known = lock(&node.proxy).remove(&uid);
                    known.iter().for_each(|_| delays.end(Awaited::Gone, uid.as_str()));
                }
                _ => {}
            }
        }
        if stream.is_complete()
            && let Some(asks) = asks.take()
        {
            asks.iter().for_each(|address| stream.ask(*address));
        }
    }
}

/// Whatever is to be captured is so at once.
async fn agent(plane: &ControlPlane, node: &Node, delays: &Delays, connecting: &Semaphore) -> Result<()> {
    let turn = connecting.acquire().await?;
    let connected = plane.connect().await?;
    let mut stream = connected.discover(&[Kind::Bundle, Kind::NodePod], Known::default()).await?;
    drop(turn);
    let report = watch::Sender::new(Report::default());
    let mut reports = None;
    loop {
        let batch = tokio::select! {
            batch = stream.next() => batch?,
            confirmed = next(&mut reports) => {
                confirmed?;
                continue;
            }
        };
        let is_first = batch.kind == Kind::NodePod && reports.is_none();
        for change in batch.changes {
            match change {
                Change::Set(Resource::NodePod(pod)) => {
                    report.send_modify(|report| {
                        report.captured.insert(pod.pod.clone());
                    });
                    if lock(&node.agent).insert(pod.pod.clone()) {
                        delays.end(Awaited::Placed, pod.pod.as_str());
                    }
                }
                Change::Removed(Removed::NodePod(pod)) => {
                    report.send_modify(|report| {
                        report.captured.remove(&pod);
                    });
                    lock(&node.agent).remove(&pod);
                }
                _ => {}
            }
        }
        if is_first {
            reports = Some(connected.report_captures(report.subscribe()).await?);
        }
    }
}

async fn next(reports: &mut Option<wire::client::Captures>) -> Result<()> {
    match reports {
        Some(reports) => reports.next().await.map(drop).map_err(anyhow::Error::from),
        None => std::future::pending().await,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
