//! The node: one DaemonSet with the agent, which has privilege, and the proxy, which has none.

use serde_json::{Value, json};

use super::{
    AGENT_METRICS_PORT, LISTENER_OWNER, NAME, NAMESPACE, NODE, PROXY_ADMIN, PROXY_METRICS_PORT, PROXY_USER,
    TRUST_BUNDLE, metadata, pod_labels,
};
use crate::source::{Expression, Source};
use crate::values::Key;

pub(super) fn daemon_set(source: Source<'_>) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata(NODE, true),
        "spec": {
            "selector": { "matchLabels": { NAME: NODE } },
            // The new pod takes over from the old one while both are there (T5).
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "template": {
                "metadata": { "labels": pod_labels(NODE) },
                "spec": {
                    "serviceAccountName": NODE,
                    // The agent's container alone has a token for the API server, which is mounted by hand.
                    "automountServiceAccountToken": false,
                    "priorityClassName": "system-node-critical",
                    "terminationGracePeriodSeconds": source.leaf(Expression::Plus(Key::Drain, 30)),
                    "nodeSelector": { "kubernetes.io/os": "linux" },
                    "tolerations": [{ "operator": "Exists" }],
                    "containers": [agent(source), proxy(source)],
                    "volumes": volumes(source),
                },
            },
        },
    })
}

fn agent(source: Source<'_>) -> Value {
    json!({
        "name": "agent",
        "image": source.plain(Key::Image),
        "imagePullPolicy": source.plain(Key::ImagePullPolicy),
        "args": [
            "supervise",
            "agent",
            "--kubernetes",
            "--node=$(NODE_NAME)",
            "--control=$(JUSTMTLS_CONTROL_SERVICE_HOST)",
            "--bundle=/var/run/justmtls/trust/bundle.pem",
            "--token=/var/run/secrets/justmtls/token",
            "--proxy-socket=/run/justmtls/proxy/agent.sock",
            format!("--proxy-uid={PROXY_USER}"),
            format!("--listener-owner={LISTENER_OWNER}"),
            "--cni-socket=/run/justmtls/cni.sock",
            "--admin=/run/justmtls/agent/$(POD_NAME).sock",
            format!("--metrics=[::]:{AGENT_METRICS_PORT}"),
            source.leaf(Expression::File("--cri-socket=/host/run-cri/", Key::CriSocket)),
            "--netns-dir=/run/netns",
            "--cni-bin-dir=/host/cni/bin",
            "--cni-conf-dir=/host/cni/conf",
            source.after("--cni-exempt=", Key::CniExempt),
            format!("--daemonset={NAMESPACE}/{NODE}"),
        ],
        "env": [field("NODE_NAME", "spec.nodeName"), field("POD_NAME", "metadata.name")],
        "ports": [{ "name": "agent-metrics", "containerPort": AGENT_METRICS_PORT, "protocol": "TCP" }],
        "readinessProbe": { "httpGet": { "path": "/readyz", "port": "agent-metrics" }, "periodSeconds": 2 },
        // An agent that is started again takes over from the proxy: nobody notices. A proxy's end is noticed, so it has none.
        "livenessProbe": {
            "httpGet": { "path": "/livez", "port": "agent-metrics" },
            "initialDelaySeconds": 30,
            "failureThreshold": 6,
        },
        "resources": requests(source, Key::AgentCpu, Key::AgentMemory),
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "CHOWN"] },
            "seccompProfile": { "type": "RuntimeDefault" },
            // The runtimes' default profile forbids what entering a namespace needs.
            "appArmorProfile": { "type": "Unconfined" },
        },
        "volumeMounts": [
            mount("run", "/run/justmtls"),
            { "name": "netns", "mountPath": "/run/netns", "mountPropagation": "HostToContainer" },
            mount("cri", "/host/run-cri"),
            mount("cni-bin", "/host/cni/bin"),
            mount("cni-conf", "/host/cni/conf"),
            read_only("trust", "/var/run/justmtls/trust"),
            read_only("agent-token", "/var/run/secrets/justmtls"),
            read_only("api-token", "/var/run/secrets/kubernetes.io/serviceaccount"),
        ],
    })
}

