//! On any real Kubernetes: one command installs, a table shows who talks to whom and how, strict and an opt-out do what they say,
//! and what is wrong is said in a sentence.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{ENOUGH, Kubernetes, PATIENCE, SHOP, SHOP_IS_STRICT, eventually, meanwhile, needs, part_needs, wait_until};

const SOON: Duration = Duration::from_secs(120);
/// From the first command to the table, once everything is built (README).
const FIVE_MINUTES: Duration = Duration::from_secs(300);
/// Of one request: longer than a name is asked for again.
const ANSWER: Duration = Duration::from_secs(8);
const AT_ONCE: Duration = Duration::from_secs(1);
const LONG: u64 = 10;
const OFTEN: Duration = Duration::from_millis(50);

/// What looks like Istio's sidecar, to whoever goes by objects.
const FOREIGN: &str = "
apiVersion: v1
kind: Pod
metadata: { name: foreign, namespace: NAMESPACE }
spec:
  terminationGracePeriodSeconds: 1
  containers: [{ name: istio-proxy, image: IMAGE, args: [demo-app, serve, --port, '8080'] }]
";

fn ask(cluster: &Kubernetes, from: &str) -> bool {
    cluster.ask(from, "web.shop:80", ANSWER).success()
}

/// A Service that has this address, so that no other gets it.
const TAKEN: &str = "
apiVersion: v1
kind: Service
metadata: { name: taken, namespace: default }
spec: { clusterIP: ADDRESS, ports: [{ port: 80 }] }
";

/// There is traffic, and an edge that says how it passes.
#[track_caller]
fn edge(cluster: &Kubernetes, from: &str, security: &str, reason: Option<&str>) {
    wait_until(&format!("{from} → shop/web, {security}"), SOON, || {
        let asked = ask(cluster, from);
        match cluster.edge(from, "shop/web", security, reason) {
            Ok(()) if asked => Ok(()),
            shown => Err(format!("answered {asked}; {shown:?}")),
        }
    });
}

