//! A hostile peer with a valid certificate that is not made of our code: rustls over plain sockets, in a thread of its own.
//!
//! Whatever it does, it is refused by name, and nothing grows and nobody else is held up while it does it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, Connection as Tls, ServerConnection};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use wire::tunnel::{Claim, Control, FIRST_LEASE, MAX_CONTROL_FRAME, Reason, header_for_data};

use super::world::{CLIENT, Capture, LONG, SERVER, Served, World, run};
use crate::reasons::{EndedEarly, Fault};

/// The attacker's end of a connection.
struct Attacker {
    tls: Tls,
    tcp: StdStream,
}

impl Attacker {
    /// Says something inside TLS. A peer that has hung up by then is no failure of the attack.
    fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.tls.writer().write_all(bytes)?;
        self.flush()
    }

    fn flush(&mut self) -> std::io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }

    fn shake(&mut self) -> std::io::Result<()> {
        while self.tls.is_handshaking() {
            self.tls.complete_io(&mut self.tcp)?;
        }
        self.flush()
    }

    /// Asks for new keys, as often as it likes.
    fn refresh(&mut self) -> std::io::Result<()> {
        let refreshed = match &mut self.tls {
            Tls::Client(client) => client.refresh_traffic_keys(),
            Tls::Server(server) => server.refresh_traffic_keys(),
        };
        refreshed.map_err(std::io::Error::other)?;
        self.flush()
    }

    /// Reads until the other side has nothing more to say.
    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while self.tcp.read(&mut buffer).is_ok_and(|length| length > 0) {}
    }
}

fn dial(to: SocketAddr) -> StdStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(CLIENT, 0).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    let tcp = StdStream::from(socket);
    tcp.set_read_timeout(Some(LONG)).unwrap();
    tcp.set_write_timeout(Some(LONG)).unwrap();
    tcp
}

fn frame(control: &Control) -> Vec<u8> {
    control.encode(&mut [0; MAX_CONTROL_FRAME]).to_vec()
}

fn open(destination: SocketAddr) -> Vec<u8> {
    frame(&Control::Open { lease: FIRST_LEASE, claim: Claim { source: CLIENT, destination, service: None } })
}

fn data(bytes: &[u8]) -> Vec<u8> {
    [&header_for_data(bytes.len())[..], bytes].concat()
}

async fn client_config(world: &World) -> Arc<ClientConfig> {
    world.node.certificates.client(&world.client.identity, &world.server.identity).await.unwrap().0
}

/// Attacks the server's pod as a client: the handshake is made in order, then `act` has the connection.
async fn as_client<T: Send + 'static>(
    world: &World,
    act: impl FnOnce(Attacker, SocketAddr) -> T + Send + 'static,
) -> (Served, TcpListener, JoinHandle<T>) {
    let capture = Capture::new().await;
    let (to, config) = (capture.address, client_config(world).await);
    let thread = std::thread::spawn(move || {
        let tls = Tls::Client(ClientConnection::new(config, identity::tls::unnamed()).unwrap());
        let mut attacker = Attacker { tls, tcp: dial(to) };
        attacker.shake().unwrap();
        act(attacker, to)
    });
    let (inbound, application) = capture.accept(world).await;
    (inbound, application, thread)
}

/// Attacks the client's pod as the server that its program dials.
async fn as_server(
    world: &World,
    act: impl FnOnce(Attacker) + Send + 'static,
) -> (tokio::net::TcpStream, Served, JoinHandle<()>) {
    let listener = StdListener::bind(SocketAddr::new(SERVER, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let config = world.node.certificates.server(&world.server.identity).await.unwrap();
    let thread = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().unwrap();
        tcp.set_read_timeout(Some(LONG)).unwrap();
        let mut attacker = Attacker { tls: Tls::Server(ServerConnection::new(config).unwrap()), tcp };
        attacker.shake().unwrap();
        act(attacker);
    });
    let (program, outbound) = world.dial(to).await;
    (program, outbound, thread)
}

/// Another connection of the same pods, which must be as it always is.
async fn others_are_served(world: &World) {
    let mut path = timeout(LONG, world.path()).await.expect("others are held up");
    path.client.write_all(b"question").await.unwrap();
    path.server.read_exact(&mut [0; 8]).await.unwrap();
    path.server.write_all(b"answer").await.unwrap();
    path.client.read_exact(&mut [0; 6]).await.unwrap();
}

/// A name in the list of ways to end early, as a metric would count it.
fn name(end: &Result<(), EndedEarly>) -> &'static str {
    end.as_ref().map_or_else(|early| early.facts().name, |()| "orderly")
}

