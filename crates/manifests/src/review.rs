//! What is wrong between objects that are each right.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{PodSpec, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::istio::WorkloadSelector;
use crate::object::{DEFAULT_NAMESPACE, Kind, Object};
use crate::problem::{Problem, Severity, quoted};
use crate::set::Set;

/// Namespaces that every cluster has.
const GIVEN: [&str; 4] = [DEFAULT_NAMESPACE, "kube-system", "kube-public", "kube-node-lease"];

type Labels = BTreeMap<String, String>;

impl Set {
    /// What is probably a mistake between objects: a Service or a policy that selects no pod, a named port that no pod has, a
    /// namespace, service account or node that is not there. All are warnings: the missing object may come later.
    pub fn review(&self) -> Vec<Problem> {
        let mut review = Review::default();
        self.iter().for_each(|(object, _)| review.note(object));
        let problems = self.iter().flat_map(|(object, location)| {
            review.warnings(object).into_iter().map(|(field, message, remedy)| Problem {
                location: location.clone(),
                severity: Severity::Warning,
                object: Some(object.key().to_string()),
                field: Some(field),
                message,
                remedy: remedy.to_owned(),
            })
        });
        problems.collect()
    }
}

#[derive(Default)]
struct Review<'a> {
    /// Pods, also those to come of Deployments, by namespace.
    pods: BTreeMap<&'a str, Vec<Template<'a>>>,
    /// Kind, namespace and name of the objects that others refer to by name.
    names: BTreeSet<(Kind, &'a str, &'a str)>,
    has_nodes: bool,
}

/// A pod, or what a Deployment's pods will be.
struct Template<'a> {
    labels: Labels,
    spec: Option<&'a PodSpec>,
}

/// Field, message and remedy.
type Warning = (String, String, &'static str);

impl<'a> Review<'a> {
    fn note(&mut self, object: &'a Object) {
        let metadata = object.metadata();
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let name = metadata.name.as_deref().unwrap_or_default();
        let template = match object {
            Object::Pod(pod) => {
                Template { labels: metadata.labels.clone().unwrap_or_default(), spec: pod.spec.as_ref() }
            }
            Object::Deployment(deployment) => {
                let Some(spec) = &deployment.spec else { return };
                let labels =
                    spec.template.metadata.as_ref().and_then(|metadata| metadata.labels.clone()).unwrap_or_default();
                Template { labels, spec: spec.template.spec.as_ref() }
            }
            Object::Namespace(_) | Object::Node(_) | Object::ServiceAccount(_) => {
                self.has_nodes |= object.kind() == Kind::Node;
                self.names.insert((object.kind(), namespace, name));
                return;
            }
            _ => return,
        };
        self.pods.entry(namespace).or_default().push(template);
    }

    fn warnings(&self, object: &Object) -> Vec<Warning> {
        let namespace = object.metadata().namespace.as_deref().unwrap_or_default();
        let pods = self.pods.get(namespace).map(Vec::as_slice).unwrap_or_default();
        let mut warnings = match object {
            Object::Service(service) => service_warnings(service, pods),
            Object::PeerAuthentication(policy) => policy_warnings(policy.spec.selector.as_ref(), pods),
            Object::AuthorizationPolicy(policy) => policy_warnings(policy.spec.selector.as_ref(), pods),
            Object::Pod(pod) => self.pod_warnings(pod.spec.as_ref(), "spec", namespace),
            Object::Deployment(deployment) => {
                let spec = deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
                self.pod_warnings(spec, "spec.template.spec", namespace)
            }
            _ => Vec::new(),
        };
        if object.kind().is_namespaced()
            && !GIVEN.contains(&namespace)
            && !self.names.contains(&(Kind::Namespace, "", namespace))
        {
            warnings.push((
                "metadata.namespace".to_owned(),
                format!("there is no Namespace {}", quoted(namespace)),
                "add one",
            ));
        }
        warnings
    }

    /// What a pod refers to by name.
    fn pod_warnings(&self, spec: Option<&PodSpec>, path: &str, namespace: &str) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let Some(spec) = spec else { return warnings };
        let account = spec.service_account_name.as_deref().filter(|name| !name.is_empty() && *name != "default");
        if let Some(name) = account.filter(|name| !self.names.contains(&(Kind::ServiceAccount, namespace, *name))) {
            let message = format!("there is no ServiceAccount {namespace}/{}", quoted(name));
            warnings.push((format!("{path}.serviceAccountName"), message, "add one"));
        }
        let node = spec.node_name.as_deref().filter(|name| !name.is_empty() && self.has_nodes);
        if let Some(name) = node.filter(|name| !self.names.contains(&(Kind::Node, "", *name))) {
            let message = format!("there is no Node {}", quoted(name));
            warnings.push((format!("{path}.nodeName"), message, "name one that is there, or remove the field"));
        }
        warnings
    }
}

fn service_warnings(service: &Service, pods: &[Template<'_>]) -> Vec<Warning> {
    // Without a selector, its endpoints are written by somebody else.
    let Some(spec) = &service.spec else { return Vec::new() };
    let Some(selector) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else { return Vec::new() };
    let selected: Vec<_> = pods.iter().filter(|pod| has_labels(&pod.labels, selector)).collect();
    if selected.is_empty() {
        return vec![(
            "spec.selector".to_owned(),
            "selects no pod".to_owned(),
            "use labels of a pod of the same namespace",
        )];
    }
    let has_port = |name: &str| {
        let containers = selected.iter().filter_map(|pod| pod.spec).flat_map(|spec| &spec.containers);
        containers.flat_map(|container| container.ports.iter().flatten()).any(|port| port.name.as_deref() == Some(name))
    };
    let named = spec.ports.iter().flatten().enumerate().filter_map(|(index, port)| match &port.target_port {
        Some(IntOrString::String(name)) if !has_port(name) => Some((index, name)),
        _ => None,
    });
    let problem = |(index, name): (usize, &String)| {
        let message = format!("no selected pod has a port named {}", quoted(name));
        (format!("spec.ports[{index}].targetPort"), message, "name the port in the pod, or write a number")
    };
    named.map(problem).collect()
}

/// A policy whose selector leaves out every pod of a namespace that has pods. (A policy of the mesh's root namespace selects in
/// all of them; that namespace seldom has pods of its own.)
fn policy_warnings(selector: Option<&WorkloadSelector>, pods: &[Template<'_>]) -> Vec<Warning> {
    let Some(selector) = selector else { return Vec::new() };
    if pods.is_empty() || pods.iter().any(|pod| has_labels(&pod.labels, &selector.match_labels)) {
        return Vec::new();
    }
    vec![("spec.selector".to_owned(), "selects no pod of its namespace".to_owned(), "use labels of a pod")]
}

fn has_labels(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
