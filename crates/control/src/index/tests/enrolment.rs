//! Which pods are captured (D14, T13), and what capture once reported keeps (T47).

use mesh::{Speaks, Uncaptured};

use super::super::Told;
use super::{
    apply, assert_no_problems, assert_problem, captured, delete, index, namespace, peer_authentication, pod, workload,
};

const OFF: &str = "  labels: {justmtls.dev/mode: \"off\"}";
const ON: &str = "  labels: {justmtls.dev/mode: \"on\"}";
const NS_OFF: &str = "justmtls.dev/mode: \"off\"";
const NS_ON: &str = "justmtls.dev/mode: \"on\"";
const NS_ALLOWS: &str = "justmtls.dev/allow-opt-out: \"true\"";

#[test]
fn labels_and_namespaces_decide_who_is_captured() {
    use Uncaptured::{HostNetwork, OptedOut, Pending, SystemNamespace};
    let host = "  hostNetwork: true";
    for (namespace_name, labels, metadata, spec, expected) in [
        ("shop", "", "", "", Pending),
        ("shop", "", "", host, HostNetwork),
        ("shop", NS_OFF, "", "", OptedOut),
        ("shop", NS_OFF, ON, "", Pending),
        ("shop", NS_ALLOWS, OFF, "", OptedOut),
        ("shop", "", OFF, "", Pending),
        ("kube-system", "", "", "", SystemNamespace),
        ("kube-public", "", "", "", SystemNamespace),
        ("kube-node-lease", "", "", "", SystemNamespace),
        ("justmtls-system", "", "", "", SystemNamespace),
        ("justmtls-system", NS_ON, "", "", SystemNamespace),
        ("justmtls-system", "", ON, "", SystemNamespace),
        ("kube-system", NS_ON, "", "", Pending),
        ("kube-system", "", ON, "", Pending),
        ("kube-system", "", ON, host, HostNetwork),
    ] {
        let text = namespace(namespace_name, labels) + &pod(namespace_name, "web", "10.88.16.5", metadata, spec);
        let index = index(&text);
        assert_eq!(workload(&index, namespace_name, "web").uncaptured, Some(expected), "{text}");
        let told = index.views().node_pods["node-a"].values().next().unwrap();
        assert_eq!(told.capture.err(), Some(expected).filter(|exempt| *exempt != Pending), "{text}");
    }
}

#[test]
fn pods_whose_packets_are_anothers_are_left_to_it_by_name() {
    const CAPTURED: Uncaptured = Uncaptured::Pending;
    const LEFT: Uncaptured = Uncaptured::NotCapturable;
    let sidecar = |name: &str| format!("  initContainers: [{{name: {name}, image: proxy, restartPolicy: Always}}]");
    let ambient = |value: &str| format!("  annotations: {{ambient.istio.io/redirection: {value}}}");
    let machine = "  labels: {kubevirt.io: virt-launcher}".to_owned();
    let class = |name: &str| format!("  runtimeClassName: {name}");
    let none = String::new();
    for (metadata, spec, expected) in [
        (none.clone(), sidecar("istio-proxy"), LEFT),
        (none.clone(), sidecar("linkerd-proxy"), LEFT),
        (none.clone(), sidecar("envoy"), CAPTURED),
        (ON.to_owned(), sidecar("istio-proxy"), LEFT),
        (ambient("enabled"), none.clone(), LEFT),
        (ambient("disabled"), none.clone(), CAPTURED),
        (none.clone(), class("gvisor"), LEFT),
        (none.clone(), class("Kata-qemu"), LEFT),
        (none.clone(), class("nvidia"), CAPTURED),
        (ON.to_owned(), class("kata-like"), CAPTURED),
        (machine, none.clone(), LEFT),
    ] {
        let mut index = index(&pod("shop", "web", "10.88.16.5", &metadata, &spec));
        assert_eq!(workload(&index, "shop", "web").uncaptured, Some(expected), "{metadata} {spec}");
        assert_no_problems(&index);
        apply(&mut index, &peer_authentication("shop", "default", "{mtls: {mode: STRICT}}"));
        assert_eq!(workload(&index, "shop", "web").uncaptured, Some(expected), "{metadata} {spec}");
        match expected {
            LEFT => assert_problem(&index, "Pod shop/web", "is STRICT by a PeerAuthentication, which"),
            _ => assert_no_problems(&index),
        }
    }
}

