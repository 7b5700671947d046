//! On a real Kubernetes, under a load of short and long connections: installation, kills, rolling restarts, upgrades, an API
//! server and an agent that are away, and Deployments that roll.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::Duration;

use e2e::{ENOUGH, Kubernetes, Loaded, SHOP, eventually, meanwhile, needs, part_needs, wait_until};

const PATIENCE: Duration = Duration::from_secs(120);
/// Of the proxies in these tests: long enough to see connections live, short enough to wait for.
const DRAIN: Duration = Duration::from_secs(15);
const LONG: u64 = 10;
/// A killed proxy's successor serves within this time.
const AT_ONCE: Duration = Duration::from_secs(3);
/// Of one request.
const ANSWER: Duration = Duration::from_secs(10);

/// Both kinds of connections from `shop/client` to `shop/web`, by the Service's name.
fn load(cluster: &Kubernetes) -> Loaded {
    let load = cluster.load("shop/client", "web.shop:80").short(4).long(LONG, Duration::from_millis(100)).start();
    load.wait_for_more(ENOUGH);
    load
}

fn install(cluster: &Kubernetes) {
    cluster.install(&[&format!("drain={}", DRAIN.as_secs())]);
}

/// One cluster for all of it: each part begins with what the last one left, which is a mesh that works.
#[test]
fn nobody_notices_installation_restarts_kills_and_rollouts() {
    needs!("cluster");
    let cluster = Kubernetes::up("mesh");
    cluster.apply(SHOP);
    cluster.wait_ready("shop");
    cluster.wait_ready("outside");
    deployment_rolls(&cluster, "before");

    println!("installation");
    let report = meanwhile(load(&cluster), |_| {
        install(&cluster);
        for pod in ["shop/client", "shop/web"] {
            cluster.wait_captured(pod);
        }
        wait_edge(&cluster, "shop/client", "shop/web", "mtls", None);
    });
    // What was open goes on as it was, and nothing short failed.
    report.assert_nothing_failed();
    assert!(cluster.ask("outside/stranger", "web.shop:80", ANSWER).success(), "permissive lets strangers in");
    wait_edge(&cluster, "outside/stranger", "shop/web", "plaintext", Some("opted-out"));

    println!("a second installation");
    let again = cluster.install(&[&format!("drain={}", DRAIN.as_secs())]);
    assert!(again.contains("nothing changed"), "{again}");

    everything_is_upgraded(&cluster);
    processes_are_killed(&cluster);
    pod_of_a_node_is_deleted(&cluster);
    pods_are_let_go_without_an_agent(&cluster);
    nothing_in_clear_without_a_proxy(&cluster);
    api_server_is_away(&cluster);
    agent_is_away(&cluster);
    upgrade_is_taken_back(&cluster);
    deployment_rolls(&cluster, "after");
}

/// A rolling upgrade of everything, and back.
fn everything_is_upgraded(cluster: &Kubernetes) {
    println!("rolling upgrade of everything, and back");
    let [this, next] = [cluster.image.clone(), cluster.same_image_as("justmtls.test/next:1")];
    // What they request replaces all pods also where there is no other image.
    for (image, memory) in [(&next, "65Mi"), (&this, "64Mi")] {
        let before = cluster.pods_of_ours();
        let report = meanwhile(load(cluster), |load| {
            let settings = [
                format!("image={image}"),
                format!("resources.control.memory={memory}"),
                format!("resources.proxy.memory={memory}"),
            ];
            let settings = settings.iter().flat_map(|setting| ["--set", setting]);
            cluster.justmtls(&["upgrade"]).args(settings).within(PATIENCE * 2).run().ok();
            // The old ones go on draining, and nothing is amiss.
            assert!(!before.is_disjoint(&cluster.pods_of_ours()), "the upgrade waited for what drains");
            assert_nothing_is_amiss(cluster);
            load.wait_for_lost(LONG);
        });
        wait_until("the old ones to be gone", PATIENCE, || match cluster.pods_of_ours() {
            pods if before.is_disjoint(&pods) => Ok(()),
            pods => Err(format!("{before:?} {pods:?}")),
        });
        assert_eq!(cluster.images_of_ours(), [image.clone()].into());
        let nodes = cluster.get(&["nodes"])["items"].as_array().map_or(0, Vec::len);
        assert_eq!(cluster.nodes_of_control().len(), nodes.min(2), "one node has both replicas");
        report.assert_no_short_failed();
        // The old proxies had what was open for as long as they may, which began after it was said to.
        let ended = report.first_failure_after_event("long").expect("long connections end with the drain");
        assert!(ended >= DRAIN, "a long connection ended {ended:?} after the upgrade was asked for: {report}");
    }
}

