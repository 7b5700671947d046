//! Who has not shown an accepted token yet, and how many of them there may be: bookkeeping over values, without a socket.
//!
//! Whoever connects is a stranger, a node as well, until a call's token is accepted. Strangers have places of their own, so
//! that they never stand in front of nodes, and a newcomer is let in rather than kept out: what must go for it is a stranger of
//! its own source where that has its share, or of the source that has most. A node needs its place for some milliseconds, a
//! flood needs it for ever.
//!
//! Within a source the one goes that has waited longest of those that have come as far as most of them have: in the handshake,
//! behind it, or in the review of a token, where a few may stay. So a flood that always stops at the same point ends only its own
//! once a node has come further, or not so far. It is no promise: whoever opens connections faster than a node of the same source
//! comes from one point to the next ends that node's as well, and the node tries again.
//!
//! A source is an address, of IPv6 too: clusters often have the pods of all nodes in one /64, so that to count by networks
//! would put a flood and every node into one account, and a pod that may send no frames of its own making cannot answer for an
//! address that is not its own. (With NET_RAW, on a bridge that checks no addresses, it can, and is several sources.) Where a
//! network translates the addresses of a node's pods to one, the node shares that account with them.
//!
//! Nodes are counted by whom their token stands for: one that leaked opens no more connections than a node may have.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::TurnedAway;

/// Connections of nodes: two processes on each of 5,000 nodes, and as many again while they reconnect.
const NODES: usize = 20_000;
/// Connections of one caller, of which the oldest goes for the next: an agent lets 16 proxies of its node be there, most of them
/// draining, and each of them may have left a connection that nobody has missed yet.
const MOST_OF_CALLER: usize = 32;
/// Strangers. Of nodes that reconnect at the same time so many can be at it in one moment; others are refused, and try again. One
/// that says nothing costs some 24 KiB. One that makes us hold as much as it can costs some 400 KiB: what is read and not taken
/// in, and for each call its headers, its token and a request for a certificate (`server.rs`).
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

/// A token ends with its pod, and within the hour: a stream that began with it ends soon after. For all nodes of a large cluster it
/// is a few questions a second.
const TRUST: Duration = Duration::from_secs(900);

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
    /// How long an accepted token counts on a stream before it is looked up again.
    pub trust: Duration,
}

impl Bounds {
    /// What a process can serve that may have so many descriptors open: each connection has its own before anything runs out.
    pub fn within(descriptors: u64) -> Self {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let all = descriptors.saturating_sub(RESERVED).clamp(LEAST, NODES + STRANGERS);
        let strangers = (all / 4).min(STRANGERS);
        let strangers_of_source = (strangers / SHARE_OF_SOURCE).max(2 * FEW);
        Self { nodes: all - strangers, strangers, strangers_of_source, patience: PATIENCE, trust: TRUST }
    }

    /// Connections of any kind.
    pub(super) fn all(&self) -> usize {
        self.nodes + self.strangers
    }
}

/// How far a stranger has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// TLS is not finished.
    Handshake,
    /// It is, and no token is being looked up.
    Silent,
    /// A token is: it has done what it can.
    Review,
}

/// Which connection. Never used again, and the higher the later.
pub(super) type Id = u64;

/// All connections; `T` is what ends one, `K` is whom an accepted token stands for.
#[derive(Debug)]
pub(super) struct Strangers<T, K> {
    bounds: Bounds,
    next: Id,
    strangers: HashMap<Id, Stranger<T>>,
    sources: HashMap<IpAddr, Source>,
    /// Sources by how many strangers they have: with a flood, it is looked at for each connection.
    weights: BTreeSet<(usize, IpAddr)>,
    nodes: HashMap<Id, Node<T, K>>,
    callers: HashMap<K, BTreeSet<Id>>,
}

#[derive(Debug)]
struct Stranger<T> {
    source: IpAddr,
    due: Instant,
    stage: Stage,
    /// Tokens of it that are being looked up.
    reviews: usize,
    /// It was told that there is no place for it among the nodes.
    without_place: bool,
    end: T,
}

#[derive(Debug)]
struct Node<T, K> {
    caller: K,
    end: T,
}

/// The strangers of one address.
#[derive(Debug, Default)]
struct Source {
    /// By stage; the first of each has waited longest.
    stages: [BTreeSet<Id>; 3],
}

impl Source {
    fn len(&self) -> usize {
        self.stages.iter().map(BTreeSet::len).sum()
    }

    /// The one that goes first.
    fn first_to_go(&self) -> Option<Id> {
        let [handshake, silent, review] = &self.stages;
        // While the API server does not answer, reviews last: without a bound on those that stay, they would take all places.
        let weights =
            [(review.len().saturating_sub(FEW), review), (silent.len(), silent), (handshake.len(), handshake)];
        let (weight, most) = weights.into_iter().max_by_key(|(weight, _)| *weight)?;
        most.first().filter(|_| weight > 0).copied()
    }
}

/// No token was accepted in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Overdue {
    /// So it is ended.
    Ended,
    /// The same, and it has been told why before: there was no place.
    EndedWithoutPlace,
    /// Not yet, or one is still being looked up.
    NotYet,
    /// One was accepted: it will never be.
    Never,
}

/// There are as many connections of nodes as there may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NoPlace {
    /// This one hears it for the first time.
    pub(super) first: bool,
}

/// A connection that was let in, and what had to go for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Admitted<T> {
    pub(super) id: Id,
    pub(super) ended: Option<(T, TurnedAway)>,
}

impl<T, K: Clone + Eq + Hash> Strangers<T, K> {
    pub(super) fn new(bounds: Bounds) -> Self {
        let (strangers, sources, weights) = Default::default();
        Self { bounds, next: 0, strangers, sources, weights, nodes: HashMap::new(), callers: HashMap::new() }
    }

