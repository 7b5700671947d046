//! Capture: what was open goes on, what is new is caught, and nothing in the pod gets round it.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, PATIENCE, Shared, Wiretap, eventually, needs, wait_until};
use nix::sys::signal::{Signal, kill};

const MESH: &str = include_str!("../manifests/mesh.yaml");
static BOX: Shared = Shared::new(MESH);

fn server(cluster: &Cluster, family: Family) -> String {
    cluster.address("app/server", family).to_string()
}

/// What a verb of `tcp.py` prints, without the time.
fn outcome(cluster: &Cluster, pod: &str, arguments: &[&str]) -> String {
    without_time(&cluster.tcp(pod, arguments).run().ok())
}

fn without_time(said: &str) -> String {
    said.trim().rsplit_once(' ').map_or(said, |(outcome, _)| outcome).to_owned()
}

fn rules(cluster: &Cluster, pod: &str) -> String {
    cluster.exec_with(&["--privileged"], pod, &["nft", "list", "ruleset"]).run().ok()
}

fn nft(cluster: &Cluster, pod: &str, command: &[&str]) {
    cluster.exec_with(&["--privileged"], pod, &["nft"]).args(command).run().ok();
}

/// Takes the guard on the pod's interface away.
fn disarm(cluster: &Cluster, pod: &str) {
    let command = ["tc", "qdisc", "del", "dev", "eth0", "clsact"];
    cluster.exec_with(&["--privileged"], pod, &command).run().ok();
}

/// How many packets it has dropped.
fn guard_drops(cluster: &Cluster, pod: &str) -> u64 {
    let shown =
        cluster.exec_with(&["--privileged"], pod, &["tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]).run().ok();
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("tc prints JSON");
    let mut all = shown.as_array().into_iter().flatten();
    let guard = all.find(|it| it["kind"] == "clsact").expect("the guard stands");
    guard["drops"].as_u64().expect("it is counted")
}

/// Whether the control plane tells everybody that the pod speaks our protocol.
fn is_published(cluster: &Cluster, pod: &str) -> bool {
    let shown = cluster.admin("control", "/workloads");
    let mut all = shown["workloads"].as_array().into_iter().flatten();
    let name = |it: &serde_json::Value| format!("{}/{}", e2e::text(it, "namespace"), e2e::text(it, "name"));
    all.any(|it| name(it) == pod && it["captured"] == true)
}

#[test]
fn a_connection_from_before_capture_goes_on() {
    needs!("root", "nft");
    let cluster = Cluster::start(MESH);
    let enrolled = "apiVersion: v1\nkind: Pod\nmetadata: {name: outsider, namespace: legacy, labels: {app: outsider}}\n\
                    spec: {nodeName: node-a, containers: [{name: idle, command: [sleep, infinity]}]}\n";
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let _late = cluster.serve("legacy/outsider", &["echo", "7001"]);
    let outsider = cluster.address("legacy/outsider", Family::V4).to_string();
    let mut held: Vec<_> = Family::BOTH
        .iter()
        .map(|family| cluster.tcp("legacy/outsider", &["hold", &server(&cluster, *family), "7000"]))
        .chain([cluster.tcp("app/server", &["hold", &outsider, "7001"])])
        .map(|client| client.spawn())
        .collect();
    for client in &mut held {
        client.wait_for("open");
        client.write("before\n");
        client.wait_for("back before");
    }
    assert!(!rules(&cluster, "legacy/outsider").contains("justmtls"), "the pod was to be captured later");

    // No restart: the same pod, with its programs, is enrolled while it runs.
    let uid = cluster.pod("legacy/outsider")["uid"].clone();
    cluster.apply(enrolled);
    wait_until("the pod to be published", PATIENCE, || {
        if is_published(&cluster, "legacy/outsider") {
            Ok(())
        } else {
            Err(format!("{:#}", cluster.admin("control", "/workloads")))
        }
    });
    assert!(rules(&cluster, "legacy/outsider").contains("justmtls"));
    assert_eq!(cluster.pod("legacy/outsider")["uid"], uid);
    for client in &mut held {
        client.write("after\n");
        client.wait_for("back after");
    }
    // And what is new is mTLS, both ways.
    assert_eq!(
        outcome(&cluster, "legacy/outsider", &["ask", &server(&cluster, Family::V6), "7000", "hello"]),
        "said hello"
    );
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "mtls", ""]);
    assert_eq!(outcome(&cluster, "app/server", &["ask", &outsider, "7001", "hello"]), "said hello");
    cluster.wait_edge("node-a", ["inbound", "app/server", "legacy/outsider", "7001", "mtls", ""]);
}

