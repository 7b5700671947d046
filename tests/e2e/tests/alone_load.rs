//! Many connections: one after the other, and while a pod goes. They take the whole machine, so they run alone.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Cluster, Family, PATIENCE, Report, Server, Wiretap, eventually, needs, wait_until};

const MESH: &str = include_str!("../manifests/mesh.yaml");
const PORT: u16 = 8080;
/// Short connections, one after the other and some at the same time.
const MANY: u64 = 20_000;

/// Connections of this edge that the node's proxy has counted as mTLS.
fn counted(cluster: &Cluster, node: &str, direction: &str) -> u64 {
    let coverage = cluster.admin(node, "/coverage");
    let edges = coverage.as_array().into_iter().flatten();
    let ours = edges.filter(|it| {
        let edge = &it["edge"];
        edge["direction"] == direction && edge["port"] == PORT && edge["security"] == "mtls"
    });
    ours.filter_map(|it| it["counts"]["connections"].as_u64()).sum()
}

#[test]
fn twenty_thousand_short_connections_are_counted_alike_by_everybody() {
    needs!("root", "curl");
    let cluster = Cluster::start(MESH);
    let server = Server::start(&cluster, "app/server", PORT);
    let began = Instant::now();
    let report = server.load("app/client", Family::V4).short(32).count(MANY).run(Duration::from_secs(300));
    println!("{MANY} connections in {:.1?}: {report}", began.elapsed());
    report.assert_nothing_failed();
    assert_eq!(report.of_work("short").ok, MANY);
    assert_eq!(server.counts(), (MANY, MANY));
    for (node, direction) in [("node-a", "outbound"), ("node-b", "inbound")] {
        wait_until(&format!("{node} to count every connection"), PATIENCE, || {
            match counted(&cluster, node, direction) {
                MANY => Ok(()),
                other => Err(format!("{other}")),
            }
        });
    }
}

#[test]
fn a_deleted_pod_ends_its_connections_within_a_second_and_no_others() {
    needs!("root", "curl", "dumpcap", "tshark");
    const LONG: u64 = 20;
    const EVERY: Duration = Duration::from_millis(20);
    let cluster = Cluster::start(MESH);
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: passing, namespace: app}\n\
               spec: {nodeName: node-b, serviceAccountName: server, containers: [{name: idle, command: [sleep, infinity]}]}\n";
    cluster.apply(pod);
    cluster.wait_ready();
    let (staying, passing) =
        (Server::start(&cluster, "app/server", PORT), Server::start(&cluster, "app/passing", PORT));
    let mut tap = Wiretap::start(&cluster, "node-a", "deleted");
    let mut others = staying.load("app/client", Family::V4).short(4).long(LONG, EVERY).start();
    let mut its = passing.load("app/client", Family::V4).marker("the-pods-own").long(LONG, EVERY).start();
    others.event();
    its.event();
    let asked = Instant::now();
    cluster.delete(pod);
    let took = asked.elapsed();
    its.wait_for_lost(LONG);
    eventually("the pod to be gone", PATIENCE, || cluster.find_pod("app/passing").is_none());
    others.over();
    others.wait_for_more(1_000);
    let (others, its): (Report, Report) = (others.finish(), its.finish());
    tap.stop();
    println!("the others: {others}\nits peers: {its}");
    others.assert_nothing_failed();
    others.assert_spans_the_event();
    assert_eq!(its.long(), (LONG, LONG, 0));
    // The end that its program's end makes, or a reset; not a silence.
    assert!(its.failures().iter().all(|(_, kind)| ["early-end", "reset"].contains(&kind.as_str())), "{its}");
    let last = its.last_failure_after_event().expect("connections were broken");
    assert!(
        last < took + Duration::from_secs(1),
        "the last one ended {last:?} after the deletion, which took {took:?}"
    );
    assert!(!tap.saw("the-pods-own"));
    tap.streams(PORT).assert_all_tls();
}