    pub(super) fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Somebody connects.
    ///
    /// # Errors
    /// All places are taken, and nobody has more than a few.
    pub(super) fn admit(&mut self, from: IpAddr, now: Instant, end: T) -> Result<Admitted<T>, TurnedAway> {
        // A listener of both families shows IPv4 as a part of IPv6.
        let source = from.to_canonical();
        let of_source = self.sources.get(&source).map_or(0, Source::len);
        let goes = if of_source >= self.bounds.strangers_of_source {
            Some((source, TurnedAway::TooManyOfSource))
        } else if self.strangers.len() >= self.bounds.strangers {
            let most = self.weights.last().filter(|(weight, _)| *weight > FEW);
            Some((most.ok_or(TurnedAway::Full)?.1, TurnedAway::TooMany))
        } else {
            None
        };
        let ended = match goes {
            Some((source, because)) => Some((self.end_one_of(source).ok_or(TurnedAway::Full)?, because)),
            None => None,
        };
        let id = self.next;
        self.next += 1;
        let (due, stage) = (now + self.bounds.patience, Stage::Handshake);
        self.strangers.insert(id, Stranger { source, due, stage, reviews: 0, without_place: false, end });
        self.change(source, |source| {
            source.stages[stage as usize].insert(id);
        });
        Ok(Admitted { id, ended })
    }

    /// TLS is finished.
    pub(super) fn shaken(&mut self, id: Id) {
        if self.strangers.get(&id).is_some_and(|stranger| stranger.stage == Stage::Handshake) {
            self.moves(id, Stage::Silent);
        }
    }

    /// A token of this connection is being looked up, which may take as long as the API server takes: its time does not end
    /// meanwhile. What begins after the time that it had does not count, or it could go on for ever.
    pub(super) fn review_begins(&mut self, id: Id, now: Instant) -> bool {
        let Some(stranger) = self.strangers.get_mut(&id).filter(|stranger| now < stranger.due) else { return false };
        stranger.reviews += 1;
        if stranger.reviews == 1 {
            self.moves(id, Stage::Review);
        }
        true
    }

    /// The end of a review that counts.
    pub(super) fn review_ends(&mut self, id: Id) {
        let Some(stranger) = self.strangers.get_mut(&id) else { return };
        stranger.reviews -= 1;
        if stranger.reviews == 0 {
            self.moves(id, Stage::Silent);
        }
    }

    /// A token of this connection was accepted: it is a node's for as long as it lasts. What had to go for it: that caller's
    /// oldest, where it has as many as it may have.
    ///
    /// # Errors
    /// There are as many of nodes as there may be.
    pub(super) fn proven(&mut self, id: Id, caller: &K) -> Result<Option<T>, NoPlace> {
        let Some(stranger) = self.strangers.get_mut(&id) else { return Ok(None) };
        let of_caller = self.callers.get(caller).filter(|all| all.len() >= MOST_OF_CALLER);
        let oldest = of_caller.and_then(|all| all.first().copied());
        if oldest.is_none() && self.nodes.len() >= self.bounds.nodes {
            return Err(NoPlace { first: !std::mem::replace(&mut stranger.without_place, true) });
        }
        let ended = oldest.and_then(|oldest| self.remove_node(oldest));
        if let Some(end) = self.remove(id) {
            self.nodes.insert(id, Node { caller: caller.clone(), end });
            self.callers.entry(caller.clone()).or_default().insert(id);
        }
        Ok(ended)
    }

    /// Ends a connection on which no token was accepted in time, if it is one.
    pub(super) fn overdue(&mut self, id: Id, now: Instant) -> Overdue {
        let Some(stranger) = self.strangers.get(&id) else { return Overdue::Never };
        if now < stranger.due || stranger.reviews > 0 {
            return Overdue::NotYet;
        }
        let without_place = stranger.without_place;
        self.remove(id);
        if without_place { Overdue::EndedWithoutPlace } else { Overdue::Ended }
    }

    /// A connection has ended.
    pub(super) fn gone(&mut self, id: Id) {
        self.remove_node(id);
        self.remove(id);
    }

    fn end_one_of(&mut self, source: IpAddr) -> Option<T> {
        let id = self.sources.get(&source)?.first_to_go()?;
        self.remove(id)
    }

    fn remove(&mut self, id: Id) -> Option<T> {
        let stranger = self.strangers.remove(&id)?;
        self.change(stranger.source, |source| {
            source.stages[stranger.stage as usize].remove(&id);
        });
        Some(stranger.end)
    }

    fn remove_node(&mut self, id: Id) -> Option<T> {
        let Node { caller, end } = self.nodes.remove(&id)?;
        if let Some(of_caller) = self.callers.get_mut(&caller) {
            of_caller.remove(&id);
            if of_caller.is_empty() {
                self.callers.remove(&caller);
            }
        }
        Some(end)
    }

    fn moves(&mut self, id: Id, to: Stage) {
        let Some(stranger) = self.strangers.get_mut(&id) else { return };
        let (from, source) = (std::mem::replace(&mut stranger.stage, to), stranger.source);
        self.change(source, |source| {
            source.stages[from as usize].remove(&id);
            source.stages[to as usize].insert(id);
        });
    }

    /// Changes what a source has, and its weight with it.
    fn change(&mut self, address: IpAddr, change: impl FnOnce(&mut Source)) {
        let source = self.sources.entry(address).or_default();
        let before = source.len();
        change(source);
        let after = source.len();
        if before != after {
            self.weights.remove(&(before, address));
            if after > 0 {
                self.weights.insert((after, address));
            }
        }
        if after == 0 {
            self.sources.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests;
