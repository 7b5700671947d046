//! From what the API server says to an object of the index's.
//!
//! Core kinds are read as they are: the API server has checked them. Istio's are read as files are, so that the same text means
//! the same from both sources, and what was written into them and cannot be understood has a name.

use kube::api::DynamicObject;
use manifests::istio::{Mtls, MtlsMode, PeerAuthentication, PeerAuthenticationSpec};
use manifests::{Kind, Object, ObjectKey, Severity};

use crate::kubernetes::status::Condition;
use crate::problem::Problem;

/// One object, as it was read.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) key: ObjectKey,
    /// `None`: it is there, and cannot be read.
    pub(super) object: Option<Object>,
    pub(super) problems: Vec<Problem>,
    /// What we told it about itself before.
    pub(super) condition: Option<Condition>,
}

/// A core kind.
pub(super) fn plain<K: Into<Object>>(object: K) -> Reading {
    let object = object.into();
    Reading { key: object.key(), object: Some(object), problems: Vec::new(), condition: None }
}

/// One of Istio's kinds.
pub(super) fn policy(kind: Kind, object: DynamicObject) -> Reading {
    let DynamicObject { metadata, data, .. } = object;
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
    Reading { object, problems, condition, key }
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
