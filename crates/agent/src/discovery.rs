//! The control plane: which pods this node has, and the report of those that are captured and of those that cannot be.
//!
//! One connection for both, made again whenever it is lost. What is known stays meanwhile: a control plane that is gone
//! changes nothing for pods that it has named (P8).

use std::collections::BTreeSet;

use identity::lifecycle;
use mesh::PodUid;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use wire::client::{ClientError, Connected, ControlPlane};
use wire::discovery::{Batch, Change, Kind, Known, NodePod, Removed, Resource};
use wire::report::Report;

use crate::process::Event;

/// What is heard of the control plane.
#[derive(Debug)]
pub(crate) enum Heard {
    /// It answers.
    Connected,
    /// It is lost.
    Lost,
    /// It has named all pods of this node.
    Complete,
    /// A pod of this node, new or changed.
    Pod(NodePod),
    /// A pod is gone from this node.
    PodGone(PodUid),
    /// It has told peers, or is telling them, of these captured pods.
    Confirmed(BTreeSet<PodUid>),
}

/// The loop that hears it has ended, and so has the process.
struct Ended;

/// Follows the control plane for as long as somebody listens.
pub(crate) async fn follow(
    place: ControlPlane,
    reported: watch::Receiver<Report>,
    settled: watch::Receiver<bool>,
    events: mpsc::Sender<Event>,
) {
    let mut unsettled = settled.clone();
    let mut known = Known::default();
    let mut failures = 0_u32;
    loop {
        let lost = match place.connect().await {
            Ok(connected) => {
                tracing::info!(control = %place.address, "connected to the control plane");
                let lost = tokio::select! {
                    lost = discover(&connected, &mut known, &mut failures, &events) => lost,
                    lost = report(&connected, reported.clone(), settled.clone(), &events) => lost,
                };
                let Ok(lost) = lost else { return };
                // The next report is not made before all that came until here is taken in.
                if tell(&events, Heard::Lost).await.is_err() || unsettled.wait_for(|settled| !settled).await.is_err() {
                    return;
                }
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
async fn discover(
    connected: &Connected,
    known: &mut Known,
    failures: &mut u32,
    events: &mpsc::Sender<Event>,
) -> Result<ClientError, Ended> {
    let mut stream = match connected.discover(&[Kind::NodePod], known.clone()).await {
        Ok(stream) => stream,
        Err(error) => return Ok(error),
    };
    *failures = 0;
    tell(events, Heard::Connected).await?;
    let mut complete = false;
    loop {
        // Asking for the next batch accepts the last one, and only then is it known whether that was all.
        let ready = tokio::select! {
            biased;
            batch = stream.next() => Some(batch),
            () = std::future::ready(()) => None,
        };
        *known = stream.known().clone();
        if stream.is_complete() && !complete {
            complete = true;
            tell(events, Heard::Complete).await?;
        }
        let batch = match ready {
            Some(batch) => batch,
            None => stream.next().await,
        };
        match batch {
            Ok(batch) => take_in(batch, events).await?,
            Err(error) => return Ok(error),
        }
    }
}

async fn take_in(batch: Batch, events: &mpsc::Sender<Event>) -> Result<(), Ended> {
    for refused in &batch.refused {
        tracing::error!("the control plane sent what is not understood: {refused}");
    }
    for change in batch.changes {
        match change {
            Change::Set(Resource::NodePod(pod)) => tell(events, Heard::Pod(pod)).await?,
            Change::Removed(Removed::NodePod(pod)) => tell(events, Heard::PodGone(pod)).await?,
            // Nothing else is subscribed to.
            Change::Set(Resource::Mesh(_) | Resource::Bundle(_) | Resource::Heartbeat(_))
            | Change::Removed(Removed::Mesh(_))
            | Change::Nobody(_) => {}
        }
    }
    Ok(())
}

/// Says which pods are captured and which cannot be, once that is known, until the stream ends.
async fn report(
    connected: &Connected,
    reported: watch::Receiver<Report>,
    mut settled: watch::Receiver<bool>,
    events: &mpsc::Sender<Event>,
) -> Result<ClientError, Ended> {
    settled.wait_for(|settled| *settled).await.map_err(|_| Ended)?;
    let mut reports = match connected.report_captures(reported).await {
        Ok(reports) => reports,
        Err(error) => return Ok(error),
    };
    loop {
        match reports.next().await {
            Ok(confirmed) => tell(events, Heard::Confirmed(confirmed)).await?,
            Err(error) => return Ok(error),
        }
    }
}

async fn tell(events: &mpsc::Sender<Event>, heard: Heard) -> Result<(), Ended> {
    events.send(Event::ControlPlane(heard)).await.map_err(|_| Ended)
}