#[test]
fn who_is_told_of_a_foreign_data_path_is_enrolled_and_runs() {
    let spec = "  initContainers: [{name: istio-proxy, image: proxy}]";
    let sidecar = |metadata: &str| pod("shop", "web", "10.88.16.5", metadata, spec);
    let without_address = sidecar("").replace("podIPs: [{ip: \"10.88.16.5\"}]", "podIPs: []");
    for (text, told) in [
        (sidecar(""), true),
        (namespace("shop", NS_OFF) + &sidecar(""), false),
        (namespace("shop", NS_OFF) + &sidecar(ON), true),
        (namespace("shop", NS_ALLOWS) + &sidecar(OFF), false),
        (sidecar(OFF), true),
        (pod("kube-system", "web", "10.88.16.5", "", spec), false),
        (pod("shop", "web", "10.88.16.5", "", &format!("{spec}\n  hostNetwork: true")), false),
        (without_address, false),
        (pod("shop", "web", "10.88.16.5", "", ""), false),
    ] {
        let mut index = index(&text);
        let said: Vec<_> = index.foreign().map(|(_, foreign)| foreign.sentence()).collect();
        assert_eq!(said.len(), usize::from(told), "{text}");
        assert!(said.iter().all(|said| said.contains("take it out of Istio")), "{said:?}");
        delete(&mut index, "Pod", "shop", "web");
        delete(&mut index, "Pod", "kube-system", "web");
        assert_eq!(index.foreign().count(), 0);
    }
}

#[test]
fn what_is_strict_and_captured_is_not_let_go_by_an_annotation() {
    let strict = peer_authentication("shop", "default", "{mtls: {mode: STRICT}}");
    let mut index = index(&(pod("shop", "web", "10.88.16.5", "", "") + &strict));
    captured(&mut index, "node-a", &["uid-shop-web"]);
    apply(&mut index, &pod("shop", "web", "10.88.16.5", "  annotations: {ambient.istio.io/redirection: enabled}", ""));
    assert_eq!(workload(&index, "shop", "web").uncaptured, None);
}

#[test]
fn a_pod_in_the_hosts_network_publishes_no_address() {
    let index = index(&pod("shop", "web", "10.88.0.10", "", "  hostNetwork: true"));
    assert!(workload(&index, "shop", "web").addresses.is_empty());
}

#[test]
fn an_opt_out_that_the_namespace_does_not_allow_is_a_problem() {
    let mut index = index(&pod("shop", "web", "10.88.16.5", OFF, ""));
    assert_problem(&index, "Pod shop/web", "which its namespace does not allow");
    apply(&mut index, &namespace("shop", NS_ALLOWS));
    assert_no_problems(&index);
    assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::OptedOut));
}

#[test]
fn an_unknown_mode_label_is_a_problem_and_exempts_nobody() {
    let index = index(&pod("shop", "web", "10.88.16.5", "  labels: {justmtls.dev/mode: disabled}", ""));
    assert_problem(&index, "Pod shop/web", "label justmtls.dev/mode is disabled");
    assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::Pending));
}

#[test]
fn strict_beats_an_opt_out_at_every_scope() {
    for (policy_namespace, spec) in [
        ("justmtls-system", "{mtls: {mode: STRICT}}"),
        ("shop", "{mtls: {mode: STRICT}}"),
        ("shop", "{selector: {matchLabels: {app: web}}, portLevelMtls: {\"80\": {mode: STRICT}}}"),
    ] {
        let labels = "  labels: {app: web, justmtls.dev/mode: \"off\"}";
        let mut index = index(&(namespace("shop", NS_ALLOWS) + &pod("shop", "web", "10.88.16.5", labels, "")));
        assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::OptedOut));
        apply(&mut index, &peer_authentication(policy_namespace, "default", spec));
        assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::Pending));
        assert_problem(&index, "Pod shop/web", "strict wins");
        delete(&mut index, "PeerAuthentication", policy_namespace, "default");
        assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::OptedOut));
        assert_no_problems(&index);
    }
}

#[test]
fn what_captures_is_not_captured_and_a_label_that_says_so_is_a_problem() {
    for (labels, metadata) in [(NS_ON, ""), ("", ON)] {
        let text = namespace("justmtls-system", labels) + &pod("justmtls-system", "node", "10.88.16.5", metadata, "");
        let strict = peer_authentication("justmtls-system", "default", "{mtls: {mode: STRICT}}");
        let mut index = index(&(text + &strict));
        assert_problem(&index, "Pod justmtls-system/node", "counts for no pod of justmtls");
        // Also where a version before this one has captured it.
        captured(&mut index, "node-a", &["uid-justmtls-system-node"]);
        let expected = Some(Uncaptured::SystemNamespace);
        assert_eq!(workload(&index, "justmtls-system", "node").uncaptured, expected);
    }
}

#[test]
fn strict_that_nothing_enforces_in_a_system_namespace_is_a_problem() {
    let text = pod("kube-system", "dns", "10.88.16.5", "", "")
        + &peer_authentication("kube-system", "default", "{mtls: {mode: STRICT}}");
    let index = index(&text);
    assert_eq!(workload(&index, "kube-system", "dns").uncaptured, Some(Uncaptured::SystemNamespace));
    assert_problem(&index, "Pod kube-system/dns", "which nothing enforces");
}

