//! What is shown of connections: numbers and the access log, held against what the programs sent.

use std::io::{BufRead, BufReader, PipeReader, Read};
use std::time::Duration;

use mesh::{Canonical, Resource};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::world::{CLIENT, Path, SERVER, World, id, run, workload};
use crate::access_log::AccessLog;
use crate::connections::Direction;
use crate::metrics::Now;

/// What Prometheus would read now.
fn text(world: &World) -> String {
    world.node.metrics.text(&Now {
        time: world.node.clock.monotonic(),
        connections: &world.node.connections.all(),
        view: world.node.view.version(),
        svids: &world.node.certificates.all(),
        stash: [1, 2, 3, 4],
    })
}

/// The value of the only series that has this name and all these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> u64 {
    let of_name = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    let found: Vec<_> = of_name.filter(|line| labels.iter().all(|label| line.contains(label))).collect();
    let [line] = found[..] else { panic!("{name} {labels:?}: {found:?} in {text}") };
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Sends so much each way.
async fn exchange(path: &mut Path, from_client: usize, to_client: usize) {
    path.client.write_all(&vec![1; from_client]).await.unwrap();
    path.server.read_exact(&mut vec![0; from_client]).await.unwrap();
    path.server.write_all(&vec![2; to_client]).await.unwrap();
    path.client.read_exact(&mut vec![0; to_client]).await.unwrap();
}

async fn end(path: Path) {
    let Path { client, server, outbound, inbound } = path;
    drop((client, server));
    assert_eq!((outbound.end().await, inbound.end().await), (Ok(()), Ok(())));
}

/// A world in which a Deployment `web` of version 2 serves the pod's address.
fn named() -> World {
    let world = World::new();
    let mut server = workload("server", &world.server.identity, SERVER);
    server.canonical = Canonical { workload: "web".into(), service: "shop".into(), revision: "2".into() };
    world.apply(server);
    world
}

#[test]
fn both_sides_count_the_same_bytes_while_a_connection_lives_and_each_byte_once() {
    run(async {
        let world = named();
        let mut path = world.path().await;
        exchange(&mut path, 1000, 70_000).await;
        for reporter in ["source", "destination"] {
            let labels = [
                &*format!("reporter=\"{reporter}\""),
                "source_workload=\"client\"",
                "source_workload_namespace=\"a\"",
                "source_principal=\"spiffe://cluster.local/ns/a/sa/client\"",
                "destination_workload=\"web\"",
                "destination_canonical_service=\"shop\"",
                "destination_version=\"2\"",
                "destination_principal=\"spiffe://cluster.local/ns/b/sa/server\"",
                "connection_security_policy=\"mutual_tls\"",
            ];
            let of = |name: &str| value(&text(&world), name, &labels);
            assert_eq!(of("istio_tcp_received_bytes_total"), 1000, "{reporter}, while it lives");
            assert_eq!(of("istio_tcp_sent_bytes_total"), 70_000, "{reporter}");
            assert_eq!((of("istio_tcp_connections_opened_total"), of("istio_tcp_connections_closed_total")), (1, 0));
        }
        exchange(&mut path, 5, 6).await;
        end(path).await;
        let shown = text(&world);
        for reporter in ["reporter=\"source\"", "reporter=\"destination\""] {
            assert_eq!(value(&shown, "istio_tcp_received_bytes_total", &[reporter]), 1005, "after its end");
            assert_eq!(value(&shown, "istio_tcp_sent_bytes_total", &[reporter]), 70_006);
            assert_eq!(value(&shown, "istio_tcp_connections_closed_total", &[reporter]), 1);
        }
        for direction in ["direction=\"outbound\"", "direction=\"inbound\""] {
            let of = |name, label| value(&shown, name, &[direction, label]);
            assert_eq!(of("justmtls_proxy_sent_bytes_total", "security=\"mtls\""), 70_006);
            assert_eq!(of("justmtls_proxy_handshakes_total", "outcome=\"ok\""), 1);
            assert_eq!(of("justmtls_proxy_handshake_seconds_count", ""), 1);
        }
        assert_eq!(value(&shown, "justmtls_proxy_stash_sockets", &["kind=\"inner-v6\""]), 4);
        let expiry = ["identity=\"spiffe://cluster.local/ns/a/sa/client\""];
        assert!(
            value(&shown, "justmtls_proxy_certificate_not_after_seconds", &expiry) > world.node.clock.wall().as_secs()
        );
    });
}

#[test]
fn plaintext_has_no_principals_and_its_reason() {
    run(async {
        let world = named();
        world.opt_out_client();
        let capture = super::world::Capture::new().await;
        let mut client = super::world::connect(CLIENT, capture.address).await;
        client.write_all(b"hello in clear").await.unwrap();
        let (mut server, inbound) = capture.accept_all(&world).await;
        server.read_exact(&mut [0; 14]).await.unwrap();
        drop((client, server));
        assert_eq!(inbound.end().await, Ok(()));
        let shown = text(&world);
        let labels = [
            "connection_security_policy=\"unknown\"",
            "source_workload=\"client\"",
            "source_principal=\"unknown\"",
            "destination_principal=\"unknown\"",
        ];
        assert_eq!(value(&shown, "istio_tcp_received_bytes_total", &labels), 14);
        let ours = ["direction=\"inbound\"", "security=\"plaintext\"", "reason=\"opted-out\""];
        assert_eq!(value(&shown, "justmtls_proxy_connections_opened_total", &ours), 1);
    });
}