#[test]
fn a_pod_is_published_only_after_its_capture_is_confirmed() {
    needs!("root", "nft");
    let cluster = Cluster::start(MESH);
    // An agent that does nothing cannot capture: nothing of the pod may run, and nobody may think that it speaks our protocol.
    let agent = cluster.process("agent@node-b");
    kill(agent, Signal::SIGSTOP).unwrap();
    cluster.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: app}\n\
         spec: {nodeName: node-b, containers: [{name: idle, command: [sleep, infinity]}]}\n",
    );
    wait_until("the control plane to know the pod", PATIENCE, || {
        let shown = cluster.page("control", "/workloads");
        if shown.contains("\"late\"") { Ok(()) } else { Err(shown) }
    });
    assert!(!is_published(&cluster, "app/late"));
    assert_eq!(cluster.pod("app/late")["phase"], "Pending");
    kill(agent, Signal::SIGCONT).unwrap();
    wait_until("the pod to be published", PATIENCE, || {
        if is_published(&cluster, "app/late") { Ok(()) } else { Err(format!("{:#}", cluster.pod("app/late"))) }
    });
    cluster.wait_ready();
    assert!(rules(&cluster, "app/late").contains("justmtls"));
}

#[test]
fn what_slips_by_both_guards_is_named_a_bypass() {
    needs!("root", "nft", "tc");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let address = server(&cluster, Family::V4);
    let before = rules(&cluster, "app/client");
    assert!(before.contains("table inet justmtls"));
    let mut open = cluster.tcp("app/client", &["hold", &address, "7000"]).spawn();
    open.wait_for("open");

    // While its agent cannot repair them, a connection of the pod comes in clear, and its receiver says what it is.
    let agent = cluster.process("agent@node-a");
    kill(agent, Signal::SIGSTOP).unwrap();
    nft(&cluster, "app/client", &["flush", "ruleset"]);
    assert_eq!(rules(&cluster, "app/client"), "");
    // The guard on the interface stands, and lets nothing out.
    let alone = cluster.tcp("app/client", &["ask", &address, "7000", "a-secret"]).spawn();
    eventually("the guard to drop it", PATIENCE, || guard_drops(&cluster, "app/client") > 0);
    disarm(&cluster, "app/client");
    drop(alone);
    assert_eq!(outcome(&cluster, "app/client", &["ask", &address, "7000", "hello"]), "said hello");
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/server", "7000", "plaintext", "bypass"]);
    // A strict receiver does not take it.
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: app}\n\
         spec: {mtls: {mode: STRICT}}\n",
    );
    eventually("strict to be enforced", Duration::from_secs(5), || {
        outcome(&cluster, "app/client", &["ask", &address, "7000", "hello"]) == "reset"
    });
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/server", "7000", "none", "strict-bypass"]);

    kill(agent, Signal::SIGCONT).unwrap();
    wait_until("the rules to be back", Duration::from_secs(5), || {
        let now = rules(&cluster, "app/client");
        if now.contains("table inet justmtls") { Ok(()) } else { Err(now) }
    });
    assert_eq!(outcome(&cluster, "app/client", &["ask", &address, "7000", "hello"]), "said hello");
}

#[test]
fn while_the_agent_is_dead_connections_are_tunnelled_or_refused_and_never_in_clear() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    cluster.hold("agent@node-a");
    let mut tap = Wiretap::start(&cluster, "node-a", "no-agent");
    let address = server(&cluster, Family::V4);
    // More than the proxy's stash of sockets holds; those that get none wait for one until they give up.
    let all: Vec<_> =
        (0..20).map(|_| cluster.tcp("app/client", &["ask", &address, "7000", "a-secret"]).spawn()).collect();
    let fared: Vec<_> = all.into_iter().map(|client| without_time(&client.finish(PATIENCE).ok())).collect();
    tap.stop();
    assert!(fared.iter().all(|it| ["said a-secret", "reset", "timeout"].contains(&it.as_str())), "{fared:?}");
    assert!(fared.iter().any(|it| it == "said a-secret"), "what is captured stays so: {fared:?}");
    println!(
        "{} of {} connections without an agent",
        fared.iter().filter(|it| *it == "said a-secret").count(),
        fared.len()
    );
    assert!(!tap.saw("a-secret"));
    tap.streams(7000).assert_all_tls();
}

