//! One kind: listed wholly, and then watched from there; listed anew when the API server has forgotten where we were.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{ListMeta, ListParams, WatchParams};
use kube::core::Request;
use manifests::{Kind, ObjectKey};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::events::{Event, Events};
use super::read::{Read, Reading};
use super::{Reached, Said};
use crate::kubernetes::{Failure, ask, pause};
use crate::metrics::Metrics;

/// Objects of a list that are passed on at once.
pub(super) const PIECE: usize = 200;
/// Objects of one page of a list.
const PAGE: u32 = 500;
/// How long a watch lasts before it is renewed, at least; so that a connection that is dead is noticed.
const WATCH: Duration = Duration::from_secs(60);
/// How much longer, at most: not all at once.
const SPREAD: Duration = Duration::from_secs(20);
/// How much longer than it was to last a watch may say nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a list as a stream may say nothing.
const LIST_PATIENCE: Duration = Duration::from_secs(30);
/// How often a kind that the cluster does not have is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How often in a row a kind of which there were objects must be missing before it counts as gone, with them.
const GONE_AFTER: usize = 4;

/// Follows one kind for as long as somebody listens.
pub(super) struct Follower {
    client: Client,
    /// Where the kind is, in each version that a cluster may have; the first is asked first.
    places: Vec<Request>,
    /// Which of them is asked.
    version: usize,
    kind: Kind,
    read: Read,
    said: mpsc::Sender<Said>,
    metrics: Arc<Metrics>,
    /// Lists come as a stream, where the API server can.
    streams: bool,
    /// All that was said to be there, also by a list that did not come to its end, and not to be gone.
    known: HashSet<ObjectKey>,
    /// The last change that was seen.
    changed: Option<u64>,
    /// How often in a row there was no such kind.
    missing: usize,
}

/// Why a list or a watch ended.
enum End {
    /// Something is not as it should be.
    Failure(Failure),
    /// Nobody listens any more.
    Over,
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// One page of a list.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(default)]
    metadata: ListMeta,
    /// Of an empty list some servers say `null`.
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

impl Follower {
    pub(super) fn new(
        client: &Client,
        places: Vec<Request>,
        kind: Kind,
        read: Read,
        said: mpsc::Sender<Said>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let client = client.clone();
        let known = HashSet::new();
        Self { client, places, version: 0, kind, read, said, metrics, streams: true, known, changed: None, missing: 0 }
    }