fn processes_are_killed(cluster: &Kubernetes) {
    part_needs!("nodes");
    let [first, worker] = cluster.nodes();
    println!("a proxy is killed");
    for node in [&first, &worker] {
        proxy_is_killed(cluster, node, load(cluster));
    }

    println!("an agent and a control plane are killed");
    let report = meanwhile(load(cluster), |_| {
        cluster.kill(&worker, "agent");
        let control = [&first, &worker].into_iter().find(|node| !cluster.processes(node, "control").is_empty());
        cluster.signal(control.expect("a control plane"), "control", "-KILL");
        cluster.rolled_out("justmtls-system", "deployment/justmtls-control");
    });
    report.assert_nothing_failed();
}

/// What an administrator does first. Until the next proxy is there whoever connects waits in a listener that the old agent holds.
fn pod_of_a_node_is_deleted(cluster: &Kubernetes) {
    part_needs!("nodes");
    println!("the product's pod of a node is deleted");
    let [_, worker] = cluster.nodes();
    let report = meanwhile(load(cluster), |load| {
        delete_pod_of_node(cluster, &worker, &[]);
        load.wait_for_more(10 * ENOUGH);
    });
    report.assert_no_short_failed();
}

/// Agent and proxy die at once while a namespace is let go: the next agent finds the rules in its pods, which are to lead nobody
/// to listeners that are gone.
fn pods_are_let_go_without_an_agent(cluster: &Kubernetes) {
    part_needs!("nodes", "nft");
    println!("a namespace is let go while the agent of a node is replaced");
    let [_, worker] = cluster.nodes();
    let label = |label: &str| cluster.kubectl(&["label", "namespace", "shop", label]).run().ok();
    // It hears of nothing any more, hands nothing over, and is killed.
    assert_eq!(cluster.signal(&worker, "agent", "-STOP"), 1);
    label("justmtls.dev/mode=off");
    wait_until("the other node to have heard", PATIENCE, || match cluster.capture("shop/client") {
        Ok(state) if state == "captured" => Err(state),
        _ => Ok(()),
    });
    delete_pod_of_node(cluster, &worker, &["--grace-period=1"]);
    let tables = ["sh", "-c", "for n in /run/netns/*; do nsenter --net=$n nft list tables; done"];
    wait_until("the rules to go", PATIENCE, || match cluster.on_node(&worker, &tables).run().ok() {
        tables if tables.contains("inet justmtls") => Err(tables),
        _ => Ok(()),
    });
    assert!(
        cluster.ask("outside/stranger", "web.shop:80", ANSWER).success(),
        "it has no rules, and nobody to serve it"
    );
    let events = cluster.agent_page(&cluster.node_pod(&worker), "/events");
    assert!(events.contains("rules-found"), "{events}");
    wait_until("it to be known", PATIENCE, || match cluster.capture("shop/web") {
        Ok(state) if state == "not-captured" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    label("justmtls.dev/mode-");
    cluster.wait_captured("shop/web");
    cluster.wait_captured("shop/client");
    wait_until("nothing to be amiss", PATIENCE, || amiss(cluster));
}

/// Deletes the product's pod of a node, and waits for the next one.
fn delete_pod_of_node(cluster: &Kubernetes, node: &str, options: &[&str]) {
    let pod = cluster.node_pod(node);
    let all = cluster.pods_of_nodes().len();
    let delete = ["-n", "justmtls-system", "delete", "pod", &pod, "--wait=false"];
    cluster.kubectl(&[&delete, options].concat()).run().ok();
    wait_until("the next one", PATIENCE, || match cluster.pods_of_nodes() {
        pods if pods.contains(&pod) || pods.len() != all => Err(format!("{pods:?}")),
        _ => Ok(()),
    });
    cluster.rolled_out("justmtls-system", "daemonset/justmtls-node");
}

/// A wiretap between the client's node and the server's, while proxies are killed. What a stranger says in clear it sees: so it
/// would see ours (D26).
fn nothing_in_clear_without_a_proxy(cluster: &Kubernetes) {
    part_needs!("nodes", "dumpcap");
    println!("a wiretap listens while proxies are killed");
    let [first, worker] = cluster.nodes();
    let (twin, secret) = (format!("twin-{}", std::process::id()), format!("secret-{}", std::process::id()));
    let mut tap = cluster.tap(&first, &worker);
    let load = cluster.load("shop/client", "web.shop:80").short_at(4, 200).long(LONG, Duration::from_millis(100));
    let load = load.marker(&secret).start();
    let report = meanwhile(load, |load| {
        for node in [&first, &worker] {
            cluster.kill(node, "proxy");
            load.wait_for_more(ENOUGH);
        }
    });
    assert_eq!(report.of_phase("after", "short").failed, 0, "{report}");
    let stranger = cluster.load("outside/stranger", "web.shop:80").short(1).count(1).marker(&twin).run(PATIENCE);
    assert_eq!(stranger.answered(), 1);
    eventually("the twin to pass", PATIENCE, || tap.saw(&twin));
    tap.stop();
    assert!(!tap.saw(&secret), "a request of the mesh passed in clear while a proxy was away");
}

/// A new pod takes its node over and never becomes ready. When it goes again the one that stood by serves, and nobody noticed.
fn upgrade_is_taken_back(cluster: &Kubernetes) {
    println!("an upgrade that never becomes ready is taken back");
    const NODES: &str = "daemonset/justmtls-node";
    const NEVER: &str = r#"[{"op": "replace", "path": "/spec/template/spec/containers/0/readinessProbe/httpGet/path", "value": "/never"}]"#;
    let ours = |command: &[&str]| cluster.kubectl(&[&["-n", "justmtls-system"], command].concat()).run().ok();
    let report = meanwhile(load(cluster), |load| {
        ours(&["patch", NODES, "--type=json", "--patch", NEVER]);
        wait_until("a new pod to take a node over", PATIENCE, || cluster.standing_by().map(drop));
        // Its proxy serves now, and the one before drains.
        load.wait_for_lost(1);
        let stood_by = cluster.standing_by().unwrap();
        ours(&["rollout", "undo", NODES]);
        wait_until("the one before to take its place back", PATIENCE, || match cluster.standing_by() {
            Ok(still) => Err(format!("{still} stands by")),
            Err(_) => Ok(()),
        });
        load.wait_for_more(10 * ENOUGH);
        assert!(cluster.pods_of_nodes().contains(&stood_by), "it is no other one");
    });
    report.assert_no_short_failed();
    cluster.rolled_out("justmtls-system", NODES);
    assert_nothing_is_amiss(cluster);
}

#[track_caller]
fn assert_nothing_is_amiss(cluster: &Kubernetes) {
    amiss(cluster).unwrap();
}

/// What `check` finds that is not as it must be.
fn amiss(cluster: &Kubernetes) -> Result<(), String> {
    let check = cluster.says(&["check"]);
    let failed: Vec<_> = check["checks"].as_array().unwrap().iter().filter(|it| it["state"] == "failed").collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("{failed:?}")) }
}

