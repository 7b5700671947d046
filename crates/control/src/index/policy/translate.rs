//! Rules of an AuthorizationPolicy as conditions on a connection.

use std::net::IpAddr;

use ipnet::IpNet;
use manifests::istio::{
    Action as IstioAction, AuthorizationPolicySpec, Condition, Operation, Rule as IstioRule, Source,
};
use mesh::{Action, Clause, Match, Rule, ServiceAccountMatch, StringMatch};

use crate::problem::quoted;

/// What cannot be enforced on connections, as the first half of a sentence.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unsupported {
    #[error("action {0} has no meaning for connections")]
    Action(&'static str),
    #[error("field spec.targetRefs names what is not a workload")]
    TargetRefs,
    #[error("field {0} is about HTTP requests, which pass encrypted and unread")]
    Http(&'static str),
    #[error("condition {} is about HTTP requests or is not known", quoted(.0))]
    Key(String),
    #[error("a {0} in spec.rules is empty, and what it would match is not defined")]
    Empty(&'static str),
    #[error("{} is not {}", quoted(.text), .what)]
    Value { text: String, what: &'static str },
}

/// The policy's action and rules, exactly as they are meant; `None` where nobody is kept out by it, whatever its rules say.
pub(super) fn rules(
    spec: &AuthorizationPolicySpec,
    namespace: &str,
) -> Result<Option<(Action, Vec<Rule>)>, Unsupported> {
    let action = match spec.action {
        IstioAction::Allow => Action::Allow,
        IstioAction::Deny => Action::Deny,
        // It neither refuses, nor makes what no rule allows refused, as an ALLOW does: to pass it over weakens nothing.
        IstioAction::Audit => return Ok(None),
        IstioAction::Custom => return Err(Unsupported::Action("CUSTOM")),
    };
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        return Err(Unsupported::TargetRefs);
    }
    let rules = spec.rules.iter().map(|written| rule(written, namespace)).collect::<Result<_, _>>()?;
    Ok(Some((action, rules)))
}

/// Sources are alternatives, operations are alternatives, conditions must all hold.
fn rule(written: &IstioRule, namespace: &str) -> Result<Rule, Unsupported> {
    let mut clauses = Vec::new();
    if !written.from.is_empty() {
        let matches = written.from.iter().map(|from| source(&from.source, namespace)).collect::<Result<_, _>>()?;
        clauses.push(Clause { matches });
    }
    if !written.to.is_empty() {
        let matches = written.to.iter().map(|to| operation(&to.operation)).collect::<Result<_, _>>()?;
        clauses.push(Clause { matches });
    }
    for when in &written.when {
        clauses.push(Clause { matches: vec![condition(when, namespace)?] });
    }
    Ok(Rule { clauses })
}

fn source(source: &Source, namespace: &str) -> Result<Match, Unsupported> {
    let unread = [
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    if let Some((field, _)) = unread.iter().find(|(_, list)| !list.is_empty()) {
        return Err(Unsupported::Http(field));
    }
    if source.is_empty() {
        return Err(Unsupported::Empty("source"));
    }
    Ok(Match {
        principals: all(&source.principals, principal)?,
        not_principals: all(&source.not_principals, principal)?,
        service_accounts: all(&source.service_accounts, |text| service_account(text, namespace))?,
        not_service_accounts: all(&source.not_service_accounts, |text| service_account(text, namespace))?,
        namespaces: all(&source.namespaces, pattern)?,
        not_namespaces: all(&source.not_namespaces, pattern)?,
        source_ips: all(&source.ip_blocks, range)?,
        not_source_ips: all(&source.not_ip_blocks, range)?,
        ..Match::default()
    })
}

fn operation(operation: &Operation) -> Result<Match, Unsupported> {
    let unread = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    if let Some((field, _)) = unread.iter().find(|(_, list)| !list.is_empty()) {
        return Err(Unsupported::Http(field));
    }
    if operation.is_empty() {
        return Err(Unsupported::Empty("operation"));
    }
    Ok(Match {
        destination_ports: all(&operation.ports, port)?,
        not_destination_ports: all(&operation.not_ports, port)?,
        ..Match::default()
    })
}

fn condition(condition: &Condition, namespace: &str) -> Result<Match, Unsupported> {
    let (values, not_values) = (&condition.values, &condition.not_values);
    if values.is_empty() && not_values.is_empty() {
        return Err(Unsupported::Empty("condition"));
    }
    let mut condition_match = Match::default();
    match condition.key.as_str() {
        "source.ip" => {
            condition_match.source_ips = all(values, range)?;
            condition_match.not_source_ips = all(not_values, range)?;
        }
        "source.namespace" => {
            condition_match.namespaces = all(values, pattern)?;
            condition_match.not_namespaces = all(not_values, pattern)?;
        }
        "source.principal" => {
            condition_match.principals = all(values, principal)?;
            condition_match.not_principals = all(not_values, principal)?;
        }
        "source.serviceAccount" => {
            condition_match.service_accounts = all(values, |text| service_account(text, namespace))?;
            condition_match.not_service_accounts = all(not_values, |text| service_account(text, namespace))?;
        }
        "destination.ip" => {
            condition_match.destination_ips = all(values, range)?;
            condition_match.not_destination_ips = all(not_values, range)?;
        }
        "destination.port" => {
            condition_match.destination_ports = all(values, port)?;
            condition_match.not_destination_ports = all(not_values, port)?;
        }
        unknown => return Err(Unsupported::Key(unknown.to_owned())),
    }
    Ok(condition_match)
}

fn all<T>(texts: &[String], read: impl Fn(&str) -> Result<T, Unsupported>) -> Result<Vec<T>, Unsupported> {
    texts.iter().map(|text| read(text)).collect()
}

/// `*`, `*end`, `beginning*`, or the whole; a `*` elsewhere is a letter like any other.
fn pattern(text: &str) -> Result<StringMatch, Unsupported> {
    if text.is_empty() {
        return Err(Unsupported::Value { text: String::new(), what: "a name or a pattern" });
    }
    if text == "*" {
        return Ok(StringMatch::Presence);
    }
    if let Some(end) = text.strip_prefix('*') {
        return Ok(StringMatch::Suffix(end.to_owned()));
    }
    if let Some(beginning) = text.strip_suffix('*') {
        return Ok(StringMatch::Prefix(beginning.to_owned()));
    }
    Ok(StringMatch::Exact(text.to_owned()))
}

fn principal(text: &str) -> Result<StringMatch, Unsupported> {
    // Taken literally it would match nobody, and a DENY would let through whom it names.
    if text.starts_with("spiffe:") {
        let what = "a principal, which is written without spiffe:// (cluster.local/ns/shop/sa/web)";
        return Err(Unsupported::Value { text: text.to_owned(), what });
    }
    pattern(text)
}

/// `name` in the policy's own namespace, or `namespace/name`. There are no patterns for these.
fn service_account(text: &str, namespace: &str) -> Result<ServiceAccountMatch, Unsupported> {
    let (namespace, account) = text.split_once('/').unwrap_or((namespace, text));
    let is_name = |part: &str| !part.is_empty() && !part.contains(['/', '*']);
    if !is_name(namespace) || !is_name(account) {
        let what = "a service account, which is written name or namespace/name";
        return Err(Unsupported::Value { text: text.to_owned(), what });
    }
    Ok(ServiceAccountMatch { namespace: namespace.to_owned(), service_account: account.to_owned() })
}

fn range(text: &str) -> Result<IpNet, Unsupported> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse::<IpNet>().or_else(|_| address()).map_err(|_| {
        let what = "an IP address or a range such as 10.0.0.0/8";
        Unsupported::Value { text: text.to_owned(), what }
    })
}

fn port(text: &str) -> Result<u16, Unsupported> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| Unsupported::Value { text: text.to_owned(), what: "a port from 1 to 65535" })
}
