//! One box for the tests of a file.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::cluster::Cluster;

/// A box that is made for the first test that asks and ends with the last one that uses it: statics are never dropped, and a
/// box that outlives its tests would be a leftover.
#[derive(Debug)]
pub struct Shared {
    manifest: &'static str,
    present: Mutex<Weak<Cluster>>,
}

impl Shared {
    /// A box with these objects, not made yet.
    #[must_use]
    pub const fn new(manifest: &'static str) -> Shared {
        Shared { manifest, present: Mutex::new(Weak::new()) }
    }

    /// The box.
    #[track_caller]
    pub fn get(&self) -> Arc<Cluster> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = present.upgrade() {
            return cluster;
        }
        let cluster = Arc::new(Cluster::start(self.manifest));
        *present = Arc::downgrade(&cluster);
        cluster
    }
}
