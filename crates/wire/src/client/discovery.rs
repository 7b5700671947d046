//! The discovery stream, as a node reads it.

use std::net::IpAddr;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::{ClientError, Connected, MAX_MESSAGE};
use crate::discovery::{Batch, ClientState, Kind, Known};
use crate::proto::envoy::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// An open discovery stream.
pub struct Discovery {
    connection: Connected,
    state: ClientState,
    /// Unbounded, and yet never long: after the subscriptions there is one answer for each message that was read, and
    /// whoever asks about addresses bounds them.
    requests: UnboundedSender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    /// When this end last said something that the next heartbeat answers: its subscription, then each heartbeat's answer.
    said: Instant,
    as_of: Option<Instant>,
}

impl Connected {
    /// Subscribes to everything of these kinds. `known` is what an earlier stream ended with: only what differs comes.
    ///
    /// # Errors
    /// The control plane refuses, or is gone.
    pub async fn discover(&self, kinds: &[Kind], known: Known) -> Result<Discovery, ClientError> {
        let state = ClientState::new(kinds, known);
        let (requests, outgoing) = unbounded_channel();
        let said = Instant::now();
        for request in state.subscribe(&self.name) {
            // Its receiver lives in `outgoing`.
            let _ = requests.send(request);
        }
        let mut client =
            AggregatedDiscoveryServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        let request = self.request(UnboundedReceiverStream::new(outgoing));
        let answer = client.delta_aggregated_resources(request).await.map_err(|status| self.failed(&status))?;
        Ok(Discovery { connection: self.clone(), state, requests, responses: answer.into_inner(), said, as_of: None })
    }
}

impl Discovery {
    /// Waits for the next changes. The batch before is accepted by this call: call it when those are applied, or
    /// [`Discovery::refuse`] them first.
    ///
    /// Cancel safe: a call that is dropped loses nothing.
    ///
    /// # Errors
    /// The stream ended. What is known outlives it: see [`Discovery::known`].
    pub async fn next(&mut self) -> Result<Batch, ClientError> {
        self.answer(Ok(()));
        loop {
            let message = self.responses.message().await.map_err(|status| self.connection.failed(&status))?;
            let response = message.ok_or_else(|| self.connection.lost("it closed the stream"))?;
            match self.state.receive(response) {
                Some(batch) => {
                    if batch.kind == Kind::Heartbeat && self.is_complete() {
                        self.as_of = Some(self.said);
                    }
                    return Ok(batch);
                }
                None => self.answer(Ok(())),
            }
        }
    }

    /// Asks what has an address: answered by a resource that has it, unless that is known already, or by
    /// [`Change::Nobody`](crate::discovery::Change::Nobody), and by a resource once something has it.
    pub fn ask(&self, address: IpAddr) {
        // A stream that has ended says so by its other half.
        let _ = self.requests.send(ClientState::ask(address));
    }

    /// No longer wants to know when something has an address that nothing had.
    pub fn forget(&self, address: IpAddr) {
        let _ = self.requests.send(ClientState::forget(address));
    }

    /// Refuses the last batch, with a sentence for the control plane. None of it counts as known.
    pub fn refuse(&mut self, because: &str) {
        self.answer(Err(because.to_owned()));
    }

    /// Whether everything of every kind came and was accepted since this stream began. Before that a view of the mesh
    /// has holes: a policy that it lacks may be one that refuses.
    pub fn is_complete(&self) -> bool {
        self.state.is_complete()
    }

    /// A moment, by this machine's own monotonic clock, at which what has come so far was all that there was to know: it is
    /// at most that old. `None` before the first heartbeat of a complete stream.
    ///
    /// It is when this end said what the last heartbeat answers, so that whoever holds the stream up, for however long,
    /// makes it older and never newer; the clock of the control plane plays no part in it.
    pub fn as_of(&self) -> Option<Instant> {
        self.as_of
    }

    /// What was accepted so far: for the next stream.
    pub fn known(&self) -> &Known {
        self.state.known()
    }

    fn answer(&mut self, verdict: Result<(), String>) {
        if let Some(request) = self.state.answer(verdict) {
            if request.type_url == Kind::Heartbeat.type_url() {
                self.said = Instant::now();
            }
            // A stream that has ended says so by its other half.
            let _ = self.requests.send(request);
        }
    }
}
