//! Each process of the product is killed under load, and the box starts another: what users see of it.
//!
//! Whatever dies, nothing passes in clear meanwhile, nobody is refused, and nothing that was cut off looks like a success.

#![forbid(unsafe_code)]

use e2e::{Cluster, Report, assert_only_what_was_open_broke, is_gone, needs, under_load};

const MESH: &str = include_str!("../manifests/mesh.yaml");

/// Kills a process under load; everything that users have seen.
fn kill_under_load(name: &str) -> Report {
    let cluster = Cluster::start(MESH);
    let report = under_load(&cluster, name, true, |_| {
        let killed = cluster.kill(name);
        // It happened, and another process is there.
        assert!(is_gone(killed.old) && !is_gone(killed.new));
    });
    assert_eq!(cluster.process_entries(name)[0]["restarts"], 1);
    report
}

#[test]
fn a_killed_control_plane_is_noticed_by_nobody() {
    needs!("root", "dumpcap", "tshark");
    kill_under_load("control").assert_nothing_failed();
}

#[test]
fn a_killed_agent_is_noticed_by_nobody() {
    needs!("root", "dumpcap", "tshark");
    for node in ["node-a", "node-b"] {
        kill_under_load(&format!("agent@{node}")).assert_nothing_failed();
    }
}

#[test]
fn a_killed_proxy_of_the_servers_node_breaks_what_is_open_and_refuses_nothing_new() {
    needs!("root", "dumpcap", "tshark");
    assert_only_what_was_open_broke(&kill_under_load("node-b"), 1);
}

#[test]
fn a_killed_proxy_of_the_clients_node_breaks_what_is_open_and_refuses_nothing_new() {
    needs!("root", "dumpcap", "tshark");
    assert_only_what_was_open_broke(&kill_under_load("node-a"), 1);
}
