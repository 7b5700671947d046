//! The kubelet's probes where plaintext is refused: what a pod declares passes from its own node, and nothing else does.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, needs};

/// A pod that is ready when its page is served.
const PROBED: &str = "apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: app, labels: {app: probed}}
spec:
  nodeName: node-b
  containers:
    - name: web
      command: [python3, -m, http.server, '8080', --bind, '::', --directory, FOLDER]
      ports: [{name: http, containerPort: 8080}]
      readinessProbe: {httpGet: {path: /page.txt?probe, port: http}}
    - name: idle
      command: [sleep, infinity]
      livenessProbe: {tcpSocket: {port: 8081}}
";

const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: app}
spec: {mtls: {mode: STRICT}}
";

/// What curl gets of the probed pod, from a node.
fn fetch(cluster: &Cluster, node: &str, family: Family, more: &[&str], path: &str) -> Result<String, String> {
    let url = format!("http://{}{path}", cluster.socket("app/probed", family, 8080));
    let command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "10"];
    let done = cluster.on_node(node, &[&command[..], more, &[&url]].concat()).run();
    if done.success() { Ok(done.ok()) } else { Err(done.fails()) }
}

#[test]
fn a_strict_pod_becomes_ready_by_its_probe_and_serves_its_node_nothing_else() {
    needs!("root", "curl");
    let cluster = Cluster::start(include_str!("../manifests/mesh.yaml"));
    cluster.apply(STRICT);
    let folder = cluster.data("pages");
    std::fs::write(folder.join("secret.txt"), "a secret").unwrap();
    cluster.apply(&PROBED.replace("FOLDER", folder.to_str().unwrap()));
    // Not before the page is there: the twin of what follows.
    e2e::wait_until("the probe to be answered, and with no page", Duration::from_secs(30), || {
        let message = cluster.find_pod("app/probed").map(|pod| pod["message"].to_string()).unwrap_or_default();
        if message.contains("it answers 404") { Ok(()) } else { Err(message) }
    });
    std::fs::write(folder.join("page.txt"), "a page").unwrap();
    cluster.wait_ready();

    for family in Family::BOTH {
        assert_eq!(fetch(&cluster, "node-b", family, &[], "/page.txt?probe"), Ok("a page".to_owned()), "{family:?}");
        for (more, path) in [
            (&[][..], "/secret.txt"),
            (&[], "/page.txt"),
            (&["--data", "x"], "/page.txt?probe"),
            (&["--header", "Cookie: a=b"], "/page.txt?probe"),
            (&["--header", "Upgrade: h2c"], "/page.txt?probe"),
        ] {
            let got = fetch(&cluster, "node-b", family, more, path);
            assert!(got.is_err(), "{family:?} {more:?} {path}: {got:?}");
        }
        for elsewhere in ["node-a", "outside"] {
            let got = fetch(&cluster, elsewhere, family, &[], "/page.txt?probe");
            assert!(got.is_err(), "{elsewhere} {family:?}: {got:?}");
        }
    }
    let coverage = cluster.admin("node-b", "/coverage");
    let edges: Vec<_> = coverage.as_array().into_iter().flatten().map(|entry| &entry["edge"]).collect();
    let of = |reason: &str| edges.iter().filter(|edge| edge["reason"] == reason).count();
    let exposed = |edge: &&&serde_json::Value| edge["exposes"] == "GET /page.txt?probe" && edge["reason"] == "probe";
    assert!(edges.iter().filter(exposed).count() >= 1, "{coverage:#}");
    assert!(of("not-the-probe") >= 1 && of("strict") >= 1, "{coverage:#}");
    // Pods of the mesh are asked for no such thing.
    let url = format!("http://{}/secret.txt", cluster.socket("app/probed", Family::V4, 8080));
    assert_eq!(cluster.exec("app/client", &["curl", "--silent", &url]).run().ok(), "a secret");
}
