//! A node with two pods, `a/client` and `b/server`, whose network is the loopback device: without capture, a test hands
//! accepted connections to the data path itself and says what they were dialled to.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Intermediate, Root, WorkloadToCertify};
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle, TrustDomain};
use ipnet::IpNet;
use mesh::{Canonical, MeshSettings, Mode, Modes, PodUid, Resource, Speaks, Uncaptured, Workload, WorkloadUid};
use rustls::ClientConfig;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use wire::pods::{SocketKind, ToAgent};
use wire::tunnel::Claim;

use crate::clock::Clock;
use crate::connections::{Connection, Direction};
use crate::node::Node;
use crate::pod::Pod;
use crate::reasons::EndedEarly;
use crate::shares::Payer;
use crate::stash::Stash;
use crate::tunnel::{self, Tunnel};
use crate::{inbound, legs, outbound, redirect};

/// The address of the pod `a/client`.
pub(crate) const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 77, 0, 1));
/// The address of the pod `b/server`.
pub(super) const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 77, 0, 2));

/// Longer than anything takes that a test waits for.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Runs a test on a core's kind of runtime.
pub(crate) fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()).unwrap();
    runtime.block_on(async { tokio::time::timeout(LONG * 3, test).await.expect("the test hangs") });
}

/// Who certifies.
pub(super) struct Authority {
    intermediate: Intermediate,
    pub(super) bundle: TrustBundle,
}

impl Authority {
    pub(super) fn new(clock: &Clock) -> Self {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let root = Root::generate(&domain, clock.wall(), Duration::from_secs(1 << 20)).unwrap();
        let intermediate = root.issue_intermediate(clock.wall(), Duration::from_secs(1 << 19)).unwrap();
        Self { intermediate, bundle: root.bundle().unwrap() }
    }

    pub(super) fn chain(
        &self,
        id: &SpiffeId,
        request: &CertificateRequest,
        clock: &Clock,
        life: Duration,
    ) -> identity::chain::Chain {
        let key = PublicKeyOfRequest::from_pem(request.as_pem()).unwrap();
        self.intermediate.sign(&WorkloadToCertify::assertion(id.clone()), &key, clock.wall(), life).unwrap()
    }

    pub(super) fn svid(&self, id: &SpiffeId, clock: &Clock) -> Svid {
        let key = PrivateKey::generate().unwrap();
        let request = CertificateRequest::new(&key).unwrap();
        let chain = self.chain(id, &request, clock, Duration::from_secs(3600));
        Svid::assemble(key, chain, &self.bundle, id, clock.wall()).unwrap()
    }
}

/// The node, its pods, and what plays the agent.
pub(super) struct World {
    pub(super) node: Arc<Node>,
    pub(super) authority: Authority,
    pub(super) client: Arc<Pod>,
    pub(super) server: Arc<Pod>,
}

/// An identity in the test's trust domain.
pub(crate) fn id(text: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/{text}").parse().unwrap()
}

/// A workload that is captured and permissive.
pub(crate) fn workload(name: &str, identity: &SpiffeId, address: IpAddr) -> Workload {
    Workload {
        uid: WorkloadUid::from(name),
        pod_uid: PodUid::from(name),
        name: name.into(),
        canonical: Canonical::of(name),
        namespace: identity.namespace().into(),
        identity: identity.clone(),
        addresses: vec![address],
        node: "node".into(),
        speaks: Speaks::JustMtls,
        uncaptured: None,
        modes: Modes::default(),
        endpoints: Vec::new(),
        network_rules: 0,
        policies: Vec::new(),
    }
}

impl World {
    /// Two captured pods that know each other, with certificates.
    pub(super) fn new() -> Self {
        let clock = Clock::default();
        let node = Arc::new(Node::new(clock.clone(), 1 << 16));
        let authority = Authority::new(&clock);
        node.certificates.set_bundle(authority.bundle.clone());
        let inside: Vec<IpNet> = vec!["127.77.0.0/16".parse().unwrap()];
        node.view.change(|view| view.apply(Resource::Settings(MeshSettings { inside, ..MeshSettings::default() })));
        let client = pod("client", &id("a/sa/client"), CLIENT);
        let server = pod("server", &id("b/sa/server"), SERVER);
        let world = Self { node, authority, client, server };
        for pod in [&world.client, &world.server] {
            world.certify(&pod.identity);
            world.apply(workload(pod.uid.as_str(), &pod.identity, pod.addresses[0]));
        }
        world
    }

