//! Two replicas on one API server: one that is played, over the client that nodes use.

use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use mesh::Speaks;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use wire::report::{CaptureFailure, Report};

use super::*;
use crate::kubernetes::fake::Fake;

const ACCOUNT: &str = "system:serviceaccount:justmtls-system:justmtls-node";
const POD: &str = "/api/v1/namespaces/shop/pods/web";
const RECORD: &str = "/api/v1/namespaces/justmtls-system/configmaps/justmtls-captured-node-a";

struct Replica {
    address: SocketAddr,
    events: mpsc::Sender<Event>,
    running: JoinHandle<anyhow::Result<()>>,
}

/// A cluster with a pod `web` on node-a, and files for clients and replicas.
struct Cluster {
    fake: Fake,
    directory: TempDir,
    clock: Clock,
}

impl Cluster {
    fn new() -> Self {
        let fake = Fake::default();
        let pod = json!({
            "metadata": { "uid": "uid-web" },
            "spec": { "nodeName": "node-a", "serviceAccountName": "web", "containers": [] },
            "status": { "phase": "Running", "podIPs": [{ "ip": "10.88.16.5" }] },
        });
        fake.put(POD, pod);
        for node in ["node-a", "node-b"] {
            fake.put(
                &format!("/api/v1/nodes/{node}"),
                json!({ "metadata": {}, "spec": { "podCIDRs": ["10.88.0.0/16"] } }),
            );
        }
        // A token says who it is of; the API server vouches for all of them.
        fake.review_by(|spec| {
            let claims = spec["token"].as_str().unwrap().split('.').nth(1).unwrap();
            let claims: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
            let extra = json!({
                "authentication.kubernetes.io/node-name": [claims["node"]],
                "authentication.kubernetes.io/pod-uid": ["uid-node"],
            });
            let user = json!({ "username": ACCOUNT, "extra": extra });
            json!({ "authenticated": true, "audiences": [claims["aud"]], "user": user })
        });
        Self { fake, directory: TempDir::new().unwrap(), clock: Clock::default() }
    }

    async fn replica(&self, name: &str) -> Replica {
        self.replica_over(&self.fake, name).await
    }

    async fn replica_over(&self, way: &Fake, name: &str) -> Replica {
        let files = args(self.directory.path(), Duration::from_secs(3600));
        let admin = self.directory.path().join(name);
        let args = Args { kubernetes: true, identity: name.to_owned(), admin, ..files };
        let client = way.client();
        let started = Control::start_with(&client, &args, self.clock.clone());
        let control = timeout(LONG, started).await.expect("it does not start").unwrap();
        let (address, events) = (control.address, control.sender.clone());
        Replica { address, events, running: tokio::spawn(control.run()) }
    }

    /// What a node mounts: the roots that the leader has published.
    async fn bundle(&self) -> std::path::PathBuf {
        let path = "/api/v1/namespaces/justmtls-system/configmaps/justmtls-trust-bundle";
        let published = until(|| self.fake.get(path)).await;
        let file = self.directory.path().join("bundle.pem");
        fs::write(&file, published["data"]["bundle.pem"].as_str().unwrap()).unwrap();
        file
    }

    /// A client of a replica with a token of one node, that says to be on another one, or the same.
    async fn client(&self, replica: &Replica, role: Role, node: &str, says: &str) -> ControlPlane {
        let claims = json!({
            "exp": self.clock.now().as_secs() + 3600,
            "sub": ACCOUNT,
            "aud": format!("justmtls.dev/{}", role.as_str()),
            "node": node,
        });
        let token_file = self.directory.path().join(format!("{}-{node}.token", role.as_str()));
        fs::write(&token_file, format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()))).unwrap();
        ControlPlane {
            address: replica.address,
            bundle_file: self.bundle().await,
            token_file,
            node: says.to_owned(),
            role,
            time: Arc::new(self.clock.clone()),
        }
    }

    async fn proxy(&self, replica: &Replica) -> Watched {
        let connected = self.client(replica, Role::Proxy, "node-a", "node-a").await.connect().await.unwrap();
        Watched::open(&connected, WITH_HEARTBEAT, Known::default()).await
    }
}

