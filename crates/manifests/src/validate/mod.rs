//! What the API server would refuse, and we care about.

mod checker;

mod cluster;
mod meta;
mod pod;
mod policy;
mod service;

pub(crate) use checker::Finding;

use crate::object::Object;
use crate::problem::{Location, Problem};
use crate::tree::Node;
use checker::Checker;

/// What is wrong with an object. [`crate::parse()`] has done this already; it is for objects that were made by a program.
pub fn validate(object: &Object, location: &Location) -> Vec<Problem> {
    problems(object, location, findings(object, None))
}

/// What is right on Kubernetes and cannot run in the cluster in a box: there are no images, so that every container must say its command.
pub fn validate_for_box(object: &Object, location: &Location) -> Vec<Problem> {
    let mut checker = Checker::new(None);
    match object {
        Object::Pod(pod) => checker.key("spec", |checker| pod::for_box(checker, pod.spec.as_ref())),
        Object::Deployment(deployment) => checker.keys(&["spec", "template", "spec"], |checker| {
            pod::for_box(checker, deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()));
        }),
        _ => {}
    }
    problems(object, location, checker.finish())
}

/// What is wrong with an object, by the path of its fields. The tree that it was made from tells what is not written at all.
pub(crate) fn findings(object: &Object, tree: Option<&Node>) -> Vec<Finding> {
    let mut checker = Checker::new(tree);
    meta::check(&mut checker, object);
    match object {
        // What a NetworkPolicy says is for those who enforce it.
        Object::Namespace(_) | Object::ServiceAccount(_) | Object::NetworkPolicy(_) => {}
        Object::ValidatingWebhookConfiguration(_) | Object::MutatingWebhookConfiguration(_) | Object::APIService(_) => {
        }
        Object::Node(node) => cluster::node(&mut checker, node),
        Object::ConfigMap(map) => cluster::config_map(&mut checker, map),
        Object::EndpointSlice(slice) => cluster::endpoint_slice(&mut checker, slice),
        Object::Pod(pod) => pod::pod(&mut checker, pod),
        Object::Deployment(deployment) => pod::deployment(&mut checker, deployment),
        Object::Service(service) => service::check(&mut checker, service),
        Object::PeerAuthentication(policy) => policy::peer_authentication(&mut checker, policy),
        Object::AuthorizationPolicy(policy) => policy::authorization_policy(&mut checker, policy),
    }
    checker.finish()
}

fn problems(object: &Object, location: &Location, findings: Vec<Finding>) -> Vec<Problem> {
    let key = object.key().to_string();
    let problem = |Finding { severity, path, message, remedy }: Finding| Problem {
        location: location.clone(),
        severity,
        object: Some(key.clone()),
        field: path.to_field(),
        message,
        remedy,
    };
    findings.into_iter().map(problem).collect()
}
