//! Permissive and strict: plaintext has its reason or is refused by name, and the mesh itself notices nothing.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Cluster, Family, OUTSIDE, Wiretap, needs};
use nix::sys::signal::{Signal, kill};

const MESH: &str = include_str!("../manifests/mesh.yaml");

fn peer_authentication(namespace: &str, mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// What a client in `pod` gets from the server: `said hello`, `reset`, `refused` or `timeout`.
fn ask(cluster: &Cluster, pod: &str, family: Family, port: &str) -> String {
    let server = cluster.address("app/server", family).to_string();
    outcome(&cluster.tcp(pod, &["ask", &server, port, "hello"]).run().ok())
}

/// Without the time that it took.
fn outcome(said: &str) -> String {
    said.trim().rsplit_once(' ').map_or(said, |(outcome, _)| outcome).to_owned()
}

/// Waits until plaintext from the outsider fares so.
fn wait_for_outsider(cluster: &Cluster, port: &str, wanted: &str) {
    e2e::wait_until(&format!("the outsider to get {wanted:?}"), Duration::from_secs(5), || {
        let got = ask(cluster, "legacy/outsider", Family::V4, port);
        if got == wanted { Ok(()) } else { Err(got) }
    });
}

#[test]
fn strict_ends_what_was_open_before_capture() {
    needs!("root", "nft");
    let cluster = Cluster::start(MESH);
    // A client that stays outside: no proxy stands between the two.
    let pod = |name: &str, node: &str, labels: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: legacy, labels: {{{labels}}}}}\n\
             spec: {{nodeName: {node}, containers: [{{name: idle, command: [sleep, infinity]}}]}}\n"
        )
    };
    cluster.apply(&pod("other", "node-b", "justmtls.dev/mode: \"off\""));
    let _late = cluster.serve("legacy/outsider", &["echo", "7001"]);
    let mut held = Family::BOTH.map(|family| {
        let late = cluster.address("legacy/outsider", family).to_string();
        let mut client = cluster.tcp("legacy/other", &["hold", &late, "7001"]).spawn();
        client.wait_for("open");
        client
    });
    cluster.apply(&pod("outsider", "node-a", "app: outsider"));
    cluster.wait_edge("node-a", ["inbound", "legacy/other", "legacy/outsider", "7001", "plaintext", "pre-capture"]);
    for client in &mut held {
        client.write("permissive\n");
        client.wait_for("back permissive");
    }
    let ended = || cluster.metric("agent@node-a", "justmtls_agent_refused_connections_ended_total");
    assert_eq!(ended(), 0);
    cluster.apply(&peer_authentication("legacy", "STRICT"));
    e2e::eventually("both to be ended", Duration::from_secs(5), || ended() == 2);
    for client in &mut held {
        client.write("strict\n");
        client.wait_for("reset");
    }
    let listed = || cluster.edges("node-a").iter().any(|edge| edge[5] == "pre-capture");
    e2e::eventually("nothing to be listed", Duration::from_secs(30), || !listed());
}

#[test]
fn strict_refuses_the_outside_pod_and_nobody_else() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let everybody = ["app/client", "app/near", "legacy/outsider"];
    for (pod, family) in everybody.iter().flat_map(|pod| Family::BOTH.map(|family| (pod, family))) {
        assert_eq!(ask(&cluster, pod, family, "7000"), "said hello", "{pod} {family:?}, permissive");
    }
    cluster.apply(&peer_authentication("app", "STRICT"));
    wait_for_outsider(&cluster, "7000", "reset");
    for family in Family::BOTH {
        assert_eq!(ask(&cluster, "legacy/outsider", family, "7000"), "reset", "{family:?}, strict");
        assert_eq!(ask(&cluster, "app/client", family, "7000"), "said hello", "{family:?}, strict");
        assert_eq!(ask(&cluster, "app/near", family, "7000"), "said hello", "{family:?}, strict");
    }
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "none", "strict"]);
    // A node is not exempt.
    let server = cluster.address("app/server", Family::V4).to_string();
    assert_eq!(outcome(&cluster.tcp_on("node-b", &["ask", &server, "7000", "hello"]).run().ok()), "reset");
    cluster.delete(&peer_authentication("app", "STRICT"));
    wait_for_outsider(&cluster, "7000", "said hello");
}