#[test]
fn flushed_rules_are_repaired() {
    needs!("root", "nft", "ip");
    let cluster = BOX.get();
    let damages: [&[&str]; 3] = [
        &["nft", "flush", "ruleset"],
        &["sh", "-c", "ip rule del pref 1000; ip -6 rule del pref 1000"],
        &["nft", "add", "rule", "inet", "justmtls", "capture_out", "accept"],
    ];
    for damage in damages {
        let fingerprint = || {
            let routes = cluster.exec("app/near", &["sh", "-c", "ip rule; ip -6 rule"]).run().ok();
            rules(&cluster, "app/near").lines().filter(|line| !line.contains("packets")).collect::<String>() + &routes
        };
        let before = fingerprint();
        let broken = cluster.exec_with(&["--privileged"], "app/near", damage).run();
        assert!(broken.success(), "the damage was not done: {broken}");
        wait_until(&format!("{damage:?} to be repaired"), Duration::from_secs(5), || {
            let now = fingerprint();
            if now == before { Ok(()) } else { Err(format!("{now}\n\nand not\n\n{before}")) }
        });
    }
}

#[test]
fn a_process_of_the_pod_cannot_join_a_listener() {
    needs!("root");
    let cluster = BOX.get();
    // As root and as the user that owns the listeners where another exists: neither is let in, whichever option it sets.
    let addresses = [("127.0.0.1", "15001"), ("::1", "15001"), ("0.0.0.0", "15006"), ("::", "15006")];
    for user in ["0", "2148"] {
        for (address, port) in addresses {
            let join = ["/usr/bin/python3", &e2e::script("tcp.py"), "join-listener", address, port];
            let said = cluster.exec_with(&["--user", user], "app/client", &join).run().ok();
            let all: Vec<_> = said.lines().collect();
            assert!(
                all.len() == 3 && all.iter().all(|line| *line == "not joined EADDRINUSE"),
                "{user} {address} {port}: {said}"
            );
        }
    }
}

#[test]
fn the_listeners_cannot_be_dialled() {
    needs!("root");
    let cluster = BOX.get();
    for family in Family::BOTH {
        let address = server(&cluster, family);
        for port in ["15001", "15006"] {
            for pod in ["app/client", "app/near", "legacy/outsider", "app/server"] {
                let said = outcome(&cluster, pod, &["look", &address, port]);
                assert!(["refused", "reset"].contains(&said.as_str()), "{pod} to {address} {port}: {said}");
            }
        }
        let loopback = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        for port in ["15001", "15006"] {
            let said = outcome(&cluster, "app/client", &["look", loopback, port]);
            assert!(["refused", "reset"].contains(&said.as_str()), "from within to {loopback} {port}: {said}");
        }
    }
}

#[test]
fn a_guessed_mark_does_not_pass() {
    needs!("root", "dumpcap", "tshark");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["echo", "7010"]);
    let mut tap = Wiretap::start(&cluster, "node-a", "marks");
    // Those that other meshes use, small ones, and the one of our routing table: NET_RAW, which pods have, is enough to set them.
    for mark in ["0x1", "0x539", "0x111", "0x3e8", "0x6a6d", "0x800", "0x1337", "0x7fffffff"] {
        let said = outcome(&cluster, "app/client", &["ask", &server(&cluster, Family::V4), "7010", "a-guess", mark]);
        assert!(["said a-guess", "reset", "timeout"].contains(&said.as_str()), "{mark}: {said}");
    }
    tap.stop();
    assert!(!tap.saw("a-guess"), "a mark that anybody can guess exempts from capture");
    tap.streams(7010).assert_all_tls();
}
