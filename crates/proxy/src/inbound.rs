//! The life of a connection that a captured pod is to accept. The mirror of `outbound`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use identity::VerifiedPeer;
use identity::verify::Role;
use mesh::{Allowed, Denied, Expectation, Incoming, Mode, RefuseReason};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use wire::tunnel::{Claim, FIRST_LEASE};

use crate::connections::{Connection, Decision, Security, full_name};
use crate::first_bytes::{First, FirstBytes, Guarded, guarded_leg};
use crate::node::Node;
use crate::pod::Pod;
use crate::probe::Probing;
use crate::reasons::{EndedEarly, Side};
use crate::shares::Payer;
use crate::splice::{self, Leg, PlainSink, plain_leg};
use crate::tunnel::Tunnel;
use crate::{legs, probe, tunnel};

/// How long a certificate that contradicts the view may wait for the view: pods come and go faster than news of them.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How long the view may take to know a pod of this node: a proxy that has just started may be told of the pod first by its
/// agent.
const OWN_POD: Duration = Duration::from_secs(3);

/// How long the control plane may take to say who an unknown client is, before it is looked at as unknown.
const LEARN: Duration = Duration::from_millis(300);

/// How long a tunnel may rest between two connections: twice as long as the client's side lets it.
const REST: Duration = Duration::from_secs(60);

/// Serves one connection from the client's first packet to the last byte. Its error is why it ended early; the client
/// then sees a reset, because that is what its socket does when it is dropped. A tunnel that is good for another one is given
/// back.
pub(crate) async fn serve(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    client: TcpStream,
) -> Result<Option<Box<Tunnel>>, EndedEarly> {
    // In memory of its own, which goes before the first byte flows: most connections are idle most of their lives.
    match Box::pin(arrive(node, pod, connection, client)).await? {
        Arrived::InClear(legs) => Box::pin(in_clear(node, connection, legs.0, legs.1)).await.map(|()| None),
        Arrived::Probe(probing) => Box::pin(probe::carry(node, connection, probing)).await.map(|()| None),
        Arrived::Tunnel(tunnel, claim) => Box::pin(lease(node, pod, connection, tunnel, claim)).await.map(Some),
    }
}

/// What a connection turned out to be.
enum Arrived {
    /// In clear, and allowed so: both legs.
    InClear(Box<(Leg<Guarded, PlainSink>, TcpStream)>),
    /// In clear where that is refused, but for this: a probe, or a call of the API server.
    Probe(Probing),
    /// A tunnel, whose client asks for its first connection.
    Tunnel(Box<Tunnel>, Claim),
}

/// Finds out what a connection is.
async fn arrive(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    client: TcpStream,
) -> Result<Arrived, EndedEarly> {
    let destination = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let source = connection.source;
    // Whichever comes first: the client's bytes, or who it is.
    node.ask(source.ip());
    tokio::select! {
        biased;
        _ = client.readable() => {}
        () = node.learn(source.ip(), LEARN) => {}
    }
    let expected = expect(node, pod, destination, source).await?;
    let payer = node.view.read(|view| Payer::at(view, source.ip()));
    let known = payer.is_known();
    let half_read = node.budgets.half_read(source.ip(), known)?;

    let mut first = FirstBytes::new();
    let seen = first.wait(&client, expected.wait).await?;
    let (hello, half_read) = match seen {
        First::Hello => (first, half_read),
        First::Other | First::Silent => {
            let allowed = match allow_in_clear(node, connection, expected, seen) {
                Ok(allowed) => allowed,
                Err(_) if seen == First::Other && probe::may_be(node, pod, destination, source) => {
                    return probe::arrive(node, pod, connection, client, first).await.map(Arrived::Probe);
                }
                Err(early) => return Err(early),
            };
            // Room for a hello that has begun is held until it is one, or is none.
            let half_read = (seen == First::Silent && first.is_undecided()).then_some(half_read);
            let server = legs::to_application(pod, allowed, source).await?;
            let seen = wait_for_either(&client, &mut first, &server, seen).await?;
            if seen != First::Hello {
                if seen == First::Other {
                    probe::name(node, pod, connection, &client, &mut first).await?;
                }
                return Ok(Arrived::InClear(Box::new((guarded_leg(client, first, seen), server))));
            }
            // Before the application has said a word, the client begins a tunnel: its capture is newer than our view.
            (first, half_read.map_or_else(|| node.budgets.half_read(source.ip(), known), Ok)?)
        }
    };

    let config = node.certificates.server(&pod.identity).await?;
    let place = node.budgets.accept(source.ip(), destination).await?;
    let accepting = tunnel::accept(client, hello.into_bytes(), config, (&node.offload, payer));
    let mut tunnel = node.metrics.handshake(connection.direction, accepting).await?;
    drop((place, half_read));
    // The certificate is held against what the view says of its address (T16), which is nothing where that is unknown.
    node.learn(source.ip(), ASK_AGAIN).await;

    let claim = tunnel.receive_open().await?;
    Ok(Arrived::Tunnel(tunnel, claim))
}

