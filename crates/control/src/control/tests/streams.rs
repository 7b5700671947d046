//! Discovery and reports.

use std::collections::BTreeSet;
use std::time::Instant;

use mesh::{Mode, Speaks, Uncaptured};
use tokio::sync::watch;
use wire::client::{ClientError, Role};
use wire::discovery::{Kind, Known};
use wire::report::Report;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_told_of_the_whole_mesh_and_an_agent_of_its_own_nodes_pods() {
    let bed = Bed::start().await;
    let proxy = bed.proxy("node-a").await;
    assert_eq!(proxy.workload("web").unwrap().identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(proxy.workload("db").unwrap().addresses.len(), 2);
    assert!(proxy.view.settings().is_some() && proxy.bundles == 1);

    let agent = bed.agent("node-b").await;
    assert_eq!(agent.node_pods.keys().map(PodUid::as_str).collect::<Vec<_>>(), ["uid-db"]);
    assert_eq!(agent.node_pods.values().next().unwrap().capture, Ok(()));
    assert_eq!(agent.bundles, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_of_a_large_mesh_is_told_of_its_own_node_and_of_what_it_asks_about() {
    let bed = Bed::start().await;
    let settings = "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: justmtls-system, name: justmtls}\n\
                    data: {insideCIDRs: \"10.88.0.0/16,fd88::/16\", wholeMeshUpTo: \"0\"}\n";
    let mut whole = bed.proxy("node-a").await;
    assert!(whole.workload("db").is_some());
    bed.put("settings", settings);
    whole.until(|proxy| !proxy.view.settings().unwrap().inside.is_empty()).await;

    let mut proxy = bed.proxy("node-a").await;
    assert!(proxy.workload("web").is_some() && proxy.workload("db").is_none());
    let address = |last: u8| std::net::IpAddr::from([10, 88, 16, last]);
    [6, 9].iter().for_each(|last| proxy.stream.ask(address(*last)));
    proxy.until(|proxy| proxy.workload("db").is_some() && proxy.nobody == [address(9)]).await;
    bed.put("late", &pod("late", "node-b", 9, "late"));
    proxy.until(|proxy| proxy.workload("late").is_some()).await;
    // What one knew from before it hears of all the same.
    bed.put("db", &pod("db", "node-b", 7, "db"));
    whole.until(|proxy| proxy.workload("db").unwrap().addresses[0] == address(7)).await;
    assert!(whole.workload("late").is_none());

    let known = whole.stream.known().clone();
    drop(whole);
    let back = Watched::open(&bed.connect(Role::Proxy, "node-a").await, PROXY_KINDS, known).await;
    let removed = back.batches.iter().map(|(_, changes)| changes).sum::<usize>();
    assert!(removed <= 1, "nothing that it knows is taken away: {:?}", back.batches);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_is_not_for_that_process_is_refused() {
    let bed = Bed::start().await;
    let agents = [Kind::Address, Kind::Policy, Kind::Settings].map(|kind| (Role::Agent, kind));
    for (role, kind) in agents.into_iter().chain([(Role::Proxy, Kind::NodePod)]) {
        let connected = bed.connect(role, "node-a").await;
        let mut stream = connected.discover(&[kind], Known::default()).await.unwrap();
        let error = timeout(LONG, stream.next()).await.unwrap().err().unwrap();
        assert!(matches!(error, ClientError::TokenRefused { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{kind} is not for the {}", role.as_str())), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_arrives_as_a_delta_of_what_it_changes() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    proxy.batches.clear();
    let before = Instant::now();
    bed.put("strict", strict());
    proxy.until(|proxy| proxy.workload("db").unwrap().modes.at(80) == Mode::Strict).await;
    // The promise is 100 ms; on a machine that is busy with other tests this says only that nothing waits for a timer.
    assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
    proxy.until(|proxy| proxy.workload("web").unwrap().modes.at(80) == Mode::Strict).await;
    assert!(proxy.batches.iter().all(|(kind, _)| *kind == Kind::Address), "{:?}", proxy.batches);
    assert_eq!(proxy.batches.iter().map(|(_, changes)| changes).sum::<usize>(), 2);

    fs::remove_file(bed.path().join("objects/db.yaml")).unwrap();
    proxy.until(|proxy| proxy.workload("db").is_none()).await;
    bed.put("db", &pod("db", "node-b", 9, "db"));
    proxy.until(|proxy| proxy.workload("db").is_some_and(|db| db.addresses[0].to_string() == "10.88.16.9")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pod_reaches_the_agent_of_its_node_alone() {
    let bed = Bed::start().await;
    let mut here = bed.agent("node-a").await;
    let mut there = bed.agent("node-b").await;
    bed.put("api", &pod("api", "node-a", 7, "api"));
    here.until(|agent| agent.node_pods.len() == 2).await;
    bed.put("cache", &pod("cache", "node-b", 8, "cache"));
    there.until(|agent| agent.node_pods.len() == 2).await;
    let names: BTreeSet<_> = there.node_pods.values().map(|pod| pod.name.as_str()).collect();
    assert_eq!(names, BTreeSet::from(["cache", "db"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_comes_before_the_workload_that_names_it_and_goes_after() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    proxy.batches.clear();
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop, name: p}\n\
                  spec: {selector: {matchLabels: {app: web}}, rules: [{}]}\n";
    bed.put("policy", policy);
    proxy.until(|proxy| !proxy.workload("web").unwrap().policies.is_empty()).await;
    assert_eq!(proxy.batches, [(Kind::Policy, 1), (Kind::Address, 1)]);
    proxy.batches.clear();
    fs::remove_file(bed.path().join("objects/policy.yaml")).unwrap();
    proxy.until(|proxy| proxy.view.policies().next().is_none()).await;
    assert_eq!(proxy.batches, [(Kind::Address, 1), (Kind::Policy, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_is_told_only_what_changed() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    bed.put("api", &pod("api", "node-a", 7, "api"));
    proxy.until(|proxy| proxy.workload("api").is_some()).await;
    let known = proxy.stream.known().clone();
    drop(proxy);
    fs::remove_file(bed.path().join("objects/db.yaml")).unwrap();
    bed.admin_until("/workloads", |shown| !shown.contains("uid-db")).await;
    let back = Watched::open(&bed.connect(Role::Proxy, "node-a").await, PROXY_KINDS, known).await;
    // The removal of `db`; and `api` once more, whose batch was the last and was not answered.
    assert_eq!(back.batches.iter().map(|(_, changes)| changes).sum::<usize>(), 2, "{:?}", back.batches);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reported_capture_is_confirmed_and_told_to_all_and_never_taken_back() {
    let bed = Bed::start().await;
    let mut other = bed.proxy("node-b").await;
    assert_eq!(other.workload("web").unwrap().uncaptured, Some(Uncaptured::Pending));
    let (captured, watched) =
        watch::channel(Report::from(BTreeSet::from([PodUid::from("uid-web"), PodUid::from("uid-db")])));
    let agent = bed.connect(Role::Agent, "node-a").await;
    let mut reports = agent.report_captures(watched).await.unwrap();
    assert_eq!(timeout(LONG, reports.next()).await.unwrap().unwrap().len(), 2);
    other.until(|proxy| proxy.workload("web").unwrap().speaks == Speaks::JustMtls).await;
    // node-a does not speak for node-b's pods.
    assert_eq!(other.workload("db").unwrap().speaks, Speaks::Nothing);

    captured.send_replace(Report::default());
    assert!(timeout(LONG, reports.next()).await.unwrap().unwrap().is_empty());
    let shown = bed.admin("/problems").await;
    assert!(shown.contains("Pod shop/web") && shown.contains("does not report it any more"), "{shown}");
    let workloads: serde_json::Value = serde_json::from_str(&bed.admin("/workloads").await).unwrap();
    let web = workloads["workloads"].as_array().unwrap().iter().find(|workload| workload["name"] == "web").unwrap();
    assert_eq!((&web["captured"], &web["uncaptured"]), (&true.into(), &serde_json::Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_an_agents_alone() {
    let bed = Bed::start().await;
    let (_captured, watched) = watch::channel(Report::default());
    let mut reports = bed.connect(Role::Proxy, "node-a").await.report_captures(watched).await.unwrap();
    let error = timeout(LONG, reports.next()).await.unwrap().err().unwrap();
    assert!(error.to_string().contains("captures are reported by agents"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_acknowledge_and_refuse_is_shown() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    bed.put("strict", strict());
    let batch = timeout(LONG, proxy.stream.next()).await.unwrap().unwrap();
    assert_eq!(batch.kind, Kind::Address);
    proxy.stream.refuse("I do not like it");
    let shown = bed.admin_until("/nodes", |shown| shown.contains("I do not like it")).await;
    let nodes: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let stream = &nodes[0]["streams"][0];
    assert_eq!((&nodes[0]["node"], &stream["role"]), (&"node-a".into(), &"proxy".into()));
    let progress = &stream["kinds"]["address"];
    assert!(progress["acknowledged"].as_u64() < progress["sent"].as_u64(), "{progress}");
    assert_eq!(progress["refused"], 1);
    let bundle = &stream["kinds"]["trust-bundle"];
    assert_eq!(bundle["acknowledged"], bundle["sent"]);
    drop(proxy);
    // What it had come to is known after it is gone.
    let shown = bed.admin_until("/nodes", |shown| shown.contains("\"open\":false")).await;
    assert!(shown.contains("I do not like it") && !shown.contains("\"open\":true"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_a_problem_and_keeps_what_was_there() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    bed.put("db", "this: [is not");
    let shown = bed.admin_until("/problems", |shown| shown.contains("db.yaml")).await;
    assert!(shown.contains("last good state stays"), "{shown}");
    bed.put("api", &pod("api", "node-a", 7, "api"));
    proxy.until(|proxy| proxy.workload("api").is_some()).await;
    assert!(proxy.workload("db").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_told_to_streams() {
    let bed = Bed::start().await;
    let mut proxy = bed.proxy("node-a").await;
    bed.events.send(Event::Terminate).await.unwrap();
    let error = timeout(LONG, proxy.stream.next()).await.unwrap().err().unwrap();
    assert!(matches!(error, ClientError::Lost { .. }), "{error}");
    timeout(LONG, bed.running).await.unwrap().unwrap().unwrap();
}
