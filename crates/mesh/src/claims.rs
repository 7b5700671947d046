//! An index of names that may have several owners for a while.

use std::collections::HashMap;
use std::hash::Hash;

/// Who owns what. Addresses are used again, and the deltas of two owners come in any order; pods on the host's network
/// share an address for good. The owner that said so last is the holder, and when it is gone, the one before: what is
/// left of an older claim never hides or takes away a newer one.
#[derive(Debug)]
pub(crate) struct Claims<K, O>(HashMap<K, Vec<O>>);

impl<K, O> Default for Claims<K, O> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, O: Eq> Claims<K, O> {
    /// Notes that `owner` owns `key` now.
    pub(crate) fn claim(&mut self, key: K, owner: O) {
        let owners = self.0.entry(key).or_default();
        owners.retain(|other| *other != owner);
        owners.push(owner);
    }

    /// Notes that `owner` does not own `key` any more.
    pub(crate) fn release(&mut self, key: &K, owner: &O) {
        if let Some(owners) = self.0.get_mut(key) {
            owners.retain(|other| other != owner);
            if owners.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// The owner that counts.
    pub(crate) fn holder(&self, key: &K) -> Option<&O> {
        self.0.get(key)?.last()
    }

    /// All owners.
    pub(crate) fn owners(&self, key: &K) -> &[O] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }
}
