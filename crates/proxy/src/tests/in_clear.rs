//! Clients without a certificate: what they get by mode, by what the view says of them, and by what they say first.

use std::io::ErrorKind;
use std::time::Duration;

use mesh::{Mode, PlaintextReason, RefuseReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use wire::tunnel::{Claim, Control, FIRST_LEASE};

use super::world::{CLIENT, Capture, LONG, SERVER, Served, World, connect, run, workload};
use crate::connections::Security;
use crate::judge::judge;
use crate::reasons::EndedEarly;
use crate::tunnel;

async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 64];
    loop {
        match timeout(LONG, stream.read(&mut buffer)).await.expect("nothing happens") {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

fn reason(served: &Served) -> PlaintextReason {
    match served.connection.decision().expect("decided").security {
        Security::Plaintext(because) => because,
        Security::Mtls(_) => panic!("not in clear"),
    }
}

/// A program that connects to the server's pod by itself, without our outbound side, and has said something.
async fn plain_client(world: &World, first: &[u8]) -> (TcpStream, TcpStream, Served) {
    let capture = Capture::new().await;
    let mut client = connect(CLIENT, capture.address).await;
    client.write_all(first).await.unwrap();
    let (server, inbound) = capture.accept_all(world).await;
    (client, server, inbound)
}

#[test]
fn permissive_lets_a_client_that_opted_out_speak_and_names_it() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let (mut client, mut server, inbound) = plain_client(&world, b"GET /").await;
        let mut first = [0; 5];
        server.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"GET /");
        assert_eq!(reason(&inbound), PlaintextReason::OptedOut);
        server.write_all(b"200").await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"200");
        drop(client);
        assert_eq!(inbound.end().await, Ok(()));
    });
}

#[test]
fn an_applications_own_tls_passes_untouched() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        // A record of a handshake, a ClientHello by its type, and then nothing that could be ours.
        let hello = [&[22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3][..], &[0xab; 194]].concat();
        let (_client, mut server, inbound) = plain_client(&world, &hello).await;
        let mut got = vec![0; hello.len()];
        timeout(LONG, server.read_exact(&mut got)).await.expect("held back").unwrap();
        assert_eq!(got, hello);
        assert_eq!(reason(&inbound), PlaintextReason::OptedOut);
    });
}

#[test]
fn a_server_that_speaks_first_is_not_stalled() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let started = Instant::now();
        let (mut client, mut server, _inbound) = plain_client(&world, b"").await;
        server.write_all(b"220 ready").await.unwrap();
        let mut greeting = [0; 9];
        client.read_exact(&mut greeting).await.unwrap();
        assert!(started.elapsed() < Duration::from_millis(300), "{:?}", started.elapsed());
        client.write_all(b"HELO").await.unwrap();
        let mut hello = [0; 4];
        server.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"HELO");
    });
}

#[test]
fn a_captured_client_without_tls_is_named_a_bypass() {
    run(async {
        let world = World::new();
        let (_client, _server, inbound) = plain_client(&world, b"PING").await;
        assert_eq!(reason(&inbound), PlaintextReason::Bypass);
    });
}

#[test]
fn strict_refuses_by_the_first_byte_and_names_who_it_was() {
    run(async {
        let world = World::new();
        world.set_mode(Mode::Strict);
        for (opt_out, because) in [(false, RefuseReason::StrictBypass), (true, RefuseReason::Strict)] {
            if opt_out {
                world.opt_out_client();
            }
            let capture = Capture::new().await;
            let mut client = connect(CLIENT, capture.address).await;
            client.write_all(b"P").await.unwrap();
            let started = Instant::now();
            let (inbound, _application) = capture.accept(&world).await;
            assert!(is_reset(&mut client).await);
            assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
            assert_eq!(inbound.end().await, Err(because.into()));
        }
    });
}

#[test]
fn strict_does_not_wait_for_a_silent_client_for_ever() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        world.set_mode(Mode::Strict);
        let capture = Capture::new().await;
        let mut client = connect(CLIENT, capture.address).await;
        let (inbound, _application) = capture.accept(&world).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(inbound.end().await, Err(RefuseReason::HelloTimeout.into()));
    });
}

#[test]
fn strict_lets_tunnels_go_on_and_ends_what_was_open_in_clear() {
    run(async {
        let world = World::new();
        let mut tunnel = world.path().await;
        world.opt_out_client();
        let (mut client, mut server, inbound) = plain_client(&world, b"x").await;
        world.set_mode(Mode::Strict);
        judge(&world.node);
        assert!(is_reset(&mut client).await);
        assert!(is_reset(&mut server).await);
        assert_eq!(inbound.end().await, Err(RefuseReason::Strict.into()));
        tunnel.client.write_all(b"still").await.unwrap();
        let mut still = [0; 5];
        tunnel.server.read_exact(&mut still).await.unwrap();
        assert_eq!(&still, b"still");
    });
}

