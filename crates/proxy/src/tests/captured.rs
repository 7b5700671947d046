//! From a listener to a core: what was not captured is refused, and pods come and go.

use std::net::TcpListener;
use std::sync::Arc;

use identity::SpiffeId;
use identity::chain::Chain;
use identity::csr::CertificateRequest;
use mesh::PodUid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use wire::pods::{Listener, PodAdded, SocketKind, ToAgent};

use super::world::{self, LONG, id, run};
use crate::admin::{self, Shown};
use crate::certs::Authority;
use crate::clock::Clock;
use crate::cores::Cores;
use crate::node::Node;
use crate::pods::Pods;

struct Works(world::Authority, Clock);

impl Authority for Works {
    async fn certify(&self, id: &SpiffeId, request: &CertificateRequest) -> Result<Chain, String> {
        Ok(self.0.chain(id, request, &self.1, std::time::Duration::from_secs(3600)))
    }
}

struct Setting {
    node: Arc<Node>,
    cores: Arc<Cores>,
    pods: Arc<Pods<Works>>,
    agent: mpsc::UnboundedReceiver<ToAgent>,
}

fn setting() -> Setting {
    let clock = Clock::default();
    let node = Arc::new(Node::new(clock.clone(), 1 << 12));
    let authority = Arc::new(Works(world::Authority::new(&clock), clock));
    node.certificates.set_bundle(authority.0.bundle.clone());
    node.view.change(|view| view.apply(mesh::Resource::Settings(mesh::MeshSettings::default())));
    let cores = Arc::new(Cores::start(2, &node).unwrap());
    let (tell, agent) = mpsc::unbounded_channel();
    let pods = Arc::new(Pods::new(node.clone(), cores.clone(), authority, tell));
    Setting { node, cores, pods, agent }
}

fn added() -> PodAdded {
    PodAdded {
        pod: PodUid::from("uid"),
        name: "web".into(),
        identity: id("shop/sa/web"),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        listeners: vec![Listener::InboundV4, Listener::OutboundV4],
        excluded_ports: Vec::new(),
        probes: mesh::Probes::default(),
        gateways: Vec::new(),
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

#[test]
fn a_pod_is_ready_when_it_is_accepted_for_and_certified_and_gone_when_it_is_removed() {
    run(async {
        let mut setting = setting();
        let (inbound, outbound) = (listener(), listener());
        let address = inbound.local_addr().unwrap();
        setting.pods.add(added(), vec![(Listener::InboundV4, inbound), (Listener::OutboundV4, outbound)]);
        let mut kinds = Vec::new();
        for _ in 0..2 {
            match setting.agent.recv().await.unwrap() {
                ToAgent::WantSockets { kind, .. } => kinds.push(kind),
                other => panic!("{other:?} before the certificate"),
            }
        }
        assert_eq!(kinds, [SocketKind::OuterV4, SocketKind::InnerV4], "of the families that the pod has");
        setting.node.certificates.server(&id("shop/sa/web")).await.unwrap();
        setting.pods.tell_ready();
        assert_eq!(setting.agent.recv().await, Some(ToAgent::PodReady { pod: PodUid::from("uid") }));
        setting.pods.tell_ready();
        assert!(setting.agent.try_recv().is_err(), "said once");

        setting.pods.remove(&PodUid::from("uid"));
        assert!(!setting.node.certificates.has(&id("shop/sa/web")));
        let mut refused = tokio::net::TcpStream::connect(address).await;
        while refused.is_ok() {
            // The acceptor's task ends at its next turn.
            tokio::task::yield_now().await;
            refused = tokio::net::TcpStream::connect(address).await;
        }
    });
}

#[test]
fn who_dials_our_listener_itself_is_reset() {
    run(async {
        let setting = setting();
        let (inbound, outbound) = (listener(), listener());
        let addresses = [inbound.local_addr().unwrap(), outbound.local_addr().unwrap()];
        setting.pods.add(added(), vec![(Listener::InboundV4, inbound), (Listener::OutboundV4, outbound)]);
        // It is accepted for when it can prove who it is.
        setting.node.certificates.server(&id("shop/sa/web")).await.unwrap();
        setting.pods.tell_ready();
        for address in addresses {
            // One that waits for the kernel alone: the reset may be here before this thread looks again.
            let read = match std::net::TcpStream::connect(address) {
                Ok(client) => {
                    client.set_nonblocking(true).unwrap();
                    let mut client = tokio::net::TcpStream::from_std(client).unwrap();
                    timeout(LONG, client.read(&mut [0; 1])).await.expect("nothing happens")
                }
                Err(early) => Err(early),
            };
            assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        }
        while !setting.node.connections.all().is_empty() {
            tokio::task::yield_now().await;
        }
        let edges = setting.node.coverage.all();
        assert!(edges.iter().all(|(edge, _)| edge.security == "none" && !edge.reason.is_empty()), "{edges:?}");
        assert_eq!(edges.iter().map(|(_, counts)| counts.connections).sum::<u64>(), 2);
    });
}

async fn get(socket: &std::path::Path, path: &str) -> String {
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn the_dumps_show_what_there_is_and_no_key() {
    run(async {
        let setting = setting();
        setting.pods.add(added(), vec![(Listener::InboundV4, listener()), (Listener::OutboundV4, listener())]);
        setting.node.certificates.server(&id("shop/sa/web")).await.unwrap();
        setting.pods.tell_ready();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("admin");
        // What an earlier process left is no obstacle.
        std::fs::write(&socket, "").unwrap();
        let config = serde_json::json!({ "node": "node-a" });
        let Setting { node, cores, pods, .. } = setting;
        admin::serve_dumps(&socket, Arc::new(Shown { node, pods, cores, config })).unwrap();

        let expected = [
            ("/connections", "[]"),
            ("/coverage", "[]"),
            ("/workloads", "\"settings\":{"),
            ("/certificates", "spiffe://cluster.local/ns/shop/sa/web"),
            ("/pods", "\"ready\":true"),
            ("/config", "node-a"),
            ("/readyz", "\"agent\":false"),
            ("/readyz", "\"without_certificate\":[]"),
            ("/nothing", "there are /certificates, /config, /connections"),
            ("/metrics", "justmtls_proxy_pods 1"),
        ];
        for (path, part) in expected {
            let answer = get(&socket, path).await;
            assert!(answer.contains(part), "{path}: {answer}");
            assert!(!answer.contains("PRIVATE"), "{path}: {answer}");
        }
    });
}
