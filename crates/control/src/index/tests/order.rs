//! However the objects come, the views are those that come out when everything is computed from all objects at once.

use std::collections::BTreeMap;

use manifests::{Change, Object, ObjectKey};
use proptest::prelude::*;

use super::super::facts::Name;
use super::super::{Dirty, Index, Told, Touched, Views};
use super::{captured, namespace, objects, peer_authentication, pod};

/// Every object that a history may hold, some in several states.
fn palette() -> Vec<Object> {
    let off = "  labels: {app: web, justmtls.dev/mode: \"off\"}";
    let web = "  labels: {app: web}";
    let slice = |endpoints: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: shop, name: web-1, labels: \
             {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{endpoints}]\n"
        )
    };
    let service = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec: {{ports: [{{name: http, port: 80}}], {spec}}}\n"
        )
    };
    let node = |ranges: &str| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-a}}\nspec: {{podCIDRs: [{ranges}]}}\nstatus: {{addresses: \
             [{{type: InternalIP, address: 10.88.0.10}}]}}\n"
        )
    };
    let policy = |namespace: &str, spec: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: {namespace}, name: p}}\nspec: {{{spec}}}\n"
        )
    };
    let hook = |service: &str| {
        format!(
            "---\napiVersion: admissionregistration.k8s.io/v1\nkind: ValidatingWebhookConfiguration\nmetadata: {{name: h}}\nwebhooks: \
             [{{name: a.b.c, sideEffects: None, admissionReviewVersions: [v1], clientConfig: {{service: {service}}}}}]\n"
        )
    };
    let api = "---\napiVersion: apiregistration.k8s.io/v1\nkind: APIService\nmetadata: {name: v1.b.c}\nspec: {group: b.c, version: v1, \
               groupPriorityMinimum: 1, versionPriority: 1, service: {namespace: shop, name: web, port: 80}}\n"
        .to_owned();
    let config = |data: &str| {
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: justmtls-system, name: justmtls}}\ndata: {{{data}}}\n"
        )
    };
    let states = [
        namespace("shop", ""),
        namespace("shop", "justmtls.dev/allow-opt-out: \"true\""),
        namespace("shop", "justmtls.dev/mode: \"off\""),
        pod("shop", "web", "10.88.16.5", web, ""),
        pod("shop", "web", "10.88.16.5", off, ""),
        pod("shop", "web", "10.88.16.6", "", ""),
        pod("shop", "web", "10.88.16.5", web, "").replace("uid-shop-web", "uid-again"),
        pod("shop", "web", "10.88.16.5", web, "").replace("Running", "Failed"),
        pod("shop", "web", "10.88.16.5", web, "").replace("nodeName: node-a", "nodeName: node-b"),
        pod("shop", "db", "10.88.16.6", "", ""),
        pod("shop", "db", "10.88.16.8", "", "").replace("uid-shop-db", "uid-shop-web"),
        pod("shop", "db", "10.88.0.10", "", "  hostNetwork: true"),
        pod("kube-system", "dns", "10.88.16.7", web, ""),
        service("web", "clusterIP: 10.96.0.7"),
        service("web", "clusterIP: 10.96.0.7, internalTrafficPolicy: Local"),
        service("web", "clusterIP: None"),
        service("other", "clusterIP: 10.96.0.8, externalIPs: [10.96.0.7, 10.88.16.5, 10.88.16.6]"),
        slice(
            "{addresses: [10.88.16.5]}, {addresses: [10.88.16.6], conditions: {ready: false, serving: true, terminating: true}}",
        ),
        slice("{addresses: [10.88.16.6], targetRef: {kind: Pod, name: db}}, {addresses: [192.0.2.1]}"),
        slice("{addresses: [10.88.0.10], targetRef: {kind: Pod, name: db}}"),
        slice("{addresses: [10.88.16.6], conditions: {ready: false, serving: true, terminating: true}}"),
        node("10.88.16.0/24"),
        node("10.88.17.0/24"),
        peer_authentication("shop", "default", "{mtls: {mode: STRICT}}"),
        peer_authentication("shop", "default", "{mtls: {mode: PERMISSIVE}}"),
        peer_authentication(
            "shop",
            "web",
            "{selector: {matchLabels: {app: web}}, portLevelMtls: {\"80\": {mode: STRICT}}}",
        ),
        peer_authentication("justmtls-system", "default", "{mtls: {mode: STRICT}}"),
        policy("shop", "selector: {matchLabels: {app: web}}, rules: [{}]"),
        policy("shop", "rules: [{}]"),
        policy("justmtls-system", "selector: {matchLabels: {app: web}}, action: DENY"),
        hook("{namespace: shop, name: web, port: 80}"),
        hook("{namespace: shop, name: other, port: 80}"),
        api,
        slice("{addresses: [10.88.0.10]}").replace("shop", "default").replace("name: web", "name: kubernetes"),
        config("excludedPorts: \"22\""),
        config("insideCIDRs: 192.0.2.0/24"),
    ];
    states.iter().flat_map(|text| objects(text)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    /// States that come, or their objects that go, all at once.
    Change(Vec<(usize, bool)>),
    Report(&'static str, Vec<&'static str>),
    /// Whoever leaves is let go.
    Release,
}

