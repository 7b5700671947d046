//! A client, or a server, with a valid certificate and bad intentions.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use mesh::RefuseReason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use wire::tunnel::{Claim, Control, FIRST_LEASE, MAX_CONTROL_FRAME, MAX_DATA, Reason, Violation};

use super::world::{CLIENT, Capture, LONG, SERVER, Served, World, connect, id, run, workload};
use crate::reasons::{EndedEarly, Side};
use crate::tunnel::Tunnel;

/// A tunnel that the test itself makes to the server's pod, with the client's certificate.
async fn tunnel_to_server(world: &World, capture: Capture) -> (Box<Tunnel>, Served, TcpListener, SocketAddr) {
    let to = capture.address;
    let (stream, (inbound, application)) = tokio::join!(connect(CLIENT, to), capture.accept(world));
    let (config, _) = world.node.certificates.client(&world.client.identity, &world.server.identity).await.unwrap();
    let tunnel = world.handshake(stream, config).await.unwrap();
    (tunnel, inbound, application, to)
}

fn open(source: std::net::IpAddr, destination: SocketAddr) -> Control {
    Control::Open { lease: FIRST_LEASE, claim: Claim { source, destination, service: None } }
}

/// A tunnel that is open, and the application's end of the connection.
async fn opened(world: &World) -> (Box<Tunnel>, Served, TcpStream) {
    let (mut tunnel, inbound, application, to) = tunnel_to_server(world, Capture::new().await).await;
    tunnel.say_and_send(&open(CLIENT, to), b"first").await.unwrap();
    assert_eq!(tunnel.hear().await, Ok(Control::Opened { lease: FIRST_LEASE }));
    let (mut server, _) = application.accept().await.unwrap();
    let mut first = [0; 5];
    server.read_exact(&mut first).await.unwrap();
    (tunnel, inbound, server)
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let read = timeout(LONG, stream.read(&mut [0; 1])).await.expect("nothing happens");
    read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn an_open_that_claims_another_source_or_destination_ends_its_connection() {
    run(async {
        let world = World::new();
        for lie in 0..3 {
            let (mut tunnel, inbound, application, to) = tunnel_to_server(&world, Capture::new().await).await;
            let claim = match lie {
                0 => open("127.77.0.9".parse().unwrap(), to),
                1 => open(CLIENT, SocketAddr::new(SERVER, to.port() ^ 1)),
                _ => open(CLIENT, SocketAddr::new("127.77.0.3".parse().unwrap(), to.port())),
            };
            tunnel.say_and_send(&claim, b"what it wants to say").await.unwrap();
            let reason = Reason::new("open-mismatch").unwrap();
            assert_eq!(tunnel.hear().await, Ok(Control::Refused { lease: FIRST_LEASE, reason }));
            drop(tunnel);
            assert_eq!(inbound.end().await, Err(EndedEarly::OpenMismatch));
            assert!(
                timeout(Duration::from_millis(1), application.accept()).await.is_err(),
                "the application was reached"
            );
        }
    });
}

#[test]
fn an_honest_open_reaches_the_application() {
    run(async {
        let world = World::new();
        let (mut tunnel, _inbound, mut server) = opened(&world).await;
        server.write_all(b"back").await.unwrap();
        assert_eq!(tunnel.hear_payload().await.unwrap(), b"back");
    });
}

#[test]
fn the_end_of_tls_without_fin_is_a_reset() {
    run(async {
        let world = World::new();
        for cut_tls in [true, false] {
            let (mut tunnel, inbound, mut server) = opened(&world).await;
            if cut_tls {
                // close_notify, as if everything were in order.
                tunnel.hang_up_without_fin().await;
            } else {
                // TCP's end alone. With bytes unread it would be a reset.
                server.write_all(b"x").await.unwrap();
                tunnel.hear_payload().await.unwrap();
                crate::splice::orderly_close(&tunnel.leg.tcp);
                drop(tunnel);
            }
            assert!(is_reset(&mut server).await);
            assert_eq!(inbound.end().await, Err(EndedEarly::Truncated));
        }
    });
}

#[test]
fn the_end_of_tls_after_fin_and_before_the_answer_is_a_reset() {
    run(async {
        let world = World::new();
        let (mut tunnel, inbound, mut server) = opened(&world).await;
        tunnel.fin().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        tunnel.hang_up_without_fin().await;
        let error = server.ready(tokio::io::Interest::ERROR);
        timeout(LONG, error).await.expect("the server learns nothing").unwrap();
        assert_eq!(inbound.end().await, Err(EndedEarly::Truncated));
    });
}

#[test]
fn what_is_no_frame_ends_the_connection() {
    run(async {
        let world = World::new();
        let too_long = [&[4][..], &u32::try_from(MAX_DATA + 1).unwrap().to_be_bytes()[1..]].concat();
        let second_open = open(CLIENT, SocketAddr::new(SERVER, 1)).encode(&mut [0; MAX_CONTROL_FRAME]).to_vec();
        let bad = [
            (vec![99, 0, 0, 1, 0], Violation::UnknownFrame),
            (too_long, Violation::FrameTooLong),
            (vec![4, 0, 0, 0], Violation::EmptyData),
            (second_open, Violation::OutOfOrder),
            (Control::Fin { lease: 7 }.encode(&mut [0; MAX_CONTROL_FRAME]).to_vec(), Violation::WrongLease),
        ];
        for (bytes, violation) in bad {
            let (mut tunnel, inbound, mut server) = opened(&world).await;
            tunnel.say_raw(&bytes).await.unwrap();
            assert!(is_reset(&mut server).await, "{violation}");
            assert_eq!(inbound.end().await, Err(EndedEarly::Frames(violation)));
        }
    });
}

#[test]
fn data_before_open_ends_the_connection() {
    run(async {
        let world = World::new();
        let (mut tunnel, inbound, _application, _) = tunnel_to_server(&world, Capture::new().await).await;
        tunnel.send_ahead(b"no open").await.unwrap();
        assert_eq!(inbound.end().await, Err(EndedEarly::Frames(Violation::OutOfOrder)));
    });
}

#[test]
fn a_reset_frame_is_a_reset() {
    run(async {
        let world = World::new();
        let (tunnel, inbound, mut server) = opened(&world).await;
        tunnel.reset().await;
        assert!(is_reset(&mut server).await);
        assert_eq!(inbound.end().await, Err(EndedEarly::Reset(Side::Client)));
    });
}

#[test]
fn a_certificate_that_contradicts_the_view_is_refused_unless_the_view_catches_up() {
    run(async {
        let world = World::new();
        // By the view the client's address is another pod's.
        world.apply(workload("newer", &id("a/sa/other"), CLIENT));
        for catches_up in [false, true] {
            let (mut tunnel, inbound, application, to) = tunnel_to_server(&world, Capture::new().await).await;
            tunnel.say(&open(CLIENT, to)).await.unwrap();
            if catches_up {
                world.node.view.change(|view| view.remove(&mesh::ResourceKey::Workload("newer".into())));
                timeout(LONG, application.accept()).await.expect("not let in").unwrap();
            } else {
                assert_eq!(inbound.end().await, Err(RefuseReason::IdentityAddressMismatch.into()));
            }
        }
    });
}

#[test]
fn a_server_that_proves_another_identity_gets_nothing() {
    run(async {
        let world = World::new();
        let capture = Capture::new().await;
        // The view says that the server is somebody else than it can prove.
        world.apply(workload("server", &id("b/sa/expected"), SERVER));
        let (mut client, outbound) = world.dial(capture.address).await;
        client.write_all(b"a secret").await.unwrap();
        let (inbound, _application) = capture.accept(&world).await;
        assert!(is_reset(&mut client).await);
        let end = outbound.end().await.unwrap_err();
        assert_eq!(end.facts().name, "wrong-identity", "{end}");
        let end = inbound.end().await.unwrap_err();
        assert!(matches!(end, EndedEarly::Handshake(_)), "{end}");
    });
}

#[test]
fn a_client_of_another_authority_is_refused_by_name_and_learns_that_it_was() {
    run(async {
        let (world, foreign) = (World::new(), World::new());
        let capture = Capture::new().await;
        let to = capture.address;
        let (stream, (inbound, _application)) = tokio::join!(connect(CLIENT, to), capture.accept(&world));
        let svid = foreign.authority.svid(&world.client.identity, &foreign.node.clock);
        let time = std::sync::Arc::new(world.node.clock.clone());
        let config = identity::tls::client_config(&svid, &world.authority.bundle, &world.server.identity, time);
        let mut tunnel = world.handshake(stream, config).await.unwrap();
        let told = tunnel.hear().await.unwrap_err();
        assert_eq!(told.facts().name, "peer-refused", "{told}");
        assert_eq!(inbound.end().await.unwrap_err().facts().name, "unknown-issuer");
    });
}

#[test]
fn a_client_that_resets_before_its_connection_stands_takes_nothing_any_longer() {
    run(async {
        let world = World::new();
        // A server that accepts and does not shake hands, and an address that nobody knows: both would take seconds.
        let silent = Capture::new().await;
        for to in [silent.address, "127.77.9.9:80".parse().unwrap()] {
            let started = Instant::now();
            let (program, outbound) = world.dial(to).await;
            socket2::SockRef::from(&program).set_linger(Some(Duration::ZERO)).unwrap();
            tokio::task::yield_now().await;
            drop(program);
            assert_eq!(timeout(LONG, outbound.end()).await.unwrap(), Err(EndedEarly::Reset(Side::Client)), "{to}");
            assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        }
    });
}
