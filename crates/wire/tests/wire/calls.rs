//! Calls between nodes and a control plane, over TCP, TLS and HTTP/2.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh::{MeshSettings, PodUid};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use wire::client::{ClientError, Connected};
use wire::discovery::{Asked, Change, Kind, Known, Published, Resource};
use wire::report::{CaptureFailure, Report};
use wire::server::{Bounds, TurnedAway};

use crate::control::{CONTROL, KINDS, Running};
use crate::files::Files;
use crate::pki::Authority;

async fn connected(authority: &Authority) -> (Running, Files, Connected) {
    let running = Running::start(authority).await;
    let files = Files::new(authority);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    (running, files, connected)
}

fn settings(inside: &str) -> Resource {
    let inside = vec![inside.parse().unwrap()];
    Resource::Mesh(mesh::Resource::Settings(MeshSettings { inside, ..Default::default() }))
}

#[tokio::test]
async fn a_view_is_complete_when_every_kind_came_and_was_accepted() {
    let authority = Authority::new("cluster.local");
    let (running, _files, connected) = connected(&authority).await;
    let resources = [settings("10.0.0.0/8"), Resource::Bundle(authority.bundle.clone())];
    running.publish(resources.iter().map(Published::new).collect());
    let mut discovery = connected.discover(KINDS, Known::default()).await.unwrap();
    let mut came = Vec::new();
    for _ in KINDS {
        assert!(!discovery.is_complete());
        let batch = discovery.next().await.unwrap();
        assert_eq!(batch.refused, []);
        came.extend(batch.changes);
    }
    // The last batch is accepted by asking for more; nothing more comes.
    let more = tokio::time::timeout(Duration::from_millis(50), discovery.next()).await;
    assert!(more.is_err(), "a call that is dropped loses nothing");
    assert!(discovery.is_complete());
    for resource in resources {
        assert!(came.contains(&Change::Set(resource)));
    }
    running.publish(vec![Published::new(&settings("10.1.0.0/16"))]);
    let mut changed = discovery.next().await.unwrap();
    if changed.kind == Kind::Bundle {
        // The bundle was taken back, which cannot be.
        assert_eq!((changed.changes.len(), changed.refused.len()), (0, 1));
        changed = discovery.next().await.unwrap();
    }
    assert_eq!(changed.changes, [Change::Set(settings("10.1.0.0/16"))]);
    let heard = running.heard(8).await;
    let accepted = heard.iter().filter(|asked| matches!(asked, Asked::Accepted { current: true, .. })).count();
    assert_eq!(accepted, KINDS.len());
    running.stop().await;
}

#[tokio::test]
async fn what_a_node_refuses_is_heard_and_sent_again_to_its_next_stream() {
    let authority = Authority::new("cluster.local");
    let (running, files, connected) = connected(&authority).await;
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    discovery.next().await.unwrap();
    discovery.refuse("not today");
    let heard = running.heard(2).await;
    assert_eq!(heard[1], Asked::Refused { kind: Kind::Settings, detail: "not today".to_owned() });
    let known = discovery.known().clone();
    assert_eq!(known.count(Kind::Settings), 0);
    drop((discovery, connected));
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], known).await.unwrap();
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.0.0.0/8"))]);
    running.stop().await;
}

#[tokio::test]
async fn a_node_that_comes_back_is_sent_what_differs() {
    let authority = Authority::new("cluster.local");
    let (running, files, connected) = connected(&authority).await;
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    discovery.next().await.unwrap();
    let _ = tokio::time::timeout(Duration::from_millis(10), discovery.next()).await;
    let known = discovery.known().clone();
    let resources = running.control.resources.borrow().clone();
    running.stop().await;
    assert!(matches!(discovery.next().await, Err(ClientError::Lost { .. })));
    let running = Running::start(&authority).await;
    running.publish(resources);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], known).await.unwrap();
    assert_eq!(discovery.next().await.unwrap().changes, [], "the same version is not sent twice");
    running.stop().await;
}

