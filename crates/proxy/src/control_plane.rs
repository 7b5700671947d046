//! The control plane: the stream that the view and the trust bundle come from, and who certifies keys.
//!
//! One connection for both, made again whenever it is lost. What is known stays meanwhile: a control plane that is gone
//! changes nothing (P8). The first view of a process goes live only when it is whole: one that lacks a policy would let
//! through what that policy refuses.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use identity::SpiffeId;
use identity::chain::Chain;
use identity::csr::CertificateRequest;
use identity::lifecycle;
use mesh::View;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use wire::client::{ClientError, Connected, Role};
use wire::discovery::{Batch, Change, Heartbeat, Kind, Known, Removed, Resource, Snapshot};

use crate::certs::Authority;
use crate::node::Node;
use crate::process::Args;
use crate::questions::{Questions, Tell};

/// What a proxy subscribes to.
pub(crate) const KINDS: &[Kind] = &[Kind::Settings, Kind::Bundle, Kind::Policy, Kind::Address, Kind::Heartbeat];

/// The life that is asked for: the longest that is given, which is the administrator's choice.
const LONGEST: Duration = Duration::ZERO;

/// How long a certificate request waits for a connection, before it counts as failed and is tried anew.
const WAIT_FOR_CONNECTION: Duration = Duration::from_secs(10);

/// How far this node's clock may be from the control plane's before that is worth a warning: certificates are backdated by
/// a minute, or by a tenth of a short life.
const MOST_SKEW: u64 = 5;

/// The control plane, as this node's proxy has it.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    place: wire::client::ControlPlane,
    node: Arc<Node>,
    connection: watch::Sender<Option<Connection>>,
}

/// The connection, without what would show in a dump.
#[derive(Clone)]
struct Connection(Connected);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl ControlPlane {
    /// Not connected yet.
    pub(crate) fn new(args: &Args, node: Arc<Node>) -> Self {
        let place = wire::client::ControlPlane {
            address: args.control,
            bundle_file: args.bundle.clone(),
            token_file: args.token.clone(),
            node: args.node.clone(),
            role: Role::Proxy,
            time: Arc::new(node.clock.clone()),
        };
        Self { place, node, connection: watch::Sender::new(None) }
    }

    /// Follows the control plane for ever, from what the last proxy left on.
    pub(crate) async fn follow(self: Arc<Self>, left: Option<Snapshot>) {
        let mut received = left.map_or_else(Received::default, |left| Received::resume(left, &self.node));
        let mut failures = 0_u32;
        loop {
            let lost = match self.place.connect().await {
                Ok(connected) => {
                    tracing::info!(control = %self.place.address, "connected to the control plane");
                    self.node.metrics.connected.set(1);
                    self.connection.send_replace(Some(Connection(connected.clone())));
                    let lost = self.discover(&connected, &mut received, &mut failures).await;
                    self.node.questions.lost();
                    self.connection.send_replace(None);
                    self.node.metrics.connected.set(0);
                    lost
                }
                Err(error) => error,
            };
            failures = failures.saturating_add(1);
            lost.log(failures);
            sleep(lifecycle::reconnect_after(failures, wire::dice::fraction())).await;
        }
    }

    /// Takes in what comes, until the stream ends.
    async fn discover(&self, connected: &Connected, received: &mut Received, failures: &mut u32) -> ClientError {
        let mut stream = match connected.discover(KINDS, received.known.clone()).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        let nobodys = self.node.questions.connected();
        if !nobodys.is_empty() {
            self.node.view.change(|view| nobodys.into_iter().for_each(|address| view.forget_nobodys(address)));
        }
        loop {
            // Asking for the next batch accepts the last one, and only then is it known whether that made the view whole.
            let ready = stream.next().now_or_never();
            if stream.is_complete() {
                *failures = 0;
                received.go_live(&self.node);
            }
            let batch = match ready {
                Some(batch) => batch,
                None => tokio::select! {
                    biased;
                    batch = stream.next() => batch,
                    tell = self.node.questions.next() => {
                        match tell {
                            Tell::Ask(address) => stream.ask(address),
                            Tell::Forget(address) => stream.forget(address),
                        }
                        continue;
                    }
                },
            };
            match batch {
                Ok(batch) => {
                    received.take_in(batch, &self.node);
                    if let Some(as_of) = stream.as_of() {
                        received.go_live(&self.node);
                        self.node.view.confirm(as_of);
                    }
                }
                Err(error) => {
                    received.known = stream.known().clone();
                    return error;
                }
            }
        }
    }
}

/// What has come so far, over all streams.
#[derive(Default, Debug)]
struct Received {
    known: Known,
    /// What came before the view was whole, in order.
    staged: Vec<Change>,
    live: bool,
    /// The clocks differed at the last heartbeat.
    skewed: bool,
}

impl Received {
    /// What the last proxy had received. It was whole, and goes live at once.
    fn resume(left: Snapshot, node: &Node) -> Self {
        let mut received = Self { known: left.known, ..Self::default() };
        left.batches.into_iter().for_each(|batch| received.take_in(batch, node));
        received.go_live(node);
        received
    }