#[test]
fn one_command_installs_and_the_table_shows_mtls() {
    needs!("cluster");
    let cluster = Kubernetes::up("ins");
    let began = Instant::now();

    println!("what is wrong is said before anything is changed");
    for (wrong, words) in [
        (&["install", "--set", "drian=30s"][..], "drian"),
        (&["install", "--set", "drain=soon"], "drain"),
        (&["install", "--set", "replicas=0"], "replicas"),
    ] {
        let said = cluster.justmtls(wrong).run().fails();
        assert!(said.contains(words) && said.lines().count() <= 3, "{said}");
    }
    let image = format!("image={}", cluster.image);
    let dry = cluster.justmtls(&["install", "--set", &image, "--dry-run"]).run().ok();
    assert!(dry.contains("DaemonSet"), "{dry}");
    let namespaces = cluster.get(&["namespaces"]).to_string();
    assert!(!namespaces.contains("justmtls-system"), "a dry run changes nothing");
    assert_eq!(cluster.justmtls(&["check"]).run().status.code(), Some(1), "nothing is installed");

    cluster.install(&[]);
    cluster.apply(SHOP);
    cluster.wait_ready("shop");
    cluster.wait_ready("outside");
    for pod in ["shop/client", "shop/web"] {
        cluster.wait_captured(pod);
    }
    edge(&cluster, "shop/client", "mtls", None);
    edge(&cluster, "outside/stranger", "plaintext", Some("opted-out"));
    let table = cluster.justmtls(&["coverage"]).run().ok();
    assert!(
        table.lines().any(|line| line.contains("shop/client") && line.contains("shop/web") && line.contains("mtls")),
        "{table}"
    );
    let took = began.elapsed();
    println!("from the first command to the table: {took:.0?}\n{table}");
    assert!(took < FIVE_MINUTES, "{took:?}");

    println!("nothing is amiss, and a second installation changes nothing");
    let again = cluster.install(&[]);
    assert!(again.contains("nothing changed"), "{again}");
    let check = cluster.justmtls(&["check", "--wait"]).run();
    println!("{check}");
    assert!(matches!(check.status.code(), Some(0 | 2)), "{check}");
    let status = cluster.justmtls(&["status"]).run().ok();
    assert!(status.contains("spiffe://cluster.local/ns/shop/sa/web") || status.contains("ns/shop/sa/web"), "{status}");
    assert!(cluster.justmtls(&["version"]).run().ok().contains(env!("CARGO_PKG_VERSION")));

    println!("strict, and back");
    cluster.apply(SHOP_IS_STRICT);
    eventually("strict to be enforced", SOON, || !ask(&cluster, "outside/stranger"));
    assert!(ask(&cluster, "shop/client"));
    cluster.delete(SHOP_IS_STRICT);
    eventually("permissive to be back", SOON, || ask(&cluster, "outside/stranger"));

    namespace_is_let_go_and_enrolled(&cluster);
    strict_ends_what_is_open(&cluster);
    ruleset_is_flushed(&cluster);
    cluster.delete(SHOP_IS_STRICT);
    path_is_denied(&cluster);

    pods_say_why(&cluster);
    assert_eq!(cluster.control_logged(&["is forbidden"]), 0, "{}", cluster.control_log());

    println!("the control plane's Service is deleted, and made anew with another address");
    let address = |cluster: &Kubernetes| {
        cluster.get(&["-n", "justmtls-system", "service", "justmtls-control"])["spec"]["clusterIP"].to_string()
    };
    let before = address(&cluster);
    cluster.kubectl(&["-n", "justmtls-system", "delete", "service", "justmtls-control"]).run().ok();
    // Or it could have the same one again.
    cluster.apply(&TAKEN.replace("ADDRESS", &before));
    let said = cluster.install(&[]);
    assert!(said.contains("its pods are made anew"), "{said}");
    assert_ne!(address(&cluster), before);
    eventually("the nodes to be whole", PATIENCE * 6, || cluster.justmtls(&["check"]).run().status.code() != Some(1));
    assert!(cluster.install(&[]).contains("nothing changed"));
    cluster.delete(&TAKEN.replace("ADDRESS", &before));

    println!("an image that no node has");
    let broken = cluster.justmtls(&[
        "upgrade",
        "--set",
        "image=localhost/none:1",
        "--set",
        "imagePullPolicy=Never",
        "--timeout",
        "40s",
    ]);
    let said = broken.within(SOON).run();
    assert_eq!(said.status.code(), Some(1), "{said}");
    assert!(format!("{}{}", said.stdout, said.stderr).contains("localhost/none:1"), "{said}");
    assert!(ask(&cluster, "shop/client"), "the one before goes on");
    cluster.install(&[]);
    eventually("the mesh to be whole", PATIENCE * 6, || cluster.justmtls(&["check"]).run().status.code() != Some(1));
}

/// A pod that cannot be captured says so where its owner looks, and one that is not to be says nothing.
fn pods_say_why(cluster: &Kubernetes) {
    println!("a pod that cannot be captured has an Event");
    let foreign = |namespace: &str| FOREIGN.replace("NAMESPACE", namespace);
    // The one that has opted out first: its Event would be there by the time of the other's.
    cluster.apply(&foreign("outside"));
    cluster.wait_ready("outside");
    cluster.apply(&foreign("shop"));
    cluster.wait_for_event("shop/foreign", "not captured by justmtls, not-capturable");
    let described = cluster.kubectl(&["-n", "shop", "describe", "pod", "foreign"]).run().ok();
    assert!(described.contains("NotCaptured") && described.contains("take it out of Istio"), "{described}");
    for other in ["outside/foreign", "shop/web"] {
        let said = cluster.events(other);
        assert!(!said.contains("not captured by justmtls"), "{other}: {said}");
    }
    for namespace in ["shop", "outside"] {
        cluster.delete(&foreign(namespace));
    }
}

