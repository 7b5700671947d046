//! On a real Kubernetes, strict in force: kubelet's probes go on and nothing else from a node does; every kind of Service leads to
//! its pods; logs, port-forward and jobs work; and whoever is not who he says gets nothing from the control plane.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Finished, Kubernetes, PATIENCE, Program, eventually, needs, wait_until};

const STRICT: &str = include_str!("../manifests/kubernetes_strict.yaml");
const SERVICES: &str = include_str!("../manifests/kubernetes_services.yaml");
const SOON: Duration = Duration::from_secs(120);

fn ask(cluster: &Kubernetes, from: &str, to: &str) -> Finished {
    cluster.ask(from, to, Duration::from_secs(4))
}

#[track_caller]
fn answered(cluster: &Kubernetes, from: &str, to: &str) {
    wait_until(&format!("{from} to be answered by {to}"), SOON, || {
        let asked = ask(cluster, from, to);
        if asked.success() { Ok(()) } else { Err(format!("{asked}")) }
    });
}

#[test]
fn probes_services_and_strangers_under_strict() {
    needs!("root", "go", "containerd", "runc", "curl");
    let cluster = Kubernetes::up("str");
    cluster.install(&[]);
    cluster.apply(STRICT);
    cluster.rolled_out("strict", "deployment/probed");
    cluster.wait_ready("strict");
    probes(&cluster);
    services(&cluster);
    everyday(&cluster);
    wrong_people(&cluster);
}

/// What kubelet asks is answered, and nothing else that comes from where kubelet is.
fn probes(cluster: &Kubernetes) {
    let [first, worker] = cluster.nodes();
    answered(cluster, "strict/caller", "probed.strict:80");
    let pod = &cluster.get(&["-n", "strict", "pods", "-l", "app=probed"])["items"][0];
    let (name, address) = (pod["metadata"]["name"].as_str().unwrap(), pod["status"]["podIP"].as_str().unwrap());
    cluster.wait_captured(&format!("strict/{name}"));
    let curl = |node: &str, arguments: &[&str], path: &str| {
        let url = format!("http://{address}:{path}");
        cluster.on_node(node, &["curl", "-sS", "--max-time", "8"]).args(arguments).args([&url]).run()
    };
    // The probe's twin succeeds; each thing that is not the probe is refused.
    curl(&worker, &[], "8080/ready?deep=1").ok();
    for (arguments, path) in [
        (&[][..], "8080/ready"),
        (&[], "8080/other"),
        (&["-X", "POST", "-d", "body"], "8080/ready?deep=1"),
        (&["-H", "Upgrade: h2c", "-H", "Connection: Upgrade"], "8080/ready?deep=1"),
        (&[], "8081/"),
        (&[], "8082/"),
    ] {
        curl(&worker, arguments, path).fails();
    }
    curl(&first, &[], "8080/ready?deep=1").fails();
    assert!(!ask(cluster, "strict/on-host", "probed.strict:80").success(), "the host's network is no identity");
    // For as long as a liveness probe needs to kill thrice over, nothing is restarted.
    let began = std::time::Instant::now();
    eventually("the time of three liveness probes to pass", SOON, || began.elapsed() > Duration::from_secs(10));
    let pod = &cluster.get(&["-n", "strict", "pod", name]);
    for container in pod["status"]["containerStatuses"].as_array().unwrap() {
        assert_eq!((&container["restartCount"], &container["ready"]), (&0.into(), &true.into()), "{container}");
    }
    let coverage = cluster.says(&["coverage"]);
    let edges = coverage["edges"].as_array().unwrap();
    assert!(edges.iter().any(|edge| edge["reason"] == "probe"), "{coverage}");
    assert!(cluster.justmtls(&["coverage"]).run().ok().contains("probe"));
}

fn services(cluster: &Kubernetes) {
    let pod = &cluster.get(&["-n", "strict", "pods", "-l", "app=probed"])["items"][0];
    let address = pod["status"]["podIP"].as_str().unwrap();
    cluster.apply(&SERVICES.replace("ADDRESS", address));
    let patch = r#"{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.77"}]}}}"#;
    cluster.kubectl(&["-n", "strict", "patch", "service", "balanced", "--subresource=status", "-p", patch]).run().ok();
    for to in [
        "cluster-ip.strict:80",
        "headless.strict:8080",
        "balanced.strict:80",
        "198.51.100.77:80",
        "sticky.strict:80",
        "unready-too.strict:80",
        "elsewhere.strict:80",
        "by-hand.strict:80",
    ] {
        answered(cluster, "strict/caller", to);
    }
    for to in ["local-only.strict:80", "unready.strict:80"] {
        assert!(!ask(cluster, "strict/caller", to).success(), "{to}");
    }
    // Through a node's port the pod's peer is a node, which proves nothing.
    let balanced = cluster.get(&["-n", "strict", "service", "balanced"]);
    let port = &balanced["spec"]["ports"][0]["nodePort"];
    let worker = cluster.node_address(&cluster.nodes()[1]);
    assert!(!ask(cluster, "strict/caller", &format!("{worker}:{port}")).success());
}

