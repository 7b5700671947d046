//! A namespace leaves the mesh while its pods run, and comes back: by its label alone, in two phases (T4, T47).

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, ENOUGH, Family, PATIENCE, PORT, Server, Wiretap, needs, text, tls_records, wait_until};

/// A client and a server on two nodes, each in a namespace of its own.
const MESH: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: front}\n---\n\
    apiVersion: v1\nkind: Namespace\nmetadata: {name: back}\n---\n\
    apiVersion: v1\nkind: Pod\nmetadata: {name: client, namespace: front, labels: {app: client}}\n\
    spec: {nodeName: node-a, containers: [{name: idle, command: [sleep, infinity]}]}\n---\n\
    apiVersion: v1\nkind: Pod\nmetadata: {name: server, namespace: back, labels: {app: server}}\n\
    spec: {nodeName: node-b, containers: [{name: idle, command: [sleep, infinity]}]}\n";

const SHORT: u64 = 4;
const LONG: u64 = 10;
const EVERY: Duration = Duration::from_millis(50);
/// Whatever a long connection says in a few seconds has more records than this, and what a tunnel of short ones carries in clear none.
const MANY: usize = 30;

fn namespace(name: &str, labels: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}

/// A pod that is to leave and to come back.
struct Leaver<'a> {
    cluster: &'a Cluster,
    namespace: &'a str,
    pod: &'a str,
    agent: &'a str,
}

impl Leaver<'_> {
    fn off(&self) {
        self.cluster.apply(&namespace(self.namespace, "justmtls.dev/mode: \"off\""));
        wait_until("the pod to be opted out", PATIENCE, || {
            let pod = self.cluster.pod(self.pod);
            if pod["uncaptured"] == "opted-out" { Ok(()) } else { Err(format!("{pod:#}")) }
        });
    }

    fn on(&self) {
        self.cluster.apply(&namespace(self.namespace, ""));
        wait_until("the pod to be captured", PATIENCE, || {
            let pod = self.cluster.pod(self.pod);
            if pod["captured"] == true { Ok(()) } else { Err(format!("{pod:#}")) }
        });
        self.wait_state("captured");
    }

    /// Waits until the node's agent says so of it.
    fn wait_state(&self, wanted: &str) {
        wait_until(&format!("the agent to say that the pod is {wanted}"), 2 * PATIENCE, || {
            let shown = self.cluster.admin(self.agent, "/pods");
            let mut all = shown.as_array().into_iter().flatten();
            let state = all.find(|it| text(it, "name") == self.pod).map(|it| text(it, "state"));
            if state == Some(wanted) { Ok(()) } else { Err(format!("{shown:#}")) }
        });
    }

    fn has_rules(&self) -> bool {
        let list = self.cluster.exec_with(&["--privileged"], self.pod, &["nft", "list", "ruleset"]);
        list.run().ok().contains("justmtls")
    }
}

/// Under load the namespace of one side leaves, comes back, leaves again and comes back.
#[track_caller]
fn leaves_and_comes_back(namespace: &str, pod: &str, agent: &str) {
    let cluster = Cluster::start(MESH);
    let leaver = Leaver { cluster: &cluster, namespace, pod, agent };
    let server = Server::start(&cluster, "back/server", PORT);
    let marker = format!("marker-{namespace}-{}", std::process::id());
    let mut tap = Wiretap::start(&cluster, "node-a", namespace);
    let mut load = server.load("front/client", Family::V4).marker(&marker).short(SHORT).long(LONG, EVERY).start();
    load.wait_for_more(ENOUGH);
    load.event();

    leaver.off();
    leaver.wait_state("leaving");
    assert!(leaver.has_rules(), "what is open needs them");
    load.wait_for_more(ENOUGH);
    tap.stop();
    assert!(tap.saw(&marker), "what is new goes in clear");
    let [one, other] = ["front/client", "back/server"].map(|pod| cluster.address(pod, Family::V4));
    let streams = tap.streams(PORT).between(one, other);
    let (mut clear, mut long) = (0, 0);
    for direction in &streams.directions {
        // In clear from its first byte on, or TLS to its last.
        match tls_records(&direction.bytes) {
            Ok(records) => long += u64::from(records >= MANY),
            Err(problem) => {
                let head = String::from_utf8_lossy(&direction.bytes[..direction.bytes.len().min(64)]).into_owned();
                assert!(problem.starts_with("byte 0 "), "{} -> {}: {problem}", direction.from, direction.to);
                assert!(head.starts_with("GET ") || head.starts_with("HTTP/"), "{head:?}");
                clear += 1;
            }
        }
    }
    assert!(clear > 0, "nothing was in clear, so the judge proves nothing");
    assert!(long >= 2 * LONG, "{long} directions with many records, of {LONG} connections that were open");

    leaver.on();
    load.wait_for_more(ENOUGH);
    leaver.off();
    leaver.wait_state("leaving");
    load.over();
    load.wait_for_more(ENOUGH);
    let report = load.finish();
    println!("{namespace}: {report}");
    report.assert_spans_the_event();
    report.assert_no_short_failed();
    assert_eq!(report.long(), (LONG, 0, LONG), "{report}");

    // With the last connection the rules go; and they come back.
    leaver.wait_state("not-captured");
    assert!(!leaver.has_rules());
    leaver.on();
    assert!(leaver.has_rules());
    let url = format!("http://{}/", server.address(Family::V4));
    cluster.exec("front/client", &["curl", "-sS", "--max-time", "10", &url]).run().ok();
    let port = PORT.to_string();
    cluster.wait_edge("node-b", ["inbound", "front/client", "back/server", &port, "mtls", ""]);
}

#[test]
fn a_namespace_of_servers_leaves_and_comes_back_and_no_connection_notices() {
    needs!("root", "nft", "curl", "dumpcap", "tshark");
    leaves_and_comes_back("back", "back/server", "agent@node-b");
}

#[test]
fn a_namespace_of_clients_leaves_and_comes_back_and_no_connection_notices() {
    needs!("root", "nft", "curl", "dumpcap", "tshark");
    leaves_and_comes_back("front", "front/client", "agent@node-a");
}
