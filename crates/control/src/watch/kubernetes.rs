//! The API server, by lists and watches: each kind of object has a task of its own ([`follow`]), and here is what they come to.
//!
//! No object is kept: what is read goes to the index, and here are the names that there are. Nothing is said to be gone but what
//! a watch says or a whole list lacks; a kind that cannot be followed keeps its last good state, and that is said.

mod events;
mod follow;
mod read;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kube::api::DynamicObject;
use kube::core::Request;
use kube::{Client, Resource};
use manifests::k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use manifests::k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service};
use manifests::k8s_openapi::api::discovery::v1::EndpointSlice;
use manifests::k8s_openapi::api::networking::v1::NetworkPolicy;
use manifests::k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use manifests::{Change, Kind, Object, ObjectKey};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::follow::Follower;
use self::read::{Read, Reading};
use super::{Batch, Positions, decides};
use crate::ROOT_NAMESPACE;
use crate::kubernetes::resource;
use crate::kubernetes::status::Conditions;
use crate::metrics::Metrics;
use crate::problem::Problem;

/// Pieces that may wait, each of [`follow::PIECE`] objects or of what one read of a watch gave: with more, the objects themselves
/// would fill the memory.
const QUEUE: usize = 4;
/// How often it is looked whether every kind is heard of.
const LOOK: Duration = Duration::from_secs(5);
/// A watch is renewed every minute or so, by itself. One that says nothing for this long is not what it was.
const SILENCE: Duration = Duration::from_secs(150);

/// What the task of a kind says.
#[derive(Debug)]
enum Said {
    /// These are there, as read, and these are not any more; with them it is so far, where that is known.
    Objects(Vec<Reading>, Vec<ObjectKey>, Option<Reached>),
    /// The whole list was said.
    Listed(Kind),
    /// The API server answers about this kind: nothing is missing.
    Word(Kind),
    /// It answers, and what was said so far is all up to there.
    Reached(Reached),
    /// It cannot be followed now.
    Failed(Kind, String),
}

/// How far the changes of a kind are known.
#[derive(Debug, Clone, Copy)]
struct Reached {
    kind: Kind,
    /// The last one.
    changed: Option<u64>,
    /// Up to where there is none that is not known; nothing where the kind is not there to be followed.
    reached: Option<u64>,
}

/// How far a kind is followed.
#[derive(Debug)]
struct Followed {
    listed: bool,
    heard: Instant,
    failure: Option<String>,
}

impl Followed {
    fn begun() -> Self {
        Self { listed: false, heard: Instant::now(), failure: None }
    }
}

/// All kinds that decisions read, as the API server has them.
pub(crate) struct Kubernetes {
    said: mpsc::Receiver<Said>,
    kinds: BTreeMap<Kind, Followed>,
    /// Policies of which a readable state was passed on.
    taken: BTreeSet<ObjectKey>,
    /// With the labels of the pods that they are about, as far as these can be read.
    unreadable: BTreeMap<ObjectKey, BTreeMap<String, String>>,
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    conditions: Conditions,
    positions: Positions,
    /// What was said of the kinds last.
    last: Vec<Problem>,
    look: tokio::time::Interval,
    metrics: Arc<Metrics>,
}