    /// Issues and installs a certificate.
    pub(super) fn certify(&self, id: &SpiffeId) {
        self.node.certificates.install(self.authority.svid(id, &self.node.clock));
    }

    /// Puts a workload into the view.
    pub(super) fn apply(&self, workload: Workload) {
        self.node.view.change(|view| view.apply(Resource::Workload(Box::new(workload))));
    }

    /// The client as a pod that has nothing to do with the mesh.
    pub(super) fn opt_out_client(&self) {
        self.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("client".into())));
        let mut client = workload("client", &self.client.identity, CLIENT);
        (client.speaks, client.uncaptured) = (Speaks::Nothing, Some(Uncaptured::OptedOut));
        self.apply(client);
    }

    /// The mode of all ports of the server.
    pub(super) fn set_mode(&self, mode: Mode) {
        let mut server = workload("server", &self.server.identity, SERVER);
        server.modes.default = mode;
        self.apply(server);
    }

    /// Serves a captured connection that the client made.
    pub(super) fn serve_outbound(&self, stream: TcpStream, source: SocketAddr, dialled: SocketAddr) -> Served {
        self.serve(&self.client, Direction::Outbound, stream, source, dialled)
    }

    /// Serves a captured connection to the server.
    pub(super) fn serve_inbound(&self, stream: TcpStream, source: SocketAddr, dialled: SocketAddr) -> Served {
        self.serve(&self.server, Direction::Inbound, stream, source, dialled)
    }

    fn serve(
        &self,
        pod: &Arc<Pod>,
        direction: Direction,
        stream: TcpStream,
        source: SocketAddr,
        dialled: SocketAddr,
    ) -> Served {
        let connection = self.node.connections.open(&self.node.clock, pod, direction, source);
        connection.set_destination(dialled);
        let (node, pod, same) = (self.node.clone(), pod.clone(), connection.clone());
        let end = tokio::task::spawn_local(async move {
            let stream = stream.into_std().unwrap();
            as_made_by_an_agent(&stream);
            let stream = legs::captured(stream).unwrap();
            let life = async {
                match direction {
                    Direction::Outbound => outbound::serve(&node, &pod, &same, stream).await.map(|()| None),
                    Direction::Inbound => inbound::serve(&node, &pod, &same, stream).await,
                }
            };
            redirect::to_its_end(&node, &same, life).await
        });
        Served { connection, end }
    }

    /// Serves a connection to the server that came through a tunnel at rest.
    pub(super) fn serve_lease(&self, tunnel: Box<Tunnel>, claim: Claim, dialled: SocketAddr) -> Served {
        let source = SocketAddr::new(CLIENT, 1);
        let connection = self.node.connections.open(&self.node.clock, &self.server, Direction::Inbound, source);
        connection.set_destination(dialled);
        let (node, pod, same) = (self.node.clone(), self.server.clone(), connection.clone());
        let end = tokio::task::spawn_local(async move {
            let life = inbound::lease(&node, &pod, &same, tunnel, claim);
            redirect::to_its_end(&node, &same, life).await.map(Some)
        });
        Served { connection, end }
    }

    /// What the data path does with a connection to the wire, for the client's pod.
    pub(super) async fn handshake(
        &self,
        stream: TcpStream,
        config: Arc<ClientConfig>,
    ) -> Result<Box<Tunnel>, EndedEarly> {
        tunnel::dial(stream, config, (&self.node.offload, Payer::Pod(self.client.uid.clone()))).await
    }

    /// A program in the client's pod that connects, captured there; the outbound side is served.
    pub(super) async fn dial(&self, to: SocketAddr) -> (TcpStream, Served) {
        let capture = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (program, accepted) = tokio::join!(connect(CLIENT, capture.local_addr().unwrap()), capture.accept());
        let (stream, source) = accepted.unwrap();
        (program, self.serve_outbound(stream, source, to))
    }

    /// A whole path: a program in the client's pod connected to one in the server's, through both sides.
    pub(super) async fn path(&self) -> Path {
        let captured = Capture::new().await;
        let (client, outbound) = self.dial(captured.address).await;
        let (server, inbound) = captured.accept_all(self).await;
        Path { client, server, outbound, inbound }
    }
}

