use serde_json::Value;

use super::*;

fn default() -> Vec<Object> {
    objects(&Values::default())
}

fn one(kind: &str, name: &str) -> Value {
    let found = default().into_iter().find(|object| object.kind() == kind && object.name() == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}")).value
}

fn container(workload: &Value, name: &str) -> Value {
    let containers = workload["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    containers.iter().find(|container| container["name"] == name).unwrap().clone()
}

#[test]
fn an_installation_is_at_most_fifteen_objects_in_the_order_in_which_they_are_made() {
    let kinds: Vec<_> = default().iter().map(|object| object.kind().to_owned()).collect();
    let expected = [
        "Namespace",
        "ConfigMap",
        "ServiceAccount",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "Role",
        "RoleBinding",
        "Role",
        "RoleBinding",
        "Service",
        "Deployment",
        "PodDisruptionBudget",
        "DaemonSet",
    ];
    assert_eq!(kinds, expected);
    assert!(all(Source::Chart).len() <= 15);
    assert_eq!(definitions().len(), 2);
}

#[test]
fn every_object_is_labelled_as_ours_and_in_our_namespace_or_in_none() {
    for object in default().iter().chain(&definitions()) {
        let labels = &object.value["metadata"]["labels"];
        assert_eq!(labels[PART_OF], "justmtls", "{}", object.title());
        assert_eq!(labels["app.kubernetes.io/version"], VERSION, "{}", object.title());
        assert!(object.namespace().is_none_or(|namespace| namespace == NAMESPACE));
    }
    let namespace = one("Namespace", NAMESPACE);
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
}

#[test]
fn the_proxy_holds_no_privilege_and_has_no_token_for_the_api_server() {
    let proxy = container(&one("DaemonSet", NODE), "proxy");
    assert_eq!(
        proxy["securityContext"],
        json!({
            "runAsUser": 2147, "runAsGroup": 2147, "runAsNonRoot": true, "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        })
    );
    let mounts: Vec<_> = proxy["volumeMounts"].as_array().unwrap().iter().map(|mount| mount["name"].clone()).collect();
    assert_eq!(mounts, ["proxy-socket", "own", "trust", "proxy-token"]);
}

#[test]
fn the_agent_has_the_capabilities_that_it_needs_and_no_more() {
    let agent = container(&one("DaemonSet", NODE), "agent");
    let context = &agent["securityContext"];
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "CHOWN"] }));
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert!(context["privileged"].is_null());
}

#[test]
fn the_node_pod_shares_no_namespace_with_its_node_and_comes_before_the_old_one_goes() {
    let node = one("DaemonSet", NODE);
    let spec = &node["spec"]["template"]["spec"];
    for word in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(spec[word].is_null(), "{word}");
    }
    assert!(!node.to_string().contains("hostPort"));
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!(node["spec"]["updateStrategy"]["rollingUpdate"], json!({ "maxSurge": 1, "maxUnavailable": 0 }));
    assert_eq!(spec["terminationGracePeriodSeconds"], 1830);
    assert_eq!(spec["priorityClassName"], "system-node-critical");
}

#[test]
fn each_process_has_its_own_audience() {
    let node = one("DaemonSet", NODE);
    let volumes = node["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    let audience = |name: &str| {
        let volume = volumes.iter().find(|volume| volume["name"] == name).unwrap();
        volume["projected"]["sources"][0]["serviceAccountToken"]["audience"].clone()
    };
    assert_eq!(audience("agent-token"), "justmtls.dev/agent");
    assert_eq!(audience("proxy-token"), "justmtls.dev/proxy");
    assert!(audience("api-token").is_null());
}

