//! On a real Kubernetes: what is uninstalled leaves nothing, on nodes and in pods neither, and pods go on without a restart.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{ENOUGH, Kubernetes, SHOP, SHOP_IS_STRICT, meanwhile, needs, part_needs};

/// What a node has that we could leave behind: files, processes, mounts, links, tables, rules and routes, its own and those in
/// every pod's network. Not with it is what the kernel derives of addresses by itself, the table `local`. Pods stay, and so do their
/// links and routes; the number behind a link's name is its peer's.
const STATE: &str = r#"
ls /etc/cni/net.d /opt/cni/bin; find /run/justmtls -mindepth 1 2>/dev/null
grep -c justmtls /proc/self/mountinfo
for p in /proc/[0-9]*/exe; do readlink $p | grep justmtls; done 2>/dev/null | sort -u
network='
    ip -o link | cut -d: -f2 | cut -d@ -f1 | sort; nft list tables | sort; tc qdisc show | grep clsact
    ip rule; ip -6 rule
    { ip -4 route show table all; ip -6 route show table all; } | grep -v "table local" | sort
'
sh -c "$network" | sed 's/^/on the node: /'
for n in /run/netns/*; do
    nsenter --net="$n" sh -c "$network" | sed 's/^/in a pod: /'
done
"#;

/// Made while the plugin is in, and gone after it.
const LATE: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: late, namespace: shop }
spec:
  terminationGracePeriodSeconds: 1
  containers: [{ name: late, image: IMAGE, args: [demo-app, serve, --port, "8080"] }]
"#;

const DRAIN: Duration = Duration::from_secs(10);
const LONG: u64 = 10;
const EVERY: Duration = Duration::from_millis(100);

#[test]
fn what_is_uninstalled_leaves_nothing_and_pods_go_on() {
    needs!("cluster");
    let cluster = Kubernetes::up("rem");
    cluster.apply(SHOP);
    // Also the stranger: its link and its routes are compared, too.
    for namespace in ["shop", "outside"] {
        cluster.wait_ready(namespace);
    }
    let before = nodes_as_they_are(&cluster);
    let definitions = || {
        let all = cluster.kubectl(&["get", "crd", "-o", "name"]).run().ok();
        all.lines().filter(|name| name.contains("security.istio.io")).map(str::to_owned).collect::<Vec<_>>()
    };
    // On somebody's cluster they may be Istio's own.
    let theirs = definitions();

    cluster.install(&[&format!("drain={}", DRAIN.as_secs())]);
    for pod in ["shop/client", "shop/web"] {
        cluster.wait_captured(pod);
    }
    cluster.apply(SHOP_IS_STRICT);
    cluster.apply(LATE);
    cluster.wait_captured("shop/late");
    for (node, _) in &before {
        let state = state(&cluster, node);
        for ours in ["00-justmtls.conflist", "in a pod: table inet justmtls", "in a pod: 1000:", "table 27245"] {
            assert!(state.contains(ours), "{ours} in {state}");
        }
    }
    // Where the API server has none, there is none to be left.
    let kinds = cluster.kubectl(&["api-resources", "--api-group=certificates.k8s.io", "-o", "name"]).run().ok();
    let has_bundles = kinds.contains("clustertrustbundles");
    let our_bundle = || {
        has_bundles && cluster.kubectl(&["get", "clustertrustbundles", "-o", "name"]).run().ok().contains("justmtls")
    };
    e2e::eventually("a ClusterTrustBundle of ours", e2e::PATIENCE, || our_bundle() == has_bundles);
    let ask = || {
        cluster.load("shop/client", "web.shop:80").short(2).count(ENOUGH).run(e2e::PATIENCE * 6).assert_nothing_failed()
    };
    ask();
    let load = cluster.load("shop/client", "web.shop:80").short(4).long(LONG, EVERY).start();
    load.wait_for_more(ENOUGH);
    let report = meanwhile(load, |_| {
        let said = cluster.justmtls(&["uninstall"]).within(Duration::from_secs(300)).run().ok();
        println!("{said}");
        // Somebody's own object keeps its definition.
        assert!(said.contains("justmtls is uninstalled") && said.contains("peerauthentications"), "{said}");
    });
    report.assert_no_short_failed();
    // What was open had its drain time, and an end that no program takes for a good one.
    assert_eq!(report.long(), (LONG, LONG, 0), "{report}");
    assert!(report.failures().iter().all(|(_, kind)| kind == "reset"), "{report}");
    assert!(report.first_failure_after_event("long") > Some(DRAIN), "before the drain time was over: {report}");
    // In clear from now on, also what was strict, and without a restart.
    ask();
    cluster.delete(LATE);

    for (node, before) in &before {
        e2e::wait_until(&format!("node {node} to be as before"), e2e::PATIENCE * 3, || {
            let now = state(&cluster, node);
            if now == *before { Ok(()) } else { Err(format!("before:\n{before}\nnow:\n{now}")) }
        });
    }
    let ours = cluster.kubectl(&["get", "clusterrole,clusterrolebinding,namespace", "-o", "name"]).run().ok();
    assert!(!ours.contains("justmtls"), "{ours}");
    assert!(!our_bundle(), "a ClusterTrustBundle is left");
    cluster.delete(SHOP_IS_STRICT);
    let again = cluster.justmtls(&["uninstall"]).run().ok();
    let deleted = again.contains("CustomResourceDefinition peerauthentications.security.istio.io: deleted");
    assert_eq!(deleted, theirs.is_empty(), "{again}");
    assert_eq!(definitions(), theirs);
}

/// The names of the nodes, and what they have before the product comes.
fn nodes_as_they_are(cluster: &Kubernetes) -> Vec<(String, String)> {
    part_needs!("nodes", "ip", "nft", "tc");
    cluster.nodes().map(|node| (node.clone(), state(cluster, &node))).into()
}

/// Pods of the product run on the same image, whose program is `justmtls`, too: what is compared is theirs and not the shop's.
fn state(cluster: &Kubernetes, node: &str) -> String {
    cluster.on_node(node, &["sh", "-c", STATE]).run().ok()
}