#[test]
fn a_hello_that_comes_byte_by_byte_is_ours_all_the_same() {
    run(async {
        let world = World::new();
        let capture = Capture::new().await;
        let (to, config) = (capture.address, client_config(&world).await);
        let thread = std::thread::spawn(move || {
            let mut tls = ClientConnection::new(config, identity::tls::unnamed()).unwrap();
            let mut hello = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut hello).unwrap();
            }
            let mut tcp = dial(to);
            hello.chunks(1).for_each(|byte| tcp.write_all(byte).unwrap());
            let mut attacker = Attacker { tls: Tls::Client(tls), tcp };
            attacker.shake().unwrap();
            let everything = [open(to), data(b"hello")].concat();
            // Frames too, and each byte in a record of its own.
            everything.chunks(1).for_each(|byte| attacker.say(byte).unwrap());
            attacker
        });
        let (inbound, application) = capture.accept(&world).await;
        let (mut server, _) = timeout(LONG, application.accept()).await.expect("refused").unwrap();
        server.read_exact(&mut [0; 5]).await.unwrap();
        drop(thread.join().unwrap());
        assert!(inbound.end().await.is_err(), "it hung up without an end");
    });
}

#[test]
fn frames_that_may_not_come_then_end_the_lease_by_name() {
    run(async {
        let world = World::new();
        let lease = FIRST_LEASE;
        let refused = frame(&Control::Refused { lease, reason: Reason::new("strict").unwrap() });
        let oversized_open = [&[1_u8, 0, 4, 1][..], &[0; 1025]].concat();
        let bad_open = [&[1_u8, 0, 0, 12][..], &lease.to_be_bytes(), &[0xff; 4]].concat();
        // Each without an `Open` before it, and each after one.
        let first = [
            (frame(&Control::Fin { lease }), "out-of-order"),
            (frame(&Control::Reset { lease }), "out-of-order"),
            (oversized_open, "frame-too-long"),
            (bad_open, "bad-open"),
            (vec![1, 0, 0, 2, 0, 0], "frame-too-short"),
            (vec![0, 0, 0, 0], "unknown-frame"),
        ];
        let later = [
            (frame(&Control::Opened { lease }), "out-of-order"),
            (frame(&Control::Closed { lease }), "out-of-order"),
            (refused, "out-of-order"),
            ([frame(&Control::Fin { lease }), data(b"after the end")].concat(), "out-of-order"),
            (frame(&Control::Fin { lease }).repeat(1000), "out-of-order"),
            (frame(&Control::Reset { lease: lease + 1 }), "wrong-lease"),
            ([4, 0, 0, 0].repeat(1000), "empty-data"),
            (vec![4, 0xff, 0xff, 0xff], "frame-too-long"),
        ];
        let all = first.map(|it| (it, false)).into_iter().chain(later.map(|it| (it, true)));
        for ((bytes, expected), opened) in all {
            let shown = bytes.clone();
            let (inbound, application, thread) = as_client(&world, move |mut attacker, to| {
                if opened {
                    attacker.say(&open(to)).unwrap();
                }
                // It may be hung up on before it has said all.
                let _ = attacker.say(&bytes);
                attacker.drain();
            })
            .await;
            let reached = if opened { Some(application.accept().await.unwrap()) } else { None };
            let end = inbound.end().await;
            assert_eq!(name(&end), expected, "{shown:02x?} {}", if opened { "after Open" } else { "first" });
            assert_eq!(end.unwrap_err().facts().fault, Fault::Peer);
            drop((reached, application));
            thread.join().unwrap();
        }
        others_are_served(&world).await;
    });
}

#[test]
fn who_proves_itself_and_then_says_nothing_or_half_an_open_is_let_go() {
    run(async {
        let world = World::new();
        let began = Instant::now();
        let mut attacks = Vec::new();
        for length in [0, 3, 11] {
            attacks.push(
                as_client(&world, move |mut attacker, to| {
                    attacker.say(&open(to)[..length]).unwrap();
                    attacker.drain();
                })
                .await,
            );
        }
        others_are_served(&world).await;
        for (inbound, _application, thread) in attacks {
            assert_eq!(name(&inbound.end().await), "open-timeout");
            thread.join().unwrap();
        }
        assert!(began.elapsed() < LONG);
    });
}

#[test]
fn a_tunnel_that_ends_within_a_frame_is_a_reset_for_the_application() {
    run(async {
        let world = World::new();
        let (inbound, application, thread) = as_client(&world, |mut attacker, to| {
            attacker.say(&open(to)).unwrap();
            let whole = data(&[7; 1000]);
            attacker.say(&whole[..500]).unwrap();
            // In order, as TLS sees it.
            attacker.tls.send_close_notify();
            attacker.flush().unwrap();
            attacker.tcp.shutdown(std::net::Shutdown::Write).unwrap();
            attacker.drain();
        })
        .await;
        let (mut server, _) = application.accept().await.unwrap();
        let mut got = Vec::new();
        let read = timeout(LONG, server.read_to_end(&mut got)).await.expect("it hangs");
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset, "half of a frame looked like an end");
        assert_eq!(name(&inbound.end().await), "tunnel-truncated");
        thread.join().unwrap();
    });
}

