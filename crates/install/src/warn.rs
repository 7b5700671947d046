//! What of a cluster an installation would meet: said before anything is changed (T12, T35, T36). Pure, but for [`gather`] and [`say`].

use ipnet::IpNet;
use manifests::istio::AuthorizationPolicy;
use manifests::{Kind, Object, Problem};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::values::{Key, Values};

/// Says why a policy cannot be enforced as it is, so that what it selects refuses everything; the control plane's own judgement.
pub type Judge = fn(&AuthorizationPolicy) -> Option<String>;

/// What is looked at.
#[derive(Default, Debug)]
pub(crate) struct Surroundings {
    pub(crate) webhooks: Vec<Value>,
    pub(crate) policies: Vec<Value>,
    pub(crate) deployments: Vec<Value>,
    pub(crate) daemon_sets: Vec<Value>,
    pub(crate) cilium_policies: Vec<Value>,
    pub(crate) cilium_settings: Option<Value>,
}

/// Asks the cluster.
pub(crate) async fn gather(cluster: &Cluster) -> anyhow::Result<Surroundings> {
    let admission = "/apis/admissionregistration.k8s.io/v1";
    let mut webhooks = Vec::new();
    for (kind, resource) in [
        ("ValidatingWebhookConfiguration", "validatingwebhookconfigurations"),
        ("MutatingWebhookConfiguration", "mutatingwebhookconfigurations"),
    ] {
        for mut object in cluster.list::<Value>(&format!("{admission}/{resource}"), "").await? {
            object["kind"] = kind.into();
            webhooks.push(object);
        }
    }
    let mut cilium_policies = Vec::new();
    for resource in ["ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies"] {
        cilium_policies.extend(cluster.list::<Value>(&format!("/apis/cilium.io/v2/{resource}"), "").await?);
    }
    Ok(Surroundings {
        webhooks,
        policies: cluster.list("/apis/security.istio.io/v1/authorizationpolicies", "").await?,
        deployments: cluster.list("/apis/apps/v1/deployments", "").await?,
        daemon_sets: cluster.list("/apis/apps/v1/daemonsets", "").await?,
        cilium_policies,
        cilium_settings: cluster.get("/api/v1/namespaces/kube-system/configmaps/cilium-config").await?,
    })
}

/// Says one, where nothing reads it as an output.
pub(crate) fn say(warning: &str) {
    const WARNING: anstyle::Style = anstyle::AnsiColor::Yellow.on_default().bold();
    anstream::eprintln!("{WARNING}warning{WARNING:#}: {warning}");
}

/// The warnings: each one sentence with what to do.
pub(crate) fn warnings(around: &Surroundings, values: &Values, judge: Judge) -> Vec<String> {
    let mut found = of_values(values);
    let exempt: Vec<_> = values.get(Key::CniExempt).split(',').collect();
    for configuration in &around.webhooks {
        found.extend(closed_webhooks(configuration, &exempt));
    }
    for policy in &around.policies {
        found.extend(policy_that_bites(policy, judge));
    }
    found.extend(other_meshes(around));
    found.extend(cilium(around));
    found
}

/// What values would do that nobody can want, whichever cluster it is.
pub(crate) fn of_values(values: &Values) -> Vec<String> {
    /// No range of pods is larger: the shortest prefixes in use are 10.0.0.0/8 and fc00::/7.
    const SHORTEST: u8 = 7;
    let key = Key::InsideRanges;
    let ranges = values.get(key).split(',').filter_map(|text| text.trim().parse::<IpNet>().ok());
    let large = ranges.filter(|range| range.prefix_len() < SHORTEST);
    let sentence = |range: IpNet| {
        format!(
            "{} has {range}: what is outside of the cluster counts as inside, and a pod's connections to every address in it that is \
             no pod's or Service's are refused, the internet's among them; name the ranges of pods alone",
            key.as_str()
        )
    };
    large.map(sentence).collect()
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(path).and_then(Value::as_array).into_iter().flatten()
}

fn title(object: &Value, kind: &str) -> String {
    let name = text(object, "/metadata/name");
    match text(object, "/metadata/namespace") {
        "" => format!("{kind} {name}"),
        namespace => format!("{kind} {namespace}/{name}"),
    }
}