/// Serves one connection that came through a tunnel, from its `Open` to the last byte; gives the tunnel back for the next.
pub(crate) async fn lease(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    mut tunnel: Box<Tunnel>,
    claim: Claim,
) -> Result<Box<Tunnel>, EndedEarly> {
    let server = match Box::pin(connect(node, pod, connection, &tunnel, &claim)).await {
        Ok(server) => server,
        Err(early) => {
            Box::pin(tunnel.refuse(early.on_the_wire())).await;
            return Err(early);
        }
    };
    node.opened(connection);

    let mut server = plain_leg(server, Side::Server);
    let end = match tunnel.grant().await {
        Ok(()) => splice::splice(&mut tunnel.leg, &mut server, &connection.bytes).await,
        Err(early) => Err(early),
    };
    if end.is_ok() {
        splice::orderly_close(&server.tcp);
    }
    // First the application: it is not to wait for what two proxies still have to say to each other.
    drop(server);
    if let Err(early) = end {
        Box::pin(tunnel.reset()).await;
        return Err(early);
    }
    tunnel.close_lease().await.map(|()| tunnel)
}

/// What became of a tunnel at rest.
pub(crate) enum Next {
    /// The client has a connection for it.
    Lease(Box<Tunnel>, Claim),
    /// It is over, in order or not: no connection was in it.
    Over,
}

/// Waits for what comes next through a tunnel at rest. Only the client ends one that merely lay too long; this side waits
/// far longer, for clients that do not.
pub(crate) async fn next(pod: &Pod, mut tunnel: Box<Tunnel>) -> Next {
    let open = tokio::select! {
        biased;
        open = timeout(REST, tunnel.next_open()) => open,
        () = pod.until_retired() => {
            tunnel.drain().await;
            return Next::Over;
        }
    };
    match open {
        Ok(Ok(claim)) => Next::Lease(tunnel, claim),
        Ok(Err(_)) | Err(_) => Next::Over,
    }
}

/// Connects to the application, if this client may: by what the connection itself shows, and not by what the client claims.
async fn connect(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    tunnel: &Tunnel,
    claim: &Claim,
) -> Result<TcpStream, EndedEarly> {
    let destination = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let source = connection.source;
    // By address and port: an IPv6 socket address has more in it that only one of the two sides sees.
    let claimed = (claim.source, claim.destination.ip(), claim.destination.port());
    if claimed != (source.ip(), destination.ip(), destination.port()) {
        return Err(EndedEarly::OpenMismatch);
    }
    // A tunnel outlives its handshake: what was proven then must hold for each connection.
    node.certificates.still_proven(&tunnel.peer, Role::Client)?;
    let allowed = allow_peer(node, connection, destination, &tunnel.peer, claim.service.as_deref()).await?;
    if tunnel.lease() == FIRST_LEASE {
        return legs::to_application(pod, allowed, source).await;
    }
    // The tunnel's port has been used towards this application already (T7).
    legs::to_application(pod, allowed, SocketAddr::new(source.ip(), 0)).await
}

