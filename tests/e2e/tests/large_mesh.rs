//! A mesh that is too large to be told to everybody: a proxy is told of its own node and of what it asks about, and its users
//! notice nothing of that.

#![forbid(unsafe_code)]

use e2e::{Cluster, Family, OUTSIDE, PORT, Server, eventually, needs, wait_until};

const MESH: &str = include_str!("../manifests/mesh.yaml");

/// Every mesh is too large, and the address outside lies in a range that pods share with others.
const SETTINGS: &str = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: justmtls, namespace: justmtls-system}\n\
                        data: {wholeMeshUpTo: \"0\", mixedCIDRs: 203.0.113.0/24, serviceCIDRs: \"10.96.0.0/16,fd96::/108\"}\n";

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: shop, namespace: app}\n\
                       spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}\n";

/// The names of the workloads that a node's proxy knows.
fn known(cluster: &Cluster, node: &str) -> Vec<String> {
    let page = cluster.admin(node, "/workloads");
    let all = page["workloads"].as_array().expect("a list of workloads");
    let mut names: Vec<_> = all.iter().map(|it| it["name"].as_str().expect("a name").to_owned()).collect();
    names.sort();
    names
}

fn wait_known(cluster: &Cluster, node: &str, wanted: &[&str]) {
    wait_until(&format!("{node} to know {wanted:?}"), e2e::PATIENCE, || {
        let known = known(cluster, node);
        if known == wanted { Ok(()) } else { Err(format!("{known:?}")) }
    });
}

fn get(cluster: &Cluster, url: &str) -> String {
    cluster.exec("app/client", &["curl", "-sS", "--max-time", "10", url]).run().ok()
}

#[test]
fn a_proxy_knows_its_own_node_and_what_it_asks_about_and_nobody_notices() {
    needs!("root");
    let cluster = Cluster::start(&format!("{MESH}{SETTINGS}{SERVICE}"));
    wait_known(&cluster, "node-a", &["client", "outsider"]);
    wait_known(&cluster, "node-b", &["near", "server"]);
    let _server = Server::start(&cluster, "app/server", PORT);

    // By its Service, so that the Service comes with its endpoint; and the other side asks who the client is.
    let service = cluster.service("app", "shop", Family::V4);
    get(&cluster, &format!("http://{service}/"));
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/server", "8080", "mtls", ""]);
    wait_known(&cluster, "node-a", &["client", "outsider", "server"]);
    wait_known(&cluster, "node-b", &["client", "near", "server"]);

    // What nothing has is outside where it may be, by name, and is refused where it may not.
    let mut outside = cluster.tcp_on("outside", &["echo", "7002"]).spawn();
    outside.wait_for("ready");
    let said = cluster.tcp("app/client", &["ask", OUTSIDE[0], "7002", "hello"]).run().ok();
    assert!(said.starts_with("said hello"), "{said}");
    cluster.wait_edge("node-a", ["outbound", "app/client", OUTSIDE[0], "7002", "plaintext", "outside"]);
    let refused = cluster.tcp("app/client", &["ask", "10.96.255.1", "80", "hello"]).run().ok();
    assert!(refused.starts_with("reset"), "{refused}");
    cluster.wait_edge("node-a", ["outbound", "app/client", "10.96.255.1", "80", "none", "unknown-destination"]);

    // What is known stays known to the next proxy, also without a control plane.
    let control = cluster.hold("control");
    assert!(e2e::is_gone(control));
    cluster.kill("node-a");
    let address = cluster.address("app/server", Family::V6);
    get(&cluster, &format!("http://[{address}]:{PORT}/"));
    assert_eq!(known(&cluster, "node-a"), ["client", "outsider", "server"]);
    cluster.resume("control");
    eventually("node-a to be back at the control plane", e2e::PATIENCE, || {
        cluster.metric("node-a", "justmtls_proxy_control_plane_connected") == 1
    });
    let near = cluster.address("app/near", Family::V4);
    let _near = Server::start(&cluster, "app/near", PORT);
    get(&cluster, &format!("http://{near}:{PORT}/"));
    wait_known(&cluster, "node-a", &["client", "near", "outsider", "server"]);
}

/// How many messages about workloads and Services a node's proxy has accepted.
fn accepted(cluster: &Cluster, node: &str) -> u64 {
    let nodes = cluster.admin("control", "/nodes");
    let nodes = nodes.as_array().expect("a list of nodes");
    let streams = nodes.iter().find(|it| it["node"] == node).and_then(|it| it["streams"].as_array()).expect("streams");
    let proxy = streams.iter().find(|it| it["role"] == "proxy").expect("the proxy's stream");
    proxy["kinds"]["address"]["accepted"].as_u64().expect("a count")
}

#[test]
fn changes_go_to_those_whom_they_concern_and_to_nobody_else() {
    needs!("root");
    let cluster = Cluster::start(&format!("{MESH}{SETTINGS}"));
    wait_known(&cluster, "node-a", &["client", "outsider"]);
    wait_known(&cluster, "node-b", &["near", "server"]);
    eventually("both nodes to have all captures", e2e::PATIENCE, || {
        let page = |node: &str| cluster.page(node, "/workloads");
        !page("node-a").contains("capture-pending") && !page("node-b").contains("capture-pending")
    });
    let before = ["node-a", "node-b"].map(|node| accepted(&cluster, node));
    let late = "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: app}\n\
                spec: {nodeName: node-b, containers: [{name: idle, command: [sleep, infinity]}]}\n";
    cluster.apply(late);
    cluster.wait_ready();
    wait_known(&cluster, "node-b", &["late", "near", "server"]);
    cluster.delete(late);
    wait_known(&cluster, "node-b", &["near", "server"]);
    let after = ["node-a", "node-b"].map(|node| accepted(&cluster, node));
    assert_eq!(after[0], before[0], "node-a was told of what it has no use for");
    assert!(after[1] > before[1]);
}
