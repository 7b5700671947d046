//! Strangers at the control plane's port, who never show a token, and nodes beside them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use identity::tls;
use mesh::MeshSettings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use wire::discovery::{Change, Kind, Known, Published, Resource};
use wire::server::{Bounds, TurnedAway};

use crate::control::{CONTROL, Running};
use crate::files::Files;
use crate::pki::{Authority, clock};

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(20);
/// How long a stranger may wait in tests that wait for it.
const PATIENCE: Duration = Duration::from_millis(300);
const BOUNDS: Bounds = Bounds { nodes: 16, strangers: 64, strangers_of_source: 32, patience: LONG };

/// HTTP/2's first bytes, with settings that ask for nothing.
const HTTP_2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Connects from 127.0.0.`source`.
async fn silent(source: u8, address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 0, source], 0)))?;
    socket.connect(address).await
}

/// The same with TLS, and HTTP/2 up to where a call would come.
async fn silent_after_tls(
    source: u8,
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = silent(source, address).await?;
    let mut stream = TlsConnector::from(config).connect(tls::unnamed(), tcp).await?;
    stream.write_all(HTTP_2).await?;
    Ok(stream)
}

fn client_config(authority: &Authority) -> Arc<rustls::ClientConfig> {
    tls::control_client_config(&authority.bundle, &CONTROL.parse().unwrap(), clock())
}

/// Reads until the other end has ended it, one way or the other.
async fn until_ended(mut stream: impl AsyncReadExt + Unpin) {
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read).await;
}

/// Connections from 127.0.0.2 and .3, as many as it takes to fill all places and more, each made anew when it ends. They are there
/// until this is dropped.
fn flood(address: SocketAddr, config: Option<Arc<rustls::ClientConfig>>) -> JoinSet<()> {
    let mut all = JoinSet::new();
    for number in 0..2 * BOUNDS.strangers_of_source + 16 {
        let (source, config) = (2 + u8::try_from(number % 2).unwrap(), config.clone());
        all.spawn(async move {
            loop {
                match &config {
                    None => until_ended(silent(source, address).await.unwrap()).await,
                    Some(config) => {
                        // It may be ended in the middle of it.
                        if let Ok(stream) = silent_after_tls(source, address, config.clone()).await {
                            until_ended(stream).await;
                        }
                    }
                }
            }
        });
    }
    all
}

fn settings(inside: &str) -> Resource {
    let inside = vec![inside.parse().unwrap()];
    Resource::Mesh(mesh::Resource::Settings(MeshSettings { inside, ..Default::default() }))
}

/// A node connects and learns what there is, and again what changes.
async fn node_is_served(running: &Running, files: &Files) {
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.0.0.0/8"))]);
    running.publish(vec![Published::new(&settings("10.1.0.0/16"))]);
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.1.0.0/16"))]);
}

async fn nodes_get_through(with_tls: bool) {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, BOUNDS).await;
    let files = Files::new(&authority);
    let flood = flood(running.address, with_tls.then(|| client_config(&authority)));
    running.turned_away(|(_, because)| *because == TurnedAway::TooManyOfSource).await;
    for _ in 0..20 {
        timeout(LONG, node_is_served(&running, &files)).await.expect("a flood keeps a node out");
    }
    drop(flood);
    let turned_away = running.control.turned_away.borrow().clone();
    assert!(turned_away.iter().all(|(address, _)| address.ip().to_string() != "127.0.0.1"), "{turned_away:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_flood_of_silent_connections_keeps_no_node_out() {
    nodes_get_through(false).await;
}

#[tokio::test]
async fn a_flood_of_connections_that_finish_tls_and_call_nothing_keeps_no_node_out() {
    nodes_get_through(true).await;
}

#[tokio::test]
async fn who_shows_no_token_in_time_is_ended_and_a_node_stays() {
    let authority = Authority::new("cluster.local");
    let bounds = Bounds { patience: PATIENCE, ..BOUNDS };
    let running = Running::start_with(&authority, CONTROL, bounds).await;
    let files = Files::new(&authority);
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    discovery.next().await.unwrap();

    let start = Instant::now();
    let stranger = silent(2, running.address).await.unwrap();
    let address = stranger.local_addr().unwrap();
    timeout(LONG, until_ended(stranger)).await.unwrap();
    assert!(start.elapsed() >= PATIENCE);
    running.turned_away(|turned| *turned == (address, TurnedAway::NoCall)).await;

    let start = Instant::now();
    let stranger = silent_after_tls(2, running.address, client_config(&authority)).await.unwrap();
    let address = stranger.get_ref().0.local_addr().unwrap();
    timeout(LONG, until_ended(stranger)).await.unwrap();
    assert!(start.elapsed() >= PATIENCE - Duration::from_millis(100), "the handshake is a part of it");
    running.turned_away(|turned| *turned == (address, TurnedAway::NoCall)).await;

    running.publish(vec![Published::new(&settings("10.1.0.0/16"))]);
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.1.0.0/16"))]);
    running.stop().await;
}

#[tokio::test]
async fn a_refused_token_makes_no_node() {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, Bounds { patience: PATIENCE, ..BOUNDS }).await;
    let files = Files::new(&authority);
    files.write("token", "another-token");
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    assert!(discovery.next().await.is_err());
    timeout(LONG, running.turned_away(|(_, because)| *because == TurnedAway::NoCall)).await.unwrap();
    running.stop().await;
}

#[tokio::test]
async fn a_token_that_takes_long_to_look_up_keeps_its_connection() {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, Bounds { patience: PATIENCE, ..BOUNDS }).await;
    let files = Files::new(&authority);
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    running.control.reviews.send_replace(false);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    // Whoever came later has been ended for having taken too long.
    let stranger = silent(2, running.address).await.unwrap();
    timeout(LONG, until_ended(stranger)).await.unwrap();
    running.control.reviews.send_replace(true);
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.0.0.0/8"))]);
    running.stop().await;
}

#[tokio::test]
async fn more_nodes_than_there_are_places_for_are_told_so() {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, Bounds { nodes: 1, ..BOUNDS }).await;
    let files = Files::new(&authority);
    let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let first = files.control_plane(running.address).connect().await.unwrap();
    assert!(first.certify("a request", &id, LONG).await.is_ok());
    let second = files.control_plane(running.address).connect().await.unwrap();
    let error = second.certify("a request", &id, LONG).await.unwrap_err().to_string();
    assert!(error.contains("as many connections of nodes as it can have"), "{error}");
    drop(first);
    let freed = async { while second.certify("a request", &id, LONG).await.is_err() {} };
    timeout(LONG, freed).await.expect("a place that was left is free");
    running.stop().await;
}
