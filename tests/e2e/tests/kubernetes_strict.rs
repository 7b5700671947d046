//! On a real Kubernetes, strict in force: kubelet's probes and what the API server calls go on and nothing else from a node does;
//! every kind of Service leads to its pods, and names are found, also by way of a CoreDNS that is enrolled; logs, port-forward and jobs
//! work; and whoever is not who he says gets nothing from the control plane.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Finished, Kubernetes, PATIENCE, Program, eventually, needs, part_needs, wait_until};

const STRICT: &str = include_str!("../manifests/kubernetes_strict.yaml");
const CALLED: &str = include_str!("../manifests/kubernetes_called.yaml");
const SERVICES: &str = include_str!("../manifests/kubernetes_services.yaml");
const SOON: Duration = Duration::from_secs(120);
/// Of one request: longer than a name is asked for again.
const ANSWER: Duration = Duration::from_secs(8);
/// Connections of one client: by chance no one of two endpoints has all of them, nor nearly.
const MANY: u64 = 40;

/// Asks a server for the address of a name, by `udp` or by `tcp`. Prints the code of the answer and the last address in it.
const ASK_NAME: &str = r#"
import socket, struct, sys
server, name, transport = sys.argv[1:]
labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
query = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
if transport == "udp":
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.sendto(query, (server, 53))
    answer = client.recv(4096)
else:
    client = socket.create_connection((server, 53), 5)
    client.sendall(struct.pack("!H", len(query)) + query)
    stream = client.makefile("rb")
    answer = stream.read(*struct.unpack("!H", stream.read(2)))
print(answer[3] & 15, socket.inet_ntoa(answer[-4:]))
"#;

fn ask(cluster: &Kubernetes, from: &str, to: &str) -> Finished {
    cluster.ask(from, to, ANSWER)
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
    needs!("cluster", "curl");
    let cluster = Kubernetes::up("str");
    cluster.install(&[]);
    cluster.apply(STRICT);
    cluster.rolled_out("strict", "deployment/probed");
    cluster.wait_ready("strict");
    probes(&cluster);
    api_server(&cluster);
    services(&cluster);
    endpoints(&cluster);
    node_ports(&cluster);
    names(&cluster);
    everyday(&cluster);
    wrong_people(&cluster);
}

