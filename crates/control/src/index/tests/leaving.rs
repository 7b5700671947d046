//! A captured pod that is to be captured no longer (T4, T47).

use mesh::{PodUid, Speaks, Uncaptured};
use wire::discovery::NodePod;

use super::{
    apply, assert_no_problems, assert_problem, captured, delete, index, namespace, peer_authentication, pod, workload,
};
use crate::index::{Index, Told};

const OFF: &str = "justmtls.dev/mode: \"off\"";

fn place() -> (String, PodUid) {
    ("node-a".to_owned(), "uid-shop-web".into())
}

fn told(index: &Index) -> &NodePod {
    index.views().node_pods["node-a"].values().next().unwrap()
}

/// A captured pod.
fn captured_web() -> Index {
    let mut index = index(&pod("shop", "web", "10.88.16.5", "", ""));
    captured(&mut index, "node-a", &["uid-shop-web"]);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
    index
}

#[test]
fn peers_are_told_first_and_the_agent_when_they_know() {
    let mut index = captured_web();
    apply(&mut index, &namespace("shop", OFF));
    let web = workload(&index, "shop", "web");
    assert_eq!((web.speaks, web.uncaptured), (Speaks::Nothing, Some(Uncaptured::OptedOut)));
    assert_eq!(index.taken_back(), [place()].into());
    assert_eq!(index.leaving(), &[place()].into());
    assert_eq!((told(&index).capture, told(&index).release), (Err(Uncaptured::OptedOut), false));
    assert!(index.runs_on("node-a", &told(&index).identity.clone()), "what is captured still has to prove who it is");
    assert_no_problems(&index);

    let touched = index.release([place()]);
    assert_eq!(touched, [Told::NodePod("node-a".to_owned(), "uid-shop-web".into())].into());
    assert!(told(&index).release && index.leaving().is_empty());
    assert!(index.release([place()]).is_empty(), "once");
    captured(&mut index, "node-a", &[]);
    assert_eq!((told(&index).capture, told(&index).release), (Err(Uncaptured::OptedOut), false));
    assert!(!index.runs_on("node-a", &told(&index).identity.clone()));
    assert!(index.taken_back().is_empty() && index.leaving().is_empty());
}

#[test]
fn who_comes_back_before_it_is_released_never_left() {
    let mut index = captured_web();
    apply(&mut index, &namespace("shop", OFF));
    apply(&mut index, &namespace("shop", ""));
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls, "its agent has reported it all the time");
    assert!(index.leaving().is_empty() && index.release([place()]).is_empty());
    assert_eq!((told(&index).capture, told(&index).release), (Ok(()), false));
}

#[test]
fn who_comes_back_after_its_release_is_told_so_when_its_agent_has_let_go_and_captured_when_it_reports_again() {
    let mut index = captured_web();
    apply(&mut index, &namespace("shop", OFF));
    index.release([place()]);
    apply(&mut index, &namespace("shop", ""));
    assert_eq!(
        workload(&index, "shop", "web").uncaptured,
        Some(Uncaptured::Pending),
        "a report from before does not count"
    );
    assert_eq!((told(&index).capture, told(&index).release), (Err(Uncaptured::OptedOut), true));
    captured(&mut index, "node-a", &[]);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::Nothing);
    assert_eq!((told(&index).capture, told(&index).release), (Ok(()), false));
    captured(&mut index, "node-a", &["uid-shop-web"]);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
}

#[test]
fn strict_keeps_a_captured_pod_and_takes_back_one_that_leaves() {
    let strict = peer_authentication("shop", "default", "{mtls: {mode: STRICT}}");
    let mut index = captured_web();
    apply(&mut index, &strict);
    apply(&mut index, &namespace("shop", OFF));
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
    assert!(index.leaving().is_empty() && index.taken_back().is_empty());
    assert_problem(&index, "Pod shop/web", "strict wins");
    delete(&mut index, "PeerAuthentication", "shop", "default");
    assert_eq!(index.leaving(), &[place()].into());
    apply(&mut index, &strict);
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::JustMtls);
    assert!(index.leaving().is_empty());
}

#[test]
fn a_strict_pod_of_a_system_namespace_is_not_let_go() {
    let on = namespace("kube-system", "justmtls.dev/mode: \"on\"");
    let mut index = index(&(on + &pod("kube-system", "dns", "10.88.16.5", "", "")));
    captured(&mut index, "node-a", &["uid-kube-system-dns"]);
    apply(&mut index, &peer_authentication("kube-system", "default", "{mtls: {mode: STRICT}}"));
    apply(&mut index, &namespace("kube-system", ""));
    assert_eq!(workload(&index, "kube-system", "dns").speaks, Speaks::JustMtls);
    assert_problem(&index, "Pod kube-system/dns", "make its ports PERMISSIVE to let it go");
    delete(&mut index, "PeerAuthentication", "kube-system", "default");
    assert_eq!(workload(&index, "kube-system", "dns").uncaptured, Some(Uncaptured::SystemNamespace));
}

#[test]
fn what_an_earlier_control_plane_knew_to_be_captured_leaves_when_its_agent_is_back() {
    let mut index = Index::new("cluster.local".parse().unwrap());
    index.remember([place()]);
    apply(&mut index, &namespace("shop", OFF));
    apply(&mut index, &pod("shop", "web", "10.88.16.5", "", ""));
    assert_eq!(workload(&index, "shop", "web").uncaptured, Some(Uncaptured::OptedOut));
    assert_eq!(index.taken_back(), [place()].into());
    assert!(index.leaving().is_empty());
    captured(&mut index, "node-a", &["uid-shop-web"]);
    assert_eq!(index.leaving(), &[place()].into());
    delete(&mut index, "Pod", "shop", "web");
    assert!(index.leaving().is_empty());
    assert_no_problems(&index);
}

#[test]
fn when_the_product_is_to_go_every_pod_leaves_also_under_strict_and_nothing_is_enforced() {
    let settings = |leaving: &str| {
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: justmtls-system, name: justmtls}}\ndata: {{leaving: \"{leaving}\"}}\n"
        )
    };
    let mut index = captured_web();
    apply(&mut index, &peer_authentication("shop", "strict", "{mtls: {mode: STRICT}}"));
    assert_eq!(workload(&index, "shop", "web").modes.default, mesh::Mode::Strict);
    apply(&mut index, &settings("announced"));
    let web = workload(&index, "shop", "web");
    assert_eq!((web.speaks, web.modes.default), (Speaks::JustMtls, mesh::Mode::Permissive));
    apply(&mut index, &settings("begun"));
    let web = workload(&index, "shop", "web");
    assert_eq!((web.speaks, web.uncaptured), (Speaks::Nothing, Some(Uncaptured::OptedOut)));
    assert_eq!(web.modes.default, mesh::Mode::Permissive);
    assert_eq!(index.leaving(), &[place()].into());
    apply(&mut index, &settings("maybe"));
    assert_problem(&index, "ConfigMap justmtls-system/justmtls", "leaving: maybe is none of no, announced and begun");
    assert_eq!(workload(&index, "shop", "web").speaks, Speaks::Nothing, "the last good value stays");
    apply(&mut index, &settings("no"));
    let web = workload(&index, "shop", "web");
    assert_eq!((web.speaks, web.modes.default), (Speaks::JustMtls, mesh::Mode::Strict));
}
