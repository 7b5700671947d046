//! On a real Kubernetes, strict in force: nodes lose their power and boot again. From its first packet no captured pod sends or
//! accepts a byte in clear that policy forbids, and its pods come back by themselves.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Kubernetes, LinkTap, SHOP, eventually, needs, wait_until};

const PATIENCE: Duration = Duration::from_secs(240);

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

/// Asks again and again until it is ended, each time on a connection of its own; never answered rightly.
fn besieged(cluster: &Kubernetes, marker: &str, what: impl FnOnce()) {
    let [web] = cluster.addresses("shop/web")[..1] else { unreachable!() };
    let to = format!("{web}:8080");
    let mut stranger = cluster
        .exec("outside/stranger", &["/justmtls", "demo-app", "load", "--controlled", "--to", &to])
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

/// Waits until the mesh works again, by itself.
fn works_again(cluster: &Kubernetes) {
    wait_until("shop/client to be answered by shop/web", PATIENCE, || {
        let asked = cluster
            .exec("shop/client", &["/justmtls", "demo-app", "load", "--to", "web.shop:80", "--count", "1"])
            .args(["--short", "1", "--patience", "5000"])
            .run();
        if asked.success() { Ok(()) } else { Err(format!("{asked}")) }
    });
}

#[test]
fn nodes_that_lose_power_come_back_without_a_byte_in_clear() {
    needs!("root", "go", "containerd", "runc", "dumpcap");
    let cluster = Kubernetes::up("pow");
    let [first, worker] = cluster.nodes();
    cluster.install(&[]);
    cluster.apply(SHOP);
    cluster.wait_ready("shop");
    cluster.wait_ready("outside");
    // Before strict, the tap sees what the stranger says in clear: so it would see it later (D26).
    let (twin, secret) = (format!("twin-{}", std::process::id()), format!("secret-{}", std::process::id()));
    let tap = LinkTap::start(&cluster, &first, &worker);
    assert_eq!(
        cluster.load("outside/stranger", "web.shop:80").short(1).count(1).marker(&twin).run(PATIENCE).answered(),
        1
    );
    eventually("the twin to pass", PATIENCE, || tap.saw(&twin));
    cluster.apply(STRICT);
    eventually("strict to be enforced", PATIENCE, || {
        let asked = ["/justmtls", "demo-app", "load", "--to", "web.shop:80", "--count", "1", "--short", "1"];
        !cluster.exec("outside/stranger", &asked).run().success()
    });
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
    tap.end(|saw| {
        assert!(saw(&twin), "the tap sees nothing, so it proves nothing");
        assert!(!saw(&secret), "a request of the mesh passed in clear");
    });

    println!("the node of the control plane");
    let tap = LinkTap::start(&cluster, &worker, &first);
    cluster.crash(&first);
    cluster.boot(&first);
    eventually("the API server to answer", PATIENCE, || cluster.kubectl(&["get", "nodes"]).run().success());
    works_again(&cluster);
    load(&cluster).assert_nothing_failed();
    cluster.wait_captured("shop/client");
    let asked = ["/justmtls", "demo-app", "load", "--to", "web.shop:80", "--count", "1", "--short", "1"];
    assert!(!cluster.exec("outside/stranger", &asked).run().success(), "strict is forgotten");
    tap.end(|saw| assert!(!saw(&secret), "a request of the mesh passed in clear"));
}
