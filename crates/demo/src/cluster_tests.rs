use super::*;
use crate::network::node_plan;

fn cluster() -> Cluster {
    use std::sync::atomic::{AtomicU32, Ordering};
    static UIDS: AtomicU32 = AtomicU32::new(1);
    let uid = || format!("uid-{}", UIDS.fetch_add(1, Ordering::Relaxed));
    Cluster::new(vec![node_plan(0), node_plan(1)], uid, || Timestamp::UNIX_EPOCH)
}

fn object(yaml: &str) -> Object {
    let mut parsed = manifests::parse("test", yaml);
    assert_eq!(parsed.problems, []);
    parsed.objects.remove(0).0
}

fn pod(name: &str, more: &str) -> Object {
    object(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}, \
         spec: {{{more} containers: [{{name: main, command: [run], ports: [{{containerPort: 8080}}]}}]}}}}"
    ))
}

fn service(more: &str) -> Object {
    object(&format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, \
         spec: {{{more} selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}}}"
    ))
}

fn started(actions: &[Action]) -> &PodPlan {
    match actions {
        [Action::Start(plan)] => plan,
        other => panic!("not one start: {other:?}"),
    }
}

fn ready() -> PodState {
    PodState { phase: "Running", ready: true, message: String::new() }
}

fn ready_endpoints(cluster: &Cluster) -> Vec<String> {
    let slices = cluster.objects().filter_map(|(_, object)| match object {
        Object::EndpointSlice(slice) => Some(slice),
        _ => None,
    });
    slices
        .flat_map(|slice| &slice.endpoints)
        .filter(|endpoint| endpoint.conditions.as_ref().unwrap().ready == Some(true))
        .flat_map(|endpoint| endpoint.addresses.clone())
        .collect()
}

#[test]
fn pods_without_a_node_are_spread_and_those_with_one_stay_there() {
    let mut cluster = cluster();
    let node_of = |actions: Vec<Action>| started(&actions).node.name.clone();
    assert_eq!(node_of(cluster.apply(pod("one", "")).unwrap()), "node-a");
    assert_eq!(node_of(cluster.apply(pod("two", "")).unwrap()), "node-b");
    assert_eq!(node_of(cluster.apply(pod("three", "nodeName: node-b,")).unwrap()), "node-b");
    let refusal = cluster.apply(pod("four", "nodeName: node-z,")).unwrap_err().to_string();
    assert_eq!(refusal, "Pod shop/four: field spec.nodeName: there is no node node-z; use node-a or node-b");
}

#[test]
fn a_namespace_and_its_default_account_come_with_the_first_object() {
    let mut cluster = cluster();
    cluster.apply(pod("one", "")).unwrap();
    let keys: Vec<_> = cluster.objects().map(|(key, _)| key.to_string()).collect();
    assert!(keys.contains(&"Namespace shop".to_owned()) && keys.contains(&"ServiceAccount shop/default".to_owned()));
}

#[test]
fn only_ready_pods_are_endpoints_and_in_both_families() {
    let mut cluster = cluster();
    cluster.apply(service("")).unwrap();
    let uid = started(&cluster.apply(pod("web", "")).unwrap()).uid.clone();
    assert_eq!(ready_endpoints(&cluster), [""; 0]);
    cluster.pod_is(&uid, &ready());
    assert_eq!(ready_endpoints(&cluster), ["10.88.16.2", "fd88:16::2"]);
    cluster.delete(&pod_key("shop", "web")).unwrap();
    assert_eq!(ready_endpoints(&cluster), [""; 0], "who is leaving gets no new connections");
}

#[test]
fn a_service_keeps_its_addresses_when_it_is_applied_again() {
    let mut cluster = cluster();
    let address = |cluster: &Cluster| {
        cluster.objects().find_map(|(_, object)| match object {
            Object::Service(service) => service.spec.clone().unwrap().cluster_ips,
            _ => None,
        })
    };
    cluster.apply(service("")).unwrap();
    let first = address(&cluster).unwrap();
    assert_eq!(first, ["10.96.0.10", "fd96::a"]);
    cluster.apply(service("sessionAffinity: ClientIP,")).unwrap();
    assert_eq!(address(&cluster).unwrap(), first);
    cluster.apply(service("clusterIP: 10.96.7.7,")).unwrap();
    assert_eq!(address(&cluster).unwrap(), ["10.96.7.7", "fd96::707"]);
    cluster.apply(service("clusterIP: None,")).unwrap();
    assert_eq!(address(&cluster).unwrap(), ["None"]);
}

#[test]
fn a_changed_pod_takes_its_predecessors_place_once_that_has_ended() {
    let mut cluster = cluster();
    let first = started(&cluster.apply(pod("web", "")).unwrap()).clone();
    assert!(cluster.apply(pod("web", "")).unwrap().is_empty(), "the same again changes nothing");
    let actions = cluster.apply(pod("web", "serviceAccountName: other,")).unwrap();
    assert!(matches!(&actions[..], [Action::Stop { uid }] if *uid == first.uid));
    let actions = cluster.pod_is_gone(&first.uid);
    let second = started(&actions);
    assert_ne!(second.uid, first.uid);
    assert_ne!(second.addresses, first.addresses);
    assert_eq!(second.spec.service_account_name.as_deref(), Some("other"));
}

#[test]
fn a_deployment_has_as_many_pods_as_it_says() {
    let mut cluster = cluster();
    let deployment = |replicas: u32| {
        object(&format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: web, namespace: shop}}, \
             spec: {{replicas: {replicas}, selector: {{matchLabels: {{app: web}}}}, \
             template: {{metadata: {{labels: {{app: web}}}}, spec: {{containers: [{{name: main, command: [run]}}]}}}}}}}}"
        ))
    };
    assert_eq!(cluster.apply(deployment(3)).unwrap().len(), 3);
    let names: Vec<_> = cluster.pods().map(|pod| pod.metadata.name.clone().unwrap()).collect();
    assert_eq!(names, ["web-1", "web-2", "web-3"]);
    let actions = cluster.apply(deployment(1)).unwrap();
    assert!(actions.len() == 2 && actions.iter().all(|action| matches!(action, Action::Stop { .. })));
    let key = ObjectKey { kind: Kind::Deployment, namespace: Some("shop".into()), name: "web".into() };
    assert_eq!(cluster.delete(&key).unwrap().len(), 1);
}

#[test]
fn deleting_a_namespace_ends_everything_in_it() {
    let mut cluster = cluster();
    cluster.apply(service("")).unwrap();
    let uid = started(&cluster.apply(pod("web", "")).unwrap()).uid.clone();
    let key = ObjectKey { kind: Kind::Namespace, namespace: None, name: "shop".into() };
    assert_eq!(cluster.delete(&key).unwrap().len(), 1);
    cluster.pod_is_gone(&uid);
    assert!(cluster.objects().all(|(key, _)| key.namespace.as_deref() != Some("shop")));
    assert_eq!(cluster.delete(&key).map(|actions| actions.len()), None);
}
