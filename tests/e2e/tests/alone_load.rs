//! Many connections: one after the other, and while a pod goes. They take the whole machine, so they run alone.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Cluster, Family, PATIENCE, Report, Server, Wiretap, eventually, needs, wait_until};
use nix::sys::resource::{Resource, getrlimit};

const MESH: &str = include_str!("../manifests/mesh.yaml");
const PORT: u16 = 8080;
const LONG: Duration = Duration::from_secs(180);
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

/// As from a database's pooler or a load generator.
#[test]
fn thousands_of_connections_of_one_client_are_open_at_once_and_all_work() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let count = (limit / 3).min(10_000);
    println!("{count} connections, of {limit} descriptors");
    let began = Instant::now();
    let verb = ["hold-many", &server, "7000", &count.to_string(), "64"];
    let mut client = cluster.tcp("app/client", &verb).within(LONG).spawn();
    client.wait_for_within("open", LONG);
    assert_eq!(client.stdout().trim(), format!("open {count} errors {{}}"));
    println!("open after {:.1?}", began.elapsed());
    for (node, pod) in [("node-a", "app/client"), ("node-b", "app/server")] {
        let pods = cluster.admin(node, "/pods");
        let this = pods["pods"].as_array().into_iter().flatten().find(|it| it["name"] == pod);
        let open = this.and_then(|it| it["connections"].as_u64()).unwrap_or_default();
        assert!(open >= count, "{node} has {open} of {pod}");
    }
    client.write("again\n");
    client.wait_for_within("good", LONG);
    assert_eq!(client.stdout().lines().last(), Some(&*format!("good {count} errors {{}}")));
    // And beside all of them the client may open more, elsewhere too.
    let _other = cluster.serve("app/near", &["echo", "7001"]);
    let near = cluster.address("app/near", Family::V4).to_string();
    let asked = cluster.tcp("app/client", &["ask", &near, "7001", "still"]).within(LONG).run().ok();
    assert!(asked.starts_with("said still"), "{asked}");
}

#[test]
fn a_deleted_pod_ends_its_connections_within_a_second_and_no_others() {
    needs!("root", "curl", "dumpcap", "tshark");
    const HELD: u64 = 20;
    const EVERY: Duration = Duration::from_millis(20);
    let cluster = Cluster::start(MESH);
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: passing, namespace: app}\n\
               spec: {nodeName: node-b, serviceAccountName: server, containers: [{name: idle, command: [sleep, infinity]}]}\n";
    cluster.apply(pod);
    cluster.wait_ready();
    let (staying, passing) =
        (Server::start(&cluster, "app/server", PORT), Server::start(&cluster, "app/passing", PORT));
    let mut tap = Wiretap::start(&cluster, "node-a", "deleted");
    let mut others = staying.load("app/client", Family::V4).short(4).long(HELD, EVERY).start();
    let mut its = passing.load("app/client", Family::V4).marker("the-pods-own").long(HELD, EVERY).start();
    others.event();
    its.event();
    let asked = Instant::now();
    cluster.delete(pod);
    let took = asked.elapsed();
    its.wait_for_lost(HELD);
    eventually("the pod to be gone", PATIENCE, || cluster.find_pod("app/passing").is_none());
    others.over();
    others.wait_for_more(1_000);
    let (others, its): (Report, Report) = (others.finish(), its.finish());
    tap.stop();
    println!("the others: {others}\nits peers: {its}");
    others.assert_nothing_failed();
    others.assert_spans_the_event();
    assert_eq!(its.long(), (HELD, HELD, 0));
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
