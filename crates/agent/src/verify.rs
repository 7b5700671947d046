//! Captures are looked at again and again, and made anew where somebody changed them (T23).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh::PodUid;

use crate::capture::{Capture, Standing};

/// The pause between two looks: what a program of the pod that may change rules gains is bounded by it.
pub(crate) const EVERY: Duration = Duration::from_millis(500);

/// What a look found, where it found something.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Something was taken away or changed; it stands again.
    Repaired {
        /// What was broken.
        broken: String,
    },
    /// It could not be looked at, or not be made anew. The next look tries again.
    Failed {
        /// What happened.
        sentence: String,
    },
}

/// Looks at all captures, one after the other. Blocks for some microseconds each.
pub(crate) fn sweep(captures: Vec<(PodUid, Arc<Mutex<Capture>>)>) -> Vec<(PodUid, Found)> {
    let look = |(pod, capture): (PodUid, Arc<Mutex<Capture>>)| {
        let found = look(&mut capture.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some((pod, found))
    };
    captures.into_iter().filter_map(look).collect()
}

fn look(capture: &mut Capture) -> Option<Found> {
    let broken = match capture.verify() {
        Ok(Standing::Intact) => return None,
        Ok(Standing::Broken(broken)) => broken,
        Err(error) => return Some(Found::Failed { sentence: format!("it cannot be verified: {error}") }),
    };
    Some(match capture.repair() {
        Ok(()) => Found::Repaired { broken },
        Err(error) => Found::Failed { sentence: format!("{broken}, and it cannot be made anew: {error}") },
    })
}
