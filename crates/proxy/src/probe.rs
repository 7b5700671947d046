//! The life of a probe, or of a call of the API server: a connection in clear, from the pod's own node or from an API server's
//! address, where plaintext is refused (T32, T33).
//!
//! What passes is what [`mesh::authorize_probe`] gives out, and nothing that the client says: a request is written anew from
//! what the pod declares. What nobody here can look into is let through in few bytes and for a short time, but for the API
//! server's TLS, whose ends prove themselves to each other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh::{AllowedProbe, MaybeProbe, OwnNode, Passes, RefuseReason, Said};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::batch::Batch;
use crate::connections::{Connection, Decision, Security};
use crate::first_bytes::FirstBytes;
use crate::legs;
use crate::node::Node;
use crate::pod::{Declared, Pod};
use crate::reasons::{EndedEarly, Side};
use crate::splice::{self, Leg, PlainSink, PlainSource, Read, Source, plain_leg};

/// How long the head of a request, or a hello of TLS, may take.
const HEAD: Duration = Duration::from_secs(3);
/// How long what has begun is waited for only to call it by its name.
const NAME: Duration = Duration::from_millis(50);
/// How long a request and its answer may take. A probe's own time-out is a second where nothing else is said; a hook may wait
/// for its pod to drain.
const ANSWER: Duration = Duration::from_secs(600);
/// How long a connection may last that is not looked into, and how many bytes it may carry each way. The kubelet reads 10 KiB
/// of an answer.
const OPAQUE: (Duration, usize) = (Duration::from_secs(60), 64 * 1024);

/// A probe that was let through: both ends, and what may pass.
#[derive(Debug)]
pub(crate) struct Probing {
    client: TcpStream,
    /// What the client said already.
    first: Vec<u8>,
    server: TcpStream,
    passes: Passes,
}

/// Whether a connection that would be refused may be a probe: by who makes it, and by what the pod declares.
pub(crate) fn may_be(node: &Node, pod: &Pod, destination: SocketAddr, source: SocketAddr) -> bool {
    let declared = pod.declared();
    node.view.read(|view| mesh::may_be_probe(view, maybe(node, pod, &declared, destination, source)))
}

/// The node as a pod sees it.
pub(crate) fn own_node<'a>(node: &'a Node, declared: &'a Declared) -> OwnNode<'a> {
    OwnNode { addresses: &node.addresses, gateways: &declared.gateways }
}

fn maybe<'a>(
    node: &'a Node,
    pod: &'a Pod,
    declared: &'a Declared,
    destination: SocketAddr,
    source: SocketAddr,
) -> MaybeProbe<'a> {
    let node = own_node(node, declared);
    MaybeProbe { pod: &pod.uid, destination, source: source.ip(), node, probes: &declared.probes }
}

/// Hears what the client wants, and connects to the application if that is a probe.
///
/// # Errors
/// [`RefuseReason::NotTheProbe`] or [`RefuseReason::NotTheApiServer`], or why there is no connection.
pub(crate) async fn arrive(
    node: &Node,
    pod: &Pod,
    connection: &Connection,
    client: TcpStream,
    mut first: FirstBytes,
) -> Result<Probing, EndedEarly> {
    let destination = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let source = connection.source;
    let said = hear(&client, &mut first, HEAD).await?;
    let allowed = allow(node, pod, connection, destination, &said)?;
    let server = legs::to_application_for_probe(pod, &allowed, source).await?;
    Ok(Probing { client, first: first.into_bytes(), server, passes: allowed.passes() })
}

/// Hears what the client says first, for so long. What has not come to its end by then is nothing that is declared.
async fn hear<'a>(client: &TcpStream, first: &'a mut FirstBytes, patience: Duration) -> Result<Said<'a>, EndedEarly> {
    let deadline = Instant::now() + patience;
    let mut over = false;
    while !over && wire::probe::said(first.bytes()).is_none() {
        over = match timeout_at(deadline, first.more(client)).await {
            Ok(more) => !more?,
            Err(_) => true,
        };
    }
    Ok(match wire::probe::said(first.bytes()) {
        Some(said) => said,
        None if first.bytes().is_empty() => Said::Nothing,
        None => Said::Other,
    })
}

