//! When a captured pod that is to be captured no longer may be let go (T4).
//!
//! Its peers are told first. As long as one of them may not know, the pod's rules stand and its proxy takes both tunnels and
//! plaintext; once they are gone, a tunnel would reach a program that cannot read it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh::PodUid;
use tokio::time::Instant;

/// The pause between telling peers and letting go, at least: nodes that another replica serves are told by that one, by its own
/// watch of the same objects, and what they answer is not seen here. It also covers what a peer had decided just before.
const AT_LEAST: Duration = Duration::from_secs(5);
/// The pause between two looks at what nodes have acknowledged.
const LOOK: Duration = Duration::from_millis(500);

/// Those that wait.
#[derive(Debug)]
pub(crate) struct Leaving {
    pods: BTreeMap<(String, PodUid), Told>,
    next_look: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Told {
    /// The change that told peers, or a later one.
    change: u64,
    at: Instant,
}

impl Leaving {
    /// Nobody.
    pub(crate) fn new() -> Self {
        Self { pods: BTreeMap::new(), next_look: Instant::now() }
    }

    /// Takes note of who is to leave, and who is not, or not any more. `change` is the last one that was published.
    pub(crate) fn note(&mut self, moved: impl IntoIterator<Item = ((String, PodUid), bool)>, change: u64) {
        for (pod, leaves) in moved {
            if leaves {
                self.pods.entry(pod).or_insert_with(|| Told { change, at: Instant::now() });
            } else {
                self.pods.remove(&pod);
            }
        }
    }

    /// When to look at who may be let go; `None` while nobody leaves.
    pub(crate) fn next_look(&self) -> Option<Instant> {
        (!self.pods.is_empty()).then_some(self.next_look)
    }

    /// Those that may be let go now. `known` says whether all peers have taken in a change that was published so long ago.
    pub(crate) fn due(&mut self, known: impl Fn(u64, Duration) -> bool) -> BTreeSet<(String, PodUid)> {
        self.next_look = Instant::now() + LOOK;
        let waited = self.pods.iter().map(|(pod, told)| (told.change, told.at.elapsed(), pod));
        let waited: Vec<_> = waited.filter(|(_, ago, _)| *ago >= AT_LEAST).collect();
        let mut changes: Vec<(u64, Duration)> = waited.iter().map(|(change, ago, _)| (*change, *ago)).collect();
        changes.sort_unstable();
        changes.dedup_by_key(|(change, _)| *change);
        // Who has taken in a change has taken in all before it.
        let known = &changes[..changes.partition_point(|(change, ago)| known(*change, *ago))];
        let due = waited.iter().filter(|(change, ..)| known.last().is_some_and(|(last, _)| change <= last));
        due.map(|(.., pod)| (*pod).clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn pods(names: &[&str]) -> BTreeSet<(String, PodUid)> {
        names.iter().map(|name| ("node-a".to_owned(), PodUid::from(*name))).collect()
    }

    fn all(names: &[&str], leaves: bool) -> Vec<((String, PodUid), bool)> {
        pods(names).into_iter().map(|pod| (pod, leaves)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_let_go_when_all_know_and_never_before_its_time() {
        let mut leaving = Leaving::new();
        assert!(leaving.next_look().is_none());
        leaving.note(all(&["a"], true), 3);
        assert!(leaving.next_look().is_some());
        assert!(leaving.due(|_, _| true).is_empty(), "nodes of other replicas may not know");
        advance(AT_LEAST).await;
        leaving.note(all(&["a", "b"], true), 4);
        assert!(leaving.due(|_, _| false).is_empty());
        assert_eq!(leaving.due(|change, _| change <= 3), pods(&["a"]));
        advance(AT_LEAST).await;
        assert_eq!(leaving.due(|change, _| change <= 3), pods(&["a"]), "the other one was told later");
        assert_eq!(leaving.due(|_, ago| ago >= 2 * AT_LEAST), pods(&["a"]), "and not so long ago");
        // Who stays after all begins anew the next time.
        leaving.note(all(&["a", "b"], false), 5);
        assert!(leaving.next_look().is_none());
        leaving.note(all(&["a"], true), 6);
        assert!(leaving.due(|_, _| true).is_empty());
    }
}
