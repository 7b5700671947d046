//! Istio's policies, by the rules of Istio's own validation. What is valid and cannot be enforced is not said here.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::istio::{
    Action, AuthorizationPolicy, Condition, Operation, PeerAuthentication, Source, TargetRef, WorkloadSelector,
};
use crate::problem::quoted;

use super::Checker;

pub(super) fn peer_authentication(checker: &mut Checker<'_>, policy: &PeerAuthentication) {
    let spec = &policy.spec;
    checker.key("spec", |checker| {
        selector(checker, spec.selector.as_ref());
        let selects_all = spec.selector.as_ref().is_none_or(|selector| selector.match_labels.is_empty());
        if selects_all && !spec.port_level_mtls.is_empty() {
            checker.key("portLevelMtls", |checker| {
                checker
                    .error("modes of ports need a selector", "add spec.selector.matchLabels, or remove portLevelMtls");
            });
        }
    });
}

pub(super) fn authorization_policy(checker: &mut Checker<'_>, policy: &AuthorizationPolicy) {
    let spec = &policy.spec;
    checker.key("spec", |checker| {
        selector(checker, spec.selector.as_ref());
        let has_targets = spec.target_ref.is_some() || !spec.target_refs.is_empty();
        if has_targets && spec.selector.is_some() {
            checker.key("selector", |checker| checker.error("stands beside targetRefs", "keep one of the two"));
        }
        if spec.target_ref.is_some() && !spec.target_refs.is_empty() {
            checker.key("targetRef", |checker| checker.error("stands beside targetRefs", "keep targetRefs"));
        }
        if let Some(target) = &spec.target_ref {
            checker.key("targetRef", |checker| target_ref(checker, target));
        }
        checker.each("targetRefs", &spec.target_refs, target_ref);
        match (spec.action, &spec.provider) {
            (Action::Custom, None) => checker.missing("provider", "name the authorizer that action CUSTOM asks"),
            (Action::Custom, Some(provider)) if provider.name.is_empty() => {
                checker.keys(&["provider"], |checker| {
                    checker.missing("name", "name the authorizer that action CUSTOM asks")
                });
            }
            (Action::Custom, Some(_)) | (_, None) => {}
            (_, Some(_)) => checker.key("provider", |checker| checker.error("is for action CUSTOM alone", "remove it")),
        }
        checker.each("rules", &spec.rules, |checker, rule| {
            checker.each("from", &rule.from, |checker, from| {
                checker.key("source", |checker| source(checker, &from.source))
            });
            checker.each("to", &rule.to, |checker, to| {
                checker.key("operation", |checker| operation(checker, &to.operation))
            });
            checker.each("when", &rule.when, condition);
        });
    });
}

fn selector(checker: &mut Checker<'_>, selector: Option<&WorkloadSelector>) {
    checker.key("selector", |checker| checker.labels("matchLabels", selector.map(|selector| &selector.match_labels)));
}

fn target_ref(checker: &mut Checker<'_>, target: &TargetRef) {
    for (key, value) in [("kind", &target.kind), ("name", &target.name)] {
        if value.is_empty() {
            checker.key(key, |checker| checker.error("is empty", "name the object that the policy speaks for"));
        }
    }
}

fn source(checker: &mut Checker<'_>, source: &Source) {
    if source.is_empty() {
        // Istio refuses it, too: it reads like "nobody" and would mean "anybody".
        checker.error("says nothing", "write who connects, or remove the item");
    }
    let texts = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
    ];
    texts.into_iter().for_each(|(key, list)| not_empty(checker, key, list));
    let ranges = [
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    ranges.into_iter().for_each(|(key, list)| blocks(checker, key, list));
    let names_accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let names_others = [&source.principals, &source.not_principals, &source.namespaces, &source.not_namespaces];
    if names_accounts && names_others.iter().any(|list| !list.is_empty()) {
        checker.error("serviceAccounts stand beside principals or namespaces", "keep one of the two");
    }
}

fn operation(checker: &mut Checker<'_>, operation: &Operation) {
    if operation.is_empty() {
        checker.error("says nothing", "write what is asked for, or remove the item");
    }
    ports(checker, "ports", &operation.ports);
    ports(checker, "notPorts", &operation.not_ports);
    let texts = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    texts.into_iter().for_each(|(key, list)| not_empty(checker, key, list));
}

fn condition(checker: &mut Checker<'_>, condition: &Condition) {
    if condition.values.is_empty() && condition.not_values.is_empty() {
        checker.error("has neither values nor notValues", "write at least one of them");
    }
    let lists = [("values", &condition.values), ("notValues", &condition.not_values)];
    match condition.key.as_str() {
        "source.ip" | "remote.ip" | "destination.ip" => {
            lists.into_iter().for_each(|(key, list)| blocks(checker, key, list))
        }
        "destination.port" => lists.into_iter().for_each(|(key, list)| ports(checker, key, list)),
        "source.namespace" | "source.principal" | "source.serviceAccount" | "connection.sni" => {
            lists.into_iter().for_each(|(key, list)| not_empty(checker, key, list));
        }
        key if ["request.", "experimental."].iter().any(|prefix| key.starts_with(prefix)) => {}
        key => {
            let message = format!(
                "{} is not an attribute",
                if key.is_empty() { "an empty text".to_owned() } else { quoted(key) }
            );
            let remedy = "use source.ip, source.namespace, source.principal, source.serviceAccount, remote.ip, destination.ip, \
                          destination.port, connection.sni or one that begins with request.";
            checker.key("key", |checker| checker.error(message, remedy));
        }
    }
}

fn not_empty(checker: &mut Checker<'_>, key: &str, list: &[String]) {
    checker.each(key, list, |checker, text| {
        if text.is_empty() {
            checker.error("is empty", "write what should match, or remove the item");
        }
    });
}

fn blocks(checker: &mut Checker<'_>, key: &str, blocks: &[String]) {
    checker.each(key, blocks, |checker, block| {
        if block.parse::<IpNet>().is_err() && block.parse::<IpAddr>().is_err() {
            let message = format!("{} is not an address or a range of addresses", quoted(block));
            checker.error(message, "write it as 10.0.0.1 or 10.0.0.0/24");
        }
    });
}

fn ports(checker: &mut Checker<'_>, key: &str, ports: &[String]) {
    checker.each(key, ports, |checker, port| {
        if !port.parse::<u16>().is_ok_and(|port| port != 0) {
            checker.error(format!("{} is not a port", quoted(port)), "use a number from 1 to 65535, in quotes");
        }
    });
}
