//! Who may call, and certificates.

use identity::chain::Chain;
use identity::csr::CertificateRequest;
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle};
use wire::client::{ClientError, Role};

use super::*;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

async fn certify(connected: &Connected, csr: &str, id: &str) -> Result<Vec<String>, ClientError> {
    let id: SpiffeId = id.parse().unwrap();
    timeout(LONG, connected.certify(csr, &id, Duration::from_secs(600))).await.unwrap()
}

fn csr(key: &PrivateKey) -> String {
    CertificateRequest::new(key).unwrap().as_pem().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_gets_a_certificate_that_peers_accept() {
    let bed = Bed::start().await;
    let key = PrivateKey::generate().unwrap();
    let texts = certify(&bed.connect(Role::Proxy, "node-a").await, &csr(&key), WEB).await.unwrap();
    let bundle = fs::read_to_string(bed.path().join("bundle.pem")).unwrap();
    assert_eq!(texts.last(), Some(&bundle));
    let bundle = TrustBundle::from_pem("cluster.local".parse().unwrap(), &bundle).unwrap();
    let chain = Chain::from_pem(&texts.concat()).unwrap();
    let svid = Svid::assemble(key, chain, &bundle, &WEB.parse().unwrap(), bed.clock.now()).unwrap();
    assert!(svid.not_after().as_secs() <= bed.clock.now().as_secs() + 600);
    assert!(bed.admin("/metrics").await.contains("justmtls_control_certificates_total{outcome=\"issued\"} 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_of_a_certificate_is_named_and_counted() {
    let bed = Bed::start().await;
    let csr = csr(&PrivateKey::generate().unwrap());
    let large = csr.clone() + &" ".repeat(20 * 1024);
    let db = WEB.replace("sa/web", "sa/db");
    let nobody = WEB.replace("sa/web", "sa/nobody");
    let foreign = WEB.replace("cluster.local", "example.org");
    for (role, node, csr, id, name) in [
        (Role::Agent, "node-a", csr.as_str(), WEB, "wrong-role"),
        (Role::Proxy, "node-b", &csr, WEB, "not-on-this-node"),
        (Role::Proxy, "node-a", &csr, &db, "not-on-this-node"),
        (Role::Proxy, "node-a", &csr, &nobody, "not-on-this-node"),
        (Role::Proxy, "node-a", &csr, &foreign, "foreign-trust-domain"),
        (Role::Proxy, "node-a", &large, WEB, "bad-request"),
        (Role::Proxy, "node-a", "no request", WEB, "bad-request"),
    ] {
        let error = certify(&bed.connect(role, node).await, csr, id).await.unwrap_err().to_string();
        assert!(error.contains(name), "{name}: {error}");
        let counted = format!("justmtls_control_certificates_total{{outcome=\"{name}\"}}");
        assert!(bed.admin("/metrics").await.contains(&counted), "{name}");
    }
    // The twin that succeeds.
    assert!(certify(&bed.connect(Role::Proxy, "node-a").await, &csr, WEB).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_follows_the_pod() {
    let bed = Bed::start().await;
    let csr = csr(&PrivateKey::generate().unwrap());
    let proxy = bed.connect(Role::Proxy, "node-a").await;
    let mut agent = bed.agent("node-a").await;
    let home = pod("web", "node-a", 5, "web");
    let is_home = |agent: &Watched| agent.node_pods.values().any(|pod| pod.capture.is_ok());
    for gone in [
        home.replace("Running", "Succeeded"),
        home.replace("nodeName", "hostNetwork: true, nodeName"),
        home.replace("node-a", "node-b"),
    ] {
        assert!(certify(&proxy, &csr, WEB).await.is_ok());
        bed.put("web", &gone);
        agent.until(|agent| !is_home(agent)).await;
        let error = certify(&proxy, &csr, WEB).await.unwrap_err().to_string();
        assert!(error.contains("not-on-this-node"), "{error}");
        bed.put("web", &home);
        agent.until(is_home).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_nobodys_may_call_nothing() {
    let bed = Bed::start().await;
    let mut client = bed.client(Role::Proxy, "node-a");
    client.token_file = bed.path().join("stranger");
    fs::write(&client.token_file, "a-token-that-nobody-gave-out").unwrap();
    let connected = client.connect().await.unwrap();
    let refused = |error: ClientError| {
        assert!(matches!(error, ClientError::TokenRefused { .. }), "{error}");
        assert!(error.to_string().contains("the token is not one that the control plane knows"), "{error}");
    };
    refused(certify(&connected, &csr(&PrivateKey::generate().unwrap()), WEB).await.unwrap_err());
    let mut stream = connected.discover(PROXY_KINDS, Known::default()).await.unwrap();
    refused(timeout(LONG, stream.next()).await.unwrap().err().unwrap());
    let (_captured, watched) = tokio::sync::watch::channel(wire::report::Report::default());
    let mut reports = connected.report_captures(watched).await.unwrap();
    refused(timeout(LONG, reports.next()).await.unwrap().err().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_strangers_is_counted_and_said_and_a_node_of_the_same_address_is_served() {
    const MORE_THAN_A_FEW: usize = 300;
    let bed = Bed::start().await;
    assert!(!bed.admin("/problems").await.contains("connections of strangers"));
    let mut flood = Vec::new();
    for _ in 0..crate::server::bounds().strangers_of_source + MORE_THAN_A_FEW {
        flood.push(tokio::net::TcpStream::connect(bed.address).await.unwrap());
    }
    let said = "more than 100 in the last minute, most from 127.0.0.1";
    bed.admin_until("/problems", |problems| problems.contains(said)).await;
    let counted = "justmtls_control_refused_connections_total{outcome=\"too-many-of-source\"}";
    assert!(bed.admin("/metrics").await.contains(counted));
    // Whoever came first has gone; the newest are still waited for.
    use tokio::io::AsyncReadExt;
    assert!(!matches!(timeout(LONG, flood[0].read(&mut [0])).await.unwrap(), Ok(1..)));
    assert!(bed.proxy("node-a").await.workload("web").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_taken_out_of_the_file_stops_counting() {
    let bed = Bed::start().await;
    let proxy = bed.connect(Role::Proxy, "node-a").await;
    let csr = csr(&PrivateKey::generate().unwrap());
    assert!(certify(&proxy, &csr, WEB).await.is_ok());
    fs::write(bed.path().join("next"), "agent-token-of-node-a,agent,node-a\n").unwrap();
    fs::rename(bed.path().join("next"), bed.path().join("tokens")).unwrap();
    assert!(matches!(certify(&proxy, &csr, WEB).await, Err(ClientError::TokenRefused { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_under_another_root_is_not_believed() {
    let (bed, other) = (Bed::start().await, Bed::start().await);
    let mut client = bed.client(Role::Proxy, "node-a");
    client.bundle_file = other.path().join("bundle.pem");
    assert!(matches!(client.connect().await.err(), Some(ClientError::Certificate { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_certificate_is_renewed_before_it_ends() {
    let bed = Bed::start_with(Duration::from_secs(1000)).await;
    let client = bed.client(Role::Proxy, "node-a");
    assert!(client.connect().await.is_ok());
    bed.clock.advance(Duration::from_secs(700));
    bed.events.send(Event::LookAtClock).await.unwrap();
    bed.admin("/readyz").await;
    // The first certificate is over by now, and the second is not.
    bed.clock.advance(Duration::from_secs(700));
    assert!(client.connect().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_the_roots() {
    let bed = Bed::start().await;
    let before = fs::read_to_string(bed.path().join("bundle.pem")).unwrap();
    bed.events.send(Event::Terminate).await.unwrap();
    timeout(LONG, bed.running).await.unwrap().unwrap().unwrap();
    fs::remove_file(bed.directory.path().join("bundle.pem")).unwrap();
    let again = Control::start(&args(bed.directory.path(), Duration::from_secs(3600)), Clock::default()).await.unwrap();
    assert_eq!(fs::read_to_string(bed.directory.path().join("bundle.pem")).unwrap(), before);
    drop(again);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_cannot_start_with_is_one_sentence() {
    let directory = TempDir::new().unwrap();
    fs::create_dir(directory.path().join("objects")).unwrap();
    fs::write(directory.path().join("tokens"), tokens()).unwrap();
    let start =
        |args: Args| async move { format!("{:#}", Control::start(&args, Clock::default()).await.err().unwrap()) };
    let good = || args(directory.path(), Duration::from_secs(60));
    let error = start(Args { objects: Some(directory.path().join("none")), ..good() }).await;
    assert!(error.contains("none") && error.contains("--objects"), "{error}");
    let error = start(Args { tokens: Some(directory.path().join("none")), ..good() }).await;
    assert!(error.contains("--tokens"), "{error}");
    let error = start(Args { ca: Some(directory.path().join("tokens")), ..good() }).await;
    assert!(error.contains("not a directory"), "{error}");
    let config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: justmtls-system, name: justmtls}\n\
                  data: {trustDomain: \"a b\"}\n";
    put(directory.path(), "mesh", config);
    let error = start(good()).await;
    assert!(error.contains("a b is not a trust domain"), "{error}");
}