/// By its label, under load, and nobody notices: neither what is open nor what opens meanwhile.
fn namespace_is_let_go_and_enrolled(cluster: &Kubernetes) {
    println!("a namespace is let go by its label, and enrolled again");
    let load = cluster.load("shop/client", "web.shop:80").short(4).long(LONG, OFTEN).start();
    let report = meanwhile(load, |load| {
        let label = |label: &str| cluster.kubectl(&["label", "--overwrite", "namespace", "shop", label]).run().ok();
        label("justmtls.dev/mode=off");
        // What was captured goes on so, and keeps the pods from having left wholly.
        for pod in ["shop/client", "shop/web"] {
            wait_until(&format!("{pod} to be let go"), SOON, || match cluster.capture(pod) {
                Ok(state) if state == "leaving" => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
        load.wait_for_more(10 * ENOUGH);
        label("justmtls.dev/mode-");
        for pod in ["shop/client", "shop/web"] {
            cluster.wait_captured(pod);
        }
        load.wait_for_more(10 * ENOUGH);
    });
    report.assert_nothing_failed();
}

/// A stranger's connection that was allowed when it was opened ends when strict begins.
fn strict_ends_what_is_open(cluster: &Kubernetes) {
    println!("strict begins while a stranger's connections are open");
    let mut strangers = cluster.load("outside/stranger", "web.shop:80").long(LONG, OFTEN).start();
    cluster.apply(SHOP_IS_STRICT);
    // What ended before this was told has ended in time.
    strangers.event();
    strangers.wait_for_lost(LONG);
    let report = strangers.finish();
    let ended = report.last_failure_after_event().unwrap_or_default();
    println!("the last one ended {ended:?} after `kubectl apply` had returned");
    assert!(ended < AT_ONCE, "{ended:?}: {report}");
}

/// Somebody takes the rules out of a pod: they are back at once, and no stranger was served meanwhile. Strict is in force.
fn ruleset_is_flushed(cluster: &Kubernetes) {
    part_needs!("nodes", "nft");
    println!("`nft flush ruleset` in a pod, under strict");
    let [_, worker] = cluster.nodes();
    let pid = cluster.process_of(&worker, "shop/web");
    let in_pod = |command: &[&str]| {
        cluster.on_node(&worker, &[&["nsenter", "-t", &pid, "-n", "nft"], command].concat()).run().ok()
    };
    cluster.besieged("siege-without-rules", || {
        let load = cluster.load("shop/client", "web.shop:80").short(2).long(LONG, OFTEN).start();
        let report = meanwhile(load, |load| {
            in_pod(&["flush", "ruleset"]);
            let gone = Instant::now();
            wait_until("the rules to be back", SOON, || match in_pod(&["list", "ruleset"]) {
                rules if rules.contains("capture_in") => Ok(()),
                rules => Err(rules),
            });
            let took = gone.elapsed();
            println!("the rules were back after {took:?}");
            assert!(took < AT_ONCE, "{took:?}");
            load.wait_for_more(10 * ENOUGH);
        });
        report.assert_nothing_failed();
    });
}

/// What only a proxy for HTTP could enforce refuses everything, and says so in its status (D13).
fn path_is_denied(cluster: &Kubernetes) {
    println!("a policy that denies a path");
    const PATH: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: path, namespace: shop }
spec: { action: DENY, rules: [{ to: [{ operation: { paths: [/admin] } }] }] }
";
    cluster.apply(PATH);
    eventually("it to refuse", SOON, || !ask(cluster, "shop/client"));
    cluster.wait_for("its status to say so", &["-n", "shop", "authorizationpolicy", "path"], |policy| {
        let all = policy["status"]["conditions"].as_array().into_iter().flatten();
        let ours = |it: &&serde_json::Value| it["type"] == "justmtls.dev/Enforced" && it["status"] == "False";
        all.into_iter().any(|it| ours(&it) && it["message"].as_str().is_some_and(|said| said.contains("paths")))
    });
    cluster.delete(PATH);
    eventually("it to be forgotten", SOON, || ask(cluster, "shop/client"));
}
