//! A captured pod opts out while it runs (T4, T47).

use mesh::{Speaks, Uncaptured};
use tokio::sync::watch;
use tokio::time::Instant;
use wire::report::Report;

use super::*;

const SETTINGS: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: justmtls-system, name: justmtls}\ndata: {viewLifetime: 2s}\n";

fn namespace(labels: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

/// Reads a stream, and so accepts what comes, for as long as this lives.
pub(super) fn keep_reading(mut watched: Watched) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Ok(batch) = watched.stream.next().await {
            watched.take(batch)
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_released_when_every_proxy_has_taken_it_in_and_a_restart_does_not_bring_it_back() {
    let mut bed = Bed::start().await;
    bed.put("settings", SETTINGS);
    let (captured, watched) = watch::channel(Report::from(BTreeSet::from([PodUid::from("uid-web")])));
    let agent_link = bed.connect(Role::Agent, "node-a").await;
    let mut reports = agent_link.report_captures(watched).await.unwrap();
    timeout(LONG, reports.next()).await.unwrap().unwrap();
    let mut agent = bed.agent("node-a").await;
    let prompt = Watched::open(&bed.connect(Role::Proxy, "node-a").await, WITH_HEARTBEAT, Known::default()).await;
    assert_eq!(prompt.workload("web").unwrap().speaks, Speaks::JustMtls);
    let _prompt = keep_reading(prompt);
    // It says nothing about what it hears from here on.
    let slow = Watched::open(&bed.connect(Role::Proxy, "node-b").await, WITH_HEARTBEAT, Known::default()).await;

    let begun = Instant::now();
    bed.put("namespace", &namespace("justmtls.dev/mode: \"off\""));
    agent.until(|agent| agent.node_pods[&PodUid::from("uid-web")].capture == Err(Uncaptured::OptedOut)).await;
    let mut released = Box::pin(agent.until(|agent| agent.node_pods[&PodUid::from("uid-web")].release));
    assert!(timeout(Duration::from_secs(7), &mut released).await.is_err(), "a proxy has not answered");
    drop(slow);
    timeout(LONG, released).await.expect("a proxy that is away for longer than its view lives has no say");
    assert!(begun.elapsed() >= Duration::from_secs(7));
    let record = fs::read_to_string(bed.path().join("ca/captured")).unwrap();
    assert!(!record.contains("uid-web"), "{record}");

    // Its agent has let it go. The next control plane neither publishes it as captured nor releases it again.
    captured.send_replace(Report::default());
    timeout(LONG, reports.next()).await.unwrap().unwrap();
    bed.stop().await;
    bed.put("namespace", &namespace(""));
    bed.start_again().await;
    let fresh = bed.proxy("node-b").await;
    assert_eq!(fresh.workload("web").unwrap().uncaptured, Some(Uncaptured::Pending), "not before its agent says so");
    let agent = bed.agent("node-a").await;
    let pod = &agent.node_pods[&PodUid::from("uid-web")];
    assert!(pod.capture.is_ok() && !pod.release);
}
