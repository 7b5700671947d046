//! What is wrong is said in one sentence with its place and its remedy; what is right goes on, and the last good state stays.

#![forbid(unsafe_code)]

use std::fs;

use e2e::{Cluster, Family, PATIENCE, Program, Shared, binary, needs, wait_until};

static BOX: Shared = Shared::new(include_str!("../manifests/mesh.yaml"));

/// Applies a manifest that is wrong, from a file of this name, and gives the complaint.
fn complaint(cluster: &Cluster, name: &str, manifest: &str) -> String {
    let file = cluster.folder().join(name);
    fs::write(&file, manifest).unwrap();
    cluster.verb(&["apply", "-f", file.to_str().unwrap()]).run().fails()
}

fn has_all(complaint: &str, parts: &[&str]) {
    for part in parts {
        assert!(complaint.contains(part), "no {part:?} in: {complaint}");
    }
}

#[test]
fn each_mistake_of_a_manifest_is_one_sentence_with_file_object_field_and_remedy() {
    needs!("root");
    let cluster = BOX.get();
    let service = |spec: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: wrong, namespace: app}}\nspec: {spec}\n")
    };
    has_all(&complaint(&cluster, "broken.yaml", "apiVersion: v1\nkind: [\n"), &["broken.yaml"]);
    let kind = "apiVersion: v1\nkind: Podd\nmetadata: {name: wrong, namespace: app}\n";
    has_all(&complaint(&cluster, "kind.yaml", kind), &["kind.yaml", "Podd"]);
    for port in ["0", "70000"] {
        let file = format!("port-{port}.yaml");
        let said =
            complaint(&cluster, &file, &service(&format!("{{selector: {{app: server}}, ports: [{{port: {port}}}]}}")));
        has_all(&said, &[&file, "Service app/wrong", "spec.ports[0].port", port, "65535"]);
    }
    let twice = format!("{0}---\n{0}", service("{selector: {app: server}, ports: [{port: 80}]}"));
    has_all(&complaint(&cluster, "twice.yaml", &twice), &["twice.yaml", "Service app/wrong"]);
    let node = "apiVersion: v1\nkind: Pod\nmetadata: {name: wrong, namespace: app}\nspec: {nodeName: node-z, containers: [{name: x, command: [sleep, '1']}]}\n";
    has_all(&complaint(&cluster, "node.yaml", node), &["Pod app/wrong", "spec.nodeName", "node-z", "node-a"]);
    let mode = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: wrong, namespace: app}\nspec: {mtls: {mode: STRICTLY}}\n";
    has_all(
        &complaint(&cluster, "mode.yaml", mode),
        &["mode.yaml", "PeerAuthentication app/wrong", "spec.mtls.mode", "STRICT"],
    );
    assert!(cluster.verb(&["apply", "-f", "/no/such/file.yaml"]).run().fails().contains("/no/such/file.yaml"));
}

#[test]
fn a_service_without_pods_is_taken_and_said() {
    needs!("root");
    let cluster = BOX.get();
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: lonely, namespace: app}\nspec: {selector: {app: nobody}, ports: [{port: 80}]}\n");
    let lonely = cluster.service("app", "lonely", Family::V4).to_string();
    let said = cluster.tcp("app/client", &["look", &lonely, "80"]).run().ok();
    assert!(said.starts_with("reset "), "{said}");
}

#[test]
fn what_is_right_in_the_same_file_is_taken_and_the_last_good_state_stays() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["name", "7000", "served"]);
    let service = |name: &str, port: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: app}}\nspec: {{selector: {{app: server}}, ports: [{{port: {port}, targetPort: 7000}}]}}\n"
        )
    };
    cluster.apply(&service("kept", "81"));
    let both = format!("{}---\n{}", service("kept", "70000"), service("new", "82"));
    has_all(&complaint(&cluster, "both.yaml", &both), &["both.yaml", "Service app/kept", "70000"]);
    for (name, port) in [("kept", "81"), ("new", "82")] {
        let address = cluster.service("app", name, Family::V4).to_string();
        wait_until(&format!("{name} to be served"), PATIENCE, || {
            let said = cluster.tcp("app/client", &["look", &address, port]).run().ok();
            if said.starts_with("said served ") { Ok(()) } else { Err(said) }
        });
    }
}

#[test]
fn wrong_command_lines_say_what_is_wrong_and_what_there_is() {
    needs!("root");
    let cluster = BOX.get();
    let unknown = Program::new(binary()).args(["demo", "--frobnicate"]).run().fails();
    has_all(&unknown, &["--frobnicate", "--help"]);
    has_all(&cluster.verb(&["exec", "client", "--", "true"]).run().fails(), &["client", "NAMESPACE/POD"]);
    has_all(&cluster.verb(&["exec", "app/nobody", "--", "true"]).run().fails(), &["app/nobody", "app/client"]);
    has_all(&cluster.verb(&["exec", "--node", "node-z", "--", "true"]).run().fails(), &["node-z", "node-a"]);
    has_all(&cluster.verb(&["admin", "node-z", "/metrics"]).run().fails(), &["node-z"]);
    let argument = ["--process-argument", "kubelet=--v=9"];
    has_all(&cluster.verb(&argument).args(["status"]).run().fails(), &["kubelet=--v=9", "PROCESS=ARGUMENT"]);
    for (process, page) in [("node-a", "/connections"), ("agent@node-a", "/events"), ("control", "/problems")] {
        has_all(&cluster.verb(&["admin", process, "/nothing"]).run().fails(), &["/log", page, "/readyz", "/metrics"]);
        assert_eq!(cluster.admin(process, "/readyz")["ready"], true, "{process}");
    }
    let nowhere = Program::new(binary()).args(["demo", "--state", "/no/such/box", "status"]).run().fails();
    has_all(&nowhere, &["/no/such/box", "justmtls demo start"]);
    let empty = cluster.data("empty");
    let never = cluster.folder().join("never");
    let start = ["demo", "--state", never.to_str().unwrap(), "--manifests", empty.to_str().unwrap(), "start"];
    has_all(&Program::new(binary()).args(start).run().fails(), &["empty", ".yaml"]);
    assert!(!never.exists());
    let start = ["demo", "--state", never.to_str().unwrap(), "--process-argument", "control=--no-such-option", "start"];
    has_all(&Program::new(binary()).args(start).run().fails(), &["control plane did not start", "--no-such-option"]);
    assert!(!never.exists());
}

#[test]
fn a_machine_that_allows_no_namespaces_is_told_in_one_sentence() {
    needs!("root", "unshare");
    let state = std::env::temp_dir().join(format!("justmtls-e2e-forbidden-{}", std::process::id()));
    // In a user namespace of its own the limit is this test's, and not the machine's.
    let forbid = format!(
        "for kind in net mnt pid user; do echo 0 > /proc/sys/user/max_${{kind}}_namespaces; done; exec {} demo --state {} start",
        binary().display(),
        state.display()
    );
    let refusal = Program::new("unshare").args(["--user", "--map-root-user", "sh", "-c", &forbid]).run().fails();
    assert!(refusal.contains("namespace") && refusal.trim().lines().count() == 1, "{refusal}");
    assert!(!state.exists());
}
