//! The life of a connection that a captured pod makes. The mirror of `inbound`.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use identity::verify::Role;
use mesh::{Fallback, Outgoing, PlaintextReason, RefuseReason, Route, Target};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use wire::tunnel::{Claim, MAX_DATA};

use crate::batch::{self, Told};
use crate::connections::{Connection, Decision, Security, full_name};
use crate::node::Node;
use crate::pod::Pod;
use crate::pool::{Ends, Key};
use crate::reasons::{EndedEarly, Side};
use crate::shares::Payer;
use crate::splice::{self, plain_leg};
use crate::tunnel::{DRAINING, Tunnel};
use crate::{legs, tunnel};

/// How long a question that the view cannot answer may wait for its next changes.
const ASK: Duration = Duration::from_secs(3);

/// The same where only a peer's capture is awaited, and plaintext is allowed if it does not come.
const ASK_FOR_CAPTURE: Duration = Duration::from_secs(1);

/// A tunnel that was used within this time is taken to be good: data goes with the `Open`. In another, `Open` goes alone.
const TRUSTED: Duration = Duration::from_secs(1);

/// How long the other side may take to its answer: longer than it may try to reach the application.
const CONSENT: Duration = Duration::from_secs(25);

/// Serves one connection from the client's first packet to the last byte. Its error is why it ended early; the client
/// then sees a reset, because that is what its socket does when it is dropped.
pub(crate) async fn serve(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    client: TcpStream,
) -> Result<(), EndedEarly> {
    let dialled = connection.destination().ok_or(EndedEarly::System("getsockopt"))?;
    let outgoing =
        Outgoing { pod: &pod.uid, source: connection.source.ip(), destination: dialled, dice: wire::dice::roll() };

    // What comes before the first byte is in memory of its own: most connections are idle most of their lives.
    let target = match for_client(&client, Box::pin(decide(node, connection, outgoing))).await? {
        Decided::Tunnel(target) => target,
        Decided::Plaintext => return Box::pin(in_clear(node, pod, connection, client)).await,
        Decided::Refuse(because) => return Err(because.into()),
    };

    let mut client = plain_leg(client, Side::Client);
    let lease = Box::pin(lease(node, pod, connection, &target, &client.tcp));
    let mut lease = for_client(&client.tcp, lease).await?;
    node.opened(connection);

    let end = splice::splice(&mut client, &mut lease.tunnel.leg, &connection.bytes).await;
    if end.is_ok() {
        splice::orderly_close(&client.tcp);
    }
    // First the client: it is not to wait for what two proxies still have to say to each other.
    drop(client);
    match end {
        Ok(()) => Box::pin(lease.give_back(node)).await,
        Err(_) => Box::pin(lease.tunnel.reset()).await,
    }
    end
}

/// Does something for a client, unless that one resets its connection meanwhile and has left no word: nobody would hear the
/// answer, and what it takes is wanted by others.
async fn for_client<T>(client: &TcpStream, what: impl Future<Output = Result<T, EndedEarly>>) -> Result<T, EndedEarly> {
    tokio::pin!(what);
    tokio::select! {
        biased;
        done = &mut what => return done,
        _ = client.ready(Interest::ERROR) => {}
    }
    let mut byte = [MaybeUninit::uninit()];
    match SockRef::from(client).peek(&mut byte) {
        Ok(1..) => what.await,
        Ok(0) | Err(_) => Err(EndedEarly::Reset(Side::Client)),
    }
}

/// A tunnel that carries this connection, and no other.
struct Lease {
    tunnel: Box<Tunnel>,
    key: Key,
    ends: Ends,
}

impl Lease {
    /// After both directions ended in order: the tunnel may carry another connection.
    async fn give_back(mut self, node: &Node) {
        if self.tunnel.await_closed().await.is_ok() {
            node.pool.put(self.key, self.tunnel, self.ends);
        }
    }
}

/// Gets a tunnel to the target, a warm one or a new one, and the other side's consent to this connection.
///
/// What the client says meanwhile travels behind the `Open`. It is kept until the consent is there: a server that is about
/// to go refuses as `draining` and has delivered nothing, and only then is it sent once more (T19).
async fn lease(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    target: &Target,
    client: &TcpStream,
) -> Result<Lease, EndedEarly> {
    let (key, ends) = (key(pod, connection, target), ends(node, pod, target));
    let mut ahead = Ahead::default();
    loop {
        let proven = |tunnel: &Tunnel| node.certificates.still_proven(&tunnel.peer, Role::Server).is_ok();
        let warm = node.pool.take(&key, &ends, node.clock.wall(), proven);
        let (mut tunnel, idle) = match warm {
            Some(warm) => (warm.tunnel, Some(warm.idle)),
            None => (dial(node, pod, connection, target).await?, None),
        };
        connection.decide(Decision {
            to: target.address,
            security: Security::Mtls(tunnel.peer.clone()),
            other: Some(full_name(&target.workload)),
            service: target.service.as_ref().map(|service| service.to_string().into()),
        });
        // The longer it lay, the likelier it is that the other side is gone; then nothing but the question is lost.
        let alone = idle.is_some_and(|idle| idle > TRUSTED);
        let consent = ahead.ask(&mut tunnel, claim(connection, target), client, alone).await;
        match consent {
            Ok(()) => {
                connection.bytes.sent.fetch_add(ahead.bytes.len() as u64, Ordering::Relaxed);
                return Ok(Lease { tunnel, key, ends });
            }
            Err(EndedEarly::RefusedByPeer(reason)) if idle.is_some() && reason.as_str() == DRAINING => {}
            Err(early) if idle.is_some() && ahead.sent == 0 && early.is_a_cut() => {}
            Err(early) => return Err(early),
        }
    }
}