fn step(states: usize) -> impl Strategy<Value = Step> {
    let uids = prop::sample::subsequence(vec!["uid-shop-web", "uid-again", "uid-shop-db", "uid-kube-system-dns"], 0..4);
    let changes = |most| prop::collection::vec((0..states, prop::bool::weighted(0.75)), 1..most);
    prop_oneof![
        6 => changes(2).prop_map(Step::Change),
        2 => changes(8).prop_map(Step::Change),
        1 => (prop::sample::select(vec!["node-a", "node-b"]), uids).prop_map(|(node, uids)| Step::Report(node, uids)),
        1 => Just(Step::Release),
    ]
}

fn run(index: &mut Index, states: &[Object], step: &Step) -> Touched {
    match step {
        Step::Change(changes) => index.apply(changes.iter().map(|(state, comes)| match comes {
            true => Change::Applied(states[*state].clone()),
            false => Change::Deleted(states[*state].key()),
        })),
        Step::Report(node, uids) => captured(index, node, uids),
        Step::Release => {
            let leaving = index.leaving().clone();
            index.release(leaving)
        }
    }
}

/// The views of these objects, computed with everything dirty, and what was captured and released taken over.
fn from_scratch(objects: &BTreeMap<ObjectKey, Object>, of: &Index) -> Index {
    let mut index = Index::new("cluster.local".parse().unwrap());
    for object in objects.values() {
        index.applied(object, &mut Dirty::default());
    }
    index.cluster.copy_captures(&of.cluster);
    let keys: Vec<_> = objects.keys().map(Name::of).collect();
    let mut everything = Dirty { settings: true, ..Dirty::default() };
    everything.endpoints.extend(keys.iter().cloned());
    everything.pods.extend(keys.iter().cloned());
    everything.services.extend(keys.iter().cloned());
    everything.policies.extend(keys);
    everything.addresses.extend(index.cluster.bare_addresses());
    index.refresh(everything);
    index
}

/// What two views differ in, compared thing by thing.
fn differences(old: &Views, new: &Views) -> Touched {
    fn keys<K: Ord + Clone, V: PartialEq>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<K> {
        let all: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
        all.into_iter().filter(|key| old.get(key) != new.get(key)).cloned().collect()
    }
    let mut touched = Touched::new();
    touched.extend((old.settings != new.settings).then_some(Told::Settings));
    touched.extend(keys(&old.workloads, &new.workloads).into_iter().map(Told::Workload));
    touched.extend(keys(&old.services, &new.services).into_iter().map(Told::Service));
    touched.extend(keys(&old.policies, &new.policies).into_iter().map(Told::Policy));
    for node in old.node_pods.keys().chain(new.node_pods.keys()) {
        let empty = BTreeMap::new();
        let (old, new) = (old.node_pods.get(node).unwrap_or(&empty), new.node_pods.get(node).unwrap_or(&empty));
        touched.extend(keys(old, new).into_iter().map(|uid| Told::NodePod(node.clone(), uid)));
    }
    touched
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_leads_to_what_its_last_objects_say(steps in prop::collection::vec(step(palette().len()), 1..40)) {
        let states = palette();
        let mut index = Index::new("cluster.local".parse().unwrap());
        let mut objects = BTreeMap::new();
        for step in &steps {
            let before = from_scratch(&objects, &index);
            match step {
                Step::Change(changes) => {
                    for (state, comes) in changes {
                        let key = states[*state].key();
                        match comes {
                            true => objects.insert(key, states[*state].clone()),
                            false => objects.remove(&key),
                        };
                    }
                }
                Step::Report(..) | Step::Release => {}
            }
            let touched = run(&mut index, &states, step);
            let after = from_scratch(&objects, &index);
            prop_assert_eq!(index.views(), after.views());
            prop_assert_eq!(&index.foreign, &after.foreign);
            prop_assert_eq!(index.problems(), after.problems());
            prop_assert_eq!(touched, differences(before.views(), after.views()));
        }
    }

    #[test]
    fn the_order_of_objects_does_not_matter(
        (order, reversed) in prop::sample::subsequence((0..palette().len()).collect::<Vec<_>>(), 1..20)
            .prop_flat_map(|chosen| (Just(chosen.clone()).prop_shuffle(), Just(chosen).prop_shuffle()))
    ) {
        let states = palette();
        // One state of each object: of two, the order does decide.
        let chosen: BTreeMap<_, _> = order.iter().map(|state| (states[*state].key(), *state)).collect();
        let build = |order: &[usize]| {
            let mut index = Index::new("cluster.local".parse().unwrap());
            for state in order.iter().filter(|state| chosen[&states[**state].key()] == **state) {
                index.apply([Change::Applied(states[*state].clone())]);
            }
            index
        };
        let (first, second) = (build(&order), build(&reversed));
        prop_assert_eq!(first.views(), second.views());
        prop_assert_eq!(first.problems(), second.problems());
    }
}
