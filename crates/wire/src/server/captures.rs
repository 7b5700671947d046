//! An agent's report, as the control plane sees it.

use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::proto::v1::{CaptureConfirmed, CaptureReport};
use crate::report::Report;

/// One agent's reports of what its node has captured, and what it cannot.
pub struct CaptureStream {
    reports: Streaming<CaptureReport>,
    confirmations: mpsc::Sender<Result<CaptureConfirmed, Status>>,
    unconfirmed: Option<u64>,
}

impl CaptureStream {
    pub(super) fn new(
        reports: Streaming<CaptureReport>,
        confirmations: mpsc::Sender<Result<CaptureConfirmed, Status>>,
    ) -> Self {
        Self { reports, confirmations, unconfirmed: None }
    }

    /// Waits for the next report: the state of the node now. `None`: the reports have ended, which says
    /// nothing about the pods. Cancel safe.
    pub async fn next(&mut self) -> Option<Report> {
        let report = self.reports.message().await.ok().flatten()?;
        self.unconfirmed = Some(report.number);
        Some(Report::from_proto(&report))
    }

    /// Confirms the last report: peers are being told of it.
    pub async fn confirm(&mut self) {
        if let Some(number) = self.unconfirmed.take() {
            // Where nobody reads any more, `next` is about to say so.
            let _ = self.confirmations.send(Ok(CaptureConfirmed { number })).await;
        }
    }
}