impl Replica {
    async fn stop(self) {
        for _ in 0..2 {
            let _ = self.events.send(Event::Terminate).await;
        }
        timeout(LONG, self.running).await.unwrap().unwrap().unwrap();
    }
}

/// Looks until something is there.
async fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, looking).await.expect("it never is")
}

fn captures(uids: &[&str]) -> Report {
    uids.iter().map(|uid| PodUid::from(*uid)).collect::<BTreeSet<_>>().into()
}

fn speaks(watched: &Watched) -> Option<Speaks> {
    watched.workload("web").map(|workload| workload.speaks)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_hears_both_publish_and_neither_forgets() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.replica("one").await, cluster.replica("two").await);
    let (mut at_one, mut at_two) = (cluster.proxy(&one).await, cluster.proxy(&two).await);
    assert_eq!((speaks(&at_one), speaks(&at_two)), (Some(Speaks::Nothing), Some(Speaks::Nothing)));

    let agent = cluster.client(&two, Role::Agent, "node-a", "node-a").await.connect().await.unwrap();
    let (_captured, watched) = tokio::sync::watch::channel(captures(&["uid-web"]));
    let mut reports = agent.report_captures(watched).await.unwrap();
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    assert_eq!(cluster.fake.get(RECORD).unwrap()["data"]["pods"], "uid-web\n", "it is written before it is confirmed");
    at_one.until(|watched| speaks(watched) == Some(Speaks::JustMtls)).await;
    at_two.until(|watched| speaks(watched) == Some(Speaks::JustMtls)).await;

    one.stop().await;
    two.stop().await;
    let next = cluster.replica("next").await;
    assert_eq!(speaks(&cluster.proxy(&next).await), Some(Speaks::JustMtls), "before any agent is back");
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_says_to_be_on_another_node_than_its_token_is_not_served() {
    let cluster = Cluster::new();
    let replica = cluster.replica("one").await;
    let connected = cluster.client(&replica, Role::Proxy, "node-a", "node-b").await.connect().await.unwrap();
    let mut stream = connected.discover(PROXY_KINDS, Known::default()).await.unwrap();
    let error = loop {
        match timeout(LONG, stream.next()).await.expect("nothing comes") {
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("the token is of the proxy of node node-a"), "{error}");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_away_everything_known_is_served() {
    let cluster = Cluster::new();
    let replica = cluster.replica("one").await;
    // With one token all the time: another one, of another second, nobody could vouch for.
    let connected = cluster.client(&replica, Role::Proxy, "node-a", "node-a").await;
    let before = Watched::open(&connected.connect().await.unwrap(), PROXY_KINDS, Known::default()).await;
    assert_eq!(before.view.workloads().count(), 1);
    drop(before);
    cluster.fake.fail_with(Some(503));
    cluster.fake.cut();
    cluster.clock.advance(Duration::from_secs(600));
    let again = Watched::open(&connected.connect().await.unwrap(), PROXY_KINDS, Known::default()).await;
    assert_eq!(again.view.workloads().count(), 1);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_be_enforced_says_so_in_its_status_until_it_can() {
    let cluster = Cluster::new();
    let path = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies/by-path";
    let rules = json!([{ "to": [{ "operation": { "paths": ["/admin"] } }] }]);
    cluster.fake.put(
        path,
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {},
            "spec": { "action": "DENY", "rules": rules },
            "status": { "conditions": [{ "type": "Other", "status": "True" }] },
        }),
    );
    let replica = cluster.replica("one").await;
    let ours = || {
        let conditions = cluster.fake.get(path)?["status"]["conditions"].as_array()?.clone();
        Some((conditions.len(), conditions.into_iter().find(|condition| condition["type"] != "Other")))
    };
    let condition = until(|| ours()?.1).await;
    assert_eq!((&condition["type"], &condition["status"]), (&json!("justmtls.dev/Enforced"), &json!("False")));
    assert!(condition["message"].as_str().unwrap().contains("paths"), "{condition}");
    let writes = cluster.fake.writes_to(path);
    cluster.fake.change(path, |policy| policy["metadata"]["labels"] = json!({ "touched": "yes" }));
    cluster.fake.change(path, |policy| policy["spec"]["rules"] = json!([]));
    until(|| ours().filter(|(count, ours)| *count == 1 && ours.is_none())).await;
    assert!(cluster.fake.writes_to(path) <= writes + 2, "a status is written where it changes");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_cannot_be_read_or_have_no_effect_say_so_in_their_status() {
    let cluster = Cluster::new();
    let path = |name: &str| format!("/apis/security.istio.io/v1/namespaces/shop/peerauthentications/{name}");
    let put = |name: &str, created: &str, mode: &str| {
        let metadata = json!({ "creationTimestamp": created });
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata,
            "spec": { "mtls": { "mode": mode } },
        });
        cluster.fake.put(&path(name), policy);
    };
    put("oldest", "2026-11-30T06:00:00Z", "PERMISSIVE");
    put("later", "2026-11-30T06:00:01Z", "STRICT");
    put("broken", "2026-11-30T06:00:02Z", "MAYBE");
    let replica = cluster.replica("one").await;
    let ours = |name| Some(cluster.fake.get(&path(name))?["status"]["conditions"].as_array()?.first()?.clone());
    let later = until(|| ours("later")).await;
    assert_eq!(later["status"], "True");
    let is_shadowed = |condition: &Value| condition["message"].as_str().unwrap().contains("has no effect: shop/oldest");
    assert!(is_shadowed(&later), "{later}");
    let broken = until(|| ours("broken")).await;
    assert_eq!(broken["status"], "False");
    assert!(broken["message"].as_str().unwrap().contains("MAYBE") && is_shadowed(&broken), "{broken}");
    assert_eq!(ours("oldest"), None);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_run_and_cannot_be_captured_have_events_and_others_have_none() {
    let cluster = Cluster::new();
    let allows = json!({ "justmtls.dev/allow-opt-out": "true" });
    cluster.fake.put("/api/v1/namespaces/shop", json!({ "metadata": { "labels": allows } }));
    let put = |name: &str, node: &str, address: &str, container: &str, labels: Value| {
        let pod = json!({
            "metadata": { "uid": format!("uid-{name}"), "labels": labels },
            "spec": { "nodeName": node, "hostNetwork": name == "host", "containers": [{ "name": container }] },
            "status": { "phase": "Running", "podIPs": [{ "ip": address }] },
        });
        cluster.fake.put(&format!("/api/v1/namespaces/shop/pods/{name}"), pod);
    };
    put("foreign", "node-b", "10.88.17.1", "istio-proxy", json!({}));
    put("out", "node-a", "10.88.16.6", "istio-proxy", json!({ "justmtls.dev/mode": "off" }));
    put("host", "node-a", "10.88.0.1", "istio-proxy", json!({}));
    put("far", "node-b", "10.88.17.2", "main", json!({}));
    put("captured", "node-a", "10.88.16.7", "main", json!({}));
    let began = Instant::now();
    let (one, two) = (cluster.replica("one").await, cluster.replica("two").await);
    cluster.bundle().await;

    // To the one that does not lead, of all that it knows; of its own node and to be captured is one of them.
    let link = cluster.client(&two, Role::Agent, "node-a", "node-a").await.connect().await.unwrap();
    let _agent = Watched::open(&link, &[Kind::NodePod], Known::default()).await;
    let mut report = captures(&["uid-captured"]);
    for name in ["web", "out", "host", "far", "captured", "nobody"] {
        report.failed.insert(PodUid::from(format!("uid-{name}").as_str()), CaptureFailure::NoInterface);
    }
    let (_reported, watched) = tokio::sync::watch::channel(report);
    let mut reports = link.report_captures(watched).await.unwrap();
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    let written = || {
        let events = cluster.fake.all_below("/api/v1/namespaces/shop/events/");
        (events.len() > 2).then_some(events)
    };
    let events = until(written).await;
    assert!(began.elapsed() >= Duration::from_secs(10), "they may only be late");
    let said: BTreeSet<_> = events
        .iter()
        .map(|event| (event["involvedObject"]["uid"].to_string(), event["message"].as_str().unwrap().to_owned()))
        .collect();
    let said: Vec<_> = said.into_iter().collect();
    let [(damaged, how), (foreign, because), (web, why)] = &said[..] else { panic!("three: {events:?}") };
    assert_eq!([damaged, foreign, web], ["\"uid-captured\"", "\"uid-foreign\"", "\"uid-web\""]);
    assert!(how.contains("no-interface"), "{how}");
    assert!(because.contains("not-capturable: its packets are Istio's"), "{because}");
    assert!(why.contains("no-interface") && why.ends_with("(node node-a)"), "{why}");

    one.stop().await;
    two.stop().await;
    assert_eq!(cluster.fake.all_below("/api/v1/namespaces/shop/events/").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_watches_lag_takes_back_nothing_that_another_one_told() {
    let cluster = Cluster::new();
    let slow = cluster.fake.another_way();
    let (one, two) = (cluster.replica("one").await, cluster.replica_over(&slow, "two").await);
    let policy = "/apis/security.istio.io/v1/namespaces/shop/peerauthentications/default";
    let set = |mode: &str| {
        let spec = json!({ "mtls": { "mode": mode } });
        cluster.fake.put(
            policy,
            json!({ "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {}, "spec": spec }),
        );
    };
    let is_strict =
        |watched: &Watched| watched.workload("web").is_some_and(|it| it.modes.default == mesh::Mode::Strict);
    let at = async |replica| cluster.client(replica, Role::Proxy, "node-a", "node-a").await.connect().await.unwrap();

    slow.hold_up(true);
    set("STRICT");
    let mut node = cluster.proxy(&one).await;
    timeout(LONG, node.until(is_strict)).await.expect("it is not told");
    // What it was told counts when it is answered, which the next call does.
    timeout(LONG, node.until(|watched| watched.beats.len() > 1)).await.expect("no heartbeat");
    let known = node.stream.known().clone();
    assert!(known.position().to_string().contains("PeerAuthentication="), "{}", known.position());
    let mut refused = at(&two).await.discover(PROXY_KINDS, known.clone()).await.unwrap();
    let error = timeout(LONG, refused.next()).await.expect("nothing comes").unwrap_err().to_string();
    assert!(error.contains("this replica knows PeerAuthentication objects up to version"), "{error}");
    // Who was told nothing yet has nothing that could be taken back.
    assert!(!is_strict(&cluster.proxy(&two).await));

    slow.hold_up(false);
    let mut fresh = cluster.proxy(&two).await;
    timeout(LONG, fresh.until(is_strict)).await.expect("it is not told");
    let mut again = at(&two).await.discover(PROXY_KINDS, known).await.unwrap();
    timeout(LONG, again.next()).await.expect("nothing comes").unwrap();

    // Nobody is refused for ever where the API server itself has forgotten.
    slow.hold_up(true);
    set("PERMISSIVE");
    timeout(LONG, node.until(|watched| !is_strict(watched))).await.expect("it is not told");
    let beats = node.beats.len();
    timeout(LONG, node.until(|watched| watched.beats.len() > beats + 1)).await.expect("no heartbeat");
    cluster.fake.set_back();
    let mut again = at(&two).await.discover(PROXY_KINDS, node.stream.known().clone()).await.unwrap();
    timeout(LONG, again.next()).await.expect("nothing comes").unwrap();
    one.stop().await;
    two.stop().await;
}

/// Opts the pod's namespace out, or in again.
fn label(fake: &Fake, mode: &str) {
    fake.put("/api/v1/namespaces/shop", json!({ "metadata": { "labels": { "justmtls.dev/mode": mode } } }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_leaves_at_both_replicas_is_released_by_the_one_with_its_agent_and_comes_back_by_the_record() {
    let cluster = Cluster::new();
    let settings = "/api/v1/namespaces/justmtls-system/configmaps/justmtls";
    cluster.fake.put(settings, json!({ "metadata": {}, "data": { "viewLifetime": "1s" } }));
    let (one, two) = (cluster.replica("one").await, cluster.replica("two").await);
    let agent_link = cluster.client(&two, Role::Agent, "node-a", "node-a").await.connect().await.unwrap();
    let (captured, watched) = tokio::sync::watch::channel(captures(&["uid-web"]));
    let mut reports = agent_link.report_captures(watched).await.unwrap();
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    let mut agent = Watched::open(&agent_link, &[Kind::NodePod], Known::default()).await;
    let (mut at_one, mut at_two) = (cluster.proxy(&one).await, cluster.proxy(&two).await);
    timeout(LONG, at_one.until(|watched| speaks(watched) == Some(Speaks::JustMtls))).await.expect("it is not told");
    let recorded = || cluster.fake.get(RECORD).unwrap()["data"]["pods"] == "uid-web\n";
    assert!(recorded());

    // Taken back before its release, it is captured again when the record names it.
    label(&cluster.fake, "off");
    timeout(LONG, at_one.until(|watched| speaks(watched) == Some(Speaks::Nothing))).await.expect("it is not told");
    timeout(LONG, at_two.until(|watched| speaks(watched) == Some(Speaks::Nothing))).await.expect("it is not told");
    until(|| (!recorded()).then_some(())).await;
    label(&cluster.fake, "on");
    timeout(LONG, at_one.until(|watched| speaks(watched) == Some(Speaks::JustMtls))).await.expect("it is not told");
    timeout(LONG, at_two.until(|watched| speaks(watched) == Some(Speaks::JustMtls))).await.expect("it is not told");
    // Who hears of the namespace before it hears of the record goes by the record as it was.
    until(|| recorded().then_some(())).await;

    // A report of something else does not bring it back into the record.
    label(&cluster.fake, "off");
    until(|| (!recorded()).then_some(())).await;
    captured.send_replace(captures(&["uid-web", "uid-new"]));
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    assert_eq!(cluster.fake.get(RECORD).unwrap()["data"]["pods"], "uid-new\n");
    let reading = [at_one, at_two].map(super::leaving::keep_reading);
    let is_released = |agent: &Watched| agent.node_pods[&PodUid::from("uid-web")].release;
    timeout(LONG, agent.until(is_released)).await.expect("it is not released");

    // Let go by its agent, and captured again.
    captured.send_replace(captures(&["uid-new"]));
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    label(&cluster.fake, "on");
    timeout(
        LONG,
        agent.until(|agent| agent.node_pods[&PodUid::from("uid-web")].capture.is_ok() && !is_released(agent)),
    )
    .await
    .expect("it is not told");
    assert_eq!(speaks(&cluster.proxy(&one).await), Some(Speaks::Nothing), "its agent has not said so");
    captured.send_replace(captures(&["uid-web", "uid-new"]));
    timeout(LONG, reports.next()).await.expect("no confirmation").unwrap();
    let mut again = cluster.proxy(&one).await;
    timeout(LONG, again.until(|watched| speaks(watched) == Some(Speaks::JustMtls))).await.expect("it is not told");
    for reading in reading {
        reading.abort();
    }
    one.stop().await;
    two.stop().await;
}
