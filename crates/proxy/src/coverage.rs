//! What has been seen: one edge per client, server and kind of protection, with counts. It outlives its connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use identity::UnixTime;
use mesh::{PlaintextReason, View};
use serde::Serialize;

use crate::connections::{Connection, Direction, full_name};
use crate::pod::Pod;
use crate::reasons::EndedEarly;

/// The most edges that are kept. Strangers choose their addresses: beyond this the one not seen for longest goes.
const MOST_EDGES: usize = 4096;

/// Who talked to whom, and how.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Debug)]
pub(crate) struct Edge {
    /// Which end this node saw.
    pub(crate) direction: &'static str,
    /// The client: `namespace/name` of its pod where that is known, else its address.
    pub(crate) source: Arc<str>,
    /// The server, likewise.
    pub(crate) destination: Arc<str>,
    /// The server's port.
    pub(crate) port: u16,
    /// `mtls`, `plaintext`, or `none` where nothing came of it.
    pub(crate) security: &'static str,
    /// Why it was in clear, or why it was refused; empty otherwise.
    pub(crate) reason: &'static str,
    /// What an exemption lets through, or would: the request of a probe, or whom the API server calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exposes: Option<Arc<str>>,
}

/// How much of it there was.
#[derive(Clone, Copy, Serialize, Debug)]
pub(crate) struct Counts {
    /// Connections that have ended.
    pub(crate) connections: u64,
    /// Payload from client to server, in bytes.
    pub(crate) sent: u64,
    /// Payload from server to client, in bytes.
    pub(crate) received: u64,
    /// When the last one ended, in seconds since 1970.
    pub(crate) last_seen: u64,
}

/// The edges of this node.
#[derive(Default, Debug)]
pub(crate) struct Coverage {
    edges: Mutex<HashMap<Edge, Counts>>,
}

impl Edge {
    /// The edge that a connection is on, with its other end's name where that is known.
    pub(crate) fn of(connection: &Connection, end: Result<(), &EndedEarly>, other: Option<Arc<str>>) -> Self {
        let decision = connection.decision();
        let to = decision.as_ref().map(|decision| decision.to).or(connection.destination());
        let port = to.map_or(0, |to| to.port());
        let security = decision.as_ref().map_or("none", |decision| decision.security.as_str());
        let reason = match end {
            Err(early) if decision.is_none() => early.facts().name,
            _ => connection.reason(),
        };
        let pod = connection.pod.name.clone();
        let address = |address: Option<std::net::IpAddr>| {
            other.clone().unwrap_or_else(|| address.map_or_else(|| "unknown".into(), |it| it.to_string().into()))
        };
        let (source, destination) = match connection.direction {
            Direction::Outbound => (pod, address(to.map(|to| to.ip()))),
            Direction::Inbound => (address(Some(connection.source.ip())), pod),
        };
        Self {
            direction: connection.direction.as_str(),
            source,
            destination,
            port,
            security,
            reason,
            exposes: connection.exposed().map(|it| it.what.clone()),
        }
    }
}

/// What was opened to a pod before its capture and is open, as edges (T11).
pub(crate) fn from_before(pod: &Pod, view: &View, now: UnixTime) -> HashMap<Edge, Counts> {
    let mut edges = HashMap::new();
    for ends in pod.opened_before() {
        let address = ends.peer.ip();
        let name = view.workload_at(address).map(|it| full_name(it));
        let edge = Edge {
            direction: Direction::Inbound.as_str(),
            source: name.unwrap_or_else(|| address.to_string().into()),
            destination: pod.name.clone(),
            port: ends.own.port(),
            security: "plaintext",
            reason: PlaintextReason::PreCapture.as_str(),
            exposes: None,
        };
        let none = Counts { connections: 0, sent: 0, received: 0, last_seen: now.as_secs() };
        edges.entry(edge).or_insert(none).connections += 1;
    }
    edges
}

impl Coverage {
    /// Remembers a connection that has ended.
    pub(crate) fn add(&self, edge: Edge, sent: u64, received: u64, now: UnixTime) {
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        if edges.len() >= MOST_EDGES && !edges.contains_key(&edge) {
            let oldest = edges.iter().min_by_key(|(_, counts)| counts.last_seen).map(|(edge, _)| edge.clone());
            if let Some(oldest) = oldest {
                edges.remove(&oldest);
            }
        }
        let counts = edges.entry(edge).or_insert(Counts { connections: 0, sent: 0, received: 0, last_seen: 0 });
        counts.connections += 1;
        counts.sent = counts.sent.saturating_add(sent);
        counts.received = counts.received.saturating_add(received);
        counts.last_seen = now.as_secs();
    }

    /// All edges, in a stable order.
    pub(crate) fn all(&self) -> Vec<(Edge, Counts)> {
        let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = edges.iter().map(|(edge, counts)| (edge.clone(), *counts)).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn edge(port: u16) -> Edge {
        Edge {
            direction: "inbound",
            source: "10.0.0.1".into(),
            destination: "a/b".into(),
            port,
            security: "mtls",
            reason: "",
            exposes: None,
        }
    }

    fn at(second: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(second))
    }

    #[test]
    fn the_same_edge_adds_up() {
        let coverage = Coverage::default();
        coverage.add(edge(80), 1, 10, at(5));
        coverage.add(edge(80), 2, 20, at(6));
        let [(_, counts)] = coverage.all()[..] else { panic!("one edge") };
        assert_eq!((counts.connections, counts.sent, counts.received, counts.last_seen), (2, 3, 30, 6));
    }

    #[test]
    fn strangers_cannot_make_it_grow_and_the_oldest_edge_goes_first() {
        let coverage = Coverage::default();
        for port in 0..MOST_EDGES as u16 + 10 {
            coverage.add(edge(port), 0, 0, at(u64::from(port)));
        }
        let all = coverage.all();
        assert_eq!(all.len(), MOST_EDGES);
        assert!(all.iter().all(|(edge, _)| edge.port >= 10));
    }
}
