//! On a real Kubernetes, strict in force: nodes lose their power and boot again. From its first packet no captured pod sends or
//! accepts a byte in clear that policy forbids, and its pods come back by themselves.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Kubernetes, SHOP, SHOP_IS_STRICT, eventually, needs, wait_until};

const PATIENCE: Duration = Duration::from_secs(240);

/// A pod of the mesh that sends from the first moment of its program, as often as it may, to another one. It does so by an address:
/// for a name, or a Service, more of its node has to work first, and the first moment would be over.
const EAGER: &str = "
apiVersion: v1
kind: Pod
metadata: { name: eager, namespace: shop }
spec:
  nodeName: NODE
  tolerations: [{ operator: Exists }]
  terminationGracePeriodSeconds: 1
  containers:
    - name: eager
      image: IMAGE
      args: [demo-app, load, --to, 'ADDRESS:8080', --short, '2', --rate, '40', --patience, '500', --marker, MARKER]
";

/// Starts the eager pod on `node`, to a pod of the other one. Returns the container that has been answered.
fn start_eager(cluster: &Kubernetes, node: &str, to: &str, marker: &str) -> String {
    cluster.wait_captured(to);
    let address = cluster.addresses(to).into_iter().find(|address| address.is_ipv4()).expect("IPv4").to_string();
    cluster.apply(&EAGER.replace("NODE", node).replace("ADDRESS", &address).replace("MARKER", marker));
    let container = eager_is_answered(cluster, "");
    cluster.wait_captured("shop/eager");
    container
}

/// Waits until the eager pod has been answered in another container than this one, which strict gives only by mTLS.
fn eager_is_answered(cluster: &Kubernetes, before: &str) -> String {
    wait_until("the eager pod to be answered in a new container", PATIENCE, || {
        let pod = cluster.kubectl(&["-n", "shop", "get", "pod", "eager", "-o", "json"]).run();
        let pod: serde_json::Value = serde_json::from_str(&pod.stdout).unwrap_or_default();
        let status = &pod["status"]["containerStatuses"][0];
        let running = status["containerID"].as_str().filter(|_| status["state"]["running"].is_object());
        let said = cluster.kubectl(&["-n", "shop", "logs", "eager", "--tail=1"]).run();
        let counts: serde_json::Value = serde_json::from_str(said.stdout.trim()).unwrap_or_default();
        match running {
            Some(container) if container != before && counts["ok"].as_u64() > Some(0) => Ok(container.to_owned()),
            _ => Err(format!("{before:?} before; {status} {said}")),
        }
    })
}

fn stranger_is_answered(cluster: &Kubernetes) -> bool {
    cluster.ask("outside/stranger", "web.shop:80", Duration::from_secs(10)).success()
}

/// Waits until the mesh works again, by itself.
fn works_again(cluster: &Kubernetes) {
    wait_until("shop/client to be answered by shop/web", PATIENCE, || {
        let asked = cluster.ask("shop/client", "web.shop:80", Duration::from_secs(5));
        if asked.success() { Ok(()) } else { Err(format!("{asked}")) }
    });
}

#[test]
fn nodes_that_lose_power_come_back_without_a_byte_in_clear() {
    needs!("cluster", "nodes", "dumpcap");
    let cluster = Kubernetes::up("pow");
    let [first, worker] = cluster.nodes();
    cluster.install(&[]);
    cluster.apply(SHOP);
    cluster.wait_ready("shop");
    cluster.wait_ready("outside");
    // Before strict, the tap sees what the stranger says in clear: so it would see it later (D26).
    let (twin, secret) = (format!("twin-{}", std::process::id()), format!("secret-{}", std::process::id()));
    let mut tap = cluster.tap(&first, &worker);
    assert_eq!(
        cluster.load("outside/stranger", "web.shop:80").short(1).count(1).marker(&twin).run(PATIENCE).answered(),
        1
    );
    eventually("the twin to pass", PATIENCE, || tap.saw(&twin));
    cluster.apply(SHOP_IS_STRICT);
    eventually("strict to be enforced", PATIENCE, || !stranger_is_answered(&cluster));
    let load = |cluster: &Kubernetes| {
        cluster.load("shop/client", "web.shop:80").short(2).count(50).marker(&secret).run(PATIENCE)
    };
    load(&cluster).assert_nothing_failed();

    println!("the worker, whose primary CNI rewrites its configuration at boot");
    cluster.besieged("siege-of-the-worker", || {
        cluster.crash(&worker);
        cluster.rewrite_primary(&worker);
        cluster.boot(&worker);
        works_again(&cluster);
        for pod in ["shop/client", "shop/web"] {
            cluster.wait_captured(pod);
        }
        load(&cluster).assert_nothing_failed();
    });

    // Only from now on: what a runtime starts while our configuration is missing is caught by the agent, and not before its first
    // packet (T9). From here ours is on the disk at each boot.
    let eager = format!("eager-{}", std::process::id());
    let container = start_eager(&cluster, &worker, "shop/client", &eager);

    println!("the worker, while our control plane is away");
    cluster.kubectl(&["-n", "justmtls-system", "scale", "deployment/justmtls-control", "--replicas=0"]).run().ok();
    cluster.wait_for(
        "no control plane",
        &["-n", "justmtls-system", "pods", "-l", "app.kubernetes.io/name=justmtls-control"],
        |pods| pods["items"] == serde_json::json!([]),
    );
    cluster.besieged("siege-without-control", || {
        cluster.crash(&worker);
        cluster.boot(&worker);
        cluster.wait_for_event("shop/web", "control plane");
        cluster.kubectl(&["-n", "justmtls-system", "scale", "deployment/justmtls-control", "--replicas=2"]).run().ok();
        works_again(&cluster);
        eager_is_answered(&cluster, &container);
    });
    tap.stop();
    assert!(tap.saw(&twin), "the tap sees nothing, so it proves nothing");
    // What strict refuses has passed the link by then: so would have what the eager pod sent in clear.
    assert!(tap.saw("siege-without-control"), "the tap does not see what is refused");
    assert!(!tap.saw(&secret), "a request of the mesh passed in clear");
    assert!(!tap.saw(&eager), "a pod sent in clear when its node booted");
    // Its aim is another address after the next crash.
    cluster.kubectl(&["-n", "shop", "delete", "pod", "eager"]).run().ok();

    println!("the node of the control plane");
    let mut tap = cluster.tap(&worker, &first);
    let container = start_eager(&cluster, &first, "shop/web", &eager);
    cluster.crash(&first);
    cluster.boot(&first);
    eventually("the API server to answer", PATIENCE, || cluster.kubectl(&["get", "nodes"]).run().success());
    works_again(&cluster);
    load(&cluster).assert_nothing_failed();
    cluster.wait_captured("shop/client");
    // Strict is not forgotten, and what it refuses has passed the link by then.
    wait_until("the stranger to have been heard on the link", PATIENCE, || {
        let ask =
            ["/justmtls", "demo-app", "load", "--to", "web.shop:80", "--count", "1", "--marker", "refused-at-last"];
        let asked = cluster.exec("outside/stranger", &ask).run();
        assert!(!asked.success(), "strict is forgotten: {asked}");
        if tap.saw("refused-at-last") { Ok(()) } else { Err(format!("{asked}")) }
    });
    eager_is_answered(&cluster, &container);
    tap.stop();
    assert!(!tap.saw(&secret), "a request of the mesh passed in clear");
    assert!(!tap.saw(&eager), "a pod sent in clear when its node booted");
}