#[test]
fn a_flood_of_key_updates_is_ended_and_costs_nothing() {
    run(async {
        let world = World::new();
        let (inbound, application, thread) = as_client(&world, |mut attacker, to| {
            attacker.say(&open(to)).unwrap();
            let mut sent = 0;
            while sent < 100_000 && attacker.refresh().is_ok() {
                sent += 1;
            }
            sent
        })
        .await;
        let (server, _) = application.accept().await.unwrap();
        let end = inbound.end().await.unwrap_err();
        assert_eq!(end.facts().fault, Fault::Peer, "{end}");
        let sent = thread.join().unwrap();
        assert!(sent < 100_000, "all of it was taken");
        drop(server);
        others_are_served(&world).await;
    });
}

#[test]
fn what_is_no_tls_after_the_handshake_ends_the_connection() {
    run(async {
        let world = World::new();
        // A record that cannot be decrypted, one that is too long, and something else entirely.
        for bytes in [
            [&[23, 3, 3, 0, 32][..], &[7; 32]].concat(),
            vec![23, 3, 3, 0xff, 0xff],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        ] {
            let (inbound, application, thread) = as_client(&world, move |mut attacker, to| {
                attacker.say(&open(to)).unwrap();
                let _ = attacker.tcp.write_all(&bytes);
                attacker.drain();
            })
            .await;
            let (mut server, _) = application.accept().await.unwrap();
            let read = timeout(LONG, server.read(&mut [0; 1])).await.expect("it hangs");
            assert!(read.is_err(), "the application saw an orderly end");
            let end = inbound.end().await.unwrap_err();
            assert_eq!(end.facts().fault, Fault::Peer, "{end}");
            thread.join().unwrap();
        }
        others_are_served(&world).await;
    });
}

#[test]
fn a_reader_that_never_reads_stops_its_writer_and_nobody_else() {
    run(async {
        let world = World::new();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (inbound, application, thread) = as_client(&world, move |mut attacker, to| {
            attacker.say(&open(to)).unwrap();
            let _ = released.recv();
        })
        .await;
        let (mut server, _) = application.accept().await.unwrap();
        let piece = vec![7; 1 << 20];
        let mut written = 0_usize;
        // Until nothing has gone on for a while.
        while let Ok(length) = timeout(Duration::from_secs(1), server.write(&piece)).await {
            written += length.unwrap();
            assert!(written < 64 << 20, "{written} bytes are somewhere");
        }
        let (_, taken) = inbound.connection.bytes.now();
        assert!(taken > 0 && taken < 16 << 20, "{taken} bytes were taken from the server and not read by anybody");
        others_are_served(&world).await;
        drop(release);
        thread.join().unwrap();
        assert!(inbound.end().await.is_err());
    });
}

#[test]
fn a_server_that_breaks_the_protocol_is_refused_by_name() {
    run(async {
        let world = World::new();
        let lease = FIRST_LEASE;
        let opened = frame(&Control::Opened { lease });
        let cases = [
            (data(b"before it said that it is open"), "out-of-order"),
            (opened.repeat(2), "out-of-order"),
            (frame(&Control::Opened { lease: lease + 1 }), "wrong-lease"),
            ([opened.clone(), frame(&Control::Closed { lease })].concat(), "out-of-order"),
            ([&[3, 0, 0, 12][..], &lease.to_be_bytes(), b"\x1b[1m"].concat(), "bad-reason"),
            ([opened.clone(), [4, 0, 0, 0].repeat(1000)].concat(), "empty-data"),
            ([opened, vec![9, 0, 0, 0]].concat(), "unknown-frame"),
        ];
        for (bytes, expected) in cases {
            let shown = bytes.clone();
            let (mut program, outbound, thread) = as_server(&world, move |mut attacker| {
                let _ = attacker.say(&bytes);
                attacker.drain();
            })
            .await;
            program.write_all(b"a question").await.unwrap();
            let end = outbound.end().await;
            assert_eq!(name(&end), expected, "{shown:02x?}");
            let read = timeout(LONG, program.read_to_end(&mut Vec::new())).await.expect("it hangs");
            assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset, "{expected} looked like an end");
            thread.join().unwrap();
        }
        // The twin: one that keeps to it is heard.
        let (mut program, _outbound, thread) = as_server(&world, move |mut attacker| {
            attacker.say(&[frame(&Control::Opened { lease }), data(b"answer")].concat()).unwrap();
            attacker.drain();
        })
        .await;
        program.write_all(b"a question").await.unwrap();
        program.read_exact(&mut [0; 6]).await.unwrap();
        drop((program, _outbound));
        thread.join().unwrap();
    });
}

#[test]
fn a_server_that_accepts_and_never_answers_the_hello_holds_up_only_who_dials_it() {
    run(async {
        let world = World::new();
        let listener = StdListener::bind(SocketAddr::new(SERVER, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let silent = std::thread::spawn(move || listener.accept().unwrap().0);
        let (program, outbound) = world.dial(to).await;
        others_are_served(&world).await;
        assert_eq!(name(&outbound.end().await), "handshake-timeout");
        drop((program, silent.join().unwrap()));
    });
}
