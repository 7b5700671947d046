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
const BOUNDS: Bounds = Bounds { nodes: 16, strangers: 64, strangers_of_source: 32, patience: LONG, trust: LONG };

/// HTTP/2's first bytes, with settings that ask for nothing.
const HTTP_2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A call of discovery with a token that is nobody's, on stream 1: its headers as literals (RFC 7541, section 6.2.2), with the
/// static table's names of :method, :scheme, :path, :authority, content-type and authorization.
const CALL: &[u8] = b"\0\0\x95\x01\x04\0\0\0\x01\
    \x83\x87\
    \x04\x4f/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources\
    \x01\x0dcontrol-plane\
    \x0f\x10\x10application/grpc\
    \x0f\x08\x10Bearer a-guess-x\
    \0\x02te\x08trailers";

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

/// Connections from 127.0.0.2, .3 and .4, each of which has more than its share, and two of which fill all places: each is made
/// anew when it ends. They are there until this is dropped.
fn flood(address: SocketAddr, config: Option<Arc<rustls::ClientConfig>>) -> JoinSet<()> {
    let mut all = JoinSet::new();
    for number in 0..3 * (BOUNDS.strangers_of_source + 8) {
        let (source, config) = (2 + u8::try_from(number % 3).unwrap(), config.clone());
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
    for _ in 0..20 {
        // Somebody is ended for another address: all places are taken, and again after that.
        let before = running.control.turned_away.borrow().len();
        running.turned_away_after(before, |(_, because)| *because == TurnedAway::TooMany).await;
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

/// Connections in review, as many as there are places for, from 127.0.0.2 and .3.
#[tokio::test]
async fn while_no_token_can_be_looked_up_a_flood_of_tokens_keeps_no_node_out() {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, BOUNDS).await;
    let files = Files::new(&authority);
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    running.control.reviews.send_replace(false);
    let mut flood = Vec::new();
    for number in 0..BOUNDS.strangers {
        let tcp = silent(2 + u8::try_from(number % 2).unwrap(), running.address).await.unwrap();
        let connector = TlsConnector::from(client_config(&authority));
        let mut stream = connector.connect(tls::unnamed(), tcp).await.unwrap();
        stream.write_all(&[HTTP_2, CALL].concat()).await.unwrap();
        flood.push(stream);
    }
    let asked =
        running.control.asked.subscribe().wait_for(|asked| *asked >= BOUNDS.strangers).await.map(|asked| *asked);
    assert_eq!(asked.unwrap(), BOUNDS.strangers);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    running.turned_away(|(_, because)| *because == TurnedAway::TooMany).await;
    running.control.reviews.send_replace(true);
    let batch = timeout(LONG, discovery.next()).await.expect("a flood keeps a node out").unwrap();
    assert_eq!(batch.changes, [Change::Set(settings("10.0.0.0/8"))]);
    drop(flood);
    running.stop().await;
}

/// A token that has leaked, say.
#[tokio::test]
async fn who_opens_ever_more_connections_with_one_token_ends_its_own() {
    const MORE: usize = 40;
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, Bounds { nodes: 2 * MORE, ..BOUNDS }).await;
    let files = Files::new(&authority);
    let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let mut all = Vec::new();
    for _ in 0..MORE {
        let connected = files.control_plane(running.address).connect().await.unwrap();
        connected.certify("a request", &id, LONG).await.unwrap();
        all.push(connected);
    }
    running.turned_away(|(_, because)| *because == TurnedAway::TooManyOfNode).await;
    assert!(all[0].certify("a request", &id, LONG).await.is_err(), "the oldest has gone");
    assert!(all[MORE - 1].certify("a request", &id, LONG).await.is_ok(), "the newest stays");
    running.stop().await;
}

#[tokio::test]
async fn a_hundred_certificates_at_once_are_made_one_after_the_other() {
    let authority = Authority::new("cluster.local");
    let running = Running::start_with(&authority, CONTROL, BOUNDS).await;
    let files = Files::new(&authority);
    let id: identity::SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let connected = files.control_plane(running.address).connect().await.unwrap();
    // With its first answer a client has heard how many calls there may be at a time.
    connected.certify("a request", &id, LONG).await.unwrap();
    let mut all = JoinSet::new();
    for _ in 0..100 {
        let (connected, id) = (connected.clone(), id.clone());
        all.spawn(async move { connected.certify("a request", &id, LONG).await.map(drop) });
    }
    for certified in all.join_all().await {
        certified.unwrap();
    }
    running.stop().await;
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
