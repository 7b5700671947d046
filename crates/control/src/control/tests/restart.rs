//! What nodes are told by a control plane that has just started, after another one.

use std::collections::BTreeSet;
use std::time::Instant;

use mesh::{Mode, Speaks, Uncaptured};
use tokio::sync::watch;
use wire::client::{ClientError, Role};
use wire::discovery::Known;
use wire::report::Report;

use super::*;

/// A number of the metrics page.
async fn metric(bed: &Bed, name: &str) -> u64 {
    let page = bed.admin("/metrics").await;
    let line = page.lines().find_map(|line| line.strip_prefix(&format!("justmtls_control_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).trim().parse().unwrap()
}

impl Watched {
    /// Reads until everything was accepted, and gives what the next stream begins with.
    async fn read_all(mut self) -> Known {
        self.until(|watched| !watched.beats.is_empty()).await;
        self.stream.known().clone()
    }
}

async fn report_captured(bed: &Bed, node: &str, pods: &[&str]) {
    let uids: BTreeSet<_> = pods.iter().map(|uid| PodUid::from(*uid)).collect();
    let (_captured, watched) = watch::channel(Report::from(uids));
    let mut reports = bed.connect(Role::Agent, node).await.report_captures(watched).await.unwrap();
    timeout(LONG, reports.next()).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_that_changes_nothing_tells_nothing_anew() {
    let mut bed = Bed::start().await;
    report_captured(&bed, "node-a", &["uid-web"]).await;
    let first = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, Known::default()).await;
    assert_eq!(first.workload("web").unwrap().speaks, Speaks::JustMtls);
    let known = first.read_all().await;
    bed.stop().await;
    bed.start_again().await;

    // No agent has reported yet: what the one before it was told counts on.
    let fresh = bed.proxy("node-b").await;
    assert_eq!(fresh.workload("web").unwrap().speaks, Speaks::JustMtls, "T47, for whoever asks anew");
    assert_eq!(fresh.workload("db").unwrap().uncaptured, Some(Uncaptured::Pending));
    let before = metric(&bed, "resources_sent_total").await;
    let back = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, known.clone()).await;
    assert_eq!(back.batches.iter().map(|(_, changes)| changes).sum::<usize>(), back.beats.len(), "{:?}", back.batches);
    report_captured(&bed, "node-a", &["uid-web"]).await;
    assert_eq!(metric(&bed, "resources_sent_total").await, before);

    // Of what changed while there was none, that alone comes, removals too.
    drop(back);
    bed.stop().await;
    fs::remove_file(bed.path().join("objects/db.yaml")).unwrap();
    bed.put("api", &pod("api", "node-a", 7, "api"));
    bed.start_again().await;
    let back = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, known).await;
    assert!(back.workload("api").is_some());
    assert_eq!(metric(&bed, "resources_sent_total").await, 2, "one pod more, and one less");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_cannot_read_what_the_one_before_could_tells_nothing_until_it_can() {
    let mut bed = Bed::start().await;
    bed.put("strict", strict());
    let mut proxy = bed.proxy("node-a").await;
    proxy.until(|proxy| proxy.workload("db").is_some_and(|db| db.modes.at(80) == Mode::Strict)).await;
    let known = proxy.stream.known().clone();
    bed.stop().await;
    drop(proxy);
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: s}\nspec: {ports: [{port: 70000}]}\n";
    for broken in ["no: [yaml", service] {
        bed.put("strict", broken);
        bed.start_again().await;
        let connected = bed.connect(Role::Proxy, "node-a").await;
        let refused = match connected.discover(PROXY_KINDS, known.clone()).await {
            Ok(mut stream) => timeout(LONG, stream.next()).await.unwrap().err().unwrap(),
            Err(error) => error,
        };
        assert!(matches!(refused, ClientError::Lost { .. }), "{refused}");
        assert!(refused.to_string().contains("strict.yaml could not be read"), "{refused}");
        let ready: serde_json::Value = serde_json::from_str(&bed.admin("/readyz").await).unwrap();
        assert_eq!(ready["ready"], false, "{ready}");
        // Certificates go on: a pod that is known is who it is.
        let csr = identity::csr::CertificateRequest::new(&identity::PrivateKey::generate().unwrap()).unwrap();
        let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!(connected.certify(csr.as_pem(), &id, Duration::from_secs(60)).await.unwrap().len(), 3);
        bed.stop().await;
    }
    bed.start_again().await;
    bed.put("strict", strict());
    bed.admin_until("/readyz", |shown| shown.contains("\"ready\":true")).await;
    let back = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, Known::default()).await;
    assert_eq!(back.workload("db").unwrap().modes.at(80), Mode::Strict);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_affects_only_itself_at_the_first_start_of_all_and_later() {
    let mut bed = Bed::start().await;
    bed.put("later", "no: [yaml");
    bed.admin_until("/problems", |shown| shown.contains("later.yaml")).await;
    assert!(bed.proxy("node-a").await.workload("db").is_some());
    bed.stop().await;
    // Without the authority's folder nobody can have been told anything that would be lost.
    fs::remove_dir_all(bed.path().join("ca")).unwrap();
    bed.start_again().await;
    assert!(bed.admin("/problems").await.contains("later.yaml"));
    assert!(bed.proxy("node-a").await.workload("db").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_follow_their_answers_and_say_how_old_the_view_is() {
    let bed = Bed::start().await;
    bed.put(
        "settings",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: justmtls-system, name: justmtls}\ndata: {viewLifetime: 1s}\n",
    );
    let mut proxy = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, Known::default()).await;
    proxy
        .until(|proxy| proxy.view.settings().is_some_and(|settings| settings.view_lifetime == Duration::from_secs(1)))
        .await;
    let begun = Instant::now();
    proxy.until(|proxy| proxy.beats.len() >= 4).await;
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    // The control plane's own time, in order; the test's busy machine may be late to look at it.
    assert!(
        proxy.beats.is_sorted() && proxy.beats.iter().all(|time| bed.clock.now().as_secs() - time <= LONG.as_secs())
    );
    let as_of = proxy.stream.as_of().unwrap();
    let next = proxy.beats.len() + 1;
    proxy.until(|proxy| proxy.beats.len() >= next).await;
    assert!(proxy.stream.as_of() > Some(as_of));
    let nodes = bed.admin_until("/nodes", |shown| shown.contains("heartbeat")).await;
    assert!(nodes.contains("node-a"), "{nodes}");
}

/// Two hundred nodes lose their control plane and come back to the next one at once.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_nodes_come_back_to_a_new_control_plane_and_are_told_only_what_changed() {
    const NODES: usize = 200;
    const PODS: u16 = 300;
    let mut bed = Bed::start().await;
    let names: Vec<_> = (0..NODES).map(|number| format!("node-{number}")).collect();
    let tokens = names.iter().map(|node| format!("proxy-token-of-{node},proxy,{node}\n")).collect::<String>();
    bed.stop().await;
    fs::write(bed.path().join("tokens"), tokens).unwrap();
    for number in 0..PODS {
        let text = pod(&format!("pod-{number}"), &names[usize::from(number) % NODES], 1, "web");
        let addresses = format!("10.89.{}.{}", number / 200, number % 200 + 1);
        bed.put(
            &format!("pod-{number}"),
            &text.replace("10.88.16.1", &addresses).replace("fd88:16::1", &format!("fd89::{number:x}")),
        );
    }
    bed.start_again().await;
    let mut known = tokio::task::JoinSet::new();
    for node in &names {
        let client = bed.client(Role::Proxy, node);
        known.spawn(async move {
            let connected = client.connect().await.unwrap();
            let watched = Watched::open(&connected, WITH_HEARTBEAT, Known::default()).await;
            (client, watched.read_all().await)
        });
    }
    let known = known.join_all().await;
    let whole_view = metric(&bed, "resources_sent_total").await;
    assert!(whole_view >= (NODES * usize::from(PODS)) as u64, "{whole_view}");

    bed.stop().await;
    bed.put("late", &pod("late", "node-0", 99, "web"));
    bed.start_again().await;
    let begun = Instant::now();
    let mut back = tokio::task::JoinSet::new();
    for (mut client, known) in known {
        client.address = bed.address;
        back.spawn(async move {
            let connected = client.connect().await.unwrap();
            Watched::open(&connected, WITH_HEARTBEAT, known).await
        });
    }
    let back = back.join_all().await;
    assert!(back.iter().all(|watched| watched.workload("late").is_some()));
    assert_eq!(metric(&bed, "resources_sent_total").await, NODES as u64, "the one new pod, to each node");
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
}
