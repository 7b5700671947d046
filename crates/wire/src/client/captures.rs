//! The report of an agent: which pods its node has captured, and which it cannot.

use std::collections::BTreeSet;

use mesh::PodUid;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::{ClientError, Connected};
use crate::proto::v1::reports_client::ReportsClient;
use crate::proto::v1::{CaptureConfirmed, CaptureReport};
use crate::report::Report;

/// An open report. It says each new state of a watched node, all of it, one at a time.
pub struct Captures {
    connection: Connected,
    node: watch::Receiver<Report>,
    /// One report at most is in it: the next one waits for the confirmation.
    reports: UnboundedSender<CaptureReport>,
    confirmations: Streaming<CaptureConfirmed>,
    last: u64,
    unconfirmed: Option<BTreeSet<PodUid>>,
}

impl Connected {
    /// Begins to report how a node is, with its state as it is now.
    ///
    /// # Errors
    /// The control plane refuses, or is gone.
    pub async fn report_captures(&self, mut node: watch::Receiver<Report>) -> Result<Captures, ClientError> {
        let (reports, outgoing) = unbounded_channel();
        node.mark_changed();
        let mut client = ReportsClient::new(self.channel.clone()).max_decoding_message_size(1024);
        let request = self.request(UnboundedReceiverStream::new(outgoing));
        let answer = client.capture(request).await.map_err(|status| self.failed(&status))?;
        let confirmations = answer.into_inner();
        Ok(Captures { connection: self.clone(), node, reports, confirmations, last: 0, unconfirmed: None })
    }
}

impl Captures {
    /// Sends what changed and waits until the control plane confirms: peers may be told of the pods in the returned
    /// set, which are captured. Nothing is sent while nobody waits here.
    ///
    /// Cancel safe: a call that is dropped loses nothing.
    ///
    /// # Errors
    /// The stream ended; or what is watched has no owner any more, and everything of it is confirmed.
    pub async fn next(&mut self) -> Result<BTreeSet<PodUid>, ClientError> {
        loop {
            tokio::select! {
                changed = self.node.changed(), if self.unconfirmed.is_none() => match changed {
                    Ok(()) => self.report(),
                    Err(_) => return Err(self.connection.lost("nothing is left to report")),
                },
                confirmed = self.confirmations.message() => {
                    let confirmed = confirmed.map_err(|status| self.connection.failed(&status))?;
                    let confirmed = confirmed.ok_or_else(|| self.connection.lost("it closed the stream"))?;
                    match self.unconfirmed.take_if(|_| confirmed.number == self.last) {
                        Some(pods) => return Ok(pods),
                        None => return Err(self.connection.lost("it confirmed a report that was never made")),
                    }
                }
            }
        }
    }

    fn report(&mut self) {
        let report = self.node.borrow_and_update().clone();
        self.last += 1;
        // A stream that has ended says so by its other half.
        let _ = self.reports.send(report.to_proto(self.last));
        self.unconfirmed = Some(report.captured);
    }
}
