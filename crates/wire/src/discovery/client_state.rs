//! The node's end of delta xDS: what it has, what came, and what to answer. No stream, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::published::decode;
use super::{Change, Kind, Malformed, Position, asked_address, question, removed};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};

/// On a response that more responses complete; on all others the field has the teller's [`Position`]. Other control planes leave it
/// to a version, or empty.
pub(super) const PARTIAL: &str = "partial";
/// Where a node says the position of what it was told, in the metadata of its name.
pub(super) const POSITION: &str = "position";

/// google.rpc.Code INVALID_ARGUMENT, which xDS gives as the code of a refusal.
const INVALID_ARGUMENT: i32 = 3;

/// Resources that are named in a refusal; the others are counted.
const NAMED_REFUSALS: usize = 8;

/// What a node has: the version of each resource, by kind and name. It outlives a stream: given to the next one, only
/// what changed meanwhile is sent, what is gone meanwhile is removed.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Known {
    resources: BTreeMap<Kind, BTreeMap<String, String>>,
    position: Position,
}

impl Known {
    /// How many resources of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.resources.get(&kind).map_or(0, BTreeMap::len)
    }

    /// How far whoever told all this knew the changes of its API server.
    pub fn position(&self) -> &Position {
        &self.position
    }
}

/// Changes that came in one message.
#[derive(PartialEq, Debug)]
pub struct Batch {
    /// Their kind.
    pub kind: Kind,
    /// The changes, in an order in which they can be applied.
    pub changes: Vec<Change>,
    /// What was wrong with the message, resource by resource. The control plane is told; `changes` counts all the same.
    pub refused: Vec<Malformed>,
    /// How far the teller knew the changes of its API server; empty where it did not say.
    pub position: Position,
}

/// A batch that was given out and is not answered yet.
struct Unanswered {
    type_url: String,
    nonce: String,
    kind: Option<Kind>,
    versions: Vec<(String, Option<String>)>,
    refused: Vec<String>,
    complete: bool,
    position: Position,
}

pub(crate) struct ClientState {
    kinds: BTreeSet<Kind>,
    known: Known,
    complete: BTreeSet<Kind>,
    unanswered: Option<Unanswered>,
}

impl ClientState {
    pub(crate) fn new(kinds: &[Kind], known: Known) -> Self {
        Self { kinds: kinds.iter().copied().collect(), known, complete: BTreeSet::new(), unanswered: None }
    }

    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    /// Whether every kind has come wholly, and was accepted, since this stream began. Heartbeats never end.
    pub(crate) fn is_complete(&self) -> bool {
        self.kinds.iter().all(|kind| *kind == Kind::Heartbeat || self.complete.contains(kind))
    }

    /// The first requests of a stream: everything of each kind, but for what is known.
    pub(crate) fn subscribe(&self, node: &str) -> Vec<DeltaDiscoveryRequest> {
        let position = prost_types::Value::from(self.known.position.to_string());
        let metadata = prost_types::Struct { fields: [(POSITION.to_owned(), position)].into() };
        let request = |kind: &Kind| DeltaDiscoveryRequest {
            node: Some(Node { id: node.to_owned(), metadata: Some(metadata.clone()), ..Default::default() }),
            type_url: kind.type_url().to_owned(),
            initial_resource_versions: self.known.resources.get(kind).cloned().unwrap_or_default(),
            ..Default::default()
        };
        self.kinds.iter().map(request).collect()
    }

