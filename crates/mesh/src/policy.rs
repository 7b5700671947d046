//! Authorization policies at layer 4, in the shape of `istio.security.Authorization`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use identity::SpiffeId;
use ipnet::IpNet;

/// The name of a policy on the stream: `namespace/name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyName {
    /// Namespace of the policy.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whom a policy applies to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Every workload of the mesh.
    Mesh,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that name it.
    Selected,
}

/// What a matching policy does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Lets the connection through, and what no such policy lets through is refused.
    Allow,
    /// Refuses the connection.
    Deny,
}

/// One policy. It matches where one of its rules does; one without rules never matches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Its name.
    pub name: PolicyName,
    /// Whom it applies to.
    pub scope: Scope,
    /// What it does.
    pub action: Action,
    /// Alternatives.
    pub rules: Vec<Rule>,
}

/// Matches where all clauses do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    /// Conditions that must all hold.
    pub clauses: Vec<Clause>,
}

/// Matches where one of its matches does; an empty one always does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Clause {
    /// Alternatives.
    pub matches: Vec<Match>,
}

/// Conditions on one connection. A positive list that is empty asks for nothing; in one that is not, one entry
/// must hold. No entry of a negative list may hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Match {
    /// The client's namespace, from its certificate.
    pub namespaces: Vec<StringMatch>,
    /// Negative of `namespaces`.
    pub not_namespaces: Vec<StringMatch>,
    /// The client's service account, from its certificate.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Negative of `service_accounts`.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The client's SPIFFE ID without its scheme.
    pub principals: Vec<StringMatch>,
    /// Negative of `principals`.
    pub not_principals: Vec<StringMatch>,
    /// The client's address.
    pub source_ips: Vec<IpNet>,
    /// Negative of `source_ips`.
    pub not_source_ips: Vec<IpNet>,
    /// The address that was dialled.
    pub destination_ips: Vec<IpNet>,
    /// Negative of `destination_ips`.
    pub not_destination_ips: Vec<IpNet>,
    /// The port that was dialled.
    pub destination_ports: Vec<u16>,
    /// Negative of `destination_ports`.
    pub not_destination_ports: Vec<u16>,
}

/// A pattern for a string.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StringMatch {
    /// The whole string.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// Its end.
    Suffix(String),
    /// Any string that is not empty.
    Presence,
}

/// A service account in a namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub service_account: String,
}

/// What a policy may look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) principal: Option<&'a SpiffeId>,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) port: u16,
}

impl Policy {
    pub(crate) fn matches(&self, subject: Subject<'_>) -> bool {
        self.rules.iter().any(|rule| rule.clauses.iter().all(|clause| clause.matches(subject)))
    }
}

impl Clause {
    fn matches(&self, subject: Subject<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|m| m.matches(subject))
    }
}

impl Match {
    fn matches(&self, subject: Subject<'_>) -> bool {
        // A client without a certificate has the empty string for every name, and no pattern holds on that: a rule
        // that asks for somebody never matches it, and one that asks for "anybody but somebody" does, as in Istio.
        let namespace = subject.principal.map_or("", SpiffeId::namespace);
        let account = subject.principal.map_or("", SpiffeId::service_account);
        let principal = subject.principal.map(|id| id.to_string()).unwrap_or_default();
        let principal = principal.strip_prefix("spiffe://").unwrap_or_default();
        let is_account = |m: &ServiceAccountMatch| m.namespace == namespace && m.service_account == account;
        both(&self.namespaces, &self.not_namespaces, |m| m.matches(namespace))
            && both(&self.service_accounts, &self.not_service_accounts, is_account)
            && both(&self.principals, &self.not_principals, |m| m.matches(principal))
            && both(&self.source_ips, &self.not_source_ips, |net| net.contains(&subject.source))
            && both(&self.destination_ips, &self.not_destination_ips, |net| net.contains(&subject.destination))
            && both(&self.destination_ports, &self.not_destination_ports, |port| *port == subject.port)
    }
}

fn both<T>(positive: &[T], negative: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&holds)) && !negative.iter().any(&holds)
}

impl StringMatch {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(pattern) => !text.is_empty() && text == pattern,
            Self::Prefix(pattern) => !text.is_empty() && text.starts_with(pattern.as_str()),
            Self::Suffix(pattern) => !text.is_empty() && text.ends_with(pattern.as_str()),
            Self::Presence => !text.is_empty(),
        }
    }
}
