//! The objects of the simulated cluster, as long as a real cluster's: what is in them and not read costs, too.

use std::net::Ipv4Addr;
use std::sync::LazyLock;

use serde_json::{Value, json};

use super::world::{Pod, node_address, node_name};

/// How far a pod is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Unplaced,
    /// It has a node, and no address yet.
    Placed,
    Ready,
    /// It is told to end.
    Ending,
}

/// The namespace of the product.
pub(super) const ROOT_NAMESPACE: &str = "justmtls-system";

pub(super) fn namespace(name: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": name, "resourceVersion": "@VERSION@", "labels": { "kubernetes.io/metadata.name": name } },
        "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
    })
    .to_string()
}

/// The settings of the mesh: those of an installation but for the Services' range, and for small runs told like large ones.
pub(super) fn settings() -> String {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "justmtls", "namespace": ROOT_NAMESPACE, "resourceVersion": "@VERSION@" },
        "data": { "serviceCIDRs": "10.96.0.0/12", "wholeMeshUpTo": "0" },
    })
    .to_string()
}

pub(super) fn node(name: &str, range: Ipv4Addr, address: Ipv4Addr, heartbeat: u64) -> String {
    let condition = |kind: &str, status: &str| {
        json!({
            "type": kind, "status": status, "reason": "KubeletHasSufficientResources",
            "message": format!("kubelet reports {kind} {heartbeat}"),
            "lastHeartbeatTime": "2026-03-01T12:00:00Z", "lastTransitionTime": "2026-03-01T10:00:00Z",
        })
    };
    let images: Vec<Value> = (0..25)
        .map(|number| json!({ "names": [format!("registry.example/team/image-{number}@sha256:{number:064x}")], "sizeBytes": 52_428_800 }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name, "uid": format!("node-{name}"), "resourceVersion": "@VERSION@",
            "labels": { "kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux" },
        },
        "spec": { "podCIDR": format!("{range}/24"), "podCIDRs": [format!("{range}/24")] },
        "status": {
            "addresses": [
                { "type": "InternalIP", "address": address.to_string() }, { "type": "Hostname", "address": name },
            ],
            "conditions": [
                condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                condition("PIDPressure", "False"), condition("Ready", "True"),
            ],
            "images": images,
        },
    })
    .to_string()
}

pub(super) fn service(namespace: &str, name: &str, address: Ipv4Addr) -> String {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("{namespace}-{name}"), "resourceVersion": "@VERSION@",
            "creationTimestamp": "2026-03-01T10:00:00Z", "labels": { "app": name },
        },
        "spec": {
            "clusterIP": address.to_string(), "clusterIPs": [address.to_string()], "type": "ClusterIP",
            "selector": { "app": name }, "ipFamilies": ["IPv4"], "sessionAffinity": "None",
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP" }],
        },
        "status": { "loadBalancer": {} },
    })
    .to_string()
}

pub(super) fn slice(namespace: &str, service: &str, ready: &[Pod], ending: &[Pod]) -> String {
    let endpoint = |pod: &Pod, is_ready: bool| {
        format!(
            concat!(
                r#"{{"addresses":["{}"],"conditions":{{"ready":{},"serving":{},"terminating":{}}},"nodeName":"{}","#,
                r#""targetRef":{{"kind":"Pod","namespace":"{}","name":"{}","uid":"{}"}}}}"#
            ),
            pod.address,
            is_ready,
            is_ready,
            !is_ready,
            node_name(pod.node),
            namespace,
            pod.name,
            pod.uid
        )
    };
    let ready = ready.iter().map(|pod| endpoint(pod, true));
    let endpoints: Vec<_> = ready.chain(ending.iter().map(|pod| endpoint(pod, false))).collect();
    format!(
        concat!(
            r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{}-x7k2p","namespace":"{}","#,
            r#""resourceVersion":"@VERSION@","labels":{{"kubernetes.io/service-name":"{}"}}}},"addressType":"IPv4","#,
            r#""ports":[{{"name":"http","port":8080,"protocol":"TCP"}}],"endpoints":[{}]}}"#
        ),
        service,
        namespace,
        service,
        endpoints.join(",")
    )
}