#[tokio::test]
async fn a_stream_ends_in_order_when_its_token_stands_for_nobody_any_more() {
    let authority = Authority::new("cluster.local");
    let bounds = Bounds { trust: Duration::from_millis(20), ..Bounds::within(1024) };
    let running = Running::start_with(&authority, CONTROL, bounds).await;
    running.publish(vec![Published::new(&settings("10.0.0.0/8"))]);
    let files = Files::new(&authority);
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(&[Kind::Settings], Known::default()).await.unwrap();
    discovery.next().await.unwrap();
    let mut asked = running.control.asked.subscribe();
    asked.wait_for(|asked| *asked > 3).await.unwrap();
    running.publish(vec![Published::new(&settings("10.1.0.0/16"))]);
    assert_eq!(discovery.next().await.unwrap().changes, [Change::Set(settings("10.1.0.0/16"))], "it goes on");
    *running.control.revoked.lock().unwrap() = true;
    let ended = discovery.next().await.unwrap_err();
    assert!(matches!(&ended, ClientError::Outdated { because, .. } if because.contains("any more")), "{ended}");
    running.stop().await;
}

#[tokio::test]
async fn certificates_are_asked_for_by_identity() {
    let authority = Authority::new("cluster.local");
    let (running, _files, connected) = connected(&authority).await;
    let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let chain = connected.certify("a request", &id, Duration::from_secs(3600)).await.unwrap();
    assert_eq!(chain, ["leaf", "root"]);
    let asked_for = running.control.asked_for.lock().unwrap().take().unwrap();
    assert_eq!((asked_for.csr.as_str(), asked_for.identity.as_str()), ("a request", id.as_str()));
    assert_eq!(asked_for.validity_seconds, 3600);
    let other = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
    let refused = connected.certify("a request", &other, Duration::from_secs(3600)).await.unwrap_err();
    assert!(matches!(&refused, ClientError::Refused { because, .. } if because == "no such pod runs there"));
    let too_long = "x".repeat(100_000);
    assert!(connected.certify(&too_long, &id, Duration::from_secs(1)).await.is_err());
    running.stop().await;
}

#[tokio::test]
async fn captures_are_reported_wholly_and_confirmed_one_by_one() {
    let authority = Authority::new("cluster.local");
    let (running, _files, connected) = connected(&authority).await;
    let pods = |names: &[&str]| names.iter().map(|name| PodUid::from(*name)).collect::<BTreeSet<_>>();
    let reported = watch::Sender::new(Report::from(pods(&["a"])));
    let mut captures = connected.report_captures(reported.subscribe()).await.unwrap();
    assert_eq!(captures.next().await.unwrap(), pods(&["a"]));
    reported.send_replace(pods(&["a", "b"]).into());
    reported.send_replace(pods(&["b", "c"]).into());
    assert_eq!(captures.next().await.unwrap(), pods(&["b", "c"]));
    assert_eq!(*running.control.reported.borrow(), pods(&["b", "c"]).into());
    let failed = Report { captured: pods(&["b"]), failed: [("d".into(), CaptureFailure::NoProxy)].into() };
    reported.send_replace(failed.clone());
    assert_eq!(captures.next().await.unwrap(), pods(&["b"]));
    assert_eq!(*running.control.reported.borrow(), failed);
    reported.send_replace(pods(&["b"]).into());
    captures.next().await.unwrap();
    assert!(running.control.reported.borrow().failed.is_empty(), "it is told that a failure is over");
    drop(reported);
    assert!(matches!(captures.next().await, Err(ClientError::Lost { .. })));
    running.stop().await;
}

#[tokio::test]
async fn a_token_that_is_nobodys_is_refused_by_every_call() {
    let authority = Authority::new("cluster.local");
    let running = Running::start(&authority).await;
    let files = Files::new(&authority);
    files.write("token", "another-token");
    let connected = files.control_plane(running.address).connect().await.unwrap();
    let mut discovery = connected.discover(KINDS, Known::default()).await.unwrap();
    let refused = discovery.next().await.unwrap_err();
    assert!(matches!(refused, ClientError::TokenRefused { .. }), "{refused}");
    let expected = format!("the control plane at {} refuses the token: this token is nobody's", running.address);
    assert_eq!(refused.to_string(), expected);
    let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let refused = connected.certify("a request", &id, Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(refused, ClientError::TokenRefused { .. }), "{refused}");
    let reported = watch::Sender::new(Report::default());
    let mut captures = connected.report_captures(reported.subscribe()).await.unwrap();
    let refused = captures.next().await.unwrap_err();
    assert!(matches!(refused, ClientError::TokenRefused { .. }), "{refused}");
    assert!(running.control.heard.borrow().is_empty(), "nothing a stranger says is read");
    running.stop().await;
}