#[test]
fn a_reported_capture_is_published_and_touches_that_pod_alone() {
    let mut index = index(&(pod("shop", "web", "10.88.16.5", "", "") + &pod("shop", "db", "10.88.16.6", "", "")));
    let touched = captured(&mut index, "node-a", &["uid-shop-web"]);
    assert_eq!(touched.into_iter().collect::<Vec<_>>(), [Told::Workload("Kubernetes//Pod/shop/web".into())]);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
    assert_eq!(workload(&index, "shop", "web").uncaptured, None);
    assert_eq!(workload(&index, "shop", "db").speaks, Speaks::Nothing);
}

#[test]
fn a_node_speaks_for_its_own_pods_alone_and_never_for_those_in_the_hosts_network() {
    let text = pod("shop", "web", "10.88.16.5", "", "") + &pod("shop", "host", "10.88.0.10", "", "  hostNetwork: true");
    let mut index = index(&text);
    captured(&mut index, "node-b", &["uid-shop-web"]);
    captured(&mut index, "node-a", &["uid-shop-host"]);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::Nothing);
    assert_eq!(workload(&index, "shop", "host").speaks, Speaks::Nothing);
}

#[test]
fn a_capture_reported_before_the_pod_is_known_counts_when_it_comes() {
    let mut index = index("");
    captured(&mut index, "node-a", &["uid-shop-web"]);
    apply(&mut index, &pod("shop", "web", "10.88.16.5", "", ""));
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
}

#[test]
fn a_captured_pod_stays_so_while_it_lives_and_is_enrolled_whatever_is_reported() {
    let mut index = index(&pod("shop", "web", "10.88.16.5", "", ""));
    captured(&mut index, "node-a", &["uid-shop-web"]);
    assert!(captured(&mut index, "node-a", &[]).is_empty());
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
    assert_problem(&index, "Pod shop/web", "does not report it any more");

    delete(&mut index, "Pod", "shop", "web");
    assert_no_problems(&index);
}

#[test]
fn a_pod_made_again_under_the_same_name_starts_uncaptured() {
    let text = pod("shop", "web", "10.88.16.5", "", "");
    let mut index = index(&text);
    captured(&mut index, "node-a", &["uid-shop-web"]);
    let touched = apply(&mut index, &text.replace("uid-shop-web", "uid-second"));
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::Nothing);
    assert!(touched.contains(&Told::NodePod("node-a".to_owned(), "uid-shop-web".into())));
    assert!(touched.contains(&Told::NodePod("node-a".to_owned(), "uid-second".into())));
    assert_eq!(index.views().node_pods["node-a"].len(), 1);
}

#[test]
fn a_certificate_is_for_enrolled_pods_of_that_node_alone() {
    let text = namespace("shop", NS_ALLOWS)
        + &pod("shop", "web", "10.88.16.5", "", "  serviceAccountName: web")
        + &pod("shop", "out", "10.88.16.6", OFF, "  serviceAccountName: out")
        + &pod("shop", "host", "10.88.0.10", "", "  serviceAccountName: host\n  hostNetwork: true")
        + &pod("shop", "done", "10.88.16.7", "", "  serviceAccountName: done").replace("Running", "Succeeded");
    let index = index(&text);
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap();
    assert!(index.runs_on("node-a", &id("web")));
    assert!(!index.runs_on("node-b", &id("web")));
    for account in ["out", "host", "done", "nobody"] {
        assert!(!index.runs_on("node-a", &id(account)), "{account}");
    }
}

#[test]
fn what_a_network_policy_can_go_by_is_news_of_the_pods_that_it_may_concern() {
    let labelled = |tier: &str| pod("shop", "web", "10.88.16.5", &format!("  labels: {{tier: {tier}}}"), "");
    let policy = |port: u16| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: shop, name: p}}\n\
             spec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
        )
    };
    let mut index =
        index(&(labelled("a") + &pod("shop", "db", "10.88.16.6", "", "") + &pod("other", "x", "10.88.16.7", "", "")));
    let rules = |index: &crate::index::Index| {
        [("shop", "web"), ("shop", "db"), ("other", "x")]
            .map(|(namespace, name)| workload(index, namespace, name).network_rules)
    };
    let mut last = rules(&index);
    for (text, expected) in [
        (labelled("b"), [true, false, false]),
        (labelled("b"), [false; 3]),
        (policy(80), [true, true, false]),
        (policy(80), [false; 3]),
        (policy(81), [true, true, false]),
        (namespace("other", "team: a"), [false, false, true]),
    ] {
        let touched = apply(&mut index, &text);
        let now = rules(&index);
        let changed = [0, 1, 2].map(|pod| now[pod] != last[pod]);
        assert_eq!(changed, expected, "{text}");
        assert_eq!(touched.len(), changed.iter().filter(|changed| **changed).count(), "{text}");
        last = now;
    }
    delete(&mut index, "NetworkPolicy", "shop", "p");
    let now = rules(&index);
    assert_eq!([0, 1, 2].map(|pod| now[pod] != last[pod]), [true, true, false]);
    assert_no_problems(&index);
}
