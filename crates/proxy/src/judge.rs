//! Open connections, judged anew when the view changes: what would be refused now does not go on (DESIGN, section 6).

use std::sync::Arc;

use mesh::{Fallback, Incoming, MaybeProbe, Mode, Outgoing, PlaintextReason, RefuseReason, Route, View};

use wire::pods::Ends;

use crate::connections::{Connection, Direction, Security};
use crate::node::Node;
use crate::pod::Pod;
use crate::probe;
use crate::reasons::EndedEarly;

/// Cuts every open connection that the view no longer allows.
pub(crate) fn judge(node: &Node) {
    let all = node.connections.all();
    let refused: Vec<(Arc<Connection>, RefuseReason)> = node.view.read(|view| {
        all.into_iter().filter_map(|open| refused_now(node, view, &open).map(|why| (open, why))).collect()
    });
    for (connection, because) in refused {
        connection.cut(EndedEarly::Refused(because));
    }
}

/// What was opened to a pod before its capture and would be refused if it came now. It is in clear, and the agent alone can
/// reach it (T11). What may be a declared probe, or a call of the API server, goes on.
pub(crate) fn refused_from_before(node: &Node, pod: &Pod) -> Vec<Ends> {
    let open = pod.opened_before();
    // Mostly; and this is asked of each pod at each change of the view.
    if open.is_empty() {
        return open;
    }
    let declared = pod.declared();
    let is_refused = |view: &View, ends: &Ends| {
        let (destination, source) = (ends.own, ends.peer.ip());
        let security = mesh::Security::Plaintext(PlaintextReason::PreCapture);
        let denied = mesh::authorize(view, Incoming { pod: &pod.uid, destination, source, security }).err();
        if denied.is_none_or(|denied| NOT_NOW.contains(&denied.because)) {
            return false;
        }
        let own_node = probe::own_node(node, &declared);
        let maybe = MaybeProbe { pod: &pod.uid, destination, source, node: own_node, probes: &declared.probes };
        !mesh::may_be_probe(view, maybe)
    };
    node.view.read(|view| open.into_iter().filter(|ends| is_refused(view, ends)).collect())
}

/// A pod that leaves the view before it leaves the node ends when the agent says so, not in the middle of its farewell.
/// And who is at the other end of an open connection does not change with the age of the view.
const NOT_NOW: [RefuseReason; 3] = [RefuseReason::NoSuchPod, RefuseReason::NoView, RefuseReason::StrictStaleView];

/// Why a connection would be refused if it came now. One that was not decided yet will be, by the new view.
fn refused_now(node: &Node, view: &View, connection: &Connection) -> Option<RefuseReason> {
    let decision = connection.decision()?;
    let because = match connection.direction {
        Direction::Inbound => {
            if let Security::Plaintext(because @ (PlaintextReason::Probe | PlaintextReason::ApiServer)) =
                decision.security
            {
                let declared = connection.pod.declared();
                let maybe = MaybeProbe {
                    pod: &connection.pod.uid,
                    destination: decision.to,
                    source: connection.source.ip(),
                    node: probe::own_node(node, &declared),
                    probes: &declared.probes,
                };
                return mesh::probe_refused_now(view, because, maybe);
            }
            let security = match &decision.security {
                Security::Mtls(peer) => mesh::Security::Mtls(peer),
                Security::Plaintext(because) => mesh::Security::Plaintext(*because),
            };
            let incoming = Incoming {
                pod: &connection.pod.uid,
                destination: decision.to,
                source: connection.source.ip(),
                security,
            };
            mesh::authorize(view, incoming).err()?.because
        }
        Direction::Outbound => match &decision.security {
            // The other end decides about its own connections. But a pod that is gone says nothing any more: its
            // farewell may have been lost with its wire, and without a word its peers would wait for their keepalives.
            Security::Mtls(peer) => {
                let there = view.workload_at(decision.to.ip()).is_some_and(|it| it.identity == *peer.id());
                return (!there).then_some(RefuseReason::UnknownDestination);
            }
            Security::Plaintext(_) => in_clear_no_longer(view, connection, decision.to)?,
        },
    };
    (!NOT_NOW.contains(&because)).then_some(because)
}

/// Why plaintext to this address would be refused now.
fn in_clear_no_longer(view: &View, connection: &Connection, to: std::net::SocketAddr) -> Option<RefuseReason> {
    let outgoing = Outgoing { pod: &connection.pod.uid, source: connection.source.ip(), destination: to, dice: 0 };
    match mesh::route(view, outgoing) {
        Route::Refuse { because } | Route::Ask(Fallback::Refuse { because }) => Some(because),
        // It joined the mesh meanwhile. New connections are tunnels; this one may end in peace unless its port is strict.
        Route::Tunnel(target) => {
            let strict = target.workload.modes.at(to.port()) == Mode::Strict;
            strict.then_some(RefuseReason::Strict)
        }
        Route::Plaintext { .. } | Route::Ask(Fallback::Plaintext { .. }) => None,
    }
}
