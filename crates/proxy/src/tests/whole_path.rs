//! What an application may notice of the two sides between it and its peer: nothing.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh::{Action, Clause, Match, Policy, PolicyName, RefuseReason, Resource, Rule, Scope};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use wire::tunnel::Reason;

use super::world::{CLIENT, Capture, LONG, World, id, run, workload};
use crate::connections::Security;
use crate::judge::judge;
use crate::reasons::{EndedEarly, Side};

async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("no end").expect("no error");
    bytes
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match timeout(LONG, stream.read(&mut buffer)).await.expect("nothing happens") {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn a_client_that_ends_its_half_still_gets_its_answer() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        path.client.write_all(b"question").await.unwrap();
        path.client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut path.server).await, b"question");
        path.server.write_all(b"answer").await.unwrap();
        drop(path.server);
        assert_eq!(read_to_end(&mut path.client).await, b"answer");
        assert_eq!(path.outbound.end().await, Ok(()));
        assert_eq!(path.inbound.end().await, Ok(()));
    });
}

#[test]
fn a_server_that_ends_its_half_first_still_gets_the_rest() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        path.server.write_all(b"greeting").await.unwrap();
        path.server.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut path.client).await, b"greeting");
        path.client.write_all(b"upload").await.unwrap();
        drop(path.client);
        assert_eq!(read_to_end(&mut path.server).await, b"upload");
        assert_eq!(path.outbound.end().await, Ok(()));
        assert_eq!(path.inbound.end().await, Ok(()));
    });
}

#[test]
fn both_ends_are_proven_and_named() {
    run(async {
        let world = World::new();
        let path = world.path().await;
        let of = |served: &super::world::Served| served.connection.decision().unwrap();
        let (outbound, inbound) = (of(&path.outbound), of(&path.inbound));
        assert_eq!(outbound.security.peer(), Some(&id("b/sa/server")));
        assert_eq!(inbound.security.peer(), Some(&id("a/sa/client")));
        assert_eq!(inbound.other.as_deref(), Some("a/client"));
        let Security::Mtls(peer) = &inbound.security else { panic!("not in clear") };
        assert_eq!((peer.handshake().version(), peer.handshake().group()), ("TLSv1_3", "X25519MLKEM768"));
        assert_eq!(path.server.peer_addr().unwrap().ip(), CLIENT, "the application sees its true client");
    });
}

#[test]
fn a_reset_by_the_client_is_a_reset_for_the_server() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        path.client.write_all(b"half of it").await.unwrap();
        let mut half = [0; 10];
        path.server.read_exact(&mut half).await.unwrap();
        path.client.set_zero_linger().unwrap();
        drop(path.client);
        assert!(is_reset(&mut path.server).await);
        assert_eq!(path.outbound.end().await, Err(EndedEarly::Reset(Side::Client)));
        assert_eq!(path.inbound.end().await, Err(EndedEarly::Reset(Side::Client)));
    });
}

#[test]
fn a_reset_by_the_server_is_a_reset_for_the_client_also_after_the_client_ended_its_half() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        path.client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut path.server).await, b"");
        path.server.set_zero_linger().unwrap();
        drop(path.server);
        let started = Instant::now();
        assert!(is_reset(&mut path.client).await);
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        assert_eq!(path.outbound.end().await, Err(EndedEarly::Reset(Side::Server)));
        assert_eq!(path.inbound.end().await, Err(EndedEarly::Reset(Side::Server)));
    });
}

#[test]
fn a_reset_by_a_client_that_ended_its_half_reaches_the_server_at_once() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        path.client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut path.server).await, b"");
        let started = Instant::now();
        path.client.set_zero_linger().unwrap();
        drop(path.client);
        let error = path.server.ready(tokio::io::Interest::ERROR);
        timeout(LONG, error).await.expect("the server learns nothing").unwrap();
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        assert_eq!(path.inbound.end().await, Err(EndedEarly::Reset(Side::Client)));
    });
}