/// The server pod's inbound capture, for one connection. Without rules, capture and application have the same address
/// and port, one after the other.
pub(super) struct Capture {
    pub(super) address: SocketAddr,
    listener: TcpListener,
}

impl Capture {
    pub(super) async fn new() -> Self {
        Self::at(SocketAddr::new(SERVER, 0))
    }

    pub(super) fn at(address: SocketAddr) -> Self {
        let listener = listen(address);
        Self { address: listener.local_addr().unwrap(), listener }
    }

    /// Takes one connection, serves it, and lets the application accept what comes of it.
    pub(super) async fn accept_all(self, world: &World) -> (TcpStream, Served) {
        let (inbound, application) = self.accept(world).await;
        let (server, _) = application.accept().await.unwrap();
        (server, inbound)
    }

    /// Takes one connection and serves it; gives the application's listener.
    pub(super) async fn accept(self, world: &World) -> (Served, TcpListener) {
        let (stream, source) = self.listener.accept().await.unwrap();
        drop(self.listener);
        let application = listen(self.address);
        (world.serve_inbound(stream, source, self.address), application)
    }

    /// Takes one connection and serves it; nothing listens behind it.
    pub(super) async fn accept_for_nobody(self, world: &World) -> Served {
        let (stream, source) = self.listener.accept().await.unwrap();
        drop(self.listener);
        world.serve_inbound(stream, source, self.address)
    }
}

/// Two programs and the two sides of the data path between them.
pub(super) struct Path {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
    pub(super) outbound: Served,
    pub(super) inbound: Served,
}

/// A connection in the data path's hands.
pub(super) struct Served {
    pub(super) connection: Arc<Connection>,
    end: JoinHandle<Result<Option<Box<Tunnel>>, EndedEarly>>,
}

impl Served {
    /// How it ends.
    pub(super) async fn end(self) -> Result<(), EndedEarly> {
        self.end_and_tunnel().await.map(|_| ())
    }

    /// The same, with the tunnel that is left for another connection.
    pub(super) async fn end_and_tunnel(self) -> Result<Option<Box<Tunnel>>, EndedEarly> {
        tokio::time::timeout(LONG, self.end).await.expect("the connection does not end").unwrap()
    }

    /// Ends it as the death of the process would.
    pub(super) fn kill(self) {
        self.end.abort();
    }
}

/// Connects from an address.
pub(super) async fn connect(from: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from, 0)).unwrap();
    socket.connect(to).await.unwrap()
}

fn listen(address: SocketAddr) -> TcpListener {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket.listen(16).unwrap()
}

/// A pod whose agent makes ordinary sockets, at once.
fn pod(name: &str, identity: &SpiffeId, address: IpAddr) -> Arc<Pod> {
    let uid = PodUid::from(name);
    let (ask, mut asked) = mpsc::unbounded_channel();
    let full_name = format!("{}/{name}", identity.namespace()).into();
    let pod = Arc::new(Pod::new(uid.clone(), full_name, identity.clone(), vec![address], Stash::new(uid, ask)));
    let agent = Arc::downgrade(&pod);
    tokio::task::spawn_local(async move {
        while let (Some(ToAgent::WantSockets { kind, count, .. }), Some(pod)) = (asked.recv().await, agent.upgrade()) {
            let make = |_| {
                let socket = Socket::new(domain(kind), Type::STREAM.nonblocking(), Some(Protocol::TCP)).unwrap();
                as_made_by_an_agent(&socket);
                socket
            };
            pod.stash.put(kind, (0..count).map(make).collect());
        }
    });
    pod
}

/// What a socket has from the agent, or from a listener of the agent's.
fn as_made_by_an_agent(socket: &impl AsFd) {
    linux::sockets::reset_on_close(socket, true).unwrap();
    SockRef::from(socket).set_tcp_nodelay(true).unwrap();
}

fn domain(kind: SocketKind) -> Domain {
    match kind {
        SocketKind::OuterV4 | SocketKind::InnerV4 => Domain::IPV4,
        SocketKind::OuterV6 | SocketKind::InnerV6 => Domain::IPV6,
    }
}
