//! What the index keeps of a Kubernetes object: the few fields that decisions read, checked.
//!
//! Kubernetes ends here. A field that cannot be read is a problem of its object and of nothing else.

mod foreign;
mod network;
mod pod;
mod probes;

pub(crate) use foreign::Foreign;
pub(crate) use network::{Node, Service, Slice};
pub(crate) use pod::{ModeLabel, Namespace, Pod};

use std::fmt;
use std::net::IpAddr;
use std::ops::Range;

use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use manifests::{Kind, ObjectKey};

use crate::problem::{Problem, quoted};

/// Namespace and name of an object of a kind that the context tells.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Name {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Name {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    pub(crate) fn of(key: &ObjectKey) -> Self {
        Self { namespace: key.namespace.clone().unwrap_or_default(), name: key.name.clone() }
    }

    pub(crate) fn of_metadata(metadata: &ObjectMeta) -> Self {
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }

    /// All names of a namespace.
    pub(crate) fn all_of(namespace: &str) -> Range<Self> {
        // Nothing sorts between a namespace and the same with a zero byte behind it.
        Self::new(namespace, "")..Self::new(&format!("{namespace}\0"), "")
    }

    /// The key of an object of that kind.
    pub(crate) fn key(&self, kind: Kind) -> ObjectKey {
        ObjectKey { kind, namespace: Some(self.namespace.clone()), name: self.name.clone() }
    }

    /// How problems name an object of that kind.
    pub(crate) fn as_kind(&self, kind: Kind) -> String {
        self.key(kind).to_string()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which of two objects of one kind came first: by creation time, then by name. An object without a creation time (a
/// file may leave it out) counts as the oldest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Age {
    created: Option<Time>,
    name: Name,
}

impl Age {
    pub(crate) fn of(metadata: &ObjectMeta) -> Self {
        Self { created: metadata.creation_timestamp.clone(), name: Name::of_metadata(metadata) }
    }

    pub(crate) fn name(&self) -> &Name {
        &self.name
    }
}

/// Reads addresses; each that is none is a problem of `object`.
fn addresses<'a>(
    texts: impl Iterator<Item = &'a str>,
    object: &str,
    field: &str,
    problems: &mut Vec<Problem>,
) -> Vec<IpAddr> {
    let mut read = Vec::new();
    for text in texts {
        match text.parse() {
            Ok(address) if !read.contains(&address) => read.push(address),
            Ok(_) => {}
            Err(_) => problems.push(Problem::error(
                object,
                format!("field {field}: {} is not an IP address and is left out; correct it", quoted(text)),
            )),
        }
    }
    read
}
