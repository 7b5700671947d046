//! The end of a deleted pod's connections, as the kernel sees it. The runtime takes the pod's network away when it has its answer,
//! and what the proxy says to the other ends by then, a reset or an end, still has to leave by it.

use std::time::Duration;

use linux::netlink::Socket;
use mesh::PodUid;
use tokio::time::{Instant, sleep};
use wire::pods::CniResult;

use super::{Node, lock};
use crate::capture::{Capture, CaptureError, is_idle};
use crate::pods::{Action, Request};
use crate::process::Event;
use crate::rules::Marks;

/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(5);
/// So long a runtime waits for it: a pod whose proxy does not let go must be deleted, too.
const LONGEST: Duration = Duration::from_secs(1);

impl Node {
    /// The runtime has its answer when the pod's connections have ended: then it takes the pod's network away.
    pub(super) fn delete(&mut self, request: Request, pod: &PodUid, container: &str) {
        let (answer, others): (Vec<_>, Vec<_>) = self
            .pods
            .delete(request, pod, container)
            .into_iter()
            .partition(|it| matches!(it, Action::Answer(of, _) if *of == request));
        // Where nothing goes nothing ends: the runtime means a sandbox that went before.
        let captured = self.captures.get(pod).filter(|_| !others.is_empty());
        let ending = captured.map(|captured| Ending::of(&lock(&captured.capture)));
        self.act(others);
        match ending.transpose() {
            Ok(None) => self.act(answer),
            Ok(Some(ending)) => {
                let (events, pod) = (self.events.clone(), pod.clone());
                tokio::spawn(async move {
                    let ended = ending.wait().await;
                    // When nobody listens any more the process ends.
                    let _ = events.send(Event::Ended { request, pod, ended }).await;
                });
            }
            // A pod that cannot be looked at must be deleted, too.
            Err(error) => {
                self.shown.journal.problem("ending-unseen", pod.as_str(), &error.to_string());
                self.act(answer);
            }
        }
    }

    /// A deleted pod's connections have ended, or were waited for long enough.
    pub(crate) fn ended(&mut self, request: Request, pod: &PodUid, ended: bool) {
        if !ended {
            self.shown.journal.problem(
                "ending-late",
                pod.as_str(),
                "its network goes before its connections have ended",
            );
        }
        self.answer(request, CniResult::Deleted);
    }
}

/// Watches the connections of the data path in one network namespace, which lives at least as long as this.
struct Ending {
    socket: Socket,
    marks: Marks,
}

impl Ending {
    /// Of a pod that is captured.
    fn of(capture: &Capture) -> Result<Self, CaptureError> {
        Ok(Self { socket: capture.diagnosis()?, marks: capture.plan().marks })
    }

    /// Waits until there is none, [`LONGEST`] at most. Whether there is none.
    async fn wait(mut self) -> bool {
        let deadline = Instant::now() + LONGEST;
        loop {
            let look = tokio::task::spawn_blocking(move || {
                let idle = is_idle(&mut self.socket, self.marks);
                (idle.unwrap_or(false), self)
            });
            // A look that panicked has ended the watch.
            let Ok((ended, again)) = look.await else { return false };
            if ended || Instant::now() >= deadline {
                return ended;
            }
            self = again;
            sleep(LOOK).await;
        }
    }
}
