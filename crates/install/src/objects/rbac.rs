//! What the two service accounts may ask of the API server: each rule with its reason, as SPECIFICATION.md lists them.

use serde_json::{Value, json};

use super::{AUTHORITY, CONTROL, NAMESPACE, NODE, metadata};
use crate::source::Source;
use crate::values::Key;

/// One rule.
#[derive(Debug)]
struct Rule {
    group: &'static str,
    resources: &'static [&'static str],
    /// All of them, where there are none.
    names: &'static [&'static str],
    verbs: &'static [&'static str],
    /// Why it is needed.
    reason: &'static str,
}

/// The ClusterTrustBundle's name, whose end is a value.
const BUNDLE: &str = "justmtls.dev:workload:<trust domain>";
const BUNDLE_BEFORE: &str = "justmtls.dev:workload:";

const READ: &[&str] = &["list", "watch"];

/// What the control plane may do in the whole cluster.
const CONTROL_CLUSTER: &[Rule] = &[
    Rule {
        group: "",
        resources: &["namespaces", "nodes", "pods", "services"],
        names: &[],
        verbs: READ,
        reason: "who is in the mesh, where, and as whom",
    },
    Rule {
        group: "discovery.k8s.io",
        resources: &["endpointslices"],
        names: &[],
        verbs: READ,
        reason: "who stands behind a Service",
    },
    Rule {
        group: "networking.k8s.io",
        resources: &["networkpolicies"],
        names: &[],
        verbs: READ,
        reason: "warm tunnels that a policy no longer allows end (T20)",
    },
    Rule {
        group: "admissionregistration.k8s.io",
        resources: &["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
        names: &[],
        verbs: READ,
        reason: "which pods the API server asks about objects, so that strict lets it in there (T33)",
    },
    Rule {
        group: "apiregistration.k8s.io",
        resources: &["apiservices"],
        names: &[],
        verbs: READ,
        reason: "which pods serve a part of the API, likewise (T33)",
    },
    Rule {
        group: "security.istio.io",
        resources: &["authorizationpolicies", "peerauthentications"],
        names: &[],
        verbs: &["get", "list", "watch"],
        reason: "modes and permissions; each is read once more before its status is written",
    },
    Rule {
        group: "security.istio.io",
        resources: &["authorizationpolicies/status", "peerauthentications/status"],
        names: &[],
        verbs: &["patch"],
        reason: "what of a policy cannot be enforced is said in its status (D13)",
    },
    Rule {
        group: "",
        resources: &["events"],
        names: &[],
        verbs: &["create"],
        reason: "the owner of a pod that runs and cannot be captured is told where he looks; no Event is read or changed",
    },
    Rule {
        group: "authentication.k8s.io",
        resources: &["tokenreviews"],
        names: &[],
        verbs: &["create"],
        reason: "agents and proxies prove by their tokens which node they are on",
    },
    Rule {
        group: "certificates.k8s.io",
        resources: &["clustertrustbundles"],
        names: &[],
        verbs: &["create"],
        reason: "the roots, for whoever else wants to verify: no name can be given for this verb",
    },
    Rule {
        group: "certificates.k8s.io",
        resources: &["clustertrustbundles"],
        names: &[BUNDLE],
        verbs: &["get", "update"],
        reason: "the same, kept up to date",
    },
    Rule {
        group: "certificates.k8s.io",
        resources: &["signers"],
        names: &["justmtls.dev/workload"],
        verbs: &["attest"],
        reason: "a ClusterTrustBundle of a signer asks for this",
    },
];

/// What the control plane may do in our namespace.
const CONTROL_OWN: &[Rule] = &[
    Rule {
        group: "",
        resources: &["configmaps"],
        names: &[],
        verbs: &["create", "list", "watch"],
        reason: "the settings, and the record of captured pods, one for each node",
    },
    Rule {
        group: "",
        resources: &["configmaps"],
        names: &[],
        verbs: &["delete", "get", "update"],
        reason: "that record is written, and goes with its node; the roots are published",
    },
    Rule {
        group: "",
        resources: &["secrets"],
        names: &[AUTHORITY],
        verbs: &["get"],
        reason: "the intermediate and its key",
    },
    Rule {
        group: "",
        resources: &["secrets"],
        names: &[],
        verbs: &["create"],
        reason: "the same Secret, at the first start: no name can be given for this verb",
    },
    Rule {
        group: "coordination.k8s.io",
        resources: &["leases"],
        names: &[],
        verbs: &["create"],
        reason: "the Lease of the replica that writes, at the first start",
    },
    Rule {
        group: "coordination.k8s.io",
        resources: &["leases"],
        names: &[CONTROL],
        verbs: &["get", "update"],
        reason: "holding it",
    },
];

/// What a node may do in our namespace.
const NODE_OWN: &[Rule] = &[Rule {
    group: "apps",
    resources: &["daemonsets"],
    names: &[NODE],
    verbs: &["get"],
    reason: "an agent that ends takes the CNI plugin out where its DaemonSet is being deleted",
}];

/// Every role: its kind, its name and its rules.
const ROLES: &[(&str, &str, &[Rule])] =
    &[("ClusterRole", CONTROL, CONTROL_CLUSTER), ("Role", CONTROL, CONTROL_OWN), ("Role", NODE, NODE_OWN)];

pub(super) fn objects(source: Source<'_>) -> Vec<Value> {
    let mut objects = vec![account(CONTROL), account(NODE)];
    for (kind, name, rules) in ROLES {
        objects.push(role(source, kind, name, rules));
        objects.push(binding(kind, name));
    }
    objects
}

fn account(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(name, true) })
}

