//! Objects in, workloads, modes, policies and problems out.

mod api_server;
mod endpoints;
mod enrolment;
mod leaving;
mod modes;
mod order;
mod policies;
mod settings;

use manifests::{Change, ObjectKey, parse};
use mesh::{Speaks, Uncaptured, Workload};

use super::{Index, Touched};

/// An index of the objects in a text, which must all be readable.
fn index(yaml: &str) -> Index {
    let mut index = Index::new("cluster.local".parse().unwrap());
    apply(&mut index, yaml);
    index
}

fn apply(index: &mut Index, yaml: &str) -> Touched {
    objects(yaml).into_iter().flat_map(|object| index.apply([Change::Applied(object)])).collect()
}

fn delete(index: &mut Index, kind: &str, namespace: &str, name: &str) -> Touched {
    let kind = manifests::Kind::from_name(kind).unwrap();
    let namespace = kind.is_namespaced().then(|| namespace.to_owned());
    index.apply([Change::Deleted(ObjectKey { kind, namespace, name: name.to_owned() })])
}

fn objects(yaml: &str) -> Vec<manifests::Object> {
    let parsed = parse("test.yaml", yaml);
    let errors: Vec<_> = parsed.problems.iter().filter(|problem| problem.is_error()).collect();
    assert!(errors.is_empty(), "{errors:?}");
    parsed.objects.into_iter().map(|(object, _)| object).collect()
}

/// A running pod on node-a, with the given lines in its metadata and its spec.
fn pod(namespace: &str, name: &str, address: &str, metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  namespace: {namespace}\n  name: {name}\n  uid: uid-{namespace}-{name}\n\
         {metadata}\nspec:\n  nodeName: node-a\n  containers: [{{name: main, image: none}}]\n{spec}\nstatus:\n  \
         phase: Running\n  podIPs: [{{ip: \"{address}\"}}]\n"
    )
}

fn namespace(name: &str, labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {{{labels}}}\n")
}

fn peer_authentication(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
         spec: {spec}\n"
    )
}

fn workload<'a>(index: &'a Index, namespace: &str, name: &str) -> &'a Workload {
    let uid = format!("Kubernetes//Pod/{namespace}/{name}");
    index.views().workloads.get(&uid.as_str().into()).unwrap_or_else(|| panic!("{uid} is not published"))
}

fn captured(index: &mut Index, node: &str, uids: &[&str]) -> Touched {
    index.captured(node, uids.iter().map(|uid| (*uid).into()).collect())
}

#[track_caller]
fn assert_problem(index: &Index, subject: &str, message: &str) {
    let problems: Vec<_> = index.problems().into_iter().map(ToString::to_string).collect();
    let found = problems.iter().any(|problem| problem.starts_with(subject) && problem.contains(message));
    assert!(found, "no problem of {subject} with {message:?} in {problems:#?}");
}

#[track_caller]
fn assert_no_problems(index: &Index) {
    assert!(index.problems().is_empty(), "{:#?}", index.problems());
}

#[test]
fn a_pod_becomes_a_workload_with_its_identity_address_and_node() {
    let index = index(&pod("shop", "web", "10.88.16.5", "", "  serviceAccountName: front"));
    let workload = workload(&index, "shop", "web");
    assert_eq!(workload.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/front");
    assert_eq!(workload.addresses, ["10.88.16.5".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!((&*workload.node, workload.pod_uid.as_str()), ("node-a", "uid-shop-web"));
    assert_eq!((workload.speaks, workload.uncaptured), (Speaks::Nothing, Some(Uncaptured::Pending)));
    assert_no_problems(&index);
}

#[test]
fn a_pod_without_a_service_account_has_the_default_one() {
    let index = index(&pod("shop", "web", "10.88.16.5", "", ""));
    assert_eq!(workload(&index, "shop", "web").identity.as_str(), "spiffe://cluster.local/ns/shop/sa/default");
}

#[test]
fn a_pod_that_is_over_or_has_no_address_or_no_node_is_not_published() {
    let running = pod("shop", "web", "10.88.16.5", "", "");
    for changed in [
        running.replace("phase: Running", "phase: Succeeded"),
        running.replace("phase: Running", "phase: Failed"),
        running.replace("  nodeName: node-a\n", ""),
    ] {
        let mut index = index(&running);
        assert_eq!(index.views().workloads.len(), 1);
        apply(&mut index, &changed);
        assert!(index.views().workloads.is_empty() && index.views().node_pods.is_empty(), "{changed}");
    }
}

#[test]
fn a_pod_without_an_address_is_known_to_its_own_node_alone() {
    let placed = pod("shop", "web", "10.88.16.5", "", "").replace("podIPs: [{ip: \"10.88.16.5\"}]", "podIPs: []");
    let mut index = index(&placed);
    assert!(index.views().workloads.is_empty());
    let known = &index.views().node_pods["node-a"][&mesh::PodUid::from("uid-shop-web")];
    assert!(known.addresses.is_empty() && known.capture.is_ok());
    apply(&mut index, &pod("shop", "web", "10.88.16.5", "", ""));
    assert_eq!(workload(&index, "shop", "web").addresses.len(), 1);
}

#[test]
fn a_pod_without_a_uid_is_a_problem_and_not_published() {
    let index = index(&pod("shop", "web", "10.88.16.5", "", "").replace("  uid: uid-shop-web\n", ""));
    assert!(index.views().workloads.is_empty());
    assert_problem(&index, "Pod shop/web", "metadata.uid is missing");
}

#[test]
fn an_address_that_two_pods_have_is_published_for_neither_until_one_is_gone() {
    let mut index = index(&(pod("shop", "web", "10.88.16.5", "", "") + &pod("shop", "db", "10.88.16.5", "", "")));
    assert!(workload(&index, "shop", "web").addresses.is_empty());
    assert!(workload(&index, "shop", "db").addresses.is_empty());
    assert_problem(&index, "Pod shop/web", "10.88.16.5 is shop/db's, too");
    delete(&mut index, "Pod", "shop", "db");
    assert_eq!(workload(&index, "shop", "web").addresses.len(), 1);
    assert_no_problems(&index);
}

#[test]
fn pods_with_the_same_uid_are_not_published_until_one_is_gone() {
    let copy = pod("shop", "copy", "10.88.16.6", "", "").replace("uid-shop-copy", "uid-shop-web");
    let mut index = index(&(pod("shop", "web", "10.88.16.5", "", "") + &copy));
    assert!(index.views().workloads.is_empty() && index.views().node_pods.is_empty());
    assert_problem(&index, "Pod shop/web", "has the same metadata.uid as shop/copy");
    delete(&mut index, "Pod", "shop", "copy");
    assert_eq!((index.views().workloads.len(), index.views().node_pods.len()), (1, 1));
    assert_no_problems(&index);
}

#[test]
fn what_did_not_change_is_not_touched() {
    let text =
        pod("shop", "web", "10.88.16.5", "", "") + &peer_authentication("shop", "default", "{mtls: {mode: STRICT}}");
    let mut index = index(&text);
    assert!(apply(&mut index, &text).is_empty());
    assert!(apply(&mut index, &text.replace("phase: Running", "phase: Running\n  hostIP: 10.88.0.10")).is_empty());
}