#[test]
fn each_mount_has_its_volume_each_probe_its_port_and_each_port_its_argument() {
    for workload in [one("Deployment", CONTROL), one("DaemonSet", NODE)] {
        let spec = &workload["spec"]["template"]["spec"];
        let volumes: Vec<_> = spec["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
        let mut mounted = Vec::new();
        for container in spec["containers"].as_array().unwrap() {
            let ports = container["ports"].as_array().unwrap();
            let named: Vec<_> = ports.iter().map(|port| &port["name"]).collect();
            assert!(named.contains(&&container["readinessProbe"]["httpGet"]["port"]), "{container}");
            let words = container["args"].to_string();
            for port in ports {
                assert!(words.contains(&format!("[::]:{}", port["containerPort"])), "{words}");
            }
            for mount in container["volumeMounts"].as_array().unwrap() {
                assert!(volumes.contains(&&mount["name"]), "{mount}");
                mounted.push(&mount["name"]);
            }
            assert!(!container["resources"]["requests"]["memory"].is_null());
        }
        assert!(volumes.iter().all(|volume| mounted.contains(volume)));
        assert_eq!(
            workload["spec"]["selector"]["matchLabels"][NAME],
            workload["spec"]["template"]["metadata"]["labels"][NAME]
        );
    }
    let service = one("Service", CONTROL);
    assert_eq!(service["spec"]["ports"][0]["port"], 15012);
    assert_eq!(service["spec"]["ports"][0]["name"], "grpc-nodes");
}

#[test]
fn the_control_plane_is_no_root_and_holds_no_capability() {
    let control = one("Deployment", CONTROL);
    let spec = &control["spec"]["template"]["spec"];
    assert_eq!(spec["securityContext"]["runAsUser"], 65532);
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    let context = container(&control, "control")["securityContext"].clone();
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
    assert_eq!(context["readOnlyRootFilesystem"], true);
}

#[test]
fn each_object_is_what_the_kubernetes_types_know() {
    use k8s_openapi::api::{apps::v1 as apps, core::v1 as core, policy::v1 as policy, rbac::v1 as rbac};
    fn same<T: serde::Serialize + serde::de::DeserializeOwned>(value: &Value) {
        let typed: T = serde_json::from_value(value.clone()).unwrap();
        // A field that the type does not know would be lost here, and refused by the API server.
        let again = serde_json::to_value(typed).unwrap();
        assert_eq!(again, *value);
    }
    for object in objects(&Values::from_words(&["criticalPodsQuota=true".to_owned()]).unwrap()) {
        match object.kind() {
            "Namespace" => same::<core::Namespace>(&object.value),
            "ConfigMap" => same::<core::ConfigMap>(&object.value),
            "ResourceQuota" => same::<core::ResourceQuota>(&object.value),
            "ServiceAccount" => same::<core::ServiceAccount>(&object.value),
            "Service" => same::<core::Service>(&object.value),
            "ClusterRole" => same::<rbac::ClusterRole>(&object.value),
            "ClusterRoleBinding" => same::<rbac::ClusterRoleBinding>(&object.value),
            "Role" => same::<rbac::Role>(&object.value),
            "RoleBinding" => same::<rbac::RoleBinding>(&object.value),
            "Deployment" => same::<apps::Deployment>(&object.value),
            "PodDisruptionBudget" => same::<policy::PodDisruptionBudget>(&object.value),
            "DaemonSet" => same::<apps::DaemonSet>(&object.value),
            kind => panic!("{kind}"),
        }
    }
}

#[test]
fn the_specification_lists_each_rule_with_its_reason_and_no_other() {
    let text = include_str!("../../../../SPECIFICATION.md");
    let section = text.split("## Permissions").nth(1).expect("a section").split("\n##").next().unwrap();
    let listed: Vec<_> = section.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(listed, permissions());
}

#[test]
fn the_specification_lists_each_key_with_its_default() {
    let text = include_str!("../../../../SPECIFICATION.md");
    let section = text.split("## Values").nth(1).expect("a section").split("\n## ").next().unwrap();
    let listed: Vec<_> = section.lines().filter(|line| line.starts_with("| `")).collect();
    let expected: Vec<_> = Key::ALL
        .iter()
        .map(|key| {
            let default = match key.default_value() {
                "" => String::new(),
                value => format!("`{value}`"),
            };
            format!("| `{}` | {default} | {} |", key.as_str(), key.about())
        })
        .collect();
    assert_eq!(listed, expected);
}