/// Webhooks that judge pods, refuse where they do not answer, and run in pods that would wait for us (T12).
fn closed_webhooks(configuration: &Value, exempt: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for webhook in items(configuration, "/webhooks") {
        let closed = text(webhook, "/failurePolicy") != "Ignore";
        let resources = items(webhook, "/rules").flat_map(|rule| items(rule, "/resources").filter_map(Value::as_str));
        let of_pods = resources.into_iter().any(|resource| ["pods", "*", "*/*", "pods/*"].contains(&resource));
        let namespace = text(webhook, "/clientConfig/service/namespace");
        if closed && of_pods && !namespace.is_empty() && !exempt.contains(&namespace) {
            found.push(format!(
                "{}: webhook {} refuses pods where it does not answer, and its own pods in {namespace} start only where our agent runs: \
                 on a node where neither is there yet each would wait for the other; install with --set {}={},{namespace}, or leave \
                 {namespace} and justmtls-system out of the webhook's namespaceSelector",
                title(configuration, text(configuration, "/kind")),
                text(webhook, "/name"),
                Key::CniExempt.as_str(),
                exempt.join(","),
            ));
        }
    }
    found
}

/// Policies that were made for another product, and would be enforced from now on (T35).
fn policy_that_bites(policy: &Value, judge: Judge) -> Option<String> {
    let title = title(policy, "AuthorizationPolicy");
    let metadata = serde_json::from_value(policy["metadata"].clone()).unwrap_or_default();
    // Read and checked as the control plane does it, which refuses everything where it does not understand.
    let parsed = manifests::parse_policy(&title, Kind::AuthorizationPolicy, metadata, &policy["spec"]);
    let why = match parsed.objects.first() {
        Some((Object::AuthorizationPolicy(policy), _)) => judge(policy)?,
        _ => {
            let errors = parsed.problems.iter().filter(|problem| problem.is_error());
            format!("it is not understood ({})", errors.map(Problem::finding).collect::<Vec<_>>().join(", "))
        }
    };
    Some(format!(
        "{title} would make all that it selects refuse every connection: {why}; change or remove it before the installation"
    ))
}

/// Other products whose rules stand at the same hooks.
fn other_meshes(around: &Surroundings) -> Vec<String> {
    let labelled = |name: &str, value: &str| {
        around.deployments.iter().find(|it| it["metadata"]["labels"][name].as_str() == Some(value))
    };
    let mut found = Vec::new();
    if let Some(istiod) = labelled("app", "istiod") {
        found.push(format!(
            "Istio is here ({}): pods that it captures have rules at the same places, and are not encrypted twice; \
             take a namespace out of Istio before it is enrolled, or label it justmtls.dev/mode: off",
            title(istiod, "Deployment")
        ));
    }
    if let Some(linkerd) = labelled("linkerd.io/control-plane-component", "destination") {
        found.push(format!(
            "Linkerd is here ({}): pods with its proxy have rules at the same places; \
             take a namespace out of Linkerd before it is enrolled, or label it justmtls.dev/mode: off",
            title(linkerd, "Deployment")
        ));
    }
    found
}

