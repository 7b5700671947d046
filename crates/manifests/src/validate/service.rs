//! Services.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};

use crate::names::{LABEL, SUBDOMAIN};

use super::Checker;

pub(super) fn check(checker: &mut Checker<'_>, service: &Service) {
    match &service.spec {
        Some(spec) => checker.key("spec", |checker| check_spec(checker, spec)),
        None => checker.missing("spec", "write a spec with ports"),
    }
}

fn check_spec(checker: &mut Checker<'_>, spec: &ServiceSpec) {
    checker.word("type", spec.type_.as_deref(), &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let is_external_name = spec.type_.as_deref() == Some("ExternalName");
    let is_headless = spec.cluster_ip.as_deref() == Some("None");
    if is_external_name {
        let name = spec.external_name.as_deref().unwrap_or_default();
        // A trailing dot is allowed: the name is one of DNS.
        checker.name("externalName", name.strip_suffix('.').unwrap_or(name), &SUBDOMAIN);
    }
    if !is_headless {
        checker.address("clusterIP", spec.cluster_ip.as_deref());
        checker.addresses("clusterIPs", spec.cluster_ips.as_ref());
    }
    checker.addresses("externalIPs", spec.external_ips.as_ref());
    checker.labels("selector", spec.selector.as_ref());
    checker.word("sessionAffinity", spec.session_affinity.as_deref(), &["None", "ClientIP"]);
    let timeout = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    if let Some(timeout) = timeout.filter(|timeout| !(1..=86400).contains(timeout)) {
        checker.keys(&["sessionAffinityConfig", "clientIP", "timeoutSeconds"], |checker| {
            checker.error(format!("{timeout} s is not a time-out"), "use a number from 1 to 86400");
        });
    }
    checker.word("internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &["Cluster", "Local"]);
    checker.word("externalTrafficPolicy", spec.external_traffic_policy.as_deref(), &["Cluster", "Local"]);
    checker.word(
        "ipFamilyPolicy",
        spec.ip_family_policy.as_deref(),
        &["SingleStack", "PreferDualStack", "RequireDualStack"],
    );
    check_ports(checker, spec, is_headless || is_external_name);
}

fn check_ports(checker: &mut Checker<'_>, spec: &ServiceSpec, may_have_none: bool) {
    let ports = spec.ports.as_deref().unwrap_or_default();
    if ports.is_empty() && !may_have_none {
        checker.missing("ports", "write at least one port");
    }
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    checker.each("ports", ports, |checker, port: &ServicePort| {
        checker.port("port", port.port);
        checker.optional_port("nodePort", port.node_port);
        checker.protocol(port.protocol.as_deref());
        if let Some(target) = &port.target_port {
            checker.target_port("targetPort", target);
        }
        match port.name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => {
                checker.name("name", name, &LABEL);
                checker.unique("name", &mut names, name, name);
            }
            None if ports.len() > 1 => checker.missing("name", "name every port of a Service that has more than one"),
            None => {}
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        checker.unique("port", &mut numbers, (port.port, protocol), &format!("{protocol} port {}", port.port));
    });
}
