//! Istio's two policies, as data.
//!
//! All fields of `security.istio.io/v1` are here, also those about HTTP: who enforces only a part of them must be able to see
//! what it leaves out. A field that is not here is an error, never ignored: an ignored condition would widen a policy.
//! <https://istio.io/latest/docs/reference/config/security/>

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, Serialize};

/// Which mode the ports of workloads are in.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthentication {
    /// Name and namespace. In the mesh's root namespace and without a selector it speaks for the whole mesh.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: PeerAuthenticationSpec,
    /// What controllers wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<serde_json::Value>,
}

/// What a [`PeerAuthentication`] says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthenticationSpec {
    /// The pods it speaks for; none or an empty one means all of the namespace (or the mesh).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// The mode of all ports that `port_level_mtls` does not name. None is the same as [`MtlsMode::Unset`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// Modes of single ports, by the port of the workload (not of a Service). Needs a selector.
    #[serde(default, deserialize_with = "ports", skip_serializing_if = "BTreeMap::is_empty")]
    pub port_level_mtls: BTreeMap<u16, Mtls>,
}

/// Pods by their labels.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadSelector {
    /// Every one must be a label of the pod.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
}

/// Settings of mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mtls {
    /// Whether plaintext is taken.
    #[serde(default, deserialize_with = "or_default")]
    pub mode: MtlsMode,
}

/// Whether a workload takes plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// As the policy of the next wider scope says.
    #[default]
    Unset,
    /// No mutual TLS.
    Disable,
    /// Mutual TLS or plaintext.
    Permissive,
    /// Mutual TLS alone.
    Strict,
}

/// Who may connect.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicy {
    /// Name and namespace. In the mesh's root namespace it speaks for the whole mesh.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: AuthorizationPolicySpec,
    /// What controllers wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<serde_json::Value>,
}

/// What an [`AuthorizationPolicy`] says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// The pods it speaks for; none or an empty one means all of the namespace (or the mesh).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// The one Service, Gateway or the like it speaks for (the older spelling of a single `target_refs`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<TargetRef>,
    /// The Services, Gateways and the like it speaks for.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub target_refs: Vec<TargetRef>,
    /// What becomes of a connection that matches a rule.
    #[serde(default, deserialize_with = "or_default")]
    pub action: Action,
    /// Whom a [`Action::Custom`] asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// A connection matches if it matches any of them. With none, nothing matches: an ALLOW policy without rules refuses all.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// An object that a policy speaks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// The API group; empty for Services.
    #[serde(default, deserialize_with = "or_default")]
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The name.
    pub name: String,
    /// The namespace; none means the policy's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// What becomes of a connection that matches a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// It is let through; and what matches no ALLOW policy of a workload that has one is refused.
    #[default]
    Allow,
    /// It is refused.
    Deny,
    /// It is logged.
    Audit,
    /// An external authorizer decides.
    Custom,
}

/// An external authorizer of the mesh's settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Provider {
    /// Its name.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
}

/// A rule matches a connection if each list that is not empty has a member that matches, and all conditions hold. A rule
/// with nothing in it matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Who connects.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<From>,
    /// What is asked for.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<To>,
    /// Further conditions.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<Condition>,
}

/// One member of [`Rule::from`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct From {
    /// Who connects.
    pub source: Source,
}

/// One member of [`Rule::to`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct To {
    /// What is asked for.
    pub operation: Operation,
}

macro_rules! lists {
    ($(#[$doc:meta])+ $name:ident { $(#[doc = $field_doc:literal] $field:ident,)+ }) => {
        $(#[$doc])+
        #[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            $(#[doc = $field_doc]
            #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
            pub $field: Vec<String>,)+
        }

        impl $name {
            /// Whether it says nothing at all.
            pub fn is_empty(&self) -> bool {
                [$(&self.$field,)+].iter().all(|list| list.is_empty())
            }
        }
    };
}

lists! {
    /// Who connects. Each list that is not empty must hold; strings match whole, or by a leading or trailing `*`.
    Source {
        /// Identities without `spiffe://`: `cluster.local/ns/shop/sa/web`.
        principals,
        /// Identities that do not match.
        not_principals,
        /// Service accounts, `name` or `namespace/name`.
        service_accounts,
        /// Service accounts that do not match.
        not_service_accounts,
        /// Identities of HTTP requests (JWT).
        request_principals,
        /// Identities of HTTP requests that do not match.
        not_request_principals,
        /// Namespaces of the identity.
        namespaces,
        /// Namespaces of the identity that do not match.
        not_namespaces,
        /// Source addresses or CIDRs of the packets.
        ip_blocks,
        /// Source addresses or CIDRs of the packets that do not match.
        not_ip_blocks,
        /// Source addresses as HTTP proxies pass them on.
        remote_ip_blocks,
        /// Source addresses as HTTP proxies pass them on, that do not match.
        not_remote_ip_blocks,
    }
}

lists! {
    /// What is asked for. Each list that is not empty must hold.
    Operation {
        /// Hosts of HTTP requests.
        hosts,
        /// Hosts of HTTP requests that do not match.
        not_hosts,
        /// Destination ports, as text.
        ports,
        /// Destination ports that do not match, as text.
        not_ports,
        /// Methods of HTTP requests.
        methods,
        /// Methods of HTTP requests that do not match.
        not_methods,
        /// Paths of HTTP requests.
        paths,
        /// Paths of HTTP requests that do not match.
        not_paths,
    }
}

/// A condition on an attribute of a connection or request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Condition {
    /// The attribute, such as `source.ip` or `request.headers[x-user]`.
    pub key: String,
    /// One of them must match, if there are any.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// None of them may match.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub not_values: Vec<String>,
}

/// A field that is written as `null` is one that is not written, as in protobuf's JSON.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u16, Mtls>, D::Error> {
    let written: BTreeMap<String, Mtls> = or_default(deserializer)?;
    let mut ports = BTreeMap::new();
    for (text, mtls) in written {
        let port = text.parse().ok().filter(|port| *port != 0);
        let port: u16 = port.ok_or_else(|| serde::de::Error::custom(NotAPort(&text)))?;
        if ports.insert(port, mtls).is_some() {
            return Err(serde::de::Error::custom(format_args!("port {port} is there twice; remove one of the two")));
        }
    }
    Ok(ports)
}

struct NotAPort<'a>(&'a str);

impl fmt::Display for NotAPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not a port; use a number from 1 to 65535", crate::problem::quoted(self.0))
    }
}
