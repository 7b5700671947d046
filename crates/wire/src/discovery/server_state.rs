//! The control plane's end of delta xDS, for one stream: who subscribed to what, and what it has. No stream, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use identity::UnixTime;

use super::client_state::{PARTIAL, POSITION};
use super::{Heartbeat, Kind, Position, Published, Resource, asked_address, question};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// Bytes after which a response is closed and another one begins: far below what a client takes in one message.
const RESPONSE: usize = 4 * 1024 * 1024;

/// The most resources that one stream may name in its subscriptions.
const MAX_NAMES: usize = 500_000;

/// Responses that a stream may leave unanswered: a node answers each as soon as it has read it.
const MAX_UNANSWERED: usize = 4096;

/// The longest text of a refusal that is kept, in characters.
const MAX_DETAIL: usize = 1024;

/// What a node said on its stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asked {
    /// It subscribed, or changed its subscription: a reconciliation with everything of that kind is due.
    Subscribed(Kind),
    /// It wants to know what has these addresses, and no longer those that nothing had.
    Addresses {
        /// Those that it asks about.
        about: Vec<IpAddr>,
        /// Those that it asked about and that are of no interest any more.
        no_longer: Vec<IpAddr>,
    },
    /// It took in a response.
    Accepted {
        /// The kind of the response.
        kind: Kind,
        /// Whether the node has answered everything of that kind that was sent to it.
        current: bool,
    },
    /// It refused a response, or resources in it. It keeps what it had.
    Refused {
        /// The kind of the response.
        kind: Kind,
        /// What it says about it: a stranger's text, printable and bounded.
        detail: String,
    },
}

/// A request that cannot be understood. It ends its stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum BadRequest {
    #[error("the request is for a resource type that is not served")]
    UnknownType,
    #[error("the stream subscribes to more than {MAX_NAMES} resources")]
    TooManyNames,
    #[error("the stream leaves more than {MAX_UNANSWERED} responses unanswered")]
    TooManyUnanswered,
    #[error("the stream says what it knows in a form that no control plane gave it")]
    NoPosition,
    #[error("the stream asks about an address that is none")]
    NotAnAddress,
}

#[derive(Default)]
pub(crate) struct ServerState {
    subscriptions: BTreeMap<Kind, Subscription>,
    last_nonce: u64,
    node: String,
    /// What the node was told by whoever told it last.
    position: Position,
    /// Of what is told from here on.
    own_position: Arc<Position>,
    told: u64,
    /// Addresses that the node asks about, and that it asks about no longer.
    about: Vec<IpAddr>,
    no_longer: Vec<IpAddr>,
}

#[derive(Default)]
struct Subscription {
    everything: bool,
    names: BTreeSet<Arc<str>>,
    /// What the node has, or will have when it has read what was sent: name and version.
    has: BTreeMap<Arc<str>, Arc<str>>,
    /// Names that were asked for since the last reconciliation: whoever asks is answered, also that there is none.
    asked: BTreeSet<Arc<str>>,
    answered: bool,
    unacknowledged: BTreeSet<String>,
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        self.everything || self.names.contains(name)
    }
}

impl ServerState {
    /// What the node calls itself: a claim, printable and bounded, for people to read.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    /// How far those knew the changes of the API server who told the node what it has: a claim.
    pub(crate) fn position(&self) -> &Position {
        &self.position
    }

    /// All that is told from here on is at least as new as this.
    pub(crate) fn set_position(&mut self, position: Arc<Position>) {
        self.own_position = position;
    }

    /// How many resources and removals were sent.
    pub(crate) fn told(&self) -> u64 {
        self.told
    }

    /// What a node has of a kind, or will have when it has read what was sent to it.
    pub(crate) fn has(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        self.subscriptions.get(&kind).into_iter().flat_map(|subscription| subscription.has.keys())
    }

    /// Whether the node goes on answering what it is sent.
    pub(crate) fn check_answers(&self) -> Result<(), BadRequest> {
        let unanswered: usize = self.subscriptions.values().map(|subscription| subscription.unacknowledged.len()).sum();
        if unanswered > MAX_UNANSWERED { Err(BadRequest::TooManyUnanswered) } else { Ok(()) }
    }

