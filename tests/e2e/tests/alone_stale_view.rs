//! A view that is too old: plaintext inside the cluster no longer rests on it, and whoever proves an identity notices nothing.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, OUTSIDE, eventually, needs};
use nix::sys::signal::{Signal, kill};

const MESH: &str = include_str!("../manifests/mesh.yaml");

/// Long enough for a busy machine to keep its heartbeats, short enough for a test.
const SETTINGS: &str = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: justmtls, namespace: justmtls-system}\n\
                        data: {viewLifetime: 4s}\n";

/// For a view to become stale, or fresh again: its lifetime, the pause before a reconnect, and a busy machine.
const SOON: Duration = Duration::from_secs(40);

fn start() -> Cluster {
    let cluster = Cluster::start(&format!("{MESH}{SETTINGS}"));
    for node in ["node-a", "node-b"] {
        wait_for_stale(&cluster, node, false);
    }
    cluster
}

fn is_stale(cluster: &Cluster, node: &str) -> bool {
    cluster.metric(node, "justmtls_proxy_view_stale") == 1
}

fn wait_for_stale(cluster: &Cluster, node: &str, stale: bool) {
    eventually(&format!("the view of {node} to be stale: {stale}"), SOON, || {
        is_stale(cluster, node) == stale && cluster.metric(node, "justmtls_proxy_view_age_milliseconds") >= 0
    });
}

/// What a client gets from a port of somebody: `said hello`, or how it failed.
fn ask(cluster: &Cluster, client: &str, server: &str, port: &str) -> String {
    let said = cluster.tcp(client, &["ask", server, port, "hello"]).run().ok();
    said.trim().rsplit_once(' ').map_or(said.as_str(), |(outcome, _)| outcome).to_owned()
}

#[test]
fn while_the_control_plane_says_nothing_permissive_plaintext_is_called_stale_and_known_peers_go_on() {
    needs!("root");
    let cluster = start();
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let _outsider = cluster.serve("legacy/outsider", &["echo", "7001"]);
    let mut outside = cluster.tcp_on("outside", &["echo", "7002"]).spawn();
    outside.wait_for("ready");
    let server = cluster.address("app/server", Family::V4).to_string();
    let outsider = cluster.address("legacy/outsider", Family::V4).to_string();
    let mut open = cluster.tcp("legacy/outsider", &["hold", &server, "7000"]).spawn();
    open.wait_for("open");

    assert_eq!(ask(&cluster, "legacy/outsider", &server, "7000"), "said hello");
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "plaintext", "opted-out"]);

    let control = cluster.process("control");
    kill(control, Signal::SIGSTOP).unwrap();
    ["node-a", "node-b"].iter().for_each(|node| wait_for_stale(&cluster, node, true));
    assert_eq!(ask(&cluster, "legacy/outsider", &server, "7000"), "said hello");
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "plaintext", "stale-view"]);
    assert_eq!(ask(&cluster, "app/client", &outsider, "7001"), "said hello");
    cluster.wait_edge("node-a", ["outbound", "app/client", "legacy/outsider", "7001", "plaintext", "stale-view"]);
    // What is not inside does not rest on the view's age, and neither does what a certificate proves.
    assert_eq!(ask(&cluster, "app/client", OUTSIDE[0], "7002"), "said hello");
    cluster.wait_edge("node-a", ["outbound", "app/client", OUTSIDE[0], "7002", "plaintext", "outside"]);
    assert_eq!(ask(&cluster, "app/client", &server, "7000"), "said hello");
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/server", "7000", "mtls", ""]);
    open.write("still\n");
    open.wait_for("back still");

    kill(control, Signal::SIGCONT).unwrap();
    ["node-a", "node-b"].iter().for_each(|node| wait_for_stale(&cluster, node, false));
    assert_eq!(ask(&cluster, "app/client", &outsider, "7001"), "said hello");
    cluster.wait_edge("node-a", ["outbound", "app/client", "legacy/outsider", "7001", "plaintext", "opted-out"]);
}

/// Drops what a node says to the control plane and hears from it, as somebody between the two could.
fn nft(cluster: &Cluster, node: &str, command: &[&str]) {
    cluster.verb(&["exec", "--node", node, "--privileged", "--", "nft"]).args(command).run().ok();
}

#[test]
fn a_discovery_stream_that_somebody_blocks_gains_nothing_in_strict() {
    needs!("root", "nft");
    let cluster = start();
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let _outsider = cluster.serve("legacy/outsider", &["echo", "7001"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let outsider = cluster.address("legacy/outsider", Family::V4).to_string();
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: app}\n\
                  spec: {mtls: {mode: STRICT}}\n";
    cluster.apply(strict);
    eventually("the outsider to be refused", SOON, || ask(&cluster, "legacy/outsider", &server, "7000") == "reset");
    // Strict clients speak to a pod that opted out, as long as it is known to have.
    assert_eq!(ask(&cluster, "app/client", &outsider, "7001"), "said hello");

    nft(&cluster, "node-a", &["add", "table", "inet", "between"]);
    for (chain, hook) in [("out", "output"), ("in", "input")] {
        let port = if hook == "output" { "dport" } else { "sport" };
        let of = format!("{{ type filter hook {hook} priority 0 ; }}");
        nft(&cluster, "node-a", &["add", "chain", "inet", "between", chain, &of]);
        nft(&cluster, "node-a", &["add", "rule", "inet", "between", chain, "tcp", port, "15012", "counter", "drop"]);
    }
    wait_for_stale(&cluster, "node-a", true);
    let counters = cluster.verb(&["exec", "--node", "node-a", "--privileged", "--"]);
    let counters = counters.args(["nft", "list", "table", "inet", "between"]).run().ok();
    let words: Vec<_> = counters.split_whitespace().collect();
    let dropped = words.windows(2).filter(|pair| pair[0] == "packets").filter_map(|pair| pair[1].parse::<u64>().ok());
    assert!(dropped.sum::<u64>() > 0, "the stream was not blocked: {counters}");
    assert_eq!(ask(&cluster, "app/client", &outsider, "7001"), "reset", "nobody knows any more that it opted out");
    cluster.wait_edge("node-a", ["outbound", "app/client", "legacy/outsider", "7001", "none", "strict-stale-view"]);
    assert_eq!(ask(&cluster, "app/client", &server, "7000"), "said hello", "known peers go on");
    // The other node's stream is not blocked, and its view is not stale.
    assert!(!is_stale(&cluster, "node-b"));
    assert_eq!(ask(&cluster, "app/near", &outsider, "7001"), "said hello");
    cluster.wait_edge("node-b", ["outbound", "app/near", "legacy/outsider", "7001", "plaintext", "opted-out"]);

    nft(&cluster, "node-a", &["delete", "table", "inet", "between"]);
    wait_for_stale(&cluster, "node-a", false);
    assert_eq!(ask(&cluster, "app/client", &outsider, "7001"), "said hello");
}