/// What of Cilium reads what will be encrypted, or takes away what the agent needs (T36).
fn cilium(around: &Surroundings) -> Vec<String> {
    let mut found = Vec::new();
    for policy in &around.cilium_policies {
        let specs = items(policy, "/specs").chain(policy.get("spec"));
        let ports = specs
            .flat_map(|spec| items(spec, "/ingress").chain(items(spec, "/egress")))
            .flat_map(|rule| items(rule, "/toPorts"));
        if ports.into_iter().any(|ports| ports.get("rules").is_some_and(|rules| !rules.is_null())) {
            found.push(format!(
                "{} has rules about HTTP or other protocols inside connections: on encrypted ones it will see TLS and refuse; \
                 reduce it to ports, or leave its pods out by justmtls.dev/mode: off",
                title(policy, policy["kind"].as_str().unwrap_or("CiliumNetworkPolicy"))
            ));
        }
    }
    let has_cilium = around.daemon_sets.iter().any(|it| text(it, "/metadata/name") == "cilium");
    let exclusive = around.cilium_settings.as_ref().map(|settings| text(settings, "/data/cni-exclusive"));
    if has_cilium && exclusive.is_some_and(|exclusive| exclusive != "false") {
        found.push(
            "Cilium takes away the CNI configurations of others (cni-exclusive in ConfigMap kube-system/cilium-config): pods that \
             start then are captured late; set cni.exclusive=false in Cilium's values"
                .to_owned(),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nothing_wrong(_: &AuthorizationPolicy) -> Option<String> {
        None
    }

    fn webhook(policy: &str, namespace: &str, resource: &str) -> Value {
        json!({ "kind": "ValidatingWebhookConfiguration", "metadata": { "name": "gate" }, "webhooks": [{
            "name": "gate.example.org", "failurePolicy": policy, "rules": [{ "resources": [resource] }],
            "clientConfig": { "service": { "namespace": namespace, "name": "gate" } },
        }] })
    }

    #[test]
    fn a_webhook_that_would_wait_for_us_while_we_wait_for_it_is_named() {
        let warned = |webhook: Value| {
            warnings(
                &Surroundings { webhooks: vec![webhook], ..Surroundings::default() },
                &Values::default(),
                nothing_wrong,
            )
            .len()
        };
        assert_eq!(warned(webhook("Fail", "gate", "pods")), 1);
        assert_eq!(warned(webhook("Fail", "gate", "*")), 1);
        assert_eq!(warned(webhook("Ignore", "gate", "pods")), 0);
        assert_eq!(warned(webhook("Fail", "kube-system", "pods")), 0);
        assert_eq!(warned(webhook("Fail", "gate", "ingresses")), 0);
        assert_eq!(warned(webhook("Fail", "", "pods")), 0);
    }

    #[test]
    fn ranges_that_make_the_internet_a_part_of_the_cluster_are_named() {
        let warned = |ranges: &str| of_values(&Values::from_words(&[format!("insideCIDRs={ranges}")]).unwrap());
        let [one] = &warned("10.0.0.0/8,0.0.0.0/0")[..] else { panic!("one") };
        assert!(one.starts_with("insideCIDRs has 0.0.0.0/0: ") && one.contains("internet"), "{one}");
        assert_eq!(warned("0.0.0.0/1,128.0.0.0/1,::/0").len(), 3);
        assert_eq!(warned("10.0.0.0/8,fc00::/7"), [""; 0]);
    }

    #[test]
    fn policies_that_would_refuse_everything_are_named_with_the_reason() {
        let around = Surroundings {
            policies: vec![
                json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                    "metadata": { "name": "a", "namespace": "b" }, "spec": { "action": "DENY" } }),
                json!({ "metadata": { "name": "c", "namespace": "d" }, "spec": { "new": "field" } }),
            ],
            ..Surroundings::default()
        };
        let found = warnings(&around, &Values::default(), |_| Some("field paths".to_owned()));
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("AuthorizationPolicy b/a") && found[0].contains("field paths"), "{found:?}");
        assert!(found[1].contains("not understood"), "{found:?}");
        assert_eq!(warnings(&around, &Values::default(), nothing_wrong).len(), 1);
    }

    #[test]
    fn a_policy_that_the_control_plane_would_not_take_is_named() {
        let judged = |source: Value| {
            let policy = json!({ "metadata": { "name": "a", "namespace": "b", "managedFields": [] },
                "spec": { "rules": [{ "from": [{ "source": source }] }] }, "status": { "conditions": [] } });
            let around = Surroundings { policies: vec![policy], ..Surroundings::default() };
            warnings(&around, &Values::default(), nothing_wrong)
        };
        assert_eq!(judged(json!({ "namespaces": ["shop"] })), [""; 0]);
        let [one] = &judged(json!({}))[..] else { panic!("one") };
        assert!(one.contains("not understood (field spec.rules[0].from[0].source: says nothing"), "{one}");
    }

    #[test]
    fn other_meshes_and_readers_of_traffic_are_named() {
        let around = Surroundings {
            deployments: vec![
                json!({ "metadata": { "name": "istiod", "namespace": "istio-system", "labels": { "app": "istiod" } } }),
                json!({ "metadata": { "name": "d", "namespace": "linkerd", "labels": { "linkerd.io/control-plane-component": "destination" } } }),
            ],
            daemon_sets: vec![json!({ "metadata": { "name": "cilium" } })],
            cilium_policies: vec![
                json!({ "metadata": { "name": "l7" }, "spec": { "ingress": [{ "toPorts": [{ "rules": { "http": [] } }] }] } }),
                json!({ "metadata": { "name": "l4" }, "spec": { "ingress": [{ "toPorts": [{ "ports": [] }] }] } }),
            ],
            cilium_settings: Some(json!({ "data": { "cni-exclusive": "true" } })),
            ..Surroundings::default()
        };
        let found = warnings(&around, &Values::default(), nothing_wrong).join("\n");
        for word in ["Istio is here", "Linkerd is here", "l7 has rules", "cni-exclusive"] {
            assert!(found.contains(word), "{found}");
        }
        assert!(!found.contains("l4"));
        assert!(warnings(&Surroundings::default(), &Values::default(), nothing_wrong).is_empty());
    }
}
