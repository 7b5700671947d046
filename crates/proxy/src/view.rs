//! The node's view of the mesh while it changes: one writer, many short readers, and a number that tells of each change.

use std::sync::{PoisonError, RwLock};

use mesh::View;
use tokio::sync::watch;

/// The view, shared. It is never held across an await: both ways in take a function that is not async.
#[derive(Debug)]
pub(crate) struct LiveView {
    view: RwLock<View>,
    version: watch::Sender<u64>,
}

impl Default for LiveView {
    fn default() -> Self {
        Self { view: RwLock::default(), version: watch::Sender::new(0) }
    }
}

impl LiveView {
    /// Looks at the view as it is now.
    pub(crate) fn read<R>(&self, look: impl FnOnce(&View) -> R) -> R {
        // A panic under this lock can have left no half change: `View` takes in whole things.
        look(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the view, then tells all who wait for that.
    pub(crate) fn change(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.write().unwrap_or_else(PoisonError::into_inner));
        self.version.send_modify(|version| *version += 1);
    }

    /// Tells of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// How many changes there have been.
    pub(crate) fn version(&self) -> u64 {
        *self.version.borrow()
    }
}
