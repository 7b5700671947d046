//! Each process of the product is killed under load, and the box starts another: what users see of it.
//!
//! Whatever dies, nothing passes in clear meanwhile, nobody is refused, and nothing that was cut off looks like a success.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{
    Cluster, ENOUGH, Family, PATIENCE, PORT, Report, Server, Wiretap, assert_only_what_was_open_broke, is_gone, needs,
    under_load, wait_until,
};
use nix::sys::signal::{Signal, kill};

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

#[test]
fn agent_and_proxy_of_a_node_killed_at_once_say_nothing_in_clear_and_the_same_pod_is_served_again() {
    needs!("root", "dumpcap", "tshark");
    for (node, pod) in [("node-a", "app/client"), ("node-b", "app/server")] {
        let cluster = Cluster::start(MESH);
        let server = Server::start(&cluster, "app/server", PORT);
        let uid = cluster.pod(pod)["uid"].clone();
        let marker = format!("marker-both-{node}-{}", std::process::id());
        let mut tap = Wiretap::start(&cluster, "node-a", &format!("both-of-{node}"));
        let load = server.load("app/client", Family::V4).marker(&marker).short(8).long(10, Duration::from_millis(50));
        let mut load = load.bulk(1, 256 << 10).start();
        load.wait_for_more(2 * ENOUGH);
        load.event();
        let agent = format!("agent@{node}");
        let old = [cluster.process(&agent), cluster.process(node)];
        for pid in old {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        cluster.replaced(&agent, old[0]);
        cluster.replaced(node, old[1]);
        load.wait_for_lost(10);
        // Nobody had the listeners any more, and the rules stand: refused, until the new agent is told of the pod.
        let url = format!("http://{}/{marker}", cluster.socket("app/server", Family::V4, PORT));
        wait_until("the same pod to be served again", PATIENCE, || {
            let asked = cluster.exec("app/client", &["curl", "-sS", "--max-time", "10", &url]).run();
            if asked.success() { Ok(()) } else { Err(asked.stderr) }
        });
        load.over();
        load.wait_for_more(ENOUGH);
        let report = load.finish();
        tap.stop();
        println!("{node}: {report}");
        assert_eq!(cluster.pod(pod)["uid"], uid);
        for kind in ["early-end", "wrong-bytes", "other"] {
            report.assert_never(kind);
        }
        assert!(report.answered() >= 3 * ENOUGH, "{report}");
        assert!(!tap.saw(&marker), "a request passed in clear");
        tap.streams(PORT).assert_all_tls();
    }
}

#[test]
fn a_namespace_is_enrolled_by_an_agent_that_came_after_its_pods() {
    needs!("root");
    let namespace = |mode: &str| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: late, labels: {{justmtls.dev/mode: '{mode}'}}}}\n")
    };
    let pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: pod, namespace: late}\n\
               spec: {nodeName: node-a, containers: [{name: sleeps, command: [sleep, infinity]}]}\n";
    let cluster = Cluster::start(&format!("{}{pod}", namespace("off")));
    cluster.kill("agent@node-a");
    cluster.apply(&namespace("on"));
    wait_until("it to be captured", PATIENCE, || {
        let pod = cluster.pod("late/pod");
        if pod["captured"] == true { Ok(()) } else { Err(format!("{pod:#}")) }
    });
}
