//! Probes over real sockets, to a port that takes no plaintext: what was declared passes, and everything else is refused by
//! name.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh::{Action, Check, HttpProbe, Mode, PlaintextReason, Policy, Probe, Probes, RefuseReason, Resource};
use rustls::time_provider::DefaultTimeProvider;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use wire::pods::Ends;

use super::whole_path::deny_client;
use super::world::{Authority, CLIENT, Capture, LONG, SERVER, Served, World, connect, run, workload};
use crate::clock::Clock;
use crate::connections::Security;
use crate::judge::{judge, refused_from_before};
use crate::pod::Declared;
use crate::reasons::EndedEarly;

const NOT_THE_PROBE: Result<(), EndedEarly> = Err(EndedEarly::Refused(RefuseReason::NotTheProbe));

fn http() -> Check {
    Check::Http(HttpProbe::new("/live", None, []).unwrap())
}

/// A world in which the client's address is the node's, as the server's pod sees it, and plaintext is refused.
fn strict() -> World {
    let world = World::new();
    world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("client".into())));
    world.set_mode(Mode::Strict);
    world
}

/// A connection to a port with a probe; what plays the application accepts later, if it ever may.
async fn begin(
    world: &World,
    check: Check,
    gateway: IpAddr,
    first: impl AsRef<[u8]>,
) -> (TcpStream, Served, TcpListener) {
    let capture = Capture::new().await;
    let port = capture.address.port();
    let probes = Probes::new([Probe { port, check }]).unwrap();
    world.server.declare(Declared { probes, gateways: vec![gateway] });
    let mut client = connect(CLIENT, capture.address).await;
    let first = match str::from_utf8(first.as_ref()) {
        Ok(text) => text.replace("HOST", &format!("{SERVER}:{port}")).into_bytes(),
        Err(_) => first.as_ref().to_owned(),
    };
    client.write_all(&first).await.unwrap();
    let (served, application) = capture.accept(world).await;
    (client, served, application)
}

const GET: &str = "GET /live HTTP/1.1\r\nHost: HOST\r\nUser-Agent: kube-probe/1.33\r\nConnection: close\r\n\r\n";