#[test]
fn the_mesh_notices_no_switch_to_strict_and_back() {
    needs!("root");
    const COUNT: &str = "1500";
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let flood = |pod: &str| cluster.tcp(pod, &["flood", &server, "7000", COUNT, "4"]).spawn();
    let mut floods = [flood("app/client"), flood("app/near")];
    let mut switches = 0;
    while floods.iter_mut().any(|flood| flood.is_alive()) {
        cluster.apply(&peer_authentication("app", "STRICT"));
        wait_for_outsider(&cluster, "7000", "reset");
        cluster.delete(&peer_authentication("app", "STRICT"));
        wait_for_outsider(&cluster, "7000", "said hello");
        switches += 1;
    }
    assert!(switches >= 3, "the load spans only {switches} switches");
    for flood in floods {
        let said = flood.finish(Duration::from_secs(1)).ok();
        assert!(said.starts_with(&format!("good {COUNT} of {COUNT} ")), "{said}");
    }
}

#[test]
fn strict_ends_open_plaintext_within_a_second() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut insider = cluster.tcp("app/client", &["hold", &server, "7000"]).spawn();
    let mut outsider = cluster.tcp("legacy/outsider", &["wait-for-end", &server, "7000"]).spawn();
    insider.wait_for("open");
    insider.write("before\n");
    insider.wait_for("back before");
    outsider.wait_for("open hello");
    let change = Instant::now();
    cluster.apply(&peer_authentication("app", "STRICT"));
    outsider.wait_for("reset");
    let took = change.elapsed();
    assert!(took < Duration::from_secs(1), "open plaintext was ended only after {took:?}");
    insider.write("after\n");
    insider.wait_for("back after");
}

#[test]
fn the_narrowest_policy_decides() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _open = cluster.serve("app/server", &["echo", "7000"]);
    let _closed = cluster.serve("app/server", &["echo", "7443"]);
    // A client from outside the cluster: who opted out is enrolled as soon as the mesh is strict.
    let server = cluster.address("app/server", Family::V6).to_string();
    let wait_for = |port: &str, wanted: &str| {
        e2e::wait_until(&format!("a client from outside to get {wanted:?}"), Duration::from_secs(5), || {
            let got = outcome(&cluster.tcp_on("outside", &["ask", &server, port, "hello"]).run().ok());
            if got == wanted { Ok(()) } else { Err(got) }
        });
    };
    wait_for("7000", "said hello");
    cluster.apply(&peer_authentication("justmtls-system", "STRICT"));
    wait_for("7000", "reset");
    cluster.apply(&peer_authentication("app", "PERMISSIVE"));
    wait_for("7000", "said hello");
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: server, namespace: app}\n\
         spec: {selector: {matchLabels: {app: server}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {\"7443\": {mode: STRICT}}}\n",
    );
    wait_for("7443", "reset");
    wait_for("7000", "said hello");
    assert_eq!(ask(&cluster, "app/client", Family::V4, "7443"), "said hello");
}

#[test]
fn strict_beats_an_opt_out() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    assert_eq!(ask(&cluster, "legacy/outsider", Family::V4, "7000"), "said hello");
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "plaintext", "opted-out"]);
    cluster.apply(&peer_authentication("justmtls-system", "STRICT"));
    wait_for_outsider(&cluster, "7000", "said hello");
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "mtls", ""]);
}