/// Nobody is refused or waits for long, also when it is not the first time: kubelet would let ten seconds pass. What the dead
/// proxy had ends with an error.
fn proxy_is_killed(cluster: &Kubernetes, node: &str, load: Loaded) {
    let report = meanwhile(load, |_| cluster.kill(node, "proxy"));
    let during = report.of_phase("during", "short").gap.max(report.of_phase("after", "short").gap);
    assert!(during < AT_ONCE, "nobody was served for {during:?}: {report}");
    for kind in ["refused", "early-end", "wrong-bytes", "timeout", "other"] {
        report.assert_never(kind);
    }
    assert_eq!(report.of_phase("after", "short").failed, 0, "{report}");
    assert_eq!(report.long().1, LONG, "what the dead proxy had ends with an error: {report}");
}

/// Nobody notices, and a proxy that begins anew meanwhile gets certificates and view.
fn api_server_is_away(cluster: &Kubernetes) {
    part_needs!("nodes");
    let [first, worker] = cluster.nodes();
    println!("the API server is away");
    let web = SocketAddr::new(cluster.addresses("shop/web")[0], 8080).to_string();
    let load = || {
        let load = cluster.load_from_node(&first, "shop/client", &web);
        let load = load.short(4).long(LONG, Duration::from_millis(100)).start();
        load.wait_for_more(ENOUGH);
        load
    };
    let [quiet, beside_a_kill] = [load(), load()];
    cluster.stop_api_server(&first, true);
    meanwhile(quiet, |load| load.wait_for_more(10 * ENOUGH)).assert_nothing_failed();
    proxy_is_killed(cluster, &worker, beside_a_kill);
    cluster.stop_api_server(&first, false);
    cluster.rolled_out("justmtls-system", "daemonset/justmtls-node");
}

