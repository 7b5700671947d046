//! Keeps the plugin in its place on the node for as long as the agent runs, and takes it out when the product goes.
//!
//! It is first put there when the agent can answer: before, every pod of the node would wait for nothing. From then on it
//! stays, also while no agent is there (fail closed).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use inotify::{Inotify, WatchMask};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::StreamExt;

use crate::admin::Shown;
use crate::plugin::place::{Done, Place, Standing};

/// The pause between two looks where the kernel tells of nothing.
const EVERY: Duration = Duration::from_secs(3);
/// Room for events: what does not fit is seen by the next look.
const EVENT_BUFFER: usize = 4096;

/// The plugin in its place.
#[derive(Debug, Clone)]
pub(crate) struct Keeper {
    /// `None` once it is not this agent's any more.
    place: Arc<Mutex<Option<Place>>>,
    since: watch::Sender<Option<SystemTime>>,
    shown: Arc<Shown>,
}

impl Keeper {
    /// Of a plugin that is to be at `place`.
    pub(crate) fn new(place: Place, shown: Arc<Shown>) -> Self {
        let since = watch::Sender::new(place.since());
        Self { place: Arc::new(Mutex::new(Some(place))), since, shown }
    }

    /// Since when it is in place.
    pub(crate) fn since(&self) -> watch::Receiver<Option<SystemTime>> {
        self.since.subscribe()
    }

    /// Keeps it there until it is not this agent's any more. `configurations` is the folder that is watched.
    pub(crate) async fn keep(self, configurations: &Path, mut answers: watch::Receiver<bool>) {
        let there = self.lock().as_ref().is_some_and(Place::is_there);
        // The other end goes only with the process.
        if !there && answers.wait_for(|answers| *answers).await.is_err() {
            return;
        }
        let mut events = watch(configurations).inspect_err(|error| {
            self.shown.journal.problem("plugin-unwatched", "", &format!("it is looked at every 3 s only: {error}"));
        });
        let mut tick = interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let told = async {
                match &mut events {
                    Ok(events) => drop(events.next().await),
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = tick.tick() => {}
                () = told => {}
            }
            let keeper = self.clone();
            match tokio::task::spawn_blocking(move || keeper.look()).await {
                Ok(Some((standing, done))) => self.show(standing, done),
                Ok(None) => return,
                Err(panic) => self.shown.journal.problem("plugin-failed", "", &panic.to_string()),
            }
        }
    }

    /// The plugin is another agent's from here on.
    pub(crate) fn let_go(&self) {
        self.lock().take();
    }

    /// Takes the plugin out of the node.
    ///
    /// # Errors
    /// One sentence: what is left.
    pub(crate) fn remove(&self) -> Result<(), String> {
        match self.lock().take() {
            Some(place) => place.remove(),
            None => Ok(()),
        }
    }

    fn look(&self) -> Option<(Standing, Done)> {
        let mut place = self.lock();
        let place = place.as_mut()?;
        let kept = place.keep();
        let since = place.since();
        self.since.send_if_modified(|before| std::mem::replace(before, since) != since);
        Some(kept)
    }

    fn show(&self, standing: Standing, done: Done) {
        let (journal, metrics) = (&self.shown.journal, &self.shown.metrics);
        match done {
            Done::Nothing => {}
            Done::Installed => journal.change("plugin-installed", "", "from here on pods wait for their capture"),
            Done::Followed => journal.change("plugin-followed", "", "the primary's configuration changed"),
            Done::Restored => {
                metrics.plugin_restored.inc();
                let sentence =
                    "somebody had removed or changed its conflist; pods that started meanwhile are captured late";
                journal.problem("plugin-restored", "", sentence);
            }
        }
        let in_place = standing.is_installed();
        metrics.plugin_in_place.set(in_place.into());
        if self.shown.plugin(&standing) {
            match &standing {
                Standing::InPlace { .. } => {}
                Standing::Orphan => {
                    let sentence = "the primary's configuration is gone; its last chain stays until there is another";
                    journal.problem("plugin-orphan", "", sentence);
                }
                Standing::NoPrimary => {
                    let sentence = "there is no CNI configuration of a primary yet; the plugin waits for one";
                    journal.problem("plugin-waits", "", sentence);
                }
                Standing::Failed(sentence) => journal.problem("plugin-failed", "", sentence),
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watch(folder: &Path) -> std::io::Result<inotify::EventStream<Vec<u8>>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::CREATE | WatchMask::DELETE;
    inotify.watches().add(folder, mask)?;
    inotify.into_event_stream(vec![0; EVENT_BUFFER])
}
