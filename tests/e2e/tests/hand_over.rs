//! Agent and proxy of a node die, or are replaced by new ones and back, under load: what users see of it, with and without a
//! control plane.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{
    Cluster, ENOUGH, Family, PATIENCE, PORT, Server, assert_only_what_was_open_broke, eventually, is_gone, needs,
    under_load, wait_until,
};
use nix::sys::signal::{Signal, kill};

const MESH: &str = include_str!("../manifests/mesh.yaml");
/// A pod that comes later.
const LATE: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: app, labels: {app: late}}\n\
                    spec: {nodeName: node-a, serviceAccountName: client, containers: [{name: idle, command: [sleep, infinity]}]}\n";

/// The agent of a node knows its proxy and all pods of its node, and has captured them.
fn wait_for_agent(cluster: &Cluster, node: &str) {
    let agent = format!("agent@{node}");
    wait_until(&format!("{agent} to have captured its pods"), PATIENCE, || {
        // One that has just started may not answer yet.
        let page = |path: &str| cluster.verb(&["admin", &agent, path]).run().stdout;
        // Not its readiness: without a control plane it is not ready.
        let (pods, numbers) = (page("/pods"), page("/metrics"));
        let proxy = numbers.lines().any(|line| line == "justmtls_agent_proxy_connected 1");
        let knows = pods.contains("\"state\":\"captured\"") && proxy;
        if knows { Ok(()) } else { Err(format!("{pods} {numbers}")) }
    });
}

/// A pod starts with the node's agent as it is now, speaks, and is gone again.
fn a_pod_comes_and_goes(cluster: &Cluster) {
    let address = cluster.address("app/server", Family::V4).to_string();
    cluster.apply(LATE);
    cluster.wait_ready();
    let url = format!("http://{address}:{PORT}/late");
    cluster.exec("app/late", &["curl", "-sS", "--max-time", "10", &url]).run().ok();
    cluster.delete(LATE);
    eventually("the agent to have let it go", PATIENCE, || !cluster.page("agent@node-a", "/pods").contains("app/late"));
}

#[test]
fn a_killed_proxy_is_replaced_without_a_control_plane() {
    needs!("root", "dumpcap", "tshark");
    for node in ["node-a", "node-b"] {
        let cluster = Cluster::start(MESH);
        let control = cluster.hold("control");
        let report = under_load(&cluster, &format!("proxy-of-{node}"), false, |_| {
            let killed = cluster.kill(node);
            assert!(is_gone(killed.old) && !is_gone(killed.new));
        });
        assert!(is_gone(control));
        assert_only_what_was_open_broke(&report, 1);
        let certificates = cluster.admin(node, "/certificates").to_string();
        assert!(certificates.contains("spiffe://") && !certificates.contains("PRIVATE"), "{certificates}");
    }
}

#[test]
fn a_killed_agent_is_noticed_by_nobody_and_the_next_one_has_its_pods() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let report = under_load(&cluster, "agent", false, |load| {
        let killed = cluster.kill("agent@node-a");
        assert!(is_gone(killed.old) && !is_gone(killed.new));
        load.wait_for_more(ENOUGH);
    });
    report.assert_nothing_failed();
    wait_for_agent(&cluster, "node-a");
    let _server = Server::start(&cluster, "app/server", PORT);
    a_pod_comes_and_goes(&cluster);
}

#[test]
fn agent_and_proxy_die_one_after_the_other_without_a_control_plane() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let control = cluster.hold("control");
    let report = under_load(&cluster, "both", false, |load| {
        for name in ["agent@node-a", "node-a", "agent@node-a"] {
            let killed = cluster.kill(name);
            assert!(is_gone(killed.old) && !is_gone(killed.new));
            // The next one dies when the other has taken over: both at once is another promise (P8).
            wait_for_agent(&cluster, "node-a");
            load.wait_for_more(ENOUGH);
        }
    });
    assert!(is_gone(control));
    assert_only_what_was_open_broke(&report, 1);
    cluster.resume("control");
    // The agents too: nobody speaks with a pod whose capture the control plane has not heard of.
    eventually("the nodes to be back at the control plane", PATIENCE, || {
        ["node-a", "node-b"].iter().all(|node| {
            cluster.metric(node, "justmtls_proxy_control_plane_connected") == 1
                && cluster.metric(&format!("agent@{node}"), "justmtls_agent_control_plane_connected") == 1
        })
    });
    let _server = Server::start(&cluster, "app/server", PORT);
    a_pod_comes_and_goes(&cluster);
}

#[test]
fn a_proxy_is_upgraded_and_rolled_back_and_no_connection_is_lost() {
    needs!("root", "dumpcap", "tshark");
    for (node, without_control) in [("node-a", false), ("node-b", true)] {
        let cluster = Cluster::start(MESH);
        if without_control {
            cluster.hold("control");
        }
        let mut old = Vec::new();
        let report = under_load(&cluster, &format!("upgrade-of-{node}"), false, |load| {
            for _ in 0..2 {
                let upgraded = cluster.upgrade(node);
                old.push(upgraded.old);
                load.wait_for_more(ENOUGH);
            }
        });
        report.assert_nothing_failed();
        // What they had ended in order, and so did they.
        eventually("the old proxies to end", PATIENCE, || old.iter().all(|pid| is_gone(*pid)));
    }
}

