//! The kinds of object that are known, and their keys.

use std::fmt;

use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;

use crate::istio::{AuthorizationPolicy, PeerAuthentication};

/// The namespace of an object of a namespaced kind that names none, as for the API server.
pub(crate) const DEFAULT_NAMESPACE: &str = "default";

macro_rules! kinds {
    ($($kind:ident { $scope:ident, $doc:literal, $($version:literal),+ })+) => {
        /// The kind of an object.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind { $(#[doc = $doc] $kind,)+ }

        impl Kind {
            /// Every known kind.
            pub const ALL: &[Kind] = &[$(Kind::$kind,)+];

            /// The kind as it stands in a manifest.
            pub fn as_str(self) -> &'static str {
                match self { $(Kind::$kind => stringify!($kind),)+ }
            }

            /// The API versions under which the kind is read, the one that is written first.
            pub fn api_versions(self) -> &'static [&'static str] {
                match self { $(Kind::$kind => &[$($version),+],)+ }
            }

            /// Whether objects of the kind live in a namespace.
            pub fn is_namespaced(self) -> bool {
                match self { $(Kind::$kind => kinds!(@ $scope),)+ }
            }
        }

        /// A typed object of one of the known kinds. Of a namespaced kind, its metadata always name a namespace.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Object { $(#[doc = $doc] $kind(Box<$kind>),)+ }

        impl Object {
            /// The object's kind.
            pub fn kind(&self) -> Kind {
                match self { $(Object::$kind(_) => Kind::$kind,)+ }
            }

            /// The object's metadata.
            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Object::$kind(object) => &object.metadata,)+ }
            }

            pub(crate) fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(Object::$kind(object) => &mut object.metadata,)+ }
            }

            /// The object as JSON, as the API server would send it.
            pub fn to_json(&self) -> serde_json::Value {
                let json = match self { $(Object::$kind(object) => serde_json::to_value(object),)+ };
                let mut json = json.expect("objects are maps of strings to values, which JSON can always say");
                json["apiVersion"] = self.kind().api_versions()[0].into();
                json["kind"] = self.kind().as_str().into();
                json
            }

            /// Reads the body of an object of this kind. The error names the field.
            pub(crate) fn from_json(kind: Kind, json: serde_json::Value) -> Result<Object, serde_path_to_error::Error<serde_json::Error>> {
                match kind { $(Kind::$kind => serde_path_to_error::deserialize(json).map(|object| Object::$kind(Box::new(object))),)+ }
            }
        }

        $(impl From<$kind> for Object {
            fn from(object: $kind) -> Object {
                let mut object = Object::$kind(Box::new(object));
                object.default_namespace();
                object
            }
        })+
    };
    (@ cluster) => { false };
    (@ namespaced) => { true };
}

kinds! {
    Namespace { cluster, "A namespace.", "v1" }
    Node { cluster, "A machine of the cluster.", "v1" }
    ServiceAccount { namespaced, "The account that gives pods their identity.", "v1" }
    ConfigMap { namespaced, "Settings as text.", "v1" }
    Pod { namespaced, "A workload.", "v1" }
    Deployment { namespaced, "A number of like pods; the cluster in a box expands it, the control plane looks only at pods.", "apps/v1" }
    Service { namespaced, "A name and addresses for a set of pods.", "v1" }
    EndpointSlice { namespaced, "The addresses behind a Service.", "discovery.k8s.io/v1" }
    NetworkPolicy { namespaced, "What a network lets through to and from pods; others enforce it.", "networking.k8s.io/v1" }
    ValidatingWebhookConfiguration { cluster, "Whom the API server asks whether an object may be.", "admissionregistration.k8s.io/v1" }
    MutatingWebhookConfiguration { cluster, "Whom the API server lets change an object.", "admissionregistration.k8s.io/v1" }
    APIService { cluster, "Who serves a part of the API in the API server's place.", "apiregistration.k8s.io/v1" }
    PeerAuthentication { namespaced, "Istio's: which mode a workload's ports are in.", "security.istio.io/v1", "security.istio.io/v1beta1" }
    AuthorizationPolicy { namespaced, "Istio's: who may connect.", "security.istio.io/v1", "security.istio.io/v1beta1" }
}

impl Object {
    /// What identifies the object in a cluster.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        ObjectKey {
            kind: self.kind(),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }

    /// The object as YAML that [`crate::parse()`], kubectl and any other reader of YAML 1.1 or 1.2 take for the same object.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(&self.to_json()).expect("JSON is a subset of YAML")
    }

    pub(crate) fn default_namespace(&mut self) {
        if self.kind().is_namespaced() {
            self.metadata_mut().namespace.get_or_insert_with(|| DEFAULT_NAMESPACE.to_owned());
        }
    }
}

impl Kind {
    /// The kind of that name, if it is known.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.iter().copied().find(|kind| kind.as_str() == name)
    }

    pub(crate) fn is_istio(self) -> bool {
        matches!(self, Kind::PeerAuthentication | Kind::AuthorizationPolicy)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What identifies an object in a cluster. Displays as `Pod shop/web` or `Node node-a`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The object's kind.
    pub kind: Kind,
    /// None for kinds that live in no namespace.
    pub namespace: Option<String>,
    /// The object's name.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}