    /// The addresses in the last requests, once.
    pub(crate) fn addresses(&mut self) -> Option<Asked> {
        if self.about.is_empty() && self.no_longer.is_empty() {
            return None;
        }
        let (about, no_longer) = (std::mem::take(&mut self.about), std::mem::take(&mut self.no_longer));
        Some(Asked::Addresses { about, no_longer })
    }

    /// Takes a request. `None`: nothing to do about it, but for [`ServerState::addresses`].
    pub(crate) fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<Option<Asked>, BadRequest> {
        let kind = Kind::from_type_url(&request.type_url).ok_or(BadRequest::UnknownType)?;
        if let Some(node) = request.node {
            self.node = printable(&node.id);
            if let Some(prost_types::value::Kind::StringValue(text)) =
                node.metadata.and_then(|mut metadata| metadata.fields.remove(POSITION)?.kind)
            {
                self.position = Position::parse(&text).ok_or(BadRequest::NoPosition)?;
            }
        }
        let first = !self.subscriptions.contains_key(&kind);
        let subscription = self.subscriptions.entry(kind).or_default();
        let (mut subscribe, mut unsubscribe) = (request.resource_names_subscribe, request.resource_names_unsubscribe);
        let everything = subscribe.is_empty();
        if kind == Kind::Address {
            take_addresses(&mut subscribe, &mut self.about)?;
            take_addresses(&mut unsubscribe, &mut self.no_longer)?;
        }
        let subscribe: Vec<Arc<str>> = subscribe.into_iter().map(Into::into).collect();
        if request.initial_resource_versions.len() > MAX_NAMES {
            return Err(BadRequest::TooManyNames);
        }
        if first {
            // A first request without names is for everything; later ones without names are answers.
            subscription.everything = everything;
            subscription.has = request
                .initial_resource_versions
                .into_iter()
                .map(|(name, version)| (name.into(), version.into()))
                .collect();
        }
        let changed = first || !subscribe.is_empty() || !unsubscribe.is_empty();
        for name in subscribe {
            subscription.everything |= &*name == "*";
            subscription.names.insert(name.clone());
            subscription.asked.insert(name);
        }
        for name in unsubscribe {
            subscription.everything &= name != "*";
            subscription.names.remove(name.as_str());
            // Whoever unsubscribes forgets by itself (xDS protocol, "Unsubscribing From Resources").
            if !subscription.wants(&name) {
                subscription.has.remove(name.as_str());
            }
        }
        if subscription.names.len() > MAX_NAMES {
            return Err(BadRequest::TooManyNames);
        }
        // A nonce that is not ours, or was answered before, says nothing.
        let answers = subscription.unacknowledged.remove(&request.response_nonce);
        let current = subscription.unacknowledged.is_empty();
        Ok(match (changed, answers, request.error_detail) {
            (true, ..) => Some(Asked::Subscribed(kind)),
            (false, true, None) => Some(Asked::Accepted { kind, current }),
            (false, true, Some(status)) => Some(Asked::Refused { kind, detail: printable(&status.message) }),
            (false, false, _) => None,
        })
    }