#[test]
fn permissive_plaintext_has_its_reason() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let _outsider = cluster.serve("legacy/outsider", &["echo", "7001"]);
    let mut outside = cluster.tcp_on("outside", &["echo", "7002"]).spawn();
    outside.wait_for("ready");
    let server = cluster.address("app/server", Family::V4).to_string();
    let outsider = cluster.address("legacy/outsider", Family::V4).to_string();
    let ask = |program: e2e::Program| assert_eq!(outcome(&program.run().ok()), "said hello");

    ask(cluster.tcp("legacy/outsider", &["ask", &server, "7000", "hello"]));
    cluster.wait_edge("node-b", ["inbound", "legacy/outsider", "app/server", "7000", "plaintext", "opted-out"]);
    ask(cluster.tcp("app/server", &["ask", &outsider, "7001", "hello"]));
    cluster.wait_edge("node-b", ["outbound", "app/server", "legacy/outsider", "7001", "plaintext", "opted-out"]);
    for address in OUTSIDE {
        ask(cluster.tcp("app/server", &["ask", address, "7002", "hello"]));
        cluster.wait_edge("node-b", ["outbound", "app/server", address, "7002", "plaintext", "outside"]);
    }
    ask(cluster.tcp_on("outside", &["ask", &server, "7000", "hello"]));
    let plaintext = |reason: &str| {
        let all = cluster.edges("node-b");
        all.into_iter().any(|edge| edge[0] == "inbound" && edge[4] == "plaintext" && edge[5] == reason)
    };
    e2e::eventually("the client outside to be listed", Duration::from_secs(5), || plaintext("outside"));
    ask(cluster.tcp_on("node-b", &["ask", &server, "7000", "hello"]));
    e2e::eventually("the node to be listed", Duration::from_secs(5), || plaintext("node"));
    let metrics = cluster.page("node-b", "/metrics");
    for reason in ["opted-out", "outside", "node"] {
        assert!(metrics.contains(&format!("reason=\"{reason}\"")), "no number for {reason}:\n{metrics}");
    }
}

#[test]
fn a_policy_lets_in_whom_it_names_and_one_that_cannot_be_enforced_nobody() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let policy = |rule: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: server, namespace: app}}\n\
             spec: {{selector: {{matchLabels: {{app: server}}}}, action: ALLOW, rules: [{rule}]}}\n"
        )
    };
    let wait_for = |client: &str, near: &str| {
        e2e::wait_until(&format!("the clients to get {client:?} and {near:?}"), Duration::from_secs(5), || {
            let got = ["app/client", "app/near"].map(|pod| ask(&cluster, pod, Family::V4, "7000"));
            if got == [client, near] { Ok(()) } else { Err(format!("{got:?}")) }
        });
    };
    wait_for("said hello", "said hello");
    cluster.apply(&policy("{from: [{source: {principals: [cluster.local/ns/app/sa/client]}}]}"));
    wait_for("said hello", "reset");
    cluster.wait_edge("node-b", ["inbound", "app/near", "app/server", "7000", "none", "policy-no-allow"]);
    // A condition on HTTP, which nobody here looks into.
    let unreadable = policy("{to: [{operation: {methods: [GET]}}]}");
    cluster.apply(&unreadable);
    wait_for("reset", "reset");
    let problems = cluster.page("control", "/problems");
    assert!(problems.contains("AuthorizationPolicy app/server"), "{problems}");
    cluster.delete(&unreadable);
    wait_for("said hello", "said hello");
}

#[test]
fn an_unknown_address_inside_is_refused() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let mut tap = Wiretap::start(&cluster, "node-a", "unknown");
    for address in ["10.88.17.99", "fd88:17::99", "10.96.77.7"] {
        let said = outcome(&cluster.tcp("app/client", &["ask", address, "7000", "hello"]).run().ok());
        assert_eq!(said, "reset", "{address}");
        cluster.wait_edge("node-a", ["outbound", "app/client", address, "7000", "none", "unknown-destination"]);
    }
    tap.stop();
    let sent = tap.fields(7000, "tcp.port == 7000", &["frame.number"]);
    assert!(sent.is_empty(), "{} packets left for addresses that nobody knows", sent.len());
}

#[test]
fn a_workload_of_the_mesh_is_never_sent_to_in_clear() {
    needs!("root", "dumpcap", "tshark");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    assert_eq!(ask(&cluster, "app/client", Family::V4, "7000"), "said hello");
    let mut tap = Wiretap::start(&cluster, "node-a", "never");
    // The server's proxy accepts and says nothing: a client that fell back to plaintext would do it now.
    let proxy = cluster.process("node-b");
    kill(proxy, Signal::SIGSTOP).unwrap();
    let server = cluster.address("app/server", Family::V4).to_string();
    // Through a warm tunnel it waits for the other side's consent, which may take as long as reaching an application may.
    let ask = cluster.tcp("app/client", &["ask", &server, "7000", "a-secret-for-nobody"]);
    let said = ask.within(Duration::from_secs(60)).run().ok();
    kill(proxy, Signal::SIGCONT).unwrap();
    assert_ne!(outcome(&said), "said a-secret-for-nobody");
    tap.stop();
    tap.streams(7000).assert_all_tls();
    assert!(!tap.saw("a-secret-for-nobody"));
}
