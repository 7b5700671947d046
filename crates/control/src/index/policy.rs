//! Istio's AuthorizationPolicy at layer 4: translated exactly, or refusing (D13).
//!
//! A policy of which a part cannot be enforced here is not weakened to the rest of it: it becomes a DENY of everything
//! that it selects, and a problem says why. One that only audits would keep nobody out, and has no effect.
//! <https://istio.io/latest/docs/reference/config/security/authorization-policy/>

mod translate;

use std::collections::BTreeMap;

use manifests::Kind;
use manifests::istio::AuthorizationPolicy as Object;
use mesh::{Action, Policy, PolicyName, Rule, Scope};

use super::facts::Name;
use super::root;
use crate::ROOT_NAMESPACE;
use crate::problem::Problem;

/// The annotation by which Istio's own planes only log what a policy would do.
const DRY_RUN: &str = "istio.io/dry-run";

/// A policy as it is published, and whom it selects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct AuthorizationPolicy {
    pub(crate) policy: Policy,
    /// Labels that a pod must have; empty: all of the scope.
    selector: BTreeMap<String, String>,
    /// It is in the place of one that cannot be read.
    pub(crate) stands_in: bool,
}

/// The name on the stream of a policy.
pub(crate) fn policy_name(name: &Name) -> PolicyName {
    PolicyName { namespace: name.namespace.as_str().into(), name: name.name.as_str().into() }
}

/// Why a policy cannot be enforced as it is, so that everything that it selects refuses, if so (T35).
pub fn unenforceable(object: &Object) -> Option<String> {
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    translate::rules(&object.spec, namespace).err().map(|unsupported| unsupported.to_string())
}

impl AuthorizationPolicy {
    /// `None`: it has no effect on who may connect.
    pub(crate) fn read(object: &Object, problems: &mut Vec<Problem>) -> Option<Self> {
        let name = Name::of_metadata(&object.metadata);
        let subject = name.as_kind(Kind::AuthorizationPolicy);
        let spec = &object.spec;
        let selector = spec.selector.as_ref().map(|selector| selector.match_labels.clone()).unwrap_or_default();
        let (action, rules) = match translate::rules(spec, &name.namespace) {
            Ok(Some(translated)) => translated,
            Ok(None) => {
                let message = "action AUDIT has no effect here: nothing is audited, and who may connect is decided \
                               without it; look at the access log instead, and remove the policy";
                problems.push(Problem::warning(&subject, message));
                return None;
            }
            Err(unsupported) => {
                let message = format!(
                    "{unsupported}; every connection to what the policy selects is refused, because a part of a policy \
                     is not the policy: remove that field or the policy"
                );
                problems.push(Problem::error(&subject, message));
                (Action::Deny, vec![Rule::default()])
            }
        };
        if let Some(message) = root::elsewhere(&name.namespace).filter(|_| selector.is_empty()) {
            problems.push(Problem::warning(&subject, message));
        }
        let dry_run = object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(DRY_RUN));
        if dry_run.is_some_and(|value| value == "true") {
            let message =
                format!("annotation {DRY_RUN} is not supported and the policy is enforced; delete it to stop that");
            problems.push(Problem::warning(&subject, message));
        }
        let policy = Policy { name: policy_name(&name), scope: scope(&name, &selector), action, rules };
        Some(Self { policy, selector, stands_in: false })
    }

    /// The policy in the place of one that cannot be read, but perhaps whom it selects: where that is not known either, it may
    /// be anybody in its scope.
    pub(crate) fn unreadable(name: &Name, selector: &BTreeMap<String, String>, problems: &mut Vec<Problem>) -> Self {
        let scope = scope(name, selector);
        let whom = match scope {
            Scope::Selected => "that it selects".to_owned(),
            Scope::Mesh => "of the mesh".to_owned(),
            Scope::Namespace => format!("of namespace {}", name.namespace),
        };
        let message = format!(
            "cannot be read, and no earlier state of it is known; every connection to pods {whom} is refused, because it \
             may be meant to refuse them: correct it or remove it"
        );
        problems.push(Problem::error(name.as_kind(Kind::AuthorizationPolicy), message));
        let policy = Policy { name: policy_name(name), scope, action: Action::Deny, rules: vec![Rule::default()] };
        Self { policy, selector: selector.clone(), stands_in: true }
    }

    /// Whether a pod must name the policy: those of a whole namespace or mesh apply without.
    pub(crate) fn selects(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        let own = &*self.policy.name.namespace;
        self.policy.scope == Scope::Selected
            && (own == ROOT_NAMESPACE || own == namespace)
            && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

fn scope(name: &Name, selector: &BTreeMap<String, String>) -> Scope {
    match (selector.is_empty(), name.namespace == ROOT_NAMESPACE) {
        (false, _) => Scope::Selected,
        (true, true) => Scope::Mesh,
        (true, false) => Scope::Namespace,
    }
}