    /// Compares what the node has with `all` resources of a kind; returns what to send. The first comparison of a
    /// subscription sends something even where there is nothing to say, so that the node knows that it has everything.
    pub(crate) fn reconcile<'a>(
        &mut self,
        kind: Kind,
        all: impl IntoIterator<Item = &'a Published>,
    ) -> Vec<DeltaDiscoveryResponse> {
        let Some(subscription) = self.subscriptions.get_mut(&kind) else { return Vec::new() };
        let asked = std::mem::take(&mut subscription.asked);
        let mut gone: BTreeSet<Arc<str>> = subscription.has.keys().cloned().chain(asked.iter().cloned()).collect();
        gone.remove("*");
        let mut set = Vec::new();
        for resource in all {
            if resource.kind() != kind || !subscription.wants(resource.name()) {
                continue;
            }
            let again = asked.contains(resource.name());
            gone.remove(resource.name());
            let (name, version) = resource.key();
            if subscription.has.insert(name, version.clone()) != Some(version) || again {
                set.push(resource);
            }
        }
        gone.iter().for_each(|name| drop(subscription.has.remove(name)));
        let due = !std::mem::replace(&mut subscription.answered, true);
        self.respond(kind, set, gone.iter().map(ToString::to_string).collect(), due)
    }

    /// What to send when these resources of a kind changed or are gone. Nothing before the first comparison: a node is
    /// told of changes to what it was told of.
    pub(crate) fn update<'a>(
        &mut self,
        kind: Kind,
        changed: impl IntoIterator<Item = &'a Published>,
        removed: impl IntoIterator<Item = &'a str>,
    ) -> Vec<DeltaDiscoveryResponse> {
        let Some(subscription) = self.subscriptions.get_mut(&kind).filter(|subscription| subscription.answered) else {
            return Vec::new();
        };
        let gone = removed.into_iter().filter(|name| subscription.has.remove(*name).is_some());
        let gone = gone.map(ToOwned::to_owned).collect();
        let mut set = Vec::new();
        for resource in changed {
            if resource.kind() == kind && subscription.wants(resource.name()) {
                let (name, version) = resource.key();
                if subscription.has.insert(name, version.clone()) != Some(version) {
                    set.push(resource);
                }
            }
        }
        self.respond(kind, set, gone, false)
    }

    /// Says that nothing has these addresses. Nothing before the first comparison.
    pub(crate) fn nobody(&mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<DeltaDiscoveryResponse> {
        if !self.subscriptions.get(&Kind::Address).is_some_and(|subscription| subscription.answered) {
            return Vec::new();
        }
        self.respond(Kind::Address, Vec::new(), addresses.into_iter().map(question).collect(), false)
    }

    /// The next heartbeat, if the node wants any and has answered the last one: each answers what the node said after the
    /// one before, so that a stream that is held up somewhere holds up its heartbeats too.
    pub(crate) fn beat(&mut self, time: UnixTime) -> Option<DeltaDiscoveryResponse> {
        let subscription = self.subscriptions.get(&Kind::Heartbeat)?;
        if !subscription.unacknowledged.is_empty() {
            return None;
        }
        let heartbeat = Published::new(&Resource::Heartbeat(Heartbeat { time }));
        self.respond(Kind::Heartbeat, vec![&heartbeat], Vec::new(), false).pop()
    }

    /// Distributes resources over responses. Removals go first: an address that moved is taken before it is given.
    fn respond(
        &mut self,
        kind: Kind,
        set: Vec<&Published>,
        gone: Vec<String>,
        even_if_empty: bool,
    ) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        if set.is_empty() && gone.is_empty() && !even_if_empty {
            return responses;
        }
        if kind != Kind::Heartbeat {
            self.told += (set.len() + gone.len()) as u64;
        }
        let mut size: usize = gone.iter().map(|name| name.len() + 8).sum();
        let mut response = DeltaDiscoveryResponse { removed_resources: gone, ..Default::default() };
        for resource in set {
            if size + resource.size() > RESPONSE && size > 0 {
                response.system_version_info = PARTIAL.to_owned();
                responses.push(std::mem::take(&mut response));
                size = 0;
            }
            size += resource.size();
            response.resources.push(resource.to_proto());
        }
        responses.push(response);
        let subscription = self.subscriptions.entry(kind).or_default();
        for response in &mut responses {
            self.last_nonce += 1;
            response.nonce = self.last_nonce.to_string();
            response.type_url = kind.type_url().to_owned();
            if response.system_version_info.is_empty() {
                response.system_version_info = self.own_position.to_string();
            }
            subscription.unacknowledged.insert(response.nonce.clone());
        }
        responses
    }
}

/// Takes those names out that stand for an address.
fn take_addresses(names: &mut Vec<String>, addresses: &mut Vec<IpAddr>) -> Result<(), BadRequest> {
    let mut rest = Vec::new();
    for name in names.drain(..) {
        match asked_address(&name) {
            Some(address) => addresses.push(address.map_err(|_| BadRequest::NotAnAddress)?),
            None => rest.push(name),
        }
    }
    *names = rest;
    Ok(())
}

fn printable(text: &str) -> String {
    text.chars().take(MAX_DETAIL).map(|char| if char.is_control() { ' ' } else { char }).collect()
}
