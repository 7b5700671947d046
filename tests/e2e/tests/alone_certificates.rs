//! Certificates that live for seconds: they rotate under a load that notices nothing, and an outage of the control plane
//! costs nothing within its budget, is refused by name beyond it, and is over by itself.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Cluster, Family, needs, wait_until};
use serde_json::Value;

const MESH: &str = include_str!("../manifests/mesh.yaml");

/// The life of a leaf here.
const LIFE: Duration = Duration::from_secs(20);

fn start() -> Cluster {
    Cluster::start_with(&["--leaf-lifetime", "20s"], MESH)
}

/// The certificate of `app/NAME` on its node: from when, to when, and whether it is valid there now.
fn certificate(cluster: &Cluster, node: &str, name: &str) -> Option<(u64, u64, bool)> {
    let all = cluster.admin(node, "/certificates");
    let id = format!("spiffe://cluster.local/ns/app/sa/{name}");
    let found = all["svids"].as_array()?.iter().find(|svid| svid["identity"] == id.as_str())?.clone();
    let second = |field: &Value| field.as_u64();
    Some((second(&found["not_before"])?, second(&found["not_after"])?, found["valid"].as_bool()?))
}

fn not_after(cluster: &Cluster, node: &str, name: &str) -> u64 {
    wait_until(&format!("the certificate of {name}"), Duration::from_secs(30), || {
        certificate(cluster, node, name).map(|(_, end, _)| end).ok_or_else(|| "there is none".to_owned())
    })
}

/// So many short connections from `app/client` to the server, all of which must succeed. Returns their number.
fn load(cluster: &Cluster, server: &str, count: usize) -> usize {
    let said = cluster.tcp("app/client", &["flood", server, "7000", &count.to_string(), "4"]).run().ok();
    assert!(said.starts_with(&format!("good {count} of {count} ")), "{said}");
    count
}

#[test]
fn leaves_rotate_under_load_and_no_connection_notices() {
    needs!("root");
    let cluster = start();
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut long = cluster.tcp("app/client", &["hold", &server, "7000"]).spawn();
    long.wait_for("open");
    let ends = || [not_after(&cluster, "node-a", "client"), not_after(&cluster, "node-b", "server")];
    let first = ends();
    let mut rotations = [0; 2];
    let (mut seen, mut connections) = (first, 0);
    let begun = Instant::now();
    while rotations.iter().any(|count| *count < 2) || connections < 1000 {
        connections += load(&cluster, &server, 400);
        let now = ends();
        for side in 0..2 {
            assert!(now[side] >= seen[side], "a certificate was replaced by an older one");
            rotations[side] += usize::from(now[side] > seen[side]);
        }
        seen = now;
        assert!(begun.elapsed() < 12 * LIFE, "only {rotations:?} rotations");
    }
    // The connection from before has outlived every certificate that it was made with.
    wait_until("the first certificates to be over", 3 * LIFE, || {
        let now = cluster.admin("node-a", "/certificates")["now"].as_u64().unwrap_or_default();
        if now > first[0].max(first[1]) { Ok(()) } else { Err(format!("{now} of {first:?}")) }
    });
    long.write("still here\n");
    long.wait_for("back still here");
    assert_eq!(cluster.metric("node-a", "justmtls_proxy_certificate_failures_total"), 0);
}

#[test]
fn an_outage_costs_nothing_within_its_budget_is_refused_by_name_beyond_and_is_over_by_itself() {
    needs!("root");
    let cluster = start();
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut long = cluster.tcp("app/client", &["hold", &server, "7000"]).spawn();
    long.wait_for("open");
    load(&cluster, &server, 100);
    let ends = [not_after(&cluster, "node-a", "client"), not_after(&cluster, "node-b", "server")];
    let issued = || ["node-a", "node-b"].map(|node| cluster.metric(node, "justmtls_proxy_certificates_issued_total"));
    let now = || cluster.admin("node-a", "/certificates")["now"].as_u64().unwrap_or_default();

    cluster.hold("control");
    let outage = Instant::now();
    let before = issued();
    // Whenever it happens, two fifths of a leaf's life are left at least.
    let mut connections = 0;
    while outage.elapsed() < LIFE.mul_f64(0.2) && now() + 4 < ends[0].min(ends[1]) {
        connections += load(&cluster, &server, 100);
    }
    assert!(connections > 0, "the load came after the budget");

    // Beyond: new connections are refused by name, the open one goes on.
    let over = |node, name| matches!(certificate(&cluster, node, name), Some((_, _, false)));
    wait_until("the certificates to be over", 2 * LIFE, || {
        if over("node-a", "client") && over("node-b", "server") { Ok(()) } else { Err("one is valid".to_owned()) }
    });
    let said = cluster.tcp("app/client", &["ask", &server, "7000", "hello"]).run().ok();
    assert!(said.starts_with("reset "), "{said}");
    cluster.wait_edge("node-a", ["outbound", "app/client", "app/server", "7000", "none", "no-certificate"]);
    long.write("in the outage\n");
    long.wait_for("back in the outage");
    wait_until("an outage of two leaf lives", 3 * LIFE, || {
        if outage.elapsed() > 2 * LIFE { Ok(()) } else { Err(format!("{:?}", outage.elapsed())) }
    });

    cluster.resume("control");
    wait_until("the certificates to be there again", Duration::from_secs(30), || {
        let valid = |node, name| matches!(certificate(&cluster, node, name), Some((_, _, true)));
        if valid("node-a", "client") && valid("node-b", "server") { Ok(()) } else { Err("one is not".to_owned()) }
    });
    load(&cluster, &server, 100);
    long.write("after it\n");
    long.wait_for("back after it");
    // No storm: each identity asked once or twice, not once for each attempt that failed.
    for (before, after) in before.iter().zip(issued()) {
        assert!(after - before <= 6, "{} certificates at once", after - before);
    }
}

#[test]
fn a_control_plane_that_is_killed_and_started_again_costs_no_connection_and_no_certificate() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut long = cluster.tcp("app/client", &["hold", &server, "7000"]).spawn();
    long.wait_for("open");
    let issued = || ["node-a", "node-b"].map(|node| cluster.metric(node, "justmtls_proxy_certificates_issued_total"));
    let roots = || cluster.admin("node-a", "/certificates")["bundle"]["digest"].clone();
    let (before, bundle) = (issued(), roots());
    let under_load = cluster.tcp("app/client", &["flood", &server, "7000", "2000", "4"]).spawn();
    let killed = cluster.kill("control");
    assert_ne!(killed.old, killed.new);
    let said = under_load.finish(Duration::from_secs(120)).ok();
    assert!(said.starts_with("good 2000 of 2000 "), "{said}");
    wait_until("both proxies to have taken in what the new one says", Duration::from_secs(40), || {
        let current = cluster.metric("control", "justmtls_control_nodes_current");
        if current == 2 { Ok(()) } else { Err(format!("{current} of 2")) }
    });
    // The same authority, the same pods, and nodes that knew all of it.
    assert_eq!((issued(), roots()), (before, bundle));
    assert_eq!(cluster.metric("control", "justmtls_control_resources_sent_total"), 0, "nothing was told anew");
    long.write("still here\n");
    long.wait_for("back still here");
    load(&cluster, &server, 100);
}