fn proxy(source: Source<'_>) -> Value {
    json!({
        "name": "proxy",
        "image": source.plain(Key::Image),
        "imagePullPolicy": source.plain(Key::ImagePullPolicy),
        "args": [
            "supervise",
            "proxy",
            "--kubernetes",
            "--node=$(NODE_NAME)",
            "--control=$(JUSTMTLS_CONTROL_SERVICE_HOST)",
            "--bundle=/var/run/justmtls/trust/bundle.pem",
            "--token=/var/run/secrets/justmtls/token",
            "--agent-socket=/run/justmtls/proxy/agent.sock",
            "--agent-uid=0",
            format!("--admin={PROXY_ADMIN}"),
            format!("--metrics=[::]:{PROXY_METRICS_PORT}"),
            source.after("--drain=", Key::Drain),
            "--node-addresses=$(NODE_ADDRESSES)",
        ],
        "env": [field("NODE_NAME", "spec.nodeName"), field("NODE_ADDRESSES", "status.hostIPs")],
        "ports": [{ "name": "proxy-metrics", "containerPort": PROXY_METRICS_PORT, "protocol": "TCP" }],
        "readinessProbe": { "httpGet": { "path": "/readyz", "port": "proxy-metrics" }, "periodSeconds": 2 },
        "resources": requests(source, Key::ProxyCpu, Key::ProxyMemory),
        "securityContext": {
            "runAsUser": PROXY_USER,
            "runAsGroup": PROXY_USER,
            "runAsNonRoot": true,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "volumeMounts": [
            mount("proxy-socket", "/run/justmtls/proxy"),
            mount("own", "/run/justmtls/own"),
            read_only("trust", "/var/run/justmtls/trust"),
            read_only("proxy-token", "/var/run/secrets/justmtls"),
        ],
    })
}

fn volumes(source: Source<'_>) -> Value {
    json!([
        host_path("run", json!("/run/justmtls"), "DirectoryOrCreate"),
        host_path("proxy-socket", json!("/run/justmtls/proxy"), "DirectoryOrCreate"),
        { "name": "own", "emptyDir": { "medium": "Memory" } },
        host_path("netns", json!("/run/netns"), "DirectoryOrCreate"),
        // These three must be there: a folder that is made where the runtime does not look would capture nobody.
        host_path("cri", source.leaf(Expression::Folder(Key::CriSocket)), "Directory"),
        host_path("cni-bin", source.plain(Key::CniBinDir), "Directory"),
        host_path("cni-conf", source.plain(Key::CniConfDir), "Directory"),
        { "name": "trust", "configMap": { "name": TRUST_BUNDLE } },
        token("agent-token", "justmtls.dev/agent"),
        token("proxy-token", "justmtls.dev/proxy"),
        { "name": "api-token", "projected": { "sources": [
            { "serviceAccountToken": { "path": "token", "expirationSeconds": 3607 } },
            { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "fieldPath": "metadata.namespace" } }] } },
        ] } },
    ])
}

fn field(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } })
}

fn mount(name: &str, path: &str) -> Value {
    json!({ "name": name, "mountPath": path })
}

fn read_only(name: &str, path: &str) -> Value {
    json!({ "name": name, "mountPath": path, "readOnly": true })
}

fn host_path(name: &str, path: Value, kind: &str) -> Value {
    json!({ "name": name, "hostPath": { "path": path, "type": kind } })
}

/// A token of an hour, which kubelet renews.
fn token(name: &str, audience: &str) -> Value {
    json!({ "name": name, "projected": { "sources": [
        { "serviceAccountToken": { "audience": audience, "path": "token", "expirationSeconds": 3600 } },
    ] } })
}

fn requests(source: Source<'_>, cpu: Key, memory: Key) -> Value {
    json!({ "requests": { "cpu": source.plain(cpu), "memory": source.plain(memory) } })
}