    fn take_in(&mut self, batch: Batch, node: &Node) {
        node.view.told_from(&batch.position);
        for refused in &batch.refused {
            tracing::error!("the control plane sent what is not understood: {refused}");
        }
        if batch.kind != Kind::Heartbeat {
            tracing::debug!(kind = %batch.kind, changes = batch.changes.len(), live = self.live, "news");
        }
        let of_the_view =
            |change: &Change| !matches!(change, Change::Set(Resource::Bundle(_) | Resource::Heartbeat(_)));
        let (changes, others): (Vec<_>, Vec<_>) = batch.changes.into_iter().partition(of_the_view);
        for change in others {
            match change {
                Change::Set(Resource::Bundle(bundle)) => node.certificates.set_bundle(bundle),
                Change::Set(Resource::Heartbeat(heartbeat)) => self.compare_clocks(node, heartbeat),
                _ => {}
            }
        }
        if changes.is_empty() {
            return;
        }
        if self.live {
            node.view.change(|view| changes.into_iter().for_each(|change| apply(view, &node.questions, change)));
        } else {
            self.staged.extend(changes);
        }
    }

    /// How far the control plane's clock is ahead of ours (T29), the time on the wire included. It decides nothing: each
    /// certificate is judged by the clock of whoever judges. But two clocks that differ by more than certificates are
    /// backdated refuse each other, and this is where a person sees why.
    fn compare_clocks(&mut self, node: &Node, heartbeat: Heartbeat) {
        let (theirs, ours) = (heartbeat.time.as_secs(), node.clock.wall().as_secs());
        node.metrics.clock_skew.set(i64::try_from(i128::from(theirs) - i128::from(ours)).unwrap_or(i64::MAX));
        let skewed = theirs.abs_diff(ours) > MOST_SKEW;
        if skewed && !self.skewed {
            tracing::warn!(
                control = theirs,
                node = ours,
                "this node's clock and the control plane's are {} s apart: certificates may be refused; set the clock",
                theirs.abs_diff(ours)
            );
        }
        self.skewed = skewed;
    }

    fn go_live(&mut self, node: &Node) {
        if !self.live {
            self.live = true;
            let staged = std::mem::take(&mut self.staged);
            tracing::info!(changes = staged.len(), "the view is whole");
            node.view.change(|view| staged.into_iter().for_each(|change| apply(view, &node.questions, change)));
        }
    }
}

fn apply(view: &mut View, questions: &Questions, change: Change) {
    match change {
        Change::Set(Resource::Mesh(resource)) => {
            match &resource {
                mesh::Resource::Workload(workload) => questions.found(&workload.addresses),
                mesh::Resource::Service(service) => questions.found(&service.addresses),
                mesh::Resource::Policy(_) | mesh::Resource::Settings(_) => {}
            }
            view.apply(resource);
        }
        Change::Nobody(address) => questions.nobody(view, address),
        Change::Removed(Removed::Mesh(key)) => view.remove(&key),
        // Bundles go to the certificates, heartbeats to the clock; pods of the node are not subscribed to.
        Change::Set(Resource::Bundle(_) | Resource::NodePod(_) | Resource::Heartbeat(_))
        | Change::Removed(Removed::NodePod(_)) => {}
    }
}

impl Authority for ControlPlane {
    async fn certify(&self, id: &SpiffeId, request: &CertificateRequest) -> Result<Chain, String> {
        let mut connection = self.connection.subscribe();
        let connected = match timeout(WAIT_FOR_CONNECTION, connection.wait_for(Option::is_some)).await {
            Ok(Ok(connected)) => connected.clone(),
            Ok(Err(_)) | Err(_) => None,
        };
        let Some(Connection(connected)) = connected else {
            return Err("there is no connection to the control plane".into());
        };
        let texts = connected.certify(request.as_pem(), id, LONGEST).await.map_err(|error| error.to_string())?;
        Chain::from_pem(&texts.concat()).map_err(|error| error.to_string())
    }

    async fn restored(&self) {
        let mut connection = self.connection.subscribe();
        // Nobody comes back without having been away. The sender is a part of `self`.
        let _ = connection.wait_for(Option::is_none).await;
        let _ = connection.wait_for(Option::is_some).await;
    }
}

#[cfg(test)]
mod tests {
    use mesh::{MeshSettings, Policy, PolicyName, Resource as Mesh};

    use super::*;
    use crate::clock::Clock;

    fn batch(kind: Kind, resource: Mesh) -> Batch {
        Batch {
            kind,
            changes: vec![Change::Set(Resource::Mesh(resource))],
            refused: Vec::new(),
            position: wire::discovery::Position::default(),
        }
    }

    fn policy() -> Mesh {
        Mesh::Policy(Policy {
            name: PolicyName { namespace: "a".into(), name: "deny".into() },
            scope: mesh::Scope::Mesh,
            action: mesh::Action::Deny,
            rules: Vec::new(),
        })
    }

    #[test]
    fn a_view_with_holes_does_not_go_live_and_a_whole_one_does_in_one_step() {
        let node = Node::new(Clock::default(), 1024);
        let mut received = Received::default();
        received.take_in(batch(Kind::Settings, Mesh::Settings(MeshSettings::default())), &node);
        received.take_in(batch(Kind::Policy, policy()), &node);
        assert!(node.view.read(|view| view.settings().is_none() && view.policies().count() == 0));
        received.go_live(&node);
        assert!(node.view.read(|view| view.settings().is_some() && view.policies().count() == 1));
        assert_eq!(node.view.version(), 1);
    }

    #[test]
    fn a_live_view_takes_in_each_batch_at_once() {
        let node = Node::new(Clock::default(), 1024);
        let mut received = Received::default();
        received.go_live(&node);
        received.take_in(batch(Kind::Policy, policy()), &node);
        assert_eq!(node.view.read(|view| view.policies().count()), 1);
    }
}