#[test]
fn strict_ends_what_is_being_sent_in_clear() {
    run(async {
        let world = World::new();
        let mut server = workload("server", &world.server.identity, SERVER);
        (server.speaks, server.uncaptured) = (mesh::Speaks::Nothing, Some(mesh::Uncaptured::Pending));
        server.pod_uid = "another".into();
        world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("server".into())));
        world.apply(server.clone());
        let listener = tokio::net::TcpListener::bind((SERVER, 0)).await.unwrap();
        let (mut client, outbound) = world.dial(listener.local_addr().unwrap()).await;
        let (mut accepted, _) = listener.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        accepted.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(reason(&outbound), PlaintextReason::CapturePending);
        server.modes.default = Mode::Strict;
        world.apply(server);
        judge(&world.node);
        assert!(is_reset(&mut client).await);
        assert_eq!(outbound.end().await, Err(RefuseReason::Strict.into()));
    });
}

/// A hello of ours, as bytes that a plain client can send late.
async fn tunnel_over(world: &World, stream: TcpStream) -> Result<Box<tunnel::Tunnel>, EndedEarly> {
    let (config, _) = world.node.certificates.client(&world.client.identity, &world.server.identity).await?;
    world.handshake(stream, config).await
}

#[test]
fn a_hello_after_the_servers_first_bytes_is_refused_by_name() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let (mut client, mut server, inbound) = plain_client(&world, b"").await;
        server.write_all(b"220 ready").await.unwrap();
        client.read_exact(&mut [0; 9]).await.unwrap();
        assert!(tunnel_over(&world, client).await.is_err());
        assert_eq!(inbound.end().await, Err(RefuseReason::LateHello.into()));
        assert!(is_reset(&mut server).await);
    });
}

#[test]
fn a_hello_after_the_deadline_is_a_tunnel_while_the_server_has_said_nothing() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let capture = Capture::new().await;
        let to = capture.address;
        let client = connect(CLIENT, to).await;
        let (inbound, application) = capture.accept(&world).await;
        // The deadline is over when the application is connected to.
        let (mut in_clear, _) = application.accept().await.unwrap();
        let mut tunnel = tunnel_over(&world, client).await.unwrap();
        let claim = Claim { source: CLIENT, destination: to, service: None };
        tunnel.say_and_send(&Control::Open { lease: FIRST_LEASE, claim }, b"in a tunnel").await.unwrap();
        let (mut server, _) = application.accept().await.unwrap();
        let mut got = [0; 11];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"in a tunnel");
        assert!(is_reset(&mut in_clear).await);
        assert!(matches!(inbound.connection.decision().unwrap().security, Security::Mtls(_)));
    });
}

#[test]
fn a_client_that_only_looks_is_passed_on_as_that() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let capture = Capture::new().await;
        let client = connect(CLIENT, capture.address).await;
        drop(client);
        let (mut server, inbound) = capture.accept_all(&world).await;
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        drop(server);
        assert_eq!(inbound.end().await, Ok(()));
    });
}

#[test]
fn what_goes_outside_goes_untouched_and_named() {
    run(async {
        let world = World::new();
        let outside = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut client, outbound) = world.dial(outside.local_addr().unwrap()).await;
        let (mut server, peer) = outside.accept().await.unwrap();
        assert_eq!(peer.ip(), CLIENT);
        client.write_all(b"out").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"out");
        assert_eq!(reason(&outbound), PlaintextReason::Outside);
        drop(server);
        assert_eq!(outbound.end().await, Ok(()));
    });
}

#[test]
fn first_bytes_that_could_begin_a_hello_and_do_not_are_handed_on_after_a_while() {
    run(async {
        let world = World::new();
        world.opt_out_client();
        let started = Instant::now();
        let (mut client, mut server, inbound) = plain_client(&world, &[22]).await;
        let mut got = [0; 1];
        timeout(LONG, server.read_exact(&mut got)).await.expect("held back for ever").unwrap();
        assert_eq!((got, reason(&inbound)), ([22], PlaintextReason::OptedOut));
        assert!(started.elapsed() >= Duration::from_secs(2), "it was not waited for: {:?}", started.elapsed());
        server.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
    });
}
