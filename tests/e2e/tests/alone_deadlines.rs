//! How long a connection may keep its port waiting, and how soon a change applies: bounds in time, so these tests run alone.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Cluster, Family, Program, needs, text};

const MESH: &str = include_str!("../manifests/mesh.yaml");
const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: app}\n\
                      spec: {mtls: {mode: STRICT}}\n";
/// How late a deadline may be noticed on a machine with other work.
const SLACK: f64 = 200.0;

fn server(cluster: &Cluster, family: Family) -> String {
    cluster.address("app/server", family).to_string()
}

fn outcome(program: Program) -> (String, f64) {
    let said = program.run().ok();
    let (outcome, milliseconds) = said.trim().rsplit_once(' ').expect("an outcome and its time");
    (outcome.to_owned(), milliseconds.parse().expect("milliseconds"))
}

/// The shortest of a few attempts, which must all begin so and take `at_least` milliseconds.
fn shortest(expected: &str, at_least: f64, program: impl Fn() -> Program) -> f64 {
    let all: Vec<_> = (0..5).map(|_| outcome(program())).collect();
    assert!(
        all.iter().all(|(said, time)| said.starts_with(expected) && *time >= at_least),
        "{expected} {at_least}: {all:?}"
    );
    all.iter().map(|(_, time)| *time).fold(f64::MAX, f64::min)
}

#[test]
fn a_server_that_speaks_first_is_heard_without_a_stall() {
    needs!("root", "ip");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["greet", "7000"]);
    // An address of the pods' range that no pod has.
    cluster.on_node("node-a", &["ip", "address", "add", "10.88.16.200/32", "dev", "lo"]).run().ok();
    let v4 = server(&cluster, Family::V4);
    for family in Family::BOTH {
        let address = server(&cluster, family);
        let tunnel = shortest("said you are", 0.0, || cluster.tcp("app/client", &["look", &address, "7000"]));
        assert!(tunnel < 50.0, "{family:?} through the tunnel: {tunnel} ms");
        for place in ["outside", "node-a", "node-b"] {
            let time = shortest("said you are", 0.0, || cluster.tcp_on(place, &["look", &address, "7000"]));
            assert!(time < 50.0, "{family:?} from {place}, which is not waited for: {time} ms");
        }
        let opted_out = shortest("said you are", 50.0, || cluster.tcp("legacy/outsider", &["look", &address, "7000"]));
        assert!(opted_out < 50.0 + SLACK, "{family:?} from a pod that is known not to be captured: {opted_out} ms");
    }
    let unknown =
        shortest("said you are", 300.0, || cluster.tcp_on("node-a", &["look-from", "10.88.16.200", &v4, "7000"]));
    assert!(unknown < 300.0 + SLACK, "from an unknown address inside: {unknown} ms");
}

#[test]
fn a_client_that_speaks_first_is_not_waited_for() {
    needs!("root", "ip");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    cluster.on_node("node-a", &["ip", "address", "add", "10.88.16.200/32", "dev", "lo"]).run().ok();
    let address = server(&cluster, Family::V4);
    let first = shortest("said hello", 0.0, || cluster.tcp("legacy/outsider", &["ask", &address, "7000", "hello"]));
    assert!(first < 50.0, "from a pod that opted out: {first} ms");
    let unknown = ["ask", &address, "7000", "hello", "0", "10.88.16.200"];
    let first = shortest("said hello", 0.0, || cluster.tcp_on("node-a", &unknown));
    assert!(first < 50.0, "from an unknown address inside: {first} ms");
}

#[test]
fn strict_refuses_by_the_first_byte_and_a_silent_client_after_three_seconds() {
    needs!("root");
    let cluster = Cluster::start(&format!("{MESH}---\n{STRICT}"));
    let _server = cluster.serve("app/server", &["greet", "7000"]);
    let address = server(&cluster, Family::V4);
    let spoken = shortest("reset", 0.0, || cluster.tcp("legacy/outsider", &["provoke-reset", &address, "7000"]));
    assert!(spoken < 50.0, "a byte that begins no hello: {spoken} ms");
    for program in [
        cluster.tcp("legacy/outsider", &["look", &address, "7000"]),
        cluster.tcp_on("outside", &["look", &address, "7000"]),
        cluster.tcp_on("node-b", &["look", &address, "7000"]),
    ] {
        let (said, time) = outcome(program);
        assert!(said == "reset" && (3000.0..3000.0 + SLACK).contains(&time), "a silent client: {said} after {time} ms");
    }
    // And the mesh itself is not slower for it.
    let tunnel = shortest("said you are", 0.0, || cluster.tcp("app/client", &["look", &address, "7000"]));
    assert!(tunnel < 50.0, "through the tunnel: {tunnel} ms");
}

#[test]
fn a_change_of_the_folder_reaches_the_nodes_within_100_milliseconds() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let mode = |node: &str| {
        let shown = cluster.admin(node, "/workloads");
        let all = shown["workloads"].as_array().cloned().unwrap_or_default();
        let server = all.iter().find(|it| text(it, "name") == "server").expect("the node knows the server");
        text(server, "mode").to_owned()
    };
    for node in ["node-a", "node-b"] {
        // From before the command that changes the file starts until after the one that reads the view has ended.
        let mut times = Vec::new();
        for _ in 0..3 {
            for wanted in ["strict", "permissive"] {
                let started = Instant::now();
                if wanted == "strict" {
                    cluster.apply(STRICT)
                } else {
                    cluster.delete(STRICT)
                }
                e2e::eventually(&format!("{node} to hear of it"), Duration::from_secs(5), || mode(node) == wanted);
                times.push(started.elapsed());
            }
        }
        println!("{node}: {times:.0?}");
        assert!(times.iter().all(|time| *time < Duration::from_millis(100)), "{node}: {times:?}");
    }
}