    pub(super) async fn run(mut self) {
        let mut from: Option<String> = None;
        let mut failures = 0;
        loop {
            let result = match &from {
                None => self.list().await,
                Some(version) => self.watch(version.clone()).await,
            };
            let failure = match result {
                Ok(version) => {
                    (from, failures, self.missing) = (Some(version), 0, 0);
                    if self.say(Said::Word(self.kind)).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err((_, End::Over)) => return,
                Err((reached, End::Failure(failure))) => {
                    from = reached.or(from);
                    failure
                }
            };
            let said = match failure {
                Failure::Gone => {
                    debug!(kind = %self.kind, "where the watch was is forgotten; the kind is listed anew");
                    from = None;
                    // Once at a time: an API server that forgets at once is none that can be followed.
                    failures += 1;
                    if failures < 3 { None } else { Some(Failure::Gone.to_string()) }
                }
                Failure::Absent => {
                    from = None;
                    match self.absent().await {
                        Ok(()) => None,
                        Err(End::Over) => return,
                        Err(End::Failure(failure)) => Some(failure.to_string()),
                    }
                }
                failure => {
                    failures += 1;
                    Some(failure.to_string())
                }
            };
            if let Some(text) = said
                && self.say(Said::Failed(self.kind, text)).await.is_err()
            {
                return;
            }
            // The next version of a kind is asked for at once.
            let wait = match self.missing {
                0 => pause(failures),
                missing if missing % self.places.len() == 0 => LOOK_AGAIN,
                _ => Duration::ZERO,
            };
            sleep(wait).await;
        }
    }

    fn place(&self) -> &Request {
        &self.places[self.version % self.places.len()]
    }

    async fn say(&self, said: Said) -> Result<(), End> {
        self.said.send(said).await.map_err(|_| End::Over)
    }

    /// All of the kind, and the version from which to watch.
    async fn list(&mut self) -> Result<String, (Option<String>, End)> {
        if self.streams {
            match self.list_as_stream().await {
                Err(End::Failure(Failure::Refused(because))) => {
                    debug!(kind = %self.kind, because, "lists come by pages: the API server does not stream them");
                    self.streams = false;
                }
                result => return self.counted(result),
            }
        }
        let result = self.list_by_pages().await;
        self.counted(result)
    }

    fn counted(&self, listed: Result<String, End>) -> Result<String, (Option<String>, End)> {
        self.metrics.lists.inc_by(u64::from(listed.is_ok()));
        listed.map_err(|end| (None, end))
    }

    async fn list_as_stream(&mut self) -> Result<String, End> {
        let parameters = WatchParams::streaming_lists().timeout(seconds(WATCH + SPREAD));
        // No version: at least as new as what is there now.
        let mut events = Events::of(&self.client, self.place().watch(&parameters, ""), self.read).await?;
        let mut seen = HashSet::new();
        loop {
            let came = match timeout(LIST_PATIENCE, events.next()).await {
                Ok(Some(came)) => came,
                // A server that knows nothing of such lists watches, and never says that the list is over.
                Ok(None) | Err(_) => return Err(Failure::Refused("the list does not end".to_owned()).into()),
            };
            let mut readings = Vec::new();
            let mut end = None;
            for event in came {
                match event? {
                    Event::There(reading) => {
                        seen.insert(reading.key.clone());
                        readings.push(reading);
                    }
                    Event::Gone(key, _) => {
                        seen.remove(&key);
                        readings.retain(|reading: &Reading| reading.key != key);
                    }
                    Event::Bookmark { version, ends_list: true } => {
                        end = Some(version);
                        break;
                    }
                    Event::Bookmark { ends_list: false, .. } => {}
                }
            }
            self.there(readings).await?;
            if let Some(version) = end {
                // What came in the same piece behind the bookmark is said again by the watch that begins there.
                return self.listed(seen, Some(&version)).await.map(|()| version);
            }
        }
    }

    async fn list_by_pages(&mut self) -> Result<String, End> {
        let mut parameters = ListParams::default().limit(PAGE);
        let mut seen = HashSet::new();
        loop {
            let request =
                self.place().list(&parameters).map_err(|error| Failure::from(kube::Error::BuildRequest(error)))?;
            let text = ask(self.client.request_text(request)).await?;
            let unreadable = |error| Failure::from(kube::Error::SerdeError(error));
            let page: Page<'_> = serde_json::from_str(&text).map_err(unreadable)?;
            let mut readings = Vec::with_capacity(PIECE);
            for object in page.items.unwrap_or_default() {
                let reading = (self.read)(object.get()).map_err(unreadable)?;
                seen.insert(reading.key.clone());
                readings.push(reading);
                if readings.len() == PIECE {
                    self.there(std::mem::take(&mut readings)).await?;
                }
            }
            self.there(readings).await?;
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters = parameters.continue_token(&token),
                None => {
                    let version = page.metadata.resource_version.unwrap_or_default();
                    return self.listed(seen, Some(&version)).await.map(|()| version);
                }
            }
        }
    }

    /// A piece of a list. Should the list not come to its end, the next one says what of this is gone.
    async fn there(&mut self, readings: Vec<Reading>) -> Result<(), End> {
        self.known.extend(readings.iter().map(|reading| reading.key.clone()));
        self.changed =
            readings.iter().filter_map(|reading| number(reading.version.as_deref()?)).max().max(self.changed);
        self.say(Said::Objects(readings, Vec::new(), None)).await
    }

