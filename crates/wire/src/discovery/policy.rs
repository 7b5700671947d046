//! Policies, as `istio.security.Authorization`.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
use prost::Message;

use super::{Fault, Resource, policy_name};
use crate::proto::istio::security as istio;

pub(super) fn encode(policy: &Policy) -> Vec<u8> {
    let message = istio::Authorization {
        name: policy.name.name.to_string(),
        namespace: policy.name.namespace.to_string(),
        scope: match policy.scope {
            Scope::Mesh => istio::Scope::Global,
            Scope::Namespace => istio::Scope::Namespace,
            Scope::Selected => istio::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            Action::Allow => istio::Action::Allow,
            Action::Deny => istio::Action::Deny,
        }
        .into(),
        rules: policy
            .rules
            .iter()
            .map(|rule| istio::Rule { clauses: rule.clauses.iter().map(encode_clause).collect() })
            .collect(),
    };
    message.encode_to_vec()
}

fn encode_clause(clause: &Clause) -> istio::Clause {
    istio::Clause { matches: clause.matches.iter().map(encode_match).collect() }
}

fn encode_match(from: &Match) -> istio::Match {
    let strings = |list: &[StringMatch]| list.iter().map(encode_string).collect();
    let accounts = |list: &[ServiceAccountMatch]| {
        let account = |from: &ServiceAccountMatch| istio::ServiceAccountMatch {
            namespace: from.namespace.clone(),
            service_account: from.service_account.clone(),
        };
        list.iter().map(account).collect()
    };
    let ranges = |list: &[IpNet]| {
        let range =
            |net: &IpNet| istio::Address { address: crate::octets(net.addr()), length: net.prefix_len().into() };
        list.iter().map(range).collect()
    };
    let ports = |list: &[u16]| list.iter().map(|port| u32::from(*port)).collect();
    istio::Match {
        namespaces: strings(&from.namespaces),
        not_namespaces: strings(&from.not_namespaces),
        principals: strings(&from.principals),
        not_principals: strings(&from.not_principals),
        source_ips: ranges(&from.source_ips),
        not_source_ips: ranges(&from.not_source_ips),
        destination_ips: ranges(&from.destination_ips),
        not_destination_ips: ranges(&from.not_destination_ips),
        destination_ports: ports(&from.destination_ports),
        not_destination_ports: ports(&from.not_destination_ports),
        service_accounts: accounts(&from.service_accounts),
        not_service_accounts: accounts(&from.not_service_accounts),
    }
}

fn encode_string(from: &StringMatch) -> istio::StringMatch {
    use istio::string_match::MatchType;
    let kind = match from {
        StringMatch::Exact(text) => MatchType::Exact(text.clone()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.clone()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.clone()),
        StringMatch::Presence => MatchType::Presence(()),
    };
    istio::StringMatch { match_type: Some(kind) }
}

/// A policy is understood wholly or refused: one whose conditions were passed over would say something else.
pub(super) fn decode(content: &[u8]) -> Result<Resource, Fault> {
    let message = istio::Authorization::decode(content).map_err(|_| Fault::Encoding)?;
    let scope = match istio::Scope::try_from(message.scope) {
        Ok(istio::Scope::Global) => Scope::Mesh,
        Ok(istio::Scope::Namespace) => Scope::Namespace,
        Ok(istio::Scope::WorkloadSelector) => Scope::Selected,
        Err(_) => return Err(Fault::UnknownValue { field: "scope" }),
    };
    let action = match istio::Action::try_from(message.action) {
        Ok(istio::Action::Allow) => Action::Allow,
        Ok(istio::Action::Deny) => Action::Deny,
        Err(_) => return Err(Fault::UnknownValue { field: "action" }),
    };
    Ok(Resource::Mesh(mesh::Resource::Policy(Policy {
        name: policy_name(&format!("{}/{}", message.namespace, message.name), "name")?,
        scope,
        action,
        rules: each(&message.rules, |rule| Ok(Rule { clauses: each(&rule.clauses, decode_clause)? }))?,
    })))
}

fn each<A, B>(list: &[A], decode: impl Fn(&A) -> Result<B, Fault>) -> Result<Vec<B>, Fault> {
    list.iter().map(decode).collect()
}

fn decode_clause(clause: &istio::Clause) -> Result<Clause, Fault> {
    Ok(Clause { matches: each(&clause.matches, decode_match)? })
}

fn decode_match(from: &istio::Match) -> Result<Match, Fault> {
    let account = |from: &istio::ServiceAccountMatch| {
        if from.namespace.is_empty() || from.service_account.is_empty() {
            return Err(Fault::Name { field: "service_accounts" });
        }
        Ok(ServiceAccountMatch { namespace: from.namespace.clone(), service_account: from.service_account.clone() })
    };
    let port = |port: &u32| u16::try_from(*port).map_err(|_| Fault::Port { field: "destination_ports" });
    Ok(Match {
        namespaces: each(&from.namespaces, decode_string)?,
        not_namespaces: each(&from.not_namespaces, decode_string)?,
        service_accounts: each(&from.service_accounts, account)?,
        not_service_accounts: each(&from.not_service_accounts, account)?,
        principals: each(&from.principals, decode_string)?,
        not_principals: each(&from.not_principals, decode_string)?,
        source_ips: each(&from.source_ips, |range| decode_range(range, "source_ips"))?,
        not_source_ips: each(&from.not_source_ips, |range| decode_range(range, "not_source_ips"))?,
        destination_ips: each(&from.destination_ips, |range| decode_range(range, "destination_ips"))?,
        not_destination_ips: each(&from.not_destination_ips, |range| decode_range(range, "not_destination_ips"))?,
        destination_ports: each(&from.destination_ports, port)?,
        not_destination_ports: each(&from.not_destination_ports, port)?,
    })
}

fn decode_string(from: &istio::StringMatch) -> Result<StringMatch, Fault> {
    use istio::string_match::MatchType;
    Ok(match from.match_type.as_ref().ok_or(Fault::UnknownValue { field: "match_type" })? {
        MatchType::Exact(text) => StringMatch::Exact(text.clone()),
        MatchType::Prefix(text) => StringMatch::Prefix(text.clone()),
        MatchType::Suffix(text) => StringMatch::Suffix(text.clone()),
        MatchType::Presence(()) => StringMatch::Presence,
    })
}

fn decode_range(from: &istio::Address, field: &'static str) -> Result<IpNet, Fault> {
    let address: IpAddr = crate::address(&from.address).ok_or(Fault::Address { field })?;
    let length = u8::try_from(from.length).map_err(|_| Fault::Address { field })?;
    IpNet::new(address, length).map_err(|_| Fault::Address { field })
}