async fn is_reset(stream: &mut TcpStream) -> bool {
    let read = timeout(LONG, stream.read_to_end(&mut Vec::new())).await.expect("nothing happens");
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

/// Nothing has reached the application: it has no connection.
async fn untouched(application: TcpListener) -> bool {
    timeout(Duration::from_millis(50), application.accept()).await.is_err()
}

async fn head(server: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(LONG, server.read_u8()).await.expect("no request").unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn edge_exposes(world: &World) -> Vec<(&'static str, Option<String>)> {
    let edges = world.node.coverage.all().into_iter();
    edges.map(|(edge, _)| (edge.reason, edge.exposes.map(|it| it.to_string()))).collect()
}

#[test]
fn the_declared_request_is_answered_and_shown_with_what_it_exposes() {
    run(async {
        let world = strict();
        let (mut client, served, application) = begin(&world, http(), CLIENT, GET).await;
        let (mut server, peer) = application.accept().await.unwrap();
        assert_eq!(peer.ip(), CLIENT, "the application sees its true client");
        let head = head(&mut server).await;
        assert!(head.starts_with("GET /live HTTP/1.1\r\nHost: ") && head.contains("User-Agent: kube-probe/1.33\r\n"));
        assert!(head.ends_with("Connection: close\r\n\r\n"), "{head}");
        server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
        let security = served.connection.decision().unwrap().security.clone();
        assert!(matches!(security, Security::Plaintext(PlaintextReason::Probe)));
        drop(client);
        assert_eq!(served.end().await, Ok(()));
        assert_eq!(edge_exposes(&world), [("probe", Some("GET /live".to_owned()))]);
    });
}

#[test]
fn a_head_may_come_in_pieces() {
    run(async {
        let world = strict();
        let (mut client, served, application) = begin(&world, http(), CLIENT, "GET /li").await;
        let rest = format!("ve HTTP/1.1\r\nHost: {}\r\n\r\n", application.local_addr().unwrap());
        for byte in rest.as_bytes() {
            client.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        head(&mut server).await;
        drop((client, server));
        assert!(served.end().await.is_ok());
    });
}

#[test]
fn what_is_not_the_declared_request_reaches_nobody() {
    run(async {
        let world = strict();
        let requests = [
            GET.replace("/live", "/admin"),
            GET.replace("/live", "/live?more"),
            GET.replace("GET", "POST"),
            GET.replace("HOST", "other.example"),
            GET.replace("Connection: close", "Connection: Upgrade\r\nUpgrade: websocket"),
            GET.replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello"),
            GET.replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"),
            GET.replace("\r\n\r\n", "\r\nAuthorization: Bearer x\r\n\r\n"),
            GET.repeat(2),
            "nonsense\r\n\r\n".to_owned(),
            "\u{16}\u{3}\u{1}\0\u{5}\u{2}".to_owned(),
            String::from_utf8(vec![b'x'; 100]).unwrap(),
            format!("GET /live HTTP/1.1\r\nHost: HOST\r\nX: {}", "x".repeat(9000)),
        ];
        for request in requests {
            let (mut client, served, application) = begin(&world, http(), CLIENT, &request).await;
            assert!(is_reset(&mut client).await, "{request}");
            assert_eq!(served.end().await, NOT_THE_PROBE, "{request}");
            assert!(untouched(application).await, "{request}");
        }
    });
}

#[test]
fn whoever_is_not_the_node_is_refused_as_ever() {
    run(async {
        let world = strict();
        let elsewhere = "127.77.0.9".parse().unwrap();
        let (mut client, served, application) = begin(&world, http(), elsewhere, GET).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, Err(RefuseReason::Strict.into()));
        assert!(untouched(application).await);
        // A pod that has the address, whatever the route says.
        world.apply(workload("client", &world.client.identity, CLIENT));
        let (mut client, served, application) = begin(&world, http(), CLIENT, GET).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, Err(RefuseReason::StrictBypass.into()));
        assert!(untouched(application).await);
    });
}

#[test]
fn what_follows_the_request_ends_it_before_it_reaches_the_application() {
    run(async {
        let world = strict();
        let (mut client, served, application) = begin(&world, http(), CLIENT, GET).await;
        let (mut server, _) = application.accept().await.unwrap();
        head(&mut server).await;
        server.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").await.unwrap();
        client.write_all(b"smuggled").await.unwrap();
        assert_eq!(served.end().await, NOT_THE_PROBE);
        let mut got = Vec::new();
        assert!(server.read_to_end(&mut got).await.is_err() && got.is_empty(), "{got:?}");
        assert!(is_reset(&mut client).await);
    });
}

#[test]
fn a_head_that_does_not_come_to_its_end_is_refused_in_time() {
    run(async {
        let world = strict();
        let started = Instant::now();
        let (mut client, served, _application) = begin(&world, http(), CLIENT, "GET /live HTTP/1.1\r\nHost").await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, NOT_THE_PROBE);
        let took = started.elapsed();
        assert!(took >= Duration::from_secs(2) && took < LONG, "{took:?}");
        // One that ends in the middle is not waited for.
        let (client, served, _application) = begin(&world, http(), CLIENT, "GET /live HT").await;
        let started = Instant::now();
        drop(client);
        assert_eq!(served.end().await, NOT_THE_PROBE);
        assert!(started.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn a_tcp_probe_connects_and_says_nothing() {
    run(async {
        let world = strict();
        let (client, served, application) = begin(&world, Check::Tcp, CLIENT, "").await;
        drop(client);
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(served.end().await, Ok(()));
        assert_eq!(edge_exposes(&world), [("probe", Some("a connection without a byte".to_owned()))]);
        for said in [GET, "x", "\u{16}"] {
            let (mut client, served, application) = begin(&world, Check::Tcp, CLIENT, said).await;
            client.shutdown().await.unwrap();
            assert!(is_reset(&mut client).await);
            assert_eq!(served.end().await, NOT_THE_PROBE, "{said}");
            assert!(untouched(application).await);
        }
        // One that stays and says nothing is no probe, and no tunnel.
        let (mut client, served, application) = begin(&world, Check::Tcp, CLIENT, "").await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, Err(RefuseReason::HelloTimeout.into()));
        assert!(untouched(application).await);
    });
}

/// A hello of a program's own, and HTTP/2 without TLS: both begin so, and go on as nobody here can tell.
fn hello(server: &str) -> Vec<u8> {
    let roots = Authority::new(&Clock::default()).bundle.to_pem();
    let mut config = (*identity::tls::api_client_config(&roots, Arc::new(DefaultTimeProvider)).unwrap()).clone();
    config.enable_sni = true;
    let mut client = rustls::ClientConnection::new(config.into(), server.to_owned().try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[test]
fn what_cannot_be_looked_into_passes_in_few_bytes_each_way() {
    run(async {
        let world = strict();
        for (check, first) in [(Check::Https, hello("10.0.0.1")), (Check::Grpc, PREFACE.to_owned())] {
            let (mut client, served, application) = begin(&world, check.clone(), CLIENT, &first).await;
            let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
            let mut got = vec![0; first.len()];
            server.read_exact(&mut got).await.unwrap();
            assert_eq!(got, first);
            server.write_all(b"answer").await.unwrap();
            client.read_exact(&mut [0; 6]).await.unwrap();
            drop((client, server));
            assert_eq!(served.end().await, Ok(()));

            for client_says_more in [true, false] {
                let (mut client, served, application) = begin(&world, check.clone(), CLIENT, &first).await;
                let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
                let (talker, listener) =
                    if client_says_more { (&mut client, &mut server) } else { (&mut server, &mut client) };
                let (mut got, more) = (Vec::new(), vec![7; 80 * 1024]);
                let (_, read) = tokio::join!(talker.write_all(&more), listener.read_to_end(&mut got));
                assert!(read.is_err() && got.len() <= 64 * 1024, "{} bytes passed", got.len());
                assert_eq!(served.end().await, NOT_THE_PROBE);
            }
        }
    });
}

#[test]
fn policies_do_not_touch_probes_and_permissive_calls_the_node_by_its_name() {
    run(async {
        let world = strict();
        world.set_mode(Mode::Permissive);
        let (client, served, application) = begin(&world, http(), CLIENT, "GET /anything").await;
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        server.read_exact(&mut [0; 13]).await.unwrap();
        let security = served.connection.decision().unwrap().security.clone();
        assert!(matches!(security, Security::Plaintext(PlaintextReason::Node)), "{security:?}");
        drop((client, server));
        assert!(served.end().await.is_ok());
        assert_eq!(edge_exposes(&world), [("node", None)], "strict would refuse it");

        // What strict would let through is called so; all that is allowed is still allowed.
        let (client, served, application) = begin(&world, http(), CLIENT, GET).await;
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        assert!(!head(&mut server).await.contains("Accept"), "its own words");
        assert!(matches!(served.connection.decision().unwrap().security, Security::Plaintext(PlaintextReason::Node)));
        drop((client, server));
        assert!(served.end().await.is_ok());
        assert!(edge_exposes(&world).contains(&("probe", Some("GET /live".to_owned()))));

        let name = mesh::PolicyName { namespace: "b".into(), name: "nobody".into() };
        let nobody =
            mesh::Policy { name, scope: mesh::Scope::Namespace, action: mesh::Action::Allow, rules: Vec::new() };
        world.node.view.change(|view| view.apply(mesh::Resource::Policy(nobody)));
        let (client, served, application) = begin(&world, http(), CLIENT, GET).await;
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        head(&mut server).await;
        drop((client, server));
        assert!(served.end().await.is_ok());
        let (mut client, served, _application) = begin(&world, http(), CLIENT, "GET /anything HTTP/1.1\r\n\r\n").await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, NOT_THE_PROBE);
    });
}

#[test]
fn an_open_probe_ends_when_its_client_turns_out_to_be_a_pod() {
    run(async {
        let world = strict();
        let (mut client, served, application) = begin(&world, http(), CLIENT, GET).await;
        let (mut server, _) = application.accept().await.unwrap();
        head(&mut server).await;
        judge(&world.node);
        assert!(served.connection.decision().is_some());
        world.apply(workload("new", &world.client.identity, CLIENT));
        judge(&world.node);
        assert_eq!(served.end().await, Err(RefuseReason::Strict.into()));
        assert!(is_reset(&mut client).await);
    });
}

/// A world in which the client's address is an API server's, and plaintext is refused.
fn api_server() -> World {
    let world = strict();
    let api_servers = vec![CLIENT.into()];
    let settings = mesh::MeshSettings { api_servers, ..mesh::MeshSettings::default() };
    world.node.view.change(|view| view.apply(mesh::Resource::Settings(settings)));
    world
}

const ELSEWHERE: &str = "127.77.0.9";

fn hook() -> Check {
    Check::ApiServer(Some("hook.shop.svc".to_owned()))
}

#[test]
fn the_api_server_calls_by_name_for_as_long_as_it_likes_and_is_shown_as_such() {
    run(async {
        let world = api_server();
        for (check, server, exposed) in
            [(hook(), "hook.shop.svc", "TLS to hook.shop.svc"), (Check::ApiServer(None), "10.0.0.1", "TLS to no name")]
        {
            let first = hello(server);
            let (mut client, served, application) = begin(&world, check, ELSEWHERE.parse().unwrap(), &first).await;
            let (mut server, peer) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
            assert_eq!(peer.ip(), CLIENT, "the application sees its true client");
            let mut got = vec![0; first.len()];
            server.read_exact(&mut got).await.unwrap();
            assert_eq!(got, first);
            // More than a probe may carry, both ways.
            let much = vec![7; 300 * 1024];
            let mut got = vec![0; much.len()];
            let (written, read) = tokio::join!(client.write_all(&much), server.read_exact(&mut got));
            assert!(written.is_ok() && read.is_ok());
            let (written, read) = tokio::join!(server.write_all(&much), client.read_exact(&mut got));
            assert!(written.is_ok() && read.is_ok());
            let security = served.connection.decision().unwrap().security.clone();
            assert!(matches!(security, Security::Plaintext(PlaintextReason::ApiServer)));
            drop((client, server));
            assert!(served.end().await.is_ok());
            assert!(edge_exposes(&world).contains(&("api-server", Some(exposed.to_owned()))));
        }
    });
}

#[test]
fn what_else_comes_from_an_api_servers_address_reaches_nobody() {
    run(async {
        let world = api_server();
        let half = hello("hook.shop.svc")[..100].to_owned();
        for first in [hello("other.shop.svc"), hello("10.0.0.1"), GET.into(), PREFACE.to_owned(), half] {
            let (mut client, served, application) = begin(&world, hook(), ELSEWHERE.parse().unwrap(), &first).await;
            client.shutdown().await.unwrap();
            assert!(is_reset(&mut client).await);
            assert_eq!(served.end().await, Err(RefuseReason::NotTheApiServer.into()), "{first:?}");
            assert!(untouched(application).await);
        }
        // The kubelet of the pod's node, which is another one, has no webhook to call.
        world.node.view.change(|view| view.apply(mesh::Resource::Settings(mesh::MeshSettings::default())));
        let (mut client, served, application) = begin(&world, hook(), CLIENT, hello("hook.shop.svc")).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(served.end().await, Err(RefuseReason::Strict.into()));
        assert!(untouched(application).await);
    });
}

#[test]
fn an_open_call_of_the_api_server_ends_when_it_is_not_declared_any_more() {
    run(async {
        let world = api_server();
        let (mut client, served, application) =
            begin(&world, hook(), ELSEWHERE.parse().unwrap(), hello("hook.shop.svc")).await;
        let (_server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        judge(&world.node);
        client.write_all(b"more").await.unwrap();
        world.server.declare(Declared::default());
        judge(&world.node);
        assert_eq!(served.end().await, Err(RefuseReason::Strict.into()));
        assert!(is_reset(&mut client).await);
    });
}

#[test]
fn a_pod_that_the_view_does_not_know_yet_is_waited_for() {
    run(async {
        let world = strict();
        world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("server".into())));
        let (client, served, application) = begin(&world, http(), CLIENT, GET).await;
        assert!(untouched(application).await, "let through without a view");
        drop(client);
        assert_eq!(served.end().await, Err(RefuseReason::NoSuchPod.into()));

        let (_client, _served, application) = begin(&world, http(), CLIENT, GET).await;
        tokio::task::yield_now().await;
        world.set_mode(Mode::Strict);
        timeout(LONG, application.accept()).await.expect("refused").unwrap();
    });
}

#[test]
fn of_what_was_open_before_capture_only_what_may_be_a_probe_goes_on_where_plaintext_is_refused() {
    run(async {
        let world = strict();
        let (probed, other) = (8080, 9090);
        let probes = Probes::new([Probe { port: probed, check: http() }]).unwrap();
        world.server.declare(Declared { probes, gateways: vec![CLIENT] });
        let stranger: IpAddr = "127.77.9.9".parse().unwrap();
        let ends = |port, peer| Ends { own: SocketAddr::new(SERVER, port), peer: SocketAddr::new(peer, 40_000) };
        let all = [ends(probed, CLIENT), ends(other, CLIENT), ends(probed, stranger)];
        world.server.set_opened_before(all.to_vec());
        let refused = || refused_from_before(&world.node, &world.server);
        assert_eq!(refused(), all[1..]);
        world.set_mode(Mode::Permissive);
        assert_eq!(refused(), []);
        // A policy that names who may come does not name who shows no identity.
        let allow = Policy { action: Action::Allow, ..deny_client() };
        world.node.view.change(|view| view.apply(Resource::Policy(allow)));
        assert_eq!(refused(), all[1..]);
        // The view may lose the pod before its node does.
        world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("server".into())));
        assert_eq!(refused(), []);
    });
}