fn role(source: Source<'_>, kind: &str, name: &str, rules: &[Rule]) -> Value {
    let named = |name: &&str| match *name {
        BUNDLE => source.after(BUNDLE_BEFORE, Key::TrustDomain),
        name => name.into(),
    };
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| {
            let mut value = json!({ "apiGroups": [rule.group], "resources": rule.resources, "verbs": rule.verbs });
            if !rule.names.is_empty() {
                value["resourceNames"] = rule.names.iter().map(named).collect();
            }
            value
        })
        .collect();
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": metadata(name, kind == "Role"),
        "rules": rules,
    })
}

fn binding(kind: &str, name: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": format!("{kind}Binding"),
        "metadata": metadata(name, kind == "Role"),
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name },
        "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": NAMESPACE }],
    })
}

/// What is permitted to whom, where, and why: a table in Markdown, of which SPECIFICATION.md has a copy.
pub(crate) fn permissions() -> Vec<String> {
    let mut rows = vec!["| Account | Where | What | Verbs | Why |".to_owned(), "|---|---|---|---|---|".to_owned()];
    for (kind, name, rules) in ROLES {
        let place = if *kind == "Role" { "its namespace" } else { "cluster" };
        for rule in *rules {
            let group = if rule.group.is_empty() { String::new() } else { format!(".{}", rule.group) };
            let resources: Vec<_> = rule.resources.iter().map(|it| format!("`{it}{group}`")).collect();
            let names = match rule.names {
                [] => String::new(),
                names => format!(" named `{}`", names.join("`, `")),
            };
            let (resources, verbs) = (resources.join(", "), rule.verbs.join(", "));
            rows.push(format!("| `{name}` | {place} | {resources}{names} | {verbs} | {} |", rule.reason));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_granted_by_wildcard_and_no_secret_but_ours_is_read() {
        for (_, _, rules) in ROLES {
            for rule in *rules {
                let all = rule.resources.iter().chain(rule.verbs).chain(rule.names);
                assert!(all.chain([&rule.group]).all(|word| !word.contains('*')), "{rule:?}");
                if rule.resources.contains(&"secrets") && rule.verbs != ["create"] {
                    assert_eq!(rule.names, [AUTHORITY]);
                }
            }
        }
        assert!(CONTROL_CLUSTER.iter().all(|rule| !rule.resources.contains(&"secrets")));
    }

    #[test]
    fn the_node_may_do_one_thing() {
        let [rule] = NODE_OWN else { panic!("one rule") };
        assert_eq!((rule.resources, rule.names, rule.verbs), (&["daemonsets"][..], &[NODE][..], &["get"][..]));
    }
}
