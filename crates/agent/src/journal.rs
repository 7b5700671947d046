//! The last things that happened on the node: one line of log each, and a page for people.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// How many are kept.
const KEPT: usize = 256;

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Entry {
    /// Seconds since 1970.
    at: u64,
    /// What, by name.
    event: &'static str,
    /// Which pod: its UID. Empty where none.
    pod: String,
    /// More of it.
    detail: String,
}

/// The last of them.
#[derive(Debug, Default)]
pub(crate) struct Journal(Mutex<VecDeque<Entry>>);

impl Journal {
    /// Something changed, as it should.
    pub(crate) fn change(&self, event: &'static str, pod: &str, detail: &str) {
        tracing::info!(event, pod, detail);
        self.keep(event, pod, detail);
    }

    /// Something is wrong.
    pub(crate) fn problem(&self, event: &'static str, pod: &str, detail: &str) {
        tracing::warn!(event, pod, detail);
        self.keep(event, pod, detail);
    }

    /// The last ones, oldest first.
    pub(crate) fn all(&self) -> Vec<Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn keep(&self, event: &'static str, pod: &str, detail: &str) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() == KEPT {
            entries.pop_front();
        }
        entries.push_back(Entry { at, event, pod: pod.to_owned(), detail: detail.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_entries_are_kept_and_no_more() {
        let journal = Journal::default();
        for number in 0..KEPT + 2 {
            journal.change("captured", &number.to_string(), "");
        }
        let all = journal.all();
        assert_eq!((all.len(), all[0].pod.as_str()), (KEPT, "2"));
    }
}
