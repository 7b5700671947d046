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
fn agent_and_proxy_of_a_node_killed_at_once_refuse_until_the_pod_is_made_anew_and_say_nothing_in_clear() {
    needs!("root", "dumpcap", "tshark");
    for (node, pod) in [("node-a", "app/client"), ("node-b", "app/server")] {
        let cluster = Cluster::start(MESH);
        let server = Server::start(&cluster, "app/server", PORT);
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
        load.over();
        let ask = || {
            let url = format!("http://{}/{marker}", cluster.socket("app/server", Family::V4, PORT));
            cluster.exec("app/client", &["curl", "-sS", "--max-time", "10", &url]).run()
        };
        // Nobody has the listeners any more, and the rules stand.
        let refused = ask().fails();
        assert!(refused.contains("Couldn't connect") || refused.contains("reset"), "{refused}");
        let report = load.finish();
        tap.stop();
        println!("{node}: {report}");
        for kind in ["early-end", "wrong-bytes", "other"] {
            report.assert_never(kind);
        }
        assert!(report.answered() >= 2 * ENOUGH && report.of_phase("after", "short").ok == 0, "{report}");
        assert!(!tap.saw(&marker), "a request passed in clear");
        tap.streams(PORT).assert_all_tls();

        // The pod that comes in its place is captured and served like any other.
        drop(server);
        let uid = cluster.pod(pod)["uid"].clone();
        let manifest =
            MESH.split("---").find(|one| one.contains(&format!("name: {}", &pod[4..]))).expect("it is there");
        cluster.delete(manifest);
        wait_until("the pod to be gone", PATIENCE, || {
            cluster.find_pod(pod).map_or(Ok(()), |it| Err(format!("{it:#}")))
        });
        cluster.apply(manifest);
        cluster.wait_ready();
        assert_ne!(cluster.pod(pod)["uid"], uid);
        let _server = Server::start(&cluster, "app/server", PORT);
        wait_until("it is served", PATIENCE, || {
            let asked = ask();
            if asked.success() { Ok(()) } else { Err(asked.stderr) }
        });
    }
}
