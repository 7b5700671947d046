//! From what the API server says to an object of the index's.
//!
//! Core kinds are read as they are: the API server has checked them. Istio's are read as files are, so that the same text means
//! the same from both sources, and what was written into them and cannot be understood has a name.

use kube::api::DynamicObject;
use manifests::istio::{Mtls, MtlsMode, PeerAuthentication, PeerAuthenticationSpec};
use manifests::{Kind, Object, ObjectKey, Severity};
use serde::de::DeserializeOwned;

use crate::kubernetes::status::Condition;
use crate::problem::Problem;

/// Reads an object of one kind from JSON.
pub(super) type Read = fn(&str) -> serde_json::Result<Reading>;

/// One object, as it was read.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) key: ObjectKey,
    /// The version of the list in which it is so.
    pub(super) version: Option<String>,
    /// `None`: it is there, and cannot be read.
    pub(super) object: Option<Object>,
    pub(super) problems: Vec<Problem>,
    /// What we told it about itself before.
    pub(super) condition: Option<Condition>,
}

/// A core kind.
pub(super) fn plain<K: DeserializeOwned + Into<Object>>(json: &str) -> serde_json::Result<Reading> {
    let object: Object = serde_json::from_str::<K>(json)?.into();
    let version = object.metadata().resource_version.clone();
    Ok(Reading { key: object.key(), version, object: Some(object), problems: Vec::new(), condition: None })
}

/// One of Istio's kinds.
pub(super) fn policy(kind: Kind, json: &str) -> serde_json::Result<Reading> {
    let DynamicObject { metadata, data, .. } = serde_json::from_str(json)?;
    let version = metadata.resource_version.clone();
    let key =
        ObjectKey { kind, namespace: metadata.namespace.clone(), name: metadata.name.clone().unwrap_or_default() };
    let condition = Condition::in_status(&data["status"]);
    let mut parsed = manifests::parse_policy(&key.to_string(), kind, metadata, &data["spec"]);
    let object = parsed.objects.pop().map(|(object, _)| object);
    let problem = |problem: &manifests::Problem| match problem.severity {
        Severity::Error => Problem::error(&key, problem.finding()),
        Severity::Warning => Problem::warning(&key, problem.finding()),
    };
    let problems = parsed.problems.iter().map(problem).collect();
    Ok(Reading { key, version, object, problems, condition })
}

/// What stands in for an object that cannot be read and of which no earlier state is known. (The index makes one for an
/// AuthorizationPolicy.) A PeerAuthentication may say STRICT, and to take it for less would open what it closes: it is taken
/// as STRICT for its namespace, and for no other.
pub(super) fn stand_in(key: &ObjectKey) -> Option<Object> {
    if key.kind != Kind::PeerAuthentication {
        return None;
    }
    let mut policy = PeerAuthentication::default();
    policy.metadata.name = Some(key.name.clone());
    policy.metadata.namespace = key.namespace.clone();
    policy.spec = PeerAuthenticationSpec { mtls: Some(Mtls { mode: MtlsMode::Strict }), ..Default::default() };
    Some(policy.into())
}