async fn expect(
    node: &Node,
    pod: &Pod,
    destination: SocketAddr,
    source: SocketAddr,
) -> Result<Expectation, EndedEarly> {
    let look = || {
        node.view.read(|view| {
            let expected = mesh::expect(view, view.workload_of(&pod.uid)?, destination.port(), source.ip());
            let is_own = view.workload_at(source.ip()).is_none() && {
                let declared = pod.declared();
                probe::own_node(node, &declared).has(view, source.ip())
            };
            Some(if is_own { expected.of_own_node() } else { expected })
        })
    };
    if let Some(expected) = look() {
        return Ok(expected);
    }
    let mut changes = node.view.changes();
    let deadline = Instant::now() + OWN_POD;
    loop {
        changes.mark_unchanged();
        if let Some(expected) = look() {
            return Ok(expected);
        }
        match timeout_at(deadline, changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Err(RefuseReason::NoSuchPod.into()),
        }
    }
}

/// Decides about a client that shows no certificate.
fn allow_in_clear(
    node: &Node,
    connection: &Connection,
    expected: Expectation,
    seen: First,
) -> Result<Allowed, EndedEarly> {
    let because = expected.plaintext;
    let destination = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let allowed = allow(node, connection, destination, mesh::Security::Plaintext(because), || Decision {
        to: destination,
        security: Security::Plaintext(because),
        other: None,
        service: None,
    });
    allowed.map_err(|denied| match denied.because {
        // It has not said that it speaks plaintext; all that is known is that no hello came.
        RefuseReason::Strict | RefuseReason::StrictBypass if seen == First::Silent && expected.mode == Mode::Strict => {
            RefuseReason::HelloTimeout.into()
        }
        because => because.into(),
    })
}

/// Decides about a client that has proven who it is. Where the view says that its address is somebody else's, the view
/// may be late: asks again for a while (T16).
async fn allow_peer(
    node: &Node,
    connection: &Connection,
    destination: SocketAddr,
    peer: &VerifiedPeer,
    service: Option<&str>,
) -> Result<Allowed, EndedEarly> {
    let mut changes = node.view.changes();
    let deadline = Instant::now() + ASK_AGAIN;
    loop {
        changes.mark_unchanged();
        let allowed = allow(node, connection, destination, mesh::Security::Mtls(peer), || Decision {
            to: destination,
            security: Security::Mtls(peer.clone()),
            other: None,
            service: service.map(Into::into),
        });
        match allowed {
            Ok(allowed) => return Ok(allowed),
            Err(denied) if denied.because == RefuseReason::IdentityAddressMismatch => {
                match timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(denied.because.into()),
                }
            }
            Err(denied) => return Err(denied.because.into()),
        }
    }
}

/// Asks for permission, and writes it down under the same look at the view: a change that comes later finds it (`judge`).
fn allow(
    node: &Node,
    connection: &Connection,
    destination: SocketAddr,
    security: mesh::Security<'_>,
    decision: impl FnOnce() -> Decision,
) -> Result<Allowed, Denied> {
    let source = connection.source.ip();
    node.view.read(|view| {
        let allowed = mesh::authorize(view, Incoming { pod: &connection.pod.uid, destination, source, security });
        match &allowed {
            Ok(_) => {
                let other = view.workload_at(source).map(|it| full_name(it));
                connection.decide(Decision { other, ..decision() });
            }
            Err(denied) => tracing::debug!(pod = %connection.pod.name, %source, %denied, "denied"),
        }
        allowed
    })
}

/// A client that has been silent is not kept from a server that speaks first, and its first bytes are examined all the same
/// when they come (T17).
async fn wait_for_either(
    client: &TcpStream,
    first: &mut FirstBytes,
    server: &TcpStream,
    seen: First,
) -> Result<First, EndedEarly> {
    if seen != First::Silent {
        return Ok(seen);
    }
    tokio::select! {
        biased;
        first = first.decide(client) => first,
        _ = server.readable() => Ok(First::Silent),
    }
}

/// The life of a connection in clear.
async fn in_clear(
    node: &Node,
    connection: &Connection,
    mut client: Leg<Guarded, PlainSink>,
    server: TcpStream,
) -> Result<(), EndedEarly> {
    node.opened(connection);
    let mut server = plain_leg(server, Side::Server);
    splice::splice_and_close(&mut client, &mut server, &connection.bytes).await
}
