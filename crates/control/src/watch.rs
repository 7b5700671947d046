//! Where objects come from.
//!
//! In a cluster in a box: a folder of Kubernetes YAML. On Kubernetes: the API server. Whatever the source, it says the same:
//! what changed, what is there in a form that nobody can read, and what is wrong.

mod folder;
mod kubernetes;

pub(crate) use folder::Folder;
pub(crate) use kubernetes::Kubernetes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use manifests::istio::Action;
use manifests::{Change, Object, ObjectKey};
use wire::discovery::Position;

use crate::kubernetes::status::Conditions;
use crate::problem::Problem;

/// What a source has to say at once.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Batch {
    /// What is different since the last batch.
    pub(crate) changes: Vec<Change>,
    /// Everything that is there, cannot be read and was never read: the whole list. Each with the labels of the pods that it is
    /// about, where at least these can be read; without, it may be about anybody in its scope.
    pub(crate) unreadable: BTreeMap<ObjectKey, BTreeMap<String, String>>,
    /// What was there at the start, could not be read wholly, and still cannot: the whole list, by name.
    pub(crate) unlisted: BTreeSet<String>,
    /// Everything that is wrong: the whole list.
    pub(crate) problems: Vec<Problem>,
    /// Those of them that are about the text of a policy: the whole list.
    pub(crate) of_policies: BTreeMap<ObjectKey, Vec<Problem>>,
    /// What policies were told about themselves, as they say it: the whole list.
    pub(crate) conditions: Conditions,
    /// Whether something of what changes may be missing now.
    pub(crate) behind: bool,
    /// How far it goes, with this batch.
    pub(crate) positions: Positions,
}

/// How far the changes of an API server are known, kind by kind. A folder has no such thing.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Positions {
    /// Of the last change that was seen: what nodes are told is at least so new.
    pub(crate) changed: Arc<Position>,
    /// Up to where nothing is missing: there may have been no change for long before it.
    pub(crate) reached: Position,
}

/// A source of objects.
pub(crate) enum Source {
    /// The folder of a cluster in a box.
    Folder(Folder),
    /// The API server.
    Kubernetes(Kubernetes),
}

impl Source {
    /// Waits for the next thing to say.
    pub(crate) async fn next(&mut self) -> Batch {
        match self {
            Self::Folder(folder) => folder.next().await,
            Self::Kubernetes(kubernetes) => kubernetes.next().await,
        }
    }
}

/// Whether the state of a policy may count on when the next one cannot be read. Who only audits keeps nobody out, and what comes
/// of it may be meant to.
fn decides(policy: &Object) -> bool {
    !matches!(policy, Object::AuthorizationPolicy(policy) if policy.spec.action == Action::Audit)
}
