//! Where objects come from.
//!
//! In a cluster in a box: a folder of Kubernetes YAML. Whatever the source, it says the same: what changed, what is there in
//! a form that nobody can read, and what is wrong.

mod folder;

pub(crate) use folder::Folder;

use std::collections::BTreeSet;

use manifests::{Change, ObjectKey};

use crate::problem::Problem;

/// What a source has to say at once.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Batch {
    /// What is different since the last batch.
    pub(crate) changes: Vec<Change>,
    /// Everything that is there, cannot be read and was never read: the whole list.
    pub(crate) unreadable: BTreeSet<ObjectKey>,
    /// What was there at the start, could not be read wholly, and still cannot: the whole list, by name.
    pub(crate) unlisted: BTreeSet<String>,
    /// Everything that is wrong: the whole list.
    pub(crate) problems: Vec<Problem>,
}