#[test]
fn an_agent_is_upgraded_and_rolled_back_and_nobody_notices() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let mut old = Vec::new();
    let report = under_load(&cluster, "upgrade-of-agent", false, |load| {
        for _ in 0..2 {
            old.push(cluster.upgrade("agent@node-a").old);
            load.wait_for_more(ENOUGH);
        }
    });
    report.assert_nothing_failed();
    eventually("the old agents to end", PATIENCE, || old.iter().all(|pid| is_gone(*pid)));
    wait_for_agent(&cluster, "node-a");
    let _server = Server::start(&cluster, "app/server", PORT);
    a_pod_comes_and_goes(&cluster);
}

#[test]
fn a_proxy_that_drains_serves_what_it_has_until_it_is_told_again() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _echo = cluster.serve("app/server", &["echo", "7000"]);
    let address = cluster.address("app/server", Family::V4).to_string();
    let mut held = cluster.tcp("app/client", &["hold", &address, "7000"]).spawn();
    held.wait_for("open");
    let upgraded = cluster.upgrade("node-a");
    // The old one has this connection alone, and the new one those that come now.
    held.write("still\n");
    held.wait_for("back still");
    let asked = cluster.tcp("app/client", &["ask", &address, "7000", "new"]).run().ok();
    assert!(asked.starts_with("said new"), "{asked}");
    assert!(!is_gone(upgraded.old));
    kill(upgraded.old, Signal::SIGTERM).unwrap();
    eventually("the old proxy to end at once", PATIENCE, || is_gone(upgraded.old));
    held.write("gone\n");
    eventually("its connection to end", PATIENCE, || !held.is_alive());
    assert!(!held.stdout().contains("back gone"));
}

#[test]
fn at_the_end_of_the_drain_time_what_is_still_open_is_reset_by_name_and_not_before() {
    needs!("root");
    const DRAIN: Duration = Duration::from_secs(4);
    let option = format!("proxy=--drain={}", DRAIN.as_secs());
    for node in ["node-a", "node-b"] {
        let cluster = Cluster::start_with(&["--process-argument", &option], MESH);
        let _echo = cluster.serve("app/server", &["echo", "7000"]);
        let address = cluster.address("app/server", Family::V4).to_string();
        let mut held = cluster.tcp("app/client", &["hold", &address, "7000"]).spawn();
        held.wait_for("open");
        let began = Instant::now();
        let upgraded = cluster.upgrade(node);
        let told = Instant::now();
        let mut last = told;
        for number in 0.. {
            // One that the end cuts is no answer.
            held.write(format!("{number}\n"));
            let back = format!("back {number}\n");
            eventually("an answer or the end", PATIENCE, || held.stdout().contains(&back) || !held.is_alive());
            if !held.stdout().contains(&back) {
                break;
            }
            last = Instant::now();
        }
        let ended = Instant::now();
        assert!(held.stdout().ends_with("reset\n"), "{}", held.stdout());
        assert!(ended - began >= DRAIN, "it ended after {:?}", ended - began);
        assert!(ended - told < 2 * DRAIN, "it lasted {:?}", ended - told);
        println!("{node}: served {:?} of {DRAIN:?}, then reset", last - told);
        eventually("the old proxy to end", PATIENCE, || is_gone(upgraded.old));
        let log = format!("/proc/{}/root/run/justmtls/nodes/{node}/proxy/access.log", cluster.process(node));
        let log = std::fs::read_to_string(log).expect("the proxies' access log");
        assert!(log.lines().any(|line| line.contains(":7000\"") && line.contains("\"outcome\":\"drained\"")), "{log}");
        // The next one serves.
        let asked = cluster.tcp("app/client", &["ask", &address, "7000", "new"]).run().ok();
        assert!(asked.starts_with("said new"), "{asked}");
    }
}

#[test]
fn an_agent_with_other_rules_than_the_last_one_had_changes_them_in_place_and_nobody_notices() {
    needs!("root", "nft", "dumpcap", "tshark");
    // As an agent of another version may have made them: rules that this one does not have, and one that it has and misses.
    let other = "nft add rule inet justmtls guard_out counter; nft add set inet justmtls other '{ type inet_service; }'; \
                 nft insert rule inet justmtls capture_out tcp dport @other accept; \
                 nft flush chain inet justmtls timeouts_out";
    for (pod, node) in [("app/client", "node-a"), ("app/server", "node-b")] {
        let cluster = Cluster::start(MESH);
        let agent = format!("agent@{node}");
        let rules = || cluster.exec_with(&["--privileged"], pod, &["nft", "--stateless", "list", "ruleset"]).run().ok();
        let before = rules();
        let report = under_load(&cluster, &format!("other-rules-{node}"), true, |load| {
            for _ in 0..3 {
                cluster.hold(&agent);
                cluster.exec_with(&["--privileged"], pod, &["sh", "-ec", other]).run().ok();
                assert_ne!(rules(), before);
                load.wait_for_more(ENOUGH);
                cluster.resume(&agent);
                wait_for_agent(&cluster, node);
                eventually("the rules to be those of the new agent", PATIENCE, || rules() == before);
                load.wait_for_more(ENOUGH);
            }
        });
        report.assert_nothing_failed();
    }
}