#[test]
fn a_service_that_the_client_dialled_is_named_by_both_sides() {
    run(async {
        let world = World::new();
        let capture = super::world::Capture::new().await;
        let name: mesh::ServiceName = "b/web.b.svc.cluster.local".parse().unwrap();
        let address = "10.96.0.1".parse().unwrap();
        let ports = vec![mesh::ServicePort { port: 80 }];
        let service = mesh::Service {
            name: name.clone(),
            addresses: vec![address],
            ports,
            affinity: Default::default(),
            reach: Default::default(),
        };
        world.node.view.change(|view| view.apply(Resource::Service(service)));
        let mut server = workload("server", &id("b/sa/server"), SERVER);
        let port = mesh::EndpointPort { service_port: 80, target_port: capture.address.port() };
        server.endpoints = vec![mesh::Endpoint { service: name, ports: vec![port] }];
        world.apply(server);

        let (mut client, outbound) = world.dial((address, 80).into()).await;
        let (mut server, inbound) = capture.accept_all(&world).await;
        client.write_all(b"hi").await.unwrap();
        server.read_exact(&mut [0; 2]).await.unwrap();
        end(Path { client, server, outbound, inbound }).await;
        let labels = |reporter| {
            [
                reporter,
                "destination_service=\"web.b.svc.cluster.local\"",
                "destination_service_name=\"web\"",
                "destination_service_namespace=\"b\"",
            ]
        };
        for reporter in ["reporter=\"source\"", "reporter=\"destination\""] {
            assert_eq!(value(&text(&world), "istio_tcp_received_bytes_total", &labels(reporter)), 2);
        }
    });
}

/// A world with an access log that goes to a pipe.
fn logged() -> (World, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut world = World::new();
    let node = std::sync::Arc::get_mut(&mut world.node).expect("nobody else has it yet");
    node.access_log = AccessLog::start(writer, node.metrics.log_dropped.clone()).unwrap();
    (world, reader)
}

#[test]
fn each_connection_has_one_line_on_each_side_that_says_who_how_and_how_much() {
    run(async {
        let (world, reader) = logged();
        let mut path = world.path().await;
        exchange(&mut path, 10, 20).await;
        end(path).await;
        // The twin: one that is refused has its line, too.
        let (client, outbound) = world.dial("127.77.0.99:1".parse().unwrap()).await;
        assert!(outbound.end().await.is_err());
        drop(client);
        let mut lines =
            BufReader::new(reader).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let mut both = [lines.next().unwrap(), lines.next().unwrap()];
        both.sort_by_key(|line| line["direction"].as_str().map(str::to_owned));
        let [inbound, outbound] = both;
        for line in [&inbound, &outbound] {
            assert_eq!((&line["sent"], &line["received"]), (&10.into(), &20.into()), "{line}");
            for (field, expected) in [
                ("security", "mtls"),
                ("tls", "TLSv1_3"),
                ("group", "X25519MLKEM768"),
                ("outcome", "orderly"),
                ("level", "INFO"),
            ] {
                assert_eq!(line[field], expected, "{field} of {line}");
            }
            assert!(line["duration_ms"].is_u64() && line["source"].as_str().unwrap().starts_with("127."));
        }
        assert_eq!((&outbound["direction"], &inbound["direction"]), (&"outbound".into(), &"inbound".into()));
        assert_eq!((&outbound["pod"], &outbound["other"]), (&"a/client".into(), &"b/server".into()));
        assert_eq!(outbound["identity"], inbound["peer"]);
        assert_eq!(outbound["peer"], "spiffe://cluster.local/ns/b/sa/server");
        let refused = lines.next().unwrap();
        assert_eq!((&refused["outcome"], &refused["security"]), (&"unknown-destination".into(), &"none".into()));
        assert_eq!(refused["fault"], "environment");
    });
}

#[test]
fn a_reader_of_the_access_log_that_never_reads_holds_up_nobody_and_its_losses_are_counted() {
    run(async {
        let (world, mut reader) = logged();
        let mut path = world.path().await;
        exchange(&mut path, 1, 1).await;
        let said = 20_000;
        let started = std::time::Instant::now();
        for _ in 0..said {
            // Never blocks: this thread is the data path's.
            world.node.access_log.ended(&path.inbound.connection, Ok(()), None, world.node.clock.wall());
        }
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2), "{said} lines took {took:?}");
        let dropped = world.node.metrics.log_dropped.get();
        assert!(dropped > 0, "a pipe and a queue cannot hold {said} lines");
        // The connection goes on.
        exchange(&mut path, 100_000, 100_000).await;
        assert!(text(&world).contains(&format!("justmtls_access_log_dropped_total {dropped}")));
        // Nothing was lost but what was counted.
        drop(path);
        let World { node, .. } = world;
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text.lines().filter(|line| line.contains("\"sent\":1,")).count() as u64
        });
        node.access_log.flush(Duration::from_secs(10));
        while std::sync::Arc::strong_count(&node) > 1 {
            tokio::task::yield_now().await;
        }
        drop(node);
        assert_eq!(read.join().unwrap() + dropped, said);
    });
}

#[test]
fn handshakes_that_fail_are_counted_by_reason_and_not_timed() {
    run(async {
        let world = World::new();
        let failing = async { Err::<(), _>(crate::reasons::EndedEarly::HandshakeTimeout) };
        world.node.metrics.handshake(Direction::Inbound, failing).await.unwrap_err();
        let shown = text(&world);
        let labels = ["direction=\"inbound\"", "outcome=\"handshake-timeout\""];
        assert_eq!(value(&shown, "justmtls_proxy_handshakes_total", &labels), 1);
        assert!(!shown.contains("justmtls_proxy_handshake_seconds_count"), "{shown}");
    });
}