fn everyday(cluster: &Kubernetes) {
    cluster.wait_for("the job to have asked", &["-n", "strict", "job", "asks-once"], |job| {
        job["status"]["succeeded"] == 1
    });
    assert!(cluster.kubectl(&["-n", "strict", "logs", "job/asks-once"]).run().ok().contains("\"failed\":0"));
    // port-forward reaches a program on the pod's own loopback.
    let forward = ["-n", "strict", "port-forward", "deployment/probed", ":8080"];
    let mut forward = cluster.kubectl(&forward).spawn();
    forward.wait_for("Forwarding from 127.0.0.1:");
    let said = forward.stdout();
    let port = said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).expect("a port");
    Program::new("curl").args(["-sS", "--max-time", "8", &format!("http://127.0.0.1:{port}/")]).run().ok();
}

/// Tokens that are not those of a node's own process, each refused by its name, and counted.
fn wrong_people(cluster: &Kubernetes) {
    let [_, worker] = cluster.nodes();
    let system = "justmtls-system";
    let node_pod = cluster.node_pod(&worker);
    let token = |account: &str, more: &[&str]| {
        let create = ["-n", system, "create", "token", account];
        cluster.kubectl(&create).args(more).run().ok().trim().to_owned()
    };
    cluster.kubectl(&["-n", system, "create", "serviceaccount", "somebody"]).run().ok();
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", &node_pod];
    let good = token("justmtls-node", &[&["--audience", "justmtls.dev/proxy"], &bound[..]].concat());
    let forged = {
        let (rest, signature) = good.rsplit_once('.').expect("a JWT");
        let turned: String = signature.chars().rev().collect();
        format!("{rest}.{turned}")
    };
    for (name, token) in [
        ("wrong-account", token("somebody", &["--audience", "justmtls.dev/proxy"])),
        ("wrong-audience", token("justmtls-node", &bound)),
        ("unbound", token("justmtls-node", &["--audience", "justmtls.dev/proxy"])),
        ("malformed", "a-token-that-nobody-has-ever-issued".to_owned()),
        ("not-vouched-for", forged),
    ] {
        let before = refused(cluster, name);
        let mut stranger = presented(cluster, &worker, &worker, &token);
        eventually(&format!("a call to be refused as {name}"), PATIENCE, || refused(cluster, name) > before);
        assert!(stranger.is_alive(), "{}", stranger.stderr());
    }
    // The right token on the wrong node: the node's name is the token's.
    let before = refused(cluster, "not-allowed");
    let _stranger = presented(cluster, &worker, "another-node", &good);
    eventually("a call for another node to be refused", PATIENCE, || refused(cluster, "not-allowed") > before);
}

/// A proxy that somebody starts on a node with a token of his.
fn presented(cluster: &Kubernetes, on: &str, claimed: &str, token: &str) -> e2e::Running {
    let service = cluster.get(&["-n", "justmtls-system", "service", "justmtls-control"]);
    let control = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    let bundle = cluster.get(&["-n", "justmtls-system", "configmap", "justmtls-trust-bundle"]);
    let script = "set -e; d=$(mktemp -d -p /dev/shm justmtls-e2e-XXXXXX); trap 'rm -rf $d' EXIT; printf %s \"$1\" >$d/token; \
         printf %s \"$2\" >$d/bundle; chmod 600 $d/token; shift 2; \
         \"$@\" --token $d/token --bundle $d/bundle --agent-socket $d/none --admin $d/admin & read -r _; kill $!; wait $!";
    let binary = e2e::binary();
    let bundle = bundle["data"]["bundle.pem"].as_str().expect("a bundle");
    cluster
        .on_node(on, &["bash", "-c", script, "bash", token, bundle])
        .args([&binary])
        .args(["proxy", "--node", claimed, "--control", &control, "--metrics", "127.0.0.1:0"])
        .spawn()
}

/// Calls that the control planes have refused by this name.
fn refused(cluster: &Kubernetes, name: &str) -> u64 {
    let selector = ["-l", "app.kubernetes.io/name=justmtls-control"];
    let pods = cluster.get(&[&["-n", "justmtls-system", "pods"], &selector[..]].concat());
    let pods = pods["items"].as_array().expect("pods").iter();
    let [first, _] = cluster.nodes();
    let of = |pod: &serde_json::Value| {
        let address = pod["status"]["podIP"].as_str().unwrap_or_default();
        let url = format!("http://{address}:15014/metrics");
        let page = cluster.on_node(&first, &["curl", "-sS", "--max-time", "5", &url]).run().ok();
        let wanted = format!("outcome=\"{name}\"");
        let lines = page
            .lines()
            .filter(|line| line.starts_with("justmtls_control_refused_calls_total") && line.contains(&wanted));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    pods.map(of).sum()
}
