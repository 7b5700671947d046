//! What this process leaves to the next one: its view and its credentials, as sealed memory that the agent keeps.
//!
//! The agent holds descriptors and never reads what they lead to. A proxy that comes after one that died finds there what
//! it needs to serve at once, with no control plane (P8), and takes it in with the checks of what a stream says or an
//! authority issues.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use identity::estate::{MAX_ESTATE, bequeath, inherit};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use wire::discovery::{MAX_SNAPSHOT, Resource, Snapshot};
use wire::pods::Kept;
use zeroize::Zeroizing;

use crate::agent::State;
use crate::control_plane::KINDS;
use crate::node::Node;

/// Writing a view may take this part of one thread: the pause between two is so many times what the last one took.
const SHARE: u32 = 20;
/// And at least this long.
const PAUSE: Duration = Duration::from_millis(100);
/// For how long what was inherited waits for its pods.
const WAITS: Duration = Duration::from_secs(60);

/// Keeps up to date what the agent is to keep, for as long as the process lives.
pub(crate) async fn keep(node: Arc<Node>, state: watch::Sender<State>) {
    tokio::join!(keep_view(&node, &state), keep_credentials(&node, &state));
}

async fn keep_view(node: &Arc<Node>, state: &watch::Sender<State>) {
    let (mut view, mut certificates) = (node.view.changes(), node.certificates.changes());
    view.mark_changed();
    let mut bundle = None;
    loop {
        // The trust bundle is told of by the certificates.
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            changed = certificates.changed() => {
                if changed.is_err() { return }
                if node.certificates.bundle().as_ref().map(identity::TrustBundle::digest) == bundle { continue }
            }
        }
        let began = Instant::now();
        bundle = node.certificates.bundle().as_ref().map(identity::TrustBundle::digest);
        // First: what is read after it is at least as new.
        let position = node.view.position();
        let resources = resources(node);
        if resources.is_empty() {
            continue;
        }
        let seal = move || linux::sealed::seal("justmtls-view", &Snapshot::encode(resources, &position));
        let sealed = tokio::task::spawn_blocking(seal);
        match sealed.await {
            Ok(Ok(sealed)) => state.send_modify(|state| state.view = Some(Arc::new(sealed))),
            Ok(Err(error)) => tracing::error!(%error, "the view cannot be kept for the next proxy"),
            Err(error) => tracing::error!(%error, "the view cannot be kept for the next proxy"),
        }
        sleep(PAUSE.max(began.elapsed() * SHARE)).await;
    }
}

/// All that the view is made of; nothing while it is not whole.
fn resources(node: &Node) -> Vec<Resource> {
    let Some(bundle) = node.certificates.bundle() else { return Vec::new() };
    // Reference counts under the lock; the copies are made outside.
    let all = node.view.read(|view| {
        let settings = view.settings()?.clone();
        let workloads: Vec<_> = view.workloads().cloned().collect();
        let services: Vec<_> = view.services().cloned().collect();
        Some((settings, workloads, services, view.policies().cloned().collect::<Vec<_>>()))
    });
    let Some((settings, workloads, services, policies)) = all else { return Vec::new() };
    // Policies before workloads: there is no moment in which one lacks those that it names.
    let mut resources = vec![Resource::Bundle(bundle), Resource::Mesh(mesh::Resource::Settings(settings))];
    resources.extend(policies.iter().map(|it| Resource::Mesh(mesh::Resource::Policy((**it).clone()))));
    resources.extend(services.iter().map(|it| Resource::Mesh(mesh::Resource::Service((**it).clone()))));
    resources.extend(workloads.iter().map(|it| Resource::Mesh(mesh::Resource::Workload(Box::new((**it).clone())))));
    resources
}

async fn keep_credentials(node: &Node, state: &watch::Sender<State>) {
    let mut changes = node.certificates.changes();
    loop {
        let svids = node.certificates.all();
        // An empty one takes the place of one with keys, and is not worth making otherwise.
        if !svids.is_empty() || state.borrow().credentials.is_some() {
            let sealed = bequeath(&svids)
                .map_err(io::Error::other)
                .and_then(|bytes| linux::sealed::seal("justmtls-credentials", &bytes));
            match sealed {
                Ok(sealed) => state.send_modify(|state| state.credentials = Some(Arc::new(sealed))),
                Err(error) => tracing::error!(%error, "certificates cannot be kept for the next proxy"),
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Takes in what the last proxy left: credentials wait for their pods, the view is for the control plane's stream to go on
/// from. The trust bundle is part of the view, and credentials are nothing without it.
pub(crate) fn take_over(node: &Arc<Node>, left: Vec<(Kept, OwnedFd)>) -> Option<Snapshot> {
    let of = |what| left.iter().find(|(kept, _)| *kept == what).map(|(_, file)| file);
    let view = read(of(Kept::View)?, MAX_SNAPSHOT)?;
    let snapshot = Snapshot::decode(KINDS, &view).inspect_err(|error| tracing::error!("{error}")).ok()?;
    let bundle = snapshot.bundle()?.clone();
    if let Some(bytes) = of(Kept::Credentials).and_then(|file| read(file, MAX_ESTATE)) {
        let bytes = Zeroizing::new(bytes);
        let svids = inherit(&bytes, &bundle, node.clock.wall());
        tracing::info!(count = svids.len(), "certificates of the last proxy are taken over");
        node.certificates.inherit(svids);
        let certificates = node.certificates.clone();
        tokio::spawn(async move {
            sleep(WAITS).await;
            certificates.disinherit();
        });
    }
    Some(snapshot)
}

fn read(file: &OwnedFd, most: u64) -> Option<Vec<u8>> {
    let refused = |error: &io::Error| tracing::error!(%error, "what the last proxy left cannot be read");
    linux::sealed::read(file, most).inspect_err(refused).ok()
}