impl Kubernetes {
    /// Begins to follow.
    pub(crate) fn follow(client: &Client, metrics: &Arc<Metrics>) -> Self {
        let (sender, said) = mpsc::channel(QUEUE);
        let mut followers = Followers { client, sender, metrics, kinds: BTreeMap::new() };
        followers.all::<Namespace>(Kind::Namespace);
        followers.all::<Node>(Kind::Node);
        followers.all::<Pod>(Kind::Pod);
        followers.all::<Service>(Kind::Service);
        followers.all::<EndpointSlice>(Kind::EndpointSlice);
        followers.all::<NetworkPolicy>(Kind::NetworkPolicy);
        followers.all::<ValidatingWebhookConfiguration>(Kind::ValidatingWebhookConfiguration);
        followers.all::<MutatingWebhookConfiguration>(Kind::MutatingWebhookConfiguration);
        followers.all::<APIService>(Kind::APIService);
        // Settings and records are ours; other ConfigMaps are nobody's business.
        let ours = Request::new(ConfigMap::url_path(&(), Some(ROOT_NAMESPACE)));
        followers.start(vec![ours], Kind::ConfigMap, read::plain::<ConfigMap>);
        for kind in [Kind::PeerAuthentication, Kind::AuthorizationPolicy] {
            followers.policies(kind);
        }
        let kinds = followers.kinds;
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            said,
            kinds,
            taken: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            problems: BTreeMap::new(),
            conditions: Conditions::new(),
            positions: Positions::default(),
            last: Vec::new(),
            look,
            metrics: metrics.clone(),
        }
    }

    /// Whether every kind was listed wholly once: before that nobody is told anything (T10).
    pub(crate) fn is_complete(&self) -> bool {
        self.kinds.values().all(|kind| kind.listed)
    }

    /// Waits for the next thing to say.
    pub(crate) async fn next(&mut self) -> Batch {
        loop {
            let mut changes = Vec::new();
            let news = tokio::select! {
                said = self.said.recv() => said.is_some_and(|said| self.take(said, &mut changes)),
                _ = self.look.tick() => false,
            };
            let of_kinds = self.of_kinds();
            if news || !changes.is_empty() || of_kinds != self.last {
                self.last = of_kinds;
                return self.batch(changes);
            }
        }
    }

    /// Whether there is something to say.
    fn take(&mut self, said: Said, changes: &mut Vec<Change>) -> bool {
        match said {
            Said::Objects(readings, gone, reached) => {
                let kind = readings.first().map(|reading| &reading.key).or(gone.first()).map(|key| key.kind);
                if let Some(kind) = kind {
                    self.heard(kind);
                }
                for reading in readings {
                    self.read(reading, changes);
                }
                for key in gone {
                    self.forget(&key);
                    changes.push(Change::Deleted(key));
                }
                if let Some(reached) = reached {
                    self.reach(reached);
                }
                kind.is_some()
            }
            Said::Listed(kind) => {
                self.heard(kind).listed = true;
                self.is_complete()
            }
            Said::Word(kind) => {
                self.heard(kind);
                false
            }
            Said::Reached(reached) => {
                self.heard(reached.kind);
                self.reach(reached) && self.is_complete()
            }
            Said::Failed(kind, failure) => {
                if let Some(followed) = self.kinds.get_mut(&kind) {
                    followed.failure = Some(failure);
                }
                false
            }
        }
    }

    /// Whether that is news.
    fn reach(&mut self, Reached { kind, changed, reached }: Reached) -> bool {
        let kind = kind.to_string();
        let changes = changed.is_some_and(|changed| Arc::make_mut(&mut self.positions.changed).advance(&kind, changed));
        let reaches = match reached {
            Some(reached) => self.positions.reached.advance(&kind, reached),
            None => self.positions.reached.forget(&kind),
        };
        changes || reaches
    }

    fn heard(&mut self, kind: Kind) -> &mut Followed {
        let followed = self.kinds.entry(kind).or_insert_with(Followed::begun);
        (followed.heard, followed.failure) = (Instant::now(), None);
        followed
    }

    fn read(&mut self, reading: Reading, changes: &mut Vec<Change>) {
        let Reading { key, object, stand_in, concerns, mut problems, condition, version: _ } = reading;
        let is_policy = crate::kubernetes::status::concerns(key.kind);
        match condition {
            Some(condition) => drop(self.conditions.insert(key.clone(), condition)),
            None => drop(self.conditions.remove(&key)),
        }
        match object {
            Some(object) => {
                if is_policy {
                    self.unreadable.remove(&key);
                    if decides(&object) {
                        self.taken.insert(key.clone());
                    } else {
                        self.taken.remove(&key);
                    }
                }
                changes.push(Change::Applied(object));
            }
            // The last good state stays, if there is one.
            None if self.taken.contains(&key) => {}
            None => {
                match concerns {
                    Some(labels) => drop(self.unreadable.insert(key.clone(), labels)),
                    None => drop(self.unreadable.remove(&key)),
                }
                if let Some((stand_in, problem)) = stand_in {
                    problems.push(problem);
                    changes.push(Change::Applied(stand_in));
                }
            }
        }
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key, problems);
        }
    }

    fn forget(&mut self, key: &ObjectKey) {
        self.taken.remove(key);
        self.unreadable.remove(key);
        self.problems.remove(key);
        self.conditions.remove(key);
    }

    /// What is wrong with kinds, and how long ago the one was heard of that was heard of least.
    fn of_kinds(&self) -> Vec<Problem> {
        let silent = self.kinds.values().map(|kind| kind.heard.elapsed()).max().unwrap_or_default();
        self.metrics.watch_silence.set(i64::try_from(silent.as_secs()).unwrap_or(i64::MAX));
        let problem = |(kind, followed): (&Kind, &Followed)| {
            let state = if followed.listed { "the last good state stays" } else { "nothing is served before" };
            let subject = format!("{kind} objects");
            match &followed.failure {
                Some(failure) => Some(Problem::error(subject, format!("cannot be followed: {failure}; {state}"))),
                None if followed.heard.elapsed() > SILENCE => {
                    let message = format!(
                        "were not heard of for more than {} s, and what changes meanwhile is not known here; {state}",
                        SILENCE.as_secs()
                    );
                    Some(Problem::error(subject, message))
                }
                None => None,
            }
        };
        self.kinds.iter().filter_map(problem).collect()
    }

    fn batch(&self, changes: Vec<Change>) -> Batch {
        let is_of_policy = |(key, _): &(&ObjectKey, _)| crate::kubernetes::status::concerns(key.kind);
        let of_policies = self.problems.iter().filter(is_of_policy);
        Batch {
            changes,
            of_policies: of_policies.map(|(key, problems)| (key.clone(), problems.clone())).collect(),
            unreadable: self.unreadable.clone(),
            unlisted: BTreeSet::new(),
            problems: self.last.iter().chain(self.problems.values().flatten()).cloned().collect(),
            conditions: self.conditions.clone(),
            behind: !self.last.is_empty(),
            positions: self.positions.clone(),
        }
    }
}

