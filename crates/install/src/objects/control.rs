//! The control plane: Service, Deployment and PodDisruptionBudget.

use serde_json::{Value, json};

use super::{CONTROL, CONTROL_ADMIN, CONTROL_METRICS_PORT, CONTROL_PORT, CONTROL_USER, NAME, metadata, pod_labels};
use crate::source::Source;
use crate::values::Key;

pub(super) fn objects(source: Source<'_>) -> Vec<Value> {
    vec![service(), deployment(source), disruption_budget()]
}

/// Before the Deployment and the DaemonSet: pods are told its address when they are made.
fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(CONTROL, true),
        "spec": {
            "selector": { NAME: CONTROL },
            "ports": [{ "name": "grpc-nodes", "port": CONTROL_PORT, "targetPort": "grpc-nodes", "protocol": "TCP" }],
        },
    })
}

fn disruption_budget() -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(CONTROL, true),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { NAME: CONTROL } } },
    })
}

fn deployment(source: Source<'_>) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(CONTROL, true),
        "spec": {
            "replicas": source.plain(Key::Replicas),
            "selector": { "matchLabels": { NAME: CONTROL } },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "template": {
                "metadata": { "labels": pod_labels(CONTROL) },
                "spec": pod(source),
            },
        },
    })
}

fn pod(source: Source<'_>) -> Value {
    json!({
        "serviceAccountName": CONTROL,
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 30,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "tolerations": [{ "key": "node-role.kubernetes.io/control-plane", "operator": "Exists" }],
        // Evenly over the nodes that take pods: a cluster of one node has both replicas there. Where one of two is full a replica
        // waits rather than join the other, as both would go with that node; `crate::hang` says so. Pods of one version alone are
        // counted, since those of the version before end while an upgrade goes on.
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "nodeTaintsPolicy": "Honor",
            "labelSelector": { "matchLabels": { NAME: CONTROL } },
            "matchLabelKeys": ["pod-template-hash"],
        }],
        "securityContext": {
            "runAsUser": CONTROL_USER,
            "runAsGroup": CONTROL_USER,
            "runAsNonRoot": true,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [{
            "name": "control",
            "image": source.plain(Key::Image),
            "imagePullPolicy": source.plain(Key::ImagePullPolicy),
            "args": [
                "control",
                "--kubernetes",
                "--identity=$(POD_NAME)",
                format!("--listen=[::]:{CONTROL_PORT}"),
                format!("--metrics=[::]:{CONTROL_METRICS_PORT}"),
                format!("--admin={CONTROL_ADMIN}"),
                source.after("--leaf-validity=", Key::LeafValidity),
            ],
            "env": [
                { "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
                { "name": "POD_UID", "valueFrom": { "fieldRef": { "fieldPath": "metadata.uid" } } },
            ],
            "ports": [
                { "name": "grpc-nodes", "containerPort": CONTROL_PORT, "protocol": "TCP" },
                { "name": "metrics", "containerPort": CONTROL_METRICS_PORT, "protocol": "TCP" },
            ],
            "readinessProbe": { "httpGet": { "path": "/readyz", "port": "metrics" }, "periodSeconds": 2 },
            "livenessProbe": { "httpGet": { "path": "/livez", "port": "metrics" }, "initialDelaySeconds": 10 },
            "resources": { "requests": {
                "cpu": source.plain(Key::ControlCpu),
                "memory": source.plain(Key::ControlMemory),
            } },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": [{ "name": "run", "mountPath": "/run/justmtls" }],
        }],
        "volumes": [{ "name": "run", "emptyDir": { "medium": "Memory" } }],
    })
}
