//! A discovery stream, as the control plane sees it.

use std::net::IpAddr;
use std::sync::Arc;

use identity::UnixTime;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::Refused;
use crate::discovery::{Asked, Kind, Position, Published, ServerState};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// One node's discovery stream: what it asks and answers, and what it is sent.
pub struct DiscoveryStream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    state: ServerState,
}

impl DiscoveryStream {
    pub(super) fn new(
        requests: Streaming<DeltaDiscoveryRequest>,
        responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Self {
        Self { requests, responses, state: ServerState::default() }
    }

    /// Waits until the node says something. `None`: the stream has ended. Cancel safe.
    ///
    /// # Errors
    /// The node asked for something that makes no sense; return it from the handler.
    pub async fn next(&mut self) -> Result<Option<Asked>, Refused> {
        self.state.check_answers().map_err(|error| Refused::BadRequest(error.to_string()))?;
        if let Some(addresses) = self.state.addresses() {
            return Ok(Some(addresses));
        }
        // A broken connection is an end like any other: whoever was there connects anew.
        while let Ok(Some(request)) = self.requests.message().await {
            match self.state.receive(request) {
                Ok(Some(asked)) => return Ok(Some(asked)),
                Ok(None) => {
                    if let Some(addresses) = self.state.addresses() {
                        return Ok(Some(addresses));
                    }
                }
                Err(error) => return Err(Refused::BadRequest(error.to_string())),
            }
        }
        Ok(None)
    }

    /// What the node calls itself, once it has said something: a claim, printable and bounded.
    pub fn node(&self) -> &str {
        self.state.node()
    }

    /// How far those knew the changes of the API server who told the node what it has: a claim, and known once it has said
    /// something.
    pub fn position(&self) -> &Position {
        self.state.position()
    }

    /// All that is told from here on is at least as new as this.
    pub fn set_position(&mut self, position: Arc<Position>) {
        self.state.set_position(position);
    }

    /// How many resources and removals were sent on this stream: what a subscriber costs.
    pub fn told(&self) -> u64 {
        self.state.told()
    }

    /// Sends whatever makes the node's knowledge of a kind equal to `all`: due after [`Asked::Subscribed`], right at any
    /// time. What the node has and `all` lacks is removed, so that `all` must be everything.
    ///
    /// Waits while the node is slow to read. Not cancel safe: run it in the body of a `select!`, not as a branch.
    /// Returns how many messages were sent; the node answers each.
    pub async fn reconcile<'a>(&mut self, kind: Kind, all: impl IntoIterator<Item = &'a Published>) -> usize {
        let responses = self.state.reconcile(kind, all);
        self.send(responses).await
    }

    /// Sends what of these changes concerns the node. Nothing before the first [`DiscoveryStream::reconcile`] of that
    /// kind. Waiting and cancelling as there.
    pub async fn update<'a>(
        &mut self,
        kind: Kind,
        changed: impl IntoIterator<Item = &'a Published>,
        removed: impl IntoIterator<Item = &'a str>,
    ) -> usize {
        let responses = self.state.update(kind, changed, removed);
        self.send(responses).await
    }

    /// The names of what the node has of a kind, or will have when it has read what was sent to it.
    pub fn has(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        self.state.has(kind)
    }

    /// Says that nothing has these addresses, which the node asked about. Waiting and cancelling as for
    /// [`DiscoveryStream::reconcile`].
    pub async fn nobody(&mut self, addresses: impl IntoIterator<Item = IpAddr>) -> usize {
        let responses = self.state.nobody(addresses);
        self.send(responses).await
    }

    /// Sends a heartbeat, if the node wants any and has answered the last one. Whether it did. Waiting and cancelling as for
    /// [`DiscoveryStream::reconcile`].
    pub async fn beat(&mut self, time: UnixTime) -> bool {
        let beat = self.state.beat(time);
        self.send(beat.into_iter().collect()).await > 0
    }

    async fn send(&mut self, responses: Vec<DeltaDiscoveryResponse>) -> usize {
        let count = responses.len();
        for response in responses {
            // Where nobody reads any more, `next` is about to say so.
            let _ = self.responses.send(Ok(response)).await;
        }
        count
    }
}