/// Bytes that differ at every offset that a mistake in copying could mix up.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn much_data_both_ways_at_once_arrives_as_it_was() {
    run(async {
        const LENGTH: usize = 48 << 20;
        let world = World::new();
        let path = world.path().await;
        let (up, down) = (pattern(LENGTH, 7), pattern(LENGTH + 12_345, 9));
        let (mut client_reads, mut client_writes) = path.client.into_split();
        let (mut server_reads, mut server_writes) = path.server.into_split();
        let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
        let all = async {
            tokio::try_join!(
                async {
                    client_writes.write_all(&up).await?;
                    client_writes.shutdown().await
                },
                async {
                    server_writes.write_all(&down).await?;
                    server_writes.shutdown().await
                },
                server_reads.read_to_end(&mut got_up),
                client_reads.read_to_end(&mut got_down),
            )
        };
        timeout(LONG * 2, all).await.expect("too slow").unwrap();
        assert!(got_up == up && got_down == down);
        let bytes = &path.inbound.connection.bytes;
        assert_eq!(bytes.sent.load(Ordering::Relaxed), up.len() as u64);
        assert_eq!(bytes.received.load(Ordering::Relaxed), down.len() as u64);
        assert_eq!(path.outbound.end().await, Ok(()));
    });
}

/// Writes until nothing more is taken, for a reader that reads nothing; says how much that was.
async fn fill(writer: &mut TcpStream) -> usize {
    const FAR_TOO_MUCH: usize = 1 << 30;
    let chunk = vec![7; 1 << 20];
    let mut written = 0;
    while written < FAR_TOO_MUCH {
        match timeout(Duration::from_millis(500), writer.write(&chunk)).await {
            Ok(length) => written += length.unwrap(),
            Err(_) => break,
        }
    }
    written
}

#[test]
fn a_reader_that_stops_stops_the_writer() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        let written = fill(&mut path.client).await;
        // What fits into the kernel's buffers of three hops, which it tunes itself; ours are below a megabyte.
        assert!(written < 256 << 20, "{written} bytes were taken for a reader that reads nothing");
        let mut first = [0; 1];
        path.server.read_exact(&mut first).await.unwrap();
        assert_eq!(first, [7]);
    });
}

#[test]
fn a_reset_by_a_client_ends_both_sides_also_while_the_server_does_not_read() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        fill(&mut path.client).await;
        path.client.set_zero_linger().unwrap();
        drop(path.client);
        let both = async { (path.outbound.end().await, path.inbound.end().await) };
        let reset = Err(EndedEarly::Reset(Side::Client));
        assert_eq!(timeout(LONG, both).await.expect("nobody notices"), (reset.clone(), reset));
        assert!(is_reset(&mut path.server).await);
    });
}