/// What followers are started with, and the kinds for which there is one.
struct Followers<'a> {
    client: &'a Client,
    sender: mpsc::Sender<Said>,
    metrics: &'a Arc<Metrics>,
    kinds: BTreeMap<Kind, Followed>,
}

impl Followers<'_> {
    fn all<K: Resource<DynamicType = ()> + DeserializeOwned + Into<Object>>(&mut self, kind: Kind) {
        self.start(vec![Request::new(K::url_path(&(), None))], kind, read::plain::<K>);
    }

    /// Istio's kinds, in each version in which a cluster may have them.
    fn policies(&mut self, kind: Kind) {
        let place = |version: &&str| Request::new(DynamicObject::url_path(&resource(kind, version), None));
        let read: Read = match kind {
            Kind::PeerAuthentication => |json| read::policy(Kind::PeerAuthentication, json),
            _ => |json| read::policy(Kind::AuthorizationPolicy, json),
        };
        self.start(kind.api_versions().iter().map(place).collect(), kind, read);
    }

    fn start(&mut self, places: Vec<Request>, kind: Kind, read: Read) {
        self.kinds.insert(kind, Followed::begun());
        let follower = Follower::new(self.client, places, kind, read, self.sender.clone(), self.metrics.clone());
        tokio::spawn(follower.run());
    }
}