#[tokio::test]
async fn whoever_is_not_the_control_plane_is_not_believed() {
    let authority = Authority::new("cluster.local");
    let stranger = Authority::new("cluster.local");
    let files = Files::new(&authority);
    let impostors = [
        (&stranger, CONTROL),
        (&authority, "spiffe://cluster.local/ns/shop/sa/justmtls-control"),
        (&authority, "spiffe://cluster.local/ns/justmtls-system/sa/web"),
    ];
    for (authority, id) in impostors {
        let running = Running::start_as(authority, id).await;
        let error = files.control_plane(running.address).connect().await.err().unwrap();
        assert!(matches!(error, ClientError::Certificate { .. }), "{id}: {error}");
        running.stop().await;
    }
    let foreign = Authority::new("elsewhere");
    let running = Running::start_as(&foreign, "spiffe://elsewhere/ns/justmtls-system/sa/justmtls-control").await;
    assert!(files.control_plane(running.address).connect().await.is_err());
    // And the same one is believed under its own bundle: files are read anew at each connect.
    files.write("bundle.pem", &foreign.bundle.to_pem());
    assert!(files.control_plane(running.address).connect().await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_files_and_addresses_is_one_sentence() {
    let authority = Authority::new("cluster.local");
    let files = Files::new(&authority);
    // A port on which nobody listens: bound and let go.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let plane = files.control_plane(address);
    let error = || async { plane.connect().await.err().unwrap() };
    assert_eq!(error().await.as_str(), "unreachable");
    assert!(error().await.to_string().starts_with(&format!("the control plane at {address} does not answer: ")));
    let two = [&authority, &Authority::new("elsewhere")].map(|authority| authority.bundle.to_pem()).concat();
    files.write("bundle.pem", &two);
    assert_eq!(error().await.as_str(), "no-trust-domain");
    files.write("bundle.pem", "nothing");
    assert_eq!(error().await.as_str(), "bundle");
    files.remove("bundle.pem");
    assert_eq!(error().await.as_str(), "bundle-file");
    for token in ["", " \n", "with\u{7}bell", &"x".repeat(10_000)] {
        files.write("token", token);
        assert_eq!(error().await.as_str(), "token-file");
    }
    files.remove("token");
    assert_eq!(error().await.as_str(), "token-file");
}

#[tokio::test]
async fn a_stranger_without_tls_harms_nobody_and_is_noted() {
    let authority = Authority::new("cluster.local");
    let (running, files, connected) = connected(&authority).await;
    let mut strangers = running.control.turned_away.subscribe();
    let mut stranger = TcpStream::connect(running.address).await.unwrap();
    let address = stranger.local_addr().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert or a reset: the connection has ended.
    let _ = stranger.read_to_end(&mut answer).await;
    assert!(answer.len() < 100);
    assert_eq!(*strangers.wait_for(|noted| noted.len() == 1).await.unwrap(), [(address, TurnedAway::NotTls)]);
    // One that says nothing and goes, and one that does not believe the certificate.
    drop(TcpStream::connect(running.address).await.unwrap());
    strangers.wait_for(|noted| noted.len() == 2 && noted[1].1 == TurnedAway::Ended).await.unwrap();
    files.write("bundle.pem", &Authority::new("cluster.local").bundle.to_pem());
    assert!(files.control_plane(running.address).connect().await.is_err());
    strangers.wait_for(|noted| noted.len() == 3 && noted[2].1 == TurnedAway::Handshake).await.unwrap();
    assert!(connected.discover(KINDS, Known::default()).await.unwrap().next().await.is_ok());
    running.stop().await;
}

#[test]
fn a_token_is_not_shown() {
    let caller = wire::server::Caller { token: "secret".to_owned(), address: "10.0.0.1:4".parse().unwrap() };
    assert_eq!(format!("{caller:?}"), "Caller(10.0.0.1:4)");
}
