//! On a real Kubernetes, strict in force: nodes lose their power and boot again. From its first packet no captured pod sends or
//! accepts a byte in clear that policy forbids, and its pods come back by themselves.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Kubernetes, SHOP, SHOP_IS_STRICT, eventually, needs, wait_until};

const PATIENCE: Duration = Duration::from_secs(240);

/// Asks again and again until it is ended, each time on a connection of its own; never answered rightly.
fn besieged(cluster: &Kubernetes, marker: &str, what: impl FnOnce()) {
    // By the Service's name: the pod's address is another one after a crash.
    let mut stranger = cluster
        .exec("outside/stranger", &["/justmtls", "demo-app", "load", "--controlled", "--to", "web.shop:80"])
        .args(["--short", "2", "--rate", "40", "--patience", "500", "--marker", marker])
        .spawn();
    stranger.wait_for("\"failed\":");
    what();
    stranger.write("end\n");
    let end = stranger.finish(PATIENCE);
    let last = end.stdout.lines().last().unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {end}"));
    assert!(report["failed"].as_u64() > Some(50), "it tried too seldom to prove anything: {report}");
    assert_eq!(report["ok"], 0, "a stranger was served under strict: {report}");
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
    besieged(&cluster, "siege-of-the-worker", || {
        cluster.crash(&worker);
        cluster.rewrite_primary(&worker);
        cluster.boot(&worker);
        works_again(&cluster);
        for pod in ["shop/client", "shop/web"] {
            cluster.wait_captured(pod);
        }
        load(&cluster).assert_nothing_failed();
    });

    println!("the worker, while our control plane is away");
    cluster.kubectl(&["-n", "justmtls-system", "scale", "deployment/justmtls-control", "--replicas=0"]).run().ok();
    cluster.wait_for(
        "no control plane",
        &["-n", "justmtls-system", "pods", "-l", "app.kubernetes.io/name=justmtls-control"],
        |pods| pods["items"] == serde_json::json!([]),
    );
    besieged(&cluster, "siege-without-control", || {
        cluster.crash(&worker);
        cluster.boot(&worker);
        cluster.wait_for_event("shop/web", "control plane");
        cluster.kubectl(&["-n", "justmtls-system", "scale", "deployment/justmtls-control", "--replicas=2"]).run().ok();
        works_again(&cluster);
    });
    tap.stop();
    assert!(tap.saw(&twin), "the tap sees nothing, so it proves nothing");
    assert!(!tap.saw(&secret), "a request of the mesh passed in clear");

    println!("the node of the control plane");
    let mut tap = cluster.tap(&worker, &first);
    cluster.crash(&first);
    cluster.boot(&first);
    eventually("the API server to answer", PATIENCE, || cluster.kubectl(&["get", "nodes"]).run().success());
    works_again(&cluster);
    load(&cluster).assert_nothing_failed();
    cluster.wait_captured("shop/client");
    assert!(!stranger_is_answered(&cluster), "strict is forgotten");
    tap.stop();
    assert!(!tap.saw(&secret), "a request of the mesh passed in clear");
}
