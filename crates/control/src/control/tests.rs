//! The whole control plane over real TLS and gRPC on loopback, with the client that nodes use.

mod calls;
mod leaving;
mod replicas;
mod restart;
mod streams;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh::{PodUid, View};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use wire::client::{Connected, ControlPlane, Discovery, Role};
use wire::discovery::{Batch, Change, Kind, Known, Resource};

use super::{Control, Event};
use crate::Args;
use crate::clock::Clock;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(20);

const PROXY_KINDS: &[Kind] = &[Kind::Address, Kind::Policy, Kind::Bundle, Kind::Settings];
const WITH_HEARTBEAT: &[Kind] = &[Kind::Address, Kind::Policy, Kind::Bundle, Kind::Settings, Kind::Heartbeat];
const AGENT_KINDS: &[Kind] = &[Kind::Bundle, Kind::NodePod];

/// A running control plane, and the files it was started with.
struct Bed {
    directory: TempDir,
    address: SocketAddr,
    clock: Clock,
    events: tokio::sync::mpsc::Sender<Event>,
    running: JoinHandle<anyhow::Result<()>>,
}

fn pod(name: &str, node: &str, last: u8, account: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: {name}, uid: uid-{name}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: c, image: i}}]}}\n\
         status: {{phase: Running, podIPs: [{{ip: 10.88.16.{last}}}, {{ip: \"fd88:16::{last}\"}}]}}\n"
    )
}

fn strict() -> &'static str {
    "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {namespace: shop, name: default}\nspec: {mtls: {mode: STRICT}}\n"
}

fn tokens() -> String {
    ["a", "b"].iter().fold(String::new(), |text, node| {
        text + &format!("agent-token-of-node-{node},agent,node-{node}\nproxy-token-of-node-{node},proxy,node-{node}\n")
    })
}

impl Bed {
    /// Two pods: web on node-a as `web`, db on node-b as `db`.
    async fn start() -> Self {
        Self::start_with(Duration::from_secs(3600)).await
    }

    async fn start_with(leaf_validity: Duration) -> Self {
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("objects")).unwrap();
        fs::write(directory.path().join("tokens"), tokens()).unwrap();
        put(directory.path(), "web", &pod("web", "node-a", 5, "web"));
        put(directory.path(), "db", &pod("db", "node-b", 6, "db"));
        let clock = Clock::default();
        let control = Control::start(&args(directory.path(), leaf_validity), clock.clone()).await.unwrap();
        let (address, events) = (control.address, control.sender.clone());
        Self { directory, address, clock, events, running: tokio::spawn(control.run()) }
    }

    /// Ends the control plane, as a signal would.
    async fn stop(&mut self) {
        self.events.send(Event::Terminate).await.unwrap();
        timeout(LONG, &mut self.running).await.unwrap().unwrap().unwrap();
    }

    /// Starts another one from the same files.
    async fn start_again(&mut self) {
        let control = Control::start(&args(self.path(), Duration::from_secs(3600)), self.clock.clone()).await.unwrap();
        (self.address, self.events) = (control.address, control.sender.clone());
        self.running = tokio::spawn(control.run());
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Replaces a file of objects, as `kubectl` of the box does: by rename.
    fn put(&self, name: &str, text: &str) {
        put(self.path(), name, text);
    }

    fn client(&self, role: Role, node: &str) -> ControlPlane {
        let token_file = self.path().join(format!("{}-{node}.token", role.as_str()));
        fs::write(&token_file, format!("{}-token-of-{node}\n", role.as_str())).unwrap();
        ControlPlane {
            address: self.address,
            bundle_file: self.path().join("bundle.pem"),
            token_file,
            node: node.to_owned(),
            role,
            time: Arc::new(self.clock.clone()),
        }
    }

    async fn connect(&self, role: Role, node: &str) -> Connected {
        self.client(role, node).connect().await.unwrap()
    }

    async fn proxy(&self, node: &str) -> Watched {
        Watched::open(&self.connect(Role::Proxy, node).await, PROXY_KINDS, Known::default()).await
    }

    async fn agent(&self, node: &str) -> Watched {
        Watched::open(&self.connect(Role::Agent, node).await, AGENT_KINDS, Known::default()).await
    }

    /// What `/…` of the admin socket shows.
    async fn admin(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut socket = tokio::net::UnixStream::connect(self.path().join("admin")).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LONG, socket.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// Looks at the admin socket until it shows something.
    async fn admin_until(&self, path: &str, holds: impl Fn(&str) -> bool) -> String {
        let look = async {
            loop {
                let shown = self.admin(path).await;
                if holds(&shown) {
                    return shown;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, look).await.expect("the admin socket never shows it")
    }
}

fn put(directory: &Path, name: &str, text: &str) {
    let next = directory.join("objects").join(format!(".{name}"));
    fs::write(&next, text).unwrap();
    fs::rename(next, directory.join("objects").join(format!("{name}.yaml"))).unwrap();
}

fn args(directory: &Path, leaf_validity: Duration) -> Args {
    Args {
        kubernetes: false,
        kubeconfig: None,
        identity: "control".to_owned(),
        objects: Some(directory.join("objects")),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        tokens: Some(directory.join("tokens")),
        ca: Some(directory.join("ca")),
        publish_bundle: Some(directory.join("bundle.pem")),
        admin: directory.join("admin"),
        metrics: None,
        leaf_validity,
    }
}

/// A node's end of a stream, with the view that comes out of it.
struct Watched {
    stream: Discovery,
    view: View,
    node_pods: std::collections::BTreeMap<PodUid, wire::discovery::NodePod>,
    bundles: usize,
    /// The times that heartbeats told.
    beats: Vec<u64>,
    /// The addresses that were said to be nobody's.
    nobody: Vec<std::net::IpAddr>,
    /// Every batch that came, by kind and number of changes.
    batches: Vec<(Kind, usize)>,
}

impl Watched {
    /// Opens a stream and reads until it is complete.
    async fn open(connected: &Connected, kinds: &[Kind], known: Known) -> Self {
        let stream = connected.discover(kinds, known).await.unwrap();
        let mut watched = Self {
            stream,
            view: View::default(),
            node_pods: Default::default(),
            bundles: 0,
            beats: Vec::new(),
            nobody: Vec::new(),
            batches: Vec::new(),
        };
        let kinds: BTreeSet<_> = kinds.iter().copied().collect();
        watched.until(|watched| watched.batches.iter().map(|(kind, _)| *kind).collect::<BTreeSet<_>>() == kinds).await;
        watched
    }

    /// Takes in batches until something holds.
    async fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            let batch = timeout(LONG, self.stream.next()).await.expect("nothing comes").unwrap();
            assert!(batch.refused.is_empty(), "{:?}", batch.refused);
            self.take(batch);
        }
    }

    fn take(&mut self, batch: Batch) {
        self.batches.push((batch.kind, batch.changes.len()));
        for change in batch.changes {
            match change {
                Change::Set(Resource::Mesh(resource)) => self.view.apply(resource),
                Change::Set(Resource::Bundle(_)) => self.bundles += 1,
                Change::Set(Resource::Heartbeat(heartbeat)) => self.beats.push(heartbeat.time.as_secs()),
                Change::Set(Resource::NodePod(pod)) => drop(self.node_pods.insert(pod.pod.clone(), pod)),
                Change::Removed(wire::discovery::Removed::Mesh(key)) => self.view.remove(&key),
                Change::Removed(wire::discovery::Removed::NodePod(pod)) => drop(self.node_pods.remove(&pod)),
                Change::Nobody(address) => self.nobody.push(address),
            }
        }
    }

    fn workload(&self, name: &str) -> Option<&mesh::Workload> {
        self.view.workload_of(&format!("uid-{name}").as_str().into()).map(|workload| &**workload)
    }
}
