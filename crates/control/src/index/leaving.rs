//! Pods that are captured and not to be any more (T4, T47).
//!
//! As soon as a captured pod is exempt its peers are told to dial it in clear, and it is not captured for anybody until its
//! agent reports it again. Its rules stand until it is released, which is for whoever knows what peers have acknowledged to
//! say ([`Index::release`]). Where replicas share a record, each takes a pod back by itself, from the same objects, and the one that
//! serves its node's agent sees to the record and the release. A released pod that is enrolled again is told so only when its agent has stopped reporting it: until
//! then nobody knows whether its rules still capture.

use std::collections::{BTreeMap, BTreeSet};

use mesh::{PodUid, Uncaptured};

use super::{Dirty, Index, Touched};

/// A pod, and the node that it is captured on.
pub(crate) type Place = (String, PodUid);

/// How far they are.
#[derive(Clone, Default, Debug)]
pub(crate) struct Leaving {
    /// Exempt, reported as captured, and not released yet.
    waiting: BTreeSet<Place>,
    /// Those that came to wait, and those that do no longer, since this was last asked: in an uninstallation every pod waits, and
    /// to look at all of them for each change would cost more than the change.
    moved: BTreeMap<Place, bool>,
    /// Released, and still reported.
    released: BTreeMap<Place, Uncaptured>,
    /// Peers spoke TLS with them until now.
    taken_back: BTreeSet<Place>,
    /// Peers spoke TLS with them once, and they are exempt.
    left: BTreeSet<Place>,
    /// Reported and to be captured, and not in the record any more since they were exempt.
    unrecorded: BTreeSet<Place>,
}

/// How a pod is.
pub(super) struct Seen {
    pub(super) exempt: Option<Uncaptured>,
    /// Peers spoke TLS with it until now.
    pub(super) was: bool,
    /// Its agent says that it is captured.
    pub(super) reported: bool,
    /// It may count as captured.
    pub(super) known: bool,
}

impl Leaving {
    /// Takes note of how a pod is. Whether peers are to speak TLS with it from now on.
    pub(super) fn settle(&mut self, place: &Place, seen: &Seen) -> bool {
        let &Seen { exempt, was, reported, known } = seen;
        if was {
            self.taken_back.insert(place.clone());
            self.left.insert(place.clone());
        } else if exempt.is_none() {
            self.left.remove(place);
        }
        if !reported {
            self.released.remove(place);
        }
        let released = self.released.contains_key(place);
        self.wait(place, exempt.is_some() && reported && !released);
        if exempt.is_none() && reported && !known && !released {
            self.unrecorded.insert(place.clone());
        } else {
            self.unrecorded.remove(place);
        }
        exempt.is_none() && known && !released
    }

    /// It is written down anew: its agent has reported it since, to whichever replica.
    pub(super) fn recorded(&mut self, place: &Place) {
        self.released.remove(place);
    }

    /// Whether peers spoke TLS with an exempt pod once.
    pub(super) fn has_left(&self, place: &Place) -> bool {
        self.left.contains(place)
    }

    /// Why a released pod was exempt.
    pub(super) fn released(&self, place: &Place) -> Option<Uncaptured> {
        self.released.get(place).copied()
    }

    /// Notes whether a pod waits for its release. Whether that is news.
    fn wait(&mut self, place: &Place, waits: bool) -> bool {
        let is_news = if waits { self.waiting.insert(place.clone()) } else { self.waiting.remove(place) };
        if is_news {
            self.moved.insert(place.clone(), waits);
        }
        is_news
    }

    /// The pod is gone.
    pub(super) fn forget(&mut self, place: &Place) {
        self.wait(place, false);
        self.released.remove(place);
        self.left.remove(place);
        self.unrecorded.remove(place);
    }
}

impl Index {
    /// The pods that are to leave: peers were told, and their rules stand until [`Index::release`].
    #[cfg(test)]
    pub(crate) fn leaving(&self) -> &BTreeSet<Place> {
        &self.cluster.leaving.waiting
    }

    /// Which pods are to leave now, and which are not, or not any more, since this was last asked.
    pub(crate) fn moved(&mut self) -> BTreeMap<Place, bool> {
        std::mem::take(&mut self.cluster.leaving.moved)
    }

    /// Pods that were captured for their peers and are so no longer, since this was last asked: the record of captures forgets
    /// them before anybody is told.
    pub(crate) fn taken_back(&mut self) -> BTreeSet<Place> {
        std::mem::take(&mut self.cluster.leaving.taken_back)
    }

    /// Pods that are to be captured after all, and that the record does not name any more: they count when it does.
    pub(crate) fn unrecorded(&self) -> &BTreeSet<Place> {
        &self.cluster.leaving.unrecorded
    }

    /// Whether a pod is not to be captured, as far as is known here.
    pub(crate) fn is_exempt(&self, node: &str, pod: &PodUid) -> bool {
        self.views.node_pods.get(node).and_then(|pods| pods.get(pod)).is_some_and(|pod| pod.capture.is_err())
    }

    /// Lets go of pods that leave: everybody who was told has acknowledged.
    pub(crate) fn release(&mut self, pods: impl IntoIterator<Item = Place>) -> Touched {
        let mut dirty = Dirty::default();
        for place in pods {
            let told = self.views.node_pods.get(&place.0).and_then(|pods| pods.get(&place.1));
            let Some(why) = told.and_then(|told| told.capture.err()) else { continue };
            if self.cluster.leaving.wait(&place, false) {
                dirty.pods.extend(self.cluster.pods_with(&place.1).cloned());
                self.cluster.leaving.released.insert(place, why);
            }
        }
        self.refresh(dirty)
    }
}
