//! Pods, and what is expanded into Pods.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Container, ContainerPort, Pod, PodSpec, Probe};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::names::{LABEL, LABEL_KEY, PORT, SUBDOMAIN};
use crate::problem::quoted;
use crate::select::selects;

use super::Checker;

pub(super) fn pod(checker: &mut Checker<'_>, pod: &Pod) {
    match &pod.spec {
        Some(spec) => checker.key("spec", |checker| pod_spec(checker, spec)),
        None => checker.missing("spec", "write a spec with containers"),
    }
    let Some(status) = &pod.status else { return };
    checker.key("status", |checker| {
        checker.address("podIP", status.pod_ip.as_deref());
        checker.each("podIPs", status.pod_ips.iter().flatten(), |checker, address| {
            checker.address("ip", Some(&address.ip))
        });
        checker.address("hostIP", status.host_ip.as_deref());
    });
}

pub(super) fn deployment(checker: &mut Checker<'_>, deployment: &Deployment) {
    let Some(spec) = &deployment.spec else {
        return checker.missing("spec", "write a spec with a selector and a template");
    };
    checker.key("spec", |checker| {
        if let Some(replicas) = spec.replicas.filter(|replicas| *replicas < 0) {
            checker.key("replicas", |checker| {
                checker.error(format!("{replicas} is not a number of pods"), "use 0 or more")
            });
        }
        selector(checker, &spec.selector);
        let labels = spec.template.metadata.as_ref().and_then(|metadata| metadata.labels.clone()).unwrap_or_default();
        let is_empty = spec.selector.match_labels.as_ref().is_none_or(|labels| labels.is_empty())
            && spec.selector.match_expressions.as_ref().is_none_or(|expressions| expressions.is_empty());
        checker.key("selector", |checker| {
            if is_empty {
                checker.error("selects no pods of its own", "write matchLabels that are the labels of spec.template");
            } else if !selects(&spec.selector, &labels) {
                checker
                    .error("does not select the pods of spec.template", "use labels of spec.template.metadata.labels");
            }
        });
        checker.key("template", |checker| {
            checker.key("metadata", |checker| checker.labels("labels", Some(&labels)));
            match &spec.template.spec {
                Some(spec) => checker.key("spec", |checker| {
                    pod_spec(checker, spec);
                    checker.word("restartPolicy", spec.restart_policy.as_deref(), &["Always"]);
                }),
                None => checker.missing("spec", "write a spec with containers"),
            }
        });
    });
}

/// No image is ever read, so that a container without a command has nothing to run.
pub(super) fn for_box(checker: &mut Checker<'_>, spec: Option<&PodSpec>) {
    let Some(spec) = spec else { return };
    let mut check = |key: &str, containers: &[Container]| {
        checker.each(key, containers, |checker, container| {
            if container.command.as_ref().is_none_or(|command| command.is_empty()) {
                checker.missing("command", "write the program to run; images are not read here");
            }
        });
    };
    check("containers", &spec.containers);
    check("initContainers", spec.init_containers.as_deref().unwrap_or_default());
}

fn pod_spec(checker: &mut Checker<'_>, spec: &PodSpec) {
    checker.optional_name("nodeName", spec.node_name.as_deref(), &SUBDOMAIN);
    checker.optional_name("serviceAccountName", spec.service_account_name.as_deref(), &SUBDOMAIN);
    checker.optional_name("hostname", spec.hostname.as_deref(), &LABEL);
    checker.optional_name("subdomain", spec.subdomain.as_deref(), &LABEL);
    checker.word("restartPolicy", spec.restart_policy.as_deref(), &["Always", "OnFailure", "Never"]);
    if let Some(security) = &spec.security_context {
        checker.key("securityContext", |checker| {
            checker.id("runAsUser", security.run_as_user);
            checker.id("runAsGroup", security.run_as_group);
            checker.id("fsGroup", security.fs_group);
        });
    }
    if spec.containers.is_empty() {
        checker.missing("containers", "write at least one container");
    }
    let mut names = BTreeSet::new();
    checker.each("containers", &spec.containers, |checker, one| container(checker, one, &mut names));
    checker.each("initContainers", spec.init_containers.iter().flatten(), |checker, one| {
        container(checker, one, &mut names)
    });
}

fn container<'c>(checker: &mut Checker<'_>, container: &'c Container, names: &mut BTreeSet<&'c str>) {
    checker.name("name", &container.name, &LABEL);
    checker.unique("name", names, &container.name, &container.name);
    if let Some(security) = &container.security_context {
        checker.key("securityContext", |checker| {
            checker.id("runAsUser", security.run_as_user);
            checker.id("runAsGroup", security.run_as_group);
        });
    }
    let mut ports = BTreeSet::new();
    checker.each("ports", container.ports.iter().flatten(), |checker, port| container_port(checker, port, &mut ports));
    for (key, one) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        if let Some(one) = one {
            checker.key(key, |checker| probe(checker, one));
        }
    }
}

fn container_port<'c>(checker: &mut Checker<'_>, port: &'c ContainerPort, names: &mut BTreeSet<&'c str>) {
    checker.port("containerPort", port.container_port);
    checker.optional_port("hostPort", port.host_port);
    checker.protocol(port.protocol.as_deref());
    if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
        checker.name("name", name, &PORT);
        checker.unique("name", names, name, name);
    }
}

fn probe(checker: &mut Checker<'_>, probe: &Probe) {
    if let Some(http) = &probe.http_get {
        checker.key("httpGet", |checker| checker.target_port("port", &http.port));
    }
    if let Some(tcp) = &probe.tcp_socket {
        checker.key("tcpSocket", |checker| checker.target_port("port", &tcp.port));
    }
    if let Some(grpc) = &probe.grpc {
        checker.key("grpc", |checker| checker.port("port", grpc.port));
    }
}

fn selector(checker: &mut Checker<'_>, selector: &LabelSelector) {
    checker.key("selector", |checker| {
        checker.labels("matchLabels", selector.match_labels.as_ref());
        checker.each("matchExpressions", selector.match_expressions.iter().flatten(), |checker, expression| {
            checker.name("key", &expression.key, &LABEL_KEY);
            let has_values = expression.values.as_ref().is_some_and(|values| !values.is_empty());
            let message = match expression.operator.as_str() {
                "In" | "NotIn" if !has_values => "needs values",
                "Exists" | "DoesNotExist" if has_values => "takes no values",
                "In" | "NotIn" | "Exists" | "DoesNotExist" => return,
                _ => "is not an operator",
            };
            checker.key("operator", |checker| {
                let message = format!("{} {message}", quoted(&expression.operator));
                checker.error(message, "use In or NotIn with values, Exists or DoesNotExist without");
            });
        });
    });
}
