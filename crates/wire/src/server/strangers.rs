//! Who has not shown an accepted token yet, and how many of them there may be: bookkeeping over values, without a socket.
//!
//! Whoever connects is a stranger, a node as well, until a call's token is accepted. Strangers have places of their own, so
//! that they never stand in front of nodes, and a newcomer is let in rather than kept out: what must go for it is the stranger
//! that has waited longest, of its own source where that has its share, or of the source that has most. A node needs its place
//! for some milliseconds, a flood needs it for ever.
//!
//! A source is an address, of IPv6 too: clusters often have the pods of all nodes in one /64, so that to count by networks
//! would put a flood and every node into one account, and a pod without privileges cannot answer for an address that is not its
//! own. Where a network translates the addresses of a node's pods to one, the node shares that account with them, and gets
//! through because the newest of an account are the last that go.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::TurnedAway;

/// Connections of nodes: two processes on each of 5,000 nodes, and as many again while they reconnect.
const NODES: usize = 20_000;
/// Strangers, of whom each may cost some 24 KiB: what all nodes are for a moment when they reconnect at the same time.
const STRANGERS: usize = 2048;
/// The part of the strangers' places that one source may have.
const SHARE_OF_SOURCE: usize = 8;
/// Strangers of one source that are not ended for those of others: agent and proxy of a node, and each while it reconnects. So
/// nodes that all come at once do not end each other.
const FEW: usize = 4;
/// How long a stranger may wait until its token is accepted.
const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors that are left to connections that are being ended, and to everything else: the API server's connections, up to a
/// hundred at the same time, the admin socket, the metrics and files.
const RESERVED: usize = super::accept::ENDING + 384;
/// What is served even where the limit of descriptors is lower than anybody sets it.
const LEAST: usize = 64;

/// How many connections there may be, and for how long without a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Connections on which a token was accepted.
    pub nodes: usize,
    /// Connections on which none was yet.
    pub strangers: usize,
    /// Those of one address.
    pub strangers_of_source: usize,
    /// From the start of a connection to its first accepted token. What is spent on looking it up does not count.
    pub patience: Duration,
}

impl Bounds {
    /// What a process can serve that may have so many descriptors open: each connection has its own before anything runs out.
    pub fn within(descriptors: u64) -> Self {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let all = descriptors.saturating_sub(RESERVED).clamp(LEAST, NODES + STRANGERS);
        let strangers = (all / 4).min(STRANGERS);
        let strangers_of_source = (strangers / SHARE_OF_SOURCE).max(2 * FEW);
        Self { nodes: all - strangers, strangers, strangers_of_source, patience: PATIENCE }
    }

    /// Connections of any kind.
    pub(super) fn all(&self) -> usize {
        self.nodes + self.strangers
    }
}

/// Which connection. Never used again, and the higher the later.
pub(super) type Id = u64;

/// All connections; `T` is what ends one of a stranger.
#[derive(Debug)]
pub(super) struct Strangers<T> {
    bounds: Bounds,
    next: Id,
    strangers: HashMap<Id, Stranger<T>>,
    sources: HashMap<IpAddr, Source>,
    /// Sources by how many of their strangers may be ended: with a flood, it is looked at for each connection.
    weights: BTreeSet<(usize, IpAddr)>,
    nodes: HashSet<Id>,
}

#[derive(Debug)]
struct Stranger<T> {
    source: IpAddr,
    due: Instant,
    /// Tokens of it that are being looked up.
    reviews: usize,
    end: T,
}

/// The strangers of one address.
#[derive(Debug, Default)]
struct Source {
    /// Those that may be ended; the first has waited longest.
    waiting: BTreeSet<Id>,
    /// Those whose token is being looked up: they have done what they can.
    reviewed: usize,
}

/// A connection that was let in, and what had to go for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Admitted<T> {
    pub(super) id: Id,
    pub(super) ended: Option<(T, TurnedAway)>,
}

impl<T> Strangers<T> {
    pub(super) fn new(bounds: Bounds) -> Self {
        let (strangers, sources, nodes) = (HashMap::new(), HashMap::new(), HashSet::new());
        Self { bounds, next: 0, strangers, sources, weights: BTreeSet::new(), nodes }
    }