    /// Asks what has an address. The answer is a resource that has it, unless that is known already, or that there is none;
    /// the control plane then says so when there is one.
    pub(crate) fn ask(address: IpAddr) -> DeltaDiscoveryRequest {
        let resource_names_subscribe = vec![question(address)];
        DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().to_owned(),
            resource_names_subscribe,
            ..Default::default()
        }
    }

    /// No longer asks about an address that nothing has.
    pub(crate) fn forget(address: IpAddr) -> DeltaDiscoveryRequest {
        let resource_names_unsubscribe = vec![question(address)];
        DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().to_owned(),
            resource_names_unsubscribe,
            ..Default::default()
        }
    }

    /// Takes a response. It must be answered by [`ClientState::answer`] before the next one.
    ///
    /// `None` where its type was not subscribed to: nothing in it counts, and the answer refuses it.
    pub(crate) fn receive(&mut self, response: DeltaDiscoveryResponse) -> Option<Batch> {
        let mut unanswered = Unanswered {
            complete: response.system_version_info != PARTIAL,
            position: Position::parse(&response.system_version_info).unwrap_or_default(),
            type_url: response.type_url,
            nonce: response.nonce,
            kind: None,
            versions: Vec::new(),
            refused: Vec::new(),
        };
        let kind = Kind::from_type_url(&unanswered.type_url).filter(|kind| self.kinds.contains(kind));
        let Some(kind) = kind else {
            unanswered.refused.push("nobody subscribed to this type".to_owned());
            self.unanswered = Some(unanswered);
            return None;
        };
        let position = unanswered.position.clone();
        let mut batch = Batch { kind, changes: Vec::new(), refused: Vec::new(), position };
        // Removals first: a resource that is removed and set in one message was replaced.
        for name in response.removed_resources {
            if let Some(asked) = asked_address(&name).filter(|_| kind == Kind::Address) {
                match asked {
                    Ok(address) => batch.changes.push(Change::Nobody(address)),
                    Err(fault) => batch.refused.push(Malformed { kind, name, fault }),
                }
                continue;
            }
            match removed(kind, &name) {
                Ok(key) => {
                    batch.changes.push(Change::Removed(key));
                    unanswered.versions.push((name, None));
                }
                Err(fault) => batch.refused.push(Malformed { kind, name, fault }),
            }
        }
        for resource in response.resources {
            match decode(kind, &resource) {
                Ok(content) => {
                    batch.changes.push(Change::Set(content));
                    unanswered.versions.push((resource.name, Some(resource.version)));
                }
                Err(malformed) => batch.refused.push(malformed),
            }
        }
        unanswered.kind = Some(kind);
        unanswered.refused.extend(batch.refused.iter().map(ToString::to_string));
        self.unanswered = Some(unanswered);
        Some(batch)
    }

    /// The answer to the last response, once: whether the caller took the batch in, and why not.
    ///
    /// What the caller refuses counts as not received, and so does each resource that was malformed; the rest is known
    /// from here on.
    pub(crate) fn answer(&mut self, verdict: Result<(), String>) -> Option<DeltaDiscoveryRequest> {
        let Unanswered { type_url, nonce, kind, versions, mut refused, complete, position } = self.unanswered.take()?;
        match (kind, verdict) {
            (_, Err(because)) => refused.insert(0, because),
            (None, Ok(())) => {}
            // A heartbeat is of its moment: the next stream begins with one of its own.
            (Some(Kind::Heartbeat), Ok(())) => self.known.position.merge(&position),
            (Some(kind), Ok(())) => {
                self.known.position.merge(&position);
                let known = self.known.resources.entry(kind).or_default();
                for (name, version) in versions {
                    match version {
                        Some(version) => known.insert(name, version),
                        None => known.remove(&name),
                    };
                }
                if complete {
                    self.complete.insert(kind);
                }
            }
        }
        let error_detail = (!refused.is_empty()).then(|| Status { code: INVALID_ARGUMENT, message: summary(&refused) });
        Some(DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..Default::default() })
    }
}

fn summary(refused: &[String]) -> String {
    let mut text = refused.iter().take(NAMED_REFUSALS).cloned().collect::<Vec<_>>().join("; ");
    if let Some(more) = refused.len().checked_sub(NAMED_REFUSALS).filter(|more| *more > 0) {
        text.push_str(&format!("; and {more} more"));
    }
    text
}