/// A pod of one container with a probe, as a Deployment and kubelet write it. `@WORDS@` are filled in.
static POD: LazyLock<[String; 4]> = LazyLock::new(|| {
    [Stage::Unplaced, Stage::Placed, Stage::Ready, Stage::Ending].map(|stage| template(stage).to_string())
});

pub(super) fn pod(namespace: &str, service: &str, pod: &Pod, stage: Stage) -> String {
    let template = &POD[stage as usize];
    let (node, address, host) = (node_name(pod.node), pod.address.to_string(), node_address(pod.node).to_string());
    fill(template, |word| match word {
        "NAMESPACE" => Some(namespace),
        "SERVICE" => Some(service),
        "NAME" => Some(&pod.name),
        "UID" => Some(&pod.uid),
        "NODE" => Some(&node),
        "ADDRESS" => Some(&address),
        "HOST" => Some(&host),
        _ => None,
    })
}

/// Puts values in the place of `@WORDS@`; a word that has none stays.
fn fill<'a>(template: &str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut filled = String::with_capacity(template.len() + 512);
    for (number, part) in template.split('@').enumerate() {
        match value(part).filter(|_| number % 2 == 1) {
            Some(value) => filled.push_str(value),
            None if number % 2 == 1 => filled.extend(["@", part, "@"]),
            None => filled.push_str(part),
        }
    }
    filled
}

