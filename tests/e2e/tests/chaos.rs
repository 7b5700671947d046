//! Each process of the product is killed under load, and the box starts another: what users see of it.
//!
//! Whatever dies, nothing passes in clear meanwhile, nobody is refused, and nothing that was cut off looks like a success.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, Loaded, Replaced, Report, Server, Wiretap, is_gone, needs};

const MESH: &str = include_str!("../manifests/mesh.yaml");
const PORT: u16 = 8080;
/// Clients that make short connections at the same time.
const SHORT: u64 = 8;
/// Connections that are open all the time.
const LONG: u64 = 10;
const EVERY: Duration = Duration::from_millis(50);
/// Bytes of a transfer of bulk.
const TRANSFER: u64 = 256 << 10;
/// Answers after which an outage would have been seen.
const ENOUGH: u64 = 500;

/// Kills a process under load; everything that users have seen, and the two processes.
fn kill_under_load(name: &str) -> (Report, Replaced) {
    let cluster = Cluster::start(MESH);
    let server = Server::start(&cluster, "app/server", PORT);
    let marker = format!("marker-{}-{}", name.replace('@', "-"), std::process::id());
    let mut tap = Wiretap::start(&cluster, "node-a", "chaos");
    let load = server.load("app/client", Family::V4).marker(&marker).short(SHORT).long(LONG, EVERY).bulk(1, TRANSFER);
    let mut load: Loaded = load.start();
    load.wait_for_more(ENOUGH);
    load.event();
    let killed = cluster.kill(name);
    load.over();
    load.wait_for_more(2 * ENOUGH);
    let report = load.finish();
    tap.stop();
    println!("{name} killed under load: {report}");

    // It happened, and another process is there.
    assert!(is_gone(killed.old) && !is_gone(killed.new));
    assert_eq!(cluster.process_entries(name)[0]["restarts"], 1);
    report.assert_spans_the_event();
    assert!(!tap.saw(&marker), "a request passed in clear");
    tap.streams(PORT).assert_all_tls();
    (report, killed)
}

#[test]
fn a_killed_control_plane_is_noticed_by_nobody() {
    needs!("root", "dumpcap", "tshark");
    kill_under_load("control").0.assert_nothing_failed();
}

#[test]
fn a_killed_agent_is_noticed_by_nobody() {
    needs!("root", "dumpcap", "tshark");
    for node in ["node-a", "node-b"] {
        kill_under_load(&format!("agent@{node}")).0.assert_nothing_failed();
    }
}

#[test]
fn a_killed_proxy_of_the_servers_node_breaks_what_is_open_and_refuses_nothing_new() {
    needs!("root", "dumpcap", "tshark");
    breaks_what_is_open_and_no_more(&kill_under_load("node-b").0);
}

#[test]
fn a_killed_proxy_of_the_clients_node_breaks_what_is_open_and_refuses_nothing_new() {
    needs!("root", "dumpcap", "tshark");
    breaks_what_is_open_and_no_more(&kill_under_load("node-a").0);
}

/// A proxy has the keys of what is open, and they go with it.
fn breaks_what_is_open_and_no_more(report: &Report) {
    // What was open has an error, and each long connection was.
    assert_eq!(report.long(), (LONG, LONG, 0), "{report}");
    for kind in ["refused", "early-end", "wrong-bytes", "timeout", "other"] {
        report.assert_never(kind);
    }
    // Of the short ones no more than were open, and none that began later: those waited for the new proxy.
    assert!(report.of_work("short").failed <= SHORT, "{report}");
    for work in ["short", "bulk"] {
        assert_eq!(report.of_phase("after", work).failed, 0, "{report}");
    }
    assert!(report.of_phase("after", "short").ok >= ENOUGH, "{report}");
}
