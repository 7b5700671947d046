//! The life of a connection that a captured pod makes. The mirror of `inbound`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh::{Fallback, Outgoing, PlaintextReason, RefuseReason, Route, Target};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use wire::tunnel::{Claim, Control, FIRST_LEASE};

use crate::connections::{Connection, Decision, Security};
use crate::node::Node;
use crate::pod::Pod;
use crate::reasons::{EndedEarly, Side};
use crate::splice::{self, Piece, Sink, plain_leg};
use crate::{dice, legs, tunnel};

/// How long a question that the view cannot answer may wait for its next changes.
const ASK: Duration = Duration::from_secs(3);

/// The same where only a peer's capture is awaited, and plaintext is allowed if it does not come.
const ASK_FOR_CAPTURE: Duration = Duration::from_secs(1);

/// Serves one connection from the client's first packet to the last byte. Its error is why it ended early; the client
/// then sees a reset, because that is what its socket does when it is dropped.
pub(crate) async fn serve(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    client: TcpStream,
) -> Result<(), EndedEarly> {
    let dialled = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let outgoing = Outgoing { pod: &pod.uid, source: connection.source.ip(), destination: dialled, dice: dice::roll() };

    let target = match decide(node, connection, outgoing).await {
        Decided::Tunnel(target) => target,
        Decided::Plaintext => return in_clear(node, pod, connection, client).await,
        Decided::Refuse(because) => return Err(because.into()),
    };

    let config = node.certificates.client(&pod.identity, &target.workload.identity).await?;
    let place = node.budgets.dial(connection.source.ip(), target.address).await?;
    let (outer, _own) = legs::to_wire(pod, connection.source.ip(), target.address).await?;
    let mut tunnel = node.metrics.handshake(connection.direction, tunnel::dial(outer, config)).await?;
    drop(place);

    connection.decide(Decision {
        to: target.address,
        security: Security::Mtls(tunnel.peer.clone()),
        other: Some(name(&target.workload)),
        service: target.service.as_ref().map(|service| service.to_string().into()),
    });
    node.opened(connection);

    let mut client = plain_leg(client, Side::Client);
    let open = Control::Open { lease: FIRST_LEASE, claim: claim(connection, &target) };
    tunnel.leg.sink.queue(&open);
    // What the client has said by now travels with the `Open`.
    match client.source.next_now()? {
        Some(Piece::Data(first)) => {
            tunnel.leg.sink.write(first).await?;
            connection.bytes.sent.fetch_add(first.len() as u64, Ordering::Relaxed);
        }
        // The end of the stream is seen again by whoever reads next.
        Some(Piece::Fin) | None => tunnel.leg.sink.send_queued().await?,
    }

    let end = splice::splice(&mut client, &mut tunnel.leg, &connection.bytes).await;
    if end.is_ok() {
        splice::orderly_close(&client.tcp);
    }
    // First the client: it is not to wait for what two proxies still have to say to each other.
    drop(client);
    match end {
        Ok(()) => tunnel.finish().await,
        Err(_) => tunnel.reset().await,
    }
    end
}

/// What became of the route.
enum Decided {
    Tunnel(Target),
    /// In clear; where to and why stands in the connection's decision.
    Plaintext,
    Refuse(RefuseReason),
}

/// Asks the view, and waits for it where it does not know.
async fn decide(node: &Node, connection: &Connection, outgoing: Outgoing<'_>) -> Decided {
    let started = Instant::now();
    let mut changes = node.view.changes();
    loop {
        changes.mark_unchanged();
        let fallback = match look(node, connection, outgoing) {
            Route::Tunnel(target) => return Decided::Tunnel(target),
            Route::Plaintext { .. } => return Decided::Plaintext,
            Route::Refuse { because } => return Decided::Refuse(because),
            Route::Ask(fallback) => fallback,
        };
        let patience = match fallback {
            Fallback::Plaintext { .. } => ASK_FOR_CAPTURE,
            Fallback::Refuse { .. } => ASK,
        };
        let changed = timeout_at(started + patience, changes.changed()).await;
        if matches!(changed, Ok(Ok(()))) {
            continue;
        }
        match fallback {
            Fallback::Refuse { because } => return Decided::Refuse(because),
            Fallback::Plaintext { to, because } => {
                // The last look and this decision are one step, or a change between the two would go unseen.
                let still = node.view.read(|view| {
                    let still = mesh::route(view, outgoing) == Route::Ask(fallback);
                    if still {
                        connection.decide(plaintext(view, to, because));
                    }
                    still
                });
                if still {
                    return Decided::Plaintext;
                }
            }
        }
    }
}

/// One look at the view. Plaintext is written down under the same look: a change that comes later finds it (`judge`).
fn look(node: &Node, connection: &Connection, outgoing: Outgoing<'_>) -> Route {
    node.view.read(|view| {
        let route = mesh::route(view, outgoing);
        if let Route::Plaintext { to, because } = route {
            connection.decide(plaintext(view, to, because));
        }
        route
    })
}

fn plaintext(view: &mesh::View, to: std::net::SocketAddr, because: PlaintextReason) -> Decision {
    let other = view.workload_at(to.ip()).map(|workload| name(workload));
    Decision { to, security: Security::Plaintext(because), other, service: None }
}

fn name(workload: &mesh::Workload) -> Arc<str> {
    format!("{}/{}", workload.namespace, workload.name).into()
}

fn claim(connection: &Connection, target: &Target) -> Claim {
    Claim {
        source: connection.source.ip(),
        destination: target.address,
        service: target.service.as_ref().map(ToString::to_string),
    }
}

/// The same life without a tunnel: for a destination that cannot have one, by name.
async fn in_clear(node: &Node, pod: &Arc<Pod>, connection: &Connection, client: TcpStream) -> Result<(), EndedEarly> {
    let to = connection.decision().ok_or(EndedEarly::System("decide"))?.to;
    let (outer, _own) = legs::to_wire(pod, connection.source.ip(), to).await?;
    node.opened(connection);
    let mut client = plain_leg(client, Side::Client);
    let mut server = plain_leg(outer, Side::Server);
    splice::splice(&mut client, &mut server, &connection.bytes).await?;
    splice::orderly_close(&client.tcp);
    splice::orderly_close(&server.tcp);
    Ok(())
}