/// A pod that comes meanwhile waits, and is captured before it starts.
fn agent_is_away(cluster: &Kubernetes) {
    part_needs!("nodes");
    let [_, worker] = cluster.nodes();
    println!("the agent is away");
    assert_eq!(cluster.signal(&worker, "agent", "-STOP"), 1);
    cluster.apply(LATE);
    cluster.wait_for_event("shop/late", "agent of justmtls");
    assert!(cluster.addresses("shop/late").is_empty(), "it waits");
    assert_eq!(cluster.signal(&worker, "agent", "-CONT"), 1);
    cluster.wait_captured("shop/late");
    // Captured it is before its container starts.
    cluster.wait_ready("shop");
    assert!(cluster.ask("shop/late", "web.shop:80", ANSWER).success());
    wait_edge(cluster, "shop/late", "shop/web", "mtls", None);
}

/// On the worker, like the server.
const LATE: &str = "
apiVersion: v1
kind: Pod
metadata: { name: late, namespace: shop }
spec:
  affinity: { nodeAffinity: { requiredDuringSchedulingIgnoredDuringExecution: { nodeSelectorTerms: [{ matchFields: [{ key: metadata.name, operator: In, values: ['WORKER-NODE'] }] }] } } }
  terminationGracePeriodSeconds: 1
  containers: [{ name: late, image: IMAGE, args: [demo-app, serve, --port, '8080'] }]
";

/// Waits for an edge that passes so.
fn wait_edge(cluster: &Kubernetes, from: &str, to: &str, security: &str, reason: Option<&str>) {
    wait_until(&format!("{from} → {to}, {security}"), PATIENCE, || cluster.edge(from, to, security, reason));
}

/// A Deployment rolls under load: no more failures than the same test has without us, which is what its own pods lose.
fn deployment_rolls(cluster: &Kubernetes, when: &str) {
    const ROLLING: &str = include_str!("../manifests/kubernetes_rolling.yaml");
    println!("a Deployment rolls, {when}");
    cluster.apply(ROLLING);
    cluster.rolled_out("shop", "deployment/rolling");
    let report = meanwhile(cluster.load("shop/client", "rolling.shop:80").short(4).start(), |load| {
        for _ in 0..2 {
            cluster.kubectl(&["-n", "shop", "rollout", "restart", "deployment/rolling"]).run().ok();
            cluster.rolled_out("shop", "deployment/rolling");
            load.wait_for_more(ENOUGH);
        }
    });
    // Its pods wait until nobody sends to them any more before they end: with or without us nothing is lost.
    report.assert_nothing_failed();
    cluster.delete(ROLLING);
    eventually("its pods to be gone", PATIENCE, || {
        cluster.get(&["-n", "shop", "pods", "-l", "app=rolling"])["items"] == serde_json::json!([])
    });
}
