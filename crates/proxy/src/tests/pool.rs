//! Tunnels that carry one connection after the other.

use std::net::SocketAddr;

use mesh::Mode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use wire::tunnel::Reason;

use super::world::{CLIENT, Capture, LONG, Served, World, run};
use crate::inbound::{self, Next};
use crate::reasons::EndedEarly;
use crate::tunnel::{DRAINING, Tunnel};

/// One connection that came to its end in order, and what it left: the server's side of its tunnel, and the application.
async fn first(world: &World) -> (Box<Tunnel>, TcpListener, SocketAddr) {
    let capture = Capture::new().await;
    let address = capture.address;
    let (mut client, outbound) = world.dial(address).await;
    let (inbound, application) = capture.accept(world).await;
    let (mut server, _) = application.accept().await.unwrap();
    exchange(&mut client, &mut server, b"first").await;
    drop((client, server));
    assert_eq!(outbound.end().await, Ok(()));
    let tunnel = inbound.end_and_tunnel().await.unwrap().expect("it is good for another one");
    assert_eq!((world.node.pool.len(), tunnel.lease()), (1, 2));
    (tunnel, application, address)
}

async fn exchange(client: &mut TcpStream, server: &mut TcpStream, word: &[u8]) {
    for (from, to) in [(0, 1), (1, 0)] {
        let ends = [&mut *client, &mut *server];
        ends[from].write_all(word).await.unwrap();
        let mut heard = vec![0; word.len()];
        timeout(LONG, ends[to].read_exact(&mut heard)).await.expect("nothing is heard").unwrap();
        assert_eq!(heard, word);
    }
}

/// Serves the next connection of a tunnel on the server's side.
async fn next(world: &World, tunnel: Box<Tunnel>, address: SocketAddr) -> Served {
    let Next::Lease(tunnel, claim) = timeout(LONG, inbound::next(&world.server, tunnel)).await.expect("no connection")
    else {
        panic!("the tunnel is over")
    };
    world.serve_lease(tunnel, claim, address)
}

#[test]
fn a_second_connection_goes_through_the_tunnel_of_the_first() {
    run(async {
        let world = World::new();
        let (mut tunnel, application, address) = first(&world).await;
        for lease in 2..5 {
            let (mut client, outbound) = world.dial(address).await;
            let inbound = next(&world, tunnel, address).await;
            let (mut server, peer) = application.accept().await.unwrap();
            assert_eq!(peer.ip(), CLIENT, "the application sees its client");
            exchange(&mut client, &mut server, b"another").await;
            assert_eq!(world.node.pool.len(), 0, "nobody else may have it meanwhile");
            let counted = inbound.connection.clone();
            drop((server, client));
            assert_eq!(outbound.end().await, Ok(()));
            tunnel = inbound.end_and_tunnel().await.unwrap().unwrap();
            assert_eq!(tunnel.lease(), lease + 1);
            let sent = counted.bytes.sent.load(std::sync::atomic::Ordering::Relaxed);
            assert_eq!(sent, 7, "each connection counts its own");
        }
        assert_eq!(world.node.pool.len(), 1);
    });
}

#[test]
fn a_connection_that_was_reset_takes_its_tunnel_along() {
    run(async {
        let world = World::new();
        let mut path = world.path().await;
        exchange(&mut path.client, &mut path.server, b"half").await;
        path.client.set_zero_linger().unwrap();
        drop(path.client);
        path.outbound.end().await.unwrap_err();
        path.inbound.end().await.unwrap_err();
        assert_eq!(world.node.pool.len(), 0);
    });
}

#[test]
fn what_the_view_changed_or_the_other_side_ended_is_not_used_again() {
    run(async {
        let world = World::new();
        let sweep = |world: &World| world.node.pool.sweep(world.node.clock.wall(), &world.node.view);
        let (tunnel, _application, _) = first(&world).await;
        sweep(&world);
        assert_eq!(world.node.pool.len(), 1, "nothing has changed");
        world.set_mode(Mode::Strict);
        sweep(&world);
        assert_eq!(world.node.pool.len(), 0);
        drop(tunnel);

        let (tunnel, _application, _) = first(&world).await;
        world.node.pool.forget(&world.client.uid);
        assert_eq!(world.node.pool.len(), 0, "the pod is gone");
        assert!(matches!(inbound::next(&world.server, tunnel).await, Next::Over));

        let (tunnel, _application, _) = first(&world).await;
        drop(tunnel);
        while world.node.pool.len() > 0 {
            sweep(&world);
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn what_a_server_refuses_since_it_drains_is_sent_once_more_elsewhere() {
    run(async {
        let world = World::new();
        let (mut tunnel, application, address) = first(&world).await;
        drop(application);
        let again = Capture::at(address);
        let (mut client, _outbound) = world.dial(address).await;
        client.write_all(b"a question").await.unwrap();
        // It asks for the lease through the warm tunnel, while this side is about to go.
        let claim = timeout(LONG, tunnel.next_open()).await.expect("nothing is asked").unwrap();
        assert_eq!(claim.destination, address);
        tunnel.refuse(Reason::new(DRAINING).unwrap()).await;

        let (mut server, _inbound) = again.accept_all(&world).await;
        let mut heard = [0; 10];
        timeout(LONG, server.read_exact(&mut heard)).await.expect("it is lost").unwrap();
        assert_eq!(&heard, b"a question");
        server.write_all(b"an answer").await.unwrap();
        let mut heard = [0; 9];
        timeout(LONG, client.read_exact(&mut heard)).await.expect("no answer").unwrap();
    });
}

#[test]
fn what_a_server_refuses_for_another_reason_is_refused() {
    run(async {
        let world = World::new();
        let (mut tunnel, _application, address) = first(&world).await;
        let (mut client, outbound) = world.dial(address).await;
        client.write_all(b"a question").await.unwrap();
        timeout(LONG, tunnel.next_open()).await.expect("nothing is asked").unwrap();
        let reason = Reason::new("policy-deny").unwrap();
        tunnel.refuse(reason.clone()).await;
        assert_eq!(outbound.end().await, Err(EndedEarly::RefusedByPeer(reason)));
    });
}

#[test]
fn a_pod_that_retires_asks_its_clients_to_go_elsewhere() {
    run(async {
        let world = World::new();
        let (tunnel, _application, _) = first(&world).await;
        world.server.retire();
        let over = tokio::task::spawn_local({
            let pod = world.server.clone();
            async move { matches!(inbound::next(&pod, tunnel).await, Next::Over) }
        });
        // The sweep hears it, and hangs up.
        while world.node.pool.len() > 0 {
            world.node.pool.sweep(world.node.clock.wall(), &world.node.view);
            tokio::task::yield_now().await;
        }
        assert!(timeout(LONG, over).await.expect("it waits").unwrap());
    });
}
