//! The node's view of the mesh while it changes: one writer, many short readers, and a number that tells of each change.
//!
//! And its age: how long ago it was last known to be right (T2). Whoever keeps the control plane's word from this node makes
//! the view old, and an old one no longer says who may be spoken to in clear.

use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use mesh::View;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use wire::discovery::Position;

/// The view, shared. It is never held across an await: both ways in take a function that is not async.
#[derive(Debug)]
pub(crate) struct LiveView {
    view: RwLock<View>,
    version: watch::Sender<u64>,
    /// How far those knew the changes of the API server who told of it.
    position: Mutex<Position>,
    /// A moment at which the view was all that there was to know.
    as_of: watch::Sender<Option<Instant>>,
}

impl Default for LiveView {
    fn default() -> Self {
        Self {
            view: RwLock::default(),
            version: watch::Sender::new(0),
            position: Mutex::default(),
            as_of: watch::Sender::new(None),
        }
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

    /// What is about to be taken in was told from this position.
    pub(crate) fn told_from(&self, position: &Position) {
        self.position.lock().unwrap_or_else(PoisonError::into_inner).merge(position);
    }

    /// From which position all that is in the view was told.
    pub(crate) fn position(&self) -> Position {
        self.position.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many changes there have been.
    pub(crate) fn version(&self) -> u64 {
        *self.version.borrow()
    }

    /// Takes note that the view was right at a moment.
    pub(crate) fn confirm(&self, as_of: Instant) {
        self.as_of.send_if_modified(|known| {
            let newer = known.is_none_or(|known| as_of > known);
            if newer {
                *known = Some(as_of);
            }
            newer
        });
    }

    /// How long ago the view was last known to be right; `None`: never yet.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.as_of.borrow().map(|as_of| as_of.elapsed())
    }

    /// Lets the view grow old, for ever: it is stale from the moment on at which its last confirmation is older than the
    /// settings allow, until the next one. A view that nobody ever confirmed here, because a proxy before this one left it,
    /// is stale from the start.
    pub(crate) async fn grow_old(&self) {
        let mut confirmed = self.as_of.subscribe();
        loop {
            let as_of = *confirmed.borrow_and_update();
            let lifetime = self.read(|view| view.settings().map(|settings| settings.view_lifetime));
            let end = as_of.zip(lifetime).map(|(as_of, lifetime)| as_of + lifetime);
            let stale = lifetime.is_some() && end.is_none_or(|end| end <= Instant::now());
            self.set_stale(stale);
            // The sender is a part of `self`.
            let _ = match end.filter(|_| !stale) {
                Some(end) => timeout_at(end, confirmed.changed()).await.unwrap_or(Ok(())),
                None => confirmed.changed().await,
            };
        }
    }

    fn set_stale(&self, stale: bool) {
        if self.read(View::is_stale) == stale {
            return;
        }
        self.change(|view| view.set_stale(stale));
        if stale {
            tracing::warn!(
                "the view is stale: plaintext inside the cluster is refused where strict, and named elsewhere"
            );
        } else {
            tracing::info!("the view is fresh again");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh::{MeshSettings, Resource};
    use tokio::time::{advance, pause};

    use super::*;

    const LIFETIME: Duration = Duration::from_secs(6);

    fn live() -> Arc<LiveView> {
        let live = Arc::new(LiveView::default());
        let settings = MeshSettings { view_lifetime: LIFETIME, ..MeshSettings::default() };
        live.change(|view| view.apply(Resource::Settings(settings)));
        live
    }

    /// Waits for the view to be stale, or fresh.
    async fn until(live: &LiveView, stale: bool) {
        let mut changes = live.changes();
        while live.read(View::is_stale) != stale {
            changes.changed().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_view_grows_old_and_a_confirmation_makes_it_fresh() {
        pause();
        let live = live();
        live.confirm(Instant::now());
        let aging = tokio::spawn({
            let live = live.clone();
            async move { live.grow_old().await }
        });
        advance(LIFETIME - Duration::from_millis(10)).await;
        tokio::task::yield_now().await;
        assert!(!live.read(View::is_stale));
        let begun = Instant::now();
        until(&live, true).await;
        assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());
        // An older word makes nothing newer.
        live.confirm(Instant::now() - LIFETIME);
        tokio::task::yield_now().await;
        assert!(live.read(View::is_stale) && live.age() >= Some(LIFETIME));
        let version = live.version();
        live.confirm(Instant::now());
        until(&live, false).await;
        assert_eq!(live.version(), version + 1, "whoever waits for the view is told");
        aging.abort();
    }

    #[tokio::test]
    async fn a_view_that_was_never_confirmed_is_stale_and_none_at_all_is_not() {
        pause();
        let (left, empty) = (live(), Arc::new(LiveView::default()));
        for live in [&left, &empty] {
            let live = live.clone();
            tokio::spawn(async move { live.grow_old().await });
        }
        until(&left, true).await;
        assert!(!empty.read(View::is_stale), "without a view everything is refused by another name");
    }
}