/// Says of a connection that is allowed in clear what strict would let it pass as, if it would: for people, who want to know
/// whom strict refuses. Nothing is decided by it.
///
/// # Errors
/// [`EndedEarly::Reset`] where the client resets meanwhile.
pub(crate) async fn name(
    node: &Node,
    pod: &Pod,
    connection: &Connection,
    client: &TcpStream,
    first: &mut FirstBytes,
) -> Result<(), EndedEarly> {
    let destination = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    if !may_be(node, pod, destination, connection.source) {
        return Ok(());
    }
    let said = hear(client, first, NAME).await?;
    let declared = pod.declared();
    node.view.read(|view| {
        let maybe = maybe(node, pod, &declared, destination, connection.source);
        if let Ok(allowed) = mesh::authorize_probe(view, maybe, &said) {
            connection.expose(&allowed);
        }
    });
    Ok(())
}

/// Asks for permission, and writes it down under the same look at the view: a change that comes later finds it (`judge`).
fn allow(
    node: &Node,
    pod: &Pod,
    connection: &Connection,
    destination: SocketAddr,
    said: &Said<'_>,
) -> Result<AllowedProbe, RefuseReason> {
    let declared = pod.declared();
    node.view.read(|view| {
        let maybe = maybe(node, pod, &declared, destination, connection.source);
        let allowed = mesh::authorize_probe(view, maybe, said)?;
        let security = Security::Plaintext(allowed.because());
        connection.expose(&allowed);
        connection.decide(Decision { to: destination, security, other: None, service: None });
        Ok(allowed)
    })
}

/// Carries what may pass, and ends.
///
/// # Errors
/// [`RefuseReason::NotTheProbe`] where either end says more, or takes longer.
pub(crate) async fn carry(node: &Node, connection: &Connection, probing: Probing) -> Result<(), EndedEarly> {
    node.opened(connection);
    let Probing { client, first, server, passes } = probing;
    let client = plain_leg(client, Side::Client);
    let mut server = plain_leg(server, Side::Server);
    let ended = match passes {
        Passes::Nothing => {
            splice::orderly_close(&client.tcp);
            splice::orderly_close(&server.tcp);
            return Ok(());
        }
        Passes::Request(request) => {
            let Leg { tcp, side, sink, .. } = client;
            let mut client = Leg { source: Only { tcp: tcp.clone(), request: Some(request) }, tcp, side, sink };
            timeout(ANSWER, splice::splice_and_close(&mut client, &mut server, &connection.bytes)).await
        }
        Passes::Opaque => {
            let (mut client, mut server) = (measured(client), measured(server));
            client.source.source.replay(first);
            timeout(OPAQUE.0, splice::splice_and_close(&mut client, &mut server, &connection.bytes)).await
        }
        Passes::Stream => {
            let mut client = client;
            client.source.replay(first);
            return splice::splice_and_close(&mut client, &mut server, &connection.bytes).await;
        }
    };
    ended.unwrap_or(Err(RefuseReason::NotTheProbe.into()))
}

fn measured(leg: Leg<PlainSource, PlainSink>) -> Leg<Measured, PlainSink> {
    let Leg { tcp, side, source, sink } = leg;
    Leg { tcp, side, source: Measured { source, left: OPAQUE.1 }, sink }
}

/// A client of which nothing passes but one request that is not of its own making.
#[derive(Debug)]
struct Only {
    tcp: Arc<TcpStream>,
    request: Option<Vec<u8>>,
}

impl Source for Only {
    async fn ready(&mut self) -> Result<(), EndedEarly> {
        if self.request.is_none() { splice::readable(&self.tcp, Side::Client).await } else { Ok(()) }
    }

    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly> {
        if let Some(request) = self.request.take() {
            batch.put_clear(&request);
            return Ok(Read::Data);
        }
        match batch.read_clear(&self.tcp) {
            Ok(None) => Ok(Read::Nothing),
            Ok(Some(0)) => Ok(Read::Fin),
            // A second request, a body, another protocol: whatever it is, it is not the probe.
            Ok(Some(_)) => Err(RefuseReason::NotTheProbe.into()),
            Err(_) => Err(EndedEarly::Reset(Side::Client)),
        }
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        splice::in_error(&self.tcp).await;
        EndedEarly::Reset(Side::Client)
    }
}

/// A side of which few bytes pass.
#[derive(Debug)]
struct Measured {
    source: PlainSource,
    left: usize,
}

impl Source for Measured {
    async fn ready(&mut self) -> Result<(), EndedEarly> {
        self.source.ready().await
    }

    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly> {
        let read = self.source.read(batch)?;
        self.left = self.left.checked_sub(batch.len()).ok_or(RefuseReason::NotTheProbe)?;
        Ok(read)
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        self.source.cut_after_end().await
    }
}
