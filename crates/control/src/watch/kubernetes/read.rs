//! From what the API server says to an object of the index's.
//!
//! Core kinds are read as they are: the API server has checked them. Istio's are read as files are, so that the same text means
//! the same from both sources, and what was written into them and cannot be understood has a name.

use std::collections::BTreeMap;

use kube::api::{DynamicObject, ObjectMeta};
use manifests::istio::{Mtls, MtlsMode, PeerAuthentication, PeerAuthenticationSpec};
use manifests::{Kind, Object, ObjectKey, Severity};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::ROOT_NAMESPACE;
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
    /// What then stands in for it, where no earlier state is known, and what that does.
    pub(super) stand_in: Option<(Object, Problem)>,
    /// The labels of the pods that an object that cannot be read is about, none if that may be anybody; `None`: nothing depends on
    /// what it says.
    pub(super) concerns: Option<BTreeMap<String, String>>,
    pub(super) problems: Vec<Problem>,
    /// What we told it about itself before.
    pub(super) condition: Option<Condition>,
}

/// A core kind.
pub(super) fn plain<K: DeserializeOwned + Into<Object>>(json: &str) -> serde_json::Result<Reading> {
    let object: Object = serde_json::from_str::<K>(json)?.into();
    let version = object.metadata().resource_version.clone();
    let key = object.key();
    let (stand_in, concerns, problems, condition) = (None, None, Vec::new(), None);
    Ok(Reading { key, version, object: Some(object), stand_in, concerns, problems, condition })
}

/// One of Istio's kinds.
pub(super) fn policy(kind: Kind, json: &str) -> serde_json::Result<Reading> {
    let DynamicObject { metadata, data, .. } = serde_json::from_str(json)?;
    let version = metadata.resource_version.clone();
    let key =
        ObjectKey { kind, namespace: metadata.namespace.clone(), name: metadata.name.clone().unwrap_or_default() };
    let condition = Condition::in_status(&data["status"]);
    let mut parsed = manifests::parse_policy(&key.to_string(), kind, metadata.clone(), &data["spec"]);
    let object = parsed.objects.pop().map(|(object, _)| object);
    let stand_in = (kind == Kind::PeerAuthentication && object.is_none()).then(|| {
        let stand_in = stand_in(&metadata, &data["spec"]);
        let problem = Problem::error(&key, closes(&stand_in));
        (stand_in.into(), problem)
    });
    let concerns = match kind {
        Kind::AuthorizationPolicy if object.is_none() => concerns(metadata, &data["spec"]),
        _ => Some(BTreeMap::new()),
    };
    let problem = |problem: &manifests::Problem| match problem.severity {
        Severity::Error => Problem::error(&key, problem.finding()),
        Severity::Warning => Problem::warning(&key, problem.finding()),
    };
    let problems = parsed.problems.iter().map(problem).collect();
    Ok(Reading { key, version, object, stand_in, concerns, problems, condition })
}

/// Whom an AuthorizationPolicy may keep out of something if what it says of connections cannot be read: what is left without that
/// says whom it selects, and one bad address must not close the pods beside them. A field that is not known may select, too, so
/// that nothing of the rest may be left out. Who only audits keeps nobody out.
fn concerns(metadata: ObjectMeta, spec: &Value) -> Option<BTreeMap<String, String>> {
    if spec["action"] == "AUDIT" {
        return None;
    }
    let mut whom = spec.clone();
    if let Some(fields) = whom.as_object_mut() {
        fields.retain(|field, _| !["action", "provider", "rules"].contains(&field.as_str()));
    }
    let parsed = manifests::parse_policy("", Kind::AuthorizationPolicy, metadata, &whom);
    let selector = parsed.objects.into_iter().find_map(|(object, _)| match object {
        Object::AuthorizationPolicy(policy) => policy.spec.selector,
        _ => None,
    });
    Some(selector.map(|selector| selector.match_labels).unwrap_or_default())
}

/// What stands in for a PeerAuthentication that cannot be read and of which no earlier state is known. (The index makes what stands
/// in for an AuthorizationPolicy.) It may say STRICT, and to take it for less would open what it closes: it is taken as STRICT for
/// the pods that it selects, or, where its selector cannot be read either or a field is not known, for its namespace (the root
/// namespace: for the mesh).
///
/// Beside others it has its own age, as the oldest is the one that counts whatever it says; but one whose selector cannot be read,
/// which would count for some pods before any other, comes before all.
fn stand_in(metadata: &ObjectMeta, spec: &Value) -> PeerAuthentication {
    let mut whom = spec.clone();
    if let Some(fields) = whom.as_object_mut() {
        fields.remove("portLevelMtls");
        fields.insert("mtls".to_owned(), json!({ "mode": "STRICT" }));
    }
    let parsed = manifests::parse_policy("", Kind::PeerAuthentication, metadata.clone(), &whom);
    if let Some((Object::PeerAuthentication(policy), _)) = parsed.objects.into_iter().next() {
        return *policy;
    }
    let created = metadata.creation_timestamp.clone().filter(|_| spec["selector"].is_null());
    let metadata = ObjectMeta {
        name: metadata.name.clone(),
        namespace: metadata.namespace.clone(),
        creation_timestamp: created,
        ..Default::default()
    };
    let spec = PeerAuthenticationSpec { mtls: Some(Mtls { mode: MtlsMode::Strict }), ..Default::default() };
    PeerAuthentication { metadata, spec, ..Default::default() }
}

/// What is to be said of a PeerAuthentication for which this one stands in.
fn closes(policy: &PeerAuthentication) -> String {
    let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
    let selects = policy.spec.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
    let whom = match (selects, namespace == ROOT_NAMESPACE) {
        // That it selects nothing is said besides.
        (true, true) => {
            return "cannot be read, and no earlier state of it is known: correct it or remove it".to_owned();
        }
        (true, false) => "the pods that it selects".to_owned(),
        (false, true) => "every pod of the mesh".to_owned(),
        (false, false) => format!("the pods of namespace {namespace}"),
    };
    format!(
        "cannot be read, and no earlier state of it is known; it is taken as STRICT for {whom}, because it may be meant \
         to be: correct it or remove it"
    )
}
