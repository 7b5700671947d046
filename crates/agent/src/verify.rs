//! Captures are looked at whenever the kernel says that something changed in their namespaces, and made anew where somebody
//! changed them (T23). They are looked at now and then, too, as nobody tells of a listener that was closed.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use linux::changes::{Changes, Taken};
use mesh::PodUid;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use wire::pods::Ends;

use crate::capture::{Capture, CaptureError, Standing};
use crate::failure::Failure;
use crate::guard::Strength;
use crate::process::Event;
use crate::watched::watched;

/// The pause between two looks at all captures.
pub(crate) const EVERY: Duration = Duration::from_millis(500);
/// One of so many looks is a whole one; the others are at the listeners.
pub(crate) const WHOLE: u64 = 10;

/// The pause after a look that a change led to: short for so many looks, and for one more after each long one without any. So
/// a program that changes its pod's rules in a loop costs the node a few looks a second (T18), and what is taken away one
/// after the other is back at once.
const SHORT: Duration = Duration::from_millis(10);
const LONG: Duration = Duration::from_millis(320);
const BURST: u32 = 8;

/// What a look found, where it found something.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Something was taken away or changed; it stands again.
    Repaired {
        /// What was broken.
        broken: String,
    },
    /// The last of its connections from before capture has ended, and its guard judges everything now.
    Strengthened,
    /// It was captured too late, and so many connections from before were ended.
    Ended(usize),
    /// These were opened to it before its capture, and are open: mostly none.
    OpenFromBefore(Vec<Ends>),
    /// So many of those were ended, since they are refused by now.
    EndedAsRefused(usize),
    /// The guard on its interface has dropped so many packets since the last time.
    Dropped(u64),
    /// So many flows that no socket has any more were forgotten.
    Forgotten(usize),
    /// It is not as it must be and could not be made anew, or nobody knows how it is. The next look tries again.
    Damaged(Failure),
    /// All of it stands.
    Stands,
    /// Something else about it could not be done. The next look tries again.
    Failed {
        /// What happened.
        sentence: String,
    },
}

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The listeners.
    Listeners,
    /// Everything.
    Whole,
}

/// Follows the changes of one namespace while it lives.
pub(crate) struct Follower(AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Looks at a capture after each change in its namespace, and sends what was found.
///
/// # Errors
/// The kernel does not let the notifications be watched.
pub(crate) fn follow(
    pod: PodUid,
    capture: Arc<Mutex<Capture>>,
    changes: [Changes; 2],
    events: mpsc::Sender<Event>,
) -> io::Result<Follower> {
    let [network, nftables] = changes;
    let changes = [watched(network)?, watched(nftables)?];
    let task = tokio::spawn(async move {
        // When the looks so far would be paid for by long pauses.
        let mut paid = Instant::now();
        loop {
            if changed(&changes).await.is_err() {
                // The looks at all captures go on.
                return;
            }
            let (one, pods) = (capture.clone(), pod.clone());
            let look = move || sweep(vec![(pods, one)], Depth::Whole);
            let found = tokio::task::spawn_blocking(look).await.unwrap_or_default();
            if !found.is_empty() && events.send(Event::Found(found)).await.is_err() {
                return;
            }
            paid = paid.max(Instant::now()) + LONG;
            sleep(SHORT.max(paid.duration_since(Instant::now()).saturating_sub(LONG * BURST))).await;
        }
    });
    Ok(Follower(task.abort_handle()))
}

/// Waits until something has changed, and takes all notifications that are there.
async fn changed(changes: &[AsyncFd<Changes>; 2]) -> io::Result<()> {
    let [network, nftables] = changes;
    loop {
        let any = tokio::select! {
            it = taken(network) => it?,
            it = taken(nftables) => it?,
        };
        if any {
            return Ok(());
        }
    }
}

async fn taken(changes: &AsyncFd<Changes>) -> io::Result<bool> {
    let mut ready = changes.readable().await?;
    match changes.get_ref().take()? {
        Taken::Some => Ok(true),
        Taken::All(any) => {
            ready.clear_ready();
            Ok(any)
        }
    }
}

/// Looks at captures, one after the other. Blocks for some microseconds each.
pub(crate) fn sweep(captures: Vec<(PodUid, Arc<Mutex<Capture>>)>, depth: Depth) -> Vec<(PodUid, Found)> {
    let look = |(pod, capture): (PodUid, Arc<Mutex<Capture>>)| {
        let found = look(&mut capture.lock().unwrap_or_else(PoisonError::into_inner), depth);
        found.into_iter().map(move |found| (pod.clone(), found))
    };
    captures.into_iter().flat_map(look).collect()
}

fn look(capture: &mut Capture, depth: Depth) -> Vec<Found> {
    // A pod that is not captured yet misses nothing.
    if !capture.has_begun() || (depth == Depth::Listeners && capture.closed_listener().is_none()) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let failed = |what: &str, error: &dyn std::fmt::Display| Found::Failed { sentence: format!("{what}: {error}") };
    let damaged = |what: &str, error: &CaptureError| {
        let failure = Failure::Capture { name: error.name(), sentence: format!("{what}: {error}") };
        vec![Found::Damaged(failure)]
    };
    match capture.verify() {
        Ok(Standing::Intact) => {}
        Ok(Standing::Broken(broken)) => match capture.repair() {
            Ok(()) => found.push(Found::Repaired { broken }),
            // A runtime that deletes a pod takes its loopback down before it says so: routes go with it, and connections with
            // them. Where a program has done that itself it has cut off its own pod.
            Err(CaptureError::Netlink(error)) if error.is_down() => return Vec::new(),
            Err(error) => return damaged(&format!("{broken}, and it cannot be made anew"), &error),
        },
        Err(error) => return damaged("it cannot be verified", &error),
    }
    found.push(Found::Stands);
    match capture.strengthen() {
        Ok(false) => {}
        Ok(true) => found.push(Found::Strengthened),
        Err(error) => found.push(failed("its guard cannot be completed", &error)),
    }
    // With a guard that judges everything there is nothing from before.
    let open = match capture.guarded() {
        Some(Strength::Opening) => capture.opened_before(),
        _ => Ok(Vec::new()),
    };
    match open {
        Ok(open) => found.push(Found::OpenFromBefore(open)),
        Err(error) => found.push(failed("what is open from before its capture cannot be listed", &error)),
    }
    match capture.forget_stale_when_due() {
        Ok(0) => {}
        Ok(flows) => found.push(Found::Forgotten(flows)),
        Err(error) => found.push(failed("its flows cannot be looked at", &error)),
    }
    match capture.dropped() {
        Ok(0) => {}
        Ok(packets) => found.push(Found::Dropped(packets)),
        Err(error) => found.push(failed("its guard's counter cannot be read", &error)),
    }
    found
}