    pub(super) fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Somebody connects.
    ///
    /// # Errors
    /// All places are taken, and nobody has more than a few that could be ended.
    pub(super) fn admit(&mut self, from: IpAddr, now: Instant, end: T) -> Result<Admitted<T>, TurnedAway> {
        // A listener of both families shows IPv4 as a part of IPv6.
        let source = from.to_canonical();
        let of_source = self.sources.get(&source).map_or(0, |source| source.waiting.len() + source.reviewed);
        let goes = if of_source >= self.bounds.strangers_of_source {
            Some((source, TurnedAway::TooManyOfSource))
        } else if self.strangers.len() >= self.bounds.strangers {
            let most = self.weights.last().filter(|(weight, _)| *weight > FEW);
            Some((most.ok_or(TurnedAway::TooMany)?.1, TurnedAway::TooMany))
        } else {
            None
        };
        let ended = match goes {
            Some((source, because)) => Some((self.end_longest(source).ok_or(because)?, because)),
            None => None,
        };
        let id = self.next;
        self.next += 1;
        self.strangers.insert(id, Stranger { source, due: now + self.bounds.patience, reviews: 0, end });
        self.change(source, |source| {
            source.waiting.insert(id);
        });
        Ok(Admitted { id, ended })
    }

    /// A token of this connection is being looked up, which may take as long as the API server takes: nothing ends it
    /// meanwhile. What begins after the time that it had does not count, or it could go on for ever.
    pub(super) fn review_begins(&mut self, id: Id, now: Instant) -> bool {
        let Some(stranger) = self.strangers.get_mut(&id).filter(|stranger| now < stranger.due) else { return false };
        stranger.reviews += 1;
        let (first, source) = (stranger.reviews == 1, stranger.source);
        if first {
            self.change(source, |source| {
                source.waiting.remove(&id);
                source.reviewed += 1;
            });
        }
        true
    }

    /// The end of a review that counts.
    pub(super) fn review_ends(&mut self, id: Id) {
        let Some(stranger) = self.strangers.get_mut(&id) else { return };
        stranger.reviews -= 1;
        let (last, source) = (stranger.reviews == 0, stranger.source);
        if last {
            self.change(source, |source| {
                source.waiting.insert(id);
                source.reviewed -= 1;
            });
        }
    }

    /// A token of this connection was accepted: it is a node's for as long as it lasts.
    ///
    /// # Errors
    /// There are as many of nodes as there may be.
    pub(super) fn proven(&mut self, id: Id) -> Result<(), TurnedAway> {
        if !self.strangers.contains_key(&id) {
            return Ok(());
        }
        if self.nodes.len() >= self.bounds.nodes {
            return Err(TurnedAway::NoPlace);
        }
        self.remove(id);
        self.nodes.insert(id);
        Ok(())
    }

    /// Ends a connection on which no token was accepted in time. Whether it is one.
    pub(super) fn overdue(&mut self, id: Id, now: Instant) -> bool {
        let overdue = self.strangers.get(&id).is_some_and(|stranger| now >= stranger.due && stranger.reviews == 0);
        overdue && self.remove(id).is_some()
    }

    /// A connection has ended.
    pub(super) fn gone(&mut self, id: Id) {
        self.nodes.remove(&id);
        self.remove(id);
    }

    fn end_longest(&mut self, source: IpAddr) -> Option<T> {
        let id = *self.sources.get(&source)?.waiting.first()?;
        self.remove(id)
    }

    fn remove(&mut self, id: Id) -> Option<T> {
        let stranger = self.strangers.remove(&id)?;
        self.change(stranger.source, |source| {
            if !source.waiting.remove(&id) {
                source.reviewed -= 1;
            }
        });
        Some(stranger.end)
    }

    /// Changes what a source has, and its weight with it.
    fn change(&mut self, address: IpAddr, change: impl FnOnce(&mut Source)) {
        let source = self.sources.entry(address).or_default();
        self.weights.remove(&(source.waiting.len(), address));
        change(source);
        if !source.waiting.is_empty() {
            self.weights.insert((source.waiting.len(), address));
        } else if source.reviewed == 0 {
            self.sources.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests;