/// What kubelet asks is answered, and nothing else that comes from where kubelet is.
fn probes(cluster: &Kubernetes) {
    answered(cluster, "strict/caller", "probed.strict:80");
    let pod = &cluster.get(&["-n", "strict", "pods", "-l", "app=probed"])["items"][0];
    let (name, address) = (pod["metadata"]["name"].as_str().unwrap(), pod["status"]["podIP"].as_str().unwrap());
    cluster.wait_captured(&format!("strict/{name}"));
    what_a_node_may_ask(cluster, address);
    // By the address: from the host's network the cluster's names may be unknown, which would prove nothing.
    let asked = ask(cluster, "strict/on-host", &format!("{address}:8080"));
    assert!(!asked.success(), "the host's network is no identity: {asked}");
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

/// The probe's twin succeeds; each thing that is not the probe is refused.
fn what_a_node_may_ask(cluster: &Kubernetes, address: &str) {
    part_needs!("nodes");
    let [first, worker] = cluster.nodes();
    let curl = |node: &str, arguments: &[&str], path: &str| {
        let url = format!("http://{address}:{path}");
        cluster.on_node(node, &["curl", "-sS", "--max-time", "8"]).args(arguments).args([&url]).run()
    };
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
}

/// An admission webhook on the worker and an aggregated API beside the API server are called, and nothing else from where the API
/// server is reaches them; probes in TLS and by gRPC are answered.
fn api_server(cluster: &Kubernetes) {
    // Its programs are of the machine that the nodes are on.
    part_needs!("nodes", "openssl", "python3", "grpc");
    let (key, certificate) = certificate(&["hook.strict.svc", "api.strict.svc"]);
    let indented = |pem: &str| format!("|\n{}", pem.lines().map(|line| format!("    {line}\n")).collect::<String>());
    let bundle = Program::new("base64").args(["-w0"]).input(certificate.clone()).run().ok();
    let called = CALLED.replace("A-CERTIFICATE", &indented(&certificate)).replace("A-KEY", &indented(&key));
    cluster.apply(&called.replace("A-BUNDLE", &bundle));
    // By probes in TLS and by gRPC, as there is no other way to be ready.
    cluster.wait_ready("strict");
    for pod in ["strict/hook", "strict/api"] {
        cluster.wait_captured(pod);
    }
    let account = |name: &str| cluster.kubectl(&["-n", "strict", "create", "serviceaccount", name]).run();
    wait_until("the webhook to be called", SOON, || {
        let made = account("allowed");
        if made.success() { Ok(()) } else { Err(format!("{made}")) }
    });
    assert!(account("forbidden").fails().contains("the hook says no"));
    cluster.wait_for("the aggregated API to be available", &["apiservice", "v1.e2e.example"], |api| {
        let mut conditions = api["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|it| it["type"] == "Available" && it["status"] == "True")
    });
    let list = cluster.kubectl(&["get", "--raw", "/apis/e2e.example/v1"]).run().ok();
    assert!(list.contains("\"groupVersion\": \"e2e.example/v1\""), "{list}");

    let [first, worker] = cluster.nodes();
    let curl = |node: &str, pod: &str, url: &str| {
        let address = cluster.addresses(pod)[0];
        let (url, host) =
            (url.replace("ADDRESS", &address.to_string()), url.split(['/', ':']).nth(3).unwrap_or_default());
        let resolve = format!("{host}:8443:{address}");
        let curl = ["curl", "-ksS", "--max-time", "8", "--resolve", &resolve, "-o", "/dev/null", &url];
        cluster.on_node(node, &curl).run()
    };
    // What the API server does, its node may do; the twin of what follows.
    curl(&first, "strict/hook", "https://hook.strict.svc:8443/healthz").ok();
    curl(&first, "strict/api", "https://api.strict.svc:8443/healthz").ok();
    curl(&first, "strict/api", "https://ADDRESS:8443/healthz").ok();
    for (node, pod, url) in [
        (&first, "strict/hook", "https://ADDRESS:8443/healthz"),
        (&first, "strict/hook", "https://other.strict.svc:8443/healthz"),
        (&first, "strict/hook", "http://hook.strict.svc:8443/healthz"),
        (&first, "strict/api", "https://other.strict.svc:8443/healthz"),
        (&first, "strict/api", "http://api.strict.svc:8443/healthz"),
        (&worker, "strict/api", "https://api.strict.svc:8443/healthz"),
        (&worker, "strict/api", "https://ADDRESS:8443/healthz"),
    ] {
        curl(node, pod, url).fails();
    }
    let coverage = cluster.says(&["coverage"]);
    let edges = coverage["edges"].as_array().unwrap();
    for pod in ["strict/hook", "strict/api"] {
        let seen = |edge: &&serde_json::Value| edge["destination"] == pod && edge["reason"] == "api-server";
        let calls: Vec<_> = edges.iter().filter(seen).collect();
        assert!(!calls.is_empty() && calls.iter().all(|edge| edge["security"] == "plaintext"), "{coverage}");
        let refused = |edge: &serde_json::Value| edge["destination"] == pod && edge["reason"] == "not-the-api-server";
        assert!(edges.iter().any(refused), "{coverage}");
    }
    let check = cluster.justmtls(&["check"]).run().stdout;
    let shown = check.lines().find(|line| line.contains("api-servers")).unwrap_or_default();
    assert!(shown.contains(&cluster.node_address(&first)), "{check}");
    // Nobody else waits for the webhook from now on.
    cluster.kubectl(&["delete", "validatingwebhookconfiguration/e2e.example", "apiservice/v1.e2e.example"]).run().ok();
}

/// A key, and a certificate for these names.
fn certificate(names: &[&str]) -> (String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let [key, certificate] = ["key.pem", "certificate.pem"].map(|name| folder.path().join(name));
    let names: Vec<_> = names.iter().map(|name| format!("DNS:{name}")).collect();
    Program::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=e2e", "-addext", &format!("subjectAltName={}", names.join(","))])
        .args(["-keyout".as_ref(), key.as_os_str(), "-out".as_ref(), certificate.as_os_str()])
        .run()
        .ok();
    let read = |file| std::fs::read_to_string(file).expect("openssl has written it");
    (read(key), read(certificate))
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
}

/// Of two endpoints a client reaches both, or one of them where the Service says so: always the same, or that of its own node.
fn endpoints(cluster: &Kubernetes) {
    let slices = ["-n", "strict", "endpointslices", "-l", "kubernetes.io/service-name=sticky"];
    cluster.wait_for("both of the pair to be endpoints", &slices, |slices| {
        let all = slices["items"].as_array().into_iter().flatten();
        let all = all.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        all.filter(|endpoint| endpoint["conditions"]["ready"] == true).count() == 2
    });
    // What is asked again and again until it is so cannot become so by chance.
    let shared = |what: &str, to: &str, holds: fn(u64, u64) -> bool| {
        wait_until(what, SOON, || {
            let [elsewhere, here] = shares(cluster, to);
            if holds(elsewhere, here) { Ok(()) } else { Err(format!("{elsewhere} elsewhere and {here} on its node")) }
        });
    };
    let both = |one: u64, other: u64| one.min(other) >= MANY / 8;
    shared("a client to reach both endpoints", "pair.strict:80", both);
    shared("a client to stay with one endpoint", "sticky.strict:80", |one, other| one.min(other) == 0);
    shared("a client to stay on its node", "local-pair.strict:80", |elsewhere, _| elsewhere == 0);
}

/// How many of [`MANY`] connections of the caller came to each of the pair, all by mTLS: to that on the other node, and to that on
/// the caller's.
fn shares(cluster: &Kubernetes, to: &str) -> [u64; 2] {
    answered(cluster, "strict/caller", to);
    let ended = || ["strict/pair-elsewhere", "strict/pair-here"].map(|pod| cluster.ended("strict/caller", pod, "mtls"));
    let before = ended();
    cluster.load("strict/caller", to).short(2).count(MANY).run(SOON).assert_nothing_failed();
    wait_until("coverage to have them all", PATIENCE, || {
        let after = ended();
        let new = [0, 1].map(|one| after[one].saturating_sub(before[one]));
        if new.iter().sum::<u64>() >= MANY { Ok(new) } else { Err(format!("{before:?} before, {after:?} after")) }
    })
}

/// Through a node's port the pod's peer is a node, which proves nothing: it is let in where plaintext is, and nowhere else.
fn node_ports(cluster: &Kubernetes) {
    let [first, worker] = cluster.nodes();
    let address = cluster.node_address(&worker);
    let port = |namespace: &str, service: &str| {
        let service = cluster.get(&["-n", namespace, "service", service]);
        service["spec"]["ports"][0]["nodePort"].as_u64().expect("a node's port")
    };
    cluster.wait_captured("open/web");
    let url = format!("http://{address}:{}/by-a-node", port("open", "web"));
    let asked = || cluster.on_node(&first, &["curl", "-sS", "--max-time", "8", &url]).run();
    wait_until("a node's port to lead to a pod that is permissive", SOON, || {
        let asked = asked();
        if asked.stdout.contains("/by-a-node for ") { Ok(()) } else { Err(format!("{asked}")) }
    });
    cluster.apply(OPEN_IS_STRICT);
    eventually("strict to refuse what comes through a node's port", SOON, || !asked().success());
    assert!(!ask(cluster, "strict/caller", &format!("{address}:{}", port("strict", "balanced"))).success());
}

const OPEN_IS_STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: open }
spec: { mtls: { mode: STRICT } }
";

/// Names are found by UDP and by TCP, by who is captured and by who is not, whether CoreDNS is enrolled or not.
fn names(cluster: &Kubernetes) {
    cluster.wait_ready("outside");
    let address = |namespace: &str, service: &str| {
        let service = cluster.get(&["-n", namespace, "service", service]);
        service["spec"]["clusterIP"].as_str().expect("an address").to_owned()
    };
    let (server, wanted) = (address("kube-system", "kube-dns"), address("strict", "probed"));
    let found = |pod: &str, transport: &str| {
        let ask = ["/usr/bin/python3", "-c", ASK_NAME, &server, "probed.strict.svc.cluster.local", transport];
        let asked = cluster.exec(pod, &ask).run();
        if asked.stdout.trim() == format!("0 {wanted}") { Ok(()) } else { Err(format!("not {wanted}: {asked}")) }
    };
    let all_find = |when: &str| {
        for pod in ["strict/hook", "outside/asker"] {
            for transport in ["udp", "tcp"] {
                wait_until(&format!("{pod} to find a name by {transport}, {when}"), SOON, || found(pod, transport));
            }
        }
    };
    let pods = cluster.get(&["-n", "kube-system", "pods", "-l", "k8s-app=kube-dns"]);
    let pod = pods["items"][0]["metadata"]["name"].as_str().expect("a pod of CoreDNS");
    let label = |label: &str| cluster.kubectl(&["-n", "kube-system", "label", "pod", pod, label]).run().ok();
    all_find("while CoreDNS is not enrolled");
    label("justmtls.dev/mode=on");
    let coredns = format!("kube-system/{pod}");
    cluster.wait_captured(&coredns);
    all_find("while CoreDNS is enrolled");
    for (from, security, reason) in [("strict/hook", "mtls", None), ("outside/asker", "plaintext", Some("opted-out"))] {
        // It is asked again: the first time its peers may not have known yet.
        wait_until(&format!("{from} to ask CoreDNS by {security}"), SOON, || {
            found(from, "tcp")?;
            cluster.edge(from, "kube-system/coredns", security, reason)
        });
    }
    label("justmtls.dev/mode-");
    wait_until("CoreDNS to be let go", SOON, || match cluster.capture(&coredns) {
        Ok(state) if state != "captured" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    all_find("after CoreDNS was let go");
}

fn everyday(cluster: &Kubernetes) {
    cluster.wait_for("the job to have asked", &["-n", "strict", "job", "asks-once"], |job| {
        job["status"]["succeeded"] == 1
    });
    assert!(cluster.kubectl(&["-n", "strict", "logs", "job/asks-once"]).run().ok().contains("\"failed\":0"));
    // port-forward reaches a program on the pod's own loopback.
    let (_forward, here) = cluster.forward("strict/deployment/probed", 8080);
    Program::new("curl").args(["-sS", "--max-time", "8", &format!("http://{here}/")]).run().ok();
}

/// Tokens that are not those of a node's own process, each refused by its name, counted and logged.
fn wrong_people(cluster: &Kubernetes) {
    part_needs!("nodes");
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
        let quoted = format!("\"{name}\"");
        let logged = || cluster.control_logged(&["WARN", "a caller is refused", &quoted]);
        let (before, logged_before) = (refused(cluster, name), logged());
        let mut stranger = presented(cluster, &worker, &worker, &token);
        eventually(&format!("a call to be refused as {name}"), PATIENCE, || refused(cluster, name) > before);
        // It asks again and again: a reason has a line a second.
        eventually(&format!("a call that is refused as {name} to be logged"), PATIENCE, || logged() > logged_before);
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
    cluster.control_counts("refused_calls", name)
}