#[test]
fn a_bulk_flow_does_not_starve_a_ping_on_the_same_core() {
    run(async {
        let world = World::new();
        let bulk = world.path().await;
        let mut ping = world.path().await;
        let (mut reads, _keep) = bulk.server.into_split();
        let (_keep_too, mut writes) = bulk.client.into_split();
        let pump = tokio::task::spawn_local(async move {
            let chunk = vec![1; 1 << 20];
            while writes.write_all(&chunk).await.is_ok() {}
        });
        let drain = tokio::task::spawn_local(async move {
            let mut buffer = vec![0; 1 << 20];
            while reads.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        });
        let started = Instant::now();
        for number in 0..50_u8 {
            ping.client.write_all(&[number]).await.unwrap();
            let mut echo = [0; 1];
            timeout(LONG, ping.server.read_exact(&mut echo)).await.expect("starved").unwrap();
            assert_eq!(echo, [number]);
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        pump.abort();
        drain.abort();
    });
}

#[test]
fn the_death_of_either_side_in_the_middle_is_a_reset_for_both_programs() {
    run(async {
        for kill_outbound in [true, false] {
            let world = World::new();
            let mut path = world.path().await;
            path.client.write_all(b"the first half").await.unwrap();
            path.server.write_all(b"the first half").await.unwrap();
            let mut half = [0; 14];
            path.server.read_exact(&mut half).await.unwrap();
            path.client.read_exact(&mut half).await.unwrap();
            if kill_outbound {
                path.outbound.kill()
            } else {
                path.inbound.kill()
            }
            assert!(is_reset(&mut path.client).await);
            assert!(is_reset(&mut path.server).await);
        }
    });
}

#[test]
fn a_port_that_nobody_listens_on_is_a_reset_within_milliseconds() {
    run(async {
        let world = World::new();
        let capture = Capture::new().await;
        let (mut client, outbound) = world.dial(capture.address).await;
        let inbound = capture.accept_for_nobody(&world).await;
        let started = Instant::now();
        assert!(is_reset(&mut client).await);
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        assert_eq!(inbound.end().await, Err(EndedEarly::ConnectionRefused));
        let why = Reason::new("connection-refused").unwrap();
        assert_eq!(outbound.end().await, Err(EndedEarly::RefusedByPeer(why)));
    });
}

#[test]
fn a_node_that_refuses_the_connection_is_a_reset_within_milliseconds() {
    run(async {
        let world = World::new();
        let closed = Capture::new().await.address;
        let started = Instant::now();
        let (mut client, outbound) = world.dial(closed).await;
        assert!(is_reset(&mut client).await);
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        assert_eq!(outbound.end().await, Err(EndedEarly::ConnectionRefused));
    });
}

pub(super) fn deny_client() -> Policy {
    let principals = vec![mesh::StringMatch::Exact("cluster.local/ns/a/sa/client".into())];
    let clause = Clause { matches: vec![Match { principals, ..Match::default() }] };
    Policy {
        name: PolicyName { namespace: "b".into(), name: "deny".into() },
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![Rule { clauses: vec![clause] }],
    }
}

#[test]
fn a_policy_that_denies_is_told_to_the_client_and_ends_what_is_open() {
    run(async {
        let world = World::new();
        let mut open = world.path().await;
        world.node.view.change(|view| view.apply(Resource::Policy(deny_client())));
        judge(&world.node);
        assert!(is_reset(&mut open.client).await);
        assert_eq!(open.inbound.end().await, Err(RefuseReason::PolicyDeny.into()));

        let capture = Capture::new().await;
        let (mut client, outbound) = world.dial(capture.address).await;
        let (inbound, _application) = capture.accept(&world).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(inbound.end().await, Err(RefuseReason::PolicyDeny.into()));
        assert_eq!(outbound.end().await, Err(EndedEarly::RefusedByPeer(RefuseReason::PolicyDeny.into())));
    });
}

#[test]
fn a_destination_that_nobody_knows_is_waited_for_and_never_sent_to_in_clear() {
    run(async {
        let world = World::new();
        world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("server".into())));
        let capture = Capture::new().await;
        let (mut client, outbound) = world.dial(capture.address).await;
        client.write_all(b"early").await.unwrap();
        tokio::task::yield_now().await;
        assert!(outbound.connection.decision().is_none());
        world.apply(workload("server", &world.server.identity, super::world::SERVER));
        let (mut server, _inbound) = capture.accept_all(&world).await;
        let mut early = [0; 5];
        server.read_exact(&mut early).await.unwrap();
        assert_eq!(&early, b"early");
        assert!(matches!(outbound.connection.decision().unwrap().security, Security::Mtls(_)));
    });
}

#[test]
fn a_destination_that_stays_unknown_is_refused_by_name() {
    run(async {
        let world = World::new();
        let (mut client, outbound) = world.dial("127.77.9.9:80".parse().unwrap()).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(outbound.end().await, Err(RefuseReason::UnknownDestination.into()));
    });
}

#[test]
fn the_task_of_a_connection_is_small() {
    run(async {
        let world = World::new();
        let path = world.path().await;
        let connection = path.outbound.connection;
        let outbound = size_of_val(&crate::outbound::serve(&world.node, &world.client, &connection, path.client));
        let inbound = size_of_val(&crate::inbound::serve(&world.node, &world.server, &connection, path.server));
        // Beside it a connection owns its TLS state, and a buffer per direction once that has carried something.
        assert!(outbound < 2048 && inbound < 2048, "{outbound} and {inbound} bytes");
    });
}