/// What the client has said before its connection stands.
#[derive(Default)]
struct Ahead {
    bytes: Vec<u8>,
    /// How much of it went through the present tunnel.
    sent: usize,
}

impl Ahead {
    /// Asks for the connection, and sends what the client says meanwhile, unless the question is to go alone.
    async fn ask(
        &mut self,
        tunnel: &mut Tunnel,
        claim: Claim,
        client: &TcpStream,
        alone: bool,
    ) -> Result<(), EndedEarly> {
        self.sent = 0;
        tunnel.ask(claim);
        // Most clients have spoken by now, which the event queue has not told yet.
        let mut listens = !alone && self.hear(client, Told::NotYet)?;
        if !alone {
            self.send(tunnel).await?;
        }
        tunnel.flush().await?;
        let deadline = Instant::now() + CONSENT;
        loop {
            tokio::select! {
                biased;
                answer = timeout_at(deadline, tunnel.answer()) => {
                    answer.map_err(|_| EndedEarly::ConnectTimeout)??;
                    // What was kept from an earlier attempt, where the question went alone this time.
                    return self.send(tunnel).await;
                }
                readable = client.readable(), if listens => {
                    readable.map_err(|_| EndedEarly::Reset(Side::Client))?;
                    listens = self.hear(client, Told::Yes)?;
                    self.send(tunnel).await?;
                }
            }
        }
    }

    /// Takes in what the client has said by now; `false` where no more is to be heard: it has ended, which is seen again by
    /// whoever reads next, or there is no more room.
    fn hear(&mut self, client: &TcpStream, told: Told) -> Result<bool, EndedEarly> {
        let room = MAX_DATA.saturating_sub(self.bytes.len());
        match batch::with(|batch| batch.read_ahead(client, told, room, &mut self.bytes)) {
            Ok(Some(0)) => Ok(false),
            Ok(_) => Ok(self.bytes.len() < MAX_DATA),
            Err(_) => Err(EndedEarly::Reset(Side::Client)),
        }
    }

    async fn send(&mut self, tunnel: &mut Tunnel) -> Result<(), EndedEarly> {
        if self.sent < self.bytes.len() {
            tunnel.send_ahead(&self.bytes[self.sent..]).await?;
            self.sent = self.bytes.len();
        }
        Ok(())
    }
}

/// Makes a new tunnel.
async fn dial(
    node: &Node,
    pod: &Arc<Pod>,
    connection: &Connection,
    target: &Target,
) -> Result<Box<Tunnel>, EndedEarly> {
    let (config, until) = node.certificates.client(&pod.identity, &target.workload.identity).await?;
    let place = node.budgets.dial(connection.source.ip(), target.address).await?;
    let (outer, own) = legs::to_wire(pod, connection.source.ip(), target.address).await?;
    let pays = (&node.offload, Payer::Pod(pod.uid.clone()));
    let mut tunnel = node.metrics.handshake(connection.direction, tunnel::dial(outer, config, pays)).await?;
    tunnel.own(own, until);
    drop(place);
    node.pool.dialled();
    Ok(tunnel)
}

fn key(pod: &Pod, connection: &Connection, target: &Target) -> Key {
    Key {
        source_pod: pod.uid.clone(),
        source: connection.source.ip(),
        destination_pod: target.workload.pod_uid.clone(),
        destination: target.address,
        identity: target.workload.identity.clone(),
    }
}

fn ends(node: &Node, pod: &Pod, target: &Target) -> Ends {
    let source = node.view.read(|view| view.workload_of(&pod.uid).cloned());
    Ends { source, destination: target.workload.clone() }
}

/// What became of the route.
enum Decided {
    Tunnel(Target),
    /// In clear; where to and why stands in the connection's decision.
    Plaintext,
    Refuse(RefuseReason),
}

/// Asks the view, and waits for it where it does not know.
async fn decide(node: &Node, connection: &Connection, outgoing: Outgoing<'_>) -> Result<Decided, EndedEarly> {
    let started = Instant::now();
    let mut changes = node.view.changes();
    let mut asking = None;
    loop {
        changes.mark_unchanged();
        let fallback = match look(node, connection, outgoing) {
            Route::Tunnel(target) => return Ok(Decided::Tunnel(target)),
            Route::Plaintext { .. } => return Ok(Decided::Plaintext),
            Route::Refuse { because } => return Ok(Decided::Refuse(because)),
            Route::Ask(fallback) => fallback,
        };
        if asking.is_none() {
            asking = Some(node.budgets.look_up(connection.source.ip())?);
        }
        node.ask(outgoing.destination.ip());
        let patience = match fallback {
            Fallback::Plaintext { .. } => ASK_FOR_CAPTURE,
            Fallback::Refuse { .. } => ASK,
        };
        let changed = timeout_at(started + patience, changes.changed()).await;
        if matches!(changed, Ok(Ok(()))) {
            continue;
        }
        match fallback {
            Fallback::Refuse { because } => return Ok(Decided::Refuse(because)),
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
                    return Ok(Decided::Plaintext);
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
    let other = view.workload_at(to.ip()).map(|workload| full_name(workload));
    Decision { to, security: Security::Plaintext(because), other, service: None }
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
    splice::splice_and_close(&mut client, &mut server, &connection.bytes).await
}