fn template(stage: Stage) -> Value {
    let time = "2026-03-01T10:00:00Z";
    let managed = |manager: &str, fields: Value| {
        json!({
            "manager": manager, "operation": "Update", "apiVersion": "v1", "time": time, "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        })
    };
    let condition = |kind: &str, status: bool| {
        let status = if status { "True" } else { "False" };
        json!({ "type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": time, "observedGeneration": 1 })
    };
    let runs = matches!(stage, Stage::Ready | Stage::Ending);
    let ready = stage == Stage::Ready;
    let mut status = json!({
        "phase": if runs { "Running" } else { "Pending" }, "qosClass": "Burstable", "observedGeneration": 1,
        "conditions": [
            condition("PodScheduled", stage != Stage::Unplaced), condition("Initialized", runs),
            condition("PodReadyToStartContainers", runs), condition("ContainersReady", ready), condition("Ready", ready),
        ],
    });
    let mut metadata = json!({
        "name": "@NAME@", "generateName": "@SERVICE@-5d4f7c9b8-", "namespace": "@NAMESPACE@", "uid": "@UID@",
        "resourceVersion": "@VERSION@", "generation": 1, "creationTimestamp": time,
        "labels": { "app": "@SERVICE@", "pod-template-hash": "5d4f7c9b8", "app.kubernetes.io/version": "1.4.2" },
        "annotations": { "prometheus.io/scrape": "true", "prometheus.io/port": "9090" },
        "ownerReferences": [{
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "@SERVICE@-5d4f7c9b8",
            "uid": "0b6cdd16-84b1-4b1e-9d4e-1a2b3c4d5e6f", "controller": true, "blockOwnerDeletion": true,
        }],
        "managedFields": [
            managed("kube-controller-manager", json!({
                "f:metadata": { "f:generateName": {}, "f:labels": { ".": {}, "f:app": {}, "f:pod-template-hash": {} }, "f:ownerReferences": { ".": {} } },
                "f:spec": { "f:containers": { "k:{\"name\":\"app\"}": { ".": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {}, "f:ports": { ".": {} }, "f:readinessProbe": { ".": {}, "f:httpGet": { ".": {}, "f:path": {}, "f:port": {} } }, "f:resources": { ".": {}, "f:limits": {}, "f:requests": {} } } }, "f:dnsPolicy": {}, "f:enableServiceLinks": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:serviceAccountName": {}, "f:terminationGracePeriodSeconds": {} },
            })),
            managed("kubelet", json!({
                "f:status": { "f:conditions": { "k:{\"type\":\"Ready\"}": { ".": {}, "f:lastTransitionTime": {}, "f:status": {}, "f:type": {} } }, "f:containerStatuses": {}, "f:hostIP": {}, "f:hostIPs": {}, "f:phase": {}, "f:podIP": {}, "f:podIPs": { ".": {} }, "f:startTime": {} },
            })),
        ],
    });
    if stage == Stage::Ending {
        metadata["deletionTimestamp"] = json!(time);
        metadata["deletionGracePeriodSeconds"] = json!(30);
    }
    let mut spec = json!({
        "serviceAccountName": "@SERVICE@", "serviceAccount": "@SERVICE@", "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
        "priority": 0, "preemptionPolicy": "PreemptLowerPriority", "enableServiceLinks": true, "securityContext": {},
        "tolerations": [
            { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 },
            { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 },
        ],
        "volumes": [{
            "name": "kube-api-access-4x2vd",
            "projected": { "defaultMode": 420, "sources": [
                { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
                { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            ] },
        }],
        "containers": [{
            "name": "app", "image": "registry.example/team/@SERVICE@:1.4.2", "imagePullPolicy": "IfNotPresent",
            "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
            "env": [
                { "name": "LOG_LEVEL", "value": "info" },
                { "name": "POD_IP", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "status.podIP" } } },
            ],
            "resources": { "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
            "readinessProbe": { "httpGet": { "path": "/healthz", "port": "http", "scheme": "HTTP" }, "periodSeconds": 10, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3 },
            "volumeMounts": [{ "name": "kube-api-access-4x2vd", "readOnly": true, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount" }],
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        }],
    });
    if stage != Stage::Unplaced {
        spec["nodeName"] = json!("@NODE@");
    }
    if runs {
        status["hostIP"] = json!("@HOST@");
        status["hostIPs"] = json!([{ "ip": "@HOST@" }]);
        status["podIP"] = json!("@ADDRESS@");
        status["podIPs"] = json!([{ "ip": "@ADDRESS@" }]);
        status["startTime"] = json!(time);
        status["containerStatuses"] = json!([{
            "name": "app", "ready": ready, "started": true, "restartCount": 0, "lastState": {},
            "image": "registry.example/team/@SERVICE@:1.4.2",
            "imageID": "registry.example/team/app#sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "containerID": "containerd://2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
            "state": { "running": { "startedAt": time } },
        }]);
    }
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_filled_in_but_for_its_version() {
        let one = Pod { name: "a-1".into(), uid: "u".into(), node: 3, address: Ipv4Addr::new(10, 128, 3, 7) };
        let text = pod("team-001", "service-1", &one, Stage::Ready);
        let object: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(object["status"]["podIP"], "10.128.3.7");
        assert_eq!(object["spec"]["nodeName"], "node-0003");
        assert_eq!(object["spec"]["containers"][0]["image"], "registry.example/team/service-1:1.4.2");
        assert_eq!(object["metadata"]["resourceVersion"], "@VERSION@");
        assert_eq!(text.matches('@').count(), 2, "{text}");
        assert!(text.len() > 3000, "as long as a real one: {}", text.len());
        let placed: Value = serde_json::from_str(&pod("team-001", "service-1", &one, Stage::Placed)).unwrap();
        assert!(placed["status"]["podIP"].is_null() && placed["spec"]["nodeName"] == "node-0003");
        let slice: Value = serde_json::from_str(&slice("team-001", "service-1", &[], &[one])).unwrap();
        assert_eq!(slice["endpoints"][0]["conditions"]["terminating"], true);
    }
}