    /// The list is whole, as of a version: what it lacks is gone.
    async fn listed(&mut self, seen: HashSet<ObjectKey>, version: Option<&str>) -> Result<(), End> {
        let gone: Vec<_> = self.known.difference(&seen).cloned().collect();
        self.known = seen;
        if !gone.is_empty() {
            self.say(Said::Objects(Vec::new(), gone, None)).await?;
        }
        self.say(Said::Reached(self.at(version))).await?;
        self.say(Said::Listed(self.kind)).await
    }

    /// How far it is.
    fn at(&self, reached: Option<&str>) -> Reached {
        Reached { kind: self.kind, changed: self.changed, reached: reached.and_then(number) }
    }

    /// What changes from a version on, until the watch is to be renewed: the version that it came to, also where it fails.
    async fn watch(&mut self, from: String) -> Result<String, (Option<String>, End)> {
        let mut version = from;
        match self.watch_from(&mut version).await {
            Ok(()) => Ok(version),
            Err(end) => Err((Some(version), end)),
        }
    }

    async fn watch_from(&mut self, version: &mut String) -> Result<(), End> {
        let lasts = WATCH + SPREAD.mul_f64(wire::dice::fraction());
        let parameters = WatchParams::default().timeout(seconds(lasts));
        let mut events = Events::of(&self.client, self.place().watch(&parameters, version), self.read).await?;
        self.say(Said::Word(self.kind)).await?;
        loop {
            let came = match timeout(lasts + PATIENCE, events.next()).await {
                Ok(Some(came)) => came,
                Ok(None) => return Ok(()),
                Err(_) => return Err(Failure::Away("a watch says nothing and does not end".to_owned()).into()),
            };
            let mut readings: Vec<Reading> = Vec::new();
            let mut gone: Vec<ObjectKey> = Vec::new();
            let mut failure = None;
            for event in came {
                let reached = match event {
                    Ok(Event::There(reading)) => {
                        let reached = reading.version.clone();
                        self.changed = reached.as_deref().and_then(number).max(self.changed);
                        self.known.insert(reading.key.clone());
                        gone.retain(|key| *key != reading.key);
                        readings.push(reading);
                        reached
                    }
                    Ok(Event::Gone(key, reached)) => {
                        self.changed = reached.as_deref().and_then(number).max(self.changed);
                        self.known.remove(&key);
                        readings.retain(|reading| reading.key != key);
                        gone.push(key);
                        reached
                    }
                    Ok(Event::Bookmark { version, .. }) => Some(version),
                    Err(failed) => {
                        failure = Some(failed);
                        None
                    }
                };
                if let Some(reached) = reached {
                    *version = reached;
                }
            }
            // An error takes nothing back of what was said before it.
            let (nothing, reached) = (readings.is_empty() && gone.is_empty(), self.at(Some(version)));
            let said = if nothing { Said::Reached(reached) } else { Said::Objects(readings, gone, Some(reached)) };
            self.say(said).await?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
        }
    }

    /// There is no such kind, or none yet: that is an empty list, if the API server is ready. (One that is starting does not
    /// know yet which kinds it has.) Where there were objects of it, it is not believed at once.
    async fn absent(&mut self) -> Result<(), End> {
        self.version = self.version.wrapping_add(1);
        self.missing = self.missing.saturating_add(1);
        let (missing, versions) = (self.missing, self.places.len());
        if missing % versions != 0 {
            return Ok(());
        }
        let request = axum::http::Request::get("/readyz").body(Vec::new());
        let request = request.map_err(|error| Failure::from(kube::Error::HttpError(error)))?;
        ask(self.client.request_text(request)).await?;
        if !self.known.is_empty() && missing < GONE_AFTER * versions {
            return Err(Failure::Absent.into());
        }
        if missing == versions {
            info!(kind = %self.kind, "the cluster has no such kind; it is looked for now and then");
        }
        self.listed(HashSet::new(), None).await
    }
}

/// A version as a number, which Kubernetes promises since 1.35 and etcd always gave.
fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
